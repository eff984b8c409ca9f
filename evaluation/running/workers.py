"""Workers of an evaluation: processes of this machine, the ranks of ``torchrun``, or Ray actors.

A worker makes videos, measures them and writes their scores. It has the protocol's number of threads in its
environment, because numerical libraries read it once, when they are loaded. So the numbers are the same for any number
of workers and any launcher.
"""

import errno
import hashlib
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from functools import cached_property
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longtake.configs.families import load_family
from longtake.evaluation.metric import Segment
from longtake.evaluation.records import ManifestLine, VideoScores, write_json
from longtake.evaluation.running.plan import Unit, video_info
from longtake.evaluation.running.protocol import ATTENTION, Protocol, model_folder, split_entry
from longtake.evaluation.running.runner import Evaluation, Setup
from longtake.pipelines.video_file import VideoFormat, VideoWriter

if TYPE_CHECKING:
    from longtake.pipelines.long_video import LongVideoPipeline, VideoBlock, VideoRollout

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
# Of torchrun: a worker is a process of its own and no rank.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_POLL_SECONDS = 0.1
# Of ranks that are finished for the others: units of hours are no failure.
_LONGEST_WAIT = timedelta(days=365)


class _Watcher(typing.Protocol):
    """Display of progress: a worker has loaded everything, part of a unit is done, a unit is finished and on disk."""

    def ready(self) -> None: ...
    def steps(self, unit: Unit, steps: float) -> None: ...
    def done(self, unit: Unit) -> None: ...


def run_here(
    evaluation: Evaluation,
    watcher: _Watcher,
    *,
    is_ray: bool,
    num_workers: int | None,
    should_stop: Callable[[], bool],
) -> bool:
    """Do what is left with worker processes or Ray actors, then write the results; False where it was stopped.

    There is a worker per core, or as many as the cluster takes, when ``num_workers`` is None.
    """
    threads, is_cuda = evaluation.protocol.threads, evaluation.protocol.device == "cuda"
    with evaluation.opened():
        units = evaluation.todo()
        if units:
            if is_ray:
                pool = _ray_workers(num_workers, num_units=len(units), threads=threads, is_cuda=is_cuda)
            else:
                pool = _local_workers(range(min(num_workers or num_cores(threads), len(units))), threads=threads)
            with pool as workers:
                _do_units(evaluation, units, workers, watcher=watcher, should_stop=should_stop)
        if evaluation.todo():
            return False
        evaluation.finish()
        return True


def run_rank(evaluation: Evaluation, watcher: _Watcher, *, should_stop: Callable[[], bool]) -> bool:
    """Do the units of one rank of ``torchrun``; ranks may be on several machines that share the folder.

    The first rank locks the folder, and writes the results when all are finished. False where it was stopped.
    """
    from torch import distributed

    # The processes that wait here compute nothing, so that they need no GPU.
    distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)
    rank, slot = distributed.get_rank(), int(os.environ["LOCAL_RANK"])
    with evaluation.opened() if rank == 0 else nullcontext():
        distributed.barrier()
        units = [unit for unit in evaluation.todo() if unit.share % distributed.get_world_size() == rank]
        if units and not should_stop():
            with _local_workers([slot], threads=evaluation.protocol.threads) as workers:
                _do_units(evaluation, units, workers, watcher=watcher, should_stop=should_stop)
        if should_stop():
            return False
        distributed.barrier()
        if rank == 0:
            evaluation.finish()
        return True


def _do_units(
    evaluation: Evaluation,
    units: Sequence[Unit],
    workers: "Sequence[_LocalWorker | _RayWorker]",
    *,
    watcher: _Watcher,
    should_stop: Callable[[], bool],
) -> None:
    """Do units; whoever is free takes the next. After a failure the others finish the units they are in."""
    setup, left, failures = evaluation.setup(units), iter(units), []
    running: dict[Future[Any], tuple[_LocalWorker | _RayWorker, Unit | None]] = {}
    for worker in workers:
        running[worker.submit(_set_up, setup, worker.slot)] = worker, None
    while running:
        finished, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        for worker, unit in running.values():
            steps = worker.steps()
            if steps is not None and unit is not None:
                watcher.steps(unit, steps)
        for future in finished:
            worker, unit = running.pop(future)
            try:
                result = future.result()
                if unit is None:
                    evaluation.describe(result)
                    watcher.ready()
                else:
                    watcher.done(unit)
                following = None if failures or should_stop() else next(left, None)
                if following is not None:
                    running[worker.submit(_do_unit, following)] = worker, following
            except Exception as error:
                failures.append(_failure(error, unit))
    if failures:
        raise _joined(failures)


