"""The server, asked by OpenAI's own client: answers, overrides, errors, accounts, and its end."""

import concurrent.futures
import json
import threading

import openai
import pytest
import torch
from serving import (
    PICTURES,
    SCENES,
    ask,
    data_url,
    encoded,
    make_engine,
    messages,
    metrics_of,
    plain_picture,
    serving,
    streamed,
    text_of,
    wait_until,
)

import restore_ext
from restore_ext.pocket import encode, load_pocket
from restore_ext.serve.engine import Engine
from restore_ext.serve.metrics import Metrics
from restore_ext.serve.request import Override

PROMPT, VISUAL = 592, 576  # tokens of scene 2: "where is the circle ?" and the system's words


@pytest.fixture(scope="module")
def client():
    with serving(make_engine()) as (client, _):
        yield client


@pytest.fixture(scope="module")
def direct():
    """direct(scene, **options of attach()) -> the text of generate() without a server."""
    model, processor = load_pocket()

    def generate(scene=0, new_tokens=8, **options):
        inputs = encode(processor, [SCENES[scene].image], [SCENES[scene].question.text])
        with restore_ext.attach(model, **options) if options else torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        return processor.batch_decode(new, skip_special_tokens=True)[0]

    return generate


def test_an_answer_is_that_of_an_attached_model(client, direct):
    answer = ask(client, 2)
    assert text_of(answer) == direct(2, method="vispruner", keep=64) != direct(2)
    assert answer.choices[0].finish_reason == "length" and answer.model == "pocket"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (PROMPT, 8)
    assert usage.total_tokens == PROMPT + 8
    assert usage.prompt_tokens_details.image_tokens == VISUAL
    extra = usage.restore_ext
    assert extra.pop("reduction_ms") > 0
    assert extra == {
        "method": "vispruner",
        "keep": 64,
        "restore": True,
        "prompt_tokens": PROMPT - VISUAL + 64,
        "visual_tokens": {"prompt": VISUAL, "first_layer": 64, "last_layer": 64},
    }


def test_a_streamed_answer_is_the_same_piece_by_piece(client):
    whole = ask(client, 2)
    pieces, end, usages = streamed(client, 2)
    assert "".join(pieces) == text_of(whole) and len(pieces) == 8
    assert end == "length" and usages == []
    pieces, _, usages = streamed(client, 2, stream_options={"include_usage": True})
    assert "".join(pieces) == text_of(whole) and len(usages) == 1
    got, wanted = usages[0].to_dict(), whole.usage.to_dict()
    for usage in (got, wanted):
        usage["restore_ext"].pop("reduction_ms")
    assert got == wanted


def test_a_schedule_is_the_servers_own_and_no_part_of_what_a_request_names():
    model, processor = load_pocket()
    given = {"schedule": {"layers": [576, 576, 64, 64]}, "min_visual_tokens": 100}
    handle = restore_ext.attach(model, **given)
    engine = Engine(model, processor, handle, Metrics())
    own = engine.choose(Override())
    assert [stage.layer for stage in own.settings.stages] == [2]
    assert own.as_json() == {"method": "schedule", "keep": None, "restore": True}
    plain = engine.choose(Override(restore=False))
    assert [stage.layer for stage in plain.settings.stages] == [2] and not plain.restore
    for override, method, keep, restore in (
        (Override(method="divprune"), "divprune", 64, True),
        (Override(keep=9), "vispruner", 9, True),
        (Override(method="vtw"), "vtw", None, False),  # RESTORE has nothing to add
    ):
        choice = engine.choose(override)
        assert choice.as_json() == {"method": method, "keep": keep, "restore": restore}
        assert choice.settings.min_visual_tokens == 100
        assert bool(choice.settings.stages) == (method == "vtw")


