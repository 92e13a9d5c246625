"""`noisyssl bench serving`: what Triton costs, and what batching requests together gives."""

from typing import Annotated

import typer

from noisyssl.cli.bench_records import Out, tell
from noisyssl.cli.options import Json


def serving(
    rounds: Annotated[int, typer.Option(help="Turns of each side.")] = 15,
    requests: Annotated[int, typer.Option(help="Answers that are compared with the model's own.")] = 10_000,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Real Triton with real clients: dynamic batching, the cost of a call, whether every answer is right."""
    from noisyssl.benchmarks.serving import measure

    tell(measure(rounds=rounds, requests=requests), out, as_json)
