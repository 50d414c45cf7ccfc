"""The training step beside TRL's SFTTrainer: supervised tokens a second, peak memory, and whether the losses are the same.

    python bench/train.py --student FOLDER [--questions 12] [--repeats 5] [--tuning lora] [--dtype float32] [--rivals]
    python bench/train.py --only scale [--sizes 500,20000,200000]

Every measurement is a process of its own, the systems take turns, and medians over the repeats are printed; the first step of each
process is not timed. All get the same token ids: the full starter set's questions, each with its eight views, in the same order, and
one question to a step. `--rivals` makes an environment with TRL in the user's cache folder. Without it only mind's own layouts run.

"Share" is the work that a step has to do (every token once through the student, forward and back), over the time it took, over the rate
of a large matrix product measured in the same run: the work that padding and repeated prompts add counts for nothing. CPU seconds
are there for a machine that other programs use: run with OMP_NUM_THREADS=1 then, so that waiting threads count for nothing.

    trl-padded, trl-grouped, trl-packed   SFTTrainer on the views as rows of their own; eight to a step, or packed to 512 positions
    padded                                mind's oracle: a view is a row
    packed                                mind's layout: a question is a row; uniform weights (method without_fusion)
    mind-all                              MIND on that layout with every view in the gradient: what MetaNet and consistency cost
    mind                                  MIND as params.yaml has it (refresh 1): all eight losses, selection, consistency
    scale                                 datasets of several sizes and a tiny student: start-up, memory, questions a second, checkpoints
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TRL = ("trl==1.16.0", "torch==2.13.0", "transformers==5.23.0", "peft==0.21.0")
ENVIRONMENT = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mind" / "bench" / "trl"
RIVALS = ("trl-padded", "trl-grouped", "trl-packed")
OWN = ("padded", "packed", "mind-all", "mind")
WARM = 1  # steps of a process that are not timed
VIEWS = 8
STEPS = 60  # of a run at scale
LOOKED_AT = 1_000  # questions: before its first step MIND looks at all of them, so larger datasets are measured without


# ------------------------------------------------------------------- workers: one system in one process


def own(job: dict[str, Any]) -> dict[str, Any]:
    """mind's loop, step by step."""
    from mind import params
    from mind.methods import table
    from mind.records import Example
    from mind.students.loading import load_student
    from mind.training import loop

    system, options = job["system"], {"method": "without_fusion"}
    if system.startswith("mind"):
        options = {"method": "mind", "feedback": "answer", "beta": 0.9, "tau_student": 0.1, "consistency": 0.1}
        options |= {"beta": 0.0} if system == "mind-all" else {}
    training = {"layout": "padded" if system == "padded" else "packed", "learning_rate": 1e-4, "log_steps": 1, "warmup_ratio": 0}
    student = {"name": job["student"], "dtype": job["dtype"], "tuning": job["tuning"]}
    settings = params.validate(
        {"student": student, "training": training, "variants": {"x": options}, "run": {"variants": ["x"], "reference": "x"}}
    )
    marks: list[tuple[float, float]] = []
    begin = loop._Run.go

    def timed(run: Any, *args: Any) -> None:
        marks.append(now())
        begin(run, *args)

    loop._Run.go = timed  # type: ignore[method-assign]
    examples = [Example.model_validate(row) for row in job["examples"]]
    done = loop.train(
        load_student(settings.student),
        settings.variant("x"),
        examples,
        table.build,
        log=lambda values, step: marks.append(now()),
    )
    return {**between(itertools.pairwise(marks)), "loss": [row["train/sft"] for row in done.history]}


def now() -> tuple[float, float]:
    """Wall and CPU seconds, of all threads."""
    return time.perf_counter(), time.process_time()


def between(pairs: Iterable[tuple[tuple[float, float], tuple[float, float]]]) -> dict[str, list[float]]:
    """Wall and CPU seconds of each step."""
    steps = [(after[0] - before[0], after[1] - before[1]) for before, after in pairs]
    return {"seconds": [wall for wall, _ in steps], "cpu": [cpu for _, cpu in steps]}


