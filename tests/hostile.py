"""A real HTTP server on loopback that behaves as a test says, byte by byte: what no well-built framework would let a server do."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Call:
    """One request as it came in, and the means to answer it."""

    number: int  # of the calls so far, from 0
    path: str
    headers: Mapping[str, str]
    body: Any
    writer: asyncio.StreamWriter

    async def send(self, content: bytes | Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """A complete answer; anything but bytes goes out as JSON."""
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        all_headers = {"content-type": "application/json", "content-length": str(len(raw)), **(headers or {})}
        await self.raw(
            f"HTTP/1.1 {status} X\r\n".encode() + b"".join(f"{k}: {v}\r\n".encode() for k, v in all_headers.items()) + b"\r\n" + raw
        )

    async def raw(self, content: bytes) -> None:
        self.writer.write(content)
        await self.writer.drain()

    def reset(self) -> None:
        """Break the connection off without a goodbye."""
        self.writer.transport.abort()


Behave = Callable[[Call], Awaitable[None]]


@dataclass
class Server:
    url: str = ""
    calls: list[Call] = field(default_factory=list)


@contextmanager
def endpoint(behave: Behave) -> Iterator[Server]:
    """Serve `behave` in a thread with its own loop for the length of the block."""
    server, loop, ready, stop = Server(), asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode().strip().split("\r\n")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
                content = await reader.readexactly(int(headers.get("content-length", 0)))
                body = json.loads(content) if content[:1] == b"{" else content
                call = Call(len(server.calls), first.split()[1], headers, body, writer)
                server.calls.append(call)
                await behave(call)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def main() -> None:
        listening = await asyncio.start_server(one, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
        ready.set()
        await stop.wait()
        listening.close()

    def work() -> None:
        loop.run_until_complete(main())
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)


def completion(text: str = "6 and 7 make 13.\nThe answer is 13.", finish: str = "stop", **message: Any) -> dict[str, Any]:
    """A plain ChatCompletion."""
    return {
        "id": "c",
        "object": "chat.completion",
        "model": "m",
        "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }


def refusal(message: str, code: str | None = None, kind: str = "error") -> dict[str, Any]:
    """OpenAI's error JSON."""
    return {"error": {"message": message, "type": kind, "code": code, "param": None}}
