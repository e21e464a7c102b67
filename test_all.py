"""The proof: every equation of the thirteen files has a test that bears its number.

python test_all.py                     all tests; ends with "N passed, N failed"
python test_all.py ddim eq5            the tests whose name contains one of the words
pytest test_all.py                     works as well

A test is a claim: its docstring says in one sentence what holds. test_ddim_eq7_tau tests equation (7) in
the docstring of ddim.py, by means that do not share its code: a closed form, an autograd Jacobian, an
exhaustive sum, torch's own layer, a number printed in a paper, Monte Carlo with its error.

Contents
    helpers                    comparing, refusals, running a command, images
    the repository             copies do not drift, equations are tagged and tested, README, files alone
    runs                       stop, resume, kill, save
    bad input                  values, checkpoints, data
    data                       download, IDX files, pictures, digits, grids, progress
    training                   for all that train on images: sees, weighs, averages, learns, torchrun
    a pretended GPU            each command runs whole on it, and training never waits for it
    bpe.py ... checkpointing.py    a block for each file, in the order of the README

The environment variables MNIST and GPT2 may name the folders of MNIST and of GPT-2's vocabulary; without
them the tests that need these are skipped. Nothing here needs a network or a GPU.
"""

import argparse
import ast
import base64
import collections
import concurrent.futures
import contextlib
import copy
import functools
import gzip
import hashlib
import http.server
import importlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
import traceback
import types
import unicodedata
import unittest
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributions as D
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageSequence
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
torch.set_num_threads(1)
NAMES = "gan vae nice realnvp pixelcnn cpc bpe word2vec rnn ddpm ddim rectified_flow checkpointing".split()
MODULES = {name: importlib.import_module(name) for name in NAMES}
gan, vae, nice, realnvp, pixelcnn, cpc, bpe, word2vec, rnn, ddpm, ddim, rectified_flow, checkpointing = MODULES.values()


# ------------------------------------------------------------------------------------------------- helpers ------------
def each(*names):
    """Makes a test of one module a test for each of these files: test_x_ddpm, test_x_ddim, ..."""

    def decorate(test):
        for name in names:
            one = functools.partial(test, MODULES[name])
            globals()[f"{test.__name__}_{name}"] = functools.update_wrapper(one, test)

    return decorate


def near(got, want, atol=0.0, rtol=0.0):
    """Both as float64, and equal to within atol + rtol |want|, every element."""
    got, want = (torch.as_tensor(v, dtype=torch.float64) for v in (got, want))
    torch.testing.assert_close(got, want.expand_as(got), atol=atol, rtol=rtol)


def same(a, b):
    """Equal to the last bit, through dicts, lists and tensors."""
    if isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b) and (not isinstance(a, dict) or a.keys() == b.keys())
        for key in a if isinstance(a, dict) else range(len(a)):
            same(a[key], b[key])
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, (a, b)


def raises(say, function, *args, kind=ValueError, **kwargs):
    """It raises an error of this kind, whose message matches the pattern `say`."""
    try:
        result = function(*args, **kwargs)
    except kind as e:
        assert re.search(say, str(e)), e
    else:
        raise AssertionError(f"{args} gave {result}")


@contextlib.contextmanager
def workdir():
    """An empty working directory that is deleted afterwards."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as here:
        os.chdir(here)
        try:
            yield Path(here).resolve()
        finally:
            os.chdir(before)


def quiet(function, *args, **kwargs):
    """What the function returns; what it prints is dropped."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args, **kwargs)


def call(module, words):
    """Runs module.main(words) under the file's own guard -> exit status, stdout, stderr."""
    status, out, err = 0, io.StringIO(), io.StringIO()
    source = Path(module.__file__).read_text("utf-8")
    guard = source[source.index('if __name__ == "__main__":') :].replace("main()", "main(words)")
    scope = {**vars(module), "__name__": "__main__", "words": [str(word) for word in words]}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        out.reconfigure = lambda **kw: None
        try:
            exec(guard, scope)
        except SystemExit as e:
            status = e.code or 0
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
        except (Exception, KeyboardInterrupt):
            status = 1
            traceback.print_exc()
    return status, out.getvalue(), err.getvalue()


def normal(*shape, seed=0):
    """Standard normal float64 numbers from a generator of their own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def woken(model, seed=0):
    """The model with all weights random, as if trained: layers that start at zero do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() == 1 else p[0].numel() ** -0.5))
    return model


def jacobian(function, x):
    """The Jacobian of function at x by autograd -> (outputs, inputs)."""
    J = torch.autograd.functional.jacobian(function, x, vectorize=True)
    return J.reshape(-1, x.numel())


class Watched(list):
    """A network that keeps what it was asked: (x, t) of each call."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x, t):
        self.append((x, t.tolist()))
        return self.model(x, t)


def grey(here, n=20, size=8):
    """Writes n grey random pictures into here/pics."""
    (here / "pics").mkdir(parents=True)
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (n, size, size), dtype=np.uint8)):
        Image.fromarray(pixels).save(here / "pics" / f"{i:03}.png")


def tiles(path, size=8):
    """The images of a saved grid of square grey ones, row by row -> uint8 (rows, columns, size, size)."""
    sheet = np.array(Image.open(path))[:: 64 // (size + 2), :: 64 // (size + 2)]
    sheet = np.pad(sheet, ((0, 2), (0, 2)))
    sheet = sheet.reshape(-1, size + 2, sheet.shape[1] // (size + 2), size + 2).transpose(0, 2, 1, 3)
    return sheet[:, :, :size, :size]


def alike(got, want):
    """Images whose float32 sums were taken in another order: a byte may round to its neighbour."""
    want = np.asarray(want).reshape(got.shape)
    assert np.abs(got.astype(int) - want.astype(int)).max() <= 1


def idx(array, kind=8):
    """The bytes of an IDX file that holds this array: uint8 (kind 8) or int32 (kind 12)."""
    return bytes([0, 0, kind, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


SOURCES = {name: (HERE / f"{name}.py").read_text("utf-8") for name in NAMES}
IMAGES = [name for name in NAMES if hasattr(MODULES[name], "load_images")]
RESUMES = [name for name in NAMES if hasattr(MODULES[name], "iterations")]
ONE = ddim  # the plumbing is the same text in every file, so it is tested in one


# ------------------------------------------------------------------------------------------ the repository ------------
METHOD = {
    "train",
    "sample",
    "load",
    "main",
    "log_prob",
    "dequantise",
    "draw_film",
    "encode",
    "decode",
    "evaluate",
    "image_bits",
}  # a method's own, in its file


def definitions(source):
    """{name: its source, decorators and comments included} of all that a file defines at its top level."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        targets = [n for target in getattr(node, "targets", []) for n in ast.walk(target)]
        names = [node.name] if hasattr(node, "name") else [n.id for n in targets if isinstance(n, ast.Name)]
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        found |= dict.fromkeys(names, "\n".join(lines[first - 1 : node.end_lineno]))
    return found


def drifted(sources):
    """(name, file) of what two files define differently, though it is no name of a method."""
    first, found = {}, set()
    for file, source in sources.items():
        for name, text in definitions(source).items():
            if first.setdefault(name, text) != text and name not in METHOD:
                found.add((name, file))
    return found


def test_repo_copies_do_not_drift():
    """What several files define under one name is the same text in all of them, and a difference would be found."""
    assert not drifted(SOURCES), drifted(SOURCES)
    text = "A = 1\n\n@wrap\ndef f(x, n=2):\n    # why\n    return x\n"
    for old, new in ("A = 1", "A = 2"), ("@wrap\n", ""), ("n=2", "n=3"), ("# why", "# how"), ("return x", "return  x"):
        assert drifted({"a": text, "b": text.replace(old, new)}) and not drifted({"a": text, "b": text})


@each(*NAMES)
def test_repo_form(module):
    """A file stands alone, its equations are numbered, tagged and tested, and every flag and parameter is used."""
    name, source = module.__name__, SOURCES[module.__name__]
    tree = ast.parse(source)
    imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported <= (set(sys.stdlib_module_names) | {"torch", "numpy", "PIL"}) - set(NAMES), imported
    assert source.startswith("# /// script\n# requires-python") and "# SPDX-License-Identifier: MIT" in source[:300]

    stated = [int(k) for k in re.findall(r"^  +\((\d+)\) ", module.__doc__, re.M)]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    tagged = {int(k) for t in tokens if t.type == tokenize.COMMENT for k in re.findall(r"\((\d+)\)", t.string)}
    tests = " ".join(test for test in globals() if test.startswith(f"test_{name}_"))
    tested = {int(k) for part in re.findall(r"eq[\d_eq]*\d", tests) for k in re.findall(r"\d+", part)}
    assert stated == [*range(1, len(stated) + 1)] and tagged == set(stated) == tested, (stated, tagged, tested)
    doc = module.__doc__.splitlines()
    assert max(map(len, doc)) <= 100 and len(doc) <= 95 and "Pitfalls:" in doc, len(doc)

    read = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "args"}
    assert {action.dest for action in options(module).values()} <= read | {"fresh"}
    nodes = [*tree.body, *(n for c in tree.body if isinstance(c, ast.ClassDef) for n in c.body)]
    for f in (node for node in nodes if isinstance(node, ast.FunctionDef)):
        used = {n.id for n in ast.walk(f) if isinstance(n, ast.Name)} | {"self", "cls", "root"}  # root: for autograd
        assert {a.arg for a in f.args.posonlyargs + f.args.args + f.args.kwonlyargs} <= used, f.name
    if "train" in vars(module):  # its defaults are those of the flags
        for parameter in inspect.signature(module.train).parameters.values():
            flag = options(module).get("--" + parameter.name.replace("_", "-"))
            if flag and parameter.name not in ("device", "data", "fresh") and parameter.default is not parameter.empty:
                assert flag.default == parameter.default, (parameter, flag.default)
    help_ = " ".join(call(module, ["--help"])[1].split())
    for flag, action in options(module).items():
        assert action.help and (action.nargs == 0 or f"(default: {action.default})" in help_), flag


class Parsed(Exception):
    """Carries a parser out of main, with what it made of the words."""


def parse(module, words):
    """(the flags, the parser) that main makes of the words; main stops there."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        raise Parsed(real(self, args, namespace), self)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args):
        try:
            module.main(list(words))
        except Parsed as e:
            return e.args


@functools.cache
def options(module):
    """{"--name": its action} of the file's command line, --help left out."""
    return {a.option_strings[-1]: a for a in parse(module, [])[1]._actions if a.dest != "help"}


def test_repo_readme():
    """Every command of READMEs and docstrings parses, every link exists, and both READMEs say the same."""
    english, chinese = ((HERE / name).read_text("utf-8") for name in ("README.md", "README.zh-CN.md"))
    command, found = r"\b(?:python3?|torchrun --nproc-per-node \d+) +(\w+\.py)((?: ?[^\s`&|;>]+)*)", {}
    for name, text in ("en", english), ("zh", chinese), *((n, m.__doc__) for n, m in MODULES.items()):
        found[name] = re.findall(command, re.sub(r" *\\\n *", " ", text))
        for file, words in found[name]:
            words = shlex.split(re.split(r"   ", words)[0], comments=True)
            assert file == "test_all.py" or parse(MODULES[Path(file).stem], words), (file, words)
    assert found["en"] == found["zh"] and len(found["en"]) > 30
    for pattern in r"\d+(?:[.,]\d+)*|\.\d+", r"\]\(([^)\s]+)":
        in_english, in_chinese = (collections.Counter(re.findall(pattern, text)) for text in (english, chinese))
        for counter in in_english, in_chinese:
            counter.pop("README.md", 0), counter.pop("README.zh-CN.md", 0)
        assert in_english == in_chinese, (in_english - in_chinese, in_chinese - in_english)
    for link in re.findall(r'\]\(([^)#\s]+)|(?:src|href)="([^"]+)', english + chinese):
        link = "".join(link)
        assert re.match(r"\w+:|\.\./\.\./actions", link) or (HERE / link).exists(), link


def test_repo_readme_python():
    """The README's Python runs: train on one's own pictures, sample, save; checkpoint a block."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text("utf-8"), re.S)
    assert blocks
    with workdir() as here:
        grey(here, 3)
        (here / "pics").rename(here / "photos")
        for code in blocks:
            for a, b in ("size=64", "size=8"), ("iters=2000", "iters=2"), ("64, 64)", "8, 8)"), (", 64,", ", 4,"):
                code = code.replace(a, b)
            quiet(exec, code, {})


ALONE = """
import os, random, runpy, sys, warnings, numpy, torch, torch.optim.swa_utils, PIL.ImageDraw, PIL.ImageFont, PIL.ImageOps
sys.path.insert(0, ""), warnings.simplefilter("error")
state = lambda: (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist(), os.listdir())
for line in sys.stdin:
    folder, name, *words = line.split()
    os.chdir(folder)
    before, sys.argv = state(), ["x", "--no-such-flag"]
    __import__(name)
    assert state() == before, name + ": importing drew random numbers or wrote files"
    sys.argv = [name + ".py", *words]
    warnings.simplefilter("default")
    runpy.run_path(name + ".py", run_name="__main__")
    warnings.simplefilter("error")
    assert set(os.listdir()) == {name + ".py", "run"}, os.listdir()
"""


def test_repo_alone():
    """In an empty folder each file imports silently, and as a script leaves its run folder and nothing else."""
    with workdir() as here:
        inputs(here)
        for name in NAMES:
            (here / name).mkdir()
            (here / name / f"{name}.py").write_text(SOURCES[name], "utf-8")
        words = {name: command(MODULES[name], data=here / "pics", text=here / "words.txt") for name in NAMES}
        lines = "".join(f"{here / name} {name} {shlex.join(words[name])}\n" for name in NAMES)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        python = [sys.executable, "-B", "-c", ALONE]
        child = subprocess.run(python, input=lines, capture_output=True, text=True, env=env)
        assert child.returncode == 0 and not child.stderr, child.stderr
        for name in IMAGES:
            check_run_folder(MODULES[name], here / name / "run", (2, 8, 8))


def check_run_folder(module, out, shape):
    """The files of an image model's run folder are there and hold what they should."""
    head, *rows = (out / "log.csv").read_text().splitlines()
    assert head.startswith("iteration,") and rows and np.isfinite(np.loadtxt(rows, delimiter=",")).all()
    assert torch.load(out / "model.pt", weights_only=True)["settings"]["method"] == module.__name__
    if hasattr(module, "save_samples"):
        samples = np.load(out / "samples.npy")
        assert samples.dtype == np.uint8 and samples.shape == shape, (samples.dtype, samples.shape)
        with Image.open(out / "samples.png") as grid:
            assert grid.format == "PNG" and grid.mode == ("RGB" if len(shape) == 4 else "L")


# What each docstring says to break, as (old, new); it also names the test that then fails.
BREAK = {
    "bpe": ("i = pairs.index(best)", "i = len(pairs) - 1 - pairs[::-1].index(best)"),
    "word2vec": ("d_c = g * u[o] -", "d_c = g * v[o] -"),
    "rnn": ("        d_c = d_c * f  # (9)\n", ""),
    "vae": ("F.softplus(logits)).flatten(1).sum(1)", "F.softplus(logits)).flatten(1).mean(1)"),
    "gan": ("d(fake.detach())", "d(fake)"),
    "nice": ("log_logistic(h) + log_det", "log_logistic(h)"),
    "realnvp": (" + log_det_h  # (4)", ""),
    "pixelcnn": ('self.left = Left("A"', 'self.left = Left("B"'),
    "cpc": ("scores.log_softmax(-1)", "scores.log_softmax(-2)"),
    "ddpm": ("    z = torch.zeros_like(z) if t == 0 else z\n", ""),
    "ddim": ("        eps = (x_t - a_t**0.5 * x_0) / (1 - a_t) ** 0.5  # (3)\n", ""),
    "rectified_flow": ("    t = t.view(-1, 1, 1, 1)\n", ""),
    "checkpointing": ("return parts[:-1] + parts[-1]", "return parts"),
}


@each(*NAMES)
def test_repo_break_it(module):
    """The line that a docstring says one may break is there, and the test that it names fails without it."""
    name, source = module.__name__, SOURCES[module.__name__]
    old, new = BREAK[name]
    test = globals()[re.search(r"Break it.*?(test_\w+)\s+fails", module.__doc__, re.S)[1]]
    test()
    end = source.index('"""', source.index('"""') + 3)
    assert source[end:].count(old) == 1, old
    broken = types.ModuleType(name)
    exec(compile(source[:end] + source[end:].replace(old, new), name, "exec"), vars(broken))
    with mock.patch.dict(globals(), {name: broken}):
        try:
            test()
        except Exception:
            return
    raise AssertionError(f"{name}: broken, and nothing failed")


# -------------------------------------------------------------------------------- runs: stop, resume, kill ------------
TINY = {"--size": 8, "--width": 8, "--iters": 2, "--batch": 2, "--samples": 2, "--bound": 2, "--inpaint": 2}
TINY |= {"--depth": 5, "--out": "run"}
QUESTIONS = {"--samples", "--bound", "--inpaint", "--out"}  # flags that are not of training
WORDS = "the cat sat on the mat and the dog ate the hat. " * 50


