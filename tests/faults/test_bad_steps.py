"""Steps with a NaN or a spike change nothing, on all ranks alike."""

import re

import planted
import pytest
from conftest import SMALL, pretrain_config, weights

from common import read_records


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
    rows = read_records(tmp_path / "metrics.jsonl")
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
