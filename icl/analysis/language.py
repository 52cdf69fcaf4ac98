"""Measures of a language model at every checkpoint, as tables. The checkpoints are those of a run, a folder or a repository.

There are three tables, each with the columns `model_seed` (0 if none is known) and `step`:

- `behaviour`: `test/loss` (nats), `test/icl` (`icl.analysis.context`; negative is in-context learning) and `test/icl_wide` (the same
  between averages over neighbouring places), `test/loss_without_positions` (positional ablation: the position embedding set to zero),
  `bigram_score` with its minimum `bigram_entropy`, `unigram_entropy`,
  `ngram_loss/n` if words are known, `previous_token/max` and `prefix_matching/max` over the heads of all blocks, `repetition_gain`
  (`icl.analysis.induction`; negative is induction), `weight/norm`;
- `token_losses`: `loss/k`, the loss of token k + 1, predicted from tokens 0..k;
- `heads`: per `block` and `head`, `previous_token` and `prefix_matching` (`icl.analysis.induction`), and `k_composition`, the largest
  K-composition with a head of the block before (`icl.analysis.composition`).

Shapes: N rows, T tokens, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from icl import __version__
from icl.analysis.bigrams import bigram_counts, bigram_entropy, bigram_score, unigram_entropy
from icl.analysis.composition import k_composition
from icl.analysis.context import in_context_score
from icl.analysis.induction import (
    LENGTHS,
    REPEATED_LENGTH,
    prefix_matching_scores,
    previous_token_scores,
    repetition_gain,
)
from icl.analysis.ngrams import ngram_losses
from icl.analysis.tables import AnalysisTable
from icl.evals import weight_norm
from icl.storage.locks import exclusive
from icl.subjects.language import AttentionOnlyTransformer, logits_of, token_losses

TABLES = ("behaviour", "token_losses", "heads")
SAMPLES = 1000
"""The number of random sequences for the scores of heads. The published curves used 10,000."""
WIDTH = 0.5
"""Of the places of `test/icl_wide`, relative to them."""
AT_ONCE = 32


@dataclass(frozen=True)
class LanguageData:
    """The data on which a model is measured.

    Attributes:
        test: (N, T) rows on which the model was not trained.
        counts: (V, V) bigram counts of the training data.
        begin: the beginning-of-text token, BOS.
        words: n -> (W, n) tokens of words (`icl.analysis.ngrams`); empty if no tokenizer is known.
        samples: number of random sequences for the scores of heads.
    """

    test: Tensor
    counts: Tensor
    begin: int
    words: Mapping[int, Tensor]
    samples: int = SAMPLES

    @classmethod
    def of_rows(
        cls, train: Tensor, test: Tensor, d_vocab: int, words: Mapping[int, Tensor] | None = None
    ) -> "LanguageData":
        """Make the data from rows in which bigrams are counted and rows for testing. BOS is the most common first token."""
        begin = int(torch.mode(test[:, 0]).values)
        return cls(test, bigram_counts(train, d_vocab), begin, words or {})


@torch.no_grad()
def measure_language(model: AttentionOnlyTransformer, data: LanguageData) -> dict[str, pd.DataFrame]:
    """The rows of one checkpoint for each table of `TABLES`."""
    shape, weights = model.shape, {name: value.detach() for name, value in model.named_parameters()}
    losses, blind, bigram = [], 0.0, 0.0
    for part in data.test.split(AT_ONCE):
        logits = logits_of(weights, part)
        losses.append(token_losses(logits, part).double())
        bigram += len(part) * bigram_score(logits, part, data.counts)
        blind += len(part) * float(token_losses(logits_of(weights, part, positions=False), part).double().mean())
    mean = torch.cat(losses).mean(dim=0)
    longest = (min(LENGTHS[0], shape.n_ctx), min(LENGTHS[1], shape.n_ctx))
    previous = previous_token_scores(model.patterns, shape.d_vocab, data.begin, data.samples, longest)
    repeated = min(REPEATED_LENGTH, shape.n_ctx)
    prefix = prefix_matching_scores(model.patterns, shape.d_vocab, data.begin, data.samples, repeated)
    gain = repetition_gain(
        lambda tokens: token_losses(logits_of(weights, tokens), tokens),
        shape.d_vocab,
        data.begin,
        data.samples,
        repeated,
    )
    count = len(data.test)
    behaviour = {
        "test/loss": float(mean.mean()),
        "test/icl": in_context_score(mean),
        "test/icl_wide": in_context_score(mean, width=WIDTH),
        "test/loss_without_positions": blind / count,
        "bigram_score": bigram / count,
        "bigram_entropy": bigram_entropy(data.counts),
        "unigram_entropy": unigram_entropy(data.counts),
        **ngram_losses(lambda tokens: logits_of(weights, tokens), data.words, data.begin),
        "previous_token/max": float(previous.max()),
        "prefix_matching/max": float(prefix.max()),
        "repetition_gain": gain,
        "weight/norm": weight_norm(weights),
    }
    composed = [torch.full((shape.n_heads,), torch.nan)]
    composed += [k_composition(weights, block - 1, block).max(dim=0).values for block in range(1, shape.n_layers)]
    heads = [
        {
            "block": block,
            "head": head,
            "previous_token": float(previous[block, head]),
            "prefix_matching": float(prefix[block, head]),
            "k_composition": float(composed[block][head]),
        }
        for block in range(shape.n_layers)
        for head in range(shape.n_heads)
    ]
    return {
        "behaviour": pd.DataFrame([behaviour]),
        "token_losses": pd.DataFrame([{f"loss/{place}": value for place, value in enumerate(mean.tolist())}]),
        "heads": pd.DataFrame(heads),
    }


def analyse_language(
    steps: Sequence[int],
    model_at: Callable[[int], AttentionOnlyTransformer],
    data: LanguageData,
    output: Path,
    source: str,
    seed: int = 0,
    progress: Callable[[int, str, int], None] = lambda done, note, total: None,
) -> dict[str, Path]:
    """Measure checkpoints and keep the tables in a folder. Checkpoints that are in a table already are not measured again.

    Args:
        steps: the steps of the checkpoints.
        model_at: step -> model.
        data: the data to measure on.
        output: the folder for the tables.
        source: the run's name, or where the checkpoints come from.
        seed: `model_seed` of the rows.
        progress: called before each checkpoint with (checkpoints done, what comes next, checkpoints in all).

    Returns:
        Name of the table -> its file.

    Raises:
        ValueError: a table in the folder was made on other data.
        RunInUseError: another process writes to the folder.
    """
    digest = [int(data.test.double().sum()), int(data.counts.sum()), len(data.test)]
    settings = {"data": digest, "samples": data.samples, "icl_version": __version__}
    with exclusive(output / ".lock", f"the folder {output}"):
        tables = {name: AnalysisTable(output / f"{name}.csv", settings) for name in TABLES}
        for table in tables.values():
            table.begin_run(seed, source)
        done = set.intersection(*(table.steps(seed) for table in tables.values()))
        todo = [step for step in steps if step not in done]
        for number, step in enumerate(todo):
            progress(number, f"step {step}", len(todo))
            for name, rows in measure_language(model_at(step), data).items():
                if step not in tables[name].steps(seed):
                    tables[name].add(seed, step, rows)
            for table in tables.values():
                table.write()
        progress(len(todo), "", len(todo))
    return {name: tables[name].path for name in TABLES}