def inputs(here):
    """Four colour pictures in here/pics and a text in here/words.txt."""
    (here / "pics").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (4, 7, 9, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(here / "pics" / f"{i}.png")
    (here / "words.txt").write_text(WORDS, "utf-8")


def command(module, **flags):
    """The words of a run of seconds: TINY and the flags given, as far as the file has them."""
    epochs = {"--epochs": 8, "--batch": 2, "--dim": 8} if "--epochs" in options(module) else {}
    flags = {**TINY, **epochs, **{"--" + name: value for name, value in flags.items()}}
    return [word for name, value in flags.items() if name in options(module) for word in (name, str(value))]


def snapshot(folder):
    """{relative path: bytes} of all files in a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(before, after):
    """The names of the files that differ between two snapshots."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def unpack(files, here):
    """Writes a snapshot to the disk."""
    for name, raw in files.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(raw)


@functools.cache
def finished(module):
    """The words of a run in colour that nothing stopped, and the files that it left."""
    with workdir() as here:
        inputs(here)
        words = command(module, data="pics", channels=3, text="words.txt", iters=130)
        status, _, err = call(module, words)
        assert (status, err) == (0, ""), err
        return words, snapshot(here)


def inputs_of(files):
    """Of a snapshot, what was there before the run."""
    return {name: raw for name, raw in files.items() if not name.startswith("run/")}


@contextlib.contextmanager
def hurried(module, stop_at=None):
    """100 seconds pass between two looks at the clock, so every row is saved. Ctrl-C after stop_at iterations."""
    real, tick = module.progress, itertools.count(0.0, 100.0).__next__

    def progress(steps, what, *args, **kwargs):
        for i in real(steps, what, *args, **kwargs):
            yield i
            if i + 1 == stop_at:
                raise KeyboardInterrupt

    clock = types.SimpleNamespace(time=tick, perf_counter=tick)
    with mock.patch.multiple(module, progress=progress, time=clock):
        yield


def same_run(files, here):
    """The run in here left the same files; equal tensors may be stored in another order."""
    same(*(torch.load(io.BytesIO(run["run/model.pt"]), weights_only=True) for run in (files, snapshot(here))))
    assert changed(files, snapshot(here)) in ([], ["run/model.pt"]), changed(files, snapshot(here))


@each(*RESUMES)
def test_runs_stop_and_resume(module):
    """A stopped run resumes and ends with the bytes of one that was not; again it trains nothing; --fresh does."""
    words, files = finished(module)
    if module.__name__ in IMAGES and hasattr(module, "save_samples"):
        with workdir() as here:
            unpack(files, here)
            check_run_folder(module, here / "run", (2, 8, 8, 3))
    with workdir() as here:
        unpack(inputs_of(files), here)
        with hurried(module, 115):
            status, _, err = call(module, words)
        assert status == 1 and err == "\nstopped; the same command resumes from the last checkpoint\n", err
        assert torch.load("run/model.pt", weights_only=True)["done"] == 100
        asked = [word for pair in zip(words[::2], words[1::2]) if pair[0] in QUESTIONS for word in pair]
        assert call(module, asked)[0] == 0  # the checkpoint knows the flags of training
        same_run(files, here)
        before = snapshot(here)
        with mock.patch.object(module, "update_ema", side_effect=AssertionError("it trains"), create=True):
            status, _, err = call(module, words)
        assert status == 0 and not changed(before, snapshot(here)), err
        unpack({"run/model.pt": b"broken"}, here)
        with hurried(module, 1):
            call(module, [*words, "--fresh"])
        assert (here / "run/model.pt").read_bytes() == b"broken", "it was lost before there was a new one"


KILLED = """
import itertools, sys, types
sys.path.insert(0, sys.argv.pop(1))
import torch, ddim
torch.set_num_threads(1)
clock = itertools.count(0.0, 100.0).__next__
ddim.time = types.SimpleNamespace(time=clock, perf_counter=clock)
ddim.main(sys.argv[1:])
"""


def test_runs_killed():
    """A process killed by SIGKILL after its first save resumes and ends as if it had not been."""
    words, files = finished(ONE)
    with workdir() as here:
        unpack(inputs_of(files), here)
        python = [sys.executable, "-B", "-c", KILLED, str(HERE)]
        child = subprocess.Popen([*python, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while not (here / "run/model.pt").exists() and child.poll() is None:
            time.sleep(0.001)
        child.kill()
        child.communicate()
        assert child.returncode == -signal.SIGKILL and call(ONE, words)[0] == 0
        same_run(files, here)


@contextlib.contextmanager
def full_disk(limit):
    """No file can grow past limit bytes."""
    resource = importlib.import_module("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # Python ignores the signal, so a write raises OSError
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_runs_save_is_atomic():
    """A full disk, or a kill before the rename, leaves the old checkpoint and no other file."""
    state = dict(log=[(100, 0.5)], numbers=torch.zeros(5000))
    with workdir() as here:
        (here / "model.pt").write_bytes(b"old")
        with full_disk(4000):
            raises("", ONE.save_checkpoint, here / "model.pt", state, "loss", kind=OSError)
        with mock.patch.object(Path, "replace", side_effect=KeyboardInterrupt):
            raises("", ONE.save_checkpoint, here / "model.pt", state, "loss", kind=KeyboardInterrupt)
        assert (here / "model.pt").read_bytes() == b"old" and {*os.listdir()} <= {"model.pt", "log.csv"}
        ONE.save_checkpoint(here / "model.pt", state, "loss")
        same(torch.load("model.pt", weights_only=True)["numbers"], state["numbers"])
        assert (here / "log.csv").read_text() == "iteration,loss\n100,0.5\n"


# ----------------------------------------------------------------------------------------------- bad input ------------
def refused(module, words, say, here):
    """None if main refuses the words in one line that matches, changing no file; else what went wrong."""
    before = snapshot(here)
    status, _, err = call(module, words)
    good = status in (1, 2) and err.count("\n") == 1 and "Traceback" not in err and re.search(say, err)
    if good and not changed(before, snapshot(here)):
        return None
    return (
        f"{shlex.join(map(str, words))}: status {status}, wanted {say!r}, got {err}; {changed(before, snapshot(here))}"
    )


BAD = """--iters 0, --samples 0, --batch 0, --batch many, --lr fast, --lr -1, --device nonsense, --size 0, --channels 2,
--width 0, --bound -1, --seed x, --eta 1.5, --eta nan, --steps 0, --steps 1001, --compare 10,0, --compare 10,x,
--spacing cubic, --variance Large, --tol 0, --tol nan, --reflow -1, --pairs 0, --solver magic, --latent 0, --nll -1,
--layers -1, --couplings 0, --inpaint -1, --temperature -1, --temperature nan, --blocks -1, --k 0, --loss hinge,
--levels 1, --levels 257, --vocab 255, --dropout 1, --cell gru, --min-count 9999, --sample -1,
--model none.pt, --strategy some, --depth 0, --no-such-flag, --fres, more"""
OTHER = """--width 16, --iters 131, --seed 7, --batch 3, --lr 0.5, --size 12, --channels 1, --latent 9, --k 2,
--loss minimax, --layers 9, --couplings 9, --levels 3, --cell rnn, --length 5, --dim 9, --depth 9"""
EXEMPT = {("rectified_flow", "--steps", "1001"), ("word2vec", "--batch", "3")}


def rows(table, module):
    """The rows of BAD or OTHER that this file has the flag for, split into words."""
    for row in " ".join(table.split()).split(", "):
        words = row.split()
        known = words[0] in options(module) or words[0] in ("--no-such-flag", "--fres", "more")
        if known and (module.__name__, *words) not in EXEMPT:
            yield words


@each(*NAMES)
def test_bad_values(module):
    """Values that no run can use, or that do not fit the checkpoint, are refused in one line; no file changes."""
    words, files = finished(module)
    with workdir() as here:
        unpack(files, here)
        wrong = []
        for row in rows(BAD, module):
            say = "|".join(map(re.escape, [row[0].strip("-"), row[-1], "steps", "learning rate"]))
            wrong.append(refused(module, [*words, "--out", "new", *row], say, here))
        if module.__name__ in RESUMES:
            for row in rows(OTHER, module):
                wrong.append(refused(module, [*words, *row], f"{row[0][2:]} .*, not {row[1]}.*--fresh", here))
            short = [
                "--fresh",
                *(["--iters", "300"] if module is rnn else ["--iters", "3"] if "--iters" in words else []),
            ]
            wrong.append(refused(module, [*words, *short, "--lr", "3e37"], "iteration.*--lr", here))
            with full_disk(4000):
                wrong.append(refused(module, [*words, *short], "too large|space", here))
    assert not any(wrong), "\n".join(filter(None, wrong))


@each(*RESUMES)
def test_bad_checkpoint(module):
    """A checkpoint that is damaged, of other data, another file or another network is refused and stays as it is."""
    words, files = finished(module)
    good = files["run/model.pt"]

    def edited(**new):
        file = io.BytesIO()
        torch.save({**torch.load(io.BytesIO(good), weights_only=True), **new}, file)
        return file.getvalue()

    state = torch.load(io.BytesIO(good), weights_only=True)
    broken = [b"", b"garbage" * 99, good[:-100], good[:999], edited(settings=[1]), edited(settings={})]
    broken += [edited(parts={}), edited(parts={name: {"old": torch.ones(1)} for name in state["parts"]})]
    with workdir() as here:
        unpack(files, here)
        wrong = []
        for raw in broken:
            (here / "run/model.pt").write_bytes(raw)
            wrong.append(refused(module, words, r"model\.pt.*--fresh", here))
            raises(r"model\.pt", module.load, here / "run/model.pt")
        (here / "run/model.pt").write_bytes(edited(settings={**state["settings"], "method": "other"}))
        wrong.append(refused(module, words, r"made by other\.py", here))
        raises(r"made by other\.py", module.load, here / "run/model.pt")
        (here / "run/model.pt").write_bytes(good)
        (here / "words.txt").write_text(WORDS.replace("cat", "cow"), "utf-8")
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save("pics/0.png")
        if {"--data", "--text"} & options(module).keys():
            say = "made with (other images|another text|other words);.*--fresh"
            wrong.append(refused(module, words, say, here))
    assert not any(wrong), "\n".join(filter(None, wrong))


def test_bad_data():
    """Data that cannot be read are refused in one line that names the file or the folder."""
    x, name, picture = np.arange(128, dtype=np.uint8).reshape(2, 8, 8), "train-images-idx3-ubyte", io.BytesIO()
    Image.fromarray(x[0].repeat(9, 0).repeat(9, 1)).save(picture, "PNG")
    zipped, deep, bright = gzip.compress(idx(x)), io.BytesIO(), io.BytesIO()
    Image.fromarray(np.full((4, 4), -1.0, np.float32)).save(deep, "TIFF")
    Image.fromarray(np.full((4, 4), 1.01, np.float32)).save(bright, "TIFF")  # neither 0 .. 1 nor 0 .. 255
    bad = [({"a.tif": deep.getvalue()}, "a.tif.*-1"), ({"a.tif": bright.getvalue()}, "a.tif.*from 1.0")]
    bad += [({"a.txt": b"x"}, "neither"), ({}, "neither"), ({name + ".gz": zipped[:-20]}, name), ({name: b""}, name)]
    bad += [({name + ".gz": zipped[:10] + bytes(99)}, name), ({name: b"\0\0\x0d" + idx(x)[3:]}, name)]
    bad += [({name: idx(x)[:-1]}, name), ({name: idx(x) + b"x"}, name), ({name: idx(x[:0])}, name)]
    bad += [({name: bytes([0, 0, 8, 3]) + b"\x7f\xff\xff\xff" * 3 + bytes(50)}, name), ({name: idx(x[:, 0, 0])}, name)]
    bad += [({"t10k-images-idx3-ubyte": idx(x)}, name), ({"sub/a.png": b"hello"}, "a.png"), ({"a.jpg": b""}, "a.jpg")]
    bad += [({"a.png": picture.getvalue()[:-30]}, "a.png")]
    bad += [
        ({f"emnist-{kind}-{name}": idx(x + k) for k, kind in enumerate(("letters", "digits"))}, "several data sets")
    ]
    bad += [
        ({f"{kind}/raw/{name}": idx(x + k) for k, kind in enumerate(("MNIST", "FashionMNIST"))}, "several data sets")
    ]
    for files, say in bad:
        with workdir() as here:
            (here / "data set").mkdir()
            unpack({f"data set/{file}": raw for file, raw in files.items()}, here)
            assert not (wrong := refused(ONE, command(ONE, data="data set"), say, here)), wrong
            raises(say, ONE.load_images, "data set", 8)
    with workdir() as here, mock.patch.object(ONE, "MNIST_URL", "http://127.0.0.1:9/"):
        for data, say in ("", "no such"), ("nowhere/at all", "nowhere/at all.*no such"), ("mnist", "--data digits"):
            assert not (wrong := refused(ONE, command(ONE, data=data), say, here)), wrong


@each(*[name for name in IMAGES if name != "checkpointing"])
def test_bad_images(module):
    """train() refuses images that are not square or not bytes: floats would be taken for something else."""
    bytes_ = torch.zeros(4, 1, 8, 12, dtype=torch.uint8)
    for images in torch.rand(4, 1, 8, 8), bytes_, bytes_[:, 0], bytes_[:0, :, :, :8], bytes_[..., :8].long():
        raises(r"uint8.*not .*\([40],", module.train, images, iters=1)


# ---------------------------------------------------------------------------------------------------- data ------------
class Server(http.server.BaseHTTPRequestHandler):
    """/good/ has the files, /short/ breaks off, /wrong/ has other bytes, anything else is 404."""

    def do_GET(self):
        _, kind, name = self.path.split("/")
        self.server.asked.append(self.path)
        body = {"good": name.encode() * 50, "short": name.encode() * 49, "wrong": b"not it"}.get(kind)
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(name) * 50 if kind == "short" else len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_):
        """Silent."""


def test_data_download():
    """MNIST is downloaded once, checked by its hash; what is wrong or cut short is refused and leaves no file."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.asked, url = [], f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    name = "train-images-idx3-ubyte.gz"
    sha256 = hashlib.sha256(name.encode() * 50).hexdigest()[:32]
    progress = contextlib.redirect_stderr(io.StringIO())
    with workdir(), contextlib.closing(server.socket), progress:
        for kind in "wrong", "short", "none":
            with mock.patch.object(ONE, "MNIST_URL", f"{url}{kind}/"):
                raises("--data digits", ONE.download_mnist, name, sha256, kind=OSError)
            assert os.listdir("data/mnist") == []
        with mock.patch.object(ONE, "MNIST_URL", f"{url}good/"):
            path = ONE.download_mnist(name, sha256)
            assert path.read_bytes() == name.encode() * 50 and ONE.download_mnist(name, sha256) == path
        assert server.asked.count(f"/good/{name}") == 1
        server.shutdown()


IDX_NAMES = """train-images-idx3-ubyte, train-images-idx3-ubyte.gz, train-images.idx3-ubyte,
MNIST/raw/train-images-idx3-ubyte, emnist-letters-train-images-idx3-ubyte, qmnist-train-images-idx3-ubyte.gz,
train-images-idx3-ubyte/train-images-idx3-ubyte"""


def test_data_idx():
    """IDX files are read under every name in use, gzipped or not, beside hidden files, and scaled."""
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (n, 8, 8), dtype=np.uint8) for n in (5, 3))
    for name in IDX_NAMES.replace("\n", " ").split(", "):
        pack = gzip.compress if name.endswith(".gz") else bytes
        for old, new in (("train", "t10k"), ("train", "test")):
            with workdir() as here:
                files = {name: pack(idx(train)), name.replace(old, new): pack(idx(test)), f".{Path(name).name}": b"x"}
                unpack({f"idx/{file}": raw for file, raw in files.items()}, here)
                for want, got in (train, ONE.load_images("idx", 8, 3)), (test, ONE.load_images("idx", 8, 3, test=True)):
                    assert got.dtype == torch.uint8 and np.array_equal(got, np.stack([want] * 3, 1)), name
                near(ONE.load_images("idx", 4).double().mean((1, 2, 3)), train.mean((1, 2)), 2)
    with workdir() as here:  # as Kaggle has it: a file, and a folder of the same name with that file
        unpack({"idx/train-images.idx3-ubyte": idx(train), "idx/" + "train-images-idx3-ubyte/" * 2 + "x": b""}, here)
        assert ONE.load_images("idx", 8).shape == (5, 1, 8, 8)


def test_data_pictures():
    """Pictures of any shape, mode and subfolder are read; every tenth is for the test; hidden files do not count."""
    with workdir() as here:
        for i in range(25):  # picture i is i + 100 everywhere
            file = here / f"pics/{'abc'[i // 9]}/deep/{i:02}{('.png', '.PNG')[i % 2]}"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.new("L", (8 + i % 3 * 5, 8 + i % 2 * 9), i + 100)
            picture.convert(("L", "RGB", "RGBA", "P", "LA")[i % 5]).save(file)
        hidden = ["._00.png", ".ipynb_checkpoints/00.png", "a/.thumbs/x.png", "__MACOSX/._a.png"]
        unpack({f"pics/{name}": b"\0\5\x16\7" for name in hidden}, here)
        for channels in 1, 3:
            train, test = (ONE.load_images("pics", 8, channels, test=test) for test in (False, True))
            assert test[:, 0, 0, 0].tolist() == [109, 119] and train.shape == (23, channels, 8, 8)
            assert sorted(v for x in (*train, *test) for v in set(x.flatten().tolist())) == [*range(100, 125)]
        (here / "one").mkdir()
        pixels = np.zeros((4, 8, 3), np.uint8)
        pixels[:, 2:6], pixels[0, 2:6] = (10, 20, 30), (90, 80, 70)  # the centre square and its top row
        Image.fromarray(pixels).save("one/a.png")
        for x in ONE.load_images("one", 4, 3), ONE.load_images("one", 4, 3, test=True):
            assert x.shape == (1, 3, 4, 4) and x[0, :, :2, 0].T.tolist() == [[90, 80, 70], [10, 20, 30]]


def test_data_deep_pictures():
    """Pictures of 16 bits, 32 bits and floats keep their grey levels; transparent pixels turn white."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    kinds = {"a.png": ramp.astype(np.uint16) * 257, "b.tif": ramp.astype(np.uint16) * 257}
    kinds |= {
        "c.tif": (ramp / 255).astype(np.float32),
        "d.tif": ramp.astype(np.float32),
        "e.tif": ramp.astype(np.int32),
    }
    kinds |= {"f.tif": ramp.astype(np.int32) * 257, "g.png": ramp.astype(np.uint16)}
    with workdir() as here:
        for name, array in kinds.items():
            Image.fromarray(array).save(name)
            want = np.round(ramp / 257) if name == "g.png" else ramp  # a dark picture of 16 bits
            assert np.array_equal(ONE.read_picture(here / name, 16, 1)[0], want), name
        Image.fromarray(np.stack([0 * ramp, ramp], 2), "LA").save("ink.png")  # black, of any opacity
        near(ONE.read_picture(here / "ink.png", 16, 3), 255.0 - np.stack([ramp] * 3), 1)


def test_data_digits():
    """Image i of the drawn digits looks most like the glyph of i % 10; no two are equal; a seed repeats them."""
    x = ONE.draw_digits(1000)
    assert x.shape == (1000, 1, 28, 28) and x.dtype == torch.uint8 and len(x.flatten(1).unique(dim=0)) == 1000
    same(x, ONE.draw_digits(1000))
    assert not torch.equal(x, ONE.draw_digits(1000, seed=1)) and ONE.draw_digits(20, 12).shape == (20, 1, 12, 12)
    train, test = (ONE.load_images("digits", 8, 3, test=test) for test in (False, True))
    assert (train.shape, test.shape) == ((60000, 3, 8, 8), (10000, 3, 8, 8))
    assert not (train[:10000] == test).all((1, 2, 3)).any()
    kinds, glyphs = torch.stack([x[k::10, 0].float().mean(0) for k in range(10)]), torch.zeros(10, 28, 28)
    for k in range(10):
        tile = Image.new("L", (28, 28))
        ImageDraw.Draw(tile).text((14, 14), str(k), 255, ImageFont.load_default(24), "mm", stroke_width=1)
        glyphs[k] = torch.from_numpy(np.array(tile))
    match = torch.corrcoef(torch.cat([kinds - kinds.mean(0), glyphs - glyphs.mean(0)]).flatten(1))[:10, 10:]
    assert match.argmax(1).tolist() == [*range(10)], match


def test_data_real_mnist():
    """MNIST, where the environment variable MNIST names its folder: its mean and every byte."""
    if "MNIST" not in os.environ:
        raise unittest.SkipTest("MNIST names no folder")
    known = {False: (60000, 0.1306604762738429, "6bbc9ace898e44ae57da46a324031adb")}
    known[True] = (10000, 0.1325146058423369, "2646ac647ad5339dbf082846283269ea")
    for test, (n, mean, md5) in known.items():
        x = ONE.load_images(os.environ["MNIST"], test=test)
        near(x.double().mean() / 255, mean, 1e-12)
        assert hashlib.md5(idx(x[:, 0].numpy())).hexdigest() == md5 and x.shape == (n, 1, 28, 28)


def test_data_grid():
    """The grid goes row by row, with lines between its tiles; bytes become floats and bytes again without loss."""
    every = torch.arange(256, dtype=torch.uint8)
    for off in -0.4, 0, 0.4:  # of a byte: rounded to the nearest
        same(ONE.to_uint8(every.float() / 127.5 - 1 + off / 127.5), every)
    assert ONE.to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]
    for channels in 1, 3:
        shades = torch.arange(10, 10 + 5 * channels).view(5, channels, 1, 1) / 127.5 - 1
        with workdir() as here:
            ONE.save_grid(here / "grid.png", shades.repeat(1, 1, 8, 6), 3)  # not square
            sheet = np.array(Image.open(here / "grid.png").convert("RGB"))[::6, ::6]
        assert sheet.shape == (18, 22, 3) and (sheet[8:10] == 96).all() and (sheet[:, [6, 7, 14, 15]] == 96).all()
        for i in range(5):
            tile = sheet[10 * (i // 3) : 10 * (i // 3) + 8, 8 * (i % 3) : 8 * (i % 3) + 6]
            assert (tile == 10 + i * channels + np.arange(channels)).all(), i


def test_data_progress():
    """Progress is a line every 10 seconds and one at the end: how far it is, the status, items a second."""
    clock, out = types.SimpleNamespace(time=itertools.count(0.0).__next__), io.StringIO()  # a second each look
    with mock.patch.object(ONE, "time", clock), contextlib.redirect_stdout(out):
        assert [*ONE.progress(range(10, 100), "iteration", 32, {"loss": 0.5})] == [*range(10, 100)]
    lines = out.getvalue().splitlines()
    assert lines[0] == "iteration 21/100: loss 0.5, 32/s, 79 s left" and len(lines) == 9, lines
    assert lines[-1] == "iteration 100/100: loss 0.5, 32/s, 0 s left"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert [*ONE.progress(range(0, 5, 2), "image")] == [0, 2, 4]
    assert out.getvalue().startswith("image 5/5: ")


def test_data_film():
    """A film begins with its last frame, shows all in their order, and stays below 300 kB for noise."""
    frames = [torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(k)) for k in range(12)]
    frames.append(torch.linspace(-1, 1, 16).view(16, 1, 1, 1).expand(16, 1, 28, 28))
    with workdir() as here:
        ONE.save_gif(here / "film.gif", frames)
        assert (here / "film.gif").stat().st_size < 300_000
        with Image.open(here / "film.gif") as film:
            shown = [np.array(picture.convert("L")).astype(int) for picture in ImageSequence.Iterator(film)]
    assert len(shown) == 14
    for got, x in zip(shown, [frames[-1], *frames]):
        assert np.abs(got - np.array(ONE.make_grid(x, 4)).astype(int)).mean() < 12


# ------------------------------------------------------------------ training, for all that train on images ------------
# name: the function that is given a batch, which argument the batch is, and what the bytes 0 and 255 become
TRAIN = {"ddpm": ("loss_simple", 1, -1, 1), "ddim": ("loss_gamma", 1, -1, 1), "rectified_flow": ("loss_flow", 2, -1, 1)}
TRAIN |= {"nice": ("log_prob", 1, 0, 1), "realnvp": ("loss_bits", 1, 0, 1), "vae": ("loss_elbo", 1, 0, 1)}
TRAIN |= {"pixelcnn": ("loss_nats", 1, 0, 1), "gan": ("d_step", 2, -1, 1)}


def labelled(n, size=8):
    """n images: five pixels hold the number of the image in binary, the others are one shade, 51, 102 or 204."""
    shades = torch.tensor([51, 102, 204], dtype=torch.uint8)[torch.arange(n) % 3]
    images = shades.view(n, 1, 1, 1).repeat(1, 1, size, size)
    images[:, 0, 0, :5] = (torch.arange(n)[:, None] >> torch.arange(5) & 1) * 255
    return images


def spied(module, images, **flags):
    """Trains, and returns what the loss was called with each time, and the model."""
    name, seen = TRAIN[module.__name__][0], []
    real = getattr(module, name)

    def copied(value):
        if isinstance(value, nn.Module):
            return copy.deepcopy(value.state_dict())
        return value.detach().clone() if torch.is_tensor(value) else value

    def spy(*args):
        if torch.is_grad_enabled():
            seen.append([copied(value) for value in args])
        return real(*args)

    with mock.patch.object(module, name, spy):
        return seen, quiet(module.train, images, **{"width": 8, **flags})


@each(*TRAIN)
def test_training_sees(module):
    """Training sees all images but those for validation, equally often, in the file's range, with fresh noise."""
    images, (_, place, low, high) = labelled(18), TRAIN[module.__name__]
    seen, _ = spied(module, images, iters=60, batch=20)
    x = torch.cat([args[place] for args in seen]).double()
    used = (x[:, 0, 0, :5] > (low + high) / 2).long() @ (1 << torch.arange(5))
    counts = used.bincount(minlength=18)
    fitted = module.hold_out(images)[0] if hasattr(module, "hold_out") else images
    wanted = (fitted[:, 0, 0, :5] > 0).long() @ (1 << torch.arange(5))
    assert counts.nonzero()[:, 0].tolist() == sorted(wanted.tolist())
    assert counts[wanted].min() > 0.5 * len(x) / len(wanted)
    for k, shade in enumerate((51, 102, 204)):  # of binarised images so many pixels are white
        near(
            x[used % 3 == k][:, 0, 1:].mean(),
            low + (high - low) * shade / 255,
            0.015 if low == 0 else 0.005 if module is rectified_flow else 1e-6,
        )
    for i, value in enumerate(seen[0]):
        if (
            torch.is_tensor(value)
            and i != place
            and value.dim() == 4
            and value.is_floating_point()
            and module is not gan
        ):
            noise = torch.cat([args[i] for args in seen])
            near([noise.mean(), noise.var()], [0, 1], 0.03)
            assert len(noise.flatten(1).unique(dim=0)) == len(noise)


@each("ddpm", "ddim")
def test_training_weighs(module):
    """The expected loss is a plain mean over all time steps, however often each is drawn."""
    loss = lambda model, x_0, t, *rest: 0 * next(model.parameters()).sum() + (t / 1000).square()
    with workdir() as here, mock.patch.object(module, TRAIN[module.__name__][0], loss):
        quiet(module.train, labelled(18), iters=300, batch=8, width=8, path=here / "model.pt")
        logged = np.loadtxt("log.csv", delimiter=",", skiprows=1)
    near(logged[:, 1].mean(), 1 / 3, 0.01)


@each(*TRAIN)
def test_training_averages(module):
    """The returned, saved and loaded model is the EMA of the weights; only the seed decides its bits."""
    with workdir() as here:
        seen, model = spied(module, labelled(18), iters=12, batch=4, lr=0.1, path=here / "model.pt")
        parts = torch.load(here / "model.pt", weights_only=True)["parts"]
        same(dict(model.state_dict()), dict(module.load(here / "model.pt").state_dict()))
    if module is not gan:  # whose losses are not given G
        passed = [{name: v.double() for name, v in args[0].items()} for args in seen] + [parts["model"]]
        average = passed[0]
        for i, weights in enumerate(passed[1:]):
            m = (1 + i) / (10 + i)
            average = {name: m * average[name] + (1 - m) * weights[name] for name, _ in model.named_parameters()}
        for name, want in average.items():
            near(parts["ema"][name], want, 1e-5, 1e-5)
    one, other = (spied(module, labelled(18), iters=12, batch=4, lr=0.1, seed=seed)[1].state_dict() for seed in (0, 1))
    same(dict(one), dict(model.state_dict()))
    assert any(not torch.equal(one[name], other[name]) for name in one)


DIFFUSION = {"ddpm": {}, "ddim": {"steps": 20}, "rectified_flow": {"steps": 20}}


@each(*DIFFUSION)
def test_training_learns(module):
    """Trained on two images, a diffusion model generates both of them and nothing else."""
    images = ONE.draw_digits(8, 8)[[1, 7]].repeat(8, 1, 1, 1)
    model = quiet(module.train, images, iters=300, batch=16, width=16)
    x = quiet(module.sample, model, 40, **DIFFUSION[module.__name__])
    distance = torch.cdist(x.flatten(1), (images[:2].float() / 127.5 - 1).flatten(1)) / 8  # rms
    assert (distance.amin(1) < 0.3).double().mean() > 0.9, distance
    assert 8 <= (distance.argmin(1) == 0).sum() <= 32, distance


@each(*[name for name in NAMES if hasattr(MODULES[name], "hold_out")])
def test_training_hold_out(module):
    """A sixth is for validation, at random but always alike; no image is in both parts unless there is only one."""
    for n, held in (60_000, 10_000), (6, 1), (2, 1), (13, 2), (1, 1):
        state = torch.get_rng_state()
        train, valid = module.hold_out(torch.arange(n))
        assert torch.equal(state, torch.get_rng_state()) and len(valid) == held
        assert sorted({*train.tolist(), *valid.tolist()}) == list(range(n)) and len(train) == max(1, n - held)
        same(valid, module.hold_out(torch.arange(n))[1])
    assert module.hold_out(torch.arange(60_000))[1].float().histc(6, 0, 60_000).min() > 1500  # 1667 +- 34


SPREAD = """
import importlib, os, pathlib, sys, torch
sys.path.insert(0, sys.argv[1])
words = ["--data", "pics", "--size", "8", "--width", "8", "--iters", "2", "--batch", "4", "--samples", "2"]
rank, names = os.environ["RANK"], sys.argv[2:]
flow = importlib.import_module("rectified_flow")
flow.main([*words, "--reflow", "1", "--pairs", "6", "--out", "run" if rank == "0" else "nowhere"])
images = torch.randint(256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
for name in names:
    module, seen = importlib.import_module(name), set()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda net, x: seen.add(len(x[0])) if net.training and isinstance(net, torch.nn.Conv2d) else None)
    path = pathlib.Path(name if rank == "0" else "nowhere", "model.pt")
    model = module.train(images, iters=1, batch=4, width=8, path=path)
    hook.remove()
    torch.save({"seen": sorted(seen), "weights": model.state_dict()}, f"{name}{rank}.pt")
try:
    flow.train(images, iters=1, batch=3)
except ValueError as e:
    pathlib.Path(f"odd{rank}").write_text(str(e))
"""


def test_training_torchrun():
    """Two processes under torchrun have the gradients of one with the whole batch, and it resumes their checkpoint."""
    names = [name for name in NAMES if hasattr(MODULES[name], "processes")]
    assert names == ["pixelcnn", "ddpm", "ddim", "rectified_flow"]
    with workdir() as here:
        grey(here)
        (here / "spread.py").write_text(SPREAD, "utf-8")
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        python = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        words = [*python, "spread.py", str(HERE), *names]
        child = subprocess.run(words, env=env, capture_output=True, text=True, timeout=150)
        assert child.returncode == 0, child.stderr
        assert child.stdout.count("images of 8x8x1") == 1 and not (here / "nowhere").exists(), child.stdout
        check_run_folder(rectified_flow, here / "run", (2, 8, 8))
        assert all("--batch 3: 2 processes" in (here / f"odd{rank}").read_text() for rank in (0, 1))
        images = torch.randint(256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        for name in names:
            ranks = [torch.load(here / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1)]
            assert [rank["seen"] for rank in ranks] == [[2], [2]], (name, ranks)  # images in a pass of the network
            same(ranks[0]["weights"], ranks[1]["weights"])
            train = functools.partial(quiet, MODULES[name].train, images, iters=1, batch=4, width=8)
            train(path=here / "one.pt", fresh=True)
            two, one = (torch.load(path, weights_only=True) for path in (here / name / "model.pt", here / "one.pt"))
            assert two["settings"] == one["settings"] and two["done"] == one["done"] == 1
            moments = []  # Adam's first moments: the gradients times a constant
            for state in two, one:
                moments.append(torch.cat([v["exp_avg"].flatten() for v in state["parts"]["opt"]["state"].values()]))
            assert moments[1].abs().max() > 1e-6
            near(*moments, 1e-5 * moments[1].abs().max())
            loaded = MODULES[name].load(here / name / "model.pt")
            same(train(path=here / name / "model.pt").state_dict(), loaded.state_dict())


# ---------------------------------------------------------------------------------------- a pretended GPU ------------
# For machines without one. A tensor "on cuda" is a wrapper around a CPU tensor: all numbers are computed. Operations
# that CUDA refuses, because they mix devices, are refused; what would make the host wait for the GPU is counted.
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ATEN = torch.ops.aten
INDEXING = {ATEN.index.Tensor, ATEN.index_put_.default, ATEN._index_put_impl_.default, ATEN._unsafe_index.Tensor}
COPIES = {ATEN.copy_.default, ATEN._to_copy.default}
SCALARS = {ATEN.fill_.Tensor, ATEN.lerp.Tensor, ATEN.where.self, ATEN.clamp.Tensor}  # may be on the CPU
WAITS = {
    ATEN.nonzero.default,
    ATEN.masked_select.default,
    ATEN._unique2.default,
    ATEN.equal.default,
    ATEN.bincount.default,
    ATEN._local_scalar_dense.default,
}


def on_cuda(device):
    return device is not None and torch.device(device).type == "cuda"


def move(tensor, *args, copy=False, **kwargs):
    """Tensor.to() for tensors of both kinds."""
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    device = tensor.device if device is None else CUDA if on_cuda(device) else device
    dtype = dtype or tensor.dtype
    laid_out = memory_format in (None, torch.preserve_format) or tensor.is_contiguous(memory_format=memory_format)
    if (device, dtype) == (tensor.device, tensor.dtype) and laid_out and not copy:
        return tensor
    how = dict(dtype=dtype, device=device, non_blocking=non_blocking, memory_format=memory_format)
    return ATEN._to_copy.default(tensor, **how)


class Cuda(torch.Tensor):
    """A CPU tensor, .inside, that says it is on the GPU."""

    @staticmethod
    def __new__(cls, inside):
        layout = dict(strides=inside.stride(), storage_offset=inside.storage_offset(), dtype=inside.dtype)
        return torch.Tensor._make_wrapper_subclass(cls, inside.size(), **layout)

    def __init__(self, inside):
        self.inside = inside

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("a tensor of the pretended GPU is used outside of pretend_gpu()")

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __array__(self, *args, **kwargs):
        return self.numpy()

    def tolist(self):
        return move(self, CPU).tolist()

    def to(self, *args, **kwargs):
        return move(self, *args, **kwargs)

    def get_device(self):
        return 0

    def untyped_storage(self):
        return self.inside.untyped_storage()

    def data_ptr(self):
        return self.inside.data_ptr()

    def __format__(self, spec):
        return format(self.item(), spec)

    def __deepcopy__(self, memo):
        copied = Cuda(self.inside.detach().clone()).requires_grad_(self.requires_grad)
        copied._is_param = getattr(self, "_is_param", False)
        memo[id(self)] = copied
        return copied


class Generator(torch.Generator):
    """torch.Generator(device), which is really on the CPU."""

    on_gpu = {}  # by _cdata: C++ hands another Python object to the operations

    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        cls.on_gpu[self._cdata] = on_cuda(device)
        return self

    def __init__(self, device="cpu"):
        pass


def check_devices(func, args, kwargs, tensors):
    """Raises what CUDA raises for an operation on tensors of both devices."""
    moved = [tensor for tensor in tensors if not isinstance(tensor, Cuda)]
    if func in INDEXING:
        refused = not isinstance(args[0], Cuda)
    else:
        elementwise = torch.Tag.pointwise in func.tags or func in SCALARS or "_foreach" in func.name()
        refused = any(tensor.dim() or not elementwise for tensor in moved)
    if refused and func not in COPIES:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")


class Dispatch(TorchDispatchMode):
    """Carries out each operation on the insides, after a look as CUDA would take. waits: how often the host waited."""

    waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves, form = tree_flatten((args, kwargs))
        tensors = [value for value in leaves if isinstance(value, torch.Tensor)]
        wrapped = [tensor for tensor in tensors if isinstance(tensor, Cuda)]
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        if wrapped and composite:  # inference mode hands them over whole
            with self:
                return func.decompose(*args, **kwargs)
        if wrapped:
            check_devices(func, args, kwargs, tensors)
        device = kwargs.get("device")
        first = args[0] if func in COPIES | INDEXING else wrapped[0] if wrapped else None
        on_gpu = on_cuda(device) if device is not None else isinstance(first, Cuda)
        generator = kwargs.get("generator")
        if generator is not None and Generator.on_gpu.get(generator._cdata, False) != on_gpu:
            raise RuntimeError(f"{func}: the generator is on another device")
        self.count(func, args, on_gpu, tensors, wrapped)
        insides = {id(tensor.inside): tensor for tensor in wrapped}
        args, kwargs = tree_unflatten([v.inside if isinstance(v, Cuda) else v for v in leaves], form)
        if device is not None:
            kwargs["device"] = CPU
        out = func(*args, **kwargs)
        # In inference mode a view of an ordinary tensor is an ordinary one.
        views = all(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
        ordinary = views and not any(tensor.is_inference() for tensor in wrapped)

        def wrap(value):
            if id(value) in insides:  # changed in place
                return insides[id(value)]
            return Cuda(value) if on_gpu and isinstance(value, torch.Tensor) else value

        with torch.inference_mode(torch.is_inference_mode_enabled() and not ordinary):
            return tree_map(wrap, out)

    def count(self, func, args, on_gpu, tensors, wrapped):
        masks = func in INDEXING and any(v is not None and v.dtype == torch.bool for v in args[1])
        crosses = func in COPIES and (bool(wrapped) != on_gpu or 0 < len(wrapped) < len(tensors))
        self.waits += bool(wrapped and (func in WAITS or masks) or crosses)


class Calls(TorchFunctionMode):
    """What C++ would settle by the device of the tensor, before any operation is dispatched."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.to:
            return move(*args, **kwargs)
        if func is torch.Tensor.cpu:
            return move(args[0], CPU)
        if func is F.one_hot and isinstance(args[0], Cuda):
            return Cuda(func(args[0].inside, *args[1:], **kwargs))
        if func is torch.tensor and on_cuda(kwargs.get("device")):
            return move(func(*args, **{**kwargs, "device": None}), CUDA)
        return func(*args, **kwargs)


@contextlib.contextmanager
def pretend_gpu():
    """In here torch has one GPU. Yields the Dispatch, which counts what waits for it."""
    save, load = torch.save, torch.load
    clip = torch.nn.utils.clip_grad
    optimizer = importlib.import_module("torch.optim.optimizer")
    group = clip._group_tensors_by_device_and_dtype

    @contextlib.contextmanager
    def plain():
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            yield

    def save_insides(value, file):
        dispatch.waits += 1
        with plain():
            save(tree_map(lambda v: v.inside.detach().clone() if isinstance(v, Cuda) else v, value), file)

    def load_to(file, map_location=None, **kwargs):
        with plain():
            state = load(file, map_location="cpu", **kwargs)
            to_gpu = on_cuda(map_location)
            return tree_map(lambda v: Cuda(v) if to_gpu and isinstance(v, torch.Tensor) else v, state)

    def grouped(tensors, *args):
        return {(CUDA, dtype): value for (_, dtype), value in group(tensors, *args).items()}

    def graphed(module, inputs):
        module(*inputs)

    dispatch = Dispatch()
    cuda = dict(is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, _lazy_init=lambda: None)
    cuda |= dict(is_initialized=lambda: True, memory_allocated=lambda device: 0, max_memory_allocated=lambda device: 1)
    cuda |= dict(reset_peak_memory_stats=lambda device: None, make_graphed_callables=graphed)
    cuda |= dict(get_rng_state=lambda device: torch.zeros(1), set_rng_state=lambda state, device: None)
    cuda |= dict(is_current_stream_capturing=lambda: False)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **cuda))
        stack.enter_context(mock.patch.multiple(torch, Generator=Generator, save=save_insides, load=load_to))
        foreach = [*optimizer._foreach_supported_types, Cuda]
        stack.enter_context(mock.patch.object(optimizer, "_foreach_supported_types", foreach))
        stack.enter_context(mock.patch.object(clip, "_group_tensors_by_device_and_dtype", grouped))
        stack.enter_context(mock.patch.object(torch.backends.cudnn, "is_acceptable", lambda tensor: False))
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to() makes new parameters
        stack.enter_context(Calls())
        yield stack.enter_context(dispatch)


GPU_COMMANDS = {
    "word2vec": "--epochs 2 --batch 32 --dim 8 --analogy the a of",
    "rnn": "--batch 4 --length 6 --width 8 --samples 9 --prompt the",
    "vae": "--batch 8 --width 32 --latent 2 --size 8 --samples 5 --nll 3",
    "gan": "--batch 4 --width 2 --latent 4 --size 8 --samples 5 --stacked --k 2",
    "nice": "--batch 8 --width 8 --layers 1 --size 6 --samples 5 --inpaint 5",
    "realnvp": "--batch 4 --width 4 --size 8 --samples 5",
    "pixelcnn": "--batch 4 --width 4 --layers 1 --size 6 --samples 5 --plain",
    "cpc": "--batch 8 --width 16 --size 14 --samples 3",
    "ddpm": "--batch 4 --width 8 --size 8 --samples 2 --bound 2",
    "ddim": "--batch 4 --width 8 --size 8 --samples 2 --steps 4 --eta 0.5 --compare 2,3",
    "rectified_flow": "--batch 4 --width 8 --size 8 --samples 2 --steps 3 --reflow 1 --pairs 8",
    "checkpointing": "--batch 4 --width 8 --depth 9",
}
SHORTER = {  # long loops
    "cpc": [("weight_decay=2e-4, iters=100", "weight_decay=2e-4, iters=2")],
    "ddpm": [
        ("make_schedule(T=1000", "make_schedule(T=10"),
        ("(999, 799, 599, 399, 299, 199, 149, 99, 49, -1)", "(9, -1)"),
    ],
    "ddim": [("make_alpha_bar(T=1000", "make_alpha_bar(T=50"), ("(10, 20, 50, 100, 200)", "(10, 20)")],
    "rectified_flow": [("pair_steps=25", "pair_steps=2"), ("straightness(model, z, 50)", "straightness(model, z, 2)")],
}
MOST_WAITS = {"word2vec": 4, "gan": 5}  # its iteration is many steps; its film has ten pictures, in however short a run
PLANTED = {  # a place, and what a programmer without a GPU would have written there
    "word2vec": ("keep_probability(counts, sample).to(device)", "keep_probability(counts, sample)"),
    "rnn": ("all_ids[:first].to(device)", "all_ids[:first]"),
    "vae": ("torch.randn(batch, latent, device=device)", "torch.randn(batch, latent)"),
    "gan": ("G(torch.randn(batch, latent, device=device))", "G(torch.randn(batch, latent))"),
    "nice": ("torch.rand(k.shape, device=device))\n        nats", "torch.rand(k.shape))\n        nats"),
    "realnvp": ("losses.append(loss.detach())", "losses.append(torch.tensor(loss.item()))"),
    "pixelcnn": ("images = images.to(device)", "images = images"),
    "cpc": ("labels = labels.to(device)", "labels = labels"),
    "ddpm": (
        'torch.load(path, map_location="cpu", weights_only=True)\n',
        'torch.load(path, map_location="cuda", weights_only=True)\n        state["rng"] = state["rng"].cpu()\n',
    ),
    "ddim": ("tables = noise_tables(make_alpha_bar(), device)", "tables = noise_tables(make_alpha_bar())"),
    "rectified_flow": ("line_batches(images.to(device), batch)", "line_batches(images, batch)"),
    "checkpointing": ("torch.randn(batch, width, device=device)", "torch.randn(batch, width)"),
}


def run_on_gpu(module):
    """Runs a file's command on a pretended GPU, then resumes it -> (status, stderr, waits in each iteration)."""
    waits = []
    progress = module.progress

    def watched(steps, what, *args):
        marks = []
        for i in progress(steps, what, *args):
            marks.append(gpu.waits)
            yield i
        if what == "iteration":
            waits.extend(np.diff(marks).tolist())

    name = module.__name__
    source = ["--text", "text"] if name in ("word2vec", "rnn") else ["--data", "data"] if name in IMAGES else []
    words = [*GPU_COMMANDS[name].split(), *source, "--out", "run", "--device", "cuda"]
    words += [] if name == "word2vec" else ["--iters", "6"]
    with pretend_gpu() as gpu, mock.patch.object(module, "progress", watched):
        status, _, err = call(module, words)
        if status == 0:
            path = max(Path("run").rglob("model.pt"), key=os.path.getmtime)
            state = torch.load(path, weights_only=True)
            state["done"] = 2
            torch.save(state, path)
            status, _, err = call(module, words)
    return status, err, waits


@contextlib.contextmanager
def gpu_data():
    """A working directory with a data set of 40 images, and a text."""
    generator = np.random.default_rng(0)
    words = "the cat of the house sat on a mat and the dog of a man ran to the house in the rain".split()
    with workdir() as here:
        (here / "data").mkdir()
        for part, n in ("train", 40), ("t10k", 20):
            images = generator.integers(0, 256, (n, 28, 28), dtype=np.uint8)
            Path(f"data/{part}-images-idx3-ubyte").write_bytes(idx(images))
            Path(f"data/{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(n, dtype=np.uint8) % 10))
        Path("text").write_text("\n\n".join(" ".join(generator.choice(words, 40)) for _ in range(60)))
        yield


def edited(name, *changes):
    """The module of a file in which some pieces of text are replaced."""
    source = SOURCES[name]
    for old, new in changes:
        assert old in source, old
        source = source.replace(old, new)
    module = types.ModuleType(name)
    module.__file__ = MODULES[name].__file__
    exec(compile(source, name, "exec"), vars(module))
    return module


@each(*GPU_COMMANDS)
def test_gpu_runs_whole_and_does_not_wait(module):
    """On a GPU the command ends without error, and no iteration of the training waits for the GPU, fresh or resumed."""
    with gpu_data():
        status, err, waits = run_on_gpu(edited(module.__name__, *SHORTER.get(module.__name__, [])))
    most = MOST_WAITS.get(module.__name__, 0)
    assert status == 0 and len(waits) >= 8 and max(waits) <= most, (err, waits)


@each(*PLANTED)
def test_gpu_sees_a_planted_bug(module):
    """The test before fails if a file forgets the device, or waits for it."""
    with gpu_data():
        status, err, waits = run_on_gpu(
            edited(module.__name__, *SHORTER.get(module.__name__, []), PLANTED[module.__name__])
        )
    assert status == 1 or max(waits) > MOST_WAITS.get(module.__name__, 0), (err, waits)


# -------------------------------------------------------------------------------------------------- bpe.py ------------
NASTY = [*"aZé9²Ⅷ一ह_!.' \t\n\r\x0b\x1c\x1f\x85\xa0\u2003\u3000😀\u0301\0\u2028\u1680\U0001d7d8\U0001f100"]
NASTY += ["'s", "'ll", "'S", " ", " ", "  ", "   ", "\n", "\n\n", " \n", "\n ", "s", "__", "ve"]


def kind(c):
    """A character of ASCII of the same class as c by Unicode's category: letter, number, white space or other."""
    category = unicodedata.category(c)
    if category[0] == "Z" or c in "\t\n\x0b\x0c\r\x85":
        return "\n"
    return {"L": "x", "N": "0"}.get(category[0], ".")


def split_by_hand(text):
    """(1) as a pattern for ASCII, once each character but those that (1) names is replaced by one of its class."""
    plain = "".join(c if c in "'stremvld " else kind(c) for c in text)
    found = re.finditer(r"'s|'t|'re|'ve|'m|'ll|'d| ?[a-z]+| ?0+| ?[.']+|\s+(?!\S)|\s+", plain)
    return [text[match.start() : match.end()] for match in found]


def steps_by_hand(word, ranks):
    """The tokens of a word after each merge; each time all merges that are possible are listed, with their places."""
    word = [bytes([byte]) for byte in word]
    steps = [word]
    while possible := [(ranks[pair], i) for i, pair in enumerate(zip(word, word[1:])) if pair in ranks]:
        i = min(possible)[1]
        word = [*word[:i], word[i] + word[i + 1], *word[i + 2 :]]
        steps.append(word)
    return steps


def ids_by_hand(tokenizer, text):
    words = [steps_by_hand(word.encode(), tokenizer.ranks)[-1] for word in split_by_hand(text)]
    return [tokenizer.tokens[raw] for word in words for raw in word]


def random_text(rng, letters, longest):
    return "".join(rng.choice(np.array([*letters], dtype=object), rng.integers(0, longest)))


@functools.cache
def source_tokenizer():
    """1000 tokens of bpe.py's text, three of them special; "##" is among them, for it must not be a comment."""
    return bpe.BPE.train(SOURCES["bpe"] + "a##" * 99, 1000, ["<s>", "<s>more", "日"])


def test_bpe_eq1_splits():
    """All characters, and random texts of all kinds, are split as by hand, in the plain form and in the fast one."""
    classes = collections.defaultdict(list)
    for char in map(chr, range(sys.maxunicode + 1)):
        classes[kind(char)].append(char)
    for text in map("".join, classes.values()):
        assert bpe.pre_tokens(text) == [text]
    rng = np.random.default_rng(0)
    for n in range(2000):
        text = random_text(rng, [c for c in NASTY if n % 2 or c.isascii()], 14)
        want = split_by_hand(text)
        assert bpe.pre_tokens(text) == want, text
        assert bpe.count_words(text) == collections.Counter(word.encode() for word in want), text


def test_bpe_eq2_eq3_eq4_training():
    """Wikipedia's example, the paper's words and ties have the merges found by hand, and the fast form the same."""
    by_hand = {
        "aaabdaaabac": "aa ab aaab",
        "low low low low low lower lower" + " newest" * 6 + " widest" * 3: "es est lo low",
        "ba ab": "ab ba",  # a tie: a comes before b
        "aaaa": "aa aaaa",
    }
    for text, want in by_hand.items():
        merges = bpe.learn_merges(collections.Counter(text.encode().split()), len(want.split()))
        assert " ".join((a + b).decode() for a, b in merges) == want, (text, merges)
    rng = np.random.default_rng(1)
    learned = set()
    for n in range(400):
        text = random_text(rng, ("ab", "abc ", "aé ", "zy! \n")[n % 4], 60)
        words = collections.Counter(word.encode() for word in split_by_hand(text))
        merges = bpe.BPE.train(text, 268).merges
        assert merges == bpe.learn_merges(words, 12), text
        learned.add(len(merges))
    assert learned == {*range(13)}  # in some texts no pair is left before


def test_bpe_eq5_any_list_of_merges():
    """For merges in any order, the earliest-learned possible one comes first, the leftmost, one at a time."""
    rng = np.random.default_rng(4)
    for n in range(200):
        text = random_text(rng, ("aaabbb ,", "ab")[n % 2], 200)
        trained = bpe.BPE.train(text, 280)
        merges = [trained.merges[i] for i in rng.permutation(len(trained.merges))]
        tokenizer = bpe.BPE(trained.tokens, merges)
        for word in text.encode().split(b","):
            assert list(bpe.merge_steps(word, tokenizer.ranks)) == steps_by_hand(word, tokenizer.ranks), (merges, word)
        want = ids_by_hand(tokenizer, text)
        assert tokenizer.encode(text) == want == tokenizer.encode(text), (merges, text)


def test_bpe_eq5_eq6_round_trip():
    """Any text has the ids that it has by hand, and comes back from them; so do any bytes, but no lone surrogate."""
    tokenizer = source_tokenizer()
    rng = np.random.default_rng(2)
    for _ in range(400):
        text = random_text(rng, [*NASTY, " the", "return", "),"], 30)
        ids = tokenizer.encode(text)
        assert ids == ids_by_hand(tokenizer, text) and tokenizer.decode(ids) == text, text
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, sys.maxunicode, 13)]))
    start = time.process_time()
    for text in everything, "ab" * 100_000:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.process_time() - start < 10  # a scan for each merge would take longer
    raw = rng.bytes(2000)
    ids = [tokenizer.tokens[byte] for byte in bpe.split_bytes(raw)]
    assert tokenizer.decode_bytes(ids) == raw and tokenizer.decode(ids) == raw.decode("utf-8", "replace")
    raises("surrogate", tokenizer.encode, "fine \udfff fine")
    raises("-1.* 999$", tokenizer.decode, [5, -1])


def test_bpe_special_tokens():
    """Special tokens have the last ids; they are plain text unless allowed, and then the longest name comes first."""
    tokenizer = source_tokenizer()
    assert tokenizer.special == {"<s>": 997, "<s>more": 998, "日": 999}
    text = "x<s>more<s> a\n日<s"
    for allowed, want in ((), []), (["<s>"], [997, 997]), ("all", [998, 997, 999]):
        ids = tokenizer.encode(text, allowed)
        assert [i for i in ids if i >= 997] == want and tokenizer.decode(ids) == text
    raises("<t>", tokenizer.encode, "x", ["<t>"])
    raises("--vocab 256", bpe.BPE.train, "a", 256, ["<s>"])
    for name, say in ("", "no name"), ("a", "'a'"), ("\ud800", "surrogate"), ("Ġnone", "Ġ.*vocab.json"):
        raises(say, lambda: bpe.BPE.train("aa", 300, [name]).save("no"))


def test_bpe_files():
    """The files have the names, order and ids of GPT-2's and tiktoken's, and are read back in any of their forms."""
    tokenizer = source_tokenizer()
    with workdir() as here:
        tokenizer.save("run")
        files = snapshot(here)
        files["gpt2/encoder.json"] = b"\xef\xbb\xbf" + files["run/vocab.json"]
        files["gpt2/vocab.bpe"] = files["run/merges.txt"].replace(b"\n", b"\r\n")
        files["bare/vocab.json"] = files["run/vocab.json"]
        files["bare/merges.txt"] = files["run/merges.txt"].removeprefix(b"#version: 0.2\n")
        unpack(files, here)
        for path in "run", "gpt2", "bare", "run/ranks.tiktoken":
            again = bpe.BPE.load(path)
            assert (again.tokens, again.merges) == (tokenizer.tokens, tokenizer.merges), path
            assert again.special == ({} if "ranks" in path else tokenizer.special)
    vocab = json.loads(files["run/vocab.json"])
    merges = files["bare/merges.txt"].decode().splitlines()
    ranks = files["run/ranks.tiktoken"].decode().splitlines()
    assert [vocab[c] for c in "!~¡ÿĀĊĠŃ"] == [0, 93, 94, 187, 188, 198, 220, 255]
    assert list(vocab.values()) == [*range(1000)] and vocab["<s>more"] == 998
    assert [vocab[line.replace(" ", "")] for line in merges] == [*range(256, 997)] and "# #" in merges
    assert ranks == [f"{base64.b64encode(raw).decode()} {i}" for i, raw in enumerate(tokenizer.tokens)]


def test_bpe_files_with_other_ids():
    """Ids may have any order and gaps, but then save() warns and leaves no rank file."""
    tokens = {raw: i + 1000 for i, raw in enumerate(bpe.SINGLE)} | {b" t": 9, b"th": 3}
    tokenizer = bpe.BPE(tokens, [(b" ", b"t"), (b"t", b"h")], {"<pad>": 0})
    with workdir(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        source_tokenizer().save("run")
        assert not said
        tokenizer.save("run")
        assert len(said) == 1 and "ranks.tiktoken is left out" in str(said[0].message)
        assert sorted(os.listdir("run")) == ["merges.txt", "vocab.json"]
        again = bpe.BPE.load("run")
    assert again.encode(" th<pad>th", "all") == [9, 1000 + ord("h"), 0, 3]


def test_bpe_bad_files():
    """A file that is missing, damaged or not in the order of the merges is refused, and the message names the path."""
    with workdir() as here:
        bpe.BPE.train("aaabdaaabac", 259).save("run")
        good = snapshot(here)
        vocab = json.loads(good["run/vocab.json"])
        ids = [json.dumps(vocab | {"aa": i}).encode() for i in (0, -1, 1.5, "x")]
        ranks = good["run/ranks.tiktoken"].splitlines(keepends=True)
        bad = {
            "run/vocab.json": [b"", b"[]", b'{"a": 0}', b"[" * 99999, *ids],
            "run/merges.txt": [b"one\n", b"a b c\n", b"zz zz\n", "日 a\n".encode()],
            "run/ranks.tiktoken": [b"", b"x", b"!!!! 1\n", b"YQ== a\n", b"".join(ranks[:256] + ranks[258:])],
        }
        for name, raws in bad.items():
            for raw in raws:
                unpack(good | {name: raw}, here)
                raises("^run", bpe.BPE.load, name if "ranks" in name else "run")
        raises("nowhere", bpe.BPE.load, "nowhere", kind=OSError)


def test_bpe_refuses_another_splitting():
    """A vocabulary with a token that (1) would cut is refused; parts of 'll, 're and 've are no reason."""
    for word in "b,", "a\n", "1a", "\n\nx", " \nx", "'sx", "é!", "。a", "日 ":
        merged = [word.encode()[:i] for i in range(2, len(word.encode()) + 1)]
        tokens = {raw: i for i, raw in enumerate([*bpe.SINGLE, *merged])}
        with workdir():
            bpe.BPE(tokens, [(raw[:-1], raw[-1:]) for raw in merged]).save("run")
            raises("run.*another splitting.*splits", bpe.BPE.load, "run")
    with workdir():
        bpe.BPE.train("it'll they're I've", 500).save("run")
        assert {b"'l", b"'r", b"'v"} <= bpe.BPE.load("run").tokens.keys()


# What tiktoken makes of it: tiktoken.get_encoding("gpt2").encode(text, allowed_special="all")
PUBLISHED = {
    "Hello, world!": "15496 11 995 0",
    "The tokenizer's 2024 dictionary: naïve café, don't   panic!": "464 11241 7509 338 48609 22155 25 41492 40304 "
    "11 836 470 220 220 13619 0",
    "def f(x):\n    return x**2  \n\n": "4299 277 7 87 2599 198 220 220 220 1441 2124 1174 17 220 220 628",
    "日本語 हिन्दी 😀 Ⅷ²\t\n": "33768 98 17312 105 45739 252 28225 117 11976 123 11976 101 24231 235 11976 99 24231 "
    "222 30325 222 2343 227 100 31185 197 198",
    "0" * 17: "8269 10535 830",
    "hello <|endoftext|>": "31373 220 50256",
}


def test_bpe_gpt2():
    """With GPT-2's vocabulary (in the folder that the environment variable GPT2 names) the ids are tiktoken's."""
    if "GPT2" not in os.environ:
        raise unittest.SkipTest("GPT2 names no folder")
    gpt2 = bpe.BPE.load(os.environ["GPT2"])
    assert len(gpt2.bytes) == 50257 and gpt2.special == {"<|endoftext|>": 50256} and len(gpt2.merges) == 50000
    for text, want in PUBLISHED.items():
        ids = gpt2.encode(text, "all")
        assert ids == [int(i) for i in want.split()] and gpt2.decode(ids) == text, text


def test_bpe_learns():
    """256 more tokens shorten an English text to less than half its bytes; tokens of another text do not."""
    text = bpe.__doc__
    own = bpe.BPE.train(text, 512).encode(text)
    other = bpe.BPE.train("春眠不觉晓，处处闻啼鸟。" * 99, 512).encode(text)
    assert len(own) < 0.5 * len(text.encode()) and len(other) > 0.95 * len(text.encode())


def test_bpe_same_files_for_any_hash_seed():
    """The merges and files do not depend on PYTHONHASHSEED."""
    code = "import bpe; bpe.BPE.train(open('bpe.py', encoding='utf-8').read(), 600, ['<b>', '<a>']).save({!r})"
    with workdir() as here:
        for seed in "0", "1":
            words = [sys.executable, "-B", "-c", code.format(str(here / seed))]
            subprocess.run(words, cwd=Path(bpe.__file__).parent, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
        for name in os.listdir("0"):
            assert Path("0", name).read_bytes() == Path("1", name).read_bytes()


def test_bpe_command():
    """A trained tokenizer needs no text: the command shows what it does, encodes and decodes, and changes no token."""
    _, files = finished(bpe)
    text = "the cat,\r\n  naïve 日 <s>\n\n"
    with workdir() as here:
        unpack(files, here)
        (here / "words.txt").unlink()
        status, out, err = call(bpe, ["--out", "run"])
        assert (status, err, changed(files, snapshot(here))) == (0, "", ["words.txt"]), err
        tokenizer = bpe.BPE.load("run")
        ids = " ".join(map(str, ids_by_hand(tokenizer, text))) + "\n"
        unpack({"text": text.encode(), "ids": ids.encode()}, here)
        with mock.patch.object(sys, "stdin", mock.Mock(buffer=io.BytesIO(text.encode()))):
            assert call(bpe, "--out run --encode -".split()) == (0, ids, "")
        assert call(bpe, "--out run --decode ids".split()) == (0, text, "")
        for vocab in 257, 4096:
            words = f"--text run/vocab.json --vocab {vocab} --out new/{vocab} --encode text"
            status, other, err = call(bpe, words.split())
            assert status == 0 and "MB of text" in err and ("no pair is left" in err) == (vocab == 4096)
            assert other.split() == [str(i) for i in bpe.BPE.load(f"new/{vocab}").encode(text)]
        colours = {colour for _, colour in Image.open("run/tokens.png").getcolors(1 << 20)}
    assert {*bpe.COLOURS, (255, 255, 255), (0, 0, 0)} <= colours
    made = [(a + b).decode() for a, b in tokenizer.merges]
    first, longest, _, *steps, sentence, last = out.splitlines()
    assert first.startswith(f"first merges: {made[0]!r} {made[1]!r} ")
    assert longest.startswith(f"longest: {max(made, key=len)!r} ")
    assert steps == ["  " + b"|".join(step).decode() for step in steps_by_hand(b" tokenizer", tokenizer.ranks)]
    tokens = [tokenizer.bytes[i].decode("utf-8", "backslashreplace") for i in ids_by_hand(tokenizer, bpe.SENTENCE)]
    assert sentence == "|".join(tokens)
    rate = len(WORDS) / len(ids_by_hand(tokenizer, WORDS))
    assert last.startswith(f"{len(tokenizer.bytes)} tokens, {rate:.3f} bytes per token: ")


def test_bpe_command_refuses():
    """Another tokenizer than the one in the folder, and files that cannot be read, are refused in one line."""
    refusals = {
        "--vocab 281": "vocab 4096, not 281.*--fresh",
        "--special <t>": "special .*<t>.*--fresh",
        "--text run/vocab.json": "made with another text.*--fresh",
        "--encode latin": "latin.*utf-8",
        "--decode words.txt": "words.txt: not ids",
    }
    with workdir() as here:
        unpack(finished(bpe)[1] | {"latin": b"caf\xe9" * 999}, here)
        for flags, say in refusals.items():
            wrong = refused(bpe, ["--out", "run", *flags.split()], say, here)
            assert not wrong, wrong


def test_bpe_killed():
    """A run that dies while it saves over another leaves a folder in which the same command ends as ever."""
    words = "--text words.txt --vocab 270 --out run".split()
    real = Path.replace
    ends = []
    for n in range(5):  # of four files are in place when it dies
        left = [None] * n

        def dies(*args):
            left.pop()  # IndexError if there is none
            return real(*args)

        with workdir() as here:
            unpack(finished(bpe)[1], here)
            with mock.patch.object(Path, "replace", dies):
                call(bpe, [*words, "--fresh"])
            assert call(bpe, words)[0] == 0, n
            ends.append(snapshot(here / "run"))
    assert all(end == ends[-1] for end in ends)


# --------------------------------------------------------------------------------------------- word2vec.py ------------
def word2vec_tables(V=12, d=5):
    """Random v and u in float64, (2, V, d)."""
    return normal(2, V, d)


def word2vec_objective(model, v, u, window, centres, around, k, p):
    """l of (1) or (6), summed over the pairs of a block; the expectation over negatives taken exactly, by their P p."""
    negatives = lambda h: k * (p * F.logsigmoid(-(u @ h))).sum()
    total = 0
    for i in range(len(centres)):
        seen = [around[i + j] for j in range(window.shape[1]) if window[i, j]]
        if model == "cbow" and seen:
            h = torch.stack([v[o] for o in seen]).mean(0)
            total = total + F.logsigmoid(u[centres[i]] @ h) + negatives(h)
        if model == "skipgram":
            for o in seen:
                total = total + F.logsigmoid(u[o] @ v[centres[i]]) + negatives(v[centres[i]])
    return total


def test_word2vec_eq3_pair():
    """A step of one pair moves v and u by autograd's gradient of (1) with the negatives that were sampled."""
    tables, c, o, negatives = word2vec_tables(), 3, 7, torch.tensor([1, 1, 7, 4])
    moved = tables.clone()
    word2vec.pair_step(*moved, c, o, negatives, 1.0)
    v, u = leaves = tables.clone().requires_grad_()
    objective = F.logsigmoid(u[o] @ v[c]) + F.logsigmoid(-u[negatives] @ v[c]).sum()
    near(moved - tables, torch.autograd.grad(objective, leaves)[0], 1e-12)


def test_word2vec_eq1_eq3_eq6_eq7_eq8_eq9_blocks():
    """A step of blocks moves v and u by the gradient of the plain objective, and in expectation over all negatives."""
    g = torch.Generator().manual_seed(0)
    V, L, R, S, k = 12, 6, 2, 3, 4
    tables = word2vec_tables()
    line = torch.randint(V, (2 * L + 2 * R,), generator=g)
    centres, around = line[R : R + 2 * L].view(2, L), line.unfold(0, L + 2 * R, L)
    window = torch.randint(2, (2, L, 2 * R + 1), generator=g).double()
    window[:, :, R] = 0
    window[0, 0] = 0  # a centre without neighbours
    p = torch.rand(V, generator=g, dtype=torch.float64)
    p, sampled = p / p.sum(), torch.randint(V, (2, S), generator=g)

    def moved(negatives, model):
        new = tables.clone()
        total = word2vec.sgd_step(*new, (centres, around, negatives, window), k, 1.0, model, measure=True)
        return new - tables, total

    def plain(shares, model):
        leaves = tables.clone().requires_grad_()
        blocks = zip(window, centres, around, shares)
        total = sum(word2vec_objective(model, *leaves, w, c, a, k, share) for w, c, a, share in blocks)
        return torch.autograd.grad(total, leaves)[0], total.detach()

    for model in "skipgram", "cbow":
        for got, want in zip(moved(sampled, model), plain(F.one_hot(sampled, V).double().mean(1), model)):
            near(got, want, 1e-9)
        each = [moved(torch.full((2, S), n), model)[0] for n in range(V)]  # linear in the negatives
        near(sum(share * one for share, one in zip(p, each)), plain(p.expand(2, V), model)[0], 1e-9)


def test_word2vec_eq7_is_the_pairs():
    """On average over the negatives, a block of one pair moves v and u as pair_step() does."""
    tables, window = word2vec_tables(), torch.zeros(1, 2, 3).double()
    window[0, 0, 2] = 1  # the word after the first centre
    blocks = torch.tensor([[3, 7]]), torch.tensor([[0, 3, 7, 0]]), torch.tensor([[1, 4]]), window
    fast, slow = tables.clone(), tables.clone()
    word2vec.sgd_step(*fast, blocks, 2, 1.0, "skipgram")
    word2vec.pair_step(*slow, 3, 7, torch.tensor([1, 4]), 1.0)
    near(fast, slow, 1e-12)


def test_word2vec_eq2_negatives():
    """Negatives are as frequent as count^(3/4) says, by chi-square."""
    counts = torch.tensor([4000.0, 900, 256, 81, 16, 16, 1])
    table = word2vec.negative_table(counts)
    p = counts.double() ** 0.75 / (counts.double() ** 0.75).sum()
    near(table.bincount(minlength=7) / len(table), p, 1e-6)
    torch.manual_seed(0)
    negatives = word2vec.sample_blocks(torch.zeros(3200, dtype=torch.int32), torch.ones(7), table, 2)[2]
    n = negatives.flatten().long().bincount(minlength=7)
    assert ((n - p * n.sum()) ** 2 / (p * n.sum())).sum() < 22.5  # 6 degrees of freedom: p = .001


def test_word2vec_eq5_subsampling():
    """A word of relative frequency f is kept with probability sqrt(t / f) + t / f, at most 1; t = 0 keeps all."""
    counts = torch.tensor([9000.0, 900, 90, 10])
    keep = word2vec.keep_probability(counts, 1e-2)
    near(keep, [min(1, (1e-2 / f) ** 0.5 + 1e-2 / f) for f in (0.9, 0.09, 0.009, 0.001)], 1e-6)
    assert (word2vec.keep_probability(counts, 0) == 1).all()
    torch.manual_seed(1)
    ids = torch.arange(40_000, dtype=torch.int32) % 4
    centres, _, _, window = word2vec.sample_blocks(ids, keep, word2vec.negative_table(counts), 3)
    n = centres.flatten()[window.flatten(0, 1).any(1)].long().bincount(minlength=4)
    assert ((n - 1e4 * keep).abs() < 400).all(), n


def test_word2vec_eq4_windows():
    """b is uniform on 1 .. R; a window is b kept words to each side and ends with the text and at a blank line."""
    torch.manual_seed(2)
    ids, R = torch.arange(500, dtype=torch.int32), 4
    ids[[100, 101, 250]] = -1
    table = torch.zeros(9, dtype=torch.int32)
    centres, around, _, window = word2vec.sample_blocks(ids, torch.ones(500), table, R)
    assert centres.shape == (16, 32) and around.shape == (16, 32 + 2 * R) and window.shape == (16, 32, 2 * R + 1)
    paragraph, words = (ids < 0).cumsum(0), ids[ids >= 0]
    assert torch.equal(centres.flatten()[: len(words)], words) and not window.flatten(0, 1)[len(words) :].any()
    seen = collections.Counter()
    for block, i in itertools.product(range(16), range(32)):
        if block * 32 + i >= len(words):
            continue
        c, place = int(centres[block, i]), block * 32 + i
        found = [int(around[block, i + j]) for j in range(2 * R + 1) if window[block, i, j]]
        possible = words[max(0, place - R) : place + R + 1].tolist()
        possible = [word for word in possible if paragraph[word] == paragraph[c]]
        b = max(sum((word - c) * side > 0 for word in found) for side in (-1, 1))
        assert set(found) == {w for w in possible if w != c and abs(possible.index(w) - possible.index(c)) <= b}
        if len(possible) == 2 * R + 1:
            seen[b] += 1
    assert set(seen) == {1, 2, 3, 4} and all(abs(n - sum(seen.values()) / 4) < 40 for n in seen.values()), seen


def word2vec_topics(n=1500):
    """Paragraphs about one of two topics each; two frequent words belong to neither."""
    rng = np.random.default_rng(0)
    kinds = [[f"{c}{d}" for c in letters for d in "aeiou"] for letters in ("bcd", "xyz")]
    return "\n\n".join(" ".join(rng.choice([*kinds[i % 2], "the", "and"], 12)) for i in range(n))


def test_word2vec_learns():
    """Of two planted topics, the nearest neighbours of each word are words of its own topic, by both models."""
    with workdir() as here:
        (here / "text").write_text(word2vec_topics())
        for model in "skipgram", "cbow":
            made = quiet(word2vec.train, "text", 4, 64, 0.05, 10, 3, 5, 1e-2, 1, model)
            words = [word for word in made.words if word not in ("the", "and")]
            for word in words:
                others = [other for other, _ in word2vec.most_similar(made, word, n=10) if other in words][:8]
                assert sum((other[0] in "bcd") == (word[0] in "bcd") for other in others) >= 7, (model, word, others)


def test_word2vec_frequent_words_stay():
    """Vectors do not diverge for a word that fills half of one page, nor where the vocabulary is small."""
    rng = np.random.default_rng(0)
    text = np.array([f"w{a}{b}" for a in "abcdefghij" for b in "abcdefghijklmnopqrst"])[rng.integers(0, 200, 30_000)]
    text[12_000:12_600:2] = "odd"
    with workdir():
        Path("text").write_text(" ".join(text), "utf-8")
        vectors = quiet(word2vec.train, "text", epochs=2, dim=16, sample=0)
        norm = vectors.table.norm(dim=1)
        assert norm[vectors.words.index("odd")] < 10 * norm.median() < 20, norm
        Path("text").write_text(" ".join(text[rng.integers(0, 30, 20_000)]), "utf-8")
        assert quiet(word2vec.train, "text", epochs=1, dim=16, sample=0).table.norm(dim=1).max() < 2


WORDS_READ = {
    "The cat's naïve Café_2 x": "the cat s naïve café x",
    "Дом дома 我爱你 don't": "дом дома 我 爱 你 don t",
    "हिन्दी விக்கி မြန်မာဘာသာ": "हिन्दी விக்கி မြန်မာဘာသာ",
    "كِتَاب שָׁלוֹם": "كِتَاب שָׁלוֹם",
    "İstanbul e\u0301cole": "i\u0307stanbul e\u0301cole",  # marks apart from their letters
    "می\u200cخواهم wo\u00adrd end\u200d": "می\u200cخواهم word end",  # joiners, a soft hyphen
    "a\rb\r\nc\u0085d\u2028e\x0bf\x0cg": "a b c d e f g",
}


def test_word2vec_words():
    """A word is a run of letters with their marks, a Chinese character is one; any line end separates words."""
    with workdir() as here:
        for text, want in WORDS_READ.items():
            (here / "text").write_bytes((text + " zz" * 500).encode())
            (words,) = word2vec.read_words("text")
            assert [word for word in words if word != "zz"] == want.split(" "), words
        (here / "text").write_bytes(b"one\r\rtwo\r\n \t\r\nthree\n\n\nfour five\n" + b"zz " * 400)
        paragraphs = [[word for word in words if word != "zz"] for words in word2vec.read_words("text")]
        assert paragraphs == [["one"], ["two"], ["three"], ["four", "five"]], paragraphs
        (here / "text").write_text("b a b\n\na c c b " * 90)
        words, counts, ids = word2vec.load_ids("text", 100)
        assert (words, counts) == (["b", "a", "c"], [270, 180, 180]) and ids[:8].tolist() == [0, 1, 0, -1, 1, 2, 2, 0]
        assert word2vec.load_ids("text", 181 - 1)[0] == ["b", "a", "c"]
        raises("1 words.*--min-count", word2vec.load_ids, "text", 200)
        (here / "bad").write_bytes(b"caf\xe9 " * 400)
        raises("bad.*utf-8", word2vec.load_ids, "bad", 1)


def word2vec_planted(words, rows):
    """Vectors with these rows."""
    made = word2vec.Vectors(words, len(rows[0]))
    made.table.copy_(torch.tensor(rows))
    return made


def test_word2vec_eq10_nearest_and_analogy():
    """Neighbours are by the cosine; the analogy adds and subtracts unit vectors, and its own words are no answer."""
    made = word2vec_planted(["a", "b", "c", "d", "e"], [[1.0, 0], [0.1, 0.01], [9, 9], [0, 2], [-1, 0]])
    assert [word for word, _ in word2vec.most_similar(made, "a", n=9)] == ["b", "c", "d", "e"]
    near(word2vec.most_similar(made, "a", n=2)[1][1], 0.5**0.5, 1e-6)
    a, b, c = torch.eye(4)[:3]  # man, woman, king
    sums = {"queen": b - a + c, "near b": b, "near c": c, "plus a": a + b + c, "other way": a - b + c, "b and c": b + c}
    rows = {"man": 2 * a, "woman": 5 * b, "king": 0.3 * c} | {name: 3 * v for name, v in sums.items()}
    decoys = {"b and c": 0.8 * torch.eye(4)[3], "near b": 0.1 * torch.eye(4)[3], "near c": 0.1 * torch.eye(4)[3]}
    rows = {name: (v + decoys.get(name, 0)).tolist() for name, v in rows.items()}
    made = word2vec_planted([*rows], [*rows.values()])
    answer = word2vec.most_similar(made, ["woman", "king"], "man", 6)
    assert answer[0][0] == "queen" and abs(answer[0][1] - 1) < 1e-6 and len(answer) == 6
    assert not {"man", "woman", "king"} & {word for word, _ in answer}
    raises("'cat'", word2vec.most_similar, made, "cat")


def test_word2vec_map():
    """The map shows the two principal components of the normalised vectors, in two scales."""
    flat = torch.tensor([[-5.0, -2, 999], [5, -2, 999], [-5, 2, 999], [5, 2, 999], [0, 0, 999]])
    flat *= torch.tensor([1, 2, 3, 4, 5]).view(5, 1)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0][:3]
    places = {}
    draw = mock.Mock(text=lambda at, word, *rest: places.update({word: torch.tensor(at)}))
    with mock.patch.object(word2vec.ImageDraw, "Draw", lambda image: draw), workdir():
        word2vec.draw_map("map.png", word2vec_planted(list("pqrst"), (flat @ turn).tolist()), side=300)
    across, down = (places["q"] - places["p"]).abs().tolist(), (places["r"] - places["p"]).abs().tolist()
    assert across[0] > 199 and across[1] < 1 and down[0] < 1 and down[1] > 199
    assert (places["t"] - 150).abs().max() < 1


def test_word2vec_command():
    """It trains and saves; a question to the finished run needs no text; unknown words are refused before training."""
    with workdir() as here:
        (here / "text").write_text(word2vec_topics(200))
        words = "--text text --dim 7 --batch 500 --epochs 2 --out run".split()
        for flags in ["--nearest", "zebra"], ["--analogy", "ba", "be", "zebra"]:
            status, _, err = call(word2vec, [*words, *flags])
            assert status == 1 and "'zebra'" in err and not Path("run").exists(), err
        status, out, err = call(word2vec, words)
        assert (status, err) == (0, ""), err
        assert sorted(os.listdir("run")) == ["log.csv", "map.png", "model.pt", "vectors.txt"]
        assert re.search(r"iteration 2/2: loss [\d.]+, [\d,]+/s", out), out
        head, *lines = (here / "run/vectors.txt").read_text("utf-8").splitlines()
        made = word2vec.load("run/model.pt")
        assert head == f"{len(lines)} 7" and [line.split(" ")[0] for line in lines] == made.words
        near(torch.tensor([[float(x) for x in line.split(" ")[1:]] for line in lines]), made.table, 1e-5)
        (here / "text").unlink()
        status, out, err = call(word2vec, "--out run --nearest BA --analogy ba be xa".split())
        assert (status, err) == (0, ""), err
        show = lambda pairs: ", ".join(f"{word} {cosine:.2f}" for word, cosine in pairs)
        want = [f"BA: {show(word2vec.most_similar(made, 'ba'))}"]
        want.append(f"ba : be = xa : {show(word2vec.most_similar(made, ['be', 'xa'], ['ba'], 4))}")
        assert out.splitlines() == want, out
        assert "'cat'" in call(word2vec, "--out run --nearest cat".split())[2]


# Made by gensim 4.4.0 and scipy 1.17.1: k = KeyedVectors(2); k.add_vectors(["the", "café", "New_York"],
# np.array([[0.1, -2.5e-8], [1 / 3, 7], [-0.0, 1e20]], np.float32)); k.save_word2vec_format("c", binary=...)
GENSIM_ROWS = [[0.1, -2.5e-8], [1 / 3, 7], [-0.0, 1e20]]
GENSIM_TEXT = b"3 2\nthe 0.1 -2.5e-08\ncaf\xc3\xa9 0.33333334 7.0\nNew_York -0.0 1e+20\n"
GENSIM_BINARY = (
    b"3 2\nthe \xcd\xcc\xcc=\x95\xbf\xd6\xb2caf\xc3\xa9 \xab\xaa\xaa>\x00\x00\xe0@New_York \x00\x00\x00\x80\xecx\xad`"
)


def word2vec_twelve():
    """w0 .. w11, the vectors that gensim was asked about: np.round(default_rng(0).normal(size=(12, 3)), 1)."""
    rows = """0.1 -0.1 0.6  0.1 -0.5 0.4  1.3 0.9 -0.7  -1.3 -0.6 0  -2.3 -0.2 -1.2  -0.7 -0.5 -0.3
              0.4 1 -0.1  1.4 -0.7 0.4  0.9 0.1 -0.7  -0.9 -0.5 0.2  -1 -0.2 -0.2  0.5 0.2 0.4"""
    return word2vec_planted([f"w{i}" for i in range(12)], np.float32(rows.split()).reshape(12, 3).tolist())


def test_word2vec_eq10_most_similar():
    """Any number of words are added and subtracted, as by gensim; a word is found as written, or in lower case."""
    made = word2vec_twelve()
    # k.most_similar(positive=["w1", "w5", "w7"], negative=["w2", "w9"], topn=4)
    want = {"w0": 0.545106, "w3": 0.215832, "w11": 0.090186, "w10": -0.072545}
    got = word2vec.most_similar(made, ["w1", "w5", "w7"], ["w2", "W9"], 4)
    assert [word for word, _ in got] == [*want]
    near([cosine for _, cosine in got], [*want.values()], 1e-6)
    assert len(word2vec.most_similar(made, ["w1", "w1"], "w2", 99)) == 10  # all but the two given
    made = word2vec_planted(["us", "US", "u", "s"], [[1.0, 2], [3, 4], [5, 6], [7, 8]])
    assert [made[word].tolist() for word in ("us", "US", "Us", "S")] == [[1, 2], [3, 4], [1, 2], [7, 8]]
    assert "Us" in made and "them" not in made
    assert word2vec.most_similar(made, "us") == word2vec.most_similar(made, ["us"])  # not of the words u and s
    raises("'them'", made.__getitem__, "them")
    raises("'them'", word2vec.most_similar, made, "us", "them")


def test_word2vec_eq11_spearman():
    """Equal to scipy.stats.rankdata and spearmanr, ties included."""
    x, y = torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6, 5, 3]), torch.tensor([2.5, 7, 1, 8, 2.5, 8, 1, 8, 2, 8])
    assert word2vec.ranks(x).tolist() == [4.5, 1.5, 6, 1.5, 7.5, 10, 3, 9, 7.5, 4.5]
    assert abs(word2vec.spearman(x, y) - 0.11433239009500588) < 1e-12
    assert abs(word2vec.spearman(x, x**3) - 1) < 1e-12 and abs(word2vec.spearman(x, -x) + 1) < 1e-12
    assert math.isnan(word2vec.spearman(x, 0 * x))


def test_word2vec_formats():
    """Both formats are written to the byte as by gensim, and read: gensim's, and the layout of the authors' program."""
    with workdir():
        made = word2vec_planted(["the", "café", "New_York"], GENSIM_ROWS)
        for binary, want in (False, GENSIM_TEXT), (True, GENSIM_BINARY):
            word2vec.save_vectors("v", made, binary)
            assert Path("v").read_bytes() == want
        head, *lines = GENSIM_TEXT.splitlines(keepends=True)
        cut = [4, 16, 30, len(GENSIM_BINARY)]
        rows = [GENSIM_BINARY[a:b] for a, b in itertools.pairwise(cut)]
        files = [GENSIM_TEXT, GENSIM_BINARY, GENSIM_TEXT[:-1], GENSIM_TEXT.replace(b"\n", b" \n")]
        files += [head + b"\n".join(rows) + b"\n", GENSIM_TEXT.replace(b"\n", b"\r\n")]
        files += [b"4 2\n" + b"".join(lines) + b"the 8 9\n", b"4 2\n" + b"".join(rows) + b"the " + bytes(8)]  # twice
        for file in files:
            Path("v").write_bytes(file)
            read = word2vec.load_vectors("v")
            assert read.words == made.words and read.number == made.number, file
            same(read.table, made.table)
        numbers = np.random.default_rng(0).integers(0, 256, (500, 12), dtype=np.uint8)
        numbers[:, :4] = np.frombuffer(b"1\n 2 3\n4\n\n\n\n" * 500, np.uint8).reshape(500, 12)[:, :4]  # like text
        Path("v").write_bytes(b"500 3\n" + b"".join(b"w%d " % i + row.tobytes() for i, row in enumerate(numbers)))
        assert word2vec.load_vectors("v").table.numpy().tobytes() == numbers.tobytes()


def test_word2vec_formats_refused():
    """A file that is cut anywhere, longer than its first line says, ragged or no vectors is refused by its name."""
    bad = [GENSIM_BINARY[:n] for n in range(len(GENSIM_BINARY))]
    bad += [GENSIM_TEXT[:n] for n in range(len(GENSIM_TEXT) - 5)]  # later only a digit is missing
    bad += [b"2" + file[1:] for file in (GENSIM_TEXT, GENSIM_BINARY)]
    bad += [GENSIM_TEXT.replace(b"7.0", b"7.0 1"), GENSIM_TEXT.replace(b"7.0", b"x"), GENSIM_TEXT.replace(b"\xc3", b"")]
    bad += [b"3 99999999999999999999\n" + GENSIM_TEXT[4:], b"0 2\n", b"-1 2\n", b"no vectors\nat all\n", b"the 1 2\n"]
    with workdir():
        for file in bad:
            Path("v").write_bytes(file)
            raises("^v: damaged, or not vectors", word2vec.load_vectors, "v")


def test_word2vec_score():
    """The scores of pairs and of analogies are gensim's; --vectors and a finished run print the same."""
    made, triples = word2vec_twelve(), itertools.product(range(12), range(12), range(3))
    triples = [triple for triple in triples if len({*triple}) == 3]
    with workdir() as here:
        lines = "".join(f"w{i}\tW{(i * i + 1) % 12}\t{i * 7 % 5}\n" for i in range(12))
        (here / "pairs").write_text(f"# a comment\n\n{lines}w0\tNew York\t3\n")
        lines = "".join(f"w{a} W{b} w{c} w{(a * b + c) % 12}\n" for a, b, c in triples)
        (here / "four").write_text(f": a heading\n{lines}w0 w1 w2 zebra\n")
        # k.evaluate_word_pairs, k.evaluate_word_analogies of gensim
        pairs, four = word2vec.read_questions("pairs"), word2vec.read_questions("four")
        value, n = word2vec.score(made, pairs)
        assert abs(value + 0.17681390752635054) < 1e-12 and (n, len(pairs)) == (12, 13)
        value, n = word2vec.score(made, four)
        assert abs(value - 31 / 330) < 1e-7 and (n, len(four)) == (330, 331)
        word2vec.save_vectors("v", made, binary=True)
        want = "pairs: Spearman's correlation -0.177, 12 of 13 lines have vectors\n"
        assert call(word2vec, "--vectors v --score pairs".split()) == (0, want, "")
        want = "four: share of right answers 0.094, 330 of 331 lines have vectors\n"
        assert call(word2vec, "--vectors v --score four".split()) == (0, want, "")
        status, out, err = call(word2vec, "--vectors v --nearest W1 --analogy w1 w2 w3".split())
        assert (status, err) == (0, "") and [line[:4] for line in out.splitlines()] == ["W1: ", "w1 :"], out
        assert sorted(os.listdir()) == ["four", "pairs", "v"]  # nothing was trained
        for text in "a b\n", "a b c\n", "a b 1\na b c d\n", "# nothing\n", "a\tb\t1\t\n", "x y 1\nw0 w1 2\n":
            (here / "bad").write_text(text)
            status, out, err = call(word2vec, "--vectors v --score bad".split())
            assert (status, out) == (1, "") and "--score" in err and err.count("\n") == 1, (text, err)
        (here / "text").write_text(word2vec_topics(200))
        (here / "topics").write_text("ba be 2\nba xa 1\nxa xe 2\nxi bi 1\n")
        words = "--text text --dim 7 --batch 500 --out run --score topics".split()
        status, out, err = call(word2vec, words)
        assert (status, err) == (0, "") and "iteration" in out, err
        (here / "text").unlink()
        asked = call(word2vec, "--out run --score topics".split())
        assert asked[0] == 0 and asked[1].startswith("topics: Spearman's") and out.endswith(asked[1]), asked


# -------------------------------------------------------------------------------------------------- rnn.py ------------
def small_rnn(cell="lstm", width=12, chars="abcdef", seed=0, **more):
    """A small CharRNN in evaluation mode, with random weights."""
    torch.manual_seed(seed)
    return rnn.CharRNN(chars, cell, width, **more).eval()


def plain_step(cell, a, c):
    """One step of a cell as the papers define it, from pre-activations (N, G H) and c -> h, c."""
    if cell == "rnn":
        return a.tanh(), c
    i, f, g, o = a.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def plain_run(cell, inputs, w_hh, state):
    """The plain recurrence, for autograd -> lists of h_t and of c_t, t = 1 .. T."""
    h, c = state[0], state[-1]
    all_h, all_c = [], []
    for e in inputs:
        h, c = plain_step(cell, e + h @ w_hh, c)
        all_h.append(h)
        all_c.append(c)
    return all_h, all_c


def check_gradients(cell, layer):
    """States and hand-written gradients are those of torch's layer with the same weights, for several lengths."""
    for T in (1, 2, 7, 40):
        x = normal(T, 3, 4, seed=T).requires_grad_()
        state = normal(2 if cell == "lstm" else 1, 3, 5, seed=2)
        inputs = x @ layer.weight_ih_l0.T + layer.bias_ih_l0 + layer.bias_hh_l0
        h, last = rnn.Unroll.apply(cell, inputs, layer.weight_hh_l0.T, state)
        want, end = layer(x, state if cell == "rnn" else (state[:1], state[1:]))
        near(h, want, 1e-12)
        near(last, end if cell == "rnn" else torch.cat(end), 1e-12)
        weights = normal(T, 3, 5, seed=3)
        leaves = [x, *layer.parameters()]
        got, wanted = (torch.autograd.grad((y * weights).sum(), leaves) for y in (h, want))
        for a, b in zip(got, wanted):
            near(a, b, 1e-11, 1e-11)


def test_rnn_eq1_2_4_5_6_tanh_gradients():
    """The tanh RNN's values and hand-written gradients equal those of torch.nn.RNN in float64."""
    check_gradients("rnn", nn.RNN(4, 5).double())


def test_rnn_eq4_9_10_lstm_gradients():
    """The LSTM's values and hand-written gradients equal those of torch.nn.LSTM in float64."""
    check_gradients("lstm", nn.LSTM(4, 5).double())


def test_rnn_eq11_chunks():
    """Chunks give what one long pass gives, but no gradient crosses from one to the one before."""
    for cell in ("rnn", "lstm"):
        model, x = small_rnn(cell), torch.cat([torch.randint(3, (10, 3)), torch.randint(3, 6, (10, 3))])
        whole, end = model(x, model.start(3))
        first, state = model(x[:10], model.start(3))
        second, last = model(x[10:], state)
        near(torch.cat([first, second]), whole, 1e-6)
        near(last, end, 1e-6)
        assert state.all() and not state.requires_grad
        (gradient,) = torch.autograd.grad(second.square().sum(), model.embedding)
        assert gradient[3:].any() and not gradient[:3].any()  # ids below 3 are in the first chunk only
        (gradient,) = torch.autograd.grad(whole[10:].square().sum(), model.embedding)
        assert gradient[:3].any()


def test_rnn_eq11_training_carries_the_state():
    """In training, chunks follow each other in every stream with the state of the chunk before, zero in a new epoch."""
    text = "".join(map(chr, range(100, 1300)))  # each character tells its place
    seen, forward = [], rnn.CharRNN.forward

    def watch(model, x, state):
        logits, last = forward(model, x, state)
        if model.training:
            seen.append((x, state, last))
        return logits, last

    with mock.patch.object(rnn.CharRNN, "forward", watch):
        quiet(rnn.train, text, 40, batch=4, length=9, width=8)
    per_stream = 1080 // 4
    chunks = (per_stream - 1) // 9
    for k, (x, state, _) in enumerate(seen):
        assert ((x - x[0, 0]) % 1080 == torch.arange(9)[:, None] + per_stream * torch.arange(4)).all()
        if k % chunks:
            assert ((x[0] - seen[k - 1][0][-1]) % 1080 == 1).all() and torch.equal(state, seen[k - 1][2])
        else:
            assert not state.any()
    assert len({x[0, 0].item() for x, _, _ in seen[::chunks]}) == 2  # epochs start at random places


def test_rnn_log():
    """The log has the nats of the last tenth, which training does not see, by the EMA model."""
    text = "abcab" * 40 + "d" * 20
    with workdir():
        model = quiet(rnn.train, text, 5, batch=4, length=9, width=8, path=Path("model.pt"))
        valid = np.loadtxt("log.csv", delimiter=",", skiprows=1)[2]
        near(valid, rnn.evaluate(model, rnn.to_ids(text, "abcd"), 198), rtol=1e-6)


def test_rnn_eq3_bits():
    """evaluate() is the mean loss over the last characters, each once, whatever the streams and chunks."""
    model, ids = small_rnn(), torch.randint(6, (403,), generator=torch.Generator().manual_seed(1))
    logits, _ = model(ids[:-1, None], model.start(1))
    nats = -logits[:, 0].log_softmax(1).gather(1, ids[1:, None])[:, 0].detach()
    for given in ((1, 299), (1, 1000, 7)):
        near(rnn.evaluate(model, ids, 300, *given), nats[299:].mean(), rtol=1e-5)
    parts = []
    for start in (300, 335, 370):  # three streams of 35, the last of 33, each with a past of 20
        logits, _ = model(ids[start - 21 : start + 34, None], model.start(1))
        targets = ids[start - 20 : start + 35]
        parts.append(F.cross_entropy(logits[: len(targets), 0], targets, reduction="none")[20:])
    near(rnn.evaluate(model, ids, 300, 3, 20, 8), torch.cat(parts).mean().item(), rtol=1e-5)


def test_rnn_eq12_sample():
    """Temperature 0 takes the most probable character; above, characters come as often as the softmax says."""
    model = small_rnn(chars="abef日😀")
    model.out.weight.data *= 6
    want = "日a"
    for _ in range(30):
        logits, _ = model(torch.tensor([[model.chars.index(char)] for char in want]), model.start(1))
        want += model.chars[logits[-1, 0].argmax()]
    assert rnn.sample(model, 30, "日a", 0) == rnn.sample(model, 30, "日a", 1e-9) == want
    for temperature in (1.0, 3.0):
        logits, _ = model(torch.tensor([[3]]), model.start(1))
        p = (logits[0, 0] / temperature).softmax(0)
        drawn = [rnn.sample(model, 1, "f", temperature, seed)[1] for seed in range(600)]
        n = torch.tensor([drawn.count(char) for char in model.chars])
        often = 600 * p > 5
        assert ((n - 600 * p).square() / (600 * p))[often].sum() < 25  # chi-square with at most 5 degrees of freedom
    one, again, other = (rnn.sample(model, 20, "f", seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    assert rnn.sample(model, 5) == rnn.sample(model, 5, "a")[1:]
    raises("'z'", rnn.sample, model, 5, "az")


def test_rnn_threads():
    """Threads that sample from one model, while another is trained, each get what they get alone."""
    model, text, got = small_rnn(width=24), "abcdef" * 300, {}
    train = functools.partial(rnn.train, text, 30, 4, 8, width=16)
    tasks = {seed: functools.partial(rnn.sample, model, 150, "ab", seed=seed) for seed in range(4)}
    tasks["weights"] = lambda: train().state_dict()
    alone = {name: task() for name, task in tasks.items()}
    threads = [threading.Thread(target=lambda k=k: got.update({k: tasks[k]()})) for k in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same(dict(sorted(got.items(), key=str)), dict(sorted(alone.items(), key=str)))


def test_rnn_eq4_7_8_9_lag():
    """lag_norms() gives autograd's dL/dh_t, without the path from c_t to c_{t+1}, and the whole dL/dc_t."""
    ids = torch.randint(6, (90,), generator=torch.Generator().manual_seed(2))
    for cell in ("rnn", "lstm"):
        model, total = small_rnn(cell).double(), 0
        for start in torch.linspace(0, 90 - 17, 4).long().tolist():
            x = ids[start : start + 17, None]
            _, state = model(x[:8], model.start(1))
            all_h, all_c = plain_run(cell, model.inputs(x[8:16]), model.w_hh, state)
            loss = F.cross_entropy(model.out(all_h[-1]), x[16])
            norms = []
            for path in [all_h, all_c][: len(state)]:
                gradients = torch.autograd.grad(loss, path, retain_graph=True)
                norms.append(torch.stack(gradients).norm(dim=2))
            total = total + torch.stack(norms)
        want = total[:, :, 0].flip(1)
        near(rnn.lag_norms(model, ids, 8, 4), (want / want[:, :1]).detach(), 1e-12, 1e-8)


def test_rnn_learns():
    """What depends on the last five characters is learned: one random character in five costs log(2) / 5 nats."""
    coins = torch.randint(2, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    text = "".join("a..1x" if coin else "b..1y" for coin in coins)
    for cell in ("rnn", "lstm"):
        model = quiet(rnn.train, text, 300, 8, 15, 2e-2, cell, 24, 0.0)
        nats = rnn.evaluate(model, rnn.to_ids(text, model.chars), len(text) * 9 // 10, 2, 20)
        assert 0.13 < nats < 0.15, (cell, nats)  # without memory it costs 0.277


def test_rnn_dropout():
    """A dropout mask is the same for a whole chunk and keeps the mean; without training there is none."""
    model, x = small_rnn(width=40, dropout=0.25), torch.randint(6, (4, 50))
    model.out = nn.Identity()
    plain, _ = model(x, model.start(50))
    masked, _ = model.train()(x, model.start(50))
    share = masked / plain
    near(share, share[:1], 1e-4)
    near(share.mean(), 1, 0.05)
    near((masked == 0).float().mean(), 0.25, 0.03)


def test_rnn_command():
    """The command prints the numbers of its checkpoint; a prompt to a finished run needs neither flags nor the text."""
    words = "--text words.txt --iters 130 --batch 4 --length 8 --width 16 --samples 40 --out run".split()
    with workdir() as here:
        text = "the cat sat on the mat.\n" * 90
        (here / "words.txt").write_text(text)
        status, out, err = call(rnn, words)
        assert (status, err) == (0, ""), err
        assert sorted(os.listdir("run")) == ["lag.png", "log.csv", "model.pt", "samples.txt"]
        model = rnn.load("run/model.pt")
        nats = rnn.evaluate(model, rnn.to_ids(text, model.chars), len(text) * 9 // 10)
        assert f"{nats:.4f} nats = {nats / math.log(2):.4f} bits" in out
        assert (here / "run/samples.txt").read_text() == rnn.sample(model, 40)
        status, out, _ = call(rnn, ["--out", "run", "--compare", "run/model.pt", "--samples", 7])
        assert status == 0 and f"{nats:.4f} nats" in out

        for flags, say in {"--prompt Z": "'Z'", "--batch 4000 --out new": "too few"}.items():
            status, _, err = call(rnn, [*words, *flags.split()])
            assert status and re.search(say, err) and err.count("\n") == 1, (flags, err)
        (here / "words.txt").unlink()
        status, out, err = call(rnn, ["--prompt", "the c", "--out", "run", "--temperature", 0, "--samples", 40])
        assert (status, err) == (0, "") and rnn.sample(model, 40, "the c", 0) in out


def test_rnn_text():
    """A text may hold any characters; one that is not UTF-8, too short or not there is refused in one line."""
    with workdir() as here:
        (here / "odd.txt").write_text("\ufeff日本語のテキスト😀。\n" * 99, "utf-8")
        text = rnn.load_text("odd.txt")
        assert text[0] == "日" and rnn.to_ids("日😀", "あ日😀").tolist() == [1, 2]
        assert len(rnn.sample(quiet(rnn.train, text, 2, 2, 4, width=8), 5)) == 5
        (here / "latin.txt").write_bytes(b"caf\xe9 " * 300)
        (here / "short.txt").write_text("short")
        raises("latin.txt.*utf-8", rnn.load_text, "latin.txt")
        raises("at least 1000", rnn.load_text, "short.txt")
        raises("none.txt", rnn.load_text, "none.txt", kind=OSError)


# -------------------------------------------------------------------------------------------------- vae.py ------------
class LinearGaussian:
    """x = W z + 0.5 noise, six numbers from three: p(x) and p(z|x) are known. q is p(z|x), moved and widened by off."""

    def __init__(self, off=0.0):
        self.off = off
        self.latent = 3
        self.asked = []  # all z whose likelihood was asked for
        self.W = normal(6, 3).svd().U * torch.tensor([0.5, 1.0, 2.0])  # orthogonal columns
        covariance = self.W @ self.W.T + torch.eye(6) / 4
        self.marginal = D.MultivariateNormal(torch.zeros(6).double(), covariance)

    def q(self, x, off):
        variance = 1 / (1 + 4 * self.W.square().sum(0)).expand(len(x), 3)
        mean = 4 * variance * (x @ self.W)
        return D.Normal(mean + off, (1 + off) * variance.sqrt())

    def encode(self, x):
        q = self.q(x, self.off)
        return q.loc, 2 * q.scale.log()

    def log_likelihood(self, x, z):
        self.asked.append(z)
        return D.Normal(z @ self.W.T, 0.5).log_prob(x).sum(-1)


def awake(channels=1, size=4, latent=2):
    """A VAE with random weights in eval mode and five binary images for it, in float64."""
    model = woken(vae.VAE(channels, size, 8, latent))
    x = normal(5, channels, size, size) > 0
    return model.double().eval(), x.double()


def test_vae_eq1_sample():
    """z is standard normal, different for each image and seed, and an image is the mean of p(x|z), as -1 .. 1."""
    model = vae.VAE(1, 1, 8, 1)
    model.decode = lambda z: z.view(-1, 1, 1, 1)
    x = vae.sample(model, 20_000, 1)
    z = 2 * x.double().atanh()  # as tanh(z / 2) = 2 y - 1
    assert len(z.unique()) > 19_000
    near([z.mean(), z.var()], [0, 1], 0.05)
    near(vae.sample(model, 20_000, 1, chunk=3000), x, 1e-6)
    assert not torch.equal(vae.sample(model, 20_000, 2), x)


def test_vae_eq2_network():
    """Any size and channels fit, every weight counts, and images that are not binary are refused."""
    for channels, size, latent in (1, 1, 1), (3, 7, 2), (1, 8, 5):
        model, x = awake(channels, size, latent)
        z = normal(5, latent)
        assert model.decode(z).shape == x.shape
        assert all(value.shape == z.shape for value in model.encode(x))
        loss, *_ = vae.loss_elbo(model, x, z)
        loss.backward()
        assert all(p.grad.any() for p in model.parameters())
    for bad in -1.0, 0.5, math.nan:
        x[3, 0, 1, 2] = bad
        raises("binarise", vae.evaluate, model, x)


def test_vae_eq3_eq4_eq5_eq7_elbo():
    """The mean ELBO of a linear Gaussian model, and its gradient, is that of log p(x) - KL(q ‖ p(z|x))."""
    x = 2 * normal(4, 6)
    points = 3**0.5 * torch.cat([torch.eye(3), -torch.eye(3)]).double()  # exact for polynomials of degree 3
    batch = x.repeat(6, 1), points.repeat_interleave(4, dim=0)
    for off in torch.tensor([0.0, 0.2], requires_grad=True):
        model = LinearGaussian(off)
        terms = torch.stack(vae.elbo(model, *batch))
        bound, reconstruction, kl = terms.view(3, 6, 4).mean(1)
        q = model.q(x, off)
        want = model.marginal.log_prob(x) - D.kl_divergence(q, model.q(x, 0.0)).sum(1)
        near(bound, want, 1e-10)
        near(kl, D.kl_divergence(q, D.Normal(0.0, 1.0)).sum(1), 1e-12)
        near(reconstruction, bound + kl, 1e-12)
        (slope,) = torch.autograd.grad(bound.sum(), off, retain_graph=True)
        (true_slope,) = torch.autograd.grad(want.sum(), off, retain_graph=True)
        near(slope, true_slope, 1e-6)
        loss, *parts = vae.loss_elbo(model, *batch)
        near(loss, -bound.mean(), 1e-12)
        near(torch.stack(parts), terms[1:].mean(1), 1e-12)
        near(vae.loss_elbo(model, *batch, beta=3.0)[0], 2 * kl.mean() - bound.mean(), 1e-12)


def test_vae_eq6_log_bernoulli():
    """The log-likelihood is torch's own, summed over the pixels, and does not overflow."""
    model, x = awake(channels=3)
    z = normal(5, 2)
    pixels = D.Bernoulli(logits=model.decode(z))
    near(model.log_likelihood(x, z), pixels.log_prob(x).sum((1, 2, 3)), 1e-6)
    large = torch.tensor([[1e4], [-1e4]])
    near(vae.log_bernoulli(torch.ones(2, 1), large), [0, -1e4])


def test_vae_eq8_binarise():
    """Each byte b becomes 1 with probability b / 255, on its own: 0 never, 255 always, whatever rand() returns."""
    images = torch.arange(256, dtype=torch.uint8).expand(4000, 256)
    x = vae.binarise(images, torch.Generator().manual_seed(0))
    assert x.dtype == torch.float32 and x.unique().tolist() == [0, 1]
    p = torch.arange(256) / 255
    variance = p * (1 - p)
    error = (variance / 4000).sqrt() + 1e-6
    near((x.mean(0) - p) / error, 0, 5)
    near(x.sum(1).var() / variance.sum(), 1, 0.1)  # so pixels are independent
    for u in 0.0, 1 - 2**-24:  # the ends of rand()
        with mock.patch.object(torch, "rand", return_value=torch.tensor(u)):
            x = vae.binarise(images[0])
        assert (x[0], x[255]) == (0, 1)
    raises("uint8.*float32", vae.binarise, images / 255)


def test_vae_eq9_eq10_bound():
    """The bound is the log of the mean of k weights by torch's distributions; each is p(x) if q is the posterior."""
    for k, n, chunk in (1, 1, 2000), (7, 3, 9), (20, 3, 1), (20, 3, 2000):
        model = LinearGaussian(off=0.2)
        x = 99 * normal(n, 6)  # p(x) is below what a float can hold
        bound = vae.iwae_bound(model, x, k, chunk=chunk)
        assert max(map(len, model.asked)) <= max(n, chunk)
        z = torch.cat(model.asked).view(k, n, 3)
        assert len(z.unique()) == 3 * k * n
        log_ratio = D.Normal(0.0, 1.0).log_prob(z) - model.q(x, 0.2).log_prob(z)
        log_w = model.log_likelihood(x, z) + log_ratio.sum(2)
        near(bound, log_w.logsumexp(0) - math.log(k), 1e-6)
        *_, bound = quiet(vae.evaluate, LinearGaussian(), x, k, chunk=2)
        near(bound, model.marginal.log_prob(x), 1e-5)
    raises("k = 0", vae.iwae_bound, model, x, 0)


def test_vae_eq11_eq12_latents():
    """A latent is active if its mean's variance exceeds 0.01; the normal CDF maps the plane to an even grid."""
    mu = torch.tensor([[2.0], [4.0]]) * torch.tensor([0.0099, 0.0101, 1.0, 0.0]).sqrt()
    assert vae.active_latents(mu).tolist() == [False, True, True, False]
    u = (torch.arange(20) + 0.5) / 20
    near(D.Normal(0.0, 1.0).cdf(vae.latent_plane(20)), torch.cartesian_prod(u, u), 1e-6)


def test_vae_command():
    """Printed numbers and pictures are those of the model on all test images, binarised alike for every seed."""
    model = woken(vae.VAE(1, 8, 8, 2)).requires_grad_(False).eval()
    model.encoder[4].weight *= 10  # the latents of two images are far apart
    with workdir() as here, mock.patch.object(vae, "train", return_value=model):
        grey(here, 300)
        words = "--data pics --size 8 --latent 2 --samples 3 --nll 50 --seed 4 --out .".split()
        status, out, err = call(vae, words)
        assert (status, err) == (0, ""), err
        test = vae.load_images("pics", 8, test=True)
        samples = np.load("samples.npy")
        pairs, walks, manifold = map(tiles, ("reconstructions.png", "walk.png", "manifold.png"))
    x = vae.binarise(test, torch.Generator().manual_seed(0))
    nats = quiet(vae.evaluate, model, x, 50)
    mu, _ = model.encode(x)
    errors = nats.std(1, correction=0) / 30**0.5
    want = torch.stack([nats.mean(1), errors], dim=1)
    said = re.findall(r"-?\d+\.\d+", out)
    near([*map(float, said)], want.flatten(), 0.0051)
    assert "mean of 30 images\n" in out and "from 50 samples" in out
    assert f"\n{vae.active_latents(mu).sum()} of 2 latents" in out

    same(samples.tolist(), vae.to_uint8(vae.sample(model, 3, 4))[:, 0].tolist())
    shown = torch.arange(32) % 30
    pairs = pairs.reshape(32, 2, 8, 8)
    alike(pairs[:, 0], 255 * x[shown])
    alike(walks[:, [0, 9]], pairs[:16, 0])
    starts, ends = mu[:16].view(8, 2, 1, 2).unbind(1)
    lines = starts.lerp(ends, torch.linspace(0, 1, 8).view(8, 1))
    drawn = (pairs[:, 1], mu[shown]), (walks[:, 1:9], lines.flatten(0, 1)), (manifold, vae.latent_plane(20))
    for got, z in drawn:
        alike(got, vae.to_uint8(vae.mean_images(model, z)))


def test_vae_learns():
    """Of two random images the bound nearly reaches -log 2, the best that is possible; the log holds its terms."""
    images = (normal(2, 1, 8, 8) > 0).to(torch.uint8) * 255
    with workdir() as here:
        model = quiet(vae.train, images, 400, 16, 1e-2, 128, 2, path=here / "model.pt")
        _, loss, reconstruction, kl = np.loadtxt("log.csv", delimiter=",", skiprows=1).T
    near(loss, kl - reconstruction, 1e-3)
    bound = quiet(vae.evaluate, model, vae.binarise(images).repeat(100, 1, 1, 1))[0].mean()
    assert -4 < bound < -math.log(2), bound  # untrained -44, without z at best -20


# -------------------------------------------------------------------------------------------------- gan.py ------------
def test_gan_eq1_eq2_eq3_eq4_best_discriminator():
    """With the logits log p - log q, V is 2 JS - log 4, and the bound is JS; any other D gives less."""
    counts = torch.tensor([[50, 30, 15, 5], [10, 20, 30, 40]])  # of four values, among 100 real ones and 100 of G
    p, q = counts.double() / 100
    real, fake = (torch.arange(4).repeat_interleave(n) for n in counts)
    best = p.log() - q.log()
    m = D.Categorical((p + q) / 2)
    two_js = D.kl_divergence(D.Categorical(p), m) + D.kl_divergence(D.Categorical(q), m)
    near(gan.loss_d(best[real], best[fake]), math.log(4) - two_js, 1e-12)
    near(gan.js_bound(best[real], best[fake])[0], two_js / 2, 1e-12)
    for seed in range(20):
        other = best + 0.1 * normal(4, seed=seed)
        assert gan.js_bound(other[real], other[fake])[0] < two_js / 2


def test_gan_eq4_standard_error():
    """The standard error that comes with the bound is the standard deviation of bounds from independent images."""
    real = normal(4000, 30) + 0.5
    fake = 2 * normal(4000, 50, seed=1) - 0.5
    bounds, errors = zip(*map(gan.js_bound, real, fake))
    near(np.mean(errors) / np.std(bounds), 1, 0.05)


def test_gan_eq5_eq6_eq7_losses():
    """The losses are torch's cross-entropies of the logits, also of huge ones; an unknown one is refused."""
    real, fake = 3 * normal(2, 40)
    real[0], fake[:2] = 1e4, torch.tensor([1e4, -1e4])
    ones = torch.ones_like(real)
    entropy = F.binary_cross_entropy_with_logits
    near(gan.loss_d(real, fake[:30]), entropy(real, ones) + entropy(fake[:30], 0 * ones[:30]), 1e-10)
    near(gan.loss_g(fake), entropy(fake, ones), 1e-10)
    near(gan.loss_g(fake, "minimax"), -entropy(fake, 0 * ones), 1e-10)
    raises("hinge", gan.loss_g, fake, "hinge")


def check_step(net, other, loss, step):
    """A step of SGD at rate 0.1 descends the loss of net, and leaves weights and gradients of the other alone."""
    before = copy.deepcopy([(p.data, p.grad) for p in other.parameters()])
    weights = [*net.parameters()]
    gradients = torch.autograd.grad(loss, weights, retain_graph=True)
    wanted = [p.data - 0.1 * g for p, g in zip(weights, gradients)]
    near(step(), loss, 1e-6)
    same([(p.data, p.grad) for p in other.parameters()], before)
    for p, want in zip(weights, wanted):
        near(p.data, want, 1e-6)


def test_gan_eq1_eq8_steps():
    """Each step descends its own loss, and leaves the weights and gradients of the other player alone."""
    torch.manual_seed(0)
    G = gan.Generator(1, 8, 4, 8)
    d = gan.Discriminator(1, 8, 4).eval()  # no dropout
    opt_G, opt_d = (torch.optim.SGD(net.parameters(), 0.1) for net in (G, d))
    x = torch.randn(6, 1, 8, 8)
    for p in [*G.parameters(), *d.parameters()]:
        p.grad = torch.full_like(p, 7.0)
    for kind in "minimax", "nonsaturating":
        fake = G(torch.randn(6, 8))
        check_step(d, G, gan.loss_d(d(x), d(fake)), lambda: gan.d_step(d, opt_d, x, fake)[0])
        check_step(G, d, gan.loss_g(d(fake), kind), lambda: gan.g_step(G, d, opt_G, fake, kind))


def test_gan_eq9_slerp():
    """On the unit circle, the angle from x is a θ; between opposite latents nothing is infinite."""
    x = torch.tensor([1.0, 0.0])
    y = torch.tensor([2.0]).cos(), torch.tensor([2.0]).sin()
    for a in 0.0, 0.3, 1.0:
        near(gan.slerp(x, torch.cat(y), a), [math.cos(2 * a), math.sin(2 * a)], 1e-6)
    assert gan.slerp(x, -x, 0.5).isfinite().all()


def test_gan_networks():
    """G and d fit any side from 4, grey and colour; every weight and pixel counts; in eval mode no image another."""
    for channels, size in (1, 4), (3, 5), (1, 9):
        G = woken(gan.Generator(channels, size, 4, 6))
        d = woken(gan.Discriminator(channels, size, 4))
        z = normal(5, 6).float()
        x = G(z)
        x.retain_grad()
        d(x).square().sum().backward()
        assert x.shape == (5, channels, size, size) and x.grad.all()
        assert all(p.grad.any() for p in [*G.parameters(), *d.parameters()])
        G.eval(), d.eval()
        near(d(G(z[1:2])), d(G(z))[1:2], 1e-4)
    raises("--size 3.*4", gan.Discriminator, 1, 3)


def numbers(net):
    """All weights and statistics of a network, in one tensor."""
    return torch.cat([v.detach().flatten() for v in net.state_dict().values() if v.is_floating_point()])


def test_gan_eq1_eq8_training():
    """Of each iteration, k steps of d, each on new images, are followed by one of G on the last, and all are logged."""
    steps = mock.Mock()
    steps.d.return_value = torch.tensor(1.0), torch.full((4,), 2.0), torch.full((4,), 3.0)
    steps.g.return_value = torch.tensor(4.0)
    with workdir() as here, mock.patch.multiple(gan, d_step=steps.d, g_step=steps.g):
        flags = dict(iters=5, batch=4, width=4, k=2, loss="minimax", path=here / "model.pt")
        quiet(gan.train, gan.draw_digits(8, 8), **flags)
        head, row = Path("log.csv").read_text().split()
    assert [name for name, *_ in steps.mock_calls] == ["d", "d", "g"] * 5
    fakes = [fake for (_, _, _, fake), _ in steps.d.call_args_list]
    assert len(torch.cat(fakes).unique(dim=0)) == 40
    for fake, ((_, _, _, own, kind), _) in zip(fakes[1::2], steps.g.call_args_list):
        assert own is fake and kind == "minimax"
    assert head == "iteration,loss_D,loss_G,D(x),D(G(z))"
    logged = [float(value) for value in row.split(",")]
    near(logged, [5, 1, 4, 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-3))], 1e-6)


def test_gan_averages():
    """What is saved are the EMAs of both players, BatchNorm's statistics too, and pictures of how G's came about."""
    averages = []
    players = []
    real = gan.update_statistics

    def watched(ema, player, decay):
        real(ema, player, decay)
        averages.append(copy.deepcopy(ema))
        players.append(numbers(player))

    with workdir() as here, mock.patch.object(gan, "update_statistics", watched):
        quiet(gan.train, gan.draw_digits(8, 8), 10, 4, 0.05, 4, path=here / "model.pt")
        G, d, frames = gan.load_players(here / "model.pt")
    for i in range(2, 20):  # G, d, G, d, ...
        m = (1 + i // 2) / (10 + i // 2)
        want = m * numbers(averages[i - 2]) + (1 - m) * players[i]
        near(numbers(averages[i]), want, 1e-6)
    same([numbers(G), numbers(d)], [numbers(net) for net in averages[-2:]])
    z = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for c, i in enumerate((1, 1, 1, 2, 3, 4, 5, 7, 9, 10)):  # after 1, 4, 9, ..., 100 %
        alike(frames[c].numpy(), gan.to_uint8(averages[2 * i - 2](z)))


def test_gan_learns():
    """Trained on a single image, G draws it from any z."""
    images = gan.draw_digits(4, 8)[3:]
    G = quiet(gan.train, images.repeat(4, 1, 1, 1), batch=8, width=8, latent=4, iters=250)
    want = images.float() / 127.5 - 1
    assert (gan.sample(G, 50) - want).square().mean() < 0.3 * want.square().mean()


def test_gan_sample():
    """G is given standard normal latents, another for each image, the same for the same seed."""
    G = gan.Generator(1, 4, 4, 6)
    G.forward = lambda z: z
    z = gan.sample(G, 5000, 1, chunk=2000)
    assert z.shape == z.unique(dim=0).shape == (5000, 6)
    near([z.mean(), z.var()], [0, 1], 0.04)
    same(z, gan.sample(G, 5000, 1, chunk=2000))
    assert not torch.equal(z, gan.sample(G, 5000, 2, chunk=2000))


def test_gan_command():
    """The printed numbers and the pictures are those of the EMA of G and d on the test images."""
    G = woken(gan.Generator(1, 8, 4, 5)).requires_grad_(False).eval()
    d = woken(gan.Discriminator(1, 8, 4)).requires_grad_(False).eval()
    frames = torch.arange(80, dtype=torch.uint8).view(10, 8, 1, 1, 1).repeat(1, 1, 1, 8, 8)
    players = mock.Mock(return_value=(G, d, frames))
    with workdir() as here, mock.patch.multiple(gan, train=mock.Mock(), load_players=players):
        grey(here, 40)
        status, out, err = call(gan, "--data pics --size 8 --samples 9 --seed 3 --out .".split())
        assert (status, err) == (0, ""), err
        test = gan.load_images("pics", 8, test=True)
        samples = np.load("samples.npy")
        film, walks = tiles("progress.png"), tiles("slerp.png")
    alike(samples, gan.to_uint8(gan.sample(G, 9, 3)))
    alike(film, frames.transpose(0, 1))
    z = torch.randn(12, 5, generator=torch.Generator().manual_seed(3)).view(6, 2, 5)
    latents = [gan.slerp(x, y, a / 9) for x, y in z for a in range(10)]
    alike(walks, gan.to_uint8(G(torch.stack(latents))))

    real, fake = gan.evaluate(G, d, test, 4)
    near(real, d(test.float() / 127.5 - 1), 1e-4)
    near(fake, d(gan.sample(G, 2000, 4)), 1e-4)
    bound, error = gan.js_bound(real, fake)
    assert f"of 4 test images: {real.sigmoid().mean():.3f}, of 2000 gen" in out
    assert f"images: {fake.sigmoid().mean():.3f}\nJS" in out
    assert f">= {bound:.4f} +- {error:.4f} nats, {bound / math.log(2):.1%} of log 2" in out


def test_gan_stacked():
    """--stacked makes each channel a permutation of the grey images, and a second run remembers it."""
    x = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1)
    red, green, blue = gan.stack(x, 1)[:, :, 0, 0].T.tolist()
    assert sorted(red) == sorted(green) == sorted(blue) == [*range(50)]
    assert red != green != blue != red
    raises("grey", gan.stack, x.expand(-1, 3, -1, -1))
    with workdir() as here:
        grey(here, 40)
        for words in [*command(gan, data="pics"), "--stacked"], ["--out", "run"]:
            status, out, err = call(gan, words)
            assert (status, err) == (0, "") and "8x8x3" in out, err


# ------------------------------------------------------------------------------------------------- nice.py ------------
UNIFORM = D.Uniform(*torch.tensor([0.0, 1.0], dtype=torch.float64), validate_args=False)
LOGISTIC = D.TransformedDistribution(UNIFORM, [D.SigmoidTransform().inv])


def some_nice(channels=1, size=3, couplings=4):
    """A NICE in float64 with random weights and scales."""
    return woken(nice.NICE(channels, size, 16, 2, couplings), couplings).double()


def test_nice_eq1_bins():
    """Bytes get bins side by side in 0 .. 1, and every number of a bin goes back to its byte."""
    k = torch.arange(256, dtype=torch.uint8)
    for u in 0.0, 0.5, 0.999:
        x = nice.dequantise(k, torch.full((256,), u))
        near(x, (k.double() + u) / 256, 1e-7)
        same(nice.quantise(x), k)
    assert nice.quantise(torch.tensor([-3.0, -1e-9, 1.0, 7.0])).tolist() == [0, 0, 255, 255]


def test_nice_eq2_bound():
    """bits/dim are at least -log2 P(k) and little more; the paper's 1980.50 nats for MNIST are its 4.356 bits/dim."""
    near(nice.bits_per_dim(1980.50, 784), 4.356, 5e-4)
    c = 200.0
    k = torch.arange(32)
    edges = (c * torch.arange(33).double() / 256).sigmoid()  # of the bins, for one pixel and h = c x
    P = edges.diff()
    nats = 0
    for u in torch.linspace(0, 1, 2001, dtype=torch.float64)[1::2]:
        h = c * nice.dequantise(k, u)[:, None]
        nats += (LOGISTIC.log_prob(h)[:, 0] + math.log(c)) / 1000
    excess = nice.bits_per_dim(nats, 1) + P.log2()
    assert (excess > 0).all() and (excess < 0.04).all(), excess


def test_nice_eq3_eq4_density():
    """log_prob is torch's logistic density of h plus the log-determinant of the Jacobian by autograd."""
    for channels, size, couplings in (1, 2, 4), (1, 3, 1), (1, 3, 2), (3, 3, 3):
        model = some_nice(channels, size, couplings)
        x = normal(2, channels * size**2)
        f = lambda x, model=model: model(x)[0]
        log_det = [torch.linalg.slogdet(jacobian(f, row[None]))[1] for row in x]
        assert min(map(abs, log_det)) > 1e-3
        near(model(x)[1], torch.stack(log_det), 1e-10)
        near(nice.log_prob(model, x), LOGISTIC.log_prob(f(x)).sum(1) + torch.stack(log_det), 1e-9)


def test_nice_eq5_eq6_couplings_by_hand():
    """The first network shifts components with odd index by those with even index, the second the other way round."""
    ms = [lambda v: 2 * v, lambda v: v * v]
    x = torch.tensor([[1.0, 2, 3, 4], [0, 1, 0, -1]])
    y = torch.tensor([[17.0, 4, 103, 10], [1, 1, 1, -1]])
    same(nice.couple_all(x, ms), y)
    same(nice.uncouple_all(y, ms), x)


def test_nice_eq5_three_couplings_mix_all():
    """After one coupling half of the outputs depend on one input each; after three every output depends on all."""
    for couplings, zeros in (1, 5 * 8 + 4 * 3), (2, 4 * 3), (3, 0):
        model = some_nice(1, 3, couplings)
        J = jacobian(lambda v, model=model: model(v)[0], normal(1, 9))
        assert (J == 0).sum() == zeros, J


def test_nice_eq6_eq7_inverse():
    """inverse() undoes the model, for odd and even D, in float64 and float32; before training h is x."""
    for channels, size in (1, 2), (1, 3), (3, 9):
        model = some_nice(channels, size)
        x = normal(2, channels, size, size)
        h = model(x)[0]
        near(model.inverse(h), x.flatten(1), 1e-11)
        near(model.float().inverse(h.float()), x.flatten(1), 1e-4)
        same(nice.NICE(channels, size, 8).double()(x)[0], x.flatten(1))
    raises("--size 1 --channels 1", nice.NICE, 1, 1)


def test_nice_eq7_scales():
    """Each component is multiplied by its own exp(s)."""
    model = some_nice()
    x = normal(1, 9)
    h = model(x)[0]
    s = model.s.detach().clone()
    model.s.data.zero_()
    near(h, s.exp() * model(x)[0], 1e-12)


def test_nice_initialise():
    """After initialise() components have mean 0 and h the standard deviation of a logistic, even if almost constant."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randint(256, (5000, 3, 5, 5), generator=generator)
    k[:, 0, :2] = 0
    x = nice.dequantise(k, torch.rand(k.shape, generator=generator))
    for couplings in 1, 2, 4:
        model = nice.NICE(3, 5, 16, 2, couplings)
        model.initialise(x)
        near(model.m[0].unit, x.flatten(1)[:, 1::2].std(0), 1e-3)
        h = model(x)[0].detach()
        near(h.square().mean(0).sqrt(), math.pi / 3**0.5, 0.04)
        near(h.mean(0) if couplings > 1 else h[:, 1::2].mean(0), 0, 0.02)


def test_nice_eq8_prior():
    """The log-density is torch's for the logistic, with finite values and gradients however large h is."""
    h = torch.linspace(-12, 12, 61, dtype=torch.float64)
    near(nice.log_logistic(h[:, None]), LOGISTIC.log_prob(h), 1e-8)
    near(nice.log_logistic(h[None]), nice.log_logistic(h[:, None]).sum(), 1e-9)
    far = torch.tensor([[1e4], [-1e4], [1e30], [-1e30]], requires_grad=True)
    log_p = nice.log_logistic(far)
    near(log_p.detach(), -far[:, 0].detach().abs(), 0, 1e-6)
    near(torch.autograd.grad(log_p.sum(), far)[0][:, 0], [-1, 1, -1, 1], 1e-6)


def test_nice_eq9_logistic():
    """logistic() is torch's inverse of the logistic distribution function, and finite for 0 and 1."""
    u = torch.tensor([0, 1e-6, 0.25, 0.5, 0.75, 1 - 1e-6, 1])
    h = nice.logistic(u)
    assert h.isfinite().all() and h[0] < -15 and h[-1] > 15
    near(h[1:-1], LOGISTIC.icdf(u.double())[1:-1], 1e-6, 1e-6)


def test_nice_eq9_samples():
    """Samples are bytes with the probabilities of the prior, equal for equal seeds, whatever the chunks."""
    model = nice.NICE(1, 2, 8)
    model.s.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    model.m[0].last.bias.data.fill_(-0.5)  # so y_2 = x_2 - 0.5
    byte = nice.sample(model, 20_000).flatten(1).double() * 127.5 + 127.5
    near(byte, byte.round(), 1e-4)
    for i, shift in enumerate([0, 0.5, 0, 0.5]):
        edge = torch.tensor([1.0, 40, 128, 200])
        want = ((edge / 256 - shift) * math.exp(i + 1)).sigmoid()
        found = (byte[:, i, None].round() < edge).double().mean(0)
        near(found, want, 4.5 / 2 / 20_000**0.5)  # 4.5 standard errors
    same(nice.sample(model, 9), nice.sample(model, 9, chunk=2))
    assert not torch.equal(nice.sample(model, 9), nice.sample(model, 9, seed=1))


HIDDEN = torch.tensor([True, False, False, True, False, True])
KNOWN = ~HIDDEN.view(1, 1, 2, 3)


def test_nice_eq10_finds_the_mode():
    """Hidden pixels approach their most probable values within 0 .. 1 given the known pixels, which stay."""
    x = torch.tensor([0.2, 0.7, 0.4, 0.3, 0.6, 0.9]).view(1, 1, 2, 3).repeat(200, 1, 1, 1)
    for offset, clip, mode in (0.1, 1.0, 0.7 + 0.1), (-3.0, math.inf, 0.0), (3.0, math.inf, 1.0):

        def model(x, offset=offset):
            """Each hidden pixel is normal. Its mean is the first known pixel plus the offset."""
            x = x.flatten(1)
            distance = x[:, HIDDEN] - x[:, 1:2] - offset
            return 0 * x, -25 * distance.square().sum(1)

        y = nice.inpaint(model, x, KNOWN, 300, torch.Generator().manual_seed(0), clip)
        same(y[:, :, KNOWN[0, 0]], x[:, :, KNOWN[0, 0]])
        near(y.flatten(1)[:, HIDDEN].mean(0), mode, 0.03)  # the mean of 200 noisy results


def test_nice_eq10_steps():
    """Hidden pixels start as uniform noise; each step adds α_i = 10 / (100 + i) times the clipped gradient."""
    x = torch.zeros(1, 1, 2, 3)
    y = nice.inpaint(None, x.expand(2000, 1, 2, 3), KNOWN, 0, torch.Generator().manual_seed(0)).flatten(1)[:, HIDDEN]
    near([y.mean(), y.std()], [0.5, 12**-0.5], 0.02)
    start = mock.patch.object(torch, "rand", lambda shape, **_: torch.full(shape, 0.5))
    noise = mock.patch.object(torch, "randn", lambda shape, **_: torch.full(shape, 0.2))
    for gradient, clip, clipped in (0.3, 1.0, 0.3), (7.0, 1.0, 1.0), (-7.0, 0.5, -0.5):
        model = lambda x, gradient=gradient: (0 * x.flatten(1), gradient * x.flatten(1).sum(1))
        with start, noise:
            y = nice.inpaint(model, x, KNOWN, 3, clip=clip)
        near(y.flatten(1)[0, HIDDEN], 0.5 + (clipped + 0.2) * (10 / 100 + 10 / 101 + 10 / 102), 1e-6)


def test_nice_inpainting_masks():
    """The paper's ten masks: eight halves, then 75 and 90 % at random."""
    known = nice.inpainting_masks(8)[:, 0].numpy()
    upper, lower, odd, even = np.s_[:4], np.s_[4:], np.s_[:, 1::2], np.s_[:, ::2]
    left, right, rows, columns = np.s_[:, :4], np.s_[:, 4:], np.s_[2:6], np.s_[:, 2:6]
    for mask, hidden in zip(known, (upper, lower, odd, even, left, right, rows, columns)):
        assert not mask[hidden].any() and mask.sum() == 32
    shares = nice.inpainting_masks(100, torch.Generator().manual_seed(0))[8:].double().mean((1, 2, 3))
    near(shares, [0.25, 0.1], 0.02)


def test_nice_keeps_the_best():
    """train(), even resumed, returns and load() loads the EMA model with the best validation likelihood."""
    images = nice.draw_digits(18, 8)
    values = iter([5.0, 7.0, None, 6.0, 7.0])
    seen = []

    def measure(model, validation):
        """The next of the values; Ctrl-C for None."""
        same(validation, nice.hold_out(images)[1])
        seen.append(copy.deepcopy(model.state_dict()))
        value = next(values)
        if value is None:
            raise KeyboardInterrupt
        return torch.tensor([value])

    clock = mock.patch.object(time, "time", itertools.count(0, 3600).__next__)  # each row of the log is saved
    with workdir() as here, mock.patch.object(nice, "measure", measure), clock:
        train = functools.partial(quiet, nice.train, images, iters=350, batch=2, width=8, path=here / "model.pt")
        raises("", train, kind=KeyboardInterrupt)
        same(dict(train().state_dict()), dict(seen[1]))
        same(dict(nice.load(here / "model.pt").state_dict()), dict(seen[1]))
        log = np.loadtxt(here / "log.csv", delimiter=",", skiprows=1)
    assert log[:, [0, 2]].tolist() == [[100, 5], [200, 7], [300, 6], [350, 7]]


def test_nice_learns():
    """On images of one shade each, training gains 25 nats over the initial scales, and samples have one shade each."""
    generator = torch.Generator().manual_seed(0)
    shades = 20 * torch.arange(12).repeat(40).view(480, 1, 1, 1)
    images = (shades + torch.randint(3, (480, 1, 4, 4), generator=generator)).byte()
    initial = nice.NICE(1, 4, 32, 2)
    initial.initialise(nice.dequantise(images, torch.rand(images.shape, generator=generator)))
    model = quiet(nice.train, images, 300, 32, 2e-3, 32, 2)
    before, after = (nice.measure(m, nice.hold_out(images)[1]).mean() for m in (initial, model))
    assert after > before + 25, (before, after)
    samples = nice.sample(model, 200).flatten(1) * 127.5 + 127.5
    assert samples.std(1).mean() < 0.5 * samples.mean(1).std()


def test_nice_refuses_floats():
    """Float images, of which 0 .. 1 would be taken for bytes, are refused by training and by measure()."""
    for images in torch.rand(12, 1, 4, 4), torch.ones(12, 1, 4, 4, dtype=torch.long):
        raises("uint8", nice.train, images, iters=1)
        raises("uint8", nice.measure, nice.NICE(1, 4, 8), images)


def test_nice_command():
    """The printed figures are of training, validation and test images; the pictures are samples and in-painting."""
    with workdir() as here:
        grey(here, 70)
        words = "--data pics --size 8 --iters 2 --batch 2 --samples 2 --width 8 --inpaint 3 --seed 4 --out run"
        status, out, err = call(nice, words.split())
        assert (status, err) == (0, ""), err
        model = nice.load("run/model.pt")
        test = nice.load_images("pics", 8, test=True)
        training, validation = nice.hold_out(nice.load_images("pics", 8))
        samples = nice.to_uint8(nice.sample(model, 2, seed=4))[:, 0]
        assert np.array_equal(np.load("run/samples.npy"), samples)
        pictures = tiles("run/inpainting.png").reshape(10, 4, 3, 8, 8)

    for name, part in ("train", training), ("validation", validation), ("test", test):
        u = torch.rand(part.shape, generator=torch.Generator().manual_seed(0))
        nats = nice.log_prob(model, nice.dequantise(part, u)).double()
        error = nats.std(correction=0) / len(part) ** 0.5
        scale = 64 * math.log(2)
        said = re.search(rf"\n{name}: (\S+) \+- (\S+) nats = (\S+) \+- (\S+) bits/dim, mean of (\d+) images", out)
        want = [nats.mean(), error, 8 - nats.mean() / scale, error / scale, len(part)]
        near([*map(float, said.groups())], want, 0.006)
    said = re.search(r"exp\(-s\).*: (\S+) to (\S+), median (\S+)\n", out)
    scales = np.exp(-model.s.numpy())
    near([*map(float, said.groups())], [scales.min(), scales.max(), np.median(scales)], 0.01)

    masks = nice.inpainting_masks(8, torch.Generator().manual_seed(4))[:, 0].numpy()
    for mask, row in zip(masks, pictures):
        for image, (whole, masked, result) in zip(test[:, 0].numpy(), row):
            assert np.array_equal(whole, image)
            assert np.array_equal(masked, np.where(mask, image, 128))
            assert np.array_equal(result[mask], image[mask]) and not np.array_equal(result, image)


# ---------------------------------------------------------------------------------------------- realnvp.py ------------
NORMAL = D.Normal(*torch.tensor([0.0, 1.0], dtype=torch.float64))


def some_flow(channels=1, size=8, couplings=3, blocks=1):
    """A RealNVP in float64 with random weights."""
    return woken(realnvp.RealNVP(channels, size, 8, blocks, couplings)).double().requires_grad_(False)


class UniformFlow(nn.Module):
    """The flow from the logits of uniform images to N(0, I), in closed form."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, h):
        q = h.double().sigmoid()
        x = (q - 1e-6) / (1 - 2e-6)
        z = NORMAL.icdf(x.clamp(1e-15, 1 - 1e-15))
        log_dx_dh = (q * (1 - q) / (1 - 2e-6)).log()
        return z.flatten(1), (log_dx_dh - NORMAL.log_prob(z)).flatten(1).sum(1)


def test_realnvp_eq1_eq2_bound():
    """bits/dim are at least -log2 P(k) and little more, for a pixel whose logit is normal; P is that of its bin."""
    edges = torch.arange(257).double() / 256
    P = NORMAL.cdf((1e-6 + (1 - 2e-6) * edges).logit()).diff()[8:-8]
    k = torch.arange(256).view(-1, 1, 1, 1)[8:-8]
    identity = lambda h: (h.flatten(1), 0)
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)[1::2]
    nats = torch.stack([realnvp.log_prob(identity, realnvp.dequantise(k, v)) for v in u])
    near(nats.exp().mean(0) / 256, P, 1e-7)
    excess = realnvp.bits_per_dim(nats.mean(0), 1) + P.log2()
    assert (excess > 0).all() and (excess < 0.05).all(), excess
    near(realnvp.bits_per_dim(784 * math.log(256), 784), 0, 1e-12)


def test_realnvp_eq3_logit():
    """Logits and their log-determinants are those of torch's transforms, at 0 and 1 too; from_logit() inverts them."""
    x = torch.cat([torch.linspace(0, 1, 30, dtype=torch.float64), normal(34).sigmoid()]).view(2, 2, 4, 4)
    logit = D.ComposeTransform([D.AffineTransform(1e-6, 1 - 2e-6), D.SigmoidTransform().inv])
    h, log_det = realnvp.to_logit(x)
    near(h, logit(x), 1e-9)
    near(log_det, logit.log_abs_det_jacobian(x, h).flatten(1).sum(1), 1e-8)
    near(realnvp.from_logit(h), x, 1e-12)
    near(realnvp.to_logit(x.float())[0], h, 1e-3)  # float32, without cancellation near 1


def test_realnvp_eq3_eq4_uniform_noise_has_8_bits():
    """Under the flow that maps uniform images to N(0, I), all images have 8 bits/dim."""
    k = torch.randint(256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x = realnvp.dequantise(k.double(), 0.5)
    near(realnvp.log_prob(UniformFlow(), x).detach(), torch.zeros(6), 1e-7)
    near(realnvp.loss_bits(UniformFlow(), x).detach(), 8, 1e-8)
    bits = realnvp.image_bits(UniformFlow(), k, chunk=4)
    near(bits, torch.full((6,), 8), 1e-4)  # float32 logits


def test_realnvp_eq4_eq5_density():
    """log_prob is torch's normal density of z plus the log-determinant of x -> z by autograd, for each image alone."""
    for channels, size in (1, 4), (3, 4), (2, 8):
        model = some_flow(channels, size)
        x = normal(3, channels, size, size).sigmoid()
        latents = lambda x, model=model: model(realnvp.to_logit(x)[0])[0]
        log_det = torch.linalg.slogdet(jacobian(latents, x[1:2]))[1]
        log_p_z = NORMAL.log_prob(latents(x[1:2])).sum()
        near(realnvp.log_prob(model, x)[1], log_p_z + log_det, 1e-8)


def test_realnvp_eq6_eq7_eq8_coupling_by_hand():
    """The first coupling changes the right half, the second the left half, with log-determinants Σ s; and back."""
    left = torch.tensor([[1.0], [2.0]])
    right = torch.tensor([[3.0], [5.0]])
    nets = [lambda v: (v * math.log(2), 10 * v), lambda v: (0 * v - math.log(4), v)]
    y_left, y_right, log_det = realnvp.couple(nets, left, right)
    near(y_right, [[3 * 2 + 10], [5 * 4 + 20]], 1e-5)
    near(y_left, [[1 / 4 + 16], [2 / 4 + 40]], 1e-5)
    near(log_det, [math.log(2 / 4), math.log(4 / 4)], 1e-6)
    near(torch.cat(realnvp.uncouple(nets, y_left, y_right), 1), [[1, 3], [2, 5]], 1e-5)


def test_realnvp_eq8_inverse():
    """inverse() undoes the model, for all sizes, in float64 and in float32."""
    for channels, size, couplings, blocks in (1, 4, 2, 0), (3, 8, 3, 1), (2, 12, 4, 2):
        model = some_flow(channels, size, couplings, blocks)
        h = normal(3, channels, size, size)
        near(model.inverse(model(h)[0]), h, 1e-9)
        for name, p in model.named_parameters():
            if "head" in name:
                p *= 0.2  # wilder networks multiply float32's rounding errors
        near(model.float().inverse(model(h.float())[0]), h, 1e-4)


def test_realnvp_eq9_bounded_scale():
    """s is the scale of its channel times the tanh of the first half of the network's output, however large."""
    net = some_flow().scale1.by_board[0]
    scale = net.scale.view(1, 2, 1, 1)
    half = normal(3, 2, 4, 4)
    output = []
    net.head.register_forward_hook(lambda module, x, y: output.append(y))
    s, t = net(half)
    near(s, torch.tanh(output[0][:, :2]) * scale, 1e-12)
    same(t, output[0][:, 2:])
    s, _ = net(1e12 * half)
    assert (s.abs() <= scale.abs()).all()


def test_realnvp_eq10_eq11_halves():
    """A numbered image is split as the paper's figure 3 shows, and put together again."""
    x = torch.arange(16.0).view(1, 1, 4, 4)
    even, odd = realnvp.checkerboard(x)
    assert even.tolist() == [[[[0, 2], [8, 10]], [[5, 7], [13, 15]]]]
    assert odd.tolist() == [[[[1, 3], [9, 11]], [[4, 6], [12, 14]]]]
    top, bottom = realnvp.regroup(even, odd)
    assert top.tolist() == [[[[0, 2], [8, 10]], [[1, 3], [9, 11]]]]
    assert bottom.tolist() == [[[[5, 7], [13, 15]], [[4, 6], [12, 14]]]]
    x = normal(2, 3, 8, 8)  # with several channels, there and back
    halves = realnvp.checkerboard(x)
    channel_wise = realnvp.regroup(*halves)
    same(channel_wise[0].flatten(1).sort()[0], x[:, :, 0::2].flatten(1).sort()[0])
    same(realnvp.regroup(*channel_wise), halves)
    same(realnvp.from_checkerboard(*halves), x)


def test_realnvp_eq12_factors_out():
    """z holds the odd rows first, then every fourth row, then the rest, changed by couplings of both splits."""
    h = normal(2, 3, 8, 8).float()
    model = realnvp.RealNVP(3, 8, 8)
    z, log_det = model(h)  # before training the model only moves components
    z_1, z_2, rest = z.split([96, 48, 48], dim=1)
    same(z_1.sort()[0], h[:, :, 1::2].flatten(1).sort()[0])
    same(z_2.sort()[0], h[:, :, 2::4].flatten(1).sort()[0])
    same(rest.sort()[0], h[:, :, 0::4].flatten(1).sort()[0])
    same(log_det, torch.zeros(2))
    same(model.inverse(z), h)
    for name in "scale1.by_board", "scale1.by_channel", "scale2.by_board", "scale2.by_channel":
        one = copy.deepcopy(model)
        woken(one.get_submodule(name))
        changed = (one(h)[0] - z)[0].abs() > 1e-6
        same(changed, torch.arange(192) >= (96 if "scale2" in name else 0))


def test_realnvp_eq13_normalise():
    """After initialise() each pixel has mean 0 and variance 1, then a gain and a bias; constant pixels are no harm."""
    h = normal(200, 2, 4, 4) * normal(2, 4, 4, seed=5).exp() + 9 * normal(2, 4, 4, seed=6)
    norm = realnvp.Normalise((2, 4, 4)).double().requires_grad_(False)
    norm.initialise(h)
    y, log_det = norm(h)
    near(y.mean(0), 0, 1e-9)
    near(y.std(0, correction=0), 1, 1e-9)
    near(log_det, -h.std(0, correction=0).log().sum(), 1e-9)
    norm.gain.copy_(normal(2, 4, 4, seed=7))
    norm.bias.copy_(normal(2, 4, 4, seed=8))
    scaled, scaled_log_det = norm(h)
    near(scaled, norm.gain.exp() * y + norm.bias, 1e-9)
    near(scaled_log_det, log_det + norm.gain.sum(), 1e-9)
    near(norm.inverse(scaled), h, 1e-9)
    norm.initialise(torch.zeros(3, 2, 4, 4))
    assert norm(torch.zeros(3, 2, 4, 4))[0].isfinite().all() and norm(h)[1].isfinite()


def test_realnvp_eq14_samples():
    """Latents are T times N(0, I), equal for equal seeds."""
    model = realnvp.RealNVP(1, 4, 8)
    with mock.patch.object(realnvp, "to_images", lambda model, z: z):
        z = quiet(realnvp.sample, model, 3050)
        for T in 0.0, 0.5, 1.0:
            near(quiet(realnvp.sample, model, 3050, T), T * z, 1e-6)
        assert (z != quiet(realnvp.sample, model, 3050, seed=1)).all()
    assert z.shape == (3050, 16) and len(z.unique()) > 48_000  # of 48,800, a few are alike in float32
    near(z.mean(), 0, 5 / 48_800**0.5)  # five standard errors
    near(z.var(), 1, 5 * (2 / 48_800) ** 0.5)


def test_realnvp_eq14_bytes():
    """Each of the 256 bytes, mapped to latents and back, is itself."""
    model = some_flow(1, 16).float()
    k = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for u in 0.1, 0.5, 0.9:
        z, _ = model(realnvp.to_logit(realnvp.dequantise(k, u))[0])
        same(realnvp.to_uint8(realnvp.to_images(model, z)), k)


def test_realnvp_eq15_interpolation():
    """Angles of 0 and π/2 give the four latents, others their mixtures, and orthogonal latents keep their length."""
    z = normal(4, 48)
    degrees = torch.tensor([[0, 0], [0, 90], [90, 0], [90, 90], [180, 0], [0, 180], [30, 45]], dtype=torch.float64)
    a, b = 0.75**0.5, 0.5**0.5  # cosines of 30 and 45 degrees
    want = torch.stack([*z, -z[0], -z[0], a * b * (z[0] + z[1]) + 0.5 * b * (z[2] + z[3])])
    near(realnvp.interpolate_four(z, *degrees.deg2rad().T), want, 1e-12)
    orthonormal = torch.linalg.qr(z.T)[0].T
    mixed = realnvp.interpolate_four(orthonormal, *(7 * normal(2, 100)))
    near(mixed.norm(dim=1), torch.ones(100), 1e-12)


def test_realnvp_learns():
    """On images of one shade each, training saves 2 bits/dim of unseen images, as its log says."""
    generator = torch.Generator().manual_seed(0)
    shades = 20 * torch.arange(12).repeat(40).view(480, 1, 1, 1)
    images = (shades + torch.randint(3, (480, 1, 4, 4), generator=generator)).byte()
    first = quiet(realnvp.train, images, iters=1, batch=2, width=8)
    with workdir() as here:
        model = quiet(realnvp.train, images, iters=200, batch=16, width=8, couplings=2, path=here / "model.pt")
        same(dict(realnvp.load(here / "model.pt").state_dict()), dict(model.state_dict()))
        log = np.genfromtxt(here / "log.csv", delimiter=",", names=True)
    before, after = (realnvp.image_bits(m, realnvp.hold_out(images)[1]).mean() for m in (first, model))
    assert after < before - 2, (before, after)
    near(after, log["valid_bits"][-1], 1e-5)


def test_realnvp_refusals():
    """Float images, of which 0 .. 1 would be taken for bytes, are refused, and so are sizes that cannot be squeezed."""
    for images in torch.rand(12, 1, 4, 4), torch.ones(12, 1, 4, 4, dtype=torch.long):
        raises("uint8", realnvp.train, images, iters=1)
        raises("uint8", realnvp.image_bits, realnvp.RealNVP(1, 4, 8), images)
    raises("--couplings 1", realnvp.RealNVP, 1, 8, couplings=1)
    with workdir() as here:
        grey(here)
        for flag in "--temperature=-1", "--temperature=nan", "--temperature=inf", "--blocks=-1", "--size=30":
            status, _, err = call(realnvp, ["--data", "pics", "--iters", "1", flag])
            assert status == 1 and flag.split("=")[0] in err and err.count("\n") == 1, err


def test_realnvp_command():
    """The printed figures are those of all test images, the corners of interpolation.png are four of them, and the
    rows of temperatures.png are one set of latents at six temperatures."""
    train = realnvp.train
    with workdir() as here, mock.patch.object(realnvp, "train", lambda *args: woken(train(*args))):
        grey(here, 60)
        words = "--data pics --size 8 --iters 2 --batch 2 --samples 2 --width 8 --temperature 0.6 --seed 3 --out run"
        status, out, err = call(realnvp, words.split())
        assert (status, err) == (0, ""), err
        model = woken(realnvp.load("run/model.pt"))
        test = realnvp.load_images("pics", 8, test=True)
        walk = tiles("run/interpolation.png").reshape(64, 8, 8)
        temperatures = tiles("run/temperatures.png")
        samples = np.load("run/samples.npy")

    u = torch.rand(test.shape, generator=torch.Generator().manual_seed(0))
    nats = realnvp.log_prob(model, realnvp.dequantise(test, u)).double()
    error = nats.std(correction=0) / 6**0.5
    scale = 64 * math.log(2)
    said = re.search(r"\ntest: (\S+) \+- (\S+) nats = (\S+) \+- (\S+) bits/dim, mean of 6 images", out)
    near([*map(float, said.groups())], [nats.mean(), error, 8 - nats.mean() / scale, error / scale], 0.02)
    assert np.array_equal(walk[[0, 7, 56, 63]], test[:4, 0]) and len(np.unique(walk, axis=0)) == 64
    rows = [quiet(realnvp.sample, model, 8, T, 3) for T in (0.0, 0.5, 0.7, 0.8, 0.9, 1.0)]
    alike(temperatures, realnvp.to_uint8(torch.cat(rows)))
    want = realnvp.to_uint8(quiet(realnvp.sample, model, 2, 0.6, 3))[:, 0]
    assert np.array_equal(samples, want) and out.count("image ") == 1


# --------------------------------------------------------------------------------------------- pixelcnn.py ------------
def pixelcnn_model(channels=1, size=6, levels=2, width=9, layers=2, seed=0):
    """A PixelCNN with random weights, as if trained, in float64."""
    model = pixelcnn.PixelCNN(channels, size, levels, width, layers)
    model = woken(model, seed).double().requires_grad_(False).eval()
    model.forward = lambda x: pixelcnn.PixelCNN.forward(model, x.double())
    return model


def pixelcnn_levels(model, n, seed=0):
    """n random images of levels."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(model.levels, (n, *model.shape), generator=g)


def test_pixelcnn_eq1_eq2_sums_to_one():
    """The probabilities of all images of 2 x 2 pixels, and of all colours of one pixel, add up to one."""
    for channels, size, levels in (1, 2, 3), (3, 1, 4):
        model = pixelcnn_model(channels, size, levels)
        every = itertools.product(range(levels), repeat=channels * size * size)
        x = torch.tensor([*every]).view(-1, channels, size, size)
        near(pixelcnn.log_prob(model, x).exp().sum(), 1, 1e-12)


def test_pixelcnn_eq1_eq2_eq6_eq8_by_hand():
    """log p(x) is the sum of the logarithms of the softmax at the levels of x; the loss is minus its mean."""
    model = pixelcnn_model(3, 4, 5)
    x = pixelcnn_levels(model, 3)
    p = model(x).exp() / model(x).exp().sum(1, keepdim=True)
    want = [sum(p[(n, x[n, c, i, j], c, i, j)].log() for c, i, j in np.ndindex(3, 4, 4)) for n in range(3)]
    near(pixelcnn.log_prob(model, x), want, 1e-10)
    near(pixelcnn.loss_nats(model, x), -torch.stack(want).mean(), 1e-10)
    near(pixelcnn.to_bits(48 * math.log(2) * 1.5, 48), 1.5, 1e-12)


def test_pixelcnn_eq3_eq4_eq5_sees_what_is_before():
    """Each logit depends, by autograd, on numbers before its own alone, and on all of them that its kernels reach."""
    for channels, size, layers in (1, 7, 0), (1, 12, 2), (3, 6, 2):
        model = pixelcnn_model(channels, size, 3, 15, layers)
        x = pixelcnn_levels(model, 5).double()  # where a ReLU is zero for one image, it is not for another
        J = sum(jacobian(model, image[None]).abs() for image in x)
        J = J.view(3, channels, size, size, channels, size, size).sum(0) > 0
        for c, i, j in np.ndindex(channels, size, size):
            r, s = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
            above = (r < i) & (i - r <= 3 + layers) & (s - j <= 3 + 2 * layers) & (j - s <= 3 + 4 * layers)
            left = (r == i) & (s < j) & (j - s <= 3 + 2 * layers)
            for source in range(channels):
                pixel = (r == i) & (s == j) & (source < c)
                assert torch.equal(J[c, i, j, source], above | left | pixel), (c, i, j, source)
    raises("--width 2", pixelcnn.PixelCNN, 3, 8, 2, 2)


def test_pixelcnn_eq4_mask():
    """At the pixel itself mask A lets a colour see those before it, mask B its own as well; channels are divided."""
    for kind, sees in ("A", [[0, 0, 0], [1, 0, 0], [1, 1, 0]]), ("B", [[1, 0, 0], [1, 1, 0], [1, 1, 1]]):
        mask = pixelcnn.causal_mask(kind, 3, 6, 4, 3)
        assert mask.shape == (3, 6, 1, 4) and (mask[..., :-1] == 1).all()
        assert torch.equal(mask[:, ::2, 0, -1], torch.tensor(sees).float())
        assert torch.equal(mask[:, 1::2, 0, -1], torch.tensor(sees).float())
        parts = pixelcnn.causal_mask(kind, 8, 8, 1, 3)[:, :, 0, 0].sum(1) - (kind == "B") * torch.tensor(
            [3] * 6 + [2] * 2
        )
        assert parts.tolist() == [0, 0, 0, 3, 3, 3, 6, 6]  # 8 channels: 3, 3 and 2


def test_pixelcnn_eq7_levels():
    """Bits are white with probability byte / 255, black and white for certain; more levels are equal parts."""
    every = torch.arange(256, dtype=torch.uint8)
    bits = pixelcnn.to_levels(every.view(-1, 1).expand(-1, 20_000), 2, torch.Generator().manual_seed(0))
    p = every.double() / 255
    assert ((bits.double().mean(1) - p).abs() <= 4.5 * (p * (1 - p) / 20_000).sqrt()).all()
    with mock.patch.object(torch, "rand", lambda shape, **_: torch.zeros(shape)):
        assert pixelcnn.to_levels(every[:2], 2).tolist() == [0, 1]  # black stays black if the random number is 0
    for levels in 3, 4, 256:
        assert pixelcnn.to_levels(every, levels).tolist() == [k * levels // 256 for k in range(256)]
        near(pixelcnn.from_levels(torch.tensor([0, levels - 1]), levels), [-1, 1], 1e-6)
    raises("uint8", pixelcnn.to_levels, every.float(), 2)


def test_pixelcnn_eq9_draw():
    """u decides the level by the CDF: level k for u in [CDF(k - 1), CDF(k)), so frequencies are the probabilities."""
    logits = torch.tensor([[0.0, math.log(2), 0.0]]).double()  # 1/4, 1/2, 1/4
    u = torch.tensor([0, 0.2499, 0.2501, 0.7499, 0.7501, 0.9999]).double()
    assert pixelcnn.draw(logits.expand(6, 3), u).tolist() == [0, 0, 1, 1, 2, 2]
    p = normal(1, 7).softmax(1)
    u = (torch.arange(100_000) + 0.5) / 100_000
    n = pixelcnn.draw(p.log().expand(100_000, 7), u.double()).bincount(minlength=7)
    near(n / 100_000, p[0], 1e-4)
    edge = torch.tensor([[0.0, 0.0]]).double()
    assert pixelcnn.draw(edge, torch.tensor([0.5]).double()).tolist() == [1]  # a half is not above a half


def test_pixelcnn_eq9_cached_is_plain():
    """Sampling with the cache gives the numbers that whole passes give, also below rows that are kept."""
    for channels, size, levels, layers in (1, 7, 2, 2), (3, 5, 4, 1), (1, 4, 256, 0):
        model = woken(pixelcnn.PixelCNN(channels, size, levels, 9, layers))
        u = torch.rand(4, *model.shape, generator=torch.Generator().manual_seed(1))
        x = pixelcnn.sample_plain(model, u)
        same(pixelcnn.sample_cached(model, u), x)
        logits = model(x)
        for c, i, j in np.ndindex(channels, size, size):  # each is the sample of its own conditional
            assert torch.equal(pixelcnn.draw(logits[:, :, c, i, j], u[:, c, i, j]), x[:, c, i, j])
        given = pixelcnn_levels(model, 4)
        part = pixelcnn.sample_cached(model, u, given, 2)
        assert torch.equal(part[:, :, :2], given[:, :, :2]) and not torch.equal(part, given)
        same(part, pixelcnn.sample_plain(model, u, given, 2))


def test_pixelcnn_sample():
    """sample() returns as many images as asked for, the same for any chunk, others for another seed."""
    model = woken(pixelcnn.PixelCNN(1, 5, 3, 9, 2))
    x = quiet(pixelcnn.sample, model, 7)
    assert x.shape == (7, 1, 5, 5) and set(x.unique().tolist()) == {-1.0, 0.0, 1.0}
    same(quiet(pixelcnn.sample, model, 7, chunk=3), x)
    same(quiet(pixelcnn.sample, model, 7, sampler=pixelcnn.sample_plain), x)
    assert not torch.equal(quiet(pixelcnn.sample, model, 7, 1), x)


def test_pixelcnn_sensitivity():
    """The picture of sensitivity is the gradient of the log-odds of white against black, over images and colours."""
    model = pixelcnn_model(3, 5, 4)
    x = pixelcnn_levels(model, 6)
    J = torch.stack([jacobian(lambda v: model(v)[0, :, :, 3, 2], image[None].double()) for image in x])
    J = J.view(6, 4, 3, 3, 5, 5)  # images, levels, colours, and the numbers of an image
    near(pixelcnn.sensitivity(model, x.double(), 3, 2), (J[:, -1] - J[:, 0]).sum(1).abs().sum(1).mean(0), 1e-10)


def test_pixelcnn_learns():
    """It learns that all pixels of an image are equal: one bit of information, and samples of one colour."""
    images = torch.zeros(400, 1, 4, 4, dtype=torch.uint8)
    images[::2] = 255
    model = quiet(pixelcnn.train, images, iters=200, batch=16, width=8, layers=1)
    nats = pixelcnn.image_nats(model, images)
    assert math.log(2) - 0.05 < nats.mean() < math.log(2) + 0.15, nats.mean()
    x = quiet(pixelcnn.sample, model, 200).flatten(1)
    uniform = (x == x[:, :1]).all(1).double().mean()
    assert uniform > 0.85 and 0.3 < (x[:, 0] > 0).double().mean() < 0.7, uniform
    raises("uint8", pixelcnn.image_nats, model, images.float())


def test_pixelcnn_command():
    """The printed nats are those of validation and test images; pictures and the comparison are what they say."""
    with workdir():
        grey(Path("."), 40)
        words = "--data pics --size 8 --width 8 --layers 1 --iters 12 --batch 4 --samples 9 --seed 3 --out run --plain"
        status, out, err = call(pixelcnn, words.split())
        assert (status, err) == (0, ""), err
        model = pixelcnn.load("run/model.pt")
        train, test = (pixelcnn.load_images("pics", 8, test=test) for test in (False, True))
        for name, part in ("validation", pixelcnn.hold_out(train)[1]), ("test", test):
            nats = pixelcnn.image_nats(model, part).double()
            mean, error = nats.mean(), nats.std(correction=0) / len(nats) ** 0.5
            line = f"{name}: {mean:.2f} +- {error:.2f} nats = {mean / 64 / math.log(2):.4f} bits/dim, "
            assert line + f"mean of {len(part)} images" in out, out
        x = quiet(pixelcnn.sample, model, 9, 3)
        assert np.array_equal(np.load("run/samples.npy"), pixelcnn.to_uint8(x)[:, 0])
        assert "times as long; 0 of 576 numbers differ" in out, out
        rows, shown = tiles("run/completions.png"), test[torch.arange(8) % 4]
        bits = pixelcnn.to_levels(shown, 2, torch.Generator().manual_seed(0))[:, 0] * 255
        assert np.array_equal(rows[:, 0], bits) and np.array_equal(
            rows[:, 1:, :4], bits[:, None, :4].expand(-1, 7, -1, -1)
        )
        assert (rows[:, 1, 4:] == 128).all()
        u = torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(3))
        ways = pixelcnn.sample_plain(model, u, (bits[:, None] > 0).long().repeat_interleave(6, 0), 4)
        assert np.array_equal(rows[:, 2:], ways.view(8, 6, 8, 8) * 255)
        picture = np.array(Image.open("run/receptive.png").convert("RGB"))[4::8, 4::8]
        assert picture.shape == (8, 8, 3) and (picture[6, 4] == 255).all()
        share = pixelcnn.sensitivity(model, (bits[:, None] > 0).long(), 6, 4)
        assert np.array_equal((picture == 102).all(2), (share == 0).numpy() & ~((picture == 255).all(2)))


# -------------------------------------------------------------------------------------------------- cpc.py ------------
def float64_cpc(channels=3, size=9):
    """A CPC with random weights in float64. 9 pixels are padded to 14: patches of 4 pixels, every 2."""
    return woken(cpc.CPC(channels, size, 24)).double().requires_grad_(False).eval()


def test_cpc_eq2_loss():
    """The softmax runs over the candidates of a context, which the last axis counts."""
    f = torch.tensor([[1.0, 3, 1], [1, 2, 1], [1, 1, 1]]).double()
    by_hand = torch.tensor([5.0, 2, 3]).double().log()  # of 1/5, 2/4 and 1/3
    transposed = torch.tensor([3.0, 3, 3]).double().log()  # of 1/3, 2/6 and 1/3
    scores = torch.stack([f, f.t()]).log()
    near(cpc.info_nce(scores), torch.stack([by_hand, transposed]), 1e-12)
    near(cpc.loss_cpc(list, scores), [by_hand.mean(), transposed.mean()], 1e-12)  # any network that returns scores


def test_cpc_eq4_scores():
    """The score of context i and candidate j is 10 times the cosine of z_j and W c_i."""
    z, c = normal(2, 2, 4, 7)
    W = normal(7, 7, seed=9)
    prediction = torch.einsum("aic,cz->aiz", c, W)
    want = 10 * F.cosine_similarity(prediction[:, :, None], z[:, None], dim=-1)
    near(cpc.log_f(z, c, W), want, 1e-12)


def exact_bound(f, joint, n):
    """log N - L, exactly, for the scores f (x, c) of a table p(x, c), over all sets of n candidates."""
    total = 0
    for c, *x in itertools.product(range(joint.shape[1]), *[range(len(joint))] * n):
        chance = joint[x[0], c] * joint.sum(1)[x[1:]].prod()  # x[0] is c's own
        total = total + chance * cpc.nce_bound(f[x, c].expand(n, n))[0]
    return total


def test_cpc_eq1_eq3_eq5_enumerated():
    """On a small table, over all sets of candidates: no f exceeds I(x; c), and the density ratio is the best f."""
    joint = normal(4, 3).exp()
    joint /= joint.sum()  # p(x, c)
    ratio = joint / joint.sum(1, keepdim=True) / joint.sum(0)
    information = (joint * ratio.log()).sum()
    for n in 2, 3:
        best = ratio.log().requires_grad_()
        value = exact_bound(best, joint, n)
        assert 0.3 * information < value < information
        assert torch.autograd.grad(value, best)[0].abs().max() < 1e-12
        assert exact_bound(ratio.log() + normal(4, 3, seed=1), joint, n) < value
        near(exact_bound(ratio.log() + normal(1, 3), joint, n), value.item(), 1e-12)  # a factor of c alone
    posterior = ratio[[2, 0, 1], 0]
    log_p = -cpc.info_nce(posterior.log().expand(3, 3))
    near(log_p.exp(), posterior / posterior.sum(), 1e-12)  # (1)


def region(rows, columns):
    """The pixels of the second of two images in these strips of 2 pixels, as a mask (2, 9, 9)."""
    pixels = torch.zeros(2, 14, 14, dtype=torch.bool)
    pixels[1, 2 * rows.start : 2 * rows.stop, 2 * max(0, columns.start) : 2 * columns.stop] = True
    return pixels[:, 2:11, 2:11]


def test_cpc_eq6_predicts_what_it_has_not_seen():
    """The context depends on pixels above and beside it, its candidate k rows below on others, no image on another."""
    model = float64_cpc()
    x = normal(2, 3, 9, 9).requires_grad_()
    with mock.patch.object(cpc, "log_f") as log_f:
        model(x)
    for k, W, call_ in zip((2, 3, 4), model.W, log_f.call_args_list, strict=True):
        z, c, used_W = call_.args
        assert used_W is W and z.shape == (6 - k, 6, 2, 32) and c.shape == (6 - k, 6, 2, 64)
        for r, q in itertools.product(range(6 - k), range(6)):
            target = region(range(r + k, r + k + 2), range(q, q + 2))
            past = region(range(0, r + 2), range(q - 1, q + 3))
            for v, seen in (z, target), (c, past):
                (gradient,) = torch.autograd.grad(v[r, q, 1].sum(), x, retain_graph=True)
                same((gradient != 0).all(1), seen)
    raises("--size 6.*7 pixels", cpc.CPC, 1, 6)


def test_cpc_eq7_features():
    """The features are means of z over 2 x 2 patches, row by row; floats are refused."""
    model = float64_cpc().float()
    images = torch.arange(7 * 3 * 81).mul(7919).to(torch.uint8).view(7, 3, 9, 9)
    x = F.pad(images / 127.5 - 1, (2, 3, 2, 3), value=-1)  # black around
    z = torch.empty(7, 6, 6, 32)
    for r, q in itertools.product(range(6), range(6)):
        patch = x[:, :, 2 * r : 2 * r + 4, 2 * q : 2 * q + 4]
        z[:, r, q] = model.encoder(patch.flatten(1))
    want = F.avg_pool2d(z.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).flatten(1)
    near(cpc.encode(model, images, chunk=3), want, 1e-5)
    raises("uint8", cpc.encode, model, x)


def test_cpc_eq8_probe():
    """The probe's weights are where the gradient of the penalised loss of standardised features is zero."""
    y = torch.arange(90) % 3
    h = 2 * normal(3, 5)[y] + 2 * normal(90, 5, seed=9)
    h = h * torch.tensor([1.0, 3, 1, 1, 5]) + 7
    probe = functools.partial(cpc.linear_probe, weight_decay=0.01, iters=300)
    with mock.patch.object(torch.optim, "LBFGS", side_effect=torch.optim.LBFGS) as optimiser:
        got = probe(h, y, h)
    ((V,),) = optimiser.call_args.args
    V = V.detach().clone().requires_grad_()
    g = (h - h.mean(0)) / h.std(0, correction=0)
    g = F.pad(g, (0, 1), value=1)
    loss = F.cross_entropy(g @ V.t(), y) + 0.005 * V.square().sum()
    (gradient,) = torch.autograd.grad(loss, V)
    near(gradient, 0, 1e-5)
    same(got, (g @ V.t()).argmax(1))
    assert 0.6 < (got == y).double().mean()
    silent = torch.ones(90, 1)  # a feature that says nothing in training, and little in the test
    noisy = 1 + 1e-3 * normal(90, 1)
    same(probe(torch.cat([h, silent], 1), y, torch.cat([h, noisy], 1)), got)


def test_cpc_learning_curve():
    """Probes are fitted to 10, 100, 1000, five times each, and all training images, and scored on the test part."""
    y = torch.arange(1500) % 2
    fitted = []

    def probe(h, labels, others):
        same(labels, y[h[:, 0].long()])
        fitted.append(len(h.unique()))
        return others[:, 0] < len(h)

    others = torch.tensor([[5], [50], [500], [1200]])
    with mock.patch.object(cpc, "linear_probe", probe):
        curve = cpc.learning_curve(torch.arange(1500)[:, None], others, y, torch.ones(4))
    assert curve == {10: 0.25, 100: 0.5, 1000: 0.75, 1500: 1}
    assert fitted == [10] * 5 + [100] * 5 + [1000] * 5 + [1500]


def test_cpc_plot():
    """In the plot a better accuracy is higher, and more labels are further to the right."""
    curves = {"bad": {10: 0.3, 1000: 0.5}, "good": {10: 0.9, 1000: 0.99}}
    with workdir():
        cpc.plot_curves("plot.png", curves)
        plot = np.array(Image.open("plot.png"))[30:]  # below the legend
    heights = []
    for colour in (192, 57, 43), (36, 113, 163):
        rows, columns = np.nonzero((plot == colour).all(2))
        heights += [rows[columns == 72].mean(), rows[columns == 728].mean()]
    assert heights == sorted(heights, reverse=True)


def in_classes(here):
    """Pictures 0 .. 59 in subfolders b, a, c in turn, some of them deeper; picture i has the grey value 100 + i."""
    for i in range(60):
        folder = here / "pics" / "bac"[i % 3] / ("deep" if i % 2 else "")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 100 + i).save(folder / f"{i:02}.png")


def classes_of(images):
    """The classes of these pictures in alphabetical order, (n,), from their grey values."""
    return torch.tensor([1, 0, 2])[(images[:, 0, 0, 0].long() - 100) % 3]


def test_cpc_labels_of_folders():
    """The top-level subfolders with pictures are the classes, in the order of load_images, or there are none."""
    with workdir() as here:
        in_classes(here)
        (here / "pics" / "notes").mkdir()
        (here / "pics" / "notes" / "a.txt").write_text("no picture, no class")
        for test in False, True:
            images = cpc.load_images("pics", 8, test=test)
            same(cpc.load_labels("pics", len(images), test), classes_of(images))
        assert cpc.load_labels("pics/b", 18) is None  # pictures of no class beside a folder
    same(cpc.load_labels("digits", 12), torch.tensor([*range(10), 0, 1]))


def test_cpc_labels_of_idx():
    """Labels come from IDX files under their usual names, QMNIST's too, and are refused if one is missing."""
    y = np.array([3, 1, 4, 1, 5], np.uint8)
    columns = np.stack([y, y + 1], 1).astype(">i4")  # QMNIST: the class, then where the digit is from
    files = {"train-labels.idx1-ubyte": idx(y), "qmnist-train-labels-idx2-int": idx(columns, 12)}
    for name, content in files.items():
        with workdir() as here:
            (here / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((5, 8, 8), np.uint8)))
            assert cpc.load_labels(".", 5) is None
            (here / name).write_bytes(content)
            assert cpc.load_labels(".", 5).tolist() == y.tolist()
            raises("train-labels.* 4 labels", cpc.load_labels, ".", 4)
            (here / name).write_bytes(content[:-1])
            raises("train-labels.* 5 labels", cpc.load_labels, ".", 5)


def test_cpc_real_labels():
    """MNIST's labels are those of its images, where the environment variable MNIST names its folder."""
    if "MNIST" not in os.environ:
        raise unittest.SkipTest("MNIST names no folder")
    for n, test, first in (60_000, False, [5, 0, 4, 1, 9]), (10_000, True, [7, 2, 1, 0, 4]):
        labels = cpc.load_labels(os.environ["MNIST"], n, test)
        assert labels[:5].tolist() == first


def test_cpc_eq5_evaluate():
    """The table holds means over places and images, in complete sets of n; few images are one set."""
    model = float64_cpc().float()
    images = torch.randint(256, (23, 3, 9, 9), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for asked, n, used in (10, 10, 20), (500, 23, 23):
        table, used_n = cpc.evaluate_nce(model, images, asked)
        assert used_n == n
        parts = [model(part / 127.5 - 1) for part in images[:used].split(n)]
        for row, *scores in zip(table, *parts):
            bound = torch.cat([math.log(n) - cpc.info_nce(s).mean((0, 1)) for s in scores])
            hits = torch.cat([(s.argmax(-1) == torch.arange(n)).float().mean((0, 1)) for s in scores])
            error = bound.std(correction=0) / used**0.5
            near(row, torch.stack([bound.mean(), error, hits.mean()]), 1e-5)


def test_cpc_learns():
    """200 steps on drawn digits tell patches apart, better the nearer they are; the control learns the classes."""
    images = cpc.draw_digits(400, 14)
    others = cpc.draw_digits(320, 14, seed=1)
    labels = torch.arange(400) % 10
    train = functools.partial(quiet, cpc.train, images, iters=200, batch=32, lr=4e-3, width=32)
    table, _ = cpc.evaluate_nce(train(), others, 32)
    assert (table[:, 0] > 0.2).all() and table[0, 0] > table[2, 0] + 0.2
    with workdir() as here:
        control = train(labels=labels, path=here / "model.pt")
        raises("other labels.*--fresh", train, labels=labels.flip(0), path=here / "model.pt")
    right = control.head(cpc.encode(control, others)).argmax(1) == labels[:320]
    assert right.float().mean() > 0.9
    raises("--batch 1.*negatives", cpc.train, images, batch=1)


def test_cpc_training():
    """Training sees all images, scaled to -1 .. 1, and returns the EMA of the weights."""
    with mock.patch.dict(TRAIN, cpc=("loss_cpc", 1, -1, 1)):
        for name in "test_training_sees_ddim", "test_training_averages_ddim":
            globals()[name].__wrapped__(cpc)


def test_cpc_command():
    """What the command prints and draws is what its model's functions return; without labels there is no probe."""
    words = "--data pics --size 8 --width 8 --iters 12 --batch 4 --samples 3 --out run".split()
    few_iterations = mock.patch.object(cpc.linear_probe, "__defaults__", (2e-4, 20))
    with workdir() as here, few_iterations:
        in_classes(here)
        status, out, err = call(cpc, words)
        assert (status, err) == (0, ""), err
        parts = [cpc.load_images("pics", 8, test=test) for test in (False, True)]
        model = cpc.load("run/model.pt")
        control = cpc.load("run/labels/model.pt")
        torch.manual_seed(0)
        untrained = cpc.CPC(1, 8, 8)

        table, _ = cpc.evaluate_nce(model, parts[1])
        want = [f"sets of 6: log N = {math.log(6):.3f} nats, a random choice is right in 16.67%\n"]
        few = ", ".join(f"{bound:.3f}" for bound in cpc.evaluate_nce(model, parts[1], 4)[0][:, 0])
        want.append(f"N = 4: log N = 1.386, I(x; c) >= {few} nats, 2, 3, 4 rows ahead\n")
        for k, (bound, error, hits) in zip((2, 3, 4), table.tolist()):
            want.append(f"{k} rows ahead: loss {math.log(6) - bound:.3f} +- {error:.3f}, I(x; c) >= {bound:.3f} nats, ")
            want.append(f"{bound:.3f} nats, the right patch chosen in {hits:.2%}\n")
        h, test_h = (cpc.encode(model, x) for x in parts)
        features = {"\ntrained,    288": (h, test_h)}
        features["untrained,  288"] = [cpc.encode(untrained, x) for x in parts]
        features["raw pixels, 64"] = [x.flatten(1) / 127.5 - 1 for x in parts]
        for name, both in features.items():
            curve = cpc.learning_curve(*both, *map(classes_of, parts))
            want.append(f"{name} values an image:  10: {curve[10]:.2%}  54: {curve[54]:.2%}\n")
        right = control.head(cpc.encode(control, parts[1])).argmax(1) == classes_of(parts[1])
        want.append(f"trained with labels: {right.float().mean():.2%}\n")
        for line in want:
            assert line in out, (line, out)

        nearest = torch.cdist(test_h[:3], h).argsort()[:, :9]
        drawn = torch.cat([parts[1][:3, None], parts[0][nearest]], dim=1)
        assert np.array_equal(tiles("run/neighbours.png"), drawn[:, :, 0])
    with workdir() as here:
        grey(here)
        status, out, err = call(cpc, words)
        assert (status, err) == (0, "")
        assert "no labels" in out and not Path("run/labels").exists()


def test_cpc_eq9_frechet():
    """The distance is that of scipy's matrix square root, made of eigenvalues here, and 0 for equal features."""
    a, b = normal(50, 4) @ normal(4, 4, seed=1), 0.5 + normal(70, 4, seed=2)
    product = np.cov(a.numpy().T) @ np.cov(b.numpy().T)  # its eigenvalues are positive, though it is not symmetric
    values, vectors = np.linalg.eig(product)
    root = (vectors * np.sqrt(values)) @ np.linalg.inv(vectors)
    near(torch.from_numpy(root @ root), product, 1e-10)
    want = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * np.trace(root)
    near(cpc.frechet(a, b), want, 1e-9)
    near([cpc.frechet(a, a), cpc.frechet(a + 3, a)], [0, 36], 1e-6)


def test_cpc_judge_command():
    """--judge prints the distance of each file, that of as many training images, its classes and their divergence."""
    rng = np.random.default_rng(0)
    with workdir() as here:
        for name in "dark", "light":
            (here / "pics" / name).mkdir(parents=True)
            for i in range(30):
                grey_value = 40 if name == "dark" else 200
                pixels = rng.integers(grey_value - 30, grey_value + 30, (14, 14), dtype=np.uint8)
                Image.fromarray(pixels).save(here / "pics" / name / f"{i}.png")
        words = "--data pics --size 14 --width 16 --iters 3 --batch 4 --out run".split()
        images = cpc.load_images("pics", 14)
        np.save("good.npy", images[:40, 0].numpy())
        np.save("dark.npy", images[:20, 0].numpy())
        status, out, err = call(cpc, [*words, "--judge", "good.npy", "dark.npy"])
        model = cpc.load("run/model.pt")
        test_h = cpc.encode(model, cpc.load_images("pics", 14, test=True))
        good, dark = out.splitlines()[-2:]
        assert status == 0 and good.startswith(
            f"good.npy: Frechet distance {cpc.frechet(cpc.encode(model, images[:40]), test_h):.3f}"
        ), err
        assert "2 of 2 classes" in good and "1 of 2 classes, KL 0.693 nats, 20 images" in dark, out
        floor = cpc.frechet(cpc.encode(model, images), test_h)
        np.save("all.npy", images[:, 0].numpy())
        assert f"(as many training images: {floor:.3f})" in call(cpc, [*words, "--judge", "all.npy"])[1]
        np.savez("zip.npz", images.numpy())
        np.save("float.npy", np.zeros((3, 14, 14)))
        np.save("large.npy", np.zeros((3, 15, 15), np.uint8))
        (here / "text.npy").write_text("no array")
        for file, say in (
            ("zip.npz", "one array"),
            ("float.npy", "uint8"),
            ("large.npy", "15, 15"),
            ("text.npy", "not a file"),
            ("no.npy", "No such"),
        ):
            status, _, err = call(cpc, ["--out", "run", "--judge", file])
            assert status == 1 and say in err and file in err, err


# ------------------------------------------------------------------------------------------------- ddpm.py ------------
SCHEDULE = ddpm.make_schedule()


def oracle(x_0, s=SCHEDULE):
    """The exact noise estimate when x_0 is the only image that there is."""

    def network(x_t, t):
        signal, noise = (table[t].view(-1, 1, 1, 1) for table in (s.signal, s.noise))
        return (x_t - signal * x_0) / noise

    return network


def answers(eps):
    """A network that answers eps to every question."""
    return lambda x_t, t: eps.expand_as(x_t)


class Net(nn.Module):
    """A network with a given answer, which keeps the time steps that it was asked about."""

    def __init__(self, answer, size=2):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.shape = (1, size, size)
        self.answer = answer
        self.asked = []

    def forward(self, x, t):
        self.asked.append(t.tolist())
        return self.answer(x, t)


def test_ddpm_eq1_eq2_chain_of_steps():
    """T steps of (1), one after the other, have the mean and the variance of (2) at every t."""
    one = torch.ones(1, 1, 1, 1).double()
    near(SCHEDULE.beta, np.linspace(1e-4, 0.02, 1000), 1e-15)
    mean, variance = 1.0, 0.0
    for t, beta in enumerate(SCHEDULE.beta.tolist()):
        mean = mean * (1 - beta) ** 0.5
        variance = variance * (1 - beta) + beta
        near(ddpm.q_sample(one, t, 0 * one, SCHEDULE), mean, 1e-12)
        near(ddpm.q_sample(0 * one, t, one, SCHEDULE) ** 2, variance, 1e-12)


def test_ddpm_eq3_is_bayes_rule():
    """The posterior's precision is the sum of two, and its mean the sum of two means weighted by them."""
    s = SCHEDULE
    x_0, x_t = normal(2, 3, 1, 2, 2)
    for t in 1, 40, 999:
        alpha = 1 - s.beta[t]
        before = s.alpha_bar[t - 1]
        ahead = alpha / s.beta[t]  # the precision of x_t, as a measurement of x_{t-1}
        prior = 1 / (1 - before)
        near(s.beta_tilde[t], 1 / (ahead + prior), 0, 1e-9)
        mean = (ahead * x_t / alpha.sqrt() + prior * before.sqrt() * x_0) / (ahead + prior)
        near(ddpm.q_mean(x_0, x_t, t, s), mean, 1e-9)
    near(ddpm.q_mean(x_0, x_t, 0, s), x_0, 1e-12)


def test_ddpm_eq4_bound_of_an_oracle():
    """If the network knows x_0, every L_t with the small variance is 0, L_0 is (9) at x_0, and L_T is exact."""
    s = ddpm.make_schedule(50)
    x_0 = torch.tensor([-1, -0.2, 0.6, 1], dtype=torch.float64)
    x_0 = x_0.view(4, 1, 1, 1).expand(4, 2, 3, 3)
    bits = quiet(ddpm.bound, oracle(x_0, s), x_0, s, "small")
    inside = math.erf(1 / 255 / (2 * s.beta_tilde[1].item()) ** 0.5)  # of the bin around the mean
    outer = (1 + inside) / 2  # black and white have a tail as well
    near(bits[:, 0], [-math.log2(mass) for mass in (outer, inside, inside, outer)], 1e-9)
    near(bits[:, 1:-1], torch.zeros(4, 49), 1e-9)
    q = D.Normal(s.signal[-1] * x_0, s.noise[-1])
    L_T = D.kl_divergence(q, D.Normal(0.0, 1.0))
    near(bits[:, -1], L_T.mean((1, 2, 3)) / math.log(2), 1e-12)
    raises("large or small, not beta", ddpm.bound, oracle(x_0, s), x_0, s, "beta")


def test_ddpm_eq4_eq5_weights_of_a_blind_network():
    """If the network answers 0, each L_{t-1} is w_t E eps² = w_t, and the KL of the two variances."""
    s = ddpm.make_schedule(100, 1e-3, 0.1)
    x_0 = torch.full((400, 1, 4, 4), 0.2).double()
    tolerance = 5 * (2 / x_0.numel()) ** 0.5  # five standard errors
    for variance, table in ("large", s.beta), ("small", s.beta_tilde):
        generator = torch.Generator().manual_seed(3)
        bits = quiet(ddpm.bound, answers(0 * x_0), x_0, s, variance, False, generator)
        w = s.beta**2 / (2 * table * (1 - s.beta) * (1 - s.alpha_bar))
        ratio = s.beta_tilde / table
        nats = w + (ratio - 1 - ratio.log()) / 2
        near(bits[:, 1:-1].mean(0) * math.log(2) / nats[1:], 1, tolerance)
    w = SCHEDULE.beta / (2 * (1 - SCHEDULE.beta) * (1 - SCHEDULE.alpha_bar))
    near(w[[1, 349]], [0.27, 0.005], 3e-3)  # the docstring's


def test_ddpm_eq6_mean():
    """Any answer of the network gives the paper's [11], or (3) of the clipped estimate of x_0."""
    x_t, eps = normal(2, 4, 3, 4, 4)
    for t in 0, 1, 500, 999:
        beta = SCHEDULE.beta[t]
        a = SCHEDULE.alpha_bar[t]
        eq11 = (x_t - beta / (1 - a).sqrt() * eps) / (1 - beta).sqrt()
        near(ddpm.p_mean(answers(eps), x_t, t, SCHEDULE, clip=False), eq11, 1e-9)
        x_0 = (x_t - (1 - a).sqrt() * eps) / a.sqrt()
        want = ddpm.q_mean(x_0.clamp(-1, 1), x_t, t, SCHEDULE)
        near(ddpm.p_mean(answers(eps), x_t, t, SCHEDULE), want, 1e-9)


def test_ddpm_eq7_loss():
    """The network sees x_t as (2) makes it and t as it is; the loss is the mean squared error of its answer."""
    t = torch.tensor([0, 999, 300, 41])
    x_0, eps, answer = normal(3, 4, 2, 4, 4)
    network = Watched(answers(answer))
    loss = ddpm.loss_simple(network, x_0, t, eps, SCHEDULE)
    near(loss, (answer - eps).square().mean((1, 2, 3)), 1e-12)
    x_t, asked = network[0]
    a = SCHEDULE.alpha_bar[t].view(4, 1, 1, 1)
    near(x_t, a.sqrt() * x_0 + (1 - a).sqrt() * eps, 1e-12)
    assert asked == t.tolist()


def test_ddpm_eq8_adds_no_noise_at_the_end():
    """A step adds √β_t z or √β̃_t z to the mean, and the last step nothing."""
    x_t, z, eps = normal(3, 2, 1, 4, 4)
    for variance, table in ("large", SCHEDULE.beta), ("small", SCHEDULE.beta_tilde):
        for t in 0, 1, 999:
            x = ddpm.p_step(answers(eps), x_t, t, z, SCHEDULE, variance)
            mean = ddpm.p_mean(answers(eps), x_t, t, SCHEDULE)
            near(x - mean, table[t].sqrt() * z if t else 0, 1e-12)


def test_ddpm_eq9_decoder():
    """Each byte has the integral of its bin, and black and white have that of a tail."""
    x = (torch.arange(256).double() / 127.5 - 1).view(256, 1, 1, 1)
    edges = torch.arange(-254, 255, 2).double() / 255
    for mean, sigma in itertools.product((-1.3, 0.0011, 0.7), (0.0073, 0.5)):
        mean, sigma = torch.tensor([mean, sigma]).double()
        cdf = D.Normal(mean, sigma).cdf(edges)
        cdf = F.pad(cdf, (1, 0), value=0)
        cdf = F.pad(cdf, (0, 1), value=1)
        near(ddpm.log_decoder(x, mean, sigma).exp(), cdf.diff(), 1e-12)


def test_ddpm_eq9_far_away():
    """Many standard deviations away the probability of a byte is small but precise, and never zero."""
    far = torch.tensor([3.0, 8, 35]).double()  # from the nearer edge of the bin, half a standard deviation wide
    sigma = torch.tensor(4 / 255).double()
    ratio = torch.special.log_ndtr(-far - 0.5) - torch.special.log_ndtr(-far)
    want = torch.special.log_ndtr(-far) + torch.log1p(-ratio.exp())
    x = torch.full((3, 1, 1, 1), -55 / 255).double()
    offset = (1 / 255 + far * sigma).view(3, 1, 1, 1)
    for side in 1, -1:
        near(ddpm.log_decoder(x, x + side * offset, sigma), want, 0, 1e-6)
    nowhere = ddpm.log_decoder(x.float(), x + 50, sigma)
    assert nowhere.isfinite().all() and (nowhere < -100).all()


def test_ddpm_network():
    """The U-Net keeps any shape that it can halve twice, uses t and every weight, and no image sees its neighbours."""
    t = torch.tensor([0, 500, 999])
    for channels, size in (1, 8), (3, 12):
        model = woken(ddpm.UNet(channels, size, 8))
        x = normal(3, channels, size, size).float()
        y = model(x, t)
        assert y.shape == x.shape and model.shape == x.shape[1:]
        near(y[1:2], model(x[1:2], t[1:2]), 1e-4)
        other = model(x, t.flip(0))
        assert min((y - other)[i].abs().max() for i in (0, 2)) > 1e-3
        y.square().mean().backward()
        assert all(p.grad.any() for p in model.parameters())
    for size, width in (30, 8), (28, 12):
        raises(f"{size}.*{width}", ddpm.UNet, 1, size, width)


def test_ddpm_sample():
    """sample() returns as many images as asked for, chunk by chunk, equal for equal seeds, and states of the first."""
    x_0 = normal(1, 2, 2).float().clamp(-1, 1)
    network = Net(oracle(x_0, SCHEDULE.to("cpu")))
    strip = dict.fromkeys((999, 600, -1))
    x = quiet(ddpm.sample, network, 12, chunk=9, strip=strip)
    near(x, x_0.expand(12, 1, 2, 2), 1e-4)
    assert network.asked == [[t] * n for n in (9, 3) for t in reversed(range(1000))]
    x_T = torch.randn(9, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    same(strip[999], x_T)
    same(strip[-1], x[:9])
    near(strip[600], SCHEDULE.signal[600] * x_0.expand(9, 1, 2, 2), 5 * SCHEDULE.noise[600])
    draw = functools.partial(quiet, ddpm.sample, Net(answers(torch.zeros(1))), 3, chunk=2)
    x = draw(clip=False)
    same(x, draw(clip=False))
    others = [draw(clip=False, seed=1), draw(clip=False, variance="small")]
    assert len(torch.cat([x, *others]).unique(dim=0)) == 9
    assert x.abs().max() > 1 >= draw().abs().max()


def test_ddpm_command():
    """The bound is that of the test images with the variance asked for; samples and strip obey variance and seed."""
    model = Net(lambda x, t: torch.sin(x) + 0.001 * t.view(-1, 1, 1, 1), 8)
    with workdir() as here:
        grey(here, 40)
        images = ddpm.load_images("pics", 8)
        quiet(ddpm.train, images, 1, 2, width=8, seed=4, path=here / "run" / "model.pt", data="pics")
        with mock.patch.object(ddpm, "train", return_value=model):
            status, out, err = call(ddpm, "--variance small --bound 3 --samples 9 --out run".split())
        assert (status, err) == (0, ""), err
        strip = dict.fromkeys((999, 299, -1))
        x = quiet(ddpm.sample, model, 9, "small", seed=4, strip=strip)
        assert np.array_equal(np.load("run/samples.npy"), ddpm.to_uint8(x)[:, 0])
        states = torch.stack([*strip.values()], dim=1)[:8]
        alike(tiles("run/strip.png")[:, [0, 4, 9]], ddpm.to_uint8(states))
        first_guess = ddpm.guess(model, strip[999][:8], 999, SCHEDULE.to("cpu"))
        guesses = torch.stack([first_guess, strip[-1][:8]], dim=1)
        alike(tiles("run/guesses.png")[:, [0, 9]], ddpm.to_uint8(guesses))
        with Image.open("run/samples.gif") as film:
            assert film.n_frames == 11
        x_0 = ddpm.load_images("pics", 8, test=True)[:3].float() / 127.5 - 1
    generator = torch.Generator().manual_seed(4)
    bits = quiet(ddpm.bound, model, x_0, SCHEDULE.to("cpu"), "small", generator=generator)
    total = bits.sum(1)
    error = total.std(correction=0) / 3**0.5
    number = r"(\d+\.\d+)"
    said = rf"3 test images: {number} \+- {number} bits/dim = L_T {number} \+ L_1:T-1 {number} \+ L_0 {number}\n"
    printed = [float(text) for text in re.search(said, out).groups()]
    parts = [bits[:, 1000], bits[:, 1:1000].sum(1), bits[:, 0]]
    near(printed, [total.mean(), error, *[part.mean() for part in parts]], 6e-4, 1e-6)
    near(printed[2], parts[0].mean(), 1e-5)


def test_ddpm_eq8_diffusers():
    """A step is that of diffusers 0.42.1, a judge that readers know."""
    # scheduler = diffusers.DDPMScheduler(1000, variance_type="fixed_large"), its randn_tensor replaced by z
    # scheduler.step(eps, t, x).prev_sample
    x, eps, z = torch.tensor(
        [[0.5, -1.2, 0.3, 2.0], [0.1, -0.7, 1.1, 0.4], [1.0, -0.5, 0.25, 2.0]], dtype=torch.float64
    ).view(3, 1, 1, 2, 2)
    for variance, t, want in (
        ("large", 999, [0.636524, -1.258777, 0.332212, 2.262868]),
        ("large", 1, [0.510145, -1.096364, 0.293844, 1.476563]),
        ("small", 500, [0.600366, -1.246111, 0.320237, 2.191779]),
        ("small", 1, [0.506579, -1.094581, 0.292952, 1.469430]),
        ("large", 0, [0.499025, -1.0, 0.289014, 1.0]),
    ):
        got = ddpm.p_step(lambda x, t: eps, x, t, z, ddpm.make_schedule(), variance)
        near(got.flatten(), want, 1e-4)


# ------------------------------------------------------------------------------------------------- ddim.py ------------
ALPHA_BAR = ddim.make_alpha_bar()


def test_ddim_eq1_eq2_loss():
    """The network sees x_t as (1) makes it and t as it is; the loss is the mean squared error of its answer."""
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    near(ALPHA_BAR, a, 1e-12)
    t = torch.tensor([0, 999, 300, 41])
    x_0, eps, answer = normal(3, 4, 2, 4, 4)
    network = Watched(answers(answer))
    loss = ddim.loss_gamma(network, x_0, t, eps, ddim.noise_tables(ALPHA_BAR))
    near(loss, (answer - eps).square().mean((1, 2, 3)), 1e-12)
    x_t, asked = network[0]
    a_t = torch.from_numpy(a[t]).view(4, 1, 1, 1)
    near(x_t, a_t.sqrt() * x_0 + (1 - a_t).sqrt() * eps, 1e-6)  # float32
    assert asked == t.tolist()


def test_ddim_eq2_draw_t():
    """Time steps are as frequent as their weights say: weight times frequency is 1 / T for each."""
    for T in 1, 10, 1000:
        t, weight = ddim.draw_t(100_000, T)
        want = torch.zeros(T).index_copy(0, t, 1 / (T * weight)).double()
        near(want.sum(), 1, 1e-5)
        near(torch.bincount(t, minlength=T) / 1e5, want, 2e-5)


def test_ddim_eq3_noise_follows_the_clipped_image():
    """Where the estimate of x_0 is clipped, the step leads from x_t to the clipped x_0."""
    x_t = normal(1, 1, 2, 2)
    model = oracle(torch.tensor(3.0))
    for clip, x_0 in (True, 1.0), (False, 3.0):
        eps = (x_t - SCHEDULE.signal[500] * x_0) / SCHEDULE.noise[500]
        want = SCHEDULE.signal[250] * x_0 + SCHEDULE.noise[250] * eps
        near(ddim.step(model, x_t, 500, 250, ALPHA_BAR, clip=clip), want, 1e-9)


def test_ddim_eq3_eq4_eq5_eq6_marginals():
    """Given x_0, x_p has mean and variance of (1) for any η and p, and for η = 1 the σ of Bayes' rule."""
    x_0, eps, z = torch.eye(3).double().view(3, 3, 1, 1, 1)  # a step is linear: what becomes of each
    for t, p in (999, 998), (999, -1), (700, 350), (20, 3), (0, -1):
        a_t = ALPHA_BAR[t]
        a_p = ALPHA_BAR[p] if p >= 0 else torch.tensor(1.0)
        ratio = a_t / a_p
        bayes = 1 / (ratio / (1 - ratio) + 1 / (1 - a_p))  # precisions add up
        x_t = a_t.sqrt() * x_0 + (1 - a_t).sqrt() * eps
        for eta in 0.0, 0.3, 1.0:
            x_p = ddim.step(oracle(x_0), x_t, t, p, ALPHA_BAR, eta, z, clip=False)
            mean, c, sigma = x_p.flatten()
            near([mean, sigma**2], [a_p.sqrt(), eta**2 * bayes], 1e-9)
            near(c**2 + sigma**2, 1 - a_p, 1e-9)
    for eta in -0.1, 1.1, math.nan:
        raises("--eta", ddim.step, oracle(x_0), x_0, 9, 3, ALPHA_BAR, eta)


def test_ddim_eq7_tau():
    """The S pairs (t, p) fall from T-1 to -1, each p is the next t, and the values are those of the ceilings."""
    for S, (n, spacing) in itertools.product((1, 7, 333, 1000), ((1, "linear"), (2, "quad"))):
        t, p = zip(*ddim.make_tau(1000, S, spacing))
        ceilings = [-(-1000 * i**n // S**n) for i in range(1, S + 1)]
        assert list(reversed(t)) == [max(ceiling, i) - 1 for i, ceiling in enumerate(ceilings, 1)]
        assert p == (*t[1:], -1)
    assert ddim.make_tau(1000, 5, "quad") == [(999, 639), (639, 359), (359, 159), (159, 39), (39, -1)]
    for S in 0, 1001:
        raises(f"steps.*1000.*{S}", ddim.make_tau, 1000, S)
    raises("spacing.*Quad", ddim.make_tau, 1000, 10, "Quad")


def test_ddim_eq8_solves_the_ode():
    """For Gaussian pixels decoding and encoding converge to the exact solution of the ODE, with errors like 1 / S."""
    mean, std = 0.3, 0.4
    signal, noise = (table.view(-1, 1, 1, 1) for table in (SCHEDULE.signal, SCHEDULE.noise))
    stds = (signal**2 * std**2 + noise**2).sqrt()  # of x_t
    network = Watched(lambda x, t: noise[t] * (x - signal[t] * mean) / stds[t] ** 2)
    x_0 = mean + std * normal(500, 1, 1, 2)
    x_T = signal[999] * mean + stds[999] * (x_0 - mean) / std
    for spacing in "linear", "quad":
        errors = []
        for S in 50, 100:
            network.clear()
            latent = ddim.encode(network, x_0, ALPHA_BAR, S, spacing)
            asked = [t[0] for _, t in network]
            assert asked == [max(p, 0) for _, p in reversed(ddim.make_tau(1000, S, spacing))]
            x = ddim.decode(network, x_T, ALPHA_BAR, S, 0.0, spacing, False)
            errors.append([(x - x_0).norm(), (latent - x_T).norm()])
        near(torch.tensor(errors[0]) / torch.tensor(errors[1]), 2, 0.3)


def test_ddim_eq9_slerp():
    """slerp follows the sine rule from x to y, whatever their lengths; parallel latents are no harm."""
    x, y = normal(2, 48)
    y = 3 * y
    cos = x @ y / x.norm() / y.norm()
    sin = (1 - cos**2).sqrt()
    theta = torch.atan2(sin, cos)
    for slerp in ddim.slerp, gan.slerp:
        for a in 0.0, 0.3, 0.9, 1.0:
            weights = torch.linalg.lstsq(torch.stack([x, y], 1), slerp(x, y, a)[:, None]).solution
            near(weights[:, 0] * sin, [torch.sin((1 - a) * theta), torch.sin(a * theta)], 1e-9)
        near(slerp(x, x, 0.3), x, 1e-9)
        near(slerp(x, -3 * x, 0.5), -x, 1e-9)


def test_ddim_sample():
    """sample() returns as many images as asked for, chunk by chunk, in S steps as spaced, equal for equal seeds."""
    x_0 = normal(1, 2, 2).float().clamp(-1, 1)
    network = Net(oracle(x_0, SCHEDULE.to("cpu")))
    x = quiet(ddim.sample, network, 5, 7, 0.0, "quad", chunk=2)
    near(x, x_0.expand(5, 1, 2, 2), 1e-4)
    assert network.asked == [[t] * n for n in (2, 2, 1) for t, _ in ddim.make_tau(1000, 7, "quad")]
    draw = functools.partial(quiet, ddim.sample, Net(answers(torch.zeros(1))), 5, 7, clip=False, chunk=2)
    same(draw(eta=1.0), draw(eta=1.0))
    assert len(torch.cat([draw(), draw(eta=1.0), draw(seed=1)]).unique(dim=0)) == 15


def test_ddim_command():
    """--model samples a checkpoint of ddpm.py with its own data; pictures and printed errors are what they say."""
    words = "--model ddpm/model.pt --steps 3 --eta 1 --spacing quad --seed 4 --samples 2 --compare 5,2 --out run"
    with workdir() as here:
        grey(here)
        images = ddpm.load_images("pics", 8)
        quiet(ddpm.train, images, iters=2, batch=2, width=8, path=here / "ddpm" / "model.pt", data="pics")
        model = woken(ddim.load("ddpm/model.pt"))
        load = mock.patch.object(ddim, "load", lambda path, device: model)
        with load, mock.patch.object(ddim, "train", side_effect=AssertionError):
            status, out, err = call(ddim, words.split())
        assert (status, err) == (0, ""), err
        x = quiet(ddim.sample, model, 2, 3, 1.0, "quad", seed=4)
        assert np.array_equal(np.load("run/samples.npy"), ddim.to_uint8(x)[:, 0])
        x_T = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(4))
        rows = [ddim.decode(model, x_T, ALPHA_BAR, S, 0.0, "quad")[:10] for S in (5, 2)]
        alike(tiles("run/compare.png"), ddim.to_uint8(torch.cat(rows)))
        ends = ddim.decode(model, x_T[:12], ALPHA_BAR, 3, 0.0, "quad")
        alike(tiles("run/slerp.png")[:, [0, 9]], ddim.to_uint8(ends))
        x_0 = ddim.load_images("pics", 8, test=True).float() / 127.5 - 1
        latents = ddim.encode(model, x_0, ALPHA_BAR, 10, "quad")
        x = ddim.decode(model, latents, ALPHA_BAR, 10, 0.0, "quad", False)
        alike(tiles("run/reconstructions.png")[:2], ddim.to_uint8(torch.cat([x_0, x])))
    error = float(re.search(r"in 10 steps each: mean squared error ([\d.]+)", out)[1])
    near(error, (x - x_0).square().mean() / 4, 1e-5, 1e-3)
    timed = re.search(r"5 steps: +([\d.]+) s for 32 images, +([\d.]+) images/s", out)
    seconds, rate = map(float, timed.groups())
    assert abs(rate * seconds - 32) < 0.05 * 32 + 0.01 * rate, out


def test_ddim_eq5_diffusers():
    """A step is that of diffusers 0.42.1, a judge that readers know."""
    # scheduler = diffusers.DDIMScheduler(1000); scheduler.set_timesteps(50); v = lambda *x: torch.tensor(x).double()
    # scheduler.step(v(.1, -.7, 1.1, .4), t, v(.5, -1.2, .3, 2), eta=eta, use_clipped_model_output=True,
    #                variance_noise=v(1, -.5, .25, 2)).prev_sample
    x, eps, z = torch.tensor(
        [[0.5, -1.2, 0.3, 2.0], [0.1, -0.7, 1.1, 0.4], [1.0, -0.5, 0.25, 2.0]], dtype=torch.float64
    ).view(3, 1, 1, 2, 2)
    for t, p, eta, want in (
        (980, 960, 0.0, [0.501659, -1.201649, 0.298330, 2.001638]),
        (980, 960, 0.5, [0.766129, -1.294678, 0.356798, 2.488823]),
        (500, 480, 0.0, [0.527031, -1.220522, 0.265529, 2.013082]),
        (500, 480, 0.5, [0.731755, -1.303052, 0.303898, 2.391238]),
        (20, 0, 0.5, [0.499438, -1.024717, 0.224387, 1.119930]),
        (0, -1, 0.5, [0.499025, -1.0, 0.289014, 1.0]),
    ):
        got = ddim.step(lambda x, t: eps, x, t, p, ddim.make_alpha_bar(), eta, z)
        near(got.flatten(), want, 2e-5)


# --------------------------------------------------------------------------------------- rectified_flow.py ------------
def small_flow(seed=0):
    """A U-Net for 8x8 images, as if trained."""
    return woken(rectified_flow.UNet(1, 8, 8, t_max=1), seed).eval().requires_grad_(False)


def test_rectified_flow_eq1_each_image_has_its_own_time():
    """X_t is on the straight line from noise at t = 0 to the image at t = 1, each image at its own t."""
    x_0, x_1 = normal(2, 4, 3, 4, 4)
    t = torch.tensor([0.0, 0.25, 0.9, 1.0]).double()
    for i, x_t in enumerate(rectified_flow.interpolate(x_0, x_1, t)):
        near(x_t, x_0[i] + t[i] * (x_1[i] - x_0[i]), 1e-12)


def test_rectified_flow_eq2_loss():
    """The network sees X_t and t, and the loss is the mean squared distance from X_1 - X_0 to its answer."""
    x_0, x_1, answer = normal(3, 4, 2, 4, 4)
    t = torch.tensor([0.1, 0.9, 0.5, 0.3]).double()
    spy = Watched(lambda x, t: answer)
    near(rectified_flow.loss_flow(spy, x_0, x_1, t), (answer - (x_1 - x_0)).square().mean(), 1e-12)
    same(spy[0], (rectified_flow.interpolate(x_0, x_1, t), t.tolist()))


def test_rectified_flow_eq2_times_of_training():
    """The times of a batch are spread evenly over a logit-normal distribution, in any order of the images."""
    batches = rectified_flow.line_batches(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), 100)
    t = torch.stack([next(batches)[2] for _ in range(50)])
    u = torch.special.ndtr(torch.logit(t.double())).sort(1)[0]
    near(u, ((torch.arange(100) + 0.5) / 100).expand(50, 100), 0.0051)
    assert len(t.argmin(1).unique()) > 20


def test_rectified_flow_eq3_eq4_eq5_eq6_keep_the_marginals():
    """(3) maps noise to normal data by quantiles; rk45 errs like tol, Euler like 1 / N; one step ends at the mean."""
    mean, std = 0.6, 0.3

    def velocity(x, t):
        t = t.view(-1, 1)
        covariance = t * std**2 - (1 - t)  # of X_1 - X_0 and X_t
        variance = (t * std) ** 2 + (1 - t) ** 2  # of X_t
        return mean + covariance / variance * (x - t * mean)

    z = torch.linspace(-4, 4, 41).double()[:, None]
    want = mean + std * z
    for tol in 1e-3, 1e-5, 1e-7, 1e-9:
        errors = (rectified_flow.rk45(velocity, z, tol) - want).abs() / tol
        assert 0.001 < errors.max() < 20, errors.max()
    errors = [(rectified_flow.euler(velocity, z, N) - want).abs().max() for N in (50, 100, 200)]
    assert all(1.6 < a / b < 2.4 for a, b in itertools.pairwise(errors)), errors
    near(rectified_flow.euler(velocity, z, 1), mean, 1e-9)


def test_rectified_flow_eq4_eq5_euler():
    """The network is asked at the current z, at 0, 1/N, ..., (N - 1)/N, once each, and z moves by its answer / N."""
    spy, z = Watched(lambda z, t: torch.sin(3 * z)), normal(1, 1, 2, 2)
    end = rectified_flow.euler(spy, z, 3)
    near([t for _, t in spy], [[0], [1 / 3], [2 / 3]], 1e-12)
    for seen, _ in spy:
        near(seen, z, 1e-12)
        z = z + torch.sin(3 * z) / 3
    near(end, z, 1e-12)
    raises("steps.*0", rectified_flow.euler, spy, z, 0)


def test_rectified_flow_eq6_dormand_prince():
    """b meets all conditions of order 5, trees with up to five nodes, and b - e those of order 4, but none more."""
    A = np.zeros((7, 7))
    for i, (c, row) in enumerate(rectified_flow.DORMAND_PRINCE, 1):
        A[i, :i] = row
        near(A[i].sum(), c, 1e-14)

    def grow(tree):  # a tree is the sorted tuple of its branches: all ways to add a leaf
        yield tuple(sorted((*tree, ())))
        for i, branch in enumerate(tree):
            yield from (tuple(sorted((*tree[:i], more, *tree[i + 1 :]))) for more in grow(branch))

    def measure(tree):  # number of nodes, density, and a number for each stage
        parts = [measure(branch) for branch in tree]
        size = 1 + sum(part[0] for part in parts)
        density = size * math.prod(part[1] for part in parts)
        return size, density, math.prod((A @ part[2] for part in parts), start=np.ones(7))

    trees = {()}
    for order in range(1, 7):
        _, densities, stages = zip(*map(measure, trees))
        for top, weights in (5, A[-1]), (4, A[-1] - rectified_flow.ERROR_WEIGHTS):
            missed = abs(stages @ weights - 1 / np.array(densities)).max()
            assert (missed < 1e-14) == (order <= top), (order, top, missed)
        trees = {more for tree in trees for more in grow(tree)}


def test_rectified_flow_eq6_step_sizes():
    """A step is accepted if r is at most 1; the next is min(5, max(0.2, 0.9 r^(-1/5))) times as long."""
    c = np.array([0, *(c for c, _ in rectified_flow.DORMAND_PRINCE)])
    missed = abs(rectified_flow.ERROR_WEIGHTS @ c**4)  # by a step with the velocity t^4
    h, tol = 0.05, 1e-10
    for r, factor in (1e-5, 5), (0.5**5, 1.8), (2**5, 0.45), (1e5, 0.2):
        error = 2**0.5 * r * tol * 5  # one z goes from 3 to 4 with it, the other without
        rate = error / (missed * h**5)
        model = lambda z, t: 1 / h + torch.tensor([rate, 0.0]).double() * t**4 + 0 * z
        spy = Watched(model)
        rectified_flow.rk45(spy, torch.full((1, 2), 3.0).double(), tol)
        start = h if r <= 1 else 0
        near(spy[7][1], start + factor * h / 5, 0, 1e-6)


def test_rectified_flow_eq6_gives_up():
    """Where no step is small enough, for NaN or a pole, the solver says so and ends."""
    for model in (lambda z, t: z * math.nan), (lambda z, t: 1e30 * z**2):
        raises("t = 0.*tol", rectified_flow.rk45, model, torch.ones(2, 3), 1e-3, kind=FloatingPointError)


def test_rectified_flow_eq7_straightness():
    """S is the variance of v = a t + b over Euler's times, summed over the pixels of each image."""
    a, b, z = normal(3, 3, 2, 2, 2)
    for N in 1, 2, 10:
        S = rectified_flow.straightness(lambda z, t: a * t.view(-1, 1, 1, 1) + b, z, N)
        near(S, (1 - 1 / N**2) / 12 * a.square().sum((1, 2, 3)), 1e-12)


def test_rectified_flow_eq8_pairs():
    """The batches of a reflow are pairs of noise N(0, 1) and the image that the flow maps it to, with t near 0."""
    model = small_flow()
    batches = rectified_flow.reflow_batches(model, 230, 4, 3, 20)
    x_0, x_1, t = map(torch.cat, zip(*[quiet(next, batches) for _ in range(100)]))
    near(x_1, rectified_flow.euler(model, x_0, 4), 1e-4)
    near(t.sqrt().sort()[0], (torch.arange(2000) + 0.5) / 2000, 0.05)
    noise = x_0.flatten(1).unique(dim=0)
    assert len(noise) == 230
    near([noise.mean(), noise.var()], [0, 1], 0.058)  # five standard errors


def test_rectified_flow_eq8_straightens():
    """After training on two images one step is far off; after a reflow one is enough, and S is less than half."""
    images = rectified_flow.draw_digits(8, 8)[[1, 7]].repeat(4, 1, 1, 1)
    train = functools.partial(quiet, rectified_flow.train, batch=16, width=16)
    first = train(images, iters=200, lr=1e-2)
    second = train(None, iters=100, start=first, pairs=200, pair_steps=10)
    z = normal(40, 1, 8, 8).float()
    missed, S = [], []
    for model in first, second:
        x = rectified_flow.euler(model, z, 1).flatten(1)
        distance = torch.cdist(x, images[:2].flatten(1) / 127.5 - 1) / 8
        missed.append(distance.amin(1).median())
        S.append(rectified_flow.straightness(model, z, 20).mean())
    assert missed[0] > 0.25 and missed[1] < 0.12, missed
    assert S[1] < S[0] / 2, S


def test_rectified_flow_eq8_reflow_resumes():
    """A reflow that is stopped half-way ends with the same bits; a finished one makes no pairs again."""
    flags = dict(width=8, start=small_flow(), pairs=7, pair_steps=2)
    train = functools.partial(quiet, rectified_flow.train, None, 130, 2, **flags)
    with workdir() as here:
        whole = train().state_dict()
        with hurried(rectified_flow, 115):
            raises("", train, path=here / "model.pt", kind=KeyboardInterrupt)
        assert torch.load("model.pt", weights_only=True)["done"] == 100
        same(dict(train(path=here / "model.pt").state_dict()), dict(whole))
        with mock.patch.object(rectified_flow, "make_pairs", side_effect=AssertionError("pairs")):
            train(path=here / "model.pt")
        raises("pairs 7, not 8", train, path=here / "model.pt", pairs=8)
        raises("other images", train, path=here / "model.pt", start=small_flow(1))


def test_rectified_flow_sample():
    """sample() returns as many images as asked for, chunk by chunk, by either solver, equal for equal seeds."""
    model = small_flow()
    draw = functools.partial(quiet, rectified_flow.sample, model, 5, chunk=2, seed=1)
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randn(n, 1, 8, 8, generator=generator) for n in (2, 2, 1)]
    same(draw(7), torch.cat([rectified_flow.euler(model, z, 7) for z in noise]))
    same(draw(7, "rk45", 1e-2), torch.cat([rectified_flow.rk45(model, z, 1e-2) for z in noise]))
    raises("euler or rk45, not RK45", draw, 7, "RK45")


def test_rectified_flow_command():
    """--reflow 1 samples the second flow; steps.png, S and evaluations are as they say."""
    train, models = rectified_flow.train, []

    def wake(*args):
        assert args[10:] in [(), (*models, 5)]
        models.append(woken(train(*args), len(models)))
        return models[-1]

    words = "--data pics --size 8 --iters 1 --batch 2 --width 8 --seed 4 --pairs 5 --reflow 1 --samples 2 --out run"
    z = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    with workdir() as here, mock.patch.object(rectified_flow, "train", wake):
        grey(here)
        for solver in "--steps 3", "--solver rk45 --tol 1e-4":
            del models[:]
            status, out, err = call(rectified_flow, [*words.split(), *solver.split()])
            assert (status, err) == (0, ""), err
            spy = Watched(models[1])
            x = rectified_flow.rk45(spy, z[:2], 1e-4) if "rk45" in solver else rectified_flow.euler(spy, z[:2], 3)
            assert np.array_equal(np.load("run/samples.npy"), rectified_flow.to_uint8(x)[:, 0])
            assert f"2 samples, {len(spy)} evaluations each" in out
        rows = [rectified_flow.euler(model, z[:12], N) for model in models for N in (1, 2, 5, 50)]
        alike(tiles("run/steps.png"), rectified_flow.to_uint8(torch.cat(rows)))
    for k, model in enumerate(models):
        S = rectified_flow.straightness(model, z, 50)
        assert f"after {k} reflows: S = {S.mean():.2f} +- {S.std() / 8:.2f} an image" in out, out


def gaussian_velocity(m, s):
    """The velocity (3) for images whose pixels are all N(m, s²), in closed form."""

    def v(x, t):
        t = t.view(-1, 1, 1, 1)
        return m + (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2) * (x - t * m)

    return v


def small_velocity(D=2):
    """A velocity field in D dimensions, from two random layers, in float64."""
    a, b, c = normal(D, 8), normal(8, seed=1), normal(8, D, seed=2)
    return lambda x, t: (((x.flatten(1) @ a + b + t.view(-1, 1)).tanh() @ c) / 2).view_as(x)


def axes(x):
    """The ε with which divergence() is exact: the axes times √D, (D, N, C, H, W)."""
    D = x[0].numel()
    return (D**0.5 * torch.eye(D, dtype=x.dtype)).view(D, 1, *x.shape[1:]).expand(D, *x.shape)


def test_rectified_flow_eq9_log_prob_of_a_gaussian():
    """For Gaussian images log_prob() is their log density, and the noise that it returns is (x - m) / s."""
    m, s = 0.7, 0.4
    x = m + s * normal(6, 1, 2, 2)
    nats, z = rectified_flow.log_prob(gaussian_velocity(m, s), x, normal(1, *x.shape).sign(), 1e-7)
    near(nats, D.Normal(m, s).log_prob(x).flatten(1).sum(1), 1e-5)
    near(z, (x - m) / s, 1e-5)


def test_rectified_flow_eq9_density_integrates_to_one():
    """The density of a flow in two dimensions integrates to one."""
    side = torch.linspace(-7, 7, 81, dtype=torch.float64)
    x = torch.cartesian_prod(side, side).view(-1, 1, 1, 2)
    nats, _ = rectified_flow.log_prob(small_velocity(), x, axes(x), 1e-4)
    near(nats.exp().sum() * (side[1] - side[0]) ** 2, 1, 1e-3)


def test_rectified_flow_eq9_is_the_change_of_variables():
    """log_prob() is log N(z) - log |det ∂x/∂z| for x made by many Euler steps from z, the determinant by autograd."""
    v, z = small_velocity(), normal(1, 1, 1, 2)

    def many_steps(z):
        for i in range(500):
            z = z + v(z, torch.full((1,), (i + 0.5) / 500)) / 500
        return z

    x = many_steps(z)
    nats, start = rectified_flow.log_prob(v, x, axes(x), 1e-6)
    near(nats, D.Normal(0, 1).log_prob(z).sum() - jacobian(many_steps, z).slogdet().logabsdet, 0.01)
    near(start, z, 0.01)


def test_rectified_flow_eq10_hutchinson():
    """The mean over all sixteen vectors of four signs, and that over the axes, are the trace of the Jacobian."""
    v, z = small_velocity(4), normal(3, 1, 2, 2)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4).view(16, 1, 1, 2, 2)
    want = [jacobian(lambda z: v(z, torch.full((1,), 0.3)), one[None]).trace() for one in z]
    for eps in signs.expand(16, *z.shape), axes(z):
        velocity, div = rectified_flow.divergence(v, z, 0.3, eps)
        near(velocity, v(z, torch.full((3,), 0.3)), 1e-7)
        near(div, want, 1e-6)


def test_rectified_flow_bits():
    """image_bits() is -log2 of the density times the width of a step of grey, for each of the D numbers of an image."""
    model = nn.Module()
    model.p = nn.Parameter(torch.zeros(1))
    model.forward = gaussian_velocity(0.0, 0.5)
    k = torch.randint(256, (40, 1, 4, 4), dtype=torch.uint8)
    bits = quiet(rectified_flow.image_bits, model, k, 1e-5, chunk=15)
    middle = (k + 0.5) / 128 - 1
    near(bits, -(D.Normal(0, 0.5).log_prob(middle) / math.log(2) - 7).flatten(1).mean(1), 0.02)
    near(rectified_flow.dequantise(torch.tensor([0, 255], dtype=torch.uint8)), [-1, 1], 1 / 128)


def test_rectified_flow_nll_command():
    """--nll N prints the mean bits/dim of the first N test images; a negative N is refused."""
    with workdir() as here:
        grey(here)
        words = "--data pics --size 8 --width 8 --iters 3 --batch 2 --samples 2 --out run --nll".split()
        status, out, err = call(rectified_flow, [*words, 2])
        test_images = rectified_flow.load_images("pics", 8, 1, test=True)
        bits = quiet(rectified_flow.image_bits, rectified_flow.load("run/model.pt"), test_images[:2])
        assert status == 0 and f"test: {bits.mean():.4f} +- {bits.std(correction=0) / 2**0.5:.4f} bits/dim" in out, err
        assert call(rectified_flow, [*words, -1])[0] == 1


# ---------------------------------------------------------------------------------------- checkpointing.py ------------
def mixed_layers():
    """Six layers of all kinds: dropout, batch norm, instance norm, a convolution, a layer without parameters."""
    return nn.ModuleList([
        nn.Linear(6, 12),
        nn.Sequential(nn.Unflatten(1, (3, 4)), nn.BatchNorm1d(3, momentum=None)),
        nn.Dropout(0.4),
        nn.Sequential(nn.Conv1d(3, 3, 3, padding=1), nn.InstanceNorm1d(3, affine=True, track_running_stats=True)),
        nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12)),
        nn.Linear(12, 5),
    ])  # fmt: skip


def step(run, dtype, needs_grad):
    """All that a training step leaves: output, gradients, running statistics, the next random number."""
    torch.manual_seed(0)
    layers = mixed_layers()
    x = torch.randn(7, 6, requires_grad=needs_grad)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        y = run(layers, x)
    y.float().square().sum().backward()
    return [y, x.grad, grads(layers), [*layers.buffers()], torch.rand(1)]


def grads(*modules):
    return [p.grad for module in modules for p in module.parameters()]


def test_checkpointing_eq1_eq2_every_schedule_gives_the_same_bits():
    """Schedules, in both forms, give the gradients, statistics and random numbers of the plain chain."""
    schedules = [[[0, [1]], 2], [3, 4], 5], checkpointing.binomial(6, 2)
    forms = checkpointing.checkpoint_reentrant, checkpointing.checkpoint
    for dtype, needs_grad in (None, True), (None, False), (torch.bfloat16, True):
        want = step(lambda layers, x: nn.Sequential(*layers)(x), dtype, needs_grad)
        for schedule, form in itertools.product(schedules, forms):
            run = lambda layers, x: checkpointing.run(layers, schedule, x, form)
            same(step(run, dtype, needs_grad), want)


def test_checkpointing_layer():
    """A layer is x + W_2 relu(W_1 x + b_1) + b_2."""
    layer, x = checkpointing.make_chain(5, 1)[0].double(), normal(4, 5)
    near(layer(x), x + layer.outer(F.relu(layer.inner(x))), 1e-12)


def test_checkpointing_eq3_4_5_6_7_bytes_and_runs():
    """Bytes stored and runs of a layer, counted while running and predicted, are those of the table."""
    x = torch.randn(2, 3)
    w = 2 * 3 * 4
    a = 2 * w
    for n in 1, 2, 3, 7, 16, 17, 40, 150:
        s = 1 + n % 3
        layers = checkpointing.make_chain(3, n)
        chain = checkpointing.measure_chain(layers, x)
        m = math.isqrt(n - 1) + 1
        last = math.ceil(n / m)
        depth = math.ceil(math.log2(n))
        ones = sum(i.bit_count() for i in range(n))
        table = [("none", n * a, n), ("every", (n - 1) * w + a, 2 * n - 1)]
        table.append(("sqrt", (m - 1) * w + last * a, 2 * n - last))
        table.append(("recursive", depth * w + a, n + ones))
        table.append(("binomial", min(s, n - 1) * w + a, n + checkpointing.extra_runs(n, s)))
        for name, *want in table:
            schedule = checkpointing.choose_schedule(layers, x, name, slots=s)
            found = checkpointing.count(layers, schedule, x)
            assert found == checkpointing.predict(schedule, chain) == tuple(want), (n, name)


def runs_of_equal_layers(schedule, n):
    return checkpointing.predict(schedule, checkpointing.Chain([1] * n, [1] * n, None))[1]


def test_checkpointing_eq6_eq7_binomial_is_optimal():
    """(7) solves (6), schedules have so many runs, and one slot for 1000 layers is no problem."""

    @functools.cache
    def t(n, s):
        if n == 1:
            return 0
        return min(k + t(n - k, s - 1) + t(k, s) for k in range(1, n)) if s else math.inf

    for n, s in itertools.product(range(1, 41), range(1, 8)):
        runs = runs_of_equal_layers(checkpointing.binomial(n, s), n)
        assert t(n, s) == checkpointing.extra_runs(n, s) == runs - n, (n, s)
    runs = [runs_of_equal_layers(checkpointing.binomial(1000, s), 1000) for s in (1, 10)]
    assert runs == [500_500, 4636]  # 4636: also by Revolve in the package checkpoint_schedules 1.0.4


def all_schedules(first, n):
    """All schedules of n layers whose last part is a number."""
    if n == 0:
        yield []
    for k in range(1, n + 1):
        for rest in all_schedules(first + k, n - k):
            if k == 1:
                yield [first, *rest]
            if rest:
                yield from ([inner, *rest] for inner in all_schedules(first, k))


def extra_seconds(schedule, u):
    """Seconds of the runs without recording; u: those of each layer."""
    lists = [part for part in schedule if not isinstance(part, int)]
    return sum(extra_seconds(part, u) + sum(u[i] for i in checkpointing.flatten(part)) for part in lists)


def test_checkpointing_eq6_eq8_fastest_of_all_schedules():
    """Among all schedules that fit the budget none is faster than (8), nor for equal layers in s slots than (7)."""
    rng = np.random.default_rng(0)
    schedules = [*all_schedules(0, 6)]
    chains = [checkpointing.Chain(rng.integers(1, 9, 6), rng.integers(8, 16, 6), rng.random(6)) for _ in range(6)]
    chains.append(checkpointing.Chain([1] * 6, [9] * 6, [1] * 6))
    for chain in chains:
        costs = [(checkpointing.predict(parts, chain)[0], extra_seconds(parts, chain.u)) for parts in schedules]
        for budget in range(10, 80, 5):
            fits = [seconds for peak, seconds in costs if peak <= budget]
            if not fits:
                raises("--budget", checkpointing.in_budget, chain, budget)
                continue
            best = checkpointing.in_budget(chain, budget)
            assert checkpointing.predict(best, chain)[0] <= budget
            near(extra_seconds(best, chain.u), min(fits), 1e-12)
    raises("--budget nan", checkpointing.in_budget, chain, math.nan)
    for s in range(1, 6):
        fewest = min(runs for peak, runs in costs if peak <= s + 9)
        assert fewest == checkpointing.extra_runs(6, s), s


def test_checkpointing_eq8_bytes_of_unequal_layers():
    """For layers of unequal widths bytes and runs are as predicted, whatever the schedule."""
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise((3, 9, 2, 7, 5, 3))]
    x = torch.randn(2, 3)
    chain = checkpointing.measure_chain(layers, x)
    for schedule in all_schedules(0, 5):
        assert checkpointing.count(layers, schedule, x) == checkpointing.predict(schedule, chain), schedule


def test_checkpointing_eq8_budget_holds_for_real_layers():
    """What is stored never exceeds the budget: 101 layers in blocks, and layers that store their outputs."""
    x = torch.randn(6, 4)
    storing = [nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()) for _ in range(12)]
    for layers in checkpointing.make_chain(4, 101), storing:
        chain = checkpointing.measure_chain(layers, x)
        for budget in np.linspace(0.4, 1, 3) * sum(chain.a):
            schedule = checkpointing.in_budget(chain, budget)
            found, _ = checkpointing.count(layers, schedule, x)
            peak, _ = checkpointing.predict(schedule, chain)
            assert found <= peak <= budget
    assert checkpointing.in_budget(chain, sum(chain.a)) == [*range(12)]
    equal = checkpointing.Chain([1] * 100, [1] * 100, [1.0] * 100)
    runs = [runs_of_equal_layers(checkpointing.in_budget(equal, s + 1), 100) for s in (5, 10)]
    assert runs == [352, 237]  # also by the mixed schedule in the package checkpoint_schedules 1.0.4


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 4))


