"""How many visual tokens every layer needs: a search over schedules (arXiv 2412.00556)."""

from restore_ext.search.cost import Shape, flops, kv_bytes
from restore_ext.search.find import find_schedule
from restore_ext.search.found import Found
from restore_ext.search.score import exact_match, first_token, log_likelihood

__all__ = [
    "Found",
    "Shape",
    "exact_match",
    "find_schedule",
    "first_token",
    "flops",
    "kv_bytes",
    "log_likelihood",
]
