# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""GAN: a generator that learns to draw by fooling a discriminator, which learns to tell its images from real ones.

Paper: Goodfellow et al., "Generative Adversarial Nets", 2014, arXiv:1406.2661. [2] is its equation 2.

symbol   in the code         what it is
x        x                   real images, (N, C, H, W), -1 .. 1: the byte k is 2 k / 255 - 1; their law is p_data
z        z                   latents, (N, Z), N(0, I); Z is --latent
G(z)     G(z), fake          generated images, (N, C, H, W), -1 .. 1; their law is p_g
d(x)     D(x), real_logits   what the network of D answers, (N,): any real number, above 0 if x looks real
D(x)     logits.sigmoid()    the paper's D, 0 .. 1: the probability that x is real, 1 / (1 + e^-d(x))
JS       >= js_estimate      Jensen-Shannon divergence of p_data and p_g, 0 .. log 2 = 0.693 nats; (4) bounds it
k        k                   steps of D for each step of G

The game. D raises, and G lowers, one value:
  (1) min_G max_D V(D, G) with V(D, G) = E_{x ~ p_data} log D(x) + E_z log(1 - D(G(z)))                              [1]
The best D, for a G that is held fixed. V is the integral of p_data(x) log D(x) + p_g(x) log(1 - D(x)) over x [3], and
D(x) is free at each x. a log y + b log(1 - y) is concave in y; its slope a / y - b / (1 - y) is 0 at y = a / (a + b):
  (2) D*(x) = p_data(x) / (p_data(x) + p_g(x)), so d*(x) = log p_data(x) - log p_g(x)                                [2]
What that leaves to G. Put (2) into (1), and write p_data + p_g as 2 m, which takes log 2 out of each logarithm:
  (3) C(G) = V(D*, G) = -log 4 + KL(p_data || m) + KL(p_g || m) = -log 4 + 2 JS(p_data || p_g)                 [4, 5, 6]
JS is 0 if the two laws are the same, and above 0 if not. So the least C is -log 4, at p_g = p_data and nowhere else;
there D* is 1/2 for every x [Theorem 1]. No D has a higher V than D*, so what any D reaches is a bound:
  (4) JS(p_data || p_g) >= (V(D, G) + log 4) / 2, and the two are equal for D = D*
Logits. With softplus(u) = log(1 + e^u), log D = -softplus(-d) and log(1 - D) = -softplus(d), so that D lowers
  (5) loss_D = -V(D, G) = E softplus(-d(x)) + E softplus(d(G(z)))
G is in the second half of V only. It lowers that half, or raises log D(G(z)) in its place:
  (6) minimax:       loss_G = E log(1 - D(G(z))) = -E softplus(d(G(z))),  with the slope -D(G(z)) in the logit
  (7) nonsaturating: loss_G = -E log D(G(z)) = E softplus(-d(G(z))),  with the slope -(1 - D(G(z)))      [section 3]
Either slope is negative: both losses push the logit of each generated image up. They differ in the weight: a bad image
has D near 0, and there (6) lets go, when there is most to learn, while (7) pulls with full strength. If p_g = p_data
and D = D*, d is 0 everywhere, no change of an image changes it, and either gradient is 0: the fixed point is the same.
Each player moves while the other is held fixed; theta_D and theta_G are their weights:
  (8) k times theta_D <- theta_D - step grad loss_D, then once theta_G <- theta_G - step grad loss_G       [Algorithm 1]
Between two latents one walks at the distance from 0 where Gaussian noise lies, theta being the angle between u and v:
  (9) great_circle(u, v, a) = (sin((1 - a) theta) u + sin(a theta) v) / sin(theta)

