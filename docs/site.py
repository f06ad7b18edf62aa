"""Brings the files of the repository into the site. MkDocs calls the functions `on_...` (mkdocs.yml, `hooks`).

The pages of docs/ link to files outside of it: records, pictures, recipes, the results of suites. These files become
part of the site, below `repository/`, and the links lead to them there.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parent.parent
# Page at the top of the repository → its place on the site.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")

# Code inside a line; that of a block has a tag before it. Code of at most SHORT characters stays on one line.
CODE = re.compile(r"(?<!</span>)<code>(?P<text>[^<]+)</code>")
SHORT = 24
# Longer code: its options, which may not be broken after a hyphen, and the other places where it may be broken.
PLACE = re.compile(r"--[\w-]+|(?<=[/_(,=:])(?=[a-zA-Z])|(?<=\.)(?=[a-zA-Z]{4})")
# A cell of a table that begins with a number, bold or not.
NUMBER = re.compile(r"<td(?P<style> style=\"[^\"]*\")?>(?=(<strong>)?[−-]?\d[^<]{0,40}<)")


def place(path: str) -> str:
    """The place on the site of a file, both as paths without a leading slash."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}")


def linked(path: str) -> Iterator[str]:
    """The files and folders of the repository that a Markdown file links to."""
    for link in LINK.finditer((ROOT / path).read_text()):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link["path"]))
        if (ROOT / target).exists():
            yield target


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of `PAGES`, and every file that a page links to, and so on."""
    wanted = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(wanted)
    for path in wanted:  # grows while it is read
        if not path.startswith("docs/"):
            listed = InclusionLevel.INCLUDED if path in PAGES else InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path), inclusion=listed))
        if path.endswith(".md"):
            found = [each for each in linked(path) if (ROOT / each).is_file() and not each.startswith("docs/")]
            wanted += dict.fromkeys(each for each in found if each not in seen)
            seen.update(found)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Makes the links of a page lead to the places of their files. A link to a folder becomes its text."""
    here = page.file.src_uri
    path = next((name for name, at in PAGES.items() if at == here), None)
    path = path or (here.removeprefix("repository/") if here.startswith("repository/") else f"docs/{here}")

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link["path"]))
        if (ROOT / target).is_dir():
            return link["text"].strip("[]")
        if not (ROOT / target).is_file():
            return link[0]
        there = posixpath.relpath(place(target), posixpath.dirname(here) or ".")
        return f"{link['text']}({there}{link['anchor'] or ''})"

    return LINK.sub(moved, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Marks what has to stay on one line, for site.css, and where a long name in code may be broken."""

    def marked(found: re.Match[str]) -> str:
        return f'<span class="short">{found[0]}</span>' if found[0] else "<wbr>"

    def code(found: re.Match[str]) -> str:
        text = found["text"]
        return f'<code class="short">{text}</code>' if len(text) <= SHORT else f"<code>{PLACE.sub(marked, text)}</code>"

    return CODE.sub(code, NUMBER.sub(r'<td class="number"\g<style>>', html))
