"""questions -> rationales/: every question is put to the teacher from eight perspectives, and every reply is judged.

Replies are bought once: each is on disk in the workspace's reply cache before it counts, so a killed, stopped or changed run goes on
from what it has. The output is a function of settings, questions and replies, whatever the concurrency and the order of arrival.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from rich.table import Table

from mind import outputs
from mind.config import Config, Endpoint, Price
from mind.errors import DataError, PassingError, TeacherError
from mind.grading import check_gold
from mind.progress import Bar, bar, console
from mind.records import Question, Record, read_questions
from mind.teacher.budget import BudgetSpent, Wallet, price_of
from mind.teacher.cache import ReplyCache
from mind.teacher.client import Client, shown
from mind.teacher.interview import Interview, Interviewer
from mind.teacher.judge import REASONS
from mind.teacher.limits import Stopped
from mind.teacher.perspectives import prompts_digest
from mind.teacher.recorded import Behaviour, starter_corpus
from mind.workspace import Workspace

OPEN_QUESTIONS = 8
"""Questions begun beyond those that fill the places in flight: they hide the wait for a question's last view."""


def run(config: Config, workspace: Workspace, variant: str | None = None) -> None:
    """Write rationales/ from the questions that `synthesis.questions` names.

    Raises:
        DataError: the questions are missing, malformed or not gradable.
        TeacherError: the endpoint refuses (key, model, request), or the budget is spent before one question is complete.
        PassingError: the endpoint cannot be reached or is overloaded, or too many views stayed without a reply.
    """
    path, questions = read_pool(config, workspace)
    with ExitStack() as stack:
        cache = stack.enter_context(ReplyCache(workspace.replies))
        urls = stack.enter_context(addresses(config))
        folder = stack.enter_context(outputs.stage_output(workspace.rationales))
        outcome = asyncio.run(_ask_all(config, questions, cache, urls, folder))
        _check(outcome, config)
        outputs.write_manifest(
            folder,
            stage="synthesize",
            inputs={"questions": outputs.digest_path(path)},
            config=_settings(config),
            counts=outcome.tally.counts(config),
            complete=outcome.stopped is None,
            **({"stopped": outcome.stopped} if outcome.stopped else {}),
        )
    _show(outcome, config)


def read_pool(config: Config, workspace: Workspace) -> tuple[Path, list[Question]]:
    """The file that `synthesis.questions` names, and its questions up to `synthesis.limit`.

    Raises:
        DataError: missing, malformed, or answers that cannot be graded (names the first).
    """
    name = config.synthesis.questions
    pools = workspace.data / "questions"
    path = workspace.root / name if name.endswith(".jsonl") or "/" in name else pools / f"{name}.jsonl"
    if not path.exists() and path.parent == pools:
        known = ", ".join(sorted(p.stem for p in pools.glob("*.jsonl"))) or "none"
        raise DataError(
            f"no pool of questions '{name}' in {pools}",
            wanted=f"one of: {known}",
            do="put your questions there as NAME.jsonl, or name a file in synthesis.questions",
        )
    if pools not in path.parents:
        console.print(f"{path} lies outside data/questions: changes in it do not make the pipeline run again", style="yellow")
    questions = read_questions(path)[: config.synthesis.limit]
    for question in questions:
        fault = check_gold(question.answer, question.kind, question.choices)
        if fault:
            raise DataError(f"{path}, question '{question.id}': {fault}", wanted=f"an answer that can be graded as '{question.kind}'")
    return path, questions


# ------------------------------------------------------------------ endpoints


def identity(endpoint: Endpoint, config: Config) -> str:
    """The endpoint's part of every cache key: its address; for the embedded teacher what its answers depend on."""
    if endpoint.base_url != "embedded":
        return endpoint.base_url
    wrong = config.teacher.embedded_wrong_rate
    return f"embedded:{starter_corpus().digest[:16]}" + (f":wrong={wrong}" if wrong else "")


@contextmanager
def addresses(config: Config) -> Iterator[tuple[str, str]]:
    """Base URLs of teacher and judge; starts the embedded server for the length of the block when one of them is that."""
    endpoints = (config.teacher, config.synthesis.llm_judge)
    asked = endpoints if config.synthesis.judge == "llm" else endpoints[:1]
    if all(endpoint.base_url != "embedded" for endpoint in asked):
        yield endpoints[0].base_url, endpoints[1].base_url
        return
    from mind.teacher.server import embedded_teacher

    with embedded_teacher(Behaviour(wrong_rate=config.teacher.embedded_wrong_rate)) as url:
        yield tuple(url if e.base_url == "embedded" else e.base_url for e in endpoints)  # type: ignore[misc]


