"""Pre-trains the small over-thinking reasoner that the CPU demo starts from (about 0.6 M parameters, minutes on a CPU).

The model learns from written solutions of demo_task problems. The length of a solution is decided first: a budget of tokens
per operation is drawn, and every step is written in the way that best fits the rest of the budget:

    pace  4   merged       " B: 3 + 8 * 7 = 7."           two operations at once; at this size mostly wrong: a guess
    pace  7   plain        " A: 3 + 8 = 1."               one operation, reliable
    pace 11   careful      " A: 3 + 8 = 11, so 1."        no better than plain, only longer
    pace 15+  checked      plain or careful, then " Wait, let me check: 3 + 8 = 1.", " Alternatively, 8 + 3 = 1.", ...

Most solutions without guidance are much longer than the problem needs: this is the over-thinking to be unlearned. Half of
the solutions open with the paper's sentence, " I will answer the question with 60 tokens.", and keep to it. So the model
knows what the sentence means, as a large pretrained model does. Every multiple of ten is one token.
With --all-sentences it also reads, in about a fifth of the prompts, the sentences of the paper's ablations and of rival
methods; `make compare` and `make reproduce` start from that model.

    python -m nanolapo.demo.pretrain configs/demo/base.yaml [run.seed=1] [--all-sentences]    # writes config.model.path

Seed and number of steps are fixed, so the same machine and thread count give the same weights, bit for bit.
"""

from __future__ import annotations

import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nanolapo import cli
from nanolapo.data import prompts as sentences
from nanolapo.data.demo_task import LABELS, LEVELS, Chain, random_chain
from nanolapo.data.prompts import NO_GUIDANCE, Guidance
from nanolapo.locks import make_once
from nanolapo.model.folder import save_model

TEMPLATE = "{question} <think>"  # prompt.template of the demo configs
BUDGETS = range(10, 401, 10)  # one token each
# The word a thought begins with, by tokens per operation (exclusive upper end).
MANNERS = (("Quick", 5.5), ("Short", 9.0), ("Steady", 13.0), ("Careful", 20.0), ("Thorough", float("inf")))
SLIPS = 0.08  # of the checked steps begin with a slip that the check corrects
ANSWER_TOKENS = 5  # "</think> \boxed{d} <end>"


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the pre-training; the defaults are the demo's."""

    steps: int = 2800
    batch_tokens: int = 1600  # of solutions, padding included
    hidden_size: int = 128
    layers: int = 3
    muon_lr: float = 0.01  # matrices
    adam_lr: float = 3e-3  # embedding, norms, biases
    guided: float = 0.5  # fraction of prompts that state a length in the paper's sentence
    guided_otherwise: float = 0.0  # ... in one of the others; above 0 it is another tokenizer, see make_tokenizer
    easy_fraction: float = 0.4  # first part of the training, with short solutions only
    max_new_tokens: int = 256  # longer solutions are not used


ALL_SENTENCES = DemoConfig(steps=3000, guided=0.33, guided_otherwise=0.22)

# ------------------------------------------------------------------------------------------------------- tokenizer


