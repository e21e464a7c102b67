# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""Real NVP: an image model in which every step can be undone, and which knows the exact density of each image.

Paper: Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2016, arXiv:1605.08803. [3] is its equation 3.

symbol      in the code         what it is
x           x                   images, (N, C, H, W), 0 .. 1; D = C H W numbers each
h           h                   logits of x, (N, C, H, W), -13.8 .. 13.8, and what the steps make of them
h_1, h_2    left, right         the halves of h: at the first scale (N, 2 C, H/2, W/2) each, then (N, 4 C, H/4, W/4)
s, t        s, t = net(half)    log-scale and shift of a coupling, each of the shape of the other half
z           z                   latents, (N, D); p(z) = N(0, I)
f, f^-1     model(h), model.inverse(z)    h -> z and log|det dz/dh|, (N,), in nats; z -> h
alpha       alpha               1e-6: the q of (13), whose logit is h, stays within alpha .. 1 - alpha
T           temperature         deviation of the z that are drawn; 1 is the model itself

Change of variables: where a map stretches space, what was on it gets thinner. For x -> z one to one, p(z) = N(0, I),
  (1) log p(x) = log p(z) + log|det dz/dx|                                                                           [3]
  (2) log p(z) = -1/2 sum_i (z_i^2 + log(2 pi))
f is a chain of simple steps on the logits h of x, see (13): determinants multiply, so their logs add up, and f^-1
undoes the last step first. The step that learns is the affine coupling. It changes one half by what is in the other:
  (3) y_1 = h_1,  y_2 = h_2 exp(s(h_1)) + t(h_1)                                                                  [4, 5]
dy_1/dh_2 = 0, so the Jacobian is triangular, and its determinant is the product of its diagonal, 1s and exp(s):
  (4) log|det dy/dh| = sum s(h_1)                                                                                    [6]
No derivative of s or t is in it, and as y_1 = h_1 is still there, neither is inverted to go back; any networks will do:
  (5) h_1 = y_1,  h_2 = (y_2 - t(y_1)) exp(-s(y_1))                                                                  [8]
exp(s) of a free s overflows sooner or later. With raw from the network and one learned scale a channel, |s| <= |scale|:
  (6) s = scale tanh(raw)
Halves. Of a checkerboard h_1 is the pixels (i, j) with i + j even: of a 2x2 cell [[a b] [c d]] these are a and d. So
each half is an image of half the side, and no masked zero is computed:
  (7) h (N, C, H, W) -> h_1 = (all a, all d),  h_2 = (all b, all c),  each (N, 2 C, H/2, W/2)
Squeezed to (N, 4 C, H/2, W/2), the same four are channels. The channel-wise halves are the first two and the last two:
  (8) h_1 = (all a, all b),  h_2 = (all d, all c)
h_2 changes by h_1, then h_1 by h_2, and so on: two couplings change every pixel. After both kinds of halves, h_2 is
put aside as latents; h_1 goes on to a second scale of the same kind, at half the side, where both end as latents:
  (9) (h', z_1) = f_1(h),  (h'', z_2) = f_2(h'),  z = (z_1, z_2, h''): D/2, D/4 and D/4 numbers                 [13-16]
Before all couplings each pixel of h gets mean 0 and variance 1, over 1000 images, then a learned gain and bias:
  (10) y = (h - mean) / deviation exp(gain) + bias,  log|det dy/dh| = sum (gain - log deviation)
Data. A density can grow without limit on bytes, which are points, so u, uniform on [0, 1), fills the gaps between them:
  (11) x = (byte + u) / 256
P(bytes) is the integral of p(x) over a cell of volume 256^-D. By Jensen, log P >= E_u[log p(x)] - D log 256:
  (12) bits/dim = -log2 P(bytes) / D <= 8 - E_u[log p(x)] / (D ln 2)
x ends at 0 and 1, z nowhere. The logit leads from one to the other, and its Jacobian counts:
  (13) h = log q - log(1 - q) with q = alpha + (1 - 2 alpha) x
       log|det dh/dx| = sum (log(1 - 2 alpha) - log q - log(1 - q))
Sampling goes back from z. A walk among four images by angles keeps the length of z, if theirs are alike and orthogonal:
  (14) h = f^-1(T eps),  eps ~ N(0, I)
  (15) z = cos(phi) (cos(phi') z^1 + sin(phi') z^2) + sin(phi) (cos(phi') z^3 + sin(phi') z^4)                      [19]

