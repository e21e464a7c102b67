# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""VAE: a network that turns noise z into images, learned with the help of a second one that says which z an image has.

Paper: Kingma, Welling, "Auto-Encoding Variational Bayes", 2013, arXiv:1312.6114; [8] is its equation 8.
IWAE: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2015, arXiv:1509.00519.

symbol         in the code    what it is
x              x              images of zeros and ones, (N, C, H, W), float32; D = C H W pixels
z              z              the latent code, (N, latent); its prior is p(z) = N(0, I)
mu, sigma^2    mu, log_var    mean and log of the variance of q(z|x), (N, latent) each: model.encode(x)
l              logits         log(y / (1 - y)), y the probability that a pixel is 1, (N, C, H, W): model.decode(z)
log p(x|z)     log_likelihood in nats, (N,): model.log_likelihood(x, z)
eps            eps            N(0, I), (N, latent)

Wanted: a map that turns one distribution, noise that is easily drawn, into another, that of the images:
  (1) p(x) = integral of p(x|z) p(z) dz with p(z) = N(0, I): draw z, then the pixels
To learn it, p(x) must be known for the images at hand, but hardly any z makes a given x, so draws of p(z) do not help.
A second network says which z may have made x, by a Gaussian for each image; it gives mu and log sigma^2:
  (2) q(z|x) = N(mu(x), diag sigma^2(x))                                                                             [9]
Averaged over the images these must give the prior, E_x q(z|x) = N(0, I), or a new z would fall where no image was. Yet
each image keeps a narrow Gaussian in a place of its own: if all had the same one, z could say nothing about x.
So (x, z) has two laws: data(x) q(z|x), image first, and p(z) p(x|z), code first. Training brings them together, for
KL(data(x) q(z|x) || p(z) p(x|z)) is a constant minus the mean over the data of ELBO(x). And Jensen's inequality,
log p(x) = log E_q[p(x|z) p(z) / q(z|x)] >= E_q[log(p(x|z) p(z) / q(z|x))], makes that ELBO a lower bound of log p(x):
  (3) log p(x) >= ELBO(x) = E_q[log p(x|z)] - KL(q(z|x) || p(z)); the gap is KL(q(z|x) || p(z|x))              [1, 2, 3]
The first part, the reconstruction, wants sigma small and the codes of images apart; the KL wants mu = 0 and sigma = 1.
E_q is estimated by one draw of z. A draw has no derivative, but take its randomness from eps, whose law is fixed:
  (4) z = mu + sigma eps, eps ~ N(0, I), so that d/dmu E_q[f(z)] = E[f'(z)], d/dsigma E_q[f(z)] = E[f'(z) eps]       [4]
  (5) KL(q(z|x) || p(z)) = 1/2 sum_latents ( mu^2 + sigma^2 - 1 - log sigma^2 )                            [Appendix B]
Pixels are independent once z is known. With log y = l - log(1 + e^l) and log(1 - y) = -log(1 + e^l):
  (6) log p(x|z) = sum_pixels ( x log y + (1 - x) log(1 - y) ) = sum_pixels ( x l - log(1 + e^l) )                  [11]
Pixels and latents are summed, as log p(x|z) and the KL are sums over them; only over the images is the mean taken:
  (7) loss = -1/N sum_images ELBO(x), of the N images of a batch                                                     [8]
A grey byte is read as a chance. A training image's pixels are drawn anew at each use, those of the test set only once:
  (8) x = 1 with probability byte / 255, else 0
K draws of z give a better bound than (3), its case K = 1. It never falls as K grows, and tends to log p(x):
  (9) log p(x) >= E log( 1/K sum_k w_k ), w_k = p(x|z_k) p(z_k) / q(z_k|x), z_k from (4), with                [IWAE]
      log w_k = log p(x|z_k) + 1/2 sum_latents ( eps_k^2 - z_k^2 + log sigma^2 )
A latent that the encoder does not use has mu = 0, sigma = 1 for all images, and no KL. In use, or active, are those of
  (10) Var_x( mu_j(x) ) > 0.01                                                                                   [IWAE]
Two latents fill a plane. It is cut into cells of equal probability, not area, a z in each; Phi is the normal CDF:
  (11) z = Phi^-1(u) = sqrt(2) erfinv(2 u - 1) with u uniform on 0 .. 1                                    [Appendix A]

