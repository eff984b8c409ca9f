"""What eight and four bits cost in quality: one policy on the mini model, its tokens kept in different ways.

`python scripts/compare_storage.py` makes the videos that are missing (64 prompts of 30 seconds) and prints the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table

from longtake.cache import Geometry, make_policy
from longtake.cache.simulation import simulate
from longtake.configs.loader import load_preset
from longtake.evaluation.intervals import Interval, paired_by_prompt
from longtake.evaluation.mini_world.drift import ACCURACIES
from longtake.evaluation.mini_world.drift_report import by_policy
from longtake.evaluation.mini_world.drift_study import VideoResult, read_results, window_values
from longtake.pipelines.long_video import LongVideoPipeline
from longtake.scripts.mini_study import Precision, console, make_missing

PLAIN = "plain"
STORAGES: Mapping[str, Mapping[str, Any]] = {
    "int8": {"bits": 8},
    "int8 keys, int4 values": {"bits": 8, "value_bits": 4},
    "int4": {"bits": 4},
}
LIMIT = 0.01  # of judge accuracy
NUM_BLOCKS = 24  # fill any preset


def compare(
    inner: Annotated[str, typer.Option(help="Policy whose tokens are kept in different ways.")] = "attention_sink",
    results: Annotated[Path, typer.Option(help="JSON lines; a run goes on where it ended.")] = Path(
        "docs/storage/results.jsonl"
    ),
    prompts: Annotated[int, typer.Option(help="Held-back prompts.")] = 64,
    seeds: Annotated[int, typer.Option(help="Videos per prompt and storage.")] = 1,
    seconds: Annotated[float, typer.Option(help="Length of each video.")] = 30.0,
    batch: Annotated[int, typer.Option(help="Videos made together.")] = 16,
    model: Annotated[str, typer.Option(help="'mini' or a folder.")] = "mini",
    dtype: Annotated[Precision, typer.Option(help="Of the matmuls and the VAE.")] = Precision.bfloat16,
    sampler: Annotated[str, typer.Option(help="'{name: multi_step, ...}' instead of the model's own.")] = "",
    share: Annotated[str, typer.Option(help="I/N: every N-th prompt from the I-th; own --results.")] = "1/1",
    stop_after: Annotated[float, typer.Option(help="Start no new batch after this many minutes.")] = 1e9,
    run: Annotated[bool, typer.Option(help="Make what is missing, or only print the table.")] = True,
) -> None:
    """Make and measure what is missing, and print judge accuracy and bytes beside those of plain storage."""
    policies = storages(load_preset("cache", inner))
    if run:
        make_missing(
            LongVideoPipeline.from_pretrained(model),
            policies=policies,
            seconds=seconds,
            results=results,
            prompts=prompts,
            seeds=seeds,
            batch=batch,
            share=share,
            dtype=dtype,
            sampler=sampler,
            stop_after=stop_after,
        )
    rows = read_results(results)
    if not any(row.policy == PLAIN for row in rows):
        raise typer.BadParameter(f"{results} holds no finished videos: run `python scripts/compare_storage.py` first.")
    console.print(report(rows, policies))


def storages(inner: Mapping[str, Any]) -> dict[str, Any]:
    """{label: cache} of one policy kept in different ways."""
    coded = {name: {"policy": "quantized", "inner": dict(inner), **bits} for name, bits in STORAGES.items()}
    return {PLAIN: dict(inner), **coded}


def judge_accuracy(results: Sequence[VideoResult]) -> dict[tuple[int, int], float]:
    """{(prompt index, seed index): share of right answers}, mean of six questions over all windows of a video."""
    num_windows = max(len(result.windows) for result in results)
    right = [window_values(results, name, window) for window in range(num_windows) for name in ACCURACIES]
    return {key: float(np.nanmean([row.get(key, np.nan) for row in right])) for key in right[0]}


def stored_bytes(cache: Mapping[str, Any], dtype: torch.dtype) -> int:
    """Bytes that are kept between blocks at the 1.3B model's heads, once the cache is full."""
    geometry = Geometry(
        num_layers=1, num_heads=12, head_dim=128, num_rows=4, num_columns=4, frames_per_block=3, dtype=dtype
    )
    *_, last = simulate(make_policy(cache), replace(geometry, device=torch.device("meta")), NUM_BLOCKS)
    return last.stats.num_bytes


def report(results: Sequence[VideoResult], policies: Mapping[str, Any]) -> Table:
    """Accuracy, its paired difference to plain storage, and bytes, with a verdict on a point of accuracy."""
    table = Table("storage", "videos", "judge", "difference to plain", "within a point", "bytes to bfloat16")
    groups = by_policy(results)
    plain = judge_accuracy(groups[PLAIN])
    for name, cache in policies.items():
        if name not in groups:
            continue
        own = judge_accuracy(groups[name])
        share = stored_bytes(cache, torch.bfloat16) / stored_bytes(policies[PLAIN], torch.bfloat16)
        change = paired_by_prompt(own, plain)
        table.add_row(
            name,
            str(len(own)),
            f"{100 * np.mean(list(own.values())):.1f} %",
            "-" if name == PLAIN else _points(change),
            "-" if name == PLAIN else "yes" if abs(change.mean) <= LIMIT else "no",
            f"{share:.3f}x",
        )
    return table


def _points(change: Interval) -> str:
    return f"{100 * change.mean:+.2f} [{100 * change.low:+.2f}, {100 * change.high:+.2f}] points"


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(compare)
