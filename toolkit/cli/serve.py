"""`noisyssl serve`: a real Triton server on this machine, without a container."""

import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from noisyssl.deploy.triton_repository import Repository
    from noisyssl.deploy.triton_server import Server


def serve(
    source: Annotated[Path, typer.Argument(help="Bundle, or repository of `noisyssl deploy triton`.")],
    host: Annotated[str, typer.Option(help="Address; any other needs a proxy before it.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="Port of HTTP; 0 takes a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Port of gRPC; 0 takes a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Port of the metrics; 0 takes a free one.")] = 8002,
) -> None:  # fmt: skip
    """Serve until Ctrl-C or SIGTERM, which let running requests finish."""
    from noisyssl.deploy.triton_server import Server

    ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
    with ExitStack() as stack:
        server = stack.enter_context(Server(_repository(source, stack), host=host, ports=ports))
        stack.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            _tell(server)
            server.watch()
        except KeyboardInterrupt:
            counts = server.served()
            typer.echo(f"stopping; {counts['success']:,} requests answered, {counts['failure']:,} refused.")


def _repository(source: Path, stack: ExitStack) -> "Repository":
    """The repository `source`, or one made of the bundle `source` for as long as it is served."""
    from noisyssl.deploy.bundle import MANIFEST
    from noisyssl.deploy.triton_models import version
    from noisyssl.deploy.triton_repository import deploy, read

    if not (source / MANIFEST).exists() and source.is_dir():
        return read(source)
    new = version(source)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="noisyssl-serve-")))
    return deploy(folder / "repository", new, None)


def _tell(server: "Server") -> None:
    record = server.repository.record
    name = record["name"]
    typer.echo(
        f"{name} version {record['active']} is ready: {len(record['classes'])} classes, {record['size']} "
        f"pixels; Triton {server.version()}, process {server.pid}"
    )
    typer.echo(f"  HTTP     http://{server.url('http')}/v2/models/{name}/infer")
    typer.echo(f"  gRPC     {server.url('grpc')}")
    typer.echo(f"  health   http://{server.url('http')}/v2/health/ready")
    typer.echo(f"  metrics  http://{server.url('metrics')}/metrics")
    for model, why in server.left_out.items():
        typer.echo(f"  {model} is not served here: {why}")
    typer.echo(f"NOISYSSL_TRITON={server.url('http')}/{name} noisyssl predict BUNDLE IMAGES --runtime triton")
    typer.echo("Ctrl-C stops it.")
