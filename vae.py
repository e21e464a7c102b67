# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""Variational autoencoder (VAE): turns noise into images, and infers the noise behind an image.

A decoder maps latents z to an image. An encoder maps an image to a distribution of those z that may
have generated it. They are trained together, to maximise a lower bound on the likelihood.

Paper: Kingma, Welling, "Auto-Encoding Variational Bayes", ICLR 2014, arXiv:1312.6114.
IWAE: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", ICLR 2016, arXiv:1509.00519.
Numbers in brackets at the right, such as [11], are equations of the first paper.

symbol        in the code     meaning
x             x               binary images, (N, C, H, W), float32 zeros and ones
z             z               latents, (N, latent)
μ, log σ²     mu, log_var     mean and log-variance of q(z|x), (N, latent) each: model.encode(x)
ε             eps             standard normal noise, (N, latent)
l             logits          log(y / (1 - y)), y the probability that a pixel is 1: model.decode(z)
log p(x|z)    log_p           in nats, (N,): model.log_likelihood(x, z)
KL(q ‖ p)     kl              𝔼_q[log q - log p] ≥ 0, where 𝔼_q averages over z from q; nats, (N,)
K             k               number of samples of z per image in the bound (9)

Model. An image is generated in two steps, first z, then its pixels:

  (1)  z ~ N(0, I),  x ~ p(x|z),  so that  p(x) = ∫ p(x|z) p(z) dz

Maximum likelihood needs p(x) for each training image, but almost no z generates a given x, so the
average of p(x|z) over samples of p(z) is a hopeless estimate. Samples of the posterior p(z|x) are
needed instead. The encoder approximates the posterior by a Gaussian:

  (2)  q(z|x) = N(μ(x), diag σ²(x))                                                              [9]

The bound. By Bayes' rule p(x) = p(x|z) p(z) / p(z|x) for every z. Multiply numerator and
denominator by q(z|x), take the logarithm, and average over z from q(z|x):

  log p(x) = 𝔼_q[log p(x|z)] - KL(q(z|x) ‖ p(z)) + KL(q(z|x) ‖ p(z|x))

The last term is unknown, but not negative. Without it, the evidence lower bound (ELBO) remains:

  (3)  log p(x) ≥ ELBO(x) = 𝔼_q[log p(x|z)] - KL(q(z|x) ‖ p(z))                            [1, 2, 3]

The first term, the reconstruction, favours small σ and a μ of its own for each image. The second
favours μ = 0, σ = 1, so that samples of p(z) fall where images were encoded.

One sample of z estimates 𝔼_q. Sampling is not differentiable in μ and σ, so take the randomness
from ε, whose distribution is fixed (the reparameterisation trick):

  (4)  z = μ + σ ε,  ε ~ N(0, I)                                                                 [4]

The KL is exact. For each latent, -2 𝔼_q[log p(z)] = log 2π + μ² + σ², and
-2 𝔼_q[log q(z|x)] = log 2π + log σ² + 1, so

  (5)  KL(q(z|x) ‖ p(z)) = ½ Σ_latents (μ² + σ² - 1 - log σ²)                                   [10]

Given z, pixels are independent. As log y = l - log(1 + exp(l)) and log(1 - y) = -log(1 + exp(l)),

  (6)  log p(x|z) = Σ_pixels (x log y + (1 - x) log(1 - y)) = Σ_pixels (x l - log(1 + exp(l)))  [11]

  (7)  loss = -(1 / N) Σ_images ELBO(x),  over the N images of a batch                           [8]

Data. A byte is read as a probability. Training images are binarised at each use, test images once:

  (8)  x = 1 with probability byte / 255, else x = 0                                          [IWAE]

Likelihood. Each w_k has mean p(x), and log is concave, so (9) holds for every K; K = 1 is (3).
The bound never decreases with K, and it converges to log p(x) if the w_k are bounded:

  (9)  log p(x) ≥ 𝔼[log((1 / K) Σ_k w_k)],  w_k = p(x|z_k) p(z_k) / q(z_k|x),  z_k from (4)   [IWAE]

  (10)  log w_k = log p(x|z_k) + ½ Σ_latents (ε_k² - z_k² + log σ²)

Latents. If the encoder ignores latent j, μ_j = 0, σ_j = 1 and its KL is 0. Latent j is active if

  (11)  Var_x(μ_j(x)) > 0.01                                                                  [IWAE]

Two latents can be shown as n² images, from cells of equal probability. Φ is the normal CDF:

  (12)  z_j = Φ⁻¹(u) = √2 erf⁻¹(2 u - 1),  u = (i + ½) / n for i = 0 .. n-1             [Appendix A]

