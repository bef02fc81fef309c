r"""Kinds of answers that users of other projects saw graded wrongly, each with siblings of the reported case.

    pytest tests/grader/test_grader_kinds.py

A table has pairs: reference ~ text inside \boxed{}. RIGHT pairs must be accepted and WRONG pairs refused. Every pair goes
through a real pool with a real worker process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from grader.references import exceptions

from nanolapo.grader import Grader

GROUPING = r"""
WRONG: 5, 120 ~ 5120 | 5120 ~ 5, 120 | 2128 ~ 2, 128 | 2128 ~ \{2,128\} | 1234 ~ (1,234) | (1,234) ~ 1234
WRONG: 1, 000 ~ 1000 | 1234567 ~ 1, 234, 567 | 1234 ~ 1,2,34 | 5120 ~ 5 \text{ and } 120 | 5120 ~ 5;120 | 1,234 ~ 1, 234
WRONG: 0.5 ~ 0,500 | 5120 ~ 5,\quad 120 | 81256 ~ x=81,y=256 | (2,251,252) ~ 2251252 | [0,100] ~ 100 | 5120.7 ~ 5, 120.7
WRONG: 12345 ~ 12, 345 | 12345 ~ 12 34 5 | 1234 ~ 1 23 4 | 15 ~ 1 5 | 1.5 ~ 1. 5 | 1.5 ~ 1 .5 | 1000 ~ (1 000, 2)
RIGHT: 5, 120 ~ 120, 5 | 81, 256 ~ 256, 81 | 81, 256 ~ x=81 or x=256 | 81, 256 ~ \{81,256\} | 81, 256 ~ \{256, 81\}
RIGHT: 81, 256 ~ 81 \text{ and } 256 | 81, 256 ~ 81;\ 256 | 81, 256 ~ 81,~256 | 81, 256 ~ 81,256 | (0,100) ~ (0, 100)
RIGHT: 1,234 ~ 1234 | 1234567 ~ 1,234,567 | 1234.5 ~ 1,234.5 | 5120 ~ x = 5,120 | 5120 ~ 5,120 \text{ cm}
RIGHT: 5120 ~ \$5,120
RIGHT: -1234 ~ -1,234 | \frac{1234}{5} ~ \frac{1,234}{5} | 1000, 2000 ~ 1,000, 2,000
RIGHT: 1000, 2000 ~ 2,000 \text{ and } 1,000
RIGHT: 1000, 2000 ~ \{1,000, 2,000\} | (1000, 7) ~ (1{,}000, 7) | 12345 ~ 12\,345 | 12345 ~ 12 345 | 12345 ~ 12,\!345
RIGHT: (2,251,252) ~ (2, 251, 252) | 27,54,108,135 ~ 135, 108, 54, 27 | \sqrt{1234} ~ \sqrt{1,234}
RIGHT: 12345 ~ 12 345 \text{ cm}
"""

MARKS = r"""
WRONG: 45^\circ30' ~ 4530 | 4530 ~ 45^\circ30' | 56 ~ 5\%6 | 35 ~ 3^\circ5 | 12 ~ \$1\$2 | 105 ~ 10\%5 | 12 ~ €1€2
WRONG: f(x) ~ f'(x) | y' ~ y'' | y=2x ~ y'=2x | AB ~ AB' | 2y ~ y'+y | 5 ~ -x=5 | 2x ~ -y=2x | 5 ~ -x=-5+0
RIGHT: f'(x) ~ f'(x) | 45^\circ30' ~ 45^\circ 30' | 50 ~ 50\% | 30 ~ 30^\circ | 12 ~ \$12 | 12 ~ €12 | 12 ~ £12
RIGHT: \frac{2}{3} ~ ⅔ | \frac13 ~ ⅓ | 5 ~ x-y=5 | -5 ~ x=-5 | f'(x)+1 ~ 1+f'(x)
WRONG: 5 ~ 5 twelfths | 7 ~ 7 sixteenths | 3 ~ 3 elevenths | 10 ~ 10 billionths | 5 ~ 5 grand | 10 ~ 5 less than 10
WRONG: 3 ~ 3 twentieths | 3 ~ 3 fourteenths
RIGHT: 2 ~ 2 roots | 12 ~ 12 deaths | 5 ~ 5 months | 12 ~ 12 widths | 7 ~ 7 lengths
WRONG: 2-\frac i2 ~ 2+1/2i | \frac{2}{3\pi} ~ 2/3\pi | \frac{1}{2\ln 2} ~ 1/2\ln 2 | y=\frac{1}{2x}+3 ~ y=1/2x+3
RIGHT: 2+\frac i2 ~ 2+1/2i | \frac43\pi ~ 4/3 \pi | y=\frac12x+3 ~ y=1/2x+3
RIGHT: \frac{2\pi}{3} ~ 2/3\pi | 2/3\pi ~ \frac{2\pi}{3}
RIGHT: \frac{1}{2} ~ 1/2 | 3\frac12 ~ 3 1/2 | \frac{\sqrt3}{3} ~ 1/3\sqrt3 | \frac13\pi r^2h ~ 1/3\pi r^2h | x/2 ~ 1/2 x
RIGHT: 16:30 ~ 4:30 \text{ PM} | 4:30 \text{ PM} ~ 16:30 | 4:00 PM ~ 4 \text{ PM}
WRONG: 4:30 ~ 4:30 \text{ PM} | 4:30 \text{ AM} ~ 16:30
RIGHT: 21 ~ 21st | 21 ~ 21^{st} | 21 ~ 21^\text{st} | 21 ~ 21^{\text{st}} | 21 ~ 21 \text{st} | 4^{th} ~ 4 | 5 ~ 5th row
RIGHT: 1/4 ~ 1/4th | 6st ~ 6ts | 6st ~ s t \cdot 6 | 2^{st} ~ 2^{ts}
RIGHT: (1, 2) ~ (1st, 2nd) | 25 ~ 25th percentile | 22nd, 23rd ~ 22, 23 | 22 ~ 22nd day
WRONG: 4 ~ 4ths | 4 ~ 4 \text{ths} | 10 ~ 10 thousandths | 4 ~ 4^{t} | 4t ~ 4th | 21 ~ 22st | 5 ~ 5^{5th}
WRONG: 2^{st} ~ 2 | 3st ~ 3 | 2st+1 ~ 3 | 3st^2 ~ 9 | 5-4st ~ 1 | 6 ~ 6st | 11 ~ 11st
WRONG: 2 ~ \sqrt{4st} | \frac32 ~ \frac{3st}{2}
RIGHT: 2 ~ 2 \text{ x-intercepts} | 4 ~ 4 values of x | 4 ~ 4 \text{ values of x} | 5 ~ 5 \text{ n-gons}
WRONG: 5 ~ 5\text{x} | 5 ~ 5 \text{ y} | 3 ~ 3\mathrm{n} | 7 ~ 7\textbf{Z} | 5 ~ 5\text{ b}
RIGHT: 5 ~ 5\text{m} | 5 ~ 5 \mathrm{s} | 5 ~ 5\text{ g} | 5 ~ 5\text{ L}
"""

BLANKS = r"""
WRONG: 2^{6300} ~ 2^6\,300 | x^{2300} ~ x^2~300 | 2^{63} ~ 2^6 3 | x^{23} ~ x^2 3 | a_{12} ~ a_1 2 | x_{12} ~ x_1 2
WRONG: \log_{23} 5 ~ \log_2 35 | 2^{63} ~ 2^{6} 3
WRONG: \frac{1}{23} ~ \frac12 3 | \sqrt{23} ~ \sqrt2 3 | 5000 ~ 5 e 3 | x^{2}+13 ~ x^2+1 3
RIGHT: 192 ~ 2^6 3 | 3x^2 ~ x^2 3 | 2^{63} ~ 2^63 | x^2 ~ x^{ 2 } | \log_2 3 ~ \log_{2}{3} | a_1 ~ a_{1} | 7 ~ 7\,
RIGHT: 7 ~ \,7\;
RIGHT: 7 ~ 7~ | 7 ~ 7 \quad | 7 ~ 7\! | 7 ~ 7\;\;
"""

BOXED_TOGETHER = [
    r"\boxed{1} \quad \text{and} \quad \boxed{2}", r"\boxed{1} \quad \boxed{2}", r"\boxed{1}\qquad\boxed{2}",
    r"$\boxed{1}$ and $\boxed{2}$", r"\boxed{1} \lor \boxed{2}", r"\boxed{1} \\ \boxed{2}", "\\boxed{1}\n\n\\boxed{2}",
    r"\[\boxed{1}\] \[\boxed{2}\]", r"\boxed{1}, \;\; \boxed{2}", r"$$\boxed{1}$$ or $$\boxed{2}$$",
    r"\begin{align*} &\boxed{1} \\ &\boxed{2} \end{align*}", r"\boxed{1} \text{ or else } \boxed{2}",
    r"\begin{align} \boxed{1} \end{align} \begin{align} \boxed{2} \end{align}", r"\boxed{1} \hspace{1cm} \boxed{2}",
    r"\boxed{1} \text{ cm and } \boxed{2} \text{ cm}", r"$x = \boxed{1}$ and $x = \boxed{2}$", r"\boxed{1}/\boxed{2}",
    r"\boxed{1} as well as \boxed{2}", r"(a) \boxed{1} (b) \boxed{2}", r"\boxed 1 or \boxed 2", r"\fbox{1} or \boxed{2}",
]  # fmt: skip

VALUES = r"""
WRONG: 4:30 pm ~ 4:30 am | 4:30 pm ~ 4:30 \text{ a.m.} | 12 ~ 12 PM | 12 PM ~ 12 AM | 12 AM ~ 12 PM
WRONG: 12 pm ~ 12 \text{ am}
WRONG: 12 \text{ p.m.} ~ 12 \text{ a.m.} | 5 ~ 5 million dollars | 5 ~ 5\text{ million dollars} | 5 ~ 5 \text{ million}
WRONG: 2 ~ 2 dozen eggs | 2 ~ 2 \text{ dozen eggs} | 3 ~ 3 hundred people | 3 ~ 3\text{ hundred people} | 4 ~ 4 billion
WRONG: 4 ~ 4 \text{ billion people} | 5 ~ 5 \text{ thousand km} | 2 ~ 2 \text{ thirds} | 2 ~ 2 thirds | 3 ~ 3 tenths
WRONG: 5 ~ 5 \text{ doubled} | 5 ~ 5 \text{ tens} | 5 ~ 5 twice | 2 ~ 2 \text{ (reciprocal)} | 5 ~ 5 \text{ is wrong}
WRONG: 3 ~ 3 \text{ squared} | 5 ~ 5 \text{ or } 6 | 5 ~ 5 \text{ or 6} | 5 ~ 5 \text{ or maybe six}
WRONG: 5 ~ 5\text{ below zero}
WRONG: 5 ~ 5 \text{ times } 7 | 5 ~ 5 \text{ times more} | 5 ~ 5 out of six | 5 ~ 5 \text{ factorial}
WRONG: 5 ~ 5 \text{ degrees below}
WRONG: 5 ~ 5\text{k} | 5 ~ 5 \text{ M} | \text{A} ~ \text{A} apples | 8:30 ~ 4:15 | 5 ~ 5 BC | 5 ~ 5\text{ B.C.}
WRONG: 12 ~ 12 \text{ noon}
WRONG: 5 ~ 5 lakh | 5 ~ 5\text{ lakh rupees} | 3 ~ 3 crore | 7 ~ 7 quadrillion | 5 ~ 5 myriad
WRONG: 5 ~ 5 \text{ to four} | 5 ~ 5\text{ pairs of shoes}
RIGHT: 4:30 pm ~ 4:30 PM | 4:30 pm ~ 4:30 \text{ p.m.} | 4\!:\!51 \text{ p.m.} ~ 4:51 pm | 12 PM ~ 12 \text{ p.m.}
RIGHT: 500000 ~ 5 lakh | 30{,}000{,}000 ~ 3 \text{ crore rupees}
RIGHT: 5000000 ~ 5 million | 5{,}000{,}000 ~ 5 \text{ million dollars} | 24 ~ 2 dozen eggs | 300 ~ 3 hundred people
RIGHT: 5.2\text{ million} ~ 5200000 | 5 ~ 5 dollars | 5 ~ 5 \text{ dollars} | 5 ~ 5 red apples | 5 ~ 5 \text{ cm/s}
RIGHT: 5 ~ 5 \text{ m} | 5 ~ 5 \text{ K} | (3,4) ~ (3 \text{ cm}, 4 \text{ cm}) | \{5\} ~ \{5 \text{ cm}\}
RIGHT: 6\pi ~ 6 \pi \text{ cm} | 5 ~ 5 \text{ sq. ft.}
RIGHT: 5 ~ 5 \text{ miles per hour} | 7:30 ~ 7:30 | 3:5 ~ 3:5
"""

WORDS = r"""
WRONG: no ~ on | on ~ no | yes ~ no | yes ~ yes, but no | yes ~ yes and no | no ~ know | odd ~ odds | was ~ saw | no ~ n
WRONG: even ~ seven
WRONG: true ~ false | no ~ not | odd ~ \text{even} | \text{May} ~ \text{Amy} | no ~ n \cdot o | yes ~ 1
WRONG: \text{no} ~ \text{on}
RIGHT: yes ~ Yes | yes ~ YES | yes ~ \text{Yes} | \text{odd} ~ Odd | odd ~ \text{Odd.} | no ~ No | no ~ \text{NO}
RIGHT: Yes ~ \textbf{yes}
RIGHT: \text{May} ~ may | xy ~ yx | 2ab ~ 2ba | true ~ \mathrm{True} | \text{no} ~ \mathbf{No} | no ~ No.
"""

LABELS = r"""
WRONG: x = 2, y = 1 ~ 1, 2 | x = 2, y = 1 ~ x=1, y=2 | x = 2, y = 1 ~ y=2, x=1 | x = 2, y = 1 ~ (1,2) | (1,2) ~ b=1, a=2
WRONG: (1,2) ~ y=1, x=2 | x=2, y=1 ~ 2 | x=2, y=1 ~ a=2, b=1 | a=1, b=2, c=3 ~ 1, 3, 2 | (x,y)=(1,2) ~ y=1, x=2
WRONG: f(1)=2, f(2)=3 ~ f(1)=3, f(2)=2 | x=2, y=1 ~ \{1,2\} | x = 2, y = 1 ~ (x,y)=(1,2) | x=2,y=1 ~ (y,x)=(2,1)
RIGHT: x = 2, y = 1 ~ 2, 1 | x = 2, y = 1 ~ y=1, x=2 | x = 2, y = 1 ~ (2,1) | x = 2, y = 1 ~ (x,y)=(2,1)
RIGHT: (1,2) ~ a=1, b=2
RIGHT: AB=9, CD=4 ~ \{CD=4, AB=9\} | (2,1) ~ b=1, a=2 | x=1, x=2 ~ 2, 1 | x=1 \text{ or } x=2 ~ 2, 1
RIGHT: 1, 2 ~ x_1=2, x_2=1 | x=2,y=1 ~ x = 2 \text{ and } y = 1
RIGHT: (x,y)=(2,1) ~ y=1, x=2 | (2,3) ~ m=2, b=3 | x=2, y=1 ~ (y,x)=(1,2) | x=0.5, y=1 ~ y=1, x=\frac12
"""

EQUATIONS = r"""
WRONG: 2 ~ x^2=4 | 4 ~ x^2=4 | 4 ~ x^{-1}=4 | \frac14 ~ x^{-1}=4 | 4 ~ 2x=4 | 2 ~ 2x=4 | 6 ~ x(x+1)=6 | 6 ~ 2(x+1)=6
WRONG: 1 ~ 2P(A)=1 | 1 ~ P(X=1)P(X=2)=1 | 8 ~ \log_2(8)=3 | 1 ~ \sin(2x)=1 | 5 ~ [X]=5 | 5 ~ -E[X]=5 | 3 ~ \frac{x}{2}=3
WRONG: f^{-1}(x)=2x ~ f(x)=2x | f(x)=2x ~ f^{-1}(x)=2x | P(X=2)=\frac12 ~ P(X=3)=0.5 | f(x+1)=3 ~ f(2x)=3
WRONG: f(x)=2x, f^{-1}(x)=x/2 ~ x/2, 2x | \frac12,\frac14 ~ P(X=1)=\frac14, P(X=2)=\frac12 | \frac12 ~ P(X=2)=\frac13
RIGHT: \frac{x-1}{2} ~ f^{-1}(x)=\frac{x-1}{2} | 3 ~ f^{-1}(2)=3 | \frac12 ~ P(X=2)=1/2 | 5 ~ E[X]=5 | 3 ~ f(2)=3
RIGHT: 5 ~ \mathbb{E}[X]=5 | 5 ~ \text{Var}(2X)=5 | 5 ~ \operatorname{Var}(X)=5 | \frac16 ~ P(A\cap B)=\frac16
RIGHT: \frac12 ~ P_1(X>2)=\frac12=0.5 | 3 ~ f(\frac12)=3 | 3 ~ f(1.5)=3 | 3 ~ f'(2)=3 | 2x ~ \frac{dy}{dx}=2x
RIGHT: 5 ~ \bar{x}=5 | (1,2) ~ \vec{v}=(1,2) | P(X=2)=\frac12 ~ 0.5 | E[X]=5 ~ 5 | f^{-1}(x)=\frac{x-1}{2} ~ \frac{x-1}{2}
RIGHT: f(x)=2x, f^{-1}(x)=x/2 ~ 2x, x/2 | \frac12,\frac14 ~ P(X=1)=\frac12, P(X=2)=\frac14
WRONG: 0=x-1 ~ 0 | 3 = x+y ~ 3 | 1=x^2+y^2 ~ x^2+y^2 | 1=x^2+y^2 ~ 1 | x^2+y^2=1 ~ 1 | x^2+y^2=1 ~ x^2+y^2 | 2x=6 ~ 6
WRONG: 0=x-1 ~ x-1 | 0 = x - 1 ~ x=0 | 6=2x ~ 6 | y=2x+3 ~ y | x=5 ~ x | xy=1 ~ 1 | 1=xy ~ 1
RIGHT: 0=x-1 ~ x-1=0 | 3 = x+y ~ x+y=3 | 1=x^2+y^2 ~ x^2+y^2=1 | 5=x ~ 5 | x=5 ~ 5 | x=5 ~ 5=x | y=2x+3 ~ 2x+3
RIGHT: f(x)=x+1 ~ x+1 | 2x+3=y ~ 2x+3 | x+y=3 ~ 3=y+x | a_{10}=55 ~ 55 | 0=x-1 ~ x=1
"""

REFUSED = r"""
RIGHT: 55 ~ \sum_{i=1}^{10} i | 120 ~ \prod_{i=1}^5 i | 55 ~ \sum_{i = 1}^{10} {i} | 2 ~ 17 \bmod 5 | 2 ~ 17 \mod 5
RIGHT: 2 ~ 17\bmod{5} | 2 ~ \gcd(4,6) | 2 ~ \gcd(4, 6, 8) | 12 ~ \operatorname{lcm}(4,6) | 2 ~ \max(1,2) | 1 ~ \min(1,2)
RIGHT: \frac12 ~ \sin 30^\circ | \frac12 ~ \sin(30^\circ) | \frac12 ~ \cos 60° | \frac{\sqrt3}{2} ~ \sin 60^{\circ}
RIGHT: 1 ~ \tan\left(45^\circ\right) | \frac14 ~ \sin^2 30^\circ | \frac12 ~ \sin{30^\circ} | 1 ~ 2\sin 30^\circ
RIGHT: \frac12 ~ \sin(10^\circ+20^\circ) | 12 ~ \mathtt{12} | \text{Evelyn} ~ \texttt{Evelyn} | (1,2) ~ \bigl(1,2\bigr)
RIGHT: (1,2) ~ \Biggl( 1,2 \Biggr) | \{1,2\} ~ \bigl\{1,2\bigr\} | 10 ~ {5 \choose 2} | 10 ~ \dbinom{5}{2} | 3\pi ~ 3 pi
RIGHT: 3\pi ~ 3pi | \frac{\pi}{2} ~ pi/2 | \frac{1}{100} ~ 10^-2 | 0.01 ~ 10^{-2} | 5000 ~ 5e3 | 0.005 ~ 5e-3
RIGHT: 5e3 ~ 5000
RIGHT: 1.5e3 ~ 1500 | 5000 ~ 5E3 | \infty ~ infinity | (2,\infty) ~ (2, infinity) | x ~ \mathbf{x} | e^{-x} ~ e^-x
RIGHT: 3+4i ~ 4i+3 | -1 ~ i^2 | 30 ~ 30^\circ | 1 ~ \sin 90 ^ \circ | -2, -12 ~ \mathbf{-2 \text{ or } -12}
RIGHT: 12 ~ \textsf{12} | 12 ~ \underline{12}
WRONG: i ~ i^3 | 5000 ~ 5e4 | 2 ~ 17 \bmod 4 | \frac12 ~ \sin 30 | 54 ~ \sum_{i=1}^{10} i | 10 ~ {5 \choose 3}+1
WRONG: \sin 30^\circ ~ \sin 30 | 3 ~ \gcd(4,6) | 2 ~ \max(1,3) | 24 ~ \operatorname{lcm}(4,6)
WRONG: \frac{1}{100} ~ 10^2 | 100 ~ 10^-2 | 3\pi ~ 3p i | 1 ~ \sum_{i=1}^{10} i | 90 ~ \sin 90^\circ
WRONG: \frac\pi6 ~ 30^\circ
"""

OTHER_WORDS = r"""
RIGHT: 17:00 ~ 5:00 pm | 5:00 pm ~ 17:00 | 17:00 ~ 5 \text{ p.m.} | 5 pm ~ 5:00 PM | 0:30 ~ 12:30 am | 12:30 ~ 12:30
RIGHT: (9:00, 17:30) ~ (9:00, 5:30 pm) | 08:30 ~ 8:30 | 5:00 am ~ 05:00 \text{ a.m.}
RIGHT: No solution ~ no solutions | no solutions ~ \text{No solution} | \text{no real solutions} ~ No real solution
RIGHT: 12 ~ \text{lcm}(4,6) | 12 ~ lcm(4, 6) | 2 ~ \mathrm{gcd}(4,6) | \operatorname{lcm}(4,6) ~ 12
RIGHT: 3.5 ~ 3 \text{ and a half} | 3.5 ~ 3 and one half | 3.5 ~ 3 and a half hours | \frac{13}{4} ~ 3 and a quarter
RIGHT: \frac13 ~ 0.\overline{3} | 0.\overline{3} ~ 1/3 | \frac16 ~ 0.1\overline{6} | \frac13 ~ .\bar{3} | 1 ~ 0.\overline{9}
RIGHT: 0.\overline{3} ~ 0.\overline{33} | -\frac{1}{3} ~ -0.\overline{3} | 12.\overline{3} ~ \frac{37}{3}
RIGHT: 30 ~ 30°C | 30 ~ 30^\circ C | 30 ~ 30^{\circ}\text{C} | 30 ~ 30\,^\circ\mathrm{C} | 30 ~ 30 degrees Celsius
RIGHT: 30°C ~ 30 | 30°C ~ 30 \text{ degrees Celsius} | -5 ~ -5^\circ\text{F} | 20, 30 ~ 20°C, 30°C | 30°C ~ 30^\circ
WRONG: 17:00 ~ 5:00 am | 17:00 ~ 5:00 | 5:00 pm ~ 5:00 | 5:00 am ~ 5:00 | 0:30 ~ 12:30 pm | 12:30 am ~ 12:30 | 5 pm ~ 5
WRONG: 17:30 ~ 5 pm | 17 ~ 5 pm | 17:00 ~ 17:00 am | 19:60 ~ 19:60 pm | 5:00 pm ~ 5:00:30 pm | 12 pm ~ 0:00
WRONG: No solution ~ one solution | no ~ nos | no solution ~ no real solution | no 2s ~ no 2 | no solution ~ solutions
WRONG: 24 ~ \text{lcm}(4,6) | 12 ~ lcm(4,5) | 3.5 ~ 3 and a third | 3 ~ 3 and a half | 3, 0.5 ~ 3 and a half
WRONG: 1.75 ~ 1.25 and a half | \frac{\sqrt2}{2} ~ \sqrt2 and a half | 3.5 ~ 3 and two halves
WRONG: \frac13 ~ 0.3 | 0.3 ~ 0.\overline{3} | \frac13 ~ 0.333 | 3 ~ \overline{3}
WRONG: \frac13 ~ 0.\overline{03} | 16 ~ 0.1\overline{6}
WRONG: 30°C ~ 30°F | 30 \text{ degrees Celsius} ~ 30 \text{ degrees Fahrenheit} | 30°F ~ 30^\circ\text{C} | 31 ~ 30°C
WRONG: 30 ~ -30°C | 30°C ~ 30 pm | 20°C, 30°F ~ 20°C, 30°C | 30 ~ 30 C_2
"""

ROWS = r"""
RIGHT: \begin{pmatrix}1\\\frac{2}{3}\end{pmatrix} ~ (\begin{array}{c}1\\\frac{2}{3}\end{array})
RIGHT: \begin{pmatrix}-\frac13\\ \frac23\end{pmatrix} ~ \left(\begin{array}{c}-\frac13\\ \frac23\end{array}\right)
RIGHT: \begin{pmatrix}1\\\pi\end{pmatrix} ~ (\begin{array}{c}1\\\pi\end{array})
RIGHT: \begin{pmatrix}1&2\\\sqrt2&4\end{pmatrix} ~ \left[\begin{array}{cc}1&2\\\sqrt2&4\end{array}\right]
RIGHT: \begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}1\\[4pt]2\end{pmatrix}
RIGHT: \begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}1 \\[-0.5 ex] 2\end{pmatrix}
RIGHT: \begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}1\\*[1em]2\end{pmatrix}
RIGHT: \begin{pmatrix}-\frac13\\\frac23\end{pmatrix} ~ \begin{pmatrix}-1/3\\[2mm]2/3\end{pmatrix}
RIGHT: \begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}1\cr 2\end{pmatrix}
RIGHT: \begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}1\cr2\cr\end{pmatrix}
WRONG: \begin{pmatrix}1\\\frac{2}{3}\end{pmatrix} ~ (\begin{array}{c}1\\\frac{3}{2}\end{array})
WRONG: \begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}1\\[4pt]3\end{pmatrix}
WRONG: \begin{pmatrix}12\end{pmatrix} ~ \begin{pmatrix}1\cr2\end{pmatrix}
WRONG: \begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}1\\[2]2\end{pmatrix}
WRONG: \begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}1&2\end{pmatrix}
"""

CHOICES = r"""
WRONG: B ~ C) 3.5 | B ~ B) 3.5, C) 4 | B ~ B) 3.5 or C | B ~ B or C | B ~ A) 3 B) 5 | B ~ \text{Option B or C} | B ~ B. C
WRONG: B ~ b) 3.5 | B ~ BC. 5 | B ~ 3.5 | B ~ B.5 | B ~ (B)x | B ~ AB) 5 | 3.5 ~ B) 3.5 | B ~ B + 5 | K ~ K) 5
WRONG: B ~ \textbf{(C)}\ 5 | B ~ \text{Option C} | B ~ \text{not B) 5} | B ~ \text{Option B is wrong}
WRONG: B ~ \textbf{(B)}\ 5, \textbf{(I)}\ 6
RIGHT: B ~ B) | B ~ B. | B ~ B) 3.5 | B ~ B. 3.5 | B ~ (B) 3.5 | B ~ B: 3.5 | B ~ \textbf{(B)}\ 5 | B ~ \text{Option B}
RIGHT: B ~ \text{(B) }3.5 | \text{(B)} ~ \text{B) 3.5 m} | (B) ~ (B)~3.5 | B ~ \mathrm{B.}\;\frac12 | B ~ B) x=3, y=4
RIGHT: J ~ \text{Choice (J): 3.5} | B ~ \text{Answer: B} | D ~ (D) I, II and III | B ~ **B) 5** | B ~ \text{(B) 5 (B)}
"""

SETS = r"""
WRONG: (3,5] ~ 3,5 | [3,5) ~ 3,5 | [3,5] ~ 3,5 | (-\infty,3] ~ -\infty, 3 | [3,5) ~ 3 \text{ and } 5 | [3,5] ~ \{3,5\}
WRONG: [3,5) ~ a=3, b=5 | [3,5] ~ 3;5 | (1,2],(3,4] ~ 1,2,3,4 | [3,5] ~ (3,5)
RIGHT: (3,5] ~ (3,5] | [3,5) ~ \left[3, 5\right) | (3,5) ~ 3,5 | (3,5) ~ a=3, b=5 | (1,2,3) ~ 1,2,3 | [3,5] ~ 3\le x\le5
RIGHT: \{3,5\} ~ a=3, b=5 | (1,2],(3,4] ~ (3,4],(1,2] | [1,2,3] ~ 1,2,3
RIGHT: \frac12 ~ \frac12, 0.5 | 5 ~ 5, 5 | \{1,2\} ~ \{1,1,2\} | 1, 1, 2 ~ 2, 1, 1 | 2, 3 ~ 3 \text{ or } 2
WRONG: 1, 1, 2 ~ 1, 2, 2 | 1, 1, 2 ~ 1, 2 | 1, 2 ~ 1, 1 | 1, 2 ~ 2 | 1, 2 ~ 1, 2, 3 | 5 ~ 5, 5, 6 | (5,5) ~ 5
RIGHT: (-\infty,-1)\cup(1,\infty) ~ x<-1 \text{ or } x>1 | (-\infty,-1]\cup[1,\infty) ~ x \ge 1, x \leq -1
RIGHT: x<-1 \text{ or } x>1 ~ (1,\infty)\cup(-\infty,-1) | (0,1)\cup(2,3)\cup(4,5) ~ 0<x<1 or 4<x<5 or 2<x<3
WRONG: (-\infty,-1)\cup(1,\infty) ~ x<-1, x \ge 1 | (-\infty,-1)\cup(1,\infty) ~ x<-1, x>1, x>2 | (0,1)\cup(2,3) ~ 0<x<1
WRONG: x\ge2 \text{ and } x<5 ~ (-\infty,5)\cup[2,\infty) | x<1, y>2 ~ (-\infty,1)\cup(2,\infty)
WRONG: (0,1)\cup(2,3) ~ 0, 1, 2, 3 | (0,1), (2,3) ~ (0,1)\cup(2,3) | x<-1 \text{ or } x>1 ~ (1,\infty)
"""


def pairs(table: str, kind: str) -> list[tuple[str, str]]:
    rows = [row.split(":", 1)[1] for row in table.strip().splitlines() if row.startswith(kind)]
    found = [pair.split(" ~ ") for row in rows for pair in row.split(" | ")]
    return [(reference.strip(), answer) for reference, answer in found]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=1) as pool:
        yield pool


def accepted(grader: Grader, rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    verdicts = grader.grade_all([rf"So \boxed{{{answer}}}." for _, answer in rows], [r for r, _ in rows])
    return [row for row, right in zip(rows, verdicts, strict=True) if right]


@pytest.mark.parametrize(
    "table", [GROUPING, MARKS, BLANKS, VALUES, WORDS, LABELS, EQUATIONS, REFUSED, OTHER_WORDS, SETS, CHOICES, ROWS],
    ids=["grouping", "marks", "blanks", "values", "words", "labels", "equations", "refused", "other words", "sets",
         "choices", "rows of a matrix"],
)  # fmt: skip
def test_kind(grader: Grader, table: str) -> None:
    right, wrong = pairs(table, "RIGHT"), pairs(table, "WRONG")
    assert [row for row in right if row not in accepted(grader, right)] == []
    assert accepted(grader, wrong) == []
    assert grader.errors == 0


@pytest.mark.parametrize("completion", BOXED_TOGETHER)
def test_several_boxes_are_one_set_whatever_stands_between(grader: Grader, completion: str) -> None:
    text = f"Hence {completion}."
    assert grader.grade_all([text] * 4, ["1, 2", "2, 1", "2", "1"]) == [True, True, False, False]


def test_a_box_after_prose_replaces_the_one_before(grader: Grader) -> None:
    for text in (
        r"\boxed{1} is too small, so take \boxed{2}",
        r"First \boxed{1}. Add one and you get the answer \boxed{2}",
        r"\boxed{1}. One could add one or two to this in many ways, so we get \boxed{2}",
        r"\boxed{1}. Wait, I made a mistake and must add one. The answer is \boxed{2}",
    ):
        assert grader.grade_all([text] * 2, ["2", "1, 2"]) == [True, False], text


def test_references_that_no_answer_reaches_fail_the_check(grader: Grader) -> None:
    prose = [
        "None",
        "N/A",
        "?",
        "...",
        "the proof is left to the reader as an exercise",
        "Final Answer:",
        r"\text{}",
        "-",
        "['5']",
        '["5", "7"]',
        "B. 12",
        "(C) 12 cm",
        "a) 5",
        r"\textbf{(B)}\ 12",
        r"\text{(B)} 12",
        r"\mathrm{(B)}\ 12",
    ]
    good = ["none", "no", r"\emptyset", "1e3", r"\text{Softball, Kickball, Picnic}", "x=5", r"\infty", "(C)", "18 eggs"]
    good += [
        "C",
        "[5]",
        "A",
        "(a+b) c",
        "f(x) = 2",
        "D.",
        "E = mc^2",
        "E. coli",
        "(a) 5, (b) 6",
        r"\text{(A)}, \text{(E)}",
    ]
    assert grader.references_that_fail(prose + good) == list(range(len(prose)))


def test_the_check_of_a_file_lists_what_no_answer_reaches(grader: Grader, tmp_path: Path) -> None:
    answers = ["5", "4:30 pm", "81, 256", "None", r"so \boxed{3} or \boxed{4}", "x=2, y=1", r"\frac{1", "AB=9, CD=4"]
    lines = [json.dumps({"question": f"question {i}", "answer": answer}) for i, answer in enumerate(answers)]
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(lines))
    count, listed = exceptions(path, grader)
    assert count == 7 and len(listed) == 2
    assert "line 4: field 'answer' is not a number" in listed[0] and r"'\\frac{1'" in listed[1]
