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
f_i, x_i    layers[i], x    layer i of n, i = 0 .. n - 1, and its input; x_n is what the chain gives
w_i         chain.w[i]      bytes of x_i, 64 KB for 128 rows of 128 numbers in float32
a_i         chain.a[i]      bytes that autograd keeps of layer i, x_i included where the layer needs it
u_i, c      chain.u, c      seconds of layer i forward, keeping nothing; what a checkpoint costs besides
s           slots           how many x_i may be held at once beside the one layer that is on its way back
schedule    schedule        who is run again: [[0, 1, 2], [[3], 4], 5, 6]. A number is a layer whose activations are
                            kept. A list is a part that is run keeping its input alone, and again on the way back,
                            then as the list says: 0, 1, 2 are kept then; [3], in turn, is run a third time

Of L(x_n) the chain rule wants the layers in the order opposite to the one in which they were run,
  (1) dL/dx_i = dL/dx_{i+1} df_i/dx_i, dL/dw_i = dL/dx_{i+1} df_i/dw_i, both of them at x_i
so every x_i is kept from the way forth to the way back, and with it what f_i has computed inside: n a bytes. But
  (2) x_{j} = f_{j-1}(.. f_i(x_i)) can be had again from any x_i, i < j, for j - i runs of a layer
Nothing else is asked of f. Each layer is run once with a tape, right before its way back. These n runs any schedule has
and Griewank does not count; t counts those without a tape. Equal layers, a = a_i, w = w_i, have peaks and n + t of
  (3) none: n a, n;   every layer alone, but for the last: (n - 1) w + a, 2 n - 1
  (4) m segments, the last of them kept: (m - 1) w + ceil(n/m) a, 2 n - ceil(n/m); with a = w this is about n/k + k for
      segments of k = n/m layers, least at k = sqrt n: memory 2 sqrt n for at most one more run of each layer
  (5) halves: run n // 2 layers, keep their output, bring back the rest likewise, then the first half likewise:
      D(n) = 1 + D(n - n//2), t(n) = n//2 + t(n//2) + t(n - n//2);   D(1) = t(1) = 0, which gives
      peak D w + a, D = bits of n - 1, about log2 n;   t = ones in 0, 1 .. n - 1 written in binary, <= n/2 log2 n
  (6) best for s slots: k layers are run first, their input holds a slot, the rest has s - 1, then they have all s:
      t(l, s) = min over 0 < k < l of k + t(l - k, s - 1) + t(k, s);   t(1, s) = 0, t(l, 0) = infinite
  (7) t(l, s) = r l - C(s + r, r - 1) with r the least that has l <= C(s + r, s) [Griewank]; peak min(s, n - 1) w + a
For in r runs each layer reaches the tape, and C(s + r, s) paths are there that use s slots and r runs at most.
Unequal layers i .. j - 1, x_i held, M bytes beside it: the first is kept, or else the first k - i are run again:
  (8) T(i, j, M) = min of T(i + 1, j, M - a_i + w_i - w_{i+1}) and, over i < k < j, of
      u_i + .. + u_{k-1} + c + T(k, j, M - w_k) + T(i, k, M);   T(i, i + 1, M) = 0 if a_i - w_i <= M, else infinite
  (9) seconds of a step = those without checkpoints + u for each of the t runs + c for each checkpoint

Trip wires: slots hold x_0, too (it is the caller's and stays anyway, but is counted as it is kept). The last segment is
not run twice. f must do the same when run again: what it draws from torch's own generators it draws again, and
normalisation in training moves its statistics once, but a generator of its own, or a counter, goes on. Tensors with a
gradient that f does not get as arguments must be leaves (parameters). Second derivatives and torch.autograd.grad() are
refused: gradients are left in .grad, as backward() leaves them. Stored means saved for the way back, parameters not.
Differs from the papers in: no cost is put on the way back, which all schedules share; (8) in steps of 1/500 of the
budget and for at most 100 blocks of layers; Revolve also counts how often a slot is written, here it does not matter.

python checkpointing.py --strategy slots --slots 5               ?
python checkpointing.py --compare --depth 1000 --budget 6.5      sqrt: 1/21 of the memory at 1.28 times the seconds,
    77 s on two cores                                            ten slots: 1/167 at 2.5 times, 3636 runs more
"""
import argparse, collections, contextlib, copy, functools, gzip, hashlib, http.client, inspect, io, itertools, math
import statistics, sys, time, urllib.request, zlib
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
    """f(*leaves), of which only the leaves are kept. The way back runs f again and then keeps all that it needs."""

    @staticmethod
    def forward(ctx, f, *leaves):
        ctx.f, ctx.at = f, [i for i, v in enumerate(leaves) if torch.is_tensor(v)]
        ctx.rest = [None if torch.is_tensor(v) else v for v in leaves]
        ctx.save_for_backward(*(leaves[i] for i in ctx.at))  # so a change made to one of them is noticed
        ctx.set_materialize_grads(False)
        ctx.generators, ctx.casts = surroundings({leaves[i].device for i in ctx.at})
        with autocast(ctx.casts):
            return f(*leaves)

    @staticmethod
    def backward(ctx, *grads):
        if torch.is_grad_enabled() or not torch.autograd._is_checkpoint_valid():
            raise RuntimeError("checkpoint: only a plain loss.backward() can go back through it, not autograd.grad(), "
                               "not inputs=, and not create_graph=True, as there is no second derivative")
        leaves = list(ctx.rest)
        for i, v in zip(ctx.at, ctx.saved_tensors):
            leaves[i] = v.detach().requires_grad_(ctx.needs_input_grad[1 + i])
        with replay(ctx.generators), autocast(ctx.casts), torch.enable_grad():
            outputs = ctx.f(*leaves)  # (2)
        pairs = [(y, d_y) for y, d_y in zip(outputs, grads) if d_y is not None and y.requires_grad]
        if pairs:
            torch.autograd.backward(*zip(*pairs))  # (1)
        return None, *(v.grad if torch.is_tensor(v) else None for v in leaves)

def checkpoint(f, *inputs, **named):
    """f(*inputs, **named), whose activations are dropped and computed again on the way back.

    Tensors may lie in tuples, lists and dicts, beside anything else, on the way in and out."""
    if not torch.is_grad_enabled():
        return f(*inputs, **named)
    root = torch.empty(0, requires_grad=True)  # f's parameters may want a gradient where no input does
    leaves, form = tree_flatten((inputs, named, root))
    forms = []

    def flat(*leaves):
        args, kwargs, _ = tree_unflatten(leaves, form)
        outputs, out_form = tree_flatten(f(*args, **kwargs))
        forms[:] = [out_form]
        return tuple(outputs)

    return tree_unflatten(Checkpoint.apply(flat, *leaves), forms[0])

def surroundings(devices):
    """What else f's result depends on -> [(generator, its state)], [(device type, autocast's dtype, whether it is on)].

    They are the CPU's and those of the devices."""
    generators, kinds = [torch.default_generator], {"cpu", *(device.type for device in devices)}
    generators += [torch.cuda.default_generators[device.index] for device in devices if device.type == "cuda"]
    generators += [torch.mps._get_default_mps_generator() for device in devices if device.type == "mps"]
    casts = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
             for kind in kinds if torch.amp.is_autocast_available(kind)]
    return [(generator, generator.get_state()) for generator in generators], casts

