"""What a reduction does to a model's attention, states and words, measured against the full run."""

from restore_ext.hf.diagnosis.layout import ImageTokens
from restore_ext.hf.diagnosis.result import Diagnosis, Run, Way, join
from restore_ext.hf.diagnosis.run import diagnose

__all__ = ["Diagnosis", "ImageTokens", "Run", "Way", "diagnose", "join"]