def _failure(error: Exception, unit: Unit | None) -> Exception:
    if not isinstance(error, BrokenExecutor):
        return error
    return ValueError(
        f"a worker died in {'the setup' if unit is None else unit.title}: finished work is kept; run the same command "
        "again, with fewer --workers if memory ran out"
    )


def _joined(failures: Sequence[Exception]) -> Exception:
    """The first failure with the last lines of all others, each once; a fault of the program before bad input."""
    first = next((failure for failure in failures if not isinstance(failure, ValueError)), failures[0])
    texts = dict.fromkeys(str(failure) for failure in failures if str(failure) != str(first))
    lines = [f"also: {text.strip().splitlines()[-1]}" for text in texts if text.strip()]
    return type(first)(";\n".join((str(first), *lines))) if lines else first


@contextmanager
def _local_workers(slots: Sequence[int], *, threads: int) -> "Iterator[list[_LocalWorker]]":
    """Workers on this machine, which end with the block: after their units, or at once if it is interrupted."""
    others = set(multiprocessing.active_children())
    workers = [_LocalWorker(slot, threads) for slot in slots]
    try:
        yield workers
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        for worker in workers:
            worker.pool.shutdown()


class _LocalWorker:
    """A pool of one process, so that one that dies for want of memory takes no other's unit with it."""

    def __init__(self, slot: int, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.slot = slot
        self._threads = threads
        self._steps, steps = context.Pipe(duplex=False)
        self.pool = ProcessPoolExecutor(1, mp_context=context, initializer=_start_process, initargs=(steps,))

    def submit(self, function: Callable[..., Any], *args: Any) -> "Future[Any]":
        """Call a function in the process, which the first call starts."""
        before = dict(os.environ)
        for name in _RANK_VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(_environment(self._threads))
        # Inherited, so that Ctrl-C in a terminal does not reach a process that is just starting.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self.pool.submit(function, *args)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.environ.clear()
            os.environ.update(before)

    def steps(self) -> float | None:
        latest = None
        while self._steps.poll():
            latest = self._steps.recv()
        return latest


@contextmanager
def _ray_workers(
    num_workers: int | None, *, num_units: int, threads: int, is_cuda: bool
) -> "Iterator[list[_RayWorker]]":
    """Actors of the cluster that runs here (``ray start --head``), else of one started for this.

    Without a number there are as many as the cluster has room for.
    """
    ray = _import_ray()
    with _cluster(ray, num_workers, threads):
        total = ray.cluster_resources()
        room = int(total.get("CPU", 0) // threads)
        room = min(room, int(total.get("GPU", 0))) if is_cuda else room
        if room < max(1, num_workers or 1):
            wanted = f"{num_workers or 1} actors of {threads} cores" + (" and a GPU" if is_cuda else "")
            raise ValueError(f"the Ray cluster has room for {room} actors, {wanted} are asked for: lower --workers")
        options = {"num_cpus": threads, "num_gpus": int(is_cuda), "runtime_env": {"env_vars": _environment(threads)}}
        workers = [_RayWorker(ray, options) for _ in range(min(num_workers or room, num_units))]
        try:
            yield workers
        finally:
            for worker in workers:
                worker.stop()


class _RayWorker:
    """An actor and the thread that waits for it; Ray's own pool hands units out in turn, also to busy actors."""

    # Ray shows an actor its own GPUs only, so the first is the right one.
    slot = 0

    def __init__(self, ray: Any, options: Mapping[str, Any]) -> None:
        self._ray = ray
        self._actor = ray.remote(**options)(_Actor).remote()
        self._thread = ThreadPoolExecutor(1)

    def submit(self, function: Callable[..., Any], *args: Any) -> "Future[Any]":
        return self._thread.submit(self._call, function, *args)

    def steps(self) -> None:
        """Nothing: actors tell of whole units only."""

    def stop(self) -> None:
        self._ray.kill(self._actor)
        self._thread.shutdown()

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return self._ray.get(self._actor.call.remote(function, *args))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self._ray.exceptions.RayActorError as error:
            raise BrokenExecutor from error


class _Actor:
    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def num_cores(threads: int = 1) -> int:
    """Processes that this machine has room for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads)


def is_rank() -> bool:
    """Tell whether ``torchrun`` started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def start_ranks(arguments: Sequence[str], *, num_ranks: int, should_stop: Callable[[], bool]) -> bool:
    """Start ``longtake evaluate run ARGUMENTS`` on this machine under ``torchrun``; False where it was stopped."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command += ["--module", "longtake.scripts.main", "evaluate", "run", *arguments]
    code = subprocess.run(command).returncode
    if code == 0 or should_stop():
        return code == 0
    raise ValueError("a rank of torchrun failed, see above: finished work is kept; run the same command again")


def _environment(threads: int) -> dict[str, str]:
    return dict.fromkeys(THREAD_VARIABLES, str(threads)) | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _import_ray() -> Any:
    # Read when it is imported: no message about usage statistics, and none are sent.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "launcher 'ray' needs the package ray (not installed): pip install 'longtake[cluster]', or use launcher "
            "'local' or 'torchrun'"
        ) from error
    return ray


@contextmanager
def _cluster(ray: Any, num_workers: int | None, threads: int) -> Iterator[None]:
    """Join the running cluster or start one on this machine; leave it or end it afterwards."""
    import logging

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "ignore_reinit_error": True}
    # Ray takes signals for itself; here they are requests to stop after a unit.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address="auto", **quiet)
    except ConnectionError:
        cores = None if num_workers is None else num_workers * threads
        ray.init(num_cpus=cores, include_dashboard=False, **quiet)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


class _Worker:
    """Networks, metrics and model that a process keeps between units."""

    def __init__(self, setup: Setup, *, device: str) -> None:
        from longtake.evaluation.backbones import classical_backbones, load_backbones
        from longtake.evaluation.metrics import make_metrics

        self.setup = setup
        self.device = device
        path = setup.protocol.backbones
        backbones = classical_backbones() if path is None else load_backbones(Path(path), device=device)
        self.files = dict(backbones.files)
        self.metrics, self.skipped = make_metrics(backbones, groups=setup.protocol.metrics)
        to_make = [unit for unit in setup.units if unit.is_generated and not unit.videos_exist(unit.finished_lines())]
        if to_make:
            self.generator.check(to_make)

    @cached_property
    def generator(self) -> "_Generator":
        return _Generator(self.setup.protocol, device=self.device)

    def describe(self) -> dict[str, Any]:
        specs = [asdict(spec) for metric in self.metrics for spec in metric.specs]
        return {"specs": specs, "skipped": dict(self.skipped), "files": self.files}

    def do(self, unit: Unit, *, on_steps: Callable[[float], None]) -> None:
        """Make what a unit lacks: its videos, if they are generated and not whole, then missing scores."""
        lines, steps = unit.finished_lines(), 0.0
        is_measured = bool(lines) and all(unit.is_measured(line) for line in lines)
        if unit.is_generated:
            if not unit.videos_exist(lines) and (self.setup.keep_videos or not is_measured):
                lines = self.generator.make(unit, on_share=lambda share: on_steps(share * len(unit.lines)))
            steps = float(len(unit.lines))
            on_steps(steps)
        for line in lines:
            if not unit.is_measured(line):
                write_json(unit.score_path(line), self._measure(unit, line).to_json())
            steps += 1
            on_steps(steps)
        if unit.is_generated and not self.setup.keep_videos:
            for line in lines:
                if not line.is_shown:
                    (unit.folder / line.file).unlink(missing_ok=True)

    def _measure(self, unit: Unit, line: ManifestLine) -> VideoScores:
        from longtake.evaluation.metrics.dimensions import of_own_prompts
        from longtake.evaluation.video import VideoSource, measure

        path = unit.folder / line.file
        source = VideoSource.open(path, fps=line.fps if path.is_dir() else None)
        if source.num_frames != line.num_frames:
            raise ValueError(
                f"{path} has {source.num_frames} frames, its manifest says {line.num_frames}: it was changed since; "
                "run the same command again"
            )
        scores = measure(source, video_info(line, source), self.metrics)
        return VideoScores(video=line, scores=of_own_prompts(scores, line.dimensions))


class _Generator:
    def __init__(self, protocol: Protocol, *, device: str) -> None:
        self.protocol = protocol
        self.pipe = _load(protocol, device)
        self._has_sparse_runs = any(ATTENTION in entry for entry in (protocol.caches or {}).values())

    def check(self, units: Sequence[Unit]) -> None:
        """Refuse, before any work, a prompt that is too long for the model, and a policy that cannot start."""
        limit = self.pipe.family.max_sequence_length
        prompts = [part for unit in units for prompt in unit.prompts for part in (prompt, *prompt.changes)]
        for text in dict.fromkeys(prompt.generated_from for prompt in prompts):
            num_tokens = len(self.pipe.tokenizer(text).input_ids)
            if num_tokens > limit:
                raise ValueError(
                    f"a prompt has {num_tokens} tokens, this model reads {limit}: shorten it, or give another list "
                    f"(it begins {text[:40]!r})"
                )
        for label, unit in {unit.label: unit for unit in reversed(units)}.items():
            try:
                self._start(replace(unit, lines=unit.lines[:1], prompts=unit.prompts[:1]))
            except ValueError as error:
                raise ValueError(f"cache {label!r}: {error}") from error

    def make(self, unit: Unit, *, on_share: Callable[[float], None]) -> tuple[ManifestLine, ...]:
        """Make a unit's videos and write down that they are whole, and what they cost; returns their complete lines.

        ``on_share`` is called with the share that is finished. An error leaves no half video under its name.
        """
        paths = [unit.folder / line.file for line in unit.lines]
        begin, begin_busy = time.perf_counter(), time.process_time()
        rollout = self._start(unit)
        size = {"height": self.pipe.family.height, "width": self.pipe.family.width}
        form = VideoFormat(**size, fps=rollout.fps, crf=self.protocol.crf, threads=self.protocol.threads)
        denoise, num_bytes, starts, num_frames, first_frame_s = [], [], [], 0, 0.0
        with ExitStack() as stack:
            writers = [stack.enter_context(_whole_video(path, form)) for path in paths]
            for block, seconds in _blocks(rollout):
                first_frame_s = first_frame_s or time.perf_counter() - begin
                starts.append(num_frames)
                num_frames += block.frames.shape[1]
                denoise.append(seconds / len(paths))
                num_bytes.append(block.num_cache_bytes / len(paths))
                for writer, video in zip(writers, block.uint8(), strict=True):
                    writer.write(video)
                on_share(num_frames / rollout.num_frames)
        # Processor time of denoising only, so that other work on the machine does not count.
        costs = {
            "ms_per_block": 1e3 * sum(denoise) / len(denoise),
            "kv_mb": num_bytes[-1] / 1e6,
            "kv_mb_peak": max(num_bytes) / 1e6,
            "first_frame_s": first_frame_s,
            "generation_cpu_s": (time.process_time() - begin_busy) / len(paths),
        }
        if self._has_sparse_runs:
            # Dense runs beside sparse ones too: their 1 is what the others are compared with.
            costs["attention_density"] = rollout.attention_density
        facts = {"num_frames": num_frames, "fps": float(form.fps), "chunk_starts": tuple(starts), **size}
        facts["encoder"] = {"codec": "h264", "crf": form.crf, "pix_fmt": "yuv420p"}
        lines = tuple(
            replace(
                line,
                segments=_real_segments(line.segments, starts, num_frames, form.fps),
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                **facts,
            )
            for line, path in zip(unit.lines, paths, strict=True)
        )
        write_json(unit.record_path, {"lines": [line.to_json() for line in lines], "costs": costs})
        return lines

    def _start(self, unit: Unit) -> "VideoRollout":
        protocol = self.protocol
        changes = zip(*(prompt.changes for prompt in unit.prompts), strict=True)
        schedule = [
            (same[0].start_s, [change.generated_from for change in same], protocol.segment_event) for same in changes
        ]
        cache, attention = split_entry((protocol.caches or {})[unit.label])
        rollout = self.pipe.start(
            [prompt.generated_from for prompt in unit.prompts],
            seconds=protocol.seconds,
            cache=dict(cache),
            attention=attention,
            sampler=None if protocol.sampler is None else dict(protocol.sampler),
            seed=[line.seed for line in unit.lines],
            schedule=schedule,
        )
        if schedule:
            rollout.rollout.settings.check_event(protocol.segment_event)
        return rollout


_worker: _Worker | None = None
_steps: "connection.Connection | None" = None


def _start_process(steps: "connection.Connection") -> None:
    """Prepare a process of a pool; ``steps`` takes the steps that are done of the current unit."""
    global _steps
    _steps = steps
    # Signals of a terminal and of torchrun are for the planning process, which lets this one finish its unit.
    os.setsid()
    # The planning process's standard output is for results, not for what libraries print.
    os.dup2(2, 1)
    planning = parent_process()
    if planning is not None:
        threading.Thread(target=_end_with, args=(planning.sentinel,), daemon=True).start()


def _set_up(setup: Setup, slot: int) -> dict[str, Any]:
    """Load networks and model in a worker, and refuse what would fail later; ``slot`` chooses the GPU."""
    global _worker
    with _plain_errors("the setup"):
        torch.set_num_threads(setup.protocol.threads)
        torch.set_num_interop_threads(1)
        torch.set_grad_enabled(False)
        device = setup.protocol.device
        if device == "cuda":
            if not torch.cuda.is_available():
                raise ValueError("device='cuda': this machine has no CUDA; use cpu")
            device = f"cuda:{slot % torch.cuda.device_count()}"
        _worker = _Worker(setup, device=device)
        return _worker.describe()


def _do_unit(unit: Unit) -> None:
    with _plain_errors(unit.title):
        if _worker is None:
            raise RuntimeError("the worker is not set up")
        _worker.do(unit, on_steps=_steps.send if _steps is not None else lambda steps: None)


@contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """Raise only errors that survive the way to another process, as those of many libraries do not."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error)) from None
    except OSError as error:
        text = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = (
                f"the disk is full ({text}); finished work is kept: free some space, then run the same command again"
            )
        raise ValueError(text) from None
    except Exception:
        raise RuntimeError(f"a worker failed in {what}:\n{traceback.format_exc()}") from None


def _end_with(sentinel: int) -> None:
    """End this process, even in the middle of a unit, when the planning one is gone."""
    connection.wait([sentinel])
    os._exit(1)


@contextmanager
def _whole_video(path: Path, form: VideoFormat) -> Iterator[VideoWriter]:
    """Write a video under a temporary name, and give it its own when it is whole."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.unlink(missing_ok=True)
    writer = VideoWriter(temporary, video_format=form)
    try:
        yield writer
        writer.close()
        temporary.replace(path)
    finally:
        writer.abandon()
        temporary.unlink(missing_ok=True)


def _blocks(rollout: "VideoRollout") -> "Iterator[tuple[VideoBlock, float]]":
    while True:
        begin = time.process_time()
        with torch.no_grad():
            block = rollout.next_block()
        if block is None:
            return
        share = block.seconds["denoise"] / sum(block.seconds.values())
        yield block, share * (time.process_time() - begin)


def _load(protocol: Protocol, device: str) -> "LongVideoPipeline":
    import diffusers
    import transformers
    from safetensors import SafetensorError

    from longtake.pipelines.long_video import LongVideoPipeline

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    family, dtype = load_family(protocol.family or protocol.model), getattr(torch, protocol.dtype)
    try:
        pipe = LongVideoPipeline.from_pretrained(model_folder(protocol.model), family=family, dtype=dtype)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load the model: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _real_segments(
    segments: Sequence[Segment], starts: Sequence[int], num_frames: int, fps: float
) -> tuple[Segment, ...]:
    """Segments from the blocks on in which their prompts took effect, the first at or after the wished time."""
    begins = []
    for segment in segments:
        frame = math.ceil(segment.start_s * fps - 1e-6)
        begins.append(next((start for start in starts if start >= frame), num_frames) / fps)
    ends = [*begins[1:], num_frames / fps]
    return tuple(
        replace(segment, start_s=begin, end_s=end)
        for segment, begin, end in zip(segments, begins, ends, strict=False)
        if end > begin
    )
