"""The command line: the only reader of arguments and environment."""

from meshwright.cli.commands import cli, main
from meshwright.cli.machine import check_devices, read

__all__ = ["check_devices", "cli", "main", "read"]
