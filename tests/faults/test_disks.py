"""Damaged files, full disks and half-written checkpoints cost nothing that was whole."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import planted
import pytest
from conftest import ROOT, SMALL, assert_recovered, pretrain_config, sft_config

import checkpoint
from checkpoint import Checkpoints, damage, list_checkpoints
from common import read_records

pytestmark = pytest.mark.slow


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
    for name in set(names) - {"README.md"}:  # which anyone may edit
        for kind in ("cut short", "missing", "changed"):
            shutil.copytree(tmp_path / "straight", tmp_path / "run")
            file = tmp_path / "run" / "step_0000004" / name
            content = bytearray(file.read_bytes())
            if kind == "missing":
                file.unlink()
            else:
                content[len(content) // 2] ^= 1
                file.write_bytes(content[: len(content) // 3] if kind == "cut short" else content)
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
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests'), str(Path(__file__).parent)]!r}\n"
        "import conftest, test_disks\n"
        "conftest.import_all()\n"
        f"test_disks.on_a_small_disk(conftest.pretrain_gpt.{config!r}, {str(tmp_path)!r})\n"
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
        return (
            code,
            log,
            [path.name for path in list_checkpoints(out_dir) if not damage(path, for_resuming=True)],
        )

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
        original, calls = Checkpoints.save, []

        def save(self, step, *arguments, **named):
            self.wait()
            calls.append(step)
            if len(calls) == number:
                fill(disk, 10_000_000)
            return original(self, step, *arguments, **named)

        Checkpoints.save = save

    return prepare


def full_during(disk: Path, number: int, within: str):
    """Fill the disk when the so-many-th checkpoint is already found to have room, and partly written."""

    def prepare(_):
        owner, name = {
            "save_pretrained": (planted.GPTModel, "save_pretrained"),
            "torch_save": (checkpoint.torch, "save"),
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
    checkpoint.shutil.disk_usage = lambda _: full if list(out_dir.glob(".step_*/model.safetensors")) else real


def test_an_error_in_the_thread_that_writes_ends_the_run_at_the_next_step(data_dir, tmp_path, fresh):
    config = pretrain_config(data_dir, tmp_path, **SMALL, timeout_minutes=0.5)
    codes, log, _ = fresh.submit(
        planted.forked, "pretrain_gpt", config, 2, ["slow:3-6:0"], broken_disk
    ).result(90)
    assert (
        codes[0] == 1 and "OSError: [Errno 5] step 2 could not be saved ([Errno 5] Input/output error" in log
    ), log
    last = read_records(tmp_path / "metrics.jsonl")[-1]["step"]
    assert last == 3 and not list_checkpoints(tmp_path)


def broken_disk(_) -> None:
    original = checkpoint.sync_to_disk

    def fail(path):
        if path.name == "model.safetensors":
            raise OSError(5, "Input/output error", str(path))
        original(path)

    checkpoint.sync_to_disk = fail
