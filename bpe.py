# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
r"""Byte-pair encoding (BPE): a tokenizer that learns its tokens by merging the most frequent pairs.

At first each byte of a text is a token. Training repeatedly merges the most frequent pair of
adjacent tokens into a new token. The file reads and writes the files of GPT-2 and tiktoken; with
GPT-2's files it gives GPT-2's ids.

Paper: Sennrich, Haddow, Birch, "Neural Machine Translation of Rare Words with Subword Units", 2016,
arXiv:1508.07909. Bytes as in Radford et al., "Language Models are Unsupervised Multitask Learners",
2019 (GPT-2).

symbol        in the code     meaning
w             word            a pre-token (a word with its leading space, say) as a list of tokens
w_i           word[i]         its i-th token, a bytes object
n_w           n_w             how often w occurs in the text
n(a, b)       counts[a, b]    how often token b follows token a within words
ab            a + b           the token that the merge of a and b produces
rank(a, b)    ranks[a, b]     position of the merge in the order of learning, from 0; ∞ if (a, b) is
                              not among the merges
id            tokens[a]       number of a token: 0 .. 255 the bytes in GPT-2's order ("!" is 0, the
                              space 220), then a new one for each merge, then the special tokens
bytes(id)     bytes[id]       the token with this id

Splitting. Merges never cross pre-token boundaries. GPT-2 splits a text with the regular expression
whose alternatives are, in this order,

  (1)  's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

where \p{L} is a letter of Unicode and \p{N} a number. Because of (?!\S), the last space of a run is
left to the word that follows.

Training. Pairs are counted over the distinct words, each weighted by its frequency:

  (2)  n(a, b) = Σ_w n_w · #{i : w_i = a, w_{i+1} = b}

The next merge is the most frequent pair,

  (3)  (a, b) = arg max n(a, b),  ties go to the smallest (a, b), compared by their ids

and in every word, from left to right, each a b is replaced by the new token:

  (4)  a b → ab

so that a a a becomes aa a. If a text holds the word low 5 times and lower twice, (l, o) and (o, w)
occur 7 times each. The id of l is the smaller one, so l o is merged first, then lo w. Of (low, e)
and (e, r), which remain, (e, r) wins the same way: the merges are l o, lo w, e r, low er.

Encoding. The merges are repeated, in the order in which they were learned. In each word, apply the
earliest-learned merge that is possible, leftmost first, until none is left:

  (5)  i = arg min_j rank(w_j, w_{j+1}), the leftmost of equals,  w_i w_{i+1} → their merge

Decoding. A token is the bytes that were merged into it, so a text is the bytes of its tokens:

  (6)  bytes(id_1, ..., id_m) = bytes(id_1) ... bytes(id_m)

Pitfalls:
- A token may be part of a character: only the whole sequence needs to decode as UTF-8. Errors
  become U+FFFD.
- Encoding is not greedy: the longest token that fits is often not the one that the merges make.
- Of equal pairs the leftmost comes first. Break it: in merge_steps(), replace `pairs.index(best)`
  by `len(pairs) - 1 - pairs[::-1].index(best)` and test_bpe_eq5_any_list_of_merges fails.
- The name of a special token is encoded as ordinary text unless it is listed in allowed_special.
- A token that the merges cannot reach is never produced (tiktoken would, for a whole word).
- The files do not name the splitting. If (1) would split a token, the vocabulary was made with
  another splitting and is refused. A finer splitting than (1), such as into single digits, leaves
  no such token and cannot be recognised.
- A rank file (tiktoken's format) stores no merges: the order of its ids is their order. It is not
  written for a tokenizer whose ids are in another order.
- Letters are those of this Python's unicodedata. Python's \s also matches U+001C .. U+001F, which
  are not white space here.

Differences from the paper: bytes instead of characters, the splitting (1), no end-of-word mark.

python bpe.py --vocab 4096           trains in three seconds on 1.78 MB: 3.54 bytes per token
python bpe.py --encode bpe.py        prints the ids of a file; `--decode -` turns ids into text
"""

import argparse
import ast
import base64
import collections
import contextlib
import functools
import hashlib
import heapq
import itertools
import json
import math
import re
import string
import sys
import sysconfig
import unicodedata
import warnings
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