Pitfalls:
- (6) is a sum. A mean over pixels weights the KL C H W times as much, and z is ignored. Break it:
  replace .sum(1) by .mean(1) in the line tagged (6) and test_vae_eq6_log_bernoulli fails.
- log_var is log σ², so σ = exp(log_var / 2). Generated images show y, not samples of x.
- x must be binary: for grey values, (6) is not a likelihood. With --channels 3, each channel of
  a pixel is binarised, so there are only eight colours.
- log p(x) is negative; some papers print -log p(x). MNIST binarised only once is another data set.

Differences from the paper:
- Deeper networks with SiLU, not tanh, and a convolutional decoder; Adam, not Adagrad, with warm-up
  and linear decay; an EMA of the weights, no prior on them. --beta weights the KL (β-VAE, 2017).

python vae.py --data mnist --nll 500        trains in 126 s on two cores; (9) takes 309 s
python vae.py --latent 2 --out out/plane    trains with two latents, and draws manifold.png
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


# ---------------------------------------------------------------------------------------- method: the loss ------------
def binarise(images, generator=None):
    """Random zeros and ones, float32, from uint8 images of any shape. ValueError if they are not uint8."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, 0 .. 255, not {images.dtype}")
    u = torch.rand(images.shape, generator=generator, device=images.device)  # in [0, 1)
    return (255 * u < images).float()  # (8)


def reparameterise(mu, log_var, eps):
    """A sample z of N(mu, diag exp(log_var)), differentiable in both, from standard normal eps (..., N, latent)."""
    return mu + (0.5 * log_var).exp() * eps  # (4)


def kl_normal(mu, log_var):
    """KL(N(mu, diag exp(log_var)) ‖ N(0, I)) in nats, (N,), from (N, latent) each."""
    return 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum(1)  # (5)


def log_bernoulli(x, logits):
    """log p(x|z) in nats, (N,), of binary x, from logits of the same shape (N, ...)."""
    return (x * logits - F.softplus(logits)).flatten(1).sum(1)  # (6)


def elbo(model, x, eps):
    """The ELBO, its reconstruction term and its KL term in nats, (N,) each, from one sample of z per image.

    x: binary, (N, C, H, W); eps: standard normal, (N, latent)."""
    mu, log_var = model.encode(x)
    z = reparameterise(mu, log_var, eps)
    reconstruction = model.log_likelihood(x, z)
    kl = kl_normal(mu, log_var)
    return reconstruction - kl, reconstruction, kl  # (3)


def loss_elbo(model, x, eps, beta=1.0):
    """The training loss in nats per image, and the means of the reconstruction and KL terms: three scalars.

    x, eps: as for elbo(); beta: weight of the KL term, 1 for the ELBO."""
    _, reconstruction, kl = elbo(model, x, eps)
    return (beta * kl - reconstruction).mean(), reconstruction.mean(), kl.mean()  # (7)


# ------------------------------------------------------------------------------------------------- network ------------
# The loss needs encode(x) -> mu, log_var and log_likelihood(x, z), whatever the network; sampling also needs decode(z).
class VAE(nn.Module):
    """Encoder and decoder of fully connected layers. The decoder ends in two transposed convolutions.

    In eval mode, x that is not binary is a ValueError. In training the check would make a GPU wait."""

    def __init__(self, channels=1, size=28, width=512, latent=50):
        super().__init__()
        self.shape = (channels, size, size)
        self.latent = latent
        maps = math.ceil(width / 32)
        side = math.ceil(size / 4)
        self.encoder = nn.Sequential(
            nn.Linear(channels * size * size, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2 * latent),
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, width),
            nn.SiLU(),
            nn.Linear(width, 2 * maps * side * side),
            nn.SiLU(),
            nn.Unflatten(1, (2 * maps, side, side)),
            nn.ConvTranspose2d(2 * maps, maps, 4, stride=2, padding=1),  # (N, maps, 2 side, 2 side)
            nn.SiLU(),
            nn.ConvTranspose2d(maps, channels, 4, stride=2, padding=1),  # (N, channels, 4 side, 4 side)
        )

    def encode(self, x):
        """mu and log_var of q(z|x), (N, latent) each, from binary x (N, C, H, W)."""
        if not self.training and ((x != 0) & (x != 1)).any():
            raise ValueError("x must be zeros and ones, as binarise() makes them")
        return self.encoder(x.flatten(1)).chunk(2, dim=1)  # (2)

    def decode(self, z):
        """The logits (N, C, H, W) of the pixels, from z (N, latent)."""
        _, height, width = self.shape
        return self.decoder(z)[:, :, :height, :width]  # crops at most 3 rows and columns

    def log_likelihood(self, x, z):
        """log p(x|z) in nats, (N,)."""
        return log_bernoulli(x, self.decode(z))


# ------------------------------------------------------------------------------------------------ training ------------
def train(
    images,
    iters=6800,
    batch=100,
    lr=3e-3,
    width=512,
    latent=50,
    beta=1.0,
    device="cpu",
    seed=0,
    path=None,
    fresh=False,
    data=None,
):
    """Trains on uint8 images (N, C, H, H) and returns the EMA model. Seeds torch's global generator.

    path: the checkpoint, resumed unless fresh; data: the name of the data, stored in it.
    ValueError if the checkpoint has other settings, FloatingPointError if the loss is not finite."""
    settings = dict(method="vae", data=data, width=width, latent=latent, beta=beta)
    settings |= dict(iters=iters, batch=batch, lr=lr, seed=seed) | image_settings(images)
    torch.manual_seed(seed)
    model = VAE(settings["channels"], settings["size"], width, latent).to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    opt = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99))
    images = images.to(device)
    parts = dict(model=model, ema=ema, opt=opt)
    losses = []

    for i in iterations(iters, losses, parts, settings, path, fresh, columns="loss,reconstruction,kl"):
        opt.param_groups[0]["lr"] = lr * min((i + 1) / 200, 1 - i / iters)  # warm-up, then linear decay
        x = binarise(images[torch.randint(len(images), (batch,), device=device)])
        eps = torch.randn(batch, latent, device=device)
        loss, reconstruction, kl = loss_elbo(model, x, eps, beta)
        opt.zero_grad()
        loss.backward()
        opt.step()
        update_ema(ema, model, decay=min(0.995, (1 + i) / (10 + i)))
        losses.append(torch.stack([loss, reconstruction, kl]).detach())
    return ema


# ---------------------------------------------------------------------------------- method: after training ------------
@torch.inference_mode()
def iwae_bound(model, x, k, generator=None, chunk=2000):
    """An estimate of the bound (9) in nats, (N,), from k samples of z per image; x: binary, (N, C, H, W).

    Decodes at most max(N, chunk) images at once. ValueError if k < 1."""
    if k < 1:
        raise ValueError(f"k = {k}: the bound needs at least one sample of z")
    mu, log_var = model.encode(x)
    at_once = max(1, chunk // len(x))  # samples of z per image
    log_sum = torch.full_like(mu[:, 0], -math.inf)
    for done in range(0, k, at_once):
        n = min(at_once, k - done)
        eps = torch.randn(n, *mu.shape, generator=generator, device=x.device)
        z = reparameterise(mu, log_var, eps)  # (n, N, latent)
        copies = x.expand(n, *x.shape).flatten(0, 1)  # (n N, C, H, W)
        log_p = model.log_likelihood(copies, z.flatten(0, 1)).view(n, len(x))
        log_w = log_p + 0.5 * (eps.square() - z.square() + log_var).sum(2)  # (10)
        log_sum = torch.logaddexp(log_sum, log_w.logsumexp(0))
    return log_sum - math.log(k)  # (9)


def active_latents(mu):
    """Which latents are active, bool (latent,), from the posterior means (N, latent) of N images."""
    return mu.var(0, correction=0) > 0.01  # (11)


def latent_plane(n):
    """z at the centres of n x n cells of equal probability, (n², 2), row by row."""
    u = (torch.arange(n) + 0.5) / n
    z = 2**0.5 * torch.erfinv(2 * u - 1)  # (12)
    return torch.cartesian_prod(z, z)


@torch.inference_mode()
def mean_images(model, z):
    """The mean y of p(x|z), scaled to -1 .. 1, (N, C, H, W), from z (N, latent)."""
    return 2 * model.decode(z).sigmoid() - 1


def sample(model, n, seed=0, chunk=1000):
    """n images, (n, C, H, W), in -1 .. 1, on the CPU: each is the mean of p(x|z) for a z from the prior."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    z = torch.randn(n, model.latent, generator=generator, device=device)  # (1)
    return torch.cat([mean_images(model, part).cpu() for part in z.split(chunk)])


