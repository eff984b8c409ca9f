"""Train the bundled mini model: VAE, latents, transformer, export. `train_mini.py --help` lists the stages."""

from pathlib import Path
from typing import Annotated

import typer

from longtake.scripts.mini_training.runtime import launch, pick_device

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
Work = Annotated[Path, typer.Option(help="folder of checkpoints, logs and rendered data")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Workers = Annotated[int, typer.Option(help="one-thread processes that share gradients (CPU only)")]
DEFAULT_WORK = Path(".work")


@app.callback()
def stages() -> None:
    """Train the bundled mini model, stage by stage."""


@app.command()
def vae(work: Work = DEFAULT_WORK, device: Device = "auto", workers: Workers = 1, minutes: float = 35.0) -> None:
    """Train the VAE; resumes from its checkpoint."""
    from longtake.scripts.mini_training.vae import train_vae

    launch(workers, train_vae, work.resolve(), pick_device(device), minutes=minutes)


if __name__ == "__main__":
    app()
