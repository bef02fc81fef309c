"""The worker pool: threads, hostile answers, executed text, order, killed workers, orphans, speed (C1-C3, C11, C12).

pytest tests/grader/test_grader_workers.py
"""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest

from nanolapo.config import RunStopped, UserError
from nanolapo.grader import Grader, check_errors, grade

pytestmark = pytest.mark.slow

# needs algebra; right, right, wrong, wrong, right, and two that no worker sees
MIXED = [
    (r"\sqrt{12}", r"2\sqrt{3}", True),
    ("(x-1)(x+1)", "x^2-1", True),
    ("x+1", "x+2", False),
    (r"\sqrt{5}", "2", False),
]
MIXED += [("1<x<2", "(1,2)", True), ("7", "7.0", True), ("7", "8", False)]
RUNAWAY = "(x+1)^{100}(y+1)^{100}(z+1)^{100}"  # passes every cheap check and expands for minutes
HOSTILE = r"""9^{9^{9^9}} | 9^{9^{9}} | (9^9)^{9^9} | 2^{2^{2^{2^{2^2}}}} | 9^{999999999} | 2^{-9^{9^9}}
e^{10^{10}} | x^{9^{9^9}} | x=9^{9^{9}} | (10^9)! | 1000000000! | ((9!)!)! | 100000!/99999! | \Gamma(1000000000)
\binom{10^{10}}{10^9} | \binom{10000000000}{1000000000} | \sqrt[9^{9^9}]{2} | \sum_{k=1}^{10^9}k^k
\prod_{k=1}^{10^8}(k+1) | (x+y+z)^{500} | (x+1)^{100000} | 1e999999999 | \operatorname{eye}(100000)
\lfloor 9^{9^{9}}\rfloor | \frac{1}{9^{9^9}} | \log(9^{9^9}) | \sin(10^{10^{10}}) | 10^{10^{10}} \mod 7
\gcd(9^{9^9},6) | \{9^{9^{9}}, 5\} | (9^{9^{9}},1) | 9^{9^{9}}<x<10"""
BOMBS = [bomb.strip() for line in HOSTILE.splitlines() for bomb in line.split(" | ")]
BOMBS += [
    "7" * 100_000,
    "(" * 5000 + "1" + ")" * 5000,
    "{" * 50_000,
    "-" * 900 + "1",
    r"\frac" * 150,
    r"\ab" * 200 + "?=5",
]


def boxed(answers: list[str]) -> list[str]:
    return [rf"\boxed{{{answer}}}" for answer in answers]


def columns(rows: list[tuple[str, str, bool]]) -> tuple[list[str], list[str], list[bool]]:
    answers, references, verdicts = zip(*rows, strict=True)
    return boxed(list(answers)), list(references), list(verdicts)


def pids(grader: Grader) -> list[int]:
    return [worker.process.pid for worker in list(grader._pool.workers.values())]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_C1_same_verdicts_in_main_thread_worker_thread_and_subprocess() -> None:
    completions, references, expected = columns(MIXED)
    script = "import json, sys, nanolapo.grader as g; print(json.dumps(g.Grader().grade_all(*json.load(sys.stdin))))"
    with Grader() as grader, ThreadPoolExecutor(4) as threads:
        assert grader.grade_all(completions, references) == expected
        jobs = [threads.submit(grader.grade_all, completions, references) for _ in range(8)]  # eight at once, one pool
        assert all(job.result() == expected for job in jobs)
        assert list(threads.map(grade, completions, references)) == expected
        assert (grader.errors, grader.total) == (0, 9 * len(MIXED))
    question = json.dumps([completions, references])
    child = subprocess.run([sys.executable, "-c", script], input=question, capture_output=True, text=True, check=True)
    assert json.loads(child.stdout) == expected


def test_C1_errors_are_counted_apart_and_stop_the_run() -> None:
    with Grader(workers=1, deadline_s=0.3) as grader:
        assert grader.grade_all(boxed([RUNAWAY, "x+2"]) + ["no box"] * 100, ["x+1"] * 102) == [False] * 102
        assert (grader.errors, grader.total) == (1, 102) and check_errors(1, 102) == 1 / 102
        grader.grade_all(boxed([RUNAWAY] * 9), ["x+1"] * 9)
        assert grader.errors == 10 and check_errors(10, grader.total) > 0.05  # too few to judge
        grader.grade_all(boxed([RUNAWAY] * 3 + ["5"] * 90), ["x+1"] * 3 + ["5"] * 90)
        assert (grader.errors, grader.total) == (13, 204) and check_errors(10, 200) == 0.05
        with pytest.raises(RunStopped, match="failed on 6% of 204 answers"):
            check_errors(grader.errors, grader.total)


