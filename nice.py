# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""NICE: a normalizing flow. An invertible network maps images to independent latent variables.

The density of an image is known exactly: it is that of its latent variables times the change of
volume. Training maximises it. Run backwards, the network turns noise into images.

Paper: Dinh, Krueger, Bengio, "NICE: Non-linear Independent Components Estimation", 2014,
arXiv:1410.8516. Numbers in brackets on the right, such as [§3.2], are the paper's sections.

symbol     in the code       meaning
k, x       k, x              images (N, C, H, W): bytes 0 .. 255, and real numbers 0 .. 1; D = C H W
x_1, x_2   a, b              components of x with even and with odd index, half of D each
m          m                 network of a coupling: from one half to a shift of the other
y          y                 output of the couplings, (N, D)
s          model.s           logarithms of the scales, (D,)
h = f(x)   model(x)          latent variables exp(s) y, (N, D), and log |det ∂h/∂x|, (N,)
f⁻¹(h)     model.inverse(h)  images, (N, D)
p_X, p_H                     densities of x and of h; log_prob and log_logistic, (N,), are in nats

Data. Bytes are discrete: a density model could put a spike on each of the 256 values and raise
its likelihood without bound. So uniform noise spreads each byte over its bin (dequantisation):

  (1)  x = (k + u) / 256,  u uniform in [0, 1);  and back, k = ⌊256 x⌋                       [§5.1]

All x with bytes k fill a bin of volume 256^-D. Its probability is P(k) = 256^-D 𝔼_u[p_X(x)]. As
log 𝔼_u[p_X(x)] ≥ 𝔼_u[log p_X(x)], by Jensen's inequality, an ideal code for the bytes needs at most

  (2)  -log_2 P(k) / D ≤ 8 - 𝔼_u[log p_X(x)] / (D ln 2)  bits/dim

Change of variables. Let f map x to h, one to one. A small volume keeps its probability,
p_X(x) dx = p_H(h) dh, and the ratio dh / dx of the volumes is |det ∂h/∂x|:

  (3)  log p_X(x) = log p_H(h) + log |det ∂h/∂x|,  h = f(x)                                    [§2]

If f is a composition of simple steps, their Jacobians J_1, J_2, ... multiply by the chain rule,
and so do the determinants:

  (4)  log |det ∂h/∂x| = Σ_j log |det J_j|

Couplings. An additive coupling shifts one half of the components by a function of the other half:

  (5)  y_1 = x_1,  y_2 = x_2 + m(x_1)                                                        [§3.2]

Its Jacobian [[I, 0], [∂m/∂x_1, I]] is triangular, with ones on the diagonal: log |det| = 0. And
since y_1 = x_1, the inverse computes the same m(x_1) and subtracts it. So m can be any network:

  (6)  x_1 = y_1,  x_2 = y_2 - m(y_1)                                                        [§3.2]

The next coupling shifts the other half. After three, each component depends on all others.

Scaling. Couplings preserve volume, so p_X could nowhere exceed the maximum of p_H. One learned
scale per component removes this limit:

  (7)  h_i = exp(s_i) y_i,  log |det ∂h/∂y| = Σ_i s_i                                        [§3.3]

All h_i have the same variance, so the standard deviation of y_i is proportional to exp(-s_i): large
where images differ, small where they carry noise. Sorted, exp(-s) is a spectrum like that of a PCA.

Prior. The h_i are independent. Each has the standard logistic distribution, whose cumulative
distribution function is sigmoid and whose density is sigmoid' = sigmoid (1 - sigmoid):

  (8)  log p_H(h) = Σ_i log sigmoid'(h_i) = -Σ_i (log(1 + exp(h_i)) + log(1 + exp(-h_i)))    [§3.4]

To sample, apply the inverse of sigmoid to uniform numbers, then the inverse of f:

  (9)  h_i = log u_i - log(1 - u_i),  u_i uniform in (0, 1);  x = f⁻¹(h)

In-painting. The observed part x_O of an image is given. The hidden part x_H starts as uniform noise
and climbs by noisy gradient ascent, always clipped to 0 .. 1. In step i = 0, 1, 2, ...

  (10)  x_H ← x_H + α_i (∂ log p_X(x_O, x_H)/∂x_H + ε),  ε ~ N(0, I),  α_i = 10 / (100 + i)  [§5.2]

