"""Loading of models: weights, checks of their folders and configurations, numerics, and the decoder of pixels."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import AutoTokenizer, UMT5EncoderModel

from longtake.configs.families import ModelFamily, family_names, load_family
from longtake.configs.loader import FOLDER_FAMILY
from longtake.models import StreamingDecoder, TiledDecoder, VaePixels, streaming_decoder, use_fast_kernels
from longtake.models.numerics import Numerics, check_numerics
from longtake.models.tiny_vae import StreamingTinyDecoder, TinyVae, load_tiny_vae

_CLASSES: dict[str, Any] = {
    "transformer": WanTransformer3DModel,
    "vae": AutoencoderKLWan,
    "text_encoder": UMT5EncoderModel,
    "tokenizer": AutoTokenizer,
    "scheduler": FlowMatchEulerDiscreteScheduler,
}
WEIGHTS = ("transformer", "vae", "text_encoder")
_CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
# Shapes of Wan2.1's transformers by the size that a family names; the rest of their configs is the class's default.
TRANSFORMERS: dict[str, dict[str, int]] = {
    "1.3B": {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960},
    "14B": {"num_attention_heads": 40, "attention_head_dim": 128, "num_layers": 40, "ffn_dim": 13824},
}
_CONFIG_FILES = dict.fromkeys(WEIGHTS, "config.json") | {"tokenizer": "tokenizer_config.json"}
# Latent channels of Wan2.1, and of Wan2.2's 5B with its VAE of another compression.
WAN21_CHANNELS = 16
_WAN22_CHANNELS = 48


class ModelLoading(WanPipeline):
    """The part of ``LongVideoPipeline`` that loads models."""

    family: ModelFamily = ModelFamily()  # settings that the checkpoint does not hold
    numerics: Numerics = "native"  # where half precision is rounded; see docs/numerics.md
    tiny_vae: TinyVae | None = None  # set by ``use_fast_vae``: decodes in place of ``vae``, which still encodes

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path = "mini",
        folder: str | Path | None = None,
        *,
        family: str | ModelFamily | None = None,
        numerics: Numerics = "native",
        fast_vae: str | Path | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a bundled model, a diffusers folder, or parts one by one.

        ``from_pretrained("mini")``, ``from_pretrained("self_forcing", "FOLDER")``, ``from_pretrained("FOLDER")``,
        or ``from_pretrained("self_forcing", transformer=..., vae=..., text_encoder=..., tokenizer=...)``.

        Args:
            pretrained_model_name_or_path: A preset under ``configs/model``, or a folder in diffusers' Wan layout.
            folder: The folder, where a preset is named first.
            family: Preset, or ``ModelFamily``, of a folder that is named first; Self-Forcing's unless given. A preset
                holds the folder to its size; a ``ModelFamily`` is taken as it is.
            numerics: ``native`` or ``upstream``.
            fast_vae: For ``use_fast_vae``.
            **kwargs: Of ``DiffusionPipeline.from_pretrained``, e.g. ``torch_dtype``, ``device_map``,
                ``quantization_config``; ``transformer``, ``vae``, ``text_encoder``, ``tokenizer`` and ``scheduler``
                may be objects, as in diffusers, or folders of their own.

        Raises:
            ValueError: If something is missing, is no safetensors, or does not fit, before any weight is loaded.
        """
        check_numerics(numerics)
        tiny_vae = None if fast_vae is None else load_tiny_vae(Path(fast_vae))
        name = str(pretrained_model_name_or_path)
        is_preset = name in family_names()
        if is_preset and family not in (None, name):
            raise ValueError(f"family={family!r} is given with the preset {name!r}: name one of them.")
        if folder is not None and not is_preset:
            raise ValueError(f"{name!r} is no preset to run '{folder}' by; known: {', '.join(family_names())}.")
        preset = name if is_preset else family if isinstance(family, str) else None
        settings = family if isinstance(family, ModelFamily) else load_family(preset or FOLDER_FAMILY)
        given = {part: kwargs.pop(part) for part in _CLASSES if kwargs.get(part) is not None}
        path = _folder(name, folder, settings, given) if is_preset else Path(name)
        where = f"'{path}'" if path else "what is given"
        if path is not None:
            check_model_folder(path, parts=[part for part in WEIGHTS if part not in given], preset=preset)
        configs = {} if path is None else _read_configs(path)
        configs |= {part: _config(part, value) for part, value in given.items()}
        _check_configs(configs, settings, where=where, size=settings.size if preset else None)
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        given = {part: _load(part, value, dtype) for part, value in given.items()}
        if path is not None:
            pipe = super().from_pretrained(str(path), use_safetensors=True, local_files_only=True, **given, **kwargs)
        else:
            pipe = cls._from_parts(given, settings, set(kwargs) - {"dtype", "torch_dtype"})
        pipe.family, pipe.numerics = settings, numerics
        use_fast_kernels(pipe.vae)
        pipe.use_fast_vae(tiny_vae)
        return pipe

    @classmethod
    def _from_parts(cls, given: Mapping[str, Any], settings: ModelFamily, unused: set[str]) -> Self:
        if unused:
            raise ValueError(f"{', '.join(sorted(unused))}: of use for a folder, not for given parts: leave it out.")
        shift = float(settings.sampler.get("flow_shift", 1.0))
        parts: dict[str, Any] = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)}
        return cls(**parts | dict(given))

    def enable_vae_tiling(self, **sizes: int) -> None:
        """Decode in overlapping tiles from the next video on: less memory at once, seams faded into each other.

        ``sizes`` are pixels, as ``AutoencoderKLWan.enable_tiling`` takes them, such as ``tile_sample_min_height``.
        """
        self.vae.enable_tiling(**sizes)

    def disable_vae_tiling(self) -> None:
        self.vae.disable_tiling()

    def use_fast_vae(self, vae: TinyVae | str | Path | None) -> None:
        """Decode videos that are started from now on with a small decoder or its file; None goes back to the VAE.

        Raises:
            ValueError: If the file cannot be read, or the decoder belongs to another VAE than the model's.
        """
        tiny_vae = load_tiny_vae(Path(vae)) if isinstance(vae, str | Path) else vae
        if tiny_vae is not None:
            layout, config = tiny_vae.layout, self.transformer.config
            compared = (
                ("channels in a latent", layout.latent_channels, config.in_channels),
                ("pixel frames to a latent frame", layout.frames_per_latent, self.vae_scale_factor_temporal),
                ("pixels to a latent position's side", layout.pixels_per_latent, self.vae_scale_factor_spatial),
            )
            for what, its, wanted in compared:
                if its != wanted:
                    raise ValueError(
                        f"the fast VAE has {its} {what}, this model has {wanted}: it was made for another VAE; leave "
                        "it out, or give the one of this model."
                    )
            tiny_vae.to(dtype=self.vae.dtype)
        self.tiny_vae = tiny_vae

    def pixel_stream(self) -> tuple[StreamingDecoder | TiledDecoder | StreamingTinyDecoder, VaePixels | TinyVae]:
        """A new decoder stream, and the model whose ``denormalise`` brings latents into its form."""
        if self.tiny_vae is None:
            return streaming_decoder(self.vae), VaePixels(self.vae)
        tiny_vae = self.tiny_vae.to(self._execution_device)
        return StreamingTinyDecoder(tiny_vae), tiny_vae


