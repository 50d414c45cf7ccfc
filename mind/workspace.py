"""The folder that holds a line of work, and the paths in it. One place for every path.

A workspace has params.yaml, dvc.yaml and data.dvc. What must survive a killed stage (reply cache, checkpoints, partial
predictions) lies in `.mind/`, outside DVC's outputs. A run with overridden parameters is another workspace below its home,
`.mind/workspaces/<digest>/`, which shares the home's caches, DVC cache and tracking store.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mind.errors import ConfigError

MARKERS = ("params.yaml", "dvc.yaml")


@dataclass(frozen=True)
class Workspace:
    root: Path

    @classmethod
    def find(cls, start: Path | None = None) -> Workspace:
        """The workspace that `start` (default: the current folder) lies in.

        Raises:
            ConfigError: neither it nor a folder above it is one.
        """
        here = (start or Path.cwd()).resolve()
        for folder in (here, *here.parents):
            if all((folder / name).is_file() for name in MARKERS):
                return cls(folder)
        raise ConfigError(
            f"{here} is not in a workspace", wanted=f"a folder with {' and '.join(MARKERS)}", do="run `mind init DIR` and work there"
        )

    @property
    def home(self) -> Path:
        """The workspace that a person made: itself, or the one that an overridden run was derived from."""
        parents = self.root.parents
        derived = len(parents) > 2 and parents[0].name == "workspaces" and parents[1].name == ".mind"
        return parents[2] if derived else self.root

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def code(self) -> Path:
        """Names the version of mind, on which stages depend where mind is an installed package and not a folder beside them."""
        return self.root / "code.yaml"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def rationales(self) -> Path:
        return self.root / "rationales"

    @property
    def dataset(self) -> Path:
        return self.root / "dataset"

    def student(self, variant: str) -> Path:
        return self.root / "students" / variant

    def report(self, variant: str) -> Path:
        return self.reports / variant

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def caches(self) -> Path:
        """`.mind/` of the home: what outlives a killed stage."""
        return self.home / ".mind"

    @property
    def replies(self) -> Path:
        return self.caches / "replies.sqlite"

    def checkpoints(self, identity: str) -> Path:
        return self.caches / "checkpoints" / identity

    def trained(self, identity: str) -> Path:
        """A training that several variants share."""
        return self.caches / "trained" / identity

    def encoded(self, identity: str) -> Path:
        """A tokenised dataset; it may be deleted."""
        return self.caches / "encoded" / identity

    def partial_predictions(self, identity: str) -> Path:
        return self.caches / "predictions" / identity

    @property
    def benchmarks(self) -> Path:
        """A user's own benchmark files (YAML), beside those in the package."""
        return self.root / "benchmarks"
