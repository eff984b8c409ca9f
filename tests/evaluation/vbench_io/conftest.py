"""A small run on disk: videos are bytes, since nothing here decodes them."""

from pathlib import Path

import pytest

from longtake.evaluation.records import ManifestLine, write_manifest


def _make(folder: Path, *, prompts=3, seeds=2, num_frames=100, crf=12, text="prompt {}", name="p{:04d}-{}", fps=16.0):
    lines = []
    for p in range(prompts):
        for s in range(seeds):
            path = folder / "videos" / f"{name.format(p, s)}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"video {p} {s}".encode())
            lines.append(
                ManifestLine(
                    id=name.format(p, s),
                    file=f"videos/{path.name}",
                    prompt=text.format(p),
                    prompt_index=p,
                    seed_index=s,
                    num_frames=num_frames,
                    fps=fps,
                    encoder={"crf": crf},
                )
            )
    write_manifest(folder / "manifest.jsonl", lines)
    return lines


@pytest.fixture
def make_run(tmp_path):
    """Write a run's manifest and videos: ``make_run(**changes)`` gives its folder."""

    def make(**changes):
        folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        _make(folder, **changes)
        return folder

    return make
