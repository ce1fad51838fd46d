"""InceptionV3 in the form that the FID is defined on (Heusel et al. 2017): the graph of TensorFlow's file of 2015.

Szegedy et al. 2015, figures 5 to 7. It differs from torchvision's in its poolings (averages do not count the padding,
and the last block takes the maximum) and in its 1008 classes. The names of tensors are those of the published weights,
the file pt_inception-2015-12-05-6726825d.pth of pytorch-fid and torch-fidelity. Axis letters: B batch, C channels, H W
size.
"""
import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.features.resize import STAMPS, Resize, check_images, resize_pixels
from files.weights import fill_module, read_pickled_tensors

SIZE = 299  # pixels along a side
WIDTH = 2048  # of the pooled features
CLASSES = 1008
NORM_EPS = 1e-3
TALL, WIDE = (7, 1), (1, 7)

Step = tuple  # (name, channels out, kernel[, stride]), or a pair of steps that fork and are joined
Paths = tuple[tuple[Step, ...], ...]


def _a(pool: int) -> Paths:
    return ((("branch1x1", 64, 1),), (("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)),
            (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)),
            (("average",), ("branch_pool", pool, 1)))


def _b() -> Paths:
    return ((("branch3x3", 384, 3, 2),), (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3),
                                          ("branch3x3dbl_3", 96, 3, 2)), (("shrink",),))


def _c(width: int) -> Paths:
    return ((("branch1x1", 192, 1),),
            (("branch7x7_1", width, 1), ("branch7x7_2", width, WIDE), ("branch7x7_3", 192, TALL)),
            (("branch7x7dbl_1", width, 1), ("branch7x7dbl_2", width, TALL), ("branch7x7dbl_3", width, WIDE),
             ("branch7x7dbl_4", width, TALL), ("branch7x7dbl_5", 192, WIDE)),
            (("average",), ("branch_pool", 192, 1)))


def _d() -> Paths:
    return ((("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)),
            (("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, WIDE), ("branch7x7x3_3", 192, TALL),
             ("branch7x7x3_4", 192, 3, 2)), (("shrink",),))


def _e(pool: str) -> Paths:
    return ((("branch1x1", 320, 1),),
            (("branch3x3_1", 384, 1), (("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1)))),
            (("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
             (("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1)))),
            ((pool,), ("branch_pool", 192, 1)))


BLOCKS = (("Mixed_5b", 192, _a(32)), ("Mixed_5c", 256, _a(64)), ("Mixed_5d", 288, _a(64)), ("Mixed_6a", 288, _b()),
          ("Mixed_6b", 768, _c(128)), ("Mixed_6c", 768, _c(160)), ("Mixed_6d", 768, _c(160)),
          ("Mixed_6e", 768, _c(192)),
          ("Mixed_7a", 768, _d()), ("Mixed_7b", 1280, _e("average")), ("Mixed_7c", 2048, _e("maximum")))
POOLINGS = {
    "average": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "maximum": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),  # an average in the paper; the file has this
    "shrink": lambda x: F.max_pool2d(x, 3, stride=2),
}


class Conv(nn.Module):
    """A convolution without bias, normalisation, ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int | tuple[int, int], stride: int = 1,
                 padding: int | tuple[int, int] = 0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H', W')."""
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Several paths over one input, whose channels are joined. Stride 1 keeps the size; stride 2 has no padding."""

    def __init__(self, c_in: int, paths: Paths):
        super().__init__()
        self.paths = paths
        for path in paths:
            width = c_in
            for step in path:
                forks = step if isinstance(step[0], tuple) else (step,)
                for name, *shape in forks:
                    if shape:
                        self.add_module(name, self._conv(width, *shape))
                width = sum(fork[1] for fork in forks) if len(forks[0]) > 1 else width

    @staticmethod
    def _conv(c_in: int, c_out: int, kernel: int | tuple[int, int], stride: int = 1) -> Conv:
        sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        return Conv(c_in, c_out, kernel, stride, 0 if stride == 2 else (sides[0] // 2, sides[1] // 2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, sum of the last channels of the paths, H, W), or half of H and W."""
        ends = []
        for path in self.paths:
            y = x
            for step in path:
                forks = step if isinstance(step[0], tuple) else (step,)
                y = torch.cat([POOLINGS[name](y) if name in POOLINGS else self.get_submodule(name)(y)
                               for name, *_ in forks], dim=1)
            ends.append(y)
        return torch.cat(ends, dim=1)


class InceptionV3(nn.Module):
    """The network; `pooled` returns the vector before its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        for name, c_in, paths in BLOCKS:
            self.add_module(name, Mixed(c_in, paths))
        self.fc = nn.Linear(WIDTH, CLASSES)

    def pooled(self, x: Tensor) -> Tensor:
        """(B, 3, 299, 299), (pixel - 128) / 128 of pixels 0 to 255 -> mean over places of the last block (B, 2048)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(POOLINGS["shrink"](x)))  # (B, 192, 71, 71)
        x = POOLINGS["shrink"](x)  # (B, 192, 35, 35)
        for name, _, _ in BLOCKS:
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))  # (B, 2048)

    def logits(self, pooled: Tensor) -> Tensor:
        """(B, 2048) -> (B, 1008) without the bias, as the Inception score is defined on this file."""
        return pooled @ self.fc.weight.T


class InceptionFeatures:
    """features(images) -> (B, 2048), always in fp32, also under autocast; `stamp` says how the features are made."""

    width = WIDTH

    def __init__(self, path: str | Path, device: torch.device | str = "cpu", resize: Resize = "clean"):
        """Read the published weights at ``path``. Raises ValueError when they are missing or do not fit."""
        self.network = load_inception(path).to(device).to(memory_format=torch.channels_last)
        self.device, self.resize = torch.device(device), resize
        self.part = 4 if self.device.type == "cpu" else 128  # images at a time
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
        self.stamp = f"InceptionV3 of 2015 pooled (sha256 {digest}), {SIZE} px, {STAMPS[resize]}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> (B, 2048). Raises ValueError for anything else."""
        check_images(images)
        with torch.autocast(self.device.type, enabled=False):
            return torch.cat([self.network.pooled(network_input(part.to(self.device), self.resize))
                              for part in images.split(self.part)])

    @torch.no_grad()
    def logits(self, vectors: Tensor) -> Tensor:
        """Features (B, 2048) -> logits (B, 1008) for the Inception score."""
        return self.network.logits(vectors.to(self.device))


def network_input(images: Tensor, resize: Resize = "clean") -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> (B, 3, 299, 299), (pixel - 128) / 128 as in the graph."""
    return (resize_pixels((images.float() + 1) * 127.5, SIZE, resize) - 128) / 128


def load_inception(path: str | Path) -> InceptionV3:
    """The network with the weights of a file, in evaluation mode. Nothing in the file is executed.

    Raises ValueError naming the file, and the tensors that are missing, unexpected or of another shape.
    """
    if not Path(path).is_file():
        raise ValueError(f"no weights file {path}; valid: pt_inception-2015-12-05-6726825d.pth, as pytorch-fid has it")
    network = InceptionV3()
    fill_module(network, read_pickled_tensors(path), path, "InceptionV3", ignored="num_batches_tracked")
    return network.eval().requires_grad_(False)
