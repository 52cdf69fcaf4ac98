"""The list of all figures: for each its name, the tables that it needs, and the function that draws it.

A new figure is one function in a file beside this one, and one line here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from matplotlib.figure import Figure

from icl.figures import (
    attention,
    behaviour,
    calibration_grids,
    chains,
    curvature,
    development,
    essential_dynamics,
    geometry,
    restricted,
    robustness,
    structure,
    task_families,
)


@dataclass(frozen=True)
class Recipe:
    """How one figure is made.

    Attributes:
        name: the name of its file.
        needs: the names of its tables. `losses` is made from other tables (`icl.figures.families`).
        draw: the function. It is called with these tables in this order, and with `stages` if it has such an argument.
    """

    name: str
    needs: tuple[str, ...]
    draw: Callable[..., Figure]


def _with_traces(*tables: str) -> tuple[str, ...]:
    return tuple(name for table in tables for name in (table, f"{table}_traces"))


RUN_RECIPES = (
    Recipe("loss-and-llc", ("losses", "llc"), development.loss_and_llc),
    Recipe("loss-and-llc-calibrated", ("losses", "llc_calibrated"), development.loss_and_llc),
    Recipe("loss-and-llc-dense", ("losses", "llc_calibrated_dense"), development.loss_and_llc),
    Recipe("llc-settings", ("llc", "llc_calibrated", "evals"), development.published_and_calibrated),
    Recipe("llc-traces", ("llc_traces", "llc"), chains.relaxation),
    Recipe("llc-calibrated-traces", ("llc_calibrated_traces", "llc_calibrated"), chains.relaxation),
    Recipe("behavioural-detail", ("evals", "llc"), development.behavioural_detail),
    Recipe("behavioural", ("evals",), behaviour.behavioural),
    Recipe("prior-distance", ("task_prior",), behaviour.prior_distance),
    Recipe("icl-scores", ("evals",), behaviour.icl_scores),
    Recipe("token-losses", ("evals",), behaviour.token_losses),
    Recipe("geometric", ("llc", "hessian"), curvature.geometric),
    Recipe("hessian", ("hessian",), curvature.hessian),
    Recipe("gamma-spectrum", ("gamma_spectrum", "curvature"), geometry.over_localisation),
    Recipe("llc-restricted", ("restricted",), restricted.restricted_estimates),
    Recipe("llc-restricted-calibrated", ("restricted_calibrated",), restricted.restricted_estimates),
    Recipe("embed-collapse", ("spectra",), structure.embed_collapse),
    Recipe("unembed-collapse", ("layer_norm",), structure.unembed_collapse),
    Recipe("LN-collapse", ("layer_norm",), structure.norm_collapse),
    Recipe("LN-collapse-detail", ("layer_norm",), structure.norm_collapse_detail),
    Recipe("LN-collapse-and-hessian", ("layer_norm", "hessian"), structure.norm_collapse_and_hessian),
    Recipe("attn-roles", ("attention",), attention.identified_heads),
    Recipe("ED-planes", ("essential_dynamics",), essential_dynamics.planes_of_outputs),
    Recipe("ED-variants", ("trajectory",), essential_dynamics.planes),
    Recipe("ED-evolutes", ("essential_dynamics",), essential_dynamics.evolutes),
    Recipe("ED-components", ("essential_dynamics",), essential_dynamics.components_over_time),
    Recipe("gain-sweep", ("gain_sweep",), robustness.gain_sweep),
    Recipe("effective-task", ("effective_task",), robustness.effective_task),
    Recipe("distance-to-ridge", ("evals",), behaviour.distance_to_optimum),
    *(
        Recipe(f"attn-{metric.replace('_', '-')}", ("attention",), partial(attention.attention_metric, metric=metric))
        for metric in attention.METRICS
    ),
)
"""The figures of one run (one model seed)."""

FAMILY_RECIPES = (
    Recipe("loss-and-llc-multiple", ("losses", "llc"), development.loss_and_llc_of_runs),
    Recipe("loss-and-llc-calibrated-multiple", ("losses", "llc_calibrated"), development.loss_and_llc_of_runs),
    Recipe("loss-multiple", ("metrics",), partial(development.loss_of_runs, loss="pretrain/mse")),
    Recipe("llc-against-loss", ("llc", "evals"), development.llc_against_loss),
    Recipe("llc-climb", ("llc_traces", "llc"), chains.climbs),
    Recipe("llc-units", ("llc_calibrated", "llc_relative"), geometry.in_two_units),
    Recipe("task-prior", ("task_prior",), task_families.task_prior),
    Recipe("transient-losses", ("transient_distances",), task_families.transient_losses),
    Recipe("memorisation-map", ("transient_distances",), task_families.memorisation_map),
    Recipe("llc-over-tasks", ("llc_calibrated", "transient_distances"), task_families.coefficient_over_tasks),
    Recipe("transient-distances", ("transient_distances",), task_families.transient_distances),
    Recipe(
        "transient-trajectories",
        ("transient_scores", "transient_references", "transient_distances"),
        task_families.transient_trajectories,
    ),
)
"""The figures of several runs together."""

GRID_RECIPES = (
    Recipe("llc-vs-eps-gamma-beta", _with_traces("eps_temp_gamma"), calibration_grids.scales),
    Recipe("llc-vs-dataset-size", ("eval_dataset_size",), calibration_grids.dataset_sizes),
    Recipe("llc-vs-fixed-batch", _with_traces("eval_fixed_batch"), calibration_grids.fixed_batches),
    Recipe("llc-vs-batch-size", _with_traces("eval_minibatch"), calibration_grids.batch_sizes),
    Recipe("llc-vs-loss-fn", _with_traces("eval_loss_fn"), calibration_grids.loss_functions),
    Recipe("llc-vs-seed", ("fixed_seed", "fresh_seeds"), chains.sampling_seed),
    Recipe("llc-failures", _with_traces("eps_temp_gamma", "non_minima", "non_exploration"), calibration_grids.failures),
)
"""The figures of grids of sampler settings (`sweeps/calibration`)."""

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {recipe.name: recipe for recipe in (*FAMILY_RECIPES, *GRID_RECIPES, *RUN_RECIPES)}
)
"""All figures by name."""
