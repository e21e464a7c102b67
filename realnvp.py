# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""Real NVP: a normalizing flow for images, in which every step is invertible and the density exact.

Mapping images x to Gaussian noise gives their density p(x). Mapping noise back generates images.

Paper: Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", ICLR 2017,
arXiv:1605.08803. On the right, [3] is the paper's equation 3, and [§4.1] its section 4.1.

symbol       in the code        meaning
k, x         k, x               images (N, C, H, W): bytes, 0 .. 255, and real numbers, 0 .. 1
h            h                  logits of x, -13.8 .. 13.8, and the activations computed from them
h_1, h_2     left, right        the halves of h, (N, 2 C, H/2, W/2), then (N, 4 C, H/4, W/4)
s, t         s, t = net(half)   log-scale and shift for the other half, with its shape
z = f(h)     model(h)           latents, (N, D), with prior N(0, I), and log |det ∂z/∂h|, (N,)
f⁻¹(z)       model.inverse(z)   logits, (N, C, H, W); D = C H W
α            ALPHA              1e-6, the least distance of the logit's argument q from 0 and 1
T            temperature        standard deviation of sampled latents; 1 samples the model itself

Data. Bytes are discrete: a density model could put a spike on each of the 256 values and raise
its likelihood without bound. So uniform noise spreads each byte over its bin (dequantisation):

  (1)  x = (k + u) / 256,  u uniform in [0, 1)

All x with bytes k fill a bin of volume 256^-D. Its probability is P(k) = 256^-D 𝔼_u[p(x)]. As
log 𝔼_u[p(x)] ≥ 𝔼_u[log p(x)], by Jensen's inequality, an ideal code for the bytes needs at most

  (2)  -log_2 P(k) / D ≤ 8 - 𝔼_u[log p(x)] / (D ln 2)  bits/dim

x is confined to 0 .. 1, but z is not. The logit maps one range to the other, and α keeps it finite:

  (3)  h = log q - log(1 - q),  q = α + (1 - 2α) x                                           [§4.1]
       log |det ∂h/∂x| = Σ (log(1 - 2α) - log q - log(1 - q))

Change of variables. As p(x) dx = p(z) dz, p(x) is p(z) times the change of volume of both steps:

  (4)  log p(x) = log p(z) + log |det ∂z/∂h| + log |det ∂h/∂x|                                  [3]
  (5)  log p(z) = log N(z; 0, I) = -½ Σ_i (z_i² + log 2π)

Couplings. One half of h is scaled and shifted by functions of the other (NICE is the case s = 0):

  (6)  y_1 = h_1,  y_2 = h_2 exp(s(h_1)) + t(h_1)                                            [4, 5]

y_1 does not depend on h_2, so the Jacobian is triangular, with ones and exp(s) on the diagonal. And
since y_1 = h_1, the inverse computes the same s and t, which can be any networks:

  (7)  log |det ∂y/∂h| = Σ s(h_1)                                                               [6]
  (8)  h_1 = y_1,  h_2 = (y_2 - t(y_1)) exp(-s(y_1))                                            [8]

One network gives r and t. The tanh keeps exp(s) from overflowing; scale is learned per channel:

  (9)  s = scale tanh(r)                                                                     [§4.1]

Halves. In the checkerboard split h_1 holds the pixels (i, j) with i + j even: of each 2x2 cell
[[a b] [c d]] these are a and d. Stacked as channels, each half is an image of half the side. The
channel-wise split regroups the four; the order (d, c) makes it its own inverse:

  (10)  h_1 = (a, d),  h_2 = (b, c)                                                             [9]
  (11)  h_1 = (a, b),  h_2 = (d, c)                                                          [§3.4]

Couplings change h_2 given h_1, then h_1 given h_2, and so on. After the couplings of both splits,
h_2 is factored out as latents. h_1 enters a second scale, where both halves become latents:

  (12)  (h', z_1) = f_1(h),  (h'', z_2) = f_2(h'),  z = (z_1, z_2, h'')                     [13-16]

