"""mind.figures: pictures are drawn, equal numbers give equal bytes, titles say what the numbers say."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mind import figures
from mind.latent import LatentMap
from mind.records import PERSPECTIVES
from mind.statistics import Difference

PNG = b"\x89PNG\r\n\x1a\n"


def history(steps: int = 30, jitter: float = 0.2, favourite: float = 0.5) -> list[dict[str, float]]:
    random = np.random.default_rng(0)
    rows: list[dict[str, float]] = [{"step": 1, "train/loss": 2.0}]  # as a run without MetaNet's metrics begins
    for step in range(2, steps):
        row: dict[str, float] = {"step": step}
        for k, name in enumerate(PERSPECTIVES):
            row[f"inertia/filtered/{name}"] = 2 - 0.01 * step
            row[f"inertia/instant/{name}"] = 2 - 0.01 * step + jitter * random.normal()
            row[f"metanet/weight/{name}"] = favourite if k == 5 else (1 - favourite) / 7
        rows.append(row)
    del rows[5]["metanet/weight/intuitive"], rows[7]["inertia/instant/socratic"]  # a question may lack a view
    return rows


def score(accuracy: float, domain: str) -> dict[str, Any]:
    return {"accuracy": accuracy, "ci_low": max(0, accuracy - 0.1), "ci_high": min(1, accuracy + 0.1), "domain": domain}


def report(primer: float, choice: float) -> dict[str, Any]:
    benchmarks = {"primer": score(primer, "id"), "choice": score(choice, "ood"), "yesno": score(choice, "ood")}
    return {"benchmarks": benchmarks, "id": score(primer, "id"), "ood": score(choice, "ood")}


def latent_map(seed: int = 0, perspectives: int = 8) -> LatentMap:
    names = PERSPECTIVES[:perspectives] * 4
    random = np.random.default_rng(seed)
    n = len(names)
    questions = tuple(f"q{i // perspectives}" for i in range(n))
    return LatentMap(questions, names, random.normal(size=(n, 5)), np.zeros(n, int), np.full(n, 0.3), random.normal(size=(n, 2)))


def compared(count: int) -> list[figures.Compared]:
    """A reference and variants that are better, worse, and within noise."""
    rows = [figures.Compared("base", {"primer": score(0.2, "id"), "ood": score(0.3, "ood")}, {}, {})]
    for i in range(count - 1):
        value = (i - 5) / 30
        verdict = "better" if value > 0.1 else "worse" if value < -0.1 else "within noise"
        difference = Difference(value, value - 0.1, value + 0.1, 0.5, 3, 2, 60)
        scores = {"primer": score(0.3 + value, "id"), "ood": score(0.3, "ood")}
        rows.append(figures.Compared(f"variant-{i}", scores, {"primer": [0.3, None, 0.35]}, {"ood": (difference, verdict)}))
    return rows


DRAWINGS = {
    "inertia": lambda path: figures.inertia(history(), path),
    "weights": lambda path: figures.weights(history(), path),
    "accuracy": lambda path: figures.accuracy({"base": report(0.1, 0.3), "mind": report(0.5, 0.3)}, path),
    "comparison": lambda path: figures.comparison(compared(12), {"primer": "primer\n(id)", "ood": "average\nood"}, "base", path),
    "latent": lambda path: figures.latent_map({"base": latent_map(0), "mind": latent_map(1)}, path),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_equal_numbers_give_equal_bytes(name: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    DRAWINGS[name](first)
    DRAWINGS[name](second)
    assert first.read_bytes()[:8] == PNG
    assert first.read_bytes() == second.read_bytes()
    assert b"Software" not in first.read_bytes()  # matplotlib's version would change the bytes


@pytest.mark.parametrize(("ending", "start"), [("svg", b"<?xml"), ("pdf", b"%PDF"), ("png", PNG), ("out", PNG)])
def test_the_ending_decides_the_format(ending: str, start: bytes, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.{ending}" for name in ("first", "second")]
    for path in paths:
        figures.accuracy({"mind": report(0.5, 0.3)}, path)
    assert paths[0].read_bytes().startswith(start)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_comparison_without_a_reference_has_no_forest(tmp_path: Path) -> None:
    figures.comparison(compared(1), {"primer": "primer"}, "mind", tmp_path / "alone.png")
    assert (tmp_path / "alone.png").exists()


def test_other_numbers_give_another_picture(tmp_path: Path) -> None:
    for variant, value in (("a", 0.5), ("b", 0.6)):
        figures.accuracy({"mind": report(value, 0.3)}, tmp_path / variant)
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("rows", [[], [{"step": 1, "train/loss": 2.0}]])
def test_nothing_is_drawn_of_a_run_without_metanet(rows: list[dict[str, float]], tmp_path: Path) -> None:
    figures.inertia(rows, tmp_path / "inertia.png")
    figures.weights(rows, tmp_path / "weights.png")
    assert not list(tmp_path.iterdir())


def test_few_perspectives_and_a_single_row_are_drawn(tmp_path: Path) -> None:
    row = {"step": 3, "metanet/weight/analogy": 1.0, "inertia/filtered/analogy": 2.0, "inertia/instant/analogy": 2.1}
    figures.inertia([row], tmp_path / "inertia.png")
    figures.weights([row], tmp_path / "weights.png")
    figures.latent_map({"mind": latent_map(perspectives=3)}, tmp_path / "latent.png")
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(("count", "shape"), [(2, (1, 2)), (5, (1, 5)), (7, (2, 4)), (10, (2, 5))])
def test_latent_maps_of_many_students_stand_in_a_grid(
    count: int, shape: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    grids: list[Any] = []
    subplots = Figure.subplots
    monkeypatch.setattr(Figure, "subplots", lambda self, *args, **options: grids.append(subplots(self, *args, **options)) or grids[-1])
    figures.latent_map({f"single-{i}": latent_map(i) for i in range(count)}, tmp_path / "latent.png")
    (grid,) = grids
    assert grid.shape == shape
    titles = [axes.get_title(loc="left") for axes in grid.flat if axes.get_visible()]
    assert [title.split()[0] for title in titles] == [f"single-{i}" for i in range(count)]


def test_a_variant_may_lack_a_benchmark(tmp_path: Path) -> None:
    short = {"benchmarks": {"primer": score(0.4, "id")}, "id": score(0.4, "id")}
    figures.accuracy({"base": report(0.1, 0.3), "short": short}, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").exists()


def test_an_average_stands_only_where_there_are_several_benchmarks() -> None:
    labels = [(band.kind, band.label) for band in figures._bands({"mind": report(0.5, 0.3)})]
    assert labels == [
        ("heading", "in distribution"),
        ("benchmark", "primer"),
        ("heading", "out of distribution"),
        ("benchmark", "choice"),
        ("benchmark", "yesno"),
        ("average", "average"),
    ]


def test_every_perspective_has_a_colour_and_a_mark_of_its_own() -> None:
    for look in (figures.COLORS, figures.MARKS):
        assert tuple(look) == PERSPECTIVES
        assert len(set(look.values())) == len(PERSPECTIVES)


def titles_of(monkeypatch: pytest.MonkeyPatch, draw: Any) -> str:
    """The title that a drawing would have."""
    from matplotlib.figure import Figure

    found: list[str] = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **_: found.append(text))
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: None)
    draw(Path("nowhere.png"))
    return found[0].replace("\n", " ")


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda path: figures.weights(history(favourite=0.6), path), "MetaNet turns to socratic (60 % of the weight)"),
        (lambda path: figures.weights(history(favourite=0.125), path), "near uniform"),
        (lambda path: figures.inertia(history(jitter=0.2), path), "The filtered loss moves"),
        (lambda path: figures.inertia(history(jitter=0.0), path), "move alike"),
        (
            lambda path: figures.accuracy({"base": report(0.1, 0.3), "mind": report(0.5, 0.25)}, path),
            "mind: 50.0 % in distribution, 25.0 % out",
        ),
        (lambda path: figures.accuracy({"mind": report(0.5, 0.25)}, path, title="what was found"), "what was found"),
        (lambda path: figures.comparison(compared(3), {"primer": "primer"}, "base", path, title="mind gains"), "mind gains"),
    ],
)
def test_titles_say_the_finding(draw: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said in titles_of(monkeypatch, draw)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(PERSPECTIVES), st.floats(0, 1), min_size=1), st.floats(0.01, 0.2))
def test_labels_never_overlap_and_never_sink(heights: dict[str, float], gap: float) -> None:
    moved = figures._apart(heights, gap)
    places = sorted(moved.values())
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(places))
    assert all(moved[name] >= heights[name] for name in heights)


def test_smoothing_keeps_a_constant_and_the_steps() -> None:
    steps, values = np.arange(100.0), np.full(100, 0.3)
    assert figures._smooth(steps, values)[1] == pytest.approx(values)
    assert figures._smooth(steps, steps)[0] is steps


def test_importing_it_does_not_load_matplotlib() -> None:
    code = "import sys, mind.figures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
