"""This tree beside an earlier revision: equal outputs, the same capabilities, the ratio of times.

``python -m benchmarks.against_revision REVISION [outputs|capabilities|speed]`` checks the revision out into a
temporary folder and runs the same probe in both trees, one process after the other, with the same Python.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
PROBE = Path(__file__).with_name("revision_probe.py")
PROMPT = "a red circle bouncing quickly over a navy striped background"
out = Console()


class Part(StrEnum):
    """Parts of the comparison."""

    OUTPUTS = "outputs"
    CAPABILITIES = "capabilities"
    SPEED = "speed"


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A worktree of a revision, removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", place, revision], cwd=ROOT, check=True)
        try:
            yield place
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", place], cwd=ROOT, check=True)


def _environment(tree: Path) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return os.environ | offline | {"PYTHONPATH": str(tree)}


def probe(tree: Path, part: Part) -> dict[str, Any]:
    """What a tree says of itself, as ``revision_probe.py`` asks it."""
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, str(PROBE), part.value, str(ROOT), str(Path(work) / "answer.json")]
        subprocess.run(command, cwd=work, env=_environment(tree), check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(work) / "answer.json").read_text())


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Lines about everything that is not equal."""
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if key not in after:
            lines.append(f"gone:    {key}")
        elif key not in before:
            lines.append(f"new:     {key}")
        elif before[key] != after[key]:
            lines.append(f"differs: {key}: {before[key]} -> {after[key]}")
    return lines


def _seconds(tree: Path, length: float) -> float:
    with tempfile.TemporaryDirectory() as work:
        words = ["generate", PROMPT, "--seconds", str(length), "--out", "run"]
        start = time.perf_counter()
        command = [sys.executable, "-m", "longtake.scripts.main", *words]
        subprocess.run(command, cwd=work, env=_environment(tree), check=True, capture_output=True)
        return time.perf_counter() - start


def race(before: Path, after: Path, *, length: float, repeats: int) -> None:
    """Run both trees in turn and print the times and the median of the pairs' ratios."""
    table = Table("run", "before, s", "after, s", "ratio")
    pairs = []
    for number in range(repeats + 1):  # the first warms the file cache and is left out
        first, second = (before, after) if number % 2 else (after, before)
        times = {tree: _seconds(tree, length) for tree in (first, second)}
        if number:
            pairs.append((times[before], times[after]))
            table.add_row(str(number), *(f"{t:.2f}" for t in pairs[-1]), f"{pairs[-1][1] / pairs[-1][0]:.3f}")
    out.print(table)
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    ratio = statistics.median(late / early for early, late in pairs)
    out.print(f"medians {medians[0]:.2f} s and {medians[1]:.2f} s, median ratio {ratio:.3f}")


def main(
    revision: Annotated[str, typer.Argument(help="A commit, branch or tag.")],
    part: Annotated[Part | None, typer.Argument(help="One part; all without it.")] = None,
    seconds: Annotated[float, typer.Option(help="Length of the video that is timed.")] = 20,
    repeats: Annotated[int, typer.Option(help="Timed runs of each tree.", min=1)] = 5,
) -> None:
    """Compare this tree with an earlier revision."""
    differences = 0
    with checked_out(revision) as old:
        for name in (Part.OUTPUTS, Part.CAPABILITIES):
            if part in (None, name):
                before, after = probe(old, name), probe(ROOT, name)
                lines = compare(before, after)
                same = len(before.keys() & after.keys()) - sum(line.startswith("differs") for line in lines)
                out.print(
                    f"{name.value}: {same} equal of {len(before)} before and {len(after)} after", *lines, sep="\n"
                )
                differences += sum(not line.startswith("new") for line in lines)
        if part in (None, Part.SPEED):
            race(old, ROOT, length=seconds, repeats=repeats)
    shutil.rmtree(ROOT / "__pycache__", ignore_errors=True)
    raise typer.Exit(differences > 0)


if __name__ == "__main__":
    typer.run(main)
