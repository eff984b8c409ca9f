"""Folders that models are loaded from."""

from collections.abc import Sequence
from pathlib import Path

from longtake.configs.families import family_names

CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")


def check_model_folder(
    folder: Path, *, parts: Sequence[str] = ("transformer", "vae", "text_encoder"), preset: str | None = None
) -> None:
    """Refuse a path that is no diffusers Wan folder with safetensors weights.

    Args:
        folder: The path.
        parts: Whose weights have to be there.
        preset: Model family that it is to be run as, if one is named.

    Raises:
        ValueError: Says what is missing and what to do.
    """
    if folder.is_file() and folder.suffix in CHECKPOINTS:
        raise ValueError(
            f"'{folder}' is a checkpoint file and a diffusers folder is needed: make one with "
            f"longtake convert {folder} --out DIR --preset {preset or 'NAME'}"
        )
    if not folder.is_dir():
        known = ", ".join(family_names())
        raise ValueError(f"model folder '{folder}' does not exist: give a diffusers folder, or one of: {known}.")
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"model folder '{folder}' has no model_index.json: it is not a diffusers folder.")
    for part in parts:
        names = [entry.name for entry in (folder / part).glob("*")]
        if not any(name.endswith(".safetensors") for name in names):
            pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
            if pickles:
                raise ValueError(
                    f"'{folder / part}' holds {pickles[0]}, a pickle, which can run code: convert it to safetensors."
                )
            raise ValueError(f"'{folder / part}' holds no .safetensors weights.")
