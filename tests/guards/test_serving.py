"""The server of the documentation, run by uvicorn: of requests in one batch the broken one alone gets a 500."""

import importlib.util
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

Make = Callable[..., Any]
SERVER = Path(__file__).parents[2] / "docs" / "serving" / "server.py"
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def encode(text: str) -> list[int]:
    return [2, *(int(word) for word in text.split())]


def decode(ids: Any) -> str:
    return " ".join(str(token) for token in ids if token > 1)


@contextmanager
def running(app: Any) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def ask(url: str, prompt: str) -> tuple[int, Any]:
    body = json.dumps({"prompt": prompt}).encode()
    request = urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})
    try:
        with OPENER.open(request) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, json.loads(refused.read())


@pytest.fixture
def serve() -> Any:
    spec = importlib.util.spec_from_file_location("serving_example", SERVER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.serve


@pytest.mark.parametrize("how", ["stop", "retry"])
def test_the_broken_row_gets_a_500_and_the_others_their_answers(theirs: Make, serve: Any, how: str) -> None:
    model = theirs()
    app = serve(model, encode, decode, on_break=how, new_tokens=2, most=3, patience=5.0)
    prompts = ["70 71 72", "70 77 72", "73 74 75"]
    with running(app) as url:
        with ThreadPoolExecutor(3) as pool:
            answers = dict(zip(prompts, pool.map(lambda prompt: ask(url, prompt), prompts), strict=True))
        with OPENER.open(f"{url}/metrics/") as page:
            metrics = page.read().decode()
    assert [answers[prompts[at]][0] for at in (0, 2)] == [200, 200]
    assert all(answers[prompts[at]][1]["text"] for at in (0, 2))
    status, told = answers[prompts[1]]
    if how == "stop":
        assert status == 500
        assert (told["detail"]["site"], told["detail"]["kind"], told["detail"]["token"]) == (
            "embed_tokens",
            "overflow",
            77,
        )
        assert "exceeds the float16 maximum" in told["detail"]["verdict"]
    else:
        assert status == 200
        assert "stabilitykit_guard_retries_total 1.0" in metrics
    assert 'stabilitykit_guard_breaks_total{kind="overflow",site="embed_tokens"} 1.0' in metrics
