# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""Checkpointing: a deep network is trained in little memory, by running parts of it again instead of keeping them.

Papers: Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv:1604.06174;
Griewank, Walther, "Algorithm 799: Revolve", ACM Transactions on Mathematical Software 26, 2000; for unequal layers
Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova, "Optimal Checkpointing for Heterogeneous Chains", arXiv:1911.13214.

symbol      in the code     what it is
f_i, x_i    layers[i], x    layer i of n, i = 0 .. n - 1, and its input; x_n is the output of the last
w_i         chain.w[i]      bytes of x_i, 64 KB for 128 rows of 128 numbers in float32
a_i         chain.a[i]      bytes that autograd keeps of layer i: x_i and what is computed inside, but not x_{i+1}
last_i      chain.last[i]   bytes of x_{i+1} if layer i itself keeps its output, as one that ends in a relu does, else 0
u_i, c      chain.u, c      seconds of layer i forward, keeping nothing; what a checkpoint costs besides
s           slots           how many x_i may be held at once beside the one layer that is in its backward pass
schedule    schedule        what is run again: [[0, 1, 2], [[3], 4], 5, 6]. A number is a layer whose activations are
                            kept. A list is a part of which only the input is kept; in the backward pass it is run
                            again, now as the list says: 0, 1, 2 are kept then; of [3] the input is, so 3 is run thrice

For the gradients of a loss L(x_n) the chain rule takes the layers in the opposite order to that in which they are run,
  (1) dL/dx_i = dL/dx_{i+1} df_i/dx_i, dL/dp_i = dL/dx_{i+1} df_i/dp_i, all at x_i; p_i: the parameters of f_i
so every x_i is kept from the forward to the backward pass, and with it what f_i has computed inside: n a bytes. But
  (2) x_j = f_{j-1}(.. f_i(x_i)) can be computed again from any x_i, i < j, in j - i runs of a layer
