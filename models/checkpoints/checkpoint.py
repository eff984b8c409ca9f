"""What a checkpoint holds: entries of named tensors, known by shape and dtype, read one by one."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

FLAT = ""  # name of the entry of a file whose tensors lie at its top
# Which entry is meant when nobody says it: the averaged weights first, as the families' own scripts do.
ENTRY_ORDER = ("generator_ema", "generator", "model", "state_dict", FLAT)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor's shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_elements(self) -> int:
        """Numbers in it."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of its numbers."""
        return self.num_elements * self.dtype.itemsize


class Checkpoint(ABC):
    """An opened checkpoint; ``open_checkpoint`` makes one.

    Attributes:
        path: File or folder, as it was named.
        folder: Where a ``config.json`` that belongs to it would lie.
        files: What was opened.
        container: ``safetensors`` or ``pickle``, for messages.
        entries: Entry name to {tensor name: info}; the entry of tensors at the top is ``FLAT``.
        others: Names of what is neither a tensor nor an entry: step counters, settings.
    """

    def __init__(
        self,
        path: Path,
        *,
        files: Sequence[Path],
        container: str,
        entries: Mapping[str, Mapping[str, TensorInfo]],
        others: Iterable[str] = (),
    ) -> None:
        self.path = path
        self.folder = files[0].parent
        self.files = tuple(files)
        self.container = container
        self.entries = dict(entries)
        self.others = list(others)

    @property
    def num_bytes(self) -> int:
        """Bytes of its files."""
        return sum(file.stat().st_size for file in self.files)

    @abstractmethod
    def read(self, entry: str, name: str) -> Tensor:
        """Read one tensor.

        Args:
            entry: A key of ``entries``.
            name: A key of that entry.

        Returns:
            The tensor on the CPU, perhaps a view of the file: not to be written to.

        Raises:
            ValueError: If the file ends before it.
        """


def entry_title(entry: str) -> str:
    """Name an entry for people."""
    return entry or "(no entry: tensors at the top)"


def _list_entries(checkpoint: Checkpoint) -> str:
    """Name a checkpoint's entries with their numbers of tensors, for messages."""
    return ", ".join(f"{entry_title(entry)}: {len(found)}" for entry, found in checkpoint.entries.items())


def choose_entry(checkpoint: Checkpoint, key: str | None = None, *, order: Sequence[str] = ENTRY_ORDER) -> str:
    """Find the entry that is meant.

    Args:
        checkpoint: Opened.
        key: The entry asked for; by ``order`` when None.
        order: Names that are taken unasked, best first; the last part of a nested name counts.

    Returns:
        A key of ``checkpoint.entries``.

    Raises:
        ValueError: If it is not there; lists those there are.
    """
    if key is not None:
        if key in checkpoint.entries:
            return key
        raise ValueError(f"'{checkpoint.path}' has no entry {key!r}; it holds {_list_entries(checkpoint)}.")
    for wanted in order:
        for entry in checkpoint.entries:
            if entry == wanted or (wanted and entry.rpartition(".")[2] == wanted):
                return entry
    raise ValueError(
        f"'{checkpoint.path}' holds {_list_entries(checkpoint)}, none of which is taken unasked: name the one that is "
        "meant with key (--key)."
    )
