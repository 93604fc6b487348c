"""Talking to a model."""

import itertools
import json
import os
import pty
import select
import shutil
import signal
import sys
from pathlib import Path

import pytest
from conftest import ROOT, refused, run, small_model

import chat
import common
import sft_gpt
from common import InputError, read_records
from gpt import GPTModel


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change_config(**fields):
    return lambda path: path.write_text(json.dumps(common.read_json(path) | fields))


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("taken_away", "known"), [("<|endoftext|>", True), ("<|im_end|>", False), ("<|im_start|>", False)]
)
def test_a_chat_needs_the_two_tokens_of_turns_only(taken_away, known, base_run, tmp_path):
    """Others' models: one without <|endoftext|> chats, one that lacks a token of turns does not."""
    model, tokenizer = chat.load(str(base_run))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (tmp_path / name).exists():
            text = (tmp_path / name).read_text()
            (tmp_path / name).write_text(text.replace(taken_away, "<|another|>"))
    if known:
        assert chat.load(str(tmp_path))[1].new_ids
    else:
        refused("has no ids for ChatML's tokens", chat.load, str(tmp_path))


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
    told = f"the system message and the last one take {lengths[2]} tokens and the context leaves them "
    refused(told, chat.drop_oldest, messages, tokenizer, lengths[2] - 1)
    alone = len(chat.prompt_ids([messages[5]], tokenizer))
    told = f"the message takes {alone} tokens and the context leaves it {alone - 1}"
    refused(told, chat.drop_oldest, messages, tokenizer, alone - 1)


@pytest.mark.parametrize("role", ["developer", "assistant"])
def test_what_comes_before_the_first_question_is_read_while_it_fits(role, talker):
    _, tokenizer = talker
    messages = [{"role": role, "content": "be short"}, *turns("old", "reply", "newest")]
    length = len(chat.prompt_ids(messages, tokenizer))
    assert chat.drop_oldest(messages, tokenizer, length) == (messages, 0)
    head = messages[:1] if role == "developer" else []
    kept, dropped = chat.drop_oldest(messages, tokenizer, length - 1)
    assert kept == head + messages[1 if not head else 3 :] and dropped == (2 if head else 1)


def test_however_long_a_conversation_is_few_renderings_find_what_fits(talker, monkeypatch):
    _, tokenizer = talker
    messages, rendered, original = turns(*["a"] * 5001), [], chat.prompt_ids

    def prompt_ids(*given):
        rendered.append(1)
        return original(*given)

    monkeypatch.setattr(chat, "prompt_ids", prompt_ids)
    kept, dropped = chat.drop_oldest(messages, tokenizer, 60)
    assert kept == messages[dropped:] and len(original(kept, tokenizer)) <= 60
    assert len(original(messages[dropped - 2 :], tokenizer)) > 60 and len(rendered) < 20


def test_the_streamed_pieces_are_the_answer(talker):
    model, tokenizer = talker
    config = chat.Config(temperature=0.0, max_new_tokens=20)
    ids = [
        i for (i,) in model.generate([chat.prompt_ids(turns("the river"), tokenizer)], 20, stop_ids=[0, 2])
    ]
    events = list(chat.stream(model, tokenizer, turns("the river"), config))
    text = "".join(event.get("text", "") for event in events)
    assert text == tokenizer.decode(ids, skip_special_tokens=True)
    assert ids[-1] in (0, 2) or events[-1] == {"cut": len(ids)}


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(talker, monkeypatch, capsys):
    def interrupted(*_):
        yield {"text": "so far"}
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream", interrupted)
    messages = chat.respond(*talker, turns("hello"), chat.Config())
    assert messages == [*turns("hello"), {"role": "assistant", "content": "so far", "cut": True}]
    assert "so far [stopped]" in capsys.readouterr().out


