"""For the documentation site: docstrings as they are written, columns and all.

Ours say shapes in columns, which Markdown would run together; those paragraphs become blocks.
"""

import re
from typing import Any

from griffe import Docstring, Extension, Object

COLUMNS = re.compile(r"\S {2,}\S|^ ", re.MULTILINE)


def as_markdown(text: str) -> str:
    """The text with paragraphs in columns fenced; neighbours share a fence."""
    parts: list[str] = []
    fenced = False
    for paragraph in text.split("\n\n"):
        columns = COLUMNS.search(paragraph) is not None
        if columns and fenced:
            parts[-1] = parts[-1].removesuffix("\n```") + f"\n\n{paragraph}\n```"
        else:
            parts.append(f"```text\n{paragraph}\n```" if columns else paragraph)
        fenced = columns
    return "\n\n".join(parts)


class Columns(Extension):
    """What mkdocstrings loads."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if isinstance(obj.docstring, Docstring):
            obj.docstring.value = as_markdown(obj.docstring.value)
