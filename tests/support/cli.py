"""The command line in this process, where torch is imported already, or as a program; and what its runs made."""

import os
import subprocess
import sys
from pathlib import Path

from longtake.pipelines.run_folder import RunFolder
from longtake.scripts.console import run_app
from longtake.scripts.main import app

PROMPT = "a red circle moving left"
OTHER = "a blue square moving right"
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ("-m", "longtake.scripts.main")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def call(capfd, *words, program=app):
    """Run the program; returns (exit code, stdout, stderr)."""
    capfd.readouterr()
    code = run_app(program, [str(word) for word in words])
    return code, *capfd.readouterr()


def start(*words, cwd=ROOT, program=PROGRAM):
    """Start the program in a process group of its own, without waiting."""
    command = [sys.executable, *program, *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=ENVIRONMENT, start_new_session=True, **pipes)


def run(*words, **settings):
    process = start(*words, **settings)
    stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout, stderr


def assert_one_line(result, *messages):
    """A refusal is one line without a traceback, exit code 2."""
    code, _, stderr = result
    lines = stderr.strip().splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("longtake: "), stderr
    for message in messages:
        assert message in lines[0]


def hashes(path):
    return [entry["sha256"] for entry in RunFolder(path).blocks()]
