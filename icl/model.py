"""The transformer of arXiv 2402.02364 for in-context linear regression, as an `nn.Module` and as a pure function of
its parameters.

A pre-norm, decoder-only transformer reads the tokens x_1, y_1, ..., x_K, y_K and predicts y_k from the token x_k.
With h the residual stream,

    h_0 = W_E token + W_P[:, position]
    a_l = h_l + W_O softmax(q kᵀ / √c + causal mask) v        q, k, v = W_QKV LN(h_l), per head of width c = C/H
    o_l = a_l + W_down ReLU(W_up LN(a_l) + b_up) + b_down
    h_{l+1} = h_l + o_l  ("doubled", the default)   or   o_l  ("single")
    prediction_k = component 0 of W_U LN(h_L) + b_U at the token x_k

**The doubled residual.** The reference code adds a block's input once inside the block and once more outside it, so
that h_{l+1} = 2 h_l + attention + MLP and the embedding reaches the unembedding multiplied by 2^L. The paper's
numbers come from this model; it is therefore the default. `residual="single"` is the standard transformer.

Shapes: B batch, K examples, D task dimension, T = 2K tokens, C channels, F MLP width, H heads. All leading axes of xs
and ys are batch axes.
"""

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icl.streams import Stream
from icl.tasks import encode_tokens

Residual = Literal["doubled", "single"]
Parameters = Mapping[str, Tensor]
_Projection = Callable[[Tensor, int], Tensor]  # weight (O, C), stride -> LN(stream)[::stride] @ weight.T
_NORM_EPSILON = 1e-5


@dataclass(frozen=True)
class TransformerShape:
    """The sizes and switches that, with the parameters, define the model's function; the fields are those of
    `InContextRegressionTransformer`."""

    task_size: int
    max_examples: int
    embed_size: int
    mlp_size: int
    num_heads: int
    num_layers: int
    layer_norm: bool = True
    include_output: bool = True
    residual: Residual = "doubled"

    def __post_init__(self) -> None:
        for name in ("task_size", "max_examples", "embed_size", "mlp_size", "num_heads", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.embed_size % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide embed_size={self.embed_size}; choose a divisor of embed_size"
            )
        if self.residual not in ("doubled", "single"):
            raise ValueError(f"residual must be 'doubled' or 'single', got {self.residual!r}")

    @property
    def num_parameters(self) -> int:
        """Length P of the flat parameter vector."""
        return sum(math.prod(size) for _, size in parameter_layout(self).values())


@cache
def parameter_layout(shape: TransformerShape) -> Mapping[str, tuple[int, tuple[int, ...]]]:
    """Name -> (offset in the flat vector, size), in the order of `named_parameters()`; do not modify."""
    layout: dict[str, tuple[int, tuple[int, ...]]] = {}
    offset = 0
    for name, size in _parameter_sizes(shape).items():
        layout[name] = (offset, size)
        offset += math.prod(size)
    return layout


def _parameter_sizes(shape: TransformerShape) -> dict[str, tuple[int, ...]]:
    token, channels, hidden = shape.task_size + 1, shape.embed_size, shape.mlp_size

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)} if shape.layer_norm else {}

    sizes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (channels, token),
        "position_embedding.weight": (channels, 2 * shape.max_examples),
    }
    for layer in range(shape.num_layers):
        block = f"blocks.{layer}"
        sizes |= norm(f"{block}.attention_norm")
        sizes[f"{block}.attention.qkv.weight"] = (3 * channels, channels)
        if shape.include_output:
            sizes[f"{block}.attention.output.weight"] = (channels, channels)
        sizes |= norm(f"{block}.mlp_norm")
        sizes |= {
            f"{block}.mlp.up.weight": (hidden, channels),
            f"{block}.mlp.up.bias": (hidden,),
            f"{block}.mlp.down.weight": (channels, hidden),
            f"{block}.mlp.down.bias": (channels,),
        }
    return sizes | norm("final_norm") | {"unembedding.weight": (token, channels), "unembedding.bias": (token,)}


def flatten(parameters: Parameters) -> Tensor:
    """Concatenate parameters, in their order, to one vector (P,)."""
    return torch.cat([value.reshape(-1) for value in parameters.values()])


