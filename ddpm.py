# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""Denoising diffusion probabilistic models (DDPM): images from noise in 1000 denoising steps.

A fixed process turns an image into noise, a little at a time. A network learns to undo one such
step; applied a thousand times, it turns pure noise into a new image.

Paper: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, arXiv:2006.11239.
Numbers in brackets at the right, such as [12], are the paper's equations.

symbol        in the code      meaning
x_0           x_0              images, (N, C, H, W), scaled to -1 .. 1: byte k is 2 k / 255 - 1
x_t           x_t              the images after t noising steps; x_T is almost N(0, I)
t             t                time step, 1 .. T = 1000; in the code 0 .. T-1, and -1 for x_0
β_t           s.beta[t]        variance of the noise of step t, 0.0001 to 0.02; α_t = 1 - β_t
ᾱ_t           s.alpha_bar[t]   product of α up to t, from 0.9999 down to 0.00004; 1 for x_0
β̃_t           s.beta_tilde[t]  variance of the posterior (3); the first is 0
ε             eps              the noise in x_t, defined by (2), (N, C, H, W)
ε_θ(x_t, t)   model(x_t, t)    the network's estimate of ε, (N, C, H, W)
σ_t²          variances()[t]   variance of the noise added in a reverse step: β_t or β̃_t

The forward process adds noise in T fixed steps:

  (1)  q(x_t | x_{t-1}) = N(√(1 - β_t) x_{t-1}, β_t I)                                          [2]

A sum of independent Gaussians is Gaussian, and if x_{t-1} has noise of variance 1 - ᾱ_{t-1}, x_t
has α_t (1 - ᾱ_{t-1}) + β_t = 1 - ᾱ_t. So t steps collapse into one:

  (2)  x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε,  ε ~ N(0, I)                                              [4]

The reverse process would be easy if x_0 were known. By Bayes' rule, q(x_{t-1} | x_t, x_0) is
proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0). Completing the square in x_{t-1} gives

  (3)  q(x_{t-1} | x_t, x_0) = N(μ̃_t, β̃_t I),
       μ̃_t = (√ᾱ_{t-1} β_t x_0 + √α_t (1 - ᾱ_{t-1}) x_t) / (1 - ᾱ_t),
       β̃_t = β_t (1 - ᾱ_{t-1}) / (1 - ᾱ_t)                                                  [6, 7]

The model, p(x_T) = N(0, I) and p(x_{t-1} | x_t) = N(μ_θ(x_t, t), σ_t² I), does not know x_0. By
Jensen's inequality, -log p(x_0) ≤ 𝔼_q[-log(p(x_0 ... x_T) / q(x_1 ... x_T | x_0))]. For t > 1, by
Bayes' rule, q(x_t | x_{t-1}) = q(x_{t-1} | x_t, x_0) q(x_t | x_0) / q(x_{t-1} | x_0). In the
product over t the last two factors cancel, except for q(x_T | x_0). Three kinds of terms remain:

  (4)  -log p(x_0) ≤ L_T + Σ_{t>1} L_{t-1} + L_0                                                [5]
       L_T     = KL(q(x_T | x_0) ‖ N(0, I))
       L_{t-1} = 𝔼_q KL(q(x_{t-1} | x_t, x_0) ‖ p(x_{t-1} | x_t))
       L_0     = 𝔼_q[-log p(x_0 | x_1)]

  (5)  KL(N(m, v I) ‖ N(m', v' I)) = ½ Σ_pixels (v / v' - 1 + log(v' / v) + (m - m')² / v')

To make the KLs small, μ_θ must match μ̃_t. So μ_θ has the formula of μ̃_t, with an estimate of x_0
in place of x_0. Since x_t is known, (2) turns an estimate of ε into one of x_0:

  (6)  x_0 ≈ (x_t - √(1 - ᾱ_t) ε_θ(x_t, t)) / √ᾱ_t,  μ_θ(x_t, t) = μ̃_t(x_t, this x_0)

Inserted in (3), this is Algorithm 2's μ_θ = (x_t - β_t ε_θ / √(1 - ᾱ_t)) / √α_t [11]. With ε for
ε_θ it is μ̃_t, so μ̃_t - μ_θ = β_t (ε_θ - ε) / √(α_t (1 - ᾱ_t)), and (5) becomes

       L_{t-1} = w_t 𝔼 ‖ε - ε_θ‖² + constant,  w_t = β_t² / (2 σ_t² α_t (1 - ᾱ_t))             [12]

For σ_t² = β_t, w_t is 0.27 at t = 2 and 0.005 at t = 350: the bound gives the largest weight to
noise too weak to be seen. Without w_t the images are better:

  (7)  L = 𝔼 ‖ε - ε_θ(x_t, t)‖²,  t uniform on 1 .. T, x_t from (2)                            [14]

