"""The service in this process, with workers that do what a test needs."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from wavprune.errors import WavpruneError
from wavprune.service import analysis, answers, store, tasks
from wavprune.service.app import create_app
from wavprune.service.guard import Guard
from wavprune.service.limits import Limits, Settings
from wavprune.service.quota import FullError, Quota
from wavprune.service.service import Service
from wavprune.service.store import DONE, FAILED, READY, REFUSED, WAITING, Job
from wavprune.service.worker import LONGEST_ERROR, _relative

NO_WORKERS: Any = None
MODEL, JOB = "0" * 32, "1" * 32


class Broken:
    """A worker whose every task fails in a way that nobody has thought of."""

    async def run(self, *task: Any) -> None:
        raise RuntimeError("nobody has thought of this")

    async def stop(self) -> None:
        pass


def served(
    directory: Path, test: Callable[[Guard], Coroutine[Any, Any, None]], **limits: Any
) -> None:
    app = create_app(Settings(directory, limits=Limits(**limits)), NO_WORKERS)

    async def run() -> None:
        try:
            async with asyncio.timeout(20):
                await test(app)
        finally:
            await app.service.stop()

    asyncio.run(run())


async def ask(app: Guard, method: str, path: str, **request: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.request(method, f"/api/v1{path}", **request)


def add_ready(service: Service, identity: str = MODEL) -> None:
    service.store.add_model(identity, "a.pt", ".pt", 1)
    service.store.update_model(identity, state=READY, used=0.0)
    service.model_directory(identity).mkdir()


def test_one_failure_does_not_end_the_work_on_others(tmp_path: Path) -> None:
    async def test(app: Guard) -> None:
        service = app.service
        broken: Any = Broken()
        service.models._analyst, service.jobs._workers = broken, [broken]
        add_ready(service)
        jobs = [service.jobs.add(service.store.model(MODEL), "prune", {}).id for _ in range(2)]
        await service.start()
        for name in "ab":
            (tmp_path / name).write_bytes(b"x")
            model = service.models.add(tmp_path / name, "a.pt", ".pt").id
            while service.store.model(model).state == WAITING:
                await service.change.wait()
            assert service.store.model(model).state == REFUSED
            assert service.store.model(model).error == "a defect of wavprune: RuntimeError"
        while not all(service.store.job(job).is_over for job in jobs):
            await service.change.wait()
        assert [service.store.job(job).state for job in jobs] == [FAILED, FAILED]

    served(tmp_path / "kept", test)


def test_a_zip_that_others_left_no_room_for_is_refused(tmp_path: Path) -> None:
    async def test(app: Guard) -> None:
        service = app.service

        class Unpacks(Broken):
            async def run(self, task: Any, *rest: Any) -> Any:
                assert task["most"] == 500 - 1
                source = Path(task["model"]) / "source"
                source.mkdir()
                (source / "a").write_bytes(bytes(499))
                # An upload that was complete meanwhile.
                (service.model_directory("other")).mkdir()
                (service.model_directory("other") / "source.pt").write_bytes(bytes(100))
                return {"done": {}}

        analyst: Any = Unpacks()
        service.models._analyst = analyst
        (tmp_path / "a").write_bytes(b"x")
        model = service.models.add(tmp_path / "a", "a.zip", ".zip")
        await service.models._analyze(model)
        found = service.store.model(model.id)
        assert found.state == REFUSED
        assert "the disk quota of 500 bytes is used up" in str(found.error)
        assert service.quota.used() == 100

    served(tmp_path / "kept", test, disk_bytes=500)


def test_jobs_that_run_at_once_do_not_take_the_same_room(tmp_path: Path) -> None:
    async def test(app: Guard) -> None:
        service = app.service
        add_ready(service)
        (service.model_directory(MODEL) / "source.pt").write_bytes(bytes(100))
        service.store._run("UPDATE models SET bytes = 100")
        ends = asyncio.Event()

        class Waits(Broken):
            async def run(self, *task: Any) -> Any:
                await ends.wait()
                return {"done": {"seconds": 0.0}}

        workers: Any = [Waits(), Waits()]
        service.jobs._workers = workers
        await service.start()

        def add() -> str:
            return service.jobs.add(service.store.model(MODEL), "prune", {"kind": "prune"}).id

        async def over(identity: str) -> Job:
            while not service.store.job(identity).is_over:
                await service.change.wait()
            return service.store.job(identity)

        first, second = add(), add()
        failed = await over(second)
        assert failed.state == FAILED
        assert "is used up, or promised to what runs" in str(failed.error)
        # Neither can an upload have it.
        headers = {"content-type": "application/octet-stream"}
        sent = await ask(app, "POST", "/models?name=a.pt", content=bytes(51), headers=headers)
        assert sent.status_code == 507
        assert not service.store.job(first).is_over
        ends.set()
        assert (await over(first)).state == DONE
        assert (await over(add())).state == DONE

    served(tmp_path / "kept", test, disk_bytes=250, workers=2)


def test_what_a_job_has_written_is_not_counted_twice(tmp_path: Path) -> None:
    quota = Quota([tmp_path], 100)
    (tmp_path / "jobs" / "a" / "attempt-1").mkdir(parents=True)
    (tmp_path / "jobs" / "a" / "attempt-1" / "b").write_bytes(bytes(60))
    with quota.reserved(70):
        assert quota.room() == 30
        with pytest.raises(FullError, match="quota of 100 bytes"), quota.reserved(31):
            pass
    (tmp_path / "jobs" / "a" / "attempt-1").rename(tmp_path / "jobs" / "a" / "result")
    assert quota.room() == 40


def test_who_follows_a_job_uses_its_model(tmp_path: Path) -> None:
    async def test(app: Guard) -> None:
        store = app.service.store
        add_ready(app.service)
        store.add_job(JOB, MODEL, "prune", {"kind": "prune"})
        assert (await ask(app, "GET", f"/jobs/{JOB}")).status_code == 200
        assert store.model(MODEL).used > 0
        store.update_model(MODEL, used=0.0)
        await app.service.jobs.cancel(store.job(JOB))
        assert store.model(MODEL).used > 0

    served(tmp_path, test)


def test_a_change_while_an_event_is_sent_is_not_missed(tmp_path: Path) -> None:
    async def test(app: Guard) -> None:
        add_ready(app.service)
        model = answers.model_shape(app.service, app.service.store.model(MODEL))
        names = ["first"]
        stream = answers.events_of(
            app.service, lambda: (model.model_copy(update={"name": names[-1]}), len(names) > 1)
        ).body_iterator
        assert isinstance(stream, AsyncIterator)
        assert "first" in str(await anext(stream))
        names.append("last")
        app.service.changed()
        assert "last" in str(await asyncio.wait_for(anext(stream), 2))

    served(tmp_path, test)


def test_inputs_of_a_model_that_is_removed_meanwhile_are_refused(tmp_path: Path) -> None:
    async def test(app: Guard) -> None:
        add_ready(app.service)
        curves: Any = object()
        app.service.models._curves[MODEL] = curves

        async def parts() -> AsyncIterator[bytes]:
            yield b"x"
            await app.service.remove_model(app.service.store.model(MODEL))
            yield b"y"

        headers = {"content-type": "application/octet-stream"}
        path = f"/models/{MODEL}/inputs?name=a.png"
        answer = await ask(app, "POST", path, content=parts(), headers=headers)
        assert answer.status_code == 404
        assert "there is no model" in answer.json()["detail"]

    served(tmp_path, test)


def test_a_model_is_removed_by_several_while_jobs_come_and_go(tmp_path: Path) -> None:
    async def test(app: Guard) -> None:
        service = app.service
        add_ready(service)
        begun = asyncio.Event()

        class Slow(Broken):
            async def run(self, task: Any, *others: Any) -> None:
                begun.set()
                try:
                    Path(task["output"]).mkdir(parents=True, exist_ok=True)
                    await asyncio.sleep(60)
                finally:
                    # A process takes a while to end.
                    await asyncio.sleep(0.05)

        workers: Any = [Slow(), Slow()]
        service.jobs._workers = workers
        await service.start()
        model = service.store.model(MODEL)
        first = service.jobs.add(model, "prune", {"kind": "prune"})
        await begun.wait()

        async def add_later() -> None:
            await asyncio.sleep(0.02)
            service.jobs.add(model, "prune", {"kind": "prune"})

        answers = await asyncio.gather(
            ask(app, "DELETE", f"/models/{MODEL}"),
            ask(app, "DELETE", f"/models/{MODEL}"),
            ask(app, "DELETE", f"/jobs/{first.id}"),
            add_later(),
        )
        statuses = [answer.status_code for answer in answers if answer is not None]
        assert 500 not in statuses
        assert service.store.models() == []
        assert service.store.jobs() == []
        assert service.jobs._running == {}
        assert list((tmp_path / "jobs").iterdir()) == []

    served(tmp_path, test, workers=2)


def test_models_of_the_first_version_are_measured_again(tmp_path: Path) -> None:
    """Whether they can be run was not known then."""
    path = tmp_path / "service.db"
    with contextlib.closing(sqlite3.connect(path)) as old:
        old.executescript(store.SCHEMA.replace(",\n    cannot_run TEXT", ""))
        old.execute("PRAGMA user_version = 1")
        rows = [("a", "ready"), ("b", "refused")]
        insert = "INSERT INTO models VALUES (?, 'net.onnx', '.onnx', 1, ?, NULL, 2, 3, 4)"
        old.executemany(insert, rows)
        old.commit()
    for _ in range(2):
        opened = store.Store(path)
        assert {model.id: model.state for model in opened.models()} == {
            "a": WAITING,
            "b": "refused",
        }
        assert opened.model("a").inputs == 2
        assert not opened.model("a").runs
        opened.close()
    with contextlib.closing(sqlite3.connect(path)) as later:
        later.execute("PRAGMA user_version = 9")
    with pytest.raises(WavpruneError, match="is of version 9; allowed: up to 2, or another dir"):
        store.Store(path)


@pytest.mark.parametrize(("version", "state"), [(analysis.VERSION, READY), (1, WAITING)])
def test_curves_of_another_version_are_measured_again(
    tmp_path: Path, version: int, state: str
) -> None:
    async def prepare(app: Guard) -> None:
        add_ready(app.service)
        facts = np.frombuffer(b'{"version": %d}' % version, dtype=np.uint8)
        np.savez(app.service.model_directory(MODEL) / tasks.CURVES, facts=facts)

    async def test(app: Guard) -> None:
        assert app.service.store.model(MODEL).state == state
        assert app.service.models._queue.qsize() == (state == WAITING)

    served(tmp_path, prepare)
    served(tmp_path, test)


@pytest.mark.parametrize("content", [b"", b"PK", b"no zip at all"])
def test_curves_that_cannot_be_read_are_measured_again(tmp_path: Path, content: bytes) -> None:
    (tmp_path / tasks.CURVES).write_bytes(content)
    assert not analysis.is_current(tmp_path / tasks.CURVES)
    assert not analysis.is_current(tmp_path / "none.npz")


def test_messages_hold_no_path_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = Settings(Path("kept")).directory
    assert root == tmp_path.resolve() / "kept"
    task = {"model": str(root / "models" / MODEL)}
    for path in ("models/0/source", f"models/{MODEL}/source", f"jobs/{JOB}/result/model"):
        assert str(tmp_path) not in _relative(f"{root / path} holds no config.json", task)
    assert len(_relative("x" * 10**6, task)) == LONGEST_ERROR
