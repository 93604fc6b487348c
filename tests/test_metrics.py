"""What a run records."""

import gzip
import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ALONE, random_ids, small_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import metrics
from common import InputError, read_json, read_records, write_records
from distributed import Ranks
from gpt import GPTConfig
from metrics import Metrics, Profiler, flops_per_token, mean_context, peak_memory, start_wandb


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

    calls, axes, projects = [], [], set()

    def init(mode, project, **options):
        calls.append(mode)
        projects.add(project)
        if mode == "online":
            raise wandb.errors.CommError("no route to host")
        return SimpleNamespace(mode=mode, define_metric=lambda name, step_metric: axes.append(step_metric))

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
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
        monkeypatch.delenv("WANDB_MODE", raising=False)
        result = start_wandb(mode, tmp_path, run_id=None, settings={})
        assert calls == expected and (result.mode if result else None) == (expected[-1] if expected else None)
    assert projects == {metrics.Path(metrics.__file__).parent.name}
    # wandb's own variables. It does not look for a key when it is told to stay offline.
    monkeypatch.setattr(metrics, "has_wandb_key", lambda: False)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for told, mode, expected in (
        ("offline", "auto", ["offline"]),
        ("disabled", "auto", []),
        ("offline", "off", []),
        ("disabled", "offline", ["offline"]),
    ):
        calls.clear()
        projects.clear()
        monkeypatch.setenv("WANDB_MODE", told)
        start_wandb(mode, tmp_path, run_id=None, settings={})
        assert calls == expected and projects <= {"mine"}, (told, mode)
    assert set(axes) == {"step"}  # an axis of its own: wandb drops what comes below its last step
    assert "wandb cannot be reached (no route to host)" in capsys.readouterr().err


def test_wandbs_run_id_outlives_a_time_without_wandb(tmp_path):
    state = {"wandb_id": "abc", "path": tmp_path / "step_0000003"}
    log = recorder(tmp_path, start=3, state=state)
    assert log.wandb_id == "abc"
    log.close()


def test_a_fork_has_the_rows_up_to_its_start_and_a_run_of_its_own_in_wandb(tmp_path):
    first, fork = tmp_path / "first", tmp_path / "fork"
    (first / "step_0000003").mkdir(parents=True)
    fork.mkdir()
    log = recorder(first)
    for step in range(6):
        log.log(step, loss=1.0)
    log.close()
    write_records(first / "answers.jsonl", [{"step": 0, "question": "a", "answer": "b", "stopped": True}])
    state = {"wandb_id": "abc", "path": first / "step_0000003"}
    log = recorder(fork, start=3, state=state)
    assert log.wandb_id is None
    log.log(4, loss=2.0)
    log.close()
    assert [row["loss"] for row in read_records(log.path)] == [1.0, 1.0, 1.0, 1.0, 2.0]
    assert read_records(fork / "answers.jsonl") == read_records(first / "answers.jsonl")
    # A link into the run's own folder is no fork, and without the other's rows a run keeps its own.
    (tmp_path / "latest").symlink_to(first / "step_0000003")
    log = recorder(first, start=3, state=state | {"path": tmp_path / "latest"})
    assert log.wandb_id == "abc" and len(read_records(log.path)) == 4
    log.close()
    log = recorder(first, start=2, state=state | {"path": tmp_path / "backup" / "step_0000002"})
    assert len(read_records(log.path)) == 3
    log.close()


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


def test_numbers_that_are_logged_anew_and_are_shorter_leave_nothing_of_the_old_row(tmp_path):
    log = recorder(tmp_path)
    log.log(1, accuracy=0.38123456789)
    log.log(1, accuracy=0.5)
    log.close()
    assert log.path.read_text() == '{"step": 1, "accuracy": 0.5}\n'


def test_a_run_from_the_beginning_takes_nothing_from_another_that_died_before_it_saved(tmp_path, monkeypatch):
    asked = []

    def start(mode, out_dir, *, run_id, settings):
        asked.append(run_id)
        return SimpleNamespace(id=f"run {len(asked)}", finish=lambda: None, log=lambda row: None)

    monkeypatch.setattr(metrics, "start_wandb", start)
    for model in ("big", "small", "small"):
        log = recorder(tmp_path, settings={"model": model})
        assert not log.has(0, "val_loss") and not read_records(log.path)
        log.log(0, val_loss=4.0)
        log.close()
    assert asked == [None, None, "run 2"]
    (tmp_path / "run.json").write_text("{")
    recorder(tmp_path, settings={"model": "small"}).close()
    assert asked[-1] is None


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


