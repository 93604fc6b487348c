"""The same on a GPU as on a CPU. Where there is no GPU the checks run on the CPU alone, those of CUDA graphs,
memory and NCCL not at all. `test.sh -m cuda` runs what needs a GPU; the table at the end has the differences.

bf16 has 8 significant bits: rounding to it changes a number by at most 2^-8, 0.4 %, and in the root mean
square by about 0.17 %. A few dozen roundings lie between the embedding and the logits, twice as many to a
gradient. So logits and gradients may differ by a few percent, in norm, and losses, means of many, by less.
The tolerances are some two times what bf16 on a CPU differs.
"""

import math
import re
import shutil
import time
import warnings
from collections import Counter

import pytest
import torch
from conftest import (
    TABLE,
    dpo_config,
    flags,
    losses,
    pretrain_config,
    random_ids,
    run,
    sft_config,
    small_model,
)
from test_optim import RATES, differing, numbers, set_gradients
from test_quickstart import run_quickstart

import dpo_gpt
import gpt
import pretrain_gpt
import sft_gpt
from attention import has_varlen
from chat import Config as ChatConfig
from checkpoint import copy_to_host
from common import read_records, run_script
from distributed import Ranks
from gpt import GPTModel
from optim import make_optimizer, set_learning_rate
from packing import collate
from training import StepHistory, forward_backward

GPUS = torch.cuda.device_count()


def on_gpus(*values, count: int = 1):
    """A test's parameters that need so many GPUs."""
    lacking = pytest.mark.skipif(
        count > GPUS, reason=f"needs {count} GPU(s) that torch can use, found {GPUS}"
    )
    return pytest.param(*values, marks=[pytest.mark.cuda, lacking])


both = pytest.mark.parametrize("device", ["cpu", on_gpus("cuda")])
gpu_only = pytest.mark.parametrize("device", [on_gpus("cuda")])


@pytest.fixture
def within(request):
    """Checks that a difference is within a tolerance, and makes it a row of the table."""
    began, matmul = time.perf_counter(), torch.get_float32_matmul_precision()

    def check(what: str, difference: float, tolerance: float) -> None:
        where = request.node.callspec.id
        TABLE.append((f"{what} [{where}]", tolerance, difference, time.perf_counter() - began))
        assert difference <= tolerance, what

    yield check
    torch.set_float32_matmul_precision(matmul)  # a run on a GPU sets it


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, as a share of the expected tensor's."""
    expected = expected.detach().cpu().double()
    return ((found.detach().cpu().double() - expected).norm() / expected.norm()).item()


def wider_model(device: str, **changes) -> GPTModel:
    """As small_model, but with heads for the kernels of CUDA and groups of them; unit variance in gives about
    unit variance out."""
    model = small_model(hidden_size=128, num_key_value_heads=2, max_position_embeddings=128, **changes)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5) if p.dim() == 2 else p.add_(1.0)
    return model.to(device)


def on(device: str, precision: str = "") -> Ranks:
    """A rank alone; its device named with a number, as join_ranks does."""
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    return Ranks(0, 1, place, precision=precision)


# -- one step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "kind"),
    [("cpu", "bf16"), on_gpus("cuda", "bf16"), on_gpus("cuda", "bf16 compiled"), on_gpus("cuda", "fp32")],
)
def test_logits_loss_and_gradients_are_those_of_fp32_on_a_cpu(device, kind, within):
    tolerance = {"logits": 1e-5, "loss": 1e-5, "gradients": 1e-4}
    if kind != "fp32":
        tolerance = {"logits": 0.03, "loss": 2e-3, "gradients": 0.06}
    ids = random_ids(4, 97)
    expected, model = wider_model("cpu"), wider_model(device)
    if kind == "bf16 compiled":
        model.compile_blocks()
    torch.set_float32_matmul_precision("highest")
    found = {}
    for m, at, wanted in ((expected, "cpu", False), (model, device, kind != "fp32")):
        own = ids.to(at)
        with torch.autocast(at, torch.bfloat16, enabled=wanted):
            found[m] = m(own[:, :-1]), m(own[:, :-1], own[:, 1:])
        found[m][1].backward()
    assert found[model][0].dtype == (torch.float32 if kind == "fp32" else torch.bfloat16)
    within("logits", apart(found[model][0], found[expected][0]), tolerance["logits"])
    within("loss", apart(found[model][1], found[expected][1]), tolerance["loss"])
    gradients = {name: p.grad for name, p in expected.named_parameters()}
    worst = max(apart(p.grad, gradients[name]) for name, p in model.named_parameters())
    within("gradients, the worst tensor", worst, tolerance["gradients"])


