"""Train the judge of the moving scenes, measure it on true scenes, and let it score the mini model."""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lab.judge.scorecard import Line, score_model, score_true_scenes, write_scorecard
from lab.judge.training import RoundTrip, round_trip_examples, save_judge, train_judge, vae_round_trip
from longtake.evaluation.mini_world.judge import WEIGHTS, ClipJudge, load_judge
from longtake.evaluation.mini_world.scenes import FPS, held_back_scenes
from longtake.pipelines.long_video import LongVideoPipeline

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(width=max(120, Console().width))
JUDGE_SEED = 77  # held-back scenes of the judge's own examination; the model's score takes seed 0
ModelOption = Annotated[str, typer.Option(help="The model: 'mini' or a folder.")]


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Weights to write.")] = WEIGHTS,
    clips: Annotated[int, typer.Option(help="Freshly rendered clips to train on.")] = 25_000,
    first_clip: Annotated[int, typer.Option(help="Index of the first one; continue with others than before.")] = 0,
    start_from: Annotated[Path | None, typer.Option(help="Weights to continue from.")] = None,
    round_trips: Annotated[int, typer.Option(help="Clips that pass through the model's VAE first.")] = 600,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    model: ModelOption = "mini",
) -> None:
    """Train on true scenes, part of them through the model's VAE; then examine."""
    torch.manual_seed(0)
    judge = ClipJudge() if start_from is None else load_judge(start_from).requires_grad_(True)
    extra = []
    if round_trips:
        vae = LongVideoPipeline.from_pretrained(model).vae
        drawn = round_trip_examples(vae_round_trip(vae), first=10_000_000 + first_clip, count=round_trips)
        extra = list(track(drawn, description="round trips", total=round_trips, console=console))
    begin = time.perf_counter()

    def report(seen: int, loss: float) -> None:
        if seen % 1600 == 0:
            console.print(f"{seen:7d} clips  loss {loss:.3f}  {time.perf_counter() - begin:.0f} s")

    train_judge(judge, num_clips=clips, first_clip=first_clip, learning_rate=learning_rate, extra=extra, report=report)
    seconds = time.perf_counter() - begin
    save_judge(judge, out, notes={"clips": str(clips), "round_trips": str(round_trips), "seconds": f"{seconds:.0f}"})
    console.print(f"{out}: {out.stat().st_size / 1e6:.2f} MB after {seconds:.0f} s")
    examine(weights=out, model=model if round_trips else None)


@app.command()
def examine(
    weights: Annotated[Path, typer.Option(help="The judge's weights.")] = WEIGHTS,
    scenes: Annotated[int, typer.Option(help="Held-back true scenes.")] = 400,
    model: Annotated[str | None, typer.Option(help="Model whose VAE a second examination passes through.")] = "mini",
    out: Annotated[Path | None, typer.Option(help="JSON to write, one file per examination.")] = None,
) -> None:
    """Measure the judge on true scenes: raw, and through the model's VAE."""
    judge = load_judge(weights)
    ways: dict[str, RoundTrip | None] = {"raw": None}
    if model is not None:
        vae = LongVideoPipeline.from_pretrained(model).vae
        ways["vae"] = vae_round_trip(vae)
    for way, round_trip in ways.items():
        lines = score_true_scenes(
            judge,
            held_back_scenes(scenes, seed=JUDGE_SEED),
            start=lambda index: 5 * FPS * (index % 12),
            round_trip=round_trip,
        )
        console.print(table_of(lines, title=f"the judge on {scenes} true scenes, {way}"))
        if out is not None:
            path = out.with_stem(f"{out.stem}_{way}")
            write_scorecard(lines, path, notes={"scenes": scenes, "seed": JUDGE_SEED, "pictures": way})


@app.command()
def score(
    out: Annotated[Path, typer.Option(help="JSON to write.")] = Path("docs/mini_score.json"),
    prompts: Annotated[int, typer.Option(help="Held-back prompts.")] = 200,
    batch: Annotated[int, typer.Option(help="Clips made together.")] = 20,
    cache: Annotated[str, typer.Option(help="Cache policy; in five seconds 'full' evicts nothing.")] = "full",
    model: ModelOption = "mini",
    weights: Annotated[Path, typer.Option(help="The judge's weights.")] = WEIGHTS,
    sampler: Annotated[str, typer.Option(help="'{name: multi_step, ...}' instead of the model's own.")] = "",
) -> None:
    """Make a five-second clip per held-back prompt and let the judge look."""
    pipe = LongVideoPipeline.from_pretrained(model)
    solver = OmegaConf.to_container(OmegaConf.create(sampler)) if sampler else pipe.family.sampler
    begin = time.perf_counter()

    def make_clips(texts: list[str], seeds: list[int]) -> torch.Tensor:
        chunks = pipe.stream(prompt=texts, num_frames=81, cache=cache, seed=seeds, sampler=solver)
        return torch.cat([chunk.frames for chunk in chunks], dim=1)

    def report(done: int) -> None:
        console.print(f"{done:4d} clips, {time.perf_counter() - begin:.0f} s")

    with torch.inference_mode():
        lines = score_model(
            load_judge(weights), held_back_scenes(prompts), make_clips, batch_size=batch, report=report
        )
    console.print(table_of(lines, title=f"{model}: {prompts} held-back prompts, 5 s clips"))
    notes = {
        "model": model,
        "prompts": prompts,
        "cache": cache,
        "sampler": str(solver),
        "seconds": round(time.perf_counter() - begin, 1),
    }
    write_scorecard(lines, out, notes=notes)
    console.print(f"written to {out}")


def table_of(lines: list[Line], *, title: str) -> Table:
    """Show a scorecard."""
    table = Table("attribute", "right", "asked", "%", "95 % interval", "line", "most frequent mistakes", title=title)
    for line in lines:
        worst = ", ".join(f"{kind} ({count})" for kind, count in list(line.mistakes.items())[:2])
        interval = line.accuracy
        goal = "" if line.pass_line is None else f"{line.pass_line:.0%} {'reached' if line.is_reached else 'MISSED'}"
        table.add_row(
            line.attribute,
            str(line.num_right),
            str(line.num_asked),
            f"{100 * interval.mean:.1f}",
            f"{100 * interval.low:.1f} - {100 * interval.high:.1f}",
            goal,
            worst,
        )
    return table


if __name__ == "__main__":
    app()
