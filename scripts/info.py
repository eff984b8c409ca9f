"""Say what a model is, from its files alone: no weight is loaded."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from longtake.configs.families import CheckpointRule, ModelFamily, family_names, load_family
from longtake.configs.fields import did_you_mean
from longtake.configs.run import ModelConfig
from longtake.scripts.console import out
from longtake.scripts.running import model_folder


def print_file(path: Path) -> None:
    """Print what a checkpoint file is, without loading weights.

    Args:
        path: The file.

    Raises:
        ValueError: If it is no checkpoint; says what it is instead.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from longtake.models.checkpoints.converting import describe_checkpoint

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for what, text in describe_checkpoint(path):
        table.add_row(what, escape(text))
    out.print(table)


DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
MAX_HEADER_BYTES = 100_000_000


def info(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A model family, a diffusers folder, or a checkpoint file.", show_default=False
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="With --plan: settings, as of generate.")
    ] = None,
    *,
    named: Annotated[str | None, typer.Option("--model", help="The same as MODEL.", show_default=False)] = None,
    family: Annotated[str | None, typer.Option(help="How a folder is run.", show_default="self_forcing")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="How much memory a video takes, and whether it fits.")] = False,
    cache: Annotated[str | None, typer.Option(help="Of the plan: cache policy.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Of the plan: length of the video.")] = None,
    height: Annotated[int | None, typer.Option(help="Of the plan: pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Of the plan: pixels.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the plan: float32, bfloat16 or float16.")] = None,
    batch: Annotated[int, typer.Option(help="Of the plan: videos made together.")] = 1,
    device: Annotated[
        str, typer.Option(help="Of the plan: auto, cpu or cuda, which may be another machine's.")
    ] = "auto",
    memory: Annotated[str | None, typer.Option(help="Of the plan: another machine's memory, 8GB say.")] = None,
) -> None:
    """Show a model's size, shape, size of its cache, licence and source; or plan a video's memory.

    **Examples**

    `longtake info mini`

    `longtake info ./Self-Forcing --family self_forcing`

    `longtake info self_forcing_dmd.pt` says what a checkpoint file is

    `longtake info self_forcing --plan --cache deep_forcing --seconds 120 --dtype bfloat16 --device cuda --memory 24GB`
    """
    if named is not None:
        # What stands before the settings is a setting too, where the model has a name of its own.
        overrides = [*([model] if model is not None else []), *(overrides or [])]
        model = named
    if model is None:
        raise ValueError("no model is named: longtake info MODEL, a family, a folder or a checkpoint file")
    if plan:
        from longtake.scripts.memory_plan import parse_memory, plan_of_options, show_plan

        options = {"cache": cache, "seconds": seconds, "height": height, "width": width, "dtype": dtype}
        request = plan_of_options(
            model, family=family, overrides=overrides or (), batch=batch, device=device, options=options
        )
        show_plan(request, None if memory is None else parse_memory(memory))
        return
    if overrides:
        raise ValueError(f"{overrides[0]!r}: settings are for --plan")
    if Path(model).is_file():
        print_file(Path(model))
        return
    if model in family_names():
        settings, name = load_family(model), model
        folder = model_folder(ModelConfig(family=model)) if settings.folder is not None else None
    else:
        folder, name = Path(model), family or "self_forcing"
        settings = load_family(name)
        if not folder.is_dir():
            known = family_names()
            raise ValueError(
                f"no model family or folder {model!r}; families: {', '.join(known)}.{did_you_mean(model, known)}"
            )
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in describe(name, settings, folder):
        table.add_row(key, value)
    out.print(table)


def describe(name: str, family: ModelFamily, folder: Path | None) -> list[tuple[str, str]]:
    """Collect what is known of a model.

    Args:
        name: Of the family.
        family: How it is run.
        folder: Its weights, where they are.

    Returns:
        (what, text) rows.

    Raises:
        ValueError: If the folder is no diffusers Wan folder.
    """
    rows = [
        ("family", f"{name} ({family.source})"),
        ("licence", ", ".join(part for part in (family.licence or "not stated", family.restriction) if part)),
        ("video", f"{family.width}x{family.height} at {family.fps} frames per second"),
        ("trained on", f"{family.num_trained_frames} latent frames, {_trained_seconds(family):.1f} s"),
        ("block", f"{family.frames_per_block} latent frames, {family.frames_per_block * 4 / family.fps:.2f} s"),
        ("sampler", _settings(family.sampler)),
        ("context timestep", f"{family.context_timestep:g}"),
        (
            "own cache",
            _settings(family.cache) if family.cache else "none: full history in training",
        ),
        ("begins from", ", ".join(("text", *family.starts))),
        ("size", family.size or "its own"),
    ]
    if folder is None:
        return [*rows, ("weights", f"not bundled: {family.homepage}"), *_released(family.checkpoint)]
    parts = {part.name: part for part in sorted(folder.iterdir()) if part.is_dir()} if folder.is_dir() else {}
    if "transformer" not in parts or not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is no diffusers folder: it needs model_index.json and transformer/")
    rows.append(("folder", str(folder)))
    for part, path in parts.items():
        numbers, num_bytes, dtypes = _weights(path)
        if numbers:
            rows.append((part, f"{numbers / 1e6:,.1f} M numbers, {num_bytes / 1e6:,.1f} MB, {', '.join(dtypes)}"))
    return rows + _cache_rows(_read_config(folder / "transformer"), _read_config(folder / "vae"), family)


def _cache_rows(transformer: dict[str, Any], vae: dict[str, Any], family: ModelFamily) -> list[tuple[str, str]]:
    try:
        heads, head_dim = transformer["num_attention_heads"], transformer["attention_head_dim"]
        layers, patch = transformer["num_layers"], transformer["patch_size"]
    except KeyError as error:
        raise ValueError(f"the transformer's config.json lacks {error}: it is no Wan transformer") from error
    factor = vae.get("scale_factor_spatial", 8)
    tokens = (family.height // factor // patch[1]) * (family.width // factor // patch[2])
    frame_bytes = 2 * layers * heads * head_dim * tokens * 4
    return [
        ("transformer shape", f"{layers} layers, {heads} heads of {head_dim}, {tokens} tokens a latent frame"),
        ("cache", f"{frame_bytes / 1e6:,.2f} MB a latent frame in float32, half in bfloat16"),
    ]


def _released(rule: CheckpointRule) -> list[tuple[str, str]]:
    """Which files of the homepage are meant, and what in them."""
    rows = [("file", rule.file + (f", entry {rule.key}" if rule.key else ""))] if rule.file else []
    if rule.lora_file:
        rows.append(("adapter", f"{rule.lora_file}, entry {rule.lora_key}, alpha {rule.lora_alpha:g}"))
    return rows


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _trained_seconds(family: ModelFamily) -> float:
    return (1 + 4 * (family.num_trained_frames - 1)) / family.fps


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _weights(folder: Path) -> tuple[int, int, list[str]]:
    """Count the numbers of a component from the headers of its safetensors files."""
    numbers, num_bytes, dtypes = 0, 0, set()
    for path in sorted(folder.glob("*.safetensors")):
        for key, entry in _header(path).items():
            if key == "__metadata__":
                continue
            count = 1
            for size in entry["shape"]:
                count *= size
            numbers += count
            num_bytes += count * DTYPE_BYTES.get(entry["dtype"], 1)
            dtypes.add(entry["dtype"])
    return numbers, num_bytes, sorted(dtypes)


def _header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: eight bytes of length, then the text."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError("it has no safetensors header")
            return json.loads(file.read(length))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
