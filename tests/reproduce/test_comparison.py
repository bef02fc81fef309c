"""The table of make compare: numbers by hand, which pairs differ, what is missing, and real comparisons with a failure.

Run: python -m pytest tests/reproduce/test_comparison.py
"""

from __future__ import annotations

import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from comparison_records import record, records
from matplotlib.image import imread
from matplotlib.text import Text
from small_recipe import run_recipe, write_recipe
from tiny import make_answer

from nanolapo.config import UserError
from nanolapo.report.plots import FEW, write_comparison_figures
from nanolapo.report.ranking import ranking_figure
from nanolapo.report.tradeoff import COLOURS, methods_figure
from nanolapo.reproduce import records as records_module
from nanolapo.reproduce.comparison import compare_methods, comparison_table, comparison_text
from nanolapo.reproduce.recipe import Recipe
from nanolapo.reproduce.records import Record, costs, file_of, of_other_bases, place, read, shorter, write
from nanolapo.reproduce.reproduce import write_methods

BASE = ([2, 2, 2, 2], [100, 100, 100, 100])


def three_methods() -> dict[str, list[Record]]:
    """`good` saves half of the tokens on both seeds, `even` nearly as much on their mean, `bad` is wrong."""
    return {
        "base": records("base", BASE, BASE),
        "bad": records("bad", ([0, 0, 0, 1], [90, 90, 90, 90]), ([0, 0, 1, 0], [91, 91, 91, 91])),
        "good": records("good", ([2, 2, 2, 2], [50, 50, 50, 50]), ([2, 2, 2, 2], [52, 52, 52, 52])),
        "even": records("even", ([2, 2, 2, 2], [20, 20, 20, 20]), ([2, 2, 2, 2], [84, 84, 84, 84])),
    }


def made(found: dict[str, list[Record]], unverified: set[str] = frozenset()) -> dict:  # type: ignore[assignment]
    return compare_methods(found, found["base"], set(unverified))


def row_of(found: dict, name: str) -> dict:
    return next(row for row in found["rows"] if row["model"] == name)


# --------------------------------------------------------------------------------------------------------------- the table


def test_rows_by_hand() -> None:
    found = made(three_methods(), {"bad"})
    assert [row["model"] for row in found["rows"]] == ["good", "even", "base", "bad"]
    good, bad = row_of(found, "good"), row_of(found, "bad")
    assert (good["accuracy"], good["tokens"], good["aes"]) == (1, 51, pytest.approx(0.49))
    half = 12.7062 * 1 / 2**0.5 * 2**0.5  # t of one degree; a standard deviation of sqrt(2) over two seeds
    assert good["tokens_interval"] == pytest.approx((51 - half, 51 + half), rel=1e-3)
    assert bad["accuracy"] == pytest.approx(1 / 8) and bad["aes"] == pytest.approx(1 - 0.905 - 5 * 7 / 8)
    assert bad["accuracy_interval"][0] == 0  # no share is below 0
    assert (good["seeds"], good["setting"], good["sampled_tokens"], good["seconds"]) == ([0, 1], "", 1000, 8)
    assert bad["unverified"] and not good["unverified"] and "sampled_tokens" not in row_of(found, "base")
    assert good["worst"] == {"accuracy": 1.0, "tokens": 52.0, "aes": pytest.approx(0.48)}
    assert [row["pareto"] for row in found["rows"]] == [True, False, False, False]
    shares = {row["model"]: row["front_share"] for row in found["rows"]}
    assert shares["base"] == shares["bad"] == 0
    # `even` is on the front where both seeds drawn are 20 long: a quarter. `good` is off it there.
    assert shares["even"] == pytest.approx(0.25, abs=0.03) and shares["good"] == pytest.approx(0.75, abs=0.03)