class Situations:
    """What people do with a checkpointed call. c(f, ...) is checkpoint(f, ...) or f(...); each returns what it left."""

    def outputs_of_any_kind(c, x):  # a table, a view of it, an argument, none
        m, table = mlp(), torch.ones(3, 4)
        y, more = c(lambda x: (m(x), {"rest": [table, table[:3], x, None]}), x)
        a, b, same_x, _ = more["rest"]
        (y.sum() + (b * same_x).sum()).backward()
        return [x.grad, grads(m), a is table, same_x is x, table.requires_grad]

    def derivatives_inside_and_outside(c, x):
        m = mlp()

        def f(x):
            energy = m(x).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
            return energy * force.square().sum()

        (d_x,) = torch.autograd.grad(c(f, x), x, create_graph=True)
        d_x.square().sum().backward()
        return [d_x.detach(), x.grad, grads(m)[:-1]]

    def nested_calls(c, x):
        m = mlp()
        y = c(lambda x: c(m, c(lambda x: c(m, c(m, x)), x)), x).sum()
        y.backward(inputs=[m[0].weight], retain_graph=True)
        only = m[0].weight.grad.clone()
        y.backward()
        return [x.grad, grads(m), only]

    def arguments_to_fill(c, x):
        m, table, cache = mlp(), {}, types.SimpleNamespace(keys=[])

        def f(x, table, cache):
            table["k"] = m(x)
            cache.keys.append(table["k"])
            return sum(cache.keys).tanh()

        for _ in range(2):
            x = c(f, x, table, cache=cache)
        x.square().sum().backward(retain_graph=True)
        table["k"].sum().backward()
        return [[*table], len(cache.keys), grads(m)]

    def state_carried_on(c, x):
        cell, h = nn.GRUCell(4, 4), torch.zeros(3, 4)
        for _ in range(3):
            y, h = c(lambda x, h, size: (cell(x, h).view(size), cell(x, h).detach()), x, h, x.shape)
            y.sum().backward()
        return [x.grad, grads(cell), h, h.requires_grad]

    def hooks_of_shared_weights(c, x):
        w, calls = nn.Parameter(torch.ones(4)), []
        w.register_hook(lambda g: calls.append(1) or g.clamp(-1, 1))
        f = lambda x: (x * w).sin()
        c(f, c(f, x)).sum().backward()
        return [x.grad, w.grad, calls]

    def buffers(c, x):
        normed = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        m = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4, momentum=None), normed)
        c(lambda x: m(m(x).tanh()), x).square().sum().backward()
        return [x.grad, grads(m), [*m.buffers()]]

    def autocast(c, x):
        layer = nn.Linear(4, 4)
        with torch.autocast("cpu", torch.bfloat16):
            y = c(lambda x: layer(layer(x)), layer(c(layer, x)))
        with torch.autocast("cpu", torch.float16):
            y.float().sum().backward()
        return [x.grad, grads(layer)]


