"""What the pages say is what the code does: logged names, messages, keys, files, links, targets. And files stay short.

Run: python -m pytest tests/docs/test_docs.py
"""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from comparison_records import records
from tiny import CPU, make_config, make_rows, update

from nanolapo.config import Config
from nanolapo.config_file import load_config, validate
from nanolapo.evaluation.scores import Answer, add_aes, score_sets
from nanolapo.methods.base import Method
from nanolapo.metrics import RunLog, describe, rollout_metrics
from nanolapo.policy import Policy
from nanolapo.reproduce.comparison import compare_methods
from nanolapo.session import final_model

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nanolapo"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RETURNS_NUMBERS = {  # annotation of a hook -> what its keys are logged under
    "dict[str, float]": "",
    "tuple[Tensor, dict[str, Tensor]]": "",
    "dict[str, np.ndarray]": "reward/",
}


def sections(page: Path) -> dict[str, str]:
    """Text by "## " heading; what comes before the first one is under ""."""
    parts = re.split(r"^## (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def names_in(text: str) -> list[str]:
    """The names in backticks in the first cells of the tables.

    >>> names_in("| name | x |\\n| :-- | :-- |\\n| `a`, `b/c` | `d` |\\n")
    ['a', 'b/c']
    """
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def metrics_page() -> dict[str, str]:
    return sections(ROOT / "docs/METRICS.md")


def metric_names() -> list[str]:
    """Names of the sections that describe a step."""
    page = metrics_page()
    titles = list(page)[: list(page).index("The console line")]
    return [name for title in titles for name in names_in(page[title])]


# ------------------------------------------------------------------------------------- names of a step: metrics.jsonl


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef))


def keys_in(function: ast.FunctionDef) -> set[str]:
    """Keys of its dict displays and of assignments like logged["kl"] = ...; {x} where an f-string has a value."""
    found: list[ast.expr] = []
    for node in ast.walk(function):
        if isinstance(node, ast.Dict):
            found += [key for key in node.keys if key is not None]
        elif isinstance(node, ast.DictComp):
            found.append(node.key)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            found.append(node.slice)
    keys = set()
    for key in found:
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            keys.add(key.value)
        elif isinstance(key, ast.JoinedStr):
            keys.add("".join(str(part.value) if isinstance(part, ast.Constant) else "{x}" for part in key.values))
    return keys


@cache
def names_in_code() -> frozenset[str]:
    """What the source logs in a step: every dict that a hook, the update or the loop makes; f-strings with {x} in them."""
    found: set[str] = set()
    for path in [PACKAGE / "update.py", *sorted(PACKAGE.glob("losses/*.py")), *sorted(PACKAGE.glob("methods/*.py"))]:
        for function in functions(path):
            prefix = RETURNS_NUMBERS.get(ast.unparse(function.returns)) if function.returns else None
            if prefix is not None:
                found |= {prefix + key for key in keys_in(function)}
    for function in functions(PACKAGE / "loop.py"):
        if function.name in ("run_step", "record"):
            found |= keys_in(function)
    phases = re.findall(r'\bwatch\("(\w+)"\)', "".join(path.read_text() for path in PACKAGE.glob("*.py")))
    assert "seconds/{x}" in found and len(phases) >= 4
    found |= {f"seconds/{phase}" for phase in phases}
    return frozenset(found - {"seconds/{x}"} | {"step"})  # step: RunLog.step adds it


def names_of_a_run(folder: Path) -> set[str]:
    """What the pure functions return for small rollouts and updates with every optional loss term."""
    rollouts = make_rows([5, 9, 7, 3], correct=[True, False, True, True])
    rollouts.set_rewards({"correct": rollouts.correct_B.astype(np.float64)})
    found = set(rollout_metrics(rollouts))
    for loss in ({}, {"kl_coef": 0.1, "tis_cap": 2.0}, {"kind": "r2vpo"}):
        found |= set(update(Policy(make_config(folder, loss=loss), CPU), rollouts, [1.0, -1.0, 1.0, 0.5]))
    return found | set(Method(make_config(loss={"kind": "r2vpo"})).loss.after_update({"ratio_variance": 0.1}))


