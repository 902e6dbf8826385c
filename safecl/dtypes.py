"""What `dtype: auto` becomes. The devices that compute decide it, before any stage's identity is formed.

A run asks the devices (this machine, or the nodes of the cluster that it joins) and notes the answer in the store. Commands
that only read, and join no cluster, find it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

from safecl import methods
from safecl.base import ConfigError, Json
from safecl.config import Method, Model, Sweep
from safecl.hardware import Dtype, Node, agreed, device, gpus, native, this_node, times
from safecl.store import Store


class Auto(NamedTuple):
    """What `dtype: auto` means for a sweep. `why`: which hardware decided it, in words."""

    dtype: Dtype
    why: str


def auto(sweep: Sweep, store: Store, nodes: Sequence[Node] | None, reads: bool) -> Auto | None:
    """Return what `auto` means for this sweep; None if the sweep does not use `auto`.

    Args:
        nodes: the nodes that train, if they were asked. None: the note of the last run decides for a sweep on a cluster
            (which cannot be asked without joining it) and where `reads` is set. Without such a note this machine decides.
        reads: the command reads what was run (status, report).

    Raises:
        ConfigError: some nodes mean bfloat16 and others float32.
    """
    if not has_auto(sweep):
        return None
    on_cluster, use_gpu = sweep.execution.address != "local", sweep.execution.use_gpu
    if nodes is not None:
        dtype = agreed(nodes)
        told = "every" if dtype == "bfloat16" else "no"
        return Auto(dtype, f"{told} node that trains ({len(nodes)} of them) multiplies bfloat16 natively")
    last = store.noted(_note(sweep)) if reads or on_cluster else None
    if last is not None:
        return Auto(last["dtype"], "as the last run found")
    dtype = native(use_gpu)
    what = device(use_gpu)
    does = "multiplies" if dtype == "bfloat16" or what.startswith("no ") else "does not multiply"
    why = f"{what} {does} bfloat16 natively"
    return Auto(dtype, f"assumed, for {why}; `run` will ask the cluster's nodes" if on_cluster else why)


def warnings(sweep: Sweep, store: Store, found: Auto | None, nodes: Sequence[Node] | None) -> list[str]:
    """Return warnings on a resolved sweep's dtypes, for a person to read before it is run.

    Measures how slow bfloat16 is where it is emulated (in less than a second).
    """
    told = []
    last = None if found is None else store.noted(_note(sweep))
    if found is not None and last is not None and last["dtype"] != found.dtype:
        told.append(
            f"the last run of this sweep was in {last['dtype']}, this is in {found.dtype} and shares nothing with it; to go on "
            f"with it, set dtype: {last['dtype']} for each model"
        )
    if not has_bfloat16(sweep) or (sweep.execution.use_gpu and sweep.execution.address == "local" and not gpus()):
        return told
    at = "there"
    if nodes is None and sweep.execution.address == "local":
        nodes = [this_node("this machine", sweep.execution.use_gpu, measure=True)]
        at = "here"
    for node in nodes or ():
        where = node.device if at == "here" else f"{node.device} of node {node.name}"
        if node.slowdown is not None and node.slowdown > 1.05:
            slower = f"{times(node.slowdown)} slower than float32"
            told.append(f"bfloat16 is emulated on {where}: {slower} {at} (measured); set dtype: auto")
        elif node.native == "float32" and node.slowdown is None:
            told.append(f"bfloat16 is emulated on {where} (how slow could not be measured); set dtype: auto")
    return told


def remember(sweep: Sweep, store: Store, found: Auto | None) -> None:
    """Note in the store what `auto` meant in a run, for commands that read its results on other machines."""
    if found is not None:
        store.note(_note(sweep), {"dtype": found.dtype, "why": found.why})


def _note(sweep: Sweep) -> str:
    return f"dtype-{sweep.name}"


def has_auto(sweep: Sweep) -> bool:
    """Return whether a model of the sweep has `dtype: auto`, so that its dtype depends on the device."""
    return resolved(sweep, "float32") != sweep


def has_bfloat16(sweep: Sweep) -> bool:
    """Return whether one of the sweep's models or judges has `dtype: bfloat16`."""
    return any(model.dtype == "bfloat16" for model in (*sweep.models, *sweep.evaluate.judges.models.values()))


def resolved(sweep: Sweep, dtype: Dtype) -> Sweep:
    """Return the sweep with `dtype` in place of every `auto`: in its models, its judges' models and the models in methods'
    configs. Identities of stages are formed from what this returns."""

    def of(model: Model) -> Model:
        return model.model_copy(update={"dtype": dtype}) if model.dtype == "auto" else model

    judges = sweep.evaluate.judges.with_models(of)

    def within(method: Method) -> Method:
        config = {name: _named(method.name, name, value, dtype) for name, value in method.config.items()}
        return method.model_copy(update={"config": config})

    align = sweep.align
    if align.safety_from is not None:
        align = align.model_copy(update={"safety_from": within(align.safety_from)})
    return sweep.model_copy(
        update={
            "models": tuple(map(of, sweep.models)),
            "align": align,
            "methods": tuple(map(within, sweep.methods)),
            "evaluate": sweep.evaluate.model_copy(update={"judges": judges}),
        }
    )


def _named(method: str, name: str, value: Json, dtype: Dtype) -> Json:
    """A value of a method's config, with its dtype set if it is a model. check.py reports errors in it."""
    try:
        field: Any = methods.load(method).Config.model_fields.get(name)
    except ConfigError:
        return value
    is_model = field is not None and Model in (field.annotation, *get_args(field.annotation))
    if not is_model or not isinstance(value, dict) or value.get("dtype", "auto") != "auto":
        return value
    return {**value, "dtype": dtype}
