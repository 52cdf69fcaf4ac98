"""Rows of tokens, from wherever they are: files of rows, text and a tokenizer, data sets.

Shapes: N rows, T tokens of a row.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from icl.config import ConfigError
from icl.config.language import TokensConfig
from icl.streams import Stream

TEXT_COLUMNS = ("contents", "text", "tokens", "input_ids")
_ROWS_AT_ONCE = 2**14


class TokenRows:
    """Rows of tokens (N, T), on disk or in memory; `rows[index]` reads those that are asked for alone.

    Args:
        data: anything with a shape (N, T) that is indexed by arrays of row numbers, such as a memory-mapped array.
        n_ctx: T; longer rows are cut.
        source: what to call it in messages.

    Raises:
        ConfigError: the data are not rows of at least n_ctx whole numbers.
    """

    def __init__(self, data: Any, n_ctx: int, source: str) -> None:
        shape = tuple(getattr(data, "shape", ()))
        if len(shape) != 2 or not np.issubdtype(data.dtype, np.integer):
            raise ConfigError(
                f"{source} holds {data.dtype} of shape {shape}; it must hold whole numbers (rows, tokens)"
            )
        if shape[0] < 1 or shape[1] < n_ctx:
            raise ConfigError(
                f"{source} holds {shape[0]} rows of {shape[1]} tokens, and n_ctx={n_ctx} are needed; make n_ctx smaller"
            )
        self._data, self.n_ctx, self.source = data, n_ctx, source

    def __len__(self) -> int:
        return self._data.shape[0]

    def __getitem__(self, index: slice | NDArray[np.int64] | Tensor) -> Tensor:
        """The rows of these numbers (B,), as int64 (B, T)."""
        chosen = index if isinstance(index, slice) else np.asarray(index)
        return torch.from_numpy(np.ascontiguousarray(self._data[chosen][:, : self.n_ctx]).astype(np.int64))

    def sha256(self) -> str:
        """Of all tokens, as 32-bit numbers row by row."""
        digest = hashlib.sha256()
        for start in range(0, len(self), _ROWS_AT_ONCE):
            digest.update(self[start : start + _ROWS_AT_ONCE].numpy().astype("<i4").tobytes())
        return digest.hexdigest()

    def check(self, d_vocab: int, sha256: str | None = None) -> "TokenRows":
        """Refuse tokens outside the vocabulary, and other rows than the expected ones; returns itself.

        Raises:
            ConfigError: naming the token or the two checksums.
        """
        for start in range(0, len(self), _ROWS_AT_ONCE):
            part = self[start : start + _ROWS_AT_ONCE]
            low, high = int(part.min()), int(part.max())
            if low < 0 or high >= d_vocab:
                raise ConfigError(
                    f"{self.source} holds the token {low if low < 0 else high}; with d_vocab={d_vocab} they are 0 to {d_vocab - 1}"
                )
        if sha256 is not None and (found := self.sha256()) != sha256:
            raise ConfigError(
                f"the tokens of {self.source} have sha256 {found}, not {sha256}: another text, version of the package or tokenizer; "
                "take the right one, or leave tokens.sha256 out for a run of its own"
            )
        return self


def token_rows(config: TokensConfig, n_ctx: int, d_vocab: int) -> TokenRows:
    """The rows that the settings describe, checked against the vocabulary.

    Raises:
        ConfigError: a file, package, column or tokenizer is absent, or holds something else; or a needed package is not installed.
    """
    if config.rows is not None:
        rows = rows_of_file(config.rows, n_ctx)
    elif config.text:
        rows = rows_of_documents(
            [path.read_text(encoding="utf-8") for path in text_files(config)], config, n_ctx, d_vocab
        )
    elif config.dataset is not None:
        rows = _rows_of_dataset(config, n_ctx, d_vocab)
    else:
        raise ConfigError("tokens: say where they come from: rows (a file of token rows), text (files), or dataset")
    return rows.check(d_vocab, config.sha256)


def rows_of_file(path: str | os.PathLike[str], n_ctx: int) -> TokenRows:
    """The rows of a .npy file, or of the one tensor of a .safetensors file; they stay on disk until they are asked for.

    Raises:
        ConfigError: no such file, or it holds something else.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(f"tokens.rows: there is no file {path}")
    try:
        if path.suffix == ".npy":
            return TokenRows(np.load(path, mmap_mode="r", allow_pickle=False), n_ctx, str(path))
        if path.suffix == ".safetensors":
            return TokenRows(_mapped_safetensors(path), n_ctx, str(path))
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"tokens.rows: {path} cannot be read as token rows: {' '.join(str(error).split())[:150]}"
        ) from None
    raise ConfigError(f"tokens.rows: {path} is neither .npy nor .safetensors")


_SAFETENSORS_TYPES = {
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "U16": "<u2",
    "U32": "<u4",
    "U64": "<u8",
}


