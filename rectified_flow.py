# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""Rectified flow: an ODE from noise to images, learned from straight lines, then made straight.

Noise and images are connected by straight lines, and a network learns their velocity. Reflow trains
the network again on its own pairs of noise and image, until a single step suffices.

Paper: Liu, Gong, Liu, "Flow Straight and Fast: Learning to Generate and Transfer Data with
Rectified Flow", ICLR 2023, arXiv:2209.03003. Numbers in brackets, such as [2], are its equations.

symbol     in the code   meaning
X_0, X_1   x_0, x_1      pairs of noise, N(0, I), and image, in -1 .. 1; (N, C, H, W) each
t          t             time, from 0 (noise) to 1 (data), unlike in diffusion; (N,) or one float
X_t        x_t           the point at time t on the straight line from X_0 to X_1
v(x, t)    model(x, t)   velocity, (N, C, H, W); an image has D = C H W components
Z_t        z             the flow: the solution of the ODE (4) that starts from noise
N          steps         number of Euler steps; in shapes the number of images
S          straightness  0 if all paths are straight; the code returns that of each path, (N,)
ε          eps           random signs ±1 for Hutchinson's estimate (10), (K, N, C, H, W)

Training. Take X_0 and X_1, at first independent, connect them by a straight line, and train a
network to predict the line's direction from a point on it:

  (1)  X_t = t X_1 + (1 - t) X_0
  (2)  min_v ∫ 𝔼 ‖(X_1 - X_0) - v(X_t, t)‖² dt                                                 [1]

The optimum of least squares is the conditional mean. Where lines cross, it averages directions:

  (3)  v(x, t) = 𝔼[X_1 - X_0 | X_t = x]                                                        [2]

The flow moves noise with this velocity:

  (4)  dZ_t = v(Z_t, t) dt,  Z_0 = X_0

Z_t follows other paths than X_t, but has the same distribution at each t, so Z_1 is distributed
like the images [Theorem 3.3]. Sketch of the proof: for any smooth f with compact support,

       d/dt 𝔼 f(X_t) = 𝔼[∇f(X_t) · (X_1 - X_0)] = 𝔼[∇f(X_t) · v(X_t, t)]

by the chain rule and (1), then (3). By (4) the same equation holds for Z_t. Both start with the
same distribution, so they agree at every t, if the equation has only one solution. Paths of an ODE
cannot cross: where two lines cross, the flow's paths exchange their ends.

Sampling solves (4), with N Euler steps,

  (5)  z ← z + v(z, t) / N,  t = 0, 1/N, ..., (N - 1)/N

or the Runge-Kutta pair of Dormand and Prince (1980), constants a, b, c, e and adaptive step size h:

  (6)  k_i = v(z + h Σ_{j<i} a_ij k_j, t + c_i h),  i = 1 .. 7
       z ← z + h Σ_i b_i k_i,  error = h Σ_i e_i k_i  (the difference of orders 5 and 4)
       h ← h min(5, max(0.2, 0.9 r^(-1/5))),  r the RMS of error / (tol (1 + |z|))

A step with r > 1 is repeated with the smaller h. |z| is its larger value, before or after the step.

Straightness. A path is straight if its velocity always equals its total displacement:

  (7)  S = ∫ 𝔼 ‖(Z_1 - Z_0) - v(Z_t, t)‖² dt                                                   [3]

If S = 0, one Euler step is exact. The first flow is not straight: X_0 and X_1 are independent, so
v(x, 0) = 𝔼[X_1] - x, and one step from any x ends at 𝔼[X_1], the mean of all images, a blur.

Reflow minimizes (2) again, on another coupling: noise, paired with the image that it flows to:

  (8)  (X_0, X_1) ← (Z_0, Z_1)

Now X_1 is a function of X_0, say Z_1(X_0), so v(x, 0) = Z_1(x) - x, and one step from x ends at
Z_1(x). The new lines hardly cross, because the flow's paths do not: the new flow is straighter, and
𝔼 c(Z_1 - Z_0) ≤ 𝔼 c(X_1 - X_0) for convex c [Theorem 3.5]. It inherits the first flow's errors.

