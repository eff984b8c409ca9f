"""YAML presets and the loader that turns them into validated dataclasses."""
