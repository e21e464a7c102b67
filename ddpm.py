# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""DDPM: an image model that learns to take away a little noise, and then does so a thousand times.

Paper: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020, arXiv:2006.11239. [12] is its equation 12.

symbol         in the code    what it is
x_0            x_0            images, (N, C, H, W), -1 .. 1: the byte k is 2 k / 255 - 1
x_t            x_t            the same images after t steps of noise; x_T is almost pure noise
t              t              the step, an int or (N,) ints: 0 .. T-1 in the code for the paper's 1 .. T
beta_t         s.beta         variance that step t adds, (T,), 1e-4 to 0.02 in a straight line; alpha_t = 1 - beta_t
alpha_bar_t    s.alpha_bar    alpha_1 alpha_2 ... alpha_t, what is left of x_0's variance: (T,), from 0.9999 to 4e-5
beta~_t        s.beta_tilde   variance of the posterior (3), (T,); the first is 0
eps            eps            the noise in x_t, (N, C, H, W), N(0, I)
eps_theta      model(x_t, t)  the network's guess of eps, (N, C, H, W)
sigma_t^2      variance       of a step back: "large" is beta_t, "small" is beta~_t

Forward. Noise is added step by step, with nothing to learn. Sums of Gaussians are Gaussian, so t steps are one:
  (1) q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)                                                       [2]
  (2) x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps                                                        [4]
Backward, if x_0 were known. By Bayes' rule it is q(x_t | x_{t-1}) q(x_{t-1} | x_0) up to a factor, a Gaussian again:
  (3) q(x_{t-1} | x_t, x_0) = N(mu~_t, beta~_t I) with
      mu~_t = (sqrt(alpha_bar_{t-1}) beta_t x_0 + sqrt(alpha_t) (1 - alpha_bar_{t-1}) x_t) / (1 - alpha_bar_t)
      beta~_t = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)                                                  [6, 7]
The model p(x_{t-1} | x_t) = N(mu_theta, sigma_t^2 I) has to do without x_0. Jensen's inequality,
-log p(x_0) = -log E_q[p(x_0:T) / q(x_1:T | x_0)] <= E_q[-log(p(x_0:T) / q(x_1:T | x_0))], and (3) give the bound
  (4) -log p(x_0) <= L_T + sum_{t>1} L_{t-1} + L_0 = E_q[ KL(q(x_T | x_0) || N(0, I))
      + sum_{t>1} KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) - log p(x_0 | x_1) ]                                 [5]
  (5) KL(N(m, v I) || N(m', v' I)) = 1/2 sum_pixels ( v / v' - 1 + log(v' / v) + (m - m')^2 / v' )
so mu_theta should be near mu~_t. It is mu~_t with a guess of x_0, which follows by (2) from a guess of the noise:
  (6) x_0 ~ (x_t - sqrt(1 - alpha_bar_t) eps_theta(x_t, t)) / sqrt(alpha_bar_t);   mu_theta = mu~_t(x_t, that x_0)  [11]
So L_{t-1} = constant + w_t E ||eps - eps_theta||^2 with w_t = beta_t^2/(2 sigma_t^2 alpha_t (1 - alpha_bar_t)) [12].
w_t is largest for the faintest noise, which matters least to the eye. Without w_t:
  (7) L_simple = E_{t, x_0, eps} || eps - eps_theta(x_t, t) ||^2 with x_t from (2), t uniform on 1 .. T             [14]
Sampling starts at x_T ~ N(0, I) and goes back, t = T .. 1; the last step adds no noise, for nothing takes it out again:
  (8) x_{t-1} = mu_theta(x_t, t) + sigma_t z,  z ~ N(0, I) for t > 1, z = 0 for t = 1                      [Algorithm 2]
Pictures are made of bytes. For L_0 to be their probability, the last Gaussian is integrated over each byte's bin:
  (9) log p(x_0|x_1) = sum_pixels log(Phi((x_0 + 1/255 - mu_theta) / sigma_1) - Phi((x_0 - 1/255 - mu_theta) / sigma_1))
      where the bins of bytes 0 and 255 reach to infinity, and sigma_1^2 is beta~_2, as in their code  [13]

