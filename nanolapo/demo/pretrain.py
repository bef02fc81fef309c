"""Pre-trains the small reasoner that the CPU demo starts from (about 0.6 M parameters, minutes on a CPU).

The model learns from written solutions of demo_task problems, in three manners. The first word of a thought names the
manner.

    Quick      42 tokens   " A: 3+2=6 4+8=3 7+5=2."                            from the left: every carry must be foreseen
    Careful    78 tokens   " A: 7+5+0=12 carry 1 4+8+1=13 carry 1 ... 632."    from the right: reliable
    Thorough  216 tokens   Careful, and twice more (" Wait: ..." and " Check: ...")  no better than Careful, only longer

Quick is right where nothing carries and often wrong at a carry: before it writes the first digit of a result it has to
look at all six digits. Reinforcement learning on a few hundred problems does not teach that.

demo.mixture says how often each manner is used in solutions without guidance, on sums whose digits are all small (level
0) and on the others. `typical` is the demo's: where Quick is safe it is the most frequent manner, elsewhere Careful is.
In `too-long` most solutions are Thorough. In four prompts of ten a length is stated first, in the paper's sentence or
in a rival's, and the manner follows from it. So the model knows what the sentence means, as a large pretrained model
does.

    python -m nanolapo.demo.pretrain configs/demo/base.yaml [run.seed=1]    # writes config.model.path

The number of steps does not depend on the clock. So the same seed, machine and thread count give the same weights, bit
for bit.
"""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nanolapo import cli
from nanolapo.config import DemoConfig
from nanolapo.data import prompts as sentences
from nanolapo.data.demo_task import LABELS, LEVELS, Sums, random_sums
from nanolapo.data.prompts import NO_GUIDANCE, Guidance
from nanolapo.demo.muon import Muon
from nanolapo.locks import make_once
from nanolapo.model.folder import load_model, load_tokenizer, save_model
from nanolapo.preflight import before_writing

TEMPLATE = "{question} <think>"  # prompt.template of the demo configs
BUDGETS = range(10, 401, 10)  # one token each
MANNERS = ("Quick", "Careful", "Thorough")
# Shares of the manners in solutions without guidance: at level 0, and at the others
MIXTURES = {"typical": ((0.55, 0.25, 0.20), (0.15, 0.55, 0.30)), "too-long": ((0.20, 0.20, 0.60), (0.10, 0.30, 0.60))}
GUIDED = 0.4  # share of the prompts that state a length
EASY = 0.35  # first part of the training, without Thorough; after 0.5 two bases of six had not learnt it at the end
MUON_LR, ADAM_LR = 0.01, 3e-3  # of matrices; of embedding, norms, biases
START_LR = 0.1  # factor for a base that goes on: it changes its manner and keeps what it can

