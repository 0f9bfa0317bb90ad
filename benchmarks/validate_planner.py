"""Predictions against measurements that others have published.

    python benchmarks/validate_planner.py ROWS.csv [ROWS.csv ...] [--json]

Prints for each source, never pooled, how far predictions are from its rows and which rows could not be read, and exits
with 1 where a bar is missed or nothing could be compared. Rows are jobs by published_rows.py, in which no row and no
source is a special case.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from published_memory import report_memory
from published_rows import Row, read_rows
from published_times import report_time

from meshwright.spec import SettingError


def read_files(paths: list[Path]) -> tuple[list[Row], Counter[str]]:
    """All rows that are jobs, each once however many files have it; and how many are none, by why."""
    rows: dict[str, Row] = {}
    unread: Counter[str] = Counter()
    for path in paths:
        for row in read_rows(path):
            if isinstance(row, Row):
                rows[row.id] = row
            else:
                unread[row[1]] += 1
    return list(rows.values()), unread


def main() -> int:
    """Read, predict, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        rows, unread = read_files(arguments.rows)
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    times, factors = report_time(rows)
    bars = report_memory(rows) + times
    if arguments.json:
        print(json.dumps({"unread": unread, "factors": factors, "bars": [bar.as_json() for bar in bars]}, indent=2))
    else:
        print(f"{len(rows)} rows read, {unread.total()} not:")
        for reason, count in unread.most_common():
            print(f"  {count:5} {reason}")
        for line in [*factors, *(bar.line() for bar in bars)]:
            print(line)
    return 0 if bars and all(bar.met for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
