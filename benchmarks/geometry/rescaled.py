"""One function, two sizes of weights: `python -m benchmarks.geometry.rescaled`.

At the end of LR2 of model seed 1, all weights that write to the residual stream are multiplied by the factor by which they grow over LR3.
The layer norms make this the same function, apart from their ε. Both settings estimate it: the absolute one should move, the relative one
should not. The rows go to data/L2H4Minf/rescaled.csv. The estimates of the checkpoint itself are in llc_calibrated and llc_relative there.
"""

import argparse

import pandas as pd
import torch

from benchmarks.geometry.settings import FAMILY, SETTINGS, STAGE_ENDS, Run
from icl.estimation.config import LLCConfig
from icl.estimation.estimate import estimate_at_checkpoint
from icl.model import InContextRegressionTransformer
from icl.storage.files import write_table

TABLE = FAMILY / "rescaled.csv"
STEPS = STAGE_ENDS["LR2"], STAGE_ENDS["LR3"]


def writes_to_the_stream(name: str) -> bool:
    """Whether a parameter is added to the residual stream."""
    return (
        name.startswith(("token_embedding", "position_embedding")) or "attention.output" in name or "mlp.down" in name
    )


def size_of_writers(model: InContextRegressionTransformer) -> float:
    """Root mean square of the weights that write to the residual stream."""
    writers = [value.detach().flatten() for name, value in model.named_parameters() if writes_to_the_stream(name)]
    return float(torch.cat(writers).square().mean().sqrt())


def rescaled(model: InContextRegressionTransformer, factor: float) -> InContextRegressionTransformer:
    """The model with its writers multiplied by a factor."""
    weights = {
        name: value * factor if writes_to_the_stream(name) else value for name, value in model.state_dict().items()
    }
    return InContextRegressionTransformer.from_weights(model.shape, weights)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    run = Run(1)
    before, after = (run.model(step) for step in STEPS)
    factor = size_of_writers(after) / size_of_writers(before)
    xs, ys = run.sequences(1, 8192)
    rows = []
    model = rescaled(before, factor)
    with torch.no_grad():
        losses = [float((each(xs, ys) - ys).square().mean()) for each in (before, model)]
    for units, sampler in SETTINGS.items():
        config = LLCConfig(training=run.config, sampler_config=sampler.model_copy(update={"num_chains": 2}))
        found = estimate_at_checkpoint(config, dict(model.state_dict()))
        rows.append({
            "model_seed": run.seed, "step": STEPS[0], "units": units, "factor": factor, "loss/before": losses[0],
            "loss/after": losses[1], "llc/mean": found.llc_mean, "llc/mcse": found.llc_mcse, "verdict": found.verdict.text,
        })  # fmt: skip
        print(rows[-1], flush=True)
    write_table(pd.DataFrame(rows), TABLE)


if __name__ == "__main__":
    main()
