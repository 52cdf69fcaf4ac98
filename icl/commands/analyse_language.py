"""`icl analyse` for language models: a run of this library, or a folder of public checkpoint files."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from icl.analysis.language import LanguageData, analyse_language
from icl.analysis.ngrams import common_words
from icl.checkpoints import Checkpoints
from icl.config import ConfigError
from icl.config.language import LanguageTraining, TokensConfig
from icl.execution.progress import progress_bar
from icl.subjects.language import AttentionOnlyTransformer
from icl.subjects.language_checkpoints import FolderCheckpoints, load_model
from icl.subjects.tokens import (
    TokenRows,
    load_tokenizer,
    rows_of_file,
    split,
    text_files,
    token_rows,
    trained_tokenizer,
)

MOST_ROWS = 4096
"""The most rows in which bigrams are counted."""
TEST_ROWS = 256
"""The most rows on which public checkpoint files are tested."""


def analyse_run(
    checkpoints: Checkpoints, config: LanguageTraining, output: Path | None, steps: list[int] | None = None
) -> dict[str, Path]:
    """Measure checkpoints of a run (all by default) on the rows held out from its training; returns table -> file."""
    task = config.task_config
    rows = token_rows(task.tokens, task.n_ctx, task.d_vocab)
    train, test = split(len(rows), task.held_out)
    data = _data(rows, train, test, task.d_vocab, task.tokens)

    def model_at(step: int) -> AttentionOnlyTransformer:
        return AttentionOnlyTransformer.from_weights(checkpoints.load(step))

    return _analysed(steps or checkpoints.steps(), model_at, data, output, checkpoints.run_name, task.model_seed or 0)


def analyse_folder(folder: Path, tokens: Path, output: Path | None) -> dict[str, Path]:
    """Measure public checkpoint files on rows of tokens. The first rows are for testing; bigrams are counted in the others."""
    found = FolderCheckpoints(folder)
    shape = load_model(found.path(found.steps()[0])).shape
    rows = rows_of_file(tokens, shape.n_ctx).check(shape.d_vocab)
    if len(rows) < 2:
        raise ConfigError(f"{tokens} holds one row; give two or more, one for testing and one for counting bigrams")
    held = min(TEST_ROWS, len(rows) // 2)
    train, test = torch.arange(held, len(rows)), torch.arange(held)
    data = _data(rows, train, test, shape.d_vocab, TokensConfig(rows=str(tokens)))
    return _analysed(found.steps(), lambda step: load_model(found.path(step)), data, output, folder.resolve().name, 0)


def _data(rows: TokenRows, train: torch.Tensor, test: torch.Tensor, d_vocab: int, tokens: TokensConfig) -> LanguageData:
    spread = train[np.linspace(0, len(train) - 1, min(len(train), MOST_ROWS)).astype(int)]
    return LanguageData.of_rows(rows[spread], rows[test], d_vocab, _words(tokens, d_vocab))


def _words(config: TokensConfig, d_vocab: int) -> dict[int, torch.Tensor]:
    """The text's common words by their number of tokens; empty if the rows do not come from text files."""
    if not config.text:
        return {}
    documents = [path.read_text(encoding="utf-8") for path in text_files(config)]
    tokenizer = load_tokenizer(config) if config.tokenizer else trained_tokenizer(documents, d_vocab, config.begin)
    return common_words(documents, lambda word: tokenizer.encode(word, add_special_tokens=False).ids)


def _analysed(
    steps: Sequence[int],
    model_at: Callable[[int], AttentionOnlyTransformer],
    data: LanguageData,
    output: Path | None,
    source: str,
    seed: int,
) -> dict[str, Path]:
    with progress_bar("analysing") as update:
        paths = analyse_language(
            steps,
            model_at,
            data,
            output or Path("data") / source,
            source,
            seed,
            update,
        )
    for path in paths.values():
        print(path)
    return paths
