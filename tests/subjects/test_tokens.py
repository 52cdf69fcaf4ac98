"""Rows of tokens from files, text and data sets."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from icl.config import ConfigError
from icl.config.language import TokensConfig
from icl.streams import Stream
from icl.subjects.tokens import (
    RowBatches,
    TokenRows,
    cut_into_rows,
    rows_of_dataset,
    rows_of_file,
    split,
    token_rows,
    trained_tokenizer,
)

ROWS = np.arange(7 * 5).reshape(7, 5)
TEXTS = ["The cat sat on the mat. The cat sat.\n" * 5, "A dog and a cat, and a dog.\n" * 5]


def texts(tmp_path):
    for name, text in zip(("b.txt", "a.txt"), TEXTS, strict=True):
        (tmp_path / name).write_text(text)
    return str(tmp_path / "*.txt")


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
@pytest.mark.parametrize("dtype", ["int64", "int32", "uint16"])
def test_rows_of_a_file(tmp_path, kind, dtype):
    path = tmp_path / f"rows.{kind}"
    if kind == "npy":
        np.save(path, ROWS.astype(dtype))
    else:
        save_file({"tokens": ROWS.astype(dtype)}, path, {"about": "rows"})
    rows = rows_of_file(path, 5)
    assert len(rows) == 7
    assert torch.equal(rows[:], torch.from_numpy(ROWS))
    assert torch.equal(rows[np.array([3, 1])], torch.from_numpy(ROWS[[3, 1]]))
    assert torch.equal(rows_of_file(path, 3)[:], torch.from_numpy(ROWS[:, :3]))
    assert isinstance(rows._data, np.memmap)  # nothing is read before it is asked for
    assert rows.sha256() == TokenRows(ROWS, 5, "rows").sha256()


def bad_file(tmp_path, case):
    path = tmp_path / {"suffix": "rows.txt", "truncated safetensors": "rows.safetensors"}.get(case, "rows.npy")
    if case == "absent":
        return path
    if case in ("suffix", "no array"):
        path.write_bytes(b"no rows")
    elif case == "truncated safetensors":
        path.write_bytes(b"\xff" * 20)
    elif case == "objects":
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    else:
        np.save(path, {"floats": ROWS * 0.5, "one axis": ROWS[0], "short": ROWS[:, :3], "none": ROWS[:0]}[case])
    return path


@pytest.mark.parametrize(
    ("case", "message"),
    {
        "absent": "there is no file",
        "suffix": r"neither \.npy nor \.safetensors",
        "no array": "cannot be read as token rows",
        "objects": "cannot be read as token rows",
        "truncated safetensors": "no safetensors file, or truncated",
        "floats": "must hold whole numbers",
        "one axis": "must hold whole numbers",
        "short": "7 rows of 3 tokens, and n_ctx=5 are needed",
        "none": "0 rows of 5 tokens",
    }.items(),
)
def test_files_that_hold_no_rows(tmp_path, case, message):
    with pytest.raises(ConfigError, match=message):
        rows_of_file(bad_file(tmp_path, case), 5)


def test_tokens_outside_the_vocabulary_and_other_data(tmp_path):
    rows = TokenRows(ROWS, 5, "rows")
    assert rows.check(35, rows.sha256()) is rows
    with pytest.raises(ConfigError, match="the token 34; with d_vocab=34 they are 0 to 33"):
        rows.check(34)
    with pytest.raises(ConfigError, match="the token -1"):
        TokenRows(ROWS - 1, 5, "rows").check(99)
    with pytest.raises(ConfigError, match=f"sha256 {rows.sha256()}, not abc: another text"):
        rows.check(35, "abc")


def test_documents_are_joined_and_cut_as_the_published_ones():
    """TransformerLens's tokenize_and_concatenate with add_bos_token, on numbers: BOS is 0."""
    rows = cut_into_rows([[1, 2, 3], [4], [5, 6, 7, 8]], 0, 4, "text")
    assert rows[:].tolist() == [[0, 1, 2, 3], [0, 0, 4, 0], [0, 5, 6, 7]]
    with pytest.raises(ConfigError, match="the text has 2 tokens, and one row needs 3"):
        cut_into_rows([[1, 2]], 0, 4, "the text")


