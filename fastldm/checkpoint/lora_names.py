"""The names of LoRA files: every spelling of a module, and of the factors that belong to it.

peft        base_model.model.down_blocks.0.….to_q.lora_A.weight
diffusers   unet.down_blocks.0.….to_q.lora_A.weight, ….lora.down.weight, ….processor.to_q_lora.down.weight;
            text_encoder.….q_proj.lora_linear_layer.down.weight, or ….self_attn.to_q_lora.down.weight
kohya       lora_unet_down_blocks_0_…_to_q.lora_down.weight, lora_te_text_model_…_q_proj.alpha; some with the
            numbers of the original blocks, lora_unet_input_blocks_1_…
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from fastldm.checkpoint.rename import STAGES, unet_names
from fastldm.models.unet import UNet

PEFT = "base_model.model."
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
TEXT_LEVEL = "text_model."  # left out by transformers 5.6 and later

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:lora_|lora\.|lora_linear_layer\.)(?P<factor>A|B|down|up|mid)\.weight"
)
_ALPHA = re.compile(r"(?P<module>.+)\.(?P<factor>alpha)")
_SAME = {"A": "down", "B": "up"}
# Attention in files of 2023: every projection's factors lie in the attention's processor.
_PROCESSOR = re.compile(r"\.(attn\d|self_attn)\.(?:processor\.)?to_(q|k|v|out)_lora\.")

# What other adapters call their tensors; each is a formula of its own.
_FOREIGN = (
    (re.compile(r"\.(dora_scale|lora_magnitude_vector)"), "DoRA"),
    (re.compile(r"\.hada_"), "LoHa"),
    (re.compile(r"\.lokr_"), "LoKr"),
    (re.compile(r"\.(oft_|boft_)"), "OFT"),
    (re.compile(r"\.lora_embedding_"), "a LoRA of an embedding"),
    (re.compile(r"\.(diff|diff_b|w_norm|b_norm)$"), "full weights beside a LoRA"),
)


class Place(NamedTuple):
    """What a key of a LoRA file stands for: of a module, as "unet.mid_block…", its down, up, mid or alpha."""

    module: str
    factor: str


def adaptable(networks: Mapping[str, nn.Module]) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every module that a LoRA can change, by its name with that of its network before it."""
    return {
        f"{part}.{name}": module
        for part, network in networks.items()
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


class Spellings:
    """All the names that LoRA files give to the modules of these networks ("unet", "text_encoder")."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.modules = adaptable(networks)
        unet = networks.get("unet")
        original = unet_names(unet.config) if isinstance(unet, UNet) else None
        self._known: dict[str, str] = {}
        for module in self.modules:
            part, _, name = module.partition(".")
            flat = {name, name.removeprefix(TEXT_LEVEL)}
            for dotted in flat:
                self._known[dotted] = self._known[f"{part}.{dotted}"] = module
            if part == "unet" and original is not None and (single := original.to_single(name)):
                flat.add(single.removeprefix(STAGES["unet"]))
            for dotted in flat:
                self._known[KOHYA[part] + dotted.replace(".", "_")] = module

    def place(self, key: str) -> Place | None:
        """What this key of a file stands for, None if nothing of these networks."""
        modern = _PROCESSOR.sub(_modern_attention, key).replace(PEFT, "", 1)
        found = _FACTOR.fullmatch(modern) or _ALPHA.fullmatch(modern)
        module = found and self._known.get(found["module"])
        return Place(module, _SAME.get(found["factor"], found["factor"])) if found and module else None

    def why_not(self, keys: Iterable[str]) -> str:
        """Why the first of these keys, none of which has a place, is refused."""
        first, *others = keys
        for pattern, kind in _FOREIGN:
            if pattern.search(first):
                return f"belongs to {kind}, which fastldm does not merge"
        more = f"; so do {len(others)} more" if others else ""
        found = _FACTOR.fullmatch(first) or _ALPHA.fullmatch(first)
        if found is None:
            return f"names no factor of a LoRA{more}"
        asked = found["module"]
        near = difflib.get_close_matches(asked, self._known, 1, cutoff=0)[0] if len(asked) < 200 else None
        hint = f"; the nearest is {near}" if near else ""
        return f"names no module of this model{more}{hint}"


def _modern_attention(old: re.Match[str]) -> str:
    attention, projection = old[1], old[2]
    if attention == "self_attn":  # of the text encoder
        return f".self_attn.{projection}_proj.lora."
    return f".{attention}.{'to_out.0' if projection == 'out' else f'to_{projection}'}.lora."
