"""How long videos of the mini model drift under different cache policies: run the study, and report it."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from longtake.evaluation.mini_world.drift import sampled_scene
from longtake.evaluation.mini_world.drift_report import by_policy, draw_curves, markdown_table, write_csv, write_json
from longtake.evaluation.mini_world.drift_study import measure_stream, read_results
from longtake.evaluation.mini_world.drift_truth import repeat_frames
from longtake.evaluation.mini_world.judge import WEIGHTS, load_judge
from longtake.evaluation.mini_world.moving_scenes import FPS, held_back_scenes
from longtake.evaluation.running.suites import PROMPT_SEED
from longtake.pipelines.long_video import LongVideoPipeline
from longtake.scripts.mini_study import (
    Precision,
    console,
    make_missing,
    parse_cache,
    reference_levels,
    replace_between,
)

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
DEFAULT_RESULTS = Path("drift/results.jsonl")
BEGIN, END = "<!-- drift table: written by scripts/drift_mini.py -->", "<!-- end of drift table -->"
ResultsOption = Annotated[Path, typer.Option(help="JSON lines, one per finished video; a run goes on where it ended.")]
PromptsOption = Annotated[int, typer.Option(help="Held-back prompts.")]
SecondsOption = Annotated[float, typer.Option(help="Length of each video.")]


@app.command()
def run(
    cache: Annotated[
        list[str], typer.Option(help="Policy name, or 'LABEL={policy: NAME, field: value}'; may be repeated.")
    ] = ("full", "sliding_window", "attention_sink"),
    results: ResultsOption = DEFAULT_RESULTS,
    prompts: PromptsOption = 64,
    seeds: Annotated[int, typer.Option(help="Videos per prompt and policy.")] = 2,
    seconds: SecondsOption = 60.0,
    batch: Annotated[int, typer.Option(help="Videos made together.")] = 16,
    model: Annotated[str, typer.Option(help="'mini' or a folder.")] = "mini",
    share: Annotated[
        str, typer.Option(help="I/N: only every N-th prompt, from the I-th; N runs, N results files.")
    ] = "1/1",
    dtype: Annotated[
        Precision, typer.Option(help="bfloat16: matmuls of the transformer, and the whole VAE.")
    ] = Precision.float32,
    sampler: Annotated[str, typer.Option(help="'{name: multi_step, ...}' instead of the model's own.")] = "",
    stop_after: Annotated[float, typer.Option(help="Start no new batch after this many minutes.")] = 1e9,
) -> None:
    """Make and measure what is missing of the study."""
    policies = dict(parse_cache(text) for text in cache)
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


@app.command()
def report(
    results: Annotated[list[Path], typer.Option(help="JSON lines of `run`; may be repeated.")] = (DEFAULT_RESULTS,),
    out: Annotated[Path, typer.Option(help="Folder for drift.json, drift.csv, drift.png.")] = Path("docs/drift"),
    page: Annotated[Path | None, typer.Option(help="Markdown page whose table is replaced.")] = Path("docs/drift.md"),
    baseline: Annotated[str, typer.Option(help="Policy the others are compared with.")] = "sliding_window",
    note: Annotated[str, typer.Option(help="One line on the weights and the machine.")] = "",
) -> None:
    """Write curves, table and data of what has been measured so far."""
    rows = [row for path in results for row in read_results(path)]
    if not rows:
        raise typer.BadParameter(
            f"{[str(path) for path in results]} hold no finished videos: run `scripts/drift_mini.py run` first."
        )
    out.mkdir(parents=True, exist_ok=True)
    levels = reference_levels(out, sorted({row.prompt_index for row in rows}))
    counts = ", ".join(f"{policy} {len(own)}" for policy, own in by_policy(rows).items())
    draw_curves(rows, out / "drift.png", levels=levels, title=f"videos per policy: {counts}")
    write_json(rows, out / "drift.json", baseline=baseline, notes={"note": note, "judge": WEIGHTS.name})
    write_csv(rows, out / "drift.csv")
    table = f"Videos per policy: {counts}.\n\n{markdown_table(rows, baseline=baseline, levels=levels)}"
    if page is not None:
        replace_between(page, table, begin=BEGIN, end=END)
    console.print(table, markup=False, soft_wrap=True)


@app.command()
def truth(prompts: PromptsOption = 64, seconds: SecondsOption = 60.0) -> None:
    """Measure the true scenes of the prompts: every curve must be flat."""
    judge = load_judge()
    for scene in held_back_scenes(prompts, seed=PROMPT_SEED):
        frames = sampled_scene(scene, round(seconds * FPS))
        (windows,) = measure_stream(judge, [scene], [repeat_frames(frames)])
        first, last = ({key: round(value, 3) for key, value in windows[index].items()} for index in (1, -1))
        console.print(f"{first}\n{last}")


@app.command()
def levels(
    prompts: PromptsOption = 64, out: Annotated[Path, typer.Option(help="Folder.")] = Path("docs/drift")
) -> None:
    """Measure the true scenes of the prompts, for the report to find."""
    out.mkdir(parents=True, exist_ok=True)
    console.print(reference_levels(out, list(range(prompts))))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    app()
