"""Cost of a block at true width, computed beforehand: bytes of everything, operations and traffic of every pass."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.models import make_transformer
from longtake.cache import (
    BlockTrace,
    CachePolicy,
    CacheStats,
    Context,
    EncodeJob,
    Geometry,
    KVCache,
    Pass,
    PolicyState,
)
from longtake.cache.simulation import job_shape
from longtake.models.causal import CausalTransformer, Prompt, Segment
from longtake.pipelines.loading import TRANSFORMERS
from longtake.pipelines.memory_plan import ModelShapes, PlanRequest, count_numbers, plan_memory
from longtake.samplers import make_sampler

NUM_LAYERS, BLOCK = 2, 3
META = torch.device("meta")
_DEVICE_OF = torch.Tensor.device.__get__
_ONEDNN = torch.mkldnn_convolution
PRODUCTS = frozenset({"addmm", "mm", "bmm", "linear", "convolution", "_linear_pointwise"})
FACTORIES = frozenset({"empty", "new_empty", "empty_like", "empty_strided", "zeros"})


@dataclass(frozen=True)
class Width:
    """The model that is built.

    Attributes:
        config: Of the transformer.
        frame_shape: (channels, height, width) of a latent frame.
        num_text_tokens: Length of the text.
        num_filled: Blocks in the cache before the one that is measured.
    """

    config: dict[str, Any]
    frame_shape: tuple[int, int, int] = (16, 60, 104)
    num_text_tokens: int = 512
    num_filled: int = 24  # every window is full; the compressed middle of ``pack`` has all it may select

    def geometry(self, dtype: torch.dtype, device: str) -> Geometry:
        """Shapes of the rollout."""
        _, height, width = self.frame_shape
        return Geometry(
            num_layers=self.config["num_layers"],
            num_heads=self.config["num_attention_heads"],
            head_dim=self.config["attention_head_dim"],
            num_rows=height // 2,
            num_columns=width // 2,
            frames_per_block=BLOCK,
            max_frames=BLOCK * (self.num_filled + 1),
            dtype=dtype,
            device=torch.device(device),
        )

    @property
    def dim(self) -> int:
        """Channels."""
        return self.config["num_attention_heads"] * self.config["attention_head_dim"]

    @property
    def num_tokens(self) -> int:
        """Tokens of a block."""
        return BLOCK * (self.frame_shape[1] // 2) * (self.frame_shape[2] // 2)


TRUE = Width(dict(TRANSFORMERS["1.3B"]) | {"num_layers": NUM_LAYERS})
SMALL = Width(
    {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 512, "num_layers": 1, "text_dim": 64},
    frame_shape=(16, 8, 8),
    num_text_tokens=8,
    num_filled=1,
)


@dataclass(frozen=True)
class Work:
    """Operations and traffic of a pass.

    Attributes:
        linear: Operations of linear layers, multiplications and additions.
        attended: Operations of attention.
        moved: Bytes that everything else reads and writes: norms, sums, rotations, copies.
    """

    linear: int
    attended: int
    moved: int


@dataclass(frozen=True)
class Planned:
    """Computed before anything is made.

    Attributes:
        weights: Bytes of the transformer.
        cache: Of storage and read sets.
        other: Of phases, text keys and values, modulation.
        activations: Of the largest moment.
        passes: Denoising steps and the commit.
    """

    weights: int
    cache: int
    other: int
    activations: int
    passes: tuple[Work, ...]

    @property
    def peak(self) -> int:
        """Bytes of everything at once."""
        return self.weights + self.cache + self.other + self.activations


def attend_nothing(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Allocate as fused attention does: its result, and the logarithm of every query's sum."""
    q.new_empty(q.shape[:-1], dtype=torch.float32)
    return q.new_empty(q.shape)


class _StandIn(TorchFunctionMode):
    """Lets meta tensors say that they are on a device, so that code goes the way it goes there.

    Args:
        device_type: ``cpu`` or ``cuda``.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device = torch.device(device_type)
        self._is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Tell the truth for a while."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Answer for the device, and keep on meta what is made on it."""
        if func == _DEVICE_OF:
            device = func(*args)
            return self.device if device.type == "meta" and not self._is_paused else device
        args = [self._on_meta(value) for value in args]
        kwargs = {key: self._on_meta(value) for key, value in (kwargs or {}).items()}
        if func is _ONEDNN:
            x, weight, bias, padding, stride, dilation, groups = args
            return torch.conv3d(x, weight, bias, stride, padding, dilation, groups)
        return func(*args, **kwargs)

    def _on_meta(self, value: Any) -> Any:
        return META if value is self.device else value  # this very object: others mean the processor itself


class _TruthfulState(PolicyState):
    """A policy's state that sees meta tensors as what they are: it has ways of its own where nothing can be chosen.

    Args:
        state: What it stands for.
        stand_in: Paused while the state works.
    """

    def __init__(self, state: PolicyState, stand_in: _StandIn) -> None:
        self._state = state
        self._stand_in = stand_in
        self.keeps_read_sets = state.keeps_read_sets

    def select(self, layer: int, pass_: Pass, q: Tensor | None = None) -> Context:
        with self._stand_in.paused():
            return self._state.select(layer, pass_, q)

    def commit(self, layer: int, pass_: Pass, q: Tensor, k: Tensor, v: Tensor) -> None:
        with self._stand_in.paused():
            self._state.commit(layer, pass_, q, k, v)

    def end_block(self, trace: BlockTrace) -> list[EncodeJob]:
        with self._stand_in.paused():
            return self._state.end_block(trace)

    def stats(self) -> CacheStats:
        return self._state.stats()

    def state_dict(self) -> dict[str, Any]:
        return self._state.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state.load_state_dict(state)


