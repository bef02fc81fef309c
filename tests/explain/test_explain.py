"""--explain: the page tells the very step that a normal run does, and its numbers add up.

    python -m pytest tests/explain/test_explain.py

Numbers are read back from the printed page and compared with metrics.jsonl and rollouts.jsonl, with the first step of a
normal run, and with the formulas calculated anew in this file.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from small_run import write_config

import nanolapo.methods.lapo as lapo_module
from nanolapo.config import Config, UserError
from nanolapo.data.load import load_data
from nanolapo.explain.explain import beside, explain, story, watched_step
from nanolapo.explain.page import Section, Table, console, page, visible
from nanolapo.explain.trace import Trace
from nanolapo.grader import Grader
from nanolapo.lengths import LengthMap
from nanolapo.loop import train
from nanolapo.methods import load_method
from nanolapo.methods.lapo import Discovery
from nanolapo.rollouts import Rollout, Rollouts
from nanolapo.session import Session, open_session

ROOT = Path(__file__).parents[2]
SMALL = ("rollout.prompts_per_step=4", "train.batch_size=32")  # for what needs no whole step
TIMING = ("seconds/", "tokens_per_second", "memory_gb")  # may differ between equal steps


def watch(config: Config, method: Any = None) -> tuple[Session, Trace, list[Section]]:
    method = method or load_method(config)
    with open_session(beside(config), method) as s:
        trace = watched_step(s)
        return s, trace, story(s, trace)


def first_line(folder: Path) -> dict[str, Any]:
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    return {name: value for name, value in line.items() if not name.startswith(TIMING)}


def table(section: Section, number: int = 0) -> list[dict[str, str]]:
    found = [item for item in section.body if isinstance(item, Table)][number]
    return [dict(zip(found.head, row, strict=True)) for row in found.rows]


def column(section: Section, name: str, number: int = 0) -> list[float]:
    return [float(row[name]) for row in table(section, number)]


def numbers(sentence: str | Table) -> list[float]:
    assert isinstance(sentence, str)
    return [float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.])", sentence)]


def titled(sections: list[Section], words: str) -> Section:
    [found] = [section for section in sections if words in section.title]
    return found


class Texts(HTMLParser):
    """What a browser would show, and every tag with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag in ("p", "td", "th", "h1", "h2"):
            self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.texts and data.strip():
            self.texts[-1] += data


def shown(sections: list[Section]) -> list[str]:
    """Every text of the story in order, as a page must show it."""
    texts = []
    for number, section in enumerate(sections, start=1):
        texts += [f"{number}. {section.title}", section.where]
        for item in section.body:
            texts += [*item.head, *(cell for row in item.rows for cell in row)] if isinstance(item, Table) else [item]
    return [visible(text) for text in texts]


@pytest.fixture(scope="module")
def told(demo_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Session, Trace, list[Section]]:
    """Stage 1's first step, watched."""
    folder = tmp_path_factory.mktemp("told")
    return folder, *watch(write_config(demo_base, folder))


