"""The tables of a benchmark as one picture: bars for times, lines for growth. Pillow alone draws it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from fastldm.bench.contenders import CONTENDERS
from fastldm.bench.race import Table, seconds

WIDTH, MARGIN, BAR, GAP, LABEL = 1200, 40, 26, 12, 380
GRAPH = 340  # height of a panel of lines
INK, FAINT_INK, FAINT, PAPER = (32, 34, 38), (110, 116, 126), (206, 210, 216), (255, 255, 255)
COLOURS = (  # of the contenders, in their order
    (18, 107, 196),
    (120, 170, 220),
    (170, 176, 186),
    (120, 128, 140),
    (214, 122, 36),
    (46, 139, 87),
    (120, 180, 110),
)


def draw(tables: Sequence[Table], caption: str) -> Image.Image:
    """One panel a table, below each other; `caption` at the bottom."""
    panels = [_Panel(table) for table in tables]
    height = MARGIN + sum(panel.height for panel in panels) + MARGIN + 20 * len(wrapped(caption))
    picture = Image.new("RGB", (WIDTH, height), PAPER)
    pen, top = ImageDraw.Draw(picture), MARGIN
    for panel in panels:
        panel.draw(pen, top)
        top += panel.height
    for number, line in enumerate(wrapped(caption)):
        pen.text((MARGIN, top + 20 * number), line, fill=FAINT_INK, font=font(14))
    return picture


class _Panel:
    """A table's drawing: its bars, and beside each other the curves of its rows."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.bars = {
            name: row for name, row in table.rows.items() if row.median is not None or row.failed is not None
        }
        self.memory = {name: max(row.bytes.values()) for name, row in table.rows.items() if row.bytes}
        self.whats = list(dict.fromkeys(what for row in table.rows.values() for what in row.curves))
        count = len(self.bars) + len(self.memory)
        self.height = 36 + count * (BAR + GAP) + (GRAPH + 60 if self.whats else 0) + MARGIN

    def colour(self, name: str) -> tuple[int, int, int]:
        """Each contender's own, in all panels."""
        known = [each for each in CONTENDERS.values() if name.startswith(each)]
        place = list(CONTENDERS.values()).index(max(known, key=len)) if known else 1
        return COLOURS[place]

    def draw(self, pen: ImageDraw.ImageDraw, top: int) -> None:
        """Onto the picture, from this height down."""
        pen.text((MARGIN, top), self.table.title, fill=INK, font=font(20))
        top += 36
        longest = max((row.median for row in self.bars.values() if row.median is not None), default=1.0)
        for name, row in self.bars.items():
            share = 0.0 if row.median is None else row.median / longest
            ratio = "" if row.ratio in (None, 1.0) else f"  {row.ratio:.2f} x"
            text = row.failed if row.median is None else f"{seconds(row.median)}{ratio}"
            top = self._bar(pen, top, name, share, text or "")
        most = max(self.memory.values(), default=1)
        for name, size in self.memory.items():
            top = self._bar(pen, top, name, size / most, f"{size / 2**30:.2f} GiB")
        width = (WIDTH - 2 * MARGIN) // max(len(self.whats), 1)
        for number, what in enumerate(self.whats):
            self._lines(pen, (MARGIN + number * width, top, width - MARGIN, GRAPH), what)

    def _bar(self, pen: ImageDraw.ImageDraw, top: int, name: str, share: float, text: str) -> int:
        left, room = MARGIN + LABEL, WIDTH - 2 * MARGIN - LABEL - 190
        pen.text((left - 12, top + BAR / 2), name, fill=INK, font=font(16), anchor="rm")
        right = left + round(share * room)
        if share > 0:
            pen.rectangle((left, top, right, top + BAR), fill=self.colour(name))
        pen.text((right + 8, top + BAR / 2), text[:90], fill=INK, font=font(16), anchor="lm")
        return top + BAR + GAP

    def _lines(self, pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], what: str) -> None:
        """Times over sizes, both on logarithmic axes: a power is a straight line."""
        left, top, width, height = box
        rows = {name: row for name, row in self.table.rows.items() if what in row.curves}
        points = [point for row in rows.values() for point in row.curves[what]]
        (low_x, high_x), (low_y, high_y) = (
            (math.log(min(values)), math.log(max(values))) for values in zip(*points, strict=True)
        )

        def place(size: float, spent: float) -> tuple[float, float]:
            x = (math.log(size) - low_x) / ((high_x - low_x) or 1.0)
            y = (math.log(spent) - low_y) / ((high_y - low_y) or 1.0)
            return left + 70 + x * (width - 90), top + (1 - y) * (height - 40) + 8

        bottom = top + height - 24
        pen.line((left + 70, top, left + 70, bottom), fill=FAINT, width=2)
        pen.line((left + 70, bottom, left + width, bottom), fill=FAINT, width=2)
        for size in sorted({size for size, _ in points}):
            pen.text(
                (place(size, math.exp(low_y))[0], bottom + 6),
                f"{size:g}",
                fill=INK,
                font=font(13),
                anchor="ma",
            )
        for value in (math.exp(low_y), math.exp(high_y)):
            y = place(math.exp(low_x), value)[1]
            pen.text((left + 62, y), seconds(value), fill=INK, font=font(13), anchor="rm")
        pen.text((left + width, bottom + 24), what, fill=INK, font=font(16), anchor="ra")
        for number, (name, row) in enumerate(rows.items()):
            path, colour = [place(*point) for point in row.curves[what]], self.colour(name)
            pen.line(path, fill=colour, width=3, joint="curve")
            for x, y in path:
                pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
            told = f"{name}: {what}^{row.exponents[what]:.2f}"
            pen.text((left + 84, top + 20 * number), told, fill=colour, font=font(14))


def wrapped(text: str, most: int = 150) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= most:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
