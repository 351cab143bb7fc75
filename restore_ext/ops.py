"""The operators: one typed function each, under it the fake that gives torch.compile its shapes.

B batch, N tokens in, M tokens out, K tokens picked, C channels; H heads, L sequence length, D head
size. What an op means is its namesake in reference.py; what it accepts is its namesake in
csrc/contracts/, and what that refuses is a RuntimeError that names the op, the argument, what was
wanted and what came.

Common to all: float32, float16 or bfloat16 in any strides, float32 inside, any batch (an empty one
too), the same bits on every run. Similarity is cosine: a zero vector has similarity 0, a vector
with NaN or Inf ranks below every other, ties go to the lowest index. Where an index op takes
`valid` (bool [B, N]), a token that is False is never picked, matched or counted: the result is that
of the row without it, with indices mapped back. A budget is an int, or an int32 tensor [B] with one
number a row (the op's own name for it is `budget`); then `max_k` (or `max_r`) gives the width of
the output, N by default, and what a row leaves empty is -1. No op reads a value back to the host,
and none has a gradient: asking for one is a RuntimeError.
"""

import torch
from torch import Tensor

from restore_ext import _C  # noqa: F401  loading the library registers the operators

_ops = torch.ops.restore_ext

# Where this build can run; on "meta" there are shapes alone, from the fakes.
_has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("restore_ext::merge_tokens", "CUDA")
DEVICE_TYPES = ("cpu", "meta", "cuda") if _has_cuda else ("cpu", "meta")


