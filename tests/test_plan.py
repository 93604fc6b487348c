"""plan.py and rehearsal.py: memory against torch's allocator, figures by hand, sentences of failure."""

import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALONE, small_model

import packing
import plan
import rehearsal
import sft
from checks import Run
from common import InputError, parse_config
from dpo import collate
from gpt import GPTConfig
from plan import FineTuning, Preferences, exposed, largest_fitting, messages_of, notes_of, problems_of, rate
from plan import Pretraining as Config
from precision import GPUS
from rehearsal import Footprint, Ledger, batch_of

ROOT = Path(plan.__file__).parent
needs_fake_cuda = [
    pytest.mark.fake_cuda,
    pytest.mark.skipif(not shutil.which("g++"), reason="fake CUDA tensors need a C++ compiler (g++)"),
    pytest.mark.skipif(sys.platform != "linux", reason="fake CUDA tensors need Linux"),
]


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=600)


# -- memory --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer, unit", [("muon", "windows"), ("adamw", "windows"), ("adamw", "rows"), ("muon", "pairs")]
)
def test_the_rehearsed_memory_is_what_torchs_allocator_was_asked_for(optimizer, unit):
    done = [run(ROOT / "tests" / "memory_cases.py", what, optimizer, unit) for what in ("fake", "real")]
    fake, real = (json.loads(process.stdout.splitlines()[-1]) for process in done)
    assert real > 250e6 and fake == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("varlen", [True, False])