Each layer is run once with a tape, so that autograd keeps a_i. Every schedule has these n runs, and Griewank does not
count them; t counts the runs without a tape. Equal layers, a = a_i, w = w_i, have this peak in bytes and this n + t:
  (3) none: n a, n;   every layer alone, but for the last: (n - 1) w + a, 2 n - 1
  (4) m segments, the last of them kept: (m - 1) w + ceil(n/m) a, 2 n - ceil(n/m); with a = w about (n/k + k) w for
      segments of k = n/m layers, least at k = sqrt n: 2 sqrt(n) w for at most one more run of each layer [Chen]
  (5) halves: the first n // 2 layers are run, their input is kept; then the rest is done likewise, then the first half:
      D(n) = 1 + D(n - n//2), t(n) = n//2 + t(n//2) + t(n - n//2);   D(1) = t(1) = 0, which gives
      peak D w + a, D = bits of n - 1, about log2 n;   t = ones in 0, 1 .. n - 1 written in binary, <= n/2 log2 n
  (6) best for s slots: k layers are run first, their input holds a slot, the rest has s - 1, then they have all s:
      t(l, s) = min over 0 < k < l of k + t(l - k, s - 1) + t(k, s);   t(1, s) = 0, t(l, 0) = infinite for l > 1
  (7) t(l, s) = r l - C(s + r, r - 1) with r the least that has l <= C(s + r, s) [Griewank]; peak min(s, n - 1) w + a
For if no layer is to run more than r times without a tape, N(s, r) = N(s, r - 1) + N(s - 1, r) layers can be done:
those run first, and the rest. N is 1 for s = 0 or r = 0, so this is Pascal's triangle, N = C(s + r, s).
Unequal layers i .. j - 1 in M bytes, x_i among them: layer i is kept, or else the first k - i are run again:
  (8) T(i, j, M) = min of T(i + 1, j, M - a_i) and, over i < k < j, of
      u_i + .. + u_{k-1} + c + T(k, j, M - w_i) + T(i, k, M);   T(j, j, M) = 0, infinite for M < last_{j-1}
  (9) seconds of a step = those without checkpoints + u_i for each run without a tape + c for each checkpoint

Trip wires: one of the slots holds x_0. f must do the same when run again: what it draws from torch's own generators it
draws again, and batch-norm moves its statistics once, but a generator of its own, or a counter, goes on. Tensors with a
gradient that f does not get as arguments must be leaves (parameters). Second derivatives and torch.autograd.grad() are
refused: gradients are left in .grad, as by backward(). Bytes stored are what autograd keeps, without parameters.
Differs from the papers in: no cost is put on the backward pass, which all schedules share; (8) in steps of 1/500 of the
budget and for at most 100 blocks of layers.

python checkpointing.py --strategy slots --slots 5               trains 100 layers, 5 inputs held at once
python checkpointing.py --compare --depth 1000 --budget 6.5      sqrt: 1/21 of the memory at 1.21 times the seconds
"""
import argparse, collections, contextlib, functools, gzip, hashlib, http.client, inspect, io, itertools, math
import statistics, sys, time, urllib.request, weakref, warnings, zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint_sequential

# --------------------------------------------------------------------------------------------------------- method -----
# checkpoint() is for any f; to use it elsewhere, take what stands above run().
class Checkpoint(torch.autograd.Function):
    """f(*leaves), of which only the leaves are kept. The backward pass runs f again, this time with a tape."""

    @staticmethod
    def forward(ctx, f, *leaves):
        ctx.f, ctx.others = f, [None if torch.is_tensor(v) else v for v in leaves]
        ctx.save_for_backward(*(v if torch.is_tensor(v) else None for v in leaves))  # so changes to them are noticed
        ctx.set_materialize_grads(False)
        ctx.states, ctx.casts = surroundings({v.device for v in leaves if torch.is_tensor(v)})
        with autocast(ctx.casts):
            return f(*leaves)

    @staticmethod
    def backward(ctx, *grads):
        if torch.is_grad_enabled() or not torch.autograd._is_checkpoint_valid():
            raise RuntimeError("checkpoint: only a plain loss.backward() can go back through it, not autograd.grad(), "
                               "not inputs=, and not create_graph=True, as there is no second derivative")
        leaves = [other if v is None else v.detach().requires_grad_(needs)
                  for v, other, needs in zip(ctx.saved_tensors, ctx.others, ctx.needs_input_grad[1:])]
        with replay(ctx.states), autocast(ctx.casts), torch.enable_grad():
            outputs = ctx.f(*leaves)  # (2)
        pairs = [(y, d_y) for y, d_y in zip(outputs, grads) if d_y is not None and y.requires_grad]
        if pairs:
            torch.autograd.backward(*zip(*pairs))  # (1)
        return None, *(v.grad if torch.is_tensor(v) else None for v in leaves)

def checkpoint(f, *inputs, **named):
    """f(*inputs, **named), whose activations are dropped and computed again in the backward pass.

    Tensors may lie in tuples, lists and dicts, beside anything else, on the way in and out."""
    if not torch.is_grad_enabled():
        return f(*inputs, **named)
    root = torch.empty(0, requires_grad=True)  # f's parameters may want a gradient where no input does
    leaves, form = tree_flatten((inputs, named, root))
    out_form = None

    def flat(*leaves):
        nonlocal out_form
        args, kwargs, _ = tree_unflatten(leaves, form)
        outputs, out_form = tree_flatten(f(*args, **kwargs))
        return tuple(outputs)

    outputs = Checkpoint.apply(flat, *leaves)  # sets out_form, too
    return tree_unflatten(outputs, out_form)

def surroundings(devices):
    """What else f's result depends on, on the CPU and the devices: [(generator, its state)] and autocast's settings."""
    generators, kinds = [torch.default_generator], {"cpu", *(device.type for device in devices)}
    generators += [torch.cuda.default_generators[device.index] for device in devices if device.type == "cuda"]
    generators += [torch.mps._get_default_mps_generator() for device in devices if device.type == "mps"]
    casts = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
             for kind in kinds if torch.amp.is_autocast_available(kind)]
    return [(generator, generator.get_state()) for generator in generators], casts

def autocast(casts):
    """Autocast as it was, but without its cache, which would keep weights that were cast without a gradient."""
    stack = contextlib.ExitStack()
    for kind, dtype, on in casts:
        if on or torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, dtype, on, cache_enabled=False))
    return stack

REPLAYS = []

@contextlib.contextmanager
def replay(states):
    """Draws the random numbers of the first run again, and keeps the running statistics of batch-norm still."""
    norm, now = nn.modules.batchnorm._NormBase, [(generator, generator.get_state()) for generator, _ in states]
    has = lambda self: not self.training and vars(self)["track_running_stats"]
    hold = lambda self, value: vars(self).update(track_running_stats=value)
    REPLAYS.append(None)  # more than one where backward passes of several devices run side by side
    try:
        norm.track_running_stats = property(has, hold)  # goes before what the layers themselves have
        for generator, state in states:
            generator.set_state(state)
        yield
    finally:
        for generator, state in now:
            generator.set_state(state)
        REPLAYS.pop()
        if not REPLAYS:
            del norm.track_running_stats

def run(layers, schedule, x):
    """The chain of layers on x, by the schedule: a number is a layer, a list a part that is checkpointed."""
    for part in schedule:
        x = layers[part](x) if isinstance(part, int) else checkpoint(functools.partial(run, layers, part), x)
    return x

# Schedules. Of equal layers they keep, and run again, what the equations say.
def segments(n, m):
    """m parts, equally long or nearly so, of which the last is kept: 1 is no checkpoint, n are every layer alone."""
    cuts = [n * i // m for i in range(m + 1)]
    return [*(list(range(i, j)) for i, j in zip(cuts, cuts[1:-1])), *range(cuts[-2], n)]  # (4)

def by_halves(n, i=0):
    k = n // 2
    return [by_halves(k, i), *by_halves(n - k, i + k)] if k else [i]  # (5)

@functools.cache
def closed_form(n, slots):
    """t(n, slots): the least number of runs without a tape."""
    if min(n - 1, slots) < 1:
        return 0 if n == 1 else math.inf
    r = next(r for r in itertools.count() if n <= math.comb(slots + r, slots))
    return r * n - math.comb(slots + r, r - 1)  # (7)

def in_slots(n, slots, i=0):
    """The fewest runs with so many inputs held at a time. ValueError if a layer would run over 61 times."""
    if math.comb(slots + 60, slots) < n:
        raise ValueError(f"--slots {slots}: too few for {n} layers, of which some would run more than 61 times")
    parts = []
    while n > 1:
        k = min(range(1, n), key=lambda k: k + closed_form(n - k, slots - 1) + closed_form(k, slots))  # (6)
        parts.append(in_slots(k, slots, i))
        i, n, slots = i + k, n - k, slots - 1
    return [*parts, i]

STRATEGIES = {"none": lambda n, slots: segments(n, 1), "every": lambda n, slots: segments(n, n),  # (3)
              "sqrt": lambda n, slots: segments(n, math.isqrt(n - 1) + 1),
              "recursive": lambda n, slots: by_halves(n), "slots": in_slots}

# By layer, as above, but for c. last counts where no other layer follows in a part.
Chain = collections.namedtuple("Chain", "u w a last c")

def in_budget(chain, budget, steps=500, blocks=100):
    """The fastest schedule that never holds more than budget bytes, made of blocks of layers if these are too many.

    ValueError if there is none. Bytes are counted in units, about budget / steps and a multiple of what divides all
    sizes; a size is rounded up to them."""
    n = min(len(chain.u), blocks)
    cuts = [len(chain.u) * i // n for i in range(n + 1)]
    u, a = ([sum(values[i:j]) for i, j in zip(cuts, cuts[1:])] for values in (chain.u, chain.a))
    w, last = [chain.w[i] for i in cuts[:-1]], [chain.last[j - 1] for j in cuts[1:]]
    least = max(w[0] * (i > 0) + a[i] + last[i] for i in range(n))  # x_0 is among what layer 0 keeps
    room = max(0, min(budget, sum(a) + max(last)))  # of nan bytes, no room
    grain = math.gcd(*w, *a, *last) or 1
    unit = grain * max(1, math.ceil(room / grain / steps))
    most = int(room // unit)  # M and sizes are counted in units from here on
    w, a, last = ([min(math.ceil(v / unit), most + 1) for v in values] for values in (w, a, last))
    before, T = np.array([0, *itertools.accumulate(u)]), np.full((n + 1, n + 1, most + 1), np.inf)
    best = np.zeros(T.shape, int)
    for j in range(1, n + 1):
        T[j, j, last[j - 1] :] = 0
        for i in reversed(range(j)):
            costs = np.full((j - i, most + 1), np.inf)
            costs[0, a[i] :] = T[i + 1, j, : most + 1 - a[i]]
            again = (before[i + 1 : j] - before[i] + chain.c)[:, None]
            costs[1:, w[i] :] = again + T[i + 1 : j, j, : most + 1 - w[i]] + T[i, i + 1 : j, w[i] :]  # (8)
            T[i, j], best[i, j] = costs.min(0), i + costs.argmin(0)
    if not np.isfinite(T[0, n, most]):
        raise ValueError(f"--budget {budget / 1e6:g}: these layers need about {least / 1e6:.3g} MB or more")

    def plan(i, j, M):
        k = best[i, j, M]
        if i < k:
            return [plan(i, k, M), *plan(k, j, M - w[i])]
        return [*range(cuts[i], cuts[i + 1]), *plan(i + 1, j, M - a[i])] if i < j else []
    return plan(0, n, most)

def predict(schedule, chain, held=0):
    """-> the most bytes that a schedule ever holds and the seconds of all that it runs forward."""
    leaves = lambda part: [part] if isinstance(part, int) else [i for inner in part for i in leaves(inner)]
    peak = seconds = 0
    for part in schedule:
        own = leaves(part)
        seconds += sum(chain.u[i] for i in own)
        if isinstance(part, int):
            held += chain.a[part]
            peak = max(peak, held + chain.last[part] * (part == schedule[-1]))
        else:
            inner, again = predict(part, chain, held)
            held += chain.w[own[0]]
            peak, seconds = max(peak, inner), seconds + again + chain.c
    return peak, seconds

# -------------------------------------------------------------------------------------------------------- network -----
# Any chain of layers would do above. Here it is one of equals; what lies before and after it is no part of it.
class ResidualLayer(nn.Module):
    """x + W_2 relu(W_1 x + b_1) + b_2, x (N, width). Keeps x and the relu."""

    def __init__(self, width, depth=1, hidden=None):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, hidden or width), nn.Linear(hidden or width, width)
        for p in self.outer.parameters():
            p.data /= depth**0.5  # so the sum over all layers stays in bounds

    def forward(self, x):
        return x + self.outer(F.relu(self.inner(x)))

class Denoiser(nn.Module):
    """Images with noise on them -> the images, by a chain of equal layers. x (N, channels, size, size)."""

    def __init__(self, channels=1, size=28, width=128, depth=100):
        super().__init__()
        self.shape = (channels, size, size)
        self.first, self.last = nn.Linear(channels * size * size, width), nn.Linear(width, channels * size * size)
        self.layers = nn.ModuleList(ResidualLayer(width, depth) for _ in range(depth))

    def forward(self, x, schedule=None):
        h = run(self.layers, schedule or range(len(self.layers)), self.first(x.flatten(1)))
        return self.last(h).unflatten(1, self.shape)

# ------------------------------------------------------------------------------------------------------- counting -----
class Tally(torch.autograd.graph.saved_tensors_hooks):
    """Counts, while it is entered, the bytes of the storages that are kept for the backward pass, and their peak.

    A storage counts once, however many tensors lie in it, until the last of them is let go; those of own never do."""

    def __init__(self, own):
        super().__init__(self.store, lambda stored: stored())
        self.peak, self.kept = 0, weakref.WeakKeyDictionary()  # what gives a tensor back: its storage, bytes
        self.own = {v.untyped_storage().data_ptr() for v in own}

    def store(self, v):
        v, storage = v.detach(), v.untyped_storage()
        stored = lambda: v
        if storage.data_ptr() not in self.own:
            self.kept[stored] = storage.data_ptr(), storage.nbytes()
            self.peak = max(self.peak, sum(self.sizes().values()))
        return stored

    def sizes(self):
        """{storage: bytes} of what is kept now."""
        return dict(self.kept.values())

def there_and_back(way, layers, x):
    """A forward and a backward pass, gradients into .grad. way: a schedule, or what takes layers and x (N, width)."""
    x = x.detach().requires_grad_()
    y = way(layers, x) if callable(way) else run(layers, way, x)
    torch.autograd.backward(y, torch.ones_like(y))

def count(way, layers, x):
    """-> the peak of the bytes stored in a step, parameters not counted, and how often a layer was run."""
    runs = []
    counted = [lambda x, layer=layer: runs.append(layer) or layer(x) for layer in layers]
    with (tally := Tally(v for layer in layers for v in (*layer.parameters(), *layer.buffers()))):
        there_and_back(way, counted, x)
    return tally.peak, len(runs)

def clock(jobs, device, rounds=7):
    """Seconds that each of the functions takes, the median of so many rounds, in which they take turns."""
    wait, seconds = getattr(torch, device.type).synchronize, [[] for _ in jobs]
    for _, (job, taken) in itertools.product(range(rounds + 1), zip(jobs, seconds)):
        start = time.perf_counter()
        job()
        wait()
        taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in seconds]  # the first round warms up, and ends what was under way

def profile(layers, x):
    """-> Chain, measured layer by layer. x (N, width); the layers are run, so their statistics move."""
    rows, root = [], torch.zeros(1, device=x.device, requires_grad=True)
    for layer in layers:
        with torch.no_grad():
            u = clock([functools.partial(layer, x)], x.device, 3)[0]
        x = x.detach().requires_grad_()
        w = x.untyped_storage().nbytes()
        with (tally := Tally([x, *layer.parameters(), *layer.buffers()])):
            y = layer(x)
        last = tally.sizes().get(y.untyped_storage().data_ptr(), 0)
        rows.append((u, w, w + sum(tally.sizes().values()) - last, last))
        x = y
    return Chain(*zip(*rows), clock([lambda: torch.autograd.backward(checkpoint(torch.neg, root))], x.device)[0])

def choose_schedule(strategy, layers, x, slots=10, budget=4.0):
    """The schedule of one of STRATEGIES, or "budget", of so many MB. x: what the layers get. ValueError if too few."""
    if strategy == "budget":
        return in_budget(profile(layers, x), budget * 1e6)
    return STRATEGIES[strategy](len(layers), slots)

def table(ways, layers, x):
    """Prints what the ways take, {name: schedule, or as there_and_back() has it}, the first without checkpoints.

    Theory is in brackets. Returns the layers' Chain and {name: (MB stored, seconds)} of the schedules."""
    chain, found, cuda = profile(layers, x), {}, x.device.type == "cuda"
    seconds = clock([functools.partial(there_and_back, way, layers, x) for way in ways.values()], x.device)
    print(f"{'strategy':20}| MB stored           | of none | runs of a layer | s a step          | to none"
          + " | MB, allocator" * cuda)
    for (name, way), took in zip(ways.items(), seconds):
        (peak, runs), theory = count(way, layers, x), [""] * 3
        if not callable(way):
            least, forth = predict(way, chain)
            most = predict(way, chain._replace(u=[1] * len(layers), c=0))[1]
            found[name] = peak / 1e6, took
            theory = f"({least / 1e6:.3f})", f"({most})", f"({seconds[0] + forth - sum(chain.u):.4f})"  # (9)
        share = f"1/{found['none'][0] / peak * 1e6:.1f}" if "non-" not in name else "hidden"  # by hooks of its own
        line = (f"{name:20}| {peak / 1e6:9.3f} {theory[0]:9} | {share:7} | {runs:7} {theory[1]:7} | {took:8.4f} "
                f"{theory[2]:8} | {took / seconds[0]:7.3f}")
        if cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            there_and_back(way, layers, x)
            line += f" | {(torch.cuda.max_memory_allocated() - before) / 1e6:13.1f}"
        print(line)
    return chain, found

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
def train(images, iters=3000, batch=128, lr=1e-3, width=128, depth=100, strategy="sqrt", slots=10, budget=4.0,
          device="cpu", seed=0, path=None, fresh=False, compiled=False):
    """uint8 images (N, C, H, H) on the CPU -> the Denoiser. Seeds torch's global generator.

    The strategy decides what is kept and what is computed again, and on the CPU not one bit of the result. path: where
    to save; unless fresh, training goes on from what is there. ValueError if that was made otherwise,
    FloatingPointError if the loss is not finite (what was saved last stays)."""
    wanted = dict(channels=images.shape[1], size=images.shape[2], width=width, depth=depth, iters=iters, batch=batch,
                  lr=lr, seed=seed, images=hashlib.sha256(images.contiguous().numpy()).hexdigest()[:12])
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be square, not {images.shape[3]}x{images.shape[2]}")
    torch.manual_seed(seed)
    model = Denoiser(images.shape[1], images.shape[2], width, depth).to(device)
    opt = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min((i + 1) / 200, 1 - i / iters))
    parts, done, log = (model, opt, rate), 0, []
    if path and path.exists() and not fresh:
        done, log = resume(path, parts, load_checkpoint(path, ["checkpointing"], device, wanted))
    schedule = choose_schedule(strategy, model.layers, torch.zeros(batch, width, device=device), slots, budget)
    if compiled:
        for layer in model.layers:
            layer.compile()
    images = images.to(device)
    progress, total, saved = Progress("iteration", "images", iters, done), torch.zeros((), device=device), time.time()
    for i in range(done, iters):
        x = to_float(images[torch.randint(len(images), (batch,), device=device)])
        loss = F.mse_loss(model(x + torch.randn_like(x), schedule), x) / 4  # of pixels in 0 .. 1
        opt.zero_grad()
        loss.backward()
        opt.step()
        rate.step()
        total += loss.detach()
        if (i + 1) % 100 == 0 or i + 1 == iters:
            log.append((i + 1, total.item() / (i % 100 + 1)))  # the only place where the device is waited for
            total.zero_()
            if not math.isfinite(log[-1][1]):
                raise FloatingPointError(f"the loss is {log[-1][1]} at iteration {i + 1}; try a smaller --lr")
            if path and (i + 1 == iters or time.time() - saved > 10):
                save_checkpoint(path, "checkpointing", wanted, parts, i + 1, log)
                saved = time.time()
        progress(i + 1, batch, f"loss {log[-1][1]:.5f}" if log else "")
    return model.requires_grad_(False).eval()

