# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""Generative adversarial network (GAN): a generator learns to make images by fooling a discriminator.

At the same time, the discriminator learns to tell the generated images from real ones.

Paper: Goodfellow et al., "Generative Adversarial Nets", NIPS 2014, arXiv:1406.2661.
Numbers in brackets at the right, such as [2], are the paper's equations.

symbol    in the code       meaning
x         x                 real images, (N, C, H, W), scaled to -1 .. 1, distributed as p_data
z         z                 latents, (N, latent), standard normal
G(z)      G(z), fake        generated images, (N, C, H, W), -1 .. 1, distributed as p_g
d(x)      d(x), *_logits    the output of the discriminator network: logits, (N,), any real numbers
D(x)      logits.sigmoid()  the probability that x is real, 1 / (1 + exp(-d(x))); the paper's D
JS        ≥ js_bound        Jensen-Shannon divergence of p_data and p_g, 0 .. log 2 = 0.693 nats
k         k                 number of steps of D for each step of G
w_D, w_G  -                 the weights of the two networks

The game. D maximises, and G minimises, the same value:

  (1)  min_G max_D V(D, G),  where  V(D, G) = 𝔼_x[log D(x)] + 𝔼_z[log(1 - D(G(z)))]              [1]

The optimal D for a fixed G. V is the integral of p_data(x) log D(x) + p_g(x) log(1 - D(x)) over x,
and D(x) can be chosen independently at each x. With a = p_data(x), b = p_g(x) and y = D(x), the
integrand a log y + b log(1 - y) is concave in y. Its derivative a / y - b / (1 - y) is zero at
the maximum, y = a / (a + b):

  (2)  D*(x) = p_data(x) / (p_data(x) + p_g(x)),  that is  d*(x) = log p_data(x) - log p_g(x)    [2]

What G then minimises. Insert (2) into (1), with the mixture m = (p_data + p_g) / 2. Each of the two
logarithms yields a term -log 2:

  (3)  V(D*, G) = KL(p_data ‖ m) + KL(p_g ‖ m) - log 4 = 2 JS(p_data ‖ p_g) - log 4        [4, 5, 6]

JS is 0 exactly when the two distributions agree. So V(D*, G) has its minimum, -log 4, at
p_g = p_data and nowhere else; D* is 1/2 there [Theorem 1]. No D reaches a higher V than D*, so

  (4)  JS(p_data ‖ p_g) ≥ (V(D, G) + log 4) / 2  for any D

Losses. With softplus(u) = log(1 + exp(u)), log D = -softplus(-d) and log(1 - D) = -softplus(d):

  (5)  loss_D = -V(D, G) = 𝔼_x[softplus(-d(x))] + 𝔼_z[softplus(d(G(z)))]

Only the second term of V depends on G. G minimises it, or maximises log D(G(z)) instead:

  (6)  minimax:        loss_G = 𝔼_z[log(1 - D(G(z)))] = -𝔼_z[softplus(d(G(z)))]

  (7)  nonsaturating:  loss_G = -𝔼_z[log D(G(z))] = 𝔼_z[softplus(-d(G(z)))]              [section 3]

Their derivatives with respect to the logit d are -D and -(1 - D), so minimising either raises d.
But D is near 0 for an image that is clearly not real. There the gradient of (6) vanishes, while
that of (7) has its full strength.

With D = D*, the gradient of (6) is that of 2 JS(p_data ‖ p_g), by (3): V is at its maximum over D,
so the change of D* with G adds nothing to the gradient. The gradient of (7), the default, is that
of KL(p_g ‖ p_data) - 2 JS(p_data ‖ p_g), by Theorem 2.5 of Arjovsky and Bottou 2017,
arXiv:1701.04862. Both are zero at p_g = p_data.

Training. The players take turns; each moves while the other one is fixed. The steps are Adam's,
written here as plain gradient descent:

  (8)  k times w_D ← w_D - lr ∇loss_D, then once w_G ← w_G - lr ∇loss_G                [Algorithm 1]

