"""How fast, how robust and how economical synthesis is, side by side with plain asyncio, bespokelabs-curator and distilabel.

    python bench/synthesize.py                         all scenarios: mind and plain asyncio
    python bench/synthesize.py --rivals                the two rivals too, each in an environment of its own, made on first use
    python bench/synthesize.py --only steady,changes   some scenarios; --repeats 1 --small for a quick look

Every system asks the same embedded teacher (a process of its own) the same requests, through one driver each (`drive_*` below), in a fresh
process with an empty cache; runs of different systems alternate. Seconds are those of the asking alone: imports, environments and for curator
the making of its client are left out; distilabel's pipeline starts its own processes when it is run, and that is in.

The scenarios: `steady` 0.2 s a call, 64 in flight; `wide` 0.1 s, 256 in flight; `limited` 429 above a hidden 8 in flight, 0.1 s, client width
64; `stumbling` 2 % failures and 5 s more for 1 %; `kills` kill -9 at random points, then once more to the end; `changes` one prompt, one
parameter, one row; `memory` a million cached replies.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RIVALS = {"curator": ["bespokelabs-curator==0.1.31"], "distilabel": ["distilabel[openai]==1.5.3", "requests"]}
"""distilabel needs `requests` and does not ask for it."""

ENVIRONMENTS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mind" / "bench"
GIVE_UP = 240  # seconds for one run of one system
Job = dict[str, Any]
Result = dict[str, Any]


# -------------------------------------------------------------------- drivers
# Each takes a job {url, width, rows, prompts, temperature, folder}, asks for every row and returns {seconds, kept, ...}. A row is
# {question: {id, question, answer}, perspective}. They run in the environment of their system: imports are inside.


def drive_mind(job: Job) -> Result:
    """The whole stage: asking, judging, the durable cache, the rows on disk."""
    import openai

    from mind.params import validate
    from mind.stages import synthesize
    from mind.teacher import client, perspectives
    from mind.workspace import Workspace

    assert openai.AsyncOpenAI and openai.DefaultAioHttpClient  # imported before the clock starts, as for the others
    perspectives.PROMPTS.update(job["prompts"])
    questions = list({row["question"]["id"]: row["question"] for row in job["rows"]}.values())
    place = Workspace(Path(job["folder"]))
    pool = place.data / "questions" / "bench.jsonl"
    pool.parent.mkdir(parents=True, exist_ok=True)
    pool.write_text("".join(json.dumps(question) + "\n" for question in questions))
    teacher = {"base_url": job["url"], "in_flight": job["width"], "temperature": job["temperature"], "retries": 20}
    times: list[float] = []
    send = client.Client._send

    async def timed(self: client.Client, *args: Any) -> Any:
        started = time.perf_counter()
        reply = await send(self, *args)
        times.append(time.perf_counter() - started)
        return reply

    client.Client._send = timed  # type: ignore[method-assign]
    client._certificates()  # read when a client is made
    started = time.perf_counter()
    outcome = synthesize.write(validate({"teacher": teacher, "synthesis": {"questions": "bench"}}), place)
    seconds = time.perf_counter() - started
    rows = (place.rationales / "rationales.jsonl").read_bytes()
    return {"seconds": seconds, "kept": outcome.tally.used["calls"], "times": times, "digest": hashlib.sha256(rows).hexdigest()}


def drive_asyncio(job: Job) -> Result:
    """What one writes in ten minutes: the openai client, a semaphore, gather; no cache, nothing durable."""
    import asyncio

    import openai

    times: list[float] = []

    async def main() -> tuple[float, list[str]]:
        client = openai.AsyncOpenAI(base_url=job["url"], api_key="x", max_retries=20, timeout=60)
        assert client.chat.completions
        places = asyncio.Semaphore(job["width"])

        async def one(row: dict[str, Any]) -> str:
            async with places:
                started = time.perf_counter()
                reply = await client.chat.completions.create(
                    model="recorded", messages=_messages(job, row), max_tokens=1024, temperature=job["temperature"]
                )
                times.append(time.perf_counter() - started)
                return reply.choices[0].message.content or ""

        started = time.perf_counter()
        texts = await asyncio.gather(*(one(row) for row in job["rows"]))
        return time.perf_counter() - started, texts

    seconds, texts = asyncio.run(main())
    return {"seconds": seconds, "kept": sum(map(bool, texts)), "times": times}


def drive_curator(job: Job) -> Result:
    """Its LiteLLM backend (its OpenAI backend downloads a tokenizer), limits raised, the shortest pause after a 429 that it takes."""
    os.environ |= {"CURATOR_CACHE_DIR": f"{job['folder']}/curator", "CURATOR_DISABLE_RICH_DISPLAY": "1", "TELEMETRY_ENABLED": "false"}
    os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "x"}
    from bespokelabs import curator

    class Ask(curator.LLM):
        def prompt(self, row: dict[str, Any]) -> list[dict[str, str]]:
            return _messages(job, row)

        def parse(self, row: dict[str, Any], response: str) -> dict[str, str]:
            return {"text": response}

    width = job["width"]
    limits = {"max_requests_per_minute": 10**7, "max_tokens_per_minute": 10**10, "max_concurrent_requests": width}
    backend = {"base_url": job["url"], "api_key": "x", "max_retries": 20, "seconds_to_pause_on_rate_limit": 1, **limits}
    generation = {"temperature": job["temperature"], "max_tokens": 1024}
    llm = Ask("openai/recorded", backend="litellm", backend_params=backend, generation_params=generation)
    rows = [{"question": row["question"], "perspective": row["perspective"]} for row in job["rows"]]
    started = time.perf_counter()
    response = llm(rows)
    return {"seconds": time.perf_counter() - started, "kept": len(response.dataset)}


def drive_distilabel(job: Job) -> Result:
    """Batches as wide as the width; the client's own retries raised."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{job['folder']}/hf"}
    from distilabel.models import OpenAILLM
    from distilabel.pipeline import Pipeline
    from distilabel.steps import LoadDataFromDicts
    from distilabel.steps.tasks import TextGeneration

    rows = [{"system_prompt": job["prompts"][row["perspective"]], "instruction": row["question"]["question"]} for row in job["rows"]]
    generation = {"temperature": job["temperature"], "max_new_tokens": 1024}
    started = time.perf_counter()
    with Pipeline("bench", cache_dir=f"{job['folder']}/distilabel") as pipeline:
        load = LoadDataFromDicts(data=rows, batch_size=job["width"])
        llm = OpenAILLM(model="recorded", base_url=job["url"], api_key="x", max_retries=20, generation_kwargs=generation)
        load >> TextGeneration(llm=llm, input_batch_size=job["width"])
    distiset = pipeline.run(use_cache=True)
    return {"seconds": time.perf_counter() - started, "kept": sum(map(bool, distiset["default"]["train"]["generation"]))}


