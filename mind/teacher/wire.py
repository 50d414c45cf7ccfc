"""What the embedded teacher's routes share: OpenAI's error JSON, and JSON responses. starlette is imported when a response is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response


class ApiError(Exception):
    """A refusal that the client gets as `{"error": {message, type, param, code}}` with its status."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": code}}


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    from starlette.responses import Response

    return Response(json.dumps(content, ensure_ascii=False), status, headers, "application/json")


async def api_error_response(request: Request, error: Exception) -> Response:
    """Exception handler for ApiError."""
    assert isinstance(error, ApiError)
    return json_response(error.body, error.status, error.headers)


async def http_error_response(request: Request, error: Exception) -> Response:
    """Exception handler for what the router refuses: unknown path, wrong method."""
    status, detail = getattr(error, "status_code", 500), getattr(error, "detail", "")
    return json_response(ApiError(status, f"{request.method} {request.url.path}: {detail}").body, status)
