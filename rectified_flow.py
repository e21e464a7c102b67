# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""Rectified flow: an ODE from noise to images, learned from straight lines, and straightened until one step will do.

Paper: Liu, Gong, Liu, "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow", ICLR 2023,
arXiv:2209.03003. [1] is its equation 1. In the paper, here and in every line below: t = 0 is noise and t = 1 is data.

symbol      in the code  what it is
X_0, X_1    x_0, x_1     a coupling of noise N(0, I) and images, -1 .. 1 (byte k is 2 k / 255 - 1), (N, C, H, W) both
t           t            time, 0 .. 1, (N,) floats, or one float
X_t         x_t          the point at t on the straight line from X_0 to X_1
v(x, t)     model(x, t)  velocity, (N, C, H, W)
Z_t         z            the flow: a solution of the ODE that starts at noise, Z_0 = X_0
N           steps        Euler steps

Draw X_0 and X_1, at first independently, and the line between them; from a point X_t on it guess its direction:
  (1) X_t = t X_1 + (1 - t) X_0
  (2) min_v  integral over t of E || (X_1 - X_0) - v(X_t, t) ||^2                                                    [1]
The least-squares answer is the conditional mean, so where lines cross it is the average of their directions:
  (3) v(x, t) = E[X_1 - X_0 | X_t = x]                                                                               [2]
  (4) dZ_t = v(Z_t, t) dt,  Z_0 = X_0                                                                                [1]
Z_1 comes on other paths, yet with the law of X_1. For smooth h of bounded support, by the chain rule, (1), then (3),
      d/dt E h(X_t) = E[grad h(X_t) . (X_1 - X_0)] = E[grad h(X_t) . v(X_t, t)].
That is how expectations evolve when points move with velocity v; Z_t moves so and starts alike, so, if (4) has just one
solution from each start, Z_t has at each t the law of X_t [Theorem 3.3]. Then the paths of Z cannot cross as the lines
do: the flow rewires them.
To draw, solve (4): with N equal steps of Euler,
  (5) z <- z + v(z, t) / N,  t = 0, 1/N, ..., (N - 1)/N
or with steps chosen by the embedded pair of Dormand and Prince (1980), orders 5 and 4, as the paper's headline does:
  (6) k_i = v(z + h sum_j a_ij k_j, t + c_i h), i = 1 .. 7;  z <- z + h sum_i b_i k_i;  error = h sum_i e_i k_i
      accepted if r, its root mean square in units of tol (1 + max(|z| before, |z| after)), is at most 1; accepted or
      not, h <- h min(5, max(0.2, 0.9 r^(-1/5))).
A path is straight when its velocity never differs from the whole way it goes:
  (7) S = integral over t of E || (Z_1 - Z_0) - v(Z_t, t) ||^2                                                       [3]
If S = 0, (5) is exact for N = 1. At Euler's points Z_1 - Z_0 is the mean of the velocities and S their variance.
Independent X_0 and X_1 give crossing lines, averaged directions, curved paths, and a blur after one step. Reflow takes
  (8) (X_0, X_1) <- (Z_0, Z_1), noise and the image that the flow makes of it,
and trains on (2) again. These lines hardly cross, so the new flow is straighter, and no convex cost
E c(X_1 - X_0) grows [Theorem 3.5]. By the argument above X_1 keeps its law, as far as the first flow has kept it.

Trip wires: not diffusion's time: t grows towards the picture. Noise is randn, time is rand. The network sees the point
where it is, z at t, never Z_0 again. Reflow needs the noise that made each image, not new noise. The loss of the code
is (2) divided by C H W, a mean over pixels; S is a sum over them.
Differs from the paper in: t is not uniform but the logistic function of a normal (Esser et al. 2024, arXiv:2403.03206),
which spends the effort in the middle, where the picture is decided, and in a reflow the square of a uniform number,
near 0, where a single step looks; either leaves (3) as it is. No distillation; a small network; the average of the
weights remembers little at first; the learning rate falls to zero.

