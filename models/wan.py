"""Typed access to diffusers' Wan modules: their parts, their processors, and weights that offloading moves."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, TypeVar, cast

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.hooks import ModelHook
from diffusers.hooks.group_offloading import GroupOffloadingHook, LayerExecutionTrackerHook
from diffusers.hooks.layerwise_casting import LayerwiseCastingHook
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import Tensor, nn

# Hooks of diffusers that bring weights before a forward and take them away after it.
_BRINGS_WEIGHTS = (GroupOffloadingHook, LayerExecutionTrackerHook, LayerwiseCastingHook)


Owner = TypeVar("Owner")


class AttentionProcessor(Generic[Owner]):
    """Computation of one layer's ``WanAttention`` from its modules, on behalf of ``owner``."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, owner: Owner, layer: int) -> None:
        self.owner = owner
        self.layer = layer

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(batch, tokens, dim) to the same shape."""
        raise NotImplementedError


def blocks_of(transformer: nn.Module) -> Sequence[WanTransformerBlock]:
    """The blocks of a ``WanTransformer3DModel``."""
    return cast(Sequence[WanTransformerBlock], transformer.blocks)


def config_of(model: ConfigMixin) -> Any:
    """A model's configuration, whose entries are attributes (diffusers declares a plain dictionary)."""
    return model.config


def stock_forward(hook: ModelHook) -> Callable[..., Any]:
    """The forward that a registered hook stands in for."""
    return cast(Callable[..., Any], hook.fn_ref.original_forward)


@contextmanager
def processors_set(processors: Iterable[tuple[WanAttention, AttentionProcessor]]) -> Iterator[None]:
    """Give attentions other processors inside the ``with`` block, and their own again after it."""
    with ExitStack() as undo:
        for attn, processor in processors:
            changed: Any = attn
            undo.callback(changed.set_processor, changed.processor)
            changed.set_processor(processor)
        yield


def project_qkv(attn: WanAttention, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of self-attention before rotation: (batch, tokens, heads, head_dim) each."""
    if attn.fused_projections:
        q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    heads = (attn.heads, -1)
    return attn.norm_q(q).unflatten(2, heads), attn.norm_k(k).unflatten(2, heads), v.unflatten(2, heads)


def project_out(attn: WanAttention, out: Tensor) -> Tensor:
    """The output projection of (batch, tokens, heads, head_dim)."""
    linear, dropout = attn.to_out
    return dropout(linear(out.flatten(2)))


def execution_device(module: nn.Module) -> torch.device:
    """Device on which a model computes; under offloading its weights may be on another device, or on none."""
    for part in module.modules():
        hook = vars(part).get("_hf_hook")
        # Some of accelerate's hooks have no device: those of layers that are not moved.
        if hook is not None and vars(hook).get("execution_device") is not None:
            return torch.device(hook.execution_device)
    return cast(torch.device, module.device)


def offload_hooks(module: nn.Module) -> list[Any]:
    """Hooks of offloading on a module's forward, in the order in which they run."""
    found = vars(module)
    hooks = [found["_hf_hook"]] if "_hf_hook" in found else []
    if "_diffusers_hook" in found:
        hooks += [hook for hook in found["_diffusers_hook"].hooks.values() if isinstance(hook, _BRINGS_WEIGHTS)]
    return hooks