def test_rehearsed_micro_batches_have_the_names_shapes_and_types_of_the_loaders(varlen, monkeypatch):
    B, T = 3, 64
    shape, row = small_model().config, (np.arange(T, dtype=np.int32), np.arange(T))
    monkeypatch.setattr(rehearsal, "has_varlen", lambda device, head_dim: varlen)

    def described(batch: dict) -> dict:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in batch.items()}

    sequences = B * rehearsal.SEQUENCES
    loaded = packing.collate([[row]] * B, T, varlen=varlen, sequences=[sequences] if varlen else [])
    loaded["noise"] = torch.zeros(B, T, shape.hidden_size)
    there = {"shape": shape, "device": ALONE.device}
    assert described(batch_of("rows", B, T, noisy=True, **there)) == described(loaded)
    pairs = collate([row] * 2 * B, range(2 * B), T) | {"reference": torch.zeros(2 * B)}
    assert described(batch_of("pairs", B, T, noisy=False, **there)) == described(pairs)


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

    # A micro-batch computes for 3 s, one of them forward. DDP sends gradients in the last backward pass only.
    assert waiting(6, 2, {"allreduce": 2}, {}) == 0
    assert waiting(6, 2, {"allreduce": 2.5}, {}) == pytest.approx(0.5)
    assert waiting(6, 2, {"allreduce": 2}, {"allgather_base": 0.25}) == pytest.approx(0.25)
    assert waiting(6, 2, {"allgather_base": 4}, {}) == 0  # 1 s in each of four passes
    assert waiting(6, 2, {"allgather_base": 6}, {}) == pytest.approx(2 * 0.5)
    assert (
        waiting(6, 2, {"allgather_base": 4, "reduce_scatter_base": 2}, {}) == 0
    )  # 1 s in each backward pass
    assert waiting(6, 2, {"allgather_base": 4, "reduce_scatter_base": 3}, {}) == pytest.approx(2 * 0.5)
    both = {"allgather_base": 4, "reduce_scatter_base": 2, "allreduce": 0.25}
    assert waiting(6, 2, both, {}) == pytest.approx(0.25)


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

    def test_a_vocabulary_is_padded_as_in_a_run(self):
        assert planned("--vocab_size=4090")["parameters"] == PARAMETERS

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
        assert sent["passes", "reduce_scatter_base"] == 4 * 4 * PARAMETERS * 7 / 8  # fp32
        assert {key[1] for key in sent} == {"allgather_base", "reduce_scatter_base", "alltoall_base"}

    def test_memory_holds_what_each_gpu_has_of_weights_gradients_and_optimizer(self, small):
        share = 8 if small["shard"] == "full" else 1
        memory, states = small["memory"], 4 * (2 * PARAMETERS - MATRICES)
        angles = 2 * 4 * T * 32  # cosines and sines
        assert memory["weights"] == pytest.approx(4 * PARAMETERS / share + angles, rel=0.01)
        assert memory["gradients"] == pytest.approx(4 * PARAMETERS / share, rel=0.1)  # of 4 micro-batches
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

    def test_a_number_of_gpus_that_cannot_be_leaves_the_others_rows(self):
        done = run(ROOT / "plan.py", *SMALL.split(), "--gpus=1,1024")
        assert [made["gpus"] for made in json.loads(done.stdout)] == [1]
        assert done.returncode == 1 and "1024 x h100 will fail: " in done.stderr
        assert "fewer than the 1024 ranks" in done.stderr

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
                ("passes", "reduce_scatter_base", among): made["micro_batches"] * reduced,
            }
            if copies > 1:  # between machines the sums of the parts
                between = 2 * 4 * (root + L * block) / among * (copies - 1) / copies
                expected["passes", "allreduce", copies] = between
            assert sent == expected, (shard, world)

    @pytest.mark.parametrize("script", ["sft_gpt.py", "dpo_gpt.py"])
    def test_a_tuning_run_has_its_models_shape_its_own_steps_and_the_reference_pass(self, script, tmp_path):
        shape = GPTConfig(V, C, F, L, 4, max_position_embeddings=2 * T, qk_norm=False)
        (tmp_path / "config.json").write_text(json.dumps(shape.to_hf()))
        per_token = 6 * (MATRICES + V * C) + 12 * L * C * T
        common = [f"--model={tmp_path}", f"--max_length={T}", "--gpus=8", "--micro_batch_size=2", "--json"]
        common.append("--save_every=50")
        own = {
            "sft_gpt.py": [f"--batch_tokens={64 * T}", f"--data_tokens={100 * 64 * T}", "--epochs=3"],
            "dpo_gpt.py": ["--batch_pairs=32", "--pairs=3200", "--epochs=3", "--shard=full"],
        }[script]
        done = run(ROOT / "plan.py", script, *common, *own)
        assert done.returncode == 0, done.stderr[-3000:]
        made = json.loads(done.stdout)
        width, rows = (2, 32) if script == "dpo_gpt.py" else (1, 64)
        assert made["parameters"] == PARAMETERS - L * 2 * 32 and made["steps"] == 300
        assert made["tokens_per_step"] == rows * width * T
        assert (made["micro_batches"], made["micro_batch_size"]) == (rows // 16, 2)
        computing = made["seconds_per_step"] - made["waiting_seconds_per_step"]
        speed = 8 * 0.4 * 989.4e12
        assert computing == pytest.approx(rows * width * T * per_token / speed)
        passed = 3200 * 2 * T * per_token / 3 if script == "dpo_gpt.py" else 0
        assert made["reference_seconds"] == pytest.approx(passed / speed)
        assert made["flops"] == pytest.approx(300 * rows * width * T * per_token + passed)
        assert made["disk"]["checkpoint"] == 12 * made["parameters"]  # both tune with AdamW
        assert made["disk"]["checkpoints"] == 3 * made["disk"]["checkpoint"]  # two, and the one being written
        assert made["memory"]["optimizer"] == pytest.approx(
            8 * made["parameters"] / (8 if script == "dpo_gpt.py" else 1), rel=0.03
        )

    def test_an_unknown_gpu_is_told_in_one_sentence(self):
        done = run(ROOT / "plan.py", "--gpu=voodoo")
        assert done.returncode == 1 and done.stderr.startswith("error: --gpu=voodoo is unknown; choose h100,")
        assert len(done.stderr.splitlines()) == 1


# -- sentences -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, gpus, sentence",
    [
        ("--batch_tokens=8192", 16, "8 windows of 1024, fewer than the 16 ranks"),
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
    made = {"gpus": 8, "shard": "none", "unit": "windows", "micro_batch_size": 16, "micro_batches": 2}
    made |= {"largest_micro_batch_size": 16, "tokens_per_step": 256 * 1024, "waiting_seconds_per_step": 0.0}
    made |= {"reference_seconds": 0.0}
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
    shape = GPTConfig()
    assert (
        notes_of(
            outcome(),
            Run(shape=shape, T=1024, unit="windows", step=256, max_steps=9),
            Config(batch_tokens=256 * 1024),
        )
        == []
    )
    rest, padding, waiting = notes_of(
        outcome(tokens_per_step=240 * 1024, waiting_seconds_per_step=0.25),
        Run(shape=shape, T=1024, unit="windows", step=240, max_steps=9),
        Config(batch_tokens=246_000),
    )
    assert "a step has 245,760 tokens" in rest and "6.2% of the compute is padding" in padding
    assert "25% of the time; raise --batch_tokens" in waiting
    (left_out,) = notes_of(
        outcome(unit="pairs"),
        Run(shape=shape, T=1024, unit="pairs", step=256, max_steps=9),
        Preferences(max_steps=9),
    )
    assert "the reference pass over all pairs is left out" in left_out


def test_the_steps_of_epochs_are_those_that_the_scripts_make():
    run = Run(shape=GPTConfig(), T=64, unit="rows", step=32, max_steps=0)
    config = FineTuning(epochs=2.5, data_tokens=1000 * 64 - 5)
    loader = packing.PackedLoader(Lengths([64] * 1000), row_length=64, rows_per_step=32, seed=0)
    steps, rows = plan.steps_of_epochs(config, run)
    assert steps == math.ceil(2.5 * loader.steps_per_epoch) and rows == loader.most_rows
    run = Run(shape=GPTConfig(), T=64, unit="pairs", step=32, max_steps=0)
    assert plan.steps_of_epochs(Preferences(epochs=2.5, pairs=1000), run) == (math.ceil(2500 / 32), 32)
    assert plan.steps_of_epochs(Preferences(epochs=3.0, pairs=20), run) == (3, 20)
    for config, flag in ((FineTuning(), "data_tokens"), (Preferences(), "pairs")):
        kind = "pairs" if flag == "pairs" else "rows"
        with pytest.raises(InputError, match=f"--epochs=2 makes depends on the data; give --{flag} or --max"):
            plan.steps_of_epochs(config, Run(shape=GPTConfig(), T=64, unit=kind, step=32, max_steps=0))


class Lengths(sft.SFTDataset):
    """Conversations of which only the lengths matter."""

    def __init__(self, lengths: list[int]):
        self.values = np.array(lengths)

    def __len__(self) -> int:
        return len(self.values)

    def lengths(self) -> np.ndarray:
        return self.values


def test_data_that_are_here_and_do_not_suffice_will_fail_and_pretrainings_may_be_elsewhere(
    data_dir, tmp_path
):
    assert plan.data_problems(Config(data_dir=str(tmp_path / "elsewhere"))) == []
    assert plan.data_problems(Config(data_dir=str(data_dir), context_length=64)) == []
    (sentence,) = plan.data_problems(Config(data_dir=str(data_dir), context_length=10**6))
    assert "too few for one window" in sentence
    (sentence,) = plan.data_problems(FineTuning(data=str(tmp_path / "no.jsonl")))
    assert "does not exist" in sentence


def test_a_model_of_the_hub_that_is_not_here_is_told_with_the_command_that_brings_its_shape(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=r"`hf download some/model config\.json`"):
        plan.planned_run(FineTuning(model="some/model", max_steps=1), 8)


@pytest.mark.parametrize("script, config", plan.CONFIGS.items())
def test_all_flags_of_a_script_are_understood_with_its_defaults(script, config):
    theirs, ours = (
        asdict(found) for found in (script.Config(), parse_config(config, ["--beta2=0.9", "--gpus=1,8"]))
    )
    differing = {name for name, value in theirs.items() if ours[name] != value}
    assert differing == {"beta2", "shard"} and ours["gpus"] == "1,8" and ours["shard"] == "auto"


def test_a_phase_has_the_shape_of_its_model_and_given_flags_that_differ_are_refused(tmp_path):
    shape = GPTConfig(V, C, F, L, 4, max_position_embeddings=T)
    (tmp_path / "config.json").write_text(json.dumps(shape.to_hf()))
    flags = [f"--init_from={tmp_path}", f"--context_length={2 * T}", "--data_dir=nowhere"]
    run = plan.planned_run(parse_config(Config, flags), 8)
    assert run.shape.num_hidden_layers == L and run.shape.max_position_embeddings == 2 * T
    other = parse_config(Config, [*flags, "--num_hidden_layers=12"])
    with pytest.raises(InputError, match=f"num_hidden_layers=12, it has {L}"):
        plan.planned_run(other, 8)


def test_all_flags_are_documented(capsys):
    assert parse_config(Config, ["--beta2=0.9", "--gpus=1,8"]).beta2 == 0.9
    with pytest.raises(SystemExit):
        parse_config(Config, ["--help"])
    told = capsys.readouterr().out
    assert "--gpus_per_machine=8" in told and "optimizer steps" in told and "(DDP)" in told


def test_a_plan_in_fp32_is_refused_as_the_speed_is_not_known():
    with pytest.raises(InputError, match="--dtype=float32: only bf16 speeds of GPUs are known here"):
        plan.planned_run(Config(dtype="float32"), 8)
