"""What is left of a picture's tokens, and which of the old ones each new one stands for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from restore_ext import ops
from restore_ext.checks import require_device, require_features, require_per_token
from restore_ext.rows import ranks, rename, take


@dataclass(frozen=True)
class Reduction:
    """B images of N tokens reduced to at most M each, in rising position.

    Rows are padded on the right to the largest budget of the batch. Every token that is not padding
    is either `kept` or `merged`. As long as nothing is dropped, the sizes of a row sum to the sizes
    of its valid inputs. A kept token has its input's bits.
    """

    tokens: Tensor  # [B, M, C] in the features' dtype; zeros where padded
    size: Tensor  # [B, M] float32, how many original tokens each stands for; 0 where padded
    position: Tensor  # [B, M] int64, input index of the lower median member; -1 where padded
    group: Tensor  # [B, N] int64, the output token each input joined; -1 if dropped or not valid
    kept: Tensor  # [B, M] bool, one input, passed through untouched
    merged: Tensor  # [B, M] bool, a cluster, of one member or more

    @property
    def valid(self) -> Tensor:
        """[B, M] bool, False where padded."""
        return self.position >= 0

    def merge(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        """Reduces another tensor by the same groups: the size-weighted mean of every group.

        x     [B, N, C2] float32, bfloat16 or float16, any C2: keys, features of another layer, ...
        size  [B, N] float32, what each input counts for; ones by default. Pass the `size` that
              `reduce_tokens` was given to weigh as it did.

        returns  [B, M, C2] in x's dtype, zeros where padded; rounded once. Where x needs a gradient
                 it has one (plain torch, the same bits on every run); otherwise this is the
                 `merge_tokens` operator.
        raises   TypeError, ValueError: x or size of another dtype, shape or device
        """
        require_features("x", x, self.group.shape)
        require_device("x", x, self.group)
        if size is not None:
            require_per_token("size", size, self.group, torch.float32)
        return merge_groups(x, self.group, self.position.shape[1], size)[0]

    def compose(self, later: "Reduction") -> "Reduction":
        """This reduction, then `later`, which reduced this one's tokens: one from N to later's M.

        The group maps are chained, a size is the sum over the tokens of this reduction that joined,
        and a position is the lower median over all ORIGINAL members, which a median of medians need
        not be. Where that changes the order, later's tokens are put in order again. Kept is what
        both kept. `later` must have been run with `valid=self.valid` if a row here is padded.

        raises   ValueError: later's inputs are not the [B, M] tokens here, or (seen on CPU only)
                 padding is among its members
        """
        wanted, got = list(self.position.shape), list(later.group.shape)
        if wanted != got:
            raise ValueError(f"later must reduce [B, M] = {wanted} tokens, got a map of {got}")
        if not later.group.is_cuda and (~self.valid & (later.group >= 0)).any():
            raise ValueError(
                "later must leave out padded tokens (valid=...), got some in its groups"
            )
        M = later.position.shape[1]
        group = rename(self.group, later.group)

        def join(groups: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            nothing = torch.zeros(*groups.shape, 1, device=groups.device)
            return merge_groups(nothing, groups, M, size)

        _, size, _ = join(later.group, self.size)
        _, _, position = join(group, None)
        kept = later.kept & take(self.kept, later.position.clamp(min=0))
        return _in_order(later.tokens, size, position, group, kept)

    @staticmethod
    def untouched(features: Tensor, size: Tensor) -> "Reduction":
        """Every token kept: features [B, N, C] themselves, with size [B, N]."""
        B, N, _ = features.shape
        index = torch.arange(N, device=features.device).repeat(B, 1)
        kept = torch.ones_like(index, dtype=torch.bool)
        return Reduction(features, size, index, index.clone(), kept, ~kept)

    @staticmethod
    def of_groups(
        features: Tensor, group: Tensor, num_groups: int, size: Tensor, kept: Tensor
    ) -> "Reduction":
        """Merges features [B, N, C] by group [B, N]; a kept one has one member, an empty one is
        padding."""
        tokens, merged_size, position = merge_groups(features, group, num_groups, size)
        # w * x / w is not always x; what is kept is not computed.
        tokens = torch.where(kept[..., None], take(features, position.clamp(min=0)), tokens)
        return _in_order(tokens, merged_size, position, group, kept)

    @staticmethod
    def of_tokens(tokens: Tensor, group: Tensor) -> "Reduction":
        """Tokens [B, M, C] made elsewhere of what group [B, N] joins, none of them empty."""
        nothing = torch.zeros(*group.shape, 1, device=group.device)
        _, size, position = merge_groups(nothing, group, tokens.shape[1], None)
        return _in_order(
            tokens, size, position, group, torch.zeros_like(position, dtype=torch.bool)
        )


def merge_groups(
    x: Tensor, group: Tensor, num_groups: int, size: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.merge_tokens`, and where a gradient is wanted the same in plain torch."""
    if num_groups == 0:  # no token anywhere in the batch
        none = group[:, :0]
        return x[:, :0], none.float(), none
    if not (torch.is_grad_enabled() and x.requires_grad):
        return ops.merge_tokens(x, group, num_groups, size=size)
    _, merged_size, position = ops.merge_tokens(x.detach()[..., :1], group, num_groups, size=size)
    B, N, C = x.shape
    member = (group >= 0) & (group < num_groups)
    column = torch.where(member, group, num_groups)  # the last column collects what is left out
    total = torch.cat([merged_size, merged_size.new_ones(B, 1)], 1).gather(1, column)
    share = (torch.ones_like(total) if size is None else size.detach()) / total
    row = torch.arange(B, device=x.device)[:, None].expand(B, N)
    # index_put sums a group in a fixed order on every device; index_add does not on CUDA.
    merged = torch.zeros(B, num_groups + 1, C, device=x.device).index_put(
        (row, column), x.float() * share[..., None], accumulate=True
    )
    return merged[:, :num_groups].to(x.dtype), merged_size, position


def _in_order(
    tokens: Tensor, size: Tensor, position: Tensor, group: Tensor, kept: Tensor
) -> Reduction:
    """Puts the output tokens in rising position, padding last, and renames the groups to match."""
    order = torch.where(position < 0, group.shape[1], position).argsort(dim=1, stable=True)
    position, kept = take(position, order), take(kept, order)
    tokens, size, group = take(tokens, order), take(size, order), rename(group, ranks(order))
    return Reduction(tokens, size, position, group, kept, (position >= 0) & ~kept)
