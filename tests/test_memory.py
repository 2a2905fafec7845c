"""What a model takes of a GPU: DeepSeek-LLM's published tables, in every cell; the allocator, splits, and the verb."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny
from family_configs import LLM_7B, LLM_67B, V2

import dsv2quant as dq
from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.families import model_config
from dsv2quant.errors import UsageError
from dsv2quant.planning.allocator import LARGE_SEGMENT, SMALL_SEGMENT, Memory, OutOfMemory
from dsv2quant.planning.eager import Eager
from dsv2quant.planning.flash import Flash
from dsv2quant.planning.memory import (
    GIB,
    MemoryPlan,
    Workload,
    accelerate_split,
    cache_per_token,
    card_capacity,
    plan_memory,
    shares_of,
    vllm_split,
)
from dsv2quant.planning.prefill import CUBLAS_WORKSPACE

MIB = 1 << 20
BATCHES, CONTEXTS = (1, 2, 4, 8, 16), (256, 512, 1024, 2048, 4096)
OOM = None
# GiB, batch by context: DeepSeek-LLM's README, "GPU Memory Usage", BF16 on A100-PCIE-40GB. 67B: each of 8 GPUs.
PUBLISHED_7B = (
    (13.29, 13.63, 14.47, 16.37, 21.25),
    (13.63, 14.39, 15.98, 19.82, 29.59),
    (14.47, 15.82, 19.04, 26.65, OOM),
    (15.99, 18.71, 25.14, 35.19, OOM),
    (19.06, 24.52, 37.28, OOM, OOM),
)
PUBLISHED_67B = (
    (16.92, 17.11, 17.66, 20.01, 33.23),
    (17.04, 17.28, 18.55, 25.27, OOM),
    (17.20, 17.80, 21.28, 33.71, OOM),
    (17.59, 19.25, 25.69, OOM, OOM),
    (18.17, 21.69, 34.54, OOM, OOM),
)
SHALLOW = V2 | {"num_hidden_layers": 2}


def config_of(raw: dict[str, Any]) -> ModelConfig:
    return model_config(raw, "config.json")


def planned(raw: dict[str, Any], workload: Workload, card: str | None = None) -> MemoryPlan:
    """A plan of a model in BF16."""
    config = config_of(raw)
    stored = [(spec, 2 * spec.size) for spec in architecture(config).specs()]
    return plan_memory("model", config, stored, workload, card)


@pytest.mark.parametrize(
    ("raw", "gpus", "published", "within"),
    [(LLM_7B, 1, PUBLISHED_7B, 0.015), (LLM_67B, 8, PUBLISHED_67B, 0.05)],
    ids=["7B", "67B"],
)
def test_the_published_tables_in_every_cell(raw, gpus, published, within) -> None:
    plan = planned(raw, Workload(BATCHES, CONTEXTS, "eager", pp=gpus), "A100-40GB")
    cells = iter(plan.cells)
    for batch, row in zip(BATCHES, published, strict=True):
        for context, gib in zip(CONTEXTS, row, strict=True):
            cell = next(cells)
            assert (cell.batch, cell.context) == (batch, context)
            assert cell.fits == (gib is not OOM), cell
            if gib is not OOM:
                assert cell.total / GIB == pytest.approx(gib, rel=within), cell


def test_v2_has_the_promised_cache_with_six_bits_a_number() -> None:
    """arXiv:2405.04434: 93.3% less than DeepSeek 67B's, and in section 3.2.3, six bits for each element."""
    workload = Workload((1,), (1,))
    v2, llm = (cache_per_token(config_of(raw), workload) for raw in (V2, LLM_67B))
    assert (v2, llm) == (2 * 60 * 576, 2 * 95 * 2 * 8 * 128)
    assert round(100 * (1 - v2 / llm), 1) == 82.2
    assert round(100 * (1 - v2 * 6 / 16 / llm), 1) == 93.3