@pytest.mark.parametrize(
    ("metadata", "options", "left"),
    [
        ({"keep": "16"}, {"method": "vispruner", "keep": 16}, (16, 16)),
        ({"method": "divprune"}, {"method": "divprune", "keep": 64}, (64, 64)),
        (
            {"method": "visionzip", "keep": "9", "restore": "false"},
            {"method": "visionzip", "keep": 9, "restore": False},
            (9, 9),
        ),
        ({"method": "tome_vit", "keep": "100"}, {"method": "tome_vit", "keep": 100}, (100, 100)),
        ({"method": "fastv", "keep": "16"}, {"method": "fastv", "keep": 16}, (VISUAL, 16)),
        ({"method": "vtw"}, {"method": "vtw"}, (VISUAL, 0)),
        ({"keep": "600"}, {"method": "vispruner", "keep": 600}, (VISUAL, VISUAL)),
        ({"method": "none", "user_id": "7", "session": "a"}, {}, (VISUAL, VISUAL)),
    ],
)
def test_metadata_changes_one_request(client, direct, metadata, options, left):
    answer = ask(client, 2, metadata=metadata)
    assert text_of(answer) == direct(2, **options)
    extra = answer.usage.restore_ext
    assert tuple(extra["visual_tokens"].values()) == (VISUAL, *left)
    assert extra["prompt_tokens"] == PROMPT - VISUAL + left[0]
    assert answer.usage.prompt_tokens == PROMPT
    assert extra["method"] == metadata.get("method", "vispruner")
    assert (extra["reduction_ms"] > 0) is (left[1] < VISUAL)
    after = ask(client, max_tokens=1).usage.restore_ext
    assert (after["method"], after["visual_tokens"]["last_layer"]) == ("vispruner", 64)


def test_text_alone_and_several_pictures(client):
    answer = ask(client, messages=messages("how many objects ?"))
    assert answer.usage.restore_ext["visual_tokens"] == dict.fromkeys(
        ("prompt", "first_layer", "last_layer"), 0
    )
    assert answer.usage.prompt_tokens_details.image_tokens == 0 and text_of(answer)
    for content in ("how many objects ?", [{"type": "text", "text": "how many objects ?"}]):
        same = ask(client, messages=[{"role": "user", "content": content}])
        assert text_of(same) == text_of(answer)
    talk = [
        {"role": "developer", "content": "describe"},
        *messages("what color is the circle ?", PICTURES[0]),
        {"role": "assistant", "content": "red"},
        *messages("how many objects ?", PICTURES[1]),
    ]
    answer = ask(client, messages=talk, metadata={"keep": "20"})
    assert answer.usage.restore_ext["visual_tokens"] == {
        "prompt": 2 * VISUAL,
        "first_layer": 40,
        "last_layer": 40,
    }


def test_stop_sequences_end_the_answer_and_are_no_part_of_it(client):
    whole = text_of(ask(client, 2))
    words = whole.split()
    stop = next(word for word in words if word != words[0])
    across = whole[whole.index(stop) - 3 :][:5]  # begins in one piece and ends in the next
    for options in ({"stop": stop}, {"stop": [across, "nowhere"]}):
        answer = ask(client, 2, **options)
        cut = whole.partition(stop if options["stop"] == stop else across)[0]
        assert text_of(answer) == cut
        assert answer.choices[0].finish_reason == "stop"
        pieces, end, _ = streamed(client, 2, **options)
        assert "".join(pieces) == text_of(answer) and end == "stop"
    held = ask(client, 2, stop=f"{whole.split()[-1]} nowhere")
    assert text_of(held) == whole, "what only begins like one comes in the end"


def test_sampling_follows_the_seed(client):
    drawn = [text_of(ask(client, 2, temperature=2, seed=seed)) for seed in (1, 2, 1, 2)]
    assert drawn[:2] == drawn[2:] and len(set(drawn)) == 2


