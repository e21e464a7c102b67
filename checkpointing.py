# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""Gradient checkpointing: train deep networks in little memory by recomputing activations.

Papers: Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016,
arXiv:1604.06174; Griewank, Walther, "Algorithm 799: Revolve", ACM TOMS 26, 2000; for unequal
layers Beaumont et al., "Optimal Checkpointing for Heterogeneous Chains: How to Train Deep Neural
Networks with Limited Memory", 2019, arXiv:1911.13214.

symbol     in the code    meaning
f_i, x_i   layers[i], x   layer i = 0 .. n-1 and its input; x_n is the output of the last layer
w_i        chain.w[i]     bytes of x_i, 65,536 for 128 rows of 128 features in float32
a_i        chain.a[i]     bytes that autograd stores for layer i: x_i and intermediate results
u_i        chain.u[i]     seconds of a forward run of layer i without autograd
s          slots          most layer inputs stored at any time to recompute from, x_0 among them
schedule   schedule       nested list. A number: store this layer's activations. A list: store only
                          the input of this part and recompute it, as the inner list says

     [0, 1, 2, 3]         store everything
     [[0, 1], 2, 3]       store x_0 and layers 2, 3; recompute 0, 1
     [[[0], 1], [2], 3]   recompute recursively: layer 0 runs three times, layers 1 and 2 twice

Backpropagation of a loss L visits the layers in reverse order and needs x_i at layer i:

  (1) ∂L/∂x_i = ∂L/∂x_{i+1} ∂f_i/∂x_i,  ∂L/∂θ_i = ∂L/∂x_{i+1} ∂f_i/∂θ_i    θ_i: parameters of f_i

Plain training stores a_0 + ... + a_{n-1} bytes. But x_j can be recomputed from any stored x_i:

  (2) x_j = f_{j-1}(... f_i(x_i)),  i < j, at the price of j - i more forward runs

Every schedule runs each layer once with autograd recording (n runs); t counts the other runs.
For equal layers, w_i = w and a_i = a:

      strategy        peak bytes                 forward runs n + t
  (3) none            n a                        n
      every           (n - 1) w + a              2n - 1
  (4) m segments      (m - 1) w + ⌈n/m⌉ a        2n - ⌈n/m⌉                                [Chen]
  (5) halves          D w + a, D = ⌈log₂ n⌉      t(n) = ⌊n/2⌋ + t(⌊n/2⌋) + t(⌈n/2⌉),  t(1) = 0
      binomial        min(s, n - 1) w + a        (6), (7)                              [Griewank]

(4) is least near m = √(n a/w): for a = w, about 2√n w. The code takes m = ⌈√n⌉ for any a and w.
(5) stores x_0, runs the first half, backpropagates through the second half by the same rule, then
through the first. With s slots, store x_0, run k layers, backpropagate through the rest with s - 1
slots, then through the first k layers with s:

  (6) t(n, s) = min over 0 < k < n of k + t(n - k, s - 1) + t(k, s)
      t(1, s) = 0;  t(n, 0) = ∞ for n > 1

Let N(s, r) be the most layers that s slots allow with at most r other runs of each. In (6) the
first k have had one, and the rest have one slot less: N(s, r) = N(s, r - 1) + N(s - 1, r), N = 1
for s = 0 or r = 0. This is Pascal's triangle: N = C(s + r, s). At best N(s, j) layers have at most
j other runs for each j < r, and none more than r: t = r n - N(s, 0) - ... - N(s, r - 1), that is

  (7) t(n, s) = r n - C(s + r, r - 1),   r the smallest integer with n ≤ C(s + r, s)   [Griewank]

Unequal layers: T(i, j, M) is the least time of the other runs of layers i .. j-1 in M bytes, which
include x_i (unlike in Beaumont et al.). Either store layer i, or recompute layers i .. k-1:

  (8) T(i, j, M) = min of T(i + 1, j, M - a_i) and, over i < k < j,
                   u_i + ... + u_{k-1} + T(k, j, M - w_i) + T(i, k, M)
      T(j, j, M) = 0;  ∞ where M < 0

