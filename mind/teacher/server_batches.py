"""OpenAI's file and batch endpoints of the embedded teacher: upload a JSONL of requests, make a batch, poll, fetch the output.

Files and batches live in the server's memory. A batch is worked off at its end time (`Behaviour.batch_seconds` after it was made),
not line by line: what a client sees of the protocol is the same.
"""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass, field
from email import message_from_bytes
from typing import TYPE_CHECKING, Any

from mind.teacher.recorded import Behaviour, complete
from mind.teacher.wire import ApiError, json_response

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route


@dataclass
class Batches:
    """All files (id -> name, purpose, bytes) and batches (id -> Batch object as JSON) of one server."""

    behaviour: Behaviour
    files: dict[str, tuple[str, str, bytes]] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    async def upload(self, request: Request) -> Response:
        head = f"Content-Type: {request.headers.get('content-type', '')}\r\n\r\n".encode()
        parts = {
            str(part.get_param("name", header="content-disposition")): part
            for part in message_from_bytes(head + await request.body()).walk()
        }
        if "file" not in parts or "purpose" not in parts:
            raise ApiError(400, "wanted multipart form data with 'file' and 'purpose'")
        purpose = _payload(parts["purpose"]).decode()
        return json_response(self._file(self._store(parts["file"].get_filename() or "file", purpose, _payload(parts["file"]))))

    async def show_file(self, request: Request) -> Response:
        return json_response(self._file(self._known(self.files, request.path_params["id"])))

    async def content(self, request: Request) -> Response:
        from starlette.responses import Response

        return Response(self.files[self._known(self.files, request.path_params["id"])][2], media_type="application/octet-stream")

    async def delete(self, request: Request) -> Response:
        name = self._known(self.files, request.path_params["id"])
        del self.files[name]
        return json_response({"id": name, "object": "file", "deleted": True})

    async def create(self, request: Request) -> Response:
        body = json.loads(await request.body())
        if body.get("endpoint") != "/v1/chat/completions":
            raise ApiError(400, "wanted endpoint '/v1/chat/completions'")
        source = self._known(self.files, body.get("input_file_id"))
        name = f"batch_{next(self.numbers)}"
        now = int(time.time())
        self.batches[name] = {
            "id": name,
            "object": "batch",
            "endpoint": body["endpoint"],
            "input_file_id": source,
            "completion_window": body.get("completion_window", "24h"),
            "status": "in_progress",
            "created_at": now,
            "in_progress_at": now,
            "metadata": body.get("metadata"),
            "request_counts": {"total": len(self._requests(source)), "completed": 0, "failed": 0},
            "_ends": time.monotonic() + self.behaviour.batch_seconds,
        }
        return json_response(self._public(name))

    async def show(self, request: Request) -> Response:
        name = self._known(self.batches, request.path_params["id"])
        self._work_off(name)
        return json_response(self._public(name))

    async def index(self, request: Request) -> Response:
        names = list(reversed(self.batches))
        after = request.query_params.get("after")
        start = names.index(after) + 1 if after in names else 0
        end = start + int(request.query_params.get("limit", 20))
        for name in names[start:end]:
            self._work_off(name)
        data = [self._public(name) for name in names[start:end]]
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        return json_response({"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": end < len(names)})

    async def cancel(self, request: Request) -> Response:
        name = self._known(self.batches, request.path_params["id"])
        self._work_off(name)
        if self.batches[name]["status"] == "in_progress":
            self.batches[name] |= {"status": "cancelled", "cancelled_at": int(time.time())}
        return json_response(self._public(name))

    def _store(self, name: str, purpose: str, content: bytes) -> str:
        number = f"file-{next(self.numbers)}"
        self.files[number] = (name, purpose, content)
        return number

    def _file(self, name: str) -> dict[str, Any]:
        filename, purpose, content = self.files[name]
        return {
            "id": name,
            "object": "file",
            "bytes": len(content),
            "created_at": int(time.time()),
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
        }

    def _public(self, name: str) -> dict[str, Any]:
        return {key: value for key, value in self.batches[name].items() if not key.startswith("_")}

    def _known(self, table: dict[str, Any], name: Any) -> str:
        if not isinstance(name, str) or name not in table:
            raise ApiError(404, f"no such object: {name!r}", code="not_found")
        return name

    def _requests(self, source: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.files[source][2].splitlines() if line.strip()]

    def _work_off(self, name: str) -> None:
        """Answer every request of a batch whose time has come; good replies go to the output file, refused ones to the error file."""
        batch = self.batches[name]
        if batch["status"] != "in_progress" or time.monotonic() < batch["_ends"]:
            return
        lines = [_line(request, self.behaviour) for request in self._requests(batch["input_file_id"])]
        good = [line for line in lines if line["response"]["status_code"] == 200]
        bad = [line for line in lines if line["response"]["status_code"] != 200]
        batch |= {"status": "completed", "completed_at": int(time.time())}
        batch["request_counts"] |= {"completed": len(good), "failed": len(bad)}
        for key, some in (("output_file_id", good), ("error_file_id", bad)):
            batch[key] = self._store(f"{name}_{key}.jsonl", "batch_output", _jsonl(some)) if some else None


def batch_routes(behaviour: Behaviour) -> list[Route]:
    from starlette.routing import Route

    batches = Batches(behaviour)
    return [
        Route("/v1/files", batches.upload, methods=["POST"]),
        Route("/v1/files/{id}", batches.show_file, methods=["GET"]),
        Route("/v1/files/{id}", batches.delete, methods=["DELETE"]),
        Route("/v1/files/{id}/content", batches.content, methods=["GET"]),
        Route("/v1/batches", batches.create, methods=["POST"]),
        Route("/v1/batches", batches.index, methods=["GET"]),
        Route("/v1/batches/{id}", batches.show, methods=["GET"]),
        Route("/v1/batches/{id}/cancel", batches.cancel, methods=["POST"]),
    ]


def _line(request: dict[str, Any], behaviour: Behaviour) -> dict[str, Any]:
    try:
        status, body = 200, complete(request.get("body"), behaviour)
    except ApiError as error:
        status, body = error.status, error.body
    response = {"status_code": status, "request_id": f"req-{request.get('custom_id')}", "body": body}
    return {"id": f"batch_req_{request.get('custom_id')}", "custom_id": request.get("custom_id"), "response": response, "error": None}


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _payload(part: Any) -> bytes:
    content = part.get_payload(decode=True)
    return content if isinstance(content, bytes) else b""
