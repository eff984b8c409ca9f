"""A run's videos in the official VBench's layout, with a script that scores them and a recipe for its packages."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longtake.configs.fields import did_you_mean
from longtake.evaluation.records import ManifestLine, read_manifest, write_atomically, write_json
from longtake.evaluation.scores import QUALITY, SEMANTIC

COMMIT = "45e79ec14e69a2187202c675d2dbce1a71843d53"
DIMENSIONS = (*QUALITY, *SEMANTIC)
"""All sixteen, as the official tool spells them."""
CUSTOM_DIMENSIONS = (*QUALITY, "overall_consistency")
"""What is scored on videos of one's own: the README's six, and two more that run though it does not list them."""
PROMPT_DIMENSIONS = ("overall_consistency", "temporal_style", "human_action")
"""Run on videos of one's own, and read the prompt."""
LONG_DIMENSIONS = tuple(name for name in QUALITY if name != "temporal_flickering")
"""VBench-Long's on videos of one's own; it would read prompts from folder names, so none that needs a prompt."""
FOLDERS = {
    "background_consistency": "scene",
    "aesthetic_quality": "overall_consistency",
    "imaging_quality": "overall_consistency",
    "motion_smoothness": "subject_consistency",
    "dynamic_degree": "subject_consistency",
}
"""Dimensions that are scored on another dimension's videos; the others have their own name."""
NUM_SAMPLES = 5
MAX_NAME_BYTES = 255
LONG_SECONDS = 5.0
"""VBench's FAQ: VBench below, VBench-Long from here on."""
MAX_CRF = 12
"""Above it the codec shows in flickering and imaging quality; our own default for evaluation."""


def _check_dimensions(dimensions: Sequence[str], allowed: Sequence[str], *, mode: str) -> None:
    """Refuse dimensions that a mode of the official tool does not have.

    Raises:
        ValueError: If one is unknown, not of this mode, or given twice, or there is none.
    """
    for name in dimensions:
        if name not in DIMENSIONS:
            raise ValueError(
                f"unknown dimension {name!r}; known: {', '.join(DIMENSIONS)}.{did_you_mean(name, DIMENSIONS)}"
            )
        if name not in allowed:
            raise ValueError(f"dimension {name!r} is not scored in mode {mode}: use {', '.join(allowed)}.")
    if not dimensions or len(set(dimensions)) < len(dimensions):
        raise ValueError(f"dimensions={list(dimensions)}: name one or more, each once.")


def _folder_of(dimension: str) -> str:
    """The folder whose videos a dimension is scored on in standard mode."""
    return FOLDERS.get(dimension, dimension)


_HEAD = """\
#!/usr/bin/env bash
# Scores the videos beside this file with the official VBench. Needs a CUDA GPU and the environment of README.md.
# Every dimension gets a process and a folder of results of its own: decord's settings leak from one to the next.
set -euo pipefail
here="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
commit={commit}
mode={mode}
dev_flag={dev_flag}  # of VBench-Long: false = in-clip consistency alone, true = half of it clip to clip
: "${{VBENCH_HOME:?set VBENCH_HOME to a checkout of github.com/Vchitect/VBench at commit $commit}}"
# The official tool pastes paths into shell commands.
case "$here" in
  *[!A-Za-z0-9._/-]*) echo "move this folder to a path of letters, digits, '.', '_', '-' and '/': $here" >&2; exit 2 ;;
esac
if [ -e "$here/results" ] || [ -e "$here/videos/split_clip" ]; then
  echo "this export was scored before, and VBench would use its old clips again: export to a new folder" >&2
  exit 2
fi
at="$(git -C "$VBENCH_HOME" rev-parse HEAD 2>/dev/null || echo unknown)"
if [ "$at" != "$commit" ]; then echo "note: VBench is at $at, this script was written for $commit" >&2; fi
cd "$VBENCH_HOME"
"""
_RECORD = """\
  printf '{"mode": "%s", "dev_flag": %s, "commit": "%s"}\\n' "$mode" "$dev_flag" "$at" > "$results/run_info.json"
done
echo "done: import with 'longtake evaluate import-vbench $here/results/*/*_eval_results.json'"
"""
_CUSTOM = """\
for dimension in {dimensions}; do
  results="$here/results/$dimension"
  mkdir -p "$results"
  python evaluate.py --videos_path "$here/videos" --output_path "$results" --dimension "$dimension" \\
    --mode=custom_input --prompt_file "$here/prompt_file.json"
"""
_LONG = """\
flags=()
if [ "$dev_flag" = true ]; then flags+=(--dev_flag); fi
for dimension in {dimensions}; do
  results="$here/results/$dimension"
  mkdir -p "$results"
  python vbench2_beta_long/eval_long.py --videos_path "$here/videos" --output_path "$results" \\
    --dimension "$dimension" --mode long_custom_input ${{flags[@]+"${{flags[@]}}"}}
"""
_STANDARD = """\
for pair in {pairs}; do  # dimension:folder
  dimension="${{pair%%:*}}"
  results="$here/results/$dimension"
  mkdir -p "$results"
  python evaluate.py --videos_path "$here/videos/${{pair##*:}}" --output_path "$results" --dimension "$dimension" \\
    --full_json_dir "$here/VBench_full_info.json" --mode=vbench_standard
"""


