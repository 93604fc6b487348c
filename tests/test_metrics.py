"""What a run records."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ALONE

import metrics
from common import read_records
from distributed import Ranks
from metrics import Metrics, start_wandb


def test_a_run_records_its_numbers(base_run):
    rows = read_records(base_run / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert {"lr", "grad_norm", "tokens_per_second", "targets"} <= set(steps[0])
    validations = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in validations] == [0, 3, 6]
    assert all(0 < row["val_bpb"] < row["val_loss"] for row in validations)
    assert (base_run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_wandb_needs_no_key_no_server_and_no_answer(monkeypatch, tmp_path, capsys):
    wandb = pytest.importorskip("wandb")

    calls, axes = [], []

    def init(mode, **options):
        calls.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no route to host")
        return SimpleNamespace(mode=mode, define_metric=lambda name, step_metric: axes.append(step_metric))

    monkeypatch.setattr(wandb, "init", init)
    for key, mode, expected in (
        (False, "auto", []),
        (False, "off", []),
        (False, "online", ["offline"]),
        (False, "offline", ["offline"]),
        (True, "auto", ["online", "offline"]),
        (True, "offline", ["offline"]),
    ):
        calls.clear()
        monkeypatch.setattr(metrics, "has_wandb_key", lambda key=key: key)
        result = start_wandb(mode, tmp_path, run_id=None, settings={})
        assert calls == expected and (result.mode if result else None) == (expected[-1] if expected else None)
    assert set(axes) == {"step"}  # an axis of its own: wandb drops what comes below its last step
    assert "wandb cannot be reached (no route to host)" in capsys.readouterr().err


def test_wandbs_run_id_outlives_a_time_without_wandb(tmp_path):
    state = {"wandb_id": "abc", "path": "step"}
    metrics = Metrics(
        tmp_path, start=3, max_steps=6, step_tokens=256, log_every=1, ranks=ALONE, state=state, wandb="off"
    )
    assert metrics.wandb_id == "abc"
    metrics.close()


def recorder(out_dir, start: int = 0, **changes) -> Metrics:
    return Metrics(
        out_dir, start=start, max_steps=9, step_tokens=256, log_every=1, ranks=ALONE, wandb="off", **changes
    )


def test_a_row_is_in_the_file_at_once_and_only_the_last_is_ever_written_again(tmp_path, monkeypatch):
    log = recorder(tmp_path)
    monkeypatch.setattr(metrics, "write_records", None)  # the file only grows
    before = b""
    for step in (1, 2, 3):
        log.log(step, loss=float(step), lr=0.1)
        log.log(step, val_loss=float("nan"), seconds=step)
        content = log.path.read_bytes()
        assert content.startswith(before) and len(content.splitlines()) == step
        before = content
    log.close()
    rows = [{"step": i, "loss": float(i), "lr": 0.1, "val_loss": None, "seconds": i} for i in (1, 2, 3)]
    assert read_records(log.path) == rows


def test_the_last_row_grows_on_after_a_resume(tmp_path):
    log = recorder(tmp_path)
    for step in (1, 2, 3):
        log.log(step, loss=1.0)
    log.close()
    again = recorder(tmp_path, start=2)
    again.log(2, val_loss=2.0)
    again.log(3, loss=3.0)
    again.close()
    assert read_records(log.path) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 1.0, "val_loss": 2.0},
        {"step": 3, "loss": 3.0},
    ]


def test_a_resumed_run_drops_the_rows_of_later_steps_and_knows_what_was_validated(tmp_path):
    log = recorder(tmp_path)
    for step in range(6):
        log.log(step, loss=1.0, **({"val_loss": 2.0} if step in (0, 3) else {}))
    log.close()
    for start, validated in ((5, False), (3, True)):
        log = recorder(tmp_path, start=start)
        assert [row["step"] for row in read_records(log.path)] == list(range(start + 1))
        assert log.has(start, "val_loss") == validated and log.has(start, "loss")
        assert log.last_losses() == [
            f"step {start}, loss: 1.0000 nats/token",
            "step 3, val loss: 2.0000 nats/token",
        ]
        log.close()


NUMBERS = {"loss": 2.0, "grad_norm": 1.0, "lr": 0.1, "targets": 250, "skipped": None}


def test_mfu_is_the_share_of_all_devices_peak_over_the_steps_since_the_last_line(
    tmp_path, capsys, monkeypatch
):
    """2 ranks of 1e9 FLOP/s; 256 tokens of 1e6 FLOPs in 1, then in 0.4 and 0.6 seconds."""
    ranks = Ranks(0, 2, torch.device("cpu"))
    monkeypatch.setattr(ranks, "each", lambda value: [value, value])
    log = Metrics(
        tmp_path,
        start=0,
        max_steps=9,
        step_tokens=256,
        log_every=2,
        ranks=ranks,
        flops_per_token=1e6,
        peak_flops=1e9,
    )
    for step, seconds in ((1, 1.0), (2, 1.0), (3, 0.4), (4, 0.6)):
        log.step(step, NUMBERS, seconds=seconds)
    log.close()
    rows = read_records(log.path)
    assert [(row["step"], row["tokens_per_second"], row["mfu"]) for row in rows] == [
        (2, 256, 0.128),
        (4, 512, 0.256),
    ]
    assert all("memory_gb" not in row for row in rows)  # of GPUs only
    assert "12.8% mfu" in (printed := capsys.readouterr().out) and "25.6% mfu" in printed


def test_without_flops_or_a_peak_there_is_no_mfu(tmp_path, capsys):
    for known in ({}, {"flops_per_token": 1e6}, {"peak_flops": 1e9}):
        log = recorder(tmp_path, **known)
        log.step(1, NUMBERS, seconds=1.0)
        log.close()
        assert "mfu" not in read_records(log.path)[-1]
    assert "mfu" not in capsys.readouterr().out


def test_a_step_that_tells_its_tokens_is_counted_with_these(tmp_path):
    log = recorder(tmp_path, flops_per_token=1e6, peak_flops=1e9)
    log.step(1, {**NUMBERS, "step_tokens": 100}, seconds=1.0)
    log.step(2, {**NUMBERS, "step_tokens": 400}, seconds=1.0)
    log.close()
    rows = read_records(log.path)
    assert [(row["tokens_per_second"], row["mfu"], row["tokens"]) for row in rows] == [
        (100, 0.1, 256),
        (400, 0.4, 512),
    ]
    assert all("step_tokens" not in row for row in rows)


def test_a_gpus_memory_and_a_slow_rank_are_told_where_there_are_any(tmp_path, capsys, monkeypatch):
    ranks = Ranks(0, 1, torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12_345_678_901)
    monkeypatch.setattr(ranks, "slow_one", lambda: "rank 3 on node7 is slow")
    log = Metrics(tmp_path, start=0, max_steps=9, step_tokens=256, log_every=2, ranks=ranks)
    log.step(1, NUMBERS, seconds=1.0)
    assert capsys.readouterr().out == ""
    log.step(2, NUMBERS, seconds=1.0)
    log.close()
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert "  12.3 GB  " in first and second == "rank 3 on node7 is slow"
    assert read_records(log.path)[0]["memory_gb"] == 12.346


def test_a_run_that_died_before_its_first_checkpoint_goes_on_in_its_wandb_run(tmp_path, monkeypatch):
    asked = []

    def start(mode, out_dir, *, run_id, settings):
        asked.append(run_id)
        return SimpleNamespace(id=run_id or "new", finish=lambda: None, log=lambda row: None)

    monkeypatch.setattr(metrics, "start_wandb", start)
    for _ in range(2):  # no state: nothing was saved
        settings = {"start": 0, "max_steps": 4, "step_tokens": 256, "log_every": 1, "ranks": ALONE}
        Metrics(tmp_path, **settings, wandb="offline").close()
    assert asked == [None, "new"]
