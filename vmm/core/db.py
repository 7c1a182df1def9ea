"""The database: SQLite on one thread of its own, every transaction durable before it is answered."""

from __future__ import annotations

import asyncio
import concurrent.futures
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from vmm.errors import UserError

T = TypeVar("T")

VERSION = 6


class Database:
    """See vmm.volumes.store.Database."""

    def __init__(self, path: Path) -> None:
        """Open the database, making it if it is not there.

        Raises: UserError when it was written by a newer release, or cannot be opened.
        """
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="database")
        self._connection = self._thread.submit(_open, path).result()

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``work`` in one durable transaction: all of it happens or, when it raises, nothing."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transaction, work)

    def close(self) -> None:
        """Finish what is under way and close the file."""
        self._thread.submit(self._connection.close).result()
        self._thread.shutdown()

    def _transaction(self, work: Callable[[sqlite3.Connection], T]) -> T:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            result = work(self._connection)
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        return result


def _open(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        # Names and specifications in the file are data: no function of the schema may act on them.
        connection.execute("PRAGMA trusted_schema = OFF")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        for number in range(version + 1, VERSION + 1):
            change = Path(__file__).with_name(f"schema-{number}.sql").read_text(encoding="utf-8")
            connection.executescript(f"BEGIN; {change} PRAGMA user_version = {number}; COMMIT;")
        readable = version <= VERSION or _oldest(connection) <= VERSION
    except sqlite3.Error as error:
        raise UserError(f"{path}: {error}") from None
    if not readable:
        connection.close()
        raise UserError(
            f"{path} has version {version}, this release knows {VERSION}", hint="Boot the release that wrote it."
        )
    return connection


def _oldest(connection: sqlite3.Connection) -> int:
    """The oldest version that a newer release left able to use its database. Raises: sqlite3.Error."""
    if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'host'").fetchone():
        return VERSION + 1
    return int(connection.execute("SELECT oldest FROM host").fetchone()[0])
