"""The stage over the wire: the same bytes whatever happens on the way, nothing bought twice, nothing stale, nothing lost."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mind.config import Config
from mind.errors import DataError, MindError, PassingError, TeacherError
from mind.params import dump_raw, validate
from mind.records import PERSPECTIVES, Mistake, Rationale, read_jsonl
from mind.stages import synthesize
from mind.teacher.cache import ReplyCache
from mind.teacher.perspectives import PROMPTS
from mind.teacher.recorded import Behaviour, starter_corpus
from mind.teacher.server import Stats, embedded_teacher
from mind.workspace import Workspace
from tests.hostile import Call, completion, endpoint, refusal

QUESTIONS = 6
VIEWS = QUESTIONS * len(PERSPECTIVES)
CANARY = "sk-canary-9876543210"
PRICE = {"input": 1, "output": 2}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mind.teacher.limits.FIRST_PAUSE", 0.02)


@pytest.fixture(scope="module")
def stats() -> Stats:
    return Stats()


@pytest.fixture(scope="module")
def url(stats: Stats) -> Iterator[str]:
    """One teacher for the module, slow and stumbling enough to mix the order of replies."""
    with embedded_teacher(Behaviour(latency=0.01, slow_rate=0.2, slow=0.04, fail_rate=0.1), stats) as base_url:
        yield base_url


def question(number: int) -> dict[str, Any]:
    entry = starter_corpus().entries[number]
    return {"id": entry.id, "question": entry.question, "answer": entry.answer}


def workspace(root: Path, rows: list[dict[str, Any]] | None = None) -> Workspace:
    """A workspace with a pool of the first QUESTIONS recorded questions, or of `rows`."""
    pool = root / "data" / "questions" / "primer.jsonl"
    pool.parent.mkdir(parents=True, exist_ok=True)
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows or [question(n) for n in range(QUESTIONS)]))
    return Workspace(root)


def config(url: str = "embedded", synthesis: dict[str, Any] | None = None, **teacher: Any) -> Config:
    return validate({"teacher": {"base_url": url, "in_flight": 16, **teacher}, "synthesis": synthesis or {}})


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def rows(place: Workspace) -> list[Rationale]:
    return list(read_jsonl(place.rationales / "rationales.jsonl", Rationale))


def manifest(place: Workspace) -> dict[str, Any]:
    return json.loads((place.rationales / "manifest.json").read_text())


def replies_of(place: Workspace) -> int:
    with ReplyCache(place.replies) as cache:
        return cache.count()


# ----------------------------------------------------------------- same bytes


def test_the_output_is_the_same_whatever_the_concurrency_and_the_order_of_replies(tmp_path: Path, url: str) -> None:
    outputs = []
    for width in (1, 5, 64):
        place = workspace(tmp_path / str(width))
        synthesize.write(config(url, in_flight=width), place)
        outputs.append(digests(place.rationales))
    assert outputs[0] == outputs[1] == outputs[2]
    found = rows(place)
    assert [(r.question_id, r.perspective) for r in found] == [(question(n)["id"], p) for n in range(QUESTIONS) for p in PERSPECTIVES]
    assert all(row.accepted and row.text == starter_corpus().entries[0].rationales[row.perspective] for row in found[:8])


def test_the_embedded_teacher_is_the_same_on_every_port_and_asked_once(tmp_path: Path) -> None:
    first, second = workspace(tmp_path / "a"), workspace(tmp_path / "b")
    synthesize.write(config(), first)
    synthesize.write(config(), second)
    assert digests(first.rationales) == digests(second.rationales)
    before = digests(first.rationales)
    assert synthesize.write(config(), first).bought == 0
    assert digests(first.rationales) == before


def test_the_manifest_counts_by_perspective_and_reason(tmp_path: Path) -> None:
    place = workspace(tmp_path)
    synthesize.write(config(embedded_wrong_rate=0.5, seed=1, synthesis={"max_attempts": 3}, prices={"recorded": PRICE}), place)
    counts, found = manifest(place)["counts"], rows(place)
    assert counts["questions"] == QUESTIONS
    assert counts["accepted"] == sum(row.accepted for row in found)
    by_perspective = Counter(row.perspective for row in found if row.reason.startswith("wrong"))
    assert {p: c.get("wrong", 0) for p, c in counts["by_perspective"].items()} == {p: by_perspective[p] for p in PERSPECTIVES}
    assert sum(by_perspective.values()) > 5
    assert {row.attempt for row in found} == {1, 2, 3}
    assert counts["used"]["completion_tokens"] == sum(row.completion_tokens for row in found)
    usd = (sum(row.prompt_tokens for row in found) + 2 * sum(row.completion_tokens for row in found)) / 1e6
    assert counts["usd"] == pytest.approx(usd, abs=1e-6)
    assert manifest(place)["complete"] is True


def test_the_table_is_shown_and_tracked_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    place = workspace(tmp_path, [question(n) for n in range(2)])
    settings = config(embedded_wrong_rate=0.5, prices={"recorded": PRICE}, synthesis={"mistakes": True})
    for _ in range(2):
        synthesize.run(settings, place)
    said = capsys.readouterr().err
    usable = manifest(place)["counts"]["mistakes"]["accepted"]
    assert f"2 questions, {usable} of 2 mistakes usable; 18 calls to the embedded teacher for $0.0" in " ".join(said.split())
    assert "; 0 calls to the embedded teacher," in said
    assert "wrong" in said and "counterfactual" in said
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("mind-synthesis").experiment_id])
    counts = manifest(place)["counts"]
    assert run.data.metrics["synthesis/bought/calls"] == 18
    assert run.data.metrics["synthesis/mistakes/accepted"] == usable
    assert run.data.metrics["synthesis/usd"] == counts["usd"] > 0
    assert run.data.metrics["synthesis/planning/wrong"] == counts["by_perspective"]["planning"]["wrong"]
    assert run.data.params["teacher.model"] == "recorded"


def test_the_llm_judge_is_asked_through_the_same_wire(tmp_path: Path) -> None:
    place = workspace(tmp_path, [question(0)])
    synthesize.write(config(synthesis={"judge": "llm"}), place)
    assert all(row.scores == {"steps": 5, "fidelity": 5} for row in rows(place))
    assert manifest(place)["counts"]["used"]["judge_calls"] == 8
    assert replies_of(place) == 16


# -------------------------------------------------------------------- mistakes


def mistaken(place: Workspace) -> list[Mistake]:
    return list(read_jsonl(place.rationales / "mistakes.jsonl", Mistake))


def test_questions_get_their_recorded_mistakes(tmp_path: Path) -> None:
    entries = starter_corpus().entries[:216:6]
    place = workspace(tmp_path, [{"id": e.id, "question": e.question, "answer": e.answer} for e in entries])
    settings = config(synthesis={"mistakes": True, "perspectives": PERSPECTIVES})
    estimate = synthesize.dry_run(settings, place)
    assert (estimate.calls, estimate.mistake_calls) == (36 * 8, 36)
    assert "288 calls to recorded, about 36 more for mistakes" in str(estimate)
    synthesize.write(settings, place)
    found = mistaken(place)
    assert [m.accepted for m in found] == [True] * 36
    assert [(m.question_id, m.perspective, m.text, m.answer) for m in found] == [
        (e.id, e.mistaken_view, e.mistake, e.mistaken_answer) for e in entries
    ]
    counts = manifest(place)["counts"]
    assert counts["mistakes"] == {"replies": 36, "accepted": 36, "completion_tokens": sum(m.completion_tokens for m in found)}
    assert counts["used"]["calls"] == 36 * 9
    assert synthesize.dry_run(settings, place).most.requests == 0


def test_mistakes_cost_nothing_where_they_are_not_wanted_and_views_are_not_asked_again_for_them(
    tmp_path: Path, url: str, stats: Stats
) -> None:
    place = workspace(tmp_path)
    before = stats.answered
    synthesize.write(config(url), place)
    assert stats.answered - before == VIEWS
    assert mistaken(place) == [] and "mistakes" not in manifest(place)["counts"]
    wanted = config(url, synthesis={"mistakes": True})
    estimate = synthesize.dry_run(wanted, place)
    assert (estimate.calls, estimate.mistake_calls, estimate.expected.requests) == (0, QUESTIONS, QUESTIONS)
    synthesize.write(wanted, place)
    assert stats.answered - before == VIEWS + QUESTIONS
    first = digests(place.rationales)
    synthesize.write(config(url, in_flight=1, synthesis={"mistakes": True}), place)
    assert (stats.answered - before, digests(place.rationales)) == (VIEWS + QUESTIONS, first)


def test_a_mistake_of_a_view_that_was_not_accepted_says_so(tmp_path: Path) -> None:
    """A teacher who is wrong half of the time: the recorded mistake copies a view that is often not among those that it was given."""
    place = workspace(tmp_path, [question(n) for n in range(20)])
    settings = config(embedded_wrong_rate=0.5, seed=1, synthesis={"mistakes": True, "max_attempts": 2}, prices={"recorded": PRICE})
    most = synthesize.dry_run(settings, place).most
    synthesize.write(settings, place)
    accepted = {(row.question_id, row.perspective) for row in rows(place) if row.accepted}
    assert {m.accepted for m in mistaken(place)} == {True, False}
    for mistake in mistaken(place):
        assert mistake.accepted == ((mistake.question_id, mistake.perspective) in accepted)
        assert mistake.accepted or mistake.reason.startswith(f"no view: the first line names {mistake.perspective}")
    counts = manifest(place)["counts"]["mistakes"]
    assert counts["accepted"] + counts["no view"] == counts["replies"] == 20
    with ReplyCache(place.replies) as cache:
        spent = cache.spent()
    assert spent.usd == pytest.approx(manifest(place)["counts"]["usd"], abs=1e-6)
    assert spent.requests <= most.requests and spent.usd <= most.usd


def test_a_budget_that_ends_before_the_mistakes_leaves_whole_questions_and_goes_on(tmp_path: Path, url: str, stats: Stats) -> None:
    """What a question still wants goes before the first views of later ones: else all views were bought and no mistake."""
    place, before = workspace(tmp_path), stats.answered
    synthesize.write(config(url, in_flight=4, synthesis={"mistakes": True}, budget={"requests": 35}), place)
    assert stats.answered - before == 35
    assert len(rows(place)) == 8 * len(mistaken(place)) >= 8 * 2
    synthesize.write(config(url, synthesis={"mistakes": True}, budget={"requests": 100}), place)
    assert stats.answered - before == 9 * QUESTIONS
    assert len(mistaken(place)) == QUESTIONS


# ------------------------------------------------------------- change economy


def test_what_is_asked_again_is_what_was_touched(tmp_path: Path, url: str, stats: Stats, monkeypatch: pytest.MonkeyPatch) -> None:
    """One workspace through a series of changes; each time the calls are counted at the server, and a dry run foretells them."""
    pool = [question(n) for n in range(QUESTIONS)]

    def bought(settings: Config, questions: list[dict[str, Any]]) -> int:
        place = workspace(tmp_path, questions)
        foretold = synthesize.dry_run(settings, place).calls
        before = stats.answered
        synthesize.write(settings, place)
        assert stats.answered - before == foretold
        written = [(row.question_id, row.perspective) for row in rows(place)]
        assert written == [(q["id"], p) for q in questions for p in settings.synthesis.perspectives]
        return foretold

    assert bought(config(url), pool) == VIEWS
    assert bought(config(url), pool) == 0
    assert bought(config(url, in_flight=3, retries=9), pool) == 0  # how it is asked, not what
    assert bought(config(url), pool[::-1]) == 0
    assert bought(config(url), pool[:3]) == 0
    assert bought(config(url), [*pool, question(40)]) == 8
    assert bought(config(url), [{**pool[0], "question": pool[0]["question"] + " Tell me."}, *pool[1:]]) == 8
    assert bought(config(url), [{**pool[0], "id": "renamed", "topic": "other"}, *pool[1:]]) == 0  # no part of a request
    assert bought(config(url, temperature=0.5), pool) == VIEWS
    assert bought(config(url, temperature=0.7, max_tokens=900), pool) == VIEWS
    assert bought(config(url), pool) == 0  # and back again: nothing was thrown away
    monkeypatch.setitem(PROMPTS, "planning", PROMPTS["planning"] + " Be brief.")
    assert bought(config(url), pool) == QUESTIONS
    assert bought(config(url, synthesis={"perspectives": ["planning", "socratic"]}), pool) == 0


def test_a_changed_gold_answer_is_judged_anew_without_asking(tmp_path: Path, url: str, stats: Stats) -> None:
    pool = [question(n) for n in range(2)]
    synthesize.write(config(url), workspace(tmp_path, pool))
    before = stats.answered
    place = workspace(tmp_path, [{**pool[0], "answer": "999"}, pool[1]])
    synthesize.write(config(url), place)
    assert stats.answered == before
    assert [row.accepted for row in rows(place)] == [False] * 8 + [True] * 8


# -------------------------------------------------------------- crash economy


PROCESS = """
from pathlib import Path
from mind.params import load_config
from mind.errors import exit_on_error
from mind.stages import synthesize
from mind.workspace import Workspace
with exit_on_error(debug=False, passing=75):
    synthesize.{function}(load_config(Path("params.yaml")), Workspace(Path.cwd()))
