"""Worked examples for the steps of a search agent, about questions that need two searches.

In: nothing. Out: `EXAMPLES`, by kind of step, as `SearchAgent` takes them. The paper has five to nine per
kind (arXiv 2312.10003, section 3.2) and doesn't publish them; these are our own.
"""

from typing import Any

_MILL = "In which year was the bridge at Oberfeld Mill rebuilt, and who paid for it?"
_MILL_RESULT = (
    "[link_1] Oberfeld Mill: The old bridge was washed away in 1871 and rebuilt in 1874.",
    "[link_2] Mills of the valley: Most were closed before 1900.",
)
_MILL_FOUND = "The bridge was rebuilt in 1874 [link_1]. The results don't say who paid for it."
_MILL_DRAFT = "The bridge was rebuilt in 1874 [link_1]."
_SINGER = "Is the singer Ada Lindqvist older than the hall in which she first sang?"
_SINGER_PAST = (
    ("singer Ada Lindqvist birth and first concert",
     "Ada Lindqvist was born in 1921 and first sang in the Harbour Hall [link_4]."),
    ("Harbour Hall opened", "The Harbour Hall opened in 1935 [link_7]."),
)  # fmt: skip
_SINGER_RESULTS = (
    "[link_4] Ada Lindqvist (born 1921) gave her first concert in the Harbour Hall.",
    "[link_7] The Harbour Hall opened its doors in 1935.",
)
_SINGER_ANSWER = (
    "Yes. She was born in 1921 [link_4], 14 years before the hall opened in 1935 [link_7]."
)
_GUESS = "Yes. She was born in 1921 [link_4], and the hall opened in 1948."

EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "decision": [
        {"question": _MILL, "past_actions": (), "searches_left": 10,
         "action": "Search(thoughts='Two things are asked. I begin with the year.', "
                   "query='Oberfeld Mill bridge rebuilt')"},
        {"question": _SINGER, "past_actions": _SINGER_PAST, "searches_left": 8,
         "action": "Terminate(thoughts='Both years are known.')"},
        {"question": _MILL, "past_actions": (("Oberfeld Mill bridge rebuilt", _MILL_FOUND),),
         "searches_left": 9,
         "action": "Search(thoughts='The year is 1874. Who paid is missing.', "
                   "query='who paid for the bridge at Oberfeld Mill 1874')"},
    ],
    "summarization": [
        {"question": _MILL, "query": "Oberfeld Mill bridge rebuilt", "results": _MILL_RESULT,
         "action": f"Summary(thoughts='link_1 has the year.', text={_MILL_FOUND!r})"},
        {"question": _SINGER, "query": "Harbour Hall opened", "results": _SINGER_RESULTS[1:],
         "action": "Summary(text='The Harbour Hall opened in 1935 [link_7].')"},
    ],
    "answer": [
        {"question": _SINGER, "past_actions": _SINGER_PAST,
         "action": f"Answer(thoughts='1921 is before 1935.', text={_SINGER_ANSWER!r})"},
        {"question": _MILL, "past_actions": (("Oberfeld Mill bridge rebuilt", _MILL_FOUND),),
         "action": 'Answer(text="The bridge was rebuilt in 1874 [link_1]. I didn\'t find who paid for it.")'},
    ],
    "relevance": [
        {"question": _SINGER, "draft": _SINGER_ANSWER,
         "action": "Keep(thoughts='It says whether she is older.')"},
        {"question": _MILL, "draft": _MILL_DRAFT,
         "action": "Rewrite(thoughts='Who paid is asked too.', "
                   'text="The bridge was rebuilt in 1874 [link_1]. I didn\'t find who paid for it.")'},
    ],
    "grounding": [
        {"question": _SINGER, "results": _SINGER_RESULTS, "draft": _SINGER_ANSWER,
         "action": "Keep(thoughts='Both years are in the results.')"},
        {"question": _SINGER, "results": _SINGER_RESULTS, "draft": _GUESS,
         "action": f"Rewrite(thoughts='The hall opened in 1935.', text={_SINGER_ANSWER!r})"},
    ],
}  # fmt: skip