Trip wires: log|det| is that of x -> z, not of z -> x. p(x) is a density on [0, 1]^D: on [0, 256]^D it would have
D log 256 nats less, and without (13) it is one of h. All logs are in nats, only (12) is in bits.
Differs from the paper in: (10) once, and no batch norm; alpha, 0.05 there (a wider draft of this file had 2.30
bits/dim on MNIST with that after a minute, 1.74 with 1e-6); 1 - 2 alpha for 1 - alpha, as in the authors' code, so
that x = 1 has a logit too; the other half of the checkerboard first (b of [9] has i + j odd); two scales of one width,
with channel-wise couplings in both; small networks without weight norm; no mirrored images; averaged weights; a
falling rate; a temperature; phi and phi' end at pi/2 (its code goes all around), so the four images are the corners.

python realnvp.py --data mnist --samples 2000    144 s on two cores; 1.2212 bits/dim
python realnvp.py --temperature 0.7              the same model, drawn with less deviation; seconds
"""
import argparse, contextlib, copy, gzip, hashlib, http.client, inspect, io, itertools, math, sys, time
import urllib.request, warnings, zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

ALPHA = 1e-6

# --------------------------------------------------------------------------------------------------------- method -----
def log_prob(model, x):
    """log p(x) in nats of images x in 0 .. 1, (N, C, H, W), logits and all -> (N,). model: h -> z, log|det dz/dh|."""
    h, log_det_h = to_logit(x)
    z, log_det_z = model(h)
    return log_latent(z) + log_det_z + log_det_h  # (1)

def loss_bits(model, x):
    """What training makes small: the mean bits/dim of dequantised images."""
    return bits_per_dim(log_prob(model, x), x[0].numel()).mean()  # (12)

def log_latent(z):
    """log N(z; 0, I) in nats, the sum over all but the first axis -> (N,)."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)  # (2)

def dequantise(x, u):
    """Bytes 0 .. 255 of any dtype, u uniform on [0, 1), of one shape -> floats in 0 .. 1 (255 + u may round to 256)."""
    return (x + u) / 256

def bits_per_dim(nats, dims):
    """Log-density on [0, 1]^dims in nats -> bits per dimension of the image of bytes."""
    return 8 - nats / (dims * math.log(2))

def to_logit(x, alpha=ALPHA):
    """Images in 0 .. 1, the ends included -> their logits, of the same shape, and log|det dh/dx|, (N,)."""
    q = alpha + (1 - 2 * alpha) * x  # (13)
    left, right = q.log(), (alpha + (1 - 2 * alpha) * (1 - x)).log()  # of q and of 1 - q, without cancellation
    return left - right, (math.log(1 - 2 * alpha) - left - right).flatten(1).sum(1)  # (13)

def from_logit(h, alpha=ALPHA):
    """The images of logits; a little outside 0 .. 1 where h lies outside of what to_logit gives."""
    return (h.sigmoid() - alpha) / (1 - 2 * alpha)  # (13)

def checkerboard(h):
    """(N, C, H, W) -> the pixels (i, j) with i + j even, and those with i + j odd: (N, 2 C, H/2, W/2) each."""
    left = torch.cat([h[:, :, ::2, ::2], h[:, :, 1::2, 1::2]], 1)  # (7)
    right = torch.cat([h[:, :, ::2, 1::2], h[:, :, 1::2, ::2]], 1)  # (7)
    return left, right

def from_checkerboard(left, right):
    """The image (N, C, H, W) that checkerboard() took apart."""
    (a, d), (b, c) = left.chunk(2, 1), right.chunk(2, 1)
    return F.pixel_shuffle(torch.stack([a, b, c, d], 2).flatten(1, 2), 2)  # (7)

def regroup(left, right):
    """Halves of the checkerboard, (a d) and (b c) -> channel-wise halves, (a b) and (d c). It undoes itself."""
    (a, d), (b, c) = left.chunk(2, 1), right.chunk(2, 1)
    return torch.cat([a, b], 1), torch.cat([d, c], 1)  # (8), d first: so it undoes itself

def couple(nets, left, right):
    """Each net in turn changes a half by what it sees in the other, the right half first.

    Halves of one shape (N, ...), nets: half -> s, t -> the changed left and right, and log|det|, (N,)."""
    halves, log_det = [left, right], 0
    for k, net in enumerate(nets):
        s, t = net(halves[k % 2])
        halves[1 - k % 2] = halves[1 - k % 2] * s.exp() + t  # (3)
        log_det = log_det + s.flatten(1).sum(1)  # (4)
    return *halves, log_det

