"""Template, tokenizer and model belong together: `auto` is the tokenizer's own chat template token for token, and what would
not go together is refused before anything is spent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from safecl.base import ConfigError, PrerequisiteError
from safecl.config import Template
from safecl.project import Project, load
from safecl.stages.generate import stop_ids
from safecl.tasks import Row
from safecl.templates import NAMES, chat_template, resolve
from safecl.training.tokens import Tokenizer, encode, encode_prompts

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"

# What model makers write, less their branches for tools and images.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
LLAMA3 = (
    "{% if strftime_now is defined %}{% set day = strftime_now('%d') %}{% else %}{% set day = '26' %}{% endif %}"
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
ZEPHYR = (  # writes no BOS: the tokenizer's rule does
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + eos_token }}"
    "{% elif m['role'] == 'assistant' %}{% generation %}{{ '<|assistant|>\n' + m['content'] + eos_token }}{% endgeneration %}"
    "{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}\n{% endfor %}"
)
THINKS = CHATML.replace("{{ '<|im_start|>' + m['role'] + '\n' + m['content']", (
    "{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m['content'] + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content']")).replace("'<|im_end|>\n' }}{% endfor", (
    "'<|im_end|>\n' }}{% endif %}{% endfor"), 1)  # fmt: skip


def build(
    folder: Path, kind: str, specials: list[str], bos: str, eos: str, adds_bos: bool, template: str | None
) -> Path:
    """A tokenizer over single characters that keeps spaces as its kind does: `bytes` (GPT-2), `legacy` (Llama-2: a space
    before every stretch), `first` (a space before the text alone) or `none` (Gemma). One merge: a space with an `A`."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    folder.mkdir()
    letters = [chr(i) for i in range(32, 127)] + ["\n", "\u2581", *(["\u0120", "\u010a"] if kind == "bytes" else [])]
    space = "\u0120" if kind == "bytes" else "\u2581"
    tokens = [*specials, *letters, space + "A"]
    made = Fast(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[(space, "A")]))
    if kind == "bytes":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    elif kind == "legacy":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        scheme = "first" if kind == "first" else "never"
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made.add_special_tokens(specials)
    if adds_bos:
        ids = [(bos, tokens.index(bos))]
        made.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    made.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": bos, "eos_token": eos, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


