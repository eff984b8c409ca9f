"""Folders that models are loaded from."""

from pathlib import Path

from longtake.configs.families import family_names


def check_model_folder(folder: Path) -> None:
    """Refuse a path that is no diffusers Wan folder with safetensors weights.

    Raises:
        ValueError: Says what is missing and what to do.
    """
    if not folder.is_dir():
        known = ", ".join(family_names())
        raise ValueError(f"model folder '{folder}' does not exist: give a diffusers folder, or one of: {known}.")
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"model folder '{folder}' has no model_index.json: it is not a diffusers folder.")
    for part in ("transformer", "vae", "text_encoder"):
        names = [entry.name for entry in (folder / part).glob("*")]
        if not any(name.endswith(".safetensors") for name in names):
            pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
            if pickles:
                raise ValueError(
                    f"'{folder / part}' holds {pickles[0]}, a pickle, which can run code: convert it to safetensors."
                )
            raise ValueError(f"'{folder / part}' holds no .safetensors weights.")
