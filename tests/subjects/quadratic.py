"""A subject with a quadratic loss, whose Hessian, norm and trajectory are known.

L(w) = mean over samples of (x·w − y)² / 2, so that H = XᵀX / n at every w. Checkpoint t is w_t = t · (1, 2, ..., P) + c.
"""

import torch
from torch import nn


class Quadratic:
    def __init__(self, size: int = 5, batch: int = 11, samples: int = 59, shuffle: bool = False, curved: bool = True):
        draw = torch.Generator().manual_seed(size)
        scales = torch.linspace(1, 4, size, dtype=torch.float64)
        self.inputs = torch.randn(samples, size, generator=draw, dtype=torch.float64) * scales
        self.outputs = torch.randn(samples, 1, generator=draw, dtype=torch.float64)
        self.batch, self.shuffle, self.curved, self.size = batch, shuffle, curved, size

    def weights(self, step):
        return 0.01 * step * torch.arange(1.0, self.size + 1, dtype=torch.float64) + 0.5

    def steps(self):
        return [0, 3, 7, 19]

    def model(self, step):
        model = nn.Linear(self.size, 1, bias=False).double()
        model.weight.data.copy_(self.weights(step)[None])
        return model

    def loss(self, predict, batch):
        away = predict(batch[0]) - batch[1]
        return 0.5 * away.square().mean() if self.curved else away.mean()

    def batches(self, step):
        data = torch.utils.data.TensorDataset(self.inputs, self.outputs)
        return torch.utils.data.DataLoader(data, batch_size=self.batch, shuffle=self.shuffle)


class Growing(Quadratic):
    def model(self, step):
        return nn.Linear(self.size, 1, bias=step > 0).double()


class Attends(Quadratic):
    """Attention by PyTorch's fused kernels, which have no second derivative."""

    def model(self, step):
        return Attention(self.size)

    def loss(self, predict, batch):
        return predict(batch[0].float()).square().mean()


class Attention(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size, generator=torch.Generator().manual_seed(1)))

    def forward(self, inputs):
        rows = (inputs @ self.weight)[None, None]
        return nn.functional.scaled_dot_product_attention(rows, rows, rows)
