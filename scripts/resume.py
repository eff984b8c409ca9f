"""Resume a run that was stopped, killed or cut off."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from longtake.pipelines.run_folder import FINISHED
from longtake.scripts.console import EXIT_INTERRUPTED, stop_requests
from longtake.scripts.running import resume_run


def resume(
    folder: Annotated[Path, Argument(metavar="DIR", help="A run's folder.", show_default=False)],
    *,
    allow_changes: Annotated[
        bool, Option("--allow-changes", help="Go on even if blocks made again differ, on another machine.")
    ] = False,
) -> None:
    """Resume a run from its latest checkpoint.

    The frames come out as if the run had never stopped: blocks after the checkpoint are made again and compared with
    the hashes in `blocks.jsonl`.

    **Example**

    `longtake resume runs/a-red-circle-bouncing-1`
    """
    with stop_requests() as should_stop:
        if resume_run(folder, None, should_stop=should_stop, allow_changes=allow_changes) != FINISHED:
            raise Exit(EXIT_INTERRUPTED)
