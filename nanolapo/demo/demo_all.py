"""The demo's base model for `make compare` and `make reproduce`: it has read the sentences of all methods.

    python -m nanolapo.demo.demo_all configs/demo/base.yaml [run.seed=1]

A large pretrained model reads "Think for 60 tokens." as it reads the paper's sentence; the plain demo model knows the
paper's only. About a fifth of the prompts here use another one.
"""

from __future__ import annotations

from nanolapo import cli
from nanolapo.demo.pretrain import DemoConfig, main

ALL_SENTENCES = DemoConfig(steps=3000, guided=0.33, guided_otherwise=0.22)

if __name__ == "__main__":
    cli.run(lambda: main(ALL_SENTENCES), keeps_progress=False)
