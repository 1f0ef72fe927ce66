"""How a stage of training goes: its rows in a CSV file, a drawing of them, a line of report now and then."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image, ImageDraw

from fastldm.checkpoint.atomic import replacing
from fastldm.errors import InvalidArgument

WIDTH, HEIGHT, MARGIN = 800, 400, 50
INK, LINE, PAPER = (32, 34, 38), (18, 107, 196), (255, 255, 255)


class Curve:
    """`name.csv` and `name.png` in a folder, and the same numbers for TensorBoard where asked."""

    def __init__(
        self, folder: Path, name: str, start: int, report: Callable[[str], None], tensorboard: bool
    ) -> None:
        self.name, self.start, self.report = name, start, report
        self.table, self.picture = folder / f"{name}.csv", folder / f"{name}.png"
        self.board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InvalidArgument("tensorboard", True, "false until tensorboard is installed") from None
            self.board = SummaryWriter(folder / "tensorboard" / name)
        before = [row for row in self._read() if int(row[0]) <= start]  # a killed run went on from `start`
        with replacing(self.table) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows(before)
        self.file = open(self.table, "a", newline="")  # noqa: SIM115
        self.rows = csv.writer(self.file)
        self.began = time.perf_counter()

    def __enter__(self) -> Curve:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()

    def add(self, step: int, steps: int, loss: float, rate: float) -> None:
        """After `step` of `steps`: the mean loss since the last row, and the learning rate."""
        seconds = time.perf_counter() - self.began
        self.rows.writerow([step, f"{loss:.5f}", f"{rate:.2e}", f"{seconds:.1f}"])
        self.file.flush()
        left = seconds / max(step - self.start, 1) * (steps - step)
        self.report(f"{self.name} {step}/{steps}  loss {loss:.4f}  {left / 60:.1f} min left")
        if self.board is not None:
            self.board.add_scalar("loss", loss, step)
            self.board.add_scalar("learning rate", rate, step)

    def draw(self) -> None:
        """Draw the losses so far over the steps."""
        points = [(float(step), float(loss)) for step, loss, *_ in self._read()]
        if not points:
            return
        with replacing(self.picture) as temporary:
            drawn(points, self.name).save(temporary, format="png")

    def _read(self) -> list[list[str]]:
        """The rows of the table; a line that a full disk or a crash left torn is none."""
        if not self.table.exists():
            return []
        lines = self.table.read_text("utf-8", errors="replace").split("\n")
        return [row for row in (line.split(",") for line in lines) if _is_whole(row)]


def _is_whole(row: list[str]) -> bool:
    try:
        step, *numbers = int(row[0]), *map(float, row[1:])
    except ValueError:
        return False
    return step > 0 and len(numbers) == 3


def drawn(points: list[tuple[float, float]], title: str) -> Image.Image:
    """Points as a line between axes that name their ends."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen = ImageDraw.Draw(picture)
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    across = (WIDTH - 2 * MARGIN) / max(right - left, 1e-12)
    down = (HEIGHT - 2 * MARGIN) / max(high - low, 1e-12)
    pen.line([(MARGIN + (x - left) * across, HEIGHT - MARGIN - (y - low) * down) for x, y in points], LINE, 2)
    pen.rectangle((MARGIN, MARGIN, WIDTH - MARGIN, HEIGHT - MARGIN), outline=INK)
    pen.text((MARGIN, 20), f"{title}: loss over steps", INK)
    pen.text((4, MARGIN), f"{high:.4g}", INK)
    pen.text((4, HEIGHT - MARGIN - 10), f"{low:.4g}", INK)
    pen.text((MARGIN, HEIGHT - MARGIN + 8), f"{left:.0f}", INK)
    pen.text((WIDTH - MARGIN - 40, HEIGHT - MARGIN + 8), f"{right:.0f}", INK)
    return picture
