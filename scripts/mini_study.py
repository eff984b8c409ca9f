"""What the studies on the mini model share: their options, and making the videos that are missing."""

import json
import time
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
import typer
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor

from longtake.cache import make_policy
from longtake.evaluation.mini_world.drift_study import (
    CostMeter,
    read_results,
    run_study,
    study_fingerprint,
)
from longtake.evaluation.mini_world.drift_truth import truth_levels
from longtake.evaluation.mini_world.judge import load_judge
from longtake.evaluation.mini_world.moving_scenes import FPS, held_back_scenes
from longtake.evaluation.running.suites import PROMPT_SEED
from longtake.pipelines.long_video import LongVideoPipeline

console = Console(width=max(120, Console().width))


class Precision(StrEnum):
    """What the model computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def make_missing(
    pipe: LongVideoPipeline,
    *,
    policies: Mapping[str, Any],
    seconds: float,
    results: Path,
    prompts: int,
    seeds: int,
    batch: int,
    share: str,
    dtype: Precision,
    sampler: str,
    stop_after: float,
) -> None:
    """Make and measure what is missing of a study, and say how far it is.

    Args:
        pipe: The model.
        policies: {label: cache, as the pipeline takes it}.
        seconds: Length of every video.
        results: JSON lines, one per finished video; a run goes on where it ended.
        prompts: Held-back prompts.
        seeds: Videos per prompt and policy.
        batch: Videos made together.
        share: I/N: only every N-th prompt, from the I-th.
        dtype: Of the transformer's matmuls and the whole VAE.
        sampler: A mapping as text instead of the model's own.
        stop_after: Start no new batch after this many minutes.
    """
    part, parts = parse_share(share)
    pipe.vae.to(torch.bfloat16 if dtype is Precision.bfloat16 else torch.float32)
    judge = load_judge()
    solver = parse_sampler(sampler) if sampler else pipe.family.sampler
    common = {"sampler": str(solver), "dtype": dtype, "prompt_seed": PROMPT_SEED}
    modules = [pipe.transformer, pipe.vae, pipe.text_encoder, judge]
    prints = {
        name: study_fingerprint(modules, {**common, "seconds": seconds, "cache": repr(make_policy(cache))})
        for name, cache in policies.items()
    }
    costs = CostMeter()

    def frames_of(texts: list[str], noise_seeds: list[int], cache: Any) -> Iterator[Tensor]:
        chunks = pipe.stream(prompt=texts, seconds=seconds, cache=cache, seed=noise_seeds, sampler=solver)
        while True:
            begin = time.process_time()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is Precision.bfloat16):
                chunk = next(chunks, None)
            if chunk is None:
                return
            # Processor time, so that other work on the machine does not count; the chunk splits it.
            share = chunk.seconds["denoise"] / sum(chunk.seconds.values())
            costs.add(
                num_frames=chunk.frames.shape[1],
                seconds=share * (time.process_time() - begin) / len(texts),
                num_bytes=chunk.num_cache_bytes / len(texts),
            )
            yield chunk.frames

    begin = last = time.perf_counter()
    mine = range(part - 1, prompts, parts)
    total = len(mine) * seeds * len(policies)
    for finished in run_study(
        frames_of,
        judge,
        scenes=held_back_scenes(prompts, seed=PROMPT_SEED),
        policies=policies,
        num_seeds=seeds,
        batch_size=batch,
        fingerprints=prints,
        path=results,
        prompts=mine,
        costs=costs,
    ):
        now = time.perf_counter()
        name = finished[0].policy
        rate = len(finished) * seconds * FPS / (now - last)
        last = now
        done = sum(row.policy in policies for row in read_results(results))
        console.print(f"{name:>20s}: {done}/{total} videos, {rate:.0f} frames/s, {now - begin:.0f} s")
        if now - begin > 60.0 * stop_after:
            console.print(f"stopped after {stop_after:g} minutes; run the same command again to go on")
            break


def reference_levels(folder: Path, prompts: list[int]) -> dict[str, dict[str, float]]:
    """Levels of the true scenes of some prompts; measured once, then read from ``levels.json``."""
    judge = load_judge()
    key = study_fingerprint([judge], {"prompts": prompts, "prompt_seed": PROMPT_SEED})
    path = folder / "levels.json"
    known = json.loads(path.read_text()) if path.is_file() else {"key": None}
    if known["key"] != key:
        scenes = held_back_scenes(prompts[-1] + 1, seed=PROMPT_SEED)
        known = {"key": key, "levels": truth_levels(judge, [scenes[index] for index in prompts])}
        path.write_text(json.dumps(known, indent=1) + "\n")
    return known["levels"]


def parse_cache(text: str) -> tuple[str, Any]:
    """Read ``NAME`` or ``LABEL={policy: NAME, field: value}`` into (label, cache).

    Raises:
        typer.BadParameter: If the mapping cannot be read.
    """
    label, equals, mapping = text.partition("=")
    if not equals:
        return text, text
    values = OmegaConf.to_container(OmegaConf.create(mapping))
    if not isinstance(values, dict) or "policy" not in values:
        raise typer.BadParameter(f"{text!r}: write NAME or 'LABEL={{policy: NAME, field: value}}'.")
    return label, values


def parse_sampler(text: str) -> dict[str, Any]:
    """Read ``{name: NAME, field: value}``."""
    return OmegaConf.to_container(OmegaConf.create(text))


def parse_share(text: str) -> tuple[int, int]:
    """Read ``I/N`` with 1 <= I <= N.

    Raises:
        typer.BadParameter: If it is anything else.
    """
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise typer.BadParameter(f"share={text!r} is no I/N with 1 <= I <= N: write 1/2 and 2/2 for two runs.")
    return int(part), int(parts)


def replace_between(page: Path, table: str, *, begin: str, end: str) -> None:
    """Put a table between a page's two markers.

    Raises:
        typer.BadParameter: If the page has no markers.
    """
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise typer.BadParameter(f"{page} has no place for the table: add the lines {begin!r} and {end!r}.")
    page.write_text(f"{before}{begin}\n{table}{end}{after}")
