r"""Prompts: exact wording, where guidance goes, one BOS, chat templates with and without a prefilled <think>.

Run: python -m pytest tests/data/test_prompts.py
The tokenizers are real ones (byte-level BPE, trained here on a few lines) that differ as published models do.
"""

from dataclasses import dataclass

import pytest
from folders import train_byte_bpe
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from nanolapo.config import PAPER_TEMPLATE, Config, PromptConfig, RolloutConfig, UserError
from nanolapo.data.load import fit_prompts
from nanolapo.data.problems import Problem
from nanolapo.data.prompts import (
    NO_GUIDANCE,
    Guidance,
    Prompter,
    curriculum_guidance,
    exact_guidance,
    hbpo_guidance,
    implicit_guidance,
    l1_max_guidance,
    outside_guidance,
    range_guidance,
    thinkprune_guidance,
)

# The paper's prompt in one piece; PAPER_TEMPLATE is written in several.
PAPER = r"You are a helpful assistant. A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The Assistant first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning process is enclosed within <think> and </think> tags, respectively, i.e., <think> reasoning process here </think> answer here. User: {question} Please think step by step and output the final answer within \boxed{}. Assistant: <think>"  # noqa: E501

# Chat templates, cut down from the published ones to what decides a prompt of one or two turns.
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou are a helpful "
    "AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}{% else %}"
    "{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
)


@dataclass(frozen=True)
class Kind:
    """How one family of models starts texts and turns."""

    template: str | None
    bos: str | None  # the tokenizer's bos_token
    starts_with_bos: bool  # the tokenizer puts it before plain text
    adds_eos: bool = False
    prefilled: str = ""  # what the template writes of the thought


KINDS = {
    "plain": Kind(None, None, False),  # GPT-2, byte tokenizers
    "bos": Kind(None, "<s>", True),  # a Llama-like base model
    "bos_eos": Kind(None, "<s>", True, adds_eos=True),
    "smollm2": Kind(CHATML, "<|im_start|>", False),  # the BOS token opens every turn
    "qwen3": Kind(QWEN3, None, False),
    "llama": Kind(LLAMA, "<s>", True),
    "template_without_bos": Kind(CHATML, "<s>", True),
    "r1": Kind(R1, "<s>", True, prefilled="<think>\n"),
}
CHAT_KINDS = [name for name, kind in KINDS.items() if kind.template]
BOS_KINDS = [name for name, kind in KINDS.items() if kind.starts_with_bos]


@pytest.fixture(scope="module")
def byte_bpe() -> Tokenizer:
    return train_byte_bpe([PAPER, "I will answer the question with tokens."])


def make_tokenizer(byte_bpe: Tokenizer, kind: Kind) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(byte_bpe.to_str())
    if kind.starts_with_bos:
        single = "<s> $A </s>" if kind.adds_eos else "<s> $A"
        ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=kind.bos, eos_token="</s>", chat_template=kind.template
    )


def prompter(byte_bpe: Tokenizer, name: str, **settings) -> Prompter:
    style = "chat" if KINDS[name].template else "raw"
    return Prompter(make_tokenizer(byte_bpe, KINDS[name]), PromptConfig(**{"style": style} | settings))


# ---- wording ----


def test_paper_template_character_for_character(byte_bpe):
    assert PAPER_TEMPLATE == PAPER
    question = "What is $\\frac{1}{2}$ of {4, 6}? {question} {}"  # braces, and a stray placeholder
    plain = prompter(byte_bpe, "plain")
    assert plain.render(question) == PAPER.replace("{question}", question)
    expected = PAPER.replace("{question}", question) + " I will answer the question with 1300 tokens."
    assert plain.render(question, exact_guidance(1300)) == expected


def test_guidance_wording_and_budgets():
    """The published wordings, and ours. Lengths are printed whole."""
    for guidance, expected in [
        (exact_guidance(1300), Guidance(inside=" I will answer the question with 1300 tokens.", budget=1300)),
        (
            range_guidance(1220.4, 1460.0, 1300),
            Guidance(inside=" I will answer the question with 1220 to 1460 tokens.", budget=1300),
        ),
        (outside_guidance(500), Guidance(outside=" Think for 500 tokens.", budget=500)),
        (implicit_guidance(1299.5), Guidance(budget=1299.5)),
        (l1_max_guidance(800), Guidance(outside=" Think for maximum 800 tokens.", budget=800)),
        (
            thinkprune_guidance(3000),
            Guidance(outside=" The output of the assistant should be within 3000 tokens.", budget=3000),
        ),
        (
            curriculum_guidance(179),
            Guidance(outside=" IMPORTANT: You should use exactly 179 tokens in your response.", budget=179),
        ),
        (hbpo_guidance(512), Guidance(inside=" I will answer the question within 512 tokens.", budget=512)),
    ]:
        assert guidance == expected
    assert exact_guidance(1299.6).inside == " I will answer the question with 1300 tokens."
    assert NO_GUIDANCE.budget is None


