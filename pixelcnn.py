# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""PixelCNN: the exact probability of an image, as a chain of classifiers that predict pixel by pixel.

The probability is a product with one factor for each number of the image: a classifier that
predicts this number from those before it. One masked convolutional network computes all of them in
one pass.

Papers: van den Oord, Kalchbrenner, Kavukcuoglu, "Pixel Recurrent Neural Networks", ICML 2016,
arXiv:1601.06759, whose equations are those in brackets at the right; the two stacks are from van
den Oord et al., "Conditional Image Generation with PixelCNN Decoders", 2016, arXiv:1606.05328.

symbol    in the code            meaning
x         x                      images of levels 0 .. K-1, integers, (N, C, H, W); D = C H W
x_d       x[:, c, i, j]          number d = 1 .. D of an image, in the order row, column, colour
x_<d      -                      all numbers before x_d
K         levels                 number of values: 2 (bits) .. 256 (bytes)
l_d       logits[:, :, c, i, j]  K logits for x_d; logits = model(x) is (N, K, C, H, W)
v         v                      output of the vertical stack, (N, F, H, W), F = --width
u_d       u[:, c, i, j]          uniform on [0, 1): decides the sample of x_d

The chain rule. A vector of D bits has 2^D values, too many for a table of p(x). But in any order of
the numbers, exactly,

  (1)  log p(x) = Σ_d log p(x_d | x_<d)                                                         [1]

Each factor is a classifier: its classes are the K values of x_d, its input is x_<d. With a softmax,

  (2)  p(x_d = k | x_<d) = exp(l_dk) / Σ_k' exp(l_dk'),  where l_d depends on x_<d alone

Masks. If K = 2 and l is linear in x, these are D logistic regressions (a fully visible sigmoid
belief net). Their log-odds are A x + b, with a strictly lower triangular matrix A. So a mask on A
lets one network compute all D factors, and in training, where x is known, in one pass. With several
layers,

  (3)  the first layer uses only what comes before x_d (mask A), later layers also their input at d
       (mask B),

because lower triangular times strictly lower triangular is strictly lower triangular. A convolution
is such a matrix if its kernel keeps only the rows above and, in its own row, the pixels to the
left. At the pixel itself, input and output channels are divided among the colours, as equally as
possible:

  (4)  colour c sees the colours c' < c (mask A: R sees none, G sees R, B sees R and G) or c' ≤ c
       (mask B)                                                                                 [2]

Two stacks. Layers of such kernels leave a blind spot. A 3x3 kernel sees one column to the right of
x in the row above, two layers see two columns to the right two rows up, and so on:

       # # # # # # #       x: the pixel to predict
       # # # # # # o       #: seen, if there are enough layers
       # # # # # o o       o: never seen, however many layers there are
       # # # x - - -       -: not yet sampled

The vertical stack sees the rows above. Its input is shifted down by one row, so its kernels need no
mask. The horizontal stack is masked. It sees v, and in its own row what comes before x. Together
they have no blind spot. The layers limit how far they see: by default 8 rows up, 13 columns right.

  (5)  v = vertical(rows above),  l = horizontal(row so far, v)

  (6)  loss = -1/N Σ_images log p(x), in nats

  (7)  K = 2: x = 1 with probability byte / 255, else 0;  K > 2: x = ⌊K byte / 256⌋

  (8)  bits/dim = -log p(x) / (D ln 2)

Sampling generates one number after another. The level is the first whose cumulative probability
exceeds u_d, so it is the number of levels whose cumulative probability does not. That of the last
level is 1, and needs no comparison:

  (9)  x_d = #{k < K - 1 : p(x_d ≤ k | x_<d) ≤ u_d}

With whole passes, this takes D of them. But a new number requires only one column of one row in the
horizontal stack, and a new row only one row of the vertical stack. Together they cost one pass (C
horizontal passes for C colours), if each layer caches the inputs that its kernel will need again.

Pitfalls:
- Mask A is for the first layer only. Break it: write "B" for "A" in `self.left`, and
  test_pixelcnn_eq3_eq4_eq5_sees_what_is_before fails. 1x1 convolutions need (4), too.
