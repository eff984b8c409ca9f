"""What gathered sparse attention saves on this machine, beside dense attention over the same tokens.

On one thread and on all: gathering waits for its threads once per group of rows, so that on a machine with other work
to do it loses more of its time to waiting than dense attention does.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table

from benchmarks.rollouts import BLOCK
from longtake.attention import BlockPlan
from longtake.attention.backends import AttentionCall, find_backend
from longtake.attention.geometry import make_geometry
from longtake.attention.plan import uniform_edges
from longtake.attention.policies.radial import Radial
from longtake.scripts.console import out

GRID = (16, 16)
NUM_HEADS, HEAD_DIM = 4, 64


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        frames: Latent frames of the keys.
        is_cached: Whether only the last block asks, or every frame.
        limit: Speed-up that must be reached.
        num_pairs: How often the two take turns, for each number of threads.
        density: Of blocks picked per head at random, as policies that look at the tokens pick them; None: radial.
    """

    frames: int
    is_cached: bool
    limit: float | None
    num_pairs: int
    density: float | None = None

    def plan(self) -> BlockPlan:
        """Make the plan."""
        if self.density is not None:
            return self._picked(self.density)
        geometry = make_geometry(self.frames, GRID, block_frames=BLOCK if self.is_cached else None)
        later = replace(geometry, layer=1, num_layers=2, step_index=1, num_steps=4)
        plan = Radial().plan(None, None, later)
        if plan is None:
            raise RuntimeError("the policy declined a call that is past its dense beginning.")
        return plan

    def _picked(self, density: float) -> BlockPlan:
        keys = self.frames * GRID[0] * GRID[1]
        edges = uniform_edges(BLOCK * GRID[0] * GRID[1], 256), uniform_edges(keys, 64)
        scores = torch.rand(NUM_HEADS, *(len(own) - 1 for own in edges))
        kept = scores.topk(max(1, int(density * scores.shape[-1]))).indices
        return BlockPlan.from_dense_block_mask(
            torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True), *edges
        )


CASES = {
    "radial, whole video": Case(21, False, 1.3, 9),
    "radial, whole video, long": Case(84, False, 3.0, 2),
    "radial, cached": Case(21, True, 1.4, 15),
    "radial, cached, long": Case(84, True, 4.0, 15),
    "picked per head, cached": Case(21, True, None, 15, density=0.15),
    "picked per head, cached, long": Case(84, True, None, 15, density=0.15),
}


def measure_attention(*names: str) -> dict[str, Any]:
    """Time of ``gather_sdpa`` and of dense attention, which take turns; the figure is the median of the ratios.

    Making the plan is not in it: plans that do not look at the tokens are kept, and its time is given beside.

    Args:
        names: Entries of ``CASES``; none: all.
    """
    table = Table(
        *("plan", "queries", "keys", "density", "threads", "dense ms", "gather ms", "speed-up", "at least"),
        *("processor time", "ms to make"),
        title=f"{NUM_HEADS} heads x {HEAD_DIM}, float32, {GRID[0] * GRID[1]} tokens a frame, CPU, medians of pairs",
    )
    record: dict[str, Any] = {}
    for name in names or tuple(CASES):
        case = CASES[name]
        torch.manual_seed(0)
        start = time.perf_counter()
        plan = case.plan()
        making = time.perf_counter() - start
        sizes = {"queries": plan.num_queries, "keys": plan.num_keys, "density": plan.density}
        record[name] = {**sizes, "ms_plan": 1000 * making, "threads": {}}
        for num_threads in sorted({1, torch.get_num_threads()}):
            row = record[name]["threads"][num_threads] = measure_plan(plan, case.num_pairs, num_threads)
            table.add_row(
                *(name, str(plan.num_queries), str(plan.num_keys), f"{plan.density:.3f}", str(num_threads)),
                f"{row['ms_dense']:.1f}",
                f"{row['ms_gather']:.1f}",
                f"{row['speedup']:.2f}",
                "-" if case.limit is None else f"{case.limit} {'yes' if row['speedup'] >= case.limit else 'no'}",
                f"{row['processor_speedup']:.2f}",
                f"{1000 * making:.1f}",
            )
    out.print(table)
    return record


def measure_plan(plan: BlockPlan, num_pairs: int, num_threads: int) -> dict[str, float]:
    """Measure one comparison, after a run of each that is not counted.

    Args:
        plan: What is read.
        num_pairs: How often the two take turns.
        num_threads: Threads of both.
    """
    shape = (1, plan.num_keys, NUM_HEADS, HEAD_DIM)
    q, k, v = torch.randn(1, plan.num_queries, NUM_HEADS, HEAD_DIM), torch.randn(shape), torch.randn(shape)
    runs = [
        lambda: find_backend("sdpa").run(AttentionCall(q, k, v)),
        lambda: find_backend("gather_sdpa").run(AttentionCall(q, k, v, plan)),
    ]
    pairs, before = [], torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with torch.inference_mode():
            for index in range(num_pairs + 1):
                # Who goes first changes, because the second finds warmer caches.
                order = (0, 1) if index % 2 else (1, 0)
                taken = {which: _take(runs[which]) for which in order}
                pairs.append((taken[0], taken[1]))
    finally:
        torch.set_num_threads(before)
    return {
        "ms_dense": 1000 * statistics.median(dense[0] for dense, _ in pairs[1:]),
        "ms_gather": 1000 * statistics.median(gather[0] for _, gather in pairs[1:]),
        "speedup": statistics.median(dense[0] / gather[0] for dense, gather in pairs[1:]),
        "processor_speedup": statistics.median(dense[1] / gather[1] for dense, gather in pairs[1:]),
    }


def _take(run: Callable[[], Any]) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - processor
