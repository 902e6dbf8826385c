"""What `dtype: auto` becomes: the devices that compute decide, before any identity is formed.

A run asks them (this machine, or the nodes of the cluster that it joins) and notes the answer in the store, where
commands that only read, and join no cluster, find it.
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
    """What `dtype: auto` means for a sweep, and whose hardware says so, in words."""

    dtype: Dtype
    why: str


def auto(sweep: Sweep, store: Store, nodes: Sequence[Node] | None, reads: bool) -> Auto | None:
    """What `auto` means; None for a sweep that does not say it.

    Args:
        nodes: those that train, where they were asked. None: this machine says it; or on a cluster, which cannot be asked
            without joining it, its last run.
        reads: what was run is read (status, report), so that the last run goes first here too.

    Raises:
        ConfigError: the nodes disagree.
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
    """What a person should know of a resolved sweep's dtypes before it is run; measures (under a second) how slow bfloat16
    is where it is emulated."""
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
    """Keep what `auto` meant in a run, for those who read its results elsewhere."""
    if found is not None:
        store.note(_note(sweep), {"dtype": found.dtype, "why": found.why})


def _note(sweep: Sweep) -> str:
    return f"dtype-{sweep.name}"


def has_auto(sweep: Sweep) -> bool:
    """Whether what the sweep computes in depends on the device."""
    return resolved(sweep, "float32") != sweep


def has_bfloat16(sweep: Sweep) -> bool:
    """Whether one of its models is said to compute in bfloat16."""
    return any(model.dtype == "bfloat16" for model in (*sweep.models, *sweep.evaluate.judges.models.values()))


def resolved(sweep: Sweep, dtype: Dtype) -> Sweep:
    """The sweep with `dtype` in place of every `auto`: of its models, its judges' models, and the models in methods'
    configs. Identities are formed of what this returns."""

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
    """A value of a method's config, with its dtype if it is a model. What is wrong with it is said by check.py."""
    try:
        field: Any = methods.load(method).Config.model_fields.get(name)
    except ConfigError:
        return value
    is_model = field is not None and Model in (field.annotation, *get_args(field.annotation))
    if not is_model or not isinstance(value, dict) or value.get("dtype", "auto") != "auto":
        return value
    return {**value, "dtype": dtype}
