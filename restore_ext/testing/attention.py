"""Problems for calibrated_attention, and the tolerance it is held to."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from restore_ext import reference

NEVER = float("-inf")


@dataclass(frozen=True)
class AttentionCase:
    """By default LLaVA-1.5's prefill: 35 text + 128 of 576 visual + 20 text tokens, in 4 heads."""

    B: int = 1
    Hq: int = 4
    Hkv: int = 4
    Lq: int = 183
    Lk: int = 183
    D: int = 128
    causal: bool = True
    sizes: bool = True
    padding: tuple[int, ...] = ()  # keys of a row that are padding, on the left; NaN lies there
    holes: bool = False  # every fifth key is padding too
    positions: str | None = "merged"  # far: beyond the table on both sides of 0; see _positions
    axes: int = 1
    P: int = 4096  # 0: no decay
    ranges: str | None = None  # window, prefix, image, nothing, wild
    softcap: float = 0.0
    scale: float | None = None

    def __str__(self) -> str:
        said = [(f.name, getattr(self, f.name)) for f in fields(self)]
        usual = {f.name: f.default for f in fields(self)}
        sizes = ("B", "Hq", "Hkv", "Lq", "Lk", "D")
        return " ".join(f"{n}={v}" for n, v in said if n in sizes or v != usual[n])

    def arguments(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The operator's arguments by name."""
        g = torch.Generator().manual_seed(0)
        B, Lq, Lk = self.B, self.Lq, self.Lk
        query = 2 * torch.randn(B, self.Hq, Lq, self.D, generator=g)  # some rows are peaked
        key = torch.randn(B, self.Hkv, Lk, self.D, generator=g)
        value = torch.randn(B, self.Hkv, Lk, self.D, generator=g) + 0.5
        query_position, key_position = self._positions(g)
        log_size = None
        if self.sizes or self.padding or self.holes:
            log_size = torch.randint(1, 17, (B, Lk), generator=g).float().log()
            for b, count in enumerate(self.padding):
                log_size[b, :count] = NEVER
            if self.holes:
                log_size[:, ::5] = NEVER
            padding = (log_size == NEVER)[:, None, :, None]
            key, value = key.masked_fill(padding, math.nan), value.masked_fill(padding, math.nan)
        given = {
            "query": query.to(dtype),
            "key": key.to(dtype),
            "value": value.to(dtype),
            "log_size": log_size,
            "query_position": query_position,
            "key_position": key_position,
            "decay": decay(self.axes, self.P) if self.P else None,
            "causal": self.causal,
            "key_range": self._ranges(g),
            "softcap": self.softcap,
            "scale": self.scale,
        }
        return {k: a.to(device) if isinstance(a, Tensor) else a for k, a in given.items()}

    def _positions(self, g: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
        """Of keys that ascend with gaps, and of the queries, which are the last of them."""
        if self.positions is None:
            return None, None
        longest = max(self.Lq, self.Lk)
        shape = (self.B, self.axes, longest) if self.axes > 1 else (self.B, longest)
        reach = 3 * max(self.P, 1) if self.positions == "far" else 9
        position = torch.randint(1, reach, shape, generator=g).cumsum(-1)
        index = torch.arange(longest)
        if self.positions == "far":
            position = position - position[..., -1:] // 2
        elif self.positions == "runs":  # text around what was merged
            merged = (index > longest // 3) & (index < longest - 70)
            position = torch.where(merged, position.diff(dim=-1, prepend=position[..., :1]), 1)
            position = position.cumsum(-1)
        elif self.positions == "shuffled":
            position = position[..., torch.randperm(longest, generator=g)]
        elif self.positions == "steps":  # of 1 or 2
            position = torch.randint(1, 3, shape, generator=g).cumsum(-1)
        elif self.positions == "outlier":
            position = torch.where(index == 100, 10**6, index).expand(shape)
        elif self.positions == "mrope":  # text, an image of 11 columns, text; three axes
            first, past = longest // 3, longest - longest // 4
            patch = index - first
            grid = torch.stack([patch.new_zeros(longest), patch // 11, patch % 11]) + first
            after = first + max((past - first) // 11, 11) + 1 + index - past
            position = torch.where(index < first, index, torch.where(index < past, grid, after))
            position = position.expand(shape)
        elif self.positions == "apart":  # the axes ascend alike, but part half way
            axis = torch.arange(self.axes)[:, None]
            position = (index + 7 * axis * (index > longest // 2)).expand(shape)
        position = position.int()
        at_query, at_key = (position[..., longest - L :].contiguous() for L in (self.Lq, self.Lk))
        return at_query, at_key

    def _ranges(self, g: torch.Generator) -> Tensor | None:
        """[B, Lq, 2]: what a model would ask for, and what none would."""
        if self.ranges is None:
            return None
        row = torch.arange(self.Lq).expand(self.B, -1) + self.Lk - self.Lq
        past = row + 1
        first = torch.zeros_like(row)
        if self.ranges == "window":
            first = row - 20
        elif self.ranges == "prefix":
            past = past.clamp(min=self.Lk // 3)
        elif self.ranges == "image":  # two blocks of a quarter see all of themselves
            quarter = max(self.Lk // 4, 1)
            within = (row // quarter) % 2 == 1
            past = torch.where(within, (row // quarter + 1) * quarter, past)
        elif self.ranges == "nothing":
            past = first
        elif self.ranges == "wild":  # empty, reversed and far outside too
            first = torch.randint(-self.Lk, 2 * self.Lk, row.shape, generator=g)
            past = torch.randint(-self.Lk, 2 * self.Lk, row.shape, generator=g)
        else:
            raise ValueError(f"unknown ranges: {self.ranges!r}")
        return torch.stack([first, past], -1).int()


SMALL = AttentionCase(B=2, Hq=4, Hkv=2, Lq=9, Lk=13, D=32, P=8)
CASES = [
    AttentionCase(),
    AttentionCase(Hq=2, Hkv=2, Lq=704, Lk=704, positions=None, sizes=False),  # all 576 kept
    AttentionCase(B=2, Hq=3, Hkv=3, Lq=148, Lk=148, D=64, causal=False),
    AttentionCase(Hq=1, Hkv=1, Lq=1, Lk=1, D=32),
    AttentionCase(B=3, Lq=77, Lk=77, D=40),  # nothing divides anything
    AttentionCase(B=2, Lq=64, Lk=128, D=256),  # everything divides everything
    AttentionCase(B=2, Hq=8, Hkv=2, Lq=1, Lk=131, D=64),  # one token is decoded
    AttentionCase(B=2, Hq=8, Hkv=2, Lq=5, Lk=131, D=64, P=0),  # a chunk; sizes alone
    AttentionCase(Hq=8, Hkv=1, Lq=70, Lk=200, D=64, positions=None),
    AttentionCase(Lq=90, Lk=20, D=64),  # the first 70 queries see nothing
    AttentionCase(Lq=90, Lk=20, D=64, causal=False, positions=None),
    AttentionCase(B=0, Lq=7, Lk=7, D=64),
    AttentionCase(Hq=0, Lq=7, Lk=7, D=64),
    AttentionCase(B=2, Lq=0, Lk=7, D=64),
    AttentionCase(B=2, Lq=7, Lk=0, D=64),
    AttentionCase(B=4, Lq=150, Lk=150, D=64, padding=(0, 3, 97, 150)),
    AttentionCase(B=3, Hq=4, Hkv=2, Lq=1, Lk=150, D=64, padding=(0, 3, 97)),
    AttentionCase(B=2, Lq=70, Lk=130, D=32, holes=True, causal=False, sizes=False),
    AttentionCase(Lq=150, Lk=150, D=64, ranges="window"),
    AttentionCase(B=2, Lq=100, Lk=150, D=64, ranges="prefix", causal=False),
    AttentionCase(B=2, Lq=150, Lk=150, D=64, ranges="image", causal=False, padding=(0, 30)),
    AttentionCase(B=2, Lq=70, Lk=70, D=64, ranges="nothing"),
    AttentionCase(B=2, Lq=150, Lk=140, D=64, ranges="wild"),
    AttentionCase(B=2, Lq=150, Lk=150, D=64, ranges="wild", causal=False, holes=True),
    AttentionCase(B=2, Lq=150, Lk=150, D=128, axes=3, P=512),
    AttentionCase(B=2, Hq=8, Hkv=2, Lq=3, Lk=150, D=128, axes=3, P=512, positions=None),
    AttentionCase(Lq=90, Lk=90, D=64, positions="far", P=50),
    AttentionCase(Lq=90, Lk=90, D=64, positions="far", P=1),
    AttentionCase(Lq=90, Lk=90, D=64, positions="far", axes=2, P=50),
    AttentionCase(Lq=90, Lk=90, D=64, softcap=5.0),
    AttentionCase(Lq=90, Lk=90, D=64, scale=0.5),
    AttentionCase(Lq=90, Lk=90, D=64, scale=-1.0, P=0, positions=None, sizes=False),
]
# Where the CUDA kernels change their ways: head sizes, the distances of a tile, what it masks.
KERNEL_CASES = [
    AttentionCase(Hq=2, Hkv=2, Lq=300, Lk=300, D=64, positions="runs"),
    AttentionCase(Hq=2, Hkv=1, Lq=150, Lk=340, D=96, positions="runs", padding=(70,)),
    AttentionCase(Hq=2, Hkv=2, Lq=130, Lk=200, D=128, positions="shuffled", causal=False),
    AttentionCase(Hq=2, Hkv=2, Lq=130, Lk=130, D=96, positions=None, sizes=False, P=16),
    AttentionCase(Hq=2, Hkv=2, Lq=130, Lk=130, D=96, positions=None, sizes=False, P=0),
    AttentionCase(Hq=1, Hkv=1, Lq=300, Lk=300, D=64, positions=None, P=20, causal=False),
    AttentionCase(Hq=1, Hkv=1, Lq=130, Lk=300, D=64, positions=None, P=100),
    AttentionCase(B=2, Hq=4, Hkv=2, Lq=260, Lk=260, D=64, axes=3, P=512, positions="mrope"),
    AttentionCase(Hq=2, Hkv=2, Lq=150, Lk=150, D=64, axes=3, P=512, positions="far"),
    AttentionCase(Hq=2, Hkv=2, Lq=60, Lk=255, D=64, axes=3, P=64, positions="apart"),
    AttentionCase(Hq=2, Hkv=2, Lq=100, Lk=500, D=64, axes=3, P=512, positions="steps"),
    AttentionCase(Hq=2, Hkv=2, Lq=150, Lk=150, D=64, axes=5, P=64),
    AttentionCase(Hq=1, Hkv=1, Lq=60, Lk=1400, D=64, positions="outlier"),
    AttentionCase(Hq=2, Hkv=2, Lq=150, Lk=200, D=64, positions="far", P=4096),
    AttentionCase(Hq=1, Hkv=1, Lq=40, Lk=3000, D=64, positions="runs", causal=False),
    AttentionCase(Hq=2, Hkv=2, Lq=200, Lk=200, D=64, ranges="window", padding=(100,)),
    AttentionCase(Hq=2, Hkv=2, Lq=200, Lk=200, D=64, ranges="wild", holes=True, softcap=5.0),
    AttentionCase(Hq=2, Hkv=2, Lq=70, Lk=70, D=96, ranges="nothing"),
    AttentionCase(Hq=2, Hkv=2, Lq=100, Lk=100, D=64, scale=-0.1, sizes=False, P=0),
    AttentionCase(Hq=6, Hkv=2, Lq=5, Lk=300, D=128, positions="runs"),
    AttentionCase(Hq=2, Hkv=2, Lq=7, Lk=0, D=64),
]


def decay(axes: int, P: int) -> Tensor:
    """[G, P] float32: RoPE's mean cosine at each distance, base 10 000, weighted over the axes."""
    frequency = 1e4 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    cosine = torch.cos(torch.arange(P, dtype=torch.float64)[:, None] * frequency)
    return torch.stack([part.sum(1) / 64 for part in cosine.chunk(axes, 1)]).float()


def truth(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64."""
    heads = {k: given[k].double() for k in ("query", "key", "value")}
    out, lse = reference.calibrated_attention(**given | heads, return_lse=True)
    return out, lse


def by_sdpa(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(out, lse) as plain torch has them: SDPA's maths with a float32 bias; float32 logits."""
    q, k, v = (given[name] for name in ("query", "key", "value"))
    B, Hq, Lq, D = q.shape
    Lk = k.shape[2]
    if given["log_size"] is not None:
        padding = (given["log_size"] == NEVER)[:, None, :, None]
        k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)
    names = ("log_size", "query_position", "key_position", "decay", "causal", "key_range")
    bias = reference.attention_bias(B, Lq, Lk, **{n: given[n] for n in names}, device=q.device)

    scale = D**-0.5 if given["scale"] is None else given["scale"]
    repeat = Hq // k.shape[1]
    logit = q.float() @ k.float().repeat_interleave(repeat, 1).mT * scale
    if softcap := given["softcap"]:  # which SDPA does not have
        logit = softcap * torch.tanh(logit / softcap) + bias
        weights = logit.softmax(-1).nan_to_num(0)
        return (weights @ v.float().repeat_interleave(repeat, 1)).to(q.dtype), logit.logsumexp(-1)
    with sdpa_kernel(SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, scale=scale, enable_gqa=True
        )
    return out, (logit + bias).logsumexp(-1)


def assert_within_twice_sdpa(got: tuple[Tensor, Tensor], given: dict[str, Any]) -> None:
    """Error against float64 at most twice that of plain torch in the same dtype, plus one ulp.

    Holds for the output and for the log-sum-exp; where a query sees nothing they are 0 and -inf.
    """
    for name, ours, plain, exact in zip(
        ("out", "lse"), got, by_sdpa(given), truth(given), strict=True
    ):
        assert ours.shape == exact.shape
        seen = exact.isfinite()
        assert torch.equal(ours[~seen].double(), exact[~seen]), f"{name}: finite, or should be"
        ours, plain, exact = ours[seen], plain[seen], exact[seen]
        if not ours.numel():
            continue
        # The logits are sums of about this size, however small what they come to.
        size = max(_terms(given), exact.abs().max().item())
        scale = exact.abs() if name == "out" else exact.abs().clamp(min=size)
        allowed = 2 * (plain - exact).abs().max().item()
        worst = ((ours - exact).abs() - torch.finfo(ours.dtype).eps * scale).max().item()
        assert worst <= allowed, f"{name}: error {worst:.2e} past an ulp, {allowed:.2e} is allowed"


def _terms(given: dict[str, Any]) -> float:
    """The sum of the magnitudes of a logit's terms, on average: what its rounding errors follow."""
    q, k = (given[name].double().abs().nanmean((0, 1, 2)) for name in ("query", "key"))
    scale = q.numel() ** -0.5 if given["scale"] is None else abs(given["scale"])
    return float((q * k).sum().nan_to_num(0)) * scale


# What all that attend refuse of their bias, and what spoils the arguments of a problem with P 8.
SPOILED_BIAS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "query_position must be Int, got Long": lambda g: {
        "query_position": g["query_position"].long()
    },
    "key_position must be Int, got Long": lambda g: {"key_position": g["key_position"].long()},
    "decay must have 2 dimensions, got shape [1, 1, 8]": lambda g: {"decay": g["decay"][None]},
    "decay must have at least one axis G and one distance P, got shape [1, 0]": lambda g: {
        "decay": g["decay"][:, :0]
    },
    "decay must be Float, got Double": lambda g: {"decay": g["decay"].double()},
    "softcap must be >= 0, got -1": lambda g: {"softcap": -1.0},
}
