"""Steps that generate, resume and fork share: loading a model, preparing a run, running it in its folder."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from longtake.configs.families import load_family
from longtake.configs.run import ModelConfig, RunConfig
from longtake.scripts.console import err, out

if TYPE_CHECKING:
    from longtake.pipelines import LongVideoPipeline
    from longtake.pipelines.long_video import VideoRollout
    from longtake.pipelines.run_folder import RunFolder
    from longtake.pipelines.run_video import Outcome
    from longtake.pipelines.run_video import Progress as RunProgress


def check_settings(config: RunConfig) -> None:
    """Refuse cache and sampler settings that do not fit, before any weight is loaded.

    Raises:
        ValueError: With the value, the limit and the remedy.
    """
    from longtake.pipelines.settings import RolloutSettings

    family = load_family(config.model.family)
    settings = RolloutSettings(
        num_frames=family.num_latent_frames(max(1, round(config.seconds * family.fps))),
        frames_per_block=family.frames_per_block,
        first_block_frames=family.first_block_frames,
        cache=config.cache,
        sampler=config.sampler,
        attention=config.attention,
        numerics=config.model.numerics,
    )
    settings.check_length()
    settings.check_backend()

    if config.start is not None:
        from longtake.pipelines.conditioning import check_start

        check_start(config, family)


def model_folder(model: ModelConfig) -> Path:
    """Return where a model's weights are."""
    if model.path is not None:
        return Path(model.path)
    from importlib.resources import files

    return Path(str(files("longtake.models"))) / load_family(model.family).folder


