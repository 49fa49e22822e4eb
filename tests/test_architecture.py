"""The arrows between parts, the public names, the sizes of files: architecture that cannot drift unnoticed."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import stateline

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "stateline"

#: A part may import the parts to its left, and itself.
ORDER = [
    "checks",
    "theory",
    "files",
    "backends",
    "state",
    "ops",
    "classical",
    "nn",
    "models",
    "generation",
    "training",
    "interop",
    "apps",
    "cli",
]
CORE = {"torch", "numpy", "safetensors", "stateline"} | set(sys.stdlib_module_names)

FILE_LINES = 500
FUNCTION_LINES = 80


def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


@functools.cache
def parsed(path: Path) -> ast.Module:
    """A file, parsed once for all that look at it."""
    return ast.parse(path.read_text())


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[tuple[str, ast.AST]]:
    found: list[tuple[str, ast.AST]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"relative import at line {node.lineno}"
            names = [f"stateline.{alias.name}" for alias in node.names] if node.module == "stateline" else [node.module]
            found += [(name, node) for name in names]
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    part = part_of(path)
    if part in ("__init__", "__main__"):
        return
    assert part in ORDER, f"{part} has no place in the order of parts"
    for name, node in imports(parsed(path)):
        if not name.startswith("stateline."):
            continue
        other = name.split(".")[1]
        assert other in ORDER, f"{path.name}:{node.lineno} imports unknown part {other}"  # type: ignore[attr-defined]
        assert ORDER.index(other) <= ORDER.index(part), f"{path.name}: {part} may not import {other}"
        if other == "classical":
            assert part in ("classical", "apps", "cli"), f"{path.name}: {part} may not import {other}"


def test_native_files_stay_small() -> None:
    for path in [*SOURCE.rglob("*.cpp"), *SOURCE.rglob("*.h"), *SOURCE.rglob("*.cu"), *SOURCE.rglob("*.cuh")]:
        assert path.read_text().count("\n") <= FILE_LINES, path.name


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_module_level_imports_are_core_only(path: Path) -> None:
    """Extras are imported where they are used, so that the core installs and starts alone."""
    for node in parsed(path).body:
        for name, _ in imports(node) if isinstance(node, ast.Import | ast.ImportFrom) else []:
            known = CORE | {"triton"} if path.name.endswith("_kernels.py") else CORE  # on a CUDA tensor
            assert name.split(".")[0] in known, f"{path.name} imports {name} at module level"


@pytest.mark.parametrize("path", [*sources(), *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda p: p.name)
def test_files_and_functions_stay_small(path: Path) -> None:
    assert path.read_text().count("\n") <= FILE_LINES
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < FUNCTION_LINES, f"{path.name}: {node.name} is too long"


def test_public_names_are_frozen() -> None:
    assert stateline.__all__ == [
        "Engine", "LanguageModel", "ModelConfig", "backends", "generate", "generation", "load", "models", "nn", "ops",
        "prepare_for_decode", "save", "state", "theory", "training",
    ]  # fmt: skip
    of_extras = ["SequenceClassifier", "SequenceRegressor"]
    assert sorted(stateline._OF_EXTRAS) == of_extras
    assert set(of_extras) <= set(dir(stateline))
    for name in [*stateline.__all__, *of_extras]:
        assert getattr(stateline, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'; it has"):
        stateline.nonsense  # noqa: B018


#: Methods whose meaning PyTorch fixes.
OVERRIDES = ("forward", "backward", "setup_context", "extra_repr")


def public_definitions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes of a module and methods of its classes; helpers inside functions are nobody's interface."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body)


def test_public_functions_are_documented() -> None:
    for path in sources():
        for node in public_definitions(parsed(path).body):
            assert node.name in OVERRIDES or ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def test_import_touches_nothing_heavy() -> None:
    """`import stateline` alone does not even import torch; `--help` must answer at once."""
    code = "import sys, stateline; print([m for m in ('torch', 'triton', 'transformers', 'tqdm') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_triton_waits_for_a_cuda_tensor() -> None:
    code = "import sys, stateline.ops as o, torch; o.causal_conv1d(torch.ones(1, 3, 1), torch.ones(1, 2))"
    code += "; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_op_folder_has_the_same_shape() -> None:
    for folder in sorted(p for p in (SOURCE / "ops").iterdir() if p.is_dir() and p.name != "__pycache__"):
        names = {p.name for p in folder.iterdir()}
        assert {"__init__.py", "reference.py", "cpu.py", "cpu.cpp"} <= names, folder.name
        scripts = {name for name in names if name.endswith(".py")}
        gpu = {
            "gpu.py",
            "gpu_plan.py",
            "gpu_triton.py",
            "gpu_kernels.py",
            "gpu_backward_kernels.py",
            "gpu_table_kernels.py",
            "gpu_controls.py",
            "gpu_controls_kernels.py",
            "controls.py",
        }
        assert (
            scripts
            <= {
                "__init__.py",
                "reference.py",
                "cpu.py",
                "pack.py",
                "chunked.py",
                "fuse.py",
                "smooth.py",
                "spectrum.py",
                "step.py",
            }
            | gpu
        ), folder.name


def test_repository_speaks_of_the_project_alone() -> None:
    """No path of a machine and no registry host in any tracked text."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    banned = ("/wo" + "rk/", "/ro" + "ot/", "--index" + "-url", "../sha" + "red", "registry" + "=")
    for name in tracked:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".cpp", ".h", ".cu", ".cuh", ".yml", "") and path.is_file():
            if path.stat().st_size > 500_000:  # the bundled text
                continue
            text = path.read_text(errors="replace")
            assert not [b for b in banned if b in text], name