"""


def start(place: Workspace, settings: Config, tracked: bool = False) -> subprocess.Popen[str]:
    """The stage in a process of its own, with or without its MLflow run."""
    place.params.write_text(dump_raw(settings.model_dump(mode="json")))
    command = [sys.executable, "-c", PROCESS.format(function="run" if tracked else "write")]
    environment = {**os.environ, "OPENAI_API_KEY": CANARY}
    return subprocess.Popen(command, cwd=place.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(reached: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert reached()


def test_kill_9_loses_no_accepted_reply_and_buys_at_most_the_width_again(tmp_path: Path) -> None:
    """Two kills in the middle of real processes, at random points; the third process ends with the bytes of an unkilled run."""
    width, pool = 8, [question(n) for n in range(20)]
    dice, stats = random.Random(4), Stats()
    with embedded_teacher(Behaviour(latency=0.05), stats) as base_url:
        place = workspace(tmp_path / "killed", pool)
        settings = config(base_url, in_flight=width)
        lost = 0
        for _ in range(2):
            answered, kept = stats.answered, replies_of(place)
            target = answered + dice.randint(10, 50)
            process = start(place, settings)
            wait_for(lambda target=target: stats.answered >= target)
            process.kill()
            process.wait()
            wait_for(lambda: stats.in_flight == 0)
            gone = (stats.answered - answered) - (replies_of(place) - kept)
            assert gone <= width  # what was in flight, and nothing that had arrived
            assert not place.rationales.exists()
            lost += gone
        process = start(place, settings)
        assert process.wait(60) == 0, process.communicate()
        assert stats.answered == len(pool) * 8 + lost
        unkilled = workspace(tmp_path / "unkilled", pool)
        synthesize.write(settings, unkilled)
    assert digests(place.rationales) == digests(unkilled.rationales)


def test_ctrl_c_takes_in_what_is_in_flight_and_the_next_run_goes_on(tmp_path: Path) -> None:
    stats = Stats()
    with embedded_teacher(Behaviour(latency=0.3), stats) as base_url:
        place = workspace(tmp_path, [question(n) for n in range(12)])
        settings = config(base_url, in_flight=8)
        process = start(place, settings)
        wait_for(lambda: stats.answered >= 10)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 130, errors
        assert "in flight are still taken in" in errors.replace("\n", " ")
        assert "Traceback" not in errors
        assert replies_of(place) == stats.answered < 96
        synthesize.write(settings, place)
        assert stats.answered == 96  # nothing twice


def test_a_second_ctrl_c_does_not_wait_for_a_slow_endpoint(tmp_path: Path) -> None:
    stats = Stats()
    with embedded_teacher(Behaviour(slow_rate=0.5, slow=60), stats) as base_url:
        process = start(workspace(tmp_path), config(base_url, in_flight=4))
        wait_for(lambda: stats.in_flight == 4)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_a_full_disk_while_rows_are_written_is_an_error_to_act_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(row: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mind.teacher.asking._line", full)
    place = workspace(tmp_path)
    with pytest.raises(MindError, match="No space left"):
        synthesize.write(config(), place)
    assert not place.rationales.exists()


def test_two_processes_on_one_cache_agree(tmp_path: Path) -> None:
    """A workspace and one derived from it share the home's cache; both run at once."""
    pool = [question(n) for n in range(10)]
    home = workspace(tmp_path, pool)
    derived = workspace(tmp_path / ".mind" / "workspaces" / "abc", pool)
    assert derived.replies == home.replies
    with embedded_teacher(Behaviour(latency=0.02)) as base_url:
        processes = [start(place, config(base_url)) for place in (home, derived)]
        codes = [process.wait(90) for process in processes]
        assert codes == [0, 0], [process.communicate()[1] for process in processes]
    assert digests(home.rationales) == digests(derived.rationales)
    assert replies_of(home) == 80


