"""Builds the emoji data set: six npm packages in, a folder with one memory-mapped array and its captions' facts out.

Five packages hold the same emoji drawn in five styles, as SVG under English names; the sixth has labels, tags and
groups by Unicode code point. The code points align the names: what fluent calls `waving-hand-dark` is
`waving-hand-dark-skin-tone` everywhere. Only Unicode emoji are kept, so that every picture has a label and tags.

N pictures, S their side. The folder: images.npy (N, 4, S, S) uint8 RGBA with colours premultiplied by alpha,
items.jsonl (N lines), manifest.json, ATTRIBUTION.md.
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
from PIL import Image
from tqdm import tqdm

FORMAT = 1  # raised when what is written changes, so that an older folder is refused and an older partial build dropped
CHUNK = 128  # pictures rendered between two saves of a build that may be interrupted
TONE = re.compile(r"-(medium-light|medium-dark|medium|light|dark)-skin-tone")
MIRRORED = "-facing-right"


@dataclass(frozen=True)
class Package:
    """One npm package: where it comes from, what it must hash to, and what must be said about it."""

    name: str
    version: str
    integrity: str  # as npm writes it: sha512-BASE64 of the .tgz
    style: str  # "" for the package of labels and tags
    licence: str
    credit: str
    chars_from: str = ""  # style whose chars.json (code point -> name) serves this one too

    @property
    def file(self) -> str:
        """Name of the file that `npm pack` writes."""
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
    """npm's integrity string of a file: "sha512-" and the base64 of its digest."""
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def fetch(package: Package, folder: Path) -> Path:
    """Path of the package's .tgz in `folder`, brought there by `npm pack` unless it is there already.

    Raises FileNotFoundError without npm, ValueError when npm fails or the file is not the one that is pinned.
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
    """Raises FileNotFoundError for a package that is missing, ValueError for one that is not the pinned file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; get it with `npm pack {package.name}@{package.version}`, "
                                "or leave --packages out to have it fetched")
    found = integrity(path)
    if found != package.integrity:
        raise ValueError(f"{path} is not {package.name}@{package.version}: its hash is {found[:23]}..., "
                         f"expected {package.integrity[:23]}...; delete it and fetch it again")