Trip wires: time runs 0 = picture, T = noise. beta is a variance, not a deviation. alpha_bar, not alpha, stands in (2).
The guess of x_0 is cut to -1 .. 1 inside (6), as in the authors' code, unless clip=False. The loss of the code is (7)
divided by D = C H W, a mean over pixels. Bits/dim = nats / (D ln 2).
Differs from the paper in: a small network without dropout or attention; small t are drawn more often, with weights that
leave the mean (7) as it is and lower its variance; the average of the weights remembers little at first; the learning
rate falls to zero.

python ddpm.py --data mnist --samples 2000      168 s of training and 441 s of sampling on two cores; fd 30.0
python ddpm.py --variance small                 the same model with the other sigma_t^2; seconds for 64 samples
"""
import argparse, contextlib, copy, gzip, hashlib, http.client, inspect, io, itertools, math, os, sys, time
import urllib.request, warnings, zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

# --------------------------------------------------------------------------------------------------------- method -----
class Schedule(NamedTuple):
    """The coefficients of every step, each (T,). They are made in float64 and used as float32."""
    beta: torch.Tensor
    alpha_bar: torch.Tensor
    beta_tilde: torch.Tensor
    x_0_share: torch.Tensor  # mu~ = x_0_share x_0 + x_t_share x_t
    x_t_share: torch.Tensor
    signal: torch.Tensor  # sqrt(alpha_bar)
    noise: torch.Tensor  # sqrt(1 - alpha_bar)

    def to(self, device):
        return Schedule(*(table.float().to(device) for table in self))

def make_schedule(T=1000, beta_1=1e-4, beta_T=0.02):
    """The paper's linear schedule in float64; .to(device) gives the float32 tables that the functions below take."""
    beta = torch.linspace(beta_1, beta_T, T, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, 0)  # t times (1)
    before = F.pad(alpha_bar[:-1], (1, 0), value=1.0)  # alpha_bar_{t-1}, which is 1 before the first step
    beta_tilde = beta * (1 - before) / (1 - alpha_bar)  # (3)
    x_0_share = before.sqrt() * beta / (1 - alpha_bar)  # (3)
    x_t_share = (1 - beta).sqrt() * (1 - before) / (1 - alpha_bar)  # (3)
    return Schedule(beta, alpha_bar, beta_tilde, x_0_share, x_t_share, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

def at(table, t, x):
    """Entries t of a (T,) table, shaped to multiply the images x. t: an int, or (N,) ints."""
    return table[t].view(-1, *[1] * (x.dim() - 1))

def q_sample(x_0, t, eps, s):
    """x_t from x_0 at once. t: an int or (N,) ints."""
    return at(s.signal, t, x_0) * x_0 + at(s.noise, t, x_0) * eps  # (2)

def loss_simple(model, x_0, t, eps, s):
    """The squared error of each image, the mean over its pixels -> (N,). t: (N,) ints."""
    return (model(q_sample(x_0, t, eps, s), t) - eps).square().flatten(1).mean(1)  # (7)

def draw_t(n, T, device="cpu"):
    """n steps, spread evenly, small t more often, and weights: E[weight f(t)] is the mean of f over 0 .. T-1."""
    a, b = 20**0.5, (T + 20) ** 0.5  # P(t) = (sqrt(t + 21) - sqrt(t + 20)) / (b - a)
    u = (torch.rand(1, device=device) + torch.arange(n, device=device) / n) % 1
    t = ((a + u * (b - a)) ** 2 - 20).long().clamp(0, T - 1)
    return t, (b - a) / T * ((t + 21).sqrt() + (t + 20).sqrt())

def q_mean(x_0, x_t, t, s):
    """mu~_t, the mean of the posterior."""
    return at(s.x_0_share, t, x_t) * x_0 + at(s.x_t_share, t, x_t) * x_t  # (3)

def p_mean(model, x_t, t, s, clip=True):
    """mu_theta(x_t, t), t an int."""
    eps_theta = model(x_t, torch.full((len(x_t),), t, device=x_t.device))
    x_0 = (x_t - at(s.noise, t, x_t) * eps_theta) / at(s.signal, t, x_t)  # (6)
    return q_mean(x_0.clamp(-1, 1) if clip else x_0, x_t, t, s)  # (6)

def p_step(model, x_t, t, z, s, variance="large", clip=True):
    """x_{t-1} from x_t and the normal z; t an int, variance "large" or "small"."""
    mean = p_mean(model, x_t, t, s, clip)
    return mean if t == 0 else mean + (s.beta if variance == "large" else s.beta_tilde)[t].sqrt() * z  # (8)

@torch.inference_mode()
def reverse(model, x_T, s, variance="large", clip=True, generator=None):
    """Yields (t, x) for t = T-1 .. 0: x is the paper's x_t, t steps of noise are left in it, and the last is x_0.

    They are inference tensors: .clone() one before training on it."""
    x_t = x_T
    for t in reversed(range(len(s.beta))):
        x_t = p_step(model, x_t, t, torch.randn(x_T.shape, generator=generator, device=x_T.device), s, variance, clip)
        yield t, x_t

def gauss_kl(mean, var, mean_theta, var_theta):
    """KL(N(mean, var) || N(mean_theta, var_theta)) in nats, summed over all but the first axis -> (N,)."""
    nats = var / var_theta - 1 + torch.log(var_theta / var) + (mean - mean_theta) ** 2 / var_theta
    return 0.5 * nats.flatten(1).sum(1)  # (5)

def log_decoder(x_0, mean, sigma):
    """log p(x_0 | x_1) in nats for pixels that are bytes -> (N,). In float64, for float32 loses the tails."""
    x, mean, sigma = (v.cpu().double() for v in (x_0, mean, sigma))
    low = torch.where(x < -0.999, -math.inf, (x - 1 / 255 - mean) / sigma)
    high = torch.where(x > 0.999, math.inf, (x + 1 / 255 - mean) / sigma)
    low, high = torch.where(low + high > 0, -high, low), torch.where(low + high > 0, -low, high)  # precise on the left
    mass = (torch.erfc(-high * 0.5**0.5) - torch.erfc(-low * 0.5**0.5)) / 2  # Phi(high) - Phi(low)
    return mass.clamp(min=1e-300).log().flatten(1).sum(1).to(x_0.dtype).to(x_0.device)  # (9)

@torch.inference_mode()
def bound(model, x_0, s, variance="large", clip=True, generator=None):
    """L_T, L_{1:T-1} and L_0 of (4) in bits/dim -> (N, 3), each expectation over x_t estimated by one draw."""
    bits, variances = x_0.new_zeros(len(x_0), 3), s.beta if variance == "large" else s.beta_tilde
    bits[:, 0] = gauss_kl(s.signal[-1] * x_0, 1 - s.alpha_bar[-1], torch.zeros_like(x_0), torch.ones_like(x_0))  # (4)
    for t in range(len(s.beta)):
        x_t = q_sample(x_0, t, torch.randn(x_0.shape, generator=generator, device=x_0.device), s)
        mean = p_mean(model, x_t, t, s, clip)
        if t == 0:
            bits[:, 2] -= log_decoder(x_0, mean, s.beta_tilde[1].sqrt())  # (4) (9)
        else:
            bits[:, 1] += gauss_kl(q_mean(x_0, x_t, t, s), s.beta_tilde[t], mean, variances[t])  # (4)
    return bits / (x_0[0].numel() * math.log(2))

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
        done, log = resume(path, parts, load_checkpoint(path, ["ddpm"], device, wanted))
    net, s, images = torch.compile(model) if compiled else model, make_schedule().to(device), images.to(device)
    if world > 1:
        net, path = nn.parallel.DistributedDataParallel(net), None if rank else path
    progress, total, saved = Progress("iteration", "images", iters, done), torch.zeros((), device=device), time.time()
    for i in range(done, iters):
        opt.param_groups[0]["lr"] = lr * min((i + 1) / 200, 1 - i / iters)
        x_0 = images[torch.randint(len(images), (batch,), device=device)].float() / 127.5 - 1
        t, weight = draw_t(batch, len(s.beta), device)
        x_0, t, weight, eps = (v[rank::world] for v in (x_0, t, weight, torch.randn_like(x_0)))
        loss = (weight * loss_simple(net, x_0, t, eps, s)).mean()
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
                save_checkpoint(path, "ddpm", wanted, parts, i + 1, log)
                saved = time.time()
        progress(i + 1, batch, f"loss {log[-1][1]:.4f}" if log else "")
    return average

def load(path, device="cpu"):
    """The averaged model of a checkpoint, ready to sample; model.shape is the (C, H, W) of its images."""
    state = load_checkpoint(Path(path), ["ddpm"], device)
    with or_say(f"{path}: {DAMAGED}"):
        model = UNet(*(state["settings"][name] for name in ("channels", "size", "width")))
        model.load_state_dict(state["parts"][1])
    return model.to(device, memory_format=layout(device)).requires_grad_(False).eval()

def sample(model, shape, variance="large", clip=True, seed=0, device="cpu", chunk=100):
    """Images of the shape (N, C, H, W), values about -1 .. 1, drawn chunk by chunk."""
    s, generator, images = make_schedule().to(device), torch.Generator(device).manual_seed(seed), []
    progress = Progress("image steps", "images", len(s.beta) * shape[0])
    for i in range(0, shape[0], chunk):
        x_T = torch.randn(min(chunk, shape[0] - i), *shape[1:], generator=generator, device=device)
        for t, x in reverse(model, x_T, s, variance, clip, generator):
            progress(len(s.beta) * (i + len(x)) - t * len(x), 1 / len(s.beta))
        images.append(x)
    return torch.cat(images)

def main(argv=None):
    parser = image_parser(__doc__, "ddpm", train)
    parser.add_argument("--width", type=at_least(1), default=32, help="channels at half the side; the paper had 128")
    parser.add_argument("--variance", choices=("large", "small"), default="large", help="sigma_t^2: beta_t or beta~_t")
    parser.add_argument("--bound", type=at_least(0), default=32, help="test images for the bound, 0 for none")
    args = parser.parse_args(argv)
    with parser.guard():
        rank, _ = processes(args.device, args.batch)
        device, path = pick_device(args.device), args.out / "model.pt"
        images, held_out = (load_images(args.data, args.size, args.channels, test) for test in (False, True))
        print(f"{len(images)} images of {args.size}x{args.size}x{args.channels} from {args.data}, on {device}")
        train(images, args.iters, args.batch, args.lr, args.width, device, args.seed, path, args.fresh, args.compile)
        if rank:
            return  # the first process goes on alone
        model, s = load(path, device), make_schedule().to(device)
        save_samples(args.out, sample(model, (args.samples, *model.shape), args.variance, True, args.seed, device))
        generator = torch.Generator(device).manual_seed(args.seed)
        x_T = torch.randn(8, *model.shape, generator=generator, device=device)
        steps = [x for t, x in reverse(model, x_T, s, args.variance, True, generator)][::-1]  # [t] is the paper's x_t
        strip = [x_T] + [steps[t] for t in (800, 600, 400, 300, 200, 150, 100, 50, 0)]
        save_grid(args.out / "strip.png", torch.stack(strip, 1).flatten(0, 1), len(strip))
        if args.bound:
            x_0 = to_float(held_out[: args.bound].to(device))
            bits = bound(model, x_0, s, args.variance, True, generator)
            mean, error = bits.sum(1).mean(), bits.sum(1).std(correction=0) / len(bits) ** 0.5
            print(f"bound on {len(bits)} test images: {mean:.3f} +- {error:.3f} bits/dim = "
                  "L_T {:.5f} + L_1:T-1 {:.3f} + L_0 {:.3f}".format(*bits.mean(0).tolist()))
        print(f"{args.samples} samples: samples.png, samples.npy in {args.out}, with strip.png, log.csv, model.pt")

if __name__ == "__main__":
    main()
