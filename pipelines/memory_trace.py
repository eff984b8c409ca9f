"""What a forward, a decode and a text take for the moment, found by running the real code on meta tensors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from longtake.cache import (
    BlockTrace,
    CachePolicy,
    CacheStats,
    Context,
    EncodeJob,
    Geometry,
    KVCache,
    Pass,
    PolicyState,
)
from longtake.cache.allocation import PlayedCache, attend_nothing
from longtake.cache.live_bytes import LiveBytes
from longtake.cache.simulation import PATCH, job_shape
from longtake.models import StreamingDecoder, use_fast_kernels
from longtake.models.causal import CausalTransformer, Prompt, Segment
from longtake.models.streaming_vae import FRAMES_PER_LATENT, Tiling
from longtake.pipelines.long_video import to_bytes, to_pixels
from longtake.pipelines.model_shapes import make_transformer, make_vae, meta_text_encoder

META = torch.device("meta")
_DEVICE_OF = torch.Tensor.device.__get__
_ONEDNN = torch.mkldnn_convolution


@dataclass(frozen=True)
class ForwardBytes:
    """What the transformer takes beside its weights and the cache.

    Attributes:
        text: Cross-attention keys and values and the text they are made from, of one guidance branch, all layers.
        activations: Most that exists for a moment.
    """

    text: int
    activations: int


@dataclass(frozen=True)
class DecodeBytes:
    """What decoding takes beside the VAE's weights.

    Attributes:
        features: The stream's memory of past frames, held all the time.
        activations: Most that exists for a moment, the block's pixels included.
        resting: Of the features of tiles that wait in host memory beside a GPU.
    """

    features: int
    activations: int
    resting: int = 0


class StandIn(TorchFunctionMode):
    """Lets meta tensors say that they are on a device, so that code goes the way it goes there.

    Args:
        device_type: ``cpu`` or ``cuda``.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device = torch.device(device_type)
        self._is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Tell the truth for a while."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Answer for the device, and keep on meta what is made on it."""
        if func == _DEVICE_OF:
            device = func(*args)
            return self.device if device.type == "meta" and not self._is_paused else device
        args = [self._on_meta(value) for value in args]
        kwargs = {key: self._on_meta(value) for key, value in (kwargs or {}).items()}
        if func is _ONEDNN:
            x, weight, bias, padding, stride, dilation, groups = args
            return torch.conv3d(x, weight, bias, stride, padding, dilation, groups)
        return func(*args, **kwargs)

    def _on_meta(self, value: Any) -> Any:
        return META if value is self.device else value  # this very object: others mean the processor itself


class TruthfulState(PolicyState):
    """A policy's state that sees meta tensors as what they are: it has ways of its own where nothing can be chosen.

    Args:
        state: What it stands for.
        stand_in: Paused while the state works.
    """

    def __init__(self, state: PolicyState, stand_in: StandIn) -> None:
        self._state = state
        self._stand_in = stand_in
        self.keeps_read_sets = state.keeps_read_sets

    def select(self, layer: int, pass_: Pass, q: Tensor | None = None) -> Context:
        with self._stand_in.paused():
            return self._state.select(layer, pass_, q)

    def commit(self, layer: int, pass_: Pass, q: Tensor, k: Tensor, v: Tensor) -> None:
        with self._stand_in.paused():
            self._state.commit(layer, pass_, q, k, v)

    def end_block(self, trace: BlockTrace) -> list[EncodeJob]:
        with self._stand_in.paused():
            return self._state.end_block(trace)

    def stats(self) -> CacheStats:
        return self._state.stats()

    def state_dict(self) -> dict[str, Any]:
        return self._state.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state.load_state_dict(state)


@contextmanager
def standing_in(device_type: str, cache: KVCache | None = None) -> Iterator[None]:
    """Let meta tensors pass for those of a device, but for what the cache's policy does with them."""
    stand_in = StandIn(device_type)
    state = None if cache is None else cache.state
    try:
        if state is not None:
            cache.state = TruthfulState(state, stand_in)
        with torch.no_grad(), stand_in:
            yield
    finally:
        if state is not None:
            cache.state = state


def trace_forward(
    config: Mapping[str, Any],
    policy: CachePolicy,
    geometry: Geometry,
    *,
    num_blocks: int,
    device_type: str,
    num_text_tokens: int,
    merges_commit: bool,
    window_blocks: int = 1,
) -> ForwardBytes:
    """Run one layer over a block: its first denoising pass and its commit, with a cache that is filled.

    Args:
        config: Of the transformer.
        policy: Of the cache, as ``chosen_policy`` returns it.
        geometry: Of the rollout.
        num_blocks: Blocks after which the cache is full.
        device_type: Where the rollout will run.
        num_text_tokens: Length of the text.
        merges_commit: Whether commits share a forward with the next block's first pass.
        window_blocks: Blocks that are denoised together.
    """
    causal = CausalTransformer(make_transformer(config, geometry.dtype, num_layers=1), attention=attend_nothing)
    channels, text_dim = causal.transformer.config.in_channels, causal.transformer.config.text_dim
    text = (geometry.batch_size, num_text_tokens, text_dim)
    prompt = Prompt(torch.empty(text, dtype=geometry.dtype, device=META))
    with LiveBytes() as live:
        played = _filled(policy, geometry, num_blocks, window_blocks=window_blocks, latent_channels=channels)
        merges_commit = merges_commit and played.cache.merges_commit
        with standing_in(device_type, played.cache), causal.installed():
            # The first round makes what stays: text keys and values, modulation, buffers.
            for _ in range(2):
                before = live.now
                live.restart()
                _run_block(causal, played, prompt, merges_commit=merges_commit, window_blocks=window_blocks)
    per_layer = sum(tensor.nbytes for tensor in prompt.keys_values[0])
    text_bytes = prompt.embeds.nbytes + prompt.projected.nbytes + geometry.num_layers * per_layer
    return ForwardBytes(text_bytes, live.peak - before)


