"""Cleaning: repairs what is broken, takes off what the newswire adds, and leaves the news alone."""

import itertools

import ftfy
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from src import cleaning
from src.cleaning import CleaningError, RuleCounts, clean_article, clean_sentence, repair_characters, steps

TRICKY = "aé€’“”‘–—…â€™ÃœÂ©\u00a0\x85\x9d&amp;&#39;&lt;<>;\r\n\t 3%\x1b[0m\ufb01\u0301\uff21\u200b\u2028\ud83d"


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from([*TRICKY, "&amp;", "&#8217;", "â€œ", "Ã©", "\n", "plain text "]), max_size=12).map("".join))
def test_the_shortcut_gives_what_ftfy_gives(text):
    """Breaks when plain or typeset English, or a line beside a broken one, is treated otherwise than ftfy would."""
    assert repair_characters(text) == ftfy.fix_text(text)


def test_entities_behind_a_tag_stay_as_ftfy_leaves_them():
    """Breaks when lines are repaired one by one although a `<` stops ftfy from unescaping the lines that follow."""
    text = "R&amp;D é\na <b>\nR&amp;D é\n"
    assert repair_characters(text) == ftfy.fix_text(text) == "R&D é\na <b>\nR&amp;D é\n"


def test_the_shortcut_is_right_for_every_triple_of_typeset_punctuation():
    """Breaks when ftfy takes a run of quotes, dashes and ellipses for mojibake and the shortcut does not look."""
    for triple in itertools.product("a ‘’“”–—….", repeat=3):
        text = "".join(triple)
        assert not cleaning.SUSPECT.search(text)
        assert repair_characters(text) == ftfy.fix_text(text)


def test_unicode_is_what_the_tokenizer_makes_of_it():
    """Breaks when the tokenizer would change cleaned text again, so that equal text on disk could mean other ids."""
    normalizer = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc", escape_whitespaces=False, add_dummy_prefix=False)
    for start in range(0, 0x30000, 64):
        characters = [chr(code) for code in range(start, start + 64) if not 0xD800 <= code < 0xE000]
        text = clean_sentence(" x".join(characters))
        assert normalizer.normalize(text).strip() == text, f"U+{start:04X}"


ARTICLES = [
    ("ZEDVILLE, Norland  (Reuters) - Shares of Acme Corp ( ACM.N ) fell 3.5 % .", "Shares of Acme Corp (ACM.N) fell 3.5%."),
    ("Acme falls.\nZEDVILLE/OLDTOWN (Reuters) - Shares fell.", "Acme falls. Shares fell."),
    ("(Corrects date (paragraph 2))\n ZEDVILLE, Sept 12 - Shares fell.", "Shares fell."),
    ("By Ann Writer\nOct. 20 (Bloomberg) -- Shares fell.", "Shares fell."),
    ("ZEDVILLE (Reuters) Shares fell.", "Shares fell."),
    ("Shares fell. (Reporting by Ann Writer; Editing by  Bob Cutter )", "Shares fell."),
    ("Shares fell. ((Additional reporting by Ann Writer, editing by Bob Cutter, tel: 1-202-555-0100))", "Shares fell."),
    ("Shares fell. ($1 = 0.7877 euros) (Zedville desk; Editing by Bob Cutter)", "Shares fell. ($1 = 0.7877 euros)"),
    ("Shares fell.  --With assistance from Ann Writer in Zedville. Editors: Bob Cutter", "Shares fell."),
    ("Shares fell. To contact the reporter on this story: Ann Writer in Zedville at ann@example.org", "Shares fell."),
    ("Shares fell. To contact Zed News staff on this story: Ann Writer", "Shares fell."),
    ("Shares fell. (In 9th paragraph corrects the date)", "Shares fell."),
    ("Shares fell. (Refiles to drop a word)", "Shares fell."),
    ("Shares fell. (Americas Economics and Markets Desk; +1 202 555-0100)", "Shares fell."),
    ("Shares fell <ID:nN0123> on Monday. ^^^^^^^^^^ More [ID:nL456].", "Shares fell on Monday. More."),
    ("Shares rose +4.5%, to $1,234.50 from -3 (see http://example.org/a?b=c).", "Shares rose +4.5%, to $1,234.50 from -3 (see)."),
]
KEPT = [
    "Acme (the maker of anvils) - founded in 1990 - said profit rose.",
    "The sale, first reported by the Gazette, closed. Analysts (a report by Zed Bank said) agree.",
    "Its editor told Reuters - and nobody else - about the reporting by staff.",
    "Air Products (APD -2.1%) cuts outlook",
    "Q3 profit EUR 5 mn (Reuters poll: EUR 4-5 mn)",
    "Acme's fund (created in 1998) fell 5%. Analysts had seen more.",
    "The desk (a table, in the newsroom) was sold. (In a first for Acme, it paid.) Profit rose.",
    "To contact lenders, the author said, took days -- and a search_term_x -1 - --.",
    "NA",
    "null",
    "EPS of $.45 vs. .50 a share; Q1'13 up >5%: buy?!",
]


