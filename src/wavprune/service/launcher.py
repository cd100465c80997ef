"""The process that workers are forked from: it has imported everything, and computed nothing.

A worker is then there in milliseconds, also after a job that was cancelled, and its libraries are
in memory once. The launcher ends with the service, and a worker with its connection.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

MESSAGE_BYTES = 256


class WorkerDiedError(Exception):
    """A process ended before it was asked to."""


class Launcher:
    """Starts worker processes.

    Args:
        connection: to the process that forks them.
        wait: waits for the end of that process.
    """

    def __init__(self, connection: socket.socket, wait: Callable[[], object]) -> None:
        self._connection, self._wait = connection, wait
        self._lock = threading.Lock()

    def launch(self, memory: int, threads: int) -> tuple[socket.socket, int]:
        """A new worker: the connection to it, and its process id.

        Args:
            memory: bytes that it may have.
            threads: that it computes with.

        Raises:
            WorkerDiedError: the launcher is gone.
        """
        ours, theirs = socket.socketpair()
        settings = json.dumps([memory, threads]).encode()
        try:
            with theirs, self._lock:
                socket.send_fds(self._connection, [settings], [theirs.fileno()])
                answer = self._connection.recv(MESSAGE_BYTES)
            return ours, int(answer)
        except (OSError, ValueError) as error:
            # Of a launcher that is gone comes an empty answer, or none.
            ours.close()
            raise WorkerDiedError from error

    def close(self) -> None:
        """End the launcher; workers are ended by their connections."""
        self._connection.close()
        self._wait()


def forked() -> Launcher:
    """A launcher that is forked from this process, which must have one thread and no secrets."""
    from . import tasks, worker

    del tasks, worker
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        ours.close()
        os.setsid()
        _serve(theirs)
    theirs.close()
    return Launcher(ours, lambda: os.waitpid(pid, 0))


def spawned() -> Launcher:
    """A launcher with an interpreter of its own, for a process that has threads."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    return Launcher(ours, process.wait)


def _serve(connection: socket.socket) -> None:
    """Fork a worker at each request, until there is nobody left who could ask."""
    from . import worker

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Nobody waits for workers: their connections say when they have ended.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, descriptors, *_ = socket.recv_fds(connection, MESSAGE_BYTES, 1)
        if not message:
            os._exit(0)
        pid = os.fork()
        if pid == 0:
            connection.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                worker.serve(socket.socket(fileno=descriptors[0]), *json.loads(message))
            finally:
                os._exit(1)
        os.close(descriptors[0])
        connection.send(str(pid).encode())


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
