"""Which coordinates move: patterns, parts, heads, masks."""

import numpy as np
import pytest
import torch
from torch import nn

from icl.evals import mse_loss
from icl.model import InContextRegressionTransformer
from icl.sampling import SamplerConfig, estimate_llc, restrict
from icl.streams import Stream
from icl.subjects.language import AttentionOnlyTransformer

SHORT = SamplerConfig(num_chains=3, num_draws=8, epsilon=1e-3, gamma=1.0, nbeta=10.0, init_seed=7)
H, W = 2, 6
BATCH = Stream(0, "test/xs").normal(0, (11, 3, 2)), Stream(0, "test/ys").normal(0, (11, 3, 1))


def transformer() -> InContextRegressionTransformer:
    return InContextRegressionTransformer(
        task_size=2, max_examples=3, embed_size=H * W, mlp_size=5, num_heads=H, num_layers=2
    )


def other_loss(predict, batch):
    """The training loss in the user's own words, so that the fast path is not taken."""
    return (predict(*batch) - batch[1]).square().mean(dim=(0, 2))


def moved(result, restriction, model) -> dict[str, torch.Tensor]:
    """Name -> which coordinates of the parameter differ from w* in any chain, from the positions of the result."""
    found, start = {}, 0
    parameters = dict(model.named_parameters())
    for name, mask in restriction.masks.items():
        count = int(mask.sum())
        away = result.run.positions[:, start : start + count] != parameters[name].detach()[mask]
        found[name] = mask.clone()
        found[name][mask] = away.any(dim=0)
        start += count
    assert start == result.run.positions.shape[1]
    return found


@pytest.mark.parametrize("loss", [mse_loss, other_loss])
def test_only_the_named_coordinates_move_and_the_rest_is_what_it_was(loss):
    model = transformer()
    include = ("l1h1", "blocks.0.mlp.up.weight[1:3]", "unembedding.weight[:, 2]")
    restriction = restrict(model, include)
    config = SHORT.model_copy(update={"include": include, "eval_metrics": ("weights",)})
    before = {name: value.detach().clone() for name, value in model.named_parameters()}

    seen = []

    def loss_fn(predict, batch):
        return loss(predict, batch)

    result = estimate_llc(
        model, loss if loss is mse_loss else loss_fn, [BATCH], config, recorders=[lambda *draw: seen.append(draw)]
    )
    assert result.run.positions.shape[1] == restriction.num_moving == 3 * W * H * W + H * W * W + 2 * H * W + 3
    for name, mask in moved(result, restriction, model).items():
        assert torch.equal(mask, restriction.masks[name])
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    # The loss at a draw is that of the model with those coordinates put in place.
    position = result.run.positions[1]
    placed, start = {name: value.clone() for name, value in before.items()}, 0
    for name, mask in restriction.masks.items():
        placed[name][mask] = position[start : start + int(mask.sum())]
        start += int(mask.sum())
    outside = [placed[name][~restriction.masks[name]] for name in restriction.masks]
    assert all(
        torch.equal(rest, before[name][~restriction.masks[name]])
        for rest, name in zip(outside, restriction.masks, strict=True)
    )


def test_the_fast_path_and_the_general_one_agree_under_a_restriction():
    model, config = (
        transformer(),
        SHORT.model_copy(update={"include": ("l0h1", "l*h0"), "exclude": ("**.output.weight[0:4]",)}),
    )
    fast, general = (estimate_llc(model, loss, [BATCH], config) for loss in (mse_loss, other_loss))
    torch.testing.assert_close(fast.loss_trace, general.loss_trace, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [mse_loss, other_loss])
def test_a_mask_of_everything_is_no_restriction(loss):
    model = transformer()
    plain = estimate_llc(model, loss, [BATCH], SHORT)
    everything = {name: torch.tensor(True) for name, _ in model.named_parameters()}
    masked = estimate_llc(model, loss, [BATCH], SHORT, mask=everything)
    heads = [f"l{layer}h{head}" for layer in range(2) for head in range(H)]
    rest = [
        name
        for name, _ in model.named_parameters()
        if "attention.qkv" not in name and "attention.output.weight" not in name
    ]
    named = estimate_llc(model, loss, [BATCH], SHORT.model_copy(update={"include": (*heads, *rest)}))
    for each in (masked, named):
        assert torch.equal(each.loss_trace, plain.loss_trace)
        assert torch.equal(each.run.positions, plain.run.positions)