def _mapped_safetensors(path: Path) -> NDArray[Any]:
    """The one tensor of a file as a memory-mapped array: the format is a length, a JSON header, and the bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("it is no safetensors file, or truncated")
        header = json.loads(file.read(length))
    tensors = {name: value for name, value in header.items() if name != "__metadata__"}
    if len(tensors) != 1:
        raise ConfigError(f"tokens.rows: {path} holds {len(tensors)} tensors; it must hold one, the token rows")
    (tensor,) = tensors.values()
    if tensor["dtype"] not in _SAFETENSORS_TYPES:
        raise ConfigError(f"tokens.rows: {path} holds {tensor['dtype']}; it must hold whole numbers (rows, tokens)")
    start = 8 + length + tensor["data_offsets"][0]
    return np.memmap(path, _SAFETENSORS_TYPES[tensor["dtype"]], "r", start, tuple(tensor["shape"]))


def text_files(config: TokensConfig) -> list[Path]:
    """The text files, in the order of their names for each pattern.

    Raises:
        ConfigError: the package is not installed, or a pattern fits no file.
    """
    root = Path.cwd() if config.package is None else _folder_of(config.package)
    found: list[Path] = []
    for pattern in config.text:
        path = Path(pattern).expanduser()
        base, inner = (Path(path.anchor), str(path.relative_to(path.anchor))) if path.is_absolute() else (root, pattern)
        fitting = sorted(each for each in base.glob(inner) if each.is_file())
        if not fitting:
            raise ConfigError(f"tokens.text: no file fits {pattern} in {base}")
        found += fitting
    return found


def _folder_of(package: str) -> Path:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        raise ConfigError(f"tokens.package: {package} is not installed; pip install {package}")
    return Path(spec.origin).parent


def rows_of_documents(documents: Sequence[str], config: TokensConfig, n_ctx: int, d_vocab: int) -> TokenRows:
    """Documents as rows; see `TokensConfig`.

    Raises:
        ConfigError: the tokenizer is absent or lacks BOS, or the text is shorter than a row.
    """
    tokenizer = (
        load_tokenizer(config) if config.tokenizer is not None else trained_tokenizer(documents, d_vocab, config.begin)
    )
    begin = tokenizer.token_to_id(config.begin)
    if begin is None:
        raise ConfigError(f"tokens.begin: the tokenizer has no token {config.begin!r}")
    encoded = (tokenizer.encode(document, add_special_tokens=False).ids for document in documents)
    return cut_into_rows(encoded, begin, n_ctx, "the text")


def cut_into_rows(documents: Iterable[Sequence[int]], begin: int, n_ctx: int, source: str) -> TokenRows:
    """Documents of tokens joined with `begin` between them, cut into pieces of n_ctx - 1, each after a `begin`; what is left of the end is
    dropped.

    Raises:
        ConfigError: there are fewer tokens than one row needs.
    """
    joined: list[NDArray[np.int32]] = []
    for document in documents:
        joined += [np.array([begin], dtype=np.int32)] * bool(joined) + [np.asarray(document, dtype=np.int32)]
    tokens = np.concatenate(joined) if joined else np.zeros(0, np.int32)
    count = len(tokens) // (n_ctx - 1)
    if count < 1:
        raise ConfigError(
            f"{source} has {len(tokens)} tokens, and one row needs {n_ctx - 1}; give more text or a smaller n_ctx"
        )
    pieces = tokens[: count * (n_ctx - 1)].reshape(count, n_ctx - 1)
    return TokenRows(np.concatenate([np.full((count, 1), begin, np.int32), pieces], axis=1), n_ctx, source)


def trained_tokenizer(documents: Sequence[str], d_vocab: int, begin: str) -> Any:
    """A byte-level BPE tokenizer (GPT-2's kind) of d_vocab tokens, trained on the documents; `begin` is its last token.

    Raises:
        ConfigError: the package tokenizers is missing, or d_vocab is too small for the 256 bytes and `begin`.
    """
    tokenizers = _needed("tokenizers")
    if d_vocab < 257:
        raise ConfigError(f"d_vocab={d_vocab}: a byte-level tokenizer has 256 bytes and {begin}; take at least 257")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=d_vocab - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != d_vocab - 1:
        raise ConfigError(
            f"d_vocab={d_vocab}: the text is too short for more than {tokenizer.get_vocab_size() + 1} tokens"
        )
    tokenizer.add_special_tokens([begin])
    return tokenizer


def load_tokenizer(config: TokensConfig) -> Any:
    """The tokenizer of a file `tokenizer.json`, or of the Hub.

    Raises:
        ConfigError: it cannot be read.
    """
    assert config.tokenizer is not None
    tokenizers = _needed("tokenizers")
    path = Path(config.tokenizer).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        if path.is_file():
            return tokenizers.Tokenizer.from_file(str(path))
        if path.suffix == ".json":
            raise ConfigError(f"tokens.tokenizer: there is no file {path}")
        from icl.subjects.hub import hub_file

        return tokenizers.Tokenizer.from_file(
            str(hub_file(config.tokenizer, "tokenizer.json", config.tokenizer_revision))
        )
    except ConfigError:
        raise
    except Exception as error:  # the package raises plain exceptions
        reason = " ".join(str(error).split())[:150]
        raise ConfigError(
            f"tokens.tokenizer: {config.tokenizer} is no tokenizer.json that can be read: {reason}"
        ) from None


def _rows_of_dataset(config: TokensConfig, n_ctx: int, d_vocab: int) -> TokenRows:
    datasets = _needed("datasets")
    assert config.dataset is not None
    path = Path(config.dataset).expanduser()
    try:
        data = (
            datasets.load_from_disk(str(path))
            if path.is_dir()
            else datasets.load_dataset(config.dataset, split=config.split)
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"tokens.dataset: {config.dataset} cannot be read: {reason}") from None
    if isinstance(data, dict):
        if config.split not in data:
            raise ConfigError(f"tokens.split: {config.dataset} has no {config.split}; there are: {', '.join(data)}")
        data = data[config.split]
    return rows_of_dataset(data, config, n_ctx, d_vocab)


def rows_of_dataset(data: Any, config: TokensConfig, n_ctx: int, d_vocab: int) -> TokenRows:
    """The rows of a map-style data set with a column of text or of token rows.

    Raises:
        ConfigError: there is no such column, or its rows differ in length.
    """
    columns = list(getattr(data, "column_names", None) or data[0])
    column = config.column or next((name for name in TEXT_COLUMNS if name in columns), None)
    if column is None or column not in columns:
        raise ConfigError(
            f"tokens.column: the data set has the columns {', '.join(columns)}; say which holds the text or the tokens"
        )
    if isinstance(data[0][column], str):
        return rows_of_documents([data[index][column] for index in range(len(data))], config, n_ctx, d_vocab)
    return TokenRows(_DatasetRows(data, column, n_ctx), n_ctx, f"column {column}")


class _DatasetRows:
    """A column of token rows, indexed like an array."""

    dtype = np.dtype(np.int64)

    def __init__(self, data: Any, column: str, n_ctx: int) -> None:
        self._data, self._column, self._n_ctx = data, column, n_ctx
        self.shape = (len(data), len(data[0][column]))

    def __getitem__(self, index: Any) -> NDArray[np.int64]:
        numbers = range(*index.indices(len(self._data))) if isinstance(index, slice) else index
        rows = [self._data[int(number)][self._column] for number in numbers]
        if any(len(row) < self._n_ctx for row in rows):
            raise ConfigError(
                f"column {self._column} has rows of {min(map(len, rows))} tokens, and n_ctx={self._n_ctx} are needed"
            )
        return np.asarray([np.asarray(row[: self._n_ctx], dtype=np.int64) for row in rows]).reshape(-1, self._n_ctx)


def _needed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ConfigError(f"the package {package} is needed here; pip install 'icl[hub]'") from None


class RowBatches:
    """Step -> a batch `(tokens (B, T),)` of rows, as a function of the seed; the last incomplete batch of a pass is left out.

    Args:
        rows: to take from.
        chosen: numbers of the rows to take; None: all.
        batch_size: B, at most the number of rows.
        stream: of the order, drawn anew for every pass; None: the order of the file.
    """

    def __init__(
        self, rows: TokenRows, batch_size: int, chosen: Tensor | None = None, stream: Stream | None = None
    ) -> None:
        self._rows, self._stream = rows, stream
        self._chosen = torch.arange(len(rows)) if chosen is None else chosen
        self._batch_size = min(batch_size, len(self._chosen))
        self._pass = -1, self._chosen

    def __len__(self) -> int:
        """Batches of a pass."""
        return len(self._chosen) // self._batch_size

    def __call__(self, step: int) -> tuple[Tensor]:
        epoch, index = divmod(step, len(self))
        current = self._pass
        if current[0] != epoch:
            # One tuple, replaced at once: worker threads in different passes each read a matching pair.
            current = self._pass = epoch, self._order(epoch)
        return (self._rows[current[1][index * self._batch_size : (index + 1) * self._batch_size]],)

    def _order(self, epoch: int) -> Tensor:
        if self._stream is None:
            return self._chosen
        return self._chosen[self._stream.uniform(epoch, (len(self._chosen),)).argsort(stable=True)]


def split(count: int, held_out: int) -> tuple[Tensor, Tensor]:
    """Numbers of the rows to train on, and of those held out, spread evenly over all.

    Raises:
        ConfigError: nothing is left to train on.
    """
    if held_out >= count:
        raise ConfigError(f"held_out={held_out} of {count} rows leaves none to train on; make it smaller")
    held = (torch.arange(held_out) * count) // held_out
    train = torch.ones(count, dtype=torch.bool)
    train[held] = False
    return train.nonzero()[:, 0], held
