"""Tokenizers: special tokens, ChatML, training one."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
from conftest import TEXTS, conversation, prepare, refused, text
from properties import few, given, st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data
import sft
import tokenization
from common import fingerprint
from sft import render_chatml
from tokenization import (
    END,
    SPECIALS,
    chat_template,
    encode,
    encode_after_newline,
    load_tokenizer,
    tokenizer_fingerprint,
    vocabulary_size,
    with_chatml,
)


@few
@given(st.lists(st.lists(st.sampled_from(SPECIALS) | st.text(), max_size=4).map("".join), max_size=6))
def test_tokenizing_a_batch_equals_one_by_one_and_text_of_special_tokens_stays_text(tokenizer, texts):
    together = encode(tokenizer, texts)
    assert together == [encode(tokenizer, [t])[0] for t in texts]
    assert not set(tokenizer.all_special_ids) & set(itertools.chain(*together))
    assert [tokenizer.decode(ids) for ids in together] == texts
    plain = [(t, ids) for t, ids in zip(texts, together) if not any(s in t for s in SPECIALS)]
    assert all(tokenizer(t, add_special_tokens=False).input_ids == ids for t, ids in plain)


def plain_tokenizer(folder: Path, *known: str, special: bool = True) -> Path:
    """A byte-level tokenizer as others make them, that knows only these of our special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(list(known))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("known", [(), SPECIALS[:1], SPECIALS[1:], SPECIALS[::-1]], ids=str)
def test_missing_special_tokens_are_added_at_the_end_and_existing_ids_stay(tmp_path, known):
    tokenizer = load_tokenizer(plain_tokenizer(tmp_path, *known))
    missing = [t for t in SPECIALS if t not in known]
    expected = {t: 258 + i for i, t in enumerate([*known, *missing])}
    assert len(tokenizer) == 261
    assert {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIALS} == expected
    assert encode(tokenizer, ["the"]) == [[257]]
    assert {tokenizer.eos_token, tokenizer.pad_token} == {END}
    marked = tokenizer("".join(SPECIALS), add_special_tokens=False).input_ids
    assert marked == [expected[t] for t in SPECIALS]


@pytest.mark.parametrize("special", [True, False])
def test_text_like_special_tokens_stays_text_whether_or_not_the_tokenizer_marked_them_so(tmp_path, special):
    tokenizer = load_tokenizer(plain_tokenizer(tmp_path, *SPECIALS, special=special))
    (ids,) = encode(tokenizer, ["the" + "".join(SPECIALS)])
    assert max(ids) < 258 and tokenizer.decode(ids) == "the" + "".join(SPECIALS)


def test_truncation_and_padding_that_a_tokenizer_was_saved_with_do_not_change_documents(tmp_path):
    path = plain_tokenizer(tmp_path) / "tokenizer.json"
    plain = load_tokenizer(tmp_path)
    backend = Tokenizer.from_file(str(path))
    backend.enable_truncation(5)
    backend.enable_padding(length=30)
    backend.save(str(path))
    found = encode(load_tokenizer(tmp_path), ["the the the the the the", "the"])
    assert found == encode(plain, ["the the the the the the", "the"])


def test_of_several_templates_by_name_chatml_takes_the_place(tmp_path):
    folder = plain_tokenizer(tmp_path)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder).chat_template == chat_template()


def test_the_template_renders_chatml_and_marks_the_assistant_s_content_and_end(tmp_path):
    tokenizer = load_tokenizer(plain_tokenizer(tmp_path))
    messages = [{"role": "system", "content": "be"}, *conversation(3, turns=2)["messages"]]
    expected = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    asked = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert asked == expected[: -len(messages[-1]["content"] + "<|im_end|>\n")]
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    marked = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"]) if m]
    answers = "".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant")
    assert tokenizer.decode(marked) == answers


def test_the_fingerprint_is_equal_for_a_saved_copy_and_different_for_another_tokenizer(tmp_path, tokenizer):
    fingerprint = data.tokenizer_fingerprint
    known = {fingerprint(tokenizer), fingerprint(tokenization.train_tokenizer(iter(TEXTS), 300))}
    for i, special in enumerate(((), SPECIALS[1:], SPECIALS[::-1])):
        first = load_tokenizer(plain_tokenizer(tmp_path / str(i), *special))
        first.save_pretrained(tmp_path / f"copy{i}")
        again = load_tokenizer(tmp_path / f"copy{i}")
        assert fingerprint(again) == fingerprint(first) not in known
        assert again.get_vocab() == first.get_vocab()
        known.add(fingerprint(first))
        encode(again, ["the <|im_end|>"])
        assert fingerprint(again) == fingerprint(first)
    tokenizer.save_pretrained(tmp_path / "ours")
    assert fingerprint(load_tokenizer(tmp_path / "ours")) == fingerprint(tokenizer)


