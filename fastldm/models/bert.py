"""The text encoder that latent diffusion trained with its first text model: token ids to what
cross-attention reads. (Rombach et al. 2022, arXiv:2112.10752, section D.1)

A BERT in its vocabulary alone: layers are normed before their work, and nothing tells padding from words.
Layouts are encoded by one too, their boxes written as tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastldm import ops
from fastldm.errors import CheckpointError
from fastldm.models.config import read_config
from fastldm.models.layers import LayerNorm, Linear, merge_heads, split_heads

LDM_BERT = "ldmbert"
_FIXED = {"activation_function": "gelu", "model_type": LDM_BERT}
_INERT = frozenset(
    """
    architectures encoder_layerdrop dropout attention_dropout activation_dropout init_std classifier_dropout
    use_cache pad_token_id num_hidden_layers dtype torch_dtype transformers_version
    """.split()
)


@dataclass(frozen=True)
class BERTConfig:
    """A text encoder's shape; the names are those of diffusers' LDMBertModel."""

    vocab_size: int = 30522
    max_position_embeddings: int = 77
    encoder_layers: int = 32
    encoder_ffn_dim: int = 5120
    encoder_attention_heads: int = 8
    head_dim: int = 64
    d_model: int = 1280

    @property
    def hidden_size(self) -> int:
        """Width of the context."""
        return self.d_model

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], file: str = "text_encoder/config.json") -> BERTConfig:
        """Read the fields of an LDMBert's config.json; CheckpointError for one that this network lacks."""
        config = cls(**read_config(cls, fields, file, fixed=_FIXED, inert=_INERT))
        if config.max_position_embeddings < 3:  # beginning, a token, end
            why = f"is {config.max_position_embeddings}; expected at least 3"
            raise CheckpointError(file, "max_position_embeddings", why)
        for name, most in (("encoder_layers", 128), ("encoder_attention_heads", 256)):
            if getattr(config, name) > most:
                raise CheckpointError(file, name, f"is {getattr(config, name)}; expected at most {most}")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The config.json of this encoder as an LDMBert's."""
        return {"architectures": ["LDMBertModel"], "model_type": LDM_BERT, **vars(self)}


class BERTModel(nn.Module):
    """Token ids [rows, L] → last hidden states [rows, L, d_model], after the final norm.

    L is at most max_position_embeddings, ids are below vocab_size; every token sees every other. State-dict
    keys are those of diffusers' LDMBertModel, without its unused `to_logits`.
    """

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Encoder(config)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.model(ids)
        return hidden


class Encoder(nn.Module):
    """Token embedding + position embedding, layers, final norm."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.d_model)
        for embedding in (self.embed_tokens, self.embed_positions):
            nn.init.normal_(embedding.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.encoder_layers))
        self.layer_norm = LayerNorm(config.d_model)

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.embed_tokens.weight) + self.embed_positions.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.layer_norm(x)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + fc2(gelu(fc1(norm(x))))."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.self_attn_layer_norm = LayerNorm(config.d_model)
        self.self_attn = SelfAttention(config)
        self.final_layer_norm = LayerNorm(config.d_model)
        self.fc1 = Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = Linear(config.encoder_ffn_dim, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = self.self_attn(self.self_attn_layer_norm(x), residual=x)
        hidden: Tensor = self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))), x)
        return hidden


class SelfAttention(nn.Module):
    """Multi-head self-attention with heads of a width of their own, added to the residual."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.heads = config.encoder_attention_heads
        inner = self.heads * config.head_dim
        self.q_proj = Linear(config.d_model, inner, bias=False)
        self.k_proj = Linear(config.d_model, inner, bias=False)
        self.v_proj = Linear(config.d_model, inner, bias=False)
        self.out_proj = Linear(inner, config.d_model)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        q, k, v = (split_heads(project(x), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(merge_heads(ops.attention(q, k, v)), residual)
