"""The loop that all samplers share: runs many chains.

A chain's noise depends only on its own seed and on the step. So it is bit-identical whatever other chains, groups and workers there are.
The chain's losses then agree to the rounding of batched arithmetic.

Shapes: E chains, N draws, P sampled parameters, T losses of one batch (tokens; 1 for a scalar loss).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icl.devices import chain_memory, end_of_graph, torch_threads
from icl.sampling.config import SamplerConfig
from icl.sampling.kernels import KERNELS
from icl.sampling.objective import Batch, Objective
from icl.sampling.plan import Plan, StepData, token_weights_of
from icl.sampling.sgld import SGLDConfig
from icl.sampling.stein import TestTerms, test_terms
from icl.sampling.updates import InPieces, Together

Progress = Callable[[int, int], None]

ONE_BY_ONE = 2**16
"""On a CPU, chains with more parameters than this are stepped one after the other, in place. So temporaries exist once, and not once for
each chain."""

VECTORS, VECTORS_ONE_BY_ONE = 12, 4
"""Vectors of one chain that exist at the same time: position, momentum or preconditioner, their sum, gradient, noise, temporaries."""


@dataclass(frozen=True)
class ChainRun:
    """The recorded draws of chains, on the CPU.

    Attributes:
        losses: (E, N, T) recorded losses.
        batch_losses: (E, N, T) losses on the gradient's batch, at the weights before the update of the draw's step.
        anchor_losses: (E, N, T) the loss of w*, on the batch of each draw or the same for all draws.
        corrections: (E, N) (g_b(w*) − ḡ)·(w − w*), the control variate of each draw's loss; 0 if none is used.
        distances: (E, N) ‖w − w*‖ at each draw.
        lost_at: (E,) the first draw at which a chain was not finite, N for a healthy chain.
        positions: (E, P) the last weights.
        mean_positions: (E, P) each chain's mean weights over its draws, including those of earlier parts.
        stiff, trace, virial, temperature, at_box, pairing: (E, D) the terms of the tests of the target at the D tested draws
            (`icl.sampling.stein`).
    """

    losses: Tensor
    batch_losses: Tensor
    anchor_losses: Tensor
    corrections: Tensor
    distances: Tensor
    lost_at: Tensor
    positions: Tensor
    mean_positions: Tensor
    stiff: Tensor
    trace: Tensor
    virial: Tensor
    temperature: Tensor
    at_box: Tensor
    pairing: Tensor

    @property
    def healthy(self) -> Tensor:
        """(E,) whether each chain stayed finite to the end."""
        return self.lost_at == self.losses.shape[1]

    def of_chains(self, chosen: slice) -> "ChainRun":
        """The draws of some chains."""
        return ChainRun(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    def followed_by(self, later: "ChainRun") -> "ChainRun":
        """These draws joined with the later draws of the same chains."""
        before = self.losses.shape[1]
        joined = {
            field.name: torch.cat([getattr(self, field.name), getattr(later, field.name)], dim=1)
            for field in fields(self)
            if field.name not in ("lost_at", "positions", "mean_positions")
        }
        return ChainRun(
            **joined,
            lost_at=torch.where(self.healthy, before + later.lost_at, self.lost_at),
            positions=later.positions,
            mean_positions=later.mean_positions,
        )


@dataclass(frozen=True)
class Paused:
    """Everything that chains need to continue where they stopped, on the CPU.

    Attributes:
        state: the kernel's state of E chains.
        total: (E, P) the sum of their weights over the draws.
        step, draw: numbers of the next step and of the next draw.
    """

    state: Any
    total: Tensor
    step: int
    draw: int

    def of_chains(self, chosen: slice) -> "Paused":
        """The part of some chains."""
        return replace(self, state=_each(self.state, lambda values: values[chosen]), total=self.total[chosen])


def _each(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The kernel's state with `change` applied to every tensor."""
    return replace(state, **{field.name: change(getattr(state, field.name)) for field in fields(state)})


