"""`mind up`: a Prefect server, a worker and MLflow's pages for one workspace, on this machine, until Ctrl-C. Called by the CLI.

Their storage lies in the workspace (.prefect/server, mlflow/), their logs in .mind/services/. What ran before is there after a restart,
and so are the schedules of prefect.yaml.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from mind import prefect_store, store, versioning
from mind.config import Config
from mind.errors import ConfigError, MindError
from mind.processes import see_off
from mind.progress import console
from mind.workspace import Workspace

POOL = "mind"
SERVER = (sys.executable, "-m", "uvicorn", "--factory", "flows.server:app")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("0.0.0.0", "::")
START_SECONDS = 180.0  # a fresh database on a busy machine takes 20
STOP_SECONDS = 25.0  # a stage in progress finishes its step and saves its state
LOG_LINES = 12


@dataclass
class Service:
    """A child process, and how to see that it answers."""

    name: str
    command: Sequence[str]
    answers: Callable[[], bool]
    log: Path
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self, folder: Path) -> None:
        with self.log.open("wb") as log:
            # a session of its own: Ctrl-C reaches only us, and we stop them in order
            self.process = subprocess.Popen(
                self.command,
                cwd=folder,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def ended(self) -> int | None:
        return self.process.poll() if self.process else None

    def wait(self) -> None:
        """Until it answers.

        Raises:
            MindError: it ended, or does not answer in time.
        """
        until = time.monotonic() + START_SECONDS
        while not self.answers():
            if self.ended() is not None:
                raise self.failure()
            if time.monotonic() > until:
                raise MindError(f"{self.name} does not answer after {START_SECONDS:.0f} s", do=f"look into {self.log}")
            time.sleep(0.2)

    def failure(self) -> MindError:
        """What it said last."""
        return MindError(f"{self.name} ended with exit code {self.ended()}:\n{tail(self.log)}", do=f"the whole log is {self.log}")

    def stop(self) -> None:
        """Tell it and all below it to end, the innermost first; what does not listen is killed."""
        if self.process is None or self.process.poll() is not None:
            return
        family = [*psutil.Process(self.process.pid).children(recursive=True)[::-1], psutil.Process(self.process.pid)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGINT if process.pid == self.process.pid else signal.SIGTERM)
        see_off(family, STOP_SECONDS)
        self.process.wait()


def up(workspace: Workspace, config: Config, *, host: str, prefect_port: int | None, mlflow_port: int | None, allow: Sequence[str]) -> None:
    """Start everything, say where it is, and stay until Ctrl-C.

    Args:
        host: the address to listen on; loopback unless told.
        prefect_port, mlflow_port: None = the usual one, or a free one where that is taken.
        allow: further names under which people may reach the pages.

    Raises:
        ConfigError: no prefect.yaml, a port that is taken, or another `mind up` in this workspace.
        MindError: one of them does not start, or ends while the others work.
    """
    if not (workspace.root / "prefect.yaml").exists():
        raise ConfigError(
            f"{workspace.root} has no prefect.yaml", wanted="deployments for the server", do="copy one from a new `mind init`"
        )
    public = public_name(host, allow)
    chosen = (port(host, prefect_port, 4200), port(host, mlflow_port, 5000))
    names = list(dict.fromkeys([*LOOPBACK, host, *allow]))
    with _only_one(workspace):
        store.make_store(workspace, config.tracking)
        services = list(_services(workspace, config, host, chosen, names, public))
        with stopping(services):
            _start(workspace, services)
            _say(workspace, config, public, chosen)
            watch(services)


@contextmanager
def _only_one(workspace: Workspace) -> Iterator[None]:
    """Two servers on one database would each fire its schedules.

    Raises:
        ConfigError: another `mind up` serves this workspace.
    """
    from filelock import FileLock, Timeout

    folder = workspace.caches / "services"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "up.lock", timeout=0)
    try:
        held = lock.acquire()
    except Timeout:
        raise ConfigError(f"`mind up` serves {workspace.home} already", do="use that one, or stop it first") from None
    with held:
        yield


@contextmanager
def temporary(workspace: Workspace) -> Iterator[Service]:
    """A Prefect server for the length of a run in this process; started, not yet waited for.

    Prefect would start one by itself, later and more slowly: it loads the server's code here too, and in each process side by side.
    """
    home, number = workspace.home / ".prefect", port("127.0.0.1", 0, 0)
    prefect_store.prepare(home)
    address = f"http://127.0.0.1:{number}"
    known = {"PREFECT_HOME": str(home), "PREFECT_API_URL": f"{address}/api", "MIND_UNWATCHED": "yes"}
    own = {
        **known,
        "MIND_ALLOWED_HOSTS": ",".join(LOOPBACK),
        "MIND_PARENT": str(os.getpid()),
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
        "PREFECT_SERVER_DATABASE_MIGRATE_ON_START": str(not prefect_store.is_current(home)).lower(),
    }
    logs = workspace.caches / "services"
    logs.mkdir(parents=True, exist_ok=True)
    command = [*SERVER, "--port", str(number), "--log-level", "error"]
    server = Service("Prefect's temporary server", command, lambda: _healthy(f"{address}/api/health"), logs / f"prefect-{number}.log", own)
    server.start(workspace.root)
    try:
        with versioning.environment(known):
            yield server
    finally:
        if server.process is not None:
            server.process.kill()  # nothing of it is needed any more, and its own farewell takes seconds
            server.process.wait()
        server.log.unlink(missing_ok=True)


def watch(services: Sequence[Service]) -> None:
    """Until one of them ends.

    Raises:
        MindError: always; which one, and what it said last.
    """
    while True:
        for service in services:
            if service.ended() is not None:
                raise service.failure()
        time.sleep(0.5)


@contextmanager
def stopping(services: Sequence[Service]) -> Iterator[None]:
    """Whatever ends the block (Ctrl-C, SIGTERM, a failure) stops the services, the last started first."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        console.print("\nstopping; `mind up` again finds everything as it was")
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C would leave processes behind
        for service in reversed(services):
            service.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def public_name(host: str, allow: Sequence[str]) -> str:
    """The name in the addresses that people are told: the first that was allowed, else the address itself.

    Raises:
        ConfigError: all addresses of the machine, and no name for it.
    """
    if host in EVERYWHERE and not allow:
        raise ConfigError(f"--host {host} without a name", wanted="--allow NAME, under which people reach this machine")
    name = allow[0] if allow else host
    return f"[{name}]" if ":" in name else name


