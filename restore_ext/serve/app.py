"""The HTTP side: routes, OpenAI's errors, the accounts of every request."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers.cli.serving.utils import X_REQUEST_ID

from restore_ext.serve.chat import Chat
from restore_ext.serve.engine import Engine
from restore_ext.serve.errors import RequestError
from restore_ext.serve.images import ImageLimits
from restore_ext.serve.metrics import Metrics

CHAT = "/v1/chat/completions"
LOGGER = logging.getLogger("restore_ext.serve")


def build_app(engine: Engine, name: str, limits: ImageLimits, max_requests: int) -> FastAPI:
    """An app that serves one model as `name`, `max_requests` at a time, waiting ones included.

    It closes the engine when it shuts down.
    """
    created = int(time.time())
    chat = Chat(engine, name, limits)
    metrics = engine.metrics

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    # Their pages load scripts from elsewhere.
    app = FastAPI(title="restore_ext", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Accounts, metrics=metrics, max_requests=max_requests)

    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> Response:
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(HTTPException)
    async def refuse_http(_: Request, error: HTTPException) -> Response:
        refused = RequestError(str(error.detail), status=error.status_code)
        return JSONResponse(refused.body(), error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def fail(_: Request, error: Exception) -> Response:
        return JSONResponse(RequestError("internal error", status=500).body(), 500)

    @app.post(CHAT)
    async def chat_completions(request: Request) -> Response:
        return await chat.respond(request, request.state.request_id)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [model(name)]}

    @app.get("/v1/models/{wanted:path}")
    def model(wanted: str) -> dict[str, Any]:
        if wanted != name:
            raise RequestError(
                f"model: this server has {name}, got {wanted}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return {"id": name, "object": "model", "created": created, "owned_by": "restore_ext"}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    def scrape() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


class Accounts:
    """Counts chat completions and their status, names them, and refuses those that are too many.

    Below everything else, so that no way to end a request is missed.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, max_requests: int) -> None:
        self.app = app
        self.metrics = metrics
        self.max_requests = max_requests
        self.count = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"], scope["path"]) != ("POST", CHAT):
            await self.app(scope, receive, send)
            return
        arrived = time.perf_counter()
        given = dict(scope["headers"]).get(X_REQUEST_ID.encode(), b"").decode("latin-1")
        request_id = given or f"chatcmpl-{uuid.uuid4().hex}"
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, arrived=arrived)
        sent: int | None = None
        ended = False

        async def note(message: Message) -> None:
            nonlocal sent, ended
            if message["type"] == "http.response.start":
                sent = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    (X_REQUEST_ID.encode(), request_id.encode("latin-1")),
                ]
            await send(message)
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)

        self.count += 1
        self.metrics.in_flight.inc()
        try:
            if self.count > self.max_requests:
                busy = RequestError("the server is busy: try again later", status=503)
                refusal = JSONResponse(busy.body(), 503, headers={"retry-after": "1"})
                await refusal(scope, receive, note)
            else:
                await self.app(scope, receive, note)
        except asyncio.CancelledError:  # the server stops, and has no more patience
            state["status"] = 503
            gone = RequestError("the server is stopping", status=503)
            if sent is None:
                await JSONResponse(gone.body(), 503)(scope, receive, send)
            else:
                event = f"data: {json.dumps(gone.body())}\n\n"
                await send({"type": "http.response.body", "body": event.encode()})
        except Exception:
            state["status"] = 500  # the response comes from further out
            raise
        finally:
            self.count -= 1
            if "cancel" in state:
                state["cancel"]()
            status = state.get("status", sent if ended else 499)
            self.metrics.in_flight.dec()
            self.metrics.requests.labels(str(status)).inc()
            self.metrics.request_seconds.observe(time.perf_counter() - arrived)
            LOGGER.info("%s %s %.3f s", request_id, status, time.perf_counter() - arrived)
