"""DVC: what is the same. Brings a stage up to date, names the dataset version, derives workspaces for overridden settings.

Called by every door (CLI, Prefect flow); DVC's content hashes are the one cache of the project.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

import mind
from mind import params
from mind.config import merge
from mind.errors import EXIT_FAILED, EXIT_INTERRUPTED, ConfigError, DataError, PassingError, StageError
from mind.outputs import digest_json
from mind.workspace import Workspace

os.environ.setdefault("DVC_NO_ANALYTICS", "1")

GRACE_SECONDS = 20.0
"""For a stage that was told to stop: a step of training and its checkpoint."""


@dataclass(frozen=True)
class Outcome:
    """What it took to bring a stage up to date."""

    target: str
    state: str  # "ran", "restored" (from DVC's run cache) or "up to date"

    @property
    def cached(self) -> bool:
        return self.state != "ran"


def bring_up_to_date(workspace: Workspace, target: str, *, force: bool = False, variables: Mapping[str, str] | None = None) -> Outcome:
    """Run one stage ('snapshot', 'distill@mind') if anything it reads has changed; else restore what is missing.

    Whatever ends this call early (a time limit, SIGTERM) ends the stage's process too, after it has saved its state.

    Args:
        variables: for the environment of the stage's process.

    Raises:
        StageError: the stage failed (its own message went to stderr), with its exit code.
        DataError: an input is missing.
        PassingError: another process works on the same folders; with run.share, the DVC remote does not answer.
    """
    from dvc.exceptions import DvcException, ReproductionError
    from dvc.lock import LockError
    from dvc.stage.exceptions import StageCmdFailedError

    _follow_version(workspace)
    with _repo(workspace) as repo, tempfile.TemporaryDirectory() as folder:
        share = bool(params.read_params(workspace.params).get("run", {}).get("share"))
        trace = Path(folder) / "ran"
        # an idle thread spins for some ten microseconds, the time between two small operations, and sleeps then: for ever costs others
        # their cores, never at all makes training 1.5 times slower (docs/log.md)
        spinning = {} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "20000")}
        own = {"MIND_STAGE_RAN": str(trace), "PATH": _path_with_this_python(), **spinning}
        with environment({**own, **(variables or {})}):
            try:
                with _ending_with_us(trace):
                    changed = repo.reproduce(targets=[target], single_item=True, force=force, pull=share)
            except ReproductionError as error:
                cause = error.__cause__
                if isinstance(cause, StageCmdFailedError):
                    raise _stage_error(target, cause, trace) from None
                if isinstance(cause, LockError):
                    raise _busy(workspace, cause) from None
                if isinstance(cause, TimeoutError):  # the caller's
                    raise cause from None
                raise DataError(f"stage {target}: {cause or error}", do="run the stages before it (`mind run` does all)") from None
            except LockError as error:
                raise _busy(workspace, error) from None
            except DvcException as error:
                raise DataError(f"stage {target}: {error}", do="see `mind doctor`") from None
        if share:
            _push(repo, target)
        state = "ran" if trace.exists() else "restored" if changed else "up to date"
        return Outcome(target, state)


def _push(repo: Any, target: str) -> None:
    """A stage's outputs, and what they were made from, to the default remote; what is there already is not sent again."""
    try:
        repo.push(targets=[target], run_cache=True)
    except Exception as error:  # of any of DVC's storage libraries
        raise PassingError(
            f"{target} is done, but could not be pushed: {error}", do="`dvc push` says more; run again, or set run.share: false"
        ) from error


def stage_targets(variants: Iterable[str]) -> list[str]:
    """The stages of dvc.yaml in the order in which they feed each other."""
    each = [f"{stage}@{variant}" for variant in variants for stage in ("distill", "evaluate")]
    return ["synthesize", "snapshot", *each]


def is_settled(workspace: Workspace, targets: Iterable[str]) -> bool:
    """Whether all of these stages are up to date, their outputs in place: nothing to run and nothing to restore."""
    from dvc.exceptions import DvcException

    _follow_version(workspace)
    with _repo(workspace) as repo:
        try:
            return not repo.status(targets=list(targets))
        except DvcException:  # whatever it is shows, with its reason, when the stage is brought up to date
            return False


