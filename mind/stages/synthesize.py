"""questions -> rationales/: every question is put to the teacher from eight perspectives, and every reply is judged.

Replies are bought once: each is on disk in the workspace's reply cache before it counts, so a killed, stopped or changed run goes on
from what it has. The output is a function of settings, questions and replies, whatever the concurrency and the order of arrival.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from mind import outputs
from mind.config import Config, Endpoint, Price, flatten
from mind.errors import DataError, PassingError, TeacherError
from mind.grading import refuse_ungradable
from mind.progress import bar, console
from mind.records import Question, read_questions
from mind.teacher import llm_judge, mistakes
from mind.teacher.asking import BUDGET, INTERRUPTED, Asking, Find, Rows, Tally
from mind.teacher.batch import Desk
from mind.teacher.budget import FREE, Ledger, Wallet, price_of
from mind.teacher.cache import ReplyCache
from mind.teacher.client import Client, shown
from mind.teacher.estimate import Estimate, Forecast
from mind.teacher.judge import REASONS
from mind.teacher.perspectives import prompts_digest
from mind.teacher.recorded import Behaviour, refuse_unknown, starter_corpus
from mind.workspace import Workspace


@dataclass(frozen=True)
class Outcome:
    """`bought`, `usd`: calls of this process; `stopped`: why it ended early."""

    tally: Tally
    bought: int
    usd: float
    stopped: str | None


def run(config: Config, workspace: Workspace, variant: str | None = None) -> None:
    """Write rationales/ from the questions that `synthesis.questions` names; show and track what came of it. Raises as `write`."""
    outcome = write(config, workspace)
    _show(outcome, config)
    _track(outcome, config, workspace)


def write(config: Config, workspace: Workspace) -> Outcome:
    """Write rationales/.

    Raises:
        DataError: the questions are missing, malformed or not gradable.
        TeacherError: the endpoint refuses (key, model, request), or the budget is spent before one question is complete.
        PassingError: the endpoint cannot be reached or is overloaded, or too many views stayed without a reply.
        KeyboardInterrupt: Ctrl-C, after the calls in flight were taken in.
    """
    path, questions = read_pool(config, workspace)
    with ExitStack() as stack:
        cache = stack.enter_context(ReplyCache(workspace.replies))
        urls = stack.enter_context(_addresses(config))
        folder = stack.enter_context(outputs.stage_output(workspace.rationales))
        outcome = asyncio.run(_fill(config, questions, cache, urls, folder))
        _check(outcome, config)
        digest = outputs.digest_path(path)
        ended = {"complete": True} if outcome.stopped is None else {"complete": False, "stopped": outcome.stopped}
        counts = _counts(outcome.tally, config)
        outputs.write_manifest(folder, stage="synthesize", inputs={"questions": digest}, config=_settings(config), counts=counts, **ended)
    return outcome


def dry_run(config: Config, workspace: Workspace) -> Estimate:
    """What `run` would buy now; prints as a table. Asks nothing.

    Raises:
        DataError, ConfigError: as of `run`.
        TeacherError: the embedded teacher does not know a question.
    """
    _, questions = read_pool(config, workspace)
    if config.teacher.base_url == "embedded":
        refuse_unknown(questions)
    with ReplyCache(workspace.replies) as cache:
        teacher, judge = config.teacher, config.synthesis.llm_judge
        first, second = _wallets(config, cache)
        priced = teacher.model in teacher.prices or teacher.base_url == "embedded"
        forecast = Forecast(config, (identity(teacher, config), identity(judge, config)), cache, (first, second), priced)
        return asyncio.run(forecast.of(questions))


def cancel(config: Config, workspace: Workspace) -> int:
    """Cancel the open batches of `teacher.mode: batch` at the provider and take in what they have; how many."""

    async def cancelled(cache: ReplyCache, url: str) -> int:
        wallet = _wallets(config, cache)[0]
        client = Client(config.teacher, url, identity(config.teacher, config), cache, wallet)
        try:
            return await Desk(client, cache, wallet, config.teacher.batch, workspace.caches).cancel()
        finally:
            await client.close()

    with ReplyCache(workspace.replies) as cache, _addresses(config) as urls:
        return asyncio.run(cancelled(cache, urls[0]))


def read_pool(config: Config, workspace: Workspace) -> tuple[Path, list[Question]]:
    """The file that `synthesis.questions` names, and its questions up to `synthesis.limit`.

    Raises:
        DataError: missing, malformed, or answers that cannot be graded (names the first).
    """
    name = config.synthesis.questions
    pools = workspace.data / "questions"
    path = workspace.home / name if name.endswith(".jsonl") or "/" in name else pools / f"{name}.jsonl"
    if not path.exists() and path.parent == pools:
        known = ", ".join(sorted(p.stem for p in pools.glob("*.jsonl"))) or "none"
        raise DataError(
            f"no pool of questions '{name}' in {pools}",
            wanted=f"one of: {known}",
            do=f"put your questions into {workspace.home / 'data' / 'questions'} as NAME.jsonl, or name a file in synthesis.questions",
        )
    if pools not in path.parents:
        console.print(f"{path} lies outside data/questions: changes in it do not make the pipeline run again", style="yellow", markup=False)
    questions = read_questions(path)[: config.synthesis.limit]
    refuse_ungradable(path, questions)
    return path, questions


# ------------------------------------------------------------------ endpoints


def identity(endpoint: Endpoint, config: Config) -> str:
    """The endpoint's part of every cache key: its address; for the embedded teacher what its answers depend on."""
    if endpoint.base_url != "embedded":
        return endpoint.base_url
    wrong = config.teacher.embedded_wrong_rate
    return f"embedded:{starter_corpus().digest[:16]}" + (f":wrong={wrong}" if wrong else "")


