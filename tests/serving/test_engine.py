"""Real engines behind Ray Serve with a tiny float32 model: what they answer, and what survives when they are killed.

On a GPU where there is one."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from safecl.base import PrerequisiteError
from safecl.serving.client import Engines
from safecl.serving.deploy import deploy, ready, shutdown
from safecl.serving.messages import Completion, Refused, Request, Sampling, Settings, WeightsRef
from safecl.store import Store
from tests.serving.adapters import change_base, make_adapter, make_deltas

ENGINE = "candidate"
NUM_TOKENS = 12
GREEDY = Sampling(max_tokens=NUM_TOKENS)
PROMPTS = [Request(f"row-{number}", list(range(3 + number, 15 + number))) for number in range(12)]


@pytest.fixture(scope="module")
def weights(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, WeightsRef]:
    """base; a and b: adapters of it on all linear modules, q: on two, dense: deltas of the embedding and others; other:
    another base (its tied embedding differs). Their files are bfloat16, what they answer is compared with float32 models."""
    folder = tmp_path_factory.mktemp("weights")
    base = str(change_base(tiny_model, folder / "base", dtype="bfloat16"))
    refs = {"base": WeightsRef("base", base)}
    for seed, name in enumerate("ab"):
        refs[name] = WeightsRef(name, base, str(make_adapter(tiny_model, folder / name, seed)))
    refs["q"] = WeightsRef(
        "q", base, str(make_adapter(tiny_model, folder / "q", 7, target_modules=["q_proj", "v_proj"]))
    )
    refs["dense"] = WeightsRef("dense", base, str(make_deltas(tiny_model, folder / "dense", seed=8)))
    refs["other"] = WeightsRef("other", str(change_base(tiny_model, folder / "other", noise=0.1, dtype="bfloat16")))
    return refs


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def engines(
    cluster: Path, weights: dict[str, WeightsRef], store: Store, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engines]:
    from ray import serve

    logs = tmp_path_factory.mktemp("logs")
    small = {"memory_gib": 0.1, "max_model_len": 128, "turn_s": 0.5, "linger_s": 0.02, "stall_s": 60.0}
    gpu = torch.cuda.is_available()
    settings = Settings(name=ENGINE, dtype="float32", **small, use_gpu=gpu, log_dir=str(logs))  # type: ignore[arg-type]
    deploy(settings, weights["base"].base, store, wait=False)
    ready(ENGINE, timeout_s=240)
    yield Engines()
    shutdown(ENGINE)
    serve.shutdown()  # else its controller takes a tenth of a core for as long as other tests have the cluster


def assert_greedy(completions: dict[str, Any], weights: WeightsRef) -> None:
    """Every token is an argmax of Hugging Face's own model with PEFT's own adapter, up to float32 near-ties."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(weights.base, dtype=torch.float32).eval()
    if weights.adapter is not None:
        model = PeftModel.from_pretrained(model, weights.adapter).eval()
    for request in PROMPTS:
        answer = completions[request.id].token_ids
        assert len(answer) == NUM_TOKENS
        with torch.no_grad():
            logits_TV = model(torch.tensor([request.token_ids + answer])).logits[0, len(request.token_ids) - 1 : -1]
        short_T = logits_TV.max(-1).values - logits_TV[torch.arange(NUM_TOKENS), torch.tensor(answer)]
        assert short_T.max() < 1e-3, f"{weights.key}, {request.id}: logit short of the best by {short_T.tolist()}"


def tokens(completions: dict[str, Any]) -> dict[str, list[int]]:
    return {id: completion.token_ids for id, completion in completions.items()}


