"""Rows of whole conversations: packing, masks, the loader, and mixes of several sources."""

import dataclasses
import math
import multiprocessing
import re
import shutil
from collections import Counter

import numpy as np
import planted
import pytest
import torch
from conftest import (
    ALONE,
    assert_recovered,
    conversation,
    flags,
    losses,
    refused,
    run,
    sft_config,
    small_model,
    write_jsonl,
)
from properties import few, given, settings, st
from test_order import STRETCHES, steps_of
from test_sft import prepared

import attention
import gpt
import sft
import sft_gpt
from common import IGNORE, InputError, read_records
from distributed import Ranks
from order import data_sources, for_each, parse_sources
from packing import MixedLoader, PackedLoader, collate, pack
from sft import SFTDataset
from sharding import wrap
from training import forward_backward, targets_in

T = 96


@pytest.fixture(scope="session")
def chat_files(tmp_path_factory):
    """Two sources with columns of their own; the second is small."""
    folder = tmp_path_factory.mktemp("chat_files")
    rows = [conversation(i, turns=1 + i % 3) for i in range(120)]
    first = write_jsonl(folder / "talk.jsonl", rows)
    rows = [{"dialog": conversation(1000 + i, turns=2)["messages"]} for i in range(30)]
    return [first, write_jsonl(folder / "facts.jsonl", rows)]


def mixed(files, weights=(1, 3)) -> str:
    return ",".join(f"{file}:{weight}" for file, weight in zip(files, weights))


def mix_config(model, files, out_dir, **changes):
    fields = {"column": "messages,dialog", "val_fraction": 0.2, "max_steps": 6, **changes}
    return sft_config(model, mixed(files), out_dir, **fields)


@pytest.fixture(scope="session")
def datasets(tmp_path_factory, tokenizer):
    folder, made = tmp_path_factory.mktemp("datasets"), []
    for name, count in (("large", 60), ("small", 15)):
        rows = ((conversation(i, turns=1 + i % 3)["messages"], f"row {i}") for i in range(count))
        sft.prepare_conversations(folder / name, rows, tokenizer, max_length=T, val_fraction=0.2)
        made.append(sft.SFTDataset(folder / name / "train"))
    return made


def mixed_loader(datasets, shares, rows_per_step: int, seed: int) -> MixedLoader:
    loaders = [
        PackedLoader(dataset, row_length=T, rows_per_step=rows_per_step, seed=seed + i)
        for i, dataset in enumerate(datasets)
    ]
    return MixedLoader(loaders, shares, rows_per_step)