def test_flash_has_no_scores_and_the_last_tokens_logits() -> None:
    workload = Workload((1,), (1024, 2048, 4096))
    plan = planned(LLM_7B, workload)
    first, second, third = plan.cells
    assert second.cache == 2 * first.cache == 2048 * plan.cache_per_token
    # Linear in length.
    assert third.activations - second.activations == 2 * (second.activations - first.activations)
    eager = planned(LLM_7B, Workload((1,), (2048,), "eager")).cells[0]
    assert second.total < eager.total
    assert eager.fits is second.fits is None


MOE = tiny.LITE | {
    "model_type": "deepseek", "architectures": ["DeepseekForCausalLM"], "num_key_value_heads": 2,
    "rope_scaling": None,
}  # fmt: skip


@pytest.mark.parametrize("raw", [tiny.LITE, tiny.V2, MOE], ids=["lite", "v2", "moe"])
@pytest.mark.parametrize("batch", [1, 2])
def test_every_kind_of_layer_keeps_its_cache_alone(raw, batch) -> None:
    config = config_of(raw)
    stored = sum(2 * spec.size for spec in architecture(config).specs())
    for prefill in ("flash", "eager"):
        workload = Workload((batch,), (512,), prefill)
        (share,) = shares_of(config, [(spec, 2 * spec.size) for spec in architecture(config).specs()], workload)
        memory = Memory()
        made = (Eager if prefill == "eager" else Flash)(memory, share, batch, 512)
        made.run()
        held = memory.used["cache"]
        assert memory.used["logits"] == memory.used["weights"] == 0
        assert memory.used["activations"] == CUBLAS_WORKSPACE
        keys = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
        if prefill == "flash":
            assert held == 0
            assert memory.peak["cache"] == batch * 512 * cache_per_token(config, workload)
        else:  # values are a view of what is made with the keys' first part
            beside = config.num_attention_heads * config.qk_nope_head_dim if config.is_mla else 0
            widths = keys + beside if config.is_mla else sum(config.cached_widths)
            assert held == batch * 512 * config.num_hidden_layers * widths * 2
        plan = planned(raw, workload)
        assert plan.cells[0].weights == stored
        assert plan.cells[0].unused > 0


def test_an_fp8_cache_is_half_as_large() -> None:
    plain, coded = (planned(SHALLOW, Workload((1,), (4096,), kv_cache=kind)) for kind in ("bf16", "fp8_e4m3"))
    assert plain.cells[0].cache == 2 * coded.cells[0].cache == 4096 * plain.cache_per_token


def test_tensor_parallel_gpus_share_matrices_and_heads_but_not_the_latent() -> None:
    whole, shared = (planned(SHALLOW, Workload((1,), (1024,), tp=tp)).cells[0] for tp in (1, 8))
    assert shared.cache == whole.cache
    assert whole.weights / 8 < shared.weights < whole.weights / 7
    whole, shared = (planned(LLM_67B, Workload((1,), (1024,), tp=tp)).cells[0] for tp in (1, 16))
    assert shared.cache == whole.cache / 8  # two GPUs have each head


