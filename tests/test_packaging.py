"""The sdist and the wheel: what is in them, and that the wheel works where the checkout is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# One worker builds what all tests here look at.
pytestmark = pytest.mark.xdist_group("packaging")


def run(
    *command: str | Path, cwd: Path, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The finished process; a failure shows its whole output."""
    result = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def build(source: Path, out: Path, *options: str, check: bool = True, **environment: str) -> int:
    command = sys.executable, "-m", "build", "--no-isolation", "--outdir", out, *options, source
    return run(*command, cwd=source, check=check, **environment).returncode


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that building leaves nothing in the real checkout."""
    copy = tmp_path_factory.mktemp("checkout") / "fastldm"
    caches = "__pycache__", ".*_cache", "*.so", "*.egg-info", "build", "dist"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", *caches))
    return copy


@pytest.fixture(scope="module")
def distributions(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel made from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    build(checkout, out, FASTLDM_BUILD="1")
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def python(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the wheel installed, and the dependencies of this environment on its path."""
    venv = tmp_path_factory.mktemp("elsewhere") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv.parent)
    python = venv / "bin" / "python"
    pip = sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet"
    run(*pip, distributions[1], cwd=venv.parent)
    # A path in a .pth file is not searched for .pth files: the editable install there stays out of sight.
    site = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=venv.parent
    ).stdout.strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_sdist_holds_all_sources_and_no_binaries(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {
        "LICENSE",
        "Makefile",
        "constraints.txt",
        "setup.py",
        "tests/conftest.py",
        "kernels/__init__.py",
    }
    expected |= {str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*.[ch]*")}
    assert expected <= names
    assert not {name for name in names if name.endswith((".so", ".pyc")) or ".venv" in name}


def test_the_wheel_holds_package_kernels_and_assets(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        names = set(archive.namelist())
        entry_points = next(
            archive.read(name).decode() for name in names if name.endswith("entry_points.txt")
        )
    files = [
        file for file in (ROOT / "fastldm").rglob("*") if file.is_file() and "__pycache__" not in file.parts
    ]
    assert {str(file.relative_to(ROOT)) for file in files if file.suffix != ".so"} <= names
    assert f"fastldm/_C{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    assert "fastldm/kernels/__init__.py" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    # Nothing else at the top: a package named `kernels` would overwrite the PyPI project of that name.
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fastldm"}
    assert "fastldm = fastldm.cli:main" in entry_points


def test_the_installed_wheel_works_from_elsewhere(python: Path, tmp_path: Path) -> None:
    """-I: no folder of the caller and no PYTHONPATH on the path (-P alone does not exist in Python 3.10)."""
    code = """
import fastldm, fastldm.kernels, torch
from fastldm import ops
from fastldm.ops import cpp
x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
with ops.use_backends("cpp"):
    result = ops.group_norm_silu(x, torch.ones(8), torch.zeros(8), 4)
torch.testing.assert_close(result, ops.group_norm_silu.reference(x, torch.ones(8), torch.zeros(8), 4))
print(fastldm.__file__, fastldm.kernels.__file__, cpp._C.__file__, sep="\\n")
"""
    for line in run(python, "-I", "-c", code, cwd=tmp_path).stdout.splitlines():
        assert Path(line).is_relative_to(python.parents[1]), line
    assert "group_norm_silu" in run(python.parent / "fastldm", "doctor", cwd=tmp_path).stdout


def test_the_installed_wheel_draws_with_the_shipped_model(python: Path, tmp_path: Path) -> None:
    from PIL import Image

    command = python.parent / "fastldm", "generate", "a large red fish on a white background"
    run(*command, "--steps", "2", "--seed", "7", "-o", "fish.png", cwd=tmp_path)
    with Image.open(tmp_path / "fish.png") as image:
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 20) or range(99)) > 10


def test_without_a_compiler_it_installs_unless_the_build_is_asked_for(checkout: Path, tmp_path: Path) -> None:
    no_compiler = {"CC": "false", "CXX": "false"}
    assert build(checkout, tmp_path / "asked", "--wheel", check=False, FASTLDM_BUILD="1", **no_compiler) != 0
    for choice in ("", "0"):
        out = tmp_path / f"plain{choice}"
        build(checkout, out, "--wheel", FASTLDM_BUILD=choice, **no_compiler)
        (wheel,) = out.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
        assert "fastldm/ops/cpp/__init__.py" in names and not [name for name in names if name.endswith(".so")]
