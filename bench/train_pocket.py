"""Trains the built-in model on drawn scenes, and puts trained weights into the package.

    python -m bench.train_pocket train --out A --patch 8 --minutes 60
    python -m bench.train_pocket train --out B --init A --patch 4 --minutes 18
    python -m bench.train_pocket train --out C --init B --patch 4 --minutes 85 --lr 1e-3 --seed 7 \
        --questions 8 --mix color=.12,shape=.12,count=.14,where=.20,rel=.30,exist=.12
    python -m bench.train_pocket train --out C --resume     after an interruption
    python -m bench.train_pocket export C                   into the package

The shipped weights came about in these three steps of one recipe, by earlier scripts of the same
scenes, losses and settings; the third saw 24 000 images in its 85 minutes, on two CPU cores that
were busy with other work. What made it learn:
the 'describe' turn that closes every chat and says all that is in the picture (dense supervision;
without it a probe stayed at chance), several questions a scene, more of the hard kinds, and bf16
autocast (three times the images a second on a CPU). Starting with patches of 8 (144 visual tokens)
and growing to patches of 4 (576) saves most of the time.
"""

import argparse
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.utils import logging

from bench.export_pocket import export
from restore_ext.pocket import model as pocket
from restore_ext.pocket.scenes import (
    COLOURS,
    HELD_OUT,
    ID,
    KINDS,
    PLACES,
    SHAPES,
    SIDE,
    SYSTEM,
    WORDS,
    ask,
    draw,
)

IGNORE = -100  # a label that costs nothing
STATE = "training.pt"


