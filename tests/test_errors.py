"""Every error that a user can cause is provoked by a test; here are those that no other room provokes."""

import ast
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch
from conftest import ALONE, ROOT, dpo_config, prepare, pretrain_config, refused, small_model, write_jsonl
from conftest import text as made_up
from safetensors.torch import load_file, save_file
from test_parts import divided
from transformers import AutoTokenizer

import bench
import bench_sft
import chat
import dpo_gpt
import fake_cuda
import pretrain_gpt
import sft_gpt
from checkpoint import Checkpoints
from common import read_json
from distributed import Ranks
from gpt import GPTConfig, GPTModel
from resume import find_resumable, load_state
from sources import hub_rows
from tokenization import load_tokenizer, train_tokenizer


def sites() -> Iterator[tuple[str, int, int, str]]:
    """Where the project makes an InputError: file, first and last line, and the code of its sentence."""
    for path in sorted(ROOT.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "InputError":
                yield str(path), node.lineno, node.end_lineno, ast.unparse(node.args[0])


def unprovoked() -> list[str]:
    return [
        f"{Path(path).name}:{first} {told}"
        for path, first, last, told in sites()
        if not any((path, line) in conftest.PROVOKED for line in range(first, last + 1))
    ]


def test_every_error_of_a_user_is_provoked_by_a_test(request):
    """In this process, by the quick tests; conftest.py has it run last."""
    if not request.config.whole_run:
        pytest.skip("only some of the tests run")
    assert not unprovoked(), "\n".join(unprovoked())


def test_an_error_counts_as_provoked_where_it_was_made_and_nowhere_else(tmp_path, monkeypatch):
    (tmp_path / "list.json").write_text("[1]")
    mistake = ("holds a JSON list; expected a JSON object", read_json, tmp_path / "list.json")
    refused(*mistake)
    monkeypatch.setattr(conftest, "PROVOKED", set())
    before = unprovoked()
    assert len(before) == len(list(sites())) > 100
    refused(*mistake)
    (one,) = set(before) - set(unprovoked())
    assert one.startswith("common.py:") and "holds a JSON" in one


def test_without_trl_the_comparison_with_it_is_refused(monkeypatch):
    monkeypatch.setattr(bench_sft, "find_spec", lambda name: None)
    refused("TRL, which is not installed; pip install trl", bench_sft.compare, bench.Config(), ALONE)
    monkeypatch.setitem(sys.modules, "trl", None)
    settings = {"recipe": sft_gpt.Config(), "config": bench.Config(), "bf16": False}
    refused("TRL, which is missing .*; pip install trl", bench_sft.trl_trainer, ROOT, [], 1, **settings)


def test_flags_of_a_chat_that_exclude_each_other_are_refused(monkeypatch):
    refused("--web and --prompt exclude each other", chat.main, chat.Config(web=True, prompt="Hello"))
    monkeypatch.setattr(chat, "usable_device", lambda name: torch.device("mps"))
    refused("--weights=int8 is for CPUs, the device is mps", chat.main, chat.Config(weights="int8"))


def test_too_many_bad_steps_end_a_run_with_the_reason(data_dir, tmp_path, monkeypatch):
    nothing = lambda *_, **__: (torch.tensor(torch.nan), torch.tensor(1.0))  # noqa: E731
    monkeypatch.setattr(pretrain_gpt, "forward_backward", nothing)
    message = (
        "2 steps in a row were skipped, the last because its loss is nan; there is no checkpoint yet; lower"
    )
    refused(message, pretrain_gpt.main, pretrain_config(data_dir, tmp_path, max_bad_steps=2, save_every=6))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    kept = {"tokenizer": None, "identity": {}, "settings": {}, "origin": "", "keep_last": 0, "keep_every": 0}
    checkpoints, model = Checkpoints(tmp_path, ALONE, **kept), small_model()
    model.model.norm.weight.data[0] = torch.inf
    message = "after step 3 1 weights are not finite, model.norm.weight among them; nothing was saved"
    refused(message, checkpoints.check_savable, 3, model, 0)
    checkpoints.close()


class Two(Ranks):
    """The first of two ranks, of which the other agrees with it."""

    def from_main(self, compute):
        return compute()


def test_fewer_pairs_than_ranks_are_refused(base_run, preferences, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo_gpt, "join_ranks", lambda *_, **__: Two(0, 2, torch.device("cpu")))
    config = dpo_config(base_run, preferences, tmp_path, batch_pairs=1)
    refused("a step of 1 pairs is too few for 2 ranks.*; raise --batch_pairs", dpo_gpt.main, config)


def test_fake_tensors_elsewhere_than_on_linux_are_refused(monkeypatch):
    monkeypatch.setattr(fake_cuda, "needs_guard", lambda: True)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "platform", "darwin")
    refused("need Linux, and this is darwin; use a Linux machine", fake_cuda.install)