# --------------------------------------------------------------------- budget


def test_a_budget_stops_cleanly_is_never_exceeded_and_resumes_when_raised(tmp_path: Path, url: str, stats: Stats) -> None:
    place = workspace(tmp_path)
    before = stats.answered
    synthesize.write(config(url, budget={"requests": 30}), place)
    assert stats.answered - before == 30
    said = manifest(place)
    assert (said["complete"], said["stopped"]) == (False, "budget")
    kept = said["counts"]["questions"]
    assert 1 <= kept <= 3
    assert len(rows(place)) == kept * 8  # whole questions only
    synthesize.write(config(url, budget={"requests": 100}), place)
    assert stats.answered - before == VIEWS
    assert manifest(place)["complete"] is True


def test_a_budget_in_usd_holds_with_the_worst_case_of_what_is_in_flight(tmp_path: Path, url: str) -> None:
    place = workspace(tmp_path)
    settings = config(url, budget={"usd": 0.15}, prices={"recorded": {"input": 10, "output": 100}}, max_tokens=200)
    synthesize.write(settings, place)
    with ReplyCache(place.replies) as cache:
        spent = cache.spent()
    assert 0.1 < spent.usd <= 0.15
    assert spent.open_usd == 0
    assert "it will stop early" in str(synthesize.dry_run(settings, place))


