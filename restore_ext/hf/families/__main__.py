"""Prints docs/families.md: `python -m restore_ext.hf.families > docs/families.md`."""

from restore_ext.hf.families.catalogue import page

print(page())
