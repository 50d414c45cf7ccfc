"""What the doors promise: names cannot leave the workspace, nothing is unpickled or run that came with data, servers stay on loopback."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from mind import initialise, versioning
from mind.benchmarks.loading import load
from mind.errors import ConfigError, UsageError
from mind.params import validate
from mind.workspace import Workspace

ROOT = Path(__file__).parent.parent
SOURCES = [path for folder in ("mind", "flows") for path in sorted((ROOT / folder).rglob("*.py"))]
OUTSIDE = ["../outside", "/outside", "a/../../outside", "..", ".", "", ".hidden", "a/b", "a\\b", "a\nb", "a\x00b", "x" * 65]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("security") / "work"
    initialise.make(folder)
    return Workspace(folder)


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_variant_has_a_name_that_leaves_its_folder(name: str) -> None:
    for settings in ({"variants": {name: {"method": "base"}}}, {"run": {"variants": [name]}}, {"run": {"reference": name}}):
        with pytest.raises(ConfigError):
            validate(settings)


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_parameter_of_a_deployment_leaves_the_workspace(name: str, workspace: Workspace) -> None:
    before = sorted(workspace.root.parent.rglob("*"))
    with pytest.raises(UsageError):
        versioning.derive(workspace, {"run": {"variants": [name]}})
    assert sorted(workspace.root.parent.rglob("*")) == before


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_benchmark_is_looked_for_outside(name: str, workspace: Workspace) -> None:
    outside = workspace.root.parent / "outside.yaml"
    outside.write_text((ROOT / "mind" / "benchmarks" / "primer.yaml").read_text())
    with pytest.raises(UsageError):
        load(name, workspace)


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_perspective_but_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError):
        validate({"synthesis": {"perspectives": [name, "socratic"]}})


def test_settings_are_data(tmp_path: Path) -> None:
    from mind.params import load_config

    (tmp_path / "params.yaml").write_text("seed: !!python/object/apply:os.system ['touch pwned']\n")
    with pytest.raises(UsageError):
        load_config(tmp_path / "params.yaml")
    assert not (Path.cwd() / "pwned").exists()


# --------------------------------------------------------------- over the code


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), node


def given(call: ast.Call, name: str) -> Any:
    """The constant that a call gives for a keyword; None without one."""
    return next((ast.literal_eval(k.value) for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def test_no_code_of_a_model_repository_is_run() -> None:
    assert not [place for place, _, call in calls() if given(call, "trust_remote_code")]


def test_weights_are_never_unpickled() -> None:
    assert not [place for place, name, call in calls() if name == "torch.load" and given(call, "weights_only") is not True]
    unsafe = {"pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "") or ""]
            assert not unsafe & {name.split(".")[0] for name in named} or not isinstance(node, ast.Import | ast.ImportFrom), path


def test_yaml_is_loaded_as_data_and_no_text_becomes_a_program() -> None:
    assert not [place for place, name, call in calls() if name.endswith("YAML") and given(call, "typ") not in (None, "safe")]
    assert not [place for place, name, _ in calls() if name in ("eval", "exec", "os.system", "yaml.unsafe_load")]
    assert not [place for place, _, call in calls() if given(call, "shell")]


def test_servers_listen_on_loopback_unless_told() -> None:
    from mind.cli import main
    from mind.teacher import server

    hosts = {name: next(p.default for p in main.commands[name].params if p.name == "host") for name in ("up", "teacher")}
    assert set(hosts.values()) == {"127.0.0.1"}
    defaults = [
        p.default for f in vars(server).values() if inspect.isfunction(f) for n, p in inspect.signature(f).parameters.items() if n == "host"
    ]
    assert set(defaults) <= {"127.0.0.1", inspect.Parameter.empty}


def test_the_team_server_keeps_its_host_check_and_is_not_exposed() -> None:
    settings = dict(
        line.split("=", 1) for line in (ROOT / "mlflow" / "server.env").read_text().splitlines() if line and not line.startswith("#")
    )
    assert settings["MLFLOW_SERVER_ALLOWED_HOSTS"] and "*" not in settings["MLFLOW_SERVER_ALLOWED_HOSTS"].replace(":*", "").split(",")
    compose = YAML(typ="safe").load((ROOT / "mlflow" / "compose.yaml").read_text())
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)
    text = (ROOT / "mlflow" / "compose.yaml").read_text()
    assert "PASSWORD:?" in text  # no default password
