"""`python -m migrations [upgrade | check | revision MESSAGE]`, for people who change the tables.

`check` migrates a fresh SQLite database and compares it with scheduler/db/models.py; `make check` runs it.
"""

import sys
import tempfile
from pathlib import Path

from scheduler.db.schema import migrate, new_revision, schema_differences
from scheduler.errors import StartupError
from scheduler.settings import Settings, load_settings

USAGE = "usage: python -m migrations [upgrade | check | revision MESSAGE]"


def main(arguments: list[str]) -> int:
    """Run one command; its exit status."""
    try:
        match arguments:
            case ["upgrade"] | []:
                print(f"The database is at revision {migrate(load_settings())}.")
            case ["check"]:
                return _check()
            case ["revision", message]:
                _write_revision(message)
            case _:
                print(USAGE, file=sys.stderr)
                return 2
    except StartupError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


def _check() -> int:
    with tempfile.TemporaryDirectory() as folder:
        fresh = _fresh(folder)
        revision = migrate(fresh)
        differences = schema_differences(fresh)
    for difference in differences:
        print(f"models.py and the migrations differ: {difference}", file=sys.stderr)
    if not differences:
        print(f"The migrations make the tables of models.py (revision {revision}).")
    return 1 if differences else 0


def _write_revision(message: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fresh = _fresh(folder)
        migrate(fresh)
        new_revision(fresh, message)


def _fresh(folder: str) -> Settings:
    return Settings(home=Path(folder), database_url=f"sqlite:///{folder}/check.db")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
