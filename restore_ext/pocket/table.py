"""The evaluation's answers as Markdown tables."""

from collections.abc import Sequence

from restore_ext.methods import find_card, list_methods
from restore_ext.methods.problem import INSIDE
from restore_ext.pocket.eval import (
    ABLATION_BUDGETS,
    ABLATION_METHODS,
    BUDGETS,
    MAIN_BUDGETS,
    MAIN_METHODS,
    STEPS,
    Configuration,
    Estimate,
    Right,
    accuracy,
    configurations,
    difference,
    kinds,
    pooled,
)
from restore_ext.pocket.model import DEPTH, VISUAL_TOKENS
from restore_ext.stages import Request, make_stages

# The ablation's rows, in the order in which things are added.
LADDER = {
    "plain": "plain",
    "positions": "original positions alone",
    "merge": "merge alone",
    "merge+positions": "merge + positions",
    "merge+positions+size": "merge + positions + size",
    "paper": "merge + positions + size + distance (RESTORE)",
    "uniform-anchors": "RESTORE with evenly spaced anchors",
}


def brief(right: Right) -> str:
    """The few rows that say the most; answers of "full" and of those must be there."""
    right, questions = _alike(right)
    lines = [["576", "all tokens", _mean(right["full"]), "", ""]]
    for keep in MAIN_BUDGETS:
        for method in (m for m in MAIN_METHODS if find_card(m).restores):
            plain, paper = (right[f"{method}/{keep}/{way}"] for way in ("plain", "paper"))
            cells = [_mean(plain), f"**{_mean(paper)}**", _gain(paper, plain)]
            lines.append([str(keep), method, *cells])
    titles = ["visual tokens", "method", "plain", "+ RESTORE", "gain"]
    how = (
        f"Share of {questions} held-out questions answered right, one question a scene; ± is a "
        "95 % interval, of a gain a paired one."
    )
    return f"{as_table(titles, lines)}\n\n{how}"


def _alike(right: Right) -> tuple[Right, int]:
    """The answers to the questions that all have answered, and how many those are."""
    questions = min(len(answers) for answers in right.values())
    return {name: answers[:questions] for name, answers in right.items()}, questions


def markdown(right: Right) -> str:
    """The tables that the answers suffice for, with a line on how to read them."""
    right, questions = _alike(right)
    parts = [_full(right, questions), _main(right), _inside(right), _layer0(right)]
    parts += [_ablation(right), _pooled(right)]
    return "\n\n".join(part for part in parts if part)


def _full(right: Right, questions: int) -> str:
    if "full" not in right:
        return ""
    by_kind: dict[str, list[bool]] = {}
    for kind, answer in zip(kinds(questions), right["full"], strict=True):
        by_kind.setdefault(kind, []).append(answer)
    shares = ", ".join(f"{k} {sum(a) / len(a):.3f}" for k, a in sorted(by_kind.items()))
    full = accuracy(right["full"])
    return (
        f"All 576 visual tokens: **{full.mean:.3f}** ± {full.half:.3f} on {questions} held-out "
        f"questions, one a scene ({shares}). Accuracies below are of the same questions; ± is a "
        "95 % interval, of a difference a paired one."
    )


def _main(right: Right) -> str:
    lines, known = [], {c.name for c in configurations()}
    for keep in BUDGETS:
        for method in list_methods():
            plain = right.get(f"{method}/{keep}/plain")
            paper = right.get(f"{method}/{keep}/paper")
            official = right.get(f"{method}/{keep}/official")
            if plain is None:
                continue
            cells = [str(keep), method, _mean(plain)]
            if paper is None:
                cells += [""] * 4
            elif official is None:
                none = "no anchors" if f"{method}/{keep}/official" not in known else ""
                cells += [_mean(paper), _gain(paper, plain), none, ""]
            else:
                cells += [_mean(paper), _gain(paper, plain)]
                cells += [_mean(official), _gain(official, paper)]
            lines.append(cells)
    titles = ["tokens", "method", "plain", "+ RESTORE", "gain", "official anchors"]
    return as_table([*titles, "official - paper"], lines)


