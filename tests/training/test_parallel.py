"""Two processes that share a step's passes learn what one learns that accumulates them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

WORKER = """
import sys
from pathlib import Path
import torch
from torch import nn
from fastldm.diffusion import Criterion, Objective, SchedulerConfig
from fastldm.training.fit import FitSettings, fit
from fastldm.training.parallel import joined

folder, accumulate, fails = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "fails"
torch.manual_seed(0)
module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
settings = FitSettings(
    steps=12, batch=4, learning_rate=0.05, warmup=2, ema_decay=0.9, save_every=5, accumulate=accumulate
)

def loss(step, generator):
    x = torch.randn(settings.batch, 3, generator=generator)
    bad = fails and step == 7 and workers.rank == 1
    return (module(x) - x.sum(1, keepdim=True)).square().mean() * (float("nan") if bad else 1)

with joined(torch.device("cpu")) as workers:
    fit("it", module, loss, settings, folder, 1, workers=workers)
    torch.save(module.state_dict(), folder / f"end-{workers.rank}.pt")
    objective = Objective("vlb", timesteps="loss_second_moment")
    criterion = Criterion(objective, SchedulerConfig(num_train_timesteps=9), workers.gathered)
    clean = torch.rand(4, 1, 2, 2) + workers.rank
    criterion(lambda x, t: x, clean, generator=torch.Generator().manual_seed(workers.rank))
    torch.save(criterion.state_dict(), folder / f"memory-{workers.rank}.pt")
"""


def start(folder: Path, accumulate: int, count: int, *, fails: bool = False) -> list[subprocess.Popen[str]]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    folder.mkdir()
    started = []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{key: str(n) for key, n in place.items()}}
        command = [sys.executable, "-c", WORKER, str(folder), str(accumulate), "fails" if fails else "works"]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=pipe))
    return started


def test_two_processes_equal_one_that_accumulates_twice(tmp_path: Path) -> None:
    runs = {"one": start(tmp_path / "one", 2, 1), "two": start(tmp_path / "two", 1, 2)}
    outputs = {
        name: [worker.communicate(timeout=120) for worker in workers] for name, workers in runs.items()
    }
    assert all(worker.returncode == 0 for workers in runs.values() for worker in workers), outputs
    one = torch.load(tmp_path / "one" / "end-0.pt", weights_only=True)
    two, other = (torch.load(tmp_path / "two" / f"end-{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in one:
        assert torch.equal(two[name], other[name])
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)
    first, second = (torch.load(tmp_path / "two" / f"memory-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first) and int(first["counts"].sum()) == 8
    (leader, _), (follower, _) = outputs["two"]
    assert "it 12/12" in leader and follower == ""


def test_nan_in_one_process_stops_all_at_the_last_good_state(tmp_path: Path) -> None:
    workers = start(tmp_path / "run", 1, 2, fails=True)
    for worker in workers:
        _, error = worker.communicate(timeout=120)
        assert worker.returncode == 1 and "NonFiniteOutput" in error and "step 7" in error
    assert torch.load(tmp_path / "run" / "it.pt", weights_only=True)["step"] == 5
