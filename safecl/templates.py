"""Resolves `template: auto` and named templates with the model's tokenizer, before any identity is formed. Each
template is checked token by token against the tokenizer that it is used with.

`auto` is the text that the tokenizer's own chat template writes around a user's turn and before the assistant's answer.
It is found by rendering the chat template in Jinja's sandbox, without a clock. A template that writes today's date must
have a fixed date to use instead, or is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from safecl.base import ConfigError, PrerequisiteError
from safecl.check import folder_problems, source_problem
from safecl.config import Model, Named, Sweep, Template
from safecl.models import tokenizer_folder, tokenizer_stage
from safecl.tasks import Row

if TYPE_CHECKING:
    from safecl.training.tokens import Tokenizer

NAMES = get_args(Named)
CHOICES = f"name one ({', '.join(NAMES)}) or write it: template: {{prompt: '...{{prompt}}...', end: a special token}}"
# Placeholders for a request, an answer and a system prompt. No chat template writes these texts.
_ASKED, _ANSWERED, _SYSTEM = "Q7xQ", "A7xA", "S7xS"
_TURNS = ("user", "assistant")
_Render = Callable[[list[tuple[str, str]], bool], str]
_NAMED = {
    "chatml": Template(
        system="<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n", between="<|im_end|>\n<|im_start|>user\n"
    ),
    # Stanford Alpaca's train.py, PROMPT_DICT["prompt_no_input"].
    "alpaca": Template(
        prompt="Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{prompt}\n\n### Response:",
        end="",  # the tokenizer's EOS
        stop=(),
    ),
    # meta-llama's llama/generation.py: BOS, [INST] request [/INST], a space, the answer, EOS.
    "llama2": Template(
        prompt="[INST] {prompt} [/INST]", end="</s>", stop=(), lead=" ", strip=True,
        system="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n", between=" </s><s>[INST] ",
    ),
    # google/gemma's chat template.
    "gemma": Template(
        prompt="<start_of_turn>user\n{prompt}<end_of_turn>\n<start_of_turn>model\n", end="<end_of_turn>", stop=(), strip=True,
        between="<end_of_turn>\n<start_of_turn>user\n",
    ),
}  # fmt: skip
_WITH_BOS = ("llama2", "gemma")


class Resolved(NamedTuple):
    """A model's template and BOS, and their origin as text."""

    template: Template
    bos: bool
    why: str


class Settled(NamedTuple):
    """A sweep whose templates are resolved.

    `told`: the origin of the template by model name. `errors`: templates that are wrong and cannot be used. `lacking`:
    tokenizers that are not available. In both cases the sweep contains a stand-in template.
    """

    sweep: Sweep
    told: dict[str, str]
    errors: list[str]
    lacking: list[str]


def described(model: Model, why: str) -> str:
    """A resolved model's template in one line."""
    text = model.text
    told = f"{text.prompt!r}, answers end with {repr(text.end) if text.end else 'the EOS of its tokenizer'}"
    told += f" and begin with {text.lead!r}" if text.lead else ""
    told += ", BOS first" if model.bos is True else ""
    return f"{told} ({why})" if why else told


def settle(sweep: Sweep) -> Settled:
    """Replaces `auto` and names in a sweep by each model's template and BOS. Identities are formed from the result."""
    told: dict[str, str] = {}
    errors: list[str] = []
    lacking: list[str] = []
    models = []
    for i, model in enumerate(sweep.models):
        named = model.template if isinstance(model.template, str) else ""
        stand_in = model.template if isinstance(model.template, Template) else _NAMED.get(named, _NAMED["chatml"])
        found, why = model.model_copy(update={"template": stand_in, "bos": model.bos is True}), ""
        try:
            found, why = settled(model)
        except ConfigError as error:
            errors.append(f"models[{i}].{error}")
        except PrerequisiteError as error:
            lacking.append(f"models[{i}] {model.name!r}: {error}")
        told[model.name] = why
        models.append(found)
        if not why:
            continue
        for where, prompt in {**{f"tasks[{n}].template": task.template for n, task in enumerate(sweep.tasks)},
                              "evaluate.template": sweep.evaluate.template}.items():  # fmt: skip
            if prompt is not None and (problem := _misfit(found, prompt)):
                errors.append(f"{where}: {problem} (model {model.name!r})")
        asked = found.model_copy(update={"template": found.text.model_copy(update={"prompt": sweep.evaluate.template})})
        least = _least_prompt(asked if sweep.evaluate.template else found)
        if least > sweep.evaluate.max_prompt_tokens:
            limit = sweep.evaluate.max_prompt_tokens
            errors.append(
                f"evaluate.max_prompt_tokens: expected at least {least}, for the template of {model.name!r} and a token of the "
                f"request, got {limit}"
            )
    return Settled(sweep.model_copy(update={"models": tuple(models)}), told, errors, lacking)