@both
def test_packed_rows_give_what_separate_rows_give_with_the_kernel_for_them(device, within):
    """Through varlen_attn on CUDA, whose products are bf16 in either case; lengths from 1 to a row's."""
    model, lengths = wider_model(device), [[1, 40, 87], [128], [64, 2, 33]]
    assert has_varlen(torch.device(device, 0), model.config.head_dim), "no kernel on this GPU"
    ids = [[random_ids(n, seed=100 * r + n).numpy() for n in row] for r, row in enumerate(lengths)]
    batch = collate([[(i, i) for i in row] for row in ids], 128, varlen=True)
    loss, gradients = 0.0, {}
    with torch.autocast(device, torch.bfloat16):
        packed = model(**{name: tensor.to(device) for name, tensor in batch.items()})
    packed.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for alone in (torch.from_numpy(i)[None].to(device) for row in ids for i in row if len(i) > 1):
        with torch.autocast(device, torch.bfloat16):
            part = model(alone[:, :-1], alone[:, 1:])
        part.backward()
        loss += part.detach()
    within("packed loss", apart(packed, loss), 3e-4)
    worst = max(apart(gradients[name], p.grad) for name, p in model.named_parameters())
    within("packed gradients, the worst tensor", worst, 0.04)


@both
def test_muons_update_in_bf16_is_that_in_fp32(device, within):
    """The matrices' is orthogonalized in bf16; AdamW's, of the rest, is in fp32 everywhere."""
    changes = {}
    for name, at, precision in (("expected", "cpu", "float32"), ("found", device, "bfloat16")):
        model = wider_model(at)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = make_optimizer(model, "muon", ranks=on(at, precision), **RATES)
        set_learning_rate(optimizer, 1.0)
        for seed in range(3):
            torch.manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn(p.shape).to(at)
            optimizer.step()
        changes[name] = {key: p.detach() - before[key] for key, p in model.named_parameters()}
    matrices = {key for key in before if ".layers." in key and before[key].dim() == 2}
    worst = {
        kind: max(apart(changes["found"][key], changes["expected"][key]) for key in keys)
        for kind, keys in (("matrices", matrices), ("rest", before.keys() - matrices))
    }
    within("Muon's update of the worst matrix", worst["matrices"], 0.05)
    within("AdamW's update of the worst tensor", worst["rest"], 1e-4)
    assert worst["matrices"] > 1e-4  # bf16 was used


def on_host(tensors: dict) -> dict:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


