"""The attention-only language model of arXiv 2402.02364, by its public names.

With h the residual stream, W_E the embedding and P the position embedding, block by block

    q, k = W_Q (LN(h) + P) + b_Q,  W_K (LN(h) + P) + b_K        v = W_V LN(h) + b_V        per head, of width d_head
    h <- h + b_O + Σ_heads softmax(q kᵀ / √d_head + causal mask) v W_O
    logits = LN(h) W_U + b_U

Positions are of the "shortformer" kind (Press, Smith & Lewis, arXiv 2012.15832): queries and keys see them, the stream never
does. There is no MLP. Names and layout of the weights are those of TransformerLens, so that public checkpoints load as they are;
its buffers `attn.mask` and `attn.IGNORE` carry no information and are left out.

Shapes: B batch, T tokens, V vocabulary, C channels (d_model), H heads, D width of a head (d_head), P parameters.
"""

import math
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icl.streams import Stream

Parameters = Mapping[str, Tensor]
Batch = tuple[Tensor]

NORM_EPSILON = 1e-5
_NOTHING = -100
_BUFFER = re.compile(r"blocks\.\d+\.attn\.(mask|IGNORE)\Z")


@dataclass(frozen=True)
class LanguageShape:
    """All that decides the model's function besides its parameters; the fields are those of `AttentionOnlyTransformer`."""

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    n_ctx: int
    d_vocab: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def num_parameters(self) -> int:
        """Length P of the flat parameter vector."""
        return sum(math.prod(size) for size in parameter_sizes(self).values())


@cache
def parameter_sizes(shape: LanguageShape) -> Mapping[str, tuple[int, ...]]:
    """Name -> size of every weight, in the order of `named_parameters()`; do not modify."""
    channels, heads, width = shape.d_model, shape.n_heads, shape.d_head
    sizes: dict[str, tuple[int, ...]] = {
        "embed.W_E": (shape.d_vocab, channels),
        "pos_embed.W_pos": (shape.n_ctx, channels),
    }
    for layer in range(shape.n_layers):
        block = f"blocks.{layer}"
        sizes |= {f"{block}.ln1.w": (channels,), f"{block}.ln1.b": (channels,)}
        sizes |= {f"{block}.attn.W_{kind}": (heads, channels, width) for kind in "QKV"}
        sizes[f"{block}.attn.W_O"] = (heads, width, channels)
        sizes |= {f"{block}.attn.b_{kind}": (heads, width) for kind in "QKV"}
        sizes[f"{block}.attn.b_O"] = (channels,)
    sizes |= {"ln_final.w": (channels,), "ln_final.b": (channels,)}
    return sizes | {"unembed.W_U": (channels, shape.d_vocab), "unembed.b_U": (shape.d_vocab,)}


def initial_parameters(shape: LanguageShape, seed: int) -> dict[str, Tensor]:
    """TransformerLens's initialisation as a pure function of the seed: weights ~ N(0, 0.8² / d_model), biases 0, norm gains 1."""
    stream, std = Stream(seed, "language model"), 0.8 / math.sqrt(shape.d_model)
    parameters: dict[str, Tensor] = {}
    for index, (name, size) in enumerate(parameter_sizes(shape).items()):
        kind = name.rsplit(".", 1)[1]
        if kind == "w":
            parameters[name] = torch.ones(size)
        elif kind.startswith("b"):
            parameters[name] = torch.zeros(size)
        else:
            parameters[name] = std * stream.normal(index, size)
    return parameters


def logits_of(parameters: Parameters, tokens: Tensor, positions: bool = True) -> Tensor:
    """Logits (B, T, V) of the next token at every token of (B, T), as a pure function that `torch.func` can transform.

    Args:
        parameters: by public names.
        positions: False: without the position embedding (positional ablation).
    """
    return _run(parameters, tokens, positions)[0]


def patterns_of(parameters: Parameters, tokens: Tensor) -> list[Tensor]:
    """Attention (B, H, T, T) of each block, queries × keys; rows sum to 1."""
    return _run(parameters, tokens, True)[1]