def load(path, device="cpu"):
    """The network of a checkpoint; model(x) takes the noise off images in -1 .. 1 of the shape model.shape."""
    state = load_checkpoint(Path(path), ["checkpointing"], device)
    with or_say(f"{path}: {DAMAGED}"):
        model = Denoiser(*(state["settings"][name] for name in ("channels", "size", "width", "depth")))
        model.load_state_dict(state["parts"][0])
    return model.to(device).requires_grad_(False).eval()

def plot(panels):
    """[(title, {name: ([(x, y)] of a line, [(x, y)] of dots)})] -> a Pillow image, scales logarithmic."""
    image, font = Image.new("RGB", (760, 420 * len(panels)), "white"), ImageFont.load_default(15)
    draw, colours = ImageDraw.Draw(image), ["black", "#7f8c8d", "#2471a3", "#27ae60", "#c0392b", "#8e44ad"]
    for top, (title, curves) in zip(range(40, image.height, 420), panels):
        points = np.log10([point for line, dots in curves.values() for point in line + dots])
        low = points.min(0)
        scale = [510, -330] / (points.max(0) - low).clip(0.1)
        spot = lambda x, y, low=low, scale=scale, top=top: tuple((np.log10([x, y]) - low) * scale + [70, top + 330])
        draw.text((8, top - 28), title, "black", font)
        for value in (digit * 10.0**power for power in range(-6, 9) for digit in (1, 2, 5)):
            x, y = spot(value, value)
            if 69 < x < 581:
                draw.text((x, top + 338), f"{value:g}", "black", font, "mt")
            if top - 1 < y < top + 331:
                draw.line((70, y, 580, y), "#dddddd")
                draw.text((62, y), f"{value:g}", "black", font, "rm")
        for i, (colour, (name, (line, dots))) in enumerate(zip(colours, curves.items())):
            draw.text((600, top + 24 * i), name, colour, font)
            draw.line([spot(*point) for point in line], colour, 2)
            for x, y in (spot(*point) for point in dots):
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
    return image

