# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""word2vec: a vector for each word, learned by telling its neighbours from random words.

Skip-gram and CBOW with negative sampling. Words with similar contexts get similar vectors, and
differences between vectors have a meaning: king - man + woman is near queen.

Papers: Mikolov, Chen, Corrado, Dean, "Efficient Estimation of Word Representations in Vector
Space", 2013, arXiv:1301.3781; Mikolov, Sutskever, Chen, Corrado, Dean, "Distributed Representations
of Words and Phrases and their Compositionality", 2013, arXiv:1310.4546. Numbers in brackets at the
right are equations of the second paper.

symbol    in the code      meaning
c, o, n   c, o, negatives  word ids in order of frequency: a centre word, a neighbour, a negative
V, d      -, dim           number of words in the vocabulary, and of components of a vector
v, u      v, u             vectors of words as centre and as neighbour, (V, d) each; v is the result
R, b      reach, b         largest window, in words on each side; the one sampled for a centre
f, t      f, t             relative frequency of a word; threshold of subsampling (--sample)
P         table            distribution of negatives: each word fills a share P of the table
k, S      k, NEGATIVES     number of negatives for each pair, and of those that a block shares
B, L      B, BLOCK         number of blocks, and of words in a block
-         window           1 for the words around c that are in its window, else 0, (B, L, 2 R + 1)

Skip-gram. Words with similar contexts have similar meanings. So let a word predict its neighbours:

       p(o | c) = exp(u_o · v_c) / Σ_w exp(u_w · v_c)                                           [2]

Its gradient, ∂ log p / ∂v_c = u_o - Σ_w p(w | c) u_w, takes a sum over all V words for each pair.
A simpler question suffices: is o a neighbour of c, or was it sampled from P? With the probability
σ(x) = 1 / (1 + e^-x) of "neighbour", maximise the sum over all pairs of

  (1)  l(c, o) = log σ(u_o · v_c) + k 𝔼_{n ~ P} log σ(-u_n · v_c)                               [4]

  (2)  P(n) ∝ count(n)^(3/4)

Because d log σ(x) / dx = σ(-x), the gradient is small once a pair is classified correctly:

  (3)  ∂l/∂v_c = σ(-u_o · v_c) u_o - k 𝔼 σ(u_n · v_c) u_n
       ∂l/∂u_o = σ(-u_o · v_c) v_c,  ∂l/∂u_n = -σ(u_n · v_c) v_c for each of k negatives

If p(o | c) is now the share of o among the neighbours of c in the text, the mean of (1) for c has
the derivative p(o | c) σ(-s) - k P(o) σ(s) with respect to the score s = u_o · v_c. It is zero at
s = log(p(o | c) / P(o)) - log k: pointwise mutual information, but for the 3/4, shifted by log k.

The pairs are sampled too: nearer words more often, and very frequent words, such as "the", less:

  (4)  o is a neighbour of c if it is at most b words away, b uniform on 1 .. R, sampled for each c

  (5)  each occurrence of a word of relative frequency f is kept with probability
       min(1, √(t / f) + t / f), before windows are formed                                     [5]

CBOW predicts a centre from the mean of its neighbours. Now v belongs to neighbours, u to centres:

  (6)  h = mean of v_o over the window,  l(c) = log σ(u_c · h) + k 𝔼_{n ~ P} log σ(-u_n · h)

The same, fast. Pair by pair, these are many small dot products. But the windows of L consecutive
words lie within L + 2 R words. If such a block shares S negatives, its scores are one product, and
its gradients two. With X = v of the L words, and Y = u of the L + 2 R words and of the negatives:

  (7)  scores X Yᵀ;  ∂l/∂X = G Y,  ∂l/∂Y = Gᵀ X,  where G = σ(-score) for pairs in a window,
       -(k / S) m_c σ(score) for negatives of a centre c that has m_c pairs, and 0 elsewhere

