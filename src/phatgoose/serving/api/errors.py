"""What is refused, as OpenAI's clients expect to be told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

from phatgoose.serving.api.parameters import FORMS

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Refusal(Exception):
    """A request that isn't answered: HTTP status, why, and which parameter it is about."""

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
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {
            "error": {
                "message": plain(self.message),
                "type": kind,
                "param": plain(self.param),
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, dict(self.headers or {}))


def plain(text: str | None) -> str | None:
    """Text that UTF-8 can hold: half characters, which JSON can carry, replaced."""
    return None if text is None else text.encode("utf-8", "replace").decode()


def of_validation(errors: list[Any]) -> Refusal:
    """The first of pydantic's errors; nothing of the request is repeated but the parameter's name."""
    error = errors[0]
    named, *inside = [str(part) for part in error["loc"] if part != "body"] or [""]
    place = [named, *(part for part in inside if part not in FORMS)]
    param = plain(".".join(place)[:200]) or None
    if error["type"] == "extra_forbidden":
        return Refusal(400, f"unknown parameter {param!r}.", param=param, code="unknown_parameter")
    if error["type"] == "json_invalid":
        return Refusal(400, "the request's body is not JSON.")
    message = str(error["msg"]).removeprefix("Value error, ")
    if (about := error.get("ctx", {}).get("param")) is not None:  # of several parameters together
        return Refusal(400, f"{message}.", param=plain(about))
    return Refusal(400, f"{param}: {message}." if param else f"{message}.", param=param)
