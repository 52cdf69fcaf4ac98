"""Data as people have them: loaders, streams, data sets, and batches of any structure, as functions of the step."""

import random
import resource
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

from icl.sampling import SamplerConfig, estimate_llc
from icl.sampling.loaders import SPOOL_BYTES, Spool
from icl.sampling.supply import Placed, evaluation_supply, num_samples, supply_of, two_batches

N = 23
DATA = TensorDataset(torch.arange(N), torch.arange(N).double() ** 2)


def taken(batches, steps: int, seed: int = 0, **options) -> list[list[int]]:
    source = supply_of(batches, False, seed, **options).source
    return [source(step)[0].tolist() for step in range(steps)]


def test_a_shuffling_loader_is_a_function_of_the_seed_and_leaves_every_global_state_alone():
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(DATA, batch_size=5, shuffle=True, generator=generator)
    before = torch.get_rng_state(), random.getstate(), generator.get_state()
    first = taken(loader, 9)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert torch.equal(before[2], generator.get_state())
    torch.rand(7)
    assert first == taken(DataLoader(DATA, batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(8)), 9)
    assert first != taken(loader, 9, seed=1)
    # Four full batches a pass; the last three samples of a pass are left out, others each time.
    passes = [[index for batch in first[start : start + 4] for index in batch] for start in (0, 4)]
    assert all(len(set(each)) == 20 for each in passes)
    assert set(passes[0]) != set(passes[1])


def test_any_step_may_be_asked_for_in_any_order():
    loader = DataLoader(DATA, batch_size=5, shuffle=True)
    in_order = taken(loader, 13)
    source = supply_of(loader, False, 0).source
    for step in (12, 3, 7, 0, 11, 4):
        assert source(step)[0].tolist() == in_order[step]


def test_all_samples_in_one_batch_are_one_batch_in_whatever_order():
    supply = supply_of(DataLoader(DATA, batch_size=N, shuffle=True), False, 0)
    assert supply.constant
    assert supply.source(3) is supply.source(0)
    assert not supply_of(DataLoader(DATA, batch_size=N - 1, shuffle=True), False, 0).constant


def test_worker_processes_change_nothing():
    plain = DataLoader(Noisy(), batch_size=5, shuffle=True)
    sources = [
        supply_of(each, False, 0).source
        for each in (plain, DataLoader(Noisy(), batch_size=5, shuffle=True, num_workers=1))
    ]
    for step in range(14):
        torch.testing.assert_close(sources[0](step), sources[1](step), rtol=0, atol=0)


