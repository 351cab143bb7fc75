"""How the operators behave on a GPU, whatever they compute: streams, graphs, devices, repetition.

Without a GPU the same lines run on the CPU, where bench/clock.py has a stand-in for each of these.
"""

import pytest
import torch

from bench import clock
from bench.gpu.problems import BY_KERNEL, PROBLEMS, changed
from restore_ext import testing

# On a GPU of the newest kind, what it would not choose; no GPU, no other kernel.
OTHERS = [p for p in BY_KERNEL if p.kernel == "prefill" and torch.cuda.is_available()]
pytestmark = [
    pytest.mark.parametrize("device", testing.DEVICES),
    pytest.mark.parametrize("problem", [*PROBLEMS, *OTHERS], ids=str),
]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def copy_into(static, given):
    """New values where the operator, or a graph of it, reads."""
    for name, t in given.items():
        if isinstance(t, torch.Tensor):
            static[name].copy_(t)


def empty_like(given):
    """Other memory, with other values in it."""
    return {k: t.clone() if isinstance(t, torch.Tensor) else t for k, t in changed(given).items()}


def test_works_on_the_current_stream(problem, device):
    """Its inputs come late, on a side stream: work on any other stream would not wait for them."""
    given = problem.arguments(device)
    expected = problem.call(given)
    static = empty_like(given)
    with clock.side_stream(device):
        clock.keep_busy(device)
        copy_into(static, given)
        got = problem.call(static)
        kept = [t.clone() for t in clock.tensors(got)]
    testing.assert_same_bits(got, expected)
    testing.assert_same_bits(kept, clock.tensors(expected))  # what follows it waits for it, too


def test_a_captured_graph_reads_its_inputs_anew(problem, device):
    given = problem.arguments(device)
    other = changed(given)
    expected, expected_of_other = problem.call(given), problem.call(other)
    with pytest.raises(AssertionError):
        testing.assert_same_bits(expected_of_other, expected)  # or the rest would show nothing
    static = empty_like(given)
    replay, result = clock.capture(lambda: problem.call(static), device)
    for values, wanted in ((given, expected), (other, expected_of_other), (given, expected)):
        copy_into(static, values)
        for t in clock.tensors(result):
            t.fill_(testing.poison(t.dtype))
        replay()
        clock.synchronize(device)
        testing.assert_same_bits(result, wanted)
    replay()  # twice in a row, with nothing in between: what a launch leaves behind is cleared
    replay()
    clock.synchronize(device)
    testing.assert_same_bits(result, expected)


def test_same_bits_every_run(problem, device):
    given = problem.arguments(device)
    expected = problem.call(given)
    for _ in range(20):
        testing.assert_same_bits(problem.call(given), expected)


def test_writes_all_of_its_output(problem, device):
    """Torch hands out memory again as it was left: here, as NaN and as huge indices."""
    given = problem.arguments(device)
    expected = problem.call(given)
    for pattern in (0xFF, 0x7B):
        left = [
            torch.full((size,), pattern, dtype=torch.uint8, device=device)
            for size in (1 << 9, 1 << 12, 1 << 16, 1 << 20, 1 << 24)
            for _ in range(8)
        ]
        clock.synchronize(device)
        del left
        testing.assert_same_bits(problem.call(given), expected)


def test_never_waits_for_the_device(problem, device):
    given = problem.arguments(device)
    problem.call(given)
    with clock.no_host_sync(device):
        problem.call(given)


@on_gpu
def test_refuses_an_input_on_another_device(problem, device):
    if device == "cpu":
        pytest.skip("one device is needed, and another")
    given = problem.arguments(device)
    names = [k for k, t in given.items() if isinstance(t, torch.Tensor)]
    if len(names) < 2:
        pytest.skip("it has one tensor")
    for name in names:
        with pytest.raises(RuntimeError, match="must be on "):
            problem.call(given | {name: given[name].cpu()})
    clock.synchronize(device)  # and nothing was launched that would fail later
    problem.call(given)
    clock.synchronize(device)