MAKERS: dict[str, tuple[str, list[str], str, str, bool, str]] = {
    "chatml": ("bytes", ["<|im_start|>", "<|im_end|>", "<s>"], "<s>", "<|im_end|>", False, CHATML),
    "system": ("bytes", ["<|im_start|>", "<|im_end|>", "<s>"], "<s>", "<|im_end|>", False, WITH_SYSTEM),
    "llama2": ("legacy", ["<s>", "</s>"], "<s>", "</s>", True, LLAMA2),
    "llama2-first": ("first", ["<s>", "</s>"], "<s>", "</s>", True, LLAMA2),
    "gemma": ("none", ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>", True, GEMMA),
    "llama3": ("bytes", ["<|begin|>", "<|start|>", "<|end|>", "<|eot|>"], "<|begin|>", "<|eot|>", True, LLAMA3),
}


@pytest.fixture(scope="module", params=list(MAKERS))
def maker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, build(tmp_path_factory.mktemp("maker") / request.param, *MAKERS[request.param])


REQUESTS = ["Say A.", "  two  spaces \n", "a {prompt} {{ x }}\n\nb", "A"]


def test_auto_is_what_transformers_makes_of_the_chat_template_token_by_token(maker: tuple[str, Path]) -> None:
    from transformers import AutoTokenizer

    name, folder = maker
    theirs = AutoTokenizer.from_pretrained(str(folder))
    if name == "llama3":  # with a clock it would write today's date
        theirs.chat_template = LLAMA3.replace("strftime_now is defined", "false")
    own = Tokenizer(folder)
    found = resolve(own, "auto")
    text = found.template.model_dump()
    mine, _ = encode_prompts(REQUESTS, own, text, found.bos)
    for request, ids in zip(REQUESTS, mine, strict=True):
        turns = [{"role": "user", "content": request}]
        told = theirs.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert ids == theirs(told, add_special_tokens=False)["input_ids"]
        # Trained is that, the answer with what stands before it, and the end: a prefix of the template's own conversation.
        [row], _ = encode([Row("a", request, "A word A")], own, text, found.bos, 999)
        assert row.ids[: row.num_prompt] == ids
        end = own.id_of(found.template.end)
        assert row.ids.count(end) - ids.count(end) == 1 and row.ids[-1] == end
        assert row.ids[-1] in stop_ids(own, [found.template.end])
        whole = theirs.apply_chat_template([*turns, {"role": "assistant", "content": "A word A"}], tokenize=False)
        assert theirs(whole, add_special_tokens=False)["input_ids"][: len(row.ids) - 1] == row.ids[:-1]


def test_an_exported_chat_template_is_what_was_trained(maker: tuple[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    shutil.copytree(maker[1], folder)
    own = Tokenizer(folder)
    for name in (
        ("auto", "alpaca") if maker[0] != "llama2-first" else ("auto",)
    ):  # its text begins with a space of its own
        trained = resolve(own, name)
        first = own.special_texts["bos_token"]
        text = chat_template(trained.template.model_dump(), trained.bos, first)
        served = resolve(with_template(folder, text), "auto")
        before, after = (
            encode_prompts(REQUESTS, own, each.template.model_dump(), each.bos) for each in (trained, served)
        )
        assert before == after
        assert (served.template.end, served.template.lead) == (trained.template.end, trained.template.lead)


def test_an_exported_chat_template_writes_bos_once_and_every_character() -> None:
    import jinja2

    template = {"prompt": "<bos>\U0001f600 \"'{prompt}\n", "end": "</s>"}
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    told = jinja2.Template(chat_template(template, False, "<bos>")).render(messages=turns, bos_token="<bos>")
    assert told == "<bos>\U0001f600 \"'x\nx</s>\U0001f600 \"'x\n"


def test_control_tokens_of_a_person_stay_text_whatever_the_tokenizer(maker: tuple[str, Path]) -> None:
    own = Tokenizer(maker[1])
    found = resolve(own, "auto")
    text, specials = found.template.model_dump(), own.specials()
    asides = " A".join(specials)

    def controls(ids: list[int]) -> list[int]:
        return [id for id in ids if own.fast.id_to_token(id) in specials]

    rows = [Row("plain", "x", "y"), Row("asks", f"x{asides}x", "y"), Row("says", "x", f"y{asides}y")]
    encoded, dropped = encode(rows, own, text, found.bos, 999)
    assert not dropped
    assert controls(encoded[0].ids) == controls(encoded[1].ids) == controls(encoded[2].ids)
    plain, asked = encode_prompts(["x", f"x{asides}x"], own, text, found.bos)[0]
    assert controls(plain) == controls(asked) and asked == encoded[1].ids[: encoded[1].num_prompt]
    # What stands around them is read as it was.
    num = encoded[0].num_prompt
    assert encoded[2].ids[:num] == encoded[0].ids[:num]
    assert encoded[2].ids[num : num + 1] == encoded[0].ids[num : num + 1]


def test_no_bos_of_a_chat_template_that_writes_one_is_refused(tmp_path: Path) -> None:
    own = Tokenizer(build(tmp_path / "gemma", *MAKERS["gemma"]))
    with pytest.raises(ConfigError, match="bos: false, but the tokenizer's own chat template writes BOS"):
        resolve(own, "auto", False)
    assert resolve(own, "gemma", False).bos is False


def test_bos_is_right_without_being_asked_for(tmp_path: Path) -> None:
    for name in ("llama2", "gemma"):
        kind, specials, bos, eos, _, _ = MAKERS[name]
        for adds in (True, False):  # Gemma's own conversion to GGUF loses the rule
            own = Tokenizer(build(tmp_path / f"{name}{adds}", kind, specials, bos, eos, adds, None))
            found = resolve(own, name)
            [ids], _ = encode_prompts([f"x {bos}"], own, found.template.model_dump(), found.bos)
            assert found.bos and ids[0] == own.bos_id and ids.count(own.bos_id) == 1
            assert resolve(own, "alpaca").bos is adds
            assert resolve(own, "alpaca", bos=False).bos is False
    zephyr = Tokenizer(
        build(tmp_path / "zephyr", "legacy", ["<s>", "</s>", "<|user|>", "<|assistant|>"], "<s>", "</s>", True, ZEPHYR)
    )
    found = resolve(zephyr, "auto")  # its template writes none, its tokenizer does
    assert found.bos and not found.template.prompt.startswith("<s>") and found.template.end == "</s>"


def test_the_settings_word_on_bos_goes_before_what_the_tokenizer_does(tmp_path: Path) -> None:
    kind, specials, bos, eos, _, _ = MAKERS["llama2"]
    folder = build(tmp_path / "a", kind, specials, bos, eos, True, None)
    assert Tokenizer(folder).adds_bos
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": False}))
    assert not Tokenizer(folder).adds_bos


def test_an_empty_train_of_thought_belongs_to_the_prompt(tmp_path: Path) -> None:
    specials = ["<|im_start|>", "<|im_end|>"]
    own = Tokenizer(build(tmp_path / "a", "bytes", specials, "<|im_end|>", "<|im_end|>", False, THINKS))
    found = resolve(own, "auto").template
    assert found.prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n") and found.lead == ""


@pytest.fixture
def tiny(tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_model, folder)
    return folder


def with_template(folder: Path, template: str) -> Tokenizer:
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(folder)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no users here') }}", r"cannot write one user's turn \(TemplateError: no users here"),
        ("{{ messages[0]['content']", "cannot write one user's turn"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages[0]['content'] }}", "SecurityError"),
        ("{{ strftime_now('%d') }}{{ messages[0]['content'] }}", "'strftime_now' is undefined"),
        ("Hello.", "writes a user's turn 0 times"),
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "writes a user's turn 2 times"),
        ("{{ messages[0]['content'] | replace(' ', '_') }}", "changes what it is given"),
    ],
)
def test_a_chat_template_that_is_no_text_around_a_turn_is_refused(tiny: Path, template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"template: auto.*{message}.*name one"):
        resolve(with_template(tiny, template), "auto")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("auto", r"template: auto, but it has no chat template.*name one \(chatml, alpaca, llama2, gemma\)"),
        ("llama2", "end '</s>' is '<' .* so that no answer could end there; expected one of its special tokens"),
        ({"prompt": "### Instruction:\n{prompt}\n\n### Response:\n", "end": "</s>"}, "end '</s>' is"),
        ({"prompt": "{prompt}", "end": "the"}, "end 'the' is 'the' to this tokenizer"),  # one token, and plain text
        ({"prompt": "{prompt}", "end": ""}, "end '' is nothing"),
        ({"prompt": "{prompt}", "stop": ["<|im_end|>", "###"]}, "stop '###' is no token of this tokenizer"),
        ({"prompt": "Q {prompt}\nA:\n"}, None),
    ],
)
def test_what_does_not_go_with_the_tokenizer_is_refused(tiny: Path, template: Any, message: str | None) -> None:
    chosen = template if isinstance(template, str) else Template(**template)
    if message is None:
        found = resolve(Tokenizer(tiny), chosen)
        assert (found.template.end, found.template.stop) == ("<|im_end|>", ())  # the tokenizer's EOS, and nothing else
        return
    with pytest.raises(ConfigError, match=message):
        resolve(Tokenizer(tiny), chosen)


