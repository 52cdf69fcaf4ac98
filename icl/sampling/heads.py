"""Masks of single attention heads in a model's weights, by layer and head.

A head consists of its queries, keys and values with their biases, and of the columns of the output projection that read it. If several
heads share keys and values (grouped-query attention), a group consists of these heads with the shared keys and values. The mask of one
head of a group includes the shared keys and values. The bias of the output belongs to no head.

The layout is recognised by the names of parameters: those of the library's own transformers, TransformerLens, `nn.MultiheadAttention`, and
the common models of Hugging Face, with separate or fused projections (GPT-2, GPT-NeoX, BLOOM, Falcon, OPT, GPT-J, BERT, ViT, Llama,
Mistral, Qwen, Gemma, Phi).

Shapes: H heads, G groups of heads that share keys and values, W width of a head.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HEAD = re.compile(r"l(?P<layer>\d+|\*)(?P<kind>[hg])(?P<head>\d+|\*)", re.IGNORECASE)
"""`l0h1`: head 1 of layer 0; `l0g1`: group 1 of heads; `*` for any."""

_ATTENTION = re.compile(
    r"(?P<before>.*?)(?P<place>(?:^|\.)(?:attn|attention|self_attn|self_attention|crossattention|SelfAttention|mixer))(?P<rest>[._].*)"
)
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_QUERIES = re.compile(r"(?:^|[._])(?:q_proj|query|q_lin|W_q|wq|q)[._](?:weight|bias)$")
_KEYS = re.compile(r"(?:^|[._])(?:k_proj|v_proj|key|value|k_lin|v_lin|wk|wv|k|v)[._](?:weight|bias)$")
_FUSED = re.compile(r"(?:^|[._])(?:c_attn|qkv_proj|Wqkv|qkv|query_key_value|in_proj)[._](?:weight|bias)$")
_OUTPUT = re.compile(r"(?:^|[._])(?:o_proj|out_proj|c_proj|dense|out_lin|output|wo|o|output\.dense|to_out)\.weight$")
_LENS = re.compile(r"\._?(?P<what>[Wb])_(?P<which>[QKVO])$")


@dataclass(frozen=True)
class HeadSizes:
    """How many heads a layer has, and how many groups share keys and values."""

    heads: int
    groups: int


def head_masks(model: nn.Module, pattern: str) -> dict[str, Tensor]:
    """Parameter name -> boolean mask of the heads that match the pattern (`HEAD`).

    Raises:
        ValueError: no heads are found in this model, or the layer or the head does not exist.
    """
    match = HEAD.fullmatch(pattern)
    assert match is not None
    layers = _attention_of(model)
    if not layers:
        raise ValueError(
            f"{pattern!r} names an attention head, but none are found in the names of this model's parameters; give rows as "
            "name[start:stop], or a mask"
        )
    if match["layer"] != "*" and int(match["layer"]) >= len(layers):
        raise ValueError(f"{pattern!r}: the model has {len(layers)} layers with attention, numbered from 0")
    chosen = range(len(layers)) if match["layer"] == "*" else [int(match["layer"])]
    masks: dict[str, Tensor] = {}
    for layer in chosen:
        parameters = layers[layer]
        sizes = _sizes_of(model, next(iter(parameters)), pattern)
        count = sizes.heads if match["kind"].lower() == "h" else sizes.groups
        if match["head"] != "*" and int(match["head"]) >= count:
            what = "heads" if match["kind"].lower() == "h" else "groups of heads"
            raise ValueError(f"{pattern!r}: layer {layer} has {count} {what}, numbered from 0")
        wanted = range(count) if match["head"] == "*" else [int(match["head"])]
        each = sizes.heads // sizes.groups
        heads = torch.zeros(sizes.heads, dtype=torch.bool)
        for one in wanted:
            heads[one if match["kind"].lower() == "h" else slice(one * each, (one + 1) * each)] = True
        groups = heads.view(sizes.groups, each).any(dim=1)
        for name, value in parameters.items():
            mask = _mask_of(model, name, value, heads, groups)
            if mask is not None:
                masks[name] = mask
    return masks


def _attention_of(model: nn.Module) -> list[dict[str, Tensor]]:
    """The attention parameters of each layer that has heads, in order."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in model.named_parameters():
        match = _ATTENTION.match(name)
        if match and _is_of_heads(match["rest"]):
            found.setdefault(match["before"] + match["place"], {})[name] = value
    if not found:  # `nn.MultiheadAttention` under any name
        for place, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                prefix = f"{place}." if place else ""
                found[place] = {
                    prefix + name: value for name, value in module.named_parameters() if _is_of_heads(f".{name}")
                }
    return [found[place] for place in sorted(found, key=_order)]