def test_a_tokenizer_that_is_missing_or_cut_short_is_refused_by_name(tmp_path):
    refused(f"no tokenizer could be loaded from {tmp_path}/none", load_tokenizer, tmp_path / "none")
    refused("no tokenizer could be loaded from nobody/nothing", load_tokenizer, "nobody/nothing")
    path = plain_tokenizer(tmp_path / "cut") / "tokenizer.json"
    path.write_text(path.read_text()[:500])
    refused(f"no tokenizer could be loaded from {tmp_path}/cut", load_tokenizer, tmp_path / "cut")


@few
@given(st.text())
def test_a_trained_tokenizer_has_the_special_ids_first_and_spells_any_text(tokenizer, string):
    assert tokenizer.convert_tokens_to_ids(list(SPECIALS)) == [0, 1, 2]
    (ids,) = encode(tokenizer, [string])
    assert tokenizer.decode(ids) == string and min(ids, default=3) > 2 and max(ids, default=3) < 320


def test_training_a_tokenizer_twice_gives_the_same_and_digits_stay_apart(tokenizer):
    again = tokenization.train_tokenizer((text(i) for i in range(300)), 320)
    assert data.tokenizer_fingerprint(again) == data.tokenizer_fingerprint(tokenizer)
    assert [again.decode([i]) for i in encode(again, ["2024 11"])[0]] == list("2024 11")


def test_a_vocabulary_too_small_for_all_bytes_is_refused_with_the_least_there_is(tmp_path, source):
    match = "vocab_size is 258; a byte-level one needs at least 259"
    refused(match, prepare, tmp_path / "out", source, "train", vocab_size=258)
    assert len(tokenization.train_tokenizer(iter(TEXTS), 259)) == 259


# -- special tokens that a model of a tokenizer can give ----------------------------------------------------


def forging(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose model holds the special tokens' texts as pieces of its own."""
    pieces = [*(chr(i) for i in range(32, 127)), "\n", "▁", "▁the", "\n\n", *SPECIALS]
    texts = [*SPECIALS * 100, *map(text, range(50))]
    if kind == "BPE without a pattern":
        backend = Tokenizer(models.BPE())
        backend.decoder = decoders.Fuse()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pieces[:96], show_progress=False)
        backend.train_from_iterator(texts, trainer)
    elif kind == "byte-level BPE":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(texts, trainer)
    elif kind == "WordPiece":
        words = ["[UNK]", *pieces, *("##" + piece for piece in pieces[:96]), "the", "##the"]
        vocab = {word: i for i, word in enumerate(words)}
        backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=1000))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.decoder = decoders.WordPiece(cleanup=False)
    else:
        fallback = kind == "Unigram with bytes"
        scores = [(piece, -len(piece) / 10 - 1.0) for piece in ["<unk>", *pieces]]
        scores += [(f"<0x{i:02X}>", -20.0) for i in range(256)] if fallback else []
        backend = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=fallback))
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    assert all(backend.token_to_id(token) is not None for token in SPECIALS)
    return with_chatml(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=END))  # as GPT-2's


KINDS = ["BPE without a pattern", "byte-level BPE", "WordPiece", "Unigram", "Unigram with bytes"]
FORGERS = {}


@few
@given(
    st.sampled_from(KINDS),
    st.lists(st.sampled_from([*SPECIALS, "<|im_", "end|>", "the ", "a", "\n", "|", "x<"]), max_size=8),
)
def test_no_content_gives_a_special_id_whatever_the_tokenizers_model_and_decoding_gives_the_text(kind, parts):
    tokenizer = FORGERS.get(kind) or FORGERS.setdefault(kind, forging(kind))
    content = "".join(parts)
    special = set(tokenizer.convert_tokens_to_ids(list(SPECIALS)))
    (ids,) = encode(tokenizer, [content])
    assert special.isdisjoint(ids)
    decoded = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
    assert decoded == (" ".join(content.split()) if kind == "WordPiece" else content)  # it keeps no spaces


@pytest.mark.parametrize("kind", KINDS)
def test_the_forging_tokenizers_models_do_give_special_ids_by_themselves(kind):
    tokenizer = forging(kind)
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    ids = backend.encode(SPECIALS[1], add_special_tokens=False).ids
    backend.encode_special_tokens = False
    assert tokenizer.convert_tokens_to_ids(SPECIALS[1]) in ids


def test_only_ids_that_the_vocabulary_lacked_are_new(tmp_path):
    for kind in KINDS:
        assert forging(kind).new_ids == []
    known = load_tokenizer(plain_tokenizer(tmp_path / "a", *SPECIALS, special=False))
    assert known.new_ids == []
    lacking = load_tokenizer(plain_tokenizer(tmp_path / "b", *SPECIALS[:1]))
    assert lacking.new_ids == lacking.convert_tokens_to_ids(list(SPECIALS[1:]))


