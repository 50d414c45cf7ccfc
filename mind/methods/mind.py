"""MIND: capability-aware distillation from several perspectives (arXiv 2601.03717; method, sections 2-4).

For each question: the student's losses of its views pass the inertia filter; MetaNet learns to predict their order; its scores select
the views and weigh them; the student learns from those, and to agree with itself on the answer.

Letters: N questions of the dataset, Q of a batch, K perspectives, H width of the student, A answer positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mind import config, progress
from mind.encoder import load_encoder
from mind.errors import MindError
from mind.methods.base import Method, Setup, Terms
from mind.methods.features import Features
from mind.methods.inertia import Inertia
from mind.methods.metanet import MetaNet
from mind.records import PERSPECTIVES
from mind.training.layout import Encoded, Forward, Outputs
from mind.training.losses import listnet_kl, masked_log_softmax, pairwise_consistency
from mind.training.peers import Peers

WHOLE_PASS_SHARE = 0.5
"""Below this share of selected tokens, a forward pass without gradient over all views plus one with gradient over the selected ones
costs less than one with gradient over all (a backward pass through frozen weights costs about a forward pass)."""

PORTION = 1024
"""Questions whose features are in memory at a time."""


def select_views(scores: Tensor, present: Tensor, beta: float) -> Tensor:
    """I_dyn = { k : s_k >= beta * max(s) } among the views present: (Q, K), (Q, K) -> (Q, K) bool; never empty."""
    best = scores.masked_fill(~present, float("-inf")).max(dim=1, keepdim=True).values
    return present & (scores >= beta * best)


def view_weights(scores: Tensor, selected: Tensor, tau: float) -> Tensor:
    """alpha = softmax of s_k / tau over the selected views, 0 elsewhere: (Q, K), (Q, K) -> (Q, K). No gradient into MetaNet from here."""
    return masked_log_softmax(scores.detach() / tau, selected).exp().masked_fill(~selected, 0.0)


class Memory:
    """What is known of every view from its last run: filtered and instant loss, features, and how often its question was visited."""

    def __init__(self, setup: Setup, width: int, options: config.Mind) -> None:
        questions, views = setup.questions, len(PERSPECTIVES)
        self.feedback = options.feedback
        self.own_features = options.metanet.features == "student"
        self.inertia = Inertia(questions, views, options.inertia)
        self.instant = torch.full((questions, views), float("nan"))
        self.features = Features(questions, views, width, setup.folder, setup.peers)
        self.visits = torch.zeros(questions, dtype=torch.long)
        self.changed: set[int] = set()  # questions that other processes have not heard of yet

    def take_in(self, questions: Sequence[Encoded], names: Sequence[Sequence[str]], outputs: Outputs) -> None:
        """Remember a pass over these views of these questions."""
        rows = torch.tensor([question.index for question in questions])
        losses = torch.zeros(len(rows), len(PERSPECTIVES))
        seen = torch.zeros_like(losses, dtype=torch.bool)
        places = [(q, PERSPECTIVES.index(name)) for q, own in enumerate(names) for name in own]
        q, k = torch.tensor(places).unbind(dim=1)
        signal = (outputs.ce() if self.feedback == "target" else outputs.answer_ce).detach().cpu()
        if not signal.isfinite().all():  # a NaN would stand for a view that the question does not have
            place = int((~signal.isfinite()).nonzero()[0])
            row, view = places[place]
            raise MindError(
                f"the student's loss on view '{PERSPECTIVES[view]}' of question '{questions[row].id}' is no finite number",
                wanted="a finite number",
                do="lower training.learning_rate and run again; before the first step: student.dtype: float32, or look into that rationale",
            )
        losses[q, k], seen[q, k] = signal, True
        self.changed.update(rows.tolist())
        self.inertia.update(rows, losses, seen)
        self.instant[rows] = torch.where(seen, losses, self.instant[rows])
        if self.own_features:
            views = iter(outputs.view_features.cpu())
            for question, own, features in zip(questions, names, outputs.prompt_features.cpu(), strict=True):
                self.describe(question.index, features, {name: next(views) for name in own})

    def describe(self, row: int, question: Tensor, views: Mapping[str, Tensor]) -> None:
        """Features of a question (H,) and of some of its views (H,) each."""
        self.features.put(row, question, {PERSPECTIVES.index(name): features for name, features in views.items()})

    def exchange(self, peers: Peers) -> None:
        """Every process learns what the others have seen since the last time."""
        rows = torch.tensor(sorted(self.changed), dtype=torch.long)
        self.changed.clear()
        if peers.count > 1:
            own = {name: value[rows] for name, value in self._losses().items()}
            features = self.features.changes(rows.tolist())
            for theirs, values, described in peers.gather((rows, own, features)):
                for name, value in self._losses().items():
                    value[theirs] = values[name]
                self.features.adopt(described)

    def _losses(self) -> dict[str, Tensor]:
        return {"filtered": self.inertia.filtered, "instant": self.instant, "visits": self.visits}

    def state_dict(self) -> dict[str, Any]:
        return {**self._losses(), "features": self.features.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inertia.filtered, self.instant, self.visits = (state[name] for name in self._losses())
        self.features.load_state_dict(state["features"])


@dataclass(frozen=True)
class Choice:
    """What MetaNet says of a batch: scores, the views selected, their weights (all (Q, K), CPU), and its own loss (Q,)."""

    scores: Tensor
    selected: Tensor
    alpha: Tensor
    loss: Tensor

    def names(self, row: int) -> list[str]:
        return [PERSPECTIVES[k] for k in self.selected[row].nonzero().flatten().tolist()]


class Mind(Method):
    """The whole method; `refresh` R > 1 runs all views of a question at every R-th visit only (the warm-up pass is visit 0)."""

    caption = (
        "MIND: capability-aware multi-perspective distillation (arXiv 2601.03717). MetaNet's feedback is the loss on the answer given the "
        "rationale where `feedback: answer`; the paper's is the loss on the whole text (`target`)."
    )
    options: config.Mind

    def __init__(self, options: config.Mind, setup: Setup) -> None:
        super().__init__(options, setup)
        net = options.metanet
        self.encoder = load_encoder(net.encoder) if net.features == "sbert" else None
        width = self.encoder.width if self.encoder else setup.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setup.seed)
            self.net = MetaNet(width, len(PERSPECTIVES), width=net.width, heads=net.heads, self_attention=options.self_attention)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=net.learning_rate)
        self.memory = Memory(setup, width, options)
        self.setup = setup
        self.pending = 0  # questions whose gradient MetaNet has gathered since its last step
        self.student_steps = 0
        self.share = 1.0  # of the tokens that the selected views had lately

    @classmethod
    def encoding(cls, options: config.Mind, seed: int) -> Mapping[str, Any]:
        return {"views": list(PERSPECTIVES)}  # as without_fusion on all views

    # ---- warm-up: only MetaNet learns, on the untouched student's losses

    def prepare(self, questions: Sequence[Encoded], forward: Forward) -> None:
        size, own = self.setup.batch_questions, self.setup.peers.share(questions)
        self.memory.features.clear()
        with progress.bar("warm-up", len(own), "questions") as bar:
            for start in range(0, len(own), size):
                batch = list(own[start : start + size])
                self._look(batch, forward, gradient=False)
                self._describe(batch)
                bar.advance(len(batch))
        self.memory.features.begin()
        self.memory.exchange(self.setup.peers)
        rows = (~self.memory.inertia.filtered.isnan()).any(dim=1).nonzero().flatten()  # all questions that are trained on
        self.memory.visits[rows] = 1
        self.net.standardise(lambda: (self._features(part) for part in rows.split(PORTION)))
        self._warm_up(rows)

    def _describe(self, questions: Sequence[Encoded]) -> None:
        """Features of a frozen sentence encoder, where these are wanted: made once, they never change."""
        if self.encoder:
            for question in questions:
                example = self.setup.examples[question.index]
                first, *others = self.encoder.encode([example.question, *example.views.values()])
                self.memory.describe(question.index, first, dict(zip(example.views, others, strict=True)))

    def _warm_up(self, rows: Tensor) -> None:
        """Epochs over the remembered features and losses, with as many questions to a step as in joint training."""
        net = self.options.metanet
        optimizer = torch.optim.Adam(self.net.parameters(), lr=net.warmup_learning_rate)
        generator = torch.Generator().manual_seed(self.setup.seed)
        for _ in range(net.warmup_epochs):
            for batch in rows[torch.randperm(len(rows), generator=generator)].split(self.setup.step_questions * net.accumulation):
                self._score(batch)[1].mean().backward()
                optimizer.step()
                optimizer.zero_grad()

    def _features(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        present = ~self.memory.inertia.filtered[rows].isnan()
        return *self.memory.features.rows(rows), present

    def _score(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """MetaNet's scores (Q, K) and its loss (Q,) against the filtered losses, both with gradient."""
        questions, views, present = self._features(rows)
        scores = self.net(questions, views, present)
        losses = self.memory.inertia.filtered[rows].nan_to_num()
        return scores, listnet_kl(scores, losses, present, self.options.tau)

    # ---- joint training

    def loss(self, questions: Sequence[Encoded], forward: Forward) -> Terms:
        due = [question for question in questions if self.memory.visits[question.index] % self.options.refresh == 0]
        # all views are run with gradient at once where most of them will be selected anyway
        whole = len(due) == len(questions) and self.share > WHOLE_PASS_SHARE
        seen = self._look(due, forward, gradient=whole) if due else None
        choice = self._choose(questions)
        names = [choice.names(row) for row in range(len(questions))]
        if whole and seen is not None:
            outputs, picked = seen, _places(questions, names)
        else:
            outputs = forward([question.group(own) for question, own in zip(questions, names, strict=True)])
            picked = list(range(sum(map(len, names))))
            self._take_in_undue(questions, names, outputs, due)
        self.memory.visits[[question.index for question in questions]] += 1
        return self._terms(questions, names, choice, outputs, picked)

    def _look(self, due: Sequence[Encoded], forward: Forward, *, gradient: bool) -> Outputs:
        answers_only = not gradient and self.options.feedback == "answer"
        with torch.set_grad_enabled(gradient):
            outputs = forward([question.group() for question in due], answers_only=answers_only)
        self.memory.take_in(due, [list(question.views) for question in due], outputs)
        return outputs

    def _take_in_undue(self, questions: Sequence[Encoded], names: list[list[str]], outputs: Outputs, due: Sequence[Encoded]) -> None:
        """What the selected views' pass says of questions that were not looked at; of the others it is known already."""
        looked = {question.index for question in due}
        groups = [row for row, question in enumerate(questions) if question.index not in looked]
        owners = [row for row, own in enumerate(names) for _ in own]
        if groups:
            part = outputs.part(groups, [view for view, row in enumerate(owners) if row in groups])
            self.memory.take_in([questions[row] for row in groups], [names[row] for row in groups], part)

    def _choose(self, questions: Sequence[Encoded]) -> Choice:
        """Score the views, gather MetaNet's gradient, select and weigh."""
        rows = torch.tensor([question.index for question in questions])
        scores, loss = self._score(rows)
        loss.sum().backward()
        self.pending += len(rows)
        present = ~self.memory.inertia.filtered[rows].isnan()
        selected = select_views(scores.detach(), present, self.options.beta)
        return Choice(scores.detach(), selected, view_weights(scores, selected, self.options.tau_student), loss.detach())

    def _terms(self, questions: Sequence[Encoded], names: list[list[str]], choice: Choice, outputs: Outputs, picked: list[int]) -> Terms:
        """`picked`: the places in `outputs` of the selected views, question after question."""
        ce = outputs.ce()[picked]  # (selected views of all questions,)
        sft, consistency, start = [], [], 0
        for row, own in enumerate(names):
            alpha = choice.alpha[row][choice.selected[row]].to(ce.device)
            sft.append((alpha * ce[start : start + len(own)]).sum())
            consistency.append(self._consistency(outputs, picked[start : start + len(own)], alpha))
            start += len(own)
        self._watch_share(questions, names)
        total = torch.stack(sft).sum() + self.options.consistency * torch.stack(consistency).sum()
        tokens = int(outputs.mask[picked].sum())
        return Terms(total, tokens, self._rows(questions, choice, sft, consistency))

    def _consistency(self, outputs: Outputs, views: list[int], alpha: Tensor) -> Tensor:
        if self.options.consistency == 0 or len(views) < 2:
            return alpha.new_zeros(())
        return pairwise_consistency(outputs.answer_logprobs(views), alpha)

    def _watch_share(self, questions: Sequence[Encoded], names: list[list[str]]) -> None:
        selected = sum(_packed_tokens(question, own) for question, own in zip(questions, names, strict=True))
        whole = sum(_packed_tokens(question, list(question.views)) for question in questions)
        self.share = 0.9 * self.share + 0.1 * selected / whole

    def _rows(self, questions: Sequence[Encoded], choice: Choice, sft: list[Tensor], consistency: list[Tensor]) -> list[dict[str, float]]:
        """The metrics of each question: losses, and MetaNet's view of every perspective present."""
        sfts, jsds = torch.stack(sft).tolist(), torch.stack(consistency).tolist()
        rows = []
        for row, question in enumerate(questions):
            values = {
                "train/loss": sfts[row] + self.options.consistency * jsds[row],
                "train/sft": sfts[row],
                "train/consistency": jsds[row],
                "metanet/loss": float(choice.loss[row]),
                "metanet/selected": float(choice.selected[row].sum()),
            }
            for name in question.views:
                k = PERSPECTIVES.index(name)
                values[f"metanet/weight/{name}"] = float(choice.alpha[row, k])
                values[f"metanet/score/{name}"] = float(choice.scores[row, k])
                values[f"inertia/filtered/{name}"] = float(self.memory.inertia.filtered[question.index, k])
                values[f"inertia/instant/{name}"] = float(self.memory.instant[question.index, k])
            rows.append(values)
        return rows

    def after_step(self) -> None:
        """MetaNet steps once in `accumulation` steps of the student."""
        self.student_steps += 1
        self.memory.exchange(self.setup.peers)
        if self.student_steps % self.options.metanet.accumulation:
            return
        self._bring_together()
        if not self.pending:
            return
        for gradient in self._gradients():
            gradient /= self.pending
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.pending = 0

    def _bring_together(self) -> None:
        """MetaNet's gradient, and of how many questions it is, become those of all processes."""
        self.setup.peers.sum(self._gradients())
        self.pending = sum(self.setup.peers.gather(self.pending))

    def _leave_to_first(self) -> None:
        """What was brought together counts once."""
        if not self.setup.peers.first:
            self.optimizer.zero_grad()
            self.pending = 0

    def _gradients(self) -> list[Tensor]:
        for parameter in self.net.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.net.parameters() if parameter.grad is not None]

    # ---- resume

    def saved(self) -> None:
        self.memory.features.saved()

    def state_dict(self) -> dict[str, Any]:
        self._bring_together()
        state = {
            "net": self.net.state_dict(),
            "gradients": {name: p.grad for name, p in self.net.named_parameters() if p.grad is not None},
            "optimizer": self.optimizer.state_dict(),
            "memory": self.memory.state_dict(),
            "counters": [self.pending, self.student_steps, self.share],
        }
        self._leave_to_first()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.memory.load_state_dict(state["memory"])
        self.pending, self.student_steps, self.share = state["counters"]
        for name, parameter in self.net.named_parameters():
            parameter.grad = state["gradients"].get(name)
        self._leave_to_first()


def _places(questions: Sequence[Encoded], names: Sequence[Sequence[str]]) -> list[int]:
    """Where these views stand in a pass over all views of all questions."""
    places, start = [], 0
    for question, own in zip(questions, names, strict=True):
        order = list(question.views)
        places += [start + order.index(name) for name in own]
        start += len(order)
    return places


def _packed_tokens(question: Encoded, names: Sequence[str]) -> int:
    return len(question.prompt) + sum(len(question.views[name].ids) for name in names)
