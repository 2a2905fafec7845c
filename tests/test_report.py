"""Reports: numbers that JSON keeps, figures that show them, and one page that needs no other file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import tiny
from measured_cases import ENGINE, MEASURED, SCORES

import dsv2quant as dq
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.evaluation.cells import cells
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan
from dsv2quant.report import figures
from dsv2quant.report.artifacts import Artifact, Report, report_json
from dsv2quant.report.fallbacks import Fallback, fallbacks
from dsv2quant.report.figures import coverage, frontier, kld_by_position, short_names, size_against_kld
from dsv2quant.report.heatmap import colour_range, sqnr_heatmap
from dsv2quant.report.measured import Cell, Estimate, Measured, measured_from, measured_json
from dsv2quant.report.page import page
from dsv2quant.report.pictures import pictures
from dsv2quant.report.svg import Scale, alone, number, numbers, spread

SVG = "{http://www.w3.org/2000/svg}"


def cell(layer, role, sqnr, tensors=1, **more):
    known = {"signal": 1.0, "sqnr_db": sqnr, "decile_db": sqnr - 2, "lowest_db": sqnr - 3} if sqnr else {"exact": True}
    return Cell(layer, role, ("fp8-block",), tensors, 1000 * tensors, **{"bits": 8.0, **known, **more})


CELLS = (
    cell(None, "embed", None), cell(0, "o_proj", 31.5), cell(0, "dense.up_proj", 30.0), cell(1, "o_proj", 20.0),
    cell(1, "routed.up_proj", 25.0, tensors=16),
)  # fmt: skip
COVERAGE = tuple(
    {"layer": layer, "fewest": 0 if layer == 2 else 40, "median": 300, "most": 2000, "variation": 1.0, "starved": 3,
     "unseen": [7] if layer == 2 else []} for layer in (1, 2, 3)
)  # fmt: skip


def scored(name, nbytes, kld, **more):
    scores = replace(SCORES, kld=Estimate(kld, kld / 20))
    return Artifact(name, nbytes, 8.5, Measured(scores, cells=CELLS), **more)


FALLBACK = Fallback("kv_a_proj_with_mqa [576, 2048], 27 tensors in layers 0-26", "bf16", "576 is <odd>", ("a.weight",))
ARTIFACTS = (
    scored("lite-fp8", 16_000_000_000, 0.01, fallbacks=(FALLBACK,), coverage=COVERAGE),
    scored("lite-int4", 9_000_000_000, 0.05, failed=("mean KLD is 0.05 nats, more than 0.02",)),
    scored("lite-bad", 17_000_000_000, 0.04),
)
REPORT = Report("owner/lite", "0123abcd", ARTIFACTS)


def drawn(svg):
    """An SVG as a tree; it is well-formed."""
    assert svg is not None
    return ElementTree.fromstring(svg)


def words(svg):
    return ["".join(element.itertext()) for element in drawn(svg).iter(f"{SVG}text")]


def test_what_is_measured_goes_through_json():
    measured = replace(MEASURED, cells=CELLS)
    kept = json.loads(json.dumps(measured_json(measured), allow_nan=False))
    assert measured_from(kept) == measured
    assert measured_from(json.loads(json.dumps(measured_json(Measured())))) == Measured()


def test_cells_hold_bits_and_errors_by_layer_and_role(tmp_path):
    source = open_checkpoint(tiny.write_checkpoint(tmp_path / "model", tiny.LITE))
    convert(make_plan(source, recipe.builtin("fp8-channel")), tmp_path / "out")
    artifact = open_checkpoint(tmp_path / "out")
    errors = dq.verify(artifact, source).errors.weights
    found = {(c.layer, c.role): c for c in cells(artifact, errors)}
    experts = sorted(e.sqnr for e in errors if (e.layer, e.role) == (1, "routed.up_proj"))
    one = found[1, "routed.up_proj"]
    assert (one.tensors, one.schemes, one.weights) == (8, ("fp8-channel",), 8 * 48 * 64)
    assert one.lowest_db == one.decile_db == experts[0]  # a tenth of 8 is the lowest
    assert experts[0] <= one.sqnr_db <= experts[-1]
    assert one.bits == pytest.approx(8 + 8 * 4 / 64)  # a float32 scale for 64 columns
    assert (found[None, "embed"].exact, found[None, "embed"].sqnr_db) == (True, None)
    assert sum(c.weights for c in found.values()) == sum(w.spec.size for w in artifact.weights)
    assert list(found)[:2] == [(None, "embed"), (None, "lm_head")]
    bare = {(c.layer, c.role): c for c in cells(artifact)}
    assert (bare[1, "o_proj"].exact, bare[1, "o_proj"].sqnr_db) == (False, None)
    assert bare[1, "o_proj"].bits == found[1, "o_proj"].bits


def test_the_frontier_is_of_what_none_beats_in_both():
    assert frontier([(16, 0.01), (9, 0.05), (17, 0.04), (9, 0.06), (16, 0.01)]) == [1, 0]
    assert frontier([]) == []


def test_size_against_kld_shows_every_artifact_where_it_belongs():
    root = drawn(size_against_kld(ARTIFACTS))
    points = {}
    for circle in root.iter(f"{SVG}circle"):
        name = circle.find(f"{SVG}title").text.partition(":")[0]
        points[name] = float(circle.get("cx")), float(circle.get("cy"))
    assert set(points) == {"lite-fp8", "lite-int4", "lite-bad"}
    assert points["lite-int4"][0] < points["lite-fp8"][0] < points["lite-bad"][0]
    assert points["lite-fp8"][1] > points["lite-bad"][1] > points["lite-int4"][1]  # lower is better
    (line,) = [path for path in root.iter(f"{SVG}path") if path.get("class") == "muted"]
    assert len(re.findall("[ML]", line.get("d"))) == 2  # lite-bad is not on the frontier
    shown = words(size_against_kld(ARTIFACTS))
    assert {"fp8", "int4", "bad", "size, GB", "mean KLD, nats"} <= set(shown)


def test_names_never_lie_on_each_other():
    crowd = [scored(f"a_name_as_long_as_this_{i}", 10**9 + i * 10**6, 0.05 + i * 1e-4) for i in range(12)]
    svg = size_against_kld(crowd)
    boxes = []
    for text in drawn(svg).iter(f"{SVG}text"):
        x, y, name = float(text.get("x")), float(text.get("y")), "".join(text.itertext())
        if not text.get("transform"):
            width = figures.CHARACTER * len(name) * {"small": 0.8, "title": 1.2}.get(text.get("class"), 1)
            left = x - width * {"start": 0, "middle": 0.5, "end": 1}[text.get("text-anchor")]
            boxes.append((left, y - 8, left + width, y, name))
    assert {name for *_, name in boxes} >= set(short_names(crowd).values())  # at its point, or in the legend
    clashes = [
        (a[4], b[4]) for i, a in enumerate(boxes) for b in boxes[:i]
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    ]  # fmt: skip
    assert clashes == []
    height = float(drawn(svg).get("viewBox").split()[3])
    assert all(box[0] >= 0 and box[2] <= 400 and box[3] <= height for box in boxes)


def test_short_names_leave_out_what_all_share():
    names = [replace(ARTIFACTS[0], name=name) for name in ("V2-Lite-FP8", "V2-Lite-Q4_K_M.gguf", "V2-Lite-W4A16-G128")]
    assert short_names(names) == {0: "FP8", 1: "Q4_K_M.gguf", 2: "W4A16-G128"}
    assert short_names(names[:1]) == {0: "V2-Lite-FP8"}
    assert short_names([replace(names[0], name="a"), replace(names[0], name="a-b")]) == {0: "a", 1: "a-b"}


def test_kld_by_position_has_a_point_of_every_stretch():
    lines = [p for p in drawn(kld_by_position(ARTIFACTS)).iter(f"{SVG}path") if "line" in p.get("class")]
    assert [len(re.findall("[ML]", line.get("d"))) for line in lines] == [16, 16, 16]
    assert kld_by_position([Artifact("a", 1, 8.0)]) is None


def test_bits_by_depth_weighs_roles_by_their_size():
    two = (cell(0, "o_proj", 30.0, bits=4.0), cell(0, "routed.up_proj", 30.0, tensors=3, bits=8.0))
    assert figures._bits(Artifact("a", 1, 8.0, Measured(cells=two))) == {0: pytest.approx(7.0)}
    assert figures.bits_by_depth([Artifact("a", 1, 8.0)]) is None


def test_the_heatmap_has_a_cell_of_each_layer_and_role_with_experts_worst_tenth():
    low, high = colour_range(ARTIFACTS)
    assert (low, high) == (18.0, 31.5)
    titles = [t.text for t in drawn(sqnr_heatmap(ARTIFACTS[0], low, high)).iter(f"{SVG}title")]
    assert titles == [
        "o_proj, layer 0, fp8-block: 31.50 dB, lowest 28.50 of 1",
        "dense.up_proj, layer 0, fp8-block: 30.00 dB, lowest 27.00 of 1",
        "o_proj, layer 1, fp8-block: 20.00 dB, lowest 17.00 of 1",
        "routed.up_proj, layer 1, fp8-block: 25.00 dB, lowest 22.00 of 16",
        "routed.up_proj, layer 1, fp8-block: worst tenth 23.00 dB",
    ]  # embed, which nothing was done to, has no column
    assert sqnr_heatmap(Artifact("a", 1, 8.0), low, high) is None
    alike = colour_range([Artifact("a", 1, 8.0, Measured(cells=(cell(0, "o_proj", 32.0),)))])
    assert alike == (25.0, 37.0)  # 30 and 32, and no more colours than twelve decibels have


def test_coverage_marks_layers_whose_experts_saw_nothing():
    bad = [r for r in drawn(coverage(ARTIFACTS[0])).iter(f"{SVG}rect") if r.get("class") == "bad"]
    assert len(bad) == 2  # layer 2, and the key
    assert coverage(ARTIFACTS[1]) is None


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale(0, 10, 0, 1), [0, 2, 4, 6, 8, 10]),
        (Scale(4.2, 5.1, 0, 1), [4.2, 4.4, 4.6, 4.8, 5.0]),
        (Scale(0.0004, 0.9, 0, 1, log=True), [0.001, 0.01, 0.1]),
        (Scale(90, 2500, 0, 1, log=True), [100, 200, 500, 1000, 2000]),
        (Scale(0.051, 0.072, 0, 1, log=True), [0.06, 0.07]),
    ],
)
def test_ticks_are_round(scale, ticks):
    assert scale.ticks() == pytest.approx(ticks)


def test_numbers_on_axes_are_short():
    shown = [number(x) for x in (0, 0.02, 1e-5, 150, 2000, 20_000, 2_500_000)]
    assert shown == ["0", "0.02", "1e-5", "150", "2,000", "20k", "2.5e6"]
    assert numbers(Scale(6.184, 6.202, 0, 1).ticks()) == ["6.185", "6.19", "6.195", "6.2"]


def test_scales_hold_what_they_show():
    assert spread([3.0], 0, 1).ticks()
    assert spread([0.0, 0.0], 0, 1)(0.0) >= 0
    narrow = spread([0.01, 0.0100001], 10, 0, log=True)
    assert 0 < narrow(0.01) < 10
    assert Scale(1, 100, 0, 10, log=True)(10) == pytest.approx(5)


class Outline(HTMLParser):
    """Tags that are open, what a browser would fetch, and the text."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.fetched += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        self.fetched += [tag] * (tag in ("script", "link", "iframe", "object", "embed", "img"))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_needs_nothing_else_and_tells_everything():
    html = page(REPORT)
    outline = Outline()
    outline.feed(html)
    outline.close()
    assert outline.open == []
    assert outline.fetched == []
    assert "url(" not in html
    assert "@import" not in html
    text = " ".join(outline.text)
    for told in (
        "owner/lite: 3 artifacts", "revision 0123abcd", "16.00 GB", "0.01000 ± 0.00050", "reference base",
        "mean KLD is 0.05 nats, more than 0.02", "576 is <odd>", "27 tensors in layers 0-26", "By layer and role",
        "Calibration tokens: lite-fp8", "SQNR: lite-int4",
    ):  # fmt: skip
        assert told in text
    assert html.count("<svg") == 3 + 1 + 3  # for all; coverage; errors of each
    assert "width=device-width" in html
    assert "prefers-color-scheme:dark" in html


