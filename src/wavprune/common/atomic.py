"""Files and directories that appear complete or not at all, and survive a crash.

A temporary path lies beside its target and names the process that owns it::

    .<target>.wavprune-<host>-<pid>-<start>-<random>.tmp

A run that was killed leaves such a path behind; the next one that writes into the same directory
removes it. Where directories cannot be exchanged in one step, the old one is moved to the same name
with ``.old``, and comes back if a kill left nothing at the target.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from ..errors import WavpruneError

TEMPORARY = re.compile(
    r"\..*\.wavprune-(?P<host>[0-9a-f]{6})-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]{8}"
    r"\.(?P<kind>tmp|old)(\.\w+)?"
)
# File names have at most 255 bytes, of which the rest of a temporary name needs up to 70.
LONGEST_STEM = 180
CURRENT_DIRECTORY, NO_REPLACE, EXCHANGE = -100, 1, 2
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def replaced(target: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A temporary path beside the target, which takes its place if the block ends without error.

    What was at the target keeps its mode, and its owner where that is permitted; a link stays and
    what it leads to is replaced. The new content is on disk when the block has ended. At no moment
    is there nothing at a target that was there before, where the system can exchange two paths.

    Args:
        target: a file or directory, there or not. What is there stays until the block has ended.
        overwrite: False raises instead of replacing what appeared at the target meanwhile.

    Raises:
        WavpruneError: with ``overwrite=False``, something is at the target.

    Example:
        >>> from tempfile import mkdtemp
        >>> target = Path(mkdtemp()) / "report.txt"
        >>> with replaced(target) as new:
        ...     _ = new.write_text("done")
        >>> target.read_text()
        'done'
    """
    target = Path(os.path.realpath(target))
    recover(target)
    _remove_stale(target.parent)
    name = _temporary_name(target.name)
    new, old = target.with_name(f"{name}.tmp"), target.with_name(f"{name}.old")
    with _cleanup_on_signals():
        try:
            yield new
            _sync_tree(new)
            if not overwrite:
                _move_to_free(new, target)
            elif target.is_dir() and new.is_dir():
                _keep_ownership(new, target)
                _exchange_directories(new, target, old)
            else:
                if target.is_file():
                    _keep_ownership(new, target)
                new.replace(target)
            _sync(target.parent)
        finally:
            if old.exists() and not target.exists():
                old.rename(target)
            _remove(new)
            _remove(old)


@contextmanager
def scratch_file(directory: Path, name: str) -> Iterator[Path]:
    """A path for a file that is gone when the block has ended.

    Args:
        directory: where it lies.
        name: what its name begins with.
    """
    path = directory / f"{_temporary_name(name)}.tmp"
    try:
        yield path
    finally:
        _remove(path)


def recover(target: Path) -> None:
    """Bring back a directory that a killed run had moved away, if nothing is at the target."""
    target = Path(os.path.realpath(target))
    left = left_behind(target)
    if left is not None:
        left.rename(target)


def left_behind(target: Path) -> Path | None:
    """Where a killed run left what was at the target, if nothing is there now; else None."""
    if os.path.lexists(target) or not target.parent.is_dir():
        return None
    own = re.compile(re.escape(f".{_stem(target.name)}.") + r"(?P<rest>.*)\.old", flags=re.DOTALL)
    for name in sorted(path.name for path in target.parent.iterdir()):
        match = own.fullmatch(name)
        # Earlier versions named eight random digits and no owner.
        if match and (re.fullmatch(r"[0-9a-f]{8}", match["rest"]) or _is_stale(name)):
            return target.with_name(name)
    return None


def _stem(name: str) -> str:
    encoded = os.fsencode(name)
    if len(encoded) <= LONGEST_STEM:
        return name
    # Cut between characters, and told from other names with the same beginning.
    start = encoded[: LONGEST_STEM - 9].decode(errors="ignore")
    return f"{start}~{hashlib.sha256(encoded).hexdigest()[:8]}"


def _temporary_name(name: str) -> str:
    pid = os.getpid()
    return f".{_stem(name)}.wavprune-{_host()}-{pid}-{_start_time(pid)}-{secrets.token_hex(4)}"


@functools.cache
def _host() -> str:
    """Names the machine and, in a container, its own numbering of processes."""
    namespace = ""
    with suppress(OSError):
        namespace = str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:6]


def _start_time(pid: int) -> int:
    """When a process started, which tells it from a later one of the same number; else 0."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[19])
    except (OSError, ValueError, IndexError):
        return 0


def _is_stale(name: str) -> bool:
    """True for the temporary name of a process of this machine that has ended."""
    match = TEMPORARY.fullmatch(name)
    if match is None or match["host"] != _host():
        return False
    pid = int(match["pid"])
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return _start_time(pid) != int(match["start"])


def _remove_stale(directory: Path) -> None:
    """Remove what killed runs left in a directory; an ``.old`` one goes when its target is back."""
    try:
        names = [path.name for path in directory.iterdir()]
    except OSError:
        return
    for name in names:
        if ".wavprune-" not in name or not _is_stale(name):
            continue
        match = TEMPORARY.fullmatch(name)
        assert match is not None
        stem = name[1 : name.index(f".wavprune-{match['host']}-")]
        if match["kind"] == "tmp" or os.path.lexists(directory / stem):
            with suppress(OSError):
                _remove(directory / name)


def _keep_ownership(new: Path, target: Path) -> None:
    there = target.stat()
    own = new.stat()
    if (own.st_uid, own.st_gid) != (there.st_uid, there.st_gid):
        with suppress(OSError):
            os.chown(new, there.st_uid, there.st_gid)
    # After the owner, whose change clears some of the mode's bits.
    new.chmod(stat.S_IMODE(there.st_mode))


def _exchange_directories(new: Path, target: Path, old: Path) -> None:
    if not _rename(new, target, EXCHANGE):
        target.rename(old)
        new.replace(target)


def _move_to_free(new: Path, target: Path) -> None:
    try:
        if _rename(new, target, NO_REPLACE):
            return
        if new.is_file():
            os.link(new, target)
            return
        if not os.path.lexists(target):
            new.rename(target)
            return
    except FileExistsError:
        pass
    raise WavpruneError(f"{target} exists already and is not replaced")


def _rename(source: Path, target: Path, flags: int) -> bool:
    """Linux's ``renameat2``; False where it does not exist or cannot do this here."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    paths = (CURRENT_DIRECTORY, os.fsencode(source), CURRENT_DIRECTORY, os.fsencode(target))
    if function(*paths, flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for directory, _, names in os.walk(path):
            for name in names:
                file = Path(directory) / name
                if file.is_file() and not file.is_symlink():
                    _sync(file)
            _sync(Path(directory))
    elif path.is_file():
        _sync(path)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        # Directories cannot be opened everywhere, nor can files without read permission.
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems sync no directories.
        if not path.is_dir() or error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class _Interrupted(BaseException):
    """A signal whose default is to end the process came while a temporary path existed."""


@contextmanager
def _cleanup_on_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exception in the block, and let them end the process then.

    Signals that the program handles or ignores are left alone.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise _Interrupted

    ours: list[int] = []
    if threading.current_thread() is threading.main_thread():
        ours = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
        if received:
            signal.raise_signal(received[0])
