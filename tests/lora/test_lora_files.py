"""LoRA files of every kind against what their own programs made of them, and against W + s·BA in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastldm
from fastldm.checkpoint.lora import LowRank, merge, read_lora, write_lora

FIXTURES = Path(__file__).parents[1] / "fixtures" / "lora"
FILES = [
    "peft",
    "peft_alpha_in_metadata",
    "diffusers_down_up",
    "old_attn_procs",
    "kohya_sd15",
    "kohya_sd15_mixed",
]
# A module of each kind, and its names in the files of each program.
MODULES = {
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (32, 24),
    "unet.down_blocks.1.resnets.0.conv1": (32, 32, 3, 3),
    "unet.up_blocks.1.resnets.0.conv_shortcut": (32, 64, 1, 1),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (24, 24),
}


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", FILES)
def test_a_merged_model_is_the_recorded_one(
    pipe: fastldm.Pipeline,
    recorded: Callable[..., tuple[dict[str, Tensor], dict[str, str]]],
    name: str,
    strength: float,
) -> None:
    inputs = recorded("base_sd15")[0]
    expected, notes = recorded(f"expected_{name}")
    tolerance = json.loads(notes["tol"])
    before = {key: weight.clone() for key, weight in pipe.components.unet.state_dict().items()}
    before = {f"unet.{key}": value for key, value in before.items()} | {
        f"text_encoder.{key}": value.clone()
        for key, value in pipe.components.text_encoder.state_dict().items()
    }
    pipe.load_lora(FIXTURES / f"lora_{name}.safetensors", strength)

    def close(got: Tensor, key: str, allowed: float) -> None:
        want = expected[f"out.scale{strength}.{key}"]
        assert (got - want).abs().max() <= allowed * want.abs().max(), key

    deltas = [key.partition(".delta.")[2] for key in expected if f"scale{strength}.delta" in key]
    assert bool(deltas) == (strength == 1.0)
    now = {f"unet.{key}": value for key, value in pipe.components.unet.state_dict().items()} | {
        f"text_encoder.{key}": value for key, value in pipe.components.text_encoder.state_dict().items()
    }
    for key in deltas:
        close(now[key] - before[key], f"delta.{key}", tolerance["delta"])
    changed = {key for key, value in now.items() if not torch.equal(value, before[key])}
    assert changed == set(json.loads(notes["config"])["changed_weights"])

    unet = pipe.components.unet
    with torch.inference_mode():
        context = pipe.components.text_encoder(inputs["in.input_ids"])
        rows = torch.zeros(2, dtype=torch.long)
        sample = unet(inputs["in.x"], unet.condition(context, inputs["in.t"].float()[:, None]), rows)
    close(context, "context", tolerance["default"])
    close(sample, "sample", tolerance["default"])


def spelled(module: str, style: str) -> tuple[str, str]:
    """How a program writes the keys of a module's factors."""
    part, _, name = module.partition(".")
    flat = name.replace(".", "_")
    return {
        "peft": (f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight"),
        "diffusers": (f"{module}.lora_A.weight", f"{module}.lora_B.weight"),
        "bare": (f"{name}.lora_A.weight", f"{name}.lora_B.weight"),
        "down_up": (f"{module}.lora.down.weight", f"{module}.lora.up.weight"),
        "linear_layer": (
            f"{module}.lora_linear_layer.down.weight",
            f"{module}.lora_linear_layer.up.weight",
        ),
        "kohya": (
            f"lora_{'te' if part == 'text_encoder' else part}_{flat}.lora_down.weight",
            f"lora_{'te' if part == 'text_encoder' else part}_{flat}.lora_up.weight",
        ),
    }[style]


def factors(shape: tuple[int, ...], rank: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(shape) + rank)
    outputs, *inputs = shape
    down = torch.randn(rank, *inputs, generator=generator)
    return down, torch.randn(outputs, rank, *[1] * (len(inputs) - 1), generator=generator)


def low_rank(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """scale · up ∘ down in float64: what two convolutions, one after the other, are as one."""
    if down.dim() == 2:
        return scale * up.double() @ down.double()
    return scale * torch.einsum("or,rihw->oihw", up.double()[:, :, 0, 0], down.double())


def merged(weight: Tensor, changes: list[tuple[LowRank, float]]) -> Tensor:
    """The weight with these changes, in its own layout."""
    made = torch.full_like(weight, torch.nan)
    assert merge(made, weight, changes)
    return made


def assert_adds(got: Tensor, weight: Tensor, delta: Tensor) -> None:
    """got = weight + delta, with the error of one sum in float32 and one rounding to its dtype."""
    want = weight.double() + delta
    eps = torch.finfo(torch.float32).eps * 8 + torch.finfo(got.dtype).eps / 2
    assert got.dtype == weight.dtype and got.shape == weight.shape
    assert ((got - want).abs() <= eps * (want.abs() + delta.abs().max())).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("style", ["peft", "diffusers", "bare", "down_up", "linear_layer", "kohya"])
def test_every_spelling_of_every_kind_of_module(
    networks: dict[str, nn.Module], write: Callable[..., Path], style: str, dtype: torch.dtype
) -> None:
    tensors = {}
    for module, shape in MODULES.items():
        tensors |= dict(zip(spelled(module, style), factors(shape), strict=True))
    lora = read_lora(write(tensors), networks)
    assert lora.changes.keys() == MODULES.keys()
    for module, shape in MODULES.items():
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        got = merged(weight, [(lora.changes[module], -0.7)])
        assert_adds(got, weight, low_rank(*factors(shape), -0.7))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_at_a_time_are_the_whole(
    monkeypatch: pytest.MonkeyPatch, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    """Blocks of 3 rows of 7, of two changes; an overflow in the last row alone is told."""
    generator = torch.Generator().manual_seed(2)
    shape = (7, 5, 3, 3)
    weight = torch.randn(shape, generator=generator).to(dtype, memory_format=layout)
    changes, delta = [], torch.zeros(shape, dtype=torch.float64)
    for strength in (0.7, -0.2):
        down, up = (torch.randn(size, generator=generator) for size in ((2, 45), (7, 2)))
        changes.append((LowRank(down, up, 1.5), strength))
        delta += 1.5 * strength * (up.double() @ down.double()).view(shape)
    monkeypatch.setattr("fastldm.checkpoint.lora.BLOCK", 3 * 45)
    got = merged(weight, changes)
    assert got.stride() == weight.stride()
    assert_adds(got, weight, delta)
    changes[0][0].up[-1] = 1e38
    assert not merge(got, weight, changes)


def test_names_without_text_model_and_with_original_block_numbers(
    networks: dict[str, nn.Module], write: Callable[..., Path]
) -> None:
    down, up = factors((24, 24))
    linear = {"A": down, "B": up}
    text = {f"text_encoder.encoder.layers.1.self_attn.k_proj.lora_{k}.weight": v for k, v in linear.items()}
    down, up = factors((32, 32, 3, 3))
    block = {
        f"lora_unet_input_blocks_1_0_in_layers_2.lora_{k}.weight": v for k, v in (("down", down), ("up", up))
    }
    assert read_lora(write({**text, **block}), networks).changes.keys() == {
        "text_encoder.text_model.encoder.layers.1.self_attn.k_proj",
        "unet.down_blocks.0.resnets.0.conv1",
    }


def test_a_convolution_in_three_factors(networks: dict[str, nn.Module], write: Callable[..., Path]) -> None:
    """LoCon's Tucker form: 1×1, then the kernel between ranks, then 1×1."""
    module = "unet.down_blocks.1.resnets.0.conv1"
    generator = torch.Generator().manual_seed(1)
    down, mid, up = (
        torch.randn(shape, generator=generator) for shape in ((4, 32, 1, 1), (4, 4, 3, 3), (32, 4, 1, 1))
    )
    name = "lora_unet_down_blocks_1_resnets_0_conv1"
    file = write(
        {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_mid.weight": mid,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(2.0),
        }
    )
    weight = torch.zeros(32, 32, 3, 3)
    got = merged(weight, [(read_lora(file, networks).changes[module], 1.0)])
    x = torch.randn(1, 32, 6, 6, generator=generator, dtype=torch.float64)
    conv = torch.nn.functional.conv2d
    want = 0.5 * conv(conv(conv(x, down.double()), mid.double()), up.double())
    assert (conv(x, got.double()) - want).abs().max() <= 1e-5 * want.abs().max()


def test_matrices_and_1x1_kernels_stand_for_each_other(
    networks: dict[str, nn.Module], write: Callable[..., Path]
) -> None:
    module = "unet.up_blocks.1.resnets.0.conv_shortcut"
    down, up = factors(MODULES[module])
    keys = spelled(module, "kohya")
    changes = read_lora(write(dict(zip(keys, (down.flatten(1), up), strict=True))), networks).changes
    weight = torch.zeros(MODULES[module])
    assert_adds(merged(weight, [(changes[module], 1.0)]), weight, low_rank(down, up, 1.0))
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    down, up = factors(MODULES[module])
    pair = dict(zip(spelled(module, "kohya"), (down[:, :, None, None], up), strict=True))
    changes = read_lora(write(pair), networks).changes
    weight = torch.zeros(MODULES[module])
    assert_adds(merged(weight, [(changes[module], 1.0)]), weight, low_rank(down, up, 1.0))


TO_K = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"attn2.to_k": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"^" + TO_K.removeprefix("unet."): 2.0}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"tn2.to_k": 2, "^attn2.to_k": 2}}, 2.0),
        ({"r": 16, "rank_pattern": {}, "target_modules": ["to_k"], "bias": "none", "use_dora": False}, 1.0),
    ],
)
@pytest.mark.parametrize("place", ["config", "metadata", "own metadata"])
def test_alpha_where_peft_keeps_it(
    networks: dict[str, nn.Module], write: Callable[..., Path], fields: dict, scale: float, place: str
) -> None:
    keys = spelled(TO_K, "peft" if place == "config" else "bare" if place == "own metadata" else "diffusers")
    metadata = {}
    if place == "metadata":
        metadata = {f"unet.{name}": value for name, value in fields.items()} | {"text_encoder.lora_alpha": 77}
    elif place == "own metadata":
        metadata = {"lora_alpha": 4.0} | fields
    notes = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
    file = write(dict(zip(keys, factors(MODULES[TO_K]), strict=True)), notes, "adapter_model.safetensors")
    if place == "config":
        (file.parent / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | fields))
    folder = file.parent if place == "config" else file
    assert read_lora(folder, networks).changes[TO_K].scale == scale


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_whole_alphas_as_merge_scripts_write_them(
    networks: dict[str, nn.Module], write: Callable[..., Path], dtype: torch.dtype
) -> None:
    tensors = dict(zip(spelled(TO_K, "kohya"), factors(MODULES[TO_K]), strict=True))
    alpha = spelled(TO_K, "kohya")[0].replace("lora_down.weight", "alpha")
    for shape in ((), (1,)):
        file = write({**tensors, alpha: torch.full(shape, 6, dtype=dtype)})
        assert read_lora(file, networks).changes[TO_K].scale == 1.5  # of rank 4


def test_written_and_read_again(networks: dict[str, nn.Module], tmp_path: Path) -> None:
    pairs = {module: factors(shape, 3) for module, shape in MODULES.items()}
    parts: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for module, pair in pairs.items():
        part, _, name = module.partition(".")
        parts.setdefault(part, {})[name] = pair
    write_lora(tmp_path / "new" / "lora", parts, 6.0)
    files = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file())
    assert files == [
        "new/lora/pytorch_lora_weights.safetensors",
        "new/lora/text_encoder/adapter_config.json",
        "new/lora/text_encoder/adapter_model.safetensors",
        "new/lora/unet/adapter_config.json",
        "new/lora/unet/adapter_model.safetensors",
    ]
    whole = read_lora(tmp_path / "new" / "lora", networks).changes
    apart = {**read_lora(tmp_path / "new/lora/unet", networks).changes}
    apart |= read_lora(tmp_path / "new/lora/text_encoder", networks).changes
    for changes in (whole, apart):
        assert changes.keys() == pairs.keys()
        for module, (down, up) in pairs.items():
            assert changes[module].scale == 2.0
            assert torch.equal(changes[module].down, down.flatten(1))
            assert torch.equal(changes[module].up, up.flatten(1))
