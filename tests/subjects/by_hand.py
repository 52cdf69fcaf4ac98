"""Language models made by hand: a previous-token head and an induction head, or the same without one of them.

The stream has four parts: positions A (n_ctx), the token B (V), the previous token C (V), the answer D (V). Block 0, head 0 attends to the
previous token by position alone and writes it to C. Block 1, head 0 compares the present token with C, and so attends to the token after an
earlier occurrence; it writes that token to D, which the unembedding reads. Head 1 of each block does nothing.
"""

import torch

from icl.subjects.language import AttentionOnlyTransformer, LanguageShape, parameter_sizes

N_CTX, VOCABULARY = 23, 7
STRONG = 60.0


def made_by_hand(previous: bool = True, induction: bool = True, n_ctx: int = N_CTX, vocabulary: int = VOCABULARY):
    """The model; without `previous` its block 0 does nothing, without `induction` its block 1."""
    channels, width = n_ctx + 3 * vocabulary, max(n_ctx, vocabulary)
    shape = LanguageShape(2, channels, 2, width, n_ctx, vocabulary)
    weights = {name: torch.zeros(size) for name, size in parameter_sizes(shape).items()}
    place = slice(0, n_ctx)
    token, before, answer = (slice(n_ctx + i * vocabulary, n_ctx + (i + 1) * vocabulary) for i in range(3))
    identity, places = torch.eye(vocabulary), torch.eye(n_ctx)
    weights["embed.W_E"][:, token] = identity
    weights["pos_embed.W_pos"][:, place] = places
    for name in ("blocks.0.ln1.w", "blocks.1.ln1.w", "ln_final.w"):
        weights[name][:] = 1.0
        weights[name][place] = 0.0  # what the norm's mean puts there is no position
    if previous:
        attention = "blocks.0.attn."
        weights[attention + "W_Q"][0, place, :n_ctx] = STRONG * places
        weights[attention + "W_K"][0, place, :n_ctx] = places.roll(1, dims=1)  # key s looks like query s + 1
        weights[attention + "W_K"][0, n_ctx - 1] = 0.0
        weights[attention + "W_V"][0, token, :vocabulary] = identity
        weights[attention + "W_O"][0, :vocabulary, before] = identity
    if induction:
        attention = "blocks.1.attn."
        weights[attention + "W_Q"][0, token, :vocabulary] = STRONG * identity
        weights[attention + "W_K"][0, before, :vocabulary] = identity
        weights[attention + "W_V"][0, token, :vocabulary] = identity
        weights[attention + "W_O"][0, :vocabulary, answer] = 5 * identity
    weights["unembed.W_U"][answer] = 5 * identity
    return AttentionOnlyTransformer.from_weights(weights)
