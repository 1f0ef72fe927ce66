"""The judge's network: a small convolutional detector of one stage, with heads for a segmentation map and for
the whole picture.

It is a CenterNet (Zhou et al. 2019, arXiv:1904.07850) with boxes as in FCOS (Tian et al. 2019,
arXiv:1904.01355).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

Norm = Callable[[int], nn.Module]

CELL = 8
"""Pixels along a side of a cell; the cell that holds an object's centre answers for it."""

WIDTHS = (16, 32, 64, 128)
"""Channels at strides 2, 4, 8 and 16."""

BOX_UNIT = 16.0
"""Pixels that a box output of 1 stands for."""


class Cells(NamedTuple):
    """Of each cell [N, ·, 16, 16]: is an object's centre here [1]; distances from the cell's centre to the
    left, top, right and bottom of its box, in BOX_UNIT [4]; its kind and its colour, the last class of each
    `none of ours`. All but the distances are logits.
    """

    heat: Tensor
    box: Tensor
    kind: Tensor
    colour: Tensor


class Conv(nn.Module):
    """A 3x3 convolution, norm and ReLU; with `residual` the input is added before ReLU."""

    def __init__(
        self, fan_in: int, fan_out: int, norm: Norm, stride: int = 1, residual: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(fan_in, fan_out, 3, stride, 1)
        self.norm = norm(fan_out)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return F.relu(y + x if self.residual else y, inplace=True)


class JudgeNet(nn.Module):
    """From pictures in −1…1 [N, 3, 128, 128] to what they show.

    norm: of each convolution by its channels, batch normalisation in training; it folds into the convolution.
    """

    def __init__(
        self, kinds: int, colours: int, facts: tuple[int, ...], norm: Norm = lambda _: nn.Identity()
    ) -> None:
        """kinds, colours: how many there are; facts: classes of each fact of the whole picture."""
        super().__init__()
        self.kinds, self.colours, self.facts = kinds, colours, facts
        a, b, c, d = WIDTHS
        self.stem = nn.Sequential(Conv(3, a, norm, 2), Conv(a, b, norm, 2), Conv(b, b, norm, 1, True))
        self.middle = nn.Sequential(Conv(b, c, norm, 2), Conv(c, c, norm, 1, True), Conv(c, c, norm, 1, True))
        self.deep = nn.Sequential(Conv(c, d, norm, 2), Conv(d, d, norm, 1, True), Conv(d, d, norm, 1, True))
        self.from_deep = nn.Conv2d(d, c, 1)
        self.merged = nn.Sequential(Conv(c, c, norm, 1, True), Conv(c, c, norm, 1, True))
        self.cell_head = nn.Sequential(Conv(c, d, norm), nn.Conv2d(d, 1 + 4 + kinds + 1 + colours + 1, 1))
        self.from_merged = nn.Conv2d(c, b, 1)
        self.map_head = nn.Sequential(Conv(b, b, norm, 1, True), nn.Conv2d(b, 4 * (1 + kinds), 1))
        self.whole_head = nn.Linear(d, sum(facts))

    def levels(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features at strides 4, 8 and 16; those at 8 see the ones at 16."""
        fine = self.stem(images)
        middle = self.middle(fine)
        deep = self.deep(middle)
        return fine, self.merged(middle + F.interpolate(self.from_deep(deep), scale_factor=2.0)), deep

    def cells(self, merged: Tensor) -> Cells:
        """What stands where, from the features at stride 8."""
        parts = self.cell_head(merged).split([1, 4, self.kinds + 1, self.colours + 1], dim=1)
        return Cells(*parts)

    def map(self, fine: Tensor, merged: Tensor) -> Tensor:
        """Logits of the segmentation map at half resolution [N, 1 + kinds, 64, 64]."""
        up = F.interpolate(self.from_merged(merged), scale_factor=2.0)
        return F.pixel_shuffle(self.map_head(fine + up), 2)

    def pooled(self, deep: Tensor) -> Tensor:
        """The features at stride 16, averaged over the picture [N, 128]."""
        return deep.mean(dim=(2, 3))

    def whole(self, pooled: Tensor) -> tuple[Tensor, ...]:
        """Logits of each fact of the whole picture, from the pooled features."""
        return self.whole_head(pooled).split(self.facts, dim=1)
