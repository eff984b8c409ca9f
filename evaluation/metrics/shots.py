"""Cuts: where one picture gives way to another from one frame to the next."""

import numpy as np

from longtake.evaluation.metric import MetricSpec, Score
from longtake.evaluation.metrics.track import Track, TrackMeasure

UNLIKE = 0.35
"""Of a scale on which equal layouts are 0 and unrelated ones about 1. Motion between two frames stays below 0.1."""
JUMP = 30.0
"""Grey levels (root mean square over the cells) that count as a cut where the layout stays: another light."""
MOST = 6.0
"""Grey levels that at least half of the cells change by: things that jump about in front of a scene are no cut."""
ISOLATION = 3.0
"""A cut stands out from every other change nearby by this factor: fast motion and flicker come in rows."""
NEARBY_SECONDS = 0.5
NEARBY_SECONDS_OF_JUMPS = 1.0
"""Slow flicker jumps twice a second."""
LASTING_SECONDS = 0.25
"""Means over this long before and after have to differ as well: a single bad frame is no cut."""
FLAT = 3.0
"""Grey levels of layout (root mean square) below which a picture is taken for empty, and its layout for grain."""

CUTS = MetricSpec(
    name="proxy/cuts",
    higher_is_better=False,
    unit="cuts",
    range=(0.0, None),
    description="Hard cuts; a long take has none. Changes of brightness alone do not count, unless they last.",
)


def find_cuts(track: Track) -> list[int]:
    """First frames after a cut, in order."""
    if track.num_frames < 3:
        return []
    cells = track.colour.reshape(track.num_frames, -1, 3)
    layout = cells - cells.mean(axis=1, keepdims=True)
    unlike = _unlikeness(layout[:-1], layout[1:])
    jumps = _apart(cells[:-1], cells[1:])
    most = np.median(np.abs(cells[1:] - cells[:-1]).max(axis=2), axis=1)
    lasting = track.frames_in(LASTING_SECONDS)
    found = []
    for index in np.flatnonzero((most >= MOST) & ((unlike >= UNLIKE) | (jumps >= JUMP))):
        before = slice(max(0, index + 1 - lasting), index + 1)
        after = slice(index + 1, index + 1 + lasting)
        changes_layout = (
            unlike[index] >= UNLIKE
            and _stands_out(unlike, index, track.frames_in(NEARBY_SECONDS))
            and _unlikeness(layout[before].mean(axis=0), layout[after].mean(axis=0)) >= UNLIKE
        )
        jumps_for_good = (
            jumps[index] >= JUMP
            and _stands_out(jumps, index, track.frames_in(NEARBY_SECONDS_OF_JUMPS))
            and _apart(cells[before].mean(axis=0), cells[after].mean(axis=0)) >= JUMP
        )
        if changes_layout or jumps_for_good:
            found.append(int(index) + 1)
    return found


def shots(track: Track) -> list[tuple[int, int]]:
    """Stretches between cuts, as (first frame, one past the last)."""
    edges = [0, *find_cuts(track), track.num_frames]
    return list(zip(edges[:-1], edges[1:], strict=True))


def _unlikeness(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Squared distance of two layouts (..., cells, 3) over the sum of their squares."""
    power = np.square(first).mean(axis=(-1, -2)) + np.square(second).mean(axis=(-1, -2))
    return np.square(first - second).mean(axis=(-1, -2)) / (power + FLAT**2)


def _apart(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(first - second).mean(axis=(-1, -2)))


def _stands_out(values: np.ndarray, index: int, reach: int) -> bool:
    others = np.concatenate([values[max(0, index - reach) : index], values[index + 1 : index + 1 + reach]])
    return bool(others.size == 0 or values[index] >= ISOLATION * others.max())


def measure_cuts(track: Track) -> dict[str, Score]:
    """Number of cuts, with their times."""
    if track.num_frames < 3:
        return {CUTS.name: Score.none("needs 3 frames")}
    found = find_cuts(track)
    details = {"frames": found, "times_s": [index / track.fps for index in found]}
    return {CUTS.name: Score(value=float(len(found)), details=details)}


SHOTS = TrackMeasure((CUTS,), measure_cuts)
