"""What ``longtake benchmark`` measures: ratios within one process, printed as tables and returned as numbers."""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import WanTransformer3DModel
from rich.table import Table

from longtake.pipelines import LatentRollout, LongVideoPipeline
from longtake.pipelines.video_file import VideoFormat, VideoWriter
from longtake.samplers import SeededNoise
from longtake.scripts.console import out

MATMUL_SIZE = 2048
NUM_CONTEXT_FRAMES = 21
BLOCK = 3
NUM_PASSES = 5  # four denoising steps and the commit
MANY_FRAMES = 3_000_000


@dataclass(frozen=True, kw_only=True)
class Size:
    """A transformer to measure: heads of 32, or of 128 as Wan's, ffn 4 x width, ``side`` x ``side`` tokens a frame."""

    width: int
    num_heads: int
    num_layers: int
    side: int
    num_text_tokens: int = 32

    def build(self, dtype: torch.dtype) -> WanTransformer3DModel:
        """Random weights; what diffusers keeps in float32 stays float32."""
        torch.manual_seed(0)
        model = WanTransformer3DModel(
            num_attention_heads=self.num_heads,
            attention_head_dim=self.width // self.num_heads,
            in_channels=16,
            out_channels=16,
            text_dim=64,
            ffn_dim=4 * self.width,
            num_layers=self.num_layers,
        )
        if dtype != torch.float32:
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                model = WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype)
        return model.eval()

    def block_flops(self) -> int:
        """Floating point operations of a block's five passes: projections, feed-forward and attention.

        Text keys and values, which are computed once per prompt, are not counted, and neither is anything that is
        not a matrix product.
        """
        queries, keys = BLOCK * self.side**2, NUM_CONTEXT_FRAMES * self.side**2
        linear = 2 * queries * (6 * self.width**2 + 2 * self.width * 4 * self.width)
        attention = 4 * queries * self.width * (keys + self.num_text_tokens)
        ends = 2 * queries * self.width * (64 + 64)
        return NUM_PASSES * (self.num_layers * (linear + attention) + ends)


SIZES = {
    "small": Size(width=192, num_heads=6, num_layers=6, side=4),
    "large": Size(width=512, num_heads=4, num_layers=8, side=16),
}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{name: os.environ.get(name, "unset") for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")},
    }


def matmul_rate(dtype: torch.dtype = torch.float32, *, repeats: int = 3) -> float:
    """Operations per second of a square matrix product: the median of several."""
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE).to(dtype)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * MATMUL_SIZE**3 / statistics.median(times)


def block_times(size: Size, dtype: torch.dtype) -> Iterator[float]:
    """Seconds of each block once the window is full, for as long as one asks."""
    rollout = LatentRollout(
        size.build(dtype),
        torch.zeros(1, size.num_text_tokens, 64),
        num_frames=MANY_FRAMES,
        frame_shape=(16, 2 * size.side, 2 * size.side),
        frames_per_block=BLOCK,
        cache={"policy": "sliding_window", "num_context_frames": NUM_CONTEXT_FRAMES},
        noise=SeededNoise([0]),
    )
    blocks = iter(rollout)
    for _ in range(NUM_CONTEXT_FRAMES // BLOCK + 1):
        next(blocks)
    while True:
        start = time.perf_counter()
        next(blocks)
        yield time.perf_counter() - start


def measure_transformer() -> dict[str, Any]:
    """Share of the processor's matmul rate that a rollout reaches, at two sizes.

    The rate is measured before and after every few blocks, and all dtypes of a size take turns: the speed of a
    shared machine changes by a third within seconds.
    """
    table = Table("size", "dtype", "ms per block", "GFLOP", "share of float32 matmul rate", "speed to float32")
    record: dict[str, Any] = {}
    for name, size in SIZES.items():
        dtypes = (torch.float32,) if name == "small" else (torch.float32, torch.bfloat16)
        num_rounds, num_blocks = (15, 10) if name == "small" else (8, 1)
        blocks = {dtype: block_times(size, dtype) for dtype in dtypes}
        times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes}
        shares: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes}
        rates = [matmul_rate()]
        for _ in range(num_rounds):
            for dtype in dtypes:
                taken = statistics.fmean(next(blocks[dtype]) for _ in range(num_blocks))
                rates.append(matmul_rate())
                times[dtype].append(taken)
                shares[dtype].append(size.block_flops() / taken / statistics.fmean(rates[-2:]))
        for dtype in dtypes:
            speedup = statistics.median(a / b for a, b in zip(times[torch.float32], times[dtype], strict=True))
            row = {
                "ms_per_block": 1000 * statistics.median(times[dtype]),
                "gflop": size.block_flops() / 1e9,
                "share_of_matmul_rate": statistics.median(shares[dtype]),
                "speed_to_float32": speedup,
                "matmul_gflops": statistics.median(rates) / 1e9,
            }
            label = str(dtype).removeprefix("torch.")
            table.add_row(
                f"{name}: {size.width} wide, {size.num_layers} layers, {size.side**2} tokens a frame",
                label,
                f"{row['ms_per_block']:.1f}",
                f"{row['gflop']:.1f}",
                f"{row['share_of_matmul_rate']:.1%}",
                f"{speedup:.2f}x",
            )
            record[f"{name}.{label}"] = row
    out.print(table)
    return record


