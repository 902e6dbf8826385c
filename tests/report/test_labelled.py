"""Labels of a person: drawn blind, kept in the store, and what they say of judge and rates."""

from __future__ import annotations

import json
import random
import threading
import urllib.error
import urllib.request
from http.server import HTTPServer
from pathlib import Path
from typing import Any

import pytest

from safecl.base import ConfigError
from safecl.project import Project, load
from safecl.report import forms, labelled, labelling, serve
from safecl.report.facts import readable
from safecl.stats import Interval, wilson
from safecl.store import Store
from tests import made_up
from tests.browser import Browser

QUICKSTART = Path(__file__).parents[2] / "sweeps" / "quickstart.yaml"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    settings = ["methods=[{name: sft}]", "poison.ratios=[0.1]", "seeds=[0, 1]", "models.0.dtype=float32"]
    made = Project(load(QUICKSTART, [*settings, "evaluate.judges.asr=keywords", f"execution.root={tmp_path / 'runs'}"]))
    made_up.finish(made)
    return made


def covered(rate: float, sensitivity: float, specificity: float, num: int, rng: random.Random) -> bool:
    """Whether one simulated row's corrected interval holds the true rate: 200 prompts, of which `num` are labelled."""
    truth = [rng.random() < rate for _ in range(200)]
    said = [rng.random() < (sensitivity if true else 1 - specificity) for true in truth]
    drawn = rng.sample(range(200), num)
    found = labelled.corrected(wilson(sum(said), 200), {"one": [(truth[i], said[i]) for i in drawn]})
    assert found is not None
    return found.low <= rate <= found.high


@pytest.mark.parametrize("rate", [0.03, 0.3, 0.7])
@pytest.mark.parametrize("judge", [(1.0, 1.0), (0.95, 0.9), (0.5, 0.5), (0.1, 0.2)])
@pytest.mark.parametrize("num", [12, 40])
def test_the_interval_covers_whatever_the_judge(rate: float, judge: tuple[float, float], num: int) -> None:
    rng = random.Random(f"{rate} {judge} {num}")
    times = 600
    share = sum(covered(rate, *judge, num, rng) for _ in range(times)) / times
    assert share >= 0.95 - 2.6 * (0.95 * 0.05 / times) ** 0.5  # one-sided, at one in 200


def test_a_good_judge_narrows_and_a_biased_one_is_moved() -> None:
    rate = Interval(0.5, 0.43, 0.57)
    agreeing = [(i % 2 == 0, i % 2 == 0) for i in range(40)]
    lenient = [(True, False)] * 20 + [(True, True)] * 20
    first, second = (labelled.corrected(rate, {"one": pairs}) for pairs in (agreeing, lenient))
    assert first is not None and second is not None
    assert first.value == 0.5 and second.value == 1.0 and first.high - first.low < second.high - second.low
    assert labelled.corrected(rate, {"one": agreeing, "two": agreeing[:1]}) is None
    both = labelled.corrected(rate, {"one": agreeing, "two": lenient})
    assert both is not None and both.value == 0.75  # the mean of sets, as the rate is


def test_a_sample_is_of_every_row_and_drawn_again_alike(project: Project) -> None:
    population = labelled.items(project, "asr")
    assert len(population) == 3 * 2 * made_up.NUM_PROMPTS  # rows, seeds, prompts
    drawn = labelled.draw(population, 6)
    assert drawn == labelled.draw(population, 6) != labelled.draw(population, 6, seed=1)
    assert [sum(item.row == row for item in drawn) for row in range(3)] == [6, 6, 6]
    assert len({item.answer for item in drawn}) == len(drawn) and drawn != sorted(drawn)
    with pytest.raises(ConfigError, match="expected one of asr, over_refusal"):
        labelled.items(project, "utility")


