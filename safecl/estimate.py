"""Estimate how long a stage takes on this machine before a similar one was run.

The estimate is tokens x parameters / measured speed, plus a fixed time of each kind of stage. cost.py corrects it by what
past stages took. Where something is not known yet (a data set's length, a hub model's size) a typical value is used, so
that an estimate is always a number.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safecl import hardware
from safecl.base import Damaged
from safecl.config import Execution
from safecl.hardware import Speed
from safecl.sizes import TYPICAL, TYPICAL_PARAMETERS, Length, Size, shape
from safecl.stages import engine_of, load
from safecl.store import SharedConfig, Stage, Store

# Seconds of an engine's start: of a small model on 2 cores, and on an H200 with graphs compiled anew.
BOOT_S = {"cpu": 30.0, "gpu": 90.0}
# (forward, backward) in GFLOP/s, used if the speed could not be measured: of one CPU thread, and of an A100 in bfloat16.
TYPICAL_SPEED = {"cpu": Speed(40.0, 40.0), "gpu": Speed(150_000.0, 150_000.0)}
MEMORY_GB_PER_S = {"cpu": 8.0, "gpu": 1000.0}  # GB/s at which decoding reads the weights
STEP_S = {"cpu": 0.015, "gpu": 0.004}  # seconds of a decoding step beside its matrix products
# Seconds for each token, layer and hidden unit that are not spent in matrix products (but in norms, attention, loss,
# conversions), forward and backward together. Measured on the quickstart's finetunes, two at a time beside an engine. It
# includes matrix products with few rows.
OTHER_S = {"cpu": 2e-7, "gpu": 2e-10}
AT_ONCE = {"cpu": 64, "gpu": 256}  # requests that an engine decodes together


class Estimate(NamedTuple):
    """The estimate of one stage.

    Attributes:
        seconds: how long it takes.
        group: (kind, method or judge) of the stages that are corrected together.
        on_engine: whether it asks a served model, which it shares with other stages.
        states_gib, weights_gib: GiB of hidden states and of weights that it writes.
    """

    seconds: float
    group: tuple[str, str]
    on_engine: bool
    states_gib: float = 0.0
    weights_gib: float = 0.0


class Estimator:
    """Estimates stages. Reads the store for sizes and results that it knows, and never writes to it.

    Args:
        speeds: GFLOP/s by dtype, of one CPU thread or of one GPU.
    """

    def __init__(self, store: Store, execution: Execution, speeds: Mapping[str, Speed]) -> None:
        self.store, self.execution, self.speeds = store, execution, speeds
        self.device = "gpu" if execution.use_gpu else "cpu"
        self.typical = TYPICAL_SPEED[self.device]
        self.boot_s = BOOT_S[self.device]
        self._sizes: dict[str, Size] = {}
        self._lengths: dict[str, Length] = {}
        self._alike: dict[Hashable, Estimate] = {}

    def __call__(self, stage: Stage) -> Estimate:
        alike = self.alike(stage)
        if (known := self._alike.get(alike)) is None:
            known = self._alike[alike] = self._estimate(stage)
        return known

    @staticmethod
    def alike(stage: Stage) -> Hashable:
        """Return what the estimate depends on: kind, config, rows and model; or else the stage's key."""
        config, inputs = stage.config, stage.inputs
        if not isinstance(config, SharedConfig):
            return stage.key
        rows, model = inputs.get("rows"), inputs.get("model")
        return stage.kind, config.text, rows and rows.key, model and model.key, *stage.hints

    def _estimate(self, stage: Stage) -> Estimate:
        kind = load(stage.kind)
        detail = str(stage.config.get(kind.apart_by, ""))
        return Estimate(
            kind.fixed_s + kind.seconds(stage, self),
            (stage.kind, detail),
            engine_of(stage) is not None,
            kind.states_gib(stage, self),
            kind.weights_gib(stage, self),
        )

    # -- what the kinds of stages compute with -------------------------------------------------------------------------

    def passes(self, stage: Stage, tokens: float, backward: float) -> float:
        """Return the seconds of a forward pass of `tokens`, and of a backward pass, with the base frozen.

        `backward`: for which fraction of the layers there is a backward pass, in [0, 1].
        """
        size, speed = self.size_of(stage), self.speeds.get(str(stage.config.get("dtype")), self.typical)
        products = 2 * size.parameters / 1e9 * (1 / speed.forward + backward / speed.backward)
        other = size.layers * size.width * OTHER_S[self.device] * (1 + 2 * backward) / 3
        ranks = self.execution.num_workers if load(stage.kind).all_ranks else 1
        return tokens * (products + other) / ranks

    def decode(self, stage: Stage, num: int, prompt: float, max_new_tokens: int) -> float:
        """Return the seconds that an engine takes to answer `num` requests.

        They are: a swap of weights, the matrix products of prompts and answers, and decoding steps. Each step reads all
        weights once for all requests that are decoded together.

        Args:
            prompt: tokens of a prompt.
            max_new_tokens: tokens of an answer.
        """
        size, dtype = self.size_of(stage), str(stage.inputs["model"].config["dtype"])
        speed = self.speeds.get(dtype, self.typical)
        num_bytes = size.parameters * (4 if dtype == "float32" else 2)
        steps = math.ceil(num / AT_ONCE[self.device]) * max_new_tokens
        products = num * (prompt + max_new_tokens) * 2 * size.parameters / 1e9 / speed.forward
        swap = num_bytes / 1e9 / (0.5 if self.device == "cpu" else 5.0)
        return swap + products + steps * (STEP_S[self.device] + num_bytes / 1e9 / MEMORY_GB_PER_S[self.device])

    def length(self, rows: Stage) -> Length:
        """Return the number and length of the rows that a stage gives; a typical value if they are not known."""
        if rows.key not in self._lengths:
            self._lengths[rows.key] = load(rows.kind).length(rows, self) or TYPICAL
        return self._lengths[rows.key]

    def result(self, stage: Stage) -> dict[str, Any]:
        """Return the `result` of a finished stage's record; empty if the stage is not finished or is damaged."""
        if self.store.has(stage):
            with suppress(Damaged):
                return dict(self.store.record(stage)["result"])
        return {}

    def size_of(self, stage: Stage) -> Size:
        """Return the size of the model that a stage works with: its own input `model`, else that of one of its inputs."""
        below = (other.inputs["model"] for other in stage.inputs.values() if "model" in other.inputs)
        model = stage.inputs.get("model") or next(below, None)
        return Size(TYPICAL_PARAMETERS) if model is None else self.size(model)

    def size(self, model: Stage) -> Size:
        """Return the size of a model stage's model.

        It is read from the model's config file if that is here, else from the stage's record, else from a size in the model's
        name (`135M`, `7b`). Without any of these it is a typical size.
        """
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
    """Return the GFLOP/s by dtype of one thread of this CPU, or with `use_gpu` of one GPU.

    They are read from a note in the store, or else measured, in about a second. Empty if there is no such device, or if they
    cannot be measured. `keep`: note what was measured, under the device's name and its native dtype.
    """
    if use_gpu and not hardware.gpus():
        return {}
    name = f"{hardware.device(use_gpu)}, {hardware.native(use_gpu)}"
    known: dict[str, Any] = store.noted("speed") or {}
    if name not in known:
        known[name] = hardware.measured(use_gpu) or {}
        if keep and known[name]:
            store.note("speed", known)
    return {dtype: Speed(*both) for dtype, both in known[name].items()}
