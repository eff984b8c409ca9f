"""Lists of prompts of any origin, prompts over time, and the seeds of the noise."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longtake.configs.fields import choose, did_you_mean
from longtake.evaluation.mini_world.scenes import describe, held_back_scenes

SUITE = "suite:"
PROMPT_SEED = 64  # of the held-back scenes; not the ones the mini model's score uses
_SEED_STEP = 1_000_003  # between the noise seeds of one prompt
_NUM_SCENES = 16  # scenes of ``suite:moving_scenes`` where no number is given; there is no end of them


@dataclass(frozen=True, kw_only=True)
class _Text:
    """A text that metrics judge by, and a longer one for the model, if another."""

    text: str
    extended: str = ""

    @property
    def generated_from(self) -> str:
        return self.extended or self.text


@dataclass(frozen=True, kw_only=True)
class Change(_Text):
    """A later prompt of a video, from the first block on that starts at or after ``start_s`` seconds."""

    start_s: float


@dataclass(frozen=True, kw_only=True)
class Prompt(_Text):
    """The text of a video, later ones in order of time, and VBench's dimensions where its list has them."""

    changes: tuple[Change, ...] = ()
    dimensions: tuple[str, ...] = ()


def _moving_scenes(count: int | None) -> list[Prompt]:
    """Captions of held-back scenes of the mini model's world; the first ones are the same for every number."""
    scenes = held_back_scenes(_NUM_SCENES if count is None else count, seed=PROMPT_SEED)
    return [Prompt(text=describe(scene)) for scene in scenes]


SUITES: dict[str, Callable[[int | None], list[Prompt]]] = {"moving_scenes": _moving_scenes}


def load_prompts(
    source: str,
    *,
    extended: str | None = None,
    count: int | None = None,
    dimensions: Sequence[str] = (),
    segment_seconds: float | None = None,
    seconds: float = 0.0,
) -> list[Prompt]:
    """Read a list of prompts; the options are those of a protocol.

    ``source`` is ``suite:NAME``; a text file with one prompt per line, such as MovieGen's; a JSON list such as
    ``VBench_full_info.json`` (``prompt_en``, ``dimension``); or JSON lines with ``prompt`` and, if wanted,
    ``prompt_extended`` and ``segments`` (a list of ``start_s`` and ``prompt``).
    """
    length = 1 if segment_seconds is None else _num_segments(seconds, segment_seconds)
    if count is not None and count < 1:
        raise ValueError(f"num_prompts={count}: give 1 or more")
    if source.startswith(SUITE):
        suite = choose(SUITES, source.removeprefix(SUITE), what="suite of prompts")
        # A suite has no end, so it is asked for as many prompts as the videos' segments take.
        prompts = suite((_NUM_SCENES if count is None else count) * length)
    else:
        prompts = _read(Path(source))
    if extended is not None:
        prompts = _with_twins(prompts, Path(extended), source=source)
    if dimensions:
        known = sorted({name for prompt in prompts for name in prompt.dimensions})
        if not known:
            raise ValueError(f"dimensions={list(dimensions)}: the prompts of {source} name no dimensions")
        if unknown := [name for name in dimensions if name not in known]:
            raise ValueError(f"unknown dimension {unknown[0]!r} in {source}; known: {', '.join(known)}.")
        prompts = [prompt for prompt in prompts if set(prompt.dimensions) & set(dimensions)]
    if segment_seconds is not None:
        prompts = _grouped(prompts, length, segment_seconds)
    if count is not None and count > len(prompts):
        raise ValueError(f"num_prompts={count}: {source} has prompts for {len(prompts)} videos only")
    if not prompts:
        raise ValueError(f"{source} has too few prompts for one video of {length} segments")
    return prompts[:count]


def video_seed(prompt_index: int, seed_index: int) -> int:
    """Noise seed of a video: the same for every policy, different between prompts."""
    return _SEED_STEP * seed_index + prompt_index


