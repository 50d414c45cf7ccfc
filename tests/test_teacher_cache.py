"""The reply cache and the ledger: nothing that was accepted is lost, nothing stale is served, the budget holds through it all."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mind.config import Budget, Endpoint, Price
from mind.errors import ConfigError, MindError
from mind.teacher.budget import BudgetSpent, Charge, Ledger, Wallet, has_room, price_of
from mind.teacher.cache import ReplyCache, Spent, keep
from mind.teacher.client import request_body
from mind.teacher.replies import Reply, Request

MESSAGES = [{"role": "system", "content": "Think."}, {"role": "user", "content": "How many?"}]
REPLY = Reply("Because of π.\nThe answer is 3.", prompt_tokens=10, completion_tokens=20, reasoning="hm", model="m")


def key(number: int) -> str:
    return f"{number:064x}"


def store(cache: ReplyCache, number: int, reply: Reply = REPLY, usd: float = 0.5) -> Reply:
    return cache.write(lambda c: keep(c, key(number), reply, usd)).result(30)


# ------------------------------------------------------------------ cache keys


def a_request(sample: int = 0, messages: list[dict[str, str]] = MESSAGES, max_tokens: int = 100, **settings: object) -> str:
    endpoint = Endpoint.model_validate(settings)
    return Request(request_body(endpoint, messages, max_tokens, sample), sample).key(endpoint.base_url)


CHANGES: list[dict[str, object]] = [
    {"base_url": "http://other/v1"},
    {"model": "other"},
    {"temperature": 0.8},
    {"temperature": None},
    {"top_p": 0.9},
    {"seed": 1},
    {"max_tokens": 101},
    {"max_tokens_key": "max_completion_tokens"},
    {"extra": {"reasoning_effort": "low"}},
    {"extra": {"reasoning_effort": "high"}},
    {"sample": 1},
    {"messages": [MESSAGES[0], {"role": "user", "content": "How many? "}]},
    {"messages": [{"role": "system", "content": "Think!"}, MESSAGES[1]]},
    {"messages": [{"role": "developer", "content": "Think."}, MESSAGES[1]]},
    {"messages": MESSAGES[1:]},
]


def test_the_key_holds_everything_that_leaves_the_machine() -> None:
    """All single changes give different keys, from the unchanged request and from each other."""
    keys = [a_request()] + [a_request(**change) for change in CHANGES]  # type: ignore[arg-type]
    assert len(set(keys)) == len(keys)


def test_the_key_holds_nothing_else() -> None:
    patient = {"in_flight": 3, "retries": 9, "requests_per_minute": 5, "timeouts": {"read": 7}, "api_key_env": "OTHER"}
    assert a_request(**patient) == a_request()  # type: ignore[arg-type]


@given(
    st.dictionaries(
        st.sampled_from(["reasoning_effort", "stop", "logit_bias", "user"]), st.text() | st.integers() | st.booleans(), max_size=3
    )
)
@settings(deadline=None, max_examples=50)
def test_equal_requests_have_equal_keys_in_any_order(extra: dict[str, object]) -> None:
    assert a_request(extra=extra) == a_request(extra=dict(reversed(extra.items())))


# --------------------------------------------------------------------- storing


@given(text=st.text(), tokens=st.integers(0, 10**9), reasoning=st.text(max_size=20))
@settings(deadline=None, max_examples=50)
def test_a_reply_survives_storage(text: str, tokens: int, reasoning: str) -> None:
    reply = Reply(text, completion_tokens=tokens, reasoning=reasoning)
    assert Reply.load(reply.dump()) == reply


def test_what_was_written_is_there_for_the_next_process(tmp_path: Path) -> None:
    with ReplyCache(tmp_path / "replies.sqlite") as cache:
        store(cache, 1)
        assert cache.get(key(1)) == REPLY
        assert cache.get(key(2)) is None
    with ReplyCache(tmp_path / "replies.sqlite") as cache:
        assert cache.get(key(1)) == REPLY
        assert cache.spent() == Spent(usd=0.5, prompt_tokens=10, completion_tokens=20, requests=1)
        assert cache.mean_completion() == 20


def test_the_first_reply_stands_and_both_are_paid(tmp_path: Path) -> None:
    with ReplyCache(tmp_path / "r.sqlite") as cache:
        store(cache, 1)
        assert store(cache, 1, Reply("another")) == REPLY
        assert cache.spent().requests == 2


def test_a_damaged_row_is_no_reply_and_can_be_bought_again(tmp_path: Path) -> None:
    with ReplyCache(tmp_path / "r.sqlite") as cache:
        for number in range(3):
            store(cache, number)
    with sqlite3.connect(tmp_path / "r.sqlite") as raw:
        raw.execute("UPDATE replies SET reply = replace(reply, '3', '4') WHERE key = ?", (bytes.fromhex(key(0)),))
        raw.execute("UPDATE replies SET reply = '{torn' WHERE key = ?", (bytes.fromhex(key(1)),))
    with ReplyCache(tmp_path / "r.sqlite") as cache:
        assert [cache.get(key(n)) is not None for n in range(3)] == [False, False, True]
        assert store(cache, 0) == REPLY
        assert cache.get(key(0)) == REPLY


def test_a_torn_end_of_the_log_costs_only_what_was_not_finished(tmp_path: Path) -> None:
    """The WAL as a kill or a power cut leaves it: cut inside the last commit."""
    path = tmp_path / "r.sqlite"
    cache = ReplyCache(path)
    for number in range(20):
        store(cache, number)
    wal = path.with_name("r.sqlite-wal").read_bytes()
    main = path.read_bytes()
    cache.close()
    crashed = tmp_path / "crashed" / "r.sqlite"
    crashed.parent.mkdir()
    crashed.write_bytes(main)
    crashed.with_name("r.sqlite-wal").write_bytes(wal[:-1000])
    with ReplyCache(crashed) as cache:
        assert [n for n in range(20) if cache.get(key(n)) is None] == [19]
        store(cache, 19)
        assert cache.count() == 20


@pytest.mark.parametrize("damage", ["header", "middle"])
def test_a_damaged_file_is_salvaged_not_fatal(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.sqlite"
    with ReplyCache(path) as cache:
        for number in range(300):
            store(cache, number, Reply("x" * 500 + str(number)))
    content = bytearray(path.read_bytes())
    place = 0 if damage == "header" else len(content) // 2
    content[place : place + 5000] = b"\xff" * 5000
    path.write_bytes(content)
    saved = 0
    for _ in range(2):  # damage in the middle shows only when it is read: that run fails, the next one mends
        try:
            with ReplyCache(path) as cache:
                saved = sum(cache.get(key(n)) is not None for n in range(300))
                store(cache, 1000)
        except MindError as error:
            assert "run again" in str(error)
    assert saved >= (0 if damage == "header" else 200)
    with ReplyCache(path) as cache:
        assert cache.get(key(1000)) == REPLY
        assert cache.spent().requests == (2 if damage == "header" else 301)  # what was paid, also for the replies that are gone
    assert ("counts from zero" in " ".join(capsys.readouterr().err.split())) == (damage == "header")


def test_a_cache_of_a_newer_mind_is_left_alone(tmp_path: Path) -> None:
    with ReplyCache(tmp_path / "r.sqlite"):
        pass
    with sqlite3.connect(tmp_path / "r.sqlite") as raw:
        raw.execute("PRAGMA user_version = 99")
    with pytest.raises(MindError, match="newer"):
        ReplyCache(tmp_path / "r.sqlite")


def test_a_full_disk_is_an_error_to_act_on_and_loses_nothing(tmp_path: Path) -> None:
    with ReplyCache(tmp_path / "r.sqlite") as cache:
        store(cache, 1)
        cache.write(lambda c: c.execute("PRAGMA max_page_count = 8").fetchall()).result(10)
        with pytest.raises(MindError, match="free some space"):
            for number in range(2, 100):
                store(cache, number, Reply("y" * 4000))
        assert cache.get(key(1)) == REPLY


def _fill(path: Path, start: int) -> None:
    with ReplyCache(path) as cache:
        futures = [cache.write(lambda c, n=n: keep(c, key(n), Reply(str(n)), 0.01)) for n in range(start, start + 300)]  # type: ignore[misc]
        for future in futures:
            future.result(60)


def test_two_processes_share_one_cache(tmp_path: Path) -> None:
    """Overlapping writes from two processes at once: every reply is there, whole, and the ledger has all of them."""
    path = tmp_path / "r.sqlite"
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_fill, args=(path, start)) for start in (0, 200)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    with ReplyCache(path) as cache:
        assert cache.count() == 500
        assert all(cache.get(key(n)) == Reply(str(n)) for n in range(500))
        assert cache.spent().requests == 600


# ---------------------------------------------------------------------- budget


@settings(deadline=None, max_examples=25)
@given(
    usd=st.integers(10, 300),
    calls=st.lists(st.tuples(st.integers(1, 100), st.floats(0, 1), st.sampled_from(["paid", "refused", "lost"])), min_size=1, max_size=30),
)
def test_a_budget_is_never_exceeded_whatever_comes_back(
    tmp_path_factory: pytest.TempPathFactory, usd: int, calls: list[tuple[int, float, str]]
) -> None:
    """Concurrent calls, each with a worst case, a real cost below it ($1 a token), and one of three ends."""
    with ReplyCache(tmp_path_factory.mktemp("budget") / "r.sqlite") as cache:

        async def call(wallet: Wallet, number: int, worst: int, share: float, end: str) -> int:
            try:
                booked = await wallet.ledger.reserve(Charge(worst, worst))
            except BudgetSpent:
                return 0
            spent = cache.spent()
            assert spent.usd + spent.open_usd <= usd
            await asyncio.sleep(0)
            if end == "paid":
                await wallet.settle(key(number), Reply("x", prompt_tokens=int(worst * share)), booked)
                return int(worst * share)
            await (wallet.ledger.release(booked) if end == "refused" else wallet.ledger.closed(booked))
            return worst if end == "lost" else 0

        async def main() -> int:
            ledger = Ledger(cache, Budget(usd=usd))
            wallets = [Wallet(ledger, Price(input=1e6, output=1e6)) for _ in range(2)]  # teacher and judge
            return sum(await asyncio.gather(*(call(wallets[n % 2], n, *one) for n, one in enumerate(calls))))

        assert asyncio.run(main()) <= usd


def test_a_killed_process_leaves_its_open_calls_booked(tmp_path: Path) -> None:
    async def reserve(cache: ReplyCache, count: int) -> int:
        ledger, booked = Ledger(cache, Budget(requests=10)), 0
        with contextlib.suppress(BudgetSpent):
            for _ in range(count):
                call = await ledger.reserve(Charge())
                booked += 1
                await ledger.closed(call)  # no reply came
        return booked

    with ReplyCache(tmp_path / "r.sqlite") as cache:
        assert asyncio.run(reserve(cache, 7)) == 7
    with ReplyCache(tmp_path / "r.sqlite") as cache:  # the next process: seven calls may have been paid
        assert asyncio.run(reserve(cache, 7)) == 3


def test_worst_case_is_no_less_than_any_tokenizer_could_count(tmp_path: Path) -> None:
    body = request_body(Endpoint(), [{"role": "user", "content": "naïve 数学 😀" * 10}], 50, 0)
    with ReplyCache(tmp_path / "r.sqlite") as cache:
        worst = Wallet(Ledger(cache, Budget()), Price(input=1e6, output=2e6)).worst(Request(body))
    size = len(("naïve 数学 😀" * 10).encode())
    assert worst.tokens >= size + 50
    assert worst.usd >= size + 100


@given(st.floats(0, 2), st.integers(0, 20), st.integers(0, 20))
def test_room_is_kept_for_each_limit_apart(usd: float, tokens: int, requests: int) -> None:
    spent, charge = Spent(usd=1, prompt_tokens=5, completion_tokens=5, requests=10), Charge(usd, tokens, requests)
    assert has_room(spent, charge, Budget()) is True
    assert has_room(spent, charge, Budget(usd=2)) is (1 + usd <= 2)
    assert has_room(spent, charge, Budget(tokens=20)) is (tokens <= 10)
    assert has_room(spent, charge, Budget(requests=20)) is (requests <= 10)


def test_prices(capsys: pytest.CaptureFixture[str]) -> None:
    known = {"m": Price(input=1, output=2)}
    assert price_of("m", "http://x/v1", known, Budget(usd=1)) == known["m"]
    assert price_of("recorded", "embedded", known, Budget(usd=1)).output == 0
    assert price_of("surprise", "http://x/v1", known, Budget()).output == 0
    assert "no price for the model 'surprise'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"teacher\.prices"):
        price_of("surprise", "http://x/v1", known, Budget(usd=1))


def open_many(folder: Path, together: Any, failed: Any) -> None:
    for attempt in range(40):
        together.wait()
        try:
            with ReplyCache(folder / f"{attempt}.sqlite") as cache:
                cache.count()
        except MindError as error:
            failed.put(str(error))


def test_many_may_open_a_new_file_at_once(tmp_path: Path) -> None:
    """SQLite refuses one of two that switch a file to WAL at the same moment, whatever time it was given to wait."""
    context = multiprocessing.get_context("spawn")
    together, failed = context.Barrier(4), context.Queue()
    processes = [context.Process(target=open_many, args=(tmp_path, together, failed)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert failed.empty(), failed.get()