def test_which_pairs_differ() -> None:
    """Twelve seeds: base and good differ by what they are, split only by chance."""
    split = [([2] * 4, [80 + 40 * (i % 2)] * 4) for i in range(12)]
    found = made({
        "base": records("base", *[BASE] * 12),
        "good": records("good", *[([2] * 4, [50 + i % 3] * 4) for i in range(12)]),
        "split": records("split", *split),
        "wrong": records("wrong", *[([1, 1, 1, i % 2], [100 + i % 2] * 4) for i in range(12)]),
    })  # fmt: skip
    better = {row["model"]: set(row["better_than"]) for row in found["rows"]}
    assert better == {"good": {"base", "split", "wrong"}, "base": {"wrong"}, "split": {"wrong"}, "wrong": set()}
    assert {row["model"]: len(row["worse_than"]) for row in found["rows"]} == {
        "good": 0,
        "base": 1,
        "split": 1,
        "wrong": 3,
    }
    assert [row["model"] for row in found["rows"] if row["like_best"]] == ["good"]
    [pairs] = found["pairs"]
    assert (pairs["pairs"], pairs["aes"], pairs["accuracy"]) == (6, 5, 3)  # accuracy: wrong against the three
    assert pairs["tokens"] in (3, 4) and pairs["aes_uncorrected"] >= pairs["aes"]  # tokens: good against the three
    text = comparison_text(tokens=7, missing={}, bases=[], **found)
    assert (
        "| **good** \\* |" in text
        and "| 3 / 0 |" in text
        and "Of 6 pairs of methods, 5 differ in AES, 3 in acc" in text
    )


def test_a_correction_for_more_pairs_finds_fewer() -> None:
    """One difference with p = 0.03 is real alone, and is not among the six pairs of four methods."""
    tokens = [90, 96, 88, 101, 89]
    one = {"base": records("base", *[BASE] * 5), "new": records("new", *[([2] * 4, [n] * 4) for n in tokens])}
    alone = made(one)["pairs"][0]
    others = {f"same{i}": records(f"same{i}", *[([2] * 4, [100 + i] * 4)] * 5) for i in range(2)}
    among = made(one | others)
    assert alone["aes"] == alone["aes_uncorrected"] == 1 and among["pairs"][0]["aes_uncorrected"] > 1
    assert "base" not in row_of(among, "new")["better_than"]


def test_with_one_seed_nothing_is_tested_and_that_is_said() -> None:
    found = made({name: mine[:1] for name, mine in three_methods().items()})
    assert found["pairs"][0]["pairs"] == 0 and all(row["better_than"] == [] for row in found["rows"])
    text = comparison_text(tokens=7, **found)
    assert "no difference can be tested" in text and "| **" not in text  # nobody is shown as the best


def test_two_seeds_are_too_few_for_a_test_and_who_was_not_tested_is_not_apart() -> None:
    assert made(three_methods())["pairs"][0]["pairs"] == 0
    three = [([2] * 4, [50 + i] * 4) for i in range(3)]
    new = records("new", ([2] * 4, [60] * 4))
    found = made({"base": records("base", *[BASE] * 3), "good": records("good", *three), "new": new})
    assert found["pairs"][0]["pairs"] == 1 and row_of(found, "good")["better_than"] == ["base"]
    assert {row["model"]: row["like_best"] for row in found["rows"]} == {"good": True, "new": True, "base": False}


def test_each_seed_is_measured_against_its_own_base() -> None:
    """Another machine made another base for the same seed; the newest line of the base is not everybody's."""
    bases = [record("base", 0, *BASE), record("base", 0, [2] * 4, [200] * 4, base="c"), record("base", 1, *BASE)]
    mine = [record("m", 0, [2] * 4, [100] * 4, base="c"), record("m", 1, [2] * 4, [50] * 4)]
    there = {"base": bases[1:], "m": mine, "n": records("n", BASE)}
    found = compare_methods(there, bases, set())
    low, high = row_of(found, "m")["aes_interval"]
    assert (low + high) / 2 == pytest.approx(0.5)  # half of 200, half of 100


def test_adaptivity_and_its_interval_are_of_the_problems_that_have_a_level() -> None:
    """Those without one are much longer: they change the mean tokens, and nothing of the adaptivity."""

    def without_level_left_out(one: Record) -> Record:
        [at] = one.scores
        kept = [q for q, level in enumerate(at["levels"]) if level is not None]
        return dataclasses.replace(
            one, scores=[at | {key: [at[key][q] for q in kept] for key in ("levels", "accuracy", "tokens")}]
        )

    lengths = [[50 + i, 52, 100, 103 + i, 1000, 1010, 54, 56 + i, 98, 107 + 3 * i, 900, 1100] for i in range(3)]
    found = {"base": records("base", *[([2] * 12, [100] * 12)] * 3)}
    found["m"] = records("m", *[([2] * 12, tokens) for tokens in lengths])
    fewer = {name: [without_level_left_out(one) for one in mine] for name, mine in found.items()}
    assert (
        found["m"][0].scores[0]["levels"] == [0, 0, 1, 2, None, None] * 2
        and len(fewer["m"][0].scores[0]["tokens"]) == 8
    )
    row, (low, high) = row_of(made(found), "m"), row_of(made(fewer), "m")["adaptivity_interval"]
    value = (100 + 104 + 98 + 110 - 51 - 52 - 54 - 57) / 4  # of the middle seed, and so their mean
    assert row["adaptivity"] == pytest.approx(value) and (low + high) / 2 == pytest.approx(value) and low < value < high
    assert row["adaptivity_interval"] == pytest.approx((low, high))


