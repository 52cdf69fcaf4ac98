"""The list of all analyses. A new analysis is a file beside this one and a line here.

An analysis of a checkpoint takes a model and the run's fixed sequences (`icl.analysis.data`) and returns rows of its table.
An analysis of any subject takes a checkpoint's loss on fixed data (`icl.analysis.loss_on_data`).
An analysis of a family takes several runs and returns whole tables.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import pandas as pd

from icl.analysis import attention, evaluations, hessian, ood, structure, task_prior, transient_ridge
from icl.analysis.data import JointMeasure, Measure
from icl.analysis.loss_on_data import LossOnData

MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "evals": evaluations.measure_evals,
        "spectra": structure.measure_spectra,
        "layer_norm": structure.measure_layer_norm,
        "attention": attention.measure_attention,
        "hessian": hessian.measure_hessian,
        "task_prior": task_prior.measure_task_prior,
        "gain_sweep": ood.measure_gain_sweep,
        "effective_task": ood.measure_effective_task,
    }
)
"""Name (also of the table's file) -> analysis of one checkpoint, for `icl analyse RUN`."""

OF_SUBJECTS: Mapping[str, Callable[[LossOnData], pd.DataFrame]] = MappingProxyType(
    {"evals": evaluations.measure_loss, "hessian": hessian.measure_hessian_of_loss}
)
"""Name (also of the table's file) -> analysis of one checkpoint of any subject, for `icl analyse SWEEP.yaml`.

Names of tables and columns are those of `MEASURES` where they mean the same.
"""

OF_FAMILIES: Mapping[str, Measure] = MappingProxyType(
    {"task_prior": task_prior.measure_task_prior, "transient_distances": transient_ridge.measure_distances}
)
"""Name -> analysis of one checkpoint, for `icl analyse --family SWEEP`. One table has the rows of all runs."""

JOINT: Mapping[str, JointMeasure] = MappingProxyType(
    {"transient_scores": JointMeasure(transient_ridge.measure_scores, ("transient_references",))}
)
"""Name (also of the table's file) -> analysis of all runs of a family together."""

ONLY_OF_FAMILIES = frozenset(
    {*OF_FAMILIES, *JOINT, *(name for joint in JOINT.values() for name in joint.beside)} - {*MEASURES}
)
"""Tables that exist only for families."""

MANY_ROWS = frozenset({"attention", "layer_norm", "gain_sweep"})
"""Tables with many rows per checkpoint. They are compressed."""
