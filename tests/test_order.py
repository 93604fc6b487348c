"""The order in which data are read: each sample once an epoch, whatever stops and changes of ranks come."""

import time

import numpy as np
import pytest
import torch
from conftest import conversation
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import pretrain_gpt
import sft
from gpt import GPTConfig
from training import Ranks

# Ways through a run: so many steps on so many ranks with this micro-batch, the last few of them lost.
STRETCHES = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.integers(0, 4)),
    min_size=1,
    max_size=8,
)


class Windows:
    """A loader whose windows are told apart by their number."""

    def batch(self, windows, vocab_size):
        ids = torch.as_tensor(np.asarray(windows))[:, None]
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
        windows = data.batch_order(seed, step, batch, n)
        config = pretrain_gpt.Config(micro_batch_size=size)
        parts = [
            int(i)
            for rank in range(world)
            for part in pretrain_gpt.micro_batches(
                Windows(), windows, config, GPTConfig(vocab_size=64), Ranks(rank, world, torch.device("cpu"))
            )
            for i in part["input_ids"][:, 0]
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
    sft.prepare_conversations(folder, rows, tokenizer, 200, 0.1)
    return sft.SFTDataset(folder / "train")


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**32), STRETCHES)
def test_any_stops_and_changes_of_ranks_read_each_conversation_once_an_epoch(dataset, batch, seed, stretches):
    epochs, read, loader = 2, {}, sft.PackedLoader(dataset, 200, batch, seed)
    for step, world, size in steps_of(stretches, epochs * loader.steps_per_epoch):
        if step in read:  # a run that goes on has a loader of its own
            loader = sft.PackedLoader(dataset, 200, batch, seed)
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
    original = data.mix
    monkeypatch.setattr(data, "mix", lambda x, key: hashed.append(len(x)) or original(x, key))
    work = {}
    for n in (1000, 10**8):
        for step in (0, 1, 10_000_000):
            hashed.clear()
            assert len(set(data.batch_order(3, step, 512, n))) > 500
            work[n, step] = sum(hashed)
    # six rounds; of the numbers that a Feistel network permutes at least a quarter are below n
    assert max(work.values()) < 512 * 6 * 4 * 1.5, work
    assert max(work.values()) < 4 * min(work.values()), work


def test_finding_step_ten_million_of_a_huge_corpus_takes_milliseconds():
    times = []
    for trial in range(5):
        began = time.perf_counter()
        data.batch_order(trial, 10_000_000, 512, 10**8)
        times.append(time.perf_counter() - began)
    print(f"a step's 512 of 10^8 windows in {1000 * sorted(times)[2]:.2f} ms")
    assert min(times) < 1


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_the_keyed_shuffle_is_a_permutation(n, key):
    assert sorted(data.shuffled(np.arange(n), n, key)) == list(range(n))
