"""How long a stage takes on this machine, before anything like it was run: tokens x parameters / measured speed, plus what
a stage costs however small it is. cost.py corrects it by what past stages took.

Where something is not known yet (a data set's length, a hub model's size) a typical value stands in for it: an estimate
always is a number.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safecl import hardware, tasks
from safecl.base import Damaged
from safecl.config import Execution
from safecl.hardware import Speed
from safecl.store import SharedConfig, Stage, Store

# Seconds that a stage takes however small it is.
FIXED_S = {
    "model": 1.0,
    "tokenizer": 1.0,
    "data": 0.4,
    "finetune": 5.0,
    "memory": 3.0,
    "fisher": 4.0,
    "likelihood": 3.0,
    "finalize": 2.0,
    "replay": 1.0,
    "generate": 0.7,
    "judge": 0.05,
    "metrics": 0.1,
}
BOOT_S = 30.0  # an engine's start
# GFLOP/s, where it could not be measured: of a thread, and of an A100 in bfloat16.
TYPICAL_SPEED = {"cpu": Speed(40.0, 40.0), "gpu": Speed(150_000.0, 150_000.0)}
TYPICAL_PARAMETERS, TYPICAL_LAYERS, TYPICAL_ROWS = 1e9, 30, 500
MEMORY_GB_PER_S = {"cpu": 8.0, "gpu": 1000.0}  # at which decoding reads the weights
STEP_S = {"cpu": 0.015, "gpu": 0.004}  # of a decoding step, beside its arithmetic
OPTIMIZER_STEP_S = {"cpu": 0.12, "gpu": 0.06}  # of a training step, likewise
# Seconds a token, layer and hidden unit in what is no matrix product (norms, attention, loss, conversions), forward and
# backward: of the quickstart's finetunes two at a time beside an engine. Matrix products of few rows count here too.
OTHER_S = {"cpu": 2e-7, "gpu": 2e-10}
TEMPLATE_TOKENS = 12  # around a prompt
GUARD_TOKENS, PUBLISHED_TOKENS = (
    25,
    100,
)  # of a guard's template; of a published one's, after what all prompts begin with
AT_ONCE = {"cpu": 64, "gpu": 256}  # requests that an engine decodes together
PROGRAM_S = 2.0  # a model-written program in its sandbox


class Size(NamedTuple):
    """Of a model: parameters, layers, and numbers in a hidden state (0: not known)."""

    parameters: float
    layers: int = TYPICAL_LAYERS
    hidden: int = 0

    @property
    def width(self) -> float:
        """`hidden`, or what follows for a common shape."""
        return self.hidden or math.sqrt(self.parameters / (12 * self.layers))


class Length(NamedTuple):
    """Rows of a data stage, and tokens of a row's prompt and answer."""

    rows: int
    prompt: float
    answer: float


class Estimate(NamedTuple):
    """`group`: stages that are corrected together. `on_engine`: it takes its turn on a served model. `states_gib`: of hidden
    states that it writes; `disk_gib`: of these and of weights."""

    seconds: float
    group: tuple[str, str]
    on_engine: bool
    states_gib: float = 0.0
    disk_gib: float = 0.0