A function f can be recomputed in two ways, use_reentrant=True or False in torch.utils.checkpoint:

- True, checkpoint_reentrant() here: an autograd function that stores only its input. Its backward
  pass runs f again and calls backward() on the result. As autograd sees only what goes into f and
  comes out, autograd.grad(), backward(inputs=...) and more than one output are not supported.
- False, checkpoint() here: f is recorded as usual, but autograd stores a number in place of each
  tensor. When it first needs one of the tensors, f runs again. The graph is that of the plain
  call, and so are gradients and hooks. Outputs may be of any kind.

Pitfalls:
- f runs twice and must do the same. Both runs start with the same states of torch's generators,
  autocast, buffers of the modules that f calls (so batch norm's statistics move once), and, in
  checkpoint(), lists, dicts and objects among the arguments. This is not so for Python's and
  NumPy's generators or anything else that f changes: a global list that f appends to grows twice.
- In the backward pass checkpoint() raises RuntimeError if arguments or modules' parameters were
  changed in place, or if f now stores other tensors. It cannot see a change of a tensor that is
  neither an argument, nor a module's parameter, nor stored by autograd.
- On a Linux CPU the memory that checkpoint() frees may stay fragmented; the environment variable
  MALLOC_MMAP_THRESHOLD_=65536 prevents that. checkpoint_reentrant() does not need it.
- Peak bytes do not include parameters. If a layer stores its output, as relu does, and the next
  layer its input, a_i and a_{i+1} count the same tensor: the prediction is then an upper bound.
- The last segment is stored, as backpropagation starts there. Break it: return `parts` in
  segments(), and test_checkpointing_eq3_4_5_6_7_bytes_and_runs fails.

Differences from the papers:
- Bytes of gradients and time of the backward pass are left out: all schedules share them.
- (8) counts bytes in steps of about 1/500 of the budget, and groups layers into at most 100 blocks.

python checkpointing.py --strategy binomial --slots 5          trains 100 layers, 5 inputs stored
python checkpointing.py --compare --depth 1000 --budget 6.5    sqrt: 1/21 of the bytes of none
"""

import argparse
import collections
import contextlib
import copy
import functools
import io
import itertools
import math
import os
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint as torch_checkpoint


# ------------------------------------------------------------------------------------- method: the core ------------
class Reentrant(torch.autograd.Function):
    """f(x), storing only x. The backward pass runs f again, recorded, and backpropagates through that run."""

    @staticmethod
    def forward(ctx, f, root, x):
        ctx.f = f
        ctx.conditions = Conditions()
        ctx.save_for_backward(x)
        with ctx.conditions.first_run(), autocast(ctx.conditions.autocast):
            return f(x)  # inside a Function, autograd records nothing

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("checkpoint_reentrant() has no second derivatives, but checkpoint() has")
        x = ctx.saved_tensors[0].detach().requires_grad_(ctx.needs_input_grad[2])
        with ctx.conditions.second_run(), torch.enable_grad():
            y = ctx.f(x)  # (2)
        if y.requires_grad:
            y.backward(grad)  # (1); the gradients of parameters are added to their .grad
        return None, None, x.grad


def checkpoint_reentrant(f, x):
    """f(x), storing only x. f: a tensor -> a tensor; only loss.backward() can follow."""
    root = torch.empty(0, requires_grad=True)  # so that backward() is called even if only f's parameters need gradients
    return Reentrant.apply(f, root, x)


def run(layers, schedule, x, checkpoint=checkpoint_reentrant):
    """The output of the chain of layers for x, stored and recomputed as the schedule says.

    checkpoint(f, x) calls f(x) for a part that is recomputed: checkpoint_reentrant, checkpoint, or torch's."""
    if not torch.is_grad_enabled():
        schedule = flatten(schedule)  # nothing is recorded, so there is nothing to recompute later
    for part in schedule:
        if isinstance(part, int):
            x = layers[part](x)
        else:
            x = checkpoint(functools.partial(run, layers, part, checkpoint=checkpoint), x)
    return x


def flatten(schedule):
    """The layers of a schedule, in order."""
    layers, todo = [], [schedule]
    while todo:
        part = todo.pop()
        if isinstance(part, int):
            layers.append(part)
        else:
            todo.extend(reversed(part))
    return layers


def segments(n, m):
    """The schedule of m parts of nearly equal length, all recomputed but the last, where backpropagation starts."""
    cuts = [n * i // m for i in range(m + 1)]
    parts = [list(range(i, j)) for i, j in zip(cuts, cuts[1:])]
    return parts[:-1] + parts[-1]  # (4)


def halves(n, first=0):
    """The schedule of layers first .. first + n - 1: the first half is recomputed, and so on within each half."""
    if n == 1:
        return [first]
    k = n // 2
    return [halves(k, first)] + halves(n - k, first + k)  # (5)


@functools.cache
def extra_runs(n, s):
    """t(n, s): the least number of runs without recording for n layers in s slots."""
    if n == 1:
        return 0
    if s == 0:
        return math.inf
    r = 0
    while math.comb(s + r, s) < n:
        r += 1
    return r * n - math.comb(s + r, r - 1)  # (7)


def binomial(n, s, first=0):
    """The schedule of layers first .. first + n - 1 with the fewest runs for s slots, known as Revolve."""
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 4 * n))  # one slot nests n deep
    if n == 1:
        return [first]
    k = min(range(1, n), key=lambda k: k + extra_runs(n - k, s - 1) + extra_runs(k, s))  # (6)
    return [binomial(k, s, first)] + binomial(n - k, s - 1, first + k)


