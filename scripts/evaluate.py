"""Measure videos, make and measure them, and compare runs: ``longtake evaluate``."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Exit, Option, Typer

from longtake.configs.fields import choose
from longtake.scripts.console import EXIT_INTERRUPTED, err, out, progress, stop_requests, takes_options

if TYPE_CHECKING:
    from longtake.evaluation.backbones import Backbones
    from longtake.evaluation.records import RunScores
    from longtake.evaluation.running.plan import Unit
    from longtake.evaluation.running.runner import Evaluation

OutOption = Annotated[Path, Option("--out", help="Folder to write to.", show_default=False)]
RunArgument = Annotated[Path, Argument(metavar="RUN", help="Folder of a run.", show_default=False)]
_BASELINE = "Run that the others are compared with."
BaselineOption = Annotated[str | None, Option(help=_BASELINE, show_default="the first")]
_BACKBONES = "FILE.py or .yaml that names the networks."
BackbonesOption = Annotated[Path | None, Option(help=_BACKBONES, show_default="classical stand-ins")]

app = Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help=(
        "Measure videos, make and measure them, and compare runs.\n\n"
        "Start with: `longtake evaluate run --protocol quick --out quick`"
    ),
)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Options of ``run``; keys of the protocol have its names."""

    out_folder: Annotated[
        Path, Option("--out", help="Folder of the evaluation; a started one goes on.", show_default=False)
    ]
    protocol: Annotated[
        str | None,
        Option(
            help="quick, standard, long, a study's name, or a YAML file with all of this; options go over it.",
            show_default="standard",
        ),
    ] = None
    model: Annotated[str | None, Option(help="A model family, or a diffusers folder.", show_default="mini")] = None
    family: Annotated[str | None, Option(help="How a folder is run.", show_default="self_forcing")] = None
    caches: Annotated[
        list[str] | None,
        Option(
            "--cache", help="Policies to compare: NAME,NAME or 'LABEL={policy: NAME, field: value}'; may be repeated."
        ),
    ] = None
    prompts: Annotated[
        str | None,
        Option(help="suite:moving_scenes, a text file with one per line, VBench_full_info.json, or .jsonl."),
    ] = None
    prompts_extended: Annotated[
        str | None, Option("--extended", help="Text file with the longer twin of every prompt.")
    ] = None
    num_prompts: Annotated[int | None, Option(help="Only the first so many prompts.")] = None
    samples: Annotated[int | None, Option(help="Videos per prompt, each with its own noise.")] = None
    seconds: Annotated[float | None, Option(help="Length of every video.")] = None
    videos: Annotated[
        str | None, Option(help="Measure the videos of this folder, or of its folders, instead of making any.")
    ] = None
    manifest: Annotated[str | None, Option(help="JSON lines with the videos' prompts.")] = None
    prompt_file: Annotated[str | None, Option(help="JSON mapping of the videos' file names to prompts.")] = None
    fps: Annotated[float | None, Option(help="Frame rate of folders of frames.")] = None
    mixed_rates: Annotated[
        bool | None,
        Option(
            "--mixed-rates/--one-rate",
            help="Whether videos of a run may differ in frame rate.",
            show_default="with --backbones they may",
        ),
    ] = None
    backbones: Annotated[str | None, Option(help=_BACKBONES, show_default="classical stand-ins")] = None
    metrics: Annotated[
        str | None, Option(help="Groups: vbench, long, weight_free, judge; with commas.", show_default="all")
    ] = None
    baseline: BaselineOption = None
    moments: Annotated[str | None, Option(help="Seconds at which to compare, with commas.")] = None
    batch: Annotated[int | None, Option(help="Videos made together.")] = None
    dtype: Annotated[str | None, Option(help="float32, or bfloat16.")] = None
    device: Annotated[str | None, Option(help="cpu, or cuda.")] = None
    workers: Annotated[int | None, Option(help="Processes.", show_default="one per core", min=1)] = None
    launcher: Annotated[str, Option(help="local, torchrun or ray; numbers do not depend on it.")] = "local"
    keep_videos: Annotated[
        bool,
        Option(
            "--keep-videos/--no-keep-videos",
            help="Keep generated videos when they are measured; without, only those that the report shows stay.",
        ),
    ] = True

    def of_protocol(self) -> dict[str, Any]:
        from longtake.evaluation.running.protocol import split_caches

        own = ("out_folder", "protocol", "workers", "launcher", "keep_videos")
        parsed = {
            "caches": split_caches(self.caches) if self.caches else None,
            "metrics": None if self.metrics is None else _words(self.metrics),
            "moments": None if self.moments is None else _seconds(self.moments),
        }
        return {key: value for key, value in vars(self).items() if key not in own} | parsed


