"""Units done by Ray actors, on this machine or a cluster that shares the folder of results."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from longtake.evaluation.running.launchers import Setup, Watcher, WorkerProcess, drive_together
from longtake.evaluation.running.plan import Unit


class RayWorker:
    """An actor that drives one worker process.

    Args:
        setup: The worker's first order.
    """

    def __init__(self, setup: Setup) -> None:
        # Ray shows an actor its own GPUs only, so the first is the right one.
        self._worker = WorkerProcess(setup, slot=0)

    def wait_until_ready(self) -> dict[str, Any]:
        """What the worker measures."""
        return self._worker.wait_until_ready()

    def do(self, unit: Unit) -> None:
        """Have a unit done."""
        self._worker.do(unit, on_steps=lambda steps: None)

    def stop(self) -> None:
        """End the worker."""
        self._worker.stop()


def run_ray(
    units: Sequence[Unit], setup: Setup, watcher: Watcher, *, num_workers: int | None, should_stop: Callable[[], bool]
) -> None:
    """Do units in Ray actors: of the cluster that runs here (``ray start --head``), else of one started for this.

    Args:
        units: The work.
        setup: Of every worker.
        watcher: Is told how it goes.
        num_workers: Actors; as many as the cluster has room for when None.
        should_stop: Whether to begin no more units.

    Raises:
        ValueError: If Ray is missing, the cluster has no room, or a unit cannot be done.
    """
    ray = import_ray()
    gpus = 1 if setup.protocol["device"] == "cuda" else 0
    with _cluster(ray, num_workers, setup.threads):
        total = ray.cluster_resources()
        room = int(total.get("CPU", 0) // setup.threads)
        room = min(room, int(total.get("GPU", 0))) if gpus else room
        if room < max(1, num_workers or 1):
            wanted = f"{num_workers or 1} actors of {setup.threads} cores" + (" and a GPU" if gpus else "")
            raise ValueError(f"the Ray cluster has room for {room} actors, {wanted} are asked for: lower --workers")
        actor_class = ray.remote(num_cpus=setup.threads, num_gpus=gpus)(RayWorker)

        def drive(slot: int, hands: Any) -> None:
            actor = actor_class.remote(setup)
            try:
                hands.tell(watcher.ready, _get(ray, actor.wait_until_ready.remote()))
                while (unit := hands.next_unit()) is not None:
                    _get(ray, actor.do.remote(unit))
                    hands.tell(watcher.done, unit)
                _get(ray, actor.stop.remote())
            finally:
                ray.kill(actor)

        drive_together(units, drive, num_workers=min(num_workers or room, len(units)), should_stop=should_stop)


def import_ray() -> Any:
    """Ray, which is optional.

    Raises:
        ValueError: If it is not installed; says how to get it.
    """
    # Read when it is imported: no message about usage statistics, and none are sent.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
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
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if is_main else {}
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


def _get(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayActorError as error:
        raise ValueError(
            "a Ray actor is gone: finished work is kept; run the same command again, with fewer --workers if memory "
            "ran out"
        ) from error
