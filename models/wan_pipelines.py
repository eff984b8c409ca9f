"""What is common to everything that changes a stock Wan pipeline for a while: its networks, its steps, its tokens."""

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

TRANSFORMERS = ("transformer", "transformer_2")
"""Components of a pipeline that are changed: the network, and Wan2.2's second one for low noise."""

TIMESTEP_TOLERANCE = 2**-8
"""How far a timestep may be from the scheduler's, relative to it: the rounding of bfloat16."""


@dataclass
class Video:
    """Where the denoising of a video stands.

    Attributes:
        timesteps: The scheduler's own tensor: another one belongs to another video.
        schedule: Its different values, in order.
        first: Where in the schedule the video began; more than 0 where it starts from another video.
        step: Where in the schedule the last forward was.
        num_forwards: Of that step so far.
        memories: By transformer and number of the forward in its step, which tells guidance branches apart.
    """

    timesteps: Tensor
    schedule: tuple[float, ...]
    first: int
    step: int
    num_forwards: int = 0
    memories: dict[tuple[nn.Module, int], dict[Any, Any]] = field(default_factory=dict)

    @property
    def step_index(self) -> int:
        """Of the last forward, from the first step of the video."""
        return self.step - self.first

    @property
    def num_steps(self) -> int:
        """Of the video."""
        return len(self.schedule) - self.first


class Clock:
    """Tells the videos, steps and guidance branches of a pipeline apart by the timesteps its networks are given.

    Args:
        pipe: With a scheduler.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self._pipe = pipe
        self._video: Video | None = None

    def begin(self, transformer: nn.Module, timestep: Tensor) -> tuple[Video, dict[Any, Any]]:
        """A forward begins.

        Args:
            transformer: Which network runs.
            timestep: What it is given.

        Returns:
            The video under way, and what is remembered between the steps of this network and guidance branch.

        Raises:
            ValueError: If the timestep is none of the scheduler's.
        """
        video = self._at(timestep)
        memory = video.memories.setdefault((transformer, video.num_forwards), {})
        video.num_forwards += 1
        return video, memory

    def reset(self) -> None:
        """Forget the video."""
        self._video = None

    def _at(self, timestep: Tensor) -> Video:
        timesteps = self._pipe.scheduler.timesteps
        video = self._video
        is_known = video is not None and video.timesteps is timesteps
        schedule = video.schedule if is_known else tuple(dict.fromkeys(map(float, timesteps.tolist())))
        # Where frames or tokens have their own, those that are given keep 0.
        step = _step_of(float(timestep.max()), schedule)
        if not is_known or step < video.step:
            self._video = video = Video(timesteps, schedule, first=step, step=step)
        elif step > video.step:
            video.step, video.num_forwards = step, 0
        return video


def find_transformers(pipe: DiffusionPipeline, *, what: str) -> list[WanTransformer3DModel]:
    """The networks of a pipeline, each once.

    Args:
        pipe: Of diffusers.
        what: Name of the function that changes them, for errors.

    Raises:
        ValueError: If there is none, or one has a structure, parallelism or processors that are not diffusers' own.
    """
    if not hasattr(pipe, "scheduler") or not hasattr(pipe, "transformer"):
        raise ValueError(f"{type(pipe).__name__} has no scheduler and transformer: give a diffusers Wan pipeline.")
    found = {getattr(pipe, name): name for name in reversed(TRANSFORMERS) if hasattr(pipe, name)}
    found.pop(None, None)
    if not found:
        raise ValueError(f"{type(pipe).__name__} was loaded without a transformer: load one of {TRANSFORMERS}.")
    for transformer, name in found.items():
        if not isinstance(transformer, WanTransformer3DModel):
            raise ValueError(
                f"{name} is a {type(transformer).__name__}, {what} knows WanTransformer3DModel: use a Wan text-, "
                "image- or video-to-video pipeline, and compile in place with transformer.compile()."
            )
        check_parallel(transformer)
        for layer, block in enumerate(transformer.blocks):
            processor = type(block.attn1.processor)
            if processor is not WanAttnProcessor or block.attn1.add_k_proj is not None:
                with_images = "" if block.attn1.add_k_proj is None else " with image conditioning"
                raise ValueError(
                    f"self-attention of block {layer} of {name} has a {processor.__name__}{with_images}: {what} "
                    "replaces diffusers' own WanAttnProcessor of text and video, once; restore it first."
                )
    return list(found)


def check_parallel(transformer: WanTransformer3DModel) -> None:
    """Refuse tokens and heads that are spread over devices.

    Raises:
        ValueError: If the transformer has a parallel configuration.
    """
    if transformer._parallel_config is not None:
        raise ValueError(
            "the transformer has a parallel_config, and all tokens and heads are needed in one place: "
            "load it without enable_parallelism."
        )


def projected(
    attn: nn.Module, hidden_states: Tensor, rotary_emb: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of self-attention as ``WanAttnProcessor`` makes them.

    Args:
        attn: ``WanAttention`` whose modules are used.
        hidden_states: (batch, tokens, dim).
        rotary_emb: Cosines and sines of these tokens, (1, tokens, 1, head_dim) each, every value twice.

    Returns:
        (batch, tokens, heads, head_dim) each, queries and keys rotated.
    """
    if attn.fused_projections:
        q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    heads = (attn.heads, -1)
    q, k, v = attn.norm_q(q).unflatten(2, heads), attn.norm_k(k).unflatten(2, heads), v.unflatten(2, heads)
    if rotary_emb is not None:
        q, k = _rotated(q, *rotary_emb), _rotated(k, *rotary_emb)
    return q, k, v


def _step_of(timestep: float, schedule: tuple[float, ...]) -> int:
    step = min(range(len(schedule)), key=lambda index: abs(schedule[index] - timestep))
    if abs(schedule[step] - timestep) > TIMESTEP_TOLERANCE * abs(timestep):
        raise ValueError(
            f"timestep={timestep:g} is none of the scheduler's {len(schedule)} timesteps, which say how far the video "
            "is: call pipe.scheduler.set_timesteps with the steps that are run."
        )
    return step


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate neighbouring channels (2i, 2i + 1) of (batch, tokens, heads, head_dim)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosines, sines = cosines[..., 0::2], sines[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * cosines - odd * sines
    out[..., 1::2] = even * sines + odd * cosines
    return out
