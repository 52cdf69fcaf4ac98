"""The training loop of many seeds as one batch: `icl.training.train` with blocks of steps in place of steps.

Each member has its own checkpoints, tracker and resume, in the same files as a solo run: a run begun here can go on
there, and the other way round. A block ends where a checkpoint, an evaluation or a saved state is due; between, the
host does not wait for the device.

Shapes: E members, P parameters.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from icl.checkpoints import Checkpoints
from icl.config import TrainingConfig
from icl.ensemble import BLOCK, EnsembleStep
from icl.evals import make_evaluator
from icl.model import flatten, initial_parameters, unflatten
from icl.tracking import Tracker
from icl.training import Progress, TrainingDiverged, TrainingOutcome, data_stream, starting_point

_SEEDS = {"model_seed", "pretrain_seed", "true_seed", "sampling_seed"}


def train_ensemble(
    configs: Sequence[TrainingConfig],
    checkpoints: Sequence[Checkpoints],
    trackers: Sequence[Tracker],
    device: torch.device | str,
    on_step: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[TrainingOutcome]:
    """Train runs that differ in their seeds alone, together, each to its end; see `icl.training.train`.

    Members that were interrupted at different steps run as groups of equal step, one group after the other. Resuming is
    exact to the bit for the same groups.

    Args:
        configs, checkpoints, trackers: of each member.
        on_step: called after each block with (updates done by the slowest member, mean loss).
        should_stop: asked before each block; True saves the states and returns.

    Raises:
        ValueError: members that differ in more than seeds.
        TrainingDiverged: the loss of a member is not finite; every member's checkpoints up to the last block stay.
    """
    _check_alike(configs)
    groups: dict[int, list[int]] = defaultdict(list)
    states = [starting_point(config, each) for config, each in zip(configs, checkpoints, strict=True)]
    for index, (step, _) in enumerate(states):
        groups[step].append(index)
    outcomes: dict[int, TrainingOutcome] = {}
    for step, members in sorted(groups.items()):
        group = _Group([configs[i] for i in members], [checkpoints[i] for i in members], [trackers[i] for i in members])
        results = group.train(step, [states[i][1] for i in members], torch.device(device), on_step, should_stop)
        outcomes |= dict(zip(members, results, strict=True))
    return [outcomes[index] for index in range(len(configs))]


class _Group:
    """Members at the same step."""

    def __init__(
        self, configs: Sequence[TrainingConfig], checkpoints: Sequence[Checkpoints], trackers: Sequence[Tracker]
    ) -> None:
        self.configs, self.checkpoints, self.trackers = configs, checkpoints, trackers
        self.shape = configs[0].task_config.shape
        self.metadata = [{"config": config.model_dump_json()} for config in configs]

    def train(
        self,
        step: int,
        states: Sequence[Mapping[str, Tensor]],
        device: torch.device,
        on_step: Progress | None,
        should_stop: Callable[[], bool],
    ) -> list[TrainingOutcome]:
        config = self.configs[0]
        if step == config.num_steps:
            return [TrainingOutcome(each.name, step, True, {}) for each in self.configs]
        engine = self._engine(step, states, device)
        # A lazy device would compile the metrics into a graph of their own for every block: they are made on the host.
        at = torch.device("cpu") if device.type == "xla" else device
        evaluators = [make_evaluator(each, at) for each in self.configs]
        checkpoint_at, log_at = set(config.checkpoint_steps()), set(config.logging_steps())
        due = sorted(checkpoint_at | log_at)
        summaries: list[Mapping[str, float]] = [{} for _ in self.configs]
        saved = step
        while step < config.num_steps and not should_stop():
            end = self._end_of_block(step, due)
            losses = engine.run(end - step)
            self._check_finite(losses, step, saved)
            last = end - 1
            if last in log_at:
                flats = engine.flats.to(at)
                summaries = [
                    evaluate(unflatten(self.shape, flat)) for evaluate, flat in zip(evaluators, flats, strict=True)
                ]
            self._log(losses, step, summaries if last in log_at else None)
            if last in checkpoint_at:
                for member, flat in enumerate(engine.flats.cpu()):
                    weights = unflatten(self.shape, flat)
                    self.checkpoints[member].save(last, weights, self.metadata[member])
            step = end
            if step % config.checkpointer_config.state_every == 0 or step == config.num_steps:
                self._save_states(engine)
                saved = step
            if on_step is not None:
                on_step(step, float(losses[-1].mean()))
        if step != saved:
            self._save_states(engine)
        finished = step == config.num_steps
        for each in self.checkpoints if finished else ():
            each.keep_last_state()
        return [
            TrainingOutcome(each.name, step, finished, summary)
            for each, summary in zip(self.configs, summaries, strict=True)
        ]

    def _engine(self, step: int, states: Sequence[Mapping[str, Tensor]], device: torch.device) -> EnsembleStep:
        flats, moments = [], defaultdict(list)
        for config, state in zip(self.configs, states, strict=True):
            seed = config.task_config.model_seed
            assert seed is not None, "seeds are resolved before use"
            flats.append(state["flat"] if state else flatten(initial_parameters(self.shape, seed)))
            for name, value in state.items():
                if name not in ("flat", "step"):
                    moments[name].append(value)
        streams = [data_stream(config) for config in self.configs]
        stacked = {name: torch.stack(values) for name, values in moments.items()}
        return EnsembleStep(self.shape, self.configs, streams, torch.stack(flats), step, stacked, device)

    def _end_of_block(self, step: int, due: Sequence[int]) -> int:
        config = self.configs[0]
        every = config.checkpointer_config.state_every
        next_due = next((t + 1 for t in due if t >= step), config.num_steps)
        return min(next_due, (step // every + 1) * every, step + BLOCK, config.num_steps)

    def _check_finite(self, losses: Tensor, first: int, saved: int) -> None:
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            row, member = bad[0].tolist()
            config = self.configs[member]
            raise TrainingDiverged(
                f"{config.name}: the loss became {float(losses[row, member])} at step {first + row}; the state after "
                f"{saved} steps is kept. Lower optimizer_config.lr (now {config.optimizer_config.lr})"
            )

    def _log(self, losses: Tensor, first: int, metrics: Sequence[Mapping[str, float]] | None) -> None:
        """Losses of a block on their grid; metrics, if any, belong to its last step."""
        every = self.configs[0].logger_config.loss_every
        for member, tracker in enumerate(self.trackers):
            for row, loss in enumerate(losses[:, member].tolist()):
                if metrics is not None and row == len(losses) - 1:
                    tracker.log(first + row, {"batch/loss": loss, **metrics[member]})
                elif (first + row) % every == 0:
                    tracker.log(first + row, {"batch/loss": loss})

    def _save_states(self, engine: EnsembleStep) -> None:
        state = engine.state()
        shared = {name: value for name, value in state.items() if name == "step"}
        for member, checkpoints in enumerate(self.checkpoints):
            own = {name: value[member].clone() for name, value in state.items() if name not in shared}
            checkpoints.save_state(engine.step, own | shared, self.metadata[member])


def seeds_left_out(config: TrainingConfig) -> str:
    """All settings that runs of one batch must share, as text."""
    rest = config.model_dump_json(exclude={"task_config", "run_name"})
    return rest + config.task_config.model_dump_json(exclude=_SEEDS)


def _check_alike(configs: Sequence[TrainingConfig]) -> None:
    if len({seeds_left_out(config) for config in configs}) > 1:
        raise ValueError("runs trained as one batch must differ in their seeds alone")
