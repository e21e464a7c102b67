# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""Recurrent neural network (RNN, LSTM): predict a text character by character.

The network is trained by back-propagation through time, which is written out by hand.

Papers: Elman, "Finding Structure in Time", Cognitive Science 14, 1990; Werbos, "Backpropagation
Through Time: What It Does and How to Do It", Proc. IEEE 78, 1990; Hochreiter, Schmidhuber, "Long
Short-Term Memory", Neural Computation 9, 1997; Gers, Schmidhuber, Cummins, "Learning to Forget",
Neural Computation 12, 2000, whose forget gate f is part of every LSTM today.

symbol       in the code   meaning
x_t          x[t-1]        character t = 1 .. T of a chunk, an id 0 .. V-1; x is (T, N), N streams
e(x)         embedding     a vector for each character, (V, E)
h_t, c_t     h[t], c[t]    state and memory cell after x_t, (N, H); h_0, c_0: see (11)
W_ih, W_hh   w_ih, w_hh    weights, (E, G H) and (H, G H): G = 1 for the tanh RNN, 4 for the LSTM
a_t          a             pre-activations, (N, G H). Vectors are rows, so it is h W, not W h
i, f, g, o   i, f, g, o    the LSTM's input gate, forget gate, candidate and output gate, (N, H)
L            loss          negative log-likelihood, nats per character
∂h_t, ∂c_t   d_h, d_c      short for dL/dh_t and dL/dc_t, (N, H)
δ_t          delta[t-1]    dL/da_t, (N, G H), its parts d_i, d_f, d_g, d_o
σ, *         sigmoid, *    1 / (1 + exp(-a)); the product of elements

The model. The chain rule writes the probability of a text as a product, so a model of text predicts
each character from those before it. An RNN summarises these in a state of fixed size, updated at
each step by the same weights, and predicts from the state:

  (1)  a_t = e(x_t) W_ih + b + h_{t-1} W_hh

  (2)  h_t = tanh a_t                                        the tanh RNN [Elman 1990]

  (3)  p(x_{t+1} | x_1 .. x_t) = softmax(h_t W_out + b_out),  L = -1/(T N) Σ log p(x_{t+1} | ...)

Back-propagation through time. Unrolled, the network has T layers that share their weights. h_t
affects L only through the prediction at t and through a_{t+1}. So for t = T .. 1, with δ_{T+1} = 0,

  (4)  ∂h_t = (∂h_t of the prediction at t alone) + δ_{t+1} W_hhᵀ                  [Werbos 1990]

  (5)  δ_t = ∂h_t * (1 - h_t²)                               the tanh RNN

  (6)  dL/dW_hh = Σ_t h_{t-1}ᵀ δ_t

δ is also the gradient of e(x_t) W_ih + b, from which autograd continues. Over k steps δ is
multiplied by k factors W_hhᵀ diag(1 - h²), so its norm decays or grows exponentially in k.

The LSTM adds a path that does not pass through W_hh. Gates in (0, 1) control what is written to a
memory cell (i), kept in it (f) and read from it (o). With a_t split into four parts of size H,

  (7)  i = σ(a_i),  f = σ(a_f),  g = tanh a_g,  o = σ(a_o)

  (8)  c_t = f * c_{t-1} + i * g,   h_t = o * tanh c_t                 [Gers et al. 2000]

Backwards, h_t obeys (4) as before. c_t affects L through h_t, and through c_{t+1} by the factor
f_{t+1} alone, which can stay near 1:

  (9)  ∂c_t = ∂h_t * o * (1 - tanh² c_t) + ∂c_{t+1} * f_{t+1}

The chain rule through (8), then through (7) with σ' = σ (1 - σ) and tanh' = 1 - tanh², gives

  (10) δ_i = ∂c_t * g * i (1 - i),          δ_f = ∂c_t * c_{t-1} * f (1 - f),
       δ_g = ∂c_t * i * (1 - g²),           δ_o = ∂h_t * tanh c_t * o (1 - o)

A text is too long to unroll at once. Truncated back-propagation through time takes T characters at
a time and treats the state that enters a chunk as a constant: the past is carried on, gradients are
not.

  (11) h_0, c_0 of a chunk = h_T, c_T of the chunk before;  ∂h_T, ∂c_T from later chunks = 0

