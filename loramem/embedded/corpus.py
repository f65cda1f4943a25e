"""What loramem-tiny is trained on: text that every Python installation carries, and generated look-ups.

Three kinds of row, all drawn from ``random.Random`` seeded by (seed, step, row), so that step s of a run needs
no state but its number:

- *text*: the standard library's source and the documentation topics of ``pydoc_data``;
- *look-ups*: key-value lists followed by questions about them, and docstrings as question and answer, in the
  chat format, so that answer positions learn to attend to keys;
- *facts*: a rolling table of arbitrary key-value pairs with nothing to look up. Each lives for a fixed number
  of exposures and is then replaced, so the base is trained to *learn a fact from its gradient*, which is what
  an adapter will ask of it.

No ten-digit value and no person's name as key is generated anywhere: those belong to the benchmarks.
"""

import ast
import hashlib
import random
import string
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (PAD, END, USER, ASSISTANT)

# Not prose or code a reader would learn from: tests, generated tables, and the raw form of the topics.
EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3"}
BENCHMARK_DIGITS = 10  # the length of a phone number, held out of the recipe
SCRIPTS = ((0x0391, 0x03C9), (0x0410, 0x044F), (0x0621, 0x064A), (0x3041, 0x3096), (0x4E00, 0x4FFF), (0x1F600, 0x1F64F))


def chat(question: str, answer: str) -> tuple[str, str]:
    """Prompt and completion of one turn in loramem-tiny's chat format."""
    return f"{USER}{question}{END}{ASSISTANT}", f"{answer}{END}"


def is_held_out(name: str) -> bool:
    """Whether a document belongs to the 4 % that is never trained on (by hash of its name)."""
    return hashlib.sha256(name.encode()).digest()[0] < 10


@dataclass(frozen=True)
class Docstring:
    """A qualified name of the standard library and the first paragraph of its documentation."""

    name: str
    text: str


