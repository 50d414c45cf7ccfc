"""`mind`: the commands of a person at a terminal. Each one calls a stage through DVC, or the Prefect flow that chains them.

Nothing heavy is imported before a command needs it: `mind --help` answers in a fraction of a second.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mind import __version__
from mind.errors import exit_on_error
from mind.workspace import Workspace

if TYPE_CHECKING:
    from mind.tables import Form

F = TypeVar("F", bound=Callable[..., Any])

set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting in place of the one in params.yaml, e.g. training.epochs=2."
)
force_option = click.option("--force", is_flag=True, help="Run even where nothing has changed.")
json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")


def guarded(command: F) -> F:
    """Turns errors into messages and exit codes: 0 done, 1 failed, 2 bad usage or settings."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        with exit_on_error(debug=bool(os.environ.get("MIND_DEBUG"))):
            command(*args, **kwargs)

    return run  # type: ignore[return-value]


def _given(_context: click.Context, _option: click.Parameter, text: str | None) -> str | None:
    """An option that is there and names nothing, as an empty "$V" in a script, is not taken for one that is not there."""
    if text is not None and not text.strip(", "):
        raise click.BadParameter(f"'{text}' names nothing; wanted a name, or no such option at all")
    return text


def _names(context: click.Context, option: click.Parameter, listed: str | None) -> list[str] | None:
    """'a, b' -> ['a', 'b']."""
    listed = _given(context, option, listed)
    return None if listed is None else [name.strip() for name in listed.split(",") if name.strip()]


def _seeds(context: click.Context, option: click.Parameter, listed: str) -> list[int]:
    texts = _names(context, option, listed) or []
    for text in texts:
        if not text.isdecimal():
            raise click.BadParameter(f"'{text}'; wanted whole numbers like 17,18,19")
    return list(dict.fromkeys(map(int, texts)))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mind")
@click.option(
    "-C",
    "--workspace",
    "folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Work there instead of in the current folder.",
)
@click.option("--debug", is_flag=True, help="Show tracebacks and the libraries' own messages.")
def main(folder: Path | None, debug: bool) -> None:
    """Distil a teacher's reasoning, from eight perspectives, into a small student.

    \b
    mind run          the whole line: synthesize, snapshot, distill, evaluate, compare
    mind init DIR     a workspace of your own: your questions, teacher and student
    """
    if debug:
        os.environ["MIND_DEBUG"] = "1"
    with exit_on_error(debug):
        if folder is not None:
            os.chdir(folder)


@main.command()
@set_option
@force_option
@click.option("--variants", metavar="A,B,...", callback=_names, help="Which variants, in place of run.variants.")
@guarded
def run(overrides: tuple[str, ...], force: bool, variants: list[str] | None) -> None:
    """Bring the whole line up to date and compare the variants."""
    from mind import doors

    doors.run(_workspace(overrides, variants), force=force)


@main.command()
@set_option
@force_option
@click.option("--dry-run", is_flag=True, help="Say how many calls, tokens and how much money it would cost, and ask nothing.")
@click.option("--cancel", is_flag=True, help="Cancel the batches that are under way (teacher.mode: batch); what has come in is kept.")
@guarded
def synthesize(overrides: tuple[str, ...], force: bool, dry_run: bool, cancel: bool) -> None:
    """Ask the teacher for rationales from eight perspectives; judge them."""
    workspace = _workspace(overrides)
    if not (dry_run or cancel):
        _stage(workspace, "synthesize", force)
        return
    from mind import doors

    click.echo(doors.cancel_batches(workspace) if cancel else doors.estimate(workspace))


@main.command()
@set_option
@force_option
@guarded
def snapshot(overrides: tuple[str, ...], force: bool) -> None:
    """Make the dataset from the accepted rationales."""
    _stage(_workspace(overrides), "snapshot", force)


@main.command()
@click.option("--variant", required=True, help="Which of run.variants.")
@set_option
@force_option
@guarded
def distill(variant: str, overrides: tuple[str, ...], force: bool) -> None:
    """Train the student of one variant."""
    _stage(_workspace(overrides), "distill", force, variant)


@main.command()
@click.option("--variant", required=True, help="Which of run.variants.")
@set_option
@force_option
@guarded
def evaluate(variant: str, overrides: tuple[str, ...], force: bool) -> None:
    """Measure the student of one variant."""
    _stage(_workspace(overrides), "evaluate", force, variant)


@main.command()
@set_option
@click.option("--dry-run", is_flag=True, help="Say what would be measured, and measure nothing.")
@guarded
def reevaluate(overrides: tuple[str, ...], dry_run: bool) -> None:
    """Measure registered students on benchmarks that are new or have changed."""
    from mind import doors

    doors.reevaluate(_workspace(overrides), dry_run=dry_run)


@main.command()
@click.option("--seeds", required=True, metavar="17,18,...", callback=_seeds, help="Of the trainings; all share one dataset.")
@click.option("--variants", metavar="A,B,...", callback=_names, help="Which variants; default: run.variants. The reference comes along.")
@set_option
@guarded
def sweep(seeds: list[int], variants: list[str] | None, overrides: tuple[str, ...]) -> None:
    """Many variants with many seeds: train, evaluate, compare.

    What is done is cached: the same command again, or one with more variants and seeds, runs only what is new. A variant that
    fails does not stop the others.
    """
    from mind import doors
    from mind.params import parse_overrides

    doors.sweep(Workspace.find(), parse_overrides(overrides), variants, seeds)


