"""The client over the wire: what is bought, what is tried again, what ends the run; hostile servers; nothing of the key anywhere."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from mind.config import Budget, Price, Teacher
from mind.errors import ConfigError, PassingError, TeacherError
from mind.teacher import client as client_module
from mind.teacher.budget import Ledger, Wallet
from mind.teacher.cache import ReplyCache
from mind.teacher.client import Client, Unanswered, api_key, request_body
from mind.teacher.recorded import Behaviour
from mind.teacher.replies import DECLINED, Reply, Request
from mind.teacher.server import Stats, embedded_teacher
from tests.hostile import Behave, Call, completion, endpoint, refusal

T = TypeVar("T")
KEY = "sk-canary-0123456789"


@pytest.fixture(params=["aiohttp", "httpx"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both transports of the official client must behave alike."""
    if request.param == "httpx":
        monkeypatch.setattr(client_module, "find_spec", lambda name: None)
    client_module._transport_errors.cache_clear()
    return request.param


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("mind.teacher.limits.FIRST_PAUSE", 0.02)


def settings(url: str, **more: object) -> Teacher:
    quick = {"base_url": url, "model": "m", "retries": 2, "in_flight": 8, "timeouts": {"connect": 2, "read": 2, "total": 4}}
    return Teacher.model_validate(quick | more)


def ask(teacher: Teacher, path: Path, work: Callable[[Client], Awaitable[T]], url: str | None = None) -> T:
    """Run `work` with a client on a cache at `path`."""

    async def main(cache: ReplyCache) -> T:
        wallet = Wallet(Ledger(cache, teacher.budget), Price(input=1, output=2))
        client = Client(teacher, url or teacher.base_url, teacher.base_url, cache, wallet)
        try:
            return await work(client)
        finally:
            await client.close()

    with ReplyCache(path / "replies.sqlite") as cache:
        return asyncio.run(main(cache))


def request(text: str = "How much are 6 and 7?", sample: int = 0, teacher: Teacher | None = None) -> Request:
    return Request(request_body(teacher or settings("http://x/v1"), [{"role": "user", "content": text}], 64, sample), sample)


def one(client: Client) -> Awaitable[Reply]:
    return client.ask(request())


# ------------------------------------------------------------ what is bought once


def test_a_reply_is_bought_once_and_kept(tmp_path: Path, transport: str) -> None:
    async def behave(call: Call) -> None:
        await call.send(completion())

    with endpoint(behave) as server:
        first = ask(settings(server.url), tmp_path, one)
        again = ask(settings(server.url), tmp_path, one)
    assert first == again
    assert len(server.calls) == 1
    assert server.calls[0].path == "/v1/chat/completions"
    assert server.calls[0].body == dict(request().body)
    assert server.calls[0].headers["authorization"] == f"Bearer {KEY}"


def test_equal_requests_under_way_share_one_call(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        await asyncio.sleep(0.1)
        await call.send(completion())

    async def work(client: Client) -> list[object]:
        return list(await asyncio.gather(*(client.ask(request()) for _ in range(5)), client.ask(request(sample=1))))

    with endpoint(behave) as server:
        ask(settings(server.url), tmp_path, work)
    assert len(server.calls) == 2  # the other sample is another request


# ------------------------------------------------------- what no retry can help


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, refusal(f"Incorrect API key provided: {KEY}", "invalid_api_key"), "OPENAI_API_KEY"),
        (403, refusal("country not supported"), "OPENAI_API_KEY"),
        (404, refusal("The model does not exist", "model_not_found"), "teacher.model"),
        (400, refusal("Unsupported parameter: 'max_tokens'", "unsupported_parameter"), "max_tokens_key"),
        (429, refusal("You exceeded your current quota", "insufficient_quota", "insufficient_quota"), "credit"),
    ],
)
def test_refusals_are_never_tried_again_and_say_what_to_do(tmp_path: Path, transport: str, status: int, body: object, says: str) -> None:
    async def behave(call: Call) -> None:
        await call.send(body, status)

    with endpoint(behave) as server, pytest.raises(TeacherError) as caught:
        ask(settings(server.url), tmp_path, one)
    assert len(server.calls) == 1
    assert says in str(caught.value)
    assert KEY not in str(caught.value)


