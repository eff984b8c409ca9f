"""Training of the mini model and of its judge; not part of the wheel."""
