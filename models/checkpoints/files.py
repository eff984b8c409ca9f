"""Checkpoint files, opened without reading their weights: entries of named tensors, read one by one."""

import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

FLAT = ""  # name of the entry of a file whose tensors lie at its top
# Entries that are taken unasked: the averaged weights first, as the families' own scripts do.
_ENTRY_ORDER = ("generator_ema", "generator", "model", "state_dict", FLAT)
# Names of the safetensors format.
SAFETENSORS_DTYPES = {
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
_MAX_HEADER_BYTES = 100_000_000
_NUM_LOOKED_AT = 512  # bytes that tell what a file is
_TEXTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run git lfs pull",
    b"<!doctype html": "a web page, so the download went wrong: download it again",
    b"<html": "a web page, so the download went wrong: download it again",
}
_INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
# Entries may lie one level below the top's: {"state_dict": {"generator": {...}}}.
_MAX_DEPTH = 2
# Pages that were read count as resident until the mapping is closed, so it is opened anew after so many bytes.
_RELEASE_BYTES = 1 << 28
# Errors of the unpickler in a damaged stream.
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


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor's shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint; ``open_checkpoint`` makes one."""

    path: Path  # file or folder, as it was named
    files: Sequence[Path]  # files that were opened
    container: str  # safetensors or pickle, for messages
    # Entry name to {tensor name: info}; the entry of tensors at the top is ``FLAT``.
    entries: Mapping[str, Mapping[str, TensorInfo]]
    # Reads the tensor of an entry and a name to the CPU, perhaps as a view of the file: not to be written to.
    read: Callable[[str, str], Tensor]
    others: Sequence[str] = ()  # names of what is neither a tensor nor an entry: step counters, settings

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def entry_title(entry: str) -> str:
    """Name an entry for people."""
    return entry or "(no entry: tensors at the top)"


def choose_entry(checkpoint: Checkpoint, key: str | None = None, *, order: Sequence[str] = _ENTRY_ORDER) -> str:
    """Find the entry ``key``, or when None the first of ``order``, where the last part of a nested name counts."""
    listed = ", ".join(f"{entry_title(entry)}: {len(found)}" for entry, found in checkpoint.entries.items())
    if key is not None:
        if key in checkpoint.entries:
            return key
        raise ValueError(f"'{checkpoint.path}' has no entry {key!r}; it holds {listed}.")
    for wanted in order:
        for entry in checkpoint.entries:
            if entry == wanted or (wanted and entry.rpartition(".")[2] == wanted):
                return entry
    raise ValueError(
        f"'{checkpoint.path}' holds {listed}, none of which is taken unasked: name the one that is meant with key "
        "(--key)."
    )


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint without reading its weights.

    Args:
        path: A safetensors file or a zipped pickle, whatever its suffix; an index of shards; a folder of shards or
            with one checkpoint; or a diffusers pipeline's folder, of which the transformer is taken.

    Returns:
        Names, shapes and dtypes; tensors are read one by one.

    Raises:
        ValueError: If it is none of these, is damaged, or wants to load more than tensors.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise ValueError(f"checkpoint '{path}' does not exist.")
    if path.name.endswith(_INDEX):
        return _open_index(path, path)
    if _is_pickle(path):
        return _open_pickle(path)
    _check_shard(path)
    return _open_safetensors(path, [path])


def _open_folder(folder: Path) -> Checkpoint:
    if (folder / "model_index.json").is_file():
        folder = folder / "transformer"
    shards = open_shards(folder)
    if shards is not None:
        return shards
    pickles = sorted(file for file in folder.glob("*") if file.suffix in _PICKLES)
    if len(pickles) == 1:
        return open_checkpoint(pickles[0])
    if pickles:
        raise ValueError(
            f"'{folder}' holds {len(pickles)} checkpoints ({', '.join(p.name for p in pickles)}): name one."
        )
    raise ValueError(f"'{folder}' holds no checkpoint: give a .safetensors or .pt file, or a folder of shards.")


def open_shards(folder: Path) -> Checkpoint | None:
    """Open the safetensors files of a folder as one model; None if it has none."""
    indexes = sorted(folder.glob(f"*{_INDEX}"))
    if len(indexes) > 1:
        raise ValueError(f"'{folder}' has several sets of shards ({', '.join(i.name for i in indexes)}): name one.")
    if indexes:
        return _open_index(folder, indexes[0])
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        _check_shard(file, siblings={other.name for other in files})
    return _open_safetensors(folder, files) if files else None


def _open_index(path: Path, index: Path) -> Checkpoint:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"'{index}' has no weight_map: it is no index of shards.")
    folder, names = index.parent, sorted(set(listed.values()))
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing or not names:
        raise ValueError(
            f"'{index}' lists {len(names)} shards, {len(missing)} of which are not beside it "
            f"({', '.join(missing[:5])}): download them too."
        )
    checkpoint = _open_safetensors(path, [folder / name for name in names])
    absent = [name for name in listed if name not in checkpoint.entries[FLAT]]
    if absent:
        raise ValueError(f"'{index}' lists {len(absent)} tensors that no shard holds ({absent[0]}...).")
    return checkpoint