# -------------------------------------------------------------------------------------------------- method ------------
SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space, inside brackets

# BYTES[id] is the byte whose id is 0 .. 255: GPT-2 counts the printable ones first.
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256), *range(33), *range(127, 161), 173]


@functools.cache
def pattern():
    """(1), compiled. Python has no \\p{L}; its \\w is letters, digits, "_" and the numbers that \\d lacks."""
    runs = []  # of these numbers, [first, last]: with each of them listed, the search is eight times as slow
    for char in filter(str.isnumeric, map(chr, range(sys.maxunicode + 1))):
        if unicodedata.category(char) in ("Nl", "No"):
            if runs and ord(char) == ord(runs[-1][1]) + 1:
                runs[-1][1] = char
            else:
                runs.append([char, char])
    numbers = "".join(f"{first}-{last}" for first, last in runs)
    letter = f"[^\\W\\d_{numbers}]"
    number = f"[\\d{numbers}]"
    other = f"(?:[^\\w{SPACES}]|_)"
    words = f"'s|'t|'re|'ve|'m|'ll|'d| ?{letter}+| ?{number}+| ?{other}+"
    return re.compile(f"{words}|[{SPACES}]+(?![^{SPACES}])|[{SPACES}]+")


def pre_tokens(text):
    """The pre-tokens of a text, strings: "I've  1st\\n" -> ["I", "'ve", " ", " 1", "st", "\\n"]."""
    return pattern().findall(text)  # (1)


def split_bytes(raw):
    """The bytes of a word, each a token: b"low" -> [b"l", b"o", b"w"]."""
    return [bytes([byte]) for byte in raw]


def count_pairs(words):
    """n(a, b) of all pairs, {(a, b): n}. words: [(tokens, n_w), ...]."""
    counts = collections.Counter()
    for word, n_w in words:
        for pair in zip(word, word[1:]):
            counts[pair] += n_w  # (2)
    return counts


def merge(word, a, b):
    """A word in which each a b is replaced by ab: [b"a", b"a", b"a"], b"a", b"a" -> [b"aa", b"a"]."""
    merged = []
    i = 0
    while i < len(word):
        if word[i : i + 2] == [a, b]:
            merged.append(a + b)  # (4)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def learn_merges(words, n):
    """The first n merges, [(a, b), ...]; fewer if no pair is left. words: {bytes: n_w}."""
    ids = {bytes([byte]): i for i, byte in enumerate(BYTES)}
    words = [(split_bytes(word), n_w) for word, n_w in words.items()]
    merges = []
    while len(merges) < n and (counts := count_pairs(words)):
        a, b = min(counts, key=lambda pair: (-counts[pair], ids[pair[0]], ids[pair[1]]))  # (3)
        words = [(merge(word, a, b), n_w) for word, n_w in words]
        ids[a + b] = len(ids)
        merges.append((a, b))
    return merges


def merge_steps(word, ranks):
    """Yields the tokens of a word after each merge: first its single bytes, last the tokens that encode it.

    word: bytes; ranks: {(a, b): rank}. b"lower" -> [l, o, w, e, r], [lo, w, e, r], [low, e, r], [low, er], [lower]."""
    word = split_bytes(word)
    yield word
    while True:
        pairs = list(zip(word, word[1:]))
        best = min(pairs, key=lambda pair: ranks.get(pair, math.inf), default=None)  # (5)
        if best not in ranks:
            return
        i = pairs.index(best)  # (5)
        word = [*word[:i], word[i] + word[i + 1], *word[i + 2 :]]
        yield word


