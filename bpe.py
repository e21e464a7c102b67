# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""BPE: words from bytes, by joining the commonest pair of neighbours again and again; GPT-2's format, to the token.

Paper: Sennrich, Haddow, Birch, "Neural Machine Translation of Rare Words with Subword Units", 2016, arXiv:1508.07909;
bytes as in Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2).

symbol      in the code     what it is
w           word, ids       a pre-token (a word with the space before it, say), as a list of ids; first one id a byte
n_w         times[i]        how often w stands in the text; i is where a letter of w lies in the trainer's list
n(a, b)     count[a, b]     how often id b follows id a inside of a word
ids         0 .. vocab - 1  0 .. 255 are bytes in GPT-2's order ("!" is 0, the space 220), then merges, then specials
merge k     merges[k]       the pair (a, b) that becomes the id 256 + k
rank        pairs[a, b]     k, the place of the merge of a and b in the list, 0 the oldest; made[k] is its new id

Splitting. A merge never crosses the border of a pre-token. GPT-2 takes, from the left, the first of these that fits:
  (1) 's 't 're 've 'm 'll 'd | ?letters | ?digits | ?others | spaces that no word follows | spaces
      where ? is a space or none; letters are Unicode's L*, digits N*, spaces White_Space, others all the rest
So of a run of spaces before a word the last is left to the word. Most borders are found without trying all of (1): cut
  (2) before every space and every newline, but not within a run of three spaces or more, which (1) takes whole but for
      its last (at the end of the text: two or more, taken whole). Those are set aside first, and a run of two before a
      word is cut in two by (1) as well: " " " x", "\\n" "\\n" "x"
The strings between these cuts come again and again, so each is split by (1) and encoded only once, then looked up.
Training. The pairs are counted in the distinct words, each of which counts as often as it stands in the text:
  (3) n(a, b) = sum_w n_w #{i: w_i = a, w_{i+1} = b}
  (4) (a, b) = the pair with the largest n(a, b), of several the smallest (a first, then b): it becomes a new id c
  (5) c takes its place in every word, from the left, so that a a a becomes c a if a = b
Nothing else has to be counted again, for a merge changes only what lies beside it: in x a b y of a word w,
  (6) n(x, a) and n(b, y) lose n_w; n(x, c) and n(c, y) gain n_w
The count of a pair only falls once it stands in the heap of (-n, pair), so an old entry never says too little: one that
comes up and is too high is put back with the true count, and the first that is true is (4).
Encoding. In each word the oldest merge that can be made is made, the leftmost first, until none can be made:
  (7) i = the leftmost of arg min_i rank(w_i, w_{i+1});  w_i w_{i+1} -> c
This takes one scan for each merge, fast enough for the usual few bytes; a long word takes a heap of (rank, i) instead,
and n log n steps.
Decoding writes the bytes of the ids one after the other:
  (8) bytes = b(i_1) b(i_2) ..., b(c) = b(a) b(b)

Trip wires: a token may be half a letter, for ids stand for bytes; only all of them together need be UTF-8 (what is not
is shown as U+FFFD). A special token's name in a text is plain text, unless encode is told that it is allowed. What is a
letter, this Python's unicodedata says. Python's \\s has U+001C .. U+001F besides, and its \\w the underscore.
A token that the merges do not make of its bytes is never used, even where it is a whole word.
Differs from the paper in: bytes for characters, the splitting (1), and no mark for the end of a word.

