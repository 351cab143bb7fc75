"""The page of the families: what each adapter says of itself."""

from collections.abc import Sequence

from restore_ext.hf.families import FAMILIES, REFUSED

_PAGE = """# Model families

Written from the adapters by `python -m bench.tables`;
`restore_ext.list_families()` has the names. A model is known by its class in transformers (4.57.6
or later).

{families}

- *Scores* is the attention that a method with scores reads, averaged over heads: the CLS token's,
  where the tower has one; else what a token receives, averaged over the queries of its image.
- *M-RoPE* models keep the positions of their tokens whatever the method: `positions="reindex"` is
  refused.
- *Videos*, in the families that say something there: each frame counts as an image, for methods,
  scores and budgets. Where the tower makes one frame of two pictures, the two count as one.
- Separators that are tokens of the text (row breaks, image start and end) are left alone.
- `tome_vit` and `downsample` act where every patch of a picture becomes a token: in `llava` and
  `paligemma`. Elsewhere the error says what the family does with its patches.

## Refused

{refused}

Every other class raises TypeError with the list of those above."""

_TITLES = ("name", "class", "models", "positions", "scores", "videos", "notes")


def page() -> str:
    """docs/families.md, without the last line break."""
    families = [
        (
            f"`{family.name}`",
            f"`{family.model_class}`",
            family.models,
            "RoPE" if family.axes == 1 else "M-RoPE",
            family.scores_from,
            family.videos,
            family.notes,
        )
        for family in FAMILIES
    ]
    refused = [(f"`{name}`", reason) for name, reason in REFUSED.items()]
    return _PAGE.format(
        families=_table(_TITLES, families),
        refused=_table(("class", "why"), refused),
    )


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(
        "".join(f"| {cell} " if cell else "| " for cell in line) + "|" for line in lines
    )
