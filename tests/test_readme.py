"""What the documents say about files, commands, flags, links and lines of code is true."""
import argparse
import ast
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion.schedule import Schedule
from training.experiment import load_experiment

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = (ROOT / "docs" / "tree.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
UNLISTED = {"build", "dist", "runs", "__pycache__"}  # what work leaves behind
CLOSED = {"docs/", "weights/", "tests/"}  # their files have no line of their own: pages have the table of the README
LISTED = re.compile(r"[\w./-]+\.(?:py|yaml|md|cfg|toml|json|safetensors)|[\w-]+/|Makefile|LICENSE")


def blocks(text: str, kind: str) -> list[str]:
    """The fenced blocks of a kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


# ---- the tree

def tree_of(block: str) -> dict[str, set[str]]:
    """{folder: names listed in it}; "" is the top. Two spaces a level, and a line for each name: "name  what it is"."""
    listed: dict[str, set[str]] = {"": set()}
    folders: list[str] = []
    for line in block.splitlines():
        depth, (name, *about) = (len(line) - len(line.lstrip())) // 2, line.split(maxsplit=1)
        assert LISTED.fullmatch(name) and about, f"not a file or folder and what it is: {line}"
        where = "".join(folders[:depth])
        assert name not in listed.setdefault(where, set()), f"{where}{name} is listed twice"
        listed[where].add(name)
        if name.endswith("/"):
            folders[depth:] = [name]
            listed.setdefault("".join(folders), set())
    return listed


def there(folder: str) -> set[str]:
    """Files and folders that exist in a folder of the project; `__init__.py` and hidden names are not worth a line."""
    return {path.name + "/" * path.is_dir() for path in (ROOT / folder).iterdir()
            if not path.name.startswith((".", "__")) and path.name not in UNLISTED
            and not path.name.endswith(".egg-info") and path.suffix != ".pyc"
            and (path.is_file() or any(inside.suffix != ".pyc" for inside in path.rglob("*") if inside.is_file()))}


def wrong_in_tree(block: str) -> list[str]:
    """Names that are listed and do not exist, and names that exist and are not listed."""
    found = []
    for folder, names in tree_of(block).items():
        exist = there(folder) if (ROOT / folder).is_dir() and folder not in CLOSED else set()
        found += [f"{folder}{name} is listed and does not exist" for name in sorted(names - exist)]
        found += [f"{folder}{name} is not listed" for name in sorted(exist - names)]
    return found


def wrong_folders(block: str) -> list[str]:
    """Folders and commands of the top that a list names wrongly or leaves out."""
    listed = tree_of(block)[""]
    exist = {name for name in there("") if name.endswith(("/", ".py"))}
    return sorted(f"{name} is listed and does not exist" for name in listed - exist) + \
        sorted(f"{name} is not listed" for name in exist - listed)


def test_the_tree_is_what_exists():
    [block] = blocks(TREE, "text")
    assert wrong_in_tree(block) == []


def test_the_folders_of_the_readme_are_what_exists():
    [block] = blocks(README, "text")
    assert wrong_folders(block) == []
    assert wrong_folders(block.replace("files/ ", "ground/ ")) == [
        "ground/ is listed and does not exist", "files/ is not listed"]


def test_a_wrong_tree_is_caught():
    [block] = blocks(TREE, "text")
    assert wrong_in_tree(block.replace("  loop.py ", "  loops.py ")) == [
        "training/loops.py is listed and does not exist", "training/loop.py is not listed"]
    assert wrong_in_tree(block + "nothing/  none\n  a.py  none\n") == [
        "nothing/ is listed and does not exist", "nothing/a.py is listed and does not exist"]
    assert wrong_in_tree(re.sub(r"    ddim.py .*\n", "", block)) == ["diffusion/samplers/ddim.py is not listed"]
    with pytest.raises(AssertionError, match="what it is"):
        tree_of(block.replace("  README.md", "README.md") + "a.py\n")


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_the_figures_of_the_demo_are_the_same_everywhere():
    """README, docs/shapes.md and the header of configs/shapes.yaml are written from the same run."""
    marked = [re.search(r"<!-- figures of the demo.*?-->(.*?)<!-- end of the figures -->", text, re.DOTALL)[1]
              for text in (README, (ROOT / "docs" / "shapes.md").read_text(encoding="utf-8"))]
    header = (ROOT / "configs" / "shapes.yaml").read_text(encoding="utf-8").partition("name:")[0]
    readme, page, config = (set(re.findall(r"\d+ min \d+ s|\d+ %", text)) for text in (*marked, header))
    assert len(config) > 5 and readme | config <= page


# ---- commands

def commands(text: str) -> list[list[str]]:
    """Every command of the shell blocks and of inline code, as words."""
    lines = [line for block in blocks(text, "(?:sh|bash|console)") for line in block.splitlines()]
    lines += re.findall(r"`((?:make|python) [^`]+)`", text)
    lines = [re.sub(r"^\s*\$ ", "", line) for line in lines]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][\w-]*):", text, re.MULTILINE))


def parsed(module: str, arguments: list[str], monkeypatch) -> argparse.Namespace:
    """What the parser of a module makes of the arguments, without running it; ends in SystemExit for a wrong flag."""
    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        raise Parsed(parse(self, args, namespace))

    main = importlib.import_module(module).main
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(Parsed) as caught:
            main(arguments) if inspect.signature(main).parameters else main()
    return caught.value.args[0]


def check(words: list[str], monkeypatch) -> None:
    """Raise unless a command names what exists."""
    if words[0] == "make":
        names = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        assert set(names) <= targets(), f"no such target: {words}"
    elif words[0] == "python":
        module, arguments = (words[2], words[3:]) if words[1] == "-m" else (words[1].removesuffix(".py"), words[2:])
        if module == "pytest":
            assert all((ROOT / word).exists() for word in arguments if not word.startswith("-")), words
            return
        if (ROOT / module.replace(".", "/") / "__main__.py").is_file():
            module += ".__main__"
        path = ROOT / (module.replace(".", "/") + ".py")
        assert path.is_file(), f"no such file: {words}"
        options = parsed(module, arguments, monkeypatch)
        if module == "train":
            load_experiment(ROOT / options.config, [text for text in options.overrides if not text.startswith("run=")])
    else:
        known = ("source", "cd", "pip", "git", "npm", "mkdir", "cp", "diff", "torchrun", "curl", "ray", "serve")
        assert words[0] in known, f"not checked: {words}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_what_exists(page, monkeypatch, capsys):
    for words in commands(page.read_text(encoding="utf-8")):
        if not any(re.fullmatch(r"[A-Z]+|.*\b(DIR|FILE|NAME)\b.*|\.\.\.", word) for word in words):  # placeholders
            try:
                check(words, monkeypatch)
            except ModuleNotFoundError as error:  # of an extra that is not installed
                if error.name not in ("httpx", "ray", "gradio", "fastapi"):
                    raise


def test_the_readme_shows_every_command(monkeypatch):
    shown = {words[1] if words[0] == "python" else " ".join(words[:2]) for words in commands(README)}
    assert {"train.py", "sample.py", "evaluate.py", "moderate.py", "make demo", "make test", "make check"} <= shown
    said = subprocess.run(["make", "help"], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    assert set(re.findall(r"make (\w+)", said)) <= targets()


@pytest.mark.parametrize("command", ["make demos", "python trane.py configs/shapes.yaml", "python sample.py a --foo 3",
                                     "python train.py configs/shape.yaml", "python train.py configs/shapes.yaml a.b=3",
                                     "python evaluate.py", "python -m data.emojis --out x", "rm -rf x"])
def test_a_wrong_command_is_caught(command, monkeypatch, capsys):
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check(shlex.split(command), monkeypatch)


# ---- links and names

def anchors(text: str) -> set[str]:
    """The anchors GitHub makes of the headings."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken_links(text: str, folder: Path) -> list[str]:
    """Relative links of a page that lead nowhere; links to the web are not followed."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'(?:src|href)="([^"]+)"', prose):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        path = (folder / file) if file else None
        if path is not None and not path.exists():
            broken.append(link)
        elif anchor and anchor not in anchors(path.read_text(encoding="utf-8") if path else text):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    assert broken_links(page.read_text(encoding="utf-8"), page.parent) == []


def test_a_broken_link_is_caught():
    text = "# A title\n[a](LICENSE) [b](docs/none.md) [c](#a-title) [d](#none) ![e](x.png) [f](https://example.org/x)"
    assert broken_links(text, ROOT) == ["docs/none.md", "#none", "x.png"]


def test_every_page_is_linked_from_the_readme():
    assert [page.name for page in PAGES[1:] if f"]({page.relative_to(ROOT)})" not in README] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_the_text_exist(page):
    """`training/loop.py` and the like, in inline code; what a run writes is not a file of the project."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    named = {word for code in re.findall(r"`([^`\n]+)`", prose) for word in code.split()
             if re.fullmatch(r"[\w/-]+\.(py|yaml|md)|(\w+/)+", word) and not word.startswith("runs/")}
    written = {"config.yaml", "concepts.yaml", "concepts_1.yaml", "ATTRIBUTION.md", "state/", "samples/", "cache/",
               "report/", "report_1/", "report/cache/", "report/figures.md"}  # by runs and builds
    missing = {name for name in named - written if not (ROOT / name).exists() and not (page.parent / name).exists()}
    assert {name for name in missing if not list(ROOT.glob(f"[!.]*/**/{name}"))} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_import_what_exists(page):
    """The imports of the blocks of Python; optional libraries may be missing."""
    code = "\n".join(blocks(page.read_text(encoding="utf-8"), "python"))
    for module, names in re.findall(r"^from ([\w.]+) import ([\w, ]+)$", code, re.MULTILINE):
        if (ROOT / module.split(".")[0]).exists():
            found = importlib.import_module(module)
            assert [name for name in names.split(", ") if not hasattr(found, name)] == [], module


# ---- the product speaks of itself, not of the machine it was made on

MACHINE = re.compile(r"(?<![\w.~-])/(?:work|root|home|Users|mnt|tmp)/|\bshared/|\.pyenv|site-packages")


def texts() -> list[Path]:
    """Every text file of the project but this one."""
    kinds = (".py", ".md", ".yaml", ".cfg", ".toml", "")
    tops = [ROOT / name for name in there("")]
    found = [path for top in tops for path in ([top] if top.is_file() else top.rglob("*"))]
    return [path for path in found if path.is_file() and path.suffix in kinds and path != Path(__file__)]


def test_no_path_of_a_machine():
    found = texts()
    assert {"README.md", "train.py", "Makefile", "setup.cfg"} <= {path.name for path in found}
    wrong = [f"{path.relative_to(ROOT)}:{number}: {line.strip()}" for path in found
             for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if MACHINE.search(line)]
    assert wrong == []
    assert MACHINE.search("see /home/a/b") and MACHINE.search("in shared/x.md") and not MACHINE.search("a/root/b")


# ---- quoted lines

def quotations(text: str) -> list[tuple[str, str, list[str]]]:
    """(file, function, lines) of every block of Python that opens with "# file.py: function"."""
    found = []
    for block in blocks(text, "python"):
        opening, *lines = block.splitlines()
        where = re.fullmatch(r"# ([\w/]+\.py): (\w+)", opening)
        assert where, f"a quotation that does not say where it stands: {opening}"
        found.append((where[1], where[2], [line for line in lines if line.strip()]))
    return found


def source_of(file: str, function: str) -> list[str]:
    """The lines of a function of a file, those of functions inside it included."""
    text = (ROOT / file).read_text(encoding="utf-8")
    [node] = [node for node in ast.walk(ast.parse(text))
              if isinstance(node, ast.FunctionDef) and node.name == function]
    return text.splitlines()[node.lineno - 1:node.end_lineno]


def misquoted(file: str, function: str, lines: list[str]) -> list[str]:
    """Quoted lines that do not stand in the function, in this order and indented alike, one directly below the other
    unless "..." is between them; blank lines and comments that have a line of their own do not count."""
    code = [line for line in source_of(file, function) if line.strip() and not line.strip().startswith("#")]
    indents, place, gap = set(), 0, True
    for line in lines:
        if line.strip() == "...":
            gap = True
            continue
        reach = [other.strip() for other in (code[place:] if gap else code[place:place + 1])]
        if line.strip() not in reach:
            return [line]
        place += reach.index(line.strip()) + 1
        gap = False
        indents.add(code[place - 1].removesuffix(line))
    return [] if len(indents) == 1 else ["indented otherwise"]


STEPS = (ROOT / "docs" / "one_step.md").read_text(encoding="utf-8")


def test_quoted_lines_stand_where_the_page_says():
    found = quotations(STEPS)
    assert len(found) > 10
    assert {f"{file}: {function}": wrong for file, function, lines in found
            if (wrong := misquoted(file, function, lines))} == {}


def test_a_wrong_quotation_is_caught():
    file, function, lines = quotations(STEPS)[0]
    assert misquoted(file, function, [*lines, "step = step + 2"]) == ["step = step + 2"]
    assert misquoted(file, function, lines[::-1]) != []
    assert misquoted(file, function, [line.strip() for line in lines]) == ["indented otherwise"]
    assert misquoted(file, function, [line for line in lines if line.strip() != "..."]) != []
    with pytest.raises(AssertionError, match="does not say where"):
        quotations("```python\nx = 1\n```\n")


def test_a_training_step_is_read_in_two_files_beside_its_formula_and_a_sampling_step_in_three():
    training, sampling = (STEPS.partition(f"## {title}\n")[2].partition("\n## ")[0]
                          for title in ("One training step", "One sampling step"))
    assert {file for file, *_ in quotations(training)} == {
        "training/loop.py", "training/stages/denoiser.py", "diffusion/loss.py"}
    assert {file for file, *_ in quotations(sampling)} == {
        "pipeline/system.py", "diffusion/guidance.py", "diffusion/samplers/ddim.py"}


def test_the_sizes_of_the_page_are_those_of_the_demo():
    demo = load_experiment(ROOT / "configs" / "shapes.yaml")
    channels, height, width = demo.latent_shape
    rows = dict(re.findall(r"^\| ([A-Z, ]+) \|.*\| (?:up to )?([\d, ]+) \|$", STEPS, re.MULTILINE))
    assert rows == {"B": str(demo.denoiser.train.batch), "C, H, W": f"{channels}, {height}, {width}",
                    "L": str(demo.tokenizer.length), "D": str(demo.denoiser.text_encoder.width),
                    "T": str(demo.denoiser.schedule.steps)}
    times = Schedule(demo.denoiser.schedule).timesteps(demo.sampling.steps, demo.sampling.spacing)
    assert (len(times), times[0], times[1], times[-1]) == (10, 999, 899, 99)
