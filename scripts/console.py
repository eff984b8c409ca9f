"""Console of all commands: one-line errors, exit codes, stopping on signals."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import typer
from rich.console import Console
from rich.markup import escape

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
MAX_ERROR_LENGTH = 600

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)

# typer gives only BadParameter a public name; its parent is the error of every wrong command line.
UsageError = typer.BadParameter.__base__


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
    except UsageError as error:
        # Without any words a command shows its help, and there is no more to say.
        message = error.format_message()
        return fail(f"{message} See: longtake --help") if message.strip() else EXIT_BAD_INPUT
    except ValueError as error:
        return fail(str(error))
    except OSError as error:
        return fail(_describe(error))
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    return code or 0


def fail(message: str) -> int:
    """Print one line on stderr and return the exit code for bad input."""
    line = " ".join(message.split())
    if len(line) > MAX_ERROR_LENGTH:
        line = line[:MAX_ERROR_LENGTH] + " ..."
    err.print(f"longtake: {escape(line)}", style="red")
    return EXIT_BAD_INPUT


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


def _describe(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"
