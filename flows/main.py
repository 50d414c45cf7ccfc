"""The line as a Prefect flow: synthesize -> snapshot -> (distill -> evaluate) for each variant.

Prefect decides when and where, retries what may pass by itself, and shows what happened. It does not think and does not cache:
a task brings its stage up to date through DVC and returns the state `Cached` when nothing had to run, so the flow and
`dvc repro` can never disagree.

    mind run                                    in this process, no server needed
    prefect deployment run mind/full            on a server and a worker (prefect.yaml)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prefect import flow, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed
from prefect.tasks import Task

from mind import versioning
from mind.config import load_config, nest
from mind.errors import EXIT_PASSING, PassingError, StageError
from mind.workspace import Workspace


def may_pass_by_itself(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Only what can be different next time is tried again: never bad input, a bad key or a fault in the code."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, PassingError) or (isinstance(error, StageError) and error.exit_code == EXIT_PASSING)


@task(
    retries=3,
    retry_delay_seconds=[10, 60, 300],
    retry_jitter_factor=0.3,
    retry_condition_fn=may_pass_by_itself,
    cache_policy=NO_CACHE,
    task_run_name="{target}",
)
def bring_up_to_date(workspace: Path, target: str, force: bool = False) -> State[None]:
    """One stage of the workspace, by content: runs, is restored from DVC's cache, or has nothing to do."""
    outcome = versioning.bring_up_to_date(Workspace(workspace), target, force=force)
    return Completed(name="Cached" if outcome.cached else "Completed", message=outcome.state)


@flow(name="mind", flow_run_name="mind {workspace}")
def mind(
    workspace: Path = Path(),
    variants: list[str] | None = None,
    set: dict[str, Any] | None = None,
    force: bool = False,
) -> dict[str, str]:
    """Bring the whole line up to date.

    Args:
        workspace: the folder with params.yaml.
        variants: which ones, in place of run.variants.
        set: settings in place of those in params.yaml, by dotted path: these runs get a workspace of their own.
        force: run every stage even where nothing has changed.

    Returns:
        Stage -> "ran", "restored" or "up to date".
    """
    overrides = nest({**(set or {}), **({"run.variants": variants} if variants else {})})
    here = versioning.derive(Workspace.find(workspace), overrides)
    versioning.ensure_data(here)
    os.environ["MIND_FLOW_RUN"] = str(runtime.flow_run.id)  # a stage is a process; its MLflow run names the flow run it belongs to
    targets = stage_targets(load_config(here.params).run.variants)
    # a task that returns a state hands that state to its caller
    return {target: str(bring_up_to_date(here.root, target, force).message) for target in targets}


def stage_targets(variants: tuple[str, ...]) -> list[str]:
    """The stages of dvc.yaml in the order in which they feed each other."""
    each = [f"{stage}@{variant}" for variant in variants for stage in ("distill", "evaluate")]
    return ["synthesize", "snapshot", *each]


if __name__ == "__main__":
    mind()
