"""The look at the machines: each failure is a sentence that names the host."""

import copy
import re

import pytest
import torch
from conftest import ALONE
from test_distributed import in_ranks

import preflight
from preflight import Config, failures


def fact(rank: int) -> dict:
    return {
        "who": f"rank {rank} on host{rank}",
        "device": "H100",
        "versions": {"Python": "3.11", "torch": "2.13.0"},
        "unwritable": "",
        "seen": True,
        "data": "abc",
        "free": 10**11,
        "seconds": 0.010,
    }


def test_equal_ranks_have_no_failure_nor_have_cpus_that_others_use_too():
    facts = [fact(rank) for rank in range(4)]
    assert failures(facts, 5.0, Config(min_bandwidth=1.0)) == []
    facts = [one | {"device": "CPU", "seconds": 0.01 * (1 + 9 * rank)} for rank, one in enumerate(facts)]
    assert failures(facts, 5.0, Config(min_bandwidth=1.0)) == []


PLANTED = {
    "version": ({"versions": {"Python": "3.11", "torch": "2.12.0"}}, r"has torch 2\.12\.0 \(not 2\.13\.0\)"),
    "device": ({"device": "A100"}, "has a A100, rank 0 on host0 a H100"),
    "unwritable": ({"unwritable": "Read-only file system"}, r"cannot write to .*Read-only file system"),
    "unshared": ({"seen": False}, "does not see what rank 0 on host0 wrote"),
    "data": ({"data": "xyz"}, "does not see the same files"),
    "slow": ({"seconds": 0.030}, r"needs 30\.0 ms for a matrix product, the median is 10\.0"),
    "broken": ({"seconds": float("inf")}, "a wrong matrix product"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_rank_that_is_unlike_the_others_is_one_sentence_with_its_host(what):
    changes, words = PLANTED[what]
    facts = [fact(rank) for rank in range(4)]
    facts[2].update(copy.deepcopy(changes))
    (sentence,) = failures(facts, 5.0, Config())
    assert sentence.startswith("rank 2 on host2 ") and re.search(words, sentence), sentence


def test_the_data_of_a_mix_are_compared_by_what_lies_in_its_folders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train_000000.bin").write_bytes(b"1234")
    for data in (f"{tmp_path}/a", f"{tmp_path}/b:1,{tmp_path}/a:0"):
        before = preflight.seen_data(data)
        with open(tmp_path / "a" / "train_000000.bin", "ab") as file:
            file.write(b"5")
        assert preflight.seen_data(data) != before
    assert preflight.seen_data("some/dataset:1,other/dataset:2")


def test_a_slow_network_is_one_sentence():
    (sentence,) = failures([fact(0), fact(1)], 0.5, Config(min_bandwidth=1.0))
    assert "0.50 GB/s, less than 1" in sentence


def test_a_product_with_a_wrong_number_is_told_from_a_right_one(monkeypatch):
    assert preflight.product_seconds(torch.device("cpu")) < 60
    right = torch.Tensor.__matmul__

    def wrong(a, b):
        product = right(a, b)
        if product.dtype == torch.float32:
            product[-1, -1] += torch.rand(())
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    assert preflight.product_seconds(torch.device("cpu")) == float("inf")


def plant_and_look(ranks, folder) -> None:
    """Rank 1 has other packages and another folder under the run's name, as on a disk of its own."""
    out_dir, data = folder / "shared", folder / "data"
    if not ranks.is_main:
        preflight.version = lambda name: "0.0.1"
        out_dir = folder / "own"
    config = Config(data=str(data), out_dir=str(out_dir), slow_factor=1e9)
    found = failures(preflight.look(config, ranks), preflight.bandwidth(ranks), config)
    assert len(found) == 2 and "torch 0.0.1" in found[0] and "does not see what rank 0" in found[1], found
    assert all(sentence.startswith("rank 1 on ") for sentence in found)
    assert not list(out_dir.iterdir())
    ranks.leave()


@pytest.mark.slow
def test_over_gloo_other_versions_and_an_unshared_folder_are_found_and_nothing_is_left(tmp_path):
    (tmp_path / "data").mkdir()
    assert in_ranks(plant_and_look, tmp_path) == [0, 0]


def test_alone_nothing_fails_and_a_folder_that_is_a_file_does(tmp_path):
    config = Config(data=str(tmp_path), out_dir=str(tmp_path / "run"))
    assert failures(preflight.look(config, ALONE), 0.0, config) == []
    (tmp_path / "file").write_text("")
    config = Config(data=str(tmp_path), out_dir=str(tmp_path / "file"))
    (sentence,) = failures(preflight.look(config, ALONE), 0.0, config)
    assert "cannot write to" in sentence
