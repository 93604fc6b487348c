"""Checkpoints: writing them so that no crash loses one, telling whole from damaged ones, opening models.

out_dir/step_0000123/    config.json, model.safetensors, tokenizer files: a Hugging Face model directory
                         training_state.pt: the optimizer and all else that a run needs to go on
                         checkpoint.json: each file's size and hash; README.md: the model card
"""

import errno
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor

from common import InputError, file_sha256, one_line, read_json, sync_to_disk, write_json
from distributed import Ranks
from gpt import GPTModel
from huggingface import model_directory
from optim import state_by_name
from sharding import own_numbers, own_part, shard_model, whole
from tokenization import load_tokenizer, vocabulary_size

# -- writing -------------------------------------------------------------------------------------------------


class Checkpoints:
    """Writes a run's checkpoints on rank 0, while training goes on.

    At any moment a crash leaves the older checkpoints, and the newest either whole or absent. Once it is
    whole, older ones are deleted, except the newest keep_last (0 keeps all) and those whose step is a
    multiple of keep_every.
    """

    def __init__(
        self,
        out_dir: str | Path,
        ranks: Ranks,
        *,
        tokenizer,
        identity: dict[str, dict],
        settings: dict,
        origin: str,
        keep_last: int,
        keep_every: int,
        start: int = 0,
    ):
        """`identity` and `settings` are what check_same_run compares; `origin` is a sentence for the card;
        `start` is the step of the checkpoint that the run goes on from."""
        self.out_dir, self.is_main = Path(out_dir), ranks.is_main
        self.tokenizer, self.identity = tokenizer, identity
        self.settings, self.origin = settings, origin
        self.keep_last, self.keep_every = keep_last, keep_every
        # Those after `start` are damaged: else the run would go on from them. They take no whole one's place.
        self.damaged = [path for path in list_checkpoints(out_dir) if step_of(path) > start]
        self.pinned: dict[str, dict | torch.Tensor] = {}  # host memory to which a GPU's numbers are copied
        self.thread, self.writing = ThreadPoolExecutor(1), Future()
        self.writing.set_result(None)

    def save(self, step: int, model: GPTModel, optimizer, *, history, metrics) -> float:
        """Begin to write a checkpoint; returns the seconds that training stood still.

        Waits for the one before, copies weights and optimizer state to host memory, and leaves the rest to a
        thread. The copy takes 12 bytes a parameter with AdamW. A GPU's is pinned, and torch then rounds each
        tensor up to a power of two. Raises InputError, having written nothing, if the disk has too little
        room, if weights are not finite, or if the one before could not be written.
        """
        began = time.monotonic()
        needed = checkpoint_bytes(optimizer) + SPARE
        self.wait()
        self.check_savable(step, model, needed)
        numbers = {"weights": model.stored_state(), "moments": state_by_name(model, optimizer)}
        numbers = copy_to_host(numbers, self.pinned, keep=self.is_main)
        if own_numbers(model.lm_head.weight).is_cuda:
            torch.cuda.synchronize()
        if not self.is_main:
            return 0.0
        state = {
            "step": step,
            **self.identity,
            "config": self.settings,
            "history": history.state(),
            "wandb_id": metrics.wandb_id,
            "origin": self.origin,
            "optimizer": numbers["moments"],
        }
        card = model_card(
            self.out_dir.name,
            model,
            origin=self.origin,
            trained=f"{step * metrics.step_tokens:,} tokens in {step} steps",
            losses=metrics.last_losses(),
            scores=metrics.last_scores(),
            settings=self.settings,
        )

        def write_files(folder: Path) -> None:
            model.save_pretrained(folder, self.tokenizer, numbers["weights"])
            (folder / "README.md").write_text(card, encoding="utf-8")
            torch.save(state, folder / "training_state.pt")

        self.writing = self.thread.submit(self.write, step, write_files, needed)
        return time.monotonic() - began

    def check_savable(self, step: int, model: GPTModel, needed: int) -> None:
        """Raise InputError if the disk has too little room, or if this rank's weights are not finite."""
        if self.is_main:
            for leftover in self.out_dir.glob(".step_*.partial"):  # of a run that was killed while writing
                shutil.rmtree(leftover)
            if shutil.disk_usage(self.out_dir).free < needed:
                raise lacking_space(self.out_dir, needed)
        broken = [name for name, p in model.named_parameters() if not own_numbers(p).isfinite().all()]
        if broken:
            raise InputError(
                f"after step {step} {len(broken)} weights are not finite, {broken[0]} among them; nothing "
                f"was saved, {told_newest(self.out_dir)}; lower the learning rate"
            )

    def raise_errors(self) -> None:
        """Raise what went wrong in a writing that has ended."""
        if self.writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk; raises what went wrong."""
        self.writing.result()

    def close(self) -> None:
        self.wait()
        self.thread.shutdown()

    def write(self, step: int, write_files: Callable[[Path], None], needed: int) -> None:
        """Write under another name, flush to the disk, add the manifest, rename, delete old ones."""
        final, partial = self.out_dir / f"step_{step:07d}", self.out_dir / f".step_{step:07d}.partial"
        try:
            write_files(partial)
            paths = sorted(partial.iterdir())
            files = {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in paths}
            for path in paths:
                sync_to_disk(path)
            write_json(partial / "checkpoint.json", {"step": step, "files": files})
            sync_to_disk(partial)
            metrics = self.out_dir / "metrics.jsonl"
            if metrics.exists():  # a resumed run will not make the rows up to this step again
                sync_to_disk(metrics)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            told, number = f"step {step} could not be saved ({one_line(error)})", error_number(error)
            if number not in (errno.ENOSPC, errno.EDQUOT, None):
                raise OSError(number, told) from error  # torchrun tries again: it may pass
            raise InputError(f"{told}; {lacking_space(self.out_dir, needed)}") from error
        if final in self.damaged:
            self.damaged.remove(final)
            shutil.rmtree(final)
        partial.rename(final)
        sync_to_disk(self.out_dir)
        self.delete_old()

    def delete_old(self) -> None:
        """Delete the checkpoints that are not kept any more, and damaged ones before the newest that are."""
        existing = list_checkpoints(self.out_dir)
        steps = [step_of(path) for path in existing if path not in self.damaged]
        stay = kept(steps, keep_last=self.keep_last, keep_every=self.keep_every)
        oldest = stay[-self.keep_last :][0]  # of the newest
        stay = {*stay, *(step for step in map(step_of, self.damaged) if step > oldest)}
        for old in (path for path in existing if step_of(path) not in stay):
            try:
                shutil.rmtree(old)
            except OSError as error:  # a link, or a file that NFS still holds
                print(f"warning: {old} could not be deleted ({one_line(error)})", file=sys.stderr)


# -- room on the disk ----------------------------------------------------------------------------------------

SPARE = 50_000_000  # bytes of the disk that are left for all but a checkpoint's numbers


def checkpoint_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of a checkpoint's numbers, all in fp32: a weight and what the optimizer keeps for it, one number
    with Muon, two with AdamW. The optimizer may have no state yet, and its weights no memory."""
    return sum(
        (8 if group["muon"] else 12) * p.numel() for group in optimizer.param_groups for p in group["params"]
    )


