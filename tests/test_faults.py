"""Runs that are stopped, killed or damaged go on as if nothing had happened."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import planted
import pytest
import torch
from conftest import ROOT, assert_recovered, dpo_config, flags, pretrain_config, sft_config, text, write_jsonl
from test_training import losses, weights

import prepare_data
import pretrain_gpt
import training
from gpt import InputError

SMALL = {"max_steps": 6, "micro_batch_size": 2}  # two micro-batches in a step on each of two ranks


@pytest.fixture(scope="session")
def undisturbed(data_dir, tmp_path_factory, fresh):
    """The folder of a pretraining run of so many ranks that no fault met."""
    done = {}

    def out_dir(world: int, **changes) -> Path:
        key = (world, *changes.items())
        if key not in done:
            done[key] = tmp_path_factory.mktemp("undisturbed")
            config = pretrain_config(data_dir, done[key], **SMALL, **changes)
            codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config, world).result(90)
            assert not any(codes), log
        return done[key]

    return out_dir


# -- kills ---------------------------------------------------------------------------------------------------


def killed_at_random(script: str, config, world: int, kills: int, step_seconds: float) -> Counter:
    """Run a script in forked ranks, of which SIGKILL ends one or all at a random moment of the start or the
    first steps; after so many kills let it finish. How many kills met the run, and how many of them a
    checkpoint half written."""
    moments, counts, metrics = random.Random(0), Counter(), Path(config.out_dir) / "metrics.jsonl"
    for _ in range(kills):
        pids = planted.launch(script, config, world)
        steps = moments.choice([0, 1, 1, 2])
        if steps:
            planted.wait_for_rows(metrics, steps)
        time.sleep(moments.uniform(0, 2 * step_seconds if steps else 0.3))
        alone = world > 1 and moments.random() < 0.5
        for pid in [moments.choice(pids)] if alone else pids:
            os.kill(pid, signal.SIGKILL)
        codes = planted.finish(pids, 60, grace=moments.uniform(0, 0.5))
        counts["kills"] += -signal.SIGKILL in codes
        counts["saving"] += any(Path(config.out_dir).glob(".step_*.partial"))
    counts["failed"] = any(planted.finish(planted.launch(script, config, world), 60))
    return counts


@pytest.mark.parametrize("world", [1, 2], ids=["one rank", "two ranks"])
@pytest.mark.parametrize("script", ["pretrain_gpt", "sft_gpt", "dpo_gpt"])
def test_a_run_killed_at_twenty_moments_equals_an_undisturbed_one(
    script, world, data_dir, base_run, chats, preferences, tmp_path, fresh
):
    def config(name: str):
        changes = {"max_steps": 60, "save_every": 1, "keep_last": 2, "eval_every": 20}
        if script == "pretrain_gpt":
            return pretrain_config(data_dir, tmp_path / name, **changes)
        if script == "dpo_gpt":
            return dpo_config(base_run, preferences, tmp_path / name, **changes)
        return sft_config(base_run, chats, tmp_path / name, **changes)

    codes, log, duration = fresh.submit(planted.forked, script, config("straight"), world).result(90)
    assert not any(codes), log
    counts = fresh.submit(killed_at_random, script, config("killed"), world, 20, duration / 60).result(180)
    print(f"{script}, {world} ranks, {duration:.1f} s undisturbed: {dict(counts)}")
    assert not counts["failed"] and counts["kills"] >= 18, counts
    assert_recovered(tmp_path / "killed", tmp_path / "straight", counts["kills"])
    shutil.rmtree(tmp_path)


# -- signals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
@pytest.mark.parametrize("world", [1, 2], ids=["one rank", "two ranks"])
def test_a_signal_amid_accumulation_finishes_the_step_saves_and_says_resumable(
    name, world, data_dir, tmp_path, fresh, undisturbed
):
    """The last rank alone gets it, between two micro-batches of step 3; all save after that step."""
    config = pretrain_config(data_dir, tmp_path / "run", **SMALL, save_every=100)
    faults, grace = [f"{name}:3:{world - 1}"], 30  # seconds, torchrun's own, for the second rank to end
    codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config, world, faults, None, grace).result(
        90
    )
    assert codes == [training.RESUMABLE] * world == [75] * world, log
    assert log.count("stopped by a signal; the same command continues") == 1
    assert training.newest_checkpoint(tmp_path / "run").name == "step_0000003"
    codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config, world).result(90)
    assert not any(codes) and f"continuing from {tmp_path}/run/step_0000003" in log, log
    shutil.rmtree(tmp_path / "run" / "step_0000003")
    assert_recovered(tmp_path / "run", undisturbed(world, save_every=100), 1)


def test_a_second_ctrl_c_quits_at_once(data_dir, tmp_path, fresh):
    config = pretrain_config(data_dir, tmp_path, **SMALL, save_every=100)
    codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config, 1, ["twice:3:0"]).result(90)
    assert codes == [-signal.SIGINT], log
    assert not training.checkpoints(tmp_path)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGINT"])
def test_torchrun_hands_a_signal_on_and_the_run_saves(name, data_dir, tmp_path, fresh, undisturbed):
    config = pretrain_config(data_dir, tmp_path / "run", **SMALL, save_every=100)
    options = ["--signals_to_handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    slow = "slow:1-6:0,slow:1-6:1"
    with torchrun(slow, config, *options) as job:
        planted.wait_for_rows(tmp_path / "run" / "metrics.jsonl", 2, 120)
        job.send_signal(signal.Signals[name])
        _, errors = job.communicate(timeout=60)
    assert job.returncode != 0
    stopped = training.newest_checkpoint(tmp_path / "run")
    assert stopped and 2 <= training.step_of(stopped) <= 5, errors
    codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config, 2).result(90)
    assert not any(codes) and f"continuing from {stopped}" in log, log
    assert_recovered(tmp_path / "run", undisturbed(2, save_every=100), 1)


# -- ranks that fail -----------------------------------------------------------------------------------------


@contextmanager
def torchrun(faults: str, config, *options: str):
    """Two ranks under torchrun with planted faults; nothing of them is left behind."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
    job = subprocess.Popen(
        [*command, str(ROOT / "tests" / "planted.py"), faults, "pretrain_gpt", *flags(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )
    try:
        yield job
    finally:
        if job.poll() is None:
            job.terminate()
            job.communicate(timeout=60)


def ranks_alive(out_dir) -> list[int]:
    """The processes that still train into a folder."""
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.parent.name != str(os.getpid()) and f"--out_dir={out_dir}" in readable(path)
    ]


def readable(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process has ended
        return ""


def test_a_rank_that_raises_ends_all_with_its_error(data_dir, tmp_path):
    config = pretrain_config(data_dir, tmp_path / "run", **SMALL)
    with torchrun("raise:3:1", config) as job:
        planted.wait_for_rows(tmp_path / "run" / "metrics.jsonl", 2, 120)
        began = time.monotonic()
        _, errors = job.communicate(timeout=60)
    assert job.returncode == 1 and time.monotonic() - began < 30
    assert "RuntimeError: planted in rank 1" in errors and not ranks_alive(tmp_path / "run")
    assert training.newest_checkpoint(tmp_path / "run").name == "step_0000002"


def test_torchrun_brings_a_job_back_whose_ranks_raise_and_are_killed(data_dir, tmp_path, undisturbed):
    """Rank 1 raises in step 3; after the restart rank 0 is killed in step 6; after another the run ends, and
    as if nothing had been. That --resume=none was said at first does not stop the restarts."""
    config = pretrain_config(data_dir, tmp_path / "run", **SMALL, resume="none")
    with torchrun("raise:3:1,SIGKILL:6:0:1", config, "--max_restarts=2", "--shutdown_timeout=5") as job:
        printed, errors = job.communicate(timeout=200)
    assert job.returncode == 0, errors
    assert "RuntimeError: planted in rank 1" in errors and "exitcode: -9" in errors
    # the kill may meet the writing of step 4
    assert re.findall(r"continuing from \S+/step_000000(\d)", printed) in (["2", "4"], ["2", "2"]), printed
    assert_recovered(tmp_path / "run", undisturbed(2), 2)


@pytest.mark.parametrize("name", ["raise", "SIGKILL"])
def test_the_other_rank_ends_by_itself_within_seconds(name, data_dir, tmp_path, fresh, undisturbed):
    """On CPUs it notices that the connection broke, whether torchrun ends it or not."""
    config = pretrain_config(data_dir, tmp_path / "run", **SMALL)
    forked = partial(fresh.submit, planted.forked, "pretrain_gpt", config, 2)
    codes, log, seconds = forked([f"{name}:3:1"], grace=30).result(90)
    assert codes == [1, -9 if name == "SIGKILL" else 1] and seconds < 20, log
    codes, log, _ = forked().result(90)
    assert not any(codes), log
    assert_recovered(tmp_path / "run", undisturbed(2), 1)


@pytest.mark.parametrize("name", ["sleep", "SIGSTOP"])
def test_a_hung_rank_is_reported_with_the_rank_and_the_step(name, data_dir, tmp_path, fresh, undisturbed):
    config = pretrain_config(data_dir, tmp_path / "run", **SMALL, timeout_minutes=0.05)
    forked = partial(fresh.submit, planted.forked, "pretrain_gpt", config, 2)
    codes, log, seconds = forked([f"{name}:3:1"]).result(90)
    assert codes[0] == 1 and codes[1] != 0 and seconds < 30, log
    told = "0" if name == "SIGSTOP" else "[01]"  # one that sleeps can tell by itself
    assert re.search(f"error: rank {told} of 2 has made no progress for 3 s in step 3; it stands at", log), (
        log
    )
    assert "in train_step" in log  # where it waits
    codes, log, _ = forked().result(90)
    assert not any(codes), log
    assert_recovered(tmp_path / "run", undisturbed(2, timeout_minutes=0.05), 1)


def test_a_run_resumed_on_other_ranks_continues_the_same_batches(data_dir, tmp_path, fresh):
    """Steps 1–2 on one rank, 3–4 on two, 5 on three, 6 on one, with other micro-batches each time."""
    straight = pretrain_config(data_dir, tmp_path / "straight", **SMALL)
    elastic = pretrain_config(data_dir, tmp_path / "elastic", **SMALL)
    fresh.submit(planted.forked, "pretrain_gpt", straight).result(90)
    for world, size, stop in ((1, 8, 2), (2, 1, 4), (3, 3, 5), (1, 2, None)):
        config = dataclasses.replace(elastic, micro_batch_size=size, save_every=100)
        prepare = partial(stop_after, stop) if stop else None
        codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config, world, (), prepare).result(90)
        assert set(codes) == {75 if stop else 0}, log
    for a, b in zip(losses(tmp_path / "straight"), losses(tmp_path / "elastic"), strict=True):
        for x, y in zip(a, b):
            assert x == y or abs(x - y) <= 1e-5 * max(1, abs(x)), (a, b)


def stop_after(step: int, _) -> None:
    """Send this process SIGTERM when it has done a step."""
    original = training.Metrics.step

    def noted(self, done, *arguments):
        original(self, done, *arguments)
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    training.Metrics.step = noted


def test_ranks_that_find_different_checkpoints_do_not_train(data_dir, tmp_path, fresh):
    """As on two machines with a folder of their own each."""
    config = pretrain_config(data_dir, tmp_path / "run", **SMALL)
    assert not any(fresh.submit(planted.forked, "pretrain_gpt", config, 2).result(90)[0])
    prepare = partial(elsewhere, tmp_path / "other")
    codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config, 2, (), prepare).result(90)
    assert codes == [1, 1] and "has to be one folder that all machines share" in log, log