def check_model_folder(folder: Path, *, parts: Sequence[str] = WEIGHTS, preset: str | None = None) -> None:
    """Refuse a path that is no diffusers Wan folder with safetensors weights of some parts.

    Raises:
        ValueError: Says what is missing and what to do; ``preset`` names the family in it.
    """
    if folder.is_file() and folder.suffix in _CHECKPOINTS:
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
        suffixes = {entry.suffix: entry.name for entry in (folder / part).glob("*")}
        if ".safetensors" not in suffixes:
            pickles = [name for suffix, name in suffixes.items() if suffix in _CHECKPOINTS]
            if pickles:
                raise ValueError(
                    f"'{folder / part}' holds {pickles[0]}, a pickle, which can run code: convert it to safetensors."
                )
            raise ValueError(f"'{folder / part}' holds no .safetensors weights.")


def read_config(path: Path) -> dict[str, Any]:
    """Read a config file of diffusers."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no mapping of names to values: it is no config file of diffusers.")
    return values


def _read_configs(folder: Path) -> dict[str, Any]:
    """Configurations of a diffusers folder by part, as far as they are there, and its ``model_index``."""
    files = {part: folder / part / name for part, name in _CONFIG_FILES.items()}
    files["model_index"] = folder / "model_index.json"
    return {part: read_config(file) for part, file in files.items() if file.is_file()}


def _check_configs(configs: Mapping[str, Any], family: ModelFamily, *, where: str, size: str | None = None) -> None:
    """Refuse parts that are no causal Wan2.1 model, do not fit each other, or are not of the family's size.

    What is missing of ``configs`` (by part, and ``model_index``) is not checked; ``where`` is the subject of messages.
    """
    for part in ("transformer", "vae"):
        wanted = _CLASSES[part].__name__
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
    limit = configs.get("tokenizer", {}).get("model_max_length")
    if limit is not None and limit < family.max_sequence_length:
        raise ValueError(
            f"the tokenizer of {where} ends at {limit} tokens, and max_sequence_length={family.max_sequence_length} "
            "of this model family asks for more: take the tokenizer that belongs to the text encoder."
        )


def _check_kind(transformer: Mapping[str, Any], where: str) -> None:
    channels = transformer.get("in_channels", WAN21_CHANNELS)
    if channels == _WAN22_CHANNELS:
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


def _check_size(transformer: Mapping[str, Any], where: str, size: str) -> None:
    wanted = TRANSFORMERS[size] | {"in_channels": WAN21_CHANNELS}
    wrong = {key: transformer[key] for key, value in wanted.items() if transformer.get(key, value) != value}
    if not wrong:
        return
    found = ", ".join(f"{key}={value} instead of {wanted[key]}" for key, value in wrong.items())
    others = [name for name, shapes in TRANSFORMERS.items() if all(transformer.get(k) == v for k, v in shapes.items())]
    named = [name for name in family_names() if load_family(name).size in others]
    remedy = f"it is {others[0]}: name a preset of that size ({', '.join(named)})" if named else "give another folder"
    raise ValueError(
        f"the transformer of {where} is not of the size {size} that this model family has ({found}): {remedy}, or "
        "give the folder without a preset to run it like Self-Forcing at any size."
    )


def _folder(name: str, folder: str | Path | None, settings: ModelFamily, given: Mapping[str, Any]) -> Path | None:
    """Folder of a preset's weights; None when every part is given."""
    if folder is not None:
        return Path(folder)
    if settings.bundled is not None:
        return settings.bundled
    missing = [part for part in _CLASSES if part != "scheduler" and part not in given]
    if given and missing:
        raise ValueError(f"{name!r} is given {', '.join(given)}: give {', '.join(missing)} too, or a folder.")
    if missing:
        raise ValueError(
            f"model family {name!r} has no bundled weights: download them ({settings.homepage}), then give the "
            f"folder: from_pretrained({name!r}, FOLDER)."
        )
    return None


