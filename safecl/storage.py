"""Where Optuna's studies lie: a database that is written by one driver, or read by anybody without a change to it."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from contextlib import closing, suppress
from typing import Any
from urllib.parse import quote

from safecl.base import sqlite_path


def open_storage(url: str) -> Any:
    """Optuna's storage at a database URL, to be shared by the studies of one driver. SQLite waits for locks."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    return optuna.storages.RDBStorage(url, engine_kwargs=options)


def open_to_read(url: str) -> Any:
    """What Optuna's storage at a database URL holds now, for reading: an SQLite file is opened read-only and read into
    memory, so that nothing is written to it. None where there is none yet."""
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
    except sqlite3.OperationalError:  # a driver died while it wrote: only a writer can undo that, so a copy is undone
        with tempfile.TemporaryDirectory() as folder:
            for part in (file, file.with_name(f"{file.name}-journal"), file.with_name(f"{file.name}-wal")):
                with suppress(FileNotFoundError):
                    shutil.copy(part, folder)
            _read_into(memory, f"file:{quote(folder)}/{quote(file.name)}")
    return optuna.storages.RDBStorage("sqlite://", {"creator": lambda: memory, "poolclass": StaticPool})


def _open_existing(url: str) -> Any:
    """Of a server's database, whose tables are not made by who only looks."""
    import optuna
    from sqlalchemy import create_engine, inspect

    engine = create_engine(url)
    try:
        if not inspect(engine).has_table("studies"):
            return None
    finally:
        engine.dispose()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.storages.RDBStorage(url, {"pool_pre_ping": True}, skip_table_creation=True)


def _read_into(memory: sqlite3.Connection, uri: str) -> None:
    with closing(sqlite3.connect(uri, timeout=60, uri=True)) as source:
        source.backup(memory)


def in_memory() -> Any:
    """A storage that is gone with this process."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.storages.InMemoryStorage()
