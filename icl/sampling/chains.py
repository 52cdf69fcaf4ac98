"""Many chains as one call: the loop that every sampler shares.

A chain's noise is a function of its own seed and of the step, so that it is bit-identical whichever chains run beside it, in
whatever groups and however many workers; its losses then agree to the rounding of batched arithmetic.

Shapes: E chains, N draws, P sampled parameters, T losses of one batch (tokens; 1 for a scalar loss).
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from icl.devices import chain_memory, end_of_graph, torch_threads
from icl.sampling.config import SamplerConfig
from icl.sampling.kernels import KERNELS
from icl.sampling.noise import shared_noise_blocks
from icl.sampling.objective import Batch, Objective
from icl.sampling.plan import Plan, StepData, token_weights_of
from icl.sampling.sgld import SGLDConfig

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ChainRun:
    """What chains leave behind, on the CPU.

    Attributes:
        losses: (E, N, T) recorded losses.
        batch_losses: (E, N, T) losses on the gradient's batch, at the weights before the update of the draw's step.
        anchor_losses: (E, N, T) the loss of w* on the batch of each draw; (E, N, 0) where it was not asked for.
        distances: (E, N) ‖w − w*‖ at each draw.
        lost_at: (E,) the first draw at which a chain was not finite, N for a healthy chain.
        positions: (E, P) the last weights.
    """

    losses: Tensor
    batch_losses: Tensor
    anchor_losses: Tensor
    distances: Tensor
    lost_at: Tensor
    positions: Tensor

    @property
    def healthy(self) -> Tensor:
        """(E,) which chains stayed finite to the end."""
        return self.lost_at == self.losses.shape[1]

    def of_chains(self, chosen: slice) -> "ChainRun":
        """What those chains left behind."""
        return ChainRun(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})


def run_chains(plan: Plan, seeds: Sequence[int], progress: Progress | None = None) -> ChainRun:
    """Run one chain per seed, in groups that fit the configured memory, on the configured workers.

    Args:
        seeds: a chain's noise is the stream (seed, "chain/noise"). Where the plan has several w*, the chains of the first come
            first, and as many of each.
        progress: called with (steps done, steps in all), both summed over groups.
    """
    groups = list(_groups(plan, len(seeds)))
    done = [0] * len(groups)
    total = len(groups) * plan.config.num_steps

    def run(index: int) -> ChainRun:
        def tick(step: int) -> None:
            done[index] = step
            if progress is not None:
                progress(sum(done), total)

        chosen = groups[index]
        indices = torch.tensor(chosen)
        owners = None
        if len(plan.anchors) > 1:
            owners = (indices // (len(seeds) // len(plan.anchors))).to(plan.anchors.device)
        return _run_group(plan, [seeds[i] for i in chosen], indices, owners, tick)

    if plan.config.cores == 1 or len(groups) == 1:
        alone = getattr(plan.objective, "brings_threads", False)
        with torch_threads(1 if alone else torch.get_num_threads()):
            runs = [run(index) for index in range(len(groups))]
    else:
        with (
            torch_threads(1),
            ThreadPoolExecutor(plan.config.cores, initializer=lambda: torch.set_num_threads(1)) as pool,
        ):
            runs = list(pool.map(run, range(len(groups))))
    # On the host: not every device has the float64 that estimates are made in, and what slices them where the numbers say would be
    # another graph each time to a lazy one.
    return ChainRun(
        **{field.name: torch.cat([getattr(run, field.name) for run in runs]).cpu() for field in fields(ChainRun)}
    )


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


def _run_group(
    plan: Plan, seeds: Sequence[int], indices: Tensor, owners: Tensor | None, tick: Callable[[int], None]
) -> ChainRun:
    config, objective = plan.config, plan.objective
    anchor = plan.anchors.expand(len(seeds), -1) if owners is None else plan.anchors[owners]
    kernel, constants = KERNELS[config.method], constants_of(config)
    noises = shared_noise_blocks(seeds, config.num_steps + 1, anchor)
    assert config.step_size is not None, "run_chains needs a step size; `icl.sampling.tuning` finds one"
    epsilon = torch.full_like(anchor[:, :1], config.step_size)
    state = kernel.init(constants, anchor, epsilon, next(noises))
    token_weights = token_weights_of(plan)

    losses, batch_losses, anchor_losses, distances = [], [], [], []
    for step in range(config.num_steps):
        data = StepData(plan, step, seeds, owners)
        loss, gradient = data.losses_and_gradients(state.position, token_weights(step))
        moved = kernel.step(constants, state, gradient, next(noises))
        draw, between = divmod(step - config.num_burnin_steps, config.num_steps_bw_draws)
        if draw >= 0 and between == 0:
            drawn = state.position if plan.evaluation is None else moved.position
            batch_losses.append(loss)
            if plan.evaluation is not None:
                loss = plan.evaluation.losses(objective, draw, drawn)
            losses.append(loss)
            anchor_losses.append(data.anchor_losses_of_draw(draw))
            distances.append((drawn - anchor).norm(dim=-1))
            for record in plan.recorders:
                record(draw, drawn, indices)
        state = moved
        end_of_graph(anchor.device)
        tick(step + 1)
    trace = torch.stack(losses, dim=1)
    return ChainRun(
        losses=trace,
        batch_losses=torch.stack(batch_losses, dim=1),
        anchor_losses=torch.stack(anchor_losses, dim=1),
        distances=torch.stack(distances, dim=1),
        lost_at=_first_bad(trace, state.position),
        positions=state.position,
    )


def _first_bad(trace: Tensor, positions: Tensor) -> Tensor:
    """(E,) the first draw whose loss is not finite; N - 1 if only the last weights are not; N if all is well."""
    finite = torch.isfinite(trace).all(dim=-1)
    draws = trace.shape[1]
    first = torch.where(finite, draws, torch.arange(draws, device=trace.device)).amin(dim=1)
    broken_at_end = ~torch.isfinite(positions).all(dim=-1)
    return torch.where(broken_at_end, first.clamp(max=draws - 1), first)
