"""Generation: one position a token, from a cache that is exact, by whatever the library offers."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_model import VOCABULARY, make
from tiny_run import make_recipe
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from deq_lm import DEQLMConfig, DEQLMForCausalLM
from deq_lm.cells import TransformerXLCell
from deq_lm.evaluation import load_model, model_folder
from deq_lm.modeling import EquilibriumCache
from deq_lm.solvers import StoppingRule
from deq_lm.training import train

PLAIN = {"max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": VOCABULARY}  # no end: this id is never drawn
MEM_LEN = 6


def stack() -> DEQLMForCausalLM:
    torch.manual_seed(0)
    cell = {"name": "transformer_xl", "d_model": 16, "num_heads": 2, "d_inner": 24, "mem_len": MEM_LEN, "init_std": 0.3}
    config = DEQLMConfig(vocab_size=VOCABULARY, depth="stack", num_layers=3, cell={**cell, "injection": "none"})
    return DEQLMForCausalLM(config).double().eval()


def monotone(*, mem_len: int = MEM_LEN) -> DEQLMForCausalLM:
    torch.manual_seed(0)
    cell = {"name": "monotone", "d_model": 16, "num_heads": 2, "num_taps": 3, "mem_len": mem_len, "init_std": 0.3}
    rule = {"max_steps": 200, "rtol": 1e-12, "patience": 30}
    return DEQLMForCausalLM(DEQLMConfig(vocab_size=VOCABULARY, cell=cell, stopping=rule)).double().eval()


RATES = [{"ratio": 2, "d_model": 8, "num_heads": 2, "d_inner": 12}, {"ratio": 3, "d_model": 4, "num_heads": 1}]
"""Chunks of 2 and of 6 tokens."""


def multiscale(*, mem_len: int = MEM_LEN, **options) -> DEQLMForCausalLM:
    return make(cell={"name": "multiscale", "coarse": RATES, "mem_len": mem_len, "injection": "residual", **options})


def multiscale_stack() -> DEQLMForCausalLM:
    torch.manual_seed(0)
    cell = {"name": "multiscale", "d_model": 16, "num_heads": 2, "d_inner": 24, "mem_len": MEM_LEN, "init_std": 0.3}
    config = DEQLMConfig(vocab_size=VOCABULARY, depth="stack", num_layers=2, cell={**cell, "coarse": RATES})
    return DEQLMForCausalLM(config).double().eval()


MODELS = {
    "equilibrium": make,
    "pre_norm": lambda: make(cell={"norm": "pre", "weight_norm": True, "norm_attention": True}),
    "residual_injection": lambda: make(cell={"injection": "residual"}),
    "two_blocks": lambda: make(cell={"num_blocks": 2}),
    "short_attention": lambda: make(cell={"attention_window": 3}),
    "without_memory": lambda: make(cell={"mem_len": 0}),
    "sequence_scope": lambda: make(solver={"name": "broyden", "scope": "sequence"}),
    "stack": stack,
    "monotone": monotone,
    "multiscale": multiscale,
    "multiscale_of_two_blocks": lambda: multiscale(num_blocks=2, attention_window=3),
    "multiscale_without_memory": lambda: multiscale(mem_len=0),
    "multiscale_stack": multiscale_stack,
}


@pytest.fixture
def prompts() -> Tensor:
    return torch.randint(1, VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", MODELS)
def test_with_and_without_cache_the_tokens_are_the_same_and_the_logits_within_the_tolerance(name: str, prompts: Tensor):
    model = MODELS[name]()
    options = {**PLAIN, "return_dict_in_generate": True, "output_logits": True}
    cached, anew = (model.generate(prompts, use_cache=use_cache, **options) for use_cache in (True, False))
    assert cached.sequences.shape[1] == 25 > 3 * MEM_LEN  # the text has left the window behind
    assert len(cached.sequences.unique()) > 5
    assert torch.equal(cached.sequences, anew.sequences)
    for found, expected in zip(cached.logits, anew.logits, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # the library makes them float32
    assert isinstance(cached.past_key_values, EquilibriumCache)
    assert anew.past_key_values is None


@pytest.mark.slow
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["equilibrium", "monotone"])
def test_256_tokens_after_20_prompts_are_those_of_one_pass_over_the_whole_text(name: str, do_sample: bool):
    reach = 5 + 256
    model = monotone(mem_len=reach) if name == "monotone" else make(cell={"mem_len": reach})
    prompts = torch.randint(1, VOCABULARY, (20, 5), generator=torch.Generator().manual_seed(3))
    torch.manual_seed(1)
    options = {**PLAIN, "max_new_tokens": 256, "return_dict_in_generate": True, "output_logits": True}
    written = model.generate(prompts, do_sample=do_sample, **options)
    assert len(written.sequences[:, -50:].unique()) > (20 if do_sample else 3)
    with torch.no_grad():
        output = model(written.sequences[:, :-1])
    assert output.solution.converged.all()
    logits = output.logits[:, 4:]
    assert logits.shape == (20, 256, VOCABULARY)
    if not do_sample:
        assert torch.equal(logits.argmax(dim=-1), written.sequences[:, 5:])
    torch.testing.assert_close(torch.stack(written.logits, dim=1), logits.float(), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> DEQLMForCausalLM:
    """What training has made, in float64, with solves as exact as that allows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        names = ("max_steps", "evaluate_every", "checkpoint_every", "schedule.decay_steps")
        settings = [f"training.{name}=60" for name in names]
        recipe = make_recipe(tmp_path_factory.mktemp("trained"), *settings)
        assert train(recipe) is None
    tight = {"evaluation_stopping": {"max_steps": 300, "rtol": 1e-12, "patience": 50}}
    final = Path(recipe.training.output_dir, "final")
    return DEQLMForCausalLM.from_pretrained(final, dtype=torch.float64, **tight).eval()