def test_checkpointing_eq2_checkpoint_is_the_plain_call():
    """Outputs, gradients, hooks, statistics and what f fills are those of the plain call, in many situations."""
    for name, situation in vars(Situations).items():
        if name.startswith("_"):
            continue
        left = []
        for c in (lambda f, *args, **kwargs: f(*args, **kwargs)), checkpointing.checkpoint:
            torch.manual_seed(0)
            left.append(situation(c, torch.randn(3, 4, requires_grad=True)))
        try:
            same(*left)
        except AssertionError as e:
            raise AssertionError(name) from e


def test_checkpointing_eq2_runs_of_f():
    """f runs once without gradients, twice with a backward pass, once more for another one."""
    runs, layer, x = [], nn.Linear(4, 4), torch.randn(3, 4)
    f = lambda x: runs.append(1) or layer(x)
    with torch.no_grad():
        assert not checkpointing.checkpoint(f, x).requires_grad
    y = checkpointing.checkpoint(f, x).sum()
    for want in 3, 4:
        y.backward(retain_graph=True)
        assert len(runs) == want


def test_checkpointing_refusals():
    """What differs between the two runs is refused in words, and errors of f come out as they are."""
    w, x, runs = nn.Parameter(torch.ones(4)), torch.randn(3, 4), []
    layer, scale = nn.Linear(4, 4), torch.ones(4)

    def again(f, x, changes=None):
        del runs[:]
        y = checkpointing.checkpoint(lambda x: runs.append(1) or f(x), x)
        if changes is not None:
            changes.detach().add_(1)
        y.sum().backward()

    refuses = functools.partial(raises, kind=RuntimeError)
    refuses("modified by an inplace", again, lambda x: x * w, scale, scale)
    refuses("parameter was changed in place", again, lambda x: layer(x).tanh(), x, layer.bias)
    refuses("nothing", again, lambda x: (x * w).sin() if len(runs) == 1 else x * w, x)
    refuses(r"Size\(\[2\]\)", again, lambda x: (x[: len(runs), 0] * w[0]).sin(), x)
    refuses("in place of", again, lambda x: x * w * scale.mul_(0.5), x)
    refuses("changed in place", again, lambda x: (x * w).tanh().add_(1), x)
    root = checkpointing.checkpoint_reentrant(torch.sin, w).sum()
    refuses("second derivatives", torch.autograd.grad, root, w, create_graph=True)
    raises("2", again, lambda x: {1: x * w}[len(runs)].sin(), x, kind=KeyError)
    assert not nn.modules.module._global_forward_pre_hooks
    raises("strategy 'slot'", checkpointing.choose_schedule, range(3), x, "slot")


