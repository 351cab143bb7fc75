"""vLLM beside transformers: the same prompts, token by token."""

from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from vllm import LLM, SamplingParams

import restore_ext
from restore_ext.hf import images
from restore_ext.integrations.vllm import model as plugin
from restore_ext.pocket import held_out
from restore_ext.pocket.model import FOLDER
from restore_ext.testing.models import tiny_model
from restore_ext.testing.zoo import (
    EOS,
    IMAGE,
    PAD,
    PATCH,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCABULARY,
)

NEW = 6  # tokens of an answer
LLAVA, QWEN = "LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"


class Engines:
    """Engines by what they were asked for; a second time the same one."""

    def __init__(self) -> None:
        self.known: dict[str, LLM] = {}

    def __call__(
        self, options: dict[str, Any] | None, model: Any = FOLDER, of: str = LLAVA, **more: Any
    ) -> LLM:
        key = repr((options, model, more))
        if key not in self.known:
            asked = {"architectures": ["Restore" + of], "restore_ext": options}
            self.known[key] = LLM(
                model=str(model),
                dtype=more.pop("dtype", "float32"),
                enforce_eager=True,
                max_model_len=1024,
                max_num_seqs=4,
                num_gpu_blocks_override=64,  # all engines stay in memory
                limit_mm_per_prompt=more.pop("limit_mm_per_prompt", {"image": 2, "video": 0}),
                hf_overrides={} if options is None else asked,
                **more,
            )
        return self.known[key]


@dataclass
class Prompt:
    text: str
    images: list[Any]


def question(processor: Any, index: int, pictures: int = 1) -> Prompt:
    """A held-out question, with its picture; with the next one's behind it, if 2."""
    shown = [held_out(index + i).image for i in range(pictures)]
    content = [{"type": "image"}] * pictures
    text = {"type": "text", "text": held_out(index).question.text}
    chat = [{"role": "user", "content": [*content, text]}]
    return Prompt(processor.apply_chat_template(chat, add_generation_prompt=True), shown)


@dataclass
class Answer:
    tokens: list[int]
    logprobs: list[float]  # of these
    prompt: int  # tokens
    cached: int = 0  # of these, how many were in the prefix cache


def ask(engine: LLM, prompts: list[Prompt]) -> list[Answer]:
    """Greedy, all at once."""
    params = SamplingParams(max_tokens=NEW, min_tokens=NEW, temperature=0, logprobs=1)
    inputs = [
        {"prompt": p.text, "multi_modal_data": {"image": p.images}} if p.images
        else {"prompt": p.text}
        for p in prompts
    ]  # fmt: skip
    answers = []
    for output in engine.generate(inputs, params, use_tqdm=False):
        (best,) = output.outputs
        tokens = list(best.token_ids)
        logprobs = [best.logprobs[i][t].logprob for i, t in enumerate(tokens)]
        cached = output.num_cached_tokens or 0
        answers.append(Answer(tokens, logprobs, len(output.prompt_token_ids), cached))
    return answers


def ask_transformers(model: Any, processor: Any, prompt: Prompt) -> Answer:
    """The same of transformers."""
    shown = {"images": prompt.images} if prompt.images else {}
    inputs = processor(text=prompt.text, return_tensors="pt", **shown)
    out = model.generate(
        **inputs,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    length = inputs["input_ids"].shape[1]
    tokens = out.sequences[0, length:].tolist()
    logprobs = [x[0].log_softmax(-1)[t].item() for x, t in zip(out.logits, tokens, strict=True)]
    return Answer(tokens, logprobs, length)


@dataclass
class Seen:
    """What an engine made of one image."""

    features: torch.Tensor
    scores: torch.Tensor | None
    metric: torch.Tensor | None
    reduction: Any


@dataclass
class Record:
    """What an engine makes of images, in order; then what transformers is to make of them.

    Among near ties a method's choice hangs on the last bits, which two engines do not share. So
    their features are compared within rounding, and what follows from one choice exactly.
    """

    seen: list[Seen] = field(default_factory=list)
    replayed: int = 0

    def listen(self, monkeypatch: Any) -> None:
        reduce_each = images.reduce_each

        def listening(features, seen, settings, budgets):
            reductions = reduce_each(features, seen, settings, budgets)
            for i, reduction in enumerate(reductions):
                scores, metric = (x and x[i].clone() for x in (seen.scores, seen.metric))
                self.seen.append(Seen(features[i].clone(), scores, metric, reduction))
            return reductions

        monkeypatch.setattr(plugin, "reduce_each", listening)

    def replay(self, monkeypatch: Any) -> None:
        def replaying(features, seen, settings, budgets):
            reductions = []
            for i, image in enumerate(features):
                was = self.seen[self.replayed]
                self.replayed += 1
                torch.testing.assert_close(was.features, image, atol=2e-4, rtol=1e-4)
                for ours, theirs, atol in (
                    (was.scores, seen.scores, 1e-6),
                    (was.metric, seen.metric, 2e-4),
                ):
                    assert (ours is None) == (theirs is None)
                    if theirs is not None:
                        torch.testing.assert_close(ours, theirs[i], atol=atol, rtol=1e-4)
                reductions.append(was.reduction)
            return reductions

        monkeypatch.setattr(images, "reduce_each", replaying)


def same(one: Answer, other: Answer, atol: float = 2e-4) -> None:
    assert one.tokens == other.tokens
    torch.testing.assert_close(one.logprobs, other.logprobs, atol=atol, rtol=0)


def check_against_transformers(
    monkeypatch: Any,
    engine: LLM,
    options: dict[str, Any],
    model: Any,
    processor: Any,
    prompts: list[Prompt],
) -> tuple[list[Answer], list[Answer]]:
    """An engine answers as attach() with what the engine made of the images. Returns the answers
    of the engine, and of attach() on its own."""
    record = Record()
    with monkeypatch.context() as patch:
        record.listen(patch)
        answers = ask(engine, prompts)
    calibrate = "size" if options.get("restore", True) else "none"
    with restore_ext.attach(model, **{"calibrate": calibrate, **options}) as handle:
        with monkeypatch.context() as patch:
            record.replay(patch)
            replayed = []
            for prompt in prompts:
                replayed.append(ask_transformers(model, processor, prompt))
                if prompt.images:
                    gone = sum(i.tokens_before - i.tokens_after for i in handle.last.images)
                    assert gone > 0
                    replayed[-1].prompt -= gone
        assert record.replayed == len(record.seen)
        alone = [ask_transformers(model, processor, prompt) for prompt in prompts]
    for ours, theirs in zip(answers, replayed, strict=True):
        same(ours, theirs)
        assert ours.prompt == theirs.prompt
    return answers, alone


def tiny_qwen(folder: Any) -> tuple[Any, Any, Any]:
    names = {
        **{PAD: "<pad>", EOS: "</s>", VISION_START: "<|vision_start|>"},
        **{VISION_END: "<|vision_end|>", IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>"},
    }
    words = {names.get(i, f"w{i}"): i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sides = {"shortest_edge": 4 * (2 * PATCH) ** 2, "longest_edge": 64 * (2 * PATCH) ** 2}
    patches = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches, size=sides),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            eos_token="</s>",
            unk_token="w3",
            additional_special_tokens=[names[i] for i in (VISION_START, VISION_END, IMAGE, VIDEO)],
        ),
        video_processor=Qwen2VLVideoProcessor(**patches),
    )
    model = tiny_model("qwen2_5_vl")
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return model, processor, folder