@torch.inference_mode()
def evaluate(model, x, k=0, seed=0, chunk=100):
    """The ELBO, its two terms and, if k > 0, the bound (9) in nats, float64 (3 or 4, N), for binary x (N, C, H, W)."""
    generator = torch.Generator(x.device).manual_seed(seed)
    iwae_generator = torch.Generator(x.device).manual_seed(seed + 1)
    columns = []
    for i in progress(range(0, len(x), chunk), "test image"):
        part = x[i : i + chunk]
        eps = torch.randn(len(part), model.latent, generator=generator, device=x.device)
        rows = list(elbo(model, part, eps))
        if k:
            rows.append(iwae_bound(model, part, k, iwae_generator))
        columns.append(torch.stack(rows).cpu().double())
    return torch.cat(columns, dim=1)


# ------------------------------------------------------------------------------------------------- command ------------
def load(path, device="cpu"):
    """The EMA model in a checkpoint. Its images have the shape model.shape, (C, H, W)."""
    settings = load_checkpoint(path, "vae")["settings"]
    model = VAE(settings["channels"], settings["size"], settings["width"], settings["latent"])
    load_checkpoint(path, ema=model)
    return model.to(device).requires_grad_(False).eval()


def draw_pairs(path, model, x, mu):
    """Saves 32 pairs: a binary image x and, to its right, the image decoded from its posterior mean mu."""
    shown = torch.arange(32, device=x.device) % len(x)
    pairs = torch.stack([2 * x[shown] - 1, mean_images(model, mu[shown])], dim=1)  # (32, 2, C, H, W)
    save_grid(path, pairs.flatten(0, 1))


