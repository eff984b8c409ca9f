"""Measures of rollouts: procedural scenes with known truth, judges and drift curves."""