def choose_schedule(layers, x, strategy="sqrt", slots=10, budget=4.0):
    """The schedule of one of the STRATEGIES. x: input of the first layer, with which "budget" measures the layers.

    slots: s, for "binomial"; budget: MB, for "budget". ValueError if strategy is unknown or the budget too small."""
    n = len(layers)
    m = {"none": 1, "every": n, "sqrt": math.isqrt(n - 1) + 1}
    if strategy in m:
        return segments(n, m[strategy])  # (3)
    if strategy == "recursive":
        return halves(n)
    if strategy == "binomial":
        return binomial(n, slots)
    if strategy == "budget":
        return in_budget(measure_chain(layers, x), budget * 1e6)
    raise ValueError(f"strategy {strategy!r} is none of {STRATEGIES}")


STRATEGIES = ["none", "every", "sqrt", "recursive", "binomial", "budget"]


# ---------------------------------------------------------------------------- method: for real networks ------------
def checkpoint(f, *args, **kwargs):
    """f(*args, **kwargs), without storing activations: f runs again when the backward pass needs them.

    f may return anything. RuntimeError in the backward pass if the second run does not do what the first did."""
    if not torch.is_grad_enabled():
        return f(*args, **kwargs)
    call = Call(f, args, kwargs)
    with call.conditions.first_run():
        output, call.notes = call.run(args, kwargs)
    call.kept = {}
    return output