def test_it_is_the_first_step_of_a_normal_run_bit_for_bit(
    told: tuple[Path, Session, Trace, list[Section]], demo_base: Path, tmp_path: Path
) -> None:
    folder, s, trace, _ = told
    config = write_config(demo_base, tmp_path, "run.export_every=1")
    train(config, load_method(config))
    assert first_line(folder / "explain-run") == first_line(tmp_path / "run")
    rows = [
        (path / "rollouts.jsonl").read_text().splitlines()[:128] for path in (folder / "explain-run", tmp_path / "run")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 128
    weights = load_file(tmp_path / "run/models/step-000001/model.safetensors")
    seen = dict(s.policy.named_weights())
    assert seen.keys() == weights.keys() and all((seen[name] == weights[name]).all() for name in weights)
    assert any((seen[name] != trace.weights_before[name]).any() for name in weights), "nothing was learned"


def test_the_last_table_is_the_line_of_metrics_jsonl(told: tuple[Path, Session, Trace, list[Section]]) -> None:
    folder, _, _, sections = told
    line = json.loads((folder / "explain-run/metrics.jsonl").read_text())
    printed = {}
    text = console(sections)
    for row in text[text.index("The step in metrics.jsonl") :].splitlines()[4:]:
        name, value = row.split()
        printed[name] = None if value == "null" else float(value)
    assert {"reward", "accuracy", "length", "grad_norm", "mismatch", "clip_fraction", "loss"} < printed.keys()
    assert printed == {name: value for name, value in line.items() if name != "step"}
    assert printed["map/moved_mean"] is None, "M(q) cannot have moved in the first step"
    assert (printed["clip_fraction"] or 0) > 0, "no token is clipped: the tests below would prove little"


def test_the_table_of_checks_is_that_of_the_session(told: tuple[Path, Session, Trace, list[Section]]) -> None:
    """Every check of preflight.py with what it proves and found, also the one that needs the weights."""
    _, s, _, sections = told
    rows = table(titled(sections, "checked before the first rollout"))
    assert [tuple(row.values()) for row in rows] == s.preflight.rows
    found = {row["check"]: row["found"] for row in rows}
    assert {"tokenizer ids", "longest position", "end of turn", "trial export", "packed rows"} <= found.keys()
    assert found["packed rows"] == "; ".join(s.policy.packed) and "float32: off by" in found["packed rows"]
    assert all(text in console(sections) for text in ("What was checked before the first rollout", "tokenizer ids"))


def test_the_followed_problem_is_in_rollouts_jsonl_with_the_same_numbers(
    told: tuple[Path, Session, Trace, list[Section]],
) -> None:
    folder, _, trace, sections = told
    rows = [json.loads(line) for line in (folder / "explain-run/rollouts.jsonl").read_text().splitlines()]
    rows = [row for row in rows if titled(sections, "drawn").body[1].startswith(row["problem"] + ",")]
    assert len(rows) == 16
    answers, rewards = titled(sections, "are sampled"), titled(sections, "its reward")
    assert column(answers, "L") == column(rewards, "L") == [row["length"] for row in rows]
    assert [row["text"] for row in table(answers)] == [" ".join(row["text"].split()) for row in rows]
    assert [row["ended"] == "yes" for row in table(answers)] == [row["finished"] for row in rows]
    assert column(titled(sections, "graded"), "c") == column(rewards, "c") == [row["correct"] for row in rows]
    assert len({row["correct"] for row in rows}) == 2, "a page about right and wrong answers has both"
    for name, part in (("c", "correct"), ("alpha R1 (Eq. 5)", "length")):
        assert column(rewards, name) == pytest.approx([row["reward"][part] for row in rows], rel=1e-5)
    for row, graded in zip(rows, table(titled(sections, "graded")), strict=True):
        boxes = re.findall(r"\\boxed\{([^{}]*)(\}?)", row["text"].rpartition("</think>")[2])
        boxed = boxes[-1][0].strip() if boxes and boxes[-1][1] else ""
        assert (
            graded["taken as its answer"] == (boxed or "(none)") and graded["right answer"] == row["reference_answer"]
        )
    assert titled(sections, "M(q)").body[0].endswith(f"after: {trace_target(rows):g} tokens")
    assert "before: not visited yet" in titled(sections, "M(q)").body[0]


def trace_target(rows: list[dict[str, Any]]) -> float:
    return statistics.median(row["length"] for row in rows if row["correct"] and row["finished"])


def percentile(values: list[float], share: float) -> float:
    values = sorted(values)
    place = share * (len(values) - 1)
    low = math.floor(place)
    return values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def test_rewards_and_advantages_follow_from_what_is_printed(told: tuple[Path, Session, Trace, list[Section]]) -> None:
    _, _, _, sections = told
    lengths, right = column(titled(sections, "are sampled"), "L"), column(titled(sections, "graded"), "c")
    typical = [length for length, c in zip(lengths, right, strict=True) if c]
    low, high = percentile(typical, 0.3), percentile(typical, 0.7)
    assert titled(sections, "How long").body == [
        f"Eq. 1, the lengths of the right ones: {', '.join(f'{length:g}' for length in sorted(typical))}",
        f"Eq. 2, what is typical of them: [P30, P70] = [{low:.6g}, {high:.6g}]",
    ]
    rewards = []
    for length, c, d in zip(lengths, right, column(titled(sections, "its reward"), "d"), strict=True):
        outside = 0 if low <= length <= high else min(abs(length - low), abs(length - high))
        assert d == pytest.approx(outside)
        rewards.append(c + 0.7 * c * max(0, 1 - outside / 10))
    assert column(titled(sections, "its reward"), "R_D (Eq. 4)") == pytest.approx(rewards, rel=1e-5)
    mean, spread = statistics.mean(rewards), statistics.stdev(rewards)
    compared = titled(sections, "Compared")
    assert numbers(compared.body[0]) == pytest.approx([mean, spread], rel=1e-5)
    assert column(compared, "A") == pytest.approx([(r - mean) / spread for r in rewards], rel=1e-4)


def test_tokens_and_updates_add_up_to_the_loss(told: tuple[Path, Session, Trace, list[Section]]) -> None:
    _, s, trace, sections = told
    tokens, updates = titled(sections, "Token by token"), titled(sections, "weights move")
    advantages = column(titled(sections, "Compared"), "A")
    counted = [trace.rollouts.lengths_B[first : first + 64].sum() for first in (0, 64)]  # also tokens without advantage
    clipped = 0.0
    [group] = [g for g, p in enumerate(trace.rollouts.problems) if f"{p.id}," in str(titled(sections, "drawn").body[1])]
    for number, extreme in enumerate((max(advantages), min(advantages))):
        told_of = [text for text in tokens.body if isinstance(text, str)][1 + number]
        assert f"A = {extreme:+.6g}, in optimizer step 2 of this step" in told_of
        of_answer = 16 * group + advantages.index(extreme)
        assert told_of.startswith(f"Answer {advantages.index(extreme) + 1},")
        ids, logprobs = trace.rollouts.response_ids[of_answer], trace.rollouts.sampler_logprobs[of_answer]
        assert [int(row["token"]) for row in table(tokens, number)][:: len(table(tokens, number)) - 1] == [1, len(ids)]
        for row in table(tokens, number):
            value = {name: float(row[name]) for name in row if name != "text"}
            t = int(row["token"]) - 1
            assert value["id"] == ids[t] and value["log p sampled"] == pytest.approx(logprobs[t], rel=1e-5, abs=1e-12)
            assert row["text"].replace("\N{OPEN BOX}", " ") == s.data.tokenizer.decode([ids[t]])
            ratio = math.exp(value["log p now"] - value["log p sampled"])
            beyond = ratio > 1.2 if extreme > 0 else ratio < 0.8
            used = min(max(ratio, 0.8), 1.2) if beyond else ratio
            assert value["r"] == pytest.approx(ratio, rel=1e-4) and value["clipped"] == beyond
            assert value["loss"] == pytest.approx(-used * extreme, rel=1e-4)
            assert value["weight"] == pytest.approx(1 / counted[1], rel=1e-5)
            assert value["share"] == pytest.approx(value["loss"] * value["weight"], rel=1e-4)
            assert value["pull"] == pytest.approx(0 if beyond else -ratio * extreme / counted[1], rel=1e-4)
            clipped += value["clipped"]
    assert clipped > 0, "the page shows no clipped token: the lines above would prove little"
    losses, norms = column(updates, "loss"), column(updates, "gradient norm")
    assert sum(losses) / 2 == trace.metrics["loss"] and sum(norms) / 2 == trace.metrics["grad_norm"]
    assert sum(column(updates, "tokens trained")) == trace.metrics["trained_tokens"]
    # The whole step again, token by token, from what was heard.
    terms = []
    clips = tokens_seen = 0
    mismatches = []
    for p in trace.passes:
        for b, row in enumerate(p.x.rows):
            for t in range(len(trace.rollouts.response_ids[row])):
                advantage, now = float(trace.advantages[row]), float(p.x.logprobs_BT[b, t])
                ratio = math.exp(now - float(trace.rollouts.sampler_logprobs[row][t]))
                plain, held = ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage
                terms.append((p.update, -min(plain, held)))
                clips, tokens_seen = clips + (held < plain), tokens_seen + 1
                if p.update == 0:
                    mismatches.append(abs(now - float(trace.rollouts.sampler_logprobs[row][t])))
    for update in (0, 1):
        whole = sum(term for u, term in terms if u == update) / counted[update]
        assert losses[update] == pytest.approx(whole, rel=1e-4, abs=1e-7)
    assert clips / tokens_seen == pytest.approx(trace.metrics["clip_fraction"], rel=1e-6)
    assert statistics.mean(mismatches) == pytest.approx(trace.metrics["mismatch"], rel=1e-3)


def test_the_sync_is_seen_to_be_needed_and_to_work(told: tuple[Path, Session, Trace, list[Section]]) -> None:
    _, _, trace, sections = told
    synced = titled(sections, "new weights")
    before, stale, fresh, _ = numbers(synced.body[2])  # the last is how many new answers there are
    assert before == pytest.approx(trace.metrics["mismatch"], rel=1e-5)
    assert fresh < 1e-5 < 1e-3 < stale
    rows = table(synced)
    assert [row["A"] for row in rows] == [row["A"] for row in table(titled(sections, "Compared"))]
    assert all(row["before"] != row["after"] for row in rows)


def test_page_and_console_say_the_same_and_the_page_needs_nothing_else(
    told: tuple[Path, Session, Trace, list[Section]],
) -> None:
    _, _, _, sections = told
    html = page("a step", sections)
    seen = Texts(html)
    assert seen.texts[1:] == shown(sections)
    flat = " ".join(console(sections).split())
    assert all(" ".join(text.split()) in flat for text in seen.texts[2:])
    assert not {"script", "link", "img", "iframe", "a"} & set(seen.tags)
    assert set(seen.attributes) <= {"lang", "charset", "http-equiv", "content", "class"} and "http:" not in html
    assert "url(" not in html and "@import" not in html


def test_what_a_model_writes_is_text_on_the_page_and_harmless_on_the_console(demo_base: Path, tmp_path: Path) -> None:
    evil = "<script>alert('x')</script> & <b>bold</b>\x1b[2J\x07"

    class Evil(Discovery):
        def edit_rollouts(self, rollouts: Rollouts) -> list[Rollout]:
            for row in rollouts.rows:
                row.text = f"{evil} {row.text}"
            return []

    config = write_config(demo_base, tmp_path, *SMALL)
    _, _, sections = watch(config, Evil(config))
    seen, text = Texts(page("<title>", sections)), console(sections)
    assert not {"script", "b"} & set(seen.tags) and seen.texts[0] == "<title>"
    assert seen.texts[1:] == shown(sections)
    wanted = "<script>alert('x')</script> & <b>bold</b>\\x1b[2J\\x07 "
    assert sum(shown_text.startswith(wanted) for shown_text in seen.texts) == 16
    assert text.count(wanted) == 16 and text.isprintable() is False  # line ends only
    assert all(line.isprintable() for line in text.splitlines())


def test_the_real_run_is_left_alone(demo_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def state() -> dict[str, str]:
        files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        return {str(path): sha256(path.read_bytes()).hexdigest() for path in files}

    config = write_config(demo_base, tmp_path, "train.steps=1", *SMALL)
    train(config, load_method(config))
    before = state()
    assert any("checkpoints" in path for path in before)
    capsys.readouterr()
    for _ in range(2):  # a second page replaces the first
        explain(config, load_method(config))
        assert state() == before
        names = sorted(path.name for path in (tmp_path / "explain-run").iterdir())
        assert [name for name in names if name != "code.diff"] == [  # code.diff: in a git checkout
            "config.yaml", "explain.html", "metrics.jsonl", "rollouts.jsonl",
        ]  # fmt: skip
        assert len((tmp_path / "explain-run/metrics.jsonl").read_text().splitlines()) == 1
    output = capsys.readouterr().out
    assert (
        output.count("13. The step in metrics.jsonl") == 2
        and f"wrote {tmp_path / 'explain-run/explain.html'}" in output
    )


def test_the_sections_are_those_of_the_walkthrough(told: tuple[Path, Session, Trace, list[Section]]) -> None:
    """By number, as it says at its top: each names a file that the section of the page gives as the place of the code."""
    walk = (ROOT / "docs/WALKTHROUGH.md").read_text(encoding="utf-8").partition("\n## Stage 2")[0]
    parts = re.split(r"^## (\d+)\..*$", walk, flags=re.MULTILINE)
    sections = told[3]
    assert parts[1::2] == [str(n) for n in range(1, 12)] and len(sections) == 13
    for number, text in zip(parts[1::2], parts[2::2], strict=True):
        files = re.findall(r"[\w/]+\.py", sections[int(number) - 1].where)
        assert files and any(f"`nanolapo/{file}`" in text for file in files), (number, files)


@pytest.mark.parametrize("unsolved", [False, True])
def test_stage_2(demo_base: Path, tmp_path: Path, unsolved: bool) -> None:
    overrides = ["method.name=lapo:Internalization", f"lapo.length_map={tmp_path}/map.json", "train.steps=5", *SMALL]
    config = write_config(demo_base, tmp_path, *overrides)
    known = LengthMap()
    with Grader() as grader:
        known.entries = {p.id: None if unsolved else 44.4 for p in load_data(config, grader).problems}
    known.save(tmp_path / "map.json")
    s, trace, sections = watch(config)
    answers, rewards = titled(sections, "are sampled"), titled(sections, "its reward")
    lengths, right = column(answers, "L"), column(titled(sections, "graded"), "c")
    middle = statistics.median(length for length, c in zip(lengths, right, strict=True) if c)
    stated, n = (96, middle) if unsolved else (44, 44)
    assert f" {stated} tokens." in titled(sections, "becomes a prompt").body[0]
    assert column(answers, "length asked for") == [stated] * 16
    told = titled(sections, "How long").body
    assert told[1:] == [
        f"M(q) before the step: {'unsolved' if unsolved else '44.4 tokens'}",
        f"n of Eq. 7, the length to keep to: {n:g}",
    ]
    expected = [c + 0.8 * c * math.exp(-((length - n) ** 2) / 72) for length, c in zip(lengths, right, strict=True)]
    assert column(rewards, "R_I (Eq. 6)") == pytest.approx(expected, rel=1e-5)
    ended = [row["ended"] == "yes" for row in table(answers)]
    usable = [length for length, c, e in zip(lengths, right, ended, strict=True) if c and e]
    after = statistics.median(usable) if unsolved else min(44.4, statistics.median(usable))
    assert titled(sections, "M(q)").body[0].startswith("Eq. 8, median")
    assert titled(sections, "M(q)").body[0].endswith(f"after: {after:g} tokens")
    assert trace.metrics["reward"] == first_line(s.config.run_dir)["reward"]
    assert "ANOTHER RULE" not in str(rewards.body[0])


def test_stage_2_says_that_the_code_no_longer_follows_its_formula(
    demo_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A narrower bell than Eq. 7's; the printed sigma must not claim to be what was done."""
    original = lapo_module.internalization_reward
    monkeypatch.setattr(lapo_module, "internalization_reward", lambda *a: original(*a[:-1], 0.9 * a[-1]))
    config = write_config(
        demo_base, tmp_path, "method.name=lapo:Internalization", f"lapo.length_map={tmp_path}/map.json", *SMALL
    )
    known = LengthMap()
    with Grader() as grader:
        known.entries = {p.id: 60.4 for p in load_data(config, grader).problems}
    known.save(tmp_path / "map.json")
    _, _, sections = watch(config)
    assert "ANOTHER RULE" in str(titled(sections, "its reward").body[0])


def test_a_formula_that_the_code_no_longer_follows_says_so(
    told: tuple[Path, Session, Trace, list[Section]],
    demo_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A student edits discovery_reward and looks at the page: the printed Eq. 5 must not claim to be what was done."""
    original, warning = lapo_module.discovery_reward, "ANOTHER RULE"
    monkeypatch.setattr(lapo_module, "discovery_reward", lambda *a, **k: 1.5 * original(*a, **k))
    _, _, sections = watch(write_config(demo_base, tmp_path, *SMALL))
    assert warning in str(titled(sections, "its reward").body[0])
    assert warning not in str(titled(told[3], "its reward").body[0])


def test_a_range_of_one_point_is_told_as_the_code_reads_it(demo_base: Path, tmp_path: Path) -> None:
    """lapo.fidelity=code gives no length reward where P30 = P70: that is a reading of Eq. 5, and no changed code."""
    _, trace, sections = watch(
        write_config(demo_base, tmp_path, "lapo.fidelity=code", "lapo.percentiles=[50, 50]", *SMALL)
    )
    section = titled(sections, "its reward")
    assert column(section, "alpha R1 (Eq. 5)") == [0.0] * trace.rewards_PG.shape[1]
    assert "single point" in str(section.body[0]) and "ANOTHER RULE" not in str(section.body[0])


@pytest.mark.parametrize("name", ["accuracy-only", "dapo", "l1-exact", "drpo", "sas", "aepo", "gfpo"])
def test_other_methods_have_a_page_too(demo_base: Path, tmp_path: Path, name: str) -> None:
    """Their rewards, groups and tokens are looked up in other shapes: answers left out, a prompt per answer, [B, T]."""
    config = write_config(demo_base, tmp_path, f"method={ROOT}/configs/methods/{name}.yaml", *SMALL)
    _, trace, sections = watch(config)
    total = column(titled(sections, "its reward"), "reward")
    parts = table(titled(sections, "its reward"))
    names = [key for key in parts[0] if key not in ("answer", "L", "reward")]
    assert total == pytest.approx([sum(float(row[key]) for key in names) for row in parts], rel=1e-4)
    assert sum(column(titled(sections, "weights move"), "tokens trained")) == trace.metrics["trained_tokens"]
    assert not any("Eq." in text for text in shown(sections))


def test_one_process_only(demo_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(demo_base, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="with python, not with torchrun"):
        explain(config, load_method(config))
    assert not (tmp_path / "explain-run").exists()


def test_the_script_has_the_option_and_evaluate_has_not(demo_base: Path, tmp_path: Path) -> None:
    write_config(demo_base, tmp_path)

    def script(name: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / name), str(tmp_path / "config.yaml"), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=240)

    done = script("train_stage1.py", "--explain", "run.name=other", *SMALL)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "explain-other/explain.html").exists() and not (tmp_path / "other").exists()
    html = Texts((tmp_path / "explain-other/explain.html").read_text())
    flat = " ".join(done.stdout.split())
    assert html.texts[0] == "explain-other: one step" and all(" ".join(t.split()) in flat for t in html.texts[2:])
    both = script("train_stage2.py", "--explain", "--dry-run")
    assert both.returncode == 2 and "not allowed with" in both.stderr
    assert script("evaluate.py", "--explain").returncode == 2
