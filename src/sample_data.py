"""The bundled offline sample: synthetic articles and labelled sentences, generated, the same on every machine.

Articles tell which invented events are good or bad news; labelled sentences use the events without telling, most of them
only a few times. So a bag of words cannot solve the task, and a model that has read the articles does better than one
that has not. The blemishes of real sets are there too: mojibake, newswire headers and trailers, duplicates, boilerplate,
conflicting and wrong labels. Nothing in it is real: agency, exchange, links and reporters are marked synthetic.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np

from src.sample_lexicon import AGENCY, BAD, GOOD, NEUTRAL, Company, World, pick
from src.sample_newsroom import Newsroom, sentence

SEED = 2718
ARTICLES = 4_500
SENTENCES = 2_800  # before duplicates, boilerplate and the like are added
EVENTS, COMPANIES, PEOPLE, TOWNS = 560, 400, 280, 60
LABEL_NOISE = 0.02
ROUNDUP = 0.45  # of the sentences of an article
YAHOO_LABELS = {GOOD: 0, NEUTRAL: 1, BAD: 2}  # the integers of the Yahoo set
LONG_ARTICLES = 6  # of a few thousand words
QUOTED_SENTENCES = 40  # labelled sentences that also stand in articles
SHORT_ARTICLES = ("NA", "null", "Synthetic test.", "To follow.", "(Corrects headline.)", "")
MOJIBAKE = (("'s", "â€™s"), (" and ", " â€“ and "), (", a ", ",Â\u00a0a "))  # what UTF-8 read as Windows-1252 looks like
BOILERPLATE = (
    "Click here for the full synthetic report.",
    "This synthetic notice was distributed by Synthetic News, which is not responsible for its content.",
    "All figures in this synthetic summary are unaudited.",
)


@cache
def world() -> World:
    return World.invent(np.random.default_rng([SEED, 0]), EVENTS, COMPANIES, PEOPLE, TOWNS)


def article_body(newsroom: Newsroom, company: Company, sentences: int) -> list[str]:
    """Sentences of an article. Most are of one mood, as a story is, so that events keep the company of their kind."""
    rng = newsroom.rng
    mood = pick(rng, (GOOD, BAD))
    clauses = []
    for _ in range(sentences):
        sentiment = mood if rng.random() < 0.9 else -mood
        kind = rng.random()
        if kind < ROUNDUP:
            clauses.append(newsroom.roundup(sentiment))
        elif kind < ROUNDUP + 0.25:
            clauses.append(newsroom.judged_event(company, sentiment))
        elif kind < 0.9:
            clauses.append(newsroom.reported_fact(company, sentiment if rng.random() < 0.8 else NEUTRAL))
        else:
            clauses.append(newsroom.background(company))
    return [sentence(clause) for clause in clauses]


def newswire(newsroom: Newsroom, company: Company, body: str) -> str:
    """A body with the dateline, tickers in brackets and trailers of two newswires, and now and then broken characters."""
    rng, reporter, editor = newsroom.rng, pick(newsroom.rng, newsroom.world.people), pick(newsroom.rng, newsroom.world.people)
    body = body.replace(company.name, f"{company.name} ({company.ticker})", 1)
    if rng.random() < 0.06:
        for right, wrong in MOJIBAKE:
            body = body.replace(right, wrong)
    if rng.random() < 0.5:
        trailer = f"To contact the reporter on this story: {reporter} in {company.town} at {reporter.split()[0].lower()}@synthetic.example"
        return f"{body}\n{trailer}"
    return f"{company.town.upper()}  ({AGENCY}) - {body} \n (Reporting by {reporter}; Editing by {editor})"


def write_article(newsroom: Newsroom, number: int, sentences: int, quoted: str = "") -> dict[str, str]:
    """One article in the columns of the Bloomberg set."""
    rng = newsroom.rng
    company = pick(rng, newsroom.world.companies)
    body = article_body(newsroom, company, sentences)
    if quoted:
        body.insert(len(body) // 2, quoted)
    return {
        "Headline": f"{company.name} {pick(rng, ('Update', 'Reports', 'in Focus', 'News'))} (Synthetic)",
        "Journalists": f"{pick(rng, newsroom.world.people)} (synthetic)",
        "Date": f"{2030 + number % 5}-{rng.integers(1, 13):02}-{rng.integers(1, 29):02}",
        "Link": f"https://synthetic.example/news/{number:05}",
        "Article": newswire(newsroom, company, " ".join(body)),
    }


def repeated(newsroom: Newsroom, article: dict[str, str], number: int) -> dict[str, str]:
    """The article again, as newswires do: as it is, or with a sentence more."""
    update = "" if newsroom.rng.random() < 0.5 else " The story was updated."
    link = f"https://synthetic.example/news/{number:05}"
    return article | {"Link": link, "Article": article["Article"].replace(". ", f".{update} ", 1)}


def sample_articles() -> Iterator[dict[str, str]]:
    """Articles in the columns Headline, Journalists, Date, Link, Article; every call gives the same ones."""
    rng = np.random.default_rng([SEED, 1])
    newsroom = Newsroom(rng, world())
    quotations = iter([row["text"] for row in sample_sentences()[: 7 * QUOTED_SENTENCES : 7]])
    lengths = np.clip(rng.lognormal(1.95, 0.5, ARTICLES), 1, 40).astype(int)
    lengths[rng.choice(ARTICLES, LONG_ARTICLES, replace=False)] = rng.integers(250, 500, LONG_ARTICLES)
    last = None
    for number, sentences in enumerate(lengths):
        chance = rng.random()
        if last and chance < 0.04:
            yield repeated(newsroom, last, number)
        elif chance < 0.05:
            yield write_article(newsroom, number, 1) | {"Article": pick(rng, SHORT_ARTICLES)}
        else:
            last = write_article(newsroom, number, int(sentences), next(quotations, "") if number % 50 == 0 else "")
            yield last


def sample_sentences() -> list[dict[str, str | int]]:
    """Labelled sentences, `text` and `label` (0 bullish, 1 neutral, 2 bearish); every call gives the same ones."""
    rng = np.random.default_rng([SEED, 2])
    newsroom = Newsroom(rng, world())
    rows = []
    for _ in range(SENTENCES):
        sentiment = pick(rng, (GOOD, NEUTRAL, BAD))
        text = sentence(newsroom.fact(pick(rng, newsroom.world.companies), sentiment))
        if rng.random() < LABEL_NOISE:
            sentiment = pick(rng, [other for other in YAHOO_LABELS if other != sentiment])
        rows.append({"text": text, "label": YAHOO_LABELS[sentiment]})
    rows += blemishes(rng, rows)
    return [rows[index] for index in rng.permutation(len(rows))]


def blemishes(rng: np.random.Generator, rows: list[dict[str, str | int]]) -> list[dict[str, str | int]]:
    """What a labelled set should not have: boilerplate, duplicates, near duplicates, and the same text with another label."""
    chosen = [rows[index] for index in rng.choice(len(rows), 300, replace=False)]
    copies = ("{}", "{}  https://synthetic.example/s", "â€œ{}â€\x9d", "{} (Synthetic)")  # a link; quotation marks gone wrong
    exact = [row | {"text": pick(rng, copies).format(row["text"])} for row in chosen[:120]]
    near = [row | {"text": f"{row['text'][:-1]} {pick(rng, ('today', 'again', 'too'))}."} for row in chosen[120:280]]
    conflicting = [row | {"label": (row["label"] + 1) % 3} for row in chosen[280:]]
    return exact + near + conflicting + [{"text": text, "label": YAHOO_LABELS[NEUTRAL]} for text in BOILERPLATE for _ in range(25)]
