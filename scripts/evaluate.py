"""Measure videos, make and measure them, and compare runs: ``longtake evaluate``."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn

from longtake.configs.fields import choose
from longtake.scripts.console import EXIT_INTERRUPTED, err, stop_requests
from longtake.scripts.evaluate_tools import TOOLS, show_summary

if TYPE_CHECKING:
    from longtake.evaluation.running.plan import Unit
    from longtake.evaluation.running.runner import Evaluation

OutOption = Annotated[
    Path, typer.Option("--out", help="Folder of the evaluation; a started one goes on.", show_default=False)
]


def run(
    *,
    out_folder: OutOption,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="quick, standard, long, a study's name, or a YAML file with all of this; options go over it.",
            show_default="standard",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A model family, or a diffusers folder.", show_default="mini")
    ] = None,
    family: Annotated[str | None, typer.Option(help="How a folder is run.", show_default="self_forcing")] = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(help="Policies to compare: NAME,NAME or 'LABEL={policy: NAME, field: value}'; may be repeated."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="suite:moving_scenes, a text file with one per line, VBench_full_info.json, or .jsonl."),
    ] = None,
    extended: Annotated[str | None, typer.Option(help="Text file with the longer twin of every prompt.")] = None,
    num_prompts: Annotated[int | None, typer.Option(help="Only the first so many prompts.")] = None,
    samples: Annotated[int | None, typer.Option(help="Videos per prompt, each with its own noise.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Length of every video.")] = None,
    videos: Annotated[
        str | None, typer.Option(help="Measure the videos of this folder, or of its folders, instead of making any.")
    ] = None,
    manifest: Annotated[str | None, typer.Option(help="JSON lines with the videos' prompts.")] = None,
    prompt_file: Annotated[str | None, typer.Option(help="JSON mapping of the videos' file names to prompts.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frame rate of folders of frames.")] = None,
    mixed_rates: Annotated[
        bool | None,
        typer.Option(
            "--mixed-rates/--one-rate",
            help="Whether videos of a run may differ in frame rate.",
            show_default="with --backbones they may",
        ),
    ] = None,
    backbones: Annotated[
        str | None, typer.Option(help="FILE.py or .yaml that names the networks.", show_default="classical stand-ins")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Groups: vbench, long, weight_free, judge; with commas.", show_default="all")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Run that the others are compared with.", show_default="the first")
    ] = None,
    moments: Annotated[str | None, typer.Option(help="Seconds at which to compare, with commas.")] = None,
    batch: Annotated[int | None, typer.Option(help="Videos made together.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, or bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, or cuda.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes.", show_default="one per core", min=1)] = None,
    launcher: Annotated[str, typer.Option(help="local, torchrun or ray; numbers do not depend on it.")] = "local",
    keep_videos: Annotated[
        bool,
        typer.Option(
            "--keep-videos/--no-keep-videos",
            help="Keep generated videos when they are measured; without, only those that the report shows stay.",
        ),
    ] = True,
) -> None:
    """Make videos under several cache policies and measure them, or measure videos that exist.

    Every prompt is evaluated with the same noise under every policy. The result is the same, byte for byte, for any
    number of workers, any launcher, and after any interruption: Ctrl-C finishes what is in work, and the same command
    goes on. `report.html`, `comparison.json` and a `results.json` per run are written at the end.

    **Examples**

    `longtake evaluate run --protocol quick --out quick`

    `longtake evaluate run --cache full,sliding_window,deep_forcing,pack --seconds 60 --samples 4 --out study`

    `longtake evaluate run --cache "pack,wide={policy: pack, num_sink_frames: 12}" --baseline pack --out sinks`

    `longtake evaluate run --cache "full,sparse={policy: full, attention: radial}" --out masks`

    `longtake evaluate run --videos clips --backbones vbench.py --out measured` where clips holds .mp4 files, or a
    folder of them for each policy

    `longtake evaluate run --videos clips --prompt-file prompts.json --out measured`

    `torchrun --nproc-per-node 8 -m longtake.scripts.main evaluate run --protocol study.yaml --out study`
    """
    from longtake.evaluation.running.protocol import load_protocol, split_caches
    from longtake.evaluation.running.runner import Evaluation

    choose(dict.fromkeys(("local", "torchrun", "ray")), launcher, what="launcher")
    options: dict[str, Any] = {
        "model": model,
        "family": family,
        "caches": split_caches(cache) if cache else None,
        "prompts": prompts,
        "prompts_extended": extended,
        "num_prompts": num_prompts,
        "samples": samples,
        "seconds": seconds,
        "videos": videos,
        "manifest": manifest,
        "prompt_file": prompt_file,
        "fps": fps,
        "mixed_rates": mixed_rates,
        "backbones": backbones,
        "metrics": None if metrics is None else _words(metrics),
        "baseline": baseline,
        "moments": None if moments is None else [_seconds(word) for word in _words(moments)],
        "batch": batch,
        "dtype": dtype,
        "device": device,
    }
    evaluation = Evaluation(load_protocol(protocol, options=options), out_folder, keep_videos=keep_videos)
    if not _evaluate(evaluation, launcher, workers):
        err.print("stopped; finished work is kept: run the same command again to go on", style="yellow")
        raise typer.Exit(EXIT_INTERRUPTED)


def _evaluate(evaluation: "Evaluation", launcher: str, workers: int | None) -> bool:
    from longtake.evaluation.running.launchers import is_rank, num_cores, run_here, run_rank, start_ranks

    with stop_requests("unit of work") as should_stop:
        if is_rank():
            with _display(evaluation) as display:
                return run_rank(evaluation, display, should_stop=should_stop)
        if launcher == "torchrun":
            count = workers or num_cores(evaluation.protocol.threads)
            is_finished = start_ranks(_own_arguments(), num_ranks=count, should_stop=should_stop)
        else:
            with _display(evaluation) as display:
                is_ray = launcher == "ray"
                is_finished = run_here(
                    evaluation, display, is_ray=is_ray, num_workers=workers, should_stop=should_stop
                )
    if is_finished:
        show_summary(evaluation.out)
    return is_finished


class _Display:
    """Shows how far the work is: a bar in a terminal, a line every tenth elsewhere."""

    def __init__(self, evaluation: "Evaluation", bar: Progress | None) -> None:
        todo = evaluation.todo()
        names = {(unit.label, unit.number) for unit in todo}
        self._total = sum(unit.num_steps for unit in evaluation.units)
        self._finished = self._begun = sum(
            unit.num_steps for unit in evaluation.units if (unit.label, unit.number) not in names
        )
        self._partial: dict[tuple[str, int], float] = {}
        self._begin = time.perf_counter()
        self._is_begun = False
        num_videos = sum(len(unit.lines) for unit in evaluation.units)
        self._title = f"{num_videos} videos in {len(evaluation.runs)} runs: {', '.join(evaluation.labels)}"
        if num_finished := num_videos - sum(len(unit.lines) for unit in todo):
            self._title += f"; {num_finished} are finished"
        if num_again := sum(len(unit.lines) for unit in todo if unit.is_done(keep_videos=False)):
            self._title += f"\n{num_again} were measured and not kept, and are made again: or use --no-keep-videos"
        self._shown = int(10 * self._begun / self._total)
        self._bar = bar
        self._task = None if bar is None else bar.add_task("", total=self._total, completed=self._begun, left="")

    def ready(self) -> None:
        """Loading is over: what is left is reckoned from here."""
        if not self._is_begun:
            self._is_begun, self._begin = True, time.perf_counter()
            err.print(self._title, markup=False)

    def steps(self, unit: "Unit", steps: float) -> None:
        """Part of a unit is done."""
        self._partial[unit.label, unit.number] = steps
        self._show()

    def done(self, unit: "Unit") -> None:
        """A unit is done."""
        self._partial.pop((unit.label, unit.number), None)
        self._finished += unit.num_steps
        self._show()

    def _show(self) -> None:
        steps = self._finished + sum(self._partial.values())
        new = steps - self._begun
        elapsed = time.perf_counter() - self._begin
        left = _clock(elapsed * (self._total - steps) / new) + " left" if new > 0 else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=steps, left=left)
        elif (tenth := int(10 * steps / self._total)) > self._shown:
            self._shown = tenth
            err.print(f"{100 * steps / self._total:3.0f} %  {_clock(elapsed)} so far, {left}")


@contextmanager
def _display(evaluation: "Evaluation") -> Iterator[_Display]:
    columns = (TextColumn("{task.percentage:3.0f} %"), BarColumn(), TextColumn("{task.fields[left]}"))
    bar = Progress(*columns, console=err) if err.is_terminal else None
    with bar or nullcontext():
        yield _Display(evaluation, bar)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _own_arguments() -> list[str]:
    """The words after ``longtake evaluate run``, for the same command under torchrun."""
    words = sys.argv[1:]
    return words[words.index("run") + 1 :]


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _seconds(word: str) -> float:
    try:
        return float(word)
    except ValueError as error:
        raise ValueError(f"moments: {word!r} is no number of seconds: write 5,30,60") from error


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help=(
        "Measure videos, make and measure them, and compare runs.\n\n"
        "Start with: `longtake evaluate run --protocol quick --out quick`"
    ),
)
app.command("run", no_args_is_help=True)(run)
for _name, _command in TOOLS.items():
    app.command(_name, no_args_is_help=_name != "list")(_command)