The window of centre i is in columns i .. i + 2 R of row i: a diagonal band. Each negative counts
k / S for every pair: the expected gradients are those of (3). In CBOW, X = v of the L + 2 R words,
Y = u of the L words and negatives. M averages: M_cj = 1 / (size of c's window) if j is in it, or 0:

  (8)  H = M X;  G as in (7) from H Yᵀ, with one pair (c, c) for each c whose window is not empty;
       ∂l/∂X = Mᵀ G Y,  ∂l/∂Y = Gᵀ H

  (9)  v ← v + rate ∂l/∂v, u ← u + rate ∂l/∂u for all blocks of a step; the rate falls linearly

Meaning is then in directions, and in differences of them. With all vectors normalised,

  (10) most similar to words p, not to words q: the x, none of these, with the largest
       cos(v_x, Σ v_p - Σ v_q), for example the x in a : b = c : x, with p = b, c and q = a

  (11) Spearman's ρ = the correlation over rated pairs x, y of rank(cos(v_x, v_y)) and rank(rating),
       where rank(z) = (number of values < z) + (1 + number of values = z) / 2

Pitfalls:
- v and u are two tables. Break it: in pair_step, write v[o] for u[o] in the line of d_c, and
  test_word2vec_eq3_pair fails.
- Counts are taken before subsampling, windows after it. A negative may equal o, as in (1).
- Gradients of a step add up: with a larger --batch, or a small vocabulary, lower --lr. A step has
  at most 6 words per word of the vocabulary, and so few that none is expected more than 16 times.
- A word is a run of letters in lower case, or a Chinese character. No window crosses a blank line.

Differences from the papers: shared negatives (7); t / f in (5), as in the authors' program; no
phrases, no hierarchical softmax. (8) divides the CBOW gradient by the window size; theirs does not.

python word2vec.py --text english.txt --out out/english      five epochs in half a minute
python word2vec.py --out out/english --nearest king queen    prints the nearest words to each
"""

import argparse
import ast
import contextlib
import functools
import hashlib
import io
import math
import os
import re
import sys
import sysconfig
import time
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

BLOCK = 32  # L
NEGATIVES = 40  # S
AT_ONCE = 16  # batches of text that are read, and whose windows and negatives are sampled, at once


# -------------------------------------------------------------------------------------------------- method ------------
def pair_step(v, u, c, o, negatives, rate):
    """Moves v and u, in place, by the gradients of one pair (c, o). negatives: (k,) word ids sampled from P.

    The plainest form, for reading: training does the same for blocks of words, in sgd_step()."""
    g = torch.sigmoid(-u[o] @ v[c])
    g_n = torch.sigmoid(u[negatives] @ v[c])
    d_c = g * u[o] - g_n @ u[negatives]  # (3)
    u[o] += rate * g * v[c]  # (3)
    u.index_add_(0, negatives, -rate * g_n[:, None] * v[c])  # (3)
    v[c] += rate * d_c


def keep_probability(counts, t):
    """The probability of keeping an occurrence of each word, counts (V,) -> (V,). t = 0 keeps all."""
    f = counts / counts.sum()
    return ((t / f).sqrt() + t / f).clamp(max=1) if t else torch.ones_like(f)  # (5)


def negative_table(counts, size=1 << 22):
    """Word ids in proportion to P, int32 (size,), so that a uniformly chosen entry is a sample of P."""
    ends = counts.double().pow(0.75).cumsum(0)  # (2)
    middles = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    return torch.searchsorted(ends, middles * ends[-1]).int()


def sample_blocks(ids, keep, table, reach):
    """Subsamples the word ids of a text, (n,), -1 for a blank line, and divides the kept words into B blocks.

    Returns centres (B, L), the ids in each block; around (B, L + 2 R), the same with the R words before and after it;
    negatives (B, S); and window (B, L, 2 R + 1) of zeros and ones. keep: (V,), of keep_probability(); reach: R."""
    device = ids.device
    kept = (torch.rand(len(ids), device=device) < keep[ids]) & (ids >= 0)  # (5)
    words = ids[kept]
    paragraphs = (ids < 0).cumsum(0, dtype=torch.int32)[kept]  # the number of blank lines before each word
    B = max(1, math.ceil(len(words) / BLOCK))
    padding = (reach, B * BLOCK - len(words) + reach)
    words = F.pad(words, padding)
    paragraphs = F.pad(paragraphs, padding, value=-1)  # -1: no word of the text
    theirs = paragraphs.unfold(0, 2 * reach + 1, 1)  # (B L, 2 R + 1): row c has the paragraphs of c - R .. c + R
    own = theirs[:, reach : reach + 1]

    b = torch.randint(1, reach + 1, (B * BLOCK, 1), dtype=torch.int32, device=device)  # (4)
    distance = torch.arange(-reach, reach + 1, dtype=torch.int32, device=device).abs()
    window = (distance > 0) & (distance <= b) & (theirs == own) & (own >= 0)  # (4)
    negatives = table[torch.randint(len(table), (B, NEGATIVES), device=device)]
    centres = words[reach : reach + B * BLOCK].view(B, BLOCK)
    around = words.unfold(0, BLOCK + 2 * reach, BLOCK)
    return centres, around, negatives, window.float().view(B, BLOCK, 2 * reach + 1)


# ------------------------------------------------------------------------------------------ the same, fast ------------
def band(x, width):
    """The band of x (B, L, columns), contiguous: from row i the columns i .. i + width - 1. A view, (B, L, width).

    A row of x is `columns` numbers in memory, so one row down and one column to the right is columns + 1 further."""
    rows, columns = x.shape[1:]
    return x.as_strided((len(x), rows, width), (rows * columns, columns + 1, 1))


def skip_gram(x, y, window, k, measure=False):
    """∂l/∂x, ∂l/∂y, and the sum of l if measure, else None.

    x: v of the centres, (B, L, d); y: u of the words around and of the negatives, (B, L + 2 R + S, d)."""
    L, width = window.shape[1:]
    split = L + width - 1  # L + 2 R: here the negatives begin
    scores = x @ y.mT  # (7)
    s = band(scores, width)  # (B, L, 2 R + 1), of each centre and the words around it
    s_n = scores[:, :, split:]  # (B, L, S), of each centre and the negatives
    weight = k / s_n.shape[2] * window.sum(2, keepdim=True)  # (B, L, 1): the sum of a row of window is m_c
    G = torch.zeros_like(scores)
    band(G, width).copy_(torch.sigmoid(-s).mul_(window))  # (7)
    G[:, :, split:] = torch.sigmoid(s_n).mul_(-weight)  # (7)
    total = (window * F.logsigmoid(s)).sum() + (weight * F.logsigmoid(-s_n)).sum() if measure else None  # (1)
    return G @ y, G.mT @ x, total  # (7)


def cbow(x, y, window, k, measure=False):
    """∂l/∂x, ∂l/∂y, and the sum of l if measure, else None.

    x: v of the words around, (B, L + 2 R, d); y: u of the centres and of the negatives, (B, L + S, d).
    A centre has one pair, with itself, so the left part of G in (8) is diagonal: g has its diagonal, G_n the rest."""
    L, width = window.shape[1:]
    size = window.sum(2, keepdim=True)  # (B, L, 1), words in each window
    pairs = size.clamp(max=1)  # m_c: 1, or 0 if the window is empty
    M = x.new_zeros(len(x), L, x.shape[1])
    band(M, width).copy_(window / size.clamp(min=1))
    h = M @ x  # (6) (8)
    centres, negatives = y[:, :L], y[:, L:]
    s = (h * centres).sum(2, keepdim=True)  # (B, L, 1), of each centre and its window
    s_n = h @ negatives.mT  # (B, L, S)
    weight = k / s_n.shape[2] * pairs
    g = torch.sigmoid(-s) * pairs  # (8)
    G_n = torch.sigmoid(s_n) * -weight  # (8)
    d_h = g * centres + G_n @ negatives
    total = (pairs * F.logsigmoid(s)).sum() + (weight * F.logsigmoid(-s_n)).sum() if measure else None  # (6)
    return M.mT @ d_h, torch.cat([g * h, G_n.mT @ h], dim=1), total  # (8)


def sgd_step(v, u, blocks, k, rate, model, measure=False):
    """Moves v and u, in place, by the gradients of some blocks. Returns the sum of their l if measure, else None.

    blocks: of sample_blocks(); model: "skipgram" or "cbow". The changes of a word that occurs repeatedly add up."""
    centres, around, negatives, window = blocks
    if model == "skipgram":
        rows_v, rows_u, gradients = centres, around, skip_gram
    else:
        rows_v, rows_u, gradients = around, centres, cbow
    rows_u = torch.cat([rows_u, negatives], dim=1)
    d_x, d_y, total = gradients(F.embedding(rows_v, v), F.embedding(rows_u, u), window, k, measure)
    for vectors, rows, d in ((v, rows_v, d_x), (u, rows_u, d_y)):
        index = rows.reshape(-1, 1).long().expand(-1, vectors.shape[1])
        vectors.scatter_add_(0, index, d.flatten(0, 1).mul_(rate))  # (9)
    return total


# ------------------------------------------------------------------------------------------------ training ------------
class Vectors(nn.Module):
    """words: V different words; table: their vectors, (V, d), small and random."""

    def __init__(self, words, d):
        super().__init__()
        self.words = words
        self.number = {word: i for i, word in enumerate(words)}
        self.register_buffer("table", (torch.rand(len(words), d) - 0.5) / d)

    def __contains__(self, word):
        return word in self.number or word.lower() in self.number

    def __getitem__(self, word):
        """The vector of a word, (d,). ValueError for a word that has none."""
        return self.table[self.rows([word])[0]]

    def rows(self, words):
        """The rows of words in the table, as written or else in lower case, (n,). ValueError for an unknown word."""
        words = [words] if isinstance(words, str) else words
        for word in words:
            if word not in self:
                raise ValueError(f"the word {word!r} is not among the {len(self.words)} words of the vocabulary")
        rows = [self.number.get(word, self.number.get(word.lower())) for word in words]
        return torch.tensor(rows, dtype=torch.long, device=self.table.device)


@torch.no_grad()
def train(
    text="docstrings",
    epochs=5,
    batch=512,
    lr=0.025,
    dim=100,
    window=5,
    negative=5,
    sample=1e-3,
    min_count=5,
    model="skipgram",
    device="cpu",
    seed=0,
    path=None,
    fresh=False,
    asked=(),
):
    """Trains on a text file, or on "docstrings", and returns Vectors. Seeds torch's global generator.

    dim, window, negative, sample: d, R, k and t. An iteration is a part of the text, many steps.
    path: the checkpoint, resumed unless fresh; asked: words that must have a vector, checked before training.
    ValueError if the text has too few words or the checkpoint other settings, FloatingPointError if l is not finite."""
    if model not in ("skipgram", "cbow"):
        raise ValueError(f"model must be skipgram or cbow, not {model}")
    if not lr > 0:
        raise ValueError(f"--lr {lr}: must be positive")
    words, counts, ids = load_ids(text, min_count)
    settings = dict(method="word2vec", data=str(text), text=hashlib.sha256(ids.tobytes()).hexdigest(), words=words)
    settings |= dict(epochs=epochs, batch=batch, lr=lr, dim=dim, window=window, negative=negative, sample=sample)
    size = batch * AT_ONCE
    parts = math.ceil(len(ids) / size)  # of an epoch
    iters = epochs * parts
    settings |= dict(min_count=min_count, model=model, seed=seed, iters=iters)
    torch.manual_seed(seed)
    vectors = Vectors(words, dim).to(device)
    neighbours = Vectors(words, dim).to(device)
    vectors.rows(asked)  # refuses unknown words
    neighbours.table.zero_()
    counts = torch.tensor(counts, dtype=torch.float32)
    keep = keep_probability(counts, sample).to(device)
    table = negative_table(counts).to(device)
    ids = torch.from_numpy(ids).to(device)
    losses = []

    saved = dict(vectors=vectors, neighbours=neighbours)
    for i in iterations(iters, losses, saved, settings, path, fresh, each=len(ids) / parts):
        rate = lr * max(1 - i / iters, 1e-4)  # (9)
        part = ids[i % parts * size :][:size]
        blocks = sample_blocks(part, keep, table, window)
        order = torch.randperm(len(blocks[0]), device=device)
        here = blocks[0].flatten().bincount()  # how often each word occurs in this part
        most = min(batch, 16 * here.sum() / here.max(), 6 * len(counts))  # words in a step
        n = max(1, int(most) // BLOCK)  # blocks in a step
        steps = list(zip(*(tensor[order].split(n) for tensor in blocks)))
        for step in steps:
            total = sgd_step(vectors.table, neighbours.table, step, negative, rate, model, measure=step is steps[-1])
        in_window = step[3]  # the loss is that of the last step
        pairs = in_window.sum() if model == "skipgram" else in_window.amax(2).sum()
        losses.append(-total / pairs.clamp(min=1))
    return vectors


# ------------------------------------------------------------------------------------------------- queries ------------
def closest(table, plus, minus, n):
    """For each of Q questions, the n rows of table with the largest cosines by (10) -> cosines and rows, (Q, n) each.

    table: normalised, (V, d); plus, minus: the rows of the words p and q, (Q, any number)."""
    target = F.normalize(table[plus].sum(1) - table[minus].sum(1), dim=1)  # (10)
    cosines = target @ table.T
    cosines.scatter_(1, torch.cat([plus, minus], dim=1), -2)  # (10)
    return cosines.topk(n)


def most_similar(vectors, positive, negative=(), n=8):
    """The n words most similar to the positive ones and not to the negative ones, by (10) -> [(word, cosine)].

    The neighbours of "king": positive "king". man : woman = king : x: positive ["woman", "king"], negative "man".
    ValueError for a word without a vector."""
    plus = vectors.rows(positive)
    minus = vectors.rows(negative)
    n = min(n, len(vectors.words) - len({*plus.tolist(), *minus.tolist()}))
    cosines, rows = closest(F.normalize(vectors.table, dim=1), plus[None], minus[None], n)
    return [(vectors.words[row], cosine) for row, cosine in zip(rows[0].tolist(), cosines[0].tolist())]


# -------------------------------------------------------------------------------------------------- scores ------------
def ranks(x):
    """The rank of each value of x, from 1, (n,) -> (n,) float64. Equal values share the mean of their ranks."""
    _, index, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) + (1 - counts.double()) / 2)[index]  # (11)


def spearman(x, y):
    """Spearman's correlation of x and y, (n,) each; nan if one of them is constant."""
    return torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].item()  # (11)


