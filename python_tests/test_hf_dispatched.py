"""A model that accelerate has dispatched: its hooks bring parameters from disk, and move what
modules are given."""

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from hf_harness import answers, beam_rows, fingerprint, forward, generate, logits

import restore_ext
from restore_ext.hf.parallel import devices
from restore_ext.testing.models import RAGGED, VERSION, make_inputs, tiny_model

TOWERS = {
    "llava": ("vision_tower", "multi_modal_projector"),
    "qwen2_5_vl": ("visual",),
}
METHODS = {
    "vispruner": {"method": "vispruner", "keep_ratio": 0.3},
    "fastv": {"method": "fastv", "keep": 5},
    "two cuts": {"method": "pyramiddrop", "backend": "mask"},
    "chain": {"method": "divprune", "keep": 9, "schedule": {"method": "sparsevlm"}},
    "drop all": {"method": "vtw"},
}


@pytest.fixture(scope="module", params=TOWERS)
def dispatched(request, tmp_path_factory):
    """A model of whose parts some are on disk, and the same in one piece."""
    family, folder = request.param, tmp_path_factory.mktemp("parts")
    whole = tiny_model(family)
    whole.save_pretrained(folder)
    tower, *others = (f"model.{part}" for part in TOWERS[family])
    language = "model.language_model"
    places = {tower: "disk", **dict.fromkeys(others, "cpu"), "lm_head": "cpu"}
    places |= {f"{language}.{part}": "cpu" for part in ("embed_tokens", "norm", "rotary_emb")}
    places |= {f"{language}.layers.{i}": "disk" if i in (1, 2) else "cpu" for i in range(4)}
    options = {"device_map": places, "offload_folder": str(folder / "offloaded")}
    model = type(whole).from_pretrained(folder, **options)
    assert next(model.model.language_model.layers[2].parameters()).device.type == "meta"
    return family, model, whole


@pytest.mark.parametrize("method", METHODS)
def test_it_says_what_it_says_in_one_piece(dispatched, method, recwarn):
    family, model, whole = dispatched
    inputs = make_inputs(family, RAGGED)
    said = []
    for one in (model, whole):
        with restore_ext.attach(one, **METHODS[method]) as handle:
            said.append((generate(one, inputs, max_new_tokens=2), forward(one, inputs)))
            assert handle.settings.backend == METHODS[method].get("backend", "op")
    for (got, logit), (want, wanted) in [said]:
        assert torch.equal(answers(got, inputs), answers(want, inputs))
        assert torch.equal(logits(got), logits(want)) and torch.equal(logit, wanted)
    assert not [w for w in recwarn if "falls back" in str(w.message)]


def test_beams_and_prepared_inputs_do_too(dispatched):
    family, model, whole = dispatched
    inputs = make_inputs(family, beam_rows(family))
    said = []
    for one in (model, whole):
        with restore_ext.attach(one, keep_ratio=0.3):
            beams = generate(one, inputs, num_beams=2, max_new_tokens=3, output_scores=True)
        said.append([beams.sequences, beams.sequences_scores])
        if VERSION >= (5, 3):
            prepared = restore_ext.prepare_inputs(one, **inputs, keep_ratio=0.3)
            with prepared:
                said[-1].append(logits(generate(one, prepared, max_new_tokens=3)))
    assert all(map(torch.equal, *said))


def test_detached_it_is_what_it_was(dispatched):
    family, model, _ = dispatched
    inputs = make_inputs(family, RAGGED)
    want = forward(model, inputs)
    before, skipped = fingerprint(model), model._hf_hook.skip_keys
    with restore_ext.attach(model, keep_ratio=0.3) as handle:
        assert model._hf_hook.skip_keys != skipped
        assert copy.copy(model._hf_hook).skip_keys is skipped
        handle.enabled = False
        assert torch.equal(forward(model, inputs), want)
    assert fingerprint(model) == before and model._hf_hook.skip_keys is skipped
    assert torch.equal(forward(model, inputs), want)


def test_it_runs_where_its_parameters_are_brought_to():
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta")])
    offloaded = AlignDevicesHook(execution_device="cuda:1", offload=True)
    model[1]._hf_hook = SequentialHook(AlignDevicesHook(execution_device="cuda:0"), offloaded)
    assert devices(model) == [torch.device("cpu"), torch.device("cuda:1")]
