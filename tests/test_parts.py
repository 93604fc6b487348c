"""Several processes that prepare one source."""

import json
import multiprocessing
import random
import shutil
import subprocess
import sys
import time

import pytest
from conftest import (
    ROOT,
    TEXTS,
    contents,
    kill_tree,
    prepare,
    prepare_config,
    read_documents,
    read_ids,
    refused,
    run,
    write_jsonl,
)

import prepare_data
import shards
from common import InputError
from data import TokenLoader, verified_shards
from prepare_data import prepare_share, started_part

FILES = 5  # the third is empty


@pytest.fixture(scope="module")
def crawl(tmp_path_factory):
    """A folder of files, each of which is another crawl."""
    folder = tmp_path_factory.mktemp("crawl")
    for number in range(FILES):
        texts = [] if number == 2 else TEXTS[number * 8 : number * 8 + 8]
        write_jsonl(folder / f"{number}.jsonl", ({"text": text} for text in texts))
    return folder


def divided(out_dir, source, tokenizer, every, order=None, **changes):
    """Prepare by so many processes, one after the other."""
    for number in order or range(every):
        config = prepare_config(out_dir, source, tokenizer, part=f"{number + 1}/{every}", **changes)
        prepare_data.main(config)
    return out_dir


def data_of(folder) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if not name.endswith(".lock")}


def test_any_number_of_processes_in_any_order_makes_the_same_folder(
    crawl, tokenizer, tokenizer_dir, tmp_path
):
    one = divided(tmp_path / "one", crawl, tokenizer_dir, 1)
    for every in (2, 3, 7):  # of seven two have no file
        order = random.Random(every).sample(range(1, every), every - 1)
        several = divided(tmp_path / str(every), crawl, tokenizer_dir, every, [0, *order])
        assert data_of(several) == data_of(one)
    alone = prepare(tmp_path / "alone", crawl, tokenizer_dir)
    for split in ("train", "val"):  # a shard ends where a file ends, else nothing differs from one process
        assert read_ids(one, split) == read_ids(alone, split)
    documents = read_documents(one, "train", tokenizer) + read_documents(one, "val", tokenizer)
    expected = [text for number in (0, 1, 3, 4) for text in TEXTS[number * 8 : number * 8 + 8]]
    assert sorted(documents) == sorted(expected)
    manifest = json.loads((one / "manifest.json").read_text())
    assert manifest["splits"]["train"]["documents"] + manifest["splits"]["val"]["documents"] == 32
    assert not (one / "parts").exists() and manifest["files"] == FILES
    assert verified_shards(one).keys() == {shard["file"] for shard in manifest["shards"]}


def test_a_tokenizer_is_trained_once_on_the_whole_source(crawl, tmp_path, monkeypatch):
    trained, original = [], shards.train_tokenizer
    monkeypatch.setattr(shards, "train_tokenizer", lambda *given: trained.append(1) or original(*given))
    made = [
        divided(tmp_path / str(every), crawl, "train", every, vocab_size=300, max_tokens=0)
        for every in (1, 3)
    ]
    assert data_of(made[0]) == data_of(made[1]) and len(trained) == 2


def test_with_max_tokens_the_data_end_with_the_file_that_reaches_them(crawl, tokenizer_dir, tmp_path):
    whole = divided(tmp_path / "whole", crawl, tokenizer_dir, 1)
    most = len(read_ids(whole, "train")) // 2
    some = [divided(tmp_path / str(n), crawl, tokenizer_dir, n, max_tokens=most) for n in (1, 2, 3)]
    assert data_of(some[0]) == data_of(some[1]) == data_of(some[2])
    ids, every = read_ids(some[0], "train"), read_ids(whole, "train")
    assert most // 2 < len(ids) < len(every) and every[: len(ids)] == ids


def stopped_after(monkeypatch, name: str, count: int):
    """The count-th call of a function of prepare_data.py never comes back."""

    class Killed(BaseException):
        pass

    calls, original = [], getattr(prepare_data, name)

    def once(*given, **options):
        calls.append(1)
        if len(calls) == count:
            raise Killed
        return original(*given, **options)

    monkeypatch.setattr(prepare_data, name, once)
    return Killed


@pytest.mark.parametrize(
    ("name", "count"), [("prepare_folder", 3), ("write_json", 1), ("write_json", 2), ("sync_to_disk", 1)]
)
def test_a_process_that_dies_at_a_file_or_amid_the_joining_goes_on(
    name, count, crawl, tokenizer_dir, tmp_path, monkeypatch
):
    undisturbed = divided(tmp_path / "undisturbed", crawl, tokenizer_dir, 1)
    with monkeypatch.context() as patch:
        killed = stopped_after(patch, name, count)
        with pytest.raises(killed):
            divided(tmp_path / "out", crawl, tokenizer_dir, 2)
    refused("holds parts of a preparation by several", prepare, tmp_path / "out", crawl, tokenizer_dir)
    divided(tmp_path / "out", crawl, tokenizer_dir, 3)  # also by another number of processes
    assert data_of(tmp_path / "out") == data_of(undisturbed)


