"""Tokenizers: training one, loading one, and ChatML's special tokens."""

import hashlib
import itertools
import json
import string
from collections.abc import Iterator, Sequence
from pathlib import Path

from common import InputError, one_line

END, TURN_START, TURN_END = SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MOST_IDS = 2**22  # of a tokenizer; the largest known have a quarter of a million
TRAIN_ON, REASONING = ("all", "last"), ("keep", "drop")


def chat_template(train_on: str = "all", reasoning: str = "keep") -> str:
    """ChatML for `apply_chat_template`. Its generation marks let return_assistant_tokens_mask=True give the
    loss mask.

    `train_on` "last" marks the last answer only. `reasoning` "drop" leaves an answer's leading
    <think>…</think> out once the user has spoken again, and marks the answers since then only.
    """
    content, marked, before = "message['content']", "message['role'] == 'assistant'", ""
    if train_on == "last" or reasoning == "drop":  # where the last message of each role stands
        before = (
            "{% set at = namespace(user=-1, assistant=-1) %}{% for message in messages %}"
            "{% if message['role'] == 'user' %}{% set at.user = loop.index0 %}"
            "{% elif message['role'] == 'assistant' %}{% set at.assistant = loop.index0 %}{% endif %}"
            "{% endfor %}"
        )
        marked += " and loop.index0 " + ("== at.assistant" if train_on == "last" else "> at.user")
    shown = ""
    if reasoning == "drop":
        shown = (
            "{% set content = message['content'] %}"
            "{% if message['role'] == 'assistant' and loop.index0 < at.user "
            "and content.startswith('<think>') and '</think>' in content %}"
            "{% set content = content.split('</think>', 1)[1].lstrip('\\n') %}{% endif %}"
        )
        content = "content"
    return (
        f"{before}{{% for message in messages %}}{{{{ '<|im_start|>' + message['role'] + '\\n' }}}}{shown}"
        f"{{% if {marked} %}}{{% generation %}}{{{{ {content} + '<|im_end|>' }}}}{{% endgeneration %}}"
        f"{{% else %}}{{{{ {content} + '<|im_end|>' }}}}{{% endif %}}{{{{ '\\n' }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


# What each template trains on, and what it does with reasoning.
CHAT_TEMPLATES = {chat_template(*choice): choice for choice in itertools.product(TRAIN_ON, REASONING)}


def train_tokenizer(texts: Iterator[str], vocab_size: int):
    """A byte-level BPE of vocab_size ids, the special ones first; GPT-2's splitting, digits apart."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(SPECIALS):
        raise InputError(
            f"vocab_size is {vocab_size}; a byte-level one needs at least {len(alphabet) + len(SPECIALS)}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return with_chatml(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def load_tokenizer(name: str | Path):
    """Any Hugging Face tokenizer, by directory or hub id, made ready for ChatML; or InputError."""
    from transformers import AutoTokenizer

    files = [Path(name) / file for file in ("tokenizer.json", "tokenizer.model", "vocab.json")]
    # Otherwise transformers silently builds an empty tokenizer.
    if Path(name).is_dir() and not any(file.exists() for file in files):
        raise InputError(f"{name} holds no tokenizer; expected a tokenizer.json, so copy one to it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
    except BaseException as error:  # tokenizers raises Exception itself, transformers many kinds
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Rust
            raise
        if "trust_remote_code" in str(error):
            raise InputError(
                f"the tokenizer in {name} asks to run code of its own, and that is never done; take one "
                f"that a tokenizer.json describes"
            ) from error
        raise InputError(
            f"no tokenizer could be loaded from {name}: {one_line(error)}; name a folder with a "
            f"tokenizer.json, or a hub id that can be reached"
        ) from error
    if not tokenizer.is_fast:
        raise InputError(
            f"{name} is a slow tokenizer; only those of the tokenizers library (tokenizer.json) are supported"
        )
    if vocabulary_size(tokenizer) > MOST_IDS:  # each id costs a row of the embedding
        raise InputError(
            f"the tokenizer in {name} has {len(tokenizer)} tokens with ids up to "
            f"{vocabulary_size(tokenizer) - 1}; expected ids below {MOST_IDS}"
        )
    return with_chatml(tokenizer)


def with_chatml(tokenizer):
    """Set a ChatML template, and add the special tokens that a tokenizer lacks; `new_ids` are their ids. One
    of our templates stays; `lost_template` is another one that it had. No text begins with a token of its own
    (BOS) any more, as none is trained on here.

    Raises InputError if an added token would get the id of another, as when a vocabulary leaves ids out.
    """
    from tokenizers import AddedToken, processors

    backend = tokenizer.backend_tokenizer
    if backend.num_special_tokens_to_add(False):
        backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    known = tokenizer.get_vocab()
    tokenizer.add_tokens(
        [AddedToken(t, special=True, normalized=False) for t in SPECIALS], special_tokens=True
    )
    ids = dict(zip(SPECIALS, tokenizer.convert_tokens_to_ids(list(SPECIALS))))
    taken = set(known.values())
    for token, id in ids.items():
        if token not in known and id in taken:
            raise InputError(
                f"the tokenizer leaves ids out, so that {token} would get {id}, which another token has; add "
                f"{', '.join(SPECIALS)} to it with ids of their own"
            )
    tokenizer.new_ids = [id for token, id in ids.items() if token not in known]
    tokenizer.eos_token = tokenizer.pad_token = END
    tokenizer.clean_up_tokenization_spaces = False  # Llama 3's has it: readers that obey it drop spaces
    given, tokenizer.lost_template = tokenizer.chat_template, None
    if not isinstance(given, str) or given not in CHAT_TEMPLATES:  # several by name make a dict
        tokenizer.lost_template, tokenizer.chat_template = given, chat_template()
    return tokenizer


def vocabulary_size(tokenizer) -> int:
    """The largest id + 1: more than len(tokenizer) if the vocabulary leaves ids out."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def encode(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, on all cores, with no special id: text that looks like a special token stays text."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer may have been saved with them
    backend.no_padding()
    backend.encode_special_tokens = True  # despite its name: encode the spellings of special tokens as text
    try:
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    finally:
        backend.encode_special_tokens = False
    # The unknown token is what text without a spelling becomes; in GPT-2's tokenizer it is <|endoftext|>.
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    special |= {*tokenizer.convert_tokens_to_ids(list(SPECIALS))}
    return [
        ids if special.isdisjoint(ids := encoding.ids) else spelled_out(tokenizer, ids, special)
        for encoding in encodings
    ]


def spelled_out(tokenizer, ids: Sequence[int], special: set[int]) -> list[int]:
    """Ids in which each special one is replaced by its characters, or their bytes.

    The tokenizer's model itself can give a special id, if its vocabulary has that text as a piece. Raises
    InputError if it has no pieces to spell the text otherwise.
    """
    vocab, result = tokenizer.get_vocab(), []
    # WordPiece marks all pieces of a word but the first.
    prefix = getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None) or ""
    for id in ids:
        if id not in special:
            result.append(id)
            continue
        token = tokenizer.convert_ids_to_tokens(id)
        pieces = []
        for piece in (token[0], *(prefix + c for c in token[1:])):
            pieces += [piece] if piece in vocab else [f"<0x{byte:02X}>" for byte in piece.encode()]
        spelling = [vocab.get(piece, id) for piece in pieces]
        if id in spelling or tokenizer.backend_tokenizer.decode(spelling, False) != token:
            raise InputError(
                f"the tokenizer turns the text {token!r} into its special id {id} and cannot spell it "
                f"otherwise; take another tokenizer"
            )
        result += spelling
    return result


