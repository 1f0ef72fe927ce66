"""The adversarial term of an autoencoder's loss, and the critic that it is played against.
(Esser et al. 2021, arXiv:2012.09841, section 3.2; Rombach et al. 2022, arXiv:2112.10752, appendix G)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.models.discriminator import PatchDiscriminator

LARGEST_WEIGHT = 1e4


@dataclass(frozen=True)
class AdversarySettings:
    """A PatchGAN critic: its shape, when it joins in, and how much it counts."""

    start: int  # the first step at which it learns and counts
    weight: float = 0.5  # of the adversarial gradient beside the reconstruction's, at the last layer
    loss: str = "hinge"  # or "vanilla"
    learning_rate: float = 1e-3
    width: int = 64
    layers: int = 3


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


class Adversary:
    """A critic with its own optimiser. Its state is saved and resumed beside the autoencoder's."""

    def __init__(self, settings: AdversarySettings) -> None:
        self.settings = settings
        self.critic = PatchDiscriminator(width=settings.width, layers=settings.layers)
        self.optimizer = torch.optim.Adam(
            self.critic.parameters(), lr=settings.learning_rate, betas=(0.5, 0.9)
        )

    def loss(
        self, step: int, images: Tensor, decoded: Tensor, reconstruction: Tensor, last_layer: Tensor
    ) -> Tensor:
        """What the critic, taught one step on this batch first, adds to the autoencoder's loss; 0 before
        `start`.

        `reconstruction`: the loss of `decoded` beside `images`, both [N, 3, H, W] in −1…1. `last_layer`: the
        weights that the decoder ends with.
        """
        if step < self.settings.start:
            return reconstruction.new_zeros(())
        self.teach(images, decoded.detach())
        self.critic.requires_grad_(False)
        adversarial = -self.critic(decoded).float().mean()
        self.critic.requires_grad_(True)
        return self.settings.weight * adaptive_weight(reconstruction, adversarial, last_layer) * adversarial

    def teach(self, images: Tensor, decoded: Tensor) -> Tensor:
        """One step of the critic: tell these pictures from those; its loss before the step."""
        real, fake = self.critic(images).float(), self.critic(decoded).float()
        loss = CRITIC_LOSSES[self.settings.loss](real, fake)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Critic and optimiser."""
        return {"critic": self.critic.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state of `state_dict`."""
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])


__all__ = ["Adversary", "AdversarySettings", "adaptive_weight", "hinge_loss", "vanilla_loss"]
