"""Attention that autograd records: the short way that bfloat16 takes on a CPU, beside float64 and SDPA."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastldm import ops

SHAPES = [(4, 2, 64, 64, 56), (4, 4, 16, 32, 44), (2, 1, 5, 256, 24), (1, 3, 300, 7, 32)]


def gradients(
    attention: object, tensors: list[torch.Tensor], grad: torch.Tensor, autocast: bool = False
) -> list[torch.Tensor]:
    """The result and the gradients of q, k and v."""
    given = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = attention(*given)  # type: ignore[operator]
    return [result.detach(), *torch.autograd.grad(result, given, grad.to(result.dtype))]


@pytest.mark.parametrize("autocast", [False, True])
def test_it_is_as_near_to_float64_as_sdpa(autocast: bool) -> None:
    totals = torch.zeros(2, 4, dtype=torch.float64)
    for number, (rows, heads, queries, keys, width) in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(number)

        def drawn(length: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn((rows, heads, length, width), generator=generator).bfloat16()  # noqa: B023

        tensors, grad = [drawn(queries), drawn(keys), drawn(keys)], drawn(queries)
        exact = gradients(F.scaled_dot_product_attention, [t.double() for t in tensors], grad)
        ours = gradients(ops.attention, tensors, grad, autocast)
        plain = gradients(F.scaled_dot_product_attention, tensors, grad, autocast)
        for i, (mine, theirs, truth) in enumerate(zip(ours, plain, exact, strict=True)):
            assert mine.dtype == torch.bfloat16
            errors = [(each.double() - truth).abs() for each in (mine, theirs)]
            eps = torch.finfo(torch.bfloat16).eps
            assert errors[0].max() <= 2 * errors[1].max() + 4 * eps * truth.abs().max()
            for total, error in zip(totals, errors, strict=True):
                total[i] += (error / truth.square().mean().sqrt()).square().sum()
    assert (totals[0].sqrt() <= 1.5 * totals[1].sqrt()).all(), totals


def test_only_what_it_is_for_takes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []
    plain = F.scaled_dot_product_attention

    def watched(q: torch.Tensor, *rest: torch.Tensor, **options: object) -> torch.Tensor:
        asked.append(q.dtype)
        return plain(q, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    q = torch.randn(1, 1, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    ops.attention(q, q, q)
    assert asked == []
    many = torch.randn(1, 1, 300, 8, dtype=torch.bfloat16)
    ops.attention(q, many, many)
    ops.attention(q, q, q, causal=True)
    ops.attention(q, q, q, torch.tensor([3]))
    ops.attention(q.float(), q.float(), q.float())
    with torch.no_grad(), ops.use_backends("reference"):
        ops.attention(q, q, q)
    assert asked == [torch.bfloat16] * 3 + [torch.float32, torch.bfloat16]