def _run_block(
    causal: CausalTransformer, played: PlayedCache, prompt: Prompt, *, merges_commit: bool, window_blocks: int
) -> None:
    """Denoise a block, or a window, and commit it: alone, or together with the next block's first pass."""
    cache, index, size = played.cache, played.num_blocks, played.geometry.frames_per_block
    start, block = index * size, played.latents()
    levels = tuple(float(1 + level) for level in range(window_blocks))
    denoise = Segment(Pass("denoise", index, start, size * window_blocks), levels)
    commit = Segment(Pass("commit", index, start, size), 0.0)
    causal.flow(torch.cat((block,) * window_blocks, dim=1), segments=[denoise], cache=cache, prompt=prompt)
    if merges_commit and window_blocks == 1:
        following = Segment(Pass("denoise", index + 1, start + size, size), 1.0)
        both = torch.cat((block, block), dim=1)
        causal.flow(both, segments=[commit, following], cache=cache, prompt=prompt)
    else:
        causal.flow(block, segments=[commit], cache=cache, prompt=prompt)
    for job in cache.end_block(BlockTrace(index, start, block)):
        num_frames, grid = job_shape(job, played.geometry)
        latents = block
        if grid is not None:
            latents = block.new_empty(*block.shape[:1], num_frames, block.shape[2], *(PATCH * side for side in grid))
        pass_ = Pass("encode", index, job.start_frame, num_frames, label=job.label, grid=grid)
        causal.flow(latents, segments=[Segment(pass_, 0.0)], cache=cache, prompt=prompt, tokens=job.tokens)
    played.num_blocks += 1


def trace_decode(
    config: Mapping[str, Any], latents: tuple[int, int, int, int, int], *, dtype: torch.dtype, device_type: str
) -> DecodeBytes:
    """Decode a block in the middle of a stream.

    Args:
        config: Of the VAE.
        latents: (batch, channels, frames, height, width) of a block.
        dtype: Of the VAE.
        device_type: Where it will run.
    """
    vae = make_vae(config, dtype)
    use_fast_kernels(vae)
    z = torch.empty(latents, dtype=dtype, device=META)
    with LiveBytes() as live, standing_in(device_type):
        decoder = StreamingDecoder(vae)
        for _ in range(2):
            decoder.decode(z[:, :, :1])
        features = live.now
        live.restart()
        to_bytes(to_pixels(decoder.decode(z)))
    return DecodeBytes(features, live.peak - features)


def trace_tiled_decode(
    config: Mapping[str, Any], latents: tuple[int, int, int, int, int], *, dtype: torch.dtype, device_type: str
) -> DecodeBytes:
    """Decode a block in tiles of diffusers' own size: one tile's features are at work, the others' rest.

    Args:
        config: Of the VAE.
        latents: (batch, channels, frames, height, width) of a block.
        dtype: Of the VAE.
        device_type: Where it will run.
    """
    vae = make_vae(config, dtype)
    vae.enable_tiling()
    tiling = Tiling.of(vae)
    batch, channels, frames, height, width = latents
    rows, columns = tiling.starts(height, width)
    tile = (min(height, tiling.height), min(width, tiling.width))
    alone = trace_decode(config, (batch, channels, frames, *tile), dtype=dtype, device_type=device_type)
    # The last row and column of tiles are as large as what is left.
    positions = sum(min(tile[0], height - row) for row in rows) * sum(min(tile[1], width - left) for left in columns)
    resting = alone.features * positions // (tile[0] * tile[1]) - alone.features
    # Pixels of all tiles are held until they are blended, then the frame as bytes is made of them.
    ratio = vae.spatial_compression_ratio
    pixels = 3 * batch * frames * FRAMES_PER_LATENT * ratio * ratio
    blending = (
        pixels * (positions + height * width) * dtype.itemsize + pixels * height * width * torch.float32.itemsize
    )
    activations = max(alone.activations, blending)
    if device_type == "cpu":
        return DecodeBytes(alone.features + resting, activations)
    return DecodeBytes(alone.features, activations, resting)


def trace_text(config: Mapping[str, Any], *, num_tokens: int, dtype: torch.dtype, device_type: str) -> int:
    """Bytes that encoding a text takes beside the encoder's weights: one layer, as all are alike."""
    encoder = meta_text_encoder(config, dtype, num_layers=1)
    ids = torch.empty((1, num_tokens), dtype=torch.long, device=META)
    with LiveBytes() as live, standing_in(device_type):
        encoder(ids)  # the mask of a padded text is a few bytes, and looks at values
    return live.peak


def _filled(policy: CachePolicy, geometry: Geometry, num_blocks: int, **settings: int) -> PlayedCache:
    """A cache of one layer with ``num_blocks`` blocks in it; of all layers where the policy takes no fewer."""
    try:
        played = PlayedCache(policy, replace(geometry, num_layers=1), **settings)
        played.next_block()
    except (ValueError, RuntimeError, IndexError):
        played = PlayedCache(policy, geometry, **settings)
    while played.num_blocks < num_blocks:
        played.next_block()
    return played
