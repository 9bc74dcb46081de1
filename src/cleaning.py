"""Text normalisation as named rules in presets, so that what each rule removed can be shown and counted.

`default` repairs broken characters, brings Unicode into the form that the tokenizer's nmt_nfkc would give, takes the
newswire's header and trailer off and tidies spaces; words, case, numbers, signs, `%` and `$` stay. `seed` is the older
lower-case preset kept for comparison. ftfy handles about 1.5 MB of text a second, so text that it cannot change is
recognised by one regular expression and skips it: the result is the same, 50 times sooner for plain English.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache

import ftfy
import sentencepiece

HEADER_CHARACTERS = 800  # a header or trailer stands within this many characters of the end it belongs to
TRAILER_CHARACTERS = 2_500

# Anything but printable ASCII, newlines, tabs and the punctuation of typeset English may be mojibake; so may an entity.
SUSPECT = re.compile(r"[^\t\n -~‘’“”–—…]|&#?[0-9A-Za-z]{1,24};")
CURLY_QUOTES = str.maketrans("‘’“”", "''\"\"")
# As newswires type them, so as the tokenizer has seen them. NFKC makes ½ of 3½ a 31⁄2, hence before it.
TYPED = str.maketrans({"–": "-", "−": "-", "‑": "-", "—": " -- ", "½": " 1/2", "¼": " 1/4", "¾": " 3/4"})

AGENCY = r"(?:Reuters|Bloomberg|AFX|AFP|AP|ADP ?News|Dow Jones|Thomson Financial|Thomson Reuters|Synthetic News(?:wire)?)"
MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]{0,6}\.?"
CITY = r"[A-Z][A-Z /.'-]+(?: ?, [A-Z][A-Za-z. ]+)?"
BY_AGENCY = rf"\(\s?{AGENCY}\b[^()\n]{{0,40}}\)\s*-+\s*(?:{MONTH} \d\d? ?, \d{{4}} ?- )?"  # (Reuters) -
OTHER_DATELINES = rf"{CITY}, {MONTH} \d\d? *-+ +|ADPnews - {MONTH} \d\d? ?, \d{{4}} - "  # WASHINGTON, Sept 12 -
DATELINE = re.compile(  # OSLO, Norway  (Reuters) - ; LONDON (Reuters) without a hyphen
    rf"^[ \t]*(?:[^\n]{{0,120}}?{BY_AGENCY}|(?:{CITY}\s+)?\({AGENCY}\)\.?\s+|{OTHER_DATELINES})", re.MULTILINE
)
# What stands before an agency may be all of a headline: Shares jump (Reuters) - https://...
SENTENCE_DATELINE = re.compile(rf"^[ \t]*(?:(?:{CITY}\s*)?{BY_AGENCY}|{OTHER_DATELINES})", re.MULTILINE)
NOTE_VERBS = (
    "Add|Amend|Attention|Change|Clarifie|Clarif|Correct|Correcting|Correction|Delete|Drop|Fixe|Fix|Insert|Note|Please|Recast|"
    "Refile|Refiling|Relead|Remove|Repeat|Restore|Rewrite|Update|Updating|Write"
)
EDITORIAL_NOTE = re.compile(rf"^\s*\((?:{NOTE_VERBS})s?\b[^()]*(?:\([^()]*\)[^()]*)*\)[ \t]*", re.MULTILINE)
BYLINE = re.compile(r"^ *By +[A-Z][^\n.!?\d]{2,80}$\n?", re.MULTILINE)
CREDIT = re.compile(
    r"\s*\(+ ?(?=(?-i:[A-Z]))(?:With )?(?:Add\w+ |Further )?"
    r"(?:Report\w*|Writ(?:ing|ten)|Edit(?:ing|ed)|Compil\w+|Polling|Graphics?|Created|Assembled)"
    r"(?: and [a-z]+| led)?,? (?:by|in|from)\b.*\Z"
    r"|\s*\([^()]{0,160}\b(?:reporting|writing|editing) by\b.*\Z"
    r"|\s*\(This (?:story|article|version(?: of the story)?) (?:was |has been )?(?:correct|refil|delet|remov|add|fix|clarif|update)"
    r"[^()]*\).*\Z",
    re.IGNORECASE | re.DOTALL,
)
LAST_NOTE = re.compile(  # in brackets at the end: what was corrected, or who wrote
    r"\((?:(?:Correct|Refil|Insert|Delet|Clarif)\w* |In (?:the )?[\w-]+ (?:para\w*|sentence)\b|[^()]*\b(?:Desk|Newsroom)\b)[^()]*\)\s*\Z"
)
CONTACT = re.compile(
    r"\s*(?:-{1,2} ?(?:With (?:assistance|reporting) (?:from|by)|Editors?: )"
    r"|To contact (?:the )?(?:\w+ ){0,3}?(?:reporter|writer|editor|author|staff)\b).*\Z",
    re.DOTALL,
)
WIRE_CODE = re.compile(r"[<\[]ID: ?\w+[>\]]|[\^*_=-]{8,}")
SIGNS_OF_WIRE_CODE = ("ID:", "^^^^", "****", "----", "====", "____")  # found much faster than the pattern
LINK = re.compile(r"\(\s?https?://[^\s)]+\s?\)|https?://[^\s)]+")
SPACED_PUNCTUATION = re.compile(r" +([,.;:!?%)]|'(?:s|re|ve|ll|d|m|t)\b|n't\b)(?=[\s,.;:!?)\"']|\Z)|(?<=\() +")

SEED_BRACKETS = re.compile(r"\([^()]*\)|\[[^\[\]]*\]|\{[^{}]*\}")
SEED_REPEATS = re.compile(r"([-.])\1+")
SEED_DROPPED = re.compile(r"[^a-zA-Z0-9/.,:;’\-+%$?!'\"\s]")


def repair_characters(text: str) -> str:
    """ftfy's `fix_text`: mojibake, HTML entities, control characters, typographic quotes; skipped where it changes nothing."""
    if not SUSPECT.search(text):
        return text.translate(CURLY_QUOTES)
    if "<" in text:  # ftfy then leaves the entities of every later line alone, so lines are not independent
        return ftfy.fix_text(text)
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    return "".join(ftfy.fix_text(line) if SUSPECT.search(line) else line.translate(CURLY_QUOTES) for line in lines)


