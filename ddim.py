# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""Denoising diffusion implicit models (DDIM): sample a diffusion model in 50 deterministic steps.

A network is trained exactly as in DDPM. Only sampling changes: it takes any number of steps, adds
no noise, and can be run backwards, from an image to the noise that generates it.

Paper: Song, Meng, Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, arXiv:2010.02502.
Numbers in brackets at the right, such as [12], are the paper's equations. The paper writes α_t for
what DDPM, and this file, call ᾱ_t.

symbol        in the code     meaning
x_0           x_0             images, (N, C, H, W), scaled to -1 .. 1
x_t           x_t             the same images with noise; the noisiest, x_T, is almost N(0, I)
t             t               time step, 0 .. T-1 in the code for the paper's 1 .. T, T = 1000
p             p               the next, less noisy time step of sampling, p < t; -1 means no noise
ᾱ_t           alpha_bar[t]    product of DDPM's 1 - β up to t, 0.9999 down to 0.00004; 1 for p = -1
ε_θ(x_t, t)   model(x_t, t)   the network's estimate of the noise in x_t, (N, C, H, W)
x̂_0           x_0             the estimate of x_0 that follows from it, then clipped to -1 .. 1
ε, z          eps, z          standard normal noise: ε is in x_t, z is added by a step
σ             sigma           standard deviation of the noise that a step adds
η             eta             scales σ, from 0 (DDIM) to 1 (DDPM)
τ             tau             the S time steps visited in sampling, τ_1 < ... < τ_S = T-1

Training. DDPM adds Gaussian noise to an image,

  (1)  q(x_t | x_0) = N(√ᾱ_t x_0, (1 - ᾱ_t) I),  so  x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε,  ε ~ N(0, I) [4]

and trains a network to estimate that noise:

  (2)  L = 𝔼 ‖ε - ε_θ(x_t, t)‖²,  t uniform, x_t from (1)                           [5], γ_t = 1 / T

Many processes, one network. The loss depends on the forward process only through the marginals (1),
and many processes share them. For any p < t and any σ with 0 ≤ σ² ≤ 1 - ᾱ_p, define

  (3)  q(x_p | x_t, x_0) = N(√ᾱ_p x_0 + √(1 - ᾱ_p - σ²) ε, σ² I),
       where ε = (x_t - √ᾱ_t x_0) / √(1 - ᾱ_t) is the noise in x_t                              [7]

If x_t follows (1), ε is N(0, I). Then x_p has mean √ᾱ_p x_0 and variance (1 - ᾱ_p - σ²) + σ², so it
follows (1) for p [Lemma 1]. For σ > 0 the variational bound of each of these processes is (2) with
other weights for each t, plus a constant [Theorem 1]. A network that can fit each t independently
has the same optimum whatever the weights, so one trained network serves them all.

Sampling replaces x_0 in (3) by the network's estimate:

  (4)  x̂_0 = (x_t - √(1 - ᾱ_t) ε_θ(x_t, t)) / √ᾱ_t                                             [9]

  (5)  x_p = √ᾱ_p x̂_0 + √(1 - ᾱ_p - σ²) ε_θ(x_t, t) + σ z,  z ~ N(0, I)                       [12]

  (6)  σ = η √((1 - ᾱ_p) / (1 - ᾱ_t)) √(1 - ᾱ_t / ᾱ_p)                                         [16]

With η = 1 and p = t - 1, (3) is DDPM's posterior, and (5) is DDPM with the small variance. With
η = 0 no noise is added: the image is a function of x_T. The time steps visited are, for i = 1 .. S,

  (7)  τ_i = max(⌈T (i / S)^n⌉, i) - 1,  n = 1 (linear) or 2 (quad)

Sampling always starts at T-1; the max keeps quadratic steps distinct. After τ_1 comes p = -1.

An ordinary differential equation. With η = 0, divide (5) by √ᾱ_p and insert (4). In terms of
y = x / √ᾱ and the noise-to-signal ratio r = √((1 - ᾱ) / ᾱ), what remains is

  (8)  y_p = y_t + (r_p - r_t) ε_θ(x_t, t)                                                     [13]

This is Euler's method for dy = ε_θ dr [14]. Run with r increasing, from p to t, it encodes: it maps
an image to the x_T that generates it. At p = -1, the image itself, the network is asked at t = 0.

Interpolation. Gaussian noise concentrates near a sphere, so one moves from x to y along a great
circle. With θ the angle between x and y,

  (9)  slerp(x, y, a) = (sin((1 - a) θ) x + sin(a θ) y) / sin θ                          [appendix]

Pitfalls:
- In the last step ᾱ_p is 1, not ᾱ_0: the last image has no noise.
- If x̂_0 is clipped to -1 .. 1, ε must follow from the clipped x̂_0. Break it: delete the line
  tagged (3) and test_ddim_eq3_noise_follows_the_clipped_image fails.