def test_a_trained_model_writes_the_same_cached_or_not_in_a_batch_or_alone(trained: DEQLMForCausalLM):
    mem_len, vocab_size = trained.config.mem_len, trained.config.vocab_size
    length = 2 * mem_len + 3  # longer than memory
    prompts = torch.randint(1, vocab_size, (3, length), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(prompts)
    prompts[1, :mem_len], mask[1, :mem_len] = 0, 0
    options = {"max_new_tokens": 3 * mem_len, "pad_token_id": 0, "eos_token_id": vocab_size}
    cached, anew = (
        trained.generate(prompts, attention_mask=mask, use_cache=use_cache, **options) for use_cache in (True, False)
    )
    assert torch.equal(cached, anew)
    for row, begin in enumerate((0, mem_len, 0)):
        alone = trained.generate(prompts[row : row + 1, begin:], **options)
        assert torch.equal(cached[row, begin:], alone[0])


@pytest.mark.parametrize("name", MODELS)
def test_however_a_text_is_cut_its_hidden_states_are_the_same(name: str):
    model = MODELS[name]()
    ids = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        whole = model(ids, sliding=True).last_hidden_state
        cache, pieces = EquilibriumCache(), []
        for piece in ids.split([9, 1, 1, 7, 2], dim=1):
            pieces.append(model(piece, past_key_values=cache).last_hidden_state)
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-9)
        seen_at_once = model(ids).last_hidden_state
    assert cache.get_seq_length() == 20
    if "without_memory" not in name:
        assert cache.layer.memory.length == MEM_LEN
        if "short_attention" not in name:
            assert (whole - seen_at_once)[:, MEM_LEN + 1 :].abs().max() > 1e-4  # the window is not without effect
        torch.testing.assert_close(whole[:, : MEM_LEN + 1], seen_at_once[:, : MEM_LEN + 1], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True},
        {"do_sample": True, "top_k": 4, "temperature": 0.7},
        {"do_sample": True, "top_p": 0.6, "num_return_sequences": 2},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_every_way_of_decoding_gives_the_same_with_and_without_cache(options: dict, prompts: Tensor):
    model, made = make(), []
    for use_cache in (True, False):
        torch.manual_seed(5)
        made.append(model.generate(prompts, use_cache=use_cache, **PLAIN, **options))
    assert torch.equal(*made)
    assert not torch.equal(made[0][:3], model.generate(prompts, **PLAIN))  # the option has an effect


@pytest.mark.parametrize("name", ["equilibrium", "multiscale"])
def test_padded_prompts_in_a_batch_give_what_each_gives_alone(name: str, prompts: Tensor):
    model = MODELS[name]()
    ids, mask = prompts.clone(), torch.ones_like(prompts)
    for row, num_pads in enumerate((3, 0, 1)):
        ids[row, :num_pads], mask[row, :num_pads] = 0, 0
    for options in ({}, {"num_beams": 2}):
        together = model.generate(ids, attention_mask=mask, **PLAIN, **options)
        for row, num_pads in enumerate((3, 0, 1)):
            alone = model.generate(prompts[row : row + 1, num_pads:], **PLAIN, **options)
            assert torch.equal(together[row, num_pads:], alone[0])