Likelihood. A small step multiplies volumes by det(I + h ∂v/∂z) ≈ 1 + h div v, where div v is the
trace of ∂v/∂z, so log p(Z_t) falls by h div v: a normalizing flow of infinitely many layers. The
path that ends at x is followed back to its noise:

  (9)  log p(x) = log N(Z_0; 0, I) - ∫ div v(Z_t, t) dt,  Z_1 = x

  (10) div v = 𝔼[εᵀ (∂v/∂z) ε], as 𝔼[ε εᵀ] = I: one product with ∂v/∂z for each ε, not D of them

Pitfalls:
- Each image has its own t. Break it: delete the line `t = t.view(-1, 1, 1, 1)`; if N = W, t then
  multiplies columns of pixels, and test_rectified_flow_eq1_each_image_has_its_own_time fails.
- Reflow needs the noise that made each image, not new noise.
- The code's loss is (2) divided by C H W, a mean over pixels; S is a sum over pixels.

Differences from the paper:
- Noise to images only: no transfer from images to images. No distillation.
- t is logit-normal (Esser et al. 2024, arXiv:2403.03206), mostly near 1/2, where prediction is
  hardest; in reflow t = u², u uniform, closer to 0, where one step evaluates v. (3) still holds.
- tol is 1e-3 (theirs: 1e-5), t starts at 0 (0.001), images are dequantised, the network is small.

python rectified_flow.py --data mnist --samples 2000    trains in 3 minutes on two cores
python rectified_flow.py --reflow 1 --steps 1           one-step samples; reflow takes 5 minutes
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
def stratified(n, device="cpu"):
    """n random numbers, uniform in 0 .. 1, one in each of its n equal parts -> (n,)."""
    return (torch.rand(1, device=device) + torch.arange(n, device=device) / n) % 1


def dequantise(images, generator=None):
    """uint8 images -> -1 .. 1. Byte k becomes uniform in its step of grey, from k / 128 - 1 to (k + 1) / 128 - 1."""
    return (images + torch.rand(images.shape, generator=generator, device=images.device)) / 128 - 1


def line_batches(images, n):
    """Yields batches for the first flow, without end: x_0 and x_1, independent, (n, C, H, W) each, and t, (n,)."""
    while True:
        index = torch.randint(len(images), (n,), device=images.device)
        x_1 = dequantise(images[index])
        x_0 = torch.randn_like(x_1)
        normal = 2**0.5 * torch.erfinv(2 * stratified(n, images.device) - 1)
        yield x_0, x_1, normal.sigmoid()


def interpolate(x_0, x_1, t):
    """X_t. x_0, x_1 and the result: (N, C, H, W); t: (N,)."""
    t = t.view(-1, 1, 1, 1)
    return t * x_1 + (1 - t) * x_0  # (1)


def loss_flow(model, x_0, x_1, t):
    """The mean squared error over all images and pixels, a scalar. x_0, x_1: (N, C, H, W); t: (N,)."""
    direction = x_1 - x_0  # the network learns its conditional mean (3)
    return F.mse_loss(model(interpolate(x_0, x_1, t), t), direction)  # (2)


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
def train(
    images,
    iters=5400,
    batch=32,
    lr=5e-3,
    width=32,
    device="cpu",
    seed=0,
    path=None,
    fresh=False,
    data=None,
    start=None,
    pairs=20000,
    pair_steps=25,
):
    """Trains on uint8 images (N, C, H, H) and returns the EMA model. Seeds torch's global generator.

    start: a flow of the same width. If given, this is a reflow: images may be None, and training continues from
    start. pairs: how many pairs of noise and image start makes for it, in pair_steps Euler steps each.
    path: the checkpoint, resumed unless fresh; data: the name of the data, stored in it.
    ValueError if the checkpoint has other settings, FloatingPointError if the loss is not finite."""
    settings = dict(method="rectified_flow", data=data, width=width, iters=iters, batch=batch, lr=lr, seed=seed)
    settings |= image_settings(images) if start is None else reflow_settings(start, pairs, pair_steps)
    rank, world = processes(device, batch)
    torch.manual_seed(seed)
    model = UNet(settings["channels"], settings["size"], width, t_max=1).to(device)
    if torch.device(device).type == "cpu":
        model = model.to(memory_format=torch.channels_last)  # 1.16 times as fast on an AMD EPYC
    if start is None:
        batches = line_batches(images.to(device), batch)
    else:
        model.load_state_dict(start.state_dict())
        batches = reflow_batches(start, pairs, pair_steps, seed + 1, batch)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    opt = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99))
    inputs = torch.zeros(batch, *model.shape, device=device), torch.zeros(batch, device=device)
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else graphed(model, *inputs)
    mine = slice(rank, None, world)  # each process trains on its share of the batch
    losses = []

    for i in iterations(iters, losses, dict(model=model, ema=ema, opt=opt), settings, path, fresh):
        opt.param_groups[0]["lr"] = lr * min((i + 1) / 200, 1 - i / iters)  # warm-up, then linear decay
        x_0, x_1, t = next(batches)
        loss = loss_flow(net, x_0[mine], x_1[mine], t[mine])
        opt.zero_grad()
        loss.backward()
        opt.step()
        update_ema(ema, model, decay=min(0.995, (1 + i) / (10 + i)))
        losses.append(loss.detach())
    return ema


