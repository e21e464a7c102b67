# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""DDIM: a network trained as in DDPM, sampled in 50 steps instead of 1000, without noise, and back again.

Paper: Song, Meng, Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, arXiv:2010.02502. [12] is its equation 12.
The paper writes alpha_t for what DDPM and this file call alpha_bar_t.

symbol         in the code     what it is
x_0, x_t       x_0, x_t        images (N, C, H, W), -1 .. 1 (the byte k is 2 k / 255 - 1), and the same in noise
t              t               step: 0 .. T-1 in the code for the paper's 1 .. T; "no noise" is the step before 0
p              p               the step that comes after t in sampling, p < t; t - 1 in DDPM, any earlier one here
alpha_bar_t    alpha_bar[t]    product of 1 - beta, 0.9999 .. 4e-5, (T,) float64; 1 where there is no noise
eps_theta      model(x_t, t)   the network's guess of the noise in x_t, (N, C, H, W)
sigma, eta     sigma, eta      deviation of the noise that a step adds; eta in 0 .. 1 scales it
tau            tau             the S steps that are visited, T-1 = tau_S > ... > tau_1 >= 0

Training needs only the marginals of noisy images, which stay those of DDPM:
  (1) q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)                                                   [4]
  (2) L_gamma = E_{t, x_0, eps} gamma_t || eps - eps_theta(x_t, t) ||^2 with x_t from (1) and gamma_t = 1            [5]
Given x_0, how x_p depends on x_t is free, and so is the choice of p. For any 0 <= sigma^2 <= 1 - alpha_bar_p let
  (3) q(x_p | x_t, x_0) = N(sqrt(alpha_bar_p) x_0 + sqrt(1 - alpha_bar_p - sigma^2) eps, sigma^2 I)                  [7]
      with eps = (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t), the noise that is in x_t.
If x_t obeys (1), eps is N(0, I); the variances 1 - alpha_bar_p - sigma^2 and sigma^2 add up, and x_p obeys (1), too
[Lemma 1]. So all these processes share (1), and if sigma > 0 their bounds are (2) with some gamma, plus a constant
[Theorem 1]. A network that fits every t has the same optimum for every gamma, so one training will do.
Sampling puts the network's guess of x_0 in the place of x_0:
  (4) x_0 ~ (x_t - sqrt(1 - alpha_bar_t) eps_theta(x_t, t)) / sqrt(alpha_bar_t)                                      [9]
  (5) x_p = sqrt(alpha_bar_p) x_0 + sqrt(1 - alpha_bar_p - sigma^2) eps + sigma z,  z ~ N(0, I)                     [12]
  (6) sigma = eta sqrt((1 - alpha_bar_p) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_p)                   [16]
eta = 1 and p = t - 1 make sigma^2 the posterior variance beta~_t and (3) the posterior: that is DDPM with the small
variance. eta = 0 adds no noise: the picture is a function of x_T. The steps visited, ceil rounding up, i = 1 .. S:
  (7) tau_i = max(ceil(T (i / S)^n), i) - 1 with n = 1 (linear) or 2 (quad); after tau_1 comes alpha_bar = 1
With eta = 0 divide (5) by sqrt(alpha_bar_p): x / sqrt(alpha_bar) moves by eps times the change of the noise-to-signal
ratio. It is Euler's method for an ODE [14], which can be run upwards, too: from a picture to the x_T that makes it,
  (8) x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps_theta(x_p, p), x_0 from (4) at x_p; at the picture itself
      x_0 is the picture, and the network, which knows no step before 0, is asked at step 0
Between two latents one walks on the sphere near which Gaussian noise lies, theta the angle between x and y:
  (9) slerp(x, y, a) = sin((1 - a) theta) / sin(theta) x + sin(a theta) / sin(theta) y                        [appendix]