@app.command("run", no_args_is_help=True)
@takes_options(_Run)
def _run(options: _Run) -> None:
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
    from longtake.evaluation.running.protocol import load_protocol
    from longtake.evaluation.running.runner import Evaluation

    choose(dict.fromkeys(("local", "torchrun", "ray")), options.launcher, what="launcher")
    protocol = load_protocol(options.protocol, options=options.of_protocol())
    evaluation = Evaluation(protocol, options.out_folder, keep_videos=options.keep_videos)
    if not _evaluate(evaluation, options.launcher, options.workers):
        err.print("stopped; finished work is kept: run the same command again to go on", style="yellow")
        raise Exit(EXIT_INTERRUPTED)


@app.command("compare", no_args_is_help=True)
def _compare(
    folders: Annotated[
        list[Path],
        Argument(
            metavar="RUN...", help="Folders of runs or of evaluations, or their results.json.", show_default=False
        ),
    ],
    *,
    out_folder: OutOption,
    baseline: BaselineOption = None,
    moments: Annotated[str, Option(help="Seconds at which to compare, with commas.")] = "5,30,60",
) -> None:
    """Compare runs that were measured at different times; same prompts and seeds are paired.

    **Examples**

    `longtake evaluate compare study/full study/pack --baseline full --out full-or-pack`

    `longtake evaluate compare first second --baseline sliding_window --moments 5,60,120 --out all`
    """
    from longtake.evaluation.results import load_run
    from longtake.evaluation.running.runner import choose_baseline, run_folders, write_comparison

    places = [place for folder in folders for place in run_folders(folder)]
    runs = [load_run(place) for place in places]
    write_comparison(
        out_folder,
        runs,
        baseline=choose_baseline(runs, baseline),
        moments=_seconds(moments),
        videos={run.label: place for run, place in zip(runs, places, strict=True)},
        commands=[f"longtake evaluate compare {' '.join(map(str, folders))} --out {out_folder}"],
    )
    _show_summary(out_folder)


@app.command("report", no_args_is_help=True)
def _report(
    folder: Annotated[Path, Argument(metavar="OUT", help="Folder of an evaluation.", show_default=False)],
) -> None:
    """Write results and report of what has been measured so far, also in the middle of an evaluation.

    **Example**

    `longtake evaluate report study`
    """
    from longtake.evaluation.running.runner import write_results

    for run in write_results(folder):
        err.print(f"{run.label}: {len(run.videos)} videos", markup=False)
    _show_summary(folder)


