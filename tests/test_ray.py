"""Variants side by side on a Ray cluster of this machine: the flow, Prefect's server, DVC and Ray are real; the stages are a script.

Skipped where Ray is not installed (`pip install -e '.[ray]'`): it is 80 MB that only clusters need, and this file takes some 20 s of CPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import psutil
import pytest

from mind import doors
from mind.errors import StageError
from mind.workspace import Workspace

ABSENT = importlib.util.find_spec("prefect_ray") is None
pytestmark = [pytest.mark.timeout(900), pytest.mark.skipif(ABSENT, reason="Ray is not installed: pip install -e '.[ray]'")]

STAGE = """import json, os, pathlib, sys, time
pathlib.Path(os.environ["MIND_STAGE_RAN"]).write_text("no such view")
stage, variant = [*sys.argv[1:], ""][:2]
if variant == "broken": sys.exit(2)
began = time.time()
time.sleep(3 if stage == "distill" else 0)
folder = {"distill": pathlib.Path("students") / variant, "evaluate": pathlib.Path("reports") / variant}.get(stage, pathlib.Path(stage))
folder.mkdir(parents=True)
(folder / "content").write_text(variant)
with open(f"{stage}.{variant}.json", "w") as told: json.dump([began, time.time(), os.environ.get("CUDA_VISIBLE_DEVICES")], told)
"""
PIPELINE = """stages:
  synthesize: {cmd: python data/stage.py rationales, deps: [data], outs: [rationales]}
  snapshot: {cmd: python data/stage.py dataset, deps: [rationales], outs: [dataset]}
  distill:
    matrix: {variant: "${run.variants}"}
    cmd: python data/stage.py distill ${item.variant}
    deps: [dataset]
    outs: ["students/${item.variant}"]
  evaluate:
    matrix: {variant: "${run.variants}"}
    cmd: python data/stage.py evaluate ${item.variant}
    deps: ["students/${item.variant}"]
    outs: ["reports/${item.variant}"]
"""
PARAMS = """run: {variants: [base, mind, broken], parallel: {engine: ray, cpus: 0.5, gpus: 1}}
variants: {base: {method: base}, mind: {method: mind}, broken: {method: base}}
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """In a Ray cluster with two cards that are not there."""
    root = tmp_path_factory.mktemp("ray")
    (root / "data").mkdir()
    (root / "data" / "stage.py").write_text(STAGE)
    (root / "dvc.yaml").write_text(PIPELINE)
    (root / "params.yaml").write_text(PARAMS)
    for command in ("init --no-scm -q", "add -q data"):
        subprocess.run([sys.executable, "-m", "dvc", *command.split()], cwd=root, check=True)
    with mock.patch.dict(os.environ), doors.quiet_prefect(Workspace(root)):
        from flows.parallel import runner
        from mind.config import Parallel

        cluster: Any = runner(Parallel(engine="ray"))
        cluster.init_kwargs |= {"num_cpus": 2, "num_gpus": 2}
        with cluster:
            yield Workspace(root)


def test_variants_train_at_the_same_time_each_on_a_card_of_its_own(workspace: Workspace) -> None:
    from flows.main import mind as flow

    with pytest.raises(StageError, match="stage distill@broken failed") as caught:
        flow(workspace.root)
    assert (caught.value.exit_code, caught.value.reason) == (2, "no such view")
    told = {path.stem: json.loads(path.read_text()) for path in workspace.root.glob("*.*.json")}
    ran = {f"{stage}.{variant}" for stage in ("distill", "evaluate") for variant in ("base", "mind")}
    assert set(told) == {"rationales.", "dataset.", *ran}
    (began, ended, card), (also_began, also_ended, other) = told["distill.base"], told["distill.mind"]
    assert max(began, also_began) < min(ended, also_ended) and {card, other} == {"0", "1"}
    for variant in ("base", "mind"):
        assert told[f"evaluate.{variant}"][0] >= told[f"distill.{variant}"][1]


def test_a_second_run_finds_it_cached(workspace: Workspace) -> None:
    from flows.main import mind as flow

    assert set(flow(workspace.root, variants=["base", "mind"]).values()) == {"restored"}  # in a derived workspace


def test_nothing_of_it_listens_but_on_loopback(workspace: Workspace) -> None:
    family = [p for p in psutil.Process().children(recursive=True) if "ray" in " ".join(p.cmdline())]
    listening = {c.laddr.ip for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening and listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