- The code's loss is (2) divided by C H W, a mean over pixels.

Differences from the paper:
- Sampling starts at T-1. The authors' code starts at t = 980 for S = 50, and at t = 800 for quad.
- x̂_0 is clipped unless clip=False; their DDIM sampler does not clip. Their σ̂, the last row of
  table 1, is left out.
- The network is small. Small t are sampled more often in training, reweighted so that the expected
  loss is still (2). The EMA decay is warmed up, and the learning rate decays to zero.

python ddim.py --data mnist --samples 2000    trains in 3 minutes on two cores; samples in 22 s
python ddim.py --steps 20                     samples the trained model again, in 20 steps
"""

import argparse
import copy
import gzip
import hashlib
import io
import math
import os
import re
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps


# ---------------------------------------------------------------------------------------- method: the loss ------------
def make_alpha_bar(T=1000, beta_1=1e-4, beta_T=0.02):
    """ᾱ of DDPM's linear schedule, (T,) float64."""
    return torch.cumprod(1 - torch.linspace(beta_1, beta_T, T, dtype=torch.float64), 0)


def noise_tables(alpha_bar, device="cpu"):
    """√ᾱ and √(1 - ᾱ), (T,) each, computed in float64 and returned in float32."""
    return alpha_bar.sqrt().float().to(device), (1 - alpha_bar).sqrt().float().to(device)


def loss_gamma(model, x_0, t, eps, tables):
    """The mean squared error of each image -> (N,). x_0, eps: (N, C, H, W); t: (N,) ints; tables: of noise_tables()."""
    signal, noise = (table[t].view(-1, 1, 1, 1) for table in tables)
    x_t = signal * x_0 + noise * eps  # (1)
    return (eps - model(x_t, t)).square().flatten(1).mean(1)  # (2)