def measure_video(seconds: float) -> dict[str, Any]:
    """The mini model from text to closed file: speed, first frame, and where the time goes."""
    start = time.perf_counter()
    pipe = LongVideoPipeline.from_pretrained("mini")
    loaded = time.perf_counter()
    session = pipe.start("a red circle bouncing quickly over a navy striped background", seconds=seconds, seed=0)
    spent = {"denoise": 0.0, "decode": 0.0, "write": 0.0}
    first_frame = 0.0
    with tempfile.TemporaryDirectory() as folder:
        video_format = VideoFormat(width=pipe.family.width, height=pipe.family.height, fps=session.fps)
        writer = VideoWriter(Path(folder) / "video.mp4", video_format=video_format)
        for chunk in session:
            before = time.perf_counter()
            writer.write(chunk.uint8()[0])
            spent["write"] += time.perf_counter() - before
            spent["denoise"] += chunk.seconds["denoise"]
            spent["decode"] += chunk.seconds["decode"]
            first_frame = first_frame or time.perf_counter() - loaded
        writer.close()
    total = time.perf_counter() - loaded
    shares = _operator_shares(pipe)
    record = {
        "seconds_of_video": session.num_frames / session.fps,
        "total_s": total,
        "times_real_time": session.num_frames / session.fps / total,
        "load_s": loaded - start,
        "first_frame_s": first_frame,
        "share_denoise": spent["denoise"] / total,
        "share_vae_decode": spent["decode"] / total,
        "share_encode_file": spent["write"] / total,
        **{f"share_of_denoise_{name}": share for name, share in shares.items()},
    }
    table = Table("video", *[key for key in record])
    table.add_row("mini", *[f"{value:.3g}" for value in record.values()])
    out.print(table)
    return record


def _operator_shares(pipe: LongVideoPipeline) -> dict[str, float]:
    """Shares of the denoising time spent in attention and in matrix products."""
    session = pipe.start(
        "a red circle bouncing quickly over a navy striped background", seconds=8, seed=0, decode=False
    )
    for _ in range(5):
        session.next_block()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(4):
            session.next_block()
    events = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in events)

    def share(*names: str) -> float:
        return sum(e.self_cpu_time_total for e in events if any(n in e.key for n in names)) / total

    return {"attention": share("scaled_dot_product"), "matmul": share("addmm", "aten::mm", "bmm", "conv3d")}


def measure_flat(num_blocks: int) -> dict[str, Any]:
    """Memory and time per block of bounded policies, early and late in a long rollout."""
    policies: Mapping[str, Mapping[str, Any]] = {
        "sliding_window": {"policy": "sliding_window", "num_context_frames": 12},
        "attention_sink": {"policy": "attention_sink", "num_context_frames": 12, "num_sink_frames": 3},
    }
    table = Table(
        "policy", "blocks", "RSS MB at block 50", f"at {num_blocks}", "growth", "ms per block, ratio late/early"
    )
    record = {}
    for name, policy in policies.items():
        early, late, times = _flat_run(policy, num_blocks)
        window = max(5, (num_blocks - 50) // 3)
        # Lower quartiles: other programs can only make a block slower.
        ratio = _lower_quartile(times[-window:]) / _lower_quartile(times[50 : 50 + window])
        growth = late / early - 1
        table.add_row(
            name, str(num_blocks), f"{early / 1e6:.1f}", f"{late / 1e6:.1f}", f"{growth:+.2%}", f"{ratio:.3f}"
        )
        record[name] = {"rss_block_50": early, "rss_last": late, "rss_growth": growth, "time_ratio": ratio}
    out.print(table)
    return record


def _lower_quartile(values: list[float]) -> float:
    return statistics.quantiles(values, n=4)[0]


def _flat_run(policy: Mapping[str, Any], num_blocks: int) -> tuple[int, int, list[float]]:
    """RSS at block 50 and at the end, and the seconds of every block."""
    size = Size(width=48, num_heads=2, num_layers=2, side=2)
    process = psutil.Process()
    times, early = [], 0
    for index, seconds in enumerate(_timed_blocks(size, policy, num_blocks)):
        times.append(seconds)
        if index == 50:
            early = process.memory_info().rss
    return early, process.memory_info().rss, times


def _timed_blocks(size: Size, policy: Mapping[str, Any], num_blocks: int) -> Iterator[float]:
    rollout = LatentRollout(
        size.build(torch.float32),
        torch.zeros(1, size.num_text_tokens, 64),
        num_frames=BLOCK * num_blocks,
        frame_shape=(16, 2 * size.side, 2 * size.side),
        frames_per_block=BLOCK,
        cache=policy,
        noise=SeededNoise([0]),
    )
    while True:
        start = time.perf_counter()
        if rollout.next_block() is None:
            return
        yield time.perf_counter() - start
