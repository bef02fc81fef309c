"""Every key a config may have, with its default: frozen dataclasses, one per section of the YAML file.

A key's annotation says which values it takes: a type, a Literal with its choices, or a type with a condition (Must).
config_file.py reads YAML into these classes and refuses everything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

PAPER_TEMPLATE = (  # the paper's prompt for stage 1 and for inference, one raw string
    "You are a helpful assistant. A conversation between User and Assistant. The user asks a question, and the "
    "Assistant solves it. The Assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. The reasoning process is enclosed within <think> and </think> tags, respectively, i.e., "
    "<think> reasoning process here </think> answer here. User: {question} Please think step by step and output the "
    "final answer within \\boxed{}. Assistant: <think>"
)

GUIDANCE_ROOM = 64  # tokens kept free for a method's guidance beyond rollout.max_prompt_tokens


class UserError(Exception):
    """A mistake the user can mend: one line that names the file, key or row and the remedy (exit code 2)."""


class RunStopped(Exception):
    """The run can no longer be trusted or continued; one line says why (exit code 3). What was saved stays."""


class Must(NamedTuple):
    """A condition that a value must meet in addition to its type, and the words of the message if it does not."""

    hold: Callable[[Any], bool]
    words: str


T = TypeVar("T", int, float)
Positive = Annotated[T, Must(lambda x: x > 0, "must be positive")]
NotNegative = Annotated[T, Must(lambda x: x >= 0, "must not be negative")]
Seed = Annotated[int, Must(lambda x: 0 <= x < 2**32, "must not be negative, and below 2**32, as NumPy's seeds are")]
Name = Annotated[str, Must(lambda x: {*(Path(x).parts or "/")}.isdisjoint(("/", "..")), "must be a folder in run.dir")]
Share = Annotated[float, Must(lambda x: 0 <= x <= 1, "must lie between 0 and 1")]
Betas = Annotated[tuple[float, float], Must(lambda x: min(x) >= 0 and max(x) < 1, "must lie from 0 to below 1")]
Bounds = Annotated[tuple[float, float], Must(lambda x: 0 <= x[0] < x[1], "must satisfy 0 <= low < high")]
ABOVE_BELOW = Must(lambda x: x[0] > 0 and 0 < x[1] < 1, "must be an entropy above 0 and a probability below 1")
Mastered = Annotated[tuple[float, float], ABOVE_BELOW]


@dataclass(frozen=True)
class RunConfig:
    name: Name = "run"  # the run directory is dir/name
    dir: str = "runs"
    seed: Seed = 0  # every random number of a run derives from (seed, step, position)
    threads: NotNegative[int] = 0  # CPU threads for torch; 0 leaves torch's choice
    checkpoint_every: Positive[int] = 10  # steps; the last step is always saved
    keep_checkpoints: Positive[int] = 2
    print_every: int = 5  # steps between the printed good and bad rollout; 0 never
    log_rollouts: NotNegative[int] = 64  # rollouts of each step kept with their text in rollouts.jsonl
    export_every: NotNegative[int] = 0  # write models/step-NNNNNN after each so many steps; 0: only the final model


@dataclass(frozen=True)
class ModelConfig:
    path: str = ""  # a local Hugging Face folder or a hub name
    # Forward and backward compute in this; master weights and optimizer state are always float32
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # The share of the layers whose activations the backward pass computes again instead of keeping them; true: all
    gradient_checkpointing: Share | bool = False
    compile: bool | None = None  # torch.compile layers and head: the first step takes longer; null: on a GPU
    # ddp: every rank holds a whole copy; fsdp2: every rank holds a slice of every weight and moment
    sharding: Literal["ddp", "fsdp2"] = "ddp"
    offload_reference: bool = False  # keep the reference model (loss.kl_coef) in host memory, not on the GPU
    lora_rank: NotNegative[int] = 0  # 0: all weights are trained; else LoRA beside every linear layer, merged on export
    lora_alpha: Positive[int] = 32  # the adapter's scale is lora_alpha / lora_rank

    def num_checkpointed(self, layers: int) -> int:
        """Return how many layers compute their activations again: the first ones, which the backward pass reaches last."""
        return math.ceil(layers * self.gradient_checkpointing)

    def compiled_on(self, device_type: str) -> bool:
        return device_type == "cuda" if self.compile is None else self.compile


@dataclass(frozen=True)
class SourceConfig:
    """One set of problems: a hub name, a local file (CONFIGURING has the kinds), or the procedural `demo`."""

    name: str  # becomes Problem.source and the first part of every problem id
    path: str
    split: str = "train"  # hub only
    subset: str = ""  # hub only
    question: str = "problem"  # field names of this set, or paths such as prompt.0.content
    answer: str = "answer"
    level: str = "level"
    choices: tuple[str, ...] = ()  # multiple choice: fields of the options, the right one first
    levels: tuple[int, ...] = ()  # keep only these levels; empty keeps all
    count: int = 0  # how many to draw with `seed`; 0 takes all
    seed: int = 0
    max_bad_fraction: float = 0.01  # more unreadable rows than this stop the run
    samples: NotNegative[int] = 0  # evaluation: samples per problem of this set; 0: evaluate.samples


@dataclass(frozen=True)
class DataConfig:
    sources: tuple[SourceConfig, ...] = ()
    exclude: tuple[SourceConfig, ...] = ()  # problems that must not appear (a training set, for a test set)


@dataclass(frozen=True)
class PromptConfig:
    style: Literal["raw", "chat"] = "raw"  # raw: one string with {question}; chat: the tokenizer's own chat template
    template: str = PAPER_TEMPLATE  # raw
    # chat: what follows the question, or the whole user turn if it contains {question}
    instruction: str = "Please think step by step and output the final answer within \\boxed{}."
    system: str = ""  # chat; empty leaves the template's own default
    think_prefix: str = ""  # chat: first words of the assistant's answer, e.g. "<think>"
    # chat: variables that the template reads, e.g. {enable_thinking: false}
    template_options: dict[str, Any] = field(default_factory=dict)
    length_multiple: Positive[int] = 1  # lengths stated in prompts are rounded to a multiple of this


@dataclass(frozen=True)
class RolloutConfig:
    engine: Literal["auto", "vllm", "torch"] = "auto"  # auto: vllm where installed, else torch
    prompts_per_step: Positive[int] = 128
    group_size: Positive[int] = 8  # G, rollouts per prompt
    max_prompt_tokens: Positive[int] = 1024  # a longer prompt is skipped and counted, never cut
    max_new_tokens: Positive[int] = 4096
    # Mean length of the base model's answers, in tokens; published numbers of tokens are scaled by it (evaluate.py prints
    # it); 0: not known
    base_tokens: NotNegative[float] = 0
    temperature: Positive[float] = 1.0
    top_p: float = 1.0  # anything below 1 would make the trainer's ratios wrong and is refused
    dtype: Literal["", "float32", "bfloat16"] = ""  # of the sampler's weights; empty: model.dtype
    max_rows: Positive[int] = 256  # sequences decoded at once
    gpu_memory_utilization: Share = 0.45  # vLLM's share of the GPU while it is awake
    tensor_parallel: Positive[int] = 1  # this many neighbouring ranks share one vLLM engine's weights
    mismatch_factor: Positive[float] = 5.0  # stop when mean |dlogp| exceeds this times its step-0 value ...
    mismatch_floor: Positive[float] = 0.02  # ... and this

    @property
    def longest_row(self) -> int:
        """Tokens of the longest prompt with the longest answer."""
        return self.max_prompt_tokens + GUIDANCE_ROOM + self.max_new_tokens


@dataclass(frozen=True)
class TrainConfig:
    steps: Positive[int] = 240  # rollout steps
    batch_size: int = 128  # rollouts per optimizer step (whole groups); 0: all rollouts of the step
    inner_epochs: Positive[int] = 1  # passes over the rollouts of a step
    microbatch_tokens: Positive[int] = 16384  # per forward/backward on one rank, a group's shared prompt counts once
    learning_rate: Positive[float] = 1e-6
    final_lr_fraction: Share = 0.1  # cosine decay ends here
    warmup_fraction: Share = 0.03
    adam_betas: Betas = (0.9, 0.95)
    weight_decay: NotNegative[float] = 0.0
    grad_clip: Positive[float] = 1.0
    sampled_tokens: NotNegative[int] = 0  # stop early once this many tokens were sampled (fair comparisons); 0: off
    max_bad_steps: Positive[int] = 3  # this many non-finite optimizer steps in a row abort the run


@dataclass(frozen=True)
class LossConfig:
    kind: str = "grpo"  # grpo | gspo | luspo | dhpo | cispo | minpro | kl_cov | r2vpo: the policy loss, see losses/
    options: dict[str, Any] = field(default_factory=dict)  # the loss's own settings
    # constant: divided by max_new_tokens
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    # Clip of the token ratio (grpo, dhpo), the sequence ratio (gspo, luspo) or the token's weight (minpro)
    clip_low: Annotated[float, Must(lambda x: 0 <= x < 1, "must satisfy 0 <= clip_low < 1")] = 0.2
    clip_high: NotNegative[float] = 0.2  # larger than clip_low: DAPO's clip-higher
    # grpo: where A < 0 the loss stops at this ratio; 0: off (verl 3, DAPO's recipe 10)
    dual_clip: Annotated[float, Must(lambda x: x == 0 or x > 1, "must be a ratio above 1; 0 turns it off")] = 0.0
    kl_coef: NotNegative[float] = 1e-4  # 0: no reference model is loaded
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    tis_cap: NotNegative[float] = 0.0  # truncated importance sampling against the sampler's log-probs; 0: off
    # [low, high]: rows whose product of p_trainer / p_sampler lies outside are masked, the others weighed by it
    sequence_mask: Bounds | None = None
    # DMMPT, [entropy, probability]: in right answers of a lower mean entropy, tokens at least so likely leave the loss
    mastered_mask: Mastered | None = None
    # trainer: recomputed; sampler: as sampled (exact only with a float32 sampler)
    old_logprobs: Literal["trainer", "sampler"] = "trainer"
    normalize_std: bool = True  # divide the group advantage by the group's standard deviation

    @property
    def reweighs(self) -> bool:
        """True if a weight or a mask acts on the policy term, whatever the kind of loss."""
        return bool(self.tis_cap or self.sequence_mask or self.mastered_mask)


@dataclass(frozen=True)
class LapoConfig:
    fidelity: Literal["recommended", "paper", "code"] = "recommended"  # see methods/lapo.py
    alpha: NotNegative[float] = 0.7  # Eq. 4
    beta: NotNegative[float] | None = None  # Eq. 6; None: 0.8 (paper: 0.7)
    decay: Positive[float] | None = None  # width of f(d), tokens; None: 100 * rollout.base_tokens / 6229
    sigma: Positive[float] | None = None  # Eq. 7, tokens; None: 120 * rollout.base_tokens / 6229
    percentiles: tuple[float, float] = (30.0, 70.0)  # Eq. 2
    statistic: Literal["median", "mean", "minimum"] = "median"  # what M(q) records (paper, Table 3)
    guidance: Literal["exact", "range", "outside", "implicit"] = "exact"  # how a prompt states n (paper, Table 2)
    length_map: str = ""  # stage 2: the length_map.json that stage 1 wrote


@dataclass(frozen=True)
class NoOptions:
    """The options of a method or a loss that has none."""


@dataclass(frozen=True)
class MethodConfig:
    name: str = ""  # "file:Class" below nanolapo/methods; empty: the class that the script names
    options: dict[str, Any] = field(default_factory=dict)  # the method's own settings


@dataclass(frozen=True)
class WandbConfig:
    mode: Literal["online", "offline", "disabled"] = "disabled"
    project: str = "nanolapo"


@dataclass(frozen=True)
class EvaluateConfig:
    # "name=folder or hub name"; the first is the base of the AES column. A run's models/ stands for all that it exported.
    models: tuple[str, ...] = ()
    prompts: dict[str, Any] = field(default_factory=dict)  # model name: keys of `prompt` that differ for this model
    samples: int = 4  # per problem
    temperatures: tuple[float, ...] = (0.6,)
    top_p: float = 0.95  # for temperatures below 1; temperature 1 is sampled without top-p
    max_new_tokens: int = 32768
    guidance_factors: tuple[float, ...] = ()  # also run the last model, told to use this times its mean length
    # A stated length unrelated to the problem: in the question ("outside:500") or in the thought ("inside:500")
    instructions: tuple[str, ...] = ()
    instructed: tuple[str, ...] = ()  # the models that get them (a run: all of its exports); empty: the last one
    bootstrap: int = 2000  # resamples of problems for the 95 % intervals
    samples_dir: str = ""  # where samples are kept; empty: samples/ of the run directory. Evaluations may share one


@dataclass(frozen=True)
class DemoConfig:
    """How the demo's base model is pre-trained (demo/pretrain.py)."""

    mixture: Literal["typical", "too-long"] = "typical"  # how often it is Quick, Careful and Thorough
    start: str = ""  # a base that goes on with this mixture for `steps` more; empty: from scratch
    steps: Positive[int] = 2200
    batch_tokens: Positive[int] = 1600  # of solutions, padding included
    hidden_size: Positive[int] = 128
    layers: Positive[int] = 3


