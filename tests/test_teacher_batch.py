"""Batch mode over the wire: the same rows as live, one batch whatever dies when, the budget, cancelling, batches that fail."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import openai
import pytest

from mind.config import Config, Price, Teacher
from mind.errors import PassingError, TeacherError
from mind.params import validate
from mind.records import PERSPECTIVES, Question
from mind.stages import synthesize
from mind.teacher.asking import NotBought
from mind.teacher.batch import Desk
from mind.teacher.budget import Ledger, Wallet
from mind.teacher.cache import ReplyCache
from mind.teacher.client import Client
from mind.teacher.interview import view_request
from mind.teacher.recorded import Behaviour, starter_corpus
from mind.teacher.replies import Request
from mind.teacher.server import embedded_teacher
from mind.workspace import Workspace
from tests.hostile import Call, endpoint

T = TypeVar("T")


@pytest.fixture
def url() -> Iterator[str]:
    with embedded_teacher() as base_url:
        yield base_url


def teacher(url: str, **more: Any) -> Teacher:
    return Teacher.model_validate({"base_url": url, "mode": "batch", "retries": 1, "batch": {"poll_seconds": 0.05}} | more)


def requests(settings: Teacher, questions: int = 1) -> list[Request]:
    found = []
    for entry in starter_corpus().entries[:questions]:
        question = Question(id=entry.id, question=entry.question, answer=entry.answer)
        found += [view_request(settings, question, p, 1, settings.max_tokens) for p in PERSPECTIVES]
    return found


def at_desk(settings: Teacher, path: Path, work: Callable[[Desk], Awaitable[T]]) -> T:
    async def main(cache: ReplyCache) -> T:
        wallet = Wallet(Ledger(cache, settings.budget), Price(input=1, output=1))
        client = Client(settings, settings.base_url, "here", cache, wallet)
        folder = path / "requests"
        folder.mkdir(exist_ok=True)
        try:
            return await work(Desk(client, cache, wallet, settings.batch, folder))
        finally:
            await client.close()

    with ReplyCache(path / "replies.sqlite") as cache:
        return asyncio.run(main(cache))


async def note(desk: Desk, wanted: list[Request]) -> int:
    """Ask for all; how many were missing."""
    missing = 0
    for request in wanted:
        try:
            await desk.find(request, Counter(), 0)
        except NotBought:
            missing += 1
    return missing


def batches(url: str) -> list[Any]:
    return list(openai.OpenAI(base_url=url, api_key="x").batches.list())


def open_jobs(path: Path) -> int:
    with ReplyCache(path / "replies.sqlite") as cache:
        return int(cache.write(lambda c: c.execute("SELECT count(*) FROM batches").fetchone()[0]).result(10))


def test_what_is_missing_is_bought_in_one_batch_and_found_afterwards(tmp_path: Path, url: str) -> None:
    settings = teacher(url)

    async def work(desk: Desk) -> tuple[int, bool, int, bool]:
        wanted = requests(settings, 2)
        return await note(desk, [*wanted, *wanted]), await desk.buy(), await note(desk, wanted), await desk.buy()

    assert at_desk(settings, tmp_path, work) == (32, True, 0, False)
    (batch,) = batches(url)
    assert batch.request_counts.total == batch.request_counts.completed == 16  # equal requests once
    assert open_jobs(tmp_path) == 0


def test_large_orders_are_split(tmp_path: Path, url: str) -> None:
    settings = teacher(url, batch={"poll_seconds": 0.05, "requests": 5})

    async def work(desk: Desk) -> int:
        wanted = requests(settings, 2)
        await note(desk, wanted)
        await desk.buy()
        return await note(desk, wanted)

    assert at_desk(settings, tmp_path, work) == 0
    assert sorted(batch.request_counts.total for batch in batches(url)) == [1, 5, 5, 5]


def test_a_process_that_dies_while_it_waits_leaves_the_batch_to_the_next(tmp_path: Path) -> None:
    with embedded_teacher(Behaviour(batch_seconds=1.0)) as url:
        settings = teacher(url)

        async def dies(desk: Desk) -> None:
            await note(desk, requests(settings))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(desk.buy(), 0.5)

        async def resumes(desk: Desk) -> int:
            await desk.collect()
            return await note(desk, requests(settings))

        at_desk(settings, tmp_path, dies)
        assert open_jobs(tmp_path) == 1
        assert at_desk(settings, tmp_path, resumes) == 0
        assert len(batches(url)) == 1
    with ReplyCache(tmp_path / "replies.sqlite") as cache:
        spent = cache.spent()
    assert (spent.requests, spent.open_requests) == (8, 0)


@pytest.mark.parametrize("submitted", [True, False])
def test_a_process_that_dies_while_it_submits_neither_loses_nor_doubles(tmp_path: Path, submitted: bool) -> None:
    """Killed after the job was written down: before the provider had it, or after, when the batch's id was not yet recorded."""
    with embedded_teacher(Behaviour(batch_seconds=0.3)) as url:
        settings = teacher(url)

        async def dies(desk: Desk) -> None:
            await note(desk, requests(settings))
            if submitted:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(desk.buy(), 0.2)

        async def resumes(desk: Desk) -> int:
            await desk.collect()
            return await note(desk, requests(settings))

        at_desk(settings, tmp_path, dies)
        with ReplyCache(tmp_path / "replies.sqlite") as cache:
            if submitted:
                cache.write(lambda c: c.execute("UPDATE batches SET batch = NULL")).result(10)
            else:
                cache.write(lambda c: c.execute("INSERT INTO calls VALUES (7, 1.0, 100, 8)")).result(10)
                cache.write(lambda c: c.execute("INSERT INTO batches VALUES ('mind-x', 'here', NULL, 7)")).result(10)
        assert at_desk(settings, tmp_path, resumes) == (0 if submitted else 8)
        assert len(batches(url)) == (1 if submitted else 0)
    assert open_jobs(tmp_path) == 0
    with ReplyCache(tmp_path / "replies.sqlite") as cache:
        assert cache.spent().open_requests == 0


