"""One HTML file of a run: its curves, funnel, costs, alarms, samples, settings and lineage.

In: the folder of a run, finished or not. Out: a file that needs no other and no network. Its content security
policy names its own scripts by their hashes, so no other script runs in it; what a model or a dataset wrote
reaches the page as text alone, with control and invisible characters as escapes.

The charts are drawn by Chart.js 4.6.1 (MIT, 210 kB), which is in `assets/` as published on npm. Measured beside
it: uPlot 51 kB, which has no stacked bars; Observable Plot with d3 490 kB; Vega, Vega-Lite and Vega-Embed
832 kB. A package of Python that draws charts would have to be installed before a report can be written.
"""

import hashlib
import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from trl_selfplay.disk import save_text
from trl_selfplay.inspection.charts import (
    Chart,
    comparison_charts,
    cost_charts,
    funnel_chart,
    heldout_charts,
    sample_charts,
    training_charts,
)
from trl_selfplay.inspection.plain_text import visible
from trl_selfplay.inspection.run_folder import RunFolder
from trl_selfplay.inspection.samples_data import collect_samples
from trl_selfplay.inspection.summary import (
    Table,
    alarm_table,
    describe_progress,
    detector_table,
    differing_settings,
    faithfulness_table,
    format_number,
    funnel_table,
    key_numbers,
    lineage_table,
    name_runs,
    score_table,
    settings_rows,
    totals_table,
)

DEFAULT_SAMPLES = 60
_ASSETS = Path(__file__).parent / "assets"
# Characters that could end the script element that JSON stands in, those that UTF-8 can't hold, and
# those that act on whoever reads the page's source.
_UNSAFE = re.compile("[<>&\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def write_report(
    output_dir: str | Path,
    path: str | Path | None = None,
    compare: Sequence[str | Path] = (),
    samples: int = DEFAULT_SAMPLES,
) -> Path:
    """Write the report of a run and return its path.

    Args:
        output_dir: The run's output directory.
        path: The file to write; None means `report.html` in `output_dir`.
        compare: Output directories of other runs, shown in charts with this one.
        samples: The most samples of each round to show, and the most held-out ones.

    Raises:
        FileNotFoundError: There is no run, and no training without rounds that has left its log.
        DamagedFileError: The run's records can't be read. Samples that can't be read are left out, and
            the report says so.
        OSError: The file can't be written.
    """
    run = RunFolder.open_training(output_dir)
    others = [RunFolder.open(other) for other in compare]
    target = run.output_dir / "report.html" if path is None else Path(path)
    save_text(target, render_report(run, others, samples))
    return target


def render_report(
    run: RunFolder, others: Sequence[RunFolder] = (), samples: int = DEFAULT_SAMPLES
) -> str:
    """Return the report of a run as HTML, compared with other runs if there are any."""
    environment = Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # A name may have any character too; what macros return is not plain text.
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    compared = name_runs([run, *others]) if others else {}
    sections = _sections(run, compared)
    charts = [chart for _, _, charts, _ in sections for chart in charts]
    shown = collect_samples(run, samples)
    model = str(run.config.get("model") or "")
    style, library, script = (
        _asset(name) for name in ("report.css", "chart.umd.min.js", "report.js")
    )
    policy = (
        f"default-src 'none'; style-src 'sha256-{_digest(style)}'; "
        f"script-src 'sha256-{_digest(library)}' 'sha256-{_digest(script)}'; base-uri 'none'; "
        "form-action 'none'"
    )
    return environment.get_template("report.html.jinja").render(
        title=run.output_dir.resolve().name,
        run=run,
        model=Path(model).name if Path(model).is_absolute() else model,
        progress=describe_progress(run),
        is_finished=run.is_finished,
        numbers=key_numbers(run),
        sections=sections,
        alarms=alarm_table(run.lines),
        detectors=detector_table(run.lines),
        records_alarms=any("alarms" in line for line in run.lines),
        faithfulness=faithfulness_table(run),
        samples_note=shown.note,
        has_samples=bool(shown.samples),
        lineage=lineage_table(run),
        settings=settings_rows(run),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        policy=policy,
        style=style,
        library=library,
        script=script,
        data=script_json({"charts": [asdict(chart) for chart in charts], **shown.to_dict()}),
        table_of=table_of,
    )


def _sections(
    run: RunFolder, compared: Mapping[str, RunFolder]
) -> list[tuple[str, str, list[Chart], list[Table]]]:
    """Return the sections with charts: anchor, heading, charts and further tables."""
    lines = run.lines
    sections: list[tuple[str, str, list[Chart], list[Table]]] = []
    if compared:
        charts = comparison_charts({name: other.lines for name, other in compared.items()})
        tables = [totals_table(compared), differing_settings(compared)]
        sections.append(("comparison", "Comparison", charts, tables))
    if not lines:
        return [*sections, ("training", "Training", training_charts(run.log_history), [])]
    funnel = funnel_chart(lines)
    return [
        *sections,
        ("held-out", "Held-out scores", heldout_charts(lines), [score_table(lines)]),
        ("funnel", "Funnel", [] if funnel is None else [funnel], [funnel_table(lines)]),
        ("samples-over-rounds", "Length, diversity, rewards", sample_charts(lines), []),
        ("cost", "Time and tokens", cost_charts(lines), []),
        ("training", "Training", training_charts(run.log_history), []),
    ]


def table_of(chart: Chart) -> Table:
    """Return a chart's numbers as a table, one row per label."""
    header = [chart.axis]
    columns: list[list[str]] = []
    for series in chart.series:
        if series.is_reference:
            continue
        header.append(series.name)
        cells = [format_number(value) for value in series.values]
        if series.lows:
            cells = [
                cell
                if None in (low, high)
                else f"{cell} [{format_number(low)}, {format_number(high)}]"
                for cell, low, high in zip(cells, series.lows, series.highs, strict=True)
            ]
        columns.append(cells)
    if chart.marks:
        header.append("")
        marks = {place: full or short for place, short, full in chart.marks}
        columns.append([marks.get(place, "") for place in range(len(chart.labels))])
    return Table(tuple(header), tuple(zip(chart.labels, *columns, strict=True)))


def script_json(value: Any) -> str:
    r"""Return JSON that may stand in a script element: nothing in it can end the element.

    >>> script_json({"text": "</script>"})
    '{"text":"\\u003c/script\\u003e"}'
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _asset(name: str) -> str:
    """Return the text of a script or style, without the address of its source map."""
    text = (_ASSETS / name).read_text(encoding="utf-8")
    return text.partition("\n//# sourceMappingURL=")[0].strip()


def _digest(text: str) -> str:
    return b64encode(hashlib.sha256(text.encode()).digest()).decode()
