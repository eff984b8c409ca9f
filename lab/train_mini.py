"""Train the bundled mini model: VAE, latents, transformer, export. `train_mini.py --help` lists the stages."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lab.mini.runtime import console, launch, pick_device

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
Work = Annotated[Path, typer.Option(help="folder of checkpoints, logs and rendered data")]
Folder = Annotated[Path, typer.Option(help="diffusers folder to write")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Workers = Annotated[int, typer.Option(help="one-thread processes that share gradients (CPU only)")]
InitFrom = Annotated[Path | None, typer.Option(help="exported folder to start from when there is no checkpoint")]
Live = Annotated[bool, typer.Option(help="the last weights instead of their average")]
DEFAULT_WORK = Path(".work")
DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "models" / "mini"


@app.command()
def vae(work: Work = DEFAULT_WORK, *, device: Device = "auto", workers: Workers = 1, minutes: float = 33.0) -> None:
    """Train the VAE; resumes from its checkpoint."""
    from lab.mini.vae import train_vae

    launch(workers, train_vae, work.resolve(), pick_device(device), minutes=minutes)


@app.command()
def decoder(work: Work = DEFAULT_WORK, *, device: Device = "auto", workers: Workers = 1, minutes: float = 8.0) -> None:
    """Train the VAE's decoder further; the encoder and the encoded clips stay valid."""
    from lab.mini.vae import train_vae

    launch(workers, train_vae, work.resolve(), pick_device(device), minutes=minutes, decoder_only=True)


@app.command()
def psnr(work: Work = DEFAULT_WORK, *, clips: int = 12, frames: int = 161) -> None:
    """Measure the VAE on held-back clips, decoded in streaming."""
    from lab.mini.vae import load_vae, measure_psnr

    console.print(measure_psnr(load_vae(work), num_clips=clips, num_frames=frames))


@app.command()
def encode(work: Work = DEFAULT_WORK, *, device: Device = "auto", workers: Workers = 1, clips: int = 4000) -> None:
    """Encode the training clips with the trained VAE; resumes where it stopped."""
    from lab.mini.latents import encode_latents

    launch(workers, encode_latents, work.resolve(), pick_device(device), clips=clips)


@app.command()
def transformer(
    work: Work = DEFAULT_WORK,
    *,
    device: Device = "auto",
    workers: Workers = 1,
    minutes: float = 75.0,
    batch: Annotated[int, typer.Option(help="clips per worker and step")] = 4,
    init_from: InitFrom = None,
) -> None:
    """Train transformer and text encoder; resumes from the checkpoint."""
    from lab.mini.transformer import train_transformer

    options = {"minutes": minutes, "batch": batch, "init_from": init_from}
    launch(workers, train_transformer, work.resolve(), pick_device(device), **options)


@app.command()
def export(work: Work = DEFAULT_WORK, *, folder: Folder = DEFAULT_FOLDER, live: Live = False) -> None:
    """Write the diffusers folder."""
    from lab.mini.export import export_folder

    export_folder(work.resolve(), folder.resolve(), use_live=live)


@app.command()
def sheet(
    work: Work = DEFAULT_WORK,
    *,
    out: Path = Path("sheet.png"),
    count: int = 12,
    steps: int = 4,
    euler: bool = False,
    live: Live = False,
) -> None:
    """Draw a contact sheet of held-back prompts with the weights so far."""
    from lab.mini.export import load_model
    from lab.mini.sheet import decode_clips, held_back_prompts, sample_clips, save_sheet
    from lab.mini.vae import load_vae

    statistics = json.loads((work / "latents.json").read_text())
    prompts = held_back_prompts(count)
    model = load_model(work / "transformer.pt", use_live=live)
    latents = sample_clips(model, prompts, num_steps=steps, renoise=not euler)
    videos = decode_clips(load_vae(work), latents, statistics["mean"], statistics["std"])
    save_sheet(out, list(videos))
    for prompt in prompts:
        console.print(prompt)


@app.command()
def curves(work: Work = DEFAULT_WORK, *, out: Path = Path("curves.png")) -> None:
    """Plot the logs of the VAE's and the transformer's training."""
    from lab.mini.sheet import save_curves

    save_curves(work, out)


@app.command(name="all")
def all_stages(work: Work = DEFAULT_WORK, *, device: Device = "auto", workers: Workers = 1) -> None:
    """Run every stage with its default length."""
    vae(work, device=device, workers=workers)
    encode(work, device=device, workers=workers)
    decoder(work, device=device, workers=workers)
    transformer(work, device=device, workers=workers)
    export(work)


if __name__ == "__main__":
    app()
