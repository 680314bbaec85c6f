"""What the soak says of memory and of its own faults."""

import pytest
from scripts_of_eval import load


def moments(soak, values):
    return [
        soak.Watched(seconds=0.0, step=i, resident_bytes=value, tensor_bytes=1, open_files=1)
        for i, value in enumerate(values)
    ]


def test_growth_is_the_slope_after_the_beginning_as_a_share_of_the_mean():
    soak = load("reliability/soak")
    assert soak.growth(moments(soak, [5, 40, *[100] * 8]), "resident_bytes") == pytest.approx(0, abs=1e-9)
    rising = [1, 1, *range(100, 108)]
    assert soak.growth(moments(soak, rising), "resident_bytes") == pytest.approx(7 / 103.5)
    assert soak.growth(moments(soak, rising[:2] + rising[:1:-1]), "resident_bytes") == pytest.approx(-7 / 103.5)


def test_every_process_knows_of_all_injected_faults_and_only_one_of_them_has_each():
    soak = load("reliability/soak")
    classes = [type("Model", (), {"forward": lambda *_, **__: None}) for _ in range(2)]
    injectors = [soak.FaultInjector(classes[rank], seed=3, rank=rank, num_ranks=2) for rank in range(2)]
    hits = []
    for step in range(1, 2001):
        for injector in injectors:
            injector.before(step)
        hits.append(sum(injector._now is not None for injector in injectors))
    assert injectors[0].steps == injectors[1].steps
    assert set(hits) == {0, 1}
    assert sum(hits) == sum(map(len, injectors[0].steps.values())) == pytest.approx(2000 / soak.EVERY, rel=0.5)
    assert min(map(len, injectors[0].steps.values())) > 0
