"""How different two pictures look, as a term of the autoencoder's loss.

`laplacian_distance` needs no weights. `LPIPS` is the distance that the published autoencoders were trained
with, for those who have its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.checkpoint.container import SafetensorsFile
from fastldm.checkpoint.tensors import DTYPES, read_tensor
from fastldm.errors import CheckpointError

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Two batches of images [N, 3, H, W] in −1…1 → a distance for each pair [N], differentiable."""

BINOMIAL = (1, 4, 6, 4, 1)


def laplacian_distance(images: Tensor, decoded: Tensor, levels: int = 4) -> Tensor:
    """Σ over the bands of a Laplacian pyramid of mean |difference|: [N].

    A mean over pixels does not see a wrong detail beneath a larger error of what lies around it; here each
    band is compared by itself. The last is what is left, blurred; a side of one pixel ends the pyramid.
    (Burt & Adelson 1983, doi:10.1109/TCOM.1983.1095851; as a loss: Bojanowski et al. 2018, arXiv:1707.05776)
    """
    rest = images - decoded  # the pyramid is linear, so the pyramid of the difference will do
    total = rest.new_zeros(len(rest))
    for _ in range(levels - 1):
        if min(rest.shape[2:]) < 2:
            break
        small = _blurred(rest)[:, :, ::2, ::2]
        large = F.interpolate(small, rest.shape[2:], mode="bilinear", align_corners=False)
        total = total + (rest - large).abs().mean(dim=(1, 2, 3))
        rest = small
    return total + rest.abs().mean(dim=(1, 2, 3))


def _blurred(x: Tensor) -> Tensor:
    """Each channel filtered with the 5 × 5 binomial kernel, edges repeated."""
    line = torch.tensor(BINOMIAL, dtype=x.dtype, device=x.device) / 16
    kernel = line.expand(x.shape[1], 1, 1, 5)
    x = F.pad(x, (2, 2, 2, 2), mode="replicate")
    x = F.conv2d(x, kernel, groups=x.shape[1])
    return F.conv2d(x, kernel.transpose(2, 3), groups=x.shape[1])


SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""The convolutions of VGG-16, numbered as in torchvision, up to each of the five maps that are compared."""
WIDTHS = (64, 128, 256, 512, 512)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # from −1…1 to what VGG-16 was trained on


class LPIPS(nn.Module):
    """Learned perceptual distance on VGG-16. (Zhang et al. 2018, arXiv:1801.03924)

    Images are brought to ImageNet's scale; the five maps, each place's vector normed to 1, are compared by
    squared differences, weighted by channel, averaged over places, and summed. The weights never learn.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleDict()
        self.weights = nn.ParameterList([torch.zeros(width) for width in WIDTHS])
        before = 3
        for numbers, width in zip(SLICES, WIDTHS, strict=True):
            for number in numbers:
                self.convolutions[str(number)] = nn.Conv2d(before, width, 3, padding=1)
                before = width
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, file: Path) -> LPIPS:
        """From a .safetensors file of the state of `lpips.LPIPS(net="vgg")`, of taming-transformers' LPIPS,
        or of a latent diffusion model that holds one.

        The keys end in `net.slice1.0.weight` … `lin4.model.1.weight`. CheckpointError names one that is
        missing or misshapen.
        """
        made = cls()
        entries = SafetensorsFile(file).entries
        first = "net.slice1.0.weight"
        prefix = next((key.removesuffix(first) for key in entries if key.endswith(first)), "")
        targets = {f"lin{i}.model.1.weight": weight for i, weight in enumerate(made.weights)}
        for i, numbers in enumerate(SLICES, start=1):
            for number in numbers:
                for name, tensor in made.convolutions[str(number)].named_parameters():
                    targets[f"net.slice{i}.{number}.{name}"] = tensor
        for key, target in targets.items():
            entry = entries.get(prefix + key)
            if entry is None or entry.numel != target.numel() or entry.dtype not in DTYPES:
                why = "is missing" if entry is None else f"is {entry.dtype} {list(entry.shape)}"
                raise CheckpointError(file, prefix + key, f"{why}; LPIPS has floats {list(target.shape)}")
            target.copy_(read_tensor(entry, target.dtype).view(target.shape))
        return made

    def forward(self, images: Tensor, decoded: Tensor) -> Tensor:
        """Two batches of images [N, 3, H, W] in −1…1, of 16 pixels a side or more → distances [N]."""
        shift, scale = images.new_tensor(SHIFT)[:, None, None], images.new_tensor(SCALE)[:, None, None]
        both = (torch.cat((images, decoded)) - shift) / scale
        total = images.new_zeros(len(images))
        for i, numbers in enumerate(SLICES):
            if i > 0:
                both = F.max_pool2d(both, 2)
            for number in numbers:
                both = F.relu(self.convolutions[str(number)](both))
            one, other = F.normalize(both.to(images.dtype), dim=1, eps=1e-10).chunk(2)
            per_place = torch.einsum("nchw,c->nhw", (one - other).square(), self.weights[i].to(images.dtype))
            total = total + per_place.mean(dim=(1, 2))
        return total
