"""Pictures as clients send them: bytes behind a URL, decoded within limits."""

import base64
import binascii
import io
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from PIL import Image, ImageOps

from restore_ext.serve.errors import RequestError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # no others are even recognised
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 0  # Pillow's own limit
_CHUNK = 1 << 16
_REDIRECTS = 3


@dataclass(frozen=True)
class ImageLimits:
    """What a request may bring."""

    count: int = 8
    bytes: int = 20 << 20  # of each picture, as it is stored
    pixels: int = 40_000_000  # of each picture, once decoded
    remote: bool = False  # whether http and https addresses are fetched
    seconds: float = 10.0  # for fetching one

    @property
    def body(self) -> int:
        """Bytes of a request: every picture twice as large as allowed, in base64, and text."""
        return 2 * self.count * self.bytes * 4 // 3 + (4 << 20)


def require_images(urls: Sequence[str], limits: ImageLimits) -> None:
    """Raises RequestError for what can be refused before anything is read."""
    if len(urls) > limits.count:
        raise RequestError(
            f"messages: at most {limits.count} images can be in a request, got {len(urls)}",
            param="messages",
            code="too_many_images",
        )
    for number, url in enumerate(urls):
        kind = _scheme(url)
        if kind == "data" or (kind in ("http", "https") and limits.remote):
            continue
        if kind in ("http", "https"):
            wanted = "a data URL, for this server fetches no remote images"
        else:
            wanted = "a data, http or https URL" if limits.remote else "a data URL"
        raise _wrong(number, f"must be {wanted}, got {url[:64]!r}")


def read(urls: Sequence[str], limits: ImageLimits) -> list[bytes]:
    """The bytes behind URLs that passed require_images(). Waits for remote servers."""
    return [
        _inline(number, url, limits) if _scheme(url) == "data" else _fetch(number, url, limits)
        for number, url in enumerate(urls)
    ]


def decode(pictures: Sequence[bytes], limits: ImageLimits) -> list[Image.Image]:
    """The pictures as RGB, upright; of animations the first frame."""
    return [_decode(number, picture, limits) for number, picture in enumerate(pictures)]


def _decode(number: int, picture: bytes, limits: ImageLimits) -> Image.Image:
    try:
        # Reads the header alone; the pixels come with the conversion.
        with Image.open(io.BytesIO(picture), formats=FORMATS) as image:
            if image.width * image.height > limits.pixels:
                raise _wrong(
                    number,
                    f"must have at most {limits.pixels} pixels, got {image.width} x {image.height}",
                    "image_too_large",
                )
            return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError as error:
        raise _wrong(number, f"must not be so large: {error}", "image_too_large") from error
    # What Pillow's decoders raise for bytes that are no picture, or half of one.
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error) as error:
        raise _wrong(number, f"must be one of {', '.join(FORMATS)}: {error}") from error


def _inline(number: int, url: str, limits: ImageLimits) -> bytes:
    head, comma, data = url.partition(",")
    kind, *parameters = head[len("data:") :].lower().split(";")
    if not comma or "base64" not in parameters or not kind.startswith("image/"):
        raise _wrong(number, f"must be data:image/...;base64,..., got {url[:64]!r}")
    if len(data) * 3 // 4 - 2 > limits.bytes:
        raise _too_many_bytes(number, limits)
    try:
        picture = base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise _wrong(number, f"must be base64: {error}") from error
    if len(picture) > limits.bytes:
        raise _too_many_bytes(number, limits)
    return picture


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a few, to http and https alone."""

    max_redirections = _REDIRECTS

    def redirect_request(
        self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, url: Any
    ) -> Any:
        if _scheme(url) not in ("http", "https"):
            raise urllib.error.URLError(f"a redirect to {url[:64]!r}")
        return super().redirect_request(req, fp, code, msg, headers, url)


def _opener() -> urllib.request.OpenerDirector:
    # Built by hand: urllib's own also opens file and ftp.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


def _fetch(number: int, url: str, limits: ImageLimits) -> bytes:
    deadline = time.monotonic() + limits.seconds
    picture = bytearray()
    try:
        with _opener().open(url, timeout=limits.seconds) as answer:
            while chunk := answer.read1(_CHUNK):
                picture += chunk
                if len(picture) > limits.bytes:
                    raise _too_many_bytes(number, limits)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not complete within {limits.seconds:g} s")
    except (OSError, ValueError, HTTPException) as error:  # URLError is an OSError
        raise _wrong(number, f"cannot be fetched from {url[:64]!r}: {error}") from error
    return bytes(picture)


def _scheme(url: str) -> str:
    return url.partition(":")[0].lower()


def _too_many_bytes(number: int, limits: ImageLimits) -> RequestError:
    return _wrong(number, f"must have at most {limits.bytes} bytes", "image_too_large")


def _wrong(number: int, message: str, code: str = "invalid_image") -> RequestError:
    return RequestError(f"messages: image {number} {message}", param="messages", code=code)
