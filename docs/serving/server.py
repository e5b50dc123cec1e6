"""A server that answers requests in batches: a row that breaks gets a 500 with its diagnosis, the others their answers.

    app = serve(model, encode, decode)      # a model of transformers', and its tokenizer's two ways
    uvicorn.run(app)

POST /generate {"prompt": "..."} answers {"text": "..."}; GET /metrics is Prometheus's.
"""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

import torch
from fastapi import FastAPI, HTTPException
from prometheus_client import CollectorRegistry, make_asgi_app
from pydantic import BaseModel

import stabilitykit as sk
from stabilitykit.guards.breaks import RowBreak
from stabilitykit.guards.metrics import PrometheusMetrics


class Prompt(BaseModel):
    prompt: str


class Answer(BaseModel):
    text: str


def serve(
    model: Any,
    encode: Callable[[str], list[int]],
    decode: Callable[[Sequence[int]], str],
    *,
    on_break: Any = "stop",
    new_tokens: int = 64,
    most: int = 8,
    patience: float = 0.02,
) -> FastAPI:
    """`most` requests make a batch, or those that came within `patience` seconds of the first. `on_break` is "stop" or
    "retry"; "raise" would end the whole batch.
    """
    registry = CollectorRegistry()
    guard = sk.guard(model, on_break, watch="residual", headroom=1.0, metrics=[PrometheusMetrics(registry)])
    waiting: queue.Queue[tuple[str, Future[Any]] | None] = queue.Queue()
    pad = model.generation_config.pad_token_id or 0

    def batch(first: tuple[str, Future[Any]]) -> list[tuple[str, Future[Any]]]:
        taken, until = [first], time.monotonic() + patience
        while len(taken) < most:
            try:
                item = waiting.get(timeout=max(until - time.monotonic(), 0))
            except queue.Empty:
                break
            if item is None:
                waiting.put(None)
                break
            if item[1].set_running_or_notify_cancel():  # not of a client that has gone
                taken.append(item)
        return taken

    def answer(taken: Sequence[tuple[str, Future[Any]]]) -> None:
        prompts = [encode(prompt) for prompt, _ in taken]
        length = max(map(len, prompts))
        ids = torch.tensor([[pad] * (length - len(one)) + one for one in prompts])
        mask = torch.tensor([[0] * (length - len(one)) + [1] * len(one) for one in prompts])
        guard.take()  # of a batch that another error ended
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, num_beams=1, num_return_sequences=1
        )  # one row a request, which stays in its place
        broken: dict[int, RowBreak] = {}
        for one in guard.take():
            if one.did in ("stopped", "gave up") or one.harmless is False:  # not the retried ones
                broken.setdefault(one.row, one)
        for row, (_, future) in enumerate(taken):
            future.set_result(broken.get(row) or decode(made[row, length:].tolist()))

    def work() -> None:
        while (first := waiting.get()) is not None:
            if not first[1].set_running_or_notify_cancel():
                continue
            taken = batch(first)
            try:
                answer(taken)
            except Exception as error:  # of the model's: nobody is to wait for ever
                for _, future in taken:
                    if not future.done():
                        future.set_exception(error)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with guard:
            worker = threading.Thread(target=work)
            worker.start()
            yield
            waiting.put(None)
            worker.join()

    app = FastAPI(lifespan=lifespan)
    app.mount("/metrics", make_asgi_app(registry))

    @app.post("/generate")
    async def generate(request: Prompt) -> Answer:
        future: Future[Any] = Future()
        waiting.put((request.prompt, future))
        found = await asyncio.wrap_future(future)
        if not isinstance(found, str):
            raise HTTPException(500, detail=found.document())
        return Answer(text=found)

    return app
