"""Training and evaluation may put another text around a request than the alignment did (PTST, arXiv 2402.18540)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safecl.base import ConfigError
from safecl.dtypes import resolved
from safecl.grid import Cell, Job, cells
from safecl.project import Project, load
from safecl.templates import settle

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"
OWN = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
SAFETY = "<|im_start|>system\nRefuse what is harmful.<|im_end|>\n" + OWN
METHODS = "methods=[{name: sft}, {name: lwf}, {name: der, config: {memory_size: 20}}]"


def grid(folder: Path | None = None, /, **settings: str) -> dict[str, Cell]:
    given = [
        f"{key.replace('__', '.')}={json.dumps(value) if 'prompt' in value else value}"
        for key, value in settings.items()
    ]
    sweep = load(QUICKSTART, ["models.0.name=m", "poison.ratios=[0.1]", METHODS, *given])
    return {cell.label.rsplit(" / ", 1)[1]: cell for cell in cells(settle(resolved(sweep, "bfloat16")).sweep, folder)}


def final(cell: Cell) -> Job:
    return cell.job({}, 0, "final")


def prompts(job: Job, kind: str, **config: Any) -> set[str]:
    """The texts around requests in the stages of a kind."""
    stages: list[Any] = list(job.evidence.metrics.walk())
    return {
        stage.config["template"]["prompt"]
        for stage in stages
        if stage.kind == kind and all(stage.config.get(name) == value for name, value in config.items())
    }


def finetune_tokenizer(of: Any) -> Any:
    from safecl.training.tokens import Tokenizer, base_folder

    return Tokenizer(base_folder(of.model))


def test_the_models_own_text_leaves_every_key_as_it_is() -> None:
    plain, same = grid(), grid(evaluate__template=OWN, tasks__0__template=OWN)
    assert {name: final(cell).evidence.metrics.key for name, cell in plain.items()} == {
        name: final(cell).evidence.metrics.key for name, cell in same.items()
    }


def test_a_tasks_text_is_around_its_rows_wherever_they_are_read_and_nowhere_else() -> None:
    found = grid(tasks__0__template=SAFETY)
    lwf, der = final(found["lwf"]), final(found["der"])
    assert prompts(lwf, "finetune", method="lwf") == {SAFETY}
    assert prompts(lwf, "memory") == {SAFETY} and prompts(der, "memory") == {OWN}  # user rows; safety rows
    assert prompts(lwf, "generate") == {OWN}
    plain = final(grid()["der"])
    assert der.graph.theta_safe.key == plain.graph.theta_safe.key  # type: ignore[union-attr]
    assert der.graph.user_rows.config["fits"]["template"]["prompt"] == SAFETY  # type: ignore[call-overload, index]
    assert found["der"].key != grid()["der"].key


def test_rows_that_theta_safe_wrote_stay_in_its_own_text(tmp_path: Path) -> None:
    from safecl.stages import finetune
    from safecl.testing import world
    from safecl.training import batches

    methods = "[{name: grsap}]"
    plain, job = (
        final(grid(methods=methods, execution__engine_max_tokens="4096", **more)["grsap"])
        for more in ({}, {"tasks__0__template": SAFETY})
    )
    assert "replay_template" not in plain.graph.tuned.config
    told: Any = job.graph.tuned.config
    assert (told["template"]["prompt"], told["replay_template"]["prompt"]) == (SAFETY, OWN)
    of, config = world.a_world(), world.config("grsap")
    config |= {"template": told["template"] | {"end": "<|im_end|>"}, "replay_template": told["replay_template"]}
    run = finetune.make_run(config, of.inputs("grsap"), world.execution()).run
    tokenizer = finetune_tokenizer(of)
    for row in run.rows:
        text = tokenizer.fast.decode(row.ids, skip_special_tokens=False)
        assert text.startswith("<|im_start|>system") == row.row_id.startswith("user/")
    assert len(run.rows) == len(batches.read_rows(of.user)) + world.NUM_MEMORY


def test_evaluates_text_is_around_all_that_is_answered_and_nothing_is_trained_anew() -> None:
    found = grid(evaluate__template=SAFETY)
    for name in ("base", "aligned", "sft"):
        assert prompts(final(found[name]), "generate") == {SAFETY}
    job, plain = final(found["der"]), final(grid()["der"])
    assert job.graph.tuned.key == plain.graph.tuned.key and job.evidence.metrics.key != plain.evidence.metrics.key
    own = grid(evaluate__template=SAFETY, align__self_answered="[{task: mini, num_rows: 9}]")["sft"]
    answered = [s for s in final(own).graph.safety_rows.inputs.values() if s.kind == "generate"]
    assert [s.config["template"]["prompt"] for s in answered] == [OWN]  # type: ignore[call-overload, index]


def test_log_likelihoods_are_of_the_text_that_is_answered(tmp_path: Path) -> None:
    for name in ("sst2_train.jsonl", "sst2_validation.jsonl"):
        (tmp_path / name).write_text('{"sentence": "a film", "label": 1}\n')
    job = final(grid(tmp_path, evaluate__template=SAFETY, tasks__0__task="sst2")["sft"])
    assert prompts(job, "likelihood") == {SAFETY} and prompts(job, "finetune", method="sft") >= {OWN}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tasks.0.template='no place for it'", "tasks.0.template.*must hold {prompt} exactly once"),
        ("evaluate.template='{prompt} '", "evaluate.template: .*last token is another before an answer"),
        (f"evaluate.template={json.dumps('x ' * 300 + OWN)}", "max_prompt_tokens: expected at least"),
    ],
)
def test_a_text_that_does_not_go_with_the_model_is_refused(setting: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        Project(load(QUICKSTART, [setting, f"execution.root={tmp_path}"]))


def test_a_report_prints_the_texts_that_are_not_the_models_own() -> None:
    from safecl.report.facts import _texts

    assert _texts(load(QUICKSTART, [])) == {}
    found = _texts(load(QUICKSTART, [f"evaluate.template={json.dumps(SAFETY)}", f"tasks.0.template={json.dumps(OWN)}"]))
    assert found == {
        "text around requests of mini in training": repr(OWN),
        "text around requests in evaluation": repr(SAFETY),
    }
