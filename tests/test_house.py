"""The house rules that a machine can check: layout, import order, size, docstrings, forbidden constructs."""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml

from longtake.cache import POLICIES

ROOT = Path(__file__).resolve().parents[1]

# Folder -> folders it may import. Imports go one way only.
MAY_IMPORT = {
    "configs": set(),
    "rope": set(),
    "samplers": {"configs"},
    "attention": {"configs"},
    "cache": {"rope", "configs"},
    "models": {"attention", "samplers", "cache", "rope", "configs"},
    "pipelines": {"models", "attention", "samplers", "cache", "rope", "configs"},
    "evaluation": {"pipelines", "samplers", "cache", "rope", "configs"},
    "serving": {"evaluation", "pipelines", "models", "attention", "samplers", "cache", "rope", "configs"},
    "scripts": {"serving", "evaluation", "pipelines", "models", "attention", "samplers", "cache", "rope", "configs"},
}
POLICY_FREE = ("models", "pipelines")
# The English word, not the policy.
NOT_A_POLICY = {("pipelines/run_folder.py", "full")}


def _folders() -> list[str]:
    return [name for name in MAY_IMPORT if (ROOT / name / "__init__.py").exists()]


def _modules() -> list[Path]:
    files = [path for name in _folders() for path in sorted((ROOT / name).rglob("*.py"))]
    return [ROOT / "longtake" / "__init__.py", *files]


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def _imports(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Every imported dotted name, `from a import b` as a.b, anywhere in the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def _own_folder(dotted: str) -> str | None:
    """The folder of ours that an import needs; the pipeline class at the top needs pipelines."""
    parts = dotted.split(".")
    if parts[0] != "longtake" or parts[1:2] in ([], ["__version__"]):
        return None
    return parts[1] if parts[1] in MAY_IMPORT else "pipelines"


def _order_faults(folder: str, tree: ast.Module) -> list[str]:
    allowed = MAY_IMPORT[folder] | {folder}
    needed = ((node, _own_folder(dotted)) for node, dotted in _imports(tree))
    return [f"{node.lineno}: {target}" for node, target in needed if target is not None and target not in allowed]


def test_imports_go_down_the_list_only():
    faults = [
        f"{path.relative_to(ROOT)}:{fault}"
        for folder in _folders()
        for path in sorted((ROOT / folder).rglob("*.py"))
        for fault in _order_faults(folder, _tree(path))
    ]
    assert not faults, faults


def test_the_import_check_itself():
    for folder, code, is_fault in (
        ("cache", "from longtake.models.causal import X", True),
        ("cache", "def f():\n    import longtake.pipelines", True),
        ("models", "from longtake import LongVideoPipeline", True),
        ("rope", "from longtake import cache", True),
        ("cache", "from longtake.rope.angles import X", False),
        ("pipelines", "from longtake.models import x\nfrom longtake import __version__", False),
    ):
        assert bool(_order_faults(folder, ast.parse(code))) is is_fault, code


def _graph(trees: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """Modules that each module imports, by dotted names; `a.b.c` is the longest part of it that is a module."""
    graph: dict[str, set[str]] = {}
    for name, tree in trees.items():
        parts = [dotted.split(".") for _, dotted in _imports(tree)]
        found = (next((n for n in (".".join(p[:i]) for i in range(len(p), 0, -1)) if n in trees), None) for p in parts)
        graph[name] = {module for module in found if module not in (None, name, "longtake")}
    return graph


def test_no_two_files_import_each_other():
    """Imports inside functions count, too."""
    trees = {}
    for path in _modules():
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        trees[f"longtake.{dotted}" if dotted != "longtake" else dotted] = _tree(path)
    list(TopologicalSorter(_graph(trees)).static_order())  # its error names the circle


def test_the_circle_check_itself():
    code = {"longtake.a": "def f():\n    from longtake.b import x\n", "longtake.b": "import longtake.a.c\n"}
    with pytest.raises(CycleError, match=r"longtake\.a"):
        list(TopologicalSorter(_graph({name: ast.parse(text) for name, text in code.items()})).static_order())


def test_imports_are_absolute():
    """Relative imports and bare folder names give a second copy of a module and break isinstance."""
    faults = []
    for path in [*_modules(), *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "examples").rglob("*.py"))]:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.ImportFrom) and node.level:
                faults.append(f"{_where(path, node)}: relative import")
        for node, dotted in _imports(_tree(path)):
            if dotted.split(".")[0] in MAY_IMPORT:
                faults.append(f"{_where(path, node)}: import longtake.{dotted}")
    assert not faults, faults


