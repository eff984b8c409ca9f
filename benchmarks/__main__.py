"""Speed and memory on this machine, as ratios within one process.

Six parts: how busy the transformer keeps the processor, a minute of video end to end, whether a thousand blocks stay
flat, what each cache policy costs, what sparse attention saves, and what measuring videos costs. Run it on an idle
machine with ``OMP_WAIT_POLICY=PASSIVE`` (``make bench``). A seventh, a block at true width, runs when it is named.
"""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from longtake.scripts.console import out, wait_briefly


class Part(StrEnum):
    """What to measure."""

    ALL = "all"
    TRANSFORMER = "transformer"
    VIDEO = "video"
    FLAT = "flat"
    POLICIES = "policies"
    ATTENTION = "attention"
    EVALUATION = "evaluation"
    WIDTH = "width"


def benchmark(
    part: Annotated[Part, typer.Argument(help="What to measure.")] = Part.ALL,
    blocks: Annotated[int, typer.Option(help="Blocks of the flatness run.", min=60)] = 1000,
    seconds: Annotated[float, typer.Option(help="Length of the videos.", min=1)] = 60,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Measure speed and memory on this machine.

    **width**: a block at Wan2.1-1.3B's true width against what is computed beforehand; ten minutes, not among all.

    **transformer**: share of the processor's matmul rate that a rollout reaches. **video**: the mini model from text
    to closed file. **flat**: time and memory per block over a long rollout. **policies**: time per block of every
    policy beside the sliding window that attends to as much. **attention**: gathered sparse attention beside dense
    attention, and what making plans costs in a rollout. **evaluation**: speed and peak memory of the metrics that need
    no weights.
    """
    from benchmarks import rollouts as measure
    from benchmarks.attention import measure_attention
    from benchmarks.evaluation import measure_evaluation
    from benchmarks.plans import measure_plans
    from benchmarks.policies import measure_policies

    record: dict[str, Any] = {"machine": measure.machine()}
    out.print(", ".join(f"{key} {value}" for key, value in record["machine"].items()))
    parts = {
        Part.FLAT: lambda: measure.measure_flat(blocks),  # first, while the process is small
        Part.TRANSFORMER: measure.measure_transformer,
        Part.VIDEO: lambda: measure.measure_video(seconds),
        Part.POLICIES: measure_policies,
        Part.ATTENTION: lambda: measure_attention() | {"plans": measure_plans(seconds)},
        Part.EVALUATION: measure_evaluation,
    }
    for name, take in parts.items():
        if part in (Part.ALL, name):
            record[name.value] = take()
    if part is Part.WIDTH:
        from benchmarks.width import measure_width

        record[part.value] = measure_width()
    if json_file is not None:
        json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Run the benchmark by itself."""
    wait_briefly()
    typer.run(benchmark)


if __name__ == "__main__":
    main()
