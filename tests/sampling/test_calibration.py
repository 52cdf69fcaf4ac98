"""The search for constants: what is called insensitive, what is recommended, and that neither looks at the estimate's value."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from icl.sampling import PUBLISHED, SamplerConfig
from icl.sampling.calibration import Cell, SearchGrid, Target, calibrate, cell_config, conclude, with_constants_of
from icl.sampling.objective import ModuleObjective
from icl.streams import Stream

D = 5
INPUTS = Stream(0, "test/inputs").normal(0, (31, D))


def squares(predict, batch):
    return predict(batch).square().mean()


def linear() -> nn.Module:
    """y = w·x at w* = 0: Gaussian posterior, λ̂ = Σ ½ nβh/(nβh + γ)."""
    model = nn.Linear(D, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


def exact_llc(nbeta: float, gamma: float) -> float:
    curvature = torch.linalg.eigvalsh(2 * INPUTS.T @ INPUTS / len(INPUTS))
    return float((0.5 * nbeta * curvature / (nbeta * curvature + gamma)).sum())


def cell(epsilon=1e-4, gamma=1.0, nbeta=10.0, llc=5.0, mcse=0.05, healthy=True, step=0, setting="") -> Cell:
    return Cell(
        setting, step, epsilon, gamma, nbeta, llc, mcse, 1.0, 500.0, 0.1, 1.0, 0, 1.0, 0.0, healthy, "", (0,), ((llc,),)
    )


def grid_of(estimate, healthy=lambda e, g, b: True, steps=(0,)) -> list[Cell]:
    cells = SearchGrid((1e-5, 1e-4, 1e-3), (1.0, 10.0, 100.0), (10.0, 100.0)).cells()
    return [
        cell(e, g, b, llc=estimate(e, g, b), healthy=healthy(e, g, b), step=step) for step in steps for e, g, b in cells
    ]


def test_a_plateau_is_found_and_its_cell_of_largest_nbeta_then_smallest_gamma_is_recommended():
    # Flat up to gamma 10 and epsilon 1e-4; beyond, the localisation and the discretisation show.
    found = conclude(grid_of(lambda e, g, b: 5.0 / (1 + (g > 10) + 2 * (e > 1e-4))))
    assert found.region
    assert found.recommended == (1e-5, 1.0, 100.0)
    region = {(row.epsilon, row.gamma) for row in found.table[found.table["insensitive"]].itertuples()}
    assert region == {(e, g) for e in (1e-5, 1e-4) for g in (1.0, 10.0)}
    assert "region of insensitivity: 8 of 18 cells" in found.text


def test_without_a_plateau_in_gamma_the_absence_is_said_and_stability_in_epsilon_decides():
    found = conclude(grid_of(lambda e, g, b: 100.0 / g, healthy=lambda e, g, b: g >= 10 or b < 100))
    assert not found.region
    assert not found.table["insensitive"].any()
    assert found.recommended == (1e-5, 10.0, 100.0), "gamma 1 is not healthy at the largest nbeta"
    assert found.text.startswith("no region of insensitivity")


def test_one_setting_must_serve_every_checkpoint():
    cells = grid_of(lambda e, g, b: 5.0, steps=(7, 40))
    spoilt = [replace(c, healthy=False) if c.step == 40 and c.nbeta == 100.0 else c for c in cells]
    assert conclude(cells).recommended == (1e-5, 1.0, 100.0)
    assert conclude(spoilt).recommended == (1e-5, 1.0, 10.0)


def test_nothing_healthy_means_no_recommendation_and_a_remedy():
    found = conclude(grid_of(lambda e, g, b: 5.0, healthy=lambda e, g, b: False))
    assert found.recommended is None
    assert "no recommendation" in found.text
    assert "smaller epsilon" in found.text


def test_the_choice_does_not_depend_on_the_scale_of_the_estimates_and_presets_take_no_part():
    cells = grid_of(lambda e, g, b: 5.0 / (1 + (g > 10)))
    scaled = [replace(c, llc=17 * c.llc, mcse=17 * c.mcse) for c in cells]
    with_preset = [*cells, cell(3e-4, 6.7, 1e6, llc=5.0, setting="published")]
    assert conclude(cells).recommended == conclude(scaled).recommended == conclude(with_preset).recommended
    assert not conclude(with_preset).table.iloc[-1]["insensitive"]


def test_a_search_samples_every_cell_and_the_presets_and_goes_on_where_it_was_stopped():
    base = SamplerConfig(num_chains=4, num_draws=200, num_burnin_steps=100, sampling_method="langevin", init_seed=0)
    subject = Target(ModuleObjective(linear(), squares), [INPUTS], reference_loss=10.0)
    grid = SearchGrid((1e-3, 4e-3), (5.0,), (30.0, 60.0))
    made: list[Cell] = []
    found = calibrate({0: subject}, base, grid, {"published": PUBLISHED}, record=made.append)
    assert [cell.setting for cell in made] == [""] * 4 + ["published"]
    for row in found.table[found.table["setting"] == ""].itertuples():
        assert abs(row.llc - exact_llc(row.nbeta, 5.0)) < max(5 * row.mcse, 0.1)
        assert row.healthy, row.verdict
    assert found.recommended is not None
    assert found.recommended[2] == 60.0
    again: list[Cell] = []
    repeated = calibrate({0: subject}, base, grid, {"published": PUBLISHED}, done=made[:3], record=again.append)
    assert [cell.key for cell in again] == [cell.key for cell in made[3:]]
    assert repeated.table.equals(found.table)


def test_a_cell_replaces_the_constants_of_its_base_and_keeps_the_budget():
    config = cell_config(PUBLISHED, (1e-6, 100.0, 10.0))
    assert (config.step_size, config.localization, config.inverse_temperature) == (1e-6, 100.0, 10.0)
    assert (config.num_chains, config.method) == (PUBLISHED.num_chains, "sgld")
    preset = with_constants_of(SamplerConfig(num_chains=2), PUBLISHED)
    assert (preset.num_chains, preset.method, preset.step_size) == (2, "sgld", 3e-4)
    with pytest.raises(ValueError, match="pilot"):
        with_constants_of(SamplerConfig(), SamplerConfig())
    with pytest.raises(ValueError, match="at least one value"):
        SearchGrid(epsilons=()).cells()
