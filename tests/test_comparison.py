"""mind.comparison: from reports on disk to tables; every number in them is that of mind.statistics on the same questions."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mind import comparison, forgetting, tables
from mind.config import Config, merge
from mind.errors import ConfigError, DataError
from mind.latent import LatentMap, OwnTexts, against, read_map
from mind.outputs import write_manifest
from mind.params import over_seeds, validate
from mind.records import PERSPECTIVES, Prediction, write_jsonl
from mind.statistics import holm, macro_accuracy, macro_difference, paired_difference, repeated_accuracy, repeated_difference, wilson
from mind.workspace import Workspace

DOMAIN = {"primer": "id", "choice": "ood", "yesno": "ood"}
N = {"primer": 60, "choice": 40, "yesno": 40}


@pytest.fixture
def config() -> Config:
    methods = {"base": "base", "mind": "mind", "without-fusion": "without_fusion", "instant_loss": "mind"}
    return validate({"variants": {name: {"method": m} for name, m in methods.items()}, "run": {"variants": ["base", "mind"]}})


def answers(seed: int, **shares: float) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.random(N[name]) < share for name, share in shares.items()}


BASE = answers(0, primer=0.2, choice=0.3, yesno=0.5)
BETTER = {name: right | (np.arange(N[name]) % 5 < 3) if name == "primer" else right for name, right in BASE.items()}
NOISY = {name: np.where(np.arange(N[name]) % 10 == 0, ~right, right) for name, right in BASE.items()}


def write(workspace: Workspace, variant: str, right: dict[str, np.ndarray]) -> Path:
    """A report as evaluate leaves it."""
    folder = workspace.report(variant)
    folder.mkdir(parents=True)
    scores, rows = {}, []
    for name, vector in right.items():
        low, high = wilson(int(vector.sum()), len(vector))
        counts = {"n": len(vector), "correct": int(vector.sum()), "accuracy": float(vector.mean()), "ci_low": low, "ci_high": high}
        scores[name] = {**counts, "domain": DOMAIN[name], "answer_rate": 1.0, "mean_tokens": 30.0}
        rows += [
            Prediction(benchmark=name, id=f"{name}-{i}", output="", answer="1", gold="1", correct=bool(r), tokens=30)
            for i, r in enumerate(vector)
        ]
    metrics: dict[str, object] = {"benchmarks": scores}
    for domain in ("id", "ood"):
        counts = [(score["correct"], score["n"]) for score in scores.values() if score["domain"] == domain]
        if counts:
            metrics[domain] = dict(zip(("accuracy", "ci_low", "ci_high"), macro_accuracy(counts), strict=True))  # type: ignore[arg-type]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    write_jsonl(folder / "predictions.jsonl", rows)
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path)
    write(made, "base", BASE)
    write(made, "mind", BETTER)
    return made


# --------------------------------------------------------------------- laws


def test_two_identical_variants_do_not_differ(workspace: Workspace, config: Config) -> None:
    write(workspace, "without-fusion", BASE)
    row = comparison.compare(workspace, config, ["without-fusion"]).rows[1]
    assert {difference.value for difference in row.differences.values()} == {0}
    assert {difference.p for difference in row.differences.values()} == {1}
    assert row.forgot == (0, int(sum(right.sum() for right in BASE.values())))
    assert row.finding == "without-fusion does not differ from base: every question is graded the same."


def test_differences_are_paired_on_the_same_questions(workspace: Workspace, config: Config) -> None:
    row = comparison.compare(workspace, config).rows[1]
    for name in DOMAIN:
        assert row.differences[name] == paired_difference(BETTER[name], BASE[name])
    ood = [(BETTER[name], BASE[name]) for name in ("choice", "yesno")]
    assert row.differences["ood"] == macro_difference(ood, seed=config.seed)
    assert row.differences["id"] == row.differences["primer"]  # one benchmark: its average is itself
    assert comparison.verdict(row.differences["primer"]) == "better"
    assert comparison.verdict(row.differences["ood"]) == "the same"


def test_the_order_of_predictions_does_not_matter(workspace: Workspace, config: Config) -> None:
    before = comparison.compare(workspace, config).rows[1].differences
    path = workspace.report("mind") / "predictions.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert comparison.compare(workspace, config).rows[1].differences == before


def test_p_is_corrected_for_the_number_of_variants(workspace: Workspace, config: Config) -> None:
    alone = comparison.compare(workspace, config).rows[1].differences["primer"].p
    write(workspace, "without-fusion", NOISY)
    rows = comparison.compare(workspace, config, ["mind", "without-fusion"]).rows[1:]
    raw = [alone, paired_difference(NOISY["primer"], BASE["primer"]).p]
    assert [row.differences["primer"].p for row in rows] == holm(raw)
    assert rows[0].differences["primer"].p == 2 * alone


def test_noise_is_called_noise(workspace: Workspace, config: Config) -> None:
    write(workspace, "without-fusion", NOISY)
    row = comparison.compare(workspace, config, ["without-fusion"]).rows[1]
    assert comparison.verdict(row.differences["primer"]) == "within noise"
    assert "within noise in distribution" in row.finding


def test_worse_is_called_worse_and_counts_what_was_forgotten(workspace: Workspace, config: Config) -> None:
    result = comparison.compare(workspace, config, ["base"], reference="mind")
    row = result.rows[1]
    assert row.finding.startswith("base is worse than mind in distribution")
    lost = sum(int((BETTER[name] & ~BASE[name]).sum()) for name in DOMAIN)
    assert row.forgot == (lost, sum(int(BETTER[name].sum()) for name in DOMAIN))
    assert f"it has {lost} wrong" in row.finding


def test_the_table_and_the_run_say_the_same_of_what_was_forgotten(workspace: Workspace, config: Config) -> None:
    write(workspace, "without-fusion", NOISY)
    lost, known = comparison.compare(workspace, config, ["without-fusion"]).rows[1].forgot or (0, 0)
    own, reference = (forgetting._grades(workspace.report(name)) for name in ("without-fusion", "base"))
    shares = forgetting.forgotten(own, reference)
    assert shares["eval/forgot"] == lost / known > 0
    assert shares["eval/primer/forgot"] == (BASE["primer"] & ~NOISY["primer"]).sum() / BASE["primer"].sum()


# ------------------------------------------------------------------- seeds


@pytest.fixture
def repeated() -> Config:
    variants = {"base": {"method": "base"}, "mind": {"method": "mind"}, "without-fusion": {"method": "without_fusion"}}
    raw = {"variants": variants, "run": {"variants": ["base", "mind", "without-fusion"]}}
    return validate(merge(raw, over_seeds(validate(raw), ["mind", "without-fusion"], [17, 18, 19])))


SEEDS = [answers(seed, primer=0.5, choice=0.35, yesno=0.5) for seed in (1, 2, 3)]
OTHERS = [answers(seed, primer=0.5, choice=0.3, yesno=0.5) for seed in (4, 5, 6)]


@pytest.fixture
def swept(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path)
    write(made, "base", BASE)
    for name, rows in (("mind", SEEDS), ("without-fusion", OTHERS)):
        for variant, right in zip((name, f"{name}-18", f"{name}-19"), rows, strict=True):
            write(made, variant, right)
    return made


def test_seeds_of_a_variant_are_one_row(swept: Workspace, repeated: Config) -> None:
    result = comparison.compare(swept, repeated)
    assert [row.variant for row in result.rows] == ["base", "mind", "without-fusion"] and not result.missing and not result.notes
    row = result.rows[1]
    assert list(row.seeds) == [17, 18, 19]
    stacked = {name: np.array([own[name] for own in SEEDS]) for name in DOMAIN}
    for name in DOMAIN:
        score = row.metrics["benchmarks"][name]
        assert (score["accuracy"], score["ci_low"], score["ci_high"]) == pytest.approx(repeated_accuracy([stacked[name]]))
        assert score["n"] == N[name] and score["domain"] == DOMAIN[name]
    ood = [(stacked[name], BASE[name][None]) for name in ("choice", "yesno")]
    known = repeated_difference(ood, untrained=True)
    found = row.differences["ood"]
    assert (found.value, found.low, found.high) == (known.value, known.low, known.high)
    pair = [
        known.p,
        repeated_difference([(np.array([o[n] for o in OTHERS]), BASE[n][None]) for n in ("choice", "yesno")], untrained=True).p,
    ]
    assert found.p == holm(pair)[0]
    assert "mind (3 seeds) is" in row.finding


def test_what_was_forgotten_is_a_mean_over_seeds(swept: Workspace, repeated: Config) -> None:
    row = comparison.compare(swept, repeated).rows[1]
    each = [sum(int((BASE[name] & ~own[name]).sum()) for name in DOMAIN) for own in SEEDS]
    assert row.forgot == pytest.approx((np.mean(each), sum(int(right.sum()) for right in BASE.values())))


def test_the_untrained_reference_has_no_seeds_and_a_trained_one_does(swept: Workspace, repeated: Config) -> None:
    first, second = (comparison.compare(swept, repeated, reference=name).rows for name in ("base", "without-fusion"))
    assert first[0].seeds.keys() == {None} and second[0].variant == "without-fusion" and len(second[0].seeds) == 3
    pair = (np.array([own["primer"] for own in SEEDS]), np.array([own["primer"] for own in OTHERS]))
    mind = next(row for row in second if row.variant == "mind").differences["primer"]
    assert (mind.low, mind.high) == (repeated_difference([pair]).low, repeated_difference([pair]).high)


def test_two_identical_sweeps_do_not_differ(tmp_path: Path, repeated: Config) -> None:
    made = Workspace(tmp_path)
    for name in ("mind", "without-fusion"):
        for variant, right in zip((name, f"{name}-18", f"{name}-19"), SEEDS, strict=True):
            write(made, variant, right)
    row = comparison.compare(made, repeated, ["without-fusion"], reference="mind").rows[1]
    assert {difference.p for difference in row.differences.values()} == {1}
    assert row.finding == "without-fusion does not differ from mind: every question is graded the same."


def test_naming_a_repetition_names_its_row(swept: Workspace, repeated: Config) -> None:
    result = comparison.compare(swept, repeated, ["mind-18"], reference="without-fusion-19")
    assert [(row.variant, len(row.seeds)) for row in result.rows] == [("without-fusion", 3), ("mind", 1)]


def test_a_single_seed_among_several_is_said(swept: Workspace, repeated: Config) -> None:
    for variant in ("mind-18", "mind-19"):
        for path in swept.report(variant).iterdir():
            path.unlink()
    result = comparison.compare(swept, repeated)
    assert set(result.missing) == {"mind-18", "mind-19"}
    assert any("Trained with one seed: mind." in note for note in result.notes)
    single = next(row for row in result.rows if row.variant == "mind").differences["primer"]
    plain = paired_difference(SEEDS[0]["primer"], BASE["primer"])
    assert (single.low, single.high) == (plain.low, plain.high)  # against the untrained student nothing changes


def test_seeds_that_answered_other_questions_are_compared_on_the_common_ones(swept: Workspace, repeated: Config) -> None:
    path = swept.report("mind-18") / "predictions.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if '"primer-7"' not in line))
    result = comparison.compare(swept, repeated)
    assert result.rows[1].metrics["benchmarks"]["primer"]["n"] == N["primer"] - 1
    assert any("primer: the seeds of mind answered 60, 59, 60 questions; the 59 that all answered count." in note for note in result.notes)


def test_tokens_are_those_of_a_training(swept: Workspace, repeated: Config) -> None:
    for variant, tokens in (("mind", 1000), ("mind-18", 1100), ("mind-19", 1200), ("without-fusion", 900)):
        swept.student(variant).mkdir(parents=True)
        write_manifest(swept.student(variant), stage="distill", inputs={}, config={}, counts={"tokens": tokens})
    result = comparison.compare(swept, repeated)
    assert [row.tokens for row in result.rows] == [None, 1100, None]  # of `without-fusion` two are not known
    assert "| mind | 3 | 1,100 | - |" in tables.to_markdown(result)


def run_of(variant: str, **more: str) -> Any:
    params = {"name": variant, "seed": "17", "repeats": "null", "method.beta": "0.8", **more}
    tags = {"mind.variant": variant, "mind.method": "base" if variant == "base" else "mind"}
    return SimpleNamespace(params=params, tags=tags)


def test_of_each_variant_and_seed_the_latest_run_counts_and_only_with_the_same_settings() -> None:
    new, again, old = run_of("mind-18", seed="18", repeats="mind"), run_of("mind-18", seed="18", repeats="mind"), run_of("mind")
    other, base = run_of("mind", seed="20", **{"method.beta": "0"}), run_of("base", **{"training.epochs": "3"})
    chosen, notes = comparison._latest_of_each([new, base, again, other, old, run_of("base")])
    assert chosen == {"mind": [old, new], "base": [base]}
    assert notes == ["mind: runs left out because their settings differ from those of its latest: 1."]
    many = [run_of("mind", seed=seed) for seed in ("100", "18")]
    assert [run.params["seed"] for run in comparison._latest_of_each(many)[0]["mind"]] == ["18", "100"]


# ------------------------------------------------------- what may be missing


def test_missing_reports_are_named(workspace: Workspace, config: Config) -> None:
    result = comparison.compare(workspace, config, ["mind", "without-fusion"])
    assert [row.variant for row in result.rows] == ["base", "mind"]
    assert result.missing == ("without-fusion",)
    assert "without-fusion" in tables.to_markdown(result)


def test_a_missing_reference_leaves_the_accuracies(tmp_path: Path, config: Config) -> None:
    made = Workspace(tmp_path)
    write(made, "mind", BETTER)
    result = comparison.compare(made, config)
    assert [row.variant for row in result.rows] == ["mind"]
    assert not result.rows[0].differences
    assert any("'base' has no report" in note for note in result.notes)
    for form in ("console", "json", "markdown", "latex"):
        tables.show(result, form)  # type: ignore[arg-type]


def test_no_report_at_all_is_an_error_that_says_what_to_do(tmp_path: Path, config: Config) -> None:
    with pytest.raises(DataError, match="mind run"):
        comparison.compare(Workspace(tmp_path), config)


def test_an_unknown_variant_is_refused(workspace: Workspace, config: Config) -> None:
    with pytest.raises(ConfigError, match="unknown variant 'sbs'"):
        comparison.compare(workspace, config, ["sbs"])
    with pytest.raises(ConfigError, match="unknown variant 'sbs'"):
        comparison.compare(workspace, config, reference="sbs")


@pytest.mark.parametrize("content", ["{", "[]", '{"benchmarks": {"primer": {"accuracy": 0.5}}}'])
def test_a_damaged_report_is_named(content: str, workspace: Workspace, config: Config) -> None:
    (workspace.report("mind") / "metrics.json").write_text(content)
    with pytest.raises(DataError, match=r"mind/metrics\.json is damaged"):
        comparison.compare(workspace, config)


def test_only_shared_questions_are_compared_and_that_is_said(workspace: Workspace, config: Config) -> None:
    short = {"primer": BASE["primer"][:30], "choice": BASE["choice"]}
    write(workspace, "without-fusion", short)
    result = comparison.compare(workspace, config, ["without-fusion"])
    row = result.rows[1]
    assert row.differences["primer"].n == 30
    assert "yesno" not in row.differences
    notes = " ".join(result.notes)
    assert "on the 30 that both answered" in notes
    assert "yesno: answered by base only" in notes


def test_questions_whose_gold_answer_changed_are_not_the_same(workspace: Workspace, config: Config) -> None:
    path = workspace.report("mind") / "predictions.jsonl"
    path.write_text(
        path.read_text().replace(
            '"id":"primer-3","output":"","answer":"1","gold":"1"', '"id":"primer-3","output":"","answer":"1","gold":"2"'
        )
    )
    assert comparison.compare(workspace, config).rows[1].differences["primer"].n == N["primer"] - 1


# ------------------------------------------------------------------ showing


def test_an_average_column_stands_only_for_several_benchmarks(workspace: Workspace, config: Config) -> None:
    assert list(comparison.compare(workspace, config).columns) == ["primer", "choice", "yesno", "ood"]


def test_every_form_says_the_same_numbers(workspace: Workspace, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    result = comparison.compare(workspace, config)
    accuracy = f"{100 * BETTER['primer'].mean():.1f}"
    gain = f"{100 * (BETTER['primer'].mean() - BASE['primer'].mean()):+.1f}"
    for form in ("console", "markdown", "latex"):
        tables.show(result, form)  # type: ignore[arg-type]
        printed = capsys.readouterr().out
        assert accuracy in printed
        assert gain in printed or form == "latex"
    tables.show(result, "json")
    data = json.loads(capsys.readouterr().out)
    mind = next(row for row in data["variants"] if row["variant"] == "mind")
    assert f"{100 * mind['benchmarks']['primer']['accuracy']:.1f}" == accuracy
    assert mind["differences"]["primer"]["verdict"] == "better"
    assert mind["method"] == "mind" and "MetaNet" in mind["caption"] and mind["seeds"][0]["seed"] == 17
    assert set(mind["differences"]["primer"]) == {"value", "low", "high", "p", "gained", "lost", "n", "verdict"}


def test_markdown_is_a_table(workspace: Workspace, config: Config) -> None:
    for block in tables.to_markdown(comparison.compare(workspace, config)).split("\n\n"):
        lines = block.splitlines()
        if lines[0].startswith("|"):
            assert len({line.count("|") for line in lines}) == 1
            assert set(lines[1]) <= set("|-: ")


@pytest.mark.parametrize(("width", "parts"), [(160, 1), (120, 1), (80, 2)])
def test_six_benchmarks_and_twelve_variants_fit_the_console(
    width: int, parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"variant-number-{i}" for i in range(11)]
    raw = {"variants": {"base": {"method": "base"}, **{name: {"method": "mind"} for name in names}}, "run": {"variants": ["base", *names]}}
    six = {"gsm8k": "id", "svamp": "id", "math500": "id", "csqa": "ood", "strategyqa": "ood", "gpqa-diamond": "ood"}
    monkeypatch.setattr("tests.test_comparison.DOMAIN", six)
    random = np.random.default_rng(0)
    for variant in raw["run"]["variants"]:
        write(Workspace(tmp_path), variant, {name: random.random(50) < 0.5 for name in six})
    result = comparison.compare(Workspace(tmp_path), validate(raw))
    console = Console(width=1000, record=True, file=(tmp_path / "shown").open("w"))
    shown = list(tables._tables(result, width))
    for table in shown:
        console.print(table)
    lines = console.export_text().splitlines()
    assert len(shown) == 2 * parts + 1
    assert max(map(len, map(str.rstrip, lines))) <= width
    assert all(any(name in line for line in lines) for name in [*six, *names]) and "…" not in "".join(lines)


def test_latex_escapes_names_and_marks_what_is_more_than_noise(workspace: Workspace, config: Config) -> None:
    write(workspace, "instant_loss", NOISY)
    text = tables.to_latex(comparison.compare(workspace, config, ["mind", "instant_loss"]))
    assert r"instant\_loss" in text and "instant_loss" not in text
    row = {line.split(" & ")[0]: line for line in text.splitlines() if " & " in line}
    assert row["mind"].count(r"$^\dagger$") == 1
    assert r"\dagger" not in row[r"instant\_loss"] + row["base"]
    assert text.count("{") == text.count("}")


def test_the_picture_is_titled_by_the_variant_that_gained_most(workspace: Workspace, config: Config, tmp_path: Path) -> None:
    write(workspace, "without-fusion", NOISY)
    result = comparison.compare(workspace, config, ["mind", "without-fusion"])
    assert tables._headline(result).startswith("mind against base: +")
    tables.draw(result, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000


def test_the_caption_says_paper_test_and_seeds(swept: Workspace, repeated: Config) -> None:
    text = tables.to_latex(comparison.compare(swept, repeated))
    assert "mean over seeds" in text and "Welch's $t$" in text and "arXiv 2601.03717" in text
    assert text.count("{") == text.count("}")
    tables.draw(comparison.compare(swept, repeated), swept.root / "picture.svg")
    assert "<svg" in (swept.root / "picture.svg").read_text()


# ------------------------------------------------------------------- latent


def latent_map(separation: float, question: str = "q") -> LatentMap:
    random = np.random.default_rng(0)
    n, views = 48, len(PERSPECTIVES)
    near = np.clip(separation + 0.05 * random.normal(size=n), -1, 1)
    ids = tuple(f"{question}{i // views}" for i in range(n))
    return LatentMap(ids, PERSPECTIVES * (n // views), random.normal(size=(n, 8)), np.zeros(n, int), near, random.normal(size=(n, 2)))


def test_latent_spaces_are_compared_where_both_were_mapped(workspace: Workspace, config: Config, tmp_path: Path) -> None:
    assert comparison.compare(workspace, config).rows[1].latent == ""
    assert not tables.draw_latent(comparison.compare(workspace, config), tmp_path / "latent.png")
    latent_map(0.1).write(workspace.report("base"))
    latent_map(0.4).write(workspace.report("mind"))
    result = comparison.compare(workspace, config)
    assert "perspectives are more separable than in base" in result.rows[1].latent
    assert result.rows[1].latent in tables.to_markdown(result)
    assert tables.draw_latent(result, tmp_path / "latent.png")
    assert (tmp_path / "latent.png").exists()


def test_a_latent_space_is_put_beside_those_of_single_perspectives(workspace: Workspace, config: Config) -> None:
    singles = {f"single-{name}": {"method": "single", "perspective": name} for name in PERSPECTIVES[:2]}
    raw = {"variants": {"base": {"method": "base"}, "mind": {"method": "mind"}, **singles}, "run": {"variants": ["base", "mind", *singles]}}
    for variant, separation in (("base", 0.1), ("mind", 0.4), *((name, 0.6) for name in singles)):
        if variant in singles:
            write(workspace, variant, BASE)
        latent_map(separation).write(workspace.report(variant))
    rows = {row.variant: row for row in comparison.compare(workspace, validate(raw)).rows}
    assert "more separable than in base" in rows["mind"].latent
    assert "less separable than in 2 students of one perspective each (silhouette -0.20" in rows["mind"].latent
    assert "students of one perspective" not in rows[next(iter(singles))].latent


@pytest.fixture
def eight(workspace: Workspace) -> Config:
    """The untouched student, MIND and eight students of one perspective, each with its latent map."""
    singles = {f"single-{name}": {"method": "single", "perspective": name} for name in PERSPECTIVES}
    for place, variant in enumerate(["base", "mind", *singles]):
        if variant in singles:
            write(workspace, variant, BASE)
        latent_map(0.05 * place).write(workspace.report(variant))
    variants = {"base": {"method": "base"}, "mind": {"method": "mind"}, **singles}
    return validate({"variants": variants, "run": {"variants": list(variants)}, "latent": {"questions": 6}})


def own_texts(kind: int, **other: Any) -> OwnTexts:
    """Texts of a student whose features all point its own way, beside those of the questions."""
    random = np.random.default_rng(kind)
    features = np.random.default_rng(99).normal(size=(6, 16)) + 3 * np.eye(16)[kind] + 0.1 * random.normal(size=(6, 16))
    texts = tuple(f"student {kind} on question {i}" for i in range(6))
    return replace(OwnTexts(tuple(f"q{i}" for i in range(6)), texts, features, "encoder"), **other)


def let_all_write(workspace: Workspace, config: Config) -> None:
    for place, variant in enumerate(config.run.variants):
        own_texts(place).write(workspace.report(variant))


def test_each_student_of_one_perspective_is_put_beside_the_variant(
    workspace: Workspace, eight: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    result = comparison.compare(workspace, eight)
    rows = {row.variant: row for row in result.rows}
    ours, base = (read_map(workspace.report(name)) for name in ("mind", "base"))
    assert ours is not None and base is not None
    assert list(rows["mind"].beside) == [f"single-{name}" for name in PERSPECTIVES]
    assert not any(row.beside for name, row in rows.items() if name != "mind")
    data = {row["variant"]: row for row in json.loads(tables.to_json(result))["variants"]}
    markdown = tables.to_markdown(result)
    tables.show(result, "console")
    console = capsys.readouterr().out
    for one, change in rows["mind"].beside.items():
        other = read_map(workspace.report(one))
        assert other is not None and change == against(ours, other, eight.seed)
        assert data["mind"]["latent"][one]["silhouette"] == change.silhouette
        assert f"separable than in {one}" in data["mind"]["latent"][one]["sentence"]
        cell = f"{change.silhouette:+.2f} ({change.low:+.2f} to {change.high:+.2f}), drift {change.drift:.2f}"
        assert f"| {one} | {cell} |" in markdown and cell in console
    assert "less separable than in 8 students of one perspective each" in rows["mind"].latent
    assert console.count(" separable than in") == 10  # a sentence for mind and for each student against base, one against their mean


def test_a_student_with_other_rationales_does_not_silence_the_others(workspace: Workspace, eight: Config) -> None:
    latent_map(0.4, question="other").write(workspace.report("single-planning"))
    row = next(row for row in comparison.compare(workspace, eight).rows if row.variant == "mind")
    assert len(row.beside) == 7 and "single-planning" not in row.beside
    assert "than in base" in row.latent and "than in 7 students of one perspective each" in row.latent


def test_what_students_wrote_is_clustered_by_who_wrote_it(workspace: Workspace, eight: Config, capsys: pytest.CaptureFixture[str]) -> None:
    let_all_write(workspace, eight)
    result = comparison.compare(workspace, eight)
    assert list(result.writers) == ["8 single-perspective students", "these and mind"]
    alone, together = result.writers.values()
    assert len(alone.map.questions) == 8 * 6 and len(together.map.questions) == 9 * 6
    assert alone.ari.value > 0.5 and alone.ari.p < 0.01
    assert "Own texts of these and mind: The 9 students separate" in tables.to_markdown(result)
    assert "| nmi | " in tables.to_markdown(result)
    told = json.loads(tables.to_json(result))["own_texts"]["these and mind"]
    assert set(told) >= {"components", "ari", "nmi", "purity", "silhouette"} and set(told["ari"]) >= {"low", "high", "chance", "p"}
    tables.show(result, "console")
    assert "Do texts that students wrote lie apart" in capsys.readouterr().out


def test_students_that_were_asked_otherwise_are_left_out_and_said(workspace: Workspace, eight: Config) -> None:
    let_all_write(workspace, eight)
    own_texts(1, encoder="another").write(workspace.report("mind"))
    own_texts(4, questions=tuple("uvwxyz")).write(workspace.report("single-decomposition"))
    result = comparison.compare(workspace, eight)
    assert list(result.writers) == ["7 single-perspective students"]
    assert [note.split(":")[0] for note in result.notes if "not clustered" in note] == ["mind", "single-decomposition"]


def test_one_student_of_one_perspective_is_nothing_to_cluster(workspace: Workspace, eight: Config) -> None:
    let_all_write(workspace, eight)
    result = comparison.compare(workspace, eight, ["mind", "single-planning"])
    assert not result.writers and not result.own_texts


def test_the_picture_holds_all_maps(workspace: Workspace, eight: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("mind.figures.latent_map", lambda maps, path, title: drawn.append((list(maps), title)))
    assert tables.draw_latent(comparison.compare(workspace, eight), tmp_path / "latent.png")
    ((names, title),) = drawn
    assert names == list(eight.run.variants) and "In mind" in title


def test_latent_spaces_of_other_rationales_are_not_compared(workspace: Workspace, config: Config) -> None:
    latent_map(0.1).write(workspace.report("base"))
    latent_map(0.4, question="other").write(workspace.report("mind"))
    assert comparison.compare(workspace, config).rows[1].latent == ""


def test_importing_it_is_light() -> None:
    code = "import sys, mind.comparison; sys.exit(any(m in sys.modules for m in ('numpy', 'scipy', 'matplotlib', 'torch', 'sklearn')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
