"""`mind init DIR`: a workspace of one's own, in which every door works. Called by the CLI."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter

from mind import params, versioning
from mind.errors import ConfigError
from mind.grading import refuse_ungradable
from mind.progress import console
from mind.records import read_questions, write_jsonl
from mind.workspace import MARKERS, Workspace

POOLS = {"primer": "primer-train.jsonl", "full": "train.jsonl"}
"""data/questions/NAME.jsonl <- the package's corpus: the questions alone; the teacher has to be asked for the rationales."""

TESTS = {"primer": "primer-test.jsonl", "math": "test-math.jsonl", "choice": "test-choice.jsonl", "yesno": "test-yesno.jsonl"}
"""data/benchmarks/NAME.jsonl <- the package's held-out tests."""

IGNORED = "/data\n/rationales\n/dataset\n/students/\n/reports/\n/.mind/\n/mlflow/\n/.prefect/\n/dvc_plots/\n"

TARGETS = ("dvc.yaml", "dvc.lock", "prefect.yaml", "code.yaml", "params.yaml", "data", "data.dvc", "benchmarks/README.md")
"""What a workspace begins with."""

OUTPUTS = ("rationales", "dataset", "students", "reports")
"""What its stages write: whatever stands there is replaced when they run."""

SHARED = (".gitignore", ".dvcignore", ".dvc/config")
"""May stand in the folder before; what is in them stays."""


def make(
    folder: Path, *, questions: Path | None = None, base_url: str | None = None, model: str | None = None, student: str | None = None
) -> None:
    """Write a workspace: settings, pipeline, data under DVC. All of it or, when something fails, nothing.

    Args:
        questions: JSON Lines of records.Question; becomes the pool that is put to the teacher.
        base_url, model: an OpenAI-compatible teacher, in place of the embedded one.
        student: a hub id or a local folder, in place of the embedded one.

    Raises:
        ConfigError: the folder holds what would be overwritten, a setting cannot be used, or DVC refuses the folder.
        DataError: the questions file is missing or malformed, or has an answer that cannot be graded.
    """
    _refuse_to_overwrite(folder)
    settings = _settings(questions, base_url, model, student)
    pool = read_questions(questions) if questions else []
    refuse_ungradable(questions, pool)
    with _all_or_nothing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_starter_data(folder / "data")
        if questions:
            write_jsonl(folder / "data" / "questions" / f"{questions.stem}.jsonl", pool)
        _ignore(folder / ".gitignore")
        (folder / "benchmarks").mkdir(exist_ok=True)
        (folder / "benchmarks" / "README.md").write_bytes((resources.files("mind.starter") / "benchmarks.md").read_bytes())
        (folder / "prefect.yaml").write_bytes((resources.files("mind.starter") / "prefect.yaml").read_bytes())
        Workspace(folder).code.write_text(versioning.code_in_use(), encoding="utf-8")
        _put_under_dvc(folder)
        (folder / "dvc.yaml").write_text(pipeline_without_code(), encoding="utf-8")
        (folder / "params.yaml").write_text(settings, encoding="utf-8")  # last: with it the folder is a workspace
        _check_dvc(folder)
    enter = "" if folder.resolve() == Path.cwd() else f"cd {folder} && "
    console.print(f"workspace {folder}: look at params.yaml, then `{enter}mind run`")
    if questions and not base_url:
        console.print("the embedded teacher knows only the starter corpus: set teacher.base_url and teacher.model for your own questions")