def test_a_late_reference_answer_is_asked_again_and_never_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deadline that no question can meet. What is late once more, with patience, is an error; else the answer stays."""
    good, bad = r"\sqrt{2}+1", r"\frac{1}{2"
    with Grader(workers=1, deadline_s=1e-5) as grader:
        monkeypatch.setattr("nanolapo.grader.PATIENCE_S", 1e-5)
        with pytest.raises(UserError, match="reference answer .* could not be compared.*data.exclude"):
            grader.references_that_fail([bad, good])
        monkeypatch.setattr("nanolapo.grader.PATIENCE_S", 60.0)
        assert grader.references_that_fail([bad, good]) == [0]
        assert grader.errors == grader.total == 0  # these are no answers


def test_C1_a_worker_that_cannot_start_is_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Grader() as grader, pytest.raises(RuntimeError, match="no grader worker starts"):
        grader.grade_all(boxed(["x+1"]), ["1+x"])


def test_C2_bombs_cost_seconds_not_minutes() -> None:
    """1,024 answers, 5% hostile, a third of the honest ones needing algebra, two workers."""
    rows: list[tuple[str, str, bool]] = []
    for i in range(1024):
        honest = (
            (rf"\frac{{{i}}}{{\sqrt{{7}}}}", rf"\frac{{{i}\sqrt{{7}}}}{{7}}", True)
            if i % 3 == 1
            else (f"{i}.0", str(i), True)
        )
        rows.append((BOMBS[i // 20 % len(BOMBS)], rf"{i}+\sqrt{{2}}", False) if i % 20 == 0 else honest)
    completions, references, expected = columns(rows)
    start = time.monotonic()
    with Grader(workers=2) as grader:
        assert grader.grade_all(completions, references) == expected
        assert time.monotonic() - start < 60 and grader.errors == 0
        for pid in pids(grader):
            limits = Path(f"/proc/{pid}/limits").read_text()
            assert f"Max address space         {2 * 2**30}" in limits
            assert "Max core file size        0" in limits


def test_C2_every_bomb_is_wrong_quickly() -> None:
    with Grader(workers=1) as grader:
        grader.grade_all(boxed(["x+1"]), ["1+x"])  # start it
        for bomb in BOMBS:
            start = time.monotonic()
            assert grader.grade_all(boxed([bomb] * 2), ["5", r"\sqrt{2}"]) == [False, False], bomb
            assert time.monotonic() - start < 4, bomb
        assert grader.errors == 0


def test_C2_a_runaway_is_stopped_and_its_worker_replaced() -> None:
    with Grader(workers=1, deadline_s=0.5) as grader:
        grader.grade_all(boxed(["x+1"]), ["1+x"])
        (before,) = pids(grader)
        start = time.monotonic()
        assert grader.grade_all(boxed([RUNAWAY]), ["x+1"]) == [False]
        assert time.monotonic() - start < 3 and grader.errors == 1
        assert not alive(before)
        assert grader.grade_all(boxed(["x+3"]), ["3+x"]) == [True]
        (after,) = pids(grader)
        assert alive(after) and after != before


def test_C3_model_text_is_never_executed(tmp_path: Path) -> None:
    target = tmp_path / "owned"
    code = f"open('{target}','w').write('1')"
    attack = f"__import__('os').system('touch {target}')"
    spellings = [
        code,
        attack,
        rf"\pi({attack})",
        rf"\pi{{{attack}}}",
        rf"\frac{{{attack}}}{{2}}",
        rf"\frac{{1}}{{{code}}}",
    ]
    spellings += [
        rf"\begin{{pmatrix}}{attack}\\1\end{{pmatrix}}",
        rf"\text{{{attack}}}",
        rf"\sqrt{{{attack}}}",
        f"x={attack}",
    ]
    spellings += [
        f"({attack}, 2)",
        rf"\operatorname{{{attack}}}(1)",
        f"1+{attack}",
        f'eval("{attack}")',
        f"2^{{{attack}}}",
    ]
    spellings += [
        f"$x$; exec({code!r})",
        f"\\{{{attack}\\}}",
        f"sympy.{attack}",
        f"1_{{{attack}}}",
        f"[{attack} for x in (1,)]",
    ]
    assert len(spellings) >= 15
    with Grader(workers=1) as grader:
        for reference in ("5", r"\sqrt{2}", r"\begin{pmatrix}2\\1\end{pmatrix}"):
            assert not any(grader.grade_all(boxed(spellings), [reference] * len(spellings)))
        raw = [
            grader._pool.ask((spelling, "x+1")) for spelling in spellings
        ]  # past every check, straight into a worker
        assert True not in [reply.result() for reply in raw]
        assert not any(grader.references_that_fail([rf"\sqrt{{2}}+{i}" for i in range(3)]))
    assert not target.exists()


def test_C3_no_evaluating_call_in_the_source_and_the_fences_hold(tmp_path: Path) -> None:
    files = sorted((Path(__file__).parents[2] / "nanolapo/grader").glob("*.py"))
    assert len(files) >= 4
    for file in files:
        calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        names = {
            f.attr if isinstance(f, ast.Attribute) else f.id for f in calls if isinstance(f, (ast.Attribute, ast.Name))
        }
        assert not names & {
            "eval",
            "exec",
            "parse_expr",
            "sympify",
            "S",
            "compile_expr",
            "literal_eval",
            "lambdify",
            "loads_pickle",
        }
    script = f"""
