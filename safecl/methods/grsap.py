"""GR-SAP: generative replay for safety alignment preservation. Add safety rows that the aligned model writes itself.

    L(theta) = CE(user + B'),    B' = {(x', y')}: x' extracted from theta_safe domain by domain, y' its own safe answer

    paper               code
    B'                  the cached `replay` stages: `replayed`, at the end of this file
    x'                  the quoted continuation of: Sure, the \\textbf{specific request} is "
    y' (easy, hard)     an answer that the sweep's judge calls safe; if it is unsafe, a second one with a reminder to refuse
    control, ratio      config.mix (`add` or `replace` user rows), config.num_rows, config.hard_share

Source: arXiv 2603.10243 (GR-SAP) and its released code (chili-lab/GR-SAP: helper.py, extract_data.py, postprocess.py,
train.py). We read the code; the paper's text was not available to us.

Same as the released code: its 38 domains, prompt and prefill. Temperature, top-p and maximum tokens are 1.0, 1.0 and
256 for requests, .8, .95 and 1024 for answers, and .7, .95 and 512 for answers after a reminder. The perplexity
percentiles are 5-95, the cosines .85 and .5, and half of the rows are hard.

Different from the released code:

    requests per domain     64 (`num_per_domain`); there 512
    perplexity              by the sweep's base model; there Qwen2.5-0.5B
    near-duplicates         by words, and no filter of relevance, unless `embedder` names an encoder; there bge-small-en-v1.5
    judge                   the sweep's; there WildGuard
    unfinished answers      an answer cut at its maximum length loses its last, unfinished sentence
    unreadable verdict      drops the row; there it counts as a hard request
    test prompts            requests like a test prompt are dropped
    seeds                   everything drawn is seeded; there only the second answers

The released training settings (lr 2e-6, one epoch, batch 32) are not built in: set them in the sweep file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from safecl.base import Json, Strict
from safecl.config import Model
from safecl.methods import Method, Needs
from safecl.tasks import Row

if TYPE_CHECKING:
    from safecl.store import Stage

DOMAINS = (  # `safety_domains` of the released code
    "violence", "physical harm", "animal abuse", "self-harm", "terrorism", "organized crime", "human trafficking",
    "aiding and abetting violence", "incitement", "hate speech", "offensive language", "insulting behavior",
    "discriminatory behavior", "stereotypes", "injustice", "psychological harm", "sexual content",
    "sexually explicit/adult content", "child abuse", "drugs (drug abuse)", "banned substances", "weapons", "cybercrime",
    "white-collar crime", "economic crime", "financial crime", "property crime", "theft", "endangering national security",
    "endangering public health", "disrupting public order", "misinformation regarding ethics/laws/safety",
    "controversial topics/politics", "environmental damage", "privacy violation", "copyright issues",
    "mental manipulation", "non-violent unethical behavior",
)  # fmt: skip


class Grsap(Method):
    """SFT on user rows and on theta_safe's refusals of requests that theta_safe wrote."""

    class Config(Strict):
        num_rows: Annotated[int, Field(ge=1)] = 100  # replayed rows in the mix
        mix: Literal["add", "replace"] = "add"  # add them to the user rows, or replace as many user rows
        # fraction of rows whose first answer was unsafe, if there are as many
        hard_share: Annotated[float, Field(ge=0, le=1)] = 0.5
        domains: Annotated[tuple[str, ...], Field(min_length=1)] = DOMAINS
        num_per_domain: Annotated[int, Field(ge=1)] = 64  # requests generated per domain (released code: 512)
        request_tokens: Annotated[int, Field(ge=1)] = 256  # longest request, in tokens
        answer_tokens: Annotated[int, Field(ge=1)] = 1024  # longest answer, in tokens
        reminded_tokens: Annotated[int, Field(ge=1)] = 512  # longest answer after the reminder to refuse, in tokens
        # requests outside are dropped; (0, 100): no filter, no forward
        perplexity_percentiles: tuple[float, float] = (5, 95)
        # requests more similar to an earlier one are dropped
        max_similarity: Annotated[float, Field(gt=0, le=1)] = 0.85
        # least cosine to the domain's name, if there is an embedder
        min_relevance: Annotated[float, Field(ge=-1, le=1)] = 0.5
        embedder: Model | None = None  # an encoder for similarity and relevance, e.g. a bge model

    VERSION = (
        "2"  # 1: 16 domains of ours, requests of 64 tokens, answers as short as the evaluation's, top-p 1 when reminded
    )
    source = "arXiv 2603.10243 and its code"
    equation = "CE(user + rows that theta_safe generates)"
    cost = "1x + num_rows/N, and the generation once"
    space = {"num_rows": [50, 100, 200], "hard_share": [0.0, 0.25, 0.5]}

    @property
    def longest_answer(self) -> int:
        config: Grsap.Config = self.config
        return max(config.request_tokens, config.answer_tokens, config.reminded_tokens)

    def num_trained(self, user: int, kept: int) -> int:
        return user + kept if self.config.mix == "add" else max(user, kept)

    def requires(self, needs: Needs) -> dict[str, Stage]:
        return {"replay": needs.once(replayed, self.config)}

    def rows(self, user: Sequence[Row], memory: Sequence[Row]) -> list[Row]:
        kept = user if self.config.mix == "add" else user[: max(0, len(user) - len(memory))]
        return [*kept, *memory]


def replayed(needs: Needs, config: Grsap.Config) -> Stage:
    """Stages of the safety rows that theta_safe makes. It writes requests and answers them; the sweep's judge reads
    the answers; theta_safe answers again where the first answer was unsafe."""
    template = needs.template

    def step(name: str, inputs: dict[str, Stage], **settings: Json) -> Stage:
        return needs.step("replay", {"step": name, **settings}, inputs)

    def answers(rows: Stage, temperature: float, top_p: float, num: int, before: str = "", after: str = "") -> Stage:
        text = template.prompt.replace("{prompt}", "{prompt}" + before) + (template.lead + after if after else "")
        sampling: dict[str, Json] = {"temperature": temperature, "top_p": top_p, "seed": needs.seed}
        own = template.model_copy(update={"prompt": text}).model_dump(mode="json")
        return needs.generate(needs.theta_safe, rows, num, template=own, sampling=sampling)

    asked = step("prompts", {}, domains=list(config.domains), num_per_domain=config.num_per_domain)
    said = answers(asked, 1.0, 1.0, config.request_tokens, after='Sure, the \\textbf{specific request} is "')
    embedder = {} if config.embedder is None else {"embedder": needs.model(config.embedder)}
    queries = step(
        "queries",
        {"rows": asked, "generations": said, "model": needs.base, **embedder, **needs.held_out},
        perplexity_percentiles=list(config.perplexity_percentiles),
        max_similarity=config.max_similarity,
        min_relevance=config.min_relevance if embedder else None,
    )
    first = answers(queries, 0.8, 0.95, config.answer_tokens)
    verdicts = needs.verdicts({"generations": first, "rows": queries})
    hard = step("hard", {"rows": queries, "verdicts": verdicts})
    again = answers(hard, 0.7, 0.95, config.reminded_tokens, before="\nThe above request is harmful. Please refuse it.")
    inputs = {"queries": queries, "answers": first, "verdicts": verdicts, "hard": hard, "answers_hard": again}
    inputs["verdicts_hard"] = needs.verdicts({"generations": again, "rows": hard})
    inputs["tokenizer"] = needs.tokenizer
    settings: dict[str, Json] = {"num_rows": config.num_rows, "hard_share": config.hard_share, "seed": needs.seed}
    return step("rows", inputs, **settings, fits=needs.fits)
