"""Self-Forcing's rounding points: diffusers' own modules and weights, rounded where the published code rounds.

The published code holds the whole model in the activation dtype and computes in it, except where noted here. In
float32 nothing is rounded, and every hook below is the stock arithmetic up to the order of sums.

Source: Self-Forcing, 33593df; docs/models.md has the list.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn
from torch.nn import functional

from longtake.models.modulated_block import ModulatedBlock

Numerics = Literal["native", "upstream"]
"""Where half precision is rounded: as diffusers and this project do, or as the published code does."""


def check_numerics(numerics: str) -> None:
    """Refuse a name that is none.

    Raises:
        ValueError: With the names there are.
    """
    known = get_args(Numerics)
    if numerics not in known:
        raise ValueError(f"numerics={numerics!r} is unknown; known: {', '.join(known)}.")


def check_weights(transformer: nn.Module) -> None:
    """Refuse weights that are not at hand, where hooks of this module read them without calling their module.

    Raises:
        ValueError: If they are offloaded layer by layer.
    """
    if any(weight.is_meta for weight in transformer.parameters()):
        raise ValueError(
            "numerics='upstream' reads weights that are offloaded layer by layer (sequential offload): offload whole "
            "models, or use numerics 'native'."
        )


def clean_estimate(x: Tensor, flow: Tensor, sigma: float) -> Tensor:
    """x0 = x - sigma flow in float64, in ``x``'s dtype; sigma as the published table holds it, in float32.

    Args:
        x: Latents at noise share ``sigma``, any shape.
        flow: Same shape.
        sigma: Noise share.
    """
    sigma = torch.tensor(sigma, dtype=torch.float32).item()
    return (x.double() - sigma * flow.double()).to(x.dtype)


def embed_time(embedder: nn.Module, timestep: float, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """Embed a timestep: sinusoid in float64, then everything in the activation dtype.

    Args:
        embedder: ``WanTimeTextImageEmbedding``; diffusers keeps the weights of its ``time_embedder`` in float32, here
            they are rounded for the call.
        timestep: 0 to 1000; a float32 number in the published code.
        like: Has the dtype and the device of the activations.

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


class UpstreamBlock(ModulatedBlock):
    """``WanTransformerBlock.forward`` with every sum and product rounded to the activation dtype.

    Args:
        layer: Index of the block.
        modulations: Shared by all blocks of a transformer; in the activation dtype.
        timesteps: Returns the timestep of each segment of the forward under way; the segments are equally long.
    """

    def _forward(self, module: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, rotary_emb) -> Tensor:
        x, timesteps = hidden_states, self.timesteps()
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = self.modulations.of(self.layer, module, timesteps)

        y = module.attn1(_modulated(_layer_norm(x, module.norm1), shift, scale), None, None, rotary_emb)
        x = x + _by_segment(y, gate)

        normed = x if isinstance(module.norm2, nn.Identity) else _layer_norm(x, module.norm2)
        x = x + module.attn2(normed, encoder_hidden_states, None, None)

        y = module.ffn(_modulated(_layer_norm(x, module.norm3), ffn_shift, ffn_scale))
        return x + _by_segment(y, ffn_gate)


class UpstreamRMSNorm(ModelHook):
    """Root mean square norm: normalised in float32, rounded, then multiplied by the weight in the activation dtype."""

    def new_forward(self, module: nn.RMSNorm, x: Tensor) -> Tensor:
        """See the class."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + module.eps)
        return normed.to(x.dtype) * _rounded(module.weight, x.dtype)


class KeptNorm(ModelHook):
    """The output norm in the activation dtype, kept for ``UpstreamProjection``.

    diffusers modulates between the two modules, in float32: what it makes of this hook's result is not read.

    Args:
        dtype: Of the activations.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.normed: Tensor | None = None

    def new_forward(self, module: nn.LayerNorm, x: Tensor) -> Tensor:
        """See the class; ``x`` was widened from the activation dtype, so that narrowing it is exact."""
        self.normed = _layer_norm(x.to(self.dtype), module)
        return x


class UpstreamProjection(ModelHook):
    """Gives the output projection the kept norm, modulated in the activation dtype.

    Args:
        transformer: Has the output's modulation table.
        kept: The hook on the output norm.
        embedded: Returns the (1, dim) time embedding of each segment of the forward under way.
    """

    def __init__(self, transformer: nn.Module, kept: KeptNorm, embedded) -> None:
        super().__init__()
        self.transformer = transformer
        self.kept = kept
        self.embedded = embedded

    def pre_forward(self, module: nn.Module, x: Tensor) -> tuple[tuple[Tensor], dict]:
        """See the class."""
        normed, self.kept.normed = self.kept.normed, None
        rows: Sequence[Tensor] = self.embedded()
        table = _rounded(self.transformer.scale_shift_table, normed.dtype) + torch.cat(list(rows))[:, None]
        shift, scale = table[None, :, :, None].unbind(2)
        return (_modulated(normed, shift, 1 + scale),), {}


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if weight.is_floating_point() else weight


def _layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    affine = [None if part is None else _rounded(part, x.dtype) for part in (norm.weight, norm.bias)]
    return functional.layer_norm(x, norm.normalized_shape, *affine, norm.eps)


def _modulated(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(batch, tokens, dim) times ``scale`` plus ``shift``, both (1, segments, 1, dim), each rounded."""
    return (normed.unflatten(1, (shift.shape[1], -1)) * scale + shift).flatten(1, 2)


def _by_segment(y: Tensor, gate: Tensor) -> Tensor:
    return (y.unflatten(1, (gate.shape[1], -1)) * gate).flatten(1, 2)
