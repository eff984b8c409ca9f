"""Sparse self-attention in diffusers' own bidirectional Wan pipelines, which are stock again afterwards."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from longtake.attention import (
    AttentionGeometry,
    AttentionRequest,
    BlockPlan,
    SparsePolicy,
    explain,
    sparse_attention,
)
from longtake.attention.policies.base import DensityMeter
from longtake.attention.step_allocation import StepAllocation, TokenCache, relative_change
from longtake.configs.fields import build
from longtake.models.sparse_attention import AttentionSetting

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


def _find_transformers(pipe: DiffusionPipeline, *, what: str) -> list[WanTransformer3DModel]:
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
        _check_parallel(transformer)
        for layer, block in enumerate(transformer.blocks):
            processor = type(block.attn1.processor)
            if processor is not WanAttnProcessor or block.attn1.add_k_proj is not None:
                with_images = "" if block.attn1.add_k_proj is None else " with image conditioning"
                raise ValueError(
                    f"self-attention of block {layer} of {name} has a {processor.__name__}{with_images}: {what} "
                    "replaces diffusers' own WanAttnProcessor of text and video, once; restore it first."
                )
    return list(found)


def _check_parallel(transformer: WanTransformer3DModel) -> None:
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


@contextmanager
def sparse_wan(
    pipe: DiffusionPipeline,
    attention: SparsePolicy | Mapping[str, Any] | str = "radial",
    *,
    backend: str | None = None,
) -> Iterator["SparseWan"]:
    """Give a stock Wan pipeline sparse self-attention inside the ``with`` block.

    Only ``attn1`` of every block changes; cross-attention, image conditioning, scheduler, LoRA and offload are the
    pipeline's own. Nothing of diffusers is patched or configured globally, and the transformers have their own
    processors again after the block, whatever happens in it. A model that was not trained with a mask loses quality
    with it; the first ``dense_steps`` steps and ``dense_layers`` layers of a policy are computed densely.

    ::

        with sparse_wan(pipe, {"policy": "radial", "dense_steps": 12, "decay_factor": 0.2}) as sparse:
            video = pipe(prompt, num_inference_steps=50).frames[0]
        print(sparse)  # density achieved, and the backends that ran

    A step is a timestep of ``pipe.scheduler`` that the network is given, counted from the first one of a video. All
    forwards at one timestep (guidance runs two) belong to one step, and each keeps what its policy remembers to
    itself. A video begins when the scheduler's timesteps are set anew.

    Args:
        pipe: With a scheduler and ``WanTransformer3DModel`` transformers: text, image or video to video.
        attention: Attention policy, its mapping (``backend`` may name a backend), or its name.
        backend: Backend of what is sparse, instead of the mapping's; None: the mapping's, or ``auto``. What a policy
            declines is computed densely by ``auto``, not by diffusers' attention backend.

    Yields:
        What was computed so far; it can be read after the block too.

    Raises:
        ValueError: If a name, a field or a value is unknown or does not fit, or the pipeline has other transformers,
            other processors, or parallelism. From the pipeline's call: if gradient checkpointing would run forwards
            again, a timestep is none of the scheduler's, or something else has taken the processors' place.
        BackendUnavailable: If the named backend cannot run on this machine. From the pipeline's call: if it cannot
            run what the policy plans.
    """
    setting = _setting(attention, backend)
    transformers = _find_transformers(pipe, what="sparse_wan")
    sparse = SparseWan(pipe, setting)
    with ExitStack() as undo:
        for transformer in transformers:
            undo.enter_context(sparse._installed(transformer))
        yield sparse


@dataclass
class _Forward:
    """What processors need to know of the forward under way.

    Attributes:
        num_frames: Latent frames after patching.
        grid: Rows and columns of tokens in a frame.
        step_index: From the first step of the video.
        num_steps: Of the video.
        memory: What the policy keeps between the steps, of this transformer and this guidance branch.
    """

    num_frames: int
    grid: tuple[int, int]
    step_index: int
    num_steps: int
    memory: dict[Any, Any]


class SparseWan:
    """Sparse attention of one pipeline: what it has computed, and how; made by ``sparse_wan``."""

    def __init__(self, pipe: DiffusionPipeline, setting: AttentionSetting) -> None:
        self.policy = setting.policy
        if not self.policy.has_bidirectional_form:
            raise ValueError(
                f"attention policy {self.policy.name!r} is for block-autoregressive models and has no bidirectional "
                "form: use radial, svg, svg2, paro or sliding_tile here."
            )
        self.backend = setting.backend
        self._meter = _Meter(setting.policy)
        self._clock = Clock(pipe)
        self._forward: _Forward | None = None

    @property
    def density(self) -> float:
        """Share of the (query, key) pairs of self-attention computed so far, 0 to 1; dense calls count as 1."""
        return self._meter.density

    @property
    def num_calls(self) -> int:
        """Attention calls so far; a policy that looks at the tokens takes one for each sample of a batch."""
        return self._meter.num_calls

    @property
    def num_dense_calls(self) -> int:
        """Of them, those that the policy declined."""
        return self._meter.num_dense_calls

    @property
    def backends(self) -> dict[str, tuple[str, ...]]:
        """Backends that have run, by kind of call: ``dense``, ``sparse``. Kinds without calls are left out."""
        found: dict[str, set[str]] = {}
        for request in self._meter.requests.values():
            kind, backend = ("dense", "auto") if request.plan is None else ("sparse", self.backend)
            found.setdefault(kind, set()).add(_chosen(request, backend))
        return {kind: tuple(sorted(names)) for kind, names in sorted(found.items())}

    def __str__(self) -> str:
        kinds = "; ".join(f"{kind} by {', '.join(names)}" for kind, names in self.backends.items())
        return (
            f"attention {self.policy.name!r}: density {self.density:.3f}, {self.num_dense_calls} of {self.num_calls} "
            f"calls dense{f'; {kinds}' if kinds else ''}"
        )

    @contextmanager
    def _installed(self, transformer: WanTransformer3DModel) -> Iterator[None]:
        own = [block.attn1.processor for block in transformer.blocks]
        handle = transformer.register_forward_pre_hook(self._begin, with_kwargs=True)
        try:
            for layer, block in enumerate(transformer.blocks):
                block.attn1.set_processor(SparseWanProcessor(self, layer, len(own)))
            yield
        finally:
            handle.remove()
            for block, processor in zip(transformer.blocks, own, strict=True):
                block.attn1.set_processor(processor)
            self._clock.reset()
            self._forward = None

    @torch.compiler.disable
    def _begin(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Read frames, grid and step off what the transformer is given."""
        self._check_forward(transformer)
        given = dict(zip(("hidden_states", "timestep"), args, strict=False)) | kwargs
        shape, patch = given["hidden_states"].shape[2:], transformer.config.patch_size
        num_frames, *grid = (size // step for size, step in zip(shape, patch, strict=True))
        video, memory = self._clock.begin(transformer, given["timestep"])
        self._forward = _Forward(
            num_frames=num_frames,
            grid=tuple(grid),
            step_index=video.step_index,
            num_steps=video.num_steps,
            memory=memory,
        )

    def _check_forward(self, transformer: WanTransformer3DModel) -> None:
        for layer, block in enumerate(transformer.blocks):
            processor = block.attn1.processor
            if not isinstance(processor, SparseWanProcessor) or processor.sparse is not self:
                raise ValueError(
                    f"{type(processor).__name__} has taken the place of the sparse processor of block {layer}: change "
                    "processors before sparse_wan or after it. LongVideoPipeline takes attention= in its call instead."
                )
        _check_parallel(transformer)
        if transformer.gradient_checkpointing and torch.is_grad_enabled():
            raise ValueError(
                "gradient checkpointing runs a forward again when the next step may have begun, and its plans may "
                "differ: call under torch.no_grad(), or transformer.disable_gradient_checkpointing()."
            )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, num_layers: int) -> Tensor:
        forward = self._forward
        if forward is None:
            raise ValueError("self-attention was called by itself: call the transformer, whose input says the grid.")
        geometry = AttentionGeometry.bidirectional(
            forward.num_frames,
            forward.grid,
            step_index=forward.step_index,
            num_steps=forward.num_steps,
            layer=layer,
            num_layers=num_layers,
        )
        return sparse_attention(q, k, v, geometry, policy=self._meter, memory=forward.memory, backend=self.backend)


