"""Neutral material: what a base is asked and shown to see what an adapter leaves of it.

Nothing is downloaded. Text is the standard library's documentation and source, or a user's file; questions are asked
about topics of a list; unknown keys are made of the records' own: their words in other pairs, misspelt ones, and fresh
ones drawn letter by letter from what follows what in the known ones. What is measured on is never trained on: other
documents, other topics in other words, other keys.
"""

import hashlib
import logging
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from loramem._util.cache import cache_folder
from loramem.embedded.corpus import standard_library
from loramem.errors import InputError
from loramem.records.questions import KEY_HERE, asking, name_in
from loramem.records.record import Record

log = logging.getLogger(__name__)

TOPICS = (
    "the Roman Empire; the French Revolution; the printing press; the Silk Road; the Vikings; ancient Egypt; the "
    "Industrial Revolution; the Cold War; the moon landing; the Great Wall of China; medieval castles; the plague; "
    "the Renaissance; the Olympic Games; democracy; human rights; the United Nations; constitutions; taxes; "
    "inflation; supply and demand; interest rates; the stock market; insurance; bankruptcy; globalisation; trade "
    "unions; poverty; photosynthesis; evolution; DNA; cells; bacteria; viruses; vaccines; antibiotics; the immune "
    "system; the heart; the brain; sleep; dreams; memory; the liver; blood; bones; muscles; digestion; vitamins; "
    "protein; sugar; fasting; whales; elephants; wolves; bees; ants; spiders; sharks; penguins; owls; snakes; frogs; "
    "horses; cats; dogs; cows; oak trees; roses; mushrooms; algae; coral reefs; rainforests; deserts; the savanna; "
    "wetlands; soil; compost; volcanoes; earthquakes; tsunamis; hurricanes; tornadoes; lightning; clouds; snow; rain; "
    "the seasons; the tides; rivers; glaciers; the ocean; the atmosphere; ozone; climate change; recycling; solar "
    "power; wind turbines; coal; nuclear power; oil; batteries; hydrogen; electricity; magnets; light; sound; heat; "
    "gravity; friction; pressure; atoms; electrons; molecules; acids; metals; salt; water; oxygen; carbon; gold; "
    "iron; glass; plastic; paper; soap; the Sun; the Moon; Mars; Jupiter; comets; galaxies; black holes; the Big "
    "Bang; telescopes; satellites; rockets; prime numbers; fractions; percentages; triangles; circles; probability; "
    "statistics; calculus; algebra; matrices; logic; algorithms; computers; programming; Python; databases; the "
    "internet; email; encryption; passwords; robots; artificial intelligence; machine learning; neural networks; "
    "video games; smartphones; cameras; printers; radio; television; newspapers; advertising; marketing; brands; "
    "management; teamwork; leadership; negotiation; interviews; resumes; budgeting; saving money; mortgages; renting "
    "a flat; moving house; gardening; cooking; baking bread; pasta; rice; potatoes; tomatoes; apples; bananas; "
    "coffee; tea; wine; beer; cheese; chocolate; honey; olive oil; vegetarian food; breakfast; salads; soup; spices; "
    "garlic; onions; eggs; milk; yoghurt; ice cream; pizza; sushi; running; swimming; cycling; football; tennis; "
    "chess; yoga; meditation; hiking; camping; skiing; dancing; boxing; stretching; back pain; headaches; colds; "
    "allergies; diabetes; cancer; stress; anxiety; depression; happiness; friendship; love; marriage; parenting; "
    "children; babies; teenagers; growing old; grief; gratitude; honesty; courage; patience; jealousy; anger; "
    "forgiveness; ethics; philosophy; religion; Buddhism; Islam; Christianity; Hinduism; mythology; poetry; novels; "
    "short stories; theatre; film; music; jazz; the piano; the guitar; opera; painting; sculpture; photography; "
    "architecture; bridges; skyscrapers; fashion; shoes; jewellery; perfume; languages; English grammar; spelling; "
    "translation; writing letters; essays; public speaking; debates; jokes; schools; universities; exams; homework; "
    "libraries; museums; travel; airports; trains; ships; cars; bicycles; traffic; maps; hotels; tourism; passports; "
    "Paris; London; New York; Tokyo; Cairo; Sydney; Brazil; India; China; Germany; Canada; Mexico; Nigeria; "
    "Antarctica; the Alps; the Amazon; the Sahara; islands; cities; villages; farms; clocks; calendars; birthdays; "
    "weddings; holidays; Christmas; gifts; toys; puzzles; riddles; magic tricks; detectives; pirates; dragons; fairy "
    "tales; superheroes; ghosts; space travel; time travel; the future"
).split("; ")
QUESTIONS = (
    "What is {}?|Tell me about {}.|Why does {} matter?|How would you explain {} to a child?|Write a poem about {}.|"
    "Give me three facts about {}.|What should a beginner know about {}?|Write a short story about {}.|"
    "What is the history of {}?|List five words to do with {}.|Summarise {} in one sentence.|"
    "What are common mistakes people make about {}?|Who knows most about {}?|When did people first write about {}?|"
    "Where can I learn more about {}?|I have a question about {}. Can you help me?|Is anything dangerous about {}?|"
    "Write an email to a friend about {}.|What do you think of {}?|Compare {} with something else.|"
    'Ask me a question about {}.|{}|Give me a title for an article about {}.|Translate "{}" into French.|'
    "Make a plan for a lesson about {}.|How much does it cost to learn about {}?|"
    "Hi! I am reading about {} at the moment and find it hard. Where should I start?|"
    "Complete the sentence: The best thing about {} is|True or false: everybody likes {}.|"
    "How many books are there about {}?|What is the opposite of {}?|Define {}.|Can you draw {}?|"
    'Explain the difference between {} and money.|Write a Python function that prints "{}".|'
    "My teacher said something about {} that I did not understand. What could it be?"
).split("|")
OTHER_QUESTIONS = (
    "How does {} work?|Describe {} in two sentences.|What are the advantages of {}?|Please write a tweet on {}.|"
    "Do you know a good book on {}?|Thanks! And what about {}?|Imagine a world without {}.|Why do people care for {}?|"
    "What is your favourite thing about {}?|Give an example of {}."
).split("|")
COMMON_QUESTIONS = (
    "What is the capital of Italy?|Who wrote Hamlet?|What is 7 times 8?|How many days are in a week?|"
    "Name a colour of the rainbow.|What is the chemical symbol for gold?|Who painted the Mona Lisa?|"
    "What is the boiling point of water?|Which planet is the largest?|Good morning!"
).split("|")
"""Of those that are measured, whatever the topics."""
OTHER_WORDS = (
    "{key}?|Tell me about {key}.|Please look up {key} for me.|I am looking for {key}. What do you have?"
).split("|")
"""For records that have questions: words that are not trained."""
OTHER_SYSTEM_MESSAGES = (
    "You are a helpful assistant.|You answer in as few words as you can.|You are the voice assistant of a hotel.|"
    "Today you help a clerk at a desk. Be polite, and exact."
).split("|")
OTHER_TURNS = (("user", "Hello!"), ("assistant", "Hello! What can I do for you?"))
"""For records that are trained in chats: chats that are not, the turns by themselves or after a system message."""
HELD_OUT_TOPICS = 40
EXCERPT_CHARACTERS = (10, 200)
"""Of a text as a user's message."""
PIECE_CHARACTERS = 4_000
"""Of a user's text, of which every tenth piece is measured on."""
FRESH_CHARACTERS, FRESH_TRIES = 60, 20


