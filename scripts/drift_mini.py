"""How long videos of the mini model drift under different cache policies: run the study, and report it."""

import json
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor

from longtake.cache import make_policy
from longtake.evaluation.drift import sampled_scene
from longtake.evaluation.drift_report import by_policy, draw_curves, markdown_table, write_csv, write_json
from longtake.evaluation.drift_study import measure_stream, read_results, run_study, study_fingerprint
from longtake.evaluation.drift_truth import repeat_frames, truth_levels
from longtake.evaluation.judge import WEIGHTS, load_judge
from longtake.evaluation.moving_scenes import FPS, held_back_scenes
from longtake.pipelines.long_video import LongVideoPipeline

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(width=max(120, Console().width))
PROMPT_SEED = 64  # of the held-back scenes; not the ones the model's score uses
DEFAULT_RESULTS = Path("drift/results.jsonl")
BEGIN, END = "<!-- drift table: written by scripts/drift_mini.py -->", "<!-- end of drift table -->"
ResultsOption = Annotated[Path, typer.Option(help="JSON lines, one per finished video; a run goes on where it ended.")]
PromptsOption = Annotated[int, typer.Option(help="Held-back prompts.")]
SecondsOption = Annotated[float, typer.Option(help="Length of each video.")]


class Precision(StrEnum):
    """What the model computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


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
    part, parts = parse_share(share)
    pipe = LongVideoPipeline.from_pretrained(model)
    pipe.vae.to(torch.bfloat16 if dtype is Precision.bfloat16 else torch.float32)
    policies = dict(parse_cache(text) for text in cache)
    judge = load_judge()
    solver = parse_sampler(sampler) if sampler else pipe.family.sampler
    common = {"seconds": seconds, "sampler": str(solver), "dtype": dtype, "prompt_seed": PROMPT_SEED}
    modules = [pipe.transformer, pipe.vae, pipe.text_encoder, judge]
    prints = {
        name: study_fingerprint(modules, {**common, "cache": repr(make_policy(p))}) for name, p in policies.items()
    }

    def frames_of(texts: list[str], noise_seeds: list[int], policy: Any) -> Iterator[Tensor]:
        settings = {"seconds": seconds, "cache": policy, "seed": noise_seeds, "sampler": solver}
        chunks = pipe.stream(prompt=texts, **settings)
        while True:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is Precision.bfloat16):
                chunk = next(chunks, None)
            if chunk is None:
                return
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
    ):
        now = time.perf_counter()
        rate = len(finished) * seconds * FPS / (now - last)
        last = now
        done = sum(row.policy in policies for row in read_results(results))
        console.print(f"{finished[0].policy:>20s}: {done}/{total} videos, {rate:.0f} frames/s, {now - begin:.0f} s")
        if now - begin > 60.0 * stop_after:
            console.print(f"stopped after {stop_after:g} minutes; run the same command again to go on")
            break


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
        replace_between(page, table)
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


def replace_between(page: Path, table: str) -> None:
    """Put a table between the page's two markers.

    Raises:
        typer.BadParameter: If the page has no markers.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise typer.BadParameter(f"{page} has no place for the table: add the lines {BEGIN!r} and {END!r}.")
    page.write_text(f"{before}{BEGIN}\n{table}{END}{after}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    app()
