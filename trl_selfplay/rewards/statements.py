r"""Find where a text states its answer, and decide which statement counts.

In: a text without thoughts. Out: its statements in order, such as `\boxed{7}` or "the answer is 7",
and the one that stands: the last, unless two contradict each other without a word about it, or what
follows takes the last one back. Everything takes linear time: repetitions in the patterns are bounded,
and each text after a marker is read up to the next one.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

# How final a statement is: a result on the way, an answer, the answer in a marker made for it.
STEP, ANSWER, FINAL = 0, 1, 2
_MOST_CHARACTERS = 2000
# Earlier statements of a text that goes on and on aren't read.
_MOST_STATEMENTS = 100
_ADJECTIVE = (
    r"(?:final|correct|right|best|exact|numerical|numeric|short|complete|overall|actual|simplified)"
)
_MARKED_NOUN = re.compile(
    rf"(?<![\w\"'<\\/-])(?P<adjectives>(?:(?:the|my|our|your)\s{{1,4}})?(?:{_ADJECTIVE}\s{{1,4}}){{0,2}})"
    r"(?P<noun>answer|ans|results?|outputs?|solution(?:\s{1,4}set)?|total|sum|value|number|amount)(?![\w'’-])"
    r"(?:\s{1,4}of\s{1,4}[^\n.,:=]{1,20}?(?=\s(?:is|was)\s))?(?:,\s[^,.\n]{1,60},)?"
    # "to the question", "to this problem"
    r"(?:\s{1,4}(?:to|for)\s{1,4}(?:the|this|your|our)\s{1,4}(?:[a-z]{1,12}\s{1,4}){0,2}"
    r"(?:question|problem|puzzle|exercise|riddle|task|equation|expression)"
    r"|\s{1,4}to\s{1,4}(?:part|question|problem)\s{1,4}\(?\w{1,3}\)?)?"
    r"(?:[*_`)\]}\"]{0,6}\s{0,4}(?P<verb>(?:is|was|equals|would\s{1,4}be|should\s{1,4}be|must\s{1,4}be"
    r"|will\s{1,4}be|has\s{1,4}to\s{1,4}be|comes\s{1,4}(?:out\s{1,4})?to(?:\s{1,4}be)?"
    r"|turns\s{1,4}out\s{1,4}to\s{1,4}be|becomes)(?![\w'’]))"
    r"(?:[*_`\s]{0,4}[:：])?"
    r"|[*_`)\]}\" \t]{0,8}(?P<colon>[:：=]|→|⇒|->)|(?P<period>\.)(?=[ \t]{1,3}[-$\d])"
    r"|[*_`) \t]{0,8}(?P<cell>\|)"
    r"|[*_`)\]}\" \t]{0,8}(?P<line>(?=\n|\Z)))",
    re.IGNORECASE,
)
_ANSWERS = ("answer", "ans")
# "Antwort: 5", "la respuesta es 5", "答案是 5": the word for an answer, and what follows it.
_OTHER_LANGUAGES = re.compile(
    r"(?:(?<!\w)(?:antwort|l[öo]sung|ergebnis|r[ée]ponse|r[ée]sultat|respuesta|resultado|risposta|resposta|ответ)"
    r"(?:\s{1,3}(?:final|finale|correcta|correcte|corretta|correta|lautet))?"
    r"[*_]{0,3}\s{0,3}(?:[:：]|(?:ist|lautet|es|est|è|é)(?!\w)\s?[:：]?)"
    r"|(?:答案|答え|答|정답|답)[*_]{0,3}\s{0,3}(?:[:：]|是|为|為|は|은)[:：]?)[\s*_]{0,6}",
    re.IGNORECASE,
)
_COPULA = re.compile(r"\s{0,3}(?:です|である|だ|입니다|이다|个|個)+$")
_DENIED_ELSEWHERE = re.compile(
    r"(?:nicht|kein|keine|pas|no|non|não|не|不是|不|没有)(?!\w)", re.IGNORECASE
)
_ADJECTIVES = re.compile(r"final|correct|right|actual")
# What stands between a line's beginning and a label.
_LINE_START = re.compile(
    r"(?:^|\n)[ \t>|#*_`•\-–—\[({]{0,16}(?:\\[a-z]{4,6}\{)?(?:\d{1,2}[.)][ \t])?[*_]{0,3}$"
)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s{0,3}(?:\{|(?P<bare>-?[\w.]{1,60}))?")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_MINUS_BEFORE = re.compile(
    r"(?:[=:(]|\bis|\bs)\s{0,4}(?:\$\$?|\\\(|\\\[)?\s{0,4}[-−]\s{0,2}$|(?:^|\n)\s{0,4}(?:(?:\$\$?|\\\(|\\\[)\s{0,4}[-−]\s{0,2}|[-−])$"
)
_BEHIND_BOX = re.compile(
    r"\s{0,3}\\?%|\$?\s{1,3}(?:hundred|thousand|million|billion|trillion|percent|per\s?cent)\b|\s{0,3}(?:\\times|\\cdot|×|\*)\s{0,3}10\s?\^\s?\{?[-−]?\d{1,3}\}?|\s{0,3}\\(?:text|mathrm|mbox|textrm)\s?\{[^{}]{0,30}\}|\^\{?\\circ\}?"
)
# A box that is a part of an expression, and no answer: `\sqrt{\boxed{7}}`, `3 \times \boxed{7}`, `\boxed{7}^2`.
_AROUND_BOX = re.compile(
    r"(?:\\(?:[dtc]?frac|sqrt|[dt]?binom|log|ln|sin|cos|tan|overline|bar|hat|vec)\s?(?:\[[^\[\]]{0,20}\]|\{[^{}]{0,60}\})?|[\^_])\s?$"
)
_BEFORE_BOX = re.compile(
    r"(?:\d|[\d)}\]][ \t]{0,3}(?:[-+*/×·÷−^]|\\(?:times|cdot|div|pm))[ \t]{0,3}"
    r"|\\(?:times|cdot|div|sqrt|log|ln|sin|cos|tan|neq?|[gl]eq?|[gl]eqslant)(?:_\{?\w{1,5}\}?)?[ \t]{0,3}|(?:[≠≤≥]|(?:(?<=[\w)}][ ])|(?<=\W[a-z]))[<>])[ \t]{0,3}|(?<![A-Za-z])[A-Za-z]\("
    r"|\b(?:not\s{1,3}true|untrue|false|incorrect|wrong)\s{1,3}that\s{1,3}"
    r"|\b(?:twice|double|triple|thrice|half|times|minus|plus|not|than)[ \t]{1,3})(?:\$|\\\()?[ \t]{0,3}\Z",
    re.IGNORECASE,
)
_AFTER_BOX = re.compile(
    r"(?:\{,\}|[.,])?\d|_|[a-zA-Z](?<![CFKLNgklms])(?![a-zA-Z])|\\(?:pi|sqrt|[dt]?frac|alpha|theta|ln|log|sin|cos|[bp]?mod)(?![a-z])|\s?mod\b"
    r"|[ \t]{0,3}(?:\$|\\\))?[ \t]{0,3}(?:\^(?!\{?\\circ)|!(?=[ \t]{0,3}[$\d\\])|[/*×·÷](?!\*)[ \t]{0,3}[\d(a-z\\]|\\(?:times|cdot|div|pm)(?![a-z])"
    r"|[-+−][ \t]{0,3}(?:\d|[a-zA-Z]\b|\\[a-z])|(?:times|plus|minus|divided\s{1,3}by|squared|cubed|doubled|tripled|halved)\b)"
)
_ALTERNATIVE = re.compile(r"[\s$*\\)\].]{0,6}(?:or|and/or)\s{1,4}(?:(?:maybe|possibly|perhaps|even|just)\s{1,4})?"
                          r"[$\\(*\-−\d]", re.IGNORECASE)  # fmt: skip
_JOINED = re.compile(r"[\s$*.,]{0,6}(?P<word>,|and|or|,\s?and|,\s?or)?[\s$*]{0,6}(?:[a-zA-Z](?:_\{?\w\}?)?\s?=\s?)?[\s$*]{0,6}",
                     re.IGNORECASE)  # fmt: skip
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]{0,8}([^\n]{0,1000})")
_NO_HEADING = re.compile(
    r"[*_$\\(\[£€¥-]{0,6}\s{0,2}(?:[-+−]?\d[\d,.]*(?:\s?[/:]\s?\d+)?(?:\s?%|\s[A-Za-z]+){0,2}|[A-Za-z]"
    r"|\\[a-z]+\{.*\}.*)[*_$\\)\].]{0,6}"
)
_HEADING = re.compile(
    r"[*_\d.)\s]{0,6}(?:step|part|case|method|approach|section|solution|explanation|conclusion|summary"
    r"|verification|verify|check|note|given|problem|question|(?:final\s+)?answer(?!,)|calculat|find|determine|let)",
    re.IGNORECASE,
)
_BRACKETS = re.compile(r"\[\[([^\[\]\n]{1,60})\]\](?!\()")
_TAG = re.compile(
    r"(?:<(?P<slash>/?)|\[(?P<bracket>/?))(?:final_?|the_?)?(?:answer|ans|output|result|response)(?:>|\])",
    re.IGNORECASE,
)
_QUESTION = re.compile(
    r"^Q(?:uestion)?:[^\n]{0,1000}\n{1,2}A:[ \t]{0,4}([^\n]{1,1000})", re.MULTILINE
)
_JSON = re.compile(
    r"(?P<quote>[\"'])(?:final|correct|the|selected|answer)?[_ ]?(?:answers?|result|choice|option)(?P=quote)\s{0,4}:\s{0,4}(?!\s)"
    r"(?P<value>\"(?:[^\"\\]|\\.){0,1000}\"|'(?:[^'\\]|\\.){0,1000}'|\[[^\]]{0,1000}\]|[^,{}\n\]\"']{1,200})",
    re.IGNORECASE,
)
# Words by which a statement isn't the writer's own: "if the answer is 5", "I don't think the answer is 5".
NOT_MEANT = re.compile(
    r"(?:\b(?:people|many|some|students|others|most)\s+(?:(?:\w+\s)?think|would|might|may|could)\b[^.!?\n;,:]*\Z)|(?:\b(?:initial|first|previous|earlier|original|old|intermediate|partial|example|sample|(?!(?:let|problem|question|puzzle|riddle|exercise|today|it)['’])[a-z]{1,20}['’]s|possible)[ \t]{0,4}\Z)|(?:(?:\b(?:of|than|times|plus|minus|by|twice|double|triple|thrice|half)|\d[ \t]?[%×*/+−-])[ \t]{1,4}(?:(?:the|my|our|your)[ \t]{1,4})?\Z)|(?:\b(?:if|suppose|supposing|assume|assuming|whether|unless|thinks|thought|says?|said|claims?|claimed"
    r"|believes?|might\s+(?:think|say|guess|expect)|may\s+think|would\s+say|could\s+say|wrong|incorrect"
    r"|mistake|mistakenly|not|never|cannot|nor|false|untrue|nobody|doubt|den(?:y|ies)|hardly|imagine|tempting|until|format|write|form)\b|n['’]t\b)[^.!?\n;,:]*\Z",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"[\s*_]{0,4}(?:(?:definitely|clearly|certainly|probably|simply|also)\s+)?"
    r"(?:(?:not|neither|never|no\s+longer|unclear|(?:still\s+)?unknown|wrong|incorrect|correct|right|obtained|found"
    r"|as\s+follows|simply\s+the|(?:of|in)\s+the\s+form)(?![\w,])|given\s+(?:by|as)\s*[^$\\\d])",
    re.IGNORECASE,
)
_NOT_BUT = re.compile(
    r"[\s*_]{0,4}(?:not|no\s+longer)\s[^.!?\n]{1,200}?,?\sbut\s(?:rather\s)?([^.!?\n]{1,200})$",
    re.IGNORECASE,
)
# Not the first word of a list: "that, on, his".
_FILLER = re.compile(
    r"(?:[\s*_`]{0,4}(?:simply|just|indeed|therefore|thus|hence|then|clearly|definitely|probably|likely|again|now"
    r"|equal\s+to|exactly|given\s+by|that|option|choice|approximately|about|around|roughly)\b"
    r"(?:[\s*_]{0,4}(?::|,(?=\s{0,3}[-$\\\d(*]))|(?!\s{0,3},)))*[\s*_`]{0,4}[:：]?",
    re.IGNORECASE,
)
# A word at the start of a sentence by which a writer changes his mind.
RETHINK = re.compile(
    r"(?:^|[.!?\n—–(…:;,*)$}\]-]|\bbut)[\s*_]{0,4}(?:(?:but|oh|oops|ah|hmm+|um|er|and|so)[,\s]{1,3})?"
    r"(?:wait|hold\s+on|hmm+|oops|correction|corrected|on\s+second\s+thoughts?|scratch\s+that|sorry|apologies|my\s+mistake"
    r"|i\s+(?:made|apologi[sz]e|was\s+wrong|forgot|mis\w+)|that(?:['’]s|\s+is|\s+was)\s+(?:wrong|not\s+right|incorrect|not\s+correct|a\s+mistake)"
    r"|let\s+me\s+(?:re|correct|double|check|fix|verify|try)|actually|no[,.!:;—–\s]|rather,|instead[,\s]|or\s+rather|i\s+mean|strike\s+that"
    r"|this\s+is\s+(?:wrong|not\s+right|incorrect)|alternatively|however|but\s+(?:that|this|then|we|i)\b|edit:|update:|revised|re-?check)",
    re.IGNORECASE,
)
CHANGE = re.compile(
    r"\b(?:wait|actually|rather|instead|mistake|error|wrong|incorrect|correct(?:ion|ed|ing)|revis\w+|recheck\w*|redo\w*"
    r"|recalculat\w*|reconsider\w*|oops|sorry|hold\s+on|second\s+thoughts?|should\s+(?:be|have)|not\s+right|forgot|however)\b"
    r"|\bno[,.!]|,\s{1,4}but\b",
    re.IGNORECASE,
)
_WORKING = re.compile(
    r"=|\b(?:step|next|then|now|second|part|finally|adding|add|after|result|remaining|left|gives|hence|therefore|subtract|multiply|divide|total|minus|plus|times)\b",
    re.IGNORECASE,
)
_CONFIRMED = re.compile(
    r"\b(?:correct|right|confirm\w*|consistent|checks?\s+out|verified|matches|works|good|yes|indeed|agrees|holds)\b",
    re.IGNORECASE,
)
_NOT_CONFIRMED = re.compile(
    r"\b(?:not|isn['’]t|doesn['’]t|incorrect|wrong)\b|n['’]t\b", re.IGNORECASE
)
_REFUSES = re.compile(
    r"[\s.,!?*—–(-]{0,8}(?:but\s)?(?:no|wait|oops|sorry|correction|scratch)\b", re.IGNORECASE
)
# "72 is incorrect", "(72, which isn't right)"
CALLED_WRONG = re.compile(
    r"[\s*_$\\)\]}.,\"'`(—–-]{0,8}(?:(?:but|and|though|although)\s{1,3})?(?:(?:which|that|this|it)\s{0,3})?"
    r"(?:(?:['’]s|is|was|are|were|would\s{1,3}be|seems|must\s{1,3}be|looks)\s{1,3}(?:\w{1,12}\s{1,3}){0,2}?(?:not(?=\s{1,3}(?:the|right|correct|true|it|possible|what|valid|an?\s{1,3}valid|so)\b|[*_]{0,3}[.!])"
    r"|wrong|incorrect|false|untrue|impossible|mistaken|off|never|out(?=[.!])|ruled\s{1,3}out|eliminated|excluded|too\s{1,3}(?:high|low|big|large|small)|an?\s{1,3}(?:common\s{1,3})?(?:mistake|trap|error|distractor))"
    r"|(?:isn|wasn|can|couldn|doesn|won)['’]?t\b|cannot\b|does\s{1,3}not\b)"
    r"|\s{0,3}(?:\((?:(?:this|that|it)\s{1,3}is\s{1,3})?(?:wrong|incorrect|false)|[$*]{0,3}\s{0,2}[❌✗✘]|\?[*_]{0,3}\s{1,3}no\b)",
    re.IGNORECASE,
)
_NUMBERS = re.compile(r"\d[\d,]*(?:\.\d+)?", re.ASCII)
_SHOULD_BE = re.compile(
    r"(?:(?:it|this|that|which|there|answer|total|result|value)\s{0,2}(?:['’]s|\s{1,2}(?:is|are|should\s+be|must\s+be|would\s+be))"
    r"|should\s+be|must\s+be|make\s+(?:it|that)|i\s+mean|or\s+rather|rather|\bno|correction|oops|sorry|actually|wait)"
    r"\s{0,3}[,:.—–-]?\s{0,3}(?:(?:it['’]s|it\s+is|it\s+should\s+be|no|make\s+that|that['’]s|actually|wait|rather)[\s,:]{1,3}){0,3}"
    r"(?P<value>[*_$\\(]{0,4}[-−]?[$£€]?\d[^\n.!?]{0,40}(?:\.\d[^\n.!?]{0,40})?)",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(
    r"(?<!\b[A-Z])(?<!\b(?:St|Dr|Mr|Ms|Mt|Jr|Sr|vs|No))(?<!\bMrs)(?<!\bsq)[.!](?=\s+[^a-z0-9\s]|\s*$|\*\*\s|[*_]{1,3}$)"
    r"|\?(?=\s)"
)
_REASON = re.compile(
    r"[,;]?\s{1,4}(?:because|since)\s|[,;]\s{0,4}(?:as|so|which|where|given\s+that|for|obtained|meaning|i\.e\.|that\s+is|due\s{1,4}to"
    r"|and\s{1,4}(?:that|this)|with|when|after|based\s{1,4}on)\s{1,4}[A-Za-z\\$]|\s[—–]\s{1,4}(?=[A-Za-z])|\s-\s{1,4}(?=[A-Za-z]{3})"
    r"|;\s|[,;]\s{0,4}(?:and\s{1,4})?not\s|\srather\s{1,4}than\s|\s\((?:that\s|i\.e\.|because|since|which|or\s|not\s|about|approximately|as\s|from\s|=)|(?:\.\.\.|…)\s{1,4}(?:no|wait|or|hmm+|actually|but|oh|let)\b|,\s{0,4}and\s{1,4}(?:each|she|he|they|it|the|we)\s|\s(?:is|as)\s{1,4}(?:the|your|our|my)\s{1,4}(?:final\s{1,4}|correct\s{1,4})?(?:answer|result)",
    re.IGNORECASE,
)
# "B. I hope it is correct", but not "B. Paris" nor "J. K. Rowling"
_LETTER_AND_SENTENCE = re.compile(
    r"([*_($]{0,4}[A-Z][*_)$]{0,4})[.!][*_]{0,2}\s+(?:I|It|Its|Wait|No|However|Actually|Oops|Sorry|Correction|Hmm+|Let|This|That|The|These|Those|Explanation"
    r"|Because|Since|So|Therefore|Thus|Here|We|If|As|In|Option|Options|Note|Hold|Other|But|And|By|For|When|Hope|My|You|All|None|There|Why|Reason\w*)\b"
)
_STARS = re.compile(r"(?<![\w)])\*\*|\*\*(?![\w(])")
_DISPLAY = (("\\[", "\\]"), ("$$", "$$"))
_FENCE = re.compile(r"```[\w+-]{0,20}[ \t]{0,8}\n(.*?)\n?[ \t]{0,8}```", re.DOTALL)
_ONLY_MARKUP = re.compile(
    r"(?:[\s*_`$#>|:：,.(){}\[\]\"'=-]|\\[\[\](){}]|\\(?:text|textbf|quad|displaystyle|left|mathbf)\b|\b(?:the|so|therefore|thus|hence|is|are|option"
    r"|[a-zA-Z]\s?=|approximately|about|equal\s+to|we\s+have|get)(?![A-Za-z]))*"
)


@dataclass(frozen=True, slots=True)
class Statement:
    """A place where a text states an answer.

    Attributes:
        start: Where its marker begins.
        value_start: Where the answer begins.
        end: Where the answer ends.
        value: The answer as written, or "" if the marker has none.
        finality: `STEP`, `ANSWER` or `FINAL`.
        is_enclosed: Whether the marker has an end of its own, as a box has.
    """

    start: int
    value_start: int
    end: int
    value: str
    finality: int
    is_enclosed: bool = False


def find_statements(text: str) -> list[Statement]:
    """Return the statements of a text in the order of their markers, without those that hold another."""
    found = sorted(
        [
            *_boxes(text),
            *_hashes(text),
            *_tags(text),
            *_brackets(text),
            *_json(text),
            *_questions(text),
            *_in_other_languages(text),
            *_sentences(text),
        ],
        key=lambda statement: (statement.start, -statement.end),
    )
    kept: list[Statement] = []
    for statement in found[-_MOST_STATEMENTS:]:
        outer = kept[-1] if kept else None
        if (
            outer
            and outer.value_start <= statement.start < max(outer.end, outer.value_start + 40)
            and (statement.start < outer.end or not (outer.value or outer.is_enclosed))
        ):
            before = text[outer.value_start : statement.start].strip()
            if _ONLY_MARKUP.fullmatch(before) or before.endswith(
                ("=", "≈", "\\approx", "\\implies", "→", "\\Rightarrow")
            ):
                kept.pop()
                finality = max(outer.finality, statement.finality)
                statement = replace(statement, start=outer.start, finality=finality)
            elif outer.is_enclosed:
                continue  # a part of what a box or a tag holds
            else:
                value = re.sub(r"[\s,;(]+(?:or|and|but|i\.e\.)?[\s(]*$", "", before)
                kept[-1] = replace(outer, value=value, end=statement.start)
        kept.append(statement)
    return _join_boxes(text, kept)


def resolve(
    text: str, statements: list[Statement], agree: Callable[[str, str], bool | None]
) -> Statement | None:
    """Return the statement that stands, or None if there is none.

    Of statements that disagree the later one stands if the text between them says that something was
    wrong, if it is more final, or if a calculation lies between the two. Otherwise the text has no
    answer, and the value returned is "".

    Args:
        text: The text of the statements.
        statements: In order.
        agree: Whether two answers are the same; None if that can't be said.
    """
    standing: Statement | None = None
    for statement in statements:
        if standing is None:
            standing = statement
            continue
        same = (
            agree(standing.value, statement.value) if standing.value and statement.value else None
        )
        between = text[standing.end : statement.start]
        if same and standing.value:
            finality = max(standing.finality, statement.finality)
            keep = statement if statement.finality >= standing.finality else standing
            standing = replace(keep, start=statement.start, end=statement.end, finality=finality)
        elif (
            statement.finality > standing.finality
            or CHANGE.search(between[-_MOST_CHARACTERS:])
            or statement.finality == standing.finality == STEP
            or (
                standing.finality == statement.finality
                and (
                    (len(between.split()) > 2 and (same is None or _are_boxes(standing, statement)))
                    or _is_working(between)
                )
            )
        ):
            standing = statement
        elif statement.finality < standing.finality and (
            same is None or statement.finality == STEP
        ):
            standing = replace(standing, end=statement.end) if statement.finality else standing
        else:
            standing = replace(
                statement, value="", finality=max(standing.finality, statement.finality)
            )
    return standing


def _are_boxes(*statements: Statement) -> bool:
    return all(statement.is_enclosed for statement in statements)


def _is_working(between: str) -> bool:
    return len(between) >= 12 and _WORKING.search(between[:_MOST_CHARACTERS]) is not None


def take_back(
    text: str, standing: Statement, agree: Callable[[str, str], bool | None]
) -> Statement:
    """Return a last statement as the text after it leaves it: with another value, or with none.

    A "wait" or "actually" takes an answer back, unless what follows comes to the same number or says
    that all is right.
    """
    tail = text[standing.end : standing.end + _MOST_CHARACTERS]
    if CALLED_WRONG.match(tail):
        return replace(standing, value="")
    change = RETHINK.search(tail)
    if change is None or not standing.value:
        return standing
    rest = tail[change.start() :]
    if corrections := list(_SHOULD_BE.finditer(rest)):
        value = cut(corrections[-1]["value"])
        if not agree(standing.value, value):
            return replace(standing, value=value, end=standing.end + len(tail))
        return standing
    numbers = _NUMBERS.findall(rest)
    if _NOT_CONFIRMED.search(rest) or _CONFIRMED.search(rest):
        is_kept = is_confirmed(rest)
    elif numbers:
        is_kept = bool(agree(standing.value, numbers[-1].rstrip(",")))
    else:
        is_kept = _REFUSES.match(rest) is None
    return standing if is_kept else replace(standing, value="")


def is_confirmed(text: str) -> bool:
    """Return whether second thoughts come to the conclusion that all is right."""
    return _NOT_CONFIRMED.search(text) is None and _CONFIRMED.search(text) is not None


def _boxes(text: str) -> Iterator[Statement]:
    if "box" not in text:
        return
    opened: list[int] = []
    closed: dict[int, int] = {}
    around: dict[int, int] = {}
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            around[brace.start()] = opened[-1] if opened else -1
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            closed[opened.pop()] = brace.start()
    end = 0
    for box in _BOX.finditer(text):
        if box.start() < end:
            continue
        if box["bare"]:
            yield Statement(
                box.start(), box.start("bare"), box.end(), box["bare"].rstrip("."), FINAL
            )
            continue
        if not box[0].endswith("{"):
            continue
        close = closed.get(box.end() - 1)
        if close is None:
            yield Statement(box.start(), len(text), len(text), "", FINAL, is_enclosed=True)
            return
        end = close + 1
        value = text[box.end() : close].strip()
        inner = _BOX.match(value)
        if inner and closed.get(text.find("{", box.end())) == close - 1:
            value = value[inner.end() : -1].strip()
        if value and _MINUS_BEFORE.search(text[max(0, box.start() - 20) : box.start()]):
            value = f"-{value}"
        if behind := _BEHIND_BOX.match(text, end):
            value, end = value + behind[0].replace("$", ""), behind.end()
        other = _ALTERNATIVE.match(text, end)
        if other and not text.startswith(("\\boxed", "\\fbox"), other.end() - 1):
            value += f" or {cut(text[other.end() - 1 : end + 60])}"
        if _is_operand(text, box.start(), end, around[box.end() - 1]):
            value = ""
        yield Statement(box.start(), box.end(), end, value, FINAL, is_enclosed=True)


def _is_operand(text: str, start: int, end: int, outer: int) -> bool:
    """Return whether a box is a part of an expression; a blank in an equation is none."""
    if outer >= 0 and _AROUND_BOX.search(text[max(0, outer - 100) : outer]):
        return True
    line = text[end : end + 100].split("\n", 1)[0]
    if "=" in line:
        return False
    before = text[max(0, start - 40) : start]
    return _BEFORE_BOX.search(before) is not None or _AFTER_BOX.match(line) is not None


def _join_boxes(text: str, statements: list[Statement]) -> list[Statement]:
    r"""Join boxes in one sentence, as in `\boxed{2} and \boxed{3}`."""
    joined: list[Statement] = []
    for statement in statements:
        last = joined[-1] if joined else None
        if (
            last
            and last.finality == statement.finality == FINAL
            and text.startswith("\\", statement.value_start - 7)
        ):
            between = text[last.end : statement.start]
            match = _JOINED.fullmatch(between) if len(between) < 40 else None
            if match and match["word"] and last.value and statement.value:
                value = f"{last.value} {match['word'].strip()} {statement.value}".replace(" ,", ",")
                joined[-1] = replace(last, value=value, end=statement.end)
                continue
        joined.append(statement)
    return joined


def _hashes(text: str) -> Iterator[Statement]:
    for match in _HASHES.finditer(text):
        content, rest = match[1].strip(), text[match.end() : match.end() + 200].strip(" \t\r\n*`")
        is_last = not rest and _HEADING.match(content) is None
        if is_last or (content and _NO_HEADING.fullmatch(content)):
            yield Statement(match.start(), match.start(1), match.end(), cut(content), FINAL)


def _tags(text: str) -> Iterator[Statement]:
    opening: re.Match[str] | None = None
    for tag in _TAG.finditer(text):
        if not (tag["slash"] or tag["bracket"]):
            opening = tag
        elif opening is not None:
            value = text[opening.end() : tag.start()].strip()
            yield Statement(
                opening.start(), opening.end(), tag.end(), _in_block(value), FINAL, is_enclosed=True
            )
            opening = None
    if opening is not None:
        yield Statement(opening.start(), len(text), len(text), "", FINAL, is_enclosed=True)


def _brackets(text: str) -> Iterator[Statement]:
    """Yield what stands alone in double brackets, `[[B]]`, as judges are told to write."""
    for match in _BRACKETS.finditer(text):
        yield Statement(
            match.start(), match.start(1), match.end(), match[1].strip(), ANSWER, is_enclosed=True
        )


def _json(text: str) -> Iterator[Statement]:
    for match in _JSON.finditer(text):
        value = match["value"].strip()
        try:
            read = None if re.search(r"(?<!\\)\\[A-Za-z]{2}", value) else json.loads(value)
        except (ValueError, RecursionError):
            read = None
        value = read if isinstance(read, str) else value.strip("\"'")
        yield Statement(
            match.start(), match.start("value"), match.end(), value.strip(), FINAL, is_enclosed=True
        )


def _sentences(text: str) -> Iterator[Statement]:
    """Yield what follows "the answer is", "Answer:" and the like, to the end of the sentence."""
    matches = [match for match in _MARKED_NOUN.finditer(text) if _is_marker(text, match)]
    matches = matches[-_MOST_STATEMENTS:]
    ends = [*(match.start() for match in matches[1:]), len(text)]
    for match, end in zip(matches, ends, strict=False):
        limit = min(end, match.end() + _MOST_CHARACTERS)
        start, end, value = _read_value(text, match.end(), limit, bool(match["cell"]))
        if _DENIED.match(value):
            instead = _NOT_BUT.match(value)
            if instead is None:
                continue
            value = instead[1]
        finality = ANSWER if match["noun"].lower() in _ANSWERS else STEP
        if "final" in match["adjectives"].lower():
            finality = FINAL
        yield Statement(match.start(), start, end, value, finality)


def _is_marker(text: str, match: re.Match[str]) -> bool:
    """Return whether a noun such as "answer" is followed by one, and not denied or supposed."""
    adjectives, noun = match["adjectives"].lower(), match["noun"].lower()
    before = text[max(0, match.start() - 30) : match.start()]
    starts_line = _LINE_START.search(before) is not None
    if match["line"] is not None or match["cell"]:  # "2. answer" alone is an item of a list
        fits = starts_line and noun in _ANSWERS and before[-2:] not in (". ", ") ")
    elif match["period"]:
        fits = noun == "ans"
    elif noun in ("total", "sum", "results", "outputs"):
        fits = starts_line if match["colon"] else noun in ("results", "outputs")
    elif noun in ("value", "number", "amount") and not _ADJECTIVES.search(adjectives):
        fits = False
    else:
        fits = bool(match["verb"]) or starts_line or noun in _ANSWERS or "final" in adjectives
    return fits and not NOT_MEANT.search(text[max(0, match.start() - 80) : match.start()])


def _read_value(text: str, start: int, limit: int, is_cell: bool) -> tuple[int, int, str]:
    """Return where the text after a marker begins and ends, and the answer in it."""
    window = text[start:limit]
    skipped = len(window) - len(window.lstrip(" \t*_`}|\r"))
    fence = _FENCE.match(window.lstrip())
    line = window[skipped:].split("\n", 1)[0]
    if not line.strip(" \t*_:：|}`") and not fence:
        rest = window[skipped + len(line) :]
        skipped += len(line) + len(rest) - len(rest.lstrip(" \t\r\n*_>|:："))
    else:
        skipped = len(window) - len(window.lstrip()) if fence else skipped
    filler = None if fence else _FILLER.match(window, skipped)
    if filler and filler.end() < len(window) and "\n\n" not in filler[0]:
        skipped = filler.end()
    block = window[skipped:]
    stripped = block.lstrip()
    lead = len(block) - len(stripped)
    if found := _FENCE.match(stripped):
        return start + skipped, start + skipped + lead + found.end(), found[1].strip()
    for opening, closing in _DISPLAY:
        if stripped.startswith(opening) and (close := stripped.find(closing, 2)) > 0:
            inside = stripped[2:close]
            return (
                start + skipped,
                start + skipped + lead + close + 2,
                " ".join(inside.split()).rstrip("."),
            )
    line = stripped.split("\n", 1)[0].split("</", 1)[0]
    if is_cell:
        line = line.split("|", 1)[0]
    value = cut(line)
    return start + skipped, start + skipped + lead + len(line[: len(value)]), clean(value)


def _questions(text: str) -> Iterator[Statement]:
    """Yield answers in the format of few-shot examples, `Q: …` and `A: …` on the next line."""
    for match in _QUESTION.finditer(text):
        value = cut(match[1])
        yield Statement(
            match.start(1), match.start(1), match.start(1) + len(value), clean(value), ANSWER
        )


def _in_other_languages(text: str) -> Iterator[Statement]:
    """Yield what follows the word for an answer in a few other languages."""
    for match in _OTHER_LANGUAGES.finditer(text):
        line = text[match.end() : match.end() + 200].split("\n", 1)[0].split("。", 1)[0]
        value = cut(line)
        short = _COPULA.sub("", clean(value))
        if short and not _DENIED_ELSEWHERE.match(short):
            yield Statement(match.start(), match.end(), match.end() + len(value), short, ANSWER)


def _in_block(text: str) -> str:
    found = _FENCE.fullmatch(text)
    return found[1].strip() if found else text


def cut(text: str) -> str:
    """Return a text up to the end of its first sentence, or to a clause that gives a reason."""
    text = text.strip()
    if lettered := _LETTER_AND_SENTENCE.match(text):
        return lettered[1].strip()
    ends = [match.start() for match in (_SENTENCE_END.search(text), _REASON.search(text)) if match]
    ends = [end for end in ends if end > 0 and text[:end].count("\\(") == text[:end].count("\\)")]
    return text[: min(ends)].rstrip(" \t*,") if ends else text.rstrip(" \t\r")


def clean(text: str) -> str:
    """Return an answer without the marks around it that are no part of it."""
    text = text.strip(" \t\r*|`")
    text = text.removesuffix(".").rstrip(" \t*`") if not text.endswith("..") else text
    if len(text) > 2 and text[0] == text[-1] == "_":
        text = text[1:-1].strip()
    depth = 0
    for brace in _BRACE.finditer(text):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth < 0:
            text = text[: brace.start()].rstrip()
            break
    text = _STARS.sub("", text)
    for mark in ("$$", "$", '"'):
        if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
            inside = text[len(mark) : -len(mark)]
            if mark not in inside.replace("\\$", "") and not inside.endswith("\\"):
                text = inside.strip()
    return text
