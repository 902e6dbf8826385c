"""GR-SAP: generative replay for safety alignment preservation. Mix in safety rows that the aligned model makes itself.

    L(theta) = CE(user + B'),    B' = {(x', y')}: x' extracted from theta_safe domain by domain, y' its own safe answer

    paper               code
    B'                  the cached `replay` stages: `replayed`, at the end of this file
    x'                  the quoted continuation of: Sure, the \\textbf{specific request} is "
    y' (easy, hard)     an answer that the sweep's judge calls safe; else one given again with a reminder to refuse
    control, ratio      config.mix (`add` or `replace` user rows), config.num_rows, config.hard_share

Source: arXiv 2603.10243 (GR-SAP) and its released code.

Same as the released code: prompt, prefill, temperatures (1.0; .8 with top-p .95; .7), perplexity percentiles 5-95, cosine
.85 and .5, half of the rows hard. Different: the perplexity is the sweep's base model's (theirs: Qwen2.5-0.5B); near-duplicates
are found by words and relevance is not filtered unless `embedder` names an encoder (theirs: bge-small-en-v1.5); the judge
is the sweep's (theirs: WildGuard); a verdict that cannot be read drops the row (theirs too, silently; it is counted here);
queries like a test prompt are dropped; shuffles are seeded; the domains are ours, after public hazard taxonomies (their list
of 38 is not at hand). Their training settings (lr 2e-6, one epoch) are the sweep file's to choose.
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

DOMAINS = (
    "violent crime", "theft and fraud", "weapons", "illegal drugs", "hacking and malware", "hate and harassment",
    "sexual content", "child safety", "self-harm", "privacy", "misinformation", "dangerous advice", "terrorism",
    "election interference", "intellectual property", "animal cruelty",
)  # fmt: skip


class Grsap(Method):
    """SFT on user rows and on refusals that theta_safe gave to requests it made up."""

    class Config(Strict):
        num_rows: Annotated[int, Field(ge=1)] = 100  # replayed rows in the mix
        mix: Literal["add", "replace"] = "add"  # beside the user rows, or in place of as many
        hard_share: Annotated[float, Field(ge=0, le=1)] = (
            0.5  # of rows that were first answered unsafely, where there are
        )
        domains: Annotated[tuple[str, ...], Field(min_length=1)] = DOMAINS
        num_per_domain: Annotated[int, Field(ge=1)] = 64  # requests asked for (released: 512)
        perplexity_percentiles: tuple[float, float] = (5, 95)  # (0, 100): no filter, no forward
        max_similarity: Annotated[float, Field(gt=0, le=1)] = 0.85  # to any earlier query
        min_relevance: Annotated[float, Field(ge=-1, le=1)] = 0.5  # cosine to the domain's name, with an embedder
        embedder: Model | None = None  # an encoder for similarity and relevance, e.g. a bge model

    source = "arXiv 2603.10243 and its code"
    equation = "CE(user + rows that theta_safe generates)"
    cost = "1x + num_rows/N, and the generation once"
    space = {"num_rows": [50, 100, 200], "hard_share": [0.0, 0.25, 0.5]}

    def requires(self, needs: Needs) -> dict[str, Stage]:
        return {"replay": needs.once(replayed, self.config)}

    def rows(self, user: Sequence[Row], memory: Sequence[Row]) -> list[Row]:
        kept = user if self.config.mix == "add" else user[: max(0, len(user) - len(memory))]
        return [*kept, *memory]


def replayed(needs: Needs, config: Grsap.Config) -> Stage:
    """Safety rows that theta_safe makes: it names requests, answers them, is judged, answers the unsafe ones again."""
    template, longest = needs.template, needs.max_new_tokens

    def step(name: str, inputs: dict[str, Stage], **settings: Json) -> Stage:
        return needs.step("replay", {"step": name, **settings}, inputs)

    def answers(rows: Stage, temperature: float, top_p: float, num: int, before: str = "", after: str = "") -> Stage:
        text = template.prompt.replace("{prompt}", "{prompt}" + before) + (template.lead + after if after else "")
        sampling: dict[str, Json] = {"temperature": temperature, "top_p": top_p, "seed": needs.seed}
        own = template.model_copy(update={"prompt": text}).model_dump(mode="json")
        return needs.generate(needs.theta_safe, rows, num, template=own, sampling=sampling)

    asked = step("prompts", {}, domains=list(config.domains), num_per_domain=config.num_per_domain)
    said = answers(asked, 1.0, 1.0, 64, after='Sure, the \\textbf{specific request} is "')
    embedder = {} if config.embedder is None else {"embedder": needs.model(config.embedder)}
    queries = step(
        "queries",
        {"rows": asked, "generations": said, "model": needs.base, **embedder, **needs.held_out},
        perplexity_percentiles=list(config.perplexity_percentiles),
        max_similarity=config.max_similarity,
        min_relevance=config.min_relevance if embedder else None,
    )
    first = answers(queries, 0.8, 0.95, longest)
    verdicts = needs.verdicts({"generations": first, "rows": queries})
    hard = step("hard", {"rows": queries, "verdicts": verdicts})
    again = answers(hard, 0.7, 1.0, longest, before="\nThe above request is harmful. Please refuse it.")
    inputs = {"queries": queries, "answers": first, "verdicts": verdicts, "hard": hard, "answers_hard": again}
    inputs["verdicts_hard"] = needs.verdicts({"generations": again, "rows": hard})
    inputs["tokenizer"] = needs.tokenizer
    settings: dict[str, Json] = {"num_rows": config.num_rows, "hard_share": config.hard_share, "seed": needs.seed}
    return step("rows", inputs, **settings, fits=needs.fits)
