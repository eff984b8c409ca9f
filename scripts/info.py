"""Show a model from its files alone, without loading a weight; or plan the memory of a video."""

import json
import logging
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from safetensors import SafetensorError, safe_open
from typer import Argument, Option

from longtake.configs.families import ModelFamily, family_names, load_family
from longtake.configs.fields import choose
from longtake.configs.loader import FOLDER_FAMILY, load_preset, load_run
from longtake.scripts.console import out, print_rows, takes_options

if TYPE_CHECKING:
    from longtake.pipelines.memory_plan import MemoryPlan, PlanRequest


@dataclass(frozen=True, kw_only=True)
class _Options:
    model: Annotated[
        str | None,
        Argument(
            metavar="MODEL", help="A model family, a diffusers folder, or a checkpoint file.", show_default=False
        ),
    ] = None
    overrides: Annotated[
        list[str] | None, Argument(metavar="[KEY=VALUE ...]", help="With --plan: settings, as of generate.")
    ] = None
    named: Annotated[str | None, Option("--model", help="The same as MODEL.", show_default=False)] = None
    family: Annotated[str | None, Option(help="How a folder is run.", show_default="self_forcing")] = None
    plan: Annotated[bool, Option("--plan", help="How much memory a video takes, and whether it fits.")] = False
    cache: Annotated[str | None, Option(help="Of the plan: cache policy.")] = None
    seconds: Annotated[float | None, Option(help="Of the plan: length of the video.")] = None
    height: Annotated[int | None, Option(help="Of the plan: pixels.")] = None
    width: Annotated[int | None, Option(help="Of the plan: pixels.")] = None
    dtype: Annotated[str | None, Option(help="Of the plan: float32, bfloat16 or float16.")] = None
    batch: Annotated[int, Option(help="Of the plan: videos made together.")] = 1
    device: Annotated[str, Option(help="Of the plan: auto, cpu or cuda, which may be another machine's.")] = "auto"
    memory: Annotated[str | None, Option(help="Of the plan: another machine's memory, 8GB say.")] = None


@takes_options(_Options)
def info(given: _Options) -> None:
    """Show a model's size, shape, size of its cache, licence and source; or plan a video's memory.

    **Examples**

    `longtake info mini`

    `longtake info ./Self-Forcing --family self_forcing`

    `longtake info self_forcing_dmd.pt` says what a checkpoint file is

    `longtake info self_forcing --plan --cache deep_forcing --seconds 120 --dtype bfloat16 --device cuda --memory 24GB`
    """
    words, name = given.overrides or [], given.model
    if given.named is not None:
        words, name = [word for word in (given.model, *words) if word is not None], given.named
    if name is None:
        raise ValueError("no model is named: longtake info MODEL, a family, a folder or a checkpoint file")
    if given.plan:
        options = {key: getattr(given, key) for key in ("cache", "seconds", "height", "width", "dtype")}
        where = {"family": given.family, "batch": given.batch, "device": given.device}
        request = _plan_request(name, overrides=words, options=options, **where)
        _show_plan(request, None if given.memory is None else _parse_memory(given.memory))
    elif words:
        raise ValueError(f"{words[0]!r}: settings are for --plan")
    elif Path(name).is_file():
        from longtake.models.checkpoints.converting import describe_checkpoint

        print_rows(describe_checkpoint(Path(name)))
    else:
        print_rows(_described(*_located(name, given.family)))


def _located(name: str, family: str | None) -> tuple[str, Path | None]:
    if name in family_names():
        return name, load_family(name).bundled
    if not Path(name).is_dir():
        choose(dict.fromkeys(family_names()), name, what="model family or folder")
    return family or FOLDER_FAMILY, Path(name)


