"""The launch scripts: what they would run, two nodes on this machine, and a real Slurm of two nodes."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import conftest
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import (
    ROOT,
    conversation,
    descendants,
    flags,
    is_alive,
    kill_tree,
    losses,
    pretrain_config,
    text,
)
from test_hub import Hub

import distributed
import pretrain_gpt
from checkpoint import list_checkpoints, step_of
from common import InputError, parse_config, read_records
from order import parse_sources

CLEAN = {
    k: v
    for k, v in os.environ.items()
    if not k.startswith(("SLURM", "SBATCH", "SRUN", "SHUTDOWN", "NNODES", "MASTER", "VENV", "PRESET"))
    and k not in ("DATA", "OUT", "MODEL")
}


def shell(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / script), *arguments],
        env=CLEAN | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def dry(script: str, *arguments: str, **environment: str) -> list[str]:
    """The commands that a script would run."""
    result = shell(script, *arguments, DRY_RUN="1", **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.replace("\\", "").splitlines()


SCRIPTS = {"pretrain_full.sh": "pretrain_gpt.py", "sft_full.sh": "sft_gpt.py"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_on_one_node_the_checks_come_first_and_preflight_and_run_are_torchruns_of_their_own(script, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    *before, check, run = dry(script, "--lr=7", VENV=sys.prefix, NPROC="3", DATA=str(tmp_path))
    assert " preflight.py " in check
    (checks,) = before
    assert f"env WORLD_SIZE=3 {sys.prefix}/bin/python checks.py {SCRIPTS[script]} " in checks
    assert checks.split(SCRIPTS[script])[1] == run.split(SCRIPTS[script])[1]  # the flags
    assert "--nproc_per_node=3 --standalone --max_restarts=3 --shutdown_timeout=120 " in run
    assert f" {SCRIPTS[script]} " in run and run.rstrip().endswith("--lr=7") and "rdzv" not in run


def test_torchrun_hands_a_hang_up_on_unless_nohup_ignores_it():
    for handler, handled in ((signal.SIG_DFL, "SIGUSR1,SIGHUP "), (signal.SIG_IGN, "SIGUSR1 ")):
        done = subprocess.run(
            ["bash", ROOT / "pretrain_full.sh"],
            env=CLEAN | {"DRY_RUN": "1", "VENV": sys.prefix, "NPROC": "1"},
            preexec_fn=lambda handler=handler: signal.signal(signal.SIGHUP, handler),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert f"--signals_to_handle=SIGTERM,SIGINT,SIGQUIT,{handled}" in done.stdout.replace("\\", "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_on_hosts_by_hand_the_first_has_the_store(script):
    places = {"VENV": sys.prefix, "NPROC": "2", "NNODES": "2", "MASTER_ADDR": "host1"}
    for rank, is_host in ("0", "true"), ("1", "false"):
        *checks, check, run = dry(script, NODE_RANK=rank, **places)
        assert [" WORLD_SIZE=4 " in line for line in checks] == [True] * (rank == "0")
        assert f"--nnodes=2 --rdzv_backend=c10d --rdzv_id=run --rdzv_conf=is_host={is_host}," in run
        assert "--rdzv_endpoint=host1:29500 " in run and "--rdzv_endpoint=host1:29501 " in check
        assert f"/node{rank} --tee=3" in run
    result = shell(script, DRY_RUN="1", **places | {"MASTER_ADDR": ""})
    assert result.returncode == 1 and result.stderr.startswith("error: NNODES=2 needs MASTER_ADDR")


@pytest.mark.parametrize("script", SCRIPTS)
def test_in_a_slurm_job_there_is_one_launcher_a_node_and_nothing_is_fetched(script, tmp_path):
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SLURM_CPUS_ON_NODE": "96", "MASTER_ADDR": "n1"}
    checks, srun = dry(script, "--lr=7", VENV=sys.prefix, NPROC="8", **job)
    assert checks.startswith("env WORLD_SIZE=24 ") and checks.rstrip().endswith("--lr=7")
    # Whatever the job's flags set in the environment: SLURM_NTASKS, SLURM_EXPORT_ENV.
    assert srun.startswith("srun --nodes=3 --ntasks=3 --ntasks-per-node=1 --export=ALL ")
    assert "--cpus-per-task=96 bash launch.sh " in srun and "--overlap" not in srun
    assert f" {SCRIPTS[script]} " in srun and srun.rstrip().endswith("--lr=7")
    _, inside = dry(script, VENV=sys.prefix, NPROC="8", SLURM_STEP_ID="0", SRUN_FLAGS="--a --b=c", **job)
    assert " --cpus-per-task=96 --overlap --a --b=c bash launch.sh " in inside
    result = shell(script, VENV=sys.prefix, DATA=str(tmp_path / "nothing"), **job)
    told = f"run `DATA={tmp_path}/nothing bash {script} prepare` on a login node"
    assert result.returncode == 1 and told in result.stderr
    assert f"DATA={tmp_path}/nothing is not" in result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_submit_gives_sbatch_its_flags_and_the_run_what_follows_two_dashes(script, tmp_path):
    known = {"VENV": sys.prefix, "DATA": str(tmp_path), "OUT": str(tmp_path / "out")}
    check, sbatch = dry(script, "submit", "-N4", "--time=1:00", "--", "--lr=7", "--seed=1", **known)
    assert check.startswith("env HF_HUB_OFFLINE=1 WORLD_SIZE=1 ") and check.rstrip().endswith(
        "--lr=7 --seed=1"
    )
    assert sbatch.split() == ["sbatch", "-N4", "--time=1:00", script, "--lr=7", "--seed=1"]
    assert dry(script, "submit", "-N4", **known)[-1].split() == ["sbatch", "-N4", script]
    missing = shell(script, "submit", "-N4", **known | {"DATA": f"{tmp_path}/none"})
    assert missing.returncode == 1 and f"`DATA={tmp_path}/none bash {script} prepare`" in missing.stderr


def test_a_task_of_an_array_asks_slurm_for_itself_and_not_for_all_tasks(data_dir, tmp_path):
    """The last task's number is the array's: of that name Slurm would show, and requeue, all tasks."""
    out, tools = tmp_path / "out", tmp_path / "bin"
    out.mkdir()
    tools.mkdir()
    for name, script in {
        "python": "exit 0",
        "srun": f"mkdir {out}/step_0000001; touch {out}/.resumable; exit 1",
        "scontrol": f"echo $* >> {tmp_path}/asked; echo '   JobState=RUNNING Reason=None'",
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "MASTER_ADDR": "n1"}
    path = {"PATH": f"{tools}:{os.environ['PATH']}", "VENV": "", "OUT": str(out), "NPROC": "1"}
    result = shell("pretrain_full.sh", **job, **path, DATA=str(data_dir))
    assert result.returncode == 75, result.stderr
    assert (tmp_path / "asked").read_text() == "show job 7_3\nrequeue 7_3\n"


def test_a_name_that_does_not_exist_is_no_place_to_download_smol_smoltalk_to(tmp_path):
    result = shell("sft_full.sh", DATA="me/my-chats", VENV=sys.prefix, NPROC="1", DRY_RUN="1")
    told = "error: there is no DATA=me/my-chats, and prepare fetches smol-smoltalk only; a dataset of"
    assert result.returncode == 1 and not result.stdout and result.stderr.startswith(told)
    other = shell("sft_full.sh", "prepare", DATA="me/my-chats", VENV=sys.prefix, DRY_RUN="1")
    assert other.returncode == 1 and not other.stdout and other.stderr == result.stderr
    result = shell("sft_full.sh", DATA=f"{tmp_path}/none", VENV=sys.prefix, NPROC="1", DRY_RUN="1")
    told = f"error: there is no DATA={tmp_path}/none; name a folder, a file, or by --data= a hub dataset;"
    assert result.returncode == 1 and not result.stdout and result.stderr.startswith(told)
    for folder in (f"{tmp_path}/my-chats", "data/my-chats"):
        made = dry("sft_full.sh", "prepare", DATA=folder, VENV=sys.prefix)
        assert any(f"--local-dir={folder}" in line for line in made)


def test_a_name_that_does_not_exist_is_no_place_to_prepare_fineweb_edu_in(tmp_path):
    result = shell("pretrain_full.sh", DATA="data/mien", VENV=sys.prefix, NPROC="1", DRY_RUN="1")
    told = "error: there are no shards in DATA=data/mien; name a folder of shards, or fill it by "
    assert result.returncode == 1 and not result.stdout and result.stderr.startswith(told)
    assert "`DATA=data/mien bash pretrain_full.sh prepare`" in result.stderr


def test_preparing_installs_only_when_no_environment_is_given():
    setup, prepare = dry("pretrain_full.sh", "prepare", "--max_tokens=5")
    assert setup.split() == ["env", "-u", "PYTHON", "bash", "quickstart.sh", "setup"]
    assert prepare.rstrip().endswith("--max_tokens=5")
    (prepare,) = dry("pretrain_full.sh", "prepare", VENV="")
    assert prepare.startswith("python prepare_data.py ")
    *_, download, mark = dry("sft_full.sh", "prepare", VENV="/env")
    assert download.startswith("/env/bin/hf download HuggingFaceTB/smol-smoltalk ") and mark.startswith("mv ")
    (model,) = dry("sft_full.sh", "prepare", VENV="/env", MODEL="some/model", DATA=str(ROOT))  # it is there
    assert model.split() == ["/env/bin/hf", "download", "some/model"]


@pytest.mark.parametrize(
    "job",
    [
        {},
        pytest.param(
            {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "9", "MASTER_ADDR": "n1"}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_that_would_fail_ends_in_a_sentence_before_any_rank_is_started(job, data_dir, tmp_path):
    flags = "--num_hidden_layers=2", "--context_length=64", f"--batch_tokens={64 * 8 * 8}", "--hidden_size=64"
    places = {"VENV": sys.prefix, "NPROC": "80" if not job else "8", "DATA": str(data_dir)}
    result = shell("pretrain_full.sh", *flags, OUT=str(tmp_path / "out"), **places, **job)
    assert result.returncode == 1 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "are 64 windows of 64, fewer than the " in result.stderr


def test_a_preparation_that_fails_starts_no_run(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f"#!/bin/sh\necho $1 >> {tmp_path}/ran\nexit 3\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    result = shell("pretrain_full.sh", "prepare", VENV=str(tmp_path), DATA=str(tmp_path / "data"))
    assert result.returncode == 3 and (tmp_path / "ran").read_text() == "prepare_data.py\n"


def test_what_slurm_refuses_is_one_sentence_with_the_flags_that_mend_it(data_dir, tmp_path):
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: Invalid account' >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    places = {"VENV": sys.prefix, "DATA": str(data_dir), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = shell("pretrain_full.sh", "submit", "-N2", **places)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "Invalid account" in result.stderr and "--account=" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "state", "requeued", "status"),
    [
        ("step_0000004 step_0000008", "RUNNING", True, 75),
        ("step_0000003", "RUNNING", True, 75),  # the newest one was damaged
        ("step_0000004", "RUNNING", False, 1),  # none since this start
        ("step_0000004 step_0000008", "CANCELLED", False, 75),  # by somebody
        ("", None, False, 3),  # the ranks failed
    ],
)
def test_a_saved_job_is_requeued_only_if_it_made_a_step_and_still_runs(
    steps, state, requeued, status, data_dir, tmp_path
):
    out, tools = tmp_path / "out", tmp_path / "bin"
    (out / "step_0000004").mkdir(parents=True)
    tools.mkdir()
    leave = f"touch {out}/.resumable; exit 1" if state else "exit 3"
    for name, script in {
        "srun": f"cd {out} && mkdir -p . {steps}; {leave}",
        "scontrol": f"[ $1 = show ] && echo '   JobState={state} Reason=None' || echo $* >> {tmp_path}/asked",
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "MASTER_ADDR": "n1", "DATA": str(data_dir)}
    path = {"PATH": f"{tools}:{os.environ['PATH']}", "VENV": sys.prefix, "OUT": str(out)}
    result = shell("pretrain_full.sh", **job, **path)
    assert result.returncode == status, result.stderr
    assert (tmp_path / "asked").exists() == requeued
    assert not requeued or (tmp_path / "asked").read_text() == "requeue 7\n"
    assert ("no step was made since this start" in result.stderr) == (status == 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "status"),
    [("kill -s KILL $$", 137), ("exit 3", 3), ("exit 0", 0), ("mkdir -p $OUT/step_0000001; exit 3", 75)],
)
def test_a_job_that_saves_nothing_after_slurm_s_warning_tells_so_unless_all_is_done(
    end, status, data_dir, tmp_path
):
    """It goes back into the queue if it had saved before the warning."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho JobState=RUNNING\n")
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "srun").write_text(f"#!/bin/sh\ntrap : USR1\nkill -s USR1 $PPID; sleep 1; {end}\n")
    (tmp_path / "srun").chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "MASTER_ADDR": "n1", "DATA": str(data_dir)}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VENV": sys.prefix, "OUT": str(tmp_path / "out")}
    result = shell("pretrain_full.sh", **job, **path)
    assert result.returncode == status, result.stderr
    told = "error: the run saved nothing after Slurm's warning of its end; if it had not" in result.stderr
    assert told == (status != 0)


