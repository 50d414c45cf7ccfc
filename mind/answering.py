"""Benchmarks -> a student's answers to them, not yet graded. Called by stages.evaluate and mind.reevaluation.

Three backends: `hf` decodes here, `vllm` in vLLM's engine on this machine, `openai` asks a server that has the student. Answers are
kept in `.mind/` as they come, named by all that decides them (weights, prompts, settings), so that a killed evaluation goes on where
it stopped and no answer is generated twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from mind import config, memory, outputs
from mind.benchmarks.loading import Benchmark
from mind.config import Budget, Evaluation, Served
from mind.errors import PassingError, StudentError
from mind.methods.table import method_class
from mind.progress import Bar, bar
from mind.prompts import student_ids
from mind.records import Question, Record
from mind.students import decoding
from mind.students.loading import LoadedStudent, load_student
from mind.teacher.budget import FREE, Ledger, Wallet
from mind.teacher.cache import ReplyCache
from mind.teacher.client import Client, Unanswered, request_body
from mind.teacher.replies import Request
from mind.training.peers import ALONE, Peers
from mind.workspace import Workspace

VLLM_CHUNK = 512  # prompts a call of its engine: what a kill costs at most


class Answer(Record):
    """One answer: a row of .mind/predictions/<identity>.jsonl. `confidence` as in decoding.Completion; None of backends without."""

    id: str
    output: str
    tokens: int
    sample: int = 0
    confidence: float | None = None


class Asked(NamedTuple):
    """One answer that is wanted: which benchmark, which of its questions, which sample of it."""

    benchmark: int
    question: int
    sample: int


@dataclass
class Examinee:
    """A student to be asked. Its weights are loaded when something needs them: one that a server has need not be here.

    Args:
        method: the options of its method, which says how a question is put to it.
        folder: what `distill` left.
    """

    name: str
    method: Any
    settings: config.Student
    folder: Path

    @cached_property
    def weights(self) -> str:
        """Digest of the trained student's folder."""
        return outputs.digest_path(self.folder)

    @cached_property
    def student(self) -> LoadedStudent:
        return load_student(self.settings, self.folder, torch.accelerator.current_accelerator(check_available=True))

    @property
    def ask(self) -> Callable[[Any], str]:
        """The prompt of a question, as the student's method words it."""
        return partial(method_class(self.method.method).prompt, self.method)


def answer(
    benchmarks: Sequence[Benchmark], who: Examinee, settings: Evaluation, workspace: Workspace, seed: int, peers: Peers = ALONE
) -> list[list[list[Answer]]]:
    """`evaluation.samples` answers to every question, benchmark by benchmark: those that an earlier process kept, and the rest generated.

    Args:
        peers: the processes that share the questions; each of them gets all answers.

    Raises:
        StudentError: a student that cannot be loaded; vLLM is not installed.
        TeacherError, PassingError: the endpoint refuses, or does not answer (backend openai).
    """
    if settings.backend == "openai":
        return _ask_served(benchmarks, who, settings, workspace)
    return _generate(benchmarks, who, settings, workspace, seed, peers)


# ----------------------------------------------------------------- generated on this machine


def _generate(
    benchmarks: Sequence[Benchmark], who: Examinee, settings: Evaluation, workspace: Workspace, seed: int, peers: Peers
) -> list[list[list[Answer]]]:
    prompts = [[student_ids(who.student.tokenizer, who.ask(question)) for question in benchmark.questions] for benchmark in benchmarks]
    files = [workspace.partial_predictions(_identity(who, ids, settings, seed)) for ids in prompts]
    kept = _opened(files, peers)
    wanted = _wanted(benchmarks, settings)
    left = [one for one in wanted if (benchmarks[one.benchmark].questions[one.question].id, one.sample) not in kept[one.benchmark].answers]
    todo = peers.share(left)
    shards = f", share {peers.rank + 1} of {peers.count}" if peers.count > 1 else ""
    with bar(f"evaluate {who.name}{shards}", len(wanted) - len(left) + len(todo), "answers") as shown:
        shown.resume(shown.total - len(todo))

        def keep(place: int, done: decoding.Completion) -> None:
            b, q, sample = todo[place]
            own = benchmarks[b].questions[q].id
            kept[b].add(Answer(id=own, output=done.text, tokens=done.tokens, sample=sample, confidence=done.confidence))
            shown.advance(note=benchmarks[b].name)

        ids = [prompts[b][q] for b, q, _ in todo]
        seeds = [_seed(seed, prompts[b][q], sample) for b, q, sample in todo]
        if settings.backend == "vllm":
            _decode_with_vllm(who, ids, seeds, settings, keep)
        else:
            decoding.generate(
                who.student.model,
                who.student.tokenizer,
                ids,
                max_new_tokens=settings.max_new_tokens,
                batch_tokens=memory.portion(settings.batch_tokens),
                temperature=_temperature(settings),
                seeds=seeds,
                on_done=keep,
                on_step=shown.under_way,
            )
    if peers.count > 1:
        kept = _opened(files, peers)
    return [
        [[own.answers[question.id, sample] for sample in range(settings.samples)] for question in benchmark.questions]
        for benchmark, own in zip(benchmarks, kept, strict=True)
    ]


def _opened(files: Sequence[Path], peers: Peers) -> list[_Kept]:
    """What all processes have kept until now; the first one repairs, and the others read then."""
    peers.gather(None)
    kept = [_Kept(file) for file in files] if peers.first else []
    peers.gather(None)
    return kept or [_Kept(file) for file in files]


def _wanted(benchmarks: Sequence[Benchmark], settings: Evaluation) -> list[Asked]:
    return [
        Asked(b, q, sample)
        for b, benchmark in enumerate(benchmarks)
        for q in range(len(benchmark.questions))
        for sample in range(settings.samples)
    ]


