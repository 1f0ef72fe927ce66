"""The panels of a table as one picture: lines with the intervals of their points. Pillow alone draws it."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

from PIL import Image, ImageDraw

from fastldm.bench.plot import COLOURS, FAINT, FAINT_INK, INK, MARGIN, PAPER, WIDTH, font, wrapped
from fastldm.bench.reproduction.tables import Panel

HEIGHT, AXIS = 400, 70
LOGARITHMIC = 20
"""An axis whose ends differ by more than this factor is logarithmic."""

_LINES = (COLOURS[0], COLOURS[4], COLOURS[5], COLOURS[3])


def draw(panels: Sequence[Panel], caption: str) -> Image.Image:
    """One panel below the other, `caption` at the bottom."""
    said = wrapped(caption)
    picture = Image.new("RGB", (WIDTH, MARGIN + len(panels) * HEIGHT + 20 * len(said) + MARGIN), PAPER)
    pen, top = ImageDraw.Draw(picture), MARGIN
    for panel in panels:
        _panel(pen, top, panel)
        top += HEIGHT
    for number, line in enumerate(said):
        pen.text((MARGIN, top + 20 * number), line, fill=FAINT_INK, font=font(14))
    return picture


def _panel(pen: ImageDraw.ImageDraw, top: int, panel: Panel) -> None:
    pen.text((MARGIN, top), _plain(f"{panel.title}: {panel.up}"), fill=INK, font=font(20))
    points = [point for line in panel.lines.values() for point in line]
    if not points:
        pen.text((MARGIN + AXIS, top + 60), "not run yet", fill=FAINT_INK, font=font(16))
        return
    left, right, high, low = MARGIN + AXIS, WIDTH - MARGIN - 160, top + 50, top + HEIGHT - 80
    across = [x for x, _ in points]
    scale = math.log if min(across) > 0 and max(across) > LOGARITHMIC * min(across) else float
    first, last = scale(min(across)), scale(max(across))
    most = max(found.mean + _half(found.half) for _, found in points) or 1.0
    least = min(0.0, *(found.mean - _half(found.half) for _, found in points))
    means = [found.mean for _, found in points]
    height = math.log if min(means) > 0 and max(means) > LOGARITHMIC * min(means) else float
    if height is math.log:
        least = min(means) / 2  # where lower ends of intervals are cut off

    def place(x: float, y: float) -> tuple[float, float]:
        along = (scale(x) - first) / ((last - first) or 1.0)
        up = (height(max(y, least)) - height(least)) / (height(most) - height(least))
        return left + along * (right - left), low - up * (low - high)

    pen.line((left, high, left, low, right, low), fill=FAINT, width=2)
    for value in (least, most):
        pen.text((left - 8, place(across[0], value)[1]), f"{value:.3g}", fill=INK, font=font(13), anchor="rm")
    ticks = sorted(set(across)) if len(set(across)) <= 8 else (min(across), max(across))
    for x in ticks:
        pen.text((place(x, 0)[0], low + 6), f"{x:.3g}", fill=INK, font=font(13), anchor="ma")
    pen.text((right, low + 26), panel.across, fill=INK, font=font(16), anchor="ra")
    for number, (name, line) in enumerate(panel.lines.items()):
        colour = _LINES[number % len(_LINES)]
        path = [place(x, found.mean) for x, found in line]
        if len(path) > 1:
            pen.line(path, fill=colour, width=3, joint="curve")
        for (x, found), (column, row) in zip(line, path, strict=True):
            half = _half(found.half)
            pen.line((*place(x, found.mean - half), *place(x, found.mean + half)), fill=colour, width=2)
            pen.ellipse((column - 4, row - 4, column + 4, row + 4), fill=colour)
        pen.text((right + 16, high + 22 * number), name, fill=colour, font=font(15))


def _plain(text: str) -> str:
    """Without the accents that Pillow's own font lacks."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def _half(half: float) -> float:
    return 0.0 if math.isnan(half) else half
