"""Parameter-name patterns: which weights a restricted learning coefficient samples.

`*` matches within one dotted segment, `**` anything; a pattern must match the whole name. A parameter is sampled if an
include pattern matches and no exclude pattern does. For the library's transformer the reference code's names match too.
"""

import re
from collections.abc import Iterable, Sequence

_REFERENCE_SEGMENTS = (
    (r"^token_embedding\.", "token_sequence_transformer.token_embedding."),
    (r"^position_embedding\.", "token_sequence_transformer.postn_embedding."),
    (r"^blocks\.(\d+)\.attention\.qkv\.", r"token_sequence_transformer.blocks.\1.attention.attention."),
    (r"^blocks\.(\d+)\.attention\.output\.", r"token_sequence_transformer.blocks.\1.attention.output."),
    (r"^blocks\.(\d+)\.mlp\.up\.", r"token_sequence_transformer.blocks.\1.compute.0."),
    (r"^blocks\.(\d+)\.mlp\.down\.", r"token_sequence_transformer.blocks.\1.compute.2."),
    (r"^blocks\.(\d+)\.attention_norm\.", r"token_sequence_transformer.blocks.\1.layer_norms.0."),
    (r"^blocks\.(\d+)\.mlp_norm\.", r"token_sequence_transformer.blocks.\1.layer_norms.1."),
    (r"^final_norm\.", "token_sequence_transformer.unembedding.0."),
    (r"^unembedding\.", "token_sequence_transformer.unembedding.1."),
)


def matches(pattern: str, name: str) -> bool:
    """Whether the whole name fits the pattern."""
    pieces = re.split(r"(\*\*|\*)", pattern)
    expression = "".join({"**": ".*", "*": r"[^.]*"}.get(piece, re.escape(piece)) for piece in pieces)
    return re.fullmatch(expression, name) is not None


def reference_name(name: str, layer_norm: bool = True) -> str:
    """The reference code's name of one of our transformer's parameters; an unknown name is returned as it is.

    Without layer norm the reference code's unembedding is one linear map, not a pair.
    """
    for expression, replacement in _REFERENCE_SEGMENTS:
        if re.match(expression, name):
            if name.startswith("unembedding.") and not layer_norm:
                replacement = "token_sequence_transformer.unembedding."
            return re.sub(expression, replacement, name)
    return name


def everything_if_star(include: Sequence[str]) -> Sequence[str]:
    """The patterns. A lone `*`, which means everything in the reference code, becomes `**`."""
    return ("**",) if tuple(include) == ("*",) else include


def matching(names: Iterable[str], pattern: str, *, reference: bool = False) -> list[str]:
    """The names that one pattern fits, in their order.

    Args:
        reference: also match the reference code's names, with and without their common first segment.

    Raises:
        ValueError: it fits none. This is a typing error, which would otherwise leave parameters out unnoticed.
    """
    names = list(names)
    layer_norm = any("norm" in name for name in names)

    def aliases(name: str) -> list[str]:
        if not reference:
            return [name]
        other = reference_name(name, layer_norm)
        return [name, other, other.removeprefix("token_sequence_transformer.")]

    found = [name for name in names if any(matches(pattern, alias) for alias in aliases(name))]
    if not found:
        raise ValueError(f"the pattern {pattern!r} matches no parameter; the names are {', '.join(names)}")
    return found
