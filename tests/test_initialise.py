"""`mind init`: it takes nobody's files, leaves nothing of a failed attempt, and writes only settings that work."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from mind import initialise
from mind.errors import ConfigError, DataError
from mind.params import load_config
from mind.workspace import Workspace


def content(folder: Path) -> dict[str, bytes | None]:
    """Every path below, with what files hold; git's and DVC's own bookkeeping left out."""
    below = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    own = re.compile(r"(^|/)(\.git|\.dvc/tmp|\.dvc/cache)(/|$)")
    return {name: path.read_bytes() if path.is_file() else None for name, path in below.items() if not own.search(name)}


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def git_and_dvc(folder: Path) -> None:
    run(folder, "git", "init", "-q")
    run(folder, sys.executable, "-m", "dvc", "init", "-q")


def failing(*_: object) -> None:
    raise KeyboardInterrupt


# ------------------------------------------------------------- what stands there


@pytest.mark.parametrize("name", [*initialise.TARGETS, *initialise.OUTPUTS])
def test_a_file_of_the_user_is_never_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = content(tmp_path)
    with pytest.raises(ConfigError, match=name) as caught:
        initialise.make(tmp_path)
    assert content(tmp_path) == before and "mind init NEW_FOLDER" in str(caught.value)


def test_all_that_stands_in_the_way_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "big.csv").write_text("1,2")
    (tmp_path / "dvc.yaml").write_text("stages: {}")
    (tmp_path / "prefect.yaml").symlink_to("nowhere")  # written through, it would make a file elsewhere
    with pytest.raises(ConfigError, match=r"has dvc\.yaml, prefect\.yaml, data: "):
        initialise.make(tmp_path)


def test_everything_that_init_writes_is_a_target(tmp_path: Path) -> None:
    initialise.make(tmp_path / "work")
    top = {name for name in content(tmp_path / "work") if not name.startswith((".dvc/", "data/"))}
    assert top <= {*initialise.TARGETS, *initialise.SHARED, "benchmarks", ".dvc"}


def test_a_workspace_is_not_made_twice(tmp_path: Path) -> None:
    initialise.make(tmp_path / "work")
    before = content(tmp_path / "work")
    with pytest.raises(ConfigError, match="is a workspace already"):
        initialise.make(tmp_path / "work")
    assert content(tmp_path / "work") == before


@pytest.mark.parametrize("ignored", ["*.pyc\n/data\n", "*.pyc\n/data", "\n"])
def test_an_existing_gitignore_gains_only_the_lines_that_it_lacks(ignored: str, tmp_path: Path) -> None:
    run(tmp_path, "git", "init", "-q")
    (tmp_path / ".gitignore").write_text(ignored)
    initialise.make(tmp_path)
    text = (tmp_path / ".gitignore").read_text()
    lines = text.splitlines()
    assert text.startswith(ignored) and set(initialise.IGNORED.splitlines()) <= set(lines) and lines.count("/data") == 1


# -------------------------------------------------------------- a DVC repository


def test_a_dvc_repository_in_the_folder_is_used_as_it_is(tmp_path: Path) -> None:
    git_and_dvc(tmp_path)
    config = "# ours\n[core]\n    remote = team\n['remote \"team\"']\n    url = s3://bucket/ours\n"
    (tmp_path / ".dvc" / "config").write_text(config)
    (tmp_path / ".dvcignore").write_text("*.swp\n")
    initialise.make(tmp_path)
    assert (tmp_path / ".dvc" / "config").read_text() == config and (tmp_path / ".dvcignore").read_text() == "*.swp\n"
    assert "data.dvc" not in run(tmp_path, sys.executable, "-m", "dvc", "status")  # data/ is what data.dvc pins
    assert Workspace.find(tmp_path).root == tmp_path.resolve()


def test_a_dvc_repository_without_a_remote_gets_one(tmp_path: Path) -> None:
    git_and_dvc(tmp_path)
    (tmp_path / ".dvc" / "config").write_text("[core]\n    autostage = true\n")
    initialise.make(tmp_path)
    config = (tmp_path / ".dvc" / "config").read_text()
    assert "autostage = true" in config and "remote = local" in config and "../.mind/remote" in config and "analytics" not in config


def test_what_dvc_refuses_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    git_and_dvc(tmp_path)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "dvc.yaml").write_text("stages: {x: {cmd: echo, outs: [../reports/base]}}\n")
    before = content(tmp_path)
    with pytest.raises(ConfigError, match="reports/base"):
        initialise.make(tmp_path)
    assert content(tmp_path) == before


# ---------------------------------------------------------- what fails midway


@pytest.mark.parametrize("step", ["write_starter_data", "_put_under_dvc", "pipeline_without_code", "_check_dvc"])
@pytest.mark.parametrize("place", ["new/deep", "git", "git/below", "dvc", "plain"])
def test_a_failed_init_leaves_nothing_and_can_be_repeated(place: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(place)
    if not place.startswith("new"):
        folder.mkdir(parents=True)
        (folder / ".gitignore").write_text("*.pyc")
        (folder / "notes.txt").write_text("mine")
    if place == "dvc":
        git_and_dvc(folder)
    elif place.startswith("git"):
        run(Path("git"), "git", "init", "-q")
    before = content(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(initialise, step, failing)
        initialise.make(folder)
    assert content(tmp_path) == before
    if place.startswith("git"):
        assert run(folder, "git", "diff", "--cached", "--name-only") == ""
    initialise.make(folder)
    assert load_config(folder / "params.yaml")


# ------------------------------------------------------------------- the settings


def questions(folder: Path, *rows: str) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("\n".join(rows))
    return path


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({"base_url": "api.openai.com/v1", "model": "big"}, "teacher.base_url: wanted 'embedded' or an address like"),
        ({"base_url": "https://api.openai.com/v1"}, "--teacher https://api.openai.com/v1 without --model"),
        ({"model": "big"}, "--model big without --teacher"),
    ],
)
def test_settings_that_cannot_be_used_are_not_written(chosen: dict[str, str], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        initialise.make(tmp_path / "work", **chosen)  # type: ignore[arg-type]
    assert says in str(caught.value) and "params.yaml" not in str(caught.value) and not (tmp_path / "work").exists()


def test_own_questions_are_asked_and_evaluated_in_full(tmp_path: Path) -> None:
    own = questions(tmp_path, '{"id": "a", "question": "1 + 1?", "answer": "2"}')
    initialise.make(tmp_path / "own", questions=own)
    initialise.make(tmp_path / "starter")
    config, starter = (load_config(tmp_path / name / "params.yaml") for name in ("own", "starter"))
    assert (config.snapshot.easy_keep, config.evaluation.limit) == (1.0, None)
    assert (starter.snapshot.easy_keep, starter.evaluation.limit) == (0.5, 64)
    assert config.evaluation.benchmarks == starter.evaluation.benchmarks
    assert "limit: null  " in (tmp_path / "own" / "params.yaml").read_text()
    raw = YAML(typ="safe").load(tmp_path / "starter" / "params.yaml")
    assert raw == YAML(typ="safe").load((initialise.resources.files("mind.starter") / "params.yaml").read_text())


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"id": "b", "question": "?", "answer": "a dozen"}', "'b': the answer 'a dozen' is not a number"),
        ('{"id": "c", "question": "?", "answer": "D", "kind": "choice", "choices": ["x", "y"]}', "'c': the answer 'D' is not one of"),
    ],
)
def test_an_answer_that_cannot_be_graded_is_refused(row: str, says: str, tmp_path: Path) -> None:
    own = questions(tmp_path, '{"id": "a", "question": "1 + 1?", "answer": "2"}', row)
    with pytest.raises(DataError, match=says):
        initialise.make(tmp_path / "work", questions=own)
    assert not (tmp_path / "work").exists()
