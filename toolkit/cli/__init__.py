"""`noisyssl`: parse, load the configuration, call one function. No logic lives here.

Each command's file imports what is heavy inside the command, so that `--help` answers at once.
"""

import os
import sys
import traceback

import typer

from noisyssl.cli import bench, build, data, doctor, evaluate, export, predict, probe, report, training
from noisyssl.errors import ConfigError, NoisySSLError, TrainingError
from noisyssl.pipelines import launch

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Turn medical images with unreliable labels into classifiers that hospitals can serve.",
)


def show_version(wanted: bool) -> None:
    if wanted:
        from noisyssl import __version__

        typer.echo(f"noisyssl {__version__}")
        raise typer.Exit


@app.callback()
def noisyssl(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=show_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Pretrain without labels, fine-tune under label noise, export with proof, serve."""
    if launch.started() and context.invoked_subcommand != "pretrain":
        raise ConfigError(
            f"torchrun started several processes, but `noisyssl {context.invoked_subcommand}` works in one; "
            "only pretrain uses several. Start it without torchrun."
        )


app.add_typer(data.app, name="data")
app.command()(training.pretrain)
app.command()(training.train)
app.command()(probe.probe)
app.command()(probe.embed)
app.command()(export.export)
app.command()(predict.predict)
app.command()(evaluate.evaluate)
app.command()(report.report)
app.add_typer(bench.app, name="bench")
app.command()(build.build)
app.command()(build.demo)
app.command()(doctor.doctor)


def main(argv: list[str] | None = None) -> None:
    """Run one command and exit with the code of its outcome (design: 0 ok, 2-7 by kind, 1 our bug)."""
    launch.leave(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """The exit code of one command; what the user can fix is one line on stderr."""
    try:
        return app(argv, standalone_mode=False, obj=argv) or 0
    except NoisySSLError as error:
        return fail(str(error), error.code)
    except KeyboardInterrupt:
        return fail("interrupted.", 130)
    except (
        BrokenPipeError,
        SystemExit,
    ) as error:  # `| head` has seen enough; rich and click exit by themselves
        if isinstance(error, SystemExit) and error.code != 1:
            return int(error.code or 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # Typer's own usage errors and exits; its click is vendored in some versions, so by what they carry
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(str(error), err=True)
            return 2
        if hasattr(error, "format_message"):
            return fail(f"{error.format_message()} See --help.", 2)
        if type(error).__name__ in ("Exit", "Abort"):
            return getattr(error, "exit_code", 130)
        if launch.is_lost_peer(error):
            return TrainingError.code  # whoever ended first says why
        if not launch.started():
            raise
        launch.note_failure(traceback.format_exc())
        if launch.is_first_to_fail():
            traceback.print_exc()
        return 1


def fail(message: str, code: int) -> int:
    launch.note_failure(message)
    if launch.is_first_to_fail():
        typer.secho(f"error: {' '.join(message.split())}", err=True, fg="red")
    return code