Sampling goes from x_T ~ N(0, I) through t = T .. 1 to x_0. The last step adds no noise, because no
later step would remove it:

  (8)  x_{t-1} = μ_θ(x_t, t) + σ_t z,  z ~ N(0, I), but z = 0 for t = 1               [Algorithm 2]

Pixels are bytes, so L_0 needs a probability, not a density: the last Gaussian, integrated over the
bin of each byte. With d = 1/255, half a bin, and σ_1² = β̃_2, as in the authors' code,

  (9)  log p(x_0 | x_1) = Σ_pixels log(Φ((x_0 + d - μ_θ) / σ_1) - Φ((x_0 - d - μ_θ) / σ_1))     [13]

where Φ is the standard normal CDF, and the bins of the bytes 0 and 255 extend to infinity.

Pitfalls:
- β_t is a variance, not a standard deviation, and (2) has ᾱ_t, not α_t.
- The last step adds no noise. Break it: delete the line `z = torch.zeros_like(z) if t == 0 else z`
  and test_ddpm_eq8_adds_no_noise_at_the_end fails.
- The estimate of x_0 in (6) is clipped to -1 .. 1, as in the authors' code, unless clip=False.
- The code's loss is (7) divided by C H W, a mean over pixels. Bits/dim are nats / (C H W ln 2).

Differences from the paper, whose settings are in parentheses:
- The network is small: 2x2 pixels are folded into channels; no attention, no dropout. The time
  embedding scales and shifts the features; theirs is added.
- Small t are sampled more often in training, reweighted so that the expected loss is still (7).
- EMA decay 0.995, warmed up (0.9999); learning rate 5e-3, decaying to zero (2e-4, no decay);
  batch 32 (128); Adam's second beta is 0.99 (0.999); no flips, no gradient clipping (it has both).

python ddpm.py --data mnist --samples 2000    trains in 3 minutes on two cores; samples in 7 minutes
python ddpm.py --variance small               samples the trained model with the other σ_t²
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
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps


# ---------------------------------------------------------------------------------------- method: the loss ------------
class Schedule(NamedTuple):
    """The coefficients of all time steps, (T,) each."""

    beta: torch.Tensor
    alpha_bar: torch.Tensor
    beta_tilde: torch.Tensor
    mean_x_0: torch.Tensor  # the factor of x_0 in the posterior mean
    mean_x_t: torch.Tensor  # the factor of x_t
    signal: torch.Tensor  # √ᾱ
    noise: torch.Tensor  # √(1 - ᾱ)

    def to(self, device):
        """The same tables in float32, like the images, on the device."""
        return Schedule(*(table.float().to(device) for table in self))


