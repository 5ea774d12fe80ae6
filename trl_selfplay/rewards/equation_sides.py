"""Where the expressions beside an equals sign begin and end.

In: the tokens between two equals signs of a phrase. Out: the expression at their end, or at their
start, unless it would be cut out of a longer one; and whether the words around it leave a doubt.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from trl_selfplay.rewards.arithmetic import Token

_MOST_UNIT_WORDS = 3
_NUMERIC = ("number", "percent", "close")
# Words between two numbers that combine them.
_JOINING = frozenset(("and", "or", "to", "of"))


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words before an expression that make its first number, or all of it, part of something else.
_BEFORE = _words(
    "by from than times plus minus over into twice double doubled triple half halves thrice quarter "
    "third quadruple squared cubed negative root square cube log ln sin cos tan sqrt max min gcd lcm exp "
    "abs average mean difference product power not isnt isn if suppose assume whether unless say wrong "
    "incorrect false mistake ratio percent divide divided multiply multiplied subtract"
)
# Words before "of" that say of what share or function the rest is: not "a total of 3 + 4 = 7".
_BEFORE_OF = _words(
    "half third thirds quarter quarters fourth fourths fifth fifths sixth eighth tenth percent root "
    "multiple power logarithm log average mean out one two three four five six seven eight nine ten"
)
# Words before a number that it belongs to: in "Step 1 - 3 + 4 = 7" nothing is subtracted.
_LABELS = _words(
    "step part case question problem equation example line row day week round no number item option "
    "exercise figure table chapter section page level stage"
)
# Words behind a number that change it.
_BEHIND = _words(
    "times plus minus over dozen hundred thousand million billion trillion squared cubed "
    "r rem remainder mod modulo percent divided multiplied half tens ones hundreds k"
)
# Words that are no units.
_FUNCTION_WORDS = _words(
    "a an and are as at because but by each equals for from gives has have he her his i if in into is "
    "it its left makes means minus more of on or our over plus remain remaining she since so that the "
    "their then there therefore these they this those thus times to total we were when where which "
    "will with would you your altogether hence now"
)


@dataclass(slots=True)
class Side:
    """One side of an equation, and whether what stands around it leaves a doubt."""

    tokens: list[Token]
    in_doubt: bool = False
    may_be_bullet: bool = False

    @property
    def computes(self) -> bool:
        """Whether there is anything to compute."""
        previous = ""
        for token in self.tokens:
            if token.kind == "fraction" or (
                token.kind == "operator" and previous not in ("", "operator", "open")
            ):
                return True
            if token.kind == "open" and previous in ("number", "close"):
                return True
            if token.kind not in ("currency", "word"):
                previous = token.kind
        return False

    @property
    def number(self) -> Token | None:
        """The number that this side is, if it is nothing else."""
        numbers = [token for token in self.tokens if token.kind == "number"]
        return None if len(numbers) != 1 or self.computes else numbers[0]


def suffix(piece: list[Token], *, starts_line: bool) -> Side | None:
    """Return the expression at the end of a piece, or None if it would be cut out of a longer one."""
    start = len(piece)
    depth = 0
    in_doubt = False
    while start > 0:
        token = piece[start - 1]
        following = piece[start] if start < len(piece) else None
        if token.kind in ("other", "dots"):
            return None
        if token.kind == "word":
            words = _words_before(piece, start)
            first = start - len(words)
            behind_number = first > 0 and piece[first - 1].kind in _NUMERIC
            if not (_are_units(words) and behind_number) or _is_operand(following):
                break
            start = first
            continue
        if token.kind in ("number", "close") and following is not None:
            if following.kind == "number" or (
                following.kind == "currency" and not following.is_attached
            ):
                return None  # two numbers beside each other
            in_doubt |= _is_operand(following) and not following.is_attached
        if token.kind == "open":
            if depth == 0:
                break
            depth -= 1
        depth += token.kind == "close"
        start -= 1
    tokens, before = piece[start:], piece[:start]
    if depth or not tokens or (before and not _may_precede(before, tokens)):
        return None
    return _with_sign(Side(tokens, in_doubt or _is_part(before, tokens)), before, starts_line)


def _may_precede(before: Sequence[Token], tokens: Sequence[Token]) -> bool:
    """Return False if an expression follows a variable, a name, or an operator's parenthesis."""
    last = before[-1]
    if last.kind == "word":
        return not tokens[0].is_attached and (len(last.text) > 1 or last.text.lower() in "ai")
    return len(before) < 2 or last.kind != "open" or before[-2].kind not in ("other", "fraction")


def _is_part(before: Sequence[Token], tokens: Sequence[Token]) -> bool:
    """Return whether the words before an expression may make it a part of something else."""
    if not before or before[-1].kind != "word":
        return False
    near = _words_before(before, len(before))
    words = [word.text.lower() for word in near]
    follows_number = len(near) < len(before) and before[-len(near) - 1].kind in _NUMERIC
    if follows_number and (_are_units(near) or not _JOINING.isdisjoint(words)):
        return True  # 2 hours 30 minutes; add 5 to 4 + 3; 20% of the remaining 30 + 5
    shares = (a in _BEFORE_OF and b == "of" for a, b in itertools.pairwise(words))
    is_numbered = words[-1] in _LABELS and len(tokens) > 1 and tokens[1].text == "-"
    return is_numbered or any(shares) or not _BEFORE.isdisjoint(words[-3:])


