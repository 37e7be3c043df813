r"""Reads the letter of an option out of an answer, in the usual forms in which people and models write one.

Letters that the text denies ("not A", "B is wrong") are taken out first. Forms are tried in the order of `_FORMS`, from
the plainest to the loosest; the first that the text has decides. Where it names two letters, or one that is no option,
the text is unread. So \boxed{B} goes before "answer is B", that before a lone letter on the first or last line, that
before a text that begins "B.", that before "(B)" or **B** within a sentence, and that before a letter that ends a
clause.

Upper-case "A" and "I" are words too, and so is every lower-case letter. They count only where no word follows, or one
that gives a reason: "A because", never "A dog".
"""

import re
from collections.abc import Callable, Sequence

from mars_jax.data.formats.options import listed_letters

# Answers stand at the beginning or the end; of longer texts the middle is not read.
_LONGEST = 2000
# How the letter stands apart after markup: no part of a word or of a name such as B-52, C++ or D's.
_BEFORE, _AFTER = r"(?<![\w'\u2019/\-])", r"(?![\w+#'\u2019]|-\w)"
_REASON = r"(?:because|since|as|due|which|based|so|for)\b"
# Letters that are denied: "not A", "neither A nor B", "rather than A", "B is wrong", "(B) cannot be".
_LETTER = r"[(\[*\"'`]{0,4}(?<!\w)[A-Z](?!\w)[)\]*\"'`]{0,4}"
_DENIED = re.compile(
    r"(?i:\b(?:not|never|cannot|neither|nor|rather than|instead of|except|anything but)|n['\u2019]t)"
    rf"(?i:\s+(?:be|the|option|choice|answer|letter))*\s+{_LETTER}(?:\s*(?:,|/|or|nor|and)+\s*{_LETTER})*(?!\s*\+)"
    rf"|(?:(?i:\boption|\bchoice|\banswer)\s+)?{_LETTER}\s+(?:(?:is|was|seems|looks)\s+(?:not|wrong|incorrect|false)\b"
    r"|(?:is|was|does|did|can|could|wo|would)n?['\u2019]t\b|(?:cannot|can not|does not|did not)\b)"
)
# Words before a letter that names something else, or stands beside another letter.
_NAMED = re.compile(
    r"\b(?:or|and|(?i:at|in|on|near|from|an?|mr|ms|dr|vitamin|hepatitis|plan|figure|fig|point|type|class|grade|group|line"
    r"|panel|image|picture|section|part|step|table|room|team|player))[.]?\s+[(\"'*]*$"
)
# "A" and "I" are words where another follows, unless it gives a reason.
_NO_WORD = rf"(?!\s+(?!{_REASON}|(?:or|and)\b)[a-z])"
_UPPER = rf"{_BEFORE}(?:([B-HJ-Z]){_AFTER}|([AI]){_AFTER}{_NO_WORD})"
# After "answer is" a lower-case letter counts too, if nothing but punctuation follows.
_EITHER = rf"(?:{_UPPER}|{_BEFORE}([a-z])(?=\s*(?:[.,;:!)]|$|\n)))"

_NOUN = r"(?:answer|option|choice|response|solution|letter|result|ans|antwort|respuesta|réponse)"
_LINK = r"(?:\s*(?::|=|-|\u2013|\u2014|->|→|\bis\b|\bwould be\b|\bmust be\b|\bshould be\b|\bwill be\b))+"
_FILLER = r"(?:\s*\b(?:the|most likely|probably|clearly|therefore|option|choice|letter|answer|number)\b)*"
_ANSWER = re.compile(
    rf"\b(?i:{_NOUN}){'(?i:' + _LINK + ')'}(?i:{_FILLER}):?\s*\(?{_EITHER}"
    rf"|\b(?i:choose|pick|select|go with|going with|opt for)(?i:{_FILLER}):?\s*\(?{_EITHER}"
    rf"|(?:答案|(?<!不)(?:选择|選擇|选|選)|正解|答え|정답)\s*(?:是|为|為|は|은)?\s*:?\s*(?:选项|選項)?\s*\(?([A-Za-z])(?![A-Za-z])"
)
_IS_RIGHT = re.compile(
    rf"{_BEFORE}([A-Z])\)?\s+(?:is|was|seems|looks)\s+(?:(?:the|most|likely|probably|clearly)\s+)*"
    r"(?:correct|right|best|true|the answer|answer|my answer|my choice)\b"
)
_BOX = re.compile(r"\\f?boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_TAG = re.compile(
    r"<(answer|final_answer|final-answer|ans|choice|option|response|result)\b[^<>]*>(.*?)</\1\s*>", re.I | re.S
)
_THOUGHT = re.compile(r".*</think(?:ing)?\s*>", re.I | re.S)