def code_in_use() -> str:
    """The text of code.yaml for the mind that runs now."""
    return (
        "# The version of mind that works here. mind writes it whenever it brings a stage up to date, and what another version made is\n"
        "# made again then; `dvc repro` by itself notices a new mind only after that.\n"
        f"mind: {mind.__version__}\n"
    )


def _follow_version(workspace: Workspace) -> None:
    """Where stages depend on code.yaml, make it name the mind that runs now: what another version made is out of date."""
    path, text = workspace.code, code_in_use()
    if path.exists() and path.read_text(encoding="utf-8") != text:
        partial = path.with_name(f".{path.name}.{os.getpid()}")  # whole at any moment: DVC may read it for another stage
        partial.write_text(text, encoding="utf-8")
        with suppress(FileNotFoundError):  # another thread was first
            partial.replace(path)


def _stage_error(target: str, cause: Exception, trace: Path) -> StageError:
    code = _exit_code(cause)
    if code == EXIT_INTERRUPTED:  # DVC shields this process from Ctrl-C while a stage runs: pass it on
        signal.raise_signal(signal.SIGINT)
    reason = trace.read_text(encoding="utf-8") if trace.exists() else ""
    do = "mend what stands above and run again: finished work is kept"
    return StageError(f"stage {target} failed", do=do, exit_code=code, reason=reason or f"exit code {code}")


def _busy(workspace: Workspace, error: Exception) -> PassingError:
    others = ", ".join(line.strip() for line in str(error).splitlines() if line.lstrip().startswith("(PID"))
    found = f"another run works in {workspace.root}"
    return PassingError(f"{found}: {others}" if others else found, do="wait for it to end, and run again")


@contextmanager
def _ending_with_us(trace: Path) -> Iterator[None]:
    """No stage outlives the call that started it: on an exception from outside (time limit, SIGTERM) it is told to stop, and waited for."""
    try:
        yield
    except BaseException:
        import psutil

        from mind.processes import see_off

        stage = [child for child in psutil.Process().children(recursive=True) if _bears(child, trace)]
        for process in stage:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        see_off(stage, GRACE_SECONDS)
        raise


def _bears(process: Any, trace: Path) -> bool:
    import psutil

    try:
        return process.environ().get("MIND_STAGE_RAN") == str(trace)
    except psutil.Error:
        return False


def ensure_data(workspace: Workspace) -> None:
    """Check out data/ at the version that data.dvc pins, from the cache or the remote.

    A data/ that a person changed is left alone: it is their new version, and `dvc add data` pins it.

    Raises:
        DataError: the pinned version is neither in the cache nor in a remote.
    """
    from dvc.exceptions import DvcException

    if workspace.data.exists():
        return
    with _repo(workspace) as repo:
        try:
            repo.pull(targets=["data.dvc"])
        except DvcException as error:
            raise DataError(
                f"data/ cannot be restored: {error}",
                wanted="the version pinned by data.dvc",
                do="`dvc pull data.dvc` from a remote that has it",
            ) from None


def version_of(folder: Path) -> str:
    """The DVC hash of a folder ('<32 hex>.dir'), from its content alone: what dvc.lock records for it."""
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db import HashFileDB
    from dvc_objects.fs.local import LocalFileSystem

    local = LocalFileSystem()
    _, _, built = build(HashFileDB(local, str(folder / ".none")), str(folder), local, "md5", dry_run=True)
    return str(built.hash_info.value)


