"""How a pipeline gets its weights, and how it keeps less of them in memory."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5EncoderModel

from longtake.configs.families import ModelFamily, family_names, load_family
from longtake.configs.loader import FOLDER_FAMILY
from longtake.models import use_fast_kernels
from longtake.pipelines.model_checks import check_configs, read_configs
from longtake.pipelines.model_folder import check_model_folder

CLASSES = {
    "transformer": WanTransformer3DModel,
    "vae": AutoencoderKLWan,
    "text_encoder": UMT5EncoderModel,
    "tokenizer": AutoTokenizer,
    "scheduler": FlowMatchEulerDiscreteScheduler,
}
WEIGHTS = ("transformer", "vae", "text_encoder")


class ModelLoading:
    """The part of ``LongVideoPipeline`` that loads models and lets go of them."""

    family: ModelFamily = ModelFamily()
    # Prompts that were encoded before the text encoder was freed.
    _embedded: ClassVar[Mapping[str, Tensor]] = MappingProxyType({})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path = "mini",
        folder: str | Path | None = None,
        *,
        family: str | ModelFamily | None = None,
        **kwargs,
    ) -> "ModelLoading":
        """Load a bundled model, a diffusers folder, or parts one by one.

        ``from_pretrained("mini")``, ``from_pretrained("self_forcing", "FOLDER")``, ``from_pretrained("FOLDER")``,
        or ``from_pretrained("self_forcing", transformer=..., vae=..., text_encoder=..., tokenizer=...)``.

        Args:
            pretrained_model_name_or_path: A preset under ``configs/model``, or a folder in diffusers' Wan layout.
            folder: The folder, where a preset is named first.
            family: How to run a folder that is named first: a preset, or a ``ModelFamily``. Without, it is run like
                Self-Forcing. A preset holds the folder to its size; a ``ModelFamily`` is taken as it is.
            **kwargs: Of ``DiffusionPipeline.from_pretrained``, e.g. ``torch_dtype``, ``device_map``,
                ``quantization_config``; ``transformer``, ``vae``, ``text_encoder``, ``tokenizer`` and ``scheduler``
                may be objects, as in diffusers, or folders of their own.

        Raises:
            ValueError: If something is missing, is no safetensors, or does not fit, before any weight is loaded.
        """
        name = str(pretrained_model_name_or_path)
        is_preset = name in family_names()
        if is_preset and family not in (None, name):
            raise ValueError(f"family={family!r} is given with the preset {name!r}: name one of them.")
        if folder is not None and not is_preset:
            raise ValueError(f"{name!r} is no preset to run '{folder}' by; known: {', '.join(family_names())}.")
        preset = name if is_preset else family if isinstance(family, str) else None
        settings = family if isinstance(family, ModelFamily) else load_family(preset or FOLDER_FAMILY)
        size = settings.size if preset else None
        given = {part: kwargs.pop(part) for part in CLASSES if kwargs.get(part) is not None}
        path = _folder(name, folder, settings, given) if is_preset else Path(name)
        where = f"'{path}'" if path else "what is given"
        if path is not None:
            check_model_folder(path, parts=[part for part in WEIGHTS if part not in given], preset=preset)
        configs = ({} if path is None else read_configs(path)) | {part: _config(part, given[part]) for part in given}
        check_configs(configs, settings, where=where, size=size)
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        given = {part: _load(part, value, dtype) for part, value in given.items()}
        if path is not None:
            pipe = super().from_pretrained(str(path), use_safetensors=True, local_files_only=True, **given, **kwargs)
        else:
            pipe = cls._from_parts(given, settings, set(kwargs) - {"dtype", "torch_dtype"})
        pipe.family = settings
        use_fast_kernels(pipe.vae)
        return pipe

    @classmethod
    def _from_parts(cls, given: Mapping[str, Any], settings: ModelFamily, unused: set[str]) -> "ModelLoading":
        if unused:
            raise ValueError(f"{', '.join(sorted(unused))}: of use for a folder, not for given parts: leave it out.")
        shift = float(settings.sampler.get("flow_shift", 1.0))
        default = FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)
        return cls(**{"scheduler": default} | dict(given))

    def enable_vae_tiling(self, **sizes: int) -> None:
        """Decode in overlapping tiles from the next video on: less memory at once, seams faded into each other.

        Args:
            **sizes: Pixels, as ``AutoencoderKLWan.enable_tiling`` takes them: ``tile_sample_min_height``,
                ``tile_sample_min_width``, ``tile_sample_stride_height``, ``tile_sample_stride_width``.
        """
        self.vae.enable_tiling(**sizes)

    def disable_vae_tiling(self) -> None:
        """Decode whole frames from the next video on."""
        self.vae.disable_tiling()

    def free_text_encoder(self, prompts: Sequence[str] = ()) -> None:
        """Encode prompts, keep what came out, and let the text encoder go.

        From then on only these prompts, and the empty one, can be shown; a video under way keeps those that it has.

        Args:
            prompts: All that will be asked for: first, negative and later ones, and those of states to be loaded.

        Raises:
            ValueError: If a prompt is empty or too long, or the encoder is gone and a prompt is not known.
        """
        texts = list(dict.fromkeys(["", *prompts]))
        known = {text: self.embed_text([text], is_negative=not text).cpu() for text in texts}
        self._embedded = dict(self._embedded) | known
        self.text_encoder = None
        # Offloading chains the components to each other and would keep the encoder alive.
        self.maybe_free_model_hooks()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _embed(self, text: str) -> Tensor:
        """(1, text_len, text_dim) of a text that has been checked."""
        if text in self._embedded:
            return self._embedded[text]
        if self.text_encoder is None:
            raise ValueError(
                f"the text encoder is freed and never read the prompt {text[:60]!r}: give it to free_text_encoder "
                "with the others, or load the model again."
            )
        limit = self.family.max_sequence_length
        return self.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=limit)[0]


def _folder(name: str, folder: str | Path | None, settings: ModelFamily, given: Mapping[str, Any]) -> Path | None:
    """Where a preset's weights are; None when every part is given."""
    if folder is not None:
        return Path(folder)
    if settings.folder is not None:
        return Path(str(files("longtake.models"))) / settings.folder
    missing = [part for part in CLASSES if part != "scheduler" and part not in given]
    if given and missing:
        raise ValueError(f"{name!r} is given {', '.join(given)}: give {', '.join(missing)} too, or a folder.")
    if missing:
        raise ValueError(
            f"model family {name!r} has no bundled weights: download them ({settings.homepage}), then give the "
            f"folder: from_pretrained({name!r}, FOLDER)."
        )
    return None