def test_a_question_whose_answer_was_stopped_before_it_began_is_not_kept(talker, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(chat, "stream", interrupted)
    assert chat.respond(*talker, turns("a", "b", "c"), chat.Config()) == turns("a", "b")
    printed = capsys.readouterr().out
    assert "[stopped]" in printed and "2 oldest messages were dropped" in printed  # for that question only


@pytest.mark.slow
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


@pytest.mark.slow
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


# -- commands ------------------------------------------------------------------------------------------------


def test_reset_keeps_the_system_message_and_system_changes_it():
    config = chat.Config(system="be short")
    messages = [*chat.system_turn("be short"), *turns("hello", "hi")]
    assert chat.command("/reset", messages, config)[0] == chat.system_turn("be short")
    messages, config, _ = chat.command("/system be long ", messages, config)
    assert messages == [{"role": "system", "content": "be long"}, *turns("hello", "hi")]
    assert chat.command("/reset", messages, config)[0] == chat.system_turn("be long")
    messages, config, _ = chat.command("/system", messages, config)
    assert messages == turns("hello", "hi") and chat.command("/reset", messages, config)[0] == []


def test_saved_conversations_are_rows_that_fine_tuning_reads(tmp_path):
    path, config = tmp_path / "mine.jsonl", chat.Config()
    for messages in (turns("hello", "hi"), turns("naïve\nlines", "<b>漢字</b>")):
        assert f"--data={path}" in chat.command(f"/save {path}", messages, config)[2]
    rows = sft_gpt.conversations(sft_gpt.Config(data=str(path)))
    assert [row for row, _ in rows] == [turns("hello", "hi"), turns("naïve\nlines", "<b>漢字</b>")]
    path.write_text(path.read_text().rstrip("\n"))  # as an editor may leave it
    chat.command(f"/save {path}", turns("last", "one"), config)
    rows = [row for row, _ in sft_gpt.conversations(sft_gpt.Config(data=str(path)))]
    assert rows[1:] == [turns("naïve\nlines", "<b>漢字</b>"), turns("last", "one")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/save", r"/save : expected a file whose name ends in \.jsonl"),
        ("/save chat.py", r"/save chat\.py: expected a file whose name ends in \.jsonl"),
        ("/save ~nobody-is-here.jsonl", r"names the home of nobody here"),
        ("/save nowhere/mine.jsonl", r"nowhere/mine\.jsonl cannot be written"),
        ("/etc/passwd is what?", r"/etc/passwd is no command; /help lists them"),
    ],
)
def test_a_command_that_cannot_be_obeyed_is_told(line, words):
    refused(words, chat.command, line, turns("hello", "hi"), chat.Config())


def test_a_conversation_without_an_answer_is_not_saved(tmp_path):
    path = tmp_path / "mine.jsonl"
    refused("there is no answer yet", chat.command, f"/save {path}", turns("hello"), chat.Config())
    assert not path.exists()


def test_help_names_every_command():
    told = chat.command("/help", [], chat.Config())[2]
    for usage in chat.COMMANDS:
        assert usage in told
        name, _, rest = usage.partition(" ")
        try:
            chat.command(name, [], chat.Config())
        except InputError as error:
            assert "is no command" not in str(error), rest


def test_tokens_a_second_are_told_on_request(talker, capsys, monkeypatch):
    """By a clock that ticks once a look: the first token after 1 s, then one a second."""
    ticks = itertools.count()
    monkeypatch.setattr(chat.time, "monotonic", lambda: next(ticks))
    monkeypatch.setattr(chat, "stream", lambda *_: iter([{"text": text} for text in ("a", "", "b")]))
    _, config, _ = chat.command("/speed", [], chat.Config())
    chat.respond(*talker, turns("hello"), config)
    assert capsys.readouterr().out == "ab\n[3 tokens: the first after 1.00 s, then 1.0 tokens/s]\n"
    _, config, _ = chat.command("/speed", [], config)
    chat.respond(*talker, turns("hello"), config)
    assert capsys.readouterr().out == "ab\n"


def test_a_piece_is_streamed_for_each_token_and_no_half_character_is_shown(talker):
    _, tokenizer = talker
    ids = tokenizer("é漢", add_special_tokens=False).input_ids  # more tokens than characters
    assert len(ids) > 2
    model = small_model()
    model.generate = lambda *_, **__: ([i] for i in [*ids, 2])
    pieces = [event["text"] for event in chat.stream(model, tokenizer, turns("hello"), chat.Config())]
    assert len(pieces) == len(ids) + 1 and pieces[-1] == ""
    assert [piece for piece in pieces if piece] == ["é", "漢"]


@pytest.fixture(scope="session")
def roomy(tokenizer, tmp_path_factory):
    """A model with random weights and room for many turns."""
    folder = tmp_path_factory.mktemp("roomy")
    small_model(max_position_embeddings=512).save_pretrained(folder, tokenizer)
    return folder