def read_questions(path):
    """The lines of a file, of pairs as ([word, word], rating), or of analogies as ([word, word, word, word], None).

    Blank lines and those that start with # or : are left out. OSError, or ValueError with the name of the file."""
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
        fields = [line.split("\t" if "\t" in line else None) for line in lines if line.strip() and line[0] not in "#:"]
        if {len(line) for line in fields} not in ({3}, {4}):
            raise ValueError("neither two words and a number in each line, nor four words in each line")
        return [(line[:2], float(line[2])) if len(line) == 3 else (line, None) for line in fields]
    except ValueError as e:
        raise ValueError(f"--score {path}: {e}") from e


def score(vectors, questions):
    """Spearman's correlation (11) of pairs, or the share of analogies that (10) solves; how many questions count.

    questions: of read_questions(). Those with an unknown word do not count. ValueError if fewer than 2 do."""
    known = [(words, rating) for words, rating in questions if all(word in vectors for word in words)]
    if len(known) < 2:
        raise ValueError(f"--score: {len(known)} of {len(questions)} lines have vectors, at least 2 are needed")
    rows = torch.stack([vectors.rows(words) for words, _ in known])
    table = F.normalize(vectors.table, dim=1)
    if rows.shape[1] == 4:
        right = [closest(table, part[:, 1:3], part[:, :1], 1)[1][:, 0] == part[:, 3] for part in rows.split(100)]
        return torch.cat(right).float().mean().item(), len(known)
    x, y = table[rows].unbind(1)
    ratings = torch.tensor([rating for _, rating in known], dtype=torch.float64)
    return spearman((x * y).sum(1).cpu(), ratings), len(known)


