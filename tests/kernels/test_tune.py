"""`fastldm tune`: the search over sizes by a table of times, and the table of the choices, without a GPU."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastldm import ops, tuning
from fastldm.errors import CheckpointError
from fastldm.kernels import candidates, geglu, tune, tuned
from fastldm.ops.recording import Call, recording
from fastldm.ops.registry import StandIn

CPU = torch.device("cpu")
SHAPE = (2, 5, 8)  # of x in a geglu of width 16


@dataclasses.dataclass(frozen=True)
class Tiles(geglu.Tiles):
    """Sizes with a switch, as kernels have for what only newer GPUs can do."""

    pdl: bool = False


BEGIN = Tiles(rows=64, columns=32, depth=64, warps=4, stages=3)


class Machine:
    """A GPU double: geglu's kernel by its reference, times by a function of the sizes, a clock that races
    advance.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds: Callable[[Tiles], float] = lambda sizes: 1.0
        self.rival, self.wrong, self.refuses = 2.0, set[Tiles](), None
        self.clock, self.seen, self.said = 0.0, list[Tiles](), list[str]()
        stand_in = StandIn(self.run, lambda *_: self.refuses)
        monkeypatch.setitem(ops.geglu.stand_ins, "triton", stand_in)
        kernel = dataclasses.replace(candidates.KERNELS["geglu"], sizes=lambda *_: [BEGIN])
        monkeypatch.setitem(candidates.KERNELS, "geglu", kernel)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        sizes = tuned.choose("geglu", x.device, geglu.shape_of(x, weight), BEGIN)
        self.seen.append(sizes)
        made = ops.geglu.reference(x, weight, bias)
        if sizes in self.wrong:
            made[0, 0, 0] = float("nan")
        return made

    def race(self, contenders: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        spent = {}
        for name, run in contenders.items():
            self.seen.clear()
            run()
            spent[name] = self.seconds(self.seen[0]) if self.seen else self.rival
        self.clock += 1
        return spent

    def tune(self, calls: list[Call] | None = None, seconds: float = 1e9) -> dict[str, Any]:
        return tune.tune(
            [call()] if calls is None else calls,
            device=CPU,
            race=self.race,
            seconds=seconds,
            now=lambda: self.clock,
            report=self.said.append,
        )

    def entry(self, **options: Any) -> Any:
        return self.tune(**options)["geglu"]["float32 10 32 8"]


def call(rows: int = 2) -> Call:
    with torch.device("meta"):
        return Call("geglu", (torch.empty(rows, *SHAPE[1:]), torch.empty(32, 8), torch.empty(32)))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The file of this machine's own measurements on the CPU."""
    monkeypatch.setenv("FASTLDM_CACHE", str(tmp_path))
    tuned.table.cache_clear()
    yield tmp_path / "tuned" / "cpu.json"
    tuned.table.cache_clear()


def test_the_search_walks_to_the_fastest_sizes(machine: Machine) -> None:
    """Downhill in every field at once, the switch included."""
    best = Tiles(rows=128, columns=128, depth=32, warps=8, stages=2, pdl=True)

    def seconds(sizes: Tiles) -> float:
        away = [
            abs(getattr(sizes, each.name) - getattr(best, each.name)) for each in dataclasses.fields(best)
        ]
        return 1 + sum(away)

    machine.seconds = seconds
    machine.rival = 1.5
    found = machine.entry()
    assert found == {"sizes": vars(best), "seconds": {"triton": 1.0, "PyTorch": 1.5}}


def test_the_rival_wins_where_it_is_faster_or_no_slower(machine: Machine) -> None:
    machine.rival = 1.0
    assert machine.entry() == {"rival": "PyTorch", "seconds": {"triton": 1.0, "PyTorch": 1.0}}
    assert "PyTorch (" in machine.said[-1]


def test_wrong_sizes_are_never_chosen_however_fast(machine: Machine) -> None:
    fast = dataclasses.replace(BEGIN, rows=128)
    machine.seconds = lambda sizes: 0.1 if sizes == fast else 1.0
    assert machine.entry()["sizes"] == vars(fast)
    machine.wrong = {fast}
    assert machine.entry()["sizes"] == vars(BEGIN)
    assert any(line.startswith("geglu float32 10 32 8: WRONG with") for line in machine.said)


def test_a_kernel_whose_own_sizes_are_wrong_leaves_the_call_to_its_rival(machine: Machine) -> None:
    machine.wrong = {BEGIN}
    assert machine.entry() == {"rival": "PyTorch", "seconds": {"PyTorch": 2.0}}


def test_sizes_that_fail_are_passed_over(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.seconds = lambda sizes: 1 / sizes.rows
    stand_in = ops.geglu.stand_ins["triton"]

    def run(x: Tensor, *rest: Tensor) -> Tensor:
        if tuned.choose("geglu", x.device, (), BEGIN).rows > 128:
            raise RuntimeError("out of resource: shared memory")
        return stand_in.run(x, *rest)

    monkeypatch.setitem(ops.geglu.stand_ins, "triton", StandIn(run, stand_in.refuses))
    assert machine.entry()["sizes"]["rows"] == 128


def test_the_budget_holds_and_the_costliest_shape_goes_first(machine: Machine) -> None:
    """A race is a second here. Counts make the cost: all rivals take the same time."""
    calls = [call(), call(3), call(3), call(4)]
    found = machine.tune(calls, seconds=3 + 2)  # three races tell the costs
    assert list(found["geglu"]) == ["float32 15 32 8"]
    assert machine.said[-1] == "out of time: 2 shapes were not measured"
    assert set(machine.tune(calls)["geglu"]) == {"float32 10 32 8", "float32 15 32 8", "float32 20 32 8"}


def test_ctrl_c_keeps_what_was_measured(machine: Machine) -> None:
    once = machine.tune([call(2), call(3)])
    races, machine.clock = machine.clock, 0.0

    def seconds(sizes: Tiles) -> float:
        if machine.clock == races - 1:  # the last race
            raise KeyboardInterrupt
        return 1.0

    machine.seconds = seconds
    found = machine.tune([call(2), call(3)])
    assert len(once["geglu"]) == 2 and len(found["geglu"]) == 1
    assert found["geglu"].items() <= once["geglu"].items()
    assert machine.said[-1] == "stopped: 1 shapes were not measured"


def test_a_call_that_the_kernel_cannot_take_is_no_entry(machine: Machine) -> None:
    machine.refuses = "the head dim is none of these"
    assert machine.tune() == {}
    assert machine.said == ["geglu float32 10 32 8: the head dim is none of these"]


def test_calls_are_filled_as_they_were_recorded() -> None:
    """Strides, types; a weight that keeps the size, a table that keeps latents small, every key seen."""
    with torch.device("meta"):
        heads = torch.empty(2, 6, 3, 4, 16)[:, :, 0].transpose(1, 2)
        lengths = torch.empty(2, dtype=torch.long)
    q, k, _, seen, causal = tune.fill("attention", (heads, heads, heads, lengths, False), CPU)
    assert q.stride() == heads.stride() and seen.tolist() == [6, 6] and causal is False
    assert not torch.equal(q, k) and 0.7 < float(q.std()) < 1.3
    _, weight, _ = tune.fill("geglu", (torch.empty(4, 400), torch.empty(64, 400), torch.empty(64)), CPU)
    assert 0.045 < float(weight.std()) < 0.055


def test_recording_lists_every_argument_and_changes_nothing() -> None:
    x, weight = torch.randn(2, 3, 4), torch.randn(4)
    with recording() as calls:
        made = ops.layer_norm(x, weight, eps=1e-3)
    assert torch.equal(made, ops.layer_norm.reference(x, weight, eps=1e-3))
    assert calls == [Call("layer_norm", (x, weight, None, 1e-3, None, None))]
    ops.layer_norm(x, weight)
    assert len(calls) == 1


def test_the_calls_of_a_model_need_no_weights(tiny_folder: Path) -> None:
    """The shipped model's, an SD2.1 and a folder's without its weights being read."""
    counted = {}
    for name in ("sd21", "default", str(tiny_folder)):
        calls = tuning.calls_of(name, torch.bfloat16)
        assert all(
            each.device.type == "meta" for c in calls for each in c.arguments if isinstance(each, Tensor)
        )
        counted[name] = {shape.key for shape in tune.shapes(calls) if shape.op == "attention"}
    assert "bfloat16 2 5 9216 9216 64" in counted["sd21"] and "bfloat16 2 20 576 77 64" in counted["sd21"]
    assert "bfloat16 2 1 64 77 8" in counted[str(tiny_folder)]


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    from fastldm.checkpoint import save_folder
    from fastldm.models.clip import CLIPTextConfig, CLIPTextModel
    from fastldm.models.tokenizer import Tokenizer
    from fastldm.models.unet import UNet, UNetConfig
    from fastldm.models.vae import AutoencoderKL, VAEConfig

    tokenizer, sizes = Tokenizer.from_words(["a"], 6), {"layers_per_block": 1, "norm_num_groups": 4}
    text = CLIPTextConfig(tokenizer.vocab_size, 8, 8, 1, 1, 6, eos_token_id=tokenizer.eos_id)
    unet = UNetConfig(
        block_out_channels=(8, 8),
        heads=(1, 1),
        transformer_depth=(1, 0),
        cross_attention_dim=8,
        sample_size=8,
        **sizes,
    )
    save_folder(
        tmp_path / "model",
        unet=UNet(unet),
        vae=AutoencoderKL(VAEConfig(block_out_channels=(8, 8), **sizes)),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler={"_class_name": "DDIMScheduler"},
    )
    return tmp_path / "model"


def test_a_table_is_read_back_and_grows(cache: Path) -> None:
    """Fields beside those that the table names keep their defaults; numbers and switches pass through."""
    shape = (torch.bfloat16, 10, 32, 8)
    assert tuned.choose("geglu", CPU, shape, BEGIN) is BEGIN
    assert tuned.beaten("conv2d", CPU, shape, "nothing known") == "nothing known"
    assert tuned.beaten("geglu", CPU, shape) is None
    tuning.write(cache, {"geglu": {"bfloat16 10 32 8": {"sizes": {"rows": 16, "pdl": True}}}})
    tuning.write(cache, {"geglu": {"bfloat16 9 32 8": {"rival": "PyTorch"}}, "conv2d": {}})
    assert tuned.choose("geglu", CPU, shape, BEGIN) == dataclasses.replace(BEGIN, rows=16, pdl=True)
    assert tuned.beaten("geglu", CPU, shape, "nothing known") is None
    assert "PyTorch was measured to be faster" in str(tuned.beaten("geglu", CPU, (torch.bfloat16, 9, 32, 8)))
    assert tuned.choose("geglu", CPU, (torch.bfloat16, 9, 32, 8), BEGIN) == BEGIN
    assert [file.name for file in cache.parent.iterdir()] == ["cpu.json"]


def test_doctor_tells_what_was_measured(cache: Path) -> None:
    from types import SimpleNamespace

    from fastldm import doctor

    entries = {"1": {"sizes": {"rows": 16}}, "2": {"rival": "PyTorch"}, "3": {"rival": "PyTorch"}}
    tuning.write(cache, {"geglu": entries, "conv2d": {"1": {"sizes": {"rows": 16}}}})
    gpus = SimpleNamespace(device_count=lambda: 2, get_device_name=["cpu", "NVIDIA H200"].__getitem__)
    assert doctor._tuned(SimpleNamespace(cuda=gpus)) == {
        "cuda:0": {"conv2d": "1 shape", "geglu": "3 shapes, 2 of them left to PyTorch"},
        "cuda:1": "nothing measured: `fastldm tune`",
    }


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"geglu": []}', '{"geglu": {"a": 3}}', '{"geglu": {"a": {}}}', "\xff"]
    + ['{"geglu": {"a": {"sizes": {"rows": "many"}}}}', '{"geglu": {"a": {"rival": 3}}}'],
)
def test_a_damaged_table_is_a_warning_and_made_anew(cache: Path, text: str) -> None:
    cache.parent.mkdir()
    cache.write_bytes(text.encode("latin-1"))
    with pytest.warns(UserWarning, match="cpu.json is damaged and not used"):
        assert tuned.choose("geglu", CPU, (1,), BEGIN) == BEGIN
    assert tuned.choose("geglu", CPU, (1,), BEGIN) == BEGIN  # told once
    with pytest.warns(UserWarning, match="fastldm tune"):
        tuning.write(cache, {"geglu": {"1": {"rival": "PyTorch"}}})
    assert json.loads(cache.read_text()) == {"geglu": {"1": {"rival": "PyTorch"}}}


