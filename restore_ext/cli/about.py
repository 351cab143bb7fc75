"""`restore-ext methods` and `restore-ext config`: what there is."""

import argparse

from restore_ext.config import show_config
from restore_ext.methods import cards
from restore_ext.methods.catalogue import as_text


def methods(arguments: argparse.Namespace) -> None:
    """Prints the table of methods."""
    print(as_text(cards()))


def config(arguments: argparse.Namespace) -> None:
    """Prints the facts about this build."""
    show_config()
