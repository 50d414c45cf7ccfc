"""Between the commands and the work: runs the flow in this process, quietly, and says how it went. Called by the CLI only."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
from rich.markup import escape

from mind import doctor, services, versioning
from mind.config import Config
from mind.errors import EXIT_INTERRUPTED, INTERRUPTED, ConfigError, DataError, StageError
from mind.params import load_config
from mind.progress import console
from mind.workspace import Workspace


def run(workspace: Workspace, *, force: bool = False) -> None:
    """The whole line through the Prefect flow `mind`, then the comparison of its variants.

    Raises:
        ConfigError: settings that a later stage would refuse.
        StageError: a stage failed.
    """
    started = time.monotonic()
    config = load_config(workspace.params)
    doctor.preflight(config, workspace)
    states = _settled(workspace, config) if not force else {}
    if not states:
        with quiet_prefect(workspace), leaving_at_once():
            from flows.main import mind

            states = mind(workspace.root, force=force)
    worked = sum(state == "ran" for state in states.values())
    console.print(f"\n{len(states)} stages: {worked} ran, {len(states) - worked} cached, {time.monotonic() - started:.0f} s\n")
    summary(workspace, config)


def sweep(workspace: Workspace, overrides: Mapping[str, Any], variants: Sequence[str] | None, seeds: Sequence[int]) -> None:
    """Every variant with every seed through the Prefect flow `sweep`, then the comparison of what there is.

    Raises:
        ConfigError: a variant that cannot have another seed; settings that a later stage would refuse.
        StageError: some stages failed; the others are done and compared.
    """
    started = time.monotonic()
    here = versioning.derive_over_seeds(workspace, overrides, variants, seeds)
    config = load_config(here.params)
    doctor.preflight(config, here)
    console.print(f"{len(config.run.variants)} students in {here.root.relative_to(here.home)}: {', '.join(config.run.variants)}")
    failure: StageError | None = None
    states = _settled(here, config)
    if not states:
        with quiet_prefect(workspace), leaving_at_once():
            from flows.sweep import sweep as flow

            try:
                states = flow(workspace.root, list(seeds), list(variants) if variants else None, dict(overrides))
            except StageError as error:
                failure = error
    if failure is None:
        worked = sum(state == "ran" for state in states.values())
        console.print(f"\n{len(states)} stages: {worked} ran, {len(states) - worked} cached, {time.monotonic() - started:.0f} s\n")
    with suppress(DataError) if failure else nullcontext():  # nothing was evaluated: the failure says why
        summary(here, config)
        console.print(f"again     mind -C {here.root.relative_to(here.home)} compare --markdown   (or --latex, --json, --picture FILE)")
    if failure:
        raise failure


def _settled(workspace: Workspace, config: Config) -> dict[str, str]:
    """The states of a line that is up to date, empty for any other: where nothing has to be done, Prefect's server need not start."""
    targets = versioning.stage_targets(config.run.variants)
    begun = (workspace.root / "dvc.lock").exists() and workspace.data.exists()
    settled = begun and versioning.is_settled(workspace, targets)
    return dict.fromkeys(targets, "up to date") if settled else {}


def summary(workspace: Workspace, config: Config) -> None:
    """What came out: the table, the picture, the dataset version, and where to look further."""
    from mind import comparison, forgetting, store, tables

    forgetting.record(workspace, config)
    result = comparison.compare(workspace, config, list(config.run.variants))
    tables.draw(result, workspace.reports / "comparison.png")
    latent = ", latent.png" if tables.draw_latent(result, workspace.reports / "latent.png") else ""
    tables.show(result, "console")
    console.print(f"dataset   {versioning.version_of(workspace.dataset)}")
    reports = os.path.relpath(workspace.reports)
    console.print(f"pictures  in {reports}: comparison.png{latent}, VARIANT/*.png", soft_wrap=True)
    then = "   (then open http://127.0.0.1:5000)" if store.database_of(workspace, config.tracking) else ""
    console.print(f"runs      {escape(store.ui_hint(workspace, config.tracking))}{then}")