def test_who_started_from_another_base_than_most_is_marked() -> None:
    """Also where a method has more seeds than others, and where only its last seed is of another machine."""
    mine = {"base": records("base", BASE, BASE), "m": records("m", BASE, BASE), "n": records("n", BASE)}
    assert of_other_bases(mine) == []
    mine["late"] = [record("late", 0, *BASE), record("late", 1, *BASE, base="c")]
    mine["p"] = [record("p", 1, *BASE, base="b")]
    assert of_other_bases(mine | {"o": records("o", BASE, BASE)}) == ["late"]
    assert of_other_bases({"base": [record("base", 0, *BASE, base="c")], "m": records("m", BASE)}) == ["base"]
    found = compare_methods(mine, [*mine["base"], record("base", 1, *BASE, base="c")], {"late"})
    text = comparison_text(tokens=1, bases=["late"], **found)
    assert "late (u) †" in text and text.count("†") == 2 and "† from other base models than most" in text
    assert "†" not in comparison_text(tokens=1, bases=[], **found)


@pytest.mark.parametrize("method", ["base", "good"])
def test_other_problems_are_refused(method: str) -> None:
    found = three_methods()
    found[method][1].scores[0]["problems"] = "others"
    with pytest.raises(UserError, match=f"{method}, seed 1 answered other problems than the rest"):
        made(found)


def test_a_base_without_a_right_answer_gives_dashes() -> None:
    never = [
        dataclasses.replace(one, scores=[one.scores[0] | {"accuracy": [0] * 4}]) for one in records("base", BASE, BASE)
    ]
    for one in never:
        one.scores[0]["row"] |= {"accuracy": 0.0, "aes": None}
    mine = records("m", BASE, BASE)
    for one in mine:
        one.scores[0]["row"]["aes"] = None
    table = comparison_table(made({"base": never, "m": mine})["rows"])
    head, _, *lines = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
    assert "nan" not in table and [line[head.index("AES (95 %)")] for line in lines] == ["-", "-"]


def test_settings_and_what_is_missing_are_shown() -> None:
    mine = [record("m", seed, *BASE, setting="double") for seed in (0, 1)]
    found = made({"base": records("base", BASE, BASE), "m": mine})
    assert "| m | double |" in comparison_table(found["rows"]).replace("**", "").replace(" \\*", "")
    assert "| setting |" not in comparison_table(made(three_methods())["rows"])
    text = comparison_text(tokens=1, missing={"sas, seed 2": "sas did not end well: no blank lines"}, **found)
    assert "**Not in the table:** sas, seed 2: sas did not end well: no blank lines\n" in text