def _run_script(mode: str, dimensions: Sequence[str], *, dev_flag: bool | None) -> str:
    """A bash script that scores an export, dimension by dimension.

    Args:
        mode: The official tool's ``--mode``.
        dimensions: To score.
        dev_flag: VBench-Long's; None where there is none.

    Returns:
        Its text; results go to ``results/DIMENSION/``, with a ``run_info.json`` that says how they were made.
    """
    head = _HEAD.format(commit=COMMIT, mode=mode, dev_flag={None: "null", True: "true", False: "false"}[dev_flag])
    if mode == "vbench_standard":
        body = _STANDARD.format(pairs=" ".join(f"{name}:{_folder_of(name)}" for name in dimensions))
    else:
        body = (_LONG if mode == "long_custom_input" else _CUSTOM).format(dimensions=" ".join(dimensions))
    return head + body + _RECORD


ENVIRONMENT = f"""\
git clone https://github.com/Vchitect/VBench.git && cd VBench && git checkout {COMMIT[:7]}
python3.10 -m venv .venv && . .venv/bin/activate
pip install torch==2.3.1 torchvision==0.18.1 --index-url https://download.pytorch.org/whl/cu121
pip install 'setuptools<81' wheel 'numpy<2' 'moviepy<2' 'opencv-python<4.12'
pip install 'transformers==4.33.2' 'timm<=1.0.12' 'pyiqa==0.1.10' openai-clip decord fairscale lvis pycocoevalcap
pip install 'scenedetect[opencv]' dreamsim 'av<13'        # VBench-Long only
pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'   # object, color, relation
export VBENCH_HOME=$PWD                                    # weights: ~/.cache/vbench, or VBENCH_CACHE_DIR
"""
"""Commands that set up the official tool in an environment of its own."""

_README = """\
# Videos for the official VBench

Mode `{mode}`, dimensions {dimensions}.

```
{environment}./run.sh
longtake evaluate import-vbench results/*/*_eval_results.json
```

The environment was put together from the tool's requirements and issue threads; it has not been run by us. Why these
versions:

- `openai-clip` and ViCLIP's text file import `pkg_resources`, which is gone from setuptools 81 on; an unpinned
  install takes a newer one.
- VBench-Long uses `torchvision.io.write_video` (with PyAV), which the newest torchvision no longer has, and imports
  `moviepy.editor`, which is gone in moviepy 2. torchvision's default of antialiasing, which its clip-to-clip branch
  depends on, is that of 0.17 and later here.
- `torch.load` of AMT's weights needs torch before 2.6, or a checkout that passes `weights_only=False`.
- The package on PyPI (0.1.5) has neither VBench-Long's `configs/` nor `scripts/`: use a checkout.
- detectron2 goes in after torch and before anything that pulls another torch; only `object_class`,
  `multiple_objects`, `color` and `spatial_relationship` need it.

What to know:

- It needs a CUDA GPU, also for dimensions that would not (`nccl`, `torch.cuda.set_device`).
- VBench-Long cuts clips with a lossy codec and keeps them in `videos/`: export anew to score anew. Its score is a
  mean over clips; the consistencies change with `--dev_flag`, which the imported names tell apart.
- An underscore in a file name would switch VBench-Long's clip-to-clip term off without a word: these names have none.
- `temporal_flickering` is meant for static scenes: on free prompts it mostly measures motion.
{notes}"""


def readme(mode: str, dimensions: Sequence[str], notes: Sequence[str]) -> str:
    """The README of an export: how to set the tool up, how to run it, what to know about its numbers.

    Args:
        mode: The official tool's ``--mode``.
        dimensions: To score.
        notes: On these videos.
    """
    lines = [f"- {note[0].upper()}{note[1:]}.\n" for note in notes]
    if mode == "vbench_standard" and any(name in FOLDERS for name in dimensions):
        lines.append("- Some dimensions are scored on other dimensions' videos, as VBench has it; see `run.sh`.\n")
    return _README.format(
        mode=mode,
        dimensions=", ".join(f"`{name}`" for name in dimensions),
        environment=ENVIRONMENT,
        notes="".join(lines),
    )


