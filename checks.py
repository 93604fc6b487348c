"""What of a run will certainly fail, told in seconds and before a GPU is held; the launch scripts ask first.

    WORLD_SIZE=8 python checks.py pretrain_gpt.py --data_dir=data/fineweb-edu --out_dir=out/base
    WORLD_SIZE=8 python checks.py sft_gpt.py --model=out/base --out_dir=out/chat

After the script's name come its flags. WORLD_SIZE is the number of ranks, as torchrun sets it. Only settings,
names, sizes and headers of files are read. The exit status is 1 if the run would fail. plan.py asks the same.
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from huggingface_hub import constants

import dpo_gpt
import pretrain_gpt
import sft_gpt
from checkpoint import checkpoint_bytes, lacking_room, list_checkpoints
from common import InputError, cache_folder, read_json, run_script
from data import TokenLoader, joint_folders, read_manifest, require_shards
from distributed import Ranks
from gpt import GPTConfig, GPTModel, padded
from optim import make_optimizer
from order import data_sources, parse_sources
from packing import row_length
from resume import check_shape
from sources import commit_note, source_files
from tokenization import load_tokenizer
from training import step_size

SCRIPTS = {"pretrain_gpt.py": pretrain_gpt, "sft_gpt.py": sft_gpt, "dpo_gpt.py": dpo_gpt}
USUAL_VOCABULARY = 49_152  # SmolLM2's, where nothing tells another


@dataclass(kw_only=True)
class Run:
    """What is known of a run before it starts."""

    shape: GPTConfig
    T: int  # tokens in a window, a row or an answer
    unit: str  # windows, rows or pairs
    step: int  # so many of them are in an optimizer step
    max_steps: int  # 0 where only the rendered data tell


def take_script() -> ModuleType:
    """The training script that the first argument names, which is taken out; pretraining without one."""
    named = len(sys.argv) > 1 and sys.argv[1] in SCRIPTS
    return SCRIPTS[sys.argv.pop(1)] if named else pretrain_gpt


def find_run(config, ranks: int) -> Run | None:
    """The run of a script's Config on so many ranks; None if its model is one of the hub that is not on this
    machine. Raises InputError for settings that contradict one another, the model or the number of ranks."""
    if isinstance(config, pretrain_gpt.Config):
        return pretraining(config, ranks)
    tunes = sft_gpt if isinstance(config, sft_gpt.Config) else dpo_gpt
    tunes.check(config)
    shape = opened_shape(config.model, config.out_dir)
    if shape is None:
        return None
    T = row_length(config.max_length, shape.max_position_embeddings)
    if tunes is dpo_gpt:
        pairs = dpo_gpt.step_pairs(config.batch_pairs, ranks)
        return Run(shape=shape, T=T, unit="pairs", step=pairs, max_steps=config.max_steps)
    rows = step_size(config.batch_tokens, T, ranks, unit="rows", flag="max_length")
    return Run(shape=shape, T=T, unit="rows", step=rows, max_steps=config.max_steps)


def pretraining(config: pretrain_gpt.Config, ranks: int) -> Run | None:
    """find_run for pretraining; a new phase has its model's shape."""
    pretrain_gpt.check(config)
    T, flags = config.context_length, pretrain_gpt.given_flags(config, pretrain_gpt.SHAPE_FLAGS)
    windows = step_size(config.batch_tokens, T, ranks, unit="windows", flag="context_length")
    shape = opened_shape(config.init_from, config.out_dir) if config.init_from else pretrain_shape(config)
    if shape is None:
        return None
    if config.init_from:
        if not saved_in(Path(config.out_dir)):
            check_shape(config.init_from, shape, flags)
        shape.max_position_embeddings = max(T, shape.max_position_embeddings)
    return Run(shape=shape, T=T, unit="windows", step=windows, max_steps=config.max_steps)


def opened_shape(model: str, out_dir: str) -> GPTConfig | None:
    """The shape of the model that a run opens: its own newest checkpoint or, without one, the `model` that it
    starts from. None for a hub id that is not downloaded yet."""
    fields = model_fields(out_dir if saved_in(Path(out_dir)) else model)
    return fields and GPTConfig.from_hf(fields)


def saved_in(folder: Path) -> list[Path]:
    """A run's checkpoints that were written to the end, oldest first; they are not verified."""
    return [path for path in list_checkpoints(folder) if (path / "checkpoint.json").exists()]