def _run(parameters: Parameters, tokens: Tensor, positions: bool) -> tuple[Tensor, list[Tensor]]:
    length = tokens.shape[-1]
    stream, patterns = parameters["embed.W_E"][tokens], []
    place = parameters["pos_embed.W_pos"][:length]
    if not positions:
        place = torch.zeros_like(place)
    layer = 0
    while f"blocks.{layer}.ln1.w" in parameters:
        pattern, attended = _attend(parameters, f"blocks.{layer}", stream, place)
        stream = stream + attended
        patterns.append(pattern)
        layer += 1
    stream = _norm(parameters, "ln_final", stream)
    return F.linear(stream, parameters["unembed.W_U"].T, parameters["unembed.b_U"]), patterns


def _attend(parameters: Parameters, block: str, stream: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Pattern (B, H, T, T) of a block and what it adds to the stream."""
    heads, _, width = parameters[f"{block}.attn.W_Q"].shape
    normed = _norm(parameters, f"{block}.ln1", stream)
    placed = normed + place

    def project(source: Tensor, kind: str, scale: float = 1.0) -> Tensor:
        weight = parameters[f"{block}.attn.W_{kind}"].transpose(1, 2).flatten(0, 1) * scale
        bias = parameters[f"{block}.attn.b_{kind}"].flatten() * scale
        return F.linear(source, weight, bias).unflatten(-1, (heads, width)).transpose(-3, -2)

    # The scale goes to the weight, the smallest of those that it could go to.
    queries, keys, values = project(placed, "Q", 1 / math.sqrt(width)), project(placed, "K"), project(normed, "V")
    scores = torch.baddbmm(_causal_mask(queries), queries.flatten(0, -3), keys.flatten(0, -3).transpose(-2, -1))
    pattern = scores.softmax(dim=-1)
    mixed = (pattern @ values.flatten(0, -3)).unflatten(0, queries.shape[:-2]).transpose(-3, -2).flatten(-2)
    output = parameters[f"{block}.attn.W_O"].flatten(0, 1).T
    return pattern.unflatten(0, queries.shape[:-2]), F.linear(mixed, output, parameters[f"{block}.attn.b_O"])


def _causal_mask(queries: Tensor) -> Tensor:
    """To be added to the scores: 0 for keys up to the query's own token, -inf beyond."""
    place = torch.arange(queries.shape[-2], device=queries.device)
    return queries.new_zeros(()).masked_fill(place[None, :] > place[:, None], float("-inf"))


def _norm(parameters: Parameters, name: str, stream: Tensor) -> Tensor:
    gain, bias = parameters[f"{name}.w"], parameters[f"{name}.b"]
    return F.layer_norm(stream, gain.shape[-1:], gain, bias, NORM_EPSILON)


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy (B, T - 1) in nats of each next token, from logits (B, T, V) at tokens (B, T)."""
    # The last token has nothing to predict. Its logits are ignored, not cut off: a cut would copy all others, and their gradients.
    following = F.pad(tokens[..., 1:], (0, 1), value=_NOTHING)
    losses = F.cross_entropy(logits.flatten(0, -2), following.flatten(), ignore_index=_NOTHING, reduction="none")
    return losses.reshape(tokens.shape)[..., :-1]


def next_token_loss(predict: Callable[..., Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    """Cross-entropy (T - 1,) per position, mean over the rows of the batch `(tokens (B, T),)`: a loss for `icl.sampling.estimate_llc`,
    whose mean is the training loss."""
    return token_losses(predict(batch[0]), batch[0]).mean(dim=0)


class AttentionOnlyTransformer(nn.Module):
    """The model with its parameters; see the module's docstring for the formula.

    `load_state_dict` takes the weights by their public names. The published model has the default sizes, and 3,355,016 parameters.

    Args:
        n_layers: number of attention blocks.
        d_model: C, the width of the residual stream.
        n_heads: H, heads of a block.
        d_head: D, width of a head's queries, keys and values.
        n_ctx: the longest row of tokens; shorter ones are accepted.
        d_vocab: V, the number of tokens there are.
        seed: of the initialisation; None draws one from the system's entropy.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        n_layers: int = 2,
        d_model: int = 256,
        n_heads: int = 8,
        d_head: int = 32,
        n_ctx: int = 1024,
        d_vocab: int = 5000,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.shape = LanguageShape(n_layers, d_model, n_heads, d_head, n_ctx, d_vocab)
        for name, value in initial_parameters(self.shape, secrets.randbits(63) if seed is None else seed).items():
            _register(self, name, nn.Parameter(value))
        self.register_load_state_dict_pre_hook(_drop_buffers)

    @classmethod
    def from_weights(cls, state: Mapping[str, Tensor]) -> "AttentionOnlyTransformer":
        """The module that weights by their public names belong to; all its sizes are theirs.

        Raises:
            ValueError: they are no weights of such a model.
        """
        model = cls(**asdict(shape_of(state)), seed=0)
        model.load_state_dict(dict(state))
        return model

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) for tokens (B, T); those at t depend on tokens 0..t alone.

        Raises:
            ValueError: rows longer than n_ctx, or of no token.
        """
        return logits_of(self._parameters_for(tokens), tokens)

    def patterns(self, tokens: Tensor) -> list[Tensor]:
        """Attention (B, H, T, T) of each block, queries × keys."""
        return patterns_of(self._parameters_for(tokens), tokens)

    def _parameters_for(self, tokens: Tensor) -> dict[str, Tensor]:
        if not 1 <= tokens.shape[-1] <= self.shape.n_ctx:
            raise ValueError(f"expected rows of 1 to n_ctx={self.shape.n_ctx} tokens, got tokens {tuple(tokens.shape)}")
        return dict(self.named_parameters())


def shape_of(state: Mapping[str, Tensor]) -> LanguageShape:
    """The sizes of the model that weights by their public names belong to; extra buffers are ignored.

    Raises:
        ValueError: naming what is missing, unexpected or of another shape.
    """
    sizes = {name: tuple(value.shape) for name, value in state.items() if not _BUFFER.match(name)}
    needed = ("embed.W_E", "pos_embed.W_pos", "blocks.0.attn.W_Q")
    for name in needed:
        if name not in sizes:
            raise ValueError(
                f"{name} is missing: these are no weights of an attention-only transformer by their public names"
            )
    if len(sizes["embed.W_E"]) != 2 or len(sizes["pos_embed.W_pos"]) != 2 or len(sizes["blocks.0.attn.W_Q"]) != 3:
        raise ValueError(
            f"{', '.join(needed)} have shapes {', '.join(str(sizes[name]) for name in needed)}; expected 2, 2 and 3 axes"
        )
    layers = sum(name.endswith(".attn.W_Q") for name in sizes)
    heads, _, width = sizes["blocks.0.attn.W_Q"]
    vocabulary, channels = sizes["embed.W_E"]
    shape = LanguageShape(layers, channels, heads, width, sizes["pos_embed.W_pos"][0], vocabulary)
    expected = parameter_sizes(shape)
    faults = [f"{name} is missing" for name in expected if name not in sizes]
    faults += [f"{name} is not expected" for name in sizes if name not in expected]
    faults += [
        f"{name} has shape {sizes[name]} instead of {size}"
        for name, size in expected.items()
        if name in sizes and sizes[name] != size
    ]
    if faults:
        more = f" and {len(faults) - 3} more differences" if len(faults) > 3 else ""
        raise ValueError(f"these are no weights of an attention-only transformer: {'; '.join(faults[:3])}{more}")
    return shape


def _drop_buffers(module: nn.Module, state: dict[str, Any], prefix: str, *rest: object) -> None:
    for name in [name for name in state if _BUFFER.match(name.removeprefix(prefix))]:
        del state[name]


def _register(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Add a parameter under a dotted name, creating the modules on the way."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(leaf, parameter)
