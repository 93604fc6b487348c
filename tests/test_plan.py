"""plan.py and rehearsal.py: memory against torch's allocator, figures by hand, sentences of failure."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import plan
from common import InputError, parse_config
from metrics import GPUS
from plan import Config, exposed, largest_fitting, messages_of, notes_of, problems_of, rate
from rehearsal import Footprint, Ledger

ROOT = Path(plan.__file__).parent
needs_fake_cuda = [
    pytest.mark.fake_cuda,
    pytest.mark.skipif(not shutil.which("g++"), reason="fake CUDA tensors need a C++ compiler (g++)"),
    pytest.mark.skipif(sys.platform != "linux", reason="fake CUDA tensors need Linux"),
]


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=600)


# -- memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_rehearsed_memory_is_what_torchs_allocator_was_asked_for(optimizer):
    done = [run(ROOT / "tests" / "memory_cases.py", what, optimizer) for what in ("fake", "real")]
    fake, real = (json.loads(process.stdout.splitlines()[-1]) for process in done)
    assert real > 300e6 and fake == pytest.approx(real, rel=0.05)


def test_a_ledger_tells_the_peak_by_kind_after_what_was_freed_grown_and_named():
    ledger = Ledger("cpu")
    with ledger:
        weights = torch.zeros(1000)  # 4,000 bytes, of which the allocator makes 4,096
        before = len(ledger.entries)
        a = weights + 1
        view, same = a[:10], a.view(10, 100)
        b = a + 1
        del a, view, same
        c = torch.zeros(256)
        ledger.name("weights", [weights])
        ledger.name("gradients", [b])
    assert ledger.peak(0) == {"weights": 4096, "gradients": 4096, "optimizer": 0, "activations": 4096}
    del c
    assert sum(ledger.peak(len(ledger.entries) - 1).values()) == 2 * 4096
    ledger.entries.append((before, 512 * 100))
    assert sum(ledger.peak(len(ledger.entries) - 1).values()) == 2 * 4096 + 51200


def test_the_largest_micro_batch_is_the_last_that_fits():
    def measure(B: int) -> Footprint:
        asked.append(B)
        return Footprint({"weights": 100, "activations": 7 * B + 3}, Counter(), Counter())

    for limit, most, expected in ((170, 64, 9), (109, 64, 0), (110, 64, 1), (10_000, 12, 12)):
        for first in (1, 8, 12):
            asked = []
            assert largest_fitting(measure, limit, first=first, most=most) == expected
            assert len(asked) <= 5


# -- messages, by hand ---------------------------------------------------------------------------------------


def test_a_ring_over_machines_uses_all_ports_of_a_machine_and_all_to_all_one_each():
    h100, link, port = GPUS["h100"], 0.8 * 450e9, 0.8 * 50e9
    assert rate("allreduce", tuple(range(8)), h100, 8) == link
    assert rate("allreduce", tuple(range(64)), h100, 8) == 8 * port
    assert rate("allreduce", tuple(range(0, 64, 8)), h100, 8) == port  # hybrid: one GPU of each machine
    assert rate("alltoall_base", tuple(range(64)), h100, 8) == port
    assert rate("alltoall_base", tuple(range(8)), h100, 8) == link


def test_what_is_sent_is_hidden_by_the_pass_that_it_is_sent_in():
    config = Config(gpu="h100")
    eight, speed = tuple(range(8)), 0.8 * 450e9

    def waiting(compute: float, n: int, passes: dict, update: dict) -> float:
        sent = (Counter({(name, eight): s * speed for name, s in part.items()}) for part in (passes, update))
        return exposed(messages_of(*sent, config), compute, n)

    # A micro-batch computes for 3 s, one of them forward. Only the last one's backward pass sends gradients.
    assert waiting(6, 2, {"allreduce": 2}, {}) == 0
    assert waiting(6, 2, {"allreduce": 2.5}, {}) == pytest.approx(0.5)
    assert waiting(6, 2, {"allreduce": 2}, {"allgather_base": 0.25}) == pytest.approx(0.25)
    assert waiting(6, 2, {"allgather_base": 4}, {}) == 0  # 1 s in each of four passes
    assert waiting(6, 2, {"allgather_base": 6}, {}) == pytest.approx(2 * 0.5)
    assert waiting(6, 2, {"allgather_base": 4, "reduce_scatter_base": 1.5}, {}) == pytest.approx(0.5)


# -- a whole plan --------------------------------------------------------------------------------------------

SMALL = (
    "--num_hidden_layers=2 --hidden_size=128 --num_attention_heads=4 --context_length=128 --vocab_size=4096"
)
SMALL += " --batch_tokens=8192 --micro_batch_size=2 --max_steps=1000 --save_every=100 --gpu=h100 --json"
V, C, F, L, T = 4096, 128, 384, 2, 128
MATRICES = L * (4 * C * C + 3 * C * F)
PARAMETERS = 2 * V * C + MATRICES + L * (2 * C + 2 * 32) + C  # norms: two a block, queries, keys, the last


def planned(*flags: str) -> dict:
    done = run(ROOT / "plan.py", *SMALL.split(), *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=["none", "full"])
def small(request) -> dict:
    return planned("--gpus=8", f"--shard={request.param}")


@pytest.mark.slow
class TestPlan:
    pytestmark = needs_fake_cuda

    def test_parameters_tokens_flops_hours_and_disk_are_those_counted_by_hand(self, small):
        assert small["parameters"] == PARAMETERS
        flops = 6 * (MATRICES + V * C) + 12 * L * C * T  # a token
        assert small["tokens"] == 1000 * 8192 and small["flops"] == 1000 * 8192 * flops
        assert small["micro_batches"] == 4 and small["micro_batch_size"] == 2  # 64 windows, eight a GPU
        computing = small["seconds_per_step"] - small["waiting_seconds_per_step"]
        assert computing == pytest.approx(8192 / 8 * flops / (0.4 * 989.4e12))
        assert small["hours"] == pytest.approx(1000 * small["seconds_per_step"] / 3600)
        state = 4 * (2 * PARAMETERS - MATRICES)  # AdamW keeps two numbers a parameter, Muon one
        assert small["disk"]["checkpoint"] == pytest.approx(4 * PARAMETERS + state, rel=1e-4)
        assert (
            small["disk"]["checkpoints"] == 4 * small["disk"]["checkpoint"]
        )  # three, and the one being written
        assert small["disk"]["data"] == 2 * small["tokens"]

    def test_messages_have_the_bytes_counted_by_hand(self, small):
        sent = {(m["phase"], m["operation"]): m["bytes"] for m in small["messages"]}
        if small["shard"] == "none":
            gradients = {("passes", "allreduce"): 2 * 4 * PARAMETERS * 7 / 8}
            row = sent.pop(("update", "allgather_base")) / 7 / 2  # the longest share, in bf16
            assert 2 * MATRICES / L / 14 <= row <= MATRICES
            assert sent == gradients
            return
        # Embedding and head, in one group with the last norm, are gathered once a micro-batch; blocks twice.
        root = 2 * V * C + C
        assert sent["passes", "allgather_base"] == 4 * 2 * (root + 2 * (PARAMETERS - root)) * 7 / 8
        assert sent["passes", "reduce_scatter_base"] == 4 * PARAMETERS * 7 / 8
        assert {key[1] for key in sent} == {"allgather_base", "reduce_scatter_base", "alltoall_base"}

    def test_memory_holds_what_each_gpu_has_of_weights_gradients_and_optimizer(self, small):
        share = 8 if small["shard"] == "full" else 1
        memory, states = small["memory"], 4 * (2 * PARAMETERS - MATRICES)
        angles = 2 * 4 * T * 32  # cosines and sines
        assert memory["weights"] == pytest.approx(4 * PARAMETERS / share + angles, rel=0.01)
        assert memory["gradients"] == pytest.approx(
            4 * PARAMETERS, rel=0.1
        )  # whole until the last micro-batch
        assert memory["optimizer"] == pytest.approx(states / share, rel=0.03)
        kinds = ("weights", "gradients", "optimizer", "activations")
        assert sum(memory[kind] for kind in kinds) == memory["total"] < memory["limit"]

    @pytest.mark.slow
    def test_compiled_blocks_and_checkpointing_keep_less(self):
        flags = ["--gpus=1", "--micro_batch_size=16", "--num_hidden_layers=4"]
        eager, compiled, checkpointed = (
            planned(*flags, flag)["memory"]["activations"]
            for flag in ("--compile=false", "--compile=true", "--checkpoint_activations")
        )
        assert checkpointed < compiled < eager

    def test_several_numbers_of_gpus_give_a_list_and_auto_takes_ddp_where_it_fits(self):
        plans = planned("--gpus=1,16")
        assert [p["gpus"] for p in plans] == [1, 16] and [p["shard"] for p in plans] == ["none", "none"]
        assert not plans[0]["messages"] and plans[1]["messages"][0]["ranks"] == 16
        assert plans[0]["parameters"] == plans[1]["parameters"]

    @pytest.mark.slow
    def test_a_model_too_large_for_ddp_is_planned_with_fsdp2_and_a_too_large_micro_batch_fails(self):
        large = (
            "--gpu=l4 --hidden_size=4096 --num_attention_heads=32 --num_hidden_layers=6 --vocab_size=49152"
        )
        large += " --gpus=8 --batch_tokens=1e6 --micro_batch_size=512 --optimizer=adamw"
        done = run(ROOT / "plan.py", *SMALL.split(), *large.split())
        made = json.loads(done.stdout)
        largest = made["largest_micro_batch_size"]
        assert done.returncode == 1 and made["shard"] == "full" and 1 <= largest < 512
        assert f"use --micro_batch_size={largest}" in made["problems"][0]

    def test_a_disk_too_small_for_the_checkpoints_fails_where_the_runs_folder_is(self, tmp_path):
        huge = ("--max_steps=1000000000000", "--save_every=1000000", "--keep_last=0", "--gpus=1")
        done = run(ROOT / "plan.py", *SMALL.split(), *huge, f"--out_dir={tmp_path}")
        (sentence,) = json.loads(done.stdout)["problems"]
        assert done.returncode == 1 and f"GB more in {tmp_path}, whose disk has" in sentence
        elsewhere = planned(*huge, f"--out_dir={tmp_path}/not/here")
        assert (
            elsewhere["problems"] == []
            and "on this machine the checkpoints, at most 1000000 of" in elsewhere["notes"][0]
        )

    @pytest.mark.parametrize("shard", ["full", "hybrid"])
    def test_fsdp2_sends_the_bytes_counted_by_hand_among_8_64_and_512(self, shard):
        """FSDP2 splits a matrix by rows, and pads it to as many for each rank."""
        gpus = "8,64,512" if shard == "full" else "64,512"
        for made in planned(f"--gpus={gpus}", f"--shard={shard}", f"--batch_tokens={1024 * T}"):
            world = made["gpus"]
            among = world if shard == "full" else 8  # of a machine
            copies = world // among

            def padded(rows: int, columns: int, among=among) -> int:
                return -(-rows // among) * among * columns

            root = 2 * padded(V, C) + padded(C, 1)
            block = 4 * padded(C, C) + 2 * padded(F, C) + padded(C, F) + 2 * padded(C, 1) + 2 * padded(32, 1)
            gathered = 2 * (root + 2 * L * block) * (among - 1) / among  # bf16; blocks in both passes
            reduced = 4 * (root + L * block) * (among - 1) / among  # fp32
            sent = {(m["phase"], m["operation"], m["ranks"]): m["bytes"] for m in made["messages"]}
            assert sent.pop(("update", "alltoall_base", among)) > 0
            expected = {
                ("passes", "allgather_base", among): made["micro_batches"] * gathered,
                ("passes", "reduce_scatter_base", among): reduced,
            }
            if copies > 1:  # between machines the sums of the parts
                between = 2 * 4 * (root + L * block) / among * (copies - 1) / copies
                expected["passes", "allreduce", copies] = between
            assert sent == expected, (shard, world)

    def test_an_unknown_gpu_is_told_in_one_sentence(self):
        done = run(ROOT / "plan.py", "--gpu=voodoo")
        assert done.returncode == 1 and done.stderr.startswith("error: --gpu=voodoo is unknown; choose h100,")
        assert len(done.stderr.splitlines()) == 1


# -- sentences -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, gpus, sentence",
    [
        ("--batch_tokens=8192", 16, "8 windows of 1024, fewer than the 16 GPUs"),
        ("--shard=hybrid", 12, "12 GPUs are no multiple of 8"),
        ("--shard=half", 8, "choose auto, none, full, hybrid"),
        ("--mfu=1.5", 8, "expected a share"),
        ("--mfu=0", 8, "above zero"),
        ("--max_steps=0", 8, "above zero"),
        ("--optimizer=sgd", 8, "choose muon, adamw"),
    ],
)
def test_a_run_that_cannot_be_planned_ends_in_a_sentence(flags, gpus, sentence):
    with pytest.raises(InputError, match=sentence):
        plan.plan_of(parse_config(Config, flags.split()), gpus)


@pytest.mark.parametrize("flags", ["--hidden_size=500", "--num_key_value_heads=3"])
def test_heads_that_do_not_divide_end_in_the_models_own_sentence(flags, tmp_path):
    config = parse_config(Config, [flags, f"--data_dir={tmp_path}"])
    with pytest.raises(InputError, match="is not divisible by num_"):
        plan.plan_of(config, 8)


@pytest.mark.parametrize("text", ["0", "8,", "many", "-8"])
def test_a_wrong_number_of_gpus_is_refused(text):
    with pytest.raises(InputError, match="expected a number above zero"):
        plan.numbers_of(text)


def outcome(**changes) -> dict:
    made = {"gpus": 8, "shard": "none", "micro_batch_size": 16, "micro_batches": 2}
    made |= {"largest_micro_batch_size": 16, "tokens_per_step": 256 * 1024, "waiting_seconds_per_step": 0.0}
    return made | {"seconds_per_step": 1.0, "memory": {"total": 90 * 2**30, "limit": 70 * 2**30}} | changes


def test_memory_that_does_not_suffice_names_the_flag_that_helps():
    config, checkpointing = Config(), Config(checkpoint_activations=True)
    assert problems_of(outcome(largest_micro_batch_size=64), config) == []
    (sentence,) = problems_of(outcome(largest_micro_batch_size=6), config)
    assert "16 windows at once need 90.0 GiB of the 70.0" in sentence and "--micro_batch_size=6" in sentence
    (none,) = problems_of(outcome(largest_micro_batch_size=0), config)
    assert "--checkpoint_activations or --shard=full" in none
    (full,) = problems_of(outcome(largest_micro_batch_size=0, shard="full"), checkpointing)
    assert "--shard" not in full and "--checkpoint_activations" not in full


def test_notes_tell_what_a_step_really_computes_and_waits_for():
    assert notes_of(outcome(), Config(batch_tokens=256 * 1024)) == []
    rest, padding, waiting = notes_of(
        outcome(tokens_per_step=240 * 1024, waiting_seconds_per_step=0.25), Config(batch_tokens=246_000)
    )
    assert "a step has 245,760 tokens" in rest and "6.2% of the compute is padding" in padding
    assert "25% of the time" in waiting


def test_all_flags_of_pretraining_are_understood_and_documented(capsys):
    assert parse_config(Config, ["--beta2=0.9", "--gpus=1,8"]).beta2 == 0.9
    with pytest.raises(SystemExit):
        parse_config(Config, ["--help"])
    told = capsys.readouterr().out
    assert "--gpus_per_machine=8" in told and "optimizer steps" in told and "(DDP)" in told
