"""What a client is told that cannot have what it asked for, in OpenAI's words."""

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError

LONGEST = 80  # characters that are shown of a value
Place = tuple[int | str, ...]


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


def of_validation(error: ValidationError, keys: Callable[[Place], Sequence[str]]) -> RequestError:
    """The first thing that is wrong with a request's body: what was wanted, and what came.

    keys  of the object at a place, for one that it must not have
    """
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"must be left out, the keys are {', '.join(keys(first['loc'][:-1]))}"
    if first["type"] not in ("missing", "value_error", "json_invalid"):  # these say it themselves
        message += f", got {_short(first['input'])}"
    return RequestError(f"{place}: {message}" if place else message, param=place)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
