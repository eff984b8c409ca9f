"""Branch a new run from an existing one: same beginning, another prompt or another length."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, cast

from typer import Argument, Exit, Option

from longtake.cache import Event
from longtake.configs.run import PromptChange, RunConfig
from longtake.pipelines.run_folder import FINISHED, RunFolder, free_place, refuse_existing
from longtake.scripts.console import EXIT_INTERRUPTED, stop_requests
from longtake.scripts.running import load_pipeline, provenance, run_in_folder, start_rollout, use_recorded_setup

TIME = re.compile(r"(?:(?P<minutes>\d+)(?:m|:))?(?P<seconds>\d+(?:\.\d*)?)?s?")


def fork(
    folder: Annotated[Path, Argument(metavar="DIR", help="The run to branch from.", show_default=False)],
    *,
    at: Annotated[str, Option(help="Where to branch: 20s, 1m30s or 1:30.", show_default=False)],
    prompt: Annotated[str | None, Option(help="What to show from there on.")] = None,
    event: Annotated[str, Option(help="What the new prompt does to the cache: keep, recache, flush or cut.")] = "keep",
    seconds: Annotated[float | None, Option(help="Length of the new video.", show_default="as before")] = None,
    out: Annotated[Path | None, Option(help="New run folder.", show_default="DIR-fork-1, -2, ...")] = None,
) -> None:
    """Branch a new run from an existing one.

    Frames before the branch are the old run's. The branch begins with the first block that starts at or after --at;
    checkpoints only decide how many blocks are made again to get there.

    **Examples**

    `longtake fork runs/take --at 20s --prompt "a blue circle bouncing quickly over a navy striped background"`

    `longtake fork runs/take --at 58s --seconds 120`
    """
    source = RunFolder(folder)
    source.check()
    time = _parse_time(at)
    path = out or free_place(folder.with_name(f"{folder.name}-fork"))
    refuse_existing(path)
    source.branch_point(at=time)
    config = _forked_config(source.config, at=time, prompt=prompt, event=event, seconds=seconds)
    use_recorded_setup(source)
    pipe = load_pipeline(config.model)
    rollout = start_rollout(pipe, config, source)
    record = provenance(pipe, config.model) | {"start": source.record.get("start")}
    with (
        stop_requests() as should_stop,
        source.fork(path, config=config, at=time, record=record, num_ahead=rollout.num_ahead) as new,
    ):
        if run_in_folder(new, rollout, should_stop=should_stop) != FINISHED:
            raise Exit(EXIT_INTERRUPTED)


def _parse_time(text: str) -> float:
    """Seconds of ``20s``, ``20``, ``1m30s`` or ``1:30``."""
    match = TIME.fullmatch(text.strip())
    if match is None or not any(match.groupdict().values()):
        raise ValueError(f"--at {text!r} is no time: write 20s, 1m30s or 1:30")
    time = 60 * int(match["minutes"] or 0) + float(match["seconds"] or 0)
    if time == 0:
        raise ValueError("--at 0 shares nothing with the old run: use longtake generate")
    return time


def _forked_config(
    config: RunConfig, *, at: float, prompt: str | None, event: str, seconds: float | None
) -> RunConfig:
    if prompt is None and event != "keep":
        raise ValueError(f"--event {event} is what a new prompt does to the cache: give --prompt too")
    if prompt is None and seconds is None:
        raise ValueError("a fork without anything new is the same video: give --prompt or --seconds")
    length = config.seconds if seconds is None else seconds
    if length <= at:
        raise ValueError(f"--at {at:g} s is not within the new video of {length:g} s: give a longer --seconds")
    changes = config.prompt_changes
    if prompt is not None:
        kept = tuple(change for change in changes if change.at < at)
        changes = (*kept, PromptChange(at=at, prompt=prompt, event=cast(Event, event)))  # the rollout checks it
    return replace(config, seconds=length, prompt_changes=changes)