PRESETS = {  # vocabulary with ChatML's tokens, parameters with the norms of queries and keys, tokens
    "qwen3-130m": (128_256 + 3, 154_147_328 + 768 + 3 * 2 * 512, 2_599_944_192),
    "gpt2-124m": (50_257 + 2, 123_554_304, 9_999_745_024),
}


@pytest.mark.parametrize("preset", sorted(path.stem for path in ROOT.glob("presets/*.sh")))
def test_a_preset_is_a_run_that_others_have_made(preset, tmp_path):
    vocabulary, parameters, tokens = PRESETS[preset]
    *_, command = dry("pretrain_full.sh", "--lr=7", PRESET=preset, VENV=sys.prefix, NPROC="8")
    config = parse_config(pretrain_gpt.Config, shlex.split(command.partition(" pretrain_gpt.py ")[2]))
    assert config.out_dir == f"out/{preset}" and config.lr == 7
    assert config.max_steps * config.batch_tokens == tokens
    with torch.device("meta"):
        model = pretrain_gpt.GPTModel(pretrain_gpt.model_config(config, vocabulary))
    assert model.num_parameters() == parameters
    made = dry("pretrain_full.sh", "prepare", PRESET=preset, VENV=sys.prefix)
    named = [source.path for source in parse_sources(config.data_dir)]
    assert all(any(folder in line for line in made) for folder in named)
    assert ("hf download gpt2 " in made[0]) == (config.tokenizer == "gpt2")  # a job fetches nothing
    (tmp_path / "d").mkdir()
    places = {"VENV": sys.prefix, "NPROC": "8", "OUT": str(tmp_path), "DATA": str(tmp_path / "d")}
    elsewhere = dry("pretrain_full.sh", PRESET=preset, **places)
    assert f"--data_dir={tmp_path}/d --out_dir={tmp_path} " in elsewhere[-1]
    missing = shell("pretrain_full.sh", PRESET=preset, VENV=sys.prefix, NNODES="2")
    assert missing.returncode == 1, missing
    assert f"run `PRESET={preset} bash pretrain_full.sh prepare` on a login" in missing.stderr
    own = dry("pretrain_full.sh", PRESET="qwen3-130m", VENV=sys.prefix, NPROC="8", DATA="d")
    assert not any("prepare_data.py" in line for line in own)
    unknown = shell("pretrain_full.sh", PRESET="none", DRY_RUN="1")
    assert unknown.returncode == 1 and unknown.stderr == (
        "error: PRESET=none: expected a file of presets/ without its .sh\n"
    )


