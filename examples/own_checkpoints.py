"""A folder of your own checkpoints through `icl llc`: this file trains and saves, and is the module that the sweep file names."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

SWEEP = """method: grid
parameters:
  subject: {value: checkpoints}
  subject_config:
    parameters:
      path: {value: "runs/step_*.pt"}
      model: {value: "own_checkpoints:network"}
      loss: {value: "own_checkpoints:loss"}
      batches: {value: "own_checkpoints:batches"}
  sampler_config:
    parameters: {num_draws: {value: 3000}, sampling_method: {value: langevin}, epsilon: {value: 0.0001}, init_seed: {value: 0}}
"""


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    xs = torch.randn(512, 3, generator=torch.Generator().manual_seed(1))
    return [(xs, xs.prod(dim=1, keepdim=True))]


def loss(predict, batch):
    return nn.functional.mse_loss(predict(batch[0]), batch[1])


def train() -> None:
    torch.manual_seed(0)
    optimiser = torch.optim.Adam((model := network()).parameters(), 1e-2)
    Path("runs").mkdir(exist_ok=True)
    for step in range(301):
        if step in (30, 300):
            torch.save(model.state_dict(), f"runs/step_{step}.pt")
        optimiser.zero_grad()
        loss(model, batches()[0]).backward()
        optimiser.step()


def estimate(quick: bool = False) -> None:
    Path("own.yaml").write_text(SWEEP)
    command = [sys.executable, "-m", "icl", "llc", "own.yaml", "--tracking", "local"]
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # so that the sweep file finds this module
    subprocess.run(command + quick * ["--set", "sampler_config.num_draws=50"], check=True)


if __name__ == "__main__":
    train()
    estimate("--quick" in sys.argv)
