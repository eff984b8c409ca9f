"""Parts of a model folder: weights written anew, tensor by tensor, and files taken as they are."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from longtake.models.checkpoints.files import SAFETENSORS_DTYPES, TensorInfo
from longtake.models.conversion import listing

DEFAULT_SHARD_BYTES = 10 * 10**9  # as diffusers
_PIECE = 1 << 24  # numbers that are cast and checked at a time
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class OutputTensor:
    """A tensor to write."""

    name: str  # in the file
    info: TensorInfo  # shape and dtype in the file
    load: Callable[[], Tensor]  # reads it, in that shape and any float dtype


OnTensor = Callable[[OutputTensor], None]


def parse_bytes(text: str) -> int:
    """Read a size such as ``5GB`` or ``500MiB``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B|)\s*", text.upper())
    num_bytes = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if num_bytes < 1:
        raise ValueError(f"size {text!r} is not understood: write it like 5GB or 500MB.")
    return num_bytes


def _header(tensors: Sequence[OutputTensor]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        info, end = tensor.info, start + tensor.info.num_bytes
        header[tensor.name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # The first number lies at a multiple of 64 bytes, so that weights mapped from the file are aligned as in memory.
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, tensor: OutputTensor) -> bool:
    """Cast, check and write a tensor piece by piece; returns whether all numbers are finite."""
    found = tensor.load()
    if tuple(found.shape) != tensor.info.shape:
        raise ValueError(f"{tensor.name} came as {list(found.shape)}, its header says {list(tensor.info.shape)}.")
    is_finite = True
    for piece in found.detach().contiguous().reshape(-1).split(_PIECE):
        cast = piece.to(tensor.info.dtype)
        is_finite = is_finite and bool(torch.isfinite(cast).all())
        file.write(cast.view(torch.uint8).numpy().data)
    return is_finite


@dataclass(frozen=True, kw_only=True)
class Part:
    """A sub-folder of a diffusers pipeline: files taken as they are, or weights written beside a ``config.json``."""

    name: str  # transformer, vae, text_encoder or tokenizer
    files: Sequence[Path] = ()  # linked, or copied where the new folder is on another disk
    config: Mapping[str, Any] = field(default_factory=dict)  # content of its config.json
    tensors: Sequence[OutputTensor] = ()  # weights to write, in the order of the shards
    source: str = ""  # where the weights are from, for messages
    stem: str = "diffusion_pytorch_model"  # of the weight files' names
    notes: Sequence[tuple[str, str]] = ()  # (what, text) rows for the summary

    def write(
        self, folder: Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES, on_tensor: OnTensor | None = None
    ) -> None:
        """Fill an existing, empty folder.

        Args:
            folder: Of this part.
            max_shard_bytes: Limit of a file's tensors; one larger tensor gets a shard of its own.
            on_tensor: Called after each tensor.

        Raises:
            ValueError: If tensors hold NaN or infinity, or get it by the cast; the files are of no use then.
        """
        for file in self.files:
            # A hub cache holds links to its blobs; the new folder is not to depend on them.
            source = file.resolve()
            if source.stat().st_dev == folder.stat().st_dev:
                os.link(source, folder / file.name)
            else:
                shutil.copy2(source, folder / file.name)
        if self.tensors:
            write_json(folder / "config.json", self.config)
            self._write_weights(folder, max_shard_bytes, on_tensor)

    def _write_weights(self, folder: Path, max_shard_bytes: int, on_tensor: OnTensor | None) -> None:
        by_name = {tensor.name: tensor for tensor in self.tensors}
        split = split_state_dict_into_shards_factory(
            by_name,
            get_storage_size=lambda tensor: tensor.info.num_bytes,
            filename_pattern=f"{self.stem}{{suffix}}.safetensors",
            max_shard_size=max_shard_bytes,
        )
        faults: list[str] = []
        for file_name, names in split.filename_to_tensors.items():
            # Wide numbers first, as safetensors orders them: every tensor lies at a multiple of its number's size.
            shard = sorted((by_name[name] for name in names), key=lambda tensor: -tensor.info.dtype.itemsize)
            with (folder / file_name).open("wb") as file:
                file.write(_header(shard))
                for tensor in shard:
                    if not _write_tensor(file, tensor):
                        faults.append(tensor.name)
                    if on_tensor is not None:
                        on_tensor(tensor)
        if faults:
            raise ValueError(
                f"'{self.source}': tensors hold NaN or infinity, as read or after the cast to their dtype: "
                f"{listing(faults)} of {len(self.tensors)}; the file is damaged, or --dtype too narrow. Nothing was "
                "kept."
            )
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            write_json(folder / f"{self.stem}.safetensors.index.json", index)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as diffusers does: indented, with a newline at the end."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
