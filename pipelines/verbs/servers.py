"""Heads in running servers: serve-check, bench-server."""

from typing import Any

import click

from pipelines.options import options
from pipelines.serving.config import BenchServerConfig, ServeCheckConfig
from pipelines.verbs.shared import configure, fetch, model_option, show, store_option


@click.command("serve-check")
@click.argument("head", metavar="HEAD")
@model_option
@store_option
@click.option("--out", help="Takes layouts, the server's logs and the result (default: HEAD-served).")
@options(ServeCheckConfig)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.pass_obj
def serve_check(
    cache: str, head: str, model: str, store: str, out: str | None, as_json: bool, **given: Any
) -> None:
    """Serves the target with the head HEAD by vLLM on this machine's CPU, in every layout that vLLM loads,
    and compares its counters and its answers with our own.

    vLLM is set up in an environment of its own, once. Exit code 2 if a head is not served as it was measured.

    Example: eyas serve-check runs/smollm2-135m/best --store stores/smollm2-135m
    """
    from pipelines.same_target import require_same_target
    from pipelines.serving import check as stage

    place = {"head": head, "store": store, "model": model, "out": out or f"{head.rstrip('/')}-served"}
    config = configure(ServeCheckConfig, None, "", given | place)
    require_same_target(store, model)
    found = stage.run(fetch(config, cache))
    show(found) if as_json else click.echo(stage.table(found))
    stage.require_agreement(found, config.tolerance)


@click.command("bench-server")
@click.argument("url", metavar="URL")
@options(BenchServerConfig)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def bench_server(url: str, as_json: bool, **given: Any) -> None:
    """Measures a running server at several loads: tokens a second, latency, and the acceptance that it tells.

    URL serves a target with a head, as OpenAI's chat completions do; --without the same target alone.

    Example: eyas bench-server http://localhost:8000/v1 --without http://localhost:8001/v1
    --served-model Qwen/Qwen3-8B
    """
    from pipelines.serving import bench as stage
    from pipelines.serving.bench_table import table

    found = stage.run(configure(BenchServerConfig, None, "", given | {"url": url}))
    show(found) if as_json else click.echo(table(found))
