"""calibrated_attention against SDPA with the bias as a mask, built for the call or kept.

A case without sizes and distances is plain causal attention, where SDPA needs no mask at all.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.harness import main
from restore_ext import calibrated_attention, reference
from restore_ext.testing.attention import AttentionCase, truth


def mask_of(given: dict[str, Any]) -> Tensor | None:
    if given["log_size"] is None and given["decay"] is None:
        return None
    query, key = given["query"], given["key"]
    names = ("log_size", "query_position", "key_position", "decay", "causal", "key_range")
    shape = (len(query), query.shape[2], key.shape[2])
    bias = reference.attention_bias(*shape, **{n: given[n] for n in names}, device=query.device)
    return bias.to(query.dtype)


def by_sdpa(given: dict[str, Any], mask: Tensor | None) -> Tensor:
    heads = (given[name] for name in ("query", "key", "value"))
    alone = mask is None and given["query"].shape[2] > 1
    return scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=alone, enable_gqa=True)


def sdpa_and_mask(**given: Any) -> Tensor:
    return by_sdpa(given, mask_of(given))


class SdpaMaskKept:
    """The mask of the case at hand is built once, as if all layers shared it."""

    query: Tensor | None = None
    mask: Tensor | None = None

    def __call__(self, **given: Any) -> Tensor:
        if given["query"] is not self.query:
            self.query, self.mask = given["query"], mask_of(given)
        return by_sdpa(given, self.mask)


def check(out: Tensor, **given: Any) -> None:
    """Wider than the tests: in half precision SDPA also rounds its mask and its weights."""
    eps = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.double(), truth(given)[0], rtol=8 * eps, atol=64 * eps)


CASES = [
    AttentionCase(Hq=3, Hkv=3, Lq=660, Lk=660, D=64),  # the model in the package, all tokens
    AttentionCase(Hq=3, Hkv=3, Lq=148, Lk=148, D=64),  # and 64 of 576
    AttentionCase(Hq=8, Hkv=8, Lq=183, Lk=183),
    AttentionCase(Hq=8, Hkv=8, Lq=704, Lk=704),
    AttentionCase(Hq=8, Hkv=8, Lq=704, Lk=704, sizes=False, P=0),
    AttentionCase(Hq=8, Hkv=2, Lq=1, Lk=704, P=0),  # a decoding step
]

if __name__ == "__main__":
    providers = {
        "SDPA, new mask": sdpa_and_mask,
        "SDPA, old mask": SdpaMaskKept(),
        "restore_ext": calibrated_attention,
    }
    main("calibrated_attention", CASES, providers, check)
