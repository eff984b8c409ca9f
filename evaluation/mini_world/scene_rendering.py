"""Pictures of moving scenes: any frame of a scene, its object's mask and its true state, as pure functions."""

from dataclasses import dataclass

import numpy as np

from longtake.evaluation.mini_world.scenes import (
    BACKGROUNDS,
    COLOURS,
    CONTRAST,
    EVENT_PERIOD,
    FPS,
    LANDMARK_TINTS,
    PAN_RANGE,
    PILLAR_COLOUR,
    PILLAR_LEFT,
    SIZE,
    SPEEDS,
    Actor,
    Scene,
    camera_offset,
)


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


def _triangle_wave(angle: np.ndarray) -> np.ndarray:
    return 2.0 / np.pi * np.arcsin(np.sin(angle))


def _trajectory(actor: Actor, frame_indices: np.ndarray, event: str) -> tuple[np.ndarray, np.ndarray]:
    """Return centre (F, 2) and radius (F,), float64, pixels of a 64-pixel frame."""
    seconds = np.asarray(frame_indices, dtype=np.float64) / FPS
    period = SPEEDS[actor.speed] if event == "none" else EVENT_PERIOD
    angle = 2.0 * np.pi * seconds / period + actor.phase
    x = np.full(seconds.shape, actor.anchor_x)
    y = np.full(seconds.shape, actor.anchor_y)
    radius = np.full(seconds.shape, actor.radius)
    if event == "leaves":
        x = 32.0 + 56.0 * np.sin(angle)
    elif event == "hides":
        x = PILLAR_LEFT - 1.0 + 18.0 * np.cos(angle)
    elif actor.motion == "swaying":
        x = x + actor.reach * np.sin(angle)
    elif actor.motion == "rising and falling":
        y = y + actor.reach * np.sin(angle)
    elif actor.motion == "circling":
        x = x + actor.reach * np.cos(angle)
        y = y + actor.reach * np.sin(angle)
    elif actor.motion == "bouncing":
        x = x + actor.reach * _triangle_wave(angle)
        y = y + actor.reach * _triangle_wave(1.6 * angle + 1.0)
    else:
        radius = radius * (1.0 + 0.4 * np.sin(angle))
    return np.stack([x, y], axis=-1), radius


def _half_planes(x: np.ndarray, y: np.ndarray, count: int, apothem: np.ndarray) -> list[np.ndarray]:
    angles = np.pi / 2 + 2.0 * np.pi * np.arange(count) / count  # the first edge faces down, a corner points up
    return [np.float32(np.cos(a)) * x + np.float32(np.sin(a)) * y - apothem for a in angles]


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance to the outline, negative inside; shapes of about equal area, corners not rounded."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.886) * radius
    if shape == "triangle":
        return np.maximum.reduce(_half_planes(x, y, 3, np.float32(0.76) * radius))
    # A point is in a pentagram when it is inside at least four of its five edges: the second largest distance rules.
    largest, second = None, None
    for plane in _half_planes(x, y, 5, np.float32(0.46) * radius):
        if largest is None:
            largest, second = plane, np.full_like(plane, -np.inf)
        else:
            second = np.maximum(second, np.minimum(largest, plane))
            largest = np.maximum(largest, plane)
    return second


def _coverage(actor: Actor, frame_indices: np.ndarray, size: int, event: str) -> np.ndarray:
    """Anti-aliased coverage of the object before occlusion, (F, size, size) float32."""
    center, radius = _trajectory(actor, frame_indices, event)
    pixel = np.float32(SIZE / size)
    grid = (np.arange(size, dtype=np.float32) + 0.5) * pixel
    x = grid[None, None, :] - center[:, 0, None, None].astype(np.float32)
    y = grid[None, :, None] - center[:, 1, None, None].astype(np.float32)
    distance = _signed_distance(actor.shape, x, y, radius[:, None, None].astype(np.float32))
    return np.clip(0.5 - distance / pixel, 0.0, 1.0)


def _pillar(size: int) -> np.ndarray:
    pixel = SIZE / size
    grid = (np.arange(size) + 0.5) * pixel
    return np.clip((grid - PILLAR_LEFT) / pixel + 0.5, 0.0, 1.0).astype(np.float32)


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
    if which not in ("actor", "second") or (which == "second" and scene.second is None):
        raise ValueError(f"which={which!r} is not in this scene: use 'actor', or 'second' where scene.second is set.")
    actor = scene.actor if which == "actor" else scene.second
    mask = _coverage(actor, frame_indices, size, scene.event)
    if scene.event == "hides":
        mask = mask * (1.0 - _pillar(size))
    if which == "actor" and scene.second is not None:
        mask = mask * (1.0 - _coverage(scene.second, frame_indices, size, "none"))
    return mask


def object_state(scene: Scene, frame_indices: np.ndarray, *, which: str = "actor") -> ObjectState:
    """Return the true centre, radius and visibility of an object; arguments as in :func:`object_mask`."""
    mask = object_mask(scene, frame_indices, which=which)
    actor = scene.actor if which == "actor" else scene.second
    center, radius = _trajectory(actor, frame_indices, scene.event)
    whole = {"circle": np.pi, "square": np.pi, "triangle": 3.0, "star": 2.49}[actor.shape] * radius**2
    return ObjectState(center, radius, np.clip(mask.sum(axis=(1, 2)) / whole, 0.0, 1.0))


