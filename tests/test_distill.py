"""The stage distill: equal folders for equal runs, several stages behind one student, and nothing trained twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mind import config, outputs, params
from mind.methods.base import Setup
from mind.methods.mcc import Mcc
from mind.methods.mode import Mode
from mind.records import PERSPECTIVES, Example, Rows, write_jsonl
from mind.stages import distill
from mind.students.loading import load_student
from mind.training import loop
from mind.training.peers import ALONE
from mind.workspace import Workspace
from tests import tiny

VARIANTS: dict[str, Any] = {
    "base": {"method": "base"},
    "mind": {"method": "mind", "metanet": {"width": 16, "heads": 2, "warmup_epochs": 2}},
    "sbs": {"method": "sbs"},
    "sbs-explain": {"method": "sbs", "answers": "explain"},
    "mcc": {"method": "mcc"},
    "edit": {"method": "edit"},
    "edit-first": {"method": "single", "perspective": "copied"},
    "mode": {"method": "mode", "support": 1, "trials": 4},
    "socratic": {"method": "single", "perspective": "socratic", "hold_out": 1},
}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path)
    made.dataset.mkdir()
    write_jsonl(made.dataset / "train.jsonl", tiny.examples(4))
    outputs.write_manifest(made.dataset, stage="snapshot", inputs={}, config={}, counts={})
    tiny.save(tmp_path / "tiny")
    return made


def settings(workspace: Workspace, **training: Any) -> config.Config:
    student = {"name": str(workspace.root / "tiny"), "lora": {"r": 2, "alpha": 4}}
    return params.validate({"student": student, "variants": VARIANTS, "training": {"log_steps": 1, **training}})


def made(workspace: Workspace, variant: str, **training: Any) -> dict[str, Any]:
    """The manifest of a student that `distill` has just made."""
    distill.run(settings(workspace, **training), workspace, variant)
    return outputs.read_manifest(workspace.student(variant))


def making(workspace: Workspace, variant: str, own: config.Config) -> distill._Making:
    """The way to a student, without its MLflow run."""
    return distill._Making(own.variant(variant), Rows(workspace.dataset / "train.jsonl", Example), {}, workspace, ALONE)


def history(workspace: Workspace, variant: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workspace.student(variant) / "history.jsonl").read_text().splitlines()]


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The method of every training that really ran."""
    ran: list[str] = []

    def counted(student: Any, own: config.Resolved, *args: Any, **kwargs: Any) -> Any:
        ran.append(own.method.method)
        return loop.train(student, own, *args, **kwargs)

    monkeypatch.setattr(distill, "train", counted)
    return ran


@pytest.mark.slow
def test_equal_runs_leave_equal_folders(workspace: Workspace) -> None:
    for variant in ("base", "mind"):
        made(workspace, variant)
        first = outputs.digest_path(workspace.student(variant))
        made(workspace, variant)
        assert outputs.digest_path(workspace.student(variant)) == first
    base, mind = (outputs.read_manifest(workspace.student(variant)) for variant in ("base", "mind"))
    assert list(base["inputs"]) == ["student"] and set(mind["inputs"]) == {"dataset", "student"}
    assert [p.name for p in workspace.student("base").iterdir()] == [outputs.MANIFEST]
    assert base["fingerprint"] != mind["fingerprint"]
    assert history(workspace, "mind")[-1]["step"] == mind["counts"]["steps"] == 4
    assert not any(workspace.checkpoints("x").parent.iterdir())


@pytest.mark.slow
def test_the_experts_of_mode_are_the_single_students(workspace: Workspace, trainings: list[str]) -> None:
    made(workspace, "socratic")
    mode = made(workspace, "mode")
    assert trainings == ["single"] * len(PERSPECTIVES)
    assert mode["counts"]["steps"] == len(PERSPECTIVES) * 3, "one question of four is held out"
    rows = history(workspace, "mode")
    assert {f"{name}/train/loss" for name in PERSPECTIVES} <= {key for row in rows for key in row}
    assert {f"mode/weight/{name}" for name in PERSPECTIVES} <= rows[-1].keys()
    assert load_student(settings(workspace).variant("mode").student, workspace.student("mode")).model is not None
    again = outputs.digest_path(workspace.student("mode"))
    made(workspace, "mode")
    assert len(trainings) == len(PERSPECTIVES) and outputs.digest_path(workspace.student("mode")) == again


