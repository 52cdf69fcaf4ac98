"""`icl tabulate` says what its reader might overlook."""

import re

import pytest
import torch

from icl.checkpoints import Checkpoints
from icl.commands.tabulate import tabulate_command
from icl.config.sweeps import load_sweep
from icl.execution.llc_run import run_llc
from icl.execution.points import llc_points
from icl.execution.surroundings import Surroundings
from icl.model import initial_parameters
from icl.storage import LocalStore

SWEEP = """\
method: grid
command: ["${env}", "icl", "llc"]
parameters:
  task_config: {parameters: {task_size: {value: 2}, max_examples: {value: 3}, num_tasks: {value: inf}, embed_size: {value: 4},
      mlp_size: {value: 5}, num_heads: {value: 2}, num_layers: {value: 1}, model_seed: {values: [0, 1]}}}
  num_steps: {value: 30}
  sampler_config: {parameters: {num_chains: {value: 2}, num_draws: {value: 5}, num_burnin_steps: {value: 2}, nbeta: {value: 10.0},
      eval_dataset_size: {value: 64}, grad_batch_size: {value: 16}, init_seed: {value: 0}}}
"""


@pytest.mark.parametrize(("overrides", "told"), [([], True), (["sampler_config.gamma=30"], False)])
def test_runs_with_a_chosen_localisation_of_their_own_are_not_to_be_compared(overrides, told, tmp_path, capsys):
    sweep = tmp_path / "mine.yaml"
    sweep.write_text(SWEEP)
    place = Surroundings(LocalStore(tmp_path), tmp_path / "icl", torch.device("cpu"), tracking="local")
    for size, config in enumerate(llc_points(load_sweep(sweep), overrides), start=1):
        parameters = initial_parameters(config.training.task_config.shape, 0)
        scaled = {name: 3**size * value for name, value in parameters.items()}
        Checkpoints(place.store, config.training.name).save(29, scaled)
        assert run_llc(config, place) == 0
    capsys.readouterr()
    tabulate_command(sweep, tmp_path / "tables", "llc", None, overrides, {"LOCAL_ROOT": str(tmp_path)})
    found = re.findall(r"chose γ for each run, from (\S+) to (\S+), so λ̂", capsys.readouterr().err)
    assert [low != high for low, high in found] == [True] * told
