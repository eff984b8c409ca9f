"""Print how much memory a video takes, whether it fits, and what to write if it does not."""

import json
import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from longtake.configs.families import ModelFamily, load_family
from longtake.configs.fields import choose
from longtake.configs.loader import load_run
from longtake.scripts.console import err, out
from longtake.scripts.running import model_folder

if TYPE_CHECKING:
    from longtake.configs.run import RunConfig
    from longtake.pipelines.memory_plan import MemoryPlan, PlanRequest

LATENTS_PER_SECOND = 4  # of 16 pixel frames
NO_ROOM = 1.25  # times all memory: beyond this nothing but a smaller plan helps, whatever else runs


def plan_of_options(
    name: str,
    *,
    family: str | None,
    overrides: Sequence[str] = (),
    batch: int = 1,
    device: str = "auto",
    options: Mapping[str, Any],
) -> "PlanRequest":
    """Put a request together from the options of a command.

    Args:
        name: A model family or a folder.
        family: How a folder is run.
        overrides: ``key=value``, as of ``generate``.
        batch: Videos made together.
        device: auto, cpu or cuda.
        options: Top-level keys of a run; ``dtype`` is the model's.

    Raises:
        ValueError: If the model is unknown or a setting does not fit.
    """
    options = dict(options)
    dtype = options.pop("dtype")
    settings, folder = _located(name, family)
    family = family or (name if folder is None or not Path(name).is_dir() else "self_forcing")
    # A family without bundled weights is planned from its shapes: no folder is read then.
    model = {"family": family, "path": str(folder) if folder else name} | ({"dtype": dtype} if dtype else {})
    run = load_run(options=options | {"prompt": "plan", "model": model}, overrides=overrides)
    return _request_of(run, settings, folder, batch=batch, device=device)