Trip wires: a step goes from t to p, and alpha_bar_p of the last one is 1, not alpha_bar_0. Sampling starts at T-1
whatever S is. When x_0 is cut to -1 .. 1 (as in the authors' sampler for DDPM), eps in (5) follows from the cut x_0.
The loss of the code is (2) divided by C H W, a mean over pixels.
Differs from the paper in: tau ends on T-1 (its code counts up from 0: S = 50 starts at 980, quad always at 800); x_0 is
cut unless clip=False (its DDIM sampler does not); a small network; small t are drawn more often in training, with
weights that leave the mean (2) as it is; the average of the weights remembers little at first; the learning rate falls
to zero.

python ddim.py --data mnist --steps 50 --samples 2000    166 s of training and 22 s of sampling on two cores; fd 45.3
python ddim.py --model out/ddpm/model.pt --steps 20      samples what ddpm.py has trained; seconds
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
def make_alpha_bar(T=1000, beta_1=1e-4, beta_T=0.02):
    """DDPM's linear schedule: alpha_bar, (T,) float64."""
    return torch.cumprod(1 - torch.linspace(beta_1, beta_T, T, dtype=torch.float64), 0)

def noise_tables(alpha_bar, device="cpu"):
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar), (T,) each, made in float64 and used as float32."""
    return alpha_bar.sqrt().float().to(device), (1 - alpha_bar).sqrt().float().to(device)

def loss_gamma(model, x_0, t, eps, tables):
    """The squared error of each image, the mean over its pixels -> (N,). t: (N,) ints; tables: of noise_tables()."""
    signal, noise = (table[t].view(-1, *[1] * (x_0.dim() - 1)) for table in tables)
    x_t = signal * x_0 + noise * eps  # (1)
    return (model(x_t, t) - eps).square().flatten(1).mean(1)  # (2)

def draw_t(n, T, device="cpu"):
    """n steps, spread evenly, small t more often, and weights: E[weight f(t)] is the mean of f over 0 .. T-1."""
    a, b = 20**0.5, (T + 20) ** 0.5  # P(t) = (sqrt(t + 21) - sqrt(t + 20)) / (b - a)
    u = (torch.rand(1, device=device) + torch.arange(n, device=device) / n) % 1
    t = ((a + u * (b - a)) ** 2 - 20).long().clamp(0, T - 1)
    return t, (b - a) / T * ((t + 21).sqrt() + (t + 20).sqrt())

def make_tau(T, S, spacing="linear"):
    """The steps to visit, as (t, p) pairs from the noisiest on: S of them, the last p is -1, for no noise."""
    if not 1 <= S <= T:
        raise ValueError(f"--steps {S}: must be 1 .. {T}, the number of steps that the network was trained for")
    n = 1 if spacing == "linear" else 2
    tau = [max(-(-T * i**n // S**n), i) - 1 for i in range(1, S + 1)]  # (7)
    return list(zip(tau[::-1], tau[-2::-1] + [-1]))

def level(alpha_bar, t):
    """alpha_bar_t as a float; 1 for t = -1."""
    return alpha_bar[t].item() if t >= 0 else 1.0

def predict_x_0(model, x_t, t, alpha_bar):
    """The network's guesses of x_0 and eps at x_t, for an int t."""
    a = level(alpha_bar, t)
    eps_theta = model(x_t, torch.full((len(x_t),), t, device=x_t.device))
    return (x_t - (1 - a) ** 0.5 * eps_theta) / a**0.5, eps_theta  # (4)

def step(model, x_t, t, p, alpha_bar, eta=0.0, z=None, clip=True):
    """x_p from x_t, for ints t > p >= -1. z: normal, like x_t, needed only if eta > 0."""
    a_t, a_p = level(alpha_bar, t), level(alpha_bar, p)
    x_0, eps = predict_x_0(model, x_t, t, alpha_bar)
    if clip:
        x_0 = x_0.clamp(-1, 1)
        eps = (x_t - a_t**0.5 * x_0) / (1 - a_t) ** 0.5  # (3)
    sigma = eta * ((1 - a_p) / (1 - a_t)) ** 0.5 * (1 - a_t / a_p) ** 0.5  # (6)
    x_p = a_p**0.5 * x_0 + max(1 - a_p - sigma**2, 0.0) ** 0.5 * eps  # (5)
    return x_p + sigma * z if sigma > 0 else x_p  # (5)

