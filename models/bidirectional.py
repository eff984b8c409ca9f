"""Sparse attention and step allocation in diffusers' own bidirectional Wan pipelines, stock again afterwards."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from longtake.attention import (
    AttentionCall,
    AttentionGeometry,
    AttentionRequest,
    BlockPlan,
    SparsePolicy,
    explain,
    sparse_attention,
)
from longtake.attention.policies.base import DensityMeter, Memory
from longtake.configs.fields import build
from longtake.models.sparse_attention import AttentionSetting
from longtake.models.wan import AttentionProcessor, blocks_of, config_of, processors_set, project_out, project_qkv

# Components of a pipeline that are changed: the network, and Wan2.2's second one for low noise.
_TRANSFORMERS = ("transformer", "transformer_2")
# How far a timestep may be from the scheduler's, relative to it: the rounding of bfloat16.
_TIMESTEP_TOLERANCE = 2**-8


@dataclass
class _Video:
    """Progress of one video's denoising."""

    timesteps: Tensor  # the scheduler's own tensor: another one belongs to another video
    schedule: tuple[float, ...]  # its different values, in order
    first: int  # place in the schedule where the video began; more than 0 if it starts from another video
    step: int  # place in the schedule of the last forward
    num_forwards: int = 0  # of that step so far
    # By transformer and number of the forward in its step, which tells guidance branches apart.
    memories: dict[tuple[nn.Module, int], dict[Any, Any]] = field(default_factory=dict)

    @property
    def step_index(self) -> int:
        return self.step - self.first

    @property
    def num_steps(self) -> int:
        return len(self.schedule) - self.first


class _Clock:
    """Tells the videos, steps and guidance branches of a pipeline apart by the timesteps its networks are given."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self.video: _Video | None = None

    def begin(self, transformer: nn.Module, timestep: Tensor) -> tuple[_Video, dict[Any, Any]]:
        """Note a forward; returns its video, and the memory between steps of its network and guidance branch."""
        video = self._at(timestep)
        memory = video.memories.setdefault((transformer, video.num_forwards), {})
        video.num_forwards += 1
        return video, memory

    def _at(self, timestep: Tensor) -> _Video:
        timesteps, video = self._pipe.scheduler.timesteps, self.video
        if video is not None and video.timesteps is not timesteps:
            video = None
        schedule = video.schedule if video else tuple(dict.fromkeys(map(float, timesteps.tolist())))
        # Where frames or tokens have their own, those that are given keep 0.
        step = _step_of(float(timestep.max()), schedule)
        if video is None or step < video.step:
            video = self.video = _Video(timesteps, schedule, first=step, step=step)
        elif step > video.step:
            video.step, video.num_forwards = step, 0
        return video


def _step_of(timestep: float, schedule: tuple[float, ...]) -> int:
    step = min(range(len(schedule)), key=lambda index: abs(schedule[index] - timestep))
    if abs(schedule[step] - timestep) > _TIMESTEP_TOLERANCE * abs(timestep):
        raise ValueError(
            f"timestep={timestep:g} is none of the scheduler's {len(schedule)} timesteps, which say how far the video "
            "is: call pipe.scheduler.set_timesteps with the steps that are run."
        )
    return step


class _SelfAttentionChange:
    """Other self-attention in the transformers of a pipeline, as long as ``installed`` lasts.

    ``name`` is that of the function that changes it, for errors.
    """

    _processor_class: ClassVar[type[AttentionProcessor]]

    def __init__(self, pipe: Any, name: str) -> None:
        self._name = name
        self._transformers = _find_transformers(pipe, name=name)
        self._clock = _Clock(pipe)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Change all transformers inside the ``with`` block; they are stock after it, whatever happens in it."""
        with ExitStack() as undo:
            undo.callback(self._reset)
            for transformer in self._transformers:
                for handle in self._hook(transformer):
                    undo.callback(handle.remove)
                undo.enter_context(processors_set(self._processors(transformer)))
            yield

    def _processors(self, transformer: WanTransformer3DModel) -> Iterator[tuple[Any, AttentionProcessor]]:
        for layer, block in enumerate(blocks_of(transformer)):
            attn: Any = block.attn1
            processor = self._processor_class(self, layer)
            processor._attention_backend = attn.processor._attention_backend
            yield attn, processor

    def _hook(self, transformer: WanTransformer3DModel) -> list[RemovableHandle]:
        raise NotImplementedError

    def _reset(self) -> None:
        self._clock.video = None

    def _check_processors(self, transformer: WanTransformer3DModel, *, hint: str = "") -> None:
        for layer, block in enumerate(blocks_of(transformer)):
            processor = block.attn1.processor
            if not isinstance(processor, AttentionProcessor) or processor.owner is not self:
                raise ValueError(
                    f"{type(processor).__name__} has taken the place of {self._name}'s processor of block {layer}: "
                    f"change processors before {self._name} or after it.{hint}"
                )


