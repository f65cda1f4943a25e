"""Seeded records for measurements: ``python -m loramem.planning.samples phonebook 100 > phonebook.jsonl``.

Keys are invented people ("First Last:", as in the paper's PhoneBook). Neither they nor ten-digit values occur in the
training of loramem-tiny.
"""

import json
import random
import string

import click

from loramem.embedded.corpus import is_held_out, standard_library
from loramem.errors import ArgumentError
from loramem.records.record import Record

FIRST = (
    "Ada Alan Amara Ana Anders Beatriz Boris Carmen Chen Clara Dagny Dario Deniz Edith Elif Emeka Farah Felix Grace "
    "Hana Henrik Ines Ivan Jamal Jonas Kaito Kofi Lena Liam Lucia Maeve Marco Mei Milan Nadia Noor Olga Omar Paula "
    "Pedro Priya Rafael Rosa Samir Sigrid Tariq Tomas Uma Viktor Wanda Yara Yusuf Zoe"
).split()
LAST = (
    "Abbott Acheampong Almeida Baker Bergström Bianchi Castellano Chowdhury Dimitrov Dupont Eriksen Fernandes Fischer "
    "Galloway Grigoryan Haddad Hoffmann Ibarra Ivanova Jankowski Kaminski Kowalczyk Lefebvre Lindqvist Mahmoud "
    "Marchetti Moreau Nakamura Novak Okafor Olsen Pereira Petrov Quintero Ramanathan Rossi Sandoval Schreiber Silva "
    "Takahashi Thorne Tkachenko Underwood Valdez Van-Dyke Whitaker Winther Yamamoto Zielinski Zhang"
).split()
MORE_LAST = (
    "Adeyemi Andersson Aoki Barbosa Bauer Bhatt Boateng Brandt Cardoso Cheng Costa Danso Duarte Ekström Farouk Ferrari "
    "Gruber Gutiérrez Hansen Hashimoto Horvat Iyer Jensen Kimura Kovalenko Kruger Larsen Lombardi Mbeki Mendes Mishra "
    "Molina Nguyen Nowak Okonkwo Oliveira Osei Park Popescu Reyes Sato Schwarz Sokolov Svensson Tanaka Torres Varga "
    "Weber Yilmaz Zhao"
).split()
# As many as are needed: smaller sets keep their records.
LAST_NAMES = (LAST, LAST + MORE_LAST, LAST + MORE_LAST + [f"{one}-{other}" for one in LAST for other in MORE_LAST])
KINDS = ("phonebook", "hex", "words", "source")


def generate(kind: str, records: int, seed: int = 0) -> list[Record]:
    """Records of one kind of value, up to 137,800 of them.

    - phonebook: ten digits, the first 6 to 9 (31.9 bits);
    - hex: sixteen hexadecimal digits (64 bits);
    - words: four words of the Python documentation topics;
    - source: a line of standard-library source that loramem-tiny was never trained on.
    """
    rng = random.Random(seed)
    last_names = next((names for names in LAST_NAMES if records <= len(FIRST) * len(names)), LAST_NAMES[-1])
    names = rng.sample([f"{first} {last}:" for first in FIRST for last in last_names], k=records)
    values: dict[str, None] = {}
    draw = _values(kind, rng)
    while len(values) < records:
        values[draw()] = None
    return [Record(name, value) for name, value in zip(names, values, strict=True)]


def _values(kind: str, rng: random.Random):  # type: ignore[no-untyped-def]  # a closure per kind: () -> str
    if kind == "phonebook":
        return lambda: rng.choice("6789") + "".join(rng.choices(string.digits, k=9))
    if kind == "hex":
        return lambda: "".join(rng.choices("0123456789abcdef", k=16))
    library = standard_library()
    if kind == "words":
        return lambda: " ".join(rng.choices(library.words, k=4))
    if kind == "source":
        held_out = (text for name, text in library.documents.items() if is_held_out(name))
        lines = sorted({line.strip() for text in held_out for line in text.splitlines()})
        return iter(rng.sample([line for line in lines if 20 <= len(line) <= 60], k=len(lines) // 4)).__next__
    raise ArgumentError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}", argument="kind", value=kind)


@click.command()
@click.argument("kind", type=click.Choice(KINDS))
@click.argument("records", type=int)
@click.option("--seed", default=0, show_default=True)
def main(kind: str, records: int, seed: int) -> None:
    """Print RECORDS of a KIND as JSON lines."""
    for record in generate(kind, records, seed):
        click.echo(json.dumps({"key": record.key, "value": record.value}, ensure_ascii=False))


if __name__ == "__main__":
    main()