def test_the_picture_shows_every_method_with_its_intervals_and_the_front() -> None:
    found = made(three_methods())
    [front] = found["fronts"]
    figure = methods_figure(found["rows"], front)
    figure.draw_without_rendering()
    [axis] = figure.axes
    names = [text.get_text().split("\n") for text in axis.texts]
    assert sorted(name.split(" (")[0] for place in names for name in place) == ["bad", "base", "even", "good"]
    assert {len(place) for place in names} == {1, 2}  # good and even, 51 and 52 tokens, share a place
    good = row_of(found, "good")
    [[name]] = [[name for name in place if name.startswith("good")] for place in names if len(place) == 2]
    assert name == f"good (front {good['front_share']:.0%})" and ["bad"] in names
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()]
    for row in found["rows"]:
        across, up = row["tokens_interval"], [100 * bound for bound in row["accuracy_interval"]]
        assert (list(across), [100 * row["accuracy"]] * 2) in drawn and ([row["tokens"]] * 2, up) in drawn
    best = sorted((r["tokens"], 100 * r["accuracy"]) for r in found["rows"] if r["pareto"])
    x, y = zip(*best, (front["tokens"][-1], best[-1][1]), strict=True)
    line = axis.get_lines()[drawn.index((list(x), list(y)))]
    assert line.get_drawstyle() == "steps-post" and len(axis.collections) == 1  # no method is above it
    boxes = [Text.get_window_extent(text) for text in axis.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_names_of_one_place_stay_inside_the_picture() -> None:
    """Nine methods are right in everything: their names, one below the other, would stand above the upper edge."""
    mine = {f"m{i}": records(f"m{i}", ([2] * 4, [50] * 4), ([2] * 4, [50] * 4)) for i in range(9)}
    bad = {"bad": records("bad", ([0, 0, 0, 1], [90] * 4), ([0, 0, 1, 0], [91] * 4))}
    found = made({"base": records("base", BASE, BASE)} | mine | bad)
    figure = methods_figure(found["rows"], found["fronts"][0])
    figure.draw_without_rendering()
    [axis] = figure.axes
    [box] = [Text.get_window_extent(text) for text in axis.texts if text.get_text().count("\n") == 8]
    frame = axis.get_window_extent()
    assert frame.y0 <= box.y0 and box.y1 <= frame.y1 + 5


def test_many_methods_are_lines_with_their_numbers_and_the_worst_seed() -> None:
    """Those of docs/RESULTS.md."""
    found = json.loads((Path(__file__).parents[2] / "docs/results/field.json").read_text())
    rows = [row for row in found["rows"] if row["temperature"] == 0.6]
    figure = ranking_figure(rows)
    figure.draw_without_rendering()
    labels = figure.axes[0].get_yticklabels()
    assert [label.get_text().split(" (")[0] for label in labels] == [row["model"] for row in rows]
    assert labels[0].get_text() == f"{rows[0]['model']} (front {rows[0]['front_share']:.0%})"
    marked = ranking_figure(rows, [rows[1]["model"], "base"]).axes[0].get_yticklabels()
    assert [row["model"] for row, label in zip(rows, marked, strict=True) if label.get_text().endswith(" †")] == [
        row["model"] for row in rows if row["model"] in (rows[1]["model"], "base")
    ]
    bottom, top = figure.axes[0].get_ylim()
    assert bottom > top  # line 0, the best, is on top
    blue = [row["model"] for row, label in zip(rows, labels, strict=True) if label.get_color() == COLOURS[0]]
    assert blue == [row["model"] for row in rows if row["like_best"]] and 0 < len(blue) < len(rows)
    for axis, (key, scale) in zip(figure.axes, (("aes", 1), ("accuracy", 100), ("tokens", 1)), strict=True):
        drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()]
        for height, row in enumerate(rows):
            assert ([scale * bound for bound in row[f"{key}_interval"]], [height, height]) in drawn
            assert ([scale * row[key]], [height]) in drawn and ([scale * row["worst"][key]], [height]) in drawn
    boxes, frame = [Text.get_window_extent(label) for label in labels], figure.bbox
    assert all(frame.x0 <= box.x0 for box in boxes)
    assert not any(box.overlaps(above) for above, box in zip(boxes, boxes[1:], strict=False))


@pytest.mark.parametrize(("methods", "wide"), [(FEW - 1, True), (FEW, False)])
def test_a_base_that_is_never_right_has_a_picture_too(tmp_path: Path, methods: int, wide: bool) -> None:
    found = made(
        {"base": records("base", BASE, BASE)} | {f"m{i}": records(f"m{i}", BASE, BASE) for i in range(methods)}
    )
    for row in found["rows"]:
        row["aes"] = row["worst"]["aes"] = None
        row.pop("aes_interval")
    [path] = write_comparison_figures(tmp_path, found["rows"], found["fronts"])
    height, width, _ = imread(path).shape
    assert width == 1600 and (height == 896) == wide


def test_a_name_that_is_no_formula_can_be_drawn(tmp_path: Path) -> None:
    odd = "cost $\\bad{$"
    found = made({"base": records("base", BASE, BASE), odd: records(odd, BASE, BASE)})
    [path] = write_comparison_figures(tmp_path, found["rows"], found["fronts"])
    assert path == tmp_path / "methods-s-T0.6.png" and path.stat().st_size > 5000


# ------------------------------------------------------------------------------------------------------------- the records