Pitfalls:
- Without the determinant, (3) is the density of h, not of x, and training only shrinks h. Break it:
  delete "+ log_det" from the line tagged (3) and test_nice_eq3_eq4_density fails.
- f maps images to noise, and exp(s) multiplies in this direction. Sampling multiplies by exp(-s).
- p_X is a density on [0, 1]^D, so log p_X can be positive. On [0, 256]^D it is D ln 256 lower. The
  paper's 1980.50 nats for MNIST are 4.356 bits/dim by (2).

Differences from the paper:
- A smaller network (--layers 5 --width 1000 is the paper's) makes 13 passes over MNIST, not 1500.
- The output of m is multiplied by the standard deviation of what it shifts. s starts where h has
  the variance of (8), and has ten times the learning rate. Both rates decay to zero. AdamW decays
  the weights and biases of m, against overfitting. The result is the EMA of the weights where the
  validation likelihood was best. Colour images are not whitened.
- In (10) the gradient is clipped to -1 .. 1. Unclipped it reaches exp(s_i), over 1000 for pixels
  that are always black, and these jump between 0 and 1 at every step. The authors' script divides
  the gradient by 100, its number of images, and clips nothing.

python nice.py --data mnist --samples 2000    trains in 107 s on two cores; 4.177 bits/dim
python nice.py --inpaint 5000                 in-paints again, with five times as many steps
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


# ---------------------------------------------------------------------------------- method: the couplings ------------
def even_odd(x):
    """The components of x (N, D) with even index, (N, D - D // 2), and with odd index, (N, D // 2)."""
    return x[:, 0::2], x[:, 1::2]


def interleave(a, b):
    """The inverse of even_odd(): x (N, D)."""
    x = a.new_empty(len(a), a.shape[1] + b.shape[1])
    x[:, 0::2] = a
    x[:, 1::2] = b
    return x


def couple_all(x, ms):
    """x (N, D) -> y (N, D), after one coupling for each network of ms. The first shifts b, the second a, and so on."""
    a, b = even_odd(x)
    for i, m in enumerate(ms):
        if i % 2 == 0:
            b = b + m(a)  # (5)
        else:
            a = a + m(b)  # (5)
    return interleave(a, b)


def uncouple_all(y, ms):
    """The inverse of couple_all(): x (N, D) from y (N, D), the last coupling first."""
    a, b = even_odd(y)
    for i, m in reversed(list(enumerate(ms))):
        if i % 2 == 0:
            b = b - m(a)  # (6)
        else:
            a = a - m(b)  # (6)
    return interleave(a, b)


# ------------------------------------------------------------------------------------------------- network ------------
# Any m from one half to the other would do: a coupling is inverted without inverting m. These are small MLPs.
class MLP(nn.Module):
    """m: one half (N, d_in) -> the shift of the other half, (N, d_out); zero before NICE.initialise().

    The output is in units of the standard deviations (d_out,) of what it shifts, as measured by NICE.initialise(). On
    MNIST these differ by a factor of 400, but Adam moves all weights by about the same amount: without the units, 1500
    iterations end 170 nats lower."""

    def __init__(self, d_in, d_out, width, layers):
        super().__init__()
        sizes = [d_in] + layers * [width]
        hidden = []
        for n, n_next in zip(sizes, sizes[1:]):
            hidden += [nn.Linear(n, n_next), nn.ReLU(inplace=True)]
        self.hidden = nn.Sequential(*hidden)
        self.last = nn.Linear(sizes[-1], d_out)
        self.register_buffer("unit", torch.ones(d_out))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, half):
        return self.last(self.hidden(half)) * self.unit


