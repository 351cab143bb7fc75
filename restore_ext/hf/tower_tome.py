"""ToMe in the blocks of a vision tower, between attention and MLP (arXiv 2210.09461, section 3).

A block computes h = x + attention(x), then h + mlp(norm(h)), in a forward that stays as it is. So h
is merged on its way into the norm, what the MLP says of a token is handed to all that were merged
into it, and the sum is merged in front of the next block: the mean of h + mlp' over a group is the
mean of h, plus the mlp' that all have in common. Attention and MLP run on few tokens, as in ToMe.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from restore_ext import profiling
from restore_ext.hf.attention import MASK_NEEDS, NamedConfig, stock_attention
from restore_ext.hf.images import for_operators
from restore_ext.hf.patches import Patches
from restore_ext.hf.settings import Settings
from restore_ext.hf.tower import watch_fewer_tokens
from restore_ext.hf.vision import Record, recorded
from restore_ext.methods.tome import join_pairs
from restore_ext.methods.tome_vit import pairs_per_block
from restore_ext.reduction import merge_groups

SIZED = "restore_ext_sized"


@dataclass
class Merging:
    """The tokens of a batch of pictures on their way through the tower, T of N at the moment."""

    pairs: list[int]  # to merge in each block
    class_token: bool  # the first token is none of the picture's, and is never merged
    size: Tensor  # [B, T] float32, how many each stands for
    group: Tensor  # [B, N] int64, the token that each has become part of
    keys: Tensor | None = None  # [B, T, D] of the block, mean over heads
    joined: Tensor | None = None  # [B, T before] int64, the last merge, while it is half done
    before: Tensor | None = None  # [B, T before], the sizes it had

    @property
    def length(self) -> int:
        """How many tokens the block's output has."""
        return (self.size if self.joined is None else self.joined).shape[1]

    @profiling.range("merge_patches")
    def begin(self, r: int, hidden: Tensor) -> Tensor:
        """Decides on r pairs of hidden [B, T, C], and merges it."""
        assert self.keys is not None
        joined = join_pairs(for_operators(self.keys), r, class_token=self.class_token)
        self.joined, self.before = joined.to(hidden.device), self.size
        merged, self.size = self._merged(hidden, hidden.shape[1] - r)
        self.group = self.joined.gather(1, self.group)
        return merged

    @profiling.range("merge_patches")
    def spread(self, merged: Tensor) -> Tensor:
        """What merged tokens [B, T, C] have, for each of those that were merged."""
        if self.joined is None:
            return merged
        return merged.gather(1, self.joined[..., None].expand(-1, -1, merged.shape[2]))

    @profiling.range("merge_patches")
    def finish(self, hidden: Tensor) -> Tensor:
        """Merges hidden [B, T before, C] as begin() did. The class token may be gone from it."""
        if self.joined is None:
            return hidden
        merged, _ = self._merged(hidden, self.size.shape[1])
        self.joined = self.before = None
        return merged

    def _merged(self, hidden: Tensor, left: int) -> tuple[Tensor, Tensor]:
        assert self.joined is not None and self.before is not None
        x = for_operators(hidden)
        gone = self.joined.shape[1] - x.shape[1]
        group, size = self.joined[:, gone:] - gone, self.before[:, gone:]
        merged, total, _ = merge_groups(x, group.to(x.device), left - gone, size.to(x.device))
        return merged.to(hidden), total.to(hidden.device)