def test_sizes_of_another_version_are_a_warning(cache: Path) -> None:
    tuning.write(cache, {"geglu": {"1": {"sizes": {"lanes": 4}}}})
    with pytest.warns(UserWarning, match="another version"):
        assert tuned.choose("geglu", CPU, (1,), BEGIN) == BEGIN


def test_a_table_that_cannot_be_written_leaves_the_old_one(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning.write(cache, {"geglu": {"1": {"rival": "PyTorch"}}})
    before = cache.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match="cpu.json: cannot be written: No space left"):
        tuning.write(cache, {"geglu": {"2": {"rival": "PyTorch"}}})
    assert cache.read_bytes() == before and list(cache.parent.iterdir()) == [cache]


def test_a_table_laid_over_is_this_threads_alone(cache: Path) -> None:
    tuning.write(cache, {"geglu": {"1": {"sizes": {"rows": 16}}, "2": {"sizes": {"rows": 32}}}})
    over = {"geglu": {"1": {"sizes": {"rows": 128}}}, "conv2d": {tuned.ANY: {"rival": "PyTorch"}}}
    rows = []

    def look() -> None:
        rows.append([tuned.choose("geglu", CPU, (i,), BEGIN).rows for i in (1, 2, 3)])

    with tuned.using(over):
        look()
        other = threading.Thread(target=look)
        other.start()
        other.join()
        assert tuned.beaten("conv2d", CPU, (7,)) is not None
    look()
    assert rows == [[128, 32, 64], [16, 32, 64], [16, 32, 64]]