Trip wires: a mean over pixels in (6) makes the KL D times too heavy, and all codes alike. log_var is log sigma^2, not
sigma and not log sigma. ELBO and log p(x) lie below 0, higher is better; many later papers print -log p(x). Nats, not
bits. x is binary: for grey or -1 .. 1 the numbers are no log p(x). Drawn anew (dynamic) or once (static), binarised
MNIST is two data sets, whose figures do not compare. The pictures show y, the chances, and not draws of x.
Differs from the paper in: a deeper network, with convolutions in the decoder, and SiLU for tanh; torch's initial
weights; Adam for Adagrad; no prior on the weights; (8), which is IWAE's; (7) is [8] divided by the number of images in
the data set; results come from an average of the weights; the learning rate rises for 200 steps and falls to zero.

python vae.py --data mnist --nll 500        435 s on two cores, 309 for the 500 draws; ELBO -91.72, log p(x) -87.90
python vae.py --latent 2 --out out/plane    two latents, and manifold.png
"""
import argparse, contextlib, copy, gzip, hashlib, http.client, inspect, io, itertools, math, sys, time
import urllib.request, warnings, zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

# --------------------------------------------------------------------------------------------------------- method -----
def binarise(images, generator=None):
    """uint8 images -> zeros and ones in float32, the same shape, other ones at each call. ValueError if not uint8."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, 0 .. 255, not {images.dtype}")
    return (255 * torch.rand(images.shape, generator=generator, device=images.device) < images).float()  # (8)

def reparameterise(mu, log_var, eps):
    """z ~ N(mu, exp(log_var)) from eps ~ N(0, I), with a gradient for mu and log_var."""
    return mu + (0.5 * log_var).exp() * eps  # (4)

def kl_normal(mu, log_var):
    """KL(N(mu, diag exp(log_var)) || N(0, I)) in nats, (N, latent) each -> (N,)."""
    return 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum(1)  # (5)

def log_bernoulli(x, logits):
    """log p(x|z) in nats, x of zeros and ones, (N, ...) each -> (N,)."""
    return (x * logits - F.softplus(logits)).flatten(1).sum(1)  # (6)

def elbo_parts(model, x, eps=None):
    """Reconstruction and KL of (3) in nats, (N,) each, by one draw of z. eps: (N, latent), by default drawn."""
    mu, log_var = model.encode(x)
    z = reparameterise(mu, log_var, torch.randn_like(mu) if eps is None else eps)
    return model.log_likelihood(x, z), kl_normal(mu, log_var)  # (3)

def elbo(model, x, eps=None):
    """ELBO(x) in nats -> (N,), its expectation estimated by one draw of z. eps: (N, latent), by default drawn."""
    reconstruction, kl = elbo_parts(model, x, eps)
    return reconstruction - kl  # (3)

def loss_elbo(model, x, eps=None):
    """What training minimises, and its two parts, nats per image -> (3,): the loss, the reconstruction, the KL."""
    reconstruction, kl = (part.mean() for part in elbo_parts(model, x, eps))
    return torch.stack([kl - reconstruction, reconstruction, kl])  # (7)

