"""CLIP's text encoder against transformers with the same weights, and against recorded numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fastldm.errors import CheckpointError
from fastldm.models.clip import CLIP_L, OPENCLIP_H, CLIPTextConfig, CLIPTextModel

transformers = pytest.importorskip("transformers")

FIXTURE = Path(__file__).parents[1] / "fixtures" / "lora" / "base_sd15.safetensors"
TINY = {
    "quick_gelu": CLIPTextConfig(60, 24, 48, 3, 4, 13),
    "gelu": CLIPTextConfig(60, 40, 56, 2, 5, 9, "gelu", layer_norm_eps=1e-3),
    "shipped": CLIPTextConfig(160, 128, 512, 2, 4, 32),
}
# text_encoder/config.json of stable-diffusion-v1-5 and of stable-diffusion-2-1.
SD1 = {
    "_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
    "hidden_act": "quick_gelu", "hidden_size": 768,
    "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768, "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0", "vocab_size": 49408,
}  # fmt: skip
SD2 = SD1 | {
    "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 23, "projection_dim": 512,
}  # fmt: skip


def on_meta(config: CLIPTextConfig) -> CLIPTextModel:
    with torch.device("meta"):
        return CLIPTextModel(config).eval()


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Cheap random weights of a meta model: products keep their size, norms scale by about 1."""
    state = {}
    generator = torch.Generator().manual_seed(3)
    for name, meta in model.state_dict().items():
        scale = 1.7 * meta.shape[-1] ** -0.5 if "encoder" in name else 0.05
        value = torch.empty(meta.shape).uniform_(-scale, scale, generator=generator)
        state[name] = value + 1 if "norm" in name and name.endswith("weight") else value
    return state


def oracle(config: CLIPTextConfig, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """transformers' model on the very same tensors; since 5.6 its names lack the leading `text_model.`."""
    with torch.device("meta"):
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config.to_dict()))
    if not any(key.startswith("text_model.") for key in model.state_dict()):
        state = {key.removeprefix("text_model."): value for key, value in state.items()}
    model.load_state_dict(state, assign=True)
    for name, buffer in list(model.named_buffers()):
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, torch.arange(buffer.shape[-1])[None])
    return model.eval()


