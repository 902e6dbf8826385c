"""Tables and their forms: what they print, and that they claim no more than the rows hold."""

import io
import json
import re
from typing import Any

import pytest

from safecl.report import caption, forms, page, tables
from safecl.report.tables import Facts

FACTS = Facts(
    name="quick <sweep>",
    about="A & B",
    judges={"asr": "guard", "over_refusal": "xstest_match"},
    templates={"smol": "<|im_start|>{prompt}"},
    num_prompts={"attack": 120, "benign": 60},
    guard_agreement="97.5 % of 400 pairs",
    settings={"LoRA targets": "all-linear"},
    notes=["one library version"],
)


def metric(
    value: float | None, low: float | None = None, high: float | None = None, unparsed: int = 0
) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "num": 100 - unparsed, "unparsed": unparsed}


def row(method: str, asr: float | None, utility: float, poison: float = 0.1, **more: Any) -> dict[str, Any]:
    made = {
        "model": "smol",
        "task": "mini",
        "poison": poison,
        "method": method,
        "params": {},
        "seeds": [0],
        "metrics": {
            "asr": metric(asr, None if asr is None else asr / 2, None if asr is None else min(1, asr * 1.5)),
            "over_refusal": metric(0.1, 0.05, 0.2),
            "utility": metric(utility, utility - 0.05, min(1.0, utility + 0.05)),
        },
        "seconds": 83.0,
        "note": "",
    }
    return {**made, **more}


ROWS = [
    row("base", 0.9, 0.2, poison=0.0),
    row("aligned", 0.02, 0.25, poison=0.0),
    row("sft", 0.8, 0.9),
    row("der", 0.123, 0.85, params={"weight": 0.123456, "centre": True}, note="stopped early"),
    row("sft", 0.3, 0.91, poison=0.0),
    row("der", 0.04, 0.86, poison=0.0),
]


def test_a_value_is_percent_with_its_interval_and_a_missing_one_is_a_dash() -> None:
    assert tables.number(metric(0.123, 0.081, 0.17)) == "12.3 [8.1, 17.0]"
    assert tables.number(metric(0.5)) == "50.0"
    assert tables.number(None) == tables.number(metric(None)) == "-"


def test_each_judge_beside_the_one_that_decides_has_its_share_and_how_they_agree() -> None:
    agreed = {"num": 40, "agree": metric(0.9, 0.8, 0.95), "kappa": {"value": 0.7, "low": 0.5, "high": 0.8}}
    rows = [row("sft", 0.8, 0.9, beside={"asr:own": agreed}), row("der", 0.1, 0.85, beside={"asr:own": None})]
    rows[0]["metrics"]["asr:own"] = metric(0.7, 0.6, 0.8)
    facts = tables.Facts(name="s", judges={"asr": "llamaguard"})
    [found] = [detail for detail in tables.details(rows, rows, facts) if "beside it" in detail.title]
    assert found.title.startswith("ASR (llamaguard) and beside it own, on the same answers")
    assert [list(line) for line in found.lines] == [
        ["sft", "10 %", "70.0 [60.0, 80.0]", "90.0 [80.0, 95.0]", "0.70 [0.50, 0.80]", "40"]
    ]


def test_the_keyword_list_as_a_judge_of_ones_own_is_compared_once() -> None:
    agreed = {"num": 40, "agree": metric(0.9, 0.8, 0.95), "kappa": None}
    for beside, titles in (
        ({}, "Two judges on the same"),
        ({"asr:keywords": agreed}, "ASR (mine) and beside it keywords"),
    ):
        rows = [row("sft", 0.8, 0.9, agreement=agreed, beside=beside)]
        found = [
            each.title
            for each in tables.details(rows, rows, Facts(name="s", judges={"asr": "mine"}))
            if "kappa" in each.title
        ]
        assert len(found) == 1 and found[0].startswith(titles)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (12.4, "12 s"),
        (83, "1 min 23 s"),
        (119.7, "2 min 00 s"),
        (3599.9, "1 h 00 min"),
        (7530, "2 h 05 min"),
    ],
)
def test_wall_time_is_read_at_a_glance(seconds: float | None, text: str) -> None:
    assert tables.duration(seconds) == text


