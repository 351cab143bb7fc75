"""merge_tokens against the usual formulations: sums in float32, positions by sorting."""

from bench.gpu.tokens import (
    SIZES,
    TINY,
    by_index_add,
    by_scatter_reduce,
    compiled_form,
    half,
    merge_cost,
    released_merge,
)
from bench.harness import Gpu, main
from restore_ext import merge_tokens
from restore_ext.bench import plain
from restore_ext.bench.plain import merged_with
from restore_ext.testing.tokens import MergeCase, check_merge_tokens

CASES = [MergeCase(), MergeCase(M=64, C=4096), MergeCase(B=4, N=196, M=32, C=768)]

if __name__ == "__main__":
    providers = {"plain torch": plain.merge_tokens, "restore_ext": merge_tokens}
    peers = {
        "torch.compile": compiled_form(plain.merge_tokens),
        "scatter_reduce": merged_with(by_scatter_reduce),
        "index_add": merged_with(by_index_add),
        "released code": half(released_merge),
    }
    cases = [MergeCase(M=s["N"] // 9, **s) for s in SIZES]
    gpu = Gpu(cases, [MergeCase(M=5, **s) for s in TINY], peers)
    main("merge_tokens", CASES, providers, check_merge_tokens, gpu=gpu, cost=merge_cost)
