"""Sparse self-attention in diffusers' own bidirectional Wan pipelines, which are stock again afterwards."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, WanTransformer3DModel
from torch import Tensor, nn

from longtake.attention import (
    AttentionGeometry,
    AttentionRequest,
    BlockPlan,
    SparsePolicy,
    explain,
    sparse_attention,
)
from longtake.attention.dispatch import BACKEND_VARIABLE
from longtake.attention.policies.base import DensityMeter
from longtake.models.sparse_attention import AttentionSetting
from longtake.models.wan_pipelines import Clock, check_parallel, find_transformers, projected


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
    transformers = find_transformers(pipe, what="sparse_wan")
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
        check_parallel(transformer)
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
    """The backend of a call that has been made: the named one, the environment's, or what ``auto`` takes."""
    if backend == "auto":
        backend = os.environ.get(BACKEND_VARIABLE, backend)
    if backend != "auto":
        return backend
    return next((row.name for row in explain(request) if row.is_chosen), "none")