class SparseWanProcessor:
    """What ``WanAttnProcessor`` does for self-attention, over the blocks that a policy picks.

    Args:
        sparse: Knows the forward under way.
        layer: Of the block.
        num_layers: Blocks of the transformer.
    """

    def __init__(self, sparse: SparseWan, layer: int, num_layers: int) -> None:
        self.sparse = sparse
        self.layer = layer
        self.num_layers = num_layers

    # Plans are made by ordinary Python from the step, so a compiled block breaks its graph here.
    @torch.compiler.disable
    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            attn: ``WanAttention`` whose modules are used.
            hidden_states: (batch, tokens, dim).
            encoder_hidden_states: None: this is no cross-attention.
            attention_mask: None: the mask is the policy's.
            rotary_emb: Cosines and sines, (1, tokens, 1, head_dim) each, every value twice.

        Returns:
            (batch, tokens, dim).

        Raises:
            ValueError: If there is a mask, or other tokens than the transformer's own.
        """
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError(
                "sparse attention was given a mask or tokens of its own to attend to, which stock Wan self-attention "
                "never is: use the transformer as diffusers has it."
            )
        q, k, v = projected(attn, hidden_states, rotary_emb)
        out = self.sparse._attend(q, k, v, layer=self.layer, num_layers=self.num_layers)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


class _Meter(DensityMeter):
    """Also keeps the last request of every kind of call, which says what ``auto`` takes for it."""

    def __init__(self, policy: SparsePolicy) -> None:
        super().__init__(policy)
        self.requests: dict[AttentionRequest, AttentionRequest] = {}

    def plan(
        self, q: Tensor, k: Tensor, geometry: AttentionGeometry, *, v: Tensor, **options: Any
    ) -> BlockPlan | None:
        plan = super().plan(q, k, geometry, v=v, **options)
        request = AttentionRequest.of(q, k, v, plan)
        self.requests[request.signature] = request
        return plan


def _setting(attention: SparsePolicy | Mapping[str, Any] | str, backend: str | None) -> AttentionSetting:
    setting = AttentionSetting(attention)
    if backend is not None:
        setting.backend = backend
    setting.check_backend()
    return setting


def _chosen(request: AttentionRequest, backend: str) -> str:
    """The backend of a call that has been made: the named one, or what ``auto`` takes."""
    if backend != "auto":
        return backend
    return next((row.name for row in explain(request) if row.is_chosen), "none")


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
    transformers = _find_transformers(pipe, what="allocated_wan")
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
        _check_parallel(transformer)
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
