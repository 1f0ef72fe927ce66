"""The critic of autoencoder training: is each patch of a picture real?
(Isola et al. 2017, arXiv:1611.07004)
"""

from __future__ import annotations

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Convolutions of kernel 4, each halving the map but the last two; a logit for each of the places left,
    which sees 70 × 70 pixels with three halvings. Key names are those of the original.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            parts += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[i]),
                nn.LeakyReLU(0.2),
            ]
        parts.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*parts)
        for part in parts:
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, 0.0, 0.02)
            elif isinstance(part, nn.BatchNorm2d):
                nn.init.normal_(part.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in −1…1 → logits [N, 1, h, w], positive for real."""
        return self.main(images)
