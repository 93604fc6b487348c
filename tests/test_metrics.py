"""What a run records."""

from types import SimpleNamespace

from conftest import ALONE

import metrics
from common import read_records
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
    import wandb

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