Normalisation. Before all couplings each pixel of h is normalised by its mean μ and its standard
deviation σ over 1000 images, followed by a learned gain and bias:

  (13)  y = (h - μ) exp(gain) / σ + bias,  log |det ∂y/∂h| = Σ (gain - log σ)

Sampling inverts f. Interpolation mixes the latents z¹ .. z⁴ of four images by two angles φ and φ'.
If the four are orthogonal and of equal length, as they nearly are, z has this length too:

  (14)  h = f⁻¹(T ε),  ε ~ N(0, I)
  (15)  z = cos φ (cos φ' z¹ + sin φ' z²) + sin φ (cos φ' z³ + sin φ' z⁴)                      [19]

Pitfalls:
- Without log |det ∂h/∂x|, (4) is the density of h, not of x. Break it: delete "+ log_det_h" from
  the line tagged (4) and test_realnvp_eq3_eq4_uniform_noise_has_8_bits fails.
- p(x) is a density on [0, 1]^D. On [0, 256]^D, log p(x) is D ln 256 lower.
- On a GPU convolutions use TF32 unless torch.backends.cudnn.allow_tf32 is False. In an emulation on
  a CPU it changed no likelihood, to six digits, but made the error of f⁻¹(f(h)) 1000 times larger.

Differences from the paper:
- Its α, 0.05, costs bits where images are black: 2.49 bits/dim after 200 iterations on MNIST, not
  1.73. Its text has 1 - α for 1 - 2α, and i + j odd for h_1. This file follows the authors' code.
- (13) replaces batch normalisation. Two scales of small networks of one width, without weight
  normalisation and decay; no mirrored images. The authors' code has one scale (9) per coupling.
- EMA of the weights; the learning rate decays to zero; a temperature; φ and φ' end at π/2 here.

python realnvp.py --data mnist --samples 2000    trains in 144 s on two cores; 1.221 bits/dim
python realnvp.py --temperature 0.7              samples the trained model again, at T = 0.7
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


ALPHA = 1e-6  # α


# ---------------------------------------------------------------------------------- method: the couplings ------------
def checkerboard(h):
    """The pixels (i, j) of h (N, C, H, W) with i + j even, and those with i + j odd, (N, 2 C, H/2, W/2) each."""
    left = torch.cat([h[:, :, 0::2, 0::2], h[:, :, 1::2, 1::2]], dim=1)  # (10)
    right = torch.cat([h[:, :, 0::2, 1::2], h[:, :, 1::2, 0::2]], dim=1)  # (10)
    return left, right


def from_checkerboard(left, right):
    """The inverse of checkerboard(): an image (N, C, H, W)."""
    a, d = left.chunk(2, dim=1)
    b, c = right.chunk(2, dim=1)
    cells = torch.stack([a, b, c, d], dim=2).flatten(1, 2)  # (N, 4 C, H/2, W/2), the four of a channel together
    return F.pixel_shuffle(cells, 2)  # (10)


def regroup(left, right):
    """Turns checkerboard halves into channel-wise halves, and these back into checkerboard halves."""
    a, d = left.chunk(2, dim=1)
    b, c = right.chunk(2, dim=1)
    return torch.cat([a, b], dim=1), torch.cat([d, c], dim=1)  # (11)


def couple(nets, left, right):
    """Returns left and right after one coupling for each of the nets, and log |det| (N,).

    left, right: (N, c, H, W) each. nets: each maps one half to s and t. The first changes right, the second left, and
    so on."""
    log_det = 0
    for i, net in enumerate(nets):
        if i % 2 == 0:
            s, t = net(left)
            right = right * s.exp() + t  # (6)
        else:
            s, t = net(right)
            left = left * s.exp() + t  # (6)
        log_det = log_det + s.flatten(1).sum(1)  # (7)
    return left, right, log_det


