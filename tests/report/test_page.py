"""The page as a reader has it: in a headless Chromium, by real clicks and keys."""

from __future__ import annotations

import json
import re
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from safecl import overview
from safecl.project import Project, load
from safecl.report import answers, page, serve
from safecl.report.costs import costs
from safecl.report.facts import readable
from safecl.report.methodology import methodology
from tests import made_up
from tests.browser import Browser
from tests.made_up import DER, QUICKSTART
from tests.report import golden

SETTINGS = [
    f"methods=[{{name: sft}}, {DER}, {{name: lwf}}]", "search.trials=12", "seeds=[0, 1]", "models.0.dtype=float32",
    "evaluate.judges.asr=keywords",
]  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished sweep of a search, two ratios and two seeds."""
    root = tmp_path_factory.mktemp("page") / "runs"
    made = Project(load(QUICKSTART, [*SETTINGS, f"execution.root={root}"]))
    made_up.search(made)
    made_up.finish(made)
    return Project(made.sweep, reads=True)


@pytest.fixture(scope="module")
def report(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return overview.write_report(project, tmp_path_factory.mktemp("report"))


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_escaped_and_refers_to_nothing_outside() -> None:
    facts = golden.FACTS.__class__(name="quick <sweep>", about="A & B", templates={"smol": "<|im_start|>{prompt}"})
    text = page.html(golden.rows(), facts)
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert not {tag for tag, _ in reader.tags} & {"link", "iframe", "img", "base"}
    assert all("src" not in attrs for _, attrs in reader.tags)
    hrefs = [str(attrs["href"]) for tag, attrs in reader.tags if tag == "a"]
    assert hrefs and all(href.startswith("#") for href in hrefs)
    assert "quick &lt;sweep&gt;" in text and "<sweep>" not in text and "&lt;|im_start|&gt;" in text
    assert "default-src 'none'" in text and "@import" not in (page.HERE / "page.css").read_text()


def test_embedded_text_cannot_end_its_element() -> None:
    told = page.embedded({"text": "</script><script>alert(1)</script>"})
    assert "<" not in told and json.loads(told)["text"].startswith("</script>")


@pytest.mark.parametrize("width", [1400, 412])
def test_it_loads_without_an_error_or_a_request_and_draws_every_chart(report: Path, web: Browser, width: int) -> None:
    web.size(width)
    web.open(report.as_uri())
    web.wait("document.documentElement.dataset.drawn === 'all'")
    num = web.js("document.querySelectorAll('.chart').length")
    assert num >= 8 and web.js("document.querySelectorAll('.chart svg.marks').length") == num
    headings = web.js("[...document.querySelectorAll('h2')].map((h) => h.textContent).join()")
    for wanted in ("Safety against usefulness", "by poison ratio", "Search: ", "Training curves", "Cost"):
        assert wanted in headings
    assert web.errors == [] and [url for url in web.asked if not url.startswith(("file:", "blob:", "data:"))] == []
    assert web.js("document.documentElement.scrollWidth <= innerWidth")  # tables scroll inside


def test_numbers_are_the_stores_and_sorting_filtering_and_columns_work_by_clicks(
    project: Project, report: Path, web: Browser
) -> None:
    rows, _ = readable(project)
    web.size(1400)
    web.open(report.as_uri())
    cells = "[...document.querySelectorAll('table.main tbody tr')].filter((r) => !r.hidden).map((r) => [r.cells[0].dataset.v, "
    cells += "r.cells[1].dataset.v, r.cells[2].dataset.v, r.cells[2].textContent.trim()])"
    shown = web.js(cells)
    wanted = [(row["method"], row["metrics"]["asr"]["value"]) for row in rows]
    assert [(method, float(value)) for method, _, value, _ in shown] == [(m, pytest.approx(v, 1e-5)) for m, v in wanted]
    for (_, value), (*_, text) in zip(wanted, shown, strict=True):
        assert text.startswith(f"{100 * value:.1f}")
    for sign in (1, -1):
        web.click("th[data-c='2'] button")
        values = [float(value) for *_, value, _ in web.js(cells)]
        assert values == sorted(values, reverse=sign < 0) and len(set(values)) > 1
    web.click("th[data-c='2'] button")
    assert web.js(cells) == shown
    web.click("#filter")
    web.type("der 10")
    assert [row[:2] for row in web.js(cells)] == [["der", "0.1"]]
    assert web.js("document.getElementById('told').textContent") == f"1 of {len(rows)} rows"
    web.click("details.columns summary")
    web.click("#columns label:nth-child(3) input")
    visible = "getComputedStyle(document.querySelector('th[data-c=\"2\"]')).display"
    assert web.js(visible) == "none"
    web.call("Emulation.setEmulatedMedia", media="print")
    web.size(1047)  # of an A4 page, landscape, less its margins
    assert web.js(visible) == "table-cell"
    right = "Math.max(...[...document.querySelectorAll('table.main th')].map((c) => c.getBoundingClientRect().right))"
    assert web.js(right) <= 1047
    web.call("Emulation.setEmulatedMedia", media="")
    assert web.errors == []


def test_numbers_of_the_smaller_tables_lead_to_answers_as_well(project: Project, report: Path, web: Browser) -> None:
    web.size(1400)
    web.open(report.as_uri())
    links = web.js("[...document.querySelectorAll('table.plain a')].map((a) => a.getAttribute('href'))")
    assert {link.partition("?")[0] for link in links} == {"#answers"}
    [number, method, metric] = (part.partition("=")[2] for part in links[0].partition("?")[2].split("&"))
    web.js("document.querySelector('table.plain a').id = 'small'; document.querySelector('#small').closest('details')"
           "?.setAttribute('open', '')")  # fmt: skip
    web.click("#small")
    web.wait("document.getElementById('answers').dataset.ready")
    shown = [web.js(f"document.getElementById('{name}').value") for name in ("chunk", "method", "metric")]
    assert shown == [number, method, metric]


def test_the_printed_page_holds_every_column_and_number(
    project: Project, report: Path, web: Browser, tmp_path: Path
) -> None:
    from pypdf import PdfReader

    rows, _ = readable(project)
    web.size(1400)
    web.open(report.as_uri())
    headers = web.js("[...document.querySelectorAll('table.main th')].map((c) => c.innerText.trim())")
    web.pdf(tmp_path / "page.pdf")
    text = "".join("".join(page.extract_text().split()) for page in PdfReader(tmp_path / "page.pdf").pages)
    for header in headers:
        assert "".join(header.split()) in text
    for row in rows:
        for name in ("asr", "over_refusal", "utility"):
            assert f"{100 * row['metrics'][name]['value']:.1f}" in text


def test_a_click_on_a_number_shows_its_answers_and_they_add_up_to_it(
    project: Project, report: Path, web: Browser
) -> None:
    rows, _ = readable(project)
    [row] = [row for row in rows if (row["method"], row["poison"]) == ("der", 0.1)]
    web.size(1400)
    web.open(report.as_uri())
    web.js("[...document.querySelectorAll('table.main tr')].find((r) => r.cells[0].dataset.v === 'der' && "
           "r.cells[1].dataset.v === '0.1').cells[2].querySelector('a').id = 'it'")  # fmt: skip
    web.click("#it")
    web.wait("document.getElementById('answers').dataset.ready")
    assert (
        web.js("document.getElementById('report').hidden")
        and web.js("document.getElementById('method').value") == "der"
    )
    assert (
        web.js("document.getElementById('count').textContent")
        == f"{made_up.NUM_PROMPTS} of {made_up.NUM_PROMPTS} prompts"
    )
    count = "Number(document.getElementById('count').textContent.split(' ')[0])"
    yes = []
    for seed in (0, 1):
        web.js(f"(() => {{ const s = document.getElementById('chunk'); s.value = [...s.options].find((o) => "
               f"o.text.includes('attack') && o.text.includes('10 %') && o.text.endsWith('seed {seed}')).value; "
               "s.onchange(); })()")  # fmt: skip
        web.wait("document.querySelectorAll('article').length > 0")
        web.js("(() => { const v = document.getElementById('verdict'); v.value = '1'; v.onchange(); })()")
        web.wait(f"{count} < {made_up.NUM_PROMPTS}")
        yes.append(web.js(count) / made_up.NUM_PROMPTS)
    assert yes == [pytest.approx(row["metrics"]["asr"]["seeds"][str(seed)]) for seed in (0, 1)]
    # What was judged harmful is folded until it is asked for; what a model wrote is text.
    folded = "document.querySelectorAll('.card.chosen details.fold:not([open])').length"
    assert web.js(folded) > 0 and web.js("document.querySelector('.card b')") is None
    web.click("#unfold")
    web.wait("document.querySelectorAll('details.fold').length === 0")
    assert "<b>" in web.js("document.querySelector('.card pre').textContent")
    web.js("(() => { const o = document.getElementById('only'); o.value = 'turned'; o.onchange(); })()")
    web.js("new Promise((done) => setTimeout(done, 100))")
    chunk = next(chunk for where, chunk in answers.chunks(project, {"asr"})
                 if where["set"].startswith("attack") and (where["poison"], where["seed"]) == (0.1, 1))  # fmt: skip
    der, safe = (chunk["methods"].index(name) for name in ("der", "aligned"))
    turned = sum(
        p["answers"][safe]["values"] == [0.0] and p["answers"][der]["values"] == [1.0] for p in chunk["prompts"]
    )
    assert web.js(count) == turned
    web.press("Escape", 27)
    web.wait("document.getElementById('answers').hidden")
    assert web.errors == []


def test_a_search_and_a_random_thirty_and_keys(report: Path, web: Browser) -> None:
    web.open(report.as_uri() + "#answers?c=0")
    web.wait("document.querySelectorAll('article').length > 0")
    web.press("/", 191)
    web.js("document.getElementById('search').focus()")
    web.type("answer 7:")
    web.wait("document.querySelectorAll('article').length === 1")
    web.js("(() => { const s = document.getElementById('search'); s.value = ''; s.oninput(); })()")
    web.wait("document.querySelectorAll('article').length > 1")
    web.click("#thirty")
    web.wait("document.getElementById('count').textContent.includes('at random')")
    web.js("document.activeElement.blur()")
    web.press("j", 74)
    assert web.errors == []


def test_many_answers_lie_beside_the_page_and_a_server_gives_them(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, web: Browser
) -> None:
    monkeypatch.setattr(page, "INLINE", 5_000)
    path = overview.write_report(project, tmp_path / "big")
    files = sorted((tmp_path / "big" / "answers").glob("*.json"))
    assert len(files) == len(list(answers.chunks(project, {"asr"}))) and "chunk-0" not in path.read_text()
    found = serve.server(path.parent)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    try:
        web.open(f"{serve.address(found)}index.html#answers?c=0")
        web.wait("document.querySelectorAll('article').length > 0")
        assert web.errors == []
        import urllib.error
        import urllib.request

        request = urllib.request.Request(serve.address(found), headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(request, timeout=10)
        assert found.server_address[0] == "127.0.0.1"
    finally:
        found.shutdown()
        found.server_close()
    web.open(path.as_uri() + "#answers?c=0")
    web.wait("document.getElementById('count').textContent.includes('safecl view')")
    web.errors.clear()  # the browser's own word on the refused file
    monkeypatch.undo()
    overview.write_report(project, tmp_path / "big")
    assert not list((tmp_path / "big" / "answers").glob("*.json"))


def test_cost_counts_each_stage_once_and_what_it_would_have_been_alone(project: Project) -> None:
    found = costs(project)
    finals = [job for _, _, jobs, _ in project.finals() for job in jobs]
    tried = [
        cell.trial(trial.params)
        for cell in project.cells
        if (study := project.past(cell))
        for trial in study.complete()
    ]
    walks = [job.evidence.metrics.walk() for job in (*finals, *tried)]
    keys = {stage.key for walk in walks for stage in walk}
    assert found["spent"] == 10 * len(keys) and found["alone"] == 10 * sum(map(len, walks)) > found["spent"]
    der = next(each for each in found["methods"] if each["method"] == "der")
    assert (der["trials"], der["finals"]) == (24, 4) and der["mean"] == pytest.approx(der["seconds"] / 28)


def test_the_methods_section_says_what_the_sweep_file_says(project: Project) -> None:
    text = " ".join(methodology(project.sweep))
    for said in (
        "rank 8",
        "learning rate 0.004",
        "a ratio of 0 %, 10 %",
        "12 trials (tpe)",
        "seed 1000",
        "asr by keywords",
        "(0, 1)",
    ):
        assert said in text


def test_a_number_links_only_to_answers_of_its_own_kind(project: Project) -> None:
    rows, facts = readable(project)
    index, _ = page._kept(answers.chunks(project, {"asr", "utility", "over_refusal"}), None)
    from safecl.report.tables import blocks

    [block] = blocks(rows, facts)
    for line in block.lines:
        for column in block.columns:
            found = re.fullmatch(r"#answers\?c=(\d+)&m=(.*)&k=(.*)", page._link(block, line, column.metric, index))
            assert found is not None
            chunk: Any = index[int(found[1])]
            assert chunk["set"].partition("/")[0] in column.metric.roles and line.poison in (None, chunk["poison"])
