"""What the diffusion tests share: recorded cases, analytic models, and the loop that applies a table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from fastldm.diffusion import COLUMNS, SchedulerConfig

FIXTURES = Path(__file__).parents[1] / "fixtures"


def load_case(name):
    """A recorded case: config, tol (JSON) and tensors weight/input/out by name."""
    groups = {"weight": {}, "in": {}, "out": {}}
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        notes = {key: json.loads(text) for key, text in file.metadata().items() if key in ("config", "tol")}
        for key in file.keys():
            group, _, rest = key.partition(".")
            groups[group][rest] = file.get_tensor(key)
    return SimpleNamespace(name=name, weight=groups["weight"], input=groups["in"], out=groups["out"], **notes)


def assert_recorded(case, key, got, *, floor=0.0, slack=0.0):
    """`got` equals out.<key> within the case's own tolerance; trajectories (*.x) are held step by step.

    `floor` is a relative error, `slack` an absolute one, that the original is known to make.
    """
    want = case.out[key].double()
    tolerance = max(case.tol.get("per_tensor", {}).get(key, case.tol["default"]), floor)
    pairs = zip(got, want, strict=True) if key.endswith(".x") else [(got, want)]
    for index, (mine, theirs) in enumerate(pairs):
        error = ((mine - theirs).abs().max() - slack) / theirs.abs().max()
        assert error <= tolerance, f"{case.name} {key} [{index}]: {error:.2e} > {tolerance:.0e}"


def run_table(table, model, x, noise=None, rows=None, dtype=torch.float64):
    """Applies a sampler table to x: every x, every x0. `model(x, t)` is the net; noise[i] belongs to step i.

    The arithmetic is plain and in `dtype`; `rows` None takes the table's float64 rows.
    """
    rows = table.rows64 if rows is None else rows
    x, x0, xs, x0s = x.to(dtype), torch.zeros_like(x, dtype=dtype), [], []
    for step, (values, draws) in enumerate(zip(rows[:-1].tolist(), table.draws, strict=True)):
        row = dict(zip(COLUMNS, values, strict=True))
        before, out = x0, model(x, row["t"])
        x0 = (row["x0_x"] * x + row["x0_out"] * out).clamp(-row["clamp"], row["clamp"])
        x = row["next_x"] * x + row["next_x0"] * x0 + row["next_prev"] * before
        if draws:
            x = x + row["noise"] * noise[step].to(dtype)
        xs.append(x)
        x0s.append(x0)
    return torch.stack(xs), torch.stack(x0s)


class GaussModel:
    """The exact net for data N(mu, var) on the SD betas, plus a small bend amp*tanh(mix x): it is not linear.

    Written from the recorded cases' `config.model.formula`; 'flow' is the rectified-flow twin, sigma t/1000.
    """

    def __init__(self, prediction, mu, mix, var=0.3, amp=0.12):
        self.prediction, self.mu, self.mix, self.var, self.amp = prediction, mu, mix, var, amp

    def __call__(self, x, t):
        mu = self.mu.to(x.dtype)
        bend = self.amp * torch.einsum("cd,bdhw->bchw", self.mix.to(x.dtype), x).tanh()
        if self.prediction == "flow":
            sigma = float(t) / 1000
            rest = (x - (1 - sigma) * mu) / ((1 - sigma) ** 2 * self.var + sigma**2)
            return sigma * rest - mu - (1 - sigma) * self.var * rest + bend
        kept = self.alpha_bar(float(t))
        alpha, sigma = math.sqrt(kept), math.sqrt(1 - kept)
        eps = sigma * (x - alpha * mu) / (kept * self.var + sigma**2) + bend
        x0 = (x - sigma * eps) / alpha
        return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[self.prediction]

    @staticmethod
    def alpha_bar(t):
        low, slope = math.sqrt(0.00085), math.sqrt(0.012) - math.sqrt(0.00085)
        return math.exp(-1000 * ((low + slope * t / 1000) ** 3 - low**3) / (3 * slope))


def random_model(prediction, seed=5):
    """A GaussModel on [., 4, 3, 5] latents with random weights."""
    draw = torch.Generator().manual_seed(seed)
    mu = 0.5 * torch.randn(4, 3, 5, generator=draw, dtype=torch.float64)
    mix = 0.5 * torch.randn(4, 4, generator=draw, dtype=torch.float64)
    return GaussModel(prediction, mu, mix)


def toyconv(case, weight, *, scale=1.0):
    """The recorded cases' small net, model(x, t), of these weights w1, b1, u, w2, b2; it sees t*scale."""

    def model(x, t):
        w = {name: value.to(x.dtype) for name, value in weight.items()}
        time = (t * scale / 1000).to(x.dtype).reshape(-1, 1, 1, 1)
        hidden = F.conv2d(x, w["w1"], w["b1"], padding=1) + time * w["u"].reshape(-1, 1, 1)
        out = F.conv2d(hidden.tanh(), w["w2"], w["b2"])
        skip = case.config["model"]["skip"] * x
        return torch.cat([out[:, : x.shape[1]] + skip, out[:, x.shape[1] :]], 1)

    return model


def iddpm_config(case, mean, variance, **entries):
    """The SchedulerConfig of a recorded improved-diffusion process."""
    length, betas = case.config["T"], {"beta_schedule": "squaredcos_cap_v2"}
    if case.config["noise_schedule"] == "linear":
        betas = {"beta_start": 0.1 / length, "beta_end": 20 / length}
    return SchedulerConfig(
        num_train_timesteps=length,
        prediction_type={"EPSILON": "epsilon", "START_X": "sample"}[mean],
        variance_type=variance.lower(),
        **betas,
        **entries,
    )


@pytest.fixture(scope="session")
def kit():
    """The helpers above, as one namespace (test folders here are no packages)."""
    return SimpleNamespace(
        load_case=load_case,
        assert_recorded=assert_recorded,
        run_table=run_table,
        GaussModel=GaussModel,
        random_model=random_model,
        toyconv=toyconv,
        iddpm_config=iddpm_config,
    )
