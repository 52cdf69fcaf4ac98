"""What the library is measured against: the same model and the same algorithms as a PyTorch tutorial would write them.

Nothing is trimmed, fused or batched by hand: every token and every output is computed, parameters are `nn.Linear` and
`nn.LayerNorm` modules, gradients come from autograd, updates from `torch.optim`.

Shapes: B batch, K examples, D task dimension, T = 2K tokens, C channels, H heads, M tasks.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icl.model import TransformerShape


class Attention(nn.Module):
    """Causal self-attention with one fused projection."""

    def __init__(self, channels: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.output = nn.Linear(channels, channels, bias=False)
        self.register_buffer("mask", torch.ones(tokens, tokens).tril() == 0, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, channels = x.shape
        qkv = self.qkv(x).view(batch, tokens, self.heads, 3 * channels // self.heads).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=-1)
        scores = q @ k.transpose(-2, -1) / math.sqrt(channels // self.heads)
        pattern = scores.masked_fill(self.mask[:tokens, :tokens], float("-inf")).softmax(dim=-1)
        return self.output((pattern @ v).transpose(1, 2).reshape(batch, tokens, channels))


class Block(nn.Module):
    """Pre-norm attention and MLP; the input is added once more at the end, as in the reference code."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        channels = shape.embed_size
        self.attention_norm = nn.LayerNorm(channels)
        self.attention = Attention(channels, shape.num_heads, 2 * shape.max_examples)
        self.mlp_norm = nn.LayerNorm(channels)
        self.mlp = nn.ModuleDict(
            {"up": nn.Linear(channels, shape.mlp_size), "down": nn.Linear(shape.mlp_size, channels)}
        )

    def forward(self, x: Tensor) -> Tensor:
        middle = x + self.attention(self.attention_norm(x))
        hidden = torch.relu(self.mlp["up"](self.mlp_norm(middle)))
        return x + middle + self.mlp["down"](hidden)


class Textbook(nn.Module):
    """The transformer of `icl.model`, untrimmed, with the same parameter names: its state can be loaded.

    `shape` must be of the default kind: layer norm, output map, doubled residual.
    """

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        channels, tokens = shape.embed_size, 2 * shape.max_examples
        self.token_embedding = nn.Linear(shape.task_size + 1, channels, bias=False)
        self.position_embedding = nn.Linear(tokens, channels, bias=False)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.final_norm = nn.LayerNorm(channels)
        self.unembedding = nn.Linear(channels, shape.task_size + 1)

    def forward(self, xs: Tensor, ys: Tensor) -> Tensor:
        """Predictions (B, K, 1) for xs (B, K, D), ys (B, K, 1)."""
        x_tokens = torch.cat((torch.zeros_like(ys), xs), dim=-1)
        y_tokens = torch.cat((ys, torch.zeros_like(xs)), dim=-1)
        tokens = torch.stack((x_tokens, y_tokens), dim=2).flatten(1, 2)
        stream = self.token_embedding(tokens) + self.position_embedding.weight.T[: tokens.shape[1]]
        for block in self.blocks:
            stream = block(stream)
        return self.unembedding(self.final_norm(stream))[:, 0::2, :1]


def random_batch(shape: TransformerShape, batch: int, noise_variance: float = 0.125) -> tuple[Tensor, Tensor]:
    """xs (B, K, D), ys (B, K, 1) from the global generator."""
    xs = torch.randn(batch, shape.max_examples, shape.task_size)
    tasks = torch.randn(batch, shape.task_size, 1)
    return xs, xs @ tasks + math.sqrt(noise_variance) * torch.randn(batch, shape.max_examples, 1)


def train(model: Textbook, optimizer: torch.optim.Optimizer, shape: TransformerShape, batch: int, steps: int) -> None:
    """`steps` steps of training on fresh data."""
    for _ in range(steps):
        xs, ys = random_batch(shape, batch)
        loss = F.mse_loss(model(xs, ys), ys)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def sgld(
    model: Textbook, shape: TransformerShape, batch: int, steps: int, epsilon: float, nbeta: float, gamma: float
) -> list[float]:
    """One chain of localised SGLD from the model's weights, which move; returns the losses."""
    anchor = [parameter.detach().clone() for parameter in model.parameters()]
    losses = []
    for _ in range(steps):
        xs, ys = random_batch(shape, batch)
        loss = F.mse_loss(model(xs, ys), ys)
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter, centre in zip(model.parameters(), anchor, strict=True):
                assert parameter.grad is not None
                drift = nbeta * parameter.grad + gamma * (parameter - centre)
                parameter.add_(-epsilon / 2 * drift + math.sqrt(epsilon) * torch.randn_like(parameter))
    return losses


def ridge(xs: Tensor, ys: Tensor, noise_variance: float) -> Tensor:
    """Ridge predictions (B, K, 1): one solve per example."""
    predictions = []
    for k in range(xs.shape[1]):
        x, y = xs[:, :k], ys[:, :k]
        gram = x.transpose(1, 2) @ x + noise_variance * torch.eye(xs.shape[2])
        predictions.append(xs[:, k : k + 1] @ torch.linalg.solve(gram, x.transpose(1, 2) @ y))
    return torch.cat(predictions, dim=1)


def dmmse(xs: Tensor, ys: Tensor, tasks: Tensor, noise_variance: float) -> Tensor:
    """dMMSE predictions (B, K, 1) for tasks (M, D): one pass over all tasks per example."""
    predictions = []
    for k in range(xs.shape[1]):
        residuals = ys[:, :k] - xs[:, :k] @ tasks.T
        posterior = (-residuals.square().sum(dim=1) / (2 * noise_variance)).softmax(dim=-1)
        predictions.append((xs[:, k] * (posterior @ tasks)).sum(dim=-1, keepdim=True))
    return torch.stack(predictions, dim=1)