def test_a_record_takes_the_place_of_its_seed_only(tmp_path: Path) -> None:
    old, other, new = record("m", 1, *BASE), record("m", 0, *BASE), record("m", 1, *BASE, digest="new")
    for one in (old, other, new, record("n", 1, *BASE)):
        write(tmp_path, one)
    assert [(one.seed, one.digest) for one in read(tmp_path, "m")] == [(0, "d"), (1, "new")]
    assert len(read(tmp_path, "n")) == 1 and read(tmp_path, "o") == [] and read(tmp_path, "m")[0].costs == old.costs
    for base in "abb":
        write(tmp_path, record("base", 1, *BASE, base=base))
    assert [one.base for one in read(tmp_path, "base")] == ["a", "b"]  # that of another machine stays
    whole = file_of(tmp_path, "m").read_bytes()
    for broken in (b'{"seed": 3}', b'{"method": "\xc3', b"[]", b"<<<<<<< HEAD"):
        file_of(tmp_path, "m").write_bytes(whole + broken + b"\n")
        with pytest.raises(UserError, match=r"m\.jsonl, line 3: no result of a comparison .*; delete the line"):
            read(tmp_path, "m")
    file_of(tmp_path, "m").write_bytes(whole + whole.splitlines()[1] + b"\n")
    with pytest.raises(UserError, match=r"m\.jsonl: two lines are of seed 1, as after a merge; delete one of them"):
        read(tmp_path, "m")