def test_parts_with_another_tokenizer_are_not_joined_by_its_name(crawl, tokenizer_dir, tmp_path):
    out = divided(tmp_path / "out", crawl, tokenizer_dir, 2, [0])
    for tokenizer, told in ((str(tokenizer_dir) + "/", "tokenizer="), ("train", "tokenizer=.*'train' here")):
        told += ".*; choose another --out_dir or delete it"
        refused(told, divided, out, crawl, tokenizer, 2, [1], vocab_size=300)
    divided(out, crawl, tokenizer_dir, 2, [1])
    assert json.loads((out / "manifest.json").read_text())["tokenizer"] == str(tokenizer_dir)


def test_parts_with_other_flags_or_of_another_list_of_files_are_not_joined(crawl, tokenizer_dir, tmp_path):
    out = divided(tmp_path / "flags", crawl, tokenizer_dir, 2, [0])
    told = r"000000 was made otherwise \(val_fraction=.* there, 0.3 here\); delete .* with the same flags"
    refused(told, divided, out, crawl, tokenizer_dir, 2, [1], val_fraction=0.3)
    assert not (out / "manifest.json").exists()
    grown = shutil.copytree(crawl, tmp_path / "grown")
    (grown / "4.jsonl").unlink()
    (grown / "1.jsonl").rename(tmp_path / "later.jsonl")
    out = divided(tmp_path / "files", grown, tokenizer_dir, 2, [0])
    (tmp_path / "later.jsonl").rename(grown / "1.jsonl")
    refused("was made otherwise .part='1/3' there, '1/4' here", divided, out, grown, tokenizer_dir, 2, [1])
    assert not (out / "manifest.json").exists()


def test_who_is_still_at_work_when_others_have_joined_the_data_stops(
    crawl, tokenizer_dir, tmp_path, monkeypatch
):
    """The third of three is at its first file while the first two reach max_tokens."""
    whole = divided(tmp_path / "whole", crawl, tokenizer_dir, 1)
    most = len(read_ids(whole, "train")) // 3
    some = divided(tmp_path / "some", crawl, tokenizer_dir, 1, max_tokens=most)
    out, original, prepared = tmp_path / "out", prepare_data.prepare_folder, []
    divided(out, crawl, tokenizer_dir, 5, [0], max_tokens=most)

    def prepare_folder(*given):
        prepared.append(given)
        original(*given)
        monkeypatch.setattr(prepare_data, "prepare_folder", original)
        divided(out, crawl, tokenizer_dir, 5, [1], max_tokens=most)
        monkeypatch.setattr(prepare_data, "prepare_folder", prepare_folder)

    monkeypatch.setattr(prepare_data, "prepare_folder", prepare_folder)
    divided(out, crawl, tokenizer_dir, 3, [2], max_tokens=most)  # of files 2 and 5
    assert len(prepared) == 1 and data_of(out) == data_of(some)
    prepare_data.remove_parts(out, range(3))  # nothing is there any more
    assert data_of(out) == data_of(some)


@pytest.mark.slow
def test_torchrun_divides_the_files_and_killed_ranks_go_on(crawl, tokenizer_dir, tmp_path):
    undisturbed = divided(tmp_path / "undisturbed", crawl, tokenizer_dir, 1)
    flags = [
        f"--{name}={value}"
        for name, value in vars(prepare_config(tmp_path / "out", crawl, tokenizer_dir)).items()
    ]
    job = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(ROOT / "prepare_data.py"), *flags],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while job.poll() is None and not (tmp_path / "out" / "parts").exists():
        time.sleep(0.01)
    if job.poll() is None:
        kill_tree(job)
    done = run("prepare_data.py", *flags, ranks=2)
    assert done.returncode == 0, done.stderr
    assert data_of(tmp_path / "out") == data_of(undisturbed)


def prepare_at_once(config, barrier):
    barrier.wait()
    prepare_share(config)


@pytest.mark.slow
def test_processes_that_finish_at_the_same_time_join_once(crawl, tokenizer_dir, tmp_path):
    undisturbed = divided(tmp_path / "undisturbed", crawl, tokenizer_dir, 1)
    context = multiprocessing.get_context("spawn")
    out, barrier = tmp_path / "out", context.Barrier(3)
    configs = [prepare_config(out, crawl, tokenizer_dir, part=f"{n}/3") for n in (1, 2, 3)]
    jobs = [context.Process(target=prepare_at_once, args=(config, barrier)) for config in configs]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert data_of(out) == data_of(undisturbed)