def prices(config: Config) -> tuple[Price, Price]:
    """USD per million tokens of teacher and judge. Raises ConfigError."""
    teacher, judge = config.teacher, config.synthesis.llm_judge
    judge_price = (
        price_of(judge.model, judge.base_url, teacher.prices, teacher.budget)
        if config.synthesis.judge == "llm"
        else Price(input=0, output=0)
    )
    price = price_of(teacher.model, teacher.base_url, teacher.prices, teacher.budget)
    factor = teacher.batch.price_factor if teacher.mode == "batch" else 1.0
    return Price(input=price.input * factor, output=price.output * factor), judge_price


# --------------------------------------------------------------------- asking


@dataclass
class Tally:
    """What is counted while rows are written; nothing in it depends on time or chance."""

    by_perspective: dict[str, Counter[str]] = field(default_factory=dict)
    used: Counter[str] = field(default_factory=Counter)
    questions: int = 0
    incomplete: int = 0

    def add(self, interview: Interview) -> None:
        self.questions += 1
        self.used += interview.used
        for row in interview.rows:
            counts = self.by_perspective.setdefault(row.perspective, Counter())
            counts["replies"] += 1
            counts["first accepted"] += row.accepted and row.attempt == 1
            counts["accepted" if row.accepted else row.reason.partition(":")[0]] += 1
            counts["completion_tokens"] += row.completion_tokens

    def usd(self, config: Config) -> float:
        """What these replies cost at the prices of the settings, whenever they were bought."""
        teacher, judge = prices(config)
        own = self.used["prompt_tokens"] * teacher.input + self.used["completion_tokens"] * teacher.output
        theirs = self.used["judge_prompt_tokens"] * judge.input + self.used["judge_completion_tokens"] * judge.output
        return (own + theirs) / 1e6

    def counts(self, config: Config) -> dict[str, Any]:
        perspectives = {p: dict(sorted(self.by_perspective.get(p, Counter()).items())) for p in config.synthesis.perspectives}
        accepted = sum(counts["accepted"] for counts in self.by_perspective.values())
        return {
            "questions": self.questions,
            "incomplete_questions": self.incomplete,
            "accepted": accepted,
            "by_perspective": perspectives,
            "used": dict(sorted(self.used.items())),
            "usd": round(self.usd(config), 6),
        }


@dataclass
class Outcome:
    tally: Tally
    stopped: str | None = None  # why it ended early
    bought: int = 0  # calls of this process
    usd: float = 0.0


class Rows:
    """Writes the rows of finished questions in the order of the pool; what is early waits in memory."""

    def __init__(self, rationales: IO[str], questions: IO[str], tally: Tally) -> None:
        self._rationales, self._questions, self._tally = rationales, questions, tally
        self._early: dict[int, Interview | None] = {}
        self._next = 0

    def put(self, place: int, interview: Interview | None) -> None:
        """None: the question stayed incomplete; it is left out as a whole, its replies stay in the cache."""
        self._early[place] = interview
        while self._next in self._early:
            done = self._early.pop(self._next)
            self._next += 1
            if done is None:
                self._tally.incomplete += 1
                continue
            self._tally.add(done)
            self._questions.write(_line(done.question))
            self._rationales.writelines(map(_line, done.rows))


def _line(row: Record) -> str:
    return row.model_dump_json() + "\n"