def _config(part: str, value: Any) -> Mapping[str, Any]:
    """What a given part says of itself; a folder is asked without loading it."""
    if isinstance(value, str | Path):
        path = Path(value)
        if not path.is_dir():
            raise ValueError(f"{part}='{path}' is no folder: give that part of a diffusers folder, or an object.")
        return read_configs(path.parent, names={part: path.name}).get(part, {})
    if part == "tokenizer":
        return {"model_max_length": value.model_max_length}
    if not isinstance(value, nn.Module):
        return {}
    config = value.config
    named = {"_class_name": type(value).__name__} if part in ("transformer", "vae") else {}
    return (config.to_dict() if part == "text_encoder" else dict(config)) | named


def _load(part: str, value: Any, dtype: torch.dtype | Mapping[str, torch.dtype] | None) -> Any:
    """A given part: the object, or what its folder holds; ``dtype`` may be one by part, as in diffusers."""
    if not isinstance(value, str | Path):
        return value
    if part not in WEIGHTS:
        return CLASSES[part].from_pretrained(str(value), local_files_only=True)
    if isinstance(dtype, Mapping):
        dtype = dtype.get(part, dtype.get("default"))
    chosen = {} if dtype is None else {"dtype": dtype}
    return CLASSES[part].from_pretrained(str(value), local_files_only=True, use_safetensors=True, **chosen).eval()
