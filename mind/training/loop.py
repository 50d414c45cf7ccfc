"""The one training loop, for all methods: examples in, a trained student and its history out. Called by stages.distill.

A step: `questions_per_step` x `accumulation` questions, one optimizer step. The state after a step, with the seed, decides all that
follows, so a resumed run takes the same course as an uninterrupted one (bit for bit on a CPU).
"""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mind import config, progress
from mind.errors import MindError
from mind.methods.base import Method, Setup
from mind.records import Example
from mind.students.loading import ADAPTER, LoadedStudent, add_adapter, put_adapter, read_adapter
from mind.training import checkpoint
from mind.training.adapter import fuse
from mind.training.corpus import Corpus, encode_all, encode_to, open_corpus, token_limit
from mind.training.layout import LAYOUTS, Encoded, Group, Outputs
from mind.training.peers import Peers

SAME_SIGNAL_SECONDS = 1.0
"""A terminal sends Ctrl-C to all processes at once, and a launcher sends it on: that is one."""

Log = Callable[[Mapping[str, float], int], None]
"""log(values, step): where metrics go while training runs."""


@dataclass(frozen=True)
class Trained:
    """What a run leaves beside the weights; all of it but `seconds` is the same in equal runs."""

    history: list[dict[str, float]]
    steps: int
    tokens: int  # supervised tokens learnt from, over all epochs
    questions: int
    views: int
    left_out: dict[str, int]  # "views", "questions": too long, or without a view for this method
    seconds: float = field(compare=False)  # of all the processes that took part, loading and waiting not counted


def train(
    student: LoadedStudent,
    settings: config.Resolved,
    examples: Sequence[Example],
    build: Callable[[Any, Setup], Method],
    *,
    log: Log = lambda values, step: None,
    checkpoints: Path | None = None,
    start: Path | None = None,
    encoded: Path | None = None,
) -> Trained:
    """Train `student` in place; tuned by LoRA, its model becomes a PEFT model.

    Args:
        build: options and setup -> method; see methods.table.
        start: the folder of an earlier training whose adapter goes on learning; None: a fresh one (full tuning: `student` is that student).
        encoded: a folder for the tokenised questions, named by all that decides them; None keeps them in memory.
        checkpoints: a folder for the state of this run and no other; None keeps no state.

    Raises:
        DataError: no question to train on, or one that is too long.
        MindError: the loss is no longer a number, or a checkpoint cannot be written.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the state was saved before.
    """
    torch.manual_seed(settings.seed)
    where, peers = device(), Peers.here()
    student.model = make_tunable(student.model, settings.student, settings.training).to(where)
    if start is not None and (start / ADAPTER).is_dir():
        put_adapter(student.model, read_adapter(start))
    options = settings.training
    setup = Setup(
        questions=len(examples),
        width=student.model.config.hidden_size,
        batch_questions=options.questions_per_step,
        step_questions=options.questions_per_step * options.accumulation,
        seed=settings.seed,
        peers=peers,
        examples=examples,
        folder=checkpoints,
    )
    method = build(settings.method, setup)
    work = student.tokenizer, method, examples, token_limit(student.model, options), options.too_long
    if encoded and peers.first:
        encode_to(encoded, *work)
    peers.gather(None)  # nobody reads before it is written
    corpus = open_corpus(encoded, method) if encoded else encode_all(*work)
    run = _Run(where, peers, student.model, method, corpus, settings)
    run.begin(checkpoints)
    with progress.bar(f"distill {settings.name}", *((options.tokens, "tokens") if options.tokens else (run.total, "steps"))) as bar:
        run.go(bar, log, checkpoints)
    return Trained(run.history, run.step, run.tokens, len(corpus.questions), corpus.summary.views, corpus.left_out, run.seconds)


def device() -> torch.device:
    """Where students train: of this process, as Accelerate finds it."""
    return Accelerator().device