Interpolation. Gaussian noise concentrates near a sphere, so one moves along a great circle, from
one latent, x (a = 0), to another, y (a = 1). With θ the angle between x and y,

  (9)  slerp(x, y, a) = (sin((1 - a) θ) x + sin(a θ) y) / sin θ

Pitfalls:
- D's step must detach the generated images, G's must not. Break it: delete .detach() in the first
  line tagged (1) and test_gan_eq1_eq8_steps fails.
- A loss of D near 0 is bad news: D has won, or has memorised the training images.
- (4) holds in expectation over images that D was not trained on, if D judges each by itself. In
  training, BatchNorm normalises real and generated batches by their own statistics, so loss_D in
  log.csv gives no bound. The line "JS(p_data || p_g) >= ..." printed at the end is a bound, within
  its standard error: it is from test images, with G and D in eval mode.
- If all z give the same few images (mode collapse), raise --k or lower --lr.

Differences from the paper:
- Convolutions, BatchNorm, and initial weights much like those of DCGAN (Radford et al. 2015,
  arXiv:1511.06434), with Adam's β_1 = 0.5, but β_2 = 0.99, and ten times DCGAN's learning rate,
  with warm-up and decay to 40 %.
- G's step reuses the images of D's last step. Results are from an EMA of both players.
- Interpolation follows (9); the paper's figure 3 takes a straight line.

python gan.py --data mnist --samples 2000         trains in 155 s on two cores
python gan.py --loss minimax --out out/minimax    trains with (6) instead of (7)
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
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps


# ------------------------------------------------------------------------------------------------- network ------------
# Any G from (N, latent) to (N, C, H, W) and any d from (N, C, H, W) to (N,) would do. These are small DCGANs.
def layer(conv, activation):
    """A convolution without bias, batch normalisation, and an activation."""
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), activation)


def dcgan_weights(module):
    """Draws the weights of one layer from N(0, 0.02²). Biases and BatchNorm keep PyTorch's initialisation."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0, 0.02)


class Generator(nn.Module):
    """Maps z (N, latent) to images (N, channels, size, size) in -1 .. 1."""

    def __init__(self, channels=1, size=28, width=16, latent=64):
        super().__init__()
        self.shape = (channels, size, size)
        self.latent = latent
        w, side = width, math.ceil(size / 4)
        self.net = nn.Sequential(
            nn.Linear(latent, 4 * w * side * side, bias=False),
            nn.Unflatten(1, (4 * w, side, side)),
            nn.BatchNorm2d(4 * w),
            nn.ReLU(),
            layer(nn.ConvTranspose2d(4 * w, 2 * w, 4, stride=2, padding=1, bias=False), nn.ReLU()),
            layer(nn.ConvTranspose2d(2 * w, w, 4, stride=2, padding=1, bias=False), nn.ReLU()),
            nn.Conv2d(w, channels, 3, padding=1),
            nn.Tanh(),
        )
        self.apply(dcgan_weights)

    def forward(self, z):
        _, height, width = self.shape
        return self.net(z)[:, :, :height, :width]  # crops at most 3 rows and columns


class Discriminator(nn.Module):
    """Maps images (N, channels, size, size) to logits (N,). ValueError if size is less than 4."""

    def __init__(self, channels=1, size=28, width=16):
        super().__init__()
        if size < 4:
            raise ValueError(f"--size {size}: must be at least 4, as the discriminator halves it twice")
        w, side = width, size // 4
        self.net = nn.Sequential(
            nn.Conv2d(channels, w, 4, stride=2, padding=1),  # (N, w, size // 2, size // 2)
            nn.LeakyReLU(0.2),
            layer(nn.Conv2d(w, 2 * w, 4, stride=2, padding=1, bias=False), nn.LeakyReLU(0.2)),
            layer(nn.Conv2d(2 * w, 4 * w, 3, padding=1, bias=False), nn.LeakyReLU(0.2)),
            nn.Dropout2d(0.25),
            nn.Flatten(),
            nn.Linear(4 * w * side * side, 1),
        )
        self.apply(dcgan_weights)

    def forward(self, x):
        return self.net(x).squeeze(1)


# ---------------------------------------------------------------------------------------- method: the game ------------
def loss_d(real_logits, fake_logits):
    """The loss of D in nats, a scalar, from the logits of real images, (N,), and of generated ones, (M,)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()  # (5)


