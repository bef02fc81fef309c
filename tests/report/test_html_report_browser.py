"""report.html in a real browser, where there is one: its filters choose what they say, and answers are text.

Run: python -m pytest tests/report/test_html_report_browser.py
"""

from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_dirs import NASTY, html, read_rows, rollout, two_stages, write_evaluation, write_run


class Document(HTMLParser):
    """What a browser shows: the text of elements by their path of (tag, class, id), without scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.path: list[tuple[str, str]] = []
        self.texts: list[tuple[tuple[tuple[str, str], ...], str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag not in ("meta", "input", "col", "br", "link", "img"):
            self.path.append((tag, found.get("id") or found.get("class") or ""))

    def handle_endtag(self, tag):
        while self.path and self.path.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if not any(tag in ("script", "style") for tag, _ in self.path):
            self.text += data
            self.texts.append((tuple(self.path), data))

    def under(self, *names: str) -> list[str]:
        """The texts that lie under elements with all these tags, ids or classes."""
        return [text for path, text in self.texts if all(any(name in step for step in path) for name in names)]


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """browse(page, hash): the document of a page in a headless Chromium after its program ran, where there is one."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on PATH")
    folder = tmp_path_factory.mktemp("browser")

    def dump(path: Path, state: str = "") -> Document:
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom",
                   f"--user-data-dir={folder}", f"file://{path}{state}"]  # fmt: skip
        return Document(subprocess.run(command, capture_output=True, timeout=120).stdout.decode("utf-8", "replace"))

    probe = folder / "probe.html"
    probe.write_text("<p>readable</p>")
    if "readable" not in dump(probe).text:
        pytest.skip("this Chromium cannot read temporary files")
    return dump


@pytest.mark.slow
def test_in_a_browser_filters_choose_what_they_say_and_answers_are_text(tmp_path, browse):
    folders = two_stages(tmp_path)
    rows = [(f.name, row) for f in folders for row in read_rows(f / "rollouts.jsonl")]
    whole = [
        text.replace("\0", "") for text in NASTY if text.encode("utf-8", "ignore").decode() == text
    ]  # to print them
    nasty = [rollout(90 + i, f"n{i}", question=text, text=text, level=None) for i, text in enumerate(whole)]
    folders.append(write_run(tmp_path / "stage3", nasty))
    write_evaluation(tmp_path / "evaluate")
    out = tmp_path / "report.html"
    out.write_text(html(*folders, tmp_path / "evaluate"), encoding="utf-8", newline="\n")

    for state, test in (
        ("run=1&verdict=0", lambda name, row: name == "stage2" and not row["correct"]),
        (
            "ending=1&level=0&step1=1&step2=1&length1=20&length2=45",
            lambda name, row: row["finished"] and row["level"] == 0 and row["step"] == 1 and 20 <= row["length"] <= 45,
        ),
        ("problem=QUESTION+Q01&answer=STAGE1", lambda name, row: row["problem"] == "q01" and name == "stage1"),
    ):
        shown = browse(out, f"#rollouts?{state}")
        wanted = [(name, row) for name, row in rows if test(name, row)]
        assert wanted and shown.under("section-rollouts", "bar", "span") == [
            f"{len(wanted)} of {len(rows) + len(nasty)} rollouts; page 1 of 1"
        ]
        name, row = wanted[0]
        assert shown.under("section-rollouts", "pane", "h3") == [f"{name}, step {row['step']}"]
        assert shown.under("section-rollouts", "pane", "pre") == [row["question"], row["text"]]
        facts = shown.under("section-rollouts", "pane", "dd")
        parts = [row["reward"]["correct"], row["reward"]["length"]]
        assert facts[:2] == ["7", f"{row['length']} tokens"]
        assert [float(x) for x in facts[3:6]] == pytest.approx([*parts, sum(parts)], abs=1e-4)

    shown = browse(out, "#rollouts?run=2&open=22")  # the first of stage3: 11 rows each in stage1 and stage2
    assert {row["question"] for row in nasty} <= set(shown.under("section-rollouts", "tbody"))
    assert shown.under("section-rollouts", "pane", "pre") == ["<script>alert(1)</script>"] * 2

    shown = browse(out, "#pairs?verdict=01")  # base 111101 against 110111: right only on the right
    assert shown.under("section-pairs", "bar", "span")[0].startswith(
        "1 pairs: left 0.0% right, 32.0 tokens; right 100.0% right, 12.0 tokens"
    )
    assert shown.under("section-pairs", "sides", "h3") == ["base", "org/new"]
    assert shown.under("section-pairs", "sides", "pre") == ["20 2 0", "0 2 0"]
    assert "how much is 2?" in shown.under("section-pairs", "pane", "pre")
