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
from fastldm.training.fit import FitSettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]


PREDICTIONS = ("v_prediction", "epsilon", "sample", "flow")
DEVICES = ("auto", "cpu", "cuda")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MAX_RANK = 4096


@dataclass(frozen=True)
class AutoencoderSection:
    """The autoencoder: its shape, and its optimisation on crops, then on whole pictures at the end."""

    block_out_channels: tuple[int, ...] = ()
    latent_channels: int = 0
    fit: FitSettings | None = None  # None: it stays as the model was that a run starts from
    kind: str = "kl"  # or vq, with a codebook; or pixels, which are their own latents: nothing else is given
    codes: int = 1024  # entries of the codebook
    layers_per_block: int = 1
    norm_num_groups: int = 8
    attention_levels: tuple[int, ...] = ()  # where attention follows each residual block; 0: at full size
    mid_attention: bool = True
    crop: int = 64
    whole: float = 0.15  # last share of the steps, on whole pictures, as many pixels a batch
    kl_weight: float = 1e-6
    codebook_weight: float = 1.0
    perceptual: float = 0.0  # weight of the perceptual distance
    lpips: Path | None = None  # weights that make it LPIPS; None: that of Laplacian pyramids
    adversary: AdversarySettings | None = None
    noise: float = 0.0  # largest noise that the decoder is trained to see through, in latents' deviations
    alignment: float = 0.0  # weight of reading the segmentation map out of the latents
    decoder: FitSettings | None = None  # a second turn for the decoder alone; the latents stay what they are

    def __post_init__(self) -> None:
        """InvalidArgument for choices that contradict each other."""
        choice("autoencoder.kind", self.kind, ("kl", "vq", "pixels"))
        for field in fields(self):
            given, name = getattr(self, field.name), f"autoencoder.{field.name}"
            if self.of_pixels and field.name != "kind" and given != field.default:
                raise InvalidArgument(name, given, "absent where kind is pixels")
            if not self.of_pixels and field.name in ("block_out_channels", "latent_channels") and not given:
                raise InvalidArgument(name, given, f"required: {field.type}")
        if self.codes < 1:
            raise InvalidArgument("autoencoder.codes", self.codes, "at least 1")
        levels = len(self.block_out_channels)
        if any(level >= levels for level in self.attention_levels):
            raise InvalidArgument(
                "autoencoder.attention_levels", list(self.attention_levels), f"levels 0 to {levels - 1}"
            )
        if self.lpips is not None and not self.perceptual:
            raise InvalidArgument("autoencoder.lpips", str(self.lpips), "absent without perceptual")
        if self.decoder is not None and self.adversary is not None:
            raise InvalidArgument("autoencoder.decoder", "a section", "absent with an adversary")

    @property
    def of_pixels(self) -> bool:
        """Whether the diffusion model learns pixels."""
        return self.kind == "pixels"

    @property
    def factor(self) -> int:
        """Pixels along a side of one latent."""
        return 1 if self.of_pixels else 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class TextSection:
    """The text encoder: its shape, and on scenes its first training to read the facts of a caption."""

    fit: FitSettings | None = None
    width: int = 128
    layers: int = 2
    heads: int = 4
    length: int = 32


