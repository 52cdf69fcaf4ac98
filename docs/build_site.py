"""The documentation site, built strictly; what is built loads nothing from elsewhere and opens from a folder.

    python docs/build_site.py [FOLDER]        # default: site/

The pages of docs/ show figures and name files that lie outside docs/. So the site is made from a copy: a figure is copied beside the pages,
and a link to another file of the repository becomes its path. Zensical then builds the copy; a link that leads nowhere is an error.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?P<bang>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s:]+)(?P<part>#[^)\s]*)?\)")
PICTURES = {".png", ".svg"}
FETCHED = re.compile(r"""<script src="https://unpkg\.com/iframe-worker/shim"[^>]*></script>""")
"""What Zensical adds so that the search works without a server. It would be fetched; docs/search_in_a_folder.js does it here."""
STAR = re.compile(r"(?<=\bw)\*(?![\w*(])")
SEARCH = "search_in_a_folder.js"


def with_links_inside(text: str, page: Path, copied: Path) -> str:
    """The text of a page with its links to files outside docs/ replaced; figures that it shows are copied into the folder `copied`.

    Raises:
        ValueError: a link names a file that does not exist.
    """

    def inside(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(page.parent / link["target"]))
        if not target.exists():
            raise ValueError(f"{page.relative_to(ROOT)} links to {link['target']}, which does not exist; mend the link")
        if target.is_relative_to(DOCS):
            return link[0]
        path = target.relative_to(ROOT)
        if target.suffix in PICTURES:
            (copied / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(target, copied / path)
            place = os.path.relpath(copied / path, copied / page.relative_to(DOCS).parent)
            return f"{link['bang']}[{link['text']}]({place})"
        return f"`{path}`" if link["text"].strip("`/") == str(path) else f"{link['text']} (`{path}`)"

    return LINK.sub(inside, text)


def build(folder: Path) -> None:
    """Build the site into a folder, which is replaced.

    Raises:
        ValueError: a page links to what does not exist.
        subprocess.CalledProcessError: Zensical refuses a page; its output says which.
    """
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        shutil.copy(ROOT / "mkdocs.yml", copy)
        for source in sorted((ROOT / "icl").rglob("*.py")):  # the API page is made from its docstrings
            (copied := copy / source.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            # Two asterisks of w* in a line would set what is between them in italics.
            copied.write_text(STAR.sub("∗", source.read_text(encoding="utf-8")), encoding="utf-8")
        shutil.copytree(DOCS, copy / "docs", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        for page in sorted(DOCS.rglob("*.md")):
            text = with_links_inside(page.read_text(encoding="utf-8"), page, copy / "docs")
            (copy / "docs" / page.relative_to(DOCS)).write_text(text, encoding="utf-8")
        zensical = Path(sys.executable).parent / "zensical"
        subprocess.run([str(zensical), "build", "--strict", "--clean"], cwd=copy, check=True)
        site = copy / "site"
        for page in site.rglob("*.html"):
            local = os.path.relpath(site / SEARCH, page.parent)
            page.write_text(FETCHED.sub(f'<script src="{local}"></script>', page.read_text(encoding="utf-8")))
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(site, folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "site")
