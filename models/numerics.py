"""A block's arithmetic: stock with fused products and cached modulation, or rounded as Self-Forcing's published code.

``native``: same modules, same weights, same float32 residual arithmetic; products and sums are fused, so results
differ from stock by rounding (a test bounds it). Segments of one forward are modulated by broadcasting over their
tokens: nothing of the size (tokens, 6, dim) is ever made.

``upstream``: the published code holds the whole model in the activation dtype and computes in it, except where noted
here. In float32 nothing is rounded, and every hook below is the stock arithmetic up to the order of sums.

Source: Self-Forcing, 33593df; docs/models.md has the list.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import ModelHook
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_wan import WanTimeTextImageEmbedding, WanTransformerBlock
from torch import Tensor, nn
from torch.nn import functional

from longtake.models.wan import blocks_of, offload_hooks

Numerics = Literal["native", "upstream"]
"""Where half precision is rounded: as diffusers and this project do, or as the published code does."""

_Timesteps = Callable[[], tuple[float, ...]]


def check_numerics(numerics: str) -> None:
    """Refuse an unknown name, with the names there are."""
    known = get_args(Numerics)
    if numerics not in known:
        raise ValueError(f"numerics={numerics!r} is unknown; known: {', '.join(known)}.")


def feed_forward(ffn: FeedForward, x: Tensor) -> Tensor:
    """Run diffusers' feed-forward; in bfloat16 on the CPU, GELU happens before the product is rounded.

    Stock rounds to bfloat16 between product and activation, and reads the widest tensor of the block once more.
    Anything but a plain linear layer (LoRA, a quantised layer, one with hooks) is called as it is.
    """
    if type(ffn) is not FeedForward or not _can_fuse(x):
        return ffn(x)
    activation, *rest = ffn.net
    if not isinstance(activation, GELU) or not _is_plain(ffn, activation):
        return ffn(x)
    proj = activation.proj
    hidden = torch.ops.mkldnn._linear_pointwise(x, proj.weight, proj.bias, "gelu", [], activation.approximate)
    for module in rest:
        hidden = module(hidden)
    return hidden


def _can_fuse(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _is_plain(ffn: FeedForward, activation: GELU) -> bool:
    proj = activation.proj
    if type(activation) is not GELU or type(proj) is not nn.Linear:
        return False
    return proj.weight.dtype == torch.bfloat16 and not any(_is_hooked(part) for part in (ffn, activation, proj))


def _is_hooked(module: nn.Module) -> bool:
    # Hooks of torch, of accelerate and of diffusers: the last two replace the instance's ``forward``.
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


@dataclass
class Modulations:
    """Shift, scale and gate of every block for the timesteps that a rollout uses, computed once each."""

    projected: dict[float, Tensor] = field(default_factory=dict)  # (1, 6 * dim) time projection by timestep
    dtype: torch.dtype = torch.float32  # in which table and projection are added
    # Six (1, segments, 1, dim) tensors by layer and timesteps: shift, 1 + scale, gate of attention and feed-forward.
    by_layer: dict[tuple[int, tuple[float, ...]], tuple[Tensor, ...]] = field(default_factory=dict)

    def of(self, layer: int, block: WanTransformerBlock, timesteps: tuple[float, ...]) -> tuple[Tensor, ...]:
        key = (layer, timesteps)
        if key not in self.by_layer:
            rows = torch.cat([self.projected[t] for t in timesteps]).unflatten(1, (6, -1)).to(self.dtype)
            table = (block.scale_shift_table.to(self.dtype) + rows)[None, :, :, None]
            shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.unbind(2)
            self.by_layer[key] = (shift, 1 + scale, gate, ffn_shift, 1 + ffn_scale, ffn_gate)
        return self.by_layer[key]


class _ModulatedBlock(ModelHook):
    """``WanTransformerBlock.forward`` with cached modulation and fused element-wise products; equal segments."""

    def __init__(self, layer: int, modulations: Modulations, timesteps: _Timesteps) -> None:
        super().__init__()
        self.layer = layer
        self.modulations = modulations
        self.timesteps = timesteps
        self._hooked: list[tuple[nn.Module, Any]] = []

    def initialize_hook(self, module: WanTransformerBlock) -> nn.Module:
        # Under offloading, weights that are read here without a call have to be brought.
        parts: tuple[nn.Module, nn.Module] = (module, module.norm2)
        self._hooked = [(part, hook) for part in parts for hook in offload_hooks(part)]
        return module

    def new_forward(
        self, module: WanTransformerBlock, hidden_states: Tensor, encoder_hidden_states: Tensor, temb, rotary_emb
    ) -> Tensor:
        with _weights_at_hand(self._hooked):
            modulation = self.modulations.of(self.layer, module, self.timesteps())
            return self._forward(module, hidden_states, encoder_hidden_states, rotary_emb, modulation)

    def _forward(
        self, module: WanTransformerBlock, hidden_states: Tensor, prompt: Tensor, rotary_emb, modulation
    ) -> Tensor:
        dtype = hidden_states.dtype
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation

        normed = _modulated_norm(hidden_states, module.norm1, shift, scale)
        hidden_states = _gated(hidden_states, module.attn1(normed, None, None, rotary_emb), gate).to(dtype)

        norm = module.norm2
        normed = hidden_states
        if isinstance(norm, nn.LayerNorm):
            normed = functional.layer_norm(
                hidden_states, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps
            )
        hidden_states = hidden_states + module.attn2(normed, prompt, None, None)

        normed = _modulated_norm(hidden_states, module.norm3, ffn_shift, ffn_scale)
        return _gated(hidden_states, feed_forward(module.ffn, normed), ffn_gate).to(dtype)


@contextmanager
def _weights_at_hand(hooked: Sequence[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Have weights where they are computed with, given modules and their ``offload_hooks``."""
    for module, hook in hooked:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in reversed(hooked):
            hook.post_forward(module, None)


