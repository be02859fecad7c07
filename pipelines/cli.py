"""`eyas`: one command, a verb a stage. Here is what stands in front of the verb."""

import click

from common import pod
from common.errors import EyasError
from pipelines.exit_codes import Group
from pipelines.verbs import heads, runs, servers, store, whole

ON_A_POD = ("dump", "train", "sweep")  # the same command on every host


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="eyas")
@click.option(
    "--cache",
    envvar="EYAS_CACHE",
    show_envvar=True,
    default=".cache",
    show_default=True,
    help="Where models and conversations are fetched to; --cache of a verb keeps what it reads of a store.",
)
@click.option(
    "--coordinator",
    envvar="EYAS_COORDINATOR",
    show_envvar=True,
    help="HOST:PORT of a pod's first process.",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    envvar="EYAS_PROCESSES",
    show_envvar=True,
    help="Processes of the pod, one a host; on Cloud TPU, GKE and Slurm it is found by itself.",
)
@click.option(
    "--process",
    type=click.IntRange(min=0),
    envvar="EYAS_PROCESS",
    show_envvar=True,
    help="Which of them this is, from 0.",
)
@click.pass_context
def main(
    ctx: click.Context, cache: str, coordinator: str | None, processes: int | None, process: int | None
) -> None:
    """Trains EAGLE3 draft heads: dump the target's features once, train many heads from them.

    The way: prepare -> dump -> train -> compare -> eval -> export. Every stage can be stopped and started
    again with the same command. `eyas demo` goes the whole way on an embedded model.
    """
    ctx.obj = cache
    if ctx.invoked_subcommand in ON_A_POD:
        pod.initialise(coordinator, processes, process)
    elif (processes or 1) > 1:
        raise EyasError(
            f"{ctx.invoked_subcommand} runs on one host, but --processes (or EYAS_PROCESSES) is {processes}; "
            f"run it once, with --processes 1 in front of {ctx.invoked_subcommand}"
        )


for _verb in (
    *(store.regenerate, store.prepare, store.dump, store.verify),
    *(heads.train, heads.sweep, heads.evaluate, heads.speculate, heads.export),
    *(runs.compare, runs.report),
    *(servers.serve_check, servers.bench_server),
    *(whole.demo, whole.bench, whole.bench_codecs, whole.targets),
):
    main.add_command(_verb)
