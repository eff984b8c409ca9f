"""Units done by the ranks of ``torchrun``, on one machine or several that share the folder of results."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from longtake.evaluation.running.launchers import Watcher, run_share
from longtake.evaluation.running.runner import Evaluation, Recorder

LONGEST_WAIT = timedelta(days=365)
"""Ranks that are finished wait for the others: units of hours are no failure."""


def is_rank() -> bool:
    """Whether ``torchrun`` started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def run_rank(evaluation: Evaluation, watcher: Watcher, *, should_stop: Callable[[], bool]) -> bool:
    """Do one rank's units; the first rank watches over the folder and writes the results when all are finished.

    Args:
        evaluation: What to do, the same on every rank.
        watcher: Is told how this rank's work goes.
        should_stop: Whether to begin no more units.

    Returns:
        Whether everything is finished.

    Raises:
        ValueError: If something does not fit or cannot be read; ``torchrun`` then ends the other ranks.
    """
    from accelerate import PartialState

    # The processes that wait here compute nothing, so that they need no GPU.
    state = PartialState(cpu=True, timeout=LONGEST_WAIT)
    if state.is_main_process:
        with evaluation.opened():
            return _work(evaluation, watcher, state, should_stop)
    return _work(evaluation, watcher, state, should_stop)


def run_torchrun(arguments: Sequence[str], *, num_processes: int, should_stop: Callable[[], bool]) -> bool:
    """Start this program again under ``torchrun`` and wait for it.

    Args:
        arguments: Of ``longtake evaluate run``.
        num_processes: Ranks, all on this machine.
        should_stop: Whether the user has asked to stop.

    Returns:
        Whether everything is finished.

    Raises:
        ValueError: If a rank fails; it has said why on the standard error stream.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    command += ["--module", "longtake.scripts.main", "evaluate", "run", *arguments]
    process = subprocess.Popen(command)
    try:
        code = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if code == 0 or should_stop():
        return code == 0
    raise ValueError("a rank of torchrun failed, see above: finished work is kept; run the same command again")


def _work(evaluation: Evaluation, watcher: Watcher, state: Any, should_stop: Callable[[], bool]) -> bool:
    state.wait_for_everyone()
    units = evaluation.todo()
    run_share(
        units,
        evaluation.setup(units),
        Recorder(evaluation, watcher),
        rank=state.process_index,
        world_size=state.num_processes,
        slot=state.local_process_index,
        should_stop=should_stop,
    )
    if should_stop():
        return False
    state.wait_for_everyone()
    if state.is_main_process:
        evaluation.finish()
    return True
