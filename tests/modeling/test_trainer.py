"""The model in the library's own training loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from deq_lm import DEQLMConfig, DEQLMForCausalLM

VOCABULARY = 23


def trainer(folder: Path, **arguments) -> Trainer:
    """Two steps of plain gradient descent on four texts, from the same weights each time."""
    torch.manual_seed(0)
    cell = {"name": "transformer_xl", "d_model": 16, "num_heads": 2, "d_inner": 24, "mem_len": 6, "init_std": 0.3}
    tight = {"rtol": 1e-6}
    exact = {"stopping": tight, "adjoint": {"name": "implicit", "stopping": tight}}
    model = DEQLMForCausalLM(DEQLMConfig(vocab_size=VOCABULARY, cell=cell, **exact))
    with torch.no_grad():  # a contraction, whose solves end where they should
        for name, parameter in model.named_parameters():
            parameter *= 4.0 if "inject" in name else 0.25 if "qkv" in name else 1.0
    texts = torch.randint(VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(1))
    settings = TrainingArguments(
        str(folder),
        max_steps=2,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **arguments,
    )
    dataset = [{"input_ids": text, "labels": text} for text in texts]
    return Trainer(model, settings, train_dataset=dataset, eval_dataset=dataset)


def test_it_trains_and_accumulating_gradients_is_a_larger_batch(tmp_path):
    whole = trainer(tmp_path / "whole", per_device_train_batch_size=4)
    parts = trainer(tmp_path / "parts", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    losses = []
    for run in (whole, parts):
        run.train()
        losses.append([line["loss"] for line in run.state.log_history if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    first, second = (torch.cat([p.detach().flatten() for p in run.model.parameters()]) for run in (whole, parts))
    start = torch.cat([p.detach().flatten() for p in trainer(tmp_path / "start").model.parameters()])
    assert torch.dist(first, second) <= 1e-4 * torch.dist(first, start)


def test_it_evaluates_predicts_and_is_saved_by_it(tmp_path):
    run = trainer(tmp_path, per_device_eval_batch_size=4)
    with torch.no_grad():
        ids = torch.stack([text["input_ids"] for text in run.eval_dataset])
        expected = run.model.eval()(ids, labels=ids)
    assert run.evaluate()["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
    predictions = torch.from_numpy(run.predict(run.eval_dataset).predictions)
    torch.testing.assert_close(predictions, expected.logits, rtol=0, atol=1e-4)
    run.save_model()
    loaded = DEQLMForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), run.model.parameters(), strict=True))