class Asking:
    """One pass over all questions: keeps the places in flight filled, and ends early when it must."""

    def __init__(self, config: Config, clients: Sequence[Client], rows: Rows, progress: Bar) -> None:
        self._config, self._clients, self._rows, self._progress = config, clients, rows, progress
        self.fatal: BaseException | None = None
        self.stopped: str | None = None
        self._places = asyncio.Semaphore(clients[0].gate.most // len(config.synthesis.perspectives) + OPEN_QUESTIONS)

    async def run(self, questions: Sequence[Question]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for place, question in enumerate(questions):
                await self._places.acquire()
                tasks.create_task(self._one(place, question))

    def stop(self, why: str | None, fatal: BaseException | None = None) -> None:
        """No further call is sent; those in flight end as they may. The first reason stands."""
        if self.stopped is None and self.fatal is None:
            self.stopped, self.fatal = why, fatal
        for client in self._clients:
            client.gate.stop()

    async def _one(self, place: int, question: Question) -> None:
        seen: Counter[str] = Counter()
        done: Interview | None = None
        asks = [partial(client.ask, seen=seen) for client in self._clients]
        interviewer = Interviewer(self._config, self._clients[0].identity, asks[0], asks[-1])
        try:
            done = await interviewer.interview(question)
        except Stopped:
            pass
        except BudgetSpent:
            self.stop("budget")
        except Exception as error:
            self.stop(None, error)
        finally:
            self._places.release()
        self._rows.put(place, done)
        views = len(self._config.synthesis.perspectives)
        if not seen["bought"]:
            self._progress.resumed += views
        self._progress.advance(views if done else 0, self._note())

    def _note(self) -> str:
        tokens, usd = sum(c.tokens for c in self._clients), sum(c.usd for c in self._clients)
        return f"{tokens:,} tokens  ${usd:.4f}  {int(self._clients[0].gate.width)} wide"


async def _ask_all(config: Config, questions: Sequence[Question], cache: ReplyCache, urls: tuple[str, str], folder: Path) -> Outcome:
    tally = Tally()
    clients = _clients(config, cache, urls)
    total = len(questions) * len(config.synthesis.perspectives)
    try:
        with (
            (folder / "rationales.jsonl").open("w", encoding="utf-8") as rationales,
            (folder / "questions.jsonl").open("w", encoding="utf-8") as asked,
            bar("synthesize", total, "views") as progress,
        ):
            asking = Asking(config, clients, Rows(rationales, asked, tally), progress)
            with _graceful(asking):
                await asking.run(questions)
    finally:
        for client in clients:
            await client.close()
    if asking.fatal:
        raise asking.fatal
    return Outcome(tally, asking.stopped, sum(c.counts["bought"] for c in clients), sum(c.usd for c in clients))


def _clients(config: Config, cache: ReplyCache, urls: tuple[str, str]) -> list[Client]:
    """The teacher's client, and the LLM judge's when there is one."""
    endpoints = [config.teacher, config.synthesis.llm_judge][: 1 + (config.synthesis.judge == "llm")]
    wallets = [Wallet(cache, config.teacher.budget, price) for price in prices(config)]
    return [Client(e, url, identity(e, config), cache, wallet) for e, url, wallet in zip(endpoints, urls, wallets, strict=False)]


@contextmanager
def _graceful(asking: Asking) -> Iterator[None]:
    """First Ctrl-C (or SIGTERM): calls in flight are still taken in. Second: they are dropped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def interrupted() -> None:
        if asking.stopped == "interrupted" and task:
            task.cancel()
            return
        console.print("stopping: replies to calls in flight are still taken in; Ctrl-C again drops them", style="yellow")
        asking.stop("interrupted")

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted)
    try:
        yield
    except asyncio.CancelledError:
        if asking.stopped != "interrupted":
            raise
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


# ------------------------------------------------------------------ the result


def _check(outcome: Outcome, config: Config) -> None:
    """Whether what came is fit to be the stage's output."""
    if outcome.stopped == "interrupted":
        raise KeyboardInterrupt
    tally = outcome.tally
    if outcome.stopped == "budget" and not tally.questions:
        raise TeacherError(
            "teacher.budget is spent before one question was complete", do="raise teacher.budget: all replies so far are kept"
        )
    missing, views = tally.used["unanswered"], tally.questions * len(config.synthesis.perspectives)
    if missing > config.synthesis.max_missing * views:
        raise PassingError(
            f"{missing} of {views} views got no reply after {config.teacher.retries} retries; all others are kept",
            do="run again: only these are asked; or allow some to be missing with synthesis.max_missing",
        )


def _settings(config: Config) -> dict[str, Any]:
    """The settings that the output depends on; how fast and how patiently it was asked is left out."""
    keys = {"model", "temperature", "top_p", "seed", "max_tokens", "max_tokens_key", "extra"}
    left_out = {"max_missing", "llm_judge"}
    settings: dict[str, Any] = {
        "teacher": config.teacher.model_dump(mode="json", include=keys) | {"endpoint": identity(config.teacher, config)},
        "synthesis": config.synthesis.model_dump(mode="json", exclude=left_out),
        "prompts": prompts_digest(),
    }
    if config.synthesis.judge == "llm":
        judge = config.synthesis.llm_judge
        settings["llm_judge"] = judge.model_dump(mode="json", include={*keys, "min_steps", "min_fidelity"}) | {
            "endpoint": identity(judge, config)
        }
    return settings


def _show(outcome: Outcome, config: Config) -> None:
    """The table per perspective, and one line of sums."""
    tally = outcome.tally
    found = [reason for reason in REASONS if any(counts[reason] for counts in tally.by_perspective.values())]
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("perspective")
    for title in ("replies", "accepted", *found, "tokens"):
        table.add_column(title, justify="right")
    for name in config.synthesis.perspectives:
        counts = tally.by_perspective.get(name, Counter())
        cells = [counts["replies"], counts["accepted"], *(counts[reason] for reason in found), counts["completion_tokens"]]
        table.add_row(name, *(f"{cell:,}" for cell in cells))
    console.print(table)
    cached = tally.used["calls"] + tally.used["judge_calls"] - outcome.bought
    source = "the embedded teacher" if config.teacher.base_url == "embedded" else shown(config.teacher.base_url)
    console.print(
        f"synthesize: {tally.questions} questions, {outcome.bought} calls to {source} (${outcome.usd:.4f}), {max(0, cached)} replies from the cache"
    )
    if outcome.stopped == "budget":
        console.print(
            f"the budget is spent: {tally.incomplete} questions are left out; raise teacher.budget and run again to go on",
            style="bold yellow",
        )
