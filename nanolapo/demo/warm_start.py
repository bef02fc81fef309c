"""Trains a pretrained chat model for some supervised steps on written solutions of the demo's problems.

RL can only sharpen what a model sometimes gets right, and the 135 M chat model of configs/smollm2-135m solves almost none
of these problems. After these steps it solves most of them, in the three manners of pretrain.py. So stage 1 has a starting
point with a real tokenizer, a real chat template and tied embeddings.

    python -m nanolapo.demo.warm_start configs/smollm2-135m/base.yaml warm_start.model=FOLDER
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import nn

from nanolapo import cli
from nanolapo.config import Config, UserError
from nanolapo.data.demo_task import LEVELS, random_sums
from nanolapo.data.prompts import Prompter
from nanolapo.demo.pretrain import MANNERS, MIXTURES, learning_rate_factor, make_batches, write_solution
from nanolapo.locks import make_once
from nanolapo.model.folder import load_model, load_tokenizer, save_model
from nanolapo.preflight import before_writing


def draw_example(rng: random.Random, config: Config) -> tuple[str, str]:
    """A question of the first data source's levels, and a solution without special tokens in a manner of demo.mixture."""
    sums = random_sums(rng, rng.choice(config.data.sources[0].levels or LEVELS))
    text = write_solution(sums, rng.choices(MANNERS, MIXTURES[config.demo.mixture][sums.level() > 0])[0])
    return sums.question(), text.replace(" </think> ", " The answer is ").removesuffix(" <end>").strip()


def warm_start(config: Config) -> None:
    """Train warm_start.model on written solutions and save it to model.path, a Hugging Face folder."""
    w = config.warm_start
    if not w.model:
        raise UserError("warm_start.model is empty: give a pretrained chat model, a local folder or a hub name")
    if not config.model.path or not config.data.sources:
        raise UserError("a warm start needs model.path (where to write) and a data source")
    torch.manual_seed(config.run.seed)
    rng = random.Random(f"warm start {config.run.seed}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, config.model.dtype)
    key = "warm_start.model"
    tokenizer, model = load_tokenizer(w.model, key), load_model(w.model, device, key)
    print(*before_writing(key, model, dtype, tokenizer).lines(), sep="\n", flush=True)
    prompter = Prompter(tokenizer, config.prompt)
    optimizer = torch.optim.AdamW(model.parameters(), lr=w.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    batches: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step in range(w.steps):
        if not batches:
            drawn = [draw_example(rng, config) for _ in range(128)]
            solutions = tokenizer([text for _, text in drawn], add_special_tokens=False)["input_ids"]
            rows = [(prompter.ids(question), [*ids, tokenizer.eos_token_id])
                    for (question, _), ids in zip(drawn, solutions, strict=True)]  # fmt: skip
            batches = make_batches(rows, 0, w.batch_tokens, rng)
        ids_BT, targets_BT = (tensor.to(device) for tensor in batches.pop())
        optimizer.param_groups[0]["lr"] = w.learning_rate * learning_rate_factor(step, w.steps, warmup=5)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            hidden_BTH = model.get_decoder()(input_ids=ids_BT, use_cache=False).last_hidden_state
            wanted_BT = targets_BT >= 0
            logits = model.get_output_embeddings()(hidden_BTH[wanted_BT])
        loss = nn.functional.cross_entropy(logits.float(), targets_BT[wanted_BT])
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"warm start step {step + 1}/{w.steps} | loss {loss.item():.3f}", flush=True)
    save_model(model, dtype, tokenizer, Path(config.model.path))


def main() -> None:
    config, action = cli.parse(__doc__ or "")
    if action == "dry-run":
        print(config.warm_start)
    else:
        torch.set_num_threads(config.run.threads or torch.get_num_threads())
        make_once(Path(config.model.path), lambda: warm_start(config))


if __name__ == "__main__":
    cli.run(main, keeps_progress=False)