python bpe.py --vocab 4096                        three seconds on 1.78 MB; 3.54 bytes per token
python bpe.py --vocab 4096 --encode README.md     ids of a file, by the same tokens; --decode - reads ids from a pipe
"""
import argparse, ast, base64, collections, contextlib, functools, hashlib, heapq, io, itertools, json, os, platform, re
import sys, sysconfig, unicodedata, warnings
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

# --------------------------------------------------------------------------------------------------------- method -----
SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # White_Space, inside of brackets
ASCII = re.compile(rb"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^A-Za-z0-9\t-\r ]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+")
CLOSING = b"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
BLANK = bytes.maketrans(b"\t\n\v\f\r", b" " * 5)
BLANKS = re.compile(b"   *(?= )")  # where (2) may set something aside, in a text of which all spaces are blanks
RARE = frozenset(c for c in map(chr, range(0x80, 0x3001)) if re.match(f"[{SPACES}]", c))
RUN = re.compile(b"(?:S){2,}(?=S)".replace(b"S", b"[\t-\r ]|" + b"|".join(map(str.encode, sorted(RARE)))))
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256), *range(33), *range(127, 161), 173]  # in GPT-2's order
CHARS = [*map(chr, BYTES[:188]), *map(chr, range(256, 324))]  # and how it shows them, the first 188 as they are
IDS = bytes(map(BYTES.index, range(256)))  # for bytes.translate: byte -> id

@functools.cache
def any_text():
    """The pattern (1) for text of any kind. Python's \\w is letters, digits, "_" and numbers that \\d does not have."""
    categories = map(unicodedata.category, map(chr, range(sys.maxunicode + 1)))
    ranges = re.finditer("x+", "".join("x" if category in ("Nl", "No") else " " for category in categories))
    numbers = "".join(f"{chr(run.start())}-{chr(run.end() - 1)}" for run in ranges)
    letter, number, other = f"[^\\W\\d_{numbers}]", f"[\\d{numbers}]", f"(?:[^\\w{SPACES}]+|_+)"
    return re.compile(f"'(?:[sdmt]|ll|ve|re)| ?{letter}+| ?{number}+| ?{other}+|"
                      f"[{SPACES}]+(?![^{SPACES}])|[{SPACES}]+")

def pre_tokens(raw):
    """The list of the pre-tokens of a text; texts are bytes of UTF-8 here. Joined they are the text."""
    if raw.isascii():
        return ASCII.findall(raw)  # (1)
    return [word.encode() for word in any_text().findall(raw.decode())]  # (1)

def cut_text(raw):
    """Yields lists [head, *pieces], which joined are the text. A head stands for itself, a piece has lost one space
    before it, unless it begins with a newline; every one begins and ends where a pre-token does."""
    done, raw = 0, raw + b" "  # the end counts as one space more
    blank = raw.translate(BLANK)
    for c in RARE.intersection(raw.translate(None, bytes(range(128))).decode()):
        blank = blank.replace(c.encode(), b" " * len(c.encode()))
    for start in (m.start() for m in BLANKS.finditer(blank)):
        if run := RUN.match(raw, start):
            yield raw[done:start].replace(b"\n", b" \n").split(b" ")  # (2)
            yield [run[0]]  # (2)
            done = run.end()
    yield raw[done:-1].replace(b"\n", b" \n").split(b" ")  # (2)

def whole(piece):
    """The text of a piece."""
    return piece if piece[:1] == b"\n" else b" " + piece  # (2)

def count_words(text):
    """{pre-token in UTF-8: how often it stands in the text}."""
    heads, pieces, words = collections.Counter(), collections.Counter(), collections.Counter()
    for head, *rest in cut_text(utf8(text)):
        heads[head] += 1
        pieces.update(rest)
    for part, n in itertools.chain(heads.items(), ((whole(piece), n) for piece, n in pieces.items())):
        for word in pre_tokens(part):
            words[word] += n
    return words

def learn_merges(words, n):
    """{word, a bytes of ids: how often it stands in the text} -> at most n merges (a, b), fewer if no pair is left.

    All words lie in one list, -1 around each. A token's id stands in ids where its first byte stood, and in ends just
    after its last one; a pair is a 2^32 + b, which orders pairs as (4) does."""
    ids, times, ends, length = [-1], [0], [-1], [1] * 256
    for word, n_w in words.items():
        ids += (*word, -1)
        times += [n_w] * (len(word) + 1)
    ends += ids[:-1]
    where, merges, n_at = collections.defaultdict(list), [], times.__getitem__
    for i, (a, b) in enumerate(zip(ids, ids[1:])):
        if a >= 0 <= b:
            where[a << 32 | b].append(i)
    count = {pair: sum(map(n_at, places)) for pair, places in where.items()}  # (3)
    heap = [(-c, pair) for pair, c in count.items()]
    heapq.heapify(heap)
    while heap and len(merges) < n:
        minus, pair = heap[0]
        if (now := count[pair]) != -minus:
            heapq.heapreplace(heap, (-now, pair)) if now else heapq.heappop(heap)
            continue
        (a, b), c = divmod(pair, 1 << 32), len(length)
        merges.append((a, b))  # (4)
        length.append(length[a] + length[b])
        to_b, to_y, before, after = length[a], length[c], collections.defaultdict(list), collections.defaultdict(list)
        for i in where.pop(pair):
            if ids[i] == a and ids[i + to_b] == b:  # else another merge has taken one of the two
                ids[i] = ends[i + to_y] = c  # (5)
                ids[i + to_b] = -2
                before[x := ends[i]].append(i - length[x])
                after[ids[i + to_y]].append(i)
        beside = [(b << 32 | y, c << 32 | y, places) for y, places in after.items() if y >= 0]
        beside += [(x << 32 | a, x << 32 | c, places) for x, places in before.items() if x >= 0]
        for old, new, places in beside:
            count[new], where[new] = sum(map(n_at, places)), places  # (6)
            count[old] -= count[new]  # (6)
            heapq.heappush(heap, (-count[new], new))
        count[pair] = 0
    return merges

