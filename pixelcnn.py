# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""PixelCNN: the probability of an image as a product over its numbers, each factor a classifier of the next number.

Paper: van den Oord, Kalchbrenner, Kavukcuoglu, "Pixel Recurrent Neural Networks", 2016, arXiv:1601.06759; [1] is its
equation 1. Two stacks: van den Oord et al., "Conditional Image Generation with PixelCNN Decoders", arXiv:1606.05328.

symbol      in the code             what it is
x           x                       images of levels 0 .. K-1, integers, (N, C, H, W); D = C H W numbers each
x_i         x[:, c, i, j]           the numbers in reading order: row by row, pixel by pixel, R, G, B in each. Here i
                                    counts them; in the code i is the row, j the column, c the colour
x_<i        -                       all that come before x_i
K           levels                  2 (a number is 0 or 1) .. 256 (a byte)
l_i         logits[:, :, c, i, j]   K numbers for each x_i: (N, K, C, H, W) in all, model(x)
v           v                       what the vertical stack tells the horizontal one, F features a pixel, (N, F, H, W)
u_i         u[:, c, i, j]           uniform on [0, 1): it decides the draw of x_i

A vector of D bits can have 2^D values, too many for a table of p(x). But in any order of the numbers it is exactly
  (1) log p(x) = sum_i log p(x_i | x_<i)                                                                             [1]
Each factor is a classifier: its classes are the K values of x_i, what it looks at is x_<i. By a softmax,
  (2) p(x_i = k | x_<i) = exp(l_ik) / sum_k' exp(l_ik'),  l_i a function of x_<i alone
For bits and linear functions these are D logistic regressions, a fully visible sigmoid belief net: l_i1 - l_i0 is row i
of W x + b, where row i of W has zeros from column i on. So a mask on W lets one network give all D conditionals.
  (3) of several layers the first may use what comes before i (mask A), all others also what they have at i (mask B)
for a matrix with zeros on and above the diagonal, times others with zeros above it, has zeros on and above it again. As
the x_i are known in training, one pass gives all D conditionals. A convolution is such a W: its mask keeps the rows
above and, in the pixel's own row, what is to the left. At the pixel itself each channel, in and out, belongs to a
colour (of three colours, the first third of the channels to R), and
  (4) colour c sees the colours c' < c (mask A: R none, G sees R, B sees R and G) or c' <= c (mask B)                [2]
But masks leave a blind spot. A kernel of 3x3 sees one column to the right of x in the      # # # # # # #
row above, two layers two columns two rows up, and so on. However many there are, x         # # # # # # o
never sees an o: at the pixel (14, 14) of 28x28 these are 78 of the 406 pixels before       # # # # # o o
it, a fifth of all that there is to know. Two stacks see all of them.                       # # # x - - -
The vertical stack sees the rows above, all columns of them: its kernels need no mask, for its input is moved down by a
row. The horizontal one, with masks, sees its own row up to x, and is told what the vertical one has found:
  (5) v = vertical(rows above),  l = horizontal(row so far, v)
Training lowers -log p(x), in nats, its mean over the N images of a batch:
  (6) loss = -1/N sum_images log p(x)
A byte becomes a level. Two levels are drawn, in training anew at each use, for held-out and test images once:
  (7) K = 2: x = 1 with probability byte / 255, else 0;  K > 2: x = floor(K byte / 256)
  (8) bits/dim = -log p(x) / (D ln 2)
Sampling asks for one number after another. The level is the first whose cumulative probability is above u_i:
  (9) x_i = number of the k < K - 1 with p(0) + ... + p(k) <= u_i
That takes D passes. But a new number needs no more than one column of the horizontal stack, and a new row one row of
the vertical one: D columns and H rows cost as much as a single pass (with C colours, its horizontal part C times).

Trip wires: mask A is for the first layer only. 1x1 convolutions need (4), too. Nats are per image, bits per number.
Binarised MNIST drawn anew (dynamic) and drawn once (static) are two data sets, whose figures cannot be compared.
Differs from the papers in: the vertical stack ends before the horizontal one begins, and tells it once; residual blocks
with ReLU in both, no gates; a learned table of places; Adam, a falling rate, averaged weights; two levels drawn anew.

