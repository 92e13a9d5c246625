"""`noisyssl`: parse, load the configuration, call one function. No logic lives here.

Each command's file imports what is heavy inside the command, so that `--help` answers at once.
"""

import errno
import io
import os
import signal
import sys
import traceback
from contextlib import suppress
from typing import NoReturn

import typer

from noisyssl.cli import (
    audit,
    bench,
    build,
    data,
    deploy,
    doctor,
    engine,
    evaluate,
    export,
    predict,
    probe,
    report,
    serve,
    training,
)
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
app.command()(audit.audit)
app.command()(export.export)
app.command()(engine.engine)
app.command()(predict.predict)
app.add_typer(deploy.app, name="deploy")
app.command()(serve.serve)
app.command()(evaluate.evaluate)
app.command()(report.report)
app.add_typer(bench.app, name="bench")
app.command()(build.build)
app.command()(build.demo)
app.command()(doctor.doctor)


def main(argv: list[str] | None = None) -> None:
    """Run one command and exit with the code of its outcome (design: 0 ok, 2-7 by kind, 1 our bug)."""
    signal.signal(signal.SIGTERM, terminated)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show stops nothing
            stream.reconfigure(errors="backslashreplace")
    launch.leave(run(sys.argv[1:] if argv is None else argv))


def terminated(number: int, frame: object) -> NoReturn:
    """SIGTERM unwinds, so that nothing half written stays behind; training catches it first."""
    sys.exit(128 + number)


def run(argv: list[str]) -> int:
    """The exit code of one command; what the user can fix is one line on stderr."""
    try:
        code = app(argv, standalone_mode=False, obj=argv) or 0
        return fail("interrupted.", 130) if code == 130 else code  # Typer makes a code of Ctrl-C
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
        silence()
        return 0
    except (
        OSError
    ) as error:  # of our own files, each place says more; this is the rest, such as a full stdout
        place = error.filename or "the output"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            silence()
            return fail(f"{place} cannot be written: the disk is full; free space and run it again.", 7)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return fail(f"{place}: {error.strerror}; change its permissions or name another place.", 7)
        raise
    except MemoryError:
        return fail("the memory is full; set a smaller --batch or --size, or fewer threads.", 7)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
            return fail("the GPU's memory is full; set a smaller --batch or --size, or train.accumulate.", 7)
        # Typer's own usage errors and exits; its click is vendored in some versions, so by what they carry
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(str(error), err=True)
            return 2
        if hasattr(error, "format_message"):
            return fail(f"{error.format_message()} See --help.", 2)
        if type(error).__name__ in ("Exit", "Abort"):
            return getattr(error, "exit_code", 130)
        if launch.is_lost_peer(error):
            launch.note_lost_peer(error)  # whoever ended first says why
            return TrainingError.code
        if not launch.started():
            raise
        launch.note_failure(traceback.format_exc())
        if launch.is_first_to_fail():
            traceback.print_exc()
        return 1


def silence() -> None:
    """Nobody reads stdout any more: what is still in its buffer must not raise at the exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message: str, code: int) -> int:
    launch.note_failure(message)
    if not launch.is_first_to_fail():
        return code
    with suppress(OSError):  # nobody may be reading; the code still says it
        typer.secho(f"error: {' '.join(message.split())}", err=True, fg="red")
    return code
