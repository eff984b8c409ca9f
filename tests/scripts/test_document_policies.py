"""docs/policies.md says what the code says."""

import re
from pathlib import Path

import document_policies
import pytest
from document_policies import all_pictures, picture_name, render

from longtake.cache import POLICIES

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "policies.md"


@pytest.fixture(autouse=True)
def documented(monkeypatch):
    """The policies that the page has: a new one may come into it later."""
    names = re.findall(r"^## (\w+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    monkeypatch.setattr(document_policies, "POLICIES", {name: POLICIES[name] for name in names})
    return names


def test_page_is_up_to_date():
    """Text of the registry as it is now; `make docs-policies` writes it."""
    is_current = PAGE.read_text(encoding="utf-8") == render()  # pytest takes a minute to compare pages word by word
    assert is_current, "run `make docs-policies`"


def test_every_section_has_its_picture(documented):
    assert len(documented) >= 21 and documented == [name for name in POLICIES if name in documented]
    pictures = sorted(path.name for path in (ROOT / "docs" / "policies").glob("*"))
    assert pictures == sorted(picture_name(name, e) for name, shown in all_pictures().items() for e in shown.events)
    assert all((ROOT / "docs" / "policies" / name).stat().st_size < 60_000 for name in pictures)


def test_it_writes_page_and_pictures_and_clears_old_ones(tmp_path, monkeypatch):
    chosen = {name: POLICIES[name] for name in ("full", "attention_sink")}
    monkeypatch.setattr(document_policies, "POLICIES", chosen)
    page = tmp_path / "policies.md"
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "old.png").touch()
    document_policies.document_policies(page, pictures=True)
    text = page.read_text()
    assert "| [attention_sink](#attention_sink) | 3 | 12 | 2.59 | 2.59 | yes |" in text
    assert "| `num_context_frames` | `12` |  |" in text and "| `global_sink` |" not in text
    assert "## attention_sink" in text and "## sliding_window" not in text
    names = {path.name for path in (tmp_path / "policies").iterdir()}
    assert {"full.png", "attention_sink.png"} <= names and "old.png" not in names
