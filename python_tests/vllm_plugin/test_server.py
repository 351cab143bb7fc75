"""End to end: vLLM's own server, with the plug-in found by its entry point, and openai's client."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time

import openai
import pytest
from engines import ask_transformers, question

import restore_ext
from restore_ext.pocket import held_out
from restore_ext.pocket.model import FOLDER

OPTIONS = {"method": "divprune", "keep": 64}
START = 900  # seconds, on one busy core


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked = {"architectures": ["RestoreLlavaForConditionalGeneration"], "restore_ext": OPTIONS}
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(FOLDER), "--served-model-name", "pocket", "--port", str(port)),
        *("--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"),
        *("--hf-overrides", json.dumps(asked)),
    ]
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out:
        server = subprocess.Popen(command, env=env, stdout=out, stderr=out)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0)
        until = time.monotonic() + START
        while True:
            assert server.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(1)
        yield client
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def chat(client, index, **more):
    scene, png = held_out(index), io.BytesIO()
    scene.image.save(png, "PNG")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    image = {"type": "image_url", "image_url": {"url": url}}
    content = [image, {"type": "text", "text": scene.question.text}]
    return client.chat.completions.create(
        model="pocket",
        messages=[{"role": "user", "content": content}],
        max_tokens=1,
        temperature=0,
        **more,
    )


def test_answers_and_usage(client, pocket):
    model, processor = pocket
    same = []
    with restore_ext.attach(model, **OPTIONS, calibrate="size"):
        for index in range(8):
            answer = chat(client, index)
            theirs = ask_transformers(model, processor, question(processor, index))
            word = answer.choices[0].message.content.strip()
            same.append(word == processor.decode(theirs.tokens[:1]))
            assert answer.usage.prompt_tokens == theirs.prompt - 576 + 64
    assert sum(same) >= 7  # near ties, see Record


def test_streams(client):
    stream = chat(client, 0, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == chat(client, 0).choices[0].message.content
    assert chunks[-1].usage.prompt_tokens == 81


def test_a_bad_picture_is_the_clients_mistake(client):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model="pocket", messages=[{"role": "user", "content": [image]}], max_tokens=1
        )
    assert chat(client, 1).usage.prompt_tokens == 79
