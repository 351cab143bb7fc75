"""Before transformers 5.3 generate() makes up its own positions: prepare_inputs() has to refuse."""

import pytest
import torch
from hf_harness import each_family, fingerprint, forward, fresh, stock

import restore_ext
from restore_ext.hf import compat
from restore_ext.testing.models import make_inputs

# Also where it is named, which takes it in though conftest.py ignores it.
pytestmark = pytest.mark.skipif(compat.GENERATE_CARRIES_POSITIONS, reason="of before 5.3")


@each_family
def test_it_names_the_version_it_needs_and_the_other_way(family):
    model, inputs = fresh(family), make_inputs(family)
    before = fingerprint(model)
    with pytest.raises((RuntimeError, ImportError, NotImplementedError)) as caught:
        restore_ext.prepare_inputs(model, **inputs, keep=5)
    for word in ("transformers", "5.3", "attach"):
        assert word in str(caught.value)
    assert fingerprint(model) == before
    assert torch.equal(forward(model, inputs), forward(stock(family), inputs))