@pytest.mark.slow
def test_edit_goes_on_from_plain_fine_tuning_which_its_control_shares(workspace: Workspace, trainings: list[str]) -> None:
    first, whole = made(workspace, "edit-first"), made(workspace, "edit")
    assert trainings == ["single", "edit"]
    assert whole["counts"]["steps"] == 2 * first["counts"]["steps"]
    assert [row["step"] for row in history(workspace, "edit")] == list(range(1, whole["counts"]["steps"] + 1))
    untouched = load_student(settings(workspace).student)
    students = [load_student(settings(workspace).student, workspace.student(name)) for name in ("edit-first", "edit")]
    states = [student.model.state_dict() for student in (untouched, *students)]
    moved = [max(float((states[i][name] - states[j][name]).abs().max()) for name in states[0]) for i, j in ((0, 1), (1, 2), (0, 2))]
    assert moved[0] > 0 and moved[1] > 0
    assert moved[1] < moved[2], "the second stage is a small step from the first, at a fortieth of its rate"


@pytest.mark.slow
def test_a_stage_that_is_killed_costs_no_finished_one(workspace: Workspace, trainings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made(workspace, "edit")
    whole = outputs.digest_path(workspace.student("edit"))
    for folder in (workspace.trained("x").parent, workspace.student("edit")):
        shutil.rmtree(folder)
    trainings.clear()
    counted = distill.train

    def dies(student: Any, own: config.Resolved, *args: Any, **kwargs: Any) -> Any:
        if own.method.method == "edit":
            raise KeyboardInterrupt
        return counted(student, own, *args, **kwargs)

    monkeypatch.setattr(distill, "train", dies)
    with pytest.raises(KeyboardInterrupt):
        made(workspace, "edit")
    monkeypatch.setattr(distill, "train", counted)
    made(workspace, "edit")
    assert trainings == ["single", "edit"]
    assert outputs.digest_path(workspace.student("edit")) == whole


@pytest.mark.slow
def test_the_two_rows_of_sbs_are_one_training(workspace: Workspace, trainings: list[str]) -> None:
    one, other = made(workspace, "sbs"), made(workspace, "sbs-explain")
    assert trainings == ["sbs"]
    adapters = [workspace.student(name) / "adapter" / "adapter_model.safetensors" for name in ("sbs", "sbs-explain")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert one["fingerprint"] != other["fingerprint"], "each is a run of its own"


def test_what_variants_share_they_share_with_every_seed(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []
    monkeypatch.setattr(distill._Making, "_add", lambda self, stage, key: keys.append(key))

    def keys_of(variant: str) -> list[str]:
        keys.clear()
        making(workspace, variant, own)._train_all()
        return list(keys)

    plain = settings(workspace)
    over = params.over_seeds(plain, ["mode", "socratic", "sbs", "sbs-explain"], [17, 18])
    own = params.validate(config.merge(plain.model_dump(mode="json"), over))
    for seed in ("", "-18"):
        assert keys_of(f"socratic{seed}")[0] == keys_of(f"mode{seed}")[PERSPECTIVES.index("socratic")]
        assert keys_of(f"sbs{seed}") == keys_of(f"sbs-explain{seed}")
    for name in ("mode", "sbs"):
        assert not {*keys_of(name)} & {*keys_of(f"{name}-18")}, "another seed is another training"


def test_scarce_memory_halves_the_questions_of_a_pass_once(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[int, int]] = []
    build = distill.table.build

    def watched(options: Any, setup: Setup) -> Any:
        passes.append((setup.batch_questions, setup.step_questions))
        return build(options, setup)

    monkeypatch.setattr(distill.table, "build", watched)
    monkeypatch.setenv("MIND_MEMORY", "scarce")
    making(workspace, "socratic", settings(workspace, questions_per_step=8))._train_all()
    assert passes == [(4, 8)]


def test_a_mixture_is_searched_where_its_experts_were_trained(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    devices: list[str] = []

    def conclude(student: Any, *rest: Any) -> None:
        devices.append(student.model.device.type)
        raise Stop

    monkeypatch.setattr(loop, "Accelerator", lambda: SimpleNamespace(device=torch.device("meta")))  # as if it were a GPU
    monkeypatch.setattr(distill._Making, "_add", lambda *args: None)
    monkeypatch.setattr(Mode, "conclude", conclude)
    with pytest.raises(Stop):
        making(workspace, "mode", settings(workspace)).make(workspace.root)
    assert devices == ["meta"]


@pytest.mark.slow
def test_changed_settings_and_changed_code_share_nothing(
    workspace: Workspace, trainings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made(workspace, "socratic")
    made(workspace, "socratic", learning_rate=1e-4)
    assert len(trainings) == 2
    monkeypatch.setattr(outputs, "digest_code", lambda *names: "other code")
    made(workspace, "socratic")
    assert len(trainings) == 3


@pytest.mark.slow
def test_a_budget_of_tokens_is_for_all_stages_together(workspace: Workspace) -> None:
    spent = {name: made(workspace, name, tokens=2000)["counts"]["tokens"] for name in ("edit", "mode", "mcc")}
    longest = max(len(text) for text in tiny.examples(4)[0].views.values()) + 30
    for name, stages in (("edit", 2), ("mode", 8), ("mcc", 1)):
        assert 2000 <= spent[name] < 2000 + 2 * stages * longest, name


def test_every_random_draw_is_in_the_checkpoint() -> None:
    setup = Setup(questions=4, width=32, batch_questions=1, step_questions=1, seed=5)
    one, other = (Mcc(config.Mcc(), setup) for _ in range(2))
    drawn = [one.lots.draw(0).random() for _ in range(3)]
    one.after_step()
    other.load_state_dict(torch.load(saved(one), weights_only=True))
    assert other.lots.draw(0).random() == one.lots.draw(0).random() not in drawn


def saved(method: Mcc) -> Any:
    import io

    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    ("change", "variant", "alias"),
    [
        ({"run": {"variants": ["mind"]}, "evaluation": {"limit": 2}}, "mind", "mind"),
        ({"variants": {"mind": {"method": "mind", "inertia": 0}}}, "mind", "mind--abc"),
        ({"synthesis": {"limit": 2}}, "mind", "mind--abc"),
        ({"training": {"epochs": 2}}, "mind", "mind--abc"),
        ({"variants": {"mind": {"method": "mind"}, "mind-18": {"method": "mind", "seed": 18, "repeats": "mind"}}}, "mind-18", "mind-18"),
        (
            {"training": {"epochs": 2}, "variants": {"mind-18": {"method": "mind", "seed": 18, "repeats": "mind"}}},
            "mind-18",
            "mind-18--abc",
        ),
        ({"variants": {"new": {"method": "mind"}}}, "new", "new--abc"),
    ],
)
def test_only_what_params_yaml_describes_bears_the_plain_name(tmp_path: Path, change: dict[str, Any], variant: str, alias: str) -> None:
    derived = tmp_path / ".mind" / "workspaces" / "abc"
    derived.mkdir(parents=True)
    own: dict[str, Any] = {"variants": {"mind": {"method": "mind"}}, "run": {"variants": ["mind"], "reference": "mind"}}
    for folder, settings in ((tmp_path, own), (derived, config.merge(own, change))):
        (folder / "params.yaml").write_text(json.dumps(settings), encoding="utf-8")
    read = params.load_config(derived / "params.yaml")
    assert distill._alias(read, Workspace(derived), read.variant(variant)) == alias
