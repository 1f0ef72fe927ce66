"""LoRAs merged into the weights of a loaded model, in place, and taken out again to the bit."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastldm.checkpoint.lora import Lora, merge, read_lora
from fastldm.checkpoint.lora_names import adaptable
from fastldm.checks import number
from fastldm.errors import CheckpointError

Applied: TypeAlias = tuple[Lora, float]  # and the strength it is merged with
MAX_STRENGTH = 100.0


class MergedLoras:
    """The LoRAs in some networks, as unet=, text_encoder=. Their owner's lock guards them, but for `read`.

    A weight keeps its place, so graphs and views of it stay valid; the count of its changes tells those who
    keep something made of it. The original of each weight touched is kept in host memory, and every merge
    starts from it, so a weight is rounded once however many LoRAs add up in it.
    """

    def __init__(self, **networks: nn.Module) -> None:
        self._networks = networks
        self._weights = {name: module.weight for name, module in adaptable(networks).items()}
        self._originals: dict[str, Tensor] = {}
        self.present: tuple[Applied, ...] = ()

    def read(self, path: str | os.PathLike[str], strength: float) -> Applied:
        """A LoRA file that fits these networks, ready to be added; errors as in `read_lora`."""
        factor = number("weight", strength, -MAX_STRENGTH, MAX_STRENGTH)
        return read_lora(path, self._networks), factor

    def add(self, lora: Applied) -> None:
        """Merge one more; CheckpointError if a weight overflows its dtype. An error changes nothing."""
        self._replace(lora[0].changes, (*self.present, lora))

    def clear(self) -> None:
        """Take all out: every weight has the bits that it had before."""
        self._replace(list(self._originals), ())

    def describe(self) -> list[dict[str, Any]]:
        """File, strength and sha256 of each, in order of arrival, as JSON can hold them."""
        return [
            {"file": str(lora.path), "weight": strength, "hash": lora.hash} for lora, strength in self.present
        ]

    @torch.no_grad()
    def _replace(self, modules: Iterable[str], loras: tuple[Applied, ...]) -> None:
        """Give these modules the weights that they have with these LoRAs, all or none."""
        begun = []
        try:
            for name in modules:
                begun.append(name)
                self._write(name, loras)
            self.present = loras
        except BaseException:
            for name in begun:
                if name in self._originals:
                    self._write(name, self.present)
            raise
        finally:
            changed = {name for lora, _ in self.present for name in lora.changes}
            self._originals = {name: kept for name, kept in self._originals.items() if name in changed}

    def _write(self, name: str, loras: tuple[Applied, ...]) -> None:
        weight = self._weights[name]
        original = self._originals.get(name)
        if original is None:
            original = self._originals[name] = weight.detach().to("cpu", copy=True)
        changes = [(lora.changes[name], strength) for lora, strength in loras if name in lora.changes]
        if not changes:
            weight.copy_(original)
        elif not merge(weight, original, changes):
            why = f"the merged weight overflows {weight.dtype}; a smaller weight= or another dtype may fit"
            raise CheckpointError(loras[-1][0].path, name, why)
