"""What a rollout is measured with: procedural scenes with known truth, judges and drift curves."""