# ------------------------------------------------------------------------------------------------- network ------------
# Any f(x, t) that maps (N, C, H, W) and (N,) to (N, C, H, W) would do. This one is a small U-Net.
class Block(nn.Module):
    """Residual block. The time embedding e scales and shifts the features between its convolutions."""

    def __init__(self, c_in, c_out, c_time):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.time = nn.Linear(c_time, 2 * c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # at first little is added to the skip connection

    def forward(self, x, e):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(e)[:, :, None, None].chunk(2, dim=1)  # (N, c_out, 1, 1) each
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.skip(x) + self.conv2(F.silu(h))


class UNet(nn.Module):
    """Maps x (N, channels, size, size) and t (N,), in 0 .. t_max, to (N, channels, size, size).

    pixel_unshuffle folds 2x2 pixels into channels, so the network works at half the resolution.
    ValueError unless size is a multiple of 4, and width of 8."""

    def __init__(self, channels=1, size=28, width=32, t_max=1000):
        super().__init__()
        if size % 4 or width % 8:
            raise ValueError(f"--size {size} --width {width}: size must be a multiple of 4, and width of 8")
        self.shape = (channels, size, size)
        w = width
        c_time = 4 * width
        self.register_buffer("frequencies", torch.logspace(0, 3, w) / t_max, persistent=False)
        self.time = nn.Sequential(nn.Linear(2 * w, c_time), nn.SiLU(), nn.Linear(c_time, c_time), nn.SiLU())
        self.stem = nn.Conv2d(4 * channels, w, 3, padding=1)
        self.head = nn.Conv2d(w, 4 * channels, 3, padding=1)
        self.down = nn.ModuleList([Block(w, w, c_time), Block(w, w, c_time)])
        self.downsample = nn.Conv2d(w, 2 * w, 3, stride=2, padding=1)
        self.upsample = nn.Conv2d(2 * w, w, 1)
        self.mid = nn.ModuleList([Block(2 * w, 2 * w, c_time) for _ in range(3)])
        self.up = nn.ModuleList([Block(2 * w, w, c_time), Block(w, w, c_time)])
        self.norm = nn.GroupNorm(8, w)
        self.gate = nn.Linear(c_time, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.gate.weight)

    def forward(self, x, t):
        angle = t[:, None] * self.frequencies
        e = self.time(torch.cat([angle.sin(), angle.cos()], dim=1))  # (N, c_time)
        h = self.stem(F.pixel_unshuffle(x, 2))  # (N, w, size/2, size/2)
        for block in self.down:
            h = block(h, e)
        skip = h
        h = self.downsample(h)  # (N, 2 w, size/4, size/4)
        for block in self.mid:
            h = block(h, e)
        h = F.interpolate(self.upsample(h), scale_factor=2.0)  # (N, w, size/2, size/2)
        h = torch.cat([h, skip], dim=1)  # (N, 2 w, size/2, size/2)
        for block in self.up:
            h = block(h, e)
        h = F.pixel_shuffle(self.head(F.silu(self.norm(h))), 2)  # (N, channels, size, size)
        a, b = self.gate(e)[:, :, None, None].chunk(2, dim=1)  # (N, 1, 1, 1) each
        return (1 + a) * h + b * x  # at high noise the answer is almost x itself, at low noise it is not


# ------------------------------------------------------------------------------------------------ training ------------
def draw_t(n, T, device="cpu"):
    """n time steps, small ones more often, and weights: 𝔼[weight f(t)] is the mean of f over 0 .. T-1.

    Small t have the larger gradients. P(t) ∝ √(t + 21) - √(t + 20), with one sample in each n-th of the distribution,
    reduces the variance of the gradient to a third of that of uniform t."""
    low, high = 20**0.5, (T + 20) ** 0.5
    u = (torch.rand(1, device=device) + torch.arange(n, device=device) / n) % 1
    t = ((low + u * (high - low)) ** 2 - 20).long().clamp(0, T - 1)
    weight = (high - low) / T * ((t + 21).sqrt() + (t + 20).sqrt())  # 1 / (T P(t))
    return t, weight


def train(images, iters=5400, batch=32, lr=5e-3, width=32, device="cpu", seed=0, path=None, fresh=False, data=None):
    """Trains on uint8 images (N, C, H, H) and returns the EMA model. Seeds torch's global generator.

    path: the checkpoint, resumed unless fresh; data: the name of the data, stored in it.
    ValueError if the checkpoint has other settings, FloatingPointError if the loss is not finite."""
    settings = dict(method="ddim", data=data, width=width, iters=iters, batch=batch, lr=lr, seed=seed)
    settings |= image_settings(images)
    rank, world = processes(device, batch)
    torch.manual_seed(seed)
    model = UNet(settings["channels"], settings["size"], width).to(device)
    if torch.device(device).type == "cpu":
        model = model.to(memory_format=torch.channels_last)  # 1.16 times as fast on an AMD EPYC
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    opt = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99))
    inputs = torch.zeros(batch, *model.shape, device=device), torch.zeros(batch, dtype=torch.long, device=device)
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else graphed(model, *inputs)
    images = images.to(device)
    tables = noise_tables(make_alpha_bar(), device)
    mine = slice(rank, None, world)  # each process trains on its share of the batch
    losses = []

    for i in iterations(iters, losses, dict(model=model, ema=ema, opt=opt), settings, path, fresh):
        opt.param_groups[0]["lr"] = lr * min((i + 1) / 200, 1 - i / iters)  # warm-up, then linear decay
        x_0 = images[torch.randint(len(images), (batch,), device=device)].float() / 127.5 - 1
        t, weight = draw_t(batch, len(tables[0]), device)
        eps = torch.randn_like(x_0)
        loss = (weight[mine] * loss_gamma(net, x_0[mine], t[mine], eps[mine], tables)).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        update_ema(ema, model, decay=min(0.995, (1 + i) / (10 + i)))
        losses.append(loss.detach())
    return ema


# ------------------------------------------------------------------------------------- method: the sampler ------------
def alpha_bar_at(alpha_bar, t):
    """ᾱ_t as a float; 1 for t = -1."""
    return 1.0 if t == -1 else alpha_bar[t].item()