class Call:
    """A call of checkpoint(): autograd stores numbers, and look_up() gives it the tensors when it needs them.

    arguments: args and kwargs, before f changes them, with a Number for each tensor; saver stores these tensors.
    notes: what the first run would have stored; kept: those of the latest run that may still be needed."""

    def __init__(self, f, args, kwargs):
        self.f = f
        self.conditions = Conditions()
        tensors = []

        def number(tensor):
            if tensor.is_inference():
                return tensor  # autograd refuses to store it
            tensors.append(tensor)
            return Number(len(tensors) - 1)

        self.arguments = rebuild([args, kwargs], torch.Tensor, number, {})
        root = torch.empty(0, requires_grad=True)  # so that saver has a grad_fn
        self.saver = Saver.apply(root, *tensors)

    def run(self, args, kwargs):
        """(what f returns, a note (kind, address, version) of each tensor that autograd wants to store)."""
        notes = []
        self.kept = {}  # {number: (tensor, version)}
        self.running = True

        def store(tensor):
            i = len(notes)
            kind = tensor.dtype, tensor.shape, tensor.device
            address = tensor.data_ptr() if tensor.layout == torch.strided else i  # a sparse tensor has none
            version = tensor._version  # counts the changes in place
            notes.append((kind, address, version))
            self.kept[i] = tensor.detach(), version
            return i

        with saved_tensors_hooks(store, self.look_up):
            output = self.f(*args, **kwargs)
        self.running = False
        return output, notes

    def look_up(self, i):
        """Tensor i, for autograd. It is then released, but not while f runs: f may call torch.autograd.grad()."""
        if i not in self.kept:
            self.run_again()
        tensor, version = self.kept[i] if self.running else self.kept.pop(i)
        if tensor._version != version:
            raise RuntimeError("checkpoint: a tensor that the backward pass needs was changed in place")
        return tensor

    def run_again(self):
        """Runs f again. RuntimeError if it does not store the same tensors."""
        tensors = self.saver.grad_fn.saved_tensors  # RuntimeError if one was changed in place
        args, kwargs = rebuild(self.arguments, Number, tensors.__getitem__, {})
        with self.conditions.second_run(), torch.enable_grad():
            _, notes = self.run(args, kwargs)  # (2)
        for before, now in itertools.zip_longest(self.notes, notes, fillvalue=("nothing", None, None)):
            changed = before[1] == now[1] and before[2] != now[2]  # a tensor of both runs, changed in between
            if before[0] != now[0] or changed:
                self.kept = {}  # another backward pass must not use what was refused
                raise RuntimeError(f"checkpoint: when run again, f stores {now} in place of {before}")


class Saver(torch.autograd.Function):
    """Has autograd store the arguments: it notices changes in place, and a checkpoint around this one can drop them."""

    @staticmethod
    def forward(ctx, root, *tensors):
        ctx.save_for_backward(*tensors)
        return root.clone()


class Number(int):
    """Stands for tensor number i among the arguments."""


def rebuild(value, kind, change, copies):
    """value with change(v) for each v of this kind in it. Lists, dicts and objects, which f may change, are copied.

    copies: {id: copy} of those met before. Modules, functions and what cannot be copied stay the same."""
    if isinstance(value, kind):
        return change(value)
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, tuple):
        make = getattr(value, "_make", type(value))  # a named tuple takes its items one by one
        return make([rebuild(v, kind, change, copies) for v in value])
    if callable(value) or isinstance(value, torch.Tensor):
        return value
    try:
        new = copies[id(value)] = copy.copy(value)
    except Exception:  # objects that cannot be copied raise many types
        return value
    if isinstance(new, list):
        new[:] = [rebuild(v, kind, change, copies) for v in value]
    elif isinstance(new, dict):
        dict.update(new, {key: rebuild(v, kind, change, copies) for key, v in value.items()})
    elif new is not value and hasattr(new, "__dict__"):
        vars(new).update({name: rebuild(v, kind, change, copies) for name, v in vars(value).items()})
    return new