class NICE(nn.Module):
    """f: x (N, channels, size, size) or (N, D) -> h (N, D) and log |det ∂h/∂x| (N,). ValueError if D is 1."""

    def __init__(self, channels=1, size=28, width=256, layers=3, couplings=4):
        super().__init__()
        self.shape = (channels, size, size)
        D = channels * size * size
        if D < 2:
            raise ValueError(f"--size {size} --channels {channels}: one component cannot be split into two halves")
        self.m = nn.ModuleList()
        for i in range(couplings):
            d_in = D - D // 2 if i % 2 == 0 else D // 2
            self.m.append(MLP(d_in, D - d_in, width, layers))
        self.s = nn.Parameter(torch.zeros(D))

    @torch.no_grad()
    def initialise(self, x):
        """Fits the model to a few thousand dequantised images x. Every h_i begins with mean 0 (if there are at least
        two couplings) and mean square 1.8², which is about π²/3, the variance of the standard logistic."""
        a, b = even_odd(x.flatten(1))
        for i, m in enumerate(self.m):
            half = b if i % 2 == 0 else a
            m.unit.copy_(half.std(0, correction=0))
            if i < 2:  # the first two centre the halves
                m.last.bias.copy_(-half.mean(0) / m.unit)
        y = couple_all(x.flatten(1), self.m)
        root_mean_square = y.square().mean(0).sqrt()
        self.s.copy_((1.8 / root_mean_square).log())

    def forward(self, x):
        y = couple_all(x.flatten(1), self.m)
        h = y * self.s.exp()  # (7)
        log_det = self.s.sum()  # (7); the couplings add 0
        return h, log_det.expand(len(x))  # (4)

    def inverse(self, h):
        """f⁻¹: h (N, D) -> x (N, D)."""
        y = h * (-self.s).exp()  # (7)
        return uncouple_all(y, self.m)


# --------------------------------------------------------------------------------- method: the likelihood ------------
def dequantise(k, u):
    """Bytes 0 .. 255 of any type, and u of the same shape, uniform in [0, 1) -> real numbers in 0 .. 1."""
    return (k + u) / 256  # (1)


def bits_per_dim(nats, dims):
    """Log-density on [0, 1]^dims in nats -> bits/dim that a code for the bytes needs at most."""
    return 8 - nats / (dims * math.log(2))  # (2)


def log_logistic(h):
    """log p_H of independent standard logistic variables h (N, D) -> nats, (N,), even where exp(h) overflows."""
    return (-h - 2 * F.softplus(-h)).sum(1)  # (8), since softplus(h) = log(1 + exp(h)) = h + softplus(-h)


def log_prob(model, x):
    """log p_X of dequantised images, (N, C, H, W) or (N, D), 0 .. 1 -> nats, (N,)."""
    h, log_det = model(x)
    return log_logistic(h) + log_det  # (3)


