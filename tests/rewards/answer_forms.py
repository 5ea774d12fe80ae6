r"""Forms in which models write answers, and wrong answers that look right.

In: templates by kind. Out: rows as in corpus/frozen.jsonl. In a template `@G` is the right answer,
`@W` a wrong one. Forms of numbers are written for several numbers of either sign, those of choices for
each letter.
"""

import itertools
from typing import Any

# (area, completion, verdict)
ANSWER_FORMS = [
    ("plain sentence", "The answer is @G.", 1),
    ("plain sentence", "Adding both, we see that the answer is @W.", 0),
    ("plain sentence", "So the final answer is @G.", 1),
    ("plain sentence", "We had @G before. So the final answer is @W.", 0),
    ("plain sentence", "The correct answer is: @G", 1),
    ("plain sentence", "My answer is @G!", 1),
    ("plain sentence", "The answer to the question is @G.", 1),
    ("plain sentence", "The answer would be @G.", 1),
    ("bold label", "Let us see.\n\n**Answer**: @G", 1),
    ("bold label", "It is not @G, though close.\n\n**Answer**: @W", 0),
    ("bold label", "**Answer:** @G", 1),
    ("bold label", "**Final Answer**: @G", 1),
    ("bold label", "**Final Answer:** **@G**", 1),
    ("bold label", "Some steps with @G.\n\n**Final Answer:** **@W**", 0),
    ("italic label", "*Answer*: @G", 1),
    ("italic label", "_Final answer:_ @G", 1),
    ("heading label", "### Answer: @G", 1),
    ("heading label", "#### Answer: @G", 1),
    ("heading label", "## Final Answer\n\n@G", 1),
    ("heading label", "## Final Answer\n\n**@G**\n", 1),
    ("heading label", "## Steps\n\nWe get @G here.\n\n## Final Answer\n\n@W", 0),
    ("heading", "#### Step 1: Look\nWe look.\n\n#### Step 2: Conclude\nThe answer is @G.", 1),
    ("heading", "#### Step 1: Use @G\nWe look.\n\n#### Step 2: Conclude\nThe answer is @W.", 0),
    ("heading", "#### Solution\nWe count @G.\n\n#### Result\n\\boxed{@W}", 0),
    ("bullet label", "- Steps: few\n- Answer: @G", 1),
    ("block quote", "> **Answer:** @G", 1),
    ("table", "| | value |\n|---|---|\n| **Answer** | @G |", 1),
    ("table", "| | value |\n|---|---|\n| Start | @G |\n| **Answer** | @W |", 0),
    ("minerva", "Final Answer: The final answer is $@G$. I hope it is correct.", 1),
    ("minerva", "As $@G$ is no option.\nFinal Answer: The final answer is $@W$. I hope it is correct.", 0),
    ("display", "The answer is:\n\\[\n@G\n\\]", 1),
    ("display", "The answer is:\n$$@G$$", 1),
    ("display", "We had $$@G$$ before. The answer is:\n$$@W$$", 0),
    ("display", "**Final Answer**\n\n\\[ \\boxed{@G} \\]", 1),
    ("display", "**Final Answer**\n\n\\[ \\boxed{@W} \\]\n", 0),
    ("next line", "Answer:\n@G", 1),
    ("next line", "The answer is\n\n@G", 1),
    ("next line", "@G came first. Answer:\n\n@W", 0),
    ("box", "Thus \\boxed{@G}.", 1),
    ("box", "Thus $\\boxed{@G}$ is what we wanted.", 1),
    ("box", "First \\boxed{@G}. Then we subtract the rest and get = \\boxed{@W}.", 0),
    ("box", "First \\boxed{@W}. Then we subtract the rest and get = \\boxed{@G}.", 1),
    ("box", "\\fbox{@G}", 1),
    ("box", "$\\boxed{ @G }$", 1),
    ("box", "\\boxed{\\boxed{@G}}", 1),
    ("box", "The answer is @G, so \\boxed{@W", 0),
    ("box", "\\boxed{@G} or \\boxed{@W}", 0),
    ("box", "\\boxed{@G}\n\\boxed{@W}", 0),
    ("hashes", "Few steps.\n#### @G", 1),
    ("hashes", "So @G it was.\n#### @W", 0),
    ("hashes", "The answer is @G.\n#### @W", 0),
    ("hashes", "#### @G\n", 1),
    ("tags", "<answer>@G</answer>", 1),
    ("tags", "<answer> @G </answer>\n", 1),
    ("tags", "<answer>The answer is @G</answer>", 1),
    ("tags", "<answer>\n\\boxed{@G}\n</answer>", 1),
    ("tags", "It can't be @G. <answer>@W</answer>", 0),
    ("tags", "<answer>@G", 0),
    ("json", '{"answer": "@G"}', 1),
    ("json", '{"reasoning": "is the answer @W?", "answer": "@G"}', 1),
    ("json", '{"reasoning": "the answer may be @G", "answer": "@W"}', 0),
    ("json", '```json\n{"final_answer": "@G"}\n```', 1),
    ("thoughts", "<think>Is it \\boxed{@W}?</think>The answer is @G.", 1),
    ("thoughts", "<think>Is it \\boxed{@G}?</think>The answer is @W.", 0),
    ("thoughts", "<think>The answer is @G.", 0),
    ("thoughts", "<think>The answer is @G.</think>", 0),
    ("thoughts", "The answer is @G.</think>\nThe answer is @W.", 0),
    ("thoughts", "<reasoning>\n@W?\n</reasoning>\n<answer>\n@G\n</answer>", 1),
    ("thoughts", "<reasoning>\n<answer>@G</answer>\n</reasoning>\nI give up.", 0),
    ("thoughts", "[THINK]\\boxed{@W}[/THINK]Answer: @G", 1),
    ("thoughts", "[THINK]Answer: @G[/THINK]", 0),
    ("thoughts", "<thinking>a <reflection>b</reflection> \\boxed{@G}</thinking> \\boxed{@W}", 0),
    ("thoughts", "<thinking>a <reflection>b</reflection> the answer is @G", 0),
    ("thoughts", "The answer is @G. <reflection>Is it @W? No.</reflection>", 1),
    ("thoughts", "<|begin_of_thought|>Answer: @G<|end_of_thought|>\nAnswer: @W", 0),
    ("channels", "<|channel|>analysis<|message|>\\boxed{@W}?<|end|><|start|>assistant<|channel|>final"
     "<|message|>The answer is @G.<|return|>", 1),
    ("channels", "<|channel|>analysis<|message|>The answer is @G.<|end|><|start|>assistant<|channel|>"
     "final<|message|>The answer is @W.<|return|>", 0),
    ("channels", "<|channel|>analysis<|message|>The answer is @G.", 0),
    ("channels", "analysisWe look. The answer is @W.assistantfinalThe answer is @G.", 1),
    ("leftovers", "The answer is @G.<|im_end|>", 1),
    ("leftovers", "The answer is @G</s>", 1),
    ("leftovers", "assistant\n\nThe answer is @G.<|eot_id|>", 1),
    ("leftovers", "**Answer:** @G<end_of_turn>\n<start_of_turn>user\nThe answer is @W.", 1),
    ("leftovers", "**Answer:** @W<end_of_turn>\n<start_of_turn>model\nThe answer is @G.", 0),
    ("leftovers", "The answer is @W.<|im_end|>\n<|im_start|>user\nThe answer is @G.", 0),
    ("next question", "The answer is @G.\n\nQuestion: How old is Bob?\nAnswer: @W", 1),
    ("next question", "The answer is @W.\n\nQ: How old is Bob?\nA: The answer is @G.", 0),
    ("correction", "The answer is @W. Wait, that's wrong. The answer is @G.", 1),
    ("correction", "The answer is @G. Wait, that's wrong. The answer is @W.", 0),
    ("correction", "\\boxed{@G}\n\nWait, I made a mistake. \\boxed{@W}", 0),
    ("correction", "\\boxed{@W}\n\nWait, I made a mistake. \\boxed{@G}", 1),
    ("correction", "The answer is @G. Hold on, that is not right.", 0),
    ("contradiction", "The answer is @W. The answer is @G.", 0),
    ("contradiction", "The answer is @G. The answer is @W.", 0),
    ("contradiction", "Answer: @G\nAnswer: @W", 0),
    ("contradiction", "\\boxed{@G}\n#### @W", 0),
    ("hedge", "The answer is @G or @W.", 0),
    ("hedge", "The answer is @W or @G.", 0),
    ("hedge", "The answer is either @G or @W.", 0),
    ("hedge", "It could be @G, it could be @W.", 0),
    ("denial", "The answer is not @G.", 0),
    ("denial", "The answer isn't @G.", 0),
    ("denial", "The answer is definitely not @G.", 0),
    ("denial", "I don't think the answer is @G.", 0),
    ("denial", "The answer is not @W. The answer is @G.", 1),
    ("condition", "If the answer is @G, the sum is odd. Hence the answer is @W.", 0),
    ("condition", "Let's check whether the answer is @G. It fails.", 0),
    ("condition", "Some say the answer is @G.", 0),
    ("refusal", "I can't answer this. @G was mentioned.", 0),
    ("truncated", "We begin with @G and then", 0),
    ("truncated", "First we note that @G is close. The answer is", 0),
    ("echo", "Question: is it @G or @W? Let us think.", 0),
    ("reason after", "The answer is @G, because nothing else fits.", 1),
    ("reason after", "The answer is @W because @G doesn't fit.", 0),
    ("reason after", "Answer: @G\n\nExplanation: nothing else fits.", 1),
    ("reason after", "@G\n\nExplanation: nothing else fits.", 1),
    ("reason after", "@W\n\nExplanation: @G doesn't fit.", 0),
    ("bare", "@G", 1),
    ("bare", "**@G**", 1),
    ("bare", " @G.\n", 1),
    ("bare", "@W", 0),
    ("fence", "```\n@G\n```", 1),
    ("fence", "```\n@W\n```", 0),
    ("fence", "Answer:\n```\n@G\n```", 1),
    ("quotes", 'Answer: "@G"', 1),
    ("code", "The answer is `@G`.", 1),
    ("latex label", "\\textbf{Answer: @G}", 1),
    ("closing", "The answer is @G. Let me know if you need more help!", 1),
    ("closing", "Answer: @G\n\nI hope this helps! If @W confuses you, ask.", 1),
]  # fmt: skip
NUMBER_FORMS = [
    ("unit", "The answer is @G clips.", 1),
    ("unit", "She sold them all: the answer is @W clips, and not @G.", 0),
    ("unit", "Answer: @G clips in total", 1),
    ("unit", "\\boxed{@G\\text{ clips}}", 1),
    ("currency", "The answer is $@G.", 1),
    ("currency", "**$@G**", 1),
    ("currency", "Answer: \\$@G", 1),
    ("currency", "Answer: @G dollars", 1),
    ("percent", "The answer is @G%.", 0),
    ("percent", "\\boxed{@G\\%}", 0),
    ("decimals", "The answer is @G.00.", 1),
    ("decimals", "The answer is @G.5.", 0),
    ("digits", "The answer is @G0.", 0),
    ("digits", "The answer is 1@G.", 0),
    ("variable", "The answer is x = @G.", 1),
    ("variable", "\\boxed{x = @G}", 1),
    ("conclusion", "Half of it is @W.\nSo she has @G clips left.", 1),
    ("conclusion", "She had @G at first.\nTherefore, she has @W clips left.", 0),
    ("conclusion", "So she needs @G boxes for 3 friends.", 0),
    ("conclusion", "She has **@G** clips left.", 1),
    ("working", "The answer is @G + 1 = @W.", 0),
    ("trap", "There are @G clips and @W of them are red. The answer is @W.", 0),
    ("correction", "The answer is @W. Wait, it should be @G.", 1),
    ("correction", "The answer is @G. Wait, it should be @W.", 0),
    ("correction", "The answer is @G. Let me check: 10 + 1 = @G. Correct.", 1),
    ("about", "The answer is approximately @G.", 1),
]  # fmt: skip
NUMBERS = [("72", "74"), ("-15", "15"), ("1200", "1020")]
TEXTS = [("Paris", "Rome"), ("yes", "no"), ("c, b, a", "a, b, c"), ("New York", "York")]
MATHS = [("\\frac{3}{4}", "\\frac{4}{3}"), ("x^2-1", "x^2+1"), ("(2,-3)", "(-3,2)"), ("2\\sqrt{5}", "5\\sqrt{2}")]  # fmt: skip
# (completion's answer, solution, verdict), written into a few forms
NUMBER_PAIRS = [
    ("1,000", "1000", 1), ("1\u2009000", "1000", 1), ("1{,}000", "1000", 1), ("1000.0", "1,000", 1),
    ("1,0000", "1000", 0), ("100", "1000", 0), ("\u22125", "-5", 1), ("5", "-5", 0), ("+5", "5", 1),
    ("$70,000", "70000", 1), ("$7,000", "70000", 0), ("\\$18.90", "$18.90", 1), ("18.9 dollars", "$18.90", 1),
    ("$189", "$18.90", 0), ("£5", "5", 1), ("5€", "5 euros", 1), ("$5", "5 euros", 0), ("-$5", "-5", 1),
    ("$-5", "-5", 1), ("$5", "-$5", 0), ("5%", "5 percent", 1), ("5 \\%", "5%", 1), ("5", "5%", 0),
    ("5%", "5", 0), ("0.05", "5", 0), ("72 clips", "72", 1), ("72", "72 clips", 1), ("72 paper clips", "72 clips", 1),
    ("72 apples", "72 clips", 0), ("5 cm", "5 m", 0), ("5 centimeters", "5 cm", 1), ("5 cm^2", "5 cm", 0),
    ("5 square centimeters", "5 cm^2", 1), ("60 km/h", "60 kilometers per hour", 1), ("60 km", "60 km/h", 0),
    ("5 hours", "5 minutes", 0), ("1/2", "0.5", 1), ("\\frac{1}{2}", "0.5", 1), ("\\dfrac{1}{2}", "1/2", 1),
    ("2/1", "1/2", 0), (".5", "0.5", 1), ("3 1/2", "3.5", 1), ("31/2", "3.5", 0), ("1.2e5", "120000", 1),
    ("1.2 \\times 10^{5}", "120000", 1), ("1.2 \\times 10^{4}", "120000", 0), ("2.5 million", "2500000", 1),
    ("2.5 billion", "2500000", 0), ("0.333333", "1/3", 1), ("0.33", "1/3", 0), ("x = 5", "5", 1), ("x = -5", "5", 0),
    ("\\text{5}", "5", 1), ("\\text{5 cm}", "5 cm", 1), ("90^\\circ", "90 degrees", 1), ("90^\\circ", "90", 1),
    ("20°C", "20 degrees Fahrenheit", 0), ("72 and 73", "72", 0), ("72-73", "72", 0), ("7 2", "72", 0),
    ("3:4", "3", 0), ("1,000,000", "1000000", 1), ("５", "5", 1), ("٥", "5", 0),
    ("72 out of 80", "72", 0), ("at least 72", "72", 0), ("more than 72", "72", 0), ("not 72", "72", 0),
    ("72 - 1", "72", 0), ("48/2 = 24", "48", 0), ("48/2 = 24", "24", 1),
    ("72 clips", "48/2 = 24. 24 + 48 = 72\n#### 72", 1), ("24 clips", "48/2 = 24. 24 + 48 = 72\n#### 72", 0),
]  # fmt: skip
PAIR_FORMS = ["The answer is {}.", "**Answer:** {}", "#### {}", "Thus \\boxed{{{}}}"]
TEXT_PAIRS = [
    ("paris", "Paris", 1), ("**Paris**", "Paris", 1), ("Paris, France", "Paris", 0), ("The Nile", "Nile", 1),
    ("the Eiffel Tower", "Eiffel Tower", 1), ("Washington, D.C.", "Washington, D.C.", 1), ("St. Louis", "St. Louis", 1),
    ("Washington", "Washington, D.C.", 0), ("July 4, 1776", "4 July 1776", 1), ("July 14, 1776", "July 4, 1776", 0),
    ("July 4th, 1776", "July 4, 1776", 1), ("5:30 PM", "5:30 p.m.", 1), ("5:30 AM", "5:30 PM", 0),
    ("'blue'", "blue", 1), ("`blue`", "blue", 1), ("light blue", "blue", 0), ("[1, 2, 3]", "[1,2,3]", 1),
    ("[1, 3, 2]", "[1, 2, 3]", 0), ("True", "true", 1), ("False", "True", 0), ("Yes, it is", "yes", 1),
    ("No, it isn't", "yes", 0), ("Yes, but no", "yes", 0), ("unknown", "Paris", 0), ("Marie Curie", "Marie Curie", 1),
    ("Pierre Curie", "Marie Curie", 0), ("Curie Marie", "Marie Curie", 0), ("not blue", "blue", 0),
]  # fmt: skip
CHOICE_FORMS = [
    ("bare", "@G", 1), ("bare", "(@G)", 1), ("bare", "@G.", 1), ("bare", "@G)", 1), ("bare", "**@G**", 1),
    ("bare", "@W", 0), ("bare", "[@G]", 1),
    ("option", "Option @G", 1), ("option", "Option @G is correct.", 1), ("option", "The correct option is @G.", 1),
    ("option", "The correct option is @W, not @G.", 0), ("option", "The right choice is (@G).", 1),
    ("option", "Option @G looks right at first, but the correct option is @W.", 0),
    ("sentence", "The answer is @G.", 1), ("sentence", "The answer is (@G).", 1), ("sentence", "The answer is **@G**.", 1),
    ("sentence", "The answer is option @G.", 1), ("sentence", "The best answer is @G.", 1),
    ("sentence", "The correct answer is (@G) @T.", 1), ("sentence", "The correct answer is (@G) @U.", 0),
    ("sentence", "The answer is @G because it fits.", 1), ("sentence", "The answer is @W because @G doesn't fit.", 0),
    ("sentence", "The answer is @G since nothing else does.", 1), ("sentence", "the answer is @g.", 1),
    ("sentence", "So the answer is @G, and not @W.", 1), ("sentence", "Therefore, @G is the correct answer.", 1),
    ("sentence", "@G is correct.", 1), ("sentence", "@W is correct.", 0), ("sentence", "(@G) is the right answer.", 1),
    ("sentence", "@G is wrong, so @W is correct.", 0), ("sentence", "@W is wrong, so @G is correct.", 1),
    ("sentence", "I choose @G.", 1), ("sentence", "I would go with option @G.", 1), ("sentence", "So it must be @G.", 1),
    ("sentence", "That leaves @G.", 1), ("sentence", "@W is not correct. So (@G).", 1),
    ("label", "Answer: @G", 1), ("label", "**Answer**: @G", 1), ("label", "**Answer:** (@G)", 1),
    ("label", "**Final Answer**: @G", 1), ("label", "**Answer: @G**", 1), ("label", "### Answer: @G", 1),
    ("label", "## Final Answer\n\n@G", 1), ("label", "Answer: @G. @T", 1), ("label", "Answer: @G. @U", 0),
    ("label", "**Answer**: @W\n\n@G is tempting.", 0), ("label", "> Answer: @G", 1), ("label", "| Answer | @G |", 1),
    ("label", "Answer:\n@G", 1), ("label", "ANSWER: @g", 1), ("label", "Answer: $@G$", 1),
    ("minerva", "Final Answer: The final answer is $@G$. I hope it is correct.", 1),
    ("box", "\\boxed{@G}", 1), ("box", "$\\boxed{\\text{@G}}$", 1), ("box", "\\boxed{(@G)}", 1),
    ("box", "\\boxed{\\textbf{(@G) } @T}", 1), ("box", "\\boxed{\\textbf{(@G) } @U}", 0), ("box", "\\boxed{@G. @T}", 1),
    ("box", "@G? No: \\boxed{@W}", 0), ("box", "\\boxed{@G} or \\boxed{@W}", 0),
    ("hashes", "#### @G", 1), ("hashes", "@G?\n#### @W", 0),
    ("tags", "<answer>@G</answer>", 1), ("tags", "<answer>(@G) @T</answer>", 1), ("tags", "@G? <answer>@W</answer>", 0),
    ("json", '{"answer": "@G"}', 1), ("json", '{"thoughts": "@G?", "answer": "@W"}', 0),
    ("thoughts", "<think>@W? The answer is @W.</think>The answer is @G.", 1),
    ("thoughts", "<think>The answer is @G.</think>The answer is @W.", 0), ("thoughts", "<think>The answer is @G.", 0),
    ("leftovers", "The answer is @G.<|im_end|>", 1), ("leftovers", "@G</s>", 1), ("leftovers", "@G<|eot_id|>", 1),
    ("correction", "The answer is @W. Wait, the answer is @G.", 1), ("correction", "The answer is @G. Wait, the answer is @W.", 0),
    ("correction", "The answer is @G. No, @W is correct.", 0), ("correction", "\\boxed{@G} Wait, that's wrong. \\boxed{@W}", 0),
    ("contradiction", "The answer is @G. The answer is @W.", 0), ("contradiction", "The answer is @W. The answer is @G.", 0),
    ("hedge", "The answer is @G or @W.", 0), ("hedge", "Either @G or @W.", 0), ("hedge", "@G/@W", 0), ("hedge", "@G and @W", 0),
    ("hedge", "Answer: @G, @W", 0), ("hedge", "(@G) (@W)", 0), ("hedge", "The answer is both @G and @W.", 0),
    ("denial", "The answer is not @G.", 0), ("denial", "(@G) is not correct.", 0), ("denial", "The answer can't be @G.", 0),
    ("denial", "The answer is neither @G nor @W.", 0), ("denial", "I don't think @G is correct.", 0),
    ("refusal", "I can't decide whether @G is correct.", 0), ("text", "The answer is @T.", 1), ("text", "The answer is @U.", 0),
    ("text", "It is @T.", 1), ("text", "@T", 1), ("text", "@U", 0), ("text", "@T or @U", 0), ("text", "\\boxed{\\text{@T}}", 1),
    ("lettered text", "@G. @T", 1), ("lettered text", "(@G) @T", 1), ("lettered text", "@G) @T\n\nIt is the only one.", 1),
    ("lettered text", "@G. @U", 0), ("lettered text", "**@G. @T**", 1), ("first", "@G\n\nExplanation: it fits.", 1),
    ("first", "@G, because it fits.", 1), ("last", "It fits best.\n\n@G", 1), ("last", "@G is close.\n\n@W", 0),
    ("echo", "(@G) @T (@W) @U", 0), ("article", "The answer is @g thing", 0),
]  # fmt: skip
OPTIONS = ["copper", "a comet", "the moon", "red wine", "42", "New York", "a cat", "blue ink", "ice", "the end"]  # fmt: skip


