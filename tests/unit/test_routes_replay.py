"""Utilities of routes at earlier layers and jointly, against whole forwards of tiny models of every family.

The oracle runs a whole sequence under `MoeModel.routing`, with the routing replaced at one position, and
reads log-probabilities off the full logits.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils import PrefixedDataset

from cor_vllm.calibrate.config import CalibrationError
from cor_vllm.calibrate.interventions.state import PartialState
from cor_vllm.calibrate.model.limits import Limit
from cor_vllm.calibrate.model.memory import bytes_per_row
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.model.router import Rule
from cor_vllm.calibrate.routes.closed_form import last_layer_utilities
from cor_vllm.calibrate.routes.draw import DrawOptions, Routes, draw_routes
from cor_vllm.calibrate.routes.replay import Replay, layer_utilities
from cor_vllm.calibrate.routes.standard import ScoredText, read_standard
from cor_vllm.calibrate.routes.utilities import Standard, Utilities
from cor_vllm.testing import tiny_models

TOLERANCE = 1e-4  # nats, float32
MEMORY = 10**9
EVERY = DrawOptions(routes=900, temperature=1e6)  # so many that every route of a tiny model is among them
SOME = DrawOptions(routes=5)
LENGTHS = (13, 22, 7, 22)  # GPT-OSS has a window of 16
POSITIONS = [[3, 11], [], [0, 4], [5, 6, 20]]


class Case:
    """A tiny model and a text of sequences of unequal length, one of them without a scored position."""

    def __init__(self, family: str) -> None:
        self.model = MoeModel(tiny_models.create(family))
        generator = torch.Generator().manual_seed(3)
        sequences = [
            torch.randint(0, tiny_models.VOCAB, (length,), generator=generator).tolist() for length in LENGTHS
        ]
        self.text = ScoredText("made up", "0" * 64, sequences, POSITIONS, list(range(len(LENGTHS))))
        self.standard = self.read(self.text)
        self.layers = range(self.model.num_layers)

    def read(self, text: ScoredText) -> Standard:
        return read_standard(self.model, text, seed=0, nulls=2)[0]

    def measure(self, options: DrawOptions = SOME, joint: bool = True, **values: Any) -> list[Utilities]:
        """All layers, then all of them jointly."""
        return layer_utilities(
            self.model, self.text, self.standard, self.layers, joint, options, MEMORY, **values
        )

    def routes(self, moe: int, logits: torch.Tensor, keys: torch.Tensor, options: DrawOptions) -> Routes:
        model, layer = self.model, self.model.layer_index[moe]
        return draw_routes(model.routers[moe], logits, keys, layer, options, model.eligible_experts)

    @torch.inference_mode()
    def forward(self, token: int, copies: int, rules: Mapping[int, Rule]) -> torch.Tensor:
        """[copies, 1+J] log-probabilities of a token's targets, with its routing replaced by the rules."""
        places = self.standard.places
        sequence, position = int(places.sequence[token]), int(places.position[token])
        input_ids = torch.tensor([self.text.sequences[sequence]]).expand(copies, -1)
        rows = torch.zeros(input_ids.shape, dtype=torch.bool)
        rows[:, position] = True
        with self.model.routing(rules, rows):
            logits = self.model.model(input_ids=input_ids, use_cache=False).logits[:, position]
        return logits.log_softmax(-1)[:, self.standard.targets[token]]

    def at_position(self, token: int, copies: int, values: torch.Tensor) -> torch.Tensor:
        """[copies · S, …] zeros, but `values` [copies, …] at the token's position of each copy."""
        places = self.standard.places
        length = len(self.text.sequences[int(places.sequence[token])])
        spread = values.new_zeros(copies, length, *values.shape[1:])
        spread[:, int(places.position[token])] = values
        return spread.flatten(0, 1)


@pytest.fixture(scope="module", params=tiny_models.FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_every_route_at_every_layer_is_that_of_a_whole_forward(case: Case) -> None:
    spread = 0.0
    for moe, found in zip(case.layers, case.measure(EVERY, joint=False), strict=True):
        assert found.layer == case.model.layer_index[moe]
        routes = case.routes(moe, case.standard.router_logits[moe], case.standard.keys, EVERY)
        assert found.ids is not None and torch.equal(found.ids.long(), routes.ids)
        for token in range(len(found.utility)):
            distinct = routes.distinct[token].nonzero().flatten()
            assert len(distinct) == math.comb(case.model.eligible_experts, case.model.top_k)
            ids, weights = (
                case.at_position(token, len(distinct), values[token, distinct])
                for values in (routes.ids, routes.weights)
            )
            expected = case.forward(token, len(distinct), {moe: lambda logits, w=weights, i=ids: (w, i)})
            utility = found.utility[token, distinct]
            torch.testing.assert_close(utility, expected, rtol=0, atol=TOLERANCE)
            best = expected.gather(0, utility.argmax(dim=0, keepdim=True))
            assert (best >= expected.max(dim=0).values - 2 * TOLERANCE).all()
            spread = max(spread, (expected.max() - expected.min()).item())
    assert spread > 0.1, "routes must matter, or the comparison shows nothing"


def test_at_the_last_layer_it_is_the_closed_form(case: Case) -> None:
    standard, inputs = read_standard(case.model, case.text, seed=0, nulls=2)
    assert inputs is not None
    expected = last_layer_utilities(case.model, inputs, standard, SOME)
    found = case.measure(SOME)[case.model.num_layers - 1]
    assert found.tensors().keys() == expected.tensors().keys()
    for name, values in expected.tensors().items():
        torch.testing.assert_close(found.tensors()[name], values, rtol=0, atol=TOLERANCE)


def test_the_standard_route_is_the_models_own(case: Case) -> None:
    for found in case.measure():
        torch.testing.assert_close(found.utility[:, 0], case.standard.log_prob, rtol=0, atol=TOLERANCE)


def test_equal_routes_have_equal_utilities(case: Case) -> None:
    merged = 0
    for found in case.measure(DrawOptions(routes=20), joint=False):
        first = found.first[:, :, None].expand_as(found.utility)
        assert torch.equal(found.utility, found.utility.gather(1, first))
        merged += int((found.first == 0).sum()) - len(found.first)
    assert merged > 0, "some route must be the standard one again"


def test_joint_routes_are_those_of_a_whole_forward(case: Case) -> None:
    found = case.measure()[-1]
    copies = 1 + SOME.routes
    assert found.layer is None and found.ids is None
    assert torch.equal(found.first, torch.arange(copies).expand_as(found.first))
    for token in range(len(found.utility)):
        scores: list[torch.Tensor] = []

        def rule(moe: int, token: int = token, scores: list[torch.Tensor] = scores) -> Rule:
            def drawn(router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                keys = case.standard.keys[token].expand(len(router_logits))
                routes = case.routes(moe, router_logits.float(), keys, SOME)
                number = torch.arange(copies).repeat_interleave(len(router_logits) // copies)
                row = torch.arange(len(number))
                place = case.at_position(token, copies, torch.ones(copies, dtype=torch.bool))
                scores.append(torch.stack([routes.log_score, routes.score])[:, row, number][:, place])
                return routes.weights[row, number], routes.ids[row, number]

            return drawn

        expected = case.forward(token, copies, {moe: rule(moe) for moe in case.layers})
        torch.testing.assert_close(found.utility[token], expected, rtol=0, atol=TOLERANCE)
        log_score, score = torch.stack(scores).sum(dim=0)
        torch.testing.assert_close(found.log_score[token], log_score, rtol=1e-4, atol=TOLERANCE)
        torch.testing.assert_close(found.score[token], score, rtol=1e-4, atol=TOLERANCE)
    assert (found.utility - found.utility[:, :1]).abs().max() > 0.1


def same(one: Sequence[Utilities], other: Sequence[Utilities], order: Sequence[int] | None = None) -> None:
    """Compare utilities, of the tokens `order` of the first with all of the other."""
    for a, b in zip(one, other, strict=True):
        assert a.layer == b.layer
        for name, values in a.tensors().items():
            chosen, tolerance = values if order is None else values[list(order)], TOLERANCE
            exact = name in ("ids", "first")
            torch.testing.assert_close(b.tensors()[name], chosen, rtol=0, atol=0 if exact else tolerance)


def run(replay: Replay) -> list[Utilities]:
    for step in range(len(replay.work())):
        replay.step(step)
    return replay.result()


def test_a_variant_changes_no_other_position(case: Case) -> None:
    together = case.measure()
    scored = [(s, t) for s, positions in enumerate(POSITIONS) for t in positions]
    for token, (s, t) in enumerate(scored):
        positions = [[t] if s == number else [] for number in range(len(LENGTHS))]
        text = ScoredText("made up", "0" * 64, case.text.sequences, positions, case.text.documents)
        alone = layer_utilities(case.model, text, case.read(text), case.layers, True, SOME, MEMORY)
        same(together, alone, [token])


@pytest.mark.parametrize(("rows", "host_memory", "groups"), [(22, 1, 4), (50, MEMORY, 1)])
def test_small_blocks_and_small_groups_give_the_same(
    case: Case, rows: int, host_memory: int, groups: int
) -> None:
    """First each sequence is a chunk and a group of its own, then there are chunks of two."""
    max_memory = rows * bytes_per_row(case.model.config, max(LENGTHS), 4)
    whole = Replay(case.model, case.text, case.standard, case.layers, True, SOME, MEMORY)
    small = Replay(
        case.model, case.text, case.standard, case.layers, True, SOME, max_memory, host_memory=host_memory
    )
    assert len(small.work()) == groups * len(whole.work())
    same(run(whole), run(small))


def test_another_order_of_sequences_gives_the_same(case: Case) -> None:
    text = case.text
    order = [3, 2, 0, 1]
    other = ScoredText(
        text.name,
        text.sha256,
        [text.sequences[s] for s in order],
        [text.positions[s] for s in order],
        [text.documents[s] for s in order],
    )
    found = layer_utilities(case.model, other, case.read(other), case.layers, True, SOME, MEMORY)
    same(case.measure(), found, [4, 5, 6, 2, 3, 0, 1])


def test_a_run_that_was_stopped_anywhere_ends_in_the_same_bits(case: Case, tmp_path: Path) -> None:
    def replay() -> Replay:
        values = (case.model, case.text, case.standard, case.layers, True, SOME, MEMORY)
        return Replay(*values, host_memory=8000)  # 31 rows: several groups

    whole = replay()
    expected, steps = run(whole), len(whole.work())
    assert steps > 2 * (len(case.model.decoder_layers) + 1)
    for stop in range(1, steps):
        stopped = replay()
        for step in range(stop):
            stopped.step(step)
        state = PartialState(tmp_path / "output", "key", case.standard.log_prob)
        state.save(stopped.state(stop))
        resumed = replay()
        assert resumed.restore(state.load()[0]) == stop
        for step in range(stop, steps):
            resumed.step(step)
        for one, other in zip(expected, resumed.result(), strict=True):
            assert all(torch.equal(v, other.tensors()[name]) for name, v in one.tensors().items())


def test_states_are_given_out_and_taken_back(case: Case) -> None:
    states: list[dict[str, torch.Tensor]] = []

    def keep(state: Mapping[str, torch.Tensor]) -> None:
        states.append({name: values.clone() for name, values in state.items()})

    expected = case.measure(save=keep)
    done: list[int] = []
    found = case.measure(saved=states[-2], advance=done.append)
    assert sum(done) == sum(len(u.utility[0]) for u in found[-1:]) * len(found[-1].utility) + sum(
        int((u.first == torch.arange(1 + SOME.routes)).sum()) for u in found[:-1]
    ), "only the reading was left"
    assert all(torch.equal(a.utility, b.utility) for a, b in zip(expected, found, strict=True))


def test_only_the_layers_asked_for_are_forked(case: Case) -> None:
    last = case.model.num_layers - 1
    one, rows = [], []
    for layers in ([last], [0, last]):
        replay = Replay(case.model, case.text, case.standard, layers, False, SOME, MEMORY)
        rows.append(sum(replay.work()))
        one.append(run(replay)[-1])
    assert rows[0] < rows[1]
    assert torch.equal(one[0].utility, one[1].utility)


def test_progress_is_the_work_announced(case: Case) -> None:
    done: list[int] = []
    replay = Replay(
        case.model, case.text, case.standard, case.layers, True, SOME, MEMORY, done.append, host_memory=8000
    )
    for step, rows in enumerate(replay.work()):
        done.clear()
        replay.step(step)
        assert sum(done) == rows


def test_too_little_host_memory_is_refused_before_the_first_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("olmoe")
    none = Limit(0, 0, "on a made-up machine")
    monkeypatch.setattr("cor_vllm.calibrate.model.memory.limits", SimpleNamespace(pages_limit=lambda: none))
    with pytest.raises(CalibrationError, match=r"0 MB are free on a made-up machine; lower --max-tokens$"):
        case.measure()


def test_weights_that_wait_elsewhere_give_the_same_bits_and_are_brought_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, brought = Case("qwen3_moe"), Counter[str]()
    expected = case.measure()
    names = {name for name, _ in case.model.model.named_parameters()}
    cpu_offload(case.model.model, torch.device("cpu"))
    assert case.model.offloaded
    read = PrefixedDataset.__getitem__

    def counted(self: Any, key: str) -> Any:
        if isinstance(self.dataset, dict):  # the innermost map
            brought[self.prefix + key] += 1
        return read(self, key)

    monkeypatch.setattr(PrefixedDataset, "__getitem__", counted)
    for one, other in zip(expected, case.measure(), strict=True):
        assert torch.equal(one.utility, other.utility)
    assert dict(brought) == dict.fromkeys(names, 1)
