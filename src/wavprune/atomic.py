"""Files and directories that appear when they are complete, and not before."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A temporary path beside the target, which takes its place if the block ends without error.

    Args:
        target: a file or directory, there or not. What is there stays until the block has ended.

    Example:
        >>> from tempfile import mkdtemp
        >>> target = Path(mkdtemp()) / "report.txt"
        >>> with replaced(target) as new:
        ...     _ = new.write_text("done")
        >>> target.read_text()
        'done'
    """
    mark = secrets.token_hex(4)
    new = target.with_name(f".{target.name}.{mark}.tmp")
    old = target.with_name(f".{target.name}.{mark}.old")
    try:
        yield new
        if target.is_dir() and new.is_dir():
            target.rename(old)
        new.replace(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        _remove(new)
        _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