def _endpoints(config: Config) -> list[Endpoint]:
    """The teacher's, and the LLM judge's when there is one."""
    return [config.teacher, config.synthesis.llm_judge] if config.synthesis.judge == "llm" else [config.teacher]


@contextmanager
def _addresses(config: Config) -> Iterator[list[str]]:
    """Base URLs of the endpoints; starts the embedded server for the length of the block when one of them is that."""
    urls = [endpoint.base_url for endpoint in _endpoints(config)]
    if "embedded" not in urls:
        yield urls
        return
    from mind.teacher.server import embedded_teacher

    with embedded_teacher(Behaviour(wrong_rate=config.teacher.embedded_wrong_rate)) as here:
        yield [here if url == "embedded" else url for url in urls]


def _prices(config: Config) -> tuple[Price, Price]:
    """USD per million tokens of teacher and judge. Raises ConfigError."""
    teacher, judge = config.teacher, config.synthesis.llm_judge
    price = price_of(teacher.model, teacher.base_url, teacher.prices, teacher.budget)
    factor = teacher.batch.price_factor if teacher.mode == "batch" else 1.0
    price_of_judge = price_of(judge.model, judge.base_url, teacher.prices, teacher.budget) if config.synthesis.judge == "llm" else FREE
    return Price(input=price.input * factor, output=price.output * factor), price_of_judge


def _wallets(config: Config, cache: ReplyCache) -> tuple[Wallet, Wallet]:
    ledger, (teacher, judge) = Ledger(cache, config.teacher.budget), _prices(config)
    return Wallet(ledger, teacher), Wallet(ledger, judge)


# --------------------------------------------------------------------- asking