def error(config: CLIPTextConfig, rows: int, length: int) -> float:
    ours = on_meta(config)
    state = weights(ours)
    ours.load_state_dict(state, assign=True)
    theirs = oracle(config, state)
    ids = torch.randint(config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        got, want = ours(ids), theirs(ids).last_hidden_state
    assert got.shape == (rows, length, config.hidden_size)
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("length", ["full", "one", "short"])
@pytest.mark.parametrize("name", TINY)
def test_tiny_equals_transformers(name: str, length: str) -> None:
    config = TINY[name]
    assert error(config, 3, {"full": config.max_position_embeddings, "one": 1, "short": 7}[length]) <= 1e-5


def test_bf16_is_as_good_as_transformers() -> None:
    """Against float64: at most twice its error, and a few roundings of the largest output."""
    config = TINY["shipped"]
    state = {name: value.bfloat16() for name, value in weights(on_meta(config)).items()}
    ours, exact = on_meta(config), on_meta(config)
    ours.load_state_dict(state, assign=True)
    exact.load_state_dict({name: value.double() for name, value in state.items()}, assign=True)
    ids = torch.arange(64).view(2, 32)
    with torch.inference_mode():
        got, theirs, truth = ours(ids), oracle(config, state)(ids).last_hidden_state, exact(ids)
    allowed = 2 * (theirs - truth).abs().max() + 4 * 2**-8 * truth.abs().max()
    assert got.dtype == torch.bfloat16
    assert (got - truth).abs().max() <= allowed


def test_clip_l_equals_transformers() -> None:
    assert error(CLIP_L, 1, 77) <= 1e-5


@pytest.mark.long
def test_openclip_h_equals_transformers() -> None:
    assert error(OPENCLIP_H, 2, 77) <= 1e-5


@pytest.mark.parametrize(
    ("dtype", "out", "tolerance"), [("float32", "context", 5e-5), ("float64", "f64.context", 1e-9)]
)
def test_recorded_values(dtype: str, out: str, tolerance: float) -> None:
    with safe_open(FIXTURE, "pt") as file:
        config = CLIPTextConfig.from_dict(json.loads(file.metadata()["config"])["text_encoder"])
        prefix = "weight.text_encoder."
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        state = {name.removeprefix(prefix): file.get_tensor(name).to(getattr(torch, dtype)) for name in names}
        ids, want = file.get_tensor("in.input_ids"), file.get_tensor("out." + out)
    model = on_meta(config)
    model.load_state_dict(state, assign=True)
    with torch.inference_mode():
        got = model(ids)
    assert float((got - want).abs().max()) <= tolerance * float(want.abs().max())


@pytest.mark.parametrize(
    ("config", "count"), [(CLIP_L, 123_060_480), (OPENCLIP_H, 340_387_840)], ids=["l", "h"]
)
def test_parameter_count(config: CLIPTextConfig, count: int) -> None:
    assert sum(p.numel() for p in on_meta(config).parameters()) == count


def test_keys_are_those_of_checkpoints() -> None:
    state = weights(on_meta(TINY["gelu"]))
    assert {key.split(".")[0] for key in state} == {"text_model"}
    oracle(TINY["gelu"], state)  # strict: no key missing, none too many


def test_no_token_sees_a_later_one() -> None:
    model = CLIPTextModel(TINY["shipped"])
    ids = torch.arange(20)[None]
    changed = ids.clone()
    changed[0, 12:] += 40
    with torch.inference_mode():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(after[:, :12], before[:, :12], rtol=0, atol=1e-6)
    assert (after[:, 12:] - before[:, 12:]).abs().amax(-1).min() > 1e-3


def test_gradients_equal_transformers() -> None:
    ours = CLIPTextModel(TINY["quick_gelu"])
    theirs = oracle(TINY["quick_gelu"], {key: value.clone() for key, value in ours.state_dict().items()})
    ids, weight = torch.arange(22).view(2, 11), torch.randn(2, 11, 24)
    (ours(ids) * weight).sum().backward()
    (theirs(ids).last_hidden_state * weight).sum().backward()
    wanted = {name.removeprefix("text_model."): p.grad for name, p in theirs.named_parameters()}
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for name, parameter in ours.named_parameters():
        difference = (parameter.grad - wanted[name.removeprefix("text_model.")]).abs().max()
        assert float(difference) <= 1e-5 * largest, name


@pytest.mark.parametrize(("given", "config"), [(SD1, CLIP_L), (SD2, OPENCLIP_H)], ids=["sd1", "sd2"])
def test_config_of_real_folders(given: dict[str, object], config: CLIPTextConfig) -> None:
    read = CLIPTextConfig.from_dict(given)
    assert read.eos_token_id == 2
    assert CLIPTextConfig.from_dict(given | {"eos_token_id": 49407}) == config


@pytest.mark.parametrize("name", TINY)
def test_config_round_trip(name: str) -> None:
    assert CLIPTextConfig.from_dict(json.loads(json.dumps(TINY[name].to_dict()))) == TINY[name]


def test_config_written_by_transformers() -> None:
    written = transformers.CLIPTextConfig(**TINY["gelu"].to_dict()).to_dict()
    assert CLIPTextConfig.from_dict(json.loads(json.dumps(written))) == TINY["gelu"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "t5"), ("hidden_act", "relu"), ("num_attention_heads", 7), ("num_attention_heads", 0),
        ("num_hidden_layers", 10**9), ("num_hidden_layers", "12"), ("num_hidden_layers", True),
        ("vocab_size", -1), ("hidden_size", 1e3), ("max_position_embeddings", 2),
        ("layer_norm_eps", float("nan")), ("layer_norm_eps", "small"),
        ("use_attention_mask", True), ("pruned_heads", {"0": [1]}), ("rope_theta", 10000.0),
    ],
)  # fmt: skip
def test_config_refuses(key: str, value: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        CLIPTextConfig.from_dict(SD1 | {key: value}, "model/text_encoder/config.json")
    assert (caught.value.file, caught.value.key) == ("model/text_encoder/config.json", key)
