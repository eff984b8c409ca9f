"""The README does what it says: code runs, commands exist, links lead somewhere, figures are there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lab.scenes import vocabulary
from longtake.cache import POLICIES
from longtake.evaluation.mini_world.scenes import parse_caption

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for index, code in enumerate(_blocks("python")):
        shorter = re.sub(r"seconds=\d+", "seconds=1.5", code)
        assert index > 1 or shorter != code  # else a whole video would be made here
        exec(compile(shorter, f"README block {index}", "exec"), namespace)
    assert namespace["video"].shape == (1, 25, 64, 64, 3)
    assert namespace["pixels"].shape[2:] == (3, 64, 64)
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 ")


def _commands() -> list[list[str]]:
    lines = [line for block in _blocks("bash") for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


def test_longtake_commands_work_in_order(tmp_path):
    """As a user types them, in one folder, only shorter."""
    lines = [words for words in _commands() if words[0] == "longtake"]
    assert [words[1] for words in lines] == ["generate", "resume", "fork", "policies"]
    for words in lines:
        shorter = [{"60": "1.5", "20s": "1s"}.get(word, word) for word in words[1:]]
        done = subprocess.run(
            [Path(sys.executable).with_name("longtake"), *shorter],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, (words, done.stderr[-2000:])
    videos = [path for path in tmp_path.rglob("video.mp4")]
    assert len(videos) == 2 and all(path.stat().st_size for path in videos)


def test_evaluation_in_the_text_works(tmp_path):
    (text,) = re.findall(r"`longtake (evaluate run [^`]+)`", README)
    shorter = ["--seconds", "1.5", "--samples", "1", "--num-prompts", "1"]  # the last value of an option counts
    done = subprocess.run(
        [Path(sys.executable).with_name("longtake"), *shlex.split(text), *shorter],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "study" / "report.html").is_file()
    assert {path.parent.name for path in tmp_path.rglob("results.json")} == {"full", "deep_forcing", "pack"}


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[1] for words in _commands() if words[0] == "make"} | set(re.findall(r"`make ([a-z-]+)", README))
    assert {"demo", "test", "bench"} <= named <= targets


def test_starts_with_the_two_commands():
    first = _blocks("bash")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]
    assert len(README.splitlines()) <= 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert not missing, missing


def test_the_table_names_policies():
    section = README.partition("## Cache policies")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    named = re.findall(r"`(\w+)`", "".join(rows))
    assert len(named) >= 17 and set(named) <= set(POLICIES)


@pytest.mark.parametrize("name", ["README.md", "Makefile", "examples"])
def test_prompts_are_in_the_words_of_the_mini_model(name):
    place = ROOT / name
    text = "\n".join(f.read_text() for f in place.glob("*.py")) if place.is_dir() else place.read_text()
    prompts = re.findall(r"\ba [a-z ]+ over an? [a-z ]+ background(?: with the camera [a-z ]+)?", text)
    assert prompts
    for prompt in prompts:
        assert set(prompt.split()) <= set(vocabulary()), prompt
        scene = parse_caption(prompt)
        assert None not in [scene[key] for key in ("shape", "colour", "motion", "background", "texture")], prompt


def test_figures_are_filled_in():
    assert "FILL" not in README
