"""Problems for row_scores, and the tolerance it is held to."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from restore_ext import reference
from restore_ext.testing.attention import AttentionCase


@dataclass(frozen=True)
class RowScoresCase(AttentionCase):
    """Lq is R, Lk is K. By default 5 text raters and a prompt of LLaVA-1.5, half of it merged."""

    Lq: int = 5
    Lk: int = 320
    causal: bool = False  # of key_range, if at all: ranges "causal"
    weights: str | None = None  # some: of any sign, NaN lies in the queries of weight 0

    def arguments(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        given = super().arguments(device, dtype)
        weight = None
        if self.weights is not None:
            g = torch.Generator().manual_seed(1)
            weight = torch.randn(self.B, self.Lq, generator=g)
            weight[torch.rand(self.B, self.Lq, generator=g) < 0.3] = 0
            weight = weight.to(device)
            out = (weight == 0)[:, None, :, None]
            given["query"] = given["query"].masked_fill(out, math.nan)
        given = {name: a for name, a in given.items() if name not in ("value", "causal")}
        order = ("query", "key", "weight")
        return {name: (given | {"weight": weight})[name] for name in (*order, *list(given)[2:])}

    def _ranges(self, g: torch.Generator) -> Tensor | None:
        if self.ranges != "causal":
            return super()._ranges(g)
        past = torch.arange(self.Lk - self.Lq, self.Lk).expand(self.B, -1) + 1
        return torch.stack([torch.zeros_like(past), past], -1).int()


SMALL = RowScoresCase(B=2, Hq=4, Hkv=2, Lq=9, Lk=13, D=32, P=8, weights="some")
CASES = [
    RowScoresCase(),
    RowScoresCase(Lq=1, P=0, positions=None),  # the last prompt token
    RowScoresCase(Lq=1, Lk=577, D=64, P=0, positions=None, sizes=False),  # CLS of a ViT
    RowScoresCase(Hq=2, Hkv=2, Lq=183, Lk=183, ranges="causal"),  # mean received
    RowScoresCase(Hq=1, Hkv=1, Lq=1, Lk=1, D=32),
    RowScoresCase(Hq=1, Hkv=1, Lq=1, Lk=700, D=32),
    RowScoresCase(B=2, Lq=70, Lk=1, D=64),
    RowScoresCase(B=3, Hq=3, Hkv=3, Lq=7, Lk=77, D=40, weights="some"),  # nothing divides anything
    RowScoresCase(B=2, Lq=64, Lk=128, D=256, weights="some"),  # everything divides everything
    RowScoresCase(B=2, Hq=8, Hkv=2, Lq=1, Lk=131, D=64),
    RowScoresCase(Hq=8, Hkv=1, Lq=5, Lk=600, D=64, P=0),
    RowScoresCase(Hq=14, Hkv=2, Lq=3, Lk=150, D=128, weights="some"),
    RowScoresCase(Hq=24, Hkv=2, Lq=2, Lk=70, D=32),
    RowScoresCase(Hq=2, Hkv=1, Lq=230, Lk=100, D=64, ranges="causal", weights="some"),
    RowScoresCase(B=0, Lq=7, Lk=7, D=64),
    RowScoresCase(B=2, Lq=0, Lk=7, D=64),
    RowScoresCase(B=2, Lq=7, Lk=0, D=64),
    RowScoresCase(B=4, Lq=3, Lk=150, D=64, padding=(0, 3, 97, 150)),
    RowScoresCase(B=3, Hq=4, Hkv=2, Lq=50, Lk=150, D=64, padding=(0, 3, 97), ranges="causal"),
    RowScoresCase(B=2, Lq=70, Lk=130, D=32, holes=True, sizes=False),
    RowScoresCase(Lq=150, Lk=150, D=64, ranges="window", weights="some"),
    RowScoresCase(B=2, Lq=100, Lk=150, D=64, ranges="prefix"),
    RowScoresCase(B=2, Lq=150, Lk=150, D=64, ranges="image", padding=(0, 30)),
    RowScoresCase(B=2, Lq=70, Lk=70, D=64, ranges="nothing"),
    RowScoresCase(B=2, Lq=110, Lk=140, D=64, ranges="wild", weights="some"),
    RowScoresCase(B=2, Lq=3, Lk=700, D=64, ranges="wild", holes=True),
    RowScoresCase(B=2, Lq=20, Lk=150, D=128, axes=3, P=512, positions="mrope"),
    RowScoresCase(B=2, Hq=8, Hkv=2, Lq=3, Lk=150, D=128, axes=3, P=512, positions=None),
    RowScoresCase(B=2, Lq=30, Lk=90, D=64, axes=5, P=64),
    RowScoresCase(Lq=9, Lk=90, D=64, positions="far", P=50),
    RowScoresCase(Lq=9, Lk=90, D=64, positions="far", axes=2, P=50),
    RowScoresCase(Lq=9, Lk=90, D=64, positions="far", P=1),
    RowScoresCase(Lq=1, Lk=90, D=64, softcap=5.0),
    RowScoresCase(Lq=30, Lk=90, D=64, softcap=5.0, weights="some"),
    RowScoresCase(Lq=90, Lk=90, D=64, scale=0.5),
    RowScoresCase(Lq=9, Lk=90, D=64, scale=-1.0, P=0, positions=None, sizes=False),
]


def truth(given: dict[str, Any]) -> Tensor:
    """In float64."""
    return reference.row_scores(**given | {k: given[k].double() for k in ("query", "key")})


def assert_within_twice_torch(score: Tensor, given: dict[str, Any]) -> None:
    """Error against float64 at most twice that of plain torch in float32, plus four ulps.

    An ulp each for the exponentials of a weight and of what it is divided by, for the quotient and
    for the product: plain torch may have none of them, where a row sees one key.
    """
    exact = truth(given)
    plain = reference.row_scores(**given | {k: given[k].float() for k in ("query", "key")})
    assert score.dtype == torch.float32 and score.shape == exact.shape
    assert torch.equal(score.isfinite(), exact.isfinite()), "NaN or Inf where the truth has none"
    seen = exact.isfinite()
    score, plain, exact = score[seen], plain[seen], exact[seen]
    if not score.numel():
        return
    allowed = 2 * (plain - exact).abs().max().item()
    # Weights of both signs cancel: an ulp is one of the largest.
    ulp = torch.finfo(torch.float32).eps * exact.abs().max()
    worst = ((score - exact).abs() - 4 * ulp).max().item()
    assert worst <= allowed, f"error {worst:.2e} past four ulps, {allowed:.2e} is allowed"
