"""The text encoder's first training: read the facts out of a caption, before any picture is seen.

A text encoder that starts from nothing costs the diffusion model most of its steps. Reading captions is
cheap to learn, and what it learns is what the pictures need: which colour belongs to the object and which
to the background.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.models.clip import CLIPTextConfig, CLIPTextModel
from fastldm.models.layers import Linear
from fastldm.models.tokenizer import Tokenizer
from fastldm.scenes.captions import FACTS, VOCABULARY
from fastldm.training.config import TrainConfig
from fastldm.training.data import SceneData
from fastldm.training.fit import fit


def token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """The first chunk of each text: int64 [rows, max_length]."""
    return torch.tensor([tokenizer.encode(text).chunks[0] for text in texts])


class CaptionReader(nn.Module):
    """A text encoder with one linear classifier a fact, on the last token's state, which has seen the whole
    caption.
    """

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(
            [Linear(encoder.config.hidden_size, len(classes)) for classes in FACTS.values()]
        )

    def forward(self, ids: Tensor) -> list[Tensor]:
        """Token ids [rows, L] → logits of each fact [rows, classes]."""
        last = self.encoder(ids)[:, -1]
        return [head(last) for head in self.heads]


def reader_loss(logits: list[Tensor], labels: Tensor) -> Tensor:
    """Mean cross-entropy over the facts that were told; labels int64 [rows, facts], −1 where untold."""
    parts = [F.cross_entropy(fact, labels[:, i], ignore_index=-1) for i, fact in enumerate(logits)]
    return torch.stack(parts).mean()


def train_text_encoder(
    config: TrainConfig, data: SceneData, report: Callable[[str], None] = print
) -> tuple[Tokenizer, CLIPTextModel]:
    """Train from the seed, or resume; the classifiers are dropped."""
    section = config.text
    tokenizer = Tokenizer.from_words(VOCABULARY, section.length)
    torch.manual_seed(config.seed + 1)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=section.width,
            intermediate_size=4 * section.width,
            num_hidden_layers=section.layers,
            num_attention_heads=section.heads,
            max_position_embeddings=section.length,
            hidden_act="gelu",
            eos_token_id=tokenizer.eos_id,
            projection_dim=section.width,
        )
    )
    reader = CaptionReader(encoder)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(data.scenes), (section.fit.batch,), generator=generator).tolist()
        texts, labels = data.captions(rows, generator)
        return reader_loss(reader(token_ids(tokenizer, texts)), labels)

    fit("text", reader, loss, section.fit, config.folder, config.seed + 1, report)
    return tokenizer, encoder