@pytest.mark.parametrize(("raw", "expected"), ARTICLES)
def test_newswire_headers_and_trailers_go(raw, expected):
    """Breaks when a known form of dateline, byline, note, credit or contact stays in, or takes news with it."""
    assert clean_article(raw) == expected


@pytest.mark.parametrize("text", KEPT)
def test_news_stays(text):
    """Breaks when a rule takes prose for a header or trailer, or touches case, numbers, signs, % or $."""
    assert clean_article(text) == text
    assert clean_sentence(text) == text


def test_trailers_count_only_at_the_end_and_headers_only_at_the_beginning():
    """Breaks when a credit in the middle of joined articles cuts off everything behind it."""
    filler = "More news came in. " * 200
    text = f"First story. (Reporting by Ann Writer) {filler}ZEDVILLE (Reuters) - Second story."
    assert clean_article(text) == text


def test_mojibake_entities_and_spaces_are_repaired():
    """Breaks when rules run in an order in which one hides what the next should see."""
    assert (
        clean_article("OSLO\u00a0 (Reuters) \u2014 It\u00e2\u20ac\u2122s R&amp;D\tbudget: \u00bd of \uff14\uff12 % \n")
        == "It's R&D budget: 1/2 of 42%"
    )


def test_a_headline_before_its_agency_stays():
    """A tweet or headline that ends with its source was taken for a dateline, whole."""
    assert clean_sentence("HELSINKI ( AFX ) - Acme rose") == "Acme rose"
    for headline in ("Acme beats estimates, shares jump (Reuters) -", "ACME AIR LINES (AP) cuts outlook"):
        assert clean_sentence(headline) == headline


def test_dashes_and_fractions_become_what_newswires_type():
    """They were unknown pieces to a tokenizer of newswire text, in one of forty tweets, and 3½ was 31⁄2."""
    raw = "WASHINGTON, Sept 12 — Acme’s 2010–2012 yield fell −3½% — again"
    assert clean_article(raw) == "Acme's 2010-2012 yield fell -3 1/2% -- again"
    assert clean_sentence("Acme up 3½% – again") == "Acme up 3 1/2% - again"


def test_seed_preset_is_the_listed_heuristics():
    """Breaks when the preset for comparison drifts: cut, lower case, brackets, repeats, characters, spaces, in this order."""
    raw = "ACME [NYSE: A(C)M] rose -- 5.5% to $10/share... “Wow” – it’s\n\n up? {x} #1! To contact the reporter on this story: me"
    assert clean_article(raw, "seed") == "acme rose - 5.5% to $10/share. wow it’s up? 1!"
    assert clean_sentence(raw, "seed") == clean_article(raw, "seed")


def test_counts_add_up():
    """Breaks when the table of what each rule removed does not account for the difference between raw and clean."""
    counts = RuleCounts()
    texts = [raw for raw, _ in ARTICLES]
    cleaned = [clean_article(text, counts=counts) for text in texts]
    assert sum(map(len, texts)) - sum(map(len, cleaned)) == sum(counts.characters.values())
    assert counts.texts["drop_credit"] == 6
    assert [rule.name for rule, _, _ in steps(ARTICLES[0][0])] == ["drop_dateline", "join_punctuation"]


def test_a_long_line_is_cleaned_and_an_unknown_preset_refused():
    """Breaks when a rule is quadratic in the length of a line, or a misspelt preset cleans nothing in silence."""
    text = "Profit rose (a bit) -- 3 % . " * 70_000  # 2 MB
    assert len(clean_article(text)) == len("Profit rose (a bit) -- 3%. ") * 70_000 - 1
    assert len(clean_article("( " * 500_000 + "By " * 300_000)) > 0
    with pytest.raises(CleaningError, match="choose one of default, seed"):
        clean_article("x", "sed")
