"""Processes that we started, and those that they started: seen to their end. Used by the services and by DVC's stages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

import psutil


def runs(process: psutil.Process) -> bool:
    """Not ended. A zombie has: an orphan in a container whose first process asks about none stays one for ever."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def see_off(processes: Sequence[psutil.Process], seconds: float) -> None:
    """Wait until all have ended; kill those that have not within `seconds`."""
    until = time.monotonic() + seconds
    while any(map(runs, processes)) and time.monotonic() < until:
        time.sleep(0.05)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
