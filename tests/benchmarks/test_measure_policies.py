"""What the benchmark of policies compares; never a time."""

import pytest

from benchmarks.policies import policies_to_measure, steady_state
from longtake.cache import POLICIES, Geometry, make_policy

GEOMETRY = Geometry(num_layers=2, num_heads=2, head_dim=128, num_rows=16, num_columns=16, frames_per_block=3)


def test_every_policy_is_measured():
    assert policies_to_measure().keys() == POLICIES.keys()


@pytest.mark.parametrize(
    ("policy", "num_frames", "grows"),
    [
        ({"policy": "sliding_window", "num_context_frames": 9}, 9, False),
        ({"policy": "attention_sink", "num_context_frames": 11, "num_sink_frames": 3}, 11, False),
        ({"policy": "quantized", "inner": {"policy": "sliding_window", "num_context_frames": 12}}, 12, False),
        ("full", 3 * 48, True),
    ],
)
def test_the_window_it_is_compared_with_is_as_long(policy, num_frames, grows):
    steady = steady_state(make_policy(policy), GEOMETRY)
    assert (steady.num_frames, steady.grows) == (num_frames, grows)
