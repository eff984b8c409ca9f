"""Form in which each model family publishes its weights: files, entries, prefixes, naming, dtypes, adapters.

Source: the loaders of the families' own repositories; see docs/models.md for the table.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from longtake.models.conversion import original_name

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 8,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
    },
    "1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "14B": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
}
RANKS = {"tiny": 4, "1.3B": 256, "14B": 256}  # of adapters


@dataclass(frozen=True, kw_only=True)
class EntryLayout:
    """Names and storage of a transformer, or of adapters of all linear layers in its blocks, in an entry of a file."""

    prefix: str = "{name}"  # also `layer` and `inside` of names in blocks; `side` of an adapter
    dtype: str = "float32"
    is_diffusers: bool = False  # names are diffusers' instead of Wan's own
    is_lora: bool = False


# Prefixes as training code leaves them: the wrapper's attribute, and FSDP around the network and around each block.
MODEL = EntryLayout(prefix="model.{name}")
FSDP = EntryLayout(prefix="model._fsdp_wrapped_module.{name}")
NESTED_FSDP = EntryLayout(prefix="model._fsdp_wrapped_module.blocks.{layer}._fsdp_wrapped_module.{inside}")
LORA = EntryLayout(prefix="base_model.model.{name}.lora_{side}.weight", is_lora=True)
WAN_BF16 = EntryLayout(dtype="bfloat16")
MODEL_BF16 = replace(MODEL, dtype="bfloat16")

# Family -> file -> entry -> layout, or another value; the empty entry puts tensors at the top. Averaged weights (EMA)
# are float32 by construction; where the dtype is not known it is float32 for training states and bfloat16 for what is
# meant for use.
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "wan": {"diffusion_pytorch_model.safetensors": {"": WAN_BF16}},
    "self_forcing": {"checkpoints/self_forcing_dmd.pt": {"generator": MODEL_BF16, "generator_ema": MODEL}},
    "self_forcing_ode": {"checkpoints/ode_init.pt": {"generator": MODEL}},
    "self_forcing_training": {
        "checkpoint_model_000600/model.pt": {"generator": MODEL, "critic": MODEL, "generator_ema": NESTED_FSDP}
    },
    "infinite_forcing": {"ema_model.pt": {"generator_ema": FSDP}},
    "rolling_forcing": {"checkpoints/rolling_forcing_dmd.pt": {"generator": MODEL, "generator_ema": NESTED_FSDP}},
    "causal_forcing_chunkwise": {"chunkwise/causal_forcing.pt": {"generator": FSDP}},
    "causal_forcing_framewise": {"framewise/causal_forcing.pt": {"generator": FSDP}},
    "causal_forcing_long": {"chunkwise/longvideo.pt": {"generator_ema": FSDP}},
    "longlive": {
        "models/longlive_base.pt": {"generator": MODEL_BF16},
        "models/lora.pt": {"generator_lora": LORA, "critic_lora": LORA, "step": 3000},
    },
    "anchor_forcing": {"base.pt": {"generator": MODEL_BF16}, "final.pt": {"": LORA}},
    "reward_forcing": {"rewardforcing.pt": {"": MODEL}},
    "causvid": {"autoregressive_checkpoint/model.pt": {"generator": MODEL}},
    "krea": {"krea-realtime-video-14b.safetensors": {"": MODEL_BF16}},
    "diffusers": {"transformer/diffusion_pytorch_model.safetensors": {"": replace(WAN_BF16, is_diffusers=True)}},
}


def shapes_of(size: str) -> dict[str, tuple[int, ...]]:
    """Diffusers name to shape, in the order of the class."""
    with torch.device("meta"):
        model = WanTransformer3DModel(**SIZES[size])
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def contents(
    layout: EntryLayout, shapes: Mapping[str, tuple[int, ...]], *, rank: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """List what an entry holds, of a transformer with these shapes by diffusers name.

    Returns:
        Stored name to (diffusers name of the weight; with ``.lora_A`` or ``.lora_B`` for factors, shape).
    """
    if not layout.is_lora:
        return {_stored_name(name, layout): (name, shape) for name, shape in shapes.items()}
    found = {}
    for name, shape in shapes.items():
        if name.startswith("blocks.") and len(shape) == 2:
            own = original_name(name).removesuffix(".weight")
            found[layout.prefix.format(name=own, side="A")] = (f"{name}.lora_A", (rank, shape[1]))
            found[layout.prefix.format(name=own, side="B")] = (f"{name}.lora_B", (shape[0], rank))
    return found


def _stored_name(name: str, layout: EntryLayout) -> str:
    own = name if layout.is_diffusers else original_name(name)
    parts = own.split(".")
    if parts[0] == "blocks":
        return layout.prefix.format(name=own, layer=parts[1], inside=".".join(parts[2:]))
    # Outside the blocks there is one wrapper less.
    outer = layout.prefix.partition("blocks.{layer}")[0]
    return outer + own if "{layer}" in layout.prefix else layout.prefix.format(name=own)
