"""Loss and gradient of the transformer: one signature, and behind it whichever way is fastest here.

    (flat (P,), xs (B, K, D), ys (B, K, 1)) -> (token losses (K,), gradient (P,))

with token loss k = mean over the batch of (prediction_k - y_k)², and the gradient that of their mean over k, which is
the training loss.
"""

from icl.engine.cross_entropy import cross_entropy_loss
from icl.engine.loss import batched_loss_and_grad, loss_and_grad, mse_loss
from icl.engine.paths import LossAndGrad, Path, Predict, choose_path

__all__ = [
    "LossAndGrad",
    "Path",
    "Predict",
    "batched_loss_and_grad",
    "choose_path",
    "cross_entropy_loss",
    "loss_and_grad",
    "mse_loss",
]
