"""Builds the emoji data set from six npm packages: a folder with one memory-mapped array and a table of its items.

Five packages hold the same emoji in five styles, as SVG under English names; the sixth has labels, tags and groups by
Unicode code point. The code points align the names of the packages: `waving-hand-dark` of fluent is
`waving-hand-dark-skin-tone` elsewhere. Only Unicode emoji are kept, so that every image has a label and tags.

The folder holds images.npy (N, 4, S, S) uint8 RGBA with colours premultiplied by alpha, items.jsonl (N lines),
manifest.json and ATTRIBUTION.md. Axis letters: N images, S side of an image.
"""

import base64
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import tarfile
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image
from tqdm import tqdm

from files.whole import sha256_of

FORMAT = 1  # of the folder: a folder of another format is refused, a partial build of another format dropped
CHUNK = 128  # images that are rendered between two saves of an interruptible build
TONE = re.compile(r"-(medium-light|medium-dark|medium|light|dark)-skin-tone")
MIRRORED = "-facing-right"


@dataclass(frozen=True)
class Package:
    """One npm package: its origin, the hash that it must have, and its licence and credit."""

    name: str
    version: str
    integrity: str  # as npm writes it: sha512-BASE64 of the .tgz
    style: str  # "" for the package of labels and tags
    licence: str
    credit: str
    chars_from: str = ""  # style whose chars.json (code point -> name) serves this one too

    @property
    def file(self) -> str:
        """The name of the file that `npm pack` writes."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = (
    Package("@iconify-json/noto", "1.2.9",
            "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
            "noto", "Apache-2.0", "Noto Emoji by Google, https://github.com/googlefonts/noto-emoji"),
    Package("@iconify-json/twemoji", "1.2.5",
            "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
            "twemoji", "CC-BY-4.0", "Twitter Emoji by Twitter, https://github.com/twitter/twemoji"),
    Package("@iconify-json/openmoji", "1.2.29",
            "sha512-vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
            "openmoji", "CC-BY-SA-4.0", "OpenMoji, the open-source emoji and icon project, https://openmoji.org"),
    Package("@iconify-json/fluent-emoji", "1.2.7",
            "sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
            "fluent", "MIT", "Fluent Emoji by Microsoft, https://github.com/microsoft/fluentui-emoji", "flat"),
    Package("@iconify-json/fluent-emoji-flat", "1.2.6",
            "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
            "flat", "MIT", "Fluent Emoji Flat by Microsoft, https://github.com/microsoft/fluentui-emoji"),
    Package("emojibase-data", "17.0.0",
            "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
            "", "MIT", "emojibase by Miles Johnson, https://emojibase.dev (labels, tags and groups)"),
)


def integrity(path: Path) -> str:
    """The integrity string of a file as npm writes it: "sha512-" and the base64 of the digest."""
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def fetch(package: Package, folder: Path) -> Path:
    """The path of the package's .tgz in `folder`, fetched with `npm pack` if it is missing.

    Raises FileNotFoundError if npm is missing, and ValueError if npm fails.
    """
    path = folder / package.file
    if path.exists() and integrity(path) != package.integrity:
        path.unlink()  # an interrupted download
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.which("npm") is None:
            raise FileNotFoundError("npm was not found; install Node.js, or give a folder that holds the .tgz files "
                                    f"({package.file}, ...) with --packages DIR")
        spec = f"{package.name}@{package.version}"
        done = subprocess.run(["npm", "pack", spec, "--silent", "--pack-destination", str(folder)],
                              capture_output=True, text=True)
        if done.returncode or not path.exists():
            lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
            raise ValueError(f"npm pack {spec} failed: {lines[0]}")
    return path


def check(package: Package, path: Path) -> None:
    """Raise FileNotFoundError for a missing package, ValueError for one that is not the pinned file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; get it with `npm pack {package.name}@{package.version}`, "
                                "or leave --packages out to have it fetched")
    found = integrity(path)
    if found != package.integrity:
        raise ValueError(f"{path} is not {package.name}@{package.version}: its hash is {found[:23]}..., "
                         f"expected {package.integrity[:23]}...; delete it and fetch it again")