@app.command("table", no_args_is_help=True)
def _table(
    folders: Annotated[
        list[Path], Argument(metavar="OUT...", help="Folders of evaluations or of runs.", show_default=False)
    ],
    *,
    moments: Annotated[str | None, Option(help="Seconds, with commas.", show_default="the first evaluation's")] = None,
    baseline: Annotated[str | None, Option(help=_BASELINE, show_default="the evaluation's")] = None,
    metrics: Annotated[
        str | None, Option(help="Names of measures with a curve, with commas.", show_default="the judge's")
    ] = None,
    page: Annotated[Path | None, Option(help="Markdown page to write into.", show_default="the terminal")] = None,
    section: Annotated[str | None, Option(help="Of the page, between two comments with this name.")] = None,
    curves: Annotated[
        Path | None, Option(metavar="PNG", help="Also draw the measures over time here.", show_default=False)
    ] = None,
    reference: Annotated[
        bool, Option("--reference/--no-reference", help="Rows of the true scenes, for the bundled suite.")
    ] = True,
) -> None:
    """Write tables of levels and paired differences at some moments, in Markdown.

    Runs of several evaluations stand in one table, as far as they have the same prompts and seeds. A page needs the
    lines `<!-- NAME: written by longtake evaluate table -->` and `<!-- end of NAME -->`; what is between them is
    replaced.

    **Examples**

    `longtake evaluate table study`

    `longtake evaluate table study more --moments 5,60,120 --page docs/results.md --section policies`
    """
    from longtake.evaluation.report.tables import choose_columns, moment_tables, replace_section, write_curves
    from longtake.evaluation.results import load_run
    from longtake.evaluation.running.runner import choose_baseline, ordered_runs, settled_protocol

    if page is not None and section is not None:
        replace_section(page, section, None)
    elif page is not None or section is not None:
        raise ValueError("--page and --section go together: name the page and the section of it that is written")
    protocol = settled_protocol(folders[0])
    places = [place for folder in folders for place in ordered_runs(folder)]
    runs = [run for place in places if (run := load_run(place, has_drift=False)).videos]
    if not runs:
        raise ValueError("no video of these folders has been measured: go on with `longtake evaluate run --out OUT`")
    chosen = choose_baseline(runs, baseline, protocol.baseline)
    columns = choose_columns(runs, None if metrics is None else _words(metrics))
    levels = _reference(folders[0], runs, columns) if reference else {}
    times = protocol.moments if moments is None else _seconds(moments)
    text = moment_tables(runs, baseline=chosen, moments=times, columns=columns, levels=levels)
    if curves is not None:
        write_curves(runs, curves, baseline=chosen, columns=columns)
        err.print(f"wrote {curves}", markup=False)
    if page is None or section is None:
        out.print(text, markup=False, end="")
    else:
        replace_section(page, section, text)
        err.print(f"wrote {section!r} of {page}", markup=False)


@app.command("list")
def _list_all(backbones: BackbonesOption = None) -> None:
    """List the numbers that would be computed, those that would not and why, suites, protocols and backbones.

    **Example**

    `longtake evaluate list --backbones vbench.py`
    """
    from longtake.evaluation.backbones import ROLES
    from longtake.evaluation.metrics import GROUPS, make_metrics
    from longtake.evaluation.running.protocol import protocol_names
    from longtake.evaluation.running.suites import SUITE, SUITES

    found = _backbones(backbones)
    for group in GROUPS:
        metrics, skipped = make_metrics(found, groups=[group])
        out.print(f"\n{group}", style="bold")
        for spec in (spec for metric in metrics for spec in metric.specs):
            out.print(f"  {spec.name}  {spec.description}", markup=False)
        for name, reason in skipped.items():
            out.print(f"  {name}: not computed: {reason}", style="dim", markup=False)
    out.print("\nbackbones", style="bold")
    for role in ROLES:
        name = found.names.get(role)
        out.print(f"  {role}: {name or found.why_missing(role)}", style=None if name else "dim", markup=False)
    out.print(f"\nsuites: {', '.join(SUITE + name for name in SUITES)}", markup=False)
    out.print(f"protocols: {', '.join(protocol_names())}", markup=False)


@app.command("export-vbench", no_args_is_help=True)
def _export_vbench(
    run: RunArgument,
    *,
    out_folder: OutOption,
    mode: Annotated[str, Option(help="custom, long or standard: what the official tool is run as.")] = "custom",
    dimensions: Annotated[
        str | None, Option(help="Dimensions to score, with commas.", show_default="all of the mode")
    ] = None,
    dev_flag: Annotated[bool, Option("--dev-flag", help="VBench-Long with clip-to-clip consistency.")] = False,
    full_info: Annotated[Path | None, Option(help="VBench_full_info.json; for mode standard.")] = None,
    num_samples: Annotated[int, Option(help="Videos per prompt; for mode standard.")] = 5,
    allow_missing: Annotated[bool, Option("--allow-missing", help="Lay out what is there.")] = False,
) -> None:
    """Lay a run's videos out for the official VBench, with the files and the script that it needs.

    **Examples**

    `longtake evaluate export-vbench study/pack --mode long --out vbench-pack`

    `longtake evaluate export-vbench study/pack --mode standard --full-info VBench_full_info.json --out vbench-pack`
    """
    from longtake.evaluation.vbench_io import export_videos

    export = export_videos(
        run,
        out_folder,
        mode=mode,
        dimensions=None if dimensions is None else _words(dimensions),
        dev_flag=dev_flag,
        full_info=full_info,
        num_samples=num_samples,
        allow_missing=allow_missing,
    )
    for note in export.notes:
        err.print(note, style="yellow", markup=False)
    out.print(str(out_folder), markup=False)