import os, socket, subprocess, sys, sympy, sympy.parsing.sympy_parser as p
from nanolapo.grader import worker as w
w.self_check(); p.eval_expr = w.evaluate_ratio; sys.addaudithook(w.fence); w.self_check()
attempts = [lambda: open({str(tmp_path / "a")!r}, "w"), lambda: os.system("true"), lambda: subprocess.run(["true"]),
    lambda: socket.socket(), lambda: os.mkdir({str(tmp_path / "b")!r}),
    lambda: os.open({str(tmp_path / "c")!r}, os.O_CREAT),
    lambda: sympy.sympify("__import__('os')"), lambda: sympy.parse_expr("1+1")]
for i, attempt in enumerate(attempts):
    try:
        attempt()
    except (PermissionError, ValueError):
        continue
    sys.exit(f"attempt {{i}} got through")
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert not any(tmp_path.iterdir())


def test_C3_workers_see_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-secret")
    with Grader(workers=1) as grader:
        grader.grade_all(boxed(["x+1"]), ["1+x"])
        environ = Path(f"/proc/{pids(grader)[0]}/environ").read_text()
    assert "PATH=" in environ and "canary-secret" not in environ


def test_C11_errors_and_timeouts_keep_every_verdict_in_its_row() -> None:
    rows: list[tuple[str, str, bool]] = []
    for i in range(60):
        rows.append(
            [
                (f"{i}+x", f"x+{i}", True),
                (f"{i}+x", f"x+{i + 1}", False),
                (str(i), f"{i}.0", True),
                (BOMBS[i % 30], "5", False),
            ][i % 4]
        )
    rows[10], rows[30] = (RUNAWAY, "x+10", False), (RUNAWAY, "x+30", False)  # two different time-outs
    completions, references, expected = columns(rows)
    completions[21], expected[21] = "no box at all", False
    with Grader(workers=2, deadline_s=3.0) as grader:  # an honest answer takes milliseconds
        assert grader.grade_all(completions, references) == expected
        assert (grader.errors, grader.total) == (2, 60)
        assert grader.grade_all(completions[::-1], references[::-1]) == expected[::-1]
        with pytest.raises(ValueError, match="60 completions but 59 reference answers"):
            grader.grade_all(completions, references[:-1])
        assert grader.grade_all([], []) == []


def test_C12_killed_workers_are_replaced_and_the_batch_completes() -> None:
    rows = [(rf"\sqrt{{{i * i * 3}}}+x", rf"x+{i}\sqrt{{3}}", True) for i in range(1, 120)]
    completions, references, expected = columns(rows)
    with Grader(workers=2) as grader:
        verdicts = [*map(grader.submit, completions, references)]
        verdicts[10].result()  # both workers are at work
        killed = pids(grader)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        assert [verdict.result() for verdict in verdicts] == expected  # a kill is retried, not scored 0
        after = pids(grader)
        assert len(after) == 2 and all(map(alive, after)) and not set(after) & set(killed)
        for pid in after:  # and now while they are idle
            os.kill(pid, signal.SIGKILL)
        assert grader.grade_all(boxed(["x+1", "x+2"]), ["1+x", "2+x"]) == [True, True]
        assert grader.errors == 0