def test_a_damaged_shard_is_made_again_from_its_file_alone(crawl, tokenizer_dir, tmp_path, monkeypatch):
    out = divided(tmp_path / "out", crawl, tokenizer_dir, 2)
    before, read, original = data_of(out), [], shards.rows_by_file

    def noted(*source, share, **place):
        read.append(share)
        return original(*source, share=share, **place)

    monkeypatch.setattr(shards, "rows_by_file", noted)
    (out / "train_000001.bin").write_bytes(b"damaged")
    divided(out, crawl, tokenizer_dir, 2)
    assert data_of(out) == before and len(read) == 1
    (out / "train_000000.bin").write_bytes(b"damaged")
    shutil.copytree(crawl, tmp_path / "other")
    write_jsonl(tmp_path / "other" / "0.jsonl", ({"text": text} for text in TEXTS[8:16]))
    (tmp_path / "other").rename(tmp_path / crawl.name)
    found = "holds another preparation|does not give train_000000.bin again as it was"
    refused(found, divided, out, tmp_path / crawl.name, tokenizer_dir, 2)
    assert not (out / "parts").exists()


def test_a_file_that_changed_since_is_refused_and_bad_rows_are_counted_in_each(
    crawl, tokenizer_dir, tmp_path
):
    source = shutil.copytree(crawl, tmp_path / "source")
    prepare_data.main(prepare_config(tmp_path / "out", source, tokenizer_dir, part="1/2"))
    write_jsonl(source / "0.jsonl", ({"text": text} for text in TEXTS[:9]))
    config = prepare_config(tmp_path / "out", source, tokenizer_dir, part="1/2")
    refused("000000 holds another preparation", prepare_data.main, config)
    write_jsonl(source / "1.jsonl", ({"text": None} for _ in range(9)))
    config = prepare_config(tmp_path / "out", source, tokenizer_dir, part="2/2")
    refused("9 of 9 rows cannot be used.*row 1 of .*1.jsonl", prepare_data.main, config)


@pytest.mark.parametrize("part", ["0/8", "9/8", "3", "a/b", "1/0", "-1/3"])
def test_what_is_no_share_is_refused(part, crawl, tokenizer_dir, tmp_path):
    refused("is no share; expected 1/8", prepare_data.main, prepare_config(
        tmp_path / "out", crawl, tokenizer_dir, part=part
    ))  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_source_without_files_and_a_folder_of_one_process_are_refused(crawl, tokenizer_dir, tmp_path):
    embedded = prepare_config(tmp_path / "out", "embedded", tokenizer_dir, part="1/2")
    refused("embedded has no files that processes could divide", prepare_data.main, embedded)
    out = tmp_path / "begun"
    out.mkdir()
    shards.save_progress(out, {}, shards.Place(3, 3), {})
    config = prepare_config(out, crawl, tokenizer_dir, part="1/2")
    refused("holds a preparation by one process", prepare_data.main, config)


def test_torchrun_and_slurm_arrays_of_any_first_number_name_the_part():
    def slurm(task, first, last, count):
        names = {"ID": task, "MIN": first, "MAX": last, "COUNT": count}
        return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}

    assert started_part({}) == started_part({"RANK": "0", "WORLD_SIZE": "1"}) == ""
    assert started_part({"RANK": "2", "WORLD_SIZE": "8"}) == "3/8"
    assert started_part(slurm(4, 4, 4, 1)) == ""
    assert [started_part(slurm(task, 3, 5, 3)) for task in (3, 4, 5)] == ["1/3", "2/3", "3/3"]
    assert [started_part(slurm(task, 0, 6, 4)) for task in (0, 2, 6)] == ["1/4", "2/4", "4/4"]
    with pytest.raises(InputError, match="have gaps"):
        started_part(slurm(3, 1, 7, 3))


def test_a_process_of_several_says_so_and_what_is_left_for_it(
    crawl, tokenizer_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("RANK", "6")
    monkeypatch.setenv("WORLD_SIZE", "8")
    (tmp_path / "out" / "tokenizer").mkdir(parents=True)
    (tmp_path / "out" / "parts").mkdir()
    prepare_data.main(prepare_config(tmp_path / "out", crawl, tokenizer_dir))
    told = capsys.readouterr().out
    assert f"part 7/8 of {tmp_path}/out, as one of several processes; --part=1/1 prepares all of it" in told
    assert f"part 7/8 has nothing to do, as the source has {FILES} files" in told


def test_a_batch_of_a_run_has_windows_of_every_crawl(crawl, tokenizer_dir, tmp_path):
    """Each file has its own shards. The order of reading mixes them: no shard need be shuffled."""
    out = divided(tmp_path / "out", crawl, tokenizer_dir, 2, val_fraction=1e-9)
    shutil.copy(out / "train_000000.bin", out / "val_000000.bin")
    loader = TokenLoader(out, "train", 16, 2**16)
    windows = loader.step_windows(0, 0, len(loader) // 3)
    shards = {int((loader.ends <= window).sum()) for window in windows}
    assert shards == set(range(len(loader.paths)))
