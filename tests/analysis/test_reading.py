"""Damaged tables: every reader names the file and says what to do, in one line."""

import gzip
import re

import pytest

from icl.analysis.run_tables import read_run_table
from icl.analysis.tables import AnalysisTable, read_table
from icl.figures import families

TABLE = "model_seed,optimizer_config.lr,step,llc/mean,verdict\n" + "".join(
    f"3,0.01,{step},{step / 7},healthy\n" for step in range(300)
)
PACKED = gzip.compress(TABLE.encode(), mtime=0)

DAMAGES = {
    "cut off": ("llc.csv.gz", PACKED[: len(PACKED) // 2], "ended before the end"),
    "flipped bytes": ("llc.csv.gz", PACKED[:40] + b"\xff\x00\xff" + PACKED[43:], "not a readable table"),
    "not compressed": ("llc.csv.gz", TABLE.encode(), "gzip"),
    "empty": ("llc.csv", b"", "No columns"),
    "of other bytes": ("llc.csv", b"model_seed,step\n\xff\xfe,1\n", "decode"),
    "with rows of unequal length": ("llc.csv", b"model_seed,step\n1,2\n1,2,3,4\n", "line 3"),
    "with a text for a seed": ("llc.csv", TABLE.replace("3,0.01,7,", "x,0.01,7,").encode(), "line 9 has 'x' in the column model_seed"),
    "with a text for a step": ("llc.csv", TABLE.replace(",7,", ",seven,").encode(), "line 9 has 'seven' in the column step"),
    "with a text for an estimate": ("llc.csv", TABLE.replace(",7,1.0,", ",7,one,").encode(), "'one' in the column llc/mean"),
    "without a step": ("llc.csv", TABLE.replace(",7,1.0,", ",,1.0,").encode(), "line 9 has 'nan' in the column step"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_reader_names_a_damaged_table(tmp_path, damage):
    name, content, said = DAMAGES[damage]
    path = tmp_path / name
    path.write_bytes(content)
    (tmp_path / "llc.json").write_text("{}")
    for read in (read_table, read_run_table, lambda path: families.read_table(path.parent, "llc")):
        with pytest.raises(ValueError, match=re.escape(f"{path} is not a readable table (")) as caught:
            read(path)
        assert said in str(caught.value)
        assert str(caught.value).endswith("delete it to make it again")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("beside", ["[]", '"a"', "{", "[" * 100_000, '{"runs": []}', None])
def test_every_reader_names_a_table_whose_settings_are_damaged(tmp_path, beside):
    path = tmp_path / "evals.csv"
    path.write_text(TABLE)
    if beside is not None:
        (tmp_path / "evals.json").write_text(beside)
    for read in (read_run_table, lambda path: AnalysisTable(path, {})):
        with pytest.raises(ValueError, match=re.escape(f"{path} has no readable settings in evals.json (")) as caught:
            read(path)
        assert "move the table away" in str(caught.value)
