"""The embedded teacher: recorded rationales behind a real OpenAI-compatible HTTP server on loopback.

`mind teacher` serves it until it is stopped; `teacher.base_url: embedded` starts one for the length of a run (`embedded_teacher`).
It can be as unkind as a real endpoint: latency, slow tails, failures, wrong answers, a limit on calls in flight with 429.

    GET  /v1/models                    POST /v1/chat/completions  (plain and SSE)
    POST /v1/files, /v1/batches, ...   (teacher.server_batches)
    GET  /stats                        what was asked so far: calls, refusals, peak in flight

starlette and uvicorn are imported when a server is built, not with this module.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from mind.errors import TeacherError
from mind.records import PERSPECTIVES
from mind.teacher.recorded import MODEL, Behaviour, complete, starter_corpus
from mind.teacher.server_batches import batch_routes
from mind.teacher.wire import ApiError, api_error_response, http_error_response, json_response

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from uvicorn import Server

START_SECONDS = 20.0
STREAM_PIECE = 24  # characters a chunk: enough chunks to be a stream, few enough to be quick


@dataclass
class Stats:
    """What a server was asked. `calls` counts every chat completion that came in, `answered` those that got a reply."""

    calls: int = 0
    answered: int = 0
    refused: int = 0
    failed: int = 0
    in_flight: int = 0
    peak: int = 0


@dataclass
class Endpoint:
    """The routes over one behaviour, with their counters."""

    behaviour: Behaviour
    stats: Stats = field(default_factory=Stats)

    def __post_init__(self) -> None:
        self._dice = random.Random(self.behaviour.seed)

    def application(self) -> Starlette:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        routes = [
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/stats", self.show_stats),
            *batch_routes(self.behaviour),
        ]
        return Starlette(routes=routes, exception_handlers={ApiError: api_error_response, HTTPException: http_error_response})

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        return json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "mind"}]})

    async def show_stats(self, request: Request) -> Response:
        return json_response(asdict(self.stats))

    async def chat(self, request: Request) -> Response:
        self.stats.calls += 1
        self._check_key(request)
        limit = self.behaviour.max_in_flight
        if limit is not None and self.stats.in_flight >= limit:
            self.stats.refused += 1
            wait = self.behaviour.retry_after
            headers = {"retry-after": str(math.ceil(wait)), "retry-after-ms": str(round(wait * 1000))}
            raise ApiError(429, f"more than {limit} calls in flight", "rate_limit_error", "rate_limit_exceeded", headers)
        self.stats.in_flight += 1
        self.stats.peak = max(self.stats.peak, self.stats.in_flight)
        try:
            return await self._answer(request)
        finally:
            self.stats.in_flight -= 1

    async def _answer(self, request: Request) -> Response:
        slow, failing = self._dice.random() < self.behaviour.slow_rate, self._dice.random() < self.behaviour.fail_rate
        try:
            body = json.loads(await request.body())
        except ValueError:
            raise ApiError(400, "the body is not JSON") from None
        await asyncio.sleep(self.behaviour.latency + slow * self.behaviour.slow)
        if failing:
            self.stats.failed += 1
            raise ApiError(500, "the teacher stumbled (fail_rate)", "server_error")
        completion = complete(body, self.behaviour)
        self.stats.answered += 1
        if body.get("stream"):
            return _stream(completion, bool((body.get("stream_options") or {}).get("include_usage")))
        return json_response(completion)

    def _check_key(self, request: Request) -> None:
        wanted = self.behaviour.api_key
        if wanted is not None and request.headers.get("authorization") != f"Bearer {wanted}":
            raise ApiError(401, "incorrect API key", "authentication_error", "invalid_api_key")


def _stream(completion: dict[str, Any], with_usage: bool) -> Response:
    from starlette.responses import StreamingResponse

    return StreamingResponse(_events(completion, with_usage), media_type="text/event-stream")


async def _events(completion: dict[str, Any], with_usage: bool) -> AsyncIterator[str]:
    head = {key: completion[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}

    def event(choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
        return f"data: {json.dumps(head | {'choices': choices, 'usage': usage}, ensure_ascii=False)}\n\n"

    for choice in completion["choices"]:
        index, text = choice["index"], choice["message"]["content"]
        yield event([{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        for start in range(0, len(text), STREAM_PIECE):
            yield event([{"index": index, "delta": {"content": text[start : start + STREAM_PIECE]}, "finish_reason": None}])
        yield event([{"index": index, "delta": {}, "finish_reason": choice["finish_reason"]}])
    if with_usage:
        yield event([], completion["usage"])
    yield "data: [DONE]\n\n"


# -------------------------------------------------------------------- serving


def serve(host: str = "127.0.0.1", port: int = 8765, **behaviour: Any) -> None:
    """Serve until Ctrl-C; prints its address once it listens.

    Args:
        port: 0 for any free one.
        behaviour: fields of `Behaviour`.

    Raises:
        TeacherError: the address cannot be used.
    """
    sock = _listen(host, port)
    questions = len(starter_corpus().entries)
    print(f"teacher '{MODEL}' at {_base_url(sock)}: {questions} questions, {len(PERSPECTIVES)} perspectives; Ctrl-C stops it", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        _server(Endpoint(Behaviour(**behaviour))).run(sockets=[sock])


@contextmanager
def embedded_teacher(behaviour: Behaviour | None = None, stats: Stats | None = None) -> Iterator[str]:
    """A teacher on a free loopback port in a thread of its own for the length of the block; yields its base URL.

    Args:
        stats: filled while it runs, for a caller that wants to count.

    Raises:
        TeacherError: it did not come up.
    """
    sock = _listen("127.0.0.1", 0)
    server = _server(Endpoint(behaviour or Behaviour(), stats or Stats()))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="embedded-teacher", daemon=True)
    thread.start()
    try:
        _await_start(server, thread)
        yield _base_url(sock)
    finally:
        server.should_exit = True
        thread.join(START_SECONDS)
        sock.close()


def _server(endpoint: Endpoint) -> Server:
    import uvicorn

    config = uvicorn.Config(
        endpoint.application(),
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_level="critical",
        access_log=False,
        backlog=4096,
        timeout_keep_alive=120,  # longer than a client's pause between calls: a connection closed while a call is sent costs a retry
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise TeacherError(f"cannot listen on {host}:{port}: {error.strerror}", do="choose a free port with --port, or 0 for any") from None
    return sock


def _base_url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def _await_start(server: Server, thread: threading.Thread) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise TeacherError("the embedded teacher did not come up", do="run `mind doctor`, or use a real endpoint (teacher.base_url)")
        time.sleep(0.005)
