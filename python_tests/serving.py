"""What the tests of the server share: one of the pocket model in a thread, and its clients."""

import base64
import contextlib
import io
import threading
import time

import openai
import uvicorn
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import restore_ext
from restore_ext.pocket import held_out, load_pocket
from restore_ext.serve.app import build_app
from restore_ext.serve.engine import Engine
from restore_ext.serve.images import ImageLimits
from restore_ext.serve.metrics import Metrics

LIMITS = ImageLimits(count=2, bytes=50_000, pixels=250_000)
SCENES = [held_out(i) for i in range(6)]


def make_engine():
    model, processor = load_pocket()
    handle = restore_ext.attach(model, method="vispruner", keep=64)
    return Engine(model, processor, handle, Metrics())


@contextlib.contextmanager
def running(app, patience=20):
    """The address of `app`, served by uvicorn in a thread; and the server."""
    config = uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=patience)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}", server
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


@contextlib.contextmanager
def serving(engine, limits=LIMITS, max_requests=16, **options):
    with running(build_app(engine, "pocket", limits, max_requests), **options) as (url, server):
        yield client_of(url), server


def client_of(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def wait_until(true, seconds=30):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def plain_picture(width, height):
    """As a data URL, of few bytes whatever its size."""
    return data_url(encoded(Image.new("1", (width, height)), "PNG"))


PICTURES = [data_url(encoded(scene.image)) for scene in SCENES]


def messages(text, *urls):
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def ask(client, scene=0, **options):
    """A chat completion about a held-out scene."""
    asked = {
        "model": "pocket",
        "messages": messages(SCENES[scene].question.text, PICTURES[scene]),
        "max_tokens": 8,
        "temperature": 0,
    }
    return client.chat.completions.create(**{**asked, **options})


def text_of(answer):
    return answer.choices[0].message.content


def streamed(client, scene=0, **options):
    """The pieces of text, how it ended, the usage, and the number of chunks."""
    chunks = list(ask(client, scene, stream=True, **options))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    pieces = [choice.delta.content for choice in choices if choice.delta.content]
    ends = [choice.finish_reason for choice in choices if choice.finish_reason]
    usages = [chunk.usage for chunk in chunks if chunk.usage]
    assert choices[0].delta.role == "assistant" and len(ends) == 1
    return pieces, ends[0], usages


def metrics_of(client):
    """{(name, labels...): value} of a server."""
    url = str(client.base_url).removesuffix("v1/") + "metrics"
    answer = client._client.get(url)
    assert answer.status_code == 200
    families = text_string_to_metric_families(answer.text)
    return {
        (sample.name, *(v for k, v in sorted(sample.labels.items()) if k != "le")): sample.value
        for family in families
        for sample in family.samples
        if "le" not in sample.labels
    }
