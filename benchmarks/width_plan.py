"""What a block at true width takes, computed beforehand: bytes of everything, operations and traffic of every pass."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longtake.cache import CachePolicy, Geometry, Pass
from longtake.cache.allocation import PlayedCache, attend_nothing, play_cache
from longtake.models.causal import CausalTransformer, Prompt, Segment
from longtake.pipelines.memory_trace import standing_in, trace_forward
from longtake.pipelines.model_shapes import TRANSFORMERS, make_transformer

NUM_LAYERS, BLOCK = 2, 3
PRODUCTS = frozenset({"addmm", "mm", "bmm", "linear", "convolution", "_linear_pointwise"})
FACTORIES = frozenset({"empty", "new_empty", "empty_like", "empty_strided", "zeros"})


@dataclass(frozen=True)
class Width:
    """What is built.

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
        """Of a block."""
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
    """What a pass computes and moves.

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
    weights = sum(p.nbytes for p in make_transformer(width.config, dtype, num_layers=geometry.num_layers).parameters())
    cache = play_cache(policy, geometry, num_blocks=width.num_filled + 1).end
    settings = {"num_text_tokens": width.num_text_tokens, "device_type": "cpu", "merges_commit": False}
    forward = trace_forward(width.config, policy, geometry, num_blocks=width.num_filled, **settings)
    modulation = 6 * torch.float32.itemsize * width.dim * geometry.num_layers * (num_steps + 1)
    other = cache.phases + forward.text + modulation
    passes = tuple(_works(width, policy, geometry, num_steps))
    return Planned(weights, cache.allocated + cache.read_sets, other, forward.activations, passes)


def pass_of(width: Width, step: int, num_steps: int) -> Pass:
    """A step of the block behind the full cache; the commit after the last."""
    kind = "commit" if step == num_steps else "denoise"
    return Pass(kind, width.num_filled, width.num_filled * BLOCK, BLOCK, step % num_steps)


def _works(width: Width, policy: CachePolicy, geometry: Geometry, num_steps: int) -> Iterator[Work]:
    """Run the block on meta tensors and count."""
    attention = _CountedAttention()
    model = make_transformer(width.config, geometry.dtype, num_layers=geometry.num_layers)
    causal = CausalTransformer(model, attention=attention)
    played = PlayedCache(policy, geometry)
    for _ in range(width.num_filled):
        played.next_block()
    played.cache.attention = attention
    text = (1, width.num_text_tokens, model.config.text_dim)
    prompt = Prompt(torch.empty(text, dtype=geometry.dtype, device="meta"))
    x = torch.empty(1, BLOCK, *width.frame_shape, device="meta")
    with torch.no_grad(), causal.installed():
        for step in range(num_steps + 1):
            attention.flops = 0
            segment = Segment(pass_of(width, step, num_steps), float(step))
            with _Moved() as moved, standing_in("cpu", played.cache):
                causal.flow(x, segments=[segment], cache=played.cache, prompt=prompt)
            yield Work(linear_flops(width), attention.flops, moved.bytes)


def linear_flops(width: Width) -> int:
    """Of a pass: projections of both attentions but the text's, and the feed-forward; patches in and out."""
    patch = 4 * width.frame_shape[0]
    layers = width.config["num_layers"] * (6 * width.dim**2 + 2 * width.dim * width.config["ffn_dim"])
    return 2 * width.num_tokens * (layers + 2 * patch * width.dim)