def _fill(template: str, right: str, wrong: str) -> str:
    return template.replace("@G", right).replace("@W", wrong)


def number_rows() -> list[dict[str, Any]]:
    rows = []
    for (area, form, verdict), (right, wrong) in itertools.product(
        ANSWER_FORMS + NUMBER_FORMS, NUMBERS
    ):
        if right.startswith("-") and form in ("The answer is 1@G.",):
            continue
        rows.append(_row("number", area, _fill(form, right, wrong), right, verdict))
    for form, (answer, solution, verdict) in itertools.product(PAIR_FORMS, NUMBER_PAIRS):
        rows.append(_row("number", "normal form", form.format(answer), solution, verdict))
    return rows


def text_rows() -> list[dict[str, Any]]:
    rows = [
        _row("text", area, _fill(form, right, wrong), right, verdict)
        for (area, form, verdict), (right, wrong) in itertools.product(ANSWER_FORMS, TEXTS)
        if not (right == "yes" and area in ("denial", "hedge"))
        if not (wrong == "York" and "@G" in form and area == "contradiction")
    ]
    for form, (answer, solution, verdict) in itertools.product(PAIR_FORMS, TEXT_PAIRS):
        rows.append(_row("text", "normal form", form.format(answer), solution, verdict))
    return rows