def stored(workspace: Workspace, version: str) -> dict[str, Path]:
    """The files of a folder at an earlier version ('<32 hex>.dir'), as DVC's cache keeps them: name -> path; empty when it does not."""
    with _repo(workspace) as repo:
        cache = repo.cache.local

        def place(md5: str) -> Path:
            return Path(cache.oid_to_path(md5))

        try:
            listing = json.loads(place(version).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
    return {row["relpath"]: place(row["md5"]) for row in listing}


def made_from(workspace: Workspace, output: str, version: str) -> dict[str, str]:
    """What a folder at `version` was made from: path -> DVC hash, from dvc.lock and the run cache; empty when neither knows."""
    with _repo(workspace) as repo:
        runs = Path(repo.stage_cache.cache_dir)
    yaml = YAML(typ="safe")
    lock = workspace.root / "dvc.lock"
    entries = list((yaml.load(lock) if lock.exists() else {}).get("stages", {}).values())
    for entry in (*entries, *(yaml.load(path) for path in runs.glob("*/*/*"))):
        if any(out["path"] == output and out.get("md5") == version for out in entry.get("outs", ())):
            return {dep["path"]: dep["md5"] for dep in entry.get("deps", ()) if "md5" in dep}
    return {}


def derive(workspace: Workspace, overrides: Mapping[str, Any]) -> Workspace:
    """The workspace for `overrides` on top of this one's settings: `.mind/workspaces/<digest>/` of the home.

    It shares code, data, DVC cache (so equal stages are restored, not run again), reply cache and tracking store.

    Raises:
        ConfigError: the merged settings cannot be used.
    """
    if not overrides:
        return workspace
    merged = merge(params.read_params(workspace.params), overrides)
    params.validate(merged, "params.yaml with --set")
    root = workspace.caches / "workspaces" / digest_json(merged)[:12]
    if not (root / "dvc.yaml").exists():
        partial = root.with_name(f".{root.name}.{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        (partial / ".dvc").mkdir(parents=True)
        (partial / "params.yaml").write_text(params.dump_raw(merged), encoding="utf-8")
        _share_dvc(workspace.home, partial)
        partial.rename(root)
    for shared in ("mind", "benchmarks"):
        if (workspace.home / shared).is_dir() and not (root / shared).is_symlink():
            with suppress(FileExistsError):  # another process was first
                (root / shared).symlink_to(os.path.relpath(workspace.home / shared, root))
    _follow_version(workspace)
    for name in ("dvc.yaml", "data.dvc", ".dvcignore", "code.yaml"):
        if (workspace.root / name).exists():
            shutil.copy2(workspace.root / name, root)
    return Workspace(root)


def derive_over_seeds(
    workspace: Workspace, overrides: Mapping[str, Any], variants: Sequence[str] | None, seeds: Sequence[int]
) -> Workspace:
    """The workspace in which run.variants is each of `variants` (default: what it is here) with each of `seeds`.

    Raises:
        ConfigError: the merged settings cannot be used, or a variant that cannot have another seed.
    """
    config = params.validate(merge(params.read_params(workspace.params), overrides), "params.yaml with --set")
    return derive(workspace, merge(overrides, params.over_seeds(config, variants or config.run.variants, seeds)))


def _share_dvc(home: Path, root: Path) -> None:
    """A DVC repository of its own at `root` that uses the cache and the remotes of `home`."""
    from dvc.config import Config as DvcConfig
    from dvc.config_schema import RelPath

    theirs = DvcConfig(str(home / ".dvc"), validate=False)
    cache = {"dir": RelPath(str(home / ".dvc" / "cache")), **theirs.get("cache", {})}
    with DvcConfig(str(root / ".dvc"), validate=False).edit("repo") as own:
        own["core"] = {**theirs.get("core", {}), "no_scm": True, "analytics": False}
        own["cache"] = cache
        own["remote"] = theirs.get("remote", {})


@contextmanager
def _repo(workspace: Workspace) -> Iterator[Any]:
    """The DVC repository of a workspace, quiet.

    Raises:
        ConfigError: there is none.
    """
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.ERROR)
    try:
        repo = Repo(str(workspace.root), _wait_for_lock=True)  # held for bookkeeping only, not while a stage runs
    except NotDvcRepoError:
        raise ConfigError(
            f"{workspace.root} is not a DVC repository", do="run `dvc init` there (or `dvc init --no-scm` outside git)"
        ) from None
    try:
        with repo, chdir(workspace.root):  # DVC reads targets from the current folder
            yield repo
    finally:
        repo.close()


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables of this process's environment, and of those that it starts, for the length of the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _path_with_this_python() -> str:
    """dvc.yaml says `python`: that must be the interpreter of this process, also when its venv is not activated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _exit_code(failure: Exception) -> int:
    """The exit code that DVC reports in words ('... exited with 2'); a signal's number is negative there, and 128 + n for shells."""
    word = str(failure).rsplit(" ", 1)[-1]
    if not word.lstrip("-").isdigit():
        return EXIT_FAILED
    return int(word) if int(word) >= 0 else 128 - int(word)