def compare(width, depth, batch, slots, budget, device, out):
    """Prints what each strategy takes, of a chain of equal layers and of one of unequal ones; a picture into out."""
    layers, x = [ResidualLayer(width, depth).to(device) for _ in range(depth)], torch.randn(batch, width, device=device)
    ways = {name: choose_schedule(name, layers, x, slots, budget) for name in (*STRATEGIES, "budget")}
    for name in "torch reentrant", "torch non-reentrant":
        ways[name] = lambda layers, x, name=name: checkpoint_sequential(
            layers, math.isqrt(depth - 1) + 1, x, use_reentrant=name == "torch reentrant")
    print(f"{depth} equal layers, {batch} rows of {width} numbers, {slots} slots, {budget:g} MB, on {device}")
    chain, dots = table(ways, layers, x)

    def at(schedule):
        peak, forth = predict(schedule, chain)
        return peak / 1e6, dots["none"][1] + forth - sum(chain.u)  # (9)

    depths = sorted({round(depth ** (i / 30)) for i in range(31)})
    stored = {name: ([(n, at(make(n, slots))[0]) for n in depths],
                     [(n, count(make(n, slots), layers[:n], x)[0] / 1e6) for n in depths[::-6]])
              for name, make in STRATEGIES.items()}
    frontier = {"sqrt": [at(segments(depth, m)) for m in depths], "budget": [],
                "slots": [at(in_slots(depth, s)) for s in range(1, 33) if math.comb(s + 60, s) >= depth]}
    for share in 1, 2, 4, 8, 16, 32, 64:
        with contextlib.suppress(ValueError):  # less than the layers need
            frontier["budget"].append(at(in_budget(chain, sum(chain.a) / share)))
    file = io.BytesIO()
    plot([("MB stored against layers: equations (lines), counted (dots)", stored),
          ("seconds a step against MB: the equations for all segments, slots and budgets (lines), measured (dots)",
           {name: (frontier.get(name, []), [dot]) for name, dot in dots.items()})]).save(file, "PNG")
    write({out / "compare.png": file.getvalue()})

    n, hidden = min(depth, 100), [max(1, width // 2), width, 2 * width, 4 * width]
    layers = [ResidualLayer(width, depth, hidden[i % 4]).to(device) for i in range(n)]
    chain = profile(layers, x)
    ways, most = {"none": segments(n, 1)}, sum(chain.a) / 4
    fit = [parts for parts in (segments(n, m) for m in range(1, n + 1)) if predict(parts, chain)[0] <= most]
    with contextlib.suppress(ValueError):  # less than the layers need
        ways |= {"budget": in_budget(chain, most), "segments that fit": min(fit, key=lambda s: predict(s, chain)[1])}
    print(f"{n} unequal layers, {', '.join(map(str, hidden))} hidden units, {most / 1e6:.3f} MB")
    table(ways, layers, x)
    print(f"compare.png is in {out}")

def main(argv=None):
    parser = image_parser(__doc__, "checkpointing", train)
    add, default = parser.add_argument, inspect.signature(train).parameters
    add("--width", type=at_least(1), default=default["width"].default, help="numbers between two layers")
    add("--depth", type=at_least(1), default=default["depth"].default, help="n, layers that are all alike")
    add("--strategy", choices=[*STRATEGIES, "budget"], default=default["strategy"].default, help="what is run again")
    add("--slots", type=at_least(1), default=default["slots"].default, help="s, inputs held at once by slots")
    add("--budget", type=float, default=default["budget"].default, help="MB stored at most by --strategy budget")
    add("--compare", action="store_true", help="train nothing, but measure all strategies on a chain of these layers")
    args = parser.parse_args(argv)
    with parser.guard():
        device, path = pick_device(args.device), args.out / "model.pt"
        if args.compare:
            torch.manual_seed(args.seed)
            return compare(args.width, args.depth, args.batch, args.slots, args.budget, device, args.out)
        images, held_out = (load_images(args.data, args.size, args.channels, test) for test in (False, True))
        print(f"{len(images)} images of {args.size}x{args.size}x{args.channels} from {args.data}, on {device}")
        train(images, args.iters, args.batch, args.lr, args.width, args.depth, args.strategy, args.slots, args.budget,
              device, args.seed, path, args.fresh, args.compile)
        model, x_0 = load(path, device), to_float(held_out)
        noisy = x_0 + torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))  # the same for every --seed
        clean = torch.cat([model(part.to(device)).cpu() for part in noisy.split(1000)])
        save_samples(args.out, clean[torch.arange(args.samples) % len(clean)])
        shown = torch.arange(10) % len(clean)
        save_grid(args.out / "denoised.png", torch.cat([rows[shown] for rows in (x_0, noisy, clean)]), 10)
        before, after = (F.mse_loss(x, x_0).item() / 4 for x in (noisy, clean))
        print(f"mean squared error of {len(x_0)} test images, pixels in 0 .. 1: {after:.5f}, with noise {before:.5f}")
        layers, x = model.requires_grad_().layers, torch.randn(args.batch, args.width, device=device)
        ways = {name: choose_schedule(name, layers, x, args.slots, args.budget) for name in ("none", args.strategy)}
        table(ways, layers, x)
        print(f"{args.samples} samples: samples.png, samples.npy in {args.out}, with denoised.png (images, with noise, "
              "without), log.csv, model.pt")

if __name__ == "__main__":
    main()