def _described(name: str, folder: Path | None) -> Iterator[tuple[str, str]]:
    family = load_family(name)
    num_trained, rule = family.num_trained_frames, family.checkpoint
    yield "family", f"{name} ({family.source})"
    yield "licence", ", ".join(part for part in (family.licence or "not stated", family.restriction) if part)
    yield "video", f"{family.width}x{family.height} at {family.fps} frames per second"
    yield "trained on", f"{num_trained} latent frames, {(1 + 4 * (num_trained - 1)) / family.fps:.1f} s"
    yield "block", f"{family.frames_per_block} latent frames, {family.frames_per_block * 4 / family.fps:.2f} s"
    yield "sampler", _listed(family.sampler)
    yield "context timestep", f"{family.context_timestep:g}"
    yield "own cache", _listed(family.cache) if family.cache else "none: full history in training"
    yield "begins from", ", ".join(("text", *family.starts))
    yield "size", family.size or "its own"
    if folder is not None:
        yield from _described_folder(folder, family)
        return
    yield "weights", f"not bundled: {family.homepage}"
    if rule.file:
        yield "file", rule.file + (f", entry {rule.key}" if rule.key else "")
    if rule.lora_file:
        yield "adapter", f"{rule.lora_file}, entry {rule.lora_key}, alpha {rule.lora_alpha:g}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _described_folder(folder: Path, family: ModelFamily) -> Iterator[tuple[str, str]]:
    if not (folder / "model_index.json").is_file() or not (folder / "transformer").is_dir():
        raise ValueError(f"{folder} is no diffusers folder: it needs model_index.json and transformer/")
    yield "folder", str(folder)
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = sorted(part.glob("*.safetensors"))
        numbers, dtypes = _weights(files)
        num_bytes = sum(path.stat().st_size for path in files)
        if numbers:
            yield part.name, f"{numbers / 1e6:,.1f} M numbers, {num_bytes / 1e6:,.1f} MB, {', '.join(sorted(dtypes))}"
    transformer, vae = _read_config(folder / "transformer"), _read_config(folder / "vae")
    try:
        heads, head_dim = transformer["num_attention_heads"], transformer["attention_head_dim"]
        layers, (_, rows, columns) = transformer["num_layers"], transformer["patch_size"]
    except KeyError as error:
        raise ValueError(f"the transformer's config.json lacks {error}: it is no Wan transformer") from error
    factor = vae.get("scale_factor_spatial", 8)
    tokens = (family.height // factor // rows) * (family.width // factor // columns)
    megabytes = 2 * layers * heads * head_dim * tokens * 4 / 1e6
    yield "transformer shape", f"{layers} layers, {heads} heads of {head_dim}, {tokens} tokens a latent frame"
    yield "cache", f"{megabytes:,.2f} MB a latent frame in float32, half in bfloat16"


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _weights(files: Iterable[Path]) -> tuple[int, set[str]]:
    numbers, dtypes = 0, set()
    for path in files:
        try:
            with safe_open(path, framework="np") as file:
                tensors = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
                numbers += sum(prod(tensor.get_shape()) for tensor in tensors)
                dtypes |= {tensor.get_dtype() for tensor in tensors}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
    return numbers, dtypes


def _plan_request(
    name: str,
    *,
    family: str | None = None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any],
    batch: int = 1,
    device: str = "auto",
) -> "PlanRequest":
    """Request of a memory plan; ``options`` are top-level keys of a run, and the ``dtype`` of the model."""
    from longtake.pipelines.memory_plan import PlanRequest, device_kind

    family, folder = _located(name, family)
    # A family without bundled weights is planned from its shapes: no folder is read then.
    model = {"family": family, "path": str(folder or name), "dtype": options.get("dtype")}
    settings = {key: value for key, value in options.items() if key != "dtype"}
    settings |= {"prompt": "plan", "model": {key: value for key, value in model.items() if value is not None}}
    run = load_run(options=settings, overrides=overrides)
    if batch < 1:
        raise ValueError(f"--batch {batch}: give 1 or more")
    kind = device_kind(run.model.device if device == "auto" else device)
    return PlanRequest.of_run(run, folder=folder, device_type=kind, batch_size=batch)


def _parse_memory(text: str) -> int:
    from longtake.cache.wrappers.budget import parse_bytes

    size = parse_bytes(text)
    if not size:
        raise ValueError(f"--memory {text!r} is no size: write for example 8GB or 24GiB")
    return size


def _show_plan(request: "PlanRequest", memory: int | None) -> None:
    from longtake.pipelines.memory_plan import format_bytes, machine_memory, plan_memory

    plan = plan_memory(request)
    out.print(_header(plan), markup=False, style="bold")
    out.print(_table(plan))
    if memory is None:
        total, available = machine_memory(request.device_type)
        kind = "GPU" if request.device_type == "cuda" else "memory"
        where = f"this machine's {kind} has {format_bytes(total)}, {format_bytes(available)} free now"
    else:
        total, where = memory, f"planned for {format_bytes(memory)}"
    out.print(f"peak {format_bytes(plan.peak)}; {where}", markup=False)
    if plan.peak <= total:
        out.print("it fits", style="bold green")
        return
    excess = format_bytes(plan.peak - total)
    out.print(f"it does not fit: {excess} too much. In order of least harm:", style="bold red")
    peak = plan.peak
    for remedy, reached in _remedies(plan, total):
        verdict = "fits" if reached.peak <= total else "not yet"
        saved, left = format_bytes(peak - reached.peak), format_bytes(reached.peak)
        out.print(f"  {remedy.what}: saves {saved}, {left}, {verdict}")
        out.print(f"      {shlex.join(remedy.words)}", markup=False, style="cyan")
        peak = reached.peak
    if peak > total:
        out.print("  with all of these it still does not fit: take a smaller model or a larger machine", style="red")


