"""Turn a published checkpoint into a diffusers folder."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from longtake.configs.families import load_family
from longtake.models.checkpoints.converting import (
    Conversion,
    ConversionRequest,
    check_output,
    plan_conversion,
    summarise,
)
from longtake.models.checkpoints.parts import OutputTensor, parse_bytes
from longtake.scripts.console import err, out, print_rows, progress, takes_options

SECONDS_BETWEEN_LINES = 5


@dataclass(frozen=True, kw_only=True)
class _Options:
    source: Annotated[
        Path, Argument(metavar="SRC", help="Checkpoint: .safetensors, .pt, .pth, or a folder of shards.")
    ]
    out_folder: Annotated[Path, Option("--out", metavar="DIR", help="Folder to make; must not exist.")]
    preset: Annotated[
        str | None, Option(help="Model family that the file is to fit: checks its size, names its entry.")
    ] = None
    key: Annotated[
        str | None, Option(help="Entry of the file.", show_default="the preset's; else EMA weights first")
    ] = None
    lora: Annotated[Path | None, Option(metavar="FILE", help="Adapter to merge into the weights.")] = None
    lora_alpha: Annotated[float | None, Option(help="Its scale times its rank.", show_default="the preset's")] = None
    lora_key: Annotated[str | None, Option(help="Entry of the adapter's file.", show_default="generator_lora")] = None
    config: Annotated[
        Path | None,
        Option(metavar="FILE", help="config.json that says the number of heads.", show_default="beside SRC"),
    ] = None
    dtype: Annotated[str | None, Option(help="float32, bfloat16 or float16.", show_default="as in the file")] = None
    max_shard_size: Annotated[str, Option(help="Limit of a weight file.")] = "10GB"
    vae: Annotated[Path | None, Option(metavar="PATH", help="VAE: a diffusers folder, or Wan2.1_VAE.pth.")] = None
    text_encoder: Annotated[
        Path | None, Option(metavar="PATH", help="Text encoder: a folder, or models_t5_umt5-xxl-enc-bf16.pth.")
    ] = None
    tokenizer: Annotated[Path | None, Option(metavar="DIR", help="Tokenizer's folder.")] = None


@takes_options(_Options)
def convert(options: _Options) -> None:
    """Turn a published checkpoint into a diffusers folder.

    Every name and shape is checked before anything is written, every number while it is. Nothing is downloaded and no
    code of the file is run.

    **Examples**

    `longtake convert self_forcing_dmd.pt --out ./Self-Forcing --preset self_forcing --vae Wan2.1_VAE.pth
    --text-encoder models_t5_umt5-xxl-enc-bf16.pth --tokenizer google/umt5-xxl`

    `longtake convert longlive_base.pt --lora lora.pt --lora-alpha 256 --out ./LongLive/transformer --dtype bfloat16`

    `longtake info self_forcing_dmd.pt` says what a file is.
    """
    folder, preset = options.out_folder, options.preset
    check_output(folder)
    given: dict[str, Any] = vars(options) | {"max_shard_bytes": parse_bytes(options.max_shard_size)}
    own = ("out_folder", "max_shard_size")
    request = ConversionRequest(**{key: value for key, value in given.items() if key not in own})
    conversion = plan_conversion(request)
    print_rows(summarise(conversion), console=err)
    adapter = load_family(preset).checkpoint.lora_file if preset is not None else None
    if adapter is not None and options.lora is None:
        note = f"the preset {preset} also has an adapter, {adapter}: without --lora this is its base"
        err.print(note, style="yellow")
    start = time.monotonic()
    _write(conversion, folder)
    seconds = time.monotonic() - start
    err.print(f"{conversion.num_tensors} tensors, {conversion.num_bytes / 1e6:,.1f} MB in {seconds:.1f} s")
    if conversion.is_pipeline:
        family = f" model.family={preset}" if preset is not None else ""
        remedy = f'run it: longtake generate "..." --model {folder}{family}'
    else:
        remedy = (
            f"this is the transformer alone: WanTransformer3DModel.from_pretrained('{folder}'). For a folder that "
            "runs, give --vae, --text-encoder and --tokenizer too."
        )
    err.print(remedy, markup=False)
    out.print(str(folder), markup=False)


def _write(conversion: Conversion, folder: Path) -> None:
    total, start = conversion.num_bytes, time.monotonic()
    tensors, done, said = 0, 0, start
    text = "{tensors}/{all_tensors} tensors  {speed:,.0f} MB/s  {left:.0f} s left"

    def on_tensor(tensor: OutputTensor) -> None:
        nonlocal tensors, done, said
        tensors, done, now = tensors + 1, done + tensor.info.num_bytes, time.monotonic()
        seconds, is_due = max(now - start, 1e-9), now - said > SECONDS_BETWEEN_LINES
        said = now if is_due else said
        left = (total - done) * seconds / max(done, 1)
        counts = {"tensors": tensors, "all_tensors": conversion.num_tensors}
        show(done, is_due=is_due, **counts, speed=done / 1e6 / seconds, left=left)

    with progress(text, total=total) as show:
        conversion.write(folder, on_tensor=on_tensor)
