"""Patterns of parameter names."""

import pytest

from icl.model import InContextRegressionTransformer, TransformerShape, parameter_layout
from icl.sampling.patterns import matches, matching, reference_name
from icl.sampling.restriction import restrict

SHAPE = TransformerShape(2, 3, 4, 5, 2, 2)
NAMES = list(parameter_layout(SHAPE))


def select(include, exclude=()):
    return list(restrict(InContextRegressionTransformer.from_shape(SHAPE, seed=0), include, exclude).masks)


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.b.c", False),
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", False),
        ("a.**", "a.b.c", True),
        ("**", "a.b.c", True),
        ("*.weight", "a.b.weight", False),
        ("**.weight", "a.b.weight", True),
        ("a.b", "aXb", False),
    ],
)
def test_matching(pattern, name, fits):
    assert matches(pattern, name) is fits


def test_exclude_wins_and_order_is_kept():
    chosen = select(["blocks.0.**", "unembedding.*"], ["**.bias"])
    assert chosen == [
        n for n in NAMES if (n.startswith("blocks.0.") or n.startswith("unembedding.")) and not n.endswith("bias")
    ]


def test_reference_names_select_the_same_parameters():
    expected = matching(NAMES, "blocks.*.mlp.**")
    assert matching(NAMES, "token_sequence_transformer.blocks.*.compute.**", reference=True) == expected
    assert matching(NAMES, "blocks.*.compute.**", reference=True) == expected
    assert reference_name("unembedding.bias") == "token_sequence_transformer.unembedding.1.bias"
    assert reference_name("unembedding.bias", layer_norm=False) == "token_sequence_transformer.unembedding.bias"


def test_every_group_of_the_published_restricted_runs_is_reached():
    groups = {
        "embeddings": ["token_embedding.weight", "position_embedding.weight"],
        "attention 0": ["blocks.0.attention.**"],
        "norms": ["blocks.*.*_norm.*"],
        "unembedding": ["final_norm.*", "unembedding.*"],
    }
    sizes = {group: len(select(patterns)) for group, patterns in groups.items()}
    assert sizes == {"embeddings": 2, "attention 0": 2, "norms": 8, "unembedding": 4}


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"blocks\.7.*matches no parameter"):
        select(["**"], ["blocks.7.**"])
    with pytest.raises(ValueError, match="leaves no parameter"):
        select(["**"], ["**"])