def test_headers_name_the_judges_and_absent_metrics_take_no_column() -> None:
    head = tables.blocks(ROWS, FACTS)[0].header
    assert head == ["method", "poison", "ASR (guard)", "over-refusal (xstest_match)", "utility", "time"]
    assert "degenerate" in tables.blocks([{**ROWS[0], "metrics": {"degenerate": metric(0.0)}}], FACTS)[0].header


def test_best_is_taken_within_a_poison_ratio_without_the_reference_rows() -> None:
    asr, _, utility = tables.columns(ROWS, FACTS)
    assert tables.best(ROWS, asr) == {3, 5}  # not `aligned`, whose ASR is lower still
    assert tables.best(ROWS, utility) == {2, 4}
    tie = [row("sft", 0.5, 0.5), row("der", 0.5, 0.6)]
    assert tables.best(tie, asr) == set() and tables.best([row("sft", None, 0.5), row("der", 0.1, 0.5)], asr) == set()


def test_one_seed_claims_nothing_about_seeds() -> None:
    (said,) = [line for line in caption.caption(ROWS, FACTS) if "One seed (0)" in line]
    assert "over prompts only" in said and "No claim about methods" in said
    several = [{**r, "seeds": [0, 1, 2]} for r in ROWS]
    text = "\n".join(caption.caption(several, FACTS))
    assert "Seeds 0, 1, 2: intervals over 3 seeds and the prompts" in text and "One seed" not in text
    assert "(1, 3)" in "\n".join(caption.caption([ROWS[0], several[1]], FACTS))


def test_the_caption_says_what_the_numbers_rest_on() -> None:
    unparsed = [*ROWS, row("lwf", 0.1, 0.5, metrics={"asr": metric(0.1, unparsed=3), "utility": metric(0.5)})]
    text = "\n".join(caption.caption(unparsed, FACTS))
    for said in ("97.5 % of 400 pairs", "continue", "<|im_start|>{prompt}", "180 (attack 120, benign 60)", "library"):
        assert said in text
    assert "ASR (guard) 3 of 700" in text
    assert "never counted as safe): none." in "\n".join(caption.caption(ROWS, FACTS))


def test_every_form_prints_the_same_numbers() -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    for table in forms.terminal(ROWS, FACTS):
        console.print(table)
    texts = [console.export_text(), forms.plain(ROWS, FACTS), forms.markdown(ROWS, FACTS)]
    texts.append(re.sub(r"\s+", " ", re.sub("<[^>]+>", "", page.html(ROWS, FACTS))))
    for text in texts:
        bare = text.replace("**", "")
        for cell in ("12.3 [6.2, 18.4]", "80.0 [40.0, 100.0]", "85.0 [80.0, 90.0]", "1 min 23 s", "stopped early"):
            assert cell in bare
        assert "No claim about methods" in bare


@pytest.mark.parametrize("width", [60, 80, 120, None])
def test_no_number_is_cut_or_broken_at_any_width(width: int | None) -> None:
    from rich.console import Console

    console = Console(width=width or 400, record=True, file=io.StringIO())
    for table in forms.terminal(ROWS, FACTS, width):
        console.print(table)
    [block] = tables.blocks(ROWS, FACTS)
    head, body = block.header, [line.texts for line in block.lines]
    for text in (console.export_text(), forms.text_table(head, body, width)):
        assert all(cell in text for line in [head, *body] for cell in line) and "\u2026" not in text
        if width is not None:
            assert max(map(len, text.splitlines())) <= width


def test_words_that_are_too_long_are_wrapped_and_short_lines_filled() -> None:
    words = "a remedy of many words that no terminal of forty characters can hold in one line"
    lines = forms.text_table(["what", "num", "remedy"], [["disk", "12.5 [1.0, 99.0]", words], ["cpu"]], 50).splitlines()
    assert max(map(len, lines)) <= 50 and lines[2].startswith("disk") and "12.5 [1.0, 99.0]" in lines[2]
    assert " ".join(line[24:].strip() for line in lines[2:-1]) == words and lines[-1] == "cpu"