def elsewhere(folder: Path, _) -> None:
    """Have rank 1 look for checkpoints in another folder."""
    if os.environ["RANK"] == "1":
        original = training.checkpoints
        training.checkpoints = lambda out_dir: original(folder)


# -- bad steps -----------------------------------------------------------------------------------------------


def hashes(out_dir) -> list[list[str]]:
    """Of each rank's weights after each step."""
    return [(out_dir / f"weights-{rank}.txt").read_text().split() for rank in (0, 1)]


@pytest.mark.parametrize(
    ("kind", "step", "problem"),
    [("nan", 3, "its loss is nan"), ("spike", 70, r"its loss of .* is a spike, above")],
)
def test_a_bad_micro_batch_on_one_rank_skips_the_step_on_both(kind, step, problem, data_dir, tmp_path, fresh):
    config = pretrain_config(
        data_dir, tmp_path, **SMALL | {"max_steps": step + 2, "eval_every": 100}, save_every=100
    )
    job = fresh.submit(
        planted.forked, "pretrain_gpt", config, 2, [f"{kind}:{step}:1"], planted.record_weights
    )
    codes, log, _ = job.result(90)
    assert not any(codes), log
    first, second = hashes(tmp_path)
    assert first == second and len(first) == step + 2
    assert first[step - 1] == first[step - 2]  # unchanged by the bad step, by all others changed
    assert len(set(first)) == step + 1
    rows = training.read_jsonl(tmp_path / "metrics.jsonl")
    ((skipped, reason),) = [(row["step"], row["skipped"]) for row in rows if "skipped" in row]
    assert skipped == step and re.match(problem, reason)
    assert re.search(rf"step +{step}/{step + 2}  skipped: {problem}", log)


