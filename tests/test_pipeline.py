"""dvc.yaml is the line: it has the flow's stages, names all the code that a stage imports, and ships in the package as it is."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from mind import initialise, versioning
from mind.config import Config
from mind.stages.__main__ import STAGES

ROOT = Path(__file__).parent.parent
TELLS = {"errors", "memory", "outputs", "progress", "registry", "store", "tracking", "versioning", "workspace"}
"""Modules that report, name or move results and do not decide them: a change there must not train a student again."""


def pipeline() -> dict[str, Any]:
    return YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]


def imports(module: Path) -> set[Path]:
    """Files of `mind` that a file imports, also inside its functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = {ROOT / f"{name.replace('.', '/')}.py" for name in names if name.startswith("mind.")}
    return {file for file in files if file.exists()}


def closure(module: Path) -> set[Path]:
    seen: set[Path] = set()
    new = {module}
    while new:
        seen |= new
        new = {found for file in new for found in imports(file) if found.stem not in TELLS} - seen
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_names_all_the_code_that_it_imports(stage: str) -> None:
    named = [ROOT / path for path in pipeline()[stage]["deps"]]
    missing = [
        f.relative_to(ROOT).as_posix()
        for f in closure(ROOT / f"mind/stages/{stage}.py")
        if not any(f == n or n in f.parents for n in named)
    ]
    assert not missing


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_names_no_code_that_it_does_not_import(stage: str) -> None:
    files = closure(ROOT / f"mind/stages/{stage}.py")
    idle = [
        d for d in pipeline()[stage]["deps"] if d.startswith("mind/") and not any(f == ROOT / d or ROOT / d in f.parents for f in files)
    ]
    assert not idle


def test_every_named_setting_exists() -> None:
    groups = {name.split(".")[0] for stage in pipeline().values() for name in stage["params"]}
    assert groups <= set(Config.model_fields)


def test_the_flow_and_dvc_have_the_same_stages() -> None:
    targets = versioning.stage_targets(("base", "mind"))
    assert {t.partition("@")[0] for t in targets} == set(pipeline()) == set(STAGES)
    assert {t for t in targets if "@" in t} == {f"{s}@{v}" for s, per_variant in STAGES.items() if per_variant for v in ("base", "mind")}


@pytest.mark.parametrize("name", ["params.yaml", "dvc.yaml", "prefect.yaml"])
def test_the_package_ships_the_same_file(name: str) -> None:
    shipped = ROOT / "mind" / "starter" / name
    assert shipped.read_bytes() == (ROOT / name).read_bytes(), f"cp {name} mind/starter/"


def test_a_new_workspace_explains_its_benchmarks_folder_as_this_one_does() -> None:
    assert (ROOT / "mind" / "starter" / "benchmarks.md").read_bytes() == (ROOT / "benchmarks" / "README.md").read_bytes()
    assert "benchmarks" in pipeline()["evaluate"]["deps"]  # a file dropped there makes every report stale


def test_data_dvc_pins_the_starter_corpus(tmp_path: Path) -> None:
    initialise.write_starter_data(tmp_path / "data")
    assert f"md5: {versioning.version_of(tmp_path / 'data')}" in (ROOT / "data.dvc").read_text()


def test_the_committed_remote_holds_what_data_dvc_pins() -> None:
    md5 = YAML(typ="safe").load((ROOT / "data.dvc").read_text())["outs"][0]["md5"]
    store = ROOT / ".dvc" / "starter" / "files" / "md5"
    listing = YAML(typ="safe").load((store / md5[:2] / md5[2:]).read_text())
    assert len(listing) == 6 and all((store / row["md5"][:2] / row["md5"][2:]).exists() for row in listing)


def test_a_workspace_beside_an_installed_package_depends_on_its_version() -> None:
    for stage in YAML(typ="safe").load(initialise.pipeline_without_code())["stages"].values():
        assert not any(d.startswith("mind/") for d in stage["deps"])
        assert {"code.yaml": ["mind"]} in stage["params"]


def test_the_repository_has_one_pipeline() -> None:
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        assert {Path(stage.path).relative_to(ROOT).as_posix() for stage in repo.index.stages} == {"dvc.yaml", "data.dvc"}
