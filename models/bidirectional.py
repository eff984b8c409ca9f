"""Sparse self-attention in diffusers' own bidirectional Wan pipelines, which are stock again afterwards."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline, WanTransformer3DModel
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
from longtake.attention.density import DensityMeter
from longtake.attention.dispatch import BACKEND_VARIABLE
from longtake.models.sparse_attention import AttentionSetting

TRANSFORMERS = ("transformer", "transformer_2")
"""Components of a pipeline that become sparse: the network, and Wan2.2's second one for low noise."""

TIMESTEP_TOLERANCE = 2**-8
"""How far a timestep may be from the scheduler's, relative to it: the rounding of bfloat16."""


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
        attention: Attention policy, its mapping (``backend`` may name an executor), or its name.
        backend: Executor of what is sparse, instead of the mapping's; None: the mapping's, or ``auto``. What a policy
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
    transformers = _transformers(pipe)
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


@dataclass
class _Video:
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
        self._pipe = pipe
        self._meter = _Meter(setting.policy)
        self._video: _Video | None = None
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
            self._video = self._forward = None

    @torch.compiler.disable
    def _begin(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Read frames, grid and step off what the transformer is given."""
        self._check_forward(transformer)
        given = dict(zip(("hidden_states", "timestep"), args, strict=False)) | kwargs
        shape, patch = given["hidden_states"].shape[2:], transformer.config.patch_size
        num_frames, *grid = (size // step for size, step in zip(shape, patch, strict=True))
        video = self._at(given["timestep"])
        memory = video.memories.setdefault((transformer, video.num_forwards), {})
        video.num_forwards += 1
        self._forward = _Forward(
            num_frames=num_frames,
            grid=tuple(grid),
            step_index=video.step - video.first,
            num_steps=len(video.schedule) - video.first,
            memory=memory,
        )

    def _at(self, timestep: Tensor) -> _Video:
        """The video under way, at the step of a timestep."""
        timesteps = self._pipe.scheduler.timesteps
        video = self._video
        is_known = video is not None and video.timesteps is timesteps
        schedule = video.schedule if is_known else tuple(dict.fromkeys(map(float, timesteps.tolist())))
        # Where frames or tokens have their own, those that are given keep 0.
        step = _step_of(float(timestep.max()), schedule)
        if not is_known or step < video.step:
            self._video = video = _Video(timesteps, schedule, first=step, step=step)
        elif step > video.step:
            video.step, video.num_forwards = step, 0
        return video

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
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        heads = (attn.heads, -1)
        q, k, v = attn.norm_q(q).unflatten(2, heads), attn.norm_k(k).unflatten(2, heads), v.unflatten(2, heads)
        if rotary_emb is not None:
            q, k = _rotated(q, *rotary_emb), _rotated(k, *rotary_emb)
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


def _transformers(pipe: DiffusionPipeline) -> list[WanTransformer3DModel]:
    """The networks of a pipeline, each once, and all of them such that they can be made sparse."""
    if not hasattr(pipe, "scheduler") or not hasattr(pipe, "transformer"):
        raise ValueError(f"{type(pipe).__name__} has no scheduler and transformer: give a diffusers Wan pipeline.")
    found = {getattr(pipe, name): name for name in reversed(TRANSFORMERS) if hasattr(pipe, name)}
    found.pop(None, None)
    if not found:
        raise ValueError(f"{type(pipe).__name__} was loaded without a transformer: load one of {TRANSFORMERS}.")
    for transformer, name in found.items():
        if not isinstance(transformer, WanTransformer3DModel):
            raise ValueError(
                f"{name} is a {type(transformer).__name__}, sparse_wan knows WanTransformer3DModel: use a Wan text-, "
                "image- or video-to-video pipeline, and compile in place with transformer.compile()."
            )
        _check_parallel(transformer)
        for layer, block in enumerate(transformer.blocks):
            processor = type(block.attn1.processor)
            if processor is not WanAttnProcessor or block.attn1.add_k_proj is not None:
                with_images = "" if block.attn1.add_k_proj is None else " with image conditioning"
                raise ValueError(
                    f"self-attention of block {layer} of {name} has a {processor.__name__}{with_images}: sparse_wan "
                    "replaces diffusers' own WanAttnProcessor of text and video, once; restore it first."
                )
    return list(found)


def _check_parallel(transformer: WanTransformer3DModel) -> None:
    if transformer._parallel_config is not None:
        raise ValueError(
            "the transformer has a parallel_config, and sparse attention needs all tokens and heads in one place: "
            "load it without enable_parallelism."
        )


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


def _chosen(request: AttentionRequest, backend: str) -> str:
    """The backend of a call that has been made: the named one, the environment's, or what ``auto`` takes."""
    if backend == "auto":
        backend = os.environ.get(BACKEND_VARIABLE, backend)
    if backend != "auto":
        return backend
    return next((row.name for row in explain(request) if row.is_chosen), "none")
