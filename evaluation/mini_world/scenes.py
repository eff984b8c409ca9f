"""Moving scenes: the captioned, procedural and endless world that the mini model is trained and judged on.

A scene is one large bright object (sometimes two) in front of a dark textured background. Every quantity is a
closed-form function of time, so any frame index renders without the frames before it, for ever. Three things are
not in the caption and can only be right late in a long video if they were remembered: the size and phase of the
object, the phase of the texture, and the landmarks of the strip (two frames wide) that a panning camera sweeps.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

SIZE = 64
FPS = 16

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (232, 44, 44),
    "yellow": (244, 220, 52),
    "green": (56, 206, 76),
    "blue": (64, 132, 255),
    "pink": (252, 120, 196),
    "white": (242, 242, 242),
}
MOTIONS = ("swaying", "rising and falling", "circling", "bouncing", "growing and shrinking")
SPEEDS = {"slowly": 4.0, "quickly": 2.0}  # seconds per period
BACKGROUNDS = {
    "navy": (18, 28, 92),
    "maroon": (96, 18, 34),
    "teal": (8, 80, 82),
    "purple": (70, 26, 104),
    "olive": (80, 76, 14),
    "grey": (60, 60, 64),
}
TEXTURES = ("plain", "gradient", "striped", "checkered")
CAMERAS = {"still": 0.0, "panning quickly": 4.5, "panning slowly": 12.0}  # seconds per round trip, 0: does not move
EVENTS = {
    "none": "",
    "leaves": "out of the frame and back",
    "hides": "behind a pillar and back",
}
EVENT_PERIOD = 5.0  # seconds
PAN_RANGE = 60.0  # pixels of a 64-pixel frame between the two ends of a pan
CONTRAST = 0.36  # of stripes and checks, share of the background colour
LANDMARK_KINDS = ("disc", "ring", "cross", "diamond")
LANDMARK_TINTS = ((128, 120, 112), (150, 110, 62), (66, 128, 130), (14, 12, 16))
PILLAR_COLOUR = (112, 106, 100)
PILLAR_LEFT = 35.0  # the pillar covers the frame from here to its right edge
HELD_BACK_SHARE = 12  # one combination of prompted attributes in this many is never trained on


@dataclass(frozen=True, kw_only=True)
class Actor:
    """One object: what the caption says (shape, colour, motion, speed) and what it does not."""

    shape: str
    colour: str
    motion: str
    speed: str
    radius: float  # of the circle of equal area at rest, in pixels of a 64-pixel frame
    phase: float  # start of the motion, radians
    anchor_x: float  # centre of the motion, pixels of a 64-pixel frame
    anchor_y: float  # same, downwards
    reach: float  # amplitude of the motion, pixels of a 64-pixel frame


@dataclass(frozen=True, kw_only=True)
class _Landmark:
    """A dim mark at a fixed place of the panned strip; never in the caption. Lengths in 64-pixel-frame pixels."""

    kind: str
    tint: int
    x: float
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Everything that fixes a video."""

    actor: Actor  # the main object
    second: Actor | None
    background: str
    texture: str  # plain, gradient, striped or checkered
    texture_x: float  # phase of the texture, pixels of a 64-pixel frame
    texture_y: float
    camera: str  # still, panning slowly or panning quickly
    camera_phase: float  # start of the pan, radians
    event: str  # none, leaves or hides
    landmarks: tuple[_Landmark, ...]  # marks of the strip; empty when the camera is still
    says_speed: bool  # whether the caption mentions the speed of the main object


def _choice(rng: np.random.Generator, names: Iterable[str]) -> str:
    names = tuple(names)
    return names[int(rng.integers(len(names)))]


def _sample_actor(rng: np.random.Generator, *, row: int | None, taken: str | None) -> Actor:
    motion = MOTIONS[int(rng.choice(len(MOTIONS), p=(0.18, 0.18, 0.24, 0.22, 0.18)))]
    colour = _choice(rng, [name for name in COLOURS if name != taken])
    alone = row is None
    spread = 5.0 if alone else 2.0
    anchor_x = 32.0 + float(rng.uniform(-spread, spread))
    anchor_y = 32.0 + float(rng.uniform(-spread, spread)) if alone else (19.0, 45.0)[row]
    return Actor(
        shape=_choice(rng, SHAPES),
        colour=colour,
        motion=motion,
        speed=_choice(rng, SPEEDS),
        radius=float(rng.uniform(9.5, 13.0) if alone else rng.uniform(7.5, 9.0)),
        phase=float(rng.uniform(0.0, 2.0 * np.pi)),
        anchor_x=anchor_x,
        anchor_y=anchor_y,
        reach=float(rng.uniform(13.0, 16.0)) if alone else 8.0,
    )


