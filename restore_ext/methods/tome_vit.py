"""ToMe where it was made for: in every block of the vision tower."""

from restore_ext.methods.problem import TOWER, Method


def pairs_per_block(tokens: int, budget: int, blocks: int) -> list[int]:
    """How many pairs to merge in each block, to be left with `budget` of `tokens` after the last.

    The same number in each, as far as it divides (ToMe, arXiv 2210.09461, section 3); but a block
    can no more than halve its tokens, so where the last ones would have to do more, the earlier
    ones leave them no more than they can.

    raises   ValueError: halving in every block leaves more than the budget
    """
    least = -(-tokens // 2**blocks)
    if budget < least:
        raise ValueError(
            f"keep must be at least {least} for method tome_vit, which halves {tokens} tokens in "
            f"each of {blocks} blocks at most, got {budget}"
        )
    pairs, left = [], tokens
    for block in range(1, blocks + 1):
        even = tokens - (tokens - budget) * block // blocks
        after = min(even, budget * 2 ** (blocks - block))
        pairs.append(left - after)
        left = after
    return pairs


TOME_VIT = Method(
    place=TOWER,
    source="2210.09461",
    about="the most similar pairs of every block, by its keys; attention by size",
)
