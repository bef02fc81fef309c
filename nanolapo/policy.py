"""The model being trained: load it, score rollouts with it, step its optimizer, name its weights for the sampler.

Master weights, gradients and optimizer state are always float32 (model/precision.py). model/sharding.py splits the model
over ranks and says why gradients are *summed* over them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers import PreTrainedModel

from nanolapo.config import Config, RunStopped
from nanolapo.microbatches import MicroBatch
from nanolapo.model.attention import use_shared_prompts
from nanolapo.model.folder import layers_of, load_model, named_weights, plain_name
from nanolapo.model.logprobs import LogprobHead
from nanolapo.model.lora import adapters_off, add_lora
from nanolapo.model.precision import MasterGradients, cast_parameters, make_copy, refresh_copy
from nanolapo.model.sharding import shard
from nanolapo.model.spread import load_on_main
from nanolapo.model.trial import check_packed, tolerance
from nanolapo.ranks import Ranks


class BadStepsError(RunStopped):
    """Too many optimizer steps in a row had a gradient that is not finite."""


Give = Callable[[nn.Module], None]


def freeze(model: PreTrainedModel) -> None:
    model.eval().requires_grad_(False)


class Scorer(nn.Module):
    """A causal LM that says how likely given tokens were. All computing goes through `forward`, so that the hooks of
    sharding always run."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        """Log-probs (and entropy) [N] of the response tokens, each predicted from the token before it."""
        hidden_1SD = self.model.get_decoder()(
            input_ids=batch.ids_S[None],
            position_ids=batch.positions_S[None],
            use_cache=False,
            packing=batch.packing,
        ).last_hidden_state
        head = self.model.get_output_embeddings()
        return head(hidden_1SD[0, batch.predictor_N], batch.ids_S[batch.tokens_N], temperature, with_entropy)


class Policy:
    """Model, frozen reference, optimizer and learning-rate schedule. `trained` maps names to the parameters (or this rank's
    slices of them) that the optimizer moves and a checkpoint holds."""

    def __init__(self, config: Config, device: torch.device, ranks: Ranks | None = None) -> None:
        self.config, self.device, self.ranks = config, device, ranks or Ranks()
        self.dtype = getattr(torch, config.model.dtype)
        self.packed: list[str] = []  # what model/trial.py has found, by dtype
        self.packed_seconds = 0.0
        self.model, give = self.load(self.make_trainable, device)
        masters_compute = self.sharded or self.dtype == torch.float32
        self.bf16_copy = None if masters_compute else make_copy(self.model, self.dtype)
        if self.bf16_copy:  # on a GPU the attention of 16 bits is another kernel than that of float32
            with self.ranks.together():
                self.try_packed(self.bf16_copy)
        model = self.bf16_copy or self.model
        self.scorer = self.prepare(model, give)
        self.trained = {plain_name(n): p for n, p in self.model.named_parameters() if p.requires_grad}
        self.gradients = MasterGradients(self.trained.values())
        if not self.sharded:  # fsdp2 collects gradients itself
            self.gradients.collect(self.model, model)
        self.reference = self.load_reference() if config.loss.kl_coef else None
        self.num_steps = 0  # optimizer steps taken
        self.progress = 0.0  # share of the run done at the start of this step, set by the loop
        self.bad_steps = 0  # steps in a row that were not taken because the gradient was not finite
        self.total_steps = config.train.steps * config.optimizer_steps_per_step
        t = config.train
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=t.learning_rate, betas=(t.adam_betas[0], t.adam_betas[1]),
            weight_decay=t.weight_decay, fused=True,
        )  # fmt: skip

    @property
    def sharded(self) -> bool:
        """True if each rank holds only slices. A single rank has nothing to split."""
        return self.config.model.sharding == "fsdp2" and self.ranks.count > 1

    def load(
        self, adapt: Callable[[PreTrainedModel], None], device: torch.device
    ) -> tuple[PreTrainedModel, Give | None]:
        """Load the model that the stage starts from and adapt it. If it is to be split, it is still empty, and the second
        value gives each part its weights."""
        if self.sharded:
            return load_on_main(self.config.model.path, adapt, self.ranks)
        with self.ranks.together():
            model = load_model(self.config.model.path, device)
            adapt(model)
        if self.ranks.count > 1:
            bits = sum(int(p.detach().view(torch.int32).sum()) for p in model.parameters())  # exact in any order
            remedy = "every node must read the same model folder"
            self.ranks.agree({f"in model.path={self.config.model.path!r} the sum of all bits": bits}, remedy)
        return model, None

    def make_trainable(self, model: PreTrainedModel) -> None:
        """Try the model, then set up gradient checkpointing and LoRA as the config says, in place. Raises UserError if
        packed rows do not get the log-probs that transformers gives them."""
        m = self.config.model
        self.try_packed(model)
        model.eval()
        if m.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            layers = layers_of(model)
            for layer in layers[: m.num_checkpointed(len(layers))]:
                layer.training = True  # as transformers asks. Its parts stay as they are: some add noise in training
        if m.lora_rank:
            add_lora(model, m.lora_rank, m.lora_alpha)

    def try_packed(self, model: PreTrainedModel) -> None:
        if model.device.type == "meta":  # with fsdp2 the main rank tries it for all
            return
        started = time.monotonic()
        off = check_packed(model, self.config.model.path, self.config.rollout.longest_row)
        self.packed.append(f"{model.dtype}: off by {off:.1e}, allowed {tolerance(model):.1e}".removeprefix("torch."))
        self.packed_seconds += time.monotonic() - started

    def prepare(self, model: PreTrainedModel, give: Give | None, offload: bool = False) -> Scorer:
        """Wrap a model for scoring, and split it over the ranks if model.sharding says so (`give`: see `load`).

        offload: the weights stay in host memory and visit the device while they are used.
        """
        use_shared_prompts(model)
        compiled = self.config.model.compiled_on(self.device.type) and not offload
        model.set_output_embeddings(LogprobHead(model.get_output_embeddings(), compiled))
        if compiled:
            for layer in layers_of(model):
                layer.compile(dynamic=True)  # one graph for all layers and lengths; attention interrupts it
        scorer = Scorer(model)
        if give:
            shard(scorer, layers_of(model), self.dtype, give, offload and self.device.type != "cpu")
        elif offload:
            cpu_offload(model, self.device)  # layer by layer
        return scorer

    def load_reference(self) -> Scorer:
        """Load the model that the stage started from, frozen. With LoRA it is in the policy's model already."""
        if self.config.model.lora_rank:
            return self.scorer
        offload = self.config.model.offload_reference
        model, give = self.load(freeze, torch.device("cpu") if offload else self.device)
        if not self.sharded:
            cast_parameters(model, self.dtype)
        return self.prepare(model, give, offload)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    def logprobs(
        self, batch: MicroBatch, with_entropy: bool = False, reference: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the log-prob of every sampled token given all tokens before it, float32 [B, T], and its entropy.

        Both are 0 where the mask is 0. The prompt's last position predicts the first token of a response. The head computes
        response tokens only.
        """
        scorer = self.reference if reference else self.scorer
        assert scorer is not None, "there is no reference model when loss.kl_coef is 0"
        with adapters_off(scorer.model) if reference else nullcontext():
            logprobs_N, entropy_N = scorer(batch, self.config.rollout.temperature, with_entropy)
        return batch.scatter(logprobs_N), None if entropy_N is None else batch.scatter(entropy_N)

    def learning_rate(self) -> float:
        """Linear warm-up, then cosine decay to final_lr_fraction of the peak, over the share of the run that is done.

        This is the share of optimizer steps taken, or the loop's `progress` if that is larger. Steps alone would end above
        the floor when a token budget ends the run (train.sampled_tokens) or batches without signal were skipped.
        """
        t = self.config.train
        done = max(self.num_steps / self.total_steps, self.progress)
        if done < t.warmup_fraction:
            return t.learning_rate * min(1.0, (done + 1 / self.total_steps) / t.warmup_fraction)
        decayed = (done - t.warmup_fraction) / (1 - t.warmup_fraction) if t.warmup_fraction < 1 else 1.0
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, decayed)))
        return t.learning_rate * (t.final_lr_fraction + (1 - t.final_lr_fraction) * cosine)

    def weights_changed(self) -> None:
        """Bring the bf16 copy up to date. Whoever writes to the trained weights must call this."""
        if self.bf16_copy:
            refresh_copy(self.model, self.bf16_copy)

    def step(self) -> float:
        """Sum gradients over ranks, clip, step; return the global gradient norm before clipping.

        If the norm is not finite, weights and optimizer stay as they are. All ranks see this, because gradients are summed.
        Raises BadStepsError after train.max_bad_steps such steps in a row.
        """
        norm = self.gradients.sum_and_clip(self.config.train.grad_clip)
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate()
            self.optimizer.step()
            self.weights_changed()
            self.num_steps += 1
        self.bad_steps = 0 if math.isfinite(norm) else self.bad_steps + 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.bad_steps >= self.config.train.max_bad_steps:
            raise BadStepsError(
                f"the gradient was not finite {self.bad_steps} times in a row; the weights are unchanged since. "
                "Lower train.learning_rate"
            )
        return norm

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Return the float32 weights by their names in a model folder, see model/folder.py."""
        return named_weights(self.model)

    def sampler_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Return the same weights as the sampler holds them, cast to its dtype."""
        return named_weights(self.model, getattr(torch, self.config.rollout.dtype or self.config.model.dtype))
