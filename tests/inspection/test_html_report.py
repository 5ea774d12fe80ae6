"""The report of a run: what is in it, and that nothing that a model wrote is more than text there."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from digests.old_runs import NAMES
from run_folders import HOSTILE

import trl_selfplay
from trl_selfplay.evaluation.detectors import DETECTOR_OF, warning_text
from trl_selfplay.evaluation.evidence import Reading
from trl_selfplay.inspection.html_report import script_json, write_report
from trl_selfplay.inspection.plain_text import visible

ASSETS = Path(trl_selfplay.__file__).parent / "inspection" / "assets"


class Parsed(HTMLParser):
    """The elements of a page with their attributes, the text of its tables, and its scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self._open: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag in ("script", "style"):
            (self.scripts if tag == "script" else self.styles).append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data) -> None:
        if "script" in self._open:
            self.scripts[-1] += data
        elif "style" in self._open:
            self.styles[-1] += data
        else:
            self.text += data
            if self._open and {"td", "th"} & set(self._open[-1:]):
                self.rows[-1][-1] += data

    @property
    def data(self):
        return json.loads(self.scripts[0])

    def tags(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]


def test_a_hostile_text_is_text_in_the_page(hostile_run) -> None:
    page = Parsed(write_report(hostile_run))
    assert [attributes.get("id") for attributes in page.tags("script")] == ["data", None, None]
    assert page.tags("img") == []
    assert page.tags("b") == []
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    completions = {sample["completion"] for sample in page.data["samples"]}
    assert completions == {visible(f"so {text}") for text in HOSTILE}
    assert set(page.data["texts"]) == {visible(text) for text in HOSTILE}
    cells = {cell for row in page.rows for cell in row}
    assert {visible(HOSTILE[0]), HOSTILE[1], r"\ud83d"} <= cells  # settings and detectors
    assert r"<b>run & \u202e" in page.text


def test_no_character_of_the_page_acts_on_a_reader(hostile_run) -> None:
    text = write_report(hostile_run).read_text(encoding="utf-8")
    library = (ASSETS / "chart.umd.min.js").read_text(encoding="utf-8")
    own = text.replace(library.partition("\n//# sourceMappingURL=")[0].strip(), "")
    assert own != text
    assert visible(own) == own


def test_the_page_needs_no_network_and_runs_its_own_scripts_alone(hostile_run) -> None:
    page = Parsed(write_report(hostile_run))
    for _, attributes in page.elements:
        assert attributes.keys().isdisjoint({"src", "srcset", "action", "background", "style"})
        assert attributes.get("href", "#").startswith("#")
    [policy] = [m["content"] for m in page.tags("meta") if "http-equiv" in m]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"

    def hashes(texts):
        digests = [hashlib.sha256(text.encode()).digest() for text in texts]
        return " ".join(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests)

    assert rules["script-src"] == hashes(page.scripts[1:])
    assert rules["style-src"] == hashes(page.styles)
    assert "url(" not in page.styles[0]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", page.scripts[2]
    )


def test_json_in_a_script_comes_back_and_cant_end_it() -> None:
    value = {"texts": [*HOSTILE, "\ud83d alone", "]]>", "é 数"], "none": None}
    text = script_json(value)
    assert re.search("[<>&\u2028\u2029]", text) is None
    assert json.loads(text.encode().decode()) == value