def _request_of(
    run: "RunConfig", family: ModelFamily, folder: Path | None, *, batch: int = 1, device: str = "auto"
) -> "PlanRequest":
    """The plan request of a run's settings.

    Raises:
        ValueError: If the folder is no model, or a setting does not fit.
    """
    import torch

    from longtake.cache import make_policy
    from longtake.pipelines.memory_plan import PlanRequest, shapes_of
    from longtake.samplers import make_sampler

    if batch < 1:
        raise ValueError(f"--batch {batch}: give 1 or more")
    num_pixel_frames = max(1, round(run.seconds * family.fps))
    return PlanRequest(
        shapes=shapes_of(family, folder),
        policy=make_policy(run.cache),
        sampler=make_sampler(run.sampler),
        height=run.height or family.height,
        width=run.width or family.width,
        num_latent_frames=1 + -(-(num_pixel_frames - 1) // LATENTS_PER_SECOND),
        frames_per_block=max(family.frames_per_block, family.first_block_frames or 1),
        dtype=getattr(torch, run.model.dtype),
        device_type=_device_type(run.model.device if device == "auto" else device),
        batch_size=batch,
        num_text_tokens=family.max_sequence_length,
        text_encoder="freed" if run.model.free_text_encoder else "kept",
        offloads=run.model.offload != "none",
        tiles_vae=run.model.vae_tiling,
    )


def _located(name: str, family: str | None) -> tuple[ModelFamily, Path | None]:
    """A model's family, and its folder where it has one.

    Raises:
        ValueError: If there is neither a family nor a folder of that name.
    """
    from longtake.configs.families import family_names
    from longtake.configs.run import ModelConfig

    if name in family_names():
        settings = load_family(name)
        return settings, model_folder(ModelConfig(family=name)) if settings.folder is not None else None
    if not Path(name).is_dir():
        choose(dict.fromkeys(family_names()), name, what="model family or folder")
    return load_family(family or "self_forcing"), Path(name)


def show_plan(request: "PlanRequest", memory: int | None) -> None:
    """Print the plan, whether it fits, and the remedies.

    Args:
        request: What to plan.
        memory: Bytes of the machine that is planned for; None: this one.
    """
    from longtake.pipelines.memory_plan import machine_memory, plan_memory

    plan = plan_memory(request)
    out.print(_header(plan), markup=False, style="bold")
    out.print(_table(plan))
    if memory is None:
        total, available = machine_memory(request.device_type)
        kind = "GPU" if request.device_type == "cuda" else "memory"
        where = f"this machine's {kind} has {_said(total)}, {_said(available)} free now"
    else:
        total, where = memory, f"planned for {_said(memory)}"
    out.print(f"peak {_said(plan.peak)}; {where}", markup=False)
    if plan.peak <= total:
        out.print("it fits", style="bold green")
        return
    out.print(f"it does not fit: {_said(plan.peak - total)} too much. In order of least harm:", style="bold red")
    peak = plan.peak
    for remedy, reached in remedies(plan, total):
        verdict = "fits" if reached.peak <= total else "not yet"
        out.print(f"  {remedy.what}: saves {_said(peak - reached.peak)}, {_said(reached.peak)}, {verdict}")
        out.print(f"      {shlex.join(remedy.words)}", markup=False, style="cyan")
        peak = reached.peak
    if peak > total:
        out.print("  with all of these it still does not fit: take a smaller model or a larger machine", style="red")


def check_memory(run: "RunConfig") -> None:
    """Warn before anything is loaded if a run needs more memory than is free; refuse what no such machine holds.

    Raises:
        ValueError: If the plan exceeds all of the device's memory by a quarter.
    """
    import torch

    from longtake.pipelines.memory_plan import machine_memory, plan_memory

    folder = model_folder(run.model)
    if not folder.is_dir() or (_device_type(run.model.device) == "cuda" and not torch.cuda.is_available()):
        return  # loading says what is wrong
    request = _request_of(run, load_family(run.model.family), folder)
    total, available = machine_memory(request.device_type)
    plan = plan_memory(request)
    if plan.peak <= available:
        return
    command = shlex.join(["longtake", "info", str(run.model.path or run.model.family), "--plan"])
    if plan.peak > NO_ROOM * total:
        raise ValueError(
            f"this video takes {_said(plan.peak)} at its peak and there are {_said(total)} in all: see {command} for "
            "what to change."
        )
    err.print(
        f"this video takes {_said(plan.peak)} at its peak, {_said(available)} are free: {command} shows why, and what "
        "to change",
        style="yellow",
        markup=False,
    )


def parse_memory(text: str) -> int:
    """Read 8GB, 23.5 GiB or a number of bytes.

    Raises:
        ValueError: If it is no size.
    """
    from longtake.cache.wrappers.budget import parse_bytes

    size = parse_bytes(text)
    if not size:
        raise ValueError(f"--memory {text!r} is no size: write for example 8GB or 24GiB")
    return size


def _device_type(name: str) -> Literal["cpu", "cuda"]:
    """``cpu`` or ``cuda``, the latter also for planning where there is none.

    Raises:
        ValueError: If it is neither.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    for kind in ("cpu", "cuda"):
        if name.split(":")[0] == kind:
            return kind
    raise ValueError(f"--device {name!r} cannot be planned for: use auto, cpu or cuda")


def _said(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _header(plan: "MemoryPlan") -> str:
    r = plan.request
    seconds = r.num_latent_frames / LATENTS_PER_SECOND
    dtype = str(r.dtype).removeprefix("torch.")
    return (
        f"{r.shapes.source}: {r.width}x{r.height}, {seconds:.0f} s, batch {r.batch_size}, {dtype} on {r.device_type}, "
        f"cache {plan.policy.name}, blocks of {r.frames_per_block}, {r.num_branches} guidance branch"
        + ("es" if r.num_branches > 1 else "")
    )


def _table(plan: "MemoryPlan") -> Table:
    from longtake.pipelines.memory_plan import PROGRAM_BYTES

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
        table.add_row(name, _said(size), note)
    for phase, size in plan.phases.items():
        table.add_row(f"peak while {phase}", _said(size), "", style="bold" if size == plan.peak else None)
    return table


# What to change so that a video fits, in order of least harm: what leaves the video as it is comes first.

LEAST_SAVING = 0.01  # of the peak: less is not worth a line
SMALLEST_SIDE = 256  # pixels; below, no model here was trained


@dataclass(frozen=True)
class Remedy:
    """A change that saves memory.

    Attributes:
        what: In a few words.
        words: Of the command line.
        request: The plan's request, changed.
    """

    what: str
    words: tuple[str, ...]
    request: "PlanRequest"


def remedies(plan: "MemoryPlan", total: int) -> Iterator[tuple[Remedy, "MemoryPlan"]]:
    """Changes, each on top of those before, until the plan fits.

    What saves less than a hundredth is left out.

    Args:
        plan: What does not fit.
        total: Bytes there are.
    """
    from longtake.pipelines.memory_plan import plan_memory

    for make in (*LOSSLESS, *LOSSY):
        if plan.peak <= total:
            return
        remedy = make(plan, total)
        if remedy is None:
            continue
        try:
            with _no_warnings():
                reached = plan_memory(remedy.request)
        except ValueError:  # a budget that nothing fits
            continue
        if plan.peak - reached.peak >= LEAST_SAVING * plan.peak:
            plan = reached
            yield remedy, plan


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Silence: a budget that is only tried has nothing to warn of."""
    logger = logging.getLogger("longtake.cache.wrappers.budget")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _setting(
    plan: "MemoryPlan", total: int, *, what: str, word: str, on_gpu: bool = False, **changes: Any
) -> Remedy | None:
    """A setting that is not so yet, of a GPU alone where it does nothing on the CPU."""
    request = replace(plan.request, **changes)
    if request == plan.request or (on_gpu and request.device_type != "cuda"):
        return None
    return Remedy(what, (word,), request)


def _half_precision(plan: "MemoryPlan", total: int) -> Remedy | None:
    import torch

    return _setting(plan, total, what="bfloat16", word="model.dtype=bfloat16", dtype=torch.bfloat16)


def _archive_on_host(plan: "MemoryPlan", total: int) -> Remedy | None:
    settings = plan.request.policy.settings()
    if plan.request.device_type != "cuda" or settings.get("archive") != "device":
        return None
    return _with_cache(plan, "the archive of old blocks in host memory", settings | {"archive": "host"})


def _offload_cache(plan: "MemoryPlan", total: int) -> Remedy | None:
    settings = plan.request.policy.settings()
    if plan.request.device_type != "cuda" or settings["policy"] == "offloaded":
        return None
    return _with_cache(plan, "keys and values in host memory", {"policy": "offloaded", "inner": settings})


def _encode(plan: "MemoryPlan", total: int, *, bits: int) -> Remedy | None:
    settings = plan.request.policy.settings()
    is_far = settings["policy"] == "offloaded"
    settings = settings["inner"] if is_far else settings
    if settings["policy"] == "quantized":
        settings = settings["inner"]
    if "inner" in settings:
        return None  # a wrapper of the user's own: what is in it is theirs to say
    coded = {"policy": "quantized", "bits": bits, "inner": settings}
    return _with_cache(
        plan, f"keys and values in {bits} bits", {"policy": "offloaded", "inner": coded} if is_far else coded
    )


def _shorten(plan: "MemoryPlan", total: int) -> Remedy | None:
    """A budget of what is left for one branch's cache, which shortens the window."""
    settings, branches = plan.request.policy.settings(), plan.request.num_branches
    held = branches * (plan.cache.stored + plan.cache.read_sets)
    left = (total - plan.peak + held) // branches
    if left <= 0 or settings["policy"] == "budget":
        return None
    budget = {"policy": "budget", "max_bytes": f"{left // 10**6}MB", "min_bits": 4, "inner": settings}
    return _with_cache(plan, "a shorter window", budget)


def _shrink(plan: "MemoryPlan", total: int) -> Remedy | None:
    """The largest picture of the same shape that fits by proportion, all but weights taken to follow its area."""
    request = plan.request
    fixed = sum(plan.weights.values())
    scale = max(0.0, (total - fixed) / max(1, plan.peak - fixed)) ** 0.5 * 0.95
    height, width = (max(16, int(side * scale) // 16 * 16) for side in (request.height, request.width))
    if min(height, width) < min(SMALLEST_SIDE, request.height, request.width):
        return None
    words = f"height={height}", f"width={width}"
    return Remedy("a smaller picture", words, replace(request, height=height, width=width))


def _with_cache(plan: "MemoryPlan", what: str, settings: Mapping[str, Any]) -> Remedy:
    from longtake.cache import make_policy

    words = ("--cache", settings["policy"], *_overrides(settings, "cache"))
    return Remedy(what, words, replace(plan.request, policy=make_policy(settings)))


def _overrides(settings: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """A policy's settings as dotted overrides, where they differ from its preset."""
    from longtake.cache import make_policy
    from longtake.configs.loader import load_preset

    preset = make_policy(load_preset("cache", settings["policy"])).settings()
    for key, value in settings.items():
        if key == "inner":
            yield f"{prefix}.inner.policy={value['policy']}"
            yield from _overrides(value, f"{prefix}.inner")
        elif preset[key] != value and value is not None:
            yield f"{prefix}.{key}={value if isinstance(value, str) else json.dumps(value)}"


LOSSLESS: tuple[Callable[["MemoryPlan", int], Remedy | None], ...] = (
    partial(_setting, what="free the text encoder", word="--free-text-encoder", text_encoder="freed"),
    partial(_setting, what="only the part at work on the GPU", word="model.offload=model", on_gpu=True, offloads=True),
    _archive_on_host,
    _offload_cache,
)
LOSSY: tuple[Callable[["MemoryPlan", int], Remedy | None], ...] = (
    _half_precision,
    partial(_encode, bits=8),
    partial(_encode, bits=4),
    # On the CPU the past frames of all tiles lie in the same memory, and are more than those of the whole frame.
    partial(_setting, what="decode in tiles", word="model.vae_tiling=true", on_gpu=True, tiles_vae=True),
    _shorten,
    _shrink,
)
