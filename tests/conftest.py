"""Fixtures shared by the tests: tiny models saved once, and a single torch thread."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 folder whose head shares the embedding's storage."""
    from tiny import tiny_qwen

    folder = tmp_path_factory.mktemp("tied")
    tiny_qwen().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama folder with a head of its own."""
    from tiny import tiny_llama

    folder = tmp_path_factory.mktemp("untied")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's own base, pre-trained for a minute's fraction: it answers, and every tenth time by chance rightly. Read
    only."""
    from nanolapo.demo.pretrain import DemoConfig, pretrain

    folder = tmp_path_factory.mktemp("demo") / "base"
    settings = DemoConfig(steps=150, hidden_size=64, layers=2, batch_tokens=1600, guided=0.3, easy_fraction=1.0)
    pretrain(str(folder), settings, seed=0)
    return folder
