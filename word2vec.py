# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""word2vec: a vector for each word, learned by telling the words that stand near it from words drawn at random.

Papers: Mikolov, Chen, Corrado, Dean, "Efficient Estimation of Word Representations in Vector Space", 2013,
arXiv:1301.3781; Mikolov, Sutskever, Chen, Corrado, Dean, "Distributed Representations of Words and Phrases and their
Compositionality", 2013, arXiv:1310.4546, whose equations are those in [..].

symbol     in the code    what it is
c, o, n    word ids       a centre word, a word near it (an "outside" word), a negative: 0 .. V - 1, 0 the commonest
v, u       v, u           vectors as centre and as neighbour, (V, d) each; v is what is kept in the end
R, b       reach, b       widest window (train's window), and the one drawn for this centre
-          window         1 where a pair is in the window of its centre, else 0, (B, L, 2 R + 1)
P          table          what negatives are drawn from: a word has as many places in the table as P gives it
k          k              negatives for each pair
L, S, B    BLOCK, SHARED  words in a block, negatives that a block shares; how many blocks there are

Words that stand among the same words have like meanings. So let a word's vector say which words stand near it:
      p(o | c) = exp(u_o . v_c) / sum_w exp(u_w . v_c)                                                              [2]
Its gradient, d log p / d v_c = u_o - sum_w p(w | c) u_w, pulls to what was seen and away from what was expected; a sum
over all V words for each pair cannot be paid. A smaller question does as well: was this word seen near c, or drawn from
a table P? (Its best score is not log p(o | c) but log p(o | c) / P(o) - log k: how much oftener than by chance.)
With sigma(x) = 1 / (1 + e^-x) for the chance that it was seen, each pair adds
  (1) l(c, o) = log sigma(u_o . v_c) + k E_{n ~ P} log sigma(-u_n . v_c)                                            [4]
  (2) P(n) is proportional to count(n)^(3/4)
and as d log sigma(x) / dx = 1 - sigma(x) = sigma(-x), the pull ends when the word is told apart:
  (3) dl/dv_c = sigma(-u_o . v_c) u_o - k E sigma(u_n . v_c) u_n;  the same scalars times v_c for u_o and u_n
Which pairs there are is drawn, too. Near words count more, and words as common as "the" say little:
  (4) o is near c if it is at most b words away, b drawn for each c anew, from 1 .. R, each as likely
  (5) a word with the share f of the text stays with chance min(1, sqrt(t / f) + t / f), before windows are laid    [5]
The other model, CBOW, asks the same of a centre and the mean of its neighbours; v is then of neighbours, u of centres:
  (6) h = mean of v_o over the window;  l(c) = log sigma(u_c . h) + k E_{n ~ P} log sigma(-u_n . h)
The fast form. One pair at a time is dot products of d numbers. But L words in a row have their windows in the same
L + 2 R words, and if they share S negatives as well, all their scores are one product, and their gradients two:
  (7) X = v of the L words, (L, d); Y = u of the L + 2 R words around and of the S negatives;  scores X Y^T;
      G = sigma(-score) for pairs in the window, -(k / S) (pairs of c) sigma(score) for negatives, else 0;
      dl/dX = G Y, dl/dY = G^T X
Each of the S negatives is drawn from P and stands for k / S of those of every pair, so in the mean over the draws both
gradients are those of (3); but two pairs no longer have independent draws. In CBOW each c is one pair, with h; now
X = v of the L + 2 R words around, (L + 2 R, d), and Y = u of the L words and of the S negatives:
  (8) H = M X, row c of M being 1 / (words in its window) at those, else 0;  G from H Y^T as in (7), "in the window"
      being the entries (c, c) and "pairs of c" 1 (0 for an empty window);  dl/dX = M^T (G Y), dl/dY = G^T H
  (9) v and u move by rate times the gradients of all blocks of a step; the rate falls in proportion to the words read
Meaning is then in directions, and in differences of them:
  (10) near(w) = words x != w with the largest cos(v_w, v_x);  a : b = c : x for the x, none of a, b, c, with the
       largest cos(v_x, v_b - v_a + v_c), all of length 1

Trip wires: a window is b words each way. Counts are of the raw text, the windows of what subsampling left. v and u are
two tables. A negative may be o itself: (1) has it so, the authors' program leaves it out. The gradients of a
step's blocks add up, so that a common word moves far: with a larger --batch, or few different words, take a smaller
--lr. The blocks of 16 steps are read at once and mixed, and a step takes fewer words where the commonest of them would
stand in it more than 16 times, as on a page about one thing, and never more than 6 for each word of the vocabulary.
A word is a run of letters, in lower case, a Chinese character a word by itself; a blank line ends all windows.
Differs from the papers in: (7); t / f in (5), as in the authors' program; v and u move once a step of many blocks; no
phrases, no hierarchical softmax. M^T in (8) divides a CBOW gradient among the window, which the authors' program omits.

python word2vec.py --text english.txt      700,000 words/s on one core; 3.1 million words, five times
python word2vec.py --nearest file error    of the run that is there
"""
import argparse, ast, collections, contextlib, hashlib, inspect, io, math, os, re, sys, sysconfig, tempfile, time
import warnings, zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

# --------------------------------------------------------------------------------------------------------- method -----
BLOCK, SHARED = 32, 40  # L and S
AT_ONCE = 16  # steps for which the text is read and windows and negatives are drawn at once

def keep_chance(counts, t):
    """How likely a word is to stay each time that it stands in the text, counts (V,) -> (V,). t = 0 keeps all."""
    f = counts / counts.sum()
    return ((t / f).sqrt() + t / f).clamp(max=1) if t else torch.ones_like(f)  # (5)

def negative_table(counts, size=1 << 22):
    """int32 (size,): each word has its part of the table, so that an even draw from it is a draw from P."""
    ends = counts.double().pow(0.75).cumsum(0)  # (2)
    return torch.searchsorted(ends, (torch.arange(size, dtype=torch.float64) + 0.5) * (ends[-1] / size)).int()

def draw_blocks(raw, keep, table, reach):
    """Word ids as they stand in the text, (n,), -1 where a blank line is -> the words that stay, in blocks: centres
    (B, L), around (B, L + 2 R), negatives (B, S), window (B, L, 2 R + 1) of zeros and ones, its middle zero."""
    stay = (torch.rand(len(raw)) < keep[raw]) & (raw >= 0)  # (5)
    words, paragraph = raw[stay], (raw < 0).cumsum(0, dtype=torch.int32)[stay]
    n, B = len(words), max(1, -(-len(words) // BLOCK))
    words = F.pad(words, (reach, B * BLOCK - n + reach))
    near = F.pad(paragraph, (reach, B * BLOCK - n + reach), value=-1).unfold(0, 2 * reach + 1, 1)
    b = torch.randint(1, reach + 1, (B * BLOCK, 1), dtype=torch.int32)  # (4)
    distance = torch.arange(-reach, reach + 1, dtype=torch.int32).abs()
    own = near[:, reach : reach + 1]
    window = ((distance > 0) & (distance <= b) & (near == own) & (own >= 0)).float()
    negatives = table[torch.randint(len(table), (B, SHARED))]
    return (words[reach : reach + B * BLOCK].view(B, BLOCK), words.unfold(0, BLOCK + 2 * reach, BLOCK), negatives,
            window.view(B, BLOCK, 2 * reach + 1))

def diagonals(x, width):
    """(B, L, >= L + width - 1), contiguous -> a view (B, L, width): of row i the columns i .. i + width - 1."""
    rows, columns = x.shape[1:]
    return x.as_strided((len(x), rows, width), (rows * columns, columns + 1, 1))

def skip_gram(x, y, window, k):
    """x = v of the centres (B, L, d), y = u of the words around and the negatives (B, L + 2 R + S, d) -> dl/dx, dl/dy,
    and l, summed, before the step."""
    width = window.shape[2]
    others = window.shape[1] + width - 1
    score = x @ y.mT  # (7)
    near, far = diagonals(score, width), score[:, :, others:]
    weight = k / far.shape[2] * window.sum(2, keepdim=True)
    G = torch.zeros_like(score)
    diagonals(G, width).copy_(torch.sigmoid(-near).mul_(window))  # (3)
    G[:, :, others:] = torch.sigmoid(far).mul_(-weight)  # (3)
    return G @ y, G.mT @ x, lambda: (window * F.logsigmoid(near)).sum() + (weight * F.logsigmoid(-far)).sum()  # (1)

def cbow(x, y, window, k):
    """x = v of the words around (B, L + 2 R, d), y = u of the centres and the negatives (B, L + S, d) -> dl/dx, dl/dy,
    and l, summed, before the step."""
    L, width = window.shape[1:]
    n = window.sum(2, keepdim=True)
    there, M = n.clamp(max=1), x.new_zeros(len(x), L, x.shape[1])
    diagonals(M, width).copy_(window / n.clamp(min=1))
    h = M @ x  # (8)
    near, far = (h * y[:, :L]).sum(2, keepdim=True), h @ y[:, L:].mT  # (6)
    G, weight = torch.sigmoid(-near) * there, k / far.shape[2] * there
    G_n = torch.sigmoid(far) * -weight
    d_h = G * y[:, :L] + G_n @ y[:, L:]
    return M.mT @ d_h, torch.cat([G * h, G_n.mT @ h], 1), lambda: (
        (there * F.logsigmoid(near)).sum() + (weight * F.logsigmoid(-far)).sum())

def sgd_step(v, u, blocks, k, rate, model, products=None):
    """Moves the tables v and u by the gradients of some blocks -> a function that gives l of these, summed.

    products: the type in which scores and gradients are formed, if it is not that of the tables."""
    centres, around, negatives, window = blocks
    i, j = (centres, around) if model == "skipgram" else (around, centres)
    j = torch.cat([j, negatives], 1)
    x, y = (F.embedding(rows, table).to(products or table.dtype) for rows, table in ((i, v), (j, u)))
    d_x, d_y, objective = (skip_gram if model == "skipgram" else cbow)(x, y, window.to(x.dtype), k)
    for table, rows, d in (v, i, d_x), (u, j, d_y):
        rows = rows.reshape(-1, 1).long().expand(-1, table.shape[1])
        table.scatter_add_(0, rows, d.flatten(0, 1).to(table.dtype).mul_(rate))  # (9)
    return objective

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

# ------------------------------------------------------------------------------------ training, sampling, command -----
CJK = "\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(f"\n[^\\S\n]*\n|[{CJK}]|[^\\W\\d_{CJK}]+")

def read_words(path, at_once=1 << 22):
    """Yields lists of the words of a text file, or of "docstrings", "" for a blank line; a large one is read in pieces.
    ValueError or OSError in one sentence, as of load_text()."""
    large = path != "docstrings" and os.path.isfile(path) and os.path.getsize(path) > at_once
    for piece in read_pieces(path, at_once) if large else [load_text(path)]:
        yield ["" if word[0] == "\n" else word for word in WORD.findall(piece.replace("\r", "").lower())]

def read_pieces(path, at_once):
    """Yields a file's text in pieces that end with a word. ValueError if it is not UTF-8."""
    with open(path, "rb") as file:
        rest, done, new = b"", 0, True
        while new:
            new = file.read(at_once)
            raw = rest + new
            end = len(raw[: max(raw.rfind(b"\n"), raw.rfind(b" "), 0)].rstrip()) if new else len(raw)
            try:
                yield raw[:end].decode()
            except UnicodeDecodeError as e:
                at = done + e.start
                raise ValueError(f"--text {path}: not UTF-8, byte {at} is {e.object[e.start]:#04x}") from None
            rest, done = raw[end:], done + end

def count_vocabulary(path, least):
    """The words that stand `least` times or more, the commonest first -> {word: count}. ValueError for fewer than 2."""
    counts = collections.Counter()
    for words in read_words(path):
        counts.update(words)
    del counts[""]
    kept = sorted(((word, n) for word, n in counts.items() if n >= least), key=lambda item: (-item[1], item[0]))
    if len(kept) < 2:
        raise ValueError(f"--text {path}: {len(kept)} words (letters) stand in it {least} times; see --min-count")
    return dict(kept)

def text_to_ids(path, vocabulary, folder):
    """The text as ids, -1 for a blank line, words that are not in the vocabulary left out -> an int32 array in a file
    without a name in folder, so that a text may be larger than the memory, and its SHA-256."""
    number, sha256 = {word: i for i, word in enumerate(vocabulary)} | {"": -1}, hashlib.sha256()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        for words in read_words(path):
            raw = np.array([number[word] for word in words if word in number], np.int32).tobytes()
            sha256.update(raw)
            file.write(raw)
        file.flush()
        return np.memmap(file, np.int32, "r+"), sha256.hexdigest()[:12]

class Vectors(nn.Module):
    """words: V different ones; table: their vectors, (V, d), at first small and random."""

    def __init__(self, words, d):
        super().__init__()
        self.words, self.number = words, {word: i for i, word in enumerate(words)}
        self.register_buffer("table", (torch.rand(len(words), d) - 0.5) / d)

    def unit(self, words):
        """The vectors of some words, of length 1, (n, d). ValueError for a word that has none."""
        for word in words:
            if word not in self.number:
                raise ValueError(f"the word {word!r} is not among the {len(self.words)} that have a vector")
        return F.normalize(self.table[[self.number[word] for word in words]], dim=1)

def closest(vectors, target, n, without):
    """The n words with the largest cosine to target (d,), except those in `without` -> [(word, cosine)]."""
    cosines = F.normalize(vectors.table, dim=1) @ F.normalize(target, dim=0)
    cosines[[vectors.number[word] for word in without]] = -2
    best = cosines.topk(min(n, len(vectors.words) - len(set(without))))
    return [(vectors.words[i], cosine) for cosine, i in zip(best.values.tolist(), best.indices.tolist())]

def nearest(vectors, word, n=8):
    """The n words nearest to a word -> [(word, cosine)]. ValueError for a word that has no vector."""
    return closest(vectors, vectors.unit([word])[0], n, [word])  # (10)

def analogy(vectors, a, b, c, n=4):
    """What is to c as b is to a -> [(word, cosine)]. ValueError for a word that has no vector."""
    v = vectors.unit([a, b, c])
    return closest(vectors, v[1] - v[0] + v[2], n, [a, b, c])  # (10)

def fast_products(device):
    """The type in which products are fastest: bfloat16, 8 bits of a number, where the processor multiplies it."""
    able = {"cuda": torch.cuda.is_bf16_supported,
            "cpu": getattr(torch.cpu, "_is_avx512_bf16_supported", bool)}  # younger than torch 2.4
    return torch.bfloat16 if able.get(torch.device(device).type, bool)() else torch.float32

def train(text="docstrings", epochs=5, batch=512, lr=0.025, dim=100, window=5, negative=5, sample=1e-3, min_count=5,
          model="skipgram", device="cpu", seed=0, path=None, fresh=False):
    """Learns the words of a file, or of "docstrings" -> Vectors. Seeds torch's global generator.

    path: where to save; unless fresh, training goes on from what is there. ValueError if that was made otherwise or
    the text is none, FloatingPointError if the loss is not finite (what was saved last stays)."""
    counts = count_vocabulary(text, min_count)
    ids, sha256 = text_to_ids(text, counts, path.parent if path else Path(tempfile.gettempdir()))
    wanted = dict(text=sha256, model=model, dim=dim, window=window, negative=negative, sample=sample, epochs=epochs,
                  batch=batch, lr=lr, min_count=min_count, seed=seed, words=[*counts])
    torch.manual_seed(seed)
    vectors, outside, tally = Vectors([*counts], dim).to(device), Vectors([*counts], dim).to(device), nn.Module()
    outside.table.zero_()
    tally.register_buffer("l", torch.zeros(2, device=device))  # the sum of l, and how many it is of
    parts, done, log = (vectors, outside, tally), 0, []
    if path and path.exists() and not fresh:
        done, log = resume(path, parts, load_checkpoint(path, ["word2vec"], device, wanted))
    counts = torch.tensor([*counts.values()], dtype=torch.float32)
    keep, table = keep_chance(counts, sample), negative_table(counts)
    products = fast_products(device)
    reads = -(-len(ids) // (batch * AT_ONCE))  # in an epoch
    progress, saved, (begun, first) = Progress("part", "words", epochs * reads, done), time.time(), (time.time(), done)
    with torch.no_grad():
        for i in range(done, epochs * reads):
            at, rate = i % reads * batch * AT_ONCE, lr * max(1 - i / (epochs * reads), 1e-4)  # (9)
            blocks = draw_blocks(torch.from_numpy(np.array(ids[at : at + batch * AT_ONCE])), keep, table, window)
            mixed, here = torch.randperm(len(blocks[0])), blocks[0].flatten().bincount()
            blocks_a_step = max(1, int(min(batch, 16 * here.sum() / here.max(), 6 * len(counts))) // BLOCK)
            blocks = [part[mixed].to(device, non_blocking=True).split(blocks_a_step) for part in blocks]
            for step in zip(*blocks):
                objective = sgd_step(vectors.table, outside.table, step, negative, rate, model, products)
            pairs = step[3].sum() if model == "skipgram" else step[3].amax(2).sum()
            tally.l += torch.stack([-objective(), pairs])  # the loss is that of the last of these steps
            if (i + 1) % reads == 0:
                log.append(((i + 1) // reads, (tally.l[0] / tally.l[1].clamp(min=1)).item()))
                tally.l.zero_()
                if not (math.isfinite(log[-1][1]) and vectors.table.isfinite().all()):
                    hint = "try a smaller --lr or --batch"
                    raise FloatingPointError(f"the loss is {log[-1][1]} after iteration {i + 1}; {hint}")
                speed = (i + 1 - first) * len(ids) / reads / (time.time() - begun)
                line = f"epoch {log[-1][0]} of {epochs}: loss {log[-1][1]:.4f}, {speed:,.0f} words/s"
                print(f"{line:<79}" if sys.stdout and sys.stdout.isatty() else line, flush=True)
                begun, first = time.time(), i + 1
            if path and (i + 1 == epochs * reads or time.time() - saved > 10):
                save_checkpoint(path, "word2vec", wanted, parts, i + 1, log)
                saved = time.time()
            progress(i + 1, len(ids) / reads, f"loss {log[-1][1]:.4f}" if log else "")
    return vectors

def load(path, device="cpu"):
    """The Vectors of a checkpoint."""
    state = load_checkpoint(Path(path), ["word2vec"], device)
    with or_say(f"{path}: {DAMAGED}"):
        vectors = Vectors(state["settings"]["words"], state["settings"]["dim"])
        vectors.load_state_dict(state["parts"][0])
    return vectors.to(device)

def save_text(path, vectors):
    """word2vec's text format: a line "V d", then a line a word."""
    lines = [f"{len(vectors.words)} {vectors.table.shape[1]}\n"]
    for word, row in zip(vectors.words, vectors.table.tolist()):
        lines.append(" ".join([word, *(f"{x:.6g}" for x in row)]) + "\n")
    write({path: "".join(lines).encode()})

def plot_words(vectors, n=150, side=1000):
    """A Pillow image: the n commonest words where the two main directions of their unit vectors put them."""
    x = F.normalize(vectors.table[:n].cpu().double())
    x = x - x.mean(0)
    flat = x @ torch.linalg.svd(x, full_matrices=False).Vh[:2].T
    low, high = flat.aminmax(dim=0)
    spots = 50 + (side - 100) * (flat - low) / (high - low).clamp(min=1e-12)
    image = Image.new("RGB", (side, side), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    for word, (across, down) in zip(vectors.words, spots.tolist()):
        draw.text((across, down), word, "#1a5276", font, "mm")
    return image

def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, default = parser.add_argument, inspect.signature(train).parameters
    add("--text", default="docstrings", help="docstrings (of the standard library), or a file in UTF-8")
    for flag, least, what in (
            ("epochs", 1, "times that the text is read"), ("batch", 1, "words in a step, after subsampling"),
            ("dim", 2, "d, numbers in a vector"), ("window", 1, "R, words each way"),
            ("negative", 1, "k, negatives for each pair"), ("min-count", 1, "rarer words are left out")):
        add("--" + flag, type=at_least(least), default=default[flag.replace("-", "_")].default, help=what)
    add("--lr", type=float, default=default["lr"].default, help="learning rate at the start")
    add("--sample", type=float, default=default["sample"].default, help="t of subsampling, 0 for none")
    add("--model", choices=["skipgram", "cbow"], default="skipgram", help="which question is asked")
    add("--nearest", nargs="+", type=str.lower, default=[], metavar="WORD", help="words to print the nearest of")
    add("--analogy", nargs=3, type=str.lower, default=[], metavar=("A", "B", "C"), help="what is to C as B is to A")
    add("--out", type=Path, default=Path("out", "word2vec"), help="run folder")
    add("--device", default="auto", help="auto is cuda, else mps, else cpu")
    add("--seed", type=int, default=0, help="same seed, same machine: same bits on the CPU")
    add("--fresh", action="store_true", help="train anew over the run folder's checkpoint")
    args = parser.parse_args(argv)
    with parser.guard():
        if not 0 <= args.sample < math.inf:
            raise ValueError(f"--sample {args.sample}: want a number that is at least 0")
        device, path = pick_device(args.device), args.out / "model.pt"
        vectors = train(args.text, args.epochs, args.batch, args.lr, args.dim, args.window, args.negative, args.sample,
                        args.min_count, args.model, device, args.seed, path, args.fresh)
        save_text(args.out / "vectors.txt", vectors)
        png = io.BytesIO()
        plot_words(vectors).save(png, "PNG")
        write({args.out / "map.png": png.getvalue()})
        show = lambda pairs: ", ".join(f"{word} {cosine:.2f}" for word, cosine in pairs)
        for word in args.nearest or vectors.words[50:350:50] or vectors.words[:3]:
            print(f"{word}: {show(nearest(vectors, word))}")
        if args.analogy:
            a, b, c = args.analogy
            print(f"{a} : {b} = {c} : {show(analogy(vectors, a, b, c))}")
        print(f"{len(vectors.words)} words: vectors.txt, map.png in {args.out}, with log.csv, model.pt")

if __name__ == "__main__":
    main()
