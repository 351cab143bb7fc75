"""Pictures as clients send them: what is fetched, what is decoded, and what never is."""

import http.server
import io
import random
import threading
import time

import openai
import pytest
from PIL import Image
from serving import (
    LIMITS,
    PICTURES,
    SCENES,
    ask,
    client_of,
    data_url,
    encoded,
    make_engine,
    messages,
    running,
    text_of,
)

from restore_ext.serve.app import build_app
from restore_ext.serve.errors import RequestError
from restore_ext.serve.images import FORMATS, ImageLimits, decode, read, require_images

REMOTE = ImageLimits(count=2, bytes=50_000, pixels=250_000, remote=True, seconds=1.0)
PNG = encoded(SCENES[0].image)


class Site(http.server.BaseHTTPRequestHandler):
    asked: list = []  # noqa: RUF012

    def do_GET(self):
        self.asked.append(self.path)
        redirects = {
            "/moved.png": "/scene.png",
            "/to-file": "file:///etc/hostname",
            "/to-ftp": "ftp://127.0.0.1/scene.png",
            "/round": "/round",
        }
        if self.path in redirects:
            self.send_response(302)
            self.send_header("Location", redirects[self.path])
            self.end_headers()
            return
        self.send_response(404 if self.path == "/missing.png" else 200)
        self.end_headers()
        if self.path == "/scene.png":
            self.wfile.write(PNG)
        elif self.path in ("/endless", "/slow"):
            piece = bytes(10_000) if self.path == "/endless" else b"x"
            self._pour(piece, 0.0 if self.path == "/endless" else 0.2)

    def _pour(self, piece, pause):
        try:
            for _ in range(50):
                self.wfile.write(piece)
                time.sleep(pause)
        except OSError:
            return  # the other side has had enough

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture(scope="module")
def site():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def clients():
    """Of two servers on one model: as it is by default, and with remote images."""
    engine = make_engine()
    with (
        running(build_app(engine, "pocket", LIMITS, 16)) as (default, _),
        running(build_app(engine, "pocket", REMOTE, 16)) as (remote, _),
    ):
        yield client_of(default), client_of(remote)


def test_remote_pictures_are_fetched_only_where_allowed(clients, site):
    default, remote = clients
    wanted = text_of(ask(default))
    for path in ("/scene.png", "/moved.png"):
        asked = {"messages": messages(SCENES[0].question.text, site + path)}
        Site.asked.clear()
        with pytest.raises(openai.BadRequestError, match="this server fetches no remote images"):
            ask(default, **asked)
        assert not Site.asked
        assert text_of(ask(remote, **asked)) == wanted
        assert Site.asked[0] == path
    mixed = messages("how many objects ?", site + "/scene.png", PICTURES[1])
    assert ask(remote, messages=mixed).usage.restore_ext["visual_tokens"]["prompt"] == 2 * 576


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("/missing.png", "invalid_image", "cannot be fetched.*404"),
        ("/empty", "invalid_image", "must be one of"),
        ("/to-file", "invalid_image", "'file:///etc/hostname' is not allowed"),
        ("/to-ftp", "invalid_image", "redirect to 'ftp:"),
        ("/round", "invalid_image", "cannot be fetched"),
        ("/endless", "image_too_large", "at most 50000 bytes"),
        ("/slow", "invalid_image", "not complete within 1 s"),
    ],
)
def test_what_cannot_be_fetched_is_refused(clients, site, path, code, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        ask(clients[1], messages=messages("how many objects ?", site + path))
    assert caught.value.code == code


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a.png", "http://", "http://[::1"])
def test_addresses_that_answer_nothing_are_refused(clients, url):
    with pytest.raises(openai.BadRequestError, match="cannot be fetched"):
        ask(clients[1], messages=messages("how many objects ?", url))


@pytest.mark.parametrize(
    "url", ["file:///etc/hostname", "FILE:/etc/hostname", "ftp://a/b", "x", ""]
)
@pytest.mark.parametrize("limits", [LIMITS, REMOTE])
def test_nothing_but_pictures_by_data_and_http(url, limits):
    with pytest.raises(RequestError, match="image 0 must be a data"):
        require_images([url], limits)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_decoded(kind):
    (image,) = decode([encoded(SCENES[0].image, kind)], LIMITS)
    assert image.mode == "RGB" and image.size == (96, 96)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    picture = Image.new(mode, (8, 4)) if mode == "I;16" else SCENES[0].image.convert(mode)
    (image,) = decode([encoded(picture, "TIFF")], LIMITS)
    assert image.mode == "RGB" and image.size == picture.size


def test_pictures_are_turned_upright_and_animations_stand_still():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    (turned,) = decode([encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif)], LIMITS)
    assert turned.size == (10, 20)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    (still,) = decode([moving], LIMITS)
    assert still.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_pictures_are_refused_and_nothing_else_happens():
    """Cut short or with bytes changed, every format either decodes or is a client's mistake."""
    rng, refused = random.Random(0), 0
    small = SCENES[0].image.resize((24, 24))
    for kind in FORMATS:
        whole = encoded(small, kind)
        for _ in range(60):
            broken = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.5 else whole)
            for _ in range(rng.randrange(4) * (len(broken) > 0)):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            try:
                decode([bytes(broken)], LIMITS)
            except RequestError as error:
                assert (error.status, error.param) == (400, "messages")
                refused += 1
    assert 100 < refused < 360


def test_pixels_are_counted_before_they_are_decoded(monkeypatch):
    loaded = []
    monkeypatch.setattr(Image.Image, "convert", lambda *a, **k: loaded.append(a))
    buffer = io.BytesIO()
    Image.new("1", (501, 500)).save(buffer, "PNG")
    with pytest.raises(RequestError, match="501 x 500"):
        decode([buffer.getvalue()], LIMITS)
    assert not loaded


def test_bytes_are_counted_before_and_after_base64():
    exact = bytes(LIMITS.bytes)
    assert read([data_url(exact)], LIMITS) == [exact]
    for over in (1, 2, 3, 1000):
        with pytest.raises(RequestError, match="at most 50000 bytes"):
            read([data_url(bytes(LIMITS.bytes + over))], LIMITS)
