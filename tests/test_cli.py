"""The commands as a person meets them: help, usage errors, exit codes, no traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mind import __version__
from mind.cli import main as cli
from mind.errors import exit_on_error
from mind.params import load_config

COMMANDS = (
    "run",
    "synthesize",
    "snapshot",
    "distill",
    "evaluate",
    "reevaluate",
    "sweep",
    "compare",
    "teacher",
    "lineage",
    "up",
    "init",
    "doctor",
    "settings",
)


def mind(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "mind.cli", *args], cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "work"
    done = mind("init", str(folder), cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return folder


def test_help_names_every_command_and_loads_nothing_heavy(tmp_path: Path) -> None:
    listed = mind("--help", cwd=tmp_path)
    assert listed.returncode == 0 and all(f"\n  {name} " in listed.stdout for name in COMMANDS) and set(cli.commands) == set(COMMANDS)
    heavy = "torch transformers mlflow prefect dvc sklearn openai datasets pandas"
    code = f"import sys; from mind.cli import main; main(['--help'], standalone_mode=False); sys.exit(bool(set('{heavy}'.split()) & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_version(tmp_path: Path) -> None:
    assert mind("--version", cwd=tmp_path).stdout.strip() == f"mind, version {__version__}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, tmp_path: Path) -> None:
    done = mind(command, "--help", cwd=tmp_path)
    assert done.returncode == 0 and "Usage:" in done.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("nonsense",), "No such command"),
        (("distill",), "Missing option '--variant'"),
        (("distill", "--variant", "nobody"), "unknown variant 'nobody'"),
        (("distill", "--variant", "mnid"), "unknown variant 'mnid'; did you mean 'mind'?"),
        (("compare", "--variants", "mnid"), "unknown variant 'mnid'; did you mean 'mind'?"),
        (("compare", "--reference", "bsae"), "unknown variant 'bsae'; did you mean 'base'?"),
        (("compare", "--variants", ""), "'--variants': '' names nothing"),
        (("compare", "--reference", " "), "'--reference': ' ' names nothing"),
        (("run", "--variants", ","), "'--variants': ',' names nothing"),
        (("run", "--variants", ""), "'--variants': '' names nothing"),
        (("sweep", "--seeds", "17", "--variants", " , "), "'--variants': ' , ' names nothing"),
        (("sweep", "--seeds", ","), "'--seeds': ',' names nothing"),
        (("-C", "nowhere", "compare"), "Directory 'nowhere' does not exist"),
        (("teacher", "--port", "99999"), "99999 is not in the range 0<=x<=65535"),
        (("evaluate", "--variant", "without-fusion"), "is not among run.variants"),
        (("snapshot", "--set", "snapshot.esay_keep=1"), "snapshot.esay_keep: unknown key; did you mean 'easy_keep'?"),
        (("snapshot", "--set", "snapshot.easy_keep"), "--set stage.key=value"),
        (("compare",), "mind run"),
        (("compare", "--runs"), "mind sweep"),
        (("sweep",), "Missing option '--seeds'"),
        (("sweep", "--seeds", "17,x"), "'x'; wanted whole numbers"),
        (("sweep", "--seeds", "18", "--variants", "nobody"), "unknown variant 'nobody'"),
        (("init", "."), "is a workspace already"),
        (("init", "other", "--questions", "absent.jsonl"), "cannot read absent.jsonl"),
    ],
)
def test_bad_usage_ends_with_2_and_says_what_to_do(workspace: Path, args: tuple[str, ...], says: str) -> None:
    done = mind(*args, cwd=workspace)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("run",),
        ("sweep", "--seeds", "17"),
        ("synthesize",),
        ("synthesize", "--dry-run"),
        ("distill", "--variant", "mind"),
    ],
    ids=" ".join,
)
def test_a_benchmark_that_cannot_be_used_is_found_before_the_teacher_is_asked(workspace: Path, command: tuple[str, ...]) -> None:
    done = mind(*command, "--set", "evaluation.benchmarks=[primer, nope]", cwd=workspace)
    assert done.returncode == 2 and "unknown benchmark 'nope'" in done.stderr, done.stderr
    described = workspace / "benchmarks" / "mine.yaml"
    described.parent.mkdir(exist_ok=True)
    described.write_text("title: T\ndomain: somewhere\n")
    try:
        done = mind(*command, "--set", "evaluation.benchmarks=[mine]", cwd=workspace)
    finally:
        described.unlink()
    assert done.returncode == 2 and "mine.yaml: domain: Input should be 'id' or 'ood'" in done.stderr, done.stderr
    assert not list(workspace.rglob("replies.sqlite")) and not list(workspace.rglob("rationales"))


def test_without_a_registered_student_there_is_no_talk_of_results(workspace: Path) -> None:
    for args in (["--dry-run"], []):
        done = mind("reevaluate", *args, cwd=workspace)
        assert done.returncode == 0 and "no student is registered yet: `mind run`" in done.stderr and "nothing to do" not in done.stderr


def refused(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/mnt/work/params.yaml")


@pytest.mark.parametrize(
    ("error", "says", "step"),
    [
        (refused(errno.EROFS), "/mnt/work/params.yaml: Read-only file system", "a folder that can be written: `mind -C FOLDER"),
        (refused(errno.EACCES), "/mnt/work/params.yaml: Permission denied", "give this user the right"),
        (refused(errno.ENOSPC), "/mnt/work/params.yaml: no space left on the disk", "finished work is kept"),
        (refused(errno.ENOENT), "/mnt/work/params.yaml: No such file or directory", "`mind doctor`"),
        (refused(errno.EIO), "/mnt/work/params.yaml: Input/output error", "`mind --debug COMMAND`"),
        (ValueError("odd"), "ValueError: odd", "`mind --debug COMMAND`"),
    ],
)
def test_what_the_system_refuses_is_said_with_place_and_step(
    error: Exception, says: str, step: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left, exit_on_error():
        raise error
    said = capsys.readouterr().err
    assert left.value.code == 1 and said.startswith(f"error: {says}\n") and step in said
    assert ("a fault in mind" in said) == isinstance(error, ValueError)


def test_what_the_system_refuses_is_known_through_a_librarys_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), exit_on_error():
        raise RuntimeError("of a library") from refused(errno.EROFS)
    assert "/mnt/work/params.yaml: Read-only file system" in capsys.readouterr().err


def test_outside_a_workspace_the_way_in_is_named(tmp_path: Path) -> None:
    done = mind("run", cwd=tmp_path)
    assert done.returncode == 2 and "mind init" in done.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in mind("--debug", "run", cwd=tmp_path).stderr


def test_a_stage_process_refuses_a_missing_or_needless_variant(workspace: Path) -> None:
    for args in (["distill"], ["snapshot", "--variant", "mind"], ["nonsense"]):
        done = subprocess.run([sys.executable, "-m", "mind.stages", *args], cwd=workspace, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr


def test_init_fills_in_what_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"id": "a", "question": "1 + 1?", "answer": "2"}\n')
    done = mind(
        "init",
        "work",
        "--questions",
        "mine.jsonl",
        "--teacher",
        "http://127.0.0.1:1/v1",
        "--model",
        "big",
        "--student",
        "a/b",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    params = (tmp_path / "work" / "params.yaml").read_text()
    for line in ("questions: mine ", "base_url: http://127.0.0.1:1/v1", "model: big", "name: a/b"):
        assert line in params
    assert "# data/questions/NAME.jsonl" in params  # comments are kept
    assert (tmp_path / "work" / "data" / "questions" / "mine.jsonl").exists() and (tmp_path / "work" / "data.dvc").exists()


def test_settings_are_all_of_them_and_can_be_read_again(workspace: Path, tmp_path: Path) -> None:
    shown = mind("settings", "--set", "training.epochs=7", cwd=workspace)
    assert shown.returncode == 0, shown.stderr
    assert "too_long: refuse" in shown.stdout  # a default that params.yaml does not name
    (tmp_path / "params.yaml").write_text(shown.stdout)
    assert load_config(tmp_path / "params.yaml").training.epochs == 7
