"""The report as a reader has it: in a real browser, with its scripts run."""

import json

import pytest
from browser import needs_chromium, open_browser
from run_folders import HOSTILE

from trl_selfplay.evaluation.detectors import DETECTOR_OF
from trl_selfplay.inspection.html_report import write_report
from trl_selfplay.inspection.plain_text import visible

pytestmark = needs_chromium

# Of each chart, how many of its pixels differ from its first: 0 where nothing is drawn.
DRAWN = """[...document.querySelectorAll("canvas")].map((canvas) => {
  const pixels = new Uint32Array(
    canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer);
  return pixels.reduce((count, pixel) => count + (pixel !== pixels[0]), 0);
})"""
# The least contrast of any text with what is behind it (WCAG 2.2).
CONTRAST = """(() => {
  const light = (rgb) => rgb.map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const found = parse(getComputedStyle(at).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found.slice(0, 3);
    }
    return [255, 255, 255];
  };
  let least = 99;
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !element.checkVisibility() || element.tagName === "SCRIPT") continue;
    const [a, b] = [light(parse(getComputedStyle(element).color).slice(0, 3)), light(behind(element))];
    least = Math.min(least, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return least;
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def completions(page):
    return page.evaluate(
        "[...document.querySelectorAll('#list article > pre')].map(e => e.textContent)"
    )


def test_hostile_texts_are_shown_and_nothing_in_them_runs(hostile_run, page) -> None:
    path = write_report(hostile_run)
    page.open(path)
    assert page.complaints == []
    assert page.requests == [path.as_uri()]
    assert "taken" not in page.evaluate("document.title")
    assert set(completions(page)) == {visible(f"so {text}") for text in HOSTILE}
    page.evaluate("document.querySelectorAll('#list button').forEach((each) => each.click())")
    assert page.evaluate("document.querySelectorAll('#same article pre').length") == 4
    assert page.evaluate("document.querySelectorAll('img, #list b, #same script').length") == 0
    assert min(page.evaluate(DRAWN)) > 100


def test_a_tools_result_is_text_wherever_it_is_shown(
    write_folder, make_rollout, word_tokenizer, page
) -> None:
    """Names of tools and arguments of calls are the model's, and results may be anyone's."""
    turns = []
    for text in HOSTILE:
        call = {"function": {"name": text, "arguments": {text: text}}}
        turns.append({"role": "assistant", "content": text, "tool_calls": [call]})
        turns.append({"role": "tool", "name": text, "content": f"Error: {text}"})
    rollout = make_rollout(
        completion_ids=tuple(word_tokenizer("so 3 = 4 ?")["input_ids"]),
        completion_mask=(True, True, False, False, True),
        messages=tuple(turns),
        num_failed_calls=1,
    )
    run = write_folder([[(rollout, "kept")]])
    word_tokenizer.save_pretrained(run)
    path = write_report(run)
    page.open(path)
    assert page.complaints == []
    assert page.requests == [path.as_uri()]
    assert "taken" not in page.evaluate("document.title")
    shown = page.evaluate("[...document.querySelectorAll('.step')].map((e) => e.textContent)")
    calls = [json.dumps({text: text}, ensure_ascii=False) for text in HOSTILE]
    assert shown == [
        visible(each)
        for number, (text, call) in enumerate(zip(HOSTILE, calls, strict=True), start=1)
        for each in (
            f"turn {number}{text}",
            f"turn {number}, call{text}({call})",
            f"failed call of {text}Error: {text}",
        )
    ]
    assert page.evaluate("document.querySelectorAll('.step :not(b, pre)').length") == 0
    struck = page.evaluate("[...document.querySelectorAll('pre s')].map((e) => e.textContent)")
    assert struck == ["= 4"]
    page.evaluate("document.getElementById('filters').elements.text.value = 'failed call of <IMG'")
    page.evaluate("document.getElementById('filters').dispatchEvent(new Event('input'))")
    assert page.evaluate("document.querySelectorAll('#list article').length") == 1
    assert page.evaluate(CONTRAST) >= 4.5


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_charts_are_drawn_and_texts_have_contrast(write_folder, make_rollout, page, scheme) -> None:
    rollouts = [(make_rollout(), "kept"), (make_rollout(sample_index=1, reward=0.0), "failed")]
    page.open(
        write_report(write_folder([rollouts] * 3, alarms=[], detectors={"a": 1.0})), scheme=scheme
    )
    assert page.complaints == []
    drawn = page.evaluate(DRAWN)
    assert len(drawn) >= 7
    assert min(drawn) > 500
    assert page.evaluate(CONTRAST) >= 4.5


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 820, 1440])
def test_no_page_is_wider_than_its_window(hostile_run, page, width) -> None:
    page.open(write_report(hostile_run), width=width)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 700])
def test_what_detectors_say_is_read_without_scrolling_sideways(
    write_folder, make_rollout, page, width
) -> None:
    values = dict.fromkeys(DETECTOR_OF, 0.1234)
    run = write_folder([[(make_rollout(), "kept")]] * 6, alarms=[], detectors=values)
    page.open(write_report(run), width=width)
    region = "document.getElementById('detector-table').parentElement"
    assert page.evaluate(f"{region}.scrollWidth - {region}.clientWidth") <= 0


@pytest.mark.slow
def test_samples_are_filtered_and_compared_over_rounds(write_folder, make_rollout, page) -> None:
    def rollouts(index):
        return [
            (
                make_rollout(
                    prompt_id=f"{i:032x}", round_index=index, reward=float(i), hinted=i == 2,
                    completion=f"round {index} prompt {i}",
                ),
                "kept" if i else "failed",
            )
            for i in range(3)
        ]  # fmt: skip

    page.open(write_report(write_folder([rollouts(0), rollouts(1)])))

    def choose(**values):
        page.evaluate("document.getElementById('filters').reset()")
        for name, value in values.items():
            page.evaluate(f"document.getElementById('filters').elements.{name}.value = '{value}'")
        page.evaluate("document.getElementById('filters').dispatchEvent(new Event('input'))")
        return set(completions(page))

    every = {f"round {r} prompt {i}" for r in (0, 1) for i in (0, 1, 2)}
    assert set(completions(page)) == {text for text in every if "round 1" in text}  # the newest
    assert choose() == every
    assert choose(round=0) == {text for text in every if "round 0" in text}
    assert choose(outcome="wrong") == {text for text in every if "prompt 0" in text}
    assert choose(hinted="yes") == {text for text in every if "prompt 2" in text}
    assert choose(least=1, most=1) == {text for text in every if "prompt 1" in text}
    assert choose(text="ROUND 1 prompt 2") == {"round 1 prompt 2"}
    page.evaluate("document.querySelector('#list button').click()")
    shown = page.evaluate("[...document.querySelectorAll('#same pre')].map((e) => e.textContent)")
    assert {f"round {r} prompt 2" for r in (0, 1)} <= set(shown)


def test_the_page_can_be_used_with_keys_alone(write_folder, make_rollout, page) -> None:
    page.open(write_report(write_folder([[(make_rollout(), "kept")]] * 2)))
    for _ in range(200):
        page.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "This prompt in 2 rounds":
            break
    assert page.evaluate("document.activeElement.tagName") == "BUTTON"
    page.press("Enter")
    assert page.evaluate("document.activeElement.textContent").endswith("2 rounds")
    assert page.evaluate("document.querySelectorAll('#same .columns > section').length") == 2
