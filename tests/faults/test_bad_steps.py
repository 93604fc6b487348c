"""Steps with a NaN or a spike change nothing, on all ranks alike."""

import re

import planted
import pytest
from conftest import SMALL, losses, pretrain_config, result_of, weights

from checkpoint import newest_checkpoint
from common import read_records

pytestmark = pytest.mark.slow


def hashes(out_dir) -> list[list[str]]:
    """Of each rank's weights after each step."""
    return [(out_dir / f"weights-{rank}.txt").read_text().split() for rank in (0, 1)]


@pytest.mark.parametrize("prepare", [planted.record_weights, planted.read_late_and_record_weights])
@pytest.mark.parametrize(
    ("kind", "step", "problem"),
    [("nan", 3, "its loss is nan"), ("spike", 70, r"its loss of .* is a spike, above")],
)
def test_a_bad_micro_batch_on_one_rank_skips_the_step_on_both(
    kind, step, problem, prepare, data_dir, tmp_path, fresh
):
    config = pretrain_config(
        data_dir, tmp_path, **SMALL | {"max_steps": step + 2, "eval_every": 100}, save_every=100
    )
    faults = [f"{kind}:{step}:1"]
    codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config, 2, faults, prepare).result(90)
    assert not any(codes), log
    first, second = hashes(tmp_path)
    assert first == second and len(first) == step + 2
    assert first[step - 1] == first[step - 2]  # unchanged by the bad step, by all others changed
    assert len(set(first)) == step + 1
    rows = read_records(tmp_path / "metrics.jsonl")
    ((skipped, reason),) = [(row["step"], row["skipped"]) for row in rows if "skipped" in row]
    assert skipped == step and re.match(problem, reason)
    assert re.search(rf"step +{step}/{step + 2}  skipped: {problem}", log)


@pytest.mark.parametrize("prepare", [None, planted.read_late])
def test_bad_steps_in_a_row_end_the_run_and_name_the_last_good_checkpoint(prepare, data_dir, tmp_path, fresh):
    config = pretrain_config(
        data_dir, tmp_path, **SMALL | {"max_steps": 12}, max_bad_steps=3, log_every=100, eval_every=100
    )
    faults = ["nan:5-9:1"]
    codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config, 2, faults, prepare, 30).result(90)
    assert codes == [1, 1] and log.count("skipped: its loss is nan") == 2, log
    assert "3 steps in a row were skipped, the last because its loss is nan" in log
    assert f"the newest checkpoint is {tmp_path}/step_0000006" in log
    assert weights(tmp_path, 6) == weights(tmp_path, 4)  # steps 5 and 6 changed nothing


def test_reading_a_step_after_the_next_changes_no_weight_and_no_row(data_dir, tmp_path, fresh):
    """On a CPU as on a GPU, with pauses at different steps, a NaN, and a stop amid them and a resumed run."""
    results = []
    for prepare in (None, planted.read_late):
        config = pretrain_config(
            data_dir,
            tmp_path / str(len(results)),
            **SMALL | {"max_steps": 11},
            log_every=4,
            eval_every=5,
            save_every=3,
        )
        faults = ["nan:5:0", "SIGTERM:7:0"]
        codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config, 2, faults, prepare).result(90)
        assert codes == [75, 75], log
        stopped = newest_checkpoint(tmp_path / str(len(results))).name
        codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config, 2, (), prepare).result(90)
        assert codes == [0, 0], log
        rows = [row for row in losses(tmp_path / str(len(results))) if row[1] or row[2]]
        results.append((stopped, result_of(tmp_path / str(len(results))), rows))
    (stopped, at_once, rows), (stopped_late, late, rows_late) = results
    assert rows == rows_late and [row[0] for row in rows] == [0, 4, 5, 8, 10, 11]
    assert (stopped, stopped_late) == ("step_0000007", "step_0000008")
    assert at_once.keys() == late.keys()
    assert [name for name in late if at_once[name] != late[name] and name != "metrics"] == []
