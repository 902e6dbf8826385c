"""Models of the shapes that people use, with random weights drawn on the device, and what a finetune of one asks for."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import methods
import torch

SEED, RANK, RATE = 0, 8, 1e-4
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False,
    },
    "mistral-7b": {
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
    "gemma-2-2b": {
        "model_type": "gemma2", "vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0, "tie_word_embeddings": True, "pad_token_id": None,
    },
}  # fmt: skip
TINY = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 64, "query_pre_attn_scalar": 64}  # fmt: skip
LETTERS = "bcdgjklmpqvwxyz"  # one token each in the tests' tokenizer


def build(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """The model of `folder`'s config with weights drawn on the device, the same each time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    torch.manual_seed(SEED + 1)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, **({"attn_implementation": "eager"} if capped else {})
        )
    return model.eval()


def without_files(device: str) -> None:
    """Let transformers draw weights where it would read them: safecl's own loader then needs none on disk."""
    from transformers import AutoModelForCausalLM

    def drawn(folder: str, dtype: torch.dtype, **_: Any) -> Any:
        return build(Path(folder), dtype, device)

    AutoModelForCausalLM.from_pretrained = drawn


def quiet() -> None:
    """No bars, and no notes on tokenizers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def write_rows(folder: Path, name: str, num: int, num_tokens: int, harmful: bool, model: Path) -> None:
    """Rows of exactly so many tokens, half of them answer."""
    from safecl.config import Template
    from safecl.tasks import Row
    from safecl.training import batches, tokens

    chance = random.Random(name)

    def row(i: int, asked: int, answered: int) -> Row:
        text = ["".join(chance.choices(LETTERS, k=length)) for length in (asked, answered)]
        return Row(f"{name}/{i}", *text, harmful)

    template = Template().model_dump()
    [probe], _ = tokens.encode([row(0, 1, 1)], tokens.Tokenizer(model), template, False, num_tokens)
    extra = (probe.num_prompt - 1, probe.num_targets - 1)
    answered = num_tokens // 2 - extra[1]
    asked = num_tokens - num_tokens // 2 - extra[0]
    (folder / name).mkdir()
    batches.write_rows([row(i, asked, answered) for i in range(num)], folder / name)


class World:
    """One shape: its folder, rows, theta_safe (an adapter with random factors), and what methods ask for."""

    def __init__(self, bench: Any, shape: str, folder: Path, num_steps: int) -> None:
        from transformers import AutoConfig

        from tests import conftest

        self.bench, self.shape, self.folder = bench, shape, folder
        options = bench.options
        settings = {**SHAPES[shape], **(TINY if options.tiny else {})}
        if options.tiny:
            settings["vocab_size"] = min(settings["vocab_size"], 8192)
        self.config = AutoConfig.for_model(
            settings.pop("model_type"), max_position_embeddings=4096, bos_token_id=0, eos_token_id=2, **settings
        )
        self.model = folder / "model"
        self.model.mkdir(parents=True)
        self.config.architectures = None
        self.config.save_pretrained(self.model)
        conftest.build_tokenizer(self.model)
        write_rows(folder, "user", options.rows * num_steps, options.tokens, False, self.model)
        write_rows(folder, "safety", methods.NUM_MEMORY, options.tokens, True, self.model)
        self._theta_safe()
        self.asked: dict[str, str] | None = None

    def _theta_safe(self) -> None:
        from safecl.training import model

        base = model.load(self.model, "bfloat16", self.bench.device)
        peft_model = model.with_adapter(base, self.settings("sft")["lora"], SEED)
        generator = torch.Generator(self.bench.device).manual_seed(SEED)
        with torch.no_grad():
            for name, p in model.factors(peft_model).items():
                if "lora_B" in name:
                    p.normal_(0, 1e-3, generator=generator)
        (self.folder / "safe").mkdir()
        model.save_adapter(peft_model, self.folder / "safe" / "adapter")
        self.flops = flops(base, self.config, self.bench.options.tokens)
        self.parameters = sum(p.numel() for n, p in peft_model.named_parameters() if "lora_" not in n)

    def settings(self, method: str) -> dict[str, Any]:
        """What `make_run` is given."""
        found = methods.config(method, "bfloat16", RANK)
        found["training"] |= {"batch_size": self.bench.options.rows, "learning_rate": RATE, "max_tokens": 4096}
        found["lora"]["dropout"] = self.bench.options.dropout
        params = found["params"]
        if params.get("memory_batch_size") == methods.BATCH:
            params["memory_batch_size"] = self.bench.options.rows
        elif "memory_batch_size" in params:
            params["memory_batch_size"] = max(1, self.bench.options.rows // 5)
        return found

    def ask(self) -> dict[str, str]:
        """Memory, teacher and Fisher, by the stages' own code, made once."""
        if self.asked is None:
            from safecl.config import Template
            from safecl.stages import fisher, memory

            device = self.bench.device
            text = {"seed": SEED, "template": Template().model_dump(), "bos": False, "dtype": "bfloat16"}
            text["max_tokens"] = 4096
            inputs = {"model": self.model, "safe": self.folder / "safe"}
            for name in ("memory", "teacher", "fisher"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
                (self.folder / name).mkdir()
            states = {**text, "positions": "response", "adapter": "continue", "num_rows": methods.NUM_MEMORY}
            memory.remember(states, {**inputs, "rows": self.folder / "safety"}, self.folder / "memory", device)
            self.bench.clear()
            states["num_rows"] = None
            memory.remember(states, {**inputs, "rows": self.folder / "user"}, self.folder / "teacher", device)
            self.bench.clear()
            counted = {**text, "num_rows": 4, "labels": "empirical"}
            fisher.estimate(counted, {**inputs, "rows": self.folder / "safety"}, self.folder / "fisher", 2, device)
            self.bench.clear()
            named = {name: str(self.folder / name) for name in ("user", "memory", "teacher", "fisher", "safe")}
            self.asked = {**named, "model": str(self.model), "replay": named["memory"]}
        return self.asked

    def plain(self) -> dict[str, Path]:
        return {"model": self.model, "rows": self.folder / "user", "safe": self.folder / "safe"}


def flops(model: Any, config: Any, num_tokens: int) -> dict[str, float]:
    """Model FLOPs of a row of `num_tokens`: `forward` through the layers, `head` forward on the answer's tokens,
    `attention` forward (the two products over the tokens before each)."""
    linear = sum(m.weight.numel() for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "forward": 2.0 * linear * num_tokens, "head": 2.0 * config.vocab_size * config.hidden_size * (num_tokens // 2),
        "attention": 2.0 * config.num_hidden_layers * num_tokens**2 * config.num_attention_heads * width,
    }  # fmt: skip
