"""How well the learning coefficient is estimated where it is known, next to devinterp's samplers at equal gradient evaluations.

    python -m benchmarks.llc.accuracy [--quick | --summarise] [--output data/llc_accuracy] [--figures figures/llc_accuracy]

Every method runs with one setting on all models. icl's is `icl.sampling.AUTOMATIC`. devinterp has no setting of its own that
fits models of different sizes, so its step size and localisation are chosen in its favour (`benchmarks.llc.devinterp`); it gets as many
gradients as icl spends, pilot included.

Rows are appended to estimates.csv as they come, and rows already there are not computed again. Time is measured apart, samplers in turn on
the same models (`benchmarks.llc.cost`), and printed here too. `benchmarks.llc.standard_errors` and `benchmarks.llc.bias` go with this one.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from scipy import stats

from benchmarks.llc.cost import NUM_SAMPLES, samplers
from benchmarks.llc.devinterp import GRIDS, choose_in_hindsight, devinterp_estimate
from icl.figures.llc_accuracy import accuracy
from icl.figures.style import save
from icl.sampling import AUTOMATIC, SamplerConfig
from icl.sampling.llc import Inputs, estimate_llc_of
from icl.sampling.truth import KnownModel, deep_linear, linear_regression, normal_crossing, warped_regression
from icl.storage.files import write_table
from icl.streams import Stream

DEFAULT = AUTOMATIC.model_copy(update={"eval_dataset_size": NUM_SAMPLES})
QUICK = DEFAULT.model_copy(update={"num_draws": 300, "num_burnin_steps": 100, "num_chains": 4})


def random_networks(count: int, layers: tuple[int, int], widths: tuple[int, int], seed: int) -> list[KnownModel]:
    """Linear networks of random depth, widths and rank, all uniform; rank 0 to the smallest width."""
    networks = []
    for index in range(count):
        stream = Stream(seed, f"benchmark/{layers}/{index}")
        depth = layers[0] + int(stream.integers(0, layers[1] - layers[0] + 1, (1,)))
        sizes = (widths[0] + stream.integers(1, widths[1] - widths[0] + 1, (depth + 1,))).tolist()
        rank = int(stream.integers(2, min(sizes) + 1, (1,)))
        networks.append(deep_linear(sizes, rank, seed=index))
    return networks


def zoo(quick: bool = False) -> list[KnownModel]:
    """The models that are measured."""
    if quick:
        return [
            linear_regression(7, 0),
            normal_crossing((1, 1), 3),
            deep_linear((5, 3, 7), 1, 0),
            deep_linear((5, 3, 2, 7), 1, 0),
        ]
    regular = [linear_regression(size, 0) for size in (11, 101, 1009)] + [warped_regression(31, 0)]
    crossings = [normal_crossing((1, 1), 29), normal_crossing((1, 2), 29)]
    large = [
        deep_linear((67, 41, 97, 53), 11, 0, whitened=True),
        deep_linear((211, 193, 239, 101), 29, 0, whitened=True),
    ]
    reduced_rank = random_networks(10, (2, 2), (5, 30), seed=1)
    deep = random_networks(20, (3, 6), (5, 30), seed=2)
    return regular + reduced_rank + deep + crossings + large


def icl_estimate(model: KnownModel, config: SamplerConfig) -> dict[str, float | str]:
    """One row of icl's default estimator."""
    result = estimate_llc_of(model.objective(), Inputs([model.batch]), config)
    assert result.tuned is not None
    return {
        "estimate": result.llc_mean, "mcse": result.llc_mcse, "rhat": result.llc_rhat, "ess": result.llc_ess,
        "gradients": result.tuned.gradients + config.num_chains * config.num_steps, "gamma": result.tuned.gamma,
        "epsilon": result.tuned.epsilon, "lost": result.num_lost, "verdict": result.verdict.text,
    }  # fmt: skip


