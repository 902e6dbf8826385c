"""A model folder's tokenizer, and rows -> token ids. Imports neither torch nor transformers: evaluation needs only
this file, and importing transformers takes as long as generating a small set of answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from safecl.base import ConfigError, Json, PrerequisiteError
from safecl.tasks import Row


def base_folder(path: Path) -> Path:
    """The Hugging Face folder of a finished model stage. `path` may also be such a folder itself."""
    pointer = path / "where.json"
    return Path(json.loads(pointer.read_text())["path"]) if pointer.exists() else path


class Read(NamedTuple):
    """A text as token ids, with each token's place in the text as (first character, one past the last)."""

    ids: list[int]
    spans: list[tuple[int, int]]


Pieces = Sequence[
    tuple[str, bool]
]  # (text, own): own is True for the template's text, False for a request or an answer


class Tokenizer:
    """The fast tokenizer of a folder in Hugging Face format. It gets complete text from a template: special tokens in
    the text are read as such, and none is added.

    Raises:
        PrerequisiteError: the folder has no tokenizer.json, or its files cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        base = base_folder(folder)
        file = base / "tokenizer.json"
        if not file.is_file():
            raise PrerequisiteError(
                f"{base}: expected tokenizer.json, got none; write it with transformers: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        self._file = str(file)
        self.memo: dict[Any, Any] | None = None  # set by a plan, which tokenises the same rows for many stages
        try:
            self._changed_ns = file.stat().st_mtime_ns
            self.fast = _opened(self._file, self._changed_ns)
        except Exception as error:  # the library raises no narrower type
            raise PrerequisiteError(f"{file} cannot be read as a tokenizer ({error}); fetch it again") from None
        self._settings = _json(base / "special_tokens_map.json") | _json(base / "tokenizer_config.json")
        self.bos_id = self._special("bos_token")
        self.eos_id = self._special("eos_token")
        # The tokens that end an answer, by the model's own files; the tokenizer's EOS comes first.
        listed = [_json(base / name).get("eos_token_id") for name in ("generation_config.json", "config.json")]
        ids = [self.eos_id, *(id for each in listed for id in (each if isinstance(each, list) else [each]))]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(id for id in ids if id is not None))
        self.chat_template = _chat_template(base, self._settings)

    @property
    def special_texts(self) -> dict[str, str]:
        """Texts of the special tokens by the names that chat templates use: `bos_token`, `eos_token` and the like."""
        names = [name for name in self._settings if name.endswith("_token")]
        return {name: text for name in names if isinstance(text := _content(self._settings[name]), str)}

    @property
    def adds_bos(self) -> bool:
        """Whether this tokenizer by itself puts its BOS before a text: by its settings, or if they say nothing, by
        trying it."""
        told = self._settings.get("add_bos_token")
        if self.bos_id is None:
            return False
        return told if isinstance(told, bool) else self.fast.encode("a").ids[:1] == [self.bos_id]

    def _special(self, name: str) -> int | None:
        text = _content(self._settings.get(name))
        return None if text is None else self.id_of(text)

    def id_of(self, token: str) -> int | None:
        """Id of the token with exactly this text; None if there is none."""
        found: int | None = self.fast.token_to_id(token)
        return found

    def is_special(self, token: str) -> bool:
        """Whether this text is one control token."""
        return self.id_of(token) in self._special_ids

    def specials(self) -> list[str]:
        """The texts of all control tokens, sorted by id."""
        decoder = self.fast.get_added_tokens_decoder()
        return [decoder[id].content for id in sorted(self._special_ids)]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        return [encoding.ids for encoding in self.fast.encode_batch_fast(list(texts), add_special_tokens=False)]

    def prompt_ids(self, prompts: Sequence[Pieces]) -> list[list[int]]:
        """Token ids of texts given in pieces (text, own). In pieces that are not the template's own, special tokens
        are plain text. If those pieces hold no special token, the ids are those of the whole text tokenised at once."""
        texts = ["".join(text for text, _ in pieces) for pieces in prompts]
        found = self.ids(texts)
        for place, (pieces, text) in enumerate(zip(prompts, texts, strict=True)):
            if self._holds_foreign(pieces, text):
                found[place] = self.read([pieces])[0].ids
        return found

    def read(self, prompts: Sequence[Pieces]) -> list[Read]:
        """Token ids as in `prompt_ids`, with each token's place in the whole text."""
        texts = ["".join(text for text, _ in pieces) for pieces in prompts]
        encodings = self.fast.encode_batch(texts, add_special_tokens=False)
        return [
            self._guarded(pieces, text, encoding)
            if self._holds_foreign(pieces, text)
            else Read(encoding.ids, encoding.offsets)
            for pieces, text, encoding in zip(prompts, texts, encodings, strict=True)
        ]

    def _holds_foreign(self, pieces: Pieces, text: str) -> bool:
        """Whether text that is not the template's own may be read as a special token, alone or together with the text
        beside it."""
        if self._special_pattern is None:
            return True
        own = sum(len(self._special_pattern.findall(piece)) for piece, is_own in pieces if is_own)
        return len(self._special_pattern.findall(text)) != own

    @cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        """Finds special tokens in text. None if the tokenizer looks for some of them in normalised text."""
        tokens = [token for token in self.fast.get_added_tokens_decoder().values() if token.special]
        if any(token.normalized for token in tokens):
            return None
        longest_first = sorted((re.escape(token.content) for token in tokens), key=len, reverse=True)
        return re.compile("|".join(longest_first) or r"(?!)")

    def _guarded(self, pieces: Pieces, text: str, encoding: Any) -> Read:
        foreign_spans: list[tuple[int, int]] = []
        at = 0
        for piece, own in pieces:
            foreign_spans += [] if own else [(at, at + len(piece))]
            at += len(piece)
        ids, spans = list(encoding.ids), list(encoding.offsets)
        own_places: list[int] = []
        foreign_places: list[int] = []
        for place, (id, (start, end)) in enumerate(zip(ids, spans, strict=True)):
            if id in self._special_ids:
                # The token may span blanks beside it (rstrip). The place of its own text says which piece it belongs
                # to.
                token = str(self.fast.id_to_token(id))
                if (ahead := text[start:end].find(token)) >= 0:
                    start, end = start + ahead, start + ahead + len(token)
                is_foreign = any(start < last and end > first for first, last in foreign_spans)
                (foreign_places if is_foreign else own_places).append(place)
        # A tokenizer splits the text at special tokens, so the text between two of them can be tokenised again by
        # itself.
        for before, after in reversed(list(zip([-1, *own_places], [*own_places, len(ids)], strict=True))):
            if any(before < place < after for place in foreign_places):
                start = spans[before][1] if before >= 0 else 0
                end = spans[after][0] if after < len(ids) else len(text)
                again = self._plain[start > 0].encode(text[start:end], add_special_tokens=False)
                ids[before + 1 : after] = again.ids
                spans[before + 1 : after] = [(first + start, last + start) for first, last in again.offsets]
        return Read(ids, spans)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(id for id, token in self.fast.get_added_tokens_decoder().items() if token.special)

    @property
    def _plain(self) -> tuple[Any, Any]:
        """The same tokenizer without special tokens, for text at the beginning and for text after other text."""
        return _blind(self._file, self._changed_ns)


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token  # a string, or its AddedToken as JSON


