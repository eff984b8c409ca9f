"""Policies of other packages, by an entry point, and caches in files of their own."""

import os
import subprocess
import sys

import pytest
import yaml

from longtake.cache import CachePolicy, make_policy
from longtake.cache.policies.sliding_window import SlidingWindow
from longtake.configs.loader import load_run
from longtake.configs.registry import Registry, external

PROMPT = "a red circle moving left over a navy plain background"
MODULE = '''
from dataclasses import dataclass
from typing import ClassVar
from longtake.cache.policies.sliding_window import SlidingWindow

@dataclass(frozen=True, kw_only=True)
class Newest(SlidingWindow):
    """The newest frames, under another name."""

    name: ClassVar[str] = "newest"
    num_context_frames: int = 12
'''


def _install(folder, entries, module=MODULE):
    """Lay a package out as an installer does."""
    info = folder / "longtake_newest-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: longtake-newest\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[longtake.policies]\n{entries}\n")
    (folder / "longtake_newest.py").write_text(module)


@pytest.fixture
def site(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    external.cache_clear()
    yield folder
    external.cache_clear()
    sys.modules.pop("longtake_newest", None)


def _registry():
    places = {"sliding_window": "cache.policies.sliding_window:SlidingWindow"}
    return Registry(CachePolicy, places, group="longtake.policies")


def test_a_policy_of_another_package_has_its_name_everywhere(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    _install(site, "newest = longtake_newest:Newest")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}

    def longtake(*words):
        command = [sys.executable, "-m", "longtake.scripts.main", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "newest" in longtake("policies")
    shown = longtake("policies", "newest", "--set", "num_context_frames=15")
    assert yaml.safe_load(shown) == {"policy": "newest", "num_context_frames": 15}
    (tmp_path / "own.yaml").write_text(shown)
    longtake("generate", PROMPT, *["--cache", "own.yaml", "--seconds", "1", "--out", "run"])
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["cache"]
    assert saved["policy"] == "newest" and saved["num_context_frames"] == 15
    longtake("resume", "run")
    code = (
        "from longtake.configs.loader import load_run\n"
        "from longtake.pipelines.settings import RolloutSettings\n"
        "print(RolloutSettings(cache=load_run(options={'cache': 'newest', 'prompt': 'any'}).cache).policy)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "Newest(" in done.stdout, done.stderr


def test_a_class_is_imported_when_asked_for(site):
    _install(site, "newest = longtake_newest:Newest")
    registry = _registry()
    assert (
        "longtake_newest" not in sys.modules and set(registry) == {"sliding_window", "newest"} and len(registry) == 2
    )
    assert "longtake_newest" not in sys.modules
    assert issubclass(registry["newest"], SlidingWindow) and registry["newest"].__module__ == "longtake_newest"
    with pytest.raises(KeyError):
        registry["newer"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("sliding_window = longtake_newest:Newest", "longtake-newest names a class 'sliding_window'"),
        ("newest = longtake_newest:Older", "longtake-newest cannot be imported"),
        ("newest = longtake_newest:dataclass", "must be a CachePolicy"),
        ("newest = longtake_absent:Newest", "longtake-newest cannot be imported"),
    ],
)
def test_a_package_that_does_not_fit_is_named(site, entries, message):
    _install(site, entries)
    with pytest.raises(ValueError, match=message):
        _ = _registry()["newest"]


def test_a_cache_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("policy: attention_sink\nnum_sink_frames: 1\n")
    (tmp_path / "run.yaml").write_text("cache: own.yaml\nprompt: any\n")
    for run in (
        load_run(options={"cache": "own.yaml", "prompt": "any"}),
        load_run(tmp_path / "run.yaml"),
        load_run(options={"prompt": "any"}, overrides=["cache=own.yaml"]),
    ):
        assert make_policy(run.cache).num_sink_frames == 1 and run.cache["num_context_frames"] == 12
    wrapped = load_run(options={"cache": {"policy": "quantized", "inner": "own.yaml"}, "prompt": "any"})
    assert wrapped.cache["inner"]["num_sink_frames"] == 1
    with pytest.raises(ValueError, match=r"cannot read the configuration .*absent\.yaml"):
        load_run(options={"cache": "absent.yaml", "prompt": "any"})
