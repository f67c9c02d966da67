"""Requests that the server's own OpenAPI description allows, and some that it does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from server_running import Running, model_folder, running, until

schemathesis = pytest.importorskip("schemathesis")
OPERATIONS = [("GET", path) for path in ("/health", "/metrics", "/", "/v1/models")] + [
    ("POST", path)
    for path in (
        *("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"),
        *("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
    )
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("schema")
    with running(folder / "run", "--folder", str(model_folder(folder / "model")), key="k", admin_key="boss") as started:
        yield started


@pytest.fixture(scope="module")
def schema(server: Running) -> Any:
    status, said, _ = server.ask("/openapi.json")
    assert status == 200
    return schemathesis.openapi.from_dict(said)


def test_every_route_is_described(schema: Any) -> None:
    described = {(method.upper(), path) for path, item in schema.raw_schema["paths"].items() for method in item}
    assert described == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_what_the_description_allows_is_answered_as_it_says(
    server: Running, schema: Any, method: str, path: str
) -> None:
    """Never an error of the server's, always a described status, and errors of one form."""
    operation = schema[path][method]
    documented = {int(status) for status in operation.definition.raw["responses"]}
    said = {"200": operation.definition.raw["responses"]["200"]["content"]}
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]

    @given(data=st.data())
    @settings(
        max_examples=15 if method == "POST" else 2,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(data: Any) -> None:
        mode = data.draw(st.sampled_from(modes if method == "POST" else modes[:1]))
        case = data.draw(operation.as_strategy(generation_mode=mode))
        body = None if method == "GET" else json.dumps(case.body, default=str).encode()
        key = "boss" if data.draw(st.booleans()) else "k"
        status, answer, headers = server.ask(path, body, method=method, key=key)
        assert status in documented and status not in (401, 500), (status, answer)
        if status != 200:
            assert set(answer["error"]) == {"message", "type", "param", "code"} and answer["error"]["message"]
        else:
            assert mode is modes[0] and headers["content-type"].partition(";")[0] in said["200"]

    check()
    until(server.healthy)
    assert "Traceback" not in server.err.read_text()