def make_schedule(T=1000, beta_1=1e-4, beta_T=0.02):
    """The paper's linear schedule, in float64."""
    beta = torch.linspace(beta_1, beta_T, T, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, 0)  # each step (1) contributes a factor
    before = F.pad(alpha_bar[:-1], (1, 0), value=1.0)  # ᾱ_{t-1}; 1 for x_0
    beta_tilde = beta * (1 - before) / (1 - alpha_bar)  # (3)
    mean_x_0 = before.sqrt() * beta / (1 - alpha_bar)  # (3)
    mean_x_t = (1 - beta).sqrt() * (1 - before) / (1 - alpha_bar)  # (3)
    return Schedule(beta, alpha_bar, beta_tilde, mean_x_0, mean_x_t, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def q_sample(x_0, t, eps, s):
    """x_t from x_0 and the noise eps, (N, C, H, W) each, in one step. t: an int or (N,) ints; s: a Schedule."""
    signal = s.signal[t].view(-1, 1, 1, 1)
    noise = s.noise[t].view(-1, 1, 1, 1)
    return signal * x_0 + noise * eps  # (2)


def loss_simple(model, x_0, t, eps, s):
    """The mean squared error of each image -> (N,). x_0, eps: (N, C, H, W); t: (N,) ints; s: a Schedule."""
    x_t = q_sample(x_0, t, eps, s)
    return (model(x_t, t) - eps).square().flatten(1).mean(1)  # (7)


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
    settings = dict(method="ddpm", data=data, width=width, iters=iters, batch=batch, lr=lr, seed=seed)
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
    s = make_schedule().to(device)
    mine = slice(rank, None, world)  # each process trains on its share of the batch
    losses = []

    for i in iterations(iters, losses, dict(model=model, ema=ema, opt=opt), settings, path, fresh):
        opt.param_groups[0]["lr"] = lr * min((i + 1) / 200, 1 - i / iters)  # warm-up, then linear decay
        x_0 = images[torch.randint(len(images), (batch,), device=device)].float() / 127.5 - 1
        t, weight = draw_t(batch, len(s.beta), device)
        eps = torch.randn_like(x_0)
        loss = (weight[mine] * loss_simple(net, x_0[mine], t[mine], eps[mine], s)).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        update_ema(ema, model, decay=min(0.995, (1 + i) / (10 + i)))
        losses.append(loss.detach())
    return ema


# ------------------------------------------------------------------------------------- method: the sampler ------------
def q_mean(x_0, x_t, t, s):
    """The mean of the posterior, like x_t. t: an int."""
    return s.mean_x_0[t] * x_0 + s.mean_x_t[t] * x_t  # (3)


def guess(model, x_t, t, s, clip=True):
    """The model's estimate of x_0, like x_t. t: an int."""
    eps = model(x_t, torch.full((len(x_t),), t, device=x_t.device))
    x_0 = (x_t - s.noise[t] * eps) / s.signal[t]  # (6)
    return x_0.clamp(-1, 1) if clip else x_0


def p_mean(model, x_t, t, s, clip=True):
    """The mean of the model's x_{t-1}, like x_t. t: an int."""
    return q_mean(guess(model, x_t, t, s, clip), x_t, t, s)  # (6)


def variances(s, variance):
    """σ², (T,): "large" is β, optimal for x_0 ~ N(0, I); "small" is β̃, optimal for a single x_0. Else ValueError."""
    tables = {"large": s.beta, "small": s.beta_tilde}
    if variance not in tables:
        raise ValueError(f"variance must be large or small, not {variance}")
    return tables[variance]


def p_step(model, x_t, t, z, s, variance="large", clip=True):
    """x_{t-1} from x_t. t: an int; z: standard normal, like x_t."""
    mean = p_mean(model, x_t, t, s, clip)
    sigma = variances(s, variance)[t].sqrt()
    z = torch.zeros_like(z) if t == 0 else z
    return mean + sigma * z  # (8)


@torch.inference_mode()
def reverse(model, x_T, s, variance="large", clip=True, generator=None):
    """Yields (t, x_t), T + 1 pairs: first (T-1, x_T), the noise as given, and last (-1, x_0), the images."""
    x_t = x_T
    yield len(s.beta) - 1, x_t
    for t in reversed(range(len(s.beta))):
        z = torch.randn(x_t.shape, generator=generator, device=x_t.device)
        x_t = p_step(model, x_t, t, z, s, variance, clip)
        yield t - 1, x_t


def sample(model, n, variance="large", clip=True, seed=0, chunk=100, strip=()):
    """n images, (n, C, H, W), roughly in -1 .. 1, on the CPU. They are sampled in chunks.

    strip: a dict that receives, for each of its keys t, x_t of the first sixteen images, on the CPU."""
    device = next(model.parameters()).device
    s = make_schedule().to(device)
    generator = torch.Generator(device).manual_seed(seed)
    images = []
    for i in range(0, n, chunk):
        x_T = torch.randn(min(chunk, n - i), *model.shape, generator=generator, device=device)
        states = reverse(model, x_T, s, variance, clip, generator)
        steps = progress(range(len(s.beta) + 1), f"images {i + 1} to {i + len(x_T)} of {n}, step")
        for _, (t, x) in zip(steps, states):
            if i == 0 and t in strip:
                strip[t] = x[:16].cpu()
        images.append(x.cpu())
    return torch.cat(images)


# -------------------------------------------------------------------------------------- method: likelihood ------------
def gauss_kl(mean, var, mean_theta, var_theta):
    """KL(N(mean, var) || N(mean_theta, var_theta)) of each image in nats, (N,)."""
    nats = var / var_theta - 1 + torch.log(var_theta / var) + (mean - mean_theta) ** 2 / var_theta
    return 0.5 * nats.flatten(1).sum(1)  # (5)


def log_decoder(x_0, mean, sigma):
    """log p(x_0 | x_1) of each image of bytes in nats, (N,). In float64, because float32 underflows in the tails."""
    x, mean, sigma = (v.cpu().double() for v in (x_0, mean, sigma))
    low = torch.where(x < -0.999, -math.inf, (x - 1 / 255 - mean) / sigma)
    high = torch.where(x > 0.999, math.inf, (x + 1 / 255 - mean) / sigma)
    flip = low + high > 0  # erfc is precise in one tail, so a bin in the other is reflected
    a = torch.where(flip, -high, low)
    b = torch.where(flip, -low, high)
    mass = (torch.erfc(-b * 0.5**0.5) - torch.erfc(-a * 0.5**0.5)) / 2  # Φ(b) - Φ(a); ndtr is not precise in the tail
    return mass.clamp(min=1e-300).log().flatten(1).sum(1).to(x_0)  # (9)


@torch.inference_mode()
def bound(model, x_0, s, variance="large", clip=True, generator=None):
    """L_0 ... L_T of each image in bits/dim, (N, T + 1). One sample of x_t estimates each expectation.

    The code's t is the paper's t - 1, so step t gives L_t."""
    sigma_squared = variances(s, variance)
    nats = []
    for t in progress(range(len(s.beta)), "bound, step"):
        eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
        x_t = q_sample(x_0, t, eps, s)
        mean = p_mean(model, x_t, t, s, clip)
        if t == 0:
            nats.append(-log_decoder(x_0, mean, s.beta_tilde[1].sqrt()))  # L_0 (4)
        else:
            nats.append(gauss_kl(q_mean(x_0, x_t, t, s), s.beta_tilde[t], mean, sigma_squared[t]))  # L_t (4)
    nats.append(gauss_kl(s.signal[-1] * x_0, 1 - s.alpha_bar[-1], 0.0, 1.0))  # L_T (4)
    return torch.stack(nats, dim=1) / (x_0[0].numel() * math.log(2))


# ------------------------------------------------------------------------------------------------- command ------------
def load(path, device="cpu"):
    """The EMA model in a checkpoint of ddpm.py. Its images have the shape model.shape, (C, H, W)."""
    settings = load_checkpoint(path, "ddpm")["settings"]
    model = UNet(settings["channels"], settings["size"], settings["width"])
    load_checkpoint(path, ema=model)
    return model.to(device).requires_grad_(False).eval()


def print_bound(model, x_0, variance, seed):
    """Prints the bound on the images x_0, its standard error over them, and its three parts."""
    s = make_schedule().to(x_0.device)
    generator = torch.Generator(x_0.device).manual_seed(seed)
    bits = bound(model, x_0, s, variance, generator=generator)
    total = bits.sum(1)
    error = total.std(correction=0) / len(total) ** 0.5
    parts = f"L_T {bits[:, -1].mean():.5f} + L_1:T-1 {bits[:, 1:-1].sum(1).mean():.3f} + L_0 {bits[:, 0].mean():.3f}"
    print(f"bound on {len(x_0)} test images: {total.mean():.3f} +- {error:.3f} bits/dim = {parts}")


@torch.inference_mode()
def draw_strips(out, model, strip):
    """Saves a strip {t: x_t} of sample() as a film and as rows of images, and the estimates of x_0 as rows."""
    device = next(model.parameters()).device
    s = make_schedule().to(device)
    guesses = [x if t == -1 else guess(model, x.to(device), t, s).cpu() for t, x in strip.items()]
    save_gif(out / "samples.gif", [*strip.values()])
    for name, columns in ("strip.png", strip.values()), ("guesses.png", guesses):
        rows = torch.stack([x[:8] for x in columns], dim=1)  # (8, times, C, H, W)
        save_grid(out / name, rows.flatten(0, 1), columns=len(strip))


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
    add("--width", type=positive, default=32, help="channels of the network at half the resolution (the paper: 256)")
    add("--samples", type=positive, default=64, help="number of images to sample")
    add("--variance", choices=("large", "small"), default="large", help="σ² of sampling and bound: β or β̃")
    add("--bound", type=int, default=32, help="number of test images for the bound; 0 for none")
    add("--out", type=Path, default=Path("out/ddpm"), help="run folder")
    add("--device", type=pick_device, default=pick_device(), help="where to compute")
    add("--seed", type=int, default=0, help="seed; on a CPU the same seed gives the same bits")
    add("--fresh", action="store_true", help="train from scratch over the checkpoint in --out")
    args = parse_args(parser, argv)
    if args.bound < 0:
        raise ValueError(f"--bound {args.bound}: must be at least 0")

    rank, _ = processes(args.device, args.batch)
    images = load_images(args.data, args.size, args.channels)
    print(f"{len(images)} images of {args.size}x{args.size}x{args.channels} from {args.data}, on {args.device}")
    test_images = load_images(args.data, args.size, args.channels, test=True)[: args.bound]
    settings = args.iters, args.batch, args.lr, args.width, args.device, args.seed
    model = train(images, *settings, args.out / "model.pt", args.fresh, args.data)
    if rank:
        return  # only the first process samples

    strip = dict.fromkeys((999, 799, 599, 399, 299, 199, 149, 99, 49, -1))
    x = sample(model, args.samples, args.variance, seed=args.seed, strip=strip)
    save_samples(args.out, x)
    draw_strips(args.out, model, strip)
    if args.bound:
        print_bound(model, test_images.to(args.device).float() / 127.5 - 1, args.variance, args.seed)
    print(f"{args.samples} samples: {args.out}/samples.png, samples.npy; samples.gif, strip.png (from noise to image)")
    print(f"{args.out}/guesses.png (the network's estimates of x_0 from the images of strip.png)")


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
