"""Where a stopped run goes on: one run a folder, the newest whole checkpoint, the same settings and data.

A new phase, as annealing or a longer context, starts from the weights and optimizer of another run.
"""

import os
import pickle
import typing
from collections.abc import Sequence
from pathlib import Path

import torch

from checkpoint import (
    damage,
    file_damage,
    find_model,
    list_checkpoints,
    newest_checkpoint,
    open_model,
    step_of,
)
from common import InputError, cache_folder, file_sha256, fingerprint, lock_folder, make_folder, read_json
from distributed import Ranks
from gpt import GPTConfig, GPTModel
from precision import settle_precision
from sources import hub_commits, source_files
from tokenization import tokenizer_fingerprint

# Fields you may change on resume: results stay the same up to rounding. Paths and models are compared by
# content.
FREE_FIELDS = (
    "data_dir tokenizer model init_from depth out_dir cache_dir log_every eval_every eval_tokens "
    "eval_questions eval_tasks eval_task_every eval_task_questions "
    "samples max_new_tokens save_every keep_last keep_every wandb profile micro_batch_size timeout_minutes "
    "resume force device compile shard checkpoint_activations dtype"
).split()


def lock_and_resume(
    settings: dict, defaults: dict, *, fixed: dict, content: dict, ranks: Ranks
) -> tuple[typing.IO | None, dict | None, dict[str, dict]]:
    """Make and lock a run's folder, and find where to go on in it.

    `settings` and `defaults` are the script's. Returns the lock (None on other ranks than 0; the folder is
    free again when it is closed), the state to go on from (None: from the beginning), and the run's identity.
    lock_folder, load_resumable and check_same_run say what each of the three is and what they raise. What the
    ranks multiply in is settled here, as a run that goes on keeps it.
    """
    out_dir = settings["out_dir"]
    make_folder(out_dir)
    lock = lock_folder(out_dir) if ranks.is_main else None
    state = load_resumable(out_dir, settings["resume"], ranks)
    if state is not None:  # an old one was in ranks' first precision
        state["content"].setdefault("precision", ranks.precision)
        begun, name = state["content"].get("weights"), settings.get("model") or settings.get("init_from")
        other = begun and content.get("weights") not in (None, begun)
        if other and ranks.from_main(lambda: start_with(name, begun)) != name:
            content = content | {"weights": begun}  # the run that this one began from has gone on
    settle_precision(ranks, settings["dtype"], state and state["content"]["precision"])
    identity = {"fixed": fixed, "content": content | {"precision": ranks.precision}}
    if state is not None:
        identity, changes = check_same_run(
            state, identity, settings=settings, defaults=defaults, force=settings["force"]
        )
        if changes:
            ranks.print(f"changed since {state['path']}: {', '.join(changes)}")
    return lock, state, identity


def find_resumable(out_dir: str | Path, choice: str) -> Path | None:
    """The checkpoint to go on from, or None to start afresh.

    `choice` is "auto" (the newest whole checkpoint in out_dir, if any), "none" or a checkpoint's path. When
    torchrun restarts a run that has saved, or Slurm requeues its job, it is "auto". Raises InputError when
    out_dir holds checkpoints that the choice does not lead to.
    """
    existing = list_checkpoints(out_dir)
    restarts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    if existing and any(int(os.environ.get(name, 0)) for name in restarts):
        choice = "auto"
    if choice == "none" and existing:
        raise InputError(
            f"{out_dir} holds checkpoints already, up to {existing[-1].name}; choose another --out_dir "
            f"or go on from them with --resume=auto"
        )
    if choice in ("none", "auto"):
        newest = newest_checkpoint(out_dir)  # with "none" there is none
        if newest is None and existing:
            raise InputError(
                f"{out_dir} holds checkpoints up to {existing[-1].name}, but none is whole; bring one back, "
                f"or delete them to start afresh"
            )
        return newest
    chosen = Path(choice)
    what = damage(chosen, for_resuming=True)
    if what:
        raise InputError(f"{chosen} cannot be resumed: {what}; choose another, or --resume=auto")
    step = read_json(chosen / "checkpoint.json")["step"]
    inside = chosen.resolve().parent == Path(out_dir).resolve()
    later = [path.name for path in existing if not inside or step_of(path) > step]
    if later:
        raise InputError(
            f"{out_dir} holds other checkpoints ({', '.join(later)}); go on from the newest with "
            f"--resume=auto, delete them, or choose another --out_dir"
        )
    return chosen