def _header(plan: "MemoryPlan") -> str:
    r = plan.request
    dtype = str(r.dtype).removeprefix("torch.")
    return (
        f"{r.shapes.source}: {r.width}x{r.height}, {r.num_latent_frames / 4:.0f} s, batch {r.batch_size}, {dtype} on "
        f"{r.device_type}, cache {plan.policy.name}, blocks of {r.frames_per_block}, {r.num_branches} guidance branch"
        + ("es" if r.num_branches > 1 else "")
    )


def _table(plan: "MemoryPlan") -> Table:
    from longtake.pipelines.memory_plan import PROGRAM_BYTES, format_bytes

    cache, branches = plan.cache, plan.request.num_branches
    times = f" x {branches} branches" if branches > 1 else ""
    steady = f"the same from block {cache.num_blocks} on" if cache.is_steady else "grows to the end"
    at_a_time = "one latent frame at a time" + (", one tile" if plan.request.tiles_vae else "")
    rows: list[tuple[str, int, str]] = [("weights: " + part, size, "") for part, size in plan.weights.items()]
    rows += [
        ("keys and values, kept", branches * cache.stored, f"{steady}{times}"),
        ("places for them", branches * (cache.allocated + cache.on_host), "taken or not, and what else is remembered"),
        ("read sets", branches * cache.read_sets, f"rotated, as passes read them{times}"),
        ("rotation phases", branches * cache.phases, ""),
        ("text keys and values", branches * plan.text, f"cross-attention{times}"),
        ("modulation", plan.modulation, "all layers, all timesteps"),
        ("forward, at its largest", plan.denoising, "for a moment"),
        ("VAE's past frames", plan.features, at_a_time),
        ("decoding, at its largest", plan.decoding, "for a moment, the block's pixels included"),
        ("encoding a text", plan.encoding, "for a moment"),
        ("program", PROGRAM_BYTES, "interpreter, libraries"),
    ]
    if plan.request.device_type == "cuda":
        rows.append(("of the places, in host memory", branches * cache.on_host, ""))
        rows.append(("host memory, peak", plan.host_peak, ""))
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    for name, size, note in rows:
        table.add_row(name, format_bytes(size), note)
    for phase, size in plan.phases.items():
        table.add_row(f"peak while {phase}", format_bytes(size), "", style="bold" if size == plan.peak else None)
    return table


_LEAST_SAVING = 0.01  # of the peak: less is not worth a line
_SMALLEST_SIDE = 256  # pixels; below, no model here was trained


@dataclass(frozen=True)
class _Remedy:
    """A change that saves memory: in a few words, in words of the command line, and the plan's request with it."""

    what: str
    words: tuple[str, ...]
    request: "PlanRequest"


def _remedies(plan: "MemoryPlan", total: int) -> Iterator[tuple[_Remedy, "MemoryPlan"]]:
    """Changes, each on top of those before, until the plan fits into ``total`` bytes; the lossless ones come first."""
    from longtake.pipelines.memory_plan import plan_memory

    for make in _REMEDIES:
        if plan.peak <= total:
            return
        remedy = make(plan, total) if make not in _ON_GPU or plan.request.device_type == "cuda" else None
        if remedy is None:
            continue
        try:
            logging.disable(logging.WARNING)  # a budget that is only tried has nothing to warn of
            reached = plan_memory(remedy.request)
        except ValueError:  # a budget that nothing fits
            continue
        finally:
            logging.disable(logging.NOTSET)
        if plan.peak - reached.peak >= _LEAST_SAVING * plan.peak:
            plan = reached
            yield remedy, plan


def _setting(plan: "MemoryPlan", total: int, *, what: str, word: str, **changes: Any) -> _Remedy | None:
    request = replace(plan.request, **changes)
    return None if request == plan.request else _Remedy(what, (word,), request)