def watch_blocks(
    patches: Patches,
    blocks: Sequence[Any],
    behind: nn.Module,
    projector: nn.Module,
    settings: Settings,
    class_token: bool,
) -> None:
    """Merges tokens in `blocks`, those in front of the features, and attends by size in them.

    behind       what the last block's tokens go through next: the projector, or a norm before it
    class_token  the first token is dropped before `behind`
    """
    for index, block in enumerate(blocks):
        sized_config = NamedConfig(block.self_attn.config, SIZED, settings)
        if (stock := sized_config.stock._attn_implementation) not in MASK_NEEDS:
            raise ValueError(
                f"method {settings.method} adds log(size) to the logits of the vision tower, whose "
                f"attention must be {' or '.join(MASK_NEEDS)} for that, got {stock!r}; call "
                "model.set_attn_implementation({'vision_config': 'sdpa'}) first"
            )
        patches.set(block.self_attn, "config", sized_config)
        _watch_block(patches, block, index, len(blocks), settings, class_token)

    def finish(_: nn.Module, args: tuple[Any, ...]) -> Any:
        record = recorded(settings)
        if record is None or record.merging is None:
            return None
        merging: Merging = record.merging
        dropped = int(merging.class_token)
        wanted, got = merging.length - dropped, args[0].shape[1]
        if got != wanted:
            raise NotImplementedError(
                f"method {settings.method} needs the features of the layer and by the strategy in "
                f"model.config, got {got} features instead of {wanted}"
            )
        features = merging.finish(args[0])
        record.joined, record.left = merging.group[:, dropped:] - dropped, features.shape[1]
        record.merging = None
        return (features, *args[1:])

    patches.hook(behind, "forward_pre_hook", finish)
    watch_fewer_tokens(patches, projector, settings)


def require_budget(tower: Any, blocks: int, settings: Settings, class_token: bool) -> None:
    """Raises for a budget that so many blocks cannot get down to, where `tower` says how many
    tokens a picture has."""
    tokens = next((m.num_positions for m in tower.modules() if hasattr(m, "num_positions")), None)
    if tokens is not None:
        tokens -= class_token
        (budget,) = settings.budgets([tokens], [0], [0])
        pairs_per_block(tokens, min(budget, tokens), blocks)


def _watch_block(
    patches: Patches, block: Any, index: int, blocks: int, settings: Settings, class_token: bool
) -> None:
    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (record := recorded(settings)) is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if index == 0:
            _start(record, hidden, blocks, class_token)
        if record.merging is None:
            return None
        _require_no_recomputing(block, hidden, settings)
        hidden = record.merging.finish(hidden)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def halfway(_: nn.Module, args: tuple[Any, ...]) -> Any:
        record = recorded(settings)
        if record is None or record.merging is None or not record.merging.pairs[index]:
            return None
        return (record.merging.begin(record.merging.pairs[index], args[0]), *args[1:])

    def spread(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        record = recorded(settings)
        return None if record is None or record.merging is None else record.merging.spread(output)

    patches.hook(block, "forward_pre_hook", enter, with_kwargs=True)
    patches.hook(block.layer_norm2, "forward_pre_hook", halfway)
    patches.hook(block.mlp, "forward_hook", spread)


def _require_no_recomputing(block: Any, hidden: Tensor, settings: Settings) -> None:
    """Backward would compute the block anew, when what was merged is forgotten."""
    differentiates = hidden.requires_grad or any(p.requires_grad for p in block.parameters())
    if block.training and getattr(block, "gradient_checkpointing", False) and differentiates:
        raise NotImplementedError(
            f"method {settings.method} needs a vision tower without gradient checkpointing, for "
            "backward would compute its blocks anew on all tokens: call gradient_checkpointing_"
            "disable() on the tower"
        )


def _start(record: Record, hidden: Tensor, blocks: int, class_token: bool) -> None:
    B, N, _ = hidden.shape
    (budget,) = record.settings.budgets([N - class_token], [0], [0])
    record.merging = None
    if budget < N - class_token:
        record.merging = Merging(
            pairs_per_block(N - class_token, budget, blocks),
            class_token,
            torch.ones(B, N, device=hidden.device),
            torch.arange(N, device=hidden.device).expand(B, N),
        )


def sized(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Any:
    """The registered attention: keys count by size, and are remembered; stock where nothing is to
    be merged."""
    record = recorded(module.config.state)
    if record is not None and record.merging is not None:
        merging: Merging = record.merging
        merging.keys = key.detach().float().mean(1)
        bias = merging.size.log().to(query.dtype)[:, None, None]
        mask = bias if mask is None else mask + bias
    return stock_attention(module, query, key, value, mask, **kwargs)


AttentionInterface.register(SIZED, sized)
