"""The command line in this process, where torch is imported already, and what its runs made."""

from longtake.pipelines.run_folder import RunFolder
from longtake.scripts.console import run_app
from longtake.scripts.main import app

PROMPT = "a red circle moving left"
OTHER = "a blue square moving right"


def call(capfd, *words, program=app):
    """Run the program; returns (exit code, stdout, stderr)."""
    code = run_app(program, [str(word) for word in words])
    return code, *capfd.readouterr()


def assert_one_line(result, *messages):
    """A refusal is one line without a traceback, exit code 2."""
    code, _, stderr = result
    lines = stderr.strip().splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("longtake: "), stderr
    for message in messages:
        assert message in lines[0]


def hashes(path):
    """Hashes of a run's blocks."""
    return [entry["sha256"] for entry in RunFolder(path).blocks()]
