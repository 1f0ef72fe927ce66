"""The configuration of a training run: one TOML file, a section for each stage."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastldm.checks import choice, integer, number
from fastldm.diffusion import Objective, SchedulerConfig
from fastldm.errors import InvalidArgument
from fastldm.scenes.palette import IMAGE_SIZE
from fastldm.training.adversarial import AdversarySettings
from fastldm.training.fit import MOST, FitSettings
from fastldm.training.sections import AutoencoderSection, DiffusionSection, TextSection, absent, scenes_drawn

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]


DEVICES = ("auto", "cpu", "cuda")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MAX_RANK = 4096
DRAWN = "with data, of which all is learned"


@dataclass(frozen=True)
class TrainConfig:
    """A whole run. `folder` keeps the states to resume from; `output` is the model folder that it ends
    with.
    """

    folder: Path
    output: Path
    autoencoder: AutoencoderSection
    diffusion: DiffusionSection
    text: TextSection = TextSection()
    seed: int = 0
    data: Path | None = None  # a folder of pictures with captions; None: the world of fastldm.scenes
    side: int = 128  # of the pictures, in pixels
    pictures: int = 20_000  # scenes that the autoencoder and the text encoder learn from
    stage: int = 1  # of the world that they learn
    threads: int = 2
    device: str = "auto"  # or cpu, cuda
    start: Path | None = None  # a model folder to go on from
    bfloat16: bool = False  # products and convolutions in bfloat16, weights and sums in float32
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """InvalidArgument for values out of range and for choices that contradict each other."""
        choice("device", self.device, DEVICES)
        integer("threads", self.threads, 1, MOST)
        scenes_drawn(self)
        section = self.autoencoder
        if self.start is not None:
            absent(self.text, (f.name for f in fields(self.text)), "with start, which has its own", "text.")
        elif section.fit is None and not section.of_pixels:
            raise InvalidArgument("autoencoder.fit", None, "a section, without a model to start from")
        if section.of_pixels and self.diffusion.reading:
            raise InvalidArgument("diffusion.reading", self.diffusion.reading, "0 where kind is pixels")
        multiple = section.factor * 2 ** (len(self.diffusion.block_out_channels) - 1)
        if not self.side or self.side % multiple:
            raise InvalidArgument("side", self.side, f"a multiple of {multiple}, which the levels divide")
        if self.data is None and self.side != IMAGE_SIZE:
            raise InvalidArgument("side", self.side, f"{IMAGE_SIZE}, the scenes' own, without data")
        if section.learns and section.crop not in range(section.factor, self.side + 1, section.factor):
            allowed = f"a multiple of {section.factor}, at most the side, {self.side}"
            raise InvalidArgument("autoencoder.crop", section.crop, allowed)
        if self.data is not None:
            told = "with data: only scenes tell what they show"
            absent(self.text, ("fit",), told, "text.")
            absent(section, ("alignment",), told, "autoencoder.")
            absent(self.diffusion, ("reading",), told, "diffusion.")
            absent(self, ("pictures", "stage"), DRAWN)
            absent(self.diffusion, ("pictures", "stage", "arranged"), DRAWN, "diffusion.")

    @property
    def scheduler(self) -> SchedulerConfig:
        """The process that a new model is trained for and sampled by; pixels are held to their range."""
        plain = self.diffusion.scheduler
        return replace(plain, clip_sample=True) if self.autoencoder.of_pixels else plain


@dataclass(frozen=True)
class JudgeSection:
    """The judge of scenes and its optimisation."""

    fit: FitSettings
    spoilt: float = 0.25  # share of pictures with a shape or colours that are none of ours

    def __post_init__(self) -> None:
        """InvalidArgument for a share out of range."""
        number("spoilt", self.spoilt, 0, 1)


@dataclass(frozen=True)
class JudgeConfig:
    """A run that trains the judge of scenes; `output` is the file that it ends with."""

    folder: Path
    output: Path
    judge: JudgeSection
    seed: int = 0
    threads: int = 2

    def __post_init__(self) -> None:
        """InvalidArgument for no threads."""
        integer("threads", self.threads, 1, MOST)


@dataclass(frozen=True)
class LoraSettings:
    """What a LoRA changes, and its optimisation. Modules are chosen by the ends of their names, as peft does.

    Raises InvalidArgument for a value out of range.
    """

    fit: FitSettings
    rank: int = 8
    alpha: float | None = None  # None: the rank, so that nothing is scaled
    targets: tuple[str, ...] = ATTENTION  # in the UNet
    text_targets: tuple[str, ...] = ()  # in the text encoder, such as q_proj; none: it stays
    caption_dropout: float = 0.1

    def __post_init__(self) -> None:
        integer("rank", self.rank, 1, MAX_RANK)
        number("caption_dropout", self.caption_dropout, 0, 1)
        if self.alpha is not None:
            number("alpha", self.alpha, 1e-6, 1e6)
        if not (self.targets or self.text_targets):
            raise InvalidArgument("targets", (), "at least one, or text_targets")


@dataclass(frozen=True)
class LoraConfig:
    """A run that learns a LoRA of a model; `output` is the folder of it that the run ends with."""

    folder: Path
    output: Path
    start: Path  # the model, as `fastldm.load` takes it
    lora: LoraSettings
    seed: int = 0
    data: Path | None = None  # a folder of pictures with captions; None: the world of fastldm.scenes
    side: int | None = None  # of the pictures, in pixels; None: of the scenes, or the model's own
    pictures: int = 2_000  # scenes to draw
    stage: int = 1  # of the world: see fastldm.scenes.mixture
    threads: int = 2
    device: str = "auto"  # or cpu, cuda
    bfloat16: bool = False  # products and convolutions in bfloat16, weights and sums in float32
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """InvalidArgument for values out of range and for choices that contradict each other."""
        choice("device", self.device, DEVICES)
        integer("threads", self.threads, 1, MOST)
        scenes_drawn(self)
        if self.data is not None:
            absent(self, ("pictures", "stage"), DRAWN)
        elif self.side not in (None, IMAGE_SIZE):
            raise InvalidArgument("side", self.side, f"{IMAGE_SIZE}, the scenes' own, without data")


def read_config(file: Path) -> TrainConfig | JudgeConfig | LoraConfig:
    """Read a TOML file: a judge's or a LoRA's when it has a section of that name, else a model's.

    InvalidArgument names a key that is unknown, missing or of the wrong type, with the nearest known one, and
    sections that contradict each other.
    """
    try:
        with open(file, "rb") as stream:
            given = tomllib.load(stream)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InvalidArgument("config", str(file), f"a readable TOML file ({error})") from None
    for name, kind in (("judge", JudgeConfig), ("lora", LoraConfig)):
        if name in given:
            for other in ("lora", "autoencoder", "text", "diffusion"):
                if other in given and other != name:
                    raise InvalidArgument(other, "a section", f"absent beside {name}, which is all of a run")
            made: JudgeConfig | LoraConfig = _build(kind, given, "")
            return made
    model: TrainConfig = _build(TrainConfig, given, "")
    return model


def _build(cls: type, given: Mapping[str, Any], where: str) -> Any:
    known = {f.name: f for f in fields(cls)}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InvalidArgument(where + name, given[name], f"one of {', '.join(known)}{hint}")
    values = {}
    for name, f in known.items():
        if name in given:
            values[name] = _value(f.type, given[name], where + name)
        elif f.default is MISSING:
            raise InvalidArgument(where + name, None, f"required: {f.type}")
    try:
        return cls(**values)
    except InvalidArgument as error:  # of a section, which does not know its own name
        raise InvalidArgument(where + error.name, error.value, error.allowed) from None


_SECTIONS = {
    section.__name__: section
    for section in (
        AutoencoderSection,
        TextSection,
        DiffusionSection,
        JudgeSection,
        LoraSettings,
        FitSettings,
        Objective,
        AdversarySettings,
    )
}


def _value(kind: Any, given: Any, name: str) -> Any:
    kind = (kind if isinstance(kind, str) else kind.__name__).removesuffix(" | None")
    if kind in _SECTIONS:
        if isinstance(given, dict):
            return _build(_SECTIONS[kind], given, name + ".")
    elif kind == "tuple[int, ...]":
        if isinstance(given, list) and given and all(type(item) is int and item >= 0 for item in given):
            return tuple(given)
    elif kind == "tuple[str, ...]":
        if isinstance(given, list) and all(isinstance(item, str) and item for item in given):
            return tuple(given)
    elif kind == "Path":
        if isinstance(given, str):
            return Path(given).expanduser()
    elif kind == "str":
        if isinstance(given, str):
            return given
    elif kind == "bool":
        if isinstance(given, bool):
            return given
    elif kind == "float" and type(given) in (int, float) and 0 <= given < float("inf"):
        return float(given)
    elif kind == "int" and type(given) is int and given >= 0:
        return given
    raise InvalidArgument(name, given, f"a {kind}, not negative")


__all__ = [
    "AutoencoderSection",
    "DiffusionSection",
    "JudgeConfig",
    "JudgeSection",
    "LoraConfig",
    "LoraSettings",
    "TextSection",
    "TrainConfig",
    "read_config",
]