def test_a_new_phase_has_its_model_s_shape_and_a_home_is_found_as_the_scripts_find_it(data_dir):
    flags = ["--init_from=out/base", f"--data_dir={data_dir}", "--out_dir=~/run"]
    command = dry("pretrain_full.sh", *flags, VENV=sys.prefix, NPROC="1", HOME="/home/me")[-1]
    assert "--context_length=1024" in command and "--num_hidden_layers" not in command
    assert "--out_dir=/home/me/run" in command
    assert "--num_hidden_layers=12" in dry("pretrain_full.sh", flags[1], VENV=sys.prefix, NPROC="1")[-1]


def test_a_depth_replaces_the_recipe_and_does_not_go_with_a_preset(data_dir):
    *_, run = dry("pretrain_full.sh", "--depth=16", VENV=sys.prefix, NPROC="8", DATA=str(data_dir))
    assert "--depth=16" in run and "--micro_batch_size=32" in run
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_steps", "batch_tokens"):
        assert f"--{name}=" not in run
    made = dry("pretrain_full.sh", "prepare", "--depth=16", "--workers=4", VENV=sys.prefix)
    assert "--max_tokens=4227858432 " in made[-1] and made[-1].rstrip().endswith("--workers=4")
    assert "--config=sample-10BT " in made[-1] and "--out_dir=data/fineweb-edu-depth16 " in made[-1]
    (large,) = dry("pretrain_full.sh", "prepare", "--depth=28", VENV=sys.prefix)
    assert "--config=sample-100BT " in large and "--out_dir=data/fineweb-edu-depth28 " in large
    *_, run = dry("pretrain_full.sh", "--depth=28", VENV=sys.prefix, NPROC="8", DATA=str(data_dir))
    assert "--micro_batch_size=16 " in run
    known = {"VENV": sys.prefix, "NPROC": "8", "DATA": str(data_dir)}
    for words in ([], ["prepare"]):  # no depth: the recipe, as in pretrain_gpt.py, a limited prepare
        plain = dry("pretrain_full.sh", *words, **known)
        none = dry("pretrain_full.sh", *words, "--depth=0", **known)
        assert [line.replace(" --depth=0", "") for line in none] == plain
    for depth in ("large", "08"):  # 08: octal
        other = shell("pretrain_full.sh", f"--depth={depth}", DRY_RUN="1")
        told = f"error: --depth={depth}: expected a number of blocks, from 1 up\n"
        assert other.returncode == 1 and other.stderr == told
    both = shell("pretrain_full.sh", "--depth=16", PRESET="gpt2-124m", DRY_RUN="1")
    assert both.returncode == 1
    assert both.stderr == "error: PRESET=gpt2-124m is a run of its own; leave it out, or --depth\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_an_unknown_word_prepare_nothing(script, tmp_path):
    known = {"VENV": sys.prefix, "DATA": str(tmp_path / "data"), "OUT": str(tmp_path / "out")}
    (made,) = dry(script, "--help", **known)
    assert made.split()[1:] == [f"{script[:-8]}_gpt.py", "--help"]
    wrong = shell(script, "prepar", **known, DRY_RUN="1")
    assert wrong.returncode == 1 and not wrong.stdout
    assert wrong.stderr.startswith("error: prepar: expected prepare, submit, or flags of ")