# ------------------------------------------------------------------------------------------------- command ------------
def load(path, device="cpu"):
    """The Vectors in a checkpoint of word2vec.py."""
    settings = load_checkpoint(path, "word2vec")["settings"]
    vectors = Vectors(settings["words"], settings["dim"])
    load_checkpoint(path, vectors=vectors)
    return vectors.to(device)


def save_vectors(path, vectors, binary=False):
    """Saves word2vec's formats: a line "V d", then each word, a space, and a line of d numbers or d binary float32."""
    table = vectors.table.cpu().numpy().astype("<f4")
    lines = [f"{table.shape[0]} {table.shape[1]}\n".encode()]
    for word, row in zip(vectors.words, table):
        numbers = row.tobytes() if binary else " ".join(map(str, row)).encode() + b"\n"
        lines.append(word.encode() + b" " + numbers)
    Path(path).write_bytes(b"".join(lines))


def load_vectors(path, device="cpu"):
    """The Vectors in a file of either of word2vec's formats. The first counts if a word is there twice.

    OSError, or ValueError with the name of the file if it is damaged."""
    data = Path(path).read_bytes()
    rows = {}
    try:
        at = data.index(b"\n") + 1
        V, d = map(int, data[:at].split())
        text = re.compile(rb"[^ ]+( [-+.\w]+){%d} ?\r?(\n|\Z)" % d).match(data, at)  # else binary
        for _ in range(V):
            space = data.index(b" ", at)
            word = data[at:space].decode().lstrip("\n")
            if text:
                at = data.find(b"\n", space) + 1 or len(data)
                row = np.array(data[space:at].split(), np.float32)
            else:
                at = space + 1 + 4 * d
                row = np.frombuffer(data, "<f4", d, space + 1)
            rows.setdefault(word, row)
        table = torch.from_numpy(np.stack(list(rows.values())))
        if data[at:].strip():
            raise ValueError(f"more than the {V} words of its first line")
    except (ValueError, OverflowError) as e:
        raise ValueError(f"{path}: damaged, or not vectors in a format of word2vec ({e})") from e
    vectors = Vectors(list(rows), d)
    vectors.table = table
    return vectors.to(device)


