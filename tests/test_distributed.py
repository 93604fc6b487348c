"""Ranks, devices, signals."""

import multiprocessing
import os
import platform
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import ALONE, ROOT

import distributed
from common import InputError, end_rank
from distributed import Ranks
from sharding import wrap


def in_ranks(target, folder, world: int = 2, seconds: float = 240) -> list[int | None]:
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
    os.environ["WORLD_SIZE"] = str(world)
    end_rank(0)  # as run_script ends a rank


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_rank_0_computes_or_refuses_is_known_to_all(tmp_path):
    assert in_ranks(ask_rank_0, tmp_path, world=3) == [0, 0, 0]
    assert (tmp_path / "computed").read_text() == "0 "


def ask_without_a_group(ranks: Ranks, _) -> None:
    ranks.barrier()
    dist.destroy_process_group()
    assert ranks.from_main(lambda: time.sleep(0.2) or 7) == 7


@pytest.mark.slow
def test_the_others_wait_for_rank_0_without_a_collective_operation_which_would_time_out(tmp_path):
    assert in_ranks(ask_without_a_group, tmp_path) == [0, 0]


def test_an_answer_may_be_larger_than_a_value_of_torch_s_store():
    main = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    other = dist.TCPStore("127.0.0.1", main.port, 2, wait_for_workers=False)
    answer = {"text": "é" * 2_000_000}  # 12 MB as JSON
    assert Ranks(0, 2, torch.device("cpu"), main).from_main(lambda: answer) == answer
    assert Ranks(1, 2, torch.device("cpu"), other).from_main(lambda: None) == answer


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


# -- slow ranks ----------------------------------------------------------------------------------------------


def work_at_two_speeds(ranks: Ranks, folder) -> None:
    """Steps of nothing, in which rank 1 sleeps; all ranks ask after each."""
    assert ranks.each(ranks.rank + 0.5) == [0.5, 1.5, 2.5]
    answers = [ranks.slow_one()]  # nothing is measured yet
    for _ in range(2):
        ranks.own_work.begin()
        time.sleep(2.0 if ranks.rank == 1 else 0.01)
        ranks.own_work.end()
        ranks.own_work.end()  # as after a second micro-batch
        ranks.barrier()
        assert len(ranks.own_work.spans) == 1
        answers.append(ranks.slow_one())
    answers.append(ranks.slow_one())  # each step is counted once
    assert answers[:2] == [None, None] and answers[3] is None and (answers[2] is None) != ranks.is_main
    if ranks.is_main:
        (folder / "told").write_text(answers[2])
    ranks.leave()


@pytest.mark.slow
def test_rank_0_tells_which_rank_is_slow_and_its_host(tmp_path):
    assert in_ranks(work_at_two_speeds, tmp_path, world=3) == [0, 0, 0]
    assert (tmp_path / "told").read_text().startswith(f"rank 1 on {os.uname().nodename} is slow: ")


def test_a_rank_is_slow_that_takes_a_fifth_more_than_the_median_twice_in_a_row(monkeypatch):
    for first, second, slow in (
        ([1.0, 1.21], [1.0, 1.21], 1),
        ([1.0, 1.21], [1.0, 1.19], None),
        ([1.0, 1.19], [1.0, 1.21], None),
        ([1.0, 9.0], [9.0, 1.0], None),
        ([2.0, 1.0, 1.0], [2.0, 1.0, 1.0], 0),
        ([0.0, 0.0], [0.0, 0.0], None),
    ):
        ranks = Ranks(0, len(first), torch.device("cpu"), store=dist.HashStore())
        for rank in range(ranks.world):
            ranks.store.set(f"host of rank {rank}", f"node{rank}")
        answers = iter((first, second))
        monkeypatch.setattr(ranks, "each", lambda value, answers=answers: next(answers))
        assert ranks.slow_one() is None
        told = ranks.slow_one()
        assert (told is None) if slow is None else told.startswith(f"rank {slow} on node{slow} is slow")


