"""The built-in model's questions for a search."""

from typing import Any

from torch import Tensor

from restore_ext.checks import require_count
from restore_ext.pocket.model import encode
from restore_ext.pocket.scenes import ID, held_out

# Scenes that no training run has seen, and no evaluation: those count from 0.
FIRST = 1_000_000
DEFAULT_BATCH = 32


def pocket_examples(
    processor: Any, questions: int, batch: int = DEFAULT_BATCH
) -> list[tuple[dict[str, Tensor], list[int]]]:
    """(inputs, first token ids of the answers) of drawn scenes, `batch` questions at a time."""
    require_count("questions", questions)
    examples = []
    for start in range(FIRST, FIRST + questions, require_count("batch", batch)):
        scenes = [held_out(i) for i in range(start, min(start + batch, FIRST + questions))]
        texts = [scene.question.text for scene in scenes]
        inputs = encode(processor, [scene.image for scene in scenes], texts)
        examples.append((inputs, [ID[scene.question.answer] for scene in scenes]))
    return examples
