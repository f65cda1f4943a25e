"""Write a phone book of invented entries: ``python examples/make_phonebook.py 100 > examples/phonebook.jsonl``.

The form is that of the paper's PhoneBook: "First Last:" and ten digits, the first of them 6 to 9. One value carries
2 + 9·log2(10) = 31.9 bits.
"""

import json
import random
import sys

FIRST = ["Ada", "Alan", "Amara", "Ana", "Anders", "Beatriz", "Boris", "Carmen", "Chen", "Clara", "Dagny", "Dario", "Deniz", "Edith", "Elif", "Emeka", "Farah", "Felix", "Grace", "Hana", "Henrik", "Ines", "Ivan", "Jamal", "Jonas", "Kaito", "Kofi", "Lena", "Liam", "Lucia", "Maeve", "Marco", "Mei", "Milan", "Nadia", "Noor", "Olga", "Omar", "Paula", "Pedro", "Priya", "Rafael", "Rosa", "Samir", "Sigrid", "Tariq", "Tomas", "Uma", "Viktor", "Wanda", "Yara", "Yusuf", "Zoe"]
LAST = ["Abbott", "Acheampong", "Almeida", "Baker", "Bergström", "Bianchi", "Castellano", "Chowdhury", "Dimitrov", "Dupont", "Eriksen", "Fernandes", "Fischer", "Galloway", "Grigoryan", "Haddad", "Hoffmann", "Ibarra", "Ivanova", "Jankowski", "Kaminski", "Kowalczyk", "Lefebvre", "Lindqvist", "Mahmoud", "Marchetti", "Moreau", "Nakamura", "Novak", "Okafor", "Olsen", "Pereira", "Petrov", "Quintero", "Ramanathan", "Rossi", "Sandoval", "Schreiber", "Silva", "Takahashi", "Thorne", "Tkachenko", "Underwood", "Valdez", "Van-Dyke", "Whitaker", "Winther", "Yamamoto", "Zielinski", "Zhang"]


def phone_book(records: int, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    names = rng.sample([f"{first} {last}:" for first in FIRST for last in LAST], k=records)
    numbers: dict[str, None] = {}
    while len(numbers) < records:
        numbers[rng.choice("6789") + "".join(rng.choices("0123456789", k=9))] = None
    return [{"key": name, "value": number} for name, number in zip(names, numbers, strict=True)]


if __name__ == "__main__":
    for record in phone_book(int(sys.argv[1])):
        print(json.dumps(record, ensure_ascii=False))