def read_json(path: Path, member: str) -> Any:
    """The JSON file `package/MEMBER` of a .tgz. Raises ValueError when the archive or the file cannot be read."""
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
    """Code points without the presentation selector, which the packages write or leave out as they like."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def labels(path: Path) -> dict[str, dict]:
    """Code point -> {"label", "tags", "group", "subgroup"} of every Unicode emoji, skin tones included."""
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
    """A whole SVG document for an icon, its box padded to a square around the middle."""
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    side = max(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {side} {side}" width="{side}" height="{side}">{icon["body"]}</svg>')


def collect(packages: Sequence[Package], folder: Path) -> Iterator[tuple[dict, str]]:
    """(item, SVG) of every Unicode emoji of every style, styles in the order of `packages`, names sorted."""
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
            if entry is None or icon.get("hidden"):  # hidden: a name that was given up, the picture is there twice
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
    """An SVG document as (4, size, size) uint8 RGBA, colours premultiplied by alpha: ready for `over` and resizing."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=document, width=size, height=size, skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png))) as picture:
        rgba = np.asarray(picture.convert("RGBA")).astype(np.uint16)  # (S, S, 4), straight alpha
    alpha = rgba[..., 3:]
    premultiplied = np.concatenate([(rgba[..., :3] * alpha + 127) // 255, alpha], axis=-1)
    return np.ascontiguousarray(premultiplied.astype(np.uint8).transpose(2, 0, 1))  # (4, S, S)


def _render_chunk(job: tuple[list[tuple[str, str]], int, Path]) -> int:
    """Draws one chunk of (id, SVG) and saves it under its final name only when it is whole."""
    documents, size, path = job
    pictures = []
    for name, document in documents:
        try:
            pictures.append(render(document, size))
        except (ValueError, OSError) as error:
            raise ValueError(f"{name}: the SVG cannot be drawn ({error})") from None
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as handle:
        np.save(handle, np.stack(pictures))
    os.replace(temporary, path)
    return len(pictures)


def _render_all(documents: list[tuple[str, str]], size: int, folder: Path, workers: int) -> list[Path]:
    """Chunk files of all pictures, in order; a chunk that an interrupted build has saved is not drawn again."""
    spans = range(0, len(documents), CHUNK)
    paths = [folder / f"chunk-{start:06d}.npy" for start in spans]
    jobs = [(documents[start:start + CHUNK], size, path) for start, path in zip(spans, paths) if not path.exists()]
    there = len(documents) - sum(len(job[0]) for job in jobs)
    with tqdm(total=len(documents), initial=there, desc=f"emoji at {size} px", unit="picture") as bar:
        workers = min(workers, len(jobs))
        if workers <= 1:
            for job in jobs:
                bar.update(_render_chunk(job))
        else:
            # Ctrl-C goes to every process of a terminal: only this one should answer it.
            ignore = (signal.SIGINT, signal.SIG_IGN)
            with multiprocessing.get_context("spawn").Pool(workers, signal.signal, ignore) as pool:
                for count in pool.imap_unordered(_render_chunk, jobs):
                    bar.update(count)
    return paths


def _write_images(items: list[dict], chunks: list[Path], path: Path) -> list[dict]:
    """Writes the array without empty pictures and without a style's repeated drawings; the items that were kept.

    A drawing that one style uses under two names would sit on both sides of the split. The shortest name stays.
    """
    digests, measured = [], []
    for chunk in chunks:
        for picture in np.load(chunk):  # (4, S, S)
            digests.append(hashlib.sha256(picture.tobytes()).digest())
            alpha = picture[3].sum(dtype=np.int64)
            measured.append([] if not alpha else [int(c.sum(dtype=np.int64) * 255 // alpha) for c in picture[:3]])
    first: dict[tuple[str, bytes], int] = {}
    for i in sorted(range(len(items)), key=lambda i: (len(items[i]["name"]), items[i]["name"])):
        first.setdefault((items[i]["style"], digests[i]), i)
    kept = sorted(i for i in first.values() if measured[i])
    size = np.load(chunks[0], mmap_mode="r").shape[-1]
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(kept), 4, size, size))
    row, wanted, start = 0, set(kept), 0
    for chunk in chunks:
        pictures = np.load(chunk)
        for k, picture in enumerate(pictures):
            if start + k in wanted:
                images[row] = picture
                row += 1
        start += len(pictures)
    images.flush()
    return [{**items[i], "rgb": measured[i]} for i in kept]


def _attribution(packages: Sequence[Package]) -> str:
    lines = ["# Attribution", "", "The pictures of this folder were drawn from these packages, resized and unchanged "
             "otherwise. Pass this page on with them and with pictures made of them.", "",
             "| style | package | licence | by |", "|---|---|---|---|"]
    lines += [f"| {p.style or '(labels)'} | {p.name} {p.version} | {p.licence} | {p.credit} |" for p in packages]
    return "\n".join(lines) + "\n"


def build(out: Path | str, size: int = 64, packages_dir: Path | str | None = None,
          packages: Sequence[Package] = PACKAGES, workers: int | None = None) -> dict:
    """Writes the data set to `out` and returns its manifest. Nothing is at `out` before all of it is.

    The work is done in `out` + ".partial"; an interrupted build goes on there with the chunks it had finished, and
    a partial build of other packages or another size is dropped. An `out` that holds the same set is left alone.

    Raises ValueError and FileNotFoundError with one line for a missing or wrong package, for a missing npm and for
    a missing resvg-py, before anything is drawn.
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
        if {key: there.get(key) for key in plan} == plan and (out / "images.npy").exists():
            return there
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
    manifest = {**plan, "count": len(items), "images_sha256": _sha256(partial / "images.npy"),
                "items_sha256": _sha256(partial / "items.jsonl")}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    _finish(partial, out, [*chunks, partial / "plan.json"])
    if packages_dir is None:
        shutil.rmtree(folder)
    return manifest


def _refuse_strange(out: Path) -> None:
    """A folder of something else is never replaced."""
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / "items.jsonl").exists())):
        raise ValueError(f"{out} holds something else than an emoji data set; give --out another folder")


def _start(partial: Path, plan: dict) -> None:
    """Leaves a partial folder that belongs to `plan`, with the chunks of an interrupted build of the same plan."""
    path = partial / "plan.json"
    if path.exists() and json.loads(path.read_text() or "{}") == plan:
        return
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    path.write_text(json.dumps(plan))


def _finish(partial: Path, out: Path, scratch: list[Path]) -> None:
    """Removes the scratch files and puts the folder in its place, the old one aside until the new one stands."""
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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