def test_bad_steps_in_a_row_end_the_run_and_name_the_last_good_checkpoint(data_dir, tmp_path, fresh):
    config = pretrain_config(data_dir, tmp_path, **SMALL | {"max_steps": 12}, max_bad_steps=3)
    codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config, 2, ["nan:5-9:1"]).result(90)
    assert codes == [1, 1] and log.count("skipped: its loss is nan") == 2, log
    assert "3 steps in a row were skipped, the last because its loss is nan" in log
    assert f"the last good checkpoint is {tmp_path}/step_0000006" in log
    assert weights(tmp_path, 6) == weights(tmp_path, 4)  # steps 5 and 6 changed nothing


# -- disks ---------------------------------------------------------------------------------------------------


def files_of(checkpoint: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.iterdir())


@pytest.mark.parametrize("script", ["pretrain_gpt", "sft_gpt"])
def test_damage_to_any_file_of_the_newest_checkpoint_costs_nothing(
    script, data_dir, base_run, chats, tmp_path, fresh
):
    """Each file cut short, missing or with a byte changed: told, and the run goes on from the one before."""

    def config(name: str):
        if script == "pretrain_gpt":
            return pretrain_config(data_dir, tmp_path / name, max_steps=4, eval_every=4)
        return sft_config(base_run, chats, tmp_path / name, max_steps=4, eval_every=4, eval_questions=0)

    codes, log, _ = fresh.submit(planted.forked, script, config("straight")).result(90)
    assert not any(codes), log
    names = files_of(tmp_path / "straight" / "step_0000004")
    assert {"checkpoint.json", "model.safetensors", "training_state.pt", "tokenizer.json"} <= set(names)
    for name in names:
        for damage in ("cut short", "missing", "changed"):
            shutil.copytree(tmp_path / "straight", tmp_path / "run")
            file = tmp_path / "run" / "step_0000004" / name
            content = bytearray(file.read_bytes())
            if damage == "missing":
                file.unlink()
            else:
                content[len(content) // 2] ^= 1
                file.write_bytes(content[: len(content) // 3] if damage == "cut short" else content)
            codes, log, _ = fresh.submit(planted.forked, script, config("run")).result(90)
            assert codes == [0] and f"passing over {file.parent}: {name}" in log, log
            assert f"continuing from {tmp_path}/run/step_0000002" in log
            assert_recovered(tmp_path / "run", tmp_path / "straight", 1)
            assert files_of(file.parent) == names
            shutil.rmtree(tmp_path / "run")


def test_a_run_without_a_whole_checkpoint_is_not_begun_afresh(data_dir, tmp_path, fresh):
    config = pretrain_config(data_dir, tmp_path, **SMALL, keep_last=1)
    fresh.submit(planted.forked, "pretrain_gpt", config).result(90)
    rows = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "step_0000006" / "model.safetensors").write_bytes(b"")
    codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config).result(90)
    assert codes == [1] and "holds checkpoints up to step_0000006, but none is whole" in log, log
    assert (tmp_path / "metrics.jsonl").read_bytes() == rows


def test_a_disk_that_fills_up_keeps_the_last_whole_checkpoint(data_dir, tmp_path, undisturbed):
    """On a real, small disk: full when a checkpoint is due, and full while one is written."""
    config = pretrain_config(data_dir, tmp_path / "disk" / "run", **SMALL)
    (tmp_path / "disk").mkdir()
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}\n"
        "import test_faults, conftest\n"
        "conftest.import_all()\n"
        f"test_faults.on_a_small_disk(conftest.pretrain_gpt.{config!r}, {str(tmp_path)!r})\n"
    )
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    mount = f'mount -t tmpfs -o size=60m tmpfs "{tmp_path}/disk"'
    possible = subprocess.run([*unshare, "sh", "-c", mount], capture_output=True, text=True)
    if possible.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {possible.stderr}")
    job = subprocess.run(
        [*unshare, "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, code],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert job.returncode == 0, job.stderr
    assert_recovered(tmp_path / "run", undisturbed(1), 3)


def on_a_small_disk(config, outside: str) -> None:
    """For a process that may fork and has the small disk: four runs, the last with room enough."""
    disk, out_dir = Path(outside) / "disk", Path(config.out_dir)
    needs = "a checkpoint needs 0.05 GB and"

    def attempt(prepare=None) -> tuple[int, str, list[str]]:
        (disk / "filler").unlink(missing_ok=True)
        (code,), log, _ = planted.forked("pretrain_gpt", config, prepare=prepare)
        return code, log, [path.name for path in training.checkpoints(out_dir) if not training.damage(path)]

    code, log, whole = attempt(full_before(disk, 2))
    assert code == 1 and needs in log and "could not be saved" not in log, log
    assert whole == ["step_0000002"] and not list(out_dir.glob(".step_*"))
    code, log, whole = attempt(full_during(disk, 1, "save_pretrained"))
    assert code == 1 and "step 4 could not be saved" in log and needs in log and "Traceback" not in log, log
    assert whole == ["step_0000002"] and not list(out_dir.glob(".step_*"))
    code, log, whole = attempt(full_during(disk, 2, "torch_save"))
    assert code == 1 and "step 6 could not be saved" in log and needs in log and "Traceback" not in log, log
    assert whole == ["step_0000002", "step_0000004"] and not list(out_dir.glob(".step_*"))
    code, log, whole = attempt()
    assert code == 0 and whole == ["step_0000002", "step_0000004", "step_0000006"], log
    shutil.copytree(out_dir, Path(outside) / "run")


def fill(disk: Path, leave: int) -> None:
    """Leave so many bytes of a disk free."""
    with open(disk / "filler", "ab") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - leave)


def full_before(disk: Path, number: int):
    """Fill the disk before the so-many-th checkpoint is begun."""

    def prepare(_):
        original, calls = training.Checkpoints.save, []

        def save(self, step):
            self.wait()
            calls.append(step)
            if len(calls) == number:
                fill(disk, 10_000_000)
            original(self, step)

        training.Checkpoints.save = save

    return prepare


def full_during(disk: Path, number: int, within: str):
    """Fill the disk when the so-many-th checkpoint is already found to have room, and partly written."""

    def prepare(_):
        owner, name = {
            "save_pretrained": (planted.GPTModel, "save_pretrained"),
            "torch_save": (training.torch, "save"),
        }[within]
        original, calls = getattr(owner, name), []

        def nearly_full(*arguments):
            calls.append(name)
            if len(calls) == number:
                fill(disk, 100_000)
            original(*arguments)

        setattr(owner, name, nearly_full)

    return prepare


def test_a_half_written_checkpoint_that_a_kill_left_takes_no_room(data_dir, tmp_path, fresh):
    (tmp_path / ".step_0000002.partial").mkdir(parents=True)
    (tmp_path / ".step_0000002.partial" / "model.safetensors").write_bytes(b"0" * 1000)
    config = pretrain_config(data_dir, tmp_path, **SMALL)
    codes, log, _ = fresh.submit(
        planted.forked, "pretrain_gpt", config, 1, (), room_without_leftovers
    ).result(90)
    assert codes == [0], log


def room_without_leftovers(out_dir: Path) -> None:
    real = shutil.disk_usage(out_dir)
    full = real._replace(free=0)
    training.shutil.disk_usage = lambda _: full if list(out_dir.glob(".step_*/model.safetensors")) else real


def test_an_error_in_the_thread_that_writes_ends_the_run_at_the_next_step(data_dir, tmp_path, fresh):
    config = pretrain_config(data_dir, tmp_path, **SMALL, timeout_minutes=0.5)
    codes, log, _ = fresh.submit(
        planted.forked, "pretrain_gpt", config, 2, ["slow:3-6:0"], broken_disk
    ).result(90)
    assert codes[0] == 1 and "error: step 2 could not be saved ([Errno 5] Input/output error" in log, log
    last = training.read_jsonl(tmp_path / "metrics.jsonl")[-1]["step"]
    assert last == 3 and not training.checkpoints(tmp_path)


def broken_disk(_) -> None:
    original = training.sync_to_disk

    def fail(path):
        if path.name == "model.safetensors":
            raise OSError(5, "Input/output error", str(path))
        original(path)

    training.sync_to_disk = fail


def test_old_checkpoints_go_but_for_the_newest_and_every_nth(data_dir, tmp_path, fresh):
    config = pretrain_config(
        data_dir, tmp_path, **SMALL | {"max_steps": 11}, save_every=1, keep_last=2, keep_every=3
    )
    assert fresh.submit(planted.forked, "pretrain_gpt", config).result(90)[0] == [0]
    assert [training.step_of(path) for path in training.checkpoints(tmp_path)] == [3, 6, 9, 10, 11]


def test_checkpoints_are_in_the_order_of_their_steps_beyond_seven_digits(tmp_path):
    for step in (10_000_000, 9_999_999, 100_000_000, 5):
        (tmp_path / f"step_{step:07d}").mkdir()
    assert [training.step_of(p) for p in training.checkpoints(tmp_path)] == [
        5,
        9_999_999,
        10_000_000,
        100_000_000,
    ]


def test_a_checkpoint_from_a_stranger_runs_no_code(data_dir, tmp_path, fresh):
    """Its manifest is right, so that only the loading itself can refuse it."""
    config = pretrain_config(data_dir, tmp_path / "run", **SMALL)
    assert fresh.submit(planted.forked, "pretrain_gpt", config).result(90)[0] == [0]
    path, mark = tmp_path / "run" / "step_0000006", tmp_path / "code ran"
    state = torch.load(path / "training_state.pt", weights_only=True)
    torch.save(state | {"history": Evil(mark)}, path / "training_state.pt")
    manifest = json.loads((path / "checkpoint.json").read_text())
    file = path / "training_state.pt"
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": training.file_sha256(file)}
    (path / "checkpoint.json").write_text(json.dumps(manifest))
    assert training.damage(path) is None
    codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config).result(90)
    assert codes == [1] and not mark.exists(), log
    assert f"error: {file} holds more than tensors, numbers and text" in log, log
    torch.load(file, weights_only=False)
    assert mark.exists()  # the trap works


