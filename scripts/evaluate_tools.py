"""What ``longtake evaluate`` does with results that exist: compare, report, list, export, import, check."""

from pathlib import Path
from typing import Annotated

import typer

from longtake.scripts.console import err, out
from longtake.scripts.evaluate_table import table

OutOption = Annotated[Path, typer.Option("--out", help="Folder to write to.", show_default=False)]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)]


def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Folders of runs or of evaluations, or their results.json.", show_default=False
        ),
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
    from longtake.evaluation.running.runner import run_folders, write_comparison

    try:
        seconds = [float(word) for word in moments.split(",")]
    except ValueError as error:
        raise ValueError(f"moments={moments!r}: give seconds with commas, for example 5,30,60") from error
    places = [place for folder in folders for place in run_folders(folder)]
    runs = [load_run(place) for place in places]
    labels = [run.label for run in runs]
    if baseline is not None and baseline not in labels:
        raise ValueError(f"baseline {baseline!r} is none of the runs: {', '.join(labels)}")
    write_comparison(
        out_folder,
        runs,
        baseline=baseline or labels[0],
        moments=seconds,
        videos=dict(zip(labels, places, strict=True)),
        commands=[f"longtake evaluate compare {' '.join(map(str, folders))} --out {out_folder}"],
    )
    show_summary(out_folder)


def report(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of an evaluation.", show_default=False)],
) -> None:
    """Write results and report of what has been measured so far, also in the middle of an evaluation.

    **Example**

    `longtake evaluate report study`
    """
    from longtake.evaluation.running.runner import write_results

    for run in write_results(folder):
        err.print(f"{run.label}: {len(run.videos)} videos", markup=False)
    show_summary(folder)


def show_summary(folder: Path) -> None:
    """Print the comparison's first table, and where the report is.

    Args:
        folder: With ``comparison.json`` and ``report.html``.
    """
    from longtake.evaluation.report.tables import summary_table
    from longtake.evaluation.running.plan import read_json
    from longtake.evaluation.running.runner import COMPARISON_FILE, REPORT_FILE

    err.print(summary_table(read_json(folder / COMPARISON_FILE)))
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
    from longtake.evaluation.running.protocol import protocol_names
    from longtake.evaluation.running.suites import SUITE, SUITES

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
    dimensions: Annotated[
        str | None, typer.Option(help="Dimensions to score, with commas.", show_default="all of the mode")
    ] = None,
    dev_flag: Annotated[bool, typer.Option("--dev-flag", help="VBench-Long with clip-to-clip consistency.")] = False,
    full_info: Annotated[Path | None, typer.Option(help="VBench_full_info.json; for mode standard.")] = None,
    num_samples: Annotated[int, typer.Option(help="Videos per prompt; for mode standard.")] = 5,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Lay out what is there.")] = False,
) -> None:
    """Lay a run's videos out for the official VBench, with the files and the script that it needs.

    **Examples**

    `longtake evaluate export-vbench study/pack --mode long --out vbench-pack`

    `longtake evaluate export-vbench study/pack --mode standard --full-info VBench_full_info.json --out vbench-pack`
    """
    from longtake.evaluation.vbench_io import export_custom, export_long, export_standard

    chosen = {} if dimensions is None else {"dimensions": [word.strip() for word in dimensions.split(",")]}
    if mode == "custom":
        export = export_custom(run, out_folder, **chosen)
    elif mode == "long":
        export = export_long(run, out_folder, dev_flag=dev_flag, **chosen)
    elif mode == "standard":
        own = {"full_info": full_info, "num_samples": num_samples, "allow_missing": allow_missing}
        export = export_standard(run, out_folder, **own, **chosen)
    else:
        raise ValueError(f"unknown mode {mode!r}; known: custom, long, standard.")
    for note in export.notes:
        err.print(note, style="yellow", markup=False)
    out.print(str(out_folder), markup=False)


def import_vbench(
    run: RunArgument,
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="*_eval_results.json of the tool.", show_default=False)
    ],
    *,
    dev_flag: Annotated[
        bool | None,
        typer.Option("--dev-flag/--no-dev-flag", help="How VBench-Long ran.", show_default="read from the results"),
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


def check_golden(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="golden.json, videos/ and stubs.py with the stand-ins.", show_default=False
        ),
    ],
    *,
    every: Annotated[bool, typer.Option("--all", help="Also list the numbers that are equal.")] = False,
) -> None:
    """Compare this program's numbers with those that VBench's own functions gave on the same clips.

    **Example**

    `longtake evaluate check-golden ../shared/golden/vbench`
    """
    from longtake.evaluation.backbones import load_backbones
    from longtake.evaluation.golden_check import TOLERANCE
    from longtake.evaluation.golden_check import check_golden as compare_numbers

    checks = compare_numbers(folder, load_backbones(folder / "stubs.py"))
    for check in checks:
        if every or not check.ok:
            word = "equal" if check.ok else "differs"
            out.print(f"{word}: {check.name}: {check.got}, VBench {check.expected}", markup=False)
    worst = max(check.error for check in checks)
    num_equal = sum(check.ok for check in checks)
    out.print(f"{num_equal} of {len(checks)} numbers equal within {TOLERANCE:g}; largest difference {worst:.1e}")
    if num_equal < len(checks):
        raise typer.Exit(1)


def sets(
    run: RunArgument,
    *,
    reference: Annotated[Path, typer.Option(help="Folder of real videos, or of another run.", show_default=False)],
    backbones: Annotated[
        Path | None, typer.Option(help="FILE.py or .yaml that names the networks.", show_default="classical stand-ins")
    ] = None,
    role: Annotated[str, typer.Option(help="Whose features: dino, clip, dinov2 or dreamsim.")] = "dino",
    num_frames: Annotated[int, typer.Option(help="Frames of each video, spread evenly; an even number.")] = 32,
    allow_small: Annotated[
        bool, typer.Option("--allow-small", help="A Frechet distance of fewer videos than dimensions.")
    ] = False,
) -> None:
    """Measure a run's videos as a set against a reference: Frechet distance, precision, recall, STREAM.

    Writes RUN/sets.json.

    **Example**

    `longtake evaluate sets study/pack --reference study/full --backbones vbench.py --role dinov2`
    """
    from longtake.evaluation.backbones import classical_backbones, load_backbones
    from longtake.evaluation.running.set_runner import measure_sets

    found = classical_backbones() if backbones is None else load_backbones(backbones)
    measured = measure_sets(run, reference, backbones=found, role=role, num_frames=num_frames, allow_small=allow_small)
    for name, score in measured.scores.items():
        out.print(f"{name}: {score.skipped if score.value is None else format(score.value, '.6g')}", markup=False)


TOOLS = {
    "compare": compare,
    "report": report,
    "table": table,
    "list": list_all,
    "export-vbench": export_vbench,
    "import-vbench": import_vbench,
    "check-golden": check_golden,
    "sets": sets,
}
