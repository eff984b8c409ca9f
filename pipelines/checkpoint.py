"""Checkpoints of a run, and files that a killed program never leaves half-written."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_METADATA_KEY = "longtake"


def with_temporary(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file under a temporary name, bring it to the disk, and rename it to ``path``.

    Raises:
        OSError: If it cannot be written; ``path`` is then untouched and the temporary file is gone.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        write(temporary)
        _sync(temporary, os.O_RDWR)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent, os.O_RDONLY)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, one line at the end."""
    data = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    with_temporary(path, lambda temporary: temporary.write_bytes(data))


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: If the file is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A run between two blocks."""

    next_block: int  # index of the block that comes next; 0 right behind the conditioning latents
    num_frames: int  # pixel frames in the file so far
    num_changes: int  # prompt changes that have taken effect
    tensors: Mapping[str, Tensor]  # first value of ``VideoRollout.state_dict``
    numbers: Mapping[str, Any]  # its second value

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Read a file.

        Raises:
            ValueError: If it is no checkpoint.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return cls(tensors=tensors, **json.loads(metadata[_METADATA_KEY]))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is no state of a run or is damaged ({error}): delete it to go on from the state before it"
            ) from error

    def save(self, path: Path) -> None:
        """Write a file atomically."""
        values = {key: value for key, value in vars(self).items() if key != "tensors"}
        tensors = {key: _own_memory(tensor) for key, tensor in self.tensors.items()}

        def write(temporary: Path) -> None:
            try:
                save_file(tensors, temporary, metadata={_METADATA_KEY: json.dumps(values)})
            except SafetensorError as error:
                # A full disk is an error of its own there, with the system's number in the text.
                found = re.search(r"os error (\d+)", str(error))
                number = int(found[1]) if found else None
                raise OSError(number, os.strerror(number) if number else str(error), str(temporary)) from error

        with_temporary(path, write)


@dataclass(frozen=True)
class CheckpointFolder:
    """``states/NNNNNN.safetensors``, named by the next block; the newest is also the run's ``state.safetensors``."""

    folder: Path  # made when the first checkpoint is saved
    newest: Path
    num_kept: int

    def blocks(self) -> list[int]:
        """The checkpoints' next blocks, rising."""
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.safetensors"))

    def path(self, next_block: int) -> Path:
        """File of the checkpoint before a block."""
        return self.folder / f"{next_block:06d}.safetensors"

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint atomically, then drop the most crowded of the older ones."""
        self.folder.mkdir(exist_ok=True)
        path = self.path(checkpoint.next_block)
        checkpoint.save(path)
        with_temporary(self.newest, lambda temporary: link_or_copy(path, temporary))
        for block in _crowded(self.blocks(), num_kept=self.num_kept):
            self.path(block).unlink(missing_ok=True)

    def load(self, next_block: int) -> Checkpoint:
        """Read one of ``blocks()``."""
        return Checkpoint.load(self.path(next_block))


def _crowded(blocks: Sequence[int], *, num_kept: int) -> list[int]:
    """Choose the checkpoints to drop so that ``num_kept`` stay and spread over the video.

    Those go, one after the other, whose neighbours are nearest to each other; never the newest, and never the one
    before block 0, without which a fork would need the file of the conditioning frames.
    """
    kept = [block for block in blocks if block]
    dropped = []
    while len(kept) > num_kept - (0 in blocks):
        gaps = [after - before for before, after in zip([0, *kept[:-2]], kept[1:], strict=True)]
        dropped.append(kept.pop(gaps.index(min(gaps))))
    return dropped


def _own_memory(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU where the tensor is a view: safetensors writes whole storages only."""
    tensor = tensor.detach().cpu().contiguous()
    is_whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if is_whole else tensor.clone()


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name; copy it where the file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