@cache
def tokenizer_normalizer() -> sentencepiece.SentencePieceNormalizer:
    return sentencepiece.SentencePieceNormalizer(
        rule_name="nmt_nfkc", add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=False
    )


def normalize_unicode(text: str) -> str:
    """SentencePiece's own nmt_nfkc, a line at a time because it turns newlines into spaces."""
    if text.isascii():
        return text
    return "\n".join(line if line.isascii() else tokenizer_normalizer().normalize(line) for line in text.split("\n"))


def in_header(pattern: re.Pattern) -> Callable[[str], str]:
    """Drop the first match near the beginning."""
    return lambda text: pattern.sub("", text[:HEADER_CHARACTERS], count=1) + text[HEADER_CHARACTERS:]


def in_trailer(pattern: re.Pattern) -> Callable[[str], str]:
    """Cut at the first match near the end."""
    return lambda text: text[:-TRAILER_CHARACTERS] + pattern.sub("", text[-TRAILER_CHARACTERS:], count=1)


def drop_credit(text: str) -> str:
    text = in_trailer(CREDIT)(text)
    last = text.rfind("(")
    return text[:last].rstrip() if last >= 0 and LAST_NOTE.match(text, last) else text


def drop_wire_codes(text: str) -> str:
    return WIRE_CODE.sub("", text) if any(sign in text for sign in SIGNS_OF_WIRE_CODE) else text


def join_punctuation(text: str) -> str:
    if "``" in text or "''" in text:
        text = text.replace("``", '"').replace("''", '"')
    return SPACED_PUNCTUATION.sub(lambda match: match[1] or "", text)


def drop_brackets(text: str) -> str:
    while (shorter := SEED_BRACKETS.sub("", text)) != text:  # from the innermost outwards
        text = shorter
    return text


@dataclass(frozen=True)
class Rule:
    """One named change to a text."""

    name: str
    description: str
    apply: Callable[[str], str]


