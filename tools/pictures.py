"""Draws the pictures of how_it_works.md and diagnose.md: python -m tools.pictures [FOLDER]

From the operators, the built-in model and what was measured; nothing in them is drawn by hand.
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import restore_ext
from bench import diagnosed
from restore_ext.hf.diagnosis.maps import as_picture, draw_attention, find_bases
from restore_ext.hf.diagnosis.plots import plot_shares
from restore_ext.pocket import encode, held_out, load_pocket

FOLDER = Path("docs")
COLOURS = 64
SCENE, KEEP, SIDE = 5, 64, 24  # held-out scene, visual tokens, patches a side
BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#4a5568"
# Stated here, and not read off a checkpoint: rotary embeddings of two well-known language models.
ROPES = {"LLaVA-1.5 (base 10 000)": 1e4, "Qwen2 (base 1 000 000)": 1e6}


def main(folder: Path = FOLDER) -> None:
    matplotlib.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    for name, figure in figures().items():
        file = folder / f"{name}.png"
        figure.savefig(file, dpi=110, metadata={"Software": None})
        print(file)
    file = folder / "diagnose_attention.png"
    # Few colours, for it is in the repository: a picture of patches needs no more.
    attention().quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
    print(file)


def attention() -> Image.Image:
    """Where the first scene's text and last token look, as `restore-ext diagnose` draws it."""
    model, processor = load_pocket()
    scene = held_out(0)
    inputs = encode(processor, [scene.image], [scene.question.text])
    found = restore_ext.diagnose(model, inputs, method="divprune", keep=KEEP, new_tokens=1)
    (base,) = find_bases(model, inputs, [SIDE * SIDE])
    assert base.grid is not None and base.pixels is not None
    of = processor.image_processor
    picture = as_picture(base.pixels, of.image_mean, of.image_std)
    return draw_attention(found, 0, picture, base.grid, scene.question.text)


def figures() -> dict[str, Figure]:
    model, processor = load_pocket()
    scene = held_out(SCENE)
    inputs = encode(processor, [scene.image], [scene.question.text])
    with torch.no_grad():
        features = model.get_image_features(pixel_values=inputs["pixel_values"])
    tokens = features.pooler_output[0] if hasattr(features, "pooler_output") else features[0]
    reduction = restore_ext.reduce_tokens(tokens[None], keep=KEEP, method="divprune")
    return {
        "positions": positions(reduction),
        "calibration": calibration(),
        "anchors": anchors(scene.image, tokens),
        "diagnose_shares": plot_shares(diagnosed.kept("divprune")),
    }


def positions(reduction: restore_ext.Reduction) -> Figure:
    """Where the tokens left of one picture stand, and how far a word behind them is from each."""
    figure = Figure(figsize=(7.6, 2.1), layout="constrained")
    axes = figure.subplots()
    before, behind = 35, 20  # text around the picture
    kept = reduction.position[0].sort().values + before
    length = reduction.group.shape[1]
    rows = {
        "all tokens": (torch.arange(length) + before, before + length),
        "re-indexed": (torch.arange(len(kept)) + before, before + len(kept)),
        "original": (kept, before + length),
    }
    for y, (at, text) in enumerate(reversed(rows.values())):
        words = torch.cat([torch.arange(before), torch.arange(text, text + behind)])
        axes.plot(words, [y] * len(words), "|", color=GREY, markersize=11, label=_once(y, "text"))
        label = _once(y, "visual tokens")
        axes.plot(at, [y] * len(at), "|", color=ORANGE, markersize=11, label=label)
    axes.set_yticks(range(3), reversed(list(rows)))
    axes.set(xlabel="position", ylim=(-0.6, 2.6), xlim=(-8, before + length + behind + 8))
    figure.legend(loc="outside upper right", frameon=False, ncols=2)
    return figure


def calibration() -> Figure:
    """The two terms that are added to the logits of attention."""
    figure = Figure(figsize=(7.6, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, base), colour in zip(ROPES.items(), (BLUE, ORANGE), strict=True):
        rho = decay(base)
        left.plot(torch.log(2 - rho), color=colour, label=name)
    left.set(xlabel="distance of query and key", title="log(2 - decay)", xlim=(0, 1000), ylim=0)
    left.legend(frameon=False, loc="lower right")
    size = torch.arange(1, 65)
    right.plot(size, size.log(), color=BLUE)
    right.set(xlabel="tokens that a key stands for", title="log(size)", xlim=(1, 64), ylim=0)
    return figure


def decay(base: float, length: int = 1001) -> Tensor:
    """[length] the decay of a plain rotary embedding with heads of 128."""
    from transformers import LlamaConfig

    config: Any = LlamaConfig(hidden_size=128, num_attention_heads=1, num_hidden_layers=1)
    config.rope_parameters = {"rope_type": "default", "rope_theta": base}
    table = restore_ext.rope_decay(config, length)
    assert table is not None
    return table[0]


def anchors(image: Any, tokens: Tensor) -> Figure:
    """What the score of an anchor is made of, over the tokens of one picture (Eq. 5)."""
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    density = unit @ unit.sum(0)
    score = restore_ext.score_anchors(tokens[None])[0]
    maps = {"density": density, "distinctiveness": score / density, "score": score}
    figure = Figure(figsize=(7.6, 2.2), layout="constrained")
    panels = figure.subplots(1, 4)
    panels[0].imshow(image)
    panels[0].set_title("picture")
    for panel, (title, values) in zip(panels[1:], maps.items(), strict=True):
        if title != "density":  # products of it span decades, and may be negative
            values = values.clamp_min(values.max() / 1000).log10()
        panel.imshow(values.reshape(SIDE, SIDE), cmap="viridis")
        panel.set_title(title)
    best = restore_ext.select_anchors(tokens[None], KEEP // 2)[0]
    panels[3].plot(best % SIDE, best // SIDE, "o", color="white", markersize=2.5)
    for panel in panels:
        panel.set_axis_off()
    return figure


def _once(y: int, label: str) -> str | None:
    return label if y == 0 else None


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
