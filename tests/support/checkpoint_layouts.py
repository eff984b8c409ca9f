"""In what form each model family publishes its weights: files, entries, prefixes, naming, dtypes, adapters.

Source: the loaders of the families' own repositories; see docs/models.md for the table.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
RANKS = {"tiny": 4, "1.3B": 256, "14B": 256}

# Prefixes as training code leaves them: the wrapper's attribute, and FSDP around the network and around each block.
PLAIN = "{name}"
MODEL = "model.{name}"
FSDP = "model._fsdp_wrapped_module.{name}"
NESTED_FSDP = "model._fsdp_wrapped_module.blocks.{layer}._fsdp_wrapped_module.{inside}"
PEFT = "base_model.model.{name}.lora_{side}.weight"


@dataclass(frozen=True, kw_only=True)
class EntryLayout:
    """How one entry of a file names and stores a transformer.

    Attributes:
        prefix: ``name``, and inside blocks ``layer`` and ``inside`` where they stand apart.
        dtype: Of all its tensors.
        is_diffusers: Whether names are diffusers' instead of Wan's own.
        is_lora: Whether it holds adapters of all linear layers in the blocks.
    """

    prefix: str = PLAIN
    dtype: str = "float32"
    is_diffusers: bool = False
    is_lora: bool = False


@dataclass(frozen=True, kw_only=True)
class FileLayout:
    """One published file.

    Attributes:
        name: Below the repository, as published.
        entries: Entry name to layout; the empty name puts tensors at the top.
        extra: Further values of a pickle, such as a step counter.
    """

    name: str
    entries: Mapping[str, EntryLayout]
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_pickle(self) -> bool:
        """Whether ``torch.save`` writes it."""
        return not self.name.endswith(".safetensors")


def _pickle(name: str, /, *, extra: Mapping[str, Any] | None = None, **entries: EntryLayout) -> FileLayout:
    return FileLayout(name=name, entries=entries, extra=extra or {})


_BF16 = "bfloat16"
_LORA = EntryLayout(prefix=PEFT, is_lora=True)
_LORA_EXTRA = {"step": 3000}

# Family -> its files. Averaged weights (EMA) are float32 by construction; where the dtype is not known it is float32
# for training states and bfloat16 for what is meant for use.
FAMILIES: dict[str, tuple[FileLayout, ...]] = {
    "wan": (FileLayout(name="diffusion_pytorch_model.safetensors", entries={"": EntryLayout(dtype=_BF16)}),),
    "self_forcing": (
        _pickle(
            "checkpoints/self_forcing_dmd.pt",
            generator=EntryLayout(prefix=MODEL, dtype=_BF16),
            generator_ema=EntryLayout(prefix=MODEL),
        ),
    ),
    "self_forcing_ode": (_pickle("checkpoints/ode_init.pt", generator=EntryLayout(prefix=MODEL)),),
    "self_forcing_training": (
        _pickle(
            "checkpoint_model_000600/model.pt",
            generator=EntryLayout(prefix=MODEL),
            critic=EntryLayout(prefix=MODEL),
            generator_ema=EntryLayout(prefix=NESTED_FSDP),
        ),
    ),
    "infinite_forcing": (_pickle("ema_model.pt", generator_ema=EntryLayout(prefix=FSDP)),),
    "rolling_forcing": (
        _pickle(
            "checkpoints/rolling_forcing_dmd.pt",
            generator=EntryLayout(prefix=MODEL),
            generator_ema=EntryLayout(prefix=NESTED_FSDP),
        ),
    ),
    "causal_forcing_chunkwise": (_pickle("chunkwise/causal_forcing.pt", generator=EntryLayout(prefix=FSDP)),),
    "causal_forcing_framewise": (_pickle("framewise/causal_forcing.pt", generator=EntryLayout(prefix=FSDP)),),
    "causal_forcing_long": (_pickle("chunkwise/longvideo.pt", generator_ema=EntryLayout(prefix=FSDP)),),
    "longlive": (
        _pickle("models/longlive_base.pt", generator=EntryLayout(prefix=MODEL, dtype=_BF16)),
        _pickle("models/lora.pt", extra=_LORA_EXTRA, generator_lora=_LORA, critic_lora=_LORA),
    ),
    "anchor_forcing": (
        _pickle("base.pt", generator=EntryLayout(prefix=MODEL, dtype=_BF16)),
        _pickle("final.pt", **{"": _LORA}),
    ),
    "reward_forcing": (_pickle("rewardforcing.pt", **{"": EntryLayout(prefix=MODEL)}),),
    "causvid": (_pickle("autoregressive_checkpoint/model.pt", generator=EntryLayout(prefix=MODEL)),),
    "krea": (
        FileLayout(name="krea-realtime-video-14b.safetensors", entries={"": EntryLayout(prefix=MODEL, dtype=_BF16)}),
    ),
    "diffusers": (
        FileLayout(
            name="transformer/diffusion_pytorch_model.safetensors",
            entries={"": EntryLayout(dtype=_BF16, is_diffusers=True)},
        ),
    ),
}


def stored_name(name: str, layout: EntryLayout) -> str:
    """Name a weight as a file does.

    Args:
        name: Diffusers name.
        layout: Of the entry.

    Returns:
        The name with the layout's naming and prefixes.
    """
    own = name if layout.is_diffusers else original_name(name)
    parts = own.split(".")
    if parts[0] == "blocks":
        return layout.prefix.format(name=own, layer=parts[1], inside=".".join(parts[2:]))
    # Outside the blocks there is one wrapper less.
    outer = layout.prefix.partition("blocks.{layer}")[0]
    return outer + own if "{layer}" in layout.prefix else layout.prefix.format(name=own)


def contents(
    layout: EntryLayout, shapes: Mapping[str, tuple[int, ...]], *, rank: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """List what an entry holds.

    Args:
        layout: Of the entry.
        shapes: Diffusers name to shape of the transformer.
        rank: Of adapters.

    Returns:
        Stored name to (diffusers name of the weight; with ``.lora_A`` or ``.lora_B`` for factors, shape).
    """
    if not layout.is_lora:
        return {stored_name(name, layout): (name, shape) for name, shape in shapes.items()}
    found = {}
    for name, shape in shapes.items():
        if name.startswith("blocks.") and len(shape) == 2:
            own = original_name(name).removesuffix(".weight")
            found[layout.prefix.format(name=own, side="A")] = (f"{name}.lora_A", (rank, shape[1]))
            found[layout.prefix.format(name=own, side="B")] = (f"{name}.lora_B", (shape[0], rank))
    return found
