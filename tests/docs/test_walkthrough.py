"""docs/WALKTHROUGH.md cannot go stale: code excerpts are in their files, and its numbers follow from the real functions.

    python -m pytest tests/docs/test_walkthrough.py

What only a run of the demo can give (lengths, verdicts, log-probs, the losses of two optimizer steps, three mismatches) is
taken from the page; everything that can be calculated from it, or from config and seed, is calculated and compared.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from nanolapo.advantages import group_advantages, group_statistics
from nanolapo.config import Config
from nanolapo.config_file import load_config
from nanolapo.data.demo_task import parse_question
from nanolapo.data.order import round_indices
from nanolapo.data.problems import Problem, load_problems
from nanolapo.data.prompts import Prompter
from nanolapo.demo.pretrain import from_left, make_tokenizer, write_solution
from nanolapo.explain.sampled import BLANK, num
from nanolapo.grader import Grader
from nanolapo.lengths import LengthMap, typical_range
from nanolapo.losses import BatchTotals, policy_loss, row_weights
from nanolapo.methods.lapo import (
    Internalization,
    discovery_reward,
    internalization_reward,
    tokens_outside,
)
from nanolapo.rollouts import row_seed

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/WALKTHROUGH.md").read_text(encoding="utf-8")
WORDS = " ".join(PAGE.split())  # sentences, wherever their lines end
FENCE = re.compile(r"```python\n(.*?)```", re.DOTALL)
PLACE = 22  # the followed problem is number 23 of the step
SLIP = 9  # the token of answer 2 that spoils it


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(ROOT / "configs/demo/stage1.yaml")


@pytest.fixture(scope="module")
def problem(config: Config) -> Problem:
    problems = load_problems(config.data.sources)[0]
    assert f"A step takes {config.rollout.prompts_per_step} of the {len(problems)} training problems" in WORDS
    prompts = config.rollout.prompts_per_step
    return problems[round_indices(len(problems), 0, 0, prompts, config.run.seed)[PLACE]]


def table(columns: str) -> list[dict[str, str]]:
    """The rows of the Markdown table with this head."""
    head = f"| {columns} |"
    lines = PAGE[PAGE.index(head) :].split("\n\n")[0].splitlines()
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(split[0], cells, strict=True)) for cells in split[2:]]


def values(rows: list[dict[str, str]], name: str) -> np.ndarray:
    return np.array([float(row[name]) for row in rows])


def answers() -> dict[int, str]:
    return {int(number): text for number, text in re.findall(r"^(\d): (.*)$", PAGE, re.MULTILINE)}


SEEN = {"Quick": 42, "Careful": 78, "Thorough": 216}  # tokens of a manner's answer
REWARDS = "answer | L | c | d | alpha R1 | R_D | A"
TOKENS = "answer | token | text | A | log p sampled | log p now | r | clipped | loss | share | pull"
STAGE_2 = "answer | L | c | beta R2 | R_I | A"


def test_every_excerpt_is_in_the_file_named_before_it() -> None:
    assert len(FENCE.findall(PAGE)) >= 10
    for excerpt in FENCE.finditer(PAGE):
        named = re.findall(r"`(nanolapo/[\w/]+\.py)`", PAGE[: excerpt.start()])[-1]
        assert excerpt[1] in (ROOT / named).read_text(encoding="utf-8"), f"{named} no longer has\n{excerpt[1]}"


def test_every_test_and_file_and_function_it_names_exists() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_[A-Za-z0-9_]+)`", PAGE)
    assert len(named) >= 12
    assert not [name for name in named if f"def {name}(" not in sources]
    assert not [name for name in re.findall(r"`((?:nanolapo|tests)/[\w/]+\.py)`", PAGE) if not (ROOT / name).exists()]
    for function, file in re.findall(r"`(\w+)`,? in\s+`(nanolapo/[\w/]+\.py)`", PAGE):
        assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), f"{function} is not in {file}"


def test_problem_and_prompt(config: Config, problem: Problem) -> None:
    assert f"we follow number {PLACE + 1}, `{problem.id}`:" in WORDS and f"> {problem.question}\n" in PAGE
    assert f"The right answer is {problem.answer}." in WORDS
    assert problem.answer == f"{parse_question(problem.question).values()[-1]:03}"
    tokenizer = make_tokenizer()
    ids = Prompter(tokenizer, config.prompt).ids(problem.question)
    pairs = ", ".join(f"{i} {tokenizer.decode([i]).replace(' ', BLANK)}" for i in ids[:8])
    assert f"become {len(ids)} ids: `{pairs}` and so on" in WORDS


def test_answers_seeds_lengths_and_verdicts(config: Config, problem: Problem) -> None:
    rows, texts, tokenizer = table(REWARDS), answers(), make_tokenizer()
    assert texts.keys() == {1, 2, 3} and len(rows) == config.rollout.group_size
    assert f"the limit of {config.rollout.max_new_tokens}." in WORDS
    with Grader() as grader:
        for number, text in texts.items():
            seed = row_seed(config.run.seed, 0, PLACE, number - 1)
            assert f"{seed} for answer {number}" in WORDS
            assert SEEN[text.split(".")[0]] == float(rows[number - 1]["L"])
            assert len(tokenizer(f" {text} <end>")["input_ids"]) == float(rows[number - 1]["L"])
            assert grader.grade_all([text], [problem.answer]) == [rows[number - 1]["c"] == "1"]
        assert f"{grader.reads(texts[2])} for answer 2, wrong; 029 for answers 7 and 8, wrong; " in WORDS
    assert f"{problem.answer} for all others, right" in WORDS
    assert values(rows, "c").tolist() == [1, 0, 1, 1, 1, 1, 0, 0] and "1 for five of eight" in WORDS
    assert f"Answer 2 has L = {rows[1]['L']}." in WORDS


def test_manners_and_the_digit_that_went_wrong(problem: Problem) -> None:
    tokenizer, sums, texts = make_tokenizer(), parse_question(problem.question), answers()
    for manner, length in SEEN.items():
        assert len(tokenizer(write_solution(sums, manner))["input_ids"]) == length
        assert re.search(rf"\*{manner}\*[^*]* in {length}", WORDS), "said where the manner is explained"
    for number in (1, 3):  # the right ones are as the base has learnt to write them
        assert write_solution(sums, texts[number].split(".")[0]) == f" {texts[number]} <end>"
    start, right = sums.values()[:2]
    wrong = right - 10
    assert f"The last digits of {start} + {sums.added[0]} are `8+8`, which is 16, so 1 is carried" in WORDS
    assert f"It goes on with {wrong} in place of {right}" in WORDS
    assert texts[3].startswith(f"Quick. A:{from_left(start, sums.added[0])}.") and "`0+3=4`, as in answer 3" in WORDS
    assert texts[2].startswith(f"Quick. A: 1+5=6 0+3=3 8+8=6. B:{from_left(wrong, sums.added[1])}.")
    assert from_left(wrong + sums.added[1], sums.added[2]) not in texts[2] and "slips again in C." in WORDS
    quick = values(table(REWARDS), "c")[values(table(REWARDS), "L") == SEEN["Quick"]]
    assert (len(quick), quick.sum()) == (5, 2) and "three of the five Quick answers were wrong" in WORDS


def test_typical_range_rewards_and_advantages(config: Config) -> None:
    rows, lapo = table(REWARDS), config.lapo
    lengths, right = values(rows, "L"), values(rows, "c").astype(bool)
    listed = ", ".join(f"{length:g}" for length in sorted(lengths[right]))
    assert f"lengths of the right answers: {listed}." in WORDS
    percentiles = (lapo.percentiles[0], lapo.percentiles[1])
    low, high = typical_range(lengths[right], percentiles)
    assert (
        f"from the {percentiles[0]:g}th to the {percentiles[1]:g}th percentile: [P30, P70] = [{num(low)}, {num(high)}]"
        in WORDS
    )
    assert lapo.decay is not None
    assert f"alpha = {lapo.alpha:g} more" in WORDS and f"to 0 at {lapo.decay:g} tokens outside it" in WORDS
    rewards = discovery_reward(lengths, right, lapo.alpha, lapo.decay, percentiles)
    rewards_PG = torch.from_numpy(rewards)[None]
    advantages = group_advantages(rewards_PG, config.loss.normalize_std)[0]
    for row, d, reward, advantage in zip(rows, tokens_outside(lengths, low, high), rewards, advantages, strict=True):
        assert row["d"] == num(d) and row["R_D"] == num(reward) and row["A"] == f"{advantage:+.6g}"
        assert row["alpha R1"] == num(round(reward - float(row["c"]), 12))
    mean_P1, std_P1 = group_statistics(rewards_PG)
    assert f"mean of the rewards is {num(mean_P1)}, their standard deviation {num(std_P1)}," in WORDS
    assert f"took {rows[3]['L']} tokens where others took {rows[0]['L']}" in WORDS and right[[0, 3]].all()
    assert round(float(advantages[0] / advantages[3])) == 9 and "about nine times as large for answer 1" in WORDS
    assert lengths[1] == lengths[2] and right[2] and not right[1], "answer 2 is as long as answer 3"
    # A right answer that is too long has the reward 1, so its sign is that of 1 - mean.
    good_PG = torch.tensor([[1.7, 1.7, 1.7, 1.0, 1.7, 1.7, 1.7, 0.0]])
    assert good_PG.mean() > 1 and group_advantages(good_PG, config.loss.normalize_std)[0, 3] < 0
    found = re.search(r"over the whole step it is ([\d.]+)\)", WORDS)
    assert rewards[3] == 1 and found and 1 < float(found[1]) < 1.7


def test_tokens_ratio_clip_share_and_pull(config: Config) -> None:
    rows, loss_config, tokenizer = table(TOKENS), config.loss, make_tokenizer()
    first = {row["answer"]: row for row in table(REWARDS)}
    found = re.search(r"all tokens of the answers of the optimizer step, (\d+) here", WORDS)
    assert found
    totals = BatchTotals(
        tokens=int(found[1]), rows=config.train.batch_size, max_new_tokens=config.rollout.max_new_tokens
    )
    assert f"`share` = loss / {totals.tokens}" in WORDS
    for row in rows:
        length = int(float(first[row["answer"]]["L"]))
        assert float(row["A"]) == float(first[row["answer"]]["A"]) and 1 <= int(row["token"]) <= length
        now = torch.tensor([[float(row["log p now"])]], dtype=torch.float64, requires_grad=True)
        old, A = (torch.tensor([[float(row[name])]], dtype=torch.float64) for name in ("log p sampled", "A"))
        loss_BT, clipped_BT = policy_loss(
            now, old, A, loss_config.clip_low, loss_config.clip_high, loss_config.dual_clip
        )
        weight = row_weights(torch.tensor([length]), loss_config.aggregation, totals)
        share = (loss_BT * weight[:, None]).sum()
        share.backward()
        assert now.grad is not None
        assert float(row["r"]) == pytest.approx((now - old).exp().item(), rel=2e-5)
        assert float(row["clipped"]) == clipped_BT.item() and float(row["loss"]) == pytest.approx(
            loss_BT.item(), rel=2e-5
        )
        assert float(row["share"]) == pytest.approx(share.item(), rel=2e-5)
        assert float(row["pull"]) == pytest.approx(now.grad.item(), rel=2e-5, abs=1e-15)
        if row["text"] == f"`{BLANK}<end>`":
            assert int(row["token"]) == length
    assert f"beyond [{1 - loss_config.clip_low:g}, {1 + loss_config.clip_high:g}]" in WORDS
    ids = tokenizer(f" {answers()[2]} <end>")["input_ids"]
    [slip] = [row for row in rows if (row["answer"], row["token"]) == ("2", str(SLIP))]
    assert tokenizer.decode(ids[: SLIP - 1]).endswith("1+5=6 0+3") and "the 3 of `0+3=3`" in WORDS
    assert f"`{tokenizer.decode([ids[SLIP - 1]])}`" == slip["text"] == "`=3`"
    [thorough] = [row for row in rows if row["text"] == f"`{BLANK}Thorough`"]
    assert f"less likely (r = {float(slip['r']):.2g})" in WORDS and float(slip["A"]) < 0
    assert f"less likely, too (r = {float(thorough['r']):.2g}), although A is positive" in WORDS
    assert float(thorough["A"]) > 0
    assert {row["clipped"] for row in rows} == {"0"} and "No token of this step comes so far" in WORDS
    assert f"Below r = {1 - loss_config.clip_low:g} the clip would stop the push on the mistake" in WORDS
    for r, pulls in ((0.81, True), (0.79, False)):
        now = torch.tensor([[float(slip["log p sampled"]) + np.log(r)]], dtype=torch.float64, requires_grad=True)
        old, A = (torch.tensor([[float(slip[name])]], dtype=torch.float64) for name in ("log p sampled", "A"))
        loss_BT, clipped_BT = policy_loss(
            now, old, A, loss_config.clip_low, loss_config.clip_high, loss_config.dual_clip
        )
        loss_BT.sum().backward()
        assert now.grad is not None and (now.grad.item() > 0, clipped_BT.item()) == (pulls, not pulls)
    found = re.search(r"In the next step of the run one of (\d+) does \(`clip_fraction` ([\d.e-]+)\)", WORDS)
    assert found and 1 / int(found[1]) == pytest.approx(float(found[2]), rel=1e-6)
    total = config.rollouts_per_step
    assert f"the {total} answers are used for two optimizer steps of {config.train.batch_size}" in WORDS
    assert config.optimizer_steps_per_step == 2


def test_losses_norms_and_mismatches_agree_among_themselves(config: Config) -> None:
    losses = re.search(r"have losses (\S+) and (\S+), mean (\S+)\. ", WORDS)
    norms = re.search(r"gradient norms (\S+) and (\S+) \(mean (\S+)\)", WORDS)
    assert losses and norms
    for one, two, mean in (losses.groups(), norms.groups()):
        assert (float(one) + float(two)) / 2 == float(mean)
    assert f"shortens what is longer than {config.train.grad_clip:g}" in WORDS
    found = re.search(r"it is (\S+) before the update, .* it would be ([\d.e-]+); .* have (\S+)\. \*Why watch", WORDS)
    assert found
    before, stale, after = map(float, found.groups())
    assert max(before, after) < 1e-5 < 1e-3 < stale


def test_what_is_remembered(config: Config) -> None:
    rows, memory = table(REWARDS), LengthMap()
    memory.update_discovery("q", [int(row["L"]) for row in rows if row["c"] == "1"])
    assert f"median of the right lengths (Eq. 3): M(q) = {memory.target('q'):g}," in WORDS
    levels = [problem.level for problem in load_problems(config.data.sources)[0]]
    easy, found = (
        levels.count(0),
        re.search(r"for all (\d+) problems with carries. For (\d+) of the (\d+) without", WORDS),
    )
    assert found and (int(found[1]), int(found[3])) == (len(levels) - easy, easy) and int(found[2]) == easy - 1


def test_stage_2() -> None:
    config = load_config(ROOT / "configs/demo/stage2.yaml")
    rows, method = table(STAGE_2), Internalization(config)
    lengths, right = values(rows, "L"), values(rows, "c").astype(bool)
    found = re.search(r"had M\(q\) = ([\d.]+),", WORDS)
    assert found
    problem = Problem("q", "", "", None, "demo")
    method.length_map.entries["q"] = float(found[1])
    guidance = method.guidance(problem, 0, 0)
    n = guidance.budget
    assert (
        n is not None
        and f"prompt now ends in a thought: `<think> I will answer the question with {n:g} tokens.`" in WORDS
    )
    prompt = Prompter(make_tokenizer(), config.prompt).render("?", guidance)
    assert prompt.endswith(f"<think>{guidance.inside}"), "the number is printed as the prompter prints it"
    assert (
        f"beta = {method.beta:g}," in WORDS and f"a bell curve around n = {n:g} with sigma = {method.sigma:g}." in WORDS
    )
    rewards = internalization_reward(
        lengths, right, method.center(problem, lengths, right, n), method.beta, method.sigma
    )
    advantages = group_advantages(torch.from_numpy(rewards)[None], config.loss.normalize_std)[0]
    for row, reward, advantage in zip(rows, rewards, advantages, strict=True):
        assert row["R_I"] == num(reward) and row["A"] == f"{advantage:+.6g}"
        assert row["beta R2"] == num(reward - float(row["c"]))
    method.length_map.update_internalization("q", lengths[right])
    after = method.length_map.target("q")
    middle = f"{np.median(lengths[right]):g}"
    assert f"median of the right lengths is {middle}, not below {found[1]}, so M(q) stays {after:g}." in WORDS
    method.length_map.entries["q"] = float(SEEN["Quick"])
    easy = Prompter(make_tokenizer(), config.prompt).render("?", method.guidance(problem, 0, 0))
    assert easy.endswith(" 40 tokens.") and "Where nothing carries, the prompt says 40." in WORDS
    silent = re.search(r"In (\d+) of the (\d+) problems all eight answers .* \(`no_signal` is ([\d.]+)\)", WORDS)
    assert silent and int(silent[2]) == config.rollout.prompts_per_step
    assert int(silent[1]) / int(silent[2]) == float(silent[3])


def test_no_number_of_the_prose_is_unknown() -> None:
    """A number that is added to the page is added here, with its test above or with what makes it true."""
    prose = re.sub(
        r"^\|.*$|^>.*$|^#.*$|^    .*$|`[^`]*`", "", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL), flags=re.MULTILINE
    )
    checked_above = {
        "32", "350", "23", "29", "256", "1755774366", "1109195216", "1498864656", "108", "538", "636", "646", "16", "919",
        "029", "019", "42", "78", "216", "30", "70", "49.2", "0.7", "20", "0.912", "0.785535", "1.37865", "174", "176",
        "128", "0.8", "1.2", "9", "0.92", "0.9", "20722", "10788", "0.17940398026257753", "0.10643157362937927",
        "0.1429177769459784", "0.06665071099996567", "0.041099727153778076", "0.05387521907687187", "4.43889e-07",
        "0.00315165", "4.19866e-07", "80", "40", "8", "0.90625", "4.82579e-05",
    }  # fmt: skip
    said = {"32", "16", "4096"}  # float32, bf16; the paper's mark of the unsolved
    said |= {"347", "285"}  # the question at the top, an example
    said |= {"30", "175", "60"}  # steps of stage 1, and its last length_map.json
    small = {str(n) for n in range(8)}  # answers, equations, stages
    found = set(re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-\d+)?|(?<=float)\d+|(?<=bf)\d+", prose))
    assert found <= checked_above | said | small, found - checked_above - said - small
    assert checked_above <= found | set(re.findall(r"[\d.]+\d", PAGE)), (
        "a number is checked that the page no longer has"
    )
