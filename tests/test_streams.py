"""Random streams: known answers, independence of what else is drawn, and the laws they claim."""

import math

import pytest
import torch

from icl.streams import Stream, keys_of, normals, threefry2x32


def signed(word: int) -> torch.Tensor:
    return torch.tensor(word - 2**32 if word >= 2**31 else word, dtype=torch.int32)


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_known_answers_of_random123(key, counter, expected):
    words = threefry2x32(*map(signed, key), *map(signed, counter))
    assert [int(word) & 0xFFFFFFFF for word in words] == list(expected)


def test_a_number_does_not_depend_on_how_many_are_drawn():
    stream = Stream(3, "test")
    assert torch.equal(stream.normal(7, (101,))[:13], stream.normal(7, (13,)))
    assert torch.equal(stream.integers(7, 11, (101,))[:13], stream.integers(7, 11, (13,)))


def test_batched_draws_have_the_same_bits_as_single_ones():
    streams = [Stream(seed, purpose) for seed in (0, 5) for purpose in ("a", "b")]
    steps = torch.tensor([0, 17, 500_000])
    together = normals(keys_of(streams), steps, 37)
    alone = torch.stack([torch.stack([s.normal(int(step), (37,)) for step in steps]) for s in streams])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("count", [8191, 8192, 8193, 65536, 65537, 200_003])
def test_many_numbers_made_piece_by_piece_have_the_same_bits(count):
    stream = Stream(3, "test")
    whole = normals(keys_of([stream]), torch.tensor([5]), count)[0, 0]
    assert torch.equal(stream.normal(5, (count,)), whole)
    rows = torch.full((2, count), torch.nan)
    stream.fill_normal(5, rows[1])
    assert torch.equal(rows[1], whole)
    assert bool(rows[0].isnan().all())


def test_seed_purpose_and_step_each_change_the_numbers():
    draws = [
        Stream(1, "a").normal(0, (11,)),
        Stream(2, "a").normal(0, (11,)),
        Stream(1, "b").normal(0, (11,)),
        Stream(1, "a").normal(1, (11,)),
        Stream(1, "a").child("b").normal(0, (11,)),
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_normals_have_the_moments_of_the_normal_law():
    x = Stream(11, "moments").normal(0, (1_000_003,)).double()
    n = len(x)
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - mean) < 4 * math.sqrt(variance / n)
    # Neighbours share a word pair: their correlation, plain and of squares, must vanish too.
    pairs = x[: n // 2 * 2].reshape(-1, 2)
    assert abs(float((pairs[:, 0] * pairs[:, 1]).mean())) < 4 / math.sqrt(n / 2)
    squares = pairs**2 - 1
    assert abs(float((squares[:, 0] * squares[:, 1]).mean())) < 4 * 2 / math.sqrt(n / 2)


def test_integers_are_uniform_and_in_range():
    draws = Stream(2, "integers").integers(0, 7, (70_001,))
    counts = torch.bincount(draws, minlength=7).double()
    expected = len(draws) / 7
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert len(counts) == 7
    assert chi_squared < 22.5  # 99.9 % quantile at 6 degrees of freedom


def test_the_global_random_state_is_neither_read_nor_written():
    before = torch.get_rng_state()
    Stream(0, "x").normal(0, (5,))
    Stream(0, "x").integers(0, 3, (5,))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("step", [-1, 2**32])
def test_a_step_out_of_range_is_refused(step):
    with pytest.raises(ValueError, match="step must lie"):
        Stream(0, "x").normal(step, (3,))


@pytest.mark.parametrize("count", [1, 7, 100])
def test_signs_are_minus_one_where_the_uniform_number_is_below_one_half(count):
    stream = Stream(3, "signs")
    assert torch.equal(stream.signs(4, count), torch.where(stream.uniform(4, (count,)) < 0.5, -1.0, 1.0))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("start", [0, 2, 70_000])
@pytest.mark.parametrize("count", [1, 9, 9000, 70_001])
def test_numbers_from_a_start_are_a_part_of_the_whole(start, count, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr("icl.native.random._library", lambda: None)
    stream = Stream(3, "parts")
    part = stream.fill_normal(4, torch.empty(count), start)
    assert torch.equal(part, stream.normal(4, (start + count,))[start:])
    assert torch.equal(stream.signs(4, count, start=start), stream.signs(4, start + count)[start:])
