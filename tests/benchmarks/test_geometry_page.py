"""docs/geometry.md shows what data/L2H4Minf holds, and its measurements are what it says."""

import pytest
import torch

from benchmarks.geometry.page import PAGE, page
from benchmarks.geometry.rescaled import CHANGES, changed, size_of_writers
from benchmarks.geometry.settings import ROOT, SETTINGS, STAGE_ENDS, Run
from icl.analysis.stages import PUBLISHED_STAGE_ENDS
from icl.config.sweeps import expand, load_sweep
from icl.estimation import LLCConfig


def test_its_tables_are_those_of_the_data():
    text = PAGE.read_text()
    assert page(text) == text, "python -m benchmarks.geometry.page"


@pytest.mark.parametrize("sweep", ["8-L2H4-relative-llcs", "9-L2H4-gamma-spectrum"])
def test_its_settings_are_those_of_the_sweeps(sweep):
    for data in expand(load_sweep(ROOT / "sweeps" / "analysis" / f"{sweep}.yaml")):
        config = LLCConfig.parse(data)
        theirs, mine = config.sampler_config, SETTINGS["relative"]
        varied = ("num_chains", "num_draws", "num_burnin_steps", "gamma")
        assert theirs.model_copy(update={name: getattr(mine, name) for name in varied}) == mine
        assert config.steps == tuple(STAGE_ENDS.values())


def test_its_checkpoints_are_the_ends_of_the_published_stages():
    for stage, step in STAGE_ENDS.items():
        assert step == pytest.approx(PUBLISHED_STAGE_ENDS[stage], rel=0.03)


def test_the_changes_of_sizes_leave_the_model_as_it_is():
    run = Run(1)
    before, after = (run.model(STAGE_ENDS[stage]) for stage in ("LR2", "LR3"))
    batch = run.sequences(0, 64)
    for change in CHANGES:
        model = changed(change, before, after)
        assert size_of_writers(model) == pytest.approx(size_of_writers(after))
        with torch.no_grad():
            torch.testing.assert_close(model(*batch), before(*batch), rtol=1e-3, atol=1e-3)
    mine, theirs = model.state_dict(), after.state_dict()
    for name in mine:
        if name.endswith("norm.weight"):
            torch.testing.assert_close(mine[name].norm(), theirs[name].norm())
