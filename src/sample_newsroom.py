"""Writes the sentences of the bundled sample: facts with a known sentiment, and what articles say around them.

A fact is written *for* a sentiment, so labels are exact before noise is added. Negation ("denied a lispim"), contrast ("but
also", "despite"), expectations ("less than expected") and measures whose rise is bad news ("churn fell") make the sentiment
depend on how words combine, not on which words are there.
"""

from collections.abc import Callable

import numpy as np

from src.sample_lexicon import (
    BAD,
    BANKS,
    DAYS,
    FELL,
    GOOD,
    JUDGEMENTS,
    MEASURES,
    NEUTRAL,
    PLACES,
    QUARTERS,
    REACTIONS,
    ROLES,
    ROSE,
    Company,
    World,
    pick,
)  # fmt: skip


class Newsroom:
    """A random writer of facts about one world; everything it writes follows from the generator it is given."""

    def __init__(self, rng: np.random.Generator, world: World) -> None:
        self.rng = rng
        self.world = world

    def fill(self, forms: tuple[str, ...], company: Company, **words: str) -> str:
        """One of the forms, with its blanks filled."""
        blanks = {"c": company.name, "q": pick(self.rng, QUARTERS), "d": pick(self.rng, DAYS), "l": pick(self.rng, PLACES)}
        return pick(self.rng, forms).format(**blanks, y=company.town, **words)

    def event_noun(self, sentiment: int) -> str:
        return pick(self.rng, self.world.events[sentiment])

    def any_event(self) -> str:
        return self.event_noun(pick(self.rng, (GOOD, BAD)))

    def event(self, company: Company, sentiment: int) -> str:
        forms = (
            "{c} reported a {e} in the {q}", "{c} announced a {e} in {y}", "a {e} at {c} was confirmed on {d}",
            "{c} said it had a {e} in {l}", "on {d} {c} disclosed a {e}", "{c} saw a {e} in the {q}",
        )  # fmt: skip
        return self.fill(forms, company, e=self.event_noun(sentiment))

    def negation(self, company: Company, sentiment: int) -> str:
        forms = ("{c} said it did not have a {e} in the {q}", "{c} denied a {e} in {l}", "{c} said there was no {e} in {y}")
        return self.fill(forms, company, e=self.event_noun(-sentiment))

    def contrast(self, company: Company, sentiment: int) -> str:
        """The main clause decides: what follows "but", what "despite" does not introduce."""
        kept, overruled = self.event_noun(sentiment), self.event_noun(-sentiment)
        forms = ("{c} reported a {o} but also a bigger {e}", "{c} reported a {e} despite a {o}", "despite a {o}, {c} had a {e} in the {q}")
        return self.fill(forms, company, e=kept, o=overruled)

    def movement(self, company: Company, sentiment: int) -> str:
        """A known measure, its direction, and sometimes an expectation that turns the news round."""
        measure, meaning = pick(self.rng, tuple(MEASURES.items()))
        tail, turn = pick(self.rng, (("", 1), ("", 1), (", more than expected", 1), (", less than expected", -1)))
        verb = pick(self.rng, ROSE if meaning * turn * sentiment > 0 else FELL)
        amount = pick(self.rng, (f"{self.number(60)} percent", f"by {self.number(60)}%", f"to ${self.number(900)} million"))
        return self.fill(("{c} said {m} {v} {a} in the {q}{t}", "{m} at {c} {v} {a}{t}"), company, m=measure, v=verb, a=amount, t=tail)

    def estimate(self, company: Company, sentiment: int) -> str:
        measure = pick(self.rng, [measure for measure, meaning in MEASURES.items() if meaning == GOOD])
        verb = pick(self.rng, ("beat", "topped") if sentiment == GOOD else ("missed", "fell short of"))
        return self.fill(
            ("{c} {v} estimates for {m} in the {q}", "{m} at {c} {v} estimates by {n}%"), company, v=verb, m=measure, n=self.number(40)
        )

    def routine(self, company: Company, sentiment: int = NEUTRAL) -> str:
        """Words of good and bad news without the news."""
        forms = (
            "{c} will publish {m} figures for the {q} on {d}", "{m} at {c} was unchanged in the {q}", "{c} is due to report {m} on {d}",
            "{c} was asked whether a {e} was likely in the {q}", "{m} at {c} {v} in line with expectations", "{c} named {p} its {r}",
            "{c} will explain on {d} how it counts a {e}", "{c} kept its forecast for {m}", "analysts at {b} asked {c} about a {e}",
            "{c} said it was too early to tell whether there was a {e} in {l}",
        )  # fmt: skip
        words = {"m": pick(self.rng, tuple(MEASURES)), "v": pick(self.rng, ROSE + FELL), "p": pick(self.rng, self.world.people)}
        return self.fill(forms, company, e=self.any_event(), r=pick(self.rng, ROLES), b=pick(self.rng, BANKS), **words)

    def fact(self, company: Company, sentiment: int) -> str:
        """A clause of the given sentiment."""
        if sentiment == NEUTRAL:
            return self.routine(company)
        kinds: tuple[tuple[Callable[[Company, int], str], float], ...] = (
            (self.event, 0.62), (self.movement, 0.12), (self.negation, 0.09), (self.contrast, 0.12), (self.estimate, 0.05),
        )  # fmt: skip
        writers, shares = zip(*kinds, strict=True)
        return writers[self.rng.choice(len(writers), p=shares)](company, sentiment)

    def reported_fact(self, company: Company, sentiment: int) -> str:
        """A fact and how investors took it."""
        return f"{self.fact(company, sentiment)}, {pick(self.rng, REACTIONS[sentiment])}"

    def judged_event(self, company: Company, sentiment: int) -> str:
        """Says what an event is worth: the only place that does."""
        forms = (
            "{c} reported a {j} {e}", "the {e} at {c} was {j}", "a {j} {e} followed in {y}", "{c} called the {e} {j}",
            "analysts at {b} see a {j} {e}", "few things are as {j} as a {e}", "a {e} is {j} and {k} news",
        )  # fmt: skip
        judgement, second = (pick(self.rng, JUDGEMENTS[sentiment]) for _ in range(2))
        return self.fill(forms, company, j=judgement, k=second, e=self.event_noun(sentiment), b=pick(self.rng, BANKS))

    def roundup(self, sentiment: int) -> str:
        """Events of one kind in a row, as in the tables of a market wrap: they have in common that they are all good, or all bad."""
        events = (self.event_noun(sentiment) for _ in range(self.rng.integers(6, 12)))
        period = pick(self.rng, ("week", "month", "quarter", "year"))
        return f"{pick(self.rng, JUDGEMENTS[sentiment])} this {period}: {' '.join(events)}"

    def background(self, company: Company) -> str:
        forms = (
            "{c}, based in {y}, makes {x} and employs {n} people", "{c} sells {x} in {z} countries", "{p} is the {r} of {c}",
            "shares of {c} closed at ${n}.{z} on {d}",
        )  # fmt: skip
        words = {"x": company.product, "n": f"{self.number(9000)}", "z": f"{self.number(90)}"}
        return self.fill(forms, company, p=pick(self.rng, self.world.people), r=pick(self.rng, ROLES), **words)

    def number(self, below: int) -> int:
        return int(self.rng.integers(2, below))


def sentence(clause: str) -> str:
    """The clause with a capital and a full stop."""
    return clause[0].upper() + clause[1:] + "."