def _forbidden(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield node, "assert: raise ValueError with name, value, limit, remedy"
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node, "bare except"
        elif isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            yield node, "import *"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "print":
                yield node, "print: return values, or rich in scripts"
            elif node.func.id == "getattr" and len(node.args) + len(node.keywords) > 2:
                yield node, "getattr default: name the attribute, or fail"


def test_forbidden_constructs():
    faults = [f"{_where(path, node)}: {why}" for path in _modules() for node, why in _forbidden(_tree(path))]
    assert not faults, faults


def test_the_forbidden_check_itself():
    code = "assert x\nprint(1)\ngetattr(a, 'b', 0)\nfrom a import *\ntry:\n    pass\nexcept:\n    pass\n"
    assert sorted(node.lineno for node, _ in _forbidden(ast.parse(code))) == [1, 2, 3, 4, 7]
    assert not list(_forbidden(ast.parse("getattr(a, 'b')\nconsole.print(1)\n")))


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_one_file_with_its_name(name):
    places = (f"longtake.cache.policies.{name}", f"longtake.cache.wrappers.{name}")
    assert POLICIES[name].name == name and POLICIES[name].__module__ in places
    assert (ROOT / "configs" / "cache" / f"{name}.yaml").is_file()


def _policy_mentions(text: str, names: Iterable[str], classes: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Lines that speak of a policy: a name of several words anywhere, a name of one as a whole string, any class."""
    names, classes = set(names), set(classes)
    for number, line in enumerate(text.splitlines(), start=1):
        yield from ((number, name) for name in names if "_" in name and re.search(rf"\b{name}\b", line))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names:
            yield node.lineno, node.value
        elif isinstance(node, ast.Name) and node.id in classes:
            yield node.lineno, node.id
    for node, dotted in _imports(ast.parse(text)):
        parts = dotted.split(".")
        if parts[:2] == ["longtake", "cache"] and (set(parts[2:]) & (names | classes)):
            yield node.lineno, dotted


def test_models_and_pipelines_know_no_policy():
    classes = [cls.__name__ for cls in POLICIES.values()]
    faults = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for folder in POLICY_FREE
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in _policy_mentions(path.read_text(encoding="utf-8"), POLICIES, classes)
        if (str(path.relative_to(ROOT)), name) not in NOT_A_POLICY
    ]
    assert not faults, faults


def test_the_policy_check_itself():
    for code, is_fault in (
        ("if policy.name == 'full': pass", True),
        ("# as attention_sink does it", True),
        ("from longtake.cache.policies.full import Full", True),
        ("from longtake.cache import Full", True),
        ("x = isinstance(policy, Full)", True),
        ("# the disk is full", False),
        ("torch.full((1,), 2.0)", False),
        ("from longtake.cache import KVCache, Pass", False),
    ):
        assert bool(list(_policy_mentions(code, ["full", "attention_sink"], ["Full", "AttentionSink"]))) is is_fault, (
            code
        )


def _undocumented(path: Path) -> Iterator[str]:
    """Modules, classes and functions say what they are; methods where name and signature do not."""
    tree = _tree(path)
    if ast.get_docstring(tree) is None:
        yield f"{path.relative_to(ROOT)}: module"
    for node in tree.body:
        is_definition = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if is_definition and not node.name.startswith("_") and ast.get_docstring(node) is None:
            yield f"{_where(path, node)} {node.name}"


def test_everything_public_has_a_docstring():
    faults = [fault for path in _modules() for fault in _undocumented(path)]
    assert not faults, faults


def test_every_folder_is_packaged():
    """setup.py names each folder with an __init__.py, and nothing that tests or examples hold."""
    assignment = next(
        node
        for node in _tree(ROOT / "setup.py").body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FOLDERS"
    )
    packaged = ast.literal_eval(assignment.value)
    present = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"longtake", "lab", "benchmarks"}
    assert set(packaged) == present
    for folder in packaged:
        missing = {
            path.parent.relative_to(ROOT)
            for path in (ROOT / folder).rglob("*.py")
            if not (path.parent / "__init__.py").exists()
        }
        assert not missing, f"without __init__.py, so not in the wheel: {missing}"


def test_no_second_way_to_import_the_tests():
    """A root conftest or a package of tests makes pytest import the checkout twice."""
    assert not (ROOT / "conftest.py").exists()
    assert not (ROOT / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_folder_is_linked():
    """longtake/<folder> is a relative link, so interpreters, type checkers and editors find the same files."""
    for folder in _folders():
        link = ROOT / "longtake" / folder
        assert link.is_symlink() and link.readlink() == Path("..") / folder


def test_pre_commit_and_constraints_name_the_same_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    pins = {pin for hook in hooks for pin in hook["additional_dependencies"]}
    assert pins == {line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ruff==")}
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()


def test_ci_calls_make_test_and_nothing_else():
    run = ROOT / ".ci" / "run"
    assert run.stat().st_mode & 0o111
    commands = [line for line in run.read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in commands if "make" in line] == ["exec make test"]


def test_make_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    listed = re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE)
    assert sorted(phony) == sorted(listed)
    assert {"install", "demo", "test", "lint", "format", "golden", "bench", "train-mini"} <= set(listed)


def test_decision_records_are_numbered_and_short():
    records = sorted((ROOT / "docs" / "adr").glob("*.md"))
    assert [int(path.name[:4]) for path in records] == list(range(1, len(records) + 1))
    for path in records:
        text = path.read_text(encoding="utf-8")
        assert all(f"## {part}" in text for part in ("Context", "Choice", "Cost")), path.name
        assert len(text.splitlines()) <= 30, path.name
