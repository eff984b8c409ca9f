"""What a run was made with: versions, machine and a hash of the weights."""

import hashlib
import platform
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import torch

PACKAGES = ("longtake", "torch", "diffusers", "transformers", "safetensors", "numpy", "av")
OPTIONAL_PACKAGES = ("zentorch",)
FULL_HASH_BYTES = 1 << 28
NUM_SAMPLES = 256
SAMPLE_BYTES = 1 << 16


def versions() -> dict[str, str]:
    """Return the versions that decide the numbers: Python and the packages that compute."""
    optional = [name for name in OPTIONAL_PACKAGES if find_spec(name) is not None]
    return {"python": platform.python_version()} | {name: version(name) for name in (*PACKAGES, *optional)}


def machine(device: torch.device) -> dict[str, Any]:
    """Return what of the machine decides the numbers.

    Args:
        device: Where the model runs.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "platform": platform.platform(),
        "device": str(device),
        "device_name": name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
    }


def weights_hash(folder: Path) -> dict[str, Any]:
    """Hash a model folder's weights: names, sizes and bytes of its safetensors files.

    Files above 256 MiB are read at 256 evenly spaced places of 64 KiB: enough to tell two checkpoints apart, and a
    run does not wait for tens of gigabytes.

    Args:
        folder: Diffusers folder.

    Returns:
        ``{"sha256", "num_files", "num_bytes", "method"}``; method is ``full`` or ``sampled``.
    """
    digest = hashlib.sha256()
    paths = sorted(folder.rglob("*.safetensors"))
    is_sampled = False
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}:{size}\n".encode())
        with path.open("rb") as file:
            if size <= FULL_HASH_BYTES:
                _hash_all(digest, file)
            else:
                is_sampled = True
                _hash_samples(digest, file, size)
    return {
        "sha256": digest.hexdigest(),
        "num_files": len(paths),
        "num_bytes": sum(path.stat().st_size for path in paths),
        "method": "sampled" if is_sampled else "full",
    }


def file_hash(path: str | Path | None) -> dict[str, Any] | None:
    """Hash a file that took part, whole.

    Args:
        path: The file; None where there is none.

    Returns:
        ``{"sha256", "num_bytes"}``, or None.

    Raises:
        ValueError: If the file is not there.
    """
    if path is None:
        return None
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist any more: put it back where the run found it.")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        _hash_all(digest, file)
    return {"sha256": digest.hexdigest(), "num_bytes": path.stat().st_size}


def _hash_all(digest: "hashlib._Hash", file: BinaryIO) -> None:
    while data := file.read(1 << 20):
        digest.update(data)


def _hash_samples(digest: "hashlib._Hash", file: BinaryIO, size: int) -> None:
    for index in range(NUM_SAMPLES):
        file.seek((size - SAMPLE_BYTES) * index // (NUM_SAMPLES - 1))
        digest.update(file.read(SAMPLE_BYTES))