@dataclass(frozen=True)
class DiffusionSection:
    """The latent diffusion model: its shape, what it predicts and is trained for."""

    fit: FitSettings
    block_out_channels: tuple[int, ...]
    transformer_depth: tuple[int, ...]
    heads: tuple[int, ...]
    prediction: str = "v_prediction"  # or epsilon, sample, flow
    objective: Objective = Objective()
    shift: float = 1.0  # of a flow's times towards noise
    layers_per_block: int = 1
    norm_num_groups: int = 8
    caption_dropout: float = 0.1
    reading: float = 0.0  # weight of reading classes and colours from the features, on scenes
    pictures: int = 12_000  # scenes to draw; of a folder all
    stage: int = 1  # of the world: see fastldm.scenes.mixture
    hinted: float = 0.0  # share of the rows that are given a mask, a map or a small picture
    hints: int = 4_000  # pictures that hints are made of

    def __post_init__(self) -> None:
        """InvalidArgument for a prediction and an objective that contradict each other."""
        choice("diffusion.prediction", self.prediction, PREDICTIONS)
        self.objective.check(self.scheduler)

    @property
    def learns_variance(self) -> bool:
        """Whether the UNet answers with the place of the log variance too, which L_vlb trains. (Nichol &
        Dhariwal 2021, arXiv:2102.09672)
        """
        return self.objective.loss in ("hybrid", "vlb")

    @property
    def scheduler(self) -> SchedulerConfig:
        """The process that the model is trained for, as its scheduler_config.json says it.

        A flat picture of 16 × 16 latents shows through much noise, so half of the steps have to be noisier
        than the cosine schedule makes them. It ends in pure noise, so that a background of any colour can be
        drawn; ε is not defined there, so a model of ε keeps a little signal. (Lin et al. 2023,
        arXiv:2305.08891)
        """
        if self.prediction == "flow":
            return SchedulerConfig.from_dict(
                {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": self.shift}
            )
        of_class: dict[str, Any] = {"_class_name": "DDIMScheduler", "set_alpha_to_one": True}
        if self.learns_variance:
            of_class = {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}
        return SchedulerConfig.from_dict(
            {
                **of_class,
                "beta_schedule": "linear",
                "beta_start": 0.0001,
                "beta_end": 0.02,
                "rescale_betas_zero_snr": self.prediction != "epsilon",
                "prediction_type": self.prediction,
                "timestep_spacing": "trailing",
                "num_train_timesteps": 1000,
                "clip_sample": False,
            }
        )


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
        """InvalidArgument for choices that contradict each other."""
        choice("device", self.device, DEVICES)
        if self.start is None and self.autoencoder.fit is None and not self.autoencoder.of_pixels:
            raise InvalidArgument("autoencoder.fit", None, "a section, without a model to start from")
        if self.autoencoder.of_pixels and self.diffusion.reading:
            raise InvalidArgument("diffusion.reading", self.diffusion.reading, "0 where kind is pixels")
        multiple = self.autoencoder.factor * 2 ** (len(self.diffusion.block_out_channels) - 1)
        if self.side % multiple:
            raise InvalidArgument("side", self.side, f"a multiple of {multiple}, which the levels divide")
        levels = len(self.diffusion.block_out_channels)
        for name in ("transformer_depth", "heads"):
            given = getattr(self.diffusion, name)
            if len(given) != levels:
                raise InvalidArgument(f"diffusion.{name}", list(given), f"{levels} numbers, one a level")
        if self.data is None:
            if self.side != IMAGE_SIZE:
                raise InvalidArgument("side", self.side, f"{IMAGE_SIZE}, the scenes' own, without data")
            return
        for name, given in (
            ("text.fit", self.text.fit),
            ("autoencoder.alignment", self.autoencoder.alignment),
        ):
            if given:
                raise InvalidArgument(name, given, "absent with data: only scenes tell what they show")

    @property
    def scheduler(self) -> SchedulerConfig:
        """The process that the model is trained for and sampled by; pixels are held to their range."""
        plain = self.diffusion.scheduler
        return replace(plain, clip_sample=True) if self.autoencoder.of_pixels else plain


@dataclass(frozen=True)
class JudgeSection:
    """The judge of scenes and its optimisation."""

    fit: FitSettings
    spoilt: float = 0.25  # share of pictures with a shape or colours that are none of ours


@dataclass(frozen=True)
class JudgeConfig:
    """A run that trains the judge of scenes; `output` is the file that it ends with."""

    folder: Path
    output: Path
    judge: JudgeSection
    seed: int = 0
    threads: int = 2


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
        """InvalidArgument for choices that contradict each other."""
        choice("device", self.device, DEVICES)
        if self.data is None and self.side not in (None, IMAGE_SIZE):
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
    return cls(**values)


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
