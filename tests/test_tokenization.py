"""Tokenizers: special tokens, ChatML, training one."""

import itertools
from pathlib import Path

import pytest
from conftest import TEXTS, conversation, few, prepare, refused, text
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import data
import tokenization
from tokenization import END, SPECIALS, encode, load_tokenizer


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
