"""Tables as the library itself makes them, from a small model with made-up checkpoints."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from icl.analysis.data import AnalysisData, DataSettings
from icl.analysis.essential_dynamics import pca, trajectory_table
from icl.analysis.measures import MEASURES
from icl.analysis.run import table_path
from icl.config import TrainingConfig
from icl.figures.restricted import GROUPS, INCLUDED
from icl.model import InContextRegressionTransformer

STEPS = (0, 120, 450, 1_700, 6_000, 25_000, 60_000, 90_000, 200_000, 499_999)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tables for two seeds: every analysis, and estimates of the learning coefficient."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    folder.mkdir()
    parts: dict[str, list[pd.DataFrame]] = {}
    for seed in (3, 5):
        config = TrainingConfig.parse(
            {
                "task_config": {
                    "task_size": 3, "max_examples": 5, "num_tasks": "inf", "noise_variance": 0.25, "embed_size": 14, "mlp_size": 13,
                    "num_heads": 2, "num_layers": 2, "model_seed": seed,
                },
                "eval_batch_size": 17,
            }
        ).resolved()  # fmt: skip
        data = AnalysisData(config, DataSettings(validation_size=23))
        model = InContextRegressionTransformer.from_shape(config.task_config.shape, seed=seed)
        rows = []
        for step in STEPS:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter *= 1.1
                rows.append(model(*data.training_sequences).flatten().numpy())
            for name, measure in MEASURES.items():
                parts.setdefault(name, []).append(measure(model, data).assign(model_seed=seed, step=step))
        fitted = pca(np.stack(rows), 4)
        shares = {f"explained_variance_ratio/{i}": share for i, share in enumerate(fitted.explained_variance_ratio)}
        walk = np.stack([np.cos(np.arange(40) / 5), np.sin(np.arange(40) / 5), np.cos(np.arange(40) / 3)], axis=1)
        steps = np.geomspace(1, 499_999, 40).astype(int)
        for name in ("trajectory", "essential_dynamics"):
            parts.setdefault(name, []).append(
                trajectory_table(steps, walk, model_seed=seed, variant="tokens").assign(**shares)
            )
        llc = pd.DataFrame(
            {"model_seed": seed, "step": STEPS, "llc/mean": np.linspace(10, 100, len(STEPS)), "llc/mcse": 2.0}
        )
        untested = "not tested: minimum (whether w* is a minimum of this loss)"
        llc = llc.assign(verdict=["healthy"] * 7 + [untested] + ["still rising: more burn-in"] * 2)
        llc = llc.assign(
            **{
                "loss/init": np.linspace(4.0, 2.0, len(STEPS)),
                "loss/zero": 3.25,
                "loss/mean": 2.5,
                "distance": 1.5,
                **{f"llc/mean/{k}": llc["llc/mean"] for k in range(5)},
            }
        )
        llc["loss/excess"] = llc["loss/mean"] - llc["loss/init"]
        draws = pd.DataFrame(
            {"draw": [50, 100], "loss": [2.1, 2.5], "distance": [1.0, 1.5], "chain": 0, "model_seed": seed}
        )
        traces = draws.merge(pd.DataFrame({"step": STEPS}), how="cross")
        for name in ("llc", "llc_calibrated", "llc_calibrated_dense", "llc_relative"):
            parts.setdefault(name, []).append(llc)
            parts.setdefault(f"{name}_traces", []).append(traces)
        for name in ("restricted", "restricted_calibrated"):
            for group in GROUPS:
                parts.setdefault(name, []).append(llc.assign(**{INCLUDED: group.key}))
        counted = pd.DataFrame(
            {"gamma": [1.0, 10.0, 100.0], "llc/mean": [9.0, 4.0, 1.0], "llc/mcse": 0.1, "count": [19.0, 8.0, 2.0]}
        )
        parts.setdefault("gamma_spectrum", []).append(counted.assign(model_seed=seed, step=STEPS[-1]))
        exact = counted.assign(units="relative", **{"count/std_error": 0.1})
        parts.setdefault("curvature", []).append(exact.assign(model_seed=seed, step=STEPS[-1]))
    for name, tables in parts.items():
        table = pd.concat(tables).set_index(
            ["model_seed", "step"]
        )  # on disk, the columns before `step` tell the runs apart
        table.to_csv(table_path(folder, name))
    return folder
