"""Conversion of checkpoints of any family, as they were published, to diffusers folders."""
