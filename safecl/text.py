"""Normalised text for rules: one spelling for each meaning. All judges and scorers by rule read text through these
functions. Files keep the original text.

Rules look for words and numbers. Models write these with typographic apostrophes, Markdown, wide or Arabic digits, or
Unicode's minus sign, and after their reasoning. Each function here takes linear time for text of any length.
"""

from __future__ import annotations

import re
import unicodedata

# How models mark their reasoning: DeepSeek and Qwen (and models with the same opening tag), Magistral, Cohere, Sky-T1,
# Kimi.
_OPEN = (
    r"<(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning)>|\[THINK\]|<\|START_THINKING\|>|<\|begin_of_thought\|>|◁think▷"
)
_CLOSE = (
    r"</(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning)>|\[/THINK\]|<\|END_THINKING\|>|<\|end_of_thought\|>|◁/think▷"
    r"|<\|channel\|>final<\|message\|>"  # gpt-oss: all channels before the last are its own
)
_TAG = re.compile(rf"(?<!`)(?:(?P<open>{_OPEN})|(?P<close>{_CLOSE}))(?!`)", re.IGNORECASE)

_APOSTROPHES = "\u2018\u2019\u201b\u02b9\u02bb\u02bc\u02bd\u2032\ua78c\u00b4"
_QUOTES = "\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb"
_HYPHENS = "\u2010\u2011\u2012\u2212\u02d7\u2796"  # dashes stay: they separate sentences and ranges
_ESCAPED = re.compile(
    "&(?:#0*39|#x0*27|#8217|#x2019|apos|[rl]squo);|\u00e2\u20ac\u2122", re.IGNORECASE
)  # the last: ’ misread
_TICK = re.compile(r"(?<=[^\W\d_])`(?=[^\W\d_])")  # I`m
# Kinds of Unicode decomposition: another shape, the same meaning.
_KINDS = ("<wide>", "<narrow>", "<font>", "<noBreak>", "<compat>")

_RULES = re.compile(r"^[ \t]*(?:[-*_=]{3,}|```[\w+-]*|~~~[\w+-]*)[ \t]*$", re.MULTILINE)
_MARKERS = re.compile(r"^[ \t]*(?:(?:#{1,6}|>+|[-*+\u2022\u25aa\u25e6\u2023]|\d{1,3}[.)])[ \t]+)+", re.MULTILINE)
_HTML = re.compile(
    r"</?(?:b|i|u|em|strong|p|br|h[1-6]|div|span|answer|response|output)(?: [^<>]{0,200})?/?>", re.IGNORECASE
)
_EMPHASIS = re.compile(
    r"(?<![\w*])\*{1,3}(?=\S)|(?<=[^\s*])\*{1,3}(?![\w*])|(?<!\w)_{1,3}(?=[^\W_])|(?<=[^\W_])_{1,3}(?!\w)"
)


class _Fold(dict[int, str]):
    """Map from character codes to their replacement, computed when a character is first met."""

    def __missing__(self, code: int) -> str:
        self[code] = _fold(chr(code))
        return self[code]


def _fold(char: str) -> str:
    if char < "\x7f":
        return char
    if char in _APOSTROPHES:
        return "'"
    if char in _QUOTES:
        return '"'
    if char in _HYPHENS:
        return "-"
    kind, category = unicodedata.decomposition(char).partition(" ")[0], unicodedata.category(char)
    if category == "Nd":
        return str(unicodedata.decimal(char))
    if category == "Zs":
        return " "
    if category in ("Zl", "Zp"):
        return "\n"
    if category == "Cf" or 0xFE00 <= ord(char) <= 0xFE0F:  # zero width, direction, soft hyphens, variation selectors
        return ""
    return unicodedata.normalize("NFKC", char) if kind in _KINDS else char


_FOLD = _Fold()


def without_reasoning(text: str) -> str:
    """The answer without the model's reasoning before it.

    A reasoning block goes from its opening tag to the next closing tag, or to the end of a text that was cut inside the
    block. If there is only a closing tag (the template wrote the opening tag in the prompt), everything before it is
    reasoning. A tag quoted in backticks is text. Text without a tag is returned unchanged, including its blanks.
    """
    kept: list[str] = []
    place, inside = 0, False
    for tag in _TAG.finditer(text):
        if tag["close"]:
            if not inside:
                kept.clear()
            inside = False
        elif inside:
            continue
        else:
            kept.append(text[place : tag.start()])
            inside = True
        place = tag.end()
    if place == 0:
        return text
    return "".join([*kept, "" if inside else text[place:]]).strip()


def same_characters(text: str) -> str:
    """The text in a uniform spelling: one apostrophe, one quotation mark, one character for hyphen and minus, ASCII
    digits, plain blanks. Characters of zero width are removed. Letters of other shapes (wide, bold, ligatures) become
    plain ones. Superscripts and fractions stay."""
    if text.isascii():
        return _TICK.sub("'", _ESCAPED.sub("'", text))
    return _TICK.sub("'", _ESCAPED.sub("'", text).translate(_FOLD))


def without_markdown(text: str) -> str:
    """The text without emphasis, headings, list marks, block quotes, rules, fences and simple HTML. Its words stay."""
    text = _MARKERS.sub("", _HTML.sub("", _RULES.sub("", text)))
    return _EMPHASIS.sub("", text).replace("`", "")


def plain(text: str) -> str:
    """The text for a rule that looks for words: the answer without reasoning and Markdown, in plain characters,
    stripped. Upper case and line breaks stay."""
    return without_markdown(same_characters(without_reasoning(text))).strip()


_LATEX = (
    (re.compile(r"(?<=\d)(?:\{,\}|\\,|\\!,\s?|,\\!)(?=\d{3}(?!\d))"), ","),
    (re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\(?:boxed|text|textbf|mathbf|mathrm|fbox)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\(?=[$%#&_])|\\[()\[\]]"), ""),
)
_FRACTION = re.compile(r"(\d?)([\u00bc-\u00be\u2150-\u215e])")
_DASH = re.compile(
    r"(?<![\w)\]])[\u2013\u2014](?=[$\u20ac\u00a3]?\.?\d)"
)  # a dash that has nothing before it is a minus
_GROUPED = re.compile(r"(?<=\d)[\u00a0\u202f\u2009'\u2019\u066c](?=\d{3}(?!\d))")


def number_text(text: str) -> str:
    """The text for a rule that looks for numbers: the answer without reasoning, with numbers as in "-1,250.5", "$18.00"
    and "1 1/2".

    Digits, minus and decimal points become ASCII. LaTeX's `\\frac`, `\\boxed`, `{,}` and `\\$` are undone, and emphasis
    is removed. Thousands separated by a thin or no-break blank or an apostrophe are separated by a comma. Headings and
    list numbers stay ("#### 18").
    """
    text = without_reasoning(text)
    text = _FRACTION.sub(lambda found: found[1] + (" " if found[1] else "") + _over(found[2]), text)
    text = same_characters(_DASH.sub("-", _GROUPED.sub(",", text)).replace("\u066b", ".").replace("\u2044", "/"))
    for pattern, instead in _LATEX:
        text = pattern.sub(instead, text)
    return _EMPHASIS.sub("", text)


def _over(fraction: str) -> str:
    return unicodedata.normalize("NFKC", fraction).replace("\u2044", "/")
