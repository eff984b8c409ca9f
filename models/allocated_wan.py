"""Fewer denoising steps for still tokens in diffusers' own bidirectional Wan pipelines.

A reconstruction of heterogeneous step allocation (arXiv:2605.06892) from its abstract: see
``longtake.attention.step_allocation``. A step runs the network over the tokens that are due. They attend to the keys
and values that the others had when they were last computed, and the velocity handed to the scheduler is the new one of
these tokens and the last one of the others. Euler steps with an unchanging velocity add up to one, so the pipeline's
own loop and scheduler move skipped tokens on as the method has it.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from longtake.attention.step_allocation import StepAllocation, TokenCache, relative_change
from longtake.configs.fields import build
from longtake.models.wan_pipelines import Clock, Video, check_parallel, find_transformers, projected

CACHE, VELOCITY, CHANGE = "cache", "velocity", "change"
"""What is remembered of a network and guidance branch between steps."""


@contextmanager
def allocated_wan(
    pipe: DiffusionPipeline, allocation: StepAllocation | Mapping[str, Any] | None = None
) -> Iterator["AllocatedWan"]:
    """Give still tokens fewer denoising steps in a stock Wan pipeline inside the ``with`` block.

    ::

        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=5.0)
        with allocated_wan(pipe, {"target": 0.5}) as allocated:
            video = pipe(prompt, num_inference_steps=50).frames[0]
        print(allocated)  # the share of token steps that was computed

    For many steps: a model of four has none to spare. Keys and values of all tokens are held for each layer and each
    guidance branch. Inside the ``with`` block ``attn1`` of every transformer block has another processor, and the
    first of them and the output projection have hooks; nothing else changes, and afterwards all is as before.

    Args:
        pipe: With an Euler scheduler and ``WanTransformer3DModel`` transformers: text, image or video to video.
        allocation: How steps are shared out, or its fields; None: half of the token steps.

    Yields:
        What was computed so far; it can be read after the block too.

    Raises:
        ValueError: If a field or a value does not fit, the scheduler is another, or the pipeline has other
            transformers, other processors, a diffusers cache, or parallelism. From the pipeline's call: if the
            allocation does not fit the number of steps, timesteps are given for each token, or gradients are on.
    """
    if not isinstance(allocation, StepAllocation):
        allocation = build(StepAllocation, allocation or {}, what="the step allocation")
    transformers = find_transformers(pipe, what="allocated_wan")
    _check_scheduler(pipe)
    allocated = AllocatedWan(pipe, allocation)
    with ExitStack() as undo:
        for transformer in transformers:
            undo.enter_context(allocated._installed(transformer))
        yield allocated


class AllocatedWan:
    """Step allocation of one pipeline: what it has computed; made by ``allocated_wan``.

    Attributes:
        allocation: How steps are shared out.
        num_computed: Token evaluations of a network so far: tokens x samples x forwards.
        num_tokens: What a stock pipeline would have computed.
    """

    def __init__(self, pipe: DiffusionPipeline, allocation: StepAllocation) -> None:
        self.allocation = allocation
        self.num_computed = self.num_tokens = 0
        self._pipe = pipe
        self._clock = Clock(pipe)
        self._strides: tuple[Video, Tensor] | None = None
        self._memory: dict[str, Any] = {}
        self._active: Tensor | None = None
        self._keeps_change = False

    @property
    def share(self) -> float:
        """Share of the token evaluations that was computed so far, 0 to 1."""
        return self.num_computed / self.num_tokens if self.num_tokens else 1.0

    def __str__(self) -> str:
        return f"step allocation: {self.share:.3f} of {self.num_tokens} token evaluations computed"

    @contextmanager
    def _installed(self, transformer: WanTransformer3DModel) -> Iterator[None]:
        own = [block.attn1.processor for block in transformer.blocks]
        handles = [
            transformer.register_forward_pre_hook(self._begin, with_kwargs=True),
            transformer.blocks[0].register_forward_pre_hook(self._select),
            transformer.proj_out.register_forward_hook(self._complete),
        ]
        try:
            for layer, (block, processor) in enumerate(zip(transformer.blocks, own, strict=True)):
                block.attn1.set_processor(_ActiveTokens(self, layer, processor._attention_backend))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block, processor in zip(transformer.blocks, own, strict=True):
                block.attn1.set_processor(processor)
            self._clock.reset()
            self._strides, self._memory, self._active = None, {}, None

    @torch.compiler.disable
    def _begin(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Decide which tokens this forward computes."""
        given = dict(zip(("hidden_states", "timestep"), args, strict=False)) | kwargs
        self._check_forward(transformer, given["timestep"])
        video, self._memory = self._clock.begin(transformer, given["timestep"])
        if video.step_index == 0:
            self.allocation.shares(video.num_steps)
        strides = self._strides_of(video)
        self._keeps_change = strides is None and video.step_index >= self.allocation.num_warmup_steps - 1
        self._active = None
        # A network that comes in late, as Wan2.2's second, has no keys of any token yet.
        if strides is not None and VELOCITY in self._memory:
            self._active = self.allocation.active(strides, video.step_index, video.num_steps)

    def _strides_of(self, video: Video) -> Tensor | None:
        """Strides of the video's tokens, shared out after the warm-up; None: all tokens are computed."""
        if self._strides is None or self._strides[0] is not video:
            changes = [memory[CHANGE] for memory in video.memories.values() if CHANGE in memory]
            if video.step_index < self.allocation.num_warmup_steps or not changes:
                return None
            # One allocation for all guidance branches, because their velocities are mixed.
            self._strides = (video, self.allocation.assign(torch.stack(changes).mean(0), video.num_steps))
        return self._strides[1]

    def _check_forward(self, transformer: WanTransformer3DModel, timestep: Tensor) -> None:
        _check_scheduler(self._pipe)
        check_parallel(transformer)
        if timestep.ndim > 1:
            raise ValueError(
                "the transformer was given a timestep for each token, and allocated_wan knows one for all: "
                "use a model without expand_timesteps."
            )
        if torch.is_grad_enabled():
            raise ValueError("allocated_wan changes keys in place: call under torch.no_grad().")
        if transformer.is_cache_enabled:
            raise ValueError("the transformer has a diffusers cache, which skips steps of its own: disable_cache().")
        for layer, block in enumerate(transformer.blocks):
            processor = block.attn1.processor
            if not isinstance(processor, _ActiveTokens) or processor.allocated is not self:
                raise ValueError(
                    f"{type(processor).__name__} has taken the place of allocated_wan's processor of block {layer}: "
                    "change processors before allocated_wan or after it."
                )

    @torch.compiler.disable
    def _select(self, block: nn.Module, args: tuple) -> tuple | None:
        """Hand the first block the tokens that are due."""
        hidden_states = args[0]
        self.num_tokens += hidden_states.shape[0] * hidden_states.shape[1]
        if self._active is not None:
            hidden_states = hidden_states[:, self._active]
        self.num_computed += hidden_states.shape[0] * hidden_states.shape[1]
        return (hidden_states, *args[1:])

    @torch.compiler.disable
    def _complete(self, proj_out: nn.Module, args: tuple, velocity: Tensor) -> Tensor:
        """Put last velocities where tokens were skipped."""
        before = self._memory.get(VELOCITY)
        if self._keeps_change and before is not None:
            self._memory[CHANGE] = relative_change(velocity, before)
        if self._active is not None:
            whole = before.clone()
            whole[:, self._active] = velocity
            velocity = whole
        self._memory[VELOCITY] = velocity
        return velocity


