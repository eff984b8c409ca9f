"""Kill a run at random moments and check that it always goes on as if nothing had happened.

A reference run is made without interruption. Then a run of the same configuration is started, killed (SIGKILL, the
whole process group, video encoder included) and resumed until it is finished, and another one, until all kills are
spent. After every kill the log must be a beginning of the reference's; every finished run must have the reference's
frame hashes and a video that decodes to all its frames without a complaint.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import imageio_ffmpeg
import typer

from longtake.scripts.console import EXIT_BAD_INPUT, err, out

PROMPT = "a red circle bouncing quickly over a navy striped background"
POLL_SECONDS = 0.005
# One kill in five comes before the first new block: while the program loads, or cuts the video.
EARLY_SHARE = 0.2

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Settings:
    """How runs are made: words of the command line beside the folder, and the longest wait for a kill, in seconds."""

    words: tuple[str, ...]
    longest_wait: float


@app.command()
def kill_test(
    *,
    kills: Annotated[int, typer.Option(help="How many.")] = 20,
    seconds: Annotated[float, typer.Option(help="Length of the video.")] = 30.0,
    wait: Annotated[float, typer.Option(help="Longest time from the first new block to the kill.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    model: Annotated[str, typer.Option(help="Model family or folder.")] = "mini",
    cache: Annotated[str, typer.Option(help="Cache policy.")] = "attention_sink",
    prompt: Annotated[str, typer.Option(help="What to show.")] = PROMPT,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="Dotted overrides.")] = None,
) -> None:
    """Kill runs at random moments, resume them, and compare them with an uninterrupted one."""
    words = (prompt, "--seconds", str(seconds), "--model", model, "--cache", cache, "output.state_every_blocks=5")
    words += tuple(overrides or ())
    settings = Settings(words, wait)
    chooser = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="kill-test-") as name:
        folder = Path(name)
        reference = folder / "reference"
        _command("generate", *settings.words, "--out", str(reference)).wait()
        expected = hashes(reference)
        num_frames = decoded_frames(reference / "video.mp4")
        out.print(f"reference: {len(expected)} blocks, {num_frames} frames")
        spent, runs, faults = 0, 0, 0
        while spent < kills:
            runs += 1
            path = folder / f"run-{runs}"
            spent += _kill_until_finished(path, settings, chooser, kills - spent, expected)
            same = hashes(path) == expected
            plays = decoded_frames(path / "video.mp4") == num_frames
            faults += not (same and plays)
            out.print(f"run {runs}: {spent} kills so far; same hashes: {same}; video.mp4 plays in full: {plays}")
    out.print(f"{spent} kills in {runs} runs, {faults} faults")
    raise typer.Exit(1 if faults or not expected else 0)


def hashes(path: Path) -> list[str]:
    """Read the frame hashes of a run's finished blocks."""
    from longtake.pipelines.run_folder import RunFolder

    return [entry["sha256"] for entry in RunFolder(path).blocks()]


def decoded_frames(video: Path) -> int:
    """Decode a video from end to end.

    Args:
        video: The file.

    Returns:
        Number of frames, or -1 if the decoder complains.
    """
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "warning", "-i", str(video), "-f", "framemd5", "pipe:1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode or result.stderr:
        return -1
    return sum(not line.startswith("#") for line in result.stdout.splitlines())


def _kill_until_finished(
    path: Path, settings: Settings, chooser: random.Random, kills: int, expected: list[str]
) -> int:
    """Start, kill and resume one run until it is finished; returns the kills spent."""
    spent = 0
    while True:
        exists = path.exists()
        process = (
            _command("resume", str(path)) if exists else _command("generate", *settings.words, "--out", str(path))
        )
        if spent == kills:
            if process.wait():
                raise ValueError(f"resume failed with exit code {process.returncode}")
            return spent
        if not _kill_sometime(process, path, settings, chooser):
            if process.returncode:
                raise ValueError(f"the run failed with exit code {process.returncode}")
            return spent
        spent += 1
        done = hashes(path)
        if done != expected[: len(done)]:
            raise ValueError(f"{path}: a block differs from the reference after {spent} kills")
        frames = decoded_frames(path / "video.mp4") if (path / "video.mp4").exists() else 0
        err.print(f"  kill {spent} of this run: {len(done)} blocks logged, {max(frames, 0)} frames play")


def _kill_sometime(process: subprocess.Popen, path: Path, settings: Settings, chooser: random.Random) -> bool:
    """Kill at a random moment; false when the run was finished before."""
    is_early = chooser.random() < EARLY_SHARE
    before = _num_lines(path)
    deadline = time.monotonic() + chooser.uniform(0, 2 * settings.longest_wait)
    while process.poll() is None:
        if is_early and time.monotonic() >= deadline:
            break
        if not is_early and _num_lines(path) > before:
            time.sleep(chooser.uniform(0, settings.longest_wait))
            break
        time.sleep(POLL_SECONDS)
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


def _num_lines(path: Path) -> int:
    log = path / "blocks.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def _command(*words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "longtake.scripts.main", *words]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    try:
        app()
    except ValueError as error:
        err.print(f"kill test: {error}", style="red", markup=False)
        sys.exit(EXIT_BAD_INPUT)
