"""Workers of an evaluation: processes of this machine, the ranks of ``torchrun``, or Ray actors.

Every worker has the protocol's number of threads in its environment, because numerical libraries read it once, when
they are loaded. So the numbers are the same for any number of workers and any launcher.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Protocol

from longtake.evaluation.running.plan import Unit
from longtake.evaluation.running.runner import Evaluation
from longtake.evaluation.running.worker import do_unit, set_up, start_process

# Of torchrun: a worker is a process of its own and no rank.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_POLL_SECONDS = 0.1
# Of ranks that are finished for the others: units of hours are no failure.
_LONGEST_WAIT = timedelta(days=365)


class Watcher(Protocol):
    """Display of an evaluation's progress."""

    def ready(self) -> None:
        """Note that a worker has loaded everything."""

    def steps(self, unit: Unit, steps: float) -> None:
        """Note how many steps of a unit are done."""

    def done(self, unit: Unit) -> None:
        """Note that a unit is finished and on disk."""


def run_here(
    evaluation: Evaluation,
    watcher: Watcher,
    *,
    is_ray: bool,
    num_workers: int | None,
    should_stop: Callable[[], bool],
) -> bool:
    """Do what is left with worker processes or Ray actors, then write the results.

    Args:
        evaluation: What to do.
        watcher: Is told how it goes.
        is_ray: Whether Ray actors do it.
        num_workers: Processes; one per core, or as many as the cluster takes, when None.
        should_stop: Whether to begin no more units.

    Returns:
        Whether everything is finished.

    Raises:
        ValueError: If something does not fit or cannot be read; finished work is kept.
    """
    threads, is_cuda = evaluation.protocol.threads, evaluation.protocol.device == "cuda"
    with evaluation.opened():
        units = evaluation.todo()
        if units:
            if is_ray:
                pool = _ray_workers(num_workers, num_units=len(units), threads=threads, is_cuda=is_cuda)
            else:
                pool = local_workers(range(min(num_workers or num_cores(threads), len(units))), threads=threads)
            with pool as workers:
                do_units(evaluation, units, workers, watcher=watcher, should_stop=should_stop)
        if evaluation.todo():
            return False
        evaluation.finish()
        return True


def run_rank(evaluation: Evaluation, watcher: Watcher, *, should_stop: Callable[[], bool]) -> bool:
    """Do the units of one rank of ``torchrun``; ranks may be on several machines that share the folder.

    The first rank locks the folder, and writes the results when all are finished.

    Args:
        evaluation: What to do, the same on every rank.
        watcher: Is told how this rank's work goes.
        should_stop: Whether to begin no more units.

    Returns:
        Whether everything is finished.

    Raises:
        ValueError: If something does not fit or cannot be read; ``torchrun`` then ends the other ranks.
    """
    from torch import distributed

    # The processes that wait here compute nothing, so that they need no GPU.
    distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)
    rank, slot = distributed.get_rank(), int(os.environ["LOCAL_RANK"])
    with evaluation.opened() if rank == 0 else nullcontext():
        distributed.barrier()
        units = [unit for unit in evaluation.todo() if unit.share % distributed.get_world_size() == rank]
        if units and not should_stop():
            with local_workers([slot], threads=evaluation.protocol.threads) as workers:
                do_units(evaluation, units, workers, watcher=watcher, should_stop=should_stop)
        if should_stop():
            return False
        distributed.barrier()
        if rank == 0:
            evaluation.finish()
        return True


def do_units(
    evaluation: Evaluation,
    units: Sequence[Unit],
    workers: "Sequence[_LocalWorker | _RayWorker]",
    *,
    watcher: Watcher,
    should_stop: Callable[[], bool],
) -> None:
    """Do units; whoever is free takes the next.

    Raises:
        ValueError: The first failure, after the other workers have finished the units they are in.
    """
    setup, left, failures = evaluation.setup(units), iter(units), []
    running: dict[Future[Any], tuple[_LocalWorker | _RayWorker, Unit | None]] = {}
    for worker in workers:
        running[worker.submit(set_up, setup, worker.slot)] = worker, None
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
                    running[worker.submit(do_unit, following)] = worker, following
            except Exception as error:
                failures.append(_failure(error, unit))
    if failures:
        raise failures[0]


@contextmanager
def local_workers(slots: Sequence[int], *, threads: int) -> "Iterator[list[_LocalWorker]]":
    """Workers on this machine, which end with the block: after their units, or at once if it is interrupted.

    Args:
        slots: Number of each among the workers of this machine.
        threads: Of each.
    """
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
        self.pool = ProcessPoolExecutor(1, mp_context=context, initializer=start_process, initargs=(steps,))

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
        """Latest news of the unit in work, if there is any."""
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
        """Call a function in the actor."""
        return self._thread.submit(self._call, function, *args)

    def steps(self) -> None:
        """Nothing: actors tell of whole units only."""

    def stop(self) -> None:
        """End the actor at once; what it has written whole stays."""
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
    """Start this program again under ``torchrun`` and wait for it.

    Args:
        arguments: Of ``longtake evaluate run``.
        num_ranks: Processes, all on this machine.
        should_stop: Whether the user has asked to stop.

    Returns:
        Whether everything is finished.

    Raises:
        ValueError: If a rank fails; it has said why on the standard error stream.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command += ["--module", "longtake.scripts.main", "evaluate", "run", *arguments]
    with subprocess.Popen(command) as process:
        try:
            code = process.wait()
        except BaseException:
            process.kill()
            raise
    if code == 0 or should_stop():
        return code == 0
    raise ValueError("a rank of torchrun failed, see above: finished work is kept; run the same command again")


def _environment(threads: int) -> dict[str, str]:
    return dict.fromkeys(THREAD_VARIABLES, str(threads)) | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _failure(error: Exception, unit: Unit | None) -> Exception:
    if not isinstance(error, BrokenExecutor):
        return error
    return ValueError(
        f"a worker died in {'the setup' if unit is None else unit.title}: finished work is kept; run the same command "
        "again, with fewer --workers if memory ran out"
    )


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