def test_commands_in_a_conversation_and_no_colours_in_a_pipe(roomy, tmp_path):
    lines = [
        "/system be short",
        '"""the river',
        'and the stone"""',
        "/speed",
        "the bridge",
        f"/save {tmp_path}/mine.jsonl",
        "/nonsense",
        " /etc is what?",
        "/reset",
        f"/save {tmp_path}/none.jsonl",
    ]
    flags = [f"--model={roomy}", "--max_new_tokens=4", "--temperature=0"]
    result = run("chat.py", *flags, input="\n".join(lines) + "\n")
    assert result.returncode == 0 and "\x1b" not in result.stdout + result.stderr
    (row,) = read_records(tmp_path / "mine.jsonl")
    assert [message["role"] for message in row["messages"]] == ["system"] + ["user", "assistant"] * 2
    asked = [message["content"] for message in row["messages"] if message["role"] != "assistant"]
    assert asked == ["be short", "the river\nand the stone", "the bridge"]
    assert "[/nonsense is no command" in result.stderr and "there is no answer yet" in result.stderr
    assert "[the system message is set]" in result.stdout and result.stdout.count(" tokens/s]") in (1, 2)


class Terminal:
    """chat.py on a terminal of its own, as a person uses it."""

    def __init__(self, *arguments: str, **environment: str):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            variables = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
            variables |= {"TERM": "xterm", **environment}
            os.execve(sys.executable, [sys.executable, str(ROOT / "chat.py"), *arguments], variables)
        self.shown = ""

    def until(self, text: str) -> str:
        """What is shown up to the text, which is taken."""
        while text not in self.shown:
            assert select.select([self.fd], [], [], 300)[0], self.shown
            self.shown += os.read(self.fd, 4096).decode()
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_on_a_terminal_there_are_colours_unless_they_are_unwanted(environment, roomy):
    with Terminal(f"--model={roomy}", "--max_new_tokens=2", **environment) as terminal:
        terminal.until("Ctrl-D the chat.")
        assert ("\x1b[1;32m" in terminal.until("> ")) == (not environment)
        terminal.type("/speed\r")
        assert terminal.until("tokens a second are told]").endswith("[" if environment else "\x1b[2m[")


def test_a_paste_is_one_message_and_the_arrow_brings_it_back(roomy, tmp_path):
    pytest.importorskip("readline")
    path = tmp_path / "mine.jsonl"
    with Terminal(f"--model={roomy}", "--max_new_tokens=2", NO_COLOR="1") as terminal:
        terminal.until("> ")
        terminal.type("\x1b[200~first line\nsecond line\x1b[201~\r")
        terminal.until("second line")
        terminal.until("> ")
        terminal.type("\x1b[A\r")  # the same again
        terminal.until("second line")
        terminal.until("> ")
        terminal.type(f"/save {path}\r")
        terminal.until("[added 4 messages")
    (row,) = read_records(path)
    asked = [message["content"] for message in row["messages"] if message["role"] == "user"]
    assert asked == ["first line\nsecond line"] * 2


@pytest.mark.parametrize(
    ("cut", "shown"), [(3, "[cut at 3 tokens]\n"), (2, "[cut at 2 tokens, the context is full]\n"), (0, "")]
)
def test_an_answer_that_is_cut_says_so_and_is_marked_where_it_is_saved(
    cut, shown, talker, monkeypatch, capsys, tmp_path
):
    events = [{"text": "a"}, {"text": "b"}, *([{"cut": cut}] if cut else [])]
    monkeypatch.setattr(chat, "stream", lambda *_: iter(events))
    messages = chat.respond(*talker, turns("Hello!"), chat.Config(max_new_tokens=3))
    assert capsys.readouterr() == ("ab\n", shown)
    assert messages[-1]["content"] == "ab"
    told = chat.save(messages, str(tmp_path / "mine.jsonl"))
    (row,) = read_records(tmp_path / "mine.jsonl")
    assert ("marked as cut in it (1)" in told) == ("cut" in row["messages"][-1]) == bool(cut)


def test_an_answer_that_fills_the_context_is_cut_there(talker, monkeypatch):
    model, tokenizer = talker
    ids_of = tokenizer.convert_tokens_to_ids

    def ids_but_no_stops(tokens):
        return [-1] if tokens[0] == chat.END else ids_of(tokens)

    monkeypatch.setattr(tokenizer, "convert_tokens_to_ids", ids_but_no_stops)
    context = model.config.max_position_embeddings
    *texts, last = chat.events(model, tokenizer, turns("the river"), chat.Config(max_new_tokens=10 * context))
    prompt = len(chat.prompt_ids(turns("the river"), tokenizer))
    assert last == {"cut": context + 1 - prompt} and len(texts) == last["cut"]
