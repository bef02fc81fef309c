"""The model being trained: load it, score rollouts with it, step its optimizer, name its weights for the sampler.

Master weights, gradients and optimizer state are float32 whatever the arithmetic is, see precision.py. Gradients are
*summed* over ranks; sharding.py says how the model lies on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import cpu_offload
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from nanolapo.attention import use_stems
from nanolapo.config import Config, UserError
from nanolapo.logprobs import LogprobHead
from nanolapo.lora import adapters_off, add_lora, lora_layers, merged_delta
from nanolapo.microbatches import MicroBatch
from nanolapo.precision import WorkingCopy, cast_parameters, gradient_of, only_rows_read
from nanolapo.sharding import shard, sum_gradients, whole


def disable_dropout(model: nn.Module) -> None:
    """Dropout would make old and new log-probs differ by chance; RL fine-tuning runs without it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def load_model(path: str, device: torch.device, key: str = "model.path") -> PreTrainedModel:
    """Load a causal LM in float32 from a local folder or by hub name. Raises UserError naming the config's key."""
    local = Path(path)
    if not path or (local.exists() and not (local / "config.json").exists()):
        raise UserError(f"{key}={path!r}: no config.json there; give a Hugging Face model folder or a hub name")
    try:  # safetensors only: a pickle file could run code
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        missing = "no such local folder, and not to be had from the hub; without a network give a local folder"
        source = "cannot be loaded" if local.exists() else missing
        raise UserError(f"{key}={path!r}: {source} ({first})") from None
    model, info = loaded
    if info["missing_keys"]:
        raise UserError(f"{key}={path!r}: the files lack {len(info['missing_keys'])} weights of the model, such as "
                        f"{min(info['missing_keys'])}; fetch or save the model again")  # fmt: skip
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):  # log-probs come straight from the head
        if getattr(model.config, name, None) not in (None, 1.0):
            raise UserError(f"{key}={path!r}: models that change their logits ({name}) are not supported")
    disable_dropout(model)
    return model.to(device)


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor) of every parameter and saved buffer, exactly the names of a saved checkpoint.

    A tied head appears once, under the embedding's name; samplers that keep two copies must fill both. Slices are brought
    together one tensor at a time, and LoRA matrices are added in; all ranks must take the same steps of this iterator.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    adapters = {f"{plain_name(name)}.base_layer.weight": layer for name, layer in lora_layers(model).items()}
    for name, tensor in model.state_dict().items():
        plain = plain_name(name)
        if plain in tied or ".lora_" in plain:
            continue
        full = whole(tensor.detach())
        if plain in adapters:
            full = full + merged_delta(adapters[plain])
        yield plain.replace(".base_layer.", "."), full