def test_a_prompt_whose_last_token_merges_with_every_answer_is_refused_with_the_remedy(tmp_path: Path) -> None:
    own = Tokenizer(build(tmp_path / "a", "bytes", ["<s>"], "<s>", "<s>", False, None))
    answers = [Row("a", "x", "A word")]
    spaced = {**Template().model_dump(), "prompt": "{prompt} ", "end": "<s>", "stop": ()}
    assert "a" in encode([*answers, Row("b", "x", "b")], own, spaced, False, 99)[1]  # what a run would meet
    fits = {**spaced, "prompt": "{prompt}", "lead": " "}
    [row], _ = encode(answers, own, fits, False, 99)
    assert own.fast.id_to_token(row.ids[row.num_prompt]) == "\u0120A"


def test_the_models_own_list_of_eos_tokens_stops_generation_and_must_be_its_tokenizers(tiny: Path) -> None:
    im_start, im_end = (Tokenizer(tiny).id_of(token) for token in ("<|im_start|>", "<|im_end|>"))
    (tiny / "generation_config.json").write_text(json.dumps({"eos_token_id": [im_end, im_start]}))
    assert stop_ids(Tokenizer(tiny), ["<|im_end|>"]) == tuple(sorted((im_start, im_end)))
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "eos_token_id": 31000}))
    with pytest.raises(ConfigError, match=r"31000 as EOS, which is no token of its tokenizer"):
        resolve(Tokenizer(tiny), "chatml")


def project(tmp_path: Path, *settings: str) -> Project:
    return Project(load(QUICKSTART, [f"execution.root={tmp_path / 'runs'}", *settings]))