- Nats are per image, bits/dim per number. Dynamically binarised MNIST (bits sampled at each use, as
  here in training) and statically binarised MNIST are different data sets; do not compare figures.
- Sums with the cache round differently from whole passes, by about 1e-6. A sample may differ if u_d
  is as close as that to a cumulative probability.

Differences from the papers: v enters the horizontal stack once, at its first layer; residual blocks
with ReLU, not gates; a learned position embedding; Adam with a decaying rate; EMA.

python pixelcnn.py --data mnist    two and a half minutes of training on two cores
python pixelcnn.py --plain         samples without the cache as well: the same pixels, minutes later
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


# ------------------------------------------------------------------------------------------------- network ------------
# Any model whose l_d depends on x_<d alone would do for the loss and for sample_plain(). The cache needs these stacks.
def causal_mask(kind, c_out, c_in, k, colours):
    """The mask of a 1 x k kernel whose last column is the pixel itself, (c_out, c_in, 1, k). kind: "A" or "B".

    Channels are in the order of their colours: all of R, then all of G, then all of B."""
    out_colour = torch.arange(c_out) * colours // c_out
    in_colour = torch.arange(c_in) * colours // c_in
    mask = torch.ones(c_out, c_in, 1, k)
    if kind == "A":
        mask[:, :, 0, -1] = (in_colour < out_colour[:, None]).float()  # (4)
    else:
        mask[:, :, 0, -1] = (in_colour <= out_colour[:, None]).float()  # (4)
    return mask


