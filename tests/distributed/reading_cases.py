"""What the ranks of a run read by themselves, and what they do where it differs. Part of step_cases.py.

Every rank works in a folder of its own, so that one relative path leads to other files on each, as on nodes that have no
disk in common.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
from tiny import make_config
from transformers import AutoModelForCausalLM

from nanolapo.config import RunStopped, SourceConfig, UserError
from nanolapo.data.load import gradable_problems
from nanolapo.data.problems import load_problems
from nanolapo.demo.pretrain import TEMPLATE, make_tokenizer
from nanolapo.grader import Grader
from nanolapo.lengths import LengthMap
from nanolapo.methods.base import Method
from nanolapo.methods.lapo import Internalization
from nanolapo.ranks import Ranks
from nanolapo.session import open_session

SOURCE = {"name": "demo", "path": "demo", "count": 4, "seed": 1}


def what_all_get(call: Callable[[], Any]) -> str:
    """The error in which this rank's call ends."""
    try:
        call()
    except (UserError, RunStopped) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main_rank_decides(out: Path, ranks: Ranks) -> dict[str, Any]:
    """Problems as the ranks see them. Reference answers need algebra; the last rank's grader is too slow for any, and its
    file has lost half of its rows."""
    is_last = ranks.index == ranks.count - 1
    rows = [{"problem": f"question {i}", "answer": rf"\sqrt{{2}}+{i}"} for i in range(4)]
    rows[1]["answer"] = r"\frac{1}{2"
    path = out / f"rank{ranks.index}of{ranks.count}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows[: 2 if ranks.index else 4])), encoding="utf-8")
    config = make_config(data={"sources": [{"name": "d", "path": str(path)}]})
    missing = make_config(data={"sources": [{"name": "d", "path": str(out / "nothing.jsonl")}]})
    with Grader(workers=1, deadline_s=1e-5 if is_last else 20.0) as grader:
        problems, report = gradable_problems(config, grader, ranks)
        refused = what_all_get(lambda: gradable_problems(missing if ranks.is_main else config, grader, ranks))
    return {"kept": [problem.question for problem in problems], "report": report, "refused": refused}


def what_ranks_read(model: str, out: Path, ranks: Ranks) -> dict[str, str]:
    """In what a run ends at its start if the last rank has another override, weight, template or map, or no model."""
    is_last = ranks.index == ranks.count - 1
    nodes = [out / f"node{rank}of{ranks.count}" for rank in range(ranks.count)]
    if ranks.is_main:  # in a process group transformers writes models on the main rank only
        for node in nodes:
            node.mkdir()
            write_files(model, node, node is nodes[-1])
    ranks.wait()

    def start(method: type[Method] = Method, path: str = "usual", **sections: dict[str, Any]) -> str:
        config = make_config(
            path, run={"dir": str(out / f"runs{ranks.count}"), "name": "reads", "threads": 1},
            data={"sources": [SOURCE]}, rollout={"prompts_per_step": 6, "max_prompt_tokens": 128},
            **({"prompt": {"template": TEMPLATE}} | sections),
        )  # fmt: skip

        def opened() -> None:
            with open_session(config, method(config)):
                pass

        return what_all_get(opened)

    with chdir(nodes[ranks.index]):
        return {
            "same": start(Internalization, lapo={"length_map": "usual.json"}),
            "override": start(train={"microbatch_tokens": 512 if is_last else 1024}),
            "weight": start(path="weight"),
            "template": start(path="template", prompt={"style": "chat"}),
            "map": start(Internalization, lapo={"length_map": "map.json"}),
            "torn": start(path="torn"),
        }


def write_files(model: str, node: Path, is_last: bool) -> None:
    """Four model folders and two length maps. On the last rank the folder "weight" has another number, "template" another
    chat template, "torn" no whole weights, and "map.json" another length."""
    problems, _ = load_problems([SourceConfig(**SOURCE)])  # type: ignore[arg-type]
    for name, differs in (("usual", False), ("map", is_last)):
        lengths = LengthMap()
        for problem in problems:
            lengths.update_discovery(problem.id, [9, 9 + 4 * differs])
        lengths.save(node / f"{name}.json")
    for name in ("usual", "weight", "template", "torn"):
        plain, tokenizer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), make_tokenizer()
        plain.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        torch.nn.init.normal_(plain.get_input_embeddings().weight, generator=torch.Generator().manual_seed(0))
        if name == "weight" and is_last:
            next(plain.parameters()).data[3, 5] += 0.25
        if name == "template":
            tokenizer.chat_template = ("Asked" if is_last else "Question") + ": {{ messages[0]['content'] }} <think>"
        plain.save_pretrained(node / name)
        tokenizer.save_pretrained(node / name)
        if name == "torn" and is_last:
            os.truncate(node / name / "model.safetensors", 999)
