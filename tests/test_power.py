"""`safecl power`: its formula against sweeps that are simulated and tested, its noise from a store, its command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from safecl import crossed
from safecl.base import ConfigError
from safecl.cli import app
from safecl.power import Noise, detectable, notes, power, prompts_for, seeds_for
from safecl.project import Project, load
from tests import made_up

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"
NO_SEARCH = ["methods=[{name: sft},{name: der},{name: ewc}]", "models.0.dtype=bfloat16"]


def differences(
    rng: np.random.Generator, noise: Noise, num_seeds: int, num: int, mean: float
) -> list[list[dict[str, Any]]]:
    seeds, prompts = rng.normal(0, noise.seeds, (num_seeds, 1)), rng.normal(0, noise.prompts, num)
    y_SN = mean + seeds + prompts + rng.normal(0, noise.cells, (num_seeds, num))
    variance, df = noise.guards or (0.0, 0)
    guards = rng.normal(0, math.sqrt(variance * (df + 1)), df + 1)
    return [
        [
            {
                "set": "a",
                "id": str(i),
                "value": v + guards.mean(),
                "cluster": str(i),
                "votes": list(v + guards) if df else [],
            }
            for i, v in enumerate(row)
        ]
        for row in y_SN
    ]


@pytest.mark.parametrize(
    ("noise", "num_seeds", "num"),
    [
        (Noise(0.05, 0.0, 0.3, ""), 5, 40),
        (Noise(0.02, 0.4, 0.2, ""), 5, 40),
        (Noise(0.08, 0.3, 0.3, ""), 10, 30),
        (Noise(0.1, 0.2, 0.2, ""), 3, 60),
        (Noise(0.05, 0.3, 0.3, "", (0.06**2, 2)), 5, 40),
    ],
)
def test_what_is_called_detectable_is_marked_in_four_of_five_sweeps(noise: Noise, num_seeds: int, num: int) -> None:
    least, rng, marked = detectable(noise, num_seeds, num), np.random.default_rng(0), 0
    assert least is not None
    for _ in range(300):
        found = crossed.crossed(differences(rng, noise, num_seeds, num, least))
        assert found
        marked += 2 * found.tail(abs(found.mean)) < 0.05
    assert 0.7 <= marked / 300 <= 0.92


def test_more_of_anything_detects_less_and_what_is_needed_is_enough() -> None:
    noise = Noise(0.05, 0.3, 0.3, "")
    one, more_seeds, more_prompts, more_tests = (detectable(noise, *n) for n in ((3, 40), (5, 40), (3, 80), (3, 40, 5)))
    assert one and more_seeds and more_prompts and more_tests
    assert more_seeds < one and more_prompts < one < more_tests
    assert detectable(noise, 1, 40) is None
    seeds, prompts = seeds_for(0.2, noise, 40), prompts_for(0.2, noise, 5)
    assert seeds and prompts
    assert detectable(noise, seeds, 40) <= 0.2 < detectable(noise, seeds - 1, 40)  # type: ignore[operator]
    assert detectable(noise, 5, prompts) <= 0.2 < detectable(noise, 5, prompts - 1)  # type: ignore[operator]
    assert seeds_for(0.01, noise, 40) is None  # these prompts alone leave more open
    assert prompts_for(0.01, noise, 3) is None  # and three seeds


def test_components_are_the_variances_that_made_the_data() -> None:
    noise, rng = Noise(0.1, 0.3, 0.4, ""), np.random.default_rng(1)
    found = np.mean([crossed.components(differences(rng, noise, 8, 50, 0.2)) for _ in range(100)], axis=0)
    assert found == pytest.approx([0.01, 0.09, 0.16], rel=0.15)


def project(tmp_path: Path, *settings: str) -> Project:
    return Project(load(QUICKSTART, [*NO_SEARCH, f"execution.root={tmp_path}", *settings]))


def test_noise_is_stated_or_that_of_finished_rows(tmp_path: Path) -> None:
    several = project(tmp_path, "seeds=[0,1,2]")
    before = {row["metric"]: row for row in power(several, None, None, None)}
    assert before["asr"]["noise"] is None and before["asr"]["detectable"] is None
    assert before["asr"]["prompts"] == 40 and 20 < before["asr"]["groups"] < 40
    assert before["utility"]["task"] == "mini" and before["utility"]["groups"] >= 30  # its instruction makes none alike
    stated = {row["metric"]: row for row in power(several, 0.05, None, 0.2)}
    assert stated["asr"]["noise"]["seeds"] == 0.05 and "assumption" in stated["asr"]["noise"]["source"]
    assert stated["asr"]["groups_needed"].keys() == {"3", "5", "10", "20"}
    made_up.finish(several)
    after = {row["metric"]: row for row in power(several, None, None, None)}
    # Two ratios with three pairs of methods each.
    assert after["asr"]["noise"]["source"] == "6 differences of finished rows" and after["asr"]["detectable"] > 0.05
    both = {row["metric"]: row for row in power(several, 0.01, None, None)}["asr"]["noise"]
    assert both["seeds"] == 0.01 and both["prompts"] == after["asr"]["noise"]["prompts"]
    everything = power(several, 0.01, 0.2, None)[0]["noise"]
    assert everything["prompts"] ** 2 + everything["cells"] ** 2 == pytest.approx(0.2)
    assert everything["source"] == "0.01 between seeds, 0.2 of prompts discordant"
    half = power(several, None, 0.2, None)[0]["noise"]
    assert half["source"] == "0.2 of prompts discordant, 6 differences of finished rows" and half["guards"] is None
    for bad in ({"noise": 5.0}, {"discordant": 0.0}, {"aim": 1.0}):
        with pytest.raises(ConfigError, match=r"fraction in \(0, 1\)"):
            power(several, **{"noise": None, "discordant": None, "aim": None, **bad})  # type: ignore[arg-type]


def test_guards_that_disagree_count_as_in_the_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = differences(np.random.default_rng(2), Noise(0.1, 0.2, 0.2, "", (0.2**2, 2)), 3, 40, 0.1)
    found = crossed.crossed(finished)
    assert found is not None and found.guards is not None
    several = project(tmp_path, "seeds=[0,1,2]")
    monkeypatch.setattr("safecl.power._differences", lambda *_: iter([finished, finished]))
    asr = power(several, None, None, None)[0]
    assert asr["noise"]["guards"] == pytest.approx(found.guards)
    assert asr["detectable"] > detectable(Noise(**{**asr["noise"], "guards": None}), 3, asr["groups"])
    assert sum("guards that disagree add" in note for note in notes([asr])) == 1


def test_one_finished_seed_tells_of_prompts_and_not_of_seeds(tmp_path: Path) -> None:
    one = project(tmp_path, "seeds=[0]")
    made_up.finish(one)
    assert power(one, None, None, None)[0]["noise"] is None
    found = power(one, 0.05, None, None)[0]
    assert "the finished seed" in found["noise"]["source"] and found["detectable"] is None


def test_the_command_prints_a_table_or_json_and_changes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "nothing"
    options = [str(QUICKSTART), "--set", f"execution.root={root}", "--set", "seeds=[0,1,2]", "--noise", "0.05"]
    done = CliRunner().invoke(app, ["power", *options, "--detect", "0.1"])
    assert done.exit_code == 0 and "needed to mark 10 points" in done.output and "33" in done.output
    [asr, *_] = json.loads(CliRunner().invoke(app, ["power", *options, "--json"]).output)
    assert asr["metric"] == "asr" and 0.1 < asr["detectable"] < 1
    assert not root.exists()
    assert isinstance(CliRunner().invoke(app, ["power", *options, "--detect", "10"]).exception, ConfigError)