def merge_word(ids, pairs, made):
    """The ids of a word's bytes -> the ids of its tokens. pairs: {(a, b): rank}; made: [rank] -> id."""
    if len(ids) > 100:
        return merge_long(ids, pairs, made)
    ids, none, get = [*ids, -1], len(made), pairs.get
    ranks = [*map(get, zip(ids, ids[1:]), itertools.repeat(none)), none]  # of each id and the one after it
    while (best := min(ranks)) < none:
        i = ranks.index(best)
        ids[i] = made[best]  # (7)
        del ids[i + 1], ranks[i + 1]
        ranks[i - 1], ranks[i] = get((ids[i - 1], ids[i]), none), get((ids[i], ids[i + 1]), none)
    return ids[:-1]

def merge_long(ids, pairs, made):
    """The same as merge_word(), in n log n steps."""
    n, heap = len(ids), []
    ids, left, right = [*ids, -1], [*range(-1, n)], [*range(1, n + 1)]  # -1 is no id: either end, or what was merged

    def note(i):
        if (rank := pairs.get((ids[i], ids[right[i]]))) is not None:
            heapq.heappush(heap, (rank, i))

    for i in range(n - 1):
        note(i)
    while heap:
        rank, i = heapq.heappop(heap)
        j = right[i]
        if pairs.get((ids[i], ids[j])) == rank:
            ids[i], ids[j] = made[rank], -1  # (7)
            right[i] = right[j]
            left[right[i]] = i
            note(left[i])
            note(i)
    return [i for i in ids if i >= 0]

# ------------------------------------------------------------------------------------------------------ tokenizer -----
class Table(dict):
    """A dict that finds by itself what it does not have, and keeps it if it is short, up to 2^20 of them."""

    def __init__(self, find):
        self.find = find

    def __missing__(self, key):
        value = self.find(key)
        if len(key) <= 64 and len(self) < 1 << 20:
            self[key] = value
        return value