@contextlib.contextmanager
def autocast(casts):
    """Autocast as it was. Without its cache, in which weights cast without a gradient would wait for the way back."""
    with contextlib.ExitStack() as stack:
        for kind, dtype, on in casts:
            if on or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, dtype, on, cache_enabled=False))
        yield

REPLAYS = []

@contextlib.contextmanager
def replay(generators):
    """Draws the random numbers of the first run again, and keeps the running statistics of normalisation still."""
    norm, now = nn.modules.batchnorm._NormBase, [(generator, generator.get_state()) for generator, _ in generators]
    hold = lambda self, value: vars(self).update(track_running_stats=value)
    try:
        REPLAYS.append(None)  # more than one where devices go back side by side
        norm.track_running_stats = property(lambda self: False, hold)  # goes before what the layers themselves have
        for generator, state in generators:
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

# Schedules: they keep, and run again, as much as the equations say, if the layers are equal.
def keep_all(n):
    return list(range(n))  # (3)

def every(n):
    return [*([i] for i in range(n - 1)), n - 1]  # (3)

def segments(n, m=None):
    """m parts of equal length, by default about as many as a part has layers; the last is kept."""
    m = m or math.isqrt(n - 1) + 1
    cuts = [n * i // m for i in range(m + 1)]
    return [*(list(range(i, j)) for i, j in zip(cuts, cuts[1:-1])), *range(cuts[-2], n)]  # (4)

def by_halves(n, first=0):
    parts = []
    while n > 1:
        parts.append(by_halves(n // 2, first))  # (5)
        first, n = first + n // 2, n - n // 2
    return [*parts, first]

@functools.cache
def least_runs(n, slots):
    """t of (6), (slots + 1, n + 1), and the k that has it, the same shape."""
    t, best = np.full((slots + 1, n + 1), np.inf), np.zeros((slots + 1, n + 1), int)
    t[:, 1] = 0
    for s in range(1, slots + 1):
        for length in range(2, n + 1):
            runs = np.arange(1, length) + t[s - 1, length - 1 : 0 : -1] + t[s, 1:length]  # (6)
            best[s, length] = 1 + runs.argmin()
            t[s, length] = runs.min()
    return t, best

def in_slots(n, slots):
    """The schedule with the fewest runs that holds no more than so many inputs at a time. ValueError if n is too deep
    for so few: a layer would run more than 60 times, and as many checkpoints lie within each other."""
    if math.comb(slots + 60, slots) < n:
        raise ValueError(f"--slots {slots}: too few for {n} layers, of which some would run more than 60 times")
    best = least_runs(n, min(slots, n))[1]

    def plan(first, length, s):
        parts = []
        while length > 1:
            k = int(best[s, length])
            parts.append(plan(first, k, s))
            first, length, s = first + k, length - k, s - 1
        return [*parts, first]
    return plan(0, n, min(slots, n))

def closed_form(n, slots):
    """t(n, slots) of (7), for n > 1."""
    r = next(r for r in itertools.count(1) if n <= math.comb(slots + r, slots))
    return r * n - math.comb(slots + r, r - 1)  # (7)

# What a chain takes: u, w, a of the docstring, lists with an entry a layer; last, a list of the bytes of the outputs
# that layers keep themselves, which count where no other layer follows in a part; c of the docstring.
Chain = collections.namedtuple("Chain", "u w a last c")

def in_budget(chain, budget, buckets=500, blocks=100):
    """The fastest schedule that never holds more than budget bytes. ValueError if there is none.

    Sizes are rounded up to 1/buckets of the budget (but not if they are multiples of as much already). More layers than
    blocks are put together, neighbours with neighbours, and a block is kept whole or not at all."""
    n = min(len(chain.u), blocks)
    cuts = [len(chain.u) * i // n for i in range(n + 1)]
    spans = [slice(i, j) for i, j in zip(cuts, cuts[1:])]
    u, w, last = [sum(chain.u[b]) for b in spans], [chain.w[b][0] for b in spans], [chain.last[b][-1] for b in spans]
    a = [sum(chain.a[b]) for b in spans]
    least = max(w[0] * (i > 0) + a[i] + last[i] for i in range(n))
    if not budget >= least:
        raise ValueError(f"--budget {budget / 1e6:g}: these layers need at least about {least / 1e6:.3g} MB")
    budget = min(budget, sum(a) + sum(last))
    grain = math.gcd(*w, *a, *last, 0) or 1
    unit = grain * max(1, math.ceil(budget / grain / buckets))
    whole = max(0, int(budget // unit))  # M of what follows is counted in units
    w, a, last = ([math.ceil(v / unit) for v in values] for values in (w, a, last))
    extra = [max(0, a[i] - w[i]) for i in range(n)]
    T = np.full((n, n + 1, whole + 1), np.inf)  # T[i, j]: (8), for each M
    after = np.full((n + 1, n, whole + 1), np.inf)  # after[j, k] = T[k, j] with M less by w_k
    best, before = np.zeros((n, n + 1, whole + 1), int), np.array([0, *itertools.accumulate(u)])

    def less(values, d):  # the values at M - d
        return np.concatenate([np.full(min(d, whole + 1), np.inf), values[: max(0, whole + 1 - d)]])

    for length in range(1, n + 1):
        for i in range(n - length + 1):
            j = i + length
            if length == 1:
                T[i, j, extra[i] + last[i] :] = 0
                best[i, j] = i
            else:
                again = (before[i + 1 : j] - before[i] + chain.c)[:, None] + after[j, i + 1 : j] + T[i, i + 1 : j]
                costs = np.concatenate([less(after[j, i + 1], extra[i])[None], again])  # (8)
                best[i, j] = i + costs.argmin(0)
                T[i, j] = costs.min(0)
            after[j, i] = less(T[i, j], w[i])
    if not np.isfinite(after[n, 0, whole]):
        raise ValueError(f"--budget {budget / 1e6:g}: a little too small for these layers")

    def plan(i, j, M):
        parts = []
        while i < j:
            k = best[i, j, M]
            if k == i:
                parts += range(cuts[i], cuts[i + 1])
                i, M = i + 1, M - extra[i] - (w[i + 1] if i + 1 < j else 0)
            else:
                parts.append(plan(i, k, M))
                i, M = k, M - w[k]
        return parts
    return plan(0, n, whole - w[0])

def predict(schedule, chain):
    """The most bytes that a schedule ever holds, and the seconds of all that it runs forward; layers of any size."""
    def span(part):
        return (part, part + 1) if isinstance(part, int) else (span(part[0])[0], span(part[-1])[1])

    def go(parts, held):  # held: bytes, the input of parts among them
        (i, end), lists = span(parts), []
        peak, seconds = held, sum(chain.u[i:end])
        for part in parts:
            i, j = span(part)
            if isinstance(part, int):
                held += chain.a[i] - chain.w[i]
                peak = max(peak, held + chain.last[i] * (j == end))
            else:
                lists.append((part, held))
            held += chain.w[j] if j < end else 0
        for part, held in lists:
            inner, more = go(part, held)
            peak, seconds = max(peak, inner), seconds + more + chain.c
        return peak, seconds
    return go(schedule, chain.w[0])

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
        layers = list(self.layers)
        h = run(layers, schedule or keep_all(len(layers)), self.first(x.flatten(1)))
        return self.last(h).unflatten(1, self.shape)

# ------------------------------------------------------------------------------------------------------- counting -----
class Tally:
    """Counts, while it is entered, the bytes stored for the way back: now, and at their peak.

    A storage counts once, however many tensors lie in it, until the last of them is let go. own: parameters and
    buffers, which do not count."""

    def __init__(self, own=()):
        self.now, self.peak, self.users, self.sizes = 0, 0, collections.Counter(), {}
        self.own = {v.untyped_storage().data_ptr() for v in own}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(lambda v: Stored(self, v), lambda stored: stored.v)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

class Stored:
    """A tensor that is stored for the way back."""

    def __init__(self, tally, v):
        self.tally, self.v, self.at = tally, v.detach(), v.untyped_storage().data_ptr()
        tally.users[self.at] += 1
        if tally.users[self.at] == 1 and self.at not in tally.own:
            tally.sizes[self.at] = v.untyped_storage().nbytes()
            tally.now += tally.sizes[self.at]
            tally.peak = max(tally.peak, tally.now)

    def __del__(self):
        self.tally.users[self.at] -= 1
        if not self.tally.users[self.at]:
            self.tally.now -= self.tally.sizes.pop(self.at, 0)

def there_and_back(way, layers, x):
    """There and back once: way(layers, x) and its gradients, into .grad. x (N, width)."""
    y = way(layers, x.detach().requires_grad_())
    torch.autograd.backward(y, torch.ones_like(y))

def count(way, layers, x):
    """-> the peak of the bytes stored in a step, parameters not counted, and how often a layer was run."""
    runs = []

    def counted(layer):
        return lambda x: runs.append(None) or layer(x)

    with Tally(v for layer in layers for v in (*layer.parameters(), *layer.buffers())) as tally:
        there_and_back(way, [counted(layer) for layer in layers], x)
    return tally.peak, len(runs)

def wait(device):
    """Until the device has done what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()

def clock(jobs, device, rounds=7):
    """Seconds that each of the functions takes, the median of so many rounds, in which they take turns."""
    seconds = [[] for _ in jobs]
    for _ in range(rounds + 1):
        for job, taken in zip(jobs, seconds):
            wait(device)
            start = time.perf_counter()
            job()
            wait(device)
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in seconds]  # the first round warms up

def profile(layers, x):
    """-> Chain, measured layer by layer. x (N, width); the layers are run, so their statistics move."""
    root = torch.zeros(1, device=x.device, requires_grad=True)
    chain = Chain([], [], [], [], clock([lambda: torch.autograd.backward(checkpoint(torch.neg, root))], x.device)[0])
    for layer in layers:
        with torch.no_grad():
            chain.u.extend(clock([functools.partial(layer, x)], x.device, 3))
        with Tally([*layer.parameters(), *layer.buffers()]) as tally, torch.enable_grad():
            x = x.detach().requires_grad_()
            y = layer(x)
            kept = dict(tally.sizes)
        chain.w.append(x.untyped_storage().nbytes())
        kept.pop(x.untyped_storage().data_ptr(), 0)
        chain.last.append(kept.pop(y.untyped_storage().data_ptr(), 0))
        chain.a.append(chain.w[-1] + sum(kept.values()))
        x = y
    alike = collections.defaultdict(list)
    for i, size in enumerate(zip(chain.w, chain.a, chain.last)):
        alike[size].append(i)
    for group in alike.values():  # of layers that keep the same, the times are taken for noise about one value
        middle = statistics.median(chain.u[i] for i in group)
        for i in group:
            chain.u[i] = middle
    return chain

STRATEGIES = {"none": keep_all, "every": every, "sqrt": segments, "recursive": by_halves, "slots": in_slots}

def choose_schedule(strategy, layers, x, slots=10, budget=4.0):
    """The schedule of a strategy, one of STRATEGIES or "budget", of so many MB; x is what the layers will be given.

    ValueError if the slots or the budget are too small for the layers."""
    if strategy == "budget":
        return in_budget(profile(layers, x), budget * 1e6)
    return STRATEGIES[strategy](len(layers), *[slots] * (strategy == "slots"))

def theory(strategy, n, w, a, slots=10):
    """Peak in bytes, and how often a layer is run, of n equal layers by the equations; not for "budget"."""
    m = math.isqrt(n - 1) + 1
    return {"none": (n * a, n), "every": ((n - 1) * w + a, 2 * n - 1),
            "sqrt": ((m - 1) * w + math.ceil(n / m) * a, 2 * n - math.ceil(n / m)),
            "recursive": ((n - 1).bit_length() * w + a, n + sum(i.bit_count() for i in range(n))),
            "slots": (min(slots, n - 1) * w + a, n + closed_form(n, slots))}[strategy]

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

def write(path, raw):
    """All of the bytes raw into path, or none: a full disk or a kill leaves there what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(raw)
        part.replace(path)
    finally:
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
                    write(folder / name, raw)
                    break
                reasons.append(f"{url}: wrong SHA-256")
            except (OSError, http.client.HTTPException) as e:
                reasons.append(f"{url}: {e}")
        if not (folder / name).exists():
            raise OSError(f"{name}: no mirror gave it ({'; '.join(reasons)}); --data digits needs no network")

def read_idx(path):
    """An IDX file of bytes (MNIST's format), gzipped or not -> uint8 array. ValueError if it is none, or cut short."""
    raw = path.read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (EOFError, OSError, zlib.error) as e:
        raise ValueError(f"{path}: broken gzip file ({e})") from None
    head = 4 + 4 * raw[3] if raw[:3] == b"\0\0\x08" and len(raw) > 3 else 0
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, head, 4)]
    if not shape or not math.prod(shape) or len(raw) != head + math.prod(shape):
        raise ValueError(f"{path}: not an IDX file of bytes, or empty, or cut short")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)

def read_picture(path, size, channels):
    """The middle square of a picture, scaled -> uint8 (channels, size, size). ValueError if Pillow cannot read it."""
    try:
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture).convert("RGB" if channels == 3 else "L")
        return np.array(ImageOps.fit(picture, (size, size))).reshape(size, size, channels).transpose(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise ValueError(f"{path}: not a picture that can be read ({e})") from None

def load_images(data, size=28, channels=1, test=False):
    """uint8 (N, channels, size, size) from "digits", "mnist", a folder of IDX files or one of pictures, of which every
    tenth is kept for the test. ValueError or OSError, in one sentence, for what cannot be read."""
    folder, part = Path("data/mnist" if data == "mnist" else data), "t10k" if test else "train"
    if data == "digits":
        return draw_digits(10_000 if test else 60_000, size, seed=int(test)).expand(-1, channels, -1, -1)
    if data == "mnist":
        download_mnist(folder)
    if not folder.is_dir():
        raise ValueError(f"--data {folder}: no such folder")
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
    write(path, file.getvalue())

def save_samples(out, x):
    """Images in -1 .. 1, (N, C, H, W): all into out/samples.npy, uint8 (N, H, W[, 3]), 64 into out/samples.png."""
    file = io.BytesIO()
    np.save(file, to_uint8(x).permute(0, 2, 3, 1).squeeze(3).numpy())
    write(out / "samples.npy", file.getvalue())
    save_grid(out / "samples.png", x[:64])

def save_checkpoint(path, method, settings, parts, done, log, columns=("loss",)):
    """parts: what has a state_dict; log: rows (iteration, the columns' values), which also go into log.csv."""
    file, state = io.BytesIO(), [part.state_dict() for part in parts]
    torch.save(dict(method=method, settings=settings, parts=state, done=done, log=log, rng=torch.get_rng_state()), file)
    write(path, file.getvalue())
    rows = [("iteration", *columns), *((str(i), *(f"{v:.6f}" for v in values)) for i, *values in log)]
    write(path.with_name("log.csv"), "".join(",".join(row) + "\n" for row in rows).encode())

def load_checkpoint(path, methods, device, wanted=()):
    """The dict that save_checkpoint wrote. ValueError if another method or other settings made it."""
    raw = io.BytesIO(path.read_bytes())
    try:
        state = torch.load(raw, map_location=device, weights_only=True)
        method, had, _ = state["method"], state["settings"], state["parts"][2]
    except Exception as e:  # torch.load's own are many: zip, pickle, struct, runtime, key, type
        raise ValueError(f"{path}: not a checkpoint, or a damaged one ({type(e).__name__})") from None
    if method not in methods:
        raise ValueError(f"{path}: made by {method}.py, not by {' or '.join(methods)}.py")
    for name in wanted:
        if had.get(name) != wanted[name]:
            raise ValueError(f"{path}: made with {name} {had.get(name)}, not {wanted[name]}; "
                             "--fresh trains anew over it, --out elsewhere keeps it")
    return state

def fill(path, parts, saved):
    """Load the saved state of each part. ValueError if the checkpoint at path is of another network."""
    try:
        for part, state in zip(parts, saved, strict=True):
            part.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as e:
        raise ValueError(f"{path}: of another network ({type(e).__name__}); --fresh trains anew over it") from None

def resume(path, parts, state):
    """Put a checkpoint back into the parts and the generator -> iterations done, log."""
    fill(path, parts, state["parts"])
    torch.manual_seed(state["settings"]["seed"] + state["done"])  # an accelerator's generator is not saved: new numbers
    torch.set_rng_state(state["rng"].cpu())
    return state["done"], state["log"]

class Progress:
    """One line that renews itself in a terminal; elsewhere a line every 20 seconds and one at the end."""

    def __init__(self, what, unit, total, done=0):
        self.what, self.unit, self.total, self.first = what, unit, total, done
        self.start = self.shown = time.perf_counter()

    def __call__(self, done, each, note=""):
        """done of total rounds are over, each of them worth `each` units."""
        now, tty = time.perf_counter(), sys.stdout.isatty()
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
def with_noise(x, generator=None):
    """Images in -1 .. 1 with as much noise on them that each pixel's is as large as black against grey."""
    return x + torch.randn(x.shape, generator=generator, device=x.device)

def train(images, iters=3000, batch=128, lr=1e-3, width=128, depth=100, strategy="sqrt", slots=10, budget=4.0,
          device="cpu", seed=0, path=None, fresh=False, compiled=False):
    """uint8 images (N, C, H, H) on the CPU -> the averaged Denoiser. Seeds torch's global generator.

    The strategy decides what is kept and what is computed again, and on the CPU not one bit of the result. path: where
    to save; unless fresh, training goes on from what is there. ValueError if that was made otherwise,
    FloatingPointError if the loss is not finite (what was saved last stays)."""
    wanted = dict(channels=images.shape[1], size=images.shape[2], width=width, depth=depth, iters=iters, batch=batch,
                  lr=lr, seed=seed, images=hashlib.sha256(images.contiguous().numpy()).hexdigest()[:12])
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be square, not {images.shape[3]}x{images.shape[2]}")
    torch.manual_seed(seed)
    model = Denoiser(images.shape[1], images.shape[2], width, depth).to(device)
    average = copy.deepcopy(model).requires_grad_(False).eval()
    opt = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99))
    parts, done, log = (model, average, opt), 0, []
    if path and path.exists() and not fresh:
        done, log = resume(path, parts, load_checkpoint(path, ["checkpointing"], device, wanted))
    schedule = choose_schedule(strategy, model.layers, torch.zeros(batch, width, device=device), slots, budget)
    if compiled:
        for layer in model.layers:
            layer.compile()
    images = images.to(device)
    progress, total, saved = Progress("iteration", "images", iters, done), torch.zeros((), device=device), time.time()
    for i in range(done, iters):
        opt.param_groups[0]["lr"] = lr * min((i + 1) / 200, 1 - i / iters)
        x = to_float(images[torch.randint(len(images), (batch,), device=device)])
        loss = F.mse_loss(model(with_noise(x), schedule), x) / 4  # of pixels in 0 .. 1
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
                save_checkpoint(path, "checkpointing", wanted, parts, i + 1, log)
                saved = time.time()
        progress(i + 1, batch, f"loss {log[-1][1]:.5f}" if log else "")
    return average

def load(path, device="cpu"):
    """The averaged network of a checkpoint; model(x) takes the noise off images in -1 .. 1 of the shape model.shape."""
    state = load_checkpoint(Path(path), ["checkpointing"], device)
    model = Denoiser(*(state["settings"][name] for name in ("channels", "size", "width", "depth")))
    fill(path, [model], state["parts"][1:2])
    return model.to(device).requires_grad_(False).eval()

@torch.inference_mode()
def denoise(model, x, chunk=1000):
    """Images in -1 .. 1 with noise on them -> the images, (N, C, H, W)."""
    return torch.cat([model(part) for part in x.split(chunk)])

def plot_log(curves, dots, across, up):
    """{name: [(x, y)]} twice, in the same order, lines and dots -> a Pillow image, both scales logarithmic."""
    image = Image.new("RGB", (760, 440), "white")
    draw, font, left, top, right, bottom = ImageDraw.Draw(image), ImageFont.load_default(15), 70, 40, 580, 390
    colours = "#000000", "#7f8c8d", "#2471a3", "#27ae60", "#c0392b", "#8e44ad"
    points = [point for line in (*curves.values(), *dots.values()) for point in line]
    low, high = ([edge(math.log10(point[axis]) for point in points) for axis in (0, 1)] for edge in (min, max))
    wide = [max(b - a, 0.1) for a, b in zip(low, high)]
    spot = lambda x, y: (left + (right - left) * (math.log10(x) - low[0]) / wide[0],
                         bottom - (bottom - top) * (math.log10(y) - low[1]) / wide[1])
    for power, digit in itertools.product(range(-6, 9), (1, 2, 5)):
        value = digit * 10.0**power
        if low[0] - 0.01 < math.log10(value) < high[0] + 0.01:
            draw.text((spot(value, 10 ** low[1])[0], bottom + 8), f"{value:g}", "black", font, "mt")
        if low[1] - 0.01 < math.log10(value) < high[1] + 0.01:
            y = spot(10 ** low[0], value)[1]
            draw.line((left, y, right, y), "#dddddd")
            draw.text((left - 8, y), f"{value:g}", "black", font, "rm")
    for name, colour in zip({**curves, **dots}, itertools.cycle(colours)):
        if len(curves.get(name, [])) > 1:
            draw.line([spot(*point) for point in curves[name]], colour, 2)
        for x, y in (spot(*point) for point in dots.get(name, [])):
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
        draw.text((right + 20, top + 24 * [*{**curves, **dots}].index(name)), name, colour, font)
    draw.text(((left + right) / 2, 436), across, "black", font, "mb")
    draw.text((8, 12), up, "black", font)
    return image

def save_png(path, image):
    file = io.BytesIO()
    image.save(file, "PNG")
    write(path, file.getvalue())

def by_schedule(schedule):
    """What there_and_back() and count() take."""
    return lambda layers, x: run(layers, schedule, x)

def compare(width, depth, batch, slots, budget, device, out):
    """Prints what each strategy takes, of a chain of equal layers and of one of unequal ones; two pictures into out."""
    layers = [ResidualLayer(width, depth).to(device) for _ in range(depth)]
    x, m = torch.randn(batch, width, device=device), math.isqrt(depth - 1) + 1
    chain = profile(layers, x)
    with torch.no_grad():
        u = clock([functools.partial(run, layers, keep_all(depth), x)], device)[0] / depth
    w, a, units = chain.w[0], chain.a[0], chain._replace(u=[1] * depth, c=0)
    schedules = {name: choose_schedule(name, layers, x, slots, budget) for name in (*STRATEGIES, "budget")}
    expected = {name: theory(name, depth, w, a, slots) for name in STRATEGIES}
    expected["budget"] = predict(schedules["budget"], units)
    ways = {name: by_schedule(schedule) for name, schedule in schedules.items()}
    for kind in ("reentrant", "non-reentrant"):
        ways["torch " + kind] = functools.partial(lambda kind, layers, x: checkpoint_sequential(
            layers, m, x, use_reentrant=kind == "reentrant"), kind)
    print(f"{depth} equal layers, {batch} rows of {width} numbers, on {device}: w = {w / 1e6:.4g} MB, "
          f"a = {a / 1e6:.4g} MB, u = {u * 1e6:.0f} us; {m} segments, {slots} slots, a budget of {budget:g} MB")
    seconds = clock([functools.partial(there_and_back, way, layers, x) for way in ways.values()], device)
    print("strategy            | MB stored (theory)      | of none | runs (theory)   | s a step (theory) | to none"
          + " | MB, allocator" * (device.type == "cuda"))
    dots = {}
    for (name, way), took in zip(ways.items(), seconds):
        peak, runs = count(way, layers, x)
        cells = [f"{name:19}", f"{peak / 1e6:9.3f}", f"1/{expected['none'][0] / peak:.1f}", f"{runs:7}", f"{took:8.4f}"]
        if name in expected:
            least, most = expected[name]
            dots[name] = [(peak / 1e6, took)]
            cells[1] += f" ({least / 1e6:.3f})"
            cells[3] += f" ({most})"
            again = predict(schedules[name], chain._replace(u=[u] * depth))[1] - depth * u
            cells[4] += f" ({seconds[0] + again:.4f})"  # (9)
        elif name == "torch non-reentrant":
            cells[1:3] = "as above", ""  # its own hooks hide it from these
        if device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            there_and_back(way, layers, x)
            cells.append(f"{(torch.cuda.max_memory_allocated() - before) / 1e6:.1f}")
        cells.insert(5, f"{took / seconds[0]:.3f}")
        print(" | ".join(f"{cell:{size}}" for cell, size in zip(cells, (19, 23, 7, 15, 17, 7, 13))))

    depths = sorted({d for d in (3, 10, 30, 100, 300, 1000, 3000) if d < depth} | {depth})
    lines = {name: [(d, theory(name, d, w, a, slots)[0] / 1e6) for d in range(2, depth + 1)] for name in STRATEGIES}
    found = {name: [(d, count(by_schedule(choose_schedule(name, layers[:d], x, slots)), layers[:d], x)[0] / 1e6)
                    for d in depths] for name in STRATEGIES}
    save_png(out / "memory.png", plot_log(lines, found, "layers", "MB stored: equations (lines), counted (dots)"))
    at = lambda peak, runs: (peak / 1e6, seconds[0] + (runs - depth) * u)  # (9) but for c
    lines = {name: [] for name in schedules}
    lines["slots"] = [at(*theory("slots", depth, w, a, s)) for s in range(1, depth) if math.comb(s + 30, s) >= depth]
    lines["sqrt"] = [at(*predict(segments(depth, k), units)) for k in range(1, depth + 1)]
    for share in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96):
        with contextlib.suppress(ValueError):  # less than the layers need
            lines["budget"].append(at(*predict(in_budget(units, depth * a / share), units)))
    save_png(out / "frontier.png", plot_log(lines, dots, "MB stored", "seconds a step: the equations for all "
                                            "slots, segments and budgets (lines), measured (dots)"))

    layers = [ResidualLayer(width, depth, width * 2 ** (i % 4) // 2 or 1).to(device) for i in range(min(depth, 100))]
    chain = profile(layers, x)
    whole, least = predict(keep_all(len(layers)), chain)[0], chain.w[0] + max(chain.a)
    hidden = ", ".join(str(layer.inner.out_features) for layer in layers[:4])
    print(f"{len(layers)} unequal layers, {hidden} hidden units in turn; MB stored and s a step\n"
          "budget, MB | best schedule    | best of equal segments")
    for budget in [whole / share for share in (2, 4, 8) if whole / share > 1.2 * least]:
        fit = [segments(len(layers), k) for k in range(1, len(layers) + 1)]
        fit = min((s for s in fit if predict(s, chain)[0] <= budget), key=lambda s: predict(s, chain)[1], default=None)
        ways = [by_schedule(schedule) for schedule in (in_budget(chain, budget), fit) if schedule]
        seconds = clock([functools.partial(there_and_back, way, layers, x) for way in ways], device)
        cells = [f"{count(way, layers, x)[0] / 1e6:7.3f} {took:8.4f}" for way, took in zip(ways, seconds)]
        print(" | ".join([f"{budget / 1e6:10.3f}", *cells, *["none fits"] * (not fit)]))
    print(f"memory.png and frontier.png are in {out}")

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
        model = load(path, device)
        x_0 = to_float(held_out)
        noisy = with_noise(x_0, torch.Generator().manual_seed(0))  # the same whatever --seed is
        clean = denoise(model, noisy.to(device)).cpu()
        save_samples(args.out, clean[torch.arange(args.samples) % len(clean)])
        shown = torch.arange(20) % len(clean)
        rows = [rows[shown].unflatten(0, (2, 10)) for rows in (x_0, noisy, clean)]
        save_grid(args.out / "denoised.png", torch.stack(rows, 1).flatten(0, 2), 10)
        errors = [F.mse_loss(x, x_0).item() / 4 for x in (noisy, clean)]
        print(f"mean squared error of {len(x_0)} test images, pixels in 0 .. 1: {errors[1]:.5f}, with the noise "
              f"{errors[0]:.5f}")

        layers = list(model.requires_grad_(True).layers)
        x = model.first(noisy[torch.arange(args.batch) % len(noisy)].to(device).flatten(1)).detach()
        schedules = [keep_all(args.depth), choose_schedule(args.strategy, layers, x, args.slots, args.budget)]
        ways = [by_schedule(schedule) for schedule in schedules]
        seconds = clock([functools.partial(there_and_back, way, layers, x) for way in ways], device)
        for name, way, schedule, took in zip(("none", args.strategy), ways, schedules, seconds):
            peak, runs = count(way, layers, x)
            least, most = predict(schedule, profile(layers, x)._replace(u=[1] * args.depth, c=0))
            print(f"{name}: {peak / 1e6:.3f} MB stored in {args.depth} layers ({least / 1e6:.3f} by the equations), "
                  f"{runs} runs of a layer ({most}), {took:.4f} s there and back")
        print(f"{args.samples} samples: samples.png, samples.npy in {args.out}, with denoised.png (images, with noise, "
              "without), log.csv, model.pt")

if __name__ == "__main__":
    main()
