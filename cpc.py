# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""CPC: features of images, learned without labels, by telling which of many patches lies below what has been seen.

Paper: van den Oord, Li, Vinyals, "Representation Learning with Contrastive Predictive Coding", 2018, arXiv:1807.03748.

symbol       in the code   what it is
x            patches       squares of an image, each overlapping half of the next, in 6 rows r = 0 .. 5 and 6 columns
z            z             g(x), what the encoder g makes of a patch, (Z,) each
c            c             context: what a GRU has kept of the rows 0 .. r of an image, (C,) for each column
k            k             how many rows below c a patch lies, 2, 3 or 4
f(x, c)      scores.exp()  a positive number, high if x and c belong together; scores[.., i, j] is log f(x_j, c_i)
N            N             candidates, one of which belongs to c
W_k          W             makes a guess of z from c; in the code it is transposed, (C, Z)
tau          TAU           what cosines are multiplied by
L, I(x; c)   info_nce, -   loss; mutual information, of which nce_bound gives a lower bound; both in nats

What x will be, given c, could be learned as a density p(x|c), which has to account for every pixel. Noise-contrastive
estimation asks less: to tell one draw of p(x|c) from N - 1 draws of p(x), noise that the data itself provides. Let
x_1 .. x_N be all of them, shuffled. If x_i is the draw of p(x|c), their likelihood is p(x_i|c) prod_{j != i} p(x_j).
All i are equally probable beforehand, so Bayes' rule, with prod_j p(x_j) divided out, gives
  (1) p(i | x_1 .. x_N, c) = [p(x_i|c) / p(x_i)] / sum_j [p(x_j|c) / p(x_j)]                                         [5]
This is a classification into N classes. With scores log f and a softmax over the candidates the loss is
  (2) L = -E log( f(x_i, c) / sum_j f(x_j, c) )                                                                      [4]
Cross-entropy is least where the classifier is (1): the best f is a ratio of densities, times any factor of c alone,
  (3) f*(x, c) = p(x|c) / p(x)                                                                                       [2]
and no density of pixels was needed. The paper's score is bilinear, z^T W_k c; here the lengths are divided out:
  (4) log f_k(x, c) = tau cos(z, W_k c), another W_k for each k                                                      [3]
How much does c tell about x? For any f let r(x) = p(x) f(x, c) / m, with m the mean of f over x and N - 1 negatives.
If x were drawn from p(x), like them, each of the N terms f(x_j, c) / m would have the same mean, and as their sum is N,
that mean is 1: the integral of r has the mean 1 over the negatives. For given negatives Jensen's inequality says
      E_{p(x|c)} log(r / p(x|c)) <= log of the integral of r,
and the mean of that log over the negatives is, by Jensen again, at most log 1 = 0. On the left stands the mean of
log(f / m) - log(p(x|c) / p(x)), so E log(f / m) <= E log(p(x|c) / p(x)) = I(x; c). And f / m is N times the fraction
in (2), so E log(f / m) = log N - L:
  (5) I(x; c) >= log N - L, which is at most log N, and near I for the f of (3) and many negatives
A patch of side 2 s is cut out every s pixels, so rows r and r + 1 share pixels, which a guess one row ahead could copy.
Rows r and r + 2 share none, and z is made of its own patch and nothing else:
  (6) z_{r,j} = g(x_{r,j}),   c_{r,j} = GRU(c_{r-1,j}, [z_{r,j-1}, z_{r,j}, z_{r,j+1}]),   k >= 2
The features leave the GRU out and are frozen: z averaged over 2 x 2 patches, 3 x 3 means of Z = 32 numbers each,
  (7) encode(x) = 1/4 sum of z_{2a+p,2b+q} over p, q = 0, 1, for a, b = 0 .. 2; 288 numbers an image
How good they are is measured by a linear probe, logistic regression on (7), which is the first to see labels:
  (8) min over V of -1/n sum_i log softmax(V h_i)[y_i] + lambda/2 |V|^2, h the features, each standardised, and a 1;
      its gradient is 1/n sum_i (softmax(V h_i) - onehot(y_i)) h_i^T + lambda V

Trip wires: a softmax along the other axis, over contexts, asks which c belongs to x: its log N - L bounds the same I,
but is not (2). Negatives must come from p(x) whatever c is: patches of c's own image do not, so each image gives one
candidate. (5) holds for each place r, j by itself; what is printed is the mean over places. The accuracy of a probe
means little without its controls: features of the same network, untrained, are already better than pixels.
Differs from the paper in: whole small images, not parts of large ones; an MLP, not a ResNet; a GRU, not a masked
convolution; cosines; all negatives from other images; Adam's rate rises for 200 steps and then falls to zero; results
come from an average of the weights.