def after_special(tokenizer, special: str, text: str) -> list[int]:
    """Ids of a template's own text behind one of its special tokens. Some tokenizers put a space before a
    text, but none there."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer may have been saved with them
    backend.no_padding()
    backend.encode_special_tokens = False
    return backend.encode(special + text, add_special_tokens=False).ids[1:]


def encode_after_newline(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts that follow a newline.

    Some tokenizers, as Llama 2's, begin every text with a space. Encode after a newline, then drop it, so no
    text gains a leading space.
    """
    newline, alone, after = encode(tokenizer, ["\n", "a", "\na"])
    if after == newline + alone or after[: len(newline)] != newline:
        return encode(tokenizer, texts)
    encoded = encode(tokenizer, ["\n" + text for text in texts])
    for i, (text, ids) in enumerate(zip(texts, encoded)):
        # A text that begins with a newline may merge with the one before it; then a letter takes its place.
        merged = ids[: len(newline)] != newline
        encoded[i] = encode_after_letter(tokenizer, text) if merged else ids[len(newline) :]
    return encoded


def encode_after_letter(tokenizer, text: str) -> list[int]:
    """Ids of a text that follows a letter with which it does not merge."""
    for letter in string.ascii_letters:
        alone, both = encode(tokenizer, [letter, letter + text])
        if both[: len(alone)] == alone:
            return both[len(alone) :]
    return encode(tokenizer, [text])[0]  # with the tokenizer's own space before it


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of all that decides how text becomes ids; equal for a tokenizer and its saved copy."""
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {name: fields[name] for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()[:16]