class BPE:
    """tokens: {bytes: id}, all 256 single bytes among them; merges: [(bytes, bytes)], the oldest first, though of a
    pair listed twice the last counts, as in GPT-2; special: {name: id}. ValueError if they do not fit together."""

    def __init__(self, tokens, merges, special=()):
        self.tokens, self.merges, self.special = dict(tokens), list(merges), dict(special)
        for name in self.special:
            if not name or utf8(name) in self.tokens:
                raise ValueError(f"special token {name!r}: " + ("is an ordinary token as well" if name else "no name"))
        self.bytes = {i: raw for raw, i in self.tokens.items()} | {i: s.encode() for s, i in self.special.items()}
        if len(self.bytes) < len(self.tokens) + len(self.special):
            raise ValueError("two tokens have the same id")
        if odd := [i for i in self.bytes if not isinstance(i, int) or i < 0]:
            raise ValueError(f"an id is a whole number from 0 on, not {odd[0]!r}")
        try:
            self.first = [self.tokens[bytes([b])] for b in range(256)]  # [byte] -> id
            self.made = [self.tokens[a + b] for a, b in self.merges]  # [rank] -> id
            self.pairs = {(self.tokens[a], self.tokens[b]): rank for rank, (a, b) in enumerate(self.merges)}
        except KeyError as e:
            raise ValueError(f"the merges or the bytes need the token {e.args[0]!r}, which is not there") from None
        self.words = Table(self.merge)
        self.heads, self.pieces = Table(self._ids), Table(self._piece)

    def merge(self, word):
        """The ids of a pre-token, bytes -> a tuple."""
        return tuple(merge_word([*map(self.first.__getitem__, word)], self.pairs, self.made))

    def prepare(self):
        """Fills the tables with the words that are one token, so that even a first text is encoded fast -> self."""
        for raw, i in self.tokens.items():
            with contextlib.suppress(UnicodeDecodeError):
                if len(raw) > 1 and pre_tokens(raw) == [raw] and self.merge(raw) == (i,):
                    self.words[raw] = (i,)
                    if whole(raw[1:]) == raw:
                        self.pieces[raw[1:]] = (i,)
        return self

    def _ids(self, part):
        return tuple(itertools.chain.from_iterable(map(self.words.__getitem__, pre_tokens(part))))

    def _piece(self, piece):
        stem = piece.rstrip(CLOSING)
        if not stem.isalpha():  # else a word and what closes it, as most are: no pattern is needed
            return self._ids(whole(piece))
        closing = piece[len(stem):]
        return self.pieces[stem] + self.words[closing] if closing else self.merge(b" " + piece)  # (1)

    @classmethod
    def train(cls, text, vocab_size, special=()):
        """vocab_size counts the 256 bytes and the special tokens; there are fewer if the text has no pair left."""
        special = list(dict.fromkeys(special))
        if vocab_size < 256 + len(special):
            raise ValueError(f"a vocabulary of {vocab_size} cannot hold 256 bytes and {len(special)} special tokens")
        tokens = [bytes([b]) for b in BYTES]
        words = {word.translate(IDS): times for word, times in count_words(text).items()}
        merges = learn_merges(words, vocab_size - 256 - len(special))
        for a, b in merges:
            tokens.append(tokens[a] + tokens[b])  # (8)
        return cls({raw: i for i, raw in enumerate(tokens)}, [(tokens[a], tokens[b]) for a, b in merges],
                   {name: len(tokens) + i for i, name in enumerate(special)})

    def encode(self, text, allowed_special=()):
        """Text -> list of ids. The names in allowed_special, or "all", become their ids; others are plain text.

        ValueError for a name that is no special token, and for a lone surrogate, which UTF-8 cannot write."""
        allowed = list(self.special if allowed_special == "all" else allowed_special)
        if unknown := [name for name in allowed if name not in self.special]:
            raise ValueError(f"{unknown[0]!r} is not a special token; there are {list(self.special)}")
        names = "|".join(re.escape(name) for name in sorted(allowed, key=len, reverse=True))
        ids = []
        for i, part in enumerate(re.split(f"({names})", text) if names else [text]):
            if i % 2:
                ids.append(self.special[part])
            else:
                for head, *pieces in cut_text(utf8(part)):
                    ids += self.heads[head]
                    for found in map(self.pieces.__getitem__, pieces):
                        ids += found
        return ids

    def decode_bytes(self, ids):
        """ValueError for an id that no token has."""
        try:
            return b"".join(map(self.bytes.__getitem__, ids))  # (8)
        except KeyError as e:
            raise ValueError(f"no token has the id {e.args[0]!r}; they are 0 .. {max(self.bytes)}") from None

    def decode(self, ids):
        """Ids -> text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def save(self, folder, settings=None):
        """Writes GPT-2's vocab.json and merges.txt, and ranks.tiktoken, which has no place for special tokens.

        settings: a dict that goes into settings.json. vocab.json is last: without it the folder has no tokenizer."""
        show = lambda raw: "".join(CHARS[IDS[b]] for b in raw)
        names = {show(raw): i for raw, i in self.tokens.items()}
        if both := names.keys() & self.special.keys():
            raise ValueError(f"special token {both.pop()!r}: vocab.json has no way to tell it from an ordinary one")
        by_id = lambda names: dict(sorted(names.items(), key=lambda item: item[1]))
        merges = "#version: 0.2\n" + "".join(f"{show(a)} {show(b)}\n" for a, b in self.merges)
        ranks = "".join(f"{base64.b64encode(raw).decode()} {i}\n" for raw, i in by_id(self.tokens).items())
        vocab = json.dumps(by_id(names | self.special), ensure_ascii=False)
        files = {"merges.txt": merges, "ranks.tiktoken": ranks}
        if settings:
            files["settings.json"] = json.dumps(settings | dict(made=fingerprint(vocab + merges)))
        write({Path(folder, name): text.encode() for name, text in (files | {"vocab.json": vocab}).items()})

    @classmethod
    def load(cls, path):
        """From a folder with vocab.json and merges.txt (or encoder.json and vocab.bpe, GPT-2's own names), or from a
        rank file. What is in the vocabulary but neither a byte nor merged is a special token. OSError, ValueError."""
        path = Path(path)
        try:
            return (cls.load_ranks(path) if path.is_file() else cls.load_folder(path)).prepare()
        except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as e:
            raise ValueError(f"{path}: not a tokenizer, or a damaged one ({e})") from None

    @classmethod
    def load_folder(cls, path):
        both = [path / "vocab.json", path / "merges.txt"], [path / "encoder.json", path / "vocab.bpe"]
        vocab, merges = next((files for files in both if files[0].exists()), both[0])
        unshow = dict(zip(CHARS, BYTES))
        vocab, lines = json.loads(vocab.read_text("utf-8")), merges.read_text("utf-8").split("\n")
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        ordinary = {*CHARS, *(a + b for a, b in pairs)}
        raw = lambda name: bytes(unshow[char] for char in name)
        return cls({raw(name): i for name, i in vocab.items() if name in ordinary},
                   [(raw(a), raw(b)) for a, b in pairs], {name: i for name, i in vocab.items() if name not in ordinary})

    @classmethod
    def load_ranks(cls, path):
        lines = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
        tokens = {base64.b64decode(raw, validate=True): int(rank) for raw, rank in lines}
        by_rank, pairs, made = {rank: raw for raw, rank in tokens.items()}, {}, []
        for rank, raw in sorted(by_rank.items()):
            parts = tuple(merge_word([tokens[bytes([b])] for b in raw], pairs, made))
            if len(parts) == 2:  # a token was made from the two that are left if all older merges are made
                pairs[parts] = len(made)
                made.append(rank)
        return cls(tokens, [(by_rank[a], by_rank[b]) for a, b in pairs])

def utf8(text):
    """The bytes of a text. ValueError if it has a lone surrogate."""
    try:
        return text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"character {e.start} is a lone surrogate, {text[e.start]!r}; UTF-8 has none") from None

# ------------------------------------------------------------------------------------------------------- plumbing -----
# Text, files, flags: the same text in every file that has them, and nothing of the method.
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

# ------------------------------------------------------------------------------------ training, sampling, command -----
SENTENCE = "The tokenizer's 2024 dictionary: antidisestablishmentarianism, naïve café, don't   panic! f(x) = x**2"
COLOURS = (252, 213, 180), (196, 225, 255), (205, 240, 200), (235, 210, 245), (250, 240, 170)

def shown(bpe, i):
    """A token as a person can read it: a newline as \\n, and a part of a letter as \\xe2."""
    return bpe.bytes[i].decode("utf-8", "backslashreplace").replace("\n", "\\n")

def paint_tokens(bpe, text, width=760, size=22):
    """A Pillow image of a text, each token on a ground of its own."""
    font, x, y, boxes = ImageFont.load_default(size), 12, 12, []
    for i in bpe.encode(text):
        token = shown(bpe, i)
        wide = max(4, round(font.getlength(token)))
        if x + wide > width - 12:
            x, y = 12, y + size + 14
        boxes.append((x, y, wide, token))
        x += wide
    image = Image.new("RGB", (width, y + size + 22), "white")
    draw = ImageDraw.Draw(image)
    for (x, y, wide, token), colour in zip(boxes, itertools.cycle(COLOURS)):
        draw.rectangle((x, y, x + wide - 1, y + size + 7), colour)
        draw.text((x, y + 2), token, "black", font)
    return image

def coloured(bpe, text, tty):
    """The same for a terminal; elsewhere with a bar between tokens."""
    tokens = [shown(bpe, i) for i in bpe.encode(text)]
    if not tty:
        return "|".join(tokens)
    return "".join(f"\x1b[30;48;2;{r};{g};{b}m{token}\x1b[0m"
                   for token, (r, g, b) in zip(tokens, itertools.cycle(COLOURS)))

def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, job = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("--text", default="docstrings", help="docstrings (of the standard library), or a file in UTF-8")
    add("--vocab", type=at_least(256), default=4096, help="tokens to have, with the 256 bytes and the special ones")
    add("--special", action="append", default=[], metavar="TOKEN", help="a special token; may be given several times")
    job("--encode", metavar="FILE", help="print the ids of a file, - for standard input, and do nothing else")
    job("--decode", metavar="FILE", help="print the text of the ids in a file, - for standard input")
    add("--out", type=Path, default=Path("out", "bpe"), help="run folder")
    add("--fresh", action="store_true", help="train anew over the run folder's tokenizer")
    args = parser.parse_args(argv)
    with parser.guard():
        file = args.encode or args.decode
        if file:
            given = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        bpe, had = find_or_train(args, sys.stderr if file else sys.stdout)
        if file and hasattr(sys.stdout, "reconfigure"):  # the very bytes, on any system
            sys.stdout.reconfigure(encoding="utf-8", newline="")
        if args.encode:
            try:
                print(*bpe.encode(given.decode()))
            except UnicodeDecodeError as e:
                raise ValueError(f"--encode {file}: not UTF-8, byte {e.start} is {e.object[e.start]:#04x}") from None
        elif args.decode:
            if not all(map(bytes.isdigit, given.split())):
                raise ValueError(f"--decode {file}: want ids, numbers with white space between them")
            print(bpe.decode(map(int, given.split())), end="")
        else:
            made = [a + b for a, b in bpe.merges]
            for what, some in ("first merges:", made[:12]), ("longest:", sorted(made, key=len, reverse=True)[:6]):
                print(what, *(repr(shown(bpe, bpe.tokens[raw])) for raw in some))
            print(coloured(bpe, SENTENCE, sys.stdout.isatty()))
            png = io.BytesIO()
            paint_tokens(bpe, SENTENCE).save(png, "PNG")
            write({args.out / "tokens.png": png.getvalue()})
            print(f"{len(bpe.bytes)} tokens, {had['bytes'] / had['tokens']:.3f} bytes per token: vocab.json, "
                  f"merges.txt, ranks.tiktoken, tokens.png in {args.out}")

def find_or_train(args, log):
    """The run folder's tokenizer, trained first if there is none -> BPE, what settings.json has. ValueError if it was
    made otherwise."""
    path, job = args.out / "settings.json", args.encode or args.decode
    text = None if args.text == "docstrings" else load_text(args.text)
    name = fingerprint(text) if text else f"docstrings of Python {platform.python_version()}"
    wanted = dict(text=name, vocab=args.vocab, special=list(dict.fromkeys(args.special)))
    flags = dict(text=args.text != "docstrings", vocab=args.vocab != 4096, special=bool(args.special))
    if not args.fresh and any((args.out / name).exists() for name in ("vocab.json", "encoder.json")):
        bpe, had = BPE.load(args.out), {}
        if path.exists():
            try:
                had = json.loads(path.read_bytes())
                files = [(args.out / name).read_text("utf-8") for name in ("vocab.json", "merges.txt")]
                if had["made"] != fingerprint("".join(files)):
                    raise ValueError("it was written for another vocab.json or merges.txt")
                had["bytes"] / had["tokens"]
            except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as e:
                raise ValueError(f"{path}: damaged ({e}); --fresh trains anew over it") from None
        for name in wanted:
            if had.get(name) != wanted[name] and (flags[name] or not job):  # to encode, no flag need be given again
                raise ValueError(f"{args.out}: made with {name} {had.get(name)}, not {wanted[name]}; "
                                 "--fresh trains anew over it, --out elsewhere keeps it")
        return bpe, had
    text = text or load_text()
    print(f"{len(text.encode()) / 1e6:.2f} MB of text from {args.text}", file=log)
    bpe = BPE.train(text, args.vocab, args.special)
    had = dict(wanted, bytes=len(text.encode()), tokens=len(bpe.encode(text)))
    if len(bpe.bytes) < args.vocab:
        print(f"no pair is left in this text after {len(bpe.merges)} merges", file=log)
    bpe.save(args.out, had)
    return bpe, had

def fingerprint(text):
    """By which a text is known again: twelve digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]

if __name__ == "__main__":
    main()
