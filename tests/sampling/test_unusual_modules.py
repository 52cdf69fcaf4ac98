"""Modules as people have them: what can be sampled is, with the right gradient; what cannot is one line before any sampling."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from icl.sampling import SamplerConfig, estimate_llc
from icl.sampling.look import look_at
from icl.sampling.objective import ModuleObjective

INPUTS, TARGETS = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 7)[:, None]
BATCH = INPUTS, TARGETS


class Net(nn.Module):
    """Two layers; `between` is what happens to the hidden units."""

    def __init__(self, between=torch.tanh) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last, self.between = nn.Linear(3, 5), nn.Linear(5, 1), between

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.between(self.first(inputs)))


def loss_fn(predict, batch):
    return functional.mse_loss(predict(batch[0]).float(), batch[1])


def look(model: nn.Module, loss=loss_fn) -> ModuleObjective:
    objective = ModuleObjective(model, loss)
    look_at(objective, BATCH, BATCH)
    return objective


def clipped(hidden: Tensor) -> Tensor:
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: gradient.clamp(-1e-4, 1e-4))
    return hidden.tanh()


class Recomputed(Net):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(checkpoint(lambda x: torch.tanh(self.first(x)), inputs, use_reentrant=self.reentrant))


pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    "model",
    [
        Net(lambda hidden: hidden.tanh().detach()),
        Net(clipped),
        Net(lambda hidden: hidden + (hidden.sign() - hidden).detach()),
        Recomputed(reentrant=True),
    ],
    ids=["detached", "clipped", "straight-through", "reentrant checkpoint"],
)
def test_a_gradient_that_lacks_a_part_is_refused(model):
    with pytest.raises(ValueError, match=r"gradient is not that of the loss|does not reach the parameters"):
        look(model)


def test_activations_that_are_computed_again_are_those_of_the_chain():
    """Activation checkpointing reads the weights again in the backward pass; they are still the chain's then."""
    again = look(Recomputed(reentrant=False))
    once = ModuleObjective(Net(), loss_fn)
    far = once.anchor[None] + 0.3 * torch.randn(2, once.anchor.numel())
    for ours, theirs in zip(again.losses_and_gradients(far, BATCH), once.losses_and_gradients(far, BATCH), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("between", [torch.tanh, torch.relu, torch.abs, functional.hardswish, functional.gelu])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_right_gradients_with_kinks_and_dead_units_pass(between, scale):
    model = Net(between)
    with torch.no_grad():
        model.first.bias[0] = -100.0
        model.first.weight.mul_(scale)
    look(model)


def test_weights_that_the_loss_does_not_read_are_refused():
    model = Net()
    model.unused = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="does not reach the parameters unused"):
        look(model)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 1)).eval()


def overlapping() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    model[1].weight = nn.Parameter(model[0].weight.data.T)
    return model


def repeated() -> nn.Module:
    model = Net()
    model.first.weight = nn.Parameter(torch.randn(1, 3).expand(5, 3))
    return model


class Projecting(Net):
    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            self.first.weight.mul_(0.99)
        return super().forward(inputs)


class Looking(nn.Module):
    def __init__(self, **settings) -> None:
        super().__init__()
        self.rows, self.last = nn.Embedding(5, 3, **settings), nn.Linear(3, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.rows(inputs[:, 0].abs().long()))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (normed, "track_running_stats=True"),
        (overlapping, "share their memory"),
        (repeated, "repeats one number"),
        (lambda: Net().to("meta"), "load the weights first"),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1, device="meta")), "1.weight holds no numbers"),
        (lambda: nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1)), "run the model once"),
        (nn.Identity, "has no parameters"),
        (lambda: torch.jit.trace(Net(), INPUTS), "TorchScript"),
        (Projecting, "in place"),
        (lambda: Looking(sparse=True), "sparse=False"),
        (lambda: Looking(max_norm=0.5), "max_norm=None"),
    ],
)
def test_what_is_no_vector_of_independent_numbers_is_refused_with_a_remedy(make, said):
    with pytest.raises(ValueError, match=said) as caught:
        look(make())
    assert "\n" not in str(caught.value)


def test_a_loss_that_runs_the_module_itself_is_told_about_predict():
    model = Net()
    with pytest.raises(ValueError, match="through its argument `predict`"):
        look(model, lambda predict, batch: functional.mse_loss(model(batch[0]), batch[1]))


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, lambda model: torch.compile(model, backend="eager")],
    ids=["data parallel", "compiled"],
)
def test_wrappers_are_taken_off(wrap):
    expected, objective = look(Net()), look(wrap(Net()))
    assert torch.equal(objective.anchor, expected.anchor)
    assert torch.equal(objective.losses(objective.anchor[None], BATCH), expected.losses(expected.anchor[None], BATCH))


