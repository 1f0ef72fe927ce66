"""Prompts to the context that a UNet's cross-attention reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fastldm.errors import InvalidArgument
from fastldm.models.clip import CLIPTextModel
from fastldm.models.tokenizer import TokenizedPrompt, Tokenizer

Chunk: TypeAlias = tuple[tuple[int, ...], tuple[float, ...]]  # token ids, weights


@dataclass(frozen=True)
class TextEmbeddings:
    """`context` [rows, chunks·L, D], negative prompts first, and what the user should know of it.

    `lengths` int64 [rows]: how many tokens of each row count; the rest is filling, to be masked (the UNet's
    context_length). None: all of them.
    """

    context: Tensor
    warnings: tuple[str, ...] = ()
    lengths: Tensor | None = None


class TextConditioner:
    """A tokenizer and a text encoder; `encode` is pure, so threads may share one."""

    def __init__(self, tokenizer: Tokenizer, text_encoder: CLIPTextModel) -> None:
        """Raises InvalidArgument if the tokenizer has tokens that the encoder does not know."""
        known = text_encoder.config.vocab_size
        if tokenizer.vocab_size > known:
            allowed = f"at most the {known} tokens that the text encoder knows"
            raise InvalidArgument("tokenizer", f"{tokenizer.vocab_size} tokens", allowed)
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.length = min(tokenizer.max_length, text_encoder.config.max_position_embeddings)

    @torch.no_grad()
    def encode(self, prompts: list[str], negatives: list[str] | None = None) -> TextEmbeddings:
        """Embed n prompts, and before them their n negative prompts if given.

        A prompt and its negative get the same number of chunks: the shorter goes on with empty ones. Nothing
        depends on what else is in the list: pairs shorter than the longest are filled up, but `lengths` takes
        the filling away again, and every distinct chunk goes through the encoder alone.
        """
        if negatives is not None and len(negatives) != len(prompts):
            raise InvalidArgument("negative_prompt", negatives, f"{len(prompts)}, one a prompt")
        rows = [self.tokenizer.encode(text, self.length) for text in (*(negatives or ()), *prompts)]
        empty = self.tokenizer.encode("", self.length)
        longest = [max(len(row.chunks) for row in rows[i :: len(prompts)]) for i in range(len(prompts))]
        chunks = longest * (len(rows) // len(prompts))

        seen: dict[Chunk, Tensor] = {}
        context = torch.stack([self._embed(row, empty, max(chunks), seen) for row in rows])
        lengths = None
        if min(chunks) != max(chunks):
            lengths = torch.tensor(chunks, device=context.device) * self.length
        unknown = dict.fromkeys(word for row in rows for word in row.unknown)
        warnings = (f"unknown words: {', '.join(unknown)}",) if unknown else ()
        return TextEmbeddings(context, warnings, lengths)

    def _embed(
        self, prompt: TokenizedPrompt, empty: TokenizedPrompt, chunks: int, seen: dict[Chunk, Tensor]
    ) -> Tensor:
        """The prompt's chunks, then empty ones, `chunks` in all → [chunks·L, D]; `seen` keeps those done."""
        keys = list(zip(prompt.chunks, prompt.weights, strict=True))
        keys += list(zip(empty.chunks, empty.weights, strict=True)) * (chunks - len(keys))
        for ids, weights in keys:
            if (ids, weights) not in seen:
                device = next(self.text_encoder.parameters()).device
                embedding = self.text_encoder(torch.tensor([ids], device=device))[0]
                seen[ids, weights] = weigh(embedding, weights)
        return torch.cat([seen[key] for key in keys])


def weigh(embedding: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Each token's embedding times its weight, then all shifted by the one number that restores the mean.

    embedding [L, D] is one chunk; computed in float32. If all weights are 1 it comes back as it is. Other
    programs scale by the ratio of the means; but what leaves a layer norm may have a mean near 0, and then
    that ratio is arbitrary.
    """
    if all(weight == 1 for weight in weights):
        return embedding
    before = embedding.float()
    after = before * torch.tensor(weights, device=embedding.device)[:, None]
    return (after + (before.mean() - after.mean())).to(embedding.dtype)
