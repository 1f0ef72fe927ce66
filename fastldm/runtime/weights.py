"""Watching weights for changes: what was made of them is to be forgotten then."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class Weights:
    """The weights of some networks: where they lie, and how often each was changed in place."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self._all = [weight for network in networks for weight in network.parameters()]
        self.nbytes = sum(weight.nbytes for weight in self._all)
        self._places: list[int] = []
        self._versions: object = None

    def since_last(self) -> tuple[bool, bool]:
        """Whether any was put elsewhere, and whether any was changed in place, since the last call.

        Inference tensors count no changes, so they may always have been changed.
        """
        places, versions = self._places, self._versions
        self._places = [weight.data_ptr() for weight in self._all]
        counted = not any(weight.is_inference() for weight in self._all)
        self._versions = [weight._version for weight in self._all] if counted else object()
        return self._places != places, self._versions != versions
