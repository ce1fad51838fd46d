"""Sources `coco_captions`, `flowers102` and `cifar10`, with the folder layouts of torchvision's classes.

Nothing is downloaded here; if a data set is missing, the error says how to get it. COCO has five captions an image; the
other two have classes, whose names are inserted into a few phrasings.
"""
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from data.fingerprint import Fingerprint, fingerprint_of_files
from data.images.base import ImageConfig, ImageFiles, check_shares, split_of
from data.images.caption_list import Captions, caption_list
from data.images.folder import scan_files
from data.strings import Strings
from files.whole import sha256_of, unit_hash

Split = Literal["train", "validation", "test"]

# Class names in the order of the labels 1 to 102 of imagelabels.mat, as listed on the page of the data set.
FLOWERS = tuple(name.strip() for name in """
pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger lily, moon orchid,
bird of paradise, monkshood, globe thistle, snapdragon, colt's foot, king protea, spear thistle, yellow iris,
globe-flower, purple coneflower, peruvian lily, balloon flower, giant white arum lily, fire lily, pincushion flower,
fritillary, red ginger, grape hyacinth, corn poppy, prince of wales feathers, stemless gentian, artichoke,
sweet william, carnation, garden phlox, love in the mist, mexican aster, alpine sea holly, ruby-lipped cattleya,
cape flower, great masterwort, siam tulip, lenten rose, barbeton daisy, daffodil, sword lily, poinsettia,
bolero deep blue, wallflower, marigold, buttercup, oxeye daisy, common dandelion, petunia, wild pansy, primula,
sunflower, pelargonium, bishop of llandaff, gaura, geranium, orange dahlia, pink-yellow dahlia, cautleya spicata,
japanese anemone, black-eyed susan, silverbush, californian poppy, osteospermum, spring crocus, bearded iris,
windflower, tree poppy, gazania, azalea, water lily, rose, thorn apple, morning glory, passion flower, lotus,
toad lily, anthurium, frangipani, clematis, hibiscus, columbine, desert-rose, tree mallow, magnolia, cyclamen,
watercress, canna lily, hippeastrum, bee balm, ball moss, foxglove, bougainvillea, camellia, mallow,
mexican petunia, bromelia, blanket flower, trumpet creeper, blackberry lily
""".replace("\n", " ").split(","))
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _class_captions(templates: Sequence[str], name: str) -> Captions:
    """The phrasings of a class name: {name} stands for the name, {a} for the name with its article."""
    named = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    return caption_list([template.format(name=name, a=named) for template in templates])


def _captions_json(captions: Captions) -> str:
    """Captions as ``ImageFiles`` stores them."""
    return json.dumps(captions, ensure_ascii=False)


# ---- COCO

@dataclass(frozen=True)
class CocoConfig(ImageConfig):
    """ROOT/train2017/*.jpg, ROOT/val2017/*.jpg and ROOT/annotations/captions_{train,val}2017.json. The official
    validation images are divided by hash into the validation and the test split of this source."""

    year: str = "2017"


class CocoCaptions(ImageFiles):
    """One split of COCO Captions (Chen et al. 2015). The sizes of the images are those in the annotations."""

    def __init__(self, config: CocoConfig, split: Split):
        self.root, self._year = Path(config.root), config.year
        part = ("train" if split == "train" else "val") + config.year
        path = self.root / "annotations" / f"captions_{part}.json"
        if not config.root or not path.is_file() or not (self.root / part).is_dir():
            raise FileNotFoundError(
                f"root: '{config.root}' lacks {part}/ or annotations/{path.name}; download and unpack {part}.zip and "
                f"annotations_trainval{config.year}.zip from https://cocodataset.org/#download there")
        try:
            data = json.loads(path.read_bytes())
            texts: dict[int, list[str]] = {}
            for note in data["annotations"]:
                if note["caption"].strip():
                    texts.setdefault(note["image_id"], []).append(note["caption"])
            images = sorted((image for image in data["images"] if image["id"] in texts), key=lambda image: image["id"])
            rows = [(f"{part}/{image['file_name']}", _captions_json(caption_list(texts[image["id"]])), image["height"],
                     image["width"]) for image in images]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged or no COCO captions file: {error!r}") from None
        if split != "train":
            rows = [row for row in rows if (unit_hash("coco", row[0]) < 0.5) == (split == "test")]
        # the images have never changed, and hashing 19 GB at every start would be slow
        self.content, self.found = sha256_of(path), len(rows)
        super().__init__(config, Strings(row[0] for row in rows), Strings(row[1] for row in rows),
                         np.array([row[2:] for row in rows], dtype=np.int32).reshape(-1, 2))

    def _bytes(self, index: int) -> bytes:
        return (self.root / self.names[index]).read_bytes()

    def fingerprint(self) -> Fingerprint:
        """By the annotations and by the names and sizes of the images of both parts."""
        notes = [f"annotations/captions_{part}{self._year}.json" for part in ("train", "val")]
        folders = [f"{part}{self._year}" for part in ("train", "val")]
        return fingerprint_of_files(self.root, [*notes, *folders], notes)


# ---- Flowers102