def test_a_budget_too_small_for_one_question_is_an_error(tmp_path: Path, url: str) -> None:
    place = workspace(tmp_path)
    with pytest.raises(TeacherError, match=r"teacher\.budget"):
        synthesize.write(config(url, budget={"requests": 5}), place)
    assert not place.rationales.exists()
    assert replies_of(place) == 5


# -------------------------------------------------------------------- dry run


def test_a_dry_run_asks_nothing_and_says_what_it_would_cost(tmp_path: Path, stats: Stats, url: str) -> None:
    place, before = workspace(tmp_path), stats.calls
    estimate = synthesize.dry_run(config(url, prices={"recorded": PRICE}), place)
    assert stats.calls == before
    assert (estimate.calls, estimate.cached, estimate.views) == (VIEWS, 0, VIEWS)
    assert 0 < estimate.expected.usd < estimate.most.usd
    assert "48 calls to recorded" in str(estimate)
    judged = synthesize.dry_run(config(url, synthesis={"judge": "llm", "max_attempts": 2}), place)
    assert judged.judge_calls == VIEWS
    assert judged.most.requests == 2 * VIEWS * (2 + 2)  # two attempts, each longer once and judged twice
    assert "no price known" in str(judged)


def test_the_upper_bound_of_a_dry_run_holds(tmp_path: Path) -> None:
    place = workspace(tmp_path)
    settings = config(
        embedded_wrong_rate=0.6, seed=1, synthesis={"max_attempts": 3, "judge": "llm"}, prices={"recorded": {"input": 1, "output": 1}}
    )
    most = synthesize.dry_run(settings, place).most
    synthesize.write(settings, place)
    with ReplyCache(place.replies) as cache:
        spent = cache.spent()
    assert VIEWS < spent.requests <= most.requests
    assert spent.usd <= most.usd