python cpc.py --data mnist      136 s to train on two cores; linear probe 98.55 %, of untrained features 95.78 %
python cpc.py --data photos --size 64 --channels 3
"""
import argparse, contextlib, copy, gzip, hashlib, http.client, inspect, io, itertools, math, sys, time
import urllib.request, warnings, zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

ROWS, Z, C, STEPS, TAU = 6, 32, 64, (2, 3, 4), 10.0  # patches a side, numbers in z and in c, the k, tau

# --------------------------------------------------------------------------------------------------------- method -----
def info_nce(scores):
    """Scores (..., N, N), [i, j] of context i and candidate j, i itself the right one -> loss in nats (..., N)."""
    # The negatives of context i are the patches at the same place in the other N - 1 images of the batch, j != i. The
    # softmax runs over j, the last axis: over the candidates of one context, not over the contexts of one candidate.
    log_p = scores.log_softmax(-1)  # (1)
    return -log_p.diagonal(dim1=-2, dim2=-1)  # (2)

def nce_bound(scores):
    """log N - L, a lower bound of I(x; c) in nats, by each context of scores (..., N, N) -> (..., N)."""
    return math.log(scores.shape[-1]) - info_nce(scores)  # (5)

def nce_hits(scores):
    """1 where the right candidate of scores (..., N, N) has the highest one, else 0 -> (..., N)."""
    return (scores.argmax(-1) == torch.arange(scores.shape[-1], device=scores.device)).float()

def log_f(z, c, W):
    """Scores of each context with each candidate: z (..., N, Z), c (..., N, C), W (C, Z) -> (..., N, N)."""
    return TAU * F.normalize(c @ W, dim=-1) @ F.normalize(z, dim=-1).transpose(-1, -2)  # (4)

def losses(model, x, y=None):
    """What training lowers, of images (N, C, H, W), -1 .. 1, in nats: (2) for each k -> (3,). With labels y (N,), given
    only to the control that learns to classify, the cross-entropy of its head -> (1,)."""
    if y is None:
        return torch.stack([info_nce(scores).mean() for scores in model(x)])  # least where exp(score) is (3)
    return F.cross_entropy(model.head(model.features(x)), y)[None]

def linear_probe(h, y, others, weight_decay=2e-4, iters=100):
    """Logistic regression on features h (n, D) with labels y (n,), by L-BFGS -> classes of others (m, D), (m,)."""
    mean, scale = h.mean(0), h.std(0, correction=0)
    scale = scale.clamp(min=0.1 * scale.max().item() + 1e-9)  # a feature that hardly varies stays small
    h, others = (F.pad((v - mean) / scale, (0, 1), value=1.0) for v in (h, others))
    onehot = F.one_hot(y).t().to(h.dtype)  # (classes, n)
    V = torch.zeros(len(onehot), h.shape[1], dtype=h.dtype, device=h.device)
    opt = torch.optim.LBFGS([V], max_iter=iters, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def objective():
        log_p = (V @ h.t()).log_softmax(0)
        V.grad = (log_p.exp() - onehot) @ h / len(h) + weight_decay * V  # (8)
        return -(log_p * onehot).sum() / len(h) + weight_decay / 2 * V.square().sum()  # (8)

    opt.step(objective)
    return (V @ others.t()).argmax(0)

# -------------------------------------------------------------------------------------------------------- network -----
# Any g from patches to z would do above, and any way from the rows above to c: the paper's is a masked convolution.
class CPC(nn.Module):
    """Images (N, channels, size, size), -1 .. 1; ValueError if size < 7. classes > 0 adds a head for labels."""

    def __init__(self, channels=1, size=28, width=256, classes=0):
        super().__init__()
        if size < ROWS + 1:
            raise ValueError(f"--size {size}: {ROWS} overlapping rows of patches take at least {ROWS + 1} pixels")
        self.shape, self.side = (channels, size, size), -(-size // (ROWS + 1))  # s of (6), rounded up
        self.encoder = nn.Sequential(nn.Linear(channels * (2 * self.side) ** 2, width), nn.ReLU(),
                                     nn.Linear(width, width), nn.ReLU(), nn.Linear(width, Z))
        self.gru = nn.GRU(3 * Z, C)
        self.W = nn.ParameterList(torch.randn(C, Z) / C**0.5 for _ in STEPS)
        self.head = nn.Linear((ROWS // 2) ** 2 * Z, classes) if classes else None

    def patches(self, x):
        """x (N, C, H, H) -> (rows, columns, N, C 2s 2s); black around x makes its side 7 s."""
        s, more = self.side, (ROWS + 1) * self.side - x.shape[3]
        x = F.pad(x, (more // 2, more - more // 2) * 2, value=-1)  # (N, C, 7 s, 7 s)
        return x.unfold(2, 2 * s, s).unfold(3, 2 * s, s).permute(2, 3, 0, 1, 4, 5).flatten(3)

    def context(self, z):
        """z (rows, columns, N, Z) -> c (rows, columns, N, C); row r is made of the rows 0 .. r."""
        wide = F.pad(z, (0, 0, 0, 0, 1, 1))  # zeros beside the first and the last column
        wide = torch.cat([wide[:, :-2], z, wide[:, 2:]], 3)  # (rows, columns, N, 3 Z)
        return self.gru(wide.flatten(1, 2))[0].view(*z.shape[:3], C)  # (6)

    def forward(self, x):
        """x -> for each k the scores, (rows, columns, N, N) of every context and every patch k rows below it."""
        z = self.encoder(self.patches(x))  # (6)
        c = self.context(z[: ROWS - STEPS[0]])  # two rows below the others there is no patch
        return [log_f(z[k:], c[: ROWS - k], W) for k, W in zip(STEPS, self.W)]  # (4)

    def features(self, x):
        """x -> (N, 9 Z), with gradients."""
        z = self.encoder(self.patches(x))  # (rows, columns, N, Z)
        return z.view(ROWS // 2, 2, ROWS // 2, 2, len(x), Z).mean((1, 3)).permute(2, 0, 1, 3).flatten(1)  # (7)

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
def load_labels(data, n, test=False):
    """The class of each of the n images that load_images gives -> int64 (n,), or None if the data has no labels.

    They are those of an IDX file, the uppermost subfolders in alphabetical order, or the drawn digits. ValueError or
    OSError for a file of labels that cannot be read, or has another number of them."""
    folder, part = Path("data/mnist" if data == "mnist" else data), "t10k" if test else "train"
    if data == "digits":
        return torch.arange(n) % 10
    if list(folder.glob("*-images*ubyte*")):
        path = min(folder.glob(f"{part}*-labels*ubyte*"), default=None)
        labels = torch.from_numpy(read_idx(path).astype(np.int64)) if path else None
        if path and labels.shape != (n,):
            raise ValueError(f"{path}: want {n} labels, one for each image, got {tuple(labels.shape)}")
        return labels
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES)
    kinds, classes = np.unique([p.relative_to(folder).parts[0] for p in paths], return_inverse=True)
    if any(p.parent == folder for p in paths) or len(kinds) < 2:
        return None
    every = min(10, len(paths))
    return torch.from_numpy(classes[(np.arange(len(paths)) % every == every - 1) == test])

def train(images, iters=6500, batch=64, lr=2e-3, width=256, labels=None, device="cpu", seed=0, path=None, fresh=False,
          compiled=False):
    """uint8 images (N, C, H, H) on the CPU -> the averaged model, for encode(). Seeds torch's global generator.

    labels: int64 (N,); with them the features and a linear head on them learn to classify, and InfoNCE has no part.
    path: where to save; unless fresh, training goes on from what is there. ValueError if that was made otherwise,
    FloatingPointError if the loss is not finite (what was saved last stays)."""
    classes = 0 if labels is None else int(labels.max()) + 1
    wanted = dict(channels=images.shape[1], size=images.shape[2], width=width, classes=classes, iters=iters,
                  batch=batch, lr=lr, seed=seed, images=hashlib.sha256(images.contiguous().numpy()).hexdigest()[:12],
                  labels=hashlib.sha256(labels.numpy()).hexdigest()[:12] if classes else "")
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be square, not {images.shape[3]}x{images.shape[2]}")
    if batch < 2:
        raise ValueError(f"--batch {batch}: the negatives are the other images of a batch, so it takes at least 2")
    torch.manual_seed(seed)
    model = CPC(images.shape[1], images.shape[2], width, classes).to(device)
    average = copy.deepcopy(model).requires_grad_(False).eval()
    opt = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99))
    parts, done, log = (model, average, opt), 0, []
    if path and path.exists() and not fresh:
        done, log = resume(path, parts, load_checkpoint(path, ["cpc"], device, wanted))
    columns = ("loss",) if classes else tuple(f"loss_{k}" for k in STEPS)
    measure, images = torch.compile(losses) if compiled else losses, images.to(device)
    labels, total = labels.to(device) if classes else None, torch.zeros(len(columns), device=device)
    progress, saved = Progress("with labels" if classes else "iteration", "images", iters, done), time.time()
    for i in range(done, iters):
        opt.param_groups[0]["lr"] = lr * min((i + 1) / 200, 1 - i / iters)
        index = torch.randint(len(images), (batch,), device=device)
        loss = measure(model, to_float(images[index]), labels[index] if classes else None)
        opt.zero_grad()
        loss.mean().backward()
        opt.step()
        memory = min(0.998, (1 + i) / (10 + i))  # short while the weights still move fast
        for a, p in zip(average.parameters(), model.parameters()):
            a.lerp_(p.detach(), 1 - memory)
        total += loss.detach()
        if (i + 1) % 100 == 0 or i + 1 == iters:
            log.append((i + 1, *(total / (i % 100 + 1)).tolist()))  # the only place where the device is waited for
            total.zero_()
            if not math.isfinite(sum(log[-1])):
                raise FloatingPointError(f"the loss is {log[-1][1:]} at iteration {i + 1}; try a smaller --lr")
            if path and (i + 1 == iters or time.time() - saved > 10):
                save_checkpoint(path, "cpc", wanted, parts, i + 1, log, columns)
                saved = time.time()
        progress(i + 1, batch, "loss " + " ".join(f"{v:.3f}" for v in log[-1][1:]) if log else "")
    return average

def load(path, device="cpu"):
    """The averaged model of a checkpoint, ready for encode(); model.shape is the (C, H, W) of its images."""
    state = load_checkpoint(Path(path), ["cpc"], device)
    with or_say(f"{path}: {DAMAGED}"):
        model = CPC(*(state["settings"][name] for name in ("channels", "size", "width", "classes")))
        model.load_state_dict(state["parts"][1])
    return model.to(device).requires_grad_(False).eval()

@torch.inference_mode()
def encode(model, x, chunk=1000):
    """Features of images (N, C, H, W), uint8 or float -1 .. 1, on any device -> (N, 288), on the model's."""
    device, floats = next(model.parameters()).device, to_float if x.dtype == torch.uint8 else torch.Tensor.float
    return torch.cat([model.features(floats(part.to(device))) for part in x.split(chunk)])

