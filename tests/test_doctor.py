"""doctor: every fact is there, and every reason why a backend does not serve."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

from fastldm import cli, doctor, ops
from fastldm.ops import registry


def test_facts():
    facts = doctor.diagnose()
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["versions"]) == set(doctor.PACKAGES)
    assert facts["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert facts["cpu"]["torch uses"].endswith(f"{torch.get_num_threads()} threads")
    assert facts["devices"]["cpu"] == "available"
    assert facts["cuda graphs"] == ("available" if torch.cuda.is_available() else "no: no CUDA device")
    json.dumps(facts)


def test_every_op_and_backend_is_told(monkeypatch):
    monkeypatch.delenv("FASTLDM_BACKENDS", raising=False)
    facts = doctor.diagnose()
    assert set(facts["ops"]) == set(registry.OPS) >= {"attention", "group_norm_silu", "guided_step"}
    assert set(facts["backends"]) == set(registry.AUTOMATIC)
    assert facts["backends"]["reference"] == "available"
    for name, text in facts["backends"].items():
        why = registry.missing(name)
        assert text.startswith("available") if why is None else text == f"no: {why}"
    if registry.missing("cpp") is None:
        from fastldm.ops import cpp

        assert facts["backends"]["cpp"] == f"available, with kernels for {cpp.ISA}"
    for name, text in facts["ops"].items():
        usable = [backend for backend in registry.OPS[name].stand_ins if registry.missing(backend) is None]
        assert all(backend in text for backend in [*usable, "reference"])


def test_a_stand_in_comes_before_the_reference(monkeypatch):
    monkeypatch.setattr(registry, "missing", lambda name: None)  # as if every backend could run
    monkeypatch.setattr(registry, "OPS", {"attention": ops.attention, "linear": ops.linear})
    monkeypatch.setitem(ops.attention.stand_ins, "triton", registry.StandIn(print, lambda *_: None))
    monkeypatch.setitem(sys.modules, "fastldm.ops.cpp", types.SimpleNamespace(ISA="plain"))
    monkeypatch.setattr(ops, "cpp", sys.modules["fastldm.ops.cpp"], raising=False)
    monkeypatch.setenv("FASTLDM_BACKENDS", "triton,reference")
    facts = doctor.diagnose()
    assert facts["ops"] == {
        "attention": "triton, then reference",
        "linear": "reference (triton has no kernel for it)",
    }
    assert facts["backends"]["cpp"] == "available, but FASTLDM_BACKENDS=triton,reference leaves it out"


def test_named_backends(monkeypatch):
    monkeypatch.setenv("FASTLDM_BACKENDS", "reference")
    facts = doctor.diagnose()
    assert facts["environment"]["FASTLDM_BACKENDS"] == "reference"
    assert set(facts["ops"].values()) == {"reference"}
    for name in registry.AUTOMATIC:
        if name != "reference" and registry.missing(name) is None:
            assert "FASTLDM_BACKENDS=reference leaves it out" in facts["backends"][name]


@pytest.mark.parametrize("named", ["warp", "reference,warp"])
def test_backends_that_cannot_be_used(monkeypatch, named):
    monkeypatch.setenv("FASTLDM_BACKENDS", named)
    assert doctor.diagnose()["backends"].startswith("cannot be used: backends='warp'")


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    facts = doctor.diagnose()
    assert facts["devices"].startswith("torch cannot be imported")
    assert "ops" not in facts and "python" in facts


def test_reasons_for_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor.diagnose()["devices"]["cuda"] == "no: this torch is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no NVIDIA driver" in doctor.diagnose()["devices"]["cuda"]


def test_command(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"\n  torch: {facts['versions']['torch']}\n" in text
    assert all(f"\n  {name}: " in text for name in facts["ops"])
