"""A process that runs tasks, one after the other, within a limit of memory.

It reads a task a line from standard input and writes messages, a line each, to standard output. It
ends with whoever started it.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from ..common.optional import MissingExtraError
from ..common.progress import reported_to
from ..errors import WavpruneError

# Between two messages on how far a task is.
SECONDS = 0.1
NICE = 5


def main() -> None:
    """Run the tasks of standard input until it ends."""
    memory, threads = int(sys.argv[1]), int(sys.argv[2])
    messages = _own_output()
    os.nice(NICE)
    # Of what is mapped, only memory that can be written counts: libraries and checkpoints do not.
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    import torch

    from . import tasks

    torch.set_num_threads(threads)
    del tasks
    _send(messages, {"ready": True})
    while True:
        _send(messages, _result(json.loads(lines.get()), messages, memory))


def _own_output() -> TextIO:
    """Standard output for messages alone; what libraries print goes to standard error."""
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return messages


def _read(lines: queue.Queue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    # Nobody is left who wants what this process does.
    os._exit(0)


def _send(messages: TextIO, message: dict[str, Any]) -> None:
    try:
        messages.write(f"{json.dumps(message)}\n")
        messages.flush()
    except OSError:
        os._exit(0)


def _result(task: dict[str, Any], messages: TextIO, memory: int) -> dict[str, Any]:
    from . import tasks

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
    from . import tasks

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
    for path in (task["model"], task.get("output"), task.get("target")):
        if path:
            message = message.replace(f"{path}/", "")
    return message


if __name__ == "__main__":
    main()
