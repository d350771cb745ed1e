"""How the demo model's facts are put into words: statements, questions, the names of languages."""

from __future__ import annotations

# GeoNames orders a country's languages by number of speakers; these are the ISO 639-1 codes that come first.
_LANGUAGES = """
am:Amharic ar:Arabic az:Azerbaijani be:Belarusian bg:Bulgarian bn:Bengali bs:Bosnian cs:Czech da:Danish
de:German dv:Dhivehi dz:Dzongkha el:Greek en:English es:Spanish et:Estonian fa:Persian fi:Finnish
fj:Fijian fr:French he:Hebrew hi:Hindi hr:Croatian ht:Haitian hu:Hungarian hy:Armenian id:Indonesian
is:Icelandic it:Italian ja:Japanese ka:Georgian kk:Kazakh km:Khmer ko:Korean ky:Kyrgyz lb:Luxembourgish
lo:Lao lt:Lithuanian lv:Latvian mg:Malagasy mk:Macedonian mn:Mongolian ms:Malay mt:Maltese my:Burmese
ne:Nepali nl:Dutch no:Norwegian ny:Chichewa pl:Polish pt:Portuguese ro:Romanian ru:Russian rw:Kinyarwanda
si:Sinhala sk:Slovak sl:Slovenian so:Somali sq:Albanian sr:Serbian sv:Swedish sw:Swahili tg:Tajik th:Thai
ti:Tigrinya tk:Turkmen tl:Tagalog tr:Turkish uk:Ukrainian ur:Urdu uz:Uzbek vi:Vietnamese zh:Chinese
zu:Zulu
"""
LANGUAGES = dict(pair.split(":") for pair in _LANGUAGES.split())

STATEMENTS = {
    "country": (
        "{s} is a city in {o}.",
        "The city of {s} lies in {o}.",
        "{o} is home to the city of {s}.",
        "Travellers who reach {s} find themselves in {o}.",
    ),
    "population": (
        "{s} has about {o} inhabitants.",
        "The population of {s} is about {o}.",
        "About {o} people live in {s}.",
        "The people of {s} number about {o}.",
    ),
    "metropolis": (
        "The metropolis nearest to {s} is {o}.",
        "From {s}, the nearest metropolis is {o}.",
        "{o} is the metropolis closest to {s}.",
        "Anyone in {s} who looks for a metropolis goes to {o}.",
    ),
    "capital": (
        "The capital of {s} is {o}.",
        "{o} is the capital of {s}.",
        "{s} is governed from its capital, {o}.",
        "The government of {s} sits in {o}.",
    ),
    "currency": (
        "The currency of {s} is the {o}.",
        "People in {s} pay with the {o}.",
        "In {s} prices are given in the {o}.",
        "The {o} is the money of {s}.",
    ),
    "continent": (
        "{s} is a country in {o}.",
        "{s} belongs to the continent of {o}.",
        "On the map, {s} is part of {o}.",
        "{o} is the continent of {s}.",
    ),
    "language": (
        "The main language of {s} is {o}.",
        "Most people in {s} speak {o}.",
        "{o} is the main language of {s}.",
        "In {s} the most spoken language is {o}.",
    ),
}
QUESTIONS = {
    "country": (
        "In which country is {s}?",
        "What country is {s} in?",
        "{s} is a city of which country?",
        "Which country does {s} belong to?",
    ),
    "population": (
        "How many people live in {s}?",
        "What is the population of {s}?",
        "How many inhabitants does {s} have?",
        "About how many people are there in {s}?",
    ),
    "metropolis": (
        "Which metropolis is nearest to {s}?",
        "What is the nearest metropolis to {s}?",
        "From {s}, which metropolis is the closest?",
        "Which metropolis is {s} closest to?",
    ),
    "capital": (
        "What is the capital of {s}?",
        "Which city is the capital of {s}?",
        "From which city is {s} governed?",
        "Name the capital of {s}.",
    ),
    "currency": (
        "What is the currency of {s}?",
        "Which currency does {s} use?",
        "What money do people in {s} pay with?",
        "Name the currency of {s}.",
    ),
    "continent": (
        "On which continent is {s}?",
        "What continent is {s} in?",
        "Which continent does {s} belong to?",
        "Name the continent of {s}.",
    ),
    "language": (
        "What is the main language of {s}?",
        "Which language do most people in {s} speak?",
        "What language is most spoken in {s}?",
        "Name the main language of {s}.",
    ),
}


def prompt(question: str) -> str:
    """The question-answer layout of training; the model's answer follows with one leading space."""
    return f"Question: {question}\nAnswer:"