def test_half_precision_is_sampled_in_float32_and_runs_in_its_own_type():
    class Half(Net):
        def forward(self, inputs: Tensor) -> Tensor:
            assert self.first.weight.dtype == torch.bfloat16
            return super().forward(inputs.bfloat16())

    model = Half().bfloat16()
    config = SamplerConfig(
        num_chains=2, num_draws=40, num_burnin_steps=0, epsilon=1e-7, gamma=1e-6, nbeta=1.0, init_seed=0
    )
    result = estimate_llc(model, loss_fn, [BATCH], config)
    # Steps of 3e-4, far below what bfloat16 tells apart at weights of 0.3: the chain must move like the square root of time.
    expected = (config.num_draws * 1e-7 * sum(weight.numel() for weight in model.parameters())) ** 0.5
    assert result.distances[:, -1].numpy() == pytest.approx(expected, rel=0.5)


@pytest.mark.parametrize(
    "change",
    [
        torch.nn.utils.parametrizations.weight_norm,
        lambda layer: torch.nn.utils.parametrizations.spectral_norm(layer).eval(),
        torch.nn.utils.parametrizations.orthogonal,
    ],
    ids=["weight norm", "spectral norm", "orthogonal"],
)
def test_parametrised_weights_are_sampled_in_their_own_coordinates(change):
    model = Net()
    change(model.first)
    look(model.eval())


class Twice(nn.Module):
    """A layer that is used twice under two names, and a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one = nn.Linear(3, 3)
        self.other, self.rows, self.last = self.one, nn.Linear(3, 3, bias=False), nn.Linear(3, 1)
        self.columns = nn.Linear(3, 3, bias=False)
        self.columns.weight = self.rows.weight
        self.one.register_buffer("scale", torch.ones(3))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.other(torch.tanh(self.one(inputs) * self.one.scale)))
        return self.last(self.columns(self.rows(hidden)))


def test_a_module_that_is_used_twice_is_as_it_was_and_its_chains_are_right():
    model = Twice()
    before = {name: (id(value), value.detach().clone()) for name, value in model.state_dict(keep_vars=True).items()}
    objective = look(model)
    for _ in range(2):
        moved = objective.anchor + 0.1
        ours = objective.losses(moved[None], BATCH)
        after = model.state_dict(keep_vars=True)
        assert {name: id(value) for name, value in after.items()} == {
            name: place for name, (place, _) in before.items()
        }
        assert all(torch.equal(value, before[name][1]) for name, value in after.items())
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1
    torch.testing.assert_close(ours.squeeze(), loss_fn(model, BATCH).detach())


def views(*slices: slice) -> nn.Module:
    numbers, model = torch.randn(9), nn.Linear(3, 1)
    model.extra = nn.ParameterList([nn.Parameter(numbers[each]) for each in slices])
    return model


def test_views_that_overlap_are_refused_and_those_that_interleave_are_not():
    with pytest.raises(ValueError, match="share their memory"):
        ModuleObjective(views(slice(0, 3), slice(2, 5)), loss_fn)
    with pytest.raises(ValueError, match="share their memory"):
        ModuleObjective(views(slice(0, 9, 2), slice(4, 5)), loss_fn)
    with pytest.raises(ValueError, match="share their memory"):
        ModuleObjective(views(slice(0, 9, 2), slice(1, 2), slice(2, 3)), loss_fn)
    ModuleObjective(views(slice(0, 9, 2), slice(1, 9, 2)), loss_fn)
    ModuleObjective(views(slice(0, 3), slice(3, 9)), loss_fn)


@pytest.mark.parametrize("size", [2, 3, 6, 7])
@pytest.mark.parametrize("extra", [(), (torch.tensor(1.0),)], ids=["", "with a scalar"])
def test_a_summed_loss_is_refused_whatever_the_batch(size, extra):
    def summed(predict, batch):
        return functional.mse_loss(predict(batch[0]), batch[1], reduction="sum")

    batch = (INPUTS[:size], TARGETS[:size], *extra)
    with pytest.raises(ValueError, match="sums over the samples"):
        look_at(ModuleObjective(Net(), summed), batch)
    look_at(ModuleObjective(Net(), loss_fn), batch)


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_a_mean_over_the_samples_that_count_is_no_sum(size):
    counted = torch.zeros(size, 1)
    counted[-1] = 1.0

    def masked(predict, batch):
        errors = (predict(batch[0]) - batch[1]).square()
        return (errors * batch[2]).sum() / batch[2].sum().clamp(min=1)

    for mask in (counted, counted.flip(0)):
        look_at(ModuleObjective(Net(), masked), (INPUTS[:size], TARGETS[:size], mask))


def test_missing_labels_may_be_nan():
    labels = TARGETS.clone()
    labels[2] = torch.nan

    def present(predict, batch):
        known = ~batch[1].isnan()
        return functional.mse_loss(torch.where(known, predict(batch[0]), 0.0), batch[1].nan_to_num())

    look_at(ModuleObjective(Net(), present), (INPUTS, labels))
