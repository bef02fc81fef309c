"""Refuses settings that cannot work: a value that is not among its choices, or several that contradict each other.

Types and unknown keys are config_file.py's matter; a method checks its own options, and so does a loss.
"""

from __future__ import annotations

import difflib

from nanolapo.config import Config, LossConfig, UserError

CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "model.sharding": ("ddp", "fsdp2"),
    "prompt.style": ("raw", "chat"),
    "rollout.engine": ("auto", "vllm", "torch"),
    "rollout.dtype": ("", "float32", "bfloat16"),
    "loss.aggregation": ("token_mean", "sequence_mean", "constant"),
    "loss.kl_kind": ("k1", "k2", "k3"),
    "loss.old_logprobs": ("trainer", "sampler"),
    "lapo.fidelity": ("recommended", "paper", "code"),
    "lapo.statistic": ("median", "mean", "minimum"),
    "lapo.guidance": ("exact", "range", "outside", "implicit"),
    "wandb.mode": ("online", "offline", "disabled"),
}


def validate(config: Config, world_size: int = 1) -> None:
    """Raise UserError for values that cannot work together; the message names key, value and remedy."""
    for key, allowed in CHOICES.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value not in allowed:
            close = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.0)[0]
            raise UserError(f"{key}={value!r} is not one of {', '.join(map(repr, allowed))}; did you mean {close!r}?")
    r, t, loss = config.rollout, config.train, config.loss
    positive = {"rollout.prompts_per_step": r.prompts_per_step, "rollout.group_size": r.group_size,
                "rollout.max_new_tokens": r.max_new_tokens, "rollout.max_prompt_tokens": r.max_prompt_tokens,
                "train.steps": t.steps, "train.inner_epochs": t.inner_epochs, "run.checkpoint_every":
                config.run.checkpoint_every, "run.keep_checkpoints": config.run.keep_checkpoints,
                "train.microbatch_tokens": t.microbatch_tokens, "rollout.temperature": r.temperature,
                "train.learning_rate": t.learning_rate, "train.grad_clip": t.grad_clip, "train.max_bad_steps":
                t.max_bad_steps, "rollout.max_rows": r.max_rows, "prompt.length_multiple": config.prompt.length_multiple,
                "rollout.tensor_parallel": r.tensor_parallel, "model.lora_alpha": config.model.lora_alpha,
                "lapo.decay": config.lapo.decay, "lapo.sigma": config.lapo.sigma}  # fmt: skip
    for key, value in positive.items():
        if value is not None and value <= 0:
            raise UserError(f"{key}={value} must be positive")
    if r.top_p != 1.0:
        raise UserError(
            f"rollout.top_p={r.top_p}: the trainer's ratios use the full vocabulary, so samples cut by top-p would be "
            "weighted wrongly; set rollout.top_p=1.0 (evaluate.top_p may be lower)"
        )
    if config.model.lora_rank < 0:
        raise UserError(f"model.lora_rank={config.model.lora_rank} must not be negative; 0 trains all weights")
    if r.tensor_parallel > 1 and r.engine == "torch":
        raise UserError("rollout.tensor_parallel needs rollout.engine=vllm; the torch sampler keeps whole copies")
    if world_size % r.tensor_parallel:
        raise UserError(f"rollout.tensor_parallel={r.tensor_parallel} does not divide the {world_size} ranks")
    engines = world_size // r.tensor_parallel
    if r.prompts_per_step % engines:
        raise UserError(
            f"rollout.prompts_per_step={r.prompts_per_step} does not divide over {engines} samplers; each owns whole "
            f"groups, so use a multiple of {engines}"
        )
    if config.run.export_every < 0:
        raise UserError(
            f"run.export_every={config.run.export_every} must not be negative; 0 writes the final model only"
        )
    batch = t.batch_size or config.rollouts_per_step
    if batch < 0 or batch % r.group_size or config.rollouts_per_step % batch:
        raise UserError(
            f"train.batch_size={batch} must be a multiple of rollout.group_size={r.group_size} and divide the "
            f"{config.rollouts_per_step} rollouts of a step (rollout.prompts_per_step x rollout.group_size)"
        )
    validate_loss(loss)
    if len(t.adam_betas) != 2 or len(config.lapo.percentiles) != 2:
        raise UserError("train.adam_betas and lapo.percentiles need exactly two numbers each")
    if not 0 <= config.lapo.percentiles[0] <= config.lapo.percentiles[1] <= 100:
        raise UserError(f"lapo.percentiles={list(config.lapo.percentiles)}: need 0 <= low <= high <= 100")


def validate_loss(loss: LossConfig) -> None:
    """The part of `validate` that concerns every policy loss; losses/ refuses what one of them cannot work with."""
    if loss.clip_low < 0 or loss.clip_high < 0 or loss.clip_low >= 1:
        raise UserError(f"loss.clip_low={loss.clip_low}, loss.clip_high={loss.clip_high}: need 0 <= clip_low < 1")
    if loss.dual_clip and loss.dual_clip <= 1:
        raise UserError(f"loss.dual_clip={loss.dual_clip} must be a ratio above 1; 0 turns it off")
    if loss.tis_cap and (loss.tis_cap < 0 or loss.old_logprobs == "sampler"):
        raise UserError(
            f"loss.tis_cap={loss.tis_cap}: a positive cap on p_old / p_sampler, which is always 1 under loss.old_logprobs="
            "sampler; set loss.old_logprobs=trainer, or loss.tis_cap=0"
        )
