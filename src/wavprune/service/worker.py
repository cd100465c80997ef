"""A process that runs tasks, one after the other, within a limit of memory.

It ends with whoever started it.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import socket
import threading
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

import torch

from ..common.optional import MissingExtraError
from ..common.progress import reported_to
from ..errors import WavpruneError
from . import tasks

# Between two messages on how far a task is.
SECONDS = 0.1
NICE = 5
# Names from a file are in errors, and may be as long as the file.
LONGEST_ERROR = 2000


def serve(connection: socket.socket, memory: int, threads: int) -> None:
    """Run the tasks that come until the connection ends.

    Args:
        connection: brings a task a line, and takes messages, a line each.
        memory: bytes that this process may have.
        threads: to compute with.
    """
    # What libraries print goes to standard error.
    os.dup2(2, 1)
    os.nice(NICE)
    # Of what is mapped, only memory that can be written counts: libraries and checkpoints do not.
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(threads)
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(connection, lines), daemon=True).start()
    messages = connection.makefile("w", encoding="utf-8")
    while True:
        _send(messages, _result(json.loads(lines.get()), messages, memory))


def _read(connection: socket.socket, lines: queue.Queue[str]) -> None:
    try:
        with connection.makefile("r", encoding="utf-8") as source:
            for line in source:
                lines.put(line)
    finally:
        # Nobody is left who wants what this process does, also where they were killed.
        os._exit(0)


def _send(messages: TextIO, message: dict[str, Any]) -> None:
    try:
        messages.write(f"{json.dumps(message)}\n")
        messages.flush()
    except OSError:
        os._exit(0)


def _result(task: dict[str, Any], messages: TextIO, memory: int) -> dict[str, Any]:
    last = 0.0

    def report(stage: str, share: float | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS or share == 1:
            last = now
            _send(messages, {"stage": stage, "share": share})

    try:
        with reported_to(report):
            return {"done": _run(task, report)}
    except (WavpruneError, MissingExtraError, TypeError) as error:
        if type(error) is TypeError:
            traceback.print_exc()
        return {"error": _relative(str(error), task)}
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            traceback.print_exc()
            return {"error": f"a defect of wavprune: {_relative(str(error), task)}"}
        return {"error": f"it needs more memory than the {memory:,} bytes of a job", "end": True}
    except OSError as error:
        return {"error": error.strerror or type(error).__name__}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"a defect of wavprune: {type(error).__name__}"}
    finally:
        tasks.remove(Path(task["output"])) if "output" in task else None


def _run(task: dict[str, Any], report: Any) -> dict[str, Any]:
    model = Path(task["model"])
    if task["task"] == "analyze":
        return tasks.analyze(model, task["kind"], task["most"], report)
    output, target = Path(task["output"]), Path(task["target"])
    output.mkdir(parents=True)
    result = tasks.run(task["task"], model, task["kind"], task["settings"], output, report)
    tasks.finish(output, result, target)
    return result


def _relative(message: str, task: dict[str, Any]) -> str:
    """A message without the paths of this machine."""
    root = Path(task["model"]).parent.parent
    for path in (task["model"], task.get("output"), task.get("target"), root):
        if path:
            message = message.replace(f"{path}/", "")
    return message[:LONGEST_ERROR]
