"""The direction of imports, the size of files and functions, and that importing a module changes nothing global."""
import ast
import configparser
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = ("model", "diffusion", "data", "eval", "safety")  # know themselves and libraries, nothing else
COMMANDS = ("train", "sample", "evaluate")
BELOW = {"pipeline", "moderation", "prompts", "training", *LEAVES}  # what commands are made of
ALLOWED = {
    **{leaf: {leaf} for leaf in LEAVES},
    "training": {"training", *LEAVES},
    "prompts": set(),
    "moderation": {"prompts", "training", *LEAVES},
    "pipeline": {"moderation", "prompts", "training", *LEAVES},
    "sampling": {"sampling", *BELOW},
    "evaluation": {"evaluation", *BELOW},
    **{command: {"sampling", "evaluation", *BELOW} for command in (*COMMANDS, "commands")},
    "benchmarks": {"benchmarks", "sampling", "evaluation", *BELOW, *COMMANDS},
    "tests": {"tests", "conftest", "benchmarks", "sampling", "evaluation", *BELOW, *COMMANDS},
}
OURS = set(ALLOWED) - {"commands"}
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
    """The box of the design a file lies in: its folder, or its name at the top."""
    if path.parts[-1] == "__main__.py":  # what `python -m safety` runs is a command that lies beside its package
        return "commands"
    return path.parts[0] if len(path.parts) > 1 else path.stem


def forbidden(source: str, path: Path) -> list[str]:
    """The import edges of a file that the design does not have."""
    if group(path) not in ALLOWED:
        return [f"{path}: '{group(path)}' has no place in the direction of imports"]
    return [f"{path}:{line} imports {name}" for line, name in imported(ast.parse(source), path)
            if name.split(".")[0] in OURS and name.split(".")[0] not in ALLOWED[group(path)]]


def test_imports_go_one_way():
    assert [edge for path in FILES for edge in forbidden(text(path), path)] == []


@pytest.mark.parametrize("path, source", [
    ("model/unet.py", "from diffusion.schedule import Schedule"),
    ("model/unet.py", "import training.loop as loop"),
    ("eval/scenes.py", "def f():\n    from data.shapes import Shapes"),
    ("data/samplers/deep.py", "if True:\n    import model"),
    ("diffusion/loss.py", "importlib.import_module('model.unet')"),
    ("safety/image.py", "__import__('eval.features')"),
    ("data/source.py", "from ..model import unet"),
    ("training/loop.py", "import pipeline"),
    ("training/loop.py", "from train import main"),
    ("pipeline.py", "from sample import main"),
    ("pipeline.py", "from sampling.draw import drawn"),
    ("prompts.py", "from data.tokenizer import Tokenizer"),
    ("moderation.py", "from pipeline import TextToImage"),
    ("safety/gate.py", "from moderation import Moderation"),
    ("sample.py", "import train"),
    ("evaluate.py", "from benchmarks import speed"),
    ("benchmarks/speed.py", "from tests import conftest"),
    ("helpers/misc.py", "import os"),
])
def test_a_forbidden_edge_is_caught(path, source):
    assert len(forbidden(source, Path(path))) == 1


@pytest.mark.parametrize("path, source", [
    ("model/unet.py", "from model.blocks import ResBlock\nimport torch.nn as nn\nfrom . import attention"),
    ("training/loop.py", "from data.order import Order\nfrom training.ema import PowerEma"),
    ("evaluate.py", "from pipeline import TextToImage\nfrom eval.frechet import frechet_distance"),
    ("benchmarks/speed.py", "import train"),
    ("tests/test_unet.py", "import train, sample, diffusers"),
])
def test_an_allowed_edge_is_not(path, source):
    assert forbidden(source, Path(path)) == []


def test_every_leaf_and_command_is_looked_at():
    assert {group(path) for path in FILES} >= {"model", "diffusion", "data", "eval", "training", "pipeline", "train",
                                               "sample", "tests", "safety"}


# ---- libraries

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
    core, optional = libraries()
    known = set(sys.stdlib_module_names) | OURS | core
    wrong = []
    for path in PRODUCT:
        tree = ast.parse(text(path))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        inside = {edge for function in functions for edge in imported(function, path)}
        for line, name in imported(tree, path):
            top = name.split(".")[0]
            if top not in known | optional and path.parts[0] != "benchmarks":
                wrong.append(f"{path}:{line} imports {name}, which setup.cfg does not list")
            if top in optional and (line, name) not in inside and path.parts[0] != "benchmarks":
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


def changes_of_importing(names: list[str], folder: Path) -> list[str]:
    """What importing the modules, found in ``folder``, changes; in a process of its own."""
    core, _ = libraries()
    used = {name for path in PRODUCT for _, name in imported(ast.parse(text(path)), path)
            if name.split(".")[0] in core}
    done = subprocess.run([sys.executable, "-c", PROBE, json.dumps([names, sorted(used)])], cwd=folder, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(folder)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_changes_nothing(tmp_path):
    """Also a self-check in the same process: made-up modules that do change something are named."""
    modules = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in PRODUCT]
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
