"""Print how much memory a video takes, whether it fits, and what to write if it does not."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from longtake.configs.families import ModelFamily, load_family
from longtake.configs.fields import choose
from longtake.configs.loader import load_run
from longtake.scripts.console import err, out
from longtake.scripts.running import model_folder

if TYPE_CHECKING:
    from longtake.configs.run import RunConfig
    from longtake.pipelines.memory_plan import MemoryPlan, PlanRequest

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
LATENTS_PER_SECOND = 4  # of 16 pixel frames
NO_ROOM = 1.25  # times all memory: beyond this nothing but a smaller plan helps, whatever else runs
SURELY_FITS = 0.5  # of what is available, going by a bound: then nothing is worked out


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
    settings, folder = located(name, family)
    family = family or (name if folder is None or not Path(name).is_dir() else "self_forcing")
    # A family without bundled weights is planned from its shapes: no folder is read then.
    model = {"family": family, "path": str(folder) if folder else name} | ({"dtype": dtype} if dtype else {})
    run = load_run(options=options | {"prompt": "plan", "model": model}, overrides=overrides)
    return request_of(run, settings, folder, batch=batch, device=device)


def request_of(
    run: "RunConfig", family: ModelFamily, folder: Path | None, *, batch: int = 1, device: str = "auto"
) -> "PlanRequest":
    """What a run's settings ask to be planned.

    Raises:
        ValueError: If the folder is no model, or a setting does not fit.
    """
    import torch

    from longtake.cache import make_policy
    from longtake.pipelines.memory_plan import PlanRequest
    from longtake.pipelines.model_shapes import shapes_of
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
        device_type=device_type(run.model.device if device == "auto" else device),
        batch_size=batch,
        num_text_tokens=family.max_sequence_length,
        text_encoder="freed" if run.model.free_text_encoder else "kept",
        offloads=run.model.offload != "none",
        tiles_vae=run.model.vae_tiling,
    )


def located(name: str, family: str | None) -> tuple[ModelFamily, Path | None]:
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
    from longtake.scripts.memory_remedies import remedies

    plan = plan_memory(request)
    out.print(_header(plan), markup=False, style="bold")
    out.print(_table(plan))
    if memory is None:
        total, available = machine_memory(request.device_type)
        kind = "GPU" if request.device_type == "cuda" else "memory"
        where = f"this machine's {kind} has {said(total)}, {said(available)} free now"
    else:
        total, where = memory, f"planned for {said(memory)}"
    out.print(f"peak {said(plan.peak)}; {where}", markup=False)
    if plan.peak <= total:
        out.print("it fits", style="bold green")
        return
    out.print(f"it does not fit: {said(plan.peak - total)} too much. In order of least harm:", style="bold red")
    peak = plan.peak
    for remedy, reached in remedies(plan, total):
        verdict = "fits" if reached.peak <= total else "not yet"
        out.print(f"  {remedy.what}: saves {said(peak - reached.peak)}, {said(reached.peak)}, {verdict}")
        out.print(f"      {remedy.write}", markup=False, style="cyan")
        peak = reached.peak
    if peak > total:
        out.print("  with all of these it still does not fit: take a smaller model or a larger machine", style="red")


def check_memory(run: "RunConfig") -> None:
    """Warn before anything is loaded if a run needs more memory than is free; refuse what no such machine holds.

    Runs that take half of what is free at most, going by a bound, are not worked out.

    Raises:
        ValueError: If the plan exceeds all of the device's memory by a quarter.
    """
    import torch

    from longtake.pipelines.memory_plan import machine_memory, plan_memory

    folder = model_folder(run.model)
    if not folder.is_dir() or (device_type(run.model.device) == "cuda" and not torch.cuda.is_available()):
        return  # loading says what is wrong
    request = request_of(run, load_family(run.model.family), folder)
    total, available = machine_memory(request.device_type)
    if _bound(request) <= SURELY_FITS * available:
        return
    plan = plan_memory(request)
    if plan.peak <= available:
        return
    command = f"longtake info {run.model.path or run.model.family} --plan"
    if plan.peak > NO_ROOM * total:
        raise ValueError(
            f"this video takes {said(plan.peak)} at its peak and there are {said(total)} in all: see {command} for "
            "what to change."
        )
    err.print(
        f"this video takes {said(plan.peak)} at its peak, {said(available)} are free: {command} shows why, and what "
        "to change",
        style="yellow",
        markup=False,
    )


def parse_memory(text: str) -> int:
    """Read 8GB, 23.5 GiB or a number of bytes.

    Raises:
        ValueError: If it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = UNITS.get(match[2].upper()) if match else None
    if unit is None or float(match[1]) <= 0:
        raise ValueError(f"--memory {text!r} is no size: write for example 8GB or 24GiB")
    return int(float(match[1]) * unit)


def device_type(name: str) -> str:
    """``cpu`` or ``cuda``, the latter also for planning where there is none.

    Raises:
        ValueError: If it is neither.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device {name!r} cannot be planned for: use auto, cpu or cuda")
    return kind


def said(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _bound(request: "PlanRequest") -> int:
    """More than a run can take, without playing anything: weights, four times all frames' keys and values, pixels."""
    from longtake.pipelines.memory_plan import PROGRAM_BYTES

    geometry = request.geometry()
    token = 2 * geometry.num_layers * geometry.num_heads * geometry.head_dim * request.dtype.itemsize
    cache = 4 * request.num_branches * token * geometry.tokens_per_frame * geometry.max_frames
    base = request.shapes.configs["vae"].get("base_dim", 96)
    pixels = request.height * request.width * base * request.dtype.itemsize
    weights = sum(request.shapes.weight_bytes(request.dtype).values())
    return PROGRAM_BYTES + request.batch_size * (cache + 64 * pixels) + 2 * weights


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

    cache, branches = plan.cache_bytes, plan.request.num_branches
    times = f" x {branches} branches" if branches > 1 else ""
    steady = f"the same from block {plan.cache.num_blocks} on" if plan.cache.is_steady else "grows to the end"
    at_a_time = "one latent frame at a time" + (", one tile" if plan.request.tiles_vae else "")
    rows: list[tuple[str, int, str]] = [("weights: " + part, size, "") for part, size in plan.weights.items()]
    rows += [
        ("keys and values, kept", branches * cache.stored, f"{steady}{times}"),
        ("places for them", branches * (cache.allocated + cache.on_host), "taken or not, and what else is remembered"),
        ("read sets", branches * cache.read_sets, f"rotated, as passes read them{times}"),
        ("rotation phases", branches * cache.phases, ""),
        ("text keys and values", branches * plan.forward.text, f"cross-attention{times}"),
        ("modulation", plan.modulation, "all layers, all timesteps"),
        ("forward, at its largest", plan.denoising_activations, "for a moment"),
        ("VAE's past frames", plan.decode.features, at_a_time),
        ("decoding, at its largest", plan.decode.activations, "for a moment, the block's pixels included"),
        ("encoding a text", plan.text_activations, "for a moment"),
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
        table.add_row(name, said(size), note)
    for phase, size in plan.phases.items():
        table.add_row(f"peak while {phase}", said(size), "", style="bold" if size == plan.peak else None)
    return table