@app.command("import-vbench", no_args_is_help=True)
def _import_vbench(
    run: RunArgument,
    files: Annotated[
        list[Path], Argument(metavar="FILE...", help="*_eval_results.json of the tool.", show_default=False)
    ],
    *,
    dev_flag: Annotated[
        bool | None,
        Option("--dev-flag/--no-dev-flag", help="How VBench-Long ran.", show_default="read from the results"),
    ] = None,
) -> None:
    """Put results of the official VBench into a run; they replace what was measured here under the same names.

    **Example**

    `longtake evaluate import-vbench study/pack vbench-pack/results/*/*_eval_results.json`
    """
    from longtake.evaluation.results import load_run
    from longtake.evaluation.running.protocol import PROTOCOL_FILE
    from longtake.evaluation.running.runner import write_results
    from longtake.evaluation.vbench_io import import_results, merge_imported, write_imported

    results = import_results(files, dev_flag=dev_flag)
    # Refused before anything is written.
    merge_imported(load_run(run), results)
    write_imported(run, results)
    for name, result in results.items():
        out.print(f"{name}: {result.official_score:.6f}", markup=False)
    folder = run if (run / PROTOCOL_FILE).is_file() else run.absolute().parent
    if (folder / PROTOCOL_FILE).is_file():
        write_results(folder)


@app.command("check-golden", no_args_is_help=True)
def _check_golden(
    folder: Annotated[
        Path, Argument(metavar="DIR", help="golden.json, videos/ and stubs.py with the stand-ins.", show_default=False)
    ],
    *,
    every: Annotated[bool, Option("--all", help="Also list the numbers that are equal.")] = False,
) -> None:
    """Compare this program's numbers with those that VBench's own functions gave on the same clips.

    **Example**

    `longtake evaluate check-golden ../shared/golden/vbench`
    """
    from longtake.evaluation.backbones import load_backbones
    from longtake.evaluation.golden_check import TOLERANCE, check_golden

    checks = check_golden(folder, load_backbones(folder / "stubs.py"))
    for check in checks:
        if every or not check.ok:
            word = "equal" if check.ok else "differs"
            out.print(f"{word}: {check.name}: {check.got}, VBench {check.expected}", markup=False)
    worst = max(check.error for check in checks)
    num_equal = sum(check.ok for check in checks)
    out.print(f"{num_equal} of {len(checks)} numbers equal within {TOLERANCE:g}; largest difference {worst:.1e}")
    if num_equal < len(checks):
        raise Exit(1)


@app.command("sets", no_args_is_help=True)
def _sets(
    run: RunArgument,
    *,
    reference: Annotated[Path, Option(help="Folder of real videos, or of another run.", show_default=False)],
    backbones: BackbonesOption = None,
    role: Annotated[str, Option(help="Whose features: dino, clip, dinov2 or dreamsim.")] = "dino",
    num_frames: Annotated[int, Option(help="Frames of each video, spread evenly; an even number.")] = 32,
    allow_small: Annotated[
        bool, Option("--allow-small", help="A Frechet distance of fewer videos than dimensions.")
    ] = False,
) -> None:
    """Measure a run's videos as a set against a reference: Frechet distance, precision, recall, STREAM.

    Writes RUN/sets.json.

    **Example**

    `longtake evaluate sets study/pack --reference study/full --backbones vbench.py --role dinov2`
    """
    from longtake.evaluation.sets import measure_sets

    options = {"role": role, "num_frames": num_frames, "allow_small": allow_small}
    measured = measure_sets(run, reference, backbones=_backbones(backbones), **options)
    for name, score in measured.scores.items():
        out.print(f"{name}: {score.skipped if score.value is None else format(score.value, '.6g')}", markup=False)


def _backbones(path: Path | None) -> "Backbones":
    from longtake.evaluation.backbones import classical_backbones, load_backbones

    return classical_backbones() if path is None else load_backbones(path)


