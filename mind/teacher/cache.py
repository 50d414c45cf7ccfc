"""Every reply that was paid for, by the digest of its request: `.mind/replies.sqlite`. Used by teacher.client and teacher.budget.

Why SQLite in WAL mode and not a JSON Lines file: a reply must be on disk before it counts, two processes may share the cache, and a
million replies must open at once. WAL gives all three: a commit is one append and one fsync (`synchronous=FULL`), a torn tail is
recognised by its checksum and dropped when the file is next opened, readers and one writer do not block each other, and the index is on
disk, so that opening costs nothing and memory stays at a few MiB. An append-only file has the durability, but a million lines to read at
every start and its own locking.

Writes go through one thread that commits whatever has queued up in one transaction, so that fsync is paid per group, not per reply, and
never by the event loop. A reply that was stored first wins: two processes that bought the same request both go on with the same answer.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mind.errors import MindError
from mind.progress import console
from mind.teacher.replies import Reply

VERSION = 1
BUSY_SECONDS = 60.0
GROUP = 512  # most writes in one transaction

SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, reply TEXT NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS ledger (usd REAL, prompt_tokens INTEGER, completion_tokens INTEGER, requests INTEGER);
CREATE TABLE IF NOT EXISTS calls (id INTEGER PRIMARY KEY AUTOINCREMENT, usd REAL, tokens INTEGER, requests INTEGER);
CREATE TABLE IF NOT EXISTS batches (job TEXT PRIMARY KEY, endpoint TEXT NOT NULL, batch TEXT, call INTEGER);
INSERT INTO ledger SELECT 0, 0, 0, 0 WHERE NOT EXISTS (SELECT 1 FROM ledger);
"""

T = TypeVar("T")
Write = Callable[[sqlite3.Connection], T]


@dataclass(frozen=True)
class Spent:
    """What was bought, in all. `open_*`: the worst case of calls that were sent and not settled (in flight, or lost by a kill)."""

    usd: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0
    open_usd: float = 0.0
    open_tokens: int = 0
    open_requests: int = 0


class ReplyCache:
    """Replies by key, and the ledger of what they cost. `get` from the thread that made it; `write` from any.

    Raises:
        MindError: the file cannot be opened or was written by a newer mind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = _open_or_salvage(path)
        self._jobs: queue.SimpleQueue[tuple[Write[Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="reply-cache", daemon=True)
        self._thread.start()

    def get(self, key: str) -> Reply | None:
        """The stored reply; None when there is none, or when its row is damaged (it is then bought again)."""
        try:
            row = self._reader.execute("SELECT reply, crc FROM replies WHERE key = ?", (bytes.fromhex(key),)).fetchone()
        except sqlite3.DatabaseError as error:
            raise self._fault(error) from error
        return _decode(row)

    def count(self) -> int:
        return int(self._reader.execute("SELECT count(*) FROM replies").fetchone()[0])

    def spent(self) -> Spent:
        return read_spent(self._reader)

    def mean_completion(self, sample: int = 200) -> float | None:
        """Mean completion tokens of the newest `sample` replies: what a forecast goes by. None without any."""
        rows = self._reader.execute("SELECT reply, crc FROM replies ORDER BY rowid DESC LIMIT ?", (sample,)).fetchall()
        counts = [reply.completion_tokens for reply in map(_decode, rows) if reply]
        return sum(counts) / len(counts) if counts else None

    def write(self, job: Write[T]) -> Future[T]:
        """Run `job` in the next transaction; the future is done when that is on disk. A cancelled future's job is run all the same."""
        future: Future[T] = Future()
        self._jobs.put((job, future))
        return future

    def close(self) -> None:
        """Finish what is queued."""
        self._jobs.put(None)
        self._thread.join()
        self._reader.close()

    def __enter__(self) -> ReplyCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        connection = _connect(self.path)
        try:
            while jobs := self._next_group():
                self._commit(connection, [job for job in jobs if job is not None])
                if None in jobs:
                    return
        finally:
            connection.close()

    def _next_group(self) -> list[tuple[Write[Any], Future[Any]] | None]:
        jobs = [self._jobs.get()]
        with suppress(queue.Empty):
            while len(jobs) < GROUP and jobs[-1] is not None:
                jobs.append(self._jobs.get_nowait())
        return jobs

    def _commit(self, connection: sqlite3.Connection, jobs: list[tuple[Write[Any], Future[Any]]]) -> None:
        try:
            with transaction(connection):
                results = [job(connection) for job, _ in jobs]
        except Exception as error:  # whatever it is belongs to those who wait; this thread must go on
            fault = self._fault(error) if isinstance(error, sqlite3.Error) else error
            for _, future in jobs:
                if future.set_running_or_notify_cancel():
                    future.set_exception(fault)
            return
        for (_, future), result in zip(jobs, results, strict=True):
            if future.set_running_or_notify_cancel():
                future.set_result(result)

    def _fault(self, error: sqlite3.Error) -> MindError:
        if isinstance(error, sqlite3.OperationalError):  # full disk, read-only folder, locked for too long
            return MindError(f"cannot write {self.path}: {error}", do="free some space, or check the folder's rights, and run again")
        _marker(self.path).touch()
        return MindError(f"{self.path} is damaged: {error}", do="run again: what is readable is then saved into a new file")