@torch.inference_mode()
def evaluate_nce(model, x, n=500):
    """uint8 images (M, C, H, H) in sets of n, the rest left out -> a row for each k, (3, 3): loss in nats, its error
    over the images, share of right choices, all of them means over the places r, j; and n, which is at most M."""
    n, rows = min(n, len(x)), []
    for part in x[: len(x) // n * n].split(n):
        scores = model(to_float(part))
        rows.append(torch.stack([torch.stack([f(s).mean((0, 1)) for s in scores]) for f in (info_nce, nce_hits)]))
    loss, hits = torch.cat(rows, 2)  # (k, images) each
    return torch.stack([loss.mean(1), loss.std(1, correction=0) / loss.shape[1] ** 0.5, hits.mean(1)], 1).cpu(), n

def learning_curve(h, others, y, wanted):
    """The share of others (m, D) that probes on h (n, D) class right, by number of labels -> {number: accuracy}.

    Of fewer labels than there are, the mean over five draws, the same ones for all features."""
    curve, generator = {}, torch.Generator().manual_seed(0)
    for n in [n for n in (10, 100, 1000) if n < len(h)] + [len(h)]:
        picks = [torch.randperm(len(h), generator=generator)[:n] for _ in range(5 if n < len(h) else 1)]
        right = [(linear_probe(h[i], y[i], others) == wanted).float().mean().item() for i in picks]
        curve[n] = sum(right) / len(right)
    return curve

def plot_labels(curves):
    """{name: {number of labels: accuracy}} -> a Pillow image, both on logarithmic scales, of accuracy by its errors."""
    image = Image.new("RGB", (760, 440), "white")
    draw, font, colours = ImageDraw.Draw(image), ImageFont.load_default(15), ("#c0392b", "#2471a3", "#7f8c8d")
    left, top, right, bottom = 70, 40, 730, 390
    counts = list(next(iter(curves.values())))
    across = lambda n: left + (right - left) * math.log(n / counts[0]) / (math.log(counts[-1] / counts[0]) or 1)
    down = lambda share: bottom + (top - bottom) * math.log10(max(1 - share, 0.005)) / math.log10(0.005)
    for share in (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995):
        draw.line((left, down(share), right, down(share)), "#dddddd")
        draw.text((left - 8, down(share)), f"{100 * share:g} %", "black", font, "rm")
    for n in counts:
        draw.text((across(n), bottom + 8), str(n), "black", font, "mt")
    draw.text(((left + right) / 2, 436), "labelled images", "black", font, "mb")
    draw.text((left, 12), "test accuracy of a linear probe:", "black", font)
    for i, (name, curve) in enumerate(curves.items()):
        spots = [(across(n), down(share)) for n, share in curve.items()]
        draw.line(spots, colours[i], 3)
        for x, y in spots:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), colours[i])
        draw.text((340 + 140 * i, 12), name, colours[i], font)
    return image

