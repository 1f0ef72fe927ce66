"""What a model can be asked for, beside the shapes of its networks.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fastldm.errors import CheckpointError

MAX_CLASSES = 2**16
MAX_NAME = 200  # characters
MAX_UPSCALING = 16


@dataclass(frozen=True)
class Abilities:
    """What `generate` may be told to draw, and how.

    prompt          it reads text; labels and layouts, where it knows them, are words of that text
    classes         how many classes label= can name, or the objects of layout= where the model needs that
    labels          their names, in the order of their numbers; none: they are numbers only
    layout          it draws objects into the boxes of layout=
    segmentation    names of the classes of the maps that segmentation= takes, in the order of their numbers
    inpainting      it fills the mask= of an image=
    upscaling       how many times as wide upscale=True draws a small image=; 0: it cannot
    needs           the argument without which it can draw nothing; None: it has none
    guides          it has an unconditional half to be guided by
    guidance_scale  what suits it where a request says nothing
    """

    prompt: bool = True
    classes: int = 0
    labels: tuple[str, ...] = ()
    layout: bool = False
    segmentation: tuple[str, ...] = ()
    inpainting: bool = True
    upscaling: int = 0
    needs: str | None = None
    guides: bool = True
    guidance_scale: float = 7.5

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks by the names that users know them by."""
        free = self.needs is None
        draws = {
            "text to image": self.prompt and free,
            "unconditional": not (self.prompt or self.classes or self.layout) and free,
            "class to image": self.classes > 0 and self.needs != "layout",
            "layout to image": self.layout,
            "image to image": self.needs in (None, "prompt", "label", "layout"),
            "semantic synthesis": bool(self.segmentation),
            "inpainting": self.inpainting,
            f"upscaling ×{self.upscaling}": self.upscaling > 0,
        }
        return tuple(name for name, able in draws.items() if able)

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from the defaults, as JSON can hold them."""
        plain = Abilities()
        given = asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in given.items()
            if value != getattr(plain, name)
        }

    @classmethod
    def from_dict(cls, given: object, file: str, key: str) -> Abilities:
        """Read what `to_dict` gives; CheckpointError naming file and key for anything else."""
        if not isinstance(given, Mapping):
            raise CheckpointError(file, key, "must map names to values")
        known = {field.name: field.default for field in fields(cls)}
        for name, value in given.items():
            if name not in known or not _fits(value, known[name]):
                raise CheckpointError(
                    file, f"{key}.{name}", f"is {value!r:.80}: no ability that fastldm knows"
                )
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
        made = cls(**values)
        if not 0 <= made.classes <= MAX_CLASSES or len(made.labels) not in (0, made.classes):
            raise CheckpointError(
                file, f"{key}.classes", f"is {made.classes}, with {len(made.labels)} labels"
            )
        if made.upscaling not in range(MAX_UPSCALING + 1):
            raise CheckpointError(
                file, f"{key}.upscaling", f"is {made.upscaling}; 0 to {MAX_UPSCALING} is known"
            )
        return made


def _fits(value: object, default: object) -> bool:
    """Whether a value is of the kind of a field with this default."""
    if isinstance(default, tuple):
        return (
            isinstance(value, list)
            and len(value) <= MAX_CLASSES
            and all(isinstance(name, str) and 0 < len(name) <= MAX_NAME for name in value)
        )
    if default is None:
        return value is None or isinstance(value, str)
    if isinstance(default, float):
        return type(value) in (int, float) and abs(float(value)) <= 1000  # type: ignore[arg-type]
    return type(value) is type(default)