class Evil:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


# -- one folder, one run -------------------------------------------------------------------------------------


def test_a_second_start_in_the_same_folder_is_refused_while_the_first_runs(
    data_dir, tmp_path, fresh, undisturbed
):
    config = pretrain_config(data_dir, tmp_path / "run", **SMALL)
    (first, second), log = fresh.submit(twice_at_once, config).result(90)
    assert second == [1] and re.search(r"run is in use by process \d+ on .*; wait for it or end it", log), log
    assert first == [0]
    assert_recovered(tmp_path / "run", undisturbed(1), 1)


def twice_at_once(config) -> tuple:
    pids = planted.launch("pretrain_gpt", config, 1, ["slow:3-6:0"])
    planted.wait_for_rows(Path(config.out_dir) / "metrics.jsonl", 2)
    second, log, _ = planted.forked("pretrain_gpt", config)
    return (planted.finish(pids, 60), second), log


def test_damaged_lines_of_the_metrics_are_told_and_stop_no_run(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st\0\0\0\xff\n{"step": 3}\n{"step": 4, "lo')
    assert training.read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 3}]
    assert f"line 2 of {tmp_path}/metrics.jsonl is damaged" in capsys.readouterr().err


# -- changed data --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sharded(tokenizer_dir, tmp_path_factory):
    """Training tokens in six shards, of which all but the last have the same size."""
    folder = tmp_path_factory.mktemp("sharded")
    source = write_jsonl(folder / "texts.jsonl", ({"text": text(i)} for i in range(400)))
    places = {"source": str(source), "tokenizer": str(tokenizer_dir), "out_dir": str(folder / "data")}
    prepare_data.main(prepare_data.Config(**places, val_fraction=0.1, shard_tokens=5000))
    return folder / "data"


