"""A diagnosis as rows of text, from the numbers that Diagnosis.summary() has."""

from typing import Any

from restore_ext.hf.diagnosis.maps import TITLES

TITLE_ROW = ("", "visual tokens", "distance", "cosine visual", "cosine last", "KL nats", "top-1")
_OUTPUT = ("kl", "top1")


def rows(summary: dict[str, Any], several: bool = False) -> list[list[str]]:
    """A row of titles, one of the full run, and one for each way; "± half" where there are several
    prompts. several: also the means over an answer of several tokens."""
    found = [[*TITLE_ROW, *(["KL answer", "top-1 answer"] if several else [])]]
    found.append([TITLES["full"], _tokens(summary["full"]), *[""] * (len(found[0]) - 2)])
    for name, way in summary["ways"].items():
        numbers = [way["distance"]["overall"], way["cosine"]["visual"], way["cosine"]["last"]]
        numbers += [way[of][when] for when in ("first", "answer")[: 1 + several] for of in _OUTPUT]
        found.append([TITLES[name], _tokens(way), *map(number, numbers)])
    return found


def nothing_reduced(summary: dict[str, Any]) -> bool:
    """Whether every way has kept all visual tokens in all layers."""
    full = summary["full"]["visual_tokens"]
    ways = summary["ways"].values()
    return bool(ways) and all(way["visual_tokens"] == full for way in ways)


def number(found: dict[str, float | None]) -> str:
    """A mean with its 95 % interval, if it has one."""
    if found["mean"] is None:
        return "-"
    half = found["half_width"]
    return f"{found['mean']:.3f}" if half is None else f"{found['mean']:.3f} ± {half:.3f}"


def _tokens(run: dict[str, Any]) -> str:
    first, last = run["visual_tokens"][0], run["visual_tokens"][-1]
    return f"{first:.0f}" if first == last else f"{first:.0f} to {last:.0f}"
