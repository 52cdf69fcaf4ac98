"""What the measurements of docs/geometry.md share."""

from pathlib import Path

from torch import Tensor

from icl.analysis.run import load_model
from icl.checkpoints import Checkpoints
from icl.config import TrainingConfig
from icl.model import InContextRegressionTransformer
from icl.sampling.config import SamplerConfig
from icl.sampling.presets import CALIBRATED
from icl.storage import LocalStore
from icl.streams import Stream

ROOT = Path(__file__).parents[2]
FAMILY = ROOT / "data" / "L2H4Minf"
STAGE_ENDS = {"LR1": 984, "LR2": 40292, "LR3": 126262, "LR4": 313131, "LR5": 499999}
"""The checkpoint at the end of each stage."""

SETTINGS: dict[str, SamplerConfig] = {
    "absolute": CALIBRATED,
    "relative": CALIBRATED.model_copy(update={"localization_units": "relative", "gamma": 20.0, "epsilon": 8e-4}),
}
"""The calibrated setting, and the same in units of the weights (sweeps/analysis/8-L2H4-relative-llcs.yaml)."""


class Run:
    """The shipped run of one model seed."""

    def __init__(self, seed: int) -> None:
        (folder,) = (FAMILY / "checkpoints" / "icl").glob(f"*-seed{seed}-*")
        self.seed = seed
        self._checkpoints = Checkpoints(LocalStore(FAMILY / "checkpoints"), folder.name)
        self.config = TrainingConfig.parse(self._checkpoints.config() or {}).resolved()

    def model(self, step: int) -> InContextRegressionTransformer:
        """The model at a checkpoint."""
        return load_model(self._checkpoints, self.config, step)

    def sequences(self, index: int, size: int) -> tuple[Tensor, Tensor]:
        """Sequences of the training distribution that no chain has met: xs (size, K, D) and ys (size, K, 1)."""
        return self.config.task_config.pretrain_task().sample(Stream(0, "geometry"), index, size)
