"""The direction of imports, the size of files and functions, and that importing a module changes nothing global."""
import ast
import configparser
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = ("model", "diffusion", "data", "eval", "safety")  # they know themselves, files/ and libraries
COMMANDS = ("train", "sample", "evaluate", "moderate", "serve")
GROUND = {"files"}
PARTS = GROUND | set(LEAVES)
# the rule: commands -> scoring -> training -> pipeline -> leaves -> files; sampling stands beside training, serving
# above sampling
ALLOWED = {
    "files": GROUND,
    **{leaf: GROUND | {leaf} for leaf in LEAVES},
    "pipeline": PARTS | {"pipeline"},
    "training": PARTS | {"pipeline", "training"},
    "sampling": PARTS | {"pipeline", "sampling"},
    "scoring": PARTS | {"pipeline", "training", "scoring"},
    "serving": PARTS | {"pipeline", "sampling", "serving"},
    **{command: PARTS | {"pipeline", "training", "sampling", "scoring"} for command in COMMANDS},
    "serve": PARTS | {"pipeline", "sampling", "serving"},
    "benchmarks": PARTS | {"pipeline", "training", "sampling", "scoring", "benchmarks", *COMMANDS},
    "tests": PARTS | {"pipeline", "training", "sampling", "scoring", "serving", "benchmarks", "tests", "conftest",
                      *COMMANDS},
}
OURS = set(ALLOWED) | {"conftest"}
CHECK = "a check of texts alone starts without torch's networks"
SHARDED = "torch.distributed.checkpoint takes a second to load, and most runs are not sharded"
LATE = {  # imports of our own modules inside functions; they only save time when a program starts
    "moderate.py imports files.images": CHECK,
    "moderate.py imports files.run_folder": CHECK,
    "moderate.py imports pipeline.config": CHECK,
    "moderate.py imports pipeline.moderation": CHECK,
    "moderate.py imports safety.image": CHECK,
    "serve.py imports serving.start": "a wrong flag, and a library that is missing, are told without those libraries",
    "training/checkpoints/state.py imports training.checkpoints.sharded": SHARDED,
    "training/loop.py imports training.checkpoints.sharded": SHARDED,
}
SKIPPED = {"runs", "build", "dist"}


def python_files() -> list[Path]:
    """Every Python file of the project."""
    found = []
    for folder, names, files in os.walk(ROOT):
        names[:] = [name for name in names if not name.startswith(".") and name not in SKIPPED
                    and not name.endswith(".egg-info")]
        found += [Path(folder, name).relative_to(ROOT) for name in files if name.endswith(".py")]
    return sorted(found)


FILES = python_files()
PRODUCT = [path for path in FILES if path.parts[0] != "tests"]