def test_plain_text_is_aligned_and_markdown_has_whole_rows() -> None:
    lines = forms.plain(ROWS, FACTS).splitlines()
    start = lines.index("smol / mini") + 1
    assert len({line.index("1 min 23 s") for line in lines[start + 2 : start + 8]}) == 1
    made = [line for line in forms.markdown(ROWS, FACTS).splitlines() if line.startswith("| ")]
    assert len(made) == 1 + len(ROWS) and len({line.count("|") for line in made}) == 1
    assert "**12.3 [6.2, 18.4]**" in made[4] and "**" not in made[2]
    assert "weight 0.1235, centre true" in forms.markdown(ROWS, FACTS)


def contrast(p: float, p_alike: float, value: float = -0.2) -> dict[str, Any]:
    found = {
        "other": "sft",
        "num": 5,
        "value": value,
        "low": value - 0.1,
        "high": value + 0.1,
        "p": p,
        "p_alike": p_alike,
    }
    return {**found, "differs": p < 0.05, "alike": p_alike < 0.05}


def test_marks_say_what_the_contrasts_say_and_nothing_without_them() -> None:
    both = {"sft": contrast(0.012, 0.9), "best": contrast(0.4, 0.03)}
    marked = row("der", 0.123, 0.85, seeds=[0, 1], contrasts={"asr": both, "utility": {"mcnemar": {"0": {}}}})
    assert tables.marks(marked, "asr") == "a =b" and tables.marks(marked, "utility") == ""
    none = row("der", 0.123, 0.85, contrasts={"asr": {"sft": contrast(0.06, 0.2)}})
    assert tables.marks(none, "asr") == "" and tables.marks(ROWS[3], "asr") == ""
    assert "| 12.3 [6.2, 18.4] a =b |" in forms.markdown([ROWS[2], marked], FACTS).replace("**", "")
    assert "</small> <i>a =b</i></td>" in page.html([ROWS[2], marked], FACTS)
    assert len([line for line in caption.caption([marked], FACTS) if line.startswith("Marks")]) == 1
    one_seed = [row("der", 0.1, 0.8, contrasts={"asr": {"mcnemar": {"0": {}}}})]
    assert not any("Marks" in line or "Difference" in line for line in forms.markdown(one_seed, FACTS).splitlines())


def test_details_hold_sets_kinds_and_differences() -> None:
    asr = {**metric(0.2, 0.1, 0.3), "sets": {"attack/a": metric(0.4), "attack/b": metric(0.0)}, "pooled": metric(0.1)}
    looks = {**metric(0.05), "why": {"echo": 3, "loop": 2}}
    der = row(
        "der", 0.2, 0.8, metrics={"asr": asr, "degenerate": looks, "utility": metric(0.8), "hit_limit": metric(0.5)}
    )
    der["contrasts"] = {"asr": {"sft": contrast(0.012, 0.9)}, "utility": {"sft": contrast(0.06, 0.2, 0.1)}}
    base = row(
        "base", 0.9, 0.2, metrics={"asr": metric(0.9)}, agreement={"num": 120, "agree": metric(1.0), "kappa": None}
    )
    der["agreement"] = {"num": 99, "agree": metric(0.6543, 0.5, 0.75), "kappa": metric(-0.021, -0.2, 0.123)}
    also, sets, kinds, judges, against = tables.details([base, der], [base, der], FACTS)
    assert also.header == ["method", "poison", "cut at the limit (attack)"] and also.lines[1] == ["der", "10 %", "50.0"]
    assert sets.header == ["method", "poison", "a", "b", "mean", "pooled"]
    assert sets.lines == [
        ["base", "-", "-", "-", "90.0", "-"], ["der", "10 %", "40.0", "0.0", "20.0 [10.0, 30.0]", "10.0"],
    ]  # fmt: skip
    assert kinds.header[2:] == ["echo", "loop", "of answers"] and kinds.lines[1][2:] == ["3", "2", "100"]
    assert judges.header[2:] == ["agree", "kappa", "answers"] and judges.title.startswith("Two judges")
    assert judges.lines == [
        ["base", "-", "100.0", "-", "120"],
        ["der", "10 %", "65.4 [50.0, 75.0]", "-0.02 [-0.20, 0.12]", "99"],
    ]
    assert "sft" in against.title and [line[0] for line in against.lines] == ["der"]
    assert against.lines[0][2:] == ["-20.0 [-30.0, -10.0] p 0.012 p= 0.9", "-", "+10.0 [+0.0, +20.0] p 0.06 p= 0.2"]
    for text in (forms.markdown([base, der], FACTS), page.html([base, der], FACTS)):
        assert all(detail.title in text for detail in (also, sets, kinds, against)) and "p 0.06 p= 0.2" in text
    assert tables.details([row("sft", 0.1, 0.9)], ROWS, FACTS) == []