def pattern(name: str) -> str:
    return re.escape(name).replace(re.escape("{x}"), r"\w+")


def test_every_logged_name_is_in_the_page_and_every_name_of_the_page_is_logged(tied_model):
    written, logged = metric_names(), names_in_code() | names_of_a_run(tied_model)
    assert len(written) == len(set(written)), "a name is explained twice"
    missing = [name for name in logged if not any(re.fullmatch(pattern(name), other) for other in written)]
    invented = [name for name in written if not any(re.fullmatch(pattern(other), name) for other in logged)]
    assert not missing, f"logged, but not in docs/METRICS.md: {sorted(missing)}"
    assert not invented, f"in docs/METRICS.md, but not logged: {sorted(invented)}"
    assert len(logged) > 60, "the search has become blind"


def test_the_console_line_has_the_labels_of_the_page(tmp_path, capsys):
    rollouts = make_rows([5, 9, 7, 3], correct=[True, False, True, True])
    metrics = rollout_metrics(rollouts)
    metrics |= dict.fromkeys(("mismatch", "grad_norm", "tokens_per_second", "memory_gb"), 0.5)
    log = RunLog(make_config(run={"dir": str(tmp_path), "name": "r"}), 0, None)
    log.step(0, metrics, 0.01)
    line = capsys.readouterr().out
    labels = re.findall(r"(?<![\w.])[A-Za-z][\w/]*(?: [a-z]+)?", line)
    assert names_in(metrics_page()["The console line"]) == labels


def test_rollout_lines_have_the_names_of_the_page():
    rollouts = make_rows([5, 9])
    row = describe(0, rollouts.rows[0])
    assert names_in(metrics_page()["rollouts.jsonl"]) == list(row)


# ----------------------------------------------------------------------------------------------------- results.json


def answers(correct: bool) -> list[Answer]:
    return [
        Answer(f"s{level}:{k}", f"s{level}", level + k, 0, 5 + k, correct, True, "so")
        for level in (1, 2)
        for k in (0, 1)
    ]


def results() -> dict[str, object]:
    config = make_config(evaluate={"bootstrap": 5})
    rows = [row for name in ("base", "new") for row in score_sets(name, 0.6, "", answers(True), config)]
    add_aes(rows, "base")
    return {"base": "base", "rows": rows}


def test_results_have_the_names_of_the_page():
    """`answers` is added to every row, `run` and `step` to rows of models that a run exported."""
    found = results()
    rows = found["rows"]
    assert isinstance(rows, list)
    text = metrics_page()["results.json of evaluate.py"]
    rows_text, samples_text = text.split("`samples/*.jsonl`")
    logged = {*found, *(key for row in rows for key in row), "run", "step", "answers"}
    assert sorted(names_in(rows_text)) == sorted(logged)
    code = (PACKAGE / "evaluation/evaluate.py").read_text()
    assert '{"run": model.run, "step": model.step}' in code and '{"answers": ' in code
    assert names_in(samples_text) == [field.name for field in dataclasses.fields(Answer)]


def test_comparisons_have_the_names_of_the_page():
    found = {name: records(name, *[([2, 2], [50, 50])] * 2) for name in ("base", "new")}
    made = compare_methods(found, found["base"], set())
    page = metrics_page()
    text = page["results.json of make compare"]
    known = {*names_in(text), *names_in(page["results.json of evaluate.py"])}
    added = {key for row in made["rows"] for key in row}
    assert added <= known and set(names_in(text)) <= added
    assert all(f"`{name}`" in text for name in (*made, "missing", "bases", "tokens"))


# ------------------------------------------------------------------------------------------------- TROUBLESHOOTING.md