class Chains:
    """Chains that can be continued: one per seed, in groups that fit into the configured memory, on the configured workers.

    Args:
        plan: what is sampled, and how.
        seeds: one per chain, whose noise is the stream (seed, "chain/noise"). If the plan has several w*, each has the same number of
            chains, and those of the first w* come first.
        paused: where chains with these seeds stopped. They continue there. None: they start at w*.
    """

    def __init__(self, plan: Plan, seeds: Sequence[int], paused: Paused | None = None) -> None:
        self._plan = plan
        self._groups: list[_Group] = []
        for chosen in _groups(plan, len(seeds)):
            indices = torch.tensor(chosen)
            owners = None
            if len(plan.anchors) > 1:
                owners = (indices // (len(seeds) // len(plan.anchors))).to(plan.anchors.device)
            own = None if paused is None else paused.of_chains(slice(chosen[0], chosen[-1] + 1))
            self._groups.append(_Group(plan, [seeds[i] for i in chosen], indices, owners, own))

    def paused(self) -> Paused:
        """The present state of all chains."""
        groups = [group.paused() for group in self._groups]
        joined = {
            field.name: _joined([getattr(group.state, field.name) for group in groups])
            for field in fields(groups[0].state)
        }
        if len(self._plan.anchors) == 1:
            joined["anchor"] = groups[0].state.anchor[:1].expand(len(joined["anchor"]), -1)
        return replace(
            groups[0], state=replace(groups[0].state, **joined), total=_joined([group.total for group in groups])
        )

    def advance(self, draws: int, progress: Progress | None = None) -> ChainRun:
        """Take `draws` more draws of every chain. The first call does the burn-in before.

        Args:
            draws: number of draws.
            progress: called with (steps done, steps in all), both summed over groups.
        """
        config = self._plan.config
        groups, done = self._groups, [0] * len(self._groups)
        total = len(groups) * (draws * config.num_steps_bw_draws + (0 if groups[0].begun else config.num_burnin_steps))

        def run(index: int) -> ChainRun:
            def tick(step: int) -> None:
                done[index] = step
                if progress is not None:
                    progress(sum(done), total)

            return groups[index].advance(draws, tick)

        if config.cores == 1 or len(groups) == 1:
            alone = getattr(self._plan.objective, "brings_threads", False)
            with torch_threads(1 if alone else torch.get_num_threads()):
                runs = [run(index) for index in range(len(groups))]
        else:
            with (
                torch_threads(1),
                ThreadPoolExecutor(config.cores, initializer=lambda: torch.set_num_threads(1)) as pool,
            ):
                runs = list(pool.map(run, range(len(groups))))
        # On the host, because estimates need float64, which not every device has, and because slices with varying limits would each be
        # a new graph on a lazy device.
        return ChainRun(
            **{field.name: _joined([getattr(run, field.name) for run in runs]).cpu() for field in fields(ChainRun)}
        )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The chains of all parts, joined. A single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def run_chains(plan: Plan, seeds: Sequence[int], progress: Progress | None = None) -> ChainRun:
    """The configured draws of one chain per seed; see `Chains`."""
    return Chains(plan, seeds).advance(plan.config.num_draws, progress)


def _groups(plan: Plan, chains: int) -> Iterator[list[int]]:
    """The chains of each group. A group fits into the memory, every worker gets a group, and groups are nearly equal in size."""
    first = plan.batches(0, 0) if plan.config.independent_batches else plan.batches(0)
    fitting = chains_that_fit(plan.config, plan.objective, first)
    groups = max(-(-chains // fitting), min(plan.config.cores, chains))
    size = -(-chains // groups)
    for start in range(0, chains, size):
        yield list(range(start, min(start + size, chains)))


def chains_that_fit(config: SamplerConfig, objective: Objective, batch: Batch) -> int:
    """How many chains fit into the memory at once; at least 1."""
    bound = config.max_memory_bytes or chain_memory(objective.anchor.device)
    each = VECTORS_ONE_BY_ONE if goes_one_by_one(objective.anchor) else VECTORS
    vectors = each * objective.anchor.numel() * objective.anchor.element_size()
    for_backward = getattr(objective, "bytes_for_backward", lambda batch: 0)(batch)
    return max(1, bound // (vectors + for_backward))


def goes_one_by_one(anchor: Tensor) -> bool:
    """Whether chains around w* are stepped one after the other."""
    return anchor.device.type == "cpu" and anchor.shape[-1] > ONE_BY_ONE


def constants_of(config: SamplerConfig) -> SGLDConfig:
    """The constants of the configured kernel."""
    kernel = KERNELS[config.method]
    return kernel.constants(
        nbeta=config.inverse_temperature,
        gamma=config.localization,
        weight_decay=config.weight_decay,
        noise_level=config.noise_level,
        bounding_box=config.bounding_box_size,
        **{name: getattr(config, setting) for name, setting in kernel.settings.items()},
        **config.kernel_constants,
    )


class _Group:
    """A group of chains. They are stepped as one tensor, or if they are large, one after the other."""

    def __init__(
        self, plan: Plan, seeds: Sequence[int], indices: Tensor, owners: Tensor | None, paused: Paused | None
    ) -> None:
        config = plan.config
        assert config.step_size is not None, "chains need a step size; `icl.sampling.tuning` finds one"
        self._seeds, self._indices, self._owners = seeds, indices, owners
        self._anchor = plan.anchors.expand(len(seeds), -1) if owners is None else plan.anchors[owners]
        self._in_place = goes_one_by_one(self._anchor)
        chains = len(seeds)
        # Memory of the gradient that is used again: memory of this size is new at each step otherwise, and the system clears it first.
        self._gradient = torch.empty_like(self._anchor[:1]) if self._in_place else None
        self._rows = [slice(row, row + 1) for row in range(chains)] if self._in_place else [slice(0, chains)]
        remembers = self._in_place and not config.independent_batches
        self._plan = replace(plan, batches=_LastBatches(plan.batches)) if remembers else plan
        sampler = KERNELS[config.method], constants_of(config)
        first = 0 if paused is None else paused.step + 1
        self._updates = (
            [InPieces(*sampler, seed) for seed in seeds]
            if self._in_place
            else [Together(*sampler, seeds, self._anchor, first)]
        )
        if paused is None:
            self._state = self._started(config.step_size)
            self._total = torch.zeros(self._anchor.shape, dtype=self._anchor.dtype, device=self._anchor.device)
            self._step = self._draw = 0
        else:
            # Copied, because chains that are stepped in place must not change the estimate that they continue.
            moved = (lambda values: values.clone()) if self._in_place else (lambda values: values)
            self._state = _each(paused.state, lambda values: moved(values.to(self._anchor.device)))
            self._total = moved(paused.total.to(self._anchor.device))
            self._step, self._draw = paused.step, paused.draw
        self._token_weights = token_weights_of(plan)

    def paused(self) -> Paused:
        """The present state of the chains."""
        return Paused(_each(self._state, lambda values: values.cpu()), self._total.cpu(), self._step, self._draw)

    @property
    def begun(self) -> bool:
        """Whether any step has been done."""
        return self._step > 0

    def advance(self, draws: int, tick: Callable[[int], None]) -> ChainRun:
        """Take `draws` more draws, after the burn-in if it has not been done."""
        config = self._plan.config
        first = self._step
        last = config.num_burnin_steps + (self._draw + draws) * config.num_steps_bw_draws
        if not self._in_place:
            self._total = self._total.clone()  # so that an earlier `Paused` keeps its own
        record = _Record(draws)
        for step in range(first, last):
            draw, between = divmod(step - config.num_burnin_steps, config.num_steps_bw_draws)
            taken = draw >= 0 and between == 0
            drawn = [
                self._move(step, draw if taken else None, rows, update)
                for rows, update in zip(self._rows, self._updates, strict=True)
            ]
            if taken:
                record.add(drawn)
                self._draw = draw + 1
            end_of_graph(self._anchor.device)
            tick(step + 1 - first)
        self._step = last
        return record.run(self._state.position, self._total / self._draw)

    def _started(self, step_size: float) -> Any:
        """The kernel's state at w*."""
        epsilon = torch.full_like(self._anchor[:, :1], step_size)
        states = (
            update.started(self._anchor[rows], epsilon[rows])
            for rows, update in zip(self._rows, self._updates, strict=True)
        )
        first = next(states)
        if not self._in_place:
            return first
        chains = len(self._seeds)
        whole = _each(first, lambda values: values.new_empty(chains, values.shape[1]))
        whole = replace(whole, anchor=self._anchor)
        for row, state in enumerate(itertools.chain([first], states)):
            for field in fields(whole):
                if field.name != "anchor":
                    getattr(whole, field.name)[row] = getattr(state, field.name)[0]
        return whole

    def _move(self, step: int, draw: int | None, rows: slice, update: InPieces | Together) -> "_Drawn | None":
        """One step of some chains, and what is recorded of them if this step has a draw."""
        plan, seeds = self._plan, self._seeds[rows]
        owners = None if self._owners is None else self._owners[rows]
        data = StepData(plan, step, seeds, owners)
        state = _each(self._state, lambda values: values[rows]) if self._in_place else self._state
        loss, gradient = data.losses_and_gradients(state.position, self._token_weights(step), self._gradient)
        test = None if draw is None else self._tested(step, draw, data, state, gradient, seeds, owners)
        control, evaluation = data.control if plan.control else None, plan.evaluation
        # With batches of its own, a draw is taken after the step; otherwise before it, where the gradient is.
        total = None
        if draw is not None and evaluation is None:
            self._show(draw, state, rows)
            total = self._total[rows]
        moved, seen = update.update(state, gradient, control, step, total)
        if not self._in_place:
            self._state = moved
        if draw is None:
            return None
        own = loss
        if evaluation is not None:
            self._show(draw, moved, rows)
            own = evaluation.losses(plan.objective, draw, moved.position)
            seen = update.seen(moved, self._total[rows])
        assert seen is not None
        return _Drawn(own, loss, data.anchor_losses_of_draw(draw), seen.distance, seen.correction, test)

    def _show(self, draw: int, state: Any, rows: slice) -> None:
        """Give the weights of a draw to the recorders."""
        if self._plan.recorders:
            position = state.position.clone() if self._in_place else state.position  # because recorders keep it
            for each in self._plan.recorders:
                each(draw, position, self._indices[rows])

    def _tested(
        self,
        step: int,
        draw: int,
        data: StepData,
        state: Any,
        gradient: Tensor,
        seeds: Sequence[int],
        owners: Tensor | None,
    ) -> TestTerms | None:
        plan = self._plan
        if plan.tests is None or not plan.tests.is_due(draw):
            return None
        after = data
        if not plan.constant:
            after = StepData(plan, plan.tests.partner(draw, step, plan.cycle, plan.stride), seeds, owners)
        return test_terms(plan, data, after, state, gradient, draw, seeds, KERNELS[plan.config.method].temperature)


class _LastBatches:
    """Step -> batch. The last two batches are kept, because chains that are stepped one after the other need the same ones."""

    def __init__(self, batches: Callable[[int], Batch]) -> None:
        self._batches = batches
        self._last: tuple[tuple[int, Batch], ...] = ()

    def __call__(self, step: int) -> Batch:
        for known, batch in self._last:
            if known == step:
                return batch
        batch = self._batches(step)
        self._last = ((step, batch), *self._last[:1])
        return batch


class _Drawn(NamedTuple):
    """What is recorded of some chains (e, ...) at one draw."""

    loss: Tensor
    batch_loss: Tensor
    anchor_loss: Tensor
    distance: Tensor
    correction: Tensor | None
    test: TestTerms | None


class _Column:
    """The values (E, ...) of one quantity at up to `draws` draws, as one tensor (E, N, ...).

    On a CPU it is allocated at once. Small tensors that stay, between large ones that come and go, keep the heap from being used again: a
    model of 1,009 parameters took 7 GB. A lazy device (xla) would compile each place anew.
    """

    def __init__(self, draws: int) -> None:
        self._draws, self._count = draws, 0
        self._held: Tensor | None = None
        self._rows: list[Tensor] = []

    def __bool__(self) -> bool:
        return self._count > 0

    def add(self, values: Tensor) -> None:
        if values.device.type != "cpu":
            self._rows.append(values)
        else:
            if self._held is None:
                self._held = values.new_empty(len(values), self._draws, *values.shape[1:])
            self._held[:, self._count] = values
        self._count += 1

    def whole(self) -> Tensor:
        return torch.stack(self._rows, dim=1) if self._held is None else self._held[:, : self._count]


class _Record:
    """Collects up to `draws` draws one by one; `run` joins them."""

    def __init__(self, draws: int) -> None:
        self._losses, self._batch_losses, self._anchor_losses = _Column(draws), _Column(draws), _Column(draws)
        self._distances, self._corrections = _Column(draws), _Column(draws)
        self._tests = {name: _Column(draws) for name in TestTerms._fields}

    def add(self, rows: "Sequence[_Drawn | None]") -> None:
        """Add one draw of all chains, given as the rows that were stepped together."""
        drawn = [row for row in rows if row is not None]
        self._losses.add(_joined([row.loss for row in drawn]))
        self._batch_losses.add(_joined([row.batch_loss for row in drawn]))
        self._anchor_losses.add(_joined([row.anchor_loss for row in drawn]))
        self._distances.add(_joined([row.distance for row in drawn]))
        if corrections := [row.correction for row in drawn if row.correction is not None]:
            self._corrections.add(_joined(corrections))
        if tests := [row.test for row in drawn if row.test is not None]:
            for name, column in self._tests.items():
                column.add(_joined([getattr(terms, name) for terms in tests]))

    def run(self, position: Tensor, mean_position: Tensor) -> ChainRun:
        trace, distances = self._losses.whole(), self._distances.whole()
        tested = {
            name: column.whole() if column else distances.new_zeros(len(distances), 0)
            for name, column in self._tests.items()
        }
        return ChainRun(
            losses=trace,
            batch_losses=self._batch_losses.whole(),
            anchor_losses=self._anchor_losses.whole(),
            corrections=self._corrections.whole() if self._corrections else torch.zeros_like(distances),
            distances=distances,
            lost_at=_first_bad(trace, position),
            positions=position,
            mean_positions=mean_position,
            **tested,
        )


def _first_bad(trace: Tensor, positions: Tensor) -> Tensor:
    """(E,) the first draw whose loss is not finite; N - 1 if only the last weights are not finite; N if all are finite."""
    finite = torch.isfinite(trace).all(dim=-1)
    draws = trace.shape[1]
    first = torch.where(finite, draws, torch.arange(draws, device=trace.device)).amin(dim=1)
    # Row by row, because the test makes tensors as large as what it tests.
    broken_at_end = ~torch.stack([torch.isfinite(row).all() for row in positions])
    return torch.where(broken_at_end, first.clamp(max=draws - 1), first)
