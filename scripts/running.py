"""Steps that generate, resume and fork share: loading a model, preparing a run, running it in its folder."""

import errno
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError

from longtake.configs.families import load_family
from longtake.configs.run import ModelConfig, RunConfig
from longtake.models import load_tiny_vae
from longtake.models.wan import execution_device
from longtake.pipelines.checkpoint import link_or_copy
from longtake.pipelines.long_video import LongVideoPipeline, VideoRollout
from longtake.pipelines.memory_plan import PlanRequest, device_kind, format_bytes, machine_memory, plan_memory
from longtake.pipelines.run_folder import FINISHED, RunFolder, environment, file_hash, weights_hash
from longtake.pipelines.run_video import Progress, run_video, start_arguments, start_record
from longtake.pipelines.settings import RolloutSettings
from longtake.pipelines.video_file import write_contact_sheet
from longtake.scripts.console import err, out, progress

_NO_ROOM = 1.25  # times all memory: beyond this nothing but a smaller plan helps, whatever else runs


def check_settings(config: RunConfig) -> None:
    """Refuse settings that do not fit each other, the model family or this machine, before any weight is loaded."""
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
    start_record(config, family)
    _check_memory(config)


def _check_memory(run: RunConfig) -> None:
    """Warn if a run needs more memory than is free; refuse what no such machine holds."""
    folder, kind = _model_folder(run.model), device_kind(run.model.device)
    if not folder.is_dir() or (kind == "cuda" and not torch.cuda.is_available()):
        return  # loading says what is wrong
    plan = plan_memory(PlanRequest.of_run(run, folder=folder, device_type=kind))
    total, available = machine_memory(kind)
    if plan.peak <= available:
        return
    command = shlex.join(["longtake", "info", str(run.model.path or run.model.family), "--plan"])
    needed = f"this video takes {format_bytes(plan.peak)} at its peak"
    if plan.peak > _NO_ROOM * total:
        raise ValueError(f"{needed} and there are {format_bytes(total)} in all: see {command} for what to change.")
    needed += f", {format_bytes(available)} are free: {command} shows why, and what to change"
    err.print(needed, style="yellow", markup=False)


def _model_folder(model: ModelConfig) -> Path:
    bundled = load_family(model.family).bundled
    return Path(model.path or bundled or "")