def loss_g(fake_logits, kind="nonsaturating"):
    """The loss of G in nats, a scalar, from the logits (N,) of its images. ValueError if the kind is unknown."""
    if kind == "nonsaturating":
        return F.softplus(-fake_logits).mean()  # (7)
    if kind == "minimax":
        return -F.softplus(fake_logits).mean()  # (6)
    raise ValueError(f"loss must be nonsaturating or minimax, not {kind}")


def d_step(d, opt, x, fake):
    """One step of d on real and generated images (N, C, H, W). Returns its loss and both logits before the step."""
    real_logits = d(x)
    fake_logits = d(fake.detach())  # (1), max over D: the gradient stops at fake
    loss = loss_d(real_logits, fake_logits)
    opt.zero_grad()
    loss.backward()
    opt.step()  # (8): d moves towards d* of (2)
    return loss.detach(), real_logits.detach(), fake_logits.detach()


def g_step(G, d, opt, fake, kind="nonsaturating"):
    """One step of G on its images fake = G(z). Returns the loss before the step. d keeps its weights."""
    loss = loss_g(d(fake), kind)  # (1), min over G: the gradient passes through d
    opt.zero_grad()
    loss.backward(inputs=list(G.parameters()))  # no gradient for the weights of d
    opt.step()  # (8)
    return loss.detach()


# ------------------------------------------------------------------------------------------------ training ------------
def train(
    images,
    iters=7200,
    batch=32,
    lr=2e-3,
    width=16,
    latent=64,
    k=1,
    loss="nonsaturating",
    stacked=False,
    device="cpu",
    seed=0,
    path=None,
    fresh=False,
    data=None,
):
    """Trains on uint8 images (N, C, H, H) and returns the EMA of G in eval mode. Seeds torch's global generator.

    path: the checkpoint, resumed unless fresh; data, stacked: the name of the data, stored in it.
    ValueError if the checkpoint has other settings, FloatingPointError if a loss is not finite."""
    settings = dict(method="gan", data=data, stacked=stacked, width=width, latent=latent, k=k, loss=loss)
    settings |= dict(iters=iters, batch=batch, lr=lr, seed=seed) | image_settings(images)
    torch.manual_seed(seed)
    G, d = make_players(settings, device)
    ema_G = copy.deepcopy(G).requires_grad_(False).eval()
    ema_d = copy.deepcopy(d).requires_grad_(False).eval()
    opt_G = torch.optim.Adam(G.parameters(), lr, betas=(0.5, 0.99))
    opt_d = torch.optim.Adam(d.parameters(), lr, betas=(0.5, 0.99))
    film = nn.Module()  # a module, so that checkpoints hold its pictures
    film.register_buffer("frames", torch.zeros(10, 8, *G.shape, dtype=torch.uint8))
    film_z = torch.randn(8, latent, generator=torch.Generator().manual_seed(seed)).to(device)
    parts = dict(G=G, d=d, ema_G=ema_G, ema_d=ema_d, opt_G=opt_G, opt_d=opt_d, film=film)
    images = images.to(device)
    losses = []

    for i in iterations(iters, losses, parts, settings, path, fresh, columns="loss_D,loss_G,D(x),D(G(z))"):
        for opt in (opt_G, opt_d):
            opt.param_groups[0]["lr"] = lr * min((i + 1) / 200, 1 - 0.6 * i / iters)  # warm-up, then decay to 40 %
        for _ in range(k):  # (8)
            x = images[torch.randint(len(images), (batch,), device=device)].float() / 127.5 - 1
            fake = G(torch.randn(batch, latent, device=device))
            loss_D, real_logits, fake_logits = d_step(d, opt_d, x, fake)
        loss_G = g_step(G, d, opt_G, fake, loss)
        decay = min(0.998, (1 + i) / (10 + i))
        for ema, player in (ema_G, G), (ema_d, d):
            update_ema(ema, player, decay)
            update_statistics(ema, player, decay)
        for c in range(10):
            if i + 1 == math.ceil(iters * (c + 1) ** 2 / 100):  # after 1, 4, 9, ..., 100 % of the training
                film.frames[c] = to_uint8(ema_G(film_z))
        losses.append(torch.stack([loss_D, loss_G, real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()]))
    return ema_G


