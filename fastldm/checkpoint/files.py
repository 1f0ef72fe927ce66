"""Single files, whatever model they hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastldm.checkpoint.detect import refuse_foreign
from fastldm.checkpoint.paper import is_paper, open_paper
from fastldm.checkpoint.pickles import open_weights
from fastldm.checkpoint.single import open_stable
from fastldm.checkpoint.source import PARTS, Source


def open_single(path: Path, overrides: Mapping[str, Any], allow_pickle: bool = False) -> Source:
    """Work out from a single file's header what it is."""
    file = open_weights(path, allow_pickle)
    paper = is_paper(file.entries)
    refuse_foreign(path, file.entries, ("unet", "vae") if paper else PARTS)
    return open_paper(file, overrides) if paper else open_stable(file, overrides)
