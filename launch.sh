#!/usr/bin/env bash
# What pretrain_full.sh and sft_full.sh share: where and how a training script is started.
#
#     one node       bash pretrain_full.sh                                every GPU, or the CPU
#     Slurm          sbatch -N4 --gpus-per-node=8 --exclusive --mem=0 --time=4:00:00 pretrain_full.sh --lr=2e-3
#                    account, partition, time as flags, or SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT;
#                    bash pretrain_full.sh submit -N4 ... -- --lr=2e-3 checks the run first. If Slurm refuses the job,
#                    it prints Slurm's reason and the flags that a cluster may demand
#     by hand        NNODES=2 NODE_RANK=0 MASTER_ADDR=host1 bash pretrain_full.sh    and NODE_RANK=1 on the other
#
# VENV    folder of an environment with bin/python: a venv or conda's; empty (VENV=) for the python on the path, as
#         a module or a container has it. If VENV is not set, .venv is made.
# NPROC   processes on a node; PREFLIGHT_FLAGS for preflight.py; DRY_RUN=1 only prints the commands.
# SRUN_FLAGS  for srun, as --container-image=... --container-mounts=...; the job's own shell needs a python, too
# SHUTDOWN_TIMEOUT  seconds (120) that ranks have after a signal to finish their step and save. Slurm's warning must
#         come earlier: it comes 180 seconds before the end, or as sbatch's --signal=B:USR1@... says
# PREFLIGHT=off  for a host that joins a running job again: the other hosts are past the preflight
#
# Before a run the first node asks checks.py, for seconds, what will certainly fail; then all nodes ask preflight.py
# together about machines and network.
VENV_GIVEN=${VENV+yes} SUBMIT="" SBATCH_FLAGS=() FLAGS=()
VENV=${VENV-.venv}
PYTHON=${VENV:+$VENV/bin/}python

fail() {
    echo "error: $*" >&2
    exit 1
}

run() { # a command, or with DRY_RUN its words
    if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@" && echo; else "$@"; fi
}

