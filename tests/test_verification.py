"""verify: it passes what is right, finds what is wrong and where, and leaves the pipeline as it was."""

from __future__ import annotations

import inspect
import json
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastldm
from fastldm import cli, ops, verification
from fastldm.ops import registry
from fastldm.verification import Judged, verify

KERNELS = ("cpp", "reference")


@pytest.fixture(scope="module")
def pipe() -> fastldm.Pipeline:
    return fastldm.load(dtype="bf16", backends=KERNELS)


def spoil(monkeypatch: pytest.MonkeyPatch, op: ops.Op, change: Callable[..., Any], where: Any = None) -> None:
    """Put change(result, *arguments) in place of the op's C++ kernel where it has this weight's shape."""
    right = op.stand_ins["cpp"]

    def run(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(op.reference).bind(*args, **kwargs).arguments
        result = right.run(*args, **kwargs)
        spoilt = where is None or given["weight"].shape == where
        return change(result, *given.values()) if spoilt else result

    monkeypatch.setitem(op.stand_ins, "cpp", registry.StandIn(run, right.refuses))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_shipped_model_is_right(dtype: str) -> None:
    found = verify(fastldm.load(dtype=dtype, backends=KERNELS))
    assert found.ok, str(found)
    assert not found.unchecked and not found.notes
    layers = {row.layer for row in found.rows}
    assert {
        "sampler",
        "unet.mid_block.resnets.0.norm1",
        "vae.decoder.up_blocks.0.upsamplers.0.conv",
    } <= layers
    assert "text_encoder.text_model.encoder.layers.0.layer_norm1" in layers
    assert {row.op for row in found.rows} >= {"attention", "geglu", "layer_norm", "end to end"}
    assert set(found.served) == {"cpp", "reference"}
    assert sum(row.calls for row in found.rows if row.op != "end to end") == found.served["cpp"]
    # Each op call that fell through to the reference was refused once, by the one backend before it.
    assert sum(found.refused.values()) == found.served["reference"]
    assert any("a packed weight" in why for why in found.refused)
    assert [row.ratio for row in found.rows] == sorted((row.ratio for row in found.rows), reverse=True)
    assert str(found).endswith(found.summary) and f"all {len(found.rows)} rows right" in found.summary


def test_one_wrong_layer_is_found_and_no_other_is_blamed(
    pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "unet.up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj"
    shape = pipe.components.unet.up_blocks[1].attentions[1].transformer_blocks[0].ff.net[0].proj.weight.shape
    spoil(monkeypatch, ops.geglu, lambda result, *_: result * 1.5, shape)
    found = verify(pipe)
    wrong = [row for row in found.rows if not row.right]
    assert not found.ok and name in {row.layer for row in wrong}
    assert all(row.op == "end to end" or row.op == "geglu" and row.shape[-1] * 2 == shape[0] for row in wrong)
    assert found.rows[: len(wrong)] == tuple(wrong)  # worst first
    lines = str(found).splitlines()
    assert lines[1].startswith("WRONG") and f"{len(wrong)} of {len(found.rows)} rows are wrong" in lines[-1]


def test_a_wrong_text_encoder_is_seen_in_the_picture(
    pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole picture is made with its own text: the watched calls go on with the reference's."""

    def change(result: torch.Tensor, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return result * 1.5 if x.shape[1] == pipe.components.context_length else result

    spoil(monkeypatch, ops.layer_norm, change)
    wrong = {row.layer for row in verify(pipe, seconds=0).rows if not row.right}
    assert any(layer.startswith("text_encoder") for layer in wrong)
    assert f"latents after {verification.STEPS} steps" in wrong


def test_a_kernel_that_works_in_place(pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, ops.guided_step, lambda result, latents, *_: latents.mul_(1 + 1e-4))
    wrong = [(row.layer, row.op, row.backend) for row in verify(pipe).rows if not row.right]
    assert ("sampler", "guided_step", "cpp") in wrong
    assert {op for _, op, _ in wrong} <= {"guided_step", "end to end"}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda result, *_: result * torch.nan, id="nan"),
        pytest.param(lambda result, *_: result[..., :-1], id="shape"),
        pytest.param(lambda result, *_: result.float(), id="dtype"),
    ],
)
def test_what_is_no_number_or_has_another_form(change: Callable[..., Any]) -> None:
    right = torch.ones(2, 3, dtype=torch.bfloat16)
    judged = Judged.of(change(right), right, right.double(), 2**-7)
    row = judged.row("layer", "op", "cpp", (2, 3))
    assert not row.right and row.ratio == math.inf


def test_a_picture_of_nan_is_told_and_no_error(
    pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, ops.group_norm_silu, lambda result, *_: result.fill_(torch.nan))
    found = verify(pipe)
    assert {row.op for row in found.rows if not row.right} == {"group_norm_silu", "end to end"}


def test_the_rule() -> None:
    truth = torch.tensor([8.0, -1.0], dtype=torch.float64)
    plain, eps = torch.tensor([8.0, -1.0625]), 2**-10
    assert Judged.of(plain, plain, truth, eps, slack=3.0).allowed == 2 * 0.0625 + 4 * eps * 8 * 3
    assert Judged.of(plain, plain, None, eps).allowed == 7 * eps * 8  # |fast − plain| ≤ (1 + 2 + 4) eps
    infinite = torch.tensor([math.inf, 1.0])  # a sampler's clamp
    assert Judged.of(infinite, infinite, infinite.double(), eps).error == 0


def test_the_slack_of_a_norm() -> None:
    x = torch.randn(2, 8, 4, 4) + torch.arange(8.0)[:, None, None] * 10
    given = {"x": x, "groups": 4, "eps": 0.0, "row_bias": torch.ones(2, 8)}
    parts = (x + 1).reshape(2, 4, -1).double()
    expected = 1 + (parts.mean(-1).abs() / parts.std(-1, correction=0)).max().item()
    assert verification._slack(ops.group_norm_silu, given) == pytest.approx(expected)
    tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
    expected = 1 + (tokens.double().mean(-1) / tokens.double().std(-1, correction=0)).abs().max().item()
    assert verification._slack(ops.layer_norm, {"x": tokens, "eps": 0.0}) == pytest.approx(expected)


def test_the_slack_of_attention() -> None:
    q, k = torch.randn(2, 3, 5, 4) * 9, torch.randn(2, 3, 7, 4)
    expected = 1 + (q.double() @ k.double().mT / 2).abs().max().item()
    given = {"q": q, "k": k, "v": k}
    assert verification._slack(ops.attention, given) == pytest.approx(expected)
    halves = {name: tensor.bfloat16() for name, tensor in given.items()}
    assert verification._slack(ops.attention, halves) == 1.0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 5])], ids=["full", "lengths"])
