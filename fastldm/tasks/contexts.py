"""What a UNet's cross-attention reads where that is no text: a class, a layout, or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastldm.models.bert import BERTModel
from fastldm.models.clip import CLIPTextModel
from fastldm.models.conditioners import ClassEmbedder
from fastldm.models.layouts import Box, layout_tokens


class Shown(Protocol):
    """What a request for n images shows, one entry an image: see `fastldm.arguments.Request`."""

    @property
    def count(self) -> int: ...

    @property
    def guided(self) -> bool: ...

    @property
    def labels(self) -> list[int] | None: ...

    @property
    def layouts(self) -> list[Any] | None: ...


def textless_context(
    embedder: ClassEmbedder | None, encoder: BERTModel | CLIPTextModel | None, request: Shown
) -> Tensor:
    """context [n, L, D], or guided [2n, L, D] with the unconditional half first; without a network to make
    one [n, 0, 0].
    """
    if embedder is not None and request.labels is not None:
        return class_context(embedder, request.labels, request.guided)
    if isinstance(encoder, BERTModel) and request.layouts is not None:
        return layout_context(encoder, request.layouts)
    return torch.empty(request.count, 0, 0)


def class_context(embedder: ClassEmbedder, labels: Sequence[int], guided: bool) -> Tensor:
    """Labels → context [n, 1, D]; guided [2n, 1, D], n times the class that is none first."""
    none = [embedder.config.n_classes - 1] * len(labels) if guided else []
    made: Tensor = embedder(torch.tensor([*none, *labels], device=embedder.embedding.weight.device))
    return made


def layout_context(encoder: BERTModel, layouts: Iterable[Iterable[tuple[str | int, Box]]]) -> Tensor:
    """Layouts of numbered classes → context [n, L, D], each encoded alone."""
    device = next(encoder.parameters()).device
    rows = []
    for layout in layouts:
        objects = [(int(number), box) for number, box in layout]
        rows.append(encoder(torch.tensor([layout_tokens(objects, encoder.config)], device=device)))
    return torch.cat(rows)
