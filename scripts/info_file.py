"""What ``longtake info`` says of a file."""

import os
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from longtake.scripts.console import out


def print_file(path: Path) -> None:
    """Print what a checkpoint file is, without loading weights.

    Args:
        path: The file.

    Raises:
        ValueError: If it is no checkpoint; says what it is instead.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from longtake.models.checkpoints import describe_checkpoint

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for what, text in describe_checkpoint(path):
        table.add_row(what, escape(text))
    out.print(table)
