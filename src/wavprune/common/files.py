"""Opening files that others wrote: regular ones alone, read and never mapped."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import WavpruneError

KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a directory"),
)
LFS = b"version https://git-lfs.github.com/spec/"


def check_regular(path: Path) -> None:
    """Raise unless a regular file, or a link to one, is at the path.

    Raises:
        WavpruneError: nothing is there, or something that reading could wait for forever.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise WavpruneError(f"{path} does not exist") from None
    if not stat.S_ISREG(mode):
        kind = next((words for test, words in KINDS if test(mode)), "no regular file")
        raise WavpruneError(f"{path} is {kind}; allowed: a file")


def describe_content(path: Path) -> str | None:
    """What a file is that is often found where a checkpoint should be; None if it is not known."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "an empty file"
    if start.startswith(LFS):
        return "a Git LFS pointer, not the file it stands for; run `git lfs pull`"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "a web page, not a checkpoint; download the file itself"
    return None


def read_exactly(path: Path, start: int, count: int) -> bytearray:
    """``count`` bytes of a file from ``start`` on.

    Raises:
        WavpruneError: the file has fewer.
    """
    content = bytearray(count)
    view = memoryview(content)
    with path.open("rb", buffering=0) as file:
        file.seek(start, os.SEEK_SET)
        filled = 0
        while filled < count:
            got = file.readinto(view[filled : filled + (1 << 30)])
            if not got:
                raise WavpruneError(
                    f"{path} ended after {start + filled:,} bytes where {start + count:,} are "
                    "needed: it was cut off or changed while it was read"
                )
            filled += got
    return content
