"""Many variants with many seeds as a Prefect flow: each stage brought up to date once, and a failure stops its own variant only.

    mind sweep --variants mind,mcc --seeds 17,18,19

All variants share one synthesis, one dataset and one evaluation of the untrained student. What is done is cached by content, so that a
sweep that was killed, or that is asked for one seed more, goes on where it was.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from prefect import flow

from flows import shown
from flows.main import bring_up_to_date, one_after_another, side_by_side
from flows.parallel import runner
from mind import doctor, versioning
from mind.errors import StageError
from mind.params import load_config
from mind.progress import console
from mind.workspace import Workspace


@flow(name="sweep", flow_run_name="sweep {variants} seeds {seeds}")
def sweep(workspace: Path, seeds: list[int], variants: list[str] | None = None, set: dict[str, Any] | None = None) -> dict[str, str]:
    """Bring every variant with every seed up to date, in one workspace derived for them.

    Args:
        workspace: the folder with params.yaml.
        seeds: of the trainings; the dataset's seed stays.
        variants: which ones, in place of run.variants.
        set: settings in place of those in params.yaml.

    Returns:
        Stage -> "ran", "restored" or "up to date".

    Raises:
        ConfigError: settings that a later stage would refuse.
        StageError: some stages failed; all that could be done without them is done.
    """
    here = versioning.derive_over_seeds(Workspace.find(workspace), set or {}, variants, seeds)
    config = load_config(here.params)
    doctor.preflight(config, here)
    versioning.ensure_data(here)
    targets, parallel = versioning.stage_targets(config.run.variants), config.run.parallel
    if parallel.engine == "none":
        states = _each(here.root, targets)
    else:
        states = one_after_another(here.root, targets[:2], False, None)
        states |= side_by_side.with_options(task_runner=runner(parallel))(here.root, targets[2:], parallel, False, None)
    shown.results(here, config)
    return states


def _each(workspace: Path, targets: list[str]) -> dict[str, str]:
    """Stage -> what became of it, said as it goes; what does not read a failed stage goes on, and the failures are raised at the end."""
    states: dict[str, str] = {}
    failed: dict[str, str] = {}
    for number, target in enumerate(targets, 1):
        name, _, variant = target.partition("@")
        if f"distill@{variant}" in failed:
            continue
        console.print(f"[{number} of {len(targets)}] {target}", markup=False)
        started = time.monotonic()
        state = bring_up_to_date(workspace, target, return_state=True)
        if state.is_completed():
            states[target] = str(state.message)
            took = f", {time.monotonic() - started:.0f} s" if states[target] == "ran" else ""
            console.print(f"    {states[target]}{took}")
            continue
        error = state.result(raise_on_failure=False)
        if not variant:  # all that follows reads it
            raise error if isinstance(error, Exception) else StageError(f"stage {name} failed")
        failed[target] = error.found if isinstance(error, StageError) else str(error)
        console.print("    failed; the other variants go on", style="red")
    if failed:
        reasons = "; ".join(failed.values())
        raise StageError(f"{len(failed)} of {len(targets)} stages failed: {reasons}", do="mend what stands above and run the same again")
    return states