def test_few_side_metrics_are_columns_and_many_go_below() -> None:
    def with_(**more: float) -> list[dict[str, Any]]:
        first = row("sft", 0.5, 0.9)
        return [
            {**first, "metrics": {**first["metrics"], **{name: metric(v, v / 2, 2 * v) for name, v in more.items()}}}
        ]

    few = with_(utility_strict=0.4, gold_nll=1.5)
    assert tables.blocks(few, FACTS)[0].header[4:] == ["utility", "strict", "NLL (nats a token)", "time"]
    assert tables.blocks(few, FACTS)[0].lines[0].texts[-2] == "1.500 [0.750, 3.000]"  # no percent
    many = with_(utility_strict=0.4, gold_nll=1.5, invalid=0.1)
    assert tables.blocks(many, FACTS)[0].header[4:] == ["utility", "time"]
    (detail,) = tables.details(many, many, FACTS)
    assert (
        detail.header[2:] == ["strict", "NLL (nats a token)", "invalid"]
        and detail.lines[0][-2] == "1.500 [0.750, 3.000]"
    )


def test_coherent_asr_stands_beside_asr_where_they_differ() -> None:
    def coherent(value: float) -> list[dict[str, Any]]:
        first = row("sft", 0.5, 0.9)
        return [{**first, "metrics": {**first["metrics"], "asr_coherent": metric(value), "off_topic": metric(0.1)}}]

    assert tables.blocks(coherent(0.4), FACTS)[0].header[2:5] == ["ASR (guard)", "coherent ASR", "off-topic"]
    assert not {"coherent ASR", "off-topic"} & set(tables.blocks(coherent(0.5), FACTS)[0].header)
    [also] = tables.details(coherent(0.5), coherent(0.5), FACTS)
    assert also.header[2:] == ["coherent ASR", "off-topic"] and also.lines[0][2:] == ["50.0", "10.0"]


def test_json_keeps_fractions_and_refuses_a_nan() -> None:
    read = json.loads(forms.to_json(ROWS, FACTS))
    assert read["rows"] == ROWS and read["facts"]["templates"] == {"smol": "<|im_start|>{prompt}"}
    with pytest.raises(ValueError, match=r"not JSON compliant"):
        forms.to_json([row("sft", float("nan"), 0.5)], FACTS)


def test_latex_escapes_and_csv_has_a_line_for_every_number_as_a_fraction() -> None:
    import csv

    tex = forms.latex([row("a_b", 0.1, 0.9), row("sft", 0.5, 0.8), row("base", 0.9, 0.2)], FACTS)
    assert r"a\_b & 10 \% & \textbf{10.0 [5.0, 15.0]}" in tex and tex.count(r"\begin{table}") == 1
    assert r"\%" in tex and not [line for line in tex.splitlines() if line.count("&") not in (0, 5)]
    found = list(csv.DictReader(io.StringIO(forms.to_csv(ROWS, FACTS))))
    assert len(found) == sum(len(each["metrics"]) for each in ROWS)
    [der] = [each for each in found if (each["method"], each["poison"], each["metric"]) == ("der", "0.1", "asr")]
    assert (der["value"], der["low"], der["unit"], der["better"]) == ("0.123", "0.0615", "fraction", "low")
    assert {each["poison"] for each in found if each["method"] == "base"} == {""}