def test_the_heads_of_the_librarys_transformer_are_those_of_its_attention():
    # Without one head's values and output the model is as if that head were silent, and no other head is touched.
    model = transformer()
    heads = [restrict(model, [f"l1h{head}"]).masks for head in range(H)]
    for name in heads[0]:
        assert bool((heads[0][name] ^ heads[1][name]).all()), f"the heads share or leave out part of {name}"
    state = model.state_dict()
    name = "blocks.1.attention.output.weight"
    silent = {**state, name: torch.where(heads[0][name], 0.0, state[name])}
    quiet = {key: torch.where(heads[0][key], 0.0, value) if key in heads[0] else value for key, value in state.items()}
    first, second = transformer(), transformer()
    first.load_state_dict(silent)
    second.load_state_dict(quiet)
    torch.testing.assert_close(first(*BATCH), second(*BATCH))
    assert not torch.allclose(first(*BATCH), model(*BATCH))


def test_heads_of_transformerlens_names_and_of_multihead_attention():
    lens = AttentionOnlyTransformer(n_layers=2, d_model=6, n_heads=3, d_head=2, n_ctx=5, d_vocab=7)
    masks = restrict(lens, ["l1h2"]).masks
    assert set(masks) == {f"blocks.1.attn.{what}" for what in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V")}
    assert all(bool(mask[2].all()) and not bool(mask[:2].any()) for mask in masks.values())

    encoder = nn.TransformerEncoderLayer(d_model=6, nhead=3, dim_feedforward=4, batch_first=True)
    masks = restrict(encoder, ["l0h1"]).masks
    rows = torch.zeros(3, 3, 2, dtype=torch.bool)
    rows[:, 1] = True
    assert torch.equal(masks["self_attn.in_proj_weight"], rows.reshape(-1, 1).expand(-1, 6))
    assert torch.equal(masks["self_attn.in_proj_bias"], rows.reshape(-1))
    assert torch.equal(masks["self_attn.out_proj.weight"], rows[0].reshape(1, -1).expand(6, -1))
    assert len(masks) == 3

    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(6, 3, kdim=4, vdim=5)

    apart = restrict(Apart(), ["l0h1"]).masks
    for name, width in {"q": 6, "k": 4, "v": 5}.items():
        assert torch.equal(apart[f"attn.{name}_proj_weight"], rows[0].reshape(-1, 1).expand(-1, width))
    assert torch.equal(apart["attn.in_proj_bias"], rows.reshape(-1))
    assert set(apart) == {
        f"attn.{name}"
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "out_proj.weight")
    }


def test_frozen_parameters_do_not_move():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    assert restrict(model).num_moving == 5
    with pytest.raises(ValueError, match="every selected parameter is frozen"):
        restrict(model, ["0.*"])


