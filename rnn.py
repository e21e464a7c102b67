# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""RNN: a network that reads a text letter by letter and bets on the next, learned by sending the error back in time.

Papers: Elman, "Finding Structure in Time", Cognitive Science 14, 1990; Werbos, "Backpropagation Through Time", 1990;
Hochreiter, Schmidhuber, "Long Short-Term Memory", 1997; its forget gate: Gers, Schmidhuber, Cummins, 2000.

symbol         in the code     what it is
x_t            x[t]            the letter at time t, an id 0 .. V - 1; x is (T, N): N streams of text, T letters of each
e(x)           embedding       a letter's vector, (V, E)
h_t, c_t       h[t+1], c[t+1]  state and memory cell after letter t, (N, H) each; h[0] and c[0] came with the chunk
W_ih, W_hh, b  w_ih, w_hh, b   (E, G H), (H, G H), (G H): G = 1 for the tanh RNN, G = 4 gates i, f, g, o for the LSTM
a_t            s, before sigma what the cell computes of its inputs, (N, G H). Vectors are rows, so it is h W, not W h
delta_t        delta[t]        dL/da_t, (N, G H)
sigma          sigmoid         1 / (1 + e^-a), its derivative sigma (1 - sigma)
L              loss            nats per letter

The chain rule makes a text's probability a product, so a model of text is a bet on each letter, given those before it.
What came before is kept in a state of fixed size, made of the last state and the letter, always by the same weights:
  (1) a_t = e(x_t) W_ih + h_{t-1} W_hh + b;   tanh RNN: h_t = tanh a_t
  (2) p(x_{t+1} | x_0 .. x_t) = softmax(h_t W_out + b_out);   L = -1/(T N) sum_{t, n} log p(x_{t+1} | ...)
As W_ih only ever meets the V vectors e(x), their products are formed once for all times, a table with V rows.
Unrolled, the network is T layers deep. h_t acts on L through its own bet and through a_{t+1}, and in no other way:
  (3) dL/dh_t = (dL/dh_t of the bet at t) + delta_{t+1} W_hh^T                   from t = T - 1 down, delta_T = 0
  (4) tanh RNN: delta_t = dL/dh_t (1 - h_t^2)
  (5) dL/dW_hh = sum_t h_{t-1}^T delta_t: one product of (H, T N) and (T N, G H); dL/d(row of the table) = sum of the
      delta_t where its letter stood
So delta goes k steps back through k factors W_hh^T diag(1 - h^2): its norm falls, or grows, exponentially in k. The
LSTM gives it a path without W_hh. Gates in 0 .. 1 say what is taken in (i), kept (f) and shown (o) of a cell c:
  (6) i, f, o = sigma(a^i), sigma(a^f), sigma(a^o), g = tanh(a^g);   c_t = f c_{t-1} + i g;   h_t = o tanh c_t
Backwards, c_t acts on L through h_t, and through c_{t+1} by the factor f_{t+1} alone, which may stay near 1:
  (7) dL/dc_t = dL/dc_{t+1} f_{t+1} + dL/dh_t o_t (1 - tanh^2 c_t)
  (8) delta^i = dL/dc_t g i (1 - i), delta^f = dL/dc_t c_{t-1} f (1 - f), delta^g = dL/dc_t i (1 - g^2),
      delta^o = dL/dh_t tanh(c_t) o (1 - o);   (3) and (5) are the same with these
A CPU has a fast sigma and a slow tanh, so with what belongs to a tanh doubled, one sigma does for all:
  (9) tanh a = 2 sigma(2 a) - 1,   1 - tanh^2 a = 4 sigma(2 a) (1 - sigma(2 a))
A text is longer than any chunk that could be unrolled. Training goes through N streams, T letters at a time:
  (10) h[0], c[0] of a chunk = h[T], c[T] of the one before, as numbers: they carry the past, but no gradient crosses
  (11) a letter is drawn from softmax(logits / temperature), whose limit at 0 is the likeliest letter

