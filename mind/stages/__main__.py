"""`python -m mind.stages STAGE [--variant V]`: one stage, in the workspace of the current folder. This is what dvc.yaml runs.

A person uses `mind STAGE`, which goes through DVC and so runs only what is not up to date.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mind import memory
from mind.errors import EXIT_PASSING, INTERRUPTED, exit_on_error
from mind.params import load_config
from mind.workspace import Workspace

STAGES = {"synthesize": False, "snapshot": False, "distill": True, "evaluate": True}
"""Stage -> whether it runs once a variant."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mind.stages", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--variant", help="for distill and evaluate")
    args = parser.parse_args()
    if STAGES[args.stage] != (args.variant is not None):
        parser.error(f"{args.stage} {'needs' if STAGES[args.stage] else 'takes no'} --variant")
    trace = os.environ.get("MIND_STAGE_RAN")
    if trace:  # the door that called wants to know whether anything had to run, and says goodbye itself
        Path(trace).touch()
    with exit_on_error(debug=bool(os.environ.get("MIND_DEBUG")), passing=EXIT_PASSING, farewell="" if trace else INTERRUPTED):
        workspace = Workspace.find()
        config = load_config(workspace.params)
        if args.variant is not None:
            config.variant(args.variant)
        with explaining(Path(trace) if trace else None):
            importlib.import_module(f"mind.stages.{args.stage}").run(config, workspace, args.variant)


@contextmanager
def explaining(trace: Path | None) -> Iterator[None]:
    """Used-up memory becomes an error of its own; whoever called finds in `trace` why the stage failed, and can show it far from here."""
    try:
        yield
    except Exception as error:
        told = memory.explained(error) if memory.is_exhausted(error) else error
        if trace:
            trace.write_text(str(told), encoding="utf-8")
        if told is not error:
            raise told from error
        raise


if __name__ == "__main__":
    main()
