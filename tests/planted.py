"""Faults planted in a training run, and runs in forked processes, which start in no time.

    python planted.py raise:3:1 pretrain_gpt --data_dir=data --out_dir=out     # under torchrun, too

A fault is kind:step:rank or kind:step:rank:restart. It happens on that rank within the second micro-batch of
that step, or of each in a range like 5-9, in the first start that torchrun makes or in that restart.
"""

import atexit
import hashlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import torch

import dpo_gpt
import pretrain_gpt
import sft_gpt
from common import read_records, run_script
from distributed import Ranks
from gpt import GPTModel
from metrics import Metrics
from optim import Muon
from training import StepHistory

SCRIPTS = {script.__name__: script for script in (pretrain_gpt, sft_gpt, dpo_gpt)}


def fail():
    raise RuntimeError(f"planted in rank {os.environ.get('RANK', 0)}")


def run_out_of_memory():
    raise torch.OutOfMemoryError("planted")


def send(*numbers: int):
    for number in numbers:
        os.kill(os.getpid(), number)


ACTIONS = {
    "raise": fail,
    "memory": run_out_of_memory,
    "sleep": lambda: time.sleep(600),
    "slow": lambda: time.sleep(0.5),
    "twice": lambda: send(signal.SIGINT, signal.SIGINT),
    **{name: lambda name=name: send(signal.Signals[name]) for name in ("SIGKILL", "SIGSTOP")},
    **{name: lambda name=name: send(signal.Signals[name]) for name in ("SIGTERM", "SIGINT", "SIGUSR1")},
}
FACTORS = {"nan": float("nan"), "spike": 1000.0}  # of a micro-batch's loss


def plant(*faults: str) -> None:
    """Plant faults in this process, before it trains."""
    rank, restart = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    planned = {}
    for fault in faults:
        kind, steps, *where = fault.split(":")
        first, _, last = steps.partition("-")
        if (where + ["0"])[:2] == [rank, restart]:
            planned |= {f"step {step}": kind for step in range(int(first), int(last or first) + 1)}
    at, forward, now = Ranks.at, GPTModel.forward, {"place": None, "micro": 0}

    def noted_at(self, place):
        now.update(place=place, micro=0)
        at(self, place)

    def faulty_forward(self, *arguments, **named):
        now["micro"] += 1
        kind = planned.get(now["place"]) if now["micro"] == 2 else None
        if kind in ACTIONS:
            ACTIONS[kind]()
        loss = forward(self, *arguments, **named)
        return loss * FACTORS[kind] if kind in FACTORS else loss

    Ranks.at, GPTModel.forward = noted_at, faulty_forward


def record_weights(out_dir: Path) -> None:
    """Have each rank append a hash of its weights to out_dir/weights-RANK.txt after every update."""
    original, models = Muon.step, []
    GPTModel.init_weights = noting(GPTModel.init_weights, models)

    def step(self, *arguments, **named):
        original(self, *arguments, **named)
        digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in models[-1].parameters()))
        with open(out_dir / f"weights-{os.environ.get('RANK', 0)}.txt", "a") as file:
            file.write(digest.hexdigest() + "\n")

    Muon.step = step


def read_late(_: Path) -> None:
    """Have what came of a step read after the next one, as on a GPU."""
    original = StepHistory.__init__

    def late(self, *arguments, **named):
        original(self, *arguments, **named)
        self.lag = 1

    StepHistory.__init__ = late


def read_late_and_record_weights(out_dir: Path) -> None:
    read_late(out_dir)
    record_weights(out_dir)


def noting(method, models: list):
    """A method that also notes the model it is called on."""

    def noted(self):
        models.append(self)
        return method(self)

    return noted


def flags(config) -> list[str]:
    """A Config as command-line flags; of pretraining those that were given."""
    return [f"--{name}={getattr(config, name)}" for name in getattr(config, "given", vars(config))]


def start(script: str, config, world: int, rank: int, port: int, faults, log: int, prepare) -> int:
    """Fork one rank of a run; its process id. The log, a file's descriptor, gets all it prints."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        atexit._clear()  # what the tests' process has registered is not this one's to do
        if world > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
            store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in (place | store).items()})
        Metrics.plot = lambda self: None  # most of such a short run's time
        plant(*faults)
        if prepare:
            prepare(Path(config.out_dir))
        sys.argv = [script, *flags(config)]
        run_script(SCRIPTS[script].main, SCRIPTS[script].Config)
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # as the interpreter does: the checkpoint being written is finished
        sys.stdout.flush()
        os._exit(status)


def launch(script: str, config, world: int = 1, faults=(), log: int | None = None, prepare=None) -> list[int]:
    """Fork all ranks of a run; their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = os.open(os.devnull, os.O_WRONLY) if log is None else log
    return [start(script, config, world, rank, port, faults, log, prepare) for rank in range(world)]


def finish(pids: list[int], seconds: float, grace: float = 2.0) -> list[int]:
    """Wait for all ranks, as torchrun does: once one has failed the others get SIGTERM, and after the grace
    SIGKILL. Their statuses, negative for a signal; all are killed after so many seconds."""
    codes, deadline, told = {}, time.monotonic() + seconds, False
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        running = set(pids) - set(codes)
        if not told and any(codes.values()):
            told, deadline = True, min(deadline, time.monotonic() + grace)
            for pid in running:
                os.kill(pid, signal.SIGTERM)
        if time.monotonic() > deadline:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def wait_for_rows(metrics: Path, steps: int, seconds: float = 30) -> None:
    """Until a run that was just started has recorded so many more steps than there were."""
    until, first = time.monotonic() + seconds, None
    while time.monotonic() < until:
        rows = read_records(metrics)
        now = rows[-1]["step"] if rows else 0
        first = min(now, now if first is None else first)  # rows beyond the checkpoint are dropped
        if now >= first + steps:
            return
        time.sleep(0.005)


def forked(script: str, config, world: int = 1, faults=(), prepare=None, grace: float = 2) -> tuple:
    """Run a script to its end; the statuses of its ranks, what they printed, and how long it took."""
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    path = Path(config.out_dir) / "log.txt"
    log, began = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), time.monotonic()
    codes = finish(launch(script, config, world, faults, log, prepare), 60, grace)
    os.close(log)
    return codes, path.read_text(), time.monotonic() - began


if __name__ == "__main__":
    plant(*sys.argv[1].split(","))
    sys.argv[:3] = [sys.argv[2]]
    run_script(SCRIPTS[sys.argv[0]].main, SCRIPTS[sys.argv[0]].Config)