async def _fill(config: Config, questions: Sequence[Question], cache: ReplyCache, urls: Sequence[str], folder: Path) -> Outcome:
    """Ask everything and write the rows to `folder`."""
    wallets = _wallets(config, cache)
    may_miss = int(config.synthesis.max_missing * len(questions) * _replies_a_question(config))
    async with AsyncExitStack() as stack:
        clients = []
        for endpoint, url, wallet, group in zip(_endpoints(config), urls, wallets, ("teacher", "synthesis.llm_judge"), strict=False):
            clients.append(Client(endpoint, url, identity(endpoint, config), cache, wallet, may_miss=may_miss, group=group))
            stack.push_async_callback(clients[-1].close)
        if config.teacher.mode == "live":
            tally, stopped = await _pass(config, questions, clients, folder)
            outcome = Outcome(tally, 0, 0.0, stopped)
        else:
            outcome = await _in_batches(config, questions, clients, cache, wallets[0], folder)
        bought, usd = sum(c.counts["bought"] for c in clients), sum(c.usd for c in clients)
        return replace(outcome, bought=outcome.bought + bought, usd=outcome.usd + usd)


async def _in_batches(
    config: Config, questions: Sequence[Question], clients: Sequence[Client], cache: ReplyCache, wallet: Wallet, folder: Path
) -> Outcome:
    """Passes with the cache alone, and a batch of what each lacks, until nothing is missing or the budget is spent."""
    with tempfile.TemporaryDirectory() as requests:
        desk = Desk(clients[0], cache, wallet, config.teacher.batch, Path(requests))
        await desk.collect()
        while True:
            tally, stopped = await _pass(config, questions, clients, folder, desk.find)
            if stopped or not tally.incomplete:
                return Outcome(tally, desk.bought, desk.usd, stopped)
            if not await desk.buy():
                return Outcome(tally, desk.bought, desk.usd, BUDGET)


async def _pass(
    config: Config, questions: Sequence[Question], clients: Sequence[Client], folder: Path, find: Find | None = None
) -> tuple[Tally, str | None]:
    total = len(questions) * len(config.synthesis.perspectives)
    with (
        (folder / "rationales.jsonl").open("w", encoding="utf-8") as rationales,
        (folder / "mistakes.jsonl").open("w", encoding="utf-8") as mistaken,
        (folder / "questions.jsonl").open("w", encoding="utf-8") as asked,
        bar("synthesize", total, "views") as progress,
    ):
        rows = Rows(rationales, mistaken, asked)
        asking = Asking(config, clients, rows, progress, find)
        await asking.run(questions)
    return rows.tally, asking.stopped


# ------------------------------------------------------------------ the result


def _check(outcome: Outcome, config: Config) -> None:
    """Whether what came is fit to be the stage's output."""
    if outcome.stopped == INTERRUPTED:
        raise KeyboardInterrupt
    tally = outcome.tally
    if outcome.stopped == BUDGET and not tally.questions:
        raise TeacherError(
            "teacher.budget is spent before one question is complete", do="raise teacher.budget: all replies so far are kept"
        )
    missing, wanted = tally.used["unanswered"], tally.questions * _replies_a_question(config)
    if missing > config.synthesis.max_missing * wanted:
        raise PassingError(
            f"{missing} of {wanted} requests got no reply after {config.teacher.retries} retries; all others are kept",
            do="run again: only these are asked; or allow some to be missing with synthesis.max_missing",
        )


def _replies_a_question(config: Config) -> int:
    return len(config.synthesis.perspectives) + config.synthesis.mistakes


def _usd(tally: Tally, config: Config) -> float:
    """What these replies cost at the prices of the settings, whenever they were bought."""
    teacher, judge = _prices(config)
    own = tally.used["prompt_tokens"] * teacher.input + tally.used["completion_tokens"] * teacher.output
    theirs = tally.used["judge_prompt_tokens"] * judge.input + tally.used["judge_completion_tokens"] * judge.output
    return (own + theirs) / 1e6


