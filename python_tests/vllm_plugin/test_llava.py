"""LLaVA-1.5 under vLLM answers as attach() does, with calibrate="size", on as few tokens."""

import json
import os
import re
import subprocess
import sys

import pytest
from engines import ask, ask_transformers, check_against_transformers, question, same
from vllm import SamplingParams
from vllm.model_executor.models.llava import LlavaForConditionalGeneration

from restore_ext.integrations.vllm.model import Processor
from restore_ext.pocket.model import FOLDER

WAYS = {
    "divprune": {"method": "divprune", "keep": 64},
    "plain": {"method": "divprune", "keep": 64, "restore": False},
    "plain, own positions": {
        **{"method": "divprune", "keep": 48, "restore": False},
        "positions": "original",
    },
    "uncalibrated": {"method": "divprune", "keep": 32, "calibrate": "none"},
    "CLS": {"method": "fastervlm", "keep": 64},
    "CLS and tower features": {"method": "vispruner", "keep": 32, "anchor_mode": "official"},
    "CLS and keys": {"method": "visionzip", "keep": 64},
    "received": {"method": "token_pooling", "keep_ratio": 0.1},
    "by its own rule": {"method": "tome", "keep": 64},
}


@pytest.mark.parametrize("way", WAYS)
def test_answers_as_attach(way, engines, pocket, monkeypatch):
    options = WAYS[way]
    prompts = [question(pocket[1], index) for index in range(5)]
    prompts += [question(pocket[1], 5, pictures=2), question(pocket[1], 20)]
    answers, alone = check_against_transformers(
        monkeypatch, engines(options), options, *pocket, prompts
    )
    # Where a choice among near ties fell otherwise the words may differ, in a prompt of a kind that
    # the model was taught (one picture) seldom.
    pairs = zip(answers, alone, prompts, strict=True)
    words = [a.tokens[0] == b.tokens[0] for a, b, p in pairs if len(p.images) == 1]
    assert sum(words) >= len(words) - 1


def test_text_alone(engines, pocket, monkeypatch):
    prompts = [question(pocket[1], 3, pictures=0)]
    (answer,) = ask(engines(WAYS["divprune"]), prompts)
    same(answer, ask_transformers(*pocket, prompts[0]))


CUT = {"block_size": 32, "max_num_batched_tokens": 80}  # blocks end in the middle of images
STOCK = """
import json, sys
from engines import Engines, ask, question
from restore_ext.pocket import load_pocket

prompts = [question(load_pocket()[1], index) for index in range(4)]
if __name__ == "__main__":
    print("ANSWERS", json.dumps([vars(a) for a in ask(Engines()(None), prompts)]))
"""


