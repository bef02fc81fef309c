"""Tries what a run rests on before its first rollout: on the real folder, in seconds, and mostly without weights.

A check is a function. Its docstring says what it proves. It returns what it found, or raises UserError with the remedy.
What is checked where it is used (config, data, load_model, prompts) is not checked a second time here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as HfTokenizer

from nanolapo.checks import NOTE, Preflight
from nanolapo.config import GUIDANCE_ROOM, Config, UserError
from nanolapo.data.load import Data
from nanolapo.data.prompts import Guidance, Prompter
from nanolapo.grader.boxes import last_boxed
from nanolapo.methods.base import Method
from nanolapo.model.folder import (
    file_of,
    load_model,
    load_tokenizer,
    named_weights,
    position_limit,
    read_settings,
    settings_of,
    write_whole,
)
from nanolapo.model.precision import seconds_of_product
from nanolapo.policy import Policy
from nanolapo.samplers.choose import check_engine, pick_engine
from nanolapo.samplers.torch_sampler import end_token_ids
from nanolapo.samplers.vllm_fit import checkpoint_shapes, local_folder

TRIED = 20  # problems whose prompts and reference answers are tried
MOST_UNKNOWN = 0.01  # of the prompts' tokens
PROBE = "What is 3+4?\n  Is it 7, or x^2? \\boxed{7}"  # words, digits, blanks and a line break
LORA_RATE = 1e-4  # usual for LoRA. In bfloat16 ten updates at 1e-6 lost 97 % of what they had changed, here none


def before_training(config: Config, data: Data, method: Method, fetch: bool = True) -> Preflight:
    """Make the checks of a training run that need no weights. fetch=False: no weights are fetched from the hub either."""
    path, key, new = config.model.path, "model.path", config.rollout.max_new_tokens
    problems, dtype = enumerate(data.problems[:TRIED]), getattr(torch, config.model.dtype)
    guidances = [method.guidance(problem, i % config.rollout.group_size, 0) for i, problem in problems]
    checks = sampling_checks(path, key, data, guidances, (new, "rollout.max_new_tokens"))
    checks.append(partial(speed_of_dtype, dtype))
    if config.model.lora_rank:
        checks.append(partial(rounding_of_lora, config))
    if not fetch and not Path(path).is_dir():
        return Preflight().run(checks)
    checked = Preflight().run([partial(kind_of_model, config), *checks])
    model = load_model(path, torch.device("meta"))
    export = partial(trial_export, key, model, dtype, data.tokenizer)
    return checked.run([partial(names_and_shapes, path, key, model), export])


def after_loading(checked: Preflight, policy: Policy) -> Preflight:
    """Add what was tried with the weights, and how long it took, where the policy was made."""
    checked.seconds += policy.packed_seconds
    return checked.run([partial(packed_rows, policy)])


def before_evaluation(config: Config, path: str, key: str, data: Data, guidances: Sequence[Guidance]) -> Preflight:
    """Make the checks of one model of an evaluation."""
    new = config.evaluate.max_new_tokens, "evaluate.max_new_tokens"
    return Preflight().run(sampling_checks(path, key, data, guidances, new))


def before_writing(key: str, model: PreTrainedModel, dtype: torch.dtype, tokenizer: HfTokenizer) -> Preflight:
    """Make the check of a script that will only train a model and write it."""
    return Preflight().run([partial(speed_of_dtype, dtype), partial(trial_export, key, model, dtype, tokenizer)])


def sampling_checks(
    path: str, key: str, data: Data, guidances: Sequence[Guidance], limit: tuple[int, str]
) -> list[partial[str]]:
    """Return the checks of a model that is sampled from. `limit`: new tokens at most, and the key that says so."""
    config, generation = read_settings(path, key)
    ends = end_token_ids(data.tokenizer, config, generation)
    asked = [(p.question, guidance) for p, guidance in zip(data.problems[:TRIED], cycle(guidances), strict=False)]
    prompts = [data.prompter.ids(*one) for one in asked]
    needed = data.longest_prompt + GUIDANCE_ROOM * any(g.inside or g.outside for g in guidances) + limit[0]
    return [
        partial(tokenizer_ids, path, key, data.tokenizer, [data.prompter.render(*one) for one in asked]),
        partial(known_tokens, key, data.tokenizer, prompts),
        partial(ids_of_the_model, key, [*prompts, ends], config),
        partial(longest_position, key, needed, config, limit[1]),
        partial(end_of_turn, key, data, ends),
        partial(place_of_question, data.prompter, asked),
        partial(place_of_guidance, data.prompter, asked),
        partial(reference_answers, key, data),
    ]


def speed_of_dtype(dtype: torch.dtype, key: str = "model.dtype") -> str:
    """A matrix product in this dtype takes at most twice as long as in float32; on many CPUs one in bfloat16 takes more."""
    if dtype == torch.float32 or torch.cuda.is_available():
        return f"{dtype} needs no trial here".removeprefix("torch.")
    times = seconds_of_product(dtype) / seconds_of_product(torch.float32)
    found = f"on this CPU a product in bfloat16 takes {times:.1f} times as long as in float32"
    return f"{NOTE}{found}; set {key}=float32" if times > 2 else found


def rounding_of_lora(config: Config) -> str:
    """What a LoRA adds to a weight is not rounded away in the sampler and the export, which hold the sum."""
    rate, dtypes = config.train.learning_rate, {"model": config.model.dtype, "rollout": config.rollout.dtype}
    rounded = [f"{section}.dtype=float32" for section, dtype in dtypes.items() if dtype == "bfloat16"]
    if not rounded or rate >= LORA_RATE:
        return f"train.learning_rate={rate:g} in {'bfloat16' if rounded else 'float32'}"
    return (
        f"{NOTE}sampler or export hold bfloat16, which loses most of what LoRA adds at train.learning_rate={rate:g}; set "
        f"train.learning_rate={LORA_RATE:g} or more, as is usual for LoRA, or {' '.join(rounded)}"
    )


def tokenizer_ids(path: str, key: str, tokenizer: HfTokenizer, texts: Sequence[str]) -> str:
    """The tokenizer makes the ids that its tokenizer.json makes."""
    file = file_of(path, "tokenizer.json")
    if file is None:
        return f"no tokenizer.json: transformers made a {type(tokenizer).__name__} from other files"
    plain = Tokenizer.from_file(str(file))
    plain.no_truncation()
    plain.no_padding()
    for text in texts:
        expected, ids = plain.encode(text).ids, list(tokenizer(text)["input_ids"])
        if ids != expected:
            raise UserError(
                f"{key}={path!r}: a prompt has other ids than tokenizer.json's: {tokenizer.convert_ids_to_tokens(ids[:9])} "
                f"for {plain.encode(text).tokens[:9]}; tokenizer_config.json must not add tokens that tokenizer.json lacks"
            )
    return f"{len(texts)} prompts get the ids of tokenizers.Tokenizer.from_file"


def known_tokens(key: str, tokenizer: HfTokenizer, prompts: Sequence[list[int]]) -> str:
    """The tokenizer can write the prompts."""
    ids = [i for prompt in prompts for i in prompt]
    unknown = ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
    if not all(prompts) or unknown > MOST_UNKNOWN * len(ids):
        raise UserError(
            f"{key}: the tokenizer cannot write the prompts: {unknown} of {len(ids)} tokens are unknown; a prompt reads "
            f"{tokenizer.decode(prompts[0])[:120]!r}. The folder's tokenizer belongs to another model or language"
        )
    return f"{unknown} of {len(ids)} tokens are unknown"


def ids_of_the_model(key: str, prompts: Sequence[list[int]], config: PreTrainedConfig) -> str:
    """The model has an embedding for the ids of the prompts and of the end tokens."""
    size, largest = int(config.get_text_config().vocab_size), max(max(ids, default=0) for ids in prompts)
    if largest >= size:
        raise UserError(
            f"{key}: the tokenizer makes the id {largest}, but the model's vocab_size is {size}; a token was added to the "
            "tokenizer only, or it belongs to another model"
        )
    return f"largest id {largest}, vocab_size {size}"


def longest_position(key: str, needed: int, config: PreTrainedConfig, limit_key: str) -> str:
    """The longest prompt and an answer at the limit fit into the model's positions."""
    limit = position_limit(config)
    if limit is not None and needed > limit:
        raise UserError(
            f"{limit_key}: with the longest prompt an answer can reach {needed} tokens, but {key} was made for {limit} "
            f"(max_position_embeddings); lower {limit_key} by {needed - limit}, or rollout.max_prompt_tokens"
        )
    return f"{needed} tokens at most; the model was made for {limit or 'any number'}"


