"""A real reader of text lines, to see what token reduction costs where every stroke counts.

Its weights are those of the packages smart-kh-ocr and kiri-ocr, which are no dependency.
"""

from restore_ext.ocr.lines import Line, character_errors, draw
from restore_ext.ocr.reader import Encoded, Reader, load_reader

__all__ = ["Encoded", "Line", "Reader", "character_errors", "draw", "load_reader"]