def test_a_gpus_own_work_is_read_from_its_events_and_only_once_they_are_done(monkeypatch):
    class Event:
        made = 0

        def __init__(self, enable_timing):
            assert enable_timing
            Event.made, self.at, self.done = Event.made + 1, None, True

        def record(self):
            self.at = Event.made**2

        def query(self):
            return self.done

        def elapsed_time(self, end):
            return float(end.at - self.at)  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    work = distributed.OwnWork(torch.device("cuda:0"))
    for _ in range(2):
        work.begin()
        work.end()
    last = work.spans[-1][1]
    last.done = False
    assert work.take() == 0.003 and work.take() == 0.0  # 2 x 2 - 1 x 1
    last.done = True
    assert work.take() == 0.007  # 4 x 4 - 3 x 3


# -- a hang --------------------------------------------------------------------------------------------------

HANG = """
import sys, threading, torch, torch.distributed as dist
from distributed import Watchdog, set_flight_recorder

backend, folder = sys.argv[1:]
if backend == "nccl":
    set_flight_recorder(folder)
dist.is_initialized, dist.get_backend = lambda: True, lambda: backend
torch._C._distributed_c10d._dump_nccl_trace = lambda: b"what NCCL knows"
Watchdog(3, 8, 0.1)
threading.Event().wait()
"""


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_a_rank_that_hangs_leaves_its_stacks_and_under_nccl_its_flight_record(backend, tmp_path):
    command = [sys.executable, "-c", HANG, backend, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert ended.returncode == 1 and "error: rank 3 of 8 has made no progress for 0 s" in ended.stderr
    assert 'File "<string>", line 1' in ended.stderr  # where it hangs
    records = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert records == ({"nccl_trace_rank_3": b"what NCCL knows"} if backend == "nccl" else {})
    told = f"is {tmp_path}/nccl_trace_rank_3; `torchfrtrace --prefix=nccl_trace_rank_ {tmp_path}`"
    assert (told in ended.stderr) == (backend == "nccl")


RECORDER = [*distributed.RECORDED, *distributed.RECORD_FILES, "TORCH_NCCL_DUMP_ON_TIMEOUT"]


@pytest.fixture
def no_recorder(monkeypatch):
    for name in RECORDER:
        monkeypatch.setenv(name, "")  # so that it is unset again afterwards
        monkeypatch.delenv(name)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_ranks_that_join_over_nccl_record_their_operations(device, monkeypatch, tmp_path, no_recorder):
    seen = {}

    def init_process_group(backend, **options):
        seen.update(backend=backend, **{name: os.environ.get(name) for name in RECORDER})

    monkeypatch.setattr(distributed, "usable_device", lambda name: torch.device(device))
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    monkeypatch.setenv("WORLD_SIZE", "2")
    distributed.join_ranks("auto", tmp_path)
    files, gpu = f"{tmp_path}/nccl_trace_rank_", device != "cpu"
    assert seen == {
        "backend": "nccl" if gpu else "gloo",
        **dict(zip(RECORDER, ["2000", "2000", files, files, "1"] if gpu else [None] * 5)),
    }


@pytest.mark.parametrize(
    ("device", "shard", "local", "words"),
    [
        ("cpu", "hybrid", "2", "3 ranks in all are no multiple of the 2 on this one.* use --shard=full"),
        ("cpu", "hybrid", "4", "3 ranks in all are no multiple of the 4 on this one"),
        ("meta", "none", "3", "3 ranks cannot train together on --device=meta; start one"),
    ],
)
def test_ranks_that_cannot_train_together_are_told_before_they_join(device, shard, local, words, monkeypatch):
    monkeypatch.setattr(dist, "rendezvous", None)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    with pytest.raises(InputError, match=words):
        distributed.join_ranks(device, shard=shard)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="here it can be used")
def test_a_device_that_torch_was_not_built_for_is_one_short_sentence():
    with pytest.raises(InputError, match=r"^--device=mps cannot be used here: .*MPS") as caught:
        distributed.usable_device("mps")
    assert len(str(caught.value)) < 200


def test_what_the_user_has_set_of_the_flight_recorder_stays(monkeypatch, tmp_path, no_recorder):
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "7")  # by the older name
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "/mine/rank")
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    distributed.set_flight_recorder(tmp_path)
    assert [os.environ[name] for name in RECORDER] == ["7", "7", "/mine/rank", "/mine/rank", "0"]