@torch.inference_mode()
def decode(model, x_T, alpha_bar, S=50, eta=0.0, spacing="linear", clip=True, generator=None):
    """x_T -> pictures, (N, C, H, W), in S steps. With eta = 0 nothing is drawn, and x_T alone decides.

    What comes out is an inference tensor, here and in encode: .clone() it before training on it."""
    x = x_T
    for t, p in make_tau(len(alpha_bar), S, spacing):
        z = torch.randn(x.shape, generator=generator, device=x.device) if eta else None
        x = step(model, x, t, p, alpha_bar, eta, z, clip)
    return x

@torch.inference_mode()
def encode(model, x_0, alpha_bar, S=50, spacing="linear"):
    """Pictures -> the x_T from which decode(..., clip=False) draws them, up to an error that falls with S."""
    x = x_0
    for t, p in make_tau(len(alpha_bar), S, spacing)[::-1]:
        x_0, eps = predict_x_0(model, x, p, alpha_bar) if p >= 0 else (x, predict_x_0(model, x, 0, alpha_bar)[1])
        x = level(alpha_bar, t) ** 0.5 * x_0 + (1 - level(alpha_bar, t)) ** 0.5 * eps  # (8)
    return x

def slerp(x, y, a):
    """From x (a = 0) to y (a = 1), both (C, H, W), along the great circle."""
    theta = torch.arccos(((x * y).sum() / (x.norm() * y.norm())).clamp(-1, 1))
    if theta.sin() < 1e-4:  # one direction, or two opposite ones, between which no great circle is the shortest
        return torch.lerp(x, y, a)
    return (torch.sin((1 - a) * theta) * x + torch.sin(a * theta) * y) / torch.sin(theta)  # (9)

