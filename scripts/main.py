"""The console command ``longtake``; a command's module is imported when the command runs."""

import os
import sys
from importlib import import_module
from typing import Annotated, Any

from typer import Exit, Option, Typer
from typer.core import TyperGroup
from typer.main import get_command

from longtake import __version__
from longtake.scripts.console import out, run_app, wait_briefly

COMMANDS = {
    "generate": "Make a video from a prompt.",
    "resume": "Resume a run from its latest checkpoint.",
    "fork": "Branch a new run from an existing one.",
    "policies": "List the cache policies with what they attend to and cost, or explain one.",
    "info": "Show a model's size, shape, size of its cache, licence and source; or plan a video's memory.",
    "convert": "Turn a published checkpoint into a diffusers folder.",
    "profile-heads": "Profile a model's attention heads for `forcing_kv`.",
    "evaluate": "Measure videos, make and measure them, and compare runs.",
    "attention": "Attention backends of this machine, and sparse attention policies.",
}
_STYLE: dict[str, Any] = {"add_completion": False, "rich_markup_mode": "markdown", "pretty_exceptions_enable": False}


class _Commands(TyperGroup):
    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)
        return name, _load_command(args[0]), rest


def _load_command(name: str) -> Any:
    """A command of the table: the function of its name, or the group ``app``, of the module of its name."""
    module = import_module(f"longtake.scripts.{name.replace('-', '_')}")
    program = vars(module).get("app")
    if program is None:
        program = Typer(**_STYLE)
        program.command(name, no_args_is_help=name != "policies")(getattr(module, name.replace("-", "_")))
    return get_command(program)


app = Typer(
    cls=_Commands,
    no_args_is_help=True,
    help=(
        "Minutes of video from a causal video diffusion transformer, block by block, with a cache policy chosen in "
        "YAML.\n\n"
        'Start with: `longtake generate "a red circle bouncing quickly over a navy striped background"`'
    ),
    **_STYLE,
)
for _name, _line in COMMANDS.items():
    app.command(_name, help=_line)(lambda: None)


def _show_version(value: bool) -> None:
    if value:
        out.print(__version__)
        raise Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of all commands."""


def main() -> None:
    """Run the command line and exit with its code."""
    wait_briefly()
    # Before diffusers and transformers are imported: every model is a folder on this machine.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(run_app(app))


if __name__ == "__main__":
    main()