def text_of(node: ast.expr) -> str:
    """A string of the source as it is printed, with a NUL for every value in it; "" for what is no string."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "\0"


@cache
def strings_in_code() -> tuple[str, ...]:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))]
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, (ast.Constant, ast.JoinedStr)))
    return tuple(text_of(node) for node in nodes)


def says(text: str, quote: str) -> bool:
    """Does this string of the code contain the quote, whose "..." stands for a value?

    >>> says("the files lack \\0 weights of \\0", "lack ... weights"), says("lack \\0 weights", "lack weights")
    (True, False)
    """
    return (
        re.search(r".*?\0.*?".join(re.escape(part.strip(" ")) for part in quote.split("...")), text, re.DOTALL)
        is not None
    )


def quotes() -> list[str]:
    return names_in((ROOT / "docs/TROUBLESHOOTING.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("quote", quotes())
def test_a_quoted_message_is_printed_by_the_code(quote):
    assert any(says(text, quote) for text in strings_in_code()), quote


def stopping_messages() -> list[str]:
    """Texts of everything that stops a run or warns: RunStopped and its subclasses, warnings, the alarms' sentences."""
    stops, found = {"RunStopped", "MismatchError", "BadStepsError", "warn"}, list[str]()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args:
                name, text = ast.unparse(node.func).split(".")[-1], text_of(node.args[0])
                if name in stops or (name == "say" and text.startswith("WARNING")):
                    found.append(text)
            if path.name == "alarms.py" and isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "symptoms":
                assert isinstance(node.value, ast.List)
                found += [text_of(entry.elts[-1]) for entry in node.value.elts if isinstance(entry, ast.Tuple)]
    return found


def test_every_alarm_is_in_the_troubleshooting_page():
    messages = stopping_messages()
    assert len(messages) >= 14
    unexplained = [text for text in messages if not any(says(text, quote) for quote in quotes())]
    assert not unexplained


# ------------------------------------------------------------------------------- keys, files, links and make targets


def pages() -> list[pytest.ParameterSet]:
    return [pytest.param(path, id=path.name) for path in PAGES]


def quoted(page: Path) -> list[str]:
    """Everything in backticks, and the words of indented commands; of COMING_FROM.md's tables only our column."""
    text = page.read_text(encoding="utf-8")
    if page.name == "COMING_FROM.md":
        text = "\n".join(our_column(line) if line.startswith("| ") else line for line in text.splitlines())
    code = [line.split("#")[0] for line in text.splitlines() if line.startswith("    ")]
    return re.findall(r"`([^`\n]+)`", text) + " ".join(code).split()


def our_column(row: str) -> str:
    """
    >>> our_column("| seed | `run.seed` | `seed` | `data.seed` | `--train.seed` |")
    ' `run.seed` '
    """
    what, ours, *theirs = row.strip("|").split("|")
    assert len(theirs) == 3, row
    return ours


ENDINGS = (".py", ".md", ".yaml", ".json", ".jsonl", ".safetensors")


def section_names() -> set[str]:
    return {field.name for field in dataclasses.fields(Config)}


def config_keys(text: str) -> list[str]:
    """What looks like a key of the config: section.key, alone or with a value.

    >>> config_keys("set rollout.top_p=1.0, not loop.py or data.py, nor model/x")
    ['rollout.top_p']
    """
    found = re.findall(r"(?<![\w./-])([a-z_]+\.[a-z_]+)(?![\w./(])", text)
    return [key for key in found if key.split(".")[0] in section_names() and not key.endswith(ENDINGS)]


def is_key(key: str) -> bool:
    section, name = key.split(".")
    return name in {field.name for field in dataclasses.fields(getattr(Config(), section))}


@pytest.mark.parametrize("page", [page for page in pages() if page.id != "LOG.md"])  # a log names keys of its day
def test_config_keys_exist(page):
    keys = [key for text in quoted(page) for key in config_keys(text)]
    assert not [key for key in keys if not is_key(key) and key not in READERS]


def test_every_row_of_coming_from_names_what_we_have():
    """A key, a method's file, a dash, or words."""
    text = (ROOT / "docs/COMING_FROM.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| :--", "| what"))]
    keys = [key for row in rows for key in config_keys(our_column(row))]
    assert len(rows) > 50 and len(keys) > 45 and all(map(is_key, keys))


def test_the_search_for_keys_sees(tmp_path):
    (tmp_path / "a.md").write_text("`rollout.top_pp=1`, `wandb.mode` and\n\n    python x.py model.pth=y  # run.no\n")
    keys = [key for text in quoted(tmp_path / "a.md") for key in config_keys(text)]
    assert keys == ["rollout.top_pp", "wandb.mode", "model.pth"] and list(map(is_key, keys)) == [False, True, False]


