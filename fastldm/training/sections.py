"""The sections of a model's training configuration: the shape and the optimisation of each stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastldm.checks import choice, integer, number
from fastldm.diffusion import Objective, SchedulerConfig
from fastldm.errors import InvalidArgument
from fastldm.scenes.mixture import LAST_STAGE
from fastldm.training.adversarial import AdversarySettings
from fastldm.training.fit import MOST, FitSettings

PREDICTIONS = ("v_prediction", "epsilon", "sample", "flow")


def absent(section: Any, names: Iterable[str], where: str, prefix: str = "") -> None:
    """InvalidArgument for one of these fields that is not its default: there it would count for nothing."""
    for name in names:
        given = getattr(section, name)
        if given != getattr(type(section), name):
            raise InvalidArgument(prefix + name, given, f"absent {where}")


def scenes_drawn(section: Any) -> None:
    """InvalidArgument for a number of scenes, or a stage of their world, out of range."""
    integer("pictures", section.pictures, 1, MOST)
    integer("stage", section.stage, 1, LAST_STAGE)


def _levels(widths: Sequence[int], groups: int) -> None:
    if not all(widths):
        raise InvalidArgument("block_out_channels", list(widths), "widths of at least 1")
    if not groups or any(width % groups for width in widths):
        raise InvalidArgument("norm_num_groups", groups, f"a divisor of each of {list(widths)}")


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
        """InvalidArgument for values out of range and for choices that contradict each other."""
        choice("kind", self.kind, ("kl", "vq", "pixels"))
        if self.of_pixels:
            absent(self, (f.name for f in fields(self) if f.name != "kind"), "where kind is pixels")
            return
        for name in ("block_out_channels", "latent_channels"):
            if not getattr(self, name):
                raise InvalidArgument(name, getattr(self, name), "required")
        absent(
            self, ("kl_weight",) if self.kind == "vq" else ("codes", "codebook_weight"), f"with {self.kind}"
        )
        integer("codes", self.codes, 1, MOST)
        integer("layers_per_block", self.layers_per_block, 1, MOST)
        _levels(self.block_out_channels, self.norm_num_groups)
        levels = len(self.block_out_channels)
        if any(level >= levels for level in self.attention_levels):
            allowed = f"levels 0 to {levels - 1}"
            raise InvalidArgument("attention_levels", list(self.attention_levels), allowed)
        number("whole", self.whole, 0, 1)
        if self.lpips is not None and not self.perceptual:
            raise InvalidArgument("lpips", str(self.lpips), "absent without perceptual")
        if self.decoder is not None and self.adversary is not None:
            raise InvalidArgument("decoder", "a section", "absent with an adversary")

    @property
    def learns(self) -> bool:
        """Whether any of it is trained."""
        return self.fit is not None or self.decoder is not None

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

    def __post_init__(self) -> None:
        """InvalidArgument for a value out of range."""
        for name, least in (("width", 1), ("layers", 1), ("heads", 1), ("length", 3)):
            integer(name, getattr(self, name), least, MOST)
        if self.width % self.heads:
            raise InvalidArgument("heads", self.heads, f"a divisor of the width, {self.width}")


@dataclass(frozen=True)
class DiffusionSection:
    """The latent diffusion model: its shape, what it predicts and is trained for."""

    fit: FitSettings
    block_out_channels: tuple[int, ...]
    transformer_depth: tuple[int, ...]
    heads: tuple[int, ...]
    prediction: str | None = None  # v_prediction, epsilon, sample or flow; None: the start's, or v_prediction
    objective: Objective = Objective()
    shift: float = 1.0  # of a flow's times towards noise
    layers_per_block: int = 1
    norm_num_groups: int = 8
    caption_dropout: float = 0.1
    reading: float = 0.0  # weight of reading classes and colours from the features, on scenes
    pictures: int = 12_000  # scenes to draw; of a folder all
    stage: int = 1  # of the world: see fastldm.scenes.mixture
    arranged: float = 0.0  # share of the scenes whose objects stand where one expects them
    hinted: float = 0.0  # share of the rows that are given a mask, a map or a small picture
    hints: int = 4_000  # pictures that hints are made of

    def __post_init__(self) -> None:
        """InvalidArgument for values out of range and for choices that contradict each other."""
        if self.prediction is not None:
            choice("prediction", self.prediction, PREDICTIONS)
        if self.prediction != "flow":
            absent(self, ("shift",), "without prediction = flow")
        number("shift", self.shift, 1e-3, 1e3)
        if not self.hinted:
            absent(self, ("hints",), "without hinted")
        for name in ("caption_dropout", "hinted", "arranged"):
            number(name, getattr(self, name), 0, 1)
        for name in ("hints", "layers_per_block"):
            integer(name, getattr(self, name), 1, MOST)
        scenes_drawn(self)
        _levels(self.block_out_channels, self.norm_num_groups)
        levels = len(self.block_out_channels)
        for name in ("transformer_depth", "heads"):
            if len(getattr(self, name)) != levels:
                raise InvalidArgument(name, list(getattr(self, name)), f"{levels} numbers, one a level")
        attends = [*self.transformer_depth[:-1], 1]  # the middle does, at the width of the last level
        for width, heads, depth in zip(self.block_out_channels, self.heads, attends, strict=True):
            if depth and (not heads or width % heads):
                raise InvalidArgument("heads", list(self.heads), "divisors of the widths that attend")
        self.check(self.scheduler)

    def check(self, scheduler: SchedulerConfig, prefix: str = "") -> None:
        """InvalidArgument where the objective is none for a model of this process."""
        try:
            self.objective.check(scheduler)
        except InvalidArgument as error:
            raise InvalidArgument(f"{prefix}objective.{error.name}", error.value, error.allowed) from None

    @property
    def learns_variance(self) -> bool:
        """Whether the UNet answers with the place of the log variance too, which L_vlb trains. (Nichol &
        Dhariwal 2021, arXiv:2102.09672)
        """
        return self.objective.loss in ("hybrid", "vlb")

    @property
    def scheduler(self) -> SchedulerConfig:
        """The process that a new model is trained for, as its scheduler_config.json says it; one that goes on
        from another keeps that one's.

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
                "prediction_type": self.prediction or "v_prediction",
                "timestep_spacing": "trailing",
                "num_train_timesteps": 1000,
                "clip_sample": False,
            }
        )
