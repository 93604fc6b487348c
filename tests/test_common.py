"""The command line, the user's mistakes, small files."""

import dataclasses
import errno
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL, pretrain_config, run, torchrun

import bench
import chat
import common
import dpo_gpt
import prepare_data
import pretrain_gpt
import sft_gpt
from common import (
    InputError,
    cache_folder,
    field_comments,
    lock_folder,
    locked,
    parse_config,
    read_records,
    run_script,
)

SCRIPTS = {
    script.__name__ + ".py": script.Config
    for script in (prepare_data, pretrain_gpt, sft_gpt, dpo_gpt, chat, bench)
}


def test_flags_override_fields_of_every_type():
    config = parse_config(
        pretrain_gpt.Config, ["--max_steps=1e3", "--batch_tokens=1_024", "--lr=2e-4", "--qk_norm=false"]
    )
    assert (config.max_steps, config.batch_tokens, config.lr, config.qk_norm) == (1000, 1024, 2e-4, False)
    assert config == dataclasses.replace(
        pretrain_gpt.Config(), max_steps=1000, batch_tokens=1024, lr=2e-4, qk_norm=False
    )


def test_a_home_that_the_shell_leaves_behind_an_equals_sign_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = ["--out_dir=~/run", "--data_dir=~/a:1,b~/c:2,~:3"]
    config = parse_config(pretrain_gpt.Config, given)
    assert (config.out_dir, config.data_dir) == ("/home/me/run", "/home/me/a:1,b~/c:2,~:3")
    assert parse_config(chat.Config, ["--prompt=~/ is my home"]).prompt == "~/ is my home"


@pytest.mark.parametrize("argument", ["--learning_rate=1", "max_steps=1", "--max_steps 3"])
def test_an_unknown_flag_is_refused_with_what_exists(argument):
    with pytest.raises(InputError, match=r"is not understood(.|\n)*--max_steps=2000(.|\n)*optimizer steps"):
        parse_config(pretrain_gpt.Config, [argument])


def test_a_flag_without_its_value_is_told_how_it_is_written():
    with pytest.raises(InputError, match=r"^--max_steps has no value; write --max_steps=value \(optimizer"):
        parse_config(pretrain_gpt.Config, ["--max_steps", "3"])


@pytest.mark.parametrize(
    "argument", ["--max_steps=many", "--max_steps=1.5", "--max_steps=inf", "--lr=", "--qk_norm=yes"]
)
def test_a_value_of_the_wrong_type_is_refused(argument):
    with pytest.raises(InputError, match=r"is not of type (int|float|bool)"):
        parse_config(pretrain_gpt.Config, [argument])