class Conditions:
    """What f depends on besides its arguments: random generators, autocast, and the modules that it calls."""

    def __init__(self):
        kinds = [kind for kind in ("cpu", "cuda", "mps") if torch.amp.is_autocast_available(kind)]
        self.autocast = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]
        self.random = random_states()
        self.buffers = {}  # {(module, name): value before the first run}

    @contextlib.contextmanager
    def first_run(self):
        """Context of the first run. Notes parameters and changed buffers of the modules that this thread calls."""
        thread = threading.get_ident()
        called, found = [], {}

        def look(module, args):
            if threading.get_ident() == thread:
                called.append(module)
                for name, buffer in module._buffers.items():
                    if buffer is not None and not nn.parameter.is_lazy(buffer) and (module, name) not in found:
                        found[module, name] = buffer, buffer._version, buffer.detach().clone()

        hook = nn.modules.module.register_module_forward_pre_hook(look)
        try:
            yield
        finally:
            hook.remove()
        self.parameters = [(p, p._version) for m in called for p in m._parameters.values() if p is not None]
        for key, (buffer, version, value) in found.items():
            changed = getattr(*key) is not buffer or buffer._version != version
            if changed or buffer.dim() < 2:  # batch norm changes its statistics without a new version
                self.buffers[key] = value
        if all(torch.equal(state, now) for (_, state), (_, now) in zip(self.random, random_states())):
            self.random = []  # f draws no random numbers

    @contextlib.contextmanager
    def second_run(self):
        """Context of a later run: the conditions are as before the first run, and afterwards again as they are now."""
        if any(p._version != version for p, version in self.parameters):
            raise RuntimeError("checkpoint: a parameter was changed in place between the forward and the backward pass")
        random = random_states() if self.random else []
        buffers = {key: getattr(*key) for key in self.buffers}
        try:
            for key, value in self.buffers.items():
                setattr(*key, value.clone())
            set_random(self.random)
            with autocast(self.autocast):
                yield
        finally:
            for key, buffer in buffers.items():
                setattr(*key, buffer)
            set_random(random)


def random_states():
    """[(function that sets it, state)] of torch's global random generators."""
    states = [(torch.set_rng_state, torch.get_rng_state())]
    for i in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        device = f"cuda:{i}"
        states.append((functools.partial(torch.cuda.set_rng_state, device=device), torch.cuda.get_rng_state(device)))
    if torch.backends.mps.is_available():
        states.append((torch.mps.set_rng_state, torch.mps.get_rng_state()))
    return states


def set_random(states):
    """Sets the generators to states from random_states()."""
    for set_state, state in states:
        set_state(state)


def autocast(settings):
    """Autocast as in settings, but without its cache, which may hold casts that autograd did not record."""
    stack = contextlib.ExitStack()
    for kind, dtype, enabled in settings:
        if enabled or torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
    return stack


# ------------------------------------------------------------------------------- method: unequal layers ------------
Chain = collections.namedtuple("Chain", "w a u")  # lists with one number for each layer: bytes, bytes, seconds


