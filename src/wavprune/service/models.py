"""The models: uploaded, measured in a process of their own, and their curves in memory."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from pathlib import Path

from . import analysis, tasks
from .analysis import ModelCurves
from .launcher import Launcher, WorkerDiedError
from .processes import WorkerProcess
from .quota import FullError
from .state import State, defect, going_on
from .store import READY, REFUSED, WAITING, Model
from .uploads import Upload

# Curves that stay in memory.
CURVES_BYTES = 256 << 20
ANALYSIS_SECONDS = 600.0


class NotReadyError(Exception):
    """A model cannot be asked yet, or no more; the message says why."""


class Models:
    """What was uploaded, and what is known of it.

    Args:
        state: what is kept.
        launcher: starts the process that measures.
    """

    def __init__(self, state: State, launcher: Launcher) -> None:
        self._state, self._store, self._limits = state, state.store, state.limits
        self._curves: OrderedDict[str, ModelCurves] = OrderedDict()
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._loop: asyncio.Task[None] | None = None
        self._analyst = WorkerProcess(launcher, self._limits.worker_bytes, 1)

    async def start(self) -> None:
        """Begin to measure what waits."""
        self._loop = asyncio.create_task(self._analyze_all())

    async def stop(self) -> None:
        """End all work; what was being measured is measured by the next service."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        await self._analyst.stop()

    def recover(self) -> None:
        """Bring the states up to what a service that was killed left on the disk."""
        root = self._state.settings.directory
        for path in (root / "incoming").iterdir():
            path.unlink(missing_ok=True)
        known = {model.id for model in self._store.models()}
        for path in (root / "models").iterdir():
            if path.name not in known:
                tasks.remove(path)
        for model in self._store.models():
            curves = self._state.model_directory(model.id) / tasks.CURVES
            if model.state == READY and not analysis.is_current(curves):
                self._store.update_model(model.id, state=WAITING)
                self._queue.put_nowait(model.id)
            if model.state == WAITING:
                self._queue.put_nowait(model.id)

    def incoming(self, size: int | None) -> Upload:
        """A file that begins to come.

        Args:
            size: how large it says it is.

        Raises:
            FullError: there is no room for it.
            OverflowError: it says that it is too large.
        """
        directory = self._state.settings.directory / "incoming"
        return Upload(directory, self._state.quota, self._limits.upload_bytes, size)

    def add(self, upload: Path, name: str, kind: str) -> Model:
        """Make a model of an upload that is complete.

        Raises:
            FullError: there are too many.
        """
        if len(self._store.models()) >= self._limits.models:
            raise FullError(
                f"{self._limits.models} models are kept, which is the most; remove one of them"
            )
        identity = secrets.token_hex(16)
        directory = self._state.model_directory(identity)
        directory.mkdir()
        size = upload.stat().st_size
        upload.rename(tasks.uploaded(directory, kind))
        model = self._store.add_model(identity, name, kind, size)
        self._queue.put_nowait(identity)
        self._state.changed()
        return model

    def add_input(self, upload: Path, model: Model, suffix: str) -> Model:
        """Add a file of inputs to a model."""
        folder = self._state.model_directory(model.id) / tasks.INPUTS
        folder.mkdir(exist_ok=True)
        upload.rename(folder / f"{model.inputs:06d}{suffix}")
        self._store.update_model(model.id, inputs=model.inputs + 1, used=time.time())
        self._state.changed()
        return self._store.model(model.id)

    def touch(self, model: Model) -> None:
        """Somebody looked at it; says so in the store now and then."""
        now = time.time()
        if now - model.used > min(60.0, self._limits.idle_seconds / 4):
            self._store.update_model(model.id, used=now)

    def curves(self, model: Model) -> ModelCurves:
        """The curves of a model that is ready.

        Raises:
            NotReadyError: it is not.
        """
        found = self._curves.get(model.id)
        if found is None:
            if model.state != READY:
                raise NotReadyError(
                    f"the model was refused: {model.error}"
                    if model.state == REFUSED
                    else "the model is being measured; wait until it is ready"
                )
            found = self._curves[model.id] = analysis.load(
                self._state.model_directory(model.id) / tasks.CURVES
            )
            while len(self._curves) > 1 and self._curves_bytes() > CURVES_BYTES:
                self._curves.popitem(last=False)
        self._curves.move_to_end(model.id)
        return found

    def _curves_bytes(self) -> int:
        return sum(curves.nbytes for curves in self._curves.values())

    def remove(self, model: Model) -> None:
        """Forget a model whose jobs are over, and its files."""
        self._store.remove_model(model.id)
        self._curves.pop(model.id, None)
        tasks.remove(self._state.model_directory(model.id))
        self._state.changed()

    async def _analyze_all(self) -> None:
        while True:
            identity = await self._queue.get()
            with going_on():
                await self._analyze(self._store.model(identity))

    async def _analyze(self, model: Model) -> None:
        packed = tasks.uploaded(self._state.model_directory(model.id), tasks.ZIP).exists()
        task = {
            "task": "analyze",
            "model": str(self._state.model_directory(model.id)),
            "kind": model.kind,
            "most": max(0, min(self._limits.upload_bytes, self._state.quota.room())),
        }
        try:
            message = await self._analyst.run(
                task, self._state.reporter(model.id), ANALYSIS_SECONDS
            )
        except WorkerDiedError:
            message = {
                "error": "reading it ended the process that did, probably for want of memory"
            }
        except TimeoutError:
            message = {"error": f"reading it took longer than {ANALYSIS_SECONDS:g} s"}
        except Exception as error:
            message = {"error": defect(error)}
        if packed and "error" not in message and self._state.quota.room() < 0:
            # Something else has come while it was unpacked.
            message = {"error": str(self._state.quota.full())}
        self._state.progress.pop(model.id, None)
        # Raises where it was removed meanwhile.
        self._store.model(model.id)
        if "error" in message:
            self._store.update_model(model.id, state=REFUSED, error=message["error"])
            tasks.remove(self._state.model_directory(model.id))
        else:
            cannot_run = message["done"]["cannot_run"]
            self._store.update_model(model.id, state=READY, cannot_run=cannot_run)
        self._state.changed()
