"""Where Optuna's studies are stored: a database that one driver writes, and that others read without changing it."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any
from urllib.parse import quote

from safecl.base import ConfigError, PrerequisiteError, sqlite_path


def open_storage(url: str) -> Any:
    """Opens Optuna's storage at a database URL. The studies of one driver share it. SQLite waits up to 60 seconds for
    locks.

    Raises:
        ConfigError, PrerequisiteError: the address is none of a database, or no database answers there.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    with _reached(url):
        return optuna.storages.RDBStorage(url, engine_kwargs=options)


def open_to_read(url: str) -> Any:
    """Returns a copy of what Optuna's storage at a database URL holds now. An SQLite file is opened read-only and read
    into memory, so nothing is written to it. None if the file does not exist yet."""
    import optuna
    from sqlalchemy.pool import StaticPool

    file = sqlite_path(url)
    if file is None:
        return _open_existing(url)
    file = file.absolute()
    if not file.exists():
        return None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    memory = sqlite3.connect(":memory:", check_same_thread=False)
    try:
        _read_into(memory, f"file:{quote(str(file))}?mode=ro")
    except sqlite3.OperationalError:  # the writer died; only a writer can roll back, so a copy is rolled back
        with tempfile.TemporaryDirectory() as folder:
            for part in (file, file.with_name(f"{file.name}-journal"), file.with_name(f"{file.name}-wal")):
                with suppress(FileNotFoundError):
                    shutil.copy(part, folder)
            _read_into(memory, f"file:{quote(folder)}/{quote(file.name)}")
    return optuna.storages.RDBStorage("sqlite://", {"creator": lambda: memory, "poolclass": StaticPool})


def _open_existing(url: str) -> Any:
    """Opens an existing database of a server. Reading must not create the tables; None if they are missing."""
    import optuna
    from sqlalchemy import create_engine, inspect

    with _reached(url):
        engine = create_engine(url)
        try:
            if not inspect(engine).has_table("studies"):
                return None
        finally:
            engine.dispose()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.storages.RDBStorage(url, {"pool_pre_ping": True}, skip_table_creation=True)


@contextmanager
def _reached(url: str) -> Iterator[None]:
    """Errors of the block that opens a database, as one line with the remedy."""
    from sqlalchemy import exc

    shown = f"{url.partition('://')[0]}://...@{url.rpartition('@')[2]}" if "@" in url else url  # no password
    try:
        yield
    except (exc.NoSuchModuleError, exc.ArgumentError, ImportError) as error:  # ImportError: its driver is not installed
        raise ConfigError(f"execution.study_uri {shown!r}: {error}; expected postgresql://USER@HOST/DATABASE") from None
    except exc.OperationalError as error:
        told = " ".join(str(error.orig).split())[:300]
        raise PrerequisiteError(
            f"execution.study_uri {shown!r}: the database does not answer ({told}). It must be reached from here too"
        ) from None


def _read_into(memory: sqlite3.Connection, uri: str) -> None:
    with closing(sqlite3.connect(uri, timeout=60, uri=True)) as source:
        source.backup(memory)


def in_memory() -> Any:
    """A storage in memory, lost when this process ends."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.storages.InMemoryStorage()