def test_a_missing_key_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("MY_KEY", "other")
    with embedded_teacher(Behaviour(api_key="other")) as url:
        with pytest.raises(TeacherError, match=r"OPENAI_API_KEY \(is not set\)"):
            ask(settings(url, model="recorded"), tmp_path, one)
        with pytest.raises(TeacherError, match="recorded replies"):  # past the key: the question is unknown
            known = settings(url, model="recorded", api_key_env="MY_KEY")
            ask(known, tmp_path, lambda client: client.ask(request(teacher=known)))


@pytest.mark.parametrize("body", [refusal("flagged", "content_filter"), refusal("This model's maximum context length is 4096 tokens")])
def test_a_request_declined_for_its_content_is_a_reply_of_its_own(tmp_path: Path, body: object) -> None:
    async def behave(call: Call) -> None:
        await call.send(body, 400)

    with endpoint(behave) as server:
        reply = ask(settings(server.url), tmp_path, one)
        ask(settings(server.url), tmp_path, one)
    assert reply.finish == DECLINED
    assert len(server.calls) == 1


# -------------------------------------------------------------- what may pass


async def _half_body(call: Call) -> None:
    await call.raw(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 5000\r\n\r\n{"choices": [')
    call.reset()


async def _reset(call: Call) -> None:
    call.reset()


async def _not_json(call: Call) -> None:
    await call.send(b"<html>Please log in to the hotel network</html>", headers={"content-type": "text/html"})


async def _not_http(call: Call) -> None:
    await call.raw(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
    call.writer.close()


async def _bad_gzip(call: Call) -> None:
    await call.send(b"this is not gzip at all", headers={"content-encoding": "gzip"})


async def _broken_chunks(call: Call) -> None:
    await call.raw(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nnonsense\r\n")
    call.writer.close()


async def _huge(call: Call) -> None:
    await call.send(completion("a" * 10_000_000))


def _sends(content: object, status: int = 200) -> Behave:
    async def behave(call: Call) -> None:
        await call.send(content, status)

    return behave


PASSING: dict[str, Behave] = {
    "half a body": _half_body,
    "reset": _reset,
    "a login page": _not_json,
    "no HTTP": _not_http,
    "bad gzip": _bad_gzip,
    "broken chunks": _broken_chunks,
    "10 MB": _huge,
    "invalid JSON": _sends(b'{"choices": [{'),
    "a list": _sends([1, 2]),
    "null choices": _sends({"choices": None}),
    "a choice of text": _sends({"choices": ["hello"]}),
    "an error with status 200": _sends(refusal("upstream failed")),
    "deep nesting": _sends(b"[" * 100_000),
    "status 500": _sends(refusal("oops"), 500),
    "status 502 in HTML": _sends(b"<html>bad gateway</html>", 502),
    "status 408": _sends(refusal("slow"), 408),
    "status 409": _sends(refusal("conflict"), 409),
}


def test_faults_in_passing_are_tried_again(tmp_path: Path, transport: str) -> None:
    """Each fault once, all at the same time: every request is answered, by exactly one more call."""
    stumbled: set[str] = set()

    async def behave(call: Call) -> None:
        fault = call.body["messages"][0]["content"]
        if fault in stumbled:
            return await call.send(completion(fault))
        stumbled.add(fault)
        await PASSING[fault](call)

    async def work(client: Client) -> list[Reply]:
        return list(await asyncio.gather(*(client.ask(request(fault)) for fault in PASSING)))

    with endpoint(behave) as server:
        replies = ask(settings(server.url, in_flight=3), tmp_path, work)
    assert [reply.text for reply in replies] == list(PASSING)
    assert len(server.calls) == 2 * len(PASSING)


@pytest.mark.parametrize("fault", ["half a body", "a login page", "invalid JSON", "status 500"])
def test_a_fault_that_stays_ends_in_an_error_that_may_pass(tmp_path: Path, fault: str) -> None:
    with endpoint(PASSING[fault]) as server, pytest.raises(PassingError, match="3 times"):
        ask(settings(server.url), tmp_path, one)
    assert len(server.calls) == 3  # 1 + retries, not one more


def test_nobody_listens(tmp_path: Path, transport: str) -> None:
    with endpoint(_reset) as gone:
        pass
    with pytest.raises(PassingError, match="base_url"):
        ask(settings(gone.url, retries=1), tmp_path, one)


@pytest.mark.parametrize("stage", ["headers", "body"])
def test_a_server_that_falls_silent_is_left_after_the_read_timeout(tmp_path: Path, transport: str, stage: str) -> None:
    async def behave(call: Call) -> None:
        if call.number == 0:
            if stage == "body":
                await call.raw(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{")
            await asyncio.sleep(3)
        else:
            await call.send(completion())

    started = time.monotonic()
    with endpoint(behave) as server:
        ask(settings(server.url, timeouts={"connect": 1, "read": 0.3, "total": 3}), tmp_path, one)
    assert 0.3 <= time.monotonic() - started < 2.5
    assert len(server.calls) == 2


def test_a_server_that_drips_is_left_after_the_total_timeout(tmp_path: Path, transport: str) -> None:
    async def behave(call: Call) -> None:
        if call.number:
            return await call.send(completion())
        await call.raw(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n")
        for _ in range(60):
            await call.raw(b" ")
            await asyncio.sleep(0.05)

    started = time.monotonic()
    with endpoint(behave) as server:
        ask(settings(server.url, timeouts={"connect": 1, "read": 0.5, "total": 0.7}), tmp_path, one)
    assert 0.7 <= time.monotonic() - started < 2.8


def test_a_storm_of_500_for_one_request_does_not_hold_the_others_up(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        if call.body["messages"][0]["content"] == "poison":
            await call.send(refusal("oops"), 500)
        else:
            await asyncio.sleep(0.01)
            await call.send(completion())

    async def work(client: Client) -> list[object]:
        asks = [client.ask(request(f"question {n}")) for n in range(60)]
        return list(await asyncio.gather(client.ask(request("poison")), *asks, return_exceptions=True))

    with endpoint(behave) as server:
        first, *rest = ask(settings(server.url), tmp_path, work)
    assert isinstance(first, Unanswered)
    assert not [reply for reply in rest if isinstance(reply, BaseException)]


# ------------------------------------------------------------------ congestion


def _flood(count: int) -> Callable[[Client], Awaitable[tuple[Client, float]]]:
    async def work(client: Client) -> tuple[Client, float]:
        started = time.monotonic()
        await asyncio.gather(*(client.ask(request(f"question {n}")) for n in range(count)))
        return client, time.monotonic() - started

    return work


def test_a_hidden_limit_is_found_and_nothing_is_lost(tmp_path: Path) -> None:
    """429 above 4 in flight: every request is answered and few refusals are needed (how fast: test_teacher_limits, in virtual time)."""
    inside = 0
    refused = 0

    async def behave(call: Call) -> None:
        nonlocal inside, refused
        if inside >= 4:
            refused += 1
            return await call.send(refusal("too many"), 429)
        inside += 1
        await asyncio.sleep(0.03)
        inside -= 1
        await call.send(completion())

    with endpoint(behave) as server:
        client, _ = ask(settings(server.url, in_flight=32), tmp_path, _flood(100))
    assert client.counts["bought"] == 100
    assert refused < 60
    assert client.gate.width < 8


def test_retry_after_is_honoured_by_everybody(tmp_path: Path) -> None:
    times: list[float] = []

    async def behave(call: Call) -> None:
        times.append(time.monotonic())
        if call.number == 0:
            return await call.send(refusal("slow down"), 429, {"retry-after": "1"})
        await call.send(completion())

    with endpoint(behave) as server:
        ask(settings(server.url, in_flight=1), tmp_path, _flood(3))
    assert len(server.calls) == 4
    assert times[1] - times[0] >= 1.0


def test_an_overload_that_never_ends_ends_in_an_error_that_may_pass(tmp_path: Path) -> None:
    with endpoint(_sends(refusal("overloaded"), 503)) as server, pytest.raises(PassingError, match="overloaded"):
        ask(settings(server.url, in_flight=4), tmp_path, _flood(6))
    assert len(server.calls) < 40


def test_a_retry_after_of_an_hour_is_left_to_the_orchestrator(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        await call.send(refusal("daily limit"), 429, {"retry-after": "3600"})

    started = time.monotonic()
    with endpoint(behave) as server, pytest.raises(PassingError, match="daily limit"):
        ask(settings(server.url), tmp_path, one)
    assert time.monotonic() - started < 2
    assert len(server.calls) == 1


def test_an_empty_bucket_in_the_headers_is_heeded_before_the_refusal(tmp_path: Path) -> None:
    times: list[float] = []

    async def behave(call: Call) -> None:
        times.append(time.monotonic())
        empty = {"x-ratelimit-limit-requests": "1", "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "400ms"}
        await call.send(completion(), headers=empty if call.number == 0 else None)

    with endpoint(behave) as server:
        ask(settings(server.url, in_flight=1), tmp_path, _flood(2))
    assert times[1] - times[0] >= 0.4


# --------------------------------------------------------------------- secrets


def test_the_key_is_in_no_text_file_or_log(tmp_path: Path, transport: str, caplog: pytest.LogCaptureFixture) -> None:
    """An endpoint that echoes the key in errors and replies, with every logger at DEBUG."""

    async def behave(call: Call) -> None:
        echo = f"you sent {call.headers['authorization']}"
        if call.number == 0:
            await call.send(refusal(echo), 500)
        elif call.number == 1:
            await call.send(echo.encode(), headers={"content-type": "text/plain"})
        else:
            await call.send(completion(echo, reasoning_content=echo))

    with caplog.at_level(logging.DEBUG), endpoint(behave) as server:
        reply = ask(settings(server.url), tmp_path, one)
    with endpoint(_sends(refusal(f"bad key {KEY}"), 500)) as server, pytest.raises(PassingError) as caught:
        ask(settings(server.url, retries=0), tmp_path, lambda client: client.ask(request("another")))
    assert KEY not in f"{reply} {caught.value} {caplog.text}"
    assert all(KEY.encode() not in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_a_key_with_a_newline_from_a_file_still_works_and_nonsense_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    assert api_key(settings("http://x/v1")) == KEY
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u2026redacted")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY") as caught:
        api_key(settings("http://x/v1"))
    assert "redacted" not in str(caught.value)


def test_the_key_can_come_from_a_prefect_secret_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside an event loop too, where Prefect's `load` would return a coroutine."""
    from prefect.blocks.system import Secret

    def load(name: str) -> Secret:  # what a Prefect server would answer
        if name != "teacher-key":
            raise ValueError(f"Unable to find block document named {name}")
        return Secret(value=KEY)

    monkeypatch.setattr(Secret, "load", load)

    async def found(block: str) -> str | None:
        return api_key(settings("http://x/v1", api_key_block=block, api_key_env="UNSET"))

    assert asyncio.run(found("teacher-key")) == KEY
    with pytest.raises(ConfigError, match="'another'"):
        asyncio.run(found("another"))


@pytest.mark.parametrize("url", ["https://user:pw@host/v1", "https://host/v1?key=abc", "host/v1", "ftp://host"])
def test_addresses_with_secrets_or_without_sense_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="base_url"):
        Teacher(base_url=url)


def test_the_embedded_teacher_never_gets_the_key(tmp_path: Path) -> None:
    with embedded_teacher() as url:
        assert api_key(Teacher()) is None
        stats = Stats()
    assert url.startswith("http://127.0.0.1:")
    assert stats.calls == 0


def test_a_budget_stop_counts_answers_that_were_lost(tmp_path: Path) -> None:
    """A reply that breaks off may have been paid: its worst case stays booked, and the budget of 3 requests takes two more."""

    async def behave(call: Call) -> None:
        await (_half_body(call) if call.number == 0 else call.send(completion()))

    async def work(client: Client) -> list[object]:
        await client.ask(request("first"))  # two requests: one lost, one bought
        return list(await asyncio.gather(*(client.ask(request(str(n))) for n in range(4)), return_exceptions=True))

    with endpoint(behave) as server:
        replies = ask(settings(server.url, budget=Budget(requests=3)), tmp_path, work)
    assert len(server.calls) == 3
    assert sorted(type(reply).__name__ for reply in replies) == ["BudgetSpent"] * 3 + ["Reply"]
