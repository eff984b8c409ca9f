"""All cache policies on the mini model at several lengths: make the videos that are missing, then write the table."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from longtake.cache import POLICIES, make_policy
from longtake.cache.simulation import simulate
from longtake.configs.families import ModelFamily
from longtake.configs.loader import load_preset, preset_names
from longtake.evaluation.mini_world.drift_report import by_policy, draw_curves, write_csv
from longtake.evaluation.mini_world.drift_study import VideoResult, read_results
from longtake.evaluation.mini_world.policy_table import policy_tables, window_of
from longtake.pipelines.long_video import LongVideoPipeline
from longtake.scripts.mini_study import (
    Precision,
    console,
    make_missing,
    parse_cache,
    parse_share,
    reference_levels,
    replace_between,
)
from longtake.scripts.policy_pictures import TOY_CHANNELS, toy_geometry

MOMENTS = "5,30,60,120"
RESULTS = "policies"
BEGIN = "<!-- policy tables: written by scripts/compare_policies.py -->"
END = "<!-- end of policy tables -->"
PAGE = f"""# Results: every cache policy on the mini model

Same prompts and noise seeds for every policy; presets unless a label says otherwise. Each moment stands for the five
seconds of video that end there. `python scripts/compare_policies.py` makes what is missing and writes this page.

| column | what |
|---|---|
| shape ... one object | share of videos in which the [judge](judge.md) sees what the prompt says |
| judge, mean of six | mean of the first six of them |
| background PSNR | median background against that of the first five seconds, dB; still cameras |
| revisit PSNR | views against the first time the camera stood there, dB; panning cameras |
| motion kept | motion magnitude, as a share of the same videos' in the first five seconds |
| ms per block | processor time of denoising per block and video, batches of 16 together |
| KV MB | keys and values per video: storage, read sets, both guidance branches |

Brackets are 95 % intervals from a bootstrap over prompts, both seeds of a prompt drawn together; differences are
paired by prompt and seed, bold where the interval excludes zero. [drift.md](drift.md) defines the measures.

![Measures over time](results/curves.png)

{BEGIN}
{END}
"""


def compare(
    cache: Annotated[
        list[str],
        typer.Option(help="Policy name, or 'LABEL={policy: NAME, field: value}'; all presets unless given."),
    ] = (),
    out: Annotated[Path, typer.Option(help="Folder of the results and curves.")] = Path("docs/results"),
    page: Annotated[Path, typer.Option(help="Markdown page whose tables are replaced.")] = Path("docs/results.md"),
    prompts: Annotated[int, typer.Option(help="Held-back prompts.")] = 64,
    seeds: Annotated[int, typer.Option(help="Videos per prompt and policy.")] = 2,
    moments: Annotated[str, typer.Option(help="Seconds at which to compare; the last is the length.")] = MOMENTS,
    unbounded: Annotated[float, typer.Option(help="Length for policies whose memory grows with the video.")] = 60.0,
    batch: Annotated[int, typer.Option(help="Videos made together.")] = 16,
    model: Annotated[str, typer.Option(help="'mini' or a folder.")] = "mini",
    share: Annotated[str, typer.Option(help="I/N: only every N-th prompt, from the I-th; for N runs.")] = "1/1",
    dtype: Annotated[
        Precision, typer.Option(help="bfloat16: matmuls of the transformer, and the whole VAE.")
    ] = Precision.bfloat16,
    sampler: Annotated[str, typer.Option(help="'{name: multi_step, ...}' instead of the model's own.")] = "",
    stop_after: Annotated[float, typer.Option(help="Start no new batch after this many minutes.")] = 1e9,
    baseline: Annotated[str, typer.Option(help="Policy the others are compared with.")] = "sliding_window",
    videos: Annotated[Path | None, typer.Option(help="Folder to keep the videos in, one per policy.")] = None,
    run: Annotated[bool, typer.Option(help="Make what is missing, or only write the page.")] = True,
) -> None:
    """Make and measure what is missing, and write the tables of what there is."""
    times = [float(text) for text in moments.split(",")]
    for moment in times:
        window_of(moment)
    part, parts = parse_share(share)
    if run:
        pipe = LongVideoPipeline.from_pretrained(model)
        chosen = dict(parse_cache(text) for text in cache) if cache else all_presets(pipe.family)
        name = f"{RESULTS}.jsonl" if parts == 1 else f"{RESULTS}-{part}-of-{parts}.jsonl"
        make_missing(
            pipe,
            policies=chosen,
            seconds=lengths(chosen, pipe.family, longest=max(times), unbounded=unbounded),
            results=out / name,
            prompts=prompts,
            seeds=seeds,
            batch=batch,
            share=share,
            dtype=dtype,
            sampler=sampler,
            stop_after=stop_after,
            videos=videos,
        )
    rows = [row for path in sorted(out.glob(f"{RESULTS}*.jsonl")) for row in read_results(path)]
    write_report(rows, out=out, page=page, moments=times, baseline=baseline)


def all_presets(family: ModelFamily) -> dict[str, Any]:
    """Presets of the registry that a model family can run; wrappers, which show what they wrap, are left out."""
    chosen: dict[str, Any] = {}
    for name, cls in POLICIES.items():
        if "inner" in {field.name for field in fields(cls)}:
            continue
        settings = load_preset("cache", name) if name in preset_names("cache") else {"policy": name}
        try:
            make_policy(settings).start(toy_geometry(family.frames_per_block))
        except ValueError as error:
            console.print(f"{name} is left out: {error}", style="yellow", markup=False)
            continue
        chosen[name] = settings
    return chosen


def lengths(policies: Mapping[str, Any], family: ModelFamily, *, longest: float, unbounded: float) -> dict[str, float]:
    """Seconds of each policy's videos: those that read everything there ever was get shorter ones."""
    geometry = toy_geometry(family.frames_per_block)
    seconds = {}
    for label, cache in policies.items():
        *_, last = simulate(make_policy(cache), geometry, 2, latent_channels=TOY_CHANNELS)
        seconds[label] = longest if last.denoise.is_bounded else min(longest, unbounded)
    return seconds


def write_report(
    rows: Sequence[VideoResult], *, out: Path, page: Path, moments: Sequence[float], baseline: str
) -> None:
    """Write the tables into the page, which is made if it is not there, and the curves beside the results.

    Raises:
        typer.BadParameter: If there are no results.
    """
    if not rows:
        raise typer.BadParameter(f"{out} holds no finished videos: run `python scripts/compare_policies.py` first.")
    levels = reference_levels(out, sorted({row.prompt_index for row in rows}))
    counts = ", ".join(f"{policy} {len(own)}" for policy, own in by_policy(rows).items())
    tables = policy_tables(rows, moments=moments, baseline=baseline, levels=levels)
    if not page.exists():
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(PAGE)
    replace_between(page, f"Videos per policy: {counts}.\n\n{tables}", begin=BEGIN, end=END)
    draw_curves(rows, out / "curves.png", levels=levels, title=f"videos per policy: {counts}")
    write_csv(rows, out / "curves.csv")
    console.print(f"wrote {page}, {out / 'curves.png'} and {out / 'curves.csv'}", markup=False)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(compare)
