"""Reading a large sweep: python benchmarks/review.py

A made-up store of 500 search trials (10 searched rows of 50) and 36 final trials of 3 seeds, 200 prompts a set: how long
`safecl report` takes, how large its page is, and how long a headless Chromium takes to open it (loaded, and until its first
screen of charts is drawn). `--quick`: 20 trials and 20 prompts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

import _bench

sys.path.insert(0, str(Path(__file__).parents[1]))

from safecl import overview
from safecl.project import Project, load
from safecl.report import serve
from tests import made_up

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"
WEIGHT = "search: {weight: {low: 0.1, high: 30.0}, memory_size: [10, 20]}"
METHODS = [f"{{name: {name}, config: {{memory_size: 20}}, {WEIGHT}}}" for name in ("der", "kl", "replay")]
METHODS += [f"{{name: {name}, search: {{weight: {{low: 0.1, high: 30.0}}}}}}" for name in ("ewc", "lwf")]


def project(root: Path, trials: int) -> Project:
    """The sweep."""
    settings = [
        f"methods=[{{name: sft}}, {', '.join(METHODS)}]",
        f"search.trials={trials // 10}",
        "search.sampler=random",
    ]
    settings += ["seeds=[0, 1, 2]", "models.0.dtype=float32", "evaluate.judges.asr=keywords", f"execution.root={root}"]
    return Project(load(QUICKSTART, settings))


def made(root: Path, trials: int) -> Project:
    """The store, opened to be read."""
    found = project(root, trials)
    made_up.search(found)
    made_up.finish(found)
    return Project(found.sweep, reads=True)


def opened(folder: Path) -> tuple[float, float, float]:
    """Seconds until the page is loaded, until charts on its first screen are drawn, and until an answer is shown after a
    click on a number; as a reader of `safecl view`."""
    from tests.browser import browser

    found = serve.server(folder)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    try:
        with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as web:
            web.size(1400)
            start = time.monotonic()
            loaded = web.open(f"{serve.address(found)}index.html")
            web.wait("document.querySelectorAll('.chart svg.marks').length > 0")
            drawn = time.monotonic() - start
            start = time.monotonic()
            web.click("table.main tbody td[data-c='2'] a")
            web.wait("document.querySelectorAll('article').length > 0")
            return loaded, drawn, time.monotonic() - start
    finally:
        found.shutdown()
        found.server_close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    trials, made_up.NUM_PROMPTS = (20, 20) if quick else (500, 200)
    with tempfile.TemporaryDirectory() as name:
        start = time.monotonic()
        project = made(Path(name) / "runs", trials)
        print(f"store made in {time.monotonic() - start:.1f} s", flush=True)
        start, cpu = time.monotonic(), time.process_time()
        page = overview.write_report(project, Path(name) / "report")
        report, report_cpu = time.monotonic() - start, time.process_time() - cpu
        files = sorted((page.parent / "answers").glob("*.json"))
        loaded, drawn, answered = opened(page.parent)
        numbers = {
            f"{trials} trials, 3 seeds, {made_up.NUM_PROMPTS} prompts a set": {
                "report, s": report,
                "report, CPU s": report_cpu,
                "page, MB": page.stat().st_size / 1e6,
                "answers, files": len(files),
                "answers, MB": sum(file.stat().st_size for file in files) / 1e6,
                "loaded, s": loaded,
                "charts drawn, s": drawn,
                "click to answers, s": answered,
            }
        }
    print(numbers)
    if not quick:
        _bench.write("review", numbers)


if __name__ == "__main__":
    main()
