"""LPIPS: the difference of two images to VGG16, calibrated on judgements of people (Zhang et al. 2018).

Axis letters: B batch, C channels of a stage, H W size of the images, h w size of a stage.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from model.pretrained.tensors import read_tensors

# Channels and convolutions of the five stages of VGG16 (Simonyan and Zisserman 2015, configuration D); a stage halves
# the size of the one before it. Compared is what comes out of each stage.
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
# Mean and standard deviation of ImageNet's pixels, for images in [-1, 1], in the digits of the published code.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPS = 1e-10  # beside the length of a vector of features
SMALLEST = 2 ** (len(STAGES) - 1)  # pixels along a side

# Spellings of the files that hold these weights -> ours: torchvision's vgg16 is read as it is.
RENAMES = ((r"^net\.slice\d\.(\d+)\.", r"features.\1."), (r"^lin(\d)\.model\.1\.", r"heads.\1."))
# What those files hold besides: VGG's classifier, the numbers above, and the heads a second time.
UNUSED = re.compile(r"classifier\.|scaling_layer\.|lins\.")


class Lpips(nn.Module):
    """Distance of two images: squared differences of unit feature vectors, weighted by channel, averaged over places.

    `features` has torchvision's names. Both parts are random until `load_lpips` fills them.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.ends = []  # index of the last layer of each stage
        c_in = 3
        for channels, convolutions in STAGES:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convolutions):
                layers += [nn.Conv2d(c_in, channels, 3, padding=1), nn.ReLU()]
                c_in = channels
            self.ends.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Conv2d(channels, 1, 1, bias=False) for channels, _ in STAGES)

    def forward(self, decoded: Tensor, images: Tensor) -> Tensor:
        """Distances (B,) of two batches (B, 3, H, W) in [-1, 1], 0 for equal images. Raises ValueError for other
        shapes."""
        fits = images.ndim == 4 and images.shape[1] == 3 and min(images.shape[2:]) >= SMALLEST
        if not fits or decoded.shape != images.shape:
            raise ValueError(f"images: {tuple(decoded.shape)} and {tuple(images.shape)}; valid: two of one shape "
                             f"(B, 3, H, W), H and W at least {SMALLEST}")
        distance = torch.zeros(len(images), device=images.device)
        for ours, theirs, head in zip(self.stages(decoded), self.stages(images), self.heads):
            # Zhang et al. 2018, equation 1: sum over stages of the mean over places of |w (y - y_0)|^2
            difference = (ours - theirs).square()  # (B, C, h, w)
            weight = head.get_parameter("weight").float()[:, :, 0, 0]  # (1, C)
            distance = distance + (weight[:, :, None, None] * difference).sum(dim=1).mean(dim=(1, 2))
        return distance

    def stages(self, images: Tensor) -> list[Tensor]:
        """The output of each stage (B, C, h, w) for images (B, 3, H, W), scaled to unit length at every place, in
        fp32."""
        shift, scale = (torch.tensor(x, device=images.device)[:, None, None] for x in (SHIFT, SCALE))  # (3, 1, 1)
        x, out = (images - shift) / scale, []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.ends:
                # vector_norm: where nothing is active its gradient is 0, that of a root of a sum is not a number
                length = torch.linalg.vector_norm(x.float(), dim=1, keepdim=True)  # (B, 1, h, w)
                out.append(x.float() / (length + EPS))
        return out


def load_lpips(paths: tuple[str, ...]) -> Lpips:
    """LPIPS from one file, or from two that hold VGG16 and the heads in either order; for use without training.

    VGG16 has the names of torchvision (`features.0.weight`) or of the `lpips` package (`net.slice1.0.weight`), and
    the heads have those of that package (`lin0.model.1.weight`). No pickle is executed. Raises ValueError naming a file
    that cannot be read, and every tensor that is missing, unexpected or of another shape.
    """
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"no weights file {path}")
    tensors = {}
    for name, tensor in read_tensors(*map(Path, paths)).items():
        for theirs, ours in RENAMES:
            name = re.sub(theirs, ours, name)
        if not UNUSED.match(name):
            tensors[name] = tensor.float()
    with torch.device("meta"):
        lpips = Lpips()
    own = lpips.state_dict()
    wrong = {"missing": [name for name in own if name not in tensors],
             "unexpected": [name for name in tensors if name not in own],
             "misshapen": [f"{name} {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}" for name in own
                           if name in tensors and tensors[name].shape != own[name].shape]}
    if any(wrong.values()):
        found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in wrong.items() if names)
        raise ValueError(f"{', '.join(paths)}: no LPIPS on VGG16; {found}")
    lpips.load_state_dict(tensors, assign=True)
    return lpips.eval().requires_grad_(False)
