"""/v1/chat/completions: transformers' handler, with reduction per request and OpenAI's usage."""

import asyncio
import inspect
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageToolCall
from openai.types.chat.chat_completion_chunk import ChoiceDeltaToolCall
from openai.types.completion_usage import CompletionUsage
from pydantic import ValidationError
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import (
    GenerationState,
    ReasoningText,
    ToolCall,
    build_response_parser,
)

from restore_ext.serve.engine import Answer, Engine, Work
from restore_ext.serve.errors import RequestError, of_validation
from restore_ext.serve.images import ImageLimits, read, require_images
from restore_ext.serve.request import ChatRequest, keys_at

NEW_TOKENS = 1024  # where neither the client nor the checkpoint says


class Chat(ChatCompletionHandler):
    """The chat completions of one model, which is served as `name`.

    transformers converts messages, configures generation, decodes and parses the answer, and builds
    the responses. Its own flow is not used: it loads any URL or file, encodes on the event loop,
    seeds beside what runs, and begins a stream before it is known that there is one.
    """

    def __init__(self, engine: Engine, name: str, limits: ImageLimits) -> None:
        super().__init__(model_manager=None, generation_state=GenerationState())
        self.engine = engine
        self.name = name
        self.limits = limits

    async def respond(self, request: Request, request_id: str) -> Response:
        """Answers one request. Raises RequestError, before anything is sent."""
        asked = await self._read(request)
        work = await self._prepare(asked, request.state.arrived)
        # Whoever ends the request ends the answer, however that comes about.
        request.state.cancel = work.answer.cancel
        self.engine.submit(work)
        items = _Items(work, asked.stop)
        async with _cancelled_if_gone(request, work.answer.cancel):
            if not asked.stream:
                return await self._whole(request_id, work, items)
            first = await items.next()
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        events = self._events(request, request_id, work, items, first, usage)
        return StreamingResponse(events, media_type="text/event-stream")

    async def _read(self, request: Request) -> ChatRequest:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.limits.body:
                raise RequestError(
                    f"the request must have at most {self.limits.body} bytes", status=413
                )
        try:
            asked = ChatRequest.model_validate_json(bytes(body))
        except ValidationError as error:
            raise of_validation(error, keys_at) from error
        if asked.model != self.name:
            raise RequestError(
                f"model: this server has {self.name}, got {asked.model}",
                status=404,
                param="model",
                code="model_not_found",
            )
        require_images(asked.images, self.limits)
        return asked

    async def _prepare(self, asked: ChatRequest, arrived: float) -> Work:
        engine = self.engine
        choice = engine.choose(asked.metadata)
        pictures = await asyncio.to_thread(read, asked.images, self.limits)
        messages = [message.model_dump(exclude_none=True) for message in asked.messages]
        inputs = await engine.encode(messages, pictures, self.limits, asked.tools)
        config = self._config(asked, inputs["input_ids"].shape[1])
        parser = build_response_parser(
            engine.tokenizer, engine.model, inputs["input_ids"], **_tools(asked.tools)
        )
        answer = Answer(engine.tokenizer.backend_tokenizer, parser, arrived)
        return Work(inputs, config, choice, asked.seed, answer)

    def _config(self, asked: ChatRequest, prompt_tokens: int) -> Any:
        """What generate() is told; a prompt and an answer that do not fit are refused."""
        stock = self.engine.model.generation_config
        limit = asked.max_completion_tokens or asked.max_tokens
        context = self.engine.context
        room = NEW_TOKENS if context is None else context - prompt_tokens
        if room < (limit or 1) and context is not None:
            raise RequestError(
                f"messages: prompt and answer can have {context} tokens together, got a prompt of "
                f"{prompt_tokens} and max_tokens {limit or 1}",
                param="messages",
                code="context_length_exceeded",
            )
        body = {
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "max_tokens": limit or min(stock.max_new_tokens or NEW_TOKENS, room),
        }
        config = self._build_generation_config(body, stock)
        config.num_beams = 1  # beams cannot be streamed
        if asked.temperature is not None or asked.top_p is not None:
            config.do_sample = asked.temperature != 0
        return config

    async def _whole(self, request_id: str, work: Work, items: "_Items") -> Response:
        text, reasoning, calls = "", "", []
        async for item in items:
            if isinstance(item, ToolCall):
                calls.append(item)
            elif isinstance(item, ReasoningText):
                reasoning += item
            else:
                text += item
        tool_calls = [
            ChatCompletionMessageToolCall(
                id=f"{request_id}_tool_call_{i}",
                type="function",
                function={"name": call.name, "arguments": call.arguments},
            )
            for i, call in enumerate(calls)
        ]
        completion = self._build_completion(
            request_id,
            text,
            self.name,
            items.finish_reason(),
            self._usage(work),
            tool_calls or None,
            reasoning or None,
        )
        return JSONResponse(completion)

    async def _events(
        self,
        request: Request,
        request_id: str,
        work: Work,
        items: "_Items",
        first: Any,
        usage: bool,
    ) -> AsyncGenerator[str, None]:
        """Server-sent events; `first` was taken from the items already."""

        def chunk(**content: Any) -> str:
            return self._build_chunk_sse(request_id, model=self.name, **content)

        yield chunk(role="assistant")
        calls = 0
        try:
            item = first
            while item is not None:
                if isinstance(item, ToolCall):
                    yield chunk(tool_calls=[_delta(request_id, calls, item)])
                    calls += 1
                elif isinstance(item, ReasoningText):
                    yield chunk(reasoning_content=item)
                else:
                    yield chunk(content=item)
                item = await items.next()
        except RequestError as error:  # the status has been sent
            request.state.status = error.status
            yield f"data: {json.dumps(error.body())}\n\n"
            return
        yield chunk(finish_reason=items.finish_reason())
        if usage:
            yield self.chunk_to_sse(
                ChatCompletionChunk(
                    id=request_id,
                    created=int(time.time()),
                    model=self.name,
                    choices=[],
                    usage=self._usage(work),
                    object="chat.completion.chunk",
                )
            )
        yield "data: [DONE]\n\n"

    def _usage(self, work: Work) -> CompletionUsage:
        """OpenAI's usage of the prompt as the client sent it, and beside it what became of it."""
        prompt, answer, visual = work.prompt_tokens, work.answer, work.answer.visual
        assert visual is not None
        return CompletionUsage.model_validate(
            {
                "prompt_tokens": prompt,
                "completion_tokens": answer.total_tokens,
                "total_tokens": prompt + answer.total_tokens,
                "prompt_tokens_details": {"image_tokens": visual.prompt},
                "restore_ext": {
                    **work.choice.as_json(),
                    "prompt_tokens": prompt - visual.prompt + visual.first_layer,
                    "visual_tokens": vars(visual),
                    "reduction_ms": round(1e3 * answer.reduction_seconds, 3),
                },
            }
        )