def settled(model: Model) -> tuple[Model, str]:
    """A model with its template and BOS, and their origin as text.

    Raises:
        ConfigError: the template does not fit the tokenizer.
        PrerequisiteError: the tokenizer is not available.
    """
    if source_problem(model.source, model.revision) or folder_problems(model.source):
        found = Resolved(_NAMED["chatml"], False, "")  # check.py refuses this source
    else:
        tokenizer = _tokenizer(tokenizer_folder(tokenizer_stage(model)))
        found = resolve(tokenizer, model.template, model.bos, model.source)
    return model.model_copy(update={"template": found.template, "bos": found.bos}), found.why


def resolve(tokenizer: Tokenizer, template: str | Template, bos: bool | str = "auto", source: str = "it") -> Resolved:
    """The template and BOS that `template` and `bos` of a sweep file mean with this tokenizer.

    Raises:
        ConfigError: the template does not fit the tokenizer.
    """
    if isinstance(template, Template):
        found, why = _written_out(template, tokenizer), "as the sweep file writes it"
    elif template == "auto":
        found, why = _own(tokenizer, source)
    else:
        known = _NAMED[template]
        found = known.model_copy(
            update={
                "end": known.end or _eos(tokenizer),
                "stop": tuple(token for token in known.stop if tokenizer.id_of(token) is not None),
            }
        )
        why = f"{template}, by name"
    if isinstance(bos, str):  # a BOS that the template itself writes appears once in both cases
        bos = tokenizer.adds_bos or template in _WITH_BOS
    elif not bos and template == "auto" and found.prompt.startswith(tokenizer.special_texts.get("bos_token", "\0")):
        raise ConfigError(
            f"bos: false, but the tokenizer's own chat template writes BOS; leave it to auto, or {CHOICES}"
        )
    _check(found, bos, tokenizer, str(template) if isinstance(template, str) else "")
    return Resolved(found, bos, why)


def _misfit(model: Model, prompt: str) -> str:
    """Why this text around a request does not fit a resolved model's template; "" if it fits."""
    template = model.text.model_copy(update={"prompt": prompt})
    try:
        _check(template, model.bos is True, _tokenizer(tokenizer_folder(tokenizer_stage(model))), "")
    except ConfigError as error:
        return str(error)
    return ""


def _least_prompt(model: Model) -> int:
    """Number of tokens of the shortest prompt that the template writes."""
    from safecl.training.tokens import encode_prompts

    tokenizer = _tokenizer(tokenizer_folder(tokenizer_stage(model)))
    [ids], _ = encode_prompts(["a"], tokenizer, model.text.model_dump(), model.bos is True)
    return len(ids)


@cache
def _tokenizer(folder: Path) -> Tokenizer:
    from safecl.training.tokens import Tokenizer

    return Tokenizer(folder)


def _eos(tokenizer: Tokenizer) -> str:
    found = tokenizer.special_texts.get("eos_token")
    if found is None:
        raise ConfigError("template: `end` is the tokenizer's EOS, and it has none; write `end`, a special token")
    return found


def _written_out(template: Template, tokenizer: Tokenizer) -> Template:
    """The sweep file's own template. If it leaves out `end`, that is the tokenizer's EOS. If it leaves out `stop`, that
    is empty."""
    given = template.model_fields_set
    if not given:  # ChatML, the default of the class
        return _NAMED["chatml"]
    end = template.end if "end" in given else _eos(tokenizer)
    return template.model_copy(update={"end": end, "stop": template.stop if "stop" in given else ()})


# -- the tokenizer's own chat template ---------------------------------------------------------------------------------


