"""Folders of diffusers and transformers that become part of a new pipeline as they are."""

from pathlib import Path
from typing import Any

from longtake.models.checkpoints.container import read_json
from longtake.models.checkpoints.opening import open_checkpoint
from longtake.models.checkpoints.parts import Part, TakenPart
from longtake.models.checkpoints.safetensors_file import open_shards
from longtake.models.checkpoints.text_encoder import text_encoder_part
from longtake.models.checkpoints.vae import vae_part


def find_vae(path: Path) -> Part:
    """Take a VAE: a diffusers folder as it is, or Wan's own file converted.

    Args:
        path: ``vae`` folder, folder of a whole pipeline, or ``Wan2.1_VAE.pth``.

    Raises:
        ValueError: If it is something else.
    """
    if not path.is_dir():
        return vae_part(open_checkpoint(path))
    folder = _inside(path, "vae")
    config = _config(folder)
    if config.get("_class_name") != "AutoencoderKLWan":
        raise ValueError(f"'{folder}' is no Wan VAE: its config.json names {config.get('_class_name')!r}.")
    return TakenPart(name="vae", files=_weight_files(folder), notes=[("vae", f"taken from {folder}")])


def find_text_encoder(path: Path) -> Part:
    """Take a text encoder: a transformers folder as it is, or Wan's own file converted.

    Args:
        path: ``text_encoder`` folder, folder of a whole pipeline, or ``models_t5_umt5-xxl-enc-bf16.pth``.

    Raises:
        ValueError: If it is something else.
    """
    if not path.is_dir():
        return text_encoder_part(open_checkpoint(path))
    folder = _inside(path, "text_encoder")
    config = _config(folder)
    if config.get("model_type") != "umt5":
        raise ValueError(f"'{folder}' is no UMT5 text encoder: its config.json says {config.get('model_type')!r}.")
    files = _weight_files(folder)
    return TakenPart(name="text_encoder", files=files, notes=[("text encoder", f"taken from {folder}")])


def find_tokenizer(path: Path) -> Part:
    """Take a tokenizer's folder as it is.

    Args:
        path: ``tokenizer`` folder (Wan's own: ``google/umt5-xxl``), or folder of a whole pipeline.

    Raises:
        ValueError: If it is something else.
    """
    folder = _inside(path, "tokenizer")
    files = sorted(file for file in folder.glob("*") if file.suffix in (".json", ".model") and file.is_file())
    if not {"tokenizer.json", "spiece.model"} & {file.name for file in files}:
        raise ValueError(f"'{folder}' holds no tokenizer: tokenizer.json or spiece.model is needed.")
    return TakenPart(name="tokenizer", files=files, notes=[("tokenizer", f"taken from {folder}")])


def part_config(part: Part) -> dict[str, Any]:
    """Return a part's ``config.json``, written or taken."""
    if isinstance(part, TakenPart):
        return read_json(next(file for file in part.files if file.name == "config.json"))
    return dict(part.config)


def _inside(path: Path, part: str) -> Path:
    if not path.is_dir():
        raise ValueError(f"'{path}' is no folder; --{part.replace('_', '-')} takes one.")
    return path / part if (path / "model_index.json").is_file() else path


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise ValueError(f"'{folder}' has no config.json: it is no diffusers or transformers folder.")
    return read_json(folder / "config.json")


def _weight_files(folder: Path) -> list[Path]:
    shards = open_shards(folder)  # refuses what is truncated or lacks shards
    if shards is None:
        raise ValueError(f"'{folder}' holds no .safetensors weights; pickles are not taken as they are.")
    return [*sorted(folder.glob("*.json")), *shards.files]