def keep(connection: sqlite3.Connection, key: str, reply: Reply, usd: float, call: int | None = None) -> Reply:
    """Store a bought reply and what it cost, and settle its open call; return the reply that stands under `key`."""
    connection.execute(
        "UPDATE ledger SET usd = usd + ?, requests = requests + 1,"
        " prompt_tokens = prompt_tokens + ?, completion_tokens = completion_tokens + ?",
        (usd, reply.prompt_tokens, reply.completion_tokens),
    )
    if call is not None:
        connection.execute("DELETE FROM calls WHERE id = ?", (call,))
    stored = _decode(connection.execute("SELECT reply, crc FROM replies WHERE key = ?", (bytes.fromhex(key),)).fetchone())
    if stored is None:
        text = reply.dump()
        connection.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", (bytes.fromhex(key), text, _crc(text)))
    return stored or reply


def read_spent(connection: sqlite3.Connection) -> Spent:
    usd, prompt, completion, requests = connection.execute("SELECT usd, prompt_tokens, completion_tokens, requests FROM ledger").fetchone()
    open_usd, open_tokens, open_requests = connection.execute("SELECT total(usd), total(tokens), total(requests) FROM calls").fetchone()
    return Spent(usd, prompt, completion, requests, open_usd, int(open_tokens), int(open_requests))


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Write lock from the start, so that a check and the write that follows it are one step for all processes."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        with suppress(sqlite3.Error):  # SQLite has rolled back by itself after some errors
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _crc(text: str) -> int:
    return zlib.crc32(text.encode())


def _decode(row: tuple[str, int] | None) -> Reply | None:
    if row is None or not isinstance(row[0], str) or _crc(row[0]) != row[1]:
        return None
    try:
        return Reply.load(row[0])
    except (ValueError, TypeError):
        return None


# -------------------------------------------------------------------- opening


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    _write_ahead(connection)
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _write_ahead(connection: sqlite3.Connection) -> None:
    """WAL mode. Several processes may open a new file at once, and for this one change SQLite does not wait for the others."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = _connect(path)
    found = connection.execute("PRAGMA user_version").fetchone()[0]
    if found > VERSION:
        connection.close()
        raise MindError(f"{path} was written by a newer mind (format {found})", wanted=f"format {VERSION}", do="update mind-distill")
    with transaction(connection):
        for statement in SCHEMA.strip().split(";\n"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {VERSION}")
    return connection


def _open_or_salvage(path: Path) -> sqlite3.Connection:
    try:
        if not _marker(path).exists():
            return _open(path)
    except sqlite3.OperationalError as error:
        raise MindError(f"cannot open {path}: {error}", wanted="a writable folder on a local disk") from error
    except sqlite3.DatabaseError as error:
        console.print(f"{path} is damaged ({error})", style="yellow", markup=False)
    return _salvage(path)


def _salvage(path: Path) -> sqlite3.Connection:
    """Copy what is readable of a damaged file into a new one: replies, what they cost, open calls and batches. The old one is kept."""
    damaged = path.with_name(f"{path.name}.damaged")
    path.replace(damaged)
    for suffix in ("-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).replace(damaged.with_name(damaged.name + suffix))
    connection = _open(path)
    with transaction(connection):
        for key, text, crc in _readable(damaged, "replies"):
            if _decode((text, crc)):
                connection.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", (key, text, crc))
        for table in ("calls", "batches"):
            connection.executemany(f"INSERT OR IGNORE INTO {table} VALUES (?, ?, ?, ?)", _readable(damaged, table))
        ledger = next(_readable(damaged, "ledger"), None)
        if ledger:
            connection.execute("UPDATE ledger SET (usd, prompt_tokens, completion_tokens, requests) = (?, ?, ?, ?)", ledger)
        saved = connection.execute("SELECT count(*) FROM replies").fetchone()[0]
    _marker(path).unlink(missing_ok=True)
    lost = "" if ledger else "; what they cost cannot be read, teacher.budget counts from zero"
    console.print(f"saved {saved} replies of a damaged cache{lost}; the old file is {damaged}", style="yellow", markup=False)
    return connection


def _readable(path: Path, table: str) -> Iterator[tuple[Any, ...]]:
    """Rows from the beginning, then backwards from the end: a damaged page in the middle hides only itself."""
    with suppress(sqlite3.Error):
        connection = sqlite3.connect(path)
        for order in ("ASC", "DESC"):
            with suppress(sqlite3.Error):
                yield from connection.execute(f"SELECT * FROM {table} ORDER BY rowid {order}")


def _marker(path: Path) -> Path:
    return path.with_name(f"{path.name}.must-be-salvaged")
