"""A model on several devices says what it says on one: two processes that share its heads, and
accelerate's hooks, which bring parameters from disk."""

import multiprocessing
import os
import socket

import pytest
import torch
import torch.distributed as dist
from hf_harness import answers, assert_close, forward, generate, logits

import restore_ext
from restore_ext.hf.parallel import Heads
from restore_ext.testing.models import RAGGED, VERSION, make_inputs, tiny_model

FAMILIES = ("llava", "qwen2_5_vl")
RANKS = 2
METHODS = {
    "vispruner": {"method": "vispruner", "keep_ratio": 0.3},
    "fastv": {"method": "fastv", "keep": 5},
    "merge": {"method": "fastv", "keep": 5, "options": {"merge": True}},
    "lookahead": {"method": "pyramiddrop"},
    "raters": {"method": "sparsevlm", "keep": 9},
    "drop all": {"method": "vtw"},
    "chain": {"method": "holov", "keep": 11, "schedule": {"layers": [11, 11, 7, 2]}},
}
KINDS = [*((name, "op") for name in METHODS), ("vispruner", "mask"), ("chain", "mask")]
CASES = [(family, *kind) for family in FAMILIES for kind in KINDS]
each_case = pytest.mark.parametrize("case", CASES, ids="-".join)


def says(model, family: str, name: str, backend: str) -> dict:
    """What an attached model answers, and where its cuts are."""
    inputs = make_inputs(family, RAGGED)
    with restore_ext.attach(model, backend=backend, **METHODS[name]) as handle:
        out = generate(model, inputs, max_new_tokens=3)
    stages = handle.last.stages
    return {
        "tokens": answers(out, inputs),
        "logits": logits(out),
        "source": [handle.last.plan.source, *(stage.plan.source for stage in stages)],
        "layers": [(layer.tokens_after, layer.kv_bytes) for layer in handle.last.layers],
    }


def diagnosed(model, family: str) -> dict[str, dict[str, torch.Tensor]]:
    """What diagnose() measures of attention, with all tokens and with fewer."""
    found = restore_ext.diagnose(
        model, make_inputs(family, RAGGED), method="fastv", keep=5, new_tokens=1
    )
    runs = {"full": found.full, **found.ways}
    said = {f"{name} share": run.share for name, run in runs.items()}
    for name, run in runs.items():
        said[f"{name} attention"] = {kind: torch.cat(x, 1) for kind, x in run.attention.items()}
    return said | {f"{name} distance": found.distance(name) for name in found.ways}


def prepared(model, family: str) -> torch.Tensor:
    inputs = restore_ext.prepare_inputs(model, **make_inputs(family, RAGGED), keep_ratio=0.3)
    with inputs:
        return logits(generate(model, inputs, max_new_tokens=3))


def divided(cls, path: str):
    """A model whose heads are divided over the processes."""
    if VERSION < (5, 18):
        return cls.from_pretrained(path, tp_plan="auto")
    from transformers.distributed import DistributedConfig

    return cls.from_pretrained(path, distributed_config=DistributedConfig(tp_size=RANKS))


def work(rank: int, port: int, folder: str) -> None:
    """One of the processes: all cases, into a file."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    dist.init_process_group("gloo")
    uneven = Heads(3, dist.group.WORLD).mean(torch.full((2, 4), rank + 1.0), here=2 - rank)
    said: dict = {"mean": uneven}
    for family in FAMILIES:
        model = divided(type(tiny_model(family)), f"{folder}/{family}")
        with torch.no_grad():
            out = model(**make_inputs(family, RAGGED), use_cache=True)
        said[family, "stock"] = out.logits
        said[family, "heads"] = out.past_key_values.layers[0].keys.shape[1]
        said |= {case: says(model, *case) for case in CASES if case[0] == family}
        said[family, "diagnosed"] = diagnosed(model, family)
        if VERSION >= (5, 3):
            said[family, "prepared"] = prepared(model, family)
    torch.save(said, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict]:
    """What each of two processes says."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    for family in FAMILIES:
        tiny_model(family).save_pretrained(f"{folder}/{family}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A fork has all imports done, but cannot have CUDA, which transformers would take.
    fork = not torch.cuda.is_available()
    context = multiprocessing.get_context("fork" if fork else "spawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        ranks = [context.Process(target=work, args=(rank, port, folder)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
    for process in ranks:
        process.join(120)
    if [process.exitcode for process in ranks] != [0] * RANKS:
        for process in ranks:
            process.kill()
        pytest.fail(f"exit codes {[process.exitcode for process in ranks]}")
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(RANKS)]


@each_case
def test_two_processes_that_share_the_heads_say_what_one_does(both, case):
    want = says(tiny_model(case[0]), *case)
    for rank in both:
        got = rank[case]
        assert got["layers"] == want["layers"]
        assert all(map(torch.equal, got["source"], want["source"]))
        assert torch.equal(got["tokens"], want["tokens"])
        assert_close(got["logits"], want["logits"])
        assert torch.equal(got["logits"], both[0][case]["logits"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_heads_were_divided(both, family):
    model = tiny_model(family)
    for rank in both:
        heads = model.config.text_config.num_key_value_heads
        assert rank[family, "heads"] == heads // RANKS
        assert_close(rank[family, "stock"], forward(model, make_inputs(family, RAGGED)))
        if VERSION >= (5, 3):
            assert_close(rank[family, "prepared"], prepared(model, family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_diagnosis_is_of_all_heads_and_the_same_on_every_rank(both, family):
    want = diagnosed(tiny_model(family), family)
    assert {"full share", "original distance", "restore distance"} <= want.keys()
    for rank in both:
        got = rank[family, "diagnosed"]
        assert got.keys() == want.keys()
        for what, by_kind in want.items():
            for kind, values in by_kind.items():
                assert_close(got[what][kind], values)
                assert torch.equal(got[what][kind], both[0][family, "diagnosed"][what][kind])


def test_a_mean_over_uneven_shares_of_heads(both):
    for rank in both:
        assert_close(rank["mean"], torch.full((2, 4), (2 * 1 + 1 * 2) / 3))


def test_heads_on_unknown_ranks_are_refused_and_those_of_one_are_left_alone():
    scores, model = torch.rand(2, 5), tiny_model("llava")
    heads = Heads.of(model, model.model.language_model.layers[0].self_attn, 4)
    assert heads == Heads(4, None) and heads.mean(scores, 4) is scores
    with pytest.raises(NotImplementedError, match="2 of 4 heads"):
        heads.mean(scores, 2)


def test_a_vision_tower_whose_heads_are_elsewhere_cannot_be_read():
    model, inputs = tiny_model("llava"), make_inputs("llava")
    with restore_ext.attach(model, method="vispruner", keep=5):
        model.config.vision_config.num_attention_heads *= 2  # as if half of them were here
        with pytest.raises(NotImplementedError, match=r"vision tower.*got 2 of 4 heads here"):
            forward(model, inputs)
    with restore_ext.attach(model, method="divprune", keep=5) as handle:
        forward(model, inputs)
        assert handle.last.images
