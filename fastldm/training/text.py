"""The text encoder's first training: read the facts out of a caption, before any picture is seen.

A text encoder that starts from nothing costs the diffusion model most of its steps. Reading captions is
cheap to learn, and what it learns is what the pictures need: which colour belongs to which object, how many
there are, and what lies behind them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.models.clip import CLIPTextConfig, CLIPTextModel
from fastldm.models.layers import Linear
from fastldm.models.tokenizer import Tokenizer
from fastldm.scenes import (
    COLOURS,
    KINDS,
    LANDSCAPES,
    POSITIONS,
    RELATIONS,
    SIZES,
    SKIES,
    STYLES,
    Scene,
    relation,
)
from fastldm.training.data import SceneData
from fastldm.training.origin import digest
from fastldm.training.session import Session

UNTOLD = -1
QUESTIONS: dict[str, int] = (
    {f"number of {kind}": 5 for kind in KINDS}
    | {f"colour of {kind}": len(COLOURS) for kind in KINDS}
    | {"background": len(COLOURS) + len(LANDSCAPES), "sky": len(SKIES), "style": len(STYLES)}
    | {"size": len(SIZES), "position": len(POSITIONS)}
    | {f"relation of {kind}": len(RELATIONS) for kind in KINDS}
)
"""What a reader of captions is asked, and how many answers there are."""


def answers(scene: Scene, told: frozenset[str]) -> list[int]:
    """The answer to each of QUESTIONS that a caption with these facts gives, UNTOLD where it gives none."""
    found = dict.fromkeys(QUESTIONS, UNTOLD)
    for kind in KINDS:
        things = [thing for thing in scene.objects if thing.kind == kind]
        found[f"number of {kind}"] = len(things)
        if "colour" in told and len({thing.colour for thing in things}) == 1:
            found[f"colour of {kind}"] = COLOURS.index(things[0].colour)
    if "background" in told:
        found["background"] = (*COLOURS, *LANDSCAPES).index(scene.background)
        if scene.sky is not None and "sky" in told:
            found["sky"] = SKIES.index(scene.sky)
    if "style" in told:
        found["style"] = STYLES.index(scene.style)
    if len({thing.size for thing in scene.objects}) == 1 and "size" in told:
        found["size"] = list(SIZES).index(scene.objects[0].size)
    if len(scene.objects) == 1 and "position" in told and scene.objects[0].position is not None:
        found["position"] = POSITIONS.index(scene.objects[0].position)
    if len(scene.objects) == 2 and "relation" in told:
        first, second = scene.objects
        for one, other in ((first, second), (second, first)):
            word = relation(one, other)
            if word is not None and one.kind != other.kind:
                found[f"relation of {one.kind}"] = RELATIONS.index(word)
    return list(found.values())


def token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """The first chunk of each text: int64 [rows, max_length]."""
    return torch.tensor([tokenizer.encode(text).chunks[0] for text in texts])


def vocabulary_digest(tokenizer: Tokenizer) -> str:
    """Of the tokens and their ids."""
    return digest(sorted(tokenizer.backend.get_vocab().items()))


def without_some(texts: Sequence[str], chance: float, generator: torch.Generator) -> list[str]:
    """The texts, each empty with this chance: caption dropout. (Ho & Salimans 2022, arXiv:2207.12598)"""
    dropped = torch.rand(len(texts), generator=generator) < chance
    return ["" if drop else text for text, drop in zip(texts, dropped.tolist(), strict=True)]


class CaptionReader(nn.Module):
    """A text encoder with one linear classifier a question, on the last token's state, which has seen the
    whole caption.
    """

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = Linear(encoder.config.hidden_size, sum(QUESTIONS.values()))

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Token ids [rows, L] → logits of each question [rows, answers]."""
        return self.heads(self.encoder(ids)[:, -1]).split(list(QUESTIONS.values()), dim=1)


def reader_loss(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy over the answers that were told, summed over questions and averaged over the rows;
    labels int64 [rows, questions], UNTOLD where untold.
    """
    parts = [
        F.cross_entropy(answer.float(), labels[:, i], ignore_index=UNTOLD, reduction="sum")
        for i, answer in enumerate(logits)
    ]
    return torch.stack(parts).sum() / len(labels)


def new_text_encoder(session: Session, tokenizer: Tokenizer) -> CLIPTextModel:
    """The text encoder of a configuration, from the seed."""
    section = session.config.text
    torch.manual_seed(session.config.seed + 1)
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
    return encoder.to(session.device)


def train_text_encoder(
    session: Session, tokenizer: Tokenizer, encoder: CLIPTextModel, data: SceneData
) -> None:
    """Train as a reader of captions, or resume; the classifiers are dropped."""
    settings = session.config.text.fit
    if settings is None:
        return
    reader = CaptionReader(encoder).to(session.device)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(data.scenes), (settings.batch,), generator=generator).tolist()
        texts, facts = zip(*data.captions(rows, generator), strict=True)
        labels = [answers(data.scenes[row], told) for row, told in zip(rows, facts, strict=True)]
        ids = token_ids(tokenizer, texts).to(session.device)
        return reader_loss(reader(ids), torch.tensor(labels, device=session.device))

    origin = {
        "set of pictures": data.pictures_digest,
        "vocabulary": vocabulary_digest(tokenizer),
        "network": digest(encoder.config),
    }
    session.fit("text", reader, loss, settings, seed=1, origin=origin)
