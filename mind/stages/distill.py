"""dataset/ -> students/V: the student trained by the method of variant V; for `base` only a manifest that names the weights.

A killed run goes on from its checkpoint in `.mind/checkpoints`, in the same MLflow run: both are named by the run's fingerprint.
What several variants share of their training (the experts of `mode`, the first stage of `edit`) is done once, in `.mind/trained`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock

from mind import __version__, memory, outputs, tracking
from mind.config import Config, Resolved, flatten
from mind.methods import table
from mind.methods.base import Mixture, Stage
from mind.params import load_config
from mind.progress import console
from mind.records import Example, Rows
from mind.students.loading import MODEL, LoadedStudent, find_student, load_student, save_student
from mind.training.loop import Log, Trained, device, train
from mind.training.peers import Peers, launch, launched
from mind.versioning import version_of
from mind.workspace import Workspace

CODE = ("config.py", "methods", "prompts.py", "records.py", "students", "training")
TRAINED, HISTORY = "trained.json", "history.jsonl"


def run(config: Config, workspace: Workspace, variant: str | None) -> None:
    """Write students/V and its run.

    Raises:
        ConfigError, DataError: an unknown variant; the dataset is missing, malformed or has a question that is too long.
        StudentError: a student that cannot be loaded.
        PassingError: the hub or the tracking server does not answer.
        KeyboardInterrupt: stopped; the next call goes on.
    """
    assert variant is not None, "distill runs once a variant"
    settings = config.variant(variant)
    if settings.method.method == "base":
        _keep_base(config, workspace, settings)
        return
    if settings.training.processes > 1 and not launched():
        launch(settings.training.processes, "-m", "mind.stages", "distill", "--variant", variant)
        return
    outputs.read_manifest(workspace.dataset)
    examples = Rows(workspace.dataset / "train.jsonl", Example)
    dataset = version_of(workspace.dataset)
    _, identity = find_student(settings.student)
    resolved = settings.model_dump(mode="json")
    fingerprint = outputs.digest_json({"config": resolved, "dataset": dataset, "student": identity, "mind": __version__})
    folder = workspace.student(variant)
    making = _Making(settings, examples, {"dataset": dataset, "student": identity, "mind": __version__}, workspace, Peers.here())
    if not making.peers.first:
        making.follow()
        return
    with _tracked(config, workspace, settings, identity, fingerprint, dataset) as tracked:
        making.log = tracked.log
        with outputs.stage_output(folder) as partial:
            making.make(partial)
            inputs = {"dataset": dataset, "student": identity}
            outputs.write_manifest(
                partial, stage="distill", inputs=inputs, config=resolved, counts=making.counts(), fingerprint=fingerprint
            )
        tracked.log({"train/seconds": making.seconds}, step=making.steps)
        address = tracked.register(folder, f"mind-{Path(settings.student.name).name}", _alias(config, workspace, settings))
    making.clear()
    _say(settings, making, address)


def _alias(config: Config, workspace: Workspace, settings: Resolved) -> str:
    """What the student is registered as: its variant, or where --set made it another one than params.yaml describes, VARIANT--WORKSPACE."""
    if workspace.root == workspace.home:
        return settings.name
    own, variant = load_config(Workspace(workspace.home).params), settings.repeats or settings.name
    named = {"name", "repeats", *(["seed"] if settings.repeats else [])}  # a repetition says its seed in its name
    alike = variant in own.variants and own.variant(variant).model_dump(exclude=named) == settings.model_dump(exclude=named)
    made = ("teacher", "synthesis", "snapshot")
    alike = alike and all(getattr(own, group) == getattr(config, group) for group in made)
    return settings.name if alike else f"{settings.name}--{workspace.root.name}"


def _keep_base(config: Config, workspace: Workspace, settings: Resolved) -> None:
    """The untouched student: nothing of the dataset is in its manifest, so its evaluation outlives every new dataset."""
    _, identity = find_student(settings.student)
    own = {
        "name": settings.name,
        "method": {"method": "base"},
        "student": settings.student.model_dump(include={"name", "revision", "dtype"}),
    }
    fingerprint = outputs.digest_json({"config": own, "student": identity, "mind": __version__})
    with (
        _tracked(config, workspace, settings, identity, fingerprint, None),
        outputs.stage_output(workspace.student(settings.name)) as folder,
    ):
        outputs.write_manifest(folder, stage="distill", inputs={"student": identity}, config=own, counts={}, fingerprint=fingerprint)
    console.print(f"distill {settings.name}: the untouched student, {identity}")


def _tracked(config: Config, workspace: Workspace, settings: Resolved, identity: str, fingerprint: str, dataset: str | None) -> Any:
    tags = {"mind.method": settings.method.method, "mind.student": identity}
    params = flatten(settings.model_dump(mode="json"))
    return tracking.open_run(
        workspace, config.tracking, name=settings.name, fingerprint=fingerprint, tags=tags, params=params, dataset_digest=dataset
    )


# ----------------------------------------------------------------- the stages of a method


def _unheard(values: Mapping[str, float], step: int) -> None:
    """The log of those that do not speak for all."""


@dataclass
class _Making:
    """The way to one student, stage after stage; each stage's result is a folder in `.mind/trained`, named by all that decides it."""

    settings: Resolved
    examples: Sequence[Example]
    origin: Mapping[str, Any]  # what every stage depends on beside its settings
    workspace: Workspace
    peers: Peers  # the first of them makes the student, the others help to train it
    log: Log = _unheard
    parts: list[Path] = field(default_factory=list)
    trained: list[Trained] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    passing: list[Path] = field(default_factory=list)  # folders that nobody needs when the student is made

    def make(self, folder: Path) -> None:
        """Fill `folder` with the student and the history of its training."""
        self._train_all()
        method = table.method_class(self.settings.method.method)
        if issubclass(method, Mixture):
            student = load_student(self.settings.student, device=device())
            row = method.conclude(student, self.settings, self.parts, self.examples)
            save_student(student, self.settings.student, folder)
            self.history.append({"step": self.steps, **row})
            self.log(row, self.steps)
        else:
            left_out = shutil.ignore_patterns(TRAINED, HISTORY)
            shutil.copytree(self.parts[-1], folder, dirs_exist_ok=True, ignore=left_out)
        (folder / HISTORY).write_text("".join(json.dumps(row) + "\n" for row in self.history), encoding="utf-8")

    def follow(self) -> None:
        """Help the first process, silently."""
        with self.peers.silently():
            self._train_all()

    def _train_all(self) -> None:
        method = table.method_class(self.settings.method.method)
        method.examples(self.settings.method, self.examples, self.settings.seed)  # what its last stage lacks, no stage is trained for
        key = ""
        for stage in method.stages(self.settings):
            own = stage.settings.model_dump(mode="json", exclude={"name", "repeats"})  # what it is called decides nothing
            key = outputs.digest_json([dict(self.origin), outputs.digest_code(*CODE), "" if stage.fresh else key, own])
            self._add(stage, key)

    @property
    def steps(self) -> int:
        return sum(part.steps for part in self.trained)

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.trained)

    @property
    def left_out(self) -> dict[str, int]:
        return {what: sum(part.left_out[what] for part in self.trained) for what in self.trained[0].left_out}

    def counts(self) -> dict[str, Any]:
        """Of all stages together."""
        sums = {name: sum(getattr(part, name) for part in self.trained) for name in ("steps", "tokens", "views")}
        return {**sums, "questions": max(part.questions for part in self.trained), "left_out": self.left_out}

    def clear(self) -> None:
        """Delete what only a resumed run would need."""
        for folder in self.passing:
            shutil.rmtree(folder, ignore_errors=True)

    def _add(self, stage: Stage, key: str) -> None:
        """Train one stage, or take what an equal training has left."""
        folder, checkpoints = self.workspace.trained(key), self.workspace.checkpoints(key)
        before = self.steps
        start = None if stage.fresh or not self.parts else self.parts[-1]

        def name(values: Mapping[str, float]) -> dict[str, float]:
            """Stages that begin anew have metrics of their own; others go on counting."""
            return {f"{stage.name}/{name}" if stage.fresh else name: value for name, value in values.items()}

        def log(values: Mapping[str, float], step: int) -> None:
            self.log(name(values), step + (0 if stage.fresh else before))

        folder.parent.mkdir(parents=True, exist_ok=True)
        # of two variants that need the same at once, the second takes what the first made
        with FileLock(folder.with_suffix(".lock")) if self.peers.first else nullcontext():
            there = self.peers.gather((folder / TRAINED).is_file())[0]
            if there and stage.shared:
                console.print(f"distill {self.settings.name} {stage.name}: trained already, for another variant or by an earlier run")
            if not there:
                self._train(stage, folder, checkpoints, start, log)
        done = Trained(**json.loads((folder / TRAINED).read_text(encoding="utf-8")))
        for row in done.history:
            own = {key: value for key, value in row.items() if key != "step"}
            if there:
                log(own, int(row["step"]))
            self.history.append({"step": row["step"] + (0 if stage.fresh else before), **name(own)})
        self.parts.append(folder)
        self.trained.append(done)
        self.passing += [checkpoints] if stage.shared else [checkpoints, folder]

    def _train(self, stage: Stage, folder: Path, checkpoints: Path, start: Path | None, log: Log) -> None:
        settings = memory.frugal(stage.settings)
        examples = table.method_class(settings.method.method).examples(settings.method, self.examples, settings.seed)
        student = self._student(start)
        trained = train(
            student, settings, examples, table.build, log=log, checkpoints=checkpoints, start=start, encoded=self._encoded(settings)
        )
        if self.peers.first:
            with outputs.stage_output(folder) as partial:
                save_student(student, settings.student, partial)
                (partial / TRAINED).write_text(json.dumps(asdict(trained)), encoding="utf-8")
        self.peers.gather(None)  # nobody reads before it is written

    def _encoded(self, settings: Resolved) -> Path:
        """Where the dataset lies as this method's tokens, by all that decides them."""
        method, options = table.method_class(settings.method.method), settings.training
        decided = [dict(method.encoding(settings.method, settings.seed)), outputs.digest_code(*CODE), options.max_tokens, options.too_long]
        return self.workspace.encoded(outputs.digest_json([dict(self.origin), *decided]))

    def _student(self, start: Path | None) -> LoadedStudent:
        """The untouched one; fully tuned weights of an earlier stage in their place."""
        whole = start if start is not None and (start / MODEL).is_dir() else None
        return load_student(self.settings.student, whole)


