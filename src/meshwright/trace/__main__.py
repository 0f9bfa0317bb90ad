"""`python -m meshwright.trace --record runs/mine [-m module | script.py] arguments...`: record a program unchanged."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import click

from meshwright.spec import SettingError
from meshwright.trace.wrapper import arguments_of, check_program, run_program

FLAGS = ("--keep-traces", "--help")


class Program(click.Command):
    """From the program's name on, nothing is an option of ours."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the mark that ends options before `-m` or the script."""
        place = 0
        while place < len(args) and args[place].startswith("-") and args[place] not in ("-m", "--"):
            place += 1 if args[place] in FLAGS or "=" in args[place] else 2
        return super().parse_args(ctx, [*args[:place], "--", *args[place:]])


class Command(NamedTuple):
    """What the command line asks for, which can be done."""

    run: Path
    options: dict[str, Any]
    program: list[str]


@click.command(cls=Program)
# Not --run, which torchrun would take for the beginning of an option of its own.
@click.option("--record", "run", required=True, type=click.Path(path_type=Path), help="Run folder to record into.")
@click.option("--name", default="", help="The run's name (that of its folder).")
@click.option("--flops-per-step", type=float, help="Model FLOPs of a step, all ranks together (counted).")
@click.option("--tokens-per-step", type=int, help="Tokens of a step, all ranks together.")
@click.option("--precision", help="Of most matrix products: bf16 or fp32 (as counted).")
@click.option("--group", "groups", multiple=True, help="GROUP=PURPOSE: what a process group carries, such as tensor.")
@click.option("--budget", type=float, help="Share of the time that sampled steps may cost (0.005).")
@click.option("--every-steps", type=int, help="A sample each so many steps instead; 0: none.")
@click.option("--keep-traces", is_flag=True, help="Keep the profiler's traces in the run folder.")
@click.argument("program", nargs=-1, type=click.UNPROCESSED)
def read_command(run: Path, groups: tuple[str, ...], program: tuple[str, ...], **options: Any) -> Command:
    """Run a PyTorch program unchanged and record it: [-m MODULE | SCRIPT] ARGUMENTS...

    Steps end where its first optimizer has stepped.
    """
    named = {group.rpartition("=")[0]: group.rpartition("=")[2] for group in groups}
    command = Command(run, {**options, "groups": named, "first_step": 0, "trainer": words(program)}, list(program))
    # Looking for a module imports its package, which may read the arguments there and then, as torchtitan's does.
    sys.argv = arguments_of(program)
    check_program(*command)
    return command


def words(program: tuple[str, ...]) -> str:
    """The program's name, for people."""
    return " ".join(program[:2]).removeprefix("-m ") if program[:1] == ("-m",) else " ".join(program[:1])


def main() -> None:
    """The command. What the program raises, an interruption among it, is its own: click sees nothing of it."""
    try:
        command = read_command.main(prog_name="python -m meshwright.trace", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except SettingError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    # Else help was asked for, and given.
    if isinstance(command, Command):
        run_program(*command)


if __name__ == "__main__":
    main()