def test_a_head_of_odd_size_and_a_text_beyond_the_context_are_refused():
    refused("head_dim.* is 3; .* change one of them", GPTConfig, hidden_size=12, num_attention_heads=4)
    refused("65 tokens are more than the context of 64", small_model(), torch.zeros(1, 65, dtype=torch.long))


@pytest.mark.parametrize("kind", ["lacking", "whole numbers", "not finite"])
def test_weight_files_without_a_tensor_or_with_numbers_of_no_use_are_refused(kind, tmp_path):
    small_model().save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.norm.weight"
    weights = load_file(path)
    if kind == "lacking":
        del weights[name]
    elif kind == "not finite":
        weights[name][1] = torch.nan
    else:
        weights[name] = weights[name].long()
    save_file(weights, path)
    told = {
        "lacking": f"lacks 1 tensors that config.json asks for, as {name}; copy or download them again",
        "whole numbers": f"holds {name} as torch.int64; supported: float32",
        "not finite": f"holds NaN or infinity in {name}; copy or download it again",
    }
    refused(told[kind], GPTModel.from_pretrained, tmp_path)


def test_a_source_without_text_and_one_that_changed_are_refused_when_processes_divide_it(
    tokenizer_dir, tmp_path
):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(2):
        write_jsonl(source / f"{number}.jsonl", [{"text": " "}] * 3)
    refused("holds no text, so nothing was prepared", divided, tmp_path / "a", source, tokenizer_dir, 2)
    for number in range(2):
        write_jsonl(source / f"{number}.jsonl", ({"text": made_up(i + 40 * number)} for i in range(40)))
    out = divided(tmp_path / "b", source, tokenizer_dir, 2)
    (out / "train_000000.bin").write_bytes(b"damaged")
    first = source / "0.jsonl"
    first.write_text(first.read_text().replace("river", "revir").replace("bridge", "egdirb"))  # as long
    message = "does not give train_000000.bin again as it was; prepare into another --out_dir"
    refused(message, divided, out, source, tokenizer_dir, 2)


def test_a_lost_tokenizer_is_not_replaced_by_another(tokenizer_dir, tmp_path):
    source = write_jsonl(tmp_path / "texts.jsonl", ({"text": made_up(i)} for i in range(40)))
    given = shutil.copytree(tokenizer_dir, tmp_path / "given")
    out = prepare(tmp_path / "out", source, given)
    shutil.rmtree(out / "tokenizer")
    shutil.rmtree(given)
    train_tokenizer((made_up(i) for i in range(50, 90)), 300).save_pretrained(given)
    message = "tokenizer is damaged and .*given is not the tokenizer that made the shards"
    refused(message, prepare, out, source, given)


def test_a_folder_whose_checkpoints_are_all_damaged_is_refused(tmp_path):
    (tmp_path / "step_0000002").mkdir()
    message = "holds checkpoints up to step_0000002, but none is whole; bring one back, or delete them"
    refused(message, find_resumable, tmp_path, "auto")


def test_a_training_state_that_could_run_code_is_refused(tmp_path):
    torch.save({"step": 1, "found": Path("x")}, tmp_path / "training_state.pt", pickle_module=pickle)
    message = "is not loaded, as it could run code; go on from another checkpoint"
    refused(message, load_state, tmp_path / "training_state.pt")


def test_a_hub_dataset_whose_rows_differ_in_type_is_refused_with_the_row_it_reached():
    def tables():
        raise TypeError("a string is no list")
        yield

    stream = SimpleNamespace(num_shards=1, with_format=lambda kind: tables())
    message = "some/data cannot be read beyond row 0, .* .a string is no list.; name other files"
    refused(message, list, hub_rows(stream, 0, "some/data"))


def test_a_folder_without_a_tokenizer_and_a_slow_one_are_refused(tmp_path, monkeypatch):
    refused("holds no tokenizer; expected a tokenizer.json", load_tokenizer, tmp_path)
    slow = SimpleNamespace(is_fast=False)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: slow)
    refused("some/slow is a slow tokenizer; only those", load_tokenizer, "some/slow")