To sample, draw a character, feed it back, and repeat. A temperature τ below 1 sharpens the
distribution; its limit at 0 always takes the most probable character.

  (12) x_{t+1} ~ softmax((h_t W_out + b_out) / τ)

Pitfalls:
- Nats per character are not bits: bits = nats / log 2.
- The gradient has two ways back, W_hhᵀ in (4) and f in (9). Break it: delete the line
  `d_c = d_c * f` and test_rnn_eq4_9_10_lstm_gradients fails.
- ∂h_t in lag.png leaves out the path from c_t to c_{t+1}, which is the point of an LSTM. So the
  plot also shows ∂c_t, which includes all paths from c_t on.
- The state runs on through the text, also across sentences and documents, until an epoch ends.
- The alphabet is taken from the whole text, including the last tenth, which is the test set.
- torch.nn.LSTM has the same gates in the same order, but transposed weights and two biases.

Differences from the papers:
- Gradients are truncated between chunks only. Elman truncated after every step, and the LSTM of
  1997 at its gates.
- Adam instead of gradient descent, gradient norm clipped at 1, dropout on h_t with one mask for
  each chunk, a forget bias of 1 at first, and an EMA of the weights as the result.

python rnn.py                          trains on Python's docstrings; 5 minutes on two cores
python rnn.py --prompt "Return the "   continues the prompt with the trained network
"""

import argparse
import ast
import contextlib
import copy
import hashlib
import io
import math
import os
import sys
import sysconfig
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont


# ------------------------------------------------------------------------------------------------- method -------------
# inputs: the first two terms of (1) for all t, (T, N, G H). Lists of h and c begin with h_0 and c_0.
def rnn_forward(inputs, w_hh, state):
    """state (1, N, H) -> the state after T steps, and what the backward pass needs: (h,), h a list of T + 1."""
    h = [state[0]]
    for e_t in inputs:
        a = torch.addmm(e_t, h[-1], w_hh)  # (1)
        h.append(a.tanh())  # (2)
    return h[-1][None], (h,)


def rnn_backward(d_out, w_hh, h):
    """d_out (T, N, H): ∂h_t of each prediction alone -> δ (T, N, H), and a list of (∂h_t,) for t = 1 .. T."""
    delta = []  # from the last step to the first, so delta[-1] is that of step t + 1
    d_states = []
    for t in range(len(d_out), 0, -1):
        d_h = d_out[t - 1]
        if delta:
            d_h = torch.addmm(d_h, delta[-1], w_hh.T)  # (4)
        delta.append(d_h * (1 - h[t] ** 2))  # (5)
        d_states.append((d_h,))
    return torch.stack(delta[::-1]), d_states[::-1]


def lstm_forward(inputs, w_hh, state):
    """state (2, N, H): h_0 and c_0 -> the state after T steps, and lists: T + 1 h, T + 1 c, T (i, f, g, o, tanh c)."""
    h = [state[0]]
    c = [state[1]]
    gates = []
    for e_t in inputs:
        a_i, a_f, a_g, a_o = torch.addmm(e_t, h[-1], w_hh).chunk(4, dim=1)  # (1)
        i = a_i.sigmoid()  # (7)
        f = a_f.sigmoid()  # (7)
        g = a_g.tanh()  # (7)
        o = a_o.sigmoid()  # (7)
        c.append(f * c[-1] + i * g)  # (8)
        tanh_c = c[-1].tanh()
        h.append(o * tanh_c)  # (8)
        gates.append((i, f, g, o, tanh_c))
    return torch.stack([h[-1], c[-1]]), (h, c, gates)


def lstm_backward(d_out, w_hh, h, c, gates):
    """d_out (T, N, H): ∂h_t of each prediction alone -> δ (T, N, 4 H), and a list of (∂h_t, ∂c_t) for t = 1 .. T."""
    delta = []  # from the last step to the first, so delta[-1] is that of step t + 1
    d_states = []
    d_c = torch.zeros_like(h[0])
    for t in range(len(d_out), 0, -1):
        i, f, g, o, tanh_c = gates[t - 1]
        d_h = d_out[t - 1]
        if delta:
            d_h = torch.addmm(d_h, delta[-1], w_hh.T)  # (4)
        d_c = d_c + d_h * o * (1 - tanh_c**2)  # (9)

        d_i = d_c * g * i * (1 - i)  # (10)
        d_f = d_c * c[t - 1] * f * (1 - f)  # (10)
        d_g = d_c * i * (1 - g**2)  # (10)
        d_o = d_h * tanh_c * o * (1 - o)  # (10)
        delta.append(torch.cat([d_i, d_f, d_g, d_o], dim=1))
        d_states.append((d_h, d_c))
        d_c = d_c * f  # (9)
    return torch.stack(delta[::-1]), d_states[::-1]


CELLS = {"rnn": (rnn_forward, rnn_backward), "lstm": (lstm_forward, lstm_backward)}


class Unroll(torch.autograd.Function):
    """A cell run over a chunk, with the gradients above: inputs (T, N, G H), w_hh (H, G H), state -> h_1 .. h_T
    (T, N, H), and the state after them. Neither state has a gradient (11)."""

    @staticmethod
    def forward(ctx, cell, inputs, w_hh, state):
        ctx.cell = cell
        forward, _ = CELLS[cell]
        last, ctx.lists = forward(inputs, w_hh, state)
        ctx.save_for_backward(w_hh)
        ctx.mark_non_differentiable(last)
        h = ctx.lists[0]
        return torch.stack(h[1:]), last

    @staticmethod
    def backward(ctx, d_out, _):
        (w_hh,) = ctx.saved_tensors
        _, backward = CELLS[ctx.cell]
        lists = ctx.lists
        del ctx.lists  # frees them after this pass; a second one through the same graph is not possible
        delta, _ = backward(d_out, w_hh, *lists)
        h = lists[0]
        # The sum over t and over streams is one product: (H, T N) @ (T N, G H).
        d_w_hh = torch.cat(h[:-1]).T @ delta.flatten(0, 1)  # (6)
        return None, delta, d_w_hh, None


# ------------------------------------------------------------------------------------------------ network -------------
class CharRNN(nn.Module):
    """Predicts the next character. chars: its alphabet, a string of V sorted characters; ids index it.

    ValueError if the cell is neither rnn nor lstm."""

    def __init__(self, chars, cell="lstm", width=512, size=64, dropout=0.0):
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"--cell {cell}: must be rnn or lstm")
        G = 4 if cell == "lstm" else 1
        self.chars = chars
        self.cell = cell
        self.dropout = dropout
        self.register_buffer("codes", torch.tensor([ord(char) for char in chars]))  # saved with the weights
        self.embedding = nn.Parameter(torch.randn(len(chars), size) / size**0.5)
        self.w_ih = nn.Parameter(torch.randn(size, G * width) / size**0.5)
        self.w_hh = nn.Parameter(torch.cat([nn.init.orthogonal_(torch.empty(width, width)) for _ in range(G)], dim=1))
        self.b = nn.Parameter(torch.zeros(G * width))
        if cell == "lstm":
            nn.init.ones_(self.b.data[width : 2 * width])  # of f: the cell keeps its contents at first
        self.out = nn.Linear(width, len(chars))

    def start(self, n):
        """The state before the first character of n streams, all zero: (1, n, H) or, with c, (2, n, H)."""
        return self.w_hh.new_zeros(2 if self.cell == "lstm" else 1, n, len(self.w_hh))

    def inputs(self, x):
        """What x (T, N) contributes to the pre-activations (1), (T, N, G H), from a table of all V characters."""
        return F.embedding(x, torch.addmm(self.b, self.embedding, self.w_ih))

    def forward(self, x, state):
        """x (T, N) ids, and a state -> logits (T, N, V) of the next characters, and the state after x."""
        h, state = Unroll.apply(self.cell, self.inputs(x), self.w_hh, state)
        if self.training and self.dropout:
            keep = torch.rand_like(h[0]) >= self.dropout  # the same units for all T
            h = h * keep / (1 - self.dropout)
        return self.out(h), state


# ------------------------------------------------------------------------------------- training, sampling -------------
def to_ids(text, chars):
    """The index in chars, which is sorted, of each character of a text, int64. ValueError if chars lacks one."""
    codes, known = (np.frombuffer(string.encode("utf-32-le"), np.uint32) for string in (text, chars))
    ids = np.searchsorted(known, codes).clip(max=len(known) - 1)
    unknown = codes[known[ids] != codes]
    if len(unknown):
        raise ValueError(f"the character {chr(unknown[0])!r} is not in the text that the network is trained on")
    return torch.from_numpy(ids)


def train(
    text,
    iters=4200,
    batch=64,
    length=32,
    lr=4e-3,
    cell="lstm",
    width=512,
    dropout=0.4,
    device="cpu",
    seed=0,
    path=None,
    fresh=False,
    data=None,
):
    """Trains on the first nine tenths of a text and returns the EMA model. Seeds torch's global generator.

    About ten times the log has the EMA model's nats on the last tenth.
    path: the checkpoint, resumed unless fresh; data: the name of the text, stored in it. ValueError if it was
    made with other settings or the text is too short, FloatingPointError if the loss is not finite."""
    if not 0 <= dropout < 1:
        raise ValueError(f"--dropout {dropout}: must be at least 0 and below 1")
    settings = dict(method="rnn", data=data, text=hashlib.sha256(text.encode()).hexdigest(), cell=cell, width=width)
    settings |= dict(iters=iters, batch=batch, length=length, lr=lr, dropout=dropout, seed=seed)
    chars = "".join(sorted(set(text)))
    all_ids = to_ids(text, chars)
    first = len(text) * 9 // 10  # of the last tenth, which is for validation
    ids = all_ids[:first].to(device)
    stream = len(ids) // batch  # characters of each stream
    chunks = (stream - 1) // length  # chunks of each stream, which make an epoch
    if chunks < 1:
        raise ValueError(f"--text: {len(ids)} characters to train on are too few for --batch {batch} --length {length}")
    torch.manual_seed(seed)
    model = CharRNN(chars, cell, width, dropout=dropout).to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    opt = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99))
    carry = nn.Module()  # the state between two chunks, a part of the checkpoint
    carry.register_buffer("state", model.start(batch))
    places = torch.arange(length + 1, device=device)[:, None] + stream * torch.arange(batch, device=device)
    losses = []

    def validate(log):
        last_row = math.ceil(iters / 100) - 1
        if len(log) % max(1, iters // 1000) and len(log) != last_row:
            return log[-1][-1]  # the value before stands until the next
        return evaluate(ema, all_ids, first)

    parts = dict(model=model, ema=ema, opt=opt, carry=carry)
    for i in iterations(iters, losses, parts, settings, path, fresh, "loss,valid", validate, batch * length):
        epoch, chunk = divmod(i, chunks)
        generator = torch.Generator().manual_seed(seed + epoch)
        shift = torch.randint(len(ids), (1,), generator=generator).item()  # each epoch rotates the text
        x = ids[(shift + chunk * length + places) % len(ids)]  # (T + 1, N)
        if chunk == 0:
            carry.state = model.start(batch)
        logits, carry.state = model(x[:-1], carry.state)  # (11)
        loss = F.cross_entropy(logits.flatten(0, 1), x[1:].flatten())  # (3)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.param_groups[0]["lr"] = lr * min((i + 1) / 100, 1 - i / iters)  # warm-up, then linear decay
        opt.step()
        update_ema(ema, model, decay=min(0.998, (1 + i) / (10 + i)))
        losses.append(loss.detach())
    return ema


def load(path, device="cpu"):
    """The EMA model in a checkpoint. model.chars is its alphabet."""
    state = load_checkpoint(path, "rnn")
    settings = state["settings"]
    if "ema" not in state["parts"] or "codes" not in state["parts"]["ema"]:
        raise ValueError(f"{path}: not a checkpoint of this network; --fresh trains from scratch")
    chars = "".join(map(chr, state["parts"]["ema"]["codes"].tolist()))
    model = CharRNN(chars, settings["cell"], settings["width"])
    load_checkpoint(path, ema=model)
    return model.to(device).requires_grad_(False).eval()


def check_sampling(chars, prompt, temperature):
    """ValueError unless a network with this alphabet can continue the prompt at this temperature."""
    to_ids(prompt, chars)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"--temperature {temperature}: must be a number of at least 0")


@torch.inference_mode()
def sample(model, n, prompt="", temperature=1.0, seed=0):
    """The prompt, and n characters that continue it, a string. Temperature 0 is greedy.

    Without a prompt the text continues the first of model.chars. ValueError if the alphabet lacks a character."""
    check_sampling(model.chars, prompt, temperature)
    device = model.w_hh.device
    generator = torch.Generator().manual_seed(seed)
    x = to_ids(prompt or model.chars[0], model.chars)[:, None].to(device)  # (T, 1)
    state = model.start(1)
    text = prompt
    for _ in range(n):
        logits, state = model(x, state)
        logits = logits[-1, 0].cpu().double()
        p = ((logits - logits.max()) / max(temperature, 1e-30)).softmax(0)  # (12)
        x = torch.multinomial(p, 1, generator=generator)[:, None].to(device)
        text += model.chars[x.item()]
    return text


@torch.inference_mode()
def evaluate(model, ids, first, streams=100, lead=200, length=100):
    """The mean nats per character of ids[first:], each counted once.

    They are read in parallel streams. Each starts `lead` characters early, so that no prediction lacks context."""
    device = model.w_hh.device
    each = math.ceil((len(ids) - first) / streams)
    lead = min(lead, first - 1)
    starts = first + each * torch.arange(streams)
    state = model.start(streams)
    total = 0.0
    for begin in range(-lead, each, length):
        steps = torch.arange(begin, min(begin + length, each))[:, None]
        places = starts + steps  # (T, N), of the characters to predict
        counted = (steps >= 0) & (places < len(ids))
        places = places.clamp(max=len(ids) - 1)
        logits, state = model(ids[places - 1].to(device), state)
        nats = F.cross_entropy(logits.flatten(0, 1), ids[places].flatten().to(device), reduction="none")  # (3)
        total += nats.view(places.shape).cpu()[counted].double().sum().item()
    return total / (len(ids) - first)


@torch.inference_mode()
def lag_norms(model, ids, lags=100, streams=100):
    """The norms of ∂h_t and, for an LSTM, ∂c_t, where L is the loss of one prediction: (1 or 2, lags).

    Column k belongs to the t that lies k steps before the prediction. Means over streams, relative to column 0."""
    starts = torch.linspace(0, len(ids) - 2 * lags - 1, streams).long()
    x = ids[starts + torch.arange(2 * lags + 1)[:, None]].to(model.w_hh.device)
    _, state = model(x[:lags], model.start(streams))  # a past for the states
    forward, backward = CELLS[model.cell]
    _, lists = forward(model.inputs(x[lags:-1]), model.w_hh, state)
    h = lists[0]
    d_logits = model.out(h[-1]).softmax(1) - F.one_hot(x[-1], len(model.chars))  # of the last prediction's loss
    d_out = torch.zeros_like(torch.stack(h[1:]))
    d_out[-1] = d_logits @ model.out.weight
    _, d_states = backward(d_out, model.w_hh, *lists)
    norms = torch.stack([torch.stack(d_state).norm(dim=2).mean(1) for d_state in reversed(d_states)], dim=1)
    return (norms / norms[:, :1]).nan_to_num().cpu()  # a text of one character has no gradient


def plot_lags(path, lines):
    """Saves a plot of {name: norms by lag} as PNG, the norms on a logarithmic scale from 1e-8 to 1."""
    image = Image.new("RGB", (760, 440), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(15)
    lags = max(len(norms) for norms in lines.values())
    draw.text((70, 8), "norm of the gradient at this lag, relative to lag 0:", "black", font)
    for power in range(0, 9, 2):
        y = 50 + 340 * power / 8
        draw.line((70, y, 740, y), "#dddddd")
        draw.text((62, y), f"{10.0**-power:g}", "black", font, "rm")
    for lag in range(0, lags, max(1, lags // 5)):
        draw.text((70 + 670 * lag / lags, 398), str(lag), "black", font, "mt")
    draw.text((405, 436), "lag in characters", "black", font, "mb")
    for k, (name, norms) in enumerate(lines.items()):
        colour = ("#c0392b", "#2471a3", "#239b56", "#7d3c98")[k]
        x = 70 + 670 * torch.arange(len(norms)) / lags
        y = 50 - 340 * norms.clamp(min=1e-8).log10() / 8
        draw.line(torch.stack([x, y], dim=1).flatten().tolist(), colour, 3)
        draw.text((70 + 170 * k, 28), name, colour, font)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


# ------------------------------------------------------------------------------------------------ command -------------
def finished(path, args, method):
    """Whether the checkpoint at path is of a finished training with these flags. Questions to it need no text."""
    if args.fresh or not path.exists():
        return False
    state = load_checkpoint(path, method)
    settings = state["settings"]
    same = all(settings.get(name) in (None, value) for name, value in vars(args).items())
    return same and state["done"] == settings["iters"]


def report(model, text, other, out):
    """Prints the nats on the last tenth of the text, and draws lag.png. other: a model to show as well, or None."""
    first = len(text) * 9 // 10
    lags = min(100, (len(text) - first - 1) // 2)
    lines = {}
    for m, note in ((model, ""), (other, " (compared)")):
        if m is not None:
            norms = lag_norms(m, to_ids(text, m.chars)[first:], lags)
            lines |= {f"{m.cell} dL/d{part}{note}": line for part, line in zip("hc", norms)}
    plot_lags(out / "lag.png", lines)
    nats = evaluate(model, to_ids(text, model.chars), first)
    bits = nats / math.log(2)
    print(f"the last {len(text) - first} characters: {nats:.4f} nats = {bits:.4f} bits a character")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--text", dest="data", metavar="TEXT", default="docstrings", help="docstrings (of Python), or a UTF-8 file")
    add("--cell", choices=[*CELLS], default="lstm", help="lstm, or rnn: Elman's, with tanh")
    add("--iters", type=positive, default=4200, help="training iterations")
    add("--batch", type=positive, default=64, help="N, streams of text that are read in parallel")
    add("--length", type=positive, default=32, help="T, how many characters a gradient goes back")
    add("--lr", type=float, default=4e-3, help="peak learning rate")
    add("--width", type=positive, default=512, help="H, units of the state")
    add("--dropout", type=float, default=0.4, help="share of the units of h that are dropped, below 1")
    add("--samples", type=positive, default=1000, help="number of characters to sample")
    add("--prompt", default="", help="text to continue; a finished run needs no --text for this")
    add("--temperature", type=float, default=1.0, help="below 1 sharpens; 0 takes the most probable character")
    add("--compare", type=Path, help="a second checkpoint to show in lag.png, such as one of --cell rnn")
    add("--out", type=Path, default=Path("out/rnn"), help="run folder")
    add("--device", type=pick_device, default=pick_device(), help="where to compute")
    add("--seed", type=int, default=0, help="seed; on a CPU the same seed gives the same bits")
    add("--fresh", action="store_true", help="train from scratch over the checkpoint in --out")
    args = parse_args(parser, argv)
    path = args.out / "model.pt"
    other = load(args.compare, args.device) if args.compare else None

    only_sample = args.prompt and not args.compare and finished(path, args, "rnn")
    if only_sample:
        model = load(path, args.device)
    else:
        text = load_text(args.data)
        chars = "".join(sorted(set(text)))
        check_sampling(chars, args.prompt, args.temperature)  # refuses a wrong flag before training
        print(f"{len(text)} characters from {args.data}, {len(chars)} different ones, on {args.device}")
        sizes = args.iters, args.batch, args.length, args.lr, args.cell, args.width, args.dropout
        model = train(text, *sizes, args.device, args.seed, path, args.fresh, args.data)

    drawn = sample(model, args.samples, args.prompt, args.temperature, args.seed)
    (args.out / "samples.txt").write_bytes(drawn.encode())
    print(drawn)
    if not only_sample:
        report(model, text, other, args.out)
    print(f"{args.samples} sampled characters: {args.out}/samples.txt{', lag.png' * (not only_sample)}")


# ------------------------------------------------------------------------------------------------ plumbing ------------
# Text, checkpoints, progress: the same text in every file that uses it, and nothing of the method. You may stop here.
def load_text(path="docstrings"):
    """The text of a UTF-8 file, or English that needs no download: the docstrings of Python's standard library.

    ValueError or OSError, with the name of the file, if it is not UTF-8, or shorter than 1000 characters."""
    if path != "docstrings":
        try:
            text = Path(path).read_bytes().decode("utf-8-sig")
        except ValueError as e:  # not UTF-8, or a path that no file can have
            raise ValueError(f"--text {path}: {e}") from e
    else:
        docs = {}  # a dictionary keeps the order, and each text once
        library = Path(sysconfig.get_path("stdlib"))
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        others = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
        for file in sorted(library.rglob("*.py")):
            if others.isdisjoint(file.relative_to(library).parts):
                with warnings.catch_warnings(), contextlib.suppress(SyntaxError, ValueError, OSError):
                    warnings.simplefilter("ignore")
                    found = ast.walk(ast.parse(file.read_bytes()))
                    docs |= {ast.get_docstring(node): None for node in found if isinstance(node, nodes)}
        text = "\n\n".join(filter(None, docs))
    if len(text) < 1000:
        raise ValueError(f"--text {path}: {len(text)} characters, at least 1000 are needed")
    return text


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