Trip wires: nats per letter; bits are nats / log 2. Letters are Unicode characters, those of the whole text, the last
tenth included, on which nothing is trained. torch.nn.LSTM has the same gates in the same order, but its weights lie
transposed, and it adds two b. dL/dh_t in lag.png is (3): all paths from h_t on, but not the LSTM's from c_t to c_{t+1}.
Differs from the papers in: truncation (10) after T letters, and at no other place (Elman cut the gradient after each
letter, the LSTM of 1997 at its gates, and it had no f); Adam for plain descent; dropout (a unit of h for a whole
chunk); b of f starts at 1; gradients longer than 1 are shortened; results come from an average of the weights.

python rnn.py --text shakespeare.txt      300 s on two cores; 1.4754 nats = 2.1286 bits a letter
python rnn.py --cell rnn --out out/tanh   the tanh RNN
"""
import argparse, ast, contextlib, copy, hashlib, inspect, io, math, os, sys, sysconfig, time, warnings, zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

# --------------------------------------------------------------------------------------------------------- method -----
# All of these take time first: (T, N, ...). new(name, *shape) gives a tensor to write to; see Memory. w_hh may be in
# bfloat16 where all else is in float32: then its products are too, and their sums are not.
def add_product(out, a, w):
    """out += a w in place -> out."""
    return torch.addmm(out, a, w, out=out) if a.dtype == w.dtype else out.add_(a.to(w.dtype) @ w)

def rnn_forward(table, x, w_hh, state, new):
    """table (V, H), x (T, N) ids, state (1, N, H): h[0] -> (h,), h (T + 1, N, H)."""
    (T, N), H = x.shape, len(w_hh)
    h = new("h", T + 1, N, H)
    h[0] = state[0]
    torch.index_select(2 * table, 0, x.flatten(), out=h[1:].view(T * N, H))
    twice = 2 * w_hh
    for last, now in zip(h, h[1:]):
        add_product(now, last, twice).sigmoid_().mul_(2).sub_(1)  # (1)
    return (h,)

def rnn_backward(d_h, w_hh, saved, new):
    """d_h (T, N, H): dL/dh_t of the bets, made into dL/dh_t in place -> delta (T, N, H), and dL/d(h[0]) (1, N, H)."""
    (h,) = saved
    delta, back = torch.mul(h[1:], h[1:], out=new("delta", *d_h.shape)).neg_().add_(1), w_hh.t()
    for t in range(len(d_h) - 1, -1, -1):
        delta[t].mul_(d_h[t])  # (4)
        if t:
            add_product(d_h[t - 1], delta[t], back)  # (3)
    return delta, add_product(torch.zeros_like(d_h[0]), delta[0], back)[None]

def lstm_forward(table, x, w_hh, state, new):
    """table (V, 4 H), x (T, N) ids, state (2, N, H): h[0] and c[0] -> h, c (T + 1, N, H), s, u."""
    (T, N), H = x.shape, len(w_hh)
    h, c, s, u = new("h", T + 1, N, H), new("c", T + 1, N, H), new("s", T, N, 4 * H), new("u", T, N, H)
    h[0], c[0] = state
    double = table.new_tensor([1, 1, 2, 1]).repeat_interleave(H)
    torch.index_select(table * double, 0, x.flatten(), out=s.view(T * N, 4 * H))
    w = w_hh * double.to(w_hh.dtype)
    for a, i, f, g, o, h_0, h_1, c_0, c_1, u_1 in zip(s, *gates(s), h, h[1:], c, c[1:], u):
        add_product(a, h_0, w).sigmoid_()  # (6)
        torch.mul(f, c_0, out=c_1).addcmul_(i, g, value=2).sub_(i)  # (9)
        torch.mul(c_1, 2, out=u_1).sigmoid_()
        torch.mul(o, u_1, out=h_1).mul_(2).sub_(o)  # (9)
    return h, c, s, u

def lstm_backward(d_h, w_hh, saved, new):
    """d_h (T, N, H): dL/dh_t of the bets, made into dL/dh_t in place -> delta (T, N, 4 H), dL/d(state) (2, N, H)."""
    h, c, s, u = saved
    delta, back, d_c = new("delta", *s.shape), w_hh.t(), torch.zeros_like(h[0])
    part, slope = torch.empty_like(d_c), torch.empty_like(s[0])
    steps = list(zip(s, *gates(s), u, c, d_h, delta, *gates(delta)))
    for t in range(len(d_h) - 1, -1, -1):
        a, i, f, g, o, u_1, c_0, d, delta_t, d_i, d_f, d_g, d_o = steps[t]
        torch.mul(d, u_1, out=d_o).mul_(2).sub_(d)  # (8)
        torch.mul(d, o, out=part)
        d_c.addcmul_(part.mul_(u_1), u_1, value=-4).add_(part, alpha=4)  # (7)
        torch.mul(d_c, g, out=d_i).mul_(2).sub_(d_c)
        torch.mul(d_c, c_0, out=d_f)
        torch.mul(d_c, i, out=d_g).mul_(4)
        delta_t.mul_(torch.addcmul(a, a, a, value=-1, out=slope))  # (8)
        d_c.mul_(f)  # (7)
        if t:
            add_product(d_h[t - 1], delta_t, back)  # (3)
    return delta, torch.stack([add_product(torch.zeros_like(d_c), delta[0], back), d_c])

def gates(s):
    """(T, N, 4 H) -> the four (T, N, H) in it."""
    return s.view(*s.shape[:2], 4, -1).unbind(2)

# forward, backward, G, and the number of tensors in a state
CELLS = {"rnn": (rnn_forward, rnn_backward, 1, 1), "lstm": (lstm_forward, lstm_backward, 4, 2)}

class Unroll(torch.autograd.Function):
    """The recurrence, (3) to (8) by hand: table (V, G H), x (T, N), w_hh (H, G H), state -> h[1] .. h[T], last state.

    The last state is to be carried on as numbers: it has no gradient (10)."""

    @staticmethod
    def forward(ctx, cell, new, table, x, w_hh, state):
        ctx.cell, ctx.new, ctx.rows, w = cell, new, len(table), w_hh.to(new.products)
        saved = CELLS[cell][0](table, x, w, state, new)
        ctx.save_for_backward(x, w, *saved)
        last = torch.stack([values[-1] for values in saved[: len(state)]])
        ctx.mark_non_differentiable(last)
        return saved[0][1:], last

    @staticmethod
    def backward(ctx, *grads):
        x, w, *saved = ctx.saved_tensors
        delta, d_state = CELLS[ctx.cell][1](ctx.new("d_h", *grads[0].shape).copy_(grads[0]), w, saved, ctx.new)
        d_w = saved[0][:-1].flatten(0, 1).to(w.dtype).t() @ delta.flatten(0, 1).to(w.dtype)  # (5)
        d_table = delta.new_zeros(ctx.rows, delta.shape[2]).index_add_(0, x.flatten(), delta.flatten(0, 1))  # (5)
        return None, None, d_table, None, d_w.to(d_table.dtype), d_state

class Memory(dict):
    """Gives out the same tensor again and again: fresh memory would cost more than what is computed in it. What lies
    there is gone with the next call, which autograd notices: a backward() after a second forward is a RuntimeError.
    products: the type in which W_hh is multiplied."""

    def __init__(self, like, products=None):
        self.like, self.products = like, products or like.dtype

    def __call__(self, name, *shape):
        if (name, shape) not in self:
            self[name, shape] = self.like.new_empty(shape)
        return self[name, shape].detach()

# -------------------------------------------------------------------------------------------------------- network -----
class CharRNN(nn.Module):
    """Bets on the next letter. chars: the letters that it knows, a string of V different ones; ids are places in it."""

    def __init__(self, chars, cell="lstm", width=512, size=64, dropout=0.0):
        super().__init__()
        self.chars, self.cell, self.dropout = chars, cell, dropout
        G, self.layers = CELLS[cell][2:]
        self.embedding = nn.Parameter(torch.randn(len(chars), size) / size**0.5)  # (V, E)
        self.w_ih = nn.Parameter(torch.randn(size, G * width) / size**0.5)
        self.w_hh = nn.Parameter(torch.cat([nn.init.orthogonal_(torch.empty(width, width)) for _ in range(G)], 1))
        self.b = nn.Parameter(torch.zeros(G * width))
        if cell == "lstm":
            self.b.data[width : 2 * width] = 1  # f starts open
        self.out = nn.Linear(width, len(chars))
        self.products = None  # the type in which W_hh is multiplied, if not its own; see fast_products()
        self.memory = None  # made in the first pass, so copy.deepcopy() before it copies the weights alone

    def start(self, n):
        """The state before the first letter, zeros, for n streams."""
        return self.w_hh.new_zeros(self.layers, n, len(self.w_hh))

    def forward(self, x, state):
        """x (T, N) ids, state -> logits (T, N, V) of the next letter, and the state to carry on, without gradient."""
        table = torch.addmm(self.b, self.embedding, self.w_ih)
        if self.memory is None or self.memory.like.device != table.device:
            self.memory = Memory(table.detach(), self.products)
        h, state = Unroll.apply(self.cell, self.memory, table, x, self.w_hh, state)
        if self.training and self.dropout:
            h = h * (torch.rand_like(h[0]) >= self.dropout) / (1 - self.dropout)  # one mask for all T
        return self.out(h), state.clone()  # (2)

# ------------------------------------------------------------------------------------------------------- plumbing -----
# Text, files, checkpoints, progress, flags: the same text in every file that has them, and nothing of the method.
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

def load_text(path="docstrings"):
    """A text file in UTF-8, or English that needs no download: the docstrings of Python's standard library, in the
    order of its files, each once. ValueError or OSError, in one sentence, for what is no such text."""
    if path != "docstrings":
        try:
            text = Path(path).read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise ValueError(f"--text {path}: not UTF-8, byte {e.start} is {e.object[e.start]:#04x}") from None
        except ValueError as e:  # a path with a NUL, say
            raise ValueError(f"--text {path!r}: {e}") from None
    else:
        found, root = {}, sysconfig.get_path("stdlib")
        for folder, folders, files in os.walk(root):
            folders[:] = sorted({*folders} - {"test", "tests", "idle_test", "site-packages", "dist-packages"})
            for file in sorted(name for name in files if name.endswith(".py")):
                with warnings.catch_warnings(), contextlib.suppress(SyntaxError, ValueError, OSError):
                    warnings.simplefilter("ignore")
                    nodes = [ast.parse(Path(folder, file).read_bytes())]
                    while nodes:
                        node = nodes.pop()
                        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                            found[ast.get_docstring(node) or ""] = None
                        for part in ("handlers", "finalbody", "orelse", "body"):
                            nodes += getattr(node, part, [])[::-1]
        text, path = "\n\n".join(filter(None, found)), f"{path} under {root}"
    if len(text) < 1000:
        raise ValueError(f"--text {path}: {len(text)} characters are too few, at least 1000 are needed")
    return text

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

def pick_device(name):
    """ValueError if this machine does not have it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.ones(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError) as e:  # not known, not built in, not there
        raise ValueError(f"--device {name}: {str(e).splitlines()[0]}") from None