def test_a_skipped_step_s_loss_is_not_the_run_s(tmp_path):
    log = recorder(tmp_path)
    log.step(1, NUMBERS, seconds=1.0)
    log.step(2, NUMBERS | {"loss": 40.0, "skipped": "a spike"}, seconds=1.0)
    log.close()
    assert read_records(log.path)[-1]["loss"] == 40.0  # it is recorded
    assert log.last_losses() == ["step 1, loss: 2.0000 nats/token"]


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
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(ranks, "slow_one", lambda: "rank 3 on node7 is slow")
    log = Metrics(tmp_path, start=0, max_steps=9, step_tokens=256, log_every=2, ranks=ranks)
    log.step(1, NUMBERS, seconds=1.0)
    assert capsys.readouterr().out == ""
    log.step(2, NUMBERS, seconds=1.0)
    log.close()
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert "  12.3 GB  " in first and second == "rank 3 on node7 is slow"
    assert read_records(log.path)[0]["memory_gb"] == 12.346
    assert read_json(tmp_path / "run.json")["devices"].startswith("1 x NVIDIA H200, ")


def test_each_line_of_a_run_has_its_units_and_the_time_left_in_the_same_columns(tmp_path, capsys):
    log = recorder(tmp_path, flops_per_token=1e6, peak_flops=1e9)
    for step, loss, norm, seconds in ((1, 10.5, 120.25, 4.0), (2, 2.0, 0.5, 0.001), (9, 3.0, 1.0, 1000.0)):
        log.step(step, {**NUMBERS, "loss": loss, "grad_norm": norm}, seconds=seconds)
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "step      1/9  loss 10.5000 nats/token  lr 1.00e-01  grad norm 120.250         64 tok/s   6.4% mfu"
        "     00:32 left"
    )
    words = ("/9", "nats/token", "lr", "grad norm", "tok/s", "left")
    places = {tuple(line.replace("25600.0%", "%").index(word) for word in words[:4]) for line in lines}
    assert len(lines) == 3 and len(places) == 1
    assert len({line.index("tok/s") for line in lines}) == 1


class Stream(io.StringIO):
    """A place to print to, which may be a terminal."""

    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize(
    ("terminal", "rank", "start", "shown"),
    [(True, 0, 0, True), (False, 0, 0, False), (True, 1, 0, False), (True, 0, 9, False)],
)
def test_a_bar_is_shown_on_rank_0s_terminal_only_and_lines_stay_whole(
    terminal, rank, start, shown, tmp_path, monkeypatch, capsys
):
    stream = Stream(terminal)
    monkeypatch.setattr(metrics.sys, "stderr", stream)
    ranks = Ranks(rank, 2, torch.device("cpu"))
    monkeypatch.setattr(ranks, "each", lambda value: [value, value])
    log = Metrics(tmp_path, start=start, max_steps=9, step_tokens=256, log_every=1, ranks=ranks)
    log.step(start + 1, NUMBERS, seconds=1.0)
    log.close()
    assert bool(stream.getvalue()) == shown and ("/9" in stream.getvalue()) == shown
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith(f"step {start + 1:6d}/9  loss  2.0000") for line in lines] == [True] * (rank == 0)


def test_the_picture_has_losses_learning_rate_and_speed(tmp_path, monkeypatch):
    Figure = pytest.importorskip("matplotlib.figure").Figure
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    log = recorder(tmp_path)
    log.validated(0, 3.0)
    for step in (1, 2):
        log.step(step, {**NUMBERS, "loss": 3.0 - step / 2, "lr": step / 10}, seconds=1.0)
    log.validated(2, 2.5, val_bpb=1.0)
    log.close()
    drawn = [[line.get_xydata().tolist() for line in axes.lines] for axes in figures[-1].axes]
    losses = [[[1, 2.5], [2, 2.0]], [[0, 3.0], [2, 2.5]]]
    assert drawn == [losses, [[[1, 0.1], [2, 0.2]]], [[[1, 256], [2, 256]]]]
    labels = [axes.get_ylabel() for axes in figures[-1].axes]
    assert labels == ["loss (nats/token)", "learning rate", "tokens/s"]


