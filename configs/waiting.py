"""Waiting of idle threads. Imports nothing but the standard library: to be called before torch is loaded."""

import os

# Rounds of waiting (about a tenth of a millisecond) after which a thread goes to sleep: longer than the pauses between
# the products of a forward, so that they find it awake, and too short to take time from other programs.
SPIN_COUNT = 10_000


def wait_briefly() -> None:
    """Let idle threads stay awake between two products, then sleep; what the user has set stays.

    OpenMP reads its settings once, when torch is loaded: for programs, before their first ``import torch``.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


def threads_sleep() -> bool:
    """Tell whether idle threads go to sleep at once, going by the OpenMP settings of this process."""
    spins = os.environ.get("GOMP_SPINCOUNT", "")
    if spins.isdigit():
        return int(spins) < SPIN_COUNT // 2
    return not spins and os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