class _ActiveTokens:
    """What ``WanAttnProcessor`` does for self-attention: active tokens ask, all tokens are read.

    Args:
        allocated: Knows which tokens are active.
        layer: Of the block.
        backend: diffusers' attention backend of the processor it stands for.
    """

    _parallel_config = None

    def __init__(self, allocated: AllocatedWan, layer: int, backend: Any) -> None:
        self.allocated = allocated
        self.layer = layer
        self._attention_backend = backend

    @torch.compiler.disable
    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend; ``hidden_states`` is (batch, active tokens, dim), ``rotary_emb`` of all tokens."""
        active, memory = self.allocated._active, self.allocated._memory
        if active is not None:
            rotary_emb = tuple(part[:, active] for part in rotary_emb)
        q, k, v = projected(attn, hidden_states, rotary_emb)
        k, v = memory.setdefault(CACHE, TokenCache()).update(self.layer, k, v, active)
        out = dispatch_attention_fn(q, k, v, attn_mask=attention_mask, backend=self._attention_backend)
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3).type_as(q)))


def _check_scheduler(pipe: DiffusionPipeline) -> None:
    scheduler = pipe.scheduler
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.stochastic_sampling:
        raise ValueError(
            f"{type(scheduler).__name__} mixes velocities of several steps or adds noise, and a skipped token has one "
            "velocity: use pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=...) without stochastic_sampling."
        )
