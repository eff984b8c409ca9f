"""Noise sources, schedules and one-block samplers, as plain functions of tensors."""