FOLDERS = ("configs", "docs", "nanolapo", "tests")
READERS = (  # a page shows how to write them, or asks for them
    "mine.yaml", "nanolapo/methods/brief.py", "configs/methods/brief.yaml", "nanolapo/methods/cosine.py",
    "configs/methods/cosine.yaml", "lapo.one_sided",
)  # fmt: skip


def paths_in(text: str) -> list[str]:
    """What looks like a file or folder of the project; NAME, NN and * stand for something.

    >>> paths_in("python nanolapo/reproduce/seeds.py configs/demo/ x/y, train_stage1.py; ../z configs/methods/NAME.yaml")
    ['nanolapo/reproduce/seeds.py', 'configs/demo/', 'train_stage1.py']
    """
    pattern = rf"(?<![\w./-])((?:(?:{'|'.join(FOLDERS)})/[\w./*-]*|\w+\.(?:py|md|yaml|toml))(?<![.]))"
    return [path for path in re.findall(pattern, text) if not re.search(r"NAME|NN|\*", path)]


@pytest.mark.parametrize("page", pages())
def test_files_exist(page):
    """Relative to the project's root; a bare name may lie deeper, or be a file that the code writes."""
    below = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")} | {*READERS}
    for path in (path for text in quoted(page) for path in paths_in(text)):
        is_written = any(path in text for text in strings_in_code())
        assert (ROOT / path).exists() or path in below or is_written, f"{page.name} names {path}"


def anchors(page: Path) -> set[str]:
    """What GitHub makes of headings: lower case, no punctuation, hyphens for blanks."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", pages())
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = re.findall(r"(?:`|    )make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"))
    assert not set(named) - targets


def test_the_example_with_your_own_model_is_a_config_and_its_commands_fit_together(tmp_path):
    page = (ROOT / "docs/CONFIGURING.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```yaml\n(# mine\.yaml\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text.replace("extends: ", f"extends: {ROOT}/"), encoding="utf-8")
    commands = [line.split("#")[0].split() for line in page.splitlines() if "mine.yaml run.name=" in line]
    configs = {}
    for _, script, path, *overrides in commands:
        config = load_config(tmp_path / path, [word for word in overrides if word != "--dry-run"])
        validate(config, world_size=1)
        configs[script, config.run.name] = config
    assert set(configs) == {
        ("train_stage1.py", "stage1"), ("train_stage2.py", "stage2"), ("evaluate.py", "evaluate_base")
    }  # fmt: skip
    first, second = configs["train_stage1.py", "stage1"], configs["train_stage2.py", "stage2"]
    assert Path(second.model.path) == final_model(first)
    assert Path(second.lapo.length_map) == first.run_dir / "length_map.json"
    assert configs["evaluate.py", "evaluate_base"].evaluate.models == (f"base={first.model.path}",)


# -------------------------------------------------------------------------------------------------- the files themselves


def test_the_walkthrough_shows_how_the_two_scripts_differ():
    """The real output of diff, and short enough for a screen."""
    page = (ROOT / "docs/WALKTHROUGH.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```diff\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    command = ["diff", "train_stage1.py", "train_stage2.py"]
    assert shown == [subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout]
    assert len(shown[0].splitlines()) <= 28


def test_the_readme_counts_the_lines_of_the_files_to_read_first():
    """Within 5 %."""
    table = sections(ROOT / "README.md")["The plan of the house"]
    rows = re.findall(r"^\| (\d) \| `(nanolapo/[\w/]+\.py)` \| (\d+) \|", table, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, 9))
    for _, path, lines in rows:
        assert int(lines) == pytest.approx(len((ROOT / path).read_text(encoding="utf-8").splitlines()), rel=0.05), path


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_short(path):
    """A rival should be read at one sitting; base.py is no rival, lapo.py two stages side by side."""
    is_rival = path.parent.name == "methods" and path.name not in ("base.py", "lapo.py")
    length = len(path.read_text(encoding="utf-8").splitlines())
    assert length <= (130 if is_rival else 300)
