"""Guard filter: SFT on the user rows that the sweep's judge calls safe. A common baseline of providers.

    L(theta) = CE({(x, y) in user: judge(x, y) = safe})

    symbol              code
    judge               `evaluate.judges.asr`, asked once about each user row's own answer (the judge stage, shared by all trials)
    filtered            rows judged harmful, and rows whose verdict could not be read (unless `unread: keep`): not trained on

Source: common practice; e.g. the moderation of fine-tuning data described by OpenAI, and the filtering baseline of
Huang et al. (harmful fine-tuning survey, arXiv 2409.18169). No reference code.

The judge that filters also measures ASR later. A harmful row that it misses when filtering, it also misses when
measuring. So read the result beside a second judge. Fewer rows mean fewer steps: `rows`, `filtered` and
`filtered_poison` of each record give the numbers, and a table's notes repeat them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from safecl.base import ConfigError, Json, Strict
from safecl.methods import Method, Needs
from safecl.tasks import Row

if TYPE_CHECKING:
    from safecl.store import Stage


class Guardfilter(Method):
    """SFT on the user rows that the judge calls safe."""

    class Config(Strict):
        unread: Literal["drop", "keep"] = "drop"  # rows whose verdict could not be read

    source = "the baseline that every provider runs"
    equation = "CE(user rows that the judge calls safe)"
    cost = "1x less what is filtered, and a verdict a row"

    def requires(self, needs: Needs) -> dict[str, Stage]:
        return {"verdicts": needs.verdicts({"rows": needs.user_rows})}

    def rows(self, user: Sequence[Row], memory: Sequence[Row]) -> list[Row]:
        safe: tuple[Json, ...] = (False,) if self.config.unread == "drop" else (False, None)
        kept = [row for row in user if row.meta["unsafe"] in safe]
        if not kept:
            raise ConfigError(
                f"guardfilter: the judge calls none of {len(user)} user rows safe; is it a judge of answers to this task?"
            )
        return kept