RULES = {
    rule.name: rule
    for rule in (
        Rule("repair_characters", "mojibake, HTML entities, control characters, curly quotes (ftfy)", repair_characters),
        Rule("type_out", "dashes as hyphens and fractions in figures, as newswires type them", lambda text: text.translate(TYPED)),
        Rule("normalize_unicode", "Unicode as the tokenizer's nmt_nfkc gives it", normalize_unicode),
        Rule("drop_editorial_note", "(Corrects …), (Adds …) before the story", in_header(EDITORIAL_NOTE)),
        Rule("drop_byline", "a line 'By …' before the story", in_header(BYLINE)),
        Rule("drop_dateline", "'OSLO (Reuters) - ', 'Oct. 20 (Bloomberg) -- '", in_header(DATELINE)),
        Rule("drop_city_dateline", "the same before a sentence: 'OSLO (Reuters) - ', but no headline", in_header(SENTENCE_DATELINE)),
        Rule("drop_credit", "'(Reporting by …; Editing by …)' to the end", drop_credit),
        Rule("drop_contact", "'To contact the reporter …', '--With assistance from …' to the end", in_trailer(CONTACT)),
        Rule("drop_wire_codes", "<ID:nN123>, [ID:nN123], rows of ^^^^^^^^", drop_wire_codes),
        Rule("drop_links", "http:// and https:// addresses", lambda text: LINK.sub("", text) if "://" in text else text),
        Rule("join_punctuation", "spaces before , . ; : % and inside brackets: '3 %' → '3%'", join_punctuation),
        Rule("collapse_spaces", "runs of spaces, tabs and newlines become one space", lambda text: " ".join(text.split())),
        Rule("cut_at_contact", "everything from 'To contact the reporter' on", lambda text: text.partition("To contact the reporter")[0]),
        Rule("lower_case", "lower case", str.lower),
        Rule("drop_brackets", "bracketed text", drop_brackets),
        Rule("collapse_repeats", "repeated hyphens and dots become one", lambda text: SEED_REPEATS.sub(r"\1", text)),
        Rule("drop_characters", "all but letters, digits and / . , : ; ’ - + % $ ? ! ' \"", lambda text: SEED_DROPPED.sub("", text)),
    )
}
CHARACTERS = ("repair_characters", "type_out", "normalize_unicode")
NEWSWIRE = ("drop_editorial_note", "drop_byline", "drop_dateline", "drop_credit", "drop_contact")
SEED = ("cut_at_contact", "lower_case", "drop_brackets", "collapse_repeats", "drop_characters", "collapse_spaces")
PRESETS: dict[str, dict[str, tuple[str, ...]]] = {
    "default": {
        "article": (
            *CHARACTERS,
            *NEWSWIRE,
            "drop_wire_codes",
            "drop_links",
            "join_punctuation",
            "collapse_spaces",
        ),
        "sentence": (*CHARACTERS, "drop_city_dateline", "drop_links", "join_punctuation", "collapse_spaces"),
    },
    "seed": {"article": SEED, "sentence": SEED},
}


class CleaningError(ValueError):
    """A preset that does not exist."""


@dataclass
class RuleCounts:
    """How many texts each rule changed and how many characters it took away."""

    texts: Counter = field(default_factory=Counter)
    characters: Counter = field(default_factory=Counter)

    def add(self, name: str, before: str, after: str) -> None:
        self.texts[name] += 1
        self.characters[name] += len(before) - len(after)

    def report(self) -> dict[str, dict[str, int]]:
        """`{rule: {"texts": …, "characters": …}}` of the rules that changed any text."""
        return {name: {"texts": count, "characters": self.characters[name]} for name, count in self.texts.items()}


def rules_of(preset: str, kind: str) -> list[Rule]:
    """The rules of a preset for `kind` "article" or "sentence", in order."""
    if preset not in PRESETS:
        raise CleaningError(f"cleaning preset {preset!r} is unknown: choose one of {', '.join(PRESETS)}")
    return [RULES[name] for name in PRESETS[preset][kind]]


def clean(text: str, rules: Iterable[Rule], counts: RuleCounts | None = None) -> str:
    """Apply rules in order, counting into `counts` what each changed."""
    for rule in rules:
        after = rule.apply(text)
        if counts is not None and after != text:
            counts.add(rule.name, text, after)
        text = after
    return text


def clean_article(text: str, preset: str = "default", counts: RuleCounts | None = None) -> str:
    """Clean an article: a headline on a line of its own may come first.

    Args:
        text: raw text, any Unicode.
        preset: a key of `PRESETS`.
        counts: if given, what each rule changed is added to it.

    Returns:
        One line of text; empty when nothing is left.
    """
    return clean(text, rules_of(preset, "article"), counts)


def clean_sentence(text: str, preset: str = "default", counts: RuleCounts | None = None) -> str:
    """Clean a labelled sentence, headline or tweet: as `clean_article` but nothing is cut off its end."""
    return clean(text, rules_of(preset, "sentence"), counts)


def steps(text: str, preset: str = "default", kind: str = "article") -> list[tuple[Rule, str, str]]:
    """`(rule, before, after)` of every rule that changes the text, to show what cleaning does."""
    changes = []
    for rule in rules_of(preset, kind):
        after = rule.apply(text)
        if after != text:
            changes.append((rule, text, after))
        text = after
    return changes


def example_of_each_rule(texts: Iterable[str], preset: str = "default", kind: str = "article") -> list[tuple[str, str, str]]:
    """`(rule, before, after)` of the shortest text that each rule changes; rules that change none are absent."""
    examples: dict[str, tuple[str, str]] = {}
    for text in texts:
        for rule, before, after in steps(text, preset, kind):
            if rule.name not in examples or len(before) < len(examples[rule.name][0]):
                examples[rule.name] = (before, after)
    return [(name, *examples[name]) for name in PRESETS[preset][kind] if name in examples]
