# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""Contrastive predictive coding (CPC): features of images without labels, by predicting patches.

An image is read from top to bottom. From what has been read, a network picks, among many patches,
the one that lies a few rows below. To do so, it must learn what the patches show.

Paper: van den Oord, Li, Vinyals, "Representation Learning with Contrastive Predictive Coding",
arXiv:1807.03748, 2018. Numbers in brackets at the right, such as [4], are the paper's equations.

symbol    in the code    meaning
x         patches        square patches in 6 rows r and 6 columns q, neighbours overlapping by half
s         stride         distance of neighbouring patches in pixels, half the side of a patch
z         z              g(x), the encoding of a patch, (Z_DIM,)
c         c              context: the state of a GRU that has read rows 0 .. r, (C_DIM,)
k         STEPS          how many rows below the context the patch lies: 2, 3 or 4
f(x, c)   scores.exp()   positive, large if x and c match; scores[.., i, j] = log f(x_j, c_i)
N         N              candidates for each context, one of them right: one from each image
W_k       W              maps c to a prediction of z; stored transposed, (C_DIM, Z_DIM)
β         SCALE          inverse temperature: multiplies the cosine
L         info_nce       loss in nats
I(x; c)   -              mutual information 𝔼 log p(x|c) / p(x), in nats; nce_bound is a lower bound

Noise-contrastive estimation. One could model the density p(x|c), but a density must account for
every pixel. It is easier to tell one sample of p(x|c) from N - 1 samples of p(x), noise taken from
the data itself. Let x_1 .. x_N be all of them, shuffled. If x_i is the sample of p(x|c), their
likelihood is p(x_i|c) Π_{j≠i} p(x_j). A priori all i are equally likely, so by Bayes' rule, where
Π_j p(x_j) cancels,

  (1)  p(i | x_1 .. x_N, c) = [p(x_i|c) / p(x_i)] / Σ_j [p(x_j|c) / p(x_j)]                      [5]

This is a classification into N classes. With a softmax over scores log f, its cross-entropy is

  (2)  L = -𝔼 log( f(x_i, c) / Σ_j f(x_j, c) )                                                   [4]

It is minimal when the classifier equals (1). So the optimal f is the density ratio, up to a factor
that depends on c alone,

  (3)  f*(x, c) = p(x|c) / p(x)                                                                  [2]

The paper's score is bilinear, zᵀ W_k c; here both vectors are normalised first:

  (4)  log f_k(x, c) = β cos(z, W_k c), another W_k for each k                                   [3]

Mutual information. Take any f, and let x_i be the right candidate. Write f for f(x_i, c), and m
for the mean 1/N Σ_j f(x_j, c) over all candidates.
  - If all N candidates were samples of p(x), every f(x_j, c) / m would have the same mean, by
    symmetry. The N terms sum to N, so 𝔼_{p(x)} f / m = 1.
  - In truth x_i is a sample of p(x|c), and p(x) / p(x|c) turns its expectation into one over p(x).
    By Jensen's inequality 𝔼 log( f / m · p(x) / p(x|c) ) ≤ log 𝔼_{p(x)} f / m = log 1 = 0,
    so 𝔼 log f / m ≤ 𝔼 log p(x|c) / p(x) = I(x; c).
  - f / m is N times the fraction in (2), so 𝔼 log f / m = log N - L, and

  (5)  I(x; c) ≥ log N - L                                                                [appendix]

The bound is at most log N. It approaches I for the optimal f as N grows.

Images. Patches of side 2 s are taken every s pixels. Rows r and r + 1 share pixels, so one row
ahead could be predicted by copying; rows r and r + 2 share none. The encoding of a patch depends on
that patch alone:

  (6)  z_{r,q} = g(x_{r,q}),  c_{r,q} = GRU(c_{r-1,q}, [z_{r,q-1}, z_{r,q}, z_{r,q+1}]),  k ≥ 2

The features are z alone, frozen, averaged over 2 x 2 patches: 3 x 3 means, 288 values an image,

  (7)  h = ¼ Σ_{u,v ∈ {0,1}} z_{2a+u, 2b+v},  a, b = 0 .. 2

A linear probe, logistic regression on h with the labels y_i of n images, measures how good they
are. With h standardised and a 1 appended, it minimises over V

  (8)  -1/n Σ_i log softmax(V h_i)[y_i] + λ/2 ‖V‖²,  λ = 0.0002,
       whose gradient is 1/n Σ_i (softmax(V h_i) - onehot(y_i)) h_iᵀ + λ V