@pytest.mark.parametrize("budget", [0, 0.0, -5, 0.4, float("nan"), float("inf")])
def test_E2_a_missing_budget_is_never_a_number(budget):
    for guidance in (exact_guidance, outside_guidance, implicit_guidance):
        with pytest.raises(ValueError, match="no budget is None"):
            guidance(budget)


def test_the_prompts_of_released_rivals(byte_bpe):
    """Thinkless puts its instruction before the question, AutoThink three dots into the thought that the template opens."""
    thinkless = prompter(byte_bpe, "qwen3", instruction="Box {}.\n{question}")
    user = "<|im_start|>user\nBox {}.\n2+{2}? Think for 7 tokens.<|im_end|>\n"
    assert thinkless.render("2+{2}?", outside_guidance(7)) == f"{user}<|im_start|>assistant\n"
    usual, autothink = (prompter(byte_bpe, "r1", think_prefix=prefix) for prefix in ("", "<think>\n...\n"))
    assert usual.render("2+2?").endswith("<think>\n") and autothink.render("2+2?") == usual.render("2+2?") + "...\n"


def test_where_guidance_goes(byte_bpe):
    guidance = Guidance(outside=" OUT.", inside=" IN.", budget=7)
    raw = prompter(byte_bpe, "plain", template="Q: {question} Box it. A: <think>")
    assert raw.render("2+2?", guidance) == "Q: 2+2? OUT. Box it. A: <think> IN."
    chat = prompter(byte_bpe, "qwen3", instruction="Box it.", system="Be brief.", think_prefix="<think>")
    assert chat.render("2+2?", guidance) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2? Box it. OUT.<|im_end|>\n"
        "<|im_start|>assistant\n<think> IN."
    )
    bare = prompter(byte_bpe, "qwen3", instruction="", think_prefix="")
    assert bare.render("2+2?") == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


def test_settings_that_cannot_work_are_refused(byte_bpe):
    for name, settings, words in [
        ("plain", {"template": "Solve this:"}, "prompt.template must contain {question}"),
        ("plain", {"template": "{question} {question}"}, "exactly once"),
        ("plain", {"system": "Be brief."}, "prompt.system"),
        ("plain", {"style": "chat"}, "no chat template"),
    ]:
        with pytest.raises(UserError, match=words):
            prompter(byte_bpe, name, **settings)
    gemma = make_tokenizer(byte_bpe, Kind(GEMMA, "<s>", True))
    with pytest.raises(UserError, match="System role not supported.*prompt.system"):
        Prompter(gemma, PromptConfig(style="chat", system="Be brief."))
    Prompter(gemma, PromptConfig(style="chat"))
    closed = make_tokenizer(byte_bpe, Kind(QWEN3.replace("enable_thinking is defined and enable_thinking is", "not"),
                                           None, False))  # fmt: skip
    with pytest.raises(UserError, match="just closed one"):
        Prompter(closed, PromptConfig(style="chat", think_prefix="<think>"))
    assert Prompter(closed, PromptConfig(style="chat")).render("q").endswith("<think>\n\n</think>\n\n")


CLOSED = QWEN3.replace("enable_thinking is defined and enable_thinking is", "not")  # as with thinking switched off


@pytest.mark.parametrize(
    ("template", "settings", "words"),
    [
        (
            QWEN3,
            {},
            "none is open where the answer begins .*assistant.*think_prefix",
        ),  # the model opens its own thought
        (CLOSED, {}, "none is open where the answer begins .*</think>"),
        (QWEN3, {"system": "Write <think> first."}, "none is open"),  # what other turns say opens nothing
        (QWEN3, {"instruction": "Write <think> first."}, "none is open"),
        (QWEN3, {"think_prefix": "First,"}, "none is open"),
        (R1, {"think_prefix": "<think>\nShort.</think>\n"}, "none is open"),
        (None, {"template": "<think> reasoning </think> Q: {question} A:"}, "end prompt.template in <think>"),
    ],
)
def test_inside_guidance_without_an_open_thought_is_refused(byte_bpe, template, settings, words):
    style = "chat" if template else "raw"
    made = Prompter(make_tokenizer(byte_bpe, Kind(template, None, False)), PromptConfig(**{"style": style} | settings))
    for make in (made.render, made.ids):
        with pytest.raises(UserError, match=words):
            make("2+2?", exact_guidance(7))
    assert "Think for 7 tokens." in made.render("2+2?", outside_guidance(7))  # the other place is still good