# ------------------------------------------------------------------------------------------------------- tokenizer


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token: a word, a label, a digit with the plus after it (" 7+"), a result ("=12"), a stated length (" 60").

    Any other ASCII text falls apart into characters.

    >>> tokenizer = make_tokenizer()
    >>> tokenizer.tokenize("A: add 016. <think> I will answer the question with 60 tokens. Careful. A: 7+5=12 carry 1")[12:]
    [' with', ' 60', ' tokens', '.', ' Careful', '.', ' A:', ' 7+', '5', '=12', ' carry', ' 1']
    >>> tokenizer.decode(tokenizer("Anything: x^2 + 17 \\\\boxed{7}<end>")["input_ids"])
    'Anything: x^2 + 17 \\\\boxed{7}<end>'
    """
    words = "Start at add Last digits I will answer the question with tokens carry Wait: Check: Quick Careful Thorough"
    words += " Let think Think for maximum within to The output of assistant should be IMPORTANT"
    words += " You use exactly in your response"
    pieces = ["<pad>", " <end>", " <think>", "</think>", " </think>", r" \boxed{", "}"]
    pieces += [f"{space}{label}:" for label in LABELS for space in ("", " ")]
    pieces += [f" {digit}{plus}" for digit in range(10) for plus in ("", "+")]
    pieces += ["+0", "+1", *(f"={n}" for n in range(20))]
    pieces += [f"{space}{word}" for word in words.split() for space in ("", " ")]
    pieces += [chr(code) for code in range(32, 127)] + ["\n"]
    budgets = [f" {n}" for n in reversed(BUDGETS)]
    longest_first = sorted((piece for piece in dict.fromkeys(pieces) if len(piece) > 1), key=len, reverse=True)
    # A word must not match inside a longer one (" at" in " attempt"), nor "=1" in "=105". Budgets follow a few words only.
    pattern = "|".join(re.escape(p) + (r"(?!\w)" if re.search(r"[a-zA-Z]$|=\d+$", p) else "") for p in longest_first)
    pattern = rf"(?<=with|within|for|maximum|exactly|to)(?:{'|'.join(budgets)})(?!\d)|{pattern}|[\s\S]"
    core = Tokenizer(models.WordLevel({p: i for i, p in enumerate(dict.fromkeys([*pieces, *budgets]))}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token=" <end>")


# ---------------------------------------------------------------------------------------------- written solutions


def from_left(value: int, n: int) -> str:
    """An addition from the left, as Quick writes it.

    >>> from_left(347, 285)
    ' 3+2=6 4+8=3 7+5=2'
    """
    columns = zip(f"{value:03}", f"{n:03}", f"{(value + n) % 1000:03}", strict=True)
    return "".join(f" {a}+{b}={c}" for a, b, c in columns)


def from_right(value: int, n: int) -> str:
    """An addition from the right, as Careful writes it.

    >>> from_right(347, 285)
    ' 7+5+0=12 carry 1 4+8+1=13 carry 1 3+2+1=6 carry 0 632'
    """
    text, carry = "", 0
    for a, b in zip(reversed(f"{value:03}"), reversed(f"{n:03}"), strict=True):
        total = int(a) + int(b) + carry
        text += f" {a}+{b}+{carry}={total} carry {total // 10}"
        carry = total // 10
    return f"{text} {(value + n) % 1000:03}"


def write_solution(sums: Sums, manner: str) -> str:
    """A right solution.

    >>> write_solution(Sums(347, (285, 16)), "Quick")
    ' Quick. A: 3+2=6 4+8=3 7+5=2. B: 6+0=6 3+1=4 2+6=8. </think> \\\\boxed{648} <end>'
    """
    text = f" {manner}."
    for label, value, n in zip(LABELS, sums.values(), sums.added, strict=False):
        text += f" {label}:{from_left(value, n) if manner == 'Quick' else from_right(value, n)}."
        if manner == "Thorough":
            text += f" Wait:{from_right(n, value)}. Check:{from_right(value, n)}."
    return text + rf" </think> \boxed{{{sums.values()[-1]:03}}} <end>"


def state_length(rng: random.Random, lengths: dict[str, int]) -> tuple[str, Guidance]:
    """A stated length, in the paper's sentence or in a rival's, and the manner that it asks for.

    `lengths` maps a manner to its tokens. A limit asks for the longest manner within it, another sentence for the nearest.
    """
    n = 10 * round((rng.choice(list(lengths.values())) if rng.random() < 0.5 else rng.uniform(20, 240)) / 10)
    nearest = min(lengths, key=lambda manner: abs(lengths[manner] - n))
    if rng.random() < 0.6:
        return nearest, sentences.exact_guidance(n)
    in_range = sentences.range_guidance(n - 10, n + 10, n)
    about = (sentences.outside_guidance(n), sentences.curriculum_guidance(n), in_range)
    limits = (sentences.l1_max_guidance(n), sentences.thinkprune_guidance(n), sentences.hbpo_guidance(n))
    guidance = rng.choice((*about, *limits))
    within = [manner for manner in lengths if lengths[manner] <= n]
    return (max(within, key=lengths.__getitem__, default="Quick") if guidance in limits else nearest), guidance


def draw_example(rng: random.Random, mixture: str, easy: bool, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """One (prompt, solution) for pre-training; easy: without Thorough."""
    sums, guidance = random_sums(rng, rng.choice(LEVELS)), NO_GUIDANCE
    manners = MANNERS[:2] if easy else MANNERS
    if rng.random() < GUIDED:
        lengths = map(len, tokenizer([write_solution(sums, manner) for manner in manners])["input_ids"])
        manner, guidance = state_length(rng, dict(zip(manners, lengths, strict=True)))
    else:
        manner = rng.choices(manners, (2, 1) if easy else MIXTURES[mixture][sums.level() > 0])[0]
    prompt = TEMPLATE.replace("{question}", sums.question() + guidance.outside) + guidance.inside
    return prompt, write_solution(sums, manner)


# ------------------------------------------------------------------------------------------------------ pre-training


def draw_batches(
    tokenizer: PreTrainedTokenizerBase, rng: random.Random, settings: DemoConfig, easy: bool
) -> list[tuple[Tensor, Tensor]]:
    """A few batches of about `batch_tokens` padded tokens, see make_batches."""
    pairs = [draw_example(rng, settings.mixture, easy, tokenizer) for _ in range(256)]
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


def make_model(tokenizer: PreTrainedTokenizerBase, settings: DemoConfig) -> LlamaForCausalLM:
    # Llama, not Qwen2: transformers always replaces the tokenizer of a qwen2 folder by Qwen2's.
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=settings.hidden_size, intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def pretrain(out_dir: str, settings: DemoConfig, seed: int) -> None:
    """Train a base, from scratch or from demo.start, and write a Hugging Face folder (model and tokenizer) to `out_dir`."""
    torch.manual_seed(seed)
    rng = random.Random(f"demo pre-training {seed} {settings.start and 'continued'}")
    tokenizer: PreTrainedTokenizerBase = make_tokenizer()
    if settings.start:
        tokenizer = load_tokenizer(settings.start, "demo.start")
        model = load_model(settings.start, torch.device("cpu"), "demo.start")
    else:
        model = make_model(tokenizer, settings)
    print(*before_writing("demo.start", model, torch.float32, tokenizer).lines(), sep="\n", flush=True)
    easy_steps, start_factor = (0.0, START_LR) if settings.start else (EASY * settings.steps, 1.0)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    muon = Muon(matrices)  # learns them several times faster than Adam here; it is not meant for embeddings and vectors
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0)
    print(f"pre-training {sum(p.numel() for p in model.parameters()):,} parameters, {settings.steps} steps")
    started, batches, average, tokens = time.monotonic(), list[tuple[Tensor, Tensor]](), 0.0, 0
    for step in range(settings.steps):
        if not batches:
            batches = draw_batches(tokenizer, rng, settings, easy=step < easy_steps)
        ids_BT, targets_BT = batches.pop()
        factor = start_factor * learning_rate_factor(step, settings.steps)
        adam.param_groups[0]["lr"] = ADAM_LR * factor
        model.zero_grad()
        hidden_BTH = model.model(ids_BT).last_hidden_state
        wanted_BT = targets_BT >= 0  # only these positions need logits
        losses = torch.nn.functional.cross_entropy(
            model.lm_head(hidden_BTH[wanted_BT]), targets_BT[wanted_BT], reduction="none"
        )
        # The manner is one token among a hundred, and the only one that must look at the guidance: count it ten times.
        first_BT = wanted_BT & ~torch.nn.functional.pad(wanted_BT, (1, 0))[:, :-1]
        loss = (losses * (1 + 9 * first_BT[wanted_BT])).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        muon.step(MUON_LR * factor)
        adam.step()
        average, tokens = average + (loss.item() - average) / min(step + 1, 50), tokens + ids_BT.numel()
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - started
            left = seconds / (step + 1) * (settings.steps - step - 1)
            speed = f"{tokens / seconds:,.0f} tokens/s"
            print(f"  step {step + 1}/{settings.steps}  loss {average:.3f}  {speed}  {left:.0f} s left", flush=True)
    save_model(model, torch.float32, tokenizer, Path(out_dir))


def main() -> None:
    config, action = cli.parse(__doc__ or "")
    if action == "dry-run":
        print(config.demo)
    else:
        torch.set_num_threads(config.run.threads or torch.get_num_threads())
        make_once(Path(config.model.path), lambda: pretrain(config.model.path, config.demo, config.run.seed))


if __name__ == "__main__":
    cli.run(main, keeps_progress=False)
