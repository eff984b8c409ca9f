"""What plans cost: a timed policy plans as it would untimed, and every call is counted."""

from block_attention import signature

from benchmarks.plans import Clock, measure_plans, timed
from longtake.attention.geometry import make_geometry
from longtake.attention.policies.radial import Radial


def test_a_timed_policy_makes_the_same_plans_and_builds_each_once():
    policy, clock = Radial(block_size=4, thin_below=8, dense_layers=0, dense_steps=0, dense_blocks=0), Clock()
    watched = timed(policy, clock)
    geometry = make_geometry(9, (4, 4), block_frames=3)
    plans = [watched.plan(None, None, geometry) for _ in range(3)]
    assert signature(plans[0]) == signature(policy.plan(None, None, geometry))
    assert clock.calls == {"plan": 3, "build": 1} and watched.settings() == policy.settings()


def test_a_rollout_builds_few_plans_and_looks_them_up():
    record = measure_plans(seconds=2.0)
    radial, light = record["radial-30"], record["light_forcing-30"]
    assert radial["calls"] == light["calls"] > 20 * radial["plans"] > 0 == light["plans"]
    assert radial["choosing"] is None and light["looking_up"] is None
    assert 0 < radial["building"] < radial["seconds"] and 0.2 < radial["density"] < 1
