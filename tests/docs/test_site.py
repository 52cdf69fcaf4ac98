"""The documentation site builds strictly, shows nothing that is missing, loads nothing from elsewhere, and searches without a network."""

import re
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlparse

import headless
import pytest

import icl.sampling

ROOT = Path(__file__).parents[2]
LOADING = {
    ("script", "src"),
    ("img", "src"),
    ("iframe", "src"),
    ("source", "src"),
    ("video", "src"),
    ("object", "data"),
}
LINKS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "manifest"}

pytestmark = pytest.mark.xdist_group("site")  # built once


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("zensical", reason="the docs' packages are not here: pip install 'icl[docs]'")
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "build_site.py", folder], capture_output=True, text=True, cwd=folder.parent
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Loaded(HTMLParser):
    """What a page makes a browser fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.found += [value for name, value in attrs if (tag, name) in LOADING and value]
        if tag == "link" and LINKS & set((given.get("rel") or "").split()):
            self.found.append(given["href"] or "")
        if given.get("srcset"):
            self.found += [part.split()[0] for part in (given["srcset"] or "").split(",")]
        self.found += re.findall(r"url\(([^)]+)\)", given.get("style") or "")


def test_every_page_is_there(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= {path.relative_to(site) for path in site.rglob("*.html")}
    menu = (ROOT / "mkdocs.yml").read_text()
    assert [str(page) for page in pages if f": {page.with_suffix('.md')}\n" not in menu] == []


def test_the_api_page_has_what_is_public():
    page = (ROOT / "docs" / "api.md").read_text()
    missing = [
        name for package in (icl, icl.sampling) for name in package.__all__ if not re.search(rf"\b{name}\b", page)
    ]
    assert missing == ["__version__"]


def test_what_pages_load_is_beside_them(site):
    for page in site.rglob("*.html"):
        for address in Loaded(page.read_text()).found:
            parts = urlparse(address)
            assert parts.scheme in ("", "data"), f"{page.name} loads {address}"
            assert not parts.netloc, f"{page.name} loads {address}"
            if not parts.scheme and page.name != "404.html":  # that one is shown at any address
                assert (page.parent / unquote(parts.path)).is_file(), f"{page.name} loads {address}, which is not there"


def test_style_sheets_load_nothing_from_elsewhere(site):
    sheets = list(site.rglob("*.css"))
    assert sheets
    for sheet in sheets:
        text = sheet.read_text()
        loaded = [*re.findall(r"url\(([^)]{0,60})", text), *re.findall(r"@import[^;]{0,60}", text)]
        assert [each for each in loaded if not each.strip("'\"").startswith(("data:", "#"))] == []


SEARCH = """
[...document.querySelectorAll("*")].flatMap(each => each.shadowRoot ? [...each.shadowRoot.querySelectorAll("ol a")] : [])
    .map(link => link.href)
"""


@pytest.mark.skipif(headless.browser() is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize(
    "served",
    [pytest.param(False, id="from a folder"), pytest.param(True, id="from a server", marks=pytest.mark.slow)],
)
def test_a_browser_searches_it_and_asks_nobody_else(site, served):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    start = f"http://127.0.0.1:{server.server_port}" if served else site.as_uri()
    try:
        with headless.page() as page:
            for name in ("index", "concepts/sampling", "api", "reproduction"):
                page.open(f"{start}/{name}.html")
                assert page.run("document.querySelector('h1').textContent")
                assert page.run("[...document.images].filter(each => !each.naturalWidth).map(each => each.src)") == []
            page.open(f"{start}/concepts/sampling.html")
            page.wait_for("document.querySelector('.md-search__button') !== null")
            page.run("document.querySelector('.md-search__button').click()")
            page.wait_for("document.activeElement.shadowRoot?.activeElement?.matches('dialog[open] input')")
            page.type("burn-in")
            found = page.wait_for(f"(links => links.length && links)({SEARCH})")
            assert any("concepts/sampling.html" in address for address in found)
            elsewhere = [each for each in page.requested if not each.startswith((start + "/", "data:", "about:"))]
            assert elsewhere == []
    finally:
        server.shutdown()
        server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass
