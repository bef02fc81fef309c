"""What an evaluation asks: lengths stated where they do not belong, a prompt for each model, models exported on the way.

Run: python -m pytest tests/evaluation/test_passes.py
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from benchmark_helpers import benchmark, evaluation_config
from shipped import SHIPPED
from tiny import make_config

from nanolapo.config import Config, EvaluateConfig, UserError
from nanolapo.config_file import build, load_config, to_yaml
from nanolapo.data.problems import load_problems
from nanolapo.demo.pretrain import DemoConfig, make_model, make_tokenizer
from nanolapo.evaluation.evaluate import stated_lengths
from nanolapo.evaluation.passes import Model, Pass, dry_run, parse_models, passes
from nanolapo.evaluation.scores import read_answers
from nanolapo.grader import Grader
from nanolapo.report.tables import label
from nanolapo.reproduce.recipe import Evaluation, Recipe, Run

ROOT = Path(__file__).parents[2]


def plan(**evaluate: object) -> Config:
    values = {"models": ("base=x", "D=y", "I=z"), **evaluate}
    return replace(make_config(), evaluate=build(EvaluateConfig, values, "evaluate"))


def names_of_passes(config: Config) -> dict[str, list[str]]:
    models = parse_models(config)
    return {m.name: [one.name for one in passes(config, m, m is models[-1])] for m in models}


# ---- stated lengths ----


def test_who_is_told_what():
    told = ["500 tokens, outside", "3500 tokens, inside"]
    config = plan(instructions=["outside:500", "inside:3500"], guidance_factors=[0.5])
    assert names_of_passes(config) == {"base": [""], "D": [""], "I": ["", "0.5x own length", *told]}
    named = replace(config, evaluate=replace(config.evaluate, instructed=("base", "D")))
    assert names_of_passes(named) == {"base": ["", *told], "D": ["", *told], "I": ["", "0.5x own length"]}


@pytest.mark.parametrize(
    "text", ["500", "outside", "outside:", "outside:0", "outside:-5", "outside:5.5", "before:500", ":5"]
)
def test_an_instruction_that_cannot_be_read_is_refused(text):
    with pytest.raises(UserError, match=f"evaluate.instructions: {text!r} is not inside:TOKENS or outside:TOKENS"):
        parse_models(plan(instructions=["inside:7", text]))


def test_a_conflicting_instruction_is_the_same_for_every_problem_and_stands_in_its_place(tmp_path):
    """The paper's Table 4: whatever the problem needs, the question (or the thought) says 20 tokens. It is resumed like any
    other pass, and none of the three takes another's samples."""
    config = evaluation_config(tmp_path)
    config = replace(
        config, prompt=replace(config.prompt, template="{question} Last digit? <think>", length_multiple=10)
    )
    lines = {}
    with Grader() as grader:
        for one in passes(plan(instructions=["outside:20", "inside:20"]), Model("I", "z", config.prompt), True):
            runs = benchmark(config, grader)
            unguided = benchmark(config, grader).answers(0.6, Pass(), {})
            budgets = stated_lengths(one, unguided) if one.name else {}
            answers = runs.answers(0.6, one, budgets)
            assert {a.budget for a in answers} == {20.0 if one.name else None}
            if one.name:
                asked = {runs.data.tokenizer.decode(ids) for ids in runs.sampler.prompts}  # type: ignore[union-attr]
                lines[one.name] = asked
                assert set(budgets.values()) == {20.0} and len(budgets) == len(runs.data.problems)
                again = benchmark(config, grader)
                assert again.answers(0.6, one, budgets) == answers and again.sampler.asked == 0  # type: ignore[union-attr]
    assert lines["20 tokens, outside"] == {f"q {i} Think for 20 tokens. Last digit? <think>" for i in range(3)}
    thought = "I will answer the question with 20 tokens."
    assert lines["20 tokens, inside"] == {f"q {i} Last digit? <think> {thought}" for i in range(3)}
    files = sorted((tmp_path / "e/samples").glob("m--s--*.jsonl"))
    assert len(files) == 3 and all(len(read_answers(file)) == 3 for file in files)
    assert label({"model": "LAPO-I", "guidance": "20 tokens, outside"}) == "LAPO-I, told 20 tokens, outside"


def test_a_multiple_of_the_own_length_is_each_problems_own(tmp_path):
    config = evaluation_config(tmp_path, samples=2)
    with Grader() as grader:
        unguided = benchmark(config, grader).answers(0.6, Pass(), {})
    wanted = stated_lengths(Pass("2x own length", factor=2.0), unguided)
    for problem in {a.problem for a in unguided}:
        own = [a.length for a in unguided if a.problem == problem]
        assert wanted[problem] == 2 * sum(own) / len(own)


# ---- prompts ----


def test_a_model_with_its_own_prompt():
    config = plan(prompts={"D": {"style": "chat", "instruction": "Box it."}, "I": {}})
    base, d, i = (m.prompt for m in parse_models(config))
    assert base == config.prompt == i
    assert d == replace(config.prompt, style="chat", instruction="Box it.")
    assert build(Config, yaml.safe_load(to_yaml(config)), "") == config


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prompts": {"basis": {}}}, "evaluate.prompts: no model is called 'basis'; did you mean 'base'"),
        ({"prompts": {"d": {}}}, "evaluate.prompts: no model is called 'd'"),
        ({"prompts": {"D": {"stile": "chat"}}}, "evaluate.prompts.D.stile; did you mean evaluate.prompts.D.style"),
        ({"prompts": {"D": {"style": "chatt"}}}, "evaluate.prompts.D.style='chatt' is not one of 'raw', 'chat'"),
        ({"prompts": {"D": "chat"}}, "evaluate.prompts.D='chat' must be a mapping"),
        (
            {"instructions": ["inside:5"], "instructed": ["II"]},
            "evaluate.instructed: no model is called 'II'; did you mean 'I'",
        ),
    ],
)
def test_prompts_and_names_that_do_not_fit_are_refused(more, message):
    with pytest.raises(UserError, match=message.replace(".", "[.]")):
        parse_models(plan(**more))


