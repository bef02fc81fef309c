"""run.export_every: models of the way, whole, once, and none missing after a crash at the worst moment.

Run: python -m pytest tests/test_exports.py        Bit-equal after a real kill -9: test_scripts.py; on ranks: distributed/.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import make_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanolapo import loop
from nanolapo.config import Config, UserError
from nanolapo.config_file import validate
from nanolapo.demo.pretrain import DemoConfig, make_model, make_tokenizer
from nanolapo.methods.base import Method
from nanolapo.model import folder
from nanolapo.model.folder import save_model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    torch.manual_seed(0)
    save_model(
        make_model(make_tokenizer(), DemoConfig(hidden_size=32, layers=1)), torch.float32, make_tokenizer(), folder
    )
    return folder


def run(base: Path, folder: Path, every: int, steps: int = 5) -> Config:
    """Train an untrained model for a few steps; it solves nothing, so its weights stay as they are."""
    config = make_config(
        base,
        run={"dir": str(folder), "name": "r", "checkpoint_every": 2, "export_every": every, "print_every": 0},
        data={"sources": [{"name": "demo", "path": "demo", "count": 4, "levels": [1]}]},
        prompt={"template": "{question} <think>"},
        rollout={"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 6, "engine": "torch"},
        train={"steps": steps},
    )
    loop.train(config, Method(config))
    return config


def names(config: Config) -> list[str]:
    return sorted(path.name for path in (config.run_dir / "models").iterdir())


def test_a_model_at_every_multiple(base, tmp_path):
    config = run(base, tmp_path, every=2)
    assert names(config) == ["step-000002", "step-000004"] and (config.run_dir / "model").is_dir()
    for name in names(config):
        folder = config.run_dir / "models" / name
        weights = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
        first = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
        assert weights.keys() == first.keys() and all(torch.equal(weights[k], first[k]) for k in first)
        assert len(AutoTokenizer.from_pretrained(folder)) == len(make_tokenizer())


def test_none_by_default(base, tmp_path):
    config = run(base, tmp_path, every=0, steps=1)
    assert not (config.run_dir / "models").exists()
    with pytest.raises(UserError, match="run.export_every=-1 must not be negative"):
        validate(replace(config, run=replace(config.run, export_every=-1)))


def test_a_crash_in_an_export_leaves_no_gap(base, tmp_path, monkeypatch):
    """Steps 2 and 4 are also checkpoints. Had the checkpoint come first, the resumed run would pass the export by."""
    written = []

    def breaks_once(*arguments):
        written.append(arguments[3].name)
        if written == ["step-000002", "step-000004"]:
            arguments[3].with_name("step-000004.tmp").mkdir()  # what a kill leaves
            raise KeyboardInterrupt
        save_model(*arguments)

    monkeypatch.setattr(loop, "save_model", breaks_once)
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path, every=2)
    config = run(base, tmp_path, every=2)
    assert names(config) == ["step-000002", "step-000004"]
    assert written == ["step-000002", "step-000004", "step-000004", "model"]
    again = run(base, tmp_path, every=2)  # a finished run writes its final model again, and nothing else
    assert written[4:] == ["model"] and names(again) == names(config)


def test_a_kill_while_an_older_model_is_removed_leaves_a_whole_one(tmp_path, monkeypatch):
    """A finished run that is started again writes its model again, and a second stage may be reading it."""

    def killed(folder, ignore_errors=False):
        if folder.exists():
            next(iter(folder.iterdir())).unlink()
            raise KeyboardInterrupt

    for name in ("model", "model.tmp"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "model.safetensors"):
            (tmp_path / name / file).write_text(name)
    monkeypatch.setattr(folder.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.publish(tmp_path / "model.tmp", tmp_path / "model")
    there = {path.name: path.read_text() for path in (tmp_path / "model").iterdir()}
    assert there == {"config.json": "model.tmp", "model.safetensors": "model.tmp"}


def test_what_cannot_be_removed_is_named_and_the_model_stays_whole(base, tmp_path):
    """Here it is a file where a killed process leaves a folder; root could remove whatever is only protected."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), make_tokenizer()
    save_model(model, torch.float32, tokenizer, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    (tmp_path / "model.old.tmp").touch()
    with pytest.raises(UserError, match="/model: could not be written .*/model.old.tmp'"):
        save_model(model, torch.float32, tokenizer, tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    (tmp_path / "model.old.tmp").unlink()
    save_model(model, torch.float32, tokenizer, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_longer_run_that_is_killed_before_its_last_export_does_not_keep_the_shorter_runs_model(
    base, tmp_path, monkeypatch
):
    """A folder of that name is no proof that the final model was written: after 2 steps it was, after 4 it was not."""

    def killed(model, dtype, tokenizer, folder, is_main):
        raise KeyboardInterrupt

    config = run(base, tmp_path, every=0, steps=2)
    (config.run_dir / "model/of the shorter run").touch()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "save_model", killed)
        run(base, tmp_path, every=0, steps=4)
    assert (config.run_dir / "model/of the shorter run").exists()
    run(base, tmp_path, every=0, steps=4)
    assert not (config.run_dir / "model/of the shorter run").exists()