The features can also judge the images of a generative model. With mean μ and covariance Σ of its h,
and μ', Σ' of test images, the Fréchet distance of the two Gaussians is (FID, with other features)

  (9)  d² = ‖μ - μ'‖² + tr(Σ + Σ' - 2 (Σ Σ')^{1/2})

Pitfalls:
- A softmax over the other axis asks which context belongs to x. It bounds the same I, but is not
  (2). Break it: log_softmax(-2) in info_nce, and test_cpc_eq2_loss fails.
- Negatives must be sampled from p(x) independently of c. Other patches of c's own image are not, so
  each image contributes one candidate.
- The accuracy of a probe means little without its controls: on MNIST, features of the same network
  without training beat pixels. Nor does d² without its floor: that of as many training images.

Differences from the paper:
- Small images, not crops of ImageNet. An MLP, not a ResNet; a GRU, not a masked convolution;
  cosines; all negatives from other images. In the probe, nearly constant features stay small.

python cpc.py --data mnist                             four minutes on two cores, with the probes
python cpc.py --data mnist --judge out/ddim/samples.npy                      of a model of MNIST
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

ROWS = 6  # patches a side
STEPS = (2, 3, 4)  # the k
Z_DIM = 32
C_DIM = 64
SCALE = 10.0


# -------------------------------------------------------------------------------------------------- method ------------
def info_nce(scores):
    """The loss of each context in nats, (..., N), of scores (..., N, N): [i, i] is the right candidate of context i."""
    # The negatives of context i are the patches at the same place in the other N - 1 images of the batch, j != i. The
    # softmax runs over j, the last axis: over the candidates of one context, not over the contexts of one candidate.
    log_p = scores.log_softmax(-1)  # (1)
    return -log_p.diagonal(dim1=-2, dim2=-1)  # (2)


def log_f(z, c, W):
    """The scores of each context with each candidate, (..., N, N). z: (..., N, Z_DIM); c: (..., N, C_DIM)."""
    prediction = F.normalize(c @ W, dim=-1)
    return SCALE * prediction @ F.normalize(z, dim=-1).transpose(-1, -2)  # (4)


def loss_cpc(model, x):
    """The loss of images (N, C, H, W), -1 .. 1, for each k: (3,), in nats."""
    return torch.stack([info_nce(scores).mean() for scores in model(x)])  # minimal for exp(scores) = (3)


# ------------------------------------------------------------------------------------------------- network ------------
# Any encoder g, and any context network over the rows above, fits the functions above.
class CPC(nn.Module):
    """The encoder g, the GRU and the W_k, for images (N, channels, size, size), -1 .. 1. ValueError if size < 7.

    classes > 0 adds a linear classifier, the head of the control that is trained with labels."""

    def __init__(self, channels=1, size=28, width=256, classes=0):
        super().__init__()
        if size < ROWS + 1:
            raise ValueError(f"--size {size}: {ROWS} overlapping rows of patches need at least {ROWS + 1} pixels")
        self.shape = (channels, size, size)
        self.stride = math.ceil(size / (ROWS + 1))
        self.encoder = nn.Sequential(
            nn.Linear(channels * (2 * self.stride) ** 2, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, Z_DIM),
        )
        self.gru = nn.GRU(3 * Z_DIM, C_DIM)
        self.W = nn.ParameterList(torch.randn(C_DIM, Z_DIM) / C_DIM**0.5 for _ in STEPS)
        self.head = nn.Linear((ROWS // 2) ** 2 * Z_DIM, classes) if classes else None

    def patches(self, x):
        """x (N, C, H, H) -> (rows, columns, N, pixels of a patch). x is padded with black to side 7 s."""
        s = self.stride
        missing = (ROWS + 1) * s - x.shape[3]
        before = missing // 2
        after = missing - before
        x = F.pad(x, (before, after, before, after), value=-1)  # (N, C, 7 s, 7 s)
        x = x.unfold(2, 2 * s, s).unfold(3, 2 * s, s)  # (N, C, rows, columns, 2 s, 2 s)
        return x.permute(2, 3, 0, 1, 4, 5).flatten(3)

    def context(self, z):
        """z (rows, columns, N, Z_DIM) -> c (rows, columns, N, C_DIM). Row r depends on the rows 0 .. r."""
        wide = F.pad(z, (0, 0, 0, 0, 1, 1))  # zeros beside the first and the last column
        wide = torch.cat([wide[:, :-2], z, wide[:, 2:]], dim=3)  # (rows, columns, N, 3 Z_DIM)
        c, _ = self.gru(wide.flatten(1, 2))  # (6)
        return c.view(*z.shape[:3], C_DIM)

    def forward(self, x):
        """The scores for each k, (ROWS - k, ROWS, N, N): every context with every patch k rows below it."""
        z = self.encoder(self.patches(x))  # (6)
        c = self.context(z[: ROWS - STEPS[0]])  # the last two rows have no patch two rows below
        return [log_f(z[k:], c[: ROWS - k], W) for k, W in zip(STEPS, self.W)]

    def features(self, x):
        """The features of images, (N, 288)."""
        z = self.encoder(self.patches(x))  # (rows, columns, N, Z_DIM)
        z = z.view(ROWS // 2, 2, ROWS // 2, 2, len(x), Z_DIM)
        return z.mean((1, 3)).permute(2, 0, 1, 3).flatten(1)  # (7)


# ------------------------------------------------------------------------------------------------ training ------------
def train(
    images,
    iters=6500,
    batch=64,
    lr=2e-3,
    width=256,
    device="cpu",
    seed=0,
    path=None,
    fresh=False,
    data=None,
    labels=None,
):
    """Trains on uint8 images (N, C, H, H) and returns the EMA model, for encode(). Seeds torch's global generator.

    labels: int64 (N,). With them, features and a linear head learn to classify instead: a control.
    path: the checkpoint, resumed unless fresh; data: the name of the data, stored in it.
    ValueError if the checkpoint has other settings, FloatingPointError if the loss is not finite."""
    settings = dict(method="cpc", data=data, width=width, iters=iters, batch=batch, lr=lr, seed=seed)
    settings |= image_settings(images)
    classes = 0 if labels is None else int(labels.max()) + 1
    settings["classes"] = classes
    settings["labels"] = hashlib.sha256(labels.numpy()).hexdigest() if classes else ""
    if batch < 2:
        raise ValueError(f"--batch {batch}: the negatives are other images of the batch, so it needs at least 2")
    torch.manual_seed(seed)
    model = CPC(settings["channels"], settings["size"], width, classes).to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    ema.gru.flatten_parameters()  # CUDA wants the weights of a GRU in one piece, which a copy is not
    opt = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99))
    columns = "loss" if classes else ",".join(f"loss_{k}" for k in STEPS)
    images = images.to(device)
    labels = labels.to(device) if classes else None
    losses = []

    for i in iterations(iters, losses, dict(model=model, ema=ema, opt=opt), settings, path, fresh, columns):
        opt.param_groups[0]["lr"] = lr * min((i + 1) / 200, 1 - i / iters)  # warm-up, then linear decay
        index = torch.randint(len(images), (batch,), device=device)
        x = images[index].float() / 127.5 - 1
        if classes:
            loss = F.cross_entropy(model.head(model.features(x)), labels[index])[None]
        else:
            loss = loss_cpc(model, x)
        opt.zero_grad()
        loss.mean().backward()
        opt.step()
        update_ema(ema, model, decay=min(0.998, (1 + i) / (10 + i)))
        losses.append(loss.detach())
    return ema


# ---------------------------------------------------------------------------------------------- evaluation ------------
def nce_bound(scores):
    """The lower bound of I(x; c) in nats that each context of scores (..., N, N) gives -> (..., N)."""
    return math.log(scores.shape[-1]) - info_nce(scores)  # (5)


def nce_hits(scores):
    """1 where the right candidate of scores (..., N, N) has the highest score, else 0 -> (..., N)."""
    right = torch.arange(scores.shape[-1], device=scores.device)
    return (scores.argmax(-1) == right).float()


@torch.inference_mode()
def evaluate_nce(model, images, n=500):
    """The bound (5) and the share of right choices, on uint8 images (M, C, H, H) on the model's device, in sets of n.

    n is at most M, and an incomplete set is left out. Returns a row for each k, (3, 3): the bound in nats, its
    standard error over images, and the share, averaged over places; and n. ValueError unless the images are uint8."""
    image_settings(images)
    n = min(n, len(images))
    bounds, hits = [], []
    for part in images[: len(images) // n * n].split(n):
        scores = model(part.float() / 127.5 - 1)
        bounds.append(torch.stack([nce_bound(s).mean((0, 1)) for s in scores]))
        hits.append(torch.stack([nce_hits(s).mean((0, 1)) for s in scores]))
    bounds = torch.cat(bounds, dim=1)  # (k, images)
    hits = torch.cat(hits, dim=1)
    errors = bounds.std(1, correction=0) / bounds.shape[1] ** 0.5
    return torch.stack([bounds.mean(1), errors, hits.mean(1)], dim=1).cpu(), n


@torch.inference_mode()
def encode(model, images, chunk=1000):
    """The features of uint8 images (N, C, H, H) -> (N, 288), on the model's device."""
    image_settings(images)
    device = next(model.parameters()).device
    features = [model.features(part.to(device).float() / 127.5 - 1) for part in images.split(chunk)]
    return torch.cat(features)


def linear_probe(h, y, others, weight_decay=2e-4, iters=100):
    """Logistic regression on features h (n, D) with labels y (n,), by L-BFGS -> the classes of others (m, D), (m,)."""
    mean = h.mean(0)
    scale = h.std(0, correction=0)
    scale = scale.clamp(min=0.1 * scale.max().item() + 1e-9)  # nearly constant features are not blown up
    h = F.pad((h - mean) / scale, (0, 1), value=1.0)
    others = F.pad((others - mean) / scale, (0, 1), value=1.0)
    onehot = F.one_hot(y).t().to(h.dtype)  # (classes, n)
    V = torch.zeros(len(onehot), h.shape[1], dtype=h.dtype, device=h.device)
    opt = torch.optim.LBFGS([V], max_iter=iters, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def objective():
        log_p = (V @ h.t()).log_softmax(0)
        V.grad = (log_p.exp() - onehot) @ h / len(h) + weight_decay * V  # (8)
        return -(log_p * onehot).sum() / len(h) + weight_decay / 2 * V.square().sum()  # (8)

    opt.step(objective)
    return (V @ others.t()).argmax(0)


def learning_curve(h, others, y, other_y):
    """The test accuracy of probes trained on h (n, D), on others (m, D) -> {number of labels: accuracy}.

    With fewer labels than images it is the mean over five random subsets, the same for all features."""
    generator = torch.Generator().manual_seed(0)
    curve = {}
    for n in [n for n in (10, 100, 1000) if n < len(h)] + [len(h)]:
        accuracies = []
        for _ in range(5 if n < len(h) else 1):
            subset = torch.randperm(len(h), generator=generator)[:n].to(h.device)
            right = linear_probe(h[subset], y[subset], others) == other_y
            accuracies.append(right.float().mean().item())
        curve[n] = sum(accuracies) / len(accuracies)
    return curve


def frechet(a, b):
    """The squared Fréchet distance of Gaussians with the means and covariances of features a (n, D) and b (m, D)."""
    a, b = a.cpu().double(), b.cpu().double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ cov_b @ root)  # has the eigenvalues of cov_a @ cov_b
    trace = cov_a.trace() + cov_b.trace() - 2 * product.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + trace).item()  # (9)


def read_samples(path, shape):
    """The images of a samples.npy, uint8 (N, H, W) or (N, H, W, 3) -> (N, C, H, W). ValueError for other shapes."""
    try:
        array = np.load(path)
    except (EOFError, ValueError) as e:
        raise ValueError(f"--judge {path}: not a file of samples ({e})") from e
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim not in (3, 4):
        raise ValueError(f"--judge {path}: must be one array of images, uint8 (N, H, W) or (N, H, W, 3)")
    x = torch.from_numpy(array)
    x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2)
    if x.shape[1:] != shape or len(x) < 2:
        raise ValueError(f"--judge {path}: {len(x)} images of shape {tuple(x.shape[1:])}, not several of {shape}")
    return x


def judge(model, paths, images, test_images, y=None):
    """Prints how far the features of samples are from those of test images, and, with labels y, their classes."""
    samples = [encode(model, read_samples(path, model.shape)) for path in paths]
    h = encode(model, images)
    test_h = encode(model, test_images)
    classes = [None] * len(paths)
    if y is not None:
        sizes = [len(x) for x in samples]
        classes = linear_probe(h, y.to(h.device), torch.cat(samples)).split(sizes)
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(0))
    for path, x, found in zip(paths, samples, classes):
        floor = frechet(h[order[: len(x)]], test_h)
        print(f"{path}: Frechet distance {frechet(x, test_h):.3f} (as many training images: {floor:.3f})", end="")
        if found is not None:
            share = found.bincount(minlength=int(y.max()) + 1) / len(found)
            kl = torch.special.entr(share).sum().neg() + math.log(len(share))
            print(f", {(share >= 0.2 / len(share)).sum()} of {len(share)} classes, KL {kl:.3f} nats", end="")
        print(f", {len(x)} images")


