"""Safetensors files, one or a set of shards: headers first, then the bytes of one tensor at a time."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longtake.models.checkpoints.checkpoint import FLAT, Checkpoint, TensorInfo
from longtake.models.checkpoints.container import MAX_HEADER_BYTES, read_json

# Names of the safetensors format.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")


@dataclass(frozen=True)
class _Place:
    file: Path
    start: int  # in the file
    info: TensorInfo


class SafetensorsCheckpoint(Checkpoint):
    """One safetensors file, or the shards of one model."""

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        """Read the headers.

        Args:
            path: What was named: a file, an index or a folder.
            files: The files to read.

        Raises:
            ValueError: If one is truncated or damaged, or two hold the same name.
        """
        self._places: dict[str, _Place] = {}
        for file in files:
            places = _read_places(file)
            twice = self._places.keys() & places.keys()
            if twice:
                other = self._places[min(twice)].file.name
                raise ValueError(f"'{file}' and {other} both hold {min(twice)}: they are no shards of one model.")
            self._places |= places
        infos = {name: place.info for name, place in self._places.items()}
        container = "safetensors" + (f", {len(files)} shards" if len(files) > 1 else "")
        super().__init__(path, files=files, container=container, entries={FLAT: infos})

    def read(self, entry: str, name: str) -> Tensor:
        place = self._places[name]
        if not place.info.num_bytes:
            return torch.empty(place.info.shape, dtype=place.info.dtype)
        raw = np.fromfile(place.file, dtype=np.uint8, count=place.info.num_bytes, offset=place.start)
        if raw.size != place.info.num_bytes:
            raise ValueError(f"'{place.file}' ends within {name}: it is truncated; download it again.")
        return torch.from_numpy(raw).view(place.info.dtype).reshape(place.info.shape)


def open_shards(folder: Path, *, index: Path | None = None) -> SafetensorsCheckpoint | None:
    """Open the safetensors files of a folder as one model.

    Args:
        folder: Where they lie.
        index: The ``*.safetensors.index.json`` that lists them; the folder's own, where it has one, when None.

    Returns:
        The checkpoint, or None if the folder has no safetensors files.

    Raises:
        ValueError: If shards are missing or there are several sets.
    """
    indexes = [index] if index is not None else sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise ValueError(f"'{folder}' has several sets of shards ({', '.join(i.name for i in indexes)}): name one.")
    if not indexes:
        files = sorted(folder.glob("*.safetensors"))
        for file in files:
            check_shard(file, siblings={other.name for other in files})
        return SafetensorsCheckpoint(folder, files) if files else None
    listed = read_json(indexes[0]).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"'{indexes[0]}' has no weight_map: it is no index of shards.")
    names = sorted(set(listed.values()))
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing or not names:
        raise ValueError(
            f"'{indexes[0]}' lists {len(names)} shards, {len(missing)} of which are not beside it "
            f"({', '.join(missing[:5])}): download them too."
        )
    checkpoint = SafetensorsCheckpoint(index or folder, [folder / name for name in names])
    absent = [name for name in listed if name not in checkpoint.entries[FLAT]]
    if absent:
        raise ValueError(f"'{indexes[0]}' lists {len(absent)} tensors that no shard holds ({absent[0]}...).")
    return checkpoint


def check_shard(file: Path, *, siblings: set[str] = frozenset()) -> None:
    """Refuse a shard whose siblings are not there.

    Args:
        file: A safetensors file.
        siblings: Names of the files that are read with it.

    Raises:
        ValueError: Names what lacks.
    """
    match = _SHARD.fullmatch(file.name)
    if match is None:
        return
    width, count = len(match[2]), int(match[3])
    wanted = {f"{match[1]}-{i:0{width}}-of-{match[3]}.safetensors" for i in range(1, count + 1)}
    missing = sorted(wanted - siblings - {file.name})
    if missing:
        raise ValueError(
            f"'{file}' is one of {count} shards, {len(missing)} of which are not read with it ({missing[0]}...): give "
            "the folder that holds all of them."
        )


def _read_places(file: Path) -> dict[str, _Place]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(
                f"'{file}' is truncated or no safetensors file: its header of {length} bytes is not there."
            )
        try:
            header = json.loads(stream.read(length))
            places = {
                name: _place(file, 8 + length, entry) for name, entry in header.items() if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"'{file}' has a damaged safetensors header: {error}") from error
    needed = max((place.start + place.info.num_bytes for place in places.values()), default=0)
    if needed > size:
        raise ValueError(
            f"'{file}' is truncated: its header speaks of {needed} bytes, it has {size}; download it again."
        )
    return places


def _place(file: Path, base: int, entry: dict) -> _Place:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {entry['dtype']}")
    info = TensorInfo(tuple(int(size) for size in entry["shape"]), DTYPES[entry["dtype"]])
    start, end = entry["data_offsets"]
    if min(info.shape, default=0) < 0 or start < 0 or end - start != info.num_bytes:
        raise ValueError(f"{end - start} bytes for shape {list(info.shape)} in {entry['dtype']}")
    return _Place(file, base + start, info)
