"""Checkpoints that ``torch.save`` wrote: nothing but tensors is unpickled, and they stay in the file until read."""

import os
import pickle
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from longtake.models.checkpoints.checkpoint import FLAT, Checkpoint, TensorInfo

# Entries may lie one level below the top's: {"state_dict": {"generator": {...}}}.
_MAX_DEPTH = 2
# Pages that were read count as resident until the mapping is closed, so it is opened anew after so many bytes.
_RELEASE_BYTES = 1 << 28
# What the unpickler meets in a damaged stream.
_DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ValueError,
    struct.error,
)


class PickleCheckpoint(Checkpoint):
    """A zipped pickle, memory-mapped."""

    def __init__(self, path: Path) -> None:
        """Unpickle the structure; tensors stay in the file.

        Raises:
            ValueError: If it wants to load more than tensors, or holds no dictionary of tensors.
        """
        self._file = path
        self._release_bytes = _RELEASE_BYTES
        self._num_read = 0
        root = _load(path)
        self._tensors = dict(_entries(root, ()))
        if not self._tensors:
            raise ValueError(f"'{path}' holds no named tensors.")
        entries = {
            entry: {name: _info(path, name, tensor) for name, tensor in tensors.items()}
            for entry, tensors in self._tensors.items()
        }
        others = [str(name) for name, value in root.items() if not isinstance(value, Tensor) and not _holds(value)]
        super().__init__(path, files=[path], container="pickle (zip)", entries=entries, others=others)

    def read(self, entry: str, name: str) -> Tensor:
        if self._num_read > self._release_bytes:
            self._tensors = {}  # the old mapping goes before the new one comes
            self._tensors = dict(_entries(_load(self._file), ()))
            self._num_read = 0
        self._num_read += self.entries[entry][name].num_bytes
        return self._tensors[entry][name]


def _load(path: Path) -> Mapping[str, Any]:
    try:
        wanted = sorted(get_unsafe_globals_in_checkpoint(path))
        root = None if wanted else _load_tensors(path)
    except _DAMAGE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"'{path}' cannot be unpickled, so it is damaged: {reason}") from error
    if wanted:
        rest = f" and {len(wanted) - 3} more" if len(wanted) > 3 else ""
        raise ValueError(
            f"'{path}' is refused: beside tensors it wants to load {', '.join(wanted[:3])}{rest}, and pickles that do "
            "can run code. If you trust its author, load it yourself and save the tensors alone with torch.save."
        )
    if not isinstance(root, Mapping):
        raise ValueError(f"'{path}' holds a {type(root).__name__}, where a dictionary of tensors is expected.")
    return root


def _load_tensors(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # torch.load goes by this suffix and would read the pickle as what it is not, so it gets another name to open.
    with TemporaryDirectory() as folder:
        link = Path(folder) / "checkpoint.pt"
        os.symlink(path.resolve(), link)
        return torch.load(link, map_location="cpu", weights_only=True, mmap=True)


def _entries(value: Mapping[str, Any], parents: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(dotted entry name, its tensors) of every dictionary that holds some."""
    tensors = {name: found for name, found in value.items() if isinstance(name, str) and isinstance(found, Tensor)}
    if tensors:
        yield ".".join(parents) or FLAT, tensors
    if len(parents) < _MAX_DEPTH:
        for name, found in value.items():
            if isinstance(name, str) and isinstance(found, Mapping):
                yield from _entries(found, (*parents, name))


def _holds(value: Any) -> bool:
    return isinstance(value, Mapping) and any(True for _ in _entries(value, ("",)))


def _info(path: Path, name: str, tensor: Tensor) -> TensorInfo:
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        kind = type(tensor).__name__
        raise ValueError(
            f"'{path}' holds {name} as a {kind} without plain numbers: save full tensors with torch.save."
        )
    info = TensorInfo(tuple(tensor.shape), tensor.dtype)
    if info.num_bytes > tensor.untyped_storage().nbytes():
        raise ValueError(f"'{path}' holds {name} of shape {list(info.shape)} with fewer numbers than that: refused.")
    return info
