"""`mind init DIR`: a workspace of one's own, in which every door works. Called by the CLI."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from mind import __version__
from mind.errors import ConfigError
from mind.progress import console
from mind.records import read_questions, write_jsonl

POOLS = {"primer": "primer-train.jsonl", "full": "train.jsonl"}
"""data/questions/NAME.jsonl <- the package's corpus: the questions alone; the teacher has to be asked for the rationales."""

TESTS = {"primer": "primer-test.jsonl", "math": "test-math.jsonl", "choice": "test-choice.jsonl", "yesno": "test-yesno.jsonl"}
"""data/benchmarks/NAME.jsonl <- the package's held-out tests."""

IGNORED = "/data\n/rationales\n/dataset\n/students/\n/reports/\n/.mind/\n/mlflow/\n/.prefect/\n/dvc_plots/\n"
CODE = "code.yaml"


def make(
    folder: Path, *, questions: Path | None = None, base_url: str | None = None, model: str | None = None, student: str | None = None
) -> None:
    """Write a workspace: settings, pipeline, data under DVC.

    Args:
        questions: JSON Lines of records.Question; becomes the pool that is put to the teacher.
        base_url, model: an OpenAI-compatible teacher, in place of the embedded one.
        student: a hub id or a local folder, in place of the embedded one.

    Raises:
        ConfigError: the folder is a workspace already.
        DataError: the questions file is missing or malformed.
    """
    if (folder / "params.yaml").exists():
        raise ConfigError(f"{folder} is a workspace already", wanted="a new or empty folder")
    pool = read_questions(questions) if questions else []
    folder.mkdir(parents=True, exist_ok=True)
    write_starter_data(folder / "data")
    chosen: dict[tuple[str, str], str | None] = {
        ("synthesis", "questions"): questions.stem if questions else None,
        ("teacher", "base_url"): base_url,
        ("teacher", "model"): model,
        ("student", "name"): str(Path(student).resolve()) if student and Path(student).is_dir() else student,
    }
    if questions:
        write_jsonl(folder / "data" / "questions" / f"{questions.stem}.jsonl", pool)
    _write_params(folder / "params.yaml", {place: value for place, value in chosen.items() if value})
    (folder / "dvc.yaml").write_text(pipeline_without_code(), encoding="utf-8")
    (folder / CODE).write_text(
        f"# The version of mind that this workspace's results come from; a newer one runs the line again.\nmind: {__version__}\n",
        encoding="utf-8",
    )
    (folder / "benchmarks").mkdir(exist_ok=True)
    (folder / "benchmarks" / "README.md").write_bytes((resources.files("mind.starter") / "benchmarks.md").read_bytes())
    (folder / "prefect.yaml").write_bytes((resources.files("mind.starter") / "prefect.yaml").read_bytes())
    (folder / ".gitignore").write_text(IGNORED, encoding="utf-8")
    _init_dvc(folder)
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
        stage["params"] = [*stage["params"], {CODE: ["mind"]}]
    return _dump(yaml, pipeline)


def _write_params(path: Path, chosen: dict[tuple[str, str], str | None]) -> None:
    """The packaged params.yaml, comments kept, with what the user chose filled in."""
    yaml = YAML()
    params = yaml.load((resources.files("mind.starter") / "params.yaml").read_text(encoding="utf-8"))
    for (group, key), value in chosen.items():
        params[group][key] = value
    path.write_text(_dump(yaml, params), encoding="utf-8")


def _dump(yaml: YAML, content: Any) -> str:
    from io import StringIO

    yaml.width = 140
    yaml.indent(mapping=2, sequence=4, offset=2)
    out = StringIO()
    yaml.dump(content, out)
    return out.getvalue()


def _init_dvc(folder: Path) -> None:
    """A DVC repository in the folder (below a git repository where there is one), with data/ added."""
    from dvc.config_schema import RelPath
    from dvc.repo import Repo

    in_git = any((parent / ".git").exists() for parent in (folder.resolve(), *folder.resolve().parents))
    below = in_git and not (folder / ".git").exists()
    with Repo.init(str(folder), no_scm=not in_git, subdir=below) as repo:
        with repo.config.edit("repo") as config:
            config["core"] = {**config.get("core", {}), "analytics": False, "remote": "local"}
            config["remote"] = {"local": {"url": RelPath(str((folder / ".mind" / "remote").resolve()))}}
        repo.add(str(folder / "data"))
