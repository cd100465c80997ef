"""The results of sweeps: one SQLite file, one committed row per finished run.

Runs of several sweeps, in several processes at once, may go into one file: SQLite's own lock and
journal keep it intact, even when a process is killed while it writes.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.optional import require
from ..errors import WavpruneError
from . import schema
from .schema import Column

if TYPE_CHECKING:
    import pandas as pd

    from ..report import LayerStats

# "wavp": tells the file from another program's.
APPLICATION_ID = 0x77617670
# Seconds to wait for another process that is writing.
LOCK_TIMEOUT = 60.0
# Seconds that a process may take from making the file to its tables.
CREATING = 2.0
PICTURES = ("confusion", "histograms", "kernels")
# The data of one picture unpacks to at most this many bytes.
PICTURE_BYTES = 1 << 26

_SQL: dict[type, str] = {str: "TEXT", int: "INTEGER", bool: "INTEGER", float: "REAL"}
_DTYPES: dict[type, str] = {int: "Int64", bool: "Int64", float: "float64"}


class Store:
    """A results file: the tables ``runs`` and ``layers``, whose columns ``sweep.schema`` declares.

    Every earlier version of the format can be read, also from a file that cannot be written. A
    file gets the columns that it lacks when a run is added to it.

    Args:
        path: the file.
        create: create it where it does not exist; otherwise that is an error.

    Raises:
        WavpruneError: there is no such file, it is not a results file, or a newer version of
            wavprune wrote it.

    Example:
        >>> from tempfile import mkdtemp
        >>> with Store(Path(mkdtemp()) / "results.db", create=True) as store:
        ...     store.known()
        set()
    """

    def __init__(self, path: str | os.PathLike[str], create: bool = False) -> None:
        self.path = Path(path)
        if not create and not self.path.is_file():
            raise WavpruneError(f"{self.path} does not exist; allowed: a file that a sweep wrote")
        self._lock = threading.RLock()
        with ExitStack() as stack:
            try:
                # The progress of a sweep is read while a worker's result is added.
                self._connection = sqlite3.connect(
                    self.path, timeout=LOCK_TIMEOUT, isolation_level=None, check_same_thread=False
                )
                stack.callback(self.close)
                if create:
                    with self._transaction():
                        if not self._execute("SELECT 1 FROM sqlite_master").fetchone():
                            self._create_tables()
                else:
                    self._await_tables()
                self._check_format()
            except sqlite3.Error as error:
                raise WavpruneError(
                    f"{self.path} cannot be used as a results file: {error}"
                ) from error
            stack.pop_all()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def known(self, retry_failed: bool = False) -> set[str]:
        """The ids of the runs that need not run again.

        Args:
            retry_failed: whether failed runs do.
        """
        rows = self._execute("SELECT guid FROM runs WHERE status = 'ok' OR NOT ?", (retry_failed,))
        return {guid for (guid,) in rows}

    def has(self, guid: str, retry_failed: bool = False) -> bool:
        """Whether a run need not run again; another process may just have added it."""
        with self._lock:
            rows = self._execute(
                "SELECT 1 FROM runs WHERE guid = ? AND (status = 'ok' OR NOT ?)",
                (guid, retry_failed),
            )
            return rows.fetchone() is not None

    def add(
        self,
        run: Mapping[str, Any],
        layers: Sequence[LayerStats] = (),
        pictures: Mapping[str, Any] | None = None,
    ) -> bool:
        """Commit one finished run.

        Args:
            run: the columns of ``runs``; those left out stay empty.
            layers: the layers of its report.
            pictures: ``confusion`` (rows true, columns predicted); ``histograms``, a list of
                ``{"layer", "edges", "counts", "threshold"}``; ``kernels``,
                ``{"layer", "before", "after"}`` with lists of 2-D kernels.

        Returns:
            False where another process has added this run before, whose row stays; a failed one
            is replaced.
        """
        guid = run["guid"]
        with self._transaction():
            if self.has(guid, retry_failed=True):
                return False
            self._add_missing_columns()
            for table in ("layers", "pictures", "runs"):
                self._execute(f"DELETE FROM {table} WHERE guid = ?", (guid,))
            self._insert("runs", run)
            for layer in layers:
                row = schema.values(schema.LAYERS[1:], layer)
                row["shape"] = "x".join(map(str, layer.shape))
                self._insert("layers", {"guid": guid, **row})
            packed = {name: _packed(value) for name, value in (pictures or {}).items()}
            self._insert("pictures", {"guid": guid, **packed})
        return True

    def runs(self) -> pd.DataFrame:
        """One row per run, in the order in which they finished."""
        frame = self._frame("runs", schema.RUNS)
        pandas = _pandas()
        for column in ("started", "finished"):
            times = pandas.to_datetime(frame[column], utc=True, format="ISO8601")
            frame[column] = times.dt.as_unit("us")
        return frame

    def layers(self) -> pd.DataFrame:
        """One row per layer of each pruned run: ``guid`` and the fields of ``LayerStats``."""
        return self._frame("layers", schema.LAYERS)

    def pictures(self, guid: str) -> dict[str, Any]:
        """The data that pictures of a run are drawn from; see ``add``. None where it has none.

        Raises:
            KeyError: there is no such run.
            WavpruneError: the data is damaged.
        """
        names = ", ".join(PICTURES)
        row = self._execute(f"SELECT {names} FROM pictures WHERE guid = ?", (guid,)).fetchone()
        if row is None:
            raise KeyError(guid)
        try:
            return {name: _unpacked(data) for name, data in zip(PICTURES, row, strict=True)}
        except (zlib.error, ValueError, TypeError) as error:
            raise WavpruneError(
                f"{self.path}: the pictures of run {guid} cannot be read: {error}"
            ) from error

    def _execute(self, statement: str, parameters: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self._connection.execute(statement, parameters)

    def _await_tables(self) -> None:
        """Another process may have made the file, and its tables not yet."""
        deadline = time.monotonic() + CREATING
        while not self._execute("PRAGMA page_count").fetchone()[0] and time.monotonic() < deadline:
            time.sleep(0.02)

    def _check_format(self) -> None:
        if self._execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise WavpruneError(
                f"{self.path} is not a results file; allowed: one that a sweep wrote"
            )
        version = self._execute("PRAGMA user_version").fetchone()[0]
        if version > schema.VERSION:
            raise WavpruneError(
                f"{self.path} was written by a newer version of wavprune (format {version}; this "
                f"one reads up to {schema.VERSION}); upgrade wavprune, or name another file"
            )
        for table, columns in (("runs", schema.RUNS), ("layers", schema.LAYERS)):
            existing = self._existing(table)
            missing = [c.name for c in columns if c.since <= version and c.name not in existing]
            if missing:
                raise WavpruneError(
                    f"{self.path} is not a results file of format {version}: its table {table} "
                    f"has no column {', '.join(missing)}"
                )

    def _existing(self, table: str) -> set[str]:
        return {row[1] for row in self._execute(f"PRAGMA table_info({table})")}

    def _create_tables(self) -> None:
        for table, columns in (("runs", schema.RUNS), ("layers", schema.LAYERS)):
            definitions = ", ".join(map(_definition, columns))
            if table == "runs":
                definitions += ", PRIMARY KEY (guid)"
            self._execute(f"CREATE TABLE {table} ({definitions})")
        blobs = ", ".join(f'"{name}" BLOB' for name in PICTURES)
        self._execute(f"CREATE TABLE pictures (guid TEXT PRIMARY KEY, {blobs})")
        self._execute("CREATE INDEX layers_of_run ON layers (guid)")
        self._execute(f"PRAGMA application_id = {APPLICATION_ID}")
        self._execute(f"PRAGMA user_version = {schema.VERSION}")

    def _add_missing_columns(self) -> None:
        """Bring a file of an earlier version to this one."""
        if self._execute("PRAGMA user_version").fetchone()[0] == schema.VERSION:
            return
        for table, columns in (("runs", schema.RUNS), ("layers", schema.LAYERS)):
            existing = self._existing(table)
            for column in columns:
                if column.name not in existing:
                    self._execute(f"ALTER TABLE {table} ADD COLUMN {_definition(column)}")
        self._execute(f"PRAGMA user_version = {schema.VERSION}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        # IMMEDIATE: of two processes that both read first, only one could go on to write.
        with self._lock:
            self._execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._execute("ROLLBACK")
                raise
            self._execute("COMMIT")

    def _insert(self, table: str, row: Mapping[str, Any]) -> None:
        names = ", ".join(f'"{name}"' for name in row)
        marks = ", ".join("?" * len(row))
        self._execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", list(row.values()))

    def _frame(self, table: str, columns: Sequence[Column]) -> pd.DataFrame:
        existing = self._existing(table)
        selected = ", ".join(
            f'"{column.name}"' if column.name in existing else "NULL" for column in columns
        )
        rows = self._execute(f"SELECT {selected} FROM {table} ORDER BY rowid").fetchall()
        dtypes = {c.name: _DTYPES[c.kind] for c in columns if c.kind in _DTYPES}
        frame: pd.DataFrame = _pandas().DataFrame(rows, columns=[c.name for c in columns])
        return frame.astype(dtypes)


def _definition(column: Column) -> str:
    return f'"{column.name}" {_SQL[column.kind]}{" NOT NULL" if column.required else ""}'


def _packed(value: Any) -> bytes | None:
    # The confusion matrix of a thousand classes is a million counts, nearly all of them 0.
    return None if value is None else zlib.compress(json.dumps(value).encode())


def _unpacked(data: bytes | None) -> Any:
    if data is None:
        return None
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(data, PICTURE_BYTES)
    if unpacker.unconsumed_tail:
        raise ValueError(f"they unpack to more than {PICTURE_BYTES:,} bytes")
    return json.loads(text)


def _pandas() -> Any:
    return require("pandas", extra="dataframe", purpose="a results file")