@lru_cache(maxsize=2)  # a plan opens one for each of many checks; reading a large one takes a second
def _opened(file: str, changed_ns: int) -> Any:
    """The tokenizer of a file that was last changed then. It is read only from here on."""
    import tokenizers

    opened = tokenizers.Tokenizer.from_file(file)
    opened.no_truncation()
    opened.no_padding()
    return opened


@lru_cache(maxsize=2)
def _blind(file: str, changed_ns: int) -> tuple[Any, Any]:
    import tokenizers

    def blind() -> Any:
        plain = tokenizers.Tokenizer.from_file(file)
        plain.no_truncation()
        plain.no_padding()
        plain.encode_special_tokens = True
        return plain

    first = inside = blind()
    if (
        getattr(first.pre_tokenizer, "prepend_scheme", "") == "first"
    ):  # SentencePiece adds a space before the first text only
        inside = blind()
        inside.pre_tokenizer.prepend_scheme = "never"
    return first, inside


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise PrerequisiteError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise PrerequisiteError(f"{path}: expected a JSON object; fetch it again")
    return found


def _chat_template(base: Path, settings: Mapping[str, Any]) -> str | None:
    """The default chat template: from its own file, or else from the tokenizer's settings."""
    file = base / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = next((each.get("template") for each in found if each.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def weights_folder(stage: Path) -> Path:
    """The folder of the weights that a finetune or finalize stage adds to the base: `adapter` (PEFT) or `delta`
    (dense)."""
    return stage / "delta" if (stage / "delta").is_dir() else stage / "adapter"


class Encoded(NamedTuple):
    """A row as token ids. The first `num_prompt` ids are the prompt, the rest the answer with its end token(s).
    `num_cut` tokens of the request were left out."""

    row_id: str
    ids: list[int]
    num_prompt: int
    num_cut: int = 0

    @property
    def num_targets(self) -> int:
        """Number of tokens that have a loss: those of the answer."""
        return len(self.ids) - self.num_prompt


def encode(
    rows: Sequence[Row], tokenizer: Tokenizer, template: Mapping[str, Json], bos: bool, max_tokens: int
) -> tuple[list[Encoded], dict[str, str]]:
    """Token ids of training rows, and `{row id: reason}` for the rows that were left out.

    Special tokens in a request or an answer are plain text. A request that is too long loses its first tokens, never
    its template. Answers are never cut. A row is left out if its answer does not fit into `max_tokens` beside the
    template and one token of the request. It is also left out if the text tokenised as a whole does not begin with
    the prompt tokenised alone, because generation would then see other ids than training.

    Raises:
        ConfigError: no row is left, or the template's end has other tokens after an answer than alone.
    """
    encoded: list[Encoded] = []
    dropped: dict[str, str] = {}
    for row, prompt, answer in _written(rows, tokenizer, template, bos):
        if answer is None:
            dropped[row.id] = "prompt and answer tokenise differently together than apart"
        elif prompt.least + len(answer) > max_tokens:
            dropped[row.id] = f"answer of {len(answer)} tokens does not fit into max_tokens = {max_tokens}"
        else:
            kept, num_cut = prompt.cut(max_tokens - len(answer))
            encoded.append(Encoded(row.id, kept + answer, len(kept), num_cut))
    if not encoded:
        reasons = sorted(set(dropped.values()))[:3]
        raise ConfigError(f"none of {len(rows)} training rows can be used: {'; '.join(reasons) or 'there are none'}")
    return encoded, dropped


def least_tokens(
    rows: Sequence[Row], tokenizer: Tokenizer, template: Mapping[str, Json], bos: bool
) -> list[int | None]:
    """For each row the least `max_tokens` with which `encode` keeps it; None if it never does."""
    written = _written(rows, tokenizer, template, bos)
    return [None if answer is None else prompt.least + len(answer) for _, prompt, answer in written]


def encode_prompts(
    prompts: Sequence[str | Row],
    tokenizer: Tokenizer,
    template: Mapping[str, Json],
    bos: bool,
    max_tokens: int | None = None,
) -> tuple[list[list[int]], int]:
    """Token ids of prompts for generation, and how many of the requests were cut to `max_tokens`.

    They are exactly the ids that training puts before the answer. The prompt of a row includes the earlier turns of
    its conversation.

    Raises:
        ConfigError: the template alone is longer than `max_tokens`.
    """
    start = _bos(tokenizer, bos)
    asked = [_asked(Row("", prompt) if isinstance(prompt, str) else prompt, template) for prompt in prompts]
    reads = tokenizer.read([each.pieces for each in asked])
    found: list[list[int]] = []
    num_cut = 0
    for each, read in zip(asked, reads, strict=True):
        prompt = _prompt(read, each, start)
        if max_tokens is not None and prompt.least > max_tokens:
            raise ConfigError(f"a prompt's template is {prompt.least - 1} tokens, expected fewer than {max_tokens}")
        ids, cut = prompt.cut(max_tokens if max_tokens is not None else len(prompt.ids))
        found.append(ids)
        num_cut += cut > 0
    return found, num_cut


class _Prompt(NamedTuple):
    """A prompt's ids with BOS. `request` holds the places of the tokens that may be cut: tokens that hold only text
    of requests and earlier answers."""

    ids: list[int]
    request: Sequence[int]

    @property
    def least(self) -> int:
        """The fewest tokens to which the prompt can be cut."""
        return len(self.ids) - max(0, len(self.request) - 1)

    def cut(self, room: int) -> tuple[list[int], int]:
        """The ids without as many of the first `request` tokens as do not fit into `room`, and the number of these."""
        num = max(0, len(self.ids) - room)
        if num == 0:
            return self.ids, 0
        gone = set(self.request[:num])
        return [id for place, id in enumerate(self.ids) if place not in gone], num


def _written(
    rows: Sequence[Row], tokenizer: Tokenizer, template: Mapping[str, Json], bos: bool
) -> Iterator[tuple[Row, _Prompt, list[int] | None]]:
    """Each row with its uncut prompt and its answer's ids with the end. The answer is None if prompt and answer
    tokenise differently together than apart. A tokenizer with a `memo` tokenises equal texts once."""
    memo = tokenizer.memo
    if memo is None:
        yield from _write(rows, tokenizer, template, bos)
        return
    how = (json.dumps(template, sort_keys=True), bos)
    keys = [(row.prompt, row.response, json.dumps([row.meta.get("pieces"), row.before]), *how) for row in rows]
    new = {key: row for key, row in zip(keys, rows, strict=True) if key not in memo}
    for key, (_, prompt, answer) in zip(new, _write(list(new.values()), tokenizer, template, bos), strict=True):
        memo[key] = (prompt, answer)
    for row, key in zip(rows, keys, strict=True):
        yield row, *memo[key]


def _write(
    rows: Sequence[Row], tokenizer: Tokenizer, template: Mapping[str, Json], bos: bool
) -> Iterator[tuple[Row, _Prompt, list[int] | None]]:
    start, end, lead = _bos(tokenizer, bos), str(template["end"]), str(template.get("lead", ""))
    asked = [_asked(row, template) for row in rows]
    prompts = [each.pieces for each in asked]
    answers = [[(lead, True), (row.response, False), (end, True)] for row in rows]
    reads = tokenizer.read(prompts)
    wholes = tokenizer.prompt_ids([[*before, *after] for before, after in zip(prompts, answers, strict=True)])
    [end_ids] = tokenizer.ids([end])
    for row, each, read, whole in zip(rows, asked, reads, wholes, strict=True):
        prompt = _prompt(read, each, start)
        answer = whole[len(read.ids) :]
        if whole[: len(read.ids)] != read.ids:
            yield row, prompt, None
        elif not end_ids or answer[-len(end_ids) :] != end_ids:
            raise ConfigError(
                f"row {row.id!r}: its tokens end with {answer[-len(end_ids) :]}, expected template.end {end!r} = "
                f"{end_ids}; choose a special token of this tokenizer as template.end"
            )
        else:
            yield row, prompt, answer


class _Asked(NamedTuple):
    """A prompt in pieces, and the spans of its text that may be cut, as (first character, one past the last)."""

    pieces: Pieces
    cuttable: Sequence[tuple[int, int]]


def _asked(row: Row, template: Mapping[str, Json]) -> _Asked:
    """A row's request with the earlier turns, in the template. A judge's prompt (which has its own pieces) and a
    system prompt may not be cut.

    Raises:
        ConfigError: the template cannot write the turns before the request.
    """
    head, tail = str(template["prompt"]).split("{prompt}")
    own: Any = row.meta.get("pieces")
    if own is not None:
        return _Asked([(head, True), *((text, own) for text, own in own), (tail, True)], ())
    before = list(row.before)
    pieces, fixed = [(head, True)], 1
    if before and before[0][0] == "system":
        first, last = _part(row, template, "system", "a system prompt").split("{system}")
        pieces, fixed = [(first, True), (before.pop(0)[1], False), (last, True)], 3
    past = template.get("past")
    answers = f"{tail}{template.get('lead', '')}" if past is None else str(past)
    for role, text in before:
        after = answers if role == "user" else _part(row, template, "between", "several turns")
        pieces += [(_stripped(text, template), False), (after, True)]
    pieces += [(_stripped(row.prompt, template), False), (tail, True)]
    ends = [*accumulate(len(text) for text, _ in pieces)]
    spans = [(end - len(text), end) for (text, own), end in zip(pieces, ends, strict=True) if not own]
    return _Asked(pieces, spans[fixed // 2 :])


def _part(row: Row, template: Mapping[str, Json], name: str, what: str) -> str:
    found = template.get(name)
    if not found:
        raise ConfigError(
            f"row {row.id!r}: has {what}, which this model's template cannot write; give models[].template `{name}`, or "
            "another template"
        )
    return str(found)


def _stripped(text: str, template: Mapping[str, Json]) -> str:
    return text.strip() if template.get("strip") else text


def _prompt(read: Read, asked: _Asked, start: list[int]) -> _Prompt:
    ids, spans = read
    if start and ids[:1] == start:  # BOS exactly once, even if the template wrote it
        ids, spans = ids[1:], spans[1:]
    places = [
        len(start) + i
        for i, (a, b) in enumerate(spans)
        if any(first <= a < b <= last for first, last in asked.cuttable)
    ]
    return _Prompt(start + ids, places)


def _bos(tokenizer: Tokenizer, bos: bool) -> list[int]:
    if not bos:
        return []
    if tokenizer.bos_id is None:
        raise ConfigError("models[].bos is true but this tokenizer has no BOS token; set it to false")
    return [tokenizer.bos_id]