def uncouple(nets, left, right):
    """The inverse of couple(): left and right, the last coupling first."""
    for i, net in reversed(list(enumerate(nets))):
        if i % 2 == 0:
            s, t = net(left)
            right = (right - t) * (-s).exp()  # (8)
        else:
            s, t = net(right)
            left = (left - t) * (-s).exp()  # (8)
    return left, right


# ------------------------------------------------------------------------------------------------- network ------------
# Any network from one half to s and t of its shape would do. These are small residual networks.
class ScaleShift(nn.Module):
    """The network of a coupling: one half (N, c, H, W) -> s and t, (N, c, H, W) each, both 0 before training."""

    def __init__(self, c, width, blocks):
        super().__init__()
        self.stem = nn.Conv2d(c, width, 3, padding=1)
        self.head = nn.Conv2d(width, 2 * c, 1)
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            conv1 = nn.Conv2d(width, width, 3, padding=1)
            conv2 = nn.Conv2d(width, width, 3, padding=1)
            self.blocks.append(nn.Sequential(nn.ReLU(), conv1, nn.ReLU(), conv2))
        self.scale = nn.Parameter(torch.ones(c, 1, 1))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, half):
        h = self.stem(half)  # (N, width, H, W)
        for block in self.blocks:
            h = h + block(h)
        r, t = self.head(F.relu(h)).chunk(2, dim=1)  # (N, c, H, W) each
        r = r.contiguous()  # after chunk() it is not, and on a CPU its tanh would be slow
        return self.scale * r.tanh(), t  # (9)


class Scale(nn.Module):
    """f_1 or f_2 of (12): couplings of checkerboard halves, then of channel-wise halves."""

    def __init__(self, c, width, blocks, couplings):
        super().__init__()
        self.by_board = nn.ModuleList([ScaleShift(2 * c, width, blocks) for _ in range(couplings)])
        self.by_channel = nn.ModuleList([ScaleShift(2 * c, width, blocks) for _ in range(couplings)])

    def forward(self, h):
        """h (N, c, H, W) -> h' and the latents, (N, 2 c, H/2, W/2) each, and log |det| (N,)."""
        left, right = checkerboard(h)
        left, right, log_det_board = couple(self.by_board, left, right)
        left, right = regroup(left, right)
        left, right, log_det_channel = couple(self.by_channel, left, right)
        return left, right, log_det_board + log_det_channel

    def inverse(self, left, right):
        left, right = uncouple(self.by_channel, left, right)
        left, right = regroup(left, right)
        left, right = uncouple(self.by_board, left, right)
        return from_checkerboard(left, right)


class Normalise(nn.Module):
    """Gives each pixel mean 0 and variance 1 over the logits that initialise() is given, then a learned gain and bias.

    forward(): h (N, *shape) -> y (N, *shape) and log |det ∂y/∂h|, (), which is the same for all images."""

    def __init__(self, shape):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def initialise(self, h):
        self.mean.copy_(h.mean(0))
        self.std.copy_(
            h.std(0, correction=0).clamp(min=1e-3)
        )  # at least 0.0045 by dequantisation, but 0 for a single image

    def forward(self, h):
        log_det = (self.gain - self.std.log()).sum()  # (13)
        return (h - self.mean) / self.std * self.gain.exp() + self.bias, log_det  # (13)

    def inverse(self, y):
        return (y - self.bias) * (-self.gain).exp() * self.std + self.mean  # (13)