@torch.inference_mode()
def log_prob(model, x, k, generator=None, chunk=2000):
    """The bound on log p(x) by k draws of z, nats (N,), without gradients. Needs memory for max(N, chunk) images."""
    if k < 1:
        raise ValueError(f"k = {k}: the bound takes at least one draw")
    mu, log_var = model.encode(x)
    total, most = mu.new_full((len(x),), -math.inf), max(1, chunk // max(1, len(x)))
    for first in range(0, k, most):
        n = min(most, k - first)  # draws for each image at once
        eps = torch.randn(n, *mu.shape, generator=generator, dtype=mu.dtype, device=mu.device)
        z = reparameterise(mu, log_var, eps)  # (n, N, latent)
        log_p = model.log_likelihood(x.expand(n, *x.shape).flatten(0, 1), z.flatten(0, 1)).view(n, len(x))
        log_w = log_p + 0.5 * (eps.square() - z.square() + log_var).sum(2)  # (9)
        total = torch.logaddexp(total, log_w.logsumexp(0))
    return total - math.log(k)  # (9)

def active_latents(mu):
    """Which latents are in use, mu (N, latent) of N images -> (latent,) bools."""
    return mu.var(0, correction=0) > 0.01  # (10)

def latent_plane(side):
    """A z from each of side x side cells of equal probability -> (side^2, 2), the second number running fastest."""
    u = (torch.arange(side) + 0.5) / side
    z = 2**0.5 * torch.erfinv(2 * u - 1)  # (11)
    return torch.cartesian_prod(z, z)

# -------------------------------------------------------------------------------------------------------- network -----
# Any model with encode(x) -> mu, log_var and log_likelihood(x, z) would do above. The pictures want decode(z), too.
class VAE(nn.Module):
    """Fully connected layers, and two transposed convolutions to end the decoder. x (N, channels, size, size).

    In eval mode an x with anything but zeros and ones in it is a ValueError; training does not wait for the check."""

    def __init__(self, channels=1, size=28, width=512, latent=50):
        super().__init__()
        self.shape, self.latent = (channels, size, size), latent
        maps, side = -(-width // 32), -(-size // 4)  # rounded up
        self.encoder = nn.Sequential(
            nn.Linear(channels * size * size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2 * latent))
        self.decoder = nn.Sequential(
            nn.Linear(latent, width), nn.SiLU(), nn.Linear(width, 2 * maps * side * side), nn.SiLU(),
            nn.Unflatten(1, (2 * maps, side, side)),  # (N, 2 maps, side, side)
            nn.ConvTranspose2d(2 * maps, maps, 4, stride=2, padding=1), nn.SiLU(),
            nn.ConvTranspose2d(maps, channels, 4, stride=2, padding=1))

    def encode(self, x):
        """x -> mu, log_var, (N, latent) each."""
        if not self.training and len(odd := x[(x != 0) & (x != 1)]):
            raise ValueError(f"x must be zeros and ones, as binarise() makes them, but has {odd[0]:g} in it")
        return self.encoder(x.flatten(1)).chunk(2, 1)  # (2)

    def decode(self, z):
        """z -> logits (N, C, H, W)."""
        return self.decoder(z)[:, :, : self.shape[1], : self.shape[2]]  # at most 3 rows and columns are cut off

    def log_likelihood(self, x, z):
        """log p(x|z) in nats -> (N,)."""
        return log_bernoulli(x, self.decode(z))

# ------------------------------------------------------------------------------------------------------- plumbing -----
# Data, pictures, checkpoints, progress, flags: the same text in every file that has them, and nothing of the method.
MNIST_URLS = "https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"
MNIST_SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
DAMAGED = "not a checkpoint, damaged, or of another network; --fresh trains anew over it"

@contextlib.contextmanager
def or_say(sentence):
    """Whatever goes wrong in here is a ValueError with this sentence: of errors, libraries have their own many."""
    try:
        yield
    except Exception as e:
        raise ValueError(f"{sentence} ({type(e).__name__})") from None

def write(files):
    """{path: bytes}: all of them or none, so that a full disk or a kill leaves there what was there before."""
    parts = {path: path.with_name(path.name + ".part") for path in files}
    try:
        for path, raw in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            parts[path].write_bytes(raw)
        for path, part in parts.items():
            part.replace(path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)

def draw_digits(n, size=28, seed=0):
    """uint8 (n, 1, size, size): image i shows i % 10 in Pillow's font, in one of four widths, warped at random."""
    g, side, font = torch.Generator().manual_seed(seed), 2 * size, ImageFont.load_default(3.2 * size)
    glyphs, images = torch.empty(10, 4, 1, side, side), torch.empty(n, 1, size, size, dtype=torch.uint8)
    for digit, stroke in itertools.product(range(10), range(4)):
        tile = Image.new("L", (2 * side, 2 * side))
        ImageDraw.Draw(tile).text((side, side), str(digit), 255, font, "mm", stroke_width=stroke * size // 28)
        glyphs[digit, stroke, 0] = torch.from_numpy(np.array(tile.reduce(2)))
    spread = torch.tensor([[0.12, 0.15, 0.06], [0.1, 0.12, 0.06]])
    maps = torch.eye(2, 3) + spread * (2 * torch.rand(n, 2, 3, generator=g) - 1)
    for i in torch.arange(n).split(1000):
        grid = F.affine_grid(maps[i], (len(i), 1, side, side), align_corners=False)
        drawn = F.grid_sample(glyphs[i % 10, torch.randint(4, (len(i),), generator=g)], grid, align_corners=False)
        images[i] = F.avg_pool2d(drawn, 2).round().to(torch.uint8)
    return images

def download_mnist(folder, urls=MNIST_URLS):
    """MNIST's four files into folder, each from the first mirror that has the right bytes. OSError if none has."""
    for name, sha256 in MNIST_SHA256.items():
        reasons = []
        for url in urls if not (folder / name).exists() else ():
            try:
                with urllib.request.urlopen(url + name, timeout=30) as answer:
                    raw = answer.read()
                if hashlib.sha256(raw).hexdigest() == sha256:
                    write({folder / name: raw})
                    break
                reasons.append(f"{url}: wrong SHA-256")
            except (OSError, http.client.HTTPException) as e:
                reasons.append(f"{url}: {e}")
        if not (folder / name).exists():
            raise OSError(f"{name}: no mirror gave it ({'; '.join(reasons)}); --data digits needs no network")

def read_idx(path):
    """An IDX file of bytes (MNIST's format), gzipped or not -> uint8 array. ValueError if it is none, or cut short."""
    raw = path.read_bytes()
    with or_say(f"{path}: not an IDX file of bytes, or empty, or cut short"):
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, 4 + 4 * raw[3], 4)]
        if raw[:3] != b"\0\0\x08" or not math.prod(shape) or len(raw) != 4 + 4 * raw[3] + math.prod(shape):
            raise ValueError
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)