@main.command()
@set_option
@click.option("--variants", metavar="A,B,...", callback=_names, help="Which ones; default: run.variants, or with --runs all.")
@click.option("--reference", callback=_given, help="What the others are tested against; default: run.reference.")
@click.option("--runs", is_flag=True, help="From MLflow: every variant and seed of this dataset and student, wherever it was trained.")
@json_option
@click.option("--markdown", "form", flag_value="markdown", help="A Markdown table.")
@click.option("--latex", "form", flag_value="latex", help="A LaTeX table.")
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False), help="Also draw it, as PNG, SVG or PDF.")
@guarded
def compare(
    overrides: tuple[str, ...],
    variants: list[str] | None,
    reference: str | None,
    runs: bool,
    as_json: bool,
    form: Form | None,
    picture: Path | None,
) -> None:
    """Say which variant helps, and by how much.

    Accuracies with 95 % intervals, over seeds where there are several, and differences to the reference on the same questions.
    """
    from mind import comparison, tables
    from mind.params import load_config

    workspace = _workspace(overrides)
    read = comparison.compare_runs if runs else comparison.compare
    result = read(workspace, load_config(workspace.params), variants, reference)
    tables.show(result, "json" if as_json else form or "console")
    if picture is not None:
        tables.draw(result, picture)


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="0 picks a free one.")
@click.option("--latency", type=click.FloatRange(min=0), default=0.0, metavar="SECONDS", help="Wait before each answer.")
@click.option("--fail-rate", type=click.FloatRange(0, 1), default=0.0, help="Share of requests answered with a 500.")
@click.option("--wrong-rate", type=click.FloatRange(0, 1), default=0.0, help="Share of replies that are a recorded mistake.")
@click.option("--max-in-flight", type=click.IntRange(min=1), default=None, help="Requests above it get a 429.")
@guarded
def teacher(host: str, port: int, latency: float, fail_rate: float, wrong_rate: float, max_in_flight: int | None) -> None:
    """Serve the recorded rationales over the OpenAI protocol, on this machine."""
    from mind.teacher import server

    server.serve(host, port, latency=latency, fail_rate=fail_rate, wrong_rate=wrong_rate, max_in_flight=max_in_flight)


@main.command()
@click.argument("run")
@click.option("--question", metavar="ID", help="Also show the views of this question, with the teacher's request behind each.")
@json_option
@guarded
def lineage(run: str, question: str | None, as_json: bool) -> None:
    """Where RUN came from: commit, dataset, rationales, requests.

    RUN is a variant, a run's id, or a registered student such as mind-smollm2-135m@mind.
    """
    from mind import lineage as walk
    from mind.params import load_config

    workspace = _workspace(())
    found = walk.trace(workspace, load_config(workspace.params), run, question)
    click.echo(found.to_json() if as_json else "\n".join(walk.show(found)))


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on; the servers ask for no password.")
@click.option("--prefect-port", type=click.IntRange(0, 65535), help="Default: 4200, or a free one.")
@click.option("--mlflow-port", type=click.IntRange(0, 65535), help="Default: 5000, or a free one.")
@click.option("--allow", multiple=True, metavar="NAME", help="A further host name under which people may reach the pages.")
@guarded
def up(host: str, prefect_port: int | None, mlflow_port: int | None, allow: tuple[str, ...]) -> None:
    """Serve this workspace: Prefect server, worker and schedules, MLflow's pages; until Ctrl-C."""
    from mind import services
    from mind.params import load_config

    workspace = _workspace(())
    config = load_config(workspace.params)
    services.up(workspace, config, host=host, prefect_port=prefect_port, mlflow_port=mlflow_port, allow=allow)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--questions", type=click.Path(path_type=Path, dir_okay=False), help="Your questions: JSON Lines with id, question, answer.")
@click.option("--teacher", "base_url", metavar="URL", help="An OpenAI-compatible endpoint, e.g. https://api.openai.com/v1.")
@click.option("--model", help="The teacher's model name at that endpoint.")
@click.option("--student", help="A hub id or a local folder.")
@guarded
def init(folder: Path, questions: Path | None, base_url: str | None, model: str | None, student: str | None) -> None:
    """Make a workspace in FOLDER."""
    from mind import initialise

    initialise.make(folder, questions=questions, base_url=base_url, model=model, student=student)


@main.command()
@set_option
@guarded
def doctor(overrides: tuple[str, ...]) -> None:
    """Check teacher, student, tracking, DVC and devices, and say how to mend each."""
    from mind import doctor as checkup
    from mind.params import load_config

    workspace = _workspace(overrides)
    if not checkup.report(load_config(workspace.params), workspace):
        raise SystemExit(1)


@main.command()
@set_option
@guarded
def settings(overrides: tuple[str, ...]) -> None:
    """Print every setting with its value, defaults included, in the form of params.yaml."""
    from mind.config import merge
    from mind.params import dump, parse_overrides, read_params, validate

    path = Workspace.find().params
    click.echo(dump(validate(merge(read_params(path), parse_overrides(overrides)), "params.yaml with --set")), nl=False)


def _workspace(overrides: tuple[str, ...], variants: list[str] | None = None) -> Workspace:
    """The workspace of the current folder, or the one derived from it by `--set`; its settings are checked at once."""
    from mind.params import load_config, nest, parse_overrides

    workspace = Workspace.find()
    changed = parse_overrides(overrides)
    if variants:
        changed = {**changed, **nest({"run.variants": variants})}
    if not changed:
        load_config(workspace.params)
        return workspace
    from mind import versioning

    derived = versioning.derive(workspace, changed)
    click.echo(f"workspace of these settings: {derived.root.relative_to(workspace.home)}", err=True)
    return derived


def _stage(workspace: Workspace, stage: str, force: bool, variant: str | None = None) -> None:
    from mind import doors

    doors.stage(workspace, stage, variant, force=force)


if __name__ == "__main__":
    main()