@dataclass(frozen=True)
class WarmStartConfig:
    """A short supervised phase before RL, for a model too weak to solve any of the problems (demo/warm_start.py)."""

    model: str = ""  # the pretrained model: a local folder or a hub name; the result is written to model.path
    steps: int = 20
    batch_tokens: int = 2500
    learning_rate: float = 1e-4


@dataclass(frozen=True)
class Config:
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    prompt: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    train: TrainConfig = TrainConfig()
    loss: LossConfig = LossConfig()
    lapo: LapoConfig = LapoConfig()
    method: MethodConfig = MethodConfig()
    wandb: WandbConfig = WandbConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    demo: DemoConfig = DemoConfig()
    warm_start: WarmStartConfig = WarmStartConfig()

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir) / self.run.name

    @property
    def rollouts_per_step(self) -> int:
        return self.rollout.prompts_per_step * self.rollout.group_size

    @property
    def optimizer_steps_per_step(self) -> int:
        return self.rollouts_per_step // (self.train.batch_size or self.rollouts_per_step) * self.train.inner_epochs

    def arithmetic(self, world_size: int) -> str:
        """Return the batch arithmetic of one step in words, to check before a long run."""
        r, t, engines = self.rollout, self.train, world_size // self.rollout.tensor_parallel
        return (
            f"{r.prompts_per_step} prompts x {r.group_size} = {self.rollouts_per_step} rollouts a step "
            f"({r.prompts_per_step // engines} prompts on each of {engines} samplers), "
            f"/ {t.batch_size or self.rollouts_per_step} = {self.optimizer_steps_per_step // t.inner_epochs} optimizer "
            f"steps x {t.inner_epochs} inner epochs, micro-batches of at most {t.microbatch_tokens} tokens"
        )
