"""The page of serve.py in a real browser, with a real engine on a tiny system."""
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("gradio")
pytest.importorskip("httpx")
playwright = pytest.importorskip("playwright.sync_api")

from fastapi.testclient import TestClient  # noqa: E402
from made_up_moderation import HARMFUL, judged_run  # noqa: E402

from serving.cluster import application  # noqa: E402
from serving.engine import Engine  # noqa: E402
from serving.keys import new_key  # noqa: E402
from serving.settings import EngineSettings, ServiceSettings  # noqa: E402

ROOT = Path(__file__).parents[1]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BROWSER, reason="no Chromium here")]


@pytest.fixture(scope="module")
def run_folder(tiny_run, tmp_path_factory):
    return judged_run(tiny_run, tmp_path_factory.mktemp("judged"))


@pytest.fixture(scope="module")
def address(run_folder):
    """The address of a page."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "serve.py", "--page", "--run", str(run_folder), "--port", str(port), "--threads", "1"]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(url + "/health").read()
                break
            except OSError:
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        said = process.communicate(timeout=60)[0]
        assert "Traceback" not in said and "zebra" not in said, said


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    """The page, opened; nothing may be said on its console, and nothing fetched from elsewhere."""
    found = browser.new_page()
    said: list[str] = []
    found.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    found.on("pageerror", lambda error: said.append(str(error)))
    found.on("request", lambda request: said.append(request.url)
             if not request.url.startswith((address, "data:", "blob:")) else None)
    found.goto(address)
    found.wait_for_selector("#prompt textarea")
    yield found
    found.close()
    assert said == []


def expect_status(page, text: str) -> None:
    playwright.expect(page.locator("#status")).to_contain_text(text, timeout=60_000)


def test_it_draws_with_the_keyboard_and_shows_settings(page):
    page.locator("#prompt textarea").fill("a red star")
    page.keyboard.press("Enter")
    expect_status(page, "4 images.")
    assert page.locator("#images img").count() >= 4
    playwright.expect(page.locator("#settings")).to_contain_text("a red star")
    page.locator("#restart").click()
    playwright.expect(page.locator("#image img")).to_be_visible()
    page.locator("#draw").click()
    expect_status(page, "Drawing")
    expect_status(page, "4 images.")
    playwright.expect(page.locator("#settings")).to_contain_text("strength")


def test_it_refuses_in_plain_words(page):
    page.locator("#prompt textarea").fill(HARMFUL + " zebra")
    page.locator("#draw").click()
    expect_status(page, "Nothing was drawn. Refused:")
    page.locator("#prompt textarea").fill("")
    page.locator("#draw").click()
    expect_status(page, "This cannot be drawn. prompt:")


def test_it_cancels(page):
    page.get_by_text("More settings").click()
    page.locator("#steps input[type=number]").fill("150")
    page.locator("#exact input, label:has-text('Exact') input").first.check()
    page.locator("#count input[type=number]").fill("16")
    page.locator("#prompt textarea").fill("a star")
    page.locator("#draw").click()
    expect_status(page, "Drawing")
    page.locator("#cancel").click()
    expect_status(page, "Cancelled.")


def test_with_keys_it_asks_for_a_name_and_a_key(run_folder, tmp_path):
    path = str(tmp_path / "keys.yaml")
    key = new_key(path, "alice")
    app = application(Engine(EngineSettings(run=str(run_folder), threads=1)), ServiceSettings(keys=path, page=True))
    with TestClient(app) as client:
        assert client.get("/config").status_code == 401
        for name, secret, status in (("alice", "sk-no", 400), ("bob", key, 400), ("alice", key, 200)):
            assert client.post("/login", data={"username": name, "password": secret}).status_code == status
        assert client.get("/config").status_code == 200


def test_it_fits_a_phone_and_the_dark(browser, address):
    page = browser.new_page(viewport={"width": 375, "height": 700}, color_scheme="dark")
    page.goto(address)
    page.wait_for_selector("#prompt textarea")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.evaluate("document.body.classList.contains('dark')")
    page.close()