def read_picture(path, size, channels):
    """The middle square of a picture, on white where it is transparent, scaled -> uint8 (channels, size, size)."""
    with or_say(f"{path}: not a picture that can be read"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of what it reads all the same, or refuses besides
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)
        if picture.mode[0] == "I":  # 16 bits
            picture = picture.convert("I").point(lambda v: v * (1 / 257))
        if picture.has_transparency_data:
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
        picture = ImageOps.fit(picture.convert("RGB" if channels == 3 else "L"), (size, size))
        return np.array(picture).reshape(size, size, channels).transpose(2, 0, 1)

def load_images(data, size=28, channels=1, test=False):
    """uint8 (N, channels, size, size) from "digits", "mnist", a folder of IDX files or one of pictures, of which every
    tenth is kept for the test. ValueError or OSError, in one sentence, for what cannot be read."""
    folder, part = Path("data/mnist" if data == "mnist" else data), "t10k" if test else "train"
    if data == "digits":
        return draw_digits(10_000 if test else 60_000, size, seed=int(test)).expand(-1, channels, -1, -1)
    if data == "mnist":
        download_mnist(folder)
    if not data or not folder.is_dir():
        raise ValueError(f"--data {data}: no such folder")
    if idx := sorted(folder.glob("*-images*ubyte*")):
        path = next((p for p in idx if p.name.startswith(part)), folder / f"{part}-images-idx3-ubyte.gz")
        x = torch.from_numpy(read_idx(path).copy())
        if x.dim() != 3:
            raise ValueError(f"{path}: want images (N, H, W), got {tuple(x.shape)}")
        if x.shape[1:] != (size, size):
            x = F.interpolate(x[:, None], (size, size), mode="bilinear", antialias=True)[:, 0]
        return x[:, None].expand(-1, channels, -1, -1)
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES)
    if not paths:
        raise ValueError(f"--data {folder}: neither IDX files nor pictures in it")
    every = min(10, len(paths))
    kept = [p for i, p in enumerate(paths) if (i % every == every - 1) == test] or paths
    return torch.from_numpy(np.stack([read_picture(p, size, channels) for p in kept]))

def to_float(x):
    """uint8 0 .. 255 -> float32 -1 .. 1."""
    return x.float() / 127.5 - 1

def to_uint8(x):
    """float -1 .. 1 -> uint8 0 .. 255, on the CPU; what lies outside is cut."""
    return (x * 127.5 + 127.5).round().clamp(0, 255).to("cpu", torch.uint8)

