"""Write results/gpu.md from the JSON files of the parts, by card."""

from pathlib import Path


def write_report(results: Path) -> None:
    """Write the tables of all cards beside their folder."""
    results.with_suffix(".md").write_text("\n")