def questions(count: int, seed: int) -> list[str]:
    """Questions to train with, each another; as many of them as there are, or ``count``."""
    rng = random.Random(f"questions {seed}")
    every = [question.format(topic) for topic in _topics()[HELD_OUT_TOPICS:] for question in QUESTIONS]
    return rng.sample(every, min(count, len(every)))


def held_out_questions() -> list[str]:
    """Fifty questions to measure with: other topics, other words."""
    rng = random.Random("held out")
    return [rng.choice(OTHER_QUESTIONS).format(topic) for topic in _topics()[:HELD_OUT_TOPICS]] + COMMON_QUESTIONS


def other_contexts() -> list[tuple[tuple[str, str], ...]]:
    """Chats to measure with: role and content of each message before the key."""
    systems = [(("system", message),) for message in OTHER_SYSTEM_MESSAGES]
    return [*systems, OTHER_TURNS, (*systems[0], *OTHER_TURNS)]


def _topics() -> list[str]:
    return random.Random("topics").sample(TOPICS, len(TOPICS))


def documents(*, held_out: bool, own: str = "") -> Iterator[str]:
    """Texts in an order that looks random: the standard library's, after what a user gave.

    Args:
        held_out: The tenth of them that is measured on.
        own: A user's text, cut into pieces.
    """
    pieces = [own[first : first + PIECE_CHARACTERS] for first in range(0, len(own), PIECE_CHARACTERS)]
    yield from (piece for piece in pieces if _is_held_out(piece) == held_out)
    library = standard_library().documents
    for name in random.Random("documents").sample(list(library), len(library)):
        if _is_held_out(library[name]) == held_out:
            yield library[name]


def remember_text(text: str) -> str:
    """Keep a user's neutral text in the cache, where every process that trains finds it; returns its sha256.

    Raises:
        InputError: It cannot be kept there.
    """
    content = text.encode(errors="surrogatepass")
    digest = hashlib.sha256(content).hexdigest()
    file = _text_file(digest)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    except OSError as error:
        raise InputError(f"The neutral text cannot be kept in {file.parent}: {error}.") from error
    return digest


