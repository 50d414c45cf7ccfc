"""The gate: never wider than allowed, halves once a round trip, climbs back, waits when told to, keeps limits per minute. In virtual time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from email.utils import formatdate
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mind.teacher.limits import FIRST_PAUSE, LONGEST_PAUSE, Gate, Stopped, jittered, parse_duration, retry_after

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to the next timer: what takes minutes takes milliseconds, and the same every time."""

    def __init__(self) -> None:
        super().__init__()
        self._virtual = 0.0

    def time(self) -> float:
        return self._virtual

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._virtual = max(self._virtual, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def virtually(work: Coroutine[Any, Any, T]) -> T:
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


def now() -> float:
    return asyncio.get_running_loop().time()


class Endpoint:
    """Takes `latency` for a call and refuses above `limit` in flight."""

    def __init__(self, gate: Gate, latency: float = 0.1, limit: int = 1_000, wait: float | None = None) -> None:
        self.gate, self.latency, self.limit, self.wait = gate, latency, limit, wait
        self.inside = self.peak = self.refused = self.answered = 0

    async def call(self, ticket: int) -> None:
        while True:
            given_pass = await self.gate.enter(ticket)
            try:
                if self.inside >= self.limit:
                    self.refused += 1
                    await asyncio.sleep(0.002)
                    self.gate.refused(given_pass, self.wait)
                    continue
                self.inside += 1
                self.peak = max(self.peak, self.inside)
                await asyncio.sleep(self.latency)
                self.inside -= 1
                self.answered += 1
                self.gate.succeeded(given_pass)
                return
            finally:
                self.gate.leave()

    async def flood(self, count: int) -> float:
        started = now()
        await asyncio.gather(*(self.call(ticket) for ticket in range(count)))
        return now() - started


def test_steady_traffic_runs_at_full_width() -> None:
    async def work() -> tuple[float, Endpoint]:
        endpoint = Endpoint(Gate(64), latency=0.2)
        return await endpoint.flood(2000), endpoint

    seconds, endpoint = virtually(work())
    assert seconds == pytest.approx(2000 / 64 * 0.2, rel=0.03)
    assert endpoint.peak == 64


@pytest.mark.parametrize("wait", [None, 0.05])
def test_a_hidden_limit_costs_at_most_half_of_the_ideal_time(wait: float | None) -> None:
    """The bench's case: 429 above 8, 0.1 s, 200 requests, width 64; ideal 2.5 s."""

    async def work() -> tuple[float, Endpoint]:
        endpoint = Endpoint(Gate(64), latency=0.1, limit=8, wait=wait)
        return await endpoint.flood(200), endpoint

    seconds, endpoint = virtually(work())
    assert seconds <= 1.3 * 2.5
    assert endpoint.peak <= 8
    assert endpoint.refused < 200


def test_the_width_climbs_back_when_the_limit_goes() -> None:
    async def work() -> float:
        endpoint = Endpoint(Gate(64), limit=4)
        await endpoint.flood(100)
        assert endpoint.gate.width < 8
        endpoint.limit = 1_000
        await endpoint.flood(3000)
        return endpoint.gate.width

    assert virtually(work()) == 64


@pytest.mark.parametrize(("refusals", "width"), [(1, 16), (10, 16), (20, 12), (32, 1)])
def test_a_burst_of_refusals_halves_once_and_leaves_no_more_than_was_taken(refusals: int, width: float) -> None:
    async def work() -> tuple[float, int]:
        gate = Gate(32)
        passes = [await gate.enter(n) for n in range(32)]
        for given_pass in passes[:refusals]:
            gate.refused(given_pass, None)
            gate.leave()
        return gate.width, gate.cuts

    assert virtually(work()) == (width, 1)


def test_retry_after_closes_the_gate_for_everybody() -> None:
    async def work() -> float:
        gate = Gate(4)
        gate.refused(await gate.enter(0), 7.5)
        gate.leave()
        started = now()
        await gate.enter(1)
        return now() - started

    assert virtually(work()) == 7.5


def test_the_oldest_ticket_goes_first() -> None:
    async def work() -> list[int]:
        gate, order = Gate(1), []
        await gate.enter(0)

        async def wait(ticket: int) -> None:
            await gate.enter(ticket)
            order.append(ticket)
            gate.leave()

        waiting = [asyncio.ensure_future(wait(ticket)) for ticket in (5, 3, 9, 1)]
        await asyncio.sleep(0)
        gate.leave()
        await asyncio.gather(*waiting)
        return order

    assert virtually(work()) == [1, 3, 5, 9]


@settings(deadline=None, max_examples=40)
@given(per_minute=st.floats(0.5, 6000), width=st.integers(1, 50), count=st.integers(2, 60))
def test_requests_per_minute_are_never_exceeded(per_minute: float, width: int, count: int) -> None:
    async def work() -> list[float]:
        gate, sent = Gate(width, requests=per_minute), []

        async def call(ticket: int) -> None:
            await gate.enter(ticket)
            sent.append(now())
            await asyncio.sleep(0.01)
            gate.leave()

        await asyncio.gather(*(call(ticket) for ticket in range(count)))
        return sent

    sent = virtually(work())
    for start in sent:
        assert sum(start <= moment < start + 60 for moment in sent) <= max(1, per_minute + 1)


def test_tokens_per_minute_count_what_was_used_not_what_was_feared() -> None:
    async def flood(used: float) -> float:
        gate = Gate(4, tokens=6000)

        async def call(ticket: int) -> None:
            await gate.enter(ticket, tokens=1000)
            gate.used(1000, used)
            gate.leave()

        started = now()
        for ticket in range(13):
            await call(ticket)
        return now() - started

    assert virtually(flood(1000)) == pytest.approx(120)  # 12 x 1000 tokens before the last, at 100 a second
    assert virtually(flood(100)) == pytest.approx(12)


def test_headers_that_announce_an_empty_bucket_close_the_gate() -> None:
    async def opens(headers: dict[str, str], tokens: float) -> float:
        gate = Gate(4)
        gate.heed(headers, tokens)
        started = now()
        await gate.enter(0)
        return now() - started

    def bucket(kind: str, remaining: int, limit: int, reset: str) -> dict[str, str]:
        return {f"x-ratelimit-{what}-{kind}": str(v) for what, v in (("remaining", remaining), ("limit", limit), ("reset", reset))}

    assert virtually(opens(bucket("requests", 5, 10, "60s"), 1)) == 0
    assert virtually(opens(bucket("requests", 0, 10, "60s"), 1)) == pytest.approx(6)  # one of ten that fill in a minute
    assert virtually(opens(bucket("tokens", 500, 1500, "1m0s"), 1000)) == pytest.approx(30)
    assert virtually(opens(bucket("tokens", 0, 0, "nonsense"), 1000)) == 0


def test_stop_wakes_all_who_wait_and_lets_nobody_in() -> None:
    async def work() -> list[object]:
        gate = Gate(1)
        await gate.enter(0)
        waiting = [asyncio.ensure_future(gate.enter(1)), asyncio.ensure_future(gate.pause(1000))]
        await asyncio.sleep(0)
        gate.stop()
        return await asyncio.gather(*waiting, gate.enter(2), return_exceptions=True)

    assert all(isinstance(result, Stopped) for result in virtually(work()))


def test_a_cancelled_waiter_takes_no_place() -> None:
    async def work() -> None:
        gate = Gate(1)
        await gate.enter(0)
        waiting = asyncio.ensure_future(gate.enter(1))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.sleep(0)
        gate.leave()
        await asyncio.wait_for(gate.enter(2), 1)
        assert gate.in_flight == 1

    virtually(work())


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_jitter_is_full_and_bounded(tries: int) -> None:
    assert 0 <= jittered(tries) <= min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(tries, 16))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1),
        ("6m0s", 360),
        ("20ms", 0.02),
        ("1h2m3.5s", 3723.5),
        ("0.25", 0.25),
        ("2d", 172800),
        ("soon", None),
        ("", None),
        ("-1s", None),
    ],
)
def test_durations(text: str, seconds: float | None) -> None:
    assert parse_duration(text) == (None if seconds is None else pytest.approx(seconds))


def test_retry_after_forms() -> None:
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after({"retry-after": "9"}) == 9
    assert retry_after({"retry-after": formatdate(time.time() + 100, usegmt=True)}) == pytest.approx(100, abs=3)
    assert retry_after({"retry-after": formatdate(time.time() - 100, usegmt=True)}) == 0
    assert retry_after({"retry-after": "inf"}) is None
    assert retry_after({"retry-after": "whenever"}) is None
    assert retry_after({}) is None