def _sample_landmark(rng: np.random.Generator, column: int) -> _Landmark:
    return _Landmark(
        kind=_choice(rng, LANDMARK_KINDS),
        tint=int(rng.integers(len(LANDMARK_TINTS))),
        x=12.0 + 25.0 * column + float(rng.uniform(-6.0, 6.0)),
        y=float(rng.uniform(10.0, 54.0)),
        radius=float(rng.uniform(5.0, 7.5)),
    )


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene: a still camera in about 65 %, an event in about 14 %, two objects in about 10 %."""
    event = ("none", "leaves", "hides")[int(rng.choice(3, p=(0.86, 0.07, 0.07)))]
    pair = event == "none" and rng.random() < 0.115
    camera = tuple(CAMERAS)[int(rng.choice(3, p=(0.60, 0.20, 0.20)))]
    if event != "none" or pair:
        camera = "still"
    actor = _sample_actor(rng, row=0 if pair else None, taken=None)
    if event != "none":
        # The object starts in view: leaving swings through the middle, hiding swings out of the pillar's side.
        side = float(rng.integers(2)) * np.pi if event == "leaves" else np.pi
        start = side + float(rng.uniform(-0.5, 0.5) if event == "leaves" else rng.uniform(-1.2, 1.2))
        actor = replace(actor, motion="swaying", speed="slowly", phase=start)
    return Scene(
        actor=actor,
        second=_sample_actor(rng, row=1, taken=actor.colour) if pair else None,
        background=_choice(rng, BACKGROUNDS),
        texture=TEXTURES[
            int(rng.choice(4, p=(0.25, 0.25, 0.25, 0.25) if camera == "still" else (0.35, 0.3, 0.2, 0.15)))
        ],
        texture_x=float(rng.uniform(0.0, 32.0)),
        texture_y=float(rng.uniform(0.0, 32.0)),
        camera=camera,
        camera_phase=float(rng.uniform(0.0, 2.0 * np.pi)),
        event=event,
        landmarks=() if camera == "still" else tuple(_sample_landmark(rng, column) for column in range(5)),
        says_speed=bool(event == "none" and (pair or rng.random() < 0.85)),
    )


def _is_held_back(scene: Scene) -> bool:
    """Find that the scene's combination of prompted attributes is kept out of the training set."""
    first = (scene.actor.shape, scene.actor.colour, scene.actor.motion, scene.background, scene.texture)
    return zlib.crc32(" ".join(first).encode()) % HELD_BACK_SHARE == 0


def draw_scene(seed: int, stream: int, index: int, *, held_back: bool) -> Scene:
    """First scene of a stream of random numbers that is held back from training, or that is not."""
    rng = np.random.default_rng([seed, stream, index])
    while _is_held_back(scene := sample_scene(rng)) != held_back:
        pass
    return scene


