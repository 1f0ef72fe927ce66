"""What peft says of a LoRA beside its factors: in adapter_config.json, or in a file's header (diffusers)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from fastldm.checkpoint.container import SafetensorsFile
from fastldm.checkpoint.limits import parse_json, read_json
from fastldm.checkpoint.lora_names import PEFT, TEXT_LEVEL
from fastldm.errors import CheckpointError

CONFIG_FILE = "adapter_config.json"
METADATA = "lora_adapter_metadata"

# Fields that make the formula another one, and the values with which they do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False,),
    "use_qalora": (False,),
    "fan_in_fan_out": (False,),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
}


@dataclass(frozen=True)
class LoraConfig:
    """How the factors of one network are scaled: by alpha / rank, or alpha / √rank where rank-stabilised.

    `alphas` are those of single modules, by the end of their names, or the whole of it after a "^".
    """

    common_alpha: float | None = None  # None: the rank
    alphas: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False  # (Kalajdzievski 2023, arXiv:2312.03732)

    def scale(self, module: str, rank: int, alpha: float | None) -> float:
        """What the factors of this module are multiplied by; `alpha` is that of the file itself, if any."""
        if alpha is None:
            parts = module.split(".")
            names = {".".join(parts[start:]) for start in range(len(parts))}
            names |= {f"^{module}", f"^{module.removeprefix(TEXT_LEVEL)}"}
            own = next((value for name, value in self.alphas.items() if name in names), None)
            alpha = own or self.common_alpha or rank
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], file: str | os.PathLike[str]) -> LoraConfig:
        """Read peft's fields; CheckpointError for one that is damaged, or means more than a plain LoRA."""

        def refuse(name: str, why: str) -> NoReturn:
            raise CheckpointError(file, name, why)

        def alpha(name: str, value: Any) -> float:
            if type(value) not in (int, float) or not 0 < value < math.inf:
                refuse(name, f"is {value!r:.40}; expected a number above 0")
            return float(value)

        for name, plain in _PLAIN.items():
            if fields.get(name, plain[0]) not in plain:
                refuse(name, f"is {fields[name]!r:.40}; fastldm merges plain LoRA only")
        common, alphas = fields.get("lora_alpha"), fields.get("alpha_pattern") or {}
        if not isinstance(alphas, dict):
            refuse("alpha_pattern", "must map modules to numbers")
        for name in alphas:
            if not re.fullmatch(r"\^?[\w.]+", name):
                refuse("alpha_pattern", f"{name!r:.80} is no module name; fastldm follows no patterns")
        return cls(
            None if common is None else alpha("lora_alpha", common),
            {name: alpha(f"alpha_pattern {name}", value) for name, value in alphas.items()},
            fields.get("use_rslora", False) is True,
        )


def read_lora_config(file: SafetensorsFile, part: str) -> LoraConfig:
    """The configuration of a network's share in a LoRA file; the default where nothing is said of it."""
    if METADATA in file.metadata:
        fields = parse_json(file.metadata[METADATA].encode(), file.path, METADATA)
        if not isinstance(fields, dict):
            raise CheckpointError(file.path, METADATA, "holds no JSON object")
        if "lora_alpha" not in fields:  # else of a network saved alone
            start = f"{part}."
            fields = {name.removeprefix(start): fields[name] for name in fields if name.startswith(start)}
        return LoraConfig.from_dict(fields, file.path)
    beside = file.path.with_name(CONFIG_FILE)
    if beside.is_file() and any(key.startswith(PEFT) for key in file.entries):
        return LoraConfig.from_dict(read_json(beside), beside)
    return LoraConfig()


def peft_fields(rank: int, alpha: float, modules: Sequence[str]) -> dict[str, Any]:
    """The fields that peft needs to make the same LoRA of these modules; it matches the ends of names."""
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(name.removeprefix(TEXT_LEVEL) for name in modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }
