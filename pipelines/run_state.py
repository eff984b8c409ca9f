"""Saved states of a run: what is needed to go on from a block, and which of them are kept."""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longtake.pipelines.run_files import with_temporary

METADATA_KEY = "longtake"


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """A run between two blocks.

    Attributes:
        next_block: Index of the block that comes next; 0 right behind what the video goes on from.
        num_frames: Pixel frames in the file so far.
        num_changes: Prompt changes that have taken effect.
        tensors: First value of the session's ``state_dict``.
        numbers: Second value of the session's ``state_dict``.
    """

    next_block: int
    num_frames: int
    num_changes: int
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]


class StateFolder:
    """``states/NNNNNN.safetensors``, named by the next block; the newest is also the run's ``state.safetensors``."""

    def __init__(self, folder: Path, *, newest: Path, num_kept: int) -> None:
        """Name the places.

        Args:
            folder: ``states``; made when the first state is saved.
            newest: ``state.safetensors``.
            num_kept: States to keep.
        """
        self.folder = folder
        self.newest = newest
        self.num_kept = num_kept

    def blocks(self) -> list[int]:
        """List the saved states by their next block, rising."""
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.safetensors"))

    def path(self, next_block: int) -> Path:
        """Return where the state before a block is."""
        return self.folder / f"{next_block:06d}.safetensors"

    def save(self, state: SavedState) -> None:
        """Write a state atomically, then drop the most crowded of the older ones.

        Args:
            state: The run between two blocks.

        Raises:
            OSError: If it cannot be written; earlier states are untouched.
        """
        self.folder.mkdir(exist_ok=True)
        values = {key: value for key, value in vars(state).items() if key != "tensors"}
        metadata = {METADATA_KEY: json.dumps(values)}
        tensors = {key: _own_memory(tensor) for key, tensor in state.tensors.items()}
        path = self.path(state.next_block)
        with_temporary(path, lambda temporary: _save(tensors, temporary, metadata))
        with_temporary(self.newest, lambda temporary: _link(path, temporary))
        for block in crowded(self.blocks(), num_kept=self.num_kept):
            self.path(block).unlink(missing_ok=True)

    def load(self, next_block: int) -> SavedState:
        """Read a state.

        Args:
            next_block: One of ``blocks()``.

        Raises:
            ValueError: If the file is no state of a run.
        """
        return load_state(self.path(next_block))


def load_state(path: Path) -> SavedState:
    """Read one state file.

    Args:
        path: The file.

    Raises:
        ValueError: If the file is no state of a run.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        values = json.loads(metadata[METADATA_KEY])
        return SavedState(tensors=tensors, **values)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no state of a run or is damaged ({error}): delete it to go on from the state before it"
        ) from error


def crowded(blocks: Sequence[int], *, num_kept: int) -> list[int]:
    """Choose the states to drop so that the rest spreads over the video.

    Args:
        blocks: Saved states, rising.
        num_kept: How many may stay.

    Returns:
        Those to drop: one after the other the one whose neighbours are nearest to each other; never the newest, and
        never the one before block 0, without which a fork would need the file that the video goes on from.
    """
    kept = [block for block in blocks if block]
    dropped = []
    while len(kept) > num_kept - (0 in blocks):
        gaps = [after - before for before, after in zip([0, *kept[:-2]], kept[1:], strict=True)]
        dropped.append(kept.pop(gaps.index(min(gaps))))
    return dropped


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:
        raise _as_os_error(error, path) from error


def _as_os_error(error: SafetensorError, path: Path) -> OSError:
    """Safetensors reports a full disk as its own error, with the system's number in the text."""
    found = re.search(r"os error (\d+)", str(error))
    if found is None:
        return OSError(f"cannot write {path}: {error}")
    number = int(found[1])
    return OSError(number, os.strerror(number), str(path))


def _own_memory(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU where the tensor is a view: safetensors writes whole storages only."""
    tensor = tensor.detach().cpu().contiguous()
    is_whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if is_whole else tensor.clone()


def _link(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where the file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
