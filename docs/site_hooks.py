"""Hooks of the documentation site: pages and files of the repository that lie outside docs/ are part of it.

On GitHub a page links to what it means, as ../experiments/001-quickstart/. The site holds docs/ at its root and
beside it whatever else is linked, under its path in the repository; links are rewritten to that, and the build fails
where one leads nowhere.
"""

from __future__ import annotations

import posixpath
import re
import unicodedata
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs"
#: Where the repository's README is in the site: mkdocs makes an index of that name, and docs/ has its own.
README = "start.md"
#: [text](target) and ![text](target), outside blocks of code.
_LINK = re.compile(r"(?P<mark>!?)\[(?P<text>[^\]]*)\]\((?P<path>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")
_TABLE_ROW, _SPAN = re.compile(r"^\|.*\|$", flags=re.MULTILINE), re.compile(r"`[^`]*`")
_CODE = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Headings get the anchors that GitHub gives them."""
    config.mdx_configs["toc"]["slugify"] = anchor
    return config


def anchor(heading: str, separator: str = "-") -> str:
    """``Which `--l2-norm`?`` → ``which---l2-norm``: lower case without punctuation, a separator for each space."""
    kept = [
        letter
        for letter in heading.lower().strip()
        if letter in " -_" or letter.isalnum() or unicodedata.category(letter).startswith("M")
    ]
    return "".join(kept).replace(" ", separator)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what pages link to, and what these link to in turn."""
    pending = [file.src_uri for file in files if file.src_uri.endswith(".md")]
    while pending:
        page = pending.pop()
        text = (ROOT / _in_repository(page)).read_text(encoding="utf-8")
        for link in _LINK.finditer(_CODE.sub("", text)):
            target = _target(page, link["path"])
            if target is None or files.get_file_from_path(target) is not None:
                continue
            if not (ROOT / _in_repository(target)).is_file():
                continue  # mkdocs reports it
            files.append(File.generated(config, target, abs_src_path=str(ROOT / _in_repository(target))))
            if target.endswith(".md"):
                pending.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites links that are right in the repository to where the site has what they mean."""
    here = page.file.src_uri

    def rewritten(link: re.Match[str]) -> str:
        target = _target(here, link["path"])
        if target is None:
            return link[0]
        path = posixpath.relpath(target, posixpath.dirname(here) or ".")
        if (ROOT / target).is_dir():  # one without a README: GitHub lists it, the site cannot
            return link["text"]
        return f"{link['mark']}[{link['text']}]({path}{link['anchor'] or ''})"

    # In a table GitHub needs \\| for a bar inside code, where Python-Markdown would show the backslash.
    markdown = _TABLE_ROW.sub(lambda row: _SPAN.sub(lambda span: span[0].replace("\\|", "|"), row[0]), markdown)
    parts, at = [], 0
    for code in _CODE.finditer(markdown):
        parts += [_LINK.sub(rewritten, markdown[at : code.start()]), code[0]]
        at = code.end()
    return "".join([*parts, _LINK.sub(rewritten, markdown[at:])])


def _in_repository(page: str) -> str:
    """Path in the repository of a path in the site's sources."""
    if page == README:
        return "README.md"
    inside = f"{DOCS}/{page}"
    return inside if (ROOT / inside).exists() else page


def _target(page: str, link: str) -> str | None:
    """Path in the site's sources of what a page links to; None for what is no file of the repository."""
    if not link or re.match(r"[a-z]+:|/", link):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(_in_repository(page)), link))
    if (ROOT / path).is_dir():
        path = next((f"{path}/{name}" for name in ("README.md", "__init__.py") if (ROOT / path / name).is_file()), path)
    return README if path == "README.md" else path.removeprefix(f"{DOCS}/")