def trl(job: dict[str, Any]) -> dict[str, Any]:
    """TRL's trainer; in its own environment, which knows nothing of mind."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    marks: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            marks.append(now())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append(now())

    packed = job["system"] == "trl-packed"
    rows = [{"input_ids": p + v, "completion_mask": [0] * len(p) + [1] * len(v)} for p, views in job["ids"] for v in views]
    model = AutoModelForCausalLM.from_pretrained(job["student"], dtype=getattr(torch, job["dtype"]))
    settings = SFTConfig(
        output_dir=job["folder"],
        per_device_train_batch_size=2 if packed else VIEWS,
        max_length=512 if packed else 1024,
        packing=packed,
        train_sampling_strategy="group_by_length" if job["system"] == "trl-grouped" else "sequential",
        num_train_epochs=1,
        learning_rate=1e-4,
        lr_scheduler_type="linear",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=job["dtype"] == "bfloat16",
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        completion_only_loss=True,
        disable_tqdm=True,
    )
    shape = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if job["tuning"] == "lora" else None
    tokenizer = AutoTokenizer.from_pretrained(job["student"])
    trainer = SFTTrainer(
        model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=shape, callbacks=[Clock()]
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {**between(zip(marks[::2], marks[1::2], strict=True)), "loss": losses}


def at_scale(job: dict[str, Any]) -> dict[str, Any]:
    """The start and the first steps of a training on `job["dataset"]`; a second call finds its questions tokenised."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from mind import params
    from mind.methods import table
    from mind.records import Example, Rows
    from mind.students.loading import LoadedStudent
    from mind.training import loop
    from mind.versioning import version_of

    class Enough(Exception):
        pass

    tokenizer = AutoTokenizer.from_pretrained(job["student"])
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    student = LoadedStudent(LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)), tokenizer, "tiny")
    settings = params.validate(
        {"variants": {"x": job["options"]}, "run": {"variants": ["x"], "reference": "x"}, "training": {"log_steps": 1}}
    )
    marks: list[float] = []
    memory: list[float] = []
    begin, started = loop._Run.begin, time.perf_counter()

    def starting(run: Any, *args: Any) -> None:
        marks.append(time.perf_counter() - started)
        if not job["steps"]:
            raise Enough
        begin(run, *args)
        memory.append(resident())
        marks.append(time.process_time())

    def stepped(values: Any, step: int) -> None:
        if step == job["steps"]:
            marks.append(time.process_time())
            raise Enough

    loop._Run.begin = starting  # type: ignore[method-assign]
    folder = Path(job["folder"])
    places = {"checkpoints": folder / "checkpoints", "encoded": folder / "encoded"}
    try:
        version_of(folder / "dataset")  # the stage asks for it too
        examples = Rows(folder / "dataset" / "train.jsonl", Example)
        loop.train(student, settings.variant("x"), examples, table.build, log=stepped, **places)
    except Enough:
        memory.append(resident())
    if not job["steps"]:
        return {"start": marks[0]}
    checkpoints = [path.stat().st_size for path in places["checkpoints"].glob("*.pt")]
    shutil.rmtree(places["checkpoints"])
    return {"start": marks[0], "rate": job["steps"] / (marks[2] - marks[1]), "memory": memory, "checkpoint": max(checkpoints)}


def resident() -> float:
    """MB of this process in memory."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) / 1024


def work(path: Path) -> None:
    job = json.loads(path.read_text(encoding="utf-8"))
    found = at_scale(job) if job["system"] == "scale" else trl(job) if job["system"] in RIVALS else own(job)
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    try:
        import torch

        if torch.cuda.is_available():
            found["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
    finally:
        path.with_suffix(".out").write_text(json.dumps(found), encoding="utf-8")


# ------------------------------------------------------------------- the bench


def interpreter(system: str) -> str:
    if system not in RIVALS:
        return sys.executable
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "ready").exists():
        print(f"making an environment with {', '.join(TRL)} in {ENVIRONMENT}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", *TRL], check=True)
        (ENVIRONMENT / "ready").touch()
    return str(python)


def data(student: str, questions: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """The examples, and the same as token ids."""
    from importlib.resources import files

    from transformers import AutoTokenizer

    from mind import config
    from mind.records import Example
    from mind.students.loading import find_student
    from mind.training.layout import encode_example

    folder, _ = find_student(config.Student(name=student))
    rows = [json.loads(line) for line in files("mind.starter").joinpath("train.jsonl").read_text().splitlines()]
    step = max(1, len(rows) // questions)
    examples = [
        Example(id=r["id"], question=r["question"], answer=str(r["answer"]), difficulty=0, views=r["rationales"])
        for r in rows[::step][:questions]
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = [encode_example(tokenizer, example, example.views, i) for i, example in enumerate(examples)]
    ids = [[list(question.prompt), [list(view.ids) for view in question.views.values()]] for question in encoded]
    return [example.model_dump() for example in examples], [str(folder), ids]


def matmul_rate(dtype: str) -> float:
    """GFLOP/s of a matrix product of 1024 x 1024 matrices: what the machine can do."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(1024, 1024, dtype=getattr(torch, dtype), device=device)
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best / 1e9


