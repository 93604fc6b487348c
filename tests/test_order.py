"""The order in which data are read, for any stops and ranks."""

import dataclasses
import itertools
import json
import math
import os
import shutil
import struct
import tracemalloc
from collections import Counter

import numpy as np
import planted
import pytest
import torch
from conftest import (
    SMALL,
    assert_recovered,
    flags,
    losses,
    pretrain_config,
    refused,
    run,
    text,
    weights,
    write_jsonl,
)
from properties import few, given, settings, st

import order
import prepare_data
import pretrain_gpt
from common import IGNORE, InputError, read_records
from data import TokenLoader, verified_manifests
from distributed import Ranks
from order import (
    CYCLE,
    batch_order,
    mean_length,
    mixed_order,
    parse_sources,
    rounded_shares,
    validation_numbers,
    window_pieces,
)
from tokenization import load_tokenizer, train_tokenizer


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
            for i in part["input_ids"][part["targets"][:, 0] != IGNORE, 0]  # but for padding
        ]
        assert sorted(parts) == sorted(windows)  # the ranks together: this step's windows, each once
        assert list(windows) == read.setdefault(step, list(windows))  # when it is taken again, too
    order = [window for step in sorted(read) for window in read[step]]
    for epoch in range(epochs):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 600])
def test_a_length_warmup_halves_the_pieces_of_a_window_by_thirds_and_leaves_it_whole_then(steps):
    pieces = [window_pieces(step, steps) for step in range(steps + 2)]
    assert pieces[0] == 8 and pieces[steps:] == [1, 1] and pieces == sorted(pieces, reverse=True)
    if steps >= 3:
        assert {abs(pieces.count(number) - steps / 3) < 1 for number in (8, 4, 2)} == {True}
    assert window_pieces(0, 0) == 1


@pytest.mark.parametrize("fraction", [0.0, 0.6, 1.0])
def test_the_mean_length_is_that_of_a_token_of_the_run(fraction):
    pieces = [window_pieces(step, round(fraction * 1000)) for step in range(1000)]
    assert mean_length(256, fraction) == pytest.approx(np.mean(256 / np.array(pieces)), rel=2e-3)


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


MIXES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=5)  # sizes, shares


