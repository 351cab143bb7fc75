"""Bugs in the kernels themselves, for tools/mutate_kernels.py: each is caught by the operator's own
tests, run on the emulated kernel."""

from mutants import Mutant

# Of an operator's tests, the quick ones: the bug must show in these.
FEW = (
    "not same_bits and not every_run and not many and not 576 and not 704 and not 1024 "
    "and not compiles and not well_formed and not small_random and not more_groups"
)
MERGE, LISTS = "merge_tokens_kernel.cu", "merge_tokens_lists_kernel.cu"
PLAIN = "calibrated_attention_plain_kernel.cu"
DECODE, SHARED_DECODE = "calibrated_attention_decode_kernel.cu", "calibrated_attention_decode.cuh"
DIVERSE, REACH = "select_diverse_kernel.cu", "select_diverse_reach.cuh"
ANCHORS, RIVALS = "anchor_scores_kernel.cu", "nearest_rivals_kernel.cu"
MATCH, ASSIGN = "match_bipartite_kernel.cu", "assign_anchors_kernel.cu"
ROWS, ROW_TILES = "row_scores_kernel.cu", "row_scores_tiles.cuh"
# What an operator's kernels are built of, beyond the files of its name.
PARTS = {
    "match_bipartite": ("token_rows",),
    "assign_anchors": ("token_rows",),
    "score_anchors": ("anchor_scores", "nearest_rivals", "token_rows"),
    "select_anchors": ("anchor_scores", "nearest_rivals", "token_rows"),
    "select_diverse": ("nearest_rivals", "token_rows"),
}


def bug(op: str, file: str, name: str, old: str, new: str, mode: str = "source") -> Mutant:
    tests = f"python_tests/test_{op}.py"
    only = (op.removesuffix("_paged"), *PARTS.get(op, ()))
    return Mutant(name, f"csrc/cuda/{file}", old, new, tests, FEW, (mode,), only)


def race(op: str, file: str, name: str, old: str, new: str) -> Mutant:
    """Only who watches every access sees it for sure."""
    return bug(op, file, name, old, new, "check")


