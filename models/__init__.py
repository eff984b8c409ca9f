"""diffusers' Wan transformer made causal, streaming VAE, checkpoint conversion and the bundled mini model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from longtake.models.causal import CausalTransformer, Prompt, Segment
from longtake.models.streaming_vae import (
    StreamingDecoder,
    StreamingEncoder,
    TiledDecoder,
    VaePixels,
    streaming_decoder,
    use_fast_kernels,
)
from longtake.models.tiny_vae import StreamingTinyDecoder, TinyVae, load_tiny_vae

if TYPE_CHECKING:
    from longtake.models.bidirectional import allocated_wan, sparse_wan
    from longtake.models.conversion import convert_original_state_dict

__all__ = [
    "CausalTransformer",
    "Prompt",
    "Segment",
    "StreamingDecoder",
    "StreamingEncoder",
    "StreamingTinyDecoder",
    "TiledDecoder",
    "TinyVae",
    "VaePixels",
    "allocated_wan",
    "convert_original_state_dict",
    "load_tiny_vae",
    "sparse_wan",
    "streaming_decoder",
    "use_fast_kernels",
]

# No rollout needs these: only who names them pays for their import.
_LAZY = {
    "allocated_wan": "longtake.models.bidirectional",
    "sparse_wan": "longtake.models.bidirectional",
    "convert_original_state_dict": "longtake.models.conversion",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
