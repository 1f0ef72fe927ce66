"""Prompts to the context that a UNet's cross-attention reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from fastldm.errors import InvalidArgument
from fastldm.models.bert import BERTModel
from fastldm.models.clip import CLIPTextModel
from fastldm.models.tokenizer import TokenizedPrompt, Tokenizer

Chunk: TypeAlias = tuple[tuple[int, ...], tuple[float, ...]]  # token ids, weights
# What a chunk was embedded to, or else is embedded to now, as [L, D].
Recall: TypeAlias = Callable[[Chunk, Callable[[], Tensor]], Tensor]


@dataclass(frozen=True)
class TextEmbeddings:
    """`context` [rows, chunks·L, D], negative prompts first, and what the user should know of it.

    `lengths` int64 [rows]: how many tokens of each row count; the rest is filling, to be masked (the UNet's
    context_length). None: all of them. `chunks`: what each row was made of, equal for equal rows; None where
    it came from elsewhere.
    """

    context: Tensor
    warnings: tuple[str, ...] = ()
    lengths: Tensor | None = None
    chunks: tuple[tuple[Chunk, ...], ...] | None = None


class TextConditioner:
    """A tokenizer and a text encoder; `encode` is pure, so threads may share one."""

    def __init__(self, tokenizer: Tokenizer, text_encoder: CLIPTextModel | BERTModel) -> None:
        """Raises InvalidArgument if the tokenizer has tokens that the encoder does not know."""
        known = text_encoder.config.vocab_size
        if tokenizer.vocab_size > known:
            allowed = f"at most the {known} tokens that the text encoder knows"
            raise InvalidArgument("tokenizer", f"{tokenizer.vocab_size} tokens", allowed)
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.length = min(tokenizer.max_length, text_encoder.config.max_position_embeddings)

    @torch.no_grad()
    def encode(
        self,
        prompts: list[str],
        negatives: list[str] | None = None,
        recall: Recall | None = None,
        run: Callable[[Tensor], Tensor] | None = None,
    ) -> TextEmbeddings:
        """Embed n prompts, and before them their n negative prompts if given.

        A prompt and its negative get the same number of chunks: the shorter goes on with empty ones. Nothing
        depends on what else is in the list: pairs shorter than the longest are filled up, but `lengths` takes
        the filling away again, and every distinct chunk goes through the encoder alone. `recall` may know
        chunks of earlier calls; `run`, if given, is the encoder in another form: ids [1, L] → [1, L, D].
        """
        if negatives is not None and len(negatives) != len(prompts):
            raise InvalidArgument("negative_prompt", negatives, f"{len(prompts)}, one a prompt")
        rows = [self.tokenizer.encode(text, self.length) for text in (*(negatives or ()), *prompts)]
        empty = self.tokenizer.encode("", self.length)
        longest = [max(len(row.chunks) for row in rows[i :: len(prompts)]) for i in range(len(prompts))]
        counts = longest * (len(rows) // len(prompts))
        chunks = tuple(_chunks(row, empty, max(counts)) for row in rows)

        device = next(self.text_encoder.parameters()).device
        encoder = run or self.text_encoder

        def embed(chunk: Chunk) -> Tensor:
            ids, weights = chunk
            return weigh(encoder(torch.tensor([ids]).to(device))[0], weights)

        distinct = dict.fromkeys(chunk for row in chunks for chunk in row)
        known = {
            chunk: recall(chunk, partial(embed, chunk)) if recall else embed(chunk) for chunk in distinct
        }
        context = torch.stack([torch.cat([known[chunk] for chunk in row]) for row in chunks])
        lengths = None
        if min(counts) != max(counts):
            lengths = torch.tensor(counts, device=device) * self.length
        unknown = dict.fromkeys(word for row in rows for word in row.unknown)
        warnings = (f"unknown words: {', '.join(unknown)}",) if unknown else ()
        return TextEmbeddings(context, warnings, lengths, chunks)


def _chunks(prompt: TokenizedPrompt, empty: TokenizedPrompt, count: int) -> tuple[Chunk, ...]:
    """The prompt's chunks, then empty ones, `count` in all."""
    own = list(zip(prompt.chunks, prompt.weights, strict=True))
    filling = list(zip(empty.chunks, empty.weights, strict=True))
    return tuple(own + filling * (count - len(own)))


def weigh(embedding: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Each token's embedding times its weight, then all shifted by the one number that restores the mean.

    embedding [L, D] is one chunk; computed in float32. If all weights are 1 it comes back as it is. Other
    programs scale by the ratio of the means; but what leaves a layer norm may have a mean near 0, and then
    that ratio is arbitrary.
    """
    if all(weight == 1 for weight in weights):
        return embedding
    before = embedding.float()
    after = before * torch.tensor(weights, dtype=torch.float32, device=embedding.device)[:, None]
    return (after + (before.mean() - after.mean())).to(embedding.dtype)