class _Items:
    """What is said in an answer, piece by piece, up to a stop sequence."""

    def __init__(self, work: Work, stops: Sequence[str]) -> None:
        self._work = work
        self._stops = stops
        self._held = ""  # text that may be the beginning of a stop sequence
        self._stopped = False
        self._called = False
        self._ended = False

    async def next(self) -> Any:
        """A piece of text, or a ToolCall; None at the end. Raises RequestError."""
        answer = self._work.answer
        while not self._ended:
            item = await answer.queue.get()
            if isinstance(item, RequestError):
                raise item
            if item is answer:
                self._ended = True
                if answer.cancelled.is_set() and not self._stopped:
                    raise RequestError("the client has left", status=499)
                if self._held and not self._stopped:
                    return self._held
            elif item is None or self._stopped:  # None: the streamer's own end
                continue
            elif isinstance(item, ToolCall):
                self._called = True
                return item
            elif isinstance(item, ReasoningText) or not self._stops:
                return item
            elif text := self._before_stop(item):
                return text
        return None

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (item := await self.next()) is not None:
            yield item

    def _before_stop(self, text: str) -> str:
        held = self._held + text
        found = [at for at in map(held.find, self._stops) if at >= 0]
        if found:
            self._stopped = True
            self._work.answer.cancel()
            return held[: min(found)]
        safe = next(i for i in range(len(held) + 1) if not held[i:] or self._begins_stop(held[i:]))
        self._held = held[safe:]
        return held[:safe]

    def _begins_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)

    def finish_reason(self) -> str:
        if self._called:
            return "tool_calls"
        answer, config = self._work.answer, self._work.config
        ends = config.eos_token_id
        ended = answer.last_token in (ends if isinstance(ends, list) else [ends])
        full = answer.total_tokens >= config.max_new_tokens
        return "length" if full and not ended and not self._stopped else "stop"


def _tools(tools: Any) -> dict[str, Any]:
    """For build_response_parser: later in 5.x it casts the arguments of calls as tools say."""
    known = "tools" in inspect.signature(build_response_parser).parameters
    return {"tools": tools} if known else {}


def _delta(request_id: str, index: int, call: ToolCall) -> ChoiceDeltaToolCall:
    return ChoiceDeltaToolCall(
        index=index,
        type="function",
        id=f"{request_id}_tool_call_{index}",
        function={"name": call.name, "arguments": call.arguments},
    )


@asynccontextmanager
async def _cancelled_if_gone(request: Request, cancel: Callable[[], None]) -> AsyncIterator[None]:
    """Inside, the answer is given up when the client hangs up."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
