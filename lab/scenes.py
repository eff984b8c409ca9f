"""Training side of the moving scenes: training scenes, caption words, and the true state of their objects."""

from dataclasses import dataclass

import numpy as np

from longtake.evaluation.mini_world.scenes import (
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    EVENTS,
    FPS,
    MOTIONS,
    SHAPES,
    SIZE,
    SPEEDS,
    TEXTURES,
    Actor,
    Scene,
    coverage,
    draw_scene,
    pillar,
    trajectory,
)


def training_scene(index: int, seed: int = 0) -> Scene:
    """Scene of the training set; its combination of attributes is never a held-back one."""
    return draw_scene(seed, 0, index, held_back=False)


def vocabulary() -> list[str]:
    """Return every word a caption can contain, sorted."""
    text = " ".join((*SHAPES, *COLOURS, *MOTIONS, *SPEEDS, *BACKGROUNDS, *TEXTURES, *CAMERAS, *EVENTS.values()))
    return sorted({*text.split(), "a", "an", "and", "over", "background", "with", "the", "camera"})


def revisit_pairs(scene: Scene, num_frames: int) -> list[tuple[int, int]]:
    """Return (first frame, later frame) pairs of equal view: one camera round trip apart, and whole multiples.

    Args:
        scene: The scene; a still camera has no revisits.
        num_frames: Frames of the video; both members of a pair are below it.
    """
    period = round(CAMERAS[scene.camera] * FPS)
    if period == 0:
        return []
    return [
        (first, later)
        for first in range(min(period, num_frames))
        for later in range(first + period, num_frames, period)
    ]


@dataclass(frozen=True)
class ObjectState:
    """True state of one object per frame, in pixels of a 64-pixel frame.

    Attributes:
        center: (F, 2) float64, (x, y) on the screen.
        radius: (F,) float64.
        visibility: (F,) float64 in [0, 1], share of the object's pixels that can be seen.
    """

    center: np.ndarray
    radius: np.ndarray
    visibility: np.ndarray


def object_mask(scene: Scene, frame_indices: np.ndarray, *, size: int = SIZE, which: str = "actor") -> np.ndarray:
    """Return the visible part of an object as anti-aliased coverage.

    Args:
        scene: The scene.
        frame_indices: (F,) integers, any value.
        size: Height and width of the frame, pixels.
        which: ``actor`` or ``second``.

    Returns:
        (F, size, size) float32 in [0, 1].

    Raises:
        ValueError: If the object is not in the scene.
    """
    mask = coverage(_object_of(scene, which), frame_indices, size, scene.event)
    if scene.event == "hides":
        mask = mask * (1.0 - pillar(size))
    if which == "actor" and scene.second is not None:
        mask = mask * (1.0 - coverage(scene.second, frame_indices, size, "none"))
    return mask


def _object_of(scene: Scene, which: str) -> Actor:
    found = {"actor": scene.actor, "second": scene.second}.get(which)
    if found is None:
        raise ValueError(f"which={which!r} is not in this scene: use 'actor', or 'second' where scene.second is set.")
    return found


def object_state(scene: Scene, frame_indices: np.ndarray, *, which: str = "actor") -> ObjectState:
    """Return the true centre, radius and visibility of an object; arguments as in :func:`object_mask`."""
    mask = object_mask(scene, frame_indices, which=which)
    actor = _object_of(scene, which)
    center, radius = trajectory(actor, frame_indices, scene.event)
    whole = {"circle": np.pi, "square": np.pi, "triangle": 3.0, "star": 2.49}[actor.shape] * radius**2
    return ObjectState(center, radius, np.clip(mask.sum(axis=(1, 2)) / whole, 0.0, 1.0))
