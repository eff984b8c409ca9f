"""Random checkpoints in the exact form that each model family publishes, at tiny or at full size.

Nesting, prefixes, naming, dtypes and adapters are those of the released files; the numbers are random, and depend on a
seed and the tensor's name alone. Everything is written tensor by tensor, so a full-size file needs little memory.
"""

import hashlib
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from checkpoint_layouts import FAMILIES, RANKS, SIZES, FileLayout, contents
from torch import Tensor

from longtake.models.checkpoints.converting import DTYPES
from longtake.models.checkpoints.files import TensorInfo
from longtake.models.checkpoints.parts import OutputTensor, _write_raw, write_json, write_weights
from longtake.models.checkpoints.wan_parts import expected_shapes
from longtake.scripts.console import err, out, run_app

# What a tensor holds, by the file's name for it: (entry, diffusers name of the weight, shape) -> numbers.
Values = Callable[[str, str, tuple[int, ...]], Tensor]


def write_file(folder: Path, layout: FileLayout, *, config: Mapping[str, Any], values: Values, rank: int = 4) -> Path:
    """Write one file of a family.

    Args:
        folder: Stands for the repository.
        layout: Of the file.
        config: Arguments of the ``WanTransformer3DModel``.
        values: Numbers of each tensor, any float dtype.
        rank: Of adapters.

    Returns:
        The file.
    """
    path = folder / layout.name
    path.parent.mkdir(parents=True, exist_ok=True)
    shapes = expected_shapes(config)
    tensors = {
        entry: [
            OutputTensor(
                name=stored,
                info=TensorInfo(shape, getattr(torch, own.dtype)),
                load=lambda entry=entry, name=name, shape=shape: values(entry, name, shape),
            )
            for stored, (name, shape) in contents(own, shapes, rank=rank).items()
        ]
        for entry, own in layout.entries.items()
    }
    if layout.is_pickle:
        _write_pickle(path, tensors, layout.extra)
    else:
        write_weights(path.parent, tensors[""], stem=path.stem, max_shard_bytes=1 << 62)
    return path


def _write_pickle(path: Path, tensors: Mapping[str, list[OutputTensor]], extra: Mapping[str, Any]) -> None:
    """What ``torch.save`` writes, without ever holding the tensors: their places are left empty, then filled."""
    nested: dict[str, Any] = {}
    for entry, found in tensors.items():
        empty = {tensor.name: torch.empty(tensor.info.shape, dtype=tensor.info.dtype) for tensor in found}
        nested |= {entry: empty} if entry else empty
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # sums of places that are filled later would be wrong
    try:
        with torch.serialization.skip_data():
            torch.save(nested | dict(extra), path)
    finally:
        torch.serialization.set_crc32_options(before)
    starts = _storage_starts(path)
    with path.open("r+b") as file:
        for start, tensor in zip(starts, (tensor for found in tensors.values() for tensor in found), strict=True):
            file.seek(start)
            _write_raw(file, tensor.load().to(tensor.info.dtype))


def _storage_starts(path: Path) -> list[int]:
    """Where in the file each storage begins, in the order in which they were saved."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        starts = {}
        for member in archive.infolist():
            folder, _, number = member.filename.rpartition("/data/")
            if folder and number.isdigit():
                file.seek(member.header_offset + 26)
                lengths = [int.from_bytes(file.read(2), "little") for _ in range(2)]  # of name and extra field
                starts[int(number)] = member.header_offset + 30 + sum(lengths)
    return [starts[number] for number in sorted(starts)]


def random_values(seed: int) -> Values:
    """Return numbers that depend on a seed and the tensor's name alone, scaled so that a forward stays finite."""

    def values(entry: str, name: str, shape: tuple[int, ...]) -> Tensor:
        key = int.from_bytes(hashlib.blake2b(f"{seed}/{entry}/{name}".encode(), digest_size=7).digest(), "little")
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(key))
        if "norm" in name and name.endswith("weight"):
            return 1.0 + 0.1 * numbers
        return numbers / max(1, prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.1 * numbers

    return values


def write_family(
    folder: Path, family: str, *, size: str = "tiny", seed: int = 0, dtype: str | None = None
) -> list[Path]:
    """Write all files of a family with random numbers.

    Args:
        folder: Stands for the family's repository.
        family: A key of ``FAMILIES``.
        size: A key of ``SIZES``.
        seed: Of the numbers.
        dtype: Of all tensors; the layout's own when None.

    Returns:
        The files; ``config.json`` in Wan's own form lies beside each model, as its heads are not Wan's at tiny size.
    """
    config = SIZES[size]
    paths = []
    for layout in FAMILIES[family]:
        entries = {entry: replace(own, dtype=dtype or own.dtype) for entry, own in layout.entries.items()}
        file = replace(layout, entries=entries)
        paths.append(write_file(folder, file, config=config, values=random_values(seed), rank=RANKS[size]))
        if size == "tiny":
            write_json(paths[-1].parent / "config.json", wan_config(config))
    return paths


def wan_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``config.json`` of Wan's own code for a transformer of diffusers' class."""
    heads = config["num_attention_heads"]
    return {
        "_class_name": "WanModel",
        "model_type": "t2v",
        "dim": heads * config.get("attention_head_dim", 128),
        "num_heads": heads,
        "ffn_dim": config["ffn_dim"],
        "freq_dim": config.get("freq_dim", 256),
        "in_dim": config.get("in_channels", 16),
        "out_dim": config.get("out_channels", 16),
        "num_layers": config["num_layers"],
        "text_len": 512,
        "eps": 1e-6,
    }


def make_checkpoint(
    folder: Annotated[Path, typer.Argument(help="Folder to make; stands for the family's repository.")],
    *,
    family: Annotated[str, typer.Option(help=f"One of: {', '.join(FAMILIES)}.")] = "wan",
    size: Annotated[str, typer.Option(help=f"One of: {', '.join(SIZES)}.")] = "tiny",
    dtype: Annotated[str | None, typer.Option(help="Of all tensors.", show_default="the family's own")] = None,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
) -> None:
    """Make a random checkpoint in the form that a model family publishes.

    **Example**

    `python tests/support/make_checkpoint.py ./wan --family wan --size 1.3B`
    """
    for name, value, known in (("family", family, FAMILIES), ("size", size, SIZES), ("dtype", dtype, (None, *DTYPES))):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known: {', '.join(str(k) for k in known if k)}.")
    if folder.exists():
        raise ValueError(f"'{folder}' exists already; nothing is overwritten.")
    for path in write_family(folder, family, size=size, seed=seed, dtype=dtype):
        err.print(f"{path.stat().st_size / 1e6:,.1f} MB")
        out.print(str(path), markup=False)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command()(make_checkpoint)
    sys.exit(run_app(app))