def imported(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, also inside functions and by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = path.parent.parts[: len(path.parent.parts) - node.level + 1] if node.level else ()
            yield node.lineno, ".".join([*base, *([node.module] if node.module else [])])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def text(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def group(path: Path) -> str:
    """The room of the house that a file lies in: its top folder, or its own name at the top."""
    return path.parts[0] if len(path.parts) > 1 else path.stem


def forbidden(source: str, path: Path) -> list[str]:
    """The import edges of a file that the design does not have."""
    if group(path) not in ALLOWED:
        return [f"{path}: '{group(path)}' has no place in the direction of imports"]
    return [f"{path}:{line} imports {name}" for line, name in imported(ast.parse(source), path)
            if name.split(".")[0] in OURS and name.split(".")[0] not in ALLOWED[group(path)]]


def late(source: str) -> list[str]:
    """Our own modules that a file imports inside a function."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.Lambda))]
    return sorted({name for function in functions for _, name in imported(function, Path("x.py"))
                   if name.split(".")[0] in OURS})


def edges_of(sources: dict[str, str]) -> dict[str, set[str]]:
    """Which of the modules {dotted name: source} each of them imports, late imports included.

    ``from a import b`` counts as an edge to the module a.b where there is one, and to the package a otherwise.
    """
    edges: dict[str, set[str]] = {name: set() for name in sources}
    for name, source in sources.items():
        path = Path(name.replace(".", "/") + ".py")
        found = {target for _, target in imported(ast.parse(source), path)}
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        edges[name] = {target for target in found if target in sources and target != name}
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (strongly connected components of more than one; Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in edges[name]:
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            part = [stack.pop()]
            while part[-1] != name:
                part.append(stack.pop())
            if len(part) > 1:
                found.append(sorted(part))

    for name in edges:
        if name not in index:
            visit(name)
    return found


def test_imports_go_one_way():
    assert [edge for path in FILES for edge in forbidden(text(path), path)] == []


def test_there_is_no_circle_of_modules():
    """A package's __init__ may name what its modules offer, so it is no part of a circle."""
    sources = {".".join(path.with_suffix("").parts): text(path) for path in FILES if path.name != "__init__.py"}
    assert circles(edges_of(sources)) == []


def test_a_circle_is_caught_even_if_an_import_is_late():
    sources = {"data.a": "from data import b", "data.b": "import data.c",
               "data.c": "def f():\n    from data.a import x", "data.d": "from data.a import x"}
    assert circles(edges_of(sources)) == [["data.a", "data.b", "data.c"]]
    assert circles(edges_of(sources | {"data.c": "x = 1"})) == []


def test_late_imports_are_listed_with_their_reason():
    found = {f"{path} imports {name}" for path in PRODUCT if path.parts[0] != "benchmarks" for name in late(text(path))}
    assert found == set(LATE)
    assert all(len(reason) > 10 for reason in LATE.values())
    assert late("def f():\n    from data.a import x\n    import torch") == ["data.a"] and late("import data.a") == []


@pytest.mark.parametrize("path, source", [
    ("model/unet.py", "from diffusion.schedule import Schedule"),
    ("model/unet.py", "import training.loop as loop"),
    ("eval/scenes/reader.py", "def f():\n    from data.shapes.render import draw_scene"),
    ("data/samplers/deep.py", "if True:\n    import model"),
    ("diffusion/loss.py", "importlib.import_module('model.unet')"),
    ("safety/image.py", "__import__('eval.features')"),
    ("safety/__main__.py", "from pipeline.moderation import Moderation"),
    ("data/source.py", "from ..model import unet"),
    ("files/whole.py", "from data.strings import Strings"),
    ("pipeline/loading.py", "from training.experiment import load_experiment"),
    ("pipeline/system.py", "from sampling.draw import draw_latents"),
    ("sampling/draw.py", "from training.experiment import load_experiment"),
    ("training/loop.py", "from sampling.draw import draw_latents"),
    ("training/loop.py", "from scoring.shapes import scene_sections"),
    ("training/loop.py", "from train import main"),
    ("scoring/shapes.py", "from sampling.request import Request"),
    ("sample.py", "import train"),
    ("sample.py", "from serving.orders import Order"),
    ("serving/engine.py", "from training.experiment import load_experiment"),
    ("sampling/engine.py", "from serving.engine import Engine"),
    ("evaluate.py", "from benchmarks import speed"),
    ("benchmarks/speed.py", "from tests import conftest"),
    ("helpers/misc.py", "import os"),
])
def test_a_forbidden_edge_is_caught(path, source):
    assert len(forbidden(source, Path(path))) == 1


@pytest.mark.parametrize("path, source", [
    ("model/unet.py", "from model.blocks import ResBlock\nimport torch.nn as nn\nfrom . import attention"),
    ("training/loop.py", "from data.order import Order\nfrom training.ema import PowerEma"),
    ("training/run_stages.py", "from pipeline.system import TextToImage"),
    ("evaluate.py", "from pipeline import TextToImage\nfrom eval.frechet import frechet_distance"),
    ("benchmarks/speed.py", "import train"),
    ("serving/engine.py", "from sampling.engine import draw_samples"),
    ("tests/test_unet.py", "import train, sample, diffusers"),
])
def test_an_allowed_edge_is_not(path, source):
    assert forbidden(source, Path(path)) == []


def test_every_room_is_looked_at():
    assert {group(path) for path in FILES} >= set(ALLOWED) - {"conftest"}


PROBE_OF_PIPELINE = """
import json, sys
import pipeline
print(json.dumps(sorted(name for name in sys.modules if name.split(".")[0] in ("training", "sampling", "scoring"))))
"""


def test_drawing_does_not_know_training():
    """In a fresh process: importing the pipeline loads no module of training, sampling or scoring."""
    done = subprocess.run([sys.executable, "-c", PROBE_OF_PIPELINE], cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


# ---- libraries

LIGHT = {"fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client", "cachetools", "limits"}


def libraries() -> tuple[set[str], set[str]]:
    """(core, optional) libraries of setup.cfg, by the name they are imported under."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")

    def names(lines: str) -> set[str]:
        listed = [re.split(r"[\[>=<]", line)[0].strip() for line in lines.splitlines() if line.strip()]
        return {{"pyyaml": "yaml", "pillow": "PIL"}.get(name, name.replace("-", "_")) for name in listed}

    optional = {name for extra, lines in setup["options.extras_require"].items() for name in names(lines)
                if extra != "test"}
    return names(setup["options"]["install_requires"]), optional


def test_libraries_are_declared_and_optional_ones_are_imported_late():
    """But in serving/, which nobody imports who has not installed its libraries; of these Ray and Gradio are heavy."""
    core, optional = libraries()
    known = set(sys.stdlib_module_names) | OURS | core
    wrong = []
    for path in PRODUCT:
        tree = ast.parse(text(path))
        functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        inside = {edge for function in functions for edge in imported(function, path)}
        for line, name in imported(tree, path):
            top = name.split(".")[0]
            if top not in known | optional and path.parts[0] != "benchmarks":
                wrong.append(f"{path}:{line} imports {name}, which setup.cfg does not list")
            room = path.parts[0] == "benchmarks" or path.parts[0] == "serving" and top in LIGHT
            if top in optional and (line, name) not in inside and not room:
                wrong.append(f"{path}:{line} imports the optional {name} for everybody")
    assert wrong == []


# ---- sizes

def test_files_and_functions_are_short_enough_to_read():
    wrong = []
    for path in PRODUCT:
        lines = text(path).count("\n")
        if lines >= 400:
            wrong.append(f"{path} has {lines} lines")
        for node in ast.walk(ast.parse(text(path))):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines >= (120 if (str(path), node.name) == ("training/loop.py", "fit") else 60):
                    wrong.append(f"{path}: {node.name} has {lines} lines")
    assert wrong == []


def test_every_file_says_what_it_is():
    assert [str(path) for path in PRODUCT if not ast.get_docstring(ast.parse(text(path)))] == []


# ---- importing changes nothing

PROBE = """
import contextlib, importlib, io, json, locale, logging, os, random, signal, sys, threading, warnings
import numpy, torch
names, libraries = json.loads(sys.argv[1])
for name in libraries:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)

def state():
    return {
        "default dtype": str(torch.get_default_dtype()), "default device": str(torch.get_default_device()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()), "grad": torch.is_grad_enabled(),
        "torch generator": torch.get_rng_state().tolist(), "python generator": random.getstate(),
        "numpy generator": str(numpy.random.get_state()), "numpy errors": numpy.geterr(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        "speed": (torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32,
                  torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "print": str(torch._tensor_str.PRINT_OPTS), "environment": dict(os.environ), "folder": os.getcwd(),
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], "path": list(sys.path),
        "warnings": list(warnings.filters), "logging": (logging.root.level, list(logging.root.handlers)),
        "threads running": threading.active_count(), "locale": locale.setlocale(locale.LC_ALL),
        "recursion": sys.getrecursionlimit(), "hook": sys.excepthook,
    }

changes, before, said = [], state(), io.StringIO()
for name in names:
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        importlib.import_module(name)
    after = state()
    changes += [f"{name} changes {key}" for key in before if before[key] != after[key]]
    before = after
if said.getvalue():
    changes.append("a module prints: " + said.getvalue())
print(json.dumps(changes))
"""


def is_complete(path: Path) -> bool:
    """Whether the libraries that a file of serving/ needs are installed."""
    return path.parts[0] != "serving" or all(importlib.util.find_spec(name) for name in LIGHT)


def changes_of_importing(names: list[str], folder: Path) -> list[str]:
    """What importing the modules, found in ``folder``, changes; in a process of its own."""
    core, _ = libraries()
    used = {name for path in PRODUCT for _, name in imported(ast.parse(text(path)), path)
            if name.split(".")[0] in core | LIGHT}
    done = subprocess.run([sys.executable, "-c", PROBE, json.dumps([names, sorted(used)])], cwd=folder, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(folder)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_changes_nothing(tmp_path):
    """Also a self-check in the same process: made-up modules that do change something are named."""
    modules = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in PRODUCT if is_complete(path)]
    bad = {"bad_dtype": "import torch; torch.set_default_dtype(torch.float64)",
           "bad_draw": "import torch; torch.randn(1)", "bad_environment": "import os; os.environ['SET_HERE'] = '1'",
           "bad_print": "print('hello')"}
    for name, code in bad.items():
        (tmp_path / f"{name}.py").write_text(code)
    for module in modules:
        top = module.split(".")[0]
        if not (tmp_path / top).exists() and not (tmp_path / f"{top}.py").exists():
            source = ROOT / top if (ROOT / top).is_dir() else ROOT / f"{top}.py"
            (tmp_path / source.name).symlink_to(source)
    assert changes_of_importing(modules + list(bad), tmp_path) == [
        "bad_dtype changes default dtype", "bad_draw changes torch generator", "bad_environment changes environment",
        "a module prints: hello\n"]
