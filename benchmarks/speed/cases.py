"""The work that `benchmarks.speed` times: factories that run in a worker process and return one round of it.

Each `make_*` takes plain keywords and returns a callable; what it builds first is not timed.
"""

import contextlib
import gc
import io
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.speed import textbook
from icl.baselines import dmmse_predictor, ridge_predictor
from icl.checkpoints import Checkpoints
from icl.config import OptimizerConfig
from icl.engine import choose_path, loss_and_grad, mse_loss
from icl.engine.native import NativeTransformer
from icl.model import InContextRegressionTransformer, TransformerShape, flatten, initial_parameters, unflatten
from icl.native.allocator import keep_freed_memory
from icl.sampling import SamplerConfig
from icl.sampling.chains import run_chains
from icl.sampling.plan import AnchorLosses, Plan
from icl.sampling.transformer_objective import make_objective
from icl.storage import LocalStore
from icl.streams import Stream
from icl.subjects.regression import sampling_batches
from icl.tasks import RegressionTask
from icl.training.optimizers import FlatOptimizer, Rates

PAPER = TransformerShape(task_size=4, max_examples=8, embed_size=64, mlp_size=64, num_heads=4, num_layers=2)
NOISE_VARIANCE = 0.125
SGLD: dict[str, Any] = {"epsilon": 3e-5, "nbeta": 30.0, "gamma": 100.0}


def make_training(shape: TransformerShape, seeds: int, batch: int, steps: int) -> Callable[[], None]:
    """`steps` training steps of each of `seeds` seeds, one seed after the other, as `icl.training.loop` does them."""
    keep_freed_memory()  # as the command does
    law = RegressionTask(shape.task_size, shape.max_examples, NOISE_VARIANCE)
    path = choose_path(shape, threads=torch.get_num_threads())
    if path.name == "native":
        torch.set_num_threads(1)
    flats = [flatten(initial_parameters(shape, seed)) for seed in range(seeds)]
    optimizers = [FlatOptimizer(OptimizerConfig(lr=1e-3), flat) for flat in flats]
    done = 0

    def work() -> None:
        nonlocal done
        for seed, (flat, optimizer) in enumerate(zip(flats, optimizers, strict=True)):
            for step in range(done, done + steps):
                _, gradient = path.run(flat.detach(), *law.sample(Stream(seed, "training"), step, batch))
                optimizer.update(gradient, Rates(1e-3, 1e-3, 1.0))
        done += steps

    return work


def make_textbook_training(shape: TransformerShape, batch: int, steps: int) -> Callable[[], None]:
    """`steps` training steps of the textbook's model."""
    model = make_textbook_model(shape)
    optimizer = torch.optim.Adam(model.parameters())
    return lambda: textbook.train(model, optimizer, shape, batch, steps)


def make_gradient(shape: TransformerShape, batch: int, way: str) -> Callable[[], object]:
    """Loss and gradient of one batch: "native", "torch" (the library's PyTorch form) or "textbook"."""
    law = RegressionTask(shape.task_size, shape.max_examples, NOISE_VARIANCE)
    xs, ys = law.sample(Stream(0, "speed"), 0, batch)
    if way == "textbook":
        model = make_textbook_model(shape)
        parameters = list(model.parameters())
        return lambda: torch.autograd.grad(F.mse_loss(model(xs, ys), ys), parameters)
    flat = flatten(initial_parameters(shape, 0))
    if way == "torch":
        keep_freed_memory()
        return lambda: loss_and_grad(shape, flat, xs, ys)
    kernel = NativeTransformer(shape, torch.get_num_threads())
    torch.set_num_threads(1)
    return lambda: kernel(flat, xs, ys)


def make_textbook_model(shape: TransformerShape) -> textbook.Textbook:
    """With the library's initial parameters of seed 0."""
    model = textbook.Textbook(shape)
    model.load_state_dict(initial_parameters(shape, 0))
    return model


def make_sgld(shape: TransformerShape, chains: int, batch: int, steps: int, cores: int) -> Callable[[], object]:
    """`chains` chains of `steps` steps: the loop of `icl.sampling.estimate_llc`, with its data and noise."""
    keep_freed_memory()
    law = RegressionTask(shape.task_size, shape.max_examples, NOISE_VARIANCE)
    config = SamplerConfig(
        **SGLD, num_chains=chains, num_draws=steps, grad_batch_size=batch, init_seed=0, num_init_loss_batches=1, cores=cores
    )  # fmt: skip
    objective = make_objective(InContextRegressionTransformer(**asdict(shape), seed=0), mse_loss, config)
    batches, _ = sampling_batches(law, config, 0)
    plan = Plan(config, objective, batches, AnchorLosses(objective), pair=False)
    return lambda: run_chains(plan, range(chains))


def make_textbook_sgld(shape: TransformerShape, batch: int, steps: int) -> Callable[[], object]:
    """One chain of the textbook's model; chains come one after the other, so that each costs as much."""
    return lambda: textbook.sgld(make_textbook_model(shape), shape, batch, steps, **SGLD)