def unflatten(shape: TransformerShape, flat: Tensor) -> dict[str, Tensor]:
    """Named views of a flat vector (..., P), each of size (..., *size)."""
    return {
        name: flat[..., offset : offset + math.prod(size)].reshape(*flat.shape[:-1], *size)
        for name, (offset, size) in parameter_layout(shape).items()
    }


def initial_parameters(shape: TransformerShape, seed: int) -> dict[str, Tensor]:
    """PyTorch's default initialisation as a pure function of the seed.

    Weights and biases of linear maps ~ U(-1/√fan_in, 1/√fan_in); norm weights 1, norm biases 0.
    """
    stream = Stream(seed, "model")
    parameters: dict[str, Tensor] = {}
    for index, (name, size) in enumerate(_parameter_sizes(shape).items()):
        layer, kind = name.rsplit(".", 1)
        if layer.endswith("norm"):
            parameters[name] = torch.ones(size) if kind == "weight" else torch.zeros(size)
        else:
            fan_in = _parameter_sizes(shape)[f"{layer}.weight"][1]
            parameters[name] = (2 * stream.uniform(index, size) - 1) / math.sqrt(fan_in)
    return parameters


def predict(shape: TransformerShape, parameters: Parameters, xs: Tensor, ys: Tensor) -> Tensor:
    """Predictions (B, K, 1) for xs (B, K, D), ys (B, K, 1), as a pure function that `torch.func` can transform.

    Equal to the full computation to rounding, at less work: in the last block the queries, the MLP and the unembedding
    run on the x tokens alone; and where there is layer norm and D + 1 + T < C, the first block's queries, keys and values
    come from the few features that the embedding is linear in (`_projection_of_features`). The last y token, which no
    prediction reads, is set to zero but kept: at K = 8 rows of 16 scores fill vector registers, and softmax over 15 took
    ten times as long (docs/log.md).
    """
    _check_inputs(shape, xs, ys)
    tokens = encode_tokens(xs, torch.cat((ys[..., :-1, :], torch.zeros_like(ys[..., -1:, :])), dim=-2))
    stream = _embed(parameters, tokens)
    for layer in range(shape.num_layers):
        if layer == 0 and shape.layer_norm and sum(tokens.shape[-2:]) < shape.embed_size:
            project = _projection_of_features(parameters, tokens)
        else:
            project = _projection(shape, parameters, layer, stream)
        stride = 2 if layer == shape.num_layers - 1 else 1
        stream = _block(shape, parameters, layer, stream, project, stride)[-1]
    stream = _norm(shape, parameters, "final_norm", stream)
    weight, bias = parameters["unembedding.weight"], parameters["unembedding.bias"]
    return F.linear(stream, weight[:1], bias[:1])