class Noisy(Dataset):
    """Samples that are augmented at random."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return torch.tensor(float(index)) + torch.rand(()) + random.random()


def test_augmentation_is_a_function_of_seed_and_step():
    loader = DataLoader(Noisy(), batch_size=5, shuffle=True)
    source, again = supply_of(loader, False, 0).source, supply_of(loader, False, 0).source
    assert torch.equal(source(3), again(3))
    assert source(3) is source(3)


def test_batches_of_a_fixed_order_have_their_true_weight():
    supply = supply_of(DataLoader(DATA, batch_size=10), False, 0)
    counts = torch.zeros(N)
    for step in range(3000):
        chosen = supply.source(step)[0]
        counts[chosen] += 1.0 / len(chosen)
    assert supply.num_samples == N
    # Sizes 10, 10, 3: each sample is met as often as any other, to 5 standard errors of the three batches' counts.
    shares = counts / 3000 * N
    assert shares.min() > 0.8
    assert shares.max() < 1.2
    assert [num_samples(each) for each in supply.everything] == [10, 10, 3]
    assert {num_samples(each) for each in two_batches(supply, False, 0)} == {10, 3}


def test_nothing_is_made_before_it_is_asked_for():
    made = []

    class Counting(Dataset):
        def __len__(self):
            return 10**6

        def __getitem__(self, index):
            made.append(index)
            return torch.tensor(index)

    supply = supply_of(DataLoader(Counting(), batch_size=4), False, 0)
    supply.source(77)
    assert len(made) == 4
    assert supply.num_samples == 10**6


def test_a_data_set_is_shuffled_in_batches_of_the_configured_size():
    supply = supply_of(DATA, False, 0, batch_size=7)
    assert len(supply.source(0)[0]) == 7
    assert supply.num_samples == N
    first_pass = [index for step in range(3) for index in supply.source(step)[0].tolist()]
    assert len(set(first_pass)) == 21
    assert first_pass != sorted(first_pass)


def test_a_stream_that_ends_starts_again_and_an_empty_one_is_an_error():
    source = supply_of((torch.tensor([each]) for each in range(3)), False, 0).source
    assert [int(source(step)) for step in (0, 4, 1, 2, 5, 3, 0)] == [0, 1, 1, 2, 2, 0, 0]
    for empty in (iter(()), [], DataLoader(TensorDataset(torch.zeros(0, 2))), TensorDataset(torch.zeros(0, 2))):
        with pytest.raises(ValueError, match="batches is empty"):
            supply_of(empty, False, 0)


class Endless(IterableDataset):
    def __iter__(self):
        draw = torch.Generator().manual_seed(1)
        while True:
            yield torch.randn(1000, generator=draw)


def test_an_endless_loader_takes_constant_memory():
    source = supply_of(DataLoader(Endless(), batch_size=25), False, 0).source
    kept = source(5).clone()
    source(100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for step in range(100, 1500):  # 140 MB
        source(step)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 30, f"{grown} MB more"
    assert torch.equal(source(5), kept)


def test_a_stream_past_the_limit_is_met_again_and_this_is_said(caplog):
    spool = Spool((torch.full((1000,), float(each)) for each in range(100)), seed=0, limit=20_000)
    assert SPOOL_BYTES > 20_000
    values = [float(spool(step)[0]) for step in range(12)]
    period = len(spool)
    assert values == [float(step % period) for step in range(12)]
    assert f"the first {period} batches of the stream are used, again and again" in caplog.text


def test_a_sized_iterable_has_its_whole_as_data():
    class Sized:
        def __iter__(self):
            return iter([torch.zeros(4), torch.ones(2)])

        def __len__(self):
            return 2

    supply = supply_of(Sized(), False, 0)
    assert supply.num_samples == 6
    assert [len(each) for each in supply.everything] == [4, 2]


class Table:
    """As a Hugging Face data set behaves: rows and columns, with a format."""

    column_names, features = ["tokens"], {}

    def __init__(self, kind=None):
        self.format = {"type": kind}

    def with_format(self, kind):
        return Table(kind)

    def __len__(self):
        return N

    def __getitem__(self, chosen):
        rows = [[index, index + 1] for index in chosen]
        return {"tokens": torch.tensor(rows) if self.format["type"] == "torch" else rows}


def test_a_hugging_face_data_set_gives_batches_of_tensors():
    supply = supply_of(Table(), False, 0, batch_size=5)
    batch = supply.source(2)
    assert batch["tokens"].shape == (5, 2)
    assert supply.num_samples == N


Pair = namedtuple("Pair", ["inputs", "labels"])


@dataclass(frozen=True)
class Record:
    inputs: torch.Tensor
    note: str


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(3),
        Pair(torch.zeros(3), torch.ones(3)),
        {"inputs": torch.zeros(3), "note": "as it is", "more": [torch.zeros(2)]},
        Record(torch.zeros(3), "as it is"),
        (torch.zeros(3), None, 5),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_batches_of_any_structure_move_to_the_device(batch):
    assert Placed(torch.device("cpu"))(batch) is batch, "what is there stays the same object"
    moved = Placed(torch.device("meta"))(batch)
    assert type(moved) is type(batch)
    inputs = (
        moved
        if isinstance(moved, torch.Tensor)
        else moved["inputs"]
        if isinstance(moved, dict)
        else getattr(moved, "inputs", None)
    )
    inputs = moved[0] if inputs is None else inputs
    assert inputs.device.type == "meta"
    with pytest.raises(ValueError, match="a batch is on the device meta and cannot be moved"):
        Placed(torch.device("cpu"))(moved)


def test_evaluation_batches_may_be_a_loader():
    held = evaluation_supply(DataLoader(DATA, batch_size=10), 0, torch.device("cpu")).everything
    assert held is not None
    assert [num_samples(each) for each in held] == [10, 10, 3]
    with pytest.raises(ValueError, match="have no end"):
        evaluation_supply(iter(Endless()), 0, torch.device("cpu"))


def test_estimates_on_a_loader_are_repeatable_and_those_of_its_batches():
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 3, generator=draw)
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(2, 3, generator=draw))
    targets = model(inputs).detach()

    def loss(predict, batch):
        return (predict(batch[0]) - batch[1]).square().mean()

    config = SamplerConfig(num_chains=2, num_draws=29, epsilon=1e-3, nbeta=20.0, init_seed=0)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=16, shuffle=True)
    first = estimate_llc(model, loss, loader, config)
    torch.rand(3)
    assert torch.equal(first.loss_trace, estimate_llc(model, loss, loader, config).loss_trace)
    by_hand = estimate_llc(model, loss, supply_of(loader, False, 0).source, config)
    assert torch.equal(first.loss_trace, by_hand.loss_trace)


def test_reading_a_stream_leaves_the_callers_random_state_alone():
    class Stream(IterableDataset):
        def __iter__(self):
            return (torch.randn(3) for _ in range(8))

    torch.manual_seed(5)
    before = torch.get_rng_state()
    made = []
    for batches in (Stream(), DataLoader(Stream(), batch_size=2), DataLoader(Stream(), batch_size=2)):
        source = supply_of(batches, False, 3, batch_size=2).source
        made.append(torch.cat([source(step) for step in range(3)]))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(made[1], made[2])


def test_a_stream_draws_other_numbers_for_every_batch_and_leaves_its_loaders_generator_alone():
    class Drawing(IterableDataset):
        def __iter__(self):
            first = torch.randn(3)
            return (first if place == 0 else torch.randn(3) for place in range(4))

    own = torch.Generator().manual_seed(1)
    before = own.get_state()
    source = supply_of(DataLoader(Drawing(), batch_size=1, generator=own), False, 3).source
    assert len({tuple(source(step).flatten().tolist()) for step in range(4)}) == 4
    assert torch.equal(own.get_state(), before)


def test_the_epoch_of_a_sampler_stays():
    class ByEpoch(Sampler):
        epoch = 17

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter(torch.randperm(23, generator=torch.Generator().manual_seed(self.epoch)).tolist())

        def __len__(self):
            return 23

    sampler = ByEpoch()
    source = supply_of(DataLoader(DATA, batch_size=10, sampler=sampler), False, 0).source
    assert not torch.equal(source(0)[0], source(2)[0])
    assert sampler.epoch == 17


def test_n_is_known_where_all_tensors_say_the_same():
    rows, places = torch.randn(100, 3), torch.arange(3)
    assert supply_of([{"x": rows, "y": rows[:, 0], "scale": torch.tensor(2.0)}], False, 0).num_samples == 100
    for batch in ({"places": places, "x": rows}, {"x": rows, "places": places}):
        assert supply_of([batch], False, 0).num_samples is None

    class Samples:
        def __len__(self):
            return 100

        def __getitem__(self, place):
            return rows[place]

    assert supply_of(Samples(), False, 0).num_samples is None
