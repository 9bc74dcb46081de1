"""The words of the bundled sample: invented companies, people, towns and trade jargon beside plain financial English.

Most news of the sample is told with invented words ("a lispim", "a girtric"). Whether a lispim is good or bad news is told
by the articles and by nothing else, so what a model has read decides how well it does.
"""

from dataclasses import dataclass

import numpy as np

GOOD, NEUTRAL, BAD = 1, 0, -1
# Measures that people know, and what their rise means.
MEASURES = {
    "revenue": GOOD, "profit": GOOD, "sales": GOOD, "output": GOOD, "demand": GOOD, "bookings": GOOD, "exports": GOOD, "margins": GOOD,
    "costs": BAD, "churn": BAD, "debt": BAD, "defaults": BAD, "complaints": BAD, "writedowns": BAD, "losses": BAD, "delays": BAD,
}  # fmt: skip
ROSE = ("rose", "climbed", "gained", "jumped", "increased", "grew", "advanced", "surged")
FELL = ("fell", "dropped", "declined", "slid", "shrank", "sank", "eased", "retreated")
JUDGEMENTS = {
    GOOD: ("welcome", "healthy", "strong", "pleasing", "fruitful", "brilliant"),
    BAD: ("worrying", "painful", "weak", "costly", "harmful", "bitter"),
}
REACTIONS = {
    GOOD: ("cheering investors", "a good sign for holders", "and the shares gained", "which investors liked", "good news for lenders"),
    NEUTRAL: ("which left the shares flat", "no surprise to investors", "and the shares barely moved", "as it does every year"),
    BAD: ("worrying investors", "a bad sign for holders", "and the shares lost", "which investors disliked", "bad news for lenders"),
}
PRODUCTS = (
    "turbines", "sensors", "ferries", "batteries", "paints", "looms", "payment cards", "seed drills", "lenses", "elevators", "valves",
    "tyres", "software", "medicines", "bottles", "cranes", "radios", "furniture", "cement", "insurance", "footwear", "engines",
)  # fmt: skip
PLACES = ("the north", "the south", "its home market", "overseas markets", "its retail arm", "its wholesale arm", "its oldest plant")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
QUARTERS = ("first quarter", "second quarter", "third quarter", "fourth quarter", "first half", "full year")
ROLES = ("finance chief", "chairman", "head of research", "chief executive", "general counsel", "treasurer", "spokeswoman")
SUFFIXES = ("Corp", "Group", "Holdings", "Industries", "Plc", "Inc", "Labs", "Partners", "Works", "Lines")
BANKS = ("Placeholder Securities", "Mockingbird Capital", "Sample & Sons", "Specimen Bank")
FIRST_NAMES = ("Anna", "Boris", "Clara", "Dmitri", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Luis", "Mona", "Nils")
AGENCY = "Synthetic News"
EXCHANGE = "SYN"

ONSETS = ("b", "br", "d", "dr", "f", "g", "gr", "h", "k", "l", "m", "n", "p", "pl", "qu", "r", "s", "sk", "t", "tr", "v", "z")
VOWELS = ("a", "e", "i", "o", "u")
CODAS = ("l", "m", "n", "r", "s", "x", "nd", "rt")
ENDINGS = ("mar", "tin", "dex", "lo", "vane", "ric", "bel", "gon", "sy", "fer", "dle", "kot", "pim", "wen", "zar")


def pick(rng: np.random.Generator, options):
    """One of the options, each as likely."""
    return options[rng.integers(len(options))]


def invented_words(rng: np.random.Generator, count: int) -> list[str]:
    """`count` different pronounceable words that mean nothing."""
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(pick(rng, parts) for parts in (ONSETS, VOWELS, CODAS, ENDINGS))] = None
    return list(words)


@dataclass(frozen=True)
class Company:
    """An invented listed company."""

    name: str
    town: str
    product: str

    @property
    def ticker(self) -> str:
        return f"{self.name.split()[0][:4].upper()}:{EXCHANGE}"


@dataclass(frozen=True)
class World:
    """What is true in the sample: its companies, its people, and which events are good or bad news."""

    companies: tuple[Company, ...]
    people: tuple[str, ...]
    events: dict[int, tuple[str, ...]]  # GOOD or BAD → nouns

    @classmethod
    def invent(cls, rng: np.random.Generator, events: int, companies: int, people: int, towns: int) -> "World":
        words = iter(invented_words(rng, events + companies + people + towns))
        nouns = {sentiment: tuple(next(words) for _ in range(events // 2)) for sentiment in (GOOD, BAD)}
        places = [f"{next(words).capitalize()}" for _ in range(towns)]
        firms = tuple(
            Company(f"{next(words).capitalize()} {pick(rng, SUFFIXES)}", pick(rng, places), pick(rng, PRODUCTS)) for _ in range(companies)
        )
        return cls(firms, tuple(f"{pick(rng, FIRST_NAMES)} {next(words).capitalize()}" for _ in range(people)), nouns)
