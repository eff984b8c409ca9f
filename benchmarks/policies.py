"""What a cache policy costs per block, beside the sliding window that attends to as much."""

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table

from benchmarks.rollouts import BLOCK, Size
from longtake.cache import POLICIES, CachePolicy, Geometry, make_policy
from longtake.cache.simulation import simulate
from longtake.cache.wrappers.wrapper import Wrapper
from longtake.configs.loader import load_preset
from longtake.pipelines import LatentRollout
from longtake.samplers import SeededNoise
from longtake.scripts.console import out

SIZE = Size(width=256, num_heads=2, num_layers=2, side=16)  # 256 tokens a frame, heads of 128 as Wan's
NUM_ROUNDS = 9
MOST_BLOCKS = 48  # played to find the steady state; a policy that still grows is compared as it grows
LIMIT = 1.15
# What a preset cannot know: a map of this model's heads.
SETTINGS: Mapping[str, Mapping[str, Any]] = {"forcing_kv": {"heads": [[0], [0]]}}


@dataclass(frozen=True)
class Steady:
    """What a policy attends to once its cache is full.

    Attributes:
        num_frames: Frames' worth of tokens, the block included.
        num_blocks: Blocks until then.
        grows: Whether there is no such state.
    """

    num_frames: float
    num_blocks: int
    grows: bool


def steady_state(policy: CachePolicy, geometry: Geometry) -> Steady:
    """Play a policy on the meta device until it attends to no more than before."""
    meta = replace(geometry, device=torch.device("meta"))
    most, since = 0.0, 0
    for block in simulate(policy, meta, MOST_BLOCKS):
        if block.denoise.num_tokens > most:
            most, since = block.denoise.num_tokens, block.index
    return Steady(most / geometry.tokens_per_frame + BLOCK, since + 1, since >= MOST_BLOCKS - 2)


def blocks_of(transformer: Any, policy: CachePolicy, num_given: int, num_blocks: int) -> Iterator[tuple[float, float]]:
    """Seconds of wall clock and of processor of ``num_blocks`` blocks after ``num_given`` frames that were given.

    Given frames are committed in one pass each, a fifth of what making them takes.
    """
    rollout = LatentRollout(
        transformer,
        torch.zeros(1, SIZE.num_text_tokens, 64),
        num_frames=BLOCK * (num_blocks + 1),
        frame_shape=(16, 2 * SIZE.side, 2 * SIZE.side),
        frames_per_block=BLOCK,
        cache=policy,
        noise=SeededNoise([0]),
        initial_latents=torch.randn(1, num_given, 16, 2 * SIZE.side, 2 * SIZE.side) if num_given else None,
    )
    rollout.next_block()
    for _ in range(num_blocks):
        wall, processor = time.perf_counter(), time.process_time()
        rollout.next_block()
        yield time.perf_counter() - wall, time.process_time() - processor


def policies_to_measure(names: tuple[str, ...] = ()) -> dict[str, CachePolicy]:
    """Presets of all policies, or of some; wrappers take what their preset says."""
    chosen = names or tuple(POLICIES)
    return {name: make_policy({**load_preset("cache", name), **SETTINGS.get(name, {})}) for name in chosen}


def measure_policies(*names: str, num_rounds: int = NUM_ROUNDS) -> dict[str, Any]:
    """Time per block of every policy against ``sliding_window`` of the same attended length.

    The two take turns block by block, so that a machine that slows down slows both; the figure is the median of the
    pairs' ratios.
    """
    torch.manual_seed(0)
    transformer = SIZE.build(torch.float32)
    geometry = Geometry(
        num_layers=SIZE.num_layers,
        num_heads=SIZE.num_heads,
        head_dim=SIZE.width // SIZE.num_heads,
        num_rows=SIZE.side,
        num_columns=SIZE.side,
        frames_per_block=BLOCK,
    )
    table = Table(
        "policy",
        "attended frames",
        "ms per block",
        "sliding_window",
        "ratio",
        f"at most {LIMIT}",
        "processor time",
        title=f"{SIZE.side**2} tokens a frame, {SIZE.num_layers} layers of {SIZE.width}, CPU, medians of pairs",
    )
    record: dict[str, Any] = {}
    for name, policy in policies_to_measure(names).items():
        try:
            row = _pairs(transformer, policy, geometry, num_rounds)
        except ValueError as error:
            table.add_row(name, "-", "-", "-", "-", "-", str(error)[:60])
            record[name] = {"error": str(error)}
            continue
        verdict = "a wrapper" if isinstance(policy, Wrapper) else "yes" if row["ratio"] <= LIMIT else "no"
        table.add_row(
            name,
            f"{row['attended_frames']:.1f}" + ("+" if row["grows"] else ""),
            f"{row['ms_per_block']:.0f}",
            f"{row['ms_sliding_window']:.0f}",
            f"{row['ratio']:.2f}",
            verdict,
            f"{row['processor_ratio']:.2f}",
        )
        record[name] = row
    out.print(table)
    return record


def _pairs(transformer: Any, policy: CachePolicy, geometry: Geometry, num_rounds: int) -> dict[str, Any]:
    steady = steady_state(policy, geometry)
    frames = 6 * BLOCK if steady.grows else max(round(steady.num_frames), 2 * BLOCK)
    num_given = BLOCK * (6 if steady.grows else steady.num_blocks)
    window = make_policy({"policy": "sliding_window", "num_context_frames": 1000 if steady.grows else frames})
    ours = blocks_of(transformer, policy, num_given, num_rounds)
    theirs = blocks_of(transformer, window, num_given, num_rounds)
    pairs = []
    for index in range(num_rounds):
        # Who goes first changes, because the second finds warmer caches.
        first, second = (ours, theirs) if index % 2 else (theirs, ours)
        times = next(first), next(second)
        pairs.append(times if index % 2 else times[::-1])
    return {
        "attended_frames": steady.num_frames if not steady.grows else float(num_given + BLOCK),
        "grows": steady.grows,
        "ms_per_block": 1000 * statistics.median(own[0] for own, _ in pairs),
        "ms_sliding_window": 1000 * statistics.median(other[0] for _, other in pairs),
        "ratio": statistics.median(own[0] / other[0] for own, other in pairs),
        "processor_ratio": statistics.median(own[1] / other[1] for own, other in pairs),
    }