def prompts_sha256(prompts: Iterable[Prompt]) -> str:
    """Hash of everything that a list of prompts says, 64 hexadecimal digits."""
    rows = [
        [p.text, p.extended, [[c.start_s, c.text, c.extended] for c in p.changes], list(p.dimensions)] for p in prompts
    ]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def _read(path: Path) -> list[Prompt]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = [SUITE + name for name in SUITES]
        hint = did_you_mean(path.name, [*SUITES, *known])
        raise ValueError(f"cannot read the prompts {path}: {error}; suites: {', '.join(known)}.{hint}") from error
    lines = {f"{path}, line {number}": line.strip() for number, line in enumerate(text.splitlines(), start=1)}
    lines = {where: line for where, line in lines.items() if line}
    if path.suffix.lower() == ".json":
        rows = _parse(text, str(path))
        if not isinstance(rows, list):
            raise ValueError(f"{path} holds a {type(rows).__name__}: a list of prompts is needed")
        prompts = [_entry(row, f"{path}, entry {number}") for number, row in enumerate(rows, start=1)]
    elif path.suffix.lower() == ".jsonl":
        prompts = [_entry(_parse(line, where), where) for where, line in lines.items()]
    else:
        prompts = [Prompt(text=line) for line in lines.values() if not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{path} holds no prompts: write one per line")
    for number, prompt in enumerate(prompts, start=1):
        if not all(part.text.strip() for part in (prompt, *prompt.changes)):
            raise ValueError(f"{path}, prompt {number}: the prompt is empty")
    return prompts


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error


def _entry(row: Any, where: str) -> Prompt:
    if isinstance(row, str):
        return Prompt(text=row.strip())
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: {row!r} is no prompt: give a text, or a mapping with the key prompt")
    if "prompt_en" in row:
        # VBench's own list; its further keys are for metrics that only the official tool computes.
        return Prompt(text=str(row["prompt_en"]), dimensions=tuple(row.get("dimension", ())))
    known = ("prompt", "prompt_extended", "segments")
    if key := next((key for key in row if key not in known), None):
        raise ValueError(f"{where}: unknown key {key!r}; known: {', '.join(known)}.{did_you_mean(key, known)}")
    if "prompt" not in row:
        raise ValueError(f"{where} lacks the key 'prompt'")
    try:
        changes = tuple(Change(start_s=float(part["start_s"]), **_texts(part)) for part in row.get("segments") or ())
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: segments need start_s (seconds) and prompt") from error
    starts = [change.start_s for change in changes]
    if starts != sorted(set(starts)) or (starts and starts[0] <= 0):
        raise ValueError(f"{where}: segments start at {starts}: give rising, different times above 0")
    return Prompt(changes=changes, **_texts(row))


def _texts(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": str(row["prompt"]), "extended": str(row.get("prompt_extended") or "")}


def _with_twins(prompts: Sequence[Prompt], path: Path, *, source: str) -> list[Prompt]:
    twins = _read(path)
    if len(twins) != len(prompts):
        raise ValueError(
            f"{path} has {len(twins)} extended prompts for the {len(prompts)} of {source}: give one per prompt, in "
            "the same order"
        )
    return [replace(short, extended=twin.text) for short, twin in zip(prompts, twins, strict=True)]


def _num_segments(seconds: float, segment_seconds: float) -> int:
    if not 0 < segment_seconds < seconds:
        raise ValueError(
            f"segment_seconds={segment_seconds:g} does not divide a video of {seconds:g} s: give less than its length"
        )
    return -int(-seconds // segment_seconds)


def _grouped(prompts: Sequence[Prompt], length: int, segment_seconds: float) -> list[Prompt]:
    """One video per ``length`` consecutive prompts."""
    if any(prompt.changes for prompt in prompts):
        raise ValueError("segment_seconds: the prompts have segments of their own already: leave it out")
    if len(prompts) % length:
        raise ValueError(
            f"{len(prompts)} prompts do not make whole videos of {length} segments: give a multiple of {length}"
        )
    videos = []
    for start in range(0, len(prompts), length):
        first, *later = prompts[start : start + length]
        changes = (
            Change(start_s=number * segment_seconds, text=prompt.text, extended=prompt.extended)
            for number, prompt in enumerate(later, start=1)
        )
        videos.append(replace(first, changes=tuple(changes), dimensions=()))
    return videos
