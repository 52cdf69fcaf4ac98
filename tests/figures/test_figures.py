"""What figures show is what tables say: lines, error bands, stages, signs; drawing changes no global state."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.figure import Figure

from icl.analysis.curves import ridge_loss
from icl.analysis.stages import PUBLISHED_STAGE_ENDS
from icl.figures import attention, behaviour, chains, development, essential_dynamics, geometry, task_families
from icl.figures.build import PAPER_STAGES
from icl.figures.elements import StageEnds, estimate_line, last_step, step_colours, token_count
from icl.figures.families import read_tables, run_label, tables_of_seed

pytestmark = pytest.mark.xdist_group("figures")  # the tables that they are drawn from are made once


@pytest.fixture(scope="module")
def tables(family):
    return tables_of_seed(read_tables(family), 3)


def line(figure: Figure, axis: int, label: str) -> np.ndarray:
    (found,) = [one for one in figure.axes[axis].get_lines() if one.get_label() == label]
    return np.asarray(found.get_ydata(), dtype=float)


def test_loss_and_llc_draw_the_columns_with_their_errors(tables):
    figure = development.loss_and_llc(tables["evals"], tables["llc"])
    loss, estimates, failed, untested = figure.axes[0].get_lines()[0], *figure.axes[1].get_lines()
    np.testing.assert_allclose(loss.get_ydata(), tables["evals"]["loss/mean"])
    drawn = tables["llc"].loc[tables["llc"]["step"] > 0, "llc/mean"]  # step 0 has no place on a logarithmic axis
    np.testing.assert_allclose(estimates.get_ydata(), drawn)
    assert list(failed.get_xdata()) == [200_000, 499_999]
    assert list(untested.get_xdata()) == [tables["llc"]["step"].iloc[7]]
    (band,) = [one for one in figure.axes[1].collections if isinstance(one, FillBetweenPolyCollection)]
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(drawn.max() + 4)
    assert heights.min() == pytest.approx(drawn.min() - 4)


def test_stages_are_shaded_from_end_to_end(tables):
    axis = development.loss_and_llc(tables["evals"], tables["llc"], PAPER_STAGES).axes[0]
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axis.patches]
    ends = list(PUBLISHED_STAGE_ENDS.values())
    assert spans == list(zip([100, *ends[:-1]], ends, strict=True))
    assert axis.get_xlim() == (100, 500_000)
    assert axis.get_xscale() == "log"


def test_the_axis_of_an_unfinished_run_ends_where_the_run_does():
    assert last_step(pd.DataFrame({"step": [0, 30_000]}), stages=PAPER_STAGES) == 30_001
    assert last_step(pd.DataFrame({"step": [0, 499_999]}), stages=PAPER_STAGES) == 500_000


def test_no_edge_cuts_the_outermost_markers(tables):
    llc = tables["llc"].query("step > 0")
    found = StageEnds({"S1": 1000, "S2": llc["step"].max() + 1}, first=llc["step"].min())
    for stages in (StageEnds({}, first=llc["step"].min()), found):
        figure = development.loss_and_llc(tables["evals"], llc, stages)
        figure.canvas.draw()
        axis = figure.axes[1]
        first, last = axis.transData.transform([(llc["step"].min(), 0), (llc["step"].max(), 0)])[:, 0]
        half = 1.25 / 72 * figure.dpi  # of a marker of 2.5 points
        assert axis.bbox.x0 + half < first < last < axis.bbox.x1 - half
        spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axis.patches]
        assert (
            spans == [] or (spans[0][0], spans[-1][1]) == axis.get_xlim()
        )  # no strip is left between a stage and the edge


def test_runs_that_differ_in_more_than_their_seeds_have_no_common_line_of_the_loss(family):
    llc, evals = (read_tables(family)[name] for name in ("llc", "evals"))
    llc = pd.concat([llc.assign(lr=rate) for rate in (0.1, 0.2)])[["model_seed", "lr", *llc.columns.drop("model_seed")]]
    with pytest.raises(
        ValueError, match="the runs differ in lr, and this figure is for runs that differ in their seeds alone"
    ):
        development.llc_against_loss(llc, evals)


def test_scores_go_up_with_in_context_learning():
    steps = [100, 10_000, 499_999]
    learning = pd.DataFrame({"step": steps} | {f"loss/{k}": [4.0, 4.0 - k / 3, 4.0 - 3 * k / 4] for k in range(4)})
    figure = behaviour.icl_scores(learning)
    assert (np.diff(line(figure, 0, r"$\ell_1-\ell_2$")) > 0).all()
    assert (np.diff(line(figure, 0, r"$\ell_2-\ell_4$")) > 0).all()


def test_heads_with_a_role_are_found():
    rows = [
        {
            "step": step,
            "block": 0,
            "head": head,
            "token": token,
            "self_attn": 1 / 9,
            "prev_token_attn": share,
            "x_tokens_attn": 5 / 9,
        }
        for step in (100, 1000)
        for head, share in ((0, 0.95), (1, 0.1))
        for token in range(9)
    ]
    assert attention.find_roles(pd.DataFrame(rows)) == [
        attention.Role(0, 0, "x", "prev_token_attn"),
        attention.Role(0, 0, "y", "prev_token_attn"),
    ]
    figure = attention.identified_heads(pd.DataFrame(rows))
    assert sum(axis.get_visible() for axis in figure.axes) == 2


def test_pieces_of_a_trajectory_cover_it(tables):
    trajectory = tables["trajectory"]
    figure = essential_dynamics.planes(trajectory, PAPER_STAGES)
    drawn = sum(len(one.get_xdata()) for one in figure.axes[0].get_lines())
    # Neighbouring pieces share one point.
    assert drawn == len(trajectory) + len(figure.axes[0].get_lines()) - 1


def test_families_are_coloured_by_number_of_tasks():
    table = pd.DataFrame(
        [
            {
                "num_tasks": tasks,
                "step": step,
                "ood/mse": 1 + abs(np.log10(step) - 2),
                "delta_ridge": 1.0 / step,
                "delta_dmmse": 0.5,
            }
            for tasks in (4.0, 6.0, np.inf)
            for step in (1, 100, 10_000)
        ]
    )
    figure = task_families.transient_losses(table)
    labels = [one.get_label() for one in figure.axes[0].get_lines() if not str(one.get_label()).startswith("_")]
    assert labels == ["$M=2^{2}$", "$M=6$", r"$M=\infty$"]
    task_families.transient_distances(table).draw_without_rendering()
    over = task_families.memorisation_map(table)
    over.draw_without_rendering()
    nearer_to = over.axes[0].collections[0].get_array()
    assert nearer_to is not None
    # Two finite M by three steps; from step 1 to 10,000 the model of this table comes nearer to ridge than to dMMSE.
    assert np.sign(nearer_to.reshape(2, 3)).tolist() == [[1.0, -1.0, -1.0]] * 2
    assert (
        over.axes[0].get_xlim() == over.axes[1].get_xlim() == pytest.approx((0.1, 100_000))
    )  # cells around 1, 100 and 10,000
    with pytest.raises(ValueError, match="no model of finitely many tasks"):
        task_families.memorisation_map(table[table["num_tasks"] == np.inf])
    prior = table.rename(columns={"ood/mse": "task_prior/zero", "delta_dmmse": "task_prior/mean_task"})
    task_families.task_prior(prior).draw_without_rendering()
    scores = table.assign(**{"pc/0": 1.0, "pc/1": 2.0})
    references = pd.DataFrame(
        {"predictor": ["dmmse", "ridge"], "num_tasks": [4.0, np.inf], "pc/0": [0.0, 1.0], "pc/1": [1.0, 0.0]}
    )
    task_families.transient_trajectories(scores, references, table).draw_without_rendering()
    coefficients = table.rename(columns={"num_tasks": "task_config.num_tasks"}).assign(
        **{"llc/mean": np.log10(table["step"]) * table["num_tasks"].clip(upper=8), "llc/mcse": 0.1}
    )
    ends, critical = task_families.coefficient_over_tasks(coefficients, table).axes[1].containers
    # The loss on Gaussian tasks is smallest at step 100, and the last step is 10,000. Infinity is a line, not a point.
    assert ends.lines[0].get_xydata().tolist() == [[4.0, 16.0], [6.0, 24.0]]
    assert critical.lines[0].get_xydata().tolist() == [[4.0, 8.0], [6.0, 12.0]]


@pytest.mark.parametrize("key", ["model_seed", "task_config.num_tasks"])
def test_two_units_have_a_line_for_each_run(key):
    runs = pd.DataFrame(
        [{"model_seed": 7, key: run, "step": step, "llc/mean": run} for run in (1, 3) for step in (10, 99)]
    )
    absolute, relative = geometry.in_two_units(runs, runs.assign(**{"llc/mean": 2.0})).axes
    assert [set(line.get_ydata()) for line in absolute.get_lines()] == [{1}, {3}]
    assert [set(line.get_ydata()) for line in relative.get_lines()] == [{2.0}, {2.0}]
    name = key.rpartition(".")[2].removeprefix("model_")
    assert [str(line.get_label()) for line in absolute.get_lines()] == [f"{name} 1", f"{name} 3"]


def test_figures_of_chains():
    generator = np.random.default_rng(0)
    traces = pd.DataFrame(
        [{"chain": c, "draw": d, "loss": 2 + generator.random(), "llc": 7.0} for c in range(3) for d in range(11)]
    )
    figure = chains.loss_trace(traces, 2.0)
    np.testing.assert_allclose(figure.axes[1].get_lines()[0].get_ydata(), 7.0)
    cells = pd.DataFrame(
        [
            {"epsilon": eps, "gamma": gamma, "step": step, "draw": draw, "llc/mean": draw * eps, "llc/mcse": 0.1}
            for eps in (0.1, 0.3)
            for gamma in (1, 10, 100)
            for step in (5, 7)
            for draw in range(4)
        ]
    )
    grid = chains.running_estimates(cells, columns="gamma", hue="step", rows="epsilon")
    assert len(grid.axes) == 6
    assert all(len(axis.get_lines()) == 2 for axis in grid.axes)
    by_size = chains.estimates_by_setting(cells.drop_duplicates(["gamma", "step"]), "gamma")
    assert [text.get_text() for text in by_size.axes[0].get_legend().get_texts()] == [
        "gamma 1",
        "gamma 10",
        "gamma 100",
    ]
    draws = traces.assign(**{f"pc/{i}": generator.normal(size=len(traces)) for i in range(3)})
    grid_points = np.linspace(-1, 1, 5)
    landscape = {(0, 1): (grid_points, grid_points, generator.random((5, 5)))}
    chains.weight_planes(draws, [0.5, 0.2, 0.1], landscape).draw_without_rendering()
    tokens = pd.DataFrame({"step": [100, 1000], **{f"llc/mean/{k}": [1.0, 2.0] for k in range(3)}})
    assert len(chains.sampling_seed(tokens, tokens + 1).axes[0].get_lines()) == 6


def test_climbing_chains_are_drawn_where_they_cross():
    rows = [
        {"model_seed": 1, "step": step, "chain": chain, "draw": draw, "loss": 5.0 if draw >= left else 3.5}
        for step, lefts in ((30_000, (200, 400)), (200_000, (600, 9_999)))
        for chain, left in enumerate(lefts)
        for draw in range(100, 1_001, 100)
    ]
    traces = pd.DataFrame(rows)
    means = traces.groupby("step")["loss"].mean().to_numpy()
    estimates = pd.DataFrame({"model_seed": 1, "step": [30_000, 200_000], "loss/init": 2.0, "loss/zero": 4.0})
    estimates = estimates.assign(**{"loss/excess": means - 2, "llc/mean": 10 * (means - 2)})
    crossed, never, half_way, *_ = chains.climbs(traces, estimates).axes[0].get_lines()
    assert sorted(crossed.get_ydata()) == [200, 400, 600]
    assert list(never.get_ydata()) == [1_000]  # the last draw there is
    assert list(half_way.get_ydata()) == [100, 100]


def test_runs_of_one_seed_at_two_settings_are_two_lines():
    rates, steps = [0.003, 0.01], [0, 100, 1_000]
    every = [{"model_seed": 1, "lr": rate, "step": step} for rate in rates for step in steps]
    estimates = pd.DataFrame(every).assign(**{"loss/init": 2.0, "loss/zero": 4.0})
    excess = estimates["lr"] * 100
    estimates = estimates.assign(**{"loss/excess": excess, "llc/mean": 10 * excess})
    traces = pd.DataFrame(
        [
            {**run, "chain": chain, "draw": draw, "loss": 2.0 + 100 * run["lr"]}
            for run in every
            for chain in (0, 1)
            for draw in range(1, 11)
        ]
    )
    named = {line.get_label(): line for line in chains.climbs(traces, estimates).axes[1].get_lines()}
    for rate in rates:
        line = named[f"seed 1, lr {rate}"]
        assert list(line.get_xdata()) == [100, 1_000]  # step 0 has no place on a logarithmic axis
        np.testing.assert_allclose(line.get_ydata(), 1_000 * rate)


def test_a_folder_is_named_by_the_seed_and_by_what_differs():
    first = {"model_seed": 1, "optimizer_config.lr": 0.01, "subject_config.path": "weights/*.pt"}
    second = first | {"optimizer_config.lr": 0.003}
    assert run_label(first, among=[first, second]) == "seed-1-lr-0.01"
    assert run_label(first, among=[first]) == "seed-1"
    assert run_label({"subject_config.path": "weights/*.pt"}, among=[{"subject_config.path": "weights/*.pt"}]) == "run"


def test_steps_have_the_colours_of_their_colour_bar():
    colours, shown = step_colours([0, 100, 3_000, 500_000])
    for step in (100, 3_000, 500_000):
        np.testing.assert_allclose(colours[step], shown.to_rgba(step))
    assert colours[0] == colours[100]
    assert len({colours[step] for step in (100, 3_000, 500_000)}) == 3


def test_step_0_is_not_drawn_on_a_logarithmic_axis():
    table = pd.DataFrame({"step": [0, 100, 1_000], "llc/mean": [9.0, 1.0, 2.0]})
    figure = Figure()
    estimate_line(figure.subplots(), table, "estimate")
    assert list(line(figure, 0, "estimate")) == [1.0, 2.0]


def test_the_loss_of_ridge_is_the_models_less_its_distance_to_it():
    llc = pd.DataFrame({"model_seed": [1, 1, 2, 2], "step": [10, 20, 10, 20], "loss/init": [3.0, 2.0, 3.0, 2.2]})
    evals = llc.assign(**{"pretrain/delta_ridge": [1.5, 0.5, 1.5, 0.9]}).drop(columns="loss/init")
    np.testing.assert_allclose(ridge_loss(llc, evals), (1.5 + 1.3) / 2)


def test_drawing_leaves_the_global_style_alone(tables):
    before = dict(mpl.rcParams)
    behaviour.icl_scores(tables["evals"])
    assert dict(mpl.rcParams) == before


def test_a_table_without_the_columns_says_so():
    with pytest.raises(ValueError, match="no column loss/0"):
        token_count(pd.DataFrame({"step": [1]}), "loss")
    with pytest.raises(ValueError, match="num_tasks"):
        task_families.task_prior(pd.DataFrame({"step": [1]}))
    with pytest.raises(ValueError, match="no metric 'sharpness'"):
        attention.attention_metric(pd.DataFrame({"step": [1], "entropy": [0.0]}), "sharpness")


def test_runs_whose_names_would_be_equal_have_folders_of_their_own():
    runs = [{"model_seed": 1, "sampler_config.include": f'["blocks.0.{end}"]'} for end in ("*", "**", "mlp")]
    assert len({run_label(run, among=runs) for run in runs}) == 3


def test_a_checkpoint_whose_chains_are_all_lost_leaves_the_others_lines():
    traces = pd.DataFrame(
        {
            "step": [1, 1, 10, 10, 10, 10],
            "chain": [0, 0, 0, 0, 1, 1],
            "draw": [1, 2, 1, 2, 1, 2],
            "loss": [np.nan, np.nan, 2.0, 3.0, np.nan, np.nan],  # at step 10 one chain is lost, and one lives
            "distance": 1.0,
        }
    )
    axis = chains.relaxation(traces, pd.DataFrame({"step": [1, 10]})).axes[0]
    assert [line.get_ydata().tolist() for line in axis.get_lines()][1] == [2.0, 3.0]


@pytest.mark.parametrize("step", [[0, 5], [1, 5]])
def test_a_family_of_two_checkpoints_is_drawn(step):
    rows = [
        {"num_tasks": tasks, "step": each, "delta_ridge": 2.0, "delta_dmmse": tasks, "ood/mse": 3.0}
        for tasks in (1, 4)
        for each in step
    ]
    assert task_families.memorisation_map(pd.DataFrame(rows)).axes


def test_several_runs_of_one_number_of_tasks_are_not_joined_by_a_line():
    rows = [
        {"task_config.num_tasks": 4, "model_seed": seed, "step": step, "llc/mean": 1.0, "llc/mcse": 0.1}
        for seed in (0, 1)
        for step in (1, 10)
    ]
    with pytest.raises(ValueError, match="several"):
        task_families.coefficient_over_tasks(pd.DataFrame(rows), pd.DataFrame())


def test_a_run_of_less_than_a_hundred_steps_is_scaled_to_all_of_it(tables):
    evals = tables["evals"].assign(step=np.arange(len(tables["evals"])))
    assert behaviour.behavioural(evals, stages=PAPER_STAGES).axes
