"""loramem mcp: the store as tools for agents."""

import click

from loramem.errors import LoramemError

from . import options


@click.command("mcp")
@click.option("--read-only", is_flag=True, help="Leave out the tool that writes.")
@options.change_options
def command(read_only: bool, store: options.StoreOptions, as_json: bool) -> None:
    """Serve the tools recall, list_keys and remember of the Model Context Protocol over stdin and stdout.

    Agents start it themselves: give them this command. It ends when they close stdin.
    """
    try:
        from loramem.endpoint.mcp_server import mcp_server
    except ModuleNotFoundError as error:
        raise LoramemError(f"{error.name} is not installed. Run pip install 'loramem[mcp]'.") from None
    with store.open(create=not read_only) as opened:
        mcp_server(opened, read_only=read_only).run("stdio")