def held_back_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Scenes whose combinations of prompted attributes no training scene has."""
    return [draw_scene(seed, 1, index, held_back=True) for index in range(count)]


def describe(scene: Scene) -> str:
    """Caption: every prompted attribute, nothing about size, phase or landmarks."""
    actor = scene.actor
    words = [f"a {actor.colour} {actor.shape} {actor.motion}"]
    if scene.event != "none":
        words.append(EVENTS[scene.event])
    elif scene.says_speed:
        words.append(actor.speed)
    if scene.second is not None:
        other = scene.second
        words.append(f"and a {other.colour} {other.shape} {other.motion} {other.speed}")
    article = "an" if scene.background[0] in "aeiou" else "a"
    words.append(f"over {article} {scene.background} {scene.texture} background")
    if scene.camera != "still":
        words.append(f"with the camera {scene.camera}")
    return " ".join(words)


def _find(text: str, names: Iterable[str]) -> str | None:
    found = [(text.find(f" {name} "), name) for name in names if f" {name} " in text]
    return min(found)[1] if found else None


def _parse_actor(text: str) -> dict[str, str | None]:
    kinds = {"shape": SHAPES, "colour": COLOURS, "motion": MOTIONS, "speed": SPEEDS}
    return {name: _find(text, kind) for name, kind in kinds.items()}


def parse_caption(text: str) -> dict[str, Any]:
    """Read the prompted attributes back from a caption in the words of :func:`describe`.

    Returns:
        ``shape, colour, motion, speed, background, texture, camera, event`` as names (None where the caption is
        silent; camera and event default to ``still`` and ``none``) and ``second``: the first four of the second
        object, or None.
    """
    padded = f" {' '.join(text.lower().replace(',', ' ').split())} "
    padded = padded.replace(" over an ", " over a ")
    if " over a " not in padded or " background " not in padded:
        raise ValueError(f"caption={text!r} has no 'over a COLOUR TEXTURE background': write it like describe() does.")
    objects, _, rest = padded.partition(" over a ")
    scenery, _, camera = rest.partition(" background ")
    first, joined, other = f"{objects} ".partition(" and a ")
    event = next((name for name, words in EVENTS.items() if words and words in objects), "none")
    return {
        **_parse_actor(first + " "),
        "background": _find(f" {scenery} ", BACKGROUNDS),
        "texture": _find(f" {scenery} ", TEXTURES),
        "camera": _find(f" {camera} ", [name for name in CAMERAS if name != "still"]) or "still",
        "event": event,
        "second": _parse_actor(f" {other} ") if joined else None,
    }


def _camera_offset(scene: Scene, frame_indices: np.ndarray) -> np.ndarray:
    """Distance of the view from the left end of the strip, (F,) float64, pixels of a 64-pixel frame."""
    seconds = np.asarray(frame_indices, dtype=np.float64) / FPS
    if scene.camera == "still":
        return np.full(seconds.shape, PAN_RANGE / 2)
    angle = 2.0 * np.pi * seconds / CAMERAS[scene.camera] + scene.camera_phase
    return PAN_RANGE / 2 * (1.0 + np.sin(angle))


def trajectory(actor: Actor, frame_indices: np.ndarray, event: str) -> tuple[np.ndarray, np.ndarray]:
    """Centre (F, 2) and radius (F,), float64, pixels of a 64-pixel frame."""
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
        # Triangle waves.
        x = x + actor.reach * (2.0 / np.pi * np.arcsin(np.sin(angle)))
        y = y + actor.reach * (2.0 / np.pi * np.arcsin(np.sin(1.6 * angle + 1.0)))
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
    return np.partition(_half_planes(x, y, 5, np.float32(0.46) * radius), -2, axis=0)[-2]


def coverage(actor: Actor, frame_indices: np.ndarray, size: int, event: str) -> np.ndarray:
    """Anti-aliased coverage of the object before occlusion, (F, size, size) float32."""
    center, radius = trajectory(actor, frame_indices, event)
    pixel = np.float32(SIZE / size)
    grid = (np.arange(size, dtype=np.float32) + 0.5) * pixel
    x = grid[None, None, :] - center[:, 0, None, None].astype(np.float32)
    y = grid[None, :, None] - center[:, 1, None, None].astype(np.float32)
    distance = _signed_distance(actor.shape, x, y, radius[:, None, None].astype(np.float32))
    return np.clip(0.5 - distance / pixel, 0.0, 1.0)


def pillar(size: int) -> np.ndarray:
    """Coverage of each column by the pillar, (size,) float32."""
    pixel = SIZE / size
    grid = (np.arange(size) + 0.5) * pixel
    return np.clip((grid - PILLAR_LEFT) / pixel + 0.5, 0.0, 1.0).astype(np.float32)


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
    offsets = _camera_offset(scene, np.zeros(1) if scene.camera == "still" else frame_indices)
    strip = _panorama(scene, size, columns_per_pixel)
    # A pixel sees the mean of its columns, wherever the view stands.
    width = strip.shape[1] - columns_per_pixel
    strip = np.mean([strip[:, shift : shift + width] for shift in range(columns_per_pixel)], axis=0)
    position = offsets[:, None] * (size / SIZE) * columns_per_pixel + np.arange(size)[None, :] * columns_per_pixel
    left = np.floor(position).astype(np.int64)
    weight = (position - left).astype(np.float32)[..., None]
    views = zip(left, weight, strict=True)
    return np.stack([strip[:, at] * (1.0 - share) + strip[:, at + 1] * share for at, share in views])


def render(scene: Scene, frame_indices: np.ndarray, *, size: int = SIZE) -> np.ndarray:
    """Render frames of a scene, (F, size, size, 3) uint8 RGB; a pure function of (F,) indices, 16 a second."""
    frame_indices = np.asarray(frame_indices)
    if frame_indices.ndim != 1:
        raise ValueError(
            f"frame_indices has {frame_indices.ndim} dimensions, must have 1: pass np.arange(num_frames)."
        )
    if size < 8:
        raise ValueError(f"size={size} is below 8 pixels: use 64, the size the mini model is trained at.")
    image = _backdrop(scene, frame_indices, size)
    for actor in [scene.actor] if scene.second is None else [scene.actor, scene.second]:
        alpha = coverage(actor, frame_indices, size, scene.event)[..., None]
        image = image + alpha * (np.asarray(COLOURS[actor.colour], dtype=np.float32) - image)
    if scene.event == "hides":
        image = image + pillar(size)[:, None] * (np.asarray(PILLAR_COLOUR, dtype=np.float32) - image)
    return np.clip(image + 0.5, 0.0, 255.0).astype(np.uint8)
