"""The console command ``longtake``."""

import sys
from typing import Annotated

import typer

from longtake import __version__
from longtake.configs.waiting import wait_briefly
from longtake.scripts.attention import app as attention
from longtake.scripts.console import out, run_app
from longtake.scripts.convert import convert
from longtake.scripts.evaluate import app as evaluate
from longtake.scripts.fork import fork
from longtake.scripts.generate import generate
from longtake.scripts.info import info
from longtake.scripts.policies import policies
from longtake.scripts.profile_heads import profile_heads
from longtake.scripts.resume import resume

COMMANDS = {
    "generate": generate,
    "resume": resume,
    "fork": fork,
    "policies": policies,
    "info": info,
    "convert": convert,
    "profile-heads": profile_heads,
}

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help=(
        "Minutes of video from a causal video diffusion transformer, block by block, with a cache policy chosen in "
        "YAML.\n\n"
        'Start with: `longtake generate "a red circle bouncing quickly over a navy striped background"`'
    ),
)
for _name, _command in COMMANDS.items():
    app.command(_name, no_args_is_help=_name != "policies")(_command)
app.add_typer(evaluate, name="evaluate")
app.add_typer(attention, name="attention")


def _show_version(value: bool) -> None:
    if value:
        out.print(__version__)
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of all commands."""


def main() -> None:
    """Run the command line and exit with its code."""
    wait_briefly()
    sys.exit(run_app(app))


if __name__ == "__main__":
    main()