EXPORT_FILE = "export.json"


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was laid out.

    Attributes:
        mode: The official tool's ``--mode``.
        dimensions: To be scored.
        dev_flag: VBench-Long's ``--dev_flag``; None where there is no such flag.
        commit: Of the official repository that the script is written for.
        files: {path below ``videos/``: id in the run}.
        notes: What a reader of the scores should know.
    """

    mode: str
    dimensions: tuple[str, ...]
    dev_flag: bool | None
    commit: str
    files: Mapping[str, str]
    notes: tuple[str, ...]


def export_custom(run: Path, out: Path, *, dimensions: Sequence[str] = CUSTOM_DIMENSIONS) -> Export:
    """Lay videos out for VBench on whole videos, mode ``custom_input``.

    Args:
        run: Folder with ``manifest.jsonl``.
        out: New or empty folder: ``videos/p0007-0.mp4``, ``prompt_file.json``, ``run.sh``, ``README.md``,
            ``export.json``. Videos are hard links where the disk allows it, else copies.
        dimensions: To score.

    Returns:
        What was laid out.

    Raises:
        ValueError: If the folder is not empty, a video is missing or no ``.mp4``, a prompt is missing, or a dimension
            needs VBench's own prompts. Nothing is left behind.
    """
    _check_dimensions(dimensions, (*CUSTOM_DIMENSIONS, "temporal_style", "human_action"), mode="custom")
    lines = _lines(run)
    needing = [name for name in dimensions if name in PROMPT_DIMENSIONS]
    if needing and (nameless := [line.id for line in lines if not line.prompt]):
        raise ValueError(f"video {nameless[0]!r} has no prompt, and {needing[0]} reads it: leave that dimension out.")
    notes = _notes(lines)
    if any(_seconds(line) >= LONG_SECONDS for line in lines):
        notes.append(f"videos of {LONG_SECONDS:g} s and more: VBench's FAQ says VBench-Long; mode long is for that")
    links = {f"{_name(line)}.mp4": line for line in lines}
    prompts = {name: line.prompt for name, line in links.items()}
    return _write(run, out, "custom_input", dimensions, links, notes=notes, extra={"prompt_file.json": prompts})


def export_long(
    run: Path, out: Path, *, dimensions: Sequence[str] = LONG_DIMENSIONS, dev_flag: bool = False
) -> Export:
    """Lay videos out for VBench-Long, mode ``long_custom_input``: clips of two seconds.

    Args:
        run: Folder with ``manifest.jsonl``.
        out: New or empty folder, as for :func:`export_custom` without the prompts, which this mode does not read. The
            official tool writes its clips into it and uses them again, so it must not have been used before.
        dimensions: To score.
        dev_flag: Half clip-to-clip consistency through a quantile table (the tool's ``--dev_flag``) instead of
            in-clip consistency alone. Papers rarely say which they used.

    Returns:
        What was laid out.

    Raises:
        ValueError: As for :func:`export_custom`.
    """
    _check_dimensions(dimensions, LONG_DIMENSIONS, mode="long")
    lines = _lines(run)
    notes = _notes(lines)
    if any(0 < _seconds(line) < LONG_SECONDS for line in lines):
        notes.append(f"videos under {LONG_SECONDS:g} s: VBench's FAQ says VBench; mode custom is for that")
    links = {f"{_name(line)}.mp4": line for line in lines}
    return _write(run, out, "long_custom_input", dimensions, links, notes=notes, dev_flag=dev_flag)


def export_standard(
    run: Path,
    out: Path,
    *,
    full_info: Path | None = None,
    dimensions: Sequence[str] = DIMENSIONS,
    num_samples: int = NUM_SAMPLES,
    allow_missing: bool = False,
) -> Export:
    """Lay videos of VBench's own prompts out for mode ``vbench_standard``: ``videos/FOLDER/PROMPT-0.mp4``.

    Args:
        run: Folder with ``manifest.jsonl``; prompts as VBench has them, also where a
            longer text was generated from.
        out: New or empty folder.
        full_info: VBench's ``VBench_full_info.json``.
        dimensions: To score.
        num_samples: Videos per prompt.
        allow_missing: Lay out what is there. VBench only warns of missing videos, and its score is then of others.

    Returns:
        What was laid out.

    Raises:
        ValueError: As for :func:`export_custom`; if the list cannot be read, a prompt of the run is not in it, or
            a video of it is not in the run.
    """
    _check_dimensions(dimensions, DIMENSIONS, mode="standard")
    if full_info is None:
        raise ValueError("mode standard needs VBench's list of prompts: give the path of VBench_full_info.json.")
    prompts = _read_full_info(full_info)
    lines, links, missing = _lines(run), {}, []
    found = {(line.prompt, line.seed_index): line for line in lines}
    if strange := sorted({line.prompt for line in lines} - prompts.keys()):
        raise ValueError(f"{len(strange)} prompts of the run are not in {full_info.name}, e.g. {strange[0][:80]!r}.")
    for prompt, members in prompts.items():
        folders = sorted({_folder_of(name) for name in members if name in dimensions})
        for sample in range(num_samples if folders else 0):
            name = f"{prompt}-{sample}.mp4"
            _check_name(name)
            if (line := found.get((prompt, sample))) is None:
                missing.append(name)
                continue
            links.update({f"{folder}/{name}": line for folder in folders})
    if missing and not (allow_missing and links):
        raise ValueError(
            f"{len(missing)} videos of {', '.join(dimensions[:3])}... are not in the run, e.g. {missing[0]!r}: "
            "generate them, or choose fewer dimensions, or allow missing ones and compare with nobody."
        )
    notes = _notes(lines)
    if missing:
        notes.append(f"{len(missing)} videos are missing: not comparable with published numbers")
    if "temporal_flickering" in dimensions:
        notes.append("VBench takes 25 samples per prompt for temporal_flickering, and filters static videos first")
    info = json.loads(full_info.read_text(encoding="utf-8"))
    return _write(run, out, "vbench_standard", dimensions, links, notes=notes, extra={"VBench_full_info.json": info})


def _read_full_info(path: Path) -> dict[str, tuple[str, ...]]:
    """Read VBench's list of prompts.

    Returns:
        {prompt: the dimensions it belongs to}, in the list's order.

    Raises:
        ValueError: If it cannot be read or is no such list.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        prompts: dict[str, tuple[str, ...]] = {}
        for entry in entries:
            prompts[entry["prompt_en"]] = (*prompts.get(entry["prompt_en"], ()), *entry["dimension"])
    except (OSError, UnicodeDecodeError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"cannot read VBench's list of prompts from {path}: {error!r}") from error
    return prompts


def _lines(run: Path) -> list[ManifestLine]:
    lines = read_manifest(run / "manifest.jsonl")
    if not lines:
        raise ValueError(f"{run} has no videos: generate some first.")
    names: dict[str, str] = {}
    for line in lines:
        path = run / line.file
        if path.suffix != ".mp4" or not path.is_file():
            raise ValueError(f"video {line.id!r} at {path} is no .mp4 file: the official tool reads no other.")
        if (other := names.setdefault(_name(line), line.id)) != line.id:
            raise ValueError(
                f"videos {other!r} and {line.id!r} have the same prompt and seed index: give each its own."
            )
    return lines


def _name(line: ManifestLine) -> str:
    """Without an underscore, at which VBench-Long cuts names and then finds no clip-to-clip term."""
    return f"p{line.prompt_index:04d}-{line.seed_index}"


def _check_name(name: str) -> None:
    if "/" in name or "\0" in name or len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"{name[:60]!r}... cannot be a file name (no '/', at most {MAX_NAME_BYTES} bytes).")


