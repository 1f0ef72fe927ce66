"""The shape of the code base: who may import whom, and what importing fastldm costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastldm"
SOURCES = {".py", ".cpp", ".cu", ".cuh", ".h"}

MODELS = {"models", "ops", "diffusion", "checks", "errors"}
FRONT = {
    *("arguments", "abilities", "canvas", "prompts", "maps", "words"),
    *("shortcuts", "checks", "images", "result", "errors"),
}
STAGES = {"runtime", "checkpoint", "tasks", "presets"}
# What each part of fastldm may import of fastldm: nothing that stands below it here, so imports run one way.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "checks": {"errors"},
    "images": {"checks", "errors"},
    "shortcuts": {"checks", "errors"},
    "abilities": {"errors"},
    "words": set(),
    "maps": {"images", "checks", "errors"},
    "prompts": {"abilities", "words", "checks", "errors"},
    "canvas": {"abilities", "prompts", "maps", "images", "checks", "errors"},
    "arguments": {"abilities", "canvas", "prompts", "shortcuts", "images", "checks", "errors"},
    "result": {"shortcuts", "images", "checks", "errors"},
    "diffusion": {"checks", "errors"},
    "scenes": {"words", "errors"},
    "ops": {"_C", "_cuda", "errors"},
    "kernels": {"_cuda", "ops", "errors"},
    "models": {"ops", "checks", "errors"},
    "runtime": {"ops", "errors"},
    "presets": MODELS,
    "checkpoint": {"abilities", "presets", *MODELS},
    "tasks": {"runtime", "presets", *MODELS},
    "lora": {"checkpoint", "checks", "errors"},
    "training": {"abilities", "checkpoint", "scenes", "images", *MODELS},
    "footprint": {"arguments", "checkpoint", "models", "ops", "errors"},
    "origin": {"arguments", "checkpoint", "errors"},
    "pipeline": {"footprint", "lora", "origin", *STAGES, *FRONT, *MODELS},
    "api": {"pipeline", *STAGES, *FRONT, *MODELS},
    "inversion": {"pipeline", "runtime", "diffusion", *FRONT},
    "interpolation": {"pipeline", *FRONT},
    "verification": {"pipeline", "runtime", "ops", "canvas", "errors"},
    "doctor": {"kernels", "runtime", "ops", "errors"},
    "tuning": {"kernels", *STAGES, *MODELS},
    "serve": {"api", "pipeline", *STAGES, *FRONT, *MODELS},
    "bench": {"api", "pipeline", "doctor", "scenes", "training", *STAGES, *FRONT, *MODELS},
    "cli_generate": {"images", "errors"},
    "cli": {
        *(
            "api",
            "cli_generate",
            "bench",
            "pipeline",
            "doctor",
            "serve",
            "training",
            "tuning",
            "verification",
        ),
        *(*STAGES, *FRONT, *MODELS),
    },
    "__init__": {
        "api",
        "canvas",
        "interpolation",
        "inversion",
        "pipeline",
        "result",
        "shortcuts",
        "verification",
        "errors",
    },
    "__main__": {"cli"},
}
# What each part may import from elsewhere, beside the standard library; the hub client is checkpoint's alone.
NEEDED_TO_RUN = {"torch", "numpy", "PIL", "tqdm", "safetensors", "tokenizers", "triton"}
FROM_ELSEWHERE: dict[str, set[str]] = {
    "errors": set(),
    "__init__": set(),
    "diffusion": {"torch"},
    "ops": {"torch"},
    "kernels": {"torch", "triton"},
    "scenes": {"PIL", "numpy", "safetensors", "torch"},
    "checkpoint": {*NEEDED_TO_RUN, "huggingface_hub"},
    "training": {*NEEDED_TO_RUN, "tomli"},
    "bench": {*NEEDED_TO_RUN, "diffusers"},  # as a contender, where it is installed
}


def modules() -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Every source file of the package with its dotted name; kernels/ is the package fastldm.kernels."""
    for folder, prefix in ((PACKAGE, ("fastldm",)), (ROOT / "kernels", ("fastldm", "kernels"))):
        for file in sorted(folder.rglob("*.py")):
            yield file, (*prefix, *file.relative_to(folder).with_suffix("").parts)


def imports(file: Path, name: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The dotted name of everything that the file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = name[: -node.level] if node.level else ()
            base = (*start, *(node.module.split(".") if node.module else ()))
            yield from ((*base, alias.name) for alias in node.names)


def test_imports_run_one_way() -> None:
    wrong = []
    for file, name in modules():
        part = name[1]
        for target in imports(file, name):
            if target[0] != "fastldm" or len(target) < 2 or target[1] in (part, "__version__", "__path__"):
                continue
            if target[1] not in MAY_IMPORT[part]:
                wrong.append(f"{file.relative_to(ROOT)} imports fastldm.{target[1]}")
    assert not wrong


def test_nothing_is_imported_that_is_not_a_dependency() -> None:
    wrong = []
    for file, name in modules():
        allowed = FROM_ELSEWHERE.get(name[1], NEEDED_TO_RUN) | {"fastldm", "__future__"}
        for target in imports(file, name):
            if target[0] not in allowed and target[0] not in sys.stdlib_module_names:
                wrong.append(f"{file.relative_to(ROOT)} imports {target[0]}")
    assert not wrong


def test_kernels_are_imported_as_fastldm_kernels_only() -> None:
    """Under two names, a kernel would register twice."""
    for folder in ("fastldm", "kernels", "tests", "benchmarks", "examples"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not any(target[0] == "kernels" for target in imports(file, (folder, file.stem))), file


def test_no_file_outgrows_one_idea() -> None:
    folders = ROOT / "fastldm", ROOT / "kernels", ROOT / "csrc"
    files = [file for folder in folders for file in folder.rglob("*") if file.suffix in SOURCES]
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in files
    }
    assert len(lengths) > 20
    assert not {file: length for file, length in lengths.items() if length > 400}


@pytest.mark.parametrize("module", ["fastldm", "fastldm.errors", "fastldm.arguments", "fastldm.cli"])
def test_the_front_loads_without_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'diffusers'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_importing_fastldm_takes_at_most_150_ms() -> None:
    """Processor time, the least of five processes: a loaded machine is no slow import."""
    code = "import time; start = time.process_time(); import fastldm; print(time.process_time() - start)"
    run = [sys.executable, "-c", code]
    assert min(float(subprocess.check_output(run)) for _ in range(5)) <= 0.15


def test_uninstalled_checkout_finds_its_kernels() -> None:
    code = "import fastldm.kernels; print(fastldm.kernels.__file__)"
    command = [sys.executable, "-S", "-c", code]  # no site-packages, so nothing is installed
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(result.stdout.strip()) == ROOT / "kernels" / "__init__.py"
