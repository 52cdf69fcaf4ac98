"""Restricted coefficients: the groups are those of the sweeps, the parts are a partition, and the figure shows the table."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from icl.config.sweeps import expand, load_sweep
from icl.estimation import LLCConfig
from icl.figures.restricted import GROUPS, INCLUDED, grouped, restricted_estimates, sum_of_parts
from icl.model import InContextRegressionTransformer
from icl.sampling.restriction import restrict

SWEEPS = Path(__file__).parents[2] / "sweeps" / "analysis"


def configs(name: str) -> list[LLCConfig]:
    return [LLCConfig.parse(point) for point in expand(load_sweep(SWEEPS / f"{name}.yaml"))]


def table(*chosen) -> pd.DataFrame:
    """λ̂ is 1, 2, 3, ... by group, and ten times that at the second step."""
    rows = [
        {"model_seed": 1, INCLUDED: group.key, "step": step, "llc/mean": factor * (1 + i), "llc/mcse": 0.5, "verdict": "healthy"}
        for i, group in enumerate(chosen) for step, factor in ((20_000, 10.0), (1_000, 1.0))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_the_groups_are_those_of_the_sweeps():
    known = {group.patterns for group in GROUPS}
    for name in ("10-L2H4-restricted-llcs", "10-L2H4-restricted-llcs-calibrated"):
        assert {config.sampler_config.include for config in configs(name)} == known


def test_the_parts_are_disjoint_and_together_everything():
    shape = configs("10-L2H4-restricted-llcs")[0].training.task_config.shape
    model = InContextRegressionTransformer.from_shape(shape, seed=0)
    moving = [restrict(model, group.patterns).num_moving for group in GROUPS if group.part]
    assert sum(moving) == restrict(model, [p for group in GROUPS if group.part for p in group.patterns]).num_moving
    assert sum(moving) == sum(parameter.numel() for parameter in model.parameters())


def test_the_sum_needs_every_part_and_adds_errors_in_squares():
    parts = [group for group in GROUPS if group.part]
    found = sum_of_parts(grouped(table(*GROUPS)))
    values = [1 + GROUPS.index(part) for part in parts]
    assert found["step"].tolist() == [1_000, 20_000]
    np.testing.assert_allclose(found["llc/mean"], [sum(values), 10 * sum(values)])
    np.testing.assert_allclose(found["llc/mcse"], 0.5 * len(parts) ** 0.5)
    assert sum_of_parts(grouped(table(*parts[1:]))).empty


def test_a_group_of_a_users_own_has_a_panel_with_its_patterns():
    own = table(GROUPS[0]).assign(**{INCLUDED: json.dumps(["l0h1", "l0h2"])})
    figure = restricted_estimates(pd.concat([table(GROUPS[0]), own]))
    assert [axis.get_title() for axis in figure.axes] == ["everything", "other groups"]
    legend = figure.axes[1].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["l0h1, l0h2"]


def test_the_figure_has_a_line_per_group_in_the_panel_of_its_kind_and_marks_once():
    rows = table(*GROUPS)
    figure = restricted_estimates(rows.assign(verdict="negative"))
    for axis in figure.axes:
        mine = [group for group in GROUPS if group.kind == axis.get_title()]
        drawn = {str(line.get_label()): line for line in axis.get_lines()}
        for group in mine:
            expected = rows.loc[rows[INCLUDED] == group.key].sort_values("step")["llc/mean"]
            np.testing.assert_allclose(np.asarray(drawn[group.name].get_ydata(), dtype=float), expected)
        assert ("sum of its parts" in drawn) == (axis.get_title() == "everything")
    (marks,) = figure.legends
    assert [text.get_text() for text in marks.get_texts()] == ["a test of the chains failed"]


@pytest.mark.parametrize("gamma", [0.1, 1.0, 10.0])
def test_for_a_quadratic_loss_a_group_has_at_most_the_whole_and_the_parts_at_least(gamma):
    """λ̂ = ½ tr H(H + γ)⁻¹ is concave in H, so parts sum to the whole or more; eigenvalues of a block interlace, so a part has no more."""

    def coefficient(hessian: np.ndarray) -> float:
        values = np.linalg.eigvalsh(hessian)
        return 0.5 * float((values / (values + gamma)).sum())

    root = np.random.default_rng(0).normal(size=(13, 13))
    hessian = root @ root.T
    whole = coefficient(hessian)
    first, rest = coefficient(hessian[:5, :5]), coefficient(hessian[5:, 5:])
    assert max(first, rest) < whole < first + rest
    apart = hessian.copy()
    apart[:5, 5:] = apart[5:, :5] = 0
    assert coefficient(apart) == pytest.approx(first + rest)
