# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
# SPDX-License-Identifier: MIT
"""All tests: python test_all.py, or a part: python test_all.py ddpm repo_data. pytest runs them too.

test_repo_* hold for every file that lies here, each file in a test of its own; test_ddpm_* and so on hold for one file.
The method is tested against what does not share its code: closed forms, float64, oracle networks, Monte Carlo."""
import argparse, ast, base64, collections, concurrent.futures, contextlib, difflib, errno, functools, gzip, hashlib
import heapq, http.server, importlib, inspect, io, itertools, json, math, multiprocessing, os, re, shlex, subprocess
import sys, tempfile, threading, time, tokenize, traceback, types, unicodedata, unittest, warnings
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributions as D
import torch.utils.checkpoint
from PIL import Image, ImageDraw, ImageFont

nn, F = torch.nn, torch.nn.functional
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
torch.set_num_threads(1)  # faster for networks as small as these

NAMES = "gan vae nice realnvp pixelcnn cpc bpe word2vec rnn ddpm ddim rectified_flow checkpointing".split()
SOURCES = {path.stem: path.read_text("utf-8") for path in sorted(HERE.glob("*.py")) if path.stem != "test_all"}
MODULES = {name: importlib.import_module(name) for name in SOURCES if name in NAMES}
ddpm, ddim, flow, nice = (MODULES[name] for name in ("ddpm", "ddim", "rectified_flow", "nice"))

# ------------------------------------------------------------------------------------------------------- helpers -----
def each(applies=lambda module: True):
    """Makes a test of one module into a test for every file that it applies to: test_x_ddpm, test_x_ddim, ..."""
    def spread(test):
        def bind(name, module):
            def one():
                test(module)
            one.__name__ = one.__qualname__ = f"{test.__name__}_{name}"
            one.__doc__ = test.__doc__
            return one
        for name in filter(lambda name: applies(MODULES[name]), MODULES):
            globals()[f"{test.__name__}_{name}"] = bind(name, MODULES[name])
    return spread

def has_images(module):
    return hasattr(module, "load_images")

def has_samples(module):
    return hasattr(module, "save_samples")  # cpc.py makes no images

def has_checkpoint(module):
    return hasattr(module, "load_checkpoint")

def has_iters(module):
    return has_checkpoint(module) and "--iters" in options(module)  # word2vec.py counts epochs

def near(got, want, atol=0.0, rtol=0.0):
    """Both as float64, and equal to within atol + rtol |want|, every element."""
    got, want = (torch.as_tensor(v, dtype=torch.float64) for v in (got, want))
    torch.testing.assert_close(got, want.expand_as(got), atol=atol, rtol=rtol)

@contextlib.contextmanager
def workdir():
    """An empty folder that is the working directory, and is gone afterwards."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as here:
        os.chdir(here)
        try:
            yield Path(here).resolve()
        finally:
            os.chdir(before)

def snapshot(folder):
    """{relative path: bytes} of all that is there, None for a folder or what may not be read."""
    read = lambda path: path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else None
    return {path.relative_to(folder).as_posix(): read(path) for path in folder.rglob("*")}

def call(module, words):
    """module.main(words) as a shell would run it -> exit status, stdout, stderr."""
    status, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            module.main([str(word) for word in words])
        except SystemExit as e:
            status = e.code or 0
        except (Exception, KeyboardInterrupt):
            status = 1
            traceback.print_exc()
    return status, out.getvalue(), err.getvalue()

def quiet(function, *args, **kwargs):
    """What the function returns; what it prints goes nowhere."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args, **kwargs)

class Parsed(Exception):
    """Carries a parser out of main, together with what it made of the words."""

def parse(module, words):
    """What main's parser makes of the words, and the parser; main goes no further."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        raise Parsed(real(self, args, namespace), self)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args):
        try:
            module.main(list(words))
        except Parsed as e:
            return e.args
    raise AssertionError(f"{module.__name__}.main does not parse its arguments")

@functools.cache
def options(module):
    """{"--name": its action} of the file's command line, --help left out."""
    return {a.option_strings[-1]: a for a in parse(module, [])[1]._actions if a.dest != "help"}

TINY = {"--size": 8, "--width": 8, "--iters": 2, "--batch": 2, "--samples": 2, "--bound": 2, "--inpaint": 2,
        "--depth": 5, "--out": "run"}

def command(module, **flags):
    """The words of a run that takes seconds, from TINY and flags as far as the file knows them."""
    epochs = {"--epochs": 1, "--batch": 1024, "--dim": 8} if "--epochs" in options(module) else {}
    flags = {**TINY, **epochs, **{"--" + name: value for name, value in flags.items()}}
    return [word for name, value in flags.items() if name in options(module) for word in (name, str(value))]

def paint(folder, n=4, size=(9, 7), mode="RGB", seed=0):
    """n random pictures: folder/0.png, folder/1.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")

def inputs(here):
    """Small inputs for any of the files in here -> the flags that name them."""
    paint(here / "pics")
    (here / "words.txt").write_text("the cat sat on the mat and the dog ate the hat. " * 50, "utf-8")
    return {"data": "pics", "channels": 3, "text": "words.txt"}

@functools.cache
def finished(module):
    """A run that nobody stopped -> its words, its stdout, and all files that it left."""
    with workdir() as here:
        words = command(module, **inputs(here), iters=130)
        status, out, err = call(module, words)
        assert (status, err) == (0, ""), err
        return words, out, snapshot(here)

def unpack(files, here):
    """A snapshot back on the disk."""
    for name, raw in files.items():
        if raw is not None:
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            (here / name).write_bytes(raw)

def changed(before, after):
    """Names of the files that are not the same in two snapshots."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name, 0) != after.get(name, 0))

@contextlib.contextmanager
def full_disk(limit):
    """No file can grow past limit bytes."""
    try:
        import resource
    except ImportError:
        raise unittest.SkipTest("no limits on this system") from None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # Python ignores the signal, so a write raises OSError
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

@contextlib.contextmanager
def stopped_at(module, iteration, total):
    """Ctrl-C after an iteration of the training that has `total` of them."""
    class Stop(module.Progress):
        def __call__(self, done, each, note=""):
            super().__call__(done, each, note)
            if (done, self.total) == (iteration, total):
                raise KeyboardInterrupt

    with mock.patch.object(module, "Progress", Stop):
        yield

@contextlib.contextmanager
def killed_after(name, times=1):
    """Ctrl-C as soon as a file of this name has been put in its place so many times."""
    real, left = Path.replace, iter(range(1, times))

    def replace(source, target):
        real(source, target)
        if Path(target).name == name and next(left, None) is None:
            raise KeyboardInterrupt

    with mock.patch.object(Path, "replace", replace):  # os.replace is bound early in Python 3.10
        yield

def hurried(module):
    """A clock that runs 100 s between any two looks at it, so that whatever waits for time to pass happens."""
    tick = itertools.count(0.0, 100.0).__next__
    return mock.patch.object(module, "time", types.SimpleNamespace(time=tick, perf_counter=tick))

def idx(array):
    """The bytes of an IDX file that holds a uint8 array."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()

# ------------------------------------------------------------------------------------------------ the repository -----
def test_repo_only_the_agreed_files():
    """Thirteen files and this one are all the Python at the top level, none of it a helper of another."""
    assert SOURCES.keys() <= set(NAMES), SOURCES.keys() - set(NAMES)

@each()
def test_repo_imports(module):
    """A file needs the standard library, torch, numpy and Pillow, and no sibling."""
    imported = set()
    for node in ast.walk(ast.parse(SOURCES[module.__name__])):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            imported.add(node.module.split(".")[0])
    strange = (imported - set(sys.stdlib_module_names) | imported & {*NAMES, "test_all"}) - {"torch", "numpy", "PIL"}
    assert not strange, strange

ALONE = """
import os, random, sys, warnings, numpy, torch, PIL.ImageDraw, PIL.ImageFont, PIL.ImageOps
name, *words = sys.argv[1:]
state = lambda: (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist(), os.listdir())
before, sys.argv = state(), ["x", "--no-such-flag"]
with warnings.catch_warnings():
    warnings.simplefilter("error")
    module = __import__(name)
assert state() == before, "importing drew random numbers or wrote files"
print("imported", flush=True)
import runpy
sys.argv = [name + ".py", *words]
runpy.run_path(name + ".py", run_name="__main__")
"""

@each()
def test_repo_alone(module):
    """In an empty folder a file imports without a word or a trace, and as a script leaves the documented run folder."""
    with workdir() as here:
        (here / f"{module.__name__}.py").write_text(SOURCES[module.__name__], "utf-8")
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        env.pop("PYTHONPATH", None)
        child = subprocess.run([sys.executable, "-B", "-c", ALONE, module.__name__, *command(module)],
                               env=env, capture_output=True, text=True)
        assert child.returncode == 0 and not child.stderr, child.stderr
        assert child.stdout.startswith("imported\n"), child.stdout  # the first that was said
        assert str(Path("run")) in child.stdout.splitlines()[-1], "the last line does not say where the files are"
        assert set(os.listdir()) == {f"{module.__name__}.py", "run"}
        assert not list(here.rglob("*.part"))
        if has_images(module):
            check_run_folder(module, here / "run", (2, 8, 8))

def check_run_folder(module, out, shape):
    """The four files of an image model's run folder are what DESIGN.md says; two, if it makes no images."""
    head, *rows = (out / "log.csv").read_text().splitlines()
    assert head.startswith("iteration,") and all(float(v) == float(v) for row in rows for v in row.split(",")) and rows
    assert "method" in torch.load(out / "model.pt", weights_only=True)
    if has_samples(module):
        samples = np.load(out / "samples.npy")
        assert samples.dtype == np.uint8 and samples.shape == shape, (samples.dtype, samples.shape)
        with Image.open(out / "samples.png") as grid:
            assert grid.format == "PNG" and grid.mode == ("RGB" if len(shape) == 4 else "L")

@each(has_images)
def test_repo_colour_run(module):
    """A folder of colour pictures trains and gives colour samples, and load() a model that is ready to sample."""
    _, out, files = finished(module)
    with workdir() as here:
        unpack(files, here)
        check_run_folder(module, here / "run", (2, 8, 8, 3))
        model = module.load(here / "run" / "model.pt")
        assert model.shape == (3, 8, 8) and not model.training
        assert not any(p.requires_grad for p in model.parameters())

def definitions(source):
    """{name: its source with decorators and comments} of all that stands at the top level, also inside if or try."""
    lines, found = source.splitlines(), collections.defaultdict(str)

    def visit(body):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names = [node.name]
            elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
            else:
                names = []
                for part in ("body", "orelse", "finalbody"):
                    visit(getattr(node, part, []))
                for handler in getattr(node, "handlers", []):
                    visit(handler.body)
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            for name in names:
                found[name] += "\n".join(lines[first - 1 : node.end_lineno]) + "\n"

    visit(ast.parse(source).body)
    return found

def drift(sources, exempt=("train", "sample", "load", "main", "log_prob", "encode")):
    """The unified diffs of all names that two or more files define, and not alike."""
    diffs, first = [], {}
    for file, source in sources.items():
        for name, text in definitions(source).items():
            other, wanted = first.setdefault(name, (file, text))
            if text != wanted and name not in exempt:
                diff = difflib.unified_diff(wanted.splitlines(True), text.splitlines(True), f"{other}.py", f"{file}.py")
                diffs.append(f"{name} has drifted:\n" + "".join(diff))
    return diffs

def test_repo_drift():
    """A name that several files define is the same to the letter in all of them."""
    diffs = drift(SOURCES)
    assert not diffs, "\n\n".join(diffs)

def test_repo_drift_is_found():
    """The detector sees a change in a letter, comment, decorator, default or constant, at the top or below an if."""
    same = "A = 1\n\n@wrap\ndef f(x, n=2):\n    # why\n    return x\n\nif A:\n    B, C = 2, 3\n"
    assert not drift({"a": same, "b": "import os\n" + same + "D = 4  # only here\n"})
    assert not drift({"a": "def main(): 1", "b": "def main(): 2"})
    for old, new in [("A = 1", "A = 2"), ("A = 1", "A = 1  # one"), ("@wrap\n", ""), ("n=2", "n=3"), ("# why", "# how"),
                     ("return x", "return  x"), ("2, 3", "2, 4"), ("@wrap", "@other"), ("A = 1", "A: int = 1")]:
        found = drift({"a": same, "b": same.replace(old, new)})
        assert found and all(line in found[0] for line in ("--- a.py", "+++ b.py")), (old, new)

@each()
def test_repo_equations(module):
    """The docstring numbers its equations 1 .. n in at most 60 lines; each is tagged in the code, and nothing else."""
    source = SOURCES[module.__name__]
    stated = [int(k) for k in re.findall(r"^\s*\((\d+)\)", module.__doc__, re.M)]
    comments = [t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    tagged = {int(k) for comment in comments for k in re.findall(r"\((\d+)\)", comment)}
    assert stated and stated == list(range(1, len(stated) + 1)), f"the docstring numbers {stated}"
    assert tagged == set(stated), f"no tag: {set(stated) - tagged}; no such equation: {tagged - set(stated)}"
    assert len(ast.get_docstring(ast.parse(source), clean=False).splitlines()) <= 60
    assert source.startswith("# /// script\n# requires-python") and "# SPDX-License-Identifier: MIT" in source[:300]

@each()
def test_repo_flags(module):
    """Every flag is read as args.NAME, and every parameter of a function in that function: none is only for show."""
    tree = ast.parse(SOURCES[module.__name__])
    read = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "args"}
    unread = {action.dest for action in options(module).values()} - read
    assert not unread, f"never read: {unread}"
    for f in ast.walk(tree):
        if isinstance(f, ast.FunctionDef):
            names = {n.id for n in ast.walk(f) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
            unread = {a.arg for a in f.args.posonlyargs + f.args.args + f.args.kwonlyargs} - names - {"self", "cls"}
            assert not unread, f"{f.name} never reads {unread}"
    if has_images(module):
        wanted = "--data --size --channels --iters --batch --lr --samples --out --device --seed --fresh --compile"
        assert set(wanted.split()) <= options(module).keys()
        args = parse(module, [])[0]
        assert (args.data, args.size, args.channels, args.device) == ("digits", 28, 1, "auto")
        assert args.out == Path("out", module.__name__) and not args.compile and not args.fresh

@each()
def test_repo_help(module):
    """--help says what each flag is for, and the default of each that takes a value."""
    status, text, err = call(module, ["--help"])
    blocks = {block.split()[0]: " ".join(block.split()) for block in re.split(r"\n  (?=-)", text)[1:]}
    assert status == 0 and not err and options(module).keys() <= blocks.keys(), text
    for name, action in options(module).items():
        assert action.help, f"{name} says nothing"
        assert action.nargs == 0 or f"(default: {action.default})" in blocks[name], blocks[name]

def commands(text):
    """(file, words) of every python or torchrun command in the code of a Markdown text or of a docstring."""
    start = r"\b(?:python3?|torchrun --nproc-per-node \d+) +"
    for file, words in re.findall(start + r"(\w+\.py)((?: ?[^\s`&|;>]+)*)", re.sub(r" *\\\n *", " ", text)):
        yield file, shlex.split(words, comments=True)

def test_repo_readme():
    """Every command of the README and of the docstrings parses, and every file that the README names exists."""
    readme = (HERE / "README.md").read_text("utf-8")
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", readme, re.S))
    found = list(commands(code))
    assert ("ddim.py", ["--steps", "50"]) in found and ("test_all.py", []) in found, "the two commands are not there"
    for file, words in found + [c for module in MODULES.values() for c in commands(module.__doc__)]:
        assert (HERE / file).exists(), f"no {file}"
        if file == "test_all.py":
            assert all(any(word in name for name in globals()) for word in words), f"no test is called {words}"
        else:
            with contextlib.redirect_stderr(io.StringIO()) as err:
                try:
                    parse(MODULES[Path(file).stem], words)
                except SystemExit:
                    raise AssertionError(f"python {file} {shlex.join(words)}: {err.getvalue()}") from None
    links = re.findall(r"\]\(([^)#\s]+)|(?:src|href)=\"([^\"#]+)\"", readme)
    for link in (a or b for a, b in links):
        assert re.match(r"\w+:", link) or (HERE / link).exists(), f"the README links to {link}, which is not there"

def test_repo_readme_in_chinese():
    """Both READMEs show the same commands, code, numbers and links, in the same order but for the numbers of a line."""
    english, chinese = ((HERE / name).read_text("utf-8") for name in ("README.md", "README.zh-CN.md"))
    assert list(commands(english)) == list(commands(chinese)) and len(list(commands(english))) > 40
    code = lambda text: [re.sub(r" *#.*", "", block) for block in re.findall(r"```.*?```", text, re.S)]
    assert code(english) == code(chinese)
    for pattern in r"\d+(?:[.,]\d+)*|\.\d+", r"\]\(([^)\s]+)":
        here, there = (collections.Counter(re.findall(pattern, text)) for text in (english, chinese))
        there.subtract(["README.md"] if "README.md" in there else [])
        here.subtract(["README.zh-CN.md"] if "README.zh-CN.md" in here else [])
        assert not (here - there or there - here), (here - there, there - here)

@each(has_iters)
def test_repo_stop_and_resume(module):
    """Stopped between two saves, the same command ends with the very bytes of a run that was never stopped."""
    words, _, files = finished(module)
    with workdir() as here:
        inputs(here)
        with stopped_at(module, 115, 130), hurried(module):
            status, _, err = call(module, words)
        assert status == 130 and len(err.split("\n")) <= 3 and "Traceback" not in err, err
        assert torch.load(here / "run/model.pt", weights_only=True)["done"] == 100  # so that 15 iterations come again
        status, out, err = call(module, words)
        assert status == 0, err
        differ = changed(files, snapshot(here))
        same(*(torch.load(io.BytesIO(run["run/model.pt"]), weights_only=True) for run in (files, snapshot(here))))
        assert differ in ([], ["run/model.pt"]), differ  # a pickle of equal tensors may lay them out in another order

def test_repo_killed_while_it_saves():
    """Killed between the log and the checkpoint of the last save, the same command ends as if it had not been."""
    words, _, files = finished(ddim)
    for name in "log.csv", "model.pt":
        with workdir() as here:
            inputs(here)
            with killed_after(name, 2), hurried(ddim):  # the saves are after 100 and 130 iterations
                assert call(ddim, words)[0] == 130
            assert call(ddim, words)[0] == 0
            assert changed(files, snapshot(here)) in ([], ["run/model.pt"])

def same(a, b, where=""):
    """Equal to the last bit, through dicts, lists and tensors."""
    assert type(a) is type(b), (where, type(a), type(b))
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f"{where} differs"
    elif isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b) and (not isinstance(a, dict) or a.keys() == b.keys()), where
        for key in a if isinstance(a, dict) else range(len(a)):
            same(a[key], b[key], f"{where}/{key}")
    else:
        assert a == b, f"{where}: {a}, {b}"

@each()
def test_repo_run_again(module):
    """A finished command trains nothing when it is given again, and leaves the same bytes."""
    words, _, files = finished(module)
    with workdir() as here, mock.patch.object(torch.Tensor, "backward", side_effect=AssertionError("it trains")):
        unpack(files, here)
        status, _, err = call(module, words)
        assert status == 0, err
        assert not (differ := changed(files, snapshot(here))), differ

@each(has_iters)
def test_repo_fresh(module):
    """--fresh forgets the checkpoint, even a broken one, but leaves it there until there is something to save."""
    with workdir() as here:
        words = [*command(module, **inputs(here)), "--fresh"]
        unpack({"run/model.pt": b"broken"}, here)
        with stopped_at(module, 1, 2):
            assert call(module, words)[0] == 130
        assert (here / "run/model.pt").read_bytes() == b"broken"

@each()
def test_repo_write_is_atomic(module):
    """write() on a full disk, or killed just before the rename, leaves the old file and no other."""
    with workdir() as here:
        path = here / "sub" / "file"
        module.write({path: b"old"})
        with full_disk(1000):
            try:
                module.write({path.with_name("small"): b"new", path: bytes(2000)})
            except OSError as e:
                assert e.errno == errno.EFBIG
            else:
                raise AssertionError("the disk was full")
        assert snapshot(path.parent) == {"file": b"old"}

        def rename(source, target):
            assert (Path(source).read_bytes(), Path(target).read_bytes()) == (bytes(2000), b"old")
            raise KeyboardInterrupt

        with mock.patch.object(Path, "replace", rename), contextlib.suppress(KeyboardInterrupt):
            module.write({path: bytes(2000)})
        assert snapshot(path.parent) == {"file": b"old"}
        module.write({path: bytes(2000), path.with_name("other"): b"too"})
        assert snapshot(path.parent) == {"file": bytes(2000), "other": b"too"}

def refused(module, words, say, here):
    """None if main refuses the words as it should, saying `say` and touching nothing in here; else what went wrong."""
    before = snapshot(here)
    status, out, err = call(module, words)
    if status != 2 or err.count("\n") != 1 or "Traceback" in err or not re.search(say, err):
        return f"{shlex.join(map(str, words))}: status {status}, wanted 2 and {say!r}; stderr:\n{err}"
    if differ := changed(before, snapshot(here)):
        return f"{shlex.join(map(str, words))}: wrote {differ}"

@each()
def test_repo_bad_values(module):
    """What no run can use is refused in one line before anything is written, and so is an unknown flag."""
    bad = [("--iters", "0", "--iters"), ("--samples", "0", "--samples"), ("--batch", "0", "--batch"),
           ("--batch", "many", "--batch"), ("--lr", "fast", "--lr"), ("--device", "nonsense", "nonsense"),
           ("--device", "cuda" if not torch.cuda.is_available() else "cuda:99", "cuda"), ("--size", "0", "--size"),
           ("--channels", "2", "--channels"), ("--width", "0", "--width"), ("--bound", "-1", "--bound"),
           ("--seed", "x", "--seed")]
    bad += [("--size", "30", "size 30"), ("--width", "12", "width 12")] if hasattr(module, "UNet") else []
    with workdir() as here:
        flags = inputs(here)
        wrong = [refused(module, [*command(module, **flags), name, value], say, here)
                 for name, value, say in bad if name in options(module)]
        wrong += [refused(module, [*command(module, **flags), *words], words[0], here)
                  for words in (["--no-such-flag"], ["--dat", "pics"], ["--fres"], ["more"])]  # nothing is abbreviated
    assert not any(wrong), "\n".join(filter(None, wrong))

@each(has_images)
def test_repo_bad_data(module):
    """Data that cannot be read is refused in one line that names it, and load_images says the same."""
    x, name = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8), "train-images-idx3-ubyte"
    huge = bytes([0, 0, 8, 3]) + b"\x7f\xff\xff\xff" * 3 + bytes(50)
    picture = io.BytesIO()
    Image.fromarray(x[0].repeat(9, 0).repeat(9, 1)).save(picture, "PNG")
    bad = {"no file that counts": ({"a.txt": b"x"}, "neither"), "empty": ({}, "neither"),
           "gzip cut short": ({name + ".gz": gzip.compress(idx(x))[:-20]}, name),
           "gzip damaged": ({name + ".gz": gzip.compress(bytes(999))[:10] + bytes(99)}, name),
           "wrong magic": ({name: b"\0\0\x0d" + idx(x)[3:]}, name), "no bytes": ({name: b""}, name),
           "only a magic": ({name: b"\0\0\x08\x03"}, name), "cut short": ({name: idx(x)[:-1]}, name),
           "too long": ({name: idx(x) + b"x"}, name), "huge": ({name: huge}, name),
           "99 dimensions": ({name: bytes([0, 0, 8, 99]) + b"\0\0\0\1" * 99 + b"x"}, name),
           "empty array": ({name: idx(x[:0])}, name), "labels": ({name: idx(x[:, 0, 0])}, name),
           "no training part": ({"t10k-images-idx3-ubyte": idx(x)}, name),
           "text called .png": ({"sub/a.png": b"hello"}, "a.png"), "empty .jpg": ({"a.jpg": b""}, "a.jpg"),
           "half a .png": ({"a.png": picture.getvalue()[:-30]}, "a.png"),
           "one bad, one good": ({"a.png": b"", "b.png": picture.getvalue()}, "a.png")}
    wrong = [refused_data(module, files, say) for files, say in bad.values()]
    assert not any(wrong), "\n".join(f"{kind}: {w}" for kind, w in zip(bad, wrong) if w)
    with workdir() as here:
        (here / "a.txt").write_text("a file, no folder")
        wrong = [refused(module, [*command(module), "--data", data], "no such folder", here) for data in ("", "a.txt")]
        assert not any(wrong), wrong
        exif = b"Exif\0\0MM\0*\0\0\0\x08\0\2\1\x12\0\3\0\0\0\1\0\6\0\0\1\x1a\0\1\0\0\0\1\x48\0\0\0\0\0\0\0"
        Image.fromarray(x[0]).save("a.png", exif=exif)  # to be turned, and its resolution is of a wrong type
        with contextlib.suppress(ValueError):
            module.read_picture(here / "a.png", 8, 1)
        Image.fromarray(x[0]).save("a.png")
        with warnings.catch_warnings(), mock.patch.object(Image, "MAX_IMAGE_PIXELS", 50):  # Pillow warns of this one
            warnings.simplefilter("error")
            assert module.read_picture(here / "a.png", 8, 3).shape == (3, 8, 8)
        unpack({"secret/a.png": picture.getvalue()}, here)
        (here / "secret" / "a.png").chmod(0)
        unreadable = not os.access(here / "secret" / "a.png", os.R_OK)  # root may read everything
        wrong = [refused(module, command(module, data="secret"), "a.png", here)] if unreadable else []
        for data in "nowhere/at all", "no\nsuch folder":
            say = " ".join(data.split()) + ".*no such"
            wrong += [refused(module, command(module, data=data), say, here)]
        with mock.patch.object(module.download_mnist, "__defaults__", (("http://127.0.0.1:9/",),)):  # a closed port
            wrong += [refused(module, command(module, data="mnist"), "127.0.0.1:9.*--data digits", here)]
    assert not any(wrong), "\n".join(filter(None, wrong))

def refused_data(module, files, say):
    """As refused(), for a folder of these files; load_images has to raise as well."""
    with workdir() as here:
        (here / "data set").mkdir()
        unpack({f"data set/{file}": raw for file, raw in files.items()}, here)
        wrong = refused(module, command(module, data="data set"), say, here)
        try:
            module.load_images("data set", 8)
            return wrong or "load_images took it"
        except (ValueError, OSError) as e:
            return wrong or (None if re.search(say, str(e)) else f"load_images says {e}")

@each(has_checkpoint)
def test_repo_bad_checkpoint(module):
    """A checkpoint that is none, or of other data, another file, network or setting, is refused and stays as it is."""
    words, _, files = finished(module)
    good = files["run/model.pt"]

    def edited(**new):
        file = io.BytesIO()
        torch.save({**torch.load(io.BytesIO(good), weights_only=True), **new}, file)
        return file.getvalue()

    parts = torch.load(io.BytesIO(good), weights_only=True)["parts"]
    renamed = [{"old_" + key: value for key, value in part.items()} for part in parts]  # as a changed network has them
    with zipfile.ZipFile(io.BytesIO(good)) as file:
        largest = file.read(max(file.infolist(), key=lambda record: record.file_size))
    broken = {"of one bit less": good.replace(largest, bytes([largest[0] ^ 1]) + largest[1:]),
              "of wrong types": edited(settings=[1]), "without settings": edited(settings={}),
              "without parts": edited(parts=[None] * len(parts)),
              "empty": b"", "garbage": b"garbage" * 99, "cut short": good[:-100], "cut shorter": good[:999],
              "another file's": edited(method="other"), "another network's": edited(parts=renamed)}
    other = [("--width", 16, "width 8, not 16"), ("--iters", 131, "iters 130, not 131"), ("--seed", 7, "seed 0, not 7"),
             ("--batch", 3, "batch [0-9]+, not 3"), ("--lr", 0.5, "lr .*, not 0.5"), ("--size", 12, "size 8, not 12"),
             ("--channels", 1, "channels 3, not 1"), ("--data", "others", "made with")]
    with workdir() as here:
        unpack(files, here)
        paint(here / "others", seed=1)
        wrong = [refused(module, [*words, name, value], f"{say}.*--fresh", here)
                 for name, value, say in other if name in options(module)]
        for kind, raw in broken.items():
            (here / "run/model.pt").write_bytes(raw)
            wrong += [refused(module, words, "other.py" if "file" in kind else "model.pt", here)]
            try:
                module.load(here / "run/model.pt")
                wrong += [f"load took a checkpoint that is {kind}"]
            except ValueError as e:
                wrong += [None if "model.pt" in str(e) else f"load of one that is {kind} says {e}"]
            except Exception as e:
                wrong += [f"load of one that is {kind} raises {type(e).__name__}"]
        (here / "run/model.pt").unlink()
        (here / "run/model.pt").mkdir()  # cannot be opened, not even by root
        wrong += [refused(module, words, "model.pt", here)]
    assert not any(wrong), "\n".join(filter(None, wrong))

@each()
def test_repo_loss_not_finite(module):
    """A loss that is not finite ends training with its iteration and a hint, and the last good checkpoint stays."""
    words, _, files = finished(module)
    if "--lr" in options(module):
        with workdir() as here:
            unpack(files, here)
            flags = ["--lr", "1e30" if has_images(module) else "1e42", "--fresh"]
            flags += ["--iters", 3] if "--iters" in options(module) else []
            wrong = refused(module, [*words, *flags], "iteration.*--lr", here)
        assert not wrong, wrong

@each()
def test_repo_narrow_stdout(module):
    """A letter that the encoding of stdout lacks, in a path say, does not end a run."""
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    with contextlib.redirect_stdout(out), module.Parser().guard():
        print("\xe9\udcff", flush=True)
    assert out.buffer.getvalue().split() == [rb"\xe9\udcff"]

@each()
def test_repo_full_disk(module):
    """A disk that fills while training saves is said in one line, and the old run folder stays whole."""
    words, _, files = finished(module)
    with workdir() as here:
        unpack(files, here)
        with full_disk(4000):
            less = ["--iters", 2] if "--iters" in options(module) else []
            wrong = refused(module, [*words, *less, "--fresh"], "too large|space", here)
    assert not wrong, wrong

class Mirror(http.server.BaseHTTPRequestHandler):
    """/good/ has the files, /short/ breaks off, /wrong/ has other bytes, anything else has nothing."""
    def do_GET(self):
        _, kind, name = self.path.split("/")
        self.server.asked.append(self.path[1:])
        body = {"good": self.server.files[name], "short": self.server.files[name], "wrong": b"not it"}.get(kind)
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body or b"") + 10 * (kind == "short")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_):
        """Says nothing."""

@each(has_images)
def test_repo_download(module):
    """The download goes past dead, short, wrong and empty mirrors, keeps only what is right, and asks but once."""
    names = list(module.MNIST_SHA256)
    files = {name: name.encode() * 50 for name in names}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.files, server.asked, at = files, [], f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    dead, right = "http://127.0.0.1:9/", {name: hashlib.sha256(raw).hexdigest() for name, raw in files.items()}
    try:
        with mock.patch.dict(module.MNIST_SHA256, right):
            for first in (dead, at + "short/", at + "wrong/", at + "none/"):
                with workdir() as here:
                    module.download_mnist(here / "new" / "mnist", (first, at + "good/"))
                    assert snapshot(here / "new" / "mnist") == files, first
                    del server.asked[:]
                    module.download_mnist(here / "new" / "mnist", (at + "good/",))
                    assert not server.asked, "it asked for what was there"
            with workdir() as here:
                module.write({here / "mnist" / names[0]: b"here already"})  # only what is missing is asked for
                module.download_mnist(here / "mnist", (at + "good/",))
                assert server.asked == ["good/" + name for name in names[1:]]
            with workdir() as here:
                try:
                    module.download_mnist(here / "mnist", (dead, at + "short/", at + "wrong/", at + "none/"))
                    raise AssertionError("no mirror was right, and it did not mind")
                except OSError as e:
                    for why in (names[0], dead + ": .*refused", "short/: Incomplete", "wrong/: .*SHA", "none/: .*404"):
                        assert re.search(why, str(e)), (why, e)
                assert not snapshot(here), "something is left of a failed download"
    finally:
        server.shutdown()
        server.server_close()

@each(has_images)
def test_repo_data_idx(module):
    """IDX files, gzipped or not, come back as they went in, are scaled to --size, and fill all channels with grey."""
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (n, 8, 8), dtype=np.uint8) for n in (5, 3))
    with workdir() as here:
        unpack({"idx/train-images-idx3-ubyte.gz": gzip.compress(idx(train)), "idx/t10k-images-idx3-ubyte": idx(test),
                "idx/train-labels-idx1-ubyte": idx(train[:, 0, 0])}, here)
        for want, got in (train, module.load_images("idx", 8)), (test, module.load_images("idx", 8, test=True)):
            assert got.dtype == torch.uint8 and np.array_equal(got[:, 0], want) and got.shape[1:] == (1, 8, 8)
        colour = module.load_images("idx", 8, 3)
        assert colour.shape == (5, 3, 8, 8) and all(np.array_equal(colour[:, c], train) for c in range(3))
        large, small = module.load_images("idx", 12), module.load_images("idx", 4)
        assert large.shape == (5, 1, 12, 12) and small.shape == (5, 1, 4, 4)
        near(small.double().mean((1, 2, 3)), train.mean((1, 2)), 2)  # the mean of 64 bytes, but for the edges' weight
        for shape in ((7,), (2, 3), (2, 3, 4)):
            array = rng.integers(0, 256, shape, dtype=np.uint8)
            unpack({"a": idx(array), "b": gzip.compress(idx(array))}, here)
            assert all(np.array_equal(module.read_idx(here / file), array) for file in "ab")

@each(has_images)
def test_repo_data_pictures(module):
    """Pictures of any shape, mode and subfolder are read, each tenth kept for the test, none in both; one is enough."""
    with workdir() as here:
        for i in range(25):  # picture i is i + 100 all over
            file = here / f"pics/{'abc'[i // 9]}/deep/{i:02}{('.png', '.PNG')[i % 2]}"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.new("L", (8 + i % 3 * 5, 8 + i % 2 * 9), i + 100)
            picture.convert(("L", "RGB", "RGBA", "P", "LA")[i % 5]).save(file)
        (here / "pics" / "a" / "notes.txt").write_text("not a picture")
        for channels in (1, 3):
            train, test = (module.load_images("pics", 8, channels, test=test) for test in (False, True))
            assert train.dtype == torch.uint8 and train.shape[1:] == test.shape[1:] == (channels, 8, 8)
            assert test[:, 0, 0, 0].tolist() == [109, 119] and len(train) == 23
            assert sorted(v for x in (*train, *test) for v in set(x.flatten().tolist())) == list(range(100, 125))
        side = np.zeros((4, 8, 3), np.uint8)
        side[:, 2:6] = 10, 20, 30  # the middle square, red green blue; what lies beside it is cut off
        side[0, 2:6] = 90, 80, 70  # its top row
        (here / "one").mkdir()
        Image.fromarray(side).save(here / "one" / "a.png")
        for test in (False, True):
            x = module.load_images("one", 4, 3, test=test)
            assert x.shape == (1, 3, 4, 4) and (x[0, :, 1:] == torch.tensor([10, 20, 30]).view(3, 1, 1)).all()
            assert (x[0, :, 0] == torch.tensor([90, 80, 70]).view(3, 1)).all()
        ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
        Image.fromarray(ramp.astype(np.uint16) * 257).save("deep.png")
        assert np.array_equal(module.read_picture(here / "deep.png", 16, 1)[0], ramp)
        Image.fromarray(np.stack([0 * ramp, ramp], 2), "LA").save("ink.png")  # black, of any opacity
        for channels in (1, 3):
            near(module.read_picture(here / "ink.png", 16, channels), 255.0 - np.stack([ramp] * channels), 1)
        paint(here / "few", 3)
        few = [module.load_images("few", 8, test=test) for test in (False, True)]
        assert [len(x) for x in few] == [2, 1]  # fewer than ten: still one for the test

@each(has_images)
def test_repo_digits(module):
    """Image i of the drawn digits shows i % 10: its kind is most like that glyph, and a simple classifier reads it."""
    x = module.draw_digits(2000)
    assert x.shape == (2000, 1, 28, 28) and x.dtype == torch.uint8 and (x.min(), x.max()) == (0, 255)
    assert torch.equal(x, module.draw_digits(2000)) and not torch.equal(x, module.draw_digits(2000, seed=1))
    assert len({tuple(i.flatten().tolist()) for i in x[:200]}) == 200  # no two alike
    state = torch.get_rng_state()
    assert module.draw_digits(20, 12).shape == (20, 1, 12, 12) and torch.equal(state, torch.get_rng_state())
    train, test = (module.load_images("digits", 8, 3, test=test) for test in (False, True))
    assert (train.shape, test.shape) == ((60000, 3, 8, 8), (10000, 3, 8, 8)) and torch.equal(train[:, 0], train[:, 2])
    assert not (train[:10000] == test).all((1, 2, 3)).any()  # other digits for the test
    kinds = torch.stack([x[:1000][k::10, 0].float().mean(0) for k in range(10)])
    read = torch.cdist(x[1000:].flatten(1).float(), kinds.flatten(1)).argmin(1)
    assert (read == torch.arange(1000) % 10).float().mean() > 0.6  # one in ten by chance
    glyphs = torch.zeros(10, 28, 28)
    for k in range(10):
        tile = Image.new("L", (28, 28))
        ImageDraw.Draw(tile).text((14, 14), str(k), 255, ImageFont.load_default(26), "mm", stroke_width=1)
        glyphs[k] = torch.from_numpy(np.array(tile))
    alike = torch.corrcoef(torch.cat([kinds - kinds.mean(0), glyphs - glyphs.mean(0)]).flatten(1))[:10, 10:]
    assert alike.argmax(1).tolist() == list(range(10)), alike

def test_repo_real_mnist():
    """MNIST as everybody has it, where the environment variable MNIST names its folder: its mean, and every byte."""
    if "MNIST" not in os.environ:
        raise unittest.SkipTest("MNIST names no folder")
    facts = [(60000, 0.1306604762738429, "6bbc9ace898e44ae57da46a324031adb"),  # the 0.1307 of many a script
             (10000, 0.1325146058423369, "2646ac647ad5339dbf082846283269ea")]
    module = next(filter(has_images, MODULES.values()))  # the loaders are the same in all files
    for test, (n, mean, md5) in enumerate(facts):
        x = module.load_images(os.environ["MNIST"], test=bool(test))
        assert x.shape == (n, 1, 28, 28) and x.dtype == torch.uint8
        near(x.double().mean() / 255, mean, 1e-12)
        assert hashlib.md5(idx(x[:, 0].numpy())).hexdigest() == md5  # of the file before it was gzipped

@each(has_images)
def test_repo_grid(module):
    """The grid goes row by row with a line between its tiles; bytes and floats convert there and back without loss."""
    bytes_ = torch.arange(256, dtype=torch.uint8)
    x = module.to_float(bytes_)
    for off in (-0.4, 0, 0.4):  # of a byte: rounded to the nearest
        assert torch.equal(module.to_uint8(x + off / 127.5), bytes_)
    assert (x[0], x[255]) == (-1, 1)
    assert module.to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]
    for channels in (1, 3):
        tiles = module.to_float(torch.arange(10, 10 + 5 * channels).to(torch.uint8).view(5, channels, 1, 1))
        tiles = tiles.repeat(1, 1, 8, 6)  # not square: rows and columns must not be mixed up
        with workdir() as here:
            module.save_grid(here / "grid.png", tiles, 3)
            sheet = np.array(Image.open(here / "grid.png").convert("RGB"))
        zoom, rest = divmod(sheet.shape[0], 8 + 2 + 8)
        assert zoom > 1 and not rest and sheet.shape[1] == zoom * (6 + 2 + 6 + 2 + 6)
        sheet = sheet[::zoom, ::zoom]
        for i in range(5):
            row, column = divmod(i, 3)
            tile = sheet[10 * row : 10 * row + 8, 8 * column : 8 * column + 6]
            assert (tile == 10 + i * channels + np.arange(channels)).all(), i
        blank = [sheet[8:10], sheet[:, 6:8], sheet[:, 14:16], sheet[10:, 16:]]
        assert len(np.unique(np.concatenate([b.reshape(-1) for b in blank]))) == 1
    if has_samples(module):
        with workdir() as here:
            module.save_samples(here, torch.zeros(70, 1, 8, 8))
            assert np.load(here / "samples.npy").shape == (70, 8, 8)  # all of them
            with Image.open(here / "samples.png") as sheet:
                assert sheet.width == sheet.height  # the first 64: 8 by 8

@each(lambda module: hasattr(module, "Progress"))
def test_repo_progress(module):
    """Progress renews one line in a terminal; elsewhere it says a whole line now and then, and one at the end."""
    def said(tty):
        clock, out = types.SimpleNamespace(perf_counter=itertools.count(0.0).__next__), io.StringIO()  # a second a look
        out.isatty = lambda: tty
        with mock.patch.object(module, "time", clock), contextlib.redirect_stdout(out):
            progress = module.Progress("iteration", "images", 100, 10)
            for i in range(10, 100):
                progress(i + 1, 32, "loss 0.5")
        last = re.split("[\r\n]", out.getvalue().strip())[-1]
        assert out.getvalue().endswith("\n") and re.search(r"100/100 +loss 0.5 +32 images/s +90 s *$", last), last
        return out.getvalue()

    assert said(True).count("\r") == 90 and said(True).count("\n") == 1
    lines = said(False)
    assert "\r" not in lines and lines.count("\n") == 5  # after 21, 42, 63, 84 and 90 seconds
    assert re.search(r" 31/100 .* 69 s left\n", lines), lines
    with mock.patch.object(sys, "stdout", None):  # closed, as under pythonw
        module.Progress("iteration", "images", 1)(1, 32)

# ----------------------------------------------------------------------------------------------------------- ddpm -----
SEEDS = 0, 1, 2

def normal(*shape, seed=0):
    """Float64 noise of its own generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def oracle(x_0, s):
    """The noise that was added, as only a network can know it for which x_0 is all the data there is."""
    return lambda x_t, t: (x_t - ddpm.at(s.alpha_bar.sqrt(), t, x_t) * x_0) / ddpm.at((1 - s.alpha_bar).sqrt(), t, x_t)

def constant(guess):
    """A network that answers `guess`, whatever it is asked."""
    return lambda x_t, t: guess.expand_as(x_t)

class Watched(list):
    """A network that keeps what it was asked, (x, t) a call."""
    def __init__(self, model):
        self.model = model

    def __call__(self, x, t):
        self.append((x, t.tolist()))
        return self.model(x, t)

def test_ddpm_chain_of_steps_is_the_closed_form():
    """(1), (2): one-step kernels, chained, have the mean and the variance of q_sample at every t, for several T."""
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for T in 1, 2, 10, 1000:
        s, mean, variance = ddpm.make_schedule(T), 1.0, 0.0
        for t, beta in enumerate(s.beta.tolist()):
            mean, variance = mean * (1 - beta) ** 0.5, variance * (1 - beta) + beta
            near(ddpm.q_sample(one, t, zero, s), mean, 1e-12)  # float64, a thousand roundings
            near(ddpm.q_sample(zero, t, one, s) ** 2, variance, 1e-12)

def test_ddpm_chain_of_samples():
    """(1), (2): noise really added step by step ends with the moments of q_sample, ten large steps, by Monte Carlo."""
    s, n = ddpm.make_schedule(10, 0.05, 0.5), 90_000
    for seed in SEEDS:
        x = torch.full((1, 1, n), 0.7, dtype=torch.float64)
        for t, beta in enumerate(s.beta.tolist()):
            x = (1 - beta) ** 0.5 * x + beta**0.5 * normal(1, 1, n, seed=100 * seed + t)
        mean, variance = 0.7 * s.alpha_bar[-1].item() ** 0.5, 1 - s.alpha_bar[-1].item()
        near(x.mean(), mean, 4.5 * (variance / n) ** 0.5)  # 4.5 standard errors
        near(x.var(), variance, 4.5 * variance * (2 / n) ** 0.5)
        got = ddpm.q_sample(torch.full((1, 1, n), 0.7), 9, normal(1, 1, n, seed=seed), s)
        near(got.mean(), x.mean(), 6 * (variance / n) ** 0.5)
        near(got.var(), x.var(), 6 * variance * (2 / n) ** 0.5)

def test_ddpm_schedule():
    """(2), (3): every table against numpy, the posterior's precision as the sum of two; the ends are the paper's."""
    for T, first, last in (1000, 1e-4, 0.02), (50, 1e-4, 0.02), (20, 0.01, 0.4):
        s = ddpm.make_schedule(T, first, last) if T != 1000 else ddpm.make_schedule()
        beta = np.array([first + (last - first) * k / (T - 1) for k in range(T)])
        alpha_bar = np.exp(np.cumsum(np.log1p(-beta)))
        before = alpha_bar[:-1]
        precision = (1 - beta[1:]) / beta[1:] + 1 / (1 - before)  # of x_t given x_{t-1}, and of x_{t-1} given x_0
        tables = {"beta": beta, "alpha_bar": alpha_bar, "signal": alpha_bar**0.5, "noise": (1 - alpha_bar) ** 0.5,
                  "beta_tilde": np.append(0, 1 / precision),
                  "x_0_share": np.append(1, before**0.5 / (1 - before) / precision),
                  "x_t_share": np.append(0, (1 - beta[1:]) ** 0.5 / beta[1:] / precision)}
        for name, want in tables.items():
            near(getattr(s, name), want, 1e-15, 1e-11)  # 1 - alpha_bar loses four digits at the first step
            assert getattr(s.to("cpu"), name).dtype == torch.float32
    s = ddpm.make_schedule()
    assert len(s.beta) == 1000 and (s.beta[0], s.beta[-1]) == (1e-4, 0.02)
    assert 3.9e-5 < s.alpha_bar[-1] < 4.2e-5

def test_ddpm_posterior_is_bayes():
    """(3): q_mean and beta_tilde against prior times likelihood, added up on a fine grid."""
    s, x_0, x_t = ddpm.make_schedule(), 0.3, -0.6
    for t in 1, 2, 10, 500, 999:
        beta, before = s.beta[t].item(), s.alpha_bar[t - 1].item()
        tensors = torch.full((1, 1), x_0, dtype=torch.float64), torch.full((1, 1), x_t, dtype=torch.float64)
        guess, width = ddpm.q_mean(*tensors, t, s).item(), s.beta_tilde[t].item() ** 0.5
        x = np.linspace(guess - 12 * width, guess + 12 * width, 200_001)
        log_p = -((x - before**0.5 * x_0) ** 2) / (2 * (1 - before)) - (x_t - (1 - beta) ** 0.5 * x) ** 2 / (2 * beta)
        p = np.exp(log_p - log_p.max())
        mean = (p * x).sum() / p.sum()
        near(guess, mean, 1e-9)
        near(width**2, (p * (x - mean) ** 2).sum() / p.sum(), 0, 1e-6)  # cut off at 12 deviations, and rounding

def test_ddpm_gauss_kl():
    """(5): against torch's own, summed over all but the first axis, and against its definition by Monte Carlo."""
    for seed in SEEDS:
        mean, other = normal(2, 5, 3, 4, 4, seed=seed)
        var, var_other = normal(2, 5, 3, 4, 4, seed=seed + 9).exp()
        want = D.kl_divergence(D.Normal(mean, var.sqrt()), D.Normal(other, var_other.sqrt())).sum((1, 2, 3))
        got = ddpm.gauss_kl(mean, var, other, var_other)
        assert got.shape == (5,)
        near(got, want, 0, 1e-12)
        one = lambda table: table[0, 0, 0, 0]
        p, q = D.Normal(one(mean), one(var).sqrt()), D.Normal(one(other), one(var_other).sqrt())
        x = p.loc + p.scale * normal(100_000, seed=seed)
        draws = p.log_prob(x) - q.log_prob(x)
        got = ddpm.gauss_kl(*(v.view(1, 1) for v in (p.loc, p.variance, q.loc, q.variance)))
        near(got, draws.mean(), 4.5 * draws.std() / 100_000**0.5)
    near(ddpm.gauss_kl(mean, var, mean, var), 0)

def test_ddpm_p_mean():
    """(6): the true noise gives the posterior mean; unclipped it is the paper's equation 11; clipped, x_0 is cut."""
    s = ddpm.make_schedule()
    for seed, t in itertools.product(SEEDS, (0, 1, 500, 999)):
        x_0, eps = normal(4, 3, 4, 4, seed=seed).clamp(-1, 1), normal(4, 3, 4, 4, seed=seed + 9)
        x_t = s.alpha_bar[t].sqrt() * x_0 + (1 - s.alpha_bar[t]).sqrt() * eps
        for clip in (False, True):
            near(ddpm.p_mean(constant(eps), x_t, t, s, clip), ddpm.q_mean(x_0, x_t, t, s), 1e-9)
        guess = 3 * normal(4, 3, 4, 4, seed=seed + 99)
        want = (x_t - s.beta[t] / (1 - s.alpha_bar[t]).sqrt() * guess) / (1 - s.beta[t]).sqrt()
        near(ddpm.p_mean(constant(guess), x_t, t, s, clip=False), want, 1e-9)  # 1 / sqrt(alpha_bar) is 157 at the end
        cut = ((x_t - (1 - s.alpha_bar[t]).sqrt() * guess) / s.alpha_bar[t].sqrt()).clamp(-1, 1)
        near(ddpm.p_mean(constant(guess), x_t, t, s), ddpm.q_mean(cut, x_t, t, s), 1e-9)

def test_ddpm_weight_of_the_noise():
    """The w_t that (7) leaves out: two guesses differ in (5) by w_t times what they differ in squared error."""
    s = ddpm.make_schedule()
    for seed, t, name in itertools.product(SEEDS, (1, 30, 999), ("beta", "beta_tilde")):
        x_0, eps, one, two = normal(4, 5, 1, 4, 4, seed=seed)
        x_t, variance = ddpm.q_sample(x_0, t, eps, s), getattr(s, name)[t]
        means = [ddpm.p_mean(constant(guess), x_t, t, s, clip=False) for guess in (one, two)]
        kl = [ddpm.gauss_kl(ddpm.q_mean(x_0, x_t, t, s), s.beta_tilde[t], mean, variance) for mean in means]
        error = [((eps - g) ** 2).sum((1, 2, 3)) for g in (one, two)]
        w = s.beta[t] ** 2 / (2 * variance * (1 - s.beta[t]) * (1 - s.alpha_bar[t]))
        near(kl[0] - kl[1], w * (error[0] - error[1]), 1e-9, 1e-9)

def test_ddpm_loss():
    """(7): the network sees x_t as (2) makes it, and t as it is; the loss is the mean square of what it misses."""
    s, seen = ddpm.make_schedule(), []
    for seed in SEEDS:
        x_0, eps, guess = normal(3, 4, 2, 4, 4, seed=seed)
        t = torch.tensor([0, 999, 300, 41])
        loss = ddpm.loss_simple(lambda *args, guess=guess: seen.append(args) or guess, x_0, t, eps, s)
        assert loss.shape == (4,)
        near(loss, ((guess - eps) ** 2).sum((1, 2, 3)) / (2 * 4 * 4), 1e-12)
        assert torch.equal(seen[-1][1], t)
        for i in range(4):
            a = s.alpha_bar[t[i]].item()
            near(seen[-1][0][i], a**0.5 * x_0[i] + (1 - a) ** 0.5 * eps[i], 1e-12)

def test_ddpm_draw_t():
    """(7): with its weights, any function of t has its plain mean over 0 .. T-1; a batch is spread over all of them."""
    for seed, T in itertools.product(SEEDS, (1, 10, 1000)):
        torch.manual_seed(seed)
        t, weight = ddpm.draw_t(100_000, T)
        assert t.shape == weight.shape == (100_000,) and (t.min(), t.max()) == (0, T - 1)
        steps = torch.arange(T, dtype=torch.float64) / T
        for f in steps**0, steps, (steps < 0.1).double(), torch.cos(6 * steps):
            near((weight * f[t]).mean(), f.mean(), 1e-3)  # evenly spread, so nearer than 100,000 free draws would be
        small = torch.stack([ddpm.draw_t(8, T)[0] for _ in range(100)])
        edges = torch.quantile(t.double(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
        for edge in edges if T == 1000 else ():  # two of eight lie below the first quartile, and so on
            below = (small < edge).sum(1).double().mean()
            assert ((small < edge).sum(1) - below).abs().max() < 1.5

def test_ddpm_oracle_sampler():
    """(8): a network that knows the only image there is leads there, by either variance, clipped or not, for any T."""
    x_0 = normal(1, 2, 2, 2, seed=5).clamp(-1, 1)
    for T, variance, clip, seed in itertools.product((1, 2, 50, 1000), ("large", "small"), (True, False), (0, 1)):
        s, generator = ddpm.make_schedule(T), torch.Generator().manual_seed(seed)
        spy, x_T = Watched(oracle(x_0, s)), normal(3, 2, 2, 2, seed=seed)
        states = [(None, x_T), *ddpm.reverse(spy, x_T, s, variance, clip, generator)]
        assert [t for t, _ in states[1:]] == [*reversed(range(T))] and len(spy) == T
        for (x_t, t), (_, current), (step, _) in zip(spy, states, states[1:]):
            assert x_t is current and t == [step] * 3  # it sees the current state and its time
        near(states[-1][1], x_0, 1e-10)  # float64, and noise / signal is 157 where it starts

def test_ddpm_step_adds_its_variance():
    """(8): a step adds sqrt(beta_t) z or sqrt(beta~_t) z to the mean, and at the last step nothing."""
    s, x_t, z = ddpm.make_schedule(), normal(2, 1, 4, 4), normal(2, 1, 4, 4, seed=1)
    model = constant(normal(2, 1, 4, 4, seed=2))
    for t, (variance, table) in itertools.product((0, 1, 500, 999), {"large": s.beta, "small": s.beta_tilde}.items()):
        still, moved = (ddpm.p_step(model, x_t, t, noise, s, variance) for noise in (0 * z, z))
        near(still, ddpm.p_mean(model, x_t, t, s), 1e-15)
        near(moved - still, table[t].sqrt() * z if t else 0, 1e-12)

def test_ddpm_sampler_has_the_right_law():
    """(8): started at q(x_T | x_0), the oracle with the small variance passes through q(x_t | x_0) at every t."""
    s, n = ddpm.make_schedule(20, 0.01, 0.4), 40_000
    for seed in SEEDS:
        x_0 = torch.tensor([0.5, -0.2], dtype=torch.float64).view(2, 1, 1)  # two pixels
        x_T = ddpm.q_sample(x_0, 19, normal(n, 2, 1, 1, seed=seed), s)
        generator, state = torch.Generator().manual_seed(seed + 50), torch.get_rng_state()
        for t, x in ddpm.reverse(oracle(x_0, s), x_T, s, "small", False, generator):
            if t:
                mean, variance = s.alpha_bar[t - 1].sqrt() * x_0, 1 - s.alpha_bar[t - 1].item()
                near(x.mean(0), mean, 5 * (variance / n) ** 0.5)  # 5 standard errors: 114 comparisons
                near(x.var(0), variance, 5 * variance * (2 / n) ** 0.5)
        assert torch.equal(state, torch.get_rng_state())  # only its own generator

def test_ddpm_decoder():
    """(9): the 256 bytes share out all probability, each has its bin's integral, and far away it stays finite."""
    bytes_ = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(256, 1, 1, 1)
    for mean, sigma in itertools.product((-1.3, -1.0, 0.0011, 0.7, 1.0), (0.004, 0.0073, 0.1, 0.5)):
        mean, sigma = torch.tensor(mean, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)
        p = ddpm.log_decoder(bytes_, mean, sigma).exp()
        near(p.sum(), 1, 1e-6)  # the answers are float32
        for k in (1, 40, 128, 216, 254):
            x = torch.linspace((2 * k - 1) / 255 - 1, (2 * k + 1) / 255 - 1, 2001, dtype=torch.float64)
            near(p[k], torch.trapezoid(D.Normal(mean, sigma).log_prob(x).exp(), x), 1e-6)  # a grid of 2001 points
        for k, tail in (0, (-254 / 255 - mean) / sigma), (255, (mean - 254 / 255) / sigma):
            near(p[k], 0.5 * math.erfc(-tail / 2**0.5), 1e-6)
    for far in 3.0, 8.0, 20.0, 35.0:  # deviations from the mean to the nearer edge of a bin that is half of one wide
        near_edge, far_edge = (torch.special.log_ndtr(torch.tensor(-v, dtype=torch.float64)) for v in (far, far + 0.5))
        want, sigma = near_edge + torch.log1p(-(far_edge - near_edge).exp()), torch.tensor(4 / 255, dtype=torch.float64)
        for side in 1, -1:  # the same to the left and to the right, in float64 and in float32
            for x in bytes_[100:101], bytes_[100:101].float():
                near(ddpm.log_decoder(x, x + side * (1 / 255 + far * sigma), sigma), want, 1e-3, 1e-5)
    x_0 = ddpm.to_float(torch.randint(256, (6, 3, 4, 4), generator=torch.Generator().manual_seed(0)))
    sigma = ddpm.make_schedule().beta_tilde[1].sqrt().float()
    far = ddpm.log_decoder(x_0, x_0 + 50, sigma)
    assert far.shape == (6,) and torch.isfinite(far).all() and (far < -100).all()
    parts = [ddpm.log_decoder(x_0[:, c : c + 1], x_0[:, c : c + 1], sigma) for c in range(3)]
    near(ddpm.log_decoder(x_0, x_0, sigma), sum(parts), 1e-4)  # float32

def test_ddpm_bound_of_an_oracle():
    """(4): if the network knows x_0, L_t is 0 or what the variances differ by, L_0 is (9) at x_0, L_T is torch's."""
    x_0 = torch.randint(256, (3, 2, 4, 4), generator=torch.Generator().manual_seed(1)).double() / 127.5 - 1
    for T in 10, 1000:
        s = ddpm.make_schedule(T)
        ratio = s.beta_tilde[1:] / s.beta[1:]
        extra = {"small": 0.0, "large": (ratio - 1 - ratio.log()).sum().item() / 2}  # nats for each pixel
        for variance, clip in itertools.product(extra, (True, False)):
            bits = ddpm.bound(oracle(x_0, s), x_0, s, variance, clip, torch.Generator().manual_seed(0))
            assert bits.shape == (3, 3)
            q = D.Normal(s.alpha_bar[-1].sqrt() * x_0, (1 - s.alpha_bar[-1]).sqrt())
            near(bits[:, 0], D.kl_divergence(q, D.Normal(0.0, 1.0)).mean((1, 2, 3)) / math.log(2), 1e-12, 1e-9)
            near(bits[:, 1], extra[variance] / math.log(2), 1e-9)
            inside = math.erf(1 / 255 / (2 * s.beta_tilde[1].item()) ** 0.5)  # of a bin in the middle of the Gaussian
            nats = -(inside + (x_0.abs() == 1).double() * (1 - inside) / 2).log()  # black, white: a tail too
            near(bits[:, 2], nats.mean((1, 2, 3)) / math.log(2), 1e-6)  # float32

def test_ddpm_bound_of_a_gaussian():
    """(4): for data N(0, I) a linear network and "large" are exact: L_T + L_1:T-1 = KL(q(x_1 | x_0) || N(0, I))."""
    s, n = ddpm.make_schedule(100, 1e-3, 0.1), 2000
    model = lambda x_t, t: ddpm.at((1 - s.alpha_bar).sqrt(), t, x_t) * x_t
    for seed in SEEDS:
        pixels = 0.5 * normal(1, 2, 2, 2, seed=seed)
        bits = ddpm.bound(model, pixels.repeat(n, 1, 1, 1), s, "large", False, torch.Generator().manual_seed(seed))
        q = D.Normal(s.alpha_bar[0].sqrt() * pixels, (1 - s.alpha_bar[0]).sqrt())
        want = D.kl_divergence(q, D.Normal(0.0, 1.0)).mean() / math.log(2)
        both = bits[:, :2].sum(1)
        near(both.mean(), want, 4.5 * both.std() / n**0.5)
        assert both.std() / n**0.5 < 0.01 * want  # so that the comparison says something

def test_ddpm_bound_of_a_blind_network():
    """(4), (9): if the network answers 0, L_{t-1} is w_t E eps^2 = w_t and a constant, and L_0 an integral over eps."""
    s, n = ddpm.make_schedule(), 400
    x_0 = torch.full((n, 1, 2, 2), 0.2, dtype=torch.float64)
    eps, sigma = torch.linspace(-9, 9, 10_001, dtype=torch.float64), s.beta_tilde[1].sqrt()
    last = D.Normal(0.2 + s.noise[0] / s.signal[0] * eps, sigma)  # p(x_0 | x_1) if eps is what is in x_1
    p = last.cdf(torch.tensor(0.2 + 1 / 255)) - last.cdf(torch.tensor(0.2 - 1 / 255))
    L_0 = torch.trapezoid(D.Normal(0.0, 1.0).log_prob(eps).exp() * -p.clamp(min=1e-12).log2(), eps)
    for variance, table in (("large", s.beta), ("small", s.beta_tilde)):
        bits = ddpm.bound(constant(0 * x_0[:1]), x_0, s, variance, False, torch.Generator().manual_seed(3))
        beta, var, post, a = (v[1:].numpy() for v in (s.beta, table, s.beta_tilde, s.alpha_bar))
        nats = (beta**2 / (2 * var * (1 - beta) * (1 - a)) + 0.5 * (post / var - 1 + np.log(var / post))).sum()
        near(bits[:, 1].mean(), nats / math.log(2), 4.5 * bits[:, 1].std() / n**0.5)
        near(bits[:, 2].mean(), L_0, 4.5 * bits[:, 2].std() / n**0.5)
        assert (bits[:, 1:].std(0) / n**0.5 < 0.05 * bits[:, 1:].mean(0)).all()  # so that this says something

def woken(model, seed=0):
    """The model with weights that are nowhere zero, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() == 1 else p[0].numel() ** -0.5))
    return model

def test_ddpm_network():
    """The U-Net keeps any shape it can halve twice, uses t and every weight, and no image sees its neighbours."""
    for channels, size in itertools.product((1, 3), (4, 8, 12, 28, 32)):
        model, x = woken(ddpm.UNet(channels, size, 8)), normal(3, channels, size, size).float()
        t = torch.tensor([0, 500, 999])
        y = model(x, t)
        assert y.shape == x.shape
        near(y[1:2], model(x[1:2], t[1:2]), 1e-4)  # float32, sums in another order
        assert (model(x, t.flip(0))[[0, 2]] - y[[0, 2]]).abs().amax((1, 2, 3)).min() > 1e-3
        y.square().mean().backward()
        for name, p in model.named_parameters():  # on one pixel, only the middle of a convolution has something to do
            assert (p.grad != 0).all() if p.dim() > 1 and size > 4 else p.grad.any(), name
    for size, width in (30, 8), (27, 8), (28, 12):
        try:
            ddpm.UNet(1, size, width)
            raise AssertionError(f"took size {size}, width {width}")
        except ValueError as e:
            assert str(size) in str(e) and str(width) in str(e)

def test_ddpm_network_starts_with_a_share_of_x():
    """Before training the answer is a share of x, the same for all pixels, and a constant; a block passes x on."""
    for seed in SEEDS:
        torch.manual_seed(seed)
        model, x = ddpm.UNet(1, 8, 8), normal(2, 1, 8, 8, seed=seed).float()
        t = torch.tensor([7, 7])
        share = (model(x, t) - model(0 * x, t)) / x
        near(share, share[0, 0, 0, 0], 1e-3)  # float32, divided by a small pixel
        x, e = normal(3, 8, 4, 4, seed=seed).float(), normal(3, 16, seed=seed).float()
        rest = ddpm.Block(8, 8, 16)(x, e) - x
        near(rest, rest[:1, :, :1, :1], 1e-5)

def test_ddpm_training_draws():
    """Training takes x_0 from the data in -1 .. 1, fresh N(0, I) noise, and any t at any place of the batch."""
    images, seen = torch.arange(0, 200, 20, dtype=torch.uint8).view(10, 1, 1, 1).repeat(1, 1, 8, 8), []

    def loss(model, x_0, t, eps, s):
        seen.append((x_0, t, eps))
        return 0 * next(model.parameters()).sum()

    with mock.patch.object(ddpm, "loss_simple", loss):
        quiet(ddpm.train, images, iters=300, batch=4, width=8)
    x_0, t, eps = (torch.stack(v) for v in zip(*seen))  # (300, 4, ...)
    used, counts = x_0[..., 0, 0, 0].unique(return_counts=True)
    near(used, torch.arange(0, 200, 20) / 127.5 - 1, 1e-6)
    assert (x_0 == x_0[..., :1, :1]).all() and counts.min() > 75  # of 120 each: 75 is over four deviations away
    assert 0 <= t.min() < 20 and 980 < t.max() < 1000  # 1200 draws
    assert len(t.argmin(1).unique()) == 4
    near(eps.mean(), 0, 5 / eps.numel() ** 0.5)
    near(eps.var(), 1, 5 * (2 / eps.numel()) ** 0.5)
    assert len(eps.flatten(1).unique(dim=0)) == 300

def test_ddpm_sample():
    """sample() draws all it was asked for, chunk by chunk, from the whole schedule, the same for the same seed."""
    x_0, s, asked = normal(1, 2, 2).float().clamp(-1, 1), ddpm.make_schedule().to("cpu"), []

    draw = lambda model, **flags: quiet(ddpm.sample, model, (5, 1, 2, 2), chunk=2, **flags)
    model = lambda x, t: asked.append(len(x)) or oracle(x_0, s)(x, t)
    near(draw(model), x_0.expand(5, 1, 2, 2), 1e-4)  # float32
    assert asked == [2] * 2000 + [1] * 1000
    zero = lambda x, t: torch.zeros_like(x)
    one = draw(zero, clip=False)
    assert torch.equal(one, draw(zero, clip=False)) and not torch.equal(one, draw(zero, clip=False, seed=1))
    assert len(one.flatten(1).unique(dim=0)) == 5 and one.abs().max() > 1 and draw(zero).abs().max() <= 1
    assert not torch.equal(one, draw(zero, clip=False, variance="small"))

# ----------------------------------------------------------------------------------------------------------- ddim -----
COUNTS = 1, 2, 7, 50, 999, 1000  # of steps: dividing T or not, and the ends

def curved(x, t):
    """A network that is no straight line, and depends on all that it is given."""
    return torch.sin(2 * x + 0.002 * t.view(-1, 1, 1, 1)) + 0.3 * x.flip(-1)

def test_ddim_schedule():
    """(1): alpha_bar is DDPM's, which has tests of its own, and 1 where there is no noise."""
    for T in 1, 50, 1000:
        assert torch.equal(ddim.make_alpha_bar(T), ddpm.make_schedule(T).alpha_bar)
    alpha_bar = ddim.make_alpha_bar()
    assert ddim.level(alpha_bar, -1) == 1 and ddim.level(alpha_bar, 0) == 1 - 1e-4
    for table, want in zip(ddim.noise_tables(alpha_bar), (alpha_bar**0.5, (1 - alpha_bar) ** 0.5), strict=True):
        assert table.dtype == torch.float32
        near(table, want, 0, 1e-7)  # also the first, where 1 - alpha_bar is 1e-4

def test_ddim_loss():
    """(1), (2): the network sees x_t as (1) makes it, and t as it is; the loss is the mean square of what it misses."""
    s = ddpm.make_schedule()
    for seed in SEEDS:
        x_0, eps, guess = normal(3, 4, 2, 4, 4, seed=seed)
        t, spy = torch.tensor([0, 999, 300, 41]), Watched(constant(guess))
        loss = ddim.loss_gamma(spy, x_0, t, eps, ddim.noise_tables(s.alpha_bar))
        assert loss.shape == (4,)
        near(loss, ((guess - eps) ** 2).sum((1, 2, 3)) / (2 * 4 * 4), 1e-12)
        (x_t, asked_t), = spy
        assert asked_t == t.tolist()
        for i in range(4):
            a = s.alpha_bar[t[i]].item()
            near(x_t[i], a**0.5 * x_0[i] + (1 - a) ** 0.5 * eps[i], 1e-6)  # float32 tables

def test_ddim_draw_t():
    """(2): steps fall as often as their weights say, all of them do, and weight times frequency is 1 / T for each."""
    for module, T, seed in itertools.product((ddim, ddpm), (1, 2, 10, 1000), SEEDS):
        torch.manual_seed(seed)
        t, weight = module.draw_t(100_000, T)
        want = torch.zeros(T).index_copy(0, t, 1 / (T * weight)).double()
        near(want.sum(), 1, 1e-5)  # float32
        near(torch.bincount(t, minlength=T) / 1e5, want, 2e-5)  # spread evenly: off by one draw at either end, rounded
        for n in (1, 7) if T == 10 else ():
            t, weight = zip(*(module.draw_t(n, T) for _ in range(1000)))
            t, weight = torch.cat(t), torch.cat(weight).double()
            for f in torch.ones(T), torch.arange(T) / T, (torch.arange(T) < 3).double():
                draws = (weight * f[t]).view(1000, n).mean(1)
                # 5 standard errors: 36 comparisons
                near(draws.mean(), f.double().mean(), 5 * draws.std() / 1000**0.5 + 1e-6)

def test_ddim_steps():
    """(7): S pairs from T-1 down to -1, strictly falling and linked, exactly those that the ceilings give."""
    for S, spacing in itertools.product((*COUNTS, *range(3, 1000, 31)), ("linear", "quad")):
        pairs = ddim.make_tau(1000, S, spacing)
        t, p = zip(*pairs)
        assert len(pairs) == S and t[0] == 999 and p[-1] == -1 and p[:-1] == t[1:], (S, spacing)
        assert all(t > p for t, p in pairs)
        power = 1 if spacing == "linear" else 2
        for i, step in enumerate(reversed(t), 1):
            up = step + 1  # the least that is no less, or i where more than one square comes to a step
            assert up * S**power >= 1000 * i**power
            assert (up - 1) * S**power < 1000 * i**power or up == i
    assert [t for t, p in ddim.make_tau(1000, 1000, "quad")] == [t for t, p in ddim.make_tau(1000, 1000)]
    assert ddim.make_tau(1000, 4) == [(999, 749), (749, 499), (499, 249), (249, -1)]
    assert ddim.make_tau(1000, 5, "quad") == [(999, 639), (639, 359), (359, 159), (159, 39), (39, -1)]
    assert ddim.make_tau(10, 3) == [(9, 6), (6, 3), (3, -1)] and ddim.make_tau(1, 1) == [(0, -1)]
    for T, S in (1000, 0), (1000, -3), (1000, 1001), (10, 11):
        for spacing in "linear", "quad":
            try:
                raise AssertionError(f"took {S} steps of {T}: {ddim.make_tau(T, S, spacing)}")
            except ValueError as e:
                assert str(S) in str(e) and str(T) in str(e)

def test_ddim_no_noise_without_eta():
    """(5): with eta = 0 x_T alone decides, and no generator moves; with eta = 1 the generator decides too."""
    alpha_bar = ddim.make_alpha_bar()
    for seed, spacing in itertools.product(SEEDS, ("linear", "quad")):
        x_T, state = normal(3, 1, 4, 4, seed=seed), torch.get_rng_state()
        one, two = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
        draw = functools.partial(ddim.decode, curved, x_T, alpha_bar, 7, spacing=spacing)
        before, other = one.get_state(), two.get_state()
        want = draw(0.0, generator=one)
        assert torch.equal(before, one.get_state())
        names = "randn", "rand", "randn_like", "rand_like", "normal"
        with contextlib.ExitStack() as none:
            for name in names:
                none.enter_context(mock.patch.object(torch, name, side_effect=AssertionError("it draws")))
            assert torch.equal(draw(0.0, generator=two), want) and torch.equal(draw(0.0), want)
        for eta in 0.3, 1.0:
            noisy = [draw(eta, generator=g.set_state(b)) for g, b in ((one, before), (two, other), (one, before))]
            assert not torch.equal(noisy[0], noisy[1]) and torch.equal(noisy[0], noisy[2])
            assert not torch.equal(noisy[0], want)
        assert torch.equal(state, torch.get_rng_state())

def test_ddim_is_ddpm():
    """(5), (6): eta = 1, p = t - 1 is ddpm's step with beta~_t, clipped or not, and so is the whole way with S = T."""
    s = ddpm.make_schedule()
    for seed, t, clip in itertools.product(SEEDS, (0, 1, 2, 37, 500, 998, 999), (True, False)):
        x_t, z = normal(2, 3, 2, 4, 4, seed=seed)
        got = ddim.step(curved, x_t, t, t - 1, s.alpha_bar, 1.0, z, clip)
        near(got, ddpm.p_step(curved, x_t, t, z, s, "small", clip), 1e-9)  # x_0 is 157 times the noise at the end
    for T, clip in itertools.product((1, 50), (True, False)):
        s = ddpm.make_schedule(T, 1e-3, 0.2)
        one, two = (torch.Generator().manual_seed(7) for _ in range(2))
        *_, (_, want) = ddpm.reverse(curved, x_t, s, "small", clip, one)
        near(ddim.decode(curved, x_t, s.alpha_bar, T, 1.0, "linear", clip, two), want, 1e-9)

def test_ddim_keeps_the_marginals():
    """(3), (6): given x_0, x_p has the mean and the variance of (1) whatever eta and p; sigma is Bayes' at eta = 1."""
    s = ddpm.make_schedule()
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for t, p in (999, 998), (999, 0), (999, -1), (700, 350), (20, 3), (1, 0), (1, -1), (0, -1):
        between = 0.0  # the variance of x_t given x_p, step by step
        for beta in s.beta[p + 1 : t + 1].tolist():
            between = between * (1 - beta) + beta
        a_t, a_p = s.alpha_bar[t].item(), s.alpha_bar[p].item() if p >= 0 else 1.0
        bayes = 1 / (a_t / a_p / between + 1 / (1 - a_p)) if p >= 0 else 0.0  # precisions add up
        for eta, clip in itertools.product((0.0, 0.3, 1.0), (True, False)):
            mean, c, sigma = (ddim.step(oracle(x_0, s), a_t**0.5 * x_0 + (1 - a_t) ** 0.5 * eps, t, p, s.alpha_bar, eta,
                                        z, clip).item()
                              for x_0, eps, z in ((one, zero, zero), (zero, one, zero), (zero, zero, one)))
            near([mean, c**2 + sigma**2, sigma**2], [a_p**0.5, 1 - a_p, eta**2 * bayes], 1e-10)
            if t == p + 1:
                near(sigma**2, eta**2 * s.beta_tilde[t], 1e-10)

def test_ddim_sampler_has_the_right_law():
    """(3), (5): with real noise, started at q(x_T | x_0), the oracle passes through q(x_p | x_0) at every p."""
    s, n = ddpm.make_schedule(), 40_000
    x_0 = torch.tensor([0.5, -0.2], dtype=torch.float64).view(2, 1, 1)  # two pixels
    for eta, spacing, seed in itertools.product((0.0, 0.5, 1.0), ("linear", "quad"), SEEDS):
        x = ddpm.q_sample(x_0, 999, normal(n, 2, 1, 1, seed=seed), s)
        for t, p in ddim.make_tau(1000, 6, spacing):
            x = ddim.step(oracle(x_0, s), x, t, p, s.alpha_bar, eta, normal(n, 2, 1, 1, seed=99 * seed + t), False)
            a = s.alpha_bar[p].item() if p >= 0 else 1.0
            near(x.mean(0), a**0.5 * x_0, 5 * ((1 - a) / n) ** 0.5 + 1e-9)  # 5 standard errors: 216 comparisons
            near(x.var(0), 1 - a, 5 * (1 - a) * (2 / n) ** 0.5 + 1e-9)

def test_ddim_oracle():
    """(4), (5): who knows the only image gets there at any S; with eta = 0 one and the same eps is in every x_t."""
    s, x_0 = ddpm.make_schedule(), normal(1, 2, 2, 2, seed=5).clamp(-1, 1)
    for S, spacing, eta, clip in itertools.product(COUNTS, ("linear", "quad"), (0.0, 1.0), (True, False)):
        spy, x_T = Watched(oracle(x_0, s)), normal(3, 2, 2, 2, seed=S)
        x = ddim.decode(spy, x_T, s.alpha_bar, S, eta, spacing, clip, torch.Generator().manual_seed(S))
        near(x, x_0, 1e-10)  # float64, and noise / signal is 157 where it starts
        assert [t for _, t in spy] == [[t] * 3 for t, p in ddim.make_tau(1000, S, spacing)]
        eps = oracle(x_0, s)(x_T, torch.full((3,), 999))
        for x_t, (t, *_) in spy if eta == 0 else spy[:1]:
            near(x_t, s.alpha_bar[t].sqrt() * x_0 + (1 - s.alpha_bar[t]).sqrt() * eps, 1e-10)

def gaussian(mean, deviation):
    """For pixels N(mean, deviation^2): the best network of all, and the x_T of images by the exact ODE."""
    alpha_bar = ddpm.make_schedule().alpha_bar

    def model(x_t, t):
        a = alpha_bar[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x_t - a.sqrt() * mean) / (a * deviation**2 + 1 - a)

    a = alpha_bar[-1]
    return model, lambda x_0: a.sqrt() * mean + (a * deviation**2 + 1 - a).sqrt() * (x_0 - mean) / deviation

def test_ddim_solves_the_ode():
    """(4), (5), (8): for Gaussian pixels decoding and encoding tend to the exact ODE's answer, with errors like 1/S."""
    alpha_bar, counts = ddim.make_alpha_bar(), (25, 50, 100, 200)
    for seed, spacing, (mean, deviation) in itertools.product(SEEDS, ("linear", "quad"), ((0.3, 0.4), (-0.5, 0.25))):
        model, latents = gaussian(mean, deviation)
        x_0 = mean + deviation * normal(500, 1, 1, 2, seed=seed)
        x_T, errors = latents(x_0), []
        for S in counts:
            spy = Watched(model)
            made = ddim.encode(spy, x_0, alpha_bar, S, spacing)
            assert [t[0] for _, t in spy] == [max(p, 0) for t, p in reversed(ddim.make_tau(1000, S, spacing))]
            assert torch.equal(spy[0][0], x_0)
            back = ddim.decode(model, made, alpha_bar, S, 0.0, spacing, False)
            x = ddim.decode(model, x_T, alpha_bar, S, 0.0, spacing, False)
            errors.append([rms(x - x_0) / deviation, rms(made - x_T), rms(back - x_0) / deviation])
        for few, many in zip(errors, errors[1:]):
            assert all(1.5 < a / b < 2.5 for a, b in zip(few, many)), errors
        assert max(errors[-1]) < 0.06, errors
        near(made.std(), x_T.std(), 0.06)
        near(made.mean(), x_T.mean(), 0.03)
        assert 0.9 < made.std() < 1.1  # 1000 draws of N(0, 1)

def test_ddim_slerp():
    """(9): it starts at x, ends at y, turns by equal angles in their plane, and unit vectors stay of unit length."""
    angle = lambda x, y: torch.arccos(((x * y).sum() / x.norm() / y.norm()).clamp(-1, 1))
    for seed in range(6):
        x, y = normal(2, 1 + seed, 4, 4, seed=seed)
        near(ddim.slerp(x, y, 0.0), x, 1e-12)
        near(ddim.slerp(x, y, 1.0), y, 1e-12)
        near(ddim.slerp(x, y, 0.3), ddim.slerp(y, x, 0.7), 1e-12)
        near(ddim.slerp(x, x, 0.3), x, 1e-12)  # no angle at all
        x, y = x / x.norm(), y / y.norm()
        for a in 0.1, 0.25, 0.5, 0.9:
            z = ddim.slerp(x, y, a)
            assert z.shape == x.shape
            near(z.norm(), 1, 1e-12)
            near([angle(x, z), angle(z, y)], [a * angle(x, y), (1 - a) * angle(x, y)], 1e-7)  # arccos of nearly 1

def test_ddim_sample():
    """sample() draws all it was asked for, chunk by chunk, in S steps as spaced, and the same for the same seed."""
    x_0, s = normal(1, 2, 2).float().clamp(-1, 1), ddpm.make_schedule()
    spy = Watched(lambda x, t: oracle(x_0, s)(x, t).float())
    near(quiet(ddim.sample, spy, (5, 1, 2, 2), 7, 0.0, "quad", chunk=2), x_0.expand(5, 1, 2, 2), 1e-4)  # float32
    tau = [t for t, p in ddim.make_tau(1000, 7, "quad")]
    assert [t for _, t in spy] == [[t] * n for n in (2, 2, 1) for t in tau]
    for eta in 0.0, 1.0:
        draw = functools.partial(quiet, ddim.sample, lambda x, t: 0 * x, (5, 1, 2, 2), 7, eta, chunk=2)
        one = draw(clip=False)
        assert torch.equal(one, draw(clip=False)) and not torch.equal(one, draw(clip=False, seed=1))
        assert len(one.flatten(1).unique(dim=0)) == 5 and one.abs().max() > 1 and draw().abs().max() <= 1
    assert not torch.equal(one, draw(clip=False, spacing="quad"))

def tiles(path, size, columns):
    """The images of a grid of square grey ones -> uint8 (N, size, size), the lines between them and the zoom undone."""
    sheet = np.array(Image.open(path))
    zoom = 64 // (size + 2)
    sheet = np.pad(sheet[::zoom, ::zoom], ((0, 2), (0, 2)))
    assert sheet.shape[1] == columns * (size + 2) and sheet.shape[0] % (size + 2) == 0, sheet.shape
    sheet = sheet.reshape(-1, size + 2, columns, size + 2).transpose(0, 2, 1, 3)
    return sheet.reshape(-1, size + 2, size + 2)[:, :size, :size]

def grey(here, n=20):
    """Grey 8x8 pictures in the folder here/pics -> those to train on, as load_images gives them."""
    paint(here / "pics", n, (8, 8), "L")
    return ddpm.load_images("pics", 8)

def alike(got, want):
    """Pictures that came in batches of another size: float32 sums differ, so a byte may round to its neighbour."""
    assert got.shape == want.shape and np.abs(got.astype(int) - want.astype(int)).max() <= 1

def test_ddim_samples_what_ddpm_trained():
    """--model samples a checkpoint of ddpm.py as the other flags say, and trains nothing; no other file's will do."""
    with workdir() as here:
        images = grey(here)
        quiet(ddpm.train, images, iters=2, batch=2, width=8, path=here / "ddpm" / "model.pt")
        quiet(flow.train, images, iters=2, batch=2, width=8, path=here / "flow" / "model.pt")
        model, theirs = ddim.load("ddpm/model.pt"), ddpm.load("ddpm/model.pt")
        same(model.state_dict(), theirs.state_dict())
        assert model.shape == (1, 8, 8) and not model.training
        words = command(ddim, data="pics", model="ddpm/model.pt", steps=3, eta=1, spacing="quad", seed=4, width=16,
                        size=28, compare="5,2,200")  # --width and --size are the checkpoint's
        woken(model)  # so that it guesses what has to be cut
        with (mock.patch.object(ddim, "train", autospec=True, side_effect=AssertionError("it trains")),
              mock.patch.object(ddim, "load", lambda path, device: {"ddpm/model.pt": model}[path])):
            status, out, err = call(ddim, words)
        assert (status, err) == (0, ""), err
        assert not (here / "run" / "model.pt").exists()
        want = quiet(ddim.sample, model, (2, 1, 8, 8), 3, 1.0, "quad", True, 4)
        assert np.array_equal(np.load("run/samples.npy"), ddim.to_uint8(want)[:, 0])

        x_T, alpha_bar = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(4)), ddim.make_alpha_bar()
        rows = [ddim.decode(model, x_T, alpha_bar, S, 0.0, "quad")[:10] for S in (5, 2, 200)]
        alike(tiles("run/compare.png", 8, 10), ddim.to_uint8(torch.cat(rows))[:, 0].numpy())
        table = re.findall(r"^ *(\d+) steps: +([\d.]+) s .*?([\d.,]+) images/s", out, re.M)
        assert [row[0] for row in table] == ["5", "2", "200"] and float(table[2][1]) > float(table[1][1])
        walk = tiles("run/slerp.png", 8, 10)  # six walks of ten pictures, from one of the x_T to the next
        ends = ddim.to_uint8(ddim.decode(model, x_T[:12], alpha_bar, 3, 0.0, "quad"))[:, 0].numpy()
        alike(walk[::10], ends[::2])
        alike(walk[9::10], ends[1::2])
        held_out = ddim.load_images("pics", 8, test=True)[:16]
        rows = tiles("run/reconstructions.png", 8, len(held_out)).reshape(6, len(held_out), 8, 8)
        assert np.array_equal(rows[0], held_out[:, 0])  # the real ones, and what came back in 10 .. 200 steps
        x_0 = ddim.to_float(held_out)
        back = ddim.decode(model, ddim.encode(model, x_0, alpha_bar, 20), alpha_bar, 20, clip=False)
        alike(rows[2], ddim.to_uint8(back)[:, 0].numpy())
        error = (back - x_0).square().mean().item() / 4  # pixels in 0 .. 1
        near(float(re.search(r"[ ,]20: ([\d.]+)", out)[1]), error, 1e-5, 1e-3)

        words = command(ddim, data="pics", out="other")
        wrong = [refused(ddim, [*words, "--model", path], say, here)
                 for path, say in (("flow/model.pt", "rectified_flow.py"), ("none.pt", "none.pt"))]
        try:
            wrong += [f"load took it: {ddim.load('flow/model.pt')}"]
        except ValueError as e:
            assert "rectified_flow.py" in str(e)
    assert not any(wrong), "\n".join(filter(None, wrong))

def test_ddim_compares_by_itself():
    """A run without --model trains, and --compare then makes its picture; without --compare there is none."""
    words, _, files = finished(ddim)
    assert "run/compare.png" not in files
    with workdir() as here:
        unpack(files, here)
        assert call(ddim, [*words, "--compare", "1,3"])[0] == 0
        with Image.open("run/compare.png") as sheet:
            assert sheet.width / sheet.height == (10 * 10 - 2) / (2 * 10 - 2)  # two rows of ten
        assert changed(files, snapshot(here)) == ["run/compare.png"]

def test_ddim_bad_values():
    """Steps, eta and comparisons that cannot be are refused before anything is trained."""
    bad = [("--eta", "1.5", "eta"), ("--eta", "nan", "eta"), ("--eta", "-0.1", "eta"), ("--steps", "0", "--steps 0"),
           ("--steps", "1001", "--steps 1001"), ("--steps", "-5", "--steps"), ("--compare", "10,0", "--steps 0"),
           ("--compare", "10,x", "--compare"), ("--compare", "10,1001", "1001"), ("--compare", "", "--compare"),
           ("--spacing", "cubic", "--spacing")]
    with workdir() as here, mock.patch.object(ddim, "train", autospec=True, side_effect=AssertionError("it trains")):
        words = command(ddim, **inputs(here))
        wrong = [refused(ddim, [*words, f"{name}={value}"], say, here) for name, value, say in bad]
    assert not any(wrong), "\n".join(filter(None, wrong))

def test_ddim_training_draws():
    """(2): training takes x_0 from the data in -1 .. 1 and fresh N(0, I) noise, and weighs: any f(t) has its mean."""
    images, seen = torch.arange(0, 200, 20, dtype=torch.uint8).view(10, 1, 1, 1).repeat(1, 1, 8, 8), []

    def loss(model, x_0, t, eps, tables):
        seen.append((x_0, t, eps))
        same(tables, ddim.noise_tables(ddim.make_alpha_bar()))
        return 0 * next(model.parameters()).sum() + (t / 1000).square()

    with workdir() as here, mock.patch.object(ddim, "loss_gamma", loss):
        quiet(ddim.train, images, iters=300, batch=4, width=8, path=here / "model.pt")
        logged = [float(row.split(",")[1]) for row in (here / "log.csv").read_text().split()[1:]]
    near(sum(logged) / 3, sum(t**2 for t in range(1000)) / 1e9, 0.02)  # without weights 0.2
    x_0, t, eps = (torch.stack(v) for v in zip(*seen))  # (300, 4, ...)
    used, counts = x_0[..., 0, 0, 0].unique(return_counts=True)
    near(used, torch.arange(0, 200, 20) / 127.5 - 1, 1e-6)
    assert (x_0 == x_0[..., :1, :1]).all() and counts.min() > 75  # of 120 each: 75 is over four deviations away
    assert 0 <= t.min() < 20 and 980 < t.max() < 1000  # 1200 draws
    near(eps.mean(), 0, 5 / eps.numel() ** 0.5)
    near(eps.var(), 1, 5 * (2 / eps.numel()) ** 0.5)
    assert len(eps.flatten(1).unique(dim=0)) == 300

# ------------------------------------------------------------------------------------------------- rectified flow -----
@contextlib.contextmanager
def doubles():
    """Float64 for what a file makes itself, such as t."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)

def as_column(t, x):
    return t.view(-1, *[1] * (x.dim() - 1))

def rms(x):
    return x.square().mean().sqrt().item()

def test_rectified_flow_direction():
    """(1): t = 0 is noise and t = 1 is data, each image has its own t, and between them the line is straight."""
    for seed, shape in itertools.product(SEEDS, ((5, 3, 4, 4), (5, 2), (5,))):
        x_0, x_1 = normal(2, *shape, seed=seed)
        assert torch.equal(flow.interpolate(x_0, x_1, torch.zeros(5)), x_0)
        assert torch.equal(flow.interpolate(x_0, x_1, torch.ones(5)), x_1)
        t = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64)
        for i, got in enumerate(flow.interpolate(x_0, x_1, t)):
            near(got, x_0[i] + t[i] * (x_1[i] - x_0[i]), 1e-12)

def test_rectified_flow_loss():
    """(2): the network sees X_t and t, the target is X_1 - X_0, and who answers that has no loss."""
    for seed in SEEDS:
        x_0, x_1, guess = normal(3, 4, 2, 4, 4, seed=seed)
        t, spy = torch.tensor([0.1, 0.9, 0.5, 0.3], dtype=torch.float64), Watched(constant(guess))
        loss = flow.loss_flow(spy, x_0, x_1, t)
        near(loss, ((guess - (x_1 - x_0)) ** 2).sum() / (4 * 2 * 4 * 4), 1e-12)
        (x_t, asked_t), = spy
        assert asked_t == t.tolist()
        near(x_t, flow.interpolate(x_0, x_1, t), 0)
        near(flow.loss_flow(constant(x_1 - x_0), x_0, x_1, t), 0)

class Mixture:
    """Numbers from a mixture of Gaussians N(m_k, s_k^2), one in each row of data, and (3) for them in closed form."""
    def __init__(self, *parts):
        self.w, self.m, self.s = torch.tensor(parts, dtype=torch.float64).T  # (K,) each; the weights add up to 1

    def draw(self, n, seed):
        g = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.w, n, True, generator=g)
        return (self.m[k] + self.s[k] * torch.randn(n, generator=g, dtype=torch.float64))[:, None]  # (n, 1)

    def velocity(self, x, t):
        t = t.view(-1, 1)
        var = (t * self.s) ** 2 + (1 - t) ** 2  # of X_t if X_1 is from part k
        share = (self.w.log() - (x - t * self.m) ** 2 / (2 * var) - var.log() / 2).softmax(1)
        return (share * (self.m + (t * self.s**2 - (1 - t)) * (x - t * self.m) / var)).sum(1, keepdim=True)

    def cdf(self, x):
        return (self.w * torch.special.ndtr((x - self.m) / self.s)).sum(1, keepdim=True)

MIXTURES = Mixture((1.0, 0.3, 0.4)), Mixture((0.3, -0.8, 0.2), (0.7, 0.6, 0.3))

def test_rectified_flow_best_velocity():
    """(1), (2), (3): the conditional mean, here in closed form, is where the loss is least: what is left is noise."""
    n = 200_000
    for seed, data in itertools.product(SEEDS, MIXTURES):
        x_0, x_1 = normal(n, 1, seed=seed), data.draw(n, seed + 10)
        t = torch.rand(n, generator=torch.Generator().manual_seed(seed + 20), dtype=torch.float64)
        x_t = (1 - t)[:, None] * x_0 + t[:, None] * x_1
        left = data.velocity(x_t, t) - (x_1 - x_0)
        for g in lambda x, t: torch.ones_like(x), lambda x, t: x, lambda x, t: t[:, None], lambda x, t: (3 * x).sin():
            up, down = (flow.loss_flow(lambda x, t, g=g, d=d, data=data: data.velocity(x, t) + d * g(x, t), x_0, x_1, t)
                        for d in (0.5, -0.5))
            near(up - down, 0, 9 * (left * g(x_t, t)).std() / n**0.5)  # the derivative along g, 4.5 standard errors
            assert min(up, down) > left.square().mean()

def test_rectified_flow_keeps_the_marginals():
    """(4), (5), (6): the best velocity carries N(0, 1) to the data's law, quantile by quantile."""
    z = torch.linspace(-4, 4, 401, dtype=torch.float64)[:, None]
    for data in MIXTURES:
        with doubles():
            x, _ = flow.rk45(data.velocity, z, 1e-7)
            near(data.cdf(x), torch.special.ndtr(z), 1e-5)  # paths on a line cannot cross: rank stays rank
            errors = [(data.cdf(flow.euler(data.velocity, z, N)[0]) - torch.special.ndtr(z)).abs().max().item()
                      for N in (1, 10, 50, 100, 200, 400)]
            assert errors[0] > 0.05  # independent pairs: curved paths, and one step is not enough
            assert all(1.6 < a / b < 2.4 for a, b in zip(errors[2:], errors[3:])), errors  # Euler's order is 1
            x, _ = flow.euler(data.velocity, normal(50_000, 1), 100)
        mean = (data.w * data.m).sum()
        var = (data.w * (data.s**2 + data.m**2)).sum() - mean**2
        near(x.mean(), mean, 0.01)
        near(x.var(), var, 0.02)

def test_rectified_flow_oracle():
    """(5), (6): along straight lines any number of steps is exact, one too, and (7) is 0."""
    for seed, N in itertools.product(SEEDS, (1, 2, 7, 50)):
        x_0, x_1 = normal(2, 3, 2, 2, 2, seed=seed)
        point = x_1[:1]
        with doubles():
            for model, end in ((constant(x_1 - x_0), x_1),
                               (lambda z, t, point=point: (point - z) / as_column(1 - t, z), point)):  # all to one
                x, S = flow.euler(model, x_0, N)
                near(x, end, 1e-12)
                near(S, 0, 1e-10)
            x, calls = flow.rk45(constant(x_1 - x_0), x_0)
            near(x, x_1, 1e-12)
            assert calls < 30  # 0.05, and five times as much each time

def test_rectified_flow_euler_sees():
    """(5): the network is asked at the point where it is, never Z_0 again, and at 0, 1/N, ..., (N - 1)/N; once each."""
    for seed, N in itertools.product(SEEDS, (1, 3, 50)):
        z_0, model = normal(4, 1, 2, 2, seed=seed), lambda z, t: torch.sin(3 * z) + as_column(t, z) * z.flip(-1)
        spy, z, velocities = Watched(model), z_0, []
        with doubles():
            end, S = flow.euler(spy, z_0, N)
        assert len(spy) == N and S.shape == (4,)
        for i, (at, t) in enumerate(spy):
            near(t, [i / N] * 4, 1e-12)
            near(at, z, 1e-12)
            velocities.append(model(z, torch.full((4,), i / N, dtype=torch.float64)))
            z = z + (1 / N) * velocities[-1]
        near(end, z, 1e-12)
        near(S, sum((z - z_0 - v).square().sum((1, 2, 3)) for v in velocities) / N, 1e-10)  # (7) as it stands
        assert (S > 0.01).all() if N > 1 else True

def test_rectified_flow_straightness():
    """(7): 0 for a constant velocity, the variance of v = a t over Euler's times, a sum over pixels, an image each."""
    a, b = normal(2, 3, 2, 2, 2, seed=3)
    for N in 1, 2, 10, 50:
        with doubles():
            near(flow.euler(constant(b), a, N)[1], 0, 1e-12)
            S = flow.euler(lambda z, t: a * as_column(t, z) + b, normal(3, 2, 2, 2), N)[1]
            near(S, (1 - 1 / N**2) / 12 * a.square().sum((1, 2, 3)), 1e-12)
    for seed in SEEDS:  # a network in float32: what is left of a difference
        model = woken(flow.UNet(1, 8, 8, t_max=1), seed).eval()
        assert (flow.euler(model, normal(5, 1, 8, 8, seed=seed).float(), 5)[1] > -1e-4).all()

def test_rectified_flow_dormand_prince():
    """(6): rows sum to c; b meets every condition of order 5 and none more, b less e those of order 4, by all trees."""
    rows = [row for _, row in flow.DORMAND_PRINCE]
    c = np.array([0.0] + [c for c, _ in flow.DORMAND_PRINCE])
    A = np.array([[*row] + [0.0] * (7 - len(row)) for row in [(), *rows]])
    b, e = A[-1], np.array(flow.ERROR_WEIGHTS)
    near(A.sum(1), c, 1e-14)

    def grow(tree):  # a tree is the sorted tuple of its branches; every way to give it one leaf more
        yield tuple(sorted((*tree, ())))
        for i, branch in enumerate(tree):
            yield from (tuple(sorted((*tree[:i], more, *tree[i + 1 :]))) for more in grow(branch))

    size = lambda tree: 1 + sum(map(size, tree))
    gamma = lambda tree: size(tree) * math.prod(map(gamma, tree))
    stages = lambda tree: math.prod((A @ stages(branch) for branch in tree), start=np.ones(7))
    missed, trees = {}, {()}
    for order, count in enumerate((1, 1, 2, 4, 9, 20), 1):
        assert len(trees) == count
        for name, weights in ("b", b), ("b - e", b - e):
            missed[name, order] = max(abs(weights @ stages(tree) - 1 / gamma(tree)) for tree in trees)
        trees = {more for tree in trees for more in grow(tree)}
    assert all((missed["b", order] < 1e-14) == (order <= 5) for order in range(1, 7)), missed
    assert all((missed["b - e", order] < 1e-14) == (order <= 4) for order in range(1, 7)), missed

def spiral(z, t):
    return 6 * torch.stack([-z[:, 1], z[:, 0]], 1)

def bump(z, t):
    return torch.exp(-(((as_column(t, z) - 0.6) / 0.1) ** 2)) * 5 + 0 * z

ODES = {  # name: velocity and its Z_1 as a function of Z_0, (N, 2)
    "growth": (lambda z, t: z, lambda z: z * math.e),
    "spiral": (spiral, lambda z: z @ torch.tensor([[math.cos(6), math.sin(6)], [-math.sin(6), math.cos(6)]])),
    "stiff": (lambda z, t: -20 * (z - torch.cos(as_column(t, z))), lambda z: (z - 400 / 401) * math.exp(-20)
              + (400 * math.cos(1) + 20 * math.sin(1)) / 401),
    "bump": (bump, lambda z: z + 0.25 * math.pi**0.5 * (math.erf(4) + math.erf(6))),
}

def test_rectified_flow_adaptive_solver():
    """(6): with a known answer, the error follows tol and the work grows as tol^(-1/5); calls are counted as made."""
    tols = [1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8]
    for seed, (name, (model, answer)) in itertools.product(SEEDS, ODES.items()):
        z, errors, made = normal(5, 2, seed=seed), [], []
        for tol in tols:
            with doubles():
                spy = Watched(model)
                x, calls = flow.rk45(spy, z, tol)
                errors.append((x - answer(z)).abs().max().item())
            assert calls == len(spy) and x.shape == z.shape, name
            made.append(calls)
        assert all(error < 20 * tol for error, tol in zip(errors, tols)), (name, errors)
        if name != "growth":  # which takes five steps up to 1e-5
            assert 5**5 < errors[0] / errors[-1] < 20**5, (name, errors)
            assert 3 < made[-1] / made[1] < 8, (name, made)  # 10^(4/5) = 6.3, and a start that all have alike

def test_rectified_flow_adaptive_steps():
    """(6): stages are asked at t + c h, steps are judged and changed as it says, and the last ends at 1."""
    with doubles():
        c, e = torch.tensor([1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1]), torch.tensor(flow.ERROR_WEIGHTS)
        for (name, (model, _)), tol in itertools.product(ODES.items(), (1e-3, 1e-4, 1e-6)):
            spy, z_0 = Watched(model), normal(3, 2, seed=1)
            end, calls = flow.rk45(spy, z_0, tol)
            (z, (t, *_)), rejected, due = spy[0], 0, 0.05
            assert t == 0 and torch.equal(z, z_0) and (calls - 1) % 6 == 0
            k_1 = model(*asked(spy[0]))
            for i in range(1, calls, 6):
                h = spy[i + 5][1][0] - t
                near(h, min(due, 1 - t), 1e-9)
                near([time for _, time in spy[i : i + 6]], t + c[:, None].expand(6, 3) * h, 1e-12)
                k = torch.stack([k_1, *(model(*asked(call)) for call in spy[i : i + 6])])
                error = h * (e[:, None, None] * k).sum(0)
                r = rms(error / (tol * (1 + torch.maximum(z.abs(), spy[i + 5][0].abs()))))
                due = h * min(5.0, max(0.2, 0.9 * max(r, 1e-10) ** -0.2))
                if r <= 1:
                    t, z, k_1 = t + h, spy[i + 5][0], k[-1]  # its last point is the next one's first: no call for it
                rejected += r > 1
            near(t, 1, 1e-9)
            assert torch.equal(end, z)
            assert rejected or name != "bump"  # which comes when the step has grown

def asked(call):
    """What a Watched network was asked, as it was asked."""
    return call[0], torch.tensor(call[1])

def test_rectified_flow_solver_gives_up():
    """(6): where no step can be small enough, for NaN or a jump to infinity, the solver says so and ends."""
    for model in lambda z, t: z * math.nan, lambda z, t: 0 * z + as_column(t, z) / 0, lambda z, t: 1e30 * z**2:
        try:
            raise AssertionError(f"it took {flow.rk45(model, torch.ones(2, 3), 1e-3)}")
        except FloatingPointError as e:
            assert "t = 0" in str(e)

def test_rectified_flow_order_of_a_step():
    """(6): what one step misses falls by 2^6 when it is half as long: the fifth order is the one that is kept."""
    for z_0, speed in itertools.product((1.0, 0.5), (8.0, 12.0)):
        errors = []
        for scale in speed, speed / 2, speed / 4:  # dz/dt = scale z cos(scale t), for a step of 0.05
            spy = Watched(lambda z, t, scale=scale: scale * z * torch.cos(scale * as_column(t, z)))
            with doubles():
                flow.rk45(spy, torch.full((1, 1), z_0), 1e9)
            z, t = spy[6]
            near(t, 0.05, 1e-15)
            errors.append(abs(z.item() - z_0 * math.exp(math.sin(0.05 * scale))))
        assert all(45 < a / b < 90 for a, b in zip(errors, errors[1:])), errors

def test_rectified_flow_pairs():
    """(8): x_1 is the image that the flow makes of its own x_0, and that is N(0, I), new in each chunk and seed."""
    model, shape = woken(flow.UNet(1, 8, 8, t_max=1)).eval(), (23, 1, 8, 8)
    x_0, x_1, S = quiet(flow.make_pairs, model, shape, 4, seed=3, chunk=10)
    assert x_0.shape == x_1.shape == shape and S.shape == (23,)
    for part in torch.arange(23).split(10):
        want, straightness = flow.euler(model, x_0[part], 4)
        near(x_1[part], want, 1e-5)
        near(S[part], straightness, 1e-4)
    assert rms(x_1[1:] - x_1[:-1]) > 0.1 and rms(x_1 - x_0) > 0.1  # so that a mix-up would be seen
    same(quiet(flow.make_pairs, model, shape, 4, seed=3, chunk=10)[0], x_0)
    for seed in SEEDS:
        noise = quiet(flow.make_pairs, constant(torch.zeros(1)), (500, 1, 4, 4), 1, seed)[0]
        near(noise.mean(), 0, 5 / 8000**0.5)
        near(noise.var(), 1, 5 * (2 / 8000) ** 0.5)
        assert len(noise.flatten(1).unique(dim=0)) == 500 and not torch.equal(noise[:23, :, :2, :2], x_0[..., :2, :2])
    assert not torch.equal(noise, quiet(flow.make_pairs, constant(torch.zeros(1)), (500, 1, 4, 4), 1)[0])

def test_rectified_flow_training_draws():
    """(2): training takes x_1 from the data in -1 .. 1, fresh N(0, I) for x_0, and logistic-normal times in 0 .. 1."""
    images, seen = torch.arange(0, 200, 20, dtype=torch.uint8).view(10, 1, 1, 1).repeat(1, 1, 8, 8), []

    def loss(model, x_0, x_1, t):
        seen.append((x_0, x_1, t))
        return 0 * next(model.parameters()).sum()

    with mock.patch.object(flow, "loss_flow", loss):
        quiet(flow.train, images, iters=300, batch=8, width=8)
    x_0, x_1, t = (torch.stack(v) for v in zip(*seen))  # (300, 8, ...)
    used, counts = x_1[..., 0, 0, 0].unique(return_counts=True)
    near(used, torch.arange(0, 200, 20) / 127.5 - 1, 1e-6)
    assert (x_1 == x_1[..., :1, :1]).all() and counts.min() > 165  # of 240 each: 165 is five deviations away
    near(x_0.mean(), 0, 5 / x_0.numel() ** 0.5)
    near(x_0.var(), 1, 5 * (2 / x_0.numel()) ** 0.5)
    assert len(x_0.flatten(1).unique(dim=0)) == 300 and len(x_0[0].flatten(1).unique(dim=0)) == 8
    z, normal_ = torch.logit(t.flatten().double()).sort()[0], D.Normal(0.0, 1.0)
    assert t.shape == (300, 8) and 0 < t.min() < 0.06 and 0.94 < t.max() < 1
    near(normal_.cdf(z), (torch.arange(2400) + 0.5) / 2400, 0.02)  # evenly spread, so nearer than free draws would be
    near([z.mean(), z.std()], [0, 1], 0.02)
    assert ((t < 0.5).sum(1) == 4).all()  # in each batch
    assert len(t.argmin(1).unique()) == 8

def test_rectified_flow_reflow_training():
    """(8), (2): with start, training begins at its weights and draws from so many pairs of noise and its image."""
    images, seen = torch.zeros(3, 1, 8, 8, dtype=torch.uint8), []
    for seed in SEEDS:
        start = woken(flow.UNet(1, 8, 8, t_max=1), seed).eval().requires_grad_(False)

        def loss(model, x_0, x_1, t, start=start):
            if not seen:
                same(dict(model.state_dict()), dict(start.state_dict()))
            seen.append((x_0, x_1, t))
            return (0 * next(model.parameters())).sum()

        del seen[:]
        before = {name: p.clone() for name, p in start.state_dict().items()}
        with mock.patch.object(flow, "loss_flow", loss):
            model = quiet(flow.train, images, 40, 4, width=8, seed=seed, start=start, pairs=7, pair_steps=3)
        same(dict(model.state_dict()), before)  # no gradient, no change
        same(dict(start.state_dict()), before)
        x_0, x_1, t = (torch.cat(v) for v in zip(*seen))
        near(t.sort()[0].sqrt(), (torch.arange(160) + 0.5) / 160, 0.15)  # P(t < s) is sqrt(s), in fours evenly spread
        near(x_1, flow.euler(start, x_0, 3)[0], 1e-4)
        assert rms(x_1 - x_0) > 0.1 and len(x_0.flatten(1).unique(dim=0)) == 7

def test_rectified_flow_reflow_straightens():
    """(7), (8): on two clouds in the plane, reflow makes S much smaller and one step much better."""
    def fit(draw, seed):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(),
                                  torch.nn.Linear(64, 2))
        model, opt = lambda z, t: net(torch.cat([z, t.view(-1, 1)], 1)), torch.optim.Adam(net.parameters(), 5e-3)
        for i in range(600):
            opt.param_groups[0]["lr"] = 5e-3 * (1 - i / 600)
            opt.zero_grad()
            flow.loss_flow(model, *draw(), torch.rand(256)).backward()
            opt.step()
        return model

    def clouds():
        x_1 = 0.15 * torch.randn(256, 2)
        x_1[:, 0] += 3 * torch.randint(2, (256,)) - 1.5
        return torch.randn(256, 2), x_1

    def judge(model):
        z = normal(2000, 2, seed=9).float()
        x, S = flow.euler(model, z, 1)[0], flow.euler(model, z, 50)[1]
        return S.mean().item(), ((x[:, 0].abs() - 1.5) ** 2 + x[:, 1] ** 2).mean().item()  # straightness, miss

    for seed in 0, 1:
        first = fit(clouds, seed)
        noise, images, S = quiet(flow.make_pairs, first, (4000, 2), 30, seed, chunk=4000)

        def pairs(noise=noise, images=images):
            index = torch.randint(4000, (256,))
            return noise[index], images[index]

        second = fit(pairs, seed)
        (S_1, miss_1), (S_2, miss_2) = judge(first), judge(second)
        near(S.mean(), S_1, 0, 0.1)  # make_pairs measured the same, on other noise
        assert S_1 > 0.3 and S_2 < S_1 / 6 and miss_2 < miss_1 / 3, (S_1, S_2, miss_1, miss_2)

def test_rectified_flow_reflow_stops_and_resumes():
    """A reflow stopped half-way ends with the same bits; a finished one makes no pairs again and trains nothing."""
    words, _, files = finished(flow)  # its first flow is there already
    words = [*words, "--reflow", "1", "--pairs", "7"]
    with workdir() as here:
        unpack(files, here)
        assert call(flow, words)[0] == 0
        whole = snapshot(here)
        unchanged = mock.patch.object(flow, "make_pairs", side_effect=AssertionError("pairs again"))
        with unchanged, mock.patch.object(torch.Tensor, "backward", side_effect=AssertionError("it trains")):
            status, _, err = call(flow, words)
        assert status == 0 and not changed(whole, snapshot(here)), err
    with workdir() as here:
        unpack(files, here)
        with stopped_at(flow, 115, 130), hurried(flow):
            assert call(flow, words)[0] == 130
        assert torch.load(here / "run/reflow1/model.pt", weights_only=True)["done"] == 100
        assert call(flow, words)[0] == 0
        path = "run/reflow1/model.pt"
        same(*(torch.load(io.BytesIO(run[path]), weights_only=True) for run in (whole, snapshot(here))))
        assert changed(whole, snapshot(here)) in ([], [path])  # a pickle of equal tensors may be laid out otherwise
        wrong = [refused(flow, [*words, "--pairs", "8"], "pairs 7, not 8.*--fresh", here)]
    assert not any(wrong), wrong
    assert files["run/samples.npy"] != whole["run/samples.npy"] and files["run/model.pt"] == whole["run/model.pt"]

def test_rectified_flow_sample():
    """sample() draws all it was asked for, chunk by chunk, with either solver, and counts what each image took."""
    model, draw = (lambda z, t: torch.sin(3 * z) - z), functools.partial(quiet, flow.sample)
    for flags in {"steps": 7}, {"solver": "rk45", "tol": 1e-4}:
        spy = Watched(model)
        x, calls = draw(spy, (5, 1, 2, 2), **flags, chunk=2)
        assert x.shape == (5, 1, 2, 2) and len(x.flatten(1).unique(dim=0)) == 5
        near(calls, sum(len(z) for z, _ in spy) / 5, 1e-9)
        assert calls == 7 or "tol" in flags and calls > 12
        noise = torch.cat([z for z, t in spy if t[0] == 0])
        near(x, torch.cat([flow.euler(model, z, 7)[0] if "steps" in flags else flow.rk45(model, z, 1e-4)[0]
                           for z in noise.split(2)]), 1e-6)
        assert torch.equal(x, draw(model, (5, 1, 2, 2), **flags, chunk=2)[0])
        assert not torch.equal(x, draw(model, (5, 1, 2, 2), **flags, chunk=2, seed=1)[0])
    fine = draw(model, (5, 1, 2, 2), solver="rk45", tol=1e-6, chunk=2)
    assert fine[1] > calls and not torch.equal(fine[0], x)
    near(fine[0], x, 1e-2)

def test_rectified_flow_command():
    """--reflow 2 trains each flow from the one before, samples the last, and steps.png shows each in 1, 2, 5, 50."""
    starts, real, real_load = [], flow.train, flow.load
    curve = lambda model, path: woken(model, sum(map(ord, str(path))))  # each otherwise
    load = lambda path, device="cpu": curve(real_load(path, device), path)

    @functools.wraps(real)
    def train(*args, **kwargs):
        given = inspect.signature(real).bind(*args, **kwargs).arguments
        starts.append(given.get("start"))
        return curve(real(*args, **kwargs), given["path"])

    with workdir() as here, mock.patch.multiple(flow, train=train, load=load):
        grey(here)
        words = command(flow, data="pics", reflow=2, pairs=5, steps=3, seed=4, lr=0.5)
        status, out, err = call(flow, words)
        assert (status, err) == (0, ""), err
        models = [flow.load(Path("run", name, "model.pt")) for name in (".", "reflow1", "reflow2")]
        assert starts[0] is None
        for start, model in zip(starts[1:], models):
            same(start.state_dict(), model.state_dict())
        assert np.array_equal(np.load("run/samples.npy"),
                              flow.to_uint8(quiet(flow.sample, models[2], (2, 1, 8, 8), 3, seed=4)[0])[:, 0])
        z = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(4))
        drawn = [flow.euler(model, z, N) for model in models for N in (1, 2, 5, 50)]
        alike(tiles("run/steps.png", 8, 12), flow.to_uint8(torch.cat([x[:12] for x, _ in drawn]))[:, 0].numpy())
        measured = re.findall(r"straightness after (\d) reflows: S = ([\d.]+)", out)
        assert [k for k, _ in measured] == ["0", "1", "2"]
        near([float(S) for _, S in measured], [S.mean() for _, S in drawn[3::4]], 0.0051)  # two digits
        assert "2 samples, 3 evaluations each" in out
        words = command(flow, data="pics", reflow=2, pairs=5, seed=4, lr=0.5, solver="rk45", tol=1e-4)
        status, out, err = call(flow, words)
        want, calls = quiet(flow.sample, models[2], (2, 1, 8, 8), solver="rk45", tol=1e-4, seed=4)
        assert (status, err) == (0, "") and f"{calls:.0f} evaluations each" in out
        assert np.array_equal(np.load("run/samples.npy"), flow.to_uint8(want)[:, 0])

def test_rectified_flow_bad_values():
    """What cannot be solved, and a checkpoint of another file, is refused before anything is trained."""
    bad = [("--steps", "0", "--steps"), ("--steps", "-2", "--steps"), ("--tol", "0", "--tol"), ("--tol", "-1", "--tol"),
           ("--tol", "nan", "--tol"), ("--reflow", "-1", "--reflow"), ("--pairs", "0", "--pairs"),
           ("--solver", "magic", "--solver")]
    with workdir() as here:
        words = command(flow, **inputs(here))
        with mock.patch.object(flow, "train", autospec=True, side_effect=AssertionError("it trains")):
            wrong = [refused(flow, [*words, f"{name}={value}"], say, here) for name, value, say in bad]
        quiet(ddpm.train, grey(here), iters=1, batch=2, width=8, path=here / "run" / "model.pt")
        wrong += [refused(flow, words, "ddpm.py", here)]
        try:
            wrong += [f"load took it: {flow.load('run/model.pt')}"]
        except ValueError as e:
            assert "ddpm.py" in str(e)
    assert not any(wrong), "\n".join(filter(None, wrong))

# ------------------------------------------------------------------------------------------------------------ vae -----
vae = MODULES["vae"]

class LinearGaussian:
    """x = W z + b + s noise, six numbers from three: all is known of it. Its q is the posterior, or not."""
    def __init__(self, seed, exact):
        W, self.b, self.s, one = normal(6, 3, seed=seed), normal(6, seed=seed + 9), 0.7, torch.eye(6).double()
        self.W = torch.linalg.qr(W)[0] * torch.tensor([0.5, 1.0, 2.0]).double() if exact else W
        self.marginal = D.MultivariateNormal(self.b, self.W @ self.W.T + self.s**2 * one)
        self.cov = torch.linalg.inv(one[:3, :3] + self.W.T @ self.W / self.s**2)  # of z given x
        wide = torch.linalg.eigvalsh(self.cov)[-1] * torch.tensor([1.1, 1.3, 1.6]).double()
        self.log_var = (self.cov.diagonal() if exact else wide).log()  # wide enough that no weight is huge
        self.off, self.asked = 0.0 if exact else 0.2, []

    def posterior(self, x):
        return D.MultivariateNormal((x - self.b) @ self.W @ self.cov / self.s**2, self.cov)

    def encode(self, x):
        self.asked.append("encode")
        mu = self.posterior(x).mean + self.off
        return mu, self.log_var.expand_as(mu)

    def log_likelihood(self, x, z):
        self.asked.append(len(x))
        return D.Normal(z @ self.W.T + self.b, self.s).log_prob(x).sum(1)

def wakened(*shape, seed=0):
    """A VAE whose weights are as if trained, in float64 and eval mode; zeros and ones in its images' shape, five."""
    model = woken(vae.VAE(*shape), seed).double().requires_grad_(False).eval()
    return model, (normal(5, *model.shape, seed=seed) > 0).double()

def cubature(model, x, f):
    """The mean of f(model, x, eps), exact if in eps it is a polynomial of degree three at most."""
    points = 3**0.5 * torch.cat([torch.eye(3), -torch.eye(3)]).double()
    return torch.stack([f(model, x, eps.expand(len(x), 3)) for eps in points]).mean(0)

def refuses(say, function, *args, **kwargs):
    """The function raises a ValueError that says so."""
    try:
        raise AssertionError(f"it took {args}: {function(*args, **kwargs)}")
    except ValueError as e:
        assert re.search(say, str(e)), e

def test_vae_binarise():
    """(8): each byte k becomes 1 as often as k / 255, 0 never and 255 always, pixel by pixel, anew at each call."""
    n = 4000
    images, p = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16), torch.arange(256).double() / 255
    for seed in SEEDS:
        x = vae.binarise(images.expand(n, -1, -1, -1), torch.Generator().manual_seed(seed))
        assert x.shape == (n, 1, 16, 16) and x.dtype == torch.float32 and set(x.unique().tolist()) == {0, 1}
        ones = x.double().mean(0).flatten()
        near((ones - p) / ((p * (1 - p) / n).sqrt() + 1e-9), 0, 5)  # 5 standard errors: 768 comparisons; the ends exact
        rest = (x.double().flatten(1) - p)[:, 1:-1] / (p * (1 - p))[1:-1].sqrt()
        near((rest[:, 1:] * rest[:, :-1]).mean(0), 0, 5.5 / n**0.5)  # neighbours are drawn apart
        near((rest[1:] * rest[:-1]).mean(0), 0, 5.5 / n**0.5)
    again = vae.binarise(images.expand(n, -1, -1, -1), torch.Generator().manual_seed(seed))
    assert torch.equal(x, again)
    torch.manual_seed(0)
    one, two = vae.binarise(images), vae.binarise(images)
    assert not torch.equal(one, two)
    for floats in images / 255, vae.to_float(images):
        refuses("uint8.*float32", vae.binarise, floats)

def test_vae_reparameterise():
    """(4): z has the law of q, and averages over eps have the gradients of their closed forms."""
    nodes, weights = (torch.from_numpy(v).view(-1, 1) for v in np.polynomial.hermite_e.hermegauss(60))
    weights = weights / weights.sum()  # averages over N(0, 1), to all digits
    for seed in SEEDS:
        mu, log_var = normal(2, 1, 7, seed=seed).requires_grad_()
        sigma = (log_var / 2).exp()
        closed = {"square": mu**2 + sigma**2, "cos": mu.cos() * (-(sigma**2) / 2).exp(),
                  "exp": (mu + sigma**2 / 2).exp()}
        for name, want in closed.items():
            z = vae.reparameterise(mu, log_var, nodes)
            assert z.shape == (60, 7)
            got = (weights * getattr(torch, name)(z)).sum(0)
            near(got.detach(), want[0].detach(), 1e-9, 1e-9)
            for a, b in zip(*(torch.autograd.grad(v.sum(), (mu, log_var), retain_graph=True) for v in (got, want))):
                near(a, b, 1e-9, 1e-9)
                assert (b != 0).all()
    n = 100_000
    z = vae.reparameterise(mu.detach(), log_var.detach(), normal(n, 7))
    near(z.mean(0), mu.detach()[0], 5 * sigma.max().item() / n**0.5)
    near(z.var(0) / sigma.detach()[0] ** 2, 1, 5 * (2 / n) ** 0.5)

def test_vae_kl():
    """(5): against torch's own, summed over the latents, and against its definition by Monte Carlo; 0 at the prior."""
    n = 100_000
    for seed in SEEDS:
        mu, log_var = normal(2, 5, 3, seed=seed)
        q, p = D.Normal(mu, (log_var / 2).exp()), D.Normal(torch.zeros(3).double(), 1.0)
        got = vae.kl_normal(mu, log_var)
        assert got.shape == (5,)
        near(got, D.kl_divergence(q, p).sum(1), 0, 1e-12)
        z = q.loc + q.scale * normal(n, 5, 3, seed=seed + 9)
        draws = (q.log_prob(z) - p.log_prob(z)).sum(2)
        assert ((got - draws.mean(0)).abs() < 4.5 * draws.std(0) / n**0.5).all()
        assert (draws.std(0) / n**0.5 < 0.02 * got).all()  # so that this says something
    near(vae.kl_normal(0 * mu, 0 * log_var), 0)

def test_vae_log_bernoulli():
    """(6): against torch's own; all 64 images of six pixels share out all probability; far out it stays right."""
    for seed, shape in itertools.product(SEEDS, ((4, 1, 5, 5), (3, 3, 4, 4), (2, 7))):
        logits, x = 4 * normal(*shape, seed=seed), (normal(*shape, seed=seed + 9) > 0).double()
        want = D.Bernoulli(logits=logits).log_prob(x).flatten(1).sum(1)
        near(vae.log_bernoulli(x, logits), want, 1e-6)  # beyond 20 softplus is a straight line
        near(vae.log_bernoulli(x.float(), logits.float()), want, 1e-4)
        twice = vae.log_bernoulli(torch.cat([x, x], -1), torch.cat([logits, logits], -1))
        near(twice, 2 * want, 1e-6)  # a sum over the pixels and no mean
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 6).view(64, 1, 2, 3)
    near(vae.log_bernoulli(every, normal(1, 1, 2, 3)).exp().sum(), 1, 1e-12)
    for far in 30.0, 100.0, 1e4:
        logits, x = torch.tensor([[far], [-far], [far], [-far]]), torch.tensor([[1.0], [0.0], [0.0], [1.0]])
        near(vae.log_bernoulli(x, logits), torch.tensor([0, 0, -far, -far]), 1e-9)

def test_vae_elbo_of_a_known_model():
    """(3): for a linear model it is log p(x) - KL(q || p(z|x)), and its parts are their closed forms."""
    for seed, exact in itertools.product(SEEDS, (True, False)):
        model = LinearGaussian(seed, exact)
        x = 2 * normal(4, 6, seed=seed)
        mu, log_var = model.encode(x)
        mean = functools.partial(cubature, model, x)
        gap = D.kl_divergence(D.MultivariateNormal(mu, torch.diag_embed(log_var.exp())), model.posterior(x))
        near(mean(vae.elbo), model.marginal.log_prob(x) - gap, 1e-10)
        assert (gap.abs() < 1e-12).all() if exact else (gap > 0.1).all()
        spread = ((model.W**2) @ log_var[0].exp()).sum() / (2 * model.s**2)
        fit = D.Normal(mu @ model.W.T + model.b, model.s).log_prob(x).sum(1) - spread
        kl = D.kl_divergence(D.Normal(mu, (log_var / 2).exp()), D.Normal(0.0, 1.0)).sum(1)
        near(mean(lambda *args: torch.stack(vae.elbo_parts(*args))), torch.stack([fit, kl]), 1e-10)
        n = 20_000
        torch.manual_seed(seed)
        draws = vae.elbo(model, x[:1].expand(n, 6))  # with eps of its own
        near(draws.mean(), mean(vae.elbo)[0], 4.5 * draws.std() / n**0.5 + 1e-9)
        assert draws.shape == (n,) and len(draws.unique()) > n / 2

def test_vae_loss():
    """(3), (7): the loss of the network against torch's own laws; more of the same images do not change it."""
    for seed, shape in itertools.product(SEEDS, ((1, 6, 8, 3), (3, 4, 8, 2))):
        model, x = wakened(*shape, seed=seed)
        eps = normal(5, shape[-1], seed=seed + 9)
        mu, log_var = model.encode(x)
        q = D.Normal(mu, (log_var / 2).exp())
        fit = D.Bernoulli(logits=model.decode(q.loc + q.scale * eps)).log_prob(x).sum((1, 2, 3))
        kl = D.kl_divergence(q, D.Normal(0.0, 1.0)).sum(1)
        near(torch.stack(vae.elbo_parts(model, x, eps)), torch.stack([fit, kl]), 1e-6)
        near(vae.elbo(model, x, eps), fit - kl, 1e-6)
        want = [(kl - fit).mean(), fit.mean(), kl.mean()]
        for copies in 1, 2, 5:
            near(vae.loss_elbo(model, x.repeat(copies, 1, 1, 1), eps.repeat(copies, 1)), want, 1e-6)

def test_vae_loss_in_training():
    """(7): the loss that train() logs is in nats per image whatever the batch, and the parts stand beside it."""
    images, logged = 255 * torch.ones(3, 1, 8, 8, dtype=torch.uint8), {}  # nothing to draw, white is white
    for batch in 2, 200:
        with workdir() as here:
            quiet(vae.train, images, iters=30, batch=batch, lr=1e-12, width=8, latent=2, path=here / "model.pt")
            head, row = (line.split(",") for line in (here / "log.csv").read_text().split())
        assert head == ["iteration", "loss", "reconstruction", "kl"]
        loss, fit, kl = logged[batch] = [float(v) for v in row[1:]]
        near(loss, kl - fit, 1e-5)
    near(logged[2], logged[200], 0.2)
    near(logged[2][1], -64 * math.log(2), 6)  # untrained, a pixel may be either

def test_vae_bound_of_a_known_posterior():
    """(9): if q is the posterior, every draw weighs the same: the bound is log p(x) for each K, and so is the ELBO."""
    for seed in SEEDS:
        model = LinearGaussian(seed, exact=True)
        x = 2 * normal(4, 6, seed=seed)
        want = model.marginal.log_prob(x)
        for k, chunk in itertools.product((1, 2, 7, 500), (1, 10, 2000)):
            near(vae.log_prob(model, x, k, torch.Generator().manual_seed(seed), chunk), want, 1e-10)
        near(cubature(model, x, vae.elbo), want, 1e-10)

def test_vae_bound_rises():
    """(9): with a poorer q the bound starts at the ELBO, rises with K, reaches log p(x); the mean of w_k is p(x)."""
    n, counts = 4000, (1, 2, 4, 16, 64, 256)
    for seed in SEEDS:
        model, generator = LinearGaussian(seed, exact=False), torch.Generator().manual_seed(seed)
        x = 2 * normal(1, 6, seed=seed)
        log_p, x = model.marginal.log_prob(x), x.expand(n, 6)
        torch.manual_seed(seed)
        elbo, *bounds = vae.elbo(model, x), *(vae.log_prob(model, x, k, generator) for k in counts)
        mean, error = zip(*((b.mean().item(), b.std().item() / n**0.5) for b in (elbo, *bounds)))
        near(mean[0], mean[1], 4.5 * math.hypot(error[0], error[1]))
        for i in range(1, 5):  # beyond it is there
            assert mean[i + 1] - mean[i] > 3 * math.hypot(error[i], error[i + 1]), (seed, counts[i], mean, error)
        assert 0.1 < log_p - mean[1] and abs(log_p - mean[-1]) < 0.02, (log_p, mean)
        for bound in bounds:
            ratio = (bound - log_p).exp()
            near(ratio.mean(), 1, 4.5 * ratio.std() / n**0.5)
        near(vae.log_prob(model, x[:2], 50_000, generator, 50_000), log_p, 0.02)

def test_vae_bound_uses_every_draw():
    """(9): in pieces of any size, the K draws of each image and no others, each weighed as torch's laws say."""
    real = torch.randn
    randn = lambda *shape, **kwargs: drawn.append(real(*shape, **kwargs)) or drawn[-1]
    for (k, n), chunk in itertools.product(((1, 1), (7, 3), (20, 3), (20, 1)), (1, 6, 9, 2000)):
        model, x, drawn = LinearGaussian(k, exact=False), normal(n, 6, seed=k), []
        mu, log_var = model.encode(x)
        del model.asked[:]
        state = torch.get_rng_state()
        with mock.patch.object(torch, "randn", randn):
            got = vae.log_prob(model, x, k, torch.Generator().manual_seed(1), chunk)
        assert torch.equal(state, torch.get_rng_state())  # only its own generator
        assert model.asked[0] == "encode" and max(model.asked[1:]) <= max(n, chunk), model.asked  # once; in bounds
        assert len(model.asked) - 1 == math.ceil(k / max(1, chunk // n))
        eps, q = torch.cat(drawn), D.Normal(mu, (log_var / 2).exp())
        assert eps.shape == (k, n, 3) and len(eps.unique()) == eps.numel()
        z = q.loc + q.scale * eps
        log_p = D.Normal(z @ model.W.T + model.b, model.s).log_prob(x).sum(2)
        log_w = log_p + (D.Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)).sum(2)
        assert got.shape == (n,)
        near(got, log_w.logsumexp(0) - math.log(k), 1e-10)
    model.log_likelihood = lambda x, z: torch.full((len(x),), -1e6).double()  # nothing underflows
    near(vae.log_prob(model, x, 50, torch.Generator()), -1e6, 30)
    for k in 0, -1:
        refuses(f"k = {k}", vae.log_prob, model, x, k)

def test_vae_bound_of_the_network():
    """(9): two latents can be integrated on a grid; the bound on the network's log p(x) goes there, below it before."""
    z = torch.linspace(-7, 7, 281, dtype=torch.float64)
    z, area = torch.cartesian_prod(z, z), (z[1] - z[0]).item() ** 2
    prior = D.Normal(0.0, 1.0).log_prob(z).sum(1)
    for seed in SEEDS:
        model, x = wakened(1, 4, 8, 2, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        every = torch.stack([prior + D.Bernoulli(logits=model.decode(z)).log_prob(v).sum((1, 2, 3)) for v in x])
        log_p = every.logsumexp(1) + math.log(area)
        one, many = (vae.log_prob(model, x.repeat(50, 1, 1, 1), k, generator).view(50, 5) for k in (1, 500))
        assert one.mean() < many.mean() < log_p.mean() + 0.01
        assert ((many.mean(0) - log_p).abs() < 5 * many.std(0) / 50**0.5 + 0.01).all()  # and a bias like 1/K

def test_vae_active_latents():
    """(10): in use is where mu varies over the images by more than 0.01, whatever its mean; one image has none."""
    for n in 2, 1001:
        mu = normal(n, 4)
        mu = (mu - mu.mean(0)) / mu.std(0, correction=0) * torch.tensor([0.0099, 0.0101, 1.0, 0.0]).sqrt() + 3
        assert vae.active_latents(mu).tolist() == [False, True, True, False]
    assert not vae.active_latents(normal(1, 4)).any()

def test_vae_latent_plane():
    """(11): the normal CDF of the points is an even grid, in each latent and all together."""
    for side in 1, 2, 20:
        z = vae.latent_plane(side).double()
        even = (torch.arange(side).double() + 0.5) / side
        near(D.Normal(0.0, 1.0).cdf(z), torch.stack([even.repeat_interleave(side), even.repeat(side)], 1), 1e-6)

def test_vae_network():
    """(2): any size and channels; no image sees its neighbours; each weight counts; what is not binary is refused."""
    for channels, size, latent in itertools.product((1, 3), (1, 7, 8, 28), (1, 4)):
        model, x = wakened(channels, size, 8, latent)
        assert model.shape == (channels, size, size) and model.latent == latent
        (mu, log_var), z = model.encode(x), normal(5, latent)
        assert mu.shape == log_var.shape == (5, latent) and model.decode(z).shape == x.shape
        near(torch.stack(model.encode(x[1:2]))[:, 0], torch.stack([mu, log_var])[:, 1], 1e-12)
        near(model.decode(z[1:2])[0], model.decode(z)[1], 1e-12)
        near(model.log_likelihood(x, z), D.Bernoulli(logits=model.decode(z)).log_prob(x).sum((1, 2, 3)), 1e-5)
        model.requires_grad_(True).train()
        (vae.loss_elbo(model, x, z)[0]).backward()
        for name, p in model.named_parameters():
            assert p.grad.any() and (size < 7 or p.dim() == 1 or (p.grad != 0).double().mean() > 0.9), name
    model, x = wakened(1, 4, 8, 2)
    for odd in -1.0, 0.5, 1.5, math.nan, math.inf:
        bad = x.clone()
        bad[3, 0, 1, 2] = odd
        for use in vae.elbo, vae.elbo_parts, functools.partial(vae.log_prob, k=2):
            refuses(f"binarise.* {odd:g} ", use, model.eval(), bad)
        assert len(vae.elbo(model.train(), bad)) == 5  # in training no step waits for the check
    refuses("binarise", vae.elbo, model.eval(), 2 * x - 1)

def test_vae_sample():
    """(1): z is N(0, I), new for each image and seed; the pictures are chances, -1 for never and 1 for always."""
    model, _ = wakened(1, 1, 8, 1)
    model.float().decode = lambda z: z.view(-1, 1, 1, 1)
    draw = functools.partial(vae.sample, model)
    for seed in SEEDS:
        y = (draw(20_000, seed).double() + 1) / 2
        z = (y / (1 - y)).log()
        near(z.mean(), 0, 5 / 20_000**0.5)
        near(z.var(), 1, 5 * (2 / 20_000) ** 0.5)
        assert y.shape == (20_000, 1, 1, 1) and len(z.unique()) > 19_000
    assert torch.equal(draw(7, 1), draw(7, 1)) and not torch.equal(draw(7, 1), draw(7, 2))
    near(draw(7, 1, chunk=3), draw(7, 1), 1e-6)
    model, _ = wakened(3, 4, 8, 2)
    want = 2 / (1 + (-model.decode(normal(6, 2))).exp()) - 1
    near(vae.chances(model, normal(6, 2)), want, 1e-12)
    assert vae.sample(model.float(), 5).shape == (5, 3, 4, 4)

def test_vae_evaluate():
    """The test's numbers are those of the functions, for all images, chunk by chunk, the same at each call."""
    model, x = wakened(1, 4, 8, 2)
    model, x = model.float(), x.float().repeat(5, 1, 1, 1)[:23]
    drawn, real = [], vae.elbo_parts
    with mock.patch.object(vae, "elbo_parts", lambda *args: drawn.append(args) or real(*args)):
        nats = quiet(vae.evaluate_elbo, model, x, chunk=10)
    assert nats.shape == (23, 2) and [len(part) for _, part, _ in drawn] == [10, 10, 3]
    _, parts, eps = zip(*drawn)
    assert torch.equal(torch.cat(parts), x) and len(torch.cat(eps).unique()) == 46
    near(nats, torch.stack(real(model, x, torch.cat(eps)), 1), 1e-4)
    assert torch.equal(nats, quiet(vae.evaluate_elbo, model, x, chunk=10))
    assert not torch.equal(nats, quiet(vae.evaluate_elbo, model, x, seed=1, chunk=10))
    nats = quiet(vae.evaluate_elbo, model, x, 1000, chunk=10)
    assert nats.shape == (23, 3)
    near(nats[:, 2], vae.log_prob(model, x, 1000), 0.5)

def test_vae_training_draws():
    """(8): training sees all images, as zeros and ones, drawn anew each time that an image comes."""
    images, seen = torch.tensor([0, 51, 102, 255], dtype=torch.uint8).view(4, 1, 1, 1).repeat(1, 1, 8, 8), []

    def loss(model, x, eps=None):
        seen.append(x)
        return 0 * next(model.parameters()).sum() + torch.zeros(3)

    with mock.patch.object(vae, "loss_elbo", loss):
        quiet(vae.train, images, iters=300, batch=10, width=8)
    x = torch.cat(seen)
    assert x.shape == (3000, 1, 8, 8) and set(x.unique().tolist()) == {0, 1}
    ones = x.double().mean((1, 2, 3))
    for p, low, high in (0.0, -1, 0.03), (0.2, 0.03, 0.3), (0.4, 0.3, 0.65), (1.0, 0.97, 2):
        kind = ones[(ones >= low) & (ones < high)]
        near(len(kind), 750, 5 * 25)  # a quarter of all; 0.3 is two deviations from either of its neighbours
        near(kind.mean(), p, 0.02)
    grey = x[(ones > 0.03) & (ones < 0.97)].flatten(1)
    assert len(grey.unique(dim=0)) == len(grey)  # never the same twice

def test_vae_training_learns():
    """On a few digits, 300 steps of a tiny network cut the loss, and the averaged network profits."""
    images = vae.draw_digits(4, 8)
    with workdir() as here:
        average = quiet(vae.train, images, iters=300, batch=8, lr=5e-3, width=64, latent=4, path=here / "model.pt")
        first, *_, last = (float(row.split(",")[1]) for row in (here / "log.csv").read_text().split()[1:])
    x = vae.binarise(images.repeat(100, 1, 1, 1))
    assert last < 0.7 * first and -vae.elbo(average, x).mean() < 0.7 * first, (first, last)
    mu = average.encode(x)[0].view(100, 4, -1)
    assert (mu.mean(0).var(0) > mu.var(0).mean(0)).any()  # some latent tells the digits apart

def test_vae_training_averages_the_weights():
    """What is returned and loaded is the moving average of all weights, whose memory grows; the seed decides it."""
    flat = lambda parameters: torch.cat([p.detach().flatten() for p in parameters]).double()
    images, real, passed = vae.draw_digits(8, 8), vae.loss_elbo, []
    with workdir() as here:
        spy = lambda model, x: passed.append(flat(model.parameters())) or real(model, x)
        with mock.patch.object(vae, "loss_elbo", spy):
            average = quiet(vae.train, images, iters=20, batch=2, lr=0.1, width=8, path=here / "model.pt")
        last, _, _ = torch.load(here / "model.pt", weights_only=True)["parts"]
        loaded = vae.load(here / "model.pt")
    want = passed[0]
    for i, weights in enumerate([*passed[1:], flat(last.values())]):
        memory = min(0.995, (1 + i) / (10 + i))
        want = memory * want + (1 - memory) * weights
    near(flat(average.parameters()), want, 1e-6)
    assert (want - weights).norm() > 0.01 * weights.norm()  # so that this says something
    same(average.state_dict(), loaded.state_dict())
    assert not loaded.training and not average.training and loaded.shape == (1, 8, 8)
    train = functools.partial(quiet, vae.train, images, iters=20, batch=2, lr=0.1, width=8)
    again, other = (train(seed=seed).state_dict() for seed in (0, 1))
    same(dict(average.state_dict()), dict(again))
    assert not any(torch.equal(again[name], other[name]) for name in again)

def test_vae_command():
    """The run's figures and pictures are those of its model on the whole test set, binarised alike for every --seed."""
    sets, real, real_load = [], vae.evaluate_elbo, vae.load
    load = lambda path, device="cpu": woken(real_load(path, device))  # as if trained: each image its own code

    def evaluate(model, x, *args):
        sets.append(x)
        return real(model, x, *args)

    with workdir() as here, mock.patch.multiple(vae, evaluate_elbo=evaluate, load=load):
        grey(here, 300)
        for seed in 4, 5:
            words = command(vae, data="pics", seed=seed, samples=3, out=f"run{seed}", latent=2, nll=50 * (seed == 4))
            status, out, err = call(vae, words)
            assert (status, err) == (0, ""), err
            assert ("draws" in out) == (seed == 4)
            model = vae.load(Path(f"run{seed}", "model.pt"))
            figures = [[float(v) for v in re.findall(r"-?\d+\.\d+", line)] for line in out.splitlines()[3:-1]]
            nats = quiet(real, model, sets[-1], 50 * (seed == 4)).double()
            values = torch.cat([nats[:, :1] - nats[:, 1:2], nats], 1)
            mean, error = values.mean(0), values.std(0, correction=0) / 30**0.5
            near(figures[0], [mean[0], error[0], mean[1], mean[2]], 0.0051)  # two digits
            near(figures[1] if seed == 4 else [], [mean[3], error[3]] if seed == 4 else [], 0.0051)
            mu = model.encode(sets[-1])[0]
            assert f"{(mu.var(0, correction=0) > 0.01).sum()} of 2 latents" in out
            run = Path(f"run{seed}")
            assert np.array_equal(np.load(run / "samples.npy"), vae.to_uint8(vae.sample(model, 3, seed))[:, 0])
        assert torch.equal(*sets) and len(sets[0]) == 30
        near(sets[0].mean(), vae.load_images("pics", 8, test=True).double().mean() / 255, 0.05)
        shown, pictures = torch.arange(32) % 30, lambda z: vae.to_uint8(2 * model.decode(z).sigmoid() - 1)[:, 0].numpy()
        pairs, walk = tiles(run / "reconstructions.png", 8, 8), tiles(run / "walk.png", 8, 10).reshape(8, 10, 8, 8)
        assert np.array_equal(pairs[::2], vae.to_uint8(2 * sets[1][shown] - 1)[:, 0])
        alike(pairs[1::2], pictures(mu[shown]))
        assert np.array_equal(walk[:, 0], pairs[:32:4]) and np.array_equal(walk[:, 9], pairs[2:32:4])
        for i, share in enumerate(np.linspace(0, 1, 8)):
            alike(walk[:, 1 + i], pictures((1 - share) * mu[:16:2] + share * mu[1:16:2]))
        u = (np.arange(20) + 0.5) / 20
        z = D.Normal(0.0, 1.0).icdf(torch.tensor([(a, b) for a in u for b in u]).float())
        alike(tiles(run / "manifold.png", 8, 20), pictures(z))
        assert len(np.unique(pairs[1::2], axis=0)) > 20  # so that a mix-up would be seen

def test_vae_bad_values():
    """What cannot be is refused: flags, images that are not square, a checkpoint of another file or another latent."""
    with workdir() as here:
        words, bad = command(vae, **inputs(here)), (("--latent", "0"), ("--nll", "-1"), ("--nll", "few"))
        with mock.patch.object(vae, "train", autospec=True, side_effect=AssertionError("it trains")):
            wrong = [refused(vae, [*words, f"{name}={value}"], name, here) for name, value in bad]
        assert call(vae, [*words, "--latent", "3"])[0] == 0
        wrong += [refused(vae, [*words, "--latent", "2"], "latent 3, not 2.*--fresh", here)]
        assert not (here / "run" / "manifold.png").exists()
        quiet(ddpm.train, grey(here), iters=1, batch=2, width=8, path=here / "run" / "model.pt", fresh=True)
        wrong += [refused(vae, words, "ddpm.py", here)]
        refuses("ddpm.py", vae.load, here / "run" / "model.pt")
    assert not any(wrong), "\n".join(filter(None, wrong))
    refuses("12x8", vae.train, torch.zeros(4, 1, 8, 12, dtype=torch.uint8), iters=1)

# ----------------------------------------------------------------------------------------------------------- nice -----
LOGISTIC = D.TransformedDistribution(D.Uniform(*torch.tensor([0.0, 1.0], dtype=torch.float64), validate_args=False),
                                     [D.SigmoidTransform().inv])
SHAPES = [(1, 2), (1, 3), (2, 1), (3, 1), (3, 3), (1, 5)]  # channels and size: D = 4, 9, 2, 3, 27, 25

def some_nice(channels=1, size=3, layers=2, couplings=4, seed=0, width=16):
    """A NICE in float64 whose weights and scales are nowhere zero."""
    return woken(nice.NICE(channels, size, width, layers, couplings), seed).double()

def wary(function, *args):
    """Its ValueError as text."""
    try:
        raise AssertionError(f"took it: {function(*args)}")
    except ValueError as e:
        return str(e)

def test_nice_log_det():
    """(1), (2), (3), (5): log_det is slogdet of autograd's Jacobian, for odd and even D and any number of couplings."""
    jacobian = torch.autograd.functional.jacobian
    for (channels, size), couplings in itertools.product(SHAPES, (1, 2, 3, 4, 5)):
        model, n = some_nice(channels, size, 1 + couplings % 3, couplings, couplings), channels * size * size
        x = normal(2, channels, size, size, seed=couplings)
        h, log_det = model(x)
        assert h.shape == (2, n) and log_det.shape == (2,)
        same(h, model(x.flatten(1))[0])  # either shape of x
        J = jacobian(lambda v, f=model: f(v)[0], x.flatten(1))  # (2, n, 2, n)
        assert not J[0, :, 1].any() and not J[1, :, 0].any()  # no image sees another
        J = torch.stack([J[0, :, 0], J[1, :, 1]])
        sign, want = torch.linalg.slogdet(J)
        near(log_det, want, 1e-10)  # float64
        assert (sign == 1).all() and want.abs().min() > 1e-3
        near(nice.log_prob(model, x), LOGISTIC.log_prob(h).sum(1) + want, 1e-9)
        for i, m in enumerate(model.m):  # each coupling alone keeps volumes, and is not just a shift
            ms = [lambda a, n=n: torch.zeros(n // 2)] * (i % 2) + [m]
            one = jacobian(lambda v, ms=ms: nice.couple_all(v, ms), x[:1].flatten(1))[0, :, 0]
            near(torch.linalg.slogdet(one)[1], 0, 1e-12)
            near(one.diagonal(), 1, 1e-12)
            assert rms(one - torch.eye(n)) > 1e-3

def test_nice_couplings_by_hand():
    """(3), (4): even numbers change odd ones, then odd ones even ones, D odd or even, worked by hand."""
    double, square = (lambda v: 2 * v), (lambda v: v * v)
    x = torch.tensor([[1.0, 2, 3, 4], [0, 1, 0, -1]])
    same(nice.halves(x), (torch.tensor([[1.0, 3], [0, 0]]), torch.tensor([[2.0, 4], [1, -1]])))
    y = [x + torch.tensor([[0.0, 2, 0, 6], [0, 0, 0, 0]]), torch.tensor([[17.0, 4, 103, 10], [1, 1, 1, -1]])]
    for count, want in enumerate(y, 1):
        same(nice.couple_all(x, [double, square][:count]), want)
        same(nice.uncouple_all(want, [double, square][:count]), x)
    same(nice.couple_all(torch.tensor([[1.0, 2, 3]]), [lambda a: a.sum(1, True), lambda b: b.repeat(1, 2)]),
         torch.tensor([[7.0, 6, 9]]))
    for n in range(2, 9):
        a, b = nice.halves(torch.arange(3 * n).view(3, n))
        assert a.is_contiguous() and b.is_contiguous() and a.shape[1] - b.shape[1] == n % 2
        same(nice.interleave(a, b), torch.arange(3 * n).view(3, n))

def test_nice_alternates():
    """Two couplings change every number; after three each depends on every other, and not before."""
    for n, (channels, size) in (4, (1, 2)), (9, (1, 3)), (27, (3, 3)):
        for couplings in 1, 2, 3, 4, 5:
            model, x = some_nice(channels, size, 1, couplings, 0, 64), normal(1, n, seed=couplings)
            changed = nice.couple_all(x, model.m)[0] != x[0]
            assert changed.tolist() == [i % 2 == 1 or couplings > 1 for i in range(n)], couplings
            J = torch.autograd.functional.jacobian(lambda v, f=model: f(v)[0], x)[0, :, 0]
            want = torch.eye(n, dtype=torch.bool)
            want[1::2, 0::2] = True  # the first: odd of even
            if couplings > 1:
                want[0::2] = True
            assert torch.equal(J != 0, want | (couplings > 2)), couplings

def test_nice_inverse():
    """(4), (5): inverse(forward(x)) is x, and the other way round, to 1e-5 in float32, at many sizes and depths."""
    for (channels, size), couplings, seed in itertools.product([*SHAPES, (1, 28), (3, 9)], (1, 3, 4), SEEDS):
        model = some_nice(channels, size, 3, couplings, seed).float()
        x = torch.rand(5, channels * size * size, generator=torch.Generator().manual_seed(seed))
        near(model.inverse(model(x)[0]), x, 1e-5)
        h = nice.logistic(x)
        near(model(model.inverse(h))[0], h, 1e-5, 1e-5)
        exact = model.double()  # and more nearly in float64
        near(exact.inverse(exact(x.double())[0]), x.double(), 1e-13)
        assert rms(exact.inverse(h.double()) - h.double()) > 0.05

def test_nice_density_integrates_to_one():
    """(1) .. (6): the density of a flow in the plane sums to one over a grid, and is not that of the prior."""
    axis = torch.arange(-40, 40, 0.1, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    for seed in SEEDS:
        model = some_nice(2, 1, 1, 3 + seed, seed, 8)
        with torch.no_grad():
            p, prior = nice.log_prob(model, x).exp(), LOGISTIC.log_prob(x).sum(1).exp()
        near(p.sum() * 0.01, 1, 2e-3)  # kinks of the ReLUs, and what lies outside
        assert (p - prior).abs().sum() * 0.01 > 0.2

def test_nice_prior():
    """(6), (7): density and draws of the logistic are torch.distributions', and finite at any input."""
    h = torch.cat([normal(50, seed=1) * 5, torch.tensor([0.0, 30, -30, 80, -80], dtype=torch.float64)])
    want = LOGISTIC.log_prob(h)
    want[-4:] = torch.tensor([-30.0, -30, -80, -80])  # to 1e-13; there the formula of torch.distributions is not
    near(nice.log_logistic(h[:, None]), want, 1e-8)  # softplus is a straight line from 20 on
    near(nice.log_logistic(h.view(5, 11)), want.view(5, 11).sum(1), 1e-7)
    for dtype in torch.float32, torch.float64:
        far = torch.tensor([[1e4], [-1e4], [1e30], [-1e30]], dtype=dtype, requires_grad=True)
        near(nice.log_logistic(far), [-1e4, -1e4, -1e30, -1e30], 0, 1e-6)
        near(torch.autograd.grad(nice.log_logistic(far).sum(), far)[0][:, 0], [-1, 1, -1, 1], 1e-6)
        u = torch.tensor([0, 1e-30, 1e-6, 0.25, 0.5, 0.75, 1 - 1e-6, 1], dtype=dtype)
        drawn = nice.logistic(u)
        assert drawn.isfinite().all() and drawn.dtype == dtype and drawn[0] < -15 and drawn[-1] > 15
        near(drawn[2:7], LOGISTIC.icdf(u.double())[2:7], 1e-6, 1e-6)
    for seed in SEEDS:
        drawn = nice.logistic(torch.rand(20_000, generator=torch.Generator().manual_seed(seed))).double().sort()[0]
        near(drawn.sigmoid(), (torch.arange(20_000) + 0.5) / 20_000, 1.9 / 20_000**0.5)  # Kolmogorov, one in 700
        near(drawn.std(), math.pi / 3**0.5, 0.05)

def test_nice_large_inputs():
    """Inputs of 1e4 either way have a finite log_prob, what the tails of the logistic say, and finite slopes."""
    for seed in SEEDS:
        model = some_nice(3, 3, 2, 4, seed).float()
        x = (1e4 * normal(6, 27, seed=seed).float()).requires_grad_()
        nats = nice.log_prob(model, x)
        slope, = torch.autograd.grad(nats.sum(), x)
        assert nats.isfinite().all() and slope.isfinite().all() and slope.abs().max() > 0 and nats.max() < -1e4
        near(nats, model.double()(x.double())[0].abs().sum(1).neg(), 100, 1e-4)
        x = model.float().inverse(torch.full((2, 27), 1e4) * torch.tensor([[1], [-1]]))
        near(nice.log_prob(model, x), -27e4, 0, 1e-2)

def test_nice_dequantise():
    """(8): the paper's (255 x + u) / 256 of x = k / 255; bins side by side, and each byte comes back from its own."""
    k = torch.arange(256, dtype=torch.uint8)
    for u in torch.tensor([0.0, 1e-3, 0.5, 0.999]):
        x = nice.dequantise(k, u.expand(256))
        near(x, (255 * (k.double() / 255) + u.item()) / 256, 1e-7)
        assert torch.equal(nice.quantise(x), k) and nice.quantise(x).dtype == torch.uint8 and x.dtype == torch.float32
    near(nice.dequantise(k, torch.ones(256))[:-1], nice.dequantise(k, torch.zeros(256))[1:], 0)
    assert nice.quantise(torch.tensor([-3.0, -1e-9, 1.0, 7.0])).tolist() == [0, 0, 255, 255]
    near(nice.dequantise(torch.tensor([0, 255]), torch.tensor([0.0, 1.0])), [0, 1])

class Even(torch.nn.Module):
    """The flow under which every image in 0 .. 1 is as likely as any other: h = logit(x)."""
    def forward(self, x):
        x = x.flatten(1).double()
        return x.logit(), -(x * (1 - x)).log().sum(1)

def test_nice_bits():
    """(9): the paper's 1980.50 nats are 4.356 bits/dim; even noise costs 8 under the flow that makes nothing of it."""
    near(nice.bits_per_dim(1980.50, 784), 4.356, 5e-4)
    near(nice.bits_per_dim(torch.tensor([0.0, math.log(2), -6 * math.log(2)]), 2), [8, 7.5, 11], 1e-6)
    k = torch.randint(256, (40, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    nats = nice.log_prob(Even(), nice.dequantise(k, torch.rand(k.shape, generator=torch.Generator().manual_seed(1))))
    near(nats, 0, 1e-9)
    near(nice.bits_per_dim(nats, 75), 8, 1e-9)

def test_nice_bits_bound_the_bytes():
    """(8), (9): bits/dim exceed -log2 of the bytes' exact probability, by little if a bin is small and s is not."""
    for seed in SEEDS:
        model, g = nice.NICE(3, 4, 8).double(), torch.Generator().manual_seed(seed)  # h = exp(s) x, independent
        for scale, gap in (3, 1e-3), (300, 3):
            with torch.no_grad():
                model.s.copy_(math.log(scale) + 0.3 * normal(48, seed=seed))
            k, s = torch.randint(256, (30, 3, 4, 4), generator=g), model.s.detach()
            u = torch.rand(200, 30, 3, 4, 4, generator=g, dtype=torch.float64)
            with torch.no_grad():
                nats = nice.log_prob(model, nice.dequantise(k, u).flatten(0, 1)).view(200, 30).mean(0)
            low, high = (s.exp() * (k.flatten(1) + edge) / 256 for edge in (0, 1))
            mass = (-low).sigmoid() - (-high).sigmoid()
            exact = -mass.log2().mean(1)
            over = nice.bits_per_dim(nats, 48) - exact
            assert (-1e-3 < over).all() and over.max() < gap, (scale, over)
        assert over.min() > 1e-3  # here it is a bound, and no more

def test_nice_start():
    """start(): each number of y is centred and each of h has the spread of a logistic, however near to constant."""
    k = torch.randint(256, (300, 3, 5, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    k[:, 0, :2], k[:, 1, 0, 0], k[::7, 2] = 0, 255, 90
    for n, couplings in itertools.product((300, 1), (1, 2, 4)):
        x = nice.dequantise(k[:n].repeat(5000 // n, 1, 1, 1), torch.rand(5000 // n * n, 3, 5, 5))
        torch.manual_seed(0)
        model = nice.NICE(3, 5, 16, 2, couplings)
        same(model(x)[0], x.flatten(1))  # untouched it does nothing
        model.start(x)
        assert all(p.requires_grad and p.isfinite().all() for p in model.parameters())
        h = model(x)[0].detach().double()
        near(h.square().mean(0).sqrt(), 1.8, 0.02)
        near(h.mean(0)[slice(None) if couplings > 1 else slice(1, None, 2)], 0, 0.02)
        for i, m in enumerate(model.m):  # the network's answer counts in the spread of what it changes
            near(m[-1](torch.ones(1, 1)), x.flatten(1)[:, 1 - i % 2 :: 2].double().std(0), 1e-5, 1e-3)
    near(1.8, math.pi / 3**0.5, 0.02)

def test_nice_network():
    """The networks of the couplings are as asked for, at any size; the paper's; one number cannot be split."""
    for (channels, size), width, layers, couplings in itertools.product(SHAPES, (1, 8), (1, 3), (1, 3)):
        model, n = nice.NICE(channels, size, width, layers, couplings), channels * size * size
        assert model.shape == (channels, size, size) and len(model.m) == couplings and model.s.shape == (n,)
        for i, m in enumerate(model.m):
            linear = [part for part in m if isinstance(part, torch.nn.Linear)]
            ends = ((n + 1) // 2, n // 2)[:: (1, -1)[i % 2]]
            assert [p.in_features for p in linear] == [ends[0], *[width] * layers]
            assert [p.out_features for p in linear] == [*[width] * layers, ends[1]]
            assert sum(isinstance(part, torch.nn.ReLU) for part in m) == layers and len(m) == 2 * layers + 2
    want = 4 * (392 * 1000 + 1000 + 4 * (1000 * 1000 + 1000) + 1000 * 392 + 392) + 784
    with torch.device("meta"):
        assert sum(p.numel() for p in nice.NICE(1, 28, 1000, 5, 4).parameters()) == want
    assert re.search("size 1 .*channels 1", wary(nice.NICE, 1, 1))

class Gaussian(torch.nn.Module):
    """log_prob of this is that of N(mean, covariance), up to a constant."""
    def __init__(self, mean, precision):
        super().__init__()
        self.mean, self.precision = mean, precision

    def forward(self, x):
        d = x.flatten(1) - self.mean
        return 0 * d, -0.5 * ((d @ self.precision) * d).sum(1)

def test_nice_inpaint_finds_the_mode():
    """(10): hidden numbers go to the mode given the known ones, cut to 0 .. 1; the known ones stay as they were."""
    A = normal(6, 6, seed=3)
    precision = A @ A.T / 2 + torch.eye(6, dtype=torch.float64)
    mean, hidden, known = torch.tensor([0.5, 0.3, 0.7, 0.4, 0.6, 0.5]).double(), [0, 3, 5], [1, 2, 4]
    mask = torch.tensor([i in known for i in range(6)]).view(1, 1, 2, 3)
    for seed in SEEDS:
        g = torch.Generator().manual_seed(seed)
        x = (mean + 0.05 * torch.randn(6, generator=g)).expand(200, 6).reshape(200, 1, 2, 3).contiguous().float()
        mode = mean[hidden] - torch.linalg.solve(precision[hidden][:, hidden],
                                                 precision[hidden][:, known] @ (x[0].flatten()[known] - mean[known]))
        assert ((0.1 < mode) & (mode < 0.9)).all()
        for limit in 1.0, math.inf:
            y = nice.inpaint(Gaussian(mean.float(), precision.float()), x, mask, 300, g, limit)
            assert torch.equal(y[:, :, mask[0, 0]], x[:, :, mask[0, 0]]) and 0 <= y.min() and y.max() <= 1
            near(y.flatten(1)[:, hidden].mean(0), mode, 0.04)  # 200 noisy ends, slightly held back by the walls
            spread = (y.flatten(1)[:, hidden] - mode).square().mean().sqrt()
            assert spread < 0.15 and not y.requires_grad
    for mean, want in (-3.0, 0), (4.0, 1):
        y = nice.inpaint(Gaussian(torch.tensor(mean), 50 * torch.eye(6)), x, mask, 60, g, math.inf)
        near(y.flatten(1)[:, hidden], want, 1e-9)
        assert torch.equal(y[:, :, mask[0, 0]], x[:, :, mask[0, 0]])

def test_nice_inpaint_steps():
    """(10): alpha_i = 10 / (100 + i) from i = 0 on, for slope and noise; a slope counts for no more than limit."""
    class Slope(torch.nn.Module):
        c = 0.0

        def forward(self, x):
            return 0 * x.flatten(1), self.c * x.flatten(1).sum(1)

    alpha, model = [0.1, 10 / 101, 10 / 102, 10 / 103, 10 / 104], Slope()
    x, known = torch.full((2, 1, 1, 2), 0.25), torch.tensor([True, False])
    with mock.patch.object(torch, "rand", lambda n, **_: torch.full(n, 0.5)):
        for c, eps, limit, rate in [(0.3, 0, 1.0, 0.3), (0.3, 0.2, 1.0, 0.5), (7, 0, 1.0, 1), (-7, 0.1, 0.5, -0.4),
                                    (0.9, 0, math.inf, 0.9), (0, -0.4, 1.0, -0.4)]:
            model.c = c
            with mock.patch.object(torch, "randn", lambda n, e=eps / 1, **_: torch.full(n, e)):
                for steps in range(6):
                    y = nice.inpaint(model, x, known, steps, limit=limit)
                    near(y[..., 1], min(max(0.5 + rate * sum(alpha[:steps]), 0), 1), 1e-6)
                    near(y[..., 0], 0.25)
    one, again, other = (nice.inpaint(model, x, known, 3, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, again) and (one != other)[..., 1].all()
    first = nice.inpaint(model, x[:1].expand(9, 1, 50, 2), known, 0, torch.Generator().manual_seed(0))[..., 1]
    near(first.std(), 12**-0.5, 0.03)  # even, so without a hint
    with torch.no_grad():
        nice.inpaint(model, x, known, 1)  # finds its slopes all the same

def test_nice_hide():
    """The ten patterns of the paper: what they hide, and how much."""
    for size in 8, 28:
        known = nice.hide(size, torch.Generator().manual_seed(0))
        assert known.shape == (10, 1, size, size) and known.dtype == torch.bool
        known, h, q = known[:, 0], size // 2, size // 4
        for i, hidden in enumerate((np.s_[:h], np.s_[h:], np.s_[:, 1::2], np.s_[:, ::2], np.s_[:, :h], np.s_[:, h:],
                                    np.s_[q : 3 * q], np.s_[:, q : 3 * q])):
            want = torch.ones(size, size, dtype=torch.bool)
            want[hidden] = False
            assert torch.equal(known[i], want), i
        near(known[8:].double().mean((1, 2)), [0.25, 0.1], 4 / size / 2)
    a, b = nice.halves(nice.hide(5)[2].view(1, -1))
    assert a.all() and not b.any()  # the halves of the couplings, whatever the size
    assert not torch.equal(nice.hide(28)[8], nice.hide(28)[8])

def shades(n=12, size=4):
    """Images each of one shade: image i is 20 i all over."""
    return (20 * torch.arange(n, dtype=torch.uint8)).view(n, 1, 1, 1).repeat(1, 1, size, size)

def test_nice_training_draws():
    """(8): training sees only the images not held out, spread evenly over their bins; only the average is measured."""
    seen, judged = [], []
    fitted, valid = ([int(v) for v in part[:, 0, 0, 0]] for part in nice.hold_out(shades()))

    def log_prob(model, x):
        if torch.is_grad_enabled():
            seen.append(x)
        else:
            judged.append((x, all(not p.requires_grad for p in model.parameters())))
        return 0 * model.s.sum() * x.flatten(1).sum(1)

    started = mock.patch.object(nice.NICE, "start", autospec=True, side_effect=lambda model, x: start.append(x))
    start = []
    with mock.patch.object(nice, "log_prob", log_prob), started:
        quiet(nice.train, shades(), iters=300, batch=8, width=8)
    for x in torch.cat(seen), torch.cat(start):
        assert x.dtype == torch.float32 and (len(x), *x.shape[1:]) in ((2400, 1, 4, 4), (5000, 1, 4, 4))
        k, u = (256 * x).floor(), (256 * x.double()) % 1
        used, counts = k[:, 0, 0, 0].unique(return_counts=True)
        assert (k == k[:, :, :1, :1]).all() and used.tolist() == sorted(fitted)
        assert counts.min() > 0.75 * counts.float().mean()  # 240 +- 15 or 500 +- 21 each
        near(u.flatten().sort()[0], (torch.arange(u.numel()) + 0.5) / u.numel(), 2 / u.numel() ** 0.5)
        assert len(x.flatten(1).unique(dim=0)) == len(x)
    assert len(judged) == 3 and all(averaged for _, averaged in judged)  # after 100, 200 and 300 iterations
    for x, _ in judged:
        same([int(v) for v in (256 * x).floor()[:, 0, 0, 0]], valid)
        same(x, judged[0][0])  # with the same noise each time

def test_nice_measure():
    """measure() is log_prob of dequantised images: its own fixed noise, any chunks, and no other generator touched."""
    k = torch.randint(256, (50, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    model, state = some_nice(1, 4).float(), torch.get_rng_state()
    nats = nice.measure(model, k)
    assert nats.shape == (50,) and not nats.requires_grad and torch.equal(state, torch.get_rng_state())
    same(nats, nice.measure(model, k, seed=0))
    assert (nats != nice.measure(model, k, seed=1)).all()
    u = torch.rand(k.shape, generator=torch.Generator().manual_seed(0))
    near(nats, nice.log_prob(model, (k + u) / 256).detach(), 1e-4)
    with mock.patch.object(nice, "log_prob", wraps=nice.log_prob) as spy:
        nice.measure(model, k, chunk=20)
        assert [len(call.args[1]) for call in spy.mock_calls] == [20, 20, 10]
        u = torch.cat([256 * call.args[1] - part for call, part in zip(spy.mock_calls, k.split(20))])
    assert 0 <= u.min() and u.max() < 1.001 and len(u.flatten(1).unique(dim=0)) == 50
    near(u.mean(), 0.5, 5 * (1 / 12 / u.numel()) ** 0.5)

def test_nice_keeps_the_best():
    """Of the averages that training passes, the one best on the images held out is returned, saved and loaded."""
    passed, values = [], itertools.count()

    def measure(model, images):
        assert torch.equal(images, nice.hold_out(shades())[1])
        passed.append({name: p.clone() for name, p in model.state_dict().items()})
        return torch.tensor([0.0, 2.0 * (5.0, 7.0, 6.0, 7.0, 6.5)[next(values)]])

    with workdir() as here:
        train = functools.partial(quiet, nice.train, shades(), iters=450, batch=2, width=8, layers=1, couplings=2,
                                  path=here / "model.pt")
        with mock.patch.object(nice, "measure", measure):
            with stopped_at(nice, 350, 450), hurried(nice), contextlib.suppress(KeyboardInterrupt):
                train()
            assert torch.load(here / "model.pt", weights_only=True)["done"] == 300 and len(passed) == 3
            model = train()  # goes on with the fourth, which is no better than the second
        same(dict(model.state_dict()), passed[1])
        same(dict(nice.load(here / "model.pt").state_dict()), passed[1])
        assert len(passed) == 5 and not torch.equal(passed[1]["s"], passed[3]["s"])
        rows = [row.split(",") for row in (here / "log.csv").read_text().split()]
    assert rows[0] == ["iteration", "train_nats", "valid_nats"]
    assert [(int(row[0]), float(row[2])) for row in rows[1:]] == [(100, 5), (200, 7), (300, 6), (400, 7), (450, 6.5)]

def test_nice_measures_now_and_then():
    """However long the training, about twenty measurements; the log's last column stands until the next."""
    count, measure = itertools.count(1), lambda model, images: torch.full((3,), float(next(count)))
    with workdir(), mock.patch.multiple(nice, measure=measure, log_prob=lambda model, x: 0 * model.s), \
            mock.patch.object(torch.optim.Adam, "step"), mock.patch.object(torch.Tensor, "backward"):
        quiet(nice.train, shades(), iters=4050, batch=2, width=1, layers=1, couplings=1, path=Path("model.pt"))
        log = torch.load("model.pt", weights_only=True)["log"]
    assert [row[0] for row in log] == [*range(100, 4100, 100), 4050]
    assert [row[2] for row in log] == [float(i // 2 + 1) for i in range(40)] + [21.0]

def test_nice_rates():
    """Adam has every weight once, s alone at ten times the rate and without decay; the rate warms up and falls to 0."""
    seen = []

    def step(self):
        seen.append([group["lr"] for group in self.param_groups])
        assert [group["weight_decay"] > 0 for group in self.param_groups] == [True, False]
        sets = [{id(p) for p in group["params"]} for group in self.param_groups]
        shapes = [[tuple(p.shape) for p in group["params"]] for group in self.param_groups]
        assert shapes[1] == [(16,)] and len(shapes[0]) == 4 * 8 and not sets[0] & sets[1]

    with mock.patch.object(torch.optim.AdamW, "step", step), mock.patch.object(torch.Tensor, "backward"), \
            mock.patch.object(nice, "log_prob", lambda model, x: 0 * model.s):
        quiet(nice.train, shades(), iters=1000, batch=2, lr=0.002, width=4, layers=3, couplings=4)
    slow, fast = torch.tensor(seen, dtype=torch.float64).T
    near(fast, 10 * slow, 1e-12)
    near(slow[:100], 0.002 * torch.arange(1, 101) / 200, 1e-9)
    near(slow.max(), 0.002, 0.0005)
    near(slow[-1], 0.002 / 1000, 1e-9)
    assert (slow[250:].diff() < 0).all()

def test_nice_learns():
    """On images of eight shades training finds what they have in common, far beyond what scales alone can say."""
    images = (shades(12, 4) + torch.randint(3, (40, 12, 1, 4, 4), dtype=torch.uint8)).flatten(0, 1)
    images = images[torch.randperm(480, generator=torch.Generator().manual_seed(1))]
    for seed in 0, 1:
        with workdir() as here:
            model = quiet(nice.train, images, 300, 32, 2e-3, 32, 2, seed=seed, path=here / "model.pt")
            log = torch.load(here / "model.pt", weights_only=True)["log"]
            loaded = nice.load(here / "model.pt")
        same(dict(model.state_dict()), dict(loaded.state_dict()))
        alone = nice.NICE(1, 4, 32, 2)
        alone.start(nice.dequantise(images, torch.rand(images.shape)))
        got, first = (nice.measure(m, nice.hold_out(images)[1]).mean() for m in (model, alone))
        assert got > first + 25 and log[-1][1] > log[0][1] + 3, (got, first, log)
        near(log[-1][2], got, 1e-3)
        drawn = nice.sample(model, 200, seed) * 127.5 + 127.5
        assert drawn.flatten(1).std(1).mean() < 0.5 * drawn.mean((1, 2, 3)).std()  # so are its own images

def test_nice_seed():
    """The same seed trains the same bits, another seed others; images that are not square are refused."""
    train = lambda seed: dict(quiet(nice.train, shades(), iters=3, batch=2, width=8, seed=seed).state_dict())
    one, again, other = map(train, (1, 1, 2))
    same(one, again)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert "12x8" in wary(nice.train, torch.zeros(4, 1, 8, 12, dtype=torch.uint8), 1)

def test_nice_averages():
    """The average has the memory min(0.995, (1 + i) / (10 + i)): of no use to it is where training began."""
    passed, real = [], nice.log_prob

    def log_prob(model, x):
        if torch.is_grad_enabled():
            passed.append({name: p.detach().clone().double() for name, p in model.named_parameters()})
        return real(model, x)

    with workdir() as here, mock.patch.object(nice, "log_prob", log_prob):
        quiet(nice.train, shades(), iters=30, batch=2, width=8, path=here / "model.pt")
        parts = torch.load(here / "model.pt", weights_only=True)["parts"]
    assert len(parts) == 4
    average = passed[0]
    for i, weights in enumerate([*passed[1:], {name: parts[0][name] for name in average}]):
        memory = (1 + i) / (10 + i)
        average = {name: memory * average[name] + (1 - memory) * weights[name] for name in average}
    for name in average:
        near(parts[1][name], average[name], 1e-6)
        same(parts[3][name], parts[1][name])  # measured once, at the end
    assert rms(parts[1]["s"] - parts[0]["s"]) > 1e-5

def test_nice_sample():
    """(4), (7), (8): sample(model, n) inverts logistic noise and gives bytes, as probable as the prior says."""
    for seed in SEEDS:
        model, asked = some_nice(3, 3, 2, 4, seed).float().eval(), []
        inverse = lambda self, h, kept=asked: kept.append(h) or nice.uncouple_all(h * (-self.s).exp(), self.m)
        with mock.patch.object(nice.NICE, "inverse", inverse):
            x = nice.sample(model, 250, seed, chunk=100)
        assert x.shape == (250, 3, 3, 3) and x.dtype == torch.float32 and not x.requires_grad
        assert [len(h) for h in asked] == [100, 100, 50] and -1 <= x.min() and x.max() <= 1
        byte = x.double() * 127.5 + 127.5
        near(byte, byte.round(), 1e-4)
        h = torch.cat(asked)
        near(h.double().flatten().sort()[0].sigmoid(), (torch.arange(6750) + 0.5) / 6750, 2 / 6750**0.5)
        assert len(h.unique(dim=0)) == 250
        back = model(model.inverse(h))[0]
        near(back, h, 1e-4, 1e-4)
        same(nice.sample(model, 9, seed), nice.sample(model, 9, seed))
        assert not torch.equal(nice.sample(model, 9, seed), nice.sample(model, 9, seed + 1))
        model = nice.NICE(1, 2, 8)
        with torch.no_grad():
            model.s.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
            model.m[0][-2].bias.fill_(-0.5)  # y_2 = x_2 - 0.5, and x_1 as it is
        byte = (nice.sample(model, 20_000, seed).flatten(1).double() * 127.5 + 127.5).round()
        edge = torch.tensor([1.0, 40, 128, 200])
        for i in range(4):
            want = ((edge / 256 - 0.5 * (i % 2)) * math.exp(i + 1)).sigmoid()
            near((byte[:, i, None] < edge).double().mean(0), want, 4.5 / 2 / 20_000**0.5)

def test_nice_command():
    """main() measures all test images after training, in nats and bits/dim, and in-paints what it says it hides."""
    order, real_train, real_measure, real_inpaint = [], nice.train, nice.measure, nice.inpaint

    @functools.wraps(real_train)
    def train(*args, **kwargs):
        model = real_train(*args, **kwargs)
        order.append("trained")
        return model

    def measure(model, images, *args, **kwargs):
        order.append(images)
        return real_measure(model, images, *args, **kwargs)

    def inpaint(model, x, known, steps, generator):
        order.append(known)
        assert steps == 3 and known.shape == (40, 1, 8, 8) and x.shape == (40, 1, 8, 8)
        return real_inpaint(model, x, known, steps, generator)

    with workdir() as here, mock.patch.multiple(nice, train=train, measure=measure, inpaint=inpaint):
        images = grey(here, 70)
        held_out = nice.load_images("pics", 8, test=True)
        words = command(nice, data="pics", seed=4, inpaint=3, layers=2, couplings=3)
        status, out, err = call(nice, words)
        assert (status, err) == (0, ""), err
        model = nice.load("run/model.pt")
        assert len(model.m) == 3 and len(model.m[0]) == 6
        assert np.array_equal(np.load("run/samples.npy"), nice.to_uint8(nice.sample(model, 2, 4))[:, 0])
        trained = order.index("trained")
        assert all(torch.equal(part, nice.hold_out(images)[1]) for part in order[:trained]) and trained == 1
        fitted, valid = nice.hold_out(images)
        for name, part in ("train", fitted), ("validation", valid), ("test", held_out):
            nats = real_measure(model, part).double()
            said = re.search(rf"\n{name}: (\S+) \+- (\S+) nats = (\S+) \+- (\S+) bits/dim, mean of (\d+) images", out)
            mean, error, bits, bits_error, n = map(float, said.groups())
            near(mean, nats.mean(), 0.0051)
            near(error, nats.std(correction=0) / len(part) ** 0.5, 0.0051)
            near([bits, bits_error], [8 - mean / 64 / math.log(2), error / 64 / math.log(2)], 2e-4)
            assert n == len(part)
        spread = (-model.s).exp()
        said = re.search(r"exp\(-s\) from (\S+) to (\S+), half of them below (\S+)\n", out)
        near([float(v) for v in said.groups()], [spread.min(), spread.max(), spread.median()], 0.02)
        sheet, known = tiles("run/inpainting.png", 8, 12), order[trained + 1][:, 0].numpy()
        assert sheet.shape == (120, 8, 8)
        for i, (true, masked, filled) in enumerate(sheet.reshape(40, 3, 8, 8)):
            assert np.array_equal(true, held_out[i % 4, 0]) and not np.array_equal(true, filled)
            assert np.array_equal(np.where(known[i], true, 128), masked)
            assert np.array_equal(true[known[i]], filled[known[i]])
        assert np.array_equal(known[::4], nice.hide(8, torch.Generator().manual_seed(4))[:, 0])
        assert "inpainting.png" in out
        (here / "run/inpainting.png").unlink()
        status, out, _ = call(nice, [*words, "--inpaint", "0"])
        assert status == 0 and not (here / "run/inpainting.png").exists() and "inpainting.png" not in out

def test_nice_bad_values():
    """What no run can use is refused before training, and so is a checkpoint of another network."""
    bad = [("--layers", "0", "--layers"), ("--couplings", "0", "--couplings"), ("--inpaint", "-1", "--inpaint")]
    words, _, files = finished(nice)
    with workdir() as here:
        unpack(files, here)
        wrong = [refused(nice, [*words, f"{name}={value}"], say, here) for name, value, say in bad]
        wrong += [refused(nice, [*words, "--channels", 1, "--size", 1, "--out", "new"], "size 1 .*halves", here)]
        wrong += [refused(nice, [*words, "--layers", 9], r"layers \d, not 9.*--fresh", here),
                  refused(nice, [*words, "--couplings", 9], r"couplings \d, not 9.*--fresh", here)]
    assert not any(wrong), "\n".join(filter(None, wrong))

def test_nice_few_images():
    """One picture, or two, is enough to train on, and to hold one out."""
    for n in 1, 2, 5:
        with workdir() as here:
            paint(here / "pics", n)
            status, out, err = call(nice, command(nice, data="pics"))
            assert (status, err) == (0, ""), err
            assert "nan" not in out.lower() and "inf " not in out, out

# ------------------------------------------------------------------------------------------------------- real nvp -----
realnvp = MODULES["realnvp"]

def flow_of(channels=1, size=8, seed=0, **sizes):
    """A Real NVP in float64 whose weights are nowhere zero, and whose first step normalises odd data."""
    model = woken(realnvp.RealNVP(channels, size, **{"width": 8, "couplings": 2, **sizes}), seed).double()
    deviation = (0.5 * normal(channels, size, size, seed=seed + 1)).exp()
    model.norm.start(normal(50, channels, size, size, seed=seed) * deviation - 1)
    return model.requires_grad_(False)

def bent(c, seed=0):
    """A net for a coupling, anything but linear: (N, c, ...) -> s, t."""
    A, B = normal(c, c, seed=2 * seed), normal(c, c, seed=2 * seed + 1)
    return lambda half: (torch.einsum("ab,nb...->na...", A, half).sin(), torch.einsum("ab,nb...->na...", B, half) ** 2)

def slogdet(function, x):
    """log|det| of the Jacobian of a function of the numbers in x, by autograd."""
    J = torch.autograd.functional.jacobian(function, x, vectorize=True)
    return torch.linalg.slogdet(J.view(x.numel(), x.numel()))[1]

def test_realnvp_log_det_is_slogdet():
    """(1) to (10), (13): log|det| of model(h), and log_prob from x on, are those of the Jacobian made by autograd."""
    for seed, (channels, size) in enumerate([(1, 4), (3, 4), (1, 8), (2, 8)]):
        model, shape = flow_of(channels, size, seed), (channels, size, size)
        for couplings in (model.scales[0][0], model.scales[1][1]):  # that each of them has something to do
            assert all(net(normal(2, net.enter.in_channels, 4, 4))[0].std() > 0.05 for net in couplings)
        h = normal(1, *shape, seed=seed)
        z, log_det = model(h)
        assert z.shape == (1, h.numel()) and log_det.shape == (1,) and log_det.abs() > 0.1
        near(log_det, slogdet(lambda h, model=model: model(h)[0], h), 1e-9)  # float64
        x, latents = h.sigmoid(), lambda x, model=model: model(realnvp.to_logit(x)[0])[0]
        want = D.Normal(0, 1).log_prob(latents(x)).sum() + slogdet(latents, x)
        near(realnvp.log_prob(model, x), want, 1e-8)
        batch = normal(5, *shape, seed=seed).sigmoid()
        near(realnvp.log_prob(model, batch)[3:4], realnvp.log_prob(model, batch[3:4]), 1e-8)  # no neighbour counts

def test_realnvp_inverse():
    """(5), (7) to (10): inverse(model(h)) is h and model(inverse(z)) is z, in float64 and in float32, all shapes."""
    for seed, (channels, size, couplings, blocks) in enumerate(
            [(1, 4, 2, 0), (3, 4, 3, 1), (1, 8, 4, 2), (3, 8, 2, 1), (1, 28, 3, 1), (2, 12, 5, 0)]):
        model = flow_of(channels, size, seed, couplings=couplings, blocks=blocks)
        h, z = normal(3, channels, size, size, seed=seed), normal(3, channels * size * size, seed=seed + 9)
        there, back = model(h)[0], model.inverse(z)
        assert there.shape == z.shape and back.shape == h.shape
        assert (there.sort().values - h.flatten(1).sort().values).abs().mean() > 0.1  # it is far from the identity
        near(model.inverse(there), h, 1e-9)
        near(model(back)[0], z, 1e-9)
        near(realnvp.from_logit(realnvp.to_logit(h.sigmoid())[0]), h.sigmoid(), 1e-12)
        for net in (net for scale in model.scales for kind in scale for net in kind):
            net.leave.weight *= 0.2  # nets as wild as these multiply the rounding of float32; tame ones must not
        model, h, z = model.float(), h.float(), z.float()
        s, t = model.scales[0][0][0](realnvp.checkerboard(h)[0])
        assert s.std() > 0.01 and t.std() > 0.05
        near(model.inverse(model(h)[0]), h, 1e-5)
        near(model(model.inverse(z))[0], z, 1e-5)

def test_realnvp_coupling():
    """(3), (4), (5): numbers worked by hand, and which half changes first."""
    left, right = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [5.0]])
    nets = [lambda v: (v * math.log(2), 10 * v), lambda v: (0 * v - math.log(4), v)]
    y_left, y_right, log_det = realnvp.couple(nets[:1], left, right)
    near(y_left, left)
    near(y_right, [[3 * 2 + 10], [5 * 4 + 20]], 1e-5)
    near(log_det, [math.log(2), 2 * math.log(2)], 1e-6)
    y_left, y_right, log_det = realnvp.couple(nets, left, right)
    near(torch.cat([y_left, y_right], 1), [[1 / 4 + 16, 16], [2 / 4 + 40, 40]], 1e-5)
    near(log_det, [math.log(2 / 4), math.log(4 / 4)], 1e-6)
    back = realnvp.uncouple(nets, torch.tensor([[16.25], [40.5]]), torch.tensor([[16.0], [40.0]]))
    near(torch.cat(back, 1), [[1, 3], [2, 5]], 1e-5)

def test_realnvp_density_integrates_to_one():
    """(1) to (4): a flow of four bent couplings on the plane, its prior: the density on a grid sums up to one."""
    axis = torch.linspace(-15, 15, 1001, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    for seed in SEEDS:
        scales = (0.8 * normal(4, 2, seed=seed)).tolist()
        nets = [lambda v, a=a, b=b: (0.4 * (a + 2 * v).sin(), b * v.tanh()) for a, b in scales]
        left, right, log_det = realnvp.couple(nets, x[:, :1], x[:, 1:])
        p = (realnvp.log_latent(torch.cat([left, right], 1)) + log_det).exp().view(1001, 1001)
        near(p.sum() * (axis[1] - axis[0]) ** 2, 1, 1e-4)
        assert torch.cat([p[0], p[-1], p[:, 0], p[:, -1]]).max() < 1e-9  # none of it lies beyond the grid
        assert log_det.std() > 0.2

def test_realnvp_log_latent():
    """(2): torch's own normal density."""
    z = 3 * normal(5, 7)
    near(realnvp.log_latent(z), D.Normal(0, 1).log_prob(z).sum(1), 1e-12)

def masked(x, b, s, t):
    """The paper's equation 9 on whole images: b is 1 where x is seen and stays."""
    return b * x + (1 - b) * (x * s.exp() + t), ((1 - b) * s).flatten(1).sum(1)

def test_realnvp_checkerboard_is_the_papers_mask():
    """(7): couplings of halves are those of the paper's masked images, in turns, with the mask made pixel by pixel."""
    for channels, size in (1, 4), (3, 6), (2, 8):
        x = normal(2, channels, size, size)
        board = torch.tensor([[(i + j + 1) % 2 for j in range(size)] for i in range(size)], dtype=torch.float64)
        nets = [bent(2 * channels, seed) for seed in range(3)]
        want, log_det = x, 0
        for k, net in enumerate(nets):
            b = board if k % 2 == 0 else 1 - board
            cells = torch.zeros(2, 2 * channels, size // 2, size // 2, dtype=x.dtype)  # what the net sees
            s, t = torch.zeros_like(x), torch.zeros_like(x)
            spots = [(0, 0), (1, 1)], [(0, 1), (1, 0)]
            for half, (i, j) in enumerate(spots[k % 2]):
                cells[:, half * channels : (half + 1) * channels] = (b * want)[:, :, i::2, j::2]
            answers = net(cells)
            for half, (i, j) in enumerate(spots[1 - k % 2]):
                for image, answer in zip((s, t), answers):
                    image[:, :, i::2, j::2] = answer[:, half * channels : (half + 1) * channels]
            want, change = masked(want, b, s, t)
            log_det = log_det + change
        left, right, got = realnvp.couple(nets, *realnvp.checkerboard(x))
        near(realnvp.from_checkerboard(left, right), want, 1e-12, 1e-12)
        near(got, log_det, 1e-12)

def test_realnvp_squeeze():
    """(7), (8): a numbered image goes where the paper's figure of the squeeze has it; the ways back are exact."""
    x = torch.arange(16.0).view(1, 1, 4, 4)
    even, odd = realnvp.checkerboard(x)
    assert even.tolist() == [[[[0, 2], [8, 10]], [[5, 7], [13, 15]]]]
    assert odd.tolist() == [[[[1, 3], [9, 11]], [[4, 6], [12, 14]]]]
    top, bottom = realnvp.regroup(even, odd)
    assert top.tolist() == [[[[0, 2], [8, 10]], [[1, 3], [9, 11]]]]
    assert bottom.tolist() == [[[[5, 7], [13, 15]], [[4, 6], [12, 14]]]]
    for channels, size in (1, 2), (3, 4), (2, 8):
        x = normal(2, channels, size, size)
        halves = realnvp.checkerboard(x)
        squeezed = x.view(2, channels, size // 2, 2, size // 2, 2).permute(0, 3, 5, 1, 2, 4)  # 2x2xC, row by row,
        squeezed = squeezed.reshape(2, 4 * channels, size // 2, size // 2)  # becomes 1x1x4C
        first, last = squeezed.chunk(2, 1)
        top, bottom = realnvp.regroup(*halves)
        assert torch.equal(top, first) and torch.equal(torch.cat(bottom.chunk(2, 1)[::-1], 1), last)
        same(list(realnvp.regroup(top, bottom)), list(halves))
        assert torch.equal(realnvp.from_checkerboard(*halves), x)

def test_realnvp_factors_out():
    """(9): as many latents as pixels; the odd rows leave at the first scale, half of the others at the second."""
    for channels, size in (1, 4), (3, 8), (1, 28):
        model, h = realnvp.RealNVP(channels, size, 8), normal(2, channels, size, size).float()
        z, log_det = model(h)  # before training nothing is changed, only moved
        n = channels * size * size
        assert z.shape == (2, n) and not log_det.any()
        for part, rows in zip(z.split([n // 2, n // 4, n // 4], 1), [(1, 3), (2,), (0,)]):  # of every four
            want = h[:, :, [i for i in range(size) if i % 4 in rows]].flatten(1)
            assert torch.equal(part.sort().values, want.sort().values)
        assert torch.equal(model.inverse(z), h)

def test_realnvp_masks_alternate():
    """One coupling leaves its half alone; two change every pixel; and at either scale every kept number is changed."""
    h = normal(1, 1, 8, 8)
    moved = lambda halves: (realnvp.from_checkerboard(*halves) - h).abs()[0, 0] > 1e-9
    board = torch.tensor([[(i + j) % 2 == 1 for j in range(8)] for i in range(8)])
    assert torch.equal(moved(realnvp.couple([bent(2)], *realnvp.checkerboard(h))[:2]), board)
    assert moved(realnvp.couple([bent(2), bent(2, 1)], *realnvp.checkerboard(h))[:2]).all()
    plain = realnvp.RealNVP(1, 8, 8, couplings=2).double()
    for scale, kind in itertools.product((0, 1), (0, 1)):
        model = flow_of(1, 8)
        for i, j in itertools.product((0, 1), (0, 1)):
            if (i, j) != (scale, kind):
                model.scales[i][j].load_state_dict(plain.scales[i][j].state_dict())
        model.norm.load_state_dict(plain.norm.state_dict())
        changes = (model(h)[0] - plain(h)[0])[0].abs() > 1e-9
        assert changes[32:].all() and changes[:32].all() == changes[:32].any() == (scale == 0), (scale, kind)

def test_realnvp_bounded_scale():
    """(6): |s| is never above the learned scale, whatever the network says; huge inputs and weights stay finite."""
    net = woken(realnvp.ScaleShift(2, 8, 1))
    for size in 1.0, 1e4, 1e12:
        s, t = net(size * normal(3, 2, 4, 4).float())
        assert s.shape == t.shape == (3, 2, 4, 4)
        assert (s.abs() <= net.scale.abs()[:, None, None]).all() and s.isfinite().all()
    assert (s.abs() > 0.99 * net.scale.abs()[:, None, None]).float().mean() > 0.9  # the bound is reached
    with torch.no_grad():
        net.leave.weight *= 1e6
    assert (net(normal(3, 2, 4, 4).float())[0].abs() <= net.scale.abs()[:, None, None]).all()
    model = flow_of(1, 8).float()
    for h in 1e4 * normal(2, 1, 8, 8).float(), torch.full((1, 1, 8, 8), -1e6):
        z, log_det = model(h)
        assert z.isfinite().all() and log_det.isfinite().all()
    for byte, u in itertools.product((0, 255), (0.0, 1 - 2**-24)):
        x = realnvp.dequantise(torch.full((1, 1, 8, 8), byte, dtype=torch.uint8), torch.full((1, 1, 8, 8), u))
        assert 0 <= x.min() and x.max() <= 1 and realnvp.log_prob(model, x).isfinite().all()

def test_realnvp_network():
    """A coupling starts as the identity, uses each of its weights, and no image sees its neighbours in the batch."""
    for c, blocks in itertools.product((2, 12), (0, 1, 2)):
        half = normal(3, c, 6, 6).float()
        assert not any(v.any() for v in realnvp.ScaleShift(c, 8, blocks)(half))
        net = woken(realnvp.ScaleShift(c, 8, blocks))
        (s, t), (s_1, t_1) = net(half), net(half[1:2])
        near(s[1:2], s_1, 1e-5)
        near(t[1:2], t_1, 1e-5, 1e-5)
        (s.square().sum() + t.square().sum()).backward()
        assert all(p.grad.any() for p in net.parameters()) and len(net.blocks) == blocks

def test_realnvp_logit():
    """(13): by autograd and by torch's own transforms, at the ends of 0 .. 1 too; another alpha; and back."""
    x = torch.cat([torch.linspace(0, 1, 30, dtype=torch.float64), normal(34).sigmoid()]).view(2, 2, 4, 4)
    for alpha in realnvp.ALPHA, 0.05, 0.2:
        h, log_det = realnvp.to_logit(x, alpha)
        logits = lambda x, alpha=alpha: realnvp.to_logit(x, alpha)[0].sum()
        slope = torch.autograd.functional.jacobian(logits, x)
        near(log_det, slope.log().flatten(1).sum(1), 1e-10)
        to = D.ComposeTransform([D.AffineTransform(alpha, 1 - 2 * alpha), D.SigmoidTransform().inv])
        near(h, to(x), 1e-10)
        near(log_det, to.log_abs_det_jacobian(x, to(x)).flatten(1).sum(1), 1e-10)
        near(realnvp.from_logit(h, alpha), x, 1e-12)
    near(realnvp.to_logit(x)[0], realnvp.to_logit(x, realnvp.ALPHA)[0])

def exact(alpha=realnvp.ALPHA):
    """A flow that needs no training: x even on 0 .. 1 becomes exactly N(0, I)."""
    def model(h):
        x = ((h.sigmoid() - alpha) / (1 - 2 * alpha)).clamp(1e-15, 1 - 1e-15)
        z, q = D.Normal(0, 1).icdf(x), h.sigmoid()
        return z.flatten(1), (torch.log(q * (1 - q) / (1 - 2 * alpha)) - D.Normal(0, 1).log_prob(z)).flatten(1).sum(1)
    return model

def identity(h):
    return h.flatten(1), h.new_zeros(len(h))

def test_realnvp_uniform_noise_has_8_bits():
    """(1), (11), (12), (13): under the flow that takes even noise to N(0, I), every image has 8 bits/dim, 0 nats."""
    for channels, size in (1, 4), (3, 8):
        bytes_ = torch.randint(256, (6, channels, size, size), generator=torch.Generator().manual_seed(size))
        x = realnvp.dequantise(bytes_.double(), 0.5 + 0 * bytes_)
        near(realnvp.log_prob(exact(), x), torch.zeros(6), 1e-8)
        near(realnvp.bits_per_dim(realnvp.log_prob(exact(), x), x[0].numel()), 8, 1e-8)
        near(realnvp.loss_bits(exact(), x), 8, 1e-8)
        bits = realnvp.image_bits(lambda h: exact()(h.double()), bytes_.to(torch.uint8), chunk=4)
        assert bits.shape == (6,)
        near(bits, 8, 1e-4)  # the logits are float32
    for nats, dims, bits in (0, 784, 8), (784 * math.log(256), 784, 0), (math.log(2), 1, 7), (-3 * math.log(4), 3, 10):
        near(realnvp.bits_per_dim(nats, dims), bits, 1e-12)

def test_realnvp_density_of_bytes():
    """(11), (12), (13): a pixel whose logit is normal: the density is that of theory and has the mass it should have,
    and bits/dim is no less than -log2 of the byte's probability, and hardly more."""
    x = ((torch.arange(256_000, dtype=torch.float64) + 0.5) / 256_000).view(-1, 1, 1, 1)
    with mock.patch.object(realnvp.to_logit, "__defaults__", (0.05,)):  # so that p is smooth within a byte
        check_density_of_bytes(x)

def check_density_of_bytes(x):
    p, Phi = realnvp.log_prob(identity, x).exp(), D.Normal(0, 1).cdf
    edges = torch.logit(0.05 + 0.9 * torch.arange(257, dtype=torch.float64) / 256)
    near(p.mean(), Phi(edges[-1]) - Phi(edges[0]), 1e-9)
    P = Phi(edges[1:]) - Phi(edges[:-1])
    near(p.view(256, 1000).mean(1) / 256, P, 1e-9)
    bytes_ = torch.arange(256, dtype=torch.float64).repeat_interleave(1000).view(-1, 1, 1, 1)
    u = ((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000).repeat(256).view(-1, 1, 1, 1)
    near(realnvp.dequantise(bytes_, u), x, 1e-15)
    bits = realnvp.bits_per_dim(realnvp.log_prob(identity, realnvp.dequantise(bytes_, u)), 1).view(256, 1000).mean(1)
    near(realnvp.loss_bits(identity, x), bits.mean(), 1e-9)
    assert (bits >= -P.log2() - 1e-12).all() and (bits < -P.log2() + 0.01).all()

def test_realnvp_start():
    """(10): after start() the data has mean 0 and variance 1 at each pixel, and so has z; a pixel that never changes
    makes nothing infinite."""
    for seed in SEEDS:
        h = normal(200, 2, 4, 4, seed=seed) * normal(2, 4, 4, seed=seed + 5).exp() + 9 * normal(2, 4, 4, seed=seed + 6)
        model = realnvp.RealNVP(2, 4, 8).double()
        model.norm.start(h)
        y, log_det = model.norm(h)
        for v in y, model(h)[0]:
            near(v.mean(0), 0, 1e-9)
            near(v.var(0, correction=0), 1, 1e-9)
        near(log_det, -h.std(0, correction=0).log().sum(), 1e-9)
    model.norm.start(torch.zeros(3, 2, 4, 4))
    assert all(v.isfinite().all() for v in model(torch.zeros(3, 2, 4, 4, dtype=torch.float64)))

class Recorder:
    """A model of the shape (1, 2, 2) whose inverse keeps the latents that it was given, and hands them on."""
    shape = 1, 2, 2

    def __init__(self):
        self.z = []

    def inverse(self, z):
        self.z.append(z)
        return z.view(-1, 1, 2, 2)

def test_realnvp_temperature():
    """(14): the temperature multiplies the deviation of z, not its variance; 1 is N(0, I), 0 a single image."""
    eps = {}
    for temperature in 1.0, 0.5, 0.0, 2.0:
        spy = Recorder()
        quiet(realnvp.sample, spy, 3000, temperature, chunk=1000)
        eps[temperature] = torch.cat(spy.z)
        near(eps[temperature], temperature * eps[1.0], 1e-6)
    near(eps[1.0].mean(), 0, 5 / 12000**0.5)  # five standard errors
    near(eps[1.0].var(), 1, 5 * (2 / 12000) ** 0.5)

def test_realnvp_sample():
    """sample() draws all it was asked for, chunk by chunk, the same for the same seed, each value one of 256 bytes."""
    spy = Recorder()
    x = quiet(realnvp.sample, spy, 5, chunk=2)
    assert [len(z) for z in spy.z] == [2, 2, 1] and x.shape == (5, 1, 2, 2)
    want = (torch.cat(spy.z).sigmoid() - realnvp.ALPHA) / (1 - 2 * realnvp.ALPHA)
    want = (256 * want).floor().clamp(0, 255).to(torch.uint8)
    assert torch.equal(realnvp.to_uint8(x).flatten(1), want) and len(want.unique(dim=0)) == 5
    assert torch.equal(x, quiet(realnvp.sample, spy, 5, chunk=2))
    assert not torch.equal(x, quiet(realnvp.sample, spy, 5, chunk=2, seed=1))
    model, bytes_ = flow_of(1, 16).float(), torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for u in 0.1, 0.5, 0.9:  # from bytes to z and back to bytes, from any place in their cells
        z = model(realnvp.to_logit(realnvp.dequantise(bytes_, u))[0])[0]
        assert torch.equal(realnvp.to_uint8(realnvp.to_images(model, z)), bytes_)

def test_realnvp_interpolate():
    """(15): the corners are the four latents, angles between them are as said, the radius stays if z are orthogonal."""
    for seed in SEEDS:
        z, half = normal(4, 48, seed=seed), math.pi / 2
        phi = torch.tensor([0, 0, half, half, 2 * half, 0, half / 3], dtype=torch.float64)
        phi_prime = torch.tensor([0, half, 0, half, 0, 2 * half, half / 2], dtype=torch.float64)
        a, b = 0.75**0.5, 0.5**0.5  # cos 30, cos 45 degrees
        want = torch.stack([*z, -z[0], -z[0], a * b * (z[0] + z[1]) + 0.5 * b * (z[2] + z[3])])
        near(realnvp.interpolate_four(z, phi, phi_prime), want, 1e-12)
        q = torch.linalg.qr(z.T)[0].T
        angles = 7 * normal(2, 100, seed=seed)
        near(realnvp.interpolate_four(q, *angles).norm(dim=1), torch.ones(100), 1e-12)

def test_realnvp_refuses_sizes():
    """A size that cannot be squeezed twice is refused in words, by the class and by the command; so is too little."""
    for size in 1, 2, 6, 14, 27, 30:
        try:
            raise AssertionError(f"took {realnvp.RealNVP(1, size, 8)}")
        except ValueError as e:
            assert f"--size {size}" in str(e) and "multiple of 4" in str(e) and "squeeze" in str(e)
    bad = [("--size", "30", "size 30.*multiple of 4"), ("--size", "7", "size 7"),
           *(("--temperature", value, "--temperature") for value in ("-1", "nan", "inf", "hot")),
           ("--couplings", "1", "--couplings"), ("--blocks", "-1", "--blocks")]
    with workdir() as here:
        words = command(realnvp, **inputs(here))
        wrong = [refused(realnvp, [*words, f"{name}={value}"], say, here) for name, value, say in bad]
    assert not any(wrong), "\n".join(filter(None, wrong))
    try:
        realnvp.RealNVP(1, 8, 8, couplings=1)
        raise AssertionError("took one coupling")
    except ValueError as e:
        assert "--couplings 1" in str(e)

def test_realnvp_training_draws():
    """Training sees each image that is not held out, with fresh and even u, and never one of the rest, which alone are
    validated on; a single image has to do for both."""
    for n, cut in (12, 10), (3, 2), (1, 1):
        images, seen, validated = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).repeat(1, 1, 4, 4), [], []

        def loss(model, x, seen=seen):
            seen.append(256 * x)
            return 0 * next(model.parameters()).sum()

        def bits(model, images, seed, device, validated=validated):
            validated.append(images)
            return torch.zeros(len(images))

        with mock.patch.multiple(realnvp, loss_bits=loss, image_bits=bits):
            model = quiet(realnvp.train, images, iters=100, batch=16, width=8)
        fitted, held_out = realnvp.hold_out(images)
        x = (fitted[:, 0, 0, 0, None] + torch.arange(0.005, 1, 0.01)) / 256  # any byte that is trained on, any u
        h = realnvp.to_logit(x)[0]
        near(model.norm.mean, h.mean(), 5 * h.std() / 1000**0.5)  # the data-dependent start, from 1000 draws
        near(model.norm.deviation, h.std(), 0.1 * h.std())
        x = torch.stack(seen)  # (100, 16, 1, 4, 4)
        byte, u = x.floor(), x - x.floor()
        used, counts = byte[..., 0, 0, 0].unique(return_counts=True)
        assert used.tolist() == sorted(fitted[:, 0, 0, 0].tolist()) and (byte == byte[..., :1, :1]).all()
        assert counts.min() > 0.6 * 1600 / cut  # of 160 each that is over five deviations away
        near(u.mean(), 0.5, 5 / (12 * u.numel()) ** 0.5)
        near(u.var(), 1 / 12, 5 / (180 * u.numel()) ** 0.5)
        assert len(u.flatten(1).unique(dim=0)) == 100 and len(validated) == 1
        assert all(torch.equal(v, held_out) for v in validated)

def test_realnvp_training_learns():
    """A hundred steps of a tiny flow save bits on images that it did not see, as its log says; it can be undone."""
    images = realnvp.draw_digits(240, 8)
    with workdir() as here:
        first = quiet(realnvp.train, images, iters=1, batch=2, width=8)
        model = quiet(realnvp.train, images, iters=100, batch=16, lr=2e-2, width=8, couplings=2, path=here / "model.pt")
        head, row = (here / "log.csv").read_text().split()
    before, after = (realnvp.image_bits(m, realnvp.hold_out(images)[1]).mean() for m in (first, model))
    assert head == "iteration,train_bits,valid_bits" and after < before - 0.1, (before, after)
    near(after, float(row.split(",")[2]), 1e-5)
    h = realnvp.to_logit(realnvp.dequantise(images[:9], 0.5))[0]
    near(model.inverse(model(h)[0]), h, 1e-5)

def test_realnvp_command():
    """The command's test figure is that of all test images, the corners of interpolation.png are four of them, and the
    rows of temperatures.png are the same latents at six temperatures."""
    load = realnvp.load
    with workdir() as here, mock.patch.object(realnvp, "load", lambda *args: woken(load(*args))):  # not the identity
        grey(here, 60)
        status, out, err = call(realnvp, command(realnvp, data="pics", temperature=0.6, seed=3))
        assert (status, err) == (0, ""), err
        model, test = realnvp.load("run/model.pt"), realnvp.load_images("pics", 8, test=True)
        bits = realnvp.image_bits(model, test, 3)
        error, said = bits.std(correction=0) / 6**0.5, re.search(r"6 test images: ([\d.]+) \+- ([\d.]+) bits/dim.* "
                                                                 r"(-?[\d.]+) nats", out)
        near([float(v) for v in said.groups()[:2]], [bits.mean(), error], 6e-5)  # four digits
        x = realnvp.dequantise(test, torch.rand(test.shape, generator=torch.Generator().manual_seed(3)))
        near(float(said[3]), realnvp.log_prob(model, x).mean(), 0.06)
        walk = tiles("run/interpolation.png", 8, 8)
        assert np.array_equal(walk[[0, 7, 56, 63]], test[:4, 0].numpy()) and len(np.unique(walk, axis=0)) == 64
        drawn = [quiet(realnvp.sample, model, 8, T, 3) for T in (0.0, 0.5, 0.7, 0.8, 0.9, 1.0)]
        alike(tiles("run/temperatures.png", 8, 8), realnvp.to_uint8(torch.cat(drawn))[:, 0].numpy())
        want = realnvp.to_uint8(quiet(realnvp.sample, model, 2, 0.6, 3))[:, 0].numpy()
        assert np.array_equal(np.load("run/samples.npy"), want)

# ------------------------------------------------------------------------------------------------------------ gan -----
gan = MODULES["gan"]

def js_by_integration(p, q):
    """JS(p || q) in nats for two densities on a line (2), by the trapezoidal rule."""
    x = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    p, q = (v.log_prob(x).exp() for v in (p, q))
    part = lambda a, b: torch.where(a > 1e-300, a * (a / ((a + b) / 2)).clamp(min=1e-300).log(), 0)
    return torch.trapezoid((part(p, q) + part(q, p)) / 2, x).item()

def law(mean, deviation):
    """A Gaussian on a line, in float64."""
    return D.Normal(*torch.tensor([mean, deviation], dtype=torch.float64))

GAUSSIANS = [(law(0, 1), law(1, 1)), (law(0, 1), law(0.5, 2)),
             (law(-2, 0.5), law(1, 1.5)), (law(0, 1), law(0, 1))]  # p_data and p_g

def evenly(p, n=100_000):
    """n points of a law on a line, evenly spread over its mass: their mean of f is close to the integral of p f."""
    return p.icdf((torch.arange(n, dtype=torch.float64) + 0.5) / n)

def test_gan_best_discriminator():
    """(2): the logits of a table that minimise loss_d are those of p / (p + q), at each of its entries."""
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        counts = torch.randint(1, 90, (2, 12), generator=generator)  # how often each of 12 values is drawn
        counts[:, -1] += 1000 - counts.sum(1)  # as many from both laws
        real, fake = (torch.arange(12).repeat_interleave(row) for row in counts)
        table = torch.zeros(12, dtype=torch.float64, requires_grad=True)
        value = lambda table=table, real=real, fake=fake: gan.loss_d(table[real], table[fake])
        for _ in range(20):  # Newton's method; the entries do not depend on each other
            slope, = torch.autograd.grad(value(), table, create_graph=True)
            curve, = torch.autograd.grad(slope.sum(), table)
            table.data -= slope.detach() / curve
        p, q = counts.double() / 1000
        near(table.detach().sigmoid(), p / (p + q), 1e-9)
        m = (p + q) / 2
        js = ((p * (p / m).log() + q * (q / m).log()) / 2).sum()
        near(-value().detach(), 2 * js - math.log(4), 1e-9)  # (3)

def test_gan_value_of_the_best_discriminator():
    """(3): with the logits log p - log q of two Gaussians, V is -log 4 + 2 JS by numerical integration."""
    for p, q in GAUSSIANS:
        best = lambda x, p=p, q=q: p.log_prob(x) - q.log_prob(x)
        js = js_by_integration(p, q)
        near(-gan.loss_d(best(evenly(p)), best(evenly(q))), 2 * js - math.log(4), 2e-5)  # of the tails' quantiles
        near(gan.js_estimate(best(evenly(p)), best(evenly(q))), js, 1e-5)
        assert (js == 0) == (p.mean == q.mean and p.stddev == q.stddev) and js < math.log(2)

def test_gan_js_is_bounded_by_any_discriminator():
    """(4): any other D gives less than JS, the right one JS, none more than log 2 = what laws without overlap reach."""
    for k, (p, q) in enumerate(GAUSSIANS):
        x, y, js = evenly(p), evenly(q, 50_000), js_by_integration(p, q)  # their numbers may differ
        best = lambda x, p=p, q=q: p.log_prob(x) - q.log_prob(x)
        near(gan.js_estimate(best(x), best(y)), js, 2e-5)
        for seed in range(6):
            a, b, c, d = normal(4, seed=10 * k + seed)
            wrong = [best(v) + a * torch.sin(2 * v + b) + c * v.tanh() + d for v in (x, y)]
            assert gan.js_estimate(*wrong) < js - 1e-3, seed
    for seed in SEEDS:
        real, fake = 30 * normal(2, 50, seed=seed)
        assert gan.js_estimate(real, fake) <= math.log(2)
    near(gan.js_estimate(torch.full((5,), 50.0), torch.full((9,), -50.0)), math.log(2), 1e-6)
    near(gan.js_estimate(torch.zeros(5), torch.zeros(9)), 0, 1e-6)  # D = 1/2 tells nothing

def test_gan_losses():
    """(1), (5), (6), (7): they are cross-entropies of D = sigmoid(logit), means over each batch, and never overflow."""
    bce = torch.nn.functional.binary_cross_entropy
    for seed in SEEDS:
        real, fake = 3 * normal(40, seed=seed), 3 * normal(60, seed=seed + 9)
        D_x, D_g = 1 / (1 + (-real).exp()), 1 / (1 + (-fake).exp())
        near(gan.loss_d(real, fake), -(D_x.log().mean() + (1 - D_g).log().mean()), 1e-12)  # -V, float64
        near(gan.loss_d(real, fake), bce(D_x, torch.ones_like(D_x)) + bce(D_g, torch.zeros_like(D_g)), 1e-12)
        near(gan.loss_g(fake, "minimax"), (1 - D_g).log().mean(), 1e-12)
        near(gan.loss_g(fake, "nonsaturating"), -D_g.log().mean(), 1e-12)
        assert gan.loss_g(fake) == gan.loss_g(fake, "nonsaturating")  # the default
        for loss in gan.loss_d(real, fake), gan.loss_g(fake), gan.loss_g(fake, "minimax"), gan.js_estimate(real, fake):
            assert loss.shape == ()
        near(gan.loss_d(real.repeat(2), fake.repeat(2)), gan.loss_d(real, fake), 1e-12)  # means, not sums
    for u in 1e4, -1e4:
        one = torch.tensor([u], requires_grad=True)
        big, got = max(u, 0), [gan.loss_d(-one, one), gan.loss_g(-one), gan.loss_g(one, "minimax")]
        near(torch.stack(got).detach(), [2 * big, big, -big])
        sum(got).backward()
        assert one.grad.isfinite().all()
    for kind in "Minimax", "", None:
        try:
            raise AssertionError(f"took {kind}: {gan.loss_g(torch.zeros(2), kind)}")
        except ValueError as e:
            assert repr(kind) in str(e)

def test_gan_slopes():
    """(6), (7): the slopes in the logit are -D and -(1 - D): the same direction, weak or strong where D says no."""
    logits = torch.cat([4 * normal(50), torch.tensor([-12.0, 0.0, 12.0], dtype=torch.float64)]).requires_grad_()
    slope = {kind: torch.autograd.grad(gan.loss_g(logits, kind) * len(logits), logits)[0]
             for kind in ("minimax", "nonsaturating")}
    D_g = 1 / (1 + (-logits.detach()).exp())
    near(slope["minimax"], -D_g, 1e-12)
    near(slope["nonsaturating"], D_g - 1, 1e-12)
    assert all((s < 0).all() for s in slope.values())
    assert -1e-5 < slope["minimax"][50] < 0 and slope["nonsaturating"][50] < -0.99999

def test_gan_both_losses_have_one_fixed_point():
    """(3), (6), (7): a G that shifts noise by theta: both losses pull it to p_data, rest there, and (6) goes down C."""
    p, z = law(1, 1), evenly(law(0, 1))
    for mean in -3.0, 0.0, 0.9, 1.0, 1.1, 4.0:
        theta, q = torch.tensor(mean, dtype=torch.float64, requires_grad=True), law(mean, 1)
        fake = theta + z
        logits = p.log_prob(fake) - q.log_prob(fake)  # D is the best one for this theta, and is held fixed
        pulls = {kind: torch.autograd.grad(gan.loss_g(logits, kind), theta, retain_graph=True)[0]
                 for kind in ("minimax", "nonsaturating")}
        for pull in pulls.values():
            assert pull.sign() == (0 if mean == 1 else math.copysign(1, mean - 1)), (mean, pull)
        step = 1e-4
        change = js_by_integration(p, law(mean + step, 1)) - js_by_integration(p, law(mean - step, 1))
        near(pulls["minimax"], 2 * change / (2 * step), 1e-5)  # C is 2 JS - log 4
        assert mean != 4 or pulls["nonsaturating"] > 5 * pulls["minimax"]  # far off, where D is sure

def test_gan_networks_rest_where_d_is_flat():
    """(6), (7): a D that says the same of every image leaves every weight of G at rest, with either loss."""
    for kind, flat in itertools.product(("minimax", "nonsaturating"), (True, False)):
        torch.manual_seed(0)
        G, judge = gan.Generator(1, 8, 4, 8), gan.Discriminator(1, 8, 4)
        if flat:
            torch.nn.init.zeros_(judge.net[-1].weight)
        gan.loss_g(judge(G(torch.randn(16, 8))), kind).backward()
        assert all(p.grad.any() != flat for p in G.parameters())

def players(channels=1, size=8, width=4, latent=8, seed=0):
    """A generator, a discriminator without dropout, and plain gradient descent for each of them."""
    torch.manual_seed(seed)
    G, judge = gan.Generator(channels, size, width, latent), gan.Discriminator(channels, size, width)
    next(layer for layer in judge.net if isinstance(layer, torch.nn.Dropout2d)).p = 0.0
    return G, judge, *(torch.optim.SGD(net.parameters(), 0.1) for net in (G, judge))

def test_gan_steps_leave_the_other_alone():
    """(8): a step goes down the gradient of its own loss; the other's weights and gradients stay, stale or not."""
    for seed, kind, stale in itertools.product(SEEDS, ("minimax", "nonsaturating"), (False, True)):
        G, judge, opt_g, opt_d = players(seed=seed)
        x, fake = normal(6, 1, 8, 8, seed=seed).float(), G(torch.randn(6, 8))
        for p in [*G.parameters(), *judge.parameters()] if stale else ():
            p.grad = torch.full_like(p, 7.0)
        state = lambda net: copied([(p, p.grad) for p in net.parameters()])
        before_g, before_d, buffers = state(G), state(judge), copied(list(G.buffers()))
        logits = judge(x), judge(fake)
        grads = torch.autograd.grad(gan.loss_d(*logits), judge.parameters(), retain_graph=True)
        told = gan.d_step(judge, opt_d, x, fake)
        near(torch.stack(told), torch.stack(logits).detach(), 1e-6)  # float32; before the step
        assert not any(v.requires_grad for v in told)
        same(state(G), before_g)
        for p, (old, _), grad in zip(judge.parameters(), before_d, grads):
            near(p.detach(), old - 0.1 * grad, 1e-6)
        before_d = state(judge)
        loss = gan.loss_g(judge(fake), kind)
        grads = torch.autograd.grad(loss, G.parameters(), retain_graph=True)
        assert any(grad.abs().max() > 1e-6 for grad in grads)
        told = gan.g_step(G, judge, opt_g, fake, kind)  # after D's step fake still has its history
        near(told, loss.detach(), 1e-6)
        assert not told.requires_grad
        same(state(judge), before_d)
        for p, (old, _), grad in zip(G.parameters(), before_g, grads):
            near(p.detach(), old - 0.1 * grad, 1e-7)
        same(list(G.buffers()), buffers)  # G was not even run again

def copied(tensors):
    """Copies, through lists and tuples, that later steps do not change."""
    if isinstance(tensors, (list, tuple)):
        return [copied(t) for t in tensors]
    return tensors if tensors is None else tensors.detach().clone()

def test_gan_great_circle():
    """(9): it starts at u, ends at v, turns by equal angles in their plane, and unit vectors keep their length."""
    angle = lambda u, v: torch.arccos(((u * v).sum(-1) / u.norm() / v.norm(dim=-1)).clamp(-1, 1))
    a = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)[:, None]
    for seed in range(6):
        u, v = normal(2, 2 + seed, seed=seed)
        walk = gan.great_circle(u, v, a)
        assert walk.shape == (5, 2 + seed)
        near(walk[[0, -1]], torch.stack([u, v]), 1e-12)
        near(walk, gan.great_circle(v, u, 1 - a), 1e-12)
        for share, point in zip(a[:, 0].tolist(), walk):
            near(gan.great_circle(u, v, share), point, 1e-12)
        walk = gan.great_circle(u / u.norm(), v / v.norm(), a)
        near(walk.norm(dim=1), 1, 1e-12)
        near(angle(u, walk), a[:, 0] * angle(u, v), 1e-7)  # arccos of nearly 1
        near(gan.great_circle(u, u, 0.3), u, 1e-12)  # no angle at all
        near(gan.great_circle(u, -3 * u, a), (1 - 4 * a) * u, 1e-12)  # no shortest way

def test_gan_networks():
    """G and D fit any side from 4, grey and colour, use every weight and pixel, and in use look at no neighbour."""
    for channels, size in itertools.product((1, 3), (4, 5, 8, 9, 28, 30, 32)):
        G, judge = woken(gan.Generator(channels, size, 4, 6)), woken(gan.Discriminator(channels, size, 4))
        z = normal(5, 6).float()
        x = G(z)
        assert x.shape == (5, *G.shape) == (5, channels, size, size) and x.abs().max() <= 1 and G.latent == 6
        seen = x.detach().requires_grad_()
        logits = judge(seen)
        assert logits.shape == (5,) and len(logits.unique()) == 5
        logits.square().sum().backward()
        assert (seen.grad != 0).all(), size  # no edge is left out
        judge(x).square().sum().backward()
        for name, p in [*G.named_parameters(), *judge.named_parameters()]:
            assert p.grad.any(), name
        G.eval(), judge.eval()
        near(G(z[1:2]), G(z)[1:2].detach(), 1e-5)  # float32, sums in another order
        near(judge(x[1:2]), judge(x)[1:2].detach(), 1e-4)
    for build in gan.Generator, gan.Discriminator:
        for size in 0, 3:
            try:
                raise AssertionError(f"took it: {build(1, size)}")
            except ValueError as e:
                assert f"--size {size}" in str(e) and "4" in str(e)

def test_gan_first_weights():
    """Weights start as N(0, 0.02^2), biases at 0, BatchNorm at scale 1, shift 0; its eps is torch's 1e-5."""
    for seed in SEEDS:
        torch.manual_seed(seed)
        for net in gan.Generator(3, 28, 16, 64), gan.Discriminator(3, 28, 16):
            for layer in net.modules():
                if isinstance(layer, torch.nn.BatchNorm2d):
                    assert (layer.weight == 1).all() and not layer.bias.any() and layer.eps == 1e-5
                elif isinstance(getattr(layer, "weight", None), torch.Tensor):
                    n = layer.weight.numel()
                    near(layer.weight.mean().detach(), 0, 4.5 * 0.02 / n**0.5)
                    near(layer.weight.std().detach(), 0.02, 4.5 * 0.02 / (2 * n) ** 0.5)

class Training:
    """What gan.train did: the players' steps in their order, G's state after each of its steps, and all the z."""

    def __init__(self, images, **flags):
        self.steps, self.states, self.judges, self.z = [], [], [], []
        real, forward = types.SimpleNamespace(d=gan.d_step, g=gan.g_step), gan.Generator.forward

        def d_step(judge, opt, x, fake):
            logits = real.d(judge, opt, x, fake)
            self.steps.append(("d", opt.param_groups[0]["lr"], x, fake, logits))
            return logits

        def g_step(G, judge, opt, fake, kind):
            loss = real.g(G, judge, opt, fake, kind)
            self.steps.append(("g", opt.param_groups[0]["lr"], kind, fake, loss))
            self.states.append({name: value.clone() for name, value in G.state_dict().items()})
            self.judges.append({name: value.clone() for name, value in judge.state_dict().items()})
            return loss

        def watched(G, z):
            if G.training:
                self.z.append(z)
            return forward(G, z)

        watch = mock.patch.object(gan.Generator, "forward", watched)
        with mock.patch.multiple(gan, d_step=d_step, g_step=g_step), watch:
            self.average = quiet(gan.train, images, width=4, latent=8, **flags)

def test_gan_training_steps():
    """Algorithm 1: k steps of D, each on new images and new z, then one of G on D's last; one rate for both."""
    images = torch.arange(0, 200, 20, dtype=torch.uint8).view(10, 1, 1, 1).repeat(1, 1, 8, 8)
    for k, kind in (1, "nonsaturating"), (3, "minimax"):
        made = Training(images, iters=30, batch=4, lr=1e-3, k=k, loss=kind)
        assert "".join(step[0] for step in made.steps) == ("d" * k + "g") * 30
        for i in range(30):
            *_, last, own = made.steps[i * (k + 1) : (i + 1) * (k + 1)]
            assert own[3] is last[3] and own[2] == kind and own[3].requires_grad
            near([step[1] for step in (last, own)], 1e-3 * min((i + 1) / 200, 1 - 0.6 * i / 30), 1e-12)
        x, z = torch.stack([step[2] for step in made.steps if step[0] == "d"]), torch.stack(made.z)
        used, counts = x[..., 0, 0, 0].unique(return_counts=True)
        near(used, torch.arange(0, 200, 20) / 127.5 - 1, 1e-6)
        assert (x == x[..., :1, :1]).all() and counts.min() > 2 * k  # of 12 k each, on average
        assert z.shape == (30 * k, 4, 8) and len(z.flatten(0, 1).unique(dim=0)) == 120 * k
        near(z.mean(), 0, 4.5 / z.numel() ** 0.5)
        near(z.var(), 1, 4.5 * (2 / z.numel()) ** 0.5)

def test_gan_average_and_pictures():
    """What draws is the average of G's weights and of BatchNorm's statistics; its pictures are taken on time."""
    images, iters = gan.draw_digits(8, 8), 24
    for seed in 0, 5:
        with workdir() as here:
            made = Training(images, iters=iters, batch=4, lr=0.2, seed=seed, path=here / "model.pt")
            G, judge, frames = gan.load_players(here / "model.pt")
            parts = torch.load(here / "model.pt", weights_only=True)["parts"]
        torch.manual_seed(seed)
        mean = gan.Generator(1, 8, 4, 8)
        want, states = {name: v.double() for name, v in mean.state_dict().items()}, made.states
        z = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
        shots = [1, 1, 3, 4, 6, 9, 12, 16, 20, 24]  # 1, 4, 9, ..., 100 % of 24, rounded up
        for i, state in enumerate(states):
            m = (1 + i) / (10 + i)
            want = {name: m * want[name] + (1 - m) * state[name] for name in want}
            mean.load_state_dict(want | {name: v for name, v in state.items() if "num" in name})
            for c in (c for c, shot in enumerate(shots) if shot == i + 1):
                alike(frames[c].numpy(), gan.to_uint8(mean.eval()(z)).numpy())
        for name, value in made.average.state_dict().items():
            near(value, states[-1][name] if "num" in name else want[name], 1e-5)  # float32
        assert (want["net.2.running_var"] - 1).abs().min() > 0.05  # they have moved
        assert len(frames.flatten(1).unique(dim=0)) > 4 and frames.dtype == torch.uint8
        same(made.average.state_dict(), G.state_dict())
        same(dict(judge.state_dict()), dict(parts[2]))
        same(dict(made.judges[-1]), dict(parts[4]))
        torch.manual_seed(seed)
        gan.Generator(1, 8, 4, 8)
        want = {name: v.double() for name, v in gan.Discriminator(1, 8, 4).state_dict().items()}
        for i, state in enumerate(made.judges):
            m = (1 + i) / (10 + i)
            want = {name: m * want[name] + (1 - m) * state[name] for name in want}
        for name, value in parts[2].items():
            near(value, made.judges[-1][name] if "num" in name else want[name], 1e-5)  # D is averaged, too
        same(dict(states[-1]), dict(parts[0]))
        assert [part["param_groups"][0]["betas"] for part in parts[5:7]] == [(0.5, 0.99)] * 2
        assert not G.training and not judge.training and not made.average.training
    assert Training(images, iters=1, batch=2, seed=-1).average.latent == 8

def test_gan_memory_of_the_average():
    """After many iterations the average still takes in 1 - 0.998 of G each time."""
    logits, steps = torch.zeros(2), itertools.count()

    def g_step(G, judge, opt, fake, kind):
        G.net[-2].bias.data.fill_(next(steps))
        return logits.sum()

    with mock.patch.multiple(gan, d_step=lambda *args: (logits, logits), g_step=g_step):
        images = torch.zeros(4, 1, 4, 4, dtype=torch.uint8)
        average = quiet(gan.train, images, iters=5200, batch=2, width=1, latent=1)
    want = 0.0
    for i in range(5200):
        m = min(0.998, (1 + i) / (10 + i))  # 0.998 from iteration 4490 on
        want = m * want + (1 - m) * i
    near(average.net[-2].bias.item(), want, 0.5)  # float32; with no upper end it lags several more

def test_gan_log():
    """log.csv has the means of D(x), D(G(z)) and the bound since the row before, and no sample of the last alone."""
    with workdir() as here:
        made = Training(gan.draw_digits(20, 8), iters=130, batch=4, path=here / "model.pt")
        head, *rows = [row.split(",") for row in (here / "log.csv").read_text().split()]
    assert head == ["iteration", "d_real", "d_fake", "js", "loss_g"]
    assert [row[0] for row in rows] == ["100", "130"]
    real, fake = (torch.stack(v).double() for v in zip(*(step[4] for step in made.steps if step[0] == "d")))
    D_x, D_g = real.sigmoid(), fake.sigmoid()
    js = (math.log(4) + D_x.log().mean(1) + (1 - D_g).log().mean(1)) / 2
    loss_g = torch.stack([step[4] for step in made.steps if step[0] == "g"])
    for row, part in zip(rows, (slice(0, 100), slice(100, 130))):
        near([float(v) for v in row[1:]], [v[part].mean() for v in (D_x, D_g, js, loss_g)], 1e-5)

def test_gan_losses_not_finite():
    """Either loss may be the one that is not finite: training ends, and says at which iteration."""
    images, nan = gan.draw_digits(4, 8), torch.full((2,), math.nan)
    for player, broken in ("D", {"d_step": lambda *args: (nan, nan)}), ("G", {"g_step": lambda *args: nan.sum()}):
        with mock.patch.multiple(gan, **broken), workdir() as here:
            try:
                quiet(gan.train, images, iters=3, batch=2, width=4, latent=4, path=here / "model.pt")
                raise AssertionError(f"the loss of {player} was nan, and it did not mind")
            except FloatingPointError as e:
                assert re.search(rf"nan \({player}\).* iteration 3;.*--lr", str(e)), e
                assert str(e).count("nan") == 1, e
            assert not snapshot(here)

def test_gan_learns():
    """Given one image, G learns to draw it from any z; the same seed learns the same bits."""
    images = gan.draw_digits(4, 8)[3:]
    train = functools.partial(quiet, gan.train, images.repeat(4, 1, 1, 1), batch=8, width=8, latent=4)
    want, x = gan.to_float(images), quiet(gan.sample, train(iters=250), 50)
    assert (x - want).square().mean() < 0.3 * want.square().mean()
    one, again, other = (train(iters=3, seed=seed).state_dict() for seed in (1, 1, 2))
    same(dict(one), dict(again))
    assert not torch.equal(one["net.0.weight"], other["net.0.weight"])

def test_gan_sample():
    """sample() draws all it was asked for, chunk by chunk, N(0, I) into the generator, the same for the same seed."""
    asked = []
    model = lambda z: asked.append(z) or z.view(-1, 1, 2, 3)
    model.latent, state = 6, torch.get_rng_state()
    x = quiet(gan.sample, model, 5000, chunk=2000)
    assert [len(z) for z in asked] == [2000, 2000, 1000] and x.shape == (5000, 1, 2, 3)
    assert torch.equal(x.flatten(1), torch.cat(asked)) and len(x.flatten(1).unique(dim=0)) == 5000
    near(x.mean(), 0, 4.5 / 30_000**0.5)
    near(x.var(), 1, 4.5 * (2 / 30_000) ** 0.5)
    assert torch.equal(x, quiet(gan.sample, model, 5000, chunk=2000))
    assert not torch.equal(x, quiet(gan.sample, model, 5000, chunk=2000, seed=1))
    assert torch.equal(state, torch.get_rng_state())

def test_gan_command():
    """The report and the pictures are those of the averaged G and of D on the test images, and flags get through."""
    real_load = gan.load_players

    def load_players(path, device="cpu"):
        G, judge, frames = real_load(path, device)
        return woken(G), woken(judge), frames  # as if trained for longer

    with workdir() as here, mock.patch.object(gan, "load_players", load_players):
        grey(here, 40)
        flags = dict(data="pics", iters=12, samples=9, seed=3, k=2, loss="minimax", latent=5, lr=0.01)
        status, out, err = call(gan, command(gan, **flags))
        assert (status, err) == (0, ""), err
        settings = torch.load("run/model.pt", weights_only=True)["settings"]
        assert {**settings, **flags, "data": None} == {**settings, "data": None, "samples": 9}
        G, judge, frames = gan.load_players("run/model.pt")
        assert np.array_equal(np.load("run/samples.npy"), gan.to_uint8(quiet(gan.sample, G, 9, 3))[:, 0])
        assert np.array_equal(tiles("run/progress.png", 8, 10), frames.transpose(0, 1).flatten(0, 2).numpy())
        walk = tiles("run/walk.png", 8, 10)
        z = torch.randn(12, 5, generator=torch.Generator().manual_seed(3))
        points = [ddim.slerp(u, v, a) for u, v in zip(z[::2], z[1::2]) for a in torch.linspace(0, 1, 10)]
        alike(walk, gan.to_uint8(G(torch.stack(points)))[:, 0].numpy())
        real = judge(gan.to_float(gan.load_images("pics", 8, test=True))).double()
        fake = judge(quiet(gan.sample, G, 2000, 4)).double()
        assert len(real) == 4 and 0.01 < fake.std()
        js = (math.log(4) + real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean()) / 2
        said = re.search(r"on 4 test images ([\d.]+), on 2000 of G's ([\d.]+): .*>= (-?[\d.]+) \+- ([\d.]+) nats, "
                         r"(-?[\d.]+)%", out)
        spread = (real.sigmoid().log().var() * 3 / 4 / 4 + (1 - fake.sigmoid()).log().var() / 2000).sqrt() / 2
        want = [real.sigmoid().mean(), fake.sigmoid().mean(), js, spread, 100 * js / math.log(2)]
        for got, v, digit in zip(said.groups(), want, (1e-3, 1e-3, 1e-4, 1.1e-4, 0.1)):
            near(float(got), v, 0.51 * digit)

def test_gan_stacked():
    """--stacked: each channel is a permutation of all grey images, each in another order; colours are refused."""
    x = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(-1, -1, 8, 8)
    y = gan.stack(x, 1)
    order = y[:, :, 0, 0].T.tolist()
    assert y.shape == (50, 3, 8, 8) and (y == y[:, :, :1, :1]).all()
    assert all(sorted(channel) == list(range(50)) for channel in order) and len({tuple(c) for c in order}) == 3
    assert torch.equal(y, gan.stack(x, 1)) and not torch.equal(y, gan.stack(x, 2))
    with workdir() as here:
        grey(here)
        words = [*command(gan, data="pics"), "--stacked"]
        wrong = refused(gan, [*words, "--channels", 3], "grey", here)
        assert not wrong, wrong
        assert call(gan, words)[0] == 0 and np.load("run/samples.npy").shape == (2, 8, 8, 3)
        saved = torch.load("run/model.pt", weights_only=True)["settings"]["images"]
        assert saved == hashlib.sha256(gan.stack(gan.load_images("pics", 8), 0).numpy()).hexdigest()[:12]

def test_gan_bad_values():
    """What cannot be trained is refused before anything is written, and so is a checkpoint of another game."""
    bad = [("--k", "0", "--k"), ("--latent", "0", "--latent"), ("--loss", "hinge", "--loss"),
           ("--size", "3", "--size 3.*at least 4"), ("--batch", "1", "--batch 1.*two")]
    other = [("--k", "2", "k 1, not 2"), ("--loss", "minimax", "loss nonsaturating, not minimax"),
             ("--latent", "9", "latent 64, not 9".replace("64", str(options(gan)["--latent"].default)))]
    words, _, files = finished(gan)
    lacks = torch.load(io.BytesIO(files["run/model.pt"]), weights_only=True)
    lacks["parts"] = lacks["parts"][:3]  # no pictures
    with workdir() as here:
        inputs(here)
        torch.save(lacks, here / "lacks.pt")
        try:
            raise AssertionError(f"it loaded {gan.load(here / 'lacks.pt')}")
        except ValueError as e:
            assert "lacks.pt" in str(e)
        wrong = [refused(gan, [*words, name, value], say, here) for name, value, say in bad]
        unpack(files, here)
        wrong += [refused(gan, [*words, name, value], say + ".*--fresh", here) for name, value, say in other]
    assert not any(wrong), "\n".join(filter(None, wrong))
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    for flags, say in ({"k": 0}, "--k 0"), ({"batch": 1}, "--batch 1"), ({"loss": "hinge"}, "hinge"):
        try:
            raise AssertionError(f"it trained: {quiet(gan.train, images, iters=1, **flags)}")
        except ValueError as e:
            assert say in str(e), e
    try:
        raise AssertionError(f"it trained: {gan.train(images[:, :, :6], iters=1)}")
    except ValueError as e:
        assert "8x6" in str(e)

# ------------------------------------------------------------------------------------------------------------ cpc -----
cpc = MODULES["cpc"]

def some_cpc(*sizes, seed=0):
    """A CPC whose weights are as if trained, in float64 and eval mode."""
    return woken(cpc.CPC(*sizes), seed).double().requires_grad_(False).eval()

def correlated(n, sets, rho, seed=0):
    """Gaussian pairs with correlations rho (d,) -> scores (sets, n, n) by the density ratio itself, and I in nats."""
    c, e = normal(sets, n, len(rho), seed=seed), normal(sets, n, len(rho), seed=seed + 9)
    rho = torch.tensor(rho).double()
    x, s = rho * c + (1 - rho**2).sqrt() * e, (1 - rho**2).sqrt()
    log_ratio = D.Normal(rho * c[:, :, None], s).log_prob(x[:, None]) - D.Normal(0.0, 1.0).log_prob(x[:, None])
    return log_ratio.sum(-1), -(1 - rho**2).log().sum() / 2

def classed(here, names=("b", "a", "c"), n=25):
    """n pictures, the i-th i + 100 all over, in subfolders by these names in turn -> {grey value: class}."""
    kinds = {}
    for i in range(n):
        file = here / "pics" / names[i % len(names)] / ("deep" if i % 4 else ".") / f"{i:02}{('.png', '.PNG')[i % 2]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i + 100).save(file)
        kinds[i + 100] = sorted(names).index(names[i % len(names)])
    return kinds

def test_cpc_loss_by_hand():
    """(2): of each context, over its candidates, N numbers; the other axis gives other numbers."""
    scores = torch.tensor([[1.0, 3, 1], [1, 2, 1], [1, 1, 1]]).double().log()
    near(cpc.info_nce(scores), [math.log(5), math.log(2), math.log(3)], 1e-12)  # 1/5, 2/4, 1/3
    near(cpc.info_nce(scores.t()), [math.log(3), math.log(3), math.log(3)], 1e-12)  # 1/3, 2/6, 1/3
    near(cpc.nce_bound(scores), [math.log(3 / 5), math.log(3 / 2), 0], 1e-12)
    assert cpc.nce_hits(torch.tensor([[1.0, 2, 0], [0, 2, 1], [0, 4, 3]])).tolist() == [0, 1, 0]
    assert cpc.nce_hits(torch.tensor([[1.0, 2, 0], [0, 2, 1], [0, 4, 3]]).t()).tolist() == [1, 0, 1]
    for seed in SEEDS:
        scores = normal(2, 3, 5, 5, seed=seed)
        f = scores.exp()
        want = [-math.log(f[a, b, i, i] / sum(f[a, b, i, j] for j in range(5)))
                for a, b, i in itertools.product(range(2), range(3), range(5))]
        near(cpc.info_nce(scores).flatten(), want, 1e-12)
        near(cpc.info_nce(scores + normal(2, 3, 5, 1, seed=9)).flatten(), want, 1e-12)  # a factor of c alone
        assert (cpc.info_nce(scores + normal(2, 3, 1, 5, seed=9)).flatten() - torch.tensor(want)).abs().min() > 1e-3
        assert cpc.info_nce(1e4 * scores).isfinite().all()

def test_cpc_scores():
    """(4): the score [i, j] is tau times the cosine of candidate j with what W_k makes of context i."""
    for seed in SEEDS:
        z, c, W = normal(2, 4, 7, seed=seed), normal(2, 4, 5, seed=seed + 9), normal(5, 7, seed=seed + 99)
        got = cpc.log_f(z, c, W)
        assert got.shape == (2, 4, 4)
        for a, i, j in itertools.product(range(2), range(4), range(4)):
            guess = torch.einsum("c,cz->z", c[a, i], W)
            near(got[a, i, j], 10 * (guess * z[a, j]).sum() / guess.norm() / z[a, j].norm(), 1e-12)

def test_cpc_random_scores():
    """(2): scores that know nothing have a loss of log N and pick the right one in N times; so has a new network."""
    for n in 2, 10, 300:
        near(cpc.info_nce(torch.zeros(3, n, n)), math.log(n), 1e-5)
        scores = 0.01 * normal(40, n, n)
        loss, hits = cpc.info_nce(scores), cpc.nce_hits(scores)
        near(loss.mean(), math.log(n), 1e-4 + 4.5 * 0.01 / loss.numel() ** 0.5)
        near(hits.mean(), 1 / n, 4.5 * (1 / n / hits.numel()) ** 0.5)
        near(cpc.nce_bound(scores).mean(), 0, 1e-4 + 4.5 * 0.01 / loss.numel() ** 0.5)
    torch.manual_seed(0)
    for scores in cpc.CPC(1, 14, 16)(torch.rand(100, 1, 14, 14)):  # every pixel drawn by itself: nothing to be known
        assert cpc.info_nce(scores).mean() > math.log(100) and 0.003 < cpc.nce_hits(scores).mean() < 0.03

def test_cpc_shuffled():
    """(2): with the best scores there are, but the candidates in another order, the choice is no better than chance."""
    n, scores = 50, correlated(50, 40, [0.95, 0.9, 0.8])[0]
    assert cpc.nce_hits(scores).mean() > 0.4
    for seed in SEEDS:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        order = order[(order.argsort() + 1) % n]  # a cycle through all, so that none stays where it was
        assert sorted(order.tolist()) == list(range(n)) and (order != torch.arange(n)).all()
        wrong = scores[:, :, order]
        near(cpc.nce_hits(wrong).mean(), 1 / n, 4.5 * (1 / n / 2000) ** 0.5)
        assert cpc.info_nce(wrong).mean() > math.log(n) > cpc.info_nce(scores).mean()

def test_cpc_bound_of_gaussians():
    """(3), (5): on Gaussians of known I the density ratio's bound is below I, rises with N, and comes near."""
    for rho, most in (([0.9, 0.7], 0.02), ([0.5], 0.005), ([0.0, 0.0], 1e-9), ([0.99, 0.9, 0.9], 0.2)):
        last = -1e-9
        for n, sets in (2, 5000), (8, 1000), (64, 50), (512, 4):
            scores, known = correlated(n, sets, rho)
            nats = cpc.nce_bound(scores).mean(1)
            mean, error = nats.mean().item(), nats.std().item() / sets**0.5 + 4 / n / sets  # rough for so few sets
            assert mean < known + 3 * error and mean <= math.log(n), (rho, n, mean, known)
            assert mean > last - 3 * error, (rho, n, mean, last)
            last = mean
            for worse in scores / 2, 2 * scores, scores.transpose(1, 2) + 3 * normal(sets, 1, n):
                assert (cpc.nce_bound(worse).mean() <= mean + 1e-9) if any(rho) else True
        assert known - mean < most + 0.1 * any(rho), (rho, mean, known)
    many = correlated(8, 2000, [0.9999] * 4)
    assert many[1] > 15 and math.log(8) - 1e-3 < cpc.nce_bound(many[0]).mean() <= math.log(8)  # no more than log N

def enumerated(f, joint, n):
    """log N - L, exactly, for the scores f (x, c) of a table p(x, c), by all sets of n candidates."""
    p, total = joint.sum(1), 0
    for c, *x in itertools.product(range(joint.shape[1]), *[range(len(joint))] * n):
        scores = torch.stack([f[j, c] for j in x]).expand(n, n)
        total = total + joint[x[0], c] * math.prod(p[j] for j in x[1:]) * cpc.nce_bound(scores)[0]  # x[0] is c's own
    return total

def test_cpc_bound_by_enumeration():
    """(1), (3), (5): on a small table, with all sets of candidates, exactly: no f passes I, and (3) is the best f."""
    for seed, n in itertools.product(SEEDS, (2, 3)):
        joint = normal(4, 3, seed=seed).exp()
        joint /= joint.sum()  # p(x, c), 4 x 3
        ratio = joint / joint.sum(1, keepdim=True) / joint.sum(0)
        known, best = (joint * ratio.log()).sum(), ratio.log().requires_grad_()
        value = enumerated(best, joint, n)
        assert 0.3 * known < value < known and torch.autograd.grad(value, best)[0].abs().max() < 1e-12
        for other in SEEDS:
            assert enumerated(ratio.log() + normal(4, 3, seed=other), joint, n) < value
        near(enumerated(ratio.log() + normal(1, 3), joint, n), value.item(), 1e-12)
        posterior = ratio[[2, 0, 1], 0]
        near((-cpc.info_nce(posterior.log().expand(3, 3))).exp(), posterior / posterior.sum(), 1e-12)

def strips(model, rows, columns):
    """Which pixels of an image lie in these strips of model.side pixels, as a mask (H, W)."""
    s, size = model.side, model.shape[2]
    seen, before = torch.zeros(7 * s, 7 * s, dtype=torch.bool), (7 * s - size) // 2
    seen[max(0, rows[0]) * s : rows[1] * s, max(0, columns[0]) * s : columns[1] * s] = True
    return seen[before : before + size, before : before + size]

def seen_by(v, x):
    """The pixels (N, H, W) of x (N, C, H, W) on which v depends, by autograd; all channels count, or none does."""
    depends = torch.autograd.grad(v.sum(), x, retain_graph=True)[0] != 0
    assert torch.equal(depends.all(1), depends.any(1))
    return depends.all(1)

def test_cpc_predicts_what_it_has_not_seen():
    """(6): by autograd's Jacobian c has seen each pixel above and beside it, and none of the patch that it is scored
    with; that patch lies k rows below in the same column; and no image sees another."""
    for channels, size in (1, 28), (3, 14), (1, 8), (1, 10):
        model, x = some_cpc(channels, size, 24), normal(2, channels, size, size).requires_grad_()
        with mock.patch.object(cpc, "log_f") as log_f:
            model(x)
        assert cpc.STEPS == (2, 3, 4) and log_f.call_count == 3
        for k, ((z, c, W), _) in zip((2, 3, 4), log_f.call_args_list):
            assert z.shape == (6 - k, 6, 2, 32) and c.shape == (6 - k, 6, 2, 64) and W is model.W[k - 2]
            for r, j in itertools.product(range(6 - k), range(6)):
                (other, target), (another, past) = seen_by(z[r, j, 1], x), seen_by(c[r, j, 1], x)
                assert not other.any() and not another.any()
                assert torch.equal(target, strips(model, (r + k, r + k + 2), (j, j + 2))), (k, r, j)
                assert torch.equal(past, strips(model, (0, r + 2), (j - 1, j + 3))), (k, r, j)
                assert not (past & target).any()
                assert past.any() or size == 8  # of which the first strip and a half is black that was added

def test_cpc_forward():
    """(4), (6): forward() gives, for each k, the scores of every context with the patches k rows below it."""
    model, x = some_cpc(1, 8, 8), normal(5, 1, 8, 8)
    z = model.encoder(model.patches(x))
    c = model.context(z)
    near(c[:4], model.context(z[:4]), 1e-12)  # rows below change nothing
    got = model(x)
    assert len(got) == 3
    for k, W, scores in zip((2, 3, 4), model.W, got):
        assert scores.shape == (6 - k, 6, 5, 5)
        for r, j in itertools.product(range(6 - k), range(6)):
            near(scores[r, j], cpc.log_f(z[r + k, j], c[r, j], W), 1e-10)

def test_cpc_features():
    """(7): means of z over 2 x 2 patches, row by row; bytes or floats, in pieces of any size, alone or among others."""
    for channels, size in (1, 28), (3, 8):
        model = some_cpc(channels, size, 8).float()
        images = torch.arange(7 * channels * size * size).mul(7919).to(torch.uint8).view(7, channels, size, size)
        x, s = cpc.to_float(images), model.side
        got = cpc.encode(model, images)
        assert got.shape == (7, 288) and got.dtype == torch.float32
        before = (7 * s - size) // 2
        padded = torch.full((7, channels, 7 * s, 7 * s), -1.0)
        padded[:, :, before : before + size, before : before + size] = x
        z = {(r, j): model.encoder(padded[:, :, r * s : (r + 2) * s, j * s : (j + 2) * s].flatten(1))
             for r in range(6) for j in range(6)}
        want = [(z[r, j] + z[r + 1, j] + z[r, j + 1] + z[r + 1, j + 1]) / 4 for r in (0, 2, 4) for j in (0, 2, 4)]
        near(got, torch.cat(want, 1), 1e-5)
        near(cpc.encode(model, x), got, 1e-5)
        near(cpc.encode(model, x, chunk=3), got, 1e-5)
        near(cpc.encode(model, x[2:3]), got[2:3], 1e-5)

def test_cpc_network():
    """Any size from 7 on, grey or colour; each weight counts in the loss; a size too small is said."""
    for channels, size in itertools.product((1, 3), (7, 8, 13, 28, 32)):
        model = woken(cpc.CPC(channels, size, 8))
        x = normal(4, channels, size, size).float()
        assert model.shape == (channels, size, size) and model.head is None
        sum(cpc.info_nce(scores).mean() for scores in model(x)).backward()
        for name, p in model.named_parameters():
            assert p.grad.any() and p.grad.isfinite().all(), name
    model = cpc.CPC(1, 8, 8, 5)
    assert model.head(model.features(torch.rand(2, 1, 8, 8))).shape == (2, 5)
    refuses("--size 6.*7 pixels", cpc.CPC, 1, 6)

def test_cpc_probe():
    """(8): the probe is where the penalised loss of standardised features, by autograd and in float64, has no slope."""
    for seed in SEEDS:
        mix, y = 2 * normal(3, 5, seed=seed), torch.arange(90) % 3
        h = (mix[y] + 2 * normal(90, 5, seed=seed + 9)) * torch.tensor([1.0, 3, 1, 1, 5]).double() + 7
        with mock.patch.object(torch.optim, "LBFGS", side_effect=torch.optim.LBFGS) as optimiser:
            got = cpc.linear_probe(h, y, h, weight_decay=0.01, iters=300)
        V = optimiser.call_args[0][0][0].detach().clone().requires_grad_()
        g = F.pad((h - h.mean(0)) / h.std(0, correction=0), (0, 1), value=1)
        loss = F.cross_entropy(g @ V.t(), y) + 0.005 * V.square().sum()
        assert V.shape == (3, 6) and torch.autograd.grad(loss, V)[0].abs().max() < 1e-5 and V.abs().max() > 0.5
        assert torch.equal(got, (g @ V.t()).argmax(1)) and 0.6 < (got == y).double().mean()
        scaled = cpc.linear_probe(3e3 * h - 5, y, 3e3 * h - 5, weight_decay=0.01, iters=300)
        assert torch.equal(scaled, got)
        more = torch.cat([h, torch.ones(90, 1).double()], 1)  # says nothing in training, and must not in the test
        wild = torch.cat([h, 1 + 1e-3 * normal(90, 1)], 1)
        assert torch.equal(cpc.linear_probe(more, y, wild, weight_decay=0.01, iters=300), got)
        more[0, 5] += 1e-3  # nor what hardly ever says something
        wild[:, 5] = 1 + normal(90, seed=seed)
        assert (cpc.linear_probe(more, y, wild, weight_decay=0.01, iters=300) == got).double().mean() > 0.95
    few, most = torch.zeros(100, 1), (torch.arange(100) > 80).long()
    assert not cpc.linear_probe(few, most, few).any()  # without features the commonest class: there is a bias

def test_cpc_learning_curve():
    """The numbers of labels are 10, 100, 1000 and all, each from the training part; what is scored is the test part."""
    h, others = normal(1500, 3).float(), normal(40, 3, seed=5).float()
    y, wanted, asked = (h[:, 0] > 0).long(), (others[:, 0] > 0).long(), []

    def probe(features, labels, tests):
        asked.append(len(features))
        places = (features[:, None] == h).all(2).long().argmax(1)
        assert torch.equal(h[places], features) and torch.equal(y[places], labels) and torch.equal(tests, others)
        assert len(places.unique()) == len(features)
        return wanted if len(features) != 100 else 1 - wanted

    with mock.patch.object(cpc, "linear_probe", probe):
        assert cpc.learning_curve(h, others, y, wanted) == {10: 1, 100: 0, 1000: 1, 1500: 1}
        assert asked == [10] * 5 + [100] * 5 + [1000] * 5 + [1500]
        assert list(cpc.learning_curve(h[:10], others, y[:10], wanted)) == [10]
    curve = cpc.learning_curve(h, others, y, wanted)
    assert curve[1500] > 0.9 and curve == cpc.learning_curve(h, others, y, wanted)

def test_cpc_plot():
    """A line for each kind, better accuracies higher, more labels to the right; one count alone is drawn, too."""
    curves = {"one": {10: 0.5, 100: 0.9, 60000: 0.99}, "two": {10: 0.3, 60000: 1.0}, "three": {10: 0, 60000: 0}}
    image = np.array(cpc.plot_labels(curves))[30:]
    places = [np.argwhere((image == colour).all(2)) for colour in ((192, 57, 43), (36, 113, 163), (127, 140, 141))]
    for spots in places:
        assert np.ptp(spots[:, 1]) > 600
    high = [[spots[spots[:, 1] == column][:, 0].mean() for column in (72, 728)] for spots in places]
    assert high[0][0] < high[1][0] < high[2][0] and high[1][1] < high[0][1] < high[2][1] and high[0][1] < high[0][0]
    assert cpc.plot_labels({"one": {10: 0.5}}).size == (760, 440)

def test_cpc_labels():
    """Labels come in the order and in the parts in which load_images gives the images, or not at all."""
    rng = np.random.default_rng(0)
    with workdir() as here:
        for names, n in ((("b", "a", "c"), 25), (("x", "y"), 3)):
            with workdir() as inside:
                kinds = classed(inside, names, n)
                for test in False, True:
                    images = cpc.load_images("pics", 8, test=test)
                    labels = cpc.load_labels("pics", len(images), test)
                    assert labels.dtype == torch.int64
                    assert labels.tolist() == [kinds[grey] for grey in images[:, 0, 0, 0].tolist()], test
                (inside / "pics" / "notes").mkdir()
                (inside / "pics" / "notes" / "a.txt").write_text("no picture, no class")
                assert cpc.load_labels("pics", len(images), True).tolist() == labels.tolist()
                Image.new("L", (8, 8)).save(inside / "pics" / "loose.png")
                assert cpc.load_labels("pics", len(images), True) is None  # of no class
        with workdir() as inside:
            classed(inside, ("only",), 5)
            assert cpc.load_labels("pics", 4) is None and cpc.load_labels("pics", 1, True) is None
        with workdir() as inside:
            classed(inside, ("a",), 1)
            Image.new("L", (8, 8)).save(inside / "pics" / "a" / "z.png")
        train, test = (rng.integers(0, 256, (n, 8, 8), dtype=np.uint8) for n in (5, 3))
        files = {"train-images-idx3-ubyte": idx(train), "t10k-images-idx3-ubyte": idx(test)}
        unpack({f"idx/{name}": raw for name, raw in files.items()}, here)
        assert cpc.load_labels("idx", 5) is None and cpc.load_labels("idx", 3, True) is None
        unpack({"idx/train-labels-idx1-ubyte.gz": gzip.compress(idx(train[:, 0, 0])),
                "idx/t10k-labels-idx1-ubyte": idx(test[:, 0, 0])}, here)
        for want, n, part in (train, 5, False), (test, 3, True):
            assert cpc.load_labels("idx", n, part).tolist() == want[:, 0, 0].tolist()
        refuses("train-labels.* want 4 labels.*5", cpc.load_labels, "idx", 4)
        (here / "idx/t10k-labels-idx1-ubyte").write_bytes(idx(test[:, 0, 0])[:-1])
        refuses("t10k-labels", cpc.load_labels, "idx", 3, True)
    assert cpc.load_labels("digits", 23).tolist() == [*range(10), *range(10), 0, 1, 2]

def test_cpc_real_labels():
    """MNIST's labels are those of its images, where the environment variable MNIST names its folder."""
    if "MNIST" not in os.environ:
        raise unittest.SkipTest("MNIST names no folder")
    for test, n, first, counts in ((False, 60000, [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], [5923, 6742]),
                                   (True, 10000, [7, 2, 1, 0, 4, 1, 4, 9, 5, 9], [980, 1135])):
        labels = cpc.load_labels(os.environ["MNIST"], n, test)
        assert labels[:10].tolist() == first and labels.bincount()[:2].tolist() == counts

def test_cpc_evaluate():
    """The report is the mean over places and images, in sets of n, of the functions above; few images are one set."""
    model = some_cpc(1, 8, 8).float()
    images = torch.randint(256, (23, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for n, used in (10, 20), (23, 23), (500, 23):
        table, sets = cpc.evaluate_nce(model, images, n)
        assert sets == min(n, 23) and table.shape == (3, 3)
        parts = [model(cpc.to_float(images[i : i + sets])) for i in range(0, used, sets)]
        for k in range(3):
            loss = torch.cat([cpc.info_nce(scores[k]).mean((0, 1)) for scores in parts])
            hits = torch.cat([cpc.nce_hits(scores[k]).mean((0, 1)) for scores in parts])
            assert len(loss) == used
            near(table[k], torch.stack([loss.mean(), loss.std(correction=0) / used**0.5, hits.mean()]), 1e-5)

def test_cpc_training_learns():
    """300 steps on digits tell patches apart; the averaged network profits; labels are learned where they are given."""
    images, labels = cpc.draw_digits(400, 14), torch.arange(400) % 10
    with workdir() as here:
        average = quiet(cpc.train, images, iters=200, batch=32, lr=4e-3, width=32, path=here / "model.pt")
        head, *rows = ([*line.split(",")] for line in (here / "log.csv").read_text().split())
        taught = quiet(cpc.train, images, 200, 32, 4e-3, 32, labels, path=here / "taught.pt")
        refuses("classes 10, not 0", cpc.train, images, 200, 32, 4e-3, 32, path=here / "taught.pt")
        refuses("labels .*--fresh", cpc.train, images, 200, 32, 4e-3, 32, labels.flip(0), path=here / "taught.pt")
        same(dict(cpc.load(here / "taught.pt").state_dict()), dict(taught.state_dict()))
    assert head == ["iteration", "loss_2", "loss_3", "loss_4"] and [row[0] for row in rows] == ["100", "200"]
    assert float(rows[0][1]) > float(rows[1][1]) and 0.5 < float(rows[0][1]) < math.log(32)
    fresh = cpc.draw_digits(320, 14, seed=1)
    table, n = cpc.evaluate_nce(average, fresh, 32)
    assert (table[:, 0] < math.log(32) - 0.2).all() and (table[:, 2] > 2 / 32).all(), table
    assert table[0, 0] < table[2, 0] - 0.2, table  # what is nearer is easier
    right = taught.head(cpc.encode(taught, fresh)).argmax(1) == torch.arange(320) % 10
    assert right.float().mean() > 0.9
    assert average.head is None and not average.training

def test_cpc_training_steps():
    """The loss is the mean over k of (2) on the images that were drawn; the average is of all weights, and growing."""
    flat = lambda parameters: torch.cat([p.detach().flatten() for p in parameters]).double()
    images, seen, passed, real = cpc.draw_digits(8, 8), [], [], cpc.CPC.forward

    def forward(model, x):
        seen.append(x)
        passed.append(flat(model.parameters()))
        return real(model, x)

    with workdir() as here, mock.patch.object(cpc.CPC, "forward", forward):
        average = quiet(cpc.train, images, iters=20, batch=3, lr=0.1, width=8, path=here / "model.pt")
        last, _, _ = torch.load(here / "model.pt", weights_only=True)["parts"]
        logged = [float(v) for v in (here / "log.csv").read_text().split()[1].split(",")[1:]]
    want, losses = passed[0], torch.zeros(3).double()
    known, model = {tuple(image.flatten().tolist()) for image in cpc.to_float(images)}, cpc.CPC(1, 8, 8)
    for i, (x, weights) in enumerate(zip(seen, passed)):
        assert x.shape == (3, 1, 8, 8) and all(tuple(image.flatten().tolist()) in known for image in x)
        nn.utils.vector_to_parameters(weights.float(), model.parameters())
        losses += torch.stack([cpc.info_nce(scores).mean() for scores in real(model, x)]).detach() / 20
        after = passed[i + 1] if i < 19 else flat(last.values())
        memory = min(0.998, (1 + i) / (10 + i))
        want = memory * want + (1 - memory) * after
    near(logged, losses, 1e-4)
    near(flat(average.parameters()), want, 1e-6)
    assert len({tuple(x.flatten().tolist()) for batch in seen for x in batch}) == 8  # all of them
    train = lambda seed: quiet(cpc.train, images, iters=20, batch=3, lr=0.1, width=8, seed=seed).state_dict()
    same(dict(average.state_dict()), dict(train(0)))
    assert not torch.equal(train(0)["W.0"], train(1)["W.0"])

def test_cpc_command():
    """What the run prints and draws is what its model's functions give; with labels there is a probe, without none."""
    less = mock.patch.object(cpc.linear_probe, "__defaults__", (2e-4, 20))  # iterations of the probe
    with workdir() as here, less:
        kinds = classed(here, n=60)
        words = command(cpc, data="pics", iters=12, batch=4, samples=3)
        status, out, err = call(cpc, words)
        assert (status, err) == (0, ""), err
        images, held_out = (cpc.load_images("pics", 8, test=test) for test in (False, True))
        y, wanted = (torch.tensor([kinds[v] for v in x[:, 0, 0, 0].tolist()]) for x in (images, held_out))
        model, taught = cpc.load(here / "run" / "model.pt"), cpc.load(here / "run" / "labels" / "model.pt")
        table, n = cpc.evaluate_nce(model, held_out)
        assert n == 6 and f"sets of 6, so log N = {math.log(6):.3f} nats, and chance is 16.67%" in out
        for k, (loss, error, hits) in zip((2, 3, 4), table.tolist()):
            assert (f"{k} rows ahead: loss {loss:.3f} +- {error:.3f}, I(x; c) >= {math.log(6) - loss:.3f} nats, "
                    f"the right patch picked in {hits:.2%}") in out, out
        torch.manual_seed(0)
        untrained = cpc.CPC(1, 8, 8)
        flat = lambda x: cpc.to_float(x).flatten(1)
        for name, numbers, f in (("trained", 288, functools.partial(cpc.encode, model)), ("raw pixels", 64, flat),
                                 ("untrained", 288, functools.partial(cpc.encode, untrained))):
            curve = cpc.learning_curve(f(images), f(held_out), y, wanted)
            shares = "  ".join(f"{n}: {share:.2%}" for n, share in curve.items())
            assert re.search(f"{name}, +{numbers} numbers an image:  {shares}\n", out) and list(curve) == [10, 54], out
        right = (taught.head(cpc.encode(taught, held_out)).argmax(1) == wanted).float().mean()
        assert f"trained with labels: {right:.2%}" in out
        rows = tiles(here / "run" / "neighbours.png", 8, 10).reshape(3, 10, 8, 8)
        assert np.array_equal(rows[:, 0], held_out[:3, 0])
        h, queries = cpc.encode(model, images), cpc.encode(model, held_out[:3])
        for row, query in zip(rows, queries):
            order = (h - query).square().sum(1).argsort()[:9]
            assert np.array_equal(row[1:], images[order, 0])
        assert {"labels.png", "neighbours.png"} < set(os.listdir("run"))
        assert cpc.load(here / "run" / "model.pt").head is None and "labels.png" in out.splitlines()[-1]
        (here / "pics" / "a").rename(here / "pics" / "d")  # the same images, in another order
        wrong = [refused(cpc, words, "images .*--fresh", here)]
        wrong += [refused(cpc, [*words, *flags], say, here) for flags, say in (
            (["--size", "6"], "--size 6"), (["--batch", "1"], "--batch 1.*negatives"), (["--samples", "0"], "samples"))]
    assert not any(wrong), "\n".join(filter(None, wrong))
    with workdir() as here:
        paint(here / "flat", 12)
        status, out, err = call(cpc, command(cpc, data="flat"))
        assert (status, err) == (0, "") and "no labels" in out and "labels.png" not in out and "probe:" not in out
        assert "labels.png" not in os.listdir("run") and "labels" not in os.listdir("run") and "rows ahead" in out
        quiet(ddpm.train, grey(here), iters=1, batch=2, width=8, path=here / "run" / "model.pt", fresh=True)
        assert not (wrong := refused(cpc, command(cpc, data="flat"), "ddpm.py", here)), wrong
    refuses("12x8", cpc.train, torch.zeros(4, 1, 8, 12, dtype=torch.uint8), iters=1)

# ------------------------------------------------------------------------------------------------------------ bpe -----
bpe = MODULES["bpe"]
NASTY = list("aZé9²Ⅷ一ह_!.' \t\n\r\x0b\x1c\x1f\x85\xa0\u2003\u3000😀\u0301\0\u2028\u1680\U0001d7d8\U0001f100") + [
    " ", " ", "  ", "   ", "\n", "\n\n", " \n", "\n ", "'s", "'ll", "'S", "s", "__", "ve"]

def kind(c):
    """Unicode's class of a character, by its category alone: l(etter), n(umber), s(pace) or o(ther)."""
    category = unicodedata.category(c)
    return "s" if category[0] == "Z" or c in "\t\n\x0b\x0c\r\x85" else {"L": "l", "N": "n"}.get(category[0], "o")

def split_by_hand(text):
    """GPT-2's splitting, a character at a time."""
    kinds, i, found = [kind(c) for c in text] + ["end"], 0, []
    while i < len(text):
        start = i + (text[i] == " " and kinds[i + 1] in "lno")
        end = start
        while kinds[end] == kinds[start]:
            end += 1
        if kinds[start] == "s" and end < len(text) and end - start > 1:
            end -= 1  # the last space goes with the word
        for short in "'s", "'t", "'re", "'ve", "'m", "'ll", "'d":
            if text.startswith(short, i):
                end = i + len(short)
        found.append(text[i:end])
        i = end
    return found

def naive_merges(words, n):
    """Recounts everything before every merge. words: [(bytes, ...)] with repeats -> [(bytes, bytes)]."""
    order = {bytes([b]): i for i, b in enumerate([*range(33, 127), *range(161, 173), *range(174, 256), *range(33),
                                                 *range(127, 161), 173])}
    merges = []
    while len(merges) < n:
        count = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        if not count:
            break
        a, b = min(count, key=lambda pair: (-count[pair], order[pair[0]], order[pair[1]]))
        order[a + b] = len(order)
        merges.append((a, b))
        words = [naive_apply(word, a, b) for word in words]
    return merges

def naive_apply(word, a, b):
    new, i = [], 0
    while i < len(word):
        pair = word[i : i + 2] == [a, b]
        new.append(a + b if pair else word[i])
        i += 1 + pair
    return new

def letters(text):
    return [bytes([b]) for b in text.encode()]

def test_bpe_wikipedia():
    """The example of Wikipedia's page: aaabdaaabac -> ZabdZabac -> ZYdZYac -> XdXac."""
    made = bpe.BPE.train("aaabdaaabac", 259)
    assert made.merges == [(b"a", b"a"), (b"a", b"b"), (b"aa", b"ab")]
    a, c, d = (ord(letter) - ord("!") for letter in "acd")  # GPT-2's order of the bytes
    assert made.encode("aaabdaaabac") == [258, d, 258, a, c]
    assert made.decode([258, d, 258, a, c]) == "aaabdaaabac" and len(made.bytes) == 259

def test_bpe_categories():
    """Each of the 1,114,112 code points is in the class that its category says."""
    everything = list(map(chr, range(sys.maxunicode + 1)))
    kinds = "".join(map(kind, everything))
    assert kinds.count("s") == 25
    for one in "lno":
        text = "".join(itertools.compress(everything, map(one.__eq__, kinds)))
        assert len(text) > 1000 and bpe.any_text().findall(text) == [text], one
    spaces = "".join(itertools.compress(everything, map("s".__eq__, kinds)))
    assert bpe.any_text().findall(spaces) == [spaces] and bpe.any_text().findall("\x1c\x1f ") == ["\x1c\x1f", " "]
    for text in ("".join(everything[:128]), "".join(everything[:128][::-1])):
        words = [word.decode() for word in bpe.ASCII.findall(text.encode())]
        assert words == bpe.any_text().findall(text) == split_by_hand(text)

def test_bpe_splits():
    """Splits of random texts of all kinds are those of a splitter by hand, and the cuts are among them."""
    rng = np.random.default_rng(0)
    pool = np.array(NASTY, dtype=object)
    plain = np.array([c for c in NASTY if c.isascii()], dtype=object)
    for n in range(3000):
        text = "".join(rng.choice((pool, plain)[n % 2], rng.integers(0, 14)))
        want, raw = [word.encode() for word in split_by_hand(text)], text.encode()
        assert bpe.pre_tokens(raw) == want, (text, want)
        parts = [s for head, *pieces in bpe.cut_text(raw) for s in [head, *map(bpe.whole, pieces)]]
        assert b"".join(parts) == raw and [t for s in parts for t in bpe.pre_tokens(s)] == want, (text, parts)
        assert bpe.count_words(text) == collections.Counter(want)
    parts = [*itertools.chain(*bpe.cut_text(b"It's a  test\n\nof   it"))]
    assert parts == [b"It's", b"a", b"", b"test", b"\n", b"\nof", b"  ", b"", b"it"], parts
    assert bpe.pre_tokens(b"I've  1st\n") == [b"I", b"'ve", b" ", b" 1", b"st", b"\n"]

def test_bpe_naive_training():
    """On 1000 small texts full of ties: the merges of a trainer that recounts, and the ids of one that scans."""
    rng = np.random.default_rng(1)
    short = 0
    for n in range(1000):
        text = "".join(rng.choice(list(("ab", "abc ", "aé ", "zy! \n")[n % 4]), rng.integers(1, 60)))
        words = split_by_hand(text)
        made = bpe.BPE.train(text, 256 + 12)
        want = naive_merges(list(map(letters, words)), 12)
        assert made.merges == want, (text, made.merges, want)
        short += len(want) < 12
        text += "".join(rng.permutation(list(text)))
        ids = [made.tokens[token] for word in split_by_hand(text) for token in
               functools.reduce(lambda word, pair: naive_apply(word, *pair), want, letters(word))]
        assert made.encode(text) == ids, text
        assert made.decode(ids) == text
    assert 50 < short < 950  # texts that run out of pairs are among them, and others

def test_bpe_hash_seed():
    """Another PYTHONHASHSEED, the same merges and files."""
    code = "import bpe, sys; b = bpe.BPE.train(open('bpe.py', encoding='utf-8').read(), 600, ['<b>', '<a>']); " \
           "b.save(sys.argv[1])"
    runs = []
    with workdir() as here:
        for seed in "0", "1", "77":
            subprocess.run([sys.executable, "-B", "-c", code, str(here / seed)], cwd=HERE, check=True,
                           env={**os.environ, "PYTHONHASHSEED": seed})
            runs.append(snapshot(here / seed))
    assert runs[0] == runs[1] == runs[2] and len(runs[0]) == 3

def small_bpe(special=("<|end|>",)):
    return bpe.BPE.train(SOURCES["bpe"], 500, special)

def test_bpe_round_trip():
    """Any string goes round, from every plane of Unicode; any bytes and any ids decode; a lone surrogate is refused."""
    made, rng = small_bpe(), np.random.default_rng(2)
    assert all(made.merge(raw) == (i,) for raw, i in made.tokens.items())
    for plane in range(17):
        points = [*range(plane << 16, (plane + 1) << 16, 13), (plane << 16) + 0xFFFF]
        text = "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
        assert made.decode(made.encode(text)) == text
    for text in "", "\0", "\0\0 \0", "\r\n\r\n", "a\u0301", " ", "   ", "\n", "é" * 500, "\ufeffx":
        assert made.decode(made.encode(text)) == text
    for n in range(200):
        raw = rng.bytes(int(rng.integers(0, 40)))
        ids = [made.tokens[bytes([b])] for b in raw]
        assert made.decode_bytes(ids) == raw and made.decode(ids) == raw.decode("utf-8", "replace")
    assert made.decode(list(range(500))[::-1])
    for bad in "\ud800", "fine \udfff fine", "a" * 200 + "\ud83d":
        assert "surrogate" in refusal(made.encode, bad) and "surrogate" in refusal(bpe.BPE.train, bad, 300)
    assert "-1" in refusal(made.decode, [5, -1]) and "500" in refusal(made.decode, [500])

def refusal(function, *args):
    """The sentence with which it refuses."""
    try:
        result = function(*args)
    except (ValueError, OSError) as e:
        return str(e)
    raise AssertionError(f"it took it: {result}")

def test_bpe_long_runs():
    """The heap gives what the scan gives; its look-ups grow in proportion to the text; long words train as well."""
    rng, made = np.random.default_rng(3), bpe.BPE.train("abababbaabbbaaaabaaba" * 30 + " a" * 9, 290)
    for n in range(300):
        ids = [made.first[b] for b in bytes(rng.choice([97, 98], rng.integers(1, 101)).tolist())]
        assert bpe.merge_long(ids, made.pairs, made.made) == bpe.merge_word(ids, made.pairs, made.made)

    class Counted(dict):
        asked = 0

        def get(self, *key):
            Counted.asked += 1
            return super().get(*key)

    made, asked = bpe.BPE.train("a" * 64, 261), []
    for n in 1000, 10_000:
        Counted.asked = 0
        ids = bpe.merge_word([made.first[97]] * n, Counted(made.pairs), made.made)
        asked.append(Counted.asked)
        assert [len(made.bytes[i]) for i in ids[: n // 32]] == [32] * (n // 32) and len(ids) <= n // 32 + 5
        assert ids == made.encode("a" * n)
    assert asked[1] < 11 * asked[0] and asked[0] < 6000, asked
    made.encode("b" * 100_000)
    assert bpe.BPE.train("ab" * 100_000, 270).merges[1:3] == [(b"ab", b"ab"), (b"abab", b"abab")]
    assert all(len(key) <= 64 for key in (*made.words, *made.heads, *made.pieces))  # nothing long is kept

def test_bpe_special():
    """Specials are plain text unless allowed, the longest name wins, and they survive save, load and decode."""
    names = ["<s>", "<s>more", "a b\n", "日"]
    made = small_bpe(names)
    assert made.special == {"<s>": 496, "<s>more": 497, "a b\n": 498, "日": 499} and len(made.merges) == 240
    text = "x<s>more<s> a b\n日<s"
    plain, some = made.encode(text), made.encode(text, allowed_special=["<s>"])
    assert max(plain) < 496 and set(some) & {496, 497, 498, 499} == {496} and some.count(496) == 2
    every = made.encode(text, allowed_special="all")
    assert [i for i in every if i >= 496] == [497, 496, 498, 499] and every == made.encode(text, set(names))
    assert made.encode("a<s>b", ["<s>"]) == [*made.encode("a"), 496, *made.encode("b")]
    assert all(made.decode(ids) == text for ids in (plain, some, every))
    with workdir() as here:
        made.save(here / "deep" / "run")
        again = bpe.BPE.load(here / "deep" / "run")
    assert again.special == made.special and again.encode(text, "all") == every and again.decode(every) == text
    assert "<t>" in refusal(made.encode, "x", ["<t>"])
    word = b"".join(next(pair for pair in made.merges if b" " not in pair)).decode()
    for bad, say in ([""], "no name"), (["a"], "'a'"), ([word], f"'{word}'"), (["\ud800"], "surrogate"):
        assert say in refusal(small_bpe, bad), bad
    with workdir() as here:
        assert "Ġ" in refusal(small_bpe(["Ġ"]).save, here) and not snapshot(here)  # vocab.json's space
    for size, special in (255, []), (256, ["<s>"]), (0, []):
        assert str(size) in refusal(bpe.BPE.train, "a", size, special)

def test_bpe_formats():
    """vocab.json, merges.txt and the rank file are GPT-2's and tiktoken's, and come back by either name."""
    text = "## the ## the thé\n\n## the one two three four" * 3
    made = bpe.BPE.train(text, 270, ["<|end|>"])
    with workdir() as here:
        made.save(here / "run")
        vocab = json.loads((here / "run/vocab.json").read_text("utf-8"))
        lines = (here / "run/merges.txt").read_text("utf-8").split("\n")
        ranks = [line.split() for line in (here / "run/ranks.tiktoken").read_text().splitlines()]
        assert [vocab[c] for c in ("!", "~", "¡", "ÿ", "Ā", "Ċ", "Ġ", "Ń")] == [0, 93, 94, 187, 188, 198, 220, 255]
        assert list(vocab.values()) == list(range(270)) and vocab["<|end|>"] == 269 and vocab["Ġthe"] < 269
        assert lines[0] == "#version: 0.2" and lines[-1] == "" and len(lines) == 2 + 13
        assert "# #" in lines and all(vocab[a + b] == 256 + k for k, (a, b) in enumerate(map(str.split, lines[1:-1])))
        assert [int(rank) for _, rank in ranks] == list(range(269))
        tokens = [base64.b64decode(raw) for raw, _ in ranks]
        assert tokens == [made.bytes[i] for i in range(269)] and tokens[220] == b" " and b" the" in tokens
        unpack({"gpt/encoder.json": (here / "run/vocab.json").read_bytes(),
                "gpt/vocab.bpe": (here / "run/merges.txt").read_bytes().rstrip()}, here)
        for path in "run", "gpt", "run/ranks.tiktoken":
            again = bpe.BPE.load(path)
            assert (again.tokens, again.merges, again.pairs) == (made.tokens, made.merges, made.pairs), path
            assert again.made == made.made
            assert again.special == ({} if "ranks" in path else made.special)
            assert again.encode(text + "Thé end") == made.encode(text + "Thé end")
        bpe.BPE.train("a \n\nb" * 99, 257).save("lines")  # a token " \n" is not what a newline alone is
        assert bpe.BPE.load("lines").tokens[b" \n"] == 256 and bpe.BPE.load("lines").encode("\n\nb") == [198, 198, 65]
        again.save("again")
        assert (here / "again/ranks.tiktoken").read_bytes() == (here / "run/ranks.tiktoken").read_bytes()
        files = snapshot(here / "run")
        bad = {"vocab.json": [b"", b"[]", b"{", b'{"a": 0}', b"\xff", b"[" * 99999,
                              files["vocab.json"].replace(b" 256,", b' "256",'),
                              files["vocab.json"].replace(b" 256,", b" 255,"),
                              files["vocab.json"].replace(b" 256,", b" -256,")],
               "merges.txt": [b"one\n", b"a b c\n", b"zz zz\n", "日 a\n".encode(), b"\xff"],
               "ranks.tiktoken": [b"x", b"!!!! 1\n", b"YQ== a\n", b"", b"YQ== 0\n"]}
        for name, raws in bad.items():
            for raw in raws:
                unpack({**{"bad/" + file: old for file, old in files.items()}, "bad/" + name: raw}, here)
                say = refusal(bpe.BPE.load, "bad/ranks.tiktoken" if name[0] == "r" else "bad")
                assert say.startswith("bad") and "\n" not in say, (name, raw, say)
        assert "nowhere" in refusal(bpe.BPE.load, "nowhere")

def test_bpe_unreachable():
    """A token in the vocabulary that the merges do not make of its own bytes is not used, whole word or not."""
    tokens = {bytes([b]): i for i, b in enumerate(bpe.BYTES)} | {b"ab": 256, b"bc": 257, b"abc": 258}
    other = bpe.BPE(tokens, [(b"a", b"b"), (b"b", b"c"), (b"a", b"bc")]).prepare()
    assert other.encode("abc bc") == [256, tokens[b"c"], 220, 257]  # ab is older than bc, so abc never comes to be
    twice = bpe.BPE(tokens, [(b"a", b"b"), (b"b", b"c"), (b"a", b"b")])  # listed again, ab is the younger one
    assert twice.encode("abc") == [tokens[b"a"], 257]

def test_bpe_any_merges():
    """Lists of merges as no trainer makes them (a token made in several ways, a part younger than the whole, pairs
    listed twice): a text that comes for the first time and again has the ids of a scan of each word, oldest first."""
    rng, several, younger = np.random.default_rng(4), 0, 0
    for n in range(400):
        tokens, pool, merges = {bytes([b]): b for b in range(256)}, letters("aaabb ,."), []
        for _ in range(int(rng.integers(1, 30))):
            a, b = (pool[int(i)] for i in rng.integers(0, len(pool), 2))
            if len(a + b) < 6:
                pool.append(a + b)
                merges.append((a, b))
                tokens.setdefault(a + b, len(tokens))
        merges = [merges[i] for i in rng.permutation(len(merges))]
        several += len({a + b for a, b in merges}) < len(set(merges))
        younger += any(a in [c + d for c, d in merges[k + 1 :]] for k, (a, _) in enumerate(merges))
        rank = {pair: k for k, pair in enumerate(merges)}
        made = bpe.BPE(tokens, merges)
        for ready in made, bpe.BPE(tokens, merges).prepare():
            text, want = "".join(rng.choice(list("aaabbb ,."), rng.integers(1, 80))), []
            for word in map(letters, split_by_hand(text)):
                while steps := [(rank[pair], i) for i, pair in enumerate(zip(word, word[1:])) if pair in rank]:
                    i = min(steps)[1]
                    word[i : i + 2] = [word[i] + word[i + 1]]
                want += [tokens[token] for token in word]
                ids = [made.first[b] for b in b"".join(word)]
                assert bpe.merge_long(ids, made.pairs, made.made) == bpe.merge_word(ids, made.pairs, made.made)
            assert ready.encode(text) == want == ready.encode(text), (merges, text)
    assert several > 20 < younger, (several, younger)

def test_bpe_gpt2():
    """Published ids of GPT-2, where the environment variable GPT2 names a folder with encoder.json and vocab.bpe."""
    if "GPT2" not in os.environ:
        raise unittest.SkipTest("GPT2 names no folder")
    gpt2 = bpe.BPE.load(os.environ["GPT2"])
    assert len(gpt2.bytes) == 50257 and gpt2.special == {"<|endoftext|>": 50256} and len(gpt2.merges) == 50000
    published = {"hello world": [31373, 995], "Hello world": [15496, 995], " Hello world": [18435, 995],
                 "Hello, world!": [15496, 11, 995, 0], "0" * 8: [8269], "0" * 15: [8269, 24598], "0" * 16: [25645],
                 "0" * 17: [8269, 10535, 830], "0" * 10: [8269, 405]}
    for text, ids in published.items():
        assert gpt2.encode(text) == ids and gpt2.decode(ids) == text, text
    assert gpt2.encode("hello <|endoftext|>", "all") == [31373, 220, 50256]
    assert 50256 not in gpt2.encode("hello <|endoftext|>")
    assert sum(len(words) == 1 for words in gpt2.words.values()) > 45_000  # what is a token is found at once

def test_bpe_load_text():
    """Docstrings in the order of the files, each once; a file as it is; what is no text is refused."""
    with workdir() as here:
        long = "Word after word. " * 100
        unpack({"lib/b.py": f'"""B {long}"""\ndef f():\n    """F."""\n    if 1:\n        class C:\n            "C."\n'
                            '            async def g(): "G."\nx = """no"""\n'
                            'def h():\n    """F."""\n'.encode(),
                "lib/a/z.py": b'"""Z,\n   indented."""', "lib/a.py": b'"A."', "lib/test/t.py": b'"T."',
                "lib/c.txt": b'"X."', "lib/site-packages/s.py": b'"S."', "lib/bad.py": b'"B."\n(',
                "lib/latin.py": b'"\xff"'}, here)
        with mock.patch.object(bpe.sysconfig, "get_path", lambda name: {"stdlib": str(here / "lib")}[name]):
            want = ["A.", "B " + long, "F.", "C.", "G.", "Z,\nindented."]
            assert bpe.load_text() == "\n\n".join(want) == bpe.load_text("docstrings"), bpe.load_text()
            (here / "lib/b.py").unlink()
            assert "docstrings" in refusal(bpe.load_text)  # a Python without sources
        for raw in long.encode(), "\ufeff".encode() + long.encode():
            (here / "text").write_bytes(raw)
            assert bpe.load_text("text") == long
        (here / "text").write_bytes(long.replace(". ", "\r\n").encode())
        assert bpe.load_text("text") == long.replace(". ", "\r\n")
        for raw, say in [(b"", "0 char"), (b"short", "5 char"), (long.encode("utf-16"), "UTF-8"),
                         (b"a\xe9" * 999, "byte 1")]:
            (here / "text").write_bytes(raw)
            assert re.search(f"text.*{say}", refusal(bpe.load_text, "text"))
        assert "--text" in refusal(bpe.load_text, "NUL\0")
        assert "nowhere" in refusal(bpe.load_text, "nowhere") and refusal(bpe.load_text, here)

def piped(words, text):
    """As call(), with standard input."""
    with mock.patch.object(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(text.encode()))):
        return call(bpe, words)

def test_bpe_longest():
    """The longest tokens printed are the longest in bytes, not as they are shown."""
    with workdir() as here:
        (here / "text").write_text("春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。" * 50, "utf-8")
        _, out, _ = call(bpe, ["--text", "text", "--vocab", "285", "--out", "run"])
        most = max((a + b for a, b in bpe.BPE.load("run").merges), key=len)
        assert f"longest: {most.decode()!r} " in out, out

def test_bpe_command():
    """Trains once, shows, encodes and decodes files and pipes; other settings and damage are refused."""
    words = ["--text", "words.txt", "--vocab", "270", "--out", "run"]
    with workdir() as here:
        inputs(here)
        status, out, err = call(bpe, [*words, "--special", "<s>"])
        assert (status, err) == (0, "") and set(os.listdir("run")) == {
            "vocab.json", "merges.txt", "ranks.tiktoken", "tokens.png", "settings.json"}
        files, made = snapshot(here), bpe.BPE.load("run")
        assert made.special == {"<s>": 269} and out.splitlines()[-1].endswith(" in run")
        text = (here / "words.txt").read_text()
        assert f"270 tokens, {len(text) / len(made.encode(text)):.3f} bytes per token" in out, out
        assert "first merges: 'at' " in out and "\nT|" in out, out
        with mock.patch.object(bpe, "learn_merges", side_effect=AssertionError("it trains")):
            status, again, _ = call(bpe, [*words, "--special", "<s>"])
            assert status == 0 and again.splitlines() == out.splitlines()[1:] and snapshot(here) == files
            odd = "the cat,\r\n  naïve 日 <s>\n\n"
            (here / "odd.txt").write_bytes(odd.encode())
            ids = " ".join(map(str, made.encode(odd))) + "\n"
            for flags in ["--out", "run"], [*words, "--special", "<s>"]:
                assert call(bpe, [*flags, "--encode", "odd.txt"]) == (0, ids, "")
                assert piped([*flags, "--encode", "-"], odd) == (0, ids, "")
                assert piped([*flags, "--decode", "-"], ids) == (0, odd, "")
            (here / "ids.txt").write_text(ids)
            assert call(bpe, ["--out", "run", "--decode", "ids.txt"]) == (0, odd, "")
            (here / "other.txt").write_text(text.replace("cat", "bat"))
            (here / "latin.txt").write_bytes(b"caf\xe9")
            special, out = ["--special", "<s>"], ["--out", "run"]
            wrong = [refused(bpe, flags, say, here) for flags, say in [
                ([*words, *special, "--vocab", "281"], "vocab 270, not 281.*--fresh"), (words, "special.*--fresh"),
                ([*words, *special, "--text", "other.txt"], "text .*--fresh"), (out, "text .*--fresh"),
                ([*out, "--vocab", "300", "--encode", "odd.txt"], "vocab 270, not 300.*--fresh"),
                ([*out, "--encode", "nowhere"], "nowhere"), ([*out, "--encode", "latin.txt"], "latin.txt: not UTF-8"),
                ([*out, "--decode", "odd.txt"], "odd.txt: want ids"), ([*out, "--encode", "run"], "run"),
                ([*out, "--encode", "odd.txt", "--decode", "ids.txt"], "not allowed"),
                ([*words, "--text", "nowhere"], "nowhere"), ([*words, "--text", "latin.txt"], "latin.txt"),
                ([*words, "--text", "run"], "run"), (["--vocab", "255"], "255"), (["--special"], "special")]]
            (here / "ids.txt").write_text("5 280")
            wrong += [refused(bpe, [*out, "--decode", "ids.txt"], "280", here)]
            for name in "vocab.json", "merges.txt", "settings.json":
                for raw in b"", b"{}", files["run/" + name][:-9], *[None][name == "vocab.json":]:
                    unpack(files, here)
                    (here / "run" / name).unlink()
                    unpack({"run/" + name: raw}, here)
                    wrong += [refused(bpe, [*words, *special], "run", here)]
            unpack(files, here)
            (here / "run/settings.json").unlink()  # somebody's own tokenizer: it is used, but not written over
            assert call(bpe, ["--out", "run", "--encode", "odd.txt"]) == (0, ids, "")
            wrong += [refused(bpe, [*words, *special], "--fresh", here)]
        assert not any(wrong), "\n".join(filter(None, wrong))
        for stop in "merges.txt", "ranks.tiktoken", "settings.json", "vocab.json":  # killed just after, it still ends
            with killed_after(stop):
                assert call(bpe, [*words, *special, "--out", stop])[0] == 130
            assert call(bpe, [*words, *special, "--out", stop])[0] == 0
            assert snapshot(here / stop) == {name[4:]: raw for name, raw in files.items() if name.startswith("run/")}
        assert call(bpe, [*words, *special, "--fresh"])[0] == 0 and snapshot(here / "run") == {
            name[4:]: raw for name, raw in files.items() if name.startswith("run/")}
        status, out, err = call(bpe, [*words, "--out", "new", "--encode", "odd.txt"])  # trains first, but not on stdout
        assert status == 0 and "MB of text" in err and out.split() == [str(i) for i in bpe.BPE.load("new").encode(odd)]
        status, out, _ = call(bpe, [*words, "--out", "many", "--vocab", "4000"])
        assert status == 0 and "no pair is left" in out

def test_bpe_pictures():
    """Every token has a ground of its own, in the terminal and in the picture, and nothing is cut off."""
    made = small_bpe()
    text = "def token(x):\n  é日"
    shown = [bpe.shown(made, i) for i in made.encode(text)]
    assert "\\n" in "".join(shown) and "\\x" in "".join(shown) and bpe.coloured(made, text, False) == "|".join(shown)
    assert re.sub("\x1b[^m]*m", "", bpe.coloured(made, text, True)) == "".join(shown)
    assert bpe.coloured(made, text, True).count("\x1b[0m") == len(shown)
    image = bpe.paint_tokens(made, bpe.SENTENCE * 3)
    colours = {colour for _, colour in image.getcolors(1 << 20)}
    assert {*bpe.COLOURS, (255, 255, 255), (0, 0, 0)} <= colours and image.width == 760
    edges = np.asarray(image)
    assert (edges[-6:] == 255).all() and (edges[:, -12:] == 255).all() and (edges[:6] == 255).all()

# ------------------------------------------------------------------------------------------------------- word2vec -----
word2vec = MODULES["word2vec"]

def plain_objective(model, v, u, window, centres, around, k, p):
    """l of (1) or (6), summed over the pairs of a block, the mean over negatives taken exactly with their chances p."""
    far = lambda h: k * (p * F.logsigmoid(-(u @ h))).sum()
    total = 0
    for i, j in itertools.product(range(len(centres)), range(window.shape[1]) if model == "skipgram" else [None]):
        if j is None and window[i].any():
            h = torch.stack([v[around[i + j]] for j in range(window.shape[1]) if window[i, j]]).mean(0)
            total = total + F.logsigmoid(u[centres[i]] @ h) + far(h)
        elif j is not None and window[i, j]:
            total = total + F.logsigmoid(u[around[i + j]] @ v[centres[i]]) + far(v[centres[i]])
    return total

def test_word2vec_gradient():
    """sgd_step() moves v and u by autograd's gradient of the plain objective: exactly, for the negatives that were
    drawn, and in the mean over all that could be drawn."""
    g = torch.Generator().manual_seed(0)
    V, d, L, R, S, k = 12, 5, 6, 2, 3, 4
    for model in "skipgram", "cbow", "skipgram", "cbow":
        tables = torch.randn(2, V, d, generator=g, dtype=torch.float64)  # v and u
        line = torch.randint(V, (2 * L + 2 * R,), generator=g)
        centres, around = line[R : R + 2 * L].view(2, L), line.unfold(0, L + 2 * R, L)
        window = torch.randint(2, (2, L, 2 * R + 1), generator=g).double()
        window[:, :, R] = 0
        window[0, 0] = 0  # a centre without neighbours
        p = torch.rand(V, generator=g, dtype=torch.float64)
        p, drawn = p / p.sum(), torch.randint(V, (2, S), generator=g)
        shares = F.one_hot(drawn, V).double().mean(1)
        got, value = moved(tables, (centres, around, drawn, window), k, model)
        want, plain = plain_gradient(tables, (centres, around, shares, window), k, model)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(value, plain)
        each = [moved(tables, (centres, around, torch.full((2, S), n), window), k, model)[0] for n in range(V)]
        mean = sum(chance * one for chance, one in zip(p, each))  # exact, for it is linear in the negatives
        want, _ = plain_gradient(tables, (centres, around, p.expand(2, V), window), k, model)
        torch.testing.assert_close(mean, want, rtol=1e-9, atol=1e-9)

def test_word2vec_products():
    """Products in bfloat16 move the tables as those of float32 do, up to its 8 bits."""
    raw, counts = torch.randint(50, (400,)).int(), torch.ones(50)
    blocks = word2vec.draw_blocks(raw, torch.ones(50), word2vec.negative_table(counts, 1000), 3)
    for model in "skipgram", "cbow":
        steps = []
        for products in torch.float32, torch.bfloat16:
            v, u = (torch.randn(50, 20, generator=torch.Generator().manual_seed(i)) for i in range(2))
            word2vec.sgd_step(new_v := v.clone(), new_u := u.clone(), blocks, 5, 1.0, model, products)
            steps.append(torch.stack([new_v - v, new_u - u]))
        assert 1e-5 < (steps[1] - steps[0]).norm() / steps[0].norm() < 2**-7, model

def moved(tables, blocks, k, model):
    """By how much sgd_step() moves the tables at a rate of 1, and its objective."""
    new = tables.clone()
    value = word2vec.sgd_step(*new, blocks, k, 1.0, model)()
    return new - tables, value

def plain_gradient(tables, blocks, k, model):
    """The same by autograd on the plain objective; in place of negatives (B, V) chances."""
    tables = tables.clone().requires_grad_()
    value = sum(plain_objective(model, *tables, window, centres, around, k, p)
                for centres, around, p, window in zip(*blocks))
    return torch.autograd.grad(value, tables)[0], value.detach()

def test_word2vec_negatives():
    """Negatives come as count^(3/4) says, by chi-square."""
    counts = torch.tensor([4000.0, 900, 256, 81, 16, 16, 1])
    table = word2vec.negative_table(counts)
    p = counts.double() ** 0.75 / (counts.double() ** 0.75).sum()
    assert (table.bincount(minlength=7) / len(table) - p).abs().max() < 1e-6
    torch.manual_seed(0)
    negatives = word2vec.draw_blocks(torch.zeros(3200, dtype=torch.int32), torch.ones(7), table, 2)[2]
    assert negatives.shape == (100, word2vec.SHARED)
    n = negatives.flatten().long().bincount(minlength=7)
    assert ((n - p * n.sum()) ** 2 / (p * n.sum())).sum() < 22.5  # 6 degrees of freedom: p = .001

def test_word2vec_subsampling():
    """A word of share f stays with chance sqrt(t/f) + t/f, at most 1; t = 0 keeps all."""
    counts = torch.tensor([9000.0, 900, 90, 10])
    keep = word2vec.keep_chance(counts, 1e-2)
    for chance, f in zip(keep.tolist(), (0.9, 0.09, 0.009, 0.001)):
        assert math.isclose(chance, min(1, (1e-2 / f) ** 0.5 + 1e-2 / f), rel_tol=1e-5)
    assert (word2vec.keep_chance(counts, 0) == 1).all() and keep[2] == keep[3] == 1
    torch.manual_seed(1)
    raw = torch.arange(40_000, dtype=torch.int32) % 4
    centres, around, _, window = word2vec.draw_blocks(raw, keep, word2vec.negative_table(counts), 3)
    n = centres.flatten()[window.flatten(0, 1).any(1)].long().bincount(minlength=4)
    for got, want in zip(n.tolist(), (1e4 * keep).tolist()):
        assert abs(got - want) < 4 * 100, (n, keep)

def test_word2vec_windows():
    """b is even over 1 .. R; a window is b words each way of what is left, and ends with the text and a blank line."""
    torch.manual_seed(2)
    raw = torch.arange(500, dtype=torch.int32)
    raw[[100, 101, 250]] = -1
    R, V = 4, 500
    centres, around, _, window = word2vec.draw_blocks(raw, torch.ones(V), torch.zeros(9, dtype=torch.int32), R)
    assert centres.shape == (16, 32) and around.shape == (16, 32 + 2 * R) and window.shape == (16, 32, 2 * R + 1)
    paragraph, words = (raw < 0).cumsum(0), raw[raw >= 0]
    assert torch.equal(centres.flatten()[: len(words)], words) and not window.flatten(0, 1)[len(words):].any()
    seen = collections.Counter()
    for block, i in itertools.product(range(16), range(32)):
        c = int(centres[block, i])
        near = [int(around[block, i + j]) for j in range(2 * R + 1) if window[block, i, j]]
        if block * 32 + i < len(words):
            place = int((words == c).nonzero())
            able = [w for w in words[max(0, place - R) : place + R + 1].tolist() if paragraph[w] == paragraph[c]]
            left, right = (sum((w - c) * side > 0 for w in near) for side in (-1, 1))
            assert set(near) <= set(able) - {c} and near == sorted(near)
            if len(able) == 2 * R + 1:
                assert left == right
                seen[left] += 1
    assert set(seen) == {1, 2, 3, 4} and all(abs(n - sum(seen.values()) / 4) < 4 * 10 for n in seen.values()), seen
    wide = word2vec.draw_blocks(torch.arange(500), torch.ones(V), torch.zeros(9, dtype=torch.int32), 200)[3]
    assert wide.shape[2] == 401 and 180 < (wide.flatten(0, 1).nonzero()[:, 1] - 200).abs().max() <= 200

def topics(n=1500):
    """Text about one of two things at a time, a blank line between; the common words belong to neither."""
    rng = np.random.default_rng(0)
    kinds = [[f"{c}{d}" for c in letters for d in "aeiou"] for letters in ("bcd", "xyz")]
    return "\n\n".join(" ".join(rng.choice([*kinds[i % 2], "the", "and"], 12)) for i in range(n))

def test_word2vec_topics():
    """Of two planted topics each word's nearest are of its own, by both models."""
    with workdir() as here:
        (here / "text").write_text(topics())
        for model in "skipgram", "cbow":
            made = word2vec.train("text", 4, 64, 0.05, 10, 3, 5, 1e-2, 1, model)
            words = [word for word in made.words if word not in ("the", "and")]
            assert len(words) == 30
            for word in words:
                near = [other for other, _ in word2vec.nearest(made, word, 10) if other in words][:8]
                assert sum((other[0] in "bcd") == (word[0] in "bcd") for other in near) >= 7, (model, word, near)

def test_word2vec_page():
    """A word that is rare in the text and half of one page does not run away, nor do all words where there are few."""
    rng = np.random.default_rng(0)
    text = np.array([f"w{a}{b}" for a in "abcdefghij" for b in "abcdefghijklmnopqrst"])[rng.integers(0, 200, 30_000)]
    text[12_000:12_600:2] = "odd"
    with workdir():
        Path("text").write_text(" ".join(text), "utf-8")
        vectors = quiet(word2vec.train, "text", epochs=2, dim=16, sample=0)
    norm = vectors.table.norm(dim=1)
    assert norm[vectors.words.index("odd")] < 10 * norm.median() < 20, norm
    with workdir():
        Path("text").write_text(" ".join(text[rng.integers(0, 30, 20_000)]), "utf-8")
        assert quiet(word2vec.train, "text", epochs=1, dim=16, sample=0).table.norm(dim=1).max() < 2

def test_word2vec_hash_seed():
    """Another PYTHONHASHSEED, the same vectors."""
    code = "import sys, torch; torch.set_num_threads(1); import word2vec; word2vec.main(sys.argv[1:])"
    runs = []
    with workdir() as here:
        (here / "text").write_text(topics(100))
        for seed in "0", "77":
            words = ["--text", str(here / "text"), "--out", str(here / seed), "--dim", "6", "--epochs", "1"]
            subprocess.run([sys.executable, "-B", "-c", code, *words], cwd=HERE, check=True, stdout=subprocess.DEVNULL,
                           env={**os.environ, "PYTHONHASHSEED": seed})
            runs.append((here / seed / "vectors.txt").read_bytes())
    assert runs[0] == runs[1] and runs[0].startswith(b"32 6\n")

def test_word2vec_words():
    """Words, blank lines, Chinese; a file read in pieces gives the words of one read at once; no text is refused."""
    text = "The cat's naïve Café_2 x\n \t\nДом дома 我爱你 don't\r\n\r\nEnd\u2028end😀 one\n\n\ntwo\n" * 60
    want = "the cat s naïve café x".split() + ["", "дом", "дома", *"我爱你", *"don t".split(), "", "end", "end", "one"]
    want += ["", "two"]
    with workdir() as here:
        (here / "text").write_bytes(text.encode())
        assert [*itertools.chain(*word2vec.read_words("text"))] == want * 60
        for at_once in 40, 64, 100, 999, 5000:
            assert [*itertools.chain(*word2vec.read_words("text", at_once))] == want * 60, at_once
        assert len([*word2vec.read_words("text", 1000)]) > 5
        assert "1 words" in refusal(word2vec.count_vocabulary, "text", 61)
        counts = word2vec.count_vocabulary("text", 60)
        assert list(counts)[0] == "end" and counts["end"] == 120 and "" not in counts and counts["我"] == 60
        ids, sha256 = word2vec.text_to_ids("text", {"cat": 0, "我": 1}, here)
        assert ids.tolist() == [0, -1, 1, -1, -1] * 60 and len(sha256) == 12
        assert os.listdir(here) == ["text"] and "too few" not in refusal(word2vec.count_vocabulary, "text", 10_000)
        (here / "bad").write_bytes(text.encode() + b"caf\xe9" + text.encode())
        for at_once in 100, 1 << 22:
            say = refusal(lambda at_once=at_once: list(word2vec.read_words("bad", at_once)))
            assert f"byte {len(text.encode()) + 3} is 0xe9" in say, say

def planted(words, rows):
    made = word2vec.Vectors(words, len(rows[0]))
    made.table.copy_(torch.tensor(rows))
    return made

def test_word2vec_closest():
    """Nearest by the cosine, not by length; an analogy by the difference of unit vectors, without its own words."""
    made = planted(["a", "b", "c", "d", "e"], [[1.0, 0], [0.1, 0.01], [9, 9], [0, 2], [-1, 0]])
    assert [word for word, _ in word2vec.nearest(made, "a", 9)] == ["b", "c", "d", "e"]
    assert math.isclose(word2vec.nearest(made, "a", 2)[1][1], 0.5**0.5, rel_tol=1e-5)
    rows = [[1.0, 0, 0.1], [2, 0, 2], [0, 1, 0], [0, 3, 3], [-1, -1, 0]]
    made = planted(["man", "woman", "king", "queen", "far"], rows)
    assert [word for word, _ in word2vec.analogy(made, "man", "woman", "king")] == ["queen", "far"]
    assert "'cat'" in refusal(word2vec.nearest, made, "cat")

def test_word2vec_map():
    """The map is the two main directions of the unit vectors: what lies in a plane, as a small piece of a sphere nearly
    does, keeps its shape but for two scales, whatever the lengths."""
    flat = torch.tensor([[-5.0, -2, 999], [5, -2, 999], [-5, 2, 999], [5, 2, 999], [0, 0, 999]])
    flat *= torch.tensor([1, 2, 3, 4, 5]).view(5, 1)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0][:3]
    spots = {}
    draw = types.SimpleNamespace(text=lambda at, word, *rest: spots.update({word: torch.tensor(at)}))
    with mock.patch.object(word2vec.ImageDraw, "Draw", lambda image: draw):
        word2vec.plot_words(planted(list("pqrst"), (flat @ turn).tolist()), side=300)
    assert all(50 <= x <= 250 for spot in spots.values() for x in spot.tolist())
    across, down = (spots["q"] - spots["p"]).abs().tolist(), (spots["r"] - spots["p"]).abs().tolist()
    assert across[0] > 199 and across[1] < 1 and down[0] < 1 and down[1] > 199
    assert (spots["t"] - 150).abs().max() < 1

def test_word2vec_command():
    """Trains, prints, writes vectors.txt; again it only shows; other settings and words are refused."""
    with workdir() as here:
        (here / "text").write_text(topics(200))
        words = ["--text", "text", "--dim", "7", "--batch", "500", "--epochs", "2", "--out", "run"]
        status, out, err = call(word2vec, words)
        assert (status, err) == (0, ""), err
        assert sorted(os.listdir("run")) == ["log.csv", "map.png", "model.pt", "vectors.txt"]
        assert len(re.findall(r"epoch \d of 2: loss [\d.]+, [\d,]+ words/s", out)) == 2, out
        head, *lines = (here / "run/vectors.txt").read_text("utf-8").splitlines()
        made = word2vec.load("run/model.pt")
        assert head == f"{len(lines)} 7" and [line.split(" ")[0] for line in lines] == made.words
        rows = torch.tensor([[float(x) for x in line.split(" ")[1:]] for line in lines])
        assert rows.shape[1] == 7 and (rows - made.table).abs().max() < 1e-5 and rows.std() > 0.01
        files = snapshot(here)
        with mock.patch.object(word2vec, "sgd_step", side_effect=AssertionError("it trains")):
            status, out, _ = call(word2vec, [*words, "--nearest", "ba", "--analogy", "ba", "be", "xa"])
        assert status == 0 and out.startswith("ba: ") and "\nba : be = xa : " in out, out
        assert not (differ := changed(files, snapshot(here))), differ
        assert call(word2vec, [*words, "--nearest", "BA"])[1].startswith("ba: ")  # as the text was read
        for flags, say in (["--nearest", "cat"], "'cat'"), (["--dim", "8"], "dim 7, not 8.*--fresh"), (
                ["--model", "cbow"], "model skipgram, not cbow"), (["--min-count", "9999"], "min-count"), (
                ["--sample", "-1"], "sample"), (["--text", "nowhere"], "nowhere"), (["--analogy", "a"], "analogy"):
            assert not (wrong := refused(word2vec, [*words, *flags], say, here)), wrong

def test_word2vec_stop_and_resume():
    """Stopped within an epoch, the same command ends with the very vectors and log of a run that was never stopped."""
    real, clock = word2vec.draw_blocks, itertools.count(0, 100)

    def stopping(*args):
        if next(calls) == 0:
            raise KeyboardInterrupt
        return real(*args)

    with workdir() as here:
        (here / "text").write_text(topics(200))
        words = ["--text", "text", "--dim", "7", "--batch", "16", "--epochs", "2", "--out"]
        assert call(word2vec, [*words, "whole"])[0] == 0
        for n in 4, 10:
            calls = iter(range(n, -1, -1))
            hurry = mock.patch.object(word2vec.time, "time", lambda: next(clock))  # it saves after each step
            with mock.patch.object(word2vec, "draw_blocks", stopping), hurry:
                status, _, err = call(word2vec, [*words, "run", *["--fresh"][: n == 9]])
            assert status == 130 and "goes on" in err, (status, err)
        assert torch.load("run/model.pt", weights_only=True)["done"] == 14  # of 10 + 10: an epoch and more
        assert call(word2vec, [*words, "run"])[0] == 0
        assert not (differ := [name for name in changed(snapshot(here / "whole"), snapshot(here / "run"))
                               if name != "model.pt"]), differ

# ------------------------------------------------------------------------------------------------------------ rnn -----
rnn = MODULES["rnn"]

def plain_cell(cell, a, h, c):
    """One step as the papers have it -> h, c."""
    if cell == "rnn":
        return a.tanh(), c
    i, f, g, o = a.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c

def unrolled(cell, T, N=3, H=5, V=6, dtype=torch.float64, seed=0):
    """Random inputs of Unroll: cell, memory, table, x, w_hh, state."""
    g, G = torch.Generator().manual_seed(seed), rnn.CELLS[cell][2]
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=dtype).requires_grad_()
    table, w_hh, state = draw(V, G * H), draw(H, G * H), draw(rnn.CELLS[cell][3], N, H)
    return cell, rnn.Memory(table.detach()), table, torch.randint(V, (T, N), generator=g), w_hh, state

def test_rnn_gradients():
    """Both cells, by hand: values and gradients are those of autograd on the plain recurrence, at several lengths."""
    for cell, T, (dtype, most) in itertools.product(rnn.CELLS, (1, 2, 7, 40), [(torch.float64, 1e-11),
                                                                               (torch.float32, 1e-5)]):
        _, new, table, x, w_hh, state = given = unrolled(cell, T, dtype=dtype, seed=T)
        w_hh.data /= 2
        weights = torch.randn(T, 3, 5, dtype=dtype)
        h, last = rnn.Unroll.apply(*given)
        got = torch.autograd.grad((h * weights).sum(), (table, w_hh, state))
        h_t, c_t, want = state[0], state[-1], []
        for t in range(T):
            h_t, c_t = plain_cell(cell, table[x[t]] + h_t @ w_hh, h_t, c_t)
            want.append(h_t)
        grads = torch.autograd.grad((torch.stack(want) * weights).sum(), (table, w_hh, state))
        end = torch.stack([h_t, c_t][: len(state)])
        for a, b in [(h, torch.stack(want)), (last, end), *zip(got, grads)]:
            assert (a - b).abs().max() <= most * max(1, b.abs().max()), (cell, T, dtype, (a - b).abs().max())

def test_rnn_products():
    """Products of W_hh in bfloat16: values and gradients of float32 up to its 8 bits, kept in float32; and no less."""
    for cell, T in itertools.product(rnn.CELLS, (1, 20)):
        results = []
        for products in torch.float32, torch.bfloat16:
            _, new, table, x, w_hh, state = unrolled(cell, T, N=16, H=32, dtype=torch.float32, seed=T)
            w_hh.data /= 6
            h, last = rnn.Unroll.apply(cell, rnn.Memory(table.detach(), products), table, x, w_hh, state)
            results.append([h, last, *torch.autograd.grad(h.square().sum(), (table, w_hh, state))])
        for a, b in zip(*results):
            assert a.dtype == b.dtype == torch.float32
            assert 1e-5 < (a - b).norm() / a.norm() < 2**-7, (cell, T, (a - b).norm() / a.norm())
    for capable, products in (False, torch.float32), (True, torch.bfloat16):
        with mock.patch.object(torch.cpu, "_is_avx512_bf16_supported", return_value=capable, create=True):
            assert rnn.fast_products("cpu") is products

def test_rnn_torch_nn():
    """With the weights of torch.nn.RNN and torch.nn.LSTM: their outputs, last states and gradients."""
    for cell, layer, T in (("rnn", nn.RNN(4, 5), 9), ("lstm", nn.LSTM(4, 5), 9), ("lstm", nn.LSTM(4, 5), 1)):
        x, inputs = torch.arange(T * 3).view(T, 3), torch.randn(T * 3, 4)
        table = inputs @ layer.weight_ih_l0.t() + layer.bias_ih_l0 + layer.bias_hh_l0
        w_hh, state = layer.weight_hh_l0.t(), torch.randn(rnn.CELLS[cell][3], 3, 5)
        h, last = rnn.Unroll.apply(cell, rnn.Memory(table.detach()), table, x, w_hh, state)
        want, end = layer(inputs.view(T, 3, 4), state if cell == "rnn" else (state[:1], state[1:]))
        weights = torch.randn_like(h)
        got, ref = (torch.autograd.grad((out * weights).sum(), list(layer.parameters())) for out in (h, want))
        for a, b in [(h, want), (last, end if cell == "rnn" else torch.cat(end)), *zip(got, ref)]:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

def small_rnn(cell="lstm", width=12, chars="abcdef", seed=0, **more):
    torch.manual_seed(seed)
    return rnn.CharRNN(chars, cell, width, **more).eval()

def test_rnn_chunks():
    """Chunks with the state carried give what one long pass gives; no gradient crosses from one to the one before."""
    for cell in rnn.CELLS:
        model, x = small_rnn(cell), torch.randint(6, (20, 3))
        whole, end = model(x, model.start(3))
        state, parts = model.start(3), []
        for part in x.split(6):
            logits, state = model(part, state)
            parts.append(logits.detach())
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state, end)
        assert not state.requires_grad and (state != 0).all()
        x[:10] %= 3  # the first chunk has the letters 0 .. 2, the second 3 .. 5
        x[10:] = 3 + x[10:] % 3
        _, state = model(x[:10], model.start(3))
        logits, _ = model(x[10:], state)
        (grad,) = torch.autograd.grad(logits.square().sum(), model.embedding)
        assert not grad[:3].any() and grad[3:].any()
        logits, _ = model(x, model.start(3))
        (grad,) = torch.autograd.grad(logits[10:].square().sum(), model.embedding)
        assert grad[:3].any()  # within a chunk it does

def test_rnn_memory():
    """What a second forward pass has written over is not differentiated in silence; other passes do no harm."""
    model, x = small_rnn(), torch.randint(6, (5, 2))
    first, _ = model(x, model.start(2))
    model(x, model.start(2))
    try:
        first.sum().backward()
    except RuntimeError as e:
        assert "modified" in str(e)
    else:
        raise AssertionError("a gradient of what is no longer there")
    copied, before = small_rnn(), model(x, model.start(2))[1]
    logits, kept = model(x[:3], before)
    want = kept.clone()
    copied(x, copied.start(2))
    rnn.sample(copied, 3)
    logits.sum().backward()
    model(x, model.start(2))
    assert torch.equal(kept, want) and copied.w_hh.grad is None and copied.memory is not model.memory

def test_rnn_bits():
    """evaluate() is the plain mean over the last letters, each once; a past is given to each stream."""
    model, ids = small_rnn(), torch.randint(6, (403,), generator=torch.Generator().manual_seed(1))
    logits, _ = model(ids[:-1].view(-1, 1), model.start(1))
    nats = F.cross_entropy(logits[:, 0], ids[1:], reduction="none").detach()  # [i] is the bet on ids[i + 1]
    want = nats[299:].mean().item()
    assert math.isclose(rnn.evaluate(model, ids, 300, 1, 299), want, rel_tol=1e-5)
    assert math.isclose(rnn.evaluate(model, ids, 300, 1, 1000, 7), want, rel_tol=1e-5)
    parts, first = [], 300
    for start in 300, 335, 370:  # 35 letters a stream, 33 in the last
        logits, _ = model(ids[start - 21 : start + 34].view(-1, 1), model.start(1))
        bets, ids_t = logits[: len(ids) - start + 20, 0], ids[start - 20 : start + 35]
        parts.append(F.cross_entropy(bets, ids_t, reduction="none")[20:].detach())
    assert sum(map(len, parts)) == len(ids) - first
    assert math.isclose(rnn.evaluate(model, ids, first, 3, 20, 8), torch.cat(parts).mean().item(), rel_tol=1e-5)

def test_rnn_sample():
    """Near 0 the likeliest letter is drawn, at 1 letters come as the softmax has them; prompts are read."""
    model = small_rnn(chars="abef日😀")
    model.out.weight.data *= 6
    want, state = "日a", model.start(1)
    for letter in want:
        logits, state = model(rnn.to_ids(letter, model.chars).view(1, 1), state)
    for _ in range(30):
        want += model.chars[logits[0, 0].argmax()]
        logits, state = model(rnn.to_ids(want[-1], model.chars).view(1, 1), state)
    assert rnn.sample(model, 30, "日a", 0) == rnn.sample(model, 30, "日a", 1e-9) == want and len(want) == 32
    for temperature in 1.0, 3.0:
        logits, _ = model(rnn.to_ids("f", model.chars).view(1, 1), model.start(1))
        p = (logits[0, 0] / temperature).softmax(0)
        drawn = [rnn.sample(model, 1, "f", temperature, seed)[1] for seed in range(600)]
        n = torch.tensor([drawn.count(c) for c in model.chars])
        few = p * 600 < 5
        assert ((n - 600 * p).square() / (600 * p))[~few].sum() < 25, (n, 600 * p)  # chi-square, at most 5: p < .001
    a, b, c = (rnn.sample(model, 20, "f", 1.0, seed) for seed in (1, 1, 2))
    assert a == b != c
    assert rnn.sample(model, 5)[-5:] == rnn.sample(model, 5, "a")[1:]
    assert "'z'" in refusal(rnn.sample, model, 5, "az")
    assert rnn.to_ids("ef😀", model.chars).tolist() == [2, 3, 5]

def test_rnn_lag():
    """dL/dh_t by lag is what autograd finds when it may keep every h_t; the picture shows both lines."""
    ids = torch.randint(6, (90,), generator=torch.Generator().manual_seed(2))
    for cell in rnn.CELLS:
        model = small_rnn(cell).double()
        got, total = rnn.lag_norms(model, ids, 8, 4), 0
        for start in torch.linspace(0, 90 - 17, 4).long().tolist():
            x, state = ids[start : start + 17], model.start(1)
            _, state = model(x[:8].view(-1, 1), state)
            h, c, kept = state[0], state[-1], []
            for t in range(8, 16):
                a = model.embedding[x[t]] @ model.w_ih + model.b + h @ model.w_hh
                h, c = plain_cell(cell, a, h, c)
                kept.append(h)
            loss = F.cross_entropy(model.out(h), x[16:])
            grads = torch.autograd.grad(loss, kept)
            total = total + torch.stack([g.norm() for g in grads]).flip(0)
        torch.testing.assert_close(got, total / total[0], rtol=1e-8, atol=1e-12)
    assert rnn.lag_norms(rnn.CharRNN("a", width=4), torch.zeros(90, dtype=torch.long), 8, 4).isfinite().all()
    image = np.array(rnn.plot_lags({"one": torch.logspace(0, -6, 50), "two": torch.ones(50)}))
    red = np.argwhere((image == (0xC0, 0x39, 0x2B)).all(2))
    blue = np.argwhere((image == (0x24, 0x71, 0xA3)).all(2) & (np.arange(440) > 30)[:, None])
    red = red[red[:, 0] > 30]
    assert np.ptp(blue[:, 0]) < 4 and red[red[:, 1].argmax(), 0] - red[red[:, 1].argmin(), 0] > 200

def test_rnn_learns():
    """What hangs on the letter before the last two is learned; all that follows by rule costs next to nothing."""
    coins = torch.randint(2, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    text = "".join("a..1x" if coin else "b..1y" for coin in coins)
    for cell in rnn.CELLS:
        model = rnn.train(text, 300, 8, 15, 2e-2, cell, 24, 0.0)
        nats = rnn.evaluate(model, rnn.to_ids(text, model.chars), len(text) * 9 // 10, 2, 20)
        assert 0.13 < nats < 0.15, (cell, nats)  # a fair coin in each five letters is log(2) / 5 = 0.139, two are 0.277

def test_rnn_dropout():
    """A mask is the same at all times of a chunk, keeps the mean, and is off when the network is not in training."""
    model, x = small_rnn(width=40, dropout=0.25), torch.randint(6, (4, 50))
    model.out = nn.Identity()
    plain, _ = model(x, model.start(50))
    plain = plain.clone()
    model.train()
    masked, _ = model(x, model.start(50))
    share = masked / plain
    assert torch.allclose(share, share[:1].expand_as(share), atol=1e-4) and abs(share.mean() - 1) < 0.05
    assert abs((masked == 0).float().mean() - 0.25) < 0.03

def test_rnn_command():
    """The figures it prints are those of the checkpoint; other flags only sample; what cannot be is refused."""
    with workdir() as here:
        words = command(rnn, **inputs(here), iters=130, samples=40)
        status, out, err = call(rnn, words)
        assert (status, err) == (0, "") and sorted(os.listdir("run")) == [
            "lag.png", "log.csv", "model.pt", "other", "samples.txt"]
        text, model = (here / "words.txt").read_text(), rnn.load("run/model.pt")
        assert rnn.load("run/other/model.pt").cell == "rnn" and model.cell == "lstm"
        nats = rnn.evaluate(model, rnn.to_ids(text, model.chars), len(text) * 9 // 10)
        assert f"{nats:.4f} nats = {nats / math.log(2):.4f} bits" in out, out
        assert (here / "run/samples.txt").read_text("utf-8") == rnn.sample(model, 40)
        with mock.patch.object(rnn.F, "cross_entropy", side_effect=F.cross_entropy) as bets:
            status, out, err = call(rnn, [*words, "--prompt", "the c", "--temperature", "0"])
        assert status == 0 and bets.call_count < 10 and rnn.sample(model, 40, "the c", 0) in out
        (here / "odd.txt").write_text("日本語のテキスト😀。\n" * 200, "utf-8")
        assert call(rnn, command(rnn, text="odd.txt", out="odd"))[0] == 0
        assert "日" in rnn.load("odd/model.pt").chars
        wrong = [refused(rnn, [*words, *flags], say, here) for flags, say in [
            (["--prompt", "Z"], "'Z'"), (["--temperature", "-1"], "temperature"), (["--dropout", "1"], "dropout"),
            (["--temperature", "nan"], "temperature"), (["--cell", "gru"], "cell"),
            (["--batch", "4000", "--out", "new"], "too few"), (["--length", "5"], "length 32, not 5.*--fresh"),
            (["--text", "odd.txt"], "text .*--fresh")]]
        assert not any(wrong), wrong

# ------------------------------------------------------------------------------------------------------- pixelcnn -----
pixelcnn = MODULES["pixelcnn"]

def pixel_model(*shape, seed=0, dtype=torch.float32):
    """A PixelCNN (channels, size, levels, width, layers) whose weights are as if trained."""
    return woken(pixelcnn.PixelCNN(*shape), seed).to(dtype).requires_grad_(False).eval()

def all_images(channels, size, levels):
    """Every image that there is, (levels^D, C, H, W)."""
    rows = torch.cartesian_prod(*[torch.arange(levels)] * (channels * size * size))
    return rows.view(-1, channels, size, size)

def looks_at(function, x):
    """Which inputs each output depends on, x of one image (1, C, H, W) -> bools, the output's shape and (C, H, W)."""
    return torch.func.jacrev(function)(x)[0, ..., 0, :, :, :] != 0

def test_pixelcnn_mask_by_hand():
    """(4): R sees nothing of its pixel with mask A, G sees R, B sees R and G; with B each its own, too; all before."""
    A, B = (pixelcnn.causal_mask(kind, 3, 6, 3, 3) for kind in "AB")
    assert A.shape == (3, 6, 1, 3) and A[..., :2].all() and B[..., :2].all()
    assert A[:, :, 0, 2].tolist() == [[0] * 6, [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert B[:, :, 0, 2].tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1] * 6]
    A, B = (pixelcnn.causal_mask(kind, 2, 2, 1, 1) for kind in "AB")
    assert not A.any() and B.all()

def test_pixelcnn_layers_see():
    """(5): autograd finds each layer of both stacks to look at what it may, at all of that, and at nothing else."""
    x = normal(1, 6, 5, 7)
    for kind, k, colours in itertools.product("AB", (1, 2, 4), (1, 2, 3)):
        seen = looks_at(woken(pixelcnn.Left(kind, 6, 3, k, colours)).double(), x)
        o, i, j, c, r, s = torch.meshgrid(*map(torch.arange, (3, 5, 7, 6, 5, 7)), indexing="ij")
        mine, its = o * colours // 3, c * colours // 6
        here = (its < mine) | (its == mine) & (kind == "B")
        assert torch.equal(seen, (r == i) & ((0 < j - s) & (j - s < k) | (j == s) & here)), (kind, k, colours)
    for rows, k in (2, 3), (3, 5), (1, 1):
        seen = looks_at(woken(pixelcnn.Above(6, 3, rows, k)).double(), x)
        assert torch.equal(seen, (r <= i) & (i - r < rows) & ((j - s).abs() <= k // 2)), (rows, k)
        layer = woken(pixelcnn.Above(6, 3, rows, k)).double()
        past = {layer: x.new_zeros(1, 6, rows - 1, 7)}  # one row after the other is the same
        near(torch.cat([layer(x[:, :, i : i + 1], past) for i in range(5)], 2), layer(x), 1e-12)

def test_pixelcnn_sees_all_before_and_nothing_after():
    """(1), (3): no logit depends on its own number or a later one, and each on all earlier ones in the receptive field,
    which has no blind spot; reach() and the picture of it agree."""
    for channels, levels, layers, size in (1, 2, 0, 9), (1, 2, 1, 12), (3, 2, 0, 8), (3, 3, 1, 7), (2, 2, 2, 6):
        model, any_ = pixel_model(channels, size, levels, 16, layers, dtype=torch.float64), 0
        for seed in range(4):  # a ReLU may rest for one image
            x = normal(1, channels, size, size, seed=seed)
            seen = looks_at(lambda x, model=model: model(x), x)  # (K, C, H, W, C, H, W)
            any_ = seen.any(0) | any_
        c, i, j, b, r, s = torch.meshgrid(*map(torch.arange, 2 * (channels, size, size)), indexing="ij")
        row = (r == i) & (s < j) & (j - s <= 3 + 2 * layers) | (r == i) & (s == j) & (b < c)
        above = (r < i) & (i - r <= 3 + layers) & (s - j <= 3 + 2 * layers) & (j - s <= 3 + 4 * layers)
        assert torch.equal(any_, row | above)
        i, j = size - 2, size // 2
        share = pixelcnn.reach(model, normal(40, channels, size, size), i, j)
        assert share.shape == (size, size) and torch.equal(share > 0, any_[:, i, j].any(0).any(0))
        heat = pixelcnn.heat_map(share, i, j, 1)[0]
        inside = share > 0
        inside[i, j] = True
        assert heat.shape == (3, size, size) and (heat[:, i, j] == 1).all()
        assert torch.equal(inside, ~torch.isclose(heat, torch.tensor(-0.2).double()).all(0))

def test_pixelcnn_reach():
    """The sensitivity is the derivative of white against black, its size averaged over images and summed over colours;
    four decades of it go from black by red to yellow."""
    a, b = normal(3, 4, 5), normal(5, 3, 4, 5, seed=1)
    model = lambda x: torch.stack([0 * x, 9 * x, (a * x).sum((1, 2, 3), True) * b * x.sign()], 1)
    x = normal(5, 3, 4, 5, seed=2)
    got = pixelcnn.reach(model, x, 2, 3)
    factor = (b[:, :, 2, 3] * x[:, :, 2, 3].sign()).sum(1).abs().mean()
    near(got, factor * a.abs().sum(0), 1e-9)
    heat = pixelcnn.heat_map(torch.tensor([[1.0, 1e-2, 1e-3, 1e-4, 1e-9, 0, 0.5]]), 0, 6, 2)
    assert heat.shape == (1, 3, 2, 14)
    near(heat[0, :, 1, ::2].T * 0.5 + 0.5,
         [[1, 1, 0], [1, 0, 0], [0.5, 0, 0], [0, 0, 0], [0, 0, 0], [0.4] * 3, [1] * 3], 1e-6)

def test_pixelcnn_blind_spot():
    """The docstring's drawing and its 78 of 406 are what a stack of masked 3x3 kernels has, however deep."""
    A, centre = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).double(), torch.diag(torch.tensor([0, 1, 0])).double()
    seen = torch.zeros(1, 1, 28, 28).double()
    seen[..., 14, 14] = 1
    for layer in range(40):  # from the pixel back to all that reaches it
        back = F.conv_transpose2d(seen, (A + centre if layer else A)[None, None], padding=1)
        seen = (back > 0).double()
    assert not seen[0, 0, 14, 14:].any() and not seen[0, 0, 15:].any()
    before = 14 * 28 + 14
    assert f"{int(before - seen.sum())} of" in pixelcnn.__doc__ and f"the {before} pixels" in pixelcnn.__doc__
    drawn = re.findall(r"  ((?:[#ox-] ){6}[#ox-])(?:  |$)", pixelcnn.__doc__, re.M)
    want = [" ".join("#" if seen[0, 0, i, j] else "o" for j in range(11, 18)) for i in (11, 12, 13)]
    assert drawn == [*want, "# # # x - - -"], drawn

def test_pixelcnn_sums_to_one():
    """(1), (2): the probabilities of all images there are add up to one, grey and colour, of two levels and more."""
    for shape in (1, 3, 2, 5, 2), (1, 2, 3, 6, 1), (3, 1, 4, 7, 1), (3, 2, 2, 8, 2):
        for seed in SEEDS[:2]:
            model = pixel_model(*shape, seed=seed, dtype=torch.float64)
            nats = torch.cat([pixelcnn.log_prob(model, x.double()) for x in all_images(*shape[:3]).split(512)])
            near(nats.exp().sum(), 1, 1e-9)
            assert nats.std() > 0.2  # no trivial model

def test_pixelcnn_log_prob_by_hand():
    """(2), (6), (8): the softmax at each number, summed; two levels are logistic regression; no knowledge is log2 K."""
    x, logits = torch.randint(4, (5, 3, 2, 2), generator=torch.Generator().manual_seed(0)), normal(5, 4, 3, 2, 2)
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    want = [sum(math.log(p[n, x[n, c, i, j], c, i, j]) for c, i, j in itertools.product(range(3), range(2), range(2)))
            for n in range(5)]
    near(pixelcnn.log_prob(lambda x: logits, x), want, 1e-12)
    near(pixelcnn.loss_nats(lambda x: logits, x), -np.mean(want), 1e-12)
    two, bits = normal(5, 2, 3, 2, 2), x % 2
    near(pixelcnn.log_prob(lambda x: two, bits), D.Bernoulli(logits=two[:, 1] - two[:, 0]).log_prob(bits.double())
         .sum((1, 2, 3)), 1e-12)
    for K in 2, 7, 256:
        nats = -pixelcnn.log_prob(lambda x, K=K: torch.zeros(len(x), K, 3, 2, 2), torch.zeros(2, 3, 2, 2))
        near(pixelcnn.to_bits(nats, 12), math.log2(K), 1e-6)

def test_pixelcnn_levels():
    """(7): two levels by chance, k as often as k / 255, others by equal shares of the bytes; -1 .. 1 to show them."""
    bytes_ = torch.arange(256, dtype=torch.uint8)
    for K in 3, 4, 10, 255, 256:
        x = pixelcnn.to_levels(bytes_, K)
        assert x.dtype == torch.int64 and x.tolist() == [math.floor(b * K / 256) for b in range(256)]
    n, p = 4000, bytes_.double() / 255
    for seed in SEEDS:
        x = pixelcnn.to_levels(bytes_.expand(n, 256), 2, torch.Generator().manual_seed(seed))
        assert x.dtype == torch.int64 and set(x.unique().tolist()) == {0, 1}
        near((x.double().mean(0) - p) / ((p * (1 - p) / n).sqrt() + 1e-9), 0, 5)
    assert not torch.equal(pixelcnn.to_levels(bytes_, 2), pixelcnn.to_levels(bytes_, 2))
    with mock.patch.object(torch, "rand", lambda *_, **__: torch.zeros(256)):
        assert pixelcnn.to_levels(bytes_, 2).tolist() == [0] + [1] * 255  # black is never white, whatever is drawn
    near(pixelcnn.from_levels(torch.arange(5), 5), [-1, -0.5, 0, 0.5, 1])
    assert torch.equal(pixelcnn.to_uint8(pixelcnn.from_levels(bytes_.long(), 256)), bytes_)  # nothing is lost
    for floats in bytes_ / 255, bytes_.long():
        refuses("uint8", pixelcnn.to_levels, floats, 2)

def test_pixelcnn_draw():
    """(9): numpy's search of the cumulated probabilities, at their limits as well; frequencies are the softmax."""
    logits = torch.tensor([0.5, 0.25, 0.25]).log()[None]
    for u, x in (0.0, 0), (0.4999, 0), (0.5001, 1), (0.7499, 1), (0.7501, 2), (0.999999, 2):
        assert pixelcnn.draw(logits, torch.tensor([u])).tolist() == [x]
    assert pixelcnn.draw(torch.zeros(1, 2), torch.tensor([0.5])).tolist() == [1]  # the limit itself belongs to the next
    for K, seed in itertools.product((2, 5, 256), SEEDS):
        logits, u = normal(300, K, seed=seed), torch.rand(300, generator=torch.Generator().manual_seed(seed)).double()
        got, cdf = pixelcnn.draw(logits, u), np.cumsum(torch.softmax(logits, 1).numpy(), 1)
        assert got.tolist() == [np.searchsorted(c[:-1], v, side="right") for c, v in zip(cdf, u.numpy())]
    even = pixelcnn.draw(normal(1, 4).expand(10_000, 4), (torch.arange(10_000).double() + 0.5) / 10_000)
    near(even.bincount(minlength=4) / 10_000, torch.softmax(normal(4)[None], 1)[0], 2e-4)

def test_pixelcnn_cached_is_plain():
    """Both samplers draw the same numbers to the last, from nothing or from upper rows that stay; each u counts."""
    for shape in (1, 7, 2, 8, 2), (3, 5, 3, 8, 1), (1, 6, 256, 5, 0), (3, 4, 2, 7, 2), (1, 1, 2, 8, 1):
        for seed in SEEDS:
            model, n = pixel_model(*shape, seed=seed), 4 if seed else 1
            u = torch.rand(n, shape[0], shape[1], shape[1], generator=torch.Generator().manual_seed(seed))
            plain, cached = pixelcnn.sample_plain(model, u), pixelcnn.sample_cached(model, u)
            assert torch.equal(plain, cached) and plain.dtype == cached.dtype == torch.int64
            assert plain.shape == u.shape and plain.max() < shape[2]
            old = torch.randint(shape[2], u.shape, generator=torch.Generator().manual_seed(seed))
            for first in {0, shape[1] // 2, shape[1]}:
                given, kept = old.clone(), old.clone()
                plain, cached = (f(model, u, given, first) for f in (pixelcnn.sample_plain, pixelcnn.sample_cached))
                assert torch.equal(plain, cached) and torch.equal(plain[:, :, :first], old[:, :, :first])
                assert torch.equal(given, kept)  # what was given is not drawn over
                assert first or torch.equal(plain, pixelcnn.sample_plain(model, u))  # nor looked at
    model = pixel_model(1, 28, 2, 16, 3)  # an image as large as MNIST's: the caches reach across all of it
    u = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    want = torch.zeros(2, 1, 28, 28, dtype=torch.int64)
    x = pixelcnn.sample_cached(model, u)
    logits = model(x)  # of a right sample: from all of it at once, the same draws
    for i, j in itertools.product(range(28), range(28)):
        want[:, 0, i, j] = pixelcnn.draw(logits[:, :, 0, i, j], u[:, 0, i, j])
    assert torch.equal(x, want) and 0.1 < x.float().mean() < 0.9

def test_pixelcnn_cached_computes_little():
    """The cached sampler asks for a row of the vertical stack a row, for a column of the other a number: no more."""
    model, asked = pixel_model(3, 5, 2, 8, 1), collections.Counter()
    vertical, horizontal = model.vertical, model.horizontal
    model.vertical = lambda x, *at: asked.update(["row", tuple(x.shape)]) or vertical(x, *at)
    model.horizontal = lambda x, v, at: asked.update(["column", tuple(x.shape)]) or horizontal(x, v, at)
    pixelcnn.sample_cached(model, torch.rand(2, 3, 5, 5))
    assert asked == {"row": 5, (2, 3, 1, 5): 5, "column": 75, (2, 3): 75}
    asked.clear()
    pixelcnn.sample_cached(model, torch.rand(2, 3, 5, 5), torch.zeros(2, 3, 5, 5).long(), 3)
    assert asked["row"] == 5 and asked["column"] == 30

def test_pixelcnn_log_prob_of_a_sample():
    """log_prob is the sum of the logs of the probabilities that a sample was drawn with, by either sampler."""
    for sampler, shape in itertools.product((pixelcnn.sample_plain, pixelcnn.sample_cached),
                                            ((1, 5, 2, 8, 2), (3, 3, 4, 8, 1))):
        model, total, real = pixel_model(*shape), torch.zeros(6), pixelcnn.draw

        def spy(logits, u, total=total, real=real):
            x = real(logits, u)
            total += logits.log_softmax(1).gather(1, x[:, None])[:, 0]
            return x

        with mock.patch.object(pixelcnn, "draw", spy):
            x = sampler(model, torch.rand(6, shape[0], shape[1], shape[1], generator=torch.Generator().manual_seed(1)))
        near(pixelcnn.log_prob(model, x), total, 1e-3)
        assert total.std() > 0.3

def test_pixelcnn_sample_frequencies():
    """Samples of a 2x2 model come as often as their probability says."""
    model, n = pixel_model(1, 2, 2, 8, 1), 20_000
    u = torch.rand(n, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    x = pixelcnn.sample_cached(model, u).flatten(1)
    counts = (x * torch.tensor([8, 4, 2, 1])).sum(1).bincount(minlength=16)
    p = pixelcnn.log_prob(model, all_images(1, 2, 2)).exp().double()
    near((counts / n - p) / (p * (1 - p) / n).sqrt(), 0, 4)

def test_pixelcnn_network():
    """Any size, level and width, fewer channels than colours included; every weight is used; images do not mix."""
    for channels, size, levels, width, layers in (1, 8, 2, 8, 2), (3, 5, 256, 4, 1), (3, 4, 2, 1, 1), (2, 1, 3, 5, 0):
        model = woken(pixelcnn.PixelCNN(channels, size, levels, width, layers))
        x = torch.randint(levels, (4, channels, size, size), generator=torch.Generator().manual_seed(0))
        logits = model(x)
        assert logits.shape == (4, levels, channels, size, size) and model.shape == (channels, size, size)
        near(model(x[2:3]), logits[2:3], 1e-5)
        if width >= 4 and size >= 4:
            logits.square().sum().backward()
            assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    model = pixelcnn.PixelCNN(1, 8, 2, 8, 3)
    assert all(not last.weight.any() for _, last in [*model.down, *model.right])  # blocks begin as the identity

def test_pixelcnn_training_draws():
    """Training sees each image that is not held out, in levels drawn anew, and validates on held-out images alone."""
    images = torch.tensor([51, 102, 204] * 4, dtype=torch.uint8).view(12, 1, 1, 1).repeat(1, 1, 8, 8)
    images[:, 0, 0, 0], images[:, 0, 0, 1:5] = 255, (torch.arange(12)[:, None] >> torch.arange(4) & 1) * 255  # its name
    for levels in 2, 4:
        seen, validated = [], []

        def loss(model, x, seen=seen):
            seen.append(x)
            return 0 * next(model.parameters()).sum()

        def nats(model, images, device, validated=validated):
            validated.append(images)
            return torch.zeros(len(images))

        with mock.patch.multiple(pixelcnn, loss_nats=loss, image_nats=nats):
            quiet(pixelcnn.train, images, iters=100, batch=16, width=8, layers=1, levels=levels)
        fitted, held_out = pixelcnn.hold_out(images)
        assert len(validated) == 1 and torch.equal(validated[0], held_out)
        x = torch.cat(seen)
        name = (x[:, 0, 0, 1:5].bool() * torch.tensor([1, 2, 4, 8])).sum(1)
        counts = name.bincount(minlength=12)
        assert sorted(counts.nonzero()[:, 0].tolist()) == sorted((fitted[:, 0, 0, 1:5].bool() * torch.tensor(
            [1, 2, 4, 8])).sum(1).tolist()) and counts[counts > 0].min() > 100  # of 160 +- 12
        if levels == 4:
            assert x[:, 0, 1:].unique().tolist() == [0, 1, 3]  # 51, 102 and 204
        else:
            for k, p in enumerate((0.2, 0.4, 0.8)):
                near(x[name % 3 == k][:, 0, 1:].double().mean(), p, 0.01)
            assert len(x.flatten(1).unique(dim=0)) == 1600

def test_pixelcnn_training_learns():
    """A hundred steps of a tiny network halve the nats of images that it did not see, as its log says."""
    images = pixelcnn.draw_digits(240, 8)
    with workdir() as here:
        first = quiet(pixelcnn.train, images, iters=1, batch=2, width=8, layers=1)
        model = quiet(pixelcnn.train, images, iters=150, batch=16, width=8, layers=1, path=here / "model.pt")
        head, row, last = (here / "log.csv").read_text().split()
    held_out = pixelcnn.hold_out(images)[1]
    before, after = (pixelcnn.image_nats(m, held_out) for m in (first, model))
    assert head == "iteration,train_nats,valid_nats" and after.mean() < 0.6 * before.mean(), (before, after)
    near(after.mean(), float(last.split(",")[2]), 1e-4)
    x = pixelcnn.to_levels(held_out, 2, torch.Generator().manual_seed(0))
    near(pixelcnn.image_nats(model, held_out, chunk=7), -pixelcnn.log_prob(model, x), 1e-4)
    assert (model(x).softmax(1)[:, 1].mean() - x.float().mean()).abs() < 0.1

def test_pixelcnn_half_products():
    """Convolutions in bfloat16, where there are any, leave the loss in float32 and near what it is without them."""
    model, x = pixel_model(1, 8, 2, 8, 2), torch.randint(2, (9, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    want = pixelcnn.loss_nats(model, x)
    for device in "cpu", "cuda":
        with pixelcnn.half_products(device):
            got = pixelcnn.loss_nats(model, x)
        assert got.dtype == torch.float32 and (device == "cpu" or torch.equal(got, want))
        near(got, want, rtol=0.01)  # 64 numbers, each of three digits

def test_pixelcnn_sample():
    """Chunks and samplers change nothing, seeds do."""
    model = pixel_model(1, 5, 2, 8, 1)
    x = quiet(pixelcnn.sample, model, 7, 3)
    assert x.shape == (7, 1, 5, 5) and torch.equal(x, quiet(pixelcnn.sample, model, 7, 3, chunk=2))
    assert torch.equal(x, quiet(pixelcnn.sample, model, 7, 3, chunk=3, sampler=pixelcnn.sample_plain))
    assert not torch.equal(x, quiet(pixelcnn.sample, model, 7, 4)) and len(x.flatten(1).unique(dim=0)) == 7

def test_pixelcnn_command():
    """The figures are those of all test and held-out images whatever --seed is, the pictures what they say."""
    load = pixelcnn.load
    with workdir() as here, mock.patch.object(pixelcnn, "load", lambda *args: woken(load(*args))):
        grey(here, 90)
        said = []
        for seed, levels in (3, 2), (4, 2), (4, 5):
            words = command(pixelcnn, data="pics", seed=seed, levels=levels, layers=1, out="run", fresh="")
            words = [*words[:-1], "--fresh"] + ["--plain"] * (levels == 2)
            status, out, err = call(pixelcnn, words)
            assert (status, err) == (0, ""), err
            model, images = pixelcnn.load("run/model.pt"), pixelcnn.load_images("pics", 8)
            test = pixelcnn.load_images("pics", 8, test=True)
            line = r"(\d+) (held-out|test) images: .* ([\d.]+) \+- ([\d.]+) nats .* ([\d.]+) bits/dim"
            figures = re.findall(line, out)
            for (n, _, *got), part in zip(figures, (pixelcnn.hold_out(images)[1], test), strict=True):
                x = pixelcnn.to_levels(part, levels, torch.Generator().manual_seed(0))
                nats = -pixelcnn.log_prob(model, x).double()
                assert int(n) == len(part)
                near([float(v) for v in got], [nats.mean(), nats.std(correction=0) / len(part)**0.5,
                                               nats.mean() / 64 / math.log(2)], 0.0051)
            said.append(figures)
            assert ("took" in out or "as long" in out) == (levels == 2) and re.search(r"[\d.]+ images/s: samples", out)
            assert levels != 2 or re.search(r"; 0 of 128 pixels differ", out)
            x = quiet(pixelcnn.sample, model, 2, seed)
            show = lambda x, levels=levels: pixelcnn.to_uint8(pixelcnn.from_levels(x, levels))[:, 0].numpy()
            assert np.array_equal(np.load("run/samples.npy"), show(x))
            parts = tiles("run/completions.png", 8, 8).reshape(8, 8, 8, 8)  # image, given, six ways
            shown = pixelcnn.to_levels(test[:8], levels, torch.Generator().manual_seed(0))
            assert np.array_equal(parts[:, 0], show(shown)) and (parts[:, 1, 4:] == 128).all()
            assert (parts[:, 1:, :4] == parts[:, :1, :4]).all()
            u = torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
            ways = pixelcnn.sample_cached(model, u, shown.repeat_interleave(6, 0), 4)
            assert np.array_equal(parts[:, 2:].reshape(48, 8, 8), show(ways))
            assert len(np.unique(parts.reshape(64, 64), axis=0)) > 50
            heat = np.array(Image.open("run/receptive.png"))[::8, ::8]
            want = pixelcnn.heat_map(pixelcnn.reach(model, shown, 6, 4), 6, 4, 1)
            alike(heat, pixelcnn.to_uint8(want)[0].permute(1, 2, 0).numpy())
        assert said[0] == said[1] != said[2]

def test_pixelcnn_bad_values():
    """What cannot be is refused before training: levels, layers, images that are not square, another checkpoint."""
    with workdir() as here:
        words = command(pixelcnn, **inputs(here), layers=1)
        bad = (("--levels", "1"), ("--levels", "257"), ("--levels", "x"), ("--layers", "-1"))
        with mock.patch.object(pixelcnn, "train", autospec=True, side_effect=AssertionError("it trains")):
            wrong = [refused(pixelcnn, [*words, f"{name}={value}"], name, here) for name, value in bad]
        assert call(pixelcnn, [*words, "--levels", "3"])[0] == 0
        wrong += [refused(pixelcnn, [*words, "--levels", "2"], "levels 3, not 2.*--fresh", here),
                  refused(pixelcnn, [*words, "--levels", "3", "--layers", "2"], "layers 1, not 2.*--fresh", here)]
        quiet(ddpm.train, grey(here), iters=1, batch=2, width=8, path=here / "run" / "model.pt", fresh=True)
        refuses("ddpm.py", pixelcnn.load, here / "run" / "model.pt")
    assert not any(wrong), "\n".join(filter(None, wrong))

# -------------------------------------------------------------------------------------------------- checkpointing -----
ckpt = MODULES["checkpointing"]

class Mixed(nn.Module):
    """A chain of six layers of all kinds: dropout, batch-norm twice, a convolution, a layer without parameters."""
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([
            nn.Linear(6, 12), nn.Sequential(nn.Unflatten(1, (3, 4)), nn.BatchNorm1d(3, momentum=None), nn.Tanh()),
            nn.Dropout(0.4), nn.Conv1d(3, 3, 3, padding=1), nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.ReLU()),
            nn.Sequential(nn.Linear(12, 5), nn.Dropout(0.2))])

def plans(n):
    """{name: schedule} of every strategy, and some that none of them gives."""
    chain = ckpt.Chain([1.0] * n, [8] * n, [24] * n, [0] * n, 0.0)
    return {**{name: make(n, 3) for name, make in ckpt.STRATEGIES.items()},
            "budget": ckpt.in_budget(chain, 60), "all": [list(range(n))],
            "nested": [[[[0], 1], 2], *range(3, n)], "deep": [[[[[*range(n - 2)]], n - 2]], n - 1]}

def outcome(schedule, needs=True, dtype=None, seed=0):
    """All that a step of Mixed leaves: the output, gradients, buffers and the state of the generator."""
    torch.manual_seed(seed)
    model, x = Mixed().train(), torch.randn(7, 6, requires_grad=needs)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        y = ckpt.run(list(model.layers), schedule, x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers(), torch.get_rng_state()]

def test_checkpointing_gradients():
    """Every strategy gives the gradients, running statistics and random numbers of no checkpoints, bit for bit: with
    dropout and batch-norm, under autocast, and where the input needs no gradient."""
    for needs, dtype in itertools.product((True, False), (None, torch.bfloat16, torch.float16)):
        want = outcome(range(6), needs, dtype)
        assert all(v is not None for v in want[2:]) and (want[1] is None) != needs
        want = [v for v in want if v is not None]
        assert [v.item() for v in want if v.dtype == torch.int64] == [1, 1]  # num_batches_tracked
        for name, schedule in plans(6).items():
            same([v for v in outcome(schedule, needs, dtype) if v is not None], want, f"{name}, {needs}, {dtype}")

def test_checkpointing_chain():
    """(1), (2): the gradients of a deep chain are those of the chain rule written out, layer after layer, and are the
    same for every strategy, nested as deep as its schedule is; a second backward() runs all of it again."""
    torch.manual_seed(0)
    layers, x = [ckpt.ResidualLayer(5, 40).double() for _ in range(40)], torch.randn(3, 5).double()
    xs = [x]
    for layer in layers:
        xs.append(layer(xs[-1]).detach())
    d_x, wanted = torch.ones_like(x), []
    for layer, x_i in zip(layers[::-1], xs[-2::-1]):
        h = x_i @ layer.inner.weight.t() + layer.inner.bias
        d_h = d_x @ layer.outer.weight * (h > 0)
        wanted = [d_h.t() @ x_i, d_h.sum(0), d_x.t() @ h.relu(), d_x.sum(0), *wanted]
        d_x = d_x + d_h @ layer.inner.weight
    found = {}
    for name, schedule in {**plans(40), "one slot": ckpt.in_slots(40, 1)}.items():
        for p in (params := [p for layer in layers for p in layer.parameters()]):
            p.grad = None
        start = x.clone().requires_grad_()
        y = ckpt.run(layers, schedule, start)
        y.sum().backward(retain_graph=True)
        found[name] = [start.grad.clone(), *(p.grad.clone() for p in params)]
        for got, want in zip(found[name], [d_x, *wanted]):
            near(got, want, 1e-12)  # float64, a few hundred terms of size 1
        same(found[name], found["none"], name)
        y.sum().backward()
        for got, once in zip([start.grad, *(p.grad for p in params)], found[name]):
            assert torch.equal(got, 2 * once)

def test_checkpointing_values():
    """Tensors and other things, in tuples, lists and dicts, by position and by name, go in and come out; an output that
    nobody uses (whose slope is infinite), one without a gradient, and one that is an input, do no harm."""
    def f(a, scale, pair, *, extra, label="no"):
        (b, ids), c = pair, extra["c"]
        more = [(c * 0).sqrt(), (a.detach() * 2, None)]
        return {"sum": a * scale + b[ids] @ c, "ids": ids, "text": label, "more": more}, a

    def leaves():
        torch.manual_seed(1)
        return [torch.randn(3, 3, requires_grad=True) for _ in range(3)]

    results = []
    for call_ in (lambda f, *args, **named: f(*args, **named)), ckpt.checkpoint:
        a, b, c = leaves()
        out, again = call_(f, a, 2.5, (b, torch.tensor([2, 0, 1])), extra={"c": c}, label="yes")
        assert (out["text"], out["more"][1][1]) == ("yes", None) and out["ids"].tolist() == [2, 0, 1]
        (out["sum"].square().sum() + again.sum()).backward()
        results.append([out["sum"].detach(), again.detach(), a.grad, b.grad, c.grad])
    same(*results)
    x = torch.randn(3, requires_grad=True)
    assert torch.equal(ckpt.checkpoint(torch.sin, x), x.sin()) and type(ckpt.checkpoint(lambda x: (x,), x)) is tuple
    with torch.no_grad():
        assert not ckpt.checkpoint(torch.sin, x).requires_grad
    frozen, ids, wants = torch.ones(2), torch.tensor([1, 0]), []
    y = ckpt.checkpoint(lambda v, i: wants.append(v.requires_grad) or v[i], frozen, ids) * x[:2]  # no gradient in it
    y.sum().backward()
    assert wants == [False, False]
    near(x.grad, torch.tensor([1.0, 1.0, 0.0]))

def raised(kind, function, *args):
    """What it raises, which must be of that kind."""
    try:
        function(*args)
    except kind as e:
        return e
    raise AssertionError(f"no {kind.__name__}")

def test_checkpointing_refusals():
    """An exception in f is that of f, on the way forth and back, and leaves generators and batch-norm in order. Inputs
    that were changed are noticed. Second derivatives, autograd.grad() and inputs= are refused in words."""
    class Own(Exception):
        """Nobody else raises it."""

    x, norm, error, calls = torch.randn(4, 3, requires_grad=True), nn.BatchNorm1d(3), Own("mine"), []

    def f(x, good):
        calls.append(torch.rand(1))
        if len(calls) > good:
            raise error
        return norm(x)

    assert raised(Own, ckpt.checkpoint, f, x, 0) is error
    calls.clear()
    y = ckpt.checkpoint(f, x, 1)
    state = torch.get_rng_state()
    assert raised(Own, y.sum().backward) is error and torch.equal(torch.get_rng_state(), state)
    assert calls[0] == calls[1] and norm.track_running_stats and "track_running_stats" not in vars(
        nn.modules.batchnorm._NormBase)
    norm(x)
    assert norm.num_batches_tracked == 2

    w = torch.randn(3, requires_grad=True)
    for bad in (lambda y: y.backward(create_graph=True), lambda y: torch.autograd.grad(y, x),
                lambda y: torch.autograd.grad(y, x, create_graph=True), lambda y: y.backward(inputs=[x])):
        y = ckpt.checkpoint(lambda x: (x * w).sin(), x).sum()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has one for create_graph
            assert "only a plain loss.backward()" in str(raised(RuntimeError, bad, y)) and w.grad is None
    for needs in True, False:
        v = torch.ones(3)
        y = ckpt.checkpoint(lambda v: v * w, v.requires_grad_(needs))
        with torch.no_grad():
            v.add_(1)
        assert "modified" in str(raised(RuntimeError, y.sum().backward))

def test_checkpointing_autocast():
    """Autocast is put back as it was, whatever it is on the way back; the backward of f is not run under it; and casts
    made without a gradient are not taken for those of a later use of the same weights."""
    torch.manual_seed(0)
    layer, x, seen, cached = nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True), [], []

    def f(x):
        seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        cached.append(seen[-1] and torch.is_autocast_cache_enabled())
        return layer(x)

    def grads(way, forth, back, twice):
        layer.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=forth):
            y = way(f, x)
            y = layer(y) if twice else y  # the same weights again, now kept
        with torch.autocast("cpu", torch.float16, enabled=back):
            y.float().square().sum().backward()
        return [x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()]

    for forth, back, twice in itertools.product((False, True), repeat=3):
        seen.clear()
        got = grads(ckpt.checkpoint, forth, back, twice)
        assert not any(cached)  # in some versions of torch a cached cast would have no gradient
        want = grads(lambda f, x: f(x), forth, back, twice)
        cached.clear()
        for a, b in zip(got, want):  # without checkpoints, gradients of two uses of a cast are added as bfloat16
            near(a, b, 0.02 * b.abs().max() if twice and forth else 0)
        assert seen == [forth and torch.bfloat16] * 3, seen

def test_checkpointing_generators():
    """The generators of CUDA and MPS devices are wound back too, and put where they were; here they are stand-ins."""
    one, two, devices = torch.Generator(), torch.Generator(), {torch.device("cuda", 1), torch.device("mps")}
    with mock.patch.object(torch.cuda, "default_generators", (None, one)), mock.patch.object(
            torch.mps, "_get_default_mps_generator", lambda: two), mock.patch.object(
            torch.amp, "is_autocast_available", lambda kind: kind == "cpu"):
        states, casts = ckpt.surroundings(devices)
    assert [kind for kind, _, _ in casts] == ["cpu"] and [g for g, _ in states][1:] == [one, two]
    draw = lambda: [torch.rand(3).tolist(), *(torch.rand(3, generator=g).tolist() for g in (one, two))]
    first, second = draw(), draw()
    with ckpt.replay(states):
        assert draw() == first
        with ckpt.replay(states):
            assert draw() == first
        assert draw() == second and not nn.BatchNorm1d(2).train().track_running_stats
    assert draw() not in (first, second) and nn.BatchNorm1d(2).track_running_stats

def brute_force(n, slots):
    """The least number of steps forward without a tape, by trying all there is to do: a state is how many layers still
    have to go back, the inputs that are held, and the one at hand."""
    best, queue = {}, [(0, n, frozenset([0]), 0)]
    while queue:
        cost, left, held, at = heapq.heappop(queue)
        if not left:
            return cost
        if best.setdefault((left, held, at), cost) < cost:
            continue
        following = [(cost, left, held, p) for p in held] + [(cost, left, held - {p}, at) for p in held]
        if at == left - 1:
            following += [(cost, left - 1, frozenset(p for p in held if p < left - 1), -1)]  # its way back
        if 0 <= at < left - 1:
            following += [(cost + 1, left, held, at + 1)]
        if at >= 0 and len(held | {at}) <= slots:
            following += [(cost, left, held | {at}, at)]
        for state in following:
            if state[0] < best.get(state[1:], math.inf):
                best[state[1:]] = state[0]
                heapq.heappush(queue, state)
    return math.inf

def runs(schedule):
    """How often a layer is run by a schedule, tape or no tape."""
    flat = lambda parts: [i for part in parts for i in ([part] if isinstance(part, int) else flat(part))]
    return len(flat(schedule)) + sum(runs(part) for part in schedule if not isinstance(part, int))

def test_checkpointing_binomial():
    """(6), (7): dynamic programming, the closed form and the schedules agree up to 60 layers and 10 slots; for up to 8
    layers nothing better is found by trying everything there is to do."""
    @functools.cache
    def t(n, s):
        return min((k + t(n - k, s - 1) + t(k, s) for k in range(1, n)), default=0) if n == 1 or s else math.inf

    for slots in range(1, 11):
        for n in range(1, 61):
            assert t(n, slots) == ckpt.closed_form(n, slots) == runs(ckpt.in_slots(n, slots)) - n, (n, slots)
    for n, slots in itertools.product(range(1, 9), range(1, 6)):
        assert brute_force(n, slots) == ckpt.closed_form(n, slots), (n, slots)
    assert [ckpt.closed_form(10, s) for s in (1, 2, 3)] == [45, 20, 15]
    assert runs(ckpt.in_slots(1000, 10)) == 1000 + 3636
    assert "--slots 1" in refusal(ckpt.in_slots, 100, 1)

def theory(strategy, n, w, a, slots=10):
    """Peak in bytes, and how often a layer is run, of n equal layers by the equations; not for "budget"."""
    m = math.isqrt(n - 1) + 1
    return {"none": (n * a, n), "every": ((n - 1) * w + a, 2 * n - 1),
            "sqrt": ((m - 1) * w + math.ceil(n / m) * a, 2 * n - math.ceil(n / m)),
            "recursive": ((n - 1).bit_length() * w + a, n + sum(i.bit_count() for i in range(n))),
            "slots": (min(slots, n - 1) * w + a, n + ckpt.closed_form(n, slots))}[strategy]

def test_checkpointing_counts():
    """(3) to (7): the bytes that autograd keeps, and the runs of a layer, are the theory's, whatever the strategy."""
    torch.manual_seed(0)
    for n, width, batch in (1, 3, 2), (2, 3, 2), (3, 4, 1), (7, 3, 5), (16, 2, 2), (17, 2, 3), (50, 1, 1), (101, 2, 2):
        layers, x = [ckpt.ResidualLayer(width) for _ in range(n)], torch.randn(batch, width)
        chain, w = ckpt.profile(layers[:3], x), 4 * batch * width
        assert set(chain.w) == {w} and set(chain.a) == {2 * w} and set(chain.last) == {0}
        for name, slots in [*((name, 4) for name in ckpt.STRATEGIES), ("slots", 2), ("slots", 10)]:
            schedule = ckpt.choose_schedule(name, layers, x, slots)
            found = ckpt.count(schedule, layers, x)
            assert found == theory(name, n, w, 2 * w, slots) and found[1] == runs(schedule), (name, n, found)
            assert ckpt.predict(schedule, ckpt.Chain([1] * n, [w] * n, [2 * w] * n, [0] * n, 0)) == found
    n = 1000
    none = theory("none", n, 1, 2)[0]
    assert 20 * theory("sqrt", n, 1, 2)[0] <= none and 80 * theory("recursive", n, 1, 2)[0] <= none
    t = functools.cache(lambda n: n // 2 + t(n // 2) + t(n - n // 2) if n > 1 else 0)
    assert theory("slots", n, 1, 2, 10) == (12, 4636) and theory("recursive", n, 1, 2) == (12, n + t(n))

def test_checkpointing_tally():
    """Bytes are counted by storage, once, while somebody keeps them; weights and buffers are not; the peak stays."""
    layer, x = nn.Linear(4, 4), torch.randn(5, 4, requires_grad=True)
    with (tally := ckpt.Tally(layer.parameters())):
        a = x * x  # x twice: 80 bytes
        assert sum(tally.sizes().values()) == 80
        b = x[:2].exp() * x[2:4]  # parts of x, the exp that two of them keep: 32 bytes
        assert sum(tally.sizes().values()) == 112
        c = layer(x)  # x again, and the weight
        assert sum(tally.sizes().values()) == 112
        del a
        assert sum(tally.sizes().values()) == 112
        (b.sum() + c.sum()).backward()
    assert (sum(tally.sizes().values()), tally.peak) == (0, 112)
    with (tally := ckpt.Tally([])):
        layer(x)
    assert tally.peak == 80 + 64

def every_schedule(first, n):
    """All schedules of n layers in which the last part is no list."""
    if n == 0:
        yield []
    for k in range(1, n + 1):
        for rest in every_schedule(first + k, n - k):
            if k == 1:
                yield [first, *rest]
            if rest:
                for inner in every_schedule(first, k):
                    yield [inner, *rest]

def uneven(seed, n=12):
    """Layers of any size and kind, and an input."""
    g = torch.Generator().manual_seed(seed)
    sizes = [int(v) for v in torch.randint(1, 9, (n + 1,), generator=g)]
    kinds = [lambda a, b: nn.Linear(a, b), lambda a, b: nn.Sequential(nn.Linear(a, b), nn.ReLU()),
             lambda a, b: nn.Sequential(nn.Linear(a, 3 * b), nn.Tanh(), nn.Linear(3 * b, b)),
             lambda a, b: nn.Sequential(nn.Linear(a, b), nn.Sigmoid(), nn.Dropout(0.5))]
    picks = torch.randint(len(kinds), (n,), generator=g).tolist()
    return [kinds[k](a, b) for k, a, b in zip(picks, sizes, sizes[1:])], torch.randn(6, sizes[0], generator=g)

def test_checkpointing_instance_norm():
    """In eval mode a layer with running statistics uses them when it is run again, too, and leaves them as they are."""
    for norm in nn.InstanceNorm1d(3, affine=True, track_running_stats=True), nn.BatchNorm1d(3):
        norm.running_mean.copy_(normal(3))
        norm.running_var.fill_(4.0)
        norm.eval()
        before, grads = [v.clone() for v in norm.buffers()], []
        for f in norm, functools.partial(ckpt.checkpoint, norm):
            x = normal(2, 3, 5, seed=1).float().requires_grad_()
            norm.zero_grad()
            f(x).square().sum().backward()
            grads.append([x.grad, norm.weight.grad.clone(), norm.bias.grad.clone()])
        assert all(torch.equal(a, b) for a, b in zip(*grads)) and grads[0][0].abs().max() > 0.1, norm
        assert all(torch.equal(a, b) for a, b in zip(before, norm.buffers())), norm

def test_checkpointing_budget():
    """(8): a schedule for a budget never keeps more when it runs, no equal segments that fit are faster, no schedule at
    all where all can be tried, and what is less than the layers need is refused."""
    for seed in range(6):
        layers, x = uneven(seed)
        n, chain = len(layers), ckpt.profile(layers, x)
        chain = chain._replace(u=torch.rand(n, generator=torch.Generator().manual_seed(seed)).double().tolist(), c=0)
        whole, least = ckpt.predict(range(n), chain)[0], chain.w[0] + max(a + b for a, b in zip(chain.a, chain.last))
        for budget in np.linspace(1.05 * least, whole, 7).tolist():
            schedule = ckpt.in_budget(chain, budget)
            peak, seconds = ckpt.predict(schedule, chain)
            found, _ = ckpt.count(schedule, layers, x)
            assert found <= peak <= budget, (seed, budget, peak, found)
            for parts in (ckpt.segments(n, m) for m in range(1, n + 1)):
                most, took = ckpt.predict(parts, chain)
                assert ckpt.count(parts, layers, x)[0] <= most
                assert most > budget or took >= seconds - 1e-9, (seed, budget, parts)
        assert ckpt.in_budget(chain, whole) == list(range(n))
        assert "--budget" in refusal(ckpt.in_budget, chain, 0.5 * least)
    first = ckpt.Chain([1.0, 1.0], [2_000_000, 1_000_000], [9_000_000, 2_000_000], [500_000, 0], 0)
    assert "about 9.5 MB" in refusal(ckpt.in_budget, first, 9_000_000)  # its own input is not counted twice
    assert ckpt.in_budget(first, 9_500_000) and ckpt.in_budget(ckpt.Chain(*([v[0]] for v in first[:4]), 0), 9_500_000)
    rng = np.random.default_rng(0)
    for _ in range(8):
        w, a, last = (rng.integers(*span, 6).tolist() for span in ((1, 9), (8, 16), (0, 4)))
        chain = ckpt.Chain(rng.random(6).tolist(), w, a, last, rng.random() / 2)
        tried = [ckpt.predict(parts, chain) for parts in every_schedule(0, 6)]
        for budget in range(14, 80, 3):
            fits = [seconds for peak, seconds in tried if peak <= budget]
            if fits:
                assert math.isclose(ckpt.predict(ckpt.in_budget(chain, budget), chain)[1], min(fits)), budget
            else:
                assert "--budget" in refusal(ckpt.in_budget, chain, budget)
    w, a = (rng.integers(*span, 20).tolist() for span in ((10**5, 10**6), (10**6, 2 * 10**6)))  # to be rounded up
    chain = ckpt.Chain(rng.random(20).tolist(), w, a, [0] * 20, 0)
    for budget in np.linspace(4e6, 2e7, 9).tolist():
        assert 0.9 * budget < ckpt.predict(ckpt.in_budget(chain, budget), chain)[0] <= budget
    chain = ckpt.Chain([1e-3] * 300, [64] * 300, [128] * 300, [0] * 300, 0)  # in blocks
    peak, seconds = ckpt.predict(ckpt.in_budget(chain, 64 * 60), chain)
    assert peak <= 64 * 60 and seconds < 0.62

def test_checkpointing_uneven_predicted():
    """predict() says what autograd keeps of layers of any size and kind, if they need their inputs."""
    for seed in range(6):
        layers, x = uneven(seed)
        chain = ckpt.profile(layers, x)
        for name, schedule in plans(len(layers)).items():
            found, times = ckpt.count(schedule, layers, x)
            peak, runs_ = ckpt.predict(schedule, chain._replace(u=[1] * len(layers), c=0))
            assert (found, times) == (peak, runs_), (seed, name)

CHILD = r"""
import re, torch, checkpointing as c
layers, x = [c.ResidualLayer(16, 300) for _ in range(300)], torch.randn(4096, 16)
peak = lambda: int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
for p in (p for layer in layers for p in layer.parameters()):
    p.grad = torch.zeros_like(p)  # as after the first step; what is new would lie between what is let go
c.there_and_back(c.segments(2, 2), layers[:2], x)
sizes = [peak()]
for m in 18, 1:
    c.there_and_back(c.segments(300, m), layers, x)
    sizes.append(peak())
print(*sizes)
"""

def test_checkpointing_resident():
    """What a process takes of the machine really falls: 300 layers whose activations are 157 MB."""
    if not os.path.exists("/proc/self/status"):
        raise unittest.SkipTest("this system does not tell the largest resident set")
    child = subprocess.run([sys.executable, "-c", CHILD], cwd=HERE, capture_output=True, text=True, check=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    before, some, all_ = map(int, child.stdout.split())
    assert all_ - some > 90_000 and some - before < 75_000, child.stdout  # kB; CUDA libraries add 50,000

def test_checkpointing_torch():
    """Against torch's own with the same segments: the same gradients, no more bytes, and no more runs of a layer but
    for those that its longer last segment saves."""
    torch.manual_seed(0)
    for n in 36, 40, 100:
        layers, x, m = [ckpt.ResidualLayer(4, n) for _ in range(n)], torch.randn(3, 4), math.isqrt(n - 1) + 1
        torchs = functools.partial(torch.utils.checkpoint.checkpoint_sequential, use_reentrant=True)
        ways = [ckpt.segments(n, m), lambda layers, x, m=m, torchs=torchs: torchs(layers, m, x)]
        (ours, runs_), (theirs, others) = (ckpt.count(way, layers, x) for way in ways)
        assert ours <= theirs and others <= runs_ <= others + n % m + n // m, (n, ours, theirs)
        grads = []
        for way in ways:
            for layer in layers:
                layer.zero_grad()
            ckpt.there_and_back(way, layers, x)
            grads.append([p.grad for layer in layers for p in layer.parameters()])
        same(*grads)

class Block(nn.Module):
    """A transformer block, as the README has it."""
    def __init__(self, width, heads):
        super().__init__()
        self.attend = nn.MultiheadAttention(width, heads, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x, mask=None):
        h = self.norm_1(x)
        x = x + self.attend(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.norm_2(x))

def test_checkpointing_transformer():
    """One line at the call of a transformer's blocks changes no bit of what is learned, and leaves fewer bytes."""
    def step(wrap):
        torch.manual_seed(0)
        blocks, x = nn.ModuleList(Block(16, 2) for _ in range(6)), torch.randn(2, 10, 16)
        mask = nn.Transformer.generate_square_subsequent_mask(10)
        with (tally := ckpt.Tally(blocks.parameters())):
            for block in blocks:
                x = ckpt.checkpoint(block, x, mask=mask) if wrap else block(x, mask=mask)
            x.square().mean().backward()
        return tally.peak, [p.grad for p in blocks.parameters()]

    (most, plain), (least, wrapped) = step(False), step(True)
    same(wrapped, plain)
    assert least < most / 4, (least, most)

def test_checkpointing_same_weights():
    """Training ends with the same weights under every strategy, bit for bit, and learns to take noise off."""
    images, kept = ckpt.draw_digits(200, 8), []
    settings = [(name, {}) for name in ckpt.STRATEGIES] + [("slots", dict(slots=2)), ("budget", dict(budget=0.012))]
    for name, more in settings:
        model = quiet(ckpt.train, images, 60, 16, 3e-3, 16, 8, name, **more)
        kept.append([*model.parameters()])
        assert not model.training and not any(p.requires_grad for p in kept[-1])
    for other in kept[1:]:
        same(other, kept[0])
    deep = ckpt.Denoiser(1, 8, 32, 300)
    h = torch.randn(50, 32)
    spread = ckpt.run(list(deep.layers), range(300), h).std().item()
    assert 0.9 < spread < 1.5, spread  # whatever the depth
    x = ckpt.to_float(images)
    noisy = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    with workdir() as here:
        model = quiet(ckpt.train, images, 400, 32, 3e-3, 32, 3, path=here / "model.pt")
        loss = float((here / "log.csv").read_text().split(",")[-1])
    error = F.mse_loss(model(noisy), x)
    assert error < 0.6 * x.var() and abs(loss / (error / 4) - 1) < 0.2, (error, loss)  # of pixels in 0 .. 1
    assert "12x8" in refusal(ckpt.train, torch.zeros(4, 1, 12, 8, dtype=torch.uint8).transpose(2, 3))

ROW = r"^([\w ,.-]+?) *\| +([\d.]+) \(([\d.]+)\) +\| 1/([\d.]+) +\| +(\d+) \((\d+)\) +\| +([\d.]+) \(([\d.]+)\) "

def test_checkpointing_command():
    """What the command says of a strategy is what it does, and the equations say; --compare trains nothing, but prints
    two tables and draws a picture; impossible slots and budgets are refused before anything is written."""
    with workdir() as here:
        flags = dict(inputs(here), depth=30, iters=3)
        words = command(ckpt, **flags)
        files = []
        for strategy, *more in ("none",), ("slots", "--slots", 3), ("budget", "--budget", 0.001):
            more = ["--strategy", strategy, *more]
            status, out, err = call(ckpt, [*words, *more, "--fresh"])
            assert status == 0, err
            files.append((here / "run/model.pt").read_bytes())
            none, ours = (re.findall(ROW, out, re.M) * 2)[:2]
            assert none[:6] == ("none", "0.004", "0.004", "1.0", "30", "30") and ours[0] == strategy
            assert ours[1] == ours[2] and ours[4] == ours[5] and int(ours[4]) > 30 - (strategy == "none")
        assert files[0] == files[1] == files[2]
        for more, say in ((["--strategy", "slots", "--slots", 1, "--depth", 99, "--fresh"], "--slots 1"),
                          (["--strategy", "budget", "--budget", "1e-4", "--fresh"], "--budget 0.0001.*MB"),
                          (["--strategy", "budget", "--budget", "nan", "--fresh"], "--budget nan"),
                          (["--strategy", "some"], "--strategy"), (["--depth", 0], "--depth")):
            assert not (wrong := refused(ckpt, [*words, *more], say, here)), wrong
    with workdir() as here:
        status, out, err = call(ckpt, [*command(ckpt, depth=30, width=64, batch=50), "--compare", "--slots", 3,
                                        "--budget", 0.3])
        assert status == 0 and os.listdir("run") == ["compare.png"], err
        equal, unequal = (re.findall(ROW, part, re.M) for part in out.split("unequal"))
        assert [row[0] for row in equal] == [*ckpt.STRATEGIES, "budget"] and "\ntorch non-reentrant" in out
        for name, peak, least, share, times, most, *_ in equal:
            assert (peak, times) == (least, most) and abs(float(share) * float(peak) - 0.768) < 0.02
        assert float(equal[-1][1]) <= 0.3 and equal[4][4] == str(30 + ckpt.closed_form(30, 3))
        assert [row[0] for row in unequal] == ["none", "budget", "segments that fit"], unequal
        assert all(row[1] == row[2] and float(row[1]) <= float(unequal[0][1]) / 4 + 0.001 for row in unequal[1:])
        assert call(ckpt, [*command(ckpt), "--compare", "--depth", 1])[0] == 0

def test_checkpointing_picture():
    """On logarithmic scales a power law is a straight line, and the dots lie on their line where they agree with it."""
    curves = {"one": ([(n, n**2) for n in range(1, 101)], [(10, 100)]), "two": ([(1, 10), (100, 10)], [])}
    image = ckpt.plot([("x", {"one": ([], [(1, 1)])}), ("y", curves)])
    pixels = np.array(image).astype(int)[420:]
    black = (pixels == 0).all(2)
    assert black[205 - 3 : 205 + 4, 325 - 3 : 325 + 4].mean() > 0.8  # the middle of 70 .. 580 and 40 .. 370
    for share in (0.4, 0.75):  # at 0.25 the other line crosses
        x, y = 70 + 510 * share, 370 - 330 * share
        assert black[round(y) - 2 : round(y) + 3, round(x) - 2 : round(x) + 3].sum() >= 5
    grey = (pixels == (0x7F, 0x8C, 0x8D)).all(2)
    assert grey[round(370 - 330 / 4) - 2 : round(370 - 330 / 4) + 3, 100:500].any(0).mean() > 0.95

# -------------------------------------------------------------------------------------- training, several files -----
def at_steps(loss, table):
    """A loss at integer steps as one at times 0 .. 1."""
    return lambda model, x_0, eps, u: loss(model, x_0, (u * 1000).long(), eps, table).mean()

LOSSES = {"ddpm": ("loss_simple", at_steps(ddpm.loss_simple, ddpm.make_schedule().to("cpu"))),
          "ddim": ("loss_gamma", at_steps(ddim.loss_gamma, ddim.noise_tables(ddim.make_alpha_bar()))),
          "rectified_flow": ("loss_flow", lambda model, x, noise, u: flow.loss_flow(model, noise, x, u)),
          "realnvp": ("loss_bits", None),  # None: another kind of network, with a test of its own that it learns
          "pixelcnn": ("loss_nats", None)}

def has_loss(module):
    return module.__name__ in LOSSES

@each(lambda module: has_loss(module) and LOSSES[module.__name__][1])
def test_training_learns(module):
    """On one image, 200 steps of a tiny network cut its loss, and the averaged network profits."""
    images = module.draw_digits(4, 8)[3:].repeat(4, 1, 1, 1)
    with workdir() as here:
        average = quiet(module.train, images, iters=200, batch=8, width=8, path=here / "model.pt")
        first, last = (float(row.split(",")[1]) for row in (here / "log.csv").read_text().split()[1:])
    assert last < 0.7 * first, (first, last)
    x, noise = module.to_float(images[:1]).repeat(100, 1, 1, 1), normal(100, 1, 8, 8).float()
    measure = lambda model: LOSSES[module.__name__][1](model, x, noise, torch.arange(0.005, 1, 0.01))
    assert measure(average) < 0.5 * measure(lambda x, t: 0 * x)

@each(has_loss)
def test_training_averages_the_weights(module):
    """The average lies among the weights that training passed, near the last at first, with more memory later."""
    name = LOSSES[module.__name__][0]
    images, real = module.draw_digits(8, 8), getattr(module, name)
    flat = lambda parameters: torch.cat([p.detach().flatten() for p in parameters]).double()
    for iters in 1, 20:
        passed = []

        def loss(model, *args, passed=passed):
            passed.append(flat(model.parameters()))
            return real(model, *args)

        with workdir() as here, mock.patch.object(module, name, loss):
            average = quiet(module.train, images, iters=iters, batch=2, width=8, path=here / "model.pt")
            last = torch.load(here / "model.pt", weights_only=True)["parts"][0]
            loaded = module.load(here / "model.pt")
        same(average.state_dict(), loaded.state_dict())
        steps = torch.stack([*passed, flat(last[name] for name, _ in average.named_parameters())])
        a = flat(average.parameters())
        assert (steps.amin(0) - 1e-6 < a).all() and (a < steps.amax(0) + 1e-6).all()  # float32
        assert 0 < (a - steps[-1]).norm() < 0.5 * (a - steps[0]).norm()  # the beginning is soon forgotten
    assert (a - steps[-1]).norm() > 2 * (steps[-1] - steps[-2]).norm()  # by now it lags some steps behind

@each(has_loss)
def test_training_seed(module):
    """The same seed trains the same bits, another seed others."""
    images = module.draw_digits(8, 8)
    train = lambda seed: quiet(module.train, images, iters=3, batch=2, width=8, seed=seed).state_dict()
    one, again, other = map(train, (1, 1, 2))
    same(dict(one), dict(again))
    assert not any(torch.equal(one[name], other[name]) for name in one if "norm" not in name)

@each(lambda module: hasattr(module, "hold_out"))
def test_training_hold_out(module):
    """A sixth is held out, nothing is in both parts but a single image, no order of the images matters or is drawn."""
    for n, held in (60_000, 10_000), (6, 1), (4, 1), (2, 1), (13, 2), (1, 1):
        state = torch.get_rng_state()
        first, last = module.hold_out(torch.arange(n))
        assert torch.equal(state, torch.get_rng_state()) and len(last) == held
        assert sorted({*first.tolist(), *last.tolist()}) == list(range(n)) and len(first) == max(1, n - held)
        same(last, module.hold_out(torch.arange(n))[1])
    last = module.hold_out(torch.arange(60_000))[1]
    assert last.float().histc(6, 0, 60_000).min() > 1500  # 1667 +- 34: of sorted folders something of each
    assert (last % 10).bincount().min() > 850  # 1000 +- 27 of each drawn digit

@each(has_loss)
def test_training_wants_squares(module):
    """train() says at once that it cannot take images that are not square, and in which shape they came."""
    try:
        raise AssertionError(f"it trained: {module.train(torch.zeros(4, 1, 8, 12, dtype=torch.uint8), iters=1)}")
    except ValueError as e:
        assert "12x8" in str(e)

def test_sampling_speed():
    """The images/s that drawing shows count the images that are done, also where the last chunk is smaller."""
    flat, shape = (lambda x, t: 0 * x), (5, 1, 2, 2)
    draws = [(ddpm, lambda: ddpm.sample(flat, shape, chunk=2)), (ddim, lambda: ddim.sample(flat, shape, 3, chunk=2)),
             (flow, lambda: flow.sample(flat, shape, 3, chunk=2)),
             (flow, lambda: flow.make_pairs(flat, shape, 3, chunk=2)),
             (gan, lambda: gan.sample(gan.Generator(1, 8, 4, 6).eval(), 5, chunk=2)),
             (realnvp, lambda: realnvp.sample(realnvp.RealNVP(1, 8, 8), 5, chunk=2))]
    for module, draw in draws:
        shown = []
        progress = lambda what, unit, total, shown=shown: lambda done, each: shown.append((done * each, done == total))
        with mock.patch.object(module, "Progress", progress):
            draw()
        images, ended = zip(*shown)
        near(images[-1], 5, 1e-9)
        near(images[len(images) * 2 // 3 - 1], 4, 1e-9)  # the end of the second of three chunks
        assert ended == (False,) * (len(ended) - 1) + (True,) and list(images) == sorted(set(images))

SPREAD = """
import contextlib, importlib, os, pathlib, sys, torch
words = ["--data", "pics", "--size", "8", "--width", "8", "--iters", "2", "--batch", "4", "--samples", "2"]
rank, names = os.environ["RANK"], sys.argv[1:]
flow = importlib.import_module("rectified_flow")
flow.main([*words, "--reflow", "1", "--pairs", "6", "--out", "run" if rank == "0" else "nowhere"])
images = torch.randint(256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
for name in names:
    module, seen = importlib.import_module(name), set()
    module.half_products = lambda device: contextlib.nullcontext()  # bfloat16 would hide what is compared
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda net, x: seen.add(len(x[0])) if net.training and isinstance(net, torch.nn.Conv2d) else None)
    path = pathlib.Path(name if rank == "0" else "nowhere", "model.pt")
    model = module.train(images, iters=1, batch=4, width=8, path=path)
    hook.remove()
    weights = {key: p.data for key, p in model.named_parameters()}
    torch.save({"seen": sorted(seen), "average": weights}, f"{name}{rank}.pt")
try:
    flow.train(images, iters=1, batch=3)
except ValueError as e:
    pathlib.Path(f"odd{rank}").write_text(str(e))
"""

def test_torchrun():
    """Two processes under torchrun make, of half a batch each, the gradients of one process with the whole, and a file
    that one goes on with; the first alone samples and writes. gan.py's batch norm and dropout see half a batch, so the
    one process that it is compared with shows its nets the two halves one after the other."""
    def by_halves(real):
        def forward(net, x):
            if not net.training:
                return real(net, x)
            state, halves = torch.get_rng_state(), []
            for half in x[::2], x[1::2]:
                torch.set_rng_state(state)  # both processes draw the same dropout
                halves.append(real(net, half))
            return torch.stack(halves, 1).flatten(0, 1)
        return forward

    names = [name for name in ("ddpm", "ddim", "rectified_flow", "gan", "pixelcnn") if name in MODULES]
    with workdir() as here:
        paint(here / "pics")
        (here / "spread.py").write_text(SPREAD, "utf-8")
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"}
        child = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                                "spread.py", *names], env=env, capture_output=True, text=True, timeout=150)
        assert child.returncode == 0, child.stderr
        assert [child.stdout.count(said) for said in ("images of 8x8x1", "2 samples")] == [1, 1], child.stdout
        check_run_folder(flow, here / "run", (2, 8, 8))
        assert not (here / "nowhere").exists()
        assert all("--batch 3: 2 processes" in (here / f"odd{rank}").read_text() for rank in (0, 1))
        images = torch.randint(256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        for name in names:
            module, one, two = MODULES[name], here / "one" / "model.pt", here / name / "model.pt"
            ranks = [torch.load(here / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1)]
            assert [rank["seen"] for rank in ranks] == [[2], [2]], (name, ranks)  # images in a pass of a network
            same(ranks[0]["average"], ranks[1]["average"])
            train = functools.partial(quiet, module.train, images, iters=1, batch=4, width=8)
            with contextlib.ExitStack() as patches:
                patches.enter_context(mock.patch.object(module, "half_products", contextlib.nullcontext, create=True))
                for net in (gan.Generator, gan.Discriminator) if name == "gan" else ():
                    patches.enter_context(mock.patch.object(net, "forward", by_halves(net.forward)))
                train(path=one, fresh=True)
            a, b = (torch.load(path, weights_only=True) for path in (two, one))
            assert a["settings"] == b["settings"] and a["done"] == b["done"] == 1
            for mine, wanted in zip(a["parts"], b["parts"], strict=True):
                if "param_groups" in mine:  # Adam's first moment: the gradient times a constant
                    got, want = (torch.cat([state["exp_avg"].flatten() for state in part["state"].values()])
                                 for part in (mine, wanted))
                    assert want.abs().max() > 1e-6
                    near(got, want, 1e-5 * want.abs().max())
                assert mine.keys() == wanted.keys()
            same(train(path=two).state_dict(), module.load(two).state_dict())  # one process takes it as its own

# --------------------------------------------------------------------------------------------------------- runner -----
def run(names):
    """Runs tests one after another -> [(name, seconds, what became of it, what it printed)]."""
    rows = []
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
        rows.append((name, time.perf_counter() - start, result, said.getvalue() * (result == "failed")))
    return rows

def main(words):
    """Runs the tests whose name contains one of the words, all without words -> the exit status.

    The tests of one file stay together, and as many files as there are cores, at most four, are tested side by side."""
    tests = [name for name, test in globals().items() if name.startswith("test_") and callable(test)]
    groups, counts = collections.defaultdict(list), collections.Counter()
    for name in tests:
        if not words or any(word in name for word in words):
            groups[next((file for file in NAMES if f"_{file}_" in f"{name}_"), "")].append(name)
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
