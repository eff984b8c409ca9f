"""What every training stage needs: device, autocast, log, clock and atomic files."""

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from rich.console import Console
from torch import nn

LONGEST_STEP = 10.0  # seconds
console = Console(width=150, highlight=False)


def pick_device(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def autocast(device: torch.device) -> AbstractContextManager:
    """Return a bfloat16 autocast context."""
    return torch.autocast(device.type, torch.bfloat16)


def save_atomically(value: Any, path: Path) -> None:
    """Write a torch file so that a reader sees the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    partial.replace(path)


def rank() -> int:
    """Return this worker's number, 0 when there is only one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def num_workers() -> int:
    """Return the number of workers."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def average_gradients(params: list[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the workers; a missing gradient counts as zero."""
    if not distributed.is_initialized():
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = torch.cat([grad.flatten() for grad in grads])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for parameter, grad, part in zip(params, grads, flat.split([grad.numel() for grad in grads]), strict=True):
        parameter.grad = part.view_as(grad)


def shared_progress(progress: float) -> float:
    """Return worker 0's value, so that all workers take the same decisions at the same step."""
    if not distributed.is_initialized():
        return progress
    value = torch.tensor([progress], dtype=torch.float64)
    distributed.broadcast(value, 0)
    return float(value)


def _worker(
    index: int, workers: int, store: str, function: Callable[..., None], arguments: tuple, options: dict
) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=workers)
    function(*arguments, **options)
    distributed.barrier()
    distributed.destroy_process_group()


def launch(workers: int, function: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """Run ``function`` in as many one-thread processes that share gradients, or right here when ``workers`` is 1.

    On a few CPU cores that others use too, processes beat threads: convolution kernels spin at their barriers
    until the thread that lost its core comes back, which was measured to cost a factor of ten.
    """
    if workers == 1:
        function(*arguments, **options)
        return
    with tempfile.TemporaryDirectory() as folder:
        spec = (workers, f"{folder}/store", function, arguments, options)
        multiprocessing.spawn(_worker, args=spec, nprocs=workers)


class StageLog:
    """A JSONL file and a console line per entry, with the time left."""

    def __init__(self, path: Path, budget_seconds: float, *, spent_seconds: float = 0.0) -> None:
        """Append to ``path``; the clock starts at ``spent_seconds`` when a run resumes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.budget, self.spent = path, budget_seconds, spent_seconds
        self.last = time.monotonic()

    def advance(self) -> float:
        """Move the clock on and return the share of the budget that is spent, 0 to 1; call it at every step.

        A gap longer than ``LONGEST_STEP`` counts as that much: a process that was suspended did not train.
        """
        now = time.monotonic()
        self.spent += min(now - self.last, LONGEST_STEP)
        self.last = now
        return min(1.0, self.spent / self.budget)

    def write(self, **values: Any) -> None:
        """Log one entry; only worker 0 does."""
        if rank() > 0:
            return
        values = {"seconds": round(self.spent, 1), **values}
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        words = " ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
        )
        console.print(f"{words}  (left {max(0.0, self.budget - self.spent) / 60:.1f} min)")
