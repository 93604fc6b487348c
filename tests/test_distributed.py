"""Ranks, devices, signals."""

import multiprocessing
import time

import pytest
import torch
import torch.distributed as dist
from conftest import ALONE

import distributed
from common import InputError
from distributed import Ranks, wrap


def in_ranks(target, folder, world: int = 2, seconds: float = 60) -> list[int | None]:
    """Run target(ranks, folder) in so many new processes joined over gloo; their exit codes, None for one
    that hung and was killed."""
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=one_of, args=(target, rank, world, folder)) for rank in range(world)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def one_of(target, rank: int, world: int, folder) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    target(Ranks(rank, world, torch.device("cpu"), store), folder)


def train_and_leave(ranks: Ranks, folder) -> None:
    """As a run ends: a last sum, and the model and the process group are gone at once; a hundred times."""
    for i in range(100):
        module = wrap(torch.nn.Linear(4, 4), ranks, "false")
        module(torch.ones(2, 4)).sum().backward()
        assert ranks.sum(1.0, torch.tensor(2.0)) == [2.0, 4.0]
        del module
        ranks.leave()
        store = dist.FileStore(str(folder / f"store {i}"), ranks.world)
        dist.init_process_group("gloo", store=store, rank=ranks.rank, world_size=ranks.world)
    ranks.leave()


def test_ranks_that_leave_right_after_their_last_step_neither_hang_nor_abort(tmp_path):
    """When the wrapped model outlives `leave`, about one of ten runs of three ranks hangs."""
    assert in_ranks(train_and_leave, tmp_path) == [0, 0]


def ask_rank_0(ranks: Ranks, folder) -> None:
    def compute():
        (folder / "computed").open("a").write(f"{ranks.rank} ")
        time.sleep(1.0)
        return {"n": [1, None, "two"]}

    assert ranks.from_main(compute) == {"n": [1, None, "two"]}
    assert ranks.from_main(lambda: None) is None

    def fail():
        raise InputError(f"rank {ranks.rank} says no")

    with pytest.raises(InputError if ranks.is_main else SystemExit, match=r"rank 0 says no|1"):
        ranks.from_main(fail)
    ranks.leave()


def test_what_rank_0_computes_or_refuses_is_known_to_all(tmp_path):
    assert in_ranks(ask_rank_0, tmp_path, world=3) == [0, 0, 0]
    assert (tmp_path / "computed").read_text() == "0 "


def test_alone_rank_0_is_asked_without_a_store():
    assert ALONE.from_main(lambda: [1]) == [1] and ALONE.any(True) and not ALONE.any(False)


def test_a_rank_that_does_not_see_what_rank_0_wrote_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed.time, "sleep", lambda seconds: None)
    Ranks(0, 2, torch.device("cpu")).require_shared(tmp_path / "report.json")
    with pytest.raises(InputError, match=r"rank 1 does not see .*report\.json.*one folder"):
        Ranks(1, 2, torch.device("cpu")).require_shared(tmp_path / "report.json")


def test_ranks_share_a_steps_items_and_even_shares_have_one_shape():
    for world in (1, 2, 3, 5):
        for n in (1, 2, 7, 16):
            for size in (1, 2, 4):
                for most in (0, n + 1):
                    shares = {
                        even: [
                            Ranks(rank, world, torch.device("cpu"), even_batches=even).share(
                                range(n), size, most=most
                            )
                            for rank in range(world)
                        ]
                        for even in (False, True)
                    }
                    for own in shares.values():
                        items = [[i for batch in share for i in batch if i is not None] for share in own]
                        assert items == [list(range(n))[rank::world] for rank in range(world)]
                        assert all(0 < len(batch) <= size for share in own for batch in share)
                    assert len({(len(share), *map(len, share)) for share in shares[True]}) == 1
                    assert len({len(batch) for share in shares[True] for batch in share}) == 1
                    rows = sum(len(batch) for batch in shares[True][0])
                    assert rows < max(most, n) / world + 1 + len(shares[True][0])  # little padding