def test_a_tokenizer_that_can_spell_a_special_token_in_no_other_way_is_refused():
    vocab = {word: i for i, word in enumerate(["the", *SPECIALS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="the"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = with_chatml(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert encode(tokenizer, ["the stone"]) == [[0, 0]]
    match = r"turns the text '<\|im_end\|>' into its special id 3 and cannot spell it otherwise"
    refused(match, encode, tokenizer, ["the <|im_end|>"])


def with_ids(ids: dict[str, int]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(ids, [])))


def test_a_vocabulary_that_leaves_ids_out_has_the_size_of_its_largest_id():
    sparse = {chr(i): 1000 * (i - 32) for i in range(32, 127)}
    tokenizer = with_chatml(with_ids(sparse | {token: 94_001 + i for i, token in enumerate(SPECIALS)}))
    assert vocabulary_size(tokenizer) == 94_004 > len(tokenizer) and tokenizer.new_ids == []
    tokenizer = with_chatml(with_ids(sparse))
    assert vocabulary_size(tokenizer) == 94_001 and tokenizer.new_ids == [95, 96, 97]
    assert [tokenizer.convert_ids_to_tokens(i) for i in (0, 1000, 94_000)] == [" ", "!", "~"]


def test_special_tokens_that_would_get_the_id_of_another_token_are_refused():
    match = r"leaves ids out, so that <\|im_start\|> would get 5, which another token has"
    refused(match, with_chatml, with_ids({"a": 0, "b": 1, "c": 3, "d": 5}))


def test_a_tokenizer_with_an_absurd_id_is_refused(tmp_path, monkeypatch):
    with_ids({"a": 0, "b": 2000}).save_pretrained(tmp_path)
    assert vocabulary_size(load_tokenizer(tmp_path)) == 2001
    monkeypatch.setattr(tokenization, "MOST_IDS", 2000)
    refused("has 2 tokens with ids up to 2000; expected ids below 2000", load_tokenizer, tmp_path)


def test_a_strangers_code_is_never_run_and_nobody_is_asked(tmp_path, monkeypatch):
    folder = plain_tokenizer(tmp_path / "stranger")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append("run it?") or "y")
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "evil.Evil"}}))
    assert encode(load_tokenizer(folder), ["the"]) == [[257]]  # which needs none
    settings = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    refused("asks to run code of its own, and that is never done", load_tokenizer, folder)
    assert not asked and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer.json", '{"version": "9.0", "model": {"type": "New"}}'),
        ("tokenizer.json", "[]"),
        ("config.json", "[]"),
    ],
    ids=["list", "nested", "newer", "list", "config"],
)
def test_a_strange_tokenizer_file_is_one_sentence(name, content, tmp_path):
    folder = plain_tokenizer(tmp_path)
    (folder / name).write_text(content)
    refused(f"no tokenizer could be loaded from {folder}: ", load_tokenizer, folder)


def test_a_tokenizer_at_which_the_rust_library_panics_is_one_sentence(tokenizer_dir, tmp_path):
    shutil.copytree(tokenizer_dir, tmp_path / "panic")
    path = tmp_path / "panic" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["continuing_subword_prefix"] = "x" * 100  # longer than the merged tokens
    path.write_text(json.dumps(content))
    refused("no tokenizer could be loaded from .*panic: range .* out of range", load_tokenizer, path.parent)


def test_added_tokens_whose_ids_are_no_numbers_are_ignored(tmp_path):
    folder = plain_tokenizer(tmp_path)
    (folder / "added_tokens.json").write_text('{"<x>": "five"}')
    assert encode(load_tokenizer(folder), ["the"]) == [[257]]


@pytest.mark.parametrize("kind", KINDS[3:])
def test_a_text_after_a_newline_keeps_its_own_leading_newlines(kind):
    tokenizer = forging(kind)
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Prepend("▁")  # begins each text with a space, as Llama 2's does
    texts = ["\nthe", "\n\nthe", "\n", "the\n\nthe", ""]
    for text_, ids in zip(texts, encode_after_newline(tokenizer, texts)):
        assert backend.decode(ids, skip_special_tokens=False) == text_


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_headers_and_ends_are_the_template_s_where_a_tokenizer_begins_texts_with_a_space(scheme):
    tokenizer = forging("Unigram with bytes")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    messages = [{"role": "system", "content": "be"}, *conversation(3, turns=2)["messages"]]
    headers = [{**message, "content": ""} for message in messages]
    tokenizer.backend_tokenizer.encode_special_tokens = True  # as others may have left it
    rendered = render_chatml(headers, tokenizer)[0]
    assert rendered == tokenizer.apply_chat_template(headers, return_dict=False)
    if scheme != "always":  # there no content gains a space, see encode_after_newline
        ids = render_chatml(messages, tokenizer)[0]
        assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
    # Rows that were cached when headers were encoded as text are taken where that made no difference.
    rules = [tokenizer.chat_template, tokenizer_fingerprint(tokenizer)]
    before = f"data-{fingerprint([sft.RENDERING, ['files'], [64], rules])}"
    assert (sft.cached_as(["files"], [64], tokenizer) != before) == (scheme == "first")


def test_no_text_begins_with_a_token_that_is_never_trained_on(tmp_path):
    backend = Tokenizer.from_file(str(plain_tokenizer(tmp_path, "<s>") / "tokenizer.json"))
    id = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", id)])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>").save_pretrained(tmp_path / "theirs")
    assert AutoTokenizer.from_pretrained(tmp_path / "theirs")("the").input_ids == [id, 257]
    load_tokenizer(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")("the").input_ids == [257]
