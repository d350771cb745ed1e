"""Sequence-scope ablation from the ablated layer on equals whole forwards."""

from typing import Any

import pytest
import torch

from cor_vllm.calibrate.interventions.plain import PlainAlgorithm
from cor_vllm.calibrate.model import batches
from cor_vllm.testing import tiny_models
from tests.unit.test_calibrate_sweep import Case, options


@pytest.mark.parametrize("ablation", ["backfill", "drop"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_reused_layers_change_nothing(family: str, ablation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "TOKENS_PER_FORWARD", 80)  # several blocks of the longer sequences
    case = Case(family)
    chosen = options(scope="sequence", ablation=ablation)
    done: list[int] = []
    algorithm = PlainAlgorithm(case.model, chosen, case.sequences, case.base, case.strata, done.append)
    reused = case.run(algorithm)
    assert sum(done) == sum(algorithm.work())

    def whole(self: Any, layer: int, *arguments: Any) -> Any:
        return self._run(*arguments)

    monkeypatch.setattr(PlainAlgorithm, "_run_from", whole)
    for one, other in zip(reused, case.measure(PlainAlgorithm, chosen), strict=True):
        torch.testing.assert_close(one.ablation, other.ablation, rtol=0, atol=1e-5)
        assert one.ablation.abs().max() > 0.1


def test_the_layers_below_run_once_and_going_back_starts_anew() -> None:
    case = Case("mixtral")
    algorithm = PlainAlgorithm(case.model, options(scope="sequence"), case.sequences, case.base, case.strata)
    calls = [0, 0, 0]
    for index, layer in enumerate(case.model.decoder_layers):

        def count(*_: Any, index: int = index) -> None:
            calls[index] += 1

        layer.register_forward_hook(count)
    last = algorithm._ablations(2)
    measured = {s for s, _ in algorithm._hard}
    assert calls == [len(case.sequences), len(case.sequences), len(measured)]
    algorithm._ablations(0)
    assert torch.equal(algorithm._ablations(2), last)
