"""Train the compressor of the cache policy `pack` for the bundled mini model, and measure it. Every stage resumes."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from lab.mini.compressor import (
    UNPROMPTED_IN,
    Distillation,
    Lessons,
    Reader,
    measure,
    save_compressor,
    train_compressor,
)
from lab.mini.compressor_clips import encode_clips
from lab.mini.runtime import console
from longtake.cache.policies.pack import load_compressor
from longtake.pipelines import LongVideoPipeline

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
Work = Annotated[Path, typer.Option(help="folder of clips, checkpoints and logs")]
Folder = Annotated[Path, typer.Option(help="where the weights go")]
DEFAULT_WORK = Path(".work/compressor")
DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "models" / "mini" / "compressor"
KINDS = ["hr+lr", "hr"]
COMPARED = ("drop", "pool", "lr", *KINDS)


@app.command()
def encode(work: Work = DEFAULT_WORK, *, clips: int = 704) -> None:
    """Encode new training scenes, and every block of them pooled; goes on where it stopped."""
    pipe, size, grid = _mini()
    work.mkdir(parents=True, exist_ok=True)
    encode_clips(work / "clips.pt", pipe.vae, clips=clips, frames_per_block=size, tokens=grid)


@app.command()
def train(
    work: Work = DEFAULT_WORK,
    *,
    kinds: Annotated[list[str], typer.Option("--kind", help="hr+lr, hr")] = KINDS,
    minutes: Annotated[float, typer.Option(help="for each kind")] = 12.0,
    folder: Folder = DEFAULT_FOLDER,
) -> None:
    """Train `hr+lr` and `hr`, and write their weights."""
    for kind in kinds:
        if kind not in KINDS:
            raise typer.BadParameter(f"kind={kind!r}: use {' or '.join(KINDS)}.")
    reader, lessons, size = _load(work)
    with reader.installed():
        lessons.fill(reader, size)
        for kind in kinds:
            network = train_compressor(work, reader, lessons, kind=kind, frames_per_block=size, minutes=minutes)
            save_compressor(network, folder / f"{kind}.safetensors")


@app.command()
def compare(work: Work = DEFAULT_WORK, *, folder: Folder = DEFAULT_FOLDER) -> None:
    """Measure how far each compressor's prediction is from that with full history, on held-back clips.

    Prints the mean squared difference, and its share of what dropping the middle costs, with the standard error.
    """
    reader, lessons, size = _load(work)
    dropped = None
    with reader.installed():
        for kind in COMPARED:
            path = folder / f"{kind}.safetensors"
            if kind in KINDS and not path.is_file():
                continue
            network = load_compressor(str(path), kind, torch.device("cpu")) if kind in KINDS else None
            errors = measure(Distillation(reader, size, kind, network), lessons)
            dropped = errors if dropped is None else dropped
            share = errors.sum() / dropped.sum()
            spread = (errors - share * dropped).std() / len(errors) ** 0.5 / dropped.mean()
            console.print(f"{kind:>6s} {errors.mean():.5f}, of drop's {share:.3f} +- {spread:.3f}")


@app.command(name="all")
def all_stages(work: Work = DEFAULT_WORK) -> None:
    """Encode, train both kinds, compare."""
    encode(work)
    train(work)
    compare(work)


def _mini() -> tuple[LongVideoPipeline, int, tuple[int, int]]:
    pipe = LongVideoPipeline.from_pretrained("mini")
    pixels = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[1]
    return pipe, pipe.family.frames_per_block, (pipe.family.height // pixels, pipe.family.width // pixels)


def _load(work: Path) -> tuple[Reader, Lessons, int]:
    pipe, size, grid = _mini()
    pipe.transformer.float().eval().requires_grad_(False)
    path = work / "clips.pt"
    if not path.is_file():
        raise typer.BadParameter(f"{path} does not exist: run `python -m lab.train_compressor encode` first.")
    saved = torch.load(path, weights_only=True)
    prompts = pipe.embed_text(json.loads(saved["captions"]))
    prompts[::UNPROMPTED_IN] = pipe.embed_text([""], is_negative=True)
    return Reader(pipe.transformer, grid), Lessons(saved["latents"], saved["pooled"], prompts), size


if __name__ == "__main__":
    app()
