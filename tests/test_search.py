"""The search for a mix: what swaps cost, the choice within a budget, and the recipe that comes of it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tiny

import dsv2quant as dq
from dsv2quant.allocation import choosing, measuring, swaps
from dsv2quant.allocation.search import Searched
from dsv2quant.allocation.solve import Offer, Offers, solve, solve_for_cost
from dsv2quant.allocation.space import WINDOWS
from dsv2quant.calib.calibration import read_calibration
from dsv2quant.errors import InputError, UsageError
from dsv2quant.evaluation.divergence import compare, run
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model

pytestmark = pytest.mark.usefixtures("one_thread")


def offers(seed: int, items: int = 6, candidates: int = 4) -> Offers:
    """More bytes cost less, but for noise, as measured ones do."""
    rng = np.random.default_rng(seed)
    found = {}
    for item in range(items):
        sizes = np.sort(rng.integers(50, 1000, candidates))
        costs = np.sort(rng.exponential(1.0, candidates))[::-1] * rng.uniform(0.9, 1.1, candidates)
        found[f"i{item}"] = {
            f"c{n}": Offer(int(b), float(c)) for n, (b, c) in enumerate(zip(sizes, costs, strict=True))
        }
    return found


def every(offers: Offers) -> list[tuple[int, float]]:
    """(bytes, cost) of every choice there is."""
    found = []
    for chosen in itertools.product(*(options.values() for options in offers.values())):
        found.append((sum(o.nbytes for o in chosen), sum(o.cost for o in chosen)))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_close_to_the_best_there_is_and_the_bound_below_it(seed) -> None:
    problem = offers(seed)
    choices = every(problem)
    sizes = sorted(size for size, _ in choices)
    for budget in (sizes[0], *np.quantile(sizes, [0.1, 0.3, 0.5, 0.8]).astype(int).tolist(), sizes[-1]):
        best = min(cost for size, cost in choices if size <= budget)
        found = solve(problem, budget)
        assert found is not None
        assert found.nbytes <= budget
        assert found.cost == pytest.approx(sum(problem[i][c].cost for i, c in found.chosen.items()))
        assert found.bound <= best * (1 + 1e-12)
        assert best <= found.cost * (1 + 1e-12)
        # Exchanges of two leave little: of six items, whose steps are coarse, a twentieth of the range of costs.
        assert found.cost - best <= 0.05 * (max(cost for _, cost in choices) - best)
    assert solve(problem, sizes[0] - 1) is None


@pytest.mark.parametrize("seed", range(4))
def test_the_smallest_choice_of_a_cost(seed) -> None:
    problem = offers(seed)
    choices = every(problem)
    for most in np.quantile([cost for _, cost in choices], [0.02, 0.2, 0.6]).tolist():
        found = solve_for_cost(problem, most)
        best = min(size for size, cost in choices if cost <= most)
        assert found is not None
        assert found.cost <= most
        assert best <= found.nbytes <= 1.25 * best
    assert solve_for_cost(problem, min(cost for _, cost in choices) * 0.999) is None


ASKED = {"length": 32, "samples": 24}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that llama.cpp loads and dsv2-mini's tokenizer fits."""
    config = tiny.WORDY | {"q_lora_rank": 64}
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "small", config)