def predict_with_activations(
    shape: TransformerShape, parameters: Parameters, xs: Tensor, ys: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute everything: predictions (B, K, 1) and every intermediate activation.

    Activations: "embedding" (B, T, C); per block l "blocks.l.input", "blocks.l.middle" (after attention),
    "blocks.l.output" (the stream after the block), each (B, T, C), and "blocks.l.attention.pattern" (B, H, T, T) of
    queries × keys; "tokens" (B, T, D+1), the outputs at all tokens. Those at y tokens are not trained: the next x
    cannot be predicted.
    """
    _check_inputs(shape, xs, ys)
    stream = _embed(parameters, encode_tokens(xs, ys))
    activations = {"embedding": stream}
    for layer in range(shape.num_layers):
        activations[f"blocks.{layer}.input"] = stream
        project = _projection(shape, parameters, layer, stream)
        pattern, middle, stream = _block(shape, parameters, layer, stream, project)
        activations[f"blocks.{layer}.attention.pattern"] = pattern
        activations[f"blocks.{layer}.middle"] = middle
        activations[f"blocks.{layer}.output"] = stream
    stream = _norm(shape, parameters, "final_norm", stream)
    tokens = F.linear(stream, parameters["unembedding.weight"], parameters["unembedding.bias"])
    activations["tokens"] = tokens
    return tokens[..., 0::2, :1], activations


def _check_inputs(shape: TransformerShape, xs: Tensor, ys: Tensor) -> None:
    *batch, examples, task_size = xs.shape
    if task_size != shape.task_size or not 1 <= examples <= shape.max_examples or ys.shape != (*batch, examples, 1):
        raise ValueError(
            f"expected xs (B, K, {shape.task_size}) and ys (B, K, 1) with 1 <= K <= {shape.max_examples}, "
            f"got xs {tuple(xs.shape)} and ys {tuple(ys.shape)}"
        )


def _embed(parameters: Parameters, tokens: Tensor) -> Tensor:
    positions = parameters["position_embedding.weight"][:, : tokens.shape[-2]].T
    return F.linear(tokens, parameters["token_embedding.weight"]) + positions


def _norm(shape: TransformerShape, parameters: Parameters, name: str, stream: Tensor) -> Tensor:
    if not shape.layer_norm:
        return stream
    return F.layer_norm(
        stream, (shape.embed_size,), parameters[f"{name}.weight"], parameters[f"{name}.bias"], _NORM_EPSILON
    )


def _projection(shape: TransformerShape, parameters: Parameters, layer: int, stream: Tensor) -> _Projection:
    normed = _norm(shape, parameters, f"blocks.{layer}.attention_norm", stream)
    return lambda weight, stride: F.linear(normed[..., ::stride, :], weight)


def _projection_of_features(parameters: Parameters, tokens: Tensor) -> _Projection:
    """The first block's projection, in D + 1 + T columns in place of C.

    The embedding is X = F Aᵀ, where a row of F is a token beside its position as a one-hot vector, and A = [W_E | W_P].
    With Ā = A less its mean over the channels, and w, b the gain and bias of the norm,

        LN(X) Wᵀ = r ⊙ F (W diag(w) Ā)ᵀ + (W b)ᵀ        1/r² = mean of squares of each row of F Āᵀ, + ε.
    """
    number = tokens.shape[-2]
    places = torch.eye(number, dtype=tokens.dtype, device=tokens.device).expand(*tokens.shape[:-1], number)
    features = torch.cat((tokens, places), dim=-1)
    positions = parameters["position_embedding.weight"][:, :number]
    embedding = torch.cat((parameters["token_embedding.weight"], positions), dim=-1)
    centred = embedding - embedding.mean(dim=0)
    gain, bias = (parameters[f"blocks.0.attention_norm.{name}"] for name in ("weight", "bias"))
    scale = (F.linear(features, centred).square().mean(dim=-1, keepdim=True) + _NORM_EPSILON).rsqrt()

    def project(weight: Tensor, stride: int) -> Tensor:
        rows = F.linear(features[..., ::stride, :], (weight * gain) @ centred)
        return torch.addcmul(weight @ bias, rows, scale[..., ::stride, :])

    return project


def _block(
    shape: TransformerShape, parameters: Parameters, layer: int, stream: Tensor, project: _Projection, stride: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention pattern, stream after attention and stream after the block, for every `stride`-th token as the
    query."""
    name = f"blocks.{layer}"
    pattern, attended = _attend(shape, parameters, name, project, stride)
    stream = stream[..., ::stride, :]
    middle = stream + attended
    hidden = _norm(shape, parameters, f"{name}.mlp_norm", middle)
    hidden = F.relu(F.linear(hidden, parameters[f"{name}.mlp.up.weight"], parameters[f"{name}.mlp.up.bias"]))
    out = middle + F.linear(hidden, parameters[f"{name}.mlp.down.weight"], parameters[f"{name}.mlp.down.bias"])
    return pattern, middle, stream + out if shape.residual == "doubled" else out


def _attend(
    shape: TransformerShape, parameters: Parameters, name: str, project: _Projection, stride: int
) -> tuple[Tensor, Tensor]:
    """Causal attention of the tokens ::stride to all tokens; the rows of the qkv weight are grouped per head as q, k,
    v."""
    heads, width = shape.num_heads, shape.embed_size // shape.num_heads
    weight = parameters[f"{name}.attention.qkv.weight"].reshape(heads, 3, width, shape.embed_size)
    # Three products, not one that is cut in three: joining the gradients of the cut costs more than it saves. And the
    # scale goes to the weight, the smallest of those that it could go to.
    to_queries, to_keys, to_values = (part.flatten(0, 1) for part in weight.unbind(1))
    queries, keys, values = (
        project(part, every).unflatten(-1, (heads, width)).transpose(-3, -2)
        for part, every in ((to_queries / math.sqrt(width), stride), (to_keys, 1), (to_values, 1))
    )
    each = queries.shape[:-2]
    scores = torch.baddbmm(_causal_mask(keys, stride), queries.flatten(0, -3), keys.flatten(0, -3).transpose(-2, -1))
    pattern = scores.softmax(dim=-1)
    attended = (pattern @ values.flatten(0, -3)).unflatten(0, each).transpose(-3, -2).flatten(-2)
    if shape.include_output:
        attended = F.linear(attended, parameters[f"{name}.attention.output.weight"])
    return pattern.unflatten(0, each), attended


def _causal_mask(keys: Tensor, stride: int) -> Tensor:
    """To be added to the scores of the queries ::stride: 0 for keys up to the query's own token, -inf beyond."""
    place = torch.arange(keys.shape[-2], device=keys.device)
    return keys.new_zeros(()).masked_fill(place[None, :] > place[::stride, None], float("-inf"))


class InContextRegressionTransformer(nn.Module):
    """The transformer with its parameters; see the module's docstring for the formula.

    Args:
        task_size: D, the dimension of inputs and tasks.
        max_examples: K, the longest sequence of (x, y) pairs; shorter ones are accepted.
        embed_size: C, the width of the residual stream.
        mlp_size: F, the width of the MLP's hidden layer.
        num_heads: H, a divisor of C.
        num_layers: L.
        layer_norm: pre-norm LayerNorm (ε = 1e-5, affine) before attention, MLP and unembedding; identities if False.
        include_output: the attention's output projection.
        residual: "doubled" as in the reference code, or "single", the standard transformer.
        seed: of the initialisation; None draws one from the system's entropy.

    Raises:
        ValueError: a size below 1, or heads that do not divide the width.
    """

    def __init__(
        self,
        task_size: int,
        max_examples: int,
        embed_size: int,
        mlp_size: int,
        num_heads: int,
        num_layers: int,
        layer_norm: bool = True,
        include_output: bool = True,
        residual: Residual = "doubled",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.shape = TransformerShape(
            task_size, max_examples, embed_size, mlp_size, num_heads, num_layers, layer_norm, include_output, residual
        )
        seed = secrets.randbits(63) if seed is None else seed
        for name, value in initial_parameters(self.shape, seed).items():
            _register(self, name, nn.Parameter(value))

    @classmethod
    def from_shape(cls, shape: TransformerShape, flat: Tensor | None = None, seed: int | None = None):
        """A module of the given shape, with the parameters of a flat vector (P,) if one is given."""
        model = cls(**asdict(shape), seed=seed if flat is None else 0)
        if flat is not None:
            model.load_state_dict(unflatten(shape, flat.detach()))
        return model

    @classmethod
    def from_weights(cls, shape: TransformerShape, weights: Mapping[str, Tensor]):
        """A module of the given shape with the given weights."""
        model = cls(**asdict(shape), seed=0)
        model.load_state_dict(dict(weights))
        return model

    @overload
    def forward(self, xs: Tensor, ys: Tensor) -> Tensor: ...
    @overload
    def forward(self, xs: Tensor, ys: Tensor, activations: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]: ...
    def forward(self, xs: Tensor, ys: Tensor, activations: Sequence[str] | None = None):
        """Predictions (B, K, 1) for xs (B, K, D) and ys (B, K, 1); y_k is not used by prediction k, only by later ones.

        With `activations`, also a dictionary of those named (see `predict_with_activations`).

        Raises:
            ValueError: shapes that do not fit the model, or an activation that does not exist.
        """
        parameters = dict(self.named_parameters())
        if activations is None:
            return predict(self.shape, parameters, xs, ys)
        predictions, cache = predict_with_activations(self.shape, parameters, xs, ys)
        unknown = [name for name in activations if name not in cache]
        if unknown:
            raise ValueError(f"no activation {unknown[0]!r}; there are: {', '.join(cache)}")
        return predictions, {name: cache[name] for name in activations}


def _register(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Add a parameter under a dotted name, creating the modules on the way."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(leaf, parameter)