def _given(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(("hidden_states", "timestep"), args, strict=False)) | kwargs


def _find_transformers(pipe: Any, *, name: str) -> list[WanTransformer3DModel]:
    """The networks of a pipeline, each once."""
    if not hasattr(pipe, "scheduler") or not hasattr(pipe, "transformer"):
        raise ValueError(f"{type(pipe).__name__} has no scheduler and transformer: give a diffusers Wan pipeline.")
    found = {getattr(pipe, part): part for part in reversed(_TRANSFORMERS) if hasattr(pipe, part)}
    found.pop(None, None)
    if not found:
        raise ValueError(f"{type(pipe).__name__} was loaded without a transformer: load one of {_TRANSFORMERS}.")
    for transformer, part in found.items():
        if not isinstance(transformer, WanTransformer3DModel):
            raise ValueError(
                f"{part} is a {type(transformer).__name__}, {name} knows WanTransformer3DModel: use a Wan text-, "
                "image- or video-to-video pipeline, and compile in place with transformer.compile()."
            )
        _check_parallel(transformer)
        for layer, block in enumerate(blocks_of(transformer)):
            processor = type(block.attn1.processor)
            if processor is not WanAttnProcessor or block.attn1.add_k_proj is not None:
                with_images = "" if block.attn1.add_k_proj is None else " with image conditioning"
                raise ValueError(
                    f"self-attention of block {layer} of {part} has a {processor.__name__}{with_images}: {name} "
                    "replaces diffusers' own WanAttnProcessor of text and video, once; restore it first."
                )
    return list(found)