@pytest.mark.parametrize(
    ("template", "settings"),
    [
        (QWEN3, {"think_prefix": "<think>\n"}),
        (R1, {}),
        (R1, {"think_prefix": "First,"}),
        (R1.replace("<think>", "<seed:think>"), {}),
        (R1.replace("<think>", "[THINK]"), {}),
        (R1.replace("<think>", "<|begin_of_thought|>"), {}),
        (None, {"template": PAPER_TEMPLATE}),
    ],
)
def test_inside_guidance_opens_the_thought(byte_bpe, template, settings):
    style = "chat" if template else "raw"
    made = Prompter(make_tokenizer(byte_bpe, Kind(template, None, False)), PromptConfig(**{"style": style} | settings))
    text = made.render("Is </think> a tag, or <think>?", exact_guidance(7))
    assert text.endswith("I will answer the question with 7 tokens.") and text.count("I will answer") == 1


def test_outside_guidance_in_the_thought_is_refused(byte_bpe):
    made = prompter(byte_bpe, "plain", template="A: <think> I was asked: {question}")
    with pytest.raises(UserError, match="belongs before the thought"):
        made.render("2+2?", outside_guidance(7))
    twice = prompter(byte_bpe, "plain", template="Think after <think>. Q: {question} A: <think>")
    assert twice.render("2+2?", outside_guidance(7)).endswith("2+2? Think for 7 tokens. A: <think>")


def test_a_model_that_knows_no_thought_thinks_in_its_answer():
    """SmolLM2's template and vocabulary have no thought tag: the guidance becomes the first words of the answer."""
    core = train_byte_bpe([PAPER], special=["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", chat_template=CHATML)
    made = Prompter(tokenizer, PromptConfig(style="chat"))
    assert made.render("2+2?", exact_guidance(7)).endswith("assistant\nI will answer the question with 7 tokens.")


# ---- token ids ----


@pytest.mark.parametrize("name", KINDS)
def test_A10_exactly_one_bos(name, byte_bpe):
    made = prompter(byte_bpe, name)
    opens = name not in CHAT_KINDS or bool(KINDS[name].prefilled)
    guidance = exact_guidance(300) if opens else outside_guidance(300)
    tokenizer = made.tokenizer
    ids = made.ids("What is 17 * 23?", guidance)
    text = made.render("What is 17 * 23?", guidance)
    bos = tokenizer.convert_tokens_to_ids("<s>")
    # the same tokens, apart from the BOS that rendering does not show for raw prompts
    assert tokenizer.decode(ids).removeprefix("<s>") == text.removeprefix("<s>")
    if name in BOS_KINDS:
        assert ids[0] == bos and ids.count(bos) == 1
    else:
        assert bos not in ids
    assert tokenizer.eos_token_id not in ids


@pytest.mark.parametrize("name", CHAT_KINDS)
def test_A10_ids_are_those_of_the_chat_template(name, byte_bpe):
    made = prompter(byte_bpe, name, instruction="Box it.", system="Be brief.")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2? Box it."},
    ]
    expected = made.tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert isinstance(expected[0], int)
    if name == "template_without_bos":  # the one case in which the tokenizer's own start token was missing
        expected = [made.tokenizer.bos_token_id, *expected]
    assert made.ids("2+2?") == expected


def test_A10_raw_template_that_spells_the_bos(byte_bpe):
    made = prompter(byte_bpe, "bos", template="<s>Q: {question} A: <think>")
    ids = made.ids("2+2?")
    assert ids == prompter(byte_bpe, "bos", template="Q: {question} A: <think>").ids("2+2?")
    assert made.tokenizer.convert_ids_to_tokens(ids).count("<s>") == 1


def test_A10_bos_that_opens_every_turn_is_left_alone(byte_bpe):
    made = prompter(byte_bpe, "smollm2")
    assert made.tokenizer.convert_ids_to_tokens(made.ids("2+2?")).count("<|im_start|>") == 3
    raw = prompter(byte_bpe, "smollm2", style="raw")
    assert "<|im_start|>" not in raw.tokenizer.convert_ids_to_tokens(raw.ids("2+2?"))