KERNELS = [
    bug("merge_tokens", MERGE, "upper median", "(all.count() - 1) / 2;", "all.count() / 2;"),
    bug(
        "merge_tokens",
        MERGE,
        "a group's last tokens are left out",
        "i < count; i += kAhead) {\n    Pack",
        "i + kAhead <= count; i += kAhead) {\n    Pack",
    ),
    bug(
        "merge_tokens",
        MERGE,
        "rows are taken to be dense",
        "p.x + b * p.x_stride_b + c",
        "p.x + b * int64_t{p.groups.N} * p.C + c",
    ),
    bug(
        "merge_tokens",
        MERGE,
        "an empty group is divided by nothing",
        "weight > 0 ? sum[v] / weight : 0.f",
        "sum[v] / weight",
    ),
    bug("merge_tokens", MERGE, "positions without sign", "uint64_t{1} << 63", "uint64_t{0} << 63"),
    bug("merge_tokens", LISTS, "negative groups count", "id >= 0 && id < g.M ?", "id < g.M ?"),
    race(
        "merge_tokens",
        MERGE,
        "no barrier behind what is staged",
        "  __syncthreads();\n  const int c = (blockIdx.y * kThreads",
        "  const int c = (blockIdx.y * kThreads",
    ),
    race("merge_tokens", LISTS, "no __syncwarp", "    __syncwarp();  // all have read it\n", ""),
    bug(
        "match_bipartite",
        "similarity.cuh",
        "the last channels are left out",
        "for (int chunk = 0; chunk * kChunk < C; ++chunk) {",
        "for (int chunk = 0; (chunk + 1) * kChunk <= C; ++chunk) {",
    ),
    bug(
        "match_bipartite",
        MATCH,
        "ties go to the higher even token",
        "its == similarity && other < even",
        "its == similarity && other > even",
    ),
    bug(
        "match_bipartite",
        MATCH,
        "the class token is a source",
        "int other = p.class_token + lane",
        "int other = lane",
    ),
    bug(
        "match_bipartite",
        MATCH,
        "keys of the call before stay",
        "cudaError_t error = cudaMemsetAsync(p.best, 0, p.rows.B * half * sizeof(Key), stream);",
        "cudaError_t error = cudaSuccess;",
    ),
    race(
        "match_bipartite",
        "similarity.cuh",
        "waits for one copy too few",
        "cp_async_wait<kStages - 2>();",
        "cp_async_wait<kStages - 1>();",
    ),
    race(
        "match_bipartite",
        MATCH,
        "no barrier before keys are read",
        "    __syncthreads();  // all warps have put",
        "    // all warps have put",
    ),
    bug(
        "assign_anchors",
        "keys.cuh",
        "ties go to the higher index",
        "(0xffffffffu - static_cast<uint32_t>(index))",
        "static_cast<uint32_t>(index)",
    ),
    bug(
        "assign_anchors",
        ASSIGN,
        "an anchor's last listing counts",
        "atomicMin(&own_slot[rank], slot);",
        "own_slot[rank] = slot;",
    ),
    bug(
        "score_anchors",
        RIVALS,
        "a tile's mirror is not looked at",
        "if (all_others ? other : row_weight > column_weight[c]) {",
        "if (all_others) {",
    ),
    bug(
        "score_anchors",
        RIVALS,
        "rivals are as dense",
        "column_weight[c] > row_weight)",
        "column_weight[c] >= row_weight)",
    ),
    bug(
        "score_anchors",
        ANCHORS,
        "NaN in a sum of units",
        "if (!comparable) scale[i] = {0.f, 0.f};",
        "",
    ),
    bug(
        "score_anchors",
        ANCHORS,
        "one chunk of a warp alone",
        "for (int w = 1; w < kWarps; ++w) sum += sums[w][lane];",
        "for (int w = 1; w < 1; ++w) sum += sums[w][lane];",
    ),
    race(
        "score_anchors",
        RIVALS,
        "maxima where the tile still is",
        "    __syncthreads();  // all are done with the tile's buffers\n",
        "",
    ),
    bug(
        "select_anchors",
        "select_anchors_kernel.cu",
        "one too many of equal scores",
        "equal_before < top.equal))",
        "equal_before <= top.equal))",
    ),
    bug(
        "select_anchors",
        "top_k.cuh",
        "k-th of a digit",
        "before < k && before",
        "before <= k && before",
    ),
    bug(
        "select_diverse",
        REACH,
        "the first pick's neighbours stay",
        "if (t == 0 && reach > kLast) reach = kFarthest;",
        "",
    ),
    bug(
        "select_diverse",
        DIVERSE,
        "a pick is picked again",
        "own.at[v] = first + v == pick ? kPicked : reach_after",
        "own.at[v] = reach_after",
    ),
    bug(
        "select_diverse",
        DIVERSE,
        "ties go to the higher rank",
        "__reduce_min_sync(kAllLanes, rank)",
        "__reduce_max_sync(kAllLanes, mine.reach == reach ? rank : 0u)",
    ),
    race("select_diverse", DIVERSE, "one slot for two picks", "slots[t % 2]", "slots[0]"),
    bug(
        "calibrated_attention",
        "attention_keys.cuh",
        "causal sees one key too many",
        "i + p.Lk - p.Lq + 1)",
        "i + p.Lk - p.Lq + 2)",
    ),
    bug(
        "calibrated_attention",
        PLAIN,
        "padding's value is read",
        "__ballot_sync(~0u, x != kNever)",
        "__ballot_sync(~0u, j < seen.past)",
    ),
    bug(
        "calibrated_attention_paged",
        SHARED_DECODE,
        "the last split is not added",
        "add_tiles(parts, work.splits, tile,",
        "add_tiles(parts, work.splits - 1, tile,",
    ),
    bug(
        "calibrated_attention_paged",
        SHARED_DECODE,
        "pages that do not exist are read",
        "static_cast<unsigned>(page) < static_cast<unsigned>(p.pages) ? page : -1",
        "page < p.pages ? max(page, 0) : -1",
    ),
    bug(
        "calibrated_attention_paged",
        SHARED_DECODE,
        "lengths are those of the table",
        "if (p.seqlens) work.length = min(max(p.seqlens[work.b], 0), work.length);",
        "",
    ),
    race(
        "calibrated_attention_paged",
        DECODE,
        "a stage is written while lanes read it",
        "    __syncwarp();  // before the stage is written again\n",
        "",
    ),
    race(
        "calibrated_attention_paged",
        SHARED_DECODE,
        "a block's sums are not released",
        "  __threadfence();  // what this block leaves is seen by whoever sees its arrival\n",
        "",
    ),
    bug(
        "row_scores",
        ROWS,
        "sums keep the old maximum's scale",
        "sum[r] *= expf(most[r] - shift);",
        "",
    ),
    bug(
        "row_scores",
        ROWS,
        "splits are added as they are",
        "sum += own[n].sum * expf(own[n].max - row.max);",
        "sum += own[n].sum;",
    ),
    bug(
        "row_scores",
        ROW_TILES,
        "rows of weight 0 count",
        "if (weight_of(p, b, row.r) != 0.f) row.seen = visible(a, b, row.r);",
        "row.seen = visible(a, b, row.r);",
    ),
    bug(
        "row_scores",
        ROWS,
        "keys of the head before stay",
        "if (loaded != key_head) load_keys",
        "if (loaded < 0) load_keys",
    ),
    bug(
        "row_scores",
        ROWS,
        "what a row of NaN does not see",
        "part += seen ? row.factor * expf(x[r][k] - row.max) : 0.f;",
        "part += row.factor * expf(x[r][k] - row.max);",
    ),
    race(
        "row_scores",
        ROWS,
        "sums lie where queries still are",
        "  __syncthreads();\n  float* warps",
        "  float* warps",
    ),
    bug(
        "match_bipartite",
        "token_rows_kernel.cu",
        "a token lies one place too far",
        "(1u << lane) - 1",
        "(2u << lane) - 1",
    ),
    bug(
        "match_bipartite",
        "token_rows_kernel.cu",
        "squares of large rows overflow",
        "exponent < -kOrdinary || exponent > kOrdinary",
        "exponent < -kOrdinary",
    ),
    bug(
        "score_anchors",
        "score_anchors_kernel.cu",
        "scores lie at ranks",
        "p.score[b * x.N + x.token[at]]",
        "p.score[at]",
    ),
    bug(
        "score_anchors",
        "score_anchors_kernel.cu",
        "tokens that are not there keep what was there",
        "if (n < x.N && x.valid && !x.valid[at]) p.score[at] = -INFINITY;",
        "",
    ),
]
