"""How well the mini model goes on from true clips: run the study, report it, draw it."""

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw, ImageFont

from longtake.evaluation.mini_world.continuation import CLIP_FRAMES, Arm, continued, markdown_tables
from longtake.evaluation.mini_world.drift_study import read_results, run_study, study_fingerprint
from longtake.evaluation.mini_world.judge import load_judge
from longtake.evaluation.mini_world.moving_scenes import FPS, describe, held_back_scenes
from longtake.evaluation.running.suites import PROMPT_SEED, SEED_STEP
from longtake.pipelines.long_video import LongVideoPipeline
from longtake.scripts.mini_study import Precision, console, replace_between

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
BEGIN, END = "<!-- tables: written by scripts/continue_mini.py -->", "<!-- end of tables -->"
ARMS = {
    "true scene through the VAE": Arm(cache="attention_sink", start="true scene"),
    "attention_sink": Arm(cache="attention_sink"),
    "sliding_window": Arm(cache="sliding_window"),
    "deep_forcing": Arm(cache="deep_forcing"),
    "control: prompt only": Arm(cache="attention_sink", start="prompt"),
    "control: another scene's clip": Arm(cache="attention_sink", start="other clip"),
}
CONTROL = "control: prompt only"
# Seconds of the picture's columns, from the end of the clip; the first three show the true clip.
SHOWN = (-5.0, -2.5, -1 / FPS, 0.0, 1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0)
TILE, GAP, LABEL = 96, 3, 18
ResultsOption = Annotated[Path, typer.Option(help="JSON lines, one per finished video; a run goes on where it ended.")]
ScenesOption = Annotated[int, typer.Option(help="Held-back scenes.")]
DtypeOption = Annotated[Precision, typer.Option(help="Of the model.")]
DEFAULT_RESULTS = Path("continuation/results.jsonl")


@app.command()
def run(
    results: ResultsOption = DEFAULT_RESULTS,
    scenes: ScenesOption = 32,
    seconds: Annotated[float, typer.Option(help="Length of what is made behind five true seconds.")] = 30.0,
    batch: Annotated[int, typer.Option(help="Videos made together.")] = 16,
    dtype: DtypeOption = Precision.bfloat16,
) -> None:
    """Make and measure what is missing of the study."""
    pipe, judge = _pipe(dtype), load_judge()
    worlds = held_back_scenes(scenes, seed=PROMPT_SEED)
    modules = [pipe.transformer, pipe.vae, pipe.text_encoder, judge]
    common = {"dtype": dtype, "prompt_seed": PROMPT_SEED, "seconds": seconds, "scenes": scenes}

    def frames_of(captions, seeds, arm: Arm):
        chosen = [seed % SEED_STEP for seed in seeds]
        own, others = [worlds[index] for index in chosen], [worlds[(index + 1) % scenes] for index in chosen]
        return continued(pipe, own, arm, seconds=seconds, seeds=seeds, others=others)

    begin = time.perf_counter()
    for finished in run_study(
        frames_of,
        judge,
        scenes=worlds,
        policies=ARMS,
        num_seeds=1,
        batch_size=batch,
        fingerprints={label: study_fingerprint(modules, {**common, "arm": repr(arm)}) for label, arm in ARMS.items()},
        path=results,
    ):
        console.print(f"{finished[0].policy:>30s}: {len(finished)} videos, {time.perf_counter() - begin:.0f} s")


@app.command()
def report(
    results: ResultsOption = DEFAULT_RESULTS,
    page: Annotated[Path, typer.Option(help="Markdown page whose tables are replaced.")] = Path("docs/video_start.md"),
) -> None:
    """Write the tables of what has been measured so far."""
    rows = read_results(results)
    if not rows:
        raise typer.BadParameter(f"{results} holds no finished videos: run `scripts/continue_mini.py run` first.")
    tables = markdown_tables(rows, control=CONTROL)
    replace_between(page, tables, begin=BEGIN, end=END)
    console.print(tables, markup=False, soft_wrap=True)


@app.command()
def picture(
    out: Annotated[Path, typer.Option(help="PNG.")] = Path("docs/images/video_start.png"),
    arm: Annotated[str, typer.Option(help="A row of the tables.")] = "attention_sink",
    scenes: Annotated[list[int], typer.Option(help="Which held-back scenes; may be repeated.")] = tuple(range(8)),
    dtype: DtypeOption = Precision.bfloat16,
) -> None:
    """Draw true clips and what comes then, a row per scene."""
    worlds = held_back_scenes(max(scenes) + 1, seed=PROMPT_SEED)
    chosen = [worlds[index] for index in scenes]
    stream = continued(_pipe(dtype), chosen, ARMS[arm], seconds=max(SHOWN) + 0.25, seeds=list(scenes), others=chosen)
    videos = (torch.cat(list(stream), dim=1) * 255.0).round().byte().movedim(2, -1).numpy()
    indices = [CLIP_FRAMES - 1 + round(second * FPS) for second in SHOWN]
    _draw([[video[index] for index in indices] for video in videos]).save(out)
    for scene in chosen:
        console.print(describe(scene))


def _draw(rows: list[list[np.ndarray]]) -> Image.Image:
    step = TILE + GAP
    sheet = Image.new("RGB", (step * len(SHOWN) + 3 * GAP, step * len(rows) + LABEL), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for column, second in enumerate(SHOWN):
        # A wider gap where the true clip ends.
        left = step * column + (3 * GAP if second >= 0 else 0)
        words = f"true {second:.1f} s" if second < 0 else f"{second:g} s"
        pen.text((left + TILE // 2, 2), words, fill="black", font=font, anchor="mt")
        for row, frames in enumerate(rows):
            tile = Image.fromarray(frames[column]).resize((TILE, TILE), Image.Resampling.NEAREST)
            sheet.paste(tile, (left, LABEL + step * row))
    return sheet


def _pipe(dtype: Precision) -> LongVideoPipeline:
    pipe = LongVideoPipeline.from_pretrained("mini", dtype=torch.bfloat16 if dtype is Precision.bfloat16 else None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    app()
