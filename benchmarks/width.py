"""One block at Wan2.1-1.3B's true width against what is computed beforehand: keys and values, memory, time.

Two layers of the real shapes with random weights; the cache is filled with random keys and values, then one block is
denoised in four steps and committed. Every policy and dtype has a process of its own, so that one's memory is not the
next one's. Times are the processor's, of one thread, and so are the rates that they are computed from: what other
programs take does not count. The time that is computed is operations of linear layers and of attention and bytes
that everything else moves, each over its rate, taken at the same shapes before and after every pass.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers.models.attention import FeedForward
from rich.table import Table
from torch import Tensor, nn

from benchmarks.models import make_transformer
from benchmarks.width_plan import BLOCK, SMALL, TRUE, Width, attend_nothing, pass_of, plan_width
from longtake.attention import Attention, fastest
from longtake.cache import BlockTrace, CachePolicy, KVCache, Pass, make_policy
from longtake.cache.footprint import held_bytes
from longtake.configs.loader import load_preset
from longtake.models.causal import CausalTransformer, Prompt, Segment
from longtake.models.numerics import feed_forward
from longtake.samplers import Sampler, SeededNoise, make_sampler
from longtake.scripts.console import out, wait_briefly

POLICIES = ("attention_sink", "deep_forcing", "pack")
DTYPES = ("float32", "bfloat16")
LIMIT = 0.15
RATES = ("linear", "attended", "moved")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


# glibc keeps freed pieces of less than 32 MB for itself, half as much again as is in use; from this size on they go
# back at once, so that what is measured is what is needed.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}


def measure_block(width: Width, policy: CachePolicy, dtype: torch.dtype) -> dict[str, Any]:
    """Make the transformer, fill the cache, run a block; in a process that has done nothing else.

    Raises:
        OSError: If the system does not tell the most memory that a process had (Linux does).
    """
    sampler = make_sampler("few_step")
    planned = plan_width(width, policy, dtype, num_steps=sampler.num_steps(0))
    attention = fastest(torch.device("cpu"), dtype)
    rates = _Rates(width, dtype, attention, max(work.attended for work in planned.passes))
    rates.take()
    Block(SMALL, make_policy("full"), dtype, attention).sample(sampler)  # loads what the first forward loads
    rates.taken.clear()
    start_rss = _memory("VmRSS")
    block = Block(width, policy, dtype, attention)
    filled_rss = _memory("VmRSS")
    CLEAR.write_text("5")  # the most begins anew
    block.sample(sampler, rates.take)
    peak_rss = _memory("VmHWM")
    cache = block.cache
    computed = [
        work.linear / linear + work.attended / attended + work.moved / moved
        for work, (linear, attended, moved) in zip(planned.passes, rates.between(), strict=True)
    ]
    return {
        "kv_bytes": [sum(held_bytes(cache.state)) + cache.num_scratch_bytes, planned.cache],
        "peak_bytes": [peak_rss - start_rss, planned.peak],
        "activation_bytes": [peak_rss - filled_rss, planned.activations],
        "seconds": [sum(block.seconds), sum(computed)],
        "tflop": sum(work.linear + work.attended for work in planned.passes) / 1e12,
        **{f"giga_{name}": statistics.fmean(rate[i] for rate in rates.taken) / 1e9 for i, name in enumerate(RATES)},
    }


class Block:
    """The block that is measured, behind a full cache: its passes, and the seconds of each."""

    def __init__(self, width: Width, policy: CachePolicy, dtype: torch.dtype, attention: Attention) -> None:
        self.width = width
        self.seconds: list[float] = []
        config = width.config
        transformer = make_transformer(config, dtype, num_layers=config["num_layers"]).to_empty(device="cpu")
        torch.manual_seed(0)
        for parameter in transformer.parameters():
            parameter.data.normal_(0.0, 0.02)
        self.causal = CausalTransformer(transformer, attention=attention)
        self.cache = KVCache(policy, width.geometry(dtype, "cpu"), attention=attend_nothing)
        _fill(self.cache, width)
        self.cache.attention = attention
        self.prompt = Prompt(torch.zeros(1, width.num_text_tokens, width.config.get("text_dim", 4096), dtype=dtype))

    def sample(self, sampler: Sampler, between: Callable[[], None] = lambda: None) -> None:
        """All steps and the commit; ``between`` is called before, after and between the passes."""
        noise, shape = SeededNoise([0]), (1, BLOCK, *self.width.frame_shape)
        num_steps = sampler.num_steps(0)

        def flow(x: Tensor, timestep: float) -> Tensor:
            between()
            start = time.process_time()
            segment = Segment(pass_of(self.width, len(self.seconds), num_steps), timestep)
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
    """What this processor does per second at the block's shapes: linear layers, attention, moving; again and again."""

    def __init__(self, width: Width, dtype: torch.dtype, attention: Attention, attended_flops: int) -> None:
        tokens, dim, ffn = width.num_tokens, width.dim, width.config["ffn_dim"]
        num_layers, heads = width.config["num_layers"], width.config["num_attention_heads"]
        num_keys = attended_flops // (4 * tokens * dim * num_layers) - width.num_text_tokens
        rows = tokens // BLOCK  # a frame's worth: a third of the time, the same rate
        self._x = torch.randn(1, tokens, dim).to(dtype)
        self._square = nn.Linear(dim, dim).to(dtype)
        self._ffn = FeedForward(dim, inner_dim=ffn, activation_fn="gelu-approximate").to(dtype)
        qkv = ((rows, dim), (num_keys, dim), (num_keys, dim))
        self._qkv = [torch.randn(1, heads, n, dim // heads).to(dtype).transpose(1, 2) for n, _ in qkv]
        self._residual = torch.randn(1, tokens, dim)
        self._gate = torch.randn(1, 1, dim)
        self._attention = attention
        self.taken: list[tuple[float, float, float]] = []

    @torch.no_grad()
    def take(self) -> None:
        """Take all rates now."""
        x, (q, k, v), residual = self._x, self._qkv, self._residual
        # A layer has six square products for every feed-forward.
        square = 6 * 2 * x.numel() * x.shape[-1]
        wide = 2 * x.numel() * sum(p.numel() for p in self._ffn.parameters() if p.ndim == 2) // x.shape[-1]
        seconds = 6 * _seconds(lambda: self._square(x)) + _seconds(lambda: feed_forward(self._ffn, x))
        attended = 4 * q.numel() * k.shape[1]
        moving = _seconds(lambda: torch.addcmul(residual, residual, self._gate))
        rates = (square + wide) / seconds, attended / _seconds(lambda: self._attention(q, k, v))
        self.taken.append((*rates, 3 * residual.nbytes / moving))

    def between(self) -> list[tuple[float, ...]]:
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
    table = Table(
        "policy", "dtype", *headings, "GFLOP/s of linear layers, of attention; GB/s moved", f"all within {LIMIT:.0%}"
    )
    record = {}
    for name in policies:
        for dtype in dtypes:
            command = [sys.executable, "-m", "benchmarks.width", name, dtype, "--threads", str(threads)]
            done = subprocess.run(command, env=os.environ | ALLOCATOR, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed with exit code {done.returncode}")
            row = record[f"{name}.{dtype}"] = json.loads(done.stdout.splitlines()[-1])
            cells = [_compared(row[figure], 1e6 if figure.endswith("bytes") else 1.0) for figure in figures]
            rates = ", ".join(f"{row[f'giga_{rate}']:.3g}" for rate in RATES)
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
    shape = (3, 1, width.num_tokens, g.num_heads, g.head_dim)
    for index in range(width.num_filled):
        q, k, v = torch.randn(shape).to(g.dtype)
        for kind in ("denoise", "commit"):
            for layer in range(g.num_layers):
                cache.attend(layer, q, k, v, Pass(kind, index, index * BLOCK, BLOCK))
        cache.end_block(BlockTrace(index, index * BLOCK, torch.zeros(1, BLOCK, *width.frame_shape)))


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
