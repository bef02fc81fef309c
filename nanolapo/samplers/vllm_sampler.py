"""The vLLM sampler: one engine inside each rank's process, fed with token ids and kept on the trainer's weights.

The engine loads no tokenizer and starts no server; under torchrun each rank drives its own engine (vLLM's external
launcher). What comes back is ids and the log-prob of each sampled token *after* the temperature, the number the trainer
computes on its side (vLLM's default is before). Only the weights and the end tokens are taken from the model folder:
every sampling field is set here. Tried with vLLM 0.24 and 0.32; the interface it uses is the same in 0.33.

Two things to know. Creating the engine seeds Python's, NumPy's and torch's global generators with `seed`. And on a single
process the sampler starts a torch.distributed group of one (on loopback), because vLLM needs one.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanolapo.model.folder import load_tokenizer, position_limit, read_settings
from nanolapo.ranks import stay_on_loopback
from nanolapo.samplers.sampler import Decoding, Request, Sample
from nanolapo.samplers.torch_sampler import end_token_ids
from nanolapo.samplers.vllm_fit import EMBEDDING, HEAD, checkpoint_shapes, import_vllm, local_folder

CPU_CACHE, CPU_BLOCK = 2**30, 128  # bytes of keys and values at most; tokens that vLLM puts into a block on a CPU
# What the engine is, as an error says it. It samples only when it is READY.
READY = "is awake and has its weights"
ASLEEP = "sleeps and has no weights: call wake, then load_weights"
EMPTY = "has slept and got no weights since: call load_weights"


def cpu_cache(token_bytes: float, rows: int, length: int) -> int:
    """Bytes of vLLM's cache on a CPU: room for `rows` rows of `length` tokens, at most CPU_CACHE (then rows wait, or are
    computed again). vLLM uses all of it in turn, so blocks that are not needed would take up memory, too.

    >>> cpu_cache(23040, rows=32, length=288) == (32 * 3 + 1) * 128 * 23040, cpu_cache(23040, 256, 2048) == 2**30
    (True, True)
    """
    return min(int((rows * -(-length // CPU_BLOCK) + 1) * CPU_BLOCK * token_bytes), CPU_CACHE)


class VLLMSampler:
    """`generate`, `load_weights`, `sleep`, `wake`, `close`: the same small interface as torch_sampler.TorchSampler.

    With `tensor_parallel` = N each N neighbouring ranks share one copy of the weights and must be given the same requests.
    """

    def __init__(
        self,
        model_path: str,
        dtype: torch.dtype,
        *,
        max_model_len: int,  # prompt + response, tokens
        max_rows: int = 256,  # sequences decoded at once
        gpu_memory_utilization: float = 0.45,
        tensor_parallel: int = 1,
        seed: int = 0,
        trains: bool = True,  # False: no sleep, and samples without log-probs
    ) -> None:
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RuntimeError("VLLMSampler: start the process group first, the engines of all ranks meet in it")
        vllm = import_vllm()
        from vllm.platforms import current_platform

        folder = local_folder(model_path)
        config, generation = read_settings(str(folder), "model.path")
        self.end_ids = end_token_ids(load_tokenizer(str(folder)), config, generation)
        self.shapes = checkpoint_shapes(folder)
        text = config.get_text_config()
        self.tied = bool(text.tie_word_embeddings)
        self.vocab_size = int(text.vocab_size)
        # vLLM refuses a longer one than the model's own limit; preflight.py has seen that every request fits into that
        max_model_len = min(max_model_len, position_limit(config) or max_model_len)
        self.dtype, self.max_model_len = dtype, max_model_len
        on_cpu = current_platform.is_cpu()
        self.can_sleep, self.records_logprobs = trains and not on_cpu, trains
        self.state = READY  # see `_whole`
        self.owns_group = not dist.is_initialized()
        # vLLM needs a group. One that it starts for itself listens on every interface (seen in 0.24)
        if self.owns_group:
            stay_on_loopback()
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        token_bytes = 2 * text.num_hidden_layers * heads * size * dtype.itemsize
        self.llm = vllm.LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            trust_remote_code=False,
            dtype=dtype,
            seed=seed,
            max_model_len=max_model_len,
            max_num_seqs=max_rows,
            gpu_memory_utilization=gpu_memory_utilization,
            tensor_parallel_size=tensor_parallel,
            distributed_executor_backend=None if self.owns_group or dist.get_world_size() == 1 else "external_launcher",
            enforce_eager=on_cpu,  # CUDA graphs on a GPU
            # On a CPU the user's VLLM_CPU_KVCACHE_SPACE, if set, wins over this.
            kv_cache_memory_bytes=cpu_cache(token_bytes, max_rows, max_model_len) if on_cpu else None,
            enable_sleep_mode=self.can_sleep,
            enable_prefix_caching=True,  # the rows of a group share their prompt
            generation_config="vllm",  # not the folder's temperature, top_k, penalties, ...
            logprobs_mode="processed_logprobs",  # after temperature
        )
        # From 0.32 on garbage collection of the engine shuts it down, which would destroy the trainer's process group.
        finalizer = getattr(self.llm.llm_engine.engine_core, "_finalizer", None)
        if finalizer is not None and not self.owns_group:
            finalizer.detach()

    def generate(
        self,
        requests: Sequence[Request],
        decoding: Decoding,
        progress: Callable[[int], object] | None = None,
        finished: Callable[[int, Sample], None] | None = None,
    ) -> list[Sample]:
        """Sample every request; results in the order of the requests. `progress` gets the tokens of each finished row,
        `finished` the number of its request and the row itself while others are still being sampled.

        Log-probs are those of softmax(logits / temperature) in fp32; at temperature 0 those of temperature 1, with top_p
        those of the cut distribution. Where the weights give no finite numbers the log-probs are NaN and are handed on
        as they are: the caller drops such rows.
        """
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        for i, request in enumerate(requests):  # vLLM would cut the response short, or die
            length = len(request.prompt_ids) + request.max_new_tokens
            if length > self.max_model_len:
                raise ValueError(f"request {i}: prompt + new tokens = {length} > max_model_len {self.max_model_len}")
            if not all(0 <= token < self.vocab_size for token in request.prompt_ids):
                raise ValueError(f"request {i}: a prompt id is not in [0, {self.vocab_size})")
        params = [self._params(request, decoding) for request in requests]
        engine, samples = self.llm.llm_engine, dict[int, Sample]()
        with self._whole("generate", READY):
            names = self.llm.enqueue(prompts, params, use_tqdm=False)  # an output's name, and a suffix
            numbers = {name.partition("-")[0]: i for i, name in enumerate(names)}
            while engine.has_unfinished_requests():
                for output in engine.step():  # the rows that have just finished
                    number = numbers[output.request_id]
                    samples[number] = _to_sample(output.outputs[0])
                    if progress is not None:
                        progress(len(samples[number].ids))
                    if finished is not None:
                        finished(number, samples[number])
        return [samples[number] for number in range(len(requests))]

    def _params(self, request: Request, decoding: Decoding) -> Any:
        """vLLM's SamplingParams with every field that changes the distribution written out."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        return SamplingParams(
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=0,
            min_p=0.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            repetition_penalty=1.0,
            seed=request.seed % 2**63,  # -1 would mean "no seed", and torch takes 64 bits
            max_tokens=request.max_new_tokens,
            min_tokens=0,
            stop_token_ids=self.end_ids,
            ignore_eos=True,  # end_ids has them all; else vLLM would also end at its own reading of the config
            logprobs=0 if self.records_logprobs else None,  # the sampled token's only
            flat_logprobs=True,  # flat lists instead of one dict per token
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights, by their names in the model's folder, and drop the keys and values cached from the old ones.

        Tensors are taken one at a time (a generator may gather each from its shards) and copied. An unknown, repeated or
        missing name or another shape raises ValueError; the half-loaded engine then refuses to go on.
        """
        has_slept = self.state == EMPTY
        with self._whole("load_weights", READY, EMPTY):
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._checked(named_tensors)})
            if has_slept:
                self._take_back("kv_cache")
            if not self.llm.reset_prefix_cache():
                raise RuntimeError("load_weights: vLLM did not drop its prefix cache")

    def _checked(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        missing = set(self.shapes) - ({HEAD} if self.tied else set())
        for name, tensor in named_tensors:
            if self.tied and name == HEAD:
                continue  # comes with the embedding
            if name not in missing:
                kind = "repeated" if name in self.shapes else "unexpected"
                raise ValueError(f"load_weights: {kind} name {name!r}")
            if tuple(tensor.shape) != self.shapes[name]:
                raise ValueError(f"load_weights: {name} has shape {tuple(tensor.shape)}, not {self.shapes[name]}")
            missing.remove(name)
            yield name, (cast := tensor.detach().to(self.dtype))
            if self.tied and name.endswith(EMBEDDING):
                yield HEAD, cast  # the engine keeps a second copy, which would silently stay stale
        if missing:
            raise ValueError(f"load_weights: missing names {sorted(missing)}")

    @contextmanager
    def _whole(self, call: str, *states: str, then: str = READY) -> Iterator[None]:
        """Allow a call only in these states, and afterwards be in the state `then`. A call that breaks off leaves
        half-loaded weights or waiting requests, so no call is allowed after it. Raises RuntimeError."""
        if self.state not in states:
            raise RuntimeError(f"{call}: the engine {self.state}")
        self.state = f"is not usable since {call} broke off"
        yield
        self.state = then

    def sleep(self) -> None:
        """Free the GPU for the trainer: weights, cached keys and values are discarded. Nothing is copied to the host,
        because the trainer sends all weights after every update.

        Until `wake` and `load_weights` have come, `generate` raises RuntimeError: it would sample from whatever lies in
        that memory. On a CPU, where vLLM frees nothing, the rule is the same.
        """
        with self._whole("sleep", READY, then=ASLEEP):
            if self.can_sleep:
                self.llm.sleep(level=2)

    def wake(self) -> None:
        """Take the memory of the weights back, still without values: load_weights must come next. At its end that takes
        the memory for keys and values back, when the copies that it needed on the way are gone."""
        with self._whole("wake", ASLEEP, then=EMPTY):
            self._take_back("weights")

    def _take_back(self, tag: str) -> None:
        """vLLM maps its memory at the driver, which counts the free blocks that torch keeps for the trainer as used."""
        if self.can_sleep:
            torch.cuda.empty_cache()  # vLLM 0.32 does so itself, 0.24 does not
            self.llm.wake_up(tags=[tag])

    def close(self) -> None:
        """Free the engine and its memory. A process group that was there before stays, with vLLM's subgroups in it."""
        if self.owns_group:
            self.llm.llm_engine.engine_core.shutdown()  # destroys the process group, too
        else:
            self.llm.llm_engine.model_executor.shutdown()
        del self.llm
        gc.unfreeze()  # vLLM froze the heap when it started
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _to_sample(completion: Any) -> Sample:
    """Convert vLLM's answer to one request. Each position starts with the sampled token; likelier ones may follow."""
    ids, flat = np.asarray(completion.token_ids, dtype=np.int64), completion.logprobs
    if flat is None:
        return Sample(ids, np.zeros(0, dtype=np.float32), finished=completion.finish_reason == "stop")
    first = np.asarray(flat.start_indices, dtype=np.int64)
    if not np.array_equal(np.asarray(flat.token_ids, dtype=np.int64)[first], ids):
        raise RuntimeError("vLLM's log-probs do not belong to the sampled tokens")
    logprobs = np.asarray(flat.logprobs, dtype=np.float32)[first]
    return Sample(ids, logprobs, finished=completion.finish_reason == "stop")
