"""vLLM on the CPU, in this process, with one thread (make test-vllm)."""

import os

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}

import pytest
from engines import Engines, tiny_qwen

from restore_ext.pocket import load_pocket


@pytest.fixture(scope="session")
def pocket():
    """(model, processor) under transformers."""
    return load_pocket()


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """(model, processor, folder) of a random Qwen2.5-VL under transformers."""
    return tiny_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def engines():
    return Engines()
