"""The inputs of a forecast (cost.py): a model's shape, from its config.json, and a machine's speed and memory."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from nanolapo.config import Config, UserError
from nanolapo.model.folder import NO_FOLDER, must_be_local

# NVIDIA's data sheets (SXM boards): GB of memory; TFLOP/s of bf16 tensor cores, dense (half of the number printed with
# sparsity), and of plain float32; GB/s of memory bandwidth.
DATA_SHEET = {
    "A100-80GB": (80, 312, 19.5, 2039),
    "H100-80GB": (80, 989, 67, 3350),
    "H200-141GB": (141, 989, 67, 4800),
}
# Measured at commit 43bd68e on one H100-80GB, a 1.5B shape in bfloat16. tests/plan/test_gpu_rates.py has the numbers:
# change these lines together with it. Other GPUs and other shapes are assumed to reach the same shares.
GPU_MEASURED = "one H100 at commit 43bd68e"
# The share of peak FLOP/s that the update's kernels reach while they run, and the share of an update in which the GPU
# waits for Python. Only KERNELS * (1 - IDLE) is measured: IDLE is from a profile of a variant with faster attention.
KERNELS, IDLE = 0.243, 0.22
# The share of peak bandwidth; seconds of vLLM's own work per decode step, and per row (each has its own generator). Only
# their sum is measured: whole steps of 256 answers, less the update. BANDWIDTH and ROW_S are assumed, STEP_S remains.
BANDWIDTH, STEP_S, ROW_S = 0.6, 3e-3, 1e-5
# Measured with configs/demo (float32) and configs/smollm2-135m (bfloat16) on an AMD EPYC of the fourth generation: FLOP/s
# of a thread in training and in decoding, seconds per layer and decode step. The memory bandwidth is an estimate.
CPU_FLOPS, CPU_DECODE = {"float32": 48e9, "bfloat16": 110e9}, {"float32": 24e9, "bfloat16": 100e9}
CPU_LAYER_S, CPU_BANDWIDTH = 5e-4, 2e10


@dataclass(frozen=True)
class Shape:
    """A Llama- or Qwen-type decoder without experts."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool  # the head is the embedding
    bias: bool = False  # of q, k and v

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrices: q and o, k and v, gate, up and down."""
        return self.hidden * (2 * self.head_dim * (self.heads + self.kv_heads) + 3 * self.intermediate)

    @property
    def head(self) -> int:
        return self.hidden * self.vocab

    @property
    def num_params(self) -> int:
        """All weights.

        >>> PUBLISHED["DeepSeek-R1-Distill-Qwen-1.5B"].num_params  # 1.78 B
        1777088000
        """
        small = 2 * self.hidden + self.bias * self.head_dim * (self.heads + 2 * self.kv_heads)
        return self.layers * (self.layer_weights + small) + self.head * (2 - self.tied) + self.hidden

    @property
    def matrices(self) -> int:
        """Weights that a token is multiplied with: all matrices except the embedding, which is only looked up."""
        return self.layers * self.layer_weights + self.head

    @property
    def cache_per_token(self) -> int:
        """Numbers in the key/value cache per token: K and V of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def lora_params(self, rank: int) -> int:
        """A [rank, in] and B [out, rank] beside each of the seven matrices of a layer (model/lora.py)."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        ins_and_outs = 2 * (self.hidden + q) + 2 * (self.hidden + kv) + 3 * (self.hidden + self.intermediate)
        return self.layers * rank * ins_and_outs

    def layer_flops(self, answer: float, prompt: float = 0.0, share: float = 1.0, causal: bool = True) -> float:
        """FLOPs of all layers in one forward pass over an answer and `share` of its prompt (a group's rows share it).

        2 per weight and token; attention is two products of [queries, head_dim] and [head_dim, keys] per head, so 4
        head_dim per query and key. An answer sees the prompt and itself, of which a causal kernel computes half.
        """
        seen = 0.5 if causal else 1.0
        pairs = answer * (prompt + seen * answer) + seen * share * prompt**2
        tokens = answer + share * prompt
        return self.layers * (2.0 * self.layer_weights * tokens + 4.0 * self.heads * self.head_dim * pairs)

    def activation_bytes(
        self, size: int, on_cpu: bool, rows: float, answer: float, prompt: float, share: float
    ) -> float:
        """Count what autograd keeps per layer of a micro-batch; `size`: bytes of a number in the arithmetic.

        Counted on transformers' Llama and Qwen2 with our attention. A token: two norms, each with its input (float32), its
        result before and after the weight, and a float32 factor; gate, its silu, up and their product; queries, attention's
        result, that result once more side by side, and a float32 sum per head; keys and values, and again those that each
        answer sees. On a CPU attention is float32, and has a float32 mask of [answer, prompt + answer].
        """
        tokens, attention = rows * (answer + share * prompt), 4 if on_cpu else size
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        per_token = self.hidden * (8 + 4 * size) + 8 + 4 * size * self.intermediate + (2 * attention + size) * q
        keys = attention * rows * (prompt + answer)
        keys += size * tokens if attention == size else attention * rows * share * prompt  # in place, unless cast
        mask = 4 * rows * answer * (prompt + answer) if on_cpu else 0.0
        return tokens * (per_token + 4 * self.heads) + 2 * kv * keys + mask


# The published config.json of the two recipes' models: Qwen2.5-1.5B with an untied head.
QWEN_1_5B = Shape(1536, 28, 12, 2, 128, 8960, 151936, tied=False, bias=True)
PUBLISHED = {"DeepSeek-R1-Distill-Qwen-1.5B": QWEN_1_5B, "DeepScaleR-1.5B-Preview": QWEN_1_5B}


class UnknownShape(UserError):
    """A model without a config.json that the planner can read: often its folder is not there yet."""


def load_shape(path: str) -> Shape:
    """Read a shape from a folder's config.json (the only file needed) or from the hub's. Raises UnknownShape."""
    name = path.rsplit("/", 1)[-1]
    if name in PUBLISHED and not Path(path).exists():
        return PUBLISHED[name]
    try:
        if must_be_local(path) and not Path(path).exists():
            raise OSError(NO_FOLDER)
        c = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
        if c.model_type not in ("llama", "qwen2"):
            raise ValueError(f"formulas are for llama and qwen2, not {c.model_type}")
        dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        bias = c.model_type == "qwen2"
        return Shape(c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, dim,
                     c.intermediate_size, c.vocab_size, bool(c.tie_word_embeddings), bias)  # fmt: skip
    except (OSError, ValueError) as error:
        raise UnknownShape(
            f"model.path={path!r}: its shape is unknown ({str(error).strip().splitlines()[0]}); to plan, give a folder "
            "with the config.json of the model that training will start from"
        ) from None


@dataclass(frozen=True)
class Machine:
    """The memory and the real speed of each rank of a run."""

    name: str
    count: int  # ranks, one per GPU
    memory: float  # bytes
    flops: float  # FLOP/s reached in training ...
    decode_flops: float  # ... and in decoding
    bandwidth: float  # bytes/s reached
    step_s: float  # seconds of a decode step in addition to reading and arithmetic, ...
    layer_s: float  # ... per layer ...
    row_s: float  # ... and per row
    source: str  # where the rates come from
    is_cpu: bool = False


def parse_machine(text: str, config: Config) -> Machine:
    """Parse `cpu` (this machine) or COUNTxGPU. Raises UserError."""
    if text == "cpu":
        return cpu_machine(config)
    match = re.fullmatch(r"(?:(\d+)x)?(.+)", text)
    name, count = (match[2], int(match[1] or 1)) if match else ("", 0)
    if name not in DATA_SHEET or not count:
        raise UserError(
            f"--machine {text!r}: write cpu, or COUNTx and one of {', '.join(DATA_SHEET)}, as in 8xH100-80GB"
        )
    return gpu_machine(name, count, DATA_SHEET[name][0] * 1e9, config)


def gpu_machine(name: str, count: int, memory: float, config: Config) -> Machine:
    """Use the data sheet's rates times the shares measured on one H100, or nan for a GPU without a data sheet here."""
    rows = [row for key, row in DATA_SHEET.items() if key.split("-")[0] in name]
    _, bf16, float32, bandwidth = rows[0] if rows else (math.nan,) * 4
    tflops = bf16 if config.model.dtype == "bfloat16" else float32
    reached = KERNELS * (1 - IDLE)
    source = (
        f"ESTIMATE from {GPU_MEASURED}: {reached:.0%} of the data sheet's FLOP/s in training (kernels reach "
        f"{KERNELS:.0%}, the GPU waits {IDLE:.0%} of the time); sampling at {BANDWIDTH:.0%} of its bandwidth (assumed)"
    )
    peak, bandwidth = tflops * 1e12, bandwidth * 1e9 * BANDWIDTH
    # In decoding the kernels are captured in CUDA graphs: no waiting for Python beyond STEP_S.
    return Machine(
        f"{count} x {name}", count, memory, peak * reached, peak * KERNELS, bandwidth, STEP_S, 0.0, ROW_S, source
    )


def cpu_machine(config: Config) -> Machine:
    """Describe this CPU: its memory divided by the ranks of this launch, and the speed of the CPU that we measured."""
    count, threads = int(os.environ.get("WORLD_SIZE", "1")), config.run.threads or torch.get_num_threads()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
    training = threads * CPU_FLOPS[config.model.dtype]
    decoding = threads * CPU_DECODE[config.rollout.dtype or config.model.dtype]
    source = f"{threads} x the speed of a thread of the CPU that we measured"
    return Machine(
        f"{count} x cpu", count, memory, training, decoding, CPU_BANDWIDTH, 0.0, CPU_LAYER_S, 0.0, source, True
    )


def this_machine(config: Config) -> Machine:
    """Describe the machine of this process: its GPUs if it has any, else the CPU."""
    if not torch.cuda.is_available():
        return cpu_machine(config)
    count, device = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.get_device_properties(0)
    return gpu_machine(device.name, count, float(device.total_memory), config)
