"""What makes pictures sooner by computing less, and so makes other pictures: nothing unless asked for.

docs/performance.md has the time that each saves and the error that it costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastldm.checks import integer, number, refuse


@dataclass(frozen=True)
class Shortcuts:
    """The work that a request leaves out. The defaults leave out none: the pictures are exact.

    guidance_interval  (a, b), shares of the run, 0 ≤ a < b ≤ 1: of n steps only round(a n) up to but not
                       including round(b n) are guided; the others run without their unconditional half.
                       (Kynkäänniemi et al. 2024, arXiv:2404.07724)
    whole_every        N: of each N steps only the first runs the whole UNet; the others run its outermost
                       block alone, on the deep features of that one. The count begins anew where guidance
                       begins or ends. (Ma et al. 2023, arXiv:2312.00858)
    """

    guidance_interval: tuple[float, float] = (0.0, 1.0)
    whole_every: int = 1

    def guided(self, steps: int) -> range:
        """Which of so many steps are guided."""
        first, end = (round(share * steps) for share in self.guidance_interval)
        return range(first, end)


def check_shortcuts(value: object, max_steps: int) -> Shortcuts:
    """`value` as Shortcuts with sound fields: it may be None, Shortcuts or, as in a PNG, a mapping of
    fields.
    """
    if value is None:
        return Shortcuts()
    if isinstance(value, Mapping):
        try:
            value = Shortcuts(**value)
        except TypeError:
            pass
    if not isinstance(value, Shortcuts):
        refuse("shortcuts", value, "None, Shortcuts or a mapping of guidance_interval and whole_every")
    name, interval = "shortcuts[guidance_interval]", value.guidance_interval
    if not isinstance(interval, tuple | list) or len(interval) != 2:
        refuse(name, interval, "two numbers 0…1, the first below the second")
    first, end = (number(name, share, 0, 1) for share in interval)
    if first >= end:
        refuse(name, interval, "two numbers 0…1, the first below the second")
    return Shortcuts((first, end), integer("shortcuts[whole_every]", value.whole_every, 1, max_steps))