def test_two_writers_of_one_file_lose_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commands with --out folders of their own may share the records. Each reads all lines, then writes all lines."""

    def slow(folder: Path, method: str) -> list[Record]:
        found = read(folder, method)
        time.sleep(0.05)
        return found

    monkeypatch.setattr(records_module, "read", slow)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: write(tmp_path, record("m", seed, *BASE)), range(8)))
    assert [one.seed for one in read(tmp_path, "m")] == list(range(8))


def test_a_base_that_is_never_right_in_some_draws_tells_nothing_by_aes() -> None:
    """AES has no value in a draw of problems in which the base is never right, so its error is unknown."""
    bases = records("base", *[([1] + [0] * 3, [50] * 4)] * 3)
    found = made({"base": bases, "good": records("good", *[([2] * 4, [10] * 4)] * 3)})
    assert found["pairs"][0]["aes"] == 0 and row_of(found, "good")["better_than"] == []
    assert "nan" not in comparison_table(found["rows"])


def test_without_any_aes_nobody_is_bold() -> None:
    never = [
        dataclasses.replace(one, scores=[one.scores[0] | {"accuracy": [0] * 4}]) for one in records("base", *[BASE] * 3)
    ]
    mine = records("m", *[BASE] * 3)
    for one in [*never, *mine]:
        one.scores[0]["row"]["aes"] = None
    found = made({"base": never, "m": mine})
    assert found["pairs"][0]["pairs"] == 1 and not any(row["like_best"] for row in found["rows"])


def test_where_no_answer_was_wrong_the_interval_says_how_many_could_be() -> None:
    found = made(three_methods())
    assert row_of(found, "base")["accuracy_interval"] == (1 - 3 / 4, 1.0)
    assert row_of(found, "bad")["accuracy_interval"][1] > row_of(found, "bad")["accuracy"]
    right = [([2] * 7, [50] * 7)] * 2  # the weights of seven problems do not add up to 1 exactly
    assert row_of(made({"base": records("base", *right)}), "base")["accuracy_interval"] == (1 - 3 / 7, 1.0)


def test_a_record_without_one_of_the_bases_temperatures_is_named() -> None:
    found = three_methods()
    bases = []
    for one in found["base"]:
        at_one = one.scores[0] | {"row": one.scores[0]["row"] | {"temperature": 1.0}}
        bases.append(dataclasses.replace(one, scores=[*one.scores, at_one]))
    with pytest.raises(
        UserError, match="bad, seed 0: its record has nothing of s at temperature 1, but that of the base has"
    ):
        made(found | {"base": bases})


def test_a_record_has_the_answers_that_its_row_counts(tmp_path: Path) -> None:
    """Two answers a problem were asked for, and the files still hold the four of an earlier evaluation with other
    levels."""
    answers = [make_answer(f"q{q}", k, 40 if k < 2 else 100, k < 2, level=7) for q in range(3) for k in range(4)]
    lines = [json.dumps(dataclasses.asdict(one)) for one in answers]
    (tmp_path / "m--s-rank0.jsonl").write_text("\n".join(lines) + "\n")
    found = place(tmp_path, {"answers": "m--s", "samples": 6, "problems": 3}, {"q0": 1, "q1": None, "q2": 2})
    assert (found["accuracy"], found["tokens"], found["levels"]) == ([1] * 3, [40] * 3, [1, None, 2])


def test_numbers_are_written_short() -> None:
    assert json.dumps(shorter([1.0, 0.5, 41.0, 2 / 3])) == "[1, 0.5, 41, 0.66667]"


def test_costs_add_up_over_phases(tmp_path: Path) -> None:
    def run(name: str, *sampled: int) -> Path:
        (tmp_path / name).mkdir()
        lines = [{"step": i, "sampled_tokens": n, "trained_tokens": 7 if i else None, "seconds/sample": 1.5,
                  "seconds/update": 0.5} for i, n in enumerate(sampled)]  # fmt: skip
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / name

    found = costs([run("a", 10, 20, 30), run("b", 5)])
    assert found == {"sampled_tokens": 35, "trained_tokens": 14, "steps": 4, "seconds": 8}
    assert costs([]) == {}
    assert costs([tmp_path / "a", tmp_path / "lost"]) == {}  # a part would look like the whole


# -------------------------------------------------------------------------------------------------------------- real runs


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_one_method_more_leaves_the_others_in_place_and_one_that_fails_is_named(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A method, then another one with one beside it that cannot run, then both in a folder without the runs."""

    def run(out: str, *arguments: str) -> dict:
        kept = ("--records", str(tmp_path / "kept"), "--seeds", "3", "--jobs", "2")
        run_recipe(recipe / "compare.yaml", tmp_path / out, *kept, *arguments)
        return json.loads((tmp_path / out / "results.json").read_text())

    found = run("out", "--methods", "accuracy-only")
    assert [row["model"] for row in found["rows"]].count("base") == 1 and found["missing"] == {}
    mine = row_of(found, "accuracy-only")
    assert 300 <= mine["sampled_tokens"] < 300 + 128  # it overshoots by at most the last step: 16 answers of 8 tokens
    rows = json.loads((tmp_path / "out/seed3/scores/accuracy-only/results.json").read_text())["rows"]
    [row] = [row for row in rows if row["model"] == "accuracy-only"]
    samples = [json.loads(line) for path in (tmp_path / "out/seed3/samples").glob(f"{row['answers']}*")
               for line in path.read_text().splitlines()]  # fmt: skip
    assert len(samples) == 16 and sum(s["length"] for s in samples) / 16 == pytest.approx(row["tokens"])
    [one] = read(tmp_path / "kept", "accuracy-only")
    assert sum(one.scores[0]["tokens"]) / 8 == pytest.approx(row["tokens"], abs=1e-4) and one.scores[0]["row"] == row
    levels = {s["problem"]: s["level"] for s in samples}
    assert one.scores[0]["levels"] == [levels[problem] for problem in sorted(levels)] and None not in levels.values()
    together = json.loads((tmp_path / "out/seed3/evaluate/results.json").read_text())  # for the report
    assert [row["model"] for row in together["rows"]] == ["base", "accuracy-only"]

    before = file_of(tmp_path / "kept", "accuracy-only").read_bytes()
    with pytest.raises(SystemExit):
        run("out", "--methods", "grpo spo")  # spo wants as many problems as there are rollouts
    captured = capsys.readouterr()
    assert "1 steps failed (seed3/spo), 1 were not begun" in captured.err
    assert file_of(tmp_path / "kept", "accuracy-only").read_bytes() == before
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert {row["model"] for row in found["rows"]} == {"base", "accuracy-only", "grpo"}
    again = row_of(found, "accuracy-only")
    assert all(
        again[key] == mine[key] for key in ("accuracy", "tokens", "aes", "tokens_interval", "seconds", "by_level")
    )
    assert list(found["missing"]) == ["spo, seed 3"] and "problems" in found["missing"]["spo, seed 3"]
    assert "**Not in the table:** spo, seed 3: spo did not end well: " in captured.out

    found = run("elsewhere", "--methods", "grpo")
    assert "every method has its records already" in capsys.readouterr().out  # nothing was trained
    assert {row["model"] for row in found["rows"]} == {"base", "accuracy-only", "grpo"}

    [base] = read(tmp_path / "kept", "base")  # as if it were of another machine: then ours, which is done, gets a line
    line = file_of(tmp_path / "kept", "base").read_text().replace(base.base, "of another machine")
    file_of(tmp_path / "kept", "base").write_text(line)
    found = run("out", "--methods", "grpo")
    assert [one.base for one in read(tmp_path / "kept", "base")] == ["of another machine", base.base]
    assert {row["model"] for row in found["rows"]} == {"base", "accuracy-only", "grpo"} and found["missing"] == {}
    file_of(tmp_path / "kept", "base").write_text(line.replace("of another machine", base.base))
    capsys.readouterr()

    run_recipe(recipe / "compare.yaml", tmp_path / "dry", "--dry-run", "--methods", "grpo spo", "--seeds", "3",
               "--records", str(tmp_path / "kept"))  # fmt: skip
    out = capsys.readouterr().out
    assert f"2 of 3 results, the bases' too, have a record in {tmp_path / 'kept'}" in out
    assert not (tmp_path / "dry").exists()
    assert [line.split(" | ")[0] for line in out.splitlines() if line.startswith("| seed3")] == [
        f"| seed3/{step}" for step in ("scores/base", "spo", "scores/spo")
    ]
    run_recipe(recipe / "compare.yaml", tmp_path / "dry", "--dry-run", "--methods", "grpo", "--seeds", "3",
               "--records", str(tmp_path / "kept"))  # fmt: skip
    assert capsys.readouterr().out.endswith("\n\nnothing is left to run\n")
    run_recipe(recipe / "compare.yaml", tmp_path / "out", "--dry-run", "--methods", "spo", "--seeds", "3",
               "--records", str(tmp_path / "kept"))  # fmt: skip
    assert "scores/base" not in (out := capsys.readouterr().out) and "| seed3/spo |" in out  # what is done is left out