def _config(part: str, value: Any) -> Mapping[str, Any]:
    """Configuration of a given part; a folder's is read without loading it."""
    if isinstance(value, str | Path):
        path = Path(value)
        if not path.is_dir():
            raise ValueError(f"{part}='{path}' is no folder: give that part of a diffusers folder, or an object.")
        file = path / _CONFIG_FILES.get(part, "")
        return read_config(file) if file.is_file() else {}
    if part == "tokenizer":
        return {"model_max_length": value.model_max_length}
    if part == "text_encoder":
        return value.config.to_dict()
    return dict(value.config) | {"_class_name": type(value).__name__} if part in WEIGHTS else {}


def _load(part: str, value: Any, dtype: torch.dtype | Mapping[str, torch.dtype] | None) -> Any:
    """A given part: the object, or what its folder holds; ``dtype`` may be one by part, as in diffusers."""
    if not isinstance(value, str | Path):
        return value
    if part not in WEIGHTS:
        return _CLASSES[part].from_pretrained(str(value), local_files_only=True)
    if isinstance(dtype, Mapping):
        dtype = dtype.get(part, dtype.get("default"))
    chosen = {} if dtype is None else {"dtype": dtype}
    return _CLASSES[part].from_pretrained(str(value), local_files_only=True, use_safetensors=True, **chosen).eval()
