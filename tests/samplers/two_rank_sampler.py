"""Run by test_vllm_sampler.py under torchrun: two ranks with an engine each and different prompts, or with one engine
between them (tensor parallel) and the same prompts; two weight updates.

torchrun --standalone --nproc_per_node 2 tests/samplers/two_rank_sampler.py MODEL_FOLDER TENSOR_PARALLEL
"""

from __future__ import annotations

import gc
import sys

import pytest
import torch
import torch.distributed as dist
from engine_helpers import children, listening_addresses, make_requests, mismatch, named_weights, perturb
from transformers import AutoModelForCausalLM

from nanolapo.samplers.sampler import Decoding
from nanolapo.samplers.vllm_sampler import VLLMSampler


def main(folder: str, tensor_parallel: int) -> None:
    with pytest.raises(RuntimeError, match="process group first"):
        VLLMSampler(folder, torch.float32, max_model_len=128)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sampler = VLLMSampler(folder, torch.float32, max_model_len=128, max_rows=8, tensor_parallel=tensor_parallel)
    engine = rank // tensor_parallel
    executor = sampler.llm.llm_engine.model_executor
    assert type(executor).__name__ == "ExecutorWithExternalLauncher"  # on GPUs it picks this rank's device
    for update in range(2):
        # Unequal work: a rank that has finished must not wait for the other, nor hold it up.
        requests = make_requests(4 + 8 * engine, length=8 + 40 * engine, seed=engine)
        samples = sampler.generate(requests, Decoding())
        worst = abs(mismatch(model, requests, samples)).max()
        print(f"rank {rank} update {update} first {samples[0].ids[:4].tolist()} worst {worst:.1e}", flush=True)
        assert worst < 1e-3
        perturb(model, 0.1, seed=update)  # the same on both ranks
        sampler.sleep()
        sampler.wake()
        sampler.load_weights(named_weights(model))
    assert listening_addresses() <= {"127.0.0.1"}, listening_addresses()
    sampler.close()
    del executor, sampler
    gc.collect()
    assert not children(), children()
    total = torch.ones(1)
    dist.all_reduce(total)  # the trainer's process group survives the engine
    print(f"rank {rank} ok, {total.item():.0f} ranks", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