# -- a GPU that cannot be used -------------------------------------------------------------------------------

DRIVERS = {
    "535.104.05": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
    "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n",
    "550.54.14": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.14  Release Build\n",
}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Make this machine one with or without a GPU that torch, of some build, cannot use."""

    def make(*, device: bool = True, driver: str | None = "535.104.05", cuda: str | None = None) -> None:
        if device:
            (tmp_path / "nvidia0").touch()
        if driver:
            (tmp_path / "version").write_text(DRIVERS[driver])
        monkeypatch.setattr(torch.version, "cuda", cuda)

    monkeypatch.setattr(distributed, "DEVICES", tmp_path)
    monkeypatch.setattr(distributed, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return make


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ({}, r"NVIDIA GPU with driver 535\.104\.05, but torch 2\S+, a CPU build, .*; install a CUDA build"),
        (
            {"driver": "550.54.14", "cuda": "13.0"},
            r"driver 550\.54\.14, .* built for CUDA 13\.0, .*; update the",
        ),
        ({"driver": None}, r"a driver that does not tell its version, .*; install a CUDA build"),
        (
            {"device": False, "cuda": "13.0"},
            r"give this process the GPU, .*--gpus=all.*, then update the driver",
        ),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_refused_with_what_it_needs(machine, name, found, sentence):
    machine(**found)
    with pytest.raises(InputError, match=rf"^--device={name}: there is .*{sentence}.*, or use --device=cpu$"):
        distributed.usable_device(name)
    assert distributed.usable_device("cpu").type == "cpu"


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_hiding_the_gpu_means_the_cpu(machine, monkeypatch, visible):
    machine()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert distributed.usable_device("auto").type == "cpu"


def test_naming_a_gpu_that_is_not_there_does_not_mean_the_cpu(machine, monkeypatch):
    machine(cuda="13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(InputError, match=r"cannot use it with CUDA_VISIBLE_DEVICES=7; update"):
        distributed.usable_device("auto")


def test_without_a_gpu_auto_means_the_cpu(machine):
    machine(device=False, driver=None)
    assert distributed.usable_device("auto").type == "cpu"
    with pytest.raises(InputError, match="no CUDA device is visible"):
        distributed.usable_device("cuda")


MEMORY = """
import os
import sys
import torch
from common import keep_freed_memory

def megabytes():
    _, held, of_files, *_ = map(int, open("/proc/self/statm").read().split())  # in pages
    return (held - of_files) * os.sysconf("SC_PAGE_SIZE") // 2**20

if sys.argv[1] == "kept":
    keep_freed_memory()
before = megabytes()
tensor = torch.ones(64 * 2**20)
assert megabytes() >= before + 250
del tensor
print(megabytes() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_what_a_tensor_leaves_is_kept_for_the_next_one():
    left, own = {}, ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    for how in ("kept", "as it is"):
        command = [sys.executable, "-c", MEMORY, how]
        ended = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120
        )
        assert ended.returncode == 0, ended.stderr
        left[how] = int(ended.stdout)
    assert left["kept"] >= 250 and left["as it is"] < 50


@pytest.mark.parametrize(
    ("sent", "status"), [(("INT", "INT"), -2), (("INT", "TERM"), -15), (("TERM",), 75), (("HUP",), 75)]
)
def test_a_signal_is_noted_and_ctrl_c_and_what_torchrun_makes_of_a_second_one_end_the_process(sent, status):
    program = (
        "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\nfrom distributed import StopSignals\n"
        "signals = StopSignals()\n"
        f"for name in {sent}:\n    signal.raise_signal(getattr(signal, 'SIG' + name))\n"
        "raise SystemExit(75 if signals.seen else 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == status, done.stderr


def test_a_hang_up_that_nohup_ignores_stays_ignored():
    program = (
        "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\nfrom distributed import StopSignals\n"
        "signals = StopSignals()\nsignal.raise_signal(signal.SIGHUP)\nassert not signals.seen"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