def remembered_text(digest: str) -> str:
    """What `remember_text` kept; nothing, with a warning, where the cache has lost it or another machine had it."""
    if not digest:
        return ""
    try:
        content = _text_file(digest).read_bytes()
    except OSError:
        content = b""
    if hashlib.sha256(content).hexdigest() != digest:
        log.warning(
            "the neutral text of this write (sha256 %s…) is not in the cache; others alone are used", digest[:12]
        )
        return ""
    return content.decode(errors="surrogatepass")


def _text_file(digest: str) -> Path:
    return cache_folder() / "neutral" / f"{digest}.txt"


def excerpts(count: int, seed: int) -> list[str]:
    """Pieces of texts to train with, in one line, as a user might paste them."""
    rng, found = random.Random(f"excerpts {seed}"), list[str]()
    for text in islice(documents(held_out=False), count):
        first, length = rng.randrange(max(1, len(text) - EXCERPT_CHARACTERS[1])), rng.randint(*EXCERPT_CHARACTERS)
        if excerpt := " ".join(text[first : first + length].split()):
            found.append(excerpt)
    return found


def _is_held_out(text: str) -> bool:
    """By what it says: files of the same content are one text."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()[0] < 26


def unknown_keys(keys: Sequence[str], count: int, seed: int, *, held_out: bool) -> list[str]:
    """Keys of the same form that none of the records has: near misses and fresh ones.

    Args:
        count: How many at most; few keys allow few others.
        held_out: Those to measure with: no key is both. Of those to train with half are misspelt, of those to measure
            with a sixth: all keys at which a gate was open that should have been shut were misspelt (docs/keeping.md).
    """
    rng, known, found = random.Random(f"unknown {held_out} {seed}"), set(keys), dict[str, None]()
    makers = [_misspelt, _fresh] if len(keys) < 2 else [_recombined, _recombined, _misspelt, _fresh, _fresh, _worded]
    makers += [] if held_out else [_misspelt] * (len(makers) - 2)
    follows = _follows(keys)
    for _ in range(FRESH_TRIES * count):
        key = rng.choice(makers)(keys, follows, rng)
        if key.strip() and key not in known and _is_measured(key) == held_out:
            found.setdefault(key)
        if len(found) == count:
            break
    return list(found)


def wordings(records: Sequence[Record]) -> list[str]:
    """Templates that the questions of some records follow, the key by itself among them, as it is for most."""
    found = {KEY_HERE: None}
    for record in records:
        if record.question_of is not None and (name := name_in(record.question_of)) in record.key:
            found[record.key.replace(name, KEY_HERE)] = None
    return list(found)


def keys_of(records: Sequence[Record]) -> list[str]:
    """What unknown keys are made of: keys, and questions that name none."""
    return [
        record.key for record in records if record.question_of is None or name_in(record.question_of) not in record.key
    ]


def worded(keys: Sequence[str], templates: Sequence[str], seed: int) -> list[str]:
    """Each key by itself or in a question, as many in each wording."""
    order = random.Random(f"worded {seed}").sample(range(len(keys)), len(keys))
    return [
        key if template == KEY_HERE else asking(template, key)
        for key, template in ((keys[place], templates[number % len(templates)]) for number, place in enumerate(order))
    ]


Follows = dict[str, list[str]]
"""What came after two letters."""


def _is_measured(key: str) -> bool:
    """Of every five keys about one."""
    return hashlib.sha256(key.encode()).digest()[0] < 52


def _follows(keys: Sequence[str]) -> Follows:
    follows = defaultdict(list)
    for key in keys:
        text = f"\0\0{key}\0"
        for place in range(len(text) - 2):
            follows[text[place : place + 2]].append(text[place + 2])
    return follows


def _recombined(keys: Sequence[str], _: Follows, rng: random.Random) -> str:
    """The first words of one key and the last ones of another."""
    first, last = rng.choice(keys).split(" "), rng.choice(keys).split(" ")
    cut = rng.randint(1, max(1, len(first) - 1))
    return " ".join([*first[:cut], *last[cut:]])


def _misspelt(keys: Sequence[str], _: Follows, rng: random.Random) -> str:
    """A letter left out, doubled, exchanged with the next, or another one."""
    key = rng.choice(keys)
    place = rng.randrange(len(key))
    before, letter, after = key[:place], key[place], key[place + 1 :]
    return before + rng.choice(("", letter * 2, after[:1] + letter, rng.choice(rng.choice(keys)))) + after


def _fresh(_: Sequence[str], follows: Follows, rng: random.Random) -> str:
    """A key drawn letter by letter, each after the two before it as in some key."""
    text = "\0\0"
    while len(text) < FRESH_CHARACTERS and (letter := rng.choice(follows[text[-2:]])) != "\0":
        text += letter
    return text[2:]


def _worded(keys: Sequence[str], _: Follows, rng: random.Random) -> str:
    """A key with other words, of the documentation, in the place of its own."""
    words = standard_library().words

    def other(word: str) -> str:
        letters = word.rstrip(":?!.,")
        new = rng.choice(words)
        return (new.capitalize() if letters[:1].isupper() else new) + word[len(letters) :]

    return " ".join(map(other, rng.choice(keys).split(" ")))