python rectified_flow.py --data mnist --samples 2000     168 s of training and 21 s of sampling on two cores; fd 21.4
python rectified_flow.py --data mnist --samples 2000 --reflow 1 --steps 1     280 s more; fd 53.0 in a single step
"""
import argparse, contextlib, copy, gzip, hashlib, http.client, inspect, io, itertools, math, os, sys, time
import urllib.request, warnings, zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

# --------------------------------------------------------------------------------------------------------- method -----
def interpolate(x_0, x_1, t):
    """X_t, for t of shape (N,)."""
    t = t.view(-1, *[1] * (x_0.dim() - 1))
    return t * x_1 + (1 - t) * x_0  # (1)

def loss_flow(model, x_0, x_1, t):
    """The loss that is trained, a scalar: the mean over images and pixels. t: (N,)."""
    direction = x_1 - x_0  # (3) is its mean where lines cross, the best answer to (2)
    return F.mse_loss(model(interpolate(x_0, x_1, t), t), direction)  # (2)

def velocity(model, z, t):
    """dz / dt at a float t."""
    return model(z, torch.full((len(z),), t, device=z.device))  # (4)

@torch.inference_mode()
def euler(model, z, steps):
    """z at t = 0 -> (z at t = 1, the straightness S of (7) for each image, (N,)).

    What comes out are inference tensors, here and in rk45: .clone() them before training on them."""
    mean, square = torch.zeros_like(z), torch.zeros(len(z), device=z.device)
    for i in range(steps):
        v = velocity(model, z, i / steps)
        z = z + v / steps  # (5)
        mean, square = mean + v / steps, square + v.flatten(1).square().sum(1) / steps
    return z, square - mean.flatten(1).square().sum(1)  # (7)

DORMAND_PRINCE = (  # c_i, then a_ij; the last row is b too, so that its k is the next step's first
    (1 / 5, (1 / 5,)),
    (3 / 10, (3 / 40, 9 / 40)),
    (4 / 5, (44 / 45, -56 / 15, 32 / 9)),
    (8 / 9, (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729)),
    (1, (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656)),
    (1, (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
)
ERROR_WEIGHTS = 71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40  # order 5 less order 4

@torch.inference_mode()
def rk45(model, z, tol=1e-3):
    """z at t = 0 -> (z at t = 1, evaluations of the model). The images of z share their steps.

    FloatingPointError if no step is small enough."""
    t, h, k, calls = 0.0, 0.05, [velocity(model, z, 0.0)], 1
    while t < 1:
        h = min(h, 1 - t)
        for c, row in DORMAND_PRINCE:
            z_new = z + h * sum(a * k_j for a, k_j in zip(row, k))  # (6)
            k.append(velocity(model, z_new, t + c * h))  # (6)
        error = h * sum(e * k_i for e, k_i in zip(ERROR_WEIGHTS, k))  # (6)
        ratio = (error / (tol * (1 + torch.maximum(z.abs(), z_new.abs())))).square().mean().sqrt().item()
        calls += 6
        if ratio <= 1:
            t, z, k = t + h if t + h < 1 - 1e-9 else 1.0, z_new, k[-1:]
        else:
            k = k[:1]
            if h < 1e-7:
                raise FloatingPointError(f"rk45 at t = {t:.4f}: no step is small enough for tol {tol}, or NaN")
        h *= min(5.0, max(0.2, 0.9 * max(ratio, 1e-10) ** -0.2))  # (6)
    return z, calls

def make_pairs(model, shape, steps, seed=0, device="cpu", chunk=100):
    """Noise and the images that the flow makes of it: x_0, x_1 of the shape (N, C, H, W), and S of (7), (N,)."""
    generator, pairs = torch.Generator(device).manual_seed(seed), []
    progress = Progress("pair", "images", shape[0])
    for i in range(0, shape[0], chunk):
        x_0 = torch.randn(min(chunk, shape[0] - i), *shape[1:], generator=generator, device=device)
        pairs.append((x_0, *euler(model, x_0, steps)))  # (8)
        progress(i + len(x_0), 1)
    return [torch.cat(part) for part in zip(*pairs)]

# -------------------------------------------------------------------------------------------------------- network -----
# Any f(x, t) that maps (N, C, H, W) and (N,) to (N, C, H, W) would do. This is a small U-Net.
class Block(nn.Module):
    """A residual block; the time e scales and shifts what lies between its two convolutions."""

    def __init__(self, c_in, c_out, c_time):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.time = nn.Linear(c_time, 2 * c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # at first the block passes x on

    def forward(self, x, e):
        scale, shift = self.time(e)[:, :, None, None].chunk(2, 1)  # (N, c_out, 1, 1) each
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        return self.skip(x) + self.conv2(F.silu(torch.addcmul(shift, h, 1 + scale)))

class UNet(nn.Module):
    """x (N, channels, size, size) and t (N,) in 0 .. t_max -> (N, channels, size, size).

    2x2 pixels are first folded into 4 channels, which loses nothing. ValueError unless 4 divides size and 8 width."""

    def __init__(self, channels=1, size=28, width=32, t_max=1000):
        super().__init__()
        if size % 4 or width % 8:
            raise ValueError(f"--size {size} --width {width}: the size must be a multiple of 4, and the width one of 8")
        self.shape, w, c = (channels, size, size), width, 4 * width
        self.register_buffer("omega", torch.logspace(0, 3, w) / t_max, persistent=False)
        self.time = nn.Sequential(nn.Linear(2 * w, c), nn.SiLU(), nn.Linear(c, c), nn.SiLU())
        self.enter, self.leave = nn.Conv2d(4 * channels, w, 3, padding=1), nn.Conv2d(w, 4 * channels, 3, padding=1)
        self.left = nn.ModuleList([Block(w, w, c), Block(w, w, c)])
        self.down, self.up = nn.Conv2d(w, 2 * w, 3, stride=2, padding=1), nn.Conv2d(2 * w, w, 1)
        self.middle = nn.ModuleList([Block(2 * w, 2 * w, c) for _ in range(3)])
        self.right = nn.ModuleList([Block(2 * w, w, c), Block(w, w, c)])
        self.norm, self.gate = nn.GroupNorm(8, w), nn.Linear(c, 2)
        for layer in (self.leave, self.gate):
            nn.init.zeros_(layer.weight)

    def forward(self, x, t):
        angle = t[:, None] * self.omega
        e = self.time(torch.cat([angle.sin(), angle.cos()], 1))  # (N, 4 w)
        h = self.enter(F.pixel_unshuffle(x, 2))  # (N, w, size/2, size/2)
        for block in self.left:
            h = block(h, e)
        kept, h = h, self.down(h)  # (N, w, size/2, size/2), (N, 2 w, size/4, size/4)
        for block in self.middle:
            h = block(h, e)
        h = torch.cat([F.interpolate(self.up(h), scale_factor=2.0), kept], 1)  # (N, 2 w, size/2, size/2)
        for block in self.right:
            h = block(h, e)
        h = F.pixel_shuffle(self.leave(F.silu(self.norm(h))), 2)  # (N, channels, size, size)
        a, b = self.gate(e)[:, :, None, None].chunk(2, 1)  # (N, 1, 1, 1) each
        return (1 + a) * h + b * x  # how much of the answer is x itself depends on t

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

def save_samples(out, x):
    """Images in -1 .. 1, (N, C, H, W): all into out/samples.npy, uint8 (N, H, W[, 3]), 64 into out/samples.png."""
    file = io.BytesIO()
    np.save(file, to_uint8(x).permute(0, 2, 3, 1).squeeze(3).numpy())
    write({out / "samples.npy": file.getvalue()})
    save_grid(out / "samples.png", x[:64])

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

def processes(device, batch):
    """(rank, number) of the processes that torchrun started, a GPU each or the CPU; (0, 1) of any other. All but the
    first fall silent. ValueError if they cannot share a batch equally."""
    dist, cuda = torch.distributed, torch.cuda.is_available() and str(device) != "cpu"
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo")
        sys.stdout = open(os.devnull, "w") if dist.get_rank() else sys.stdout
    if batch % dist.get_world_size():
        raise ValueError(f"--batch {batch}: {dist.get_world_size()} processes cannot share it equally")
    return dist.get_rank(), dist.get_world_size()

def layout(device):
    """channels_last pays on the CPU; convolutions on mps misread such weights (pytorch issue 192212)."""
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last

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
def train(images, iters=5400, batch=32, lr=5e-3, width=32, device="cpu", seed=0, path=None, fresh=False,
          compiled=False, start=None, pairs=20000, pair_steps=25):
    """uint8 images (N, C, H, H) on the CPU -> the averaged model, ready to sample. Seeds torch's global generator.

    With start, a flow, it is a reflow: the images are only looked at for their size, and training goes on from start
    with as many pairs of noise and image as said, each drawn with pair_steps steps of start (again, if interrupted).
    path: where to save; unless fresh, training goes on from what is there. ValueError if that was made otherwise,
    FloatingPointError if the loss is not finite (what was saved last stays)."""
    source = images if start is None else torch.cat([p.flatten().cpu() for p in start.parameters()])
    wanted = dict(channels=images.shape[1], size=images.shape[2], width=width, iters=iters, batch=batch, lr=lr,
                  seed=seed, images=hashlib.sha256(source.contiguous().numpy()).hexdigest()[:12])
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be square, not {images.shape[3]}x{images.shape[2]}")
    rank, world = processes(device, batch)
    torch.manual_seed(seed)
    model = UNet(images.shape[1], images.shape[2], width, t_max=1).to(device, memory_format=layout(device))
    if start is not None:
        wanted |= dict(pairs=pairs, pair_steps=pair_steps)
        model.load_state_dict(start.state_dict())
    average = copy.deepcopy(model).requires_grad_(False).eval()
    opt = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99))
    parts, done, log = (model, average, opt), 0, []
    if path and path.exists() and not fresh:
        done, log = resume(path, parts, load_checkpoint(path, ["rectified_flow"], device, wanted))
    if start is not None and done < iters:
        noise, images, _ = make_pairs(start, (pairs, *images.shape[1:]), pair_steps, seed + 1, device)  # (8)
    net, images = torch.compile(model) if compiled else model, images.to(device)
    if world > 1:
        net, path = nn.parallel.DistributedDataParallel(net), None if rank else path
    progress, total, saved = Progress("iteration", "images", iters, done), torch.zeros((), device=device), time.time()
    for i in range(done, iters):
        opt.param_groups[0]["lr"] = lr * min((i + 1) / 200, 1 - i / iters)
        index = torch.randint(len(images), (batch,), device=device)
        x_1 = images[index] if start is not None else images[index].float() / 127.5 - 1
        x_0 = noise[index] if start is not None else torch.randn_like(x_1)
        t = (torch.rand(1, device=device) + torch.arange(batch, device=device) / batch) % 1  # even over the batch
        t = (2**0.5 * torch.erfinv(2 * t - 1)).sigmoid() if start is None else t**2  # logistic of a normal, or 0-heavy
        loss = loss_flow(net, *(v[rank::world] for v in (x_0, x_1, t)))
        opt.zero_grad()
        loss.backward()
        opt.step()
        memory = min(0.995, (1 + i) / (10 + i))  # short while the weights still move fast
        for a, p in zip(average.parameters(), model.parameters()):
            a.lerp_(p.detach(), 1 - memory)
        total += loss.detach()
        if (i + 1) % 100 == 0 or i + 1 == iters:
            log.append((i + 1, total.item() / (i % 100 + 1)))  # the only place where the device is waited for
            total.zero_()
            if not math.isfinite(log[-1][1]):
                raise FloatingPointError(f"the loss is {log[-1][1]} at iteration {i + 1}; try a smaller --lr")
            if path and (i + 1 == iters or time.time() - saved > 10):
                save_checkpoint(path, "rectified_flow", wanted, parts, i + 1, log)
                saved = time.time()
        progress(i + 1, batch, f"loss {log[-1][1]:.4f}" if log else "")
    return average

def load(path, device="cpu"):
    """The averaged model of a checkpoint, ready to sample; model.shape is the (C, H, W) of its images."""
    state = load_checkpoint(Path(path), ["rectified_flow"], device)
    with or_say(f"{path}: {DAMAGED}"):
        model = UNet(*(state["settings"][name] for name in ("channels", "size", "width")), t_max=1)
        model.load_state_dict(state["parts"][1])
    return model.to(device, memory_format=layout(device)).requires_grad_(False).eval()

def sample(model, shape, steps=50, solver="euler", tol=1e-3, seed=0, device="cpu", chunk=100):
    """Images of the shape (N, C, H, W), values about -1 .. 1, and the evaluations of the model that each one took."""
    generator, images, calls = torch.Generator(device).manual_seed(seed), [], 0
    progress = Progress("sampling, image", "images", shape[0])
    for i in range(0, shape[0], chunk):
        z = torch.randn(min(chunk, shape[0] - i), *shape[1:], generator=generator, device=device)
        x, made = rk45(model, z, tol) if solver == "rk45" else (euler(model, z, steps)[0], steps)
        images, calls = [*images, x], calls + made * len(x)
        progress(i + len(x), 1)
    return torch.cat(images), calls / shape[0]

def main(argv=None):
    parser = image_parser(__doc__, "rectified_flow", train)
    add = parser.add_argument
    add("--width", type=at_least(1), default=32, help="channels at half the side")
    add("--steps", type=at_least(1), default=50, help="N, the steps of Euler")
    add("--solver", choices=("euler", "rk45"), default="euler", help="rk45 chooses its own steps by --tol")
    add("--tol", type=float, default=1e-3, help="error that rk45 may make in a step")
    add("--reflow", type=at_least(0), default=0, help="times to straighten the flow")
    add("--pairs", type=at_least(1), default=20000, help="noises and their images drawn for a reflow")
    args = parser.parse_args(argv)
    with parser.guard():
        rank, _ = processes(args.device, args.batch)
        device = pick_device(args.device)
        if not args.tol > 0:
            raise ValueError(f"--tol {args.tol}: must be above 0")
        images = load_images(args.data, args.size, args.channels)
        print(f"{len(images)} images of {args.size}x{args.size}x{args.channels} from {args.data}, on {device}")
        models, settings = [], (args.iters, args.batch, args.lr, args.width, device, args.seed)
        for k in range(args.reflow + 1):
            path = args.out / (f"reflow{k}" if k else "") / "model.pt"
            start = models[-1] if k else None
            models.append(train(images, *settings, path, args.fresh, args.compile, start, args.pairs))
        if rank:
            return  # the first process goes on alone
        shape = models[0].shape
        x, calls = sample(models[-1], (args.samples, *shape), args.steps, args.solver, args.tol, args.seed, device)
        save_samples(args.out, x)
        generator, rows = torch.Generator(device).manual_seed(args.seed), []
        z = torch.randn(64, *shape, generator=generator, device=device)
        for k, model in enumerate(models):
            drawn = [euler(model, z, steps) for steps in (1, 2, 5, 50)]
            rows += [x[:12] for x, _ in drawn]
            S = drawn[-1][1]
            print(f"straightness after {k} reflows: S = {S.mean():.2f} +- {S.std() / 8:.2f} an image (0 is straight)")
        save_grid(args.out / "steps.png", torch.cat(rows), 12)
        print(f"{args.samples} samples, {calls:.0f} evaluations each: samples.png, samples.npy in {args.out}, with "
              "steps.png: from the same noise in 1, 2, 5 and 50 steps, before reflow and after")

if __name__ == "__main__":
    main()