def test_a_record_of_another_config_counts_as_missing(recipe: Path, tmp_path: Path) -> None:
    """Its digest does not depend on the folder, but on every key of the runs and of the evaluation."""

    def digest(folder: Path, tokens: int = 300) -> str:
        one = Recipe(recipe / "compare.yaml", folder, ["python"], tokens, ["lapo"])
        return one.digest(one.pipeline([3]), "seed3/scores/lapo")

    assert digest(tmp_path / "a") == digest(tmp_path / "b, c") != digest(tmp_path / "a", 400)
    for common in ("demo", "seed3", "model", "s", "."):  # words that the configs hold anyway
        assert digest(Path(common)) == digest(tmp_path / "a")


def test_the_table_is_there_without_a_base_and_beside_one_of_another_config(recipe: Path, tmp_path: Path) -> None:
    """Seed 4 started from a base whose line is gone. A base of another config has answers at another temperature."""
    one, kept = Recipe(recipe / "compare.yaml", tmp_path, ["python"], 300, ["spo"]), tmp_path / "records"
    one.scored = ["spo", "grpo", "lapo"]  # these have records, for another number of tokens
    for method in ("grpo", "lapo"):
        write(kept, record(method, 3, *BASE, base="a", digest="old"))
    one.scored += ["dapo", "laser"]  # not wanted either: one without its base, one of another config on one seed only
    write(kept, record("laser", 4, *BASE, base="b", digest="old"))
    pipeline = one.pipeline([3, 4])
    for method, seed, base in (
        ("base", 3, "a"), ("base", 4, "b"), ("spo", 3, "a"), ("spo", 4, "gone"), ("dapo", 3, "gone"), ("laser", 3, "a")
    ):  # fmt: skip
        digest = one.digest(pipeline, f"seed{seed}/scores/{method}")
        write(kept, record(method, seed, *BASE, base=base, digest=digest))
    old = record("base", 3, *BASE, base="of another machine", digest="old")
    old.scores[0]["row"]["temperature"] = 0.9
    write(kept, old)
    write_methods(one, pipeline, kept, [3, 4], [3, 4])
    found = results(tmp_path)
    assert [(row["model"], row["seeds"], row["temperature"]) for row in found["rows"]] == [
        ("base", [3, 4], 0.6), ("spo", [3], 0.6), ("laser", [3], 0.6)
    ]  # fmt: skip
    assert found["missing"] == {
        "spo, seed 4": f"its base has no line in {kept / 'base.jsonl'} any more; put it back",
        "dapo, seed 3": f"its base has no line in {kept / 'base.jsonl'} any more; put it back",
        "laser, seed 4": "its result is of another config",
        "grpo, lapo": "all results are of another config",
    }