flag() { # the last value of --$1= among the flags after $2, which is the default
    local name=$1 value=$2 word
    shift 2
    for word in "$@"; do case $word in --"$name"=*) value=${word#*=} ;; esac; done
    case $value in \~ | \~/*) value=$HOME${value#\~} ;; esac # as the scripts read it
    echo "$value"
}

on_a_cluster() { [ -n "${SLURM_JOB_ID:-}" ] || [ "${NNODES:-1}" != 1 ]; }

need_python() {
    command -v "$PYTHON" > /dev/null || [ -n "${DRY_RUN:-}" ] || fail "there is no $PYTHON; name an environment" \
        "by VENV=, or make one by \`bash quickstart.sh setup\`"
}

install() { # an environment of the user's is not changed
    [ -n "$VENV_GIVEN" ] || run env -u PYTHON bash quickstart.sh setup
    need_python
}

for_submit() { # what follows the word submit: sbatch's flags, then perhaps -- and the training script's
    SUBMIT=yes SBATCH_FLAGS=()
    while [ $# -gt 0 ] && [ "$1" != -- ]; do SBATCH_FLAGS+=("$1") && shift; done
    FLAGS=("${@:2}")
}

submit() { # SCRIPT FLAGS: sbatch, and a sentence if the cluster wants to know more
    local script=$1 message
    shift
    if [ -n "${DRY_RUN:-}" ]; then run sbatch ${SBATCH_FLAGS[@]+"${SBATCH_FLAGS[@]}"} "$script" "$@"; return; fi
    message=$(sbatch ${SBATCH_FLAGS[@]+"${SBATCH_FLAGS[@]}"} "$script" "$@" 2>&1) ||
        fail "Slurm refused the job (${message//$'\n'/; }); give what the cluster demands: --account= --partition=" \
            "--time=, or SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT"
    echo "$message"
}

steps() { # the checkpoints in a run's folder; a damaged one may be newer than what a run saves
    find "$1" -maxdepth 1 -name 'step_*' -printf '%p %T@\n' 2>/dev/null | sort
}

processes() { # on this node
    if [ -n "${NPROC:-}" ]; then
        echo "$NPROC"
    elif need_python && command -v "$PYTHON" > /dev/null; then
        "$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))'
    else
        echo "there is no $PYTHON yet; one process is assumed" >&2
        echo 1
    fi
}

check() { # RANKS SCRIPT FLAGS: what of the run will certainly fail
    local ranks=$1
    shift
    need_python
    run env ${SUBMIT:+HF_HUB_OFFLINE=1} WORLD_SIZE="$ranks" "$PYTHON" checks.py "$@"
}

# One node's part: torchrun, which starts a process for each GPU and brings all nodes together.
node() { # SCRIPT DATA OUT FLAGS
    local script=$1 data=$2 out=$3 port=${MASTER_PORT:-29500} rank=${NODE_RANK:-${SLURM_NODEID:-0}} host=false
    local torchrun meet=(--standalone) check=(--standalone) logs=() signals=SIGTERM,SIGINT,SIGQUIT,SIGUSR1
    shift 3
    NPROC=$(processes)
    if on_a_cluster; then
        # The first node has the store where all meet; preflight's is beside it. Restarted ranks need a new store.
        export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
        [ -n "${MASTER_ADDR:-}" ] || fail "NNODES=$NNODES needs MASTER_ADDR, the name of the host with NODE_RANK=0"
        [ "$rank" != 0 ] || host=true
        meet=(--nnodes="${NNODES:-1}" --rdzv_backend=c10d --rdzv_id="${RDZV_ID:-run}")
        meet+=("--rdzv_conf=is_host=$host,read_timeout=120")
        check=("${meet[@]}" --rdzv_endpoint="$MASTER_ADDR:$((port + 1))")
        meet+=(--rdzv_endpoint="$MASTER_ADDR:$port")
        logs=(--log_dir="$out/logs/${RDZV_ID:-run}/node$rank" --tee=3) # one log a rank
    fi
    torchrun=("$PYTHON" -m torch.distributed.run --nproc_per_node="$NPROC")
    # shellcheck disable=SC2086 # flags, split at spaces
    [ "${PREFLIGHT:-}" = off ] || run "${torchrun[@]}" "${check[@]}" preflight.py --data="$data" --out_dir="$out" \
        --device="$(flag device auto "$@")" ${PREFLIGHT_FLAGS:-}
    # A rank that fails is started again with all others, from the newest checkpoint, up to three times; a user's
    # mistake is not. A signal goes on to the ranks; they have SHUTDOWN_TIMEOUT to finish their step and save. With exec
    # it is torchrun that gets the signal, not this shell, which would keep it to itself.
    [[ $(trap -p HUP) == "trap -- '' "* ]] || signals+=,SIGHUP # a hang-up that nohup ignores stays ignored
    torchrun+=("${meet[@]}" ${logs[@]+"${logs[@]}"} --max_restarts=3 --shutdown_timeout="${SHUTDOWN_TIMEOUT:-120}"
        "--signals_to_handle=$signals")
    if [ -n "${DRY_RUN:-}" ]; then run "${torchrun[@]}" "$script" "$@"; else exec "${torchrun[@]}" "$script" "$@"; fi
}

# A Slurm job: node() on each node. A job that was warned of its end, and saved, is put into the queue again.
slurm_job() { # SCRIPT DATA OUT FLAGS
    local script=$1 out=$3 ranks before pid="" warned="" status=0
    # By an array's number Slurm means all its tasks, and the last of these has the same number.
    local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    export NNODES=${SLURM_JOB_NUM_NODES:-1} RDZV_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0} HF_HUB_OFFLINE=1
    export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    export MASTER_PORT=${MASTER_PORT:-$((20000 + 2 * (SLURM_JOB_ID % 5000)))}
    export RESUMABLE_FILE=$out/.resumable VENV # the ranks make the file when they leave with 75
    # One launcher a node, with this shell's environment: --ntasks or --export of the job would have others.
    local srun=(srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --export=ALL --kill-on-bad-exit=0
        --cpu-bind=none --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}")
    [ -z "${SLURM_STEP_ID:-}" ] || srun+=(--overlap) # inside a step, as in srun --pty bash
    # shellcheck disable=SC2206 # flags, split at spaces
    srun+=(${SRUN_FLAGS:-} bash launch.sh "$@")
    ranks=$(processes)
    check $((ranks * NNODES)) "$script" "${@:4}"
    if [ -n "${DRY_RUN:-}" ]; then run "${srun[@]}"; return; fi
    mkdir -p "$out"
    rm -f "$RESUMABLE_FILE"
    before=$(steps "$out")
    # Before srun starts, as a signal without a trap would end this shell. srun sends USR1 on to each node's torchrun.
    trap 'warned=yes; [ -z "$pid" ] || kill -s USR1 "$pid" || true' USR1
    trap : TERM # the ranks get it, too; this shell waits for them
    "${srun[@]}" &
    pid=$!
    [ -z "$warned" ] || kill -s USR1 "$pid" || true # a warning that came before the line above
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" && status=0 || status=$?; done
    if [ ! -e "$RESUMABLE_FILE" ]; then
        [ "$status" != 0 ] && [ -n "$warned" ] || exit "$status"
        echo "error: the run saved nothing after Slurm's warning of its end; if it had not begun to train, ask for" \
            "more --time; if it was amid saving, raise SHUTDOWN_TIMEOUT and --signal=B:USR1@, see launch.sh" >&2
        [ "$(steps "$out")" != "$before" ] || exit "$status"
        echo "the job goes back into the queue, and on from what it had saved before" >&2
    fi
    [ "$(steps "$out")" != "$before" ] || fail "no step was made since this start, so the job is not requeued;" \
        "ask for more --time, or look why a step takes so long"
    # A job that somebody cancelled, or that Slurm itself requeues, does not run any more.
    if [[ $(scontrol show job "$job") == *JobState=RUNNING* ]]; then scontrol requeue "$job"; fi
    exit 75
}

launch() { # SCRIPT DATA OUT FLAGS
    if [ -n "${SUBMIT:-}" ]; then # the job will have as many ranks or more, and no network
        check 1 "$1" "${@:4}"
        submit "$(basename "$0")" ${FLAGS[@]+"${FLAGS[@]}"}
        return
    fi
    on_a_cluster || install
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        slurm_job "$@"
        return
    fi
    if [ "${NODE_RANK:-0}" = 0 ] && [ "${PREFLIGHT:-}" != off ]; then
        NPROC=$(processes)
        check $((NPROC * ${NNODES:-1})) "$1" "${@:4}"
    fi
    node "$@"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    node "$@"
fi
