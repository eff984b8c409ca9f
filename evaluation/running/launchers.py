"""Who does the units: worker processes on this machine, the ranks of ``torchrun``, or Ray actors.

Each of them drives worker processes of the same kind, so none of them has a say in the numbers.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from longtake.evaluation.running.plan import Unit

# Of torchrun: a worker is a process of its own and no rank.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every worker is told before its first unit.

    Attributes:
        protocol: Resolved, as plain values.
        keep_videos: Whether generated videos stay when they are measured; those that the report shows always do.
        checked: One unit of each policy, to be checked before any work.
        threads: Of each worker.
    """

    protocol: Mapping[str, Any]
    keep_videos: bool
    checked: Sequence[Unit]
    threads: int

    def to_json(self, slot: int) -> dict[str, Any]:
        """The first order of a worker; ``slot`` chooses its GPU."""
        units = [unit.to_json() for unit in self.checked]
        return {"protocol": dict(self.protocol), "keep_videos": self.keep_videos, "units": units, "slot": slot}


class Watcher(Protocol):
    """Is told how the work goes on; may be called from several threads, one at a time."""

    def ready(self, description: Mapping[str, Any]) -> None:
        """A worker has loaded everything; says what it measures."""

    def steps(self, unit: Unit, steps: float) -> None:
        """So many steps of a unit are done."""

    def done(self, unit: Unit) -> None:
        """A unit is finished and on disk."""


class WorkerProcess:
    """One worker, driven over its standard input and output.

    Args:
        setup: Its first order.
        slot: Number among the workers of this machine.
    """

    def __init__(self, setup: Setup, *, slot: int) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        environment |= dict.fromkeys(THREAD_VARIABLES, str(setup.threads))
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "longtake.evaluation.running.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            # Ctrl-C in a terminal is for the program that drives it, which lets it finish its unit.
            start_new_session=True,
        )
        self._order(setup.to_json(slot))

    def wait_until_ready(self) -> dict[str, Any]:
        """What it measures, once everything is loaded.

        Raises:
            ValueError: If it refuses the setup.
        """
        return self._answer("the setup", lambda steps: None, "ready")

    def do(self, unit: Unit, *, on_steps: Callable[[float], None]) -> None:
        """Have a unit done.

        Raises:
            ValueError: If it cannot be done; says what to do about it.
        """
        self._order({"unit": unit.to_json()})
        self._answer(f"{unit.label}, videos {unit.lines[0].id} to {unit.lines[-1].id}", on_steps, "done")

    def stop(self) -> None:
        """End it at once; what it has written whole stays."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def _order(self, values: Mapping[str, Any]) -> None:
        # If it is gone, its answer says so.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(values) + "\n")
            self._process.stdin.flush()

    def _answer(self, what: str, on_steps: Callable[[float], None], wanted: str) -> Any:
        for line in self._process.stdout:
            answer = json.loads(line)
            if "steps" in answer:
                on_steps(answer["steps"])
            elif "error" in answer:
                raise _failure(answer, what)
            else:
                return answer[wanted]
        code = self._process.wait()
        reason = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        raise ValueError(
            f"a worker {reason} in {what}: finished work is kept; run the same command again, with fewer --workers if "
            "memory ran out"
        )


def run_local(
    units: Sequence[Unit], setup: Setup, watcher: Watcher, *, num_workers: int, should_stop: Callable[[], bool]
) -> None:
    """Do units in worker processes on this machine; whoever is free takes the next.

    Raises:
        ValueError: The first failure, after the other workers have finished the units they are in.
    """

    def drive(slot: int, hands: _Hands) -> None:
        with _worker(setup, slot) as worker:
            hands.tell(watcher.ready, worker.wait_until_ready())
            while (unit := hands.next_unit()) is not None:
                worker.do(unit, on_steps=lambda steps, unit=unit: hands.tell(watcher.steps, unit, steps))
                hands.tell(watcher.done, unit)

    drive_together(units, drive, num_workers=num_workers, should_stop=should_stop)


def run_share(
    units: Sequence[Unit],
    setup: Setup,
    watcher: Watcher,
    *,
    rank: int,
    world_size: int,
    slot: int,
    should_stop: Callable[[], bool],
) -> None:
    """Do the units that fall to one of several ranks.

    Raises:
        ValueError: If a unit cannot be done.
    """
    mine = [unit for unit in units if unit.share % world_size == rank]
    if not mine or should_stop():
        return
    with _worker(setup, slot) as worker:
        watcher.ready(worker.wait_until_ready())
        for unit in mine:
            if should_stop():
                return
            worker.do(unit, on_steps=lambda steps, unit=unit: watcher.steps(unit, steps))
            watcher.done(unit)


def drive_together(
    units: Sequence[Unit],
    drive: "Callable[[int, _Hands], None]",
    *,
    num_workers: int,
    should_stop: Callable[[], bool],
) -> None:
    """Run a function in as many threads as there are workers, all taking from the same units.

    Raises:
        BaseException: The first failure; the other threads end after the unit they are in.
    """
    hands = _Hands(units, should_stop)
    finished: queue.Queue[BaseException | None] = queue.Queue()

    def run(slot: int) -> None:
        try:
            drive(slot, hands)
            finished.put(None)
        except BaseException as error:  # handed to the thread that waits
            hands.close()
            finished.put(error)

    threads = [threading.Thread(target=run, args=(slot,), daemon=True) for slot in range(num_workers)]
    for thread in threads:
        thread.start()
    failures = []
    for _ in threads:
        failure = finished.get()
        if failure is not None:
            failures.append(failure)
    if failures:
        raise failures[0]


class _Hands:
    """What the threads that drive workers share: the units that are left, and one voice."""

    def __init__(self, units: Sequence[Unit], should_stop: Callable[[], bool]) -> None:
        self._units = iter(units)
        self._should_stop = should_stop
        self._is_closed = False
        self._lock = threading.Lock()

    def next_unit(self) -> Unit | None:
        """The next unit, None when there is none or no more are to be begun."""
        with self._lock:
            return None if self._is_closed or self._should_stop() else next(self._units, None)

    def tell(self, listener: Callable[..., None], *values: Any) -> None:
        """Call a listener, one thread at a time."""
        with self._lock:
            listener(*values)

    def close(self) -> None:
        """Begin no more units."""
        self._is_closed = True


@contextlib.contextmanager
def _worker(setup: Setup, slot: int) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(setup, slot=slot)
    try:
        yield worker
    finally:
        worker.stop()


def _failure(answer: Mapping[str, Any], what: str) -> Exception:
    if "traceback" in answer:
        return RuntimeError(f"a worker failed in {what}:\n{answer['traceback']}")
    if answer.get("is_disk_full"):
        return ValueError(
            f"the disk is full ({answer['error']}); finished work is kept: free some space, then run the same "
            "command again"
        )
    return ValueError(answer["error"])
