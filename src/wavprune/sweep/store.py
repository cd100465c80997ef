"""The results of sweeps: one SQLite file, one committed row a finished run.

Runs of several sweeps, in several processes at once, may go into one file: SQLite's own lock and
journal keep it whole, also when a process is killed while it writes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sqlite3
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.metrics import Evaluation
from ..report import LayerStats

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
# "wavp": tells the file from another program's.
APPLICATION = 0x77617670
# Seconds to wait for another process that is writing.
PATIENCE = 60.0

_SQL = {"int": "INTEGER", "float": "REAL", "bool": "INTEGER"}
_DTYPES = {"INTEGER": "Int64", "REAL": "float64"}


def _columns(fields: Sequence[dataclasses.Field[Any]], *left_out: str) -> dict[str, str]:
    """Name -> SQL type, of a dataclass whose annotations are strings."""
    return {
        field.name: _SQL.get(str(field.type).removesuffix(" | None"), "TEXT")
        for field in fields
        if field.name not in left_out
    }


# What identifies a run and says how it ended.
STATE = {
    "guid": "TEXT PRIMARY KEY",
    "sweep": "TEXT NOT NULL",
    "started": "TEXT NOT NULL",
    "finished": "TEXT NOT NULL",
    "status": "TEXT NOT NULL",
    "error": "TEXT",
    "traceback": "TEXT",
}
# What was asked for; empty where the method does not read it.
SETTINGS = {
    "model": "TEXT NOT NULL",
    "data": "TEXT NOT NULL",
    "method": "TEXT NOT NULL",
    "wavelet": "TEXT",
    "mode": "TEXT",
    "level": "INTEGER",
    "force_level": "INTEGER",
    "sparsity_requested": "REAL",
    "percentile": "REAL",
    "scope": "TEXT",
    "seed": "INTEGER",
    "targets": "TEXT",
    "ignore": "TEXT",
    "batchnorm": "TEXT NOT NULL",
    "matched": "TEXT NOT NULL",
}
EVALUATION = _columns(dataclasses.fields(Evaluation), "confusion")
TOTALS = {
    "numel": "INTEGER",
    "kept": "INTEGER",
    "weight_zeros": "INTEGER",
    "relative_error": "REAL",
}
TIMES = {"prune_seconds": "REAL", "repair_seconds": "REAL", "evaluate_seconds": "REAL"}
TEXTS = {"settings": "TEXT NOT NULL", "versions": "TEXT NOT NULL"}
RUNS = {**STATE, **SETTINGS, **EVALUATION, **TOTALS, **TIMES, **TEXTS}
LAYERS = {"guid": "TEXT NOT NULL", **_columns(dataclasses.fields(LayerStats))}
PICTURES = ("confusion", "histograms", "kernels")


class Store:
    """A results file.

    Columns of ``runs``: ``guid``, ``sweep``, ``started`` and ``finished`` (UTC), ``status``
    (``"ok"`` or ``"failed"``), ``error``, ``traceback``; the settings by their names, with the
    ``sparsity`` that was asked for as ``sparsity_requested``; the fields of ``Evaluation``, whose
    ``sparsity`` is what was reached; the report's ``numel``, ``kept``, ``weight_zeros`` and
    ``relative_error``; seconds; ``settings`` and ``versions`` as JSON. The unpruned model is the
    row with method ``"none"``.

    Args:
        path: the file.
        create: make it where it does not exist; else that is an error.

    Raises:
        ValueError: there is no such file, or it is no results file of this version.

    Example:
        >>> from tempfile import mkdtemp
        >>> with Store(Path(mkdtemp()) / "results.db", create=True) as store:
        ...     store.known()
        set()
    """

    def __init__(self, path: str | os.PathLike[str], create: bool = False) -> None:
        self.path = Path(path)
        if not create and not self.path.is_file():
            raise ValueError(f"{self.path} does not exist; allowed: a file that a sweep wrote")
        self._lock = threading.RLock()
        with ExitStack() as stack:
            try:
                # One thread adds while others ask what is there; the lock keeps them apart.
                self._connection = sqlite3.connect(
                    self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False
                )
                stack.callback(self.close)
                self._prepare(create)
            except sqlite3.Error as error:
                raise ValueError(
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
        rows = self._connection.execute(
            "SELECT guid FROM runs WHERE status = 'ok' OR NOT ?", (retry_failed,)
        )
        return {guid for (guid,) in rows}

    def has(self, guid: str, retry_failed: bool = False) -> bool:
        """Whether a run need not run again; another process may just have added it."""
        with self._lock:
            found = self._connection.execute(
                "SELECT 1 FROM runs WHERE guid = ? AND (status = 'ok' OR NOT ?)",
                (guid, retry_failed),
            )
            return found.fetchone() is not None

    def add(
        self,
        run: Mapping[str, Any],
        layers: Sequence[LayerStats] = (),
        pictures: Mapping[str, Any] | None = None,
    ) -> bool:
        """Commit one finished run.

        Args:
            run: the columns of ``runs``; those left out stay empty.
            layers: its report.
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
            for table in ("layers", "pictures", "runs"):
                self._connection.execute(f"DELETE FROM {table} WHERE guid = ?", (guid,))
            self._insert("runs", run)
            for layer in layers:
                row = dataclasses.asdict(layer)
                row["shape"] = "x".join(map(str, layer.shape))
                self._insert("layers", {"guid": guid, **row})
            packed = {name: _packed(value) for name, value in (pictures or {}).items()}
            self._insert("pictures", {"guid": guid, **packed})
        return True

    def runs(self) -> pd.DataFrame:
        """One row a run, in the order in which they finished."""
        frame = self._frame("runs", RUNS)
        for column in ("started", "finished"):
            times = _pandas().to_datetime(frame[column], utc=True, format="ISO8601")
            frame[column] = times.dt.as_unit("us")
        return frame

    def layers(self) -> pd.DataFrame:
        """One row a layer of each pruned run: ``guid`` and the fields of ``LayerStats``."""
        return self._frame("layers", LAYERS)

    def pictures(self, guid: str) -> dict[str, Any]:
        """What pictures of a run are drawn from; see ``add``. None for what it does not have.

        Raises:
            KeyError: there is no such run.
        """
        names = ", ".join(PICTURES)
        row = self._connection.execute(
            f"SELECT {names} FROM pictures WHERE guid = ?", (guid,)
        ).fetchone()
        if row is None:
            raise KeyError(guid)
        return {
            name: None if data is None else json.loads(zlib.decompress(data))
            for name, data in zip(PICTURES, row, strict=True)
        }

    def _prepare(self, create: bool) -> None:
        execute = self._connection.execute
        if create:
            with self._transaction():
                if not execute("SELECT 1 FROM sqlite_master").fetchone():
                    self._make_tables()
        application = execute("PRAGMA application_id").fetchone()[0]
        schema = execute("PRAGMA user_version").fetchone()[0]
        columns = {
            table: [row[1] for row in execute(f"PRAGMA table_info({table})")]
            for table in ("runs", "layers")
        }
        expected = {"runs": list(RUNS), "layers": list(LAYERS)}
        if application != APPLICATION:
            raise ValueError(f"{self.path} is not a results file; allowed: one that a sweep wrote")
        if schema != SCHEMA or columns != expected:
            raise ValueError(
                f"{self.path} was written by another version of wavprune (schema {schema}, here "
                f"{SCHEMA}); name another file"
            )

    def _make_tables(self) -> None:
        pictures = {"guid": "TEXT PRIMARY KEY", **dict.fromkeys(PICTURES, "BLOB")}
        tables = {"runs": RUNS, "layers": LAYERS, "pictures": pictures}
        for table, columns in tables.items():
            described = ", ".join(f'"{name}" {kind}' for name, kind in columns.items())
            self._connection.execute(f"CREATE TABLE {table} ({described})")
        self._connection.execute("CREATE INDEX layers_of_run ON layers (guid)")
        self._connection.execute(f"PRAGMA application_id = {APPLICATION}")
        self._connection.execute(f"PRAGMA user_version = {SCHEMA}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        # Immediate: two processes that both read first could not both go on to write.
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def _insert(self, table: str, row: Mapping[str, Any]) -> None:
        names = ", ".join(f'"{name}"' for name in row)
        places = ", ".join("?" * len(row))
        self._connection.execute(
            f"INSERT INTO {table} ({names}) VALUES ({places})", list(row.values())
        )

    def _frame(self, table: str, columns: Mapping[str, str]) -> pd.DataFrame:
        pandas = _pandas()
        names = ", ".join(f'"{name}"' for name in columns)
        rows = self._connection.execute(f"SELECT {names} FROM {table} ORDER BY rowid").fetchall()
        kinds = {name: _DTYPES[kind] for name, kind in columns.items() if kind in _DTYPES}
        frame: pd.DataFrame = pandas.DataFrame(rows, columns=list(columns)).astype(kinds)
        return frame


def _packed(value: Any) -> bytes | None:
    # A thousand classes' confusion matrix is a million counts, nearly all of them 0.
    return None if value is None else zlib.compress(json.dumps(value).encode())


def _pandas() -> Any:
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError("results need pandas; pip install 'wavprune[dataframe]'") from error
    return pd
