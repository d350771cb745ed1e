"""Copies of a model are accepted by their values, other models refused, in every form that tools leave."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cor_vllm import scores
from cor_vllm.copies import ROUNDING, Difference, compare, sketch
from cor_vllm.fingerprint import read_routers
from cor_vllm.serve import fit
from cor_vllm.testing import tiny_models
from cor_vllm.testing.make_scores import make
from tests.model_copies import Weights, cast, copy, folded, other_routers, routers, shard

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo" / "model"
SAME = Difference()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Path]:
    """Tiny checkpoints by family and dtype, each built once; small values, as published routers have."""
    root = tmp_path_factory.mktemp("models")

    def small(weights: Weights) -> None:
        for name in routers(weights):
            weights[name] *= 0.02  # float16 keeps fewer digits of values this small

    def model(family: str, dtype: torch.dtype) -> Path:
        stored = root / f"{family}-{dtype}"
        if not stored.exists():
            built = tiny_models.build(family, root / f"{family}-{dtype}-built")
            smaller = copy(built, root / f"{family}-{dtype}-small", small)
            copy(smaller, stored, cast(dtype))
        return stored

    return model


def difference(original: Path, other: Path) -> Difference:
    return compare(read_routers(original).info, read_routers(other).info)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_has_a_norm_before_its_router(models, family: str) -> None:
    found = read_routers(models(family, BF16))
    assert len(found.info) == len(found.layers) > 0
    assert all(info.input_sketch is not None for info in found.info)


@pytest.mark.parametrize("stored", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(
    "dtypes",
    [(FP16,), (BF16,), (FP32,), (FP16, BF16), (BF16, FP16), (FP16, FP32), (BF16, FP16, BF16)],
    ids=str,
)
def test_rounding_makes_no_other_model(models, tmp_path: Path, stored, dtypes) -> None:
    original = models("deepseek_v3", stored)
    rounded = copy(original, tmp_path / "copy", cast(*dtypes))
    assert difference(original, rounded) == SAME
    assert difference(rounded, original) == SAME  # the file may have been made from the copy


def test_a_round_trip_through_float16_loses_values_of_the_router(models, tmp_path: Path) -> None:
    """What the test above needs to mean something: bytes and values differ, so the old hash does, too."""
    original = models("qwen3_moe", BF16)
    back = copy(original, tmp_path / "copy", cast(FP16, BF16))
    assert read_routers(original).fingerprint != read_routers(back).fingerprint
    values = [[info.tensors["weight"].sha256[0] for info in read_routers(m).info] for m in (original, back)]
    assert values[0] != values[1]


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_routers_that_transformers_saves_in_float32(models, tmp_path: Path, family: str) -> None:
    """transformers 5.24 keeps these families' routers in float32, whatever the rest of the checkpoint is."""
    original = models(family, BF16)

    def widen(weights: Weights) -> None:
        weights.update({name: weights[name].float() for name in routers(weights)})

    assert difference(original, copy(original, tmp_path / "copy", widen)) == SAME


def test_shards_make_no_other_model(models, tmp_path: Path) -> None:
    original = models("gpt_oss", BF16)
    shards = read_routers(shard(copy(original, tmp_path / "copy"), 3))
    assert shards == read_routers(original)
    assert shards.info == read_routers(original).info


@pytest.mark.parametrize("stored", [BF16, FP16], ids=str)
@pytest.mark.parametrize("copied", [BF16, FP16], ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_a_router_that_awq_scaled_with_its_norm(models, tmp_path: Path, family, stored, copied) -> None:
    original = models(family, stored)
    scaled = copy(original, tmp_path / "copy", folded(2, dtype=copied))
    assert difference(original, scaled) == Difference(folded=(2,))


def test_a_router_that_awq_left_out(models, tmp_path: Path) -> None:
    """The norm before it was rescaled for the experts: equal routers, but they read something else."""
    original = models("glm4_moe", BF16)
    scaled = copy(original, tmp_path / "copy", folded(2, with_router=False))
    assert read_routers(scaled) == read_routers(original)  # which is all that the old hash can see
    assert difference(original, scaled) == Difference(rescaled=(2,))


def test_a_router_that_awq_scaled_without_its_norm(models, tmp_path: Path) -> None:
    original = models("qwen3_moe", BF16)

    def scale(weights: Weights) -> None:
        for name in routers(weights):
            weights[name] *= 2 ** torch.linspace(-1, 1, weights[name].shape[1])

    assert difference(original, copy(original, tmp_path / "copy", scale)) == Difference(other=(0, 1, 2))


def test_retrained_experts_under_untouched_routers(models, tmp_path: Path) -> None:
    original = models("qwen3_moe", BF16)

    def train(weights: Weights) -> None:
        for name, values in weights.items():
            if not name.endswith((".gate.weight", "layernorm.weight")):
                values += 0.01 * torch.randn_like(values)

    assert difference(original, copy(original, tmp_path / "copy", train)) == SAME

    def train_norms(weights: Weights) -> None:
        train(weights)
        name = "model.layers.1.post_attention_layernorm.weight"
        weights[name] = weights[name] * 1.03

    assert difference(original, copy(original, tmp_path / "norms", train_norms)) == Difference(retrained=(1,))


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values * (1 + 1e-2 * torch.randn_like(values)),
        lambda values: values * 1.004,  # less than a sketch could tell from rounding
        lambda values: values + 2e-5 * torch.randn_like(values.float()),
        lambda values: values.index_fill(0, torch.tensor([3]), 0),
        lambda values: values.flip(0),  # the same numbers, for other experts
        lambda values: torch.zeros_like(values),
    ],
    ids=["noise", "all a little larger", "a light fine-tune", "one expert", "permuted", "zeros"],
)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_routers_that_were_trained(models, tmp_path: Path, change, with_norm, dtype) -> None:
    """By more than rounding, however little; also where the fine-tune moved the norm as well."""
    original = models("olmoe", BF16)

    def train(weights: Weights) -> None:
        name = routers(weights)[1]
        weights[name] = change(weights[name]).to(dtype)
        if with_norm:
            norm = "model.layers.1.post_attention_layernorm.weight"
            weights[norm] = (weights[norm] * (1 + 2e-3 * torch.randn(weights[norm].shape))).to(dtype)

    torch.manual_seed(0)
    assert difference(original, copy(original, tmp_path / "copy", train)) == Difference(other=(1,))


