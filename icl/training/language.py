"""Training language models: the stepper, and the metrics that are logged.

Shapes: E members, B batch, T tokens, P parameters.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from icl.analysis.context import in_context_score
from icl.config.language import LanguageTask, LanguageTraining
from icl.engine import matmul_precision
from icl.evals import weight_norm
from icl.streams import Stream
from icl.subjects.language import logits_of, token_losses
from icl.subjects.tokens import RowBatches, TokenRows, split, token_rows
from icl.training.kinds import initial_flat, named, sizes_of
from icl.training.optimizers import FlatOptimizer, rates_at

EVALUATED_AT_ONCE = 64
"""Rows of a test batch. Metrics do not depend on it."""


def rows_of_task(task: LanguageTask) -> TokenRows:
    """All rows of tokens of a task.

    Raises:
        ConfigError: like `icl.subjects.tokens.token_rows`, or nothing is left to train on.
    """
    rows = token_rows(task.tokens, task.n_ctx, task.d_vocab)
    split(len(rows), task.held_out)
    return rows


class LanguageStepper:
    """The state of E members and the step that advances them, one after the other; see `icl.training.stepper.Stepper`.

    Args:
        configs: settings of the members, with resolved seeds. They differ only in their seeds.
        step: number of the first step to do.
        states: the tensors of each member's saved state; empty for a fresh start.
        device: the device to compute on.
        rows: those of `rows_of_task`, if they have been read already.
    """

    block = 1
    engine = "torch"

    def __init__(
        self,
        configs: Sequence[LanguageTraining],
        step: int,
        states: Sequence[Mapping[str, Tensor]],
        device: torch.device,
        rows: TokenRows | None = None,
    ) -> None:
        self._configs, self.step, self._device = configs, step, device
        self._sizes = sizes_of(configs[0])
        task = configs[0].task_config
        rows = rows_of_task(task) if rows is None else rows
        train, held = split(len(rows), task.held_out)
        self._held_out = rows[held].to(device)
        self._batches = [RowBatches(rows, each.batch_size, train, _order(each.task_config)) for each in configs]
        starts = zip(configs, states, strict=True)
        self._flats = [initial_flat(config, state).to(device, copy=True) for config, state in starts]
        self._optimizers = [
            FlatOptimizer(config.optimizer_config, flat, state)
            for config, flat, state in zip(configs, self._flats, states, strict=True)
        ]

    def run(self, count: int) -> Tensor:
        """Do `count` steps; returns their batch losses (count, E). If a loss is not finite, the block ends before its update."""
        losses = torch.full((count, len(self._flats)), torch.nan)
        for row in range(count):
            gradients = []
            for member, (flat, batches) in enumerate(zip(self._flats, self._batches, strict=True)):
                loss, gradient = self._loss_and_gradient(flat, batches(self.step)[0])
                losses[row, member] = loss
                gradients.append(gradient)
            if not losses[row].isfinite().all():
                break
            for config, optimizer, gradient in zip(self._configs, self._optimizers, gradients, strict=True):
                optimizer.update(gradient, rates_at(config, self.step))
            self.step += 1
        return losses

    def weights(self) -> list[dict[str, Tensor]]:
        """The members' weights."""
        return [named(self._sizes, flat.detach().cpu()) for flat in self._flats]

    def evaluate(self) -> list[Mapping[str, float]]:
        """The metrics of `language_metrics` on the held-out rows."""
        return [language_metrics(named(self._sizes, flat.detach()), self._held_out) for flat in self._flats]

    def states(self) -> list[dict[str, Tensor]]:
        """Parameters and optimiser state of each member, on the host."""
        return [
            {"flat": flat.detach().cpu().clone(), **optimizer.state(self.step)}
            for flat, optimizer in zip(self._flats, self._optimizers, strict=True)
        ]

    def _loss_and_gradient(self, flat: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        flat = flat.detach().requires_grad_()
        tokens = tokens.to(flat.device)
        with matmul_precision(self._configs[0].matmul_precision, flat.device):
            loss = token_losses(logits_of(named(self._sizes, flat), tokens), tokens).mean()
            (gradient,) = torch.autograd.grad(loss, flat)
        return loss.detach(), gradient


@torch.no_grad()
def language_metrics(weights: Mapping[str, Tensor], rows: Tensor) -> dict[str, float]:
    """The metrics that are logged during training, on held-out rows (N, T).

    `test/loss` is the mean cross-entropy in nats. `test/icl` is the in-context learning score of `icl.analysis.context`;
    as in the publication, **a lower score means more in-context learning**. `weight/norm` is the norm of all weights.
    """
    parts = [token_losses(logits_of(weights, part), part) for part in rows.split(EVALUATED_AT_ONCE)]
    losses = torch.cat(parts).double().mean(dim=0)
    return {
        "test/loss": float(losses.mean()),
        "test/icl": in_context_score(losses),
        "weight/norm": weight_norm(weights),
    }


def _order(task: LanguageTask) -> Stream | None:
    """The stream that orders the rows of each pass; None: the file's order. Seeds must be resolved."""
    assert task.sampling_seed is not None, "seeds are resolved before use"
    return Stream(task.sampling_seed, "training/order") if task.shuffle else None
