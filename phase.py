"""A new phase of training, as annealing or a longer context: the weights and optimizer of another run."""

import os
from pathlib import Path

from checkpoint import file_damage, find_model, open_model
from common import InputError, read_json
from distributed import Ranks
from gpt import GPTConfig, GPTModel
from resume import load_state, weights_of
from tokenization import tokenizer_fingerprint


def phase_start(init_from: str, flags: dict) -> tuple[str | None, dict]:
    """Where a new phase starts: the model's directory or hub id, verified, and its content; None without a
    name. Raises InputError for flags that contradict a directory's config.json."""
    if not init_from:
        return None, {"init_from": None, "weights": None}
    path = str(find_model(init_from))
    if Path(path).is_dir():
        check_shape(path, GPTConfig.from_hf(read_json(Path(path) / "config.json")), flags)
    return path, {"init_from": os.path.normpath(init_from), "weights": weights_of(path)}


def check_shape(path: str, shape: GPTConfig, flags: dict) -> None:
    """Raise InputError for flags that want another shape than the model has that a phase starts from."""
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
