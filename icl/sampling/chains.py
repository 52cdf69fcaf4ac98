"""Many chains as one call: the loop that every sampler shares.

A chain's noise is a function of its own seed and of the step, so that it is bit-identical whichever chains run beside it, in
whatever groups and however many workers; its losses then agree to the rounding of batched arithmetic.

Shapes: E chains, N draws, P sampled parameters, T losses of one batch (tokens; 1 for a scalar loss).
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from icl.devices import chain_memory, end_of_graph, torch_threads
from icl.sampling.config import SamplerConfig
from icl.sampling.kernels import KERNELS
from icl.sampling.noise import shared_noise_blocks
from icl.sampling.objective import Batch, Objective
from icl.sampling.plan import Plan, StepData, token_weights_of
from icl.sampling.sgld import SGLDConfig
from icl.sampling.stein import TestTerms, test_terms

Progress = Callable[[int, int], None]

ENDLESS = 2**31
"""Steps for which noise can be asked."""


@dataclass(frozen=True)
class ChainRun:
    """What chains leave behind, on the CPU.

    Attributes:
        losses: (E, N, T) recorded losses.
        batch_losses: (E, N, T) losses on the gradient's batch, at the weights before the update of the draw's step.
        anchor_losses: (E, N, T) the loss of w* on the batch of each draw; (E, N, 0) where it was not asked for.
        corrections: (E, N) (g_b(w*) − ḡ)·(w − w*), the control variate of each draw's loss; 0 where none was used.
        distances: (E, N) ‖w − w*‖ at each draw.
        lost_at: (E,) the first draw at which a chain was not finite, N for a healthy chain.
        positions: (E, P) the last weights.
        mean_positions: (E, P) each chain's mean weights over its draws, those of earlier parts included.
        stiff, trace, virial, temperature, at_box, pairing: (E, D) the terms of the tests of the target, at the D draws that were tested
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
        """(E,) which chains stayed finite to the end."""
        return self.lost_at == self.losses.shape[1]

    def of_chains(self, chosen: slice) -> "ChainRun":
        """What those chains left behind."""
        return ChainRun(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    def followed_by(self, later: "ChainRun") -> "ChainRun":
        """This part of the draws and the next as one."""
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
    """Where chains stopped, on the CPU: all that they need to go on.

    Attributes:
        state: of the kernel, with E chains.
        total: (E, P) the sum of their weights over the draws.
        step, draw: the next of each.
    """

    state: Any
    total: Tensor
    step: int
    draw: int

    def of_chains(self, chosen: slice) -> "Paused":
        """That of those chains."""
        return replace(self, state=_each(self.state, lambda values: values[chosen]), total=self.total[chosen])


def _each(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The kernel's state with every tensor changed."""
    return replace(state, **{field.name: change(getattr(state, field.name)) for field in fields(state)})


class Chains:
    """Chains that can go on: one per seed, in groups that fit the configured memory, on the configured workers.

    Args:
        seeds: a chain's noise is the stream (seed, "chain/noise"). Where the plan has several w*, the chains of the first come first, and
            as many of each.
        paused: where chains of these seeds stopped; they go on there. None: they start at w*.
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
        """Where they are now."""
        groups = [group.paused() for group in self._groups]
        joined = {
            field.name: torch.cat([getattr(group.state, field.name) for group in groups])
            for field in fields(groups[0].state)
        }
        return replace(
            groups[0], state=replace(groups[0].state, **joined), total=torch.cat([group.total for group in groups])
        )

    def advance(self, draws: int, progress: Progress | None = None) -> ChainRun:
        """So many more draws of every chain; before the first, the burn-in.

        Args:
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
        # On the host: not every device has the float64 that estimates are made in, and what slices them where the numbers say would be
        # another graph each time to a lazy one.
        return ChainRun(
            **{field.name: torch.cat([getattr(run, field.name) for run in runs]).cpu() for field in fields(ChainRun)}
        )


def run_chains(plan: Plan, seeds: Sequence[int], progress: Progress | None = None) -> ChainRun:
    """The configured draws of one chain per seed; see `Chains`."""
    return Chains(plan, seeds).advance(plan.config.num_draws, progress)


def _groups(plan: Plan, chains: int) -> Iterator[list[int]]:
    """Chains per group: as many as fit the memory, no more than an equal share of the workers; groups are as equal as can be."""
    first = plan.batches(0, 0) if plan.config.independent_batches else plan.batches(0)
    fitting = chains_that_fit(plan.config, plan.objective, first)
    groups = max(-(-chains // fitting), min(plan.config.cores, chains))
    size = -(-chains // groups)
    for start in range(0, chains, size):
        yield list(range(start, min(start + size, chains)))


def chains_that_fit(config: SamplerConfig, objective: Objective, batch: Batch) -> int:
    """How many chains one group may hold; at least 1."""
    bound = config.max_memory_bytes or chain_memory(objective.anchor.device)
    # Position, momentum or preconditioner, gradient, noise block and temporaries: about twelve vectors of one chain live at once.
    vectors = 12 * objective.anchor.numel() * objective.anchor.element_size()
    for_backward = getattr(objective, "bytes_for_backward", lambda batch: 0)(batch)
    return max(1, bound // (vectors + for_backward))


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
    """Chains that move as one tensor."""

    def __init__(
        self, plan: Plan, seeds: Sequence[int], indices: Tensor, owners: Tensor | None, paused: Paused | None
    ) -> None:
        config = plan.config
        assert config.step_size is not None, "chains need a step size; `icl.sampling.tuning` finds one"
        self._plan, self._seeds, self._indices, self._owners = plan, seeds, indices, owners
        self._anchor = plan.anchors.expand(len(seeds), -1) if owners is None else plan.anchors[owners]
        self._kernel, self._constants = KERNELS[config.method], constants_of(config)
        # Noise number 0 starts the chains, and number t + 1 is that of step t.
        self._noises = shared_noise_blocks(seeds, ENDLESS, self._anchor, 0 if paused is None else paused.step + 1)
        if paused is None:
            epsilon = torch.full_like(self._anchor[:, :1], config.step_size)
            self._state = self._kernel.init(self._constants, self._anchor, epsilon, next(self._noises))
            self._total = torch.zeros_like(self._anchor)
            self._step = self._draw = 0
        else:
            self._state = _each(paused.state, lambda values: values.to(self._anchor.device))
            self._total = paused.total.to(self._anchor.device)
            self._step, self._draw = paused.step, paused.draw
        self._token_weights = token_weights_of(plan)

    def paused(self) -> Paused:
        """Where they are now."""
        return Paused(_each(self._state, lambda values: values.cpu()), self._total.cpu(), self._step, self._draw)

    @property
    def begun(self) -> bool:
        """Whether any step was done."""
        return self._step > 0

    def advance(self, draws: int, tick: Callable[[int], None]) -> ChainRun:
        """So many more draws, after the burn-in if it is still to come."""
        config = self._plan.config
        first = self._step
        last = config.num_burnin_steps + (self._draw + draws) * config.num_steps_bw_draws
        record = _Record(self._plan, self._anchor, self._total)
        for step in range(first, last):
            data = StepData(self._plan, step, self._seeds, self._owners)
            loss, gradient = data.losses_and_gradients(self._state.position, self._token_weights(step))
            driving = gradient - data.control() if self._plan.control else gradient
            moved = self._kernel.step(self._constants, self._state, driving, next(self._noises))
            draw, between = divmod(step - config.num_burnin_steps, config.num_steps_bw_draws)
            if draw >= 0 and between == 0:
                self._take(record, draw, step, data, loss, gradient, moved.position)
                self._draw = draw + 1
            self._state = moved
            end_of_graph(self._anchor.device)
            tick(step + 1 - first)
        self._step, self._total = last, record.total
        return record.run(self._state.position, self._draw)

    def _take(
        self, record: "_Record", draw: int, step: int, data: StepData, loss: Tensor, gradient: Tensor, moved: Tensor
    ) -> None:
        plan = self._plan
        drawn = self._state.position if plan.evaluation is None else moved
        batch_loss = loss
        if plan.evaluation is not None:
            loss = plan.evaluation.losses(plan.objective, draw, drawn)
        record.add(loss, batch_loss, data.anchor_losses_of_draw(draw), drawn)
        if plan.control and plan.evaluation is None:
            record.correct((data.control() * (drawn - self._anchor)).sum(dim=-1))
        if plan.tests is not None and plan.tests.is_due(draw):
            partner = plan.tests.partner(draw, step, plan.cycle, plan.stride)
            after = data if plan.constant else StepData(plan, partner, self._seeds, self._owners)
            record.test(
                test_terms(plan, data, after, self._state, gradient, draw, self._seeds, self._kernel.temperature)
            )
        for each in plan.recorders:
            each(draw, drawn, self._indices)


class _Record:
    """Draws as they come; `run` puts them together."""

    def __init__(self, plan: Plan, anchor: Tensor, total: Tensor) -> None:
        self._plan, self._anchor, self.total = plan, anchor, total.clone()
        self._losses, self._batch_losses, self._anchor_losses = [], [], []
        self._distances, self._corrections, self._tests = [], [], []

    def add(self, loss: Tensor, batch_loss: Tensor, anchor_loss: Tensor, drawn: Tensor) -> None:
        self._losses.append(loss)
        self._batch_losses.append(batch_loss)
        self._anchor_losses.append(anchor_loss)
        self._distances.append((drawn - self._anchor).norm(dim=-1))
        self.total += drawn

    def correct(self, correction: Tensor) -> None:
        self._corrections.append(correction)

    def test(self, terms: TestTerms) -> None:
        self._tests.append(terms)

    def run(self, position: Tensor, draws: int) -> ChainRun:
        trace, distances = torch.stack(self._losses, dim=1), torch.stack(self._distances, dim=1)
        tested = {
            name: torch.stack([getattr(terms, name) for terms in self._tests], dim=1)
            if self._tests
            else distances.new_zeros(len(distances), 0)
            for name in TestTerms._fields
        }
        return ChainRun(
            losses=trace,
            batch_losses=torch.stack(self._batch_losses, dim=1),
            anchor_losses=torch.stack(self._anchor_losses, dim=1),
            corrections=torch.stack(self._corrections, dim=1) if self._corrections else torch.zeros_like(distances),
            distances=distances,
            lost_at=_first_bad(trace, position),
            positions=position,
            mean_positions=self.total / draws,
            **tested,
        )


def _first_bad(trace: Tensor, positions: Tensor) -> Tensor:
    """(E,) the first draw whose loss is not finite; N - 1 if only the last weights are not; N if all is well."""
    finite = torch.isfinite(trace).all(dim=-1)
    draws = trace.shape[1]
    first = torch.where(finite, draws, torch.arange(draws, device=trace.device)).amin(dim=1)
    broken_at_end = ~torch.isfinite(positions).all(dim=-1)
    return torch.where(broken_at_end, first.clamp(max=draws - 1), first)
