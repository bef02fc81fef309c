"""Small chat-model folders with a byte-level tokenizer, whole or broken by hand, for what looks at a folder's files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|User|>", "<|Assistant|>", "<think>", "</think>"]
CHAT = (  # its generation prompt opens a thought, and <|im_end|> closes every turn
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
TEXTS = ["Start at 3 and add 4. Last 3 digits?", "I will answer the question with tokens.", "Think for tokens."]


def train_byte_bpe(texts: Iterable[str], special: Sequence[str] = SPECIAL) -> Tokenizer:
    """A byte-level BPE tokenizer, as most published models have one, with `special` as its first tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=list(special), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_chat_folder(folder: Path, **options: Any) -> Path:
    """A Llama folder of one layer with a byte-level tokenizer and CHAT; options go into its config."""
    torch.manual_seed(0)
    core = train_byte_bpe(TEXTS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", chat_template=CHAT)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**settings | options)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