def _temperature(settings: Evaluation) -> float:
    """One answer is the most likely one; several are drawn."""
    return settings.temperature if settings.samples > 1 else 0.0


def _seed(seed: int, prompt: Sequence[int], sample: int) -> int:
    """Of one sample of one question: other questions and the order of all have no part in it."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, prompt, sample]).encode()).digest()[:4])


def _identity(who: Examinee, prompts: list[list[int]], settings: Evaluation, seed: int) -> str:
    """Equal for equal answers: what is asked of which weights, with which code and settings. More samples keep the earlier ones."""
    drawn = [seed, settings.temperature] if settings.samples > 1 else []
    code = outputs.digest_path(Path(decoding.__file__))
    own = [] if settings.backend == "hf" else [settings.backend]
    return outputs.digest_json([who.student.identity, who.weights, prompts, settings.max_new_tokens, drawn, code, *own])


def _decode_with_vllm(
    who: Examinee, prompts: list[list[int]], seeds: list[int], settings: Evaluation, keep: Callable[[int, decoding.Completion], None]
) -> None:
    """The same through vLLM's engine, which reads the student from a folder: an adapter is merged and written to a temporary one."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise StudentError(
            f"evaluation.backend is 'vllm', which is not installed ({error})",
            wanted="vLLM, on a machine with an accelerator that it supports",
            do="pip install vllm; or evaluation.backend: hf; or serve the student elsewhere and set evaluation.backend: openai",
        ) from None
    if not prompts:
        return
    with tempfile.TemporaryDirectory() as folder:
        who.student.model.save_pretrained(folder)
        who.student.tokenizer.save_pretrained(folder)
        who.student.model.to("cpu")  # the engine wants the device's memory
        engine = LLM(model=folder, dtype=who.settings.dtype, max_model_len=max(map(len, prompts)) + settings.max_new_tokens)
        for start in range(0, len(prompts), VLLM_CHUNK):
            places = range(start, min(start + VLLM_CHUNK, len(prompts)))
            params = [SamplingParams(temperature=_temperature(settings), max_tokens=settings.max_new_tokens, seed=seeds[p]) for p in places]
            found = engine.generate([{"prompt_token_ids": prompts[p]} for p in places], params, use_tqdm=False)
            for place, one in zip(places, found, strict=True):
                keep(place, decoding.Completion(decoding.until_answered(one.outputs[0].text), len(one.outputs[0].token_ids)))


class _Kept:
    """Answers of one student to one benchmark, written as they come. A torn or damaged line is dropped, and its question asked again."""

    def __init__(self, path: Path) -> None:
        self.path = path.with_suffix(".jsonl")
        self.answers: dict[tuple[str, int], Answer] = {}  # by question and sample
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        whole = [line for line in lines if self._read(line)]
        if len(whole) < len(lines):
            repaired = self.path.with_suffix(".repaired")
            repaired.write_bytes(b"".join(whole))
            repaired.replace(self.path)

    def _read(self, line: bytes) -> bool:
        """Take in one line; False when it is torn (no newline) or damaged."""
        try:
            found = Answer.model_validate_json(line if line.endswith(b"\n") else b"")
        except ValidationError:
            return False
        self.answers[found.id, found.sample] = found
        return True

    def add(self, new: Answer) -> None:
        self.answers[new.id, new.sample] = new
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:  # one write a line: other processes may append too
            file.write(f"{new.model_dump_json()}\n".encode())


# ----------------------------------------------------------------- asked of a server


def _ask_served(benchmarks: Sequence[Benchmark], who: Examinee, settings: Evaluation, workspace: Workspace) -> list[list[list[Answer]]]:
    """Through the teacher's client: its limits, retries and cache, in a file of their own, since a teacher's budget counts its file."""
    assert settings.endpoint is not None, "config.Evaluation refuses the backend openai without an endpoint"
    endpoint = settings.endpoint.asked(who.name, _temperature(settings), settings.max_new_tokens)
    wanted = _wanted(benchmarks, settings)
    with ReplyCache(workspace.caches / "answers.sqlite") as cache, bar(f"evaluate {who.name}", len(wanted), "answers") as shown:
        answers = asyncio.run(_ask_all(wanted, benchmarks, who, endpoint, cache, shown))
    rows = iter(answers)
    return [[[next(rows) for _ in range(settings.samples)] for _ in benchmark.questions] for benchmark in benchmarks]


async def _ask_all(
    wanted: Sequence[Asked], benchmarks: Sequence[Benchmark], who: Examinee, endpoint: Served, cache: ReplyCache, shown: Bar
) -> list[Answer]:
    # the weights are part of every key: a student that was trained again and is served under the same name is asked again
    client = Client(
        endpoint,
        endpoint.base_url,
        f"{endpoint.base_url}#{who.weights}",
        cache,
        Wallet(Ledger(cache, Budget()), FREE),
        group="evaluation.endpoint",
    )

    async def one(asked: Asked) -> Answer:
        question: Question = benchmarks[asked.benchmark].questions[asked.question]
        body = request_body(endpoint, [{"role": "user", "content": who.ask(question)}], endpoint.max_tokens, asked.sample)
        reply = await client.ask(Request(body, asked.sample))
        shown.advance(note=benchmarks[asked.benchmark].name)
        return Answer(id=question.id, output=decoding.until_answered(reply.visible()), tokens=reply.completion_tokens, sample=asked.sample)

    tasks = [asyncio.ensure_future(one(asked)) for asked in wanted]
    try:
        return list(await asyncio.gather(*tasks))
    except Unanswered as error:
        raise PassingError(f"evaluation.endpoint: {error}", do="run again: all answers so far are kept") from None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.close()