DRIVERS: dict[str, Callable[[Job], Result]] = {
    "mind": drive_mind,
    "asyncio": drive_asyncio,
    "curator": drive_curator,
    "distilabel": drive_distilabel,
}


def _messages(job: Job, row: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": "system", "content": job["prompts"][row["perspective"]]}, {"role": "user", "content": row["question"]["question"]}]


# ------------------------------------------------------------- teacher, systems


@dataclass
class Teacher:
    """The embedded teacher in a process of its own."""

    url: str
    process: subprocess.Popen[str]

    def stats(self) -> dict[str, int]:
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/stats") as answer:
            return dict(json.load(answer))

    def cpu(self) -> float:
        """CPU seconds of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def teacher(**behaviour: Any) -> Iterator[Teacher]:
    code = f"from mind.teacher.server import serve; serve(port=0, unknown='Hello.', **{behaviour!r})"  # curator says hello first
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    url = process.stdout.readline().split(" at ")[1].split(": ")[0]
    try:
        yield Teacher(url, process)
    finally:
        process.kill()
        process.wait()


@dataclass
class System:
    """One of the compared, with the interpreter that can run it."""

    name: str
    python: Path

    def start(self, job: Job) -> subprocess.Popen[str]:
        folder = Path(job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.json").write_text(json.dumps(job))
        command = [str(self.python), __file__, "--drive", self.name, "--job", str(folder / "job.json")]
        quiet = subprocess.DEVNULL
        return subprocess.Popen(command, stdout=quiet, stderr=(folder / "log").open("a"), text=True, start_new_session=True)

    def run(self, job: Job) -> Result:
        """A whole run; {"failed": why} when it ended badly or not at all."""
        result = Path(job["folder"]) / "result.json"
        result.unlink(missing_ok=True)
        process = self.start(job)
        try:
            code = process.wait(GIVE_UP)
        except subprocess.TimeoutExpired:
            kill(process)
            return {"failed": f"stopped after {GIVE_UP} s"}
        kill(process)  # what it may have left behind
        return json.loads(result.read_text()) if code == 0 and result.exists() else {"failed": f"exit code {code}"}


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9 of the process and all its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def systems(with_rivals: bool) -> list[System]:
    found = [System("mind", Path(sys.executable)), System("asyncio", Path(sys.executable))]
    for name, packages in RIVALS.items() if with_rivals else ():
        python = ENVIRONMENTS / name / "bin" / "python"
        marker = ENVIRONMENTS / name / "ready"
        try:
            if not marker.exists():
                print(f"making the environment of {name} ({', '.join(packages)}) in {ENVIRONMENTS / name}", flush=True)
                subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENTS / name], check=True)
                subprocess.run([python, "-m", "pip", "install", "-qq", *packages], check=True)
                marker.touch()
            found.append(System(name, python))
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"without {name}: {error}")
    if not with_rivals:
        print("without curator and distilabel (--rivals)")
    return found


def workload(count: int) -> list[dict[str, Any]]:
    """`count` rows over the recorded questions, eight views each."""
    from mind.records import PERSPECTIVES
    from mind.teacher.recorded import starter_corpus

    entries = starter_corpus().entries[: -(-count // len(PERSPECTIVES))]
    questions = [{"id": e.id, "question": e.question, "answer": e.answer} for e in entries]
    return [{"question": question, "perspective": p} for question in questions for p in PERSPECTIVES][:count]


def a_job(url: str, folder: Path, rows: list[dict[str, Any]], width: int) -> Job:
    from mind.teacher.perspectives import PROMPTS

    return {"url": url, "folder": str(folder), "rows": rows, "width": width, "prompts": dict(PROMPTS), "temperature": 0.7}


# ------------------------------------------------------------------ scenarios


@dataclass
class Bench:
    systems: list[System]
    repeats: int
    scale: float  # of the number of requests
    folder: Path
    results: dict[str, Any] = field(default_factory=dict)
    _number: int = 0

    def fresh(self) -> Path:
        self._number += 1
        return self.folder / str(self._number)

    def timed(self, name: str, count: int, width: int, ideal: float, **behaviour: Any) -> None:
        """Run every system `repeats` times, in turn; report medians."""
        rows = workload(max(64, int(count * self.scale)))
        ideal *= len(rows) / count
        found: dict[str, list[Result]] = {system.name: [] for system in self.systems}
        for _ in range(self.repeats):
            for system in self.systems:
                folder = self.fresh()
                with teacher(**behaviour) as server:
                    before = server.cpu()
                    result = system.run(a_job(server.url, folder, rows, width))
                    stats = server.stats()
                    found[system.name].append(
                        result | {"calls": stats["calls"], "peak": stats["peak"], "server_cpu": server.cpu() - before}
                    )
                shutil.rmtree(folder, ignore_errors=True)
        self.results[name] = table = {"requests": len(rows), "ideal": ideal}
        print(f"\n{name}: {len(rows)} requests, {width} in flight, {behaviour}; ideal {ideal:.2f} s")
        plain = median(found["asyncio"], "seconds")
        for system, results in found.items():
            table[system] = row = summary(results, len(rows))
            if "seconds" not in row:
                print(f"  {system:<11} failed: {row['failed']}")
                continue
            against = f"{row['seconds'] / plain:5.2f} x asyncio" if plain else ""
            print(
                f"  {system:<11} {row['seconds']:7.2f} s ({row['spread']})  {row['seconds'] / ideal:5.2f} x ideal  {against}  "
                f"{row['calls_a_reply']:.3f} calls a reply  peak {row['peak']}  cpu {row['cpu']:.1f} s, server {row['server_cpu']:.1f} s"
                + (f"  p99 of the quick {row['p99']:.3f} s" if row["p99"] else "")
                + (f"  ({row['failed']})" if row.get("failed") else "")
            )

    def kills(self, kills: int = 10) -> None:
        """kill -9 once at a random point of a run, then a run to the end: what was bought twice, lost, and whether the bytes are the same."""
        rows, width, dice = workload(max(64, int(2000 * self.scale))), 64, random.Random(17)
        print(f"\nkills: {len(rows)} requests, {width} in flight, 0.05 s; one kill -9 at a random point, then to the end")
        self.results["kills"] = table = {}
        for system in self.systems:
            if system.name == "asyncio":
                continue
            count = kills if system.name == "mind" else min(kills, 3)
            with teacher(latency=0.05) as server:
                unkilled = system.run(a_job(server.url, self.fresh(), rows, width)).get("digest")
                outcomes = [self._one_kill(system, server, rows, width, dice) for _ in range(count)]
            table[system.name] = outcomes
            twice, whole = [o["bought_twice"] for o in outcomes if "kept" in o], sum(o.get("kept") == len(rows) for o in outcomes)
            print(f"  {system.name:<11} {whole} of {count} finished with all rows; bought twice: {twice}", end="")
            failed = [o["failed"] for o in outcomes if "failed" in o]
            print(f"; {failed}" if failed else "", end="")
            print(
                f"; bytes of the unkilled run: {sum(o.get('digest') == unkilled for o in outcomes)} of {count}" if unkilled else "",
                flush=True,
            )

    def _one_kill(self, system: System, server: Teacher, rows: list[dict[str, Any]], width: int, dice: random.Random) -> Result:
        job, start = a_job(server.url, self.fresh(), rows, width), server.stats()["answered"]
        target = start + dice.randint(width, len(rows) - width)
        process = system.start(job)
        deadline = time.monotonic() + GIVE_UP
        while server.stats()["answered"] < target and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        kill(process)
        time.sleep(0.2)  # calls in flight end at the server
        killed_at = server.stats()["answered"] - start
        result = system.run(job)
        twice = server.stats()["answered"] - start - len(rows)
        return {"killed_at": killed_at, "bought_twice": twice, **{k: result[k] for k in ("kept", "failed", "digest") if k in result}}

    def changes(self) -> None:
        """What is asked again after a change, against what the change touches."""
        rows = workload(160)
        prompts = a_job("", Path(), rows, 1)["prompts"]
        edited = {"prompts": prompts | {"analogy": prompts["analogy"] + " Be brief."}}
        further = {"rows": workload(168)}
        cases = {
            "one prompt of eight": (edited, 20),
            "temperature": ({"temperature": 0.3}, 160),
            "one question more": (further, 8),
            "nothing": ({}, 0),
        }
        print("\nchanges: 160 requests done, then one change; calls sent (those that the change touches)")
        self.results["changes"] = table = {}
        for system in self.systems:
            if system.name == "asyncio":
                continue
            table[system.name] = own = {}
            for case, (change, touched) in cases.items():
                folder = self.fresh()
                with teacher() as server:
                    first = system.run(a_job(server.url, folder, rows, 16))
                    before = server.stats()["answered"]
                    again = system.run(a_job(server.url, folder, rows, 16) | change)
                    failed = first.get("failed") or again.get("failed")
                    own[case] = {
                        "sent": server.stats()["answered"] - before,
                        "touched": touched,
                        "kept": again.get("kept"),
                        "failed": failed,
                    }
            print(f"  {system.name:<11} " + "; ".join(f"{case}: {r['failed'] or r['sent']} ({r['touched']})" for case, r in own.items()))

    def memory(self) -> None:
        """Open a cache of a million replies, find ten thousand of them."""
        count = int(1_000_000 * self.scale)
        path = self.folder / "million.sqlite"
        code = f"import runpy; runpy.run_path({__file__!r})['fill']({str(path)!r}, {count})"
        subprocess.run([sys.executable, "-c", code], check=True)
        code = f"import runpy; runpy.run_path({__file__!r})['look_up']({str(path)!r}, {count})"
        found = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        self.results["memory"] = found | {"replies": count, "bytes": path.stat().st_size}
        print(
            f"\nmemory: {count:,} replies, file {path.stat().st_size / 2**20:.0f} MiB: first reply after {found['open']:.2f} s, "
            f"10,000 look-ups {found['look_up']:.2f} s, resident {found['mib']:.0f} MiB"
        )
        path.unlink()


def fill(path: str, count: int) -> None:
    from mind.teacher.cache import ReplyCache, keep
    from mind.teacher.replies import Reply

    def some(start: int) -> Callable[[Any], None]:
        def write(connection: Any) -> None:
            for number in range(start, min(start + 10_000, count)):
                reply = Reply(f"{number} and 1 make {number + 1}.\nThe answer is {number + 1}.", prompt_tokens=250, completion_tokens=16)
                keep(connection, hashlib.sha256(str(number).encode()).hexdigest(), reply, 0.0001)

        return write

    with ReplyCache(Path(path)) as cache:
        for start in range(0, count, 10_000):
            cache.write(some(start)).result()


def look_up(path: str, count: int) -> None:
    from mind.teacher.cache import ReplyCache

    def key() -> str:
        return hashlib.sha256(str(random.randrange(count)).encode()).hexdigest()

    started = time.perf_counter()
    with ReplyCache(Path(path)) as cache:
        assert cache.get(key()) and cache.spent().requests == count
        opened = time.perf_counter()
        assert all(cache.get(key()) for _ in range(10_000))
        seconds = time.perf_counter() - opened
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"open": opened - started, "look_up": seconds, "mib": mib}))


# --------------------------------------------------------------------- report


def median(results: list[Result], key: str) -> float | None:
    values = [result[key] for result in results if key in result]
    return statistics.median(values) if values else None


def summary(results: list[Result], count: int) -> Result:
    good = [result for result in results if "seconds" in result]
    failed = next((result["failed"] for result in results if "failed" in result), None)
    if not good:
        return {"failed": failed, "runs": len(results)}
    seconds = sorted(result["seconds"] for result in good)
    quick = sorted(t for result in good for t in result.get("times", ()) if t < 4)
    return {
        "seconds": statistics.median(seconds),
        "spread": f"{seconds[0]:.2f}-{seconds[-1]:.2f}",
        "calls_a_reply": statistics.median(result["calls"] / max(1, result["kept"]) for result in good),
        "kept": min(result["kept"] for result in good),
        "peak": max(result["peak"] for result in good),
        "cpu": statistics.median(result["cpu"] for result in good),
        "server_cpu": statistics.median(result["server_cpu"] for result in good),
        "p99": quick[int(0.99 * len(quick))] if quick else None,
        "runs": len(good),
        **({"failed": f"{len(results) - len(good)} runs: {failed}"} if failed else {}),
        **({"incomplete": True} if any(result["kept"] < count for result in good) else {}),
    }


def drive(name: str, path: Path) -> None:
    """The inside of one run, in the environment of its system."""
    job = json.loads(path.read_text())
    result = DRIVERS[name](job)
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    result["cpu"] = sum(u.ru_utime + u.ru_stime for u in usage)
    (path.parent / "result.json").write_text(json.dumps(result))


SCENARIOS: dict[str, Callable[[Bench], None]] = {
    "steady": lambda b: b.timed("steady", 2000, 64, 2000 * 0.2 / 64, latency=0.2),
    "wide": lambda b: b.timed("wide", 2000, 256, 2000 * 0.1 / 256, latency=0.1),
    "limited": lambda b: b.timed("limited", 200, 64, 2.5, latency=0.1, max_in_flight=8),
    "stumbling": lambda b: b.timed(
        "stumbling", 2000, 64, (2000 * 0.2 + 20 * 5) / 64, latency=0.2, fail_rate=0.02, slow_rate=0.01, slow=5.0
    ),
    "kills": Bench.kills,
    "changes": Bench.changes,
    "memory": Bench.memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SCENARIOS), help="scenarios, separated by commas")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a tenth of the requests")
    parser.add_argument("--rivals", action="store_true", help="curator and distilabel too")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--drive", choices=DRIVERS, help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        drive(args.drive, args.job)
        return
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, Python {platform.python_version()}, median of {args.repeats}")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(systems(args.rivals), args.repeats, 0.1 if args.small else 1.0, Path(folder))
        for name in args.only.split(","):
            SCENARIOS[name](bench)
    if args.out:
        args.out.write_text(json.dumps(bench.results | {"load": load, "rivals": RIVALS}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
