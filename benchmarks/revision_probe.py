"""Questions to one tree, answered as JSON: run by ``against_revision.py`` with the tree on the path.

Only what is public in every revision is called: the command line, ``rollout_latents`` and the presets.
"""

import hashlib
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

import longtake

PROMPT = "a red circle bouncing quickly over a navy striped background"


def main() -> None:
    """``revision_probe.py outputs|capabilities CHECKOUT ANSWER``: data is taken from CHECKOUT."""
    part, checkout, answer = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    found = outputs(checkout) if part == "outputs" else capabilities()
    answer.write_text(json.dumps(found))


def outputs(checkout: Path) -> dict[str, Any]:
    """Hashes of rollouts, of a resumed run, and the values of an evaluation."""
    return {**_rollouts(checkout), **_runs(), **_evaluation(checkout)}


def _rollouts(checkout: Path) -> dict[str, str]:
    cases = runpy.run_path(str(checkout / "tests" / "support" / "golden_cases.py"))
    return {f"rollout {name}": _sha(x.numpy().tobytes()) for name, x in cases["golden_rollouts"]().items()}


def _runs() -> dict[str, Any]:
    """Block hashes of whole runs under several policies; then a run that is stopped, resumed and forked."""
    from longtake.cache import POLICIES

    found: dict[str, Any] = {}
    for name in POLICIES:
        if _longtake("generate", PROMPT, "--seconds", "6", "--cache", name, "--out", f"run_{name}", check=False):
            found[f"run {name}"] = "refused"
        else:
            found[f"run {name}"] = _hashes(Path(f"run_{name}"))
    command = [sys.executable, "-m", "longtake.scripts.main", "generate", PROMPT, "--seconds", "20", "--out", "cut"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(Path("cut").glob("**/*.safetensors")):
            pass
        process.kill()
    _longtake("resume", "cut")
    found["run cut"] = _hashes(Path("cut"))
    _longtake("fork", "cut", "--at", "5s", "--prompt", PROMPT.replace("red", "blue"), "--out", "forked")
    found["run forked"] = _hashes(Path("forked"))
    return found


def _evaluation(checkout: Path) -> dict[str, Any]:
    videos = checkout / "tests" / "golden" / "vbench" / "videos"
    _longtake(
        "evaluate", "run", "--videos", str(videos), "--out", "measured", "--backbones", str(videos.parent / "stubs.py")
    )
    found = {}
    for path in sorted(Path("measured").glob("**/scores/*.json")):
        found |= _flat(json.loads(path.read_text())["scores"], f"score {path.stem}")
    return found


def _flat(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: leaf for part, inner in value.items() for key, leaf in _flat(inner, f"{name}/{part}").items()}
    return {name: value}


def capabilities() -> dict[str, Any]:
    """Commands with their options, policies, samplers, metrics and presets."""
    from typer.main import get_command

    from longtake.cache import POLICIES
    from longtake.samplers import SAMPLERS
    from longtake.scripts.main import app

    found = {f"policy {name}": sorted(cls.__dataclass_fields__) for name, cls in POLICIES.items()}
    found |= {f"sampler {name}": True for name in SAMPLERS}
    presets = Path(longtake.__file__).parent.parent / "configs"
    found |= {f"preset {path.relative_to(presets)}": True for path in presets.rglob("*.yaml")}
    found |= _commands(get_command(app), "longtake")
    listed = subprocess.run(
        [sys.executable, "-m", "longtake.scripts.main", "evaluate", "list"], capture_output=True, text=True, check=True
    )
    names = (line.strip().split(" ")[0].rstrip(":") for line in listed.stdout.splitlines() if line.startswith("  "))
    return found | {f"metric {name}": True for name in names if "/" in name}


def _commands(command: Any, name: str) -> dict[str, Any]:
    options = [option for option in command.params if option.name != "help"]
    found = {f"command {name}": True} | {f"option {name} {'/'.join(sorted(o.opts))}": True for o in options}
    if hasattr(command, "resolve_command"):  # a group may import a command only when it is called
        context = click.Context(command)
        for part in command.list_commands(context):
            found |= _commands(command.resolve_command(context, [part])[1], f"{name} {part}")
    return found


def _hashes(run: Path) -> str:
    """One hash over a run's block hashes."""
    record = json.loads((run / "run.json").read_text())
    blocks = [block["sha256"] for block in record["blocks"]]
    return f"{len(blocks)} blocks {_sha(json.dumps(blocks).encode())}"


def _longtake(*words: str, check: bool = True) -> int:
    command = [sys.executable, "-m", "longtake.scripts.main", *words]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=check).returncode


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


if __name__ == "__main__":
    main()