def test_text_with_a_tokenizer_that_is_trained_on_it(tmp_path):
    config = TokensConfig(text=(texts(tmp_path),))
    rows = token_rows(config, 11, 265)
    tokenizer = trained_tokenizer([TEXTS[1], TEXTS[0]], 265, config.begin)  # in the order of the files' names
    assert tokenizer.get_vocab_size() == 265
    begin = tokenizer.token_to_id(config.begin)
    assert begin == 264
    assert (rows[:][:, 0] == begin).all()
    joined = rows[:][:, 1:].flatten().tolist()
    expected = [*tokenizer.encode(TEXTS[1]).ids, begin, *tokenizer.encode(TEXTS[0]).ids]
    assert joined == expected[: len(joined)]
    assert len(expected) - len(joined) < 10
    assert token_rows(config, 11, 265).sha256() == rows.sha256()
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    stored = token_rows(config.model_copy(update={"tokenizer": str(path)}), 11, 265)
    assert stored.sha256() == rows.sha256()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "say where they come from"),
        ({"text": ("absent*.txt",)}, "no file fits absent"),
        (
            {"text": ("*.txt",), "package": "no_such_package_anywhere"},
            "no_such_package_anywhere is not installed; pip install",
        ),
        ({"rows": "x.npy", "text": ("a",)}, "rows and text both give the tokens"),
        ({"package": "json"}, "package is the folder of text files"),
        ({"rows": "x.npy", "tokenizer": "t.json"}, "rows holds tokens already, and tokenizer is for text"),
        ({"text": ("{texts}",), "tokenizer": "absent.json"}, r"there is no file absent\.json"),
        ({"text": ("{texts}",), "tokenizer": "{texts}/../a.txt"}, r"no tokenizer\.json that can be read"),
    ],
)
def test_settings_that_give_no_tokens(tmp_path, settings, message):
    where = texts(tmp_path)
    settings = {
        key: tuple(each.format(texts=where) for each in value)
        if isinstance(value, tuple)
        else value.replace("{texts}/..", str(tmp_path))
        for key, value in settings.items()
    }
    with pytest.raises(ConfigError, match=message):
        token_rows(TokensConfig.parse(settings), 11, 265)


def test_a_vocabulary_without_room_and_a_text_that_is_too_short(tmp_path):
    config = TokensConfig(text=(texts(tmp_path),))
    with pytest.raises(ConfigError, match="take at least 257"):
        token_rows(config, 11, 256)
    with pytest.raises(ConfigError, match="too short for more than"):
        token_rows(config, 11, 5000)


class Columns(list):
    """A map-style data set."""

    column_names = ("id", "tokens")


def test_a_data_set_with_token_rows():
    data = Columns({"id": i, "tokens": row.tolist()} for i, row in enumerate(ROWS))
    rows = rows_of_dataset(data, TokensConfig(), 4, 99)
    assert torch.equal(rows[:], torch.from_numpy(ROWS[:, :4]))
    assert torch.equal(rows[torch.tensor([5, 2])], torch.from_numpy(ROWS[[5, 2], :4]))
    data[3]["tokens"] = [1]
    with pytest.raises(ConfigError, match="rows of 1 tokens"):
        _ = rows[:]
    with pytest.raises(ConfigError, match="columns id, tokens; say which"):
        rows_of_dataset(data, TokensConfig(column="words"), 4, 99)


def test_a_data_set_with_text():
    data = [{"text": text} for text in TEXTS]
    config = TokensConfig()
    rows = rows_of_dataset(data, config, 11, 265)
    begin = trained_tokenizer(TEXTS, 265, config.begin).token_to_id(config.begin)
    assert (rows[:][:, 0] == begin).all()


def test_batches_are_functions_of_the_step():
    rows, chosen = TokenRows(ROWS, 5, "rows"), torch.tensor([6, 0, 1, 2, 3])
    in_order = RowBatches(rows, 2, chosen)
    assert [in_order(step)[0][:, 0].tolist() for step in range(3)] == [[30, 0], [5, 10], [30, 0]]
    drawn = RowBatches(rows, 2, chosen, Stream(1, "order"))
    ahead = RowBatches(rows, 2, chosen, Stream(1, "order"))
    late = {step: ahead(step)[0] for step in reversed(range(10))}
    assert all(torch.equal(drawn(step)[0], late[step]) for step in range(10))
    for epoch in range(3):  # no row twice in a pass
        seen = torch.cat([drawn(2 * epoch)[0], drawn(2 * epoch + 1)[0]])[:, 0].tolist()
        assert len(set(seen)) == 4
        assert set(seen) <= {30, 0, 5, 10, 15}
    assert len({tuple(drawn(2 * epoch)[0][:, 0].tolist()) for epoch in range(9)}) > 1


def test_rows_are_held_out_evenly():
    train, held = split(10, 3)
    assert held.tolist() == [0, 3, 6]
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(10))
    with pytest.raises(ConfigError, match="leaves none to train on"):
        split(3, 3)