@both
def test_a_bad_step_changes_nothing_and_on_a_gpu_nobody_waits_to_know(device, within):
    """Of three steps the second has a gradient that is NaN."""
    ranks = on(device)
    model = wider_model(device)
    optimizer = make_optimizer(model, "muon", ranks=ranks, **RATES)
    lr = set_learning_rate(optimizer, 1.0)
    history, read, states = StepHistory(6.0, ranks, read_all=lambda step: step == 3), [], []
    poison = model.lm_head.weight.register_hook(lambda grad: grad * (math.nan if len(states) == 1 else 1.0))
    waits = []
    for step in (1, 2, 3):
        ids = random_ids(2, 65, seed=step)
        batch = ranks.pin({"input_ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()})
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            loss, norm = forward_backward(model, [batch], targets=128, max_grad_norm=1.0, ranks=ranks)
            bad = history.record(
                step, loss_sum=loss, grad_norm=norm, targets=128, tokens=128, lr=lr, stop=False
            )
            optimizer.step(skip=bad)
            optimizer.zero_grad(set_to_none=True)
            read.append([(o.step, o.numbers["skipped"]) for o in history.outcomes(step)])
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        waits += [f"{w.filename}:{w.lineno}" for w in told if "synchronizing" in str(w.message)]
        states.append(on_host(numbers(model, optimizer)))
    poison.remove()
    good, nan = [(1, None), (3, None)], (2, "its grad_norm is nan")
    late = [[], good[:1], [nan, *good[1:]]]
    assert read == (late if device == "cuda" else [good[:1], [nan], good[1:]])
    within("tensors that a bad step changed", len(differing(states[0], states[1])), 0)
    within("tensors that a good step left as they were", len(states[1]) - len(differing(*states[1:])), 0)
    assert not waits, waits


@both
def test_a_copy_for_a_checkpoint_is_what_was_there_when_it_was_made(device, within):
    """The update that follows at once does not reach it. On CUDA the copies are still under way then."""
    model = wider_model(device)
    optimizer = make_optimizer(model, "adamw", ranks=on(device), **RATES)
    set_learning_rate(optimizer, 1.0)
    set_gradients(model, 0)
    optimizer.step()
    expected = on_host(numbers(model, optimizer))
    copied = copy_to_host(numbers_without_copying(model, optimizer), {}, keep=True)
    set_gradients(model, 1)
    optimizer.step()
    if device == "cuda":
        assert all(tensor.is_pinned() for tensor in copied.values())
        torch.cuda.synchronize()  # as Checkpoints.save does
    within("tensors that differ in a copy", len(differing(copied, expected)), 0)
    assert len(differing(copied, on_host(numbers(model, optimizer)))) == len(copied)


def numbers_without_copying(model, optimizer) -> dict:
    """As numbers, but the tensors themselves."""
    found = {name: p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{name} {key}": value for key, value in optimizer.state[p].items()}
    return found


# -- decoding ------------------------------------------------------------------------------------------------

PROMPTS = [random_ids(n, seed=n).tolist() for n in (3, 17, 9)]


@both
def test_every_decoded_id_is_nearly_the_likeliest_by_whole_forward_passes_in_fp32(device, within):
    """On a GPU through bf16, a cache and a replayed graph; its choice may fall on a near tie."""
    model, judge, worst = wider_model(device), wider_model("cpu"), 0.0
    model.graph_decoding = True
    with on(device).autocast():
        steps = list(model.generate(PROMPTS, 40))
    for prompt, ids in zip(PROMPTS, zip(*steps)):
        with torch.no_grad():
            logits = judge(torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
        worst = max(worst, ((logits.amax(1) - chosen) / logits.std(1)).max().item())
    within("decoded ids below the likeliest, in deviations", worst, 0.1 if device == "cuda" else 1e-5)


@gpu_only
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.8, "top_k": 50, "seed": 1}], ids=["greedy", "drawn"]
)
def test_decoding_by_a_cuda_graph_gives_the_ids_of_eager_decoding(device, options, within):
    model, found = wider_model(device), []
    for model.graph_decoding in (False, True):
        with on(device).autocast():
            found.append(list(model.generate(PROMPTS, 40, **options)))
    within("steps that a graph decodes otherwise", sum(a != b for a, b in zip(*found)), 0)
    assert len(found[0]) == 40


# -- whole runs ----------------------------------------------------------------------------------------------


def worst_loss(found, expected) -> float:
    """The largest relative difference among two runs' losses, validations included."""
    ours, theirs = losses(found), losses(expected)
    assert [row[0] for row in ours] == [row[0] for row in theirs] and len(theirs) > 6
    pairs = [
        (a, b) for rows in zip(ours, theirs) for a, b in zip(*(row[1:3] for row in rows)) if b is not None
    ]
    return max(abs(a - b) / abs(b) for a, b in pairs)


@pytest.mark.parametrize(
    ("first", "second"),
    [("cpu", "cpu"), on_gpus("cpu", "cuda"), on_gpus("cuda", "cpu"), on_gpus("cuda", "cuda")],
)
def test_a_run_that_began_on_one_device_goes_on_on_another(first, second, data_dir, tmp_path, within):
    """As if it had died after step 2 of 6, beside one that stayed on the first, whose precision it keeps."""
    learning = {"lr": 0.02, "warmup_steps": 0}  # so fast that a wrong step shows
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path / "stayed", device=first, **learning))
    shutil.copytree(tmp_path / "stayed", tmp_path / "moved")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "moved" / f"step_{step:07d}")
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path / "moved", device=second, dtype="auto", **learning))
    rows = [row for row in losses(tmp_path / "stayed") if row[1]]
    assert rows[2][1] < 0.97 * rows[0][1]  # another start would be three percent away
    within("losses of a moved run", worst_loss(tmp_path / "moved", tmp_path / "stayed"), 0.01)