def _own(tokenizer: Tokenizer, source: str) -> tuple[Template, str]:
    """The text that the chat template writes around one user's turn and before the answer."""
    if tokenizer.chat_template is None:
        raise ConfigError(f"template: auto, but {source} has no chat template, as base models have none: {CHOICES}")
    render = _renderer(tokenizer.chat_template, tokenizer.special_texts)
    asked = render([("user", _ASKED)], True)
    if asked.count(_ASKED) != 1:
        raise ConfigError(
            f"template: auto, but the chat template writes a user's turn {asked.count(_ASKED)} times: {CHOICES}"
        )
    head, tail = asked.split(_ASKED)
    whole_tail = tail
    spaced = f" \n{_ASKED} \n"
    around = render([("user", spaced)], True)
    strip = around == head + _ASKED + tail
    if not strip and around != head + spaced + tail:
        raise ConfigError(f"template: auto, but the chat template changes what it is given: {CHOICES}")
    told = render([("user", _ASKED), ("assistant", _ANSWERED)], False)
    before, _, rest = told.rpartition(_ANSWERED)
    why, lead = "the tokenizer's own chat template", ""
    between = before[len(asked) :]
    if before.startswith(asked) and between:
        if between.isspace():  # tokenized with the answer's first word, so that the prompt ends where the answer begins
            lead = between
        else:  # a header that the template does not count as prompt, or an empty reasoning block
            tail += between
    elif not before.startswith(asked):
        why += " (which writes earlier answers otherwise)"
    specials = sorted(tokenizer.specials(), key=len, reverse=True)
    after = rest.lstrip()
    end = next((token for token in specials if token and after.startswith(token)), None)
    if end is None:
        end = _eos(tokenizer)
        why += "; it ends no answer, the tokenizer's EOS does"
    fixed = head + tail
    if "{prompt}" in fixed:
        raise ConfigError(f"template: auto, but the chat template itself writes '{{prompt}}': {CHOICES}")
    found = Template(prompt=f"{head}{{prompt}}{tail}", end=end, stop=(), lead=lead, strip=strip)
    return found.model_copy(update=_conversation(render, head, whole_tail, tail + lead)), why


def _conversation(render: _Render, head: str, tail: str, answers: str) -> dict[str, str | None]:
    """How the chat template writes a system prompt and earlier turns, as fields of Template. Fields that it cannot
    write, or writes differently each time, are left out. `head`, `tail`: text around the one request. `answers`: text
    between it and its answer."""
    asked, told = [_ASKED, "Q8xQ", "Q9xQ"], [_ANSWERED, "A8xA"]
    several = [(role, text) for pair in zip(asked, told, strict=False) for role, text in zip(_TURNS, pair, strict=True)]
    found: dict[str, str | None] = {}
    text = _rendered(render, [*several[:2], ("user", asked[1])])
    _, _, rest = text.partition(asked[0])
    past, _, rest = rest.partition(told[0])
    between = rest.partition(asked[1])[0]
    earlier = "".join(asked[i] + past + told[i] + between for i in range(2))
    if _rendered(render, [*several, ("user", asked[2])]) == head + earlier + asked[2] + tail and between:
        found = {"between": between, "past": None if past == answers else past}
    text = _rendered(render, [("system", _SYSTEM), ("user", asked[0])])
    before, _, rest = text.partition(_SYSTEM)
    after = rest.partition(asked[0])[0]
    first = before + _SYSTEM + after
    if text == first + asked[0] + tail and "{system}" not in text and text.count(_SYSTEM) == 1:
        both = _rendered(render, [("system", _SYSTEM), *several, ("user", asked[2])])
        if "between" not in found or both == first + earlier + asked[2] + tail:
            found["system"] = f"{before}{{system}}{after}"
    return found


def _rendered(render: _Render, turns: list[tuple[str, str]]) -> str:
    """The chat template's text before an answer; "" if it refuses the turns."""
    try:
        return render(turns, True)
    except ConfigError:
        return ""


