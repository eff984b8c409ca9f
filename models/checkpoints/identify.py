"""Recognition of named tensors: a Wan transformer, an adapter, another part of Wan, or something else."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from longtake.models.checkpoints.files import TensorInfo
from longtake.models.conversion import diffusers_name, strip_wrappers, wrappers_in

_Kind = Literal["transformer", "lora", "vae", "text_encoder", "unmerged", "relative", "other"]

NUM_LATENT_CHANNELS_5B = 48
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_LORA = re.compile(r"(?:^|[._])lora_(?:A|B|down|up)\.")
_VAE = re.compile(r"(?:en|de)coder\.(?:conv1|conv_in|middle\.0\.residual\.0|mid_block\.resnets\.0\.norm1)\.\w+")
_TEXT_ENCODER = re.compile(
    r"token_embedding\.weight|blocks\.\d+\.ffn\.gate\.0\.weight|shared\.weight"
    r"|(?:encoder\.)?block\.\d+\.layer\.0\.SelfAttention\.q\.weight"
)
# Models built around a Wan transformer, by names that only they have.
_RELATIVES = {
    "vace_blocks.": "Wan-VACE (video editing)",
    "face_adapter.": "Wan-Animate",
    "casual_audio_encoder.": "Wan-S2V (speech to video)",
    "visual.transformer.": "the CLIP image encoder of Wan's image-to-video models",
}


@dataclass(frozen=True)
class Identity:
    """Kind of an entry of a checkpoint."""

    kind: _Kind  # transformer, or another
    title: str  # the same for people, with its particulars
    naming: str = ""  # original or diffusers; empty where that is no question
    wrappers: tuple[str, ...] = ()  # prefixes of training code that were found


def identify(tensors: Mapping[str, TensorInfo]) -> Identity:
    """Recognise an entry by its names as stored; for anything unknown the kind is ``other``."""
    stripped = [strip_wrappers(name) for name in tensors]
    wrappers = tuple(wrappers_in(tensors))
    num_adapters = sum(_LORA.search(name) is not None for name in stripped)

    def naming(*theirs: str) -> str:
        return "diffusers" if any(part in name for name in stripped for part in theirs) else "original"

    if num_adapters and any(".base_layer." in name for name in stripped):
        return Identity("unmerged", "a model with adapters that are not merged", wrappers=wrappers)
    if num_adapters:
        return Identity("lora", f"a LoRA adapter ({num_adapters // 2} pairs)", wrappers=wrappers)
    for sign, title in _RELATIVES.items():
        if any(name.startswith(sign) for name in stripped):
            return Identity("relative", title, wrappers=wrappers)
    if any(_VAE.fullmatch(name) for name in stripped):
        return Identity("vae", "a Wan VAE", naming("mid_block."), wrappers)
    if any(_TEXT_ENCODER.fullmatch(name) for name in stripped):
        return Identity("text_encoder", "a UMT5 text encoder", naming("SelfAttention"), wrappers)
    num_known = sum(diffusers_name(name) is not None for name in stripped)
    if 2 * num_known > len(stripped):
        theirs = naming("condition_embedder.", ".attn1.", ".attn2.")
        return Identity("transformer", "a Wan transformer", theirs, wrappers)
    return Identity("other", f"no part of Wan: {len(stripped)} tensors such as {_some(stripped)}", wrappers=wrappers)


def require_transformer(path: object, tensors: Mapping[str, TensorInfo]) -> Identity:
    """Refuse anything but a transformer of Wan2.1's family, saying what to do with it."""
    found = identify(tensors)
    remedies = {
        "lora": "no model: convert the base it belongs to and give this file as its adapter (--lora)",
        "unmerged": "merge them first (peft: merge_and_unload), or give base and adapter as two files",
        "vae": "no transformer: give it as VAE (--vae) beside a transformer",
        "text_encoder": "no transformer: give it as text encoder (--text-encoder) beside a transformer",
        "relative": "which longtake does not run: give a text- or image-to-video transformer of Wan2.1",
        "other": "give a text- or image-to-video transformer of Wan2.1, in original or diffusers naming",
    }
    if found.kind != "transformer":
        raise ValueError(f"'{path}' is {found.title}, {remedies[found.kind]}.")
    patch = next((i for n, i in tensors.items() if strip_wrappers(n) == "patch_embedding.weight"), None)
    if patch is not None and len(patch.shape) == 5 and patch.shape[1] == NUM_LATENT_CHANNELS_5B:
        raise ValueError(
            f"'{path}' is a Wan2.2-TI2V-5B transformer ({NUM_LATENT_CHANNELS_5B} latent channels, a VAE of its own), "
            "which longtake does not run: give a model trained from Wan2.1 (16 latent channels)."
        )
    require_floats(path, tensors)
    return found


def require_floats(path: object, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse quantised weights, whose scales are not known."""
    odd = {name: str(info.dtype).removeprefix("torch.") for name, info in tensors.items() if info.dtype not in _FLOATS}
    if odd:
        raise ValueError(
            f"'{path}' stores {len(odd)} of {len(tensors)} tensors as {', '.join(sorted(set(odd.values())))} "
            f"({_some(odd)}): quantised weights are not converted; give the float16, bfloat16 or float32 file."
        )


def _some(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:3])
