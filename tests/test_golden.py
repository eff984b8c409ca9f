"""The project's own golden rollouts: the numbers did not move, and the cases differ where they must."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from golden_cases import CASES, golden_rollouts
from safetensors.torch import load_file

from longtake.cache import POLICIES
from longtake.samplers import SAMPLERS

FILE = Path(__file__).parent / "golden" / "rollouts.safetensors"


@pytest.fixture(scope="module")
def rollouts() -> dict[str, torch.Tensor]:
    return golden_rollouts()


def test_numbers_did_not_move(rollouts):
    golden = load_file(FILE)
    assert golden.keys() == rollouts.keys()
    for name, latents in rollouts.items():
        assert 0.5 < latents.std() < 5, name  # neither dead nor exploded, so that the comparison means something
        error = (latents - golden[name]).abs().max().item()
        assert error <= 2e-4, f"{name} moved by {error:.2g}: find out why; if it is meant, make golden"


def test_cases_differ(rollouts):
    """A policy that is not honoured would repeat another's numbers."""
    for first, second in combinations(rollouts, 2):
        assert (rollouts[first] - rollouts[second]).abs().max() > 1e-2, (first, second)


def test_policies_and_samplers_have_cases():
    policies = {
        case["cache"] if isinstance(case["cache"], str) else case["cache"]["policy"] for case in CASES.values()
    }
    samplers = {case.get("sampler", {"name": "few_step"})["name"] for case in CASES.values()}
    assert len(policies) >= 21 and policies <= set(POLICIES)
    assert samplers == set(SAMPLERS)
