"""Draw learning curves: `python scripts/curves.py RUN_FOLDER … [--out NAME]`."""

import argparse
import sys
from pathlib import Path

from tdmpc_prune import curves
from tdmpc_prune.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--out", type=Path, default=Path("curves"), help="of NAME.png, NAME.csv")
    arguments = parser.parse_args()
    try:
        points = curves.read_points(arguments.runs)
        curves.draw(points, arguments.out.with_suffix(".png"))
        curves.write_csv(points, arguments.out.with_suffix(".csv"))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(curves.table(points))
    print(f"\nwritten to {arguments.out}.png and {arguments.out}.csv")


if __name__ == "__main__":
    main()