def _evaluate(evaluation: "Evaluation", launcher: str, workers: int | None) -> bool:
    from longtake.evaluation.running.workers import is_rank, num_cores, run_here, run_rank, start_ranks

    with stop_requests("unit of work") as should_stop:
        if is_rank():
            with _display(evaluation) as display:
                return run_rank(evaluation, display, should_stop=should_stop)
        if launcher == "torchrun":
            # The same command, with one rank for each worker.
            words, count = sys.argv[sys.argv.index("run") + 1 :], workers or num_cores(evaluation.protocol.threads)
            is_finished = start_ranks(words, num_ranks=count, should_stop=should_stop)
        else:
            how = {"is_ray": launcher == "ray", "num_workers": workers}
            with _display(evaluation) as display:
                is_finished = run_here(evaluation, display, should_stop=should_stop, **how)
    if is_finished:
        _show_summary(evaluation.out)
    return is_finished


@contextmanager
def _display(evaluation: "Evaluation") -> "Iterator[_Display]":
    total = sum(unit.num_steps for unit in evaluation.units)
    with progress("{percent:3.0f} %  {elapsed} so far, {left}", total=total) as show:
        yield _Display(evaluation, total, show)


class _Display:
    """Progress of an evaluation: a bar in a terminal, a line every tenth elsewhere."""

    def __init__(self, evaluation: "Evaluation", total: int, show: Callable[..., None]) -> None:
        todo = evaluation.todo()
        num_todo, num_videos = (sum(len(unit.lines) for unit in units) for units in (todo, evaluation.units))
        self._total = total
        self._begun = total - sum(unit.num_steps for unit in todo)
        self._made: dict[tuple[str, int], float] = {}
        self._begin: float | None = None
        self._title = f"{num_videos} videos in {len(evaluation.runs)} runs: {', '.join(evaluation.labels)}"
        if num_videos > num_todo:
            self._title += f"; {num_videos - num_todo} are finished"
        if num_again := sum(len(unit.lines) for unit in todo if unit.is_done(keep_videos=False)):
            self._title += f"\n{num_again} were measured and not kept, and are made again: or use --no-keep-videos"
        self._tenth = int(10 * self._begun / total)
        self._show_line = show

    def ready(self) -> None:
        """Estimate the time that is left from here, when the first worker has loaded everything."""
        if self._begin is None:
            self._begin = time.perf_counter()
            err.print(self._title, markup=False)

    def steps(self, unit: "Unit", steps: float) -> None:
        self._made[unit.label, unit.number] = steps
        new = sum(self._made.values())
        steps = self._begun + new
        elapsed = time.perf_counter() - (self._begin or 0.0)
        left = _clock(elapsed * (self._total - steps) / new) + " left" if new > 0 else ""
        last, self._tenth = self._tenth, max(self._tenth, int(10 * steps / self._total))
        about = {"percent": 100 * steps / self._total, "elapsed": _clock(elapsed), "left": left}
        self._show_line(steps, is_due=self._tenth > last, **about)

    def done(self, unit: "Unit") -> None:
        self.steps(unit, unit.num_steps)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _show_summary(folder: Path) -> None:
    from longtake.evaluation.records import COMPARISON_FILE, REPORT_FILE, read_json
    from longtake.evaluation.report.tables import summary_table

    err.print(summary_table(read_json(folder / COMPARISON_FILE)))
    out.print(str(folder / REPORT_FILE), markup=False)


def _reference(folder: Path, runs: "Sequence[RunScores]", columns: Sequence[str]) -> Mapping[str, Mapping[str, float]]:
    """Levels of the true scenes under the metrics' names; none where the prompts are not the bundled suite's."""
    from longtake.evaluation.metrics.judge import reference_levels
    from longtake.evaluation.mini_world.scenes import describe, held_back_scenes
    from longtake.evaluation.report.tables import JUDGE
    from longtake.evaluation.running.suites import PROMPT_SEED

    if not any(name.startswith(JUDGE) for name in columns):
        return {}
    prompts = {video.video.prompt_index: video.video.prompt for run in runs for video in run.videos}
    scenes = held_back_scenes(max(prompts) + 1, seed=PROMPT_SEED)
    if any(describe(scenes[index]) != text for index, text in prompts.items()):
        return {}
    levels = reference_levels(folder, sorted(prompts), prompt_seed=PROMPT_SEED)
    return {name: {f"{JUDGE}{key}": value for key, value in values.items()} for name, values in levels.items()}


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _seconds(text: str) -> list[float]:
    seconds = []
    for word in _words(text):
        try:
            seconds.append(float(word))
        except ValueError as error:
            raise ValueError(f"moments: {word!r} is no number of seconds: write 5,30,60") from error
    return seconds