class BPE:
    """A tokenizer. tokens: {bytes: id}, all 256 single bytes among them; merges: [(a, b), ...], pairs of bytes, the
    first learned first (if a pair is listed twice, the later rank counts); special: {name: id}.

    bytes: {id: bytes}, of the special tokens as well. ValueError if the three do not fit together."""

    def __init__(self, tokens, merges, special=()):
        self.tokens = dict(tokens)
        self.merges = list(merges)
        self.special = dict(special)
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.bytes = {i: raw for raw, i in self.tokens.items()} | {i: name.encode() for name, i in self.special.items()}
        needed = {*SINGLE, *itertools.chain(*self.merges), *(a + b for a, b in self.merges)}
        missing = needed - self.tokens.keys()
        if missing:
            raise ValueError(f"the bytes or the merges need the token {min(missing)!r}, which is not there")
        if len(self.bytes) < len(self.tokens) + len(self.special):
            raise ValueError("two tokens have the same id")
        for i in self.bytes:
            if not isinstance(i, int) or i < 0:
                raise ValueError(f"an id must be an integer from 0 on, not {i!r}")
        for name in self.special:
            if not name or name.encode() in self.tokens:
                raise ValueError(f"special token {name!r}: it has no name, or is an ordinary token as well")
        self.encoder = Encoder(self.tokens, self.ranks)

    @classmethod
    def train(cls, text, vocab_size, special=()):
        """Learns vocab_size tokens from a text, the 256 bytes and the special tokens among them; fewer if no pair is
        left. ValueError if vocab_size cannot hold those."""
        special = list(dict.fromkeys(special))
        n = vocab_size - 256 - len(special)
        if n < 0:
            raise ValueError(f"--vocab {vocab_size}: cannot hold 256 bytes and {len(special)} special tokens")
        merges = learn_merges_fast(count_words(text), n)  # learn_merges() gives the same
        tokens = [*split_bytes(BYTES), *(a + b for a, b in merges)]
        ids = {raw: i for i, raw in enumerate(tokens)}
        return cls(ids, merges, {name: i for i, name in enumerate(special, start=len(ids))})

    def encode(self, text, allowed_special=()):
        """The ids of a text, a list. The names in allowed_special (or "all") are encoded as special tokens, all else
        is ordinary text.

        ValueError for a name that is no special token, and for a lone surrogate, which UTF-8 cannot encode."""
        allowed = list(self.special if allowed_special == "all" else allowed_special)
        for name in allowed:
            if name not in self.special:
                raise ValueError(f"{name!r} is not a special token; there are {list(self.special)}")
        if not allowed:
            return self.encoder(text)  # fast; plainly, the last of merge_steps() for each of pre_tokens()
        names = "|".join(re.escape(name) for name in sorted(allowed, key=len, reverse=True))
        ids = []
        for i, part in enumerate(re.split(f"({names})", text)):  # every second part is a name
            ids += [self.special[part]] if i % 2 else self.encoder(part)
        return ids

    def decode_bytes(self, ids):
        """The bytes of the tokens with these ids, joined. ValueError for an id that no token has."""
        try:
            return b"".join(map(self.bytes.__getitem__, ids))  # (6)
        except KeyError as e:
            raise ValueError(f"no token has the id {e}; the largest is {max(self.bytes)}") from e

    def decode(self, ids):
        """The text of these ids. Bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def save(self, folder, settings=None):
        """Saves GPT-2's vocab.json and merges.txt, and ranks.tiktoken, which has no place for special tokens. It is
        left out, with a warning, if the merges are not in the order of the ids. settings: a dict for settings.json.

        ValueError if vocab.json cannot hold the name of a special token."""
        save_files(Path(folder), tokenizer_files(self, settings))

    @classmethod
    def load(cls, path):
        """The tokenizer in a folder with vocab.json and merges.txt (or encoder.json and vocab.bpe, GPT-2's own names),
        or in a rank file. Tokens of the vocabulary that no merge makes are special.

        OSError if a file is missing; ValueError if it is damaged or was made with another splitting than (1)."""
        path = Path(path)
        try:
            parts = load_ranks(path) if path.is_file() else load_folder(path)
            tokenizer = cls(*parts)
        except (LookupError, TypeError, ValueError) as e:
            raise ValueError(f"{path}: not a tokenizer, or a damaged one ({e})") from e
        check_splitting(path, tokenizer.tokens)
        tokenizer.encoder.prepare(tokenizer.tokens)
        return tokenizer


# ------------------------------------------------------------------------------------------ the same, fast ------------
# Training. The first counts are those of (2). A merge changes only the counts of its neighbours: where x a b y becomes
# x ab y, the pairs (x, a) and (b, y) lose n_w, and (x, ab) and (ab, y) gain it. A heap holds (-n, pair). Counts in it
# can only fall, so a stale entry is never too low: if the top is stale, it is replaced with its true count, and the
# first top that is up to date is (3). Learning 100 merges from 1 MB of text takes a sixtieth of the time or less.
#
# Encoding. A text is cut into pieces that recur, and each is split by (1) and encoded only once. A cut before a space
# or newline is always a boundary of (1), except inside a run of white space; runs of three or more (two at the end) are
# therefore taken out first, each with the characters after it. On 0.2 MB, this is ten times as fast as merge_steps()
# for each pre-token, and 75 times once the pieces are known.
SINGLE = split_bytes(range(256))
PUNCTUATION = string.punctuation.encode()
IDS = bytes(BYTES.index(byte) for byte in range(256))  # byte -> id, for bytes.translate
ASCII = re.compile(rb"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^A-Za-z0-9\t-\r ]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+")
BLANK = bytes.maketrans(b"\t\n\v\f\r", b" " * 5)
RARE = frozenset(re.findall(f"[{SPACES}]", "".join(map(chr, range(0x80, 0x3001)))))  # white space beyond ASCII
RUN = re.compile(rb"  (?: +[^ ]*|\Z)")  # in a text whose white space is all b" "


def split(raw):
    """pre_tokens() of a text in UTF-8. The pattern for ASCII takes a third of the time of (1)."""
    if raw.isascii():
        return ASCII.findall(raw)  # (1)
    return [word.encode() for word in pre_tokens(raw.decode())]


def cut(text):
    """Yields lists [head, piece, ...] of parts of a text in UTF-8, which begin and end at pre-token boundaries.

    A head is as it is in the text; a piece lacks its leading space, which whole() restores."""
    raw = text.encode()
    blank = raw.translate(BLANK)  # the text with all white space as b" "
    others = "" if raw.isascii() else raw.translate(None, bytes(range(128))).decode()
    for space in RARE.intersection(others):
        blank = blank.replace(space.encode(), b" " * len(space.encode()))
    done = 0
    for run in RUN.finditer(blank):
        yield raw[done : run.start()].replace(b"\n", b" \n").split(b" ")
        yield [raw[run.start() : run.end()]]
        done = run.end()
    yield raw[done:].replace(b"\n", b" \n").split(b" ")


def whole(piece):
    """A piece as it is in the text."""
    return piece if piece[:1] == b"\n" else b" " + piece


def count_words(text):
    """{pre-token in UTF-8: n_w}, the counts of collections.Counter(pre_tokens(text))."""
    chunks = collections.Counter()
    pieces = collections.Counter()
    for head, *rest in cut(text):
        chunks[head] += 1
        pieces.update(rest)
    for piece, n in pieces.items():
        chunks[whole(piece)] += n
    words = collections.Counter()
    for chunk, n in chunks.items():
        for word in split(chunk):
            words[word] += n
    return words


def learn_merges_fast(words, n):
    """The same merges as those of learn_merges().

    All words are concatenated in ids, with -1 between them. A token of several bytes has its id at its first byte, and
    -2 where its right half began; ends[i] is the token that ends just before i. Two ids are packed into one pair as
    a << 32 | b, whose order is that of (3)."""
    ids = [-1]
    times = [0]  # n_w of the word at each place
    for word, n_w in words.items():
        ids += [*word.translate(IDS), -1]
        times += [n_w] * (len(word) + 1)
    ends = [-1, *ids[:-1]]
    places = collections.defaultdict(list)
    for i, (a, b) in enumerate(zip(ids, ids[1:])):
        if a >= 0 and b >= 0:
            places[a << 32 | b].append(i)
    n_at = times.__getitem__
    counts = {pair: sum(map(n_at, where)) for pair, where in places.items()}  # (2)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    tokens = split_bytes(BYTES)
    length = [1] * 256
    merges = []
    while heap and len(merges) < n:
        count, pair = heap[0]
        if counts[pair] == 0:
            heapq.heappop(heap)
            continue
        if counts[pair] != -count:
            heapq.heapreplace(heap, (-counts[pair], pair))
            continue
        a, b = divmod(pair, 1 << 32)  # (3)
        ab = len(tokens)
        merges.append((tokens[a], tokens[b]))
        tokens.append(tokens[a] + tokens[b])
        length.append(length[a] + length[b])
        before = collections.defaultdict(list)  # {x: places of x in x ab}
        after = collections.defaultdict(list)  # {y: places of ab in ab y}
        to_b = length[a]  # from the place of a to that of b
        to_y = length[ab]
        for i in places.pop(pair):
            if ids[i] == a and ids[i + to_b] == b:  # else an earlier merge took one of the two
                ids[i] = ends[i + to_y] = ab  # (4)
                ids[i + to_b] = -2
                x = ends[i]
                before[x].append(i - length[x])
                after[ids[i + to_y]].append(i)
        neighbours = [(b << 32 | y, ab << 32 | y, where) for y, where in after.items() if y >= 0]
        neighbours += [(x << 32 | a, x << 32 | ab, where) for x, where in before.items() if x >= 0]
        for old, new, where in neighbours:
            gain = sum(map(n_at, where))
            counts[old] -= gain
            counts[new] = gain
            places[new] = where
            heapq.heappush(heap, (-gain, new))
        counts[pair] = 0
    return merges


def merge_word(ids, pairs, made):
    """Merges a list of ids as merge_steps() merges bytes. pairs: {(id, id): rank}; made: {rank: id of the new token}.

    One scan per merge is fast for short words; long ones use a heap."""
    if len(ids) > 100:
        return merge_long(ids, pairs, made)
    get = pairs.get
    none = sys.maxsize
    ids = [*ids, -1]  # -1, at the end, is no id
    ranks = [*map(get, zip(ids, ids[1:]), itertools.repeat(none)), none]  # of each token with the one after it
    while (rank := min(ranks)) < none:
        i = ranks.index(rank)
        ids[i] = made[rank]  # (5)
        del ids[i + 1], ranks[i + 1]
        ranks[i - 1] = get((ids[i - 1], ids[i]), none)  # if i is 0, this pair begins with the -1 at the end
        ranks[i] = get((ids[i], ids[i + 1]), none)
    return ids[:-1]


def merge_long(ids, pairs, made):
    """The same as merge_word() in O(n log n): a heap holds (rank, i) of all pairs, some of them stale."""
    n = len(ids)
    ids = [*ids, -1]  # -1 is no id: the end, or a token that was merged into the one before it
    left = list(range(-1, n))  # left[0] is -1: the place of the -1 at the end
    right = list(range(1, n + 1))
    heap = []

    def push(i):
        rank = pairs.get((ids[i], ids[right[i]]))
        if rank is not None:
            heapq.heappush(heap, (rank, i))

    for i in range(n - 1):
        push(i)
    while heap:
        rank, i = heapq.heappop(heap)
        j = right[i]
        if pairs.get((ids[i], ids[j])) == rank:
            ids[i] = made[rank]  # (5)
            ids[j] = -1
            right[i] = right[j]
            left[right[i]] = i
            push(left[i])
            push(i)
    return [i for i in ids if i >= 0]


class Cache(dict):
    """A dict that computes missing values with find() and keeps those of short keys, at most 2^20 of them."""

    def __init__(self, find):
        self.find = find

    def __missing__(self, key):
        value = self.find(key)
        if len(key) <= 64 and len(self) < 1 << 20:
            self[key] = value
        return value


class Encoder:
    """Text -> list of ids: those of the last of merge_steps() for each of its pre_tokens()."""

    def __init__(self, tokens, ranks):
        self.first = [tokens[raw] for raw in SINGLE]
        self.pairs = {(tokens[a], tokens[b]): rank for (a, b), rank in ranks.items()}
        self.made = {rank: tokens[a + b] for (a, b), rank in ranks.items()}
        # Three caches, each from bytes to a tuple of ids:
        self.words = Cache(self.encode_word)
        self.heads = Cache(self.encode_head)
        self.pieces = Cache(self.encode_piece)

    def __call__(self, text):
        ids = []
        for pieces in cut(text):
            ids += self.heads[pieces.pop(0)]
            for found in map(self.pieces.__getitem__, pieces):
                ids += found
        return ids

    def encode_word(self, word):
        return tuple(merge_word([*map(self.first.__getitem__, word)], self.pairs, self.made))

    def encode_head(self, head):
        return tuple(itertools.chain.from_iterable(map(self.words.__getitem__, split(head))))

    def encode_piece(self, piece):
        """A word and the punctuation after it, the usual case, need no pattern: 1.1 to 1.2 times as fast."""
        word = piece.rstrip(PUNCTUATION)
        if not word.isalpha():
            return self.encode_head(whole(piece))
        if word == piece:
            return self.encode_word(b" " + piece)
        return self.pieces[word] + self.words[piece[len(word) :]]

    def prepare(self, tokens):
        """Encodes each token once, so that even the first text is encoded fast: half a second for GPT-2's 50257."""
        for raw in tokens:
            self(raw.decode("utf-8", "ignore"))


# --------------------------------------------------------------------------------------------------- files ------------
# vocab.json names a token by one character for each of its bytes. A printable byte is its own character; the other 68
# are the characters from U+0100 on, in the order of BYTES.
NAMES = dict(zip(BYTES, map(chr, [*BYTES[:188], *range(256, 324)])))
BYTE_OF = {char: byte for byte, char in NAMES.items()}


def to_name(raw):
    """A token as vocab.json and merges.txt name it: b" the" -> "Ġthe"."""
    return "".join(map(NAMES.__getitem__, raw))


def from_name(name):
    """The bytes of a token from its name. KeyError if the name has another character."""
    return bytes(map(BYTE_OF.__getitem__, name))


def special_name(name):
    """The name of a special token from that in vocab.json, where Ġ stands for a space; "日" stays as it is."""
    try:
        return from_name(name).decode()
    except (KeyError, UnicodeDecodeError):
        return name


def read_json(path):
    """The dict in a JSON file. ValueError if it holds none."""
    try:
        found = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not JSON, or damaged ({e})") from e
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a JSON object")
    return found


def find_files(folder):
    """[vocabulary, merges]: their paths in a folder, under our names or GPT-2's own. None if there is no vocabulary."""
    for names in ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"):
        if (folder / names[0]).exists():
            return [folder / name for name in names]


def load_folder(folder):
    """(tokens, merges, special) from a folder with a vocabulary and its merges."""
    paths = find_files(folder)
    if paths is None:
        raise FileNotFoundError(f"{folder}: there is no vocab.json or encoder.json")
    vocab = read_json(paths[0])
    lines = paths[1].read_text("utf-8-sig").split("\n")
    if lines[0].startswith("#version"):
        del lines[0]
    merges = []
    for line in filter(None, lines):
        a, b = line.split()
        merges.append((from_name(a), from_name(b)))
    names = {to_name(raw): raw for raw in [*SINGLE, *(a + b for a, b in merges)]}
    tokens = {names[name]: i for name, i in vocab.items() if name in names}
    special = {special_name(name): i for name, i in vocab.items() if name not in names}
    return tokens, merges, special


def load_ranks(path):
    """(tokens, merges) from a rank file. ValueError if the order of its tokens is not an order of merges."""
    lines = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
    tokens = {base64.b64decode(raw, validate=True): int(rank) for raw, rank in lines}
    merges = merges_by_id(tokens)
    for parts in merges:
        if len(parts) != 2:
            raise ValueError(f"token {b''.join(parts)!r} is not a merge of two older ones: not in the order of merges")
    return tokens, merges


def merges_by_id(tokens):
    """[parts, ...] for the tokens of several bytes, in the order of their ids: what the earlier merges leave of the
    bytes of each. If there are two parts, the token is their merge."""
    pairs = {}
    made = []
    for raw in sorted(tokens, key=tokens.get):
        if len(raw) > 1:
            parts = merge_word([tokens[byte] for byte in split_bytes(raw)], pairs, made)
            pairs[tuple(parts)] = len(made)
            made.append(tokens[raw])
    bytes_of = {i: raw for raw, i in tokens.items()}
    return [tuple(bytes_of[i] for i in parts) for parts in pairs]


def check_splitting(path, tokens):
    """ValueError if a token crosses a boundary of (1), which GPT-2's splitting cannot produce."""
    for raw in tokens:
        text = raw.decode("utf-8", "ignore")  # without the parts of characters at its ends
        words = pre_tokens(text)
        if len(words) > 1 and text not in ("'l", "'r", "'v"):  # these are parts of 'll, 're, 've
            parts = " and ".join(map(repr, words))
            reason = f"GPT-2 splits its token {text!r} into {parts}"
            raise ValueError(f"{path}: made with another splitting, which is not supported ({reason})")


def tokenizer_files(tokenizer, settings=None):
    """{file name: text} of a tokenizer, as BPE.save() describes them."""
    tokens = tokenizer.tokens
    names = {to_name(raw): i for raw, i in tokens.items()}
    for name in tokenizer.special:
        if name in names or special_name(name) != name:
            raise ValueError(f"special token {name!r}: vocab.json has no way to tell it from an ordinary one")
    merges = [f"{to_name(a)} {to_name(b)}\n" for a, b in tokenizer.merges]
    files = {"merges.txt": "#version: 0.2\n" + "".join(merges)}
    if merges_by_id(tokens) == tokenizer.merges:
        ranks = [f"{base64.b64encode(raw).decode()} {tokens[raw]}\n" for raw in sorted(tokens, key=tokens.get)]
        files["ranks.tiktoken"] = "".join(ranks)
    else:
        warnings.warn("ranks.tiktoken is left out: its ids would not be in the order of the merges", stacklevel=3)
    if settings:
        files["settings.json"] = json.dumps(settings)
    vocab = names | tokenizer.special
    vocab = {name: vocab[name] for name in sorted(vocab, key=vocab.get)}
    files["vocab.json"] = json.dumps(vocab, ensure_ascii=False)
    return files


def save_files(folder, files):
    """Saves {file name: text}, vocab.json last: a folder without it has no tokenizer, so none is ever half saved."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: folder / f"{name}.part" for name in files}
    try:
        for name, part in parts.items():
            part.write_bytes(files[name].encode())  # a full disk leaves the old files as they were
        for name in ("vocab.json", "ranks.tiktoken", "settings.json"):
            (folder / name).unlink(missing_ok=True)
        for name, part in parts.items():
            part.replace(folder / name)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- command ------------
SENTENCE = "The tokenizer's 2024 dictionary: antidisestablishmentarianism, naïve café, don't   panic! f(x) = x**2"
COLOURS = (252, 213, 180), (196, 225, 255), (205, 240, 200), (235, 210, 245), (250, 240, 170)


def printable(raw):
    """A token as readable text: a newline becomes \\n, and a byte of an incomplete character \\xe2 or the like."""
    return raw.decode("utf-8", "backslashreplace").replace("\n", "\\n")


def draw_tokens(path, tokens):
    """Saves a picture of strings, each on a coloured background, in lines 36 pixels high."""
    font = ImageFont.load_default(22)
    image = Image.new("RGB", (760, 36 * (len(tokens) + 1)), "white")  # high enough, cropped at the end
    draw = ImageDraw.Draw(image)
    x = y = 12
    for token, colour in zip(tokens, itertools.cycle(COLOURS)):
        w = max(4, round(font.getlength(token)))
        if x + w > 748:
            x = 12
            y += 36
        draw.rectangle((x, y, x + w - 1, y + 29), colour)
        draw.text((x, y + 2), token, "black", font)
        x += w
    image.crop((0, 0, 760, y + 44)).save(path)


def show(tokenizer, out):
    """Prints the first and the longest tokens, the merges of a word, and a sentence in tokens; draws tokens.png."""
    made = [a + b for a, b in tokenizer.merges]
    print("first merges:", *(repr(printable(raw)) for raw in made[:12]))
    print("longest:", *(repr(printable(raw)) for raw in sorted(made, key=len, reverse=True)[:6]))
    print("merges of a word:")
    for word in merge_steps(b" tokenizer", tokenizer.ranks):
        print("  " + "|".join(map(printable, word)))
    tokens = [printable(tokenizer.bytes[i]) for i in tokenizer.encode(SENTENCE)]
    print("|".join(tokens))
    draw_tokens(out / "tokens.png", tokens)


def fingerprint(text):
    """The SHA-256 of a text, which identifies it."""
    return hashlib.sha256(text.encode()).hexdigest()


def load_trained(parser, argv, out):
    """The tokenizer in a run folder and its settings. ValueError if a flag asks for another one."""
    path = out / "settings.json"
    settings = read_json(path) if path.exists() else {}
    made = {"text": None, "vocab": None, "special": []} | settings  # a folder of GPT-2's files has no settings
    parser.set_defaults(text=None, vocab=made["vocab"], special=made["special"])
    args = parser.parse_args(argv)
    special = list(dict.fromkeys(args.special))
    differ = []
    if args.vocab != made["vocab"]:
        differ.append(f"vocab {made['vocab']}, not {args.vocab}")
    if special != made["special"]:
        differ.append(f"special {made['special']}, not {special}")
    if args.text and fingerprint(load_text(args.text)) != made["text"]:
        differ.append("another text")
    if differ:
        reason = "; ".join(differ)
        raise ValueError(f"{out}: made with {reason}; --fresh trains from scratch, another --out keeps it")
    return BPE.load(out), settings


def train(args, log):
    """Trains a tokenizer, saves it in the run folder, and returns it and its settings."""
    text = load_text(args.text)
    size = len(text.encode())
    print(f"{size / 1e6:.2f} MB of text from {args.text}", file=log)
    tokenizer = BPE.train(text, args.vocab, args.special)
    if len(tokenizer.bytes) < args.vocab:
        print(f"no pair is left in this text after {len(tokenizer.merges)} merges", file=log)
    settings = dict(text=fingerprint(text), vocab=args.vocab, special=list(tokenizer.special))
    settings |= dict(bytes=size, tokens=len(tokenizer.encode(text)))
    tokenizer.save(args.out, settings)
    return tokenizer, settings


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    either = parser.add_mutually_exclusive_group().add_argument
    add("--text", default="docstrings", help="docstrings (of Python), or a UTF-8 file")
    add("--vocab", type=int, default=4096, help="number of tokens, the 256 bytes and the special tokens included")
    add("--special", action="append", default=[], metavar="TOKEN", help="a special token; may be given several times")
    either("--encode", metavar="FILE", help="print only the ids of a UTF-8 file; - is standard input")
    either("--decode", metavar="FILE", help="print only the text of the ids in a file; - is standard input")
    add("--out", type=Path, default=Path("out/bpe"), help="run folder")
    add("--fresh", action="store_true", help="train from scratch over the tokenizer in --out")
    args = parser.parse_args(argv)
    file = args.encode or args.decode
    if file:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    if find_files(args.out) and not args.fresh:
        tokenizer, settings = load_trained(parser, argv, args.out)
    else:
        tokenizer, settings = train(args, sys.stderr if file else sys.stdout)
    if args.encode:
        try:
            print(*tokenizer.encode(raw.decode()))
        except UnicodeDecodeError as e:
            raise ValueError(f"--encode {file}: {e}") from e
    elif args.decode:
        words = raw.split()
        if not all(map(bytes.isdigit, words)):
            raise ValueError(f"--decode {file}: not ids, integers with white space between them")
        sys.stdout.reconfigure(encoding="utf-8", newline="")  # the exact bytes, on any system
        print(tokenizer.decode(map(int, words)), end="")
    else:
        show(tokenizer, args.out)
        rate = f", {settings['bytes'] / settings['tokens']:.3f} bytes per token" if "tokens" in settings else ""
        files = "vocab.json, merges.txt, ranks.tiktoken, tokens.png" if settings else "tokens.png"
        print(f"{len(tokenizer.bytes)} tokens{rate}: {files} in {args.out}")


# ------------------------------------------------------------------------------------------------ plumbing ------------
# Text: the same in every file that uses it, and nothing of the method. You may stop here.
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


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # escapes what the terminal's encoding lacks
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    except (OSError, ValueError) as e:
        sys.exit(" ".join(f"{Path(__file__).name}: {e}".split()))
