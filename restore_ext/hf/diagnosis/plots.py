"""Plots of a diagnosis; needs matplotlib, which only these import."""

from typing import TYPE_CHECKING, Any

from restore_ext.hf.diagnosis.maps import TITLES
from restore_ext.hf.diagnosis.probe import QUERIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"full": "#1c1e24", "reindexed": "#c0392b", "original": "#e08e0b", "restore": "#1f77b4"}
MARKS = {"full": "o", "reindexed": "v", "original": "s", "restore": "D"}
OF = {"visual": "visual queries", "text": "text queries", "last": "the last token"}


def plot_shares(summary: dict[str, Any]) -> "Figure":
    """The share of attention on visual tokens by layer, a panel for each kind of query, from
    Diagnosis.summary(): RESTORE, arXiv 2606.01711, figure 2."""
    figure = _figure(11, 3.4)
    panels = figure.subplots(1, len(QUERIES), sharey=True)
    for axes, queries in zip(panels, QUERIES, strict=True):
        for name, run in {"full": summary["full"], **summary["ways"]}.items():
            share = [float("nan") if x is None else x for x in run["share"][queries]]
            style = {"color": COLOURS[name], "marker": MARKS[name], "markersize": 4}
            axes.plot(range(len(share)), share, label=TITLES[name], linewidth=1.6, **style)
        axes.set(title=OF[queries], xlabel="layer", ylim=(-0.02, 1.02))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("share of attention on visual tokens")
    panels[-1].legend(fontsize=8)
    return figure


def plot_distances(summary: dict[str, Any]) -> "Figure":
    """Bars of each way's distance to the full run's curves, with 95 % intervals over prompts where
    there are several."""
    figure = _figure(7, 3.4)
    axes = figure.subplots()
    groups = ("overall", *QUERIES)
    width = 0.8 / max(len(summary["ways"]), 1)
    for i, (name, way) in enumerate(summary["ways"].items()):
        found = [way["distance"][group] for group in groups]
        at = [g + (i + 0.5) * width - 0.4 for g in range(len(groups))]
        bars = axes.bar(
            at,
            [float("nan") if x["mean"] is None else x["mean"] for x in found],
            width * 0.92,
            yerr=[x["half_width"] or 0 for x in found],
            color=COLOURS[name],
            label=TITLES[name],
            error_kw={"linewidth": 1},
        )
        axes.bar_label(bars, fmt="%.3f", fontsize=7, padding=2)
    axes.set_xticks(range(len(groups)), ["overall", *(OF[queries] for queries in QUERIES)])
    axes.margins(y=0.12)
    axes.set_ylabel("distance to the full curve")
    axes.legend(fontsize=8)
    return figure


def _figure(width: float, height: float) -> "Figure":
    """Of inches, drawn by Agg; pyplot, which keeps figures of its own, is left alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