def run(models: Sequence[KnownModel], config: SamplerConfig, output: Path | None) -> pd.DataFrame:
    """Every method on every model; tidy, one row per model and method."""
    path = output / "estimates.csv" if output else None
    rows = pd.read_csv(path).to_dict("records") if path and path.exists() else []
    done = {(row["model"], row["method"]): row for row in rows}
    cells: dict[str, tuple[float, float]] = {
        str(row["method"]): (row["epsilon"], row["gamma"]) for row in rows if str(row["method"]).startswith("devinterp")
    }

    def add(model: KnownModel, method: str, values: dict[str, float | str]) -> dict:
        row = {
            "model": model.name, "family": model.family, "parameters": model.num_parameters, "coefficient": model.coefficient,
            "multiplicity": model.multiplicity, "method": method, **values,
            "relative_error": float(values["estimate"]) / model.coefficient - 1,
        }  # fmt: skip
        rows.append(row)
        print(
            f"{method:24s} {model.name:36s} λ {model.coefficient:8.1f}  λ̂ {row['estimate']:9.2f}  {row['relative_error']:+.3f}",
            flush=True,
        )
        if path:
            write_table(pd.DataFrame(rows), path, digits=6)
        return row

    ours = {
        model.name: done.get((model.name, "icl")) or add(model, "icl", icl_estimate(model, config)) for model in models
    }
    for model in models:
        budget = int(ours[model.name]["gradients"])
        for method in GRIDS:
            if (model.name, method) in done:
                continue
            if method not in cells:
                cells[method] = choose_in_hindsight(method, config, budget // 8)
                print(f"{method}: lr, localization = {cells[method]}", flush=True)
            add(model, method, devinterp_estimate(model, method, *cells[method], budget, config))
    return pd.DataFrame(rows)


def with_exact(rows: pd.DataFrame, models: Sequence[KnownModel], nbeta: float) -> pd.DataFrame:
    """The rows with `exact_at_setting`, what a perfect sampler would report at the row's γ, and `sampler_error`, the relative error to
    that; NaN where it is not known."""
    exact = {model.name: model.at for model in models}
    values = [
        math.nan if (at := exact[row.model]) is None else at(nbeta, row.gamma)
        for row in rows[["model", "gamma"]].itertuples()
    ]
    return rows.assign(exact_at_setting=values, sampler_error=rows["estimate"] / values - 1)


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Per family and method: |relative error| (median, 90th percentile), bias, the sampler's part of it where known, order preservation,
    and the share of models on which icl's error is no larger.

    An estimate that was lost counts as an error of 1.
    """
    errors = rows.assign(error=rows["relative_error"].fillna(1.0).abs())
    ours = errors[errors["method"] == "icl"].set_index("model")["error"]
    rows = errors.assign(ours=errors["model"].map(ours))

    def one(group: pd.DataFrame) -> pd.Series:
        error = group["relative_error"].fillna(1.0)
        no_better = (group["ours"] <= group["error"]).mean()
        estimate = group["estimate"].fillna(0.0)
        ranked = len(group) > 2
        return pd.Series({
            "models": len(group), "median": error.abs().median(), "p90": error.abs().quantile(0.9), "bias": error.median(),
            "kendall": stats.kendalltau(estimate, group["coefficient"]).statistic if ranked else math.nan,
            "spearman": stats.spearmanr(estimate, group["coefficient"]).statistic if ranked else math.nan,
            "sampler": group["sampler_error"].median(), "icl_no_worse": no_better,
        })  # fmt: skip

    linear = rows[rows["family"].isin(["reduced-rank regression", "deep linear network"])].assign(
        family="RRR and DLN together"
    )
    return pd.concat([rows, linear]).groupby(["family", "method"])[list(rows.columns)].apply(one)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="tiny models and budgets, for a test that it runs")
    parser.add_argument("--output", type=Path, default=Path("data/llc_accuracy"))
    parser.add_argument(
        "--summarise", action="store_true", help="only from the rows that are there: nothing is sampled"
    )
    parser.add_argument("--figures", type=Path, default=Path("figures/llc_accuracy"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config = QUICK if options.quick else DEFAULT
    models = zoo(options.quick)
    sampled = (
        pd.read_csv(options.output / "estimates.csv") if options.summarise else run(models, config, options.output)
    )
    rows = with_exact(sampled, models, config.inverse_temperature)
    write_table(rows, options.output / "estimates.csv", digits=6)
    summary = summarise(rows)
    write_table(summary.reset_index(), options.output / "summary.csv", digits=4)
    print(summary.to_string(float_format="%.3f"))
    if not options.summarise:
        print(samplers(repetitions=1 if options.quick else 5).to_string(index=False, float_format="%.3f"))
    for path in save(accuracy(rows), options.figures, "accuracy"):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