def make_tunable(model: Any, student: config.Student, training: config.Training) -> Any:
    """The model with what is to be learnt marked: LoRA adapters, or all weights (then kept in float32)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # names of transformers 5 that PEFT 0.21 uses too, and that leave in version 6
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if student.tuning == "full":
            return model.float().requires_grad_(True)
        adapted = add_adapter(model, student.lora)
        fuse(adapted)
        return adapted


# ---------------------------------------------------------------------- run


class _Run:
    """The state of one training run and how it moves on."""

    def __init__(self, device: torch.device, peers: Peers, model: Any, method: Method, corpus: Corpus, settings: config.Resolved) -> None:
        self.peers, self.model, self.method, self.questions, self.summary = peers, model, method, corpus.questions, corpus.summary
        self.options, self.seed = settings.training, settings.seed
        self.step_questions = self.options.questions_per_step * self.options.accumulation
        self.per_epoch = math.ceil(len(self.questions) / self.step_questions)
        self.order: tuple[int, Sequence[int]] = (-1, ())  # an epoch, and which question it visits when
        self.total = self.per_epoch * self.options.epochs
        self.unit = self._unit()
        self.learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
        fused = device.type in ("cpu", "cuda")  # hundreds of small matrices: one kernel in place of eight for each
        learning_rate, decay = self.options.learning_rate, self.options.weight_decay
        self.optimizer = torch.optim.AdamW(self.learnt.values(), lr=learning_rate, weight_decay=decay, fused=fused)
        mixed = settings.student.dtype == "bfloat16" and settings.student.tuning == "full"
        self.precision = partial(torch.autocast, device.type, torch.bfloat16) if mixed else nullcontext
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.meter = Meter()

    @property
    def done(self) -> float:
        """Share of the run that lies behind; at 1 it is over."""
        return self.tokens / self.options.tokens if self.options.tokens else self.step / self.total

    def _counted(self) -> int:
        """What the progress bar counts."""
        return min(self.tokens, self.options.tokens) if self.options.tokens else self.step

    def _unit(self) -> float:
        """Share of the run that a step takes; for a budget of tokens, at most."""
        if not self.options.tokens:
            return 1 / self.total
        return min(1.0, self.step_questions * self.summary.tokens / len(self.questions) / self.options.tokens)

    def forward(self, groups: Sequence[Group], *, answers_only: bool = False) -> Outputs:
        with self.precision():
            return LAYOUTS[self.options.layout](self.model, groups, answers_only=answers_only)

    def begin(self, checkpoints: Path | None) -> None:
        """From the newest checkpoint, or from the start: then the method prepares itself on the untouched student."""
        state = checkpoint.load(checkpoints) if checkpoints else None
        if state:
            self.load_state_dict(state)
            return
        started = time.monotonic()
        self.model.eval()
        untouched = getattr(self.model, "disable_adapter", nullcontext)  # PEFT's; saves its products
        with untouched():
            self.method.prepare(self.questions, torch.no_grad()(self.forward))
        self.seconds = time.monotonic() - started
        self._save(checkpoints)

    def go(self, bar: progress.Bar, log: Log, checkpoints: Path | None) -> None:
        """To the end, or to the step in which Ctrl-C came."""
        bar.resume(self._counted())
        started, tokens = time.monotonic(), self.tokens
        with interruptions() as came:
            while self.done < 1:
                before, began = self._counted(), time.monotonic()
                self._one_step()
                self.seconds += time.monotonic() - began
                if self.step % self.options.log_steps == 0 or self.done >= 1:
                    self._log(log, (self.tokens - tokens) / (time.monotonic() - started))
                    started, tokens = time.monotonic(), self.tokens
                bar.advance(self._counted() - before, self._loss())
                interrupted = any(self.peers.gather(came()))
                if interrupted or self.step % self.options.checkpoint_steps == 0:
                    self._save(checkpoints)
                if interrupted:
                    raise KeyboardInterrupt

    def _loss(self) -> str:
        """The latest of the history; a method need not measure one."""
        loss = self.history[-1].get("train/loss") if self.history else None
        return "" if loss is None else f"loss {loss:.3f}"

    def _one_step(self) -> None:
        self.model.train()
        batch = self._batch(self.step)
        own = self.peers.share(batch)
        rows, tokens = [], 0
        for start in range(0, len(own), self.options.questions_per_step):
            terms = self.method.loss(own[start : start + self.options.questions_per_step], self.forward)
            (terms.total / len(batch)).backward()
            rows += terms.rows
            tokens += terms.tokens
        for all_rows, all_tokens in self.peers.gather((rows, tokens)):
            self.meter.add(all_rows)
            self.tokens += all_tokens
        self.peers.sum(self._gradients())
        norm = torch.nn.utils.clip_grad_norm_(self.learnt.values(), self.options.max_grad_norm)
        if not math.isfinite(float(norm)):
            raise MindError(
                f"step {self.step + 1}: the gradient is {float(norm)}",
                wanted="a finite number",
                do="lower training.learning_rate and run again",
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * rate(self.done, self.unit, self.options)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.method.after_step()
        self.step += 1

    def _gradients(self) -> list[torch.Tensor]:
        """Of all that is learnt; zeros where this process had nothing to learn from."""
        for parameter in self.learnt.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.learnt.values() if parameter.grad is not None]

    def _batch(self, step: int) -> list[Encoded]:
        """The questions of a step: every epoch has its own order, which the seed alone decides."""
        epoch, place = divmod(step, self.per_epoch)
        if self.order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.order = epoch, array("q", torch.randperm(len(self.questions), generator=generator).tolist())
        own = self.order[1][place * self.step_questions : (place + 1) * self.step_questions]
        return [self.questions[i] for i in own]

    def _log(self, log: Log, tokens_per_second: float) -> None:
        values = self.meter.take()
        self.history.append({"step": self.step, **values})
        log({**values, "train/tokens_per_second": tokens_per_second}, self.step)

    def _save(self, folder: Path | None) -> None:
        if folder:
            state = {**self.state_dict(), "dice": self.peers.gather((torch.get_rng_state(), torch.cuda.get_rng_state_all()))}
            if self.peers.first:
                checkpoint.save(folder, self.step, state)
            self.peers.gather(None)  # nobody reads before it is written
            self.method.saved()

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "student": {name: p.detach() for name, p in self.learnt.items()},
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "history": self.history,
            "meter": self.meter.sums,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.learnt.items():
                parameter.copy_(state["student"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load_state_dict(state["method"])
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.history, self.meter.sums = state["history"], state["meter"]
        rng, rng_cuda = state["dice"][self.peers.rank % len(state["dice"])]
        torch.set_rng_state(rng)
        if rng_cuda:
            torch.cuda.set_rng_state_all(rng_cuda)


def rate(done: float, unit: float, options: config.Training) -> float:
    """The learning rate's factor: a linear rise over `warmup_ratio` of the run, then the schedule's fall to 0 (or none).

    Args:
        done: share of the run that lies behind.
        unit: share that one step takes; the first step has a rate above 0.
    """
    rise = options.warmup_ratio
    if done < rise:
        return (done + unit) / (rise + unit)
    if options.schedule == "constant":
        return 1.0
    fallen = min(1.0, (done - rise) / max(1 - rise, unit))
    return 1 - fallen if options.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * fallen))


@dataclass
class Meter:
    """Means of metrics since they were last taken; a metric that some questions lack counts where it is."""

    sums: dict[str, list[float]] = field(default_factory=dict)  # name -> [sum, count]

    def add(self, rows: Sequence[Mapping[str, float]]) -> None:
        for row in rows:
            for name, value in row.items():
                entry = self.sums.setdefault(name, [0.0, 0])
                entry[0] += value
                entry[1] += 1

    def take(self) -> dict[str, float]:
        means = {name: total / count for name, (total, count) in self.sums.items()}
        self.sums = {}
        return means


@contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came: the step in progress is finished first. A second one stops at once."""
    came: list[float] = []

    def note(number: int, frame: Any) -> None:
        if came and time.monotonic() - came[0] > SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt
        came.append(time.monotonic())

    watched = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, note) for number in watched}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
