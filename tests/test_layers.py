"""Imports point down only (ranks below), importing is cheap, and the folder `mlflow/` never hides the library."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

RANK_0 = {
    "mind",
    "mind.config",
    "mind.errors",
    "mind.outputs",
    "mind.params",
    "mind.progress",
    "mind.prompts",
    "mind.records",
    "mind.workspace",
}
RANK_2 = {
    "mind.doctor",
    "mind.comparison",
    "mind.forgetting",
    "mind.initialise",
    "mind.lineage",
    "mind.reevaluation",
}  # beside the stages: they read the configuration whole
RANK_3 = {"mind.cli", "mind.doors", "mind.services", "mind.stages.__main__", "mind.tables"}  # everything in flows/ too

HEAVY = {
    *("accelerate", "datasets", "dvc", "gguf", "httpx", "huggingface_hub", "math_verify", "matplotlib", "mlflow", "numpy", "openai"),
    *("pandas", "peft", "prefect", "safetensors", "scipy", "sklearn", "starlette", "torch", "transformers", "uvicorn"),
}


def rank(module: str) -> int:
    """0 leaves, 1 domain, 2 stages, 3 doors."""
    if module in RANK_0:
        return 0
    if module in RANK_3 or module.split(".")[0] == "flows":
        return 3
    return 2 if module in RANK_2 or module.startswith("mind.stages") else 1


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for folder in ("mind", "flows") for path in sorted((ROOT / folder).rglob("*.py"))}


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that a piece of code imports, relative imports excepted (there are none, by test)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in MODULES else node.module for alias in node.names)


def at_import(tree: ast.Module) -> Iterator[str]:
    """What importing the module itself imports: not inside functions, not under TYPE_CHECKING."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node)
        pending += ast.iter_child_nodes(node)


def ours(names: Iterator[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in ("mind", "flows")}


def parse(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def loaded_by(module: str) -> set[str]:
    """The third-party packages that importing `module` brings in, through our own modules, parent packages included."""
    seen: set[str] = set()
    found: set[str] = set()
    pending = [module]
    while pending:
        current = pending.pop()
        if current in seen or current not in MODULES:
            continue
        seen.add(current)
        parents = [current.rsplit(".", depth)[0] for depth in range(1, current.count(".") + 1)]
        names = set(at_import(parse(current)))
        pending += [*parents, *ours(iter(names))]
        found |= {name.split(".")[0] for name in names if name not in MODULES}
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down_only(module: str) -> None:
    """A door may call what is beside it and the domain may be layered within; a stage never imports another stage."""
    tree = parse(module)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level], "relative import"
    for target in ours(imported(tree)) - {module}:
        assert target in MODULES, f"{module} imports {target}, which is not there"
        assert rank(target) <= rank(module), f"{module} (rank {rank(module)}) imports {target} (rank {rank(target)})"
        assert not (rank(module) == rank(target) == 2), f"{module} imports {target}, which stands beside it"


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: ours(at_import(parse(module))) & set(MODULES) - {module} for module in MODULES}
    while leaves := [module for module, targets in graph.items() if not targets]:
        for leaf in leaves:
            del graph[leaf]
        for targets in graph.values():
            targets.difference_update(leaves)
    assert not graph, f"a circle among {sorted(graph)}"


@pytest.mark.parametrize(
    "module", sorted((RANK_0 | RANK_2 | {"mind.cli", "mind.doors", "mind.tracking", "mind.versioning"}) & set(MODULES))
)
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    assert not loaded_by(module) & HEAVY


def test_the_law_catches_what_it_forbids() -> None:
    tree = ast.parse(
        "def f():\n    import torch\nclass A:\n    import numpy\nif TYPE_CHECKING:\n    import peft\nfrom mind import cli, errors\n"
    )
    assert set(at_import(tree)) == {"numpy", "mind.cli", "mind.errors"}
    assert set(imported(tree)) == {"torch", "numpy", "peft", "mind.cli", "mind.errors"}
    assert [rank(name) for name in ("mind.errors", "mind.training.loop", "mind.stages.distill", "flows.main")] == [0, 1, 2, 3]
    assert "rich" in loaded_by("mind.tracking")


def test_the_help_page_loads_no_heavy_library() -> None:
    code = f"import sys; from mind.cli import main; main(['--help'], standalone_mode=False); sys.exit(str({sorted(HEAVY)!r} & sys.modules.keys()))"
    code = code.replace(repr(sorted(HEAVY)), f"set({sorted(HEAVY)!r})")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"


def test_every_module_says_its_place_first() -> None:
    """The first words of a file say what comes in, what goes out, or who calls it; `__init__.py` stays empty (but for the version)."""
    for module, path in MODULES.items():
        if path.name == "__init__.py":
            assert module == "mind" or not path.read_text().strip(), f"{path} does something when imported"
        else:
            assert ast.get_docstring(parse(module)), f"{path} opens without a docstring"


def test_the_folder_mlflow_does_not_hide_the_library() -> None:
    assert not list((ROOT / "mlflow").rglob("*.py"))
    code = "import importlib.metadata as m, mlflow, sys; sys.exit(mlflow.__version__ != m.version('mlflow'))"
    environment = {"MLFLOW_DISABLE_TELEMETRY": "true", "PATH": "/usr/bin:/bin"}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=False).returncode == 0
