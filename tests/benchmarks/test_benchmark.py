"""The benchmark's counting, against PyTorch's own counter; never a time."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.rollouts import BLOCK, NUM_CONTEXT_FRAMES, Size, block_times
from longtake.models.causal import fitting_threads
from longtake.pipelines import LatentRollout
from longtake.samplers import SeededNoise


def test_counted_operations_are_those_of_a_block():
    size = Size(width=48, num_heads=2, num_layers=2, side=4, num_text_tokens=8)
    rollout = LatentRollout(
        size.build(torch.float32),
        torch.zeros(1, 8, 64),
        num_frames=NUM_CONTEXT_FRAMES + 2 * BLOCK,
        frame_shape=(16, 8, 8),
        cache={"policy": "sliding_window", "num_context_frames": NUM_CONTEXT_FRAMES},
        noise=SeededNoise([0]),
    )
    for _ in range(NUM_CONTEXT_FRAMES // BLOCK + 1):
        rollout.next_block()
    # PyTorch counts attention on accelerators only; its formula is the same on the CPU.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mapping = {attention: lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        rollout.next_block()
    assert counter.get_total_flops() == pytest.approx(size.block_flops(), rel=0.01)


def test_only_full_windows_are_timed():
    size = Size(width=48, num_heads=2, num_layers=1, side=2)
    times = block_times(size, torch.bfloat16)
    assert all(next(times) > 0 for _ in range(2))


@pytest.mark.parametrize(
    ("num_tokens", "waiting", "expected"),
    [
        (48, {"OMP_WAIT_POLICY": "PASSIVE"}, 1),
        (48, {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}, 1),
        (48, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}, 2),
        (48, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "INFINITE"}, 2),
        (48, {}, 2),
        (10_000, {"OMP_WAIT_POLICY": "PASSIVE"}, 2),
    ],
)
def test_small_forwards_take_one_thread_where_the_others_sleep(num_tokens, waiting, expected, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in waiting.items():
        monkeypatch.setenv(name, value)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with (
            pytest.raises(RuntimeError, match="stop"),
            fitting_threads(width=192, num_tokens=num_tokens, device=torch.device("cpu")),
        ):
            assert torch.get_num_threads() == expected
            raise RuntimeError("stop")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