@few
@given(st.integers(1, 9), st.integers(0, 2**32), st.sampled_from([(1, 1), (1, 3), (7, 2)]))
def test_each_source_has_its_share_of_the_rows_and_epochs_of_its_own(datasets, batch, seed, shares):
    loader = mixed_loader(datasets, shares, batch, seed)
    steps = -(-2 * sum(shares) * max(loader.sizes) // batch)
    rows = [row for step in range(steps) for row in loader.step_rows(step)]
    by_source = [[row for row in rows if row[0][0] == source] for source in (0, 1)]
    for source, own in enumerate(by_source):
        assert all(place == source for row in own for place, _ in row)  # no row has two sources
        assert abs(len(own) - len(rows) * shares[source] / sum(shares)) <= 2
        n = loader.sizes[source]
        assert len(own) >= 2 * n
        for epoch in (0, 1):
            read = [number for row in own[epoch * n : (epoch + 1) * n] for _, number in row]
            assert sorted(read) == list(range(len(datasets[source])))
    again = mixed_loader(datasets, shares, batch, seed)
    last = again.step_rows(steps - 1)  # asked for first, as after a resume
    assert last == rows[-batch:] and again.step_rows(0) == rows[:batch]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_ranks_together_read_a_mix_s_rows_each_once_with_all_its_targets(datasets, world):
    loader = mixed_loader(datasets, (1, 3), 7, 0)
    for step in (0, 5):
        rows, tokens, targets = loader.step_rows(step), Counter(), 0
        for rank in range(world):
            for batch in loader.micro_batches(rows, 2, Ranks(rank, world, torch.device("cpu"))):
                tokens.update(batch["input_ids"].flatten().tolist())
                targets += int((batch["targets"] != sft.IGNORE).sum())
        expected = Counter(int(i) for row in rows for s, c in row for i in datasets[s][c][0])
        del tokens[0], expected[0]  # padding
        assert tokens == expected
        length = sum(len(datasets[s][c][0]) for row in rows for s, c in row)
        assert loader.count(rows) == (length, targets)


def test_a_mix_is_as_full_as_the_rows_that_it_reads(datasets):
    loader = mixed_loader(datasets, (1, 3), 4, 0)
    one, other = (int(dataset.offsets[-1]) / (n * T) for dataset, n in zip(datasets, loader.sizes))
    assert one != other and loader.fill() == pytest.approx((one + 3 * other) / 4)


def test_without_weights_a_comma_joins_files_as_ever_and_a_list_has_a_value_for_each_or_one_for_all():
    (source,) = data_sources("a.jsonl,b.jsonl")
    assert source.path == "a.jsonl,b.jsonl" and source.share is None
    assert [(s.name, s.path, s.share) for s in data_sources("hub/talk:3,embedded:1")] == [
        ("talk", "hub/talk", 7500),
        ("embedded", "embedded", 2500),
    ]
    assert for_each("column", "messages", 3) == ["messages"] * 3
    assert for_each("data_config", "all,", 2) == ["all", ""] and for_each("column", "a,b", 1) == ["a,b"]
    refused("--column=a,b has 2 values for 3 sources in --data", for_each, "column", "a,b", 3)
    refused("--data=a:1,b gives weights to some, but none to b", data_sources, "a:1,b")
    assert parse_sources("a:1", "data", lambda path: False)[0].share == 10_000


def test_a_run_on_a_mix_reports_each_source_apart(base_run, chat_files, tmp_path, capsys):
    sft_gpt.main(mix_config(base_run, chat_files, tmp_path))
    printed, row = capsys.readouterr().out, read_records(tmp_path / "metrics.jsonl")[-1]
    assert "  talk.jsonl    25.00% of the rows; " in printed and "  facts.jsonl   75.00%" in printed
    own = [row["val_loss/talk.jsonl"], row["val_loss/facts.jsonl"]]
    assert min(own) < row["val_loss"] < max(own) and 0 < row["val_accuracy"] < 1
    assert 0 < row["epochs/talk.jsonl"] < row["epochs/facts.jsonl"]
    card = (tmp_path / "step_0000006" / "README.md").read_text()
    assert "on 25.00% the conversations of talk.jsonl; 75.00% the conversations of facts.jsonl." in card


@pytest.mark.parametrize("batch_tokens", [pytest.param(512, marks=pytest.mark.slow), 64 * 500])
def test_a_source_of_weight_zero_is_validated_whole_and_changes_nothing_in_training(
    batch_tokens, base_run, chat_files, tokenizer, tmp_path, capsys
):
    """Alone, before and after the source that is trained on; with steps of more rows than that has, too."""
    talk, facts = chat_files
    ways = {
        "alone": (talk, "messages"),
        "after": (f"{talk}:1,{facts}:0", "messages,dialog"),
        "before": (f"{facts}:0,{talk}:1", "dialog,messages"),
    }
    rows, told, answers = {}, {}, {}
    for name, (data, column) in ways.items():
        out = tmp_path / name
        config = mix_config(base_run, chat_files, out, max_steps=0, epochs=1.5, eval_questions=5)
        sft_gpt.main(dataclasses.replace(config, data=str(data), column=column, batch_tokens=batch_tokens))
        told[name] = re.search(r"[\d,]+ examples, .* epochs", capsys.readouterr().out)[0]
        rows[name] = [row for row in read_records(out / "metrics.jsonl") if "loss" in row]
        answers[name] = (out / "answers.jsonl").read_bytes()
    assert told["alone"] == told["after"] == told["before"]
    assert answers["alone"] == answers["after"] == answers["before"]
    for part in ("loss", "grad_norm", "targets"):
        assert len({tuple(row[part] for row in some) for some in rows.values()}) == 1
    alone, after, before = (some[-1] for some in rows.values())
    assert after["epochs/talk.jsonl"] == pytest.approx(1.5, abs=0.5) and "epochs/facts.jsonl" not in after
    said = float(re.search(r"([\d.]+) epochs", told["after"])[1])
    assert after["epochs/talk.jsonl"] == pytest.approx(said, abs=0.006)
    assert after["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-9)
    assert after["val_loss/facts.jsonl"] == before["val_loss/facts.jsonl"]
    (last,) = out.glob(f"step_*{before['step']}")
    assert "on 100.00% the conversations of talk.jsonl." in (last / "README.md").read_text()  # and no other
    # All 30 conversations of the other source are validated.
    held = [(row["dialog"], "") for row in read_records(facts)]
    report = sft.prepare_conversations(tmp_path / "held", held, tokenizer, max_length=64, val_fraction=1.0)
    assert (report["train"], report["val"]) == (0, 30)
    dataset, model = SFTDataset(tmp_path / "held" / "val"), gpt.GPTModel.from_pretrained(last)
    loss = targets = 0
    for i in range(30):
        batch = collate([[dataset[i]]], 64)
        loss, targets = loss + model(**batch).item(), targets + targets_in(batch).item()
    assert before["val_loss/facts.jsonl"] == pytest.approx(loss / targets, rel=1e-4)


def test_few_shapes_of_variable_length_batches_leave_little_room_empty(tmp_path, tokenizer):
    words = [20] * 60 + [1] * 60  # those of one word meet in the last rows
    rows = (
        (
            [{"role": "user", "content": f"{i}" + " a" * n}, {"role": "assistant", "content": f"{i}"}],
            f"row {i}",
        )
        for i, n in enumerate(words)
    )
    sft.prepare_conversations(tmp_path, rows, tokenizer, max_length=T, val_fraction=0.2)
    data, ranks = sft.SFTDataset(tmp_path / "train"), Ranks(0, 1, torch.device("cpu"), even_batches=True)
    loader = PackedLoader(data, row_length=T, rows_per_step=8, seed=0, varlen=True)
    sizes, counts = Counter(), []
    for step in range(loader.steps_per_epoch):
        for batch in loader.micro_batches(loader.step_rows(step), 4, ranks):
            starts = batch["cu_seqlens"].diff()
            sizes[len(starts)] += 1
            counts.append(int((starts > 0).sum()))
    assert len(sizes) <= 2 and max(counts) <= max(sizes)
    assert sizes.most_common(1)[0][0] <= 3 * np.median(counts)


def test_an_epoch_of_a_mix_has_the_rows_of_all_sources_and_a_step_no_more(datasets):
    few, many = (mixed_loader(datasets, (3, 1), rows, seed=0) for rows in (7, 500))
    rows = sum(few.sizes)
    assert few.steps_per_epoch == -(-rows // 7) and len(few.step_rows(3)) == few.rows_per_step == 7
    assert many.steps_per_epoch == 1 and len(many.step_rows(3)) == many.rows_per_step == rows


def test_a_killed_run_on_a_mix_ends_in_the_same_bytes_as_an_undisturbed_one(
    base_run, chat_files, tmp_path, fresh
):
    straight, killed = (
        mix_config(base_run, chat_files, tmp_path / name, micro_batch_size=2) for name in ("a", "b")
    )
    assert fresh.submit(planted.forked, "sft_gpt", straight).result(90)[0] == [0]
    for step in (1, 5):  # the second checkpoint was begun, so the first is whole
        assert fresh.submit(planted.forked, "sft_gpt", killed, 1, (f"SIGKILL:{step}:0",)).result(90)[0] == [
            -9
        ]
    codes, log, _ = fresh.submit(planted.forked, "sft_gpt", killed).result(90)
    assert codes == [0] and "continuing from" in log, log
    assert_recovered(tmp_path / "b", tmp_path / "a", 2)


@pytest.mark.slow
def test_two_ranks_train_on_the_same_global_batches_of_a_mix(base_run, chat_files, tmp_path):
    for ranks in (1, 2):
        config = mix_config(base_run, chat_files, tmp_path / str(ranks), batch_tokens=5 * 64, max_steps=4)
        result = run("sft_gpt.py", *flags(config), ranks=ranks)
        assert result.returncode == 0, result.stderr
    for a, b in zip(losses(tmp_path / "1"), losses(tmp_path / "2"), strict=True):
        assert all(x == y or math.isclose(x, y, rel_tol=2e-4) for x, y in zip(a, b)), (a, b)


def test_a_mix_that_moved_is_the_same_and_one_with_other_weights_or_content_is_refused(
    base_run, chat_files, tmp_path
):
    config = mix_config(base_run, chat_files, tmp_path / "run", max_steps=2)
    sft_gpt.main(config)
    (tmp_path / "moved").mkdir()
    moved = [shutil.copy(file, tmp_path / "moved" / file.name) for file in chat_files]
    sft_gpt.main(dataclasses.replace(config, data=mixed(moved, (10, 30))))
    with pytest.raises(InputError, match=r"shares \[2500, 7500\] → \[5000, 5000\]"):
        sft_gpt.main(dataclasses.replace(config, data=mixed(chat_files, (1, 1))))
    moved[1].write_text("".join(moved[1].read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(InputError, match=r"other settings \(data_files "):
        sft_gpt.main(dataclasses.replace(config, data=mixed(moved)))


def test_every_supervised_token_is_seen_once_an_epoch_whatever_the_ranks(tokenizer, tmp_path):
    dataset = prepared(tokenizer, tmp_path / "data")
    expected = sorted(
        id for i in range(len(dataset)) for id in dataset[i][1][dataset[i][1] != IGNORE].tolist()
    )
    orders = []
    for world, size, epoch in ((1, 4, 0), (2, 1, 0), (3, 2, 1)):
        loader = PackedLoader(dataset, row_length=64, rows_per_step=5, seed=3)
        steps = range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch)
        seen = []
        for step in steps:
            for rank in range(world):
                batches = list(
                    loader.micro_batches(
                        loader.step_rows(step), size, Ranks(rank, world, torch.device("cpu"))
                    )
                )
                assert batches, "a rank without a batch would leave the others waiting"
                seen += [
                    t for batch in batches for t in batch["targets"][batch["targets"] != IGNORE].tolist()
                ]
        assert sorted(seen) == expected
        sizes = {len(loader.step_rows(step)) for step in steps}  # no step is a small remainder
        assert max(sizes) <= 5 and max(sizes) - min(sizes) <= 1
        orders.append([loader.step_rows(step) for step in steps])
    assert orders[0] == orders[1] != orders[2]


def test_the_rows_of_a_step_depend_on_seed_and_step_only(tokenizer, tmp_path):
    dataset = prepared(tokenizer, tmp_path / "data")
    loader = PackedLoader(dataset, row_length=64, rows_per_step=5, seed=3)
    straight = [loader.step_rows(step) for step in range(3 * loader.steps_per_epoch)]
    again = PackedLoader(dataset, row_length=64, rows_per_step=5, seed=3)
    for step in (20, 3, 11, 0):
        assert again.step_rows(step) == straight[step]
    assert PackedLoader(dataset, row_length=64, rows_per_step=5, seed=4).step_rows(0) != straight[0]


def test_a_packed_row_gives_the_loss_and_gradients_of_its_conversations_run_alone(tokenizer, tmp_path):
    dataset, model = prepared(tokenizer, tmp_path / "data"), small_model(max_position_embeddings=256)
    for row in PackedLoader(dataset, row_length=256, rows_per_step=4, seed=0).rows[:6]:
        assert len(row) > 1
        packed = model(**collate([[dataset[c] for c in row]], 256))
        packed.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        alone = 0
        for c in row:
            ids, labels = (torch.tensor(np.array(x), dtype=torch.long)[None] for x in dataset[c])
            targets = torch.cat([labels[:, 1:], torch.full((1, 1), IGNORE)], dim=1)
            alone += model(ids, targets)
        alone.backward()
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=0)
        for p, g in zip(model.parameters(), gradients):
            assert (p.grad - g).norm() <= 1e-5 * g.norm()
        model.zero_grad()


def test_packed_logits_equal_those_of_each_conversation_alone(tokenizer, tmp_path):
    dataset, model = prepared(tokenizer, tmp_path / "data"), small_model(max_position_embeddings=256)
    row = max(PackedLoader(dataset, row_length=256, rows_per_step=4, seed=0).rows, key=len)
    assert len(row) > 3
    batch = collate([[dataset[c] for c in row]], 256)
    packed, at = model(batch["input_ids"], positions=batch["positions"], mask=batch["mask"]), 0
    for c in row:
        ids = torch.tensor(dataset[c][0], dtype=torch.long)[None]
        torch.testing.assert_close(packed[:, at : at + ids.size(1)], model(ids), atol=1e-5, rtol=0)
        at += ids.size(1)


def test_the_first_token_of_a_conversation_is_never_a_target_and_padding_teaches_nothing():
    first, second = ((np.array(ids), np.array(ids)) for ids in ([5, 6, 7], [8, 9]))
    batch = collate([[first, second], []], 8)
    assert batch["targets"].tolist() == [[6, 7, IGNORE, 9, IGNORE, IGNORE, IGNORE, IGNORE], [IGNORE] * 8]
    assert batch["positions"][0].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert not batch["mask"][0, 0, 3:5, :3].any() and not batch["mask"][0, 0, :5, 5:].any()
    assert small_model()(**batch).isfinite()


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_nothing_in_a_packed_row_sees_or_predicts_across_conversations(data):
    T = data.draw(st.sampled_from([64, 200, 512, 2048]))
    lengths = np.array(data.draw(st.lists(st.integers(1, T), min_size=1, max_size=8)))
    rows = pack(lengths, T)[:2]
    ids = [np.arange(length) + 10_000 * (c + 1) for c, length in enumerate(lengths)]
    batch = collate([[(ids[c], ids[c]) for c in row] for row in rows], T)
    for row, i, y, p, mask in zip(rows, *(batch[k] for k in ("input_ids", "targets", "positions", "mask"))):
        filled, owner = sum(lengths[c] for c in row), i // 10_000
        assert i[:filled].tolist() == [id for c in row for id in ids[c]]
        assert torch.equal(p[:filled], i[:filled] % 10_000)
        followed = owner[:filled] == torch.cat([owner[1:], torch.zeros(1)])[:filled]
        assert torch.equal(y[:filled], torch.where(followed, i[:filled] + 1, IGNORE))
        assert (y[filled:] == IGNORE).all() and mask.any(-1).all()  # an empty softmax would be NaN
        assert torch.equal(mask[0], (owner[:, None] == owner).tril())


def reference_varlen_attention(q, k, v, starts, _, longest, __, *, window_size, enable_gqa):
    """What the CUDA kernel promises, on (tokens, heads, D): causal attention within each sequence."""
    parts = []
    for a, b in zip(starts.tolist(), starts.tolist()[1:]):
        assert a <= b <= a + longest and window_size == (-1, 0)
        q1, k1, v1 = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
        y = torch.nn.functional.scaled_dot_product_attention(
            q1, k1, v1, is_causal=True, enable_gqa=enable_gqa
        )
        parts.append(y[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("kernel", ["by blocks", "sequence by sequence", "a stand-in for CUDA's"])
@pytest.mark.parametrize("groups", [4, 2])
def test_sequences_give_what_the_mask_gives(groups, kernel, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "is_blocked", lambda *_: kernel == "by blocks")
    if kernel == "a stand-in for CUDA's":
        monkeypatch.setitem(attention.VARLEN, "cpu", reference_varlen_attention)
    dataset = prepared(tokenizer, tmp_path / "data")
    model = small_model(max_position_embeddings=256, num_key_value_heads=groups)
    rows = [
        [dataset[c] for c in row]
        for row in PackedLoader(dataset, row_length=256, rows_per_step=4, seed=0).rows[-3:]
    ] + [[]]
    found = []
    for varlen in (False, True):
        batch = collate(rows, 256, varlen=varlen)
        assert ("mask" in batch) != varlen and ("cu_seqlens" in batch) == varlen
        loss = model(**batch)
        loss.backward()
        found.append((loss, model(**{**batch, "targets": None}), [p.grad for p in model.parameters()]))
        model.zero_grad()
    (loss, logits, gradients), (loss2, logits2, gradients2) = found
    torch.testing.assert_close(loss2, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits2, logits, atol=1e-5, rtol=0)
    assert all((g2 - g).norm() <= 1e-5 * g.norm() for g, g2 in zip(gradients, gradients2))


def gradients(folder, size: int, ranks: Ranks) -> tuple[dict, int]:
    """Of the first step on a dataset's rows, eight of them, and how many targets this rank has of it."""
    loader = PackedLoader(SFTDataset(folder), row_length=64, rows_per_step=8, seed=4)
    model = small_model()
    rows = loader.step_rows(0)
    batches, targets = list(loader.micro_batches(rows, size, ranks)), loader.count(rows)[1]
    forward_backward(wrap(model, ranks, "false"), batches, targets=targets, max_grad_norm=0.0, ranks=ranks)
    assert targets == ranks.sum(sum(targets_in(batch) for batch in batches))[0]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return gradients, sum(int(targets_in(batch)) for batch in batches)


def gradients_of_a_rank(rank: int, folder) -> None:
    """Leaves them in a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(gradients(folder / "train", 2, Ranks(rank, 2, torch.device("cpu"))), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_gradients_are_the_same_for_any_micro_batch_and_for_two_ranks_of_unequal_targets(tokenizer, tmp_path):
    folder = tmp_path / "data"
    prepared(tokenizer, folder)
    expected, targets = gradients(folder / "train", 8, ALONE)
    found = [gradients(folder / "train", size, ALONE)[0] for size in (4, 2, 1)]
    second = multiprocessing.get_context("spawn").Process(target=gradients_of_a_rank, args=(1, folder))
    second.start()
    gradients_of_a_rank(0, folder)
    second.join()
    (zero, n), (one, m) = (torch.load(folder / f"{rank}.pt") for rank in (0, 1))
    assert n != m and n + m == targets
    for other in (*found, zero, one):
        for name, g in expected.items():
            assert (other[name] - g).norm() <= 1e-6 * g.norm(), name


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("order")
    rows = ((conversation(i, turns=1 + i % 3)["messages"], f"row {i}") for i in range(60))
    sft.prepare_conversations(folder, rows, tokenizer, max_length=200, val_fraction=0.1)
    return sft.SFTDataset(folder / "train")


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**32), STRETCHES)
def test_any_stops_and_changes_of_ranks_read_each_conversation_once_an_epoch(dataset, batch, seed, stretches):
    epochs, read, loader = 2, {}, PackedLoader(dataset, row_length=200, rows_per_step=batch, seed=seed)
    for step, world, size in steps_of(stretches, epochs * loader.steps_per_epoch):
        if step in read:  # a run that goes on has a loader of its own
            loader = PackedLoader(dataset, row_length=200, rows_per_step=batch, seed=seed)
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
