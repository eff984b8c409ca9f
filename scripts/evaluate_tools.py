"""What ``longtake evaluate`` does with results that exist: compare, report, list, export, import, check."""

from pathlib import Path
from typing import Annotated

import typer

from longtake.scripts.console import EXIT_BAD_INPUT, err, out

OutOption = Annotated[Path, typer.Option("--out", help="Folder to write to.", show_default=False)]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)]


def compare(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs or of evaluations.", show_default=False)
    ],
    *,
    out_folder: OutOption,
    baseline: Annotated[
        str | None, typer.Option(help="Run that the others are compared with.", show_default="the first")
    ] = None,
    moments: Annotated[str, typer.Option(help="Seconds at which to compare, with commas.")] = "5,30,60",
) -> None:
    """Compare runs that were measured at different times; same prompts and seeds are paired.

    **Examples**

    `longtake evaluate compare study/full study/pack --baseline full --out full-or-pack`

    `longtake evaluate compare first second --baseline sliding_window --moments 5,60,120 --out all`
    """
    from longtake.evaluation.results import load_run
    from longtake.evaluation.runner import run_folders, write_comparison

    try:
        seconds = [float(word) for word in moments.split(",")]
    except ValueError as error:
        raise ValueError(f"moments={moments!r}: give seconds with commas, for example 5,30,60") from error
    places = [place for folder in folders for place in run_folders(folder)]
    runs = [load_run(place) for place in places]
    labels = [run.label for run in runs]
    if baseline is not None and baseline not in labels:
        raise ValueError(f"baseline {baseline!r} is none of the runs: {', '.join(labels)}")
    page = write_comparison(
        out_folder,
        runs,
        baseline=baseline or labels[0],
        moments=seconds,
        videos=dict(zip(labels, places, strict=True)),
        commands=[f"longtake evaluate compare {' '.join(map(str, folders))} --out {out_folder}"],
    )
    out.print(str(page), markup=False)


def report(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of an evaluation.", show_default=False)],
) -> None:
    """Write results and report of what has been measured so far, also in the middle of an evaluation.

    **Example**

    `longtake evaluate report study`
    """
    from longtake.evaluation.runner import REPORT_FILE, write_results

    runs = write_results(folder)
    for run in runs:
        err.print(f"{run.label}: {len(run.videos)} videos", markup=False)
    out.print(str(folder / REPORT_FILE), markup=False)


def list_all(
    backbones: Annotated[
        Path | None, typer.Option(help="FILE.py or .yaml that names the networks.", show_default="classical stand-ins")
    ] = None,
) -> None:
    """List the numbers that would be computed, those that would not and why, suites, protocols and backbones.

    **Example**

    `longtake evaluate list --backbones vbench.py`
    """
    from longtake.evaluation.backbones import ROLES, classical_backbones, load_backbones
    from longtake.evaluation.metrics import GROUPS, make_metrics
    from longtake.evaluation.protocol import protocol_names
    from longtake.evaluation.suites import SUITE, SUITES

    found = classical_backbones() if backbones is None else load_backbones(backbones)
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


def export_vbench(
    run: RunArgument,
    *,
    out_folder: OutOption,
    mode: Annotated[str, typer.Option(help="custom, long or standard: what the official tool is run as.")] = "custom",
) -> None:
    """Lay a run's videos out for the official VBench, with the files and the script that it needs.

    **Example**

    `longtake evaluate export-vbench study/pack --mode long --out vbench-pack`
    """
    from longtake.evaluation import vbench_io

    modes = {
        "custom": vbench_io.export_custom,
        "long": vbench_io.export_long,
        "standard": vbench_io.export_standard,
    }
    if mode not in modes:
        raise ValueError(f"unknown mode {mode!r}; known: {', '.join(modes)}.")
    modes[mode](run, out_folder)
    out.print(str(out_folder), markup=False)


def import_vbench(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="*_eval_results.json of the official tool.")],
) -> None:
    """Read results of the official VBench and print them, with Quality, Semantic and Total where they are complete.

    **Example**

    `longtake evaluate import-vbench vbench-pack/results/*_eval_results.json`
    """
    from longtake.evaluation import vbench_io

    for name, value in vbench_io.import_results(files).items():
        out.print(f"{name}: {value}", markup=False)


def check_golden(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Clips, stand-in backbones and VBench's own numbers.")],
) -> None:
    """Compare this program's numbers with those that VBench's own functions gave on the same clips.

    **Example**

    `longtake evaluate check-golden ../shared/golden/vbench`
    """
    from longtake.evaluation.golden import check_golden as check

    faults = 0
    for name, difference, tolerance in check(folder):
        is_fault = not difference <= tolerance
        faults += is_fault
        out.print(f"{'differs' if is_fault else 'equal':>8s}  {difference:.1e}  {name}", markup=False)
    if faults:
        raise typer.Exit(EXIT_BAD_INPUT)


TOOLS = {
    "compare": compare,
    "report": report,
    "list": list_all,
    "export-vbench": export_vbench,
    "import-vbench": import_vbench,
    "check-golden": check_golden,
}
