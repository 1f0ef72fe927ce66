"""Contenders in processes of their own, on a small random model; what is wrong or breaks has no time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastldm.bench import lineup
from fastldm.bench.cases import Case, Model
from fastldm.bench.contenders import CHANNELS_LAST, OURS, REFERENCE, missing
from fastldm.bench.lineup import Setup
from fastldm.bench.models import open_model, operations, write_random
from fastldm.bench.parts import PARTS
from fastldm.bench.process import Failed, Worker
from fastldm.bench.race import Table
from fastldm.checkpoint.save import WEIGHTS
from fastldm.errors import InvalidArgument
from fastldm.presets import Preset

NUMBERS = ["float32", "bfloat16"]


def measured(
    small: Path, part: str, dtype: str = "float32", rivals: tuple[str, ...] = (), **rest: Any
) -> Table:
    """A part of the small model, fastldm and these."""
    model = open_model(str(small), torch.float32, small)
    setup = Setup(model, "cpu", dtype, [OURS, *rivals], rounds=1, minutes=0.0, steps=2, **rest)
    (table,) = PARTS[part](setup, Case(1, model.side))
    return table


@pytest.fixture
def ours_is_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The truth by fastldm's reference, as without diffusers, which takes seconds to import."""
    monkeypatch.setattr(Setup, "plain", REFERENCE)


@pytest.mark.parametrize("dtype", NUMBERS)
def test_a_step_beside_diffusers(small: Path, dtype: str) -> None:
    pytest.importorskip("diffusers")
    table = measured(small, "step", dtype, (CHANNELS_LAST,))
    assert list(table.rows) == [OURS, CHANNELS_LAST] and table.rounds == 1
    for name, row in table.rows.items():
        assert row.failed is None and 0 < row.minimum < 60 and row.rate > 0, table
        assert (row.error == 0) == (dtype == "float32" and name == CHANNELS_LAST)  # it is the truth


@pytest.mark.usefixtures("ours_is_the_truth")
def test_pictures_tell_what_their_time_is_made_of(small: Path) -> None:
    table = measured(small, "image", "float32", (REFERENCE,))
    for row in table.rows.values():
        assert list(row.parts) == ["text", "loop", "decode"]
        # Each part is the shortest of its own, and a picture of 20 ms has more beside them on a busy core.
        assert min(row.parts.values()) > 0 and 0.4 < sum(row.parts.values()) / row.minimum < 1.2


@pytest.mark.usefixtures("ours_is_the_truth")
def test_a_cold_start_has_its_stages_and_memory_its_peaks(small: Path) -> None:
    table = measured(small, "cold")
    assert list(table.rows) == [f"{OURS}, empty caches", f"{OURS}, warm caches"]
    for row in table.rows.values():
        parts = row.parts
        before = parts["import"] + parts["load"] + parts["first picture"]
        assert row.failed is None and before == pytest.approx(row.minimum)
    peaks = measured(small, "memory").rows[OURS].bytes
    assert 2**26 < peaks["process, model loaded"] <= peaks["process, picture made"] < 2**33


@pytest.mark.usefixtures("ours_is_the_truth")
def test_growth_is_fitted_over_batch_and_pixels(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastldm.bench.parts.BATCHES", (1, 16))
    monkeypatch.setattr("fastldm.bench.parts.SIZES", (1.0, 4.0))
    row = measured(small, "growth").rows[OURS]
    assert [size for size, _ in row.curves["batch"]] == [1, 16]
    assert [size for size, _ in row.curves["pixels"]] == [16**2, 64**2]
    assert row.error is not None and set(row.exponents) == {"batch", "pixels"}


@pytest.mark.usefixtures("ours_is_the_truth")
def test_who_is_wrong_or_breaks_has_no_time(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(lineup.FLOAT32, "step", 0.0)  # nobody but the truth itself agrees to the bit
    (tmp_path / "diffusers.py").write_text("raise ImportError('a broken installation')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    table = measured(small, "step", "float32", (REFERENCE, CHANNELS_LAST))
    assert table.rows[OURS].median is None and "wrong: error" in str(table.rows[OURS].failed)
    assert table.rows[REFERENCE].median is not None and table.rows[REFERENCE].error == 0
    broken = "failed: ImportError: a broken installation"
    assert table.rows[CHANNELS_LAST].failed == broken
    starts = measured(small, "cold", "float32", (CHANNELS_LAST,)).rows
    assert starts[f"{OURS}, empty caches"].median is not None
    assert starts[f"{CHANNELS_LAST}, empty caches"].failed == broken


def test_a_process_that_ends_or_fails_is_told() -> None:
    worker = Worker({"PYTHONHOME": "/nowhere"})
    with pytest.raises(Failed, match="ended with exit code 1: "):
        worker.ask("load")
    worker.close()
    worker = Worker()
    with pytest.raises(Failed, match="^TypeError: "):
        worker.ask("load")
    worker.close()


def test_random_weights_are_the_same_in_every_run(small: Path, preset: Preset, tmp_path: Path) -> None:
    torch.manual_seed(99)
    write_random(preset, tmp_path / "again", torch.float32)
    for part in ("unet", "vae", "text_encoder"):
        file = WEIGHTS[part]
        assert (tmp_path / "again" / part / file).read_bytes() == (small / part / file).read_bytes()


@pytest.mark.usefixtures("ours_is_the_truth")
def test_a_model_without_text_encoders_has_steps_and_decodes_alone(preset: Preset, tmp_path: Path) -> None:
    write_random(replace(preset, text=None), tmp_path / "model", torch.bfloat16)
    model = Model.of("shape", tmp_path / "model")
    assert not model.has_text and (model.tokens, model.side, model.multiple) == (77, 16, 4)
    setup = Setup(model, "cpu", "bfloat16", [OURS], rounds=1, minutes=0.0)
    for part in ("step", "vae"):
        (table,) = PARTS[part](setup, Case(2, 16))
        assert table.rows[OURS].failed is None and "2 pictures" in table.title


def test_operations_are_those_of_the_plain_model(small: Path) -> None:
    pytest.importorskip("diffusers")
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    model = Model.of("small", small)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(small / "unet"))
        unet(torch.empty(6, 4, 8, 8), torch.empty(()), torch.empty(6, 77, 16))
    assert operations("step", model, Case(3, 16)) == counter.get_total_flops()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(small / "vae"))
        vae.decode(torch.empty(3, 4, 8, 8))
    assert operations("vae", model, Case(3, 16)) == counter.get_total_flops()


def test_what_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing(CHANNELS_LAST) == "diffusers and transformers not installed"
    assert missing(OURS) is None and missing(REFERENCE) is None


def test_an_inpainting_model_is_refused(preset: Preset, tmp_path: Path) -> None:
    inpainting = replace(preset, unet=replace(preset.unet, in_channels=9))
    write_random(inpainting, tmp_path / "model", torch.float32)
    with pytest.raises(InvalidArgument, match="model=.*inpainting"):
        open_model(str(tmp_path / "model"), torch.float32, tmp_path)
