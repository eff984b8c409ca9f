"""Checkpoints of a run, and files that a killed program never leaves half-written."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
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
    """Read JSON."""
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
        """Read a file."""
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
