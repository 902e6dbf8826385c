"""A model folder's tokenizer, and rows -> token ids. Loads neither torch nor transformers: evaluating needs only this,
and importing transformers takes as long as generating a small set of answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from safecl.base import ConfigError, Json, PrerequisiteError
from safecl.tasks import Row


def base_folder(path: Path) -> Path:
    """The Hugging Face folder behind a finished model stage (or such a folder itself)."""
    pointer = path / "where.json"
    return Path(json.loads(pointer.read_text())["path"]) if pointer.exists() else path


class Tokenizer:
    """The fast tokenizer of a folder in Hugging Face format. Text comes complete from a template: special tokens in it
    are read as such, and none is added.

    Raises:
        PrerequisiteError: the folder has no tokenizer.json.
    """

    def __init__(self, folder: Path) -> None:
        import tokenizers

        base = base_folder(folder)
        file = base / "tokenizer.json"
        if not file.is_file():
            raise PrerequisiteError(
                f"{base}: expected tokenizer.json, got none; write it with transformers: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        self._file = str(file)
        self.fast = tokenizers.Tokenizer.from_file(self._file)
        self.fast.no_truncation()
        self.fast.no_padding()
        settings = base / "tokenizer_config.json"
        config: dict[str, Any] = json.loads(settings.read_text()) if settings.is_file() else {}
        self.bos_id = self._special(config.get("bos_token"))
        self.eos_id = self._special(config.get("eos_token"))

    def _special(self, token: Any) -> int | None:
        text = token.get("content") if isinstance(token, Mapping) else token  # a string, or its AddedToken as JSON
        return None if text is None else self.id_of(text)

    def id_of(self, token: str) -> int | None:
        """Id of a token by its exact text; None if there is none."""
        found: int | None = self.fast.token_to_id(token)
        return found

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        return [encoding.ids for encoding in self.fast.encode_batch_fast(list(texts), add_special_tokens=False)]

    def prompt_ids(self, prompts: Sequence[Sequence[tuple[str, bool]]]) -> list[list[int]]:
        """Token ids of prompts given in pieces (text, own): the template's own pieces, and text of others, in which
        special tokens are plain text. Where others' text holds none, these are the ids of the whole text at once."""
        texts = ["".join(text for text, _ in pieces) for pieces in prompts]
        encodings = self.fast.encode_batch(texts, add_special_tokens=False)
        return [self._guarded(*each) for each in zip(prompts, texts, encodings, strict=True)]

    def _guarded(self, pieces: Sequence[tuple[str, bool]], text: str, encoding: Any) -> list[int]:
        foreign_spans: list[tuple[int, int]] = []
        at = 0
        for piece, own in pieces:
            foreign_spans += [] if own else [(at, at + len(piece))]
            at += len(piece)
        own_places: list[int] = []
        foreign_places: list[int] = []
        for place, (id, (start, end)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            if id in self._special_ids:
                is_foreign = any(start < last and end > first for first, last in foreign_spans)
                (foreign_places if is_foreign else own_places).append(place)
        ids: list[int] = list(encoding.ids)
        # A tokenizer treats what stands between two special tokens by itself, so a stretch can be read again alone.
        for before, after in reversed(list(zip([-1, *own_places], [*own_places, len(ids)], strict=True))):
            if any(before < place < after for place in foreign_places):
                start = encoding.offsets[before][1] if before >= 0 else 0
                end = encoding.offsets[after][0] if after < len(ids) else len(text)
                ids[before + 1 : after] = self._plain.encode(text[start:end], add_special_tokens=False).ids
        return ids

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(id for id, token in self.fast.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def _plain(self) -> Any:
        """The same tokenizer, blind to special tokens."""
        import tokenizers

        plain = tokenizers.Tokenizer.from_file(self._file)
        plain.no_truncation()
        plain.no_padding()
        plain.encode_special_tokens = True
        return plain


def weights_folder(stage: Path) -> Path:
    """What a finetune or finalize stage adds to the base: `adapter` (PEFT) or `delta` (dense)."""
    return stage / "delta" if (stage / "delta").is_dir() else stage / "adapter"


class Encoded(NamedTuple):
    """A row as token ids: the first `num_prompt` are the prompt, the rest the answer with its end token(s)."""

    row_id: str
    ids: list[int]
    num_prompt: int

    @property
    def num_targets(self) -> int:
        """Tokens that carry loss."""
        return len(self.ids) - self.num_prompt


def encode(
    rows: Sequence[Row], tokenizer: Tokenizer, template: Mapping[str, Json], bos: bool, max_tokens: int
) -> tuple[list[Encoded], dict[str, str]]:
    """Token ids of training rows, and `{row id: why}` for the rows that were left out.

    A row is left out when its answer does not fit into `max_tokens` beside the template's tail (prompts are cut from
    the left, answers never), or when the text tokenised as one does not begin with the prompt tokenised alone: then
    generation would see other ids than training.

    Raises:
        ConfigError: no row is left, or the template's end is not the same tokens after an answer as alone.
    """
    prompt_text, tail_text = _parts(template)
    end = str(template["end"])
    prompts = tokenizer.ids([prompt_text(row.prompt) for row in rows])
    wholes = tokenizer.ids([prompt_text(row.prompt) + row.response + end for row in rows])
    [end_ids, tail_ids] = tokenizer.ids([end, tail_text])
    start = _bos(tokenizer, bos)
    encoded: list[Encoded] = []
    dropped: dict[str, str] = {}
    for row, prompt, whole in zip(rows, prompts, wholes, strict=True):
        answer = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt:
            dropped[row.id] = "prompt and answer tokenise differently together than apart"
        elif not end_ids or answer[-len(end_ids) :] != end_ids:
            raise ConfigError(
                f"row {row.id!r}: its tokens end with {answer[-len(end_ids) :]}, expected template.end {end!r} = "
                f"{end_ids}; choose a special token of this tokenizer as template.end"
            )
        elif len(start) + len(tail_ids) + 1 + len(answer) > max_tokens:
            dropped[row.id] = f"answer of {len(answer)} tokens does not fit into max_tokens = {max_tokens}"
        else:
            kept = _cut(prompt, start, max_tokens - len(answer))
            encoded.append(Encoded(row.id, kept + answer, len(kept)))
    if not encoded:
        reasons = sorted(set(dropped.values()))[:3]
        raise ConfigError(f"none of {len(rows)} training rows can be used: {'; '.join(reasons) or 'there are none'}")
    return encoded, dropped


def encode_prompt(
    prompt: str, tokenizer: Tokenizer, template: Mapping[str, Json], bos: bool, max_tokens: int | None = None
) -> list[int]:
    """Token ids of a prompt for generation: exactly those that training puts before the answer. Cut from the left to
    `max_tokens` if given."""
    prompt_text, _ = _parts(template)
    [ids] = tokenizer.ids([prompt_text(prompt)])
    start = _bos(tokenizer, bos)
    return _cut(ids, start, max_tokens if max_tokens is not None else len(start) + len(ids))


def _parts(template: Mapping[str, Json]) -> tuple[Any, str]:
    head, tail = str(template["prompt"]).split("{prompt}")
    return (lambda prompt: head + prompt + tail), tail


def _bos(tokenizer: Tokenizer, bos: bool) -> list[int]:
    if not bos:
        return []
    if tokenizer.bos_id is None:
        raise ConfigError("models[].bos is true but this tokenizer has no BOS token; set it to false")
    return [tokenizer.bos_id]


def _cut(prompt: list[int], start: list[int], room: int) -> list[int]:
    """BOS exactly once (also where the template wrote it), then the last tokens of the prompt that fit."""
    if start and prompt[:1] == start:
        prompt = prompt[1:]
    space = room - len(start)
    return start + prompt[max(0, len(prompt) - space) :]