def test_shards_that_others_made_and_a_mix_of_folders_are_never_prepared(tmp_path):
    shards, half = tmp_path / "fineweb10B", tmp_path / "half"
    for folder, name in ((shards, "fineweb_train_000001.bin"), (half, "train_000000.bin")):
        folder.mkdir()
        (folder / name).touch()
    (half / "progress.json").touch()
    known = {"VENV": sys.prefix, "NPROC": "8", "OUT": str(tmp_path / "out")}
    for data, prepares in ((str(shards), False), ("a:0.7,b:0.3", False), (str(half), True)):
        made = dry("pretrain_full.sh", **known, DATA=data)
        assert any("prepare_data.py" in line for line in made) == prepares


@pytest.mark.parametrize("script", SCRIPTS)
def test_where_there_is_no_environment_yet_it_is_made_first_or_its_lack_is_told(script, tmp_path):
    for path in (*ROOT.glob("*.sh"), *ROOT.glob("*.py")):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/manifest.json").write_text("{}")
    command = ["bash", script, "--data=d" if "sft" in script else "--data_dir=d"]
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "MASTER_ADDR": "n1"}
    found = []
    for environment in ({"DRY_RUN": "1"}, job):
        environment = CLEAN | environment | {"PYTHON": sys.executable}  # which is for test.sh alone
        found.append(
            subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        )
    planned, lacking = found
    assert planned.returncode == 0 and planned.stdout.startswith("env -u PYTHON bash quickstart.sh setup")
    assert "--nproc_per_node=1" in planned.stdout
    assert planned.stderr == "there is no .venv/bin/python yet; one process is assumed\n"
    assert lacking.returncode == 1 and lacking.stderr.startswith(
        "error: there is no .venv/bin/python; name an"
    )