def _inside(right: Right) -> str:
    lines = []
    for c in configurations():
        if not c.name.endswith("/plain") or find_card(c.options["method"]).place != INSIDE:
            continue
        method, budget, _ = c.name.split("/")
        ways = ("plain", "calibrated", "merged", "dropped")
        plain, restored, *others = (right.get(f"{method}/{budget}/{way}") for way in ways)
        if plain is None:
            continue
        tokens = tokens_of_layers(c)
        seen = ", ".join(map(str, tokens))
        cells = [method, budget, seen, f"{sum(tokens) / DEPTH:.0f}", _mean(plain)]
        cells += ["", ""] if restored is None else [_mean(restored), _gain(restored, plain)]
        for other in others:
            cells.append("" if other is None else f"{_mean(other)} ({_gain(other, plain)})")
        lines.append(cells)
    titles = ["inside the model", "asked for", "tokens of layers 0 to 3", "mean", "plain"]
    titles += ["+ RESTORE", "gain", "merging instead of dropping", "dropping instead of merging"]
    return as_table(titles, lines)


def tokens_of_layers(configuration: Configuration) -> list[int]:
    """How many visual tokens every layer sees where a method cuts inside the language model."""
    given = configuration.options
    request = Request(DEPTH, given.get("keep"), None, given.get("retain", 1.0), "paper")
    stages = make_stages(given["method"], request, given.get("options", {}))
    cuts = {stage.layer: stage for stage in stages}
    tokens = [VISUAL_TOKENS]
    for layer in range(1, DEPTH):
        now = tokens[-1]
        tokens.append(cuts[layer].counts(VISUAL_TOKENS, now)[0] if layer in cuts else now)
    return tokens


def _layer0(right: Right) -> str:
    lines = []
    for keep in BUDGETS:
        for method in list_methods():
            uniform = right.get(f"{method}/{keep}/paper")
            size = right.get(f"{method}/{keep}/layer0-size")
            if uniform is not None and size is not None:
                row = [str(keep), method, _mean(uniform), _mean(size), _gain(size, uniform)]
                lines.append(row)
    return as_table(["tokens", "method", "layer 0 uniform", "layer 0 size", "difference"], lines)


def _ablation(right: Right) -> str:
    columns = [(m, k) for k in ABLATION_BUDGETS for m in ABLATION_METHODS]
    if not all(f"{m}/{k}/{way}" in right for m, k in columns for way in [*STEPS, "plain", "paper"]):
        return ""
    lines = []
    for way, title in LADDER.items():
        cells = [title]
        for method, keep in columns:
            here, plain = right[f"{method}/{keep}/{way}"], right[f"{method}/{keep}/plain"]
            cells.append(_mean(here) + ("" if way == "plain" else f" ({_gain(here, plain)})"))
        lines.append(cells)
    titles = [f"{method}, {keep} tokens" for method, keep in columns]
    return as_table(["ablation (gain over plain)", *titles], lines)


def _pooled(right: Right) -> str:
    """One line for each question that a default answers."""
    asked = {
        "RESTORE - plain": ("paper", "plain"),
        "RESTORE - plain, inside the model": ("calibrated", "plain"),
        "RESTORE with merging - without, inside": ("merged", "calibrated"),
        "official anchors - paper's": ("official", "paper"),
        "evenly spaced anchors - paper's": ("uniform-anchors", "paper"),
        "real sizes in layer 0 - uniform ones": ("layer0-size", "paper"),
        "with the distance term - without": ("paper", "merge+positions+size"),
    }
    answers = {title: pooled(right, *ways) for title, ways in asked.items()}
    lines = [(title, signed(gain)) for title, gain in answers.items() if gain is not None]
    return as_table(["over all methods and budgets measured", "difference"], lines)


def _mean(right: Sequence[bool]) -> str:
    found = accuracy(right)
    return f"{found.mean:.3f} ± {found.half:.3f}"


def _gain(right: Sequence[bool], base: Sequence[bool]) -> str:
    return signed(difference(right, base))


def signed(estimate: Estimate) -> str:
    """A difference with its interval."""
    return f"{estimate.mean:+.3f} ± {estimate.half:.3f}"


def as_table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; nothing without lines."""
    if not lines:
        return ""
    rule = ["---"] * len(titles)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [titles, rule, *lines])
