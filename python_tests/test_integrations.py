"""What the harnesses' plug-ins share, on the pocket model; the harness itself is not needed."""

import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import tomllib
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing

from restore_ext.cli.errors import UserError
from restore_ext.integrations.arguments import SYSTEM_PROMPTS, attach_options, read
from restore_ext.integrations.generation import Generation
from restore_ext.integrations.runner import Runner
from restore_ext.pocket import WORDS, encode, held_out, parse
from restore_ext.pocket.eval import first_words
from restore_ext.reduce import DEFAULT_METHOD

ROOT = Path(__file__).parent.parent
ONE = {"max_new_tokens": 1, "until": ["\n\n"]}
RESTORED = {"method": "divprune", "keep": 64}


def chat(index, picture=True):
    scene = held_out(index)
    content = [{"type": "text", "text": " ".join(parse(scene.question.text))}]
    if picture:
        content.insert(0, {"type": "image", "image": scene.image})
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def runner():
    return Runner(read({"pretrained": "pocket", "device": "cpu", **RESTORED}))


def words(runner, indices, attached=True):
    """As restore_ext's own evaluation has them."""
    scenes = [held_out(i) for i in indices]
    inputs = encode(runner.processor, [s.image for s in scenes], [s.question.text for s in scenes])
    runner.handle.enabled = attached
    with torch.no_grad():
        ids = first_words(runner.model, inputs)
    runner.handle.enabled = True
    return [WORDS[i] for i in ids]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"keeep": 64}, "no argument keeep; of the model: pretrained"),
        ({"method": "best"}, "method must be one of .*none, got 'best'"),
        ({"method": "schedule"}, "method must be one of .*none, got 'schedule'"),
        ({"keep": 0}, "keep must be an int >= 1, got 0"),
        ({"keep": "many"}, "keep must be"),
        ({"restore": "yes"}, "restore must be True or False, got 'yes'"),
        ({"calibrate": "all"}, "calibrate must be one of"),
        ({"method": "none", "keep": 64}, "keep must be left out with method none"),
        ({"options": "{layers"}, "options must be a dict in JSON"),
        ({"method": "holov", "options": '{"crops": 3}'}, "method holov has no option 'crops'"),
        ({"dtype": "int8"}, "dtype must be one of auto"),
        ({"image_aspect_ratio": "square"}, "image_aspect_ratio must be one of"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"chat_template": "none.jinja"}, "chat_template must be a file"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_loaded(given, said):
    with pytest.raises((TypeError, ValueError), match=said):
        read({"pretrained": "no/such", **given})


def test_every_option_of_attach_is_an_argument(tmp_path):
    given = {**attach_options(), "keep": 3, "options": '{"seed": 1}'}
    assert read(given | {"method": "random", "options": "{}"}).reduction["keep"] == 3
    asked = {"layers": [9, 9, 5, 5]}
    assert read({"method": "vtw", "options": '{"layer": 2}'}).reduction["options"] == {"layer": 2}
    assert read({"schedule": '{"layers": [9, 9, 5, 5]}'}).reduction["schedule"] == asked
    assert read({"schedule": "file.json"}).reduction["schedule"] == "file.json"
    assert (
        read({}).reduction == {"method": DEFAULT_METHOD, "keep": 64}
        and read({"method": "none"}).reduction is None
    )
    assert read({"system_prompt": "vicuna_v1"}).system_prompt == SYSTEM_PROMPTS["vicuna_v1"]
    (tmp_path / "prompt.txt").write_text("Be brief.\n")
    assert read({"system_prompt": str(tmp_path / "prompt.txt")}).system_prompt == "Be brief."


def test_what_cannot_be_loaded_is_said_of_its_argument(tmp_path):
    with pytest.raises(UserError, match=r"pretrained: the folder .* has no config.json"):
        Runner(read({"pretrained": str(tmp_path)}))
    with pytest.raises(UserError, match=r"^device: cpux cannot be used"):
        Runner(read({"pretrained": "pocket", "device": "cpux"}))


def test_answers_of_a_ragged_batch_are_the_evaluations(runner):
    indices = range(6)
    said = runner.answer([chat(i) for i in indices], ONE)
    assert [answer.text for answer in said] == words(runner, indices)
    alone = [runner.answer([chat(i)], ONE)[0] for i in indices]
    assert alone == said and len({answer.prompt_tokens for answer in said}) > 1


def test_tokens_are_counted_row_by_row(runner):
    runner.tally = type(runner.tally)()
    said = runner.answer([chat(0), chat(1), chat(4)], {"max_new_tokens": 1, "num_beams": 2})
    for answer, index in zip(said, (0, 1, 4), strict=True):
        text = runner.encode([chat(index)])["input_ids"].shape[1] - 576
        assert (answer.prompt_tokens, answer.new_tokens) == (text + 64, 1)
    assert list(runner.tally.means().values()) == [576, 64, 64]
    (blind,) = runner.answer([chat(0, picture=False)], ONE)
    assert blind.prompt_tokens == said[0].prompt_tokens - 64
    assert list(runner.tally.means().values()) == [432, 48, 48]


def test_all_tokens_are_the_unhooked_model(runner):
    chats = [chat(i) for i in range(4)]
    want = words(runner, range(4), attached=False)
    for given in ({"method": "none"}, {"method": "divprune", "keep": 576}):
        whole = Runner(read({"pretrained": "pocket", "device": "cpu", **given}))
        assert [answer.text for answer in whole.answer(chats, ONE)] == want
        assert whole.tally.first_layer == 4 * 576


