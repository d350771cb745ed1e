"""Loading, refusing, and the edges of the interventions."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from cor_vllm.calibrate.config import CalibrationError
from cor_vllm.calibrate.interventions.measurement import baseline
from cor_vllm.calibrate.model.batches import TOKENS_PER_FORWARD, Row, batches, pad
from cor_vllm.calibrate.model.families import check_family
from cor_vllm.calibrate.model.loading import load_model, model_folder, read_config
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.result.heldout import Tables, rules
from cor_vllm.testing import tiny_models
from tests.model_copies import shard


@pytest.fixture(scope="module")
def olmoe() -> MoeModel:
    return MoeModel(tiny_models.create("olmoe"))


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, tiny_models.VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_own_forward_and_own_rule(family: str) -> None:
    model, ids = MoeModel(tiny_models.create(family)), tokens(3, 20)
    own = model.losses(ids)
    with torch.no_grad():
        expected = model.model(input_ids=ids, labels=ids).loss
    assert own.mean() == pytest.approx(expected.item(), abs=1e-5)
    with model.routing({m: router.route for m, router in enumerate(model.routers)}):
        assert (model.losses(ids) - own).abs().max() < 1e-5
    assert torch.equal(model.losses(ids), own), "an intervention outlived its context"


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_losses_do_not_see_padding(family: str) -> None:
    model, ids = MoeModel(tiny_models.create(family)), tokens(1, 20)[0].tolist()
    together = model.losses(pad([ids, ids[:7]]))
    assert (together[1, :6] - model.losses(pad([ids[:7]]))[0]).abs().max() < 1e-5


def test_losses_in_chunks_are_the_same(olmoe: MoeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(2, 30)
    whole = olmoe.losses(ids)
    monkeypatch.setattr("cor_vllm.calibrate.model.moe_model.LOSS_ROWS", 7)
    torch.testing.assert_close(olmoe.losses(ids), whole)


def test_an_exception_inside_an_intervention_removes_it(olmoe: MoeModel) -> None:
    ids = tokens(1, 10)
    own = olmoe.losses(ids)
    for intervention in (
        olmoe.scale_output(0, 2.0),
        olmoe.routing({0: lambda logits: olmoe.routers[0].route(logits, top_k=1)}),
    ):
        with pytest.raises(KeyboardInterrupt), intervention:
            assert not torch.equal(olmoe.losses(ids), own)
            raise KeyboardInterrupt
    assert torch.equal(olmoe.losses(ids), own)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_recorded_logits_give_the_experts_that_the_model_selects(family: str) -> None:
    model, ids = MoeModel(tiny_models.create(family)), tokens(3, 40)
    own: list[torch.Tensor] = []
    for layer in model.layer_index:
        block = model.model.model.layers[layer].mlp
        router = block.router if family == "gpt_oss" else block.gate
        router.register_forward_hook(lambda module, args, output: own.append(output[2].sort(-1).values))
    with model.record_router_logits() as records:
        model.losses(ids)
    for router, [logits], selected in zip(model.routers, records, own, strict=True):
        assert torch.equal(router.route(logits)[1].sort(-1).values, selected)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "deepseek_v2", "glm4_moe"])
def test_drop_of_the_only_expert_leaves_no_routed_expert(family: str) -> None:
    model = MoeModel(tiny_models.create(family, num_experts_per_tok=1))
    logits = torch.zeros(1, model.num_experts)
    logits[0, [1, 2]] = torch.tensor([30.0, 3.0])
    model.routers[0].correction_bias.zero_()
    weights, ids = model.routers[0].without(torch.tensor([1]), "drop")(logits)
    assert ids.tolist() == [[1]] and weights.tolist() == [[0.0]]
    weights, ids = model.routers[0].without(torch.tensor([1]), "backfill")(logits)
    assert ids.tolist() == [[2]] and weights[0, 0] > 0


def test_backfill_with_nobody_to_move_up_is_drop() -> None:
    for family, size in (
        ("olmoe", "num_experts"),
        ("mixtral", "num_experts"),
        ("glm4_moe", "n_routed_experts"),
    ):
        model = MoeModel(tiny_models.create(family, num_experts_per_tok=4, **{size: 4}))
        logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
        taken = torch.tensor([0, 1, 2, 3, 0])
        dense = []
        for ablation in ("backfill", "drop"):
            weights, ids = model.routers[0].without(taken, ablation)(logits)
            dense.append(torch.zeros(5, 4).scatter(1, ids.long(), weights))
            assert dense[-1].gather(1, taken[:, None]).eq(0).all()
        torch.testing.assert_close(dense[0], dense[1])


def test_ablation_stays_exact_when_the_expert_has_all_the_probability(olmoe: MoeModel) -> None:
    logits = torch.tensor([[60.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0]])  # 1 − g_0 is 0 in float32
    weights, ids = olmoe.routers[0].without(torch.tensor([0]), "backfill")(logits)
    expected = logits[0, 1:].softmax(-1)[:3]
    assert ids.tolist() == [[1, 2, 3]]
    torch.testing.assert_close(weights[0], expected)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_drop_changes_nothing_where_the_expert_is_not_active(family: str) -> None:
    router = MoeModel(tiny_models.create(family)).routers[0]
    logits = torch.randn(999, len(router.correction_bias), generator=torch.Generator().manual_seed(4))
    stock_weights, stock_ids = router.route(logits)
    spare = torch.ones_like(logits).scatter(1, stock_ids.long(), 0).argmax(1)
    weights, ids = router.without(spare, "drop")(logits)
    assert torch.equal(ids, stock_ids) and torch.equal(weights, stock_weights)


def test_the_group_of_an_expert_taken_away_is_weaker_without_it() -> None:
    """Two groups of three, one kept: expert 0 carries its group, and with it goes the group."""
    model = MoeModel(tiny_models.create("deepseek_v3", n_routed_experts=6, n_group=2, topk_group=1,
                                        num_experts_per_tok=2))  # fmt: skip
    router = model.routers[0]
    router.correction_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1, 0.0]))
    logits = torch.tensor([[3.0, 1.0, -3.0, 0.9, 0.8, -3.0]])
    assert router.route(logits)[1].tolist() == [[0, 1]]
    weights, ids = router.without(torch.tensor([0]), "backfill")(logits)
    g = logits[0].sigmoid()
    assert ids.tolist() == [[4, 3]]  # the bias decides the order
    torch.testing.assert_close(weights[0], 2.5 * g[[4, 3]] / g[[4, 3]].sum())
    weights, ids = router.without(torch.tensor([0]), "drop")(logits)
    assert ids.tolist() == [[0, 1]] and weights.tolist() == [[0.0, 2.5]]


def test_routing_modes(olmoe: MoeModel) -> None:
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))
    cei = torch.rand(3, 8, generator=torch.Generator().manual_seed(3))
    tables = Tables([2, 3, 4], cei)
    probs = logits.softmax(-1)

    def ids(mode: str, layer: int) -> list[list[int]]:
        return rules(olmoe, tables, mode, 0.5, 7)[layer](logits)[1].tolist()  # type: ignore[arg-type]

    for layer, k in enumerate(tables.k):
        score = probs + 0.5 * cei[layer]
        assert ids("full", layer) == score.topk(k).indices.tolist()
        assert ids("expert", layer) == score.topk(3).indices.tolist()
        assert ids("layer", layer) == probs.topk(k).indices.tolist()
        assert ids("off", layer) == probs.topk(3).indices.tolist()
        assert ids("random", layer) == ids("random", layer) != ids("layer", layer)
    weights, chosen = rules(olmoe, tables, "random", 0.5, 7)[2](logits)
    torch.testing.assert_close(weights, probs.gather(1, chosen.long()))
    assert chosen.shape == (6, 4)


def test_batches_keep_order_and_size() -> None:
    sequences = [list(range(1500)), list(range(10)), list(range(700))]
    rows = [Row(0), Row(1), Row(0, 400), Row(2), Row(2, 0), Row(0, 1400)]
    made = list(batches(rows, sequences))
    assert [row for batch in made for row, _ in batch] == rows
    assert [len(ids) for batch in made for _, ids in batch] == [1500, 10, 402, 700, 2, 1402]
    for batch in made:
        assert len(batch) * max(len(ids) for _, ids in batch) <= TOKENS_PER_FORWARD
    assert len(made) == 3
    assert len(list(batches([Row(0)] * 2, [list(range(TOKENS_PER_FORWARD + 1))]))) == 2


def test_a_model_that_bypasses_its_router_is_refused() -> None:
    model = MoeModel(tiny_models.create("olmoe"))
    block = model.model.model.layers[1].mlp
    block.forward = lambda hidden: hidden
    with pytest.raises(RuntimeError, match="MoE layer 1 ran 0 times"):
        baseline(model, [[1, 2, 3]])


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, architectures=["LlamaForCausalLM"])  # fmt: skip
    config.save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match=r"LlamaForCausalLM .*'llama'.* not supported.*qwen3_moe"):
        read_config(tmp_path)
    with pytest.raises(CalibrationError, match="not supported"):
        MoeModel(LlamaForCausalLM(config))


def test_grouped_routing_is_refused_by_name() -> None:
    config = tiny_models.create("deepseek_v2").config
    config.topk_method, config.n_group = "group_limited_greedy", 2
    with pytest.raises(CalibrationError, match=r"group_limited_greedy.*n_group 2"):
        check_family(config)
    config.n_group = 1  # one group is no grouping, and transformers routes it the same way
    check_family(config)


def test_weights_that_transformers_and_vllm_compute_differently_are_refused() -> None:
    with pytest.raises(CalibrationError, match="norm_topk_prob"):
        MoeModel(tiny_models.create("deepseek_v2", norm_topk_prob=True))


@pytest.mark.parametrize("overrides", [{"scoring_func": "softmax"}, {"topk_method": "greedy"}])
def test_routing_that_transformers_and_vllm_read_differently_is_refused(overrides: dict[str, str]) -> None:
    [(name, value)] = overrides.items()
    with pytest.raises(CalibrationError, match=f"deepseek_v3: {name} is '{value}' in config.json"):
        MoeModel(tiny_models.create("deepseek_v3", **overrides))


def test_models_without_a_choice_are_refused() -> None:
    with pytest.raises(CalibrationError, match="no MoE layer"):
        MoeModel(tiny_models.create("deepseek_v2", first_k_dense_replace=3))
    with pytest.raises(CalibrationError, match="single routed expert"):
        MoeModel(tiny_models.create("mixtral", num_local_experts=1, num_experts_per_tok=1))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_checkpoint_gives_the_model_that_was_saved(family: str, tmp_path: Path) -> None:
    model = load_model(tiny_models.build(family, tmp_path), "auto", "cpu")
    assert model.model.dtype == torch.float32
    created = MoeModel(tiny_models.create(family))
    ids = tokens(1, 12)
    torch.testing.assert_close(model.losses(ids), created.losses(ids))


def test_dtype(tmp_path: Path) -> None:
    assert load_model(tiny_models.build("olmoe", tmp_path), "bfloat16", "cpu").model.dtype == torch.bfloat16


def test_bad_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"holds no config\.json"):
        read_config(tmp_path)
    folder = tiny_models.build("mixtral", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CalibrationError, match=r"1 weights are missing, model\.norm\.weight"):
        load_model(folder, "auto", "cpu")
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CalibrationError, match="cannot be loaded"):
        load_model(folder, "auto", "cpu")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no_such_model"}))
    with pytest.raises(CalibrationError, match="no_such_model"):
        read_config(folder)


def test_devices_that_are_not_there(tmp_path: Path) -> None:
    folder = tiny_models.build("olmoe", tmp_path)
    for device in ("nonsense", "cuda:99"):
        with pytest.raises(CalibrationError, match=f"--device {device}"):
            load_model(folder, "auto", device)


def test_a_model_that_is_neither_folder_nor_hub_id() -> None:
    for name in ("no/such/folder/here", "nobody/no-such-model"):
        with pytest.raises(CalibrationError, match=name):
            model_folder(name)


def test_nothing_is_downloaded_that_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub played by the test: small files first, then the weights that the index names."""
    folder = shard(tiny_models.build("mixtral", tmp_path / "model"))
    asked: list[str] = []

    def snapshot_download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert ignore_patterns == ["*/*"]
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert model_folder("org/name") == (folder, "model")
    weights = [pattern for pattern in asked if "safetensors" in pattern]
    assert weights == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CalibrationError, match=r"index\.json: has no weight_map"):
        model_folder("org/name")
    (folder / "model.safetensors.index.json").unlink()
    asked.clear()
    model_folder("org/name")
    assert [pattern for pattern in asked if "safetensors" in pattern] == ["model.safetensors"]


def test_mxfp4_checkpoints_are_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The MXFP4 kernels of transformers route inside the kernel; only the arguments can be seen here."""
    folder = tiny_models.build("gpt_oss", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    seen = SimpleNamespace()

    def from_pretrained(*args: object, **kwargs: object) -> None:
        seen.kwargs = kwargs
        raise OSError("stop here")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", from_pretrained)
    with pytest.raises(CalibrationError, match="stop here"):
        load_model(folder, "auto", "cpu")
    assert seen.kwargs["quantization_config"].dequantize is True


def test_baseline_records_one_call_per_router() -> None:
    model = MoeModel(tiny_models.create("deepseek_v2"))
    base = baseline(model, [[1, 2, 3], [4, 5]])
    assert [logits.shape for logits in base.router_logits] == [(3, 6)] * 2 and base.losses.shape == (3,)
