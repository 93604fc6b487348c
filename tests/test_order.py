"""The order in which data are read, for any stops and ranks."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import conversation
from properties import few, given, settings, st

import order
import sft
from common import IGNORE, InputError
from data import TokenLoader
from distributed import Ranks
from order import batch_order, pack


def sequence(seed: int, batch: int, n: int, length: int) -> list[int]:
    """The first so many samples, asked for in batches."""
    steps = range(-(-length // batch))
    return np.concatenate([batch_order(seed, step, batch, n) for step in steps])[:length].tolist()


@few
@given(st.integers(0, 2**32), st.integers(1, 120), st.integers(1, 50), st.integers(1, 300))
def test_every_epoch_holds_each_window_once_however_batches_straddle_it(seed, n, batch, other):
    order = sequence(seed, batch, n, 3 * n)
    for epoch in range(3):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert order == sequence(seed, other, n, 3 * n)  # so it does not depend on how it is asked


def test_the_order_is_a_pure_function_of_seed_step_batch_and_size():
    asked = list(itertools.product((0, 1, 2**40), (0, 3, 10**9), (1, 5, 64), (1, 7, 1000, 10**10)))
    first = [batch_order(*a).tolist() for a in asked]
    np.random.seed(1)
    assert [batch_order(*a).tolist() for a in reversed(asked)] == first[::-1]


def test_the_order_equals_a_feistel_network_in_plain_integers():
    mask = 2**64 - 1

    def mix(x, key):
        x ^= key
        for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            x = (x ^ x >> 33) * multiplier & mask
        return x ^ x >> 33

    def at(seed, position, n):
        key, x = mix(position // n, mix(seed, 0)), position % n
        bits = next(b for b in itertools.count(1) if 4**b >= n)
        while True:
            left, right = divmod(x, 2**bits)
            for turn in range(6):
                left, right = right, left ^ mix(right, (key + turn * 0x9E3779B97F4A7C15) & mask) % 2**bits
            x = left * 2**bits + right
            if x < n:
                return x

    for seed, step, batch, n in ((0, 0, 8, 10), (7, 3, 32, 65), (2**33, 10**6, 16, 12_345_678), (1, 5, 9, 1)):
        expected = [at(seed, position, n) for position in range(step * batch, (step + 1) * batch)]
        assert batch_order(seed, step, batch, n).tolist() == expected


def test_other_seeds_and_other_epochs_give_other_orders():
    orders = [tuple(batch_order(seed, epoch, 40, 40)) for seed in range(20) for epoch in range(10)]
    assert len(set(orders)) == 200


@pytest.mark.parametrize("by_epoch", [False, True])
def test_all_orders_of_three_are_about_equally_likely(by_epoch):
    ask = (lambda i: batch_order(5, i, 3, 3)) if by_epoch else (lambda i: batch_order(i, 0, 3, 3))
    counts = Counter(tuple(ask(i)) for i in range(1200))
    assert len(counts) == 6 and all(140 < c < 260 for c in counts.values()), counts  # 200 expected, sd 13


def test_neighbours_in_a_large_data_set_land_far_apart():
    n = 10_000_019
    order = batch_order(3, 0, 4096, n)
    assert len(set(order.tolist())) == 4096
    assert abs(order.mean() / n - 0.5) < 0.03 and abs(np.diff(order)).mean() / n == pytest.approx(
        1 / 3, abs=0.03
    )


# Ways through a run: so many steps on so many ranks with this micro-batch, the last few of them lost.
STRETCHES = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.integers(0, 4)),
    min_size=1,
    max_size=8,
)


class Windows(TokenLoader):
    """A corpus without end: window i holds only the number i."""

    def __init__(self):
        pass

    def read(self, windows):
        ids = torch.tensor(np.array(windows, np.int64))[:, None].expand(-1, 4)
        return ids, ids


def steps_of(stretches, steps: int):
    """(step, ranks, micro-batch) of all steps that are taken until so many are done, lost ones included."""
    step = 0
    while step < steps:
        for length, world, size, lost in stretches:
            for done in range(step, min(step + length, steps)):
                yield done, world, size
            step += max(1, length - lost)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 150), st.integers(1, 40), st.integers(0, 2**32), STRETCHES)
def test_any_stops_and_changes_of_ranks_read_each_window_once_an_epoch(n, batch, seed, stretches):
    """By the script's own split over ranks and micro-batches; epochs end within a step."""
    epochs, read = 2, {}
    for step, world, size in steps_of(stretches, -(-epochs * n // batch)):
        windows = batch_order(seed, step, batch, n)
        parts = [
            int(i)
            for rank in range(world)
            for part in Windows().micro_batches(windows, size, Ranks(rank, world, torch.device("cpu")))
            for i in part["targets"][:, 0]
            if i != IGNORE  # a rank without a window gets padding
        ]
        assert sorted(parts) == sorted(windows)  # the ranks together: this step's windows, each once
        assert list(windows) == read.setdefault(step, list(windows))  # when it is taken again, too
    order = [window for step in sorted(read) for window in read[step]]
    for epoch in range(epochs):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("order")
    rows = ((conversation(i, turns=1 + i % 3)["messages"], f"row {i}") for i in range(60))
    sft.prepare_conversations(folder, rows, tokenizer, max_length=200, val_fraction=0.1)
    return sft.SFTDataset(folder / "train")


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**32), STRETCHES)
def test_any_stops_and_changes_of_ranks_read_each_conversation_once_an_epoch(dataset, batch, seed, stretches):
    epochs, read, loader = 2, {}, sft.PackedLoader(dataset, row_length=200, rows_per_step=batch, seed=seed)
    for step, world, size in steps_of(stretches, epochs * loader.steps_per_epoch):
        if step in read:  # a run that goes on has a loader of its own
            loader = sft.PackedLoader(dataset, row_length=200, rows_per_step=batch, seed=seed)
        rows, parts = loader.step_rows(step), []
        for rank in range(world):
            for part in loader.micro_batches(rows, size, Ranks(rank, world, torch.device("cpu"))):
                parts += part["input_ids"].flatten().tolist()
        padding = [0] * (200 * max(world, len(rows)) - sum(len(dataset[c][0]) for row in rows for c in row))
        assert sorted(parts) == sorted([int(i) for row in rows for c in row for i in dataset[c][0]] + padding)
        assert rows == read.setdefault(step, rows)
    for epoch in range(epochs):
        steps = range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch)
        assert sorted(c for step in steps for row in read[step] for c in row) == list(range(len(dataset)))