def _with_sign(side: Side, before: Sequence[Token], starts_line: bool) -> Side | None:
    """Look at the sign in front of an expression."""
    first = side.tokens[0]
    if first.kind == "percent" or (first.kind == "operator" and first.text not in "+-"):
        return None
    if first.kind == "operator" and len(side.tokens) > 1 and not side.tokens[1].is_attached:
        if before and before[-1].kind == "word":
            return None  # x - 3
        side.may_be_bullet = not before and starts_line and first.text == "-"
        side.in_doubt |= not side.may_be_bullet
    return side


def prefix(piece: list[Token]) -> tuple[Side, int] | None:
    """Return the expression at the start of a piece and where it ends, or None if it would be cut."""
    position = depth = 0
    in_doubt = False
    needs_operand = True
    while position < len(piece):
        token = piece[position]
        following = piece[position + 1] if position + 1 < len(piece) else None
        match token.kind:
            case "other":
                return None
            case "number" | "fraction":
                is_mixed = token.kind == "fraction" and token.is_attached
                if not needs_operand and not is_mixed:
                    return None  # two numbers beside each other
                needs_operand = token.kind == "fraction"
            case "operator":
                if needs_operand and token.text not in "+-":
                    return None
                if not _is_operand(following) and not _is_sign(following):
                    if needs_operand or depth or not _is_dash(token, following):
                        return None
                    in_doubt |= following is not None and following.text not in _FUNCTION_WORDS
                    break
                needs_operand = True
            case "open":
                if not needs_operand and not token.is_attached and depth == 0:
                    in_doubt |= _is_operand(following) or _is_sign(following)
                    break
                needs_operand = True
                depth += 1
            case "close":
                if depth == 0:
                    break
                if needs_operand:
                    return None
                depth -= 1
            case "word":
                words = _words_after(piece, position)
                end = position + len(words)
                if needs_operand or (depth and not _are_units(words)):
                    return None
                in_doubt |= _changes(words, piece[end : end + 1], is_last=end == len(piece))
                if _are_units(words) and _stand_inside(piece, end, depth):
                    position = end
                    continue
                if depth:
                    return None
                # The first word is the unit, unless it is no unit.
                position += _are_units(words[:1]) and words[0].text.lower() not in _BEHIND
                break
            case "percent" if needs_operand:
                return None
        position += 1
    if depth or position == 0 or (needs_operand and position == len(piece)):
        return None
    return Side(piece[:position], in_doubt), position


def _is_operand(token: Token | None) -> bool:
    return token is not None and token.kind in ("number", "open", "fraction", "currency")


def _is_sign(token: Token | None) -> bool:
    return token is not None and token.kind == "operator" and token.text in "+-"


def _is_dash(dash: Token, word: Token | None) -> bool:
    """Return whether a sign behind a number is punctuation, not the minus of "7 - x"."""
    if word is None:
        return True
    return dash.text == "-" and word.kind == "word" and len(word.text) > 1 and not word.is_attached


def _stand_inside(piece: Sequence[Token], end: int, depth: int) -> bool:
    """Return whether an expression goes on behind words, or is over with them."""
    behind, following = [*piece[end : end + 2], None, None][:2]
    if behind is None:
        return True
    if behind.kind == "close":
        return depth > 0
    return behind.kind == "operator" and (_is_operand(following) or _is_sign(following))


def _changes(words: Sequence[Token], behind: Sequence[Token], *, is_last: bool) -> bool:
    """Return whether words behind a number change it: "7 hundred", "2 and a half", "2 more than"."""
    texts = [word.text.lower() for word in words]
    if "than" in texts[:2]:
        return True
    if texts[0] == "and" and (
        texts[1:2] == ["a"] or (len(texts) == 1 and behind and "/" in behind[0].text)
    ):
        return True
    if _are_units(words) and not is_last and _is_operand(behind[0]):
        return True  # 2 hours 30 minutes
    is_inside = _are_units(words) and not is_last and behind[0].kind in ("operator", "close")
    return not is_inside and not _BEHIND.isdisjoint(texts)


def _words_before(piece: Sequence[Token], end: int) -> list[Token]:
    start = end
    while start > 0 and piece[start - 1].kind == "word" and end - start <= _MOST_UNIT_WORDS:
        start -= 1
    return list(piece[start:end])


def _words_after(piece: Sequence[Token], start: int) -> list[Token]:
    end = start
    while end < len(piece) and piece[end].kind == "word" and end - start <= _MOST_UNIT_WORDS:
        end += 1
    return list(piece[start:end])


def _are_units(words: Sequence[Token]) -> bool:
    return 0 < len(words) <= _MOST_UNIT_WORDS and _FUNCTION_WORDS.isdisjoint(
        word.text.lower() for word in words
    )