@pytest.mark.parametrize("config_class", SCRIPTS.values(), ids=SCRIPTS)
def test_help_gives_every_field_with_its_default_and_meaning(config_class, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(config_class, ["--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    for field in dataclasses.fields(config_class):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"  --{field.name}=")]
        assert f"={field.default}" in line and len(line.split("  ")[-1]) > 5, line


def test_the_help_of_a_flag_does_not_depend_on_where_its_line_is_broken():
    @dataclasses.dataclass
    class Broken:
        name: int = 8  # told here
        other: str = "# no comment"  # and
        last: tuple = (  # in two
            1,  # parts
        )

    assert field_comments(Broken) == {"name": "told here", "other": "and", "last": "in two parts"}

    @dataclasses.dataclass
    class Silent:
        told: int = 1  # one
        silent: str = "# this is no comment"

    with pytest.raises(ValueError, match=r"Silent has fields without a comment: silent"):
        field_comments(Silent)


@pytest.mark.parametrize(
    ("script", "arguments", "sentence"),
    [
        ("prepare_data.py", ["--source=missing.jsonl"], "missing.jsonl does not exist"),
        (
            "pretrain_gpt.py",
            ["--data_dir=missing"],
            "missing holds no token shards; make them with prepare_data.py",
        ),
        ("sft_gpt.py", ["--model=no/model"], "no directory no/model"),
        ("chat.py", ["--temprature=1"], "--temprature=1 is not understood"),
        ("chat.py", ["--model=" + "x" * 300], "a name is too long for a file"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_status_1(script, arguments, sentence, tmp_path):
    result = run(script, *arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert f"error: {sentence}" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/somebody/base"),
            r"/somebody/base may not be used \(Permission denied\); ask its owner or name another",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "model.safetensors"),
            r"the disk is full \(.*model.safetensors.*\); make room and run .*, it continues",
        ),
    ],
)
def test_a_file_that_cannot_be_had_is_one_sentence(error, sentence, monkeypatch, capsys):
    def main(_):
        raise error

    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py"])
    with pytest.raises(SystemExit, match="1"):
        run_script(main, pretrain_gpt.Config)
    assert re.fullmatch(f"error: {sentence}\n", capsys.readouterr().err)


CUDA_OUT_OF_MEMORY = """CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of 79.10
GiB of which 1.21 GiB is free. Including non-PyTorch memory, this process has 77.88 GiB memory in use. Of the
allocated memory 75.11 GiB is allocated by PyTorch, and 1.02 GiB is reserved by PyTorch but unallocated."""


@dataclasses.dataclass
class Flags:
    micro_batch_size: int = 16  # rows
    checkpoint_activations: bool = False  # less memory, more time


@pytest.mark.parametrize(
    ("config_class", "text", "sentence"),
    [
        (
            Flags,
            CUDA_OUT_OF_MEMORY,
            "(2.25 GiB were asked for, the GPU has 79.10 GiB, 1.21 GiB are free); lower --micro_batch_size "
            "or use --checkpoint_activations, and",
        ),
        (chat.Config, CUDA_OUT_OF_MEMORY, "1.21 GiB are free); choose a smaller model, and"),
        (Flags, "in words\nnobody knows", "(in words nobody knows); lower --micro_batch_size or"),
    ],
)
def test_a_gpu_out_of_memory_is_one_sentence_with_the_sizes_and_the_flags_that_help(
    config_class, text, sentence, monkeypatch, capsys
):
    def main(_):
        raise torch.OutOfMemoryError(text)

    monkeypatch.setattr("sys.argv", ["script.py"])
    with pytest.raises(SystemExit, match="1"):
        run_script(main, config_class)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory on the GPU (") and sentence in line


def test_other_errors_of_torch_keep_their_traceback(monkeypatch):
    def main(_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("sys.argv", ["script.py"])
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run_script(main, Flags)


@pytest.mark.slow
def test_a_gpu_out_of_memory_in_a_step_ends_all_ranks_and_torchrun_does_not_try_again(data_dir, tmp_path):
    pytest.importorskip("torch", minversion="2.13", reason="torchrun has --shutdown_timeout since torch 2.13")
    config = pretrain_config(data_dir, tmp_path / "run", **SMALL)
    with torchrun("memory:3:1", config, "--max_restarts=3", "--shutdown_timeout=5") as job:
        printed, errors = job.communicate(timeout=120)
    assert job.returncode != 0 and (printed + errors).count("out of memory on the GPU (planted)") == 1
    assert "lower --micro_batch_size" in errors and "OutOfMemoryError" not in errors


@pytest.mark.parametrize("script", [pretrain_gpt, sft_gpt, dpo_gpt])
def test_numbers_that_can_mean_nothing_are_refused(script):
    fields = {f.name for f in dataclasses.fields(script.Config)}
    for name, value, expected in (
        ("keep_last", -1, "from zero up"),
        ("max_steps", -5, "zero"),
        ("profile", -1, "from zero up"),
        ("epochs", math.nan, "above zero"),
        ("epochs", math.inf, "above zero"),
        ("warmup_fraction", 2.0, "a share"),
        ("max_grad_norm", -1.0, "from zero up"),
        ("max_length", -5, "from zero up"),
        ("beta", math.nan, "above zero"),
        ("lr", math.nan, "from zero up"),
        ("micro_batch_size", 0, "above zero"),
        ("batch_tokens", 0, "above zero"),
    ):
        if name in fields:
            with pytest.raises(InputError, match=f"--{name}={value}: expected a.* {expected.split()[-1]}"):
                script.main(script.Config(**{name: value}))


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 1}]
    assert read_records(tmp_path / "none.jsonl") == []


def test_damaged_lines_of_the_metrics_are_told_and_stop_no_run(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st\0\0\0\xff\n{"step": 3}\n{"step": 4, "lo')
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 3}]
    assert f"line 2 of {tmp_path}/metrics.jsonl is damaged" in capsys.readouterr().err


def test_a_lock_that_is_another_users_is_one_sentence(tmp_path):
    (tmp_path / ".lock").mkdir()  # root may write any file, but no folder
    with pytest.raises(InputError, match=r"\.lock cannot be written .*another user's.*choose another"):
        lock_folder(tmp_path)


def test_a_disk_without_locks_is_warned_of_and_used(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(common.fcntl, "lockf", lockf)
    with locked(tmp_path / "a.lock"):
        assert (tmp_path / "a.lock").exists()
    lock_folder(tmp_path).close()
    assert capsys.readouterr().err.count("cannot be locked ([Errno 37] No locks available)") == 2


def test_a_home_of_nobody_is_one_sentence():
    with pytest.raises(InputError, match="~nobody-is-here/x names the home of nobody here"):
        cache_folder("~nobody-is-here/x")


def test_a_character_that_the_terminal_lacks_is_printed_as_a_question_mark(tmp_path):
    (tmp_path / "program.py").write_text(
        "import dataclasses\nfrom common import run_script\n"
        "@dataclasses.dataclass\nclass Config:\n    x: int = 0  # a number\n"
        "run_script(lambda config: print('\\u6f22 \\u00e9'), Config)\n"
    )
    terminal = os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, tmp_path / "program.py"]
    done = subprocess.run(program, capture_output=True, env=terminal, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("latin-1") == "? \u00e9\n"


@pytest.mark.parametrize(("ranks", "finalized"), [("1", True), ("2", False), ("", True)])
@pytest.mark.parametrize(("end", "status"), [("", 0), ("raise SystemExit(75)", 75)])
def test_a_rank_ends_without_python_s_own_end_in_which_threads_of_gloo_may_abort_it(
    ranks, finalized, end, status, tmp_path
):
    (tmp_path / "program.py").write_text(
        "import atexit, ctypes, dataclasses, os, threading, time\nfrom common import run_script\n"
        "@dataclasses.dataclass\nclass Config:\n    x: int = 0  # a number\n"
        "class Last:\n    def __del__(self, write=os.write):\n        write(1, b'finalized\\n')\n"
        "last = Last()\natexit.register(print, 'exit')\n"
        "def late():\n    time.sleep(0.2)\n    print('late')\n"
        "def main(config):\n    print('told')\n    ctypes.CDLL(None).printf(b'by C\\n')\n"
        f"    threading.Thread(target=late).start()\n    {end}\n"
        "run_script(main, Config)\n"
    )
    environment = os.environ | {"WORLD_SIZE": ranks, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    program = [sys.executable, tmp_path / "program.py"]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=60)
    expected = {"told", "late", "exit", "by C"} | ({"finalized"} if finalized else set())
    assert (set(done.stdout.split("\n")) - {""}, done.returncode) == (expected, status), done.stderr


@pytest.mark.parametrize("script", [pretrain_gpt, sft_gpt, dpo_gpt])
def test_an_empty_out_dir_is_refused_before_anything_is_read(script):
    with pytest.raises(InputError, match="--out_dir is empty"):
        script.main(script.Config(out_dir=""))
    with pytest.raises(InputError, match=r"--out_dir='caf.udce9' is no UTF-8 text"):
        script.main(script.Config(out_dir="caf\udce9"))
    with pytest.raises(InputError, match=r"='m.udce9l' is no UTF-8 text"):
        name = "data_dir" if script is pretrain_gpt else "model"
        script.main(script.Config(**{name: "m\udce9l"}))


@pytest.mark.parametrize("script", [pretrain_gpt, sft_gpt, dpo_gpt])
@pytest.mark.parametrize(
    "change", ["optimizer=adam", "compile=yes", "wandb=on", "shard=all", "keep_every=3", "max_steps=-1"]
)
def test_a_setting_that_can_mean_nothing_is_refused_before_anything_is_read(script, change):
    """Where data and model are said to be there is nothing."""
    places = [name for name in ("data_dir", "data", "model") if name in script.Config.__dataclass_fields__]
    config = parse_config(script.Config, [f"--{change}", *(f"--{name}=/nowhere/at/all" for name in places)])
    with pytest.raises(InputError, match=f"--{change}"):
        script.main(config)


def test_control_characters_are_shown_and_not_obeyed():
    told = "a\x1b]52;c;aGk=\x07\r\x9b\x00\u202e\ufeff\tb\n\xa0é👩\u200d🔬"
    shown = r"a\x1b]52;c;aGk=\x07\r\x9b\x00\u202e\ufeff" + "\tb\n\xa0é👩\u200d🔬"
    assert common.visible(told) == shown


@pytest.mark.parametrize("lines", [10_000, 12])  # 12: some are printed only at the end
def test_a_reader_of_the_output_that_has_left_is_no_error(lines, tmp_path):
    (tmp_path / "program.py").write_text(
        "import dataclasses, time\nfrom common import run_script\n"
        "@dataclasses.dataclass\nclass Config:\n    x: int = 0  # a number\n"
        f"run_script(lambda config: [print('y' * 1000) for _ in range({lines})] + [time.sleep(1)], Config)\n"
    )
    command = f"{sys.executable} {tmp_path}/program.py | head -n 1"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, capture_output=True, env=environment, timeout=60)
    assert done.stdout == b"y" * 1000 + b"\n" and done.stderr == b""


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_a_run_goes_on_when_nobody_reads_what_it_prints(number, tmp_path):
    """A log on a full disk is another matter."""
    program = (
        "import os, sys\nfrom common import surviving_lost_output\n"
        f"def fail(*_): raise OSError({number}, 'lost')\n"
        "with surviving_lost_output():\n    fail()\n"
        "print('this goes nowhere', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode == 0) == (number != errno.ENOSPC) and done.stdout == ""
