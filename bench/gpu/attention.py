"""What calibrated_attention is held against, on the CPU and on a GPU, and when an answer is right.

The layer of the released code is written from its description; no line of it is copied. Where a
library knows no bias it solves the problem without one, as an upper bound: "no bias" is its name.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu.problems import forced
from bench.provider import Given, Peer, compiled, need, need_gpu
from restore_ext import calibrated_attention
from restore_ext.bench.plain import by_sdpa, mask_of
from restore_ext.testing.attention import truth

# Relative error of the whole output: half precision also rounds masks and weights.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
ROWS = 128  # of the queries of a head, and two of the batch: what is compared with float64


def check(out: Tensor, **given: Any) -> float:
    """Raises where the output is wrong, returns how far it is from float64 otherwise."""
    assert out.shape == given["query"].shape and out.dtype == given["query"].dtype
    assert out.isfinite().all(), "an output that is not finite"
    rows, batch = some(given)
    exact = truth(part(given, rows, batch))[0]
    got = out[batch][:, :, rows].double()
    off, size = (got - exact).norm(dim=-1), exact.norm(dim=-1)
    error = (off.norm() / size.norm()).item()
    assert error <= TOLERANCE[out.dtype], f"the relative error is {error:.1e}"
    worst = (off.max() / size.square().mean().sqrt()).item()
    assert worst <= 8 * TOLERANCE[out.dtype], f"the relative error of a query is {worst:.1e}"
    return error


def some(given: Given) -> tuple[Tensor, Tensor]:
    """A few queries and batch items, the first and the last among them."""
    B, _, Lq, _ = given["query"].shape
    device = given["query"].device
    rows = torch.linspace(0, Lq - 1, min(Lq, ROWS), device=device).long().unique()
    return rows, torch.tensor(sorted({0, B - 1}), device=device)


def part(given: Given, rows: Tensor, batch: Tensor) -> Given:
    """The problem for those queries alone: what they see is said by key_range."""
    Lq, Lk = given["query"].shape[2], given["key"].shape[2]
    assert given["key_range"] is None
    per_batch = ("query", "key", "value", "log_size", "query_position", "key_position")
    few = given | {n: t[batch] for n in per_batch if (t := given[n]) is not None}
    index = torch.arange(Lk, dtype=torch.int32, device=rows.device).expand(len(batch), -1)
    if few["key_position"] is None:
        few |= {"query_position": index[:, Lk - Lq :], "key_position": index}
    past = rows + (1 + Lk - Lq) if given["causal"] else torch.full_like(rows, Lk)
    seen = torch.stack([torch.zeros_like(past), past], -1).int().expand(len(batch), -1, -1)
    return few | {
        "query": few["query"][:, :, rows],
        "query_position": few["query_position"][..., rows],
        "causal": False,
        "key_range": seen,
    }


def chosen(given: Given) -> str:
    """Which kernel calibrated_attention has for a prompt on this GPU, by asking the best first."""
    if not given["query"].is_cuda:
        return ""
    for kernel in ("hopper", "prefill"):
        try:
            with forced(kernel):
                calibrated_attention(**given)
        except RuntimeError as error:
            if "does not take this" not in str(error):
                raise
        else:
            return f"by {kernel}"
    return "by plain"


def cost(given: Given) -> tuple[float, float]:
    """Operations of the part of the square that is seen, and bytes read and written once."""
    query, key = given["query"], given["key"]
    B, H, Lq, D = query.shape
    Lk = key.shape[2]
    seen = Lq * Lk - (Lq * (Lq - 1) / 2 if given["causal"] else 0)
    moved = 2 * query.numel() + 2 * key.numel()
    return 4.0 * B * H * D * seen, float(moved * query.element_size())


def sdpa_mask_kept(**given: Any) -> Callable[[], Tensor]:
    """The mask is made once, as if all layers shared it."""
    return partial(by_sdpa, given, mask_of(given))


def without_bias(given: Given) -> Given:
    return given | dict.fromkeys(("log_size", "query_position", "key_position", "decay"))


def on_gpu(make: Callable[..., Callable[[], Tensor]]) -> Callable[..., Callable[[], Tensor]]:
    def checked(**given: Any) -> Callable[[], Tensor]:
        need_gpu(given["query"])
        return make(**given)

    return checked


def by_backend(backend: SDPBackend, biased: bool) -> Peer:
    problem = (lambda given: given) if biased else without_bias
    return Peer(on_gpu(sdpa_mask_kept), problem, around=lambda: sdpa_kernel(backend))


def flex(**given: Any) -> Callable[[], Tensor]:
    """FlexAttention with the same bias as its score_mod."""
    return flex_by(compiled(flex_attention, given["query"].device), given)


def flex_flash(**given: Any) -> Callable[[], Tensor]:
    need("flash_attn.cute", given["query"])
    call = compiled(flex_attention, given["query"].device)
    return flex_by(call, given, {"BACKEND": "FLASH"})


def flex_by(
    call: Callable[..., Tensor], given: Given, options: dict[str, Any] | None = None
) -> Callable[[], Tensor]:
    """The same by a flex_attention that was compiled, or not; options name a kernel of it."""
    query, key, value = (given[name] for name in ("query", "key", "value"))
    device, B, Lq, Lk = query.device, len(query), query.shape[2], key.shape[2]
    sizes, table = given["log_size"], given["decay"]
    index = torch.arange(Lk, dtype=torch.int32, device=device).expand(B, -1)
    at_key = index if given["key_position"] is None else given["key_position"]
    at_query = index[:, Lk - Lq :] if given["query_position"] is None else given["query_position"]
    bias = None if table is None else torch.log(2 - table.reshape(-1))

    def score(logit: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if sizes is not None:
            logit = logit + sizes[b, j]
        if bias is not None:
            distance = (at_query[b, i] - at_key[b, j]).abs()
            logit = logit + bias[distance.clamp(max=bias.shape[0] - 1)]
        return logit

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i + (Lk - Lq) >= j

    block_mask = create_block_mask(seen, None, None, Lq, Lk, device=str(device))
    said = {"score_mod": score, "block_mask": block_mask, "enable_gqa": True}
    if options is not None:
        said["kernel_options"] = options
    return partial(call, query, key, value, **said)


def flash_attention_3(**given: Any) -> Callable[[], Tensor]:
    library = need("flash_attn_interface", given["query"])
    heads = [given[name].transpose(1, 2) for name in ("query", "key", "value")]

    def call() -> Tensor:
        out = library.flash_attn_func(*heads, causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def flashinfer_decode(**given: Any) -> Callable[[], Tensor]:
    """One sequence; FlashInfer's call for a batch reads pages."""
    library = need("flashinfer", given["query"])
    query, key, value = (given[name] for name in ("query", "key", "value"))
    assert len(query) == 1 and query.shape[2] == 1, "one sequence, one query"

    def call() -> Tensor:
        out = library.single_decode_with_kv_cache(
            query[0, :, 0], key[0], value[0], kv_layout="HND", sm_scale=query.shape[3] ** -0.5
        )
        return out[None, :, None]

    return call


