"""Which kinds of models train, and with which sampler: the table of docs/MODELS.md, measured on tiny random models.

    python tests/helpers/families.py            # prints the table: half a minute
    python tests/helpers/families.py --write    # puts it into docs/MODELS.md

Each kind is a real transformers model with random weights. `Policy` tries it as it tries every model (model/trial.py), and
the samplers' own checks tell what they can do with it. vLLM's column needs vLLM, because vLLM's registry decides it.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rows import VOCAB, make_config
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nanolapo.config import UserError
from nanolapo.policy import Policy
from nanolapo.samplers.torch_sampler import torch_objection
from nanolapo.samplers.vllm_fit import vllm_objection

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/MODELS.md"
BEGIN, END = "<!-- python tests/helpers/families.py --write -->\n", "<!-- end -->\n"
LONGEST = 2000  # tokens of a row: more than the windows and original limits below, less than max_position_embeddings
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
           "shared_expert_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}  # fmt: skip
LATENT = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
          "num_key_value_heads": 4, "first_k_dense_replace": 1}  # fmt: skip
SLIDING = {"sliding_window": 32}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


def longrope(original: int) -> dict[str, Any]:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": original} | FACTORS
    return {"rope_parameters": rope, "original_max_position_embeddings": original}


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
SMALL_GEMMA = {
    "text_config": SIZES | {"model_type": "gemma3_text"},
    "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                      "image_size": 28, "patch_size": 14},
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # name in the table: model_type, what its config needs
    "llama": ("llama", {}),
    "llama, dynamic NTK, rows within max_position_embeddings": ("llama", DYNAMIC),
    "llama, dynamic NTK, longer rows": ("llama", DYNAMIC | {"max_position_embeddings": 1000}),
    "qwen2": ("qwen2", {}),
    "qwen2, sliding window": ("qwen2", SLIDING | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", SLIDING),
    "ministral": ("ministral", SLIDING),
    "smollm3": ("smollm3", {}),
    "phi": ("phi", {}),
    "phi3": ("phi3", SLIDING),
    "phi3, longrope, rows within original_max_position_embeddings": ("phi3", longrope(LONGEST)),
    "phi3, longrope, longer rows": ("phi3", longrope(1000)),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3_text": ("gemma3_text", SLIDING),
    "gemma3, with images": ("gemma3", SMALL_GEMMA),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", SLIDING),
    "granite": ("granite", {}),
    "granite, logits_scaling 8": ("granite", {"logits_scaling": 8.0}),
    "cohere": ("cohere", {}),
    "starcoder2": ("starcoder2", {}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "seed_oss": ("seed_oss", {}),
    "ernie4_5": ("ernie4_5", {}),
    "exaone4": ("exaone4", SLIDING),
    "arcee": ("arcee", {}),
    "apertus": ("apertus", {}),
    "helium": ("helium", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "mixtral": ("mixtral", EXPERTS),
    "qwen2_moe": ("qwen2_moe", EXPERTS),
    "qwen2_moe, sliding window": ("qwen2_moe", EXPERTS | SLIDING | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "olmoe": ("olmoe", EXPERTS),
    "glm4_moe": ("glm4_moe", EXPERTS),
    "deepseek_v3": ("deepseek_v3", EXPERTS | LATENT),
    "afmoe": ("afmoe", EXPERTS),
    "phimoe": ("phimoe", EXPERTS),
    "phimoe, sliding window": ("phimoe", EXPERTS | SLIDING),
    "gpt_oss": ("gpt_oss", EXPERTS),
    "lfm2, with convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "stablelm": ("stablelm", {}),
    "nemotron": ("nemotron", {}),
    "nanochat": ("nanochat", {}),
    "doge": ("doge", {}),
    "falcon": ("falcon", {}),
    "bloom": ("bloom", {"n_head": 4, "n_layer": 2}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    "gptj": ("gptj", {"rotary_dim": 4}),
    "modernbert-decoder": ("modernbert-decoder", {"bos_token_id": 2, "pad_token_id": 0, "cls_token_id": 2,
                                                  "sep_token_id": 1}),
    "llama4_text": ("llama4_text", EXPERTS),
    "mamba": ("mamba", {}),
    "jamba": ("jamba", EXPERTS),
    "qwen3_next": ("qwen3_next", EXPERTS),
}  # fmt: skip


def tiny_family(name: str, **changes: Any) -> PreTrainedModel:
    """A random model of this family with two layers and predictions that are far from uniform."""
    model_type, extra = FAMILIES[name]
    extra = extra | changes
    options = extra if "text_config" in extra else SIZES | extra
    if isinstance(getattr(CONFIG_MAPPING[model_type], "head_dim", None), property):
        options.pop("head_dim")  # it follows from the other sizes
    config = CONFIG_MAPPING[model_type](**options)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


class Row(NamedTuple):
    """What holds for one family. An objection is None where there is none."""

    name: str
    refused: str | None  # why it cannot be trained at all
    torch: str | None  # why not with the torch sampler
    vllm: str | None  # why not with vLLM

    def line(self) -> str:
        trains, samplers = self.refused is None, (self.torch, self.vllm)
        cells = ["yes" if trains and objection is None else "no" for objection in samplers]
        reason = self.refused or self.vllm or ""
        return f"| {self.name} | {'yes' if trains else 'no'} | {' | '.join(cells)} | {reason} |\n"


def family_config(folder: Path) -> Any:
    limits = {"max_prompt_tokens": 1000, "max_new_tokens": LONGEST - 1000 - 64}
    return make_config(folder, rollout=limits, train={"grad_clip": 1e9})


def try_family(name: str, folder: Path) -> Row:
    """Save the family's tiny model and ask the policy and both samplers."""
    model = tiny_family(name)
    model.save_pretrained(folder)
    try:
        Policy(family_config(folder), torch.device("cpu"))
        refused = None
    except UserError as error:
        refused = (
            str(error).split(" cannot be trained here: ")[1].rsplit("; take a model", 1)[0].rsplit("; lower", 1)[0]
        )
        refused = re.sub(r" by [\d.]+% of their spread \(allowed: [\d.]+%\)", "", refused)  # depends on the machine
    return Row(name, refused, torch_objection(model.config), vllm_objection(model.config, str(folder)))


def table() -> str:
    lines = [
        "| kind of model (`model_type`) | trainer | torch sampler | vLLM | why not |\n",
        "| :-- | :-- | :-- | :-- | :-- |\n",
    ]
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(try_family(name, Path(folder)).line())
    return "".join(lines)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    text = table()
    print(text)
    if "--write" in sys.argv:
        if importlib.util.find_spec("vllm") is None:
            sys.exit("vLLM is not installed: its column cannot be written")
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(before + BEGIN + text + END + rest.partition(END)[2], encoding="utf-8")
