"""What an evaluation asks: lengths stated where they do not belong, a prompt for each model, models exported on the way.

Run: python -m pytest tests/evaluation/test_passes.py
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from benchmark_helpers import FakeSampler, benchmark, evaluation_config
from shipped import SHIPPED
from tiny import make_config

from nanolapo.config import Config, EvaluateConfig, UserError
from nanolapo.config_file import build, load_config, to_yaml
from nanolapo.data.problems import load_problems
from nanolapo.demo.pretrain import DemoConfig, make_model, make_tokenizer
from nanolapo.evaluation.evaluate import evaluate, stated_lengths
from nanolapo.evaluation.passes import Model, Pass, dry_run, load_sets, parse_models, passes
from nanolapo.evaluation.scores import read_answers
from nanolapo.grader import Grader
from nanolapo.report.tables import label, markdown
from nanolapo.reproduce.recipe import Evaluation, Recipe, Run
from nanolapo.samplers.sampler import Sample

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
    ("instructed", "told"),
    [((), ["I step 10"]), (("D",), ["D step 5", "D step 10"]), (("base", "I"), ["base", "I step 10"])],
)
def test_the_name_of_a_run_stands_for_all_of_its_exports_when_lengths_are_stated(tmp_path, instructed, told):
    for name in ("D/step-000005", "D/step-000010", "I/step-000010"):
        (tmp_path / name).mkdir(parents=True)
    models = ("base=x", f"D={tmp_path}/D", f"I={tmp_path}/I")
    found = names_of_passes(plan(models=models, instructions=["outside:500"], instructed=instructed))
    assert list(found) == ["base", "D step 5", "D step 10", "I step 10"]
    assert [name for name, asked in found.items() if asked == ["", "500 tokens, outside"]] == told
    assert sum(map(len, found.values())) == len(found) + len(told)


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


# ---- the same problems for all models ----


class Writer(FakeSampler):
    """Which answers are right, and how long they are, depends on their seeds and on the length of the prompt."""

    def generate(self, requests, decoding, progress=None, finished=None):
        tokenizer, samples = make_tokenizer(), []
        for n, request in enumerate(requests):
            text = " 0" * (len(request.prompt_ids) + request.seed % 7) + r" \boxed{%s} <end>"
            ids = tokenizer(text % (request.problem.answer if request.seed % 40 < len(request.prompt_ids) else "?"))[
                "input_ids"
            ]
            samples.append(Sample(np.array(ids), np.zeros(len(ids), dtype=np.float32), True))
            finished(n, samples[n])
        return samples


SHORT = "Start at {}. A: add 5. Last 3 digits?"
LONG = "Start at {}. A: add 5. B: add 7. C: add 8. D: add 9. E: add 12. Last 3 digits?"


def two_prompts(folder: Path, model: Path, **of_b: str) -> Config:
    """Models a and b with another prompt; a set of short and long questions, and one of long ones only. A long question (36
    tokens and the template) fits for a alone."""
    sets = {
        "mixed": [(SHORT, 0), (LONG, 1), (SHORT, 2), (LONG, 3), (SHORT, 4)],
        "long": [(LONG, 5), (LONG, 6)],
    }
    for name, asked in sets.items():
        rows = [
            {"problem": text.format(100 + i), "answer": str(100 + i), "level": int(text == LONG)} for text, i in asked
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "run": {"dir": str(folder), "name": "e"},
        "model": {"dtype": "float32"},
        "prompt": {"template": "{question} <think>"},
        "rollout": {"engine": "torch", "max_prompt_tokens": 40},
        "data": {"sources": [{"name": name, "path": str(folder / f"{name}.jsonl")} for name in sets]},
        "evaluate": {"models": [f"a={model}", f"b={model}"], "prompts": {"b": of_b}, "samples": 4, "bootstrap": 10,
                     "max_new_tokens": 80},
    }  # fmt: skip
    return build(Config, values, "")


def test_models_are_compared_on_the_problems_that_fit_for_all(tmp_path, folder, capsys, monkeypatch):
    """Of five problems the two long ones, and a whole set of them, do not fit after b's long prompt: a is not asked either.
    AES by hand, over the three that are left."""
    config = two_prompts(tmp_path, folder, template="Start at 1. A: add 5. B: add 7. {question} <think>")
    monkeypatch.setattr("nanolapo.evaluation.evaluate.make_sampler", lambda *_, **__: Writer())
    rows = evaluate(config)["rows"]
    out = capsys.readouterr().out
    assert [(r["model"], r["set"], r["problems"], r["samples"]) for r in rows] == [
        ("a", "mixed", 3, 12), ("b", "mixed", 3, 12)
    ]  # fmt: skip
    for line in ("left out 4 problems whose prompt is too long for another model", "skipped 4 prompts longer than"):
        assert out.count(line) == 1
    score = {}
    for name in ("a", "b"):
        [file] = (tmp_path / "e/samples").glob(f"{name}--mixed--*.jsonl")
        answers = read_answers(file)
        score[name] = sum(a.correct for a in answers) / 12, sum(a.length for a in answers) / 12
        assert {a.level for a in answers} == {0} and len(answers) == 12
    (right, long), (base_right, base_long) = score["b"], score["a"]
    assert 0 < base_right != right and base_long != long
    factor = 3 if right > base_right else 5
    expected = (base_long - long) / base_long + factor * (right - base_right) / base_right
    assert [r["aes"] for r in rows] == [0, pytest.approx(expected)]
    assert "level 0" in markdown({"base": "a", "rows": rows})
    dry_run(config)
    out = capsys.readouterr().out
    assert "a: 3 problems, 12 answers" in out and "b: 3 problems, 12 answers" in out
    with Grader() as grader:
        a, b = load_sets(config, parse_models(config), grader)
    assert a.longest_prompt == len(make_tokenizer()(SHORT.format(100) + " <think>")["input_ids"]) < b.longest_prompt


def test_models_without_a_common_problem_are_refused(tmp_path, folder):
    """b's chat template makes short questions longer than long ones, so each model keeps what the other one skips."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if 'C: add' in messages[0].content %}?{% else %}" + "?" * 50 + "{% endif %}"
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_bytes((folder / "config.json").read_bytes())
    config = two_prompts(tmp_path, tmp_path / "model", style="chat", instruction="")
    config = replace(config, prompt=replace(config.prompt, template="{question} <think>" + "?" * 10))
    with (
        Grader() as grader,
        pytest.raises(UserError, match="evaluate.models: no problem is left whose prompt is short"),
    ):
        load_sets(config, parse_models(config), grader)


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
    asked = [len(passes(config, model, model is models[-1])) for model in models]
    named = [model for model in models if model.name.partition(" step ")[0] in e.instructed]
    told = len(named) if e.instructed else 1
    assert sum(asked) == len(models) + len(e.guidance_factors) + told * len(e.instructions)


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