def match_bipartite(
    metric: Tensor,
    r: int | Tensor,
    *,
    valid: Tensor | None = None,
    class_token: bool = False,
    max_r: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Bipartite soft matching (ToMe, arXiv 2210.09461, section 3): even tokens find odd partners.

    Every even token (counting valid tokens only) is matched to its most similar odd one, and the r
    most similar pairs are taken.

    metric       [B, N, C]  what is compared
    r            pairs to take, >= 0; clipped to floor((N - class_token) / 2), what exists
    class_token  protects token 0: it is never a source

    returns  unmerged [B, ceil(N/2) - R] int64, the even tokens left, in falling similarity (with
             class_token: ascending); src [B, R] and dst [B, R] int64, pairs in falling similarity.
             With `valid` or a tensor r, unmerged is [B, ceil(N/2)]; what is left over is -1.
    """
    width, budget = _budget(r, max_r, metric)
    return _ops.match_bipartite(metric, width, budget, valid, class_token)


@torch.library.register_fake("restore_ext::match_bipartite")
def _(metric, r, budget, valid, class_token):
    B, N, _ = metric.shape
    R = torch.sym_max(torch.sym_min(r, (N - int(class_token)) // 2), 0)
    half = (N + 1) // 2
    ragged = budget is not None or valid is not None
    widths = (half if ragged else half - R, R, R)
    return tuple(metric.new_empty(B, w, dtype=torch.int64) for w in widths)


def score_anchors(x: Tensor, *, mode: str = "paper", valid: Tensor | None = None) -> Tensor:
    """Distinctive-anchor score (RESTORE, arXiv 2606.01711, Eq. 5): density times distinctiveness.

    score_i = R_i * (1 - max over j of cos(x_i, x_j)), where R_i is the sum of the similarities of i
    to all tokens, itself included, and j runs over the denser tokens (mode "paper") or, as the
    released code does, the less dense ones (mode "official"); with no such j the factor is 1.

    x [B, N, C];  returns [B, N] float32; -inf where not valid, or where x has NaN or Inf
    """
    return _ops.score_anchors(x, mode, valid)


@torch.library.register_fake("restore_ext::score_anchors")
def _(x, mode, valid):
    return x.new_empty(x.shape[:2], dtype=torch.float32)


def select_anchors(
    x: Tensor,
    k: int | Tensor,
    *,
    mode: str = "paper",
    valid: Tensor | None = None,
    max_k: int | None = None,
) -> Tensor:
    """The k tokens of the highest `score_anchors`, in ascending order (RESTORE, section 3.3).

    x [B, N, C], k in [0, N];  returns [B, K] int64
    """
    width, budget = _budget(k, max_k, x)
    return _ops.select_anchors(x, width, budget, mode, valid)


@torch.library.register_fake("restore_ext::select_anchors")
def _(x, k, budget, mode, valid):
    return x.new_empty(x.shape[0], k, dtype=torch.int64)


def assign_anchors(x: Tensor, anchors: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """The most similar anchor of every token; an anchor belongs to itself.

    x        [B, N, C]
    anchors  [B, K] int64, token indices; one outside [0, N), or of a token not valid, is no anchor

    returns  group [B, N] int64 in [0, K); -1 where not valid, and in a row without anchors
    """
    return _ops.assign_anchors(x, anchors, valid)


@torch.library.register_fake("restore_ext::assign_anchors")
def _(x, anchors, valid):
    return x.new_empty(x.shape[:2], dtype=torch.int64)


def merge_tokens(
    x: Tensor,
    group: Tensor,
    num_groups: int,
    *,
    size: Tensor | None = None,
    position: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Size-weighted mean of the tokens that share a group, rounded once (ToMe's weighted merge).

    x         [B, N, C]
    group     [B, N] int64, the output token each joins; an id outside [0, num_groups) leaves it out
    size      [B, N] float32, how many original tokens each stands for; ones by default
    position  [B, N] int64, any numbers; the token's index by default

    returns  merged [B, M, C] in x's dtype; size [B, M] float32, the sum over members; position
             [B, M] int64, the lower median over members. An empty group is zeros, size 0, position
             -1; one whose sizes add up to no more than 0 is zeros.
    """
    return _ops.merge_tokens(x, group, num_groups, size, position)


@torch.library.register_fake("restore_ext::merge_tokens")
def _(x, group, num_groups, size, position):
    B, _, C = x.shape
    return (
        x.new_empty(B, num_groups, C),
        x.new_empty(B, num_groups, dtype=torch.float32),
        x.new_empty(B, num_groups, dtype=torch.int64),
    )


def select_diverse(
    x: Tensor, k: int | Tensor, *, valid: Tensor | None = None, max_k: int | None = None
) -> Tensor:
    """Greedy max-min diversity (DivPrune, arXiv 2503.02175): a pick is farthest from those before.

    The first is the token whose nearest neighbour is farthest; distance is 1 - cosine.

    x [B, N, C], k in [0, N];  returns [B, K] int64, in the order they were picked
    """
    width, budget = _budget(k, max_k, x)
    return _ops.select_diverse(x, width, budget, valid)


@torch.library.register_fake("restore_ext::select_diverse")
def _(x, k, budget, valid):
    return x.new_empty(x.shape[0], k, dtype=torch.int64)


def calibrated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    log_size: Tensor | None = None,
    query_position: Tensor | None = None,
    key_position: Tensor | None = None,
    decay: Tensor | None = None,
    causal: bool = True,
    key_range: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention that gives merged and distant keys their mass back (RESTORE, Eq. 4).

    logit = softcap(scale * q.k) + log_size[key] + log(2 - sum over g of decay[g, |dp_g|])

    query           [B, Hq, Lq, D], D in 32..256 in steps of 8
    key, value      [B, Hkv, Lk, D] in query's dtype; Hq is a multiple of Hkv, nothing is repeated
    log_size        [B, Lk] float32; -inf is padding, and what lies there is never read
    query_position  [B, Lq] or [B, G, Lq] int32; both positions, or neither: then the index counts,
    key_position    [B, Lk] or [B, G, Lk] int32    bottom-right aligned as under `causal`; without
                    G the position is the same on every axis
    decay           [P] or [G, P] float32, see rope_decay; a distance beyond it uses its last entry
    causal          by index: query i sees keys up to i + Lk - Lq
    key_range       [B, Lq, 2] int32, first and past-last visible key; intersected with `causal`
    softcap         softcap * tanh(logit / softcap) if > 0, as Gemma 2 does
    scale           1 / sqrt(D) by default

    returns  [B, Hq, Lq, D] in query's dtype; with return_lse also the log-sum-exp of the logits
             [B, Hq, Lq] float32. A query that sees nothing gives zeros and -inf, one that sees
             a NaN logit gives NaN.
    """
    out, lse = _ops.calibrated_attention(
        query,
        key,
        value,
        log_size,
        query_position,
        key_position,
        decay,
        causal,
        key_range,
        softcap,
        scale,
    )
    return (out, lse) if return_lse else out


@torch.library.register_fake("restore_ext::calibrated_attention")
def _(query, key, value, log_size, query_position, key_position, decay, causal, key_range, *_):
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


def calibrated_attention_paged(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seqlens: Tensor,
    *,
    log_size: Tensor | None = None,
    query_position: Tensor | None = None,
    key_position: Tensor | None = None,
    decay: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`calibrated_attention` of each row's last Lq tokens to a cache in pages, the decoding step.

    The queries are the last Lq of a row's seqlens[b] tokens, and causal: query i sees the tokens
    before index seqlens[b] - Lq + i + 1.

    query                   [B, Hq, Lq, D], D in 32..256 in steps of 8
    key_cache, value_cache  [pages, page, Hkv, D] in query's dtype, page in 16..256; a cache in the
                            order [pages, Hkv, page, D] comes as its transpose(1, 2)
    block_table             [B, max_pages] int32, the row's pages in order; one outside [0, pages)
                            is a page of tokens that are not seen, nothing is read
    seqlens                 [B] int32, tokens of the row, these queries' own included; clipped to
                            [0, max_pages * page], what exists
    log_size                [pages, page] float32; -inf is padding, what lies there is never read
    query_position          [B, Lq] or [B, G, Lq] int32; both positions, or neither: then the index
    key_position            [pages, page] or [G, pages, page] int32    in the row counts
    decay, softcap, scale   as in calibrated_attention

    returns  [B, Hq, Lq, D] in query's dtype; with return_lse also the log-sum-exp of the logits
             [B, Hq, Lq] float32. A query that sees nothing gives zeros and -inf, one that sees
             a NaN logit gives NaN.
    """
    out, lse = _ops.calibrated_attention_paged(
        query,
        key_cache,
        value_cache,
        block_table,
        seqlens,
        log_size,
        query_position,
        key_position,
        decay,
        softcap,
        scale,
    )
    return (out, lse) if return_lse else out


@torch.library.register_fake("restore_ext::calibrated_attention_paged")
def _(query, *_):
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


def row_scores(
    query: Tensor,
    key: Tensor,
    *,
    weight: Tensor | None = None,
    log_size: Tensor | None = None,
    query_position: Tensor | None = None,
    key_position: Tensor | None = None,
    decay: Tensor | None = None,
    key_range: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """What some rows of queries attend to: the mean over heads of their attention, summed by key.

    score[k] = sum over rows r of weight[r] * mean over heads of softmax_k(logit[r, k]), with the
    logit of `calibrated_attention`. One row is the last prompt token (FastV, arXiv 2403.06764) or a
    class token, a few are text raters (SparseVLM, arXiv 2410.04417), all under a causal key_range
    are the mean attention that a key receives. No attention matrix is stored, however many rows:
    the log-sum-exp of every row comes first, then the logits once more, column by column.

    query           [B, Hq, R, D], D in 32..256 in steps of 8
    key             [B, Hkv, K, D] in query's dtype; Hq is a multiple of Hkv and not 0
    weight          [B, R] float32, what a row counts for; 1 / R each by default. A row of weight 0
                    is left out, even if there is NaN in it
    log_size        [B, K] float32; -inf is padding, and what lies there is never read
    query_position  [B, R] or [B, G, R] int32; both positions, or neither: then the index counts and
    key_position    [B, K] or [B, G, K] int32    the rows are the last R; without G the position is
                    the same on every axis
    decay           [P] or [G, P] float32, see rope_decay; a distance beyond it uses its last entry
    key_range       [B, R, 2] int32, first and past-last key a row sees; all by default
    softcap, scale  as in calibrated_attention

    returns  [B, K] float32. A key that a row does not see gets 0 from it, a row that sees nothing
             adds nothing, one that sees a NaN logit (or +inf) gives NaN to every key that it sees.
    """
    return _ops.row_scores(
        query,
        key,
        weight,
        log_size,
        query_position,
        key_position,
        decay,
        key_range,
        softcap,
        scale,
    )


@torch.library.register_fake("restore_ext::row_scores")
def _(query, key, *_):
    return query.new_empty(key.shape[0], key.shape[2], dtype=torch.float32)


def _budget(k: int | Tensor, most: int | None, x: Tensor) -> tuple[int, Tensor | None]:
    """A budget as the schemas take it: the width of the output, and what each row may use of it."""
    if isinstance(k, Tensor):
        return (x.shape[1] if most is None else most), k
    return k, None


def _refuse_gradient(op: str, instead: str) -> None:
    def backward(*_):
        raise RuntimeError(f"{op} has no gradient: it is for inference; for training use {instead}")

    torch.library.register_autograd(f"restore_ext::{op}", backward)


_refuse_gradient("score_anchors", "restore_ext.reference.score_anchors")
_refuse_gradient("merge_tokens", "restore_ext.reference.merge_tokens")
_refuse_gradient("calibrated_attention", 'restore_ext.attach(..., backend="mask")')
_refuse_gradient("calibrated_attention_paged", 'restore_ext.attach(..., backend="mask")')
_refuse_gradient("row_scores", "restore_ext.reference.row_scores")