@pytest.mark.parametrize("arguments", [["prepare"], ["submit", "-N2"], ["--data_dir=tests"]])
def test_an_environment_that_is_not_there_is_told(arguments, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    result = shell("pretrain_full.sh", *arguments, VENV=str(tmp_path), NPROC="1", DATA=str(tmp_path))
    assert result.returncode == 1, result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"error: there is no {tmp_path}/bin/python; name an env")


def test_sft_s_prepare_fetches_the_model_that_is_named_and_takes_no_other_flag(tmp_path):
    made = dry("sft_full.sh", "prepare", "--model=some/model", VENV="", DATA=str(tmp_path))
    assert made == ["hf download some/model "]
    other = shell("sft_full.sh", "prepare", "--lr=1", DRY_RUN="1", VENV="")
    assert other.returncode == 1 and other.stderr == "error: prepare takes --model= only, not --lr=1\n"


def test_shellcheck_finds_nothing():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    names = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.sh"), *ROOT.glob("presets/*.sh")])
    result = subprocess.run(["shellcheck", "-x", *names], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_restarts_on_several_nodes_without_a_new_store_are_refused():
    nodes = {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}
    with pytest.raises(InputError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        distributed.check_restarts(nodes)
    distributed.check_restarts(nodes | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    distributed.check_restarts(nodes | {"TORCHELASTIC_MAX_RESTARTS": "0"})
    distributed.check_restarts(nodes | {"GROUP_WORLD_SIZE": "1"})


# -- two nodes -----------------------------------------------------------------------------------------------

LONG = {"max_steps": 300, "save_every": 20, "eval_every": 150, "keep_last": 2}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_node(rank: int, port: int, config, log, **environment: str) -> subprocess.Popen:
    """pretrain_full.sh as on a host of its own; in a session of its own, to be killed as a whole."""
    by_hand = {"NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        ["bash", str(ROOT / "pretrain_full.sh"), *flags(config)],
        env=CLEAN | by_hand | {"VENV": sys.prefix, "NPROC": "1", "PREFLIGHT": "off"} | environment,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def wait_until(condition, jobs, log: Path, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and all(job.poll() is None for job in jobs), log.read_text()[-5000:]
        time.sleep(0.02)


@pytest.mark.slow
def test_a_node_killed_and_started_again_changes_no_loss(data_dir, tmp_path):
    alone = conftest.run(
        "pretrain_gpt.py", *flags(pretrain_config(data_dir, tmp_path / "a", **LONG)), ranks=2
    )
    assert alone.returncode == 0, alone.stderr
    config, port, path = pretrain_config(data_dir, tmp_path / "b", **LONG), free_port(), tmp_path / "log"
    with open(path, "wb") as log:
        nodes = [start_node(rank, port, config, log) for rank in range(2)]
        try:
            wait_until(lambda: list_checkpoints(tmp_path / "b"), nodes, path)
            kill_tree(nodes[1])
            nodes[1] = start_node(1, port, config, log)
            codes = [node.wait(240) for node in nodes]
        finally:
            for node in nodes:
                if node.poll() is None:
                    kill_tree(node)
    assert codes == [0, 0], path.read_text()[-5000:]
    assert "continuing from" in path.read_text()
    assert losses(tmp_path / "b") == losses(tmp_path / "a")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ends a process with its parent")
def test_ranks_end_with_a_launcher_that_was_killed(data_dir, tmp_path):
    config = pretrain_config(data_dir, tmp_path / "out", max_steps=10**6, save_every=20, keep_last=1)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with open(tmp_path / "log", "wb") as log:
        command = [sys.executable, *launcher, str(ROOT / "pretrain_gpt.py"), *flags(config)]
        # As on several nodes the ranks have a store of their own, and do not miss the launcher's.
        store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        job = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | store)
    ranks = []
    try:
        wait_until(lambda: list_checkpoints(tmp_path / "out"), [job], tmp_path / "log")
        ranks = descendants(job.pid)
        job.kill()
        job.wait()
        end = time.monotonic() + 60
        while any(map(is_alive, ranks)) and time.monotonic() < end:
            time.sleep(0.05)
        assert len(ranks) == 2 and not any(map(is_alive, ranks))
    finally:
        for pid in filter(is_alive, [job.pid, *ranks]):
            os.kill(pid, signal.SIGKILL)


# -- from the hub to a chat ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tokenizer_dir, tmp_path_factory):
    """A stand-in for the hub that has FineWeb-Edu's and smol-smoltalk's columns, three parquet files each."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "models/HuggingFaceTB").mkdir(parents=True)
    (folder / "models/HuggingFaceTB/SmolLM2-135M").symlink_to(tokenizer_dir)
    web, smol = (
        folder / "datasets" / name for name in ("HuggingFaceFW/fineweb-edu", "HuggingFaceTB/smol-smoltalk")
    )
    for place in (web / "sample/10BT", smol / "data"):
        place.mkdir(parents=True)
    configs = [{"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]}]
    (web / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    for part in range(3):
        numbers = range(400 * part, 400 * (part + 1))
        rows = [
            {"text": text(i), "id": f"<urn:uuid:{i}>", "dump": "CC-MAIN-2024-10", "url": f"http://a/{i}"}
            | {"file_path": "s3://a", "language": "en", "language_score": 0.9, "token_count": 9}
            | {"score": 3.5, "int_score": 4}
            for i in numbers
        ]
        chats = [conversation(i) | {"source": "smol-magpie-ultra"} for i in numbers]
        for path, table in (
            (web / f"sample/10BT/{part:03}_00000.parquet", rows),
            (smol / f"data/train-{part:05}-of-00003.parquet", chats),
        ):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chats), smol / "data/test-00000-of-00001.parquet")
    with Hub(folder) as server:
        yield server
        server.shutdown()


@pytest.mark.slow
def test_both_scripts_run_from_the_hub_to_a_chat_model_shrunk_by_flags_alone(hub, tmp_path):
    """Through the real `datasets` and `huggingface_hub`; the run itself, once prepared, needs no hub."""
    places = {"VENV": sys.prefix, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*", "NPROC": "2"}
    places |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
    places |= {"PREFLIGHT_FLAGS": "--slow_factor=1e9"}
    small = ["--max_steps=2", "--batch_tokens=512", "--micro_batch_size=2", "--wandb=off", "--device=cpu"]
    shape = ["--num_hidden_layers=2", "--hidden_size=32", "--num_attention_heads=2", "--context_length=64"]
    base, web, smol = (str(tmp_path / name) for name in ("base", "web", "smol"))
    result = shell(
        "pretrain_full.sh", "prepare", "--max_tokens=30_000", "--val_fraction=0.1", **places, DATA=web
    )
    assert result.returncode == 0, result.stderr
    with hub.down():
        result = shell("pretrain_full.sh", *shape, *small, **places, DATA=web, OUT=base)
    assert result.returncode == 0, result.stderr
    assert "preflight: 2 x CPU" in result.stdout and losses(tmp_path / "base")[-1][0] == 2
    small += ["--eval_questions=2", "--max_new_tokens=4"]
    result = shell("sft_full.sh", "prepare", **places, MODEL=base, DATA=smol)
    assert result.returncode == 0, result.stderr
    result = shell("sft_full.sh", *small, **places, MODEL=base, DATA=smol, OUT=str(tmp_path / "chat"))
    assert result.returncode == 0, result.stderr
    assert "Talk to it" in result.stdout and losses(tmp_path / "chat")[-1][0] == 2
    assert len(list((tmp_path / "smol/data").glob("*"))) == 3  # the training split's files only


# -- Slurm ---------------------------------------------------------------------------------------------------

SLURM_CONF = """
ClusterName=loopback
FirstJobId={first}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldDebug=debug
DebugFlags=Agent
SlurmdDebug=debug
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""


@pytest.fixture(scope="module")
def slurm_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def slurm(slurm_folder):
    """A Slurm of two nodes on loopback; the function runs one of its commands."""
    lacking = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(name)]
    if lacking or os.getuid():
        pytest.skip(
            f"needs root and {', '.join(lacking) or 'nothing else'} (apt-get install slurm-wlm munge)"
        )
    folder, host = slurm_folder, socket.gethostname().split(".")[0]
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir()
    ports, first = [free_port() for _ in range(3)], os.getpid()  # launch.sh makes a port of a job's number
    (folder / "slurm.conf").write_text(SLURM_CONF.format(host=host, ports=ports, folder=folder, first=first))
    environment = CLEAN | {"SLURM_CONF": str(folder / "slurm.conf")}

    def command(*words: str, **more: str) -> str:
        return subprocess.run(
            words, env=environment | more, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    if subprocess.run(["munge", "-n"], capture_output=True).returncode:  # no munged answers
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge")
        subprocess.run(["su", "-s", "/bin/sh", "munge", "-c", "/usr/sbin/munged --force"], check=True)
    for words in ["slurmctld"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"]:
        command(*words)
    command.logs = [folder / f"{name}.log" for name in ("n1", "n2", "ctld")]
    yield command
    end = time.monotonic() + 120
    while command("squeue", "--noheader").strip() and time.monotonic() < end:  # what a failed test has left
        command("scancel", "--user=root")
        time.sleep(0.5)
    for name in ("n1", "n2", "ctld"):
        os.kill(int((folder / f"{name}.pid").read_text()), signal.SIGTERM)


class Job:
    """A run of pretrain_full.sh on both nodes of a Slurm."""

    def __init__(self, slurm, config, folder: Path):
        places = {"VENV": sys.prefix, "NPROC": "1", "MASTER_ADDR": "127.0.0.1"}
        places["PREFLIGHT_FLAGS"] = "--slow_factor=1e9"
        self.slurm, self.log = slurm, folder / "log"
        submission = ["sbatch", "--parsable", "-N2", f"--output={self.log}", f"--chdir={folder}"]
        script = str(ROOT / "pretrain_full.sh")
        self.number = slurm(*submission, script, *flags(config), **places).strip()

    def state(self) -> str:
        jobs = f"--jobs={self.number}"
        return self.slurm("squeue", "--noheader", "--states=all", jobs, "--format=%T").strip()

    def told(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, condition, wrong=("FAILED", "COMPLETED")) -> None:
        end = time.monotonic() + 240
        while not condition():
            if time.monotonic() > end or self.state() in wrong:
                state, logs = self.state(), [path.read_text()[-20_000:] for path in self.slurm.logs]
                self.slurm("scancel", self.number)
                pytest.fail("\n\n".join([state, self.told()[-20_000:], *logs]))
            time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "signals",
    [
        pytest.param(["--batch", "--signal=USR1"], id="warned of its end"),
        pytest.param(["--signal=TERM"], id="its steps terminated, as at a preemption"),
    ],
)
def test_a_slurm_job_that_gets_a_signal_is_requeued_and_ends_with_the_losses_of_an_undisturbed_one(
    signals, slurm, data_dir, tmp_path
):
    alone = conftest.run(
        "pretrain_gpt.py", *flags(pretrain_config(data_dir, tmp_path / "a", **LONG)), ranks=2
    )
    assert alone.returncode == 0, alone.stderr
    job = Job(slurm, pretrain_config(data_dir, tmp_path / "b", **LONG), tmp_path)
    job.wait_for(lambda: list_checkpoints(tmp_path / "b"))
    slurm("scancel", *signals, job.number)
    job.wait_for(lambda: job.state() == "PENDING")
    assert (tmp_path / "b/.resumable").exists() and len(losses(tmp_path / "b")) < LONG["max_steps"]
    slurm("scontrol", "update", f"JobId={job.number}", "StartTime=now")  # else Slurm waits two minutes
    job.wait_for(lambda: job.state() == "COMPLETED", wrong=("FAILED",))
    assert "continuing from" in job.told() and losses(tmp_path / "b") == losses(tmp_path / "a")
    assert len(list((tmp_path / "b/logs").rglob("stdout.log"))) == 4  # two ranks, started twice


@pytest.mark.slow
def test_a_slurm_job_that_somebody_cancels_saves_its_last_step_and_is_not_requeued(slurm, data_dir, tmp_path):
    config = pretrain_config(data_dir, tmp_path / "b", **LONG)
    job = Job(slurm, config, tmp_path)
    job.wait_for(lambda: list_checkpoints(tmp_path / "b"))
    slurm("scancel", job.number)
    job.wait_for(lambda: job.state() == "CANCELLED")
    assert slurm("squeue", "--noheader", f"--jobs={job.number}").strip() == ""  # it is in no queue
    assert (tmp_path / "b/.resumable").exists() and "stopped by a signal" in job.told()
    steps = read_records(tmp_path / "b" / "metrics.jsonl")[-1]["step"]
    assert step_of(list_checkpoints(tmp_path / "b")[-1]) == steps < LONG["max_steps"]


def everything_on(node: str, slurm_folder: Path) -> list[int]:
    """The processes of a node: its slurmd, the jobs' ones, in whose environment Slurm tells the node, and the
    slurmstepds above these."""
    ours, found = [f"SLURMD_NODENAME={node}", f"SLURM_CONF={slurm_folder}/slurm.conf"], set()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            environment = (place / "environ").read_text(errors="replace").split("\0")
            parent = Path("/proc", (place / "stat").read_text().rpartition(")")[2].split()[1])
            if all(variable in environment for variable in ours):
                found |= {place} | ({parent} if (parent / "comm").read_text() == "slurmstepd\n" else set())
        except OSError:  # it has ended meanwhile
            continue
    return [int((slurm_folder / f"{node}.pid").read_text()), *(int(place.name) for place in found)]


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def has_told_all(slurm) -> bool:
    """Whether Slurm has no message left for its nodes. What one did not answer it is told a minute later,
    also if that is to end a step of the job's first life. Usually a requeued job waits for two minutes."""
    left = re.findall(r"^Agent (?:queue size|count|thread count): +(\d+)$", slurm("sdiag"), re.MULTILINE)
    return left == ["0", "0", "0"]


@contextmanager
def quick_to_notice(slurm, slurm_folder: Path):
    """A Slurm that gives ten seconds to a silent node, usual are five minutes, and five to a job's end."""
    file = slurm_folder / "slurm.conf"
    before = file.read_text()
    file.write_text(before + "SlurmdTimeout=10\nKillWait=5\n")
    slurm("scontrol", "reconfigure")
    yield
    file.write_text(before)
    slurm("scontrol", "reconfigure")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("node", "fault"),
    [
        pytest.param("n1", signal.SIGKILL, id="the first, killed before it saves"),
        pytest.param("n2", signal.SIGSTOP, id="another, silent after it saved"),
    ],
)
def test_a_node_lost_without_a_word_changes_no_loss_and_the_wandb_run_goes_on(
    node, fault, slurm, slurm_folder, data_dir, tmp_path
):
    """All that runs on a node is killed, or stops and leaves its sockets open, as without power. Slurm
    requeues the job by itself; when the node is back, all of its processes are new."""
    alone = conftest.run(
        "pretrain_gpt.py", *flags(pretrain_config(data_dir, tmp_path / "a", **LONG)), ranks=2
    )
    assert alone.returncode == 0, alone.stderr
    out, other, saved = tmp_path / "b", {"n1": "n2", "n2": "n1"}[node], fault == signal.SIGSTOP
    with quick_to_notice(slurm, slurm_folder):
        job = Job(slurm, pretrain_config(data_dir, out, **LONG, wandb="offline"), tmp_path)
        job.wait_for(lambda: list_checkpoints(out) if saved else losses(out))
        lost = everything_on(node, slurm_folder)
        # All stop before the first one dies, as without power. Else srun's helper process sees srun die and
        # has Slurm kill the step.
        for signum in [signal.SIGSTOP] if saved else [signal.SIGSTOP, signal.SIGKILL]:
            for pid in lost:
                os.kill(pid, signum)
        try:
            number = (out / "wandb_id").read_text()
            job.wait_for(lambda: job.state() == "PENDING")
            slurm("scontrol", "update", f"JobId={job.number}", "StartTime=now+1hour")
            assert 0 < len(losses(out)) < LONG["max_steps"]
            assert not [pid for pid in everything_on(other, slurm_folder) if "pretrain" in command_of(pid)]
        finally:  # it starts anew
            for pid in filter(is_alive, lost if saved else []):  # what was killed may be another by now
                os.kill(pid, signal.SIGKILL)
            slurm("slurmd", "-N", node)
        job.wait_for(lambda: has_told_all(slurm))
        slurm("scontrol", "update", f"JobId={job.number}", "StartTime=now")
        job.wait_for(lambda: job.state() == "COMPLETED", wrong=("FAILED",))
    assert losses(out) == losses(tmp_path / "a")
    assert ("continuing from" in job.told()) or not saved
    runs = sorted(path.name.rpartition("-")[2] for path in (out / "wandb").glob("offline-run-*"))
    state = torch.load(list_checkpoints(out)[-1] / "training_state.pt", weights_only=True)
    assert runs == [number, number] and state["wandb_id"] == number
