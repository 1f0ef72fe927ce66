"""The game of an autoencoder against a critic, who learns to tell its pictures from real ones.
(Esser et al. 2021, arXiv:2012.09841, section 3.2; Rombach et al. 2022, arXiv:2112.10752, appendix G)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.checks import choice, integer
from fastldm.models.discriminator import PatchDiscriminator
from fastldm.training.fit import MOST

LARGEST_WEIGHT = 1e4


@dataclass(frozen=True)
class AdversarySettings:
    """A PatchGAN critic: its shape, when it joins in, and how much it counts."""

    start: int  # the first step at which it learns and counts
    weight: float = 0.5  # of the adversarial gradient beside the reconstruction's, at the last layer
    loss: str = "hinge"
    width: int = 64
    layers: int = 3

    def __post_init__(self) -> None:
        """InvalidArgument for a loss that there is not, and for no width or layers."""
        choice("loss", self.loss, tuple(CRITIC_LOSSES))
        for name in ("width", "layers"):
            integer(name, getattr(self, name), 1, MOST)

    def critic(self) -> PatchDiscriminator:
        """A new critic."""
        return PatchDiscriminator(width=self.width, layers=self.layers)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """½ (mean max(0, 1 − real) + mean max(0, 1 + fake)) of a critic's logits."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_loss(real: Tensor, fake: Tensor) -> Tensor:
    """½ (mean softplus(−real) + mean softplus(fake)) of a critic's logits."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


CRITIC_LOSSES = {"hinge": hinge_loss, "vanilla": vanilla_loss}


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """‖∇ reconstruction‖ / (‖∇ adversarial‖ + 1e-4) at the decoder's last weights, at most 1e4; no gradient.

    With it, both terms pull equally hard at the last layer. The graphs of both losses are kept.
    """
    (wanted,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (given,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (wanted.norm() / (given.norm() + 1e-4)).clamp(0, LARGEST_WEIGHT).detach()


def adversarial_losses(
    settings: AdversarySettings,
    critic: nn.Module,
    images: Tensor,
    decoded: Tensor,
    reconstruction: Tensor,
    last_layer: Tensor,
) -> tuple[Tensor, Tensor]:
    """What the game adds to the autoencoder's loss, and the critic's own.

    Each moves only its own player, so one backward pass of their sum teaches both: the critic is held still
    while it judges `decoded` for the autoencoder, and learns from pictures cut off from it. `reconstruction`:
    the loss of `decoded` beside `images`, both [N, 3, H, W] in −1…1. `last_layer`: the weights that the
    decoder ends with.
    """
    critic.requires_grad_(False)
    adversarial = -critic(decoded).float().mean()
    critic.requires_grad_(True)
    weight = settings.weight * adaptive_weight(reconstruction, adversarial, last_layer)
    real, fake = critic(images).float(), critic(decoded.detach()).float()
    return weight * adversarial, CRITIC_LOSSES[settings.loss](real, fake)
