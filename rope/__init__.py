"""Three-axis rotary positions: angles computed on the fly from float coordinates."""

from longtake.rope.rotary import (
    AxisFrequencies,
    GridRotary,
    apply_phases,
    axis_frequencies,
    cell_centres,
    cell_coordinates,
    pack_backward,
    rotate,
    token_phases,
)

__all__ = [
    "AxisFrequencies",
    "GridRotary",
    "apply_phases",
    "axis_frequencies",
    "cell_centres",
    "cell_coordinates",
    "pack_backward",
    "rotate",
    "token_phases",
]
