"""One function, other sizes of weights: `python -m benchmarks.geometry.rescaled`.

The model is that of the end of LR2, model seed 1. Changes that the layer norms make invisible, apart from their ε, bring the sizes of its
weights towards those at the end of LR3:

- writers: all weights that write to the residual stream are multiplied by one number, so that their root mean square is that of LR3's end;
- writers and norms: in addition, the gain and bias of each layer norm are multiplied by the factor by which its gains shrink over LR3, and
  the map that reads it is divided by this factor.

Both settings estimate the changed model: the absolute one should move, the relative one should not. The rows go to
data/L2H4Minf/rescaled.csv; one that exists is left out. The checkpoint itself is in llc_calibrated and llc_relative there.
"""

import argparse
from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor

from benchmarks.geometry.settings import FAMILY, SETTINGS, STAGE_ENDS, Run
from icl.estimation.config import LLCConfig
from icl.estimation.estimate import estimate_at_checkpoint
from icl.model import InContextRegressionTransformer
from icl.storage.files import write_table

TABLE = FAMILY / "rescaled.csv"
STEPS = STAGE_ENDS["LR2"], STAGE_ENDS["LR3"]
READERS = {"attention_norm": "attention.qkv.weight", "mlp_norm": "mlp.up.weight", "final_norm": "unembedding.weight"}
"""Layer norm -> the map that reads it."""
CHANGES = ("writers", "writers and norms")


def writes_to_the_stream(name: str) -> bool:
    """Whether a parameter is added to the residual stream."""
    return (
        name.startswith(("token_embedding", "position_embedding")) or "attention.output" in name or "mlp.down" in name
    )


def size_of_writers(model: InContextRegressionTransformer) -> float:
    """Root mean square of the weights that write to the residual stream."""
    writers = [value.detach().flatten() for name, value in model.named_parameters() if writes_to_the_stream(name)]
    return float(torch.cat(writers).square().mean().sqrt())


def with_writers_times(model: InContextRegressionTransformer, factor: float) -> InContextRegressionTransformer:
    """The model with its writers multiplied by a factor."""
    return _with(model, {name: factor for name in model.state_dict() if writes_to_the_stream(name)})


def with_norms_like(
    model: InContextRegressionTransformer, other: InContextRegressionTransformer
) -> InContextRegressionTransformer:
    """The model with each layer norm's gains as large as another model's, and the map that reads them made up for it."""
    mine, theirs = model.state_dict(), other.state_dict()
    factors = {}
    for name in mine:
        if name.endswith("norm.weight"):
            block, _, norm = name.removesuffix(".weight").rpartition(".")
            factor = float(theirs[name].square().mean().sqrt() / mine[name].square().mean().sqrt())
            reader = READERS[norm] if norm == "final_norm" else f"{block}.{READERS[norm]}"
            factors |= {name: factor, name.removesuffix("weight") + "bias": factor, reader: 1 / factor}
    return _with(model, factors)


def _with(model: InContextRegressionTransformer, factors: Mapping[str, float]) -> InContextRegressionTransformer:
    weights: dict[str, Tensor] = {name: value * factors.get(name, 1.0) for name, value in model.state_dict().items()}
    return InContextRegressionTransformer.from_weights(model.shape, weights)


def changed(
    change: str, before: InContextRegressionTransformer, after: InContextRegressionTransformer
) -> InContextRegressionTransformer:
    """The model `before` after a change of CHANGES towards the sizes of `after`."""
    model = with_writers_times(before, size_of_writers(after) / size_of_writers(before))
    return model if change == "writers" else with_norms_like(model, after)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    run = Run(1)
    before, after = (run.model(step) for step in STEPS)
    xs, ys = run.sequences(1, 8192)
    for change in CHANGES:
        model = changed(change, before, after)
        with torch.no_grad():
            losses = [float((each(xs, ys) - ys).square().mean()) for each in (before, model)]
        for units, sampler in SETTINGS.items():
            table = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame(columns=pd.Index(["change", "units"]))
            if ((table["change"] == change) & (table["units"] == units)).any():
                continue
            config = LLCConfig(training=run.config, sampler_config=sampler.model_copy(update={"num_chains": 2}))
            found = estimate_at_checkpoint(config, dict(model.state_dict()))
            row = {
                "model_seed": run.seed, "step": STEPS[0], "change": change, "units": units,
                "factor": size_of_writers(after) / size_of_writers(before), "loss/before": losses[0], "loss/after": losses[1],
                "llc/mean": found.llc_mean, "llc/mcse": found.llc_mcse, "verdict": found.verdict.text,
            }  # fmt: skip
            new = pd.DataFrame([row])
            write_table(pd.concat([table, new], ignore_index=True) if len(table) else new, TABLE)
            print(row, flush=True)


if __name__ == "__main__":
    main()