# --------------------------------------------------------------- what may fail


def test_one_poisoned_question_does_not_cost_the_others(tmp_path: Path) -> None:
    pool = [question(n) for n in range(4)]

    async def behave(call: Call) -> None:
        if pool[2]["question"] in call.body["messages"][1]["content"]:
            return await call.send(refusal("oops"), 500)
        entry = next(e for e in starter_corpus().entries if e.question in call.body["messages"][1]["content"])
        perspective = next(p for p in PERSPECTIVES if PROMPTS[p] in call.body["messages"][0]["content"])
        await call.send(completion(entry.reply(perspective, False)))

    with endpoint(behave) as server:
        place = workspace(tmp_path, pool)
        with pytest.raises(PassingError, match="8 of 32 requests"):
            synthesize.write(config(server.url, model="m", retries=1), place)
        assert not place.rationales.exists()
        assert replies_of(place) == 24
        synthesize.write(config(server.url, model="m", retries=1, synthesis={"max_missing": 0.25}), place)
    reasons = Counter(row.reason.partition(":")[0] for row in rows(place))
    assert reasons == {"": 24, "unanswered": 8}


def test_a_refused_key_ends_the_run_at_once_and_keeps_nothing_half(tmp_path: Path) -> None:
    stats = Stats()
    place = workspace(tmp_path)
    with (
        embedded_teacher(Behaviour(api_key="right", latency=0.01), stats) as base_url,
        pytest.raises(TeacherError, match="refuses the key"),
    ):
        synthesize.write(config(base_url, in_flight=4), place)
    assert stats.calls <= 4
    assert not place.rationales.exists()
    assert not list(tmp_path.glob(".rationales*"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"id": "a", "question": "How many?"}\n', "line 1: field 'answer'"),
        ('{"id": "a", "question": "How many?", "answer": "1"}\nnot json\n', "line 2"),
        ('{"id": "a", "question": "How many?", "answer": "1"}\n' * 2, "stands twice"),
        ('{"id": "a", "question": "How many?", "answer": "a dozen"}\n', "question 'a'"),
        ('{"id": "a", "question": "Which?", "answer": "E", "kind": "choice", "choices": ["x", "y"]}\n', "question 'a'"),
        ("", "no question"),
    ],
)
def test_bad_questions_are_named_before_anything_is_asked(tmp_path: Path, content: str, says: str) -> None:
    place = workspace(tmp_path)
    (place.data / "questions" / "primer.jsonl").write_text(content)
    with pytest.raises(DataError, match=says):
        synthesize.write(config("http://127.0.0.1:9/v1"), place)
    assert not place.replies.exists()