Trip wires: the network of D answers with logits, not probabilities. D's step detaches the generated images, G's must
not. A loss of D near 0 is no good news: D has won, or knows its images by heart. Nats, not bits. (4) holds on average
over images new to D, if D looks at one image at a time. In training it does not: BatchNorm gives real and generated
images, which pass in batches of their own, the mean and variance of their batch. So js in log.csv is no bound, only the
last line printed is. For it, and to draw, G and D are in .eval(): no dropout, and the running mean and variance, those
of D from real and generated batches together. Mode collapse, few pictures for all z: raise --k or lower --lr.
Differs from the paper in: convolutions and batch norm much like those of DCGAN (Radford et al. 2015, arXiv:1511.06434),
with its initial weights and Adam's beta_1 = 0.5, but beta_2 = 0.99 and ten times its learning rate; D's last generated
batch serves the step of G too; the images drawn and the last line printed come from averages of the weights; the
learning rate rises for 200 steps and then falls to 40 %; no Parzen windows.

python gan.py --data mnist --samples 2000         155 s on two cores; fd 14.1
python gan.py --loss minimax --out out/minimax    the game as it was first written
"""
import argparse, contextlib, copy, gzip, hashlib, http.client, inspect, io, itertools, math, os, sys, time
import urllib.request, warnings, zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

# --------------------------------------------------------------------------------------------------------- method -----
def loss_d(real_logits, fake_logits):
    """What D lowers: -V in nats, a scalar. Logits (N,) and (M,) of real and of generated images; N and M may differ."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()  # (5)

def loss_g(fake_logits, kind="nonsaturating"):
    """What G lowers, a scalar in nats, from the logits (N,) of its images. ValueError if the kind is unknown."""
    if kind == "nonsaturating":  # the default: an image that D is sure to reject has the slope -1 here, and 0 below
        return F.softplus(-fake_logits).mean()  # (7)
    if kind == "minimax":
        return -F.softplus(fake_logits).mean()  # (6)
    raise ValueError(f"loss {kind!r}: must be 'nonsaturating' or 'minimax'")

def js_estimate(real_logits, fake_logits):
    """A lower bound of JS(p_data || p_g) in nats, a scalar at most log 2; below 0 if D is worse than tossing a coin."""
    return (math.log(4) - loss_d(real_logits, fake_logits)) / 2  # (4)

def d_step(D, opt, x, fake):
    """One step of D. Images (N, C, H, W) -> their logits before it, (N,) each. G and its gradients stay as they are."""
    # detach: the same numbers without their history. With the history, backward() would go on into G, for as long as a
    # step of G takes, and use the history up, so that G's own step, which needs it, ends in an error.
    real_logits, fake_logits = D(x), D(fake.detach())  # a batch each
    opt.zero_grad()
    loss_d(real_logits, fake_logits).backward()  # (1), D raises V
    opt.step()  # (2) is what D moves to, by (8)
    return real_logits.detach(), fake_logits.detach()

def g_step(G, D, opt, fake, kind="nonsaturating"):
    """One step of G; fake = G(z), not detached -> the loss before it. D's weights and gradients stay as they are; the
    running statistics of its BatchNorm do not."""
    loss = loss_g(D(fake), kind)  # the gradient comes to G through D and the image
    opt.zero_grad()
    loss.backward(inputs=list(G.parameters()))  # D hands it on; none is computed for D's own weights
    opt.step()  # (3) is what G moves down, by (8)
    return loss.detach()

def great_circle(u, v, a):
    """From u (a = 0) to v (a = 1), both (Z,), a a float or (M, 1) -> (Z,) or (M, Z)."""
    theta = torch.arccos(((u * v).sum() / (u.norm() * v.norm())).clamp(-1, 1))
    if theta.sin() < 1e-4:  # one direction, or two opposite ones, between which no circle is the shortest way
        return u + a * (v - u)
    return (torch.sin((1 - a) * theta) * u + torch.sin(a * theta) * v) / torch.sin(theta)  # (9)

# -------------------------------------------------------------------------------------------------------- network -----
# Any G from (N, Z) to (N, C, H, W) and any D from there to (N,) would do. These are small relatives of DCGAN's.
def dcgan_weights(layer):
    """Weights from N(0, 0.02^2); biases stay torch's, and BatchNorm at scale 1 and shift 0."""
    if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(layer.weight, 0, 0.02)

