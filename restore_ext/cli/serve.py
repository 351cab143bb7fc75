"""`restore-ext serve`: an OpenAI-compatible server of any supported checkpoint."""

import argparse
import json
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import restore_ext
from restore_ext import serve as serving
from restore_ext.cli.errors import UserError, check_reduction
from restore_ext.cli.load import load, quiet
from restore_ext.pocket import is_pocket, parse
from restore_ext.text import one_line

if TYPE_CHECKING:
    from uvicorn import Server

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(arguments: argparse.Namespace) -> None:
    """Serves until SIGINT or SIGTERM; then requests finish, and it returns."""
    keep = check_reduction(arguments.method, arguments.keep, 1, arguments.schedule)
    try:
        serving.require()
    except ImportError as error:
        raise UserError(str(error)) from error
    import uvicorn
    from prometheus_client import disable_created_metrics

    from restore_ext.serve.app import build_app
    from restore_ext.serve.engine import Engine
    from restore_ext.serve.images import MAX_PIXELS, ImageLimits
    from restore_ext.serve.metrics import Metrics

    _require_options(arguments, MAX_PIXELS)
    limits = ImageLimits(
        count=arguments.max_images,
        bytes=arguments.max_image_bytes,
        pixels=arguments.max_image_pixels,
        remote=arguments.allow_remote_images,
    )
    schedule = arguments.schedule
    if schedule is not None:  # read once, and not with every request
        schedule = json.loads(Path(schedule).read_text())
    quiet()
    disable_created_metrics()  # a second number for every one, which nothing here needs
    name = arguments.model
    model, processor = load(name, arguments.device, arguments.dtype, option="MODEL")
    if not getattr(processor, "chat_template", None):
        raise UserError(f"MODEL: {name} has no chat template, so it cannot be served")
    try:
        handle = restore_ext.attach(
            model,
            method=arguments.method,
            keep=keep,
            restore=not arguments.no_restore,
            backend=arguments.backend,
            schedule=schedule,
            min_visual_tokens=arguments.min_visual_tokens,
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"MODEL: {name}: {one_line(error)}") from error
    spell = _in_words if is_pocket(name) else str
    engine = Engine(model, processor, handle, Metrics(), spell)
    app = build_app(engine, name, limits, arguments.max_requests)

    class Announcing(uvicorn.Server):
        async def startup(self, sockets: list | None = None) -> None:
            await super().startup(sockets)
            for server in self.servers:
                host, port = server.sockets[0].getsockname()[:2]
                address = f"[{host}]" if ":" in host else host
                print(f"serving {name} at http://{address}:{port}/v1", flush=True)

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    config = uvicorn.Config(
        app,
        host=arguments.host,
        port=arguments.port,
        log_config=None,
        timeout_graceful_shutdown=arguments.shutdown_seconds,
    )
    server = Announcing(config)
    try:
        with _stopped_by_signals(server):
            server.run()
    except SystemExit as error:  # uvicorn's, after it has logged why
        raise UserError(
            f"--host, --port: cannot listen at {arguments.host}:{arguments.port}"
        ) from error
    finally:
        handle.detach()


@contextmanager
def _stopped_by_signals(server: "Server") -> Iterator[None]:
    """uvicorn raises the signals that stopped it once more, to end the process; here they only
    stop it, and what is behind it is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_words(text: str) -> str:
    """As the pocket model was taught; raises ValueError for a word that it was not."""
    return " ".join(parse(text))


def _require_options(arguments: argparse.Namespace, max_pixels: int) -> None:
    for option in ("max_images", "max_image_bytes", "max_image_pixels", "max_requests"):
        if (got := getattr(arguments, option)) < 1:
            raise UserError(f"--{option.replace('_', '-')} must be at least 1, got {got}")
    if arguments.max_image_pixels > max_pixels:
        raise UserError(
            f"--max-image-pixels must be at most {max_pixels}, Pillow's own limit, got "
            f"{arguments.max_image_pixels}"
        )
    if not 0 <= arguments.port < 65536:
        raise UserError(f"--port must be in 0..65535, got {arguments.port}")
    if arguments.shutdown_seconds < 0:
        raise UserError(f"--shutdown-seconds must be at least 0, got {arguments.shutdown_seconds}")