def text_parser(doc, name, train):
    """The flags of text files that are read letter by letter; the defaults of training are those of train()."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser(description=doc.splitlines()[0], formatter_class=form, allow_abbrev=False)
    add, default = parser.add_argument, inspect.signature(train).parameters
    add("--text", default="docstrings", help="docstrings (of the standard library), or a file in UTF-8")
    for flag, least, what in (("iters", 1, "training steps"), ("batch", 1, "streams of text side by side"),
                              ("length", 1, "T, how far a gradient goes back"), ("width", 1, "units of h")):
        add("--" + flag, type=at_least(least), default=default[flag].default, help=what)
    add("--lr", type=float, default=default["lr"].default, help="highest learning rate")
    add("--dropout", type=float, default=default["dropout"].default, help="share of h that is dropped, below 1")
    add("--samples", type=at_least(1), default=1000, help="letters to draw at the end")
    add("--out", type=Path, default=Path("out", name), help="run folder")
    add("--device", default="auto", help="auto is cuda, else mps, else cpu")
    add("--seed", type=int, default=0, help="same seed, same machine: same bits on the CPU")
    add("--fresh", action="store_true", help="train anew over the run folder's checkpoint")
    return parser

# ------------------------------------------------------------------------------------ training, sampling, command -----
def to_ids(text, chars):
    """Text -> ids (len(text),), int64: places in chars, which is sorted. ValueError for a letter not in it."""
    codes, known = (np.frombuffer(s.encode("utf-32-le"), np.uint32) for s in (text, chars))
    place = np.searchsorted(known, codes).clip(max=len(known) - 1)
    if len(strange := codes[known[place] != codes]):
        raise ValueError(f"the letter {chr(strange[0])!r} is not in the text that this network has learned from")
    return torch.from_numpy(place)

def fast_products(device):
    """The type in which products are fastest: bfloat16, 8 bits of a number, where the processor multiplies it."""
    able = {"cuda": torch.cuda.is_bf16_supported,
            "cpu": getattr(torch.cpu, "_is_avx512_bf16_supported", bool)}  # younger than torch 2.4
    return torch.bfloat16 if able.get(torch.device(device).type, bool)() else torch.float32

def train(text, iters=4200, batch=64, length=32, lr=4e-3, cell="lstm", width=512, dropout=0.4, device="cpu", seed=0,
          path=None, fresh=False):
    """Learns the first nine tenths of a text -> the averaged CharRNN, ready to sample. Seeds torch's global generator.

    path: where to save; unless fresh, training goes on from what is there. ValueError if that was made otherwise or
    the text is too short, FloatingPointError if the loss is not finite (what was saved last stays)."""
    chars = "".join(sorted(set(text)))
    wanted = dict(text=hashlib.sha256(text.encode()).hexdigest()[:12], chars=chars, cell=cell, width=width, iters=iters,
                  batch=batch, length=length, lr=lr, dropout=dropout, seed=seed)
    if not 0 <= dropout < 1:
        raise ValueError(f"--dropout {dropout}: want 0 <= dropout < 1")
    ids = to_ids(text, chars)[: len(text) * 9 // 10].to(device)
    each = (len(ids) // batch - 1) // length * length  # letters of a stream in an epoch
    if each < 1:
        raise ValueError(f"--text: {len(ids)} letters to learn from are too few for --batch {batch} --length {length}")
    torch.manual_seed(seed)
    model = CharRNN(chars, cell, width, dropout=dropout).to(device)
    average, carry = copy.deepcopy(model).requires_grad_(False).eval(), nn.Module()
    carry.register_buffer("state", model.start(batch))
    model.products = fast_products(device)
    fused = torch.device(device).type != "mps"
    opt = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99), fused=fused)
    parts, done, log = (model, average, opt, carry), 0, []
    if path and path.exists() and not fresh:
        done, log = resume(path, parts, load_checkpoint(path, ["rnn"], device, wanted))
        opt.param_groups[0]["fused"] &= fused  # a checkpoint brings the flag of the device that it was made on
    progress, total, saved = Progress("iteration", "letters", iters, done), torch.zeros((), device=device), time.time()
    for i in range(done, iters):
        at = i * length % each
        if at == 0 or i == done:  # an epoch begins: the text is a ring, cut open elsewhere
            g = torch.Generator().manual_seed(seed + i * length // each)
            first = int(torch.randint(len(ids), (1,), generator=g))
            streams = ids.roll(-first)[: len(ids) // batch * batch].view(batch, -1).t()  # (letters, N)
        if at == 0:
            carry.state = model.start(batch)
        opt.param_groups[0]["lr"] = lr * min((i + 1) / 100, 1 - i / iters)
        logits, carry.state = model(streams[at : at + length], carry.state)  # (10)
        loss = F.cross_entropy(logits.flatten(0, 1), streams[at + 1 : at + length + 1].flatten())  # (2)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        memory = min(0.998, (1 + i) / (10 + i))  # short while the weights still move fast
        for a, p in zip(average.parameters(), model.parameters()):
            a.lerp_(p.detach(), 1 - memory)
        total += loss.detach()
        if (i + 1) % 100 == 0 or i + 1 == iters:
            log.append((i + 1, total.item() / (i % 100 + 1)))  # the only place where the device is waited for
            total.zero_()
            if not math.isfinite(log[-1][1]):
                raise FloatingPointError(f"the loss is {log[-1][1]} at iteration {i + 1}; try a smaller --lr")
            if path and (i + 1 == iters or time.time() - saved > 10):
                save_checkpoint(path, "rnn", wanted, parts, i + 1, log)
                saved = time.time()
        progress(i + 1, batch * length, f"loss {log[-1][1]:.3f} nats" if log else "")
    return average

def load(path, device="cpu"):
    """The averaged network of a checkpoint, ready to sample; model.chars are the letters that it knows."""
    state = load_checkpoint(Path(path), ["rnn"], device)
    had = state["settings"]
    with or_say(f"{path}: {DAMAGED}"):
        model = CharRNN(had["chars"], had["cell"], had["width"], dropout=had["dropout"])
        model.load_state_dict(state["parts"][1])
    return model.to(device).requires_grad_(False).eval()

@torch.no_grad()
def sample(model, n, prompt="", temperature=1.0, seed=0):
    """n letters, after those of the prompt, as a string; temperature 0 takes the likeliest each time.

    Without a prompt the text goes on from the first of model.chars. ValueError for a letter that is not in it."""
    device = model.w_hh.device
    x, state, drawn = to_ids(prompt or model.chars[0], model.chars).view(-1, 1).to(device), model.start(1), []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        logits, state = model(x, state)
        logits = logits[-1, 0].cpu().double()
        p = ((logits - logits.max()) / max(temperature, 1e-30)).softmax(0)  # (11), at 0 its limit
        drawn.append(int(torch.multinomial(p, 1, generator=generator)))
        x = x.new_full((1, 1), drawn[-1])
    return prompt + "".join(model.chars[i] for i in drawn)

@torch.no_grad()
def evaluate(model, ids, first, streams=100, lead=200, length=100):
    """Nats a letter over ids[first:], each of which counts once. The streams in which they are read start lead letters
    early, so that none is bet on without a past."""
    each, lead = -(-(len(ids) - first) // streams), min(lead, first - 1)
    starts, state, total = first + each * torch.arange(streams), model.start(streams), 0.0
    for begin in range(-lead, each, length):
        steps = torch.arange(begin, min(begin + length, each)).view(-1, 1)
        at = starts + steps  # (T, N): the letters to bet on
        logits, state = model(ids[(at - 1).clamp(max=len(ids) - 1)].to(state.device), state)
        nats = F.cross_entropy(logits.flatten(0, 1), ids[at.clamp(max=len(ids) - 1)].flatten().to(state.device),
                               reduction="none").view(at.shape).cpu()  # (2)
        total += nats[(steps >= 0) & (at < len(ids))].double().sum().item()
    return total / (len(ids) - first)

@torch.no_grad()
def lag_norms(model, ids, lags=100, streams=100):
    """Norm of dL/dh_t of the last of `lags` letters' bets, by lag, relative to lag 0, mean over streams -> (lags,)."""
    starts = torch.linspace(0, len(ids) - 2 * lags - 1, streams).long()
    x = ids[starts + torch.arange(2 * lags + 1).view(-1, 1)].to(model.w_hh.device)
    _, state = model(x[:lags], model.start(streams))
    table = torch.addmm(model.b, model.embedding, model.w_ih)
    fresh, (forward, backward) = Memory(table), CELLS[model.cell][:2]
    saved = forward(table, x[lags:-1], model.w_hh, state, fresh)
    d_logits = model.out(saved[0][-1]).softmax(1) - F.one_hot(x[-1], len(model.chars))
    d_h = torch.zeros_like(saved[0][1:])
    d_h[-1] = d_logits @ model.out.weight
    backward(d_h, model.w_hh, saved, fresh)
    norms = d_h.norm(dim=2).mean(1).flip(0)
    return (norms / norms[0]).nan_to_num().cpu()  # a text of one letter has no gradient

