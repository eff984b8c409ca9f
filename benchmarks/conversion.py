"""Convert a random checkpoint of full size, and measure memory and time.

Makes Wan2.1-T2V-1.3B (825 tensors, 1.42 billion numbers, bfloat16, 2.8 GB) with random numbers, converts it with
``longtake convert`` in a process of its own, opens the result with diffusers, compares every name and shape with the
lists of the published model where they are given, and deletes all of it. Needs 6 GB of disk.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from checkpoint_layouts import RANKS, SIZES
from diffusers import WanTransformer3DModel
from make_checkpoint import random_values, write_family
from safetensors import safe_open

from longtake.scripts.console import out


def measure_conversion(
    *,
    folder: Annotated[
        Path | None, typer.Option(help="Where to work; emptied afterwards.", show_default="a temporary one")
    ] = None,
    size: Annotated[str, typer.Option(help=f"One of: {', '.join(SIZES)}.")] = "1.3B",
    family: Annotated[str, typer.Option(help="Form of the checkpoint.")] = "wan",
    keys: Annotated[Path | None, typer.Option(help="JSON of diffusers names and shapes to be equal to.")] = None,
) -> None:
    """Convert a random checkpoint of full size and print memory and time."""
    work = Path(tempfile.mkdtemp(prefix="longtake-conversion-", dir=folder))
    try:
        start = time.monotonic()
        source, *adapters = write_family(work / "source", family, size=size)
        for path in (source, *adapters):
            out.print(f"made {path.name}, {path.stat().st_size / 1e9:.2f} GB")
        out.print(f"in {time.monotonic() - start:.0f} s")
        lora = [word for path in adapters for word in ("--lora", str(path), "--lora-alpha", str(RANKS[size]))]
        seconds, peak = _convert("convert", str(source), "--out", str(work / "folder"), *lora)
        out.print(f"converted in {seconds:.1f} s, peak resident memory {peak / 1e9:.2f} GB")
        names = _read_shapes(work / "folder")
        out.print(f"{len(names)} tensors, {sum(_count(shape) for shape in names.values()):,} numbers")
        if keys is not None:
            expected = {name: list(shape) for name, shape in json.loads(keys.read_text()).items()}
            if names != expected:
                raise ValueError(f"{keys} has other names or shapes")
            out.print(f"all names and shapes equal to {keys.name}")
        start = time.monotonic()
        model = WanTransformer3DModel.from_pretrained(work / "folder", torch_dtype=torch.bfloat16)
        out.print(f"opened by from_pretrained in {time.monotonic() - start:.1f} s: {model.num_parameters():,} numbers")
        if family == "wan":
            _check_numbers(model)
    finally:
        shutil.rmtree(work)


def _convert(*words: str) -> tuple[float, int]:
    """Run the command as a process; returns (seconds, bytes of peak resident memory)."""
    start = time.monotonic()
    command = [sys.executable, "-m", "longtake.scripts.main", *words]
    process = os.posix_spawn(sys.executable, command, os.environ)
    _, status, usage = os.wait4(process, 0)
    if status:
        raise ValueError(f"the conversion ended with status {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - start, usage.ru_maxrss * 1024


def _read_shapes(folder: Path) -> dict[str, list[int]]:
    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as archive:
            shapes |= {name: archive.get_slice(name).get_shape() for name in archive.keys()}  # noqa: SIM118, no dict
    return shapes


def _count(shape: list[int]) -> int:
    return torch.Size(shape).numel()


def _check_numbers(model: WanTransformer3DModel) -> None:
    """Compare some tensors with the numbers that were written."""
    values = random_values(0)
    state = model.state_dict()
    for name in list(state)[:: len(state) // 20]:
        wanted = values("", name, tuple(state[name].shape)).to(torch.bfloat16)
        if not torch.equal(state[name].to(torch.bfloat16), wanted):
            raise ValueError(f"{name} came out with other numbers")
    out.print("numbers equal to those made")


if __name__ == "__main__":
    typer.run(measure_conversion)