def test_checkpointing_nested_calls_save_memory():
    """An inner checkpoint's input is not stored while the outer one waits."""
    layers, x = checkpointing.make_chain(8, 16), torch.randn(4, 8, requires_grad=True)
    tally = checkpointing.Tally(layers.parameters())
    with tally:
        y = checkpointing.run(layers, [[[i] for i in range(16)]], x, checkpointing.checkpoint)
        assert y.requires_grad and tally.now() == 4 * 8 * 4


def test_checkpointing_training():
    """Training gives the same weights under every strategy, and learns |x|."""
    with workdir() as here:
        kept = []
        for strategy in "none", "recursive", "binomial", "budget":
            model = quiet(checkpointing.train, 30, 16, 3e-3, 16, 8, strategy=strategy, slots=2, budget=0.01)
            kept.append([*model.parameters()])
            same(kept[-1], kept[0])
        quiet(checkpointing.train, 400, 32, 1e-2, 16, 4, path=here / "model.pt")
        layers, x = checkpointing.load(here / "model.pt"), torch.randn(500, 16)
    loss = F.mse_loss(nn.Sequential(*layers)(x), x.abs())
    assert loss < 0.02, loss  # 2 before training, 0.36 for the mean


ROW = r"^(\S[^|]*?) +\| +([\d.]+) \(([\d.]+)\) \| +(\d+) \( *(\d+)\) \| +([\d.]+) \| +([\d.]+)$"


