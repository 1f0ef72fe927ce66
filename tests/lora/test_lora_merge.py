"""LoRAs in a pipeline: merged in place, added up, taken out to the bit, and never half there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fastldm
import fastldm.lora
from fastldm.checkpoint.lora import read_lora
from fastldm.errors import BackendUnavailable, CheckpointError, InvalidArgument
from fastldm.lora import MergedLoras
from fastldm.runtime.graphs import Graphs

FIXTURES = Path(__file__).parents[1] / "fixtures" / "lora"
KOHYA, PEFT = FIXTURES / "lora_kohya_sd15.safetensors", FIXTURES / "lora_peft.safetensors"
Bits = Callable[[fastldm.Pipeline], dict[str, Tensor]]


def picture(pipe: fastldm.Pipeline, prompt: str = "a red circle on white") -> np.ndarray:
    return pipe.generate(prompt, steps=2, seed=3, output_type="np").images


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """The very bits: also the sign of zero."""
    kind = {4: torch.int32, 2: torch.int16}
    return all(
        torch.equal(value.view(kind[value.itemsize]), two[key].view(kind[value.itemsize]))
        for key, value in one.items()
    )


@pytest.mark.parametrize(
    "options", [{"dtype": "fp32"}, {"dtype": "bf16"}, {"offload_text_encoder": True}], ids=str
)
def test_nothing_remembered_outlives_a_change(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    """Pictures before, with and after are those of a pipeline that has known nothing else, to the bit.

    Embedded text, its keys and values, and packed weights, here of any size, are all in use.
    """
    try:
        from fastldm.ops import cpp

        monkeypatch.setattr(cpp.linear, "LEAST", 0)
    except BackendUnavailable:
        pass
    fresh = fastldm.load(base_folder, **options)
    fresh.load_lora(KOHYA, 0.8)
    changed = picture(fresh)
    pipe = fastldm.load(base_folder, **options)
    plain = picture(pipe)
    assert not np.array_equal(plain, changed)
    for _ in range(2):
        pipe.load_lora(KOHYA, 0.8)
        assert np.array_equal(picture(pipe), changed)
        pipe.unload_lora()
        assert np.array_equal(picture(pipe), plain)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_on_and_off_200_times_leaves_the_bits(base_folder: Path, bits: Bits, dtype: str) -> None:
    pipe = fastldm.load(base_folder, dtype=dtype)
    before, places = bits(pipe), [weight.data_ptr() for weight in pipe.components.unet.parameters()]
    for turn in range(200):
        pipe.load_lora(PEFT if turn % 2 else FIXTURES / "lora_diffusers_down_up.safetensors", turn / 100 - 1)
        if turn % 3 == 0:
            pipe.load_lora(PEFT)
        pipe.unload_lora()
    assert same(before, bits(pipe))
    assert [weight.data_ptr() for weight in pipe.components.unet.parameters()] == places
    assert not pipe.loras.present and not pipe.loras._originals


def test_several_add_up_and_are_rounded_once(base_folder: Path, bits: Bits) -> None:
    """In bfloat16 the sum of two is within half an ulp, and a float32 sum's error, of the float64 sum."""
    pipe = fastldm.load(base_folder, dtype="bf16")
    before = bits(pipe)
    applied = ((KOHYA, 0.8), (PEFT, -0.5), (KOHYA, 0.3))
    for path, weight in applied:
        pipe.load_lora(path, weight)
    after = bits(pipe)
    networks = {"unet": pipe.components.unet, "text_encoder": pipe.components.text_encoder}
    want = {key: value.double() for key, value in before.items()}
    for path, weight in applied:
        for module, change in read_lora(path, networks).changes.items():
            delta = weight * change.scale * change.up.double() @ change.down.double()
            want[f"{module}.weight"] += delta.view(want[f"{module}.weight"].shape)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if not torch.equal(before[key].double(), want[key])}
    assert any("conv" in key for key in changed)
    for key, truth in want.items():
        ulp = torch.finfo(torch.bfloat16).eps * truth.abs()
        assert ((after[key] - truth).abs() <= 0.5001 * ulp + 1e-6 * truth.abs().max()).all(), key
    pipe.unload_lora()
    assert same(before, bits(pipe))


def test_graphs_are_kept_and_see_the_new_weights(pipe: fastldm.Pipeline) -> None:
    """With a stand-in for CUDA: a graph is captured once, its replay after a change is what runs eagerly."""

    class Recorder:
        captures = 0

        def new_pool(self) -> object:
            return object()

        def warm_up(self, launch: Callable[[], None]) -> None:
            launch()

        def capture(self, launch: Callable[[], None], pool: object) -> tuple[Callable[[], None], int]:
            self.captures += 1
            return launch, 0

    plain = picture(pipe)
    recorder = Recorder()
    pipe.graphs = Graphs(recorder, 1 << 30)
    picture(pipe, "the blue cat")  # text not yet known, so the text encoder is captured too
    assert np.array_equal(picture(pipe), plain)
    captured = recorder.captures
    assert captured
    pipe.load_lora(KOHYA)
    changed = picture(pipe)
    pipe.unload_lora()
    assert np.array_equal(picture(pipe), plain)
    assert recorder.captures == captured
    pipe.graphs = Graphs(None, 0)
    pipe.load_lora(KOHYA)
    assert np.array_equal(picture(pipe), changed) and not np.array_equal(changed, plain)