# Markup around a letter or a phrase, taken away before reading.
_TEX = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mathsf|bf|rm|f?boxed)\b\s*")
_MARKUP = re.compile(
    r"\\[()\[\]]|\$+|`+|\*+|_{2,}|(?<!\w)_(?=\w)|(?<=\w)_(?!\w)|~~|[{}]|#+(?=\s)"
    r"|</[A-Za-z][^<>]*>|<(?![A-Z]>)[A-Za-z][^<>]*>|<\|[^<>|]*\|>"
)
_OPEN, _CLOSE = (
    r"(\[{<\"'`“”\u2018\u2019«»„\u201a\u2039\u203a「『【《〈",
    r")\]}>\"'`“”\u2018\u2019«»\u2039\u203a」』】》〉",
)
_WRAPPED = re.compile(rf"(?<!\w)[{_OPEN}]+\s*([A-Z])\s*[.,:;]?\s*[{_CLOSE}]+(?!\w)")
_EMPHASIS = re.compile(
    r"(?<![\w*`$])(?:\*+|_+|`+|\$+|~~|\\[(\[])\s*([A-Z])\s*[.,:;)]?\s*(?:\*+|_+|`+|\$+|~~|\\[)\]])(?![\w*`$])"
)
_ALONE = re.compile(rf"[\s{_OPEN}]*(?:(?:option|choice|letter)\s+)?([A-Za-z])[\s.,:;!?、。{_CLOSE}]*", re.I)
_BEGINS = re.compile(
    rf"[{_OPEN}]*(?:(?i:option|choice)\s+)?"
    rf"(?:([A-Z])[{_CLOSE}]*(?:\s*[.):,;/、。](?![\w.](?<=[\x00-\x7f]))|\s+[-\u2013\u2014=]|\s+{_REASON}|\s+\([^()]*\)\.?$)|([a-z])[.)]\s)"
)
# A second letter in a list: "A or B", "A, B and C".
_ALSO = re.compile(
    r"[)\].\"']*\s*(?:(?:/|&|\+|\bor\b|\band\b)\s*\(?([A-Z])(?!\w)"
    r"|,\s*\(?([A-Z])(?!\w)(?=[)\]]*\s*(?:$|[.,/&\n]|or\b|and\b|are\b)))"
)
_ONLY_LETTERS = re.compile(
    r"(?:(?:both|either)\s+)?(?:[(\[\"']*[A-Z][)\]\"'.:;]*(?:\s*(?:[,/&+]|\band\b|\bor\b)+)?\s*)+"
)


def read_letter(text: str, letters: Sequence[str]) -> str | None:
    """The letter that a text gives as its answer, or None.

    Args:
        text: of the answer, in Unicode's form NFKC.
        letters: of the options, upper case.
    """
    if len(text) > 2 * _LONGEST:
        text = f"{text[:_LONGEST]}\n{text[-_LONGEST:]}"
    text = _THOUGHT.sub("", text).strip() or text
    text = _DENIED.sub("", text)
    if _ONLY_LETTERS.fullmatch(_plain(text)) and len(set(re.findall(r"\b[A-Z]\b", text))) > 1:
        return None
    for form in _FORMS:
        found = form(text, letters)
        if found:
            letter = found.pop()
            return letter if not found and letter in letters else None
    return None


def _plain(text: str) -> str:
    """A text without markup."""
    while True:
        plainer = _MARKUP.sub("", _TEX.sub("", text))
        if plainer == text:
            return text.strip()
        text = plainer


def _letters(matches: Sequence[tuple[str, ...] | str]) -> set[str]:
    return {"".join(match).upper() for match in matches}


def _marked(text: str, letters: Sequence[str]) -> set[str]:
    r"""Letters that begin what \boxed{} or a tag such as <answer> holds."""
    inside = [match[1] for match in _BOX.finditer(text)] or [match[2] for match in _TAG.finditer(text)]
    return set().union(*(_stated(part, letters) or _lone(part, letters) or _begins(part, letters) for part in inside))


def _stated(text: str, letters: Sequence[str]) -> set[str]:
    """Letters after "answer is" and the like, or before "is correct"."""
    plain = _plain(text)
    found = list(_ANSWER.finditer(plain)) or list(_IS_RIGHT.finditer(plain))
    more = [also[1] or also[2] for match in found if (also := _ALSO.match(plain, match.end()))]
    return _letters(["".join(filter(None, match.groups())) for match in found] + more)


def _lone(text: str, letters: Sequence[str]) -> set[str]:
    """Letters that are all of the first line or of the last."""
    lines = [line for line in _plain(text).splitlines() if line.strip()]
    ends = {lines[0], lines[-1]} if lines else set()
    found = [match[1] for line in ends if (match := _ALONE.fullmatch(line))]
    return _letters(found)


def _begins(text: str, letters: Sequence[str]) -> set[str]:
    """The letter that a text begins with, set apart by punctuation or followed by a reason, unless it lists options."""
    plain = _plain(text)
    matches = [_BEGINS.match(line.strip()) for line in plain.splitlines()]
    first = matches[0] if matches else None
    if first is None:
        return set()
    found = [(match[1] or match[2]).upper() for match in matches if match]
    if len(letters) > 1 and (found[:2] == list(letters[:2]) or listed_letters(plain) == "".join(letters)):
        return set(letters)
    also = _ALSO.match(plain, first.end(first.lastindex or 0))
    return {found[0], also[1] or also[2]} if also else {found[0]}


def _wrapped(text: str, letters: Sequence[str]) -> set[str]:
    """Options' letters within brackets, quotes or emphasis."""
    return _letters(_EMPHASIS.findall(text) + _WRAPPED.findall(_plain(text))) & set(letters)


def _apart(text: str, letters: Sequence[str]) -> set[str]:
    """Options' letters after "option", or that end a clause or the text."""
    plain = _plain(text)
    named = re.findall(rf"(?i:\b(?:option|choice))\s+\(?{_UPPER}", plain)
    ending = [
        match[1]
        for match in re.finditer(rf"{_BEFORE}([A-Z])(?=\s*[.):,;!?、。](?!\w)|\s*$)", plain)
        if not _NAMED.search(plain[max(0, match.start() - 30) : match.start()])
    ]
    return (_letters(named) | _letters(ending)) & set(letters)


_FORMS: tuple[Callable[[str, Sequence[str]], set[str]], ...] = (_marked, _stated, _lone, _begins, _wrapped, _apart)