class Estimator:
    """`speeds`: GFLOP/s by dtype, of one thread or of a GPU. Reads the store where it knows more, never writes."""

    def __init__(self, store: Store, execution: Execution, speeds: Mapping[str, Speed]) -> None:
        self.store, self.execution, self.speeds = store, execution, speeds
        self.device = "gpu" if execution.use_gpu else "cpu"
        self.typical = TYPICAL_SPEED[self.device]
        self._sizes: dict[str, Size] = {}
        self._lengths: dict[str, Length] = {}
        self._alike: dict[tuple[object, ...], Estimate] = {}  # of stages with one config and rows of one stage
        self._of_kind: dict[str, Callable[[Stage], float]] = {
            "finetune": self._finetune,
            "memory": self._memory,
            "fisher": self._fisher,
            "likelihood": self._likelihood,
            "generate": self._generate,
            "judge": self._judge,
            "finalize": lambda stage: self._size(stage).parameters / 5e7,
            "model": self._model,
            "metrics": self._metrics,
        }

    def __call__(self, stage: Stage) -> Estimate:
        if not isinstance(stage.config, SharedConfig):
            return self._estimate(stage)
        rows, model = (stage.inputs.get(name) for name in ("rows", "model"))
        alike = (stage.kind, stage.config.text, rows and rows.key, model and model.key, *stage.hints)
        if alike not in self._alike:
            self._alike[alike] = self._estimate(stage)
        return self._alike[alike]

    def _estimate(self, stage: Stage) -> Estimate:
        of_kind = self._of_kind.get(stage.kind)
        work = 0.0 if of_kind is None else of_kind(stage)
        on_engine = stage.kind == "generate" or (stage.kind == "judge" and "model" in stage.inputs)
        detail = str(stage.config.get("method", stage.config.get("judge", "")))
        states_gib = self._states_gib(stage) if stage.kind == "memory" else 0.0
        written = states_gib + self._weights_gib(stage)
        return Estimate(FIXED_S.get(stage.kind, 1.0) + work, (stage.kind, detail), on_engine, states_gib, written)

    # -- by kind ------------------------------------------------------------------------------------------------------

    def _model(self, stage: Stage) -> float:
        source: Any = stage.config["source"]
        if "files" in source:  # a pointer to a folder
            return 0.0
        return self.size(stage).parameters / 2e7 if "hub" in source else 5.0 + self.size(stage).parameters / 2e7

    def _finetune(self, stage: Stage) -> float:
        config: Any = stage.config
        training, params = config["training"], config["params"]
        user = self.length(stage.inputs["rows"])
        num_rows = user.rows + sum(
            self.length(stage.inputs[name]).rows for name in ("memory", "replay") if adds_rows(config, stage, name)
        )
        steps: int = math.ceil(num_rows * training["epochs"] / training["batch_size"])
        row = min(user.prompt + user.answer, training["max_tokens"])
        tokens = num_rows * training["epochs"] * row
        if "memory" in stage.inputs and not adds_rows(config, stage, "memory"):
            drawn = (params.get("memory_batch_size") or training["batch_size"]) * params.get("unlearn_steps", 1)
            tokens += steps * drawn * row * (0 if params.get("cycles") else 1)  # lisa draws in place of user rows
        return self._passes(stage, tokens, self._upper(stage)) + steps * OPTIMIZER_STEP_S[self.device]

    def _memory(self, stage: Stage) -> float:
        config: Any = stage.config
        if config["positions"] is None:
            return 0.0
        rows = self.length(stage.inputs["rows"])
        row = min(rows.prompt + rows.answer, config["max_tokens"])
        return self._passes(stage, (config["num_rows"] or rows.rows) * row, backward=0.0)

    def _states_gib(self, stage: Stage) -> float:
        config: Any = stage.config
        if config["positions"] is None:
            return 0.0
        rows, size = self.length(stage.inputs["rows"]), self._size(stage)
        of_row = {"last": 1.0, "response": rows.answer, "all": rows.prompt + rows.answer}
        num: float = (config["num_rows"] or rows.rows) * min(of_row[config["positions"]], config["max_tokens"])
        return num * size.width * (4 if config["dtype"] == "float32" else 2) / 2**30

    def _weights_gib(self, stage: Stage) -> float:
        """Of an adapter over all linear layers of a common shape (19 hidden units a layer and rank, float32); of a merge, which
        may be dense, all weights."""
        if stage.kind == "finalize":
            return self._size(stage).parameters * (4 if stage.config["dtype"] == "float32" else 2) / 2**30
        if stage.kind != "finetune":
            return 0.0
        lora: Any = stage.config["lora"]
        size = self._size(stage)
        return float(4 * 19 * size.width * int(lora.get("last_layers") or size.layers) * lora["rank"] / 2**30)

    def _fisher(self, stage: Stage) -> float:
        config: Any = stage.config
        rows = self.length(stage.inputs["rows"])
        num_rows = min(config["num_rows"] or rows.rows, rows.rows)
        return self._passes(stage, num_rows * min(rows.prompt + rows.answer, config["max_tokens"]), backward=1.0)

    def _likelihood(self, stage: Stage) -> float:
        rows = self.length(stage.inputs["rows"])
        return self._passes(stage, 2 * rows.rows * (rows.prompt + rows.answer), backward=0.0)

    def _generate(self, stage: Stage) -> float:
        rows = self.length(stage.inputs["rows"])
        return self._decode(stage, rows.rows, rows.prompt, int(str(stage.config["max_new_tokens"])))

    def _judge(self, stage: Stage) -> float:
        rows = self.length(stage.inputs["rows"])
        if "model" not in stage.inputs:
            return rows.rows * 1e-4
        answers = stage.inputs.get("generations")
        answer = rows.answer if answers is None else min(60.0, float(str(answers.config["max_new_tokens"])))
        guards = [name for name in stage.inputs if name.partition(".")[0] == "weights"]  # each answers all of it
        own = GUARD_TOKENS if guards else PUBLISHED_TOKENS
        return FIXED_S["generate"] + max(1, len(guards)) * self._decode(stage, rows.rows, own + rows.prompt + answer, 3)

    def _metrics(self, stage: Stage) -> float:
        if "num_cpus" not in stage.hints:  # it runs no programs
            return 0.0
        sets = (other for name, other in stage.inputs.items() if name.startswith("utility."))
        return PROGRAM_S * sum(self.length(rows).rows for rows in sets if rows.kind == "data")

    def _passes(self, stage: Stage, tokens: float, backward: float) -> float:
        """Seconds of a forward and (for the share `backward` of the layers) a backward, with the base frozen."""
        size, speed = self._size(stage), self.speeds.get(str(stage.config.get("dtype")), self.typical)
        products = 2 * size.parameters / 1e9 * (1 / speed.forward + backward / speed.backward)
        other = size.layers * size.width * OTHER_S[self.device] * (1 + 2 * backward) / 3
        return tokens * (products + other) / self.execution.num_workers

    def _decode(self, stage: Stage, num: int, prompt: float, max_new_tokens: int) -> float:
        """Seconds of an engine: a swap of weights, prompts, and steps that read all weights for the requests at once."""
        size, dtype = self._size(stage), str(stage.inputs["model"].config["dtype"])
        speed = self.speeds.get(dtype, self.typical)
        num_bytes = size.parameters * (4 if dtype == "float32" else 2)
        steps = math.ceil(num / AT_ONCE[self.device]) * max_new_tokens
        products = num * (prompt + max_new_tokens) * 2 * size.parameters / 1e9 / speed.forward
        swap = num_bytes / 1e9 / (0.5 if self.device == "cpu" else 5.0)
        return swap + products + steps * (STEP_S[self.device] + num_bytes / 1e9 / MEMORY_GB_PER_S[self.device])

    def _upper(self, stage: Stage) -> float:
        """The share of the layers that a backward passes through."""
        lora: Any = stage.config["lora"]
        layers = self._size(stage).layers
        adapted = int(lora.get("last_layers") or layers)
        return min(1.0, adapted / layers)

    # -- what is known of inputs --------------------------------------------------------------------------------------

    def length(self, rows: Stage) -> Length:
        if rows.key not in self._lengths:
            self._lengths[rows.key] = self._length(rows)
        return self._lengths[rows.key]

    def _length(self, rows: Stage) -> Length:
        config: Any = rows.config
        parts = config.get("parts")
        if parts is None:  # a memory, or rows that the model makes
            source = rows.inputs.get("rows")
            is_known = source is not None and source.kind in ("data", "memory")
            known = self.length(source) if is_known and source else Length(TYPICAL_ROWS, 60, 100)
            return known._replace(rows=config.get("num_rows") or known.rows)
        typical = [tasks.load(part["task"]).TYPICAL_TOKENS for part in parts] or [tasks.Task.TYPICAL_TOKENS]
        num_rows = sum(part["num_rows"] or TYPICAL_ROWS for part in parts)
        if any(part["num_rows"] is None for part in parts) and self.store.has(rows):
            with suppress(Damaged):
                num_rows = int(self.store.record(rows)["result"].get("num_rows", num_rows))
        prompt, answer = (sum(column) / len(column) for column in zip(*typical, strict=True))
        if config.get("guard"):  # both stand in the guard's template
            prompt, answer = GUARD_TOKENS + prompt + answer, 5
        return Length(num_rows, prompt + TEMPLATE_TOKENS, answer)

    def _size(self, stage: Stage) -> Size:
        model = stage.inputs.get("model") or next(
            (other for below in stage.inputs.values() for other in below.inputs.values() if other.kind == "model"), None
        )
        return Size(TYPICAL_PARAMETERS) if model is None else self.size(model)

    def size(self, model: Stage) -> Size:
        """Of a model stage: from its config file where it lies here, else from a size in its name (`135M`, `7b`)."""
        if model.key not in self._sizes:
            self._sizes[model.key] = self._read_size(model)
        return self._sizes[model.key]

    def _read_size(self, model: Stage) -> Size:
        source: Any = model.config["source"]
        folder = Path(model.hints.get("path", ""))
        told = None
        if self.store.has(model):
            with suppress(Damaged, OSError, ValueError):
                folder, told = self.store.path(model), self.store.record(model)["result"].get("parameters")
                where = folder / "where.json"
                folder = Path(json.loads(where.read_text())["path"]) if where.is_file() else folder
        try:
            return shape(json.loads((folder / "config.json").read_text()))
        except (OSError, ValueError, KeyError, TypeError):
            if told:
                return Size(float(told))
            names = " ".join((str(source.get("hub", "")), str(source.get("wheel", "")), model.hints.get("path", "")))
            found = re.findall(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)\s*([mb])(?![a-z0-9])", names.lower())
            return Size(float(found[-1][0]) * {"m": 1e6, "b": 1e9}[found[-1][1]] if found else TYPICAL_PARAMETERS)


