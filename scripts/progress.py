"""How far a video is: block, speed, size of its cache, time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

if TYPE_CHECKING:
    from longtake.pipelines.run_take import Progress as TakeProgress
    from longtake.pipelines.take import TakeSession


@contextmanager
def block_progress(session: "TakeSession", console: Console) -> Iterator[Callable[["TakeProgress"], None]]:
    """A bar in a terminal, a line every tenth of the video elsewhere."""
    columns = (
        TextColumn("block {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("{task.fields[speed]:.1f} frames/s"),
        TextColumn("cache {task.fields[megabytes]:.1f} MB, {task.fields[tokens]} tokens"),
        TextColumn("{task.fields[left]:.0f} s left"),
    )
    num_blocks = session.num_blocks
    step = -(-num_blocks // 10)
    bar = Progress(*columns, console=console) if console.is_terminal else None
    task = bar.add_task("", total=num_blocks, speed=0.0, megabytes=0.0, tokens=0, left=0.0) if bar else None

    def show(done: "TakeProgress") -> None:
        speed = done.frames_per_second
        fields = {
            "speed": speed,
            "megabytes": done.num_cache_bytes / 1e6,
            "tokens": done.num_tokens,
            "left": (session.num_frames - done.num_frames) / speed if speed else 0.0,
        }
        if bar is not None:
            bar.update(task, completed=done.num_done, **fields)
        elif done.num_done % step == 0 or done.num_done == num_blocks:
            text = "{speed:.1f} frames/s  cache {megabytes:.1f} MB, {tokens} tokens  {left:.0f} s left".format(
                **fields
            )
            console.print(f"block {done.num_done}/{num_blocks}  {text}")

    with bar or nullcontext():
        yield show
