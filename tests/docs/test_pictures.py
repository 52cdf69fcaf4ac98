"""The concepts' pictures are small, shown, and the same whenever they are drawn."""

from pathlib import Path

from docs.code_of_pages import run_page
from docs.make_pictures import CONCEPTS, DRAWN, PICTURES
from icl.figures.style import page, save

MOST = 1e6  # bytes


def test_every_concept_shows_its_picture():
    assert {path.stem for path in CONCEPTS.glob("*.md")} == set(DRAWN) == {path.stem for path in PICTURES.iterdir()}
    for name in DRAWN:
        assert f"(../pictures/{name}.png)" in (CONCEPTS / f"{name}.md").read_text()


def test_pictures_are_small():
    assert sum(path.stat().st_size for path in PICTURES.iterdir()) < MOST


def test_a_picture_is_drawn_the_same_twice(tmp_path: Path):
    name = "nbeta-and-gamma"
    drawn = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        names, _ = run_page(CONCEPTS / f"{name}.md")
        with page():
            (path,) = save(DRAWN[name](names), folder, name, kinds=("png",))
        drawn.append(path.read_bytes())
    assert drawn[0] == drawn[1]