def swap(data: Path) -> None:
    a, b, other = (data / f"train_00000{i}.bin" for i in (0, 1, 9))
    for old, new in ((a, other), (b, a), (other, b)):
        old.rename(new)


def change_a_token(data: Path) -> None:
    with open(data / "train_000001.bin", "r+b") as file:
        file.seek(3000)
        file.write(b"\7\0")


def add_a_shard(data: Path) -> None:
    shutil.copy(data / "train_000001.bin", data / "train_000007.bin")


@pytest.mark.parametrize("manifest", [True, False], ids=["with a manifest", "without one"])
@pytest.mark.parametrize("change", [swap, change_a_token, add_a_shard])
def test_shards_changed_since_the_run_began_are_refused(
    change, manifest, sharded, tokenizer_dir, tmp_path, capsys
):
    data = tmp_path / "data"
    shutil.copytree(sharded, data)
    if not manifest:
        (data / "manifest.json").unlink()
    config = pretrain_config(data, tmp_path / "run", **SMALL | {"max_steps": 2}, tokenizer=str(tokenizer_dir))
    pretrain_gpt.main(config)
    change(data)
    with pytest.raises(InputError, match=r"SHA-256 differs|other settings .*(data|windows) "):
        pretrain_gpt.main(config)
    if manifest and change is not add_a_shard:
        return  # they are not even what was prepared
    capsys.readouterr()
    pretrain_gpt.main(dataclasses.replace(config, force=True))
    printed = capsys.readouterr().out
    assert re.search(rf"changed since {tmp_path}/run/step_0000002: .*(data|windows) \S+ → ", printed), printed


def test_wandbs_run_id_outlives_a_time_without_wandb(tmp_path):
    alone = training.Ranks(0, 1, torch.device("cpu"))
    metrics = training.Metrics(
        pretrain_config("", tmp_path), 3, 6, 256, alone, {"wandb_id": "abc", "path": "step"}
    )
    assert metrics.wandb_id == "abc"
    metrics.close()