def _counts(tally: Tally, config: Config) -> dict[str, Any]:
    return {
        "questions": tally.questions,
        "incomplete_questions": tally.incomplete,
        "accepted": sum(counts["accepted"] for counts in tally.by_perspective.values()),
        "by_perspective": {p: dict(tally.by_perspective.get(p, Counter())) for p in config.synthesis.perspectives},
        **({"mistakes": dict(tally.mistakes)} if config.synthesis.mistakes else {}),
        "used": dict(tally.used),
        "usd": round(_usd(tally, config), 6),
    }


def _settings(config: Config) -> dict[str, Any]:
    """The settings that the output depends on; how fast and how patiently it was asked is left out."""
    keys = {"model", "temperature", "top_p", "seed", "max_tokens", "max_tokens_key", "extra"}
    teacher, judge = config.teacher, config.synthesis.llm_judge
    settings: dict[str, Any] = {
        "teacher": teacher.model_dump(mode="json", include=keys) | {"endpoint": identity(teacher, config)},
        "synthesis": config.synthesis.model_dump(mode="json", exclude={"max_missing", "llm_judge"}),
        "prompts": prompts_digest(),
    }
    if config.synthesis.mistakes:
        settings["mistakes"] = {"prompt": outputs.digest_json(mistakes.SYSTEM)}
    if config.synthesis.judge == "llm":
        own = judge.model_dump(mode="json", include={*keys, "min_steps", "min_fidelity"})
        settings["llm_judge"] = own | {"endpoint": identity(judge, config), "prompt": outputs.digest_json(llm_judge.SYSTEM)}
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
    source = "the embedded teacher" if config.teacher.base_url == "embedded" else shown(config.teacher.base_url)
    cost = f" for ${outcome.usd:.4f}" if outcome.usd else ""
    wrong = f", {tally.mistakes['accepted']} of {tally.mistakes['replies']} mistakes usable" if config.synthesis.mistakes else ""
    console.print(
        f"synthesize: {tally.questions} questions{wrong}; {outcome.bought} calls to {source}{cost}, all other replies from the cache",
        soft_wrap=True,
    )
    if outcome.stopped == BUDGET:
        left = f"{tally.incomplete} questions are left out"
        console.print(f"the budget is spent: {left}; raise teacher.budget and run again to go on", style="bold yellow", soft_wrap=True)


def _track(outcome: Outcome, config: Config, workspace: Workspace) -> None:
    """A run `synthesize` in MLflow: what was bought, and the table. A run that bought nothing new is tracked already."""
    from mind import registry, tracking

    manifest = outputs.read_manifest(workspace.rationales)
    fingerprint = outputs.digest_json(manifest)
    # an experiment of its own: in the other one a run is a variant, and the page that compares them stays a table of students
    settings = config.tracking.model_copy(update={"experiment": f"{config.tracking.experiment}-synthesis"})
    if not outcome.bought and registry.find_run(workspace, settings, fingerprint):
        return
    params = flatten(manifest["config"])
    with tracking.open_run(
        workspace, settings, name="synthesize", fingerprint=fingerprint, tags={"mind.stage": "synthesize"}, params=params
    ) as run:
        run.log(_metrics(outcome, manifest["counts"]), step=0)
        run.artifact(workspace.rationales / outputs.MANIFEST)


def _metrics(outcome: Outcome, counts: Mapping[str, Any]) -> dict[str, float]:
    """`synthesis/...`: what this process bought, what all rows cost, and every count of every perspective and of the mistakes."""
    metrics = {"bought/calls": outcome.bought, "bought/usd": outcome.usd}
    metrics |= {name: counts[name] for name in ("questions", "incomplete_questions", "accepted", "usd")}
    metrics |= {f"used/{name}": count for name, count in counts["used"].items()}
    groups = counts["by_perspective"] | ({"mistakes": counts["mistakes"]} if "mistakes" in counts else {})
    for group, own in groups.items():
        metrics |= {f"{group}/{name}": count for name, count in own.items()}
    return {f"synthesis/{name}": float(value) for name, value in metrics.items()}
