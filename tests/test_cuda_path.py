"""The CUDA path on fake tensors, without a GPU: types, devices, waits, collectives, compilations."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import fake_cuda_works

SCRIPTS = ("pretrain", "sft", "dpo")
pytestmark = [
    pytest.mark.fake_cuda,
    fake_cuda_works,
    pytest.mark.skipif(not shutil.which("g++"), reason="fake CUDA tensors need a C++ compiler (g++)"),
    pytest.mark.skipif(sys.platform != "linux", reason="fake CUDA tensors need Linux"),
]


def on_fake_cuda(scenario: str, **settings) -> dict:
    """What a scenario of fake_cuda_scenarios.py recorded, in a process of its own."""
    command = [
        sys.executable,
        Path(__file__).with_name("fake_cuda_scenarios.py"),
        scenario,
        json.dumps(settings),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=SCRIPTS)
def step(request) -> dict:
    return {"script": request.param} | on_fake_cuda("train", script=request.param)


def test_products_are_bf16_and_loss_norms_and_optimizer_state_fp32(step):
    assert all(types.split(": ")[1].startswith("bfloat16 bfloat16") for types in step["products"])
    assert len(step["products"]) >= 6
    assert set(step["state"]) == {"float32 on cuda"}
    assert set(step["statistics"]) == {"float32"}  # of the norms
    if step["script"] != "dpo":  # two micro-batches, each with one chunk of logits and one of head gradients
        assert step["products"]["step: bfloat16 bfloat16 float32 at loss.py:product"] == 2
        assert step["products"]["step: bfloat16 bfloat16 float32 at loss.py:add_product"] == 2
    assert step["products"]["evaluation: bfloat16 bfloat16 float32 at loss.py:product"] >= 1


def test_nothing_is_on_the_wrong_device(step):
    assert step["mixed"] == {}


def test_between_two_log_lines_nothing_waits_for_the_device(step):
    """What came of a step is read after the next one, when it has long been copied."""
    assert {place: n for place, n in step["waits"].items() if not place.startswith("evaluation")} == {}
    assert step["read"] == [[], [1]]


def test_an_evaluation_waits_at_its_end_alone(step):
    waits = {place.rpartition(":")[0]: n for place, n in step["waits"].items() if "evaluation" in place}
    assert waits == {"evaluation: reads a value at distributed.py:sum": 3}  # however many micro-batches


def test_ranks_exchange_gradients_and_updates_once_and_a_few_numbers(step):
    # Muon's updates, in bf16. Eight ranks share nine matrices of 128 x 384 and smaller ones; the rank with
    # two large ones has the most numbers.
    row = 2 * 128 * 384 * 2
    assert step["collectives"] == {
        f"step: allreduce {step['parameter_bytes']} bytes": 1,  # fp32
        "update: allreduce 24 bytes": 1,  # loss, norm and stop flag, in fp64
        "next record: allreduce 24 bytes": 1,
        f"update: allgather_base {(8 + 1) * row} bytes": 1,  # a row from each rank; its own is counted twice
        "evaluation: allreduce 24 bytes": 1,  # loss, hits and targets
    }


@pytest.fixture(scope="module", params=[True, False], ids=["compiled", "plain"])
def decoding(request) -> dict:
    """Three times two prompts, each continued by six tokens."""
    found = on_fake_cuda("generate", new_tokens=6, compile=request.param)
    assert found["steps"] == 3 * 6
    return {"compiled": request.param} | found


@pytest.mark.slow
def test_decoding_multiplies_and_keeps_its_cache_in_bf16(decoding):
    assert decoding["cache"] == ["bfloat16 cuda"] and decoding["mixed"] == {}
    assert {types.split(": ")[1].partition(" at ")[0] for types in decoding["products"]} == {
        "bfloat16 bfloat16 bfloat16"
    }


def test_decoding_waits_for_the_ids_of_each_token_alone(decoding):
    reads = {place: n for place, n in decoding["waits"].items() if "reads a value" in place}
    assert [place.rpartition(":")[0] for place in reads] == ["step: reads a value at generation.py:generate"]
    assert sum(reads.values()) == 3 * 6 * 2  # a fake tensor gives the ids of two rows one by one
    # the rest: what a call starts with, whatever the number of tokens
    others = {place: n for place, n in decoding["waits"].items() if place not in reads}
    assert set(others.values()) <= {3}, others


def test_one_graph_serves_all_further_tokens_of_a_call_and_nothing_waits_in_it(decoding):
    """The first token comes from the prompts, the second from a step that warms up, the others from the
    graph; for these Python starts nothing but the replay and the read."""
    if not decoding["compiled"]:
        assert decoding["recorded"] == decoding["replayed"] == 0
        return
    assert (decoding["recorded"], decoding["replayed"]) == (3, 3 * 4)
    assert not [place for place in decoding["waits"] if place.startswith("recording")]
    assert any(place.startswith("recording") for place in decoding["products"])
    for call in range(3):
        counts = decoding["operations"][6 * call : 6 * call + 6]
        started = [after - before for before, after in itertools.pairwise(counts)]
        assert started[0] > 100 and len(set(started[1:])) == 1 and started[1] <= 8, started


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_one_graph_serves_all_blocks_and_nothing_is_compiled_later(script):
    found = on_fake_cuda("compiles", script=script)
    # Block, last norm and head's softmax; of pairs block and norm, for two widths.
    assert found["first step"] == (4 if script == "dpo" else 3)
    assert found["evaluation"] == 2  # the block and the norm, without gradients
    assert found["later"] == 0


def test_key_heads_are_repeated_where_no_fused_kernel_takes_fewer_of_them():
    assert on_fake_cuda("heads") == {"torch.float32": [4, 4, 4], "torch.bfloat16": [4, 2, 2]}