def test_a_page_of_little_has_what_there_is():
    html = page(Report("lite", None, (Artifact("<script>alert(1)</script>", 1000, 8.0),)))
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "<svg" not in html
    assert "1.0 kB" in html
    told = page(Report("lite", None, (Artifact("a", 1000, 8.0, Measured(engines=(ENGINE,))),)))
    assert "vllm 0.26.0 agrees" in told
    wrong = replace(ENGINE, faults=("mean KLD is 1 nat",))
    assert "agrees" not in page(Report("lite", None, (Artifact("a", 1000, 8.0, Measured(engines=(wrong,))),)))


def test_report_json_has_the_same_numbers():
    kept = json.loads(json.dumps(report_json(REPORT), allow_nan=False))
    assert (kept["schema"], kept["model"], len(kept["artifacts"])) == ("dsv2quant.report/1", "owner/lite", 3)
    first = kept["artifacts"][0]
    assert measured_from(first) == ARTIFACTS[0].measured
    assert (first["bytes"], first["fallbacks"][0]["scheme"], first["coverage"][1]["unseen"]) == (
        16 * 10**9,
        "bf16",
        [7],
    )
    assert kept["artifacts"][1]["failed"] == ["mean KLD is 0.05 nats, more than 0.02"]


def test_a_figure_stands_alone_with_its_colours():
    svg = alone(size_against_kld(ARTIFACTS))
    style = drawn(svg).find(f"{SVG}style").text
    used = {name for e in drawn(svg).iter() for name in (e.get("class") or "").split()}
    assert used - set(re.findall(r"\.([a-z]\w*)", style)) == set()


def test_pictures_for_a_card_are_of_what_shares_it():
    assert [*pictures(ARTIFACTS)] == [f"figures/{name}.svg" for name in ("size-kld", "position-kld", "depth-bits")]
    own = pictures(ARTIFACTS[:1])
    assert [*own] == [f"figures/{name}.svg" for name in ("position-kld", "depth-bits", "sqnr", "coverage")]
    assert all(drawn(svg).get("aria-label") and title for title, svg in own.values())
    assert pictures([Artifact("a", 1, 8.0)]) == {}


def test_fallbacks_say_what_why_and_of_which_tensors(awkward):
    found = fallbacks(dq.plan(awkward, scheme="fp8-block"))
    assert found
    assert all(f.scheme != "fp8-block" and f.reason and len(f.tensors) > 0 for f in found)
    in_gguf = fallbacks(dq.plan(tiny.MINI, gguf="Q4_K_M"))
    assert {f.what.partition(",")[0] for f in in_gguf} >= {"attn_k_b", "ffn_down_exps"}