def stage(workspace: Workspace, name: str, variant: str | None = None, *, force: bool = False) -> None:
    """One stage, with whatever before it is out of date.

    Raises:
        ConfigError: a variant that is defined but not among run.variants; settings that a later stage would refuse.
        StageError: a stage failed.
    """
    config = load_config(workspace.params)
    if variant is not None:
        config.variant(variant)
        if variant not in config.run.variants:
            chosen = ", ".join([*config.run.variants, variant])
            raise ConfigError(
                f"variant '{variant}' is not among run.variants", do=f"add it in params.yaml, or give --set 'run.variants=[{chosen}]'"
            )
    doctor.preflight(config, workspace)
    versioning.ensure_data(workspace)
    for target in _up_to(name, variant):
        last = target.partition("@")[0] == name
        outcome = versioning.bring_up_to_date(workspace, target, force=force and last)
        if outcome.cached:
            console.print(f"{target}: {outcome.state}")


def reevaluate(workspace: Workspace, *, dry_run: bool = False) -> None:
    """Every registered student on every benchmark that it has no result on; each result is kept as it comes."""
    from mind import reevaluation, registry

    config = load_config(workspace.params)
    versioning.ensure_data(workspace)
    todo = reevaluation.pending(config, workspace)
    if not todo and not registry.versions(workspace, config.tracking):
        console.print("no student is registered yet: `mind run` trains and registers them")
    elif not todo:
        console.print("nothing to do: every registered student has a result on every benchmark")
    for pair in todo:
        console.print(f"to measure: {pair}" if dry_run else str(reevaluation.evaluate(config, workspace, pair)), markup=False)


def estimate(workspace: Workspace) -> str:
    """What synthesis would cost now; refuses what a run would refuse."""
    from mind.stages import synthesize

    config = load_config(workspace.params)
    doctor.preflight(config, workspace)
    versioning.ensure_data(workspace)
    return str(synthesize.dry_run(config, workspace))


def cancel_batches(workspace: Workspace) -> str:
    """Cancel what the provider's batch endpoint still works on."""
    from mind.stages import synthesize

    return f"{synthesize.cancel(load_config(workspace.params), workspace)} batches cancelled"


def _up_to(name: str, variant: str | None) -> list[str]:
    """The stage and those it reads from, in order."""
    line = ["synthesize", "snapshot", f"distill@{variant}", f"evaluate@{variant}"]
    names = [target.partition("@")[0] for target in line]
    return line[: names.index(name) + 1]


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Ctrl-C ends this process without Prefect's own farewell, which tries for minutes to reach a server that the same Ctrl-C has ended.

    Nothing is lost by it: a stage that was running has saved its state before its process ended.
    """

    def leave(_number: int, _frame: object) -> None:
        print(INTERRUPTED, file=sys.stderr, flush=True)
        for child in psutil.Process().children(recursive=True):
            child.terminate()
        os._exit(EXIT_INTERRUPTED)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def quiet_prefect(workspace: Workspace) -> Iterator[None]:
    """Prefect in this process, offline and silent, with a temporary server; one that the user has named is used instead."""
    values = {
        "DO_NOT_TRACK": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "INFO" if os.environ.get("MIND_DEBUG") else "CRITICAL",
        "PREFECT_LOGGING_TO_API_ENABLED": "false",
    }
    for name, value in values.items():
        os.environ.setdefault(name, value)
    named = any(name in os.environ for name in ("PREFECT_API_URL", "PREFECT_HOME", "PREFECT_PROFILE")) or Path("prefect.toml").exists()
    with nullcontext() if named else services.temporary(workspace) as server:
        for module in ("flows.main", "dvc.repo"):  # which takes seconds, while the server starts
            importlib.import_module(module)
        from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        import flows.main  # noqa: F401  (seconds, while the server starts)

        if server is not None:
            server.wait()
        # joining the heartbeat thread costs every flow run a second, and nobody watches a run in this process
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            yield