def _seconds(line: ManifestLine) -> float:
    return line.num_frames / line.fps if line.fps else 0.0


def _notes(lines: Iterable[ManifestLine]) -> list[str]:
    rates = {line.encoder.get("crf") for line in lines}
    if None in rates:
        return [
            "the manifest does not say how all videos were encoded: lossy codecs move flickering and imaging quality"
        ]
    worst = max(rates)
    return [f"videos are encoded at crf {worst}: use {MAX_CRF} or less for evaluation"] if worst > MAX_CRF else []


def _write(
    run: Path,
    out: Path,
    mode: str,
    dimensions: Sequence[str],
    links: Mapping[str, ManifestLine],
    *,
    notes: list[str],
    dev_flag: bool | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Export:
    """Make the folder beside its place and move it there whole."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty: VBench uses clips again that it finds, so give a new folder.")
    place = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    place.mkdir(parents=True)
    try:
        copied = sum(_link(run / line.file, place / "videos" / name) for name, line in links.items())
        if copied:
            notes = [*notes, f"{copied} of {len(links)} videos are copies: this disk takes no hard links to them"]
        export = Export(
            mode=mode,
            dimensions=tuple(dimensions),
            dev_flag=dev_flag,
            commit=COMMIT,
            files={name: line.id for name, line in sorted(links.items())},
            notes=tuple(notes),
        )
        for name, content in (extra or {}).items():
            write_json(place / name, content)
        write_json(place / EXPORT_FILE, asdict(export))
        write_atomically(place / "README.md", readme(mode, dimensions, notes))
        write_atomically(place / "run.sh", _run_script(mode, dimensions, dev_flag=dev_flag))
        (place / "run.sh").chmod(0o755)
        place.replace(out)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return export


def _link(source: Path, target: Path) -> bool:
    """Hard link; True if it had to be a copy, e.g. onto another disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        return True
    return False
