"""Links between the pages of the repository lead somewhere, and every page of docs/ has its place on the site."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
_FOLDERS = ("*.md", "docs/*.md", "experiments/*/README.md", "benchmarks/*.md")
PAGES = sorted(page for pattern in _FOLDERS for page in ROOT.glob(pattern))
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]*)(#[^)\s]*)?\)")
_CODE = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub, and the site, give to the headings of a page."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", _CODE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        kept = "".join(c for c in shown if c in " -_" or c.isalnum() or unicodedata.category(c).startswith("M"))
        name = kept.replace(" ", "-")
        found[name] = found.get(name, -1) + 1
        if found[name]:
            found[f"{name}-{found[name]}"] = 0
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links(page: Path) -> None:
    for path, anchor in _LINK.findall(_CODE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", path):
            continue
        target = page if not path else (page.parent / path).resolve()
        assert target.exists(), path
        if anchor and target.suffix == ".md":
            assert anchor[1:] in anchors(target), f"{path}{anchor}"


def test_every_page_is_in_the_navigation() -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, list):
            return [page for part in entry for page in pages(part)]
        return [page for part in entry.values() for page in pages(part)] if isinstance(entry, dict) else [str(entry)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert len(listed) == len(set(listed))
    missing = {path.name for path in ROOT.glob("docs/*.md")} - set(listed)
    assert not missing, "give it a place in mkdocs.yml"
    for page in listed:
        where = "README.md" if page == "start.md" else page
        assert (ROOT / "docs" / where).is_file() or (ROOT / where).is_file(), page
