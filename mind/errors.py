"""Every error that `mind` raises on purpose. The tree:

MindError                   exit 1   something failed
├── UsageError              exit 2   the command, the configuration or an input file is wrong; trying again cannot help
│   ├── ConfigError                  params.yaml, a `--set`, an unknown variant
│   └── DataError                    a questions file, a benchmark file, a dataset
├── TeacherError            exit 1   the endpoint refused or cannot be used (bad key, unknown model)
├── StudentError            exit 1   a model that cannot be loaded, a damaged adapter
├── StageError              exit 1   a stage failed; its own message stands above
├── OutOfMemoryError        exit 71  orchestrators try it once more, with half the batch
└── PassingError            exit 75  may pass by itself (network, overload): orchestrators retry only this one

A message says what was found, what was wanted and what to do.
"""

from __future__ import annotations

import difflib
import errno
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_MEMORY = 71  # EX_OSERR of sysexits.h: a resource of the system is used up
EXIT_PASSING = 75  # EX_TEMPFAIL of sysexits.h: "try again later"
EXIT_INTERRUPTED = 130  # Ctrl-C, as shells report it
INTERRUPTED = "\nstopped; run the same command again to go on where it was"

DEBUG = "run again as `mind --debug COMMAND`"
FULL = "free some and run again: finished work is kept"
WRITABLE = "work in a folder that can be written: `mind -C FOLDER COMMAND`"
STEPS = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EROFS: WRITABLE,
    errno.EACCES: f"give this user the right to it, or {WRITABLE}",
    errno.EPERM: f"give this user the right to it, or {WRITABLE}",
    errno.ENOENT: "see that the path is right, and `mind doctor` for what else is missing",
}
"""What mends an error of the system that no code of ours has explained; the others want a look with `--debug`."""


class MindError(Exception):
    """An error a user can act on.

    Args:
        found: what is the case, with the offending value and its place.
        wanted: what would have been right.
        do: the next step that mends it.
    """

    exit_code = EXIT_FAILED

    def __init__(self, found: str, *, wanted: str = "", do: str = "") -> None:
        self.found, self.wanted, self.do = found, wanted, do
        lines = [found]
        if wanted:
            lines.append(f"  wanted: {wanted}")
        if do:
            lines.append(f"  to do:  {do}")
        super().__init__("\n".join(lines))


class UsageError(MindError):
    exit_code = EXIT_USAGE


class ConfigError(UsageError):
    pass


class DataError(UsageError):
    pass


class TeacherError(MindError):
    pass


class StudentError(MindError):
    pass


class OutOfMemoryError(MindError):
    exit_code = EXIT_MEMORY


class StageError(MindError):
    """A stage ran in a process of its own and failed; `exit_code` is that process's, `reason` what it said of it (it is on stderr too)."""

    def __init__(self, found: str, *, do: str = "", exit_code: int = EXIT_FAILED, reason: str = "") -> None:
        super().__init__(found, do=do)
        self.exit_code, self.reason = exit_code, reason


class PassingError(MindError):
    exit_code = EXIT_PASSING


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?', for the end of a message about a name that is not among `known`; empty when none is like it."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def of_the_system(error: BaseException) -> OSError | None:
    """The error of the operating system that this one is, or that a library has wrapped in it and that we know a step for."""
    if isinstance(error, OSError):
        return error
    cause = error.__cause__
    while cause is not None and not (isinstance(cause, OSError) and cause.errno in STEPS):
        cause = cause.__cause__
    return cause


def told(error: OSError) -> str:
    """What the system refused, where, and what to do about it."""
    what = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror or str(error)
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{what}\n  to do:  {STEPS.get(error.errno or 0, f'{DEBUG} to see where')}"


@contextmanager
def exit_on_error(debug: bool = False, passing: int = EXIT_FAILED, farewell: str = INTERRUPTED) -> Iterator[None]:
    """The last resort of every command: an error becomes a message on stderr and an exit code, without a traceback.

    With `debug` the traceback is shown. Ctrl-C leaves with 130, as shells expect. `passing` is the code of what may pass by
    itself: a person sees 1, while a stage's process says 75 (or 71 when memory ran out) so that its orchestrator tries again.
    """
    try:
        yield
    except KeyboardInterrupt:
        if farewell:
            print(farewell, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        system = of_the_system(error)
        if debug:
            traceback.print_exc()
        elif isinstance(error, MindError):
            print(f"error: {error}", file=sys.stderr)
        elif system is not None:
            print(f"error: {told(system)}", file=sys.stderr)
        else:
            what = f"{type(error).__name__}: {error}"
            print(f"error: {what}\n  This is a fault in mind. To do: {DEBUG} and report what it shows.", file=sys.stderr)
        code = error.exit_code if isinstance(error, MindError) else EXIT_FAILED
        sys.exit(EXIT_FAILED if passing == EXIT_FAILED and code in (EXIT_PASSING, EXIT_MEMORY) else code)
