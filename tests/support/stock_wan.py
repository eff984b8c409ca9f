"""A stock diffusers Wan pipeline as sparse attention and step allocation find it and must leave it."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.transformers.transformer_wan import WanAttnProcessor


def stock_pipe(folder):
    """The tiny folder under an Euler scheduler; the folder's own draws noise from the global generator."""
    pipe = WanPipeline.from_pretrained(folder)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    # Random weights make flat attention, on which a mask would hardly show.
    for block in pipe.transformer.blocks:
        block.attn1.norm_q.weight.data.mul_(4)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def film(pipe, *, num_latent_frames, **options):
    """Latents of two videos of 64 x 64 pixels, 4 x 4 tokens a frame, always from the same noise."""
    options = {
        "prompt": ["red circle", "blue square moving left"],
        "negative_prompt": "plain",
        "height": 64,
        "width": 64,
        "num_frames": 4 * num_latent_frames - 3,
        "guidance_scale": 4.0,
        "max_sequence_length": 8,
        "output_type": "latent",
        "latents": noise(num_latent_frames),
    } | options
    return pipe(**options).frames


def noise(num_latent_frames):
    return torch.randn(2, 4, num_latent_frames, 8, 8, generator=torch.Generator().manual_seed(0))


def state_of(pipe):
    """All that another self-attention, or a careless version of it, could leave behind."""
    processors = pipe.transformer.attn_processors
    modules = dict(pipe.transformer.named_modules())
    registry = _AttentionBackendRegistry
    return {
        "processors": {name: id(own) for name, own in processors.items()},
        "settings": [dict(vars(own)) for own in processors.values()],
        "class": dict(vars(WanAttnProcessor)),
        "hooks": {name: (list(m._forward_pre_hooks), list(m._forward_hooks)) for name, m in modules.items()},
        "patched": {name: vars(m).keys() & {"forward", "_diffusers_hook"} for name, m in modules.items()},
        "backends": (registry._active_backend, registry._checks_enabled, dict(registry._backends)),
    }
