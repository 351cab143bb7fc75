"""The ranges that a profiler sees: recorded by a stand-in that NVTX loads as it would Nsight."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from restore_ext import _C, profiling

TOOLKIT = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "include"
RECORDER = """
#define NVTX_NO_IMPL
#include <nvtx3/nvToolsExt.h>
#include <cstdio>

static const char* names[64];
static nvtxDomainHandle_t create(const char* name) {
  std::printf("domain %s\\n", name);
  return reinterpret_cast<nvtxDomainHandle_t>(1);
}
static void name_category(nvtxDomainHandle_t, uint32_t number, const char* name) {
  names[number] = name;
}
static int push(nvtxDomainHandle_t, const nvtxEventAttributes_t* range) {
  const char* category = names[range->category];
  std::printf("push %s %s\\n", category ? category : "none", range->message.ascii);
  return 0;
}
static int pop(nvtxDomainHandle_t) {
  std::printf("pop\\n");
  return 0;
}

extern "C" int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get) {
  auto callbacks = static_cast<const NvtxExportTableCallbacks*>(get(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table = nullptr;
  unsigned size = 0;
  if (!callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size)) return 0;
  *table[NVTX_CBID_CORE2_DomainCreateA] = (NvtxFunctionPointer)create;
  *table[NVTX_CBID_CORE2_DomainNameCategoryA] = (NvtxFunctionPointer)name_category;
  *table[NVTX_CBID_CORE2_DomainRangePushEx] = (NvtxFunctionPointer)push;
  *table[NVTX_CBID_CORE2_DomainRangePop] = (NvtxFunctionPointer)pop;
  return 1;
}
"""
PROFILED = """
import torch
from restore_ext import ops, profiling

x = torch.randn(1, 12, 8)
with profiling.range("plan"):
    ops.score_anchors(x)
    anchors = ops.select_anchors(x, 3)
group = ops.assign_anchors(x, anchors)
ops.merge_tokens(x, group, 3)
ops.match_bipartite(x, 2)
ops.select_diverse(x, 2)
try:
    ops.merge_tokens(x, group, 0)
except RuntimeError:
    pass
q = torch.randn(1, 1, 4, 32)
ops.calibrated_attention(q, q, q)
with profiling.range("something else"):
    pass
"""
SEEN = """
domain restore_ext
push plan plan
push score score_anchors
pop
push select select_anchors
pop
pop
push match assign_anchors
pop
push merge merge_tokens
pop
push match match_bipartite
pop
push select select_diverse
pop
push merge merge_tokens
pop
push attend calibrated_attention
pop
push none something else
pop
"""


HOOKED = """
from hf_harness import attach, forward, fresh
from restore_ext.testing.models import make_inputs

model = fresh("llava")
with attach(model):
    forward(model, make_inputs("llava"))
"""


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    if not (TOOLKIT / "nvtx3").exists():
        pytest.skip("no NVTX headers here")
    folder = tmp_path_factory.mktemp("recorder")
    (folder / "recorder.cpp").write_text(RECORDER)
    library = folder / "librecorder.so"
    command = ["g++", "-shared", "-fPIC", f"-I{TOOLKIT}", str(folder / "recorder.cpp")]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library


def run(code, environment):
    paths = ":".join([str(Path(__file__).parent), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment | {"PYTHONPATH": paths},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_a_profiler_sees_every_operator_and_stage(recorder):
    seen = run(PROFILED, {"NVTX_INJECTION64_PATH": str(recorder)})
    assert seen.split("\n") == (SEEN.lstrip("\n").split("\n") if _C.nvtx else [""])


def test_without_a_profiler_nothing_happens():
    assert run(PROFILED, {"NVTX_INJECTION64_PATH": ""}) == ""


@pytest.mark.skipif(not _C.nvtx, reason="built without the CUDA toolkit's headers")
def test_a_profiler_sees_the_stages_of_the_hook(recorder):
    said = run(HOOKED, {"NVTX_INJECTION64_PATH": str(recorder)}).splitlines()
    names = [line.removeprefix("push ") for line in said if line.startswith("push")]
    stages = [name for name in names if name.endswith(("images", "sequence", "keys"))]
    assert stages == [
        "score score_images",
        "select select_images",
        "plan plan_sequence",
        "plan plan_keys",
    ]
    assert "merge merge_tokens" in names and names.count("attend calibrated_attention") == 4
    assert said.count("pop") == len(names)


def test_a_range_ends_with_its_block_and_hides_no_error():
    with pytest.raises(KeyError), profiling.range("plan"):
        raise KeyError
    with pytest.raises(TypeError):
        profiling.range(3).__enter__()


def test_a_stopwatch_counts_the_outermost_range_of_its_own_thread():
    now = iter(range(100))
    watch = profiling.stopwatch(clock=lambda: next(now))
    with watch:
        with profiling.range("plan_all"), profiling.range("score_some"):  # from 0 to 1
            assert watch.total() == 0, "it is not over yet"
        other = threading.Thread(target=profiling.range("plan_all")(lambda: None))
        other.start()
        other.join()
        assert next(now) == 2, "the clock was looked at for the outer range alone"
        with pytest.raises(KeyError), profiling.range("merge_none"):
            raise KeyError
        with profiling.range("plan_all"):
            pass
        assert watch.seconds() == {"plan_all": 2, "merge_none": 1} and watch.total() == 3
        watch.stop()
        with profiling.range("plan_all"):
            pass
    with profiling.range("plan_all"):
        pass
    assert watch.total() == 3 and next(now) == 7
