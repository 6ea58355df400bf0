"""Every setting and every metric is in the docs, and what the docs name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prfaas.common import config
from prfaas.services.commands.reference import PAGES, metric_facts

ROOT = Path(__file__).parent.parent
PROSE = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.name not in PAGES]
KEYS = config.keys()
METRIC = re.compile(r"\bprfaas_(?:router|node|transport|log)_[a-z0-9_]+")


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_are_what_the_code_says(name: str) -> None:
    """The mend: make reference."""
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == PAGES[name]()


def test_every_setting_and_metric_is_there() -> None:
    """With the name that an operator would search for."""
    settings, metrics = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in PAGES)
    for key in KEYS:
        section, name = key.split(".")
        after = settings.partition(f"\n## [{section}]\n")[2].partition("\n## ")[0]
        assert f"\n| `{name}`" in after, key
    names = [facts.name for group in metric_facts().values() for facts in group]
    assert len(names) == len(set(names)) > 40
    for name in names:
        assert f"\n| `{name}` |" in metrics


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.name)
def test_what_the_prose_names_exists(path: Path) -> None:
    """Settings as `section.name`, and metrics; a histogram's series by its own names."""
    text = path.read_text(encoding="utf-8")
    sections = {key.split(".")[0] for key in KEYS}
    # Only what can't be a file or a module: in backticks, alone or with a value behind.
    for section, name in re.findall(r"`([a-z]+)\.([a-z_]+)(?: = [^`]*)?`", text):
        if section in sections and name not in ("py", "md", "toml", "json"):
            assert f"{section}.{name}" in KEYS, f"{path.name} names {section}.{name}"
    known = {facts.name for group in metric_facts().values() for facts in group}
    for name in METRIC.findall(text):
        assert re.sub(r"_(bucket|sum|count)$", "", name) in known, f"{path.name} names {name}"