def test_without_flags_nothing_changes(engines, pocket, tmp_path):
    engine = engines(None)
    runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    assert type(runner.get_model()) is LlavaForConditionalGeneration
    prompts = [question(pocket[1], index) for index in range(4)]
    answers = ask(engine, prompts)
    for answer, prompt in zip(answers, prompts, strict=True):
        theirs = ask_transformers(*pocket, prompt)
        same(answer, theirs)
        assert answer.prompt == theirs.prompt

    # As where there is no plug-in: to the bit.
    (tmp_path / "stock.py").write_text(STOCK)
    here = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    env = {**os.environ, "VLLM_PLUGINS": "", "PYTHONPATH": here}
    out = subprocess.run(
        [sys.executable, tmp_path / "stock.py"], env=env, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr[-3000:]
    (line,) = (line for line in out.stdout.splitlines() if line.startswith("ANSWERS "))
    assert json.loads(line.removeprefix("ANSWERS ")) == [vars(answer) for answer in answers]


def test_half_precision(engines, pocket):
    """In bfloat16 the sizes keep what one channel would round off."""
    options = {"method": "divprune", "keep": 16}
    prompts = [question(pocket[1], index) for index in range(6)]
    half = ask(engines(options, dtype="bfloat16"), prompts)
    whole = ask(engines(options), prompts)
    off = [abs(a.logprobs[0] - b.logprobs[0]) for a, b in zip(half, whole, strict=True)]
    right = [a.tokens[0] == b.tokens[0] for a, b in zip(half, whole, strict=True)]
    assert sum(right) >= 5 and sorted(off)[3] < 0.05, off


class TestCaches:
    def test_prefix(self, engines, pocket, monkeypatch):
        options = WAYS["divprune"]
        engine = engines(options, block_size=32)
        first = question(pocket[1], 0)
        answers, _ = check_against_transformers(monkeypatch, engine, options, *pocket, [first])
        (again,) = ask(engine, [first])
        assert (answers[0].cached, again.cached) == (0, 64)
        same(answers[0], again, atol=1e-5)

        # Another picture shares nothing but the words in front of it, less than a block.
        other = question(pocket[1], 1)
        assert ask(engine, [other])[0].cached == 0

    def test_chunks(self, engines, pocket, monkeypatch):
        """A prompt is cut into chunks wherever, images in the middle."""
        options = {"method": "divprune", "keep": 64}
        engine = engines(options, enable_chunked_prefill=True, **CUT)
        prompts = [question(pocket[1], index) for index in range(3)]
        prompts += [question(pocket[1], 7, pictures=2)]
        check_against_transformers(monkeypatch, engine, options, *pocket, prompts)

    def test_keys(self, engines, pocket, monkeypatch):
        """A way to reduce is part of what names an image, in every cache."""
        asked = [engines(WAYS[way]) for way in ("divprune", "divprune", "plain", "uncalibrated")]
        named = []
        get = Processor._get_mm_hashes

        def listening(self, inputs):
            named.append(get(self, inputs))
            return named[-1]

        monkeypatch.setattr(Processor, "_get_mm_hashes", listening)
        prompt = question(pocket[1], 30)
        for engine in asked:
            ask(engine, [prompt])
        names = [hashes["image"][0] for hashes in named]
        assert names[0] == names[1]
        assert len(set(names)) == 3

    def test_keys_of_named_images(self, engines, pocket, monkeypatch):
        """Also where a caller names the images."""
        asked = [engines(WAYS[way]) for way in ("divprune", "plain")]
        named = []
        get = Processor._get_mm_hashes

        def listening(self, inputs):
            named.append(get(self, inputs)["image"][0])
            return {"image": [named[-1]]}

        monkeypatch.setattr(Processor, "_get_mm_hashes", listening)
        prompt = question(pocket[1], 31)
        given = {
            "prompt": prompt.text,
            "multi_modal_data": {"image": prompt.images},
            "multi_modal_uuids": {"image": ["mine"]},
        }
        for engine in asked:
            engine.generate(given, SamplingParams(max_tokens=1), use_tqdm=False)
        assert len(set(named)) == 2 and "mine" not in named


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (None, "restore_ext must be a dict"),
            ({"method": "nosuch", "keep": 4}, "method must be one of"),
            ({"method": "divprune"}, "keep"),
            ({"method": "divprune", "keep": [4, 5]}, "one int"),
            ({"method": "divprune", "keep": 4, "calibrate": "size+distance"}, "distance term"),
            ({"method": "fastv", "keep": 4}, "attach()"),
            ({"method": "downsample", "keep": 4}, "attach()"),
            ({"method": "divprune", "keep": 4, "budget": "shared"}, "budget"),
        ],
    )
    def test_options(self, options, said):
        given = {} if options is None else {"restore_ext": options}
        with pytest.raises(Exception, match=re.escape(said)):
            self.start({"architectures": ["RestoreLlavaForConditionalGeneration"], **given})

    def test_options_without_architecture(self):
        with pytest.raises(Exception, match="must come architectures"):
            self.start({"restore_ext": {"keep": 4}})

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ({"enable_prompt_embeds": True}, "enable_prompt_embeds off"),
            ({"enable_mm_embeds": True}, "enable_mm_embeds off"),
            ({"video_pruning_rate": 0.5}, "video_pruning_rate"),
        ],
    )
    def test_engines(self, more, said):
        asked = {"architectures": ["RestoreLlavaForConditionalGeneration"]}
        with pytest.raises(Exception, match=said):
            self.start(asked | {"restore_ext": {"keep": 4}}, **more)

    def test_too_many_images(self, engines, pocket):
        """A prompt whose positions would leave the rotary embedding's table."""
        some = {"image": 13}
        engine = engines({"method": "random", "keep": 1}, limit_mm_per_prompt=some)
        prompt = question(pocket[1], 0, pictures=2)
        text = prompt.text.replace("<image> <image>", " ".join(["<image>"] * 13))
        asked = {"prompt": text, "multi_modal_data": {"image": prompt.images[:1] * 13}}
        with pytest.raises(ValueError, match="must have fewer images"):
            engine.generate(asked, use_tqdm=False)

    def start(self, overrides, **more):
        from vllm.engine.arg_utils import EngineArgs

        args = EngineArgs(model=str(FOLDER), hf_overrides=overrides, dtype="float32", **more)
        return args.create_engine_config()
