"""diffusers' Wan transformer made causal, streaming VAE, checkpoint conversion and the bundled mini model."""

from longtake.models.bidirectional import sparse_wan
from longtake.models.causal import CausalTransformer, Prompt, Segment
from longtake.models.conversion import convert_original_state_dict
from longtake.models.streaming_vae import (
    StreamingDecoder,
    StreamingEncoder,
    TiledDecoder,
    VaePixels,
    streaming_decoder,
    use_fast_kernels,
)
from longtake.models.tiny_vae import StreamingTinyDecoder, TinyVae, load_tiny_vae

__all__ = [
    "CausalTransformer",
    "Prompt",
    "Segment",
    "StreamingDecoder",
    "StreamingEncoder",
    "TiledDecoder",
    "StreamingTinyDecoder",
    "TinyVae",
    "VaePixels",
    "convert_original_state_dict",
    "load_tiny_vae",
    "sparse_wan",
    "streaming_decoder",
    "use_fast_kernels",
]