def test_the_library_is_the_published_one_with_its_licence() -> None:
    """Of https://registry.npmjs.org/chart.js/-/chart.js-4.6.1.tgz, package/dist/."""
    found = hashlib.sha256((ASSETS / "chart.umd.min.js").read_bytes()).hexdigest()
    assert found == "87364cc2b2a76a6684929e7d6b80b18a897794db38400caff1fcf1791c6925d2"
    assert "The MIT License" in (ASSETS / "chart.LICENSE.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_of_earlier_code_has_a_report(name, unpack) -> None:
    path = write_report(unpack(name))
    page = Parsed(path)
    assert "So far: " in page.text
    assert "recorded no detectors" in page.text
    assert page.data["samples"]
    assert path.stat().st_size - len(json.dumps(page.data["samples"])) < 400_000


def test_the_page_is_small_without_samples(write_folder, make_rollout) -> None:
    run = write_folder([[(make_rollout(), "kept")]] * 12)
    assert write_report(run, samples=0).stat().st_size < 400_000


def test_numbers_of_charts_stand_in_tables(write_folder, make_rollout) -> None:
    run = write_folder(
        [[(make_rollout(), "kept"), (make_rollout(sample_index=1, reward=0.0), "failed")]] * 2
    )
    rows = Parsed(write_report(run)).rows
    assert ["before", "0.4 [0.3, 0.5]", "0.4", "0.9"] in rows
    assert ["1", "0.6 [0.5, 0.7]", "0.6", "0.9"] in rows
    assert ["0", "1", "1"] in rows  # kept, wrong
    assert ["0", "100", "300", "50"] in rows  # tokens
    assert ["round 1 (best)", "round 0", "base", "1", "3", "0.001", "no"] in rows


def test_a_run_without_a_finished_round_has_a_report_of_its_samples(
    write_folder, make_rollout
) -> None:
    greedy = [make_rollout(prompt_id="9" * 32, phase="eval", rewards=(0.0,))]
    run = write_folder(
        [[(make_rollout(rewards=(1.0, 0.5)), "kept")]], evaluations={-1: greedy}, finished=0,
        config={"reward_funcs": "('exact_reward', 'brevity')", "eval_reward_funcs": "('judge',)"},
    )  # fmt: skip
    (run / "_rounds" / "round-000" / "selection.parquet").unlink()
    page = Parsed(write_report(run))
    assert "So far: 0 of 1 rounds finished. Round 0: sampling." in page.text
    assert {sample["outcome"]: sample["scores"] for sample in page.data["samples"]} == {
        "not selected yet": [["exact_reward", 1.0], ["brevity", 0.5]],
        "held-out": [["judge", 0.0]],
    }


def test_a_run_that_has_just_begun_has_a_report(tmp_path) -> None:
    (tmp_path / "_rounds").mkdir()
    page = Parsed(write_report(tmp_path))
    assert "So far: 0 rounds finished." in page.text
    assert page.data["samples"] == []


def test_samples_that_cant_be_read_are_named_and_the_others_shown(
    write_folder, make_rollout
) -> None:
    run = write_folder([[(make_rollout(), "kept")]] * 2)
    (run / "_rounds" / "round-000" / "samples" / "00000.parquet").write_bytes(b"PAR1")
    page = Parsed(write_report(run))
    assert {sample["round"] for sample in page.data["samples"]} == {1}
    assert "Samples of round 0 can't be read" in page.text


def test_the_number_of_samples_is_bounded_and_told(write_folder, make_rollout) -> None:
    def rollouts(index):
        return [
            (
                make_rollout(prompt_id=f"{i:032x}", round_index=index, reward=float(i % 4 == 0)),
                "kept" if i % 4 == 0 else "failed",
            )
            for i in range(100)
        ]

    greedy = [make_rollout(prompt_id=f"{i + 500:032x}", phase="eval") for i in range(50)]
    run = write_folder([rollouts(0), rollouts(1)], evaluations={-1: greedy, 0: greedy, 1: greedy})
    page = Parsed(write_report(run, samples=10))
    by_round = {}
    for sample in page.data["samples"]:
        of_outcome = by_round.setdefault(sample["round"], {}).setdefault(sample["outcome"], set())
        of_outcome.add(sample["prompt"])
    assert {k: len(v) for k, v in by_round[0].items()} == {"kept": 5, "wrong": 5, "held-out": 10}
    assert by_round[0] == by_round[1]  # the same prompts
    assert by_round[-1]["held-out"] == by_round[0]["held-out"]
    assert "Round 0: 5 of 75 wrong, 5 of 25 kept." in page.text


def test_a_trajectory_is_shown_in_steps(write_folder, make_rollout) -> None:
    rollout = make_rollout(
        completion_ids=(5, 6, 7, 8, 9), completion_mask=(True, True, False, False, True)
    )
    run = write_folder([[(rollout, "kept")]])
    [sample] = Parsed(write_report(run)).data["samples"]
    assert [[writer, text] for writer, _, text in sample["steps"]] == [
        ["policy", "(2 tokens)"], ["environment", "(2 tokens)"], ["policy", "(1 tokens)"],
    ]  # fmt: skip
    assert sample["own_tokens"] == 3
    page = write_report(run).read_text()  # a reader compares both numbers with the chart's
    assert "Mean number of tokens of a completion, without results of tools." in page


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": 4}}}
TURNS = (
    {"role": "assistant", "reasoning_content": "a sum", "content": "I add.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "name": "add", "content": "7"},
    {"role": "tool", "name": "add", "content": "Error: no answer within 5 s"},
    {"role": "assistant", "content": "7"},
)  # fmt: skip


def test_messages_show_thoughts_calls_results_and_failures(
    write_folder, make_rollout, word_tokenizer
) -> None:
    rollout = make_rollout(
        completion_ids=tuple(word_tokenizer("so 3 = 4 ?")["input_ids"]),
        completion_mask=(True, True, False, False, True),
        messages=TURNS,
        num_failed_calls=1,
    )
    told = make_rollout(  # a tool may say so of its own accord
        sample_index=1,
        completion_ids=rollout.completion_ids,
        completion_mask=rollout.completion_mask,
        messages=TURNS[2:],
    )
    halted = make_rollout(sample_index=2, halt="tool_limit", messages=TURNS[:1])
    run = write_folder([[(rollout, "kept"), (told, "kept"), (halted, "failed")]])
    word_tokenizer.save_pretrained(run)
    samples = Parsed(write_report(run)).data["samples"]
    by_index = {sample["index"]: sample for sample in samples}
    called = 'add({"a": 3, "b": 4})'
    assert by_index[0]["steps"] == [
        ["policy", "turn 1, thoughts", "a sum"],
        ["policy", "turn 1", "I add."],
        ["policy", "turn 1, call", called],
        ["policy", "turn 1, call", called],
        ["environment", "result of add", "7"],
        ["failure", "failed call of add", "Error: no answer within 5 s"],
        ["policy", "turn 2", "7"],
    ]
    assert by_index[0]["written"] == [[True, "so 3"], [False, "= 4"], [True, "?"]]
    assert by_index[1]["steps"][0][0] == "environment"
    assert len(by_index[2]["steps"]) == 4
    assert by_index[2]["end"] == "ended by a call beyond the last one allowed"


def test_a_long_trajectory_is_shown_with_short_steps(write_folder, make_rollout) -> None:
    long = [{"role": r, "name": "f", "content": "x" * 9000} for r in ("assistant", "tool")] * 50
    rollout = make_rollout(halt="tool_limit", messages=tuple(long))
    [sample] = Parsed(write_report(write_folder([[(rollout, "failed")]]))).data["samples"]
    assert len(sample["steps"]) == 100
    assert sum(len(text) for _, _, text in sample["steps"]) < 50_000


def test_a_trajectory_is_decoded_with_the_runs_tokenizer(
    write_folder, make_rollout, word_tokenizer
) -> None:
    ids = word_tokenizer("so 3 = 4 ?")["input_ids"]
    rollout = make_rollout(
        completion_ids=tuple(ids), completion_mask=(True, True, False, False, True)
    )
    run = write_folder([[(rollout, "kept")]])
    word_tokenizer.save_pretrained(run)
    [sample] = Parsed(write_report(run)).data["samples"]
    texts = [[writer, text] for writer, _, text in sample["steps"]]
    assert texts == [["policy", "so 3"], ["environment", "= 4"], ["policy", "?"]]


def test_long_texts_are_cut_in_the_middle(write_folder, make_rollout) -> None:
    run = write_folder([[(make_rollout(completion="a" * 9000 + "end"), "kept")]])
    [sample] = Parsed(write_report(run)).data["samples"]
    assert "[… 1,003 characters …]" in sample["completion"]
    assert sample["completion"].endswith("aend")


def test_secrets_of_addresses_are_not_shown(write_folder, make_rollout) -> None:
    config = {"vllm_server_base_url": "https://me:word@host/v1", "hub_token": "<HUB_TOKEN>"}
    text = write_report(write_folder([[(make_rollout(), "kept")]], config=config)).read_text()
    assert "me:word" not in text
    assert "https://(not shown)@host/v1" in text


def test_spin_is_said_to_have_converged_where_it_has(write_folder, make_rollout) -> None:
    scores = [
        {"eval_win_rate": 0.9, "eval_win_rate_low": 0.8, "eval_win_rate_high": 0.95,
         "eval_distance": 0.3, "eval_pairs": 60.0},
        {"eval_win_rate": 0.52, "eval_win_rate_low": 0.4, "eval_win_rate_high": 0.6,
         "eval_distance": 0.001, "eval_pairs": 60.0},
    ]  # fmt: skip
    run = write_folder([[(make_rollout(), "kept")]] * 2)
    path = run / "_rounds" / "rounds.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line, metrics in zip(lines, scores, strict=True):
        line["eval"] = metrics
    del lines[0]["eval_before"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    charts = {chart["title"]: chart for chart in Parsed(write_report(run)).data["charts"]}
    assert charts["Win rate against the opponent"]["marks"][0][:2] == [1, "converged"]
    assert charts["Win rate against the opponent"]["series"][1]["values"] == [0.5, 0.5]


def test_alarms_are_listed_and_marked_in_the_charts(hostile_run) -> None:
    page = Parsed(write_report(hostile_run))
    expected = f"{HOSTILE[1]}round 0 · newest value 0.3 [0.2, 0.4] · action: warn{HOSTILE[0]}"
    assert expected in page.text
    assert [visible(HOSTILE[0]), "0.3", "–", ""] in page.rows  # a detector of another version
    of_scores = next(c for c in page.data["charts"] if c["title"] == "Accuracy and pass@k")
    assert of_scores["marks"] == [[1, "▲ 1", HOSTILE[1]]]  # "before" is the first label


def test_runs_are_compared_in_curves_and_settings(write_folder, make_rollout) -> None:
    rollouts = [(make_rollout(), "kept")]
    one = write_folder([rollouts] * 2, "a/run", config={"temperature": 1.0, "seed": 1})
    other = write_folder([rollouts] * 3, "b/run", config={"temperature": 0.5, "seed": 1})
    page = Parsed(write_report(one, compare=[other]))
    chart = next(c for c in page.data["charts"] if c["title"] == "Held-out accuracy")
    assert chart["labels"] == ["before", "0", "1", "2"]
    assert {s["name"]: s["values"] for s in chart["series"]} == {
        "a/run": [0.4, 0.5, 0.6, None],
        "b/run": pytest.approx([0.4, 0.5, 0.6, 0.7]),
    }
    assert ["temperature", "1.0", "0.5"] in page.rows
    assert not any(row[0] == "seed" and len(row) == 3 for row in page.rows)


def test_the_file_may_lie_anywhere(write_folder, make_rollout, tmp_path) -> None:
    run = write_folder([[(make_rollout(), "kept")]])
    target = tmp_path / "new folder" / "page.html"
    assert write_report(run / "_rounds", target) == target
    assert target.exists()
    assert not (run / "report.html").exists()


def test_samples_stand_with_their_solutions_if_the_run_kept_them(
    write_run, write_folder, make_rollout
) -> None:
    folder = write_folder([[(make_rollout(), "kept")]])
    assert Parsed(write_report(folder)).data["solutions"] == []
    records = [{"prompt": "1 + 1", "solution": "2"}, {"prompt": "1 + 2", "solution": HOSTILE[3]}]
    run = write_run(records, [[{"row": 1, "outcome": "kept"}]], name="kept")
    lines = (folder / "_rounds" / "rounds.jsonl").read_text()
    (run.root / "rounds.jsonl").write_text(lines)
    assert Parsed(write_report(run.output_dir)).data["solutions"] == [visible(HOSTILE[3])]


def test_detectors_stand_on_a_time_line_with_their_thresholds(write_folder, make_rollout) -> None:
    run = write_folder([[(make_rollout(), "kept")]] * 2, detectors={"truncation": 0.05}, alarms=[])
    path = run / "_rounds" / "rounds.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["detectors"] = {"truncation": 0.4, "coverage": 2.0, "drift-from-base": 0.5}
    text = warning_text(DETECTOR_OF["truncation"], Reading(0.4, 0.1, "40% are cut", 0.2, 0.6), 1)
    lines[1]["alarms"] = [{"name": "truncation", "value": 0.4, "text": text}]
    lines[0]["alarms"] = [{"name": "truncation", "value": 0.3, "text": "older"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Parsed(write_report(run))
    rows = [row for row in page.rows if row[0] in ("truncation", "coverage", "drift-from-base")]
    assert [row[:4] for row in rows] == [
        ["coverage", "–", "2", "> 1"],
        ["truncation", "▲ 0.05", "▲ 0.4", "> 0.1"],
        ["drift-from-base", "–", "0.5", "–"],  # without a threshold
    ]
    assert (
        f"0, 1 · newest value 0.4 · action: round 1: 40% are cut. {DETECTOR_OF['truncation'].remedy}"
        in page.text
    )
    assert "docs/" not in page.text
    assert "alarms1 raised 2 times" in page.text  # as many as in the list


def test_faithfulness_is_shown_where_it_was_measured(write_folder, make_rollout) -> None:
    run = write_folder([[(make_rollout(), "kept")]])
    assert "Faithfulness" not in Parsed(write_report(run)).text
    group = {"completions": 40, "prompts": 30, "own": {"mean": -0.5, "low": -0.6, "high": -0.4},
             "own - dropped": {"mean": 1.25, "low": 1.0, "high": 1.5}}  # fmt: skip
    measured = {"model": "tiny", "kept": 50, "tried": 40, "groups": {"all": group}}
    (run / "_rounds" / "faithfulness.json").write_text(json.dumps(measured))
    page = Parsed(write_report(run))
    assert ["all", "40", "-0.5 [-0.6, -0.4]", "–", "–", "1.25 [1, 1.5]", "–"] in page.rows
    assert "50 completions were kept, 40 of them tried. Model: tiny." in page.text


def test_a_training_without_rounds_is_shown_by_its_log(tmp_path) -> None:
    """Quiet-STaR's: the newest checkpoint that can be read, here the second."""
    for step in (1, 2, 10):
        history = [
            {"step": i, "loss": 3.0 - i, "thought/gain": 0.1 * i} for i in range(1, step + 1)
        ]
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{")
    (tmp_path / "quiet_star.json").write_text("{}")
    page = Parsed(write_report(tmp_path))
    assert "A training without rounds." in page.text
    charts = {chart["title"]: chart for chart in page.data["charts"]}
    assert charts.keys() == {"Loss", "Gain of thinking"}
    assert charts["Loss"]["labels"] == ["1", "2"]
    assert charts["Loss"]["series"][0]["values"] == [2.0, 1.0]
    assert [m["content"] for m in page.tags("meta") if m.get("name") == "viewport"]


def test_a_folder_without_run_and_log_is_told_what_to_do(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Pass the output_dir .* trainer\.save_state\(\)"):
        write_report(tmp_path)


def test_the_log_of_the_rounds_is_one_curve_with_their_beginnings(
    write_folder, make_rollout
) -> None:
    run = write_folder([[(make_rollout(), "kept")]] * 2)
    for index in (0, 1):
        history = [{"step": 300 * index + i, "loss": 1.0, "round": index} for i in range(300)]
        path = run / "_rounds" / f"round-{index:03d}" / "trainer_state.json"
        path.write_text(json.dumps({"log_history": history}))
    chart = next(c for c in Parsed(write_report(run)).data["charts"] if c["title"] == "Loss")
    assert len(chart["labels"]) == 200  # of 600: every third
    assert chart["marks"] == [[0, "round 0", ""], [100, "round 1", ""]]
