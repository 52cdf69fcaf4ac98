"""The batches on which losses are evaluated: those of the draws, unless these are the gradient's, and those of L(w*).

Shapes: C models.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icl.sampling.config import SamplerConfig
from icl.sampling.init_losses import InitLosses, unpaired_share
from icl.sampling.plan import Evaluation
from icl.sampling.supply import Batch, BatchSource, Supply, evaluation_supply, num_samples
from icl.streams import Stream


@dataclass(frozen=True)
class Evaluated:
    """The batches by their index 0, 1, ...

    Attributes:
        batch: index -> batch.
        everything: all batches of a finite set that the user gave for evaluation; None if there is none.
        in_turn: whether the indices go through `everything` in turn. Then a larger batch counts for more in a mean over indices. Otherwise
            larger batches come more often, and all count the same.
        per_pass: how many indices make a pass over the data; None if the data are endless or are drawn at random.
        renewed: whether each pass has other batches.
        given: whether the user gave batches for evaluation. Otherwise they are the gradient's.
    """

    batch: Callable[[int], Batch]
    everything: Sequence[Batch] | None
    in_turn: bool
    per_pass: int | None
    renewed: bool
    given: bool

    @property
    def first(self) -> Batch:
        """The first batch of the set, or of index 0."""
        return self.batch(0) if self.everything is None else self.everything[0]

    def weight(self, batch: Batch) -> int:
        """What a batch counts in a mean over indices."""
        return num_samples(batch) if self.in_turn else 1


def evaluated_of(
    config: SamplerConfig,
    supply: Supply,
    eval_batches: BatchSource | Iterable[Batch] | None,
    seed: int,
    device: torch.device,
) -> Evaluated:
    """What the settings ask for.

    Args:
        supply: the gradient's batches.
        eval_batches: those that the user gave.
    """
    if eval_batches is None:
        source = supply.source
        batch = (lambda index: source(index, seed)) if config.independent_batches else source
        return Evaluated(batch, None, False, supply.per_pass, supply.cycle is None, given=False)
    # A seed of its own, because the order of the gradient's batches would be that of these.
    own_seed = Stream(seed, "evaluation-order").key()[0] & 0x7FFFFFFF
    held = evaluation_supply(eval_batches, own_seed, device)
    everything = held.everything
    if everything is None or config.eval_method == "new-minibatch":
        return Evaluated(held.source, everything, False, held.per_pass, held.cycle is None, given=True)
    count = len(everything)
    return Evaluated(lambda index: everything[index % count], everything, True, count, renewed=False, given=True)


def evaluation_of(config: SamplerConfig, evaluated: Evaluated) -> Evaluation | None:
    """How the losses of draws are evaluated, according to `eval_method`; None: on the gradient's batches.

    Raises:
        ValueError: the whole evaluation set is wanted, and there is none.
    """
    match config.eval_method:
        case "grad-minibatch":
            return None
        case "fixed-minibatch":
            first = [evaluated.first]
            return Evaluation(lambda draw: first, constant=True)
        case "new-minibatch":
            after = _unseen(config, evaluated)
            return Evaluation(lambda draw: [evaluated.batch(after + draw)], constant=False)
        case "dataset":
            everything = evaluated.everything
            if everything is None:
                raise ValueError(
                    "eval_method='dataset' needs eval_batches as a sequence that holds the whole evaluation set"
                )
            return Evaluation(lambda draw: everything, constant=True)


def _unseen(config: SamplerConfig, evaluated: Evaluated) -> int:
    """The first index whose batch the gradient does not see."""
    return 0 if evaluated.given else config.num_steps


def init_errors(config: SamplerConfig, supply: Supply, evaluated: Evaluated, init: InitLosses, draws: int) -> Tensor:
    """The standard errors (C,) of λ̂ because L(w*) is not taken on the batches of the draws (`icl.sampling.init_losses`).

    If the two are on different data, the draws' batches are taken to vary as those of L(w*) do. A difference between the two data sets
    themselves is in no error.
    """
    given = evaluated.per_pass, evaluated.renewed
    every = config.num_steps_bw_draws
    match config.eval_method:
        case "grad-minibatch":
            drawn = range(config.num_burnin_steps, config.num_burnin_steps + draws * every, every)
        case "new-minibatch":
            after = _unseen(config, evaluated)
            drawn = range(after, after + draws)
        case "fixed-minibatch":
            drawn = range(1)
        case "dataset":
            drawn = range(len(evaluated.everything or ()))
    if config.eval_method == "grad-minibatch" and (config.independent_batches or evaluated.given):
        own = supply.per_pass, supply.cycle is None
        of_draws = 0.0 if config.independent_batches else unpaired_share(drawn, 0, *own)
        share = math.hypot(of_draws, unpaired_share((), init.count, *given))
    else:
        share = unpaired_share(drawn, init.count, *given)
    return config.inverse_temperature * init.spread * share


def refuse_unused(eval_batches: BatchSource | Iterable[Batch] | None, config: SamplerConfig) -> None:
    """Refuse evaluation data on which no loss would be evaluated.

    Raises:
        ValueError: there are such data.
    """
    used = config.num_init_loss_batches is not None or "singular-fluctuation" in config.eval_metrics
    if eval_batches is not None and config.eval_method == "grad-minibatch" and not used:
        raise ValueError(
            "eval_batches would not be used: eval_method='grad-minibatch' takes the losses of draws on the gradient's batches; choose "
            "eval_method dataset, new-minibatch or fixed-minibatch"
        )
