"""Loss and gradient of the transformer, computed by the fastest way on this machine, under one signature:

    (flat (P,), xs (B, K, D), ys (B, K, 1)) -> (token losses (K,), gradient (P,))

Token loss k is the mean over the batch of (prediction_k - y_k)². The training loss is the mean of the token losses over
k, and the gradient is that of the training loss.
"""

from icl.engine.cross_entropy import cross_entropy_loss
from icl.engine.loss import batched_loss_and_grad, loss_and_grad, mse_loss
from icl.engine.paths import LossAndGrad, Path, Predict, choose_batched, choose_path
from icl.engine.precision import MatmulPrecision, matmul_precision

__all__ = [
    "LossAndGrad",
    "MatmulPrecision",
    "Path",
    "Predict",
    "batched_loss_and_grad",
    "choose_batched",
    "choose_path",
    "cross_entropy_loss",
    "loss_and_grad",
    "matmul_precision",
    "mse_loss",
]
