"""What the making of plans costs in a rollout of the mini model, of all the time that its denoising takes."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from rich.table import Table

from longtake.attention import AttentionGeometry, BlockPlan, SparsePolicy, make_attention_policy
from longtake.attention.policies.base import StaticPolicy
from longtake.evaluation.running.protocol import load_protocol, split_entry
from longtake.pipelines.long_video import LongVideoPipeline
from longtake.scripts.console import out

PROMPT = "a red circle bouncing quickly over a navy striped background"
LABELS = ("radial-30", "light_forcing-30")
"""Of the protocol ``attention``: those that leave nothing dense but the first block, so that nearly all calls plan."""


class Clock:
    """Adds up processor seconds by name."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block."""
        begin = time.process_time()
        try:
            yield
        finally:
            self.seconds[name] += time.process_time() - begin
            self.calls[name] += 1


def timed(policy: SparsePolicy, clock: Clock) -> SparsePolicy:
    """A policy that makes the same plans, and notes how long each ``plan`` and each ``build`` of a layout takes."""
    kind: Any = type(policy)

    class Timed(kind):
        def plan(self, *args: Any, **options: Any) -> BlockPlan | None:
            with clock("plan"):
                return super().plan(*args, **options)

    class TimedStatic(Timed):
        def layout_plan(self, geometry: AttentionGeometry) -> BlockPlan | None:
            with clock("build"):
                return super().layout_plan(geometry)

    made: Any = TimedStatic if isinstance(policy, StaticPolicy) else Timed
    values = {item.name: getattr(policy, item.name) for item in fields(policy)}
    return made(**values)


def measure_plans(seconds: float = 60.0) -> dict[str, Any]:
    """Roll the mini model out under sparse policies and say which share of the time went into plans.

    A policy that looks at positions builds a plan for each layout and looks it up from then on; one that looks at the
    tokens has to choose in every call, which is part of its attention and no building.

    Args:
        seconds: Length of the video.
    """
    pipe = LongVideoPipeline.from_pretrained("mini")
    caches = load_protocol("attention").caches or {}
    titles = ("policy", "density", "calls", "s of denoising", "built", "building %", "looking up %", "choosing %")
    table = Table(*titles, title=f"plans in {seconds:g} s of the mini model, one video, processor time")
    record: dict[str, Any] = {}
    for label in LABELS:
        cache, attention = split_entry(caches[label])
        clock = Clock()
        policy = timed(make_attention_policy(attention), clock)
        session = pipe.start([PROMPT], seconds=seconds, cache=cache, attention=policy, seed=[0], decode=False)
        begin = time.process_time()
        with torch.no_grad():
            while session.next_block() is not None:
                pass
        total = time.process_time() - begin
        rest = clock.seconds["plan"] - clock.seconds["build"]
        shares = {
            "building": clock.seconds["build"] / total,
            "looking_up": rest / total if policy.is_static else None,
            "choosing": None if policy.is_static else rest / total,
        }
        counts = {"calls": clock.calls["plan"], "plans": clock.calls["build"]}
        record[label] = {"density": session.attention_density, "seconds": total, **counts, **shares}
        cells = ["-" if share is None else f"{100 * share:.2f}" for share in shares.values()]
        numbers = (f"{session.attention_density:.3f}", str(counts["calls"]), f"{total:.1f}", str(counts["plans"]))
        table.add_row(label, *numbers, *cells)
    out.print(table)
    return record
