"""A block's norms and modulation with less work: once per timestep instead of once per forward and per token."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from diffusers.hooks import ModelHook
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch.nn import functional

from longtake.models.offload import offload_hooks, weights_at_hand


def feed_forward(ffn: nn.Module, x: Tensor) -> Tensor:
    """Run diffusers' feed-forward; in bfloat16 on the CPU, GELU happens before the product is rounded.

    Stock rounds to bfloat16 between product and activation, and reads the widest tensor of the block once more.
    Anything but a plain linear layer (LoRA, a quantised layer, one with hooks) is called as it is.

    Args:
        ffn: ``FeedForward`` of a ``WanTransformerBlock``.
        x: (batch, tokens, dim).

    Returns:
        (batch, tokens, dim).
    """
    if not (_is_plain(ffn) and _takes(x)):
        return ffn(x)
    activation, *rest = ffn.net
    proj = activation.proj
    hidden = torch.ops.mkldnn._linear_pointwise(x, proj.weight, proj.bias, "gelu", [], activation.approximate)
    for module in rest:
        hidden = module(hidden)
    return hidden


def _takes(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _is_plain(ffn: nn.Module) -> bool:
    if type(ffn) is not FeedForward or type(ffn.net[0]) is not GELU or type(ffn.net[0].proj) is not nn.Linear:
        return False
    proj = ffn.net[0].proj
    return proj.weight.dtype == torch.bfloat16 and not any(_is_hooked(part) for part in (ffn, ffn.net[0], proj))


def _is_hooked(module: nn.Module) -> bool:
    # Hooks of torch, of accelerate and of diffusers: the last two replace the instance's ``forward``.
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


@dataclass
class Modulations:
    """Shift, scale and gate of every block for the timesteps that a rollout uses, computed once each.

    Attributes:
        projected: (1, 6 * dim) time projection by timestep.
        dtype: In which table and projection are added.
        by_layer: Six (1, segments, 1, dim) tensors of ``dtype`` by layer and timesteps: shift, 1 + scale and gate of
            the self-attention, then of the feed-forward.
    """

    projected: dict[float, Tensor] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    by_layer: dict[tuple[int, tuple[float, ...]], tuple[Tensor, ...]] = field(default_factory=dict)

    def of(self, layer: int, block: nn.Module, timesteps: tuple[float, ...]) -> tuple[Tensor, ...]:
        """Modulation of one layer, each segment at its own timestep."""
        key = (layer, timesteps)
        if key not in self.by_layer:
            rows = torch.cat([self.projected[t] for t in timesteps]).unflatten(1, (6, -1)).to(self.dtype)
            table = (block.scale_shift_table.to(self.dtype) + rows)[None, :, :, None]
            shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.unbind(2)
            self.by_layer[key] = (shift, 1 + scale, gate, ffn_shift, 1 + ffn_scale, ffn_gate)
        return self.by_layer[key]


class ModulatedBlock(ModelHook):
    """``WanTransformerBlock.forward`` with cached modulation and fused element-wise products.

    Same modules, same weights, same float32 residual arithmetic; products and sums are fused, so results differ
    from stock by rounding (a test bounds it). Segments of one forward are modulated by broadcasting over their
    tokens: nothing of the size (tokens, 6, dim) is ever made.

    Args:
        layer: Index of the block.
        modulations: Shared by all blocks of a transformer.
        timesteps: Returns the timestep of each segment of the forward under way; the segments are equally long.
    """

    def __init__(self, layer: int, modulations: Modulations, timesteps) -> None:
        super().__init__()
        self.layer = layer
        self.modulations = modulations
        self.timesteps = timesteps
        self._hooked: list[tuple[nn.Module, object]] = []

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Note what brings the weights that are read here without a call, where they are offloaded."""
        self._hooked = [(part, hook) for part in (module, module.norm2) for hook in offload_hooks(part)]
        return module

    def new_forward(
        self, module: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb
    ) -> Tensor:
        """See the class; arguments as in diffusers, ``temb`` is unused."""
        with weights_at_hand(self._hooked):
            return self._forward(module, hidden_states, encoder_hidden_states, rotary_emb)

    def _forward(self, module: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, rotary_emb) -> Tensor:
        dtype, timesteps = hidden_states.dtype, self.timesteps()
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = self.modulations.of(self.layer, module, timesteps)
        segments = (len(timesteps), -1)

        normed = _modulated_norm(hidden_states, module.norm1, shift, scale)
        hidden_states = _gated(hidden_states, module.attn1(normed, None, None, rotary_emb), gate, segments).to(dtype)

        norm = module.norm2
        normed = hidden_states
        if not isinstance(norm, nn.Identity):
            normed = functional.layer_norm(
                hidden_states, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps
            )
        hidden_states = hidden_states + module.attn2(normed, encoder_hidden_states, None, None)

        normed = _modulated_norm(hidden_states, module.norm3, ffn_shift, ffn_scale)
        return _gated(hidden_states, feed_forward(module.ffn, normed), ffn_gate, segments).to(dtype)


def _modulated_norm(x: Tensor, norm: nn.LayerNorm, shift: Tensor, scale: Tensor) -> Tensor:
    # Shift and scale in the place of the norm's weight and bias, in float32 for any ``x``: one kernel, rounded once.
    rows = zip(x.chunk(shift.shape[1], dim=1), shift[0, :, 0], scale[0, :, 0], strict=True)
    parts = [functional.layer_norm(part, norm.normalized_shape, factor, term, norm.eps) for part, term, factor in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _gated(x: Tensor, update: Tensor, gate: Tensor, segments: Sequence[int]) -> Tensor:
    return torch.addcmul(x.float().unflatten(1, segments), update.float().unflatten(1, segments), gate).flatten(1, 2)