def plot_curves(path, curves):
    """Saves a plot of {name: {number of labels: accuracy}}. x: log of labels; y: log of the error, 1 - accuracy."""
    image = Image.new("RGB", (760, 440), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(15)
    counts = list(next(iter(curves.values())))

    def position(n, accuracy):
        x = math.log(n / counts[0]) / max(math.log(counts[-1] / counts[0]), 1e-9)
        y = math.log(max(1 - accuracy, 0.005)) / math.log(0.005)
        return 70 + 660 * x, 390 - 350 * y

    for accuracy in (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995):
        x, y = position(counts[0], accuracy)
        draw.line((x, y, 730, y), "#dddddd")
        draw.text((x - 8, y), f"{accuracy:.1%}", "black", font, "rm")
    for n in counts:
        x, y = position(n, 0)
        draw.text((x, y + 8), str(n), "black", font, "mt")
    draw.text((400, 436), "labelled images", "black", font, "mb")
    draw.text((70, 12), "test accuracy of a linear probe:", "black", font)
    for i, (name, curve) in enumerate(curves.items()):
        colour = ("#c0392b", "#2471a3", "#7f8c8d")[i]
        points = [position(n, accuracy) for n, accuracy in curve.items()]
        draw.line(points, colour, 3)
        for x, y in points:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
        draw.text((340 + 140 * i, 12), name, colour, font)
    image.save(path)


# ------------------------------------------------------------------------------------------------- command ------------
def load(path, device="cpu"):
    """The EMA model in a checkpoint of cpc.py, for encode(). Its images have the shape model.shape, (C, H, W)."""
    settings = load_checkpoint(path, "cpc")["settings"]
    model = CPC(settings["channels"], settings["size"], settings["width"], settings["classes"])
    load_checkpoint(path, ema=model)
    return model.to(device).requires_grad_(False).eval()


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
    add("--iters", type=positive, default=6500, help="training iterations")
    add("--batch", type=positive, default=64, help="batch size")
    add("--lr", type=float, default=2e-3, help="peak learning rate")
    add("--width", type=positive, default=256, help="units in the hidden layers of the encoder")
    add("--samples", type=positive, default=10, help="test images in neighbours.png")
    add("--judge", type=Path, nargs="+", default=[], help="files samples.npy of other models of this data to judge")
    add("--out", type=Path, default=Path("out/cpc"), help="run folder")
    add("--device", type=pick_device, default=pick_device(), help="where to compute")
    add("--seed", type=int, default=0, help="seed; on a CPU the same seed gives the same bits")
    add("--fresh", action="store_true", help="train from scratch over the checkpoint in --out")
    args = parse_args(parser, argv)

    images = load_images(args.data, args.size, args.channels)
    test_images = load_images(args.data, args.size, args.channels, test=True)
    y = load_labels(args.data, len(images))
    test_y = load_labels(args.data, len(test_images), test=True)
    print(f"{len(images)} images of {args.size}x{args.size}x{args.channels} from {args.data}, on {args.device}")
    settings = args.iters, args.batch, args.lr, args.width, args.device, args.seed
    for path in args.judge:
        read_samples(path, (args.channels, args.size, args.size))  # refuses a wrong file before training
    model = train(images, *settings, args.out / "model.pt", args.fresh, args.data)
    if args.judge:
        judge(model, args.judge, images, test_images, y)
        return

    print("the bound on I(x; c) grows with the number N of candidates, and stays below log N:")
    for n in [n for n in (4, 16, 64) if n < len(test_images)]:
        table, _ = evaluate_nce(model, test_images.to(args.device), n)
        nats = ", ".join(f"{bound:.3f}" for bound in table[:, 0].tolist())
        print(f"N = {n}: log N = {math.log(n):.3f}, I(x; c) >= {nats} nats, {', '.join(map(str, STEPS))} rows ahead")
    table, n = evaluate_nce(model, test_images.to(args.device))
    print(f"test images in sets of {n}: log N = {math.log(n):.3f} nats, a random choice is right in {1 / n:.2%}")
    for k, (bound, error, hits) in zip(STEPS, table.tolist()):
        loss = math.log(n) - bound
        print(
            f"{k} rows ahead: loss {loss:.3f} +- {error:.3f}, I(x; c) >= {bound:.3f} nats, "
            f"the right patch chosen in {hits:.2%}"
        )
    h = encode(model, images)
    test_h = encode(model, test_images)
    distances = torch.cdist(test_h[: args.samples], h)
    nearest = distances.topk(min(9, len(h)), largest=False).indices.cpu()
    rows = torch.cat([test_images[: len(nearest), None], images[nearest]], dim=1)  # (samples, 10, C, H, W)
    save_grid(args.out / "neighbours.png", rows.flatten(0, 1).float() / 127.5 - 1, columns=rows.shape[1])
    print(f"{args.out}/neighbours.png (each row: a test image and the nearest training images)")
    if y is None or test_y is None:
        print("no labels found (IDX label files, or one subfolder for each class), so the linear probe is skipped")
        return

    path = args.out / "labels" / "model.pt"
    supervised = train(images, *settings, path, args.fresh, args.data, labels=y)
    torch.manual_seed(args.seed)
    untrained = CPC(args.channels, args.size, args.width).to(args.device)  # the weights that train() began with
    pixels = [x.flatten(1).to(args.device).float() / 127.5 - 1 for x in (images, test_images)]
    features = {
        "trained": (h, test_h),
        "untrained": (encode(untrained, images), encode(untrained, test_images)),
        "raw pixels": pixels,
    }
    y, test_y = y.to(args.device), test_y.to(args.device)
    print("test accuracy of a linear probe, by the number of labelled images (mean of five subsets, but for all)")
    curves = {}
    for name, (train_features, test_features) in features.items():
        curves[name] = learning_curve(train_features, test_features, y, test_y)
        shares = "  ".join(f"{count}: {accuracy:.2%}" for count, accuracy in curves[name].items())
        print(f"{name + ',':<11} {train_features.shape[1]} values an image:  {shares}")
    plot_curves(args.out / "labels.png", curves)
    right = supervised.head(encode(supervised, test_images)).argmax(1) == test_y
    print(f"the same network, trained with labels: {right.float().mean():.2%}")
    print(f"{args.out}/labels.png, log.csv, model.pt")


# ------------------------------------------------------------------------------------------------ plumbing ------------
# Data, pictures, checkpoints, progress: the same text in every file, and nothing of the method. You may stop here.
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_SHA256 = {"train": "440fcabf73cc546fa21475e81ea37026", "t10k": "8d422c7b0a1c1c79245a5bcf07fe86e3"}  # first half
LABELS_SHA256 = {"train": "3552534a0a558bbed6aed32b30c495cc", "t10k": "f7ae60f92e00ec6debd23a6088c31dbd"}  # first half
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


def read_labels(path, n):
    """n labels, int64 (n,), in an IDX file: bytes, or the first column of QMNIST's integers. ValueError if not."""
    raw = read_bytes(path)
    dtype = {b"\0\0\x08\1": np.uint8, b"\0\0\x0c\2": ">i4"}.get(raw[:4])
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in (4, 8)][: raw[3]] if dtype else []
    size = np.dtype(dtype).itemsize * math.prod(shape)
    if shape[:1] != [n] or len(raw) != 4 + 4 * len(shape) + size:
        raise ValueError(f"{path}: not {n} labels, one for each image")
    labels = np.frombuffer(raw, dtype, offset=4 + 4 * len(shape)).reshape(n, -1)
    return torch.from_numpy(labels[:, 0].astype(np.int64))


def load_labels(data, n, test=False):
    """The classes of the n images of load_images(data, test=test), int64 (n,), or None if there are none.

    They are those of the drawn digits, of the IDX label file, or the top-level subfolders, in alphabetical order."""
    part = "t10k" if test else "train"
    if data == "digits":
        return torch.arange(n) % 10
    if data == "mnist":
        return read_labels(download_mnist(f"{part}-labels-idx1-ubyte.gz", LABELS_SHA256[part]), n)
    if find_idx(data, "images", test):
        path = find_idx(data, "labels", test)
        return read_labels(path, n) if path else None
    folders = [path.relative_to(data).parts[:-1] for path in list_files(data) if path.suffix.lower() in PICTURES]
    names = sorted({folder[:1] for folder in folders})
    if () in names or len(names) < 2:
        return None
    paths = list_pictures(data, test)
    return torch.tensor([names.index(path.relative_to(data).parts[:1]) for path in paths])


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