def test_a_sequence_that_has_ended_leaves_the_others_alone(prompts: Tensor):
    model = make()
    plain = model.generate(prompts, **PLAIN)
    firsts = {int(end): [(row == end).nonzero()[:1].tolist() for row in plain[:, 5:]] for end in plain[0, 5:]}
    end, places = next((end, places) for end, places in firsts.items() if sum(map(len, places)) == 1)
    made = model.generate(prompts, **{**PLAIN, "eos_token_id": end})
    (place,) = places[0][0]
    assert torch.equal(made[0, : 5 + place + 1], plain[0, : 5 + place + 1])
    assert (made[0, 5 + place + 1 :] == 0).all()
    assert torch.equal(made[1:], plain[1:])


def test_a_new_token_is_a_solve_over_its_own_position(prompts: Tensor, monkeypatch):
    model, lengths = make(), []
    evaluate = TransformerXLCell.evaluate

    def counted(self, z, tensors):
        lengths.append(z.shape[1])
        return evaluate(self, z, tensors)

    monkeypatch.setattr(TransformerXLCell, "evaluate", counted)
    cache = EquilibriumCache()
    made = model.generate(prompts, past_key_values=cache, **PLAIN)
    assert lengths.count(5) == lengths.index(1) > 1  # the prompt, first
    assert set(lengths) == {5, 1}
    assert cache.num_evaluations.shape == (3, made.shape[1] - 1)  # of the last token nothing is asked
    assert cache.num_evaluations.dtype == torch.int32
    steps = cache.num_evaluations[:, 5:].amax(dim=0)
    assert steps.sum() == lengths.count(1)
    assert cache.num_evaluations[:, :5].max() == lengths.count(5)


@pytest.mark.parametrize("name", ["equilibrium", "multiscale"])
def test_a_warm_start_changes_no_token(name: str, prompts: Tensor):
    model = MODELS[name]()
    cache = EquilibriumCache(warm_start=True)
    made = model.generate(prompts, past_key_values=cache, **PLAIN)
    assert torch.equal(made, model.generate(prompts, **PLAIN))
    assert cache.layer.start.any()


