"""docs/evaluation.md does what it says: its code runs, its commands and options exist, its figures are true."""

import re
import shlex
from math import ceil, log2
from pathlib import Path

import pytest
import typer
import yaml

from longtake.evaluation.intervals import _sign_test, holm
from longtake.evaluation.metric import PREFIXES
from longtake.evaluation.metrics import GROUPS
from longtake.evaluation.results import SCALARS
from longtake.evaluation.running.protocol import load_protocol, resolve_generation
from longtake.scripts.evaluate import app

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def _blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for index, code in enumerate(_blocks("python")):
        exec(compile(code, f"docs/evaluation.md block {index}", "exec"), namespace)
    scores = namespace["result"].scores
    assert len(scores) == 8
    assert "too small for" in scores["set/frechet[enc=hog+hist][ref=noise]"].skipped
    assert scores["set/stream_T[enc=hog+hist][ref=noise]"].value is not None
    assert "official VBench" in capsys.readouterr().out


def _commands():
    lines = [line for block in _blocks("bash") for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("words", _commands(), ids=lambda words: " ".join(words[2:4]))
def test_commands_and_options_exist(words):
    group = typer.main.get_command(app)
    assert words[:2] == ["longtake", "evaluate"]
    command = group.commands[words[2]]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_the_protocol_of_the_page_loads(tmp_path):
    text, with_attention = _blocks("yaml")
    path = tmp_path / "study.yaml"
    path.write_text(text)
    protocol = load_protocol(str(path))
    assert protocol.num_prompts == 16 and set(protocol.metrics) == set(GROUPS)
    assert yaml.safe_load(text)["baseline"] in protocol.caches
    path.write_text(with_attention)
    dense, radial = resolve_generation(load_protocol(str(path))).caches.values()
    assert "attention" not in dense and radial["attention"]["policy"] == "radial"


def test_prefixes_groups_and_drift_numbers_are_all_there():
    for name in (*PREFIXES, *(f"`{group}`" for group in GROUPS), *(f"`{scalar}`" for scalar in SCALARS)):
        assert name in PAGE, name


def test_prompts_needed_for_the_sign_test():
    header = next(line for line in PAGE.splitlines() if line.startswith("| policies compared"))
    row = next(line for line in PAGE.splitlines() if line.startswith("| prompts needed"))
    for policies, prompts in zip(header.split("|")[2:-1], row.split("|")[2:-1], strict=True):
        count, needed = int(policies), int(prompts)
        labels = list(map(str, range(count)))
        best = {n: max(holm(dict.fromkeys(labels, _sign_test(n, 0))).values()) for n in (needed, needed - 1)}
        assert best[needed] <= 0.05 < best[needed - 1]
        assert needed == 1 + ceil(log2(count / 0.05))


@pytest.mark.parametrize("name", ["policies", "history", "compressors", "attention"])
def test_the_protocol_beside_a_published_study_is_its_own(name):
    """Presets may change later; the fingerprint that the report prints stays that of the file beside it."""
    folder = Path(__file__).resolve().parents[2] / "docs" / "results"
    fingerprint = load_protocol(str(folder / f"{name}.yaml")).fingerprint()
    assert f"<code>{fingerprint}</code>" in (folder / f"{name}.html").read_text(encoding="utf-8")
