"""What long work shows: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG_SECONDS = 15.0
"""Without a terminal, a line at most this often: a log file stays readable."""

FILE = "MIND_PROGRESS"
"""The variable that names a file for 'done total label  note': whoever started this process follows it there."""

TELL_SECONDS = 0.2

console = Console(stderr=True, highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = max(console.width, 120)  # a log file has no edge: tables need not wrap at 80


class Bar:
    """Counts done units of work; `note` is the text behind the numbers (loss, cost, ...)."""

    def __init__(self, label: str, total: int, unit: str, progress: Progress | None) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self.resumed = 0
        self.begun = 0.0
        self.note = ""
        self.started = self.said = time.monotonic()
        self._told = 0.0
        self._progress = progress
        self._task = progress.add_task(label, total=total, note="") if progress else None

    def resume(self, done: int) -> None:
        """`done` units were finished by an earlier process: counted, but not in the rate."""
        self.resumed = done
        self.advance(done)

    def advance(self, units: int = 1, note: str = "") -> None:
        self.done += units
        self.note = note
        self._show()

    def under_way(self, units: float) -> None:
        """What has been done of units that are not done yet, as a number of units: units that end all at once have a rate before."""
        self.begun = units
        self._show()

    def _show(self) -> None:
        text = f"{self.rate():.3g} {self.unit}/s  {self.note}".rstrip()
        self._tell(text)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self.done + self.begun, note=text)
        elif time.monotonic() - self.said >= LOG_SECONDS:
            self.said = time.monotonic()
            print(f"{self.label}: {self.done}/{self.total}  {text}  {self._left()}".rstrip(), file=sys.stderr, flush=True)

    def _left(self) -> str:
        """Nothing while less than a hundredth is done: what goes before the first unit (loading, prompts) would be taken for its rate."""
        done, wanted = self.done + self.begun - self.resumed, self.total - self.resumed
        if done < wanted / 100:
            return ""
        return f"{timedelta(seconds=round((wanted - done) / max(self.rate(), 1e-9)))} left"

    def _tell(self, text: str) -> None:
        file = os.environ.get(FILE)
        if file and time.monotonic() - self._told >= TELL_SECONDS:
            self._told = time.monotonic()
            aside = Path(f"{file}.part")
            aside.write_text(f"{self.done} {self.total} {self.label}  {text}", encoding="utf-8")
            aside.replace(file)

    def rate(self) -> float:
        return (self.done + self.begun - self.resumed) / max(time.monotonic() - self.started, 1e-9)


@contextmanager
def bar(label: str, total: int, unit: str = "it") -> Iterator[Bar]:
    """Show progress of `total` units while the block runs."""
    if not console.is_terminal:
        yield Bar(label, total, unit, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=False) as progress:
        yield Bar(label, total, unit, progress)
