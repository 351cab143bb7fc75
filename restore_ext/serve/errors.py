"""What a client is told that cannot have what it asked for, in OpenAI's words."""

from typing import Any

from pydantic import ValidationError


class RequestError(Exception):
    """Ends a request with an HTTP status and OpenAI's error object.

    param  which part of the request is to blame
    code   a word for programs
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": str(self),
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def of_validation(error: ValidationError) -> RequestError:
    """The first thing that is wrong with a request's body."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or None
    message = first["msg"].removeprefix("Value error, ")
    return RequestError(f"{place}: {message}" if place else message, param=place)