@dataclass(frozen=True)
class Settings:
    """What a run is; a resumed run must be the same but for how long it goes on."""

    patch: int = 4
    batch: int = 32
    lr: float = 1.5e-3
    seed: int = 1
    questions: int = 6  # a scene
    mix: tuple[float, ...] = (1 / 6,) * 6  # the probabilities of KINDS
    cls_loss: float = 1.0  # weight of the head on CLS
    steps: int | None = None  # the length of the run: this, or minutes
    minutes: float | None = None

    def __post_init__(self) -> None:
        if SIDE % self.patch or self.patch < 1:
            raise ValueError(f"patch must divide {SIDE}, got {self.patch}")
        if not 0 <= self.seed < HELD_OUT:
            raise ValueError(f"seed must be in [0, {HELD_OUT}), got {self.seed}")
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("one of steps and minutes must be given")

    @property
    def tokens(self) -> int:
        return (SIDE // self.patch) ** 2


def build(patch: int) -> LlavaForConditionalGeneration:
    """The architecture with fresh weights."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=patch,
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=ID["<pad>"],
        bos_token_id=ID["<s>"],
        eos_token_id=ID["</s>"],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ID["<image>"],
        image_seq_length=(SIDE // patch) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


def grow(model: torch.nn.Module, source: dict[str, Tensor]) -> None:
    """Loads weights; the patch kernel and the position grid are resized where the patch differs."""
    weights = {}
    for name, new in model.state_dict().items():
        old = source[name]
        if old.shape != new.shape and "patch_embedding" in name:
            # The same response to a flat patch: fewer pixels, each weighing more.
            share = (old.shape[-1] / new.shape[-1]) ** 2
            old = F.interpolate(old, size=new.shape[-2:], mode="area") * share
        elif old.shape != new.shape:
            side, wanted = (math.isqrt(len(t) - 1) for t in (old, new))  # row 0 is CLS
            grid = old[1:].T.reshape(1, -1, side, side)
            grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic")
            old = torch.cat([old[:1], grid.flatten(2)[0].T])
        weights[name] = old
    model.load_state_dict(weights)


def chat(things: Sequence[Any], rng: np.random.Generator, s: Settings) -> tuple[list, list]:
    """One scene's token ids and labels: the questions, then the turn that describes everything."""
    ids = [ID[w] for w in f"{SYSTEM} user :".split()] + [ID["<image>"]] * s.tokens
    labels = [IGNORE] * len(ids)

    def say(words: str, learn: bool = False) -> None:
        new = [ID[w] for w in words.split()]
        ids.extend(new)
        labels.extend(new if learn else [IGNORE] * len(new))

    for _ in range(s.questions):
        question = ask(things, rng, s.mix)
        say(f"{question.text} assistant :")
        say(question.answer, learn=True)
        say("user :")
    say("describe assistant :")
    for thing in sorted(things, key=lambda t: t.cell):
        say(f"{PLACES[thing.cell]} {thing.colour} {thing.shape} ;", learn=True)
    say("</s>", learn=True)
    return ids, labels


def batch(rng: np.random.Generator, s: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """pixels [B, 3, SIDE, SIDE], ids and labels [B, L], and which objects are there [B, 48]."""
    pixels, rows = [], []
    present = torch.zeros(s.batch, len(SHAPES), len(COLOURS))
    for b in range(s.batch):
        image, things = draw(rng)
        pixels.append(np.asarray(image))
        for thing in things:
            present[b, SHAPES.index(thing.shape), list(COLOURS).index(thing.colour)] = 1
        rows.append(chat(things, rng, s))
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(s.batch, length, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE)
    for b, (row, row_labels) in enumerate(rows):
        ids[b, : len(row)], labels[b, : len(row)] = torch.tensor(row), torch.tensor(row_labels)
    image = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return image.float() / 127.5 - 1, ids, labels, present.flatten(1)


class Trainer:
    """A run in progress: everything that has to survive an interruption."""

    def __init__(self, settings: Settings, init: Path | None = None) -> None:
        torch.manual_seed(0)
        self.settings, self.step, self.elapsed = settings, 0, 0.0
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.rng = np.random.default_rng(settings.seed)
        self.model = build(settings.patch)
        if init is not None:
            grow(self.model, LlavaForConditionalGeneration.from_pretrained(init).state_dict())
        # CLS is dropped before the projector: without a task of its own its attention, which
        # VisPruner and HoloV read, would mean nothing.
        self.head = torch.nn.Linear(128, len(SHAPES) * len(COLOURS))
        tower = self.model.model.vision_tower
        last = getattr(tower, "vision_model", tower).encoder.layers[-1]
        last.register_forward_hook(self._keep_cls)
        self.model.to(self.device).train()
        self.head.to(self.device)
        self.optimiser = torch.optim.AdamW(
            [*self.model.parameters(), *self.head.parameters()],
            lr=settings.lr,
            weight_decay=0.05,
            betas=(0.9, 0.98),
        )

    def _keep_cls(self, module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self.cls = hidden[:, 0]

    @property
    def done(self) -> float:
        """The part of the run that lies behind, 0 to 1."""
        s = self.settings
        part = self.step / s.steps if s.steps is not None else self.elapsed / 60 / s.minutes
        return min(part, 1.0)

    def advance(self) -> dict[str, float]:
        """One step; returns its losses."""
        start, s = time.perf_counter(), self.settings
        pixels, ids, labels, present = (t.to(self.device) for t in batch(self.rng, s))
        cosine = 0.5 * (1 + math.cos(math.pi * self.done)) * 0.97 + 0.03
        for group in self.optimiser.param_groups:
            group["lr"] = s.lr * min(1.0, (self.step + 1) / 200) * cosine
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            answer = self.model(input_ids=ids, pixel_values=pixels, labels=labels).loss
        look = F.binary_cross_entropy_with_logits(self.head(self.cls.float()), present)
        (answer + s.cls_loss * look).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1
        self.elapsed += time.perf_counter() - start
        return {"answer": answer.item(), "cls": look.item()}

    def save(self, folder: Path) -> None:
        """Writes the state to go on from, whole or not at all, and the weights to export."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "settings": asdict(self.settings),
            "step": self.step,
            "elapsed": self.elapsed,
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "rng": self.rng.bit_generator.state,
            "torch_rng": torch.get_rng_state(),
        }
        torch.save(state, folder / f"{STATE}.new")
        os.replace(folder / f"{STATE}.new", folder / STATE)
        self.model.save_pretrained(folder)

    @classmethod
    def resume(cls, folder: Path, **longer: Any) -> "Trainer":
        """The run that `folder` holds; `longer` may give another `steps` or `minutes`."""
        if not (folder / STATE).is_file():
            raise FileNotFoundError(f"{folder} holds no interrupted run (no {STATE})")
        state = torch.load(folder / STATE, weights_only=True, map_location="cpu")
        if longer:
            state["settings"] |= {"steps": None, "minutes": None} | longer
        trainer = cls(Settings(**state["settings"]))
        trainer.model.load_state_dict(state["model"])
        trainer.head.load_state_dict(state["head"])
        trainer.optimiser.load_state_dict(state["optimiser"])
        trainer.rng.bit_generator.state = state["rng"]
        torch.set_rng_state(state["torch_rng"])
        trainer.step, trainer.elapsed = state["step"], state["elapsed"]
        return trainer


def run(trainer: Trainer, folder: Path, save_every: int = 200) -> None:
    """Trains to the end, saving on the way, and on Ctrl-C."""
    s = trainer.settings
    bar = tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
    try:
        while trainer.done < 1:
            losses = trainer.advance()
            rate = trainer.step * s.batch / trainer.elapsed
            bar.set_postfix_str(
                f"step {trainer.step} answer {losses['answer']:.3f} cls {losses['cls']:.3f} "
                f"{rate:.1f} images/s"
            )
            bar.update(100 * trainer.done - bar.n)
            if trainer.step % save_every == 0:
                trainer.save(folder)
    finally:
        bar.close()
        trainer.save(folder)


def parse_mix(text: str) -> tuple[float, ...]:
    """'color=.2,rel=.8' as the probabilities of KINDS; what is not named is never asked."""
    pairs = dict(part.split("=", 1) for part in text.split(","))
    unknown = set(pairs) - set(KINDS)
    shares = [float(pairs.get(kind, 0)) for kind in KINDS]
    if unknown or sum(shares) <= 0 or min(shares) < 0:
        raise argparse.ArgumentTypeError(f"want KIND=SHARE,... of {', '.join(KINDS)}, got {text}")
    return tuple(share / sum(shares) for share in shares)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.train_pocket", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train, from nothing, from weights, or on")
    train.add_argument("--out", type=Path, required=True, help="folder of the run")
    train.add_argument("--init", type=Path, help="folder of weights to start from")
    train.add_argument("--resume", action="store_true", help="go on with the run in --out")
    length = train.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float)
    length.add_argument("--steps", type=int)
    train.add_argument("--patch", type=int, default=4, help="8: 144 tokens, 4: 576")
    train.add_argument("--batch", type=int, default=32)
    train.add_argument("--lr", type=float, default=1.5e-3)
    train.add_argument("--seed", type=int, default=1)
    train.add_argument("--questions", type=int, default=6, help="questions a scene")
    train.add_argument("--mix", type=parse_mix, default=(1 / 6,) * 6, help="color=.12,rel=.3,...")
    train.add_argument("--cls-loss", type=float, default=1.0, help="weight of the head on CLS")
    train.add_argument("--save-every", type=int, default=200, help="steps")
    put = commands.add_parser("export", help="put a folder's weights into the package")
    put.add_argument("folder", type=Path)
    put.add_argument("--to", type=Path, default=pocket.FOLDER)
    a = parser.parse_args(argv)
    logging.disable_progress_bar()
    if a.command == "export":
        export(a.folder, a.to)
        print(f"{a.folder} -> {a.to}")
        return
    length_of_run = {k: v for k in ("minutes", "steps") if (v := getattr(a, k)) is not None}
    if a.resume:
        trainer = Trainer.resume(a.out, **length_of_run)
    else:
        names = ("patch", "batch", "lr", "seed", "questions", "mix", "cls_loss")
        shared = {name: getattr(a, name) for name in names}
        settings = Settings(**shared, **(length_of_run or {"minutes": 60.0}))
        trainer = Trainer(settings, a.init)
    run(trainer, a.out, a.save_every)


if __name__ == "__main__":
    main()