# ------------------------------------------------------------------------------------- method: the solvers ------------
def velocity(model, z, t):
    """dz/dt, like z, at time t, a float."""
    return model(z, z.new_full((len(z),), t))  # (4)


@torch.inference_mode()
def euler(model, z, steps=50):
    """z at t = 1 from z at t = 0, (N, C, H, W) both. ValueError if steps < 1."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    for i in range(steps):
        z = z + velocity(model, z, i / steps) / steps  # (5)
    return z


@torch.inference_mode()
def straightness(model, z_0, steps=50):
    """S of the path from each z_0, (N,). The integral is a mean over the times of Euler's steps. z_0: (N, C, H, W)."""
    velocities = []

    def recorded(z, t):
        velocities.append(model(z, t))
        return velocities[-1]

    z_1 = euler(recorded, z_0, steps)
    return sum((z_1 - z_0 - v).square().flatten(1).sum(1) for v in velocities) / steps  # (7)


DORMAND_PRINCE = (  # c_i and all a_ij, i = 2 .. 7. The last a_ij are also b, so k_7 is the k_1 of the next step
    (1 / 5, (1 / 5,)),
    (3 / 10, (3 / 40, 9 / 40)),
    (4 / 5, (44 / 45, -56 / 15, 32 / 9)),
    (8 / 9, (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729)),
    (1, (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656)),
    (1, (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
)
ERROR_WEIGHTS = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)  # e_i


@torch.no_grad()
def rk45(model, z, tol=1e-3):
    """z at t = 1 from z at t = 0, (N, ...) both. One step size serves the whole batch.

    FloatingPointError if it becomes too small, or if a value is not finite."""
    t = 0.0
    h = 0.05
    k = [velocity(model, z, t)]
    while t < 1 - 1e-9:
        h = min(h, 1 - t)
        for c, row in DORMAND_PRINCE:
            z_new = z + h * sum(a * k_j for a, k_j in zip(row, k))  # (6)
            k.append(velocity(model, z_new, t + c * h))  # (6)
        error = h * sum(e * k_i for e, k_i in zip(ERROR_WEIGHTS, k))  # (6)
        scale = tol * (1 + torch.maximum(z.abs(), z_new.abs()))
        r = (error / scale).square().mean().sqrt().item()  # (6)
        if r <= 1:
            t = t + h
            z = z_new
            k = k[-1:]
        elif h > 1e-7:
            k = k[:1]
        else:
            raise FloatingPointError(f"rk45 at t = {t:.4f}: no step is small enough for --tol {tol}, or NaN")
        h = h * min(5.0, max(0.2, 0.9 * max(r, 1e-10) ** -0.2))  # (6)
    return z


# -------------------------------------------------------------------------------------- method: likelihood ------------
def divergence(model, z, t, eps):
    """v(z, t), (N, C, H, W), and the mean of εᵀ (∂v/∂z) ε over K vectors for each image, (N,). eps: (K, N, C, H, W)."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        v = velocity(model, z, t)
        products = [torch.autograd.grad((v * e).sum(), z, retain_graph=True)[0] * e for e in eps]
    return v.detach(), torch.stack(products).mean(0).flatten(1).sum(1)  # (10)


def log_prob(model, x, eps, tol=1e-4):
    """log p(x) in nats, (N,), of x (N, C, H, W), and the noise that the flow maps to it. eps: as in divergence()."""

    def backwards(state, s):  # d/ds of (the integral of div v, z), (N, 1 + D), at s = 1 - t
        z = state[:, 1:].view_as(x)
        v, div = divergence(model, z, 1 - s[0].item(), eps)
        return torch.cat([div[:, None], -v.flatten(1)], dim=1)  # (9)

    start = torch.cat([x.new_zeros(len(x), 1), x.flatten(1)], dim=1)
    end = rk45(backwards, start, tol)
    z = end[:, 1:]
    log_normal = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)
    return log_normal - end[:, 0], z.view_as(x)  # (9)


def image_bits(model, images, tol=1e-4, seed=0, chunk=100):
    """Bits/dim, (N,), of uint8 images (N, C, H, W), each with one sample of dequantisation noise and one ε."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    bits = []
    for i in progress(range(0, len(images), chunk), "likelihood, image"):
        x = dequantise(images[i : i + chunk].to(device), generator)
        eps = torch.randint(2, (1, *x.shape), generator=generator, device=device) * 2.0 - 1
        nats, _ = log_prob(model, x, eps, tol)
        bits.append(math.log2(128) - nats.cpu() / (x[0].numel() * math.log(2)))  # a step of grey is 1/128 wide
    return torch.cat(bits)


def sample(model, n, steps=50, solver="euler", tol=1e-3, seed=0, chunk=100):
    """n images, (n, C, H, W), roughly in -1 .. 1, on the CPU, by euler (steps) or rk45 (tol), chunk by chunk."""
    if solver not in ("euler", "rk45"):
        raise ValueError(f"solver must be euler or rk45, not {solver}")
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    images = []
    for i in progress(range(0, n, chunk), "sampling, image"):
        z = torch.randn(min(chunk, n - i), *model.shape, generator=generator, device=device)
        x = euler(model, z, steps) if solver == "euler" else rk45(model, z, tol)
        images.append(x.cpu())
    return torch.cat(images)


# ------------------------------------------------------------------------------------------ method: reflow ------------
def make_pairs(model, n, steps=25, seed=0, chunk=100):
    """n noises and the images that the flow maps them to, (n, C, H, W) each, on the model's device."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    noise = []
    images = []
    for i in progress(range(0, n, chunk), "pair"):
        noise.append(torch.randn(min(chunk, n - i), *model.shape, generator=generator, device=device))
        images.append(euler(model, noise[-1], steps))  # (8)
    return torch.cat(noise), torch.cat(images)


def reflow_batches(start, pairs, steps, seed, n):
    """Yields batches for a reflow, without end: x_0, the x_1 that the flow start maps it to, and t."""
    noise, images = make_pairs(start, pairs, steps, seed)
    while True:
        index = torch.randint(pairs, (n,), device=noise.device)
        t = stratified(n, noise.device) ** 2
        yield noise[index], images[index], t


def reflow_settings(start, pairs, pair_steps):
    """What a checkpoint remembers of the pairs of a reflow: images is the hash of the weights of the flow start."""
    weights = torch.cat([p.flatten().cpu() for p in start.parameters()])
    sha256 = hashlib.sha256(weights.numpy()).hexdigest()
    return dict(channels=start.shape[0], size=start.shape[1], images=sha256, pairs=pairs, pair_steps=pair_steps)


# ------------------------------------------------------------------------------------------------- command ------------
def load(path, device="cpu"):
    """The EMA model in a checkpoint of rectified_flow.py. Its images have the shape model.shape, (C, H, W)."""
    settings = load_checkpoint(path, "rectified_flow")["settings"]
    model = UNet(settings["channels"], settings["size"], settings["width"], t_max=1)
    load_checkpoint(path, ema=model)
    return model.to(device).requires_grad_(False).eval()


def draw_film(path, model, z, steps):
    """Saves a film of sixteen noises that become images, about a dozen of Euler's steps."""
    states = []

    def recorded(z, t):
        states.append(z)
        return model(z, t)

    x = euler(recorded, z[:16], steps)
    save_gif(path, [*states[:: math.ceil(steps / 12)], x])


def compare_flows(path, models, z):
    """Saves the images of 12 noises in 1, 2, 5 and 50 steps, a row each, flow by flow. Prints how straight they are."""
    rows = []
    for k, model in enumerate(models):
        rows += [euler(model, z[:12], steps) for steps in (1, 2, 5, 50)]
        S = straightness(model, z, 50)
        error = S.std() / len(S) ** 0.5
        print(f"straightness after {k} reflows: S = {S.mean():.2f} +- {error:.2f} an image (0 is straight)")
    save_grid(path, torch.cat(rows), columns=12)


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
    add("--iters", type=positive, default=5400, help="training iterations, of each flow")
    add("--batch", type=positive, default=32, help="batch size")
    add("--lr", type=float, default=5e-3, help="peak learning rate")
    add("--width", type=positive, default=32, help="channels of the network at half the resolution")
    add("--samples", type=positive, default=64, help="number of images to sample")
    add("--steps", type=positive, default=50, help="N, the number of Euler steps")
    add("--solver", choices=("euler", "rk45"), default="euler", help="rk45 chooses its own steps, by --tol")
    add("--tol", type=float, default=1e-3, help="relative and absolute tolerance of rk45")
    add("--reflow", type=int, default=0, help="number of reflows")
    add("--pairs", type=positive, default=20000, help="number of pairs of noise and image of a reflow")
    add("--nll", type=int, default=0, help="number of test images whose likelihood is printed")
    add("--out", type=Path, default=Path("out/rectified_flow"), help="run folder")
    add("--device", type=pick_device, default=pick_device(), help="where to compute")
    add("--seed", type=int, default=0, help="seed; on a CPU the same seed gives the same bits")
    add("--fresh", action="store_true", help="train from scratch over the checkpoints in --out")
    args = parse_args(parser, argv)
    if args.reflow:
        args = parse_args(parser, argv, args.out / "reflow1" / "model.pt")  # its settings include pairs
    if not args.tol > 0:
        raise ValueError(f"--tol {args.tol}: must be above 0")
    if args.reflow < 0:
        raise ValueError(f"--reflow {args.reflow}: must be at least 0")
    if args.nll < 0:
        raise ValueError(f"--nll {args.nll}: must be at least 0")

    rank, _ = processes(args.device, args.batch)
    images = load_images(args.data, args.size, args.channels)
    print(f"{len(images)} images of {args.size}x{args.size}x{args.channels} from {args.data}, on {args.device}")
    settings = args.iters, args.batch, args.lr, args.width, args.device, args.seed
    models = [train(images, *settings, args.out / "model.pt", args.fresh, args.data)]
    for k in range(1, args.reflow + 1):
        path = args.out / f"reflow{k}" / "model.pt"
        models.append(train(None, *settings, path, args.fresh, args.data, models[-1], args.pairs))
    if rank:
        return  # only the first process samples

    asked = []  # the number of images in each evaluation of the network
    hook = models[-1].register_forward_hook(lambda net, inputs, output: asked.append(len(output)))
    x = sample(models[-1], args.samples, args.steps, args.solver, args.tol, args.seed)
    hook.remove()
    evaluations = sum(asked) / args.samples
    save_samples(args.out, x)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    z = torch.randn(64, *models[0].shape, generator=generator, device=args.device)
    draw_film(args.out / "samples.gif", models[-1], z, args.steps)
    compare_flows(args.out / "steps.png", models, z)
    print(
        f"{args.samples} samples, {evaluations:.0f} evaluations each: {args.out}/samples.png, samples.npy, "
        "samples.gif, steps.png (the same noise in 1, 2, 5 and 50 steps, flow by flow)"
    )
    if args.nll:
        test_images = load_images(args.data, args.size, args.channels, test=True)[: args.nll]
        bits = image_bits(models[-1], test_images)
        error = bits.std(correction=0) / len(bits) ** 0.5
        print(f"test: {bits.mean():.4f} +- {error:.4f} bits/dim, mean of {len(bits)} images")


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