@torch.inference_mode()
def measure(model, images, seed=0, chunk=1000):
    """log p_X in nats, (N,), of uint8 images (N, C, H, W), at one sample of u. The same seed gives the same u.

    ValueError if the images are not uint8."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, not {images.dtype}")
    device = model.s.device
    generator = torch.Generator(device).manual_seed(seed)
    nats = []
    for k in images.split(chunk):
        u = torch.rand(k.shape, generator=generator, device=device)
        nats.append(log_prob(model, dequantise(k.to(device), u)))
    return torch.cat(nats)


# ------------------------------------------------------------------------------------------------ training ------------
def train(
    images,
    iters=10000,
    batch=64,
    lr=3e-3,
    width=256,
    layers=3,
    couplings=4,
    device="cpu",
    seed=0,
    path=None,
    fresh=False,
    data=None,
):
    """Trains on five sixths of uint8 images (N, C, H, H). Returns the EMA model of the iteration at which the rest,
    the validation images, had the highest likelihood. Seeds torch's global generator.

    path: the checkpoint, resumed unless fresh; data: the name of the data, stored in it. log.csv beside it
    has mean log p_X in nats, of the last 100 batches and of the validation images.
    ValueError if the checkpoint has other settings, FloatingPointError if a likelihood is not finite."""
    settings = dict(method="nice", data=data, width=width, layers=layers, couplings=couplings)
    settings |= dict(iters=iters, batch=batch, lr=lr, seed=seed)
    settings |= image_settings(images)
    torch.manual_seed(seed)
    images, validation = hold_out(images)
    images = images.to(device)
    model = NICE(settings["channels"], settings["size"], width, layers, couplings).to(device)
    n = min(5000, 10 + 4_000_000 // images[0].numel())  # fewer of large images, to save memory
    k = images[torch.randint(len(images), (n,), device=device)]
    model.initialise(dequantise(k, torch.rand(k.shape, device=device)))
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    best = copy.deepcopy(ema)
    groups = [dict(params=model.m.parameters(), weight_decay=0.3), dict(params=[model.s])]
    opt = torch.optim.AdamW(groups, lr, betas=(0.9, 0.99), weight_decay=0, fused=True)
    graphed(model, torch.zeros(batch, *model.shape, device=device))
    parts = dict(model=model, ema=ema, opt=opt, best=best)
    losses = []

    def validate(log):
        """The validation likelihood, measured about twenty times in a run and repeated in between. Keeps the best."""
        is_last = len(log) == (iters - 1) // 100
        if len(log) % max(1, iters // 2000) and not is_last:
            return log[-1][-1]
        nats = measure(ema, validation).mean().item()
        if all(nats > row[-1] for row in log):
            best.load_state_dict(ema.state_dict())
        return nats

    for i in iterations(iters, losses, parts, settings, path, fresh, "train_nats,valid_nats", validate):
        factor = min((i + 1) / 200, 1 - i / iters)  # warm-up, then linear decay
        opt.param_groups[0]["lr"] = lr * factor
        opt.param_groups[1]["lr"] = 10 * lr * factor  # Adam moves a parameter by about lr a step; s has far to go
        k = images[torch.randint(len(images), (batch,), device=device)]
        x = dequantise(k, torch.rand(k.shape, device=device))
        nats = log_prob(model, x).mean()
        opt.zero_grad()
        (-nats).backward()
        opt.step()
        update_ema(ema, model, decay=min(0.995, (1 + i) / (10 + i)))
        losses.append(nats.detach())
    return best


# --------------------------------------------------------------------- method: sampling and in-painting ------------
def logistic(u):
    """Standard logistic variables from uniform u of any shape; values of 0 and 1 are first moved inside (0, 1)."""
    eps = torch.finfo(u.dtype).eps
    u = u.clamp(eps, 1 - eps)
    return u.log() - torch.log1p(-u)  # (9)


def quantise(x):
    """The bytes, uint8, whose bins contain the real numbers x. Numbers outside 0 .. 1 are clipped."""
    return (256 * x).floor().clamp(0, 255).to(torch.uint8)  # (1)


@torch.inference_mode()
def sample(model, n, temperature=1.0, seed=0, chunk=1000):
    """n images, (n, C, H, W), on the CPU: 256 levels from -1 to 1, one for each byte. temperature multiplies h."""
    device = model.s.device
    generator = torch.Generator(device).manual_seed(seed)
    u = torch.rand(n, len(model.s), generator=generator, device=device)
    images = []
    for part in u.split(chunk):
        x = model.inverse(temperature * logistic(part))  # (9)
        images.append(quantise(x).cpu())
    return torch.cat(images).unflatten(1, model.shape).float() / 127.5 - 1


def inpainting_masks(size, generator=None):
    """The paper's ten masks, bool (10, 1, size, size), True for known pixels. The hidden pixels are, in turn, the upper
    half, the lower half, those with odd index, those with even index, the left half, the right half, the middle rows,
    the middle columns, 75 % at random, 90 % at random."""
    i, j = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    half, quarter = size // 2, size // 4
    odd = (i * size + j) % 2 == 1
    u = torch.rand(size, size, generator=generator)
    hidden = [i < half, i >= half, odd, ~odd, j < half, j >= half]
    hidden += [(quarter <= index) & (index < size - quarter) for index in (i, j)]
    hidden += [u < 0.75, u < 0.9]
    return ~torch.stack(hidden)[:, None]


def inpaint(model, x, known, steps=1000, generator=None, clip=1.0):
    """Images x (N, C, H, W) in 0 .. 1, with new pixels where known is False. known: bool, (N, 1, H, W) or like x.

    Hidden pixels of x are ignored: they start as uniform noise. The gradient is clipped to -clip .. clip."""
    y = torch.where(known, x, torch.rand(x.shape, generator=generator, device=x.device))
    for i in range(steps):
        y.requires_grad_()
        gradient = torch.autograd.grad(log_prob(model, y).sum(), y)[0]
        eps = torch.randn(x.shape, generator=generator, device=x.device)
        step = 10 / (100 + i) * (gradient.clamp(-clip, clip) + eps)  # (10)
        y = torch.where(known, x, (y.detach() + step).clamp(0, 1))  # (10)
    return y


# ------------------------------------------------------------------------------------------------- command ------------
def load(path, device="cpu"):
    """The best model in a checkpoint, as train() returns it. Its images have the shape model.shape, (C, H, W)."""
    settings = load_checkpoint(path, "nice")["settings"]
    sizes = [settings[name] for name in ("channels", "size", "width", "layers", "couplings")]
    model = NICE(*sizes)
    load_checkpoint(path, best=model)
    return model.to(device).requires_grad_(False).eval()


def draw_inpainting(path, model, images, steps, seed):
    """Saves a row for each mask. It shows each of the uint8 images three times: whole, known pixels only, result."""
    device = model.s.device
    known = inpainting_masks(images.shape[-1], torch.Generator().manual_seed(seed)).to(device)
    known = known.repeat_interleave(len(images), 0)  # (10 n, 1, H, W)
    x = dequantise(images.to(device), 0.5).repeat(10, 1, 1, 1)  # (10 n, C, H, W)
    result = inpaint(model, x, known, steps, torch.Generator(device).manual_seed(seed))
    triples = torch.stack([x, torch.where(known, x, 0.5), result], dim=1)
    save_grid(path, quantise(triples.flatten(0, 1)).float() / 127.5 - 1, columns=3 * len(images))


def draw_spectrum(path, model):
    """Saves a plot of exp(-s), sorted. The vertical axis is logarithmic, with a line at each power of ten."""
    log_scale = (-model.s.cpu() / math.log(10)).sort(descending=True).values.tolist()
    low, high = math.floor(log_scale[-1]), math.ceil(log_scale[0])
    image = Image.new("RGB", (720, 360), "white")
    draw = ImageDraw.Draw(image)

    def height(power):
        return 340 - 320 * (power - low) / max(high - low, 1)

    for power in range(low, high + 1):
        draw.line((70, height(power), 700, height(power)), "#dddddd")
        draw.text((60, height(power)), f"1e{power}", "black", ImageFont.load_default(14), "rm")
    points = [(70 + 630 * i / len(log_scale), height(power)) for i, power in enumerate(log_scale)]
    draw.line(points, "#2471a3", 3)
    image.save(path)


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
    add("--size", type=positive, default=28, help="side of the images in pixels")
    add("--channels", type=int, choices=(1, 3), default=1, help="1 for grey, 3 for colour")
    add("--iters", type=positive, default=10000, help="training iterations")
    add("--batch", type=positive, default=64, help="batch size")
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--width", type=positive, default=256, help="units in a hidden layer; the paper has 1000")
    add("--layers", type=positive, default=3, help="hidden layers of a coupling; the paper has 5")
    add("--couplings", type=positive, default=4, help="number of couplings; below 3 some components do not interact")
    add("--samples", type=positive, default=64, help="number of images to sample")
    add("--temperature", type=float, default=1.0, help="multiplies h; below 1, samples are safer and less varied")
    add("--inpaint", type=int, default=1000, help="steps of in-painting; 0 for none")
    add("--out", type=Path, default=Path("out/nice"), help="run folder")
    add("--device", type=pick_device, default=pick_device(), help="where to compute")
    add("--seed", type=int, default=0, help="seed; on a CPU the same seed gives the same bits")
    add("--fresh", action="store_true", help="train from scratch over the checkpoint in --out")
    args = parse_args(parser, argv)
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature {args.temperature}: must be 0 or more, and finite")
    if args.inpaint < 0:
        raise ValueError(f"--inpaint {args.inpaint}: must be 0 or more")

    images = load_images(args.data, args.size, args.channels)
    test = load_images(args.data, args.size, args.channels, test=True)
    print(f"{len(images)} images of {args.size}x{args.size}x{args.channels} from {args.data}, on {args.device}")
    settings = args.iters, args.batch, args.lr, args.width, args.layers, args.couplings, args.device, args.seed
    model = train(images, *settings, args.out / "model.pt", args.fresh, args.data)

    save_samples(args.out, sample(model, args.samples, args.temperature, args.seed))
    if args.inpaint:
        draw_inpainting(args.out / "inpainting.png", model, test[:4], args.inpaint, args.seed)
    scales = (-model.s).exp()
    print(f"exp(-s) of the components: {scales.min():.5f} to {scales.max():.3f}, median {scales.median():.4f}")
    draw_spectrum(args.out / "spectrum.png", model)
    training, validation = hold_out(images)
    for name, part in ("train", training[:10_000]), ("validation", validation), ("test", test):
        print(f"{name}: {summary(measure(model, part), len(model.s))}")
    print(
        f"{args.samples} samples: {args.out}/samples.png, samples.npy, spectrum.png (exp(-s))"
        f"{', inpainting.png (image, known pixels, result)' if args.inpaint else ''}"
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