def end_of_turn(key: str, data: Data, ends: list[int]) -> str:
    """The samplers stop at the token that closes an assistant's turn."""
    tokens = data.tokenizer.convert_ids_to_tokens(ends)
    names = ", ".join(f"{token!r} ({i})" for i, token in zip(ends, tokens, strict=True))
    if not ends:
        raise UserError(f"{key}: no end token is known; set eos_token_id in generation_config.json, or no answer ends")
    closing = data.prompter.closing().strip()
    if not closing.startswith(("<", "[", *data.tokenizer.get_added_vocab())):
        return f"answers end at {names}; no template says which token closes a turn"
    first = data.tokenizer(closing, add_special_tokens=False)["input_ids"][0]
    token = f"{data.tokenizer.decode([first])!r} ({first})"
    if first not in ends:
        raise UserError(
            f"{key}: the chat template closes an assistant's turn with {token}, which is not an end token ({names}): "
            f"answers would run on to the limit. Add {first} to eos_token_id in generation_config.json"
        )
    return f"{token} closes a turn; answers end at {names}"


def place_of_question(prompter: Prompter, asked: Sequence[tuple[str, Guidance]]) -> str:
    """The prompt has the question in it, and the system prompt."""
    for question, guidance in asked:
        text = "".join(prompter.render(question, guidance).split())
        for what, words in (("the question", question), ("prompt.system", prompter.config.system)):
            if "".join(words.split()) not in text:
                raise UserError(f"prompt: the chat template leaves {what} out; mend it, or set prompt.style=raw")
    return f"{len(asked)} prompts have it"