def write_starter_data(data: Path) -> None:
    """data/ of the starter corpus; its DVC hash is the one that the repository's data.dvc pins."""
    (data / "questions").mkdir(parents=True)
    (data / "benchmarks").mkdir()
    corpus = resources.files("mind.starter")
    asked = ("id", "topic", "difficulty", "question", "answer")
    for name, source in POOLS.items():
        rows = [json.loads(line) for line in (corpus / source).read_text(encoding="utf-8").splitlines()]
        lines = [json.dumps({key: row[key] for key in asked}, ensure_ascii=False) + "\n" for row in rows]
        (data / "questions" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    for name, source in TESTS.items():
        (data / "benchmarks" / f"{name}.jsonl").write_bytes((corpus / source).read_bytes())


def pipeline_without_code() -> str:
    """dvc.yaml for a workspace beside an installed package: instead of code files, stages depend on the package's version."""
    yaml = YAML()
    pipeline: dict[str, Any] = yaml.load((resources.files("mind.starter") / "dvc.yaml").read_text(encoding="utf-8"))
    for stage in pipeline["stages"].values():
        stage["deps"] = [path for path in stage["deps"] if not str(path).startswith("mind/")]
        stage["params"] = [*stage["params"], {"code.yaml": ["mind"]}]
    return _dump(yaml, pipeline)


def _refuse_to_overwrite(folder: Path) -> None:
    present = [name for name in (*TARGETS, *OUTPUTS) if os.path.lexists(folder / name)]
    if {*MARKERS, "code.yaml"} <= set(present):
        raise ConfigError(f"{folder} is a workspace already", wanted="a new or empty folder", do="`mind init NEW_FOLDER`")
    if present:
        raise ConfigError(
            f"the folder {folder} has {', '.join(present)}: a workspace's own would take their place",
            wanted="a new or empty folder, or one without these",
            do="`mind init NEW_FOLDER`, for instance a folder inside this one",
        )


def _settings(questions: Path | None, base_url: str | None, model: str | None, student: str | None) -> str:
    """The text of params.yaml: the packaged one, comments kept, with what the user chose filled in.

    Raises:
        ConfigError: a choice that cannot be used.
    """
    if bool(base_url) != bool(model):
        raise ConfigError(
            f"--teacher {base_url} without --model" if base_url else f"--model {model} without --teacher",
            wanted="both, or neither for the embedded teacher",
            do="for instance --teacher https://api.openai.com/v1 --model gpt-4.1-mini",
        )
    chosen: dict[tuple[str, str], str | float | None] = {}
    if questions:  # the starter's economies, of questions of the pool and of the benchmarks, are no one else's
        chosen |= {("synthesis", "questions"): questions.stem, ("snapshot", "easy_keep"): 1.0, ("evaluation", "limit"): None}
    if base_url:
        chosen |= {("teacher", "base_url"): base_url, ("teacher", "model"): model}
    if student:
        chosen["student", "name"] = str(Path(student).resolve()) if Path(student).is_dir() else student
    yaml = YAML()
    yaml.Representer = _Representer
    settings = yaml.load((resources.files("mind.starter") / "params.yaml").read_text(encoding="utf-8"))
    for (group, key), value in chosen.items():
        settings[group][key] = value
    text = _dump(yaml, settings)
    try:
        params.validate(YAML(typ="safe").load(text), "`mind init`")
    except ConfigError as error:
        raise ConfigError(error.found, do="mend the option that holds it") from None
    return text


class _Representer(RoundTripRepresenter):
    """Writes None as null: after `limit:` alone a reader looks for the value."""


_Representer.add_representer(type(None), lambda own, _: own.represent_scalar("tag:yaml.org,2002:null", "null"))


def _ignore(path: Path) -> None:
    """Add to a .gitignore the lines that it lacks."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lacking = [line for line in IGNORED.splitlines() if line not in text.splitlines()]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * (bool(text) and not text.endswith("\n")) + "".join(f"{line}\n" for line in lacking))


def _dump(yaml: YAML, content: Any) -> str:
    from io import StringIO

    yaml.width = 140
    yaml.indent(mapping=2, sequence=4, offset=2)
    out = StringIO()
    yaml.dump(content, out)
    return out.getvalue()


@contextmanager
def _all_or_nothing(folder: Path) -> Iterator[None]:
    """What the block makes goes again when it fails; what stood there before stays as it was (DVC's cache may have gained objects)."""
    folder = folder.resolve()
    new = [path for path in (folder, *folder.parents) if not path.exists()][-1:]  # the outermost
    new = new or [folder / name for name in (*TARGETS, "benchmarks", ".dvc", *SHARED) if not os.path.lexists(folder / name)]
    kept = {folder / name: (folder / name).read_bytes() for name in SHARED if (folder / name).is_file()}
    try:
        yield
    except BaseException:
        for path in new:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        for path, content in kept.items():
            path.write_bytes(content)
        if new:  # DVC stages its own files in git
            with suppress(OSError):  # no git program
                subprocess.run(["git", "reset", "-q", "--", *new], cwd=new[0].parent, capture_output=True)
        raise


def _put_under_dvc(folder: Path) -> None:
    """Add data/ to the DVC repository of the folder, as it is; where there is none, to a new one (below git where there is git)."""
    from dvc.config_schema import RelPath
    from dvc.repo import Repo

    in_git = any((parent / ".git").exists() for parent in (folder.resolve(), *folder.resolve().parents))
    below = in_git and not (folder / ".git").exists()
    old = (folder / ".dvc").is_dir()
    with _refusals(folder), Repo(str(folder)) if old else Repo.init(str(folder), no_scm=not in_git, subdir=below) as repo:
        if not old or not (repo.config["core"].get("remote") or repo.config["remote"]):
            with repo.config.edit("repo") as config:
                config["core"] = {**config.get("core", {}), **({} if old else {"analytics": False}), "remote": "local"}
                config["remote"] = {"local": {"url": RelPath(str((folder / ".mind" / "remote").resolve()))}}
        repo.add(str(folder / "data"))


def _check_dvc(folder: Path) -> None:
    """That DVC takes the workspace as it is: an older DVC repository may claim one of its outputs."""
    from dvc.repo import Repo

    with _refusals(folder), Repo(str(folder)) as repo:
        repo.check_graph(stages=[])


@contextmanager
def _refusals(folder: Path) -> Iterator[None]:
    from dvc.exceptions import DvcException

    try:
        yield
    except DvcException as error:
        raise ConfigError(f"DVC cannot work in {folder}: {error}", do="mend that, or `mind init NEW_FOLDER`") from error
