# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""NICE: an invertible network that turns images into independent numbers, so that their density is known exactly.

Paper: Dinh, Krueger, Bengio, "NICE: Non-linear Independent Components Estimation", 2014, arXiv:1410.8516. [3.2] is its
section 3.2.

symbol         in the code    what it is
k              images         an image's bytes, (N, C, H, W), 0 .. 255
x              x              the image as real numbers, (N, D) or (N, C, H, W), 0 .. 1; D = C H W
x_1, x_2       a, b           its numbers 0, 2, 4, ... and 1, 3, 5, ...: (N, D/2) each, x_1 has one more if D is odd
m              m              the network of a coupling, any function of one half that gives a change of the other
y              y              what the couplings make of x, (N, D)
s              model.s        logarithm of the scale of each number of y, (D,)
h = f(x)       h              exp(s) y, (N, D): independent, each from the same logistic law
log |det|      log_det        of the Jacobian dh/dx, (N,) nats

Let f map x to h one to one, smoothly, and p_H be the density of h. A small volume dx holds the same probability before
and after, p_X(x) dx = p_H(h) dh, and dh/dx is |det| of the Jacobian. The Jacobians of successive steps multiply, by the
chain rule, and so do their determinants: f = f_K o ... o f_1 may be made of simple steps.
  (1) log p_X(x) = log p_H(f(x)) + log |det df/dx|                                                                   [2]
  (2) log |det df/dx| = sum_j log |det df_j/dx_{j-1}|, x_{j-1} being what the step f_j is given
An additive coupling changes one half of the numbers by a function of the other:
  (3) y_1 = x_1,  y_2 = x_2 + m(x_1);  dy/dx = [[I, 0], [dm/dx_1, I]], triangular, ones on the diagonal: det = 1   [3.2]
  (4) x_1 = y_1,  x_2 = y_2 - m(y_1), so m is never inverted: any network, of any width                            [3.2]
The next coupling changes the half that this one left alone. After two all numbers have been changed, after three each
depends on all others. But volumes stay: p_X could nowhere exceed p_H's peak. One scale for each number lifts that:
  (5) h_i = exp(s_i) y_i,  log |det| = sum_i s_i                                                                   [3.3]
All h_i spread alike, so y_i = exp(-s_i) h_i spreads as exp(-s_i): far for numbers in which images differ, little for
those that hold only noise. This orders them, as a principal component analysis does. The prior is standard logistic:
  (6) log p_H(h) = sum_i log sigmoid'(h_i) = sum_i -softplus(h_i) - softplus(-h_i),  softplus(v) = log(1 + e^v)    [3.4]
Its cumulative function is sigmoid. The inverse of that makes uniform numbers logistic, and f^-1 makes these an image:
  (7) h_i = log u_i - log(1 - u_i),  u_i uniform on 0 .. 1;  x = f^-1(h)
Bytes have no density: a model could put a spike on each, and gain without bound. So each byte is spread over its bin.
The authors' code has the same as (255 x + u) / 256, for there x = k / 255 is the image before u is added:
  (8) x = (k + u) / 256,  u uniform on 0 .. 1;  and back, k = floor(256 x)                                         [5.1]
A bin has the probability P(k) = 256^-D E_u[p_X(x)] >= 256^-D exp E_u[log p_X(x)], by Jensen, so bytes cost at most
  (9) bits/dim = 8 - log p_X(x) / (D ln 2), the mean over u, log p_X in nats: the paper's 1980.50 are 4.356, D = 784
In-painting. Only the part x_O of x is known. The hidden part x_H climbs to where the density is high, within 0 .. 1:
 (10) x_H <- x_H + alpha_i (d log p_X(x_O, x_H) / dx_H + eps),  eps ~ N(0, I),  alpha_i = 10 / (100 + i)           [5.2]

