"""The server when something breaks, when there is too much to do, and when it has to stop."""

import concurrent.futures

import openai
import pytest
import torch
from serving import ask, make_engine, metrics_of, serving, streamed, text_of, wait_until


def test_what_breaks_is_told_and_the_next_request_is_served(monkeypatch):
    engine = make_engine()
    stock = engine.model.generate

    def breaks(**kwargs):
        if kwargs["generation_config"].max_new_tokens == 7:
            raise RuntimeError("a secret")
        if kwargs["generation_config"].max_new_tokens == 6:
            kwargs["streamer"].put(torch.zeros(1, 3, dtype=torch.long))
            kwargs["streamer"].put(torch.tensor([20]))
            raise RuntimeError('a "secret"')
        return stock(**kwargs)

    monkeypatch.setattr(engine.model, "generate", breaks)
    with serving(engine) as (client, _):
        with pytest.raises(openai.InternalServerError, match="generation failed") as caught:
            ask(client, max_tokens=7)
        assert "secret" not in str(caught.value) and caught.value.type == "server_error"
        with pytest.raises(openai.APIError, match="generation failed: RuntimeError"):
            streamed(client, max_tokens=6)
        assert text_of(ask(client, 2))
        wait_until(lambda: metrics_of(client)["restore_ext_requests_in_flight",] == 0)
        assert metrics_of(client)["restore_ext_requests_total", "500"] == 2


def test_a_full_server_refuses_and_a_stopping_one_finishes():
    engine = make_engine()
    with serving(engine, max_requests=1) as (client, server):
        stream = ask(client, 2, stream=True, max_tokens=60)
        next(iter(stream))
        with pytest.raises(openai.InternalServerError, match="busy") as caught:
            ask(client)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == "1"
        server.should_exit = True
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length" and len(rest) > 50


def test_a_stopping_server_refuses_what_takes_longer_than_its_patience(caplog):
    with serving(make_engine(), patience=0) as (client, server):
        stream = ask(client, 2, stream=True, max_tokens=1400)
        next(iter(stream))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(ask, client, 2, max_tokens=1400)
            wait_until(lambda: metrics_of(client)["restore_ext_requests_in_flight",] == 2)
            server.should_exit = True
            with pytest.raises(openai.APIError, match="the server is stopping"):
                list(stream)
            with pytest.raises(openai.InternalServerError, match="the server is stopping"):
                waiting.result()
    assert "Traceback" not in caplog.text