def _renderer(text: str, specials: dict[str, str]) -> _Render:
    """The chat template as a function of turns (role, text) and of whether an answer follows."""
    import json

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks an assistant's words for training; they are written as they stand."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse

    def render(turns: list[tuple[str, str]], answer_follows: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            return environment.from_string(text).render(
                messages=messages, add_generation_prompt=answer_follows, tools=None, documents=None, **specials
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            asked = "one user's turn" if len(turns) == 1 else "a user's turn and its answer"
            raise ConfigError(
                f"template: auto, but the tokenizer's chat template cannot write {asked} "
                f"({type(error).__name__}: {error}): {CHOICES}"
            ) from None

    return render


def whole(template: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """A stage's template, completed with how it writes system prompts and several turns, even if the stage's rows had
    none. These fields come from the named template, or the tokenizer's own, that it equals. A template that a sweep
    file wrote out is returned unchanged."""
    if template.get("between"):
        return dict(template)
    known = list(_NAMED.values())
    with suppress(ConfigError):  # a base model has no chat template
        known.append(_own(tokenizer, "")[0])
    written = {"lead": "", "strip": False, **template}
    for found in known:
        if all(written[key] == getattr(found, key) for key in ("prompt", "end", "lead", "strip")):
            return {**template, **found.conversation}
    return dict(template)


def chat_template(template: Mapping[str, Any], bos: bool, bos_token: str | None) -> str:
    """A resolved template as a Jinja chat template for user and assistant turns, for serving an exported model. BOS
    stands once, before the first turn, even if the template itself writes `bos_token`."""
    import json

    head, _, tail = str(template["prompt"]).partition("{prompt}")
    if bos_token and head.startswith(bos_token):
        bos, head = True, head.removeprefix(bos_token)
    user = "m['content'] | trim" if template.get("strip") else "m['content']"
    lead, between, past = str(template.get("lead", "")), template.get("between"), template.get("past")
    first, _, last = str(template.get("system") or "").partition("{system}")
    if bos_token:
        first = first.removeprefix(bos_token)
    past = tail + lead if past is None else past
    head, tail, lead, end, between, past, first, last = (
        json.dumps(text, ensure_ascii=False) for text in (head, tail, lead, template["end"], between, past, first, last)
    )
    if template.get("between"):  # trained on conversations
        refuse = "{{ raise_exception('trained without system prompts') }}"
        system = f"{{{{ {first} + m['content'] + {last} }}}}" if template.get("system") else refuse
        return (
            f"{'{{ bos_token }}' if bos else ''}{{% set system = messages[0]['role'] == 'system' %}}"
            f"{{% for m in messages[:1] if system %}}{system}{{% else %}}{{{{ {head} }}}}{{% endfor %}}"
            f"{{% set rest = messages[1:] if system else messages %}}{{% for m in rest %}}{{% if m['role'] == 'user' %}}"
            f"{{{{ ('' if loop.first else {between}) + ({user}) }}}}{{{{ {tail} if loop.last else {tail} + {lead} "
            f"if loop.revindex0 == 1 else {past} }}}}"
            f"{{% elif m['role'] == 'assistant' %}}{{{{ m['content'] + ({end} if loop.last else '') }}}}"
            "{% else %}{{ raise_exception('trained on turns of user and assistant alone') }}{% endif %}{% endfor %}"
        )
    return (
        f"{'{{ bos_token }}' if bos else ''}{{% for m in messages %}}{{% if m['role'] == 'user' %}}"
        f"{{{{ {head} + ({user}) + {tail} }}}}{{% elif m['role'] == 'assistant' %}}{{{{ {lead} + m['content'] + {end} }}}}"
        "{% else %}{{ raise_exception('trained on turns of user and assistant alone') }}{% endif %}{% endfor %}"
    )


# -- token by token ----------------------------------------------------------------------------------------------------


def _check(template: Template, bos: bool, tokenizer: Tokenizer, name: str) -> None:
    """Raises ConfigError if training and generation would use different text, or generation could not stop."""
    from safecl.training.tokens import encode, encode_prompts

    what = f"template {name}" if name else "template"
    some = ", ".join(repr(token) for token in tokenizer.specials()[:8]) or "none"
    if not tokenizer.is_special(template.end):
        ids = tokenizer.ids([template.end])[0]
        parts = " + ".join(repr(tokenizer.fast.id_to_token(id)) for id in ids) or "nothing"
        raise ConfigError(
            f"{what}: its end {template.end!r} is {parts} to this tokenizer, so that no answer could end there; expected one "
            f"of its special tokens ({some}){'' if name == 'auto' else ', or ' + CHOICES}"
        )
    unknown = [token for token in template.stop if tokenizer.id_of(token) is None]
    if unknown:
        raise ConfigError(f"{what}: stop {', '.join(map(repr, unknown))} is no token of this tokenizer; it has {some}")
    if bos and tokenizer.bos_id is None:
        raise ConfigError("bos: true, but this tokenizer has no BOS token; set it to false")
    strangers = [id for id in tokenizer.eos_ids if tokenizer.fast.id_to_token(id) is None]
    if strangers:
        raise ConfigError(
            f"template: the model's files name {', '.join(map(str, strangers))} as EOS, which is no token of its tokenizer: "
            "do config.json, generation_config.json and tokenizer.json belong to one model?"
        )
    written = template.model_dump()
    rows = [
        Row(str(i), "Say it in a word.", answer) for i, answer in enumerate(("Yes.", "positive", "I'm sorry", "42"))
    ]
    try:
        encoded, dropped = encode(rows, tokenizer, written, bos, 1 << 20)
    except ConfigError as error:
        raise ConfigError(f"{what}: {str(error).partition(': ')[2]}") from None
    if dropped:
        space = len(template.prompt) - len(template.prompt.rstrip(" "))
        hint = f"; end the prompt before its last space and give that as `lead: {' ' * space!r}`" if space else ""
        raise ConfigError(
            f"{what}: the prompt's last token is another before an answer such as {rows[int(next(iter(dropped)))].response!r} "
            f"than where generation begins{hint}"
        )
    [asked], _ = encode_prompts([rows[0].prompt], tokenizer, written, bos)
    for row in encoded:
        targets = row.ids[row.num_prompt :]
        end = tokenizer.id_of(template.end)
        if row.ids[: row.num_prompt] != asked or targets[-1] != end or targets.count(end) != 1:
            raise ConfigError(
                f"{what}: expected its end {template.end!r} once, after an answer, got {tokenizer.fast.decode(targets, False)!r}"
            )