def test_swapping_gives_each_models_own_answers_and_then_the_first_ones_again(
    engines: Engines, weights: dict[str, WeightsRef]
) -> None:
    seen = {}
    for name in ("base", "a", "other", "b"):
        completions = engines.generate(ENGINE, weights[name], PROMPTS, GREEDY)
        assert list(completions) == [request.id for request in PROMPTS]
        assert {completion.weights_key for completion in completions.values()} == {name}
        assert_greedy(completions, weights[name])
        seen[name] = tokens(completions)
    for first, second in (("base", "a"), ("a", "b"), ("base", "other")):
        assert seen[first] != seen[second], f"{first} and {second} answer alike: the test could not tell them apart"
    assert tokens(engines.generate(ENGINE, weights["base"], PROMPTS, GREEDY)) == seen["base"]


def test_a_swap_of_what_differs_leaves_the_very_weights_of_a_full_load(
    engines: Engines, weights: dict[str, WeightsRef], tmp_path: Path
) -> None:
    """Tokens and log-probabilities to the bit. The full load is forced by a copy of the base: other files, same bytes."""
    asked = GREEDY.model_copy(update={"logprobs": 5})

    def answers(ref: WeightsRef) -> tuple[list[tuple[Any, ...]], int]:
        """One request at a time, so that nothing is summed in another order; and how many parameters were loaded."""
        before = engines.status(ENGINE)["num_loaded"]
        done = [engines.generate(ENGINE, ref, [request], asked)[request.id] for request in PROMPTS[:3]]
        return [(one.token_ids, one.likely) for one in done], engines.status(ENGINE)["num_loaded"] - before

    num_all = (
        2 * 6 + 2
    )  # in each layer qkv, o, gate_up, down and two norms; the embedding (the head is tied), the last norm
    engines.generate(ENGINE, weights["other"], PROMPTS[:1], GREEDY)
    by_delta: dict[str, Any] = {}
    # a and b adapt all linear layers, 4 in each of 2; q the qkv of each; dense the embedding, the last norm and one of a's.
    for name, num in (("base", num_all), ("a", 8), ("b", 8), ("q", 8), ("base", 2), ("dense", 3), ("a", 10), ("q", 8)):
        given, num_loaded = answers(weights[name])
        assert num_loaded == num, name
        assert by_delta.setdefault(name, given) == given, f"{name} answers otherwise the second time"
    copied = shutil.copytree(weights["base"].base, tmp_path / "copy")
    seen: list[Any] = []
    for name, delta in by_delta.items():
        engines.generate(ENGINE, weights["other"], PROMPTS[:1], GREEDY)
        full, num_loaded = answers(WeightsRef(f"{name} in full", str(copied), weights[name].adapter))
        assert num_loaded == num_all and full == delta, name
        assert delta not in seen, f"{name} answers as another: the test could not tell them apart"
        seen.append(delta)