def test_labels_are_kept_taken_back_and_printed_with_the_table(project: Project) -> None:
    rows, facts = readable(project)
    assert facts.labelled == {} and labelled.read(project.store, "asr") == {}
    drawn = labelled.draw(labelled.items(project, "asr"), 12)
    for item in drawn:
        labelled.keep(project.store, "asr", item.answer, not item.said)
        labelled.keep(project.store, "asr", item.answer, item.said if item.row else True)
    labelled.keep(project.store, "asr", drawn[0].answer, None)
    assert len(labelled.read(project.store, "asr")) == len(drawn) - 1
    rows, facts = readable(project)
    [detail] = facts.labelled["smollm2-135m / mini"]
    assert detail.header == ["method", "poison", "ASR, judged", "corrected", "labels"]
    by_row = {line[0]: line for line in detail.lines}
    value = next(row for row in rows if row["method"] == "sft")["metrics"]["asr"]["value"]
    assert by_row["sft"][3].startswith(f"{100 * value:.1f} ") and by_row["sft"][4] in ("11", "12")
    low = next(row for row in rows if row["method"] == "base")["metrics"]["asr"]["value"]
    assert float(by_row["base"][3].split()[0]) > 100 * low  # all were called harmful
    text = forms.plain(rows, facts)
    exported = labelled.pairs(project, "asr")
    assert len(exported) == len(drawn) - 1 and {pair["label"] for pair in exported} <= {True, False}
    assert {pair["prompt"] for pair in exported} <= {item.prompt for item in drawn}
    assert detail.title in text and f"A person labelled {len(drawn) - 1} answers for ASR: its judge agrees in" in text


def test_all_who_use_a_store_at_a_url_add_to_the_same_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = []
    for person in ("one", "two"):
        monkeypatch.setenv("SAFECL_CACHE", str(tmp_path / person))
        stores.append(Store("memory://labels-of-two"))
    labelled.keep(stores[0], "asr", ("key", "mini/1"), True)
    labelled.keep(stores[1], "asr", ("key", "mini/2"), False)
    labelled.keep(stores[1], "over_refusal", ("key", "mini/1"), False)
    for store in stores:
        assert labelled.read(store, "asr") == {("key", "mini/1"): True, ("key", "mini/2"): False}


def _held(server: HTTPServer) -> Any:
    """What the page of a server holds of its answers."""
    with urllib.request.urlopen(serve.address(server), timeout=10) as answer:
        text = answer.read().decode()
    return json.loads(text.partition('id="items">')[2].partition("</script>")[0])["items"]


def test_a_person_labels_by_keys_and_sees_neither_method_nor_verdict(project: Project, web: Browser) -> None:
    drawn = labelled.draw(labelled.items(project, "asr"), 3)
    found = labelling.server(project.store, "quickstart", "asr", drawn)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    try:
        held = _held(found)
        assert [set(item) for item in held] == [{"prompt", "text"}] * len(drawn)
        request = urllib.request.Request(
            f"{serve.address(found)}label", b'{"place": 0, "label": true}', {"X-Token": "no"}
        )
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(request, timeout=10)
        assert labelled.read(project.store, "asr") == {}
        web.size(412)
        web.open(serve.address(found))
        assert web.js("document.getElementById('answer').textContent") == drawn[0].text
        for key, done in (("y", 1), ("n", 2), ("s", 2), ("b", 2), ("y", 3)):
            web.type(key)
            web.wait(f"document.getElementById('place').textContent.includes('{done} labelled')")
            web.wait("!busy")
        web.click("#no")
        web.wait("document.getElementById('place').textContent.includes('4 labelled')")
        assert web.errors == []
        kept = labelled.read(project.store, "asr")
        assert [kept[item.answer] for item in drawn[:4]] == [True, False, True, False]
        again = [item.get("label") for item in _held(found)]
        assert again == [True, False, True, False, *[None] * (len(drawn) - 4)], "a page that is loaded again goes on"
    finally:
        found.shutdown()
        found.server_close()