def speeds(store: Store, use_gpu: bool, keep: bool = False) -> dict[str, Speed]:
    """GFLOP/s by dtype of a thread of this CPU (with `use_gpu`: of a GPU): noted in the store, else measured in about a
    second; nothing where there is no such device. `keep`: note what was measured, by the device's name and what it multiplies
    natively."""
    if use_gpu and not hardware.gpus():
        return {}
    name = f"{hardware.device(use_gpu)}, {hardware.native(use_gpu)}"
    known: dict[str, Any] = store.noted("speed") or {}
    if name not in known:
        known[name] = hardware.measured(use_gpu) or {}
        if keep and known[name]:
            store.note("speed", known)
    return {dtype: Speed(*both) for dtype, both in known[name].items()}


def adds_rows(config: Mapping[str, Any], stage: Stage, name: str) -> bool:
    """Whether a finetune trains on this input's rows beside the user's, in place of drawing from them at every step."""
    return name in stage.inputs and (name == "replay" or config["method"] == "safeinstr")


def shape(config: Mapping[str, Any]) -> Size:
    """Parameters of a decoder from its config.json (Llama's, Mistral's and Gemma-2's layout)."""
    text = config.get("text_config", config)
    width, layers, heads = text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"]
    head = text.get("head_dim") or width // heads
    attention = width * head * (2 * heads + 2 * text.get("num_key_value_heads", heads))
    parameters = layers * (attention + 3 * width * text["intermediate_size"]) + text["vocab_size"] * width
    return Size(parameters, layers, width)
