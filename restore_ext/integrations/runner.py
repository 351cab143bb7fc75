"""One attached model that answers conversations, whoever asks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from restore_ext.cli.load import load, to_model
from restore_ext.integrations.arguments import Arguments
from restore_ext.integrations.generation import Generation

# Messages as transformers' chat templates take them: {"role": ..., "content": [parts]}, a part
# being {"type": "text", "text": ...} or {"type": "image", "image": a PIL picture, file or URL}.
Chat = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Answer:
    text: str
    prompt_tokens: int  # that the first decoder layer had
    new_tokens: int


@dataclass
class Tally:
    """Visual tokens of all prompts so far, as VisualTokens has them."""

    prompts: int = 0
    prompt: int = 0
    first_layer: int = 0
    last_layer: int = 0

    def means(self) -> dict[str, float]:
        """Of a prompt, by name."""
        n = max(self.prompts, 1)
        return {
            "visual_tokens": self.prompt / n,
            "visual_tokens_first_layer": self.first_layer / n,
            "visual_tokens_last_layer": self.last_layer / n,
        }

    def __str__(self) -> str:
        whole, first, last = self.means().values()
        return f"visual tokens a prompt: {whole:g}, in the first layer {first:g}, last {last:g}"


class Runner:
    """raises  UserError: the checkpoint cannot be loaded, with the reason in a line
    TypeError, ValueError, NotImplementedError: as attach()
    """

    def __init__(self, arguments: Arguments) -> None:
        from restore_ext.hf import attach

        self.arguments = arguments
        self.tally = Tally()
        self.model, self.processor = load(
            arguments.pretrained,
            arguments.place,
            arguments.dtype,
            option="pretrained",
            device_option="device",
            kernels=False,
            **arguments.loading,
        )
        if not (arguments.chat_template or getattr(self.processor, "chat_template", None)):
            raise ValueError(
                f"chat_template must be given for {arguments.pretrained}, which has none of its own"
            )
        images = getattr(self.processor, "image_processor", None)
        if arguments.image_aspect_ratio == "pad" and not getattr(images, "image_mean", None):
            raise ValueError(
                f"image_aspect_ratio must be 'processor' for {arguments.pretrained}, whose "
                "processor has no mean colour to pad with, got 'pad'"
            )
        self.processor.tokenizer.padding_side = "left"
        reduction = arguments.reduction
        self.handle = None if reduction is None else attach(self.model, **reduction)

    def answer(self, chats: Sequence[Chat], given: Mapping[str, Any]) -> list[Answer]:
        """Answers all as one batch; given: a task's generation options, `until` included."""
        generation = Generation.of(given, self.arguments.max_new_tokens)
        inputs = self.encode(chats)
        start = inputs["input_ids"].shape[1]
        out = self._generate(inputs, **generation.options, **self._until(generation, start))
        new = out[:, start:]
        prompts = self._count(inputs)
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        lengths = self._lengths(new)
        return [
            Answer(generation.cut(text).strip(), *counts)
            for text, *counts in zip(texts, prompts, lengths, strict=True)
        ]

    def loss(self, chat: Chat, continuation: str) -> tuple[float, bool]:
        """(mean cross entropy of a continuation's tokens, whether greedy decoding would say it).

        The continuation is decoded, not part of the prompt, so a reduction treats it as an answer.
        """
        tokenizer = self.processor.tokenizer
        ids = tokenizer(continuation, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"a continuation must have tokens, got {continuation!r}")
        inputs = self.encode([chat])
        start = inputs["input_ids"].shape[1]
        out = self._generate(
            inputs,
            max_new_tokens=len(ids),
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            prefix_allowed_tokens_fn=lambda _, said: [ids[len(said) - start]],
        )
        self._count(inputs)
        logits = torch.cat(out.logits).float()
        wanted = torch.tensor(ids[: len(logits)], device=logits.device)
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        return loss.item(), bool((logits.argmax(-1) == wanted).all())

    def close(self) -> None:
        """Detaches, and lets go of the model."""
        if self.handle is not None:
            self.handle.detach()
        self.handle = self.model = None

    def encode(self, chats: Sequence[Chat]) -> dict[str, Tensor]:
        """Inputs of the model for conversations, padded on the left."""
        pictures: list[list[Any]] = []
        texts = []
        for chat in chats:
            messages, images = self._open(chat)
            pictures.append(images)
            template = self.arguments.chat_template
            more = {} if template is None else {"chat_template": template}
            texts.append(
                self.processor.apply_chat_template(messages, add_generation_prompt=True, **more)
            )
        bos = self.processor.tokenizer.bos_token
        has_bos = bool(bos) and texts[0].startswith(bos)
        encoded = self.processor(
            images=pictures if any(pictures) else None,
            text=texts,
            padding=len(texts) > 1,
            return_tensors="pt",
            **({"add_special_tokens": False} if has_bos else {}),
        )
        return to_model(dict(encoded), self.model)

    def _open(self, chat: Chat) -> tuple[list[dict[str, Any]], list[Any]]:
        """A conversation with our system prompt, and its pictures in order."""
        from transformers.image_utils import load_image

        messages, pictures = [], []
        system = self.arguments.system_prompt
        if system is not None:
            content = [{"type": "text", "text": system}]
            messages.append({"role": "system", "content": content})
        for message in chat:
            if system is not None and message["role"] == "system":
                continue
            for part in message["content"]:
                if part["type"] == "image":
                    pictures.append(self._squared(load_image(part["image"])))
                elif part["type"] != "text":
                    raise NotImplementedError(
                        f"a message must be of text and images, got {part['type']}"
                    )
            messages.append(dict(message))
        return messages, pictures

    def _squared(self, picture: Any) -> Any:
        from PIL import ImageOps

        if self.arguments.image_aspect_ratio != "pad":
            return picture
        mean = self.processor.image_processor.image_mean
        side, colour = max(picture.size), tuple(int(255 * part) for part in mean)
        return ImageOps.pad(picture, (side, side), color=colour)

    def _until(self, generation: Generation, start: int) -> dict[str, Any]:
        """Ends rows that have said a stop sequence; `start` tokens are the prompt's."""
        from transformers import StoppingCriteriaList

        if not generation.stops:
            return {}

        # transformers' own stop_strings work on what a tokenizer calls its pieces, and not for all.
        def stopped(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            said = self.processor.batch_decode(ids[:, start:], skip_special_tokens=True)
            over = [generation.cut(text) != text for text in said]
            return torch.tensor(over, device=ids.device)

        return {"stopping_criteria": StoppingCriteriaList([stopped])}

    @torch.no_grad()
    def _generate(self, inputs: Mapping[str, Tensor], **options: Any) -> Any:
        if self.handle is not None:
            self.handle.last = None  # a prompt without images leaves that of another
        tokenizer = self.processor.tokenizer
        if self.model.generation_config.pad_token_id is None:
            pad = tokenizer.pad_token_id
            options["pad_token_id"] = tokenizer.eos_token_id if pad is None else pad
        return self.model.generate(**inputs, **options)

    def _count(self, inputs: Mapping[str, Tensor]) -> list[int]:
        """Counts what the last prompts had; returns the tokens that the first layer had of each."""
        from restore_ext.hf.report import VisualTokens

        report = None if self.handle is None else self.handle.last
        mask = inputs["attention_mask"]
        beams = 1 if report is None else len(report.plan.source) // len(mask)
        ids = inputs["input_ids"].repeat_interleave(beams, dim=0)
        visual = VisualTokens.count(ids, self.model.config, report)
        self.tally.prompts += len(mask)
        self.tally.prompt += visual.prompt // beams
        self.tally.first_layer += visual.first_layer // beams
        self.tally.last_layer += visual.last_layer // beams
        tokens = mask.sum(1).tolist()
        for image in report.images if report is not None else ():
            if image.row % beams == 0:
                tokens[image.row // beams] -= image.tokens_before - image.tokens_after
        return tokens

    def _lengths(self, new: Tensor) -> list[int]:
        """Tokens of every answer, without what pads it behind its end."""
        tokenizer, config = self.processor.tokenizer, self.model.generation_config
        pads = {config.pad_token_id, tokenizer.pad_token_id} - {None}
        pad = torch.tensor(sorted(pads), device=new.device, dtype=new.dtype)
        return (~torch.isin(new, pad)).sum(1).tolist()