def test_clients_at_once_get_what_they_get_alone(client):
    """Every one with settings of its own, plain and streamed."""
    cases = [
        (scene, {"metadata": metadata})
        for scene, metadata in enumerate(
            [
                {"keep": "8"},
                {"method": "none"},
                {"method": "divprune", "keep": "30"},
                {"method": "tome_vit", "keep": "90"},
                {"method": "pyramiddrop", "keep": "40"},
                {"restore": "false"},
            ]
        )
    ]
    alone = [text_of(ask(client, scene, **options)) for scene, options in cases]
    assert len(set(alone)) > 3
    before = metrics_of(client)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        plain = [pool.submit(ask, client, scene, **options) for scene, options in cases]
        streams = [pool.submit(streamed, client, scene, **options) for scene, options in cases]
        assert [text_of(answer.result()) for answer in plain] == alone
        assert ["".join(stream.result()[0]) for stream in streams] == alone
        usages = [answer.result().usage for answer in plain]
    wait_until(lambda: metrics_of(client)["restore_ext_requests_in_flight",] == 0)
    after = metrics_of(client)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    # Each was asked twice.
    sums = {
        ("restore_ext_requests_total", "200"): len(cases),
        ("restore_ext_prompt_tokens_total",): sum(u.prompt_tokens for u in usages),
        ("restore_ext_generated_tokens_total",): sum(u.completion_tokens for u in usages),
        ("restore_ext_time_to_first_token_seconds_count",): len(cases),
        ("restore_ext_request_seconds_count",): len(cases),
        ("restore_ext_reduction_seconds_count",): len(cases) - 1,
    }
    for place in ("prompt", "first_layer", "last_layer"):
        total = sum(u.restore_ext["visual_tokens"][place] for u in usages)
        sums["restore_ext_visual_tokens_total", place] = total
    assert {name: grown[name] for name in sums} == {name: 2 * sums[name] for name in sums}
    measured = grown["restore_ext_reduction_seconds_sum",]
    told = sum(u.restore_ext["reduction_ms"] for u in usages) / 1e3
    assert told < measured < grown["restore_ext_request_seconds_sum",]


def test_settings_change_only_between_answers(monkeypatch):
    """However many requests come in the meantime."""
    engine = make_engine()
    stock, submit, arrived, seen = engine.model.generate, engine.submit, threading.Event(), []

    def submit_and_say(work):
        submit(work)
        if work.choice.method == "divprune":
            arrived.set()

    def generate(**kwargs):
        settings = engine.handle.settings
        assert arrived.wait(20)
        out = stock(**kwargs)
        seen.append((settings.method, engine.handle.settings is settings))
        return out

    monkeypatch.setattr(engine, "submit", submit_and_say)
    monkeypatch.setattr(engine.model, "generate", generate)
    with serving(engine) as (client, _), concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, client, 2)
        wait_until(lambda: metrics_of(client)["restore_ext_requests_in_flight",] == 1)
        second = pool.submit(ask, client, 2, metadata={"method": "divprune"})
        first.result(), second.result()
    assert seen == [("vispruner", True), ("divprune", True)]


