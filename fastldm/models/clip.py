"""CLIP's text encoder: token ids to what cross-attention reads. (Radford et al. 2021, arXiv:2103.00020)"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm import ops
from fastldm.errors import CheckpointError
from fastldm.models.config import read_config
from fastldm.models.layers import LayerNorm, Linear, merge_heads, split_heads

# Fields that transformers writes into every config.json and that a forward pass of this encoder never reads.
_INERT = frozenset(
    """
    architectures attention_dropout bos_token_id dropout dtype initializer_factor initializer_range model_type
    pad_token_id torch_dtype transformers_version
    begin_suppress_tokens chunk_size_feed_forward diversity_penalty encoder_no_repeat_ngram_size id2label
    label2id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences repetition_penalty return_dict temperature tie_word_embeddings top_k top_p typical_p
    use_cache
    """.split()
)
_FIXED = {"pruned_heads": {}, "position_embedding_type": "absolute"}


def quick_gelu(x: Tensor) -> Tensor:
    """x σ(1.702 x): what OpenAI trained CLIP with. (Hendrycks & Gimpel 2016, arXiv:1606.08415)"""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True)
class CLIPTextConfig:
    """A text encoder's shape; the defaults are what transformers takes for fields missing in a file."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    # Kept for the file: the last hidden state does not depend on them.
    eos_token_id: int = 49407
    projection_dim: int = 512

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], file: str = "text_encoder/config.json") -> CLIPTextConfig:
        """Read the fields of transformers' config.json; CheckpointError for one this network lacks."""
        kind = fields.get("model_type", "clip_text_model")
        if kind != "clip_text_model":
            raise CheckpointError(file, "model_type", f"is {kind!r}; fastldm supports 'clip_text_model'")
        config = cls(**read_config(cls, fields, file, fixed=_FIXED, inert=_INERT))
        if config.hidden_act not in ACTIVATIONS:
            raise CheckpointError(
                file, "hidden_act", f"is {config.hidden_act!r}; known are {', '.join(ACTIVATIONS)}"
            )
        if config.hidden_size % config.num_attention_heads:
            why = f"{config.num_attention_heads} heads do not divide hidden_size {config.hidden_size}"
            raise CheckpointError(file, "num_attention_heads", why)
        if config.max_position_embeddings < 3:  # beginning, a token, end
            why = f"is {config.max_position_embeddings}; expected at least 3"
            raise CheckpointError(file, "max_position_embeddings", why)
        if config.num_hidden_layers > 256:
            raise CheckpointError(
                file, "num_hidden_layers", f"is {config.num_hidden_layers}; expected at most 256"
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """The transformers text_encoder/config.json of this encoder."""
        return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **asdict(self)}


CLIP_L = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)
# Stable Diffusion 2 reads the last but one of 24 layers, so its files hold 23.
OPENCLIP_H = CLIPTextConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
)


class CLIPTextModel(nn.Module):
    """Token ids [rows, L] → last hidden states [rows, L, hidden_size], after the final norm; causal.

    L is at most max_position_embeddings, ids are below vocab_size. State-dict keys are those of checkpoints
    (transformers 5.6 and later leave out the leading `text_model.`).
    """

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = Transformer(config)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.text_model(ids)
        return hidden


class Transformer(nn.Module):
    """Embeddings, layers, final norm."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))


class Embeddings(nn.Module):
    """Token embedding + position embedding; drawn as CLIP's were, N(0, 0.02²) and N(0, 0.01²)."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.token_embedding.weight) + self.position_embedding.weight[: ids.shape[1]]


class Encoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = CausalAttention(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = self.self_attn(self.layer_norm1(x), residual=x)
        hidden: Tensor = self.mlp(self.layer_norm2(x), residual=x)
        return hidden


class CausalAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and those before it, added to the residual."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        q, k, v = (split_heads(project(x), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        mixed = ops.attention(q, k, v, causal=True)
        return self.out_proj(merge_heads(mixed), residual)


class MLP(nn.Module):
    """Linear, activation, linear, added to the residual."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        hidden: Tensor = self.fc2(self.activation(self.fc1(x)), residual)
        return hidden