def _order(place: str) -> tuple[list[int], str]:
    return [int(number) for number in _NUMBER.findall(place)], place


def _is_of_heads(rest: str) -> bool:
    return any(pattern.search(rest) for pattern in (_QUERIES, _KEYS, _FUSED, _OUTPUT, _LENS))


def _mask_of(model: nn.Module, name: str, value: Tensor, heads: Tensor, groups: Tensor) -> Tensor | None:
    """The mask of one parameter, for heads (H,) and groups (G,); None if it belongs to no head."""
    lens = _LENS.search(name)
    if lens:
        if lens["which"] == "O" and lens["what"] == "b":
            return None
        chosen = heads if len(value) == len(heads) else groups
        return chosen.view(-1, *[1] * (value.ndim - 1)).expand(value.shape).clone()
    owner = model.get_submodule(name.rpartition(".")[0])
    transposed = type(owner).__name__ == "Conv1D"  # inputs × outputs, as in GPT-2
    outputs, inputs = (value.ndim - 1, 0) if transposed else (0, value.ndim - 1)
    if _FUSED.search(name):
        return _along(value, outputs, _fused(model, name, value.shape[outputs], heads, groups))
    if _QUERIES.search(name):
        return _along(value, outputs, _each(heads, value.shape[outputs]))
    if _KEYS.search(name):
        return _along(value, outputs, _each(groups, value.shape[outputs]))
    if _OUTPUT.search(name):
        return _along(value, inputs, _each(heads, value.shape[inputs]))
    return None


def _fused(model: nn.Module, name: str, size: int, heads: Tensor, groups: Tensor) -> Tensor:
    """The mask (size,) of the outputs of a fused projection to queries, keys and values."""
    count, shared = len(heads), len(groups)
    width = size // (count + 2 * shared)
    by_head = "query_key_value" in name or name.endswith(("attention.qkv.weight", "attention.qkv.bias"))
    config = getattr(model, "config", None)
    if getattr(config, "model_type", "") == "falcon" and not getattr(config, "new_decoder_architecture", False):
        by_head = not getattr(config, "multi_query", False)
    if by_head:  # group by group: its queries, then its keys and its values
        each = torch.cat([heads.view(shared, -1), groups[:, None].expand(-1, 2)], dim=1)
        return each.reshape(-1).repeat_interleave(width)
    return torch.cat([heads, groups, groups]).repeat_interleave(width)


def _each(chosen: Tensor, size: int) -> Tensor:
    return chosen.repeat_interleave(size // len(chosen))


def _along(value: Tensor, dim: int, mask: Tensor) -> Tensor:
    """A mask of one dimension, expanded to the whole parameter."""
    shape = [1] * value.ndim
    shape[dim] = -1
    return mask.view(shape).expand(value.shape).clone()


def _sizes_of(model: nn.Module, name: str, pattern: str) -> HeadSizes:
    """H and G of the attention to which a parameter belongs, from the model's configuration or from the modules around it."""
    for source in _sources(model, name):
        heads = _first(source, ("num_attention_heads", "n_heads", "num_heads", "n_head"))
        if heads is None:
            continue
        if getattr(source, "model_type", "") == "falcon" and not getattr(source, "new_decoder_architecture", False):
            return HeadSizes(heads, 1 if getattr(source, "multi_query", False) else heads)
        groups = _first(source, ("num_key_value_heads", "n_key_value_heads", "num_kv_heads")) or heads
        return HeadSizes(heads, groups)
    raise ValueError(
        f"{pattern!r} names an attention head, but the number of heads of {name} is not known (no num_heads, n_heads or config); give rows "
        "as name[start:stop], or a mask"
    )


def _sources(model: nn.Module, name: str) -> Iterator[Any]:
    """The objects that may have the number of heads. Configurations come first, because modules have other numbers too."""
    for holder in ("config", "cfg"):
        config = getattr(model, holder, None)
        if config is not None:
            yield getattr(config, "text_config", config)
    path = name.split(".")[:-1]
    for length in range(len(path), -1, -1):
        module = model.get_submodule(".".join(path[:length]))
        for holder in ("config", "cfg", "shape"):
            if getattr(module, holder, None) is not None and not isinstance(getattr(module, holder), Mapping):
                yield getattr(module, holder)
        yield module


def _first(source: Any, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(source, name, None), int)), None)