def test_keys_asked_for_at_the_same_time_each_get_their_own_answers(
    engines: Engines, weights: dict[str, WeightsRef]
) -> None:
    alone = {name: tokens(engines.generate(ENGINE, weights[name], PROMPTS, GREEDY)) for name in ("base", "a", "b")}
    many = [Request(f"{request.id}/{copy}", request.token_ids) for copy in range(10) for request in PROMPTS]
    got: dict[str, Any] = {}

    def ask(name: str) -> None:
        got[name] = engines.generate(ENGINE, weights[name], many, GREEDY)

    swaps_before = engines.status(ENGINE)["num_swaps"]
    threads = [threading.Thread(target=ask, args=(name,)) for name in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, answers in alone.items():
        assert len(got[name]) == len(many)
        for id, completion in got[name].items():
            assert completion.weights_key == name
            assert completion.token_ids == answers[id.split("/")[0]], f"{id} of {name} is not {name}'s answer"
    assert engines.status(ENGINE)["num_swaps"] - swaps_before >= 2


def test_a_stop_token_ends_an_answer_and_nothing_else_does(engines: Engines, weights: dict[str, WeightsRef]) -> None:
    free = engines.generate(ENGINE, weights["base"], PROMPTS[:1], GREEDY)["row-0"]
    assert free.finish == "length" and len(free.token_ids) == NUM_TOKENS
    stop = free.token_ids[4]
    upto = free.token_ids.index(stop) + 1
    stopped = engines.generate(
        ENGINE, weights["base"], PROMPTS[:1], Sampling(max_tokens=NUM_TOKENS, stop_token_ids=(stop,))
    )["row-0"]
    assert stopped.finish == "stop" and stopped.token_ids == free.token_ids[:upto]


def test_a_question_that_came_before_gets_the_answer_that_it_got_without_another_swap(
    engines: Engines, weights: dict[str, WeightsRef]
) -> None:
    """Judges ask so. Their prompts come again in other stages, under other names."""
    asked = GREEDY.model_copy(update={"logprobs": 3, "remembered": True})
    again = [Request(f"again/{request.id}", request.token_ids) for request in PROMPTS]
    first = {name: engines.generate(ENGINE, weights[name], PROMPTS, asked) for name in ("a", "b")}
    before = engines.status(ENGINE)
    for name in ("a", "b"):
        found = engines.generate(ENGINE, weights[name], again, asked)
        assert [one[1:] for one in found.values()] == [one[1:] for one in first[name].values()]
    after = engines.status(ENGINE)
    assert after["num_reused"] - before["num_reused"] == 2 * len(PROMPTS)
    assert (after["num_swaps"], after["key"]) == (before["num_swaps"], before["key"])
    engines.generate(ENGINE, weights["b"], again, GREEDY.model_copy(update={"logprobs": 3}))
    assert engines.status(ENGINE)["num_reused"] == after["num_reused"], "what nobody wants remembered is computed"


def test_log_probabilities_come_when_asked_for_and_are_those_of_hugging_face(
    engines: Engines, weights: dict[str, WeightsRef]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = GREEDY.model_copy(update={"logprobs": 3})
    completions = engines.generate(ENGINE, weights["a"], PROMPTS[:2], asked)
    assert engines.generate(ENGINE, weights["a"], PROMPTS[:1], GREEDY)["row-0"].likely == []
    model = AutoModelForCausalLM.from_pretrained(weights["a"].base, dtype=torch.float32)
    from peft import PeftModel

    model = PeftModel.from_pretrained(model, weights["a"].adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(weights["a"].base)
    texts: list[str] = []
    for request in PROMPTS[:2]:
        completion = completions[request.id]
        with torch.no_grad():
            logits_TV = model(torch.tensor([request.token_ids + completion.token_ids])).logits[0]
        best_TK = logits_TV.log_softmax(-1)[len(request.token_ids) - 1 : -1].topk(3).values
        assert len(completion.likely) == NUM_TOKENS
        for token, places, best_K in zip(completion.token_ids, completion.likely, best_TK, strict=True):
            text = tokenizer.decode([token])
            assert places[0][0] == (text if "\ufffd" not in text else "")  # a piece of a character has no text
            texts.append(places[0][0])
            assert [logprob for _, logprob in places] == pytest.approx(best_K.tolist(), abs=1e-3)
    assert any(texts)


def test_what_a_finetune_left_is_compared_with_what_is_served(
    engines: Engines, weights: dict[str, WeightsRef], store: Store, tmp_path: Path
) -> None:
    """The whole way through the generate stage: Hugging Face's own log-probabilities, those of one token off by 1/4."""
    import json

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from safecl.config import Execution, Template
    from safecl.stages import generate
    from safecl.store import Context, Stage

    model = AutoModelForCausalLM.from_pretrained(weights["a"].base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(weights["a"].adapter)).eval()
    probe = []
    for ids in (list(range(3, 60)), list(range(90, 99))):
        with torch.no_grad():
            logprobs_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        probe.append(
            {"ids": ids, "logprobs": logprobs_TV[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()}
        )
    shutil.copytree(str(weights["a"].adapter), tmp_path / "weights" / "adapter")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.jsonl").write_text(
        '{"id": "1", "prompt": "the water", "response": "", "harmful": true}\n'
    )
    inputs = {"model": Path(weights["a"].base), "weights": tmp_path / "weights", "rows": tmp_path / "rows"}
    base, adapter = Stage("model", {}), Stage("finetune", {})
    for stage, files in ((base, Path(weights["a"].base)), (adapter, tmp_path / "weights")):
        made = store.new_folder()
        shutil.copytree(files, made, dirs_exist_ok=True)
        store.publish(stage, made, {}, 0.0)
    text = {"template": Template().model_dump(mode="json"), "bos": False, "max_new_tokens": 4, "max_prompt_tokens": 64}

    def facts(role: str) -> dict[str, Any]:
        stage = Stage("generate", text, {"model": base, "weights": adapter, "rows": Stage("data", {"role": role})})
        reach = Engines({f"candidate-{base.key[:8]}": (ENGINE,)})
        context = Context(stage, inputs, tmp_path, tmp_path, Execution(engine_max_tokens=40), lambda *_: None, reach)
        return generate.run(context)

    (tmp_path / "weights" / "probe.json").write_text(json.dumps(probe))
    found = facts("attack.test")
    assert found["served_tokens"] == 38 + 8 and 0 < found["served_mean"] <= found["served_gap"] < 1e-3
    probe[1]["logprobs"][2] += 0.25
    (tmp_path / "weights" / "probe.json").write_text(json.dumps(probe))
    assert facts("attack.test")["served_gap"] == pytest.approx(0.25, abs=1e-3)
    assert "served_gap" not in facts("benign.test")  # once is enough


def test_engines_travel_into_ray_tasks_and_tell_their_progress(
    engines: Engines, weights: dict[str, WeightsRef]
) -> None:
    import ray

    task = ray.remote(num_cpus=0)(Engines.generate)
    remote = ray.get(task.remote(engines, ENGINE, weights["base"], PROMPTS, GREEDY))
    progress: list[tuple[int, int]] = []
    local = engines.generate(
        ENGINE, weights["base"], PROMPTS, GREEDY, on_progress=lambda done, total: progress.append((done, total))
    )
    assert tokens(remote) == tokens(local)
    assert progress == [(number + 1, len(PROMPTS)) for number in range(len(PROMPTS))]


def test_a_group_sends_a_batch_to_an_engine_that_is_up(engines: Engines, weights: dict[str, WeightsRef]) -> None:
    grouped = Engines(groups={"any": ("not-deployed", ENGINE)})
    seen: list[Completion] = []
    done = grouped.generate("any", weights["base"], PROMPTS, GREEDY, on_done=seen.append)
    assert len(done) == len(PROMPTS) and sorted(seen) == sorted(done.values())


def test_what_can_never_be_served_is_refused_at_once_and_the_engine_lives_on(
    engines: Engines, weights: dict[str, WeightsRef], tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(PrerequisiteError, match="max_model_len"):
        engines.generate(ENGINE, weights["base"], [Request("long", [5] * 120)], GREEDY)
    with pytest.raises(Refused, match="adapter_config"):
        engines.generate(ENGINE, WeightsRef("gone", str(tiny_model), str(tmp_path)), PROMPTS, GREEDY)
    name = "model.layers.1.mlp.up_proj.weight"
    incomplete = change_base(tiny_model, tmp_path / "incomplete", drop=name)
    with pytest.raises(Refused, match=name):
        engines.generate(ENGINE, WeightsRef("incomplete", str(incomplete)), PROMPTS, GREEDY)
    with pytest.raises(ValueError, match="unique"):
        engines.generate(ENGINE, weights["base"], [PROMPTS[0], PROMPTS[0]], GREEDY)
    with pytest.raises(PrerequisiteError, match="'absent' is not deployed"):
        engines.generate("absent", weights["base"], PROMPTS, GREEDY)
    assert_greedy(engines.generate(ENGINE, weights["base"], PROMPTS, GREEDY), weights["base"])


def engine_process(engines: Engines) -> Any:
    """vLLM's process, the child of the replica that holds the weights."""
    import psutil

    children = psutil.Process(engines.status(ENGINE)["pid"]).children(recursive=True)
    return max(children, key=lambda child: child.memory_info().rss)


def test_memory_is_flat_over_fifty_swaps(engines: Engines, weights: dict[str, WeightsRef], tiny_model: Path) -> None:
    import psutil

    def swap(times: int) -> None:
        for number in range(times):
            engines.generate(ENGINE, weights["ab"[number % 2]], PROMPTS[:1], Sampling(max_tokens=1))

    process: psutil.Process = engine_process(engines)
    swap(10)  # allocator pools fill
    before, swaps_before = process.memory_info().rss, engines.status(ENGINE)["num_swaps"]
    swap(50)
    grown = process.memory_info().rss - before
    assert engines.status(ENGINE)["num_swaps"] - swaps_before >= 50
    one_leaked_copy_a_swap = 50 * (tiny_model / "model.safetensors").stat().st_size
    assert grown < one_leaked_copy_a_swap / 4, f"{grown / 2**20:.1f} MiB more after 50 swaps"


@pytest.mark.slow  # a boot; test_gate.py has the failed swap, the next test the replica that is replaced
def test_a_swap_that_fails_half_way_costs_the_replica_its_place(
    engines: Engines, weights: dict[str, WeightsRef], tiny_model: Path, tmp_path: Path
) -> None:
    # The weights are checked when they are asked for, and read when their turn comes: here they vanish in between.
    doomed = WeightsRef("doomed", str(tiny_model), str(make_adapter(tiny_model, tmp_path / "doomed", seed=5)))
    pid = engines.status(ENGINE)["pid"]
    # Seconds of work that the doomed weights wait for, however slowly this process gets to remove them.
    many = [Request(f"{request.id}/{copy}", request.token_ids) for copy in range(150) for request in PROMPTS]
    got: dict[str, Any] = {}
    busy = threading.Thread(target=lambda: got.update(engines.generate(ENGINE, weights["base"], many, GREEDY)))

    def ask_for_doomed() -> None:
        with pytest.raises(Refused, match="adapter_model"):
            engines.generate(ENGINE, doomed, PROMPTS[:1], GREEDY, timeout_s=120)
        got["refused"] = True

    busy.start()
    while engines.status(ENGINE)["in_flight"] == 0:
        time.sleep(0.005)
    asking = threading.Thread(target=ask_for_doomed)
    asking.start()
    while engines.status(ENGINE)["waiting"] == 0:
        time.sleep(0.005)
    (Path(str(doomed.adapter)) / "adapter_model.safetensors").unlink()
    busy.join()
    asking.join()
    assert got.pop("refused"), "asked again, the new replica says what is wrong with the weights"
    assert got.keys() == {request.id for request in many}
    assert engines.status(ENGINE)["pid"] != pid


@pytest.mark.parametrize("victim", ["engine", pytest.param("replica", marks=pytest.mark.slow)])
def test_a_killed_process_is_replaced_and_every_answer_comes_once(
    engines: Engines, weights: dict[str, WeightsRef], victim: str
) -> None:
    import psutil

    expected = tokens(engines.generate(ENGINE, weights["a"], PROMPTS, GREEDY))
    many = [Request(f"{request.id}/{copy}", request.token_ids) for copy in range(40) for request in PROMPTS]
    progress: list[int] = []
    old_engine, old_replica = engine_process(engines), engines.status(ENGINE)["pid"]

    def kill_at_a_third(done: int, total: int) -> None:
        progress.append(done)
        if done == total // 3:
            os.kill(old_engine.pid if victim == "engine" else old_replica, signal.SIGKILL)

    got = engines.generate(ENGINE, weights["a"], many, GREEDY, on_progress=kill_at_a_third, timeout_s=180)
    assert list(got) == [request.id for request in many]
    assert progress == list(range(1, len(many) + 1)), "each answer is counted once"
    assert all(got[request.id].token_ids == expected[request.id.split("/")[0]] for request in many)
    assert engines.status(ENGINE)["pid"] != old_replica
    assert not psutil.pid_exists(old_engine.pid), "the killed engine's process is still there"