# -------------------------------------------------------------------------------------------------------- network -----
# Any f(x, t) that maps (N, C, H, W) and (N,) to (N, C, H, W) would do. This is a small U-Net.
class Block(nn.Module):
    """A residual block; the time e scales and shifts what lies between its two convolutions."""

    def __init__(self, c_in, c_out, c_time):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.time = nn.Linear(c_time, 2 * c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # at first the block passes x on

    def forward(self, x, e):
        scale, shift = self.time(e)[:, :, None, None].chunk(2, 1)  # (N, c_out, 1, 1) each
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        return self.skip(x) + self.conv2(F.silu(torch.addcmul(shift, h, 1 + scale)))

class UNet(nn.Module):
    """x (N, channels, size, size) and t (N,) in 0 .. t_max -> (N, channels, size, size).

    2x2 pixels are first folded into 4 channels, which loses nothing. ValueError unless 4 divides size and 8 width."""

    def __init__(self, channels=1, size=28, width=32, t_max=1000):
        super().__init__()
        if size % 4 or width % 8:
            raise ValueError(f"--size {size} --width {width}: the size must be a multiple of 4, and the width one of 8")
        self.shape, w, c = (channels, size, size), width, 4 * width
        self.register_buffer("omega", torch.logspace(0, 3, w) / t_max, persistent=False)
        self.time = nn.Sequential(nn.Linear(2 * w, c), nn.SiLU(), nn.Linear(c, c), nn.SiLU())
        self.enter, self.leave = nn.Conv2d(4 * channels, w, 3, padding=1), nn.Conv2d(w, 4 * channels, 3, padding=1)
        self.left = nn.ModuleList([Block(w, w, c), Block(w, w, c)])
        self.down, self.up = nn.Conv2d(w, 2 * w, 3, stride=2, padding=1), nn.Conv2d(2 * w, w, 1)
        self.middle = nn.ModuleList([Block(2 * w, 2 * w, c) for _ in range(3)])
        self.right = nn.ModuleList([Block(2 * w, w, c), Block(w, w, c)])
        self.norm, self.gate = nn.GroupNorm(8, w), nn.Linear(c, 2)
        for layer in (self.leave, self.gate):
            nn.init.zeros_(layer.weight)

    def forward(self, x, t):
        angle = t[:, None] * self.omega
        e = self.time(torch.cat([angle.sin(), angle.cos()], 1))  # (N, 4 w)
        h = self.enter(F.pixel_unshuffle(x, 2))  # (N, w, size/2, size/2)
        for block in self.left:
            h = block(h, e)
        kept, h = h, self.down(h)  # (N, w, size/2, size/2), (N, 2 w, size/4, size/4)
        for block in self.middle:
            h = block(h, e)
        h = torch.cat([F.interpolate(self.up(h), scale_factor=2.0), kept], 1)  # (N, 2 w, size/2, size/2)
        for block in self.right:
            h = block(h, e)
        h = F.pixel_shuffle(self.leave(F.silu(self.norm(h))), 2)  # (N, channels, size, size)
        a, b = self.gate(e)[:, :, None, None].chunk(2, 1)  # (N, 1, 1, 1) each
        return (1 + a) * h + b * x  # how much of the answer is x itself depends on t

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
def train(images, iters=5400, batch=32, lr=5e-3, width=32, device="cpu", seed=0, path=None, fresh=False,
          compiled=False):
    """uint8 images (N, C, H, H) on the CPU -> the averaged model, ready to sample. Seeds torch's global generator.

    path: where to save; unless fresh, training goes on from what is there. ValueError if that was made otherwise,
    FloatingPointError if the loss is not finite (what was saved last stays)."""
    wanted = dict(channels=images.shape[1], size=images.shape[2], width=width, iters=iters, batch=batch, lr=lr,
                  seed=seed, images=hashlib.sha256(images.contiguous().numpy()).hexdigest()[:12])
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be square, not {images.shape[3]}x{images.shape[2]}")
    rank, world = processes(device, batch)
    torch.manual_seed(seed)
    model = UNet(images.shape[1], images.shape[2], width).to(device, memory_format=layout(device))
    average = copy.deepcopy(model).requires_grad_(False).eval()
    opt = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99))
    parts, done, log = (model, average, opt), 0, []
    if path and path.exists() and not fresh:
        done, log = resume(path, parts, load_checkpoint(path, ["ddim"], device, wanted))
    net, images = torch.compile(model) if compiled else model, images.to(device)
    if world > 1:
        net, path = nn.parallel.DistributedDataParallel(net), None if rank else path
    tables = noise_tables(make_alpha_bar(), device)
    progress, total, saved = Progress("iteration", "images", iters, done), torch.zeros((), device=device), time.time()
    for i in range(done, iters):
        opt.param_groups[0]["lr"] = lr * min((i + 1) / 200, 1 - i / iters)
        x_0 = images[torch.randint(len(images), (batch,), device=device)].float() / 127.5 - 1
        t, weight = draw_t(batch, len(tables[0]), device)
        x_0, t, weight, eps = (v[rank::world] for v in (x_0, t, weight, torch.randn_like(x_0)))
        loss = (weight * loss_gamma(net, x_0, t, eps, tables)).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        memory = min(0.995, (1 + i) / (10 + i))  # short while the weights still move fast
        for a, p in zip(average.parameters(), model.parameters()):
            a.lerp_(p.detach(), 1 - memory)
        total += loss.detach()
        if (i + 1) % 100 == 0 or i + 1 == iters:
            log.append((i + 1, total.item() / (i % 100 + 1)))  # the only place where the device is waited for
            total.zero_()
            if not math.isfinite(log[-1][1]):
                raise FloatingPointError(f"the loss is {log[-1][1]} at iteration {i + 1}; try a smaller --lr")
            if path and (i + 1 == iters or time.time() - saved > 10):
                save_checkpoint(path, "ddim", wanted, parts, i + 1, log)
                saved = time.time()
        progress(i + 1, batch, f"loss {log[-1][1]:.4f}" if log else "")
    return average

def load(path, device="cpu"):
    """The averaged model of a checkpoint of ddim.py or ddpm.py; model.shape is the (C, H, W) of its images."""
    state = load_checkpoint(Path(path), ["ddim", "ddpm"], device)
    with or_say(f"{path}: {DAMAGED}"):
        model = UNet(*(state["settings"][name] for name in ("channels", "size", "width")))
        model.load_state_dict(state["parts"][1])
    return model.to(device, memory_format=layout(device)).requires_grad_(False).eval()