def measure(system: str, job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps({"folder": folder, **job, "system": system}), encoding="utf-8")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment.setdefault("GOMP_SPINCOUNT", "20000")  # as in mind's stages, for all
        command = [interpreter(system), str(Path(__file__).resolve()), "--work", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
        if done.returncode:
            raise SystemExit(f"{system} failed:\n{done.stderr[-2000:]}")
        return json.loads(path.with_suffix(".out").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--student", default="smollm2-135m")
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tuning", choices=["lora", "full"], default="lora")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rivals", action="store_true")
    parser.add_argument("--only", help="systems, separated by commas; or scale")
    parser.add_argument("--sizes", default="500,20000,200000", help="questions, for scale")
    args = parser.parse_args()
    if args.work:
        work(args.work)
        return
    if args.only == "scale":
        print(scale(args.student, [int(size) for size in args.sizes.split(",")]))
        return
    examples, (folder, ids) = data(args.student, args.questions)
    job = {"student": folder, "examples": examples, "ids": ids, "tuning": args.tuning, "dtype": args.dtype}
    systems = args.only.split(",") if args.only else [*(RIVALS if args.rivals else ()), *OWN]
    for system in systems:
        interpreter(system)
    tokens = sum(len(view) for _, views in ids for view in views)
    found: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    peak, flops = 0.0, necessary(folder, ids, args.tuning)
    for repeat in range(args.repeats):
        for system in systems:
            peak = max(peak, matmul_rate(args.dtype))
            found[system].append(measure(system, job))
            one = found[system][-1]
            print(
                f"repeat {repeat + 1}/{args.repeats}  {system}: {rate(one, tokens):.1f} tokens/s, {rate(one, tokens, 'cpu'):.1f} a CPU second, "
                f"{one['peak_mb']:,.0f} MB, loss {one['loss'][0]:.4f}",
                file=sys.stderr,
                flush=True,
            )
    print(report(found, tokens, ids, args, peak, flops))


def rate(one: dict[str, Any], tokens: int, clock: str = "seconds") -> float:
    """Supervised tokens a second over the timed steps; by the clock `cpu`, a CPU second."""
    seconds = one[clock]
    return tokens * (len(seconds) - WARM) / len(seconds) / sum(seconds[WARM:])


def necessary(folder: str, ids: list[Any], tuning: str) -> float:
    """GFLOP of all questions' steps in matrix products: each token once, a multiplication and an addition a weight and direction.

    Directions: forward, back to the activations, and for weights that learn to them. Attention and adapters are left out (6 % here).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.get_decoder().layers.parameters())
    fed = sum(len(prompt) + sum(len(view) - 1 for view in views) for prompt, views in ids)
    supervised = sum(len(view) for _, views in ids for view in views)
    return 2 * (2 if tuning == "lora" else 3) * (body * fed + head * supervised) / 1e9


def scale(student: str, sizes: list[int]) -> str:
    """Datasets of these sizes: eight short views a question."""

    from mind import config
    from mind.records import PERSPECTIVES
    from mind.students.loading import find_student

    folder, _ = find_student(config.Student(name=student))
    lines = [
        "| questions | method | start-up, s | again, tokens cached, s | questions a CPU second | memory at the start, MB | after 60 steps, MB | checkpoint, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in sizes:
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "dataset").mkdir()
            with (Path(place) / "dataset" / "train.jsonl").open("w", encoding="utf-8") as file:
                for i in range(size):
                    views = {name: f"{i} and {k} make {i + k}. " * (1 + k % 3) for k, name in enumerate(PERSPECTIVES)}
                    row = {"id": str(i), "question": f"What is {i} plus 1?", "answer": str(i + 1), "difficulty": 0, "views": views}
                    file.write(json.dumps(row) + "\n")
            for options in ({"method": "without_fusion"}, {"method": "mind", "refresh": 2})[: 1 if size > LOOKED_AT else 2]:
                job = {"student": str(folder), "folder": place, "options": options}
                first, again = (measure("scale", {**job, "steps": steps}) for steps in (0, STEPS))
                shutil.rmtree(Path(place) / "encoded")
                values = (first["start"], again["start"], again["rate"], *again["memory"], again["checkpoint"] / 1e6)
                lines.append(f"| {size:,} | {options['method']} | " + " | ".join(f"{value:,.1f}" for value in values) + " |")
                print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def report(found: dict[str, list[dict[str, Any]]], tokens: int, ids: list[Any], args: argparse.Namespace, peak: float, flops: float) -> str:
    from importlib.metadata import version

    rates = {system: statistics.median(rate(one, tokens) for one in runs) for system, runs in found.items()}
    cpu = {system: statistics.median(rate(one, tokens, "cpu") for one in runs) for system, runs in found.items()}
    best, best_cpu = (max((values[system] for system in RIVALS if system in values), default=None) for values in (rates, cpu))
    lines = [
        f"{len(ids)} questions x {VIEWS} views, {tokens} supervised tokens; {args.tuning}, {args.dtype}; medians of {args.repeats}, "
        f"{WARM} step of each process not timed",
        f"{platform.machine()}, {os.cpu_count()} cores; torch {version('torch')}, transformers {version('transformers')}; "
        f"matrix product 1024^3: {peak:.0f} GFLOP/s",
        "",
        "| system | supervised tokens/s | least to most | a CPU second | against TRL's best | by CPU time | share of the machine "
        "| peak memory, MB | first loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for system, runs in found.items():
        ratio = f"{rates[system] / best:.2f} | {cpu[system] / best_cpu:.2f}" if best and best_cpu else " | "
        memory = statistics.median(one["peak_mb"] for one in runs)
        spread = sorted(rate(one, tokens) for one in runs)
        share = (
            "" if system == "mind" else f"{rates[system] / tokens * flops / peak:.0%}"
        )  # the views it leaves out of the gradient are no work
        lines.append(
            f"| {system} | {rates[system]:.1f} | {spread[0]:.1f} to {spread[-1]:.1f} | {cpu[system]:.1f} | {ratio} | {share} | {memory:,.0f} | "
            f"{runs[0]['loss'][0]:.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