@contextmanager
def _standing_in(device_type: str, cache: KVCache) -> Iterator[None]:
    """Let meta tensors pass for those of a device, but for what the cache's policy does with them."""
    stand_in = _StandIn(device_type)
    state = cache.state
    try:
        cache.state = _TruthfulState(state, stand_in)
        with torch.no_grad(), stand_in:
            yield
    finally:
        cache.state = state


class _CountedAttention:
    """Allocates what attention does and counts its operations."""

    def __init__(self) -> None:
        self.flops = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        self.flops += 4 * q.numel() * k.shape[1]
        return attend_nothing(q, k, v, bias)


class _Moved(TorchDispatchMode):
    """Counts the bytes that operators read and write, those of ``PRODUCTS`` and of views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (func.is_view or name in PRODUCTS or name in FACTORIES):
            tensors = [x for x in (*args, *(result if isinstance(result, tuple | list) else (result,)))]
            tensors += [x for arg in args if isinstance(arg, list | tuple) for x in arg]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))
        return result


def plan_width(width: Width, policy: CachePolicy, dtype: torch.dtype, *, num_steps: int) -> Planned:
    """Compute what a block takes."""
    geometry = width.geometry(dtype, "meta")
    model = make_transformer(width.config, dtype, num_layers=geometry.num_layers)
    numbers = count_numbers("transformer", {name: p.numel() for name, p in model.named_parameters()})
    configs = {"transformer": width.config, "text_encoder": {"num_heads": 1, "d_model": 1}, "vae": {}}
    _, height, width_ = width.frame_shape
    plan = plan_memory(
        PlanRequest(
            shapes=ModelShapes(configs, {"transformer": numbers}, "random weights"),
            policy=policy,
            sampler=make_sampler("few_step"),
            height=8 * height,
            width=8 * width_,
            num_latent_frames=BLOCK * (width.num_filled + 1),
            frames_per_block=BLOCK,
            dtype=dtype,
            device_type="cpu",
            num_text_tokens=width.num_text_tokens,
            merge_commit=False,
        )
    )
    other = plan.cache.phases + plan.text + plan.modulation
    cache = plan.cache.allocated + plan.cache.read_sets
    passes = tuple(_works(width, policy, geometry, num_steps))
    return Planned(plan.weights["transformer"], cache, other, plan.forward, passes)


def pass_of(width: Width, step: int, num_steps: int) -> Pass:
    """A step of the block behind the full cache; the commit after the last."""
    kind = "commit" if step == num_steps else "denoise"
    return Pass(kind, width.num_filled, width.num_filled * BLOCK, BLOCK, step % num_steps)


def _works(width: Width, policy: CachePolicy, geometry: Geometry, num_steps: int) -> Iterator[Work]:
    """Run the block on meta tensors and count."""
    attention = _CountedAttention()
    model = make_transformer(width.config, geometry.dtype, num_layers=geometry.num_layers)
    causal = CausalTransformer(model, attention=attention)
    cache = KVCache(policy, geometry, attention=attend_nothing)
    for index in range(width.num_filled):
        _play_block(cache, index, width.frame_shape)
    cache.attention = attention
    text = (1, width.num_text_tokens, width.config.get("text_dim", 4096))
    prompt = Prompt(torch.empty(text, dtype=geometry.dtype, device="meta"))
    x = torch.empty(1, BLOCK, *width.frame_shape, device="meta")
    with torch.no_grad(), causal.installed():
        for step in range(num_steps + 1):
            attention.flops = 0
            segment = Segment(pass_of(width, step, num_steps), float(step))
            with _Moved() as moved, _standing_in("cpu", cache):
                causal.flow(x, segments=[segment], cache=cache, prompt=prompt)
            yield Work(linear_flops(width), attention.flops, moved.bytes)


def _play_block(cache: KVCache, index: int, frame_shape: tuple[int, int, int]) -> None:
    start = index * BLOCK
    _play(cache, Pass("denoise", index, start, BLOCK))
    _play(cache, Pass("commit", index, start, BLOCK))
    for job in cache.end_block(BlockTrace(index, start, torch.empty((1, BLOCK, *frame_shape), device=META))):
        num_frames, grid = job_shape(job, cache.geometry)
        _play(cache, Pass("encode", index, job.start_frame, num_frames, label=job.label, grid=grid))


def _play(cache: KVCache, pass_: Pass) -> None:
    """Let all layers attend, and commit if that is what the pass does."""
    g = cache.geometry
    rows, columns = pass_.grid or (g.num_rows, g.num_columns)
    shape = (g.batch_size, pass_.num_frames * rows * columns, g.num_heads, g.head_dim)
    for layer in range(g.num_layers):
        q, k, v = (torch.empty(shape, dtype=g.dtype, device=META) for _ in range(3))
        cache.attend(layer, q, k, v, pass_)


def linear_flops(width: Width) -> int:
    """Operations of a pass: both attentions without the projections of the text, feed-forward, patches in and out."""
    patch = 4 * width.frame_shape[0]
    layers = width.config["num_layers"] * (6 * width.dim**2 + 2 * width.dim * width.config["ffn_dim"])
    return 2 * width.num_tokens * (layers + 2 * patch * width.dim)
