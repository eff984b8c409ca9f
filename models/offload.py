"""Weights that rest elsewhere between calls: where a module computes, and having them at hand without a call."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers.hooks.group_offloading import GroupOffloadingHook, LayerExecutionTrackerHook
from diffusers.hooks.layerwise_casting import LayerwiseCastingHook
from torch import nn

# Hooks of diffusers that bring weights before a forward and take them away after it.
_BRINGS_WEIGHTS = (GroupOffloadingHook, LayerExecutionTrackerHook, LayerwiseCastingHook)


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes; under offloading its weights may be on another device, or on none.

    Args:
        module: A diffusers model, plain or under accelerate's or diffusers' offloading.
    """
    for part in module.modules():
        hook = vars(part).get("_hf_hook")
        # Some of accelerate's hooks have no device: those of layers that are not moved.
        if hook is not None and vars(hook).get("execution_device") is not None:
            return torch.device(hook.execution_device)
    return module.device


def offload_hooks(module: nn.Module) -> list:
    """What offloading has hooked onto a module's forward, in the order in which it runs.

    Args:
        module: Any part of a model.
    """
    hooks = [module._hf_hook] if "_hf_hook" in vars(module) else []
    if "_diffusers_hook" in vars(module):
        hooks += [hook for hook in module._diffusers_hook.hooks.values() if isinstance(hook, _BRINGS_WEIGHTS)]
    return hooks


@contextmanager
def weights_at_hand(hooked: Sequence[tuple[nn.Module, object]]) -> Iterator[None]:
    """Have weights where they are computed with, for code that reads a module's weights instead of calling it.

    Args:
        hooked: Modules and their ``offload_hooks``.
    """
    for module, hook in hooked:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in reversed(hooked):
            hook.post_forward(module, None)
