"""calibrated_attention in 16 bits, by each of its CUDA kernels; on the CPU by the one there is."""

import math

import pytest
import torch

from restore_ext import ops, testing
from restore_ext.testing.attention import (
    KERNEL_CASES,
    NEVER,
    AttentionCase,
    assert_within_twice_sdpa,
)

pytestmark = pytest.mark.parametrize("device", testing.DEVICES)
# The CUDA kernels by name, where there are such: of them each is forced in turn.
ON_CUDA = "cuda" in testing.DEVICES or ops._ops is not torch.ops.restore_ext
KERNELS = ["plain", "prefill", "hopper", "decode"] if ON_CUDA else [""]


@pytest.fixture(params=KERNELS)
def forced(request, monkeypatch):
    """Runs a problem on one kernel, if it takes it."""
    monkeypatch.setenv("RESTORE_EXT_ATTENTION", request.param)

    def run_forced(given):
        try:
            return ops.calibrated_attention(**given, return_lse=True)
        except RuntimeError as error:
            if "does not take this" not in str(error):
                raise
            pytest.skip(str(error))

    return run_forced


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_means_what_the_reference_says(case, dtype, forced, device):
    given = case.arguments(device, dtype)
    assert_within_twice_sdpa(forced(given), given)


def test_sees_nan_where_it_is_seen(forced, device):
    given = AttentionCase(Lq=100, Lk=100, D=64).arguments(device, torch.bfloat16)
    clean = forced(given)
    given["key"][0, 1, 70, 5] = math.nan
    given["query"][0, 2, 30, 0] = math.nan
    given["decay"][..., 300:] = math.nan
    out, lse = forced(given)
    broken = torch.zeros_like(lse, dtype=torch.bool)
    position = given["query_position"][0]
    broken[0, :, position - position[0] >= 300] = True
    broken[0, 1, 70:] = True
    broken[0, 2, 30] = True
    assert torch.equal(lse.isnan(), broken)
    assert torch.equal(out.isnan(), broken[..., None].expand_as(out))
    testing.assert_same_bits((out[~broken], lse[~broken]), (clean[0][~broken], clean[1][~broken]))


def test_gives_zero_where_nothing_is_seen(forced, device):
    case = AttentionCase(B=2, Hq=4, Hkv=2, Lq=150, Lk=150, D=64, padding=(66, 0))
    given = case.arguments(device, torch.bfloat16)
    given["query"][0, :, :66] = math.nan
    out, lse = forced(given)
    assert (out[0, :, :66] == 0).all() and (lse[0, :, :66] == NEVER).all()
    assert out.isfinite().all() and lse[0, :, 66:].isfinite().all()


def test_reads_no_key_before_or_past_what_is_seen(forced, device):
    case = AttentionCase(B=2, Hq=4, Hkv=2, Lq=9, Lk=250, D=64, causal=False)
    given = case.arguments(device, torch.bfloat16)
    short = given | {k: given[k][:, :, 20:181] for k in ("key", "value")}
    short |= {k: given[k][:, 20:181] for k in ("log_size", "key_position")}
    for name in ("key", "value"):
        given[name][:, :, :20] = math.nan
        given[name][:, :, 181:] = math.nan
    given["key_range"] = torch.tensor([20, 181], dtype=torch.int32, device=device).expand(2, 9, 2)
    assert_within_twice_sdpa(forced(given), short)


@pytest.mark.parametrize("ends", [True, False])
def test_counts_distances_past_2_to_the_31(ends, forced, device):
    case = AttentionCase(B=2, Hq=4, Hkv=2, Lq=90, Lk=130, D=64, P=64, causal=False)
    given = case.arguments(device, torch.bfloat16)
    far = torch.tensor([-(2**31), 2**31 - 1, -1, 3, 2**31 - 4, -(2**31) + 9], dtype=torch.int32)
    for name, L in (("query_position", 90), ("key_position", 130)):
        # Without the ends it is a run whose first position, were there a key, would wrap around.
        near = torch.arange(-40, L - 40, dtype=torch.int32).clamp(min=0) - 2**31 + 5
        given[name] = torch.cat([far.repeat(12)[:70], near[70:]]) if ends else near
        given[name] = given[name].expand(2, -1).to(device)
    given["log_size"][:, :40] = NEVER
    wide = given | {n: given[n].long() for n in ("query_position", "key_position")}
    assert_within_twice_sdpa(forced(given), wide)


def test_keys_and_values_may_lie_differently(forced, device):
    case = AttentionCase(B=2, Hq=4, Hkv=2, Lq=70, Lk=140, D=64)
    given = case.arguments(device, torch.bfloat16)
    across = given["value"].transpose(1, 2).contiguous().transpose(1, 2)
    testing.assert_same_bits(forced(given | {"value": across}), forced(given))


def test_reads_positions_with_and_without_axes(forced, device):
    case = AttentionCase(B=2, Hq=4, Hkv=2, Lq=90, Lk=150, D=64, axes=3, P=64, positions="mrope")
    given = case.arguments(device, torch.bfloat16)
    given["query_position"] = given["query_position"][:, 0]
    wide = given | {"query_position": given["query_position"][:, None].expand(-1, 3, -1)}
    testing.assert_same_bits(forced(given), forced(wide))
    assert_within_twice_sdpa(forced(given), given)


@pytest.mark.skipif(not ON_CUDA, reason="of the CUDA kernels")
def test_a_decoding_step_copies_no_cache(device):
    """Not one that begins off 16 bytes either, which the tensor cores do not take."""
    given = AttentionCase(B=2, Hq=4, Hkv=2, Lq=1, Lk=300, D=64).arguments(device, torch.bfloat16)
    off = {n: torch.nn.functional.pad(given[n], (1, 0))[..., 1:] for n in ("key", "value")}
    assert all(t.data_ptr() % 16 for t in off.values())
    with torch.profiler.profile() as seen:
        got = ops.calibrated_attention(**given | off, return_lse=True)
    assert "aten::copy_" not in {event.name for event in seen.events()}
    assert_within_twice_sdpa(got, given)


@pytest.mark.parametrize("view", testing.VIEWS)
def test_reads_nothing_outside_a_view(view, forced, device):
    case = AttentionCase(B=2, Hq=4, Hkv=2, Lq=70, Lk=140, D=64, padding=(0, 31), ranges="window")
    given = case.arguments(device, torch.bfloat16)
    testing.assert_same_bits(forced(testing.view_all(view, given)), forced(given))


def test_gives_the_same_bits_every_run(forced, device):
    case = AttentionCase(
        B=2, Hq=4, Hkv=2, Lq=70, Lk=140, D=64, padding=(0, 31), axes=3, P=64, ranges="window"
    )
    given = case.arguments(device, torch.bfloat16)
    testing.assert_same_bits_every_run(lambda: forced(given))