def repeated(heads: Tensor, count: int) -> Tensor:
    """Every key and value head as often as there are queries to it, in memory of its own."""
    return heads.repeat_interleave(count, 1) if count > 1 else heads.contiguous()


def official_layer(**given: Any) -> Callable[[], Tensor]:
    """One layer of the released code, eager: the distances are shared, the mask is made anew."""
    query, key, value = (given[name] for name in ("query", "key", "value"))
    B, H, L, _ = query.shape
    distance = None
    if given["decay"] is not None:  # the table, 2 - D and its logarithm are of the model's dtype
        at = given["key_position"]
        at = torch.arange(L, device=query.device).expand(B, -1) if at is None else at
        gap = (at[:, :, None] - at[:, None, :]).clamp(0, given["decay"].shape[-1] - 1).long()
        distance = torch.log(2 - given["decay"].reshape(-1).to(query.dtype)[gap])[:, None]
    sizes = None if given["log_size"] is None else given["log_size"].exp()
    size = torch.ones(B, L, device=query.device) if sizes is None else sizes
    causal = torch.ones(L, L, dtype=torch.bool, device=query.device).tril()
    never = torch.tensor(float("-inf"), device=query.device)

    def layer() -> Tensor:
        mask = torch.log(size)[:, None, None, :].expand(B, 1, L, L).clone()
        if distance is not None:
            mask += distance
        mask = torch.where(causal, mask, never).to(query.dtype)
        each = H // key.shape[1]
        return scaled_dot_product_attention(
            query.contiguous(), repeated(key, each), repeated(value, each), attn_mask=mask
        )

    return layer


def official_step(**given: Any) -> Callable[[], Tensor]:
    """One layer of one decoding step of the released code, eager."""
    query, key, value = (given[name] for name in ("query", "key", "value"))
    B, H, _, _ = query.shape
    before = given["log_size"].exp()[:, :-1]  # the new token's size, 1, is appended in every layer
    last = given["log_size"].exp()[:, -1:]

    def layer() -> Tensor:
        size = torch.cat([before, last], 1)
        mask = torch.log(size)[:, None, None, :].expand(B, 1, 1, -1).to(query.dtype)
        each = H // key.shape[1]
        return scaled_dot_product_attention(
            query.contiguous(), repeated(key, each), repeated(value, each), attn_mask=mask
        )

    return layer


OURS_BY = Peer(lambda **given: partial(calibrated_attention, **given), says=chosen)
KEPT = Peer(sdpa_mask_kept)
BACKENDS: dict[str, Any] = {
    "SDPA cuDNN, old mask": by_backend(SDPBackend.CUDNN_ATTENTION, biased=True),
    "SDPA efficient, old mask": by_backend(SDPBackend.EFFICIENT_ATTENTION, biased=True),
    "SDPA cuDNN, no bias": by_backend(SDPBackend.CUDNN_ATTENTION, biased=False),
    "SDPA FA2, no bias": by_backend(SDPBackend.FLASH_ATTENTION, biased=False),
    "SDPA efficient, no bias": by_backend(SDPBackend.EFFICIENT_ATTENTION, biased=False),
    "FlexAttention": Peer(flex),
    "FlexAttention FA4": Peer(flex_flash),
    "FlashAttention-3, no bias": Peer(flash_attention_3, without_bias),
}
