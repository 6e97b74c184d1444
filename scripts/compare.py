"""Compare runs: `python scripts/compare.py RUN_FOLDER … [--out NAME]`."""

import argparse
from pathlib import Path

from tdmpc_prune.command_line import console


def main(runs: list[Path], out: str) -> None:
    """Say which of the runs did better, and draw how they went."""
    from tdmpc_prune.analysis import compare, compare_report
    from tdmpc_prune.errors import UserError
    from tdmpc_prune.saving.files import write_file
    from tdmpc_prune.words import narrowed

    measured, without = compare.read(compare.find_runs(runs))
    left_out = [f"left out: '{run}' has not been evaluated yet" for run in without]
    if not measured:
        raise UserError("; ".join(left_out))
    table = "\n".join([compare_report.table(measured), *(["", *left_out] if left_out else [])])
    ways = compare.paths(measured)
    if ways:
        table += f"\n\nThe path of pruning:\n\n{compare_report.path_table(ways)}"
    print(narrowed(table))
    curves = compare_report.curve_table(measured)
    write_file(f"{out}.md", f"{table}\n\n{curves}\n", "--out")
    write_file(f"{out}.csv", compare_report.as_csv(measured), "--out")
    write_file(f"{out}.png", compare_report.picture(measured), "--out")
    if ways:
        write_file(f"{out}-path.png", compare_report.path_picture(measured), "--out")
    path = f", {out}-path.png" if ways else ""
    print(f"\nwritten to {out}.png{path}, .md and .csv")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or folders of those")
    parser.add_argument("--out", default="compare", help="of NAME.png, NAME.md and NAME.csv")
    with console():
        main(**vars(parser.parse_args()))
