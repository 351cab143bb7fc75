"""VLMEvalKit's model class."""

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from vlmeval.dataset import DATASET_TYPE
from vlmeval.vlm.base import BaseModel

from restore_ext.integrations.arguments import Arguments
from restore_ext.integrations.runner import Runner

GREEDY = {"temperature": 0, "do_sample": False}


class RestoreExt(BaseModel):
    """Any checkpoint that attach() knows, its visual tokens reduced; greedy.

    letter_prompt  of questions with choices: the choices, and LLaVA's words that ask for the letter
    """

    INTERLEAVE = True

    def __init__(self, arguments: Arguments, letter_prompt: bool = False) -> None:
        super().__init__()
        self.runner = Runner(arguments)
        self.letter_prompt = letter_prompt

    def generate_inner(
        self, message: Sequence[Mapping[str, str]], dataset: str | None = None
    ) -> str:
        """The answer to one message: parts {"type": "text" or "image", "value": text or file}."""
        content = [
            {"type": part["type"], part["type"]: part["value"]}  # as chat templates name it
            for part in message
        ]
        (answer,) = self.runner.answer([[{"role": "user", "content": content}]], GREEDY)
        return answer.text

    def use_custom_prompt(self, dataset: str) -> bool:
        return self.letter_prompt and DATASET_TYPE(dataset) == "MCQ"

    def build_prompt(self, line: Any, dataset: str | None = None) -> list[dict[str, str]]:
        """The prompt of a row with choices in columns A, B, ..., empty where there are fewer."""
        hint = [line["hint"]] if _has(line, "hint") else []
        choices = [f"{c}. {line[c]}" for c in ascii_uppercase if _has(line, c)]
        ask = "Answer with the option's letter from the given choices directly."
        text = "\n".join([*hint, line["question"], *choices, ask])
        files = self.dump_image(line, dataset)
        pictures = [{"type": "image", "value": file} for file in files]
        return [*pictures, {"type": "text", "value": text}]


def _has(line: Any, column: str) -> bool:
    # An empty cell of a table is NaN, which is not itself.
    return column in line and line[column] == line[column]
