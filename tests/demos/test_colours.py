"""The demo with tools: its examples are right, and what answers a question is in no other set."""

from trl_selfplay.demos.colours import colours_split, worked_answer
from trl_selfplay.demos.survey import colours, search
from trl_selfplay.rewards import exact_reward
from trl_selfplay.rewards.worker import close_workers
from trl_selfplay.tools import calculator
from trl_selfplay.tools.record import ToolCall
from trl_selfplay.tools.tool_set import ToolSet


def colour_of(prompt):
    return prompt.removeprefix("Question: How bright is ").removesuffix("?\n")


def test_search_finds_each_colour_by_its_name() -> None:
    for name, (red, green, blue) in colours().items():
        assert search(name) == f"{name}: red {red}, green {green}, blue {blue}"


def test_search_ranks_names_and_takes_any_text_as_words() -> None:
    assert search("the colour that they call tomato red").startswith("tomato red:")
    assert search("pink purple").startswith("pink purple:")
    assert search("purple pink").startswith("purple pink:")
    for query in ("", "?!", "zzz", '"', "name:*"):
        assert search(query) == "nothing found"
    assert search('tomato" OR (').startswith("tomato red:")


def test_all_questions_about_a_colour_are_in_one_set() -> None:
    """RA-12: what is asked in a held-out set is neither trained on nor shown."""
    split = colours_split(seed=3)
    sets = [split.train, split.select, split.report, split.few_shot]
    names = [[colour_of(row["prompt"]) for row in rows] for rows in sets]
    assert len({name for part in names for name in part}) == sum(map(len, names)) == len(colours())
    for part in names:
        assert colours().keys() >= set(part)


def test_a_seed_gives_training_questions_another_order_and_nothing_else() -> None:
    one, other = colours_split(seed=1), colours_split(seed=2)
    assert one.train["prompt"] != other.train["prompt"]
    assert sorted(one.train["prompt"]) == sorted(other.train["prompt"])
    assert one.report.to_list() == other.report.to_list()
    assert one.few_shot == other.few_shot
    assert len(colours_split(smoke=True).report) == 8


def test_worked_answers_are_right_and_no_other_colour_s_are() -> None:
    names = list(colours())[::10]
    answers = [worked_answer(name) for name in names]
    assert exact_reward(answers, [str(sum(colours()[name])) for name in names]) == [1.0] * len(
        names
    )
    wrong = [str(sum(colours()[name]) + 1) for name in names]
    assert sum(exact_reward(answers, wrong)) == 0.0


def test_the_tools_are_described_to_a_model_and_run_in_processes() -> None:
    tools = ToolSet([search, calculator], 20.0)
    calls = (
        ToolCall("search", {"query": "tomato red"}),
        ToolCall("calculator", {"expression": "236 + 45 + 1"}),
    )
    found = [tools.call(call).content for call in calls]
    close_workers()
    assert found == ["tomato red: red 236, green 45, blue 1", "282"]
    assert [schema["function"]["name"] for schema in tools.schemas] == ["search", "calculator"]