@dataclass(frozen=True)
class FlowersConfig(ImageConfig):
    """ROOT/flowers-102/. ``swap`` trains on the official test split of 6149 images and tests on the official training
    split of 1020, the reverse of what classifiers do. The validation split is the official one of 1020 images."""

    swap: bool = True


class Flowers102(ImageFiles):
    """One split of Oxford Flowers 102 (Nilsback and Zisserman 2008)."""

    templates = ("a photo of {a}, a type of flower", "{a}", "a picture of {name} flowers", "a flower: {name}")

    def __init__(self, config: FlowersConfig, split: Split):
        from scipy.io import loadmat  # takes longer to import than the rest of this file

        self.root = Path(config.root) / "flowers-102"
        files = [self.root / "setid.mat", self.root / "imagelabels.mat"]
        if not config.root or not (self.root / "jpg").is_dir() or not all(path.is_file() for path in files):
            raise FileNotFoundError(_missing_message(config.root, "flowers-102/", "Flowers102"))
        key = {"train": "tstid" if config.swap else "trnid", "validation": "valid",
               "test": "trnid" if config.swap else "tstid"}[split]
        try:
            ids = np.sort(loadmat(files[0])[key].ravel())
            labels = loadmat(files[1])["labels"].ravel()  # label of image n at n - 1, from 1 up
            classes = [FLOWERS[labels[number - 1] - 1] for number in ids]
        except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
            raise ValueError(f"{self.root}: setid.mat or imagelabels.mat is damaged ({error!r}); "
                             "delete both and download them again") from None
        texts = {f"jpg/image_{number:05d}.jpg": _class_captions(self.templates, name)
                 for number, name in zip(ids, classes)}
        rows = scan_files(self.root, list(texts), config.max_pixels)
        self.refused = [(row["name"], row["error"]) for row in rows if "error" in row]
        self.found = len(rows)
        rows = [row for row in rows if "error" not in row]
        digest = json.dumps([[row["name"], row["sha256"], texts[row["name"]]] for row in rows])
        self.content = hashlib.sha256(digest.encode()).hexdigest()
        super().__init__(config, Strings(row["name"] for row in rows),
                         Strings(_captions_json(texts[row["name"]]) for row in rows),
                         np.array([[row["height"], row["width"]] for row in rows], dtype=np.int32).reshape(-1, 2))

    def _bytes(self, index: int) -> bytes:
        return (self.root / self.names[index]).read_bytes()

    def fingerprint(self) -> Fingerprint:
        """By the labels and by the names and sizes of the images of all splits."""
        labels = ["setid.mat", "imagelabels.mat"]
        return fingerprint_of_files(self.root, [*labels, "jpg"], labels)


# ---- CIFAR10

@dataclass(frozen=True)
class CifarConfig(ImageConfig):
    """ROOT/cifar-10-batches-py/. ``validation`` is the share of the training images that is held out."""

    size: int = 32
    validation: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self.validation, 0.0)


class Cifar10(ImageFiles):
    """One split of CIFAR10 (Krizhevsky 2009): 32 x 32 pixels, ten classes."""

    templates = ("a photo of {a}", "{a}", "a small picture of {a}", "a blurry photo of {a}")

    def __init__(self, config: CifarConfig, split: Split):
        from torchvision import datasets  # takes longer to import than the rest of this file

        try:
            # the data set consists of pickles; torchvision checks their MD5 before it reads them
            whole: Any = datasets.CIFAR10(config.root or ".", train=split != "test", download=False)
        except RuntimeError:
            what = "cifar-10-batches-py/, or it is damaged"
            raise FileNotFoundError(_missing_message(config.root, what, "CIFAR10")) from None
        kind = "test" if split == "test" else "train"
        names = [f"cifar10/{kind}/{number:05d}" for number in range(len(whole.data))]
        rows = np.array([number for number, name in enumerate(names)
                         if split == "test" or split_of(name, config.validation, 0.0) == split], dtype=np.int64)
        self._pixels = whole.data[rows]  # (N, 32, 32, 3) uint8
        phrases = [_captions_json(_class_captions(self.templates, name)) for name in CIFAR10]
        table = [[number, digest] for number, digest in (*whole.train_list, *whole.test_list)]
        self.content, self.found = hashlib.sha256(json.dumps(table).encode()).hexdigest(), len(rows)
        super().__init__(config, Strings(names[row] for row in rows),
                         Strings(phrases[whole.targets[row]] for row in rows),
                         np.full((len(rows), 2), 32, dtype=np.int32))

    def fingerprint(self) -> Fingerprint:
        """By the files of the set, of which torchvision has compared the hashes."""
        return Fingerprint(fingerprint_of_files(Path(self.config.root or "."), ["cifar-10-batches-py"], []).files,
                           self.content)

    def file_bytes(self, index: int) -> None:
        """None: the images are rows of an array, not files."""
        return None

    def open_image(self, index: int, shape: tuple[int, int] | None = None) -> Image.Image:
        """The RGB image of a row."""
        return Image.fromarray(self._pixels[index])


def _missing_message(root: str, what: str, name: str) -> str:
    """How to download the data set of torchvision's class ``name``."""
    return (f"root: '{root}' lacks {what}; download it with: python -c \"from torchvision.datasets import {name}; "
            f"{name}('{root or 'DIR'}', download=True)\"")