def place_of_guidance(prompter: Prompter, asked: Sequence[tuple[str, Guidance]]) -> str:
    """A stated length stands once in the prompt, where the method wants it."""
    found = "no length is stated"
    for question, guidance in asked:
        text, printed = prompter.render(question, guidance), prompter.placed(guidance)
        for place, words in (("before", printed.outside.strip()), ("in", printed.inside.strip())):
            times = text.count(words)
            if words and times != question.count(words) + 1:
                raise UserError(f"prompt: {words!r} stands {times} times in {text[-200:]!r}; mend the chat template")
            if words:
                found = f"{place} the thought: {text[max(0, text.rindex(words) - 20) :]!r}"
    return found


def reference_answers(key: str, data: Data) -> str:
    """A reference answer in a box, written as tokens and read back, is still the same answer."""

    def answer(text: str) -> str:
        return "".join((last_boxed(text) or "").split())  # a tokenizer may write other blanks

    texts = [rf"\boxed{{{p.answer}}}" for p in data.problems[:TRIED]]
    ids = [data.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    read = [str(data.tokenizer.decode(row, skip_special_tokens=True)) for row in ids]
    lost = [i for i, text in enumerate(texts) if answer(read[i]) != answer(text)]
    if len(lost) > len(texts) / 2:
        raise UserError(
            f"{key}: the tokenizer cannot write the answers: {texts[lost[0]]!r} is read back as {read[lost[0]]!r}, so no "
            "answer could be right; give the tokenizer that belongs to the model"
        )
    return f"{len(texts) - len(lost)} of {len(texts)} are read back, the first as {last_boxed(read[0])!r}"


def kind_of_model(config: Config) -> str:
    """The sampler knows this kind of model and takes over its weights."""
    check_engine(config)
    return f"the {pick_engine(config)} sampler can hold it"


def packed_rows(policy: Policy) -> str:
    """Packed rows of different length have the log-probs that transformers gives each row alone."""
    return "; ".join(policy.packed)  # Policy itself has refused a larger difference


def names_and_shapes(path: str, key: str, model: PreTrainedModel) -> str:
    """The weights that are trained and exported have the names and shapes of the files."""
    files = checkpoint_shapes(local_folder(path))
    own = {name: tuple(tensor.shape) for name, tensor in named_weights(model)}
    differing = [name for name, shape in own.items() if files.get(name) != shape]
    left_out = sorted(files.keys() - own.keys() - set(getattr(model, "all_tied_weights_keys", None) or {}))
    if name := min(differing, default=""):
        raise UserError(
            f"{key}={path!r}: {name} is {own.get(name, 'missing')} in the model, {files.get(name, 'missing')} in the files "
            f"({len(differing)} such); samplers go by these names: write the folder with save_pretrained"
        )
    return f"{len(own)} tensors as in the files" + (f"; left out: {', '.join(left_out[:3])}" if left_out else "")


def trial_export(key: str, model: PreTrainedModel, dtype: torch.dtype, tokenizer: HfTokenizer) -> str:
    """What a run writes at its end, apart from the weights, can be written and is read back the same."""
    with TemporaryDirectory() as place:
        folder = f"{place}/model"
        try:
            write_whole(model, {}, dtype, tokenizer, Path(folder))
            config, generation = read_settings(folder, key)
            theirs = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # these libraries raise anything, and the run would end in it after hours
            reason = f"{key}: the trained model could not be saved ({' '.join(str(error).split())[:300]})"
            raise UserError(f"{reason}; mend that file of the folder") from None
        ids = tokenizer(PROBE)["input_ids"]
        rebuilt = theirs(PROBE)["input_ids"] != ids
        ours = load_tokenizer(folder) if rebuilt else theirs
    before = settings_of(model.config), end_token_ids(tokenizer, model.config, model.generation_config)
    after = settings_of(config), end_token_ids(ours, config, generation)
    same_text = ours(PROBE)["input_ids"] == ids and ours.chat_template == tokenizer.chat_template
    if before != after or not same_text:
        changed = [k for k, v in before[0].items() if v != after[0].get(k)] or ["tokenizer, end tokens"]
        raise UserError(f"{key}: the trained model would be read back with other settings: {', '.join(changed)}")
    if rebuilt:
        return (
            f"{NOTE}AutoTokenizer rebuilds the tokenizer of a {config.model_type} folder from its vocabulary alone, with "
            "other ids; read that of the trained model with PreTrainedTokenizerFast.from_pretrained"
        )
    return "config, generation config and tokenizer are read back the same"
