"""What calls cost, and the stop before they cost too much. Used by teacher.client and teacher.batch.

The budget holds for the workspace: everything that its cache's ledger has seen, over all runs and processes. A call is sent only after its
worst case is written down in the same file, and settled in the transaction that stores its reply. So the budget holds through kill -9 and
with two processes at once: a call that was sent and never settled stays written down at its worst case, because it may have been paid.
Replies that are served from the cache cost nothing.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from mind.config import Budget, Price
from mind.errors import ConfigError
from mind.progress import console
from mind.teacher.cache import ReplyCache, Spent, keep, read_spent
from mind.teacher.replies import Reply, Request

T = TypeVar("T")

TEMPLATE_TOKENS = 64
"""Tokens that an endpoint's chat template may add to a request; beside it, a token is at least one byte of the prompt."""

FREE = Price(input=0, output=0)


class BudgetSpent(Exception):
    """The next call could exceed the budget, and nothing is in flight whose settlement would make room."""


@dataclass(frozen=True)
class Charge:
    """A cost that is known or feared."""

    usd: float = 0.0
    tokens: int = 0
    requests: int = 1

    def __add__(self, other: Charge) -> Charge:
        return Charge(self.usd + other.usd, self.tokens + other.tokens, self.requests + other.requests)


class Ledger:
    """The budget over everything that a cache's file has seen; one for all endpoints of a process, which share it."""

    def __init__(self, cache: ReplyCache, budget: Budget) -> None:
        self._cache, self._budget = cache, budget
        self.limited = any(limit is not None for limit in (budget.usd, budget.tokens, budget.requests))
        self._open = self._booking = self._events = 0  # calls sent; bookings under way; what may have made room so far
        self._changed = asyncio.Condition()
        self._queue = asyncio.Lock()

    async def reserve(self, charge: Charge) -> int | None:
        """Write the worst case of a call down before it is sent; its number, or None when there is no budget to keep.

        Raises:
            BudgetSpent: there is no room for it.
        """
        if not self.limited:
            return None
        self._booking += 1
        try:
            call = await self._book(charge)
        finally:
            self._booking -= 1
            await self._happened()
        if call is None:
            async with self._queue:  # one waits for room at a time, the oldest first
                call = await self._wait_for_room(charge)
        return call

    async def release(self, call: int | None) -> None:
        """The call was refused before it could cost anything."""
        if call is not None:
            await self._write(lambda c: c.execute("DELETE FROM calls WHERE id = ?", (call,)).rowcount)
        await self.closed(call)

    async def closed(self, call: int | None) -> None:
        """The call is no longer under way. One that was neither settled nor released may have been paid: it stays written down."""
        if call is not None:
            self._open -= 1
            await self._happened()

    async def keep(self, key: str, reply: Reply, usd: float, call: int | None) -> Reply:
        """Store a reply with its cost and settle its call; done when it is on disk. Returns what stands under `key`."""
        try:
            return await self._write(lambda connection: keep(connection, key, reply, usd, call))
        finally:
            await self.closed(call)

    def book_prefix(self, connection: sqlite3.Connection, charges: Sequence[Charge]) -> tuple[int, int | None]:
        """Book as many of `charges` together, from the first, as there is room for: how many, and the number of the booking."""
        spent, total, count = read_spent(connection), Charge(requests=0), 0
        for charge in charges:
            if not has_room(spent, total + charge, self._budget):
                break
            total, count = total + charge, count + 1
        return count, booking(total, self._budget)(connection) if count else None

    async def _book(self, charge: Charge) -> int | None:
        call = await self._write(booking(charge, self._budget))
        self._open += call is not None
        return call

    async def _wait_for_room(self, charge: Charge) -> int:
        while True:
            seen = self._events
            call = await self._book(charge)
            if call is not None:
                return call
            if self._events == seen:
                if not (self._open or self._booking):
                    raise BudgetSpent
                async with self._changed:
                    while self._events == seen:
                        await self._changed.wait()

    async def _happened(self) -> None:
        self._events += 1
        async with self._changed:
            self._changed.notify_all()

    async def _write(self, job: Callable[[sqlite3.Connection], T]) -> T:
        return await asyncio.wrap_future(self._cache.write(job))


@dataclass(frozen=True)
class Wallet:
    """What the calls to one endpoint cost, out of a ledger."""

    ledger: Ledger
    price: Price

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """USD."""
        return (prompt_tokens * self.price.input + completion_tokens * self.price.output) / 1e6

    def worst(self, request: Request) -> Charge:
        """What a call costs at most: a token for every byte of the prompt, and a reply as long as it may be."""
        prompt, completion = request.prompt_bytes() + TEMPLATE_TOKENS, request.room()
        return Charge(self.cost(prompt, completion), prompt + completion)

    async def settle(self, key: str, reply: Reply, call: int | None) -> Reply:
        """Store a reply with its cost; done when it is on disk. Returns what stands under `key`: an earlier reply wins."""
        return await self.ledger.keep(key, reply, self.cost(reply.prompt_tokens, reply.completion_tokens), call)


def booking(charge: Charge, budget: Budget) -> Callable[[sqlite3.Connection], int | None]:
    """A write that books a charge when the budget has room for it, and returns its number (None: no room)."""

    def book(connection: sqlite3.Connection) -> int | None:
        if not has_room(read_spent(connection), charge, budget):
            return None
        row = (charge.usd, charge.tokens, charge.requests)
        return connection.execute("INSERT INTO calls (usd, tokens, requests) VALUES (?, ?, ?)", row).lastrowid

    return book


def has_room(spent: Spent, charge: Charge, budget: Budget) -> bool:
    """Whether `charge` on top of all that was spent and all that is open stays within the budget."""
    after = (
        (budget.usd, spent.usd + spent.open_usd + charge.usd),
        (budget.tokens, spent.prompt_tokens + spent.completion_tokens + spent.open_tokens + charge.tokens),
        (budget.requests, spent.requests + spent.open_requests + charge.requests),
    )
    return all(limit is None or total <= limit for limit, total in after)


def price_of(model: str, base_url: str, prices: dict[str, Price], budget: Budget) -> Price:
    """The price of a model; nothing for the embedded teacher. An unknown one counts as free, with a warning.

    Raises:
        ConfigError: a budget in USD cannot be kept without a price.
    """
    if model in prices:
        return prices[model]
    if base_url == "embedded":
        return FREE
    if budget.usd is not None:
        raise ConfigError(
            f"teacher.budget.usd is set, but the price of the model '{model}' is not known",
            wanted=f"teacher.prices: {{{model}: {{input: <USD per million tokens>, output: ...}}}}",
            do="add the price, or set the budget in tokens or requests",
        )
    _warn(model)
    return FREE


@cache
def _warn(model: str) -> None:
    """Once a process."""
    console.print(f"no price for the model '{model}': its cost is shown as 0 (teacher.prices)", style="yellow", markup=False)
