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

from mind.config import Budget, Price
from mind.errors import ConfigError
from mind.progress import console
from mind.teacher.cache import ReplyCache, Spent, keep, read_spent
from mind.teacher.replies import Reply, Request

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


class Wallet:
    """Prices, and the budget over one cache's ledger."""

    def __init__(self, cache: ReplyCache, budget: Budget, price: Price) -> None:
        self._cache, self._budget, self.price = cache, budget, price
        self.limited = any(limit is not None for limit in (budget.usd, budget.tokens, budget.requests))
        self._open = self._closings = 0
        self._settled = asyncio.Condition()
        self._queue = asyncio.Lock()

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """USD."""
        return (prompt_tokens * self.price.input + completion_tokens * self.price.output) / 1e6

    def worst(self, request: Request) -> Charge:
        """What a call costs at most: a token for every byte of the prompt, and a reply as long as it may be."""
        prompt, completion = request.prompt_bytes() + TEMPLATE_TOKENS, request.room()
        return Charge(self.cost(prompt, completion), prompt + completion)

    async def reserve(self, charge: Charge) -> int | None:
        """Write the worst case of a call down before it is sent; its number, or None when there is no budget to keep.

        Raises:
            BudgetSpent: there is no room for it.
        """
        if not self.limited:
            return None
        call = await self._try(charge)
        if call is None:
            async with self._queue:  # one waits for room at a time, the oldest first
                call = await self._wait_for_room(charge)
        self._open += 1
        return call

    async def settle(self, key: str, reply: Reply, call: int | None) -> Reply:
        """Store a reply with its cost; done when it is on disk. Returns what stands under `key`: an earlier reply wins."""
        usd = self.cost(reply.prompt_tokens, reply.completion_tokens)
        try:
            return await asyncio.wrap_future(self._cache.write(lambda connection: keep(connection, key, reply, usd, call)))
        finally:
            await self._closed(call)

    async def release(self, call: int | None) -> None:
        """The call was refused before it could cost anything."""
        if call is not None:
            await asyncio.wrap_future(self._cache.write(lambda c: c.execute("DELETE FROM calls WHERE id = ?", (call,)).rowcount))
        await self._closed(call)

    async def lose(self, call: int | None) -> None:
        """The call may have been paid though no reply came: its worst case stays written down."""
        await self._closed(call)

    def book_prefix(self, connection: sqlite3.Connection, charges: Sequence[Charge]) -> tuple[int, int | None]:
        """Book as many of `charges` together, from the first, as there is room for: how many, and the number of the booking."""
        spent, total, count = read_spent(connection), Charge(requests=0), 0
        for charge in charges:
            if not has_room(spent, total + charge, self._budget):
                break
            total, count = total + charge, count + 1
        return count, booking(total, self._budget)(connection) if count else None

    async def _try(self, charge: Charge) -> int | None:
        return await asyncio.wrap_future(self._cache.write(booking(charge, self._budget)))

    async def _wait_for_room(self, charge: Charge) -> int:
        while True:
            seen = self._closings
            call = await self._try(charge)
            if call is not None:
                return call
            if self._closings == seen:
                if not self._open:
                    raise BudgetSpent
                async with self._settled:
                    while self._closings == seen:
                        await self._settled.wait()

    async def _closed(self, call: int | None) -> None:
        if call is not None:
            self._open -= 1
            self._closings += 1
            async with self._settled:
                self._settled.notify_all()


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
