"""What is built for which GPU, and what runs there: the names of TORCH_CUDA_ARCH_LIST."""

import pytest
import torch

from restore_ext import _C, archs, checks


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("8.0+PTX 9.0a 10.0a 12.0", ["8.0+PTX", "9.0a", "10.0a", "12.0"]),
        ("8.0;9.0", ["8.0", "9.0a"]),
        ("8.0;8.6;9.0+PTX", ["8.0", "8.6", "9.0a+PTX"]),
        ("9.0,9.0a, 9.0+PTX", ["9.0a+PTX"]),
        ("8.0+PTX 8.0", ["8.0+PTX"]),
        ("10.0;12.0", ["10.0", "12.0"]),
        ("10.3a;12.0f", ["10.3a", "12.0f"]),
        ("5.2 7.5 8.0", ["8.0"]),
    ],
)
def test_what_a_list_asks_for(text, names):
    assert archs.wanted(text)[0] == names


def test_what_is_built_otherwise_than_asked_is_said():
    assert archs.wanted("8.0 9.0a")[1] == []
    assert archs.wanted("7.5 9.0+PTX")[1] == [
        "7.5 is left out: the kernels need 8.0 or newer",
        "9.0+PTX is built as 9.0a+PTX, which has the kernels for Hopper",
    ]


@pytest.mark.parametrize("text", ["Hopper", "90a", "8.0+ptx", "native", "8", "7.5", " "])
def test_a_list_that_names_nothing_to_build_for_is_refused(text):
    with pytest.raises(ValueError, match=r"^TORCH_CUDA_ARCH_LIST must name .*, got "):
        archs.wanted(text)


def test_what_nvcc_is_told():
    assert archs.gencode(["8.0", "9.0a+PTX", "12.0"]).split() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_90,code=compute_90",  # PTX for newer GPUs names no chip
    ]
    for names in (["8.0+PTX", "9.0a"], ["8.0+PTX"]):
        assert archs.gencode(names, ["90a"]) == "-gencode=arch=compute_90a,code=sm_90a"


@pytest.mark.parametrize(
    ("built", "on", "not_on"),
    [
        ("8.0", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("8.6+PTX", [(8, 6), (8, 9), (9, 0), (12, 0)], [(8, 0)]),
        ("9.0", [(9, 0)], [(8, 9), (10, 0)]),
        ("9.0a", [(9, 0)], [(8, 9), (10, 0)]),
        ("9.0a+PTX", [(9, 0), (10, 3)], [(8, 9)]),
        ("10.0", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("10.0a", [(10, 0)], [(10, 3)]),
        ("12.0f", [(12, 0), (12, 1)], [(10, 0)]),
    ],
)
def test_where_it_runs(built, on, not_on):
    assert all(archs.runs(built, gpu) for gpu in on)
    assert not any(archs.runs(built, gpu) for gpu in not_on)
    with pytest.raises(ValueError, match=r"^built must be an architecture"):
        archs.runs("", (8, 0))


@pytest.mark.parametrize(
    ("names", "capability", "reason"),
    [
        ("8.0+PTX 9.0a", (12, 1), None),
        ("8.0 9.0a", (8, 9), None),
        ("8.0 9.0a", (10, 0), "this build of restore_ext is for 8.0 9.0a, this GPU is 10.0"),
        ("9.0a", (8, 0), "this build of restore_ext is for 9.0a, this GPU is 8.0"),
        ("8.0+PTX", (7, 5), "the kernels need a GPU of compute capability 8.0 or newer, this .*"),
    ],
)
def test_a_gpu_that_runs_none_of_the_code_has_no_kernels(names, capability, reason, monkeypatch):
    monkeypatch.setattr(checks, "DEVICE_TYPES", ("cpu", "meta", "cuda"))
    monkeypatch.setattr(_C, "cuda_archs", names)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda")
    if reason is None:
        assert checks.why_no_kernels(gpu) is None
        return
    with pytest.raises(NotImplementedError, match=f"^x must be on the CPU: {reason}, got cuda$"):
        checks.require_kernels("x", gpu)
