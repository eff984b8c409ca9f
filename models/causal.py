"""diffusers' own Wan transformer, made causal by attention processors and hooks, and stock again between blocks."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.transformers.transformer_wan import WanTimeTextImageEmbedding
from torch import Tensor, nn

from longtake.attention import Attention, fastest
from longtake.cache import Geometry, KVCache, Pass
from longtake.models.numerics import (
    Modulations,
    Numerics,
    check_numerics,
    embed_time,
    numerics_hooks,
)
from longtake.models.wan import (
    AttentionProcessor,
    blocks_of,
    config_of,
    execution_device,
    processors_set,
    project_out,
    project_qkv,
    stock_forward,
)

# Handing a matmul to a sleeping thread costs tens of microseconds: more than the whole product takes below about this
# many operations.
_SINGLE_THREAD_FLOPS = 30_000_000
_AWAKE_SPINS = 5_000  # rounds of waiting with which OpenMP finds its threads awake between two products
_HOOK = "longtake_causal"


@contextmanager
def fitting_threads(*, width: int, num_tokens: int, device: torch.device) -> Iterator[None]:
    """Compute forwards of few tokens over the batch on one CPU thread, if the others sleep.

    The number of threads is as before after the ``with`` block.
    """
    before = torch.get_num_threads()
    is_small = device.type == "cpu" and 2 * num_tokens * width**2 < _SINGLE_THREAD_FLOPS
    if not is_small or before == 1 or not _threads_sleep():
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _threads_sleep() -> bool:
    """Tell if idle threads go to sleep at once, going by the OpenMP settings of this process."""
    spins = os.environ.get("GOMP_SPINCOUNT", "")
    if spins.isdigit():
        return int(spins) < _AWAKE_SPINS
    return not spins and os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"


@dataclass
class Prompt:
    """Text of one guidance branch, with everything that is computed from it once."""

    embeds: Tensor  # (batch, text_len, text_dim), as the text encoder made them
    projected: Tensor | None = None  # the same through the transformer's text embedder, when it has been needed
    keys_values: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of cross-attention, by layer


@dataclass(frozen=True)
class Segment:
    """Consecutive frames of one forward that share a pass."""

    pass_: Pass  # their kind and place in the cache; they attend to each other
    timestep: float | tuple[float, ...]  # of all frames, or one per equal part of them, in order

    @property
    def timesteps(self) -> tuple[float, ...]:
        return self.timestep if isinstance(self.timestep, tuple) else (self.timestep,)

    @property
    def part_frames(self) -> float:
        return self.pass_.num_frames / len(self.timesteps)


@dataclass
class _Call:
    cache: KVCache
    prompt: Prompt
    segments: tuple[Segment, ...]
    tokens: Tensor | None = None

    @property
    def timesteps(self) -> tuple[float, ...]:
        return tuple(timestep for segment in self.segments for timestep in segment.timesteps)

    def num_tokens(self, segment: Segment) -> int:
        rows, columns = segment.pass_.grid or (self.cache.geometry.num_rows, self.cache.geometry.num_columns)
        return segment.pass_.num_frames * rows * columns


class CausalTransformer:
    """A transformer that attends to a KV cache.

    The module itself is untouched: ``installed`` puts processors and hooks on it and takes them off again.

    Args:
        transformer: Any ``WanTransformer3DModel`` of the text-to-video kind.
        attention: Dense attention of (batch, tokens, heads, head_dim) tensors; None takes the fastest here.
        numerics: Where half precision is rounded: ``native``, or ``upstream`` as Self-Forcing's code does.

    Raises:
        ValueError: If the transformer has another class or wants image conditioning, or does not fit ``numerics``.
    """

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        *,
        attention: Attention | None = None,
        numerics: Numerics = "native",
    ) -> None:
        if not isinstance(transformer, nn.Module) or not hasattr(transformer, "blocks"):
            raise ValueError(f"a WanTransformer3DModel is needed, not {type(transformer).__name__}.")
        config = config_of(transformer)
        if config.added_kv_proj_dim is not None:
            raise ValueError("this transformer is conditioned on images (added_kv_proj_dim is set): use a T2V model.")
        if config.patch_size[0] != 1:
            raise ValueError(f"patch_size={config.patch_size} joins frames: only (1, h, w) can be causal.")
        self.transformer = transformer
        # Both walk all parameters in diffusers, which would cost more than a small model's matmuls.
        self.dtype: torch.dtype = transformer.dtype
        self.device: torch.device = execution_device(transformer)
        self.attention = attention or fastest(self.device, self.dtype)
        check_numerics(numerics)
        self._numerics: Numerics = numerics
        self.is_upstream = numerics == "upstream"
        if self.is_upstream and any(weight.is_meta for weight in transformer.parameters()):
            raise ValueError(
                "numerics='upstream' reads weights that are offloaded layer by layer (sequential offload): offload "
                "whole models, or use numerics 'native'."
            )
        self.latent_dtype: torch.dtype = self.dtype if self.is_upstream else torch.float32
        self.phase_dtype: torch.dtype = torch.complex128 if self.is_upstream else torch.complex64
        self._call: _Call | None = None
        self._modulations = Modulations(dtype=self.latent_dtype)
        self._embedded: dict[float, Tensor] = {}

    def geometry(
        self,
        frame_shape: Sequence[int],
        *,
        frames_per_block: int,
        batch_size: int = 1,
        max_frames: int | None = None,
    ) -> Geometry:
        """Shapes of a rollout of (channels, height, width) latents."""
        config = config_of(self.transformer)
        channels, height, width = frame_shape
        if channels != config.in_channels:
            raise ValueError(f"latents have {channels} channels, this transformer takes {config.in_channels}.")
        _, patch_height, patch_width = config.patch_size
        if height % patch_height or width % patch_width or min(height, width) < 1:
            raise ValueError(
                f"latent size {height}x{width} is not divisible by the patch {patch_height}x{patch_width}: "
                "choose a pixel size divisible by the VAE's factor times the patch."
            )
        return Geometry(
            num_layers=config.num_layers,
            num_heads=config.num_attention_heads,
            head_dim=config.attention_head_dim,
            num_rows=height // patch_height,
            num_columns=width // patch_width,
            frames_per_block=frames_per_block,
            batch_size=batch_size,
            max_frames=max_frames,
            dtype=self.dtype,
            device=self.device,
        )

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Make the transformer causal inside the ``with`` block, and stock again after it, whatever happens."""
        processors = []
        for layer, block in enumerate(blocks_of(self.transformer)):
            processors += [(block.attn1, _CachedSelfAttention(self, layer))]
            processors += [(block.attn2, _CachedCrossAttention(self, layer))]
        with ExitStack() as undo:
            undo.callback(setattr, self, "_call", None)
            for module, hook in self._hooks():
                registry = HookRegistry.check_if_exists_or_initialize(module)
                undo.callback(registry.remove_hook, _HOOK, recurse=False)
                registry.register_hook(hook, _HOOK)
            undo.enter_context(processors_set(processors))
            yield

    def _hooks(self) -> list[tuple[nn.Module, ModelHook]]:
        model = self.transformer
        return [
            (model.rope, _NoTable()),
            (model.condition_embedder, _CachedConditions(self)),
            (model.patch_embedding, _AddedTokens(self)),
            *numerics_hooks(model, self._numerics, self._modulations, self._timesteps, self._time_rows),
        ]

    @torch.no_grad()
    def flow(
        self,
        x: Tensor,
        *,
        segments: Sequence[Segment],
        cache: KVCache,
        prompt: Prompt,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Predict the flow (noise - clean) of consecutive frames, each segment at its own timestep.

        Args:
            x: (batch, frames, channels, height, width), the segments' frames in order.
            segments: Passes of the frames; a later segment sees what an earlier one has committed.
            cache: Keys and values to attend to.
            prompt: Text of the guidance branch.
            tokens: (batch, dim, frames, rows, columns) added to the patch embedding of ``x``.

        Returns:
            Shape and dtype of ``x``.

        Raises:
            ValueError: If a segment after the first is a commit, the lengths of their parts differ, or ``tokens`` has
                another shape than the patch embedding.
        """
        if any(segment.pass_.kind == "commit" for segment in segments[1:]):
            raise ValueError("only the first segment of a forward can be a commit: later ones read what it stores.")
        lengths = {segment.part_frames for segment in segments}
        if len(lengths) != 1 or lengths != {int(length) for length in lengths}:
            found = [f"{length:g}" for length in sorted(lengths)]
            raise ValueError(f"segments of {', '.join(found)} frames in one forward: they have to be equally long.")
        self._call = _Call(cache, prompt, tuple(segments), tokens)
        timestep = torch.zeros((x.shape[0], 1) if len(self._call.timesteps) > 1 else (x.shape[0],), device=x.device)
        sample = self.transformer(
            hidden_states=x.to(self.dtype).transpose(1, 2),
            timestep=timestep,  # only its rank matters: the embedding of each segment's timestep is looked up
            encoder_hidden_states=prompt.embeds,
            return_dict=False,
        )[0]
        return sample.transpose(1, 2).to(x.dtype)

    def clean(self, x: Tensor, flow: Tensor, timestep: float) -> Tensor:
        """The clean latents that a predicted flow points to: x - sigma flow, shape and dtype of ``x``."""
        sigma = timestep / 1000.0
        if not self.is_upstream:
            return x - sigma * flow
        # Self-Forcing computes in float64, with sigma as its table holds it.
        sigma = torch.tensor(sigma, dtype=torch.float32).item()
        return (x.double() - sigma * flow.double()).to(x.dtype)

    def _timesteps(self) -> tuple[float, ...]:
        return self.call.timesteps

    def _time_rows(self) -> list[Tensor]:
        return [self._embedded[timestep] for timestep in self.call.timesteps]

    @property
    def call(self) -> _Call:
        if self._call is None:
            raise RuntimeError("a causal transformer has to be called through CausalTransformer.flow.")
        return self._call


class _NoTable(ModelHook):
    """Skips diffusers' position table (1,024 frames from 0): the cache computes the angles."""

    def new_forward(self, module: nn.Module, *args, **kwargs) -> None:
        return None


class _CausalHook(ModelHook):
    def __init__(self, causal: CausalTransformer) -> None:
        super().__init__()
        self.causal = causal


class _CachedConditions(_CausalHook):
    """Embeds every timestep and every prompt once; the segments of one forward may differ in their timestep."""

    def new_forward(self, module: WanTimeTextImageEmbedding, timestep, encoder_hidden_states, *others, **kwargs):
        call, embedded, projected = self.causal.call, self.causal._embedded, self.causal._modulations.projected
        forward, prompt = stock_forward(self), call.prompt
        if prompt.projected is None:
            zero = torch.zeros(1, device=encoder_hidden_states.device)
            prompt.projected = forward(zero, encoder_hidden_states)[2]
        timesteps = call.timesteps
        for timestep in timesteps:
            if timestep in projected:
                continue
            if self.causal.is_upstream:
                temb, projection = embed_time(module, timestep, like=encoder_hidden_states)
            else:
                level = torch.full((1,), timestep, device=encoder_hidden_states.device)
                temb, projection = forward(level, encoder_hidden_states[:1, :1])[:2]
            embedded[timestep], projected[timestep] = temb, projection
        if len(timesteps) == 1:
            return embedded[timesteps[0]], projected[timesteps[0]], prompt.projected, None
        # Only the output norm still reads these: the blocks take theirs from ``Modulations``.
        size = sum(map(call.num_tokens, call.segments)) // len(timesteps)
        rows = [embedded[timestep].expand(size, -1) for timestep in timesteps]
        per_token = projected[timesteps[0]][:, None]
        return torch.cat(rows)[None], per_token, prompt.projected, None


class _AddedTokens(_CausalHook):
    """Adds a forward's own tokens to the patch embedding."""

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        tokens = self.causal.call.tokens
        if tokens is None:
            return output
        if tokens.shape != output.shape:
            raise ValueError(
                f"tokens of shape {tuple(tokens.shape)} cannot be added to a patch embedding of shape "
                f"{tuple(output.shape)} (batch, dim, frames, rows, columns)."
            )
        return output + tokens.to(output)


class _CachedSelfAttention(AttentionProcessor[CausalTransformer]):
    """Hands un-rotated queries, keys and values to the cache, one segment after the other."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        call = self.owner.call
        q, k, v = project_qkv(attn, hidden_states)
        if len(call.segments) == 1:
            return project_out(attn, call.cache.attend(self.layer, q, k, v, call.segments[0].pass_))
        counts = [call.num_tokens(segment) for segment in call.segments]
        parts = zip(q.split(counts, 1), k.split(counts, 1), v.split(counts, 1), call.segments, strict=True)
        out = [call.cache.attend(self.layer, q, k, v, segment.pass_) for q, k, v, segment in parts]
        return project_out(attn, torch.cat(out, dim=1))


class _CachedCrossAttention(AttentionProcessor[CausalTransformer]):
    """Cross-attention whose text keys and values are computed once per prompt."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        known = self.owner.call.prompt.keys_values
        heads = (attn.heads, -1)
        if self.layer not in known:
            if attn.fused_projections:
                k, v = attn.to_kv(encoder_hidden_states).chunk(2, dim=-1)
            else:
                k, v = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
            known[self.layer] = attn.norm_k(k).unflatten(2, heads), v.unflatten(2, heads)
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, heads)
        return project_out(attn, self.owner.attention(q, *known[self.layer]))
