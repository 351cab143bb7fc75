"""lmms-eval's model classes. lmms-eval finds them by the manifest beside them."""

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from loguru import logger
from PIL.Image import Image
from tqdm import tqdm

from restore_ext.integrations.arguments import read
from restore_ext.integrations.runner import Answer, Chat, Runner


class RestoreExt(lmms):
    """Any checkpoint that attach() knows, its visual tokens reduced.

    batch_size      how many prompts are answered at once
    max_batch_size  is lmms-eval's own, and has no meaning here
    arguments       --model_args, see restore_ext.integrations.arguments

    raises  TypeError, ValueError, UserError: naming the argument, before any question is asked
    """

    is_simple = False

    def __init__(
        self, batch_size: int | str = 1, max_batch_size: int | None = None, **arguments: Any
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be an int of at least 1, got {batch_size}")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        if self._world_size > 1:
            arguments["device"] = str(self.accelerator.device)  # a copy of the model to each
        asked = read(arguments)
        self.device = torch.device(asked.place)  # where lmms-eval gathers what processes counted
        self.runner = Runner(asked)
        reduction = asked.reduction if asked.reduction is not None else "all visual tokens"
        logger.info("{} on {}: {}", asked.pretrained, self.device, reduction)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """One answer to each request, batches being of requests with the same options."""
        answers: dict[int, Answer] = {}
        start = time.perf_counter()
        with self._bar(requests) as bar:
            for indices in self._batches(requests):
                rows = [self._chat(requests[i]) for i in indices]
                # Processors take a batch with pictures in every row, or in none.
                for seen in (True, False):
                    part = [(i, c) for i, c in zip(indices, rows, strict=True) if _seen(c) == seen]
                    if part:
                        asked, chats = zip(*part, strict=True)
                        given = self._options(requests[asked[0]])
                        said = self.runner.answer(chats, given)
                        answers |= dict(zip(asked, said, strict=True))
                        bar.update(len(part))
        self._log(list(answers.values()), time.perf_counter() - start)
        return [_result(answers[i]) for i in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of each request round by round; its task says what each round shows."""
        start, spent, told = time.perf_counter(), [], []
        for request in self._bar(requests):
            _, messages_of, given, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            said: list[str] = []
            messages, ended, info = messages_of(doc), False, None
            while not ended:
                (answer,) = self.runner.answer([_chat(messages)], given)
                spent.append(answer)
                said.append(answer.text)
                following = messages_of(
                    doc, round_idx=len(said), previous_output=list(said), previous_round_info=info
                )
                # A task of one round has messages here, and no more to ask.
                ended = not isinstance(following, tuple) or following[1]
                if not ended:
                    messages, _, _, info = following
            told.append(said)
        self._log(spent, time.perf_counter() - start)
        return told

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        raise NotImplementedError(
            "tasks by likelihood need --force_simple with --model restore_ext"
        )

    def clean(self) -> None:
        self.runner.close()
        super().clean()

    def _chat(self, request: Instance) -> Chat:
        _, messages_of, _, doc_id, task, split = request.args
        return _chat(messages_of(self.task_dict[task][split][doc_id]))

    def _options(self, request: Instance) -> dict[str, Any]:
        return request.args[2]

    def _batches(self, requests: Sequence[Instance]) -> Iterator[list[int]]:
        same: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            same[json.dumps(self._options(request), sort_keys=True, default=str)].append(i)
        for indices in same.values():
            for start in range(0, len(indices), self.batch_size):
                yield indices[start : start + self.batch_size]

    def _bar(self, requests: list[Instance]) -> tqdm:
        return tqdm(requests, disable=self.rank != 0, desc="Model Responding")

    def _log(self, answers: Sequence[Answer], seconds: float) -> None:
        """Into lmms-eval's log, and as `throughput` into its results."""
        new = sum(answer.new_tokens for answer in answers)
        tally = self.runner.tally
        logger.info(str(tally))
        log_metrics(seconds, new, new / max(seconds, 1e-9), additional_metrics=tally.means())


class RestoreExtSimple(RestoreExt):
    """The same for tasks that have a text and pictures instead of messages: --force_simple."""

    is_simple = True

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        raise NotImplementedError(
            "tasks of several rounds need --model restore_ext without --force_simple"
        )

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(mean loss, greedy) of continuations; lmms-eval takes the least for the likeliest."""
        start, results = time.perf_counter(), []
        for request in self._bar(requests):
            text, target, visuals_of, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            continuation = target(doc) if callable(target) else target
            rated = self.runner.loss(_simple(text, visuals_of(doc)), continuation)
            # lmms-eval 0.7.3 makes a text of a bare tuple, and then fails to take it apart.
            results.append(GenerationResult(text=rated))
        self._log([], time.perf_counter() - start)
        return results

    def _chat(self, request: Instance) -> Chat:
        text, _, visuals_of, doc_id, task, split = request.args
        return _simple(text, visuals_of(self.task_dict[task][split][doc_id]))

    def _options(self, request: Instance) -> dict[str, Any]:
        return request.args[1]


def _chat(messages: Any) -> Chat:
    return ChatMessages(messages=messages).to_hf_messages()


def _simple(text: str, visuals: Sequence[Any] | None) -> Chat:
    content: list[dict[str, Any]] = []
    for visual in visuals or ():
        if not isinstance(visual, Image):  # a path is a video in lmms-eval, a dict a sound
            what = f"got {type(visual).__name__}: {visual!r:.80}"
            raise NotImplementedError(f"a document must be of text and PIL images, {what}")
        content.append({"type": "image", "image": visual})
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def _seen(chat: Chat) -> bool:
    return any(part["type"] == "image" for message in chat for part in message["content"])


def _result(answer: Answer) -> GenerationResult:
    counts = TokenCounts(input_tokens=answer.prompt_tokens, output_tokens=answer.new_tokens)
    return GenerationResult(text=answer.text, token_counts=counts)