def save_grid(path, x, columns=8):
    """Images in -1 .. 1, (N, C, H, W), as one PNG, row by row, small ones enlarged."""
    x = F.pad(to_uint8(x), (0, 2, 0, 2), value=96)  # a line between the images
    x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, -len(x) % columns), value=96)
    sheet = x.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)[:-2, :-2]  # (H', W', C)
    file, zoom = io.BytesIO(), max(1, 64 // x.shape[2])
    Image.fromarray(sheet.squeeze(2).repeat_interleave(zoom, 0).repeat_interleave(zoom, 1).numpy()).save(file, "PNG")
    write({path: file.getvalue()})

def save_samples(out, x):
    """Images in -1 .. 1, (N, C, H, W): all into out/samples.npy, uint8 (N, H, W[, 3]), 64 into out/samples.png."""
    file = io.BytesIO()
    np.save(file, to_uint8(x).permute(0, 2, 3, 1).squeeze(3).numpy())
    write({out / "samples.npy": file.getvalue()})
    save_grid(out / "samples.png", x[:64])

def save_checkpoint(path, method, settings, parts, done, log, columns=("loss",)):
    """parts: what has a state_dict; log: rows (iteration, the columns' values), which also go into log.csv."""
    file, state = io.BytesIO(), [part.state_dict() for part in parts]
    torch.save(dict(method=method, settings=settings, parts=state, done=done, log=log, rng=torch.get_rng_state()), file)
    rows = [("iteration", *columns), *((str(i), *(f"{v:.6f}" for v in values)) for i, *values in log)]
    table = "".join(",".join(row) + "\n" for row in rows).encode()
    write({path.with_name("log.csv"): table, path: file.getvalue()})  # killed in between, the log is made again

def load_checkpoint(path, methods, device, wanted=()):
    """The dict that save_checkpoint wrote. ValueError if another method or other settings made it."""
    raw = path.read_bytes()
    with or_say(f"{path}: {DAMAGED}"):
        if zipfile.ZipFile(io.BytesIO(raw)).testzip():
            raise zipfile.BadZipFile  # a checksum is not right; torch.load does not look
        state = torch.load(io.BytesIO(raw), map_location=device, weights_only=True)
        method, had, _ = state["method"], dict(state["settings"]), state["parts"][2]
    if method not in methods:
        raise ValueError(f"{path}: made by {method}.py, not by {' or '.join(methods)}.py")
    for name in wanted:
        if had.get(name) != wanted[name]:
            raise ValueError(f"{path}: made with {name} {had.get(name)}, not {wanted[name]}; "
                             "--fresh trains anew over it, --out elsewhere keeps it")
    return state

def resume(path, parts, state):
    """Put a checkpoint back into the parts and the generator -> iterations done, log. ValueError if it does not fit."""
    with or_say(f"{path}: {DAMAGED}"):
        for part, saved in zip(parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        torch.manual_seed(state["settings"]["seed"] + state["done"])  # an accelerator's is not saved: new numbers there
        torch.set_rng_state(state["rng"].cpu())
    return state["done"], state["log"]

class Progress:
    """One line that renews itself in a terminal; elsewhere a line every 20 seconds and one at the end."""

    def __init__(self, what, unit, total, done=0):
        self.what, self.unit, self.total, self.first = what, unit, total, done
        self.start = self.shown = time.perf_counter()

    def __call__(self, done, each, note=""):
        """done of total rounds are over, each of them worth `each` units."""
        now, tty = time.perf_counter(), sys.stdout and sys.stdout.isatty()
        if done == self.total or now - self.shown > (0.2 if tty else 20):
            self.shown, rate = now, (done - self.first) / (now - self.start)
            line = f"{self.what} {done}/{self.total}  {note}  {rate * each:,.0f} {self.unit}/s"
            line += f"  {(self.total - done) / rate:.0f} s left" if done < self.total else f"  {now - self.start:.0f} s"
            print(f"\r{line:<79}" if tty else line, end="" if tty and done < self.total else "\n", flush=True)

class Parser(argparse.ArgumentParser):
    """argparse, but whatever the user can mend takes one line on stderr and ends with status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(str(message).split())}\n")

    @contextlib.contextmanager
    def guard(self):
        if hasattr(sys.stdout, "reconfigure"):  # what the terminal's encoding lacks is no reason to stop
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            yield
        except (OSError, ValueError, FloatingPointError) as e:
            self.error(e)
        except KeyboardInterrupt:
            self.exit(130, "\nstopped; the same command goes on from the last save\n")

def at_least(least):
    def number(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)
    return number

def image_parser(doc, name, train):
    """The flags that all files on images share; the defaults of training are those of this file's train()."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser(description=doc.splitlines()[0], formatter_class=form, allow_abbrev=False)
    add, default = parser.add_argument, inspect.signature(train).parameters
    add("--data", default="digits", help="digits (drawn), mnist (downloaded), a folder of IDX files or of pictures")
    add("--size", type=at_least(1), default=28, help="side to which images are scaled, in pixels")
    add("--channels", type=int, choices=(1, 3), default=1, help="1 for grey, 3 for colour")
    add("--iters", type=at_least(1), default=default["iters"].default, help="training steps")
    add("--batch", type=at_least(1), default=default["batch"].default, help="images a training step")
    add("--lr", type=float, default=default["lr"].default, help="highest learning rate")
    add("--samples", type=at_least(1), default=64, help="images to draw at the end")
    add("--out", type=Path, default=Path("out", name), help="run folder")
    add("--device", default="auto", help="auto is cuda, else mps, else cpu")
    add("--seed", type=int, default=0, help="same seed, same machine: same bits on the CPU")
    add("--fresh", action="store_true", help="train anew over the run folder's checkpoint")
    add("--compile", action="store_true", help="torch.compile the network for training")
    return parser

def pick_device(name):
    """ValueError if this machine does not have it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.ones(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError) as e:  # not known, not built in, not there
        raise ValueError(f"--device {name}: {str(e).splitlines()[0]}") from None

# ------------------------------------------------------------------------------------ training, sampling, command -----
def train(images, iters=6800, batch=100, lr=3e-3, width=512, latent=50, device="cpu", seed=0, path=None, fresh=False,
          compiled=False):
    """uint8 images (N, C, H, H) on the CPU -> the averaged model, ready to sample. Seeds torch's global generator.

    path: where to save; unless fresh, training goes on from what is there. ValueError if that was made otherwise,
    FloatingPointError if the loss is not finite (what was saved last stays)."""
    wanted = dict(channels=images.shape[1], size=images.shape[2], width=width, latent=latent, iters=iters, batch=batch,
                  lr=lr, seed=seed, images=hashlib.sha256(images.contiguous().numpy()).hexdigest()[:12])
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be square, not {images.shape[3]}x{images.shape[2]}")
    torch.manual_seed(seed)
    model = VAE(images.shape[1], images.shape[2], width, latent).to(device)
    average = copy.deepcopy(model).requires_grad_(False).eval()
    opt = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99))
    parts, done, log = (model, average, opt), 0, []
    if path and path.exists() and not fresh:
        done, log = resume(path, parts, load_checkpoint(path, ["vae"], device, wanted))
    losses, images = torch.compile(loss_elbo) if compiled else loss_elbo, images.to(device)
    progress, total, saved = Progress("iteration", "images", iters, done), torch.zeros(3, device=device), time.time()
    for i in range(done, iters):
        opt.param_groups[0]["lr"] = lr * min((i + 1) / 200, 1 - i / iters)
        x = binarise(images[torch.randint(len(images), (batch,), device=device)])  # other zeros and ones each time
        loss = losses(model, x)
        opt.zero_grad()
        loss[0].backward()
        opt.step()
        memory = min(0.995, (1 + i) / (10 + i))  # short while the weights still move fast
        for a, p in zip(average.parameters(), model.parameters()):
            a.lerp_(p.detach(), 1 - memory)
        total += loss.detach()
        if (i + 1) % 100 == 0 or i + 1 == iters:
            log.append((i + 1, *(total / (i % 100 + 1)).tolist()))  # the only place where the device is waited for
            total.zero_()
            if not math.isfinite(log[-1][1]):
                raise FloatingPointError(f"the loss is {log[-1][1]} at iteration {i + 1}; try a smaller --lr")
            if path and (i + 1 == iters or time.time() - saved > 10):
                save_checkpoint(path, "vae", wanted, parts, i + 1, log, ("loss", "reconstruction", "kl"))
                saved = time.time()
        progress(i + 1, batch, f"loss {log[-1][1]:.2f} nats" if log else "")
    return average

def load(path, device="cpu"):
    """The averaged model of a checkpoint, ready to sample; model.shape is the (C, H, W) of its images."""
    state = load_checkpoint(Path(path), ["vae"], device)
    with or_say(f"{path}: {DAMAGED}"):
        model = VAE(*(state["settings"][name] for name in ("channels", "size", "width", "latent")))
        model.load_state_dict(state["parts"][1])
    return model.to(device).requires_grad_(False).eval()

@torch.inference_mode()
def chances(model, z):
    """The chance y of each pixel to be 1, as an image in -1 .. 1 -> (N, C, H, W)."""
    return 2 * model.decode(z).sigmoid() - 1

def sample(model, n, seed=0, device="cpu", chunk=1000):
    """n images -> (n, C, H, W), values -1 .. 1: not zeros and ones, but how likely each pixel is to be 1."""
    generator = torch.Generator(device).manual_seed(seed)
    z = torch.randn(n, model.latent, generator=generator, device=device)  # (1)
    return torch.cat([chances(model, part) for part in z.split(chunk)])  # (1)

@torch.inference_mode()
def evaluate_elbo(model, x, k=0, seed=0, chunk=100):
    """Images of zeros and ones -> nats (N, 2): reconstruction, KL; with k > 0 (N, 3): the bound by k draws, too."""
    generator, other = (torch.Generator(x.device).manual_seed(s) for s in (seed, seed + 1))
    progress, rows, done = Progress("test image", "images", len(x)), [], 0
    for part in x.split(chunk):
        eps = torch.randn(len(part), model.latent, generator=generator, device=x.device)
        bounds = [log_prob(model, part, k, other)] if k else []
        rows.append(torch.stack([*elbo_parts(model, part, eps), *bounds], 1))
        done += len(part)
        progress(done, 1)
    return torch.cat(rows)

def main(argv=None):
    parser = image_parser(__doc__, "vae", train)
    add, default = parser.add_argument, inspect.signature(train).parameters
    add("--width", type=at_least(1), default=default["width"].default, help="units of a hidden layer")
    add("--latent", type=at_least(1), default=default["latent"].default, help="numbers in z; 2 gives manifold.png")
    add("--nll", type=at_least(0), default=0, help="K, draws of z for the bound on log p(x), 0 for none; takes minutes")
    args = parser.parse_args(argv)
    with parser.guard():
        device, path = pick_device(args.device), args.out / "model.pt"
        images, held_out = (load_images(args.data, args.size, args.channels, test) for test in (False, True))
        print(f"{len(images)} images of {args.size}x{args.size}x{args.channels} from {args.data}, on {device}")
        train(images, args.iters, args.batch, args.lr, args.width, args.latent, device, args.seed, path, args.fresh,
              args.compile)
        model = load(path, device)
        save_samples(args.out, sample(model, args.samples, args.seed, device))
        x = binarise(held_out, torch.Generator().manual_seed(0)).to(device)  # the same test set whatever --seed is
        mu = torch.cat([model.encode(part)[0] for part in x.split(1000)])
        shown = torch.arange(32, device=device) % len(x)
        pairs = torch.stack([2 * x[shown] - 1, chances(model, mu[shown])], 1)  # (32, 2, C, H, W)
        save_grid(args.out / "reconstructions.png", pairs.flatten(0, 1))
        share = torch.arange(8, device=device).view(8, 1) / 7
        ends = pairs[:16, 0].unflatten(0, (8, 2)), mu[shown[:16]].unflatten(0, (8, 2))
        rows = [torch.stack([a, *chances(model, z_a + share * (z_b - z_a)), b]) for (a, b), (z_a, z_b) in zip(*ends)]
        save_grid(args.out / "walk.png", torch.cat(rows), 10)
        if args.latent == 2:
            save_grid(args.out / "manifold.png", chances(model, latent_plane(20).to(device)), 20)
        nats = evaluate_elbo(model, x, args.nll).cpu().double()  # no float64 on mps
        values = torch.cat([nats[:, :1] - nats[:, 1:2], nats], 1)  # (N, 3 or 4): ELBO, reconstruction, KL, bound
        mean, error = values.mean(0).tolist(), (values.std(0, correction=0) / len(x) ** 0.5).tolist()
        print(f"test ELBO of {len(x)} images: {mean[0]:.2f} +- {error[0]:.2f} nats an image = reconstruction "
              f"{mean[1]:.2f} - KL {mean[2]:.2f}; {active_latents(mu).sum()} of {args.latent} latents are active")
        if args.nll:
            print(f"log p(x) of them: at least {mean[3]:.2f} +- {error[3]:.2f} nats an image, by {args.nll} draws of z")
        print(f"{args.samples} samples: samples.png, samples.npy in {args.out}, with reconstructions.png (each to the "
              f"right of its image), walk.png, {'manifold.png, ' * (args.latent == 2)}log.csv, model.pt")

if __name__ == "__main__":
    main()