def kept(steps: Sequence[int], *, keep_last: int, keep_every: int) -> Sequence[int]:
    """Which of a run's checkpoints, told by their steps in order, are not deleted when the last is written:
    the newest keep_last (0: all), and those whose step is a multiple of keep_every (0: none).

        kept([2, 4, 6, 8], keep_last=1, keep_every=4) -> [4, 8]
    """
    if not keep_last:
        return steps
    old = [step for step in steps[:-keep_last] if keep_every and step % keep_every == 0]
    return [*old, *steps[-keep_last:]]


def most_checkpoints(
    max_steps: int, *, save_every: int, keep_last: int, keep_every: int, existing: Sequence[int] = ()
) -> int:
    """How many checkpoints lie on the disk when they are most, the one being written included, in a run that
    goes on from those of the `existing` steps."""
    start = max(existing, default=0)
    if start >= max_steps:
        return len(existing)
    before_last = [*existing, *range((start // save_every + 1) * save_every, max_steps, save_every)]
    stay = kept(before_last, keep_last=keep_last, keep_every=keep_every)
    return max(len(existing), len(stay)) + 1


def lacking_room(out_dir: str | Path, one: int, max_steps: int, **settings: int) -> str | None:
    """A sentence if the disk of a run's folder has too little room for its checkpoints of `one` byte count
    each; None if it has enough. The `settings` are those of most_checkpoints."""
    existing = [step_of(path) for path in list_checkpoints(out_dir)]
    most = most_checkpoints(max_steps, existing=existing, **settings)
    folder = Path(out_dir).absolute()
    folder = next(place for place in (folder, *folder.parents) if place.is_dir())
    # What a kill left half written is deleted before the first saving.
    leftovers = [path for part in Path(out_dir).glob(".step_*.partial") for path in part.rglob("*")]
    free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in leftovers if path.is_file())
    needed = (most - len(existing)) * one + SPARE
    if most == len(existing) or free >= needed:
        return None
    there = f", {len(existing)} of them there already" if existing else ""
    return (
        f"the checkpoints, at most {most} of {one / 1e9:.2f} GB at a time{there}, need {needed / 1e9:.2f} GB "
        f"more in {out_dir}, whose disk has {free / 1e9:.2f} GB free; make room, keep fewer (--keep_last, "
        f"--keep_every), or choose another --out_dir"
    )


def lacking_space(folder: Path, needed: int) -> InputError:
    """What to tell when the disk that holds the folder has no room for a checkpoint of so many bytes."""
    return InputError(
        f"a checkpoint needs {needed / 1e9:.2f} GB and {folder} has "
        f"{shutil.disk_usage(folder).free / 1e9:.2f} GB free; make room and run the same command again, it "
        f"continues from the last checkpoint"
    )


def error_number(error: Exception) -> int | None:
    """The operating system's number of an error; None if the library that met it does not tell."""
    told = re.search(r"os error (\d+)", str(error))  # safetensors is written in Rust
    return error.errno if isinstance(error, OSError) else int(told[1]) if told else None


def copy_to_host(state: dict, pinned: dict, *, keep: bool) -> dict:
    """A copy in host memory of a state whose values are tensors or such states, or with `keep` false nothing.

    All ranks ask together: a tensor that is split over them is put together, one after the other. A GPU's go
    to `pinned` memory, which is made here at first and used again; synchronize before the copy is read.
    """
    copied = {}
    for name, value in state.items():
        if isinstance(value, dict):
            copied[name] = copy_to_host(value, pinned.setdefault(name, {}), keep=keep)
        elif keep or isinstance(value, DTensor):
            tensor = whole(value.detach())
            if keep and tensor.is_cuda:
                if name not in pinned:
                    pinned[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                copied[name] = pinned[name].copy_(tensor, non_blocking=True)
            elif keep:
                copied[name] = tensor.to("cpu", copy=True)
    return copied


def model_card(
    name: str,
    model: GPTModel,
    *,
    origin: str,
    trained: str,
    losses: list[str],
    scores: list[str],
    settings: dict,
) -> str:
    """The README.md of a checkpoint: what it is, what it was made from, and the losses and scores measured so
    far."""
    fields = model.config.to_hf()
    (kind,) = fields.pop("architectures")
    shape, flags = (
        "".join(f"{name}: {value!r}\n" for name, value in values.items()) for values in (fields, settings)
    )
    measured = "## Losses\n\n" + "".join(f"- {line}\n" for line in losses)
    if scores:
        most = settings["eval_task_questions"]
        asked = f"at most {most} questions of each, chosen at random" if most else "all questions of each"
        measured += f"\n## Benchmarks\n\nZero-shot, on {asked}.\n\n"
        measured += "".join(f"- {line}\n" for line in scores)
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {name}\n\n"
        f"{origin} {model.num_parameters():,} parameters; {trained}. A {kind}, which "
        f"`AutoModelForCausalLM.from_pretrained` opens.\n\n"
        f"{measured}\n## Settings\n\n```\n{flags}```\n\n"
        f"## Configuration\n\n```\n{shape}```\n"
    )


def told_name(name: str, hub: str = "https://huggingface.co/") -> str:
    """A model or dataset as a model card tells it: file names alone, a link to what is on the hub."""
    paths = [Path(part) for part in name.split(",")]
    if all(path.exists() for path in paths):
        return ", ".join(path.name for path in paths)
    return f"[{name}]({hub}{name})"


# -- finding -------------------------------------------------------------------------------------------------


def list_checkpoints(out_dir: str | Path) -> list[Path]:
    """A run's checkpoint folders, oldest first."""
    paths = [p for p in Path(out_dir).glob("step_*") if re.fullmatch(r"step_\d{7,}", p.name)]
    return sorted(paths, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step_"))


def damage(checkpoint: Path, *, for_resuming: bool) -> str | None:
    """What is wrong with a checkpoint that Checkpoints wrote, or None if it is whole.

    The model card may be edited. training_state.pt counts, and is read, for resuming only.
    """
    if not (checkpoint / "checkpoint.json").exists():
        return "checkpoint.json is missing"
    try:
        manifest = read_json(checkpoint / "checkpoint.json")
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (InputError, KeyError, TypeError, AttributeError):
        return "checkpoint.json is cut short or not what was saved"
    unread = {"README.md"} if for_resuming else {"README.md", "training_state.pt"}
    files = {name: expected for name, expected in files.items() if name not in unread}
    with ThreadPoolExecutor(8) as threads:  # hashing leaves Python's lock to the others
        results = list(threads.map(lambda item: file_damage(checkpoint, *item), files.items()))
    return next((what for what in results if what), None)


def file_damage(folder: Path, name: str, expected: tuple) -> str | None:
    """What is wrong with a file of this name. Its bytes and SHA-256 are expected as checkpoint.json has them,
    which may itself be damaged and hold anything."""
    path = folder / name
    try:
        if Path(name).name != name:
            return f"checkpoint.json names {name!r}, which is no file's name"
        if not path.exists():
            return f"{name} is missing"
        size, sha256 = expected
        if not path.is_file() or path.stat().st_size != size or file_sha256(path) != sha256:
            return f"{name} is not what was saved"
    except (OSError, ValueError) as error:  # a failing disk, or a name that no file can have
        return f"{name!r} cannot be read ({error})"
    return None


def newest_checkpoint(out_dir: str | Path, *, for_resuming: bool = True) -> Path | None:
    """The newest whole checkpoint of a run, or None; damaged ones are named on stderr and passed over."""
    for checkpoint in reversed(list_checkpoints(out_dir)):
        what = damage(checkpoint, for_resuming=for_resuming)
        if what is None:
            return checkpoint
        print(f"warning: passing over {checkpoint}: {what}", file=sys.stderr)
    return None


def too_many_bad_steps(out_dir: str | Path, count: int, why: str) -> InputError:
    """The error when `count` steps in a row were skipped."""
    return InputError(
        f"{count} steps in a row were skipped, the last because {why}; {told_newest(out_dir)}; lower the "
        f"learning rate, or look at the data of these steps"
    )


def told_newest(out_dir: str | Path) -> str:
    """Which checkpoint a run that fails has saved last. It is not read, as each rank may ask."""
    saved = [path for path in list_checkpoints(out_dir) if (path / "checkpoint.json").exists()]
    return f"the newest checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"


def told_stop(out_dir: str | Path) -> str:
    """What a run prints that a signal stopped."""
    if list_checkpoints(out_dir):
        return f"stopped by a signal; the same command continues from {out_dir}'s checkpoint"
    return "stopped by a signal before anything was saved; the same command starts anew"


def find_model(name: str) -> str | Path:
    """The model that a user named: for a run's folder its newest whole checkpoint, else the name as it is.

    Raises InputError for a folder with neither, and for a checkpoint whose weights or tokenizer were changed.
    """
    path = Path(name)
    if not path.is_dir():
        return name
    if (path / "config.json").exists():
        ours = (path / "checkpoint.json").exists()
        if ours and (what := damage(path, for_resuming=False)):
            raise InputError(f"{name}: {what}; delete checkpoint.json there to use it all the same")
        return name
    checkpoint = newest_checkpoint(name, for_resuming=False)
    if checkpoint is None:
        raise InputError(
            f"{name} holds neither a model (config.json) nor a whole checkpoint (step_…); name a folder that "
            f"does, or a hub id"
        )
    return checkpoint


def open_model(path: str | Path, ranks: Ranks) -> tuple[GPTModel, object]:
    """A model directory or hub id, as find_model gives it, and its tokenizer, on this rank's device, with an
    embedding for each of the tokenizer's tokens."""
    ranks.from_main(lambda: str(model_directory(path)))  # rank 0 downloads, the others find it
    path = model_directory(path)
    tokenizer = load_tokenizer(path)
    if tokenizer.lost_template:
        ranks.print(f"{path} has a chat template of its own; ChatML takes its place, also in what is saved")
    size = read_json(path / "config.json").get("vocab_size", 0)
    if not tokenizer.new_ids and vocabulary_size(tokenizer) <= size:
        return open_weights(path, ranks), tokenizer
    model = GPTModel.from_pretrained(path)
    model.resize_vocabulary(vocabulary_size(tokenizer), tokenizer.new_ids)
    return shard_model(model, ranks).to(ranks.device), tokenizer


def open_weights(path: Path, ranks: Ranks) -> GPTModel:
    """A model on this rank's device. If it is split over the ranks, this one opens its part, and never holds
    more than one whole tensor."""
    model = GPTModel.from_pretrained(path, shard=lambda model: shard_model(model, ranks), place=own_part)
    return model.to(ranks.device)
