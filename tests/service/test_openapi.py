"""The API does what its own document says, for whatever is sent."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.service import upload
from wavprune.service import shapes

schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")
pytestmark = pytest.mark.waits

EXAMPLES = 5
# So that uploads get past their suffixes; what is in them is noise.
NAMES = {"models": ("a.pt", "a.onnx", "a.zip", "a.safetensors"), "inputs": ("a.png", "a.npz")}
# What the model has and a job can be.
FITTING = {"layer": "conv1", "basis": "dct", "kind": "prune", "scope": "layer"}
EVENTS = {"model": shapes.ModelShape, "job": shapes.JobShape}


@pytest.fixture(scope="module")
def document(address: str) -> Any:
    return schemathesis.openapi.from_url(f"{address}/api/v1/openapi.json")


@pytest.fixture(scope="module")
def known(client: httpx.Client, demo: Any) -> dict[str, str]:
    """A model and a job that are there, so that requests get past their ids."""
    model = upload(client, demo)["id"]
    return {"model": model, "job": add_job(client, model)}


def add_job(client: httpx.Client, model: str) -> str:
    answer = client.post(f"/api/v1/models/{model}/jobs", json={"kind": "prune"})
    return str(answer.raise_for_status().json()["id"])


def add_model(client: httpx.Client) -> str:
    headers = {"content-type": "application/octet-stream"}
    answer = client.post("/api/v1/models?name=a.pt", content=b"x", headers=headers)
    return str(answer.raise_for_status().json()["id"])


def ids_of(operation: Any, client: httpx.Client, known: dict[str, str]) -> dict[str, str]:
    """The ids of a request; what it removes is made for it."""
    if operation.method.upper() != "DELETE":
        return known
    if "{job}" in operation.path:
        return {"job": add_job(client, known["model"])}
    return {"model": add_model(client)}


def test_every_answer_is_as_documented(
    document: Any, client: httpx.Client, known: dict[str, str]
) -> None:
    operations = [result.ok() for result in document.get_all_operations()]
    assert len(operations) == 20
    before = len(client.get("/api/v1/models").json())
    for operation in operations:
        statuses = ask(operation, client, known)
        # Nothing is only refused.
        assert min(statuses) < 300, (operation.label, statuses)
    assert len(client.get("/api/v1/models").json()) == before


def ask(operation: Any, client: httpx.Client, known: dict[str, str]) -> set[int]:
    """The statuses of some requests of one kind."""
    statuses: set[int] = set()
    is_post = operation.method.upper() == "POST"
    end = operation.path.rpartition("/")[2]

    @given(case=operation.as_strategy(), data=st.data())
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    def check(case: Any, data: Any) -> None:
        # Some keep an id that nothing has, or a name of no kind.
        is_plain = data.draw(st.booleans()) or not statuses
        name = data.draw(st.sampled_from(NAMES.get(end, ("",))))
        if is_plain and case.path_parameters:
            ids = ids_of(operation, client, known)
            case.path_parameters = {name: ids[name] for name in case.path_parameters}
            for given_values in (case.query, case.body):
                if isinstance(given_values, dict):
                    given_values |= {n: v for n, v in FITTING.items() if n in given_values}
        if is_plain and is_post and end in NAMES:
            case.query["name"] = name
            case.body = case.body or b"x"
        # Which bases a model has, what is in a file, and what goes together, no schema says.
        answer = case.call_and_validate(excluded_checks=[checks.positive_data_acceptance])
        statuses.add(answer.status_code)
        if answer.status_code == 201 and end == "models":
            assert client.delete(f"/api/v1/models/{answer.json()['id']}").status_code == 204
        if answer.status_code == 200 and end == "events":
            check_events(answer.content.decode(), EVENTS[next(iter(case.path_parameters))])

    check()
    return statuses


def check_events(text: str, shape: Any) -> None:
    """The last event says that it is over, and each is a model or job."""
    events = [line for line in text.splitlines() if line.startswith("data: ")]
    states = [shape.model_validate_json(line.removeprefix("data: ")).state for line in events]
    assert states[-1] not in ("waiting", "queued", "running")
    assert set(states[:-1]) <= {"waiting", "queued", "running"}


def test_refusals_of_what_cannot_be_read_are_documented(
    document: Any, client: httpx.Client
) -> None:
    path = "/api/v1/session"
    headers = {"content-type": "application/json"}
    lengthless = client.post(path, content=iter([b"{}"]), headers=headers)
    garbled = client.post(path, content=b"c\xef\x07", headers=headers)
    assert (lengthless.status_code, garbled.status_code) == (411, 400)
    documented = document.raw_schema["paths"][path]["post"]["responses"]
    assert {"400", "411"} <= documented.keys()