def test_samples_of_another_prompt_are_not_taken(tmp_path):
    """A prompt that evaluate.prompts changes makes other samples, though model, name and problems are the same."""
    config = evaluation_config(tmp_path)
    other = replace(config.prompt, template="Now: {question} <think>")
    with Grader() as grader:
        benchmark(config, grader).answers(0.6, Pass(), {})
        again, changed = benchmark(config, grader), benchmark(config, grader, prompt=other)
        for runs, asked in ((again, 0), (changed, 12)):
            runs.answers(0.6, Pass(), {})
            assert runs.sampler.asked == asked  # type: ignore[union-attr]
        text = changed.data.tokenizer.decode(changed.sampler.prompts[0])  # type: ignore[union-attr]
        assert text == "Now: q 0 <think>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}A: <think>"
    tokenizer.save_pretrained(path)
    make_model(make_tokenizer(), DemoConfig(hidden_size=32, layers=1)).config.save_pretrained(path)
    return path


def test_dry_run_shows_every_prompt_that_models_are_given(tmp_path, folder, capsys):
    chat = {"style": "chat", "instruction": "Box it.\n{question}", "system": "Be short."}
    values = {
        "run": {"dir": str(tmp_path)},
        "prompt": {"template": "{question} <think>"},
        "data": {"sources": [{"name": "demo", "path": "demo", "count": 3}]},
        "evaluate": {"models": [f"a={folder}", f"b={folder}", f"c={folder}"], "prompts": {"b": chat}, "samples": 2,
                     "instructions": ["outside:20", "outside:40"], "instructed": ["a", "c"], "temperatures": [1.0],
                     "max_new_tokens": 64},
    }  # fmt: skip
    config = build(Config, values, "")
    dry_run(config)
    out = capsys.readouterr().out
    question = load_problems(config.data.sources)[0][0].question
    out = re.sub(r" \(\d+ ids, decoded\)", "", out)
    assert f"one prompt, as a sees it:\n---\n{question} <think>\n---" in out
    assert f"one prompt, as b sees it:\n---\nsystem: Be short.\nuser: Box it.\n{question}\nA: <think>\n---" in out
    assert "as c sees it" not in out  # as a's
    assert [f"{name}: 3 problems, {n} answers" in out for name, n in (("a", 18), ("b", 6), ("c", 18))] == [True] * 3


# ---- models that a run exported ----


def test_a_folder_of_exports_stands_for_all_of_them(tmp_path):
    for name in ("step-000100", "step-000005", "step-1000000", "step-000006.tmp", "notes"):
        (tmp_path / "models" / name).mkdir(parents=True)
    config = plan(models=("base=x", f"D={tmp_path}/models"), prompts={"D": {"system": "s"}})
    models = parse_models(config)
    assert [(m.name, m.run, m.step) for m in models] == [
        ("base", "", None), ("D step 5", "D", 5), ("D step 100", "D", 100), ("D step 1000000", "D", 1000000)
    ]  # fmt: skip
    assert models[1].path == str(tmp_path / "models/step-000005") and {m.prompt.system for m in models[1:]} == {"s"}


# ---- the shipped configs ----


EVALUATIONS = [path for path in SHIPPED if path.parent.name != "methods" and load_config(path).evaluate.models]


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_models_of_every_shipped_evaluation_can_be_read(path):
    config = load_config(path)
    models, e = parse_models(config), config.evaluate
    told = len(e.instructions) if not e.instructed or models[-1].name in e.instructed else 0
    assert len(passes(config, models[-1], True)) == 1 + len(e.guidance_factors) + told


def test_the_miniature_of_table_6_asks_what_was_not_trained_on():
    """No problem of the evaluation is in any training set. Each variant is trained on its levels only, in both stages."""
    recipe = Recipe(ROOT / "configs/demo/reproduce.yaml", Path("runs"), ["python"])

    def problems(part: Run | Evaluation) -> dict[str, int | None]:
        config = load_config(recipe.configs / part.config, list(part.overrides))
        banned = {p.question for p in load_problems(config.data.exclude)[0]} if config.data.exclude else set()
        return {p.question: p.level for p in load_problems(config.data.sources)[0] if p.question not in banned}

    names = ("stage1", "stage1_easy", "stage1_hard", "stage2", "stage2_easy", "stage2_hard")
    trained, asked = {name: problems(recipe.runs[name]) for name in names}, problems(recipe.evaluations["data"])
    assert len(asked) > 200 and all(not asked.keys() & found.keys() for found in trained.values())
    levels = {name: set(found.values()) for name, found in trained.items()}
    assert levels["stage1_easy"] == {0} and levels["stage1_hard"] == {1, 2, 3}
    assert levels["stage1"] == set(asked.values()) == {0, 1, 2, 3}
    for name in ("", "_easy", "_hard"):
        assert trained[f"stage1{name}"] == trained[f"stage2{name}"]