def _square_wave(position: np.ndarray, period: float, edge: float) -> np.ndarray:
    """A wave between -1 and 1 whose flanks are about ``edge`` wide, same unit as ``position``."""
    angle = 2.0 * np.pi * position / period
    return np.clip(np.sin(angle) * (period / (np.pi * edge)), -1.0, 1.0)


def _panorama(scene: Scene, size: int, columns_per_pixel: int) -> np.ndarray:
    """The strip the camera sweeps, (size, columns, 3) float32, oversampled horizontally."""
    pixel = SIZE / size
    step = pixel / columns_per_pixel
    width = int(np.ceil((SIZE + PAN_RANGE) / step)) + 2 * columns_per_pixel
    x = ((np.arange(width) + 0.5) * step)[None, :]
    y = ((np.arange(size) + 0.5) * pixel)[:, None]
    if scene.texture == "plain":
        shade = np.ones((size, width))
    elif scene.texture == "gradient":
        shade = np.broadcast_to(0.4 + 1.2 * y / SIZE, (size, width))
    elif scene.texture == "striped":
        shade = np.broadcast_to(1.0 + CONTRAST * _square_wave(x + scene.texture_x, 16.0, pixel), (size, width))
    else:
        columns = _square_wave(x + scene.texture_x, 32.0, pixel)
        shade = 1.0 + CONTRAST * columns * _square_wave(y + scene.texture_y, 32.0, pixel)
    strip = np.asarray(BACKGROUNDS[scene.background]) * shade[..., None]
    for mark in scene.landmarks:
        dx, dy = x - mark.x, y - mark.y
        if mark.kind == "disc":
            distance = np.hypot(dx, dy) - mark.radius
        elif mark.kind == "ring":
            distance = np.abs(np.hypot(dx, dy) - mark.radius) - 1.8
        elif mark.kind == "cross":
            arm = np.minimum(np.abs(dx), np.abs(dy)) - 1.8
            distance = np.maximum(arm, np.maximum(np.abs(dx), np.abs(dy)) - mark.radius)
        else:
            distance = (np.abs(dx) + np.abs(dy) - 1.2 * mark.radius) / np.sqrt(2.0)
        alpha = np.clip(0.5 - distance / pixel, 0.0, 1.0)[..., None]
        strip = strip * (1.0 - alpha) + alpha * np.asarray(LANDMARK_TINTS[mark.tint])
    return strip.astype(np.float32)


def _backdrop(scene: Scene, frame_indices: np.ndarray, size: int) -> np.ndarray:
    """Background as the camera sees it, (1 or F, size, size, 3) float32; one frame when the camera is still."""
    columns_per_pixel = 4
    offsets = camera_offset(scene, frame_indices) if scene.camera != "still" else camera_offset(scene, np.zeros(1))
    strip = _panorama(scene, size, columns_per_pixel)
    # A pixel sees the mean of its columns, wherever the view stands.
    width = strip.shape[1] - columns_per_pixel
    strip = np.mean([strip[:, shift : shift + width] for shift in range(columns_per_pixel)], axis=0)
    position = offsets[:, None] * (size / SIZE) * columns_per_pixel + np.arange(size)[None, :] * columns_per_pixel
    left = np.floor(position).astype(np.int64)
    weight = (position - left).astype(np.float32)[..., None]
    return np.stack(
        [
            strip[:, columns] * (1.0 - share) + strip[:, columns + 1] * share
            for columns, share in zip(left, weight, strict=True)
        ]
    )


def render(scene: Scene, frame_indices: np.ndarray, *, size: int = SIZE) -> np.ndarray:
    """Render frames of a scene; a pure function, defined for every frame index.

    Args:
        scene: What to draw.
        frame_indices: (F,) integers, any order, unbounded; 16 a second.
        size: Height and width, pixels.

    Returns:
        (F, size, size, 3) uint8 RGB.

    Raises:
        ValueError: If ``frame_indices`` is not one-dimensional or ``size`` is below 8.
    """
    frame_indices = np.asarray(frame_indices)
    if frame_indices.ndim != 1:
        raise ValueError(
            f"frame_indices has {frame_indices.ndim} dimensions, must have 1: pass np.arange(num_frames)."
        )
    if size < 8:
        raise ValueError(f"size={size} is below 8 pixels: use 64, the size the mini model is trained at.")
    image = _backdrop(scene, frame_indices, size)
    actors = [scene.actor] if scene.second is None else [scene.actor, scene.second]
    for actor in actors:
        alpha = _coverage(actor, frame_indices, size, scene.event)[..., None]
        image = image + alpha * (np.asarray(COLOURS[actor.colour], dtype=np.float32) - image)
    if scene.event == "hides":
        image = image + _pillar(size)[:, None] * (np.asarray(PILLAR_COLOUR, dtype=np.float32) - image)
    return np.clip(image + 0.5, 0.0, 255.0).astype(np.uint8)