def test_checkpointing_command():
    """What the command prints of a strategy is what the equations say."""
    words = "--width 64 --batch 50 --depth 30 --iters 3 --strategy binomial --slots 3 --out run".split()
    with workdir():
        status, out, err = call(checkpointing, words)
    assert status == 0, err
    none, binomial = re.findall(ROW, out, re.M)
    assert none[:5] == ("none", "0.768", "0.768", "30", "30")  # (3) with w = 12,800 bytes and a = 2 w
    assert binomial[:5] == ("binomial", "0.064", "0.064", "115", "115")  # 5 w, and (7) with r = 4
    near(float(binomial[6]), float(binomial[5]) / float(none[5]), 0.02, 0.1)


def test_checkpointing_command_compare():
    """--compare prints each strategy as predicted, "none" without a run if a GPU has no room, and draws the bytes."""
    words = "--width 64 --batch 50 --depth 30 --compare --budget 0.3 --out b".split()
    allocated = mock.Mock(side_effect=[math.inf, *[0] * 7])
    with workdir(), mock.patch.object(checkpointing, "allocated_by", allocated):
        status, out, err = call(checkpointing, words)
        assert status == 0 and os.listdir("b") == ["compare.png"], err
        picture = np.array(Image.open("b/compare.png").convert("RGB"))
    none = re.search(r"^none +\| +\(([\d.]+)\) \| +\( +30\) \| does not fit$", out, re.M)[1]
    rows = np.array(re.findall(ROW, out, re.M))
    assert rows[:, 0].tolist() == checkpointing.STRATEGIES[1:] and rows[0, 6] == "1.00"
    assert (rows[:, [1, 3]] == rows[:, [2, 4]]).all()
    bars = (picture[30::40] == (70, 130, 180)).all(2).sum(1)
    near(bars[1:6] / bars[0], rows[:, 1].astype(float) / float(none), 0.005)