def estimate(model, x_t, t, alpha_bar):
    """The network's estimates of x_0 and of the noise in x_t, at time step t, an int."""
    a_t = alpha_bar_at(alpha_bar, t)
    eps = model(x_t, torch.full((len(x_t),), t, device=x_t.device))
    x_0 = (x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5  # (4)
    return x_0, eps


def step(model, x_t, t, p, alpha_bar, eta=0.0, z=None, clip=True):
    """x_p from x_t, for ints t > p >= -1. z: standard normal, like x_t, needed if eta > 0.

    clip: whether the estimate of x_0 is clipped to -1 .. 1. ValueError unless 0 <= eta <= 1."""
    if not 0 <= eta <= 1:
        raise ValueError(f"--eta {eta}: must be from 0 to 1")
    a_t = alpha_bar_at(alpha_bar, t)
    a_p = alpha_bar_at(alpha_bar, p)
    x_0, eps = estimate(model, x_t, t, alpha_bar)
    if clip:
        x_0 = x_0.clamp(-1, 1)
        eps = (x_t - a_t**0.5 * x_0) / (1 - a_t) ** 0.5  # (3)

    sigma = eta * ((1 - a_p) / (1 - a_t)) ** 0.5 * (1 - a_t / a_p) ** 0.5  # (6)
    variance = max(1 - a_p - sigma**2, 0.0)  # rounding may make it -1e-17
    x_p = a_p**0.5 * x_0 + variance**0.5 * eps  # (5)
    return x_p + sigma * z if sigma > 0 else x_p


def make_tau(T, S, spacing="linear"):
    """The S steps of sampling as pairs (t, p), the noisiest first; the last p is -1. ValueError unless 1 <= S <= T."""
    if not 1 <= S <= T:
        raise ValueError(f"steps must be from 1 to {T}, the number that the model was trained for, not {S}")
    if spacing not in ("linear", "quad"):
        raise ValueError(f"spacing must be linear or quad, not {spacing}")
    n = 1 if spacing == "linear" else 2
    tau = [max(math.ceil(T * i**n / S**n), i) - 1 for i in range(1, S + 1)]  # (7)
    pairs = list(zip(tau, [-1] + tau))
    return pairs[::-1]


@torch.inference_mode()
def decode(model, x_T, alpha_bar, steps=50, eta=0.0, spacing="linear", clip=True, generator=None):
    """Images from x_T, both (N, C, H, W). With eta = 0 they depend on x_T alone, else also on the generator."""
    x = x_T
    for t, p in make_tau(len(alpha_bar), steps, spacing):
        z = torch.randn(x.shape, generator=generator, device=x.device) if eta else None
        x = step(model, x, t, p, alpha_bar, eta, z, clip)
    return x


@torch.inference_mode()
def encode(model, x_0, alpha_bar, steps=50, spacing="linear"):
    """The x_T that decode(..., clip=False) maps to the images x_0. The error shrinks as the steps grow."""
    x = x_0
    for t, p in reversed(make_tau(len(alpha_bar), steps, spacing)):
        a_p = alpha_bar_at(alpha_bar, p)
        a_t = alpha_bar_at(alpha_bar, t)
        r_p = ((1 - a_p) / a_p) ** 0.5
        r_t = ((1 - a_t) / a_t) ** 0.5
        _, eps = estimate(model, x, max(p, 0), alpha_bar)
        y = x / a_p**0.5 + (r_t - r_p) * eps  # (8)
        x = a_t**0.5 * y
    return x


def slerp(x, y, a):
    """Spherical interpolation between two latents of one shape, from x (a = 0) to y (a = 1)."""
    cos = F.cosine_similarity(x.flatten(), y.flatten(), dim=0)
    theta = torch.arccos(cos.clamp(-1, 1))
    if theta.sin() < 1e-4:  # parallel or opposite: the great circle is not unique
        return torch.lerp(x, y, a)
    return (torch.sin((1 - a) * theta) * x + torch.sin(a * theta) * y) / torch.sin(theta)  # (9)


def sample(model, n, steps=50, eta=0.0, spacing="linear", clip=True, seed=0, chunk=100):
    """n images, (n, C, H, W), roughly in -1 .. 1, on the CPU. They are sampled in chunks."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    images = []
    for i in progress(range(0, n, chunk), f"sampling in {steps} steps, image"):
        x_T = torch.randn(min(chunk, n - i), *model.shape, generator=generator, device=device)
        x = decode(model, x_T, make_alpha_bar(), steps, eta, spacing, clip, generator)
        images.append(x.cpu())
    return torch.cat(images)


# ------------------------------------------------------------------------------------------------- command ------------
def load(path, device="cpu"):
    """The EMA model in a checkpoint of ddim.py or ddpm.py. Its images have the shape model.shape, (C, H, W)."""
    settings = load_checkpoint(path, "ddim", "ddpm")["settings"]
    model = UNet(settings["channels"], settings["size"], settings["width"])
    load_checkpoint(path, ema=model)
    return model.to(device).requires_grad_(False).eval()


def draw_interpolations(path, model, x_T, steps, spacing):
    """Saves six rows of ten images, each row from one latent to another along a great circle."""
    latents = []
    for x, y in zip(x_T[0:12:2], x_T[1:12:2]):
        latents += [slerp(x, y, a) for a in torch.linspace(0, 1, 10).tolist()]
    images = decode(model, torch.stack(latents), make_alpha_bar(), steps, spacing=spacing)
    save_grid(path, images, columns=10)


def draw_film(path, model, x_T, steps, spacing):
    """Saves a film of sixteen latents that become images, about a dozen of the steps."""
    states = []

    def recorded(x_t, t):
        states.append(x_t)
        return model(x_t, t)

    x_0 = decode(recorded, x_T[:16], make_alpha_bar(), steps, spacing=spacing)
    save_gif(path, [*states[:: math.ceil(steps / 12)], x_0])


def draw_reconstructions(path, model, x_0, spacing):
    """Saves images and, below them, a row of reconstructions for each number of steps, and prints the errors."""
    alpha_bar = make_alpha_bar()
    rows = [x_0]
    for steps in (10, 20, 50, 100, 200):
        x_T = encode(model, x_0, alpha_bar, steps, spacing)
        rows.append(decode(model, x_T, alpha_bar, steps, spacing=spacing, clip=False))
        error = F.mse_loss(rows[-1], x_0).item() / 4  # of pixels in 0 .. 1
        print(f"encoded and decoded in {steps} steps each: mean squared error {error:.5f}")
    save_grid(path, torch.cat(rows), columns=len(x_0))


def draw_comparison(path, model, x_T, all_steps, spacing):
    """Saves the images of the same latents, a row for each number of steps, and prints the times."""
    rows = []
    for steps in all_steps:
        start = time.perf_counter()
        x = decode(model, x_T, make_alpha_bar(), steps, spacing=spacing).cpu()
        seconds = time.perf_counter() - start
        print(f"{steps:5} steps: {seconds:8.2f} s for {len(x)} images, {len(x) / seconds:9.1f} images/s")
        rows.append(x[:10])
    save_grid(path, torch.cat(rows), columns=10)


def int_list(text):
    """An argparse type: integers separated by commas."""
    return [int(word) for word in text.split(",")]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", default="digits", help="digits (drawn), mnist (downloaded), or a folder: IDX files or pictures")
    add("--size", type=positive, default=28, help="side of the images in pixels")
    add("--channels", type=int, choices=(1, 3), default=1, help="1 for grey, 3 for colour")
    add("--iters", type=positive, default=5400, help="training iterations")
    add("--batch", type=positive, default=32, help="batch size")
    add("--lr", type=float, default=5e-3, help="peak learning rate")
    add("--width", type=positive, default=32, help="channels of the network at half the resolution")
    add("--samples", type=positive, default=64, help="number of images to sample")
    add("--steps", type=positive, default=50, help="S, the number of sampling steps")
    add("--eta", type=float, default=0.0, help="noise added in samples.png, from 0 (DDIM) to 1 (DDPM)")
    add("--spacing", choices=("linear", "quad"), default="linear", help="spacing of the time steps")
    add("--compare", type=int_list, default=[], help="10,20,50 samples the same latents in 10, 20 and 50 steps")
    add("--model", type=Path, help="a checkpoint of ddpm.py or ddim.py to sample, instead of training")
    add("--out", type=Path, default=Path("out/ddim"), help="run folder")
    add("--device", type=pick_device, default=pick_device(), help="where to compute")
    add("--seed", type=int, default=0, help="seed; on a CPU the same seed gives the same bits")
    add("--fresh", action="store_true", help="train from scratch over the checkpoint in --out")
    args = parse_args(parser, argv)
    if args.model:
        args = parse_args(parser, argv, args.model)
    if not 0 <= args.eta <= 1:
        raise ValueError(f"--eta {args.eta}: must be from 0 to 1")
    for steps in [args.steps, *args.compare]:
        make_tau(1000, steps)  # refuses a wrong number before training

    rank, _ = processes(args.device, args.batch)
    if not args.model:
        images = load_images(args.data, args.size, args.channels)
        print(f"{len(images)} images of {args.size}x{args.size}x{args.channels} from {args.data}, on {args.device}")
    test_images = load_images(args.data, args.size, args.channels, test=True)[:16]
    if args.model:
        model = load(args.model, args.device)
    else:
        settings = args.iters, args.batch, args.lr, args.width, args.device, args.seed
        model = train(images, *settings, args.out / "model.pt", args.fresh, args.data)
    if rank:
        return  # only the first process samples

    x = sample(model, args.samples, args.steps, args.eta, args.spacing, seed=args.seed)
    save_samples(args.out, x)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    x_T = torch.randn(32, *model.shape, generator=generator, device=args.device)
    draw_film(args.out / "samples.gif", model, x_T, args.steps, args.spacing)
    draw_interpolations(args.out / "slerp.png", model, x_T, args.steps, args.spacing)
    x_0 = test_images.to(args.device).float() / 127.5 - 1
    draw_reconstructions(args.out / "reconstructions.png", model, x_0, args.spacing)
    if args.compare:
        draw_comparison(args.out / "compare.png", model, x_T, args.compare, args.spacing)
    print(
        f"{args.samples} samples in {args.steps} steps each: {args.out}/samples.png, samples.gif, samples.npy, "
        f"slerp.png, reconstructions.png (first row: test images){', compare.png' * bool(args.compare)}"
    )


# ------------------------------------------------------------------------------------------------ plumbing ------------
# Data, pictures, checkpoints, progress: the same text in every file, and nothing of the method. You may stop here.
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_SHA256 = {"train": "440fcabf73cc546fa21475e81ea37026", "t10k": "8d422c7b0a1c1c79245a5bcf07fe86e3"}  # first half
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def draw_digits(n, size=28, seed=0):
    """n digits, uint8 (n, 1, size, size): image i shows i % 10, in one of four stroke widths, distorted at random."""
    generator = torch.Generator().manual_seed(seed)
    glyphs = torch.empty(40, 1, 2 * size, 2 * size)
    for k in range(40):
        tile = Image.new("L", (112, 112))
        font = ImageFont.load_default(90)
        ImageDraw.Draw(tile).text((56, 56), str(k % 10), 255, font, "mm", stroke_width=k // 10)
        glyphs[k, 0] = torch.from_numpy(np.array(tile.resize((2 * size, 2 * size))))
    kinds = torch.arange(n) % 10 + 10 * torch.randint(4, (n,), generator=generator)
    noise = 2 * torch.rand(n, 2, 3, generator=generator) - 1
    maps = torch.eye(2, 3) + torch.tensor([0.12, 0.12, 0.06]) * noise
    images = []
    for i in torch.arange(n).split(1000):
        grid = F.affine_grid(maps[i], (len(i), 1, size, size), align_corners=False)
        images.append(F.grid_sample(glyphs[kinds[i]], grid, align_corners=False).round().byte())
    return torch.cat(images)


def download_mnist(name, sha256):
    """The path of one of MNIST's files in data/mnist. It is downloaded once; OSError if that fails."""
    path = Path("data/mnist", name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(MNIST_URL + name, path, sha256)
        except Exception as e:  # no network, a broken connection, a wrong hash: each has an error of its own
            raise OSError(f"{MNIST_URL}{name}: {e}; --data digits needs no network") from e
    return path


def list_files(folder):
    """The files below a folder, sorted, without hidden ones such as ._photo.jpg or those in .ipynb_checkpoints."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return [path for path in paths if not any(name[0] == "." for name in path.relative_to(folder).parts)]


def list_pictures(folder, test):
    """The pictures below a folder: every tenth for the test, the others for training. A single one is in both."""
    paths = [path for path in list_files(folder) if path.suffix.lower() in PICTURES]
    test_paths = set(paths[9::10] or paths[-1:])
    return [path for path in paths if (path in test_paths) == test] or paths


def find_idx(folder, kind, test):
    """The IDX file of "images" or "labels" under any of its usual names, or None. ValueError if several differ."""
    name = rf"(.+-)?{'(t10k|test)' if test else 'train'}-{kind}[-.]idx\d-(ubyte|int)(\.gz)?"
    paths = [path for path in list_files(folder) if re.fullmatch(name, path.name)]
    if len({read_bytes(path) for path in paths}) > 1:
        raise ValueError(f"--data {folder}: several data sets, {' and '.join(map(str, paths))}; give the folder of one")
    return paths[0] if paths else None


def read_bytes(path):
    """What is in a file, gzipped or not. ValueError if it is damaged."""
    raw = path.read_bytes()
    try:
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except Exception as e:  # libraries raise many types, and most do not name the file
        raise ValueError(f"{path}: {e}") from e


def read_idx(path):
    """The images in an IDX file, uint8 (N, H, W). ValueError if it holds something else or nothing, or is truncated."""
    raw = read_bytes(path)
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in (4, 8, 12)]
    if raw[:4] != b"\0\0\x08\3" or len(raw) != 16 + math.prod(shape) or len(raw) == 16:
        raise ValueError(f"{path}: not an IDX file of images, or truncated, or empty")
    return np.frombuffer(raw, np.uint8, offset=16).reshape(shape)


def read_picture(path, size, channels):
    """The centre square of a picture, scaled -> uint8 (channels, size, size). Transparent pixels become white."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
        if picture.mode[0] in "IF":  # 16 or 32 bits or floats, which Pillow would clip to 0 .. 255
            grey = np.array(picture, np.float64)
            sixteen = file.format == "PNG" or ";16" in picture.mode or grey.max() > 255
            top = 65535 if sixteen else 1 if picture.mode == "F" and grey.max() <= 1 else 255
            if not (grey.min() >= 0 and grey.max() <= top) or picture.mode == "F" and 1 < grey.max() < 2:
                raise ValueError(f"grey values from {grey.min()} to {grey.max()}")
            picture = Image.fromarray((grey / top * 255).round().astype(np.uint8))
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
        picture = ImageOps.fit(picture.convert("RGB" if channels == 3 else "L"), (size, size))
        return np.array(picture).reshape(size, size, channels).transpose(2, 0, 1)
    except Exception as e:  # libraries raise many types, and most do not name the file
        raise ValueError(f"{path}: not a picture that can be read ({e})") from e


def load_images(data, size=28, channels=1, test=False):
    """uint8 (N, channels, size, size): "digits", "mnist", a folder of IDX files, or one of pictures, every tenth for
    the test. ValueError or OSError, with the name of the file or folder, for what cannot be read."""
    if data == "digits":
        return draw_digits(10_000 if test else 60_000, size, seed=int(test)).expand(-1, channels, -1, -1)
    if data != "mnist" and not (data and Path(data).is_dir()):
        raise ValueError(f"--data {data}: no such folder")
    part = "t10k" if test else "train"
    if data == "mnist":
        idx = download_mnist(f"{part}-images-idx3-ubyte.gz", MNIST_SHA256[part])
    else:
        idx = find_idx(data, "images", test)
    if idx is not None:
        x = torch.tensor(read_idx(idx))[:, None]
        return F.interpolate(x, (size, size), mode="bilinear", antialias=True).expand(-1, channels, -1, -1)
    paths = list_pictures(data, test)
    if len(paths) == 0:
        raise ValueError(f"--data {data}: neither {part}-images-idx3-ubyte nor pictures in it")
    return torch.from_numpy(np.stack([read_picture(path, size, channels) for path in paths]))


def image_settings(images):
    """What a checkpoint remembers of its images. ValueError unless they are uint8 (N, C, H, H)."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[2] != images.shape[3] or not len(images):
        raise ValueError(f"images must be uint8 (N, C, H, H), square, not {images.dtype} {tuple(images.shape)}")
    sha256 = hashlib.sha256(images.cpu().contiguous().numpy()).hexdigest()
    return dict(channels=images.shape[1], size=images.shape[2], images=sha256)


def to_uint8(x):
    """float -1 .. 1 -> uint8 0 .. 255, on the CPU. Values outside are clipped."""
    return (x * 127.5 + 127.5).round().clamp(0, 255).to("cpu", torch.uint8)


def make_grid(x, columns=8):
    """Images in -1 .. 1, (N, C, H, W), as one picture, row by row. Small images are enlarged."""
    x = F.pad(to_uint8(x), (0, 2, 0, 2), value=96)  # lines between the images
    x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, -len(x) % columns), value=96)  # complete the last row
    x = x.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)  # (rows, H, columns, W, C)
    sheet = x.flatten(2, 3).flatten(0, 1)[:-2, :-2].squeeze(2)
    return ImageOps.scale(Image.fromarray(sheet.numpy()), max(1, 64 // x.shape[1]), Image.NEAREST)


def save_grid(path, x, columns=8):
    """Saves images in -1 .. 1, (N, C, H, W), as one PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    make_grid(x, columns).save(path)


def save_gif(path, frames):
    """Saves a film of frames in -1 .. 1, (N, C, H, W) each. It begins with the last, which a still picture shows."""
    pictures = [make_grid(x, columns=4).quantize(16) for x in [frames[-1], *frames]]
    seconds = [2.0, *[0.1] * len(frames)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[1000 * s for s in seconds], loop=0)


def save_samples(out, x):
    """Saves images in -1 .. 1, (N, C, H, W): all in samples.npy, uint8 (N, H, W[, 3]), and 64 in samples.png."""
    save_grid(out / "samples.png", x[:64])
    np.save(out / "samples.npy", to_uint8(x).permute(0, 2, 3, 1).squeeze(3).numpy())


def save_checkpoint(path, state, columns):
    """Saves a checkpoint, and its log as log.csv. A kill or a full disk leaves the old checkpoint intact."""
    file = io.BytesIO()
    torch.save(state, file)
    part = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.write_bytes(file.getvalue())
        np.savetxt(path.with_name("log.csv"), state["log"], "%.9g", ",", header=f"iteration,{columns}", comments="")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(path, *methods, **parts):
    """What save_checkpoint saved, on the CPU; each of the parts (a module, an optimiser) loads its own state.

    ValueError if the file is damaged, does not fit the parts, or was made by another method."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        method = state["settings"]["method"]
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
    except Exception as e:  # libraries raise many types, and most do not name the file
        hint = "damaged, or not a checkpoint of this network; --fresh trains from scratch"
        raise ValueError(f"{path}: {hint} ({type(e).__name__})") from e
    if methods and method not in methods:
        raise ValueError(f"{path}: made by {method}.py, not by {' or '.join(methods)}.py")
    return state


def iterations(iters, losses, parts, settings, path, fresh, columns="loss", validate=None, each=None):
    """Yields the iterations still to be done. Every 100 it logs; every 10 seconds, and at the end, it saves to path.

    losses: the loop appends the loss of each iteration, a scalar or one value for each of the columns.
    parts: {name: module or optimiser} to save; settings: what a checkpoint must agree on to be resumed.
    validate(log) returns one more value for the log. each: items in an iteration, if they are not the batch.
    FloatingPointError if a value is not finite."""
    done, log = 0, []
    status = {}
    saved = time.time()
    if path and path.exists() and not fresh:
        made = load_checkpoint(path, settings["method"])["settings"]
        words = {"images": "other images", "labels": "other labels", "text": "another text", "words": "other words"}
        differ = [k for k in settings if made.get(k) != settings[k] and k != "data"]
        if differ:
            said = "; ".join(words.get(k, f"{k} {made.get(k)}, not {settings[k]}") for k in differ)
            raise ValueError(f"{path}: made with {said}; --fresh trains from scratch, another --out keeps it")
        state = load_checkpoint(path, **parts)
        done, log = state["done"], state["log"]
        torch.manual_seed(settings["seed"] + done)  # a GPU's generator is not saved, but seeded again
        torch.set_rng_state(state["rng"])
    for i in progress(range(done, iters), "iteration", each or settings["batch"], status):
        yield i
        if (i + 1) % 100 and i + 1 < iters:
            continue
        means = torch.stack(losses).mean(0).flatten().tolist()  # waits for the GPU, so only here
        losses.clear()
        log.append((i + 1, *means, *([validate(log)] if validate else [])))
        status.update(zip(columns.split(","), log[-1][1:]))
        if not np.isfinite(log[-1]).all():
            raise FloatingPointError(f"{columns} not finite at iteration {i + 1}; try a smaller --lr")
        writer = path and os.environ.get("RANK", "0") == "0"  # under torchrun only the first process saves
        if writer and (i + 1 == iters or time.time() - saved > 10):
            state = {name: part.state_dict() for name, part in parts.items()}
            state = dict(settings=settings, parts=state, done=i + 1, log=log, rng=torch.get_rng_state())
            save_checkpoint(path, state, columns)
            saved = time.time()


def progress(steps, what, each=1, status=()):
    """Iterates over a range and prints how far it is, every 10 seconds and at the end.

    each: how many items one number of the range stands for; status: {name: value}, printed as well."""
    start = shown = time.time()
    for i in steps:
        yield i
        done = min(i + steps.step, steps.stop)
        now = time.time()
        if done == steps.stop or now - shown > 10:
            shown = now
            rate = (done - steps.start) / max(now - start, 1e-9)
            left = (steps.stop - done) / rate
            values = "".join(f"{name} {value:.4g}, " for name, value in dict(status).items())
            print(f"{what} {done}/{steps.stop}: {values}{rate * each:,.0f}/s, {left:.0f} s left", flush=True)


def graphed(module, *inputs):
    """The module, on a GPU with its forward and backward pass recorded as one CUDA graph each: two launches instead of
    hundreds, and a step takes half to a quarter of the time. inputs: examples of what it is called with in training."""
    if inputs[0].is_cuda:
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")  # the gradients wait for the graph
        torch.cuda.make_graphed_callables(module, inputs)
    return module


def update_ema(ema, model, decay):
    """Exponential moving average of the weights, in place: ema <- decay ema + (1 - decay) model."""
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    average(list(ema.parameters()), list(model.parameters()), None)


def processes(device, batch):
    """(rank, number of processes) under torchrun, else (0, 1). Only rank 0 prints. ValueError if they do not fit."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if batch % world:
        raise ValueError(f"--batch {batch}: {world} processes cannot share it equally")
    if world > 1 and not torch.distributed.is_initialized():
        cuda = torch.device(device).type == "cuda"
        if cuda:
            local = int(os.environ["LOCAL_RANK"])
            if local >= torch.cuda.device_count():
                raise ValueError("under torchrun each process needs a GPU of its own")
            torch.cuda.set_device(local)
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
        sys.stdout = open(os.devnull, "w") if rank else sys.stdout
    return rank, world


def parse_args(parser, argv, path=None):
    """Parses the flags. Their defaults are the settings of the checkpoint at path, or else in --out, if it exists."""
    args = parser.parse_args(argv)
    path = path or args.out / "model.pt"
    if path.exists() and not args.fresh:
        settings = load_checkpoint(path)["settings"]
        parser.set_defaults(**{name: value for name, value in settings.items() if name in args and value is not None})
        args = parser.parse_args(argv)
    return args


def pick_device(name=None):
    """An argparse type: the name of a device that this machine has. Without a name, the first of cuda, mps and cpu."""
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.ones(1, device=name or found)
    except (RuntimeError, AssertionError) as e:
        raise argparse.ArgumentTypeError(str(e).splitlines()[0]) from e
    return name or found


def positive(text):
    """An argparse type: an integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # escapes what the terminal's encoding lacks
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command resumes from the last checkpoint")
    except torch.cuda.OutOfMemoryError:
        sys.exit(f"{Path(__file__).name}: out of GPU memory; try a smaller --batch or --width")
    except (OSError, ValueError, FloatingPointError) as e:
        sys.exit(" ".join(f"{Path(__file__).name}: {e}".split()))