def test_C12_no_orphans_when_the_trainer_is_killed() -> None:
    script = rf"""
import os, signal, threading, time
from nanolapo.grader import Grader
grader = Grader(workers=2, deadline_s=1.0)
grader.grade_all([r"\boxed{{x+1}}", r"\boxed{{x+2}}"], ["1+x", "2+x"])
print(*[w.process.pid for w in grader._pool.workers.values()], flush=True)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
grader.grade_all([r"\boxed{{{RUNAWAY}}}"], ["x+1"])
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    orphans = [int(pid) for pid in child.stdout.split()]
    assert child.returncode == -signal.SIGKILL and len(orphans) == 2, child.stderr
    give_up = time.monotonic() + 15  # the busy one ends at its own alarm, deadline + 5 s
    while any(map(alive, orphans)) and time.monotonic() < give_up:
        time.sleep(0.1)
    assert not any(map(alive, orphans))


def test_close_ends_the_workers_for_good() -> None:
    grader = Grader(workers=1)
    assert grader.grade_all(boxed(["x+1"]), ["1+x"]) == [True]
    grader.close()
    grader.close()
    assert not any(map(alive, pids(grader)))
    with pytest.raises(RuntimeError, match="this grader is closed"):
        grader.grade_all(boxed(["x+1"]), ["1+x"])


def test_submit_settles_text_at_once_and_leaves_algebra_to_a_worker() -> None:
    with Grader(workers=1) as grader:
        assert grader.submit(r"\boxed{7}", "7.0").result(timeout=0) is True and pids(grader) == []
        pending = grader.submit(r"\boxed{x+1}", "1+x")
        assert not pending.done() and grader.total == 1  # a worker takes longer than this to start
        assert pending.result() is True and grader.total == 2
        assert grader.submit(r"\boxed{x+1}", "1+x").result(timeout=0) is True  # asked before


def test_equal_questions_are_asked_once() -> None:
    with Grader(workers=1, deadline_s=1.0) as grader:
        start = time.monotonic()
        late = [grader.submit(rf"so \boxed{{{RUNAWAY}}}", "x+1") for _ in range(20)]
        assert [verdict.result() for verdict in late] == [False] * 20 and grader.errors == 20
        assert (
            grader.grade_all(boxed([RUNAWAY] * 20), ["x+1"] * 20) == [False] * 20
        )  # an error is no verdict: asked again, once for all
        assert time.monotonic() - start < 15 and grader.errors == grader.total == 40


def test_an_error_is_not_remembered_as_a_verdict() -> None:
    """A machine that stood still for a moment must not make a right answer wrong for the next thousand questions."""
    with Grader(workers=1, deadline_s=2.0) as grader:
        assert grader.grade_all(boxed(["x+2"]), ["2+x"]) == [True]
        (worker,) = grader._pool.workers.values()
        worker.process.send_signal(signal.SIGSTOP)
        assert grader.grade_all(boxed(["x+1"]), ["1+x"]) == [False] and grader.errors == 1
        assert grader.grade_all(boxed(["x+1"]), ["1+x"]) == [True] and grader.errors == 1


def test_close_does_not_wait_for_slow_answers() -> None:
    grader = Grader(workers=1, deadline_s=60.0)
    with pytest.raises(KeyboardInterrupt), grader:
        assert grader.submit(r"\boxed{x+1}", "1+x").result()
        slow, behind = grader.submit(rf"\boxed{{{RUNAWAY}}}", "x+1"), grader.submit(r"\boxed{x+2}", "x+3")
        time.sleep(0.2)
        start = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - start < 10 and (grader.errors, grader.total) == (0, 1)
    for verdict in (slow, behind):  # never to be taken for wrong answers
        with pytest.raises(CancelledError):
            verdict.result(timeout=0)


def test_plain_numbers_need_no_worker_and_no_time() -> None:
    """A plain number is graded while Python adds less than 2,000 numbers (0.1 ms on one of our machines)."""
    text = "so the answer is that. " * 200
    completions = [rf"{text}</think> \boxed{{{i % 7}}}" for i in range(1000)]
    of_grader, of_loop = [], []
    for _ in range(5):  # the fastest: the process may collect garbage, or the machine stall, meanwhile
        start = time.process_time()  # this process's own work: other programs may be busy
        with Grader() as grader:
            assert grader.grade_all(completions, ["3"] * 1000).count(True) == 143
            assert pids(grader) == []
        of_grader.append(time.process_time() - start)
        start, total = time.process_time(), 0
        for i in range(2_000_000):
            total += i
        of_loop.append(time.process_time() - start)
    assert min(of_grader) < min(of_loop)