def load_resumable(out_dir: str | Path, choice: str, ranks: Ranks) -> dict | None:
    """The training state of the checkpoint that find_resumable finds, with its folder under "path"; or None.

    Rank 0 looks for it and verifies it. Raises InputError for a file that could run code, as only a
    stranger's does, and on a rank that does not see the checkpoint.
    """
    path = ranks.from_main(lambda: (path := find_resumable(out_dir, choice)) and str(path))
    if path is None:
        return None
    ranks.require_shared(Path(path) / "checkpoint.json")
    return load_state(Path(path) / "training_state.pt") | {"path": Path(path)}


def load_state(path: Path) -> dict:
    """A training state, its tensors memory-mapped; InputError for a file that could run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors, numbers and text, and is not loaded, as it could run code; go "
            f"on from another checkpoint"
        ) from error


def check_same_run(
    state: dict, identity: dict[str, dict], *, settings: dict, defaults: dict, force: bool
) -> tuple[dict[str, dict], list[str]]:
    """Compare a saved state with the run that resumes it. Returns the run's identity and a list of changes.

    `identity` has two parts. "fixed" is what a run can never change. "content" describes the run's data and
    starting point. None in either part means unknown: the saved value is kept. `defaults` fill in settings
    that an old checkpoint lacks.

    Raises InputError if "fixed" differs. Without `force` it also raises if "content" or a setting outside
    FREE_FIELDS differs: the run would not end as an undisturbed one does.
    """
    fixed = differences(state["fixed"], identity["fixed"])
    if fixed:
        raise InputError(
            f"{state['path']} belongs to another run ({', '.join(fixed)}); take another --out_dir, or the "
            f"old values"
        )
    old, new = state["content"], identity["content"]
    same = {name for name, value in new.items() if value is not None and value == old.get(name)}
    # What a path leads to counts, not the path: the model's weights, the data's files.
    free = {*FREE_FIELDS, *(["data"] if "data_files" in same else [])}
    moved = {"model", "init_from"} if "weights" in same else set()
    changed = differences(defaults | state["config"], settings)
    breaking = differences(old, {name: value for name, value in new.items() if name not in moved})
    breaking += [text for text in changed if text.split()[0] not in free]
    if breaking and not force:
        raise InputError(
            f"{state['path']} was trained with other settings ({', '.join(breaking)}); take those, or "
            f"another --out_dir, or --force to go on with the new ones, which ends elsewhere than an "
            f"undisturbed run"
        )
    known = {
        part: {name: state[part].get(name) if value is None else value for name, value in values.items()}
        for part, values in identity.items()
    }
    return known, breaking + [text for text in changed if text not in breaking]


def differences(old: dict, new: dict) -> list[str]:
    """Each value that is known and was another, as "name old → new"."""
    return [
        f"{name} {old.get(name)!r} → {value!r}"
        for name, value in new.items()
        if value is not None and old.get(name) != value
    ]


def found_start(name: str, out_dir: str) -> str:
    """The model that a run in out_dir starts from, as find_model finds it. Once the run has saved, the model
    may be gone."""
    try:
        return str(find_model(name))
    except InputError:
        if list_checkpoints(out_dir):
            return name
        raise


def start_with(name: str, weights: str) -> str:
    """The checkpoint in a run's folder whose weights have this hash, see weights_of; without one the name as
    it is. So a later run finds its start again although the earlier run has gone on."""
    for path in list_checkpoints(name):
        try:
            if weights_of(str(path)) == weights:
                return str(path)
        except InputError:  # damaged: not the one
            continue
    return name


def starting_point(out_dir: str, model: str, *data: str) -> tuple[str, dict]:
    """Where a run starts: the model's directory or hub id, verified, and the content of model and data.

    The content has hashes of local files, None for what is of a hub or a package, or gone. Of several data
    sources each has its hash, or its name if it has none. The commits of hub datasets are None, too: a run
    that goes on keeps those it began with, see settle_commits.
    """
    hashes = [data_hash(name) for name in data]
    path = found_start(model, out_dir)
    content = {
        "model": os.path.normpath(model),
        "data_files": hashes[0] if len(data) == 1 else [found or name for found, name in zip(hashes, data)],
        "commits": None,
        "weights": weights_of(path),
    }
    return path, content


def settle_commits(content: dict, data: Sequence[str], *, cache_dir: str, ranks: Ranks) -> list:
    """Note in a run's content at which commit each hub dataset is read: where the run began, or else the
    newest. Returns for each data source what its rows are known by: the hash of its files, its name and
    commit, or its name alone."""
    known, notes = content.get("commits") or {}, cache_folder(cache_dir)
    content["commits"] = ranks.from_main(lambda: hub_commits(data, known, notes))
    files = content["data_files"] if len(data) > 1 else [content["data_files"] or data[0]]
    commits = content["commits"]
    return [[name, commits[name]] if name in commits else found for name, found in zip(data, files)]


def data_hash(data: str) -> str | None:
    """A hash of the local files that a data source names; None if there are none."""
    files = source_files(data) if data != "embedded" else None
    return fingerprint([[path.name, file_sha256(path)] for path in files]) if files else None


def weights_of(model: str) -> str | None:
    """A hash of the weights in a model's directory; None if there is none, as of a hub id. Hashes that
    checkpoint.json tells are not computed again: find_model has."""
    manifest = Path(model) / "checkpoint.json"
    told = read_json(manifest)["files"] if manifest.exists() else {}
    hashes = [
        told[path.name]["sha256"] if path.name in told else file_sha256(path)
        for path in sorted(Path(model).glob("*.safetensors"))
    ]
    return fingerprint(hashes) if hashes else None


def phase_start(out_dir: str, init_from: str, flags: dict) -> tuple[str | None, dict]:
    """Where a new phase starts: the model's directory or hub id, verified, and its content; None without a
    name. Raises InputError for flags that contradict a directory's config.json, unless the phase has saved:
    then its checkpoints have its shape."""
    if not init_from:
        return None, {"init_from": None, "weights": None}
    path = found_start(init_from, out_dir)
    if (Path(path) / "config.json").exists() and not list_checkpoints(out_dir):
        check_shape(path, GPTConfig.from_hf(read_json(Path(path) / "config.json")), flags)
    return path, {"init_from": os.path.normpath(init_from), "weights": weights_of(path)}


def check_shape(path: str, shape: GPTConfig, flags: dict) -> None:
    """Raise InputError for flags that contradict the shape of the model that a phase starts from."""
    other = [
        f"--{name}={value}, it has {getattr(shape, name)}"
        for name, value in flags.items()
        if getattr(shape, name) != value
    ]
    if other:
        raise InputError(
            f"{path} has another shape than the flags ask for ({'; '.join(other)}); leave these flags out, "
            f"then the shape is the model's"
        )


def new_phase(
    path: str,
    *,
    flags: dict,
    context_length: int,
    rope_theta: float | None,
    optimizer: str,
    tokenizer,
    ranks: Ranks,
) -> tuple[GPTModel, dict | None]:
    """The model that a new phase starts from, on this rank's device, and its training state for the
    optimizer; None, and a line says why, if a fresh one starts.

    The model's context grows to context_length if it is shorter. rope_theta replaces its base (None: stays).
    Raises InputError for a model with another shape than the flags or another tokenizer than the data.
    """
    model, own = open_model(path, ranks)
    check_shape(path, model.config, flags)
    theirs, ours = tokenizer_fingerprint(own), tokenizer_fingerprint(tokenizer)
    if theirs != ours:
        raise InputError(
            f"{path} has another tokenizer ({theirs}) than the data ({ours}); prepare the data with "
            f"--tokenizer={path}"
        )
    known = model.config.max_position_embeddings
    model.config.max_position_embeddings = max(known, context_length)
    model.config.rope_theta = rope_theta or model.config.rope_theta
    model.init_rope()
    lacking = ranks.from_main(lambda: lacking_state(path, optimizer))
    grown = f"; its context grows from {known} to {context_length} tokens" if context_length > known else ""
    kept = f"with a fresh optimizer, {lacking}" if lacking else "with its optimizer state"
    ranks.print(f"starting from {path} {kept}{grown}")
    state = None if lacking else load_state(Path(path) / "training_state.pt")
    return model.to(ranks.device), state


def lacking_state(path: str, optimizer: str) -> str | None:
    """Why a model cannot give an optimizer of this kind its state, or None; InputError for a damaged one."""
    file, manifest = Path(path) / "training_state.pt", Path(path) / "checkpoint.json"
    if not (file.exists() and manifest.exists()):
        return "for it is no checkpoint with a training_state.pt"
    told = read_json(manifest)["files"].get(file.name, {"bytes": 0, "sha256": ""})
    what = file_damage(file.parent, file.name, (told["bytes"], told["sha256"]))
    if what:
        raise InputError(f"{path}: {what}; delete {file} to start with a fresh optimizer")
    kind = load_state(file)["fixed"]["optimizer"]
    return f"for its own was {kind}" if kind != optimizer else None