BOMB = plain_picture(20_000, 20_000)
PNG = encoded(SCENES[0].image)


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        (
            {"metadata": {"method": "best"}},
            "metadata",
            "method must be one of none, random, .*, adsc_style, got 'best'",
        ),
        ({"metadata": {"method": "schedule"}}, "metadata", "schedule"),
        ({"metadata": {"keep": "0"}}, "metadata.keep", "than or equal to 1, got '0'"),
        ({"metadata": {"keep": "many"}}, "metadata.keep", "valid integer.*, got 'many'"),
        ({"metadata": {"restore": "perhaps"}}, "metadata.restore", "valid boolean"),
        ({"metadata": {"kepe": "3"}}, "metadata", "kepe must .*method, keep, restore, got '3'"),
        ({"metadata": {"restore_keep": "3"}}, "metadata", "restore_keep must be left out"),
        ({"metadata": {"method": "vtw", "keep": "3"}}, "metadata", "takes no budget, got 3"),
        ({"metadata": {"method": "none", "keep": "3"}}, "metadata", "left out with method none"),
        # Only the model can say so.
        ({"metadata": {"method": "tome_vit", "keep": "9"}}, "metadata", "at least 36"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "robot", "content": "how"}]}, "messages.0.role", "'system'"),
        ({"messages": messages("<image> how many objects ?")}, "messages", "placeholder <image>"),
        ({"n": 2}, None, "n must be 1 on this server, got 2"),
        ({"logprobs": True}, None, "logprobs must be False"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 2000}, "messages", "2048 tokens together, got a prompt of"),
        ({"extra_body": {"best_of": 3}}, "best_of", "the keys are model, messages.*, got 3"),
    ],
)
def test_a_wrong_request_is_refused(client, options, param, message):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=message) as caught:
            ask(client, stream=stream, **options)
        assert caught.value.param == param and caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("urls", "code", "message"),
    [
        ([data_url(b"no picture at all")], "invalid_image", "image 0 must be one of PNG"),
        ([PICTURES[0], data_url(PNG[:200])], "invalid_image", "image 1 must be one of PNG"),
        ([data_url(b"%!PS-Adobe-3.0 EPSF-3.0")], "invalid_image", "must be one of PNG"),
        (["data:image/png;base64,&&&&"], "invalid_image", "must be base64"),
        ([data_url(PNG, "text/plain")], "invalid_image", "must be data:image/"),
        ([data_url(bytes(50_001))], "image_too_large", "at most 50000 bytes"),
        ([plain_picture(501, 500)], "image_too_large", "at most 250000 pixels, got 501 x 500"),
        ([BOMB], "image_too_large", "image 0"),
        ([PICTURES[0]] * 3, "too_many_images", "at most 2 images.*got 3"),
        (["file:///etc/hostname"], "invalid_image", "must be a data URL, got 'file:"),
        (["/etc/hostname"], "invalid_image", "must be a data URL"),
        (["http://127.0.0.1:9/a.png"], "invalid_image", "fetches no remote images"),
    ],
)
def test_a_wrong_picture_is_refused(client, urls, code, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        ask(client, messages=messages("how many objects ?", *urls))
    assert (caught.value.param, caught.value.code) == ("messages", code)


def test_pictures_within_the_limits_are_taken(client):
    answer = ask(client, messages=messages("how many objects ?", plain_picture(500, 500)))
    assert answer.usage.prompt_tokens_details.image_tokens == VISUAL


def test_errors_have_openais_form_everywhere(client):
    http, url = client._client, str(client.base_url).removesuffix("v1/")
    for method, path, status in (
        ("GET", "nothing", 404),
        ("GET", "v1/chat/completions", 405),
        ("POST", "v1/chat/completions", 400),
        ("GET", "v1/models/gpt-4", 404),
    ):
        answer = http.request(method, url + path, content=b"{" if method == "POST" else None)
        assert answer.status_code == status
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error" and error["message"]
        assert set(error) == {"message", "type", "param", "code"}
    with pytest.raises(openai.NotFoundError, match="this server has pocket, got gpt-4"):
        ask(client, model="gpt-4")
    large = b'{"model": "' + b"x" * 5_000_000 + b'"}'
    answer = http.post(f"{url}v1/chat/completions", content=large)
    assert answer.status_code == 413 and "at most" in answer.json()["error"]["message"]
    assert [model.id for model in client.models.list()] == ["pocket"]
    assert client.models.retrieve("pocket").id == "pocket"
    assert http.get(f"{url}health").json() == {"status": "ok"}


def test_refusals_are_counted_by_status(client):
    before = metrics_of(client)
    with pytest.raises(openai.BadRequestError):
        ask(client, n=2)
    with pytest.raises(openai.NotFoundError):
        ask(client, model="gpt-4")
    after = metrics_of(client)
    for status in ("400", "404"):
        name = "restore_ext_requests_total", status
        assert after[name] == before.get(name, 0) + 1
    name = ("restore_ext_prompt_tokens_total",)
    assert after[name] == before[name]


def test_a_client_that_leaves_ends_its_answer(client):
    before = metrics_of(client)
    stream = ask(client, 2, stream=True, max_tokens=1400)
    next(iter(stream))
    assert metrics_of(client)["restore_ext_requests_in_flight",] == 1
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.5), 2, max_tokens=1400)
    wait_until(lambda: metrics_of(client)["restore_ext_requests_in_flight",] == 0)
    ask(client, max_tokens=1)  # behind them
    after = metrics_of(client)
    name = "restore_ext_requests_total", "499"
    assert after[name] == before.get(name, 0) + 2
    name = ("restore_ext_generated_tokens_total",)
    assert 0 < after[name] - before[name] < 1400


def test_stream_events_are_as_openai_sends_them(client):
    """What its client passes over: the end mark, and JSON in every event."""
    body = {
        "model": "pocket",
        "messages": messages("how many objects ?"),
        "max_tokens": 2,
        "stream": True,
    }
    url = f"{client.base_url}chat/completions"
    answer = client._client.post(url, json=body, headers={"x-request-id": "mine"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-request-id"] == "mine"
    *events, end = answer.text.strip().split("\n\n")
    assert end == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: "))["id"] == "mine" for event in events)