class Above(nn.Conv2d):
    """A convolution whose r x k kernel ends at its own row and is centred on its own column, k odd.

    forward() maps all rows, (N, c_in, H, W) -> (N, c_out, H, W). row() maps one row, and takes the r - 1 rows above it
    from the cache, a dictionary {layer: rows}."""

    def __init__(self, c_in, c_out, r, k):
        super().__init__(c_in, c_out, (r, k), padding=(0, k // 2))

    def forward(self, h):
        return super().forward(F.pad(h, (0, 0, self.kernel_size[0] - 1, 0)))  # (5)

    def start(self, u):
        """What the cache holds before the first row of images like u, (N, C, H, W): r - 1 rows of zeros."""
        return u.new_zeros(len(u), self.in_channels, self.kernel_size[0] - 1, u.shape[3])

    def row(self, h, cache):
        """The next row: h (N, c_in, 1, W) -> (N, c_out, 1, W)."""
        h = torch.cat([cache[self], h], dim=2)  # (N, c_in, r, W)
        cache[self] = h[:, :, 1:]  # the next row will not need the oldest
        return super().forward(h)  # (5)


class Left(nn.Conv2d):
    """A masked convolution whose 1 x k kernel ends at its own pixel.

    forward() maps all pixels, (N, c_in, H, W) -> (N, c_out, H, W). column() maps one pixel, and takes the k - 1 pixels
    to its left from the cache, a dictionary {layer: (masked weights, columns of the current row)}."""

    def __init__(self, kind, c_in, c_out, k, colours):
        super().__init__(c_in, c_out, (1, k))
        self.register_buffer("mask", causal_mask(kind, c_out, c_in, k, colours), persistent=False)

    def forward(self, h):
        h = F.pad(h, (self.kernel_size[1] - 1, 0))
        return F.conv2d(h, self.weight * self.mask, self.bias)  # (5)

    def start(self, u):
        """What the cache holds at first for images like u, (N, C, H, W): the masked weights as a matrix, and zeros.

        Column j is to be written at j + k - 1. The k - 1 columns on the left stay zero: they are the padding."""
        matrix = (self.weight * self.mask)[:, :, 0].transpose(1, 2).flatten(1)  # (c_out, k c_in)
        columns = u.new_zeros(len(u), u.shape[3] + self.kernel_size[1] - 1, self.in_channels)
        return matrix, columns

    def column(self, h, j, cache):
        """Column j of one row: h (N, c_in) -> (N, c_out). Columns beyond j are of the row above, and not read."""
        matrix, columns = cache[self]
        k = self.kernel_size[1]
        if k > 1:
            columns[:, j + k - 1] = h  # a second call for j, with more colours known, replaces the first
            h = columns[:, j : j + k].flatten(1)  # columns j - k + 1 .. j, (N, k c_in)
        return F.linear(h, matrix, self.bias)  # (5)


class PixelCNN(nn.Module):
    """Levels (N, channels, size, size) -> logits (N, levels, channels, size, size). ValueError if width < channels."""

    def __init__(self, channels=1, size=28, levels=2, width=32, layers=5):
        super().__init__()
        if width < channels:
            raise ValueError(f"--width {width}: each of {channels} colours needs a channel")
        self.shape = (channels, size, size)
        self.levels = levels
        self.position = nn.Parameter(torch.zeros(width, size, size))  # digits are centred, so the place says much
        self.above = Above(channels, width, 3, 7)
        self.across = nn.Conv2d(width, width, 1)
        self.down = nn.ModuleList()  # residual blocks of the vertical stack
        for _ in range(layers):
            self.down.append(nn.ModuleList([Above(width, width, 2, 5), nn.Conv2d(width, width, 1)]))
        self.left = Left("A", channels, width, 4, channels)  # (3)
        self.right = nn.ModuleList()  # residual blocks of the horizontal stack
        for _ in range(layers):
            block = [Left("B", width, width, 3, channels), Left("B", width, width, 1, channels)]
            self.right.append(nn.ModuleList(block))
        head = [Left("B", width, width, 1, channels), Left("B", width, channels * levels, 1, channels)]
        self.head = nn.ModuleList(head)
        for _, last in [*self.down, *self.right]:
            nn.init.zeros_(last.weight)  # at first little is added to the skip connection

    def vertical(self, x):
        """Images -1 .. 1, (N, C, H, W), shifted down by a row -> v (N, F, H, W)."""
        h = self.above(x) + self.position
        for first, last in self.down:
            h = h + last(F.relu(first(F.relu(h))))
        return self.across(F.relu(h))

    def vertical_row(self, x, i, cache):
        """The same for row i alone. x: row i of the shifted images, (N, C, 1, W) -> v (N, F, 1, W)."""
        h = self.above.row(x, cache) + self.position[:, i : i + 1]
        for first, last in self.down:
            h = h + last(F.relu(first.row(F.relu(h), cache)))
        return self.across(F.relu(h))

    def horizontal(self, x, v):
        """Images -1 .. 1, (N, C, H, W), and v (N, F, H, W) -> logits (N, K, C, H, W)."""
        h = self.left(x) + v
        for first, last in self.right:
            h = h + last(F.relu(first(F.relu(h))))
        first, last = self.head
        logits = last(F.relu(first(F.relu(h))))  # (N, C K, H, W)
        return logits.unflatten(1, (-1, self.levels)).transpose(1, 2)

    def horizontal_column(self, x, v, j, cache):
        """The same for the pixel in column j of one row: x (N, C), v (N, F) -> logits (N, K, C)."""
        h = self.left.column(x, j, cache) + v
        for first, last in self.right:
            h = h + last.column(F.relu(first.column(F.relu(h), j, cache)), j, cache)
        first, last = self.head
        logits = last.column(F.relu(first.column(F.relu(h), j, cache)), j, cache)  # (N, C K)
        return logits.unflatten(1, (-1, self.levels)).transpose(1, 2)

    def forward(self, x):
        x = from_levels(x, self.levels)
        v = self.vertical(F.pad(x, (0, 0, 1, -1)))  # (5)
        return self.horizontal(x, v)  # (5)


# ---------------------------------------------------------------------------------------- method: the loss ------------
def to_levels(images, levels, generator=None):
    """uint8 images -> levels 0 .. levels-1, int64. With two levels the result is random. ValueError for other types."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, 0 .. 255, not {images.dtype}")
    if levels == 2:
        return (255 * torch.rand(images.shape, generator=generator, device=images.device) < images).long()  # (7)
    return images.long() * levels // 256  # (7)


def from_levels(x, levels):
    """Levels -> -1 .. 1, the input of the network."""
    return x * (2 / (levels - 1)) - 1


def log_prob(model, x):
    """log p(x) of levels x (N, C, H, W), in nats -> (N,). model: levels -> logits (N, K, C, H, W)."""
    log_p = -F.cross_entropy(model(x), x.long(), reduction="none")  # (2)
    return log_p.flatten(1).sum(1)  # (1)


def loss_nats(model, x):
    """The loss of levels x: nats per image."""
    return -log_prob(model, x).mean()  # (6)


# ------------------------------------------------------------------------------------------------ training ------------
def train(
    images,
    iters=3000,
    batch=16,
    lr=1e-2,
    levels=2,
    width=32,
    layers=5,
    device="cpu",
    seed=0,
    path=None,
    fresh=False,
    data=None,
):
    """Trains on uint8 images (N, C, H, H) and returns the EMA model. Seeds torch's global generator.

    A sixth of the images is for validation: some ten times, the EMA model's nats on 500 of them enter the log.
    path: the checkpoint, resumed unless fresh; data: the name of the data, stored in it.
    ValueError if the checkpoint has other settings, FloatingPointError if the loss is not finite."""
    settings = dict(method="pixelcnn", data=data, levels=levels, width=width, layers=layers)
    settings |= dict(iters=iters, batch=batch, lr=lr, seed=seed) | image_settings(images)
    rank, world = processes(device, batch)
    torch.manual_seed(seed)
    model = PixelCNN(settings["channels"], settings["size"], levels, width, layers).to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    opt = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99))
    x = torch.zeros(batch, *model.shape, dtype=torch.long, device=device)
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else graphed(model, x)
    images, validation = hold_out(images)
    images = images.to(device)
    mine = slice(rank, None, world)  # each process trains on its share of the batch
    losses = []

    def validate(log):
        last_row = math.ceil(iters / 100) - 1
        if len(log) % max(1, iters // 1000) and len(log) != last_row:
            return log[-1][-1]  # the last value is repeated until the next
        return image_nats(ema, validation[:500]).mean().item()

    parts = dict(model=model, ema=ema, opt=opt)
    for i in iterations(iters, losses, parts, settings, path, fresh, "train_nats,valid_nats", validate):
        opt.param_groups[0]["lr"] = lr * min((i + 1) / 200, 1 - i / iters)  # warm-up, then linear decay
        x = to_levels(images[torch.randint(len(images), (batch,), device=device)], levels)
        loss = loss_nats(net, x[mine])
        opt.zero_grad()
        loss.backward()
        opt.step()
        update_ema(ema, model, decay=min(0.995, (1 + i) / (10 + i)))
        losses.append(loss.detach())
    return ema


# ---------------------------------------------------------------------------- method: sampling, likelihood ------------
def draw(logits, u):
    """Samples from softmax(logits), (N, K), by inverting its CDF at u, (N,) on [0, 1) -> (N,) int64."""
    cdf = logits.softmax(1).cumsum(1)[:, :-1]
    return (cdf <= u[:, None]).sum(1)  # (9)


@torch.inference_mode()
def sample_plain(model, u, x=None, first=0):
    """Levels (N, C, H, W) sampled by u, (N, C, H, W) on [0, 1), with a whole pass of the network for each number.

    x: levels whose rows above `first` are kept."""
    x = torch.zeros_like(u, dtype=torch.long) if x is None else x.clone()
    for i in range(first, u.shape[2]):
        for j in range(u.shape[3]):
            for c in range(u.shape[1]):
                x[:, c, i, j] = draw(model(x)[:, :, c, i, j], u[:, c, i, j])
    return x


@torch.inference_mode()
def sample_cached(model, u, x=None, first=0):
    """The same as sample_plain(), with one row of the vertical stack for each row and one column of the horizontal
    stack for each number."""
    x = torch.zeros_like(u, dtype=torch.long) if x is None else x.clone()
    seen = from_levels(x, model.levels)  # the input of the network; masks hide what is not sampled yet
    cache = {layer: layer.start(u) for layer in model.modules() if isinstance(layer, (Above, Left))}
    for i in range(u.shape[2]):
        above = seen[:, :, i - 1 : i] if i else torch.zeros_like(seen[:, :, :1])  # (N, C, 1, W)
        v = model.vertical_row(above, i, cache)  # (N, F, 1, W)
        if i < first:
            continue  # a kept row: only the rows below need it, through the vertical stack
        for j in range(u.shape[3]):
            for c in range(u.shape[1]):
                logits = model.horizontal_column(seen[:, :, i, j], v[:, :, 0, j], j, cache)[:, :, c]  # (N, K)
                x[:, c, i, j] = draw(logits, u[:, c, i, j])
                seen[:, c, i, j] = from_levels(x[:, c, i, j], model.levels)
            model.left.column(seen[:, :, i, j], j, cache)  # caches the last colour, which later layers do not see here
    return x


def sample(model, n, seed=0, chunk=64, sampler=sample_cached):
    """n images, (n, C, H, W), in -1 .. 1, on the CPU. They are sampled in chunks, and do not depend on their size."""
    device = next(model.parameters()).device
    u = torch.rand(n, *model.shape, generator=torch.Generator(device).manual_seed(seed), device=device)
    images = []
    for i in progress(range(0, n, chunk), "sampling, image"):
        images.append(from_levels(sampler(model, u[i : i + chunk]), model.levels).cpu())
    return torch.cat(images)


@torch.inference_mode()
def image_nats(model, images, chunk=100):
    """-log p(x) of each of the uint8 images (N, C, H, W), in nats -> (N,), on the CPU. Bits are sampled with seed 0."""
    device = next(model.parameters()).device
    x = to_levels(images.cpu(), model.levels, torch.Generator().manual_seed(0))
    chunk = max(1, min(chunk, 2**24 // (model.levels * images[0].numel())))  # at most 64 MB of logits
    nats = [-log_prob(model, part.to(device)).cpu() for part in x.split(chunk)]
    return torch.cat(nats)


def to_bits(nats, dims):
    """Nats per image -> bits/dim. dims: numbers in an image."""
    return nats / (dims * math.log(2))  # (8)


def sensitivity(model, x, i, j):
    """How much the prediction at row i, column j depends on each pixel -> (H, W).

    It is |∂(l_K-1 - l_0) / ∂x|, the gradient of the log-odds of white against black; x: levels (N, C, H, W).
    The log-odds are summed over colours, the absolute values too, and averaged over images."""
    x = x if x.is_floating_point() else x.float()
    x = x.clone().requires_grad_()
    logits = model(x)[:, :, :, i, j]  # (N, K, C)
    (gradient,) = torch.autograd.grad((logits[:, -1] - logits[:, 0]).sum(), x)
    return gradient.abs().sum(1).mean(0)


# ------------------------------------------------------------------------------------------------- command ------------
def load(path, device="cpu"):
    """The EMA model in a checkpoint of pixelcnn.py. Its images have the shape model.shape, (C, H, W)."""
    s = load_checkpoint(path, "pixelcnn")["settings"]
    model = PixelCNN(s["channels"], s["size"], s["levels"], s["width"], s["layers"])
    load_checkpoint(path, ema=model)
    return model.to(device).requires_grad_(False).eval()


def draw_completions(path, model, test_images, seed):
    """Saves eight rows: a test image, its upper half, and six samples of the lower half."""
    device = next(model.parameters()).device
    images = test_images[torch.arange(8) % len(test_images)]
    x = to_levels(images, model.levels, torch.Generator().manual_seed(0)).to(device)
    u = torch.rand(48, *model.shape, generator=torch.Generator(device).manual_seed(seed), device=device)
    half = model.shape[1] // 2
    given = from_levels(x, model.levels)
    given[:, :, half:] = 0  # grey
    completed = sample_cached(model, u, x.repeat_interleave(6, dim=0), half)
    completed = from_levels(completed, model.levels).unflatten(0, (8, 6))
    rows = torch.cat([from_levels(x, model.levels)[:, None], given[:, None], completed], dim=1)  # (8, 8, C, H, W)
    save_grid(path, rows.flatten(0, 1))


def draw_sensitivity(path, model, test_images, zoom=8):
    """Saves how much one prediction depends on each pixel: black, red, yellow over four decades; grey: not seen."""
    device = next(model.parameters()).device
    i, j = 3 * model.shape[1] // 4, model.shape[1] // 2
    images = test_images[torch.arange(8) % len(test_images)]
    x = to_levels(images, model.levels, torch.Generator().manual_seed(0)).to(device)
    share = sensitivity(model, x, i, j)
    tone = (share / share.max().clamp(min=1e-30)).log10().div(4).add(1).clamp(0, 1)
    picture = torch.stack([2 * tone, 2 * tone - 1, 0 * tone]).clamp(0, 1)  # (3, H, W)
    picture = torch.where(share > 0, picture, 0.4)
    picture[:, i, j] = 1  # the predicted pixel is white
    picture = picture.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    save_grid(path, 2 * picture[None] - 1, columns=1)


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
    add("--iters", type=positive, default=3000, help="training iterations")
    add("--batch", type=positive, default=16, help="batch size")
    add("--lr", type=float, default=1e-2, help="peak learning rate")
    add("--levels", type=positive, default=2, help="K, the values of a number, 2 to 256")
    add("--width", type=positive, default=32, help="channels of both stacks")
    add("--layers", type=int, default=5, help="residual blocks in each stack")
    add("--samples", type=positive, default=64, help="number of images to sample")
    add("--plain", action="store_true", help="sample without the cache as well, and compare: takes minutes")
    add("--out", type=Path, default=Path("out/pixelcnn"), help="run folder")
    add("--device", type=pick_device, default=pick_device(), help="where to compute")
    add("--seed", type=int, default=0, help="seed; on a CPU the same seed gives the same bits")
    add("--fresh", action="store_true", help="train from scratch over the checkpoint in --out")
    args = parse_args(parser, argv)
    if not 2 <= args.levels <= 256 or args.layers < 0:
        raise ValueError(f"--levels {args.levels} --layers {args.layers}: must be from 2 to 256, and at least 0")

    rank, _ = processes(args.device, args.batch)
    images = load_images(args.data, args.size, args.channels)
    test_images = load_images(args.data, args.size, args.channels, test=True)
    print(f"{len(images)} images of {args.size}x{args.size}x{args.channels} from {args.data}, on {args.device}")
    settings = args.iters, args.batch, args.lr, args.levels, args.width, args.layers, args.device, args.seed
    model = train(images, *settings, args.out / "model.pt", args.fresh, args.data)
    if rank:
        return  # only the first process samples

    start = time.perf_counter()
    x = sample(model, args.samples, args.seed)
    seconds = time.perf_counter() - start
    save_samples(args.out, x)
    draw_completions(args.out / "completions.png", model, test_images, args.seed)
    draw_sensitivity(args.out / "receptive.png", model, test_images)
    for name, part in (("validation", hold_out(images)[1]), ("test", test_images)):
        nats = image_nats(model, part).double()
        mean = nats.mean()
        error = nats.std(correction=0) / len(nats) ** 0.5
        bits = to_bits(mean, math.prod(model.shape))
        print(f"{name}: {mean:.2f} +- {error:.2f} nats = {bits:.4f} bits/dim, mean of {len(nats)} images")
    if args.plain:
        start = time.perf_counter()
        other = sample(model, args.samples, args.seed, 16, sample_plain)
        times = (time.perf_counter() - start) / seconds
        print(f"without the cache: {times:.0f} times as long; {(x != other).sum()} of {x.numel()} numbers differ")
    print(
        f"{args.samples} samples, {args.samples / seconds:.1f} images/s: {args.out}/samples.png, samples.npy, ", end=""
    )
    print("completions.png (a test image, what was given, six samples), receptive.png, log.csv, model.pt")


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