def make_devinterp_sgld(shape: TransformerShape, batch: int, steps: int) -> Callable[[], None]:
    """One chain of devinterp's sampler on the textbook's model.

    Its data set holds whole batches, made beforehand: collating single sequences, which its loader would do at every
    step, is not counted against it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from devinterp.slt.sampler import sample_single_chain
    model = make_textbook_model(shape)
    batches = [textbook.random_batch(shape, batch) for _ in range(steps)]
    data = [{"input_ids": xs, "ys": ys} for xs, ys in batches]

    def evaluate(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
        xs, ys = batch["input_ids"][0], batch["ys"][0]
        return F.mse_loss(module(xs, ys), ys), {}

    settings = {"lr": SGLD["epsilon"], "nbeta": SGLD["nbeta"], "localization": SGLD["gamma"]}
    masks = {name: None for name, _ in model.named_parameters()}

    gc.freeze()  # it collects garbage before and after each chain, and what was imported here is not its own

    def work() -> None:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sample_single_chain(
                model, data, evaluate, masks, num_draws=steps, sampling_method_kwargs=settings, batch_size=1  # pyright: ignore[reportArgumentType]
            )  # fmt: skip

    return work


def make_ridge(plain: bool, batch: int) -> Callable[[], object]:
    """Ridge predictions of a batch."""
    xs, ys = RegressionTask(4, 8, NOISE_VARIANCE).sample(Stream(0, "speed"), 0, batch)
    function = textbook.ridge if plain else ridge_predictor
    return lambda: function(xs, ys, NOISE_VARIANCE)


def make_dmmse(plain: bool, batch: int, num_tasks: int) -> Callable[[], object]:
    """dMMSE predictions of a batch for `num_tasks` tasks."""
    law = RegressionTask(4, 8, NOISE_VARIANCE, num_tasks)
    xs, ys = law.sample(Stream(0, "speed"), 0, batch)
    function = textbook.dmmse if plain else dmmse_predictor
    return lambda: function(xs, ys, law.tasks, NOISE_VARIANCE)


def make_checkpoint_write(plain: bool, count: int) -> Callable[[], None]:
    """`count` checkpoints of the paper's model: `torch.save`, or the library's (checksum, flush to disk, rename)."""
    weights = unflatten(PAPER, flatten(initial_parameters(PAPER, 0)))
    folder = Path(tempfile.mkdtemp())
    checkpoints = Checkpoints(LocalStore(folder), "speed")

    def work() -> None:
        for step in range(count):
            if plain:
                torch.save(weights, folder / f"{step}.pt")
            else:
                checkpoints.save(step, weights)

    return work


def make_checkpoint_load(plain: bool, count: int) -> Callable[[], None]:
    """The same, read: `torch.load`, or the library's with its checksum."""
    weights = unflatten(PAPER, flatten(initial_parameters(PAPER, 0)))
    folder = Path(tempfile.mkdtemp())
    checkpoints = Checkpoints(LocalStore(folder), "speed")
    torch.save(weights, folder / "0.pt")
    checkpoints.save(0, weights)

    def work() -> None:
        for _ in range(count):
            if plain:
                torch.load(folder / "0.pt", weights_only=True)
            else:
                checkpoints.load(0)

    return work


def make_sgemm(size: int, repeats: int) -> Callable[[], None]:
    """Square float32 matrix products."""
    a, b = torch.randn(2, size, size)
    out = torch.empty(size, size)

    def work() -> None:
        for _ in range(repeats):
            torch.mm(a, b, out=out)

    return work


def step_flops(shape: TransformerShape, batch: int) -> float:
    """Floating point operations of one step that no exact algorithm known here avoids: multiplications and additions of
    matrix products, forward and backward, of the trimmed model with the first layer's map of rank D + 1.

    Norms, softmax, activations and the optimizer are left out.
    """
    examples, tokens = shape.max_examples, 2 * shape.max_examples - 1
    channels, hidden = shape.embed_size, shape.mlp_size
    total = 0.0
    for layer in range(shape.num_layers):
        last = layer == shape.num_layers - 1
        queries = examples if last else tokens
        # Token t sees t + 1 tokens; in the last block only x tokens ask.
        pairs = examples**2 if last else tokens * (tokens + 1) // 2
        attention = 2 * 2 * channels * pairs
        mlp = 2 * 2 * channels * hidden * queries
        output = 2 * channels**2 * queries if shape.include_output else 0
        if layer == 0:
            # x tokens have D numbers, y tokens one; the gradient of the data is not needed.
            first = 2 * 3 * channels * (shape.task_size * examples + examples - 1)
            total += 2 * first + 3 * (attention + mlp + output)
        else:
            qkv = 2 * channels**2 * (queries + 2 * tokens)
            total += 3 * (qkv + attention + mlp + output)
    return batch * total
