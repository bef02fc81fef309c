"""Fixtures shared by the tests: tiny models saved once, a single torch thread; and what the mark `slow` promises."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on the trained model are slow. Files with slow tests come first, so that two workers end at the same time."""
    for item in items:
        if "demo_base" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


in_fast_test = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    global in_fast_test
    in_fast_test = item.get_closest_marker("slow") is None
    try:
        return (yield)
    finally:
        in_fast_test = False


def refuse_python(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: a test without the mark `slow` fails if it starts a Python process, other than a grading worker."""
    if in_fast_test and event == "subprocess.Popen" and sys.executable in map(str, arguments[1]):
        assert "nanolapo.grader.worker" in arguments[1], "this test starts Python: mark it @pytest.mark.slow"


sys.addaudithook(refuse_python)


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
    """The demo's own base, pre-trained for half a minute: many of its answers to problems of level 0 are right. Read only.
    The first worker that needs it makes it, for all."""
    from small_base import make_small_base

    from nanolapo.locks import make_once

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the one folder of all workers
    make_once(folder / "demo_base", lambda: make_small_base(folder / "demo_base"))
    return folder / "demo_base"
