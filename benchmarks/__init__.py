"""Measurements of this repository's speed and memory; not part of the wheel."""