def uncouple(nets, left, right):
    """The left and the right half that couple() changed into these."""
    halves = [left, right]
    for k, net in reversed(list(enumerate(nets))):
        s, t = net(halves[k % 2])
        halves[1 - k % 2] = (halves[1 - k % 2] - t) * (-s).exp()  # (5)
    return halves

def interpolate_four(z, phi, phi_prime):
    """The four latents z, (4, D), mixed by two angles in radians, (K,) each -> (K, D)."""
    a, b = phi[:, None], phi_prime[:, None]
    return a.cos() * (b.cos() * z[0] + b.sin() * z[1]) + a.sin() * (b.cos() * z[2] + b.sin() * z[3])  # (15)

# -------------------------------------------------------------------------------------------------------- network -----
# Any net that maps a half to s and t of its shape would do. These are small residual networks at half the side.
class Normalise(nn.Module):
    """Mean 0 and variance 1 for each pixel of the logits that start() was shown; then a learned gain and bias."""

    def __init__(self, shape):
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("deviation", torch.ones(shape))

    def start(self, h):
        self.mean.copy_(h.mean(0))
        self.deviation.copy_(h.std(0, correction=0).clamp(min=1e-3))  # u alone gives 0.0045 or more, a single h gives 0

    def forward(self, h):
        log_det = (self.gain - self.deviation.log()).sum()  # (10)
        return (h - self.mean) / self.deviation * self.gain.exp() + self.bias, log_det  # (10)

    def inverse(self, y):
        return (y - self.bias) * (-self.gain).exp() * self.deviation + self.mean  # (10)

class ScaleShift(nn.Module):
    """The network of a coupling: one half (N, c, H, W) -> s and t, (N, c, H, W) each, both 0 before training."""

    def __init__(self, c, width, blocks):
        super().__init__()
        conv = lambda c_in, c_out: nn.Conv2d(c_in, c_out, 3, padding=1)
        self.enter, self.leave = conv(c, width), nn.Conv2d(width, 2 * c, 1)
        self.blocks = nn.ModuleList(nn.ModuleList([conv(width, width), conv(width, width)]) for _ in range(blocks))
        self.scale = nn.Parameter(torch.ones(c))
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, half):
        h = self.enter(half)  # (N, width, H, W)
        for first, second in self.blocks:
            h = h + second(F.relu(first(F.relu(h))))
        raw, t = self.leave(F.relu(h)).chunk(2, 1)  # (N, c, H, W) each
        return self.scale[:, None, None] * (2 * torch.sigmoid(2 * raw) - 1), t  # (6), as tanh is slower on the CPU