def test_layers_for_prediction_are_not_loaded() -> None:
    raw = tiny.LITE | {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"],
                       "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True}  # fmt: skip
    weights = [
        planned(raw | {"num_nextn_predict_layers": layers}, Workload((1,), (8,))).cells[0].weights for layers in (0, 1)
    ]
    assert weights[0] == weights[1]


def test_accelerate_leaves_room_on_the_first_gpu_and_the_last_takes_the_rest() -> None:
    assert [len(layers) for layers in accelerate_split([1600, *[1320] * 95, 1600], 8)] == [11, *[13] * 6, 6]
    assert accelerate_split([5, 10, 10, 5], 1) == [range(2)]


def test_vllm_splits_layers_evenly() -> None:
    assert [len(layers) for layers in vllm_split(61, 4)] == [15, 15, 16, 15]
    assert vllm_split(4, 2) == [range(2), range(2, 4)]


def test_the_last_gpu_has_a_tied_embedding_too() -> None:
    raw = LLM_7B | {"num_hidden_layers": 2, "tie_word_embeddings": True}
    cell = planned(raw, Workload((1,), (8,), pp=2)).cells[0]
    assert cell.weights > 2 * 102400 * 4096 + 2 * 4 * 4096**2


def test_the_allocator_keeps_segments_splits_them_and_joins_what_is_free() -> None:
    memory = Memory()
    small, large = memory(100), memory(3 * MIB)
    assert memory.reserved == SMALL_SEGMENT + LARGE_SEGMENT
    beside = memory(17 * MIB - 512)  # what is left of the large one's segment
    assert memory.reserved == SMALL_SEGMENT + LARGE_SEGMENT
    huge = memory(33 * MIB + 1)
    assert memory.reserved == SMALL_SEGMENT + LARGE_SEGMENT + 34 * MIB
    del large, beside, huge
    again = memory(20 * MIB)  # fits both: the smaller
    other = memory(34 * MIB)
    assert memory.reserved == memory.most_reserved == SMALL_SEGMENT + LARGE_SEGMENT + 34 * MIB
    assert memory.used["activations"] == 100 + 54 * MIB
    assert memory.allocated == 512 + 54 * MIB
    del small, again, other
    assert sum(memory.used.values()) == 0


def test_the_allocator_gives_free_segments_back_before_it_gives_up() -> None:
    memory = Memory(100 * MIB)
    first = memory(60 * MIB)
    del first
    second = memory(90 * MIB)
    assert memory.reserved == 90 * MIB
    with pytest.raises(OutOfMemory):
        memory(20 * MIB)
    assert memory.used["activations"] == 90 * MIB
    del second


def test_cards_go_by_name_or_size() -> None:
    assert card_capacity("a100-40gb") == card_capacity("A100-40GB") < 39.39 * GIB
    assert card_capacity("40GB") == pytest.approx(card_capacity("A100-40GB"), rel=0.001)
    with pytest.raises(UsageError, match="--gpu B9000 is not known"):
        card_capacity("B9000")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"batch": (0,)}, "--batch 0 is out of range"),
        ({"context": (1 << 40,)}, "--context 1099511627776 is out of range"),
        ({"prefill": "lazy"}, "--prefill lazy"),
        ({"kv_cache": "auto"}, "--kv-cache auto"),
        ({"kv_cache": "fp8_e4m3", "prefill": "eager"}, "goes with --prefill flash"),
        ({"pp": 4}, "--pp 4"),
        ({"tp": 3}, "--tp 3 does not divide"),
        ({"gpu": "GPU"}, "--gpu GPU is not known"),
    ],
)
def test_what_cannot_be(lite, options, error) -> None:
    with pytest.raises(UsageError, match=error):
        dq.memory(lite, **options)


def test_the_verb_prints_what_the_api_returns(cli, lite) -> None:
    args = ("memory", lite, "--batch", "1,2", "--context", "16,32", "--gpu", "24GB", "--fp8=channel")
    plan = dq.memory(dq.plan(lite, scheme="fp8-channel"), batch=(1, 2), context=(16, 32), gpu="24GB")
    ran = cli(*args, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert [cell["total"] for cell in found["cells"]] == [cell.total for cell in plan.cells]
    assert [cell["fits"] for cell in found["cells"]] == [True] * 4
    stored = dq.memory(lite, batch=(1,), context=(16,)).cells[0]
    assert plan.cells[0].weights < stored.weights
    text = cli(*args).out
    assert text.splitlines()[1] == "GiB; 24GB has 23.23"
    assert text.count("yes") == 4
    assert "is no list of numbers" in cli("memory", lite, "--batch", "1,x").err


def test_the_verb_names_the_fullest_gpu(cli, lite) -> None:
    ran = cli("memory", lite, "--context", "16", "--pp", "2", "--tp", "2")
    assert "the fullest of 4 GPUs (layers over 2, matrices over 2)" in ran.out
