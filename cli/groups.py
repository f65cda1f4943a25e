"""Groups of commands whose help says what each of them does in a whole sentence."""

import click


class Commands(click.Group):
    """Its commands in the order in which they were added, with the first sentence of each, wrapped and not cut off."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _sentence(command)) for name, command in self.commands.items()])


def _sentence(command: click.Command) -> str:
    paragraph = " ".join((command.help or "").split("\n\n")[0].split())
    return paragraph.replace(" (./memory unless named)", "").split(". ")[0].rstrip(".")