def _say(settings: Resolved, making: _Making, address: str | None) -> None:
    losses = [row["train/loss"] for row in making.history if "train/loss" in row]
    course = f"; loss {losses[0]:.2f} -> {losses[-1]:.2f}" if losses else ""
    counts = making.counts()
    console.print(
        f"distill {settings.name}: {counts['questions']} questions, {counts['views']} views, {counts['steps']} steps, "
        f"{counts['tokens']:,} supervised tokens, {making.seconds:.0f} s{course}"
    )
    if any(making.left_out.values()):
        left = ", ".join(f"{count} {what}" for what, count in making.left_out.items() if count)
        console.print(f"  left out: {left} (too long for training.max_tokens, or nothing there for this method)")
    for line in _weights(making.history[len(making.history) // 2 :]):
        console.print(line)
    if address:
        console.print(f"  registered as {address}")


def _weights(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """What these rows of the history say about the perspectives, on average: a single row is that of a few questions."""
    names = dict.fromkeys(name for row in rows for name in row)
    mean = {name: fmean(row[name] for row in rows if name in row) for name in names}
    lines = []
    for prefix, title in (
        ("metanet/weight/", f"MetaNet keeps {mean.get('metanet/selected', 0):.1f} views; heaviest"),
        ("mode/weight/", "mixture"),
    ):
        found = sorted(((value, name) for name, value in mean.items() if name.startswith(prefix)), key=lambda pair: -abs(pair[0]))
        if found:
            lines.append(f"  {title}: " + ", ".join(f"{name.rpartition('/')[2]} {value:.2f}" for value, name in found[:4]))
    return lines
