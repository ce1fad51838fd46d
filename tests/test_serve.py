"""The command serve.py: flags that do not go together, libraries that are missing, keys, a run that is not there."""
import subprocess
import sys
from pathlib import Path

import pytest

import serve

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("arguments, message", [
    (["--host", "0.0.0.0"], "--host 0.0.0.0 without --keys; valid: a loopback address"),
    (["--host", "example.org"], "without --keys"), (["--host", "::"], "without --keys"),
    (["--new-key", "alice"], "--new-key without --keys; valid: both"),
    (["--replicas", "0"], "--replicas 0; valid: 1 to 1000"), (["--port", "0"], "--port 0; valid: 1 to 65535")])
def test_flags_that_do_not_go_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        serve.check(serve.parser().parse_args(arguments))


@pytest.mark.parametrize("arguments, missing, said", [
    ([], "fastapi", r'fastapi is not installed; valid: pip install -e "\.\[serve\]"'),
    (["--page"], "gradio", r'gradio is not installed; valid: pip install -e "\.\[page\]"'),
    (["--replicas", "2"], "ray", r'ray is not installed; valid: pip install -e "\.\[serve\]"')])
def test_a_library_that_is_missing_is_named(arguments, missing, said, monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == missing else True)
    with pytest.raises(ValueError, match=said):
        serve.main(arguments)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
def test_loopback_needs_no_key(host, monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: True)
    serve.check(serve.parser().parse_args(["--host", host]))


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "serve.py", *arguments], cwd=ROOT, text=True, capture_output=True)


def test_what_is_wrong_is_one_line(tmp_path):
    for library in ("fastapi", "uvicorn", "prometheus_client", "limits", "cachetools"):
        pytest.importorskip(library)
    done = run("--run", str(tmp_path / "none"))
    assert done.returncode and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    made = run("--new-key", "alice", "--keys", str(tmp_path / "keys.yaml"))
    assert made.returncode == 0 and made.stdout.startswith("sk-")
    assert made.stdout.strip() not in (tmp_path / "keys.yaml").read_text()
    again = run("--new-key", "alice", "--keys", str(tmp_path / "keys.yaml"))
    assert again.returncode and "Traceback" not in again.stderr