def test_attention_head_by_head(lengths: torch.Tensor | None, causal: bool) -> None:
    q, k, v = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3))
    expected = ops.attention.reference(q, k, v, lengths, causal)
    torch.testing.assert_close(verification._attention_by_head(q, k, v, lengths, causal), expected)


def test_references_alone(pipe: fastldm.Pipeline) -> None:
    found = verify(fastldm.Pipeline(pipe.components, pipe.device, pipe.dtype, ("reference",)))
    assert found.ok and {row.op for row in found.rows} == {"end to end"}
    assert all(row.error == row.reference_error for row in found.rows)
    assert set(found.served) == {"reference"} and not found.refused


def test_out_of_time_every_kind_is_still_checked_once(pipe: fastldm.Pipeline) -> None:
    whole, short = verify(pipe), verify(pipe, seconds=0)
    assert short.ok and short.unchecked > 100 and "unchecked" in short.summary
    kinds = [{(row.op, row.backend, row.shape) for row in found.rows} for found in (whole, short)]
    assert kinds[0] == kinds[1]
    assert sum(row.calls for row in short.rows) + short.unchecked == sum(row.calls for row in whole.rows)


def test_without_memory_for_float64(pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "available_bytes", lambda device: 0)
    found = verify(pipe)
    assert found.ok and all(math.isnan(row.reference_error) for row in found.rows)
    assert len(found.notes) == 1 and "end to end unchecked" in str(found)
    spoil(monkeypatch, ops.geglu, lambda result, *_: result * 1.5)
    assert {row.op for row in verify(pipe).rows if not row.right} == {"geglu"}


def test_the_pipeline_is_left_as_it_was_and_busy_meanwhile(
    pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state() -> list[Any]:
        networks = pipe.components.unet, pipe.components.vae, pipe.components.text_encoder
        return [
            (weight.data_ptr(), weight._version) for network in networks for weight in network.parameters()
        ]

    def made() -> torch.Tensor:
        return pipe.generate("a cat", steps=2, output_type="pt").images

    before, picture = state(), made()
    order: list[str] = []
    waiting = threading.Thread(target=lambda: (made(), order.append("generate")))
    right = verification._picture

    def begun(*arguments: Any) -> Any:
        if not waiting.is_alive():
            waiting.start()
            waiting.join(0.5)  # far more than a picture takes
        return right(*arguments)

    monkeypatch.setattr(verification, "_picture", begun)
    with ops.use_backends(KERNELS):
        monkeypatch.setattr(pipe, "backends", None)  # the order in force here
        assert verify(pipe, seconds=0).served["cpp"]
        order.append("verify")
    waiting.join()
    assert order == ["verify", "generate"]
    assert state() == before and torch.equal(made(), picture)


def test_size_and_its_errors(pipe: fastldm.Pipeline) -> None:
    found = verify(pipe, width=64, height=96, seconds=0)
    assert next(row.shape for row in found.rows if row.layer.startswith("pixels")) == (1, 3, 96, 64)
    for name, value in (("width", 3), ("width", 0), ("height", 0), ("height", -8), ("width", 2**40)):
        with pytest.raises(fastldm.InvalidArgument, match=f"{name}={value}"):
            verify(pipe, **{name: value})


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--verify", "default", "--dtype", "bf16"]) == 0
    assert "rows right" in capsys.readouterr().out.splitlines()[-1]
    spoil(monkeypatch, ops.layer_norm, lambda result, *_: result * torch.nan)
    assert cli.main(["doctor", "--verify", "default", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"] and found["rows"][0]["error"] is None and not found["rows"][0]["right"]
    assert cli.main(["doctor", "--dtype", "bf16"]) == 2
    assert "only beside --verify" in capsys.readouterr().err
