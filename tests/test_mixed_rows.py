"""Fine-tuning on a mix of sources."""

import dataclasses
import math
import shutil
from collections import Counter

import planted
import pytest
import torch
from conftest import assert_recovered, conversation, flags, losses, refused, run, sft_config, write_jsonl
from properties import few, given, st

import sft
import sft_gpt
from common import InputError, read_records
from distributed import Ranks
from mixed_rows import MixedLoader, data_sources, for_each
from mixture import parse_sources

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
        sft.PackedLoader(dataset, row_length=T, rows_per_step=rows_per_step, seed=seed + i)
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
        assert tokens == expected and targets == loader.count_targets(rows)
        assert loader.count_tokens(rows) == sum(len(datasets[s][c][0]) for row in rows for s, c in row)


def test_a_mix_is_as_full_as_its_sources_are(datasets):
    loader = mixed_loader(datasets, (1, 1), 4, 0)
    tokens = sum(int(dataset.offsets[-1]) for dataset in datasets)
    assert loader.fill() == pytest.approx(tokens / (sum(loader.sizes) * T))


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
    assert "  talk.jsonl    25.00% of the tokens; " in printed and "  facts.jsonl   75.00%" in printed
    own = [row["val_loss/talk.jsonl"], row["val_loss/facts.jsonl"]]
    assert min(own) < row["val_loss"] < max(own) and 0 < row["val_accuracy"] < 1
    assert 0 < row["epochs/talk.jsonl"] < row["epochs/facts.jsonl"]
    card = (tmp_path / "step_0000006" / "README.md").read_text()
    assert "on 25.00% the conversations of talk.jsonl; 75.00% the conversations of facts.jsonl." in card


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