def pretrain_shape(config: pretrain_gpt.Config) -> GPTConfig:
    """The shape of a new model; the vocabulary is that of the data's manifest, if there is one."""
    folder = Path(parse_sources(config.data_dir)[0].path)
    known = (folder / "manifest.json").exists()
    size = read_manifest(folder).get("vocab_size", USUAL_VOCABULARY) if known else USUAL_VOCABULARY
    return pretrain_gpt.model_config(config, padded(size))


def model_fields(name: str) -> dict | None:
    """The config.json of a model directory, of a run's newest checkpoint or of a downloaded hub id; None of a
    hub id that is still to be downloaded. Weights are not looked at."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    path = Path(name)
    if path.is_dir():
        folder = path if (path / "config.json").exists() else ([path] + saved_in(path))[-1]
        if not (folder / "config.json").exists():
            raise InputError(f"{name} holds neither a model (config.json) nor a whole checkpoint (step_…)")
        return read_json(folder / "config.json")
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        raise InputError(f"there is no model directory {name}; name a run, a model or a hub id") from None
    if isinstance(found, str):
        return read_json(Path(found))
    if constants.HF_HUB_OFFLINE:
        raise InputError(
            f"there is no directory {name}, no model of that name was downloaded, and HF_HUB_OFFLINE=1 "
            f"forbids it; download it before, or name another"
        )
    return None


def in_datasets_cache(name: str) -> bool:
    """Whether `datasets` may have a hub dataset in its cache, where it gives names another spelling."""
    from datasets.config import HF_DATASETS_CACHE

    known = [path.name for path in Path(HF_DATASETS_CACHE).glob("*")]
    return any(re.sub(r"\W|_", "", name).lower() == re.sub(r"\W|_", "", other).lower() for other in known)


def check_data(config) -> None:
    """Raise InputError for data that are missing, too few for a window, or do not fit together, and for a
    tokenizer that cannot be loaded."""
    if isinstance(config, pretrain_gpt.Config):
        for folder in joint_folders(config.data_dir):
            require_shards(folder, config.tokenizer)
        for split in ("train", "val"):
            TokenLoader(config.data_dir, split, config.context_length, vocab_size=0)
        if config.tokenizer:
            load_tokenizer(config.tokenizer)
        return
    for name in tuning_sources(config):
        if name != "embedded":
            source_files(name)


def tuning_sources(config) -> list[str]:
    """The names of a tuning run's data."""
    if isinstance(config, sft_gpt.Config):
        return [part.data for part in sft_gpt.source_configs(config, data_sources(config.data))]
    return [config.data]


def check_downloaded(config) -> None:
    """Raise InputError for a dataset of the hub that neither a run nor `datasets` has read here before, and
    that HF_HUB_OFFLINE=1 forbids to fetch."""
    if isinstance(config, pretrain_gpt.Config) or not constants.HF_HUB_OFFLINE:
        return
    for name in tuning_sources(config):
        if name == "embedded" or source_files(name) is not None or in_datasets_cache(name):
            continue
        if not commit_note(name, cache_folder(config.cache_dir)).exists():
            raise InputError(
                f"{name} is a dataset of the hub, which HF_HUB_OFFLINE=1 shuts off; download the files of a "
                f"split elsewhere, `hf download {name} --repo-type=dataset --include='data/train*' "
                f"--local-dir=data/{Path(name).name}`, and give that folder"
            )


def checkpoint_size(shape: GPTConfig, optimizer: str) -> int:
    """Bytes of a checkpoint of this shape."""
    with torch.device("meta"):  # no memory
        model = GPTModel(shape)
    rates = {"lr": 0.0, "matrix_lr": 0.0, "betas": (0.0, 0.0), "weight_decay": 0.0}
    alone = Ranks(0, 1, torch.device("cpu"))
    return checkpoint_bytes(make_optimizer(model, optimizer, ranks=alone, **rates))


def saving(config) -> dict[str, int]:
    """The settings that tell how many checkpoints a run keeps."""
    return {name: getattr(config, name) for name in ("save_every", "keep_last", "keep_every")}


def room_problem(config, run: Run) -> str | None:
    """What lacking_room says of a run. A single checkpoint has to fit if the number of steps is not known."""
    one = checkpoint_size(run.shape, config.optimizer)
    return lacking_room(config.out_dir, one, run.max_steps or 1, **saving(config))


def main(config) -> None:
    run = find_run(config, int(os.environ.get("WORLD_SIZE", 1)))
    check_data(config)
    check_downloaded(config)
    if run and (lacking := room_problem(config, run)):
        raise InputError(lacking)


if __name__ == "__main__":
    run_script(main, take_script().Config)
