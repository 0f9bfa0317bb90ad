"""What holds for the whole suite, and what several of its files start from."""

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

# A shell starts background jobs with SIGINT ignored, which their children inherit: Ctrl-C could not be tried.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """What torch.compile has done for tests before, which a forked rank would have done too: a recorder asks for it."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is not None:
        dynamo.counters.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a file's cases have their text, tokens and references."""
    from meshwright.launch.shrink import write_text

    folder = tmp_path_factory.mktemp("cases")
    write_text(folder)
    return folder


@pytest.fixture(scope="module")
def references(folder: Path) -> Any:
    """One process's runs, each made once for a file's cases."""
    # Not for every test: it imports torch.
    from verifying import References

    return References(folder)
