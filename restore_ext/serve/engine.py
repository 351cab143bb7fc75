"""One attached model, one thread that prepares prompts, and one that answers them in turn."""

import asyncio
import copy
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers.cli.serving.utils import BaseHandler, DirectStreamer, Modality

from restore_ext import profiling
from restore_ext.hf.handle import Handle
from restore_ext.hf.report import VisualTokens
from restore_ext.hf.settings import Settings
from restore_ext.methods import ALL_TOKENS, find_card, name_of, named_methods
from restore_ext.reduce import DEFAULT_KEEP
from restore_ext.serve.errors import RequestError
from restore_ext.serve.images import ImageLimits, decode
from restore_ext.serve.metrics import Metrics
from restore_ext.serve.request import Override

SCHEDULE = "schedule"
LOGGER = logging.getLogger("restore_ext.serve")


class _Cancelled(Exception):
    """Ends generate() at its next token."""


class Answer(DirectStreamer):
    """An answer on its way from the inference thread to the event loop.

    queue    text and what else a DirectStreamer puts there; a RequestError if there is no answer;
             and this answer itself, once all is said and the numbers below are final
    """

    def __init__(self, tokenizer: Any, parser: Any, arrived: float) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self._home = asyncio.get_running_loop()
        super().__init__(tokenizer, self._home, self.queue, response_parser=parser)
        self.arrived = arrived  # when its request did, by time.perf_counter()
        self.cancelled = threading.Event()
        self.on_first: Callable[[], None] = lambda: None
        self.last_token = -1
        self.visual: VisualTokens | None = None
        self.reduction_seconds = 0.0

    def put(self, value: torch.Tensor) -> None:
        if self.cancelled.is_set():
            raise _Cancelled
        super().put(value)
        if self.total_tokens:  # else it was the prompt
            self.last_token = int(value[-1])
            if self.total_tokens == 1:
                self.on_first()

    def cancel(self) -> None:
        self.cancelled.set()

    def close(self, error: RequestError | None = None) -> None:
        """The last thing the inference thread does with it."""
        self._home.call_soon_threadsafe(self.queue.put_nowait, self if error is None else error)


@dataclass(frozen=True)
class Choice:
    """How one request is reduced."""

    method: str
    keep: int | None = None
    restore: bool = False
    settings: Settings | None = None  # None: not at all

    def as_json(self) -> dict[str, Any]:
        return {"method": self.method, "keep": self.keep, "restore": self.restore}


@dataclass(frozen=True)
class Work:
    """What is to be generated."""

    inputs: Any  # a BatchFeature of one row
    config: Any  # a GenerationConfig
    choice: Choice
    seed: int | None
    answer: Answer

    @property
    def prompt_tokens(self) -> int:
        return self.inputs["input_ids"].shape[1]