def read_json(path: Path, member: str) -> Any:
    """The JSON file `package/MEMBER` of a .tgz. Raises ValueError if the archive or the file cannot be read."""
    try:
        with tarfile.open(path, "r:gz") as archive:
            handle = archive.extractfile(f"package/{member}")
            if handle is None:
                raise KeyError(member)
            return json.load(handle)
    except (tarfile.TarError, EOFError, zlib.error, KeyError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: cannot read {member} in it ({reason}); fetch the package again") from None


def slug(label: str) -> str:
    """A label as an icon name: `keycap: *` -> `keycap-asterisk`, `woman: red hair` -> `woman-red-hair`."""
    text = label.lower().replace("*", "asterisk").replace("#", "hash").replace("'", "").replace("\u2019", "")
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def _code(hexcode: str) -> str:
    """Code points without the presentation selector, which the packages use inconsistently."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def labels(path: Path) -> dict[str, dict]:
    """Code point -> {"label", "tags", "group", "subgroup"} of all Unicode emoji, including skin tones."""
    messages = read_json(path, "en/messages.json")
    groups = {entry["order"]: entry["message"] for entry in messages["groups"]}
    subgroups = {entry["order"]: entry["message"] for entry in messages["subgroups"]}
    table = {}
    for entry in read_json(path, "en/data.json"):
        for emoji in [entry, *entry.get("skins", [])]:
            table[_code(emoji["hexcode"])] = {
                "label": emoji["label"], "tags": emoji.get("tags", entry.get("tags", [])),
                "group": groups.get(entry.get("group"), "other"),
                "subgroup": subgroups.get(entry.get("subgroup"), "other")}
    return table


def svg(icon: dict, icons: dict) -> str:
    """A complete SVG document of an icon, with its box padded to a centred square."""
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    side = max(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {side} {side}" width="{side}" height="{side}">{icon["body"]}</svg>')


def collect(packages: Sequence[Package], folder: Path) -> Iterator[tuple[dict, str]]:
    """(item, SVG) of every Unicode emoji in every style: styles in the order of `packages`, names sorted."""
    path = {package.style: folder / package.file for package in packages}
    known = labels(path[""])
    for package in packages:
        if not package.style:
            continue
        codes: dict[str, list[str]] = {}
        for code, name in read_json(path[package.chars_from or package.style], "chars.json").items():
            codes.setdefault(name, []).append(_code(code))
        icons = read_json(path[package.style], "icons.json")
        seen = set()
        for icon_name, icon in sorted(icons["icons"].items()):
            entry = next((known[code] for code in codes.get(icon_name, []) if code in known), None)
            if entry is None or icon.get("hidden"):  # hidden: an abandoned name of an icon that has another one
                continue
            name = slug(entry["label"])
            if name in seen:
                continue
            seen.add(name)
            item = {"id": f"{package.style}/{name}", "name": name, "base": TONE.sub("", name).removesuffix(MIRRORED),
                    "tone": " ".join(TONE.findall(name)), "style": package.style, **entry,
                    "licence": package.licence}
            yield item, svg(icon, icons)


def render(document: str, size: int) -> np.ndarray:
    """An SVG document as uint8 RGBA (4, size, size), premultiplied by alpha as `over` and `resize` expect it."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=document, width=size, height=size, skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png))) as drawing:
        rgba = np.asarray(drawing.convert("RGBA")).astype(np.uint16)  # (S, S, 4), straight alpha
    alpha = rgba[..., 3:]
    premultiplied = np.concatenate([(rgba[..., :3] * alpha + 127) // 255, alpha], axis=-1)
    return np.ascontiguousarray(rearrange(premultiplied.astype(np.uint8), "h w c -> c h w"))  # (4, S, S)


def _render_chunk(job: tuple[list[tuple[str, str]], int, Path]) -> int:
    """Render one chunk of (id, SVG) and save it whole or not at all; returns the number of images."""
    documents, size, path = job
    drawings = []
    for name, document in documents:
        try:
            drawings.append(render(document, size))
        except (ValueError, OSError) as error:
            raise ValueError(f"{name}: the SVG cannot be drawn ({error})") from None
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as handle:
        np.save(handle, np.stack(drawings))
    os.replace(temporary, path)
    return len(drawings)


def _render_all(documents: list[tuple[str, str]], size: int, folder: Path, workers: int) -> list[Path]:
    """The chunk files of all images, in order; chunks that an interrupted build has saved are not rendered again."""
    spans = range(0, len(documents), CHUNK)
    paths = [folder / f"chunk-{start:06d}.npy" for start in spans]
    jobs = [(documents[start:start + CHUNK], size, path) for start, path in zip(spans, paths) if not path.exists()]
    there = len(documents) - sum(len(job[0]) for job in jobs)
    with tqdm(total=len(documents), initial=there, desc=f"emoji at {size} px", unit="image") as bar:
        workers = min(workers, len(jobs))
        if workers <= 1:
            for job in jobs:
                bar.update(_render_chunk(job))
        else:
            # Ctrl-C reaches every process of a terminal; only this one should answer it.
            ignore = (signal.SIGINT, signal.SIG_IGN)
            with multiprocessing.get_context("spawn").Pool(workers, signal.signal, ignore) as pool:
                for count in pool.imap_unordered(_render_chunk, jobs):
                    bar.update(count)
    return paths


def _write_images(items: list[dict], chunks: list[Path], path: Path) -> list[dict]:
    """Write the array without empty images and without repeated drawings of a style; returns the items kept.

    A drawing that one style uses under two names could be in two splits. It is kept under its shortest name.
    """
    digests, measured = [], []
    for chunk in chunks:
        for drawing in np.load(chunk):  # (4, S, S)
            digests.append(hashlib.sha256(drawing.tobytes()).digest())
            alpha = drawing[3].sum(dtype=np.int64)
            measured.append([] if not alpha else [int(c.sum(dtype=np.int64) * 255 // alpha) for c in drawing[:3]])
    first: dict[tuple[str, bytes], int] = {}
    for i in sorted(range(len(items)), key=lambda i: (len(items[i]["name"]), items[i]["name"])):
        first.setdefault((items[i]["style"], digests[i]), i)
    kept = sorted(i for i in first.values() if measured[i])
    size = np.load(chunks[0], mmap_mode="r").shape[-1]
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(kept), 4, size, size))
    row, wanted, start = 0, set(kept), 0
    for chunk in chunks:
        drawings = np.load(chunk)
        for k, drawing in enumerate(drawings):
            if start + k in wanted:
                images[row] = drawing
                row += 1
        start += len(drawings)
    images.flush()
    return [{**items[i], "rgb": measured[i]} for i in kept]


def _attribution(packages: Sequence[Package]) -> str:
    lines = ["# Attribution", "", "The images of this folder were drawn from these packages, resized and unchanged "
             "otherwise. Pass this page on with them and with images made of them.", "",
             "| style | package | licence | by |", "|---|---|---|---|"]
    lines += [f"| {p.style or '(labels)'} | {p.name} {p.version} | {p.licence} | {p.credit} |" for p in packages]
    return "\n".join(lines) + "\n"


def build(out: Path | str, size: int = 64, packages_dir: Path | str | None = None,
          packages: Sequence[Package] = PACKAGES, workers: int | None = None) -> dict:
    """Write the data set to the folder `out`, whole or not at all, and return its manifest.

    The work is done in `out` + ".partial", where an interrupted build continues with its finished chunks; a partial
    build of other packages or of another size is dropped. An `out` that holds the same data set is left unchanged, and
    one that holds another is refused.

    Raises ValueError or FileNotFoundError for a missing or wrong package, a missing npm or a missing resvg-py, before
    anything is rendered.
    """
    out = Path(out)
    if not 8 <= size <= 1024:
        raise ValueError(f"size: {size}; valid: 8 to 1024")
    try:
        import resvg_py
    except ImportError:
        raise ValueError("resvg-py, which draws the emoji, is not installed; `pip install resvg-py`") from None
    plan = {"format": FORMAT, "size": size, "alpha": "premultiplied", "resvg": resvg_py.__version__,
            "packages": {p.name: {"version": p.version, "integrity": p.integrity} for p in packages}}
    partial = out.with_name(out.name + ".partial")
    _refuse_strange(out)
    manifest_path = out / "manifest.json"
    if manifest_path.exists():
        there = json.loads(manifest_path.read_text())
        same = {key: there.get(key) for key in plan} == plan
        if same and (out / "images.npy").exists():
            return there
        if not same:
            raise ValueError(f"{out} holds a data set of {there.get('size')} px from other packages or settings, which "
                             "is not written over; valid: --out with another folder, or remove it")
    folder = Path(packages_dir) if packages_dir is not None else partial.with_name(out.name + ".packages")
    for package in packages:
        path = folder / package.file if packages_dir is not None else fetch(package, folder)
        check(package, path)
    _start(partial, plan)

    items, documents = [], []
    for item, document in collect(packages, folder):
        items.append(item)
        documents.append((item["id"], document))
    chunks = _render_all(documents, size, partial, workers or os.cpu_count() or 1)
    items = _write_images(items, chunks, partial / "images.npy")
    (partial / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (partial / "ATTRIBUTION.md").write_text(_attribution(packages))
    manifest = {**plan, "count": len(items), "images_sha256": sha256_of(partial / "images.npy"),
                "items_sha256": sha256_of(partial / "items.jsonl")}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    _finish(partial, out, [*chunks, partial / "plan.json"])
    if packages_dir is None:
        shutil.rmtree(folder)
    return manifest


def _refuse_strange(out: Path) -> None:
    """Raise ValueError for a folder with other contents, which is never replaced."""
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / "items.jsonl").exists())):
        raise ValueError(f"{out} holds something else than an emoji data set; give --out another folder")


def _start(partial: Path, plan: dict) -> None:
    """Prepare the partial folder for `plan`; chunks of an interrupted build of the same plan are kept."""
    path = partial / "plan.json"
    if path.exists() and json.loads(path.read_text() or "{}") == plan:
        return
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    path.write_text(json.dumps(plan))


def _finish(partial: Path, out: Path, scratch: list[Path]) -> None:
    """Remove the scratch files and rename the partial folder to `out`; an old folder is removed last."""
    for path in [*scratch, *partial.glob("*.tmp")]:
        path.unlink()
    old = out.with_name(out.name + ".old")
    if old.exists():
        shutil.rmtree(old)
    if out.exists():
        os.rename(out, old)
    os.rename(partial, out)
    if old.exists():
        shutil.rmtree(old)
