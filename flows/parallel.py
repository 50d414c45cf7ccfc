"""Where the variants run side by side: run.parallel -> a Prefect task runner. Processes of this machine, or a Ray cluster.

Either way a stage is a process of its own that works in the workspace's folder; DVC's lock keeps the bookkeeping apart. On a cluster of
several machines that folder has to be shared (NFS, a cluster's file system).
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner

from mind.config import Parallel
from mind.errors import ConfigError

ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
"""Ray on this machine: on loopback, which it does by itself on Windows and macOS only, and for who has the token in ~/.ray only."""


def runner(settings: Parallel) -> TaskRunner[Any]:
    """The task runner of an engine other than 'none'.

    Raises:
        ConfigError: Ray is not installed.
    """
    if settings.engine == "processes":
        # Ctrl-C leaves the pool's semaphores to Python's resource tracker: it removes them, and would warn of that
        os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
        return ProcessPoolTaskRunner(max_workers=settings.processes)
    if settings.address is None:
        os.environ |= ALONE  # read when Ray is imported, and by the processes that it starts
    try:
        from prefect_ray import RayTaskRunner
    except ImportError:
        raise ConfigError("run.parallel.engine: ray is not installed", do="pip install 'mind-distill[ray]'") from None
    return RayTaskRunner(address=settings.address, init_kwargs={"include_dashboard": False} if settings.address is None else {})


def resources(settings: Parallel) -> AbstractContextManager[Any]:
    """What each task that is submitted in this block takes of the cluster."""
    if settings.engine != "ray":
        return nullcontext()
    from prefect_ray.context import remote_options

    return remote_options(num_cpus=settings.cpus, num_gpus=settings.gpus)
