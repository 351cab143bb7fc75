"""The reader's answers as Markdown tables."""

from collections.abc import Sequence

from restore_ext.ocr.eval import (
    BUDGETS,
    RETAIN_METHOD,
    RETAINS,
    TOKENS,
    Errors,
    error_rate,
    exact,
    left_out,
    methods,
    more_exact,
)
from restore_ext.pocket.eval import Estimate
from restore_ext.pocket.table import as_table, signed


def markdown(wrong: Errors, characters: Sequence[int]) -> str:
    """The tables that the answers suffice for.

    characters  the length of every line
    """
    parts = [_full(wrong, characters), _main(wrong, characters), _retain(wrong, characters)]
    return "\n\n".join(part for part in parts if part)


def _full(wrong: Errors, characters: Sequence[int]) -> str:
    if "full" not in wrong:
        return ""
    share, rate = exact(wrong["full"]), error_rate(wrong["full"], characters)
    without = "; ".join(f"`{name}` ({why})" for name, why in left_out().items())
    return (
        f"All {TOKENS} tokens: **{_plus(share)}** of {len(characters)} lines read exactly, "
        f"character error rate (CER) {_plus(rate, 4)}. Numbers below are of the same lines; ± is a "
        f"95 % interval, of a difference a paired one. Left out: {without}."
    )


def _main(wrong: Errors, characters: Sequence[int]) -> str:
    lines = []
    for keep in BUDGETS:
        for method in methods():
            plain = wrong.get(f"{method}/{keep}/plain")
            paper = wrong.get(f"{method}/{keep}/paper")
            if plain is None or paper is None:
                continue
            rates = [f"{error_rate(w, characters).mean:.4f}" for w in (plain, paper)]
            cells = [_share(plain), _share(paper), signed(more_exact(paper, plain)), *rates]
            lines.append([str(keep), method, *cells])
    titles = ["tokens", "method", "plain: exact", "+ RESTORE: exact", "gain"]
    return as_table([*titles, "plain: CER", "+ RESTORE: CER"], lines)


def _retain(wrong: Errors, characters: Sequence[int]) -> str:
    """What the share that stays alone does."""
    ways = {"0.5": "paper", **{str(share): f"retain {share}" for share in RETAINS}}
    lines = []
    for keep in BUDGETS:
        plain = wrong.get(f"{RETAIN_METHOD}/{keep}/plain")
        for share, way in ways.items():
            here = wrong.get(f"{RETAIN_METHOD}/{keep}/{way}")
            if here is None or plain is None:
                continue
            cells = [_share(here), signed(more_exact(here, plain))]
            cells.append(f"{error_rate(here, characters).mean:.4f}")
            lines.append([str(keep), share, *cells])
    titles = ["tokens", f"`retain` ({RETAIN_METHOD})", "exact", "gain over plain", "CER"]
    return as_table(titles, lines)


def _share(wrong: Sequence[int]) -> str:
    return f"{exact(wrong).mean:.3f}"


def _plus(estimate: Estimate, digits: int = 3) -> str:
    return f"{estimate.mean:.{digits}f} ± {estimate.half:.{digits}f}"