def maths_rows() -> list[dict[str, Any]]:
    return [
        _row("maths", area, _fill(form, right, wrong), f"${right}$", verdict)
        for (area, form, verdict), (right, wrong) in itertools.product(ANSWER_FORMS, MATHS)
    ]


def choice_rows() -> list[dict[str, Any]]:
    rows = []
    for (area, form, verdict), index in itertools.product(CHOICE_FORMS, range(10)):
        other = (index + 3) % 10
        letter, wrong = "ABCDEFGHIJ"[index], "ABCDEFGHIJ"[other]
        text = _fill(form, letter, wrong).replace("@g", letter.lower())
        text = text.replace("@T", OPTIONS[index]).replace("@U", OPTIONS[other])
        rows.append(_row("choice", area, text, letter, verdict, OPTIONS))
    return rows


def _row(
    kind: str, area: str, completion: str, solution: str, verdict: int, choices: Any = None
) -> dict[str, Any]:
    return {
        "kind": kind, "area": area, "completion": completion, "solution": solution,
        "choices": choices, "verdict": verdict,
    }  # fmt: skip


def all_rows() -> list[dict[str, Any]]:
    rows = [*number_rows(), *text_rows(), *maths_rows(), *choice_rows()]
    return [{"id": f"o{number:04}", **row} for number, row in enumerate(rows, 1)]