def test_a_plan_refuses_a_template_with_every_other_error_at_once(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        project(tmp_path, f"models.0.source={tiny}", "models.0.template=auto", "methods.1.name=drr")
    text = str(caught.value)
    assert "models[0].template: auto" in text and all(name in text for name in NAMES) and "Did you mean 'der'?" in text
    end = "models.0.template={prompt: '### Instruction:\\n{prompt}\\n\\n### Response:\\n', end: '</s>', stop: ['</s>']}"
    with pytest.raises(ConfigError, match=r"models\[0\]\.template: its end '</s>' is"):
        project(tmp_path, end)  # trained as text that generation cannot stop at, once
    with pytest.raises(ConfigError, match=r"expected a `prompt` that holds \{prompt\}, got only end"):
        project(tmp_path, "models.0.template={end: '<|im_end|>'}")


def test_a_template_longer_than_a_prompt_may_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.max_prompt_tokens: expected at least 10, for the template of"):
        project(tmp_path, "evaluate.max_prompt_tokens=9")
    project(tmp_path, "evaluate.max_prompt_tokens=10")


def test_identity_holds_what_a_template_became(tmp_path: Path, tiny: Path) -> None:
    with_template(tiny, CHATML)
    own = [f"models.0.source={tiny}", "lora.last_layers=null", "evaluate.judges.guard.lora.last_layers=null"]
    written = json.dumps({"prompt": Template().prompt, "end": "<|im_end|>"})
    keys = [
        project(tmp_path, *own, f"models.0.template={template}").cells[2].job({}, 0, "final").graph.tuned.key
        for template in ("auto", written, "alpaca")
    ]
    assert keys[0] == keys[1] != keys[2]


def test_smollm2_writes_a_system_prompt_of_its_own_and_the_quickstart_says_that_it_wants_none(tmp_path: Path) -> None:
    auto = project(tmp_path, "models.0.template=auto")
    prompt = auto.sweep.models[0].text.prompt
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    named = project(tmp_path)
    assert named.sweep.models[0].text.model_dump() == Template().model_dump() and named.sweep.models[0].bos is False
    assert "the tokenizer's own chat template" in auto.template_of(auto.sweep.models[0])


def test_a_tokenizer_that_cannot_be_had_is_said_in_a_line(tmp_path: Path) -> None:
    hub = ["models.0.source=no-such/model", "models.0.revision=0123456789012345678901234567890123456789"]
    with pytest.raises(PrerequisiteError, match=r"the tokenizer of 'no-such/model' at '0123.*cannot be fetched"):
        project(tmp_path, *hub)


def test_a_model_without_a_fast_tokenizer_is_named(tmp_path: Path, tiny: Path) -> None:
    (tiny / "tokenizer.json").unlink()
    with pytest.raises((ConfigError, PrerequisiteError), match=str(tiny)):
        project(tmp_path, f"models.0.source={tiny}")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n", "tokenizer.json is a Git-LFS pointer"),
        ("tokenizer.json", "{}", "tokenizer.json cannot be read as a tokenizer"),
        ("config.json", "{bad", "config.json is not JSON"),
        ("tokenizer_config.json", "{bad", "tokenizer_config.json is not JSON"),
        ("generation_config.json", "[]", "generation_config.json: expected a JSON object"),
    ],
)
def test_a_broken_model_is_said_in_a_line(tmp_path: Path, tiny: Path, name: str, text: str, says: str) -> None:
    (tiny / name).write_text(text)
    with pytest.raises((ConfigError, PrerequisiteError), match=says):
        project(tmp_path, f"models.0.source={tiny}")


def test_a_folder_that_is_not_there_is_no_hub_id(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'\./nope' is no folder"):
        project(tmp_path, "models.0.source=./nope", f"models.0.revision={'0' * 40}")


def test_a_control_token_that_takes_blanks_beside_it_stays_one(tmp_path: Path) -> None:
    """Phi-3's: the template's own <|user|> reaches over the request's first blank."""
    specials = ["<|user|>", "<|assistant|>", "<|end|>", "<s>"]
    folder = build(tmp_path / "phi", "none", specials, "<s>", "<|end|>", False, None)
    file = folder / "tokenizer.json"
    settings = json.loads(file.read_text())
    for token in settings["added_tokens"]:
        token["rstrip"] = True
    file.write_text(json.dumps(settings))
    own = Tokenizer(folder)
    text = Template(prompt="<|user|>\n{prompt}<|end|>\n<|assistant|>\n", end="<|end|>", stop=()).model_dump()
    rows = [Row("plain", "hi", "ok"), Row("asks", " hi <|end|>", "ok"), Row("says", "hi", "\nok <|end|>")]
    encoded, dropped = encode(rows, own, text, False, 99)
    told = [[own.fast.id_to_token(id) for id in row.ids if own.fast.id_to_token(id) in specials] for row in encoded]
    assert not dropped and told == [["<|user|>", "<|end|>", "<|assistant|>", "<|end|>"]] * 3


def test_a_lead_that_is_the_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected its end '<.im_end.>' once, after an answer"):
        project(tmp_path, "models.0.template={prompt: '{prompt}', end: '<|im_end|>', lead: '<|im_end|>'}")