class RealNVP(nn.Module):
    """f: logits h (N, channels, size, size) -> z (N, D) and log |det ∂z/∂h| (N,).

    couplings: how many of the checkerboard halves at each of the two scales, and as many of the channel-wise halves.
    ValueError unless size is a multiple of 4, couplings at least 2, and blocks at least 0."""

    def __init__(self, channels=1, size=28, width=16, blocks=1, couplings=3):
        super().__init__()
        if size % 4:
            raise ValueError(f"--size {size}: must be a multiple of 4, since images are squeezed twice")
        if couplings < 2 or blocks < 0:
            raise ValueError(f"--couplings {couplings} --blocks {blocks}: must be at least 2 and at least 0")
        self.shape = (channels, size, size)
        self.norm = Normalise(self.shape)
        self.scale1 = Scale(channels, width, blocks, couplings)
        self.scale2 = Scale(2 * channels, width, blocks, couplings)

    def forward(self, h):
        h, log_det = self.norm(h)
        h, z_1, log_det_1 = self.scale1(h)  # (N, 2 C, H/2, W/2) each
        h, z_2, log_det_2 = self.scale2(h)  # (N, 4 C, H/4, W/4) each
        z = torch.cat([z_1.flatten(1), z_2.flatten(1), h.flatten(1)], dim=1)  # (12)
        return z, log_det + log_det_1 + log_det_2

    def inverse(self, z):
        """f⁻¹: z (N, D) -> the logits h (N, channels, size, size)."""
        C, H, W = self.shape
        D = C * H * W
        z_1, z_2, h = z.split([D // 2, D // 4, D // 4], dim=1)  # (12)
        h = h.unflatten(1, (4 * C, H // 4, W // 4))
        h = self.scale2.inverse(h, z_2.view_as(h))  # (N, 2 C, H/2, W/2)
        h = self.scale1.inverse(h, z_1.view_as(h))  # (N, C, H, W)
        return self.norm.inverse(h)


# --------------------------------------------------------------------------------- method: the likelihood ------------
def dequantise(k, u):
    """Bytes 0 .. 255 of any type, and u of the same shape, uniform in [0, 1) -> real numbers in 0 .. 1."""
    return (k + u) / 256  # (1)


def bits_per_dim(nats, dims):
    """Log-density on [0, 1]^dims in nats -> bits/dim that a code for the bytes needs at most."""
    return 8 - nats / (dims * math.log(2))  # (2)


def to_logit(x):
    """Images x in 0 .. 1, ends included -> logits h of the same shape, and log |det ∂h/∂x| (N,)."""
    log_q = (ALPHA + (1 - 2 * ALPHA) * x).log()  # (3)
    log_1_minus_q = (ALPHA + (1 - 2 * ALPHA) * (1 - x)).log()  # (3), without cancellation near x = 1
    log_det = math.log(1 - 2 * ALPHA) - log_q - log_1_minus_q  # (3)
    return log_q - log_1_minus_q, log_det.flatten(1).sum(1)  # (3)


def log_normal(z):
    """log N(z; 0, I) of latents z (N, D) -> nats, (N,)."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)  # (5)


def log_prob(model, x):
    """log p(x) of dequantised images, (N, C, H, W), 0 .. 1, the Jacobian of the logit included -> nats, (N,)."""
    h, log_det_h = to_logit(x)
    z, log_det_z = model(h)
    return log_normal(z) + log_det_z + log_det_h  # (4)


def loss_bits(model, x):
    """The training loss: the mean bits/dim of dequantised images (N, C, H, W)."""
    return bits_per_dim(log_prob(model, x), x[0].numel()).mean()


@torch.inference_mode()
def image_bits(model, images, seed=0, chunk=500):
    """Bits/dim, (N,), of uint8 images (N, C, H, W), at one sample of u. The same seed gives the same u.

    ValueError if the images are not uint8."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, not {images.dtype}")
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    bits = []
    for k in images.split(chunk):
        x = dequantise(k.to(device), torch.rand(k.shape, generator=generator, device=device))
        bits.append(bits_per_dim(log_prob(model, x), x[0].numel()))
    return torch.cat(bits)


# ------------------------------------------------------------------------------------------------ training ------------
def train(
    images,
    iters=4600,
    batch=32,
    lr=2e-2,
    width=16,
    blocks=1,
    couplings=3,
    device="cpu",
    seed=0,
    path=None,
    fresh=False,
    data=None,
):
    """Trains on five sixths of uint8 images (N, C, H, H) and returns the EMA model. Seeds torch's global generator.

    path: the checkpoint, resumed unless fresh; data: the name of the data, stored in it. log.csv beside it
    has the bits/dim of the last 100 batches, and of 1000 of the other images, which are used for nothing else.
    ValueError if the checkpoint has other settings, FloatingPointError if the bits/dim are not finite."""
    settings = dict(method="realnvp", data=data, width=width, blocks=blocks, couplings=couplings, alpha=ALPHA)
    settings |= dict(iters=iters, batch=batch, lr=lr, seed=seed)
    settings |= image_settings(images)
    torch.manual_seed(seed)
    model = RealNVP(settings["channels"], settings["size"], width, blocks, couplings)
    images, validation = hold_out(images)
    k = images[torch.arange(1000) % len(images)]
    h, _ = to_logit(dequantise(k, torch.rand(k.shape)))
    model.norm.initialise(h)
    model = model.to(device)
    if torch.device(device).type == "cpu":
        model = model.to(memory_format=torch.channels_last)  # 1.15 times as fast on an AMD EPYC
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    opt = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99))
    graphed(model, torch.zeros(batch, *model.shape, device=device))
    images = images.to(device)
    losses = []

    def validate(log):
        """The bits/dim of validation images, measured about twenty times in a run and repeated in between."""
        is_last = len(log) == (iters - 1) // 100
        if len(log) % max(1, iters // 2000) and not is_last:
            return log[-1][-1]
        return image_bits(ema, validation[:1000]).mean().item()

    parts = dict(model=model, ema=ema, opt=opt)
    for i in iterations(iters, losses, parts, settings, path, fresh, "train_bits,valid_bits", validate):
        opt.param_groups[0]["lr"] = lr * min((i + 1) / 200, 1 - i / iters)  # warm-up, then linear decay
        k = images[torch.randint(len(images), (batch,), device=device)]
        x = dequantise(k, torch.rand(k.shape, device=device))
        loss = loss_bits(model, x)
        opt.zero_grad()
        loss.backward()
        opt.step()
        update_ema(ema, model, decay=min(0.995, (1 + i) / (10 + i)))
        losses.append(loss.detach())
    return ema


# ------------------------------------------------------------------- method: sampling and interpolation ------------
def from_logit(h):
    """The images of logits h, slightly outside 0 .. 1 for h beyond the range of to_logit()."""
    return (h.sigmoid() - ALPHA) / (1 - 2 * ALPHA)  # (3)


def to_images(model, z):
    """Latents z (N, D) -> images (N, C, H, W): 256 levels from -1 to 1, one for each byte."""
    x = from_logit(model.inverse(z))
    return (256 * x).floor().clamp(0, 255) / 127.5 - 1


@torch.inference_mode()
def sample(model, n, temperature=1.0, seed=0, chunk=100):
    """n images, (n, C, H, W), like those of to_images(), on the CPU. They are drawn in chunks."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    images = []
    for i in progress(range(0, n, chunk), "sampling, image"):
        eps = torch.randn(min(chunk, n - i), math.prod(model.shape), generator=generator, device=device)
        images.append(to_images(model, temperature * eps).cpu())  # (14)
    return torch.cat(images)


def interpolate_four(z, phi, phi_prime):
    """The four latents z (4, D) mixed by two angles in radians, (K,) each -> (K, D)."""
    phi = phi[:, None]
    phi_prime = phi_prime[:, None]
    first = phi_prime.cos() * z[0] + phi_prime.sin() * z[1]  # (15)
    second = phi_prime.cos() * z[2] + phi_prime.sin() * z[3]  # (15)
    return phi.cos() * first + phi.sin() * second  # (15)


# ------------------------------------------------------------------------------------------------- command ------------
def load(path, device="cpu"):
    """The EMA model in a checkpoint. Its images have the shape model.shape, (C, H, W)."""
    settings = load_checkpoint(path, "realnvp")["settings"]
    sizes = [settings[name] for name in ("channels", "size", "width", "blocks", "couplings")]
    model = RealNVP(*sizes)
    load_checkpoint(path, ema=model)
    return model.to(device).requires_grad_(False).eval()


def draw_temperatures(path, model, seed):
    """Saves six rows of eight images: the same ε at six temperatures."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    eps = torch.randn(8, math.prod(model.shape), generator=generator, device=device)
    rows = [to_images(model, T * eps) for T in (0.0, 0.5, 0.7, 0.8, 0.9, 1.0)]
    save_grid(path, torch.cat(rows))


def draw_interpolation(path, model, images):
    """Saves eight rows of eight images between four uint8 images, which are the corners."""
    device = next(model.parameters()).device
    four = images[torch.arange(4) % len(images)].to(device)  # the same again if there are fewer
    h, _ = to_logit(dequantise(four, 0.5))
    z, _ = model(h)
    angles = torch.linspace(0, math.pi / 2, 8, device=z.device)
    phi, phi_prime = torch.meshgrid(angles, angles, indexing="ij")
    save_grid(path, to_images(model, interpolate_four(z, phi.flatten(), phi_prime.flatten())))


def summary(nats, dims):
    """The mean of nats (N,) with its standard error, in nats and in bits/dim, as text."""
    mean = nats.mean().item()
    error = nats.std(correction=0).item() / len(nats) ** 0.5
    bits = bits_per_dim(mean, dims)
    bits_error = error / (dims * math.log(2))
    return f"{mean:.2f} +- {error:.2f} nats = {bits:.4f} +- {bits_error:.4f} bits/dim, mean of {len(nats)} images"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", default="digits", help="digits (drawn), mnist (downloaded), or a folder: IDX files or pictures")
    add("--size", type=positive, default=28, help="side of the images in pixels, a multiple of 4")
    add("--channels", type=int, choices=(1, 3), default=1, help="1 for grey, 3 for colour")
    add("--iters", type=positive, default=4600, help="training iterations")
    add("--batch", type=positive, default=32, help="batch size")
    add("--lr", type=float, default=2e-2, help="peak learning rate")
    add("--width", type=positive, default=16, help="channels of the networks for s and t")
    add("--blocks", type=int, default=1, help="residual blocks of the networks for s and t")
    add("--couplings", type=positive, default=3, help="couplings of each of the two splits at each of the two scales")
    add("--samples", type=positive, default=64, help="number of images to sample")
    add("--temperature", type=float, default=1.0, help="standard deviation of the sampled latents")
    add("--out", type=Path, default=Path("out/realnvp"), help="run folder")
    add("--device", type=pick_device, default=pick_device(), help="where to compute")
    add("--seed", type=int, default=0, help="seed; on a CPU the same seed gives the same bits")
    add("--fresh", action="store_true", help="train from scratch over the checkpoint in --out")
    args = parse_args(parser, argv)
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature {args.temperature}: must be 0 or more, and finite")

    images = load_images(args.data, args.size, args.channels)
    test = load_images(args.data, args.size, args.channels, test=True)
    print(f"{len(images)} images of {args.size}x{args.size}x{args.channels} from {args.data}, on {args.device}")
    settings = args.iters, args.batch, args.lr, args.width, args.blocks, args.couplings, args.device, args.seed
    model = train(images, *settings, args.out / "model.pt", args.fresh, args.data)

    save_samples(args.out, sample(model, args.samples, args.temperature, args.seed))
    draw_temperatures(args.out / "temperatures.png", model, args.seed)
    draw_interpolation(args.out / "interpolation.png", model, test)
    dims = math.prod(model.shape)
    nats = (8 - image_bits(model, test)) * dims * math.log(2)  # the inverse of bits_per_dim()
    print(f"test: {summary(nats, dims)}")
    print(
        f"{args.samples} samples at temperature {args.temperature}: {args.out}/samples.png, samples.npy, "
        "temperatures.png, interpolation.png (the corners are test images)"
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


def hold_out(images):
    """Images to train on, and a sixth of them for validation, chosen at random, always alike. One image is in both."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    n = max(1, len(images) // 6)
    return images[order[n:] if len(images) > 1 else order], images[order[:n]]


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