Trip wires: f goes from image to noise; sampling is f^-1. log p_X is of a density on 0 .. 1, and can be above zero; on
0 .. 256 it would be D ln 256 less. exp(s) multiplies on the way to h. Nothing is chosen by the test images.
Differs from the paper in: a smaller network, and 13 passes over the images, not 1500; colour is not whitened; m answers
in units of the spread of what it changes, which m could learn; s starts where h spreads as (6) does, and has ten times
the rate; the rates fall to zero; weights of m decay (AdamW), which overfits less, and all are averaged. In (10) x_H
starts as noise, and slopes are cut to -1 .. 1: they come near exp(s_i), above a thousand for pixels that are always
black, and these would leap from 0 to 1 and back with each step (limit=math.inf is the paper's).

python nice.py --data mnist --samples 2000                 107 s on two cores; 2077.64 nats = 4.1768 bits/dim
python nice.py --layers 5 --width 1000 --out out/paper     the paper's network
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
def log_prob(model, x):
    """log p_X of images in 0 .. 1, bytes spread by dequantise(): (N, C, H, W) or (N, D) -> nats, (N,)."""
    h, log_det = model(x)
    return log_logistic(h) + log_det  # (1)

def halves(x):
    """(N, D) -> the numbers with even index (N, D - D // 2), and those with odd index (N, D // 2)."""
    return x[:, 0::2].contiguous(), x[:, 1::2].contiguous()

def interleave(a, b):
    """The inverse of halves()."""
    return torch.stack([a, F.pad(b, (0, a.shape[1] - b.shape[1]))], 2).flatten(1)[:, : a.shape[1] + b.shape[1]]

def couple_all(x, ms):
    """x (N, D) -> y (N, D): one coupling for each network of ms; the first changes b, the second a, and so on."""
    a, b = halves(x)
    for i, m in enumerate(ms):
        if i % 2 == 0:
            b = b + m(a)  # (3)
        else:
            a = a + m(b)  # (3)
    return interleave(a, b)

def uncouple_all(y, ms):
    """y (N, D) -> x (N, D): the couplings undone, the last one first."""
    a, b = halves(y)
    for i, m in reversed(list(enumerate(ms))):
        if i % 2 == 0:
            b = b - m(a)  # (4)
        else:
            a = a - m(b)  # (4)
    return interleave(a, b)

def log_logistic(h):
    """log density of independent standard logistic numbers, (N, D) -> nats, (N,); finite for all finite h."""
    return (-h - 2 * F.softplus(-h)).sum(1)  # (6), for softplus(h) is h + softplus(-h)

def logistic(u):
    """Standard logistic numbers from numbers uniform on 0 .. 1, of which 0 and 1 themselves are moved inside."""
    u = u.clamp(torch.finfo(u.dtype).eps, 1 - torch.finfo(u.dtype).eps)
    return u.log() - torch.log1p(-u)  # (7)

def dequantise(x, u):
    """Bytes 0 .. 255 of any dtype, u uniform on [0, 1), of one shape -> floats in 0 .. 1 (255 + u may round to 256)."""
    return (x + u) / 256

def quantise(x):
    """The bytes in whose bins the real numbers lie; what is outside 0 .. 1 is cut."""
    return (256 * x).floor().clamp(0, 255).to(torch.uint8)  # (8)

def bits_per_dim(nats, dims):
    """Log-density on [0, 1]^dims in nats -> bits per dimension of the image of bytes."""
    return 8 - nats / (dims * math.log(2))

@torch.enable_grad()
def inpaint(model, x, known, steps=1000, generator=None, limit=1.0):
    """Images x (N, C, H, W) in 0 .. 1, with new pixels wherever known (bool, of a shape that expands to x's) is False.

    Of the hidden pixels nothing is used: they start as uniform noise. limit: of each pixel's slope, in nats."""
    y = torch.where(known, x, torch.rand(x.shape, generator=generator, device=x.device))
    for i in range(steps):
        slope, = torch.autograd.grad(log_prob(model, y.requires_grad_()).sum(), y)
        slope, eps = slope.clamp(-limit, limit), torch.randn(x.shape, generator=generator, device=x.device)
        y = torch.where(known, x, (y.detach() + 10 / (100 + i) * (slope + eps)).clamp(0, 1))  # (10)
    return y

# -------------------------------------------------------------------------------------------------------- network -----
# Any m from one half to the other would do: couplings of (3) are inverted without inverting m. These are small MLPs.
class Spread(nn.Module):
    """Multiplies (N, d) by the spread of the numbers that a coupling changes, (d,): ones until start() measures it.

    exp(s) of a pixel that is always black is a thousand. Without this each step of Adam, alike for all weights, would
    throw such a pixel's h about by hundreds, and the rate would have to be so low that nothing else is learned."""

    def __init__(self, d):
        super().__init__()
        self.register_buffer("unit", torch.ones(d))

    def forward(self, v):
        return v * self.unit

def make_mlp(d_in, d_out, width, layers):
    """(N, d_in) -> (N, d_out) through hidden layers of ReLUs; zeros at first, so that its coupling does nothing."""
    sizes, parts = [d_in] + layers * [width], []
    for n, n_next in zip(sizes, sizes[1:]):
        parts += [nn.Linear(n, n_next), nn.ReLU(inplace=True)]
    last = nn.Linear(sizes[-1], d_out)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*parts, last, Spread(d_out))