def test_finding_a_step_takes_the_same_work_at_any_position_of_any_corpus(monkeypatch):
    """Counted in hashes: a batch of 512 of 10^8 windows at step ten million costs what step zero costs, and
    not more than a few times what it costs among a thousand windows."""
    hashed = []
    original = order.mix
    monkeypatch.setattr(order, "mix", lambda x, key: hashed.append(len(x)) or original(x, key))
    work = {}
    for n in (1000, 10**8):
        for step in (0, 1, 10_000_000):
            hashed.clear()
            assert len(set(batch_order(3, step, 512, n))) > 500
            work[n, step] = sum(hashed)
    # six rounds; of the numbers that a Feistel network permutes at least a quarter are below n
    assert max(work.values()) < 512 * 6 * 4 * 1.5, work
    assert max(work.values()) < 4 * min(work.values()), work


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_the_keyed_shuffle_is_a_permutation(n, key):
    assert sorted(order.shuffled(np.arange(n), n, key)) == list(range(n))


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_the_packer_loses_nothing_repeats_nothing_and_overfills_nothing(data):
    capacity = data.draw(st.sampled_from([64, 200, 512, 2048]))
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=80)), np.int64)
    order = np.random.default_rng(0).permutation(len(lengths))
    rows = pack(lengths, capacity, order)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row and lengths[row].sum() <= capacity for row in rows)
    fills = sorted(lengths[row].sum() for row in rows)
    assert len(fills) < 2 or fills[0] + fills[1] > capacity  # no two rows would fit into one


def test_the_packer_refuses_what_no_row_can_hold():
    with pytest.raises(InputError, match="65 tokens does not fit into a row of 64"):
        pack(np.array([3, 65]), 64)
