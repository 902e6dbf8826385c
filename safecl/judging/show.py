"""Results of `safecl judge` as columns and rows of text. Shares are printed in percent, kappa as a plain number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Cells = tuple[list[str], list[list[str]]]


def rates(result: Mapping[str, Any]) -> Cells:
    """One row a judge, and one for the agreement of two."""
    rows = [
        [name, found["question"], str(found["num"]), str(found["unparsed"]), _percent(found["rate"])]
        + ([_percent(found["corrected"])] if "corrected" in found else [])
        for name, found in result["judges"].items()
    ]
    columns = ["judge", "question", "read", "unparsed", "yes"]
    columns += ["corrected"] if any("corrected" in found for found in result["judges"].values()) else []
    if both := result.get("agreement"):
        asked = "do they agree?" if both["evidence"] else "do the two rules agree? (no evidence that either is right)"
        told = f"{_percent(both['agree'])}, kappa {_number(both['kappa'])}"
        rows.append(["both", asked, str(both["num"]), str(both["skipped"]), told])
    return columns, rows


def why_not(entries: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """A line for each rate that was not corrected."""
    return [
        f"{name}: not corrected: {found['why_not']}" for name, found in entries.items() if found and "why_not" in found
    ]


def quality(result: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """One table a judge: all rows, then each group."""
    for name, entry in result["judges"].items():
        groups = {"all": entry["all"], **entry.get("by", {})}
        yield f"{name} against {result['label']} = {' or '.join(result['positive'])}", *qualities(groups)


def qualities(groups: Mapping[str, Mapping[str, Any] | None]) -> Cells:
    """One row a group."""
    shares = ("truth", "said", "accuracy", "sensitivity", "specificity")
    columns = ["rows", "read", *shares, "f1", "kappa", "auroc"]
    has_corrected = any(found and "corrected" in found for found in groups.values())
    rows = []
    for name, found in groups.items():
        if found is None:
            rows.append([name, "0"])
            continue
        row = [name, str(found["num"]), *(_percent(found[share]) for share in shares)]
        row += [_number(found[measure]) for measure in ("f1", "kappa", "auroc")]
        rows.append(row + ([_percent(found.get("corrected"))] if has_corrected else []))
    return columns + (["corrected"] if has_corrected else []), rows


def _percent(found: Mapping[str, float] | None) -> str:
    return "-" if found is None else f"{found['value']:.1%} [{found['low']:.1%}, {found['high']:.1%}]"


def _number(found: Mapping[str, float] | None) -> str:
    return "-" if found is None else f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
