"""Pages of results in a real browser: opened from disk without a network, every image is drawn and nothing is said
on the console. Runs where Chromium is installed (Debian: the package chromium)."""
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PAGES = sorted((ROOT / "docs" / "results").glob("*/index.html"))
PROBE = """<script>addEventListener("load", () => {
const images = [...document.images], root = document.documentElement;
root.dataset.images = images.length;
root.dataset.broken = images.filter(image => !image.complete || image.naturalWidth === 0).length;
root.dataset.wide = root.scrollWidth > root.clientWidth; })</script>"""


def opened(page: Path, profile: Path) -> tuple[dict[str, str], str]:
    """(what the probe found on a page, what the browser said on its console)."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               "--window-size=1280,900", f"--user-data-dir={profile}", "--enable-logging=stderr",
               "--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = dict(re.findall(r'data-(images|broken|wide)="(\w+)"', done.stdout[:400]))
    return found, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def probed(folder: Path, to: Path) -> Path:
    """A copy of a page's folder whose page looks at itself."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("cache"))
    page = to / "index.html"
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    assert PROBE in page.read_text(encoding="utf-8")
    return page


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
@pytest.mark.parametrize("page", PAGES, ids=[page.parent.name for page in PAGES])
def test_a_page_of_results_is_whole_in_a_browser(page, tmp_path):
    found, console = opened(probed(page.parent, tmp_path / "page"), tmp_path / "profile")
    assert int(found["images"]) > 20 and found["broken"] == "0" and found["wide"] == "false"
    assert console == ""


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
def test_a_broken_page_is_seen(tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "index.html").write_text('<html><body><img src="gone.png"><script>console.error("no")</script></body>'
                                       "</html>")
    found, console = opened(probed(folder, tmp_path / "page"), tmp_path / "profile")
    assert found["broken"] == "1" and "no" in console


def test_there_are_pages_of_both_models():
    assert [page.parent.name for page in PAGES] == ["emoji-64", "shapes"]
