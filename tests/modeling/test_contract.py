"""What the library and its users expect of any causal language model, of this one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_model import VOCABULARY, make
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

from deq_lm.adjoints import JacobianFree
from deq_lm.cells import TransformerXLCell
from deq_lm.data.tokenizers import load_tokenizer
from deq_lm.modeling import DEQLMForCausalLM, EquilibriumCache

MULTISCALE = {"name": "multiscale", "coarse": [{"ratio": 2, "d_model": 8, "num_heads": 2, "d_inner": 12}]}


@pytest.fixture
def saved(tmp_path) -> Path:
    make(dtype=torch.float32).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_hidden_states_are_the_injected_tokens_and_the_equilibrium(ids: Tensor):
    model = make()
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        injected, equilibrium = output.hidden_states
    assert torch.equal(injected, model.model.embed_tokens(ids) * 4.0)  # sqrt(d_model)
    assert equilibrium is output.last_hidden_state
    assert model(ids).hidden_states is None
    made = model.generate(
        ids[:, :3], max_new_tokens=2, pad_token_id=0, return_dict_in_generate=True, output_hidden_states=True
    )
    assert [states[1].shape for states in made.hidden_states] == [(3, 3, 16), (3, 1, 16)]


def test_labels_are_shifted_inside_and_ignored_ones_are_not_scored(ids: Tensor):
    model = make()
    labels = ids.clone()
    labels[0, 3:7] = -100
    with torch.no_grad():
        output = model(ids, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.num_targets == 3 * 11 - 4


def test_without_a_dictionary_loss_and_logits_come_first(ids: Tensor):
    model = make()
    with torch.no_grad():
        output = model(ids, labels=ids, use_cache=True, output_hidden_states=True)
        loss, logits, cache, hidden_states, *_ = model(
            ids, labels=ids, use_cache=True, output_hidden_states=True, return_dict=False
        )
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    assert isinstance(cache, EquilibriumCache)
    assert len(hidden_states) == 2


def test_what_it_does_not_support_is_refused_by_name(ids: Tensor):
    model = make()
    for options, name in (
        ({"output_attentions": True}, "output_attentions"),
        ({"inputs_embeds": ids}, "inputs_embeds"),
    ):
        with pytest.raises(ValueError, match=f"got {name}, which it does not support"):
            model(ids, **options)
    for enable in (model.gradient_checkpointing_enable, model.activation_checkpointing_enable):
        with pytest.raises(ValueError, match='recompute="block"'):
            enable()
    assert model(ids, output_attentions=False, position_ids=None).logits is not None


def test_the_base_model_loads_from_a_checkpoint_and_gives_the_hidden_states(saved: Path, ids: Tensor):
    base, model = AutoModel.from_pretrained(saved), AutoModelForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, model(ids).last_hidden_state)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_in_half_precision_it_loads_computes_and_generates_with_a_state_in_float32(
    saved: Path, ids: Tensor, dtype: torch.dtype, tolerance: float
):
    exact = AutoModelForCausalLM.from_pretrained(saved)
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    with torch.no_grad():
        output, expected = model(ids, labels=ids), exact(ids, labels=ids)
    assert output.last_hidden_state.dtype == dtype
    assert output.solution.z.dtype == torch.float32
    assert output.logits.dtype == torch.float32
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance)
    assert torch.dist(output.logits, expected.logits) < tolerance * expected.logits.norm()
    writing = {"max_new_tokens": 9, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
    made = model.generate(ids[:, :4], **writing)
    assert made.sequences.shape == (3, 13)
    with torch.no_grad():  # what it wrote by, token by token, is what the exact model would have
        expected = exact(made.sequences[:, :-1], sliding=True).logits[:, 3:]
    assert torch.dist(torch.stack(made.logits, dim=1), expected) < tolerance * expected.norm()


def test_it_is_placed_by_the_library(saved: Path, ids: Tensor):
    placed = AutoModelForCausalLM.from_pretrained(saved, device_map="auto")
    plain = AutoModelForCausalLM.from_pretrained(saved)
    assert set(placed._no_split_modules) == {"Equilibrium"}  # a solve stays on one device
    with torch.no_grad():
        inputs = ids.to(placed.device)
        torch.testing.assert_close(placed(inputs).logits.cpu(), plain(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of the compiler's own
@pytest.mark.parametrize("cell", [{}, {"num_blocks": 2}, MULTISCALE], ids=["one block", "two blocks", "multiscale"])
def test_a_compiled_cell_gives_the_same_loss_and_gradient(ids: Tensor, cell: dict):
    """By the compiler's front end alone, which is what can go wrong with a solve around it; code is for the slow test."""
    results = []
    for compiled in (False, True):
        model = make(cell=cell)
        if compiled:
            torch._dynamo.reset()
            model.compile_cell(backend="aot_eager", fullgraph=True)  # no part of it is left to Python
        loss = model(ids, labels=ids, num_unrolled_steps=2).loss + model(ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    with pytest.raises(ValueError, match="estimate_jacobian after compile_cell"):
        model(ids, labels=ids, estimate_jacobian=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cell", [{}, MULTISCALE], ids=["one block", "multiscale"])
def test_a_cell_compiled_to_code_gives_the_same_loss_gradient_and_tokens(ids: Tensor, cell: dict):
    torch._dynamo.reset()
    model, compiled = (make(dtype=torch.float32, cell=cell) for _ in range(2))
    compiled.compile_cell()
    for one in (model, compiled):
        one(ids, labels=ids, adjoint=JacobianFree()).loss.backward()
        one(ids, labels=ids).loss.backward()
    for found, expected in zip(compiled.parameters(), model.parameters(), strict=True):
        assert torch.dist(found.grad, expected.grad) <= 1e-3 * expected.grad.norm()
    made = [one.generate(ids[:, :3], max_new_tokens=20, pad_token_id=0) for one in (model, compiled)]
    assert torch.equal(*made)


def test_the_cell_is_what_is_compiled(ids: Tensor):
    model = make()
    model.compile_cell(backend="aot_eager")
    assert model.model.layers.cell.evaluate is not TransformerXLCell.evaluate
    assert "evaluate" in vars(model.model.layers.cell)


def test_weights_come_from_safetensors_only(saved: Path):
    model = DEQLMForCausalLM.from_pretrained(saved)
    torch.save(model.state_dict(), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    for load in (AutoModelForCausalLM.from_pretrained, DEQLMForCausalLM.from_pretrained):
        with pytest.raises(OSError, match=r"model\.safetensors"):
            load(saved)
        with pytest.raises(ValueError, match="use_safetensors=False: expected True"):
            load(saved, use_safetensors=False)


def test_code_in_a_checkpoint_is_not_executed(saved: Path, ids: Tensor):
    config = json.loads((saved / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "evil.py").write_text(f"open({str(saved / 'executed')!r}, 'w')\n")
    assert type(AutoConfig.from_pretrained(saved)).__module__.startswith("deq_lm.")
    assert type(AutoModelForCausalLM.from_pretrained(saved)) is DEQLMForCausalLM
    assert not (saved / "executed").exists()


@pytest.mark.parametrize(
    ("prompts", "options"), [("abc", {}), ("", {}), (["abc", "a longer prompt"], {"batch_size": 2})], ids=str
)
def test_it_writes_in_the_librarys_text_generation_pipeline(finished: Path, prompts, options: dict):
    writer = pipeline("text-generation", str(finished / "final"), device="cpu")
    assert isinstance(writer.tokenizer, PreTrainedTokenizerFast)
    greedy = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    made = writer(prompts, **greedy, **options)
    model, tokenizer = DEQLMForCausalLM.from_pretrained(finished / "final"), load_tokenizer(finished / "final")
    for prompt, answers in zip([prompts] if isinstance(prompts, str) else prompts, made, strict=True):
        answer = answers if isinstance(answers, dict) else answers[0]
        context = torch.tensor([tokenizer.encode(prompt) or [tokenizer.eos_token_id]])
        expected = model.generate(context, max_new_tokens=6, pad_token_id=tokenizer.eos_token_id)
        text = tokenizer.decode(expected[0, context.shape[1] :], skip_special_tokens=True)
        assert answer["generated_text"] == text


@pytest.mark.parametrize("embedding", [{"name": "full"}, {"name": "adaptive", "cutoffs": [8, 16], "div_val": 2}])
def test_ids_outside_the_vocabulary_are_refused_by_name(ids: Tensor, embedding: dict):
    model = make(embedding=embedding)
    for wrong in (VOCABULARY, -1):
        ids[1, 2] = wrong
        with pytest.raises(ValueError, match=f"input_ids have {wrong}: expected ids from 0 to {VOCABULARY - 1}"):
            model(ids)


def test_labels_outside_the_vocabulary_are_refused_by_name(ids: Tensor):
    labels = ids.clone()
    labels[0, :2] = -100
    labels[1, 3] = VOCABULARY + 4
    with pytest.raises(ValueError, match=f"labels or targets have {VOCABULARY + 4}: expected ids from 0"):
        make()(ids, labels=labels)


def test_logits_are_kept_by_number_or_by_place(ids: Tensor):
    model = make()
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(model(ids, logits_to_keep=2).logits, logits[:, -2:])
        assert torch.equal(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, logits[:, [0, 5]])
    with pytest.raises(ValueError, match=r"logits_to_keep=-2: expected 0 \(all positions\) or more"):
        model(ids, logits_to_keep=-2)


@pytest.mark.parametrize(("wrong", "given"), [([[1, 2]], "a list"), (torch.ones(1, 2), "a tensor of torch.float32")])
def test_ids_of_another_type_are_refused_by_name(wrong, given: str):
    for call in (make(), make().generate):
        with pytest.raises(ValueError, match=f"input_ids are {given}: expected a tensor of torch.int64"):
            call(wrong)