def in_budget(chain, budget, steps=500, blocks=100):
    """The fastest schedule that never stores more than budget bytes. ValueError if there is none.

    Memory is counted in units of about budget / steps bytes; sizes are rounded up to whole units. If there are more
    layers than blocks, they are grouped into blocks."""
    n = min(len(chain.u), blocks)
    cuts = [len(chain.u) * i // n for i in range(n + 1)]
    u = np.add.reduceat(chain.u, cuts[:-1])  # sums over the blocks
    a = np.add.reduceat(chain.a, cuts[:-1])
    w = np.array(chain.w)[cuts[:-1]]
    room = max(0, min(budget, a.sum()))
    divisor = np.gcd.reduce([*a, *w])
    unit = divisor * max(1, math.ceil(room / divisor / steps))
    M = int(room // unit)
    a = np.minimum(-(-a // unit), M + 1)  # rounded up
    w = np.minimum(-(-w // unit), M + 1)

    T = np.full((n + 1, n + 1, 2 * M + 2), np.inf)  # the last axis is memory, from -M - 1 to M
    best = np.zeros(T.shape, int)  # which term of (8) is least: 0 to store layer i, else k - i

    def memory(less):
        """The part of the last axis from -less to M - less."""
        return slice(M + 1 - less, 2 * M + 2 - less)

    for j in range(n + 1):
        T[j, j, memory(0)] = 0
        for i in reversed(range(j)):
            store = T[i + 1, j, memory(a[i])]
            runs = np.cumsum(u[i : j - 1])[:, None]
            recompute = runs + T[i + 1 : j, j, memory(w[i])] + T[i, i + 1 : j, memory(0)]  # a row for each k
            terms = np.vstack([store, recompute])
            T[i, j, memory(0)] = terms.min(0)  # (8)
            best[i, j, memory(0)] = terms.argmin(0)
    if T[0, n, -1] == np.inf:
        raise ValueError(f"--budget {budget / 1e6:g}: too small for these layers")

    def plan(i, j, M):
        """The schedule of blocks i .. j-1; M: an index of the last axis, from its end."""
        if i == j:
            return []
        k = i + best[i, j, M]
        if k == i:
            return [*range(cuts[i], cuts[i + 1]), *plan(i + 1, j, M - a[i])]
        return [plan(i, k, M), *plan(k, j, M - w[i])]

    return plan(0, n, -1)


def predict(schedule, chain):
    """(peak bytes, n + t) of a schedule."""
    peak = runs = 0
    todo = [(schedule, 0, 1)]
    while todo:
        parts, held, times = todo.pop()
        for part in parts:
            if isinstance(part, int):
                held += chain.a[part]
                runs += times
            else:
                todo.append((part, held, times + 1))
                held += chain.w[flatten(part)[0]]
        peak = max(peak, held)
    return peak, runs


# -------------------------------------------------------------------------------------------- measuring ------------
class Tally(saved_tensors_hooks):
    """Context that counts the bytes that autograd stores, now() and at their peak, without the tensors in own.

    A storage that several tensors share counts once, until the last of them is released."""

    def __init__(self, own):
        super().__init__(self.store, lambda stored: stored())
        self.own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self.sizes = weakref.WeakKeyDictionary()  # {what autograd holds: (address, bytes)}
        self.peak = 0

    def store(self, tensor):
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        stored = functools.partial(torch.Tensor.detach, tensor)
        if storage.data_ptr() not in self.own:
            self.sizes[stored] = storage.data_ptr(), storage.nbytes()
            self.peak = max(self.peak, self.now())
        return stored

    def now(self):
        return sum(dict(self.sizes.values()).values())


def forward_backward(layers, schedule, x, checkpoint=checkpoint_reentrant):
    """A forward and a backward pass of the chain, with x (N, width) as input and as gradient of the output."""
    run(layers, schedule, x.detach().requires_grad_(), checkpoint).backward(x)


def count(layers, schedule, x, checkpoint=checkpoint_reentrant):
    """(peak bytes stored, n + t) of a forward and a backward pass. Parameters and buffers do not count."""
    runs = []

    def counted(layer, x):
        runs.append(layer)
        return layer(x)

    own = [tensor for layer in layers for tensor in (*layer.parameters(), *layer.buffers())]
    tally = Tally(own)
    with tally:
        forward_backward([functools.partial(counted, layer) for layer in layers], schedule, x, checkpoint)
    return tally.peak, len(runs)


def clock(jobs, device):
    """Median seconds of each job. The jobs take turns for 7 rounds, after one round of warm-up."""
    seconds = np.zeros((8, len(jobs)))
    for row in seconds:
        for i, job in enumerate(jobs):
            start = time.perf_counter()
            job()
            torch.zeros(1, device=device).item()  # waits for the device
            row[i] = time.perf_counter() - start
    return np.median(seconds[1:], 0)


def allocated_by(job, device):
    """Peak of the bytes that a job allocates on a GPU, inf if the GPU has too little memory; 0 on other devices."""
    if device.type != "cuda":
        return 0
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        job()
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()  # libraries such as cuBLAS need some memory of their own
        return math.inf
    return torch.cuda.max_memory_allocated(device) - before


def measure_chain(layers, x):
    """The Chain of the layers, each measured alone. x: the input of the first."""
    chain = Chain([], [], [])
    for layer in layers:
        with torch.no_grad():
            chain.u.extend(clock([functools.partial(layer, x)], x.device))
        x = x.detach().requires_grad_()
        chain.w.append(x.untyped_storage().nbytes())
        tally = Tally([x, *layer.parameters(), *layer.buffers()])
        with tally:
            x = layer(x)
        chain.a.append(chain.w[-1] + tally.now())
    return chain


# ---------------------------------------------------------------------------------------------- network ------------
class ResidualLayer(nn.Module):
    """x + W_2 relu(W_1 x + b_1) + b_2, x (N, width). Autograd stores x and the output of relu."""

    def __init__(self, width, depth=1):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        for p in self.outer.parameters():
            p.data /= depth**0.5  # keeps the variance of the sum of all layers bounded

    def forward(self, x):
        return x + self.outer(F.relu(self.inner(x)))


def make_chain(width=128, depth=100):
    """depth layers of one size. run() takes any other list of layers as well."""
    return nn.ModuleList(ResidualLayer(width, depth) for _ in range(depth))


# --------------------------------------------------------------------------------------------- training ------------
def train(iters=300, batch=128, lr=1e-3, width=128, depth=100, device="cpu", seed=0, path=None, fresh=False, **choice):
    """Trains a chain of layers and returns it. Seeds torch's global generator.

    choice: strategy, slots and budget, as in choose_schedule(); on the CPU no bit of the result depends on them.
    path: the checkpoint, resumed unless fresh. ValueError if the checkpoint has other settings, or the budget is too
    small; FloatingPointError if the loss is not finite."""
    settings = dict(method="checkpointing", width=width, depth=depth, iters=iters, batch=batch, lr=lr, seed=seed)
    torch.manual_seed(seed)
    layers = make_chain(width, depth).to(device)
    opt = torch.optim.Adam(layers.parameters(), lr * min(1, 100 / depth))  # the changes of all layers add up
    schedule = choose_schedule(layers, torch.zeros(batch, width, device=device), **choice)
    losses = []

    for _ in iterations(iters, losses, dict(layers=layers, opt=opt), settings, path, fresh):
        x = torch.randn(batch, width, device=device)
        loss = F.mse_loss(run(layers, schedule, x), x.abs())  # the method needs no data set
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.detach())
    return layers


# ---------------------------------------------------------------------------------------------- command ------------
def load(path, device="cpu"):
    """The chain of layers in a checkpoint."""
    settings = load_checkpoint(path, "checkpointing")["settings"]
    layers = make_chain(settings["width"], settings["depth"])
    load_checkpoint(path, layers=layers)
    return layers.to(device)


def print_table(ways, layers, x):
    """Prints bytes, runs and seconds of each way, predictions in brackets, and returns {name: peak bytes}.

    ways: {name: (schedule, x) or (schedule, x, checkpoint)}. Tally does not see what
    checkpoint functions with hooks store: for these no bytes are printed. What a GPU cannot hold is only predicted."""
    chain = measure_chain(layers, x)
    jobs = {name: functools.partial(forward_backward, layers, *way) for name, way in ways.items()}
    for p in layers.parameters():
        p.grad = torch.zeros_like(p)  # so that no way has to allocate the gradients
    allocated = {name: allocated_by(job, x.device) for name, job in jobs.items()}
    fit = [name for name in ways if allocated[name] < math.inf]
    seconds = dict(zip(fit, clock([jobs[name] for name in fit], x.device)))
    peaks = {}
    on_gpu = x.device.type == "cuda"
    print("strategy             | MB stored             | runs of a layer   | s a step | of the first", end="")
    print(" | MB allocated" if on_gpu else "")
    for name, way in ways.items():
        expected, expected_runs = predict(way[0], chain)
        if name not in fit:
            peaks[name] = expected
            print(f"{name:20} | {f'({expected / 1e6:.3f})':>21} | {f'({expected_runs:7})':>17} | does not fit")
            continue
        peak, runs = count(layers, *way)
        size = ""
        if len(way) == 2:
            peaks[name] = peak
            size = f"{peak / 1e6:.3f} ({expected / 1e6:.3f})"
        taken = f"{seconds[name]:8.4f} | {seconds[name] / seconds[fit[0]]:12.2f}"
        end = f" | {allocated[name] / 1e6:.1f}" if on_gpu else ""
        print(f"{name:20} | {size:>21} | {runs:7} ({expected_runs:7}) | {taken}{end}")
    return peaks


def draw_bars(path, peaks):
    """Saves a picture of {name: peak bytes}."""
    picture = Image.new("RGB", (640, 40 * len(peaks) + 20), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(14)
    for row, (name, peak) in enumerate(peaks.items()):
        y = 20 + 40 * row
        length = 400 * peak / peaks["none"]
        draw.rectangle((220, y, 220 + length, y + 20), "steelblue")
        draw.text((10, y), f"{name}: {peak / 1e6:.3f} MB", "black", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def compare(args):
    """Prints what each strategy takes, and saves compare.png."""
    layers = make_chain(args.width, args.depth).to(args.device)
    x = torch.randn(args.batch, args.width, device=args.device)
    ways = {}
    for name in STRATEGIES:
        ways[name] = choose_schedule(layers, x, name, args.slots, args.budget), x
    sqrt = ways["sqrt"][0]
    ways["sqrt, checkpoint()"] = sqrt, x, checkpoint
    ways["sqrt, torch's"] = sqrt, x, functools.partial(torch_checkpoint, use_reentrant=False)
    print(f"{args.depth} layers, {args.batch} rows of {args.width} features")
    draw_bars(args.out / "compare.png", print_table(ways, layers, x))
    print(f"picture: {args.out}/compare.png")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--iters", type=positive, default=300, help="training iterations")
    add("--batch", type=positive, default=128, help="batch size")
    add("--lr", type=float, default=1e-3, help="learning rate; it falls with the depth beyond 100")
    add("--width", type=positive, default=128, help="features between two layers")
    add("--depth", type=positive, default=100, help="n, the number of layers")
    add("--strategy", choices=STRATEGIES, default="sqrt", help="what is stored and what is recomputed")
    add("--slots", type=positive, default=10, help="s, the number of inputs that --strategy binomial stores")
    add("--budget", type=float, default=4.0, help="most MB stored by --strategy budget")
    add("--compare", action="store_true", help="measure all strategies instead of training")
    add("--out", type=Path, default=Path("out/checkpointing"), help="run folder")
    add("--device", type=pick_device, default=pick_device(), help="where to compute")
    add("--seed", type=int, default=0, help="seed; on a CPU the same seed gives the same bits")
    add("--fresh", action="store_true", help="train from scratch over the checkpoint in --out")
    args = parse_args(parser, argv)

    if args.compare:
        return compare(args)
    choice = dict(strategy=args.strategy, slots=args.slots, budget=args.budget)
    settings = args.iters, args.batch, args.lr, args.width, args.depth, args.device, args.seed
    layers = train(*settings, args.out / "model.pt", args.fresh, **choice)
    x = torch.randn(args.batch, args.width, device=args.device)
    ways = {"none": (segments(args.depth, 1), x), args.strategy: (choose_schedule(layers, x, **choice), x)}
    print_table(ways, layers, x)
    print(f"checkpoint and log: {args.out}/model.pt, log.csv")


# ------------------------------------------------------------------------------------------------ plumbing ------------
# Checkpoints, progress, flags: the same text in every file, and nothing of the method. You may stop here.
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