def test_a_change_that_vanishes_in_a_rounding_is_accepted(models, tmp_path: Path) -> None:
    """Float32 routers that round to the file's bfloat16 ones: a fine-tune as small cannot be told."""
    original = models("olmoe", BF16)

    def train(step: float) -> Callable[[Weights], None]:
        def change(weights: Weights) -> None:
            name = routers(weights)[1]
            weights[name] = weights[name].float() * (1 + step)

        return change

    assert difference(original, copy(original, tmp_path / "less", train(2.0**-11))) == SAME
    assert difference(original, copy(original, tmp_path / "more", train(2.0**-7))) == Difference(other=(1,))


def test_a_light_fine_tune_next_to_large_channels(models, tmp_path: Path) -> None:
    """Norms of published models have channels ten times the others, which the product then consists of."""

    def enlarge(weights: Weights) -> None:
        for name in (*routers(weights), *(n for n in weights if "post_attention_layernorm" in n)):
            weights[name][..., :4] *= 20

    original = copy(models("olmoe", BF16), tmp_path / "original", enlarge)
    for seed in range(8):

        def train(weights: Weights, seed: int = seed) -> None:
            noise = torch.Generator().manual_seed(seed)
            values = weights[routers(weights)[1]]
            step = 1.2e-2 * values.float().std()
            values += (step * torch.randn(values.shape, generator=noise)).to(values.dtype)

        fine_tune = copy(original, tmp_path / f"copy-{seed}", train)
        assert difference(original, fine_tune) == Difference(other=(1,))


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_a_bias_counts_with_and_without_awq(models, tmp_path: Path, family: str) -> None:
    original = models(family, BF16)

    def move(weights: Weights) -> None:
        folded(2)(weights)
        name = next(
            n for n in sorted(weights) if n.endswith(("correction_bias", "router.bias")) and ".2." in n
        )
        weights[name][3] += 1e-2

    assert difference(original, copy(original, tmp_path / "copy", move)) == Difference(other=(2,))


def test_another_model(models, tmp_path: Path) -> None:
    original = models("mixtral", BF16)
    other = copy(original, tmp_path / "copy", other_routers)
    assert difference(original, other) == Difference(other=(0, 1, 2))


def test_a_router_that_the_files_lack_is_named(models, tmp_path: Path) -> None:
    """A shard is missing, and no index says so: nothing that a calibration would mend."""
    original = models("qwen3_moe", BF16)

    def lose(weights: Weights) -> None:
        del weights[routers(weights)[1]]

    lacking = read_routers(copy(original, tmp_path / "copy", lose))
    with pytest.raises(
        fit.MisfitError, match=r"no router for decoder layers \[1\].*download the model again"
    ):
        fit._compare_routers(fit.ModelFile.of_scores("S", make(original)), lacking)


def test_what_describes_a_router_is_the_same_for_ever() -> None:
    """Numbers of the demo model; others would make every scores file another model's."""
    first = read_routers(DEMO).info[0]
    assert first.tensors["weight"].dtype == "bfloat16"
    assert (
        first.tensors["weight"].sha256[0]
        == "9ad5286338aed144dda79c6414e8c2c74cf7f245c652fc8a635aee39118a5159"
    )
    assert first.sketch[:3] == [0.2094078, 0.4303284, -0.3456116]
    assert first.input_sketch is not None and first.input_sketch[:3] == [0.1371658, 0.3650573, -0.3021938]


@pytest.mark.parametrize("name", ["demo-main", "demo-more", "demo-tail", "demo-torso"])
def test_committed_files_of_the_first_version_stay_valid(name: str) -> None:
    file = ROOT / "benchmarks" / "results" / "evaluation" / "scores" / f"{name}.safetensors"
    values = scores.load(file)
    assert values.config.model.routers is None
    assert fit._compare_routers(fit.ModelFile.of_scores(str(file), values), read_routers(DEMO)) == []


def test_a_sketch_keeps_distances() -> None:
    """Relative to the length, on average; what ROUNDING is compared with."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(32, 2048)) * 0.02
    ratios = []
    for size in (1e-3, ROUNDING, 0.1):
        for _ in range(20):
            moved = values * (1 + size * rng.normal(size=values.shape))
            a, b = np.array(sketch(torch.tensor(values))), np.array(sketch(torch.tensor(moved)))
            true = np.linalg.norm(values - moved) / np.linalg.norm(values)
            ratios.append(np.linalg.norm(a - b) / np.linalg.norm(a) / true)
    assert 0.9 < np.mean(ratios) < 1.1
    assert min(ratios) > 0.6 and max(ratios) < 1.5
