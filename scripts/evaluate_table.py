"""``longtake evaluate table``: an evaluation's numbers as Markdown, on the terminal or in a section of a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longtake.scripts.console import err, out

if TYPE_CHECKING:
    from longtake.evaluation.records import RunScores


def table(
    folders: Annotated[
        list[Path], typer.Argument(metavar="OUT...", help="Folders of evaluations or of runs.", show_default=False)
    ],
    *,
    moments: Annotated[
        str | None, typer.Option(help="Seconds, with commas.", show_default="the first evaluation's")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Run that the others are compared with.", show_default="the evaluation's")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Names of measures with a curve, with commas.", show_default="the judge's")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Markdown page to write into.", show_default="the terminal")
    ] = None,
    section: Annotated[str | None, typer.Option(help="Of the page, between two comments with this name.")] = None,
    curves: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Also draw the measures over time here.", show_default=False)
    ] = None,
    reference: Annotated[
        bool, typer.Option("--reference/--no-reference", help="Rows of the true scenes, for the bundled suite.")
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
    from longtake.evaluation.report.tables import (
        default_columns,
        find_columns,
        moment_tables,
        replace_section,
        write_curves,
    )
    from longtake.evaluation.running.runner import ordered_runs, settled_protocol

    if (page is None) != (section is None):
        raise ValueError("--page and --section go together: name the page and the section of it that is written")
    if page is not None and section is not None:
        replace_section(page.read_text(encoding="utf-8"), section, "", source=str(page))
    places = [place for folder in folders for place in ordered_runs(folder)]
    protocol = settled_protocol(folders[0])
    times = [_moment(word) for word in moments.split(",")] if moments is not None else list(protocol.moments)
    runs = _runs(places)
    labels = [run.label for run in runs]
    chosen = baseline or (protocol.baseline if protocol.baseline in labels else labels[0])
    if chosen not in labels:
        raise ValueError(f"baseline {chosen!r} is none of the runs: {', '.join(labels)}")
    wanted = None if metrics is None else [word.strip() for word in metrics.split(",") if word.strip()]
    columns = default_columns(runs) if wanted is None else find_columns(runs, wanted)
    levels = _reference(folders[0], runs, columns) if reference else {}
    text = moment_tables(runs, baseline=chosen, moments=times, columns=columns, levels=levels)
    if curves is not None:
        write_curves(runs, curves, baseline=chosen, columns=columns)
        err.print(f"wrote {curves}", markup=False)
    if page is None or section is None:
        out.print(text, markup=False, end="")
        return
    new = replace_section(page.read_text(encoding="utf-8"), section, text, source=str(page))
    page.write_text(new, encoding="utf-8")
    err.print(f"wrote {section!r} of {page}", markup=False)


def _moment(word: str) -> float:
    try:
        return float(word)
    except ValueError as error:
        raise ValueError(f"moments: {word!r} is no number of seconds: write 5,30,60") from error


def _runs(places: Sequence[Path]) -> "list[RunScores]":
    """What has been measured so far; runs without a video are left out."""
    from longtake.evaluation.results import load_run

    runs = [run for place in places if (run := load_run(place, has_drift=False)).videos]
    if not runs:
        raise ValueError("no video of these folders has been measured: go on with `longtake evaluate run --out OUT`")
    return runs


def _reference(folder: Path, runs: "Sequence[RunScores]", columns: Sequence[str]) -> Mapping[str, Mapping[str, float]]:
    """Levels of the true scenes under the metrics' names; none where the prompts are not the bundled suite's."""
    from longtake.evaluation.mini_world.drift import reference_levels
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
