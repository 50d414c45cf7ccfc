"""Where MetaNet's weight went, from the histories of trained students: the table of docs/results.md.

    python bench/weights.py .mind/workspaces/60bb53c0a36b mind instant-loss target-loss

Seeds of a variant (`mind`, `mind-18`, ...) are one row: the mean over them of each perspective's mean weight over the training, with the
half width of its 95 % interval over the seeds (Student's t).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.stats import t

from mind.params import load_config
from mind.records import PERSPECTIVES
from mind.workspace import Workspace


def mean_weights(history: Path) -> tuple[list[float], float]:
    """Each perspective's mean weight, and the mean number of views selected; a row of the history counts by its steps."""
    rows = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
    steps = np.diff([0, *(row["step"] for row in rows)])
    weights = [[row.get(f"metanet/weight/{name}", 0.0) for name in PERSPECTIVES] for row in rows]
    return list(np.average(weights, axis=0, weights=steps)), float(np.average([row["metanet/selected"] for row in rows], weights=steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("variants", nargs="+")
    wanted = parser.parse_args()
    workspace = Workspace(wanted.workspace)
    config = load_config(workspace.params)
    print("| variant | seeds | views kept | " + " | ".join(PERSPECTIVES) + " |")
    print("|---|--:|--:|" + "--:|" * len(PERSPECTIVES))
    for name in wanted.variants:
        repeats = [other for other in config.variants if other == name or config.variants[other].repeats == name]
        found = [mean_weights(path) for one in repeats if (path := workspace.student(one) / "history.jsonl").exists()]
        if not found:
            raise SystemExit(f"{name}: no history.jsonl of it in {workspace.root / 'students'}")
        weights = np.array([row for row, _ in found])
        half = t.ppf(0.975, len(found) - 1) * weights.std(axis=0, ddof=1) / np.sqrt(len(found)) if len(found) > 1 else None
        cells = [f"{mean:.2f}" + (f" ± {half[k]:.2f}" if half is not None else "") for k, mean in enumerate(weights.mean(axis=0))]
        print(f"| {name} | {len(found)} | {np.mean([kept for _, kept in found]):.1f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
