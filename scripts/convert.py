"""Turn a published checkpoint into a diffusers folder."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from longtake.configs.families import load_family
from longtake.scripts.console import err, out

if TYPE_CHECKING:
    from longtake.models.checkpoints.converting import Conversion
    from longtake.models.checkpoints.parts import OutputTensor

SECONDS_BETWEEN_LINES = 5


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Checkpoint: .safetensors, .pt, .pth, or a folder of shards.")
    ],
    *,
    out_folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to make; must not exist.")],
    preset: Annotated[
        str | None, typer.Option(help="Model family that the file is to fit: checks its size, names its entry.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="Entry of the file.", show_default="the preset's; else EMA weights first")
    ] = None,
    lora: Annotated[Path | None, typer.Option(metavar="FILE", help="Adapter to merge into the weights.")] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Its scale times its rank.", show_default="the preset's")
    ] = None,
    lora_key: Annotated[
        str | None, typer.Option(help="Entry of the adapter's file.", show_default="generator_lora")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="config.json that says the number of heads.", show_default="beside SRC"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="as in the file")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Limit of a weight file.")] = "10GB",
    vae: Annotated[
        Path | None, typer.Option(metavar="PATH", help="VAE: a diffusers folder, or Wan2.1_VAE.pth.")
    ] = None,
    text_encoder: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Text encoder: a folder, or models_t5_umt5-xxl-enc-bf16.pth."),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(metavar="DIR", help="Tokenizer's folder.")] = None,
) -> None:
    """Turn a published checkpoint into a diffusers folder.

    Every name and shape is checked before anything is written, every number while it is. Nothing is downloaded and no
    code of the file is run.

    **Examples**

    `longtake convert self_forcing_dmd.pt --out ./Self-Forcing --preset self_forcing --vae Wan2.1_VAE.pth
    --text-encoder models_t5_umt5-xxl-enc-bf16.pth --tokenizer google/umt5-xxl`

    `longtake convert longlive_base.pt --lora lora.pt --lora-alpha 256 --out ./LongLive/transformer --dtype bfloat16`

    `longtake info self_forcing_dmd.pt` says what a file is.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from longtake.models.checkpoints.converting import ConversionRequest, check_output, plan_conversion, summarise
    from longtake.models.checkpoints.parts import parse_bytes

    check_output(out_folder)
    request = ConversionRequest(
        source=source,
        preset=preset,
        key=key,
        lora=lora,
        lora_key=lora_key,
        lora_alpha=lora_alpha,
        config=config,
        dtype=dtype,
        max_shard_bytes=parse_bytes(max_shard_size),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )
    conversion = plan_conversion(request)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for what, text in summarise(conversion):
        table.add_row(what, escape(text))
    err.print(table)
    _note_adapter(preset, lora)
    start = time.monotonic()
    with _progress(conversion) as on_tensor:
        conversion.write(out_folder, on_tensor=on_tensor)
    seconds = time.monotonic() - start
    megabytes = conversion.num_bytes / 1e6
    err.print(f"{conversion.num_tensors} tensors, {megabytes:,.1f} MB in {seconds:.1f} s")
    _say_how_to_run(conversion, out_folder)
    out.print(str(out_folder), markup=False)


def _note_adapter(preset: str | None, lora: Path | None) -> None:
    file = load_family(preset).checkpoint.lora_file if preset is not None else None
    if file is not None and lora is None:
        err.print(f"the preset {preset} also has an adapter, {file}: without --lora this is its base", style="yellow")


def _say_how_to_run(conversion: "Conversion", folder: Path) -> None:
    preset = conversion.request.preset
    if conversion.is_pipeline:
        family = f" model.family={preset}" if preset is not None else ""
        err.print(f'run it: longtake generate "..." --model {folder}{family}', markup=False)
        return
    err.print(
        f"this is the transformer alone: WanTransformer3DModel.from_pretrained('{folder}'). For a folder that runs, "
        "give --vae, --text-encoder and --tokenizer too.",
        markup=False,
    )


@contextmanager
def _progress(conversion: "Conversion") -> Iterator[Callable[["OutputTensor"], None]]:
    """A bar in a terminal, a line every few seconds elsewhere."""
    columns = (
        TextColumn("{task.fields[tensors]}/{task.fields[all_tensors]} tensors"),
        BarColumn(),
        TextColumn("{task.fields[speed]:,.0f} MB/s"),
        TextColumn("{task.fields[left]:.0f} s left"),
    )
    bar = Progress(*columns, console=err, disable=not err.is_terminal)
    total, start = conversion.num_bytes, time.monotonic()
    task = bar.add_task("", total=total, tensors=0, all_tensors=conversion.num_tensors, speed=0.0, left=0.0)
    done = {"tensors": 0, "bytes": 0, "said": start}

    def show(tensor: "OutputTensor") -> None:
        done["tensors"] += 1
        done["bytes"] += tensor.info.num_bytes
        now = time.monotonic()
        seconds = max(now - start, 1e-9)
        speed = done["bytes"] / 1e6 / seconds
        left = (total - done["bytes"]) * seconds / max(done["bytes"], 1)
        bar.update(task, completed=done["bytes"], tensors=done["tensors"], speed=speed, left=left)
        if not err.is_terminal and now - done["said"] > SECONDS_BETWEEN_LINES:
            done["said"] = now
            err.print(f"{done['tensors']}/{conversion.num_tensors} tensors  {speed:,.0f} MB/s  {left:.0f} s left")

    with bar:
        yield show
