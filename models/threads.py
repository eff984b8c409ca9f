"""How many threads a forward is worth."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from longtake.configs.waiting import threads_sleep

# Handing a matmul to a sleeping thread costs tens of microseconds: more than the whole product takes below about this
# many operations.
SINGLE_THREAD_FLOPS = 30_000_000


@contextmanager
def fitting_threads(*, width: int, num_tokens: int, device: torch.device) -> Iterator[None]:
    """Compute small forwards on one thread if the others sleep; the former number comes back afterwards.

    Args:
        width: Channels of the transformer.
        num_tokens: Tokens of one forward, over the batch.
        device: Where it computes; only the CPU is affected.
    """
    before = torch.get_num_threads()
    is_small = device.type == "cpu" and 2 * num_tokens * width**2 < SINGLE_THREAD_FLOPS
    if not is_small or before == 1 or not threads_sleep():
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