def _modulated_norm(x: Tensor, norm: nn.LayerNorm, shift: Tensor, scale: Tensor) -> Tensor:
    # Shift and scale in the place of the norm's weight and bias, in float32 for any ``x``: one kernel, rounded once.
    rows = zip(x.chunk(shift.shape[1], dim=1), shift[0, :, 0], scale[0, :, 0], strict=True)
    parts = [functional.layer_norm(part, norm.normalized_shape, factor, term, norm.eps) for part, term, factor in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    segments = (gate.shape[1], -1)
    return torch.addcmul(x.float().unflatten(1, segments), update.float().unflatten(1, segments), gate).flatten(1, 2)


class _UpstreamBlock(_ModulatedBlock):
    """``WanTransformerBlock.forward`` with every sum and product rounded to the activation dtype."""

    def _forward(
        self, module: WanTransformerBlock, hidden_states: Tensor, prompt: Tensor, rotary_emb, modulation
    ) -> Tensor:
        x = hidden_states
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation

        y = module.attn1(_modulated(_layer_norm(x, module.norm1), shift, scale), None, None, rotary_emb)
        x = x + _by_segment(y, gate)

        normed = _layer_norm(x, module.norm2) if isinstance(module.norm2, nn.LayerNorm) else x
        x = x + module.attn2(normed, prompt, None, None)

        y = module.ffn(_modulated(_layer_norm(x, module.norm3), ffn_shift, ffn_scale))
        return x + _by_segment(y, ffn_gate)


class _UpstreamRMSNorm(ModelHook):
    """Root mean square norm: normalised in float32, rounded, then multiplied by the weight in the activation dtype."""

    def new_forward(self, module: nn.RMSNorm, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + cast(float, module.eps))
        return normed.to(x.dtype) * _rounded(module.weight, x.dtype)


class _KeptNorm(ModelHook):
    """The output norm in the activation dtype, kept for ``_UpstreamProjection``.

    diffusers modulates between the two modules, in float32: what it makes of this hook's result is not read.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.normed: list[Tensor] = []

    def new_forward(self, module: nn.LayerNorm, x: Tensor) -> Tensor:
        # ``x`` was widened from the activation dtype, so that narrowing it is exact.
        self.normed.append(_layer_norm(x.to(self.dtype), module))
        return x


class _UpstreamProjection(ModelHook):
    """Gives the output projection the kept norm, modulated in the activation dtype."""

    def __init__(
        self, transformer: WanTransformer3DModel, kept: _KeptNorm, embedded: Callable[[], Sequence[Tensor]]
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.kept = kept
        self.embedded = embedded

    def pre_forward(self, module: nn.Module, x: Tensor) -> tuple[tuple[Tensor], dict]:
        normed = self.kept.normed.pop()
        table = _rounded(self.transformer.scale_shift_table, normed.dtype) + torch.cat(list(self.embedded()))[:, None]
        shift, scale = table[None, :, :, None].unbind(2)
        return (_modulated(normed, shift, 1 + scale),), {}


def numerics_hooks(
    transformer: WanTransformer3DModel,
    numerics: Numerics,
    modulations: Modulations,
    timesteps: _Timesteps,
    embedded: Callable[[], Sequence[Tensor]],
) -> list[tuple[nn.Module, ModelHook]]:
    """Modules that get a hook, each with its hook, to compute in ``numerics``.

    ``timesteps`` returns those of the segments of the forward under way, ``embedded`` their (1, dim) embeddings.
    """
    blocks = blocks_of(transformer)
    block_hook = _UpstreamBlock if numerics == "upstream" else _ModulatedBlock
    hooks: list[tuple[nn.Module, ModelHook]] = [
        (block, block_hook(layer, modulations, timesteps)) for layer, block in enumerate(blocks)
    ]
    if numerics == "native":
        return hooks
    attentions = (attn for block in blocks for attn in (block.attn1, block.attn2))
    hooks += [(norm, _UpstreamRMSNorm()) for attn in attentions for norm in (attn.norm_q, attn.norm_k)]
    kept = _KeptNorm(modulations.dtype)
    return [
        *hooks,
        (transformer.norm_out, kept),
        (transformer.proj_out, _UpstreamProjection(transformer, kept, embedded)),
    ]


def embed_time(embedder: WanTimeTextImageEmbedding, timestep: float, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """Embed a timestep: sinusoid in float64, then everything in the activation dtype.

    Args:
        embedder: diffusers keeps the weights of its ``time_embedder`` in float32, here they are rounded for the call.
        timestep: 0 to 1000; a float32 number in the published code.
        like: Activations, for their dtype and device.

    Returns:
        (1, dim) embedding and (1, 6 * dim) projection.
    """
    half = embedder.timesteps_proj.num_channels // 2
    position = torch.tensor([timestep], dtype=torch.float32).double()
    rates = torch.pow(10000.0, -torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(position, rates)
    wave = torch.cat([angles.cos(), angles.sin()], dim=1).to(like)
    weights = {name: _rounded(weight, like.dtype) for name, weight in embedder.time_embedder.named_parameters()}
    temb = torch.func.functional_call(embedder.time_embedder, weights, (wave,))
    return temb, embedder.time_proj(embedder.act_fn(temb))


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if weight.is_floating_point() else weight


def _layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    weight, bias = (None if part is None else _rounded(part, x.dtype) for part in (norm.weight, norm.bias))
    return functional.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def _modulated(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(batch, tokens, dim) times ``scale`` plus ``shift``, both (1, segments, 1, dim), each rounded."""
    return (normed.unflatten(1, (shift.shape[1], -1)) * scale + shift).flatten(1, 2)


def _by_segment(y: Tensor, gate: Tensor) -> Tensor:
    return (y.unflatten(1, (gate.shape[1], -1)) * gate).flatten(1, 2)
