"""The same outputs under mind's grader and under lm-evaluation-harness' own scoring of tasks of the same kind.

    python bench/agreement.py reports/base --lm-eval OTHER_VENV/bin/python [--show]

`--lm-eval` names an interpreter that can import lm_eval 0.4.13 (not a dependency of `mind`). Its filters are run as its tasks define them;
MATH goes through math_verify's `parse` and `verify`, as its minerva_math500 does. `--show` prints every disagreement.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mind.benchmarks.loading import load
from mind.grading import Grade, grade
from mind.records import Prediction, Question, read_jsonl
from mind.workspace import Workspace

FILTERS = """
import json, re, string, sys
from lm_eval.filters.extraction import MultiChoiceRegexFilter, RegexFilter

BBH = "((?<=The answer is )(.*)(?=.)|(?<=the answer is )(.*)(?=.)|(?<=The answer: )(.*)(?=.)|(?<=The final answer: )(.*)(?=.))"
TASKS = {
    "number": {
        "gsm8k_cot_zeroshot, strict-match": RegexFilter(regex_pattern=r"The answer is (\\-?[0-9\\.\\,]+)."),
        "gsm8k_cot_zeroshot, flexible-extract": RegexFilter(regex_pattern=r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1),
    },
    "choice": {
        "mmlu_pro, custom-extract": RegexFilter(regex_pattern=r"answer is \\(?([ABCDEFGHIJ])\\)?"),
        "gpqa_cot_zeroshot, flexible-extract": MultiChoiceRegexFilter(
            regex_pattern=r"(\\([A-Z]\\))", group_select=-1, ignore_case=True, ignore_punctuation=True
        ),
    },
    "yesno": {
        "bbh_cot_zeroshot, strict-match": RegexFilter(regex_pattern=BBH),
        "bbh_cot_zeroshot, flexible-extract": RegexFilter(regex_pattern=r"\\b(Yes|No|yes|no)\\b", group_select=-1),
    },
}
IGNORED = {"number": [",", r"\\$", "(?s).*#### ", r"\\.$"], "choice": [], "yesno": [r"\\.$", ",", r"\\\\", "\\n", '"']}


def plain(text, kind):
    for pattern in IGNORED[kind]:
        text = re.sub(pattern, "", text)
    text = text.lower()
    return text.translate(str.maketrans("", "", string.punctuation)) if kind == "choice" else text


rows, found = json.load(sys.stdin), []
for kind, filters in TASKS.items():
    own = [(place, row) for place, row in enumerate(rows) if row["kind"] == kind]
    for name, filter in filters.items():
        taken = filter.apply([[row["output"]] for _, row in own], [{"choices": row["choices"]} for _, row in own])
        for (place, row), (answer,) in zip(own, map(list, taken)):
            found.append([place, name, answer, plain(answer, kind) == plain(row["gold"], kind)])
json.dump(found, sys.stdout)
"""
"""Patterns, normalisation and comparison of the tasks' YAML files."""

MATH = "minerva_math500, math_verify"


@dataclass(frozen=True)
class Verdict:
    """One output, as both see it."""

    row: Prediction
    task: str
    own: Grade
    answer: str
    right: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+", help="folders with predictions.jsonl")
    parser.add_argument("--lm-eval", type=Path, required=True, help="an interpreter that can import lm_eval")
    parser.add_argument("--show", action="store_true", help="every disagreement in full")
    args = parser.parse_args()
    verdicts = judge([row for folder in args.reports for row in read_jsonl(folder / "predictions.jsonl", Prediction)], args.lm_eval)
    print("| benchmark | scoring of | n | right here | right there | alike |\n|---|---|--:|--:|--:|--:|")
    for benchmark, task in dict.fromkeys((verdict.row.benchmark, verdict.task) for verdict in verdicts):
        own = [verdict for verdict in verdicts if (verdict.row.benchmark, verdict.task) == (benchmark, task)]
        counts = [len(own), sum(v.own.correct for v in own), sum(v.right for v in own), sum(v.own.correct == v.right for v in own)]
        print(f"| {benchmark} | {task} | {' | '.join(map(str, counts))} |")
    for verdict in verdicts if args.show else ():
        if verdict.own.correct != verdict.right:
            print(f"\n{verdict.row.benchmark} {verdict.row.id}, {verdict.task}; gold {verdict.row.gold}")
            print(
                f"here {verdict.own.answer} ({verdict.own.correct}), there {verdict.answer!r} ({verdict.right}): ...{verdict.row.output[-240:]!r}"
            )


def judge(rows: Sequence[Prediction], interpreter: Path) -> list[Verdict]:
    questions = {name: _by_id(name) for name in {row.benchmark for row in rows}}
    asked = [questions[row.benchmark][row.id] for row in rows]
    own = [grade(row.output, row.gold, question.kind, question.choices) for row, question in zip(rows, asked, strict=True)]
    given = [
        {"kind": question.kind, "gold": row.gold, "output": row.output, "choices": question.choices}
        for row, question in zip(rows, asked, strict=True)
    ]
    done = subprocess.run([interpreter, "-c", FILTERS], input=json.dumps(given), capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout.splitlines()[-1])
    theirs += [[place, MATH, *_math(row)] for place, (row, question) in enumerate(zip(rows, asked, strict=True)) if question.kind == "math"]
    return [Verdict(rows[place], task, own[place], answer, right) for place, task, answer, right in theirs]


def _by_id(benchmark: str) -> dict[str, Question]:
    return {question.id: question for question in load(benchmark, Workspace(Path.cwd())).questions}


def _math(row: Prediction) -> list[Any]:
    from math_verify import parse, verify

    target = parse(row.output)
    return [str(target[:1]), bool(verify(gold=parse(rf"\boxed{{{row.gold}}}"), target=target))]


if __name__ == "__main__":
    main()