def _check_parallel(transformer: WanTransformer3DModel) -> None:
    if transformer._parallel_config is not None:
        raise ValueError(
            "the transformer has a parallel_config, and all tokens and heads are needed in one place: "
            "load it without enable_parallelism."
        )


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate neighbouring channels of (batch, tokens, heads, head_dim) as ``WanAttnProcessor`` does.

    Cosines and sines are (1, tokens, 1, head_dim), every value twice.
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosines, sines = cosines[..., 0::2], sines[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * cosines - odd * sines
    out[..., 1::2] = even * sines + odd * cosines
    return out


def _rotated_qkv(attn: WanAttention, hidden_states: Tensor, rotary_emb) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = project_qkv(attn, hidden_states)
    return (q, k, v) if rotary_emb is None else (_rotated(q, *rotary_emb), _rotated(k, *rotary_emb), v)


@contextmanager
def sparse_wan(
    pipe: DiffusionPipeline,
    attention: SparsePolicy | Mapping[str, Any] | str = "radial",
    *,
    backend: str | None = None,
) -> Iterator["_SparseMeter"]:
    """Give a stock Wan pipeline sparse self-attention inside the ``with`` block.

    Only ``attn1`` of every block changes, and nothing of diffusers is patched globally. A model that was not trained
    with a mask loses quality with it; the first ``dense_steps`` steps and ``dense_layers`` layers are dense.

    ::

        with sparse_wan(pipe, {"policy": "radial", "dense_steps": 12, "decay_factor": 0.2}) as sparse:
            video = pipe(prompt, num_inference_steps=50).frames[0]
        print(sparse)  # density achieved, and the backends that ran

    A step is a timestep of ``pipe.scheduler``, counted from the first one of a video; forwards at one timestep
    (guidance runs two) belong to one step. A video begins when the scheduler's timesteps are set anew.

    Args:
        pipe: With a scheduler and ``WanTransformer3DModel`` transformers: text, image or video to video.
        attention: Attention policy, its mapping (``backend`` may name a backend), or its name.
        backend: Of sparse calls, instead of the mapping's; dense calls take ``auto``, not diffusers' backend.

    Yields:
        Count of the computed attention, readable after the block too.

    Raises:
        ValueError: If a setting does not fit, or the pipeline has other transformers, processors or parallelism; in
            its call, if gradient checkpointing is on, a timestep is unknown, or processors have been replaced.
        BackendUnavailable: If the backend cannot run on this machine, or cannot run what the policy plans.
    """
    setting = AttentionSetting(attention)
    if backend is not None:
        setting.backend = backend
    setting.check_backend()
    sparse = _SparseWan(pipe, setting)
    with sparse.installed():
        yield sparse.meter


class _SparseWanProcessor(AttentionProcessor["_SparseWan"]):
    """Self-attention of ``WanAttnProcessor`` over the blocks that a policy picks."""

    # Plans are made by ordinary Python from the step, so a compiled block breaks its graph here.
    @torch.compiler.disable
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError(
                "sparse attention was given a mask or tokens of its own to attend to, which stock Wan self-attention "
                "never is: use the transformer as diffusers has it."
            )
        q, k, v = _rotated_qkv(attn, hidden_states, rotary_emb)
        return project_out(attn, self.owner._attend(q, k, v, self.layer))


def _uncompiled(hook: Callable[..., Any]) -> Any:
    """A hook that compiled modules call outside their graph."""
    return torch.compiler.disable(hook)


class _SparseWan(_SelfAttentionChange):
    _processor_class = _SparseWanProcessor

    def __init__(self, pipe: DiffusionPipeline, setting: AttentionSetting) -> None:
        super().__init__(pipe, "sparse_wan")
        if not setting.policy.has_bidirectional_form:
            raise ValueError(
                f"attention policy {setting.policy.name!r} is for block-autoregressive models and has no "
                "bidirectional form: use radial, svg, svg2, paro or sliding_tile here."
            )
        self.meter = _SparseMeter(setting)
        self._geometry: AttentionGeometry | None = None
        self._memory: dict[Any, Any] = {}

    def _hook(self, transformer: WanTransformer3DModel) -> list[RemovableHandle]:
        return [transformer.register_forward_pre_hook(_uncompiled(self._begin), with_kwargs=True)]

    def _reset(self) -> None:
        super()._reset()
        self._geometry, self._memory = None, {}

    def _begin(self, transformer: WanTransformer3DModel, args: tuple, kwargs: dict[str, Any]) -> None:
        self._check_forward(transformer)
        given = _given(args, kwargs)
        shape, patch = given["hidden_states"].shape[2:], config_of(transformer).patch_size
        num_frames, rows, columns = (size // step for size, step in zip(shape, patch, strict=True))
        video, self._memory = self._clock.begin(transformer, given["timestep"])
        self._geometry = AttentionGeometry.bidirectional(
            num_frames,
            (rows, columns),
            step_index=video.step_index,
            num_steps=video.num_steps,
            num_layers=len(blocks_of(transformer)),
        )

    def _check_forward(self, transformer: WanTransformer3DModel) -> None:
        self._check_processors(transformer, hint=" LongVideoPipeline takes attention= in its call instead.")
        _check_parallel(transformer)
        if transformer.gradient_checkpointing and torch.is_grad_enabled():
            raise ValueError(
                "gradient checkpointing runs a forward again when the next step may have begun, and its plans may "
                "differ: call under torch.no_grad(), or transformer.disable_gradient_checkpointing()."
            )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        if self._geometry is None:
            raise ValueError("self-attention was called by itself: call the transformer, whose input says the grid.")
        geometry = self._geometry.at(step_index=self._geometry.step_index, layer=layer, kind="denoise")
        meter = self.meter
        return sparse_attention(q, k, v, geometry, policy=meter, memory=self._memory, backend=meter.backend)


class _SparseMeter(DensityMeter):
    """Count of the attention that a pipeline has computed: ``density``, ``num_calls``, ``num_dense_calls``, backends.

    The last request of every kind of call is kept: it says what ``auto`` takes for it.
    """

    def __init__(self, setting: AttentionSetting) -> None:
        super().__init__(setting.policy)
        self.backend = setting.backend
        self._requests: dict[AttentionRequest, AttentionRequest] = {}

    @property
    def backends(self) -> dict[str, tuple[str, ...]]:
        """Backends that have run, by kind of call: ``dense``, ``sparse``. Kinds without calls are left out."""
        found: dict[str, set[str]] = {}
        for request in self._requests.values():
            kind, backend = ("dense", "auto") if request.plan is None else ("sparse", self.backend)
            if backend == "auto":
                backend = next((row.name for row in explain(request) if row.is_chosen), "none")
            found.setdefault(kind, set()).add(backend)
        return {kind: tuple(sorted(names)) for kind, names in sorted(found.items())}

    def __str__(self) -> str:
        kinds = "; ".join(f"{kind} by {', '.join(names)}" for kind, names in self.backends.items())
        return (
            f"attention {self.policy.name!r}: density {self.density:.3f}, {self.num_dense_calls} of {self.num_calls} "
            f"calls dense{f'; {kinds}' if kinds else ''}"
        )

    def plan(
        self,
        q: Tensor | None,
        k: Tensor | None,
        geometry: AttentionGeometry,
        *,
        v: Tensor | None = None,
        memory: Memory | None = None,
    ) -> BlockPlan | None:
        plan = super().plan(q, k, geometry, v=v, memory=memory)
        if q is not None and k is not None and v is not None:
            request = AttentionRequest.of(AttentionCall(q, k, v, plan))
            self._requests[request.signature] = request
        return plan


def _relative_change(velocity: Tensor, before: Tensor, eps: float = 1e-6) -> Tensor:
    """Change of (batch, tokens, channels) velocities in one step, relative to those before: (tokens,), float32.

    The mean over the batch, because one allocation serves all its samples.
    """
    velocity, before = velocity.float(), before.float()
    change = (velocity - before).abs().sum(-1) / (before.abs().sum(-1) + eps)
    return change.mean(0)


@dataclass(frozen=True, kw_only=True)
class StepAllocation:
    """Schedule of the steps in which each token is computed: tokens that change little take fewer.

    All tokens are computed in the first steps and in the last one; in between a token of stride s in every s-th.

    A reconstruction: the abstract of "Not All Tokens Need 40 Steps" (arXiv:2605.06892) says that budgets follow
    velocity dynamics, that active tokens attend to cached keys and values of the others, and that skipped tokens move
    on by one cached Euler step. How tokens are ranked and strides are shared out is ours. For bidirectional models in
    many steps with an Euler sampler: four-step causal models have no steps to spare, and multistep samplers mix
    velocities of other steps.
    """

    target: float = 0.5  # share of the token steps of a plain run that is computed
    num_warmup_steps: int = 4  # full steps at the beginning; the last two say how fast tokens change
    strides: tuple[int, ...] = (1, 2, 4, 8)  # ascending; tokens that change most have the first

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise ValueError(f"target={self.target} must be above 0 and at most 1.")
        if self.num_warmup_steps < 2:
            raise ValueError(
                f"num_warmup_steps={self.num_warmup_steps} must be 2 or more: a change takes two velocities."
            )
        if not self.strides or self.strides[0] < 1 or list(self.strides) != sorted(set(self.strides)):
            raise ValueError(f"strides={list(self.strides)} must ascend from 1 or more, each once.")

    def shares(self, num_steps: int) -> tuple[float, ...]:
        """Share of the tokens that each stride gets, so that ``target`` is met: a geometric series."""
        if num_steps <= self.num_warmup_steps:
            raise ValueError(f"num_warmup_steps={self.num_warmup_steps} leaves none of {num_steps} steps: use fewer.")
        computed = [self._num_active_steps(stride, num_steps) / num_steps for stride in self.strides]
        if not min(computed) <= self.target <= max(computed):
            raise ValueError(
                f"target={self.target} cannot be met in {num_steps} steps, "
                f"only {min(computed):.3f} to {max(computed):.3f}: change strides or num_warmup_steps."
            )
        low, high = -60.0, 60.0
        for _ in range(100):
            slope = (low + high) / 2
            mean = sum(w * c for w, c in zip(self._series(slope), computed, strict=True))
            low, high = (slope, high) if mean < self.target else (low, slope)
        return self._series(high)

    def assign(self, change: Tensor, num_steps: int) -> Tensor:
        """Give every token its stride, (tokens,) int64, by its ``_relative_change``."""
        ends = torch.tensor(self.shares(num_steps), dtype=torch.float64).cumsum(0) * len(change)
        rank = torch.empty_like(change, dtype=torch.long)
        rank[change.argsort(descending=True, stable=True)] = torch.arange(len(change), device=change.device)
        group = torch.searchsorted(ends.round().long().to(change.device), rank, right=True)
        strides = torch.tensor(self.strides, device=change.device)
        return strides[group.clamp(max=len(self.strides) - 1)]

    def active(self, strides: Tensor, step: int, num_steps: int) -> Tensor | None:
        """Indices of the tokens that a step after the warm-up computes, ascending, int64; None: all."""
        if step == num_steps - 1:
            return None
        is_active = (step - self.num_warmup_steps) % strides == 0
        return None if bool(is_active.all()) else is_active.nonzero()[:, 0]

    def _num_active_steps(self, stride: int, num_steps: int) -> int:
        rest = range(self.num_warmup_steps, num_steps)
        return self.num_warmup_steps + sum(
            (step - self.num_warmup_steps) % stride == 0 or step == num_steps - 1 for step in rest
        )

    def _series(self, slope: float) -> tuple[float, ...]:
        """Shares that sum to one; the larger the slope, the more tokens have small strides."""
        logs = [-slope * index for index in range(len(self.strides))]
        weights = [math.exp(value - max(logs)) for value in logs]
        return tuple(weight / sum(weights) for weight in weights)


# Keys and values of all tokens by layer, those of skipped tokens as they last were: 5.6 GiB for Wan2.1 1.3B at 32,760
# tokens in bfloat16 and each guidance branch, 25 GiB for 14B.
_TokenCache = dict[int, tuple[Tensor, Tensor]]


def _updated(cache: _TokenCache, layer: int, k: Tensor, v: Tensor, active: Tensor | None) -> tuple[Tensor, Tensor]:
    """Replace keys and values of active tokens; returns those of all tokens, to be read before the next update."""
    if active is None:
        cache[layer] = (k.clone(), v.clone())
    else:
        for stored, new in zip(cache[layer], (k, v), strict=True):
            stored[:, active] = new
    return cache[layer]


# Remembered of a network and guidance branch between steps.
_CACHE, _VELOCITY, _CHANGE = "cache", "velocity", "change"


@contextmanager
def allocated_wan(
    pipe: DiffusionPipeline, allocation: StepAllocation | Mapping[str, Any] | None = None
) -> Iterator["_AllocatedWan"]:
    """Give still tokens fewer denoising steps in a stock Wan pipeline inside the ``with`` block.

    ::

        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=5.0)
        with allocated_wan(pipe, {"target": 0.5}) as allocated:
            video = pipe(prompt, num_inference_steps=50).frames[0]
        print(allocated)  # the share of token steps that was computed

    For many steps: a model of four has none to spare. Keys and values of all tokens are held for each layer and each
    guidance branch.

    Args:
        pipe: With an Euler scheduler and ``WanTransformer3DModel`` transformers: text, image or video to video.
        allocation: Settings of the allocation, or their mapping; None: half of the token steps.

    Yields:
        Count of the computed tokens (``share``, ``num_computed``, ``num_tokens``), readable after the block too.

    Raises:
        ValueError: If a setting does not fit, or the pipeline has another scheduler, other transformers, processors,
            a diffusers cache or parallelism; in its call, if the allocation does not fit the number of steps.
    """
    if not isinstance(allocation, StepAllocation):
        allocation = build(StepAllocation, allocation or {}, what="the step allocation")
    allocated = _AllocatedWan(pipe, allocation)
    with allocated.installed():
        yield allocated


class _ActiveTokens(AttentionProcessor["_AllocatedWan"]):
    """Self-attention of ``WanAttnProcessor`` in which active tokens ask and all tokens are read."""

    @torch.compiler.disable
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        # Hidden states are those of the active tokens, rotary_emb is of all.
        active, memory = self.owner._active, self.owner._memory
        if active is not None and rotary_emb is not None:
            rotary_emb = (rotary_emb[0][:, active], rotary_emb[1][:, active])
        q, k, v = _rotated_qkv(attn, hidden_states, rotary_emb)
        k, v = _updated(memory.setdefault(_CACHE, {}), self.layer, k, v, active)
        out = dispatch_attention_fn(q, k, v, attn_mask=attention_mask, backend=self._attention_backend)
        return project_out(attn, out.type_as(q))


class _AllocatedWan(_SelfAttentionChange):
    """Step allocation of one pipeline, and a count of what it has computed."""

    _processor_class = _ActiveTokens

    def __init__(self, pipe: DiffusionPipeline, allocation: StepAllocation) -> None:
        super().__init__(pipe, "allocated_wan")
        _check_scheduler(pipe)
        self.allocation = allocation
        # Token evaluations of a network so far, tokens x samples x forwards, and those of a stock pipeline.
        self.num_computed = self.num_tokens = 0
        self._pipe = pipe
        self._strides: tuple[_Video, Tensor] | None = None
        self._memory: dict[str, Any] = {}
        self._active: Tensor | None = None
        self._keeps_change = False

    @property
    def share(self) -> float:
        return self.num_computed / self.num_tokens if self.num_tokens else 1.0

    def __str__(self) -> str:
        return f"step allocation: {self.share:.3f} of {self.num_tokens} token evaluations computed"

    def _hook(self, transformer: WanTransformer3DModel) -> list[RemovableHandle]:
        return [
            transformer.register_forward_pre_hook(_uncompiled(self._begin), with_kwargs=True),
            blocks_of(transformer)[0].register_forward_pre_hook(_uncompiled(self._select)),
            transformer.proj_out.register_forward_hook(_uncompiled(self._complete)),
        ]

    def _reset(self) -> None:
        super()._reset()
        self._strides, self._memory, self._active = None, {}, None

    def _begin(self, transformer: WanTransformer3DModel, args: tuple, kwargs: dict[str, Any]) -> None:
        timestep = _given(args, kwargs)["timestep"]
        self._check_forward(transformer, timestep)
        video, self._memory = self._clock.begin(transformer, timestep)
        if video.step_index == 0:
            self.allocation.shares(video.num_steps)
        strides = self._strides_of(video)
        self._keeps_change = strides is None and video.step_index >= self.allocation.num_warmup_steps - 1
        self._active = None
        # A network that comes in late, as Wan2.2's second, has no keys of any token yet.
        if strides is not None and _VELOCITY in self._memory:
            self._active = self.allocation.active(strides, video.step_index, video.num_steps)

    def _strides_of(self, video: _Video) -> Tensor | None:
        """Strides of the video's tokens, shared out after the warm-up; None: all tokens are computed."""
        if self._strides is None or self._strides[0] is not video:
            changes = [memory[_CHANGE] for memory in video.memories.values() if _CHANGE in memory]
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
        self._check_processors(transformer)

    def _select(self, block: nn.Module, args: tuple) -> tuple | None:
        hidden_states = args[0]
        self.num_tokens += hidden_states.shape[0] * hidden_states.shape[1]
        if self._active is not None:
            hidden_states = hidden_states[:, self._active]
        self.num_computed += hidden_states.shape[0] * hidden_states.shape[1]
        return (hidden_states, *args[1:])

    def _complete(self, proj_out: nn.Module, args: tuple, velocity: Tensor) -> Tensor:
        """Put last velocities where tokens were skipped."""
        before = self._memory.get(_VELOCITY)
        if self._keeps_change and before is not None:
            self._memory[_CHANGE] = _relative_change(velocity, before)
        if self._active is not None and before is not None:
            whole = before.clone()
            whole[:, self._active] = velocity
            velocity = whole
        self._memory[_VELOCITY] = velocity
        return velocity


def _check_scheduler(pipe: Any) -> None:
    scheduler = pipe.scheduler
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or config_of(scheduler).stochastic_sampling:
        raise ValueError(
            f"{type(scheduler).__name__} mixes velocities of several steps or adds noise, and a skipped token has one "
            "velocity: use pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=...) without stochastic_sampling."
        )