def test_a_pool_that_is_not_there_and_a_file_by_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = workspace(tmp_path)
    with pytest.raises(DataError, match="no pool of questions 'prime'") as caught:
        synthesize.write(config(synthesis={"questions": "prime"}), place)
    assert "primer" in str(caught.value)
    (tmp_path / "mine.jsonl").write_text(json.dumps(question(3)) + "\n")
    path, questions = synthesize.read_pool(config(synthesis={"questions": "mine.jsonl"}), place)
    assert (path, [q.id for q in questions]) == (tmp_path / "mine.jsonl", [question(3)["id"]])
    assert "outside data/questions" in capsys.readouterr().err
    derived = Workspace(tmp_path / ".mind" / "workspaces" / "abc")  # of --set: the path still starts where the person is
    assert synthesize.read_pool(config(synthesis={"questions": "mine.jsonl"}), derived)[0] == path


def test_own_questions_and_the_embedded_teacher_do_not_go_together(tmp_path: Path) -> None:
    place = workspace(tmp_path, [{"id": "own", "question": "How many legs have two cats?", "answer": "8"}])
    with pytest.raises(TeacherError, match="recorded replies") as caught:
        synthesize.write(config(), place)
    assert "teacher.base_url" in str(caught.value)
    with pytest.raises(TeacherError, match="does not know question 'own'") as caught:
        synthesize.dry_run(config(), place)
    assert "teacher.base_url" in str(caught.value)


# -------------------------------------------------------------------- secrets


def test_the_key_is_nowhere_after_a_run(tmp_path: Path) -> None:
    """A real process with a canary key against an endpoint that echoes it in replies and errors: no file, MLflow's neither, no output has it."""
    stumbled = threading.Event()

    async def behave(call: Call) -> None:
        assert call.headers["authorization"] == f"Bearer {CANARY}"
        if not stumbled.is_set():
            stumbled.set()
            return await call.send(refusal(f"the key {CANARY} has a cold"), 500)
        await call.send(completion(f"I was asked with {CANARY}.\nThe answer is 1.", reasoning_content=CANARY))

    with endpoint(behave) as server:
        place = workspace(tmp_path, [question(0)])
        process = start(place, config(server.url, model="m", prices={"m": PRICE}), tracked=True)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert CANARY not in output + errors
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"mlflow.db", "replies.sqlite", "manifest.json", "params.yaml"} <= {path.name for path in files}
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    assert "***" in (place.rationales / "rationales.jsonl").read_text()