def draw_walks(path, model, x, mu):
    """Saves eight rows: a binary image, eight decoded on the line from its mu to the mu of another, the other image."""
    rows = []
    for i in range(0, 16, 2):
        a, b = i % len(x), (i + 1) % len(x)
        z = torch.stack([torch.lerp(mu[a], mu[b], j / 7) for j in range(8)])  # no slerp: mu is not near a sphere
        rows += [2 * x[a : a + 1] - 1, mean_images(model, z), 2 * x[b : b + 1] - 1]
    save_grid(path, torch.cat(rows), columns=10)


def mean_and_error(values):
    """The mean of values (N,) with its standard error, as text."""
    error = values.std(correction=0) / len(values) ** 0.5
    return f"{values.mean():.2f} +- {error:.2f}"


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
    add("--channels", type=int, choices=(1, 3), default=1, help="1 for grey, 3 for colour; each is binarised")
    add("--iters", type=positive, default=6800, help="training iterations")
    add("--batch", type=positive, default=100, help="batch size")
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--width", type=positive, default=512, help="units in a hidden layer")
    add("--latent", type=positive, default=50, help="dimensions of z; 2 draws manifold.png")
    add("--beta", type=float, default=1.0, help="weight of the KL in the loss; in the printed ELBO it is 1")
    add("--samples", type=positive, default=64, help="number of images to sample")
    add("--nll", type=int, default=0, help="K, samples of z per test image for the bound on log p(x); 0 for none")
    add("--out", type=Path, default=Path("out/vae"), help="run folder")
    add("--device", type=pick_device, default=pick_device(), help="where to compute")
    add("--seed", type=int, default=0, help="seed; on a CPU the same seed gives the same bits")
    add("--fresh", action="store_true", help="train from scratch over the checkpoint in --out")
    args = parse_args(parser, argv)
    if args.nll < 0:
        raise ValueError(f"--nll {args.nll}: must be 0 or more")

    images = load_images(args.data, args.size, args.channels)
    test = load_images(args.data, args.size, args.channels, test=True)
    print(f"{len(images)} images of {args.size}x{args.size}x{args.channels} from {args.data}, on {args.device}")
    settings = args.iters, args.batch, args.lr, args.width, args.latent, args.beta, args.device, args.seed
    model = train(images, *settings, args.out / "model.pt", args.fresh, args.data)

    save_samples(args.out, sample(model, args.samples, args.seed))
    x = binarise(test, torch.Generator().manual_seed(0)).to(args.device)  # the same for every --seed
    mu = torch.cat([model.encode(part)[0] for part in x.split(1000)])
    draw_pairs(args.out / "reconstructions.png", model, x, mu)
    draw_walks(args.out / "walk.png", model, x, mu)
    if args.latent == 2:
        save_grid(args.out / "manifold.png", mean_images(model, latent_plane(20).to(args.device)), columns=20)

    bound, reconstruction, kl, *iwae = [mean_and_error(nats) for nats in evaluate(model, x, args.nll)]
    print(f"test ELBO: {bound} nats = reconstruction {reconstruction} - KL {kl}, mean of {len(x)} images")
    if args.nll:
        print(f"test log p(x) >= {iwae[0]} nats, from {args.nll} samples of z per image")
    print(f"{active_latents(mu).sum()} of {args.latent} latents are active")
    print(
        f"{args.samples} samples: {args.out}/samples.png, samples.npy, reconstructions.png (each to the right of its "
        f"image), walk.png{', manifold.png' * (args.latent == 2)}"
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