def _check_shard(file: Path, *, siblings: AbstractSet[str] = frozenset()) -> None:
    """Refuse a shard of which others are not among the files that are read with it."""
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


def _open_safetensors(path: Path, files: Sequence[Path]) -> Checkpoint:
    infos: dict[str, TensorInfo] = {}
    places: dict[str, Path] = {}
    for file in files:
        found = _read_infos(file)
        for name in found.keys() & infos.keys():
            raise ValueError(f"'{file}' and {places[name].name} both hold {name}: they are no shards of one model.")
        infos |= found
        places |= dict.fromkeys(found, file)

    def read(entry: str, name: str) -> Tensor:
        try:
            # Opened anew for each tensor: pages of an open mapping count as resident memory.
            with safe_open(places[name], "pt") as opened:
                return opened.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"'{places[name]}' changed while it was read ({error}).") from error

    container = "safetensors" + (f", {len(files)} shards" if len(files) > 1 else "")
    return Checkpoint(path=path, files=files, container=container, entries={FLAT: infos}, read=read)


def _read_infos(file: Path) -> dict[str, TensorInfo]:
    infos = {}
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.offset_keys():
                part = opened.get_slice(name)
                if part.get_dtype() not in SAFETENSORS_DTYPES:
                    raise ValueError(f"'{file}' holds {name} in the unknown dtype {part.get_dtype()}.")
                infos[name] = TensorInfo(tuple(part.get_shape()), SAFETENSORS_DTYPES[part.get_dtype()])
    except SafetensorError as error:
        raise ValueError(
            f"'{file}' is truncated or damaged, or no safetensors file ({error}): download it again."
        ) from error
    return infos


class _PickleReader:
    """Reads tensors of a memory-mapped pickle, whose mapping is renewed from time to time."""

    def __init__(self, path: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.path = path
        self.tensors = tensors
        self.num_read = 0

    def __call__(self, entry: str, name: str) -> Tensor:
        if self.num_read > _RELEASE_BYTES:
            self.tensors = {}  # the old mapping goes before the new one comes
            self.tensors = dict(_entries(_load(self.path), ()))
            self.num_read = 0
        tensor = self.tensors[entry][name]
        self.num_read += tensor.nbytes
        return tensor


def _open_pickle(path: Path) -> Checkpoint:
    """Unpickle the structure of a zipped pickle; tensors stay in the file."""
    root = _load(path)
    tensors = dict(_entries(root, ()))
    if not tensors:
        raise ValueError(f"'{path}' holds no named tensors.")
    entries = {
        entry: {name: _info(path, name, tensor) for name, tensor in found.items()} for entry, found in tensors.items()
    }
    others = [
        str(name)
        for name, value in root.items()
        if not isinstance(value, Tensor) and not (isinstance(value, Mapping) and any(_entries(value, ("",))))
    ]
    read = _PickleReader(path, tensors)
    return Checkpoint(path=path, files=[path], container="pickle (zip)", entries=entries, read=read, others=others)


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


def _is_pickle(path: Path) -> bool:
    """Tell a zipped pickle, which ``torch.save`` writes since PyTorch 1.6, from a safetensors file."""
    with path.open("rb") as file:
        start = file.read(_NUM_LOOKED_AT)
    if start.startswith(b"PK\x03\x04"):
        _check_zip(path)
        return True
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_HEADER_BYTES:
        return False
    raise ValueError(f"'{path}' {_describe(start)}.")


def _describe(start: bytes) -> str:
    if not start:
        return "is empty: download it again"
    for sign, text in _TEXTS.items():
        if start.lower().startswith(sign):
            return f"is {text}"
    if start.startswith(b"GGUF"):
        return "is a GGUF file, whose weights are quantised: give the safetensors or .pt file it was made from"
    if start[:1] == b"\x80" and start[1:2] <= b"\x05":
        return (
            "is a legacy pickle (not zipped), which cannot be read tensor by tensor: load it with "
            "torch.load(..., weights_only=True) and save it again with torch.save"
        )
    text = start.decode("utf-8", errors="replace")[:-1]  # the last character may be cut in the middle
    if "\ufffd" not in text and all(letter.isprintable() or letter.isspace() for letter in text):
        return "is a text file, no checkpoint: give a .safetensors or .pt file"
    return (
        "is neither a safetensors file nor a zipped pickle (torch.save): its beginning is damaged or of another kind"
    )


def _check_zip(path: Path) -> None:
    """Refuse a zip archive that is cut off, packed, or holds no checkpoint."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"'{path}' is truncated: a zipped pickle whose end is missing ({path.stat().st_size} bytes are there); "
            "download it again."
        ) from error
    if any("/code/" in member.filename or member.filename.endswith("/constants.pkl") for member in members):
        raise ValueError(f"'{path}' is a TorchScript archive, which holds code: give the plain state dict.")
    if not any(member.filename.endswith("/data.pkl") for member in members):
        raise ValueError(
            f"'{path}' is a zip archive without data.pkl, so torch.save did not write it: unpack it first."
        )
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError(f"'{path}' is a packed zip archive, as torch.save never writes: unpack it first.")


def read_json(path: Path) -> dict:
    """Read a JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read '{path}': {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"'{path}' holds no JSON object but a {type(found).__name__}.")
    return found