def test_a_picture_that_cannot_be_drawn_costs_the_picture_only(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "$lr_$wd"  # no formula
    folder.mkdir()
    log = recorder(folder)
    log.validated(0, 3.0)
    assert log.path.with_name("loss.png").exists()
    monkeypatch.setattr(Metrics, "drawn", lambda self: 1 / 0)
    for step in (2, 4):
        log.validated(step, 2.5)
    log.close()
    told = "warning: there will be no loss.png (division by zero)"
    assert capsys.readouterr().err.count(told) == 1 and len(read_records(log.path)) == 3


@pytest.mark.parametrize(("start", "kept"), [(0, []), (2, [0, 2])])
def test_what_a_lost_run_wrote_after_its_last_checkpoint_is_not_shown_as_this_run_s(start, kept, tmp_path):
    for name in ("answers.jsonl", "samples.jsonl"):
        write_records(tmp_path / name, [{"step": step, "text": "lost"} for step in (0, 2, 4)])
    state = {"path": tmp_path / "step_0000002", "wandb_id": None} if start else None
    recorder(tmp_path, start=start, state=state).close()
    for name in ("answers.jsonl", "samples.jsonl"):
        assert [row["step"] for row in read_records(tmp_path / name)] == kept
        assert (tmp_path / name).exists() == bool(kept)


def test_without_wandb_and_matplotlib_a_run_goes_on_and_says_so(tmp_path, monkeypatch, capsys):
    for name in ("wandb", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    log = recorder(tmp_path)
    log.validated(0, 3.0)
    log.step(1, NUMBERS, seconds=1.0)
    log.close()
    assert not (tmp_path / "loss.png").exists() and len(read_records(tmp_path / "metrics.jsonl")) == 2
    assert "matplotlib is not installed, so there will be no loss.png" in capsys.readouterr().err
    for told in ("", "offline"):
        monkeypatch.setenv("WANDB_MODE", told)
        assert start_wandb("auto", tmp_path, run_id=None, settings={}) is None
    with pytest.raises(InputError, match="--wandb=online needs wandb, which is not installed"):
        start_wandb("online", tmp_path, run_id=None, settings={})


def test_what_a_model_wrote_is_kept_once_for_each_step(tmp_path, capsys):
    log = recorder(tmp_path)
    log.samples(0, ["a", "b"])
    log.samples(3, ["c", "d"])
    log.close()
    again = recorder(tmp_path, start=2)
    again.samples(3, ["e", "f"])
    again.close()
    rows = [(row["step"], row["text"]) for row in read_records(tmp_path / "samples.jsonl")]
    assert rows == [(0, "a"), (0, "b"), (3, "e"), (3, "f")]
    assert capsys.readouterr().out.splitlines()[-2:] == ["  | e", "  | f"]


def test_a_run_notes_how_it_was_started_and_a_finished_one_keeps_its_note(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.sys, "argv", ["/somewhere/sft_gpt.py", "--data=my chats.jsonl"])
    recorder(tmp_path, settings={"lr": 0.1}).close()
    facts = read_json(tmp_path / "run.json")
    assert facts["command"] == "sft_gpt.py '--data=my chats.jsonl'" and facts["settings"] == {"lr": 0.1}
    assert (facts["max_steps"], facts["step_tokens"], facts["unit"]) == (9, 256, "nats/token")
    assert facts["devices"] == "1 x cpu, float32"
    monkeypatch.setattr(metrics.sys, "argv", ["sft_gpt.py"])
    recorder(tmp_path, start=9).close()
    assert read_json(tmp_path / "run.json") == facts
    assert facts["launcher"] == "python"


@pytest.mark.parametrize(
    ("world", "local", "launcher"),
    [
        (2, "2", "torchrun --nproc_per_node=2"),
        (16, "8", "torchrun --nproc_per_node=8 --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=n1:29500"),
    ],
)
def test_a_run_on_several_ranks_notes_how_many_torchrun_is_to_start(
    world, local, launcher, tmp_path, monkeypatch
):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.setenv("MASTER_ADDR", "n1")
    log = recorder(tmp_path)
    log.close()
    log.ranks = Ranks(0, world, torch.device("cpu"))
    log.note_run({})
    assert read_json(tmp_path / "run.json")["launcher"] == launcher


def test_the_seconds_of_all_steps_are_recorded(tmp_path):
    log = Metrics(tmp_path, start=0, max_steps=5, step_tokens=256, log_every=2, ranks=ALONE)
    for step in range(1, 6):
        log.step(step, NUMBERS, seconds=float(step))
    log.close()
    assert [row["seconds"] for row in read_records(log.path)] == [3.0, 7.0, 5.0]


def test_the_seconds_of_steps_before_a_stop_are_recorded_with_its_checkpoint(tmp_path):
    log = Metrics(tmp_path, start=0, max_steps=9, step_tokens=256, log_every=4, ranks=ALONE)
    for step in range(1, 8):
        log.step(step, NUMBERS, seconds=float(step))
        if step in (3, 4, 6):
            log.saved(step, 0.5)
    log.close()
    told = {row["step"]: row["seconds"] for row in read_records(log.path)}
    assert told == {3: 1.0 + 2.0 + 3.0, 4: 4.0, 6: 5.0 + 6.0}
    speeds = [row["tokens_per_second"] for row in read_records(log.path) if "tokens_per_second" in row]
    assert speeds == [round(4 * 256 / 10)]


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


def test_the_flops_of_a_token_are_those_computed_by_hand():
    """Per block: q 64 x 64, k and v 64 x 32 each, o 64 x 64, three matrices of 64 x 192; the head 64 x 1000;
    and attention over 128 tokens."""
    fields = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    block = 4096 + 2 * 2048 + 4096 + 3 * 12288
    expected = 6 * (3 * block + 64_000) + 12 * 3 * 64 * 128
    for tied in (False, True):
        config = GPTConfig(**fields, num_key_value_heads=2, tie_word_embeddings=tied)
        assert config.intermediate_size == 192 and flops_per_token(config, 128) == expected == 1_563_648


@pytest.mark.parametrize("change", [{}, {"num_key_value_heads": 2, "head_dim": 16}, {"qk_norm": False}])
def test_torch_counts_the_same_flops_to_the_last_one(change):
    """With attention as plain products; torch counts no fused kernel of the CPU."""
    model, (B, T) = small_model(**change), (2, 64)
    ids = random_ids(B, T)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, ids).backward()
    assert counter.get_total_flops() == B * T * flops_per_token(model.config, T)


def test_the_mean_context_gives_the_flops_of_sequences_of_all_lengths():
    config, lengths = small_model().config, np.array([3, 5, 5, 60])
    together = sum(n * flops_per_token(config, n) for n in lengths.tolist())
    assert lengths.sum() * flops_per_token(config, mean_context(lengths)) == pytest.approx(
        together, rel=1e-12
    )


def test_a_cpu_tells_no_memory():
    assert peak_memory(torch.device("cpu")) is None


# -- a profile -----------------------------------------------------------------------------------------------


def trace_of(folder, steps: int, done: int) -> list[str]:
    """The names of what was recorded in a run of `done` steps, each a matrix product and a step's number."""
    profiler = Profiler(steps, folder, Ranks(3, 4, torch.device("cpu")))
    for _ in range(done):
        torch.ones(4, 4) @ torch.ones(4, 4)
        profiler.step()
    profiler.close()
    (path,) = (folder / "profile").iterdir()
    assert path.name == "rank3.json.gz"
    return [event["name"] for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]


@pytest.mark.parametrize(("done", "recorded"), [(20, 2), (6, 1)])
def test_a_profile_holds_the_wanted_steps_and_their_kernels_also_of_a_run_that_ends_amid_them(
    tmp_path, done, recorded
):
    names = trace_of(tmp_path, 2, done)
    assert names.count("aten::mm") == recorded
    assert (
        {"ProfilerStep#5"} <= set(names) and "ProfilerStep#4" not in names and "ProfilerStep#7" not in names
    )


def test_without_steps_to_profile_nothing_is_written(tmp_path):
    profiler = Profiler(0, tmp_path, ALONE)
    profiler.step()
    profiler.close()
    assert not list(tmp_path.iterdir())


def test_a_run_too_short_for_a_profile_says_so(tmp_path, capsys):
    profiler = Profiler(2, tmp_path, ALONE)
    for _ in range(4):
        profiler.step()
    profiler.close()
    assert not list((tmp_path / "profile").iterdir())
    assert "no profile is written; it begins after 5 steps" in capsys.readouterr().out