python pixelcnn.py --data mnist            146 s to train on two cores; 85.19 nats = 0.1568 bits/dim, test images
python pixelcnn.py --data mnist --plain    draws again without the cache: 281 times as long on one core, same pixels
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
def to_levels(images, levels, generator=None):
    """uint8 images -> levels 0 .. levels-1, int64, the same shape; two levels are drawn anew at each call."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, 0 .. 255, not {images.dtype}")
    if levels == 2:
        return (255 * torch.rand(images.shape, generator=generator, device=images.device) < images).long()  # (7)
    return images.long() * levels // 256  # (7)

def from_levels(x, levels):
    """Levels -> -1 .. 1, what the network takes and the pictures show."""
    return x * (2 / (levels - 1)) - 1

def log_prob(model, x):
    """log p(x) in nats, exact, of levels x (N, C, H, W) -> (N,). model: levels -> logits (N, K, C, H, W)."""
    log_p = -F.cross_entropy(model(x), x.long(), reduction="none")  # (2)
    return log_p.flatten(1).sum(1)  # (1)

def loss_nats(model, x):
    """What training lowers: the mean of -log p(x), nats an image."""
    return -log_prob(model, x).mean()  # (6)

def to_bits(nats, dims):
    """-log p(x) in nats of images of so many numbers -> bits for each number."""
    return nats / (dims * math.log(2))  # (8)

def causal_mask(kind, c_out, c_in, k, colours):
    """Which weights of k columns, the last of them the pixel's own, may be used -> ones and zeros (c_out, c_in, 1, k).

    kind: "A" or "B". The channels, in and out, are dealt to the colours in order, in equal parts."""
    target, source = (torch.arange(c) * colours // c for c in (c_out, c_in))
    mask = torch.ones(c_out, c_in, 1, k)  # (3)
    mask[..., -1] = (source < target[:, None] if kind == "A" else source <= target[:, None])[..., None]  # (4)
    return mask

def draw(logits, u):
    """Levels by the softmax of logits (N, K), decided by u, (N,) on [0, 1) -> (N,) int64."""
    cdf = logits.softmax(1).cumsum(1)[:, :-1]
    return (cdf <= u[:, None]).sum(1)  # (9)

@torch.inference_mode()
def sample_plain(model, u, x=None, first=0):
    """Levels (N, C, H, W), drawn with u, (N, C, H, W) on [0, 1), by a whole pass of the network for each number.

    x: levels whose rows above `first` are kept."""
    x = torch.zeros_like(u, dtype=torch.long) if x is None else x.clone()
    for i, j, c in itertools.product(range(first, u.shape[2]), range(u.shape[3]), range(u.shape[1])):
        x[:, c, i, j] = draw(model(x)[:, :, c, i, j], u[:, c, i, j])  # (9)
    return x

@torch.inference_mode()
def sample_cached(model, u, x=None, first=0):
    """What sample_plain() draws, with one row of the vertical stack for each row, and one column of the horizontal
    stack for each number. Sums round differently: a number would differ if u were within 1e-7 of a limit in (9)."""
    x = torch.zeros_like(u, dtype=torch.long) if x is None else x.clone()
    past, seen = model.start(u), from_levels(x, model.levels)
    for i in range(u.shape[2]):
        above = seen[:, :, i - 1 : i] if i else torch.zeros_like(seen[:, :, :1])  # the row before, (N, C, 1, W)
        v = model.vertical(above, i, past)  # (N, F, 1, W)
        for j in range(u.shape[3] if i >= first else 0):
            for c in range(u.shape[1]):  # mask A hides what of the pixel is not drawn yet
                logits = model.horizontal(seen[:, :, i, j], v[:, :, 0, j], (j, past))[:, :, c]  # (N, K)
                x[:, c, i, j] = draw(logits, u[:, c, i, j])  # (9)
                seen[:, c, i, j] = from_levels(x[:, c, i, j], model.levels)
            model.left(seen[:, :, i, j], (j, past))  # now drawn, for the columns to come
    return x

def reach(model, x, i, j):
    """How much the answer at row i, column j depends on each pixel: |d(l_K-1 - l_0) / dx|, white against black, the
    mean over images x, levels (N, C, H, W), and the sum over colours -> (H, W)."""
    x = x.clone().requires_grad_() if x.is_floating_point() else x.float().requires_grad_()
    logits = model(x)[:, :, :, i, j]  # (N, K, C)
    gradient, = torch.autograd.grad((logits[:, -1] - logits[:, 0]).sum(), x)
    return gradient.abs().sum(1).mean(0)

# -------------------------------------------------------------------------------------------------------- network -----
# Any model whose l_i looks at x_<i alone would do for log_prob and sample_plain. sample_cached wants these two stacks.
class Above(nn.Conv2d):
    """A convolution that sees its own row and the rows above, r together, and k columns, k odd. (N, c, H, W) -> same.

    With past, a dict, h is one row, (N, c, 1, W), and past has the rows before it."""

    def __init__(self, c_in, c_out, r, k):
        super().__init__(c_in, c_out, (r, k), padding=(0, k // 2))

    def forward(self, h, past=None):
        if past is None:
            h = F.pad(h, (0, 0, self.kernel_size[0] - 1, 0))
        else:
            h = torch.cat([past[self], h], 2)
            past[self] = h[:, :, 1:]
        return super().forward(h)  # (5)

class Left(nn.Conv2d):
    """A masked convolution that sees its own pixel and those to the left, k together. (N, c, H, W) -> the same.

    With at = (j, past), h is column j of one row, (N, c), and past has the columns before it."""

    def __init__(self, kind, c_in, c_out, k, colours):
        super().__init__(c_in, c_out, (1, k))
        self.register_buffer("mask", causal_mask(kind, c_out, c_in, k, colours), persistent=False)

    def forward(self, h, at=None):
        k = self.kernel_size[1]
        if at is None:
            return F.conv2d(F.pad(h, (k - 1, 0)), self.weight * self.mask, self.bias)  # (5)
        j, past = at
        matrix, seen = past[self]  # (c_out, k c), (N, W + k-1, c)
        if k > 1:
            seen[:, j + k - 1] = h
            h = seen[:, j : j + k].flatten(1)
        return F.linear(h, matrix, self.bias)  # (5)

class PixelCNN(nn.Module):
    """Levels (N, channels, size, size) -> logits (N, levels, channels, size, size): two stacks of residual blocks."""

    def __init__(self, channels=1, size=28, levels=2, width=32, layers=5):
        super().__init__()
        self.shape, self.levels = (channels, size, size), levels
        self.place = nn.Parameter(torch.zeros(width, size, size))  # digits lie in the middle: where is known
        self.above, self.across = Above(channels, width, 3, 7), nn.Conv2d(width, width, 1)
        self.down = nn.ModuleList(
            nn.ModuleList([Above(width, width, 2, 5), nn.Conv2d(width, width, 1)]) for _ in range(layers))
        left = lambda kind, c_in, c_out, k: Left(kind, c_in, c_out, k, channels)
        self.left = left("A", channels, width, 4)
        self.right = nn.ModuleList(
            nn.ModuleList([left("B", width, width, 3), left("B", width, width, 1)]) for _ in range(layers))
        self.leave = nn.ModuleList([left("B", width, width, 1), left("B", width, channels * levels, 1)])
        for _, last in [*self.down, *self.right]:
            nn.init.zeros_(last.weight)  # at first a block passes h on

    def vertical(self, x, i=None, past=None):
        """Images -1 .. 1, (N, C, H, W), moved down by a row -> what the horizontal stack is told, (N, F, H, W). With i
        and past, x is row i of that alone, (N, C, 1, W)."""
        h = self.above(x, past) + (self.place if i is None else self.place[:, i : i + 1])
        for first, last in self.down:
            h = h + last(F.relu(first(F.relu(h), past)))
        return self.across(F.relu(h))

    def horizontal(self, x, v, at=None):
        """Images -1 .. 1, (N, C, H, W), and v, (N, F, H, W) -> logits (N, K, C, H, W). With at = (j, past), it is all
        of column j alone: x (N, C), v (N, F), logits (N, K, C)."""
        h = self.left(x, at) + v
        for first, last in self.right:
            h = h + last(F.relu(first(F.relu(h), at)), at)
        first, last = self.leave
        logits = last(F.relu(first(F.relu(h), at)), at)  # (N, C K, ...)
        return logits.unflatten(1, (-1, self.levels)).transpose(1, 2)

    def forward(self, x):
        x = from_levels(x, self.levels)
        return self.horizontal(x, self.vertical(F.pad(x, (0, 0, 1, -1))))  # (5)

    def start(self, u):
        """What the layers keep of the past before the first pixel of images like u, (N, C, H, W)."""
        past = {}
        for layer in self.modules():
            if isinstance(layer, Above):
                rows = u.new_zeros(len(u), layer.in_channels, layer.kernel_size[0] - 1, u.shape[3])
                past[layer] = rows.to(memory_format=layout(u.device))
            if isinstance(layer, Left):
                matrix = (layer.weight * layer.mask)[:, :, 0].transpose(1, 2).flatten(1)  # (c_out, k c)
                past[layer] = matrix, u.new_zeros(len(u), u.shape[3] + layer.kernel_size[1] - 1, layer.in_channels)
        return past

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
def hold_out(images):
    """Five sixths of the images, to train on, and a sixth, to choose by: 50,000 and 10,000 of MNIST's. Drawn at random,
    but always alike, for folders may be sorted. A single image is in both."""
    order, n = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)), max(1, len(images) // 6)
    return images[order[n:] if len(images) > 1 else order], images[order[:n]]

def half_products(device):
    """On a CPU that has them, convolutions in bfloat16, for training: two thirds of the time (torch 2.13)."""
    have = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)  # younger than torch 2.4
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.device(device).type == "cpu" and have())

def train(images, iters=3000, batch=16, lr=1e-2, levels=2, width=32, layers=5, device="cpu", seed=0, path=None,
          fresh=False, compiled=False):
    """uint8 images (N, C, H, H) on the CPU -> the averaged model, ready to sample. Seeds torch's global generator.

    A sixth of the images is never trained on: the log has the averaged model's nats on 500 of them.
    path: where to save; unless fresh, training goes on from what is there. ValueError if that was made otherwise,
    FloatingPointError if the loss is not finite (what was saved last stays)."""
    wanted = dict(channels=images.shape[1], size=images.shape[2], levels=levels, width=width, layers=layers,
                  iters=iters, batch=batch, lr=lr, seed=seed,
                  images=hashlib.sha256(images.contiguous().numpy()).hexdigest()[:12])
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be square, not {images.shape[3]}x{images.shape[2]}")
    rank, world = processes(device, batch)
    torch.manual_seed(seed)
    model = PixelCNN(images.shape[1], images.shape[2], levels, width, layers)
    model = model.to(device, memory_format=layout(device))
    average = copy.deepcopy(model).requires_grad_(False).eval()
    fused = torch.device(device).type != "mps" and not compiled  # compiled gradients may have other strides
    opt = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99), fused=fused)
    parts, done, log = (model, average, opt), 0, []
    if path and path.exists() and not fresh:
        done, log = resume(path, parts, load_checkpoint(path, ["pixelcnn"], device, wanted))
        opt.param_groups[0]["fused"] &= fused  # a checkpoint brings the flag of the device that it was made on
    images, held_out = hold_out(images)
    net, images = torch.compile(model) if compiled else model, images.to(device)
    if world > 1:
        net, path = nn.parallel.DistributedDataParallel(net), None if rank else path
    progress, total, saved = Progress("iteration", "images", iters, done), torch.zeros((), device=device), time.time()
    for i in range(done, iters):
        opt.param_groups[0]["lr"] = lr * min((i + 1) / 200, 1 - i / iters)
        x = to_levels(images[torch.randint(len(images), (batch,), device=device)], levels)
        with half_products(device):
            loss = loss_nats(net, x[rank::world])
        opt.zero_grad()
        loss.backward()
        opt.step()
        memory = min(0.995, (1 + i) / (10 + i))  # short while the weights still move fast
        for a, p in zip(average.parameters(), model.parameters()):
            a.lerp_(p.detach(), 1 - memory)
        total += loss.detach()
        if (i + 1) % 100 == 0 or i + 1 == iters:
            due = len(log) % (iters // 1000 or 1) == 0 or i + 1 == iters  # some ten times
            valid = image_nats(average, held_out[:500], device).mean().item() if due else log[-1][2]
            log.append((i + 1, total.item() / (i % 100 + 1), valid))  # here only is the device waited for
            total.zero_()
            if not math.isfinite(log[-1][1] + valid):
                raise FloatingPointError(f"the loss is {log[-1][1]} in training, {valid} held out, at iteration "
                                         f"{i + 1}; try a smaller --lr")
            if path and (i + 1 == iters or time.time() - saved > 10):
                save_checkpoint(path, "pixelcnn", wanted, parts, i + 1, log, ("train_nats", "valid_nats"))
                saved = time.time()
        progress(i + 1, batch, f"{log[-1][1]:.2f} nats" if log else "")
    return average

def load(path, device="cpu"):
    """The averaged model of a checkpoint, ready to sample; model.shape is the (C, H, W) of its images."""
    state = load_checkpoint(Path(path), ["pixelcnn"], device)
    with or_say(f"{path}: {DAMAGED}"):
        model = PixelCNN(*(state["settings"][name] for name in ("channels", "size", "levels", "width", "layers")))
        model.load_state_dict(state["parts"][1])
    return model.to(device, memory_format=layout(device)).requires_grad_(False).eval()

@torch.inference_mode()
def image_nats(model, images, device="cpu", chunk=100):
    """-log p(x) of each of the uint8 images (N, C, H, W), in nats, (N,), their levels drawn always alike."""
    generator = torch.Generator().manual_seed(0)
    chunk = max(1, min(chunk, 2**24 // (model.levels * images[0].numel())))  # of logits no more than 64 MB at once
    parts = to_levels(images, model.levels, generator).split(chunk)
    return torch.cat([-log_prob(model, x.to(device)) for x in parts])

def sample(model, n, seed=0, device="cpu", chunk=64, sampler=sample_cached):
    """n images, levels (n, C, H, W), drawn chunk by chunk, which has no influence on them."""
    u = torch.rand(n, *model.shape, generator=torch.Generator(device).manual_seed(seed), device=device)
    progress, images = Progress("sampling, image", "images", n), []
    for part in u.split(chunk):
        images.append(sampler(model, part))
        progress(chunk * (len(images) - 1) + len(part), 1)
    return torch.cat(images)

def heat_map(share, i, j, zoom=8):
    """reach() of pixel (i, j), (H, W) -> picture (1, 3, H zoom, W zoom), -1 .. 1: from black by red to yellow over four
    decades, grey what is not seen at all, the pixel itself white."""
    tone = (share / share.max().clamp(min=1e-30)).log10().div(4).add(1).clamp(0, 1)
    picture = torch.stack([2 * tone, 2 * tone - 1, 0 * tone]).clamp(0, 1)  # (3, H, W)
    picture = torch.where(share > 0, picture, 0.4)
    picture[:, i, j] = 1
    return 2 * picture.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)[None] - 1

def main(argv=None):
    parser = image_parser(__doc__, "pixelcnn", train)
    add, default = parser.add_argument, inspect.signature(train).parameters
    add("--levels", type=at_least(2), default=default["levels"].default, help="values of a number, 2 .. 256")
    add("--width", type=at_least(1), default=default["width"].default, help="channels of both stacks")
    add("--layers", type=at_least(0), default=default["layers"].default, help="residual blocks in each of them")
    add("--plain", action="store_true", help="draw the samples without a cache, too, and compare; takes minutes")
    args = parser.parse_args(argv)
    with parser.guard():
        rank, _ = processes(args.device, args.batch)
        device, path = pick_device(args.device), args.out / "model.pt"
        if args.levels > 256:
            raise ValueError(f"--levels {args.levels}: a byte has no more than 256")
        images, test = (load_images(args.data, args.size, args.channels, test) for test in (False, True))
        print(f"{len(images)} images of {args.size}x{args.size}x{args.channels} from {args.data}, on {device}")
        train(images, args.iters, args.batch, args.lr, args.levels, args.width, args.layers, device, args.seed, path,
              args.fresh, args.compile)
        if rank:
            return  # the first process goes on alone
        model = load(path, device)
        start = time.perf_counter()
        x = sample(model, args.samples, args.seed, device).cpu()  # waits for the device
        seconds = time.perf_counter() - start
        save_samples(args.out, from_levels(x, args.levels))

        shown = to_levels(test[torch.arange(8) % len(test)], args.levels, torch.Generator().manual_seed(0)).to(device)
        u = torch.rand(48, *model.shape, generator=torch.Generator(device).manual_seed(args.seed), device=device)
        ways = sample_cached(model, u, shown.repeat_interleave(6, 0), args.size // 2).unflatten(0, (8, 6))
        rows = from_levels(torch.stack([shown, shown, *ways.unbind(1)], 1), args.levels)  # (8, 8, C, H, W)
        rows[:, 1, :, args.size // 2 :] = 0
        save_grid(args.out / "completions.png", rows.flatten(0, 1))
        i, j = 3 * args.size // 4, args.size // 2
        save_grid(args.out / "receptive.png", heat_map(reach(model, shown, i, j), i, j), 1)

        for name, part in ("held-out", hold_out(images)[1]), ("test", test):
            nats = image_nats(model, part, device).cpu().double()  # no float64 on mps
            mean, error = nats.mean(), nats.std(correction=0) / len(nats) ** 0.5
            print(f"{len(nats)} {name} images: -log p(x) {mean:.2f} +- {error:.2f} nats an image = "
                  f"{to_bits(mean, math.prod(model.shape)):.4f} bits/dim")
        if args.plain:
            start = time.perf_counter()
            other = sample(model, args.samples, args.seed, device, 16, sample_plain).cpu()
            times = (time.perf_counter() - start) / seconds
            print(f"without the cache: {times:.0f} times as long; {(x != other).sum()} of {x.numel()} pixels differ")
        print(f"{args.samples} samples, {args.samples / seconds:.1f} images/s: samples.png, samples.npy in {args.out}, "
              "with completions.png (image, what was given, six ways on), receptive.png, log.csv, model.pt")

if __name__ == "__main__":
    main()
