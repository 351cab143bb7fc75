"""Problems for calibrated_attention_paged; each is also one for calibrated_attention."""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from restore_ext.testing.attention import NEVER, decay


@dataclass(frozen=True)
class PagedCase:
    """By default Qwen2.5-VL's decoding step, in two of four key heads, at two lengths."""

    Hq: int = 14
    Hkv: int = 2
    Lq: int = 1
    D: int = 128
    page: int = 16
    lengths: tuple[int, ...] = (183, 77)  # one for each row of the batch
    max_pages: int | None = None  # what the longest row needs
    sizes: bool = True
    holes: bool = False  # every fifth token of a page is padding; NaN lies there
    stray: bool = False  # every third page of a row is one that does not exist
    positions: str | None = None  # or "merged", or "far": beyond the table on both sides of 0
    axes: int = 1
    P: int = 0  # 0: no decay
    softcap: float = 0.0
    scale: float | None = None

    def __str__(self) -> str:
        said = [(f.name, getattr(self, f.name)) for f in fields(self)]
        usual = {f.name: f.default for f in fields(self)}
        sizes = ("Hq", "Hkv", "Lq", "D", "page", "lengths")
        return " ".join(f"{n}={v}" for n, v in said if n in sizes or v != usual[n])

    def arguments(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The operator's arguments by name. Wherever no row has a token, there is NaN."""
        g = torch.Generator().manual_seed(0)
        B, page = len(self.lengths), self.page
        held = [max(-(-length // page), 0) for length in self.lengths]
        max_pages = max(held, default=0) if self.max_pages is None else self.max_pages
        held = [min(count, max_pages) for count in held]
        pages = sum(held) + 2  # two are free
        shape = (pages, page, self.Hkv, self.D)
        key, value = torch.randn(shape, generator=g), torch.randn(shape, generator=g) + 0.5
        log_size = torch.randint(1, 17, (pages, page), generator=g).float().log()
        if self.holes:
            log_size[:, ::5] = NEVER

        order = torch.randperm(pages - 1, generator=g).int() + 1  # the first is one of them
        block_table = torch.randint(0, pages, (B, max_pages), generator=g).int()
        used = torch.zeros(pages, page, dtype=torch.bool)
        strangers = torch.tensor([-1, pages, -(2**31), 2**31 - 1]).int()
        for b, count in enumerate(held):
            block_table[b, :count], order = order[:count], order[count:]
            tokens = torch.arange(count * page).view(count, page) < self.lengths[b]
            kept = torch.ones(count, dtype=torch.bool)
            if self.stray:
                kept[1::3] = False
                block_table[b, :count][~kept] = strangers.repeat(count)[: (~kept).sum()]
            used[block_table[b, :count][kept].long()] = tokens[kept]
        unused = ~used | (log_size == NEVER)
        key[unused], value[unused] = math.nan, math.nan
        log_size[~used] = math.nan
        query = 2 * torch.randn(B, self.Hq, self.Lq, self.D, generator=g)
        query_position, key_position = self._positions(g, B, pages)
        given = {
            "query": query.to(dtype),
            "key_cache": key.to(dtype),
            "value_cache": value.to(dtype),
            "block_table": block_table,
            "seqlens": torch.tensor(self.lengths, dtype=torch.int32),
            "log_size": log_size if self.sizes or self.holes else None,
            "query_position": query_position,
            "key_position": key_position,
            "decay": decay(self.axes, self.P) if self.P else None,
            "softcap": self.softcap,
            "scale": self.scale,
        }
        return {k: a.to(device) if isinstance(a, Tensor) else a for k, a in given.items()}

    def _positions(
        self, g: torch.Generator, B: int, pages: int
    ) -> tuple[Tensor | None, Tensor | None]:
        if self.positions is None:
            return None, None
        axes = (self.axes,) if self.axes > 1 else ()
        reach = 300 if self.positions == "merged" else 9 * max(self.P, 1)
        low = 0 if self.positions == "merged" else -reach
        at_query = torch.randint(low, reach, (B, *axes, self.Lq), generator=g).int()
        at_key = torch.randint(low, reach, (*axes, pages, self.page), generator=g).int()
        return at_query, at_key


SMALL = PagedCase(Hq=4, Hkv=2, Lq=3, D=32, lengths=(21, 40), P=8, positions="merged")
CASES = [
    PagedCase(),
    PagedCase(Hq=4, Hkv=4, D=64, lengths=(704,), sizes=False),  # heads of their own
    PagedCase(Hq=1, Hkv=1, D=32, lengths=(1,)),
    PagedCase(Hq=6, Hkv=3, Lq=5, D=40, page=17, lengths=(100, 3, 61)),  # nothing divides anything
    PagedCase(Hq=8, Hkv=2, Lq=4, D=64, page=64, lengths=(128, 256)),  # everything does
    PagedCase(Hq=4, Hkv=1, D=96, page=256, lengths=(600, 256, 257)),
    PagedCase(Hq=2, Hkv=1, D=256, page=32, lengths=(90,)),
    PagedCase(Hq=8, Hkv=2, D=64, lengths=(0, 5, 16, 17)),
    PagedCase(Hq=8, Hkv=2, Lq=6, D=64, lengths=(0, 5, 6, 90)),  # the first queries see nothing
    PagedCase(Hq=6, Hkv=2, Lq=23, D=64, lengths=(150, 30)),  # a chunk of a prompt: 69 rows
    PagedCase(Hq=4, Hkv=2, D=64, lengths=(-7, 500, 2**31 - 1), max_pages=6),
    PagedCase(D=64, lengths=(300, 41), stray=True),
    PagedCase(D=64, lengths=(300, 41), max_pages=40, holes=True),
    PagedCase(D=64, Lq=2, lengths=(130, 70), P=64),
    PagedCase(D=64, Lq=2, lengths=(130, 70), P=64, positions="merged"),
    PagedCase(D=128, Lq=2, lengths=(130, 70), P=256, positions="merged", axes=3),
    PagedCase(D=64, lengths=(130, 70), P=50, positions="far", axes=2, holes=True),
    PagedCase(D=64, lengths=(130, 70), P=1, positions="far"),
    PagedCase(D=64, Lq=3, lengths=(130, 70), softcap=5.0),
    PagedCase(D=64, lengths=(130, 70), scale=-1.0, sizes=False),
    PagedCase(lengths=()),
    PagedCase(D=64, lengths=(5, 9), max_pages=0),
    PagedCase(Hq=0, D=64),
    PagedCase(Lq=0, D=64),
]


def contiguous(given: dict[str, Any]) -> dict[str, Any]:
    """The same problem for calibrated_attention: every row's tokens side by side, the last at the
    end, and padding before the first and where a page does not exist."""
    table, page = given["block_table"].long(), given["key_cache"].shape[1]
    pages, (B, _, Lq, _) = len(given["key_cache"]), given["query"].shape
    lengths = given["seqlens"].long().clamp(0, table.shape[1] * page)
    Lk = int(lengths.max()) if B else 0
    index = torch.arange(Lk, device=table.device) - (Lk - lengths[:, None])  # [B, Lk]
    of_page = table.gather(1, index.clamp(min=0) // page) if Lk else table[:, :0]
    exists = (index >= 0) & (of_page >= 0) & (of_page < pages)
    slot = torch.where(exists, of_page * page + index % page, 0)

    def gathered(t: Tensor) -> Tensor:
        return t.flatten(0, 1)[slot]  # [B, Lk, ...]

    log_size = given["log_size"]
    log_size = slot.new_zeros(slot.shape).float() if log_size is None else gathered(log_size)
    at_query, at_key = given["query_position"], given["key_position"]
    if at_query is None:
        at_query = lengths[:, None] - Lq + torch.arange(Lq, device=table.device)
        at_key = index
    elif at_key.dim() == 3:
        at_key = torch.stack([gathered(axis) for axis in at_key], 1)
    else:
        at_key = gathered(at_key)
    return {
        "query": given["query"],
        "key": gathered(given["key_cache"]).transpose(1, 2),
        "value": gathered(given["value_cache"]).transpose(1, 2),
        "log_size": log_size.masked_fill(~exists, NEVER),
        "query_position": at_query.int(),
        "key_position": at_key.int(),
        "decay": given["decay"],
        "causal": True,
        "key_range": None,
        "softcap": given["softcap"],
        "scale": given["scale"],
    }