@pytest.mark.parametrize("think_prefix", ["", "<think>", "<think>\n"])
@pytest.mark.parametrize("name", KINDS)
def test_A11_a_perfect_completion_gets_full_reward(name, think_prefix, byte_bpe):
    """Prompt and completion joined make one well-formed answer, and the grader says it is right."""
    from nanolapo.grader import grade

    made = prompter(byte_bpe, name, think_prefix=think_prefix if name in CHAT_KINDS else "")
    tokenizer = made.tokenizer
    # A template that prefills <think> keeps its one; otherwise the prefix opens the thought, once.
    opens = name not in CHAT_KINDS or bool(think_prefix) or bool(KINDS[name].prefilled)
    for guidance in (NO_GUIDANCE, exact_guidance(300) if opens else outside_guidance(300)):
        prompt = made.render("What is 17 * 23?", guidance)
        turn = prompt[prompt.rindex("17 * 23?") :]
        assert turn.count("<think>") == int(opens)
        assert "<think>\n\n" not in turn and "\n I will" not in turn
        start = "" if opens else "<think>"
        completion = start + " 17 * 23 = 340 + 51 = 391.\n</think>\nThe answer is \\boxed{391}."
        ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
        joined = tokenizer.decode(made.ids("What is 17 * 23?", guidance) + ids)
        assert joined.removeprefix("<s>") == prompt.removeprefix("<s>") + completion
        assert grade(tokenizer.decode(ids), "391")
        assert not grade(tokenizer.decode(ids), "392")


@pytest.mark.parametrize(
    ("think_prefix", "opening"),
    [
        ("", "<think>\n"),
        ("<think>", "<think>\n"),
        ("<think>\n", "<think>\n"),
        ("<think>\nFirst,", "<think>\nFirst,"),
        ("First,", "<think>\nFirst,"),
    ],
)
def test_A11_prefilled_think_is_not_repeated(think_prefix, opening, byte_bpe):
    made = prompter(byte_bpe, "r1", think_prefix=think_prefix)
    assert made.render("2+2?").endswith("<|Assistant|>" + opening)
    assert made.ids("2+2?").count(made.tokenizer.convert_tokens_to_ids("<think>")) == 1


def test_A11_same_system_prompt_everywhere(byte_bpe):
    """An empty system leaves the template's own; a given one replaces it, and nothing else changes it."""
    default, own = prompter(byte_bpe, "smollm2"), prompter(byte_bpe, "smollm2", system="Be brief.")
    assert "named SmolLM" in default.render("q") and "named SmolLM" not in own.render("q")
    assert own.render("q").count("<|im_start|>system\nBe brief.<|im_end|>") == 1
    again = prompter(byte_bpe, "smollm2", system="Be brief.")  # as built for evaluation
    assert again.ids("q", outside_guidance(9)) == own.ids("q", outside_guidance(9))


def test_A22_prompts_are_never_cut(byte_bpe):
    made = prompter(byte_bpe, "bos")
    made.tokenizer.model_max_length = 50
    made.tokenizer.truncation_side = "left"
    question = "How many? " * 400
    ids = made.ids(question)
    assert len(ids) > 400
    assert made.tokenizer.decode(ids, skip_special_tokens=False) == "<s>" + PAPER.replace("{question}", question)
    problems = [Problem("long", question, "1", None, "s"), Problem("short", "2+2?", "4", None, "s")]
    short = made.ids("2+2?")
    for limit, expected in [
        (len(ids), (problems, len(ids), [])),
        (len(ids) - 1, (problems[1:], len(short), ["skipped 1 prompts"])),
        (len(short), (problems[1:], len(short), ["skipped 1 prompts"])),
    ]:
        data = fit_prompts(Config(rollout=RolloutConfig(max_prompt_tokens=limit)), made, problems, [])
        assert (data.problems, data.longest_prompt, [line[:17] for line in data.report]) == expected
    with pytest.raises(UserError, match="no problem is left to work on .skipped 2 prompts longer than"):
        fit_prompts(Config(rollout=RolloutConfig(max_prompt_tokens=len(short) - 1)), made, problems, [])


def test_lengths_are_printed_as_multiples(byte_bpe):
    """prompt.length_multiple rounds every stated length, never below one multiple; budget and question stay exact."""
    ten = prompter(byte_bpe, "plain", template="{question} <think>", length_multiple=10)
    assert ten.render("6 x 7 = 43?", outside_guidance(47.2)) == "6 x 7 = 43? Think for 50 tokens. <think>"
    assert ten.render("q", range_guidance(3, 44, 24)).endswith(" I will answer the question with 10 to 40 tokens.")
    assert ten.printed(exact_guidance(43)).budget == 43
    assert ten.ids("q", exact_guidance(43)) == ten.ids("q", exact_guidance(40)) != ten.ids("q", exact_guidance(60))
    assert prompter(byte_bpe, "plain").printed(exact_guidance(43)) == exact_guidance(43)