def sample(model, shape, S=50, eta=0.0, spacing="linear", clip=True, seed=0, device="cpu", chunk=100):
    """Images of the shape (N, C, H, W), values about -1 .. 1, drawn chunk by chunk in S steps each."""
    generator, images = torch.Generator(device).manual_seed(seed), []
    progress = Progress(f"{S} steps, image", "images", shape[0])
    for i in range(0, shape[0], chunk):
        x_T = torch.randn(min(chunk, shape[0] - i), *shape[1:], generator=generator, device=device)
        images.append(decode(model, x_T, make_alpha_bar(), S, eta, spacing, clip, generator))
        progress(i + len(x_T), 1)
    return torch.cat(images)

def numbers(text):
    return [int(word) for word in text.split(",")]

def main(argv=None):
    parser = image_parser(__doc__, "ddim", train)
    add = parser.add_argument
    add("--width", type=at_least(1), default=32, help="channels at half the side")
    add("--steps", type=int, default=50, help="S, the steps of sampling")
    add("--eta", type=float, default=0.0, help="noise in sampling: 0 is DDIM, 1 is DDPM")
    add("--spacing", choices=("linear", "quad"), default="linear", help="which steps are visited")
    add("--model", help="a checkpoint of ddpm.py or ddim.py to sample, instead of training one")
    add("--compare", type=numbers, default=[], help="steps, as in 10,20,50, to draw the same x_T in and to time")
    args = parser.parse_args(argv)
    with parser.guard():
        rank, _ = processes(args.device, args.batch)
        device, path, alpha_bar = pick_device(args.device), args.out / "model.pt", make_alpha_bar()
        for S in [args.steps, *args.compare]:
            make_tau(len(alpha_bar), S)  # refuses what cannot be, before training
        if not 0 <= args.eta <= 1:
            raise ValueError(f"--eta {args.eta}: must be 0 .. 1")
        if args.model:
            args.channels, args.size, _ = load(args.model, device).shape
        images = None if args.model else load_images(args.data, args.size, args.channels)
        x_0 = to_float(load_images(args.data, args.size, args.channels, test=True)[:16].to(device))
        if not args.model:
            print(f"{len(images)} images of {args.size}x{args.size}x{args.channels} from {args.data}, on {device}")
            settings = args.iters, args.batch, args.lr, args.width, device, args.seed
            train(images, *settings, path, args.fresh, args.compile)
        if rank:
            return  # the first process goes on alone
        model = load(args.model or path, device)
        start = time.perf_counter()
        x = sample(model, (args.samples, *model.shape), args.steps, args.eta, args.spacing, True, args.seed, device)
        x = x.cpu()  # this, like every .cpu() here, waits for the device
        rate = args.samples / (time.perf_counter() - start)
        save_samples(args.out, x)

        x_T = torch.randn(32, *model.shape, generator=torch.Generator(device).manual_seed(args.seed), device=device)
        ends, walk = x_T[:12], torch.linspace(0, 1, 10).tolist()
        latents = torch.stack([slerp(x, y, a) for x, y in zip(ends[::2], ends[1::2]) for a in walk])
        save_grid(args.out / "slerp.png", decode(model, latents, alpha_bar, args.steps, 0.0, args.spacing), len(walk))

        rows, errors = [x_0], []
        for S in (10, 20, 50, 100, 200):
            rows.append(decode(model, encode(model, x_0, alpha_bar, S), alpha_bar, S, clip=False))
            errors.append(f"{S}: {F.mse_loss(rows[-1], x_0).item() / 4:.5f}")
        save_grid(args.out / "reconstructions.png", torch.cat(rows), len(x_0))
        print(f"mean squared error of encoding and decoding, pixels in 0 .. 1, by steps: {', '.join(errors)}")

        rows = []
        for S in args.compare:
            start = time.perf_counter()
            rows.append(decode(model, x_T, alpha_bar, S, 0.0, args.spacing).cpu())
            seconds = time.perf_counter() - start
            print(f"{S:5} steps: {seconds:8.2f} s for {len(x_T)} images, {len(x_T) / seconds:9.1f} images/s")
        if rows:
            save_grid(args.out / "compare.png", torch.cat([row[:10] for row in rows]), 10)
        print(f"{args.samples} samples, {args.steps} steps each, {rate:.1f} images/s: samples.png and samples.npy in "
              f"{args.out}, with slerp.png, reconstructions.png (first row real){', compare.png' * bool(rows)}")

if __name__ == "__main__":
    main()