def test_checkpointing_what_does_not_fit_is_predicted():
    """If a GPU has no memory for a strategy, its row says so, and the others are compared with the first that fits."""
    allocated = iter([math.inf, *[0] * 7])
    words = ["--width", 4, "--batch", 2, "--depth", 10, "--compare", "--out", "run"]
    with workdir(), mock.patch.object(checkpointing, "allocated_by", lambda job, device: next(allocated)):
        status, out, err = call(checkpointing, words)
    rows = [[cell.strip() for cell in line.split("|")] for line in out.splitlines()[1:]]
    assert status == 0 and rows[1] == ["none", "(0.001)", "(     10)", "does not fit"], err
    assert rows[2][0] == "every" and rows[2][4] == "1.00", out


def test_checkpointing_eq6_checkpoint_schedules():
    """The runs of a layer with few slots are those of the package checkpoint_schedules 1.0.4."""
    # sum(a.n1 - a.n0 for a in checkpoint_schedules.Revolve(n, s) if isinstance(a, checkpoint_schedules.Forward))
    for n, s, runs in (10, 3, 25), (30, 5, 92), (100, 10, 322), (1000, 10, 4636):
        assert n + checkpointing.extra_runs(n, s) == runs


# -------------------------------------------------------------------------------------------------- runner ------------
def run(names):
    """Runs tests one after another -> [(name, seconds, what became of it, what it printed)]."""
    results = []
    for name in names:
        start, said, result = time.perf_counter(), io.StringIO(), "passed"
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                globals()[name]()
            except unittest.SkipTest as e:
                result = f"skipped: {e}"
            except (Exception, SystemExit):
                traceback.print_exc()
                result = "failed"
        results.append((name, time.perf_counter() - start, result, said.getvalue() * (result == "failed")))
    return results


def main(words):
    """Runs the tests whose name contains one of the words, or all -> the exit status.

    The tests of one file stay together; as many files as there are cores, at most four, are tested side by side."""
    groups, counts = collections.defaultdict(list), collections.Counter()
    for name in [name for name, test in globals().items() if name.startswith("test_") and callable(test)]:
        if not words or any(word in name for word in words):
            file = next((file for file in NAMES if f"_{file}_" in f"{name}_"), "")
            groups[file or name].append(name)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(4, os.cpu_count() or 1), context) as pool:
        jobs = [pool.submit(run, names) for names in sorted(groups.values(), key=len, reverse=True)]
        for job in concurrent.futures.as_completed(jobs):
            for name, seconds, result, said in job.result():
                counts[result.split(":")[0]] += 1
                print(f"{said}{seconds:6.2f} s  {name} {result}", flush=True)
    skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
    print(f"{counts['passed']} passed, {counts['failed']} failed{skipped}")
    return int(counts["failed"] > 0 or not groups)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