def plain_name(name: str) -> str:
    """Without what torch.compile and activation-checkpoint wrappers put in."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def compile_token_wise(model: PreTrainedModel) -> None:
    """Compile, in place, what looks at one token at a time: MLPs and norms, the same code for any number of tokens.
    Attention reads lists of rows that differ in every micro-batch, and is one fused kernel a row anyway."""
    for name, module in model.get_decoder().named_modules():
        if name.rsplit(".", 1)[-1] in ("mlp", "input_layernorm", "post_attention_layernorm"):
            module.compile(dynamic=True)


class Scorer(nn.Module):
    """A causal LM asked one question: how likely were these tokens? This forward is the only way into the model, so that
    the hooks of sharding always run."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        """Log-probs (and entropy) [N] of the response tokens, each predicted from the token before it."""
        hidden_1SD = self.model.get_decoder()(
            input_ids=batch.ids_S[None], position_ids=batch.positions_S[None], use_cache=False, stems=batch.stems
        ).last_hidden_state
        head = self.model.get_output_embeddings()
        return head(hidden_1SD[0, batch.before_N], batch.ids_S[batch.tokens_N], temperature, with_entropy)


class Policy:
    """Model, frozen reference, optimizer and learning-rate schedule. `trained` are the parameters (or this rank's slices
    of them) that the optimizer moves and a checkpoint holds, by name."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.dtype = getattr(torch, config.model.dtype)
        # One rank has nothing to cut. A model that will be cut is loaded into host memory and moved layer by layer.
        self.sharded = config.model.sharding == "fsdp2" and dist.is_initialized()
        self.model = load_model(config.model.path, torch.device("cpu") if self.sharded else device)
        self.model.train(config.model.gradient_checkpointing)  # without dropout the two modes compute the same
        if config.model.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.model.lora_rank:
            add_lora(self.model, config.model.lora_rank, config.model.lora_alpha)
        self.working = None if self.sharded or self.dtype == torch.float32 else WorkingCopy(self.model, self.dtype)
        model, head_gradient = self.working.model if self.working else self.model, None
        # fsdp2 must get whole gradients to cut up; otherwise head and embedding add theirs to the masters' directly.
        if not self.sharded:
            head_gradient = partial(gradient_of, self.model.get_output_embeddings().weight)
            only_rows_read(model.get_input_embeddings())
        self.scorer = self.spread(model, head_gradient)
        self.trained = {plain_name(n): p for n, p in self.model.named_parameters() if p.requires_grad}
        self.reference = self.load_reference() if config.loss.kl_coef else None
        self.num_steps = 0  # optimizer steps taken
        self.progress = 0.0  # share of the run done at the start of this step, set by the loop
        self.bad_steps = 0  # optimizer steps not taken in a row, because their gradient was not finite
        self.total_steps = config.train.steps * config.optimizer_steps_per_step
        t = config.train
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=t.learning_rate, betas=(t.adam_betas[0], t.adam_betas[1]),
            weight_decay=t.weight_decay, fused=True,
        )  # fmt: skip

    def spread(
        self, model: PreTrainedModel, head_gradient: Callable[[], Tensor] | None = None, offload: bool = False
    ) -> Scorer:
        """Cut the model up over the ranks if it is to be; all computing goes through what is returned.

        head_gradient: see LogprobHead; offload: weights stay in host memory and visit the device while they are used.
        """
        use_stems(model)
        model.set_output_embeddings(LogprobHead(model.get_output_embeddings(), head_gradient))
        if self.config.model.compile:
            compile_token_wise(model)
        scorer = Scorer(model)
        if self.sharded:
            shard(scorer, model.get_decoder().layers, self.dtype, offload and self.device.type != "cpu")
        elif offload:
            cpu_offload(model, self.device)  # layer by layer
        return scorer

    def load_reference(self) -> Scorer:
        """The stage's first model, frozen; with LoRA it is in the model already."""
        if self.config.model.lora_rank:
            return self.scorer
        offload = self.config.model.offload_reference
        at_start = torch.device("cpu") if self.sharded or offload else self.device
        model = load_model(self.config.model.path, at_start).eval().requires_grad_(False)
        if not self.sharded:
            cast_parameters(model, self.dtype)
        return self.spread(model, offload=offload)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    def logprobs(
        self, batch: MicroBatch, with_entropy: bool = False, reference: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-prob of every sampled token given all before it, float32 [B, T] (0 where mask is 0), and its entropy.

        A response's first token is predicted from the prompt's last position. Only response tokens meet the head.
        """
        scorer = self.reference if reference else self.scorer
        assert scorer is not None, "there is no reference model when loss.kl_coef is 0"
        with adapters_off(scorer.model) if reference else nullcontext():
            logprobs_N, entropy_N = scorer(batch, self.config.rollout.temperature, with_entropy)
        return batch.scatter(logprobs_N), None if entropy_N is None else batch.scatter(entropy_N)

    def learning_rate(self) -> float:
        """Linear warm-up, then cosine decay to final_lr_fraction of the peak, over the share of the run that is done.

        That is the share of optimizer steps taken, or the loop's own where it is further: when sampled tokens end the run
        (train.match_runs), or batches were skipped for want of any signal, the steps taken would stop short of the floor.
        """
        t = self.config.train
        done = max(self.num_steps / self.total_steps, self.progress)
        if done < t.warmup_fraction:
            return t.learning_rate * min(1.0, (done + 1 / self.total_steps) / t.warmup_fraction)
        decayed = (done - t.warmup_fraction) / (1 - t.warmup_fraction) if t.warmup_fraction < 1 else 1.0
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, decayed)))
        return t.learning_rate * (t.final_lr_fraction + (1 - t.final_lr_fraction) * cosine)

    def weights_changed(self) -> None:
        """To be called by whoever writes to the trained weights."""
        if self.working:
            self.working.refresh()

    def step(self) -> float:
        """Sum gradients over ranks, clip, step; returns the global gradient norm before clipping.

        A norm that is not finite (on any rank: the sum carries it to all) leaves weights and optimizer untouched.
        """
        sum_gradients(self.trained.values())
        norm = float(whole(nn.utils.clip_grad_norm_(self.trained.values(), self.config.train.grad_clip)))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate()
            self.optimizer.step()
            self.weights_changed()
            self.num_steps += 1
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What the sampler is sent, see named_weights."""
        return named_weights(self.model)