def mixed_sequence(seed: int, batch: int, sizes, shares, length: int) -> list[tuple[int, int]]:
    """The first so many samples of a mix, asked for in batches, each as its source and its number there."""
    steps = range(-(-length // batch))
    read = [mixed_order(seed, step, batch, sizes=sizes, shares=shares) for step in steps]
    ends = np.cumsum(sizes)
    sources = np.searchsorted(ends, order := np.concatenate(read)[:length], side="right")
    return list(zip(sources.tolist(), (order - (ends - sizes)[sources]).tolist()))


@settings(max_examples=25, deadline=None)
@given(st.integers(-(2**40), 2**70), MIXES, st.integers(1, 50), st.integers(1, 300))
def test_in_a_mix_every_source_has_epochs_of_its_own_each_a_permutation(seed, mix, batch, other):
    sizes, shares = zip(*mix)
    read = mixed_sequence(seed, batch, sizes, shares, 300)
    assert read == mixed_sequence(seed, other, sizes, shares, 300)  # however it is asked for
    for source, n in enumerate(sizes):
        own = [sample for where, sample in read if where == source]
        for first in range(0, len(own) - n + 1, n):
            assert sorted(own[first : first + n]) == list(range(n))
        assert len(set(own[len(own) // n * n :])) == len(own) % n  # the epoch that has begun repeats none


@few
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.integers(0, 10**12), st.integers(1, 600))
def test_any_step_of_a_mix_has_the_shares_but_for_a_few_samples(shares, step, batch):
    read = mixed_order(0, step, batch, sizes=[10**6] * len(shares), shares=shares)
    for source, share in enumerate(np.array(shares) / sum(shares)):
        count = int(((read >= source * 10**6) & (read < (source + 1) * 10**6)).sum())
        assert abs(count - share * batch) <= 1 + share * len(shares) + 1e-6, (source, count, share * batch)


def test_over_each_cycle_a_mix_has_its_shares_exactly():
    shares = (7000, 2000, 999, 1)
    for first in (0, 10**9):
        read = [mixed_order(5, first + i, 100, sizes=[10**7] * 4, shares=shares) for i in range(CYCLE // 100)]
        assert np.bincount(np.concatenate(read) // 10**7).tolist() == list(shares)


def test_the_cycle_of_a_mix_is_made_once_not_at_each_step():
    assert order.cycle((3, 1)) is order.cycle((3, 1))
    assert [part.tolist() for part in order.cycle((3, 1))] == [[0, 0, 1, 0], [0, 1, 0, 2]]


def test_a_mix_depends_on_seed_and_step_and_gives_each_source_another_order():
    def read(*arguments):
        return mixed_order(*arguments, 40, sizes=[20, 20], shares=[1, 1]).tolist()

    asked = list(itertools.product(range(10), range(5)))
    first = [read(*arguments) for arguments in asked]
    assert [read(*arguments) for arguments in reversed(asked)] == first[::-1]
    assert len(set(map(tuple, first))) == 50
    for samples in first:
        assert [i for i in samples if i < 20] != [i - 20 for i in samples if i >= 20]


@pytest.fixture(scope="module")
def trillion(tmp_path_factory):
    """A split of 10^12 tokens in sparse files: 466 shards, all but the last as long as a header can say."""
    folder, left = tmp_path_factory.mktemp("trillion"), 10**12
    for i in itertools.count():
        count = min(left, 2**31 - 1)
        with open(folder / f"train_{i:06d}.bin", "wb") as file:
            file.write(struct.pack("<256i", 20240520, 1, count, *[0] * 253))
            file.truncate(1024 + 2 * count)
        left -= count
        if not left:
            return folder


def test_of_a_trillion_tokens_a_loader_keeps_little_more_than_the_names_of_its_shards(trillion):
    """A table of all windows would take 3.9 GB. Marks of shard and place are written where windows lie."""
    T, shards = 2048, sorted(trillion.iterdir())
    per_shard = (2**31 - 2) // T
    tracemalloc.start()
    loader = TokenLoader(trillion, "train", T, 65_536)
    windows = loader.step_windows(1, 10**5, 1024)
    opened, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(shards) == 466 and len(loader) == 465 * per_shard + (10**12 - 465 * (2**31 - 1) - 1) // T
    assert opened < 2000 * len(shards) and peak < 2_000_000, (opened, peak)
    assert len(set(windows.tolist())) == 1024 and len(set((windows // per_shard).tolist())) > 400
    some = [0, len(loader) - 1, *windows[:6].tolist()]
    for mark, window in enumerate(some, 1):
        with open(shards[window // per_shard], "r+b") as file:
            file.seek(1024 + 2 * T * (window % per_shard))
            file.write(struct.pack("<H", mark))
    assert loader.read(some)[0][:, 0].tolist() == list(range(1, len(some) + 1))


def test_at_a_trillion_tokens_no_window_comes_twice_within_an_epoch(trillion):
    """Ends of epochs included, where the permutation changes."""
    loader = TokenLoader(trillion, "train", 2048, 65_536)
    n = len(loader)
    for first in (0, n // 1024 - 2, 10 * n // 1024 - 2):
        windows = np.concatenate([loader.step_windows(0, first + i, 1024) for i in range(4)])
        epochs = np.arange(first * 1024, (first + 4) * 1024) // n
        for epoch in np.unique(epochs):
            own = windows[epochs == epoch]
            assert len(set(own.tolist())) == len(own) and own.min() >= 0 and own.max() < n


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_the_keyed_shuffle_is_a_permutation(n, key):
    assert sorted(order.shuffled(np.arange(n), n, key)) == list(range(n))


WEIGHTS = (0.2, 0.1, 0.7)


@pytest.fixture(scope="session")
def folders(tokenizer_dir, tmp_path_factory):
    """Three sources of different sizes, the smallest of which a few steps read more than once."""
    made = []
    for name, first, count in (("web", 0, 300), ("math", 1000, 120), ("code", 2000, 16)):
        folder = tmp_path_factory.mktemp(name)
        source = write_jsonl(folder / "texts.jsonl", ({"text": text(first + i)} for i in range(count)))
        places = {"source": str(source), "tokenizer": str(tokenizer_dir), "out_dir": str(folder / name)}
        prepare_data.main(prepare_data.Config(**places, val_fraction=0.2, shard_tokens=3000))
        made.append(folder / name)
    return made


@pytest.fixture(scope="session")
def mix(folders):
    """The flag for a mix of all three."""
    return ",".join(f"{folder}:{weight}" for folder, weight in zip(folders, WEIGHTS))


# -- the flag ------------------------------------------------------------------------------------------------


def test_weights_stand_behind_the_last_colon_and_need_not_sum_to_one(tmp_path):
    def shares(data_dir):
        return [(source.path, source.share) for source in parse_sources(data_dir)]

    assert shares("data/web:0.7,data/math:0.2,data/code:0.1") == [
        ("data/web", 7000),
        ("data/math", 2000),
        ("data/code", 1000),
    ]
    assert shares("a:21,b:6,c:3") == shares("a:0.7,b:0.2,c:0.1") == [("a", 7000), ("b", 2000), ("c", 1000)]
    assert shares("disk:1/web:3,b:1e0") == [("disk:1/web", 7500), ("b", 2500)]
    assert shares("a,b") == [("a", None), ("b", None)] and shares("a") == [("a", None)]
    folder = tmp_path / "odd:1,name:2"
    folder.mkdir()
    assert shares(str(folder)) == [(str(folder), None)]  # what is itself a folder is that folder
    assert [source.name for source in parse_sources("data/web/:1,data/math:1")] == ["web", "math"]
    assert [source.name for source in parse_sources("a/web:1,b/web:1,c:1")] == ["a/web", "b/web", "c"]


@pytest.mark.parametrize(
    "data_dir, message",
    [
        ("a:0.7,b", "gives weights to some, but none to b; give all a weight, as b:0.5, or none"),
        ("a:0,b:0", "all of a, b have the weight 0, so nothing is trained on; raise one"),
        ("a:-1,b:1", "a:-1, which does not exist, and '-1' is no weight; .* a number above zero, or 0"),
        ("a:nan,b:1", "'nan' is no weight"),
        ("a:inf,b:1", "'inf' is no weight"),
        ("a:lots,b:1", "'lots' is no weight"),
        (":0.5,b:1", ":0.5, which does not exist"),
        ("a,,b", "has an empty name in it"),
        ("", "has an empty name in it"),
        ("a:1,b:0.00001", "b has the weight 1e-05 of 1.00001, less than one window in 10,000"),
    ],
)
def test_what_is_no_mix_is_refused_in_one_sentence_before_anything_is_read(data_dir, message, tmp_path):
    refused(message, parse_sources, data_dir)
    with pytest.raises(InputError, match=message):
        pretrain_gpt.main(pretrain_config(data_dir, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@given(st.lists(st.floats(1e-2, 1e3), min_size=1, max_size=8))
def test_rounded_shares_sum_to_the_cycle_and_are_off_by_less_than_one_window_in_it(weights):
    if min(weights) / sum(weights) * CYCLE < 1:
        return
    shares = rounded_shares([str(weight) for weight in weights], weights)
    assert sum(shares) == CYCLE
    assert all(abs(s - w / sum(weights) * CYCLE) < 1 for s, w in zip(shares, weights))


def test_sources_are_told_apart_also_by_number_where_two_are_parts_of_one_dataset():
    named = {
        "data/a:1,b:2": ["a", "b"],
        "x/a:1,y/a:2": ["x/a", "y/a"],
        "x/a:1,x/a:2,b:1": ["x/a (1)", "x/a (2)", "b"],  # with a configuration or a split for each
    }
    for flag, names in named.items():
        assert [source.name for source in parse_sources(flag, "data", lambda path: False)] == names


def test_a_folder_named_twice_is_refused(folders):
    data_dir = f"{folders[0]}:1,{folders[0].parent}/./{folders[0].name}{os.sep}:2"
    refused("names a folder twice; name it once, with the sum", verified_manifests, data_dir)


def test_sources_of_different_tokenizers_are_refused_before_a_shard_is_read(folders, tmp_path):
    train_tokenizer((text(i) for i in range(50)), 300).save_pretrained(tmp_path / "tokenizer")
    source = write_jsonl(tmp_path / "texts.jsonl", ({"text": text(i)} for i in range(40)))
    other, places = tmp_path / "other", {"source": str(source), "tokenizer": str(tmp_path / "tokenizer")}
    prepare_data.main(prepare_data.Config(**places, out_dir=str(other), val_fraction=0.2))
    next(other.glob("train*.bin")).unlink()  # would be told if shards were looked at
    refused(
        r"web \(.*\) and .*other \(.*\) were made with different tokenizers; prepare one of them again",
        verified_manifests,
        f"{folders[0]}:1,{other}:1",
    )


# -- windows -------------------------------------------------------------------------------------------------


def test_a_mix_s_windows_are_those_of_its_sources_counted_through(folders, mix):
    whole, parts = TokenLoader(mix, "train", 16, 320), [TokenLoader(f, "train", 16, 320) for f in folders]
    assert whole.sizes == [len(part) for part in parts] and len(whole) == sum(whole.sizes)
    windows = [row for part in parts for row in part.read(range(len(part)))[0].tolist()]
    assert whole.read(range(len(whole)))[0].tolist() == windows


def test_a_single_source_is_read_in_the_order_of_batch_order_with_a_weight_or_without(folders):
    from order import batch_order

    for data_dir in (folders[0], f"{folders[0]}:0.3"):
        loader = TokenLoader(data_dir, "train", 16, 320)
        for step in (0, 3, 10**6):
            expected = batch_order(5, step, 24, len(loader))
            assert loader.step_windows(5, step, 24).tolist() == expected.tolist()
        assert loader.first_windows(7, [1.0]) == [range(7)] and not loader.report(100)
        assert loader.first_windows(0, [1.0]) == loader.first_windows(10**9, [1.0]) == [range(len(loader))]


def test_folders_joined_by_a_comma_are_read_as_one_each_window_once_an_epoch(folders):
    loader = TokenLoader(",".join(map(str, folders)), "train", 16, 320)
    windows = [int(w) for step in range(len(loader)) for w in loader.step_windows(1, step, 1)]
    assert sorted(windows) == list(range(len(loader))) and windows != sorted(windows)
    assert loader.shares == pytest.approx([size / len(loader) for size in loader.sizes])
    assert list(loader.epochs(2 * len(loader)).values()) == pytest.approx([2.0] * 3)


def test_validation_reads_of_each_source_its_share_of_the_windows_and_at_least_one(folders, mix):
    val = TokenLoader(mix, "val", 4, 320)
    firsts = [sum(val.sizes[:i]) for i in range(3)]
    assert min(val.sizes) > 10
    shares = [0.7, 0.25, 0.05]
    assert val.first_windows(20, shares) == [range(f, f + n) for f, n in zip(firsts, (14, 5, 1))]
    assert val.first_windows(1, shares) == [range(f, f + 1) for f in firsts]
    assert val.first_windows(0, shares) == [range(f, f + n) for f, n in zip(firsts, val.sizes)]
    assert val.first_windows(10**9, shares) == val.first_windows(0, shares)


def test_the_validation_loss_of_a_mix_is_that_of_a_token_drawn_by_the_shares():
    """A source that has too few windows for its share counts no less."""
    numbers = validation_numbers(
        ["web", "math"], [0.75, 0.25], [5, 1], [(300.0, 0, 100), (40.0, 0, 20)], text_bytes=[400, 50]
    )
    assert numbers["val_loss/web"] == 3.0 and numbers["val_loss/math"] == 2.0
    assert numbers["val_loss"] == pytest.approx(0.75 * 3.0 + 0.25 * 2.0)
    bytes_per_token = 0.75 * 4.0 + 0.25 * 2.5
    assert numbers["val_bpb"] == pytest.approx(2.75 / math.log(2) / bytes_per_token)
    own = [numbers["val_bpb/web"], numbers["val_bpb/math"]]
    assert own == pytest.approx([3.0 / math.log(2) / 4.0, 2.0 / math.log(2) / 2.5])
    assert validation_numbers(["web"], [1.0], [7], [(300.1, 0, 77)], text_bytes=[401]) == {
        "val_loss": 300.1 / 77,
        "val_bpb": 300.1 / math.log(2) / 401,
    }


# -- whole runs ----------------------------------------------------------------------------------------------


def test_a_run_on_a_mix_reports_each_source_apart(mix, folders, tokenizer_dir, tmp_path, capsys):
    pretrain_gpt.main(pretrain_config(mix, tmp_path, max_steps=30, eval_every=30))
    printed, rows = capsys.readouterr().out, read_records(tmp_path / "metrics.jsonl")
    sizes = [len(TokenLoader(folder, "train", 32, 320)) for folder in folders]
    epochs = [30 * 8 * weight / size for weight, size in zip(WEIGHTS, sizes)]
    assert epochs[2] > 1  # the smallest source begins again while the others go on
    for name, share, size, read in zip(("web", "math", "code"), ("20", "10", "70"), sizes, epochs):
        assert f"{name:<4}   {share}.00% of the windows; {size:,} of them, {read:.2f} epochs" in printed
    own = [rows[-1][f"val_loss/{name}"] for name in ("web", "math", "code")]
    assert rows[-1]["val_loss"] == pytest.approx(sum(w * x for w, x in zip(WEIGHTS, own)))
    assert f"val_loss/math {own[1]:.4f}" in printed
    assert [rows[-1][f"epochs/{name}"] for name in ("web", "math", "code")] == pytest.approx(epochs)
    # each source's loss is the one that it has alone: 512 tokens are 16 windows, of which web's share is 3
    model = pretrain_gpt.GPTModel.from_pretrained(tmp_path / "step_0000030")
    ids, targets = TokenLoader(folders[0], "val", 32, 320).read(range(3))
    assert own[0] == pytest.approx(model(ids, targets).item() / targets.numel(), rel=1e-5)
    card = (tmp_path / "step_0000030" / "README.md").read_text()
    assert "20.00% text files: texts.jsonl; 10.00% text files" in card


def test_a_source_of_weight_zero_is_validated_in_full_and_never_trained_on(folders, tmp_path):
    first, last = folders[0], folders[2]
    pretrain_gpt.main(pretrain_config(first, tmp_path / "alone", max_steps=4, eval_every=4, seed=5))
    zero = pretrain_config(f"{first}:1,{last}:0", tmp_path / "zero", max_steps=4, eval_every=4, seed=5)
    pretrain_gpt.main(zero)
    alone, with_zero = (read_records(tmp_path / name / "metrics.jsonl")[-1] for name in ("alone", "zero"))
    assert weights(tmp_path / "zero", 4) == weights(tmp_path / "alone", 4)
    assert with_zero["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-9)
    assert with_zero["val_loss/web"] == pytest.approx(alone["val_loss"], rel=1e-9)
    assert with_zero["val_bpb"] == pytest.approx(alone["val_bpb"], rel=1e-9)
    assert with_zero["val_bpb/web"] == pytest.approx(alone["val_bpb"], rel=1e-9)
    model = pretrain_gpt.GPTModel.from_pretrained(tmp_path / "zero" / "step_0000004")
    val = TokenLoader(last, "val", 32, 320)
    ids, targets = val.read(range(min(len(val), zero.eval_tokens // 32)))
    own = model(ids, targets).item() / targets.numel()
    assert with_zero["val_loss/code"] == pytest.approx(own, rel=1e-5)
    card = (tmp_path / "zero" / "step_0000004" / "README.md").read_text()
    assert "100.00% text files" in card and "0.00% text" not in card.replace("100.00%", "")


@few
@given(
    st.integers(-(2**40), 2**40), st.integers(0, 10**6), st.lists(st.integers(1, 50), min_size=1, max_size=4)
)
def test_sources_of_weight_zero_anywhere_change_no_order(seed, step, sizes):
    """Their samples are left out of the counting; the others come as without them."""
    shares = [3 + i for i in range(len(sizes))]
    plain = mixed_order(seed, step, 20, sizes=sizes, shares=shares)
    for place in range(len(sizes) + 1):
        more = [*sizes[:place], 9, *sizes[place:]]
        with_zero = [*shares[:place], 0, *shares[place:]]
        order = mixed_order(seed, step, 20, sizes=more, shares=with_zero)
        start = sum(sizes[:place])
        assert np.array_equal(np.where(plain >= start, plain + 9, plain), order)
    if len(sizes) == 1:
        assert np.array_equal(plain, batch_order(seed, step, 20, sizes[0]))


def test_a_source_that_is_all_held_out_is_taken_with_weight_zero_only(
    folders, tokenizer_dir, tmp_path, capsys
):
    source = write_jsonl(tmp_path / "texts.jsonl", ({"text": text(3000 + i)} for i in range(20)))
    places = {"source": str(source), "tokenizer": str(tokenizer_dir), "out_dir": str(tmp_path / "held")}
    prepare_data.main(prepare_data.Config(**places, val_fraction=1.0))
    first, held = folders[0], tmp_path / "held"
    assert f"can validate on it: --data_dir=data/mine:1,{held}:0" in capsys.readouterr().out
    for data_dir in (held, f"{first}:1,{held}:1", f"{first},{held}"):
        refused("the train split in .*held has no shard", TokenLoader, data_dir, "train", 32, 320)
    pretrain_gpt.main(pretrain_config(f"{first}:1,{held}:0", tmp_path / "run", max_steps=2))
    out = capsys.readouterr().out
    windows = len(TokenLoader(first, "train", 32, 320))
    assert f" {windows:,} windows of 32 tokens" in out and "  held  validated only" in out
    rows = [row for row in read_records(tmp_path / "run" / "metrics.jsonl") if "val_loss/held" in row]
    assert rows and all(math.isfinite(row["val_bpb/held"]) for row in rows)


@pytest.mark.slow
def test_one_two_and_three_ranks_train_on_the_same_global_batches_of_a_mix(mix, tmp_path):
    """7 windows a step: 3, 2 and 2 on three ranks."""
    for ranks in (1, 2, 3):
        config = pretrain_config(mix, tmp_path / str(ranks), batch_tokens=7 * 32, max_steps=4)
        result = run("pretrain_gpt.py", *flags(config), ranks=ranks)
        assert result.returncode == 0, result.stderr
    one = losses(tmp_path / "1")
    for ranks in (2, 3):
        for a, b in zip(one, losses(tmp_path / str(ranks)), strict=True):
            assert all(x == y or math.isclose(x, y, rel_tol=2e-4) for x, y in zip(a, b)), (a, b)


@pytest.mark.parametrize("joined", [False, True], ids=["weighted", "joined"])
def test_a_killed_run_on_a_mix_ends_in_the_same_bytes_as_an_undisturbed_one(
    joined, mix, folders, tmp_path, fresh
):
    data_dir = ",".join(map(str, folders)) if joined else mix
    straight, killed = (pretrain_config(data_dir, tmp_path / name, **SMALL) for name in ("a", "b"))
    assert fresh.submit(planted.forked, "pretrain_gpt", straight).result(90)[0] == [0]
    for step in (4, 5):  # the second checkpoint was begun, so the first is whole
        fault = (f"SIGKILL:{step}:0",)
        assert fresh.submit(planted.forked, "pretrain_gpt", killed, 1, fault).result(90)[0] == [-9]
    codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", killed).result(90)
    assert codes == [0] and "continuing from" in log, log
    assert_recovered(tmp_path / "b", tmp_path / "a", 2)


def test_a_mix_that_moved_is_the_same_and_one_with_other_weights_or_content_is_refused(
    mix, folders, tmp_path
):
    config = pretrain_config(mix, tmp_path / "run", max_steps=2)
    pretrain_gpt.main(config)

    def resumed(data_dir):
        pretrain_gpt.main(dataclasses.replace(config, data_dir=data_dir))

    moved = [shutil.copytree(folder, tmp_path / f"moved_{folder.name}") for folder in folders]
    resumed(",".join(f"{folder}:{10 * weight}" for folder, weight in zip(moved, WEIGHTS)))
    with pytest.raises(InputError, match=r"shares \[2000, 1000, 7000\] → \[1000, 2000, 7000\]"):
        resumed(",".join(f"{folder}:{weight}" for folder, weight in zip(folders, (1, 2, 7))))
    with pytest.raises(InputError, match=r"shares \[2000, 1000, 7000\] → 'joined'"):
        resumed(",".join(map(str, folders)))
    with pytest.raises(InputError, match=r"other settings .*data "):
        resumed(",".join(f"{folder}:{weight}" for folder, weight in zip(folders[::-1], WEIGHTS)))
    with pytest.raises(InputError, match=r"other settings .*data .*windows "):
        resumed(str(folders[0]))


def test_a_checkpoint_of_one_folder_keeps_what_it_held_before_mixes(folders, tmp_path):
    """An older version's checkpoint has no word of sources and phases, and goes on."""
    import torch

    from common import file_sha256, fingerprint

    config = pretrain_config(folders[0], tmp_path, max_steps=2)
    pretrain_gpt.main(config)
    path = tmp_path / "step_0000002"
    state = torch.load(path / "training_state.pt", weights_only=True)
    manifest = json.loads((folders[0] / "manifest.json").read_text())
    windows = sum((shard["tokens"] - 1) // 32 for shard in manifest["shards"] if "train" in shard["file"])
    content = {"data": fingerprint(manifest["shards"]), "windows": windows}
    assert state["content"].pop("precision").startswith("float32")
    assert state["content"] == content | {"init_from": None, "weights": None}
    del state["config"]["init_from"], state["config"]["dtype"]
    torch.save(state | {"content": content}, path / "training_state.pt")
    told, file = json.loads((path / "checkpoint.json").read_text()), path / "training_state.pt"
    told["files"][file.name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    (path / "checkpoint.json").write_text(json.dumps(told))
    pretrain_gpt.main(dataclasses.replace(config, data_dir=f"{folders[0]}{os.sep}"))
    assert load_tokenizer(path)  # it is still the newest, and whole
