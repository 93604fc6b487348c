"""What a run records."""

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

    calls = []

    def init(mode, **options):
        calls.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no route to host")
        return mode

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
        assert calls == expected and result == (expected[-1] if expected else None)
    assert "wandb cannot be reached (no route to host)" in capsys.readouterr().err


def test_wandbs_run_id_outlives_a_time_without_wandb(tmp_path):
    state = {"wandb_id": "abc", "path": "step"}
    metrics = Metrics(
        tmp_path, start=3, max_steps=6, step_tokens=256, log_every=1, ranks=ALONE, state=state, wandb="off"
    )
    assert metrics.wandb_id == "abc"
    metrics.close()
