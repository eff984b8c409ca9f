"""The commands ``longtake attention``."""

import typer

from longtake.scripts.attention_show import show

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Sparse attention: draw what a policy leaves of it.",
)
app.command("show", no_args_is_help=True)(show)


@app.callback()
def options() -> None:
    """Keep the commands named, however many there are."""
