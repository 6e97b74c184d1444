"""Compare runs: `python scripts/compare.py RUN_FOLDER … [--published] [--out NAME]`."""

import argparse
import sys
from pathlib import Path

from tdmpc_prune.command_line import console


def main(runs: list[Path], published: bool, out: str) -> None:
    """Say which of the runs did better, and draw how they went."""
    if published:
        beside_published(runs, out)
    else:
        compare_runs(runs, out)


def compare_runs(runs: list[Path], out: str) -> None:
    """Runs beside each other."""
    from tdmpc_prune.analysis import compare, compare_report
    from tdmpc_prune.errors import UserError
    from tdmpc_prune.saving.files import write_file
    from tdmpc_prune.words import narrowed

    measured, without = compare.read(compare.find_runs(runs))
    left_out = compare.left_out(without)
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


def beside_published(runs: list[Path], out: str) -> None:
    """Dense runs beside what others have published."""
    from tdmpc_prune.analysis import compare, returns, returns_report
    from tdmpc_prune.saving.files import write_file
    from tdmpc_prune.saving.run_folder import command_line
    from tdmpc_prune.words import narrowed

    found, without = returns.read(compare.find_runs(runs))
    page = returns_report.page(found, without, out, command_line(sys.argv))
    print("\n".join([narrowed(returns_report.table(found)), *compare.left_out(without)]))
    write_file(f"{out}.md", f"{page}\n", "--out")
    write_file(f"{out}.csv", returns_report.as_csv(found), "--out")
    write_file(f"{out}.png", returns_report.picture(found), "--out")
    print(f"\nwritten to {out}.png, .md and .csv")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or folders of those")
    parser.add_argument(
        "--published", action="store_true", help="dense runs, beside what others have published"
    )
    parser.add_argument("--out", default="compare", help="of NAME.png, NAME.md and NAME.csv")
    with console():
        main(**vars(parser.parse_args()))