def plot_lags(lines):
    """{name: norms by lag} -> a Pillow image, the norms on a logarithmic scale."""
    image = Image.new("RGB", (760, 440), "white")
    draw, font, colours = ImageDraw.Draw(image), ImageFont.load_default(15), ("#c0392b", "#2471a3")
    n = max(map(len, lines.values()))
    across = lambda k: 70 + 670 * k / max(1, n - 1)
    down = lambda norm: 40 - 350 * math.log10(max(norm, 1e-8)) / 8  # 1 at the top, 1e-8 at the bottom
    for power in range(-8, 1, 2):
        draw.line((70, down(10**power), 740, down(10**power)), "#dddddd")
        draw.text((62, down(10**power)), f"1e{power}", "black", font, "rm")
    for k in range(0, n, max(1, n // 5)):
        draw.text((across(k), 398), str(k), "black", font, "mt")
    draw.text((405, 436), "lag, letters", "black", font, "mb")
    draw.text((70, 12), "norm of dL/dh at this lag, relative to lag 0:", "black", font)
    for i, (name, norms) in enumerate(lines.items()):
        draw.line([(across(k), down(norm)) for k, norm in enumerate(norms.tolist())], colours[i], 3)
        draw.text((400 + 170 * i, 12), name, colours[i], font)
    return image

def main(argv=None):
    parser = text_parser(__doc__, "rnn", train)
    add = parser.add_argument
    add("--cell", choices=[*CELLS], default="lstm", help="rnn is Elman's, with tanh")
    add("--temperature", type=float, default=1.0, help="of the sample; 0 always takes the likeliest letter")
    add("--prompt", default="", help="what the sample goes on from")
    args = parser.parse_args(argv)
    with parser.guard():
        if not 0 <= args.temperature < math.inf:
            raise ValueError(f"--temperature {args.temperature}: want a number that is at least 0")
        device, text = pick_device(args.device), load_text(args.text)
        chars = "".join(sorted(set(text)))
        to_ids(args.prompt, chars)  # refused now rather than after training
        ids, first = to_ids(text, chars), len(text) * 9 // 10
        print(f"{len(text)} letters from {args.text}, {len(chars)} different ones, on {device}")
        models = {}
        other, short = "rnn" if args.cell == "lstm" else "lstm", -(-args.iters // 10)  # for the picture alone
        for cell, iters, path in (args.cell, args.iters, "model.pt"), (other, short, "other/model.pt"):
            models[f"{cell}, {iters} iterations"] = train(
                text, iters, args.batch, args.length, args.lr, cell, args.width, args.dropout, device, args.seed,
                args.out / path, args.fresh)
        model = next(iter(models.values()))
        drawn = sample(model, args.samples, args.prompt, args.temperature, args.seed)
        lags, png = min(100, (len(ids) - first - 1) // 2), io.BytesIO()
        plot_lags({name: lag_norms(m, ids[first:], lags) for name, m in models.items()}).save(png, "PNG")
        write({args.out / "samples.txt": drawn.encode(), args.out / "lag.png": png.getvalue()})
        nats = evaluate(model, ids, first)
        print(drawn[:400])
        print(f"the last {len(ids) - first} letters: {nats:.4f} nats = {nats / math.log(2):.4f} bits a letter")
        print(f"{args.samples} letters: samples.txt in {args.out}, with lag.png, log.csv, model.pt")

if __name__ == "__main__":
    main()