class RealNVP(nn.Module):
    """Logits h (N, channels, size, size) -> z (N, D) and log|det dz/dh| (N,); size must be a multiple of 4.

    couplings: how many for the checkerboard halves of each scale, and as many for its channel-wise halves."""

    def __init__(self, channels=1, size=28, width=16, blocks=1, couplings=3):
        super().__init__()
        if size % 4:
            raise ValueError(f"--size {size}: the model halves the side of its images twice (they are squeezed), so "
                             "the size must be a multiple of 4")
        if couplings < 2:
            raise ValueError(f"--couplings {couplings}: less than 2 would leave pixels as they are")
        self.shape, self.norm = (channels, size, size), Normalise((channels, size, size))
        nets = lambda c: nn.ModuleList(ScaleShift(c, width, blocks) for _ in range(couplings))
        self.scales = nn.ModuleList(nn.ModuleList([nets(c), nets(c)]) for c in (2 * channels, 4 * channels))

    def forward(self, h):
        h, log_det = self.norm(h)
        z = []
        for by_board, by_channel in self.scales:  # at the first, left and right are (N, 2 C, H/2, W/2)
            left, right, log_det_board = couple(by_board, *checkerboard(h))
            h, right, log_det_channel = couple(by_channel, *regroup(left, right))
            log_det = log_det + log_det_board + log_det_channel
            z.append(right.flatten(1))  # (9)
        return torch.cat([*z, h.flatten(1)], 1), log_det  # (9)

    def inverse(self, z):
        """z (N, D) -> the logits h, (N, channels, size, size)."""
        (C, H, W), D = self.shape, z.shape[1]
        *parts, h = z.split([D // 2, D // 4, D // 4], 1)  # (9)
        h = h.unflatten(1, (4 * C, H // 4, W // 4))
        for (by_board, by_channel), right in zip(reversed(self.scales), reversed(parts)):
            left, right = uncouple(by_channel, h, right.view_as(h))
            h = from_checkerboard(*uncouple(by_board, *regroup(left, right)))
        return self.norm.inverse(h)

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
def hold_out(images):
    """Five sixths of the images, to train on, and a sixth, to choose by: 50,000 and 10,000 of MNIST's. Drawn at random,
    but always alike, for folders may be sorted. A single image is in both."""
    order, n = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)), max(1, len(images) // 6)
    return images[order[n:] if len(images) > 1 else order], images[order[:n]]

def train(images, iters=4600, batch=32, lr=2e-2, width=16, blocks=1, couplings=3, device="cpu", seed=0, path=None,
          fresh=False, compiled=False):
    """uint8 images (N, C, H, H) on the CPU -> the averaged model, ready to sample. Seeds torch's global generator.

    A sixth of the images is never trained on: the log has the averaged model's bits/dim on 1000 of them.
    path: where to save; unless fresh, training goes on from what is there. ValueError if that was made otherwise,
    FloatingPointError if the loss is not finite (what was saved last stays)."""
    wanted = dict(channels=images.shape[1], size=images.shape[2], width=width, blocks=blocks, couplings=couplings,
                  alpha=ALPHA, iters=iters, batch=batch, lr=lr, seed=seed,
                  images=hashlib.sha256(images.contiguous().numpy()).hexdigest()[:12])
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be square, not {images.shape[3]}x{images.shape[2]}")
    torch.manual_seed(seed)
    model = RealNVP(images.shape[1], images.shape[2], width, blocks, couplings)
    images, held_out = hold_out(images)
    first = images[torch.arange(1000) % len(images)]
    model.norm.start(to_logit(dequantise(first, torch.rand(first.shape)))[0])
    model = model.to(device, memory_format=layout(device))
    average = copy.deepcopy(model).requires_grad_(False).eval()
    fused = torch.device(device).type != "mps" and not compiled  # compiled gradients may have other strides
    opt = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99), fused=fused)
    parts, done, log = (model, average, opt), 0, []
    if path and path.exists() and not fresh:
        done, log = resume(path, parts, load_checkpoint(path, ["realnvp"], device, wanted))
        opt.param_groups[0]["fused"] &= fused  # a checkpoint brings the flag of the device that it was made on
    net, images = torch.compile(model) if compiled else model, images.to(device)
    progress, total, saved = Progress("iteration", "images", iters, done), torch.zeros((), device=device), time.time()
    for i in range(done, iters):
        opt.param_groups[0]["lr"] = lr * min((i + 1) / 200, 1 - i / iters)
        x = images[torch.randint(len(images), (batch,), device=device)]
        loss = loss_bits(net, dequantise(x, torch.rand(x.shape, device=device)))  # (11)
        opt.zero_grad()
        loss.backward()
        opt.step()
        memory = min(0.995, (1 + i) / (10 + i))  # short while the weights still move fast
        for a, p in zip(average.parameters(), model.parameters()):
            a.lerp_(p.detach(), 1 - memory)
        total += loss.detach()
        if (i + 1) % 100 == 0 or i + 1 == iters:
            due = len(log) % (iters // 2000 or 1) == 0 or i + 1 == iters  # some twenty times
            valid = image_bits(average, held_out[:1000], seed, device).mean().item() if due else log[-1][2]
            log.append((i + 1, total.item() / (i % 100 + 1), valid))  # here only is the device waited for
            total.zero_()
            if not math.isfinite(log[-1][1] + valid):
                raise FloatingPointError(f"the loss is {log[-1][1]} in training, {valid} held out, at iteration "
                                         f"{i + 1}; try a smaller --lr")
            if path and (i + 1 == iters or time.time() - saved > 10):
                save_checkpoint(path, "realnvp", wanted, parts, i + 1, log, ("train_bits", "valid_bits"))
                saved = time.time()
        progress(i + 1, batch, f"{log[-1][1]:.3f} bits/dim" if log else "")
    return average

def load(path, device="cpu"):
    """The averaged model of a checkpoint, ready to sample; model.shape is the (C, H, W) of its images."""
    state = load_checkpoint(Path(path), ["realnvp"], device, dict(alpha=ALPHA))
    with or_say(f"{path}: {DAMAGED}"):
        model = RealNVP(*(state["settings"][name] for name in ("channels", "size", "width", "blocks", "couplings")))
        model.load_state_dict(state["parts"][1])
    return model.to(device, memory_format=layout(device)).requires_grad_(False).eval()

@torch.inference_mode()
def image_bits(model, images, seed=0, device="cpu", chunk=500):
    """Bits/dim, (N,), of uint8 images (N, C, H, W). One u for each byte, the same for the same seed."""
    generator, bits = torch.Generator(device).manual_seed(seed), []
    for x in images.split(chunk):
        x = dequantise(x.to(device), torch.rand(x.shape, generator=generator, device=device))  # (11)
        bits.append(bits_per_dim(log_prob(model, x), x[0].numel()))  # (12)
    return torch.cat(bits)

@torch.inference_mode()
def to_images(model, z):
    """Latents (N, D) -> images (N, C, H, W), -1 .. 1, every value the byte in whose cell x lies."""
    return (256 * from_logit(model.inverse(z))).floor().clamp(0, 255) / 127.5 - 1  # (11)

def sample(model, n, temperature=1.0, seed=0, device="cpu", chunk=100):
    """n images (n, C, H, W), values -1 .. 1, drawn chunk by chunk. temperature: the deviation of z."""
    generator, images = torch.Generator(device).manual_seed(seed), []
    progress = Progress("sampling, image", "images", n)
    for i in range(0, n, chunk):
        eps = torch.randn(min(chunk, n - i), math.prod(model.shape), generator=generator, device=device)
        images.append(to_images(model, temperature * eps))  # (14)
        progress(i + len(eps), 1)
    return torch.cat(images)

def main(argv=None):
    parser = image_parser(__doc__, "realnvp", train)
    add, default = parser.add_argument, inspect.signature(train).parameters
    add("--width", type=at_least(1), default=default["width"].default, help="channels of the networks for s and t")
    add("--blocks", type=at_least(0), default=default["blocks"].default, help="residual blocks in each of them")
    add("--couplings", type=at_least(2), default=default["couplings"].default,
        help="couplings of checkerboard halves, and of channel-wise ones, at each of the two scales")
    add("--temperature", type=float, default=1.0, help="deviation of the latents that are sampled")
    args = parser.parse_args(argv)
    with parser.guard():
        device, path = pick_device(args.device), args.out / "model.pt"
        if not 0 <= args.temperature < math.inf:
            raise ValueError(f"--temperature {args.temperature}: must be 0 or more, and finite")
        images, held_out = (load_images(args.data, args.size, args.channels, test) for test in (False, True))
        print(f"{len(images)} images of {args.size}x{args.size}x{args.channels} from {args.data}, on {device}")
        train(images, args.iters, args.batch, args.lr, args.width, args.blocks, args.couplings, device, args.seed, path,
              args.fresh, args.compile)
        model = load(path, device)
        save_samples(args.out, sample(model, args.samples, args.temperature, args.seed, device))
        rows = [sample(model, 8, T, args.seed, device) for T in (0.0, 0.5, 0.7, 0.8, 0.9, 1.0)]  # from the same eps
        save_grid(args.out / "temperatures.png", torch.cat(rows))
        four = held_out[torch.arange(4) % len(held_out)].to(device)
        angles = torch.linspace(0, math.pi / 2, 8, device=device)
        u = torch.rand(four.shape, generator=torch.Generator(device).manual_seed(args.seed), device=device)
        z = interpolate_four(model(to_logit(dequantise(four, u))[0])[0], *torch.cartesian_prod(angles, angles).T)
        save_grid(args.out / "interpolation.png", to_images(model, z))
        bits = image_bits(model, held_out, args.seed, device)
        mean, error = bits.mean().item(), bits.std(correction=0).item() / len(bits) ** 0.5
        nats = (8 - mean) * math.prod(model.shape) * math.log(2)  # (12)
        print(f"{len(bits)} test images: {mean:.4f} +- {error:.4f} bits/dim, logit and 1/256 included; log p(x) "
              f"{nats:.1f} nats")
        print(f"{args.samples} samples at temperature {args.temperature}: samples.png, samples.npy in {args.out}, with "
              "temperatures.png, interpolation.png, log.csv, model.pt")

if __name__ == "__main__":
    main()
