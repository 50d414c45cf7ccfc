"""The loop: equal courses whichever way a run is cut, resumed, batched or laid out; what is refused; what `distill` leaves behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mind import config
from mind.errors import DataError, MindError
from mind.methods.base import Method, Terms
from mind.methods.table import build
from mind.methods.without_fusion import WithoutFusion
from mind.students.loading import LoadedStudent
from mind.training import checkpoint
from mind.training.loop import Log, Trained, make_tunable, rate, train
from tests import tiny

METANET = {"width": 16, "heads": 2, "warmup_epochs": 2, "accumulation": 3}
EDIT, SBS, MCC = config.Edit(), config.Sbs(view="all"), config.Mcc()
MIND = config.Mind.model_validate({"refresh": 2, "consistency": 1.0, "beta": 0.9, "metanet": METANET})
PLAIN = config.WithoutFusion()


def resolved(method: Any, student: Mapping[str, Any] | None = None, **training: Any) -> config.Resolved:
    return config.Resolved(
        name="x",
        seed=17,
        method=method,
        student=config.Student.model_validate(student or {}),
        training=config.Training.model_validate({"learning_rate": 1e-3, "log_steps": 2, "checkpoint_steps": 3, **training}),
    )


def run(
    method: Any,
    student: Mapping[str, Any] | None = None,
    *,
    folder: Path | None = None,
    log: Log = lambda values, step: None,
    questions: int = 6,
    **training: Any,
) -> tuple[Trained, LoadedStudent]:
    loaded = tiny.load()
    return train(loaded, resolved(method, student, **training), tiny.examples(questions), build, log=log, checkpoints=folder), loaded


def weights(student: LoadedStudent) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in student.model.named_parameters() if p.requires_grad}


def assert_same(one: tuple[Trained, LoadedStudent], other: tuple[Trained, LoadedStudent], tolerance: float = 0.0) -> None:
    own, others = weights(one[1]), weights(other[1])
    assert own.keys() == others.keys()
    for name in own:
        torch.testing.assert_close(own[name], others[name], atol=tolerance, rtol=0)
    if not tolerance:
        assert one[0] == other[0]


class Stop(Exception):
    pass


def stop_at(step: int) -> Log:
    def log(values: Mapping[str, float], now: int) -> None:
        if now >= step:
            raise Stop

    return log


# -------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    ("method", "student"),
    [(MIND, {"lora": {"dropout": 0.1}}), (PLAIN, {"tuning": "full"}), (SBS, {}), (MCC, {}), (EDIT, {})],
    ids=["mind", "full", "sbs", "mcc", "edit"],
)
def test_a_killed_run_takes_the_same_course(tmp_path: Path, method: Any, student: Mapping[str, Any]) -> None:
    whole = run(method, student, epochs=2)
    with pytest.raises(Stop):  # as by SIGKILL: nothing is saved after step 6
        run(method, student, epochs=2, folder=tmp_path, log=stop_at(8))
    assert_same(run(method, student, epochs=2, folder=tmp_path), whole)


def test_ctrl_c_saves_the_step_and_the_next_run_goes_on(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)  # a shell that starts the suite in the background has it ignored
    steps: list[int] = []

    def interrupt(values: Mapping[str, float], step: int) -> None:
        steps.append(step)
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    whole = run(MIND, epochs=2)
    with pytest.raises(KeyboardInterrupt):
        run(MIND, epochs=2, folder=tmp_path, log=interrupt)
    assert steps[-1] == 4 and (tmp_path / "step-00000004.pt").is_file()
    resumed = run(MIND, epochs=2, folder=tmp_path, log=lambda values, step: steps.append(step))
    assert steps == [2, 4, 6, 8, 10, 12]
    assert_same(resumed, whole)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(PLAIN, epochs=2)
    with pytest.raises(Stop):
        run(PLAIN, epochs=2, folder=tmp_path, log=stop_at(8))
    files = sorted(tmp_path.glob("*.pt"))
    assert len(files) == checkpoint.KEPT
    _flip_a_byte(files[-1])
    assert_same(run(PLAIN, epochs=2, folder=tmp_path), whole)
    assert files[-1].name in capsys.readouterr().err


def test_with_all_checkpoints_damaged_it_starts_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Stop):
        run(PLAIN, folder=tmp_path, log=stop_at(4))
    first, second = sorted(tmp_path.glob("*.pt"))
    first.write_bytes(first.read_bytes()[:100])
    second.with_suffix(".sha256").unlink()
    assert_same(run(PLAIN, folder=tmp_path), run(PLAIN))
    assert capsys.readouterr().err.count("is damaged") == 2


def test_what_a_restart_saves_outlives_the_damaged_states_of_later_steps(tmp_path: Path) -> None:
    for step in (50, 100):
        checkpoint.save(tmp_path, step, {"step": step})
    for path in tmp_path.glob("*.pt"):
        _flip_a_byte(path)
    assert checkpoint.load(tmp_path) is None
    for step in (0, 10, 20):
        checkpoint.save(tmp_path, step, {"step": step})
        assert checkpoint.load(tmp_path) == {"step": step}
    assert {path.stem for path in tmp_path.iterdir()} == {"step-00000010", "step-00000020"}


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=["python", "torch"])
def test_a_state_that_memory_cannot_hold_is_no_damaged_one(tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 50, {"step": 50})

    def refuses(*args: Any, **kwargs: Any) -> Any:
        raise error

    with monkeypatch.context() as patched, pytest.raises(type(error)):
        patched.setattr(torch, "load", refuses)
        checkpoint.load(tmp_path)
    assert checkpoint.load(tmp_path) == {"step": 50}


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    done = run(PLAIN, folder=tmp_path)
    assert_same(run(PLAIN, folder=tmp_path, log=stop_at(0)), done)


def test_a_checkpoint_is_never_run_as_code(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "owned"),)

    checkpoint.save(tmp_path, 1, {"step": Payload()})
    assert checkpoint.load(tmp_path) is None
    assert not (tmp_path / "owned").exists()


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# ------------------------------------------------------------- equal courses


def test_equal_runs_are_equal_and_seeds_differ() -> None:
    assert_same(run(MIND), run(MIND))
    other = tiny.load()
    done = train(other, resolved(MIND).model_copy(update={"seed": 18}), tiny.examples(6), build)
    assert done != run(MIND)[0]


@pytest.mark.parametrize("method", [MIND, PLAIN], ids=["mind", "without_fusion"])
def test_four_questions_at_once_are_four_accumulated(method: Any) -> None:
    """Six questions make a whole step of four and a rest of two."""
    at_once, one_by_one = run(method, questions_per_step=4), run(method, accumulation=4)
    assert at_once[0].steps == one_by_one[0].steps == 2
    assert_same(at_once, one_by_one, tolerance=1e-5)


@pytest.mark.parametrize("method", [MIND, PLAIN], ids=["mind", "without_fusion"])
def test_packed_and_padded_training_agree(method: Any) -> None:
    assert_same(run(method, layout="packed"), run(method, layout="padded"), tolerance=1e-5)


@pytest.mark.parametrize("student", [{"tuning": "lora"}, {"tuning": "full"}], ids=["lora", "full"])
def test_gradient_checkpointing_changes_memory_only(student: Mapping[str, Any]) -> None:
    assert_same(run(PLAIN, student, gradient_checkpointing=True), run(PLAIN, student), tolerance=1e-6)


def test_gradient_checkpointing_recomputes() -> None:
    calls: dict[bool, int] = {}
    for checkpointing in (True, False):
        loaded, count = tiny.load(), [0]
        loaded.model.model.layers[0].mlp.register_forward_pre_hook(lambda *args, count=count: count.__setitem__(0, count[0] + 1))
        train(loaded, resolved(PLAIN, gradient_checkpointing=checkpointing), tiny.examples(2), build)
        calls[checkpointing] = count[0]
    assert calls == {True: 4, False: 2}


# ------------------------------------------------------------- what is learnt


def test_lora_learns_adapters_only_and_full_tuning_everything() -> None:
    before = tiny.model().state_dict()
    _, lora = run(PLAIN)
    assert all("lora_" in name for name in weights(lora))
    assert any(value.abs().sum() > 0 for name, value in weights(lora).items() if "lora_B" in name)
    base = {
        name.replace(".base_layer", ""): value for name, value in lora.model.get_base_model().state_dict().items() if "lora_" not in name
    }
    assert all(torch.equal(base[name], value) for name, value in before.items())
    _, full = run(PLAIN, {"tuning": "full"})
    assert weights(full).keys() == before.keys()
    assert not any(torch.equal(weights(full)[name], value) for name, value in before.items())


@pytest.mark.parametrize("student", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "tuning": "full"}], ids=["lora", "full"])
def test_bfloat16_trains_close_to_float32(student: Mapping[str, Any]) -> None:
    loaded = tiny.load()
    loaded.model = loaded.model.to(torch.bfloat16)  # as load_student does for this setting
    done = train(loaded, resolved(PLAIN, student), tiny.examples(6), build)
    plain, _ = run(PLAIN, {"tuning": student.get("tuning", "lora")})
    assert all(p.dtype == torch.float32 for p in weights(loaded).values())
    for row, expected in zip(done.history, plain.history, strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=0.02)


def test_training_lowers_the_loss() -> None:
    done, _ = run(PLAIN, {"tuning": "full"}, epochs=4, learning_rate=1e-2)
    assert done.history[-1]["train/loss"] < 0.7 * done.history[0]["train/loss"]


def test_before_the_first_step_the_student_is_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(MIND, folder=tmp_path, log=stop_at(0), checkpoint_steps=100)
    state = checkpoint.load(tmp_path)
    assert state is not None and state["step"] == 0
    torch.manual_seed(17)
    untouched = make_tunable(tiny.model(), config.Student(), config.Training())
    assert all((value == 0).all() for name, value in state["student"].items() if "lora_B" in name)
    assert state["student"].keys() == {name for name, p in untouched.named_parameters() if p.requires_grad}
    assert (state["method"]["memory"]["visits"] == 1).all()


def test_every_question_is_seen_once_an_epoch_and_epochs_differ_in_order() -> None:
    seen: list[str] = []

    class Watching(WithoutFusion):
        def loss(self, questions: Any, forward: Any) -> Any:
            seen.extend(question.id for question in questions)
            return super().loss(questions, forward)

    train(tiny.load(), resolved(PLAIN, epochs=2), tiny.examples(7), Watching)
    first, second = seen[:7], seen[7:]
    assert sorted(first) == sorted(second) == sorted(example.id for example in tiny.examples(7))
    assert first != second


def test_history_is_the_mean_over_the_logged_steps_and_the_rest() -> None:
    fine, _ = run(PLAIN, log_steps=1, questions=5)
    coarse, _ = run(PLAIN, log_steps=2, questions=5)
    assert [row["step"] for row in coarse.history] == [2, 4, 5]
    own = [row["train/loss"] for row in fine.history]
    assert [row["train/loss"] for row in coarse.history] == pytest.approx([(own[0] + own[1]) / 2, (own[2] + own[3]) / 2, own[4]])


def test_a_method_need_not_measure_anything() -> None:
    class Silent(Method):
        def loss(self, questions: Any, forward: Any) -> Terms:
            terms = super().loss(questions, forward)
            return Terms(terms.total, terms.tokens)

    silent = train(tiny.load(), resolved(PLAIN), tiny.examples(4), Silent)
    assert silent.history == [{"step": 2}, {"step": 4}] and silent.tokens > 0


def test_log_gets_the_speed_and_the_history_does_not() -> None:
    logged: list[Mapping[str, float]] = []
    done, _ = run(MIND, log=lambda values, step: logged.append(values))
    assert len(logged) == len(done.history)
    assert all(values["train/tokens_per_second"] > 0 for values in logged)
    assert not any("tokens_per_second" in name for row in done.history for name in row)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_rate_rises_to_its_peak_and_falls_as_scheduled(schedule: str) -> None:
    options = config.Training.model_validate({"schedule": schedule, "warmup_ratio": 0.2})
    rates = [rate(step / 100, 1 / 100, options) for step in range(101)]
    assert rates[:20] == sorted(rates[:20]) and 0 < rates[0] < 0.1
    assert rates[20] == 1
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[100] == pytest.approx(1 if schedule == "constant" else 0)


@pytest.mark.parametrize("method", [MIND, PLAIN], ids=["mind", "plain"])
def test_a_budget_of_tokens_ends_the_run_whatever_the_method_selects(tmp_path: Path, method: Any) -> None:
    done, _ = run(method, tokens=3000, epochs=1)
    largest = run(PLAIN)[0].tokens / 6  # of a question
    assert 3000 <= done.tokens < 3000 + 2 * largest
    with pytest.raises(Stop):
        run(method, tokens=3000, folder=tmp_path, log=stop_at(4))
    assert run(method, tokens=3000, folder=tmp_path)[0] == done


# ------------------------------------------------------------------- refusals


def test_a_question_that_is_too_long_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"question 'sum-0' has \d+ tokens"):
        run(PLAIN, max_tokens=180)


def test_or_its_long_views_are_dropped_and_counted() -> None:
    done, _ = run(PLAIN, max_tokens=180, too_long="drop")
    assert 0 < done.left_out["views"] < 48 and done.left_out["questions"] == 0
    assert done.views + done.left_out["views"] == 48


def test_the_student_s_own_limit_counts_too() -> None:
    loaded = LoadedStudent(tiny.model(max_position_embeddings=180), tiny.tokenizer(), "short")
    with pytest.raises(DataError, match="tokens"):
        train(loaded, resolved(PLAIN), tiny.examples(2), build)


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(DataError, match="none of 2 questions"):
        run(PLAIN, questions=2, max_tokens=10, too_long="drop")


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    loaded = tiny.load()
    with torch.no_grad():
        loaded.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(MindError, match="step 1: the gradient is nan"):
        train(loaded, resolved(PLAIN), tiny.examples(2), build)