def main(argv=None):
    parser = image_parser(__doc__, "cpc", train)
    parser.set_defaults(samples=10)  # the rows of neighbours.png: test images, and what is drawn beside them
    add, default = parser.add_argument, inspect.signature(train).parameters
    add("--width", type=at_least(1), default=default["width"].default, help="units of a hidden layer of the encoder")
    args = parser.parse_args(argv)
    with parser.guard():
        device, path = pick_device(args.device), args.out / "model.pt"
        images, held_out = (load_images(args.data, args.size, args.channels, test) for test in (False, True))
        y, wanted = load_labels(args.data, len(images)), load_labels(args.data, len(held_out), True)
        print(f"{len(images)} images of {args.size}x{args.size}x{args.channels} from {args.data}, on {device}")
        settings = args.iters, args.batch, args.lr, args.width
        train(images, *settings, None, device, args.seed, path, args.fresh, args.compile)
        model = load(path, device)
        table, n = evaluate_nce(model, held_out.to(device))
        print(f"test images in sets of {n}, so log N = {math.log(n):.3f} nats, and chance is {1 / n:.2%}")
        for k, (loss, error, hits) in zip(STEPS, table.tolist()):
            print(f"{k} rows ahead: loss {loss:.3f} +- {error:.3f}, I(x; c) >= {math.log(n) - loss:.3f} nats, "
                  f"the right patch picked in {hits:.2%}")
        h, others = encode(model, images), encode(model, held_out)
        near = torch.cdist(others[: args.samples], h).topk(min(9, len(h)), largest=False).indices.cpu()
        rows = torch.cat([held_out[: len(near), None], images[near]], 1)  # (samples, 10, C, H, W)
        save_grid(args.out / "neighbours.png", to_float(rows.flatten(0, 1)), rows.shape[1])
        labelled = y is not None and wanted is not None
        if not labelled:
            print("no labels for both parts, from IDX files or from a subfolder for each class: so no probe")
        else:
            train(images, *settings, y, device, args.seed, args.out / "labels" / "model.pt", args.fresh, args.compile)
            taught = load(args.out / "labels" / "model.pt", device)
            torch.manual_seed(args.seed)
            untrained = CPC(args.channels, args.size, args.width)  # what train() began with
            kinds = {"trained": (h, others),
                     "untrained": [encode(untrained.to(device), x) for x in (images, held_out)],
                     "raw pixels": [to_float(x).flatten(1).to(device) for x in (images, held_out)]}
            curves = {name: learning_curve(*pair, y.to(device), wanted.to(device)) for name, pair in kinds.items()}
            png = io.BytesIO()
            plot_labels(curves).save(png, "PNG")
            write({args.out / "labels.png": png.getvalue()})
            print("test accuracy of a linear probe by the number of labelled images, mean of five draws but for all")
            for name, curve in curves.items():
                shares = "  ".join(f"{count}: {share:.2%}" for count, share in curve.items())
                print(f"{name + ',':<11} {kinds[name][0].shape[1]} numbers an image:  {shares}")
            right = (taught.head(encode(taught, held_out)).argmax(1).cpu() == wanted).float().mean()
            print(f"the same network, all of it trained with labels: {right:.2%}")
        print(f"neighbours.png in {args.out} (each row a test image and the nearest of the training images), with "
              f"{'labels.png, ' * labelled}log.csv, model.pt")

if __name__ == "__main__":
    main()