class Engine:
    """A model in eval mode with its processor, attached by `handle`, whose settings are the
    server's own.

    spell  what is made of every text before it is encoded; it raises ValueError for one that the
           model cannot read
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        handle: Handle,
        metrics: Metrics,
        spell: Callable[[str], str] = str,
    ) -> None:
        self.model = model
        self.metrics = metrics
        self._processor = processor
        self.handle = handle
        self._default = handle.options
        self._spell = spell
        # A tokenizer that encodes in one thread cannot decode in another.
        self.tokenizer = copy.deepcopy(processor.tokenizer)
        self._prepares = ThreadPoolExecutor(1, "prepare")
        self._generates = ThreadPoolExecutor(1, "generate")

    @property
    def context(self) -> int | None:
        """How many tokens prompt and answer can have together, original positions counting."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def choose(self, override: Override) -> Choice:
        """The server's own reduction, as a request changes it. One that names a method or a budget
        has that alone, without the server's schedule.

        raises  RequestError: an unknown method, or one that takes no budget and got one
        """
        default = self._default
        method = default["method"] if override.method is None else override.method
        if method == ALL_TOKENS:
            if override.keep is not None or override.restore is not None:
                raise _wrong(f"keep and restore must be left out with method {ALL_TOKENS}")
            return Choice(ALL_TOKENS)
        known = [ALL_TOKENS, *named_methods()]
        if method not in (*known, SCHEDULE):
            raise _wrong(f"method must be one of {', '.join(known)}, got {method!r}")
        if method == SCHEDULE:
            raise _wrong(f"method {SCHEDULE} needs the tokens of every layer: use attach() for it")
        try:
            budget = find_card(method).budget
            if override.keep is not None and not budget:
                raise ValueError(
                    f"keep must be left out with method {method}, which takes no budget, got "
                    f"{override.keep}"
                )
            restore = default["restore"] if override.restore is None else override.restore
            own = override.method is None and override.keep is None
            schedule = default["schedule"] if own else None
            keep = override.keep or default["keep"] or (None if schedule else DEFAULT_KEEP)
            settings = self.handle.variant(
                method=method, keep=keep if budget else None, restore=restore, schedule=schedule
            )
            restores = settings.restore and (schedule is not None or find_card(method).restores)
            return Choice(
                name_of(method, keep, schedule), keep if budget else None, restores, settings
            )
        except (TypeError, ValueError, NotImplementedError) as error:
            raise _wrong(str(error)) from error

    async def encode(
        self,
        messages: Sequence[dict[str, Any]],
        pictures: Sequence[bytes],
        limits: ImageLimits,
        tools: Any,
    ) -> Any:
        """The inputs of messages, whose images are `pictures` in order, on the CPU."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._prepares, self._encode, messages, pictures, limits, tools
        )

    def submit(self, work: Work) -> None:
        """Queues work; what comes of it is in work.answer."""
        self._generates.submit(self._generate, work)

    def close(self) -> None:
        """Waits for what runs; what waits is dropped."""
        self._prepares.shutdown(cancel_futures=True)
        self._generates.shutdown(cancel_futures=True)

    def _encode(
        self,
        messages: Sequence[dict[str, Any]],
        pictures: Sequence[bytes],
        limits: ImageLimits,
        tools: Any,
    ) -> Any:
        images = iter(decode(pictures, limits))
        try:
            chat = BaseHandler.get_processor_inputs_from_messages(messages, Modality.VLM)
            for part in (part for message in chat for part in message["content"]):
                if part["type"] == "image":
                    del part["url"]
                    part["image"] = next(images)
                else:
                    part["text"] = self._spell(self._without_placeholders(part["text"]))
            return self._processor.apply_chat_template(
                chat,
                add_generation_prompt=True,
                tools=tools,
                return_tensors="pt",
                return_dict=True,
                tokenize=True,
            )
        # What templates and processors raise for a conversation or a picture they are not made for.
        except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
            LOGGER.info("a prompt was refused", exc_info=error)
            raise RequestError(
                f"messages: the prompt cannot be encoded: {error}", param="messages"
            ) from error

    def _without_placeholders(self, text: str) -> str:
        """The text; raises ValueError if it has what stands for a picture where there is none."""
        names = ("image_token", "boi_token")
        for token in filter(None, (getattr(self._processor, name, None) for name in names)):
            if token in text:
                raise ValueError(f"text must not contain the image placeholder {token}")
        return text

    def _generate(self, work: Work) -> None:
        answer, failed = work.answer, None
        if not answer.cancelled.is_set():
            try:
                self._answer(work)
            except _Cancelled:
                LOGGER.info("an answer was given up after %d tokens", answer.total_tokens)
            except RequestError as error:
                failed = error
            except NotImplementedError as error:  # what only the forward can find out
                failed = _wrong(str(error))
            except Exception as error:
                LOGGER.exception("generation failed")
                failed = RequestError(f"generation failed: {type(error).__name__}", status=500)
        answer.close(failed)

    def _answer(self, work: Work) -> None:
        handle, answer, metrics = self.handle, work.answer, self.metrics
        self._switch(work.choice.settings)
        if work.seed is not None:
            torch.manual_seed(work.seed)
        inputs = work.inputs.to(self.model.device, self.model.dtype)
        watch = profiling.stopwatch(self.model.device)

        def note() -> None:
            watch.stop()  # what follows is decoding
            metrics.first_token_seconds.observe(time.perf_counter() - answer.arrived)

        answer.on_first = note
        try:
            with watch:
                self.model.generate(**inputs, generation_config=work.config, streamer=answer)
        finally:
            tokens = VisualTokens.count(inputs["input_ids"], self.model.config, handle.last)
            answer.visual, handle.last = tokens, None  # a prompt without images leaves it alone
            metrics.prompt_tokens.inc(work.prompt_tokens)
            metrics.generated_tokens.inc(answer.total_tokens)
            metrics.count_visual(tokens)
            if tokens.last_layer < tokens.prompt:
                answer.reduction_seconds = watch.total()
                metrics.reduction_seconds.observe(answer.reduction_seconds)

    def _switch(self, settings: Settings | None) -> None:
        self.handle.enabled = settings is not None
        if settings is None:
            return
        try:
            self.handle.switch(settings)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise _wrong(str(error)) from error


def _wrong(message: str) -> RequestError:
    return RequestError(f"metadata: {message}", param="metadata", code="invalid_reduction")
