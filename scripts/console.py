"""Console of all commands: one-line errors, exit codes, progress, stopping on signals; and waiting of idle threads.

Imports neither torch nor anything that does.
"""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from inspect import signature
from types import FrameType
from typing import Any, TypeVar, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
_MAX_ERROR_LENGTH = 600
# Rounds of waiting (about a tenth of a millisecond) after which a thread goes to sleep: longer than the pauses between
# the products of a forward, so that they find it awake, and too short to take time from other programs.
_SPIN_COUNT = 10_000

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)

T = TypeVar("T")


def wait_briefly() -> None:
    """Let idle threads stay awake between two products, then sleep; what the user has set stays.

    OpenMP reads its settings once, when torch is loaded: for programs, before their first ``import torch``.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", str(_SPIN_COUNT))


def run_app(app: typer.Typer, args: list[str] | None = None) -> int:
    """Run the command line; every expected failure is one line on stderr.

    Args:
        app: The commands.
        args: Words after the program's name; the process's own when None.

    Returns:
        Exit code: 0, 2 for bad input and full disks, 130 after Ctrl-C.
    """
    try:
        code = app(args=args, prog_name="longtake", standalone_mode=False)
    except typer.TyperException as error:
        # Without any words a command shows its help, and there is no more to say.
        message = error.format_message()
        return _fail(f"{message} See: longtake --help") if message.strip() else EXIT_BAD_INPUT
    except ValueError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail((error.strerror or str(error)) + (f" ({error.filename})" if error.filename else ""))
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    return code or 0


def _fail(message: str) -> int:
    line = " ".join(message.split())
    if len(line) > _MAX_ERROR_LENGTH:
        line = line[:_MAX_ERROR_LENGTH] + " ..."
    err.print(f"longtake: {escape(line)}", style="red")
    return EXIT_BAD_INPUT


def takes_options(options: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Give a command the fields of a dataclass, annotated as typer wants them, as its options."""

    def decorate(command: Callable[[T], None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            command(options(**values))

        vars(run)["__signature__"] = signature(options)
        run.__doc__, run.__annotations__ = command.__doc__, get_type_hints(options, include_extras=True)
        return run

    return decorate


def print_rows(rows: Iterable[tuple[str, str]], *, console: Console = out) -> None:
    """Print names in bold, each with its text beside it."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, escape(text))
    console.print(table)


@contextmanager
def progress(text: str, *, total: float) -> Iterator[Callable[..., None]]:
    """Show progress on stderr: a bar in a terminal, lines of the format ``text`` elsewhere.

    Yields:
        ``show(completed, is_due=..., **fields)``: the work done of ``total``, whether a line is to be printed where
        there is no bar, and the fields of ``text``.
    """
    columns = TextColumn("{task.description}"), BarColumn()
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def show(completed: float, *, is_due: bool, **fields: object) -> None:
            line = text.format(**fields)
            bar.update(task, completed=completed, description=line)
            if is_due and not err.is_terminal:
                err.print(line)

        yield show


@contextmanager
def stop_requests(what: str = "block") -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C, or a polite kill, into a request that is asked for between blocks.

    Args:
        what: What is finished first, for the message.

    Yields:
        A function that tells whether to stop. A second Ctrl-C interrupts at once; a kill after a Ctrl-C does not, for
        that is what torchrun makes of one.
    """
    requested: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if number in requested:
            raise KeyboardInterrupt
        if requested:
            return
        requested.append(number)
        err.print(f"\nstopping after this {what}; again to stop at once", style="yellow")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(requested)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
