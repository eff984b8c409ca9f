"""One block at Wan2.1-1.3B's true width against what is computed beforehand: keys and values, memory, time.

Two layers of the real shapes with random weights; the cache is filled with random keys and values, then one block is
denoised in four steps and committed. Every policy and dtype has a process of its own, so that one's memory is not the
next one's. Times are the processor's, of one thread, and so are the rates that they are computed from: what other
programs take does not count.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from longtake.attention import Attention, fastest
from longtake.cache import BlockTrace, CachePolicy, Geometry, KVCache, Pass, make_policy
from longtake.cache.allocation import PlayedCache, attend_nothing, held_bytes, play_cache
from longtake.configs.loader import load_preset
from longtake.configs.waiting import wait_briefly
from longtake.models.causal import CausalTransformer, Prompt, Segment
from longtake.pipelines.memory_trace import ForwardBytes, trace_forward
from longtake.pipelines.model_shapes import TRANSFORMERS, meta_transformer
from longtake.samplers import Sampler, SeededNoise, make_sampler
from longtake.scripts.console import out

POLICIES = ("attention_sink", "deep_forcing", "pack")
DTYPES = ("float32", "bfloat16")
LIMIT = 0.15
NUM_LAYERS, BLOCK = 2, 3
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


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


TRUE = Width(dict(TRANSFORMERS["1.3B"]) | {"num_layers": NUM_LAYERS})
SMALL = Width(
    {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 512, "num_layers": 1, "text_dim": 64},
    frame_shape=(16, 8, 8),
    num_text_tokens=8,
    num_filled=1,
)
# glibc keeps freed pieces of less than 32 MB for itself, half as much again as is in use; from this size on they go
# back at once, so that what is measured is what is needed.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}


@dataclass(frozen=True)
class Planned:
    """Computed before anything is made: bytes, and multiply-adds times two of every pass.

    Attributes:
        weights: Of the transformer.
        cache: Storage and read sets.
        other: Phases, text keys and values, modulation.
        activations: Largest moment.
        passes: (operations of linear layers, of attention) by pass.
    """

    weights: int
    cache: int
    other: int
    activations: int
    passes: tuple[tuple[int, int], ...]

    @property
    def peak(self) -> int:
        """Everything at once."""
        return self.weights + self.cache + self.other + self.activations


class CountedAttention:
    """Allocates what attention does and counts its operations."""

    def __init__(self) -> None:
        self.flops = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """Count one call."""
        self.flops += 4 * q.numel() * k.shape[1]
        return attend_nothing(q, k, v, bias)


def plan_width(width: Width, policy: CachePolicy, dtype: torch.dtype, *, num_steps: int) -> Planned:
    """Compute what a block takes."""
    geometry = width.geometry(dtype, "meta")
    weights = sum(p.nbytes for p in meta_transformer(width.config, dtype, num_layers=geometry.num_layers).parameters())
    cache = play_cache(policy, geometry, num_blocks=width.num_filled + 1).end
    settings = {"num_text_tokens": width.num_text_tokens, "device_type": "cpu", "merges_commit": False}
    forward: ForwardBytes = trace_forward(width.config, policy, geometry, num_blocks=width.num_filled, **settings)
    played = PlayedCache(policy, geometry)
    for _ in range(width.num_filled):
        played.next_block()
    played.cache.attention = counted = CountedAttention()
    passes = []
    for step in range(num_steps + 1):
        counted.flops = 0
        played.play(_pass(width, step, num_steps))
        passes.append((_linear_flops(width), counted.flops + _text_flops(width)))
    modulation = 6 * 4 * _dim(width) * geometry.num_layers * (num_steps + 1)
    other = cache.phases + forward.text + modulation
    return Planned(weights, cache.allocated + cache.read_sets, other, forward.activations, tuple(passes))


def measure_block(width: Width, policy: CachePolicy, dtype: torch.dtype) -> dict[str, Any]:
    """Make the transformer, fill the cache, run a block; in a process that has done nothing else.

    Raises:
        OSError: If the system does not tell the most memory that a process had (Linux does).
    """
    sampler = make_sampler("few_step")
    planned = plan_width(width, policy, dtype, num_steps=sampler.num_steps(0))
    attention = fastest(torch.device("cpu"), dtype)
    rates = _Rates(width, dtype, attention, max(flops for _, flops in planned.passes))
    rates.take()
    _Block(SMALL, make_policy("full"), dtype, attention).sample(sampler)  # loads what the first forward loads
    rates.taken.clear()
    start_rss = _memory("VmRSS")
    block = _Block(width, policy, dtype, attention)
    filled_rss = _memory("VmRSS")
    CLEAR.write_text("5")  # the most begins anew
    block.sample(sampler, rates.take)
    peak_rss = _memory("VmHWM")
    cache = block.cache
    computed = [
        linear / linear_rate + attended / attention_rate
        for (linear, attended), (linear_rate, attention_rate) in zip(planned.passes, rates.between(), strict=True)
    ]
    return {
        "kv_bytes": [sum(held_bytes(cache.state)) + cache.num_scratch_bytes, planned.cache],
        "peak_bytes": [peak_rss - start_rss, planned.peak],
        "activation_bytes": [peak_rss - filled_rss, planned.activations],
        "seconds": [sum(block.seconds), sum(computed)],
        "tflop": sum(map(sum, planned.passes)) / 1e12,
        "gflops_linear": statistics.fmean(rate for rate, _ in rates.taken) / 1e9,
        "gflops_attention": statistics.fmean(rate for _, rate in rates.taken) / 1e9,
    }


class _Block:
    """The block that is measured, behind a full cache: its passes, and the seconds of each."""

    def __init__(self, width: Width, policy: CachePolicy, dtype: torch.dtype, attention: Attention) -> None:
        self.width = width
        self.seconds: list[float] = []
        config = width.config
        transformer = meta_transformer(config, dtype, num_layers=config["num_layers"]).to_empty(device="cpu")
        torch.manual_seed(0)
        for parameter in transformer.parameters():
            parameter.data.normal_(0.0, 0.02)
        self.causal = CausalTransformer(transformer, attention=attention)
        self.cache = KVCache(policy, width.geometry(dtype, "cpu"), attention=attend_nothing)
        _fill(self.cache, width)
        self.cache.attention = attention
        self.prompt = Prompt(torch.zeros(1, width.num_text_tokens, transformer.config.text_dim, dtype=dtype))

    def sample(self, sampler: Sampler, between: Callable[[], None] = lambda: None) -> None:
        """All steps and the commit; ``between`` is called before, after and between the passes."""
        noise, shape = SeededNoise([0]), (1, BLOCK, *self.width.frame_shape)
        num_steps = sampler.num_steps(0)

        def flow(x: Tensor, timestep: float) -> Tensor:
            between()
            start = time.process_time()
            segment = Segment(_pass(self.width, len(self.seconds), num_steps), timestep)
            out = self.causal.flow(x, segments=[segment], cache=self.cache, prompt=self.prompt)
            self.seconds.append(time.process_time() - start)
            return out

        def denoise(x: Tensor, timestep: float) -> Tensor:
            return x - timestep / 1000.0 * flow(x, timestep)

        with torch.no_grad(), self.causal.installed():
            first = noise.initial(0, 0, shape)
            latents = sampler.sample(
                denoise, first, renoise=lambda step: noise.renoise(0, 0, step, shape), block_index=0
            )
            flow(latents, 0.0)
        between()


class _Rates:
    """Operations per second of linear layers and of attention at the block's shapes, taken again and again."""

    def __init__(self, width: Width, dtype: torch.dtype, attention: Attention, attended_flops: int) -> None:
        tokens, dim, ffn = _num_tokens(width), _dim(width), width.config["ffn_dim"]
        heads = width.config["num_attention_heads"]
        num_keys = attended_flops // (4 * tokens * dim * width.config["num_layers"])
        rows = max(1, tokens // BLOCK)  # a frame's worth: a third of the time, the same rate
        self._x, self._wide = torch.randn(tokens, dim).to(dtype), torch.randn(rows, ffn).to(dtype)
        self._weights = [torch.randn(n, m).to(dtype) for n, m in ((dim, dim), (ffn, dim), (dim, ffn))]
        self._qkv = [
            torch.randn(1, heads, n, dim // heads).to(dtype).transpose(1, 2) for n in (rows, num_keys, num_keys)
        ]
        self._attention = attention
        # Operations of a layer's products: six square ones, and the two of the feed-forward.
        self._shares = [6 * dim * dim, dim * ffn, dim * ffn]
        self.taken: list[tuple[float, float]] = []

    def take(self) -> None:
        """Take both rates now."""
        inputs = (self._x, self._x[: len(self._wide)], self._wide)
        per_second = [
            2 * x.shape[0] * weight.numel() / _seconds(lambda x=x, weight=weight: functional.linear(x, weight))
            for x, weight in zip(inputs, self._weights, strict=True)
        ]
        linear = sum(self._shares) / sum(share / rate for share, rate in zip(self._shares, per_second, strict=True))
        q, k, v = self._qkv
        attention = 4 * q.numel() * k.shape[1] / _seconds(lambda: self._attention(q, k, v))
        self.taken.append((linear, attention))

    def between(self) -> list[tuple[float, float]]:
        """Mean rates around each pass: of what was taken before and after it."""
        pairs = zip(self.taken, self.taken[1:], strict=False)
        return [tuple(statistics.harmonic_mean(side) for side in zip(*pair, strict=True)) for pair in pairs]


def measure_width(
    policies: tuple[str, ...] = POLICIES, dtypes: tuple[str, ...] = DTYPES, *, threads: int = 1
) -> dict[str, Any]:
    """Measure every policy in every dtype, each in a process of its own, and print the table.

    Raises:
        RuntimeError: If one of the processes fails.
    """
    figures = ("kv_bytes", "peak_bytes", "activation_bytes", "seconds")
    headings = ("keys and values, MB", "peak memory, MB", "of it for the moment, MB", "seconds")
    table = Table("policy", "dtype", *headings, "GFLOP/s: linear, attention", f"all within {LIMIT:.0%}")
    record = {}
    for name in policies:
        for dtype in dtypes:
            command = [sys.executable, "-m", "longtake.scripts.measure_width", name, dtype, "--threads", str(threads)]
            done = subprocess.run(command, env=os.environ | ALLOCATOR, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed with exit code {done.returncode}")
            row = record[f"{name}.{dtype}"] = json.loads(done.stdout.splitlines()[-1])
            cells = [_compared(row[figure], 1e6 if figure.endswith("bytes") else 1.0) for figure in figures]
            rates = f"{row['gflops_linear']:.0f}, {row['gflops_attention']:.0f}"
            table.add_row(name, dtype, *cells, rates, "yes" if is_within(row) else "no")
    out.print(table)
    return record


def is_within(row: dict[str, Any]) -> bool:
    """Whether keys and values, peak memory and time are as computed, within ``LIMIT``."""
    pairs = (row[figure] for figure in ("kv_bytes", "peak_bytes", "seconds"))
    return all(abs(measured / planned - 1) <= LIMIT for measured, planned in pairs)


def _compared(pair: list[float], unit: float) -> str:
    measured, planned = pair
    return f"{measured / unit:.1f} of {planned / unit:.1f} ({measured / planned - 1:+.1%})"


def _fill(cache: KVCache, width: Width) -> None:
    """Random keys and values through all of the cache's work but attention."""
    g = cache.geometry
    shape = (3, 1, _num_tokens(width), g.num_heads, g.head_dim)
    for index in range(width.num_filled):
        qkv = torch.randn(shape).to(g.dtype)
        for kind in ("denoise", "commit"):
            for layer in range(g.num_layers):
                cache.attend(layer, *qkv, Pass(kind, index, index * BLOCK, BLOCK))
        cache.end_block(BlockTrace(index, index * BLOCK, torch.zeros(1, BLOCK, *width.frame_shape)))


def _pass(width: Width, step: int, num_steps: int) -> Pass:
    kind = "commit" if step == num_steps else "denoise"
    return Pass(kind, width.num_filled, width.num_filled * BLOCK, BLOCK, step % num_steps)


def _dim(width: Width) -> int:
    return width.config["num_attention_heads"] * width.config["attention_head_dim"]


def _num_tokens(width: Width) -> int:
    return BLOCK * width.frame_shape[1] // 2 * width.frame_shape[2] // 2


def _linear_flops(width: Width) -> int:
    """Of a pass: projections of both attentions but the text's, and the feed-forward; patches in and out."""
    dim, tokens = _dim(width), _num_tokens(width)
    patch = 4 * width.frame_shape[0]
    layers = width.config["num_layers"] * (6 * dim**2 + 2 * dim * width.config["ffn_dim"])
    return 2 * tokens * (layers + 2 * patch * dim)


def _text_flops(width: Width) -> int:
    return 4 * _num_tokens(width) * width.num_text_tokens * _dim(width) * width.config["num_layers"]


def _seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _memory(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def main(
    policy: Annotated[str, typer.Argument(help="Cache policy.")],
    dtype: Annotated[str, typer.Argument(help="float32 or bfloat16.")],
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
) -> None:
    """Measure one policy in one dtype; the last line is JSON."""
    torch.set_num_threads(threads)
    row = measure_block(TRUE, make_policy(load_preset("cache", policy)), getattr(torch, dtype))
    out.print(json.dumps(row), markup=False)


if __name__ == "__main__":
    wait_briefly()
    typer.run(main)
