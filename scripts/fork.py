"""Branch a new run from an existing one: same beginning, another prompt or another length."""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longtake.configs.run import PromptChange, RunConfig
from longtake.scripts.console import EXIT_INTERRUPTED, stop_requests
from longtake.scripts.generate import free_place
from longtake.scripts.running import load_pipeline, provenance, run_in_folder, start_session, use_recorded_setup

if TYPE_CHECKING:
    from longtake.pipelines.run_folder import RunFolder

TIME = re.compile(r"(?:(?P<minutes>\d+)(?:m|:))?(?P<seconds>\d+(?:\.\d*)?)?s?")


def fork(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The run to branch from.", show_default=False)],
    *,
    at: Annotated[str, typer.Option(help="Where to branch: 20s, 1m30s or 1:30.", show_default=False)],
    prompt: Annotated[str | None, typer.Option(help="What to show from there on.")] = None,
    event: Annotated[
        str, typer.Option(help="What the new prompt does to the cache: keep, recache, flush or cut.")
    ] = "keep",
    seconds: Annotated[float | None, typer.Option(help="Length of the new video.", show_default="as before")] = None,
    out: Annotated[Path | None, typer.Option(help="New run folder.", show_default="DIR-fork-1, -2, ...")] = None,
) -> None:
    """Branch a new run from an existing one.

    Frames before the branch are the old run's. The branch begins with the first block that starts at or after --at;
    saved states only decide how many blocks are made again to get there.

    **Examples**

    `longtake fork runs/take --at 20s --prompt "a blue circle bouncing quickly over a navy striped background"`

    `longtake fork runs/take --at 58s --seconds 120`
    """
    from longtake.pipelines.run_folder import RunFolder, branch_point, fork_run, refuse_existing

    source = RunFolder(folder)
    source.check()
    time = _parse_time(at)
    path = out or free_place(folder.with_name(f"{folder.name}-fork"))
    refuse_existing(path)
    branch_point(source, at=time)
    config = _forked_config(source, at=time, prompt=prompt, event=event, seconds=seconds)
    use_recorded_setup(source)
    pipe = load_pipeline(config.model)
    session = start_session(pipe, config, source)
    record = provenance(pipe, config.model) | {"start": source.record.get("start")}
    with (
        stop_requests() as should_stop,
        fork_run(source, path, config=config, at=time, record=record, num_ahead=session.num_ahead) as new,
    ):
        if run_in_folder(new, session, should_stop=should_stop).status != "finished":
            raise typer.Exit(EXIT_INTERRUPTED)


def _parse_time(text: str) -> float:
    """Read a time: ``20s``, ``20``, ``1m30s``, ``1:30``.

    Returns:
        Seconds.

    Raises:
        ValueError: If it is none of these, or 0.
    """
    match = TIME.fullmatch(text.strip())
    if match is None or not any(match.groupdict().values()):
        raise ValueError(f"--at {text!r} is no time: write 20s, 1m30s or 1:30")
    time = 60 * int(match["minutes"] or 0) + float(match["seconds"] or 0)
    if time == 0:
        raise ValueError("--at 0 shares nothing with the old run: use longtake generate")
    return time


def _forked_config(
    source: "RunFolder", *, at: float, prompt: str | None, event: str = "keep", seconds: float | None
) -> RunConfig:
    """Change a run's configuration from a time on.

    Args:
        source: The run to branch from.
        at: Seconds.
        prompt: The new prompt, if any.
        event: What it does to the cache.
        seconds: The new length, if any.

    Raises:
        ValueError: If nothing is new, or the new length ends before ``at``.
    """
    if prompt is None and event != "keep":
        raise ValueError(f"--event {event} is what a new prompt does to the cache: give --prompt too")
    if prompt is None and seconds is None:
        raise ValueError("a fork without anything new is the same video: give --prompt or --seconds")
    config = source.config
    length = config.seconds if seconds is None else seconds
    if length <= at:
        raise ValueError(f"--at {at:g} s is not within the new video of {length:g} s: give a longer --seconds")
    changes = tuple(change for change in config.prompt_changes if change.at < at)
    if prompt is not None:
        changes += (PromptChange(at=at, prompt=prompt, event=event),)
    else:
        changes = config.prompt_changes
    return replace(config, seconds=length, prompt_changes=changes)