def _half_precision(plan: "MemoryPlan", total: int) -> _Remedy | None:
    import torch

    return _setting(plan, total, what="bfloat16", word="model.dtype=bfloat16", dtype=torch.bfloat16)


def _archive_on_host(plan: "MemoryPlan", total: int) -> _Remedy | None:
    settings = plan.request.policy.settings()
    if settings.get("archive") != "device":
        return None
    return _with_cache(plan, "the archive of old blocks in host memory", settings | {"archive": "host"})


def _offload_cache(plan: "MemoryPlan", total: int) -> _Remedy | None:
    settings = plan.request.policy.settings()
    if settings["policy"] == "offloaded":
        return None
    return _with_cache(plan, "keys and values in host memory", {"policy": "offloaded", "inner": settings})


def _quantize(plan: "MemoryPlan", total: int, *, bits: int) -> _Remedy | None:
    settings = plan.request.policy.settings()
    is_far = settings["policy"] == "offloaded"
    for wrapper in ("offloaded", "quantized"):
        settings = settings["inner"] if settings["policy"] == wrapper else settings
    if "inner" in settings:
        return None  # a wrapper of the user's own: what is in it is theirs to say
    settings = {"policy": "quantized", "bits": bits, "inner": settings}
    settings = {"policy": "offloaded", "inner": settings} if is_far else settings
    return _with_cache(plan, f"keys and values in {bits} bits", settings)


def _shorten(plan: "MemoryPlan", total: int) -> _Remedy | None:
    """A budget of what is left for one branch's cache, which shortens the window."""
    settings, branches = plan.request.policy.settings(), plan.request.num_branches
    held = branches * (plan.cache.stored + plan.cache.read_sets)
    left = (total - plan.peak + held) // branches
    if left <= 0 or settings["policy"] == "budget":
        return None
    budget = {"policy": "budget", "max_bytes": f"{left // 10**6}MB", "min_bits": 4, "inner": settings}
    return _with_cache(plan, "a shorter window", budget)


def _shrink(plan: "MemoryPlan", total: int) -> _Remedy | None:
    """The largest picture of the same shape that fits by proportion, all but weights taken to follow its area."""
    request = plan.request
    fixed = sum(plan.weights.values())
    scale = max(0.0, (total - fixed) / max(1, plan.peak - fixed)) ** 0.5 * 0.95
    height, width = (max(16, int(side * scale) // 16 * 16) for side in (request.height, request.width))
    if min(height, width) < min(_SMALLEST_SIDE, request.height, request.width):
        return None
    words = f"height={height}", f"width={width}"
    return _Remedy("a smaller picture", words, replace(request, height=height, width=width))


def _with_cache(plan: "MemoryPlan", what: str, settings: Mapping[str, Any]) -> _Remedy:
    from longtake.cache import make_policy

    words = ("--cache", settings["policy"], *_overrides(settings, "cache"))
    return _Remedy(what, words, replace(plan.request, policy=make_policy(settings)))


def _overrides(settings: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """A policy's settings as dotted overrides, where they differ from its preset."""
    from longtake.cache import make_policy

    preset = make_policy(load_preset("cache", settings["policy"])).settings()
    for key, value in settings.items():
        if key == "inner":
            yield f"{prefix}.inner.policy={value['policy']}"
            yield from _overrides(value, f"{prefix}.inner")
        elif preset[key] != value and value is not None:
            yield f"{prefix}.{key}={value if isinstance(value, str) else json.dumps(value)}"


_OFFLOAD = partial(_setting, what="only the part at work on the GPU", word="model.offload=model", offloads=True)
_TILES = partial(_setting, what="decode in tiles", word="model.vae_tiling=true", tiles_vae=True)
# In order of least harm; the first four leave the video as it is.
_REMEDIES: tuple[Callable[["MemoryPlan", int], _Remedy | None], ...] = (
    partial(_setting, what="free the text encoder", word="--free-text-encoder", text_encoder="freed"),
    _OFFLOAD,
    _archive_on_host,
    _offload_cache,
    _half_precision,
    partial(_quantize, bits=8),
    partial(_quantize, bits=4),
    _TILES,
    _shorten,
    _shrink,
)
# Tiles too: on the CPU the past frames of all of them lie in the same memory, and are more than those of whole frames.
_ON_GPU = (_OFFLOAD, _archive_on_host, _offload_cache, _TILES)