def test_a_picture_beside_a_change_is_of_one_model(pipe: fastldm.Pipeline) -> None:
    """While one thread loads and unloads, every picture of two others is that with or that without."""
    plain = picture(pipe).tobytes()
    pipe.load_lora(KOHYA)
    changed = picture(pipe).tobytes()
    pipe.unload_lora()
    made: list[bytes] = []

    def draw() -> None:
        made.extend(picture(pipe).tobytes() for _ in range(6))

    threads = [threading.Thread(target=draw) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        pipe.load_lora(KOHYA)
        pipe.unload_lora()
    assert len(made) == 12 and set(made) <= {plain, changed}
    assert picture(pipe).tobytes() == plain


def test_a_callback_cannot_change_the_weights(pipe: fastldm.Pipeline) -> None:
    with pytest.raises(RuntimeError, match="callback"):
        pipe.generate("a", steps=1, callback=lambda step, x0: pipe.unload_lora())


def test_a_file_that_fails_changes_nothing(
    pipe: fastldm.Pipeline, bits: Bits, write: Callable[..., Path]
) -> None:
    pipe.load_lora(PEFT, 0.5)
    before = bits(pipe)
    for wrong in (write({"unet.conv_in.lora_A.weight": torch.ones(1, 4, 3, 3)}), KOHYA.parent, Path("none")):
        with pytest.raises(CheckpointError):
            pipe.load_lora(wrong)
    for weight in (float("nan"), float("inf"), 101, "1", True, None):
        with pytest.raises(InvalidArgument, match="weight="):
            pipe.load_lora(PEFT, weight)
    for path in (None, 3, "", "a\0b", b"x"):
        with pytest.raises(InvalidArgument, match="path="):
            pipe.load_lora(path)
    assert same(before, bits(pipe)) and len(pipe.loras.present) == 1


def test_an_overflow_changes_nothing(base_folder: Path, bits: Bits, write: Callable[..., Path]) -> None:
    """The first module would fit, the second becomes Inf in float16."""
    pipe = fastldm.load(base_folder, dtype="fp16")
    pipe.load_lora(PEFT)
    before = bits(pipe)
    one, two = "unet.mid_block.resnets.0.time_emb_proj", "unet.mid_block.resnets.1.time_emb_proj"
    tensors = {}
    for module, size in ((one, 1.0), (two, 1000.0)):
        tensors |= {
            f"{module}.lora_A.weight": torch.full((1, 128), size),
            f"{module}.lora_B.weight": torch.full((32, 1), size),
        }
    with pytest.raises(CheckpointError, match=f"{two}: the merged weight overflows torch.float16"):
        pipe.load_lora(write(tensors))
    assert same(before, bits(pipe))
    pipe.load_lora(write(tensors), 0.01)
    pipe.unload_lora()
    assert same(bits(fastldm.load(base_folder, dtype="fp16")), bits(pipe))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interruption_changes_nothing(
    pipe: fastldm.Pipeline, bits: Bits, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    loaded = bits(pipe)
    pipe.load_lora(PEFT, 0.5)
    before = bits(pipe)
    true, calls = fastldm.lora.merge, []

    def merge(weight: Tensor, *arguments: object) -> bool:
        calls.append(1)
        if len(calls) == 7:
            weight[::2] = 0  # half written
            raise error
        return true(weight, *arguments)

    monkeypatch.setattr(fastldm.lora, "merge", merge)
    with pytest.raises(error):
        pipe.load_lora(KOHYA)
    assert len(calls) >= 7 and same(before, bits(pipe)) and len(pipe.loras.present) == 1
    pipe.unload_lora()
    assert same(loaded, bits(pipe))


def test_channels_last_weights_stay_so(networks: dict[str, torch.nn.Module]) -> None:
    weight = networks["unet"].down_blocks[0].resnets[1].conv1.weight
    stride, before = weight.stride(), weight.detach().clone()
    assert not weight.is_contiguous()
    loras = MergedLoras(**networks)
    loras.add(loras.read(KOHYA, 1.0))
    assert weight.stride() == stride and not torch.equal(weight, before)
    loras.clear()
    assert weight.stride() == stride and torch.equal(weight, before)


def test_the_picture_says_with_what_it_was_made(pipe: fastldm.Pipeline, tmp_path: Path) -> None:
    """What was merged when it was made, not when it is saved."""
    from fastldm.checkpoint.info import sha256
    from fastldm.images import read_metadata

    pipe.load_lora(KOHYA, 0.25)
    result = pipe.generate("a cat", steps=1)
    pipe.unload_lora()
    plain = pipe.generate("a cat", steps=1)
    one, two = (read_metadata(each.save(tmp_path / "x.png")[0])["fastldm"] for each in (result, plain))
    assert one["loras"] == [{"file": str(KOHYA), "weight": 0.25, "hash": sha256(KOHYA)}]
    assert "loras" not in two