def port(host: str, wanted: int | None, usual: int) -> int:
    """The port to listen on: the one that is wanted, or the usual one, or a free one.

    Raises:
        ConfigError: the wanted one is taken.
    """
    for candidate in (usual, 0) if wanted is None else (wanted,):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except OSError as error:
                if wanted is not None:
                    raise ConfigError(
                        f"port {wanted} of {host} cannot be used: {error.strerror}", do="give another, or 0 for a free one"
                    ) from None
                continue
            return int(probe.getsockname()[1])
    raise ConfigError(f"no port of {host} can be used", wanted="an address of this machine")


def tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return "\n".join(f"    {line}" for line in lines[-LOG_LINES:])


def environment(workspace: Workspace, api: str) -> dict[str, str]:
    """What every process of the workspace's Prefect needs: offline, silent towards others, storage in the workspace."""
    return {
        "DO_NOT_TRACK": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_HOME": str(workspace.home / ".prefect" / "server"),
        "PREFECT_API_URL": api,
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }


def _services(
    workspace: Workspace, config: Config, host: str, ports: tuple[int, int], names: Sequence[str], public: str
) -> Iterator[Service]:
    """In the order in which they start."""
    logs = workspace.caches / "services"
    prefect_store.prepare(workspace.home / ".prefect" / "server")
    here = _reached(host)
    prefect, mlflow = f"http://{here}:{ports[0]}", f"http://{here}:{ports[1]}"
    own = environment(workspace, f"{prefect}/api")
    served = {
        "MIND_ALLOWED_HOSTS": ",".join(names),
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{public}:{ports[0]}",
        "PREFECT_SERVER_UI_API_URL": f"http://{public}:{ports[0]}/api",
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
    }
    uvicorn = [*SERVER, "--host", host, "--port", str(ports[0]), "--no-access-log"]
    yield Service("the Prefect server", uvicorn, lambda: _healthy(f"{prefect}/api/health"), logs / "prefect.log", {**own, **served})
    database = store.database_of(workspace, config.tracking)
    if database is not None:
        yield Service("MLflow", _mlflow(database, host, ports[1]), lambda: _healthy(f"{mlflow}/health"), logs / "mlflow.log", _pages(names))
    worker = f"mind-{os.getpid()}"
    start = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process", "--limit", "1", "--name", worker]
    pages = {store.PAGES: f"http://{public}:{ports[1]}"} if database is not None else {}
    yield Service("the worker", start, lambda: _online(own, worker), logs / "worker.log", {**own, **pages})