class NICE(nn.Module):
    """f: x (N, channels, size, size) or (N, D) -> h (N, D) and log |det dh/dx| (N,). inverse: h (N, D) -> x (N, D)."""

    def __init__(self, channels=1, size=28, width=256, layers=3, couplings=4):
        super().__init__()
        self.shape, D = (channels, size, size), channels * size * size
        if D < 2:
            raise ValueError(f"--size {size} --channels {channels}: one number cannot be split into two halves")
        ends = (D - D // 2, D // 2)  # from a to b, then from b to a
        self.m = nn.ModuleList(make_mlp(ends[i % 2], ends[1 - i % 2], width, layers) for i in range(couplings))
        self.s = nn.Parameter(torch.zeros(D))

    @torch.no_grad()
    def start(self, x):
        """Sets, by a few thousand dequantised images: the unit of each coupling, to the spread of what it changes;
        the last biases of the first two, so that y has mean 0; s, so that each number of h has mean square 1.8^2."""
        a, b = halves(x.flatten(1))
        for i, m in enumerate(self.m):
            half, (*_, last, spread) = (b, a)[i % 2], m
            spread.unit.copy_(half.std(0, correction=0))
            if i < 2:
                last.bias.copy_(-half.mean(0) / spread.unit)
        y = couple_all(x.flatten(1), self.m)
        self.s.copy_((1.8 / y.square().mean(0).sqrt()).log())  # the deviation of a standard logistic is pi / sqrt(3)

    def forward(self, x):
        h = couple_all(x.flatten(1), self.m) * self.s.exp()  # (5)
        return h, self.s.sum().expand(len(x))  # (2), where each coupling adds 0, (5)

    def inverse(self, h):
        return uncouple_all(h * (-self.s).exp(), self.m)  # (5)

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
def hold_out(images):
    """Five sixths of the images, to train on, and a sixth, to choose by: 50,000 and 10,000 of MNIST's. Drawn at random,
    but always alike, for folders may be sorted. A single image is in both."""
    order, n = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)), max(1, len(images) // 6)
    return images[order[n:] if len(images) > 1 else order], images[order[:n]]

@torch.inference_mode()
def measure(model, images, seed=0, chunk=1000):
    """log p_X in nats, (N,), of uint8 images (N, C, H, W). One u for each byte, the same for the same seed."""
    device, nats = model.s.device, []
    generator = torch.Generator(device).manual_seed(seed)
    for k in images.split(chunk):
        u = torch.rand(k.shape, generator=generator, device=device)
        nats.append(log_prob(model, dequantise(k.to(device), u)))  # (8)
    return torch.cat(nats)

def train(images, iters=10000, batch=64, lr=3e-3, width=256, layers=3, couplings=4, device="cpu", seed=0, path=None,
          fresh=False, compiled=False):
    """uint8 images (N, C, H, H) on the CPU -> the averaged model, as it was when the part that hold_out() keeps from
    training was the most likely. Seeds torch's global generator.

    path: where to save; unless fresh, training goes on from what is there. ValueError if that was made otherwise,
    FloatingPointError if the loss is not finite (what was saved last stays). log.csv has the mean log p_X in nats of
    the last hundred batches, and of the images held out, which is measured now and then and stands until the next."""
    wanted = dict(channels=images.shape[1], size=images.shape[2], width=width, layers=layers, couplings=couplings,
                  iters=iters, batch=batch, lr=lr, seed=seed,
                  images=hashlib.sha256(images.contiguous().numpy()).hexdigest()[:12])
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be square, not {images.shape[3]}x{images.shape[2]}")
    torch.manual_seed(seed)
    images, valid = (part.to(device) for part in hold_out(images))
    model = NICE(images.shape[1], images.shape[2], width, layers, couplings).to(device)
    k = images[torch.randint(len(images), (min(5000, 4_000_000 // images[0].numel() + 10),), device=device)]
    model.start(dequantise(k, torch.rand(k.shape, device=device)))
    average = copy.deepcopy(model).requires_grad_(False).eval()
    best = copy.deepcopy(average)
    fused = torch.device(device).type != "mps" and not compiled  # compiled gradients may have other strides
    opt = torch.optim.AdamW([{"params": model.m.parameters(), "weight_decay": 0.3}, {"params": [model.s]}], lr,
                            betas=(0.9, 0.99), weight_decay=0, fused=fused)
    parts, done, log = (model, average, opt, best), 0, []
    if path and path.exists() and not fresh:
        done, log = resume(path, parts, load_checkpoint(path, ["nice"], device, wanted))
        for group in opt.param_groups:
            group["fused"] &= fused  # a checkpoint brings the flag of the device that it was made on
    net = torch.compile(model) if compiled else model
    progress, total, saved = Progress("iteration", "images", iters, done), torch.zeros((), device=device), time.time()
    for i in range(done, iters):
        for group, factor in zip(opt.param_groups, (1, 10)):  # Adam moves s by hardly more than the sum of its rates
            group["lr"] = factor * lr * min((i + 1) / 200, 1 - i / iters)
        k = images[torch.randint(len(images), (batch,), device=device)]
        loss = -log_prob(net, dequantise(k, torch.rand(k.shape, device=device))).mean()  # (1) (8)
        opt.zero_grad()
        loss.backward()
        opt.step()
        memory = min(0.995, (1 + i) / (10 + i))  # short while the weights still move fast
        for a, p in zip(average.parameters(), model.parameters()):
            a.lerp_(p.detach(), 1 - memory)
        total -= loss.detach()
        if (i + 1) % 100 == 0 or i + 1 == iters:
            due = len(log) % (iters // 2000 or 1) == 0 or i + 1 == iters  # some twenty times
            valid_nats = measure(average, valid).mean().item() if due else log[-1][2]
            if all(valid_nats > row[2] for row in log):
                best.load_state_dict(average.state_dict())
            log.append((i + 1, total.item() / (i % 100 + 1), valid_nats))  # the device is waited for only in this block
            total.zero_()
            if not math.isfinite(log[-1][1] + valid_nats):
                raise FloatingPointError(f"the log-likelihood is {log[-1][1]} in training, {valid_nats} held out, at "
                                         f"iteration {i + 1}; try a smaller --lr")
            if path and (i + 1 == iters or time.time() - saved > 10):
                save_checkpoint(path, "nice", wanted, parts, i + 1, log, ("train_nats", "valid_nats"))
                saved = time.time()
        progress(i + 1, batch, "nats {1:.1f}, held out {2:.1f}".format(*log[-1]) if log else "")
    return best

def load(path, device="cpu"):
    """The model that train() returned, ready to sample; model.shape is the (C, H, W) of its images."""
    state = load_checkpoint(Path(path), ["nice"], device)
    with or_say(f"{path}: {DAMAGED}"):
        model = NICE(*(state["settings"][name] for name in ("channels", "size", "width", "layers", "couplings")))
        model.load_state_dict(state["parts"][3])
    return model.to(device).requires_grad_(False).eval()

@torch.inference_mode()
def sample(model, n, seed=0, chunk=1000):
    """n images, (n, C, H, W) in -1 .. 1 on the model's device, each number one of the 256 that bytes have."""
    generator = torch.Generator(model.s.device).manual_seed(seed)
    u = torch.rand(n, len(model.s), generator=generator, device=generator.device)
    x = torch.cat([model.inverse(logistic(part)) for part in u.split(chunk)])  # (7)
    return to_float(quantise(x)).unflatten(1, model.shape)

def hide(size, generator=None):
    """The paper's ten ways to hide pixels, bool (10, 1, size, size), True where they stay known. Hidden are: the upper
    half, the lower; the numbers of odd index, of even; the left half, the right; the rows in the middle, the columns;
    three in four at random, nine in ten."""
    i, j = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    half, low, high, odd = size // 2, size // 4, size - size // 4, (i * size + j) % 2 == 1
    chance = torch.rand(size, size, generator=generator)
    return ~torch.stack([i < half, i >= half, odd, ~odd, j < half, j >= half, (i >= low) & (i < high),
                         (j >= low) & (j < high), chance < 0.75, chance < 0.9])[:, None]

def main(argv=None):
    parser = image_parser(__doc__, "nice", train)
    parser.add_argument("--width", type=at_least(1), default=256, help="ReLUs in a hidden layer; the paper had 1000")
    parser.add_argument("--layers", type=at_least(1), default=3, help="hidden layers of a coupling; the paper had 5")
    parser.add_argument("--couplings", type=at_least(1), default=4, help="three or more, else not all numbers interact")
    parser.add_argument("--inpaint", type=at_least(0), default=1000, help="steps of the in-painting, 0 for none")
    args = parser.parse_args(argv)
    with parser.guard():
        device, path = pick_device(args.device), args.out / "model.pt"
        images, held_out = (load_images(args.data, args.size, args.channels, test) for test in (False, True))
        print(f"{len(images)} images of {args.size}x{args.size}x{args.channels} from {args.data}, on {device}")
        train(images, args.iters, args.batch, args.lr, args.width, args.layers, args.couplings, device, args.seed, path,
              args.fresh, args.compile)
        model = load(path, device)
        save_samples(args.out, sample(model, args.samples, args.seed))
        if args.inpaint:
            generator, x = torch.Generator(device).manual_seed(args.seed), (held_out[:4].to(device) + 0.5) / 256
            known = hide(args.size, torch.Generator().manual_seed(args.seed)).to(device)  # (10, 1, H, W)
            known, x = known.repeat_interleave(len(x), 0), x.repeat(10, 1, 1, 1)  # (10 n, 1, H, W), (10 n, C, H, W)
            x = torch.stack([x, torch.where(known, x, 0.5), inpaint(model, x, known, args.inpaint, generator)], 1)
            save_grid(args.out / "inpainting.png", to_float(quantise(x.flatten(0, 1))), len(x) * 3 // 10)
        spread, D = (-model.s).exp().sort()[0], len(model.s)
        print(f"exp(-s) from {spread[0]:.5f} to {spread[-1]:.3f}, half of them below {spread[D // 2]:.4f}")
        fitted, chosen_by = hold_out(images)
        for name, part in ("train", fitted[:10_000]), ("validation", chosen_by), ("test", held_out):
            nats = measure(model, part)
            mean, error = nats.mean(), nats.std(correction=0) / len(nats) ** 0.5
            bits, bits_error = bits_per_dim(mean, D), error / (D * math.log(2))  # (9)
            print(f"{name}: {mean:.2f} +- {error:.2f} nats = {bits:.4f} +- {bits_error:.4f} bits/dim, "
                  f"mean of {len(nats)} images")
        print(f"{args.samples} samples: samples.png, samples.npy in {args.out}, with "
              f"{'inpainting.png, ' if args.inpaint else ''}log.csv, model.pt")

if __name__ == "__main__":
    main()
