"""A small run on disk: videos are bytes, since nothing here decodes them."""

from itertools import product

import pytest

from longtake.evaluation.records import ManifestLine, write_manifest


@pytest.fixture
def make_run(tmp_path):
    """Write a run's manifest and videos: ``make_run(**changes)`` gives its folder."""

    def make(*, prompts=3, seeds=2, crf=12, text="prompt {}", name="p{:04d}-{}"):
        folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        (folder / "videos").mkdir(parents=True)
        lines = []
        for p, s in product(range(prompts), range(seeds)):
            line = ManifestLine(
                id=name.format(p, s),
                file=f"videos/{name.format(p, s)}.mp4",
                prompt=text.format(p),
                prompt_index=p,
                seed_index=s,
                num_frames=100,
                fps=16.0,
                encoder={"crf": crf},
            )
            (folder / line.file).write_bytes(f"video {p} {s}".encode())
            lines.append(line)
        write_manifest(folder / "manifest.jsonl", lines)
        return folder

    return make
