"""sft.py against TRL: what is trained on, on the same conversations, through its own trainer."""

import pytest
import torch
from conftest import conversation, small_model
from transformers import AutoTokenizer

from common import IGNORE
from sft import render_chatml

trl = pytest.importorskip("trl")


def turns(*contents: str, roles: str = "ua") -> list[dict]:
    """Contents in turn from the user and the assistant, or as other initials say."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[role], "content": text} for role, text in zip(roles * len(contents), contents)]


CONVERSATIONS = [
    *(conversation(i, turns=1 + i % 4)["messages"] for i in range(40)),
    turns("be short", "the river", "a stone", "and then?", "the bridge", roles="suaua"),
    turns("Grüße, 世界 🌉?", "Ça va — naïve café, 😀👩‍👩‍👧!", "שלום", "नमस्ते\u00a0\u200bé"),
    turns(" two  spaces\n\n", "\n a line,\n\n\tand a tab \n", "12 + 34?", "46\r\n"),
    turns("an answer of nothing", "", "and again", "something"),
    turns("one answer", "and at once another", roles="a"),
    turns("an answer", "a question that is left open", roles="au"),
]


def test_ids_and_supervised_positions_equal_those_of_trl_with_assistant_only_loss(tokenizer, tmp_path):
    from datasets import Dataset

    small_model(max_position_embeddings=512).save_pretrained(tmp_path / "model", tokenizer)
    options = {"max_length": None, "assistant_only_loss": True, "use_cpu": True, "bf16": False}
    trainer = trl.SFTTrainer(
        model=str(tmp_path / "model"),
        args=trl.SFTConfig(output_dir=str(tmp_path / "out"), report_to="none", **options),
        train_dataset=Dataset.from_list([{"messages": m} for m in CONVERSATIONS]),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    assert len(trainer.train_dataset) == len(CONVERSATIONS)
    for row, messages in zip(trainer.train_dataset, CONVERSATIONS):
        ids, labels = render_chatml(messages, tokenizer)
        assert row["input_ids"] == ids
        batch = trainer.data_collator([row])  # what its model is given
        assert batch["labels"][0].tolist() == labels and IGNORE == -100
        assert torch.equal(batch["input_ids"][0], torch.tensor(ids))
