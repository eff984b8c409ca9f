"""What a model's config files say, held against how it is to be run: refused before a weight is read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longtake.configs.families import ModelFamily, family_names, load_family

Config = Mapping[str, Any]

# Shapes by the size that a family names.
SIZES = {
    "1.3B": {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960},
    "14B": {"num_attention_heads": 40, "attention_head_dim": 128, "num_layers": 40, "ffn_dim": 13824},
}
CLASSES = {"transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan"}
FILES = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
}
# Latent channels of Wan2.1, and of Wan2.2's 5B with its VAE of another compression.
WAN21_CHANNELS = 16
WAN22_CHANNELS = 48


def read_configs(folder: Path, *, names: Mapping[str, str] | None = None) -> dict[str, Config]:
    """Read what the parts of a diffusers folder say of themselves.

    Args:
        folder: With ``model_index.json``.
        names: Folders of the parts to read, where they are not called as usual; then those parts only.

    Returns:
        Their configurations by part, as far as the parts are there; ``model_index`` beside them.

    Raises:
        ValueError: If a file is no JSON.
    """
    files = {"model_index": folder / "model_index.json"} if names is None else {}
    for part, name in (names or {part: part for part in FILES}).items():
        if part in FILES:
            files[part] = folder / name / FILES[part]
    return {part: _read(file) for part, file in files.items() if file.is_file()}


def check_configs(configs: Mapping[str, Config], family: ModelFamily, *, where: str, size: str | None = None) -> None:
    """Refuse parts that are no causal Wan2.1 model, do not fit each other, or are not of the family's size.

    Args:
        configs: By part: ``model_index``, ``transformer``, ``vae``, ``text_encoder``, ``tokenizer``; what is missing
            is not checked.
        family: How the model is to be run.
        where: How errors call it: a folder in quotes, or what it is instead.
        size: What the transformer has to be, ``1.3B`` or ``14B``; None for any.

    Raises:
        ValueError: With the name, the value, the limit and the remedy.
    """
    for part, wanted in CLASSES.items():
        name = configs.get(part, {}).get("_class_name", wanted)
        if name != wanted:
            raise ValueError(
                f"the {part} of {where} is a {name}: a {wanted} is needed; give a diffusers folder of a Wan2.1 "
                "text-to-video model."
            )
    if configs.get("model_index", {}).get("transformer_2", (None, None))[0] is not None:
        raise ValueError(f"{where} has a transformer_2, so it is Wan2.2's pair of experts: give a Wan2.1 model.")
    transformer = configs.get("transformer", {})
    _check_kind(transformer, where)
    if size is not None:
        _check_size(transformer, where, size)
    _check_parts(transformer, configs, where)
    limit = configs.get("tokenizer", {}).get("model_max_length")
    if limit is not None and limit < family.max_sequence_length:
        raise ValueError(
            f"the tokenizer of {where} ends at {limit} tokens, and max_sequence_length={family.max_sequence_length} "
            "of this model family asks for more: take the tokenizer that belongs to the text encoder."
        )


def _check_kind(transformer: Config, where: str) -> None:
    channels = transformer.get("in_channels", WAN21_CHANNELS)
    if channels == WAN22_CHANNELS:
        raise ValueError(
            f"the transformer of {where} has in_channels={channels}, which is Wan2.2's 5B: Wan2.1 is needed, with "
            f"{WAN21_CHANNELS}."
        )
    images = [key for key in ("image_dim", "added_kv_proj_dim") if transformer.get(key) is not None]
    if images or channels != transformer.get("out_channels", channels):
        found = ", ".join(f"{key}={transformer[key]}" for key in (*images, "in_channels") if key in transformer)
        raise ValueError(
            f"the transformer of {where} is an image-to-video one ({found}): a text-to-video one is needed; "
            "families that begin from an image by themselves have it among their starts, see longtake info NAME."
        )


def _check_size(transformer: Config, where: str, size: str) -> None:
    wanted = SIZES[size] | {"in_channels": WAN21_CHANNELS}
    wrong = {key: transformer[key] for key, value in wanted.items() if transformer.get(key, value) != value}
    if not wrong:
        return
    found = ", ".join(f"{key}={value} instead of {wanted[key]}" for key, value in wrong.items())
    others = [name for name, shapes in SIZES.items() if all(transformer.get(k) == v for k, v in shapes.items())]
    named = [name for name in family_names() if load_family(name).size in others]
    remedy = f"it is {others[0]}: name a preset of that size ({', '.join(named)})" if named else "give another folder"
    raise ValueError(
        f"the transformer of {where} is not of the size {size} that this model family has ({found}): {remedy}, or "
        "give the folder without a preset to run it like Self-Forcing at any size."
    )


def _check_parts(transformer: Config, configs: Mapping[str, Config], where: str) -> None:
    """Refuse a VAE or a text encoder that speaks another language than the transformer."""
    for key, part, other, word in (
        ("in_channels", "vae", "z_dim", "latent channels"),
        ("text_dim", "text_encoder", "d_model", "text features"),
    ):
        wanted, found = transformer.get(key), configs.get(part, {}).get(other)
        if None not in (wanted, found) and wanted != found:
            raise ValueError(
                f"the {part} of {where} has {other}={found} and its transformer {key}={wanted}: both have to have "
                f"the same {word}; take the {part} that the transformer was trained with."
            )


def _read(path: Path) -> Config:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} holds no mapping of names to values: it is no config file of diffusers.")
    return values
