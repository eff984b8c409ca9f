"""The wheel, built from a copy of the tree and imported from an empty folder: data inside, tests outside."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = (".*", "build", "dist", "*.egg-info", "__pycache__", "runs", "demo", "takes", "tests")

# Runs with the wheel's folder first on the path: every module imports from there, and presets and weights are found.
PROBE = """
import importlib, json, pkgutil, sys
from importlib.resources import files
sys.path.insert(0, sys.argv[1])
import longtake
names = [module.name for module in pkgutil.walk_packages(longtake.__path__, "longtake.")]
origins = [importlib.import_module(name).__file__ for name in names]
tree = lambda package, end: sorted(str(p) for p in files(package).rglob("*" + end))
print(json.dumps({
    "version": longtake.__version__, "names": names, "origins": [longtake.__file__, *origins],
    "presets": tree("longtake.configs", ".yaml"), "weights": tree("longtake.models", ".safetensors"),
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*LEFT_OUT))
    build = "from setuptools.build_meta import build_wheel; import sys; build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=folder / "source", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return next(folder.glob("longtake-*.whl"))


def _repository_data(pattern: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern) if ".work" not in path.parts}


def test_wheel_holds_all_data_and_no_tests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name.removeprefix("longtake/") for name in names if name.startswith("longtake/")}
    data = ("configs/**/*.yaml", "models/**/*.safetensors", "models/**/*.json", "evaluation/**/*.safetensors")
    for pattern in (*data, *(f"evaluation/**/*.{ending}" for ending in ("json", "yaml", "css", "js", "j2"))):
        missing = _repository_data(pattern) - inside
        assert not missing, missing
    assert "py.typed" in inside
    assert not [name for name in inside if name.split("/")[0] in ("tests", "examples", "docs", "longtake", "setup.py")]
    assert all(name.startswith(("longtake/", "longtake-")) for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_imports_from_an_empty_folder(wheel, tmp_path):
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(target)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(origin.startswith(str(target)) for origin in found["origins"])
    assert {"longtake.cache", "longtake.models.conversion"} <= set(found["names"])
    assert not [name for name in found["names"] if name.startswith(("longtake.tests", "longtake.longtake"))]
    assert len(found["presets"]) == len(_repository_data("configs/**/*.yaml"))
    assert len(found["weights"]) == len(_repository_data("models/**/*.safetensors"))


def test_checkout_needs_no_installation():
    """From the repository root the folders are found without the editable installation."""
    code = "from importlib.util import find_spec; print(find_spec('longtake.cache').origin)"
    # -S leaves site-packages out.
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(ROOT / "longtake" / "cache" / "__init__.py"), done.stderr[-2000:]
