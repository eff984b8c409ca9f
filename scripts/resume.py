"""Go on with a run that was stopped, killed or cut off."""

from pathlib import Path
from typing import Annotated

import typer

from longtake.scripts.console import EXIT_INTERRUPTED, err, stop_requests
from longtake.scripts.running import finish, go_on, report_files


def resume(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder.", show_default=False)],
    *,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Go on even if blocks made again differ, on another machine.")
    ] = False,
) -> None:
    """Go on with a run from its newest saved state.

    The frames come out as if the run had never stopped: blocks after the saved state are made again and compared with
    the hashes in `blocks.jsonl`.

    **Example**

    `longtake resume runs/a-red-circle-bouncing-1`
    """
    from longtake.pipelines.run_folder import FINISHED, RunFolder

    run = RunFolder(folder)
    run.check()
    if run.status == FINISHED:
        finish(run)
        err.print(f"{folder} is finished already", markup=False)
        report_files(run)
        return
    with stop_requests() as should_stop:
        if go_on(folder, None, should_stop=should_stop, allow_changes=allow_changes) != FINISHED:
            raise typer.Exit(EXIT_INTERRUPTED)