@pytest.fixture(scope="module")
def found(model: Path, fox: Path, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """A search among block types for 7.5 bits, whose candidates are kept, as a kill would leave them."""
    out = tmp_path_factory.mktemp("search") / "mix.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda folder: None)
        return dq.search(model, out, into_gguf=True, bits=7.5, calibration=fox, length=32)


@pytest.fixture(scope="module")
def text(model: Path, fox: Path) -> swaps.Text:
    """The windows that it measured on."""
    ids = read_calibration(dq.open(model), fox, 512 + WINDOWS, 32).ids[-WINDOWS:]
    return swaps.Text(ids, len(ids))


def divergence(original: Path, other: Path, text: swaps.Text) -> float:
    """Mean KL(original ‖ other), by the evaluation that eval-ppl runs."""
    options = LoadOptions()
    passes = [run(Model(dq.open(path), options), text.ids, text.batches) for path in (other, original)]
    return float(compare(*passes, text.ids, 0).kld.mean())


def test_the_file_has_the_size_and_the_divergence_that_the_search_says(
    found, text, model: Path, tmp_path: Path
) -> None:
    made = dq.convert(model, tmp_path / "mix.gguf", gguf=str(found.out)).out
    assert made.stat().st_size == found.mix.point.nbytes
    assert 0.97 * 7.5 < 8 * made.stat().st_size / found.plan.parameters <= 7.5  # few parts make coarse steps
    # Batches of other sizes round otherwise, in float32.
    assert divergence(model, made, text) == pytest.approx(found.mix.point.measured, rel=1e-3)


def test_a_swap_costs_what_a_file_with_that_one_tensor_costs(found, text, model: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (found.out.with_name("mix.yaml.search") / "state").read_text().splitlines()]
    known = {line["key"]: np.mean(line["value"]) for line in lines[1:]}
    kind, cost = next((key.rpartition("/")[2], cost) for key, cost in known.items() if "/blk.1.attn_output/" in key)
    recipe = tmp_path / "one.yaml"
    recipe.write_text(f'name: one\ngguf: [{{tensors: [attn_output], layers: "1", type: {kind}}}]\n')
    made = dq.convert(model, tmp_path / "one.gguf", gguf=str(recipe)).out
    assert divergence(model, made, text) == pytest.approx(cost, rel=1e-3)


def test_the_recipe_says_what_was_asked_for_and_found(found) -> None:
    written = found.out.read_text()
    assert written.startswith("# dsv2quant search small --gguf --bits 7.5 --calibration fox.txt --max-seq-length 32\n")
    assert f"KLD {found.mix.point.measured:.5f}" in written
    assert written.count(" bytes  ") == choosing.CURVE


def test_refinement_is_kept_where_it_is_better(found, model: Path, fox: Path, tmp_path: Path, monkeypatch) -> None:
    assert found.mix.point.measured <= found.mix.first.measured
    assert found.mix.bound <= found.mix.first.predicted
    measured = iter(
        (1.0, 2.0)
    )  # of the first mix, and of what is solved for where it is: steps down cost nothing there
    monkeypatch.setattr(choosing._Run, "whole", lambda run, mix: np.full(WINDOWS, next(measured)))
    worse = dq.search(model, tmp_path / "mix.yaml", into_gguf=True, bits=7.5, calibration=fox, length=32)
    assert worse.mix.point == worse.mix.first
    assert next(measured, None) is None


def test_a_killed_search_goes_on_with_what_it_measured(found, model: Path, fox: Path, monkeypatch) -> None:
    first = found.out.read_text()
    found.out.unlink()
    monkeypatch.setattr(measuring, "divergences", None)  # nothing is measured again
    again = dq.search(model, found.out, into_gguf=True, bits=7.5, calibration=fox, length=32)
    assert again.out.read_text() == first
    assert again.mix == found.mix
    assert not found.out.with_name("mix.yaml.search").exists()


def test_a_folder_is_mixed_of_schemes_that_engines_load(model: Path, fox: Path, tmp_path: Path) -> None:
    out = tmp_path / "mix.yaml"
    made = dq.search(model, out, max_kld=1e-3, calibration=fox, **ASKED)
    assert made.mix.point.predicted <= 1e-3
    assert len({*made.mix.chosen.values()}) > 1
    planned = dq.plan(model, recipe=out, targets=["vllm", "sglang"])
    assert planned.bytes_out == made.plan.bytes_out
    assert made.plan.bytes_out == pytest.approx(made.mix.point.nbytes, rel=0.02)  # headers name other parts
    assert not [entry.reason for entry in planned.entries if entry.reason and not entry.spec.keep]


REFUSED: dict[str, tuple[dict, str]] = {
    "no budget": ({}, r"no budgets are given \(give one of --bits, --size and --max-kld\)"),
    "two budgets": ({"bits": 4, "size": "1GB"}, "2 budgets are given"),
    "no bits": ({"bits": 0}, "--bits 0 is out of range"),
    "too many bits": ({"bits": float("inf")}, "--bits inf is out of range"),
    "an importance matrix for a folder": ({"bits": 6, "imatrix": "x.gguf"}, "--imatrix goes with --gguf"),
    "targets of a GGUF file": ({"bits": 6, "into_gguf": True, "targets": ["vllm"]}, "--target does not go with --gguf"),
    "a scheme": ({"bits": 6, "scheme": "fp8-block"}, "--fp8 does not go with a search"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_before_anything_is_opened(case, tmp_path: Path) -> None:
    asked, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        dq.search(tmp_path / "none", tmp_path / "mix.yaml", **asked)


def test_budgets_that_nothing_keeps_to(model: Path, fox: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"\d bytes are too few: the smallest candidates take \d[\d,]+ \(give a larger"
    ):
        dq.search(model, tmp_path / "mix.yaml", into_gguf=True, size="1KB", calibration=fox, length=32)
    (tmp_path / "mine.yaml.search").mkdir()
    (tmp_path / "mine.yaml.search" / "letters").write_text("mine")
    with pytest.raises(InputError, match=r"mine\.yaml\.search: is there, and no search's work"):
        dq.search(model, tmp_path / "mine.yaml", into_gguf=True, bits=6, calibration=fox, length=32)
    (tmp_path / "there.yaml").write_text("")
    with pytest.raises(InputError, match="is there already"):
        dq.search(model, tmp_path / "there.yaml", into_gguf=True, bits=6)


def test_convert_searches_where_a_budget_is_given(cli, model: Path, fox: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.gguf"
    words = ["convert", model, "--bits", "8.5", "--calibration", fox, "--max-seq-length", "32", "-o", out, "-q"]
    assert cli(*words).code == 0
    recipe = tmp_path / "small.gguf.yaml"
    assert recipe.read_text().startswith("# dsv2quant search small --gguf --bits 8.5 --calibration fox.txt")
    assert 8 * out.stat().st_size / dq.plan(model, gguf="Q8_0").parameters <= 8.5
    written = out.read_bytes(), recipe.stat().st_mtime_ns
    out.unlink()
    (tmp_path / "small.gguf.json").unlink()
    assert cli(*words).code == 0  # the recipe is there: nothing is searched for again
    assert (out.read_bytes(), recipe.stat().st_mtime_ns) == written
    other = cli(*["9" if word == "8.5" else word for word in words])
    assert other.code == 3
    assert other.err == f"error: {recipe}: is there already (give another name, or remove it)\n"


def test_a_folder_within_a_budget_is_tuned_where_that_is_asked_for(cli, model: Path, fox: Path, tmp_path: Path) -> None:
    words = ["--bits", "14.5", "--calibration", fox, "--max-seq-length", "32", "--num-calibration-samples", "24"]
    ran = cli("convert", model, *words, "--tune", "512", "-o", tmp_path / "out", "--json", "-q")
    assert ran.code == 0
    said = json.loads(ran.out)
    assert said["tuned"]["tokens"] + said["tuned"]["held_out_tokens"] == 512
    manifest = json.loads((tmp_path / "out" / "dsv2quant.json").read_text())
    assert manifest["command"].count("--tune") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", "6", "--fp8"], "--fp8 does not go with a budget: a search chooses what it says"),
        (["--bits", "6", "--dry-run"], "--dry-run does not go with a budget: a search reads all of MODEL"),
        (["--bits", "6", "--size", "1GB"], "2 budgets are given (give one of --bits, --size and --max-kld)"),
    ],
)
def test_what_does_not_go_with_a_budget(cli, words, message, model: Path, tmp_path: Path) -> None:
    ran = cli("convert", model, *words, "-o", tmp_path / "out")
    assert ran.code == 2
    assert message in ran.err
    assert not any(tmp_path.iterdir())


def test_the_verb_prints_what_it_found(cli, model: Path, fox: Path, tmp_path: Path) -> None:
    out = tmp_path / "mix.yaml"
    ran = cli(
        "search",
        model,
        "--max-kld",
        "1e-4",
        "--gguf",
        "--calibration",
        fox,
        "--max-seq-length",
        "32",
        "--json",
        "-o",
        out,
    )
    assert ran.code == 0
    said = json.loads(ran.out)
    assert (said["schema"], said["recipe"]) == ("dsv2quant.search/1", str(out))
    assert said["mix"]["measured"] <= 1e-4
    assert len(said["curve"]) == choosing.CURVE