def _mlflow(database: Path, host: str, number: int) -> list[str]:
    store = ["--backend-store-uri", f"sqlite:///{database}", "--artifacts-destination", str(database.parent / "artifacts")]
    return [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", host, "--port", str(number), *store]


def _pages(names: Sequence[str]) -> dict[str, str]:
    allowed = ",".join(f"{name},{name}:*" for name in names)
    return {
        **store.QUIET,
        "MLFLOW_SERVER_ALLOWED_HOSTS": allowed,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes for features that nothing here uses
    }


def _start(workspace: Workspace, services: Sequence[Service]) -> None:
    """The servers side by side, then the worker, then the deployments of prefect.yaml."""
    *servers, worker = services
    for service in servers:
        service.start(workspace.root)
    for service in servers:
        service.wait()
    worker.start(workspace.root)
    worker.wait()
    deploy(workspace, worker.environment, worker.log.with_name("deploy.log"))


def deploy(workspace: Workspace, variables: Mapping[str, str], log: Path) -> None:
    """Tell the server of the deployments in prefect.yaml.

    Raises:
        MindError: it refuses one of them.
    """
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    with log.open("wb") as file:
        done = subprocess.run(
            command, cwd=workspace.root, env={**os.environ, **variables}, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False
        )
    if done.returncode:
        raise MindError(f"prefect.yaml cannot be deployed:\n{tail(log)}", do=f"mend prefect.yaml; the whole log is {log}")


def _say(workspace: Workspace, config: Config, public: str, ports: tuple[int, int]) -> None:
    prefect = f"http://{public}:{ports[0]}"
    mlflow = f"http://{public}:{ports[1]}" if store.database_of(workspace, config.tracking) else config.tracking.uri
    if public not in LOOPBACK:
        console.print("Whoever reaches these addresses can start runs: neither server asks for a password.", style="yellow")
    places = f"Prefect   {prefect}\nMLflow    {mlflow}\nlogs      {workspace.caches / 'services'}"
    shell = f"    export PREFECT_API_URL={prefect}/api\n    prefect deployment run mind/full --watch"
    console.print(f"{places}\n\nIn another shell:\n\n{shell}\n\nCtrl-C stops all of it.", markup=False)


def _reached(host: str) -> str:
    """Where this machine itself finds a server that listens on `host`."""
    address = "127.0.0.1" if host in EVERYWHERE else host
    return f"[{address}]" if ":" in address else address


def _healthy(address: str) -> bool:
    import httpx

    try:
        return httpx.get(address, timeout=5.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _online(variables: Mapping[str, str], worker: str) -> bool:
    """Whether the server has heard of this worker."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import WorkerFilter, WorkerFilterStatus
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_URL, temporary_settings

    online: Any = WorkerFilter(status=WorkerFilterStatus(any_=["ONLINE"]))
    with temporary_settings({PREFECT_API_URL: variables["PREFECT_API_URL"]}), get_client(sync_client=True) as client:
        try:
            return any(known.name == worker for known in client.read_workers_for_work_pool(POOL, worker_filter=online))
        except PrefectHTTPStatusError:  # the pool is made by the first worker
            return False
