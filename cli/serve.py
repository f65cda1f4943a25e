"""loramem serve: the store's records over OpenAI's API."""

from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from loramem.errors import LoramemError

from . import options
from .output import note, print_json

if TYPE_CHECKING:
    from loramem import Target
    from loramem.endpoint.app import Unknown
    from loramem.models.dtypes import DtypeChoice


@click.command("serve")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address; 0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--token",
    envvar="LORAMEM_TOKEN",
    show_envvar=True,
    help="That clients must give (as their API key). The environment keeps it out of the list of processes.",
)
@click.option(
    "--unknown",
    type=click.Choice(["error", "base"]),
    default="error",
    show_default=True,
    help="An unknown key: 404 with close keys, or what the base model says without adapters.",
)
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True, help="Most questions decoded together.")
@click.option("--queue", type=click.IntRange(1), default=512, show_default=True, help="Most requests at once.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=60.0, show_default=True, help="Seconds, at most.")
@click.option("--max-body", type=click.IntRange(1), default=256 * 1024, show_default=True, help="Bytes of a request.")
@click.option(
    "--upstream",
    metavar="URL",
    help="A server that has the adapters (vLLM, SGLang, llama.cpp); it decodes instead.",
)
@click.option("--target", type=click.Choice(["vllm", "sglang", "llama.cpp"]), help="What it is, if it does not say.")
@options.store_options
@options.dtype_option
def command(
    host: str,
    port: int,
    token: str | None,
    unknown: "Unknown",
    batch: int,
    queue: int,
    timeout: float,
    max_body: int,
    upstream: str | None,
    target: "Target | None",
    store: options.StoreOptions,
    as_json: bool,
    dtype: "DtypeChoice",
) -> None:
    """Answer the store's keys as OpenAI-compatible chat and text completions, until interrupted.

    The key is the last user message, or the prompt; the model is loramem, or loramem/NAMESPACE. Answers are decoded
    greedily and compared with the committed digest. Commits by other processes count from the next request on. With
    --json one line on stdout says the URL once it answers.
    """
    try:
        from loramem.endpoint.backends import Backend, OwnModel
        from loramem.endpoint.limits import Limits
        from loramem.endpoint.server import address_of, listen, server_of
        from loramem.endpoint.upstream import Upstream
        from loramem.serving.endpoints import Endpoint as Server
    except ModuleNotFoundError as error:
        raise LoramemError(f"{error.name} is not installed. Run pip install 'loramem[serve]'.") from None
    limits = Limits(body_bytes=max_body, queue=queue, answer_s=timeout, batch_records=batch)
    if upstream is not None and dtype != "auto":
        raise click.UsageError("--dtype is of the model in this process; there is none with --upstream.")
    if upstream is not None and unknown == "base":
        raise click.UsageError("--unknown base asks the model of this process; there is none with --upstream.")
    with ExitStack() as stack:
        opened = stack.enter_context(store.open(dtype=dtype))
        if upstream is None:
            opened.base  # noqa: B018  # loaded and checked before anything is answered
            backend: Backend = OwnModel(opened, limits)
        else:
            backend = Upstream(opened, stack.enter_context(Server(upstream, target, timeout_s=timeout)), limits)
        bound = stack.enter_context(listen(host, port))
        if token is None and host not in ("127.0.0.1", "::1", "localhost"):
            note("Anyone who reaches this address can ask for every record: set LORAMEM_TOKEN.")
        address = address_of(bound)
        note(f"Answering at {address}, models loramem and loramem/NAMESPACE. Ctrl-C ends it.")
        if as_json:
            print_json({"url": address})
        server_of(backend, host, limits, token=token, unknown=unknown).run(sockets=[bound])