def make_players(settings, device="cpu"):
    """Untrained networks G and d, built from the channels, size, width and latent of a checkpoint's settings."""
    G = Generator(settings["channels"], settings["size"], settings["width"], settings["latent"]).to(device)
    d = Discriminator(settings["channels"], settings["size"], settings["width"]).to(device)
    if torch.device(device).type == "cpu":
        G = G.to(memory_format=torch.channels_last)  # 1.2 times as fast to train and 1.5 to sample on an AMD EPYC
        d = d.to(memory_format=torch.channels_last)
    return G, d


def update_statistics(ema, player, decay):
    """The EMA of BatchNorm's running means and variances, in place: update_ema() averages only the parameters."""
    for average, value in zip(ema.buffers(), player.buffers()):
        if average.is_floating_point():
            average.lerp_(value, 1 - decay)


# ---------------------------------------------------------------------------------- method: after training ------------
def js_bound(real_logits, fake_logits):
    """The lower bound on JS(p_data ‖ p_g) in nats, and its standard error, from logits (N,) and (M,).

    Two floats. The bound is negative if D is worse than tossing a coin, D = 1/2."""
    bound = (math.log(4) - loss_d(real_logits, fake_logits)) / 2  # (3), (4)
    variance = F.softplus(-real_logits).var(correction=0) / len(real_logits)
    variance += F.softplus(fake_logits).var(correction=0) / len(fake_logits)
    return bound.item(), variance.sqrt().item() / 2


def slerp(x, y, a):
    """Spherical interpolation between two latents of one shape, from x (a = 0) to y (a = 1)."""
    cos = F.cosine_similarity(x.flatten(), y.flatten(), dim=0)
    theta = torch.arccos(cos.clamp(-1, 1))
    if theta.sin() < 1e-4:  # parallel or opposite: the great circle is not unique
        return torch.lerp(x, y, a)
    return (torch.sin((1 - a) * theta) * x + torch.sin(a * theta) * y) / torch.sin(theta)  # (9)