SCRIPTS = {"pretrain": pretrain_gpt, "sft": sft_gpt, "dpo": dpo_gpt}


@both
@pytest.mark.parametrize("script", SCRIPTS)
def test_checkpointed_activations_give_the_same_losses(
    script, device, data_dir, base_run, chats, preferences, tmp_path, within, monkeypatch
):
    counts, original = Counter(), gpt.checkpoint

    def counted(part, *arguments, **options):
        counts[checkpointed] += isinstance(part, gpt.TransformerBlock)  # an MLP's product always is
        return original(part, *arguments, **options)

    monkeypatch.setattr(gpt, "checkpoint", counted)
    found = {}
    for checkpointed in (False, True):
        out, fields = tmp_path / str(checkpointed), {"device": device, "checkpoint_activations": checkpointed}
        if script == "pretrain":
            config = pretrain_config(data_dir, out, **fields)
        elif script == "sft":
            config = sft_config(base_run, chats, out, **fields)
        else:
            config = dpo_config(base_run, preferences, out, **fields)
        SCRIPTS[script].main(config)
        found[checkpointed] = losses(out)
    assert counts[True] > 0 == counts[False]
    assert len(found[True]) == len(found[False]) >= 5
    pairs = [(a, b) for rows in zip(found[True], found[False]) for a, b in zip(*rows) if b]
    worst = max(abs(a - b) / abs(b) for a, b in pairs)
    within("losses with checkpointed activations", worst, 2e-3 if device == "cuda" else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "full"])
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), on_gpus("cuda", count=2)])
def test_two_ranks_equal_one(device, shard, data_dir, tmp_path, within):
    """Over NCCL on GPUs, over gloo on CPUs."""
    for ranks in (1, 2):
        config = pretrain_config(data_dir, tmp_path / f"{ranks}", device=device, shard=shard, samples=True)
        done = run("pretrain_gpt.py", *flags(config), ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"{ranks} x {device}" in done.stdout
    tolerance = 0.01 if device == "cuda" else 2e-4
    within("losses of two ranks", worst_loss(tmp_path / "2", tmp_path / "1"), tolerance)


@gpu_only
def test_the_quick_start_shrunk_runs_on_a_gpu(device, tmp_path, within):
    printed = run_quickstart(tmp_path)
    assert "1 x cuda:0" in printed
    rows = [row for row in read_records(tmp_path / "base" / "metrics.jsonl") if "loss" in row]
    assert all(row["memory_gb"] > 0 for row in rows)
    within("the quick start's last loss, as a share of its first", rows[-1]["loss"] / rows[0]["loss"], 0.999)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), on_gpus("cuda")])
def test_the_benchmark_of_a_step_tells_mfu(device, within):
    shape = ["--hidden_size=64", "--num_hidden_layers=2", "--context_length=64", "--micro_batch_size=4"]
    if device == "cuda":  # the default shape of pretrain_gpt.py
        shape = [
            "--hidden_size=512",
            "--num_hidden_layers=12",
            "--num_attention_heads=8",
            "--context_length=1024",
        ]
        shape.append("--vocab_size=49152")
    done = run("bench.py", "--only=step", f"--device={device}", "--rounds=3", *shape)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    shares = [float(share) / 100 for share in re.findall(r"([\d.]+)% MFU", done.stdout)]
    if "is not known" in done.stdout:
        pytest.skip("this GPU's peak is not known")
    assert len(shares) == 3 and min(shares) > 0
    within("MFU of a compiled step, at most the peak", shares[1], 1.0)


@gpu_only
def test_a_gpu_out_of_memory_is_one_sentence_with_the_sizes(device, within, monkeypatch, capsys):
    def main(_):
        torch.empty(2**46, dtype=torch.uint8, device=device)

    monkeypatch.setattr("sys.argv", ["chat.py"])
    with pytest.raises(SystemExit, match="1"):
        run_script(main, ChatConfig)
    told = capsys.readouterr().err
    sizes = (
        r"error: out of memory on the GPU \([\d.]+ \wiB were asked for, the GPU has [\d.]+ \wiB, [\d.]+ \wiB"
    )
    assert re.match(sizes, told) and told.count("\n") == 1, told
    within("lines of the error beyond one", told.count("\n") - 1, 0)
