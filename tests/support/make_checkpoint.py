"""Random checkpoints in the exact form that each model family publishes, at tiny or at full size.

Nesting, prefixes, naming, dtypes and adapters are those of the released files; the numbers are random, and depend on a
seed and the tensor's name alone.
"""

import hashlib
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from checkpoint_layouts import FAMILIES, RANKS, SIZES, EntryLayout, contents, shapes_of
from safetensors.torch import save_file
from torch import Tensor

from longtake.models.checkpoints.parts import write_json


def write_family(folder: Path, family: str, *, size: str = "tiny", dtype: str | None = None) -> list[Path]:
    """Write all files of a family with random numbers.

    Args:
        folder: Stands for the family's repository.
        family: A key of ``FAMILIES``.
        size: A key of ``SIZES``.
        dtype: Of all tensors; the layout's own when None.

    Returns:
        The files; ``config.json`` in Wan's own form lies beside each model, as its heads are not Wan's at tiny size.
    """
    shapes, values, paths = shapes_of(size), random_values(0), []
    for name, entries in FAMILIES[family].items():
        found: dict[str, Any] = {}
        for entry, layout in entries.items():
            if not isinstance(layout, EntryLayout):
                found[entry] = layout
                continue
            tensors = {
                stored: values(entry, weight, shape).to(getattr(torch, dtype or layout.dtype))
                for stored, (weight, shape) in contents(layout, shapes, rank=RANKS[size]).items()
            }
            found |= {entry: tensors} if entry else tensors
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (save_file if path.suffix == ".safetensors" else torch.save)(found, path)
        if size == "tiny":
            write_json(path.parent / "config.json", _wan_config(SIZES[size]))
        paths.append(path)
    return paths


def random_values(seed: int) -> Callable[[str, str, tuple[int, ...]], Tensor]:
    """Return (entry, diffusers name of the weight, shape) -> numbers, scaled so that a forward stays finite."""

    def values(entry: str, name: str, shape: tuple[int, ...]) -> Tensor:
        key = int.from_bytes(hashlib.blake2b(f"{seed}/{entry}/{name}".encode(), digest_size=7).digest(), "little")
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(key))
        if "norm" in name and name.endswith("weight"):
            return 1.0 + 0.1 * numbers
        return numbers / max(1, prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.1 * numbers

    return values


def _wan_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of Wan's own code for a transformer of diffusers' class."""
    heads = config["num_attention_heads"]
    return {
        "_class_name": "WanModel",
        "model_type": "t2v",
        "dim": heads * config["attention_head_dim"],
        "num_heads": heads,
        "ffn_dim": config["ffn_dim"],
        "freq_dim": config["freq_dim"],
        "in_dim": config["in_channels"],
        "out_dim": config["out_channels"],
        "num_layers": config["num_layers"],
        "text_len": 512,
        "eps": 1e-6,
    }