def load_pipeline(model: ModelConfig) -> "LongVideoPipeline":
    """Load a model onto its device.

    Raises:
        ValueError: If the folder cannot be read, in one line.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import diffusers
    import torch
    import transformers
    from safetensors import SafetensorError

    from longtake.models import load_tiny_vae
    from longtake.pipelines import LongVideoPipeline

    tiny_vae = None if model.fast_vae is None else load_tiny_vae(Path(model.fast_vae))
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    folder, device = model_folder(model), _device(model.device)
    _check_placing(model, device)
    family = load_family(model.family)
    try:
        pipe = LongVideoPipeline.from_pretrained(
            folder, family=family if model.any_size else model.family, dtype=getattr(torch, model.dtype)
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load the model: {error}") from error
    pipe.numerics = model.numerics
    pipe.use_fast_vae(tiny_vae)
    if family.restriction is not None:
        err.print(f"licence of {model.family}: {family.licence}, {family.restriction}", style="yellow", markup=False)
    return place(pipe, model, device)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"model.device={name!r} is no device: use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"model.device={name!r}: this machine has no CUDA; use auto or cpu")
    return name


def _check_placing(model: ModelConfig, device: str) -> None:
    """Refuse offloading without a device to compute on, before any weight is loaded.

    Args:
        model: How it is to run.
        device: What ``model.device`` came to.

    Raises:
        ValueError: With the remedy.
    """
    if model.offload != "none" and device == "cpu":
        raise ValueError(
            f"model.offload={model.offload!r}: weights wait on the CPU for another device, and this run has none: use "
            "'none'"
        )


def place(pipe: "LongVideoPipeline", model: ModelConfig, device: str) -> "LongVideoPipeline":
    """Bring a pipeline to its device, whole or as its run wants it offloaded, and turn tiling on.

    Args:
        pipe: As loaded, on the CPU.
        model: How it is to run.
        device: What ``model.device`` came to.
    """
    if model.vae_tiling:
        pipe.enable_vae_tiling()
    if model.offload == "none":
        return pipe.to(device)
    (pipe.enable_model_cpu_offload if model.offload == "model" else pipe.enable_sequential_cpu_offload)(device=device)
    return pipe


def encode_and_free(pipe: "LongVideoPipeline", runs: Sequence[RunConfig]) -> None:
    """Let the text encoder go, if a run asks for it, once it has read the prompts of all; once is enough.

    Args:
        pipe: The model.
        runs: All that it is loaded for.
    """
    if pipe.text_encoder is None or not any(run.model.free_text_encoder for run in runs):
        return
    changes = [change.prompt for run in runs for change in run.prompt_changes]
    pipe.free_text_encoder([text for run in runs for text in (run.prompt, run.negative_prompt) if text] + changes)


def provenance(pipe: "LongVideoPipeline", model: ModelConfig) -> dict[str, Any]:
    """Return what ``run.json`` says of versions, machine and weights."""
    from longtake.models.wan import execution_device
    from longtake.pipelines.provenance import file_hash, machine, versions, weights_hash

    return {
        "versions": versions(),
        "machine": machine(execution_device(pipe.transformer)),
        "weights": weights_hash(model_folder(model)),
        "fast_vae": file_hash(model.fast_vae),
    }


def start_session(pipe: "LongVideoPipeline", config: RunConfig, source: "RunFolder | None" = None) -> "VideoRollout":
    """Prepare a run's video; refuses what the model does not take.

    Args:
        pipe: The model.
        config: The run.
        source: Its folder, or that of the run it is forked from, if there is one: what it goes on from is then taken
            from its saved states.

    Raises:
        ValueError: With the value, the limit and the remedy.
    """
    from longtake.pipelines.conditioning import start_arguments

    encode_and_free(pipe, [config])
    session = pipe.start(
        config.prompt,
        negative_prompt=config.negative_prompt,
        seconds=config.seconds,
        height=config.height,
        width=config.width,
        cache=dict(config.cache),
        sampler=dict(config.sampler),
        attention=dict(config.attention),
        seed=config.seed,
        **start_arguments(config, source),
    )
    for change in config.prompt_changes:
        # Now, not when its time has come: a text that is too long must not end a video in the middle.
        session.check_change(change.prompt, event=change.event)
    return session


def run_in_folder(
    folder: "RunFolder", session: "VideoRollout", *, should_stop: Callable[[], bool], allow_changes: bool = False
) -> "Outcome":
    """Make what a run lacks, with a progress bar, and say where it is and how fast it was.

    Args:
        folder: The run, opened.
        session: Started with the run's configuration.
        should_stop: From ``stop_requests``.
        allow_changes: Take blocks that are made again as they come out.

    Raises:
        ValueError: If a block comes out different, or the disk is full.
    """
    from longtake.pipelines.run_video import run_video

    try:
        with _block_progress(session, err) as show:
            outcome = run_video(folder, session, on_block=show, should_stop=should_stop, allow_changes=allow_changes)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError(
            f"the disk is full; what was saved in {folder.path} stays: free some space, then go on with: "
            f"longtake resume {folder.path}"
        ) from error
    if outcome.status == "finished":
        finish(folder)
    report(folder, outcome)
    return outcome


@contextmanager
def _block_progress(session: "VideoRollout", console: Console) -> Iterator[Callable[["RunProgress"], None]]:
    """A bar in a terminal, a line every tenth of the video elsewhere."""
    columns = (
        TextColumn("block {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("{task.fields[speed]:.1f} frames/s"),
        TextColumn("cache {task.fields[megabytes]:.1f} MB, {task.fields[tokens]} tokens"),
        TextColumn("{task.fields[left]:.0f} s left"),
    )
    num_blocks = session.num_blocks
    step = -(-num_blocks // 10)
    bar = Progress(*columns, console=console) if console.is_terminal else None
    task = bar.add_task("", total=num_blocks, speed=0.0, megabytes=0.0, tokens=0, left=0.0) if bar else None

    def show(done: "RunProgress") -> None:
        speed = done.frames_per_second
        fields = {
            "speed": speed,
            "megabytes": done.num_cache_bytes / 1e6,
            "tokens": done.num_tokens,
            "left": (session.num_frames - done.num_frames) / speed if speed else 0.0,
        }
        if bar is not None:
            bar.update(task, completed=done.num_done, **fields)
        elif done.num_done % step == 0 or done.num_done == num_blocks:
            text = "{speed:.1f} frames/s  cache {megabytes:.1f} MB, {tokens} tokens  {left:.0f} s left".format(
                **fields
            )
            console.print(f"block {done.num_done}/{num_blocks}  {text}")

    with bar or nullcontext():
        yield show


def go_on(
    path: Path, pipe: "LongVideoPipeline | None", *, should_stop: Callable[[], bool], allow_changes: bool = False
) -> str:
    """Finish a run from its newest saved state.

    Args:
        path: The run's folder.
        pipe: Its model, when it is loaded already.
        should_stop: From ``stop_requests``.
        allow_changes: Take blocks that are made again as they come out.

    Returns:
        The run's status afterwards.

    Raises:
        ValueError: If the weights are not those that the run began with.
    """
    from longtake.pipelines.run_folder import RunFolder

    with RunFolder.open(path) as folder:
        use_recorded_setup(folder)
        pipe = pipe or load_pipeline(folder.config.model)
        session = start_session(pipe, folder.config, folder)
        return run_in_folder(folder, session, should_stop=should_stop, allow_changes=allow_changes).status


def use_recorded_setup(folder: "RunFolder") -> None:
    """Compute as the run's first process did, or refuse.

    Raises:
        ValueError: If the weights, or the fast VAE's, are not those that the run began with, or it needs the file it
            goes on from and that is another one.
    """
    import torch

    from longtake.pipelines.conditioning import start_arguments
    from longtake.pipelines.provenance import file_hash, weights_hash

    start_arguments(folder.config, folder)

    weights = model_folder(folder.config.model)
    record = folder.record
    if weights_hash(weights) != record["weights"]:
        raise ValueError(f"{weights} holds other weights than {folder.path} began with: restore them")
    fast_vae = folder.config.model.fast_vae
    # Runs of earlier versions have no such entry.
    if file_hash(fast_vae) != record.get("fast_vae"):
        raise ValueError(f"{fast_vae} is another fast VAE than {folder.path} began with: restore it")
    # Another number of threads adds up in another order, and frames would differ in their last bits.
    torch.set_num_threads(record["machine"]["num_threads"])


def finish(folder: "RunFolder") -> None:
    """Make what belongs to a finished run beside its video: the contact sheet, and the file asked for by name."""
    from longtake.pipelines.video_file import write_contact_sheet

    record = folder.record
    sheet = folder.path / "contact_sheet.png"
    if folder.config.output.contact_sheet and not sheet.exists():
        write_contact_sheet(folder.video_path, sheet, fps=record["video"]["fps"])
    if record.get("deliver") and not Path(record["deliver"]).exists():
        _deliver(folder.video_path, Path(record["deliver"]))


def _deliver(video: Path, path: Path) -> None:
    """Give the video a second name; copy it where the file system has no links."""
    try:
        os.link(video, path)
    except OSError:
        shutil.copyfile(video, path)


def report(folder: "RunFolder", outcome: "Outcome") -> None:
    """Print where the run's files are and how fast it went."""
    record = folder.record
    fps = record["video"]["fps"]
    if outcome.progress is not None:
        done = outcome.progress
        speed = done.frames_per_second
        made = f"{done.num_new_frames} frames ({done.num_new_frames / fps:.1f} s of video) in {done.seconds:.1f} s"
        err.print(f"{made}: {speed:.1f} frames per second, {speed / fps:.1f}x real time")
    if outcome.status != "finished":
        err.print(f"stopped; go on with: longtake resume {folder.path}", style="yellow", markup=False)
        return
    report_files(folder)


def report_files(folder: "RunFolder") -> None:
    """Print the paths of a finished run's video and contact sheet on stdout."""
    for path in (folder.record.get("deliver") or folder.video_path, folder.path / "contact_sheet.png"):
        if Path(path).exists():
            out.print(str(path), markup=False)
