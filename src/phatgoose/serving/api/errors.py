"""Error responses in the form that OpenAI's clients expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

from phatgoose.serving.api.schema import FORMS

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class APIError(Exception):
    """A request that isn't answered: the HTTP status, why, and which parameter it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message, param = _replace_surrogates(self.message), self.param and _replace_surrogates(self.param)
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, dict(self.headers or {}))


def _replace_surrogates(text: str) -> str:
    """Replaces lone surrogates: JSON can carry them, UTF-8 can't."""
    return text.encode("utf-8", "replace").decode()


def from_validation_errors(errors: list[Any]) -> APIError:
    """The first of pydantic's errors. Of the request, only the parameter's name is repeated."""
    error = errors[0]
    named, *inside = [str(part) for part in error["loc"] if part != "body"] or [""]
    path = [named, *(part for part in inside if part not in FORMS)]
    param = _replace_surrogates(".".join(path)[:200]) or None
    if error["type"] == "extra_forbidden":
        return APIError(400, f"unknown parameter {param!r}.", param=param, code="unknown_parameter")
    if error["type"] == "json_invalid":
        return APIError(400, "the request's body is not JSON.")
    message = str(error["msg"]).removeprefix("Value error, ")
    if (about := error.get("ctx", {}).get("param")) is not None:  # an error about several parameters together
        return APIError(400, f"{message}.", param=_replace_surrogates(about))
    return APIError(400, f"{param}: {message}." if param else f"{message}.", param=param)
