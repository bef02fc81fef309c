"""nanolapo: Length-Adaptive Policy Optimization (arXiv 2507.15758) as a small, readable GRPO trainer."""

import os

# These are read when the libraries are imported. tokenizers would warn in every process that is forked after its first use.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