def test_a_budget_takes_as_much_of_an_order_as_it_has_room_for(tmp_path: Path, url: str) -> None:
    settings = teacher(url, budget={"requests": 5})

    async def work(desk: Desk) -> tuple[bool, int, bool]:
        wanted = requests(settings)
        await note(desk, wanted)
        return await desk.buy(), await note(desk, wanted), await desk.buy()

    assert at_desk(settings, tmp_path, work) == (True, 3, False)
    assert [batch.request_counts.total for batch in batches(url)] == [5]


def test_cancelling_ends_the_batch_and_forgets_it(tmp_path: Path) -> None:
    with embedded_teacher(Behaviour(batch_seconds=60)) as url:
        settings = teacher(url)

        async def work(desk: Desk) -> int:
            await note(desk, requests(settings))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(desk.buy(), 0.3)
            return await desk.cancel()

        assert at_desk(settings, tmp_path, work) == 1
        assert [batch.status for batch in batches(url)] == ["cancelled"]
    assert open_jobs(tmp_path) == 0


def test_batch_and_live_write_the_same_rows(tmp_path: Path, url: str) -> None:
    written = {}
    for mode in ("live", "batch"):
        place = Workspace(tmp_path / mode)
        pool = place.data / "questions" / "primer.jsonl"
        pool.parent.mkdir(parents=True)
        entries = starter_corpus().entries[:4]
        pool.write_text("".join(json.dumps({"id": e.id, "question": e.question, "answer": e.answer}) + "\n" for e in entries))
        config: Config = validate(
            {"teacher": {"base_url": url, "mode": mode, "batch": {"poll_seconds": 0.05, "requests": 20}}, "synthesis": {"mistakes": True}}
        )
        synthesize.write(config, place)
        written[mode] = [(place.rationales / f"{name}.jsonl").read_bytes() for name in ("rationales", "mistakes")]
        assert written[mode][1].count(b'"accepted":true') == 4
        assert synthesize.dry_run(config, place).most.requests == 0
        assert synthesize.cancel(config, place) == 0
    assert written["live"] == written["batch"]


# ------------------------------------------------------------ hostile providers


def provider(lines: list[dict[str, Any]] | None, **batch: Any) -> Callable[[Call], Awaitable[None]]:
    """A batch endpoint whose one batch ends at once as `batch` says, with `lines` as its output."""
    described = {
        "id": "b",
        "object": "batch",
        "endpoint": "/v1/chat/completions",
        "input_file_id": "f",
        "completion_window": "24h",
        "created_at": 0,
    }
    counts = {"total": 8, "completed": 8, "failed": 0}

    async def behave(call: Call) -> None:
        if call.path.endswith("/content"):
            await call.send(b"".join(json.dumps(line).encode() + b"\n" for line in lines or []))
        elif "/files" in call.path:
            head = {"id": "f", "object": "file", "bytes": 1, "created_at": 0, "filename": "x", "purpose": "batch", "status": "processed"}
            await call.send(head)
        else:
            await call.send(described | {"status": "completed", "output_file_id": "o", "request_counts": counts} | batch)

    return behave


async def order(desk: Desk, settings: Teacher) -> None:
    await note(desk, requests(settings))
    await desk.buy()


def test_a_batch_that_the_provider_refuses_says_why_and_is_settled(tmp_path: Path) -> None:
    errors = {"object": "list", "data": [{"code": "token_limit_exceeded", "message": "Enqueued token limit reached"}]}
    with endpoint(provider(None, status="failed", errors=errors)) as server:
        settings = teacher(server.url, model="m")
        with pytest.raises(TeacherError, match="Enqueued token limit reached"):
            at_desk(settings, tmp_path, lambda desk: order(desk, settings))
    assert open_jobs(tmp_path) == 0


@pytest.mark.parametrize(
    "line",
    [
        {"custom_id": "0" * 64, "response": {"status_code": 500, "body": {"error": {"message": "oops"}}}},
        {"custom_id": "not a key", "response": {"status_code": 200, "body": {"choices": [{"message": {"content": "x"}}]}}},
        {"custom_id": "0" * 64, "response": {"status_code": 200, "body": {"choices": []}}},
        {"custom_id": "0" * 64, "response": None, "error": {"code": "batch_expired"}},
        {"surprise": True},
    ],
)
def test_a_batch_without_one_usable_reply_is_an_error_that_may_pass(tmp_path: Path, line: dict[str, Any]) -> None:
    with endpoint(provider([line])) as server:
        settings = teacher(server.url, model="m")
        with pytest.raises(PassingError, match="no usable reply"):
            at_desk(settings, tmp_path, lambda desk: order(desk, settings))
    assert open_jobs(tmp_path) == 0


def test_a_refused_key_is_named_in_batch_mode_too(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        await call.send({"error": {"message": "bad key", "type": "x", "code": None}}, 401)

    with endpoint(behave) as server:
        settings = teacher(server.url, model="m")
        with pytest.raises(TeacherError, match="OPENAI_API_KEY"):
            at_desk(settings, tmp_path, lambda desk: order(desk, settings))
    assert len(server.calls) == 1