def test_an_answer_ends_before_a_stop_sequence(runner):
    long = {"max_new_tokens": 12, "min_new_tokens": 12}
    (whole,) = runner.answer([chat(0)], long)
    said = whole.text.split()
    assert len(said) > 3
    stop = next(word for word in said[1:] if word != said[0])
    given = {**long, "until": ["picture", stop]}  # the prompt has the first
    (cut,) = runner.answer([chat(0)], given)
    assert cut.text == " ".join(said[: said.index(stop)])
    assert cut.new_tokens == said.index(stop) + 1 < whole.new_tokens
    both = runner.answer([chat(0), chat(1)], given)  # a row that ends waits for the others
    assert both[0] == cut


def test_generation_options_are_those_of_the_task():
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    given = {"temperature": 0, "top_p": 1.0, "num_beams": 1, "until": "\n", "max_new_tokens": 16}
    generation = Generation.of(given, 1024)
    assert generation.options == {**greedy, "num_beams": 1, "max_new_tokens": 16}
    assert generation.stops == ("\n",) and generation.cut("a\nb\nc") == "a"
    assert Generation.of({"until": ["c", "b", "d"]}, 5).cut("abcb") == "a"
    assert Generation.of({"temperature": 0.7, "do_sample": False}, 5).options == {
        **greedy,
        "max_new_tokens": 5,
    }
    warm = Generation.of({"temperature": 0.7, "top_p": 0.9, "until": None}, 5)
    assert warm.options == {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_new_tokens": 5,
    }
    more = {"temperature": -1}, {"num_return_sequences": 2}
    for wrong in ({"until": [""]}, {"max_new_tokens": 0}, *more):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Generation.of(wrong, 5)


def test_what_generate_does_not_know_is_passed_over_aloud(caplog):
    given = {"image_aspect_ratio": "original", "max_new_tokens": 2}
    assert "image_aspect_ratio" not in Generation.of(given, 5).options
    assert "generate() knows no image_aspect_ratio" in caplog.text


def test_loss_is_that_of_decoding_the_continuation(runner):
    with torch.no_grad():
        out = runner.model.generate(
            **runner.encode([chat(2)]),
            do_sample=False,
            max_new_tokens=3,
            min_new_tokens=3,
            return_dict_in_generate=True,
            output_logits=True,
        )
    first, second, third = (-step[0].float().log_softmax(-1) for step in out.logits)
    best, then = (WORDS[i] for i in out.sequences[0, -3:-1].tolist())
    assert best != then
    for word in ("red", "circle", best):
        loss, greedy = runner.loss(chat(2), f" {word}")
        assert loss == pytest.approx(first[WORDS.index(word)].item(), abs=1e-4)
        assert greedy == (word == best)
    other = next(word for word in ("red", "circle") if WORDS.index(word) != int(third.argmin()))
    loss, greedy = runner.loss(chat(2), f" {best} {then} {other}")
    said = first[WORDS.index(best)] + second[WORDS.index(then)] + third[WORDS.index(other)]
    assert loss == pytest.approx(said.item() / 3, abs=1e-4)
    assert not greedy


def test_prompts_are_what_was_asked_for(tmp_path, runner):
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }} {% for p in m.content %}"
        "{{ '<image> ' if p.type == 'image' else p.text + ' ' }}{% endfor %}{% endfor %}"
    )
    given = {"chat_template": str(template), "system_prompt": "a chat", "method": "none"}
    asked = Runner(read({"pretrained": "pocket", "device": "cpu", **given}))
    system = {"role": "system", "content": [{"type": "text", "text": "the task's own"}]}
    ids = asked.encode([[system, *chat(3)]])["input_ids"][0].tolist()
    image = asked.model.config.image_token_id
    said = [WORDS[i] for i in ids if i != image and not WORDS[i].startswith("<")]
    assert ids.count(image) == 576
    assert said == ["a", "chat", "user", *parse(held_out(3).question.text)]


def test_a_prompt_begins_once():
    asked = Runner(read({"pretrained": "pocket", "device": "cpu", "method": "none"}))
    want = asked.encode([chat(0)])["input_ids"].tolist()
    tokenizer = asked.processor.tokenizer
    begin = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", None, begin)
    assert tokenizer("user").input_ids[0] == want[0][0] == tokenizer.bos_token_id
    assert asked.encode([chat(0)])["input_ids"].tolist() == want


def test_pictures_are_padded_to_squares_when_asked(runner):
    tall = held_out(0).image.resize((48, 96))
    asked = Runner(
        read({"pretrained": "pocket", "device": "cpu", "image_aspect_ratio": "pad", **RESTORED})
    )
    mean = asked.processor.image_processor.image_mean
    square = Image.new("RGB", (96, 96), tuple(int(255 * m) for m in mean))
    square.paste(tall, (24, 0))

    def pixels(runner, image):
        message = [{"role": "user", "content": [{"type": "image", "image": image}]}]
        return runner.encode([message])["pixel_values"]

    assert torch.equal(pixels(asked, tall), pixels(runner, square))
    assert not torch.equal(pixels(asked, tall), pixels(runner, tall))
    assert torch.equal(pixels(asked, square), pixels(runner, square))


def test_other_media_are_refused(runner):
    clip = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]
    with pytest.raises(NotImplementedError, match="must be of text and images, got video"):
        runner.answer([clip], ONE)


def test_the_entry_point_is_declared_and_says_what_is_missing():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, name = declared["lmms_eval.models"]["restore_ext"].split(":")
    manifest = getattr(importlib.import_module(module), name)
    if find_spec("lmms_eval") is None:
        with pytest.raises(ImportError, match=r"needs lmms_eval, 0\.7 or newer: pip install"):
            manifest()
    else:
        assert manifest().model_id == "restore_ext"
