"""Talking to a model."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import refused, run, small_model

import chat
import common
from common import InputError
from gpt import GPTModel


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change_config(**fields):
    return lambda path: path.write_text(json.dumps(common.read_json(path) | fields))


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("config.json", Path.unlink, "holds neither a model (config.json) nor a whole checkpoint"),
        ("config.json", change_config(num_experts=8), "config.json has num_experts=8"),
        ("config.json", change_config(intermediate_size=64), "asks for shape (32, 64)"),
        ("model.safetensors", Path.unlink, "model.safetensors cannot be read"),
        ("model.safetensors", cut, "model.safetensors cannot be read"),
        ("tokenizer.json", Path.unlink, "holds no tokenizer; expected a tokenizer.json"),
        ("tokenizer.json", cut, "no tokenizer could be loaded"),
    ],
)
def test_chat_tells_a_bad_directory_in_one_sentence_with_status_1(file, damage, words, tmp_path, tokenizer):
    small_model().save_pretrained(tmp_path, tokenizer)
    damage(tmp_path / file)
    result = run("chat.py", f"--model={tmp_path}", "--prompt=What is water?")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and words in result.stderr


def test_a_checkpoint_with_another_tokenizer_than_its_own_is_refused(base_run, tmp_path):
    path = tmp_path / "step_0000006"
    shutil.copytree(base_run / "step_0000006", path)
    (path / "tokenizer.json").write_text((path / "tokenizer.json").read_text() + "\n")
    with pytest.raises(InputError, match=r"tokenizer\.json is not what was saved; delete checkpoint\.json"):
        chat.load(str(path))
    (path / "checkpoint.json").unlink()
    assert chat.load(str(path))[0].num_parameters() == chat.load(str(base_run))[0].num_parameters()


def test_a_chat_decodes_by_a_recorded_graph_where_there_is_a_gpu(base_run):
    path = base_run / "step_0000006"
    assert chat.load(str(path))[0].graph_decoding and not GPTModel.from_pretrained(path).graph_decoding


def test_a_model_that_does_not_know_chatml_is_told_apart(tmp_path, tokenizer):
    model = small_model(vocab_size=256)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no ids for ChatML's tokens"):
        chat.load(str(tmp_path))


def test_a_prompt_of_bytes_that_are_no_utf_8_is_one_sentence():
    result = run("chat.py", "--model=nowhere", "--prompt=caf\udce9")  # é in Latin-1
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: 'caf\\udce9' is no UTF-8 text") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--system=caf\udce9", r"'caf\\udce9' is no UTF-8 text"),
        ("--temperature=1e-45", "temperature is 1e-45; expected 0"),
        ("--temperature=nan", "--temperature=nan: expected a number from zero up"),
        ("--top_p=2", "top_p 2.0; expected"),
        ("--seed=1e20", "--seed=100000000000000000000: expected"),
    ],
)
def test_a_flag_that_chat_cannot_use_is_told_before_the_model_is_opened(flag, words):
    refused(words, chat.main, common.parse_config(chat.Config, ["--model=nowhere", flag]))


@pytest.fixture(scope="session")
def talker(base_run):
    return chat.load(str(base_run))


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def test_a_full_context_drops_the_oldest_turns_and_keeps_the_system_message(talker):
    _, tokenizer = talker
    messages = [{"role": "system", "content": "be short"}, *turns("old", "reply", "newer", "reply", "newest")]
    lengths = [len(chat.prompt_ids([messages[0], *messages[k:]], tokenizer)) for k in (1, 3, 5)]
    assert chat.drop_oldest(messages, tokenizer, lengths[0]) == (messages, 0)
    assert chat.drop_oldest(messages, tokenizer, lengths[0] - 1) == ([messages[0], *messages[3:]], 2)
    assert chat.drop_oldest(messages, tokenizer, lengths[2]) == ([messages[0], messages[5]], 4)
    with pytest.raises(
        InputError, match=f"takes {lengths[2]} tokens and the context leaves it {lengths[2] - 1}"
    ):
        chat.drop_oldest(messages, tokenizer, lengths[2] - 1)


def test_the_streamed_pieces_are_the_answer(talker):
    model, tokenizer = talker
    config = chat.Config(temperature=0.0, max_new_tokens=20)
    ids = [
        i for (i,) in model.generate([chat.prompt_ids(turns("the river"), tokenizer)], 20, stop_ids=[0, 2])
    ]
    assert "".join(chat.stream(model, tokenizer, turns("the river"), config)) == tokenizer.decode(
        ids, skip_special_tokens=True
    )


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(talker, monkeypatch, capsys):
    def interrupted(*_):
        yield "so far"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream", interrupted)
    messages = chat.respond(*talker, turns("hello"), chat.Config())
    assert messages == turns("hello", "so far")
    assert "so far [stopped]" in capsys.readouterr().out


def test_a_conversation_in_the_terminal(base_run):
    result = run(
        "chat.py",
        f"--model={base_run}",
        "--max_new_tokens=8",
        "--seed=1",
        "--system=hi",
        input="the river\n\nmore\n",
    )
    assert result.returncode == 0 and result.stdout.count("> ") == 4, result.stderr
    one = run(
        "chat.py",
        f"--model={base_run}",
        "--max_new_tokens=8",
        "--seed=1",
        "--system=hi",
        "--prompt=the river",
    )
    assert one.returncode == 0 and one.stdout.strip() and one.stdout.splitlines()[0] in result.stdout


def test_a_line_that_is_no_utf_8_is_told_and_the_conversation_goes_on(base_run):
    result = run(
        "chat.py",
        f"--model={base_run}",
        "--max_new_tokens=4",
        input="caf\udce9\nthe river\n",
        encoding="utf-8",
        errors="surrogateescape",
    )
    assert result.returncode == 0 and result.stdout.count("> ") == 3, result.stderr
    assert "['caf\\udce9' is no UTF-8 text" in result.stderr