def draw_map(path, vectors, n=150, side=1000):
    """Saves a map of the n most frequent words: the two principal components of their normalised vectors."""
    x = F.normalize(vectors.table[:n].cpu().double())
    x = x - x.mean(0)
    flat = x @ torch.linalg.svd(x, full_matrices=False).Vh[:2].T
    low, high = flat.aminmax(dim=0)
    places = 50 + (side - 100) * (flat - low) / (high - low).clamp(min=1e-12)
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(15)
    for word, place in zip(vectors.words, places.tolist()):
        draw.text(tuple(place), word, "#1a5276", font, "mm")
    image.save(path)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--text", dest="data", default="docstrings", help="a UTF-8 file, or docstrings (of Python's standard library)")
    add("--epochs", type=positive, default=5, help="passes over the text")
    add("--batch", type=positive, default=512, help="words in a step, after subsampling")
    add("--lr", type=float, default=0.025, help="initial learning rate")
    add("--dim", type=positive, default=100, help="d, components of a vector")
    add("--window", type=positive, default=5, help="R, words on each side")
    add("--negative", type=positive, default=5, help="k, negatives for each pair")
    add("--sample", type=float, default=1e-3, help="t of subsampling, 0 for none")
    add("--min-count", type=positive, default=5, help="rarer words are left out")
    add("--model", choices=("skipgram", "cbow"), default="skipgram", help="skip-gram or CBOW")
    add("--nearest", nargs="+", default=[], metavar="WORD", help="print the neighbours of these words")
    add(
        "--analogy",
        nargs=3,
        default=[],
        metavar=("A", "B", "C"),
        help="print what is to C as B is to A",
    )
    add(
        "--score",
        type=Path,
        help="print how the vectors score on a file of pairs (A TAB B TAB rating) or of analogies (A B C D)",
    )
    add("--vectors", type=Path, help="ask the vectors of this file, word2vec's text or binary format, and train none")
    add("--out", type=Path, default=Path("out/word2vec"), help="run folder")
    add("--device", type=pick_device, default=pick_device(), help="where to compute")
    add("--seed", type=int, default=0, help="seed; on a CPU the same seed gives the same bits")
    add("--fresh", action="store_true", help="train from scratch over the checkpoint in --out")
    args = parse_args(parser, argv)
    if args.dim < 2 or not 0 <= args.sample < math.inf:
        raise ValueError(f"--dim {args.dim} --sample {args.sample}: must be at least 2, and at least 0")

    path = args.out / "model.pt"
    asked = [*args.nearest, *args.analogy]
    questions = read_questions(args.score) if args.score else []
    if args.vectors:
        vectors = load_vectors(args.vectors, args.device)
    elif (asked or questions) and finished(path, args, "word2vec"):
        vectors = load(path, args.device)
    else:
        settings = args.epochs, args.batch, args.lr, args.dim, args.window, args.negative, args.sample, args.min_count
        vectors = train(args.data, *settings, args.model, args.device, args.seed, path, args.fresh, asked)
        save_vectors(args.out / "vectors.txt", vectors)
        draw_map(args.out / "map.png", vectors)
        print(f"{len(vectors.words)} words: {args.out}/vectors.txt, map.png, log.csv, model.pt")
    for word in args.nearest or ([] if asked or questions else vectors.words[50:350:50] or vectors.words[:3]):
        print(f"{word}: {', '.join(f'{x} {cosine:.2f}' for x, cosine in most_similar(vectors, word))}")
    if args.analogy:
        a, b, c = args.analogy
        answers = most_similar(vectors, [b, c], [a], 4)
        print(f"{a} : {b} = {c} : {', '.join(f'{x} {cosine:.2f}' for x, cosine in answers)}")
    if questions:
        value, n = score(vectors, questions)
        what = "share of right answers" if questions[0][1] is None else "Spearman's correlation"
        print(f"{args.score}: {what} {value:.3f}, {n} of {len(questions)} lines have vectors")


# ------------------------------------------------------------------------------------------------ plumbing ------------
# Text, checkpoints, progress: the same text in every file that uses it, and nothing of the method. You may stop here.
CJK = "\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"


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


@functools.cache
def word_pattern():
    """A Chinese character, or a run of letters, each with its combining marks; joiners stand only within a word."""
    marks = "".join(char for char in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(char)[0] == "M")
    letter = f"[^\\W\\d_{CJK}]"
    return re.compile(f"[{CJK}][{marks}]*|{letter}+(?:(?:[{marks}]|[\u200c\u200d](?=[^\\W\\d_]))+{letter}*)*")


def read_words(path):
    """Yields the words of each paragraph of a text, in lower case. ValueError or OSError, as load_text() raises."""
    text = load_text(path).replace("\r\n", "\n").replace("\r", "\n").replace("\u00ad", "")  # soft hyphens
    for paragraph in re.split(r"\n[^\S\n]*\n", text.lower()):
        yield word_pattern().findall(paragraph)


def load_ids(path, min_count):
    """The words that occur min_count times in a text, the most frequent first, their counts, and the text as ids.

    ids: int32 (n,), -1 for a blank line; rarer words are left out. ValueError if fewer than 2 words are left."""
    first = {}  # {word: number in the order of appearance}
    pieces = []
    for words in read_words(path):
        pieces += [np.array([first.setdefault(word, len(first)) for word in words], np.int32), np.array([-1], np.int32)]
    ids = np.concatenate(pieces[:-1])
    counts = np.bincount(ids[ids >= 0], minlength=len(first)).tolist()
    names = list(first)
    order = sorted(range(len(names)), key=lambda i: (-counts[i], names[i]))
    order = [i for i in order if counts[i] >= min_count]
    if len(order) < 2:
        raise ValueError(f"--text {path}: {len(order)} words (letters) occur {min_count} times; try --min-count")
    number = np.full(len(names) + 1, -2, np.int32)  # -2: left out
    number[order] = np.arange(len(order))
    number[-1] = -1
    ids = number[ids]
    return [names[i] for i in order], [counts[i] for i in order], ids[ids > -2]


def finished(path, args, method):
    """Whether the checkpoint at path is of a finished training with these flags. Questions to it need no text."""
    if args.fresh or not path.exists():
        return False
    state = load_checkpoint(path, method)
    settings = state["settings"]
    same = all(settings.get(name) in (None, value) for name, value in vars(args).items())
    return same and state["done"] == settings["iters"]


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
