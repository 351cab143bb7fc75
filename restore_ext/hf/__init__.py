"""RESTORE for transformers: attach() to a model, or prepare_inputs() for stock generate()."""

from restore_ext.hf import compat  # noqa: F401  first: it says what is missing
from restore_ext.hf.diagnosis import Diagnosis, diagnose
from restore_ext.hf.families import list_families
from restore_ext.hf.handle import Handle, attach
from restore_ext.hf.inputs import PreparedInputs, prepare_inputs
from restore_ext.hf.plan import SequencePlan
from restore_ext.hf.report import ImageReport, LayerReport, Report, StageReport
from restore_ext.hf.withdrawal import find_withdrawal_layer

__all__ = [
    "Diagnosis",
    "Handle",
    "ImageReport",
    "LayerReport",
    "PreparedInputs",
    "Report",
    "SequencePlan",
    "StageReport",
    "attach",
    "diagnose",
    "find_withdrawal_layer",
    "list_families",
    "prepare_inputs",
]
