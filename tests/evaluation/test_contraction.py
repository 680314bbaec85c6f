"""The spectral radius that validation logs, against the eigenvalues of the whole Jacobian."""

import numpy as np
import pytest
import torch

from deq_lm.evaluation import EvaluationConfig
from deq_lm.evaluation.contraction import largest_spectral_radius, noted_bindings


def test_it_is_the_largest_eigenvalue_of_the_jacobian_over_the_sequences(deq_model):
    model = deq_model(cell={"d_model": 8, "num_heads": 2, "d_inner": 8, "mem_len": 4, "init_std": 0.5})
    tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=40)
    state = torch.get_rng_state()
    found = largest_spectral_radius(model, tokens, EvaluationConfig(batch_size=1, segment_length=4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())

    radii = []
    for start in (0, 10, 21, 32):  # evenly over the text, the last one at its end
        text = torch.from_numpy(tokens[start : start + 8])[None]
        with torch.no_grad():
            memory = model(text[:, :4]).memory
            with noted_bindings(model.model.layers) as bindings:
                z = model(text[:, 4:], memory=memory).solution.z
        jacobian = torch.autograd.functional.jacobian(bindings[0][0], z).reshape(32, 32)
        radii.append(torch.linalg.eigvals(jacobian).abs().max().item())
    assert found == pytest.approx(max(radii), rel=0.1)
    assert min(radii) < 0.9 * max(radii)


def test_a_text_of_one_token_has_none(deq_model):
    assert largest_spectral_radius(deq_model(), np.zeros(1), EvaluationConfig(batch_size=1, segment_length=4)) is None