def hugging_face(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 6, "vocab_size": 11}
    match kind:
        case "gpt2":
            return transformers.GPT2LMHeadModel(
                transformers.GPT2Config(n_embd=12, n_layer=2, n_head=6, vocab_size=11, n_positions=7)
            )
        case "gpt_neox":
            return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, intermediate_size=5))
        case "llama":
            config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, intermediate_size=5)
            return transformers.LlamaForCausalLM(config)
        case "falcon":
            config = transformers.FalconConfig(**sizes, num_kv_heads=2, new_decoder_architecture=True)
            return transformers.FalconForCausalLM(config)
        case "qwen2":
            config = transformers.Qwen2Config(**sizes, num_key_value_heads=3, intermediate_size=5)
            return transformers.Qwen2ForCausalLM(config)
        case "opt":
            config = transformers.OPTConfig(**sizes, ffn_dim=5, word_embed_proj_dim=12)
            return transformers.OPTForCausalLM(config)
        case "bert":
            return transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=5))
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "falcon", "qwen2", "opt", "bert"])
def test_heads_of_hugging_face_models_do_what_heads_do(kind):
    # A head whose columns of the output are 0 is silent: its queries, keys and values then decide nothing, and all others still do.
    model = hugging_face(kind).eval()
    tokens = torch.arange(5)[None] % 11
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)

    def output():
        with torch.no_grad():
            return model(tokens)[0].clone()

    count, group = 6, {"llama": 3, "falcon": 3, "qwen2": 2}.get(kind, 1)
    masks = restrict(model, ["l1h4"]).masks
    parameters = dict(model.named_parameters())
    out = next(
        name
        for name in masks
        if parameters[name].ndim == 2
        and name.endswith(("dense.weight", "c_proj.weight", "o_proj.weight", "out_proj.weight"))
    )
    assert sum(int(mask.sum()) for mask in masks.values() if mask.ndim == 2) == 4 * 12 * 2
    shared = restrict(model, [f"l1g{4 // group}"]).masks
    assert int(shared[out].sum()) == group * int(masks[out].sum())
    assert all(bool((shared[name] | ~mask).all()) for name, mask in masks.items())
    whole = output()
    kept = {name: value.detach().clone() for name, value in parameters.items()}
    with torch.no_grad():
        for name, mask in shared.items():
            if name == out:
                parameters[name][mask] = 0.0
        silent = output()
        for name, mask in shared.items():
            parameters[name][mask] = 0.0
        assert torch.allclose(silent, output(), atol=1e-6), "the group's queries, keys and values are read elsewhere"
        assert not torch.allclose(whole, silent)
        for name, mask in shared.items():
            if name != out:
                parameters[name].copy_(torch.where(mask, kept[name], 0.0 * kept[name]))
        parameters[out].copy_(kept[out])
        lone = output()
        parameters[out][~shared[out]] = 0.0
        assert torch.allclose(lone, output(), atol=1e-5) or kind == "bert", (
            "another head's values are among the group's"
        )
    assert count == len({head for head in range(6) for _ in [restrict(model, [f"l0h{head}"])]})


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama"])
def test_heads_are_those_of_devinterp(kind):
    theirs = pytest.importorskip("devinterp.slt.weight_restrictions")
    model = hugging_face(kind)
    for word in ("l0h3", "l1g1"):
        ours, other = restrict(model, [word]).masks, theirs.create_param_masks(model, word)
        assert set(ours) == {name for name, mask in other.items() if bool(mask.any())}
        for name, mask in ours.items():
            assert torch.equal(mask, other[name]), name


def test_the_preview_says_which_and_how_many():
    text = str(restrict(transformer(), ["l0h1", "final_norm.weight"]))
    assert "blocks.0.attention.qkv.weight" in text
    assert f"{3 * W * H * W:,} of" in text
    assert "50%  [18:36]" in text
    assert "50%  [:, 6:12]" in text
    assert text.splitlines()[-1].startswith("moving")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"include": ["l2h0"]}, "2 layers"),
        ({"include": ["l0h2"]}, "2 heads, numbered from 0"),
        ({"include": ["blocks.0.mlp.up.weight[9]"]}, r"outside a parameter of shape \(5, 12\)"),
        ({"include": ["blocks.0.mlp.up.weight[x]"]}, r"write name\[3\]"),
        ({"include": ["blocks.0.mlp.upp.weight[0]"]}, "matches no parameter"),
        ({"mask": {"nothing": torch.tensor(True)}}, "no parameter"),
        ({"mask": {"final_norm.weight": torch.ones(12)}}, "must be boolean"),
        ({"mask": {"final_norm.weight": torch.ones(5, dtype=torch.bool)}}, r"shape \(5,\), the parameter has \(12,\)"),
        ({"mask": {"final_norm.weight": torch.zeros(12, dtype=torch.bool)}}, "leaves no parameter"),
        ({"include": ["l0h0"], "exclude": ["l0h*"]}, "leaves no parameter"),
    ],
)
def test_a_wrong_restriction_is_one_line_that_says_what_to_do(given, words):
    with pytest.raises(ValueError, match=words) as error:
        restrict(transformer(), **given)
    assert "\n" not in str(error.value)


def test_a_model_without_heads_or_without_their_number_says_so():
    with pytest.raises(ValueError, match="none are found"):
        restrict(nn.Linear(3, 2), ["l0h0"])

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})

    with pytest.raises(ValueError, match="the number of heads of"):
        restrict(Bare(), ["l0h0"])


def test_a_mask_of_numpy_and_a_part_of_a_module():
    model = nn.Linear(5, 1, bias=False)
    mask = {"weight": np.array([True, False, True, False, False])}
    inputs = Stream(0, "test/x").normal(0, (17, 5))
    result = estimate_llc(model, lambda predict, xs: predict(xs).square().mean(), [inputs], SHORT, mask=mask)
    assert result.run.positions.shape[1] == 2