@torch.inference_mode()
def sample(model, n, seed=0, chunk=500):
    """n images (n, C, H, W) in -1 .. 1, on the CPU, from a generator in eval mode. They are drawn in chunks."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    images = []
    for i in range(0, n, chunk):
        z = torch.randn(min(chunk, n - i), model.latent, generator=generator, device=device)
        images.append(model(z).cpu())
    return torch.cat(images)


@torch.inference_mode()
def evaluate(G, d, images, seed=0, chunk=500):
    """The logits of at most 2000 uint8 images (N, C, H, W) and of 2000 images of G. G and d must be in eval mode."""
    image_settings(images)  # refuses floats
    device = next(d.parameters()).device
    real = images[:2000].float() / 127.5 - 1
    fake = sample(G, 2000, seed, chunk)
    return [torch.cat([d(part.to(device)) for part in x.split(chunk)]) for x in (real, fake)]


# ------------------------------------------------------------------------------------------------- command ------------
def load_players(path, device="cpu"):
    """The EMA of G and of d in a checkpoint, in eval mode, and its frames for progress.png, uint8 (10, 8, C, H, W)."""
    G, d = make_players(load_checkpoint(path, "gan")["settings"], device)
    state = load_checkpoint(path, ema_G=G, ema_d=d)
    for player in (G, d):
        player.requires_grad_(False).eval()
    return G, d, state["parts"]["film"]["frames"]


def load(path, device="cpu"):
    """The EMA of G in a checkpoint. Its images have the shape G.shape, (C, H, W); G.latent is the size of z."""
    return load_players(path, device)[0]


def stack(images, seed=0):
    """Colour images (N, 3, H, W). The channels of each are three random images among the grey ones (N, 1, H, W).

    From MNIST this makes Stacked MNIST, with 1000 modes (Metz et al. 2016, arXiv:1611.02163).
    ValueError if the images are not grey."""
    if images.shape[1] != 1:
        raise ValueError(f"--stacked needs grey images, but these have {images.shape[1]} channels")
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(images), generator=generator) for _ in range(3)]
    return torch.cat([images[order] for order in orders], dim=1)


@torch.inference_mode()
def draw_slerps(path, G, seed):
    """Saves six rows of ten images: from one random latent to another along a great circle."""
    device = next(G.parameters()).device
    z = torch.randn(12, G.latent, generator=torch.Generator(device).manual_seed(seed), device=device)
    latents = []
    for x, y in zip(z[::2], z[1::2]):
        latents += [slerp(x, y, a) for a in torch.linspace(0, 1, 10).tolist()]
    save_grid(path, G(torch.stack(latents)), columns=10)


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
    add("--stacked", action="store_true", help="make colour images, each of three random grey ones")
    add("--iters", type=positive, default=7200, help="training iterations")
    add("--batch", type=positive, default=32, help="batch size")
    add("--lr", type=float, default=2e-3, help="peak learning rate")
    add("--width", type=positive, default=16, help="channels of D at half the resolution, and of G at full resolution")
    add("--latent", type=positive, default=64, help="dimensions of z")
    add("--k", type=positive, default=1, help="steps of D for each step of G")
    add("--loss", choices=("nonsaturating", "minimax"), default="nonsaturating", help="the loss of G")
    add("--samples", type=positive, default=64, help="number of images to sample")
    add("--out", type=Path, default=Path("out/gan"), help="run folder")
    add("--device", type=pick_device, default=pick_device(), help="where to compute")
    add("--seed", type=int, default=0, help="seed; on a CPU the same seed gives the same bits")
    add("--fresh", action="store_true", help="train from scratch over the checkpoint in --out")
    args = parse_args(parser, argv)

    channels = 1 if args.stacked else args.channels
    images = load_images(args.data, args.size, channels)
    test = load_images(args.data, args.size, channels, test=True)
    if args.stacked:
        images = stack(images, args.seed)
        test = stack(test, args.seed)
    print(f"{len(images)} images of {args.size}x{args.size}x{images.shape[1]} from {args.data}, on {args.device}")
    settings = args.iters, args.batch, args.lr, args.width, args.latent, args.k, args.loss, args.stacked
    path = args.out / "model.pt"
    train(images, *settings, args.device, args.seed, path, args.fresh, args.data)
    G, d, frames = load_players(path, args.device)

    save_samples(args.out, sample(G, args.samples, args.seed))
    draw_slerps(args.out / "slerp.png", G, args.seed)
    rows = frames.transpose(0, 1).float() / 127.5 - 1  # (8, 10, C, H, W)
    save_grid(args.out / "progress.png", rows.flatten(0, 1), columns=10)
    save_gif(args.out / "progress.gif", rows.transpose(0, 1))
    real_logits, fake_logits = evaluate(G, d, test, args.seed + 1)
    bound, error = js_bound(real_logits, fake_logits)
    print(f"mean D(x) of {len(real_logits)} test images: {real_logits.sigmoid().mean():.3f}", end=", ")
    print(f"of {len(fake_logits)} generated images: {fake_logits.sigmoid().mean():.3f}")
    print(f"JS(p_data || p_g) >= {bound:.4f} +- {error:.4f} nats, {bound / math.log(2):.1%} of log 2")
    print(
        f"{args.samples} samples: {args.out}/samples.png, samples.npy, slerp.png, progress.gif, "
        "progress.png (a row for each z, after 1, 4, 9, ..., 100 % of the training)"
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
