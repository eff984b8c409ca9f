"""The world of the mini model: scenes with known truth, their judge, and studies of how long videos drift in it."""
