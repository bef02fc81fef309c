"""A model folder of a given shape with random weights, to measure speed where no real weights are to be had.

python tests/benchmarks/random_model.py --tokenizer FOLDER --out FOLDER [--layers 28 --hidden 1536 --intermediate 8960
    --heads 12 --kv-heads 2]        (the default shape is that of Qwen2.5-1.5B)
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--tokenizer", required=True)
    p.add_argument("--out", required=True)
    for name, value in {"layers": 28, "hidden": 1536, "intermediate": 8960, "heads": 12, "kv-heads": 2}.items():
        p.add_argument(f"--{name}", type=int, default=value)
    args = p.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936, num_hidden_layers=args.layers, hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, tie_word_embeddings=True,
        max_position_embeddings=32_768, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