def make_tokenizer(all_sentences: bool = False) -> PreTrainedTokenizerFast:
    """Words with their leading space, digits, step labels, budgets; any other ASCII text falls apart into characters.

    A budget is one token with the "with" before it; with `all_sentences` a separate token, after any of their words.

    >>> tokenizer = make_tokenizer()
    >>> tokenizer.tokenize("B: times 7. Last digit? <think> I will answer the question with 60 tokens. Wait,")[5:]
    [' digit', '?', ' <think>', ' I', ' will', ' answer', ' the', ' question', ' with 60', ' tokens', '.', ' Wait', ',']
    >>> tokenizer.decode(tokenizer("Anything: x^2 + 17 \\\\boxed{7}<end>")["input_ids"])
    'Anything: x^2 + 17 \\\\boxed{7}<end>'
    """
    words = (
        "Start with add times Last digit I will answer the question tokens so Wait let me check Alternatively verify"
    )
    words += " Quick Short Steady Careful Thorough Let think Think for maximum"
    if all_sentences:
        words += " within to The output of assistant should be IMPORTANT You use exactly in your response"
    pieces = ["<pad>", " <end>", " <think>", "</think>", " </think>", r" \boxed{", "}"]
    pieces += [f"{space}{label}:" for label in LABELS for space in ("", " ")]
    pieces += [] if all_sentences else [f" with {n}" for n in BUDGETS]
    pieces += [f" {digit}" for digit in range(10)] + [" +", " *", " ="]
    pieces += [f"{space}{word}" for word in words.split() for space in ("", " ")]
    pieces += [chr(code) for code in range(32, 127)] + ["\n"]
    longest_first = sorted((piece for piece in dict.fromkeys(pieces) if len(piece) > 1), key=len, reverse=True)
    # A word must not match inside a longer one (" so" in " some"), nor " with 10" in " with 105".
    pattern = "|".join(re.escape(p) + (r"(?!\w)" if p[-1].isalpha() or "with " in p else "") for p in longest_first)
    if all_sentences:  # a sum's result is no budget
        numbers = [f" {n}" for n in reversed(BUDGETS)]
        pieces += numbers
        pattern = rf"(?<=with|within|for|maximum|exactly|to)(?:{'|'.join(numbers)})(?!\d)|{pattern}"
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(f"{pattern}|[\\s\\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token=" <end>")


# ---------------------------------------------------------------------------------------------- written solutions


def step_kinds(chain: Chain, digits: list[int], i: int, rng: random.Random) -> list[tuple[str, int]]:
    """The ways to write the next step(s) after operation i-1: (text, number of operations done)."""
    before, after, (sign, n) = digits[i], digits[i + 1], chain.operations[i]
    full = before + n if sign == "+" else before * n
    plain = f" {LABELS[i]}: {before} {sign} {n} = {after}."
    careful = f" {LABELS[i]}: {before} {sign} {n} = {full}, so {after}."
    checks = [
        f" Wait, let me check: {before} {sign} {n} = {after}.",
        f" Alternatively, {n} {sign} {before} = {after}.",
        f" Let me verify: {before} {sign} {n} = {full}, so {after}.",
    ]
    rng.shuffle(checks)
    first = rng.choice((plain, careful))
    if rng.random() < SLIPS:  # the wrong operand was read, and the check that follows finds it: some checks pay
        slip = rng.choice([x for x in range(1, 10) if x != n])
        first = f" {LABELS[i]}: {before} {sign} {slip} = {(before + slip if sign == '+' else before * slip) % 10}."
    kinds = [(plain, 1), (careful, 1), (first + checks[0], 1), (first + checks[0] + checks[1], 1)]
    if i + 2 <= len(chain.operations):
        next_sign, next_n = chain.operations[i + 1]
        kinds.append((f" {LABELS[i + 1]}: {before} {sign} {n} {next_sign} {next_n} = {digits[i + 2]}.", 2))
    return kinds


def count_tokens(text: str) -> int:
    """Tokens of a step: words, digits, labels and punctuation marks (a label and its colon are one).

    >>> count_tokens(" A: 3 + 8 = 11, so 1.")
    11
    """
    return len(re.findall(r"[A-J]:|[a-zA-Z]+|\d|[^\s\w]", text))


def write_solution(chain: Chain, budget: float, rng: random.Random) -> str:
    """A right solution of about `budget` tokens: each step takes the kind nearest to the budget left per operation.

    The first word tells the manner, so that it is one decision, made where the guidance stands.
    """
    digits, i, left = chain.digits(), 0, budget - ANSWER_TOKENS - 2
    text = f" {next(word for word, most in MANNERS if left / len(chain.operations) < most)}."
    while i < len(chain.operations):
        pace = left / (len(chain.operations) - i)
        kinds = step_kinds(chain, digits, i, rng)
        chosen, done = min(kinds, key=lambda kind: abs(count_tokens(kind[0]) / kind[1] - pace))
        text, i, left = text + chosen, i + done, left - count_tokens(chosen)
    return text + rf" </think> \boxed{{{digits[-1]}}} <end>"


def state_length(length: int, rng: random.Random, papers: bool) -> Guidance:
    """A sentence that is true of a solution of `length` tokens: the paper's, or one of the others."""
    near = max(1, round(length / 10)) * 10
    if papers:
        return sentences.exact_guidance(near)
    limit = -(-length // 10) * 10 + rng.choice((0, 10, 20, 40, 80))  # an upper limit need not be used up
    about, limited = sentences.range_guidance(max(10, near - 10), near + 10, near), sentences.l1_max_guidance(limit)
    return rng.choice((sentences.outside_guidance(near), sentences.curriculum_guidance(near), about, limited,
                       sentences.thinkprune_guidance(limit), sentences.hbpo_guidance(limit)))  # fmt: skip


def draw_example(rng: random.Random, settings: DemoConfig, easy: bool) -> tuple[str, str]:
    """One (prompt, solution) for pre-training. The budget comes first, the solution is written to fit it."""
    chain = random_chain(rng, rng.choice(LEVELS + LEVELS[-2:]))  # long chains are learnt last
    kind = rng.random()
    guided = kind < settings.guided + settings.guided_otherwise
    if easy:
        pace = rng.choice((4.5, 4.5, 7, 7, 11))
    elif guided:
        pace = rng.choice((4.5, 4.5, 7, 7, 11, *[rng.uniform(9, 32) for _ in range(5)]))
    else:
        pace = rng.choices((4.5, 7, rng.uniform(15, 34)), (0.07, 0.33, 0.60))[0]
    budget = min(ANSWER_TOKENS + 2 + pace * len(chain.operations), settings.max_new_tokens - 20)
    solution = write_solution(chain, budget, rng)
    length = count_tokens(solution.partition("</think>")[0]) + ANSWER_TOKENS
    guidance = state_length(length, rng, papers=kind < settings.guided) if guided else NO_GUIDANCE
    return TEMPLATE.replace("{question}", chain.question() + guidance.outside) + guidance.inside, solution


# ------------------------------------------------------------------------------------------------------ pre-training


def draw_batches(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, settings: DemoConfig, easy: bool
) -> list[tuple[Tensor, Tensor]]:
    """A few batches of about `batch_tokens` padded tokens, see make_batches."""
    pairs = [draw_example(rng, settings, easy) for _ in range(256)]
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    solutions = tokenizer([solution for _, solution in pairs])["input_ids"]
    rows = list(zip(prompts, solutions, strict=True))
    return make_batches(rows, tokenizer.pad_token_id, settings.batch_tokens, rng)


def make_batches(
    rows: list[tuple[list[int], list[int]]], pad_id: int, batch_tokens: int, rng: random.Random
) -> list[tuple[Tensor, Tensor]]:
    """(prompt ids, solution ids) -> batches (ids [B, T], targets [B, T]) of rows of like length, in random order.

    Targets are -100 on the prompt and on padding; padding is on the right, where causal attention does not look.
    """
    rows = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    groups: list[list[tuple[list[int], list[int]]]] = [[]]
    for prompt, solution in rows:
        if (len(groups[-1]) + 1) * (len(prompt) + len(solution)) > batch_tokens:
            groups.append([])
        groups[-1].append((prompt, solution))
    rng.shuffle(groups)
    batches = []
    for group in filter(None, groups):
        width = max(len(prompt) + len(solution) for prompt, solution in group)
        ids = torch.full((len(group), width), pad_id, dtype=torch.long)
        targets = torch.full_like(ids, -100)
        for row, (prompt, solution) in enumerate(group):
            start, end = len(prompt), len(prompt) + len(solution)
            ids[row, :end] = torch.tensor(prompt + solution)
            targets[row, start - 1 : end - 1] = ids[row, start:end]  # position t predicts token t + 1
        batches.append((ids, targets))
    return batches


def learning_rate_factor(step: int, steps: int, warmup: int = 50) -> float:
    """Linear warm-up, then constant, linear to zero over the last 40 percent."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (0.4 * steps))


def make_model(tokenizer: PreTrainedTokenizerFast, settings: DemoConfig) -> LlamaForCausalLM:
    # Llama, not Qwen2: transformers always replaces the tokenizer of a qwen2 folder by Qwen2's.
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=settings.hidden_size, intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def pretrain(out_dir: str, settings: DemoConfig, seed: int) -> None:
    """Train from scratch and write a Hugging Face folder (model and tokenizer) to `out_dir`."""
    torch.manual_seed(seed)
    rng = random.Random(f"demo pre-training {seed}")
    tokenizer = make_tokenizer(settings.guided_otherwise > 0)
    model = make_model(tokenizer, settings)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    # Muon learns these matrices several times faster than Adam here; it is not meant for embeddings and vectors.
    muon = torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=0.0)
    adam = torch.optim.AdamW(others, lr=settings.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    print(f"pre-training {sum(p.numel() for p in model.parameters()):,} parameters, {settings.steps} steps")
    started, batches, average, tokens = time.monotonic(), list[tuple[Tensor, Tensor]](), 0.0, 0
    for step in range(settings.steps):
        if not batches:
            batches = draw_batches(tokenizer, rng, settings, easy=step < settings.easy_fraction * settings.steps)
        ids_BT, targets_BT = batches.pop()
        for optimizer, rate in ((muon, settings.muon_lr), (adam, settings.adam_lr)):
            optimizer.param_groups[0]["lr"] = rate * learning_rate_factor(step, settings.steps)
            optimizer.zero_grad()
        hidden_BTH = model.model(ids_BT).last_hidden_state
        wanted_BT = targets_BT >= 0  # only these positions need logits
        losses = torch.nn.functional.cross_entropy(
            model.lm_head(hidden_BTH[wanted_BT]), targets_BT[wanted_BT], reduction="none"
        )
        # The manner is one token among a hundred, and the only one that must look at the guidance: count it ten times.
        first_BT = wanted_BT & ~torch.nn.functional.pad(wanted_BT, (1, 0))[:, :-1]
        loss = (losses * (1 + 9 * first_BT[wanted_BT])).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        muon.step()
        adam.step()
        average, tokens = average + (loss.item() - average) / min(step + 1, 50), tokens + ids_BT.numel()
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - started
            left = seconds / (step + 1) * (settings.steps - step - 1)
            speed = f"{tokens / seconds:,.0f} tokens/s"
            print(f"  step {step + 1}/{settings.steps}  loss {average:.3f}  {speed}  {left:.0f} s left", flush=True)
    save_model(model, torch.float32, tokenizer, Path(out_dir))


def main() -> None:
    settings = DemoConfig()
    if "--all-sentences" in sys.argv:
        sys.argv.remove("--all-sentences")
        settings = ALL_SENTENCES
    config, action = cli.parse(__doc__ or "")
    if action == "dry-run":
        print(settings)
    else:
        torch.set_num_threads(config.run.threads or torch.get_num_threads())
        make_once(Path(config.model.path), lambda: pretrain(config.model.path, settings, config.run.seed))


if __name__ == "__main__":
    cli.run(main, keeps_progress=False)