@pytest.mark.parametrize("warm_start", [False, True])
def test_the_solve_of_a_token_starts_at_zero_or_at_the_state_of_the_one_before(prompts: Tensor, warm_start: bool):
    model = make(solver={"name": "picard"}, stopping={"max_steps": 0})
    with torch.no_grad():
        cache = EquilibriumCache(warm_start=warm_start)
        before = model(prompts, past_key_values=cache, max_evaluations=30).last_hidden_state[:, -1:]
        start = model(prompts[:, :1], past_key_values=cache).solution.z
    assert torch.equal(start, before if warm_start else torch.zeros_like(before))
    plain = make().generate(prompts, **PLAIN)
    cache = EquilibriumCache(warm_start=warm_start)
    assert torch.equal(make().generate(prompts, past_key_values=cache, **PLAIN), plain)
    for options in ({"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}):
        cache = EquilibriumCache(warm_start=warm_start)
        made = make().generate(prompts, past_key_values=cache, **PLAIN, **options)
        assert torch.equal(made, make().generate(prompts, **PLAIN, **options))


def test_a_solve_that_starts_at_its_solution_is_over_at_once():
    layer = make().model.layers
    x = torch.randn(2, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        solved = layer(x)
        again = layer(x, start=solved.output)
    assert (again.solution.num_evaluations < 0.3 * solved.solution.num_evaluations).all()
    torch.testing.assert_close(again.output, solved.output, rtol=0, atol=1e-10)


def test_max_evaluations_is_the_compute_a_token_may_take(prompts: Tensor):
    model = make()
    free = model.generate(prompts, **PLAIN)
    for number in (1, 4):
        cache = EquilibriumCache()
        made = model.generate(prompts, past_key_values=cache, max_evaluations=number, **PLAIN)
        assert cache.num_evaluations.max() == number
        if number == 1:
            assert not torch.equal(made, free)
    assert torch.equal(model.generate(prompts, max_evaluations=200, **PLAIN), free)
    with pytest.raises(ValueError, match=r"max_evaluations=0.*1 or more"):
        model.generate(prompts, max_evaluations=0, **PLAIN)
    with pytest.raises(ValueError, match=r"max_evaluations=2\.5 with depth=equilibrium: expected 1 or more"):
        make()(prompts, max_evaluations=2.5)
    with pytest.raises(ValueError, match="max_evaluations=4 with depth=stack"):
        stack().generate(prompts, max_evaluations=4, **PLAIN)
    with torch.no_grad():
        rule = StoppingRule(rtol=1e-1)
        assert model(prompts, stopping=rule, max_evaluations=3).solution.num_evaluations.max() == 3


class Recorder(BaseStreamer):
    """What a streamer is given; raises `error` after so many tokens."""

    def __init__(self, error: BaseException | None = None, after: int = 0) -> None:
        self.tokens, self.ended, self.error, self.after = [], False, error, after

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()
        if self.error is not None and len(self.tokens) >= self.after:
            raise self.error

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_the_tokens_as_they_come(prompts: Tensor):
    model, recorder = make(), Recorder()
    made = model.generate(prompts[:1], streamer=recorder, **PLAIN)
    assert recorder.tokens == made[0].tolist()
    assert recorder.ended


def test_after_an_interruption_the_text_goes_on_from_the_cache(prompts: Tensor):
    model = make()
    expected = model.generate(prompts[:1], **PLAIN)
    recorder, cache = Recorder(KeyboardInterrupt(), after=12), EquilibriumCache()
    with pytest.raises(KeyboardInterrupt):
        model.generate(prompts[:1], streamer=recorder, past_key_values=cache, **PLAIN)
    text = torch.tensor([recorder.tokens])
    assert torch.equal(text, expected[:, :12])
    assert cache.get_seq_length() == 11
    made = model.generate(text, past_key_values=cache, **{**PLAIN, "max_new_tokens": 13})
    assert torch.equal(made, expected)
    assert torch.equal(model.generate(prompts[:1], **PLAIN), expected)  # the model kept nothing


def test_a_stopping_criterion_of_ones_own_ends_the_text(prompts: Tensor):
    class LongEnough(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 9)

    made = make().generate(prompts, stopping_criteria=StoppingCriteriaList([LongEnough()]), **PLAIN)
    assert made.shape == (3, 9)


@pytest.mark.parametrize("length", [1, MEM_LEN, MEM_LEN + 1, 3 * MEM_LEN])
def test_a_prompt_of_any_length_begins_a_text(length: int):
    model = make()
    prompt = torch.randint(1, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length))
    cached, anew = (model.generate(prompt, use_cache=use_cache, **PLAIN) for use_cache in (True, False))
    assert torch.equal(cached, anew)
    chunked = model.generate(prompt, prefill_chunk_size=4, **PLAIN)
    assert torch.equal(chunked, cached)


def test_a_string_that_ends_a_text_ends_it(finished: Path):
    model, tokenizer = load_model(model_folder(finished))
    prompt = tokenizer("ab", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 30, "do_sample": True, "pad_token_id": 0}
    torch.manual_seed(0)
    letters = tokenizer.decode(model.generate(prompt, **options)[0, prompt.shape[1] :])
    end = next(letter for letter in letters[3:] if letter.isalpha())
    torch.manual_seed(0)
    made = model.generate(prompt, stop_strings=[end], tokenizer=tokenizer, **options)
    text = tokenizer.decode(made[0, prompt.shape[1] :])
    assert end in text
    assert letters.startswith(text)
    assert len(text) < len(letters)


def test_a_cache_is_a_past_without_a_gradient(prompts: Tensor):
    model, cache = make(), EquilibriumCache()
    model(prompts, past_key_values=cache)
    kept = copy.deepcopy(cache)
    for _ in range(2):  # one past, whose weights have a gradient of their own each time
        model(prompts, labels=prompts, past_key_values=copy.deepcopy(cache)).loss.backward()
    assert kept.get_seq_length() == 5


@pytest.mark.parametrize("name", MODELS)
def test_after_a_cache_the_gradient_is_that_of_the_new_tokens_by_the_present_weights(name: str, prompts: Tensor):
    model, cache = MODELS[name](), EquilibriumCache()
    with torch.no_grad():
        model(prompts, past_key_values=cache)

    def loss() -> Tensor:
        return model(prompts, targets=prompts, past_key_values=copy.deepcopy(cache)).loss

    loss().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    directions = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    found = sum((gradients[name] * directions[name]).sum() for name in directions)
    losses = []
    cache.layer.memory = replace(cache.layer.memory, weights={})  # the past as it is, the weights anew
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += sign * 1e-6 * directions[name]
            losses.append(loss())
            for name, parameter in model.named_parameters():
                parameter -= sign * 1e-6 * directions[name]
    torch.testing.assert_close(found, (losses[0] - losses[1]) / 2e-6, rtol=1e-5, atol=1e-9)


def test_a_mask_is_of_the_new_tokens_or_of_all(prompts: Tensor):
    model, cache = make(), EquilibriumCache()
    ones = torch.ones(3, 20, dtype=torch.int64)
    with torch.no_grad():
        model(prompts, attention_mask=ones[:, :5], past_key_values=cache)
        logits = [
            model(prompts[:, :2], attention_mask=ones[:, :length], past_key_values=copy.deepcopy(cache)).logits
            for length in (2, 7)
        ]
        assert torch.equal(*logits)
        with pytest.raises(ValueError, match=r"attention_mask of shape \(3, 6\) with 2 tokens after 5"):
            model(prompts[:, :2], attention_mask=ones[:, :6], past_key_values=cache)
        with pytest.raises(ValueError, match=r"attention_mask of shape \(3, 20\)"):
            model.generate(prompts, attention_mask=ones, **PLAIN)


@pytest.mark.parametrize("name", ["equilibrium", "multiscale"])
def test_a_text_goes_on_after_the_memory_of_a_segment(name: str, prompts: Tensor):
    model = MODELS[name]()
    with torch.no_grad():
        memory = model(prompts[:, :3]).memory
    whole = model.generate(prompts, **PLAIN)
    for use_cache in (True, False):
        after = model.generate(prompts[:, 3:], memory=memory, use_cache=use_cache, **PLAIN)
        assert torch.equal(after, whole[:, 3:])


@pytest.mark.parametrize("made", [lambda: make(cell={"mem_len": 40}), lambda: multiscale(mem_len=40)])
def test_guessing_ahead_gives_the_greedy_tokens_and_is_refused_where_the_window_has_moved(made):
    model = made()
    prompt = torch.tensor([[3, 7, 5, 3, 7, 5, 3, 7]])
    guessing = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2}
    expected = model.generate(prompt, **PLAIN)
    assert torch.equal(model.generate(prompt, **PLAIN, **guessing), expected)
    with pytest.raises(ValueError, match=r"crop\(.*positions before the window are not kept"):
        make(cell={"mem_len": 4}).generate(prompt, **PLAIN, **guessing)


def test_what_cannot_be_continued_is_refused_and_says_what_to_do(prompts: Tensor):
    model = make()
    unrolled = DEQLMForCausalLM(
        DEQLMConfig(vocab_size=VOCABULARY, cell=model.config.cell, depth="unrolled", num_layers=3)
    ).eval()
    assert unrolled.generate(prompts, max_new_tokens=2, pad_token_id=0).shape == (3, 7)  # without being told
    cases = [
        (unrolled, prompts, {"use_cache": True}, "depth=unrolled.*use_cache=False"),
        (model, prompts, {"past_key_values": DynamicCache()}, "DynamicCache: expected an EquilibriumCache"),
        (model, prompts, {"cache_implementation": "static"}, "cache_implementation='static'.*Leave it out"),
        (model, prompts[:, :0], {}, r"input_ids of shape \(3, 0\).*end-of-document token"),
        (model, prompts + 20, {}, "input_ids have .*ids from 0 to 22"),
        (model, prompts - 20, {}, "input_ids have -"),
    ]
    for refusing, ids, options, message in cases:
        with pytest.raises(ValueError, match=message):
            refusing.generate(ids, **{**PLAIN, **options})
    cache = EquilibriumCache()
    with torch.no_grad():
        memory = model(prompts, past_key_values=cache).memory
        assert memory is None
        memory = model(prompts).memory
        with pytest.raises(ValueError, match=r"memory or past_key_values.*not both"):
            model(prompts, memory=memory, past_key_values=cache)
        another = torch.cat([prompts, prompts], dim=1)
        another[1, 2] = (another[1, 2] + 1) % VOCABULARY
        for text in (prompts, another, another[:2]):  # nothing new, one other token, fewer sequences
            with pytest.raises(ValueError, match=r"that have seen 5 tokens of 3 sequences.*a new cache"):
                model.generate(text, past_key_values=cache, **PLAIN)
        for number in (2, -6):
            with pytest.raises(ValueError, match=rf"crop\({number}\): expected minus the number .*, of 5"):
                cache.crop(number)
        with pytest.raises(ValueError, match="memory of 3 sequences"):
            model(prompts[:2], past_key_values=cache)