def load_pipeline(model: ModelConfig) -> LongVideoPipeline:
    """Load a model onto its device, whole or as its run wants it offloaded."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    tiny_vae = None if model.fast_vae is None else load_tiny_vae(Path(model.fast_vae))
    device = _device(model)
    family = load_family(model.family)
    try:
        pipe = LongVideoPipeline.from_pretrained(
            _model_folder(model),
            family=family if model.any_size else model.family,
            numerics=model.numerics,
            dtype=getattr(torch, model.dtype),
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load the model: {error}") from error
    pipe.use_fast_vae(tiny_vae)
    if family.restriction is not None:
        err.print(f"licence of {model.family}: {family.licence}, {family.restriction}", style="yellow", markup=False)
    if model.vae_tiling:
        pipe.enable_vae_tiling()
    if model.offload == "none":
        return pipe.to(device)
    (pipe.enable_model_cpu_offload if model.offload == "model" else pipe.enable_sequential_cpu_offload)(device=device)
    return pipe


def _device(model: ModelConfig) -> str:
    name, has_cuda = model.device, torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ValueError(f"model.device={name!r} is no device: use auto, cpu or cuda") from error
    if kind == "cuda" and not has_cuda:
        raise ValueError(f"model.device={name!r}: this machine has no CUDA; use auto or cpu")
    if model.offload != "none" and name == "cpu":
        raise ValueError(
            f"model.offload={model.offload!r}: weights wait on the CPU for another device, and this run has none: use "
            "'none'"
        )
    return name


def encode_and_free(pipe: LongVideoPipeline, runs: Sequence[RunConfig]) -> None:
    """Free the text encoder, if one of the runs asks for it, once it has encoded the prompts of all."""
    if pipe.text_encoder is None or not any(run.model.free_text_encoder for run in runs):
        return
    changes = [change.prompt for run in runs for change in run.prompt_changes]
    pipe.free_text_encoder([text for run in runs for text in (run.prompt, run.negative_prompt) if text] + changes)


def provenance(pipe: LongVideoPipeline, model: ModelConfig) -> dict[str, Any]:
    """Versions, machine and weights, for ``run.json``."""
    return {
        **environment(execution_device(pipe.transformer)),
        "weights": weights_hash(_model_folder(model)),
        "fast_vae": file_hash(model.fast_vae),
    }


def start_rollout(pipe: LongVideoPipeline, config: RunConfig, source: RunFolder | None = None) -> VideoRollout:
    """Prepare a run's video; ``source`` is its folder, or that of the run it is forked from, if there is one."""
    encode_and_free(pipe, [config])
    rollout = pipe.start(
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
        rollout.check_change(change.prompt, event=change.event)
    return rollout


def run_in_folder(
    folder: RunFolder, rollout: VideoRollout, *, should_stop: Callable[[], bool], allow_changes: bool = False
) -> str:
    """Make what a run lacks, with a progress bar; print where it is and how fast it was; return its status."""
    num_blocks = rollout.num_blocks
    step = -(-num_blocks // 10)
    text = "block {done}/{blocks}  {speed:.1f} frames/s  cache {megabytes:.1f} MB, {tokens} tokens  {left:.0f} s left"

    def on_block(state: Progress) -> None:
        done, speed = state.num_done, state.frames_per_second
        left = (rollout.num_frames - state.num_frames) / speed if speed else 0.0
        numbers = {"done": done, "speed": speed, "megabytes": state.num_cache_bytes / 1e6, "tokens": state.num_tokens}
        show(done, is_due=done % step == 0 or done == num_blocks, blocks=num_blocks, left=left, **numbers)

    try:
        with progress(text, total=num_blocks) as show:
            end = run_video(folder, rollout, on_block=on_block, should_stop=should_stop, allow_changes=allow_changes)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError(
            f"the disk is full; what was saved in {folder.path} stays: free some space, then go on with: "
            f"longtake resume {folder.path}"
        ) from error
    _report(folder, end)
    return end.status


def resume_run(
    path: Path, pipe: LongVideoPipeline | None, *, should_stop: Callable[[], bool], allow_changes: bool = False
) -> str:
    """Finish a run from its latest checkpoint, with its model if that is loaded already; return the run's status.

    A finished run gets its contact sheet and named file, where these are missing.
    """
    finished = RunFolder(path)
    finished.check()
    if finished.status == FINISHED:
        err.print(f"{path} is finished already", markup=False)
        _deliver_files(finished)
        return FINISHED
    with RunFolder.open(path) as folder:
        use_recorded_setup(folder)
        rollout = start_rollout(pipe or load_pipeline(folder.config.model), folder.config, folder)
        return run_in_folder(folder, rollout, should_stop=should_stop, allow_changes=allow_changes)


def use_recorded_setup(folder: RunFolder) -> None:
    """Compute as the run's first process did, or refuse."""
    start_arguments(folder.config, folder)
    model, record = folder.config.model, folder.record
    weights = _model_folder(model)
    if weights_hash(weights) != record["weights"]:
        raise ValueError(f"{weights} holds other weights than {folder.path} began with: restore them")
    # Runs of earlier versions have no such entry.
    if file_hash(model.fast_vae) != record.get("fast_vae"):
        raise ValueError(f"{model.fast_vae} is another fast VAE than {folder.path} began with: restore it")
    # Another number of threads adds up in another order, and frames would differ in their last bits.
    torch.set_num_threads(record["machine"]["num_threads"])


def _deliver_files(folder: RunFolder) -> None:
    """Make a finished run's contact sheet and the file asked for by name, and print the paths of its files."""
    record = folder.record
    sheet, named = folder.path / "contact_sheet.png", record.get("deliver")
    if folder.config.output.contact_sheet and not sheet.exists():
        write_contact_sheet(folder.video_path, sheet, fps=record["video"]["fps"])
    if named and not Path(named).exists():
        link_or_copy(folder.video_path, Path(named))
    for path in (named or folder.video_path, sheet):
        if Path(path).exists():
            out.print(str(path), markup=False)


def _report(folder: RunFolder, done: Progress) -> None:
    fps = folder.record["video"]["fps"]
    if done.num_new_frames:
        speed = done.frames_per_second
        made = f"{done.num_new_frames} frames ({done.num_new_frames / fps:.1f} s of video) in {done.seconds:.1f} s"
        err.print(f"{made}: {speed:.1f} frames per second, {speed / fps:.1f}x real time")
    if done.status == FINISHED:
        _deliver_files(folder)
    else:
        err.print(f"stopped; go on with: longtake resume {folder.path}", style="yellow", markup=False)