class Generator(nn.Module):
    """z (N, latent) -> images (N, channels, size, size) in -1 .. 1. ValueError if size is less than 4."""

    def __init__(self, channels=1, size=28, width=16, latent=64):
        super().__init__()
        if size < 4:
            raise ValueError(f"--size {size}: D halves the side twice, so it must be at least 4")
        self.shape, self.latent, w, side = (channels, size, size), latent, width, -(-size // 4)  # rounded up
        self.net = nn.Sequential(
            nn.Linear(latent, 4 * w * side * side, bias=False), nn.Unflatten(1, (4 * w, side, side)),
            nn.BatchNorm2d(4 * w), nn.ReLU(),  # (N, 4 w, side, side)
            nn.ConvTranspose2d(4 * w, 2 * w, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(2 * w), nn.ReLU(),
            nn.ConvTranspose2d(2 * w, w, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(w), nn.ReLU(),
            nn.Conv2d(w, channels, 3, padding=1), nn.Tanh())  # (N, channels, 4 side, 4 side)
        self.apply(dcgan_weights)

    def forward(self, z):
        return self.net(z)[:, :, : self.shape[1], : self.shape[2]]  # at most 3 rows and columns are cut off

class Discriminator(nn.Module):
    """Images (N, channels, size, size) -> logits (N,). ValueError if size is less than 4."""

    def __init__(self, channels=1, size=28, width=16):
        super().__init__()
        if size < 4:
            raise ValueError(f"--size {size}: D halves the side twice, so it must be at least 4")
        w, side = width, size // 4
        self.net = nn.Sequential(
            nn.Conv2d(channels, w, 4, stride=2, padding=1), nn.LeakyReLU(0.2),  # (N, w, size // 2, size // 2)
            nn.Conv2d(w, 2 * w, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(2 * w), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * w, 4 * w, 3, padding=1, bias=False), nn.BatchNorm2d(4 * w), nn.LeakyReLU(0.2),
            nn.Dropout2d(0.25), nn.Flatten(), nn.Linear(4 * w * side * side, 1))
        self.apply(dcgan_weights)

    def forward(self, x):
        return self.net(x).squeeze(1)

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

def processes(device, batch):
    """(rank, number) of the processes that torchrun started, a GPU each or the CPU; (0, 1) of any other. All but the
    first fall silent. ValueError if they cannot share a batch equally."""
    dist, cuda = torch.distributed, torch.cuda.is_available() and str(device) != "cpu"
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo")
        sys.stdout = open(os.devnull, "w") if dist.get_rank() else sys.stdout
    if batch % dist.get_world_size():
        raise ValueError(f"--batch {batch}: {dist.get_world_size()} processes cannot share it equally")
    return dist.get_rank(), dist.get_world_size()

def layout(device):
    """channels_last pays on the CPU; convolutions on mps misread such weights (pytorch issue 192212)."""
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last

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
def train(images, iters=7200, batch=32, lr=2e-3, width=16, latent=64, k=1, loss="nonsaturating", device="cpu", seed=0,
          path=None, fresh=False, compiled=False):
    """uint8 images (N, C, H, H) on the CPU -> the averaged G, ready to sample. Seeds torch's global generator.

    path: where to save; unless fresh, training goes on from what is there. ValueError if that was made otherwise,
    FloatingPointError if a loss is not finite (what was saved last stays)."""
    wanted = dict(channels=images.shape[1], size=images.shape[2], width=width, latent=latent, k=k, loss=loss,
                  iters=iters, batch=batch, lr=lr, seed=seed,
                  images=hashlib.sha256(images.contiguous().numpy()).hexdigest()[:12])
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be square, not {images.shape[3]}x{images.shape[2]}")
    rank, world = processes(device, batch)
    if batch // world < 2 or k < 1:
        raise ValueError(f"--batch {batch} --k {k}: batch norm needs two images, and D at least one step")
    torch.manual_seed(seed)
    G, D = Generator(*images.shape[1:3], width, latent), Discriminator(*images.shape[1:3], width)
    players = nn.ModuleList([G, D]).to(device, memory_format=layout(device))
    averages = copy.deepcopy(players).requires_grad_(False).eval()
    fused = torch.device(device).type != "mps" and not compiled  # compiled gradients may have other strides
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), lr, betas=(0.5, 0.99), fused=fused) for net in (G, D))
    still = torch.randn(8, latent, generator=torch.Generator().manual_seed(seed)).to(device)  # z for progress.png
    moments = [-(-iters * c * c // 100) for c in range(1, 11)]  # when: after 1, 4, 9, ..., 100 % of the training
    film = nn.Module()  # a module, so that the checkpoint holds the pictures
    film.register_buffer("frames", torch.zeros(10, 8, *G.shape, dtype=torch.uint8, device=device))
    parts, done, log = (G, *averages, film, D, opt_g, opt_d), 0, []
    if path and path.exists() and not fresh:
        done, log = resume(path, parts, load_checkpoint(path, ["gan"], device, wanted))
        for opt in (opt_g, opt_d):
            opt.param_groups[0]["fused"] &= fused  # a checkpoint brings the flag of the device that it was made on
    net_g, net_d = (torch.compile(net) if compiled else net for net in (G, D))
    if world > 1:  # batch norm and dropout see the share of one process, and so do the running statistics
        net_g, net_d = (nn.parallel.DistributedDataParallel(net, broadcast_buffers=False) for net in (net_g, net_d))
        path = None if rank else path
    pairs, images = [*zip(averages.state_dict().values(), players.state_dict().values())], images.to(device)
    progress, total, saved = Progress("iteration", "images", iters, done), torch.zeros(4, device=device), time.time()
    for i in range(done, iters):
        for opt in (opt_g, opt_d):
            opt.param_groups[0]["lr"] = lr * min((i + 1) / 200, 1 - 0.6 * i / iters)  # the average needs no zero
        for _ in range(k):  # (8)
            x = images[torch.randint(len(images), (batch,), device=device)].float() / 127.5 - 1
            fake = net_g(torch.randn(batch, latent, device=device)[rank::world])
            real_logits, fake_logits = d_step(net_d, opt_d, x[rank::world], fake)
        loss_now = g_step(G, net_d, opt_g, fake, loss)
        memory = min(0.998, (1 + i) / (10 + i))  # short while the weights still move fast
        for a, p in pairs:  # BatchNorm's running mean and variance too, which are no parameters, and its count
            a.lerp_(p, 1 - memory) if a.is_floating_point() else a.copy_(p)
        for c in range(10):
            if i + 1 == moments[c]:
                film.frames[c] = (127.5 * averages[0](still) + 127.5).round()
        js = js_estimate(real_logits, fake_logits)
        total += torch.stack([real_logits.sigmoid().mean(), fake_logits.sigmoid().mean(), js, loss_now])
        if (i + 1) % 100 == 0 or i + 1 == iters:
            log.append((i + 1, *(total / (i % 100 + 1)).tolist()))  # the only place where the device is waited for
            total.zero_()
            if not math.isfinite(log[-1][3] + log[-1][4]):
                raise FloatingPointError(f"the losses are {math.log(4) - 2 * log[-1][3]} (D) and {log[-1][4]} (G) at "
                                         f"iteration {i + 1}; try a smaller --lr")
            if path and (i + 1 == iters or time.time() - saved > 10):
                save_checkpoint(path, "gan", wanted, parts, i + 1, log, ("d_real", "d_fake", "js", "loss_g"))
                saved = time.time()
        progress(i + 1, batch, "D(x) {1:.2f} D(G(z)) {2:.2f}".format(*log[-1]) if log else "")
    return averages[0]

def load_players(path, device="cpu"):
    """The averaged G and D of a checkpoint, in eval mode, and what progress.png shows, uint8 (10, 8, C, H, W)."""
    state = load_checkpoint(Path(path), ["gan"], device)
    with or_say(f"{path}: {DAMAGED}"):
        channels, size, width, latent = (state["settings"][name] for name in ("channels", "size", "width", "latent"))
        G, D = Generator(channels, size, width, latent), Discriminator(channels, size, width)
        G.load_state_dict(state["parts"][1])
        D.load_state_dict(state["parts"][2])
        frames = state["parts"][3]["frames"]
    G, D = (net.to(device, memory_format=layout(device)).requires_grad_(False).eval() for net in (G, D))
    return G, D, frames

def load(path, device="cpu"):
    """The averaged G of a checkpoint, ready to sample; .shape is the (C, H, W) of its images, .latent the size of z."""
    return load_players(path, device)[0]

@torch.inference_mode()
def sample(model, n, seed=0, device="cpu", chunk=500):
    """n images (n, C, H, W), values -1 .. 1, drawn chunk by chunk. model: as load() gives it, in eval mode."""
    generator, images = torch.Generator(device).manual_seed(seed), []
    progress = Progress("sampling, image", "images", n)
    for i in range(0, n, chunk):
        z = torch.randn(min(chunk, n - i), model.latent, generator=generator, device=device)
        images.append(model(z))
        progress(i + len(z), 1)
    return torch.cat(images)

def stack(images, seed=0):
    """Grey images (N, 1, H, W) -> (N, 3, H, W), three random ones as the colours of each: of MNIST Stacked-MNIST, which
    has 1000 modes (Metz et al. 2016, arXiv:1611.02163). ValueError if they are not grey."""
    if images.shape[1] != 1:
        raise ValueError(f"--stacked makes colours of grey images, and these have {images.shape[1]} channels")
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([images[torch.randperm(len(images), generator=generator)] for _ in range(3)], 1)

def main(argv=None):
    parser = image_parser(__doc__, "gan", train)
    add, default = parser.add_argument, inspect.signature(train).parameters
    add("--width", type=at_least(1), default=default["width"].default, help="channels of D at half the side, and G's")
    add("--latent", type=at_least(1), default=default["latent"].default, help="dimensions of z")
    add("--k", type=at_least(1), default=1, help="steps of D for each step of G")
    add("--loss", choices=("nonsaturating", "minimax"), default="nonsaturating", help="what G lowers")
    add("--stacked", action="store_true", help="make colour images, each of three random grey ones")
    args = parser.parse_args(argv)
    with parser.guard():
        rank, _ = processes(args.device, args.batch)
        device, path = pick_device(args.device), args.out / "model.pt"
        images, held_out = (load_images(args.data, args.size, args.channels, test) for test in (False, True))
        if args.stacked:
            images, held_out = stack(images, args.seed), stack(held_out, args.seed)
        print(f"{len(images)} images of {args.size}x{args.size}x{images.shape[1]} from {args.data}, on {device}")
        settings = args.iters, args.batch, args.lr, args.width, args.latent, args.k, args.loss, device, args.seed
        train(images, *settings, path, args.fresh, args.compile)
        if rank:
            return  # the first process goes on alone
        G, D, frames = load_players(path, device)
        save_samples(args.out, sample(G, args.samples, args.seed, device))
        save_grid(args.out / "progress.png", to_float(frames).transpose(0, 1).flatten(0, 1), len(frames))
        z = torch.randn(12, args.latent, generator=torch.Generator(device).manual_seed(args.seed), device=device)
        walk = torch.linspace(0, 1, 10, device=device)[:, None]
        latents = torch.cat([great_circle(u, v, walk) for u, v in zip(z[::2], z[1::2])])
        save_grid(args.out / "walk.png", G(latents), len(walk))
        real, fake = to_float(held_out[:2000].to(device)), sample(G, 2000, args.seed + 1, device)  # new to D, both
        real_logits, fake_logits = (torch.cat([D(part) for part in x.split(500)]) for x in (real, fake))
        js = js_estimate(real_logits, fake_logits).item()
        terms = F.softplus(-real_logits), F.softplus(fake_logits)
        error = sum(term.var(correction=0).item() / len(term) for term in terms) ** 0.5 / 2
        print(f"mean D(x) on {len(real)} test images {real_logits.sigmoid().mean():.3f}, "
              f"on {len(fake)} of G's {fake_logits.sigmoid().mean():.3f}: "
              f"JS(p_data || p_g) >= {js:.4f} +- {error:.4f} nats, {js / math.log(2):.1%} of log 2")
        print(f"{args.samples} samples: samples.png, samples.npy in {args.out}, with walk.png, log.csv, model.pt, and "
              "progress.png: a row for each z, after 1, 4, 9, ..., 100 % of the training")

if __name__ == "__main__":
    main()