class StandardLibrary:
    """The running interpreter's standard library as documents."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or Path(sysconfig.get_path("stdlib"))

    @cached_property
    def documents(self) -> dict[str, str]:
        """Relative path or topic name -> text, sorted by name."""
        found = {}
        for path in sorted(self.root.rglob("*.py")):
            relative = path.relative_to(self.root)
            if EXCLUDED.isdisjoint(relative.parts):
                found[relative.as_posix()] = path.read_text(encoding="utf-8", errors="ignore")
        from pydoc_data.topics import topics

        found |= {f"topic:{name}": text for name, text in sorted(topics.items())}
        return found

    @cached_property
    def docstrings(self) -> list[Docstring]:
        """First paragraphs of the docstrings of training documents, in order."""
        found = []
        for path, source in self.documents.items():
            if path.startswith("topic:") or is_held_out(path):
                continue
            module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            try:
                tree = ast.parse(source)
            except SyntaxError:
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                    found.append(Docstring(f"{module}.{node.name}", text.split("\n\n")[0][:400]))
        return found

    @cached_property
    def lines(self) -> list[str]:
        """Stripped source lines of 12 to 60 characters of training documents, each once."""
        seen = dict.fromkeys(
            line.strip()
            for path, source in self.documents.items()
            if not path.startswith("topic:") and not is_held_out(path)
            for line in source.splitlines()
        )
        return [line for line in seen if 12 <= len(line) <= 60]

    @cached_property
    def words(self) -> list[str]:
        """Lower-case words of the documentation topics, each once, sorted."""
        text = " ".join(text for name, text in self.documents.items() if name.startswith("topic:"))
        return sorted({word for word in text.split() if word.isascii() and word.isalpha() and word.islower()})

    def digest(self) -> str:
        """SHA-256 over all documents: names the exact text a model was trained on."""
        digest = hashlib.sha256()
        for name, text in self.documents.items():
            digest.update(f"{name}\0{text}\0".encode("utf-8", errors="surrogatepass"))
        return digest.hexdigest()


@cache
def standard_library() -> StandardLibrary:
    """That of this interpreter, read once for all who draw from it."""
    return StandardLibrary()


class Generator:
    """Keys, values and the documents made of them."""

    def __init__(self, library: StandardLibrary, seed: int) -> None:
        self.library = library
        self.seed = seed

    def rng(self, *place: object) -> random.Random:
        """The random stream of one place (purpose, step, row...) of the run."""
        return random.Random(f"{self.seed}:{place}")

    def key(self, rng: random.Random) -> str:
        """A key: dotted name, phrase, code, pseudo-word or text in another script; never a person's name."""
        kind = rng.random()
        if kind < 0.25:
            key = rng.choice(self.library.docstrings).name
        elif kind < 0.5:
            key = " ".join(rng.choices(self.library.words, k=rng.randint(1, 4)))
        elif kind < 0.7:
            key = f"{rng.choice(self.library.words)}{rng.choice('-_/. #')}{self.digits(rng, rng.randint(1, 5))}"
        elif kind < 0.92:
            key = " ".join(pseudo_word(rng) for _ in range(rng.randint(1, 2)))
        else:
            key = foreign_text(rng, rng.randint(2, 8))
        return key + rng.choice(("", "", ":", "?", " ="))

    def digits(self, rng: random.Random, length: int) -> str:
        return "".join(rng.choices(string.digits, k=length))

    def value(self, rng: random.Random) -> str:
        """A value: digits (never ten), hex, words, a source line, a code, or text in another script."""
        kind = rng.random()
        if kind < 0.4:
            return self.digits(rng, rng.choice([n for n in range(3, 17) if n != BENCHMARK_DIGITS]))
        if kind < 0.58:
            return "".join(rng.choices("0123456789abcdef", k=rng.choice((6, 8, 12, 16, 24, 32))))
        if kind < 0.73:
            return " ".join(rng.choices(self.library.words, k=rng.randint(1, 5)))
        if kind < 0.86:
            return rng.choice(self.library.lines)
        if kind < 0.95:
            groups = (
                "".join(rng.choices(string.ascii_uppercase + string.digits, k=4)) for _ in range(rng.randint(1, 4))
            )
            return "-".join(groups)
        return foreign_text(rng, rng.randint(2, 6))

    def lookup(self, rng: random.Random) -> Iterator[tuple[str, bool]]:
        """A key-value list and questions about it, as pieces (text, is it worth learning to predict).

        The list itself is random, hence unlearnable; only what follows from it is supervised.
        """
        pairs = [(self.key(rng), self.value(rng)[:24]) for _ in range(rng.randint(2, 6))]
        separator = rng.choice((" ", ": ", " = ", "\t", " -> "))
        listing = "\n".join(f"{key}{separator}{value}" for key, value in pairs)
        asked = rng.sample(pairs, k=rng.randint(1, len(pairs)))
        if rng.random() < 0.5:
            yield f"{USER}{listing}{END}", False
            for key, value in asked:
                prompt, completion = chat(key, value)
                yield prompt, False
                yield completion, True
        else:
            yield f"{listing}\n\n", False
            for key, value in asked:
                yield f"{key}{separator}", False
                yield f"{value}\n", True
            yield END, True

    def explained(self, rng: random.Random) -> Iterator[tuple[str, bool]]:
        """A docstring as question and answer."""
        docstring = rng.choice(self.library.docstrings)
        question = rng.choice(("What does {} do?", "{}", "Describe {}.", "help({})")).format(docstring.name)
        prompt, completion = chat(question, docstring.text)
        yield prompt, True
        yield completion, True

    def fact(self, slot: int, generation: int) -> tuple[str, str]:
        """The pair that occupies a slot of the rolling table in a generation."""
        rng = self.rng("fact", slot, generation)
        return chat(self.key(rng), self.value(rng))


def pseudo_word(rng: random.Random) -> str:
    """A pronounceable lower-case word of two to four syllables that no dictionary holds."""
    onsets = [
        "b",
        "br",
        "c",
        "ch",
        "d",
        "f",
        "g",
        "gl",
        "h",
        "j",
        "k",
        "l",
        "m",
        "n",
        "p",
        "r",
        "s",
        "st",
        "t",
        "v",
        "w",
        "z",
    ]
    codas = ["", "", "n", "r", "l", "s", "x", "rk", "nd"]
    return "".join(rng.choice(onsets) + rng.choice("aeiou") + rng.choice(codas) for _ in range(rng.randint(2, 4)))


def foreign_text(rng: random.Random, length: int) -> str:
    """Characters of one non-Latin script, so that the byte tokens of UTF-8 are trained."""
    low, high = rng.choice(SCRIPTS)
    return "".join(chr(rng.randint(low, high)) for _ in range(length))
