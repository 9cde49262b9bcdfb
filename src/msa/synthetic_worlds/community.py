"""Invents a community: people, places, works, organisations and sites that refer to each other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

from msa.synthetic_worlds.names import NameBook
from msa.synthetic_worlds.needles import needle_value
from msa.synthetic_worlds.schema import Entity
from msa.synthetic_worlds.tables import pairs, words, words_by_type

__all__ = ["RELATIONS", "build_community"]

# The breadth from which on a relation is told.
RELATIONS: Final[dict[str, dict[str, float]]] = {
    "person": {
        "occupation": 0.0,
        "birth_date": 0.0,
        "birth_place": 0.0,
        "father": 0.0,
        "mother": 0.0,
        "employer": 0.0,
        "nationality": 0.2,
        "spouse": 0.2,
        "death_date": 0.3,
        "school": 0.3,
        "death_place": 0.4,
        "sibling": 0.4,
        "teacher": 0.5,
        "award": 0.6,
        "instrument": 0.6,
        "hobby": 0.6,
    },
    "place": {
        "country": 0.0,
        "population": 0.0,
        "river": 0.0,
        "mayor": 0.0,
        "founding_year": 0.3,
        "known_for": 0.3,
        "region": 0.5,
        "twin_town": 0.5,
    },
    "work": {
        "creator": 0.0,
        "year": 0.0,
        "genre": 0.0,
        "setting": 0.3,
        "publisher": 0.3,
        "dedicatee": 0.6,
    },
    "organisation": {
        "founder": 0.0,
        "founding_year": 0.0,
        "headquarters": 0.0,
        "product": 0.2,
        "employees": 0.3,
        "director": 0.5,
        "parent": 0.6,
    },
    "needle": {
        "access_code": 0.0,
        "password": 0.0,
        "frequency": 0.3,
        "door_colour": 0.3,
        "key_place": 0.3,
        "closing_time": 0.3,
        "inventory": 0.3,
        "emblem": 0.3,
    },
}

# type: made, maker, done, issued, issuer, dated, kind of organisation that issues it
_WORK_TYPES: Final = {
    "novel": ("wrote", "author", "written", "published", "publisher", "published"),
    "film": ("directed", "director", "directed", "produced", "studio", "released"),
    "song": ("composed", "composer", "composed", "released", "record label", "released"),
    "painting": ("painted", "painter", "painted", "exhibited", "gallery", "completed"),
    "play": ("wrote", "author", "written", "staged", "theatre company", "performed"),
    "opera": ("composed", "composer", "composed", "staged", "theatre company", "performed"),
}
_ISSUERS: Final = {
    "novel": "publishing house",
    "film": "film studio",
    "song": "record label",
    "painting": "gallery",
    "play": "theatre company",
    "opera": "theatre company",
}
_STAGED: Final = ("novel", "film", "play", "opera")
_MODERN: Final = ("film", "song", "film studio", "record label")
_VOWELS: Final = "aeiouAEIOU"
_SPOUSE: Final = {"m": ("husband", "man"), "f": ("wife", "woman")}
_SIBLING: Final = {"m": "brother", "f": "sister"}
_COUNTRIES: Final = pairs("countries")
_GENRES: Final = words_by_type("genres")
_MONTHS: Final = words("months")
_PLACE_TYPES: Final = words("place_types")
_PRODUCTS: Final = words_by_type("products")


def article(noun: str) -> str:
    """Prefix a noun phrase with its indefinite article."""
    lowered = noun.lower()
    if lowered.startswith(("uni", "eu", "one", "uru", "use", "ukr")):
        return "a " + noun
    return ("an " if noun[0] in _VOWELS else "a ") + noun


class _Community:
    """One community while it is being invented."""

    def __init__(self, rng: random.Random, names: NameBook, breadth: float) -> None:
        self.rng = rng
        self.names = names
        self.breadth = breadth
        draw = rng.random()
        low, high = (1680, 1750) if draw < 0.12 else (1750, 1850) if draw < 0.4 else (1850, 1935)
        self.era = rng.randint(low, high)
        self.people: list[Entity] = []
        self.places: list[Entity] = []
        self.works: list[Entity] = []
        self.organisations: list[Entity] = []
        self.needles: list[Entity] = []

    def active(self, kind: str, relation: str) -> bool:
        return RELATIONS[kind][relation] <= self.breadth

    # Entities and the links between them.

    def _add_person(self, gender: str, surname: str, year: int) -> Entity:
        person = Entity("person", self.names.person(gender, surname), gender, year)
        dead = year + self.rng.randint(45, 92)
        person.words = {"dead": str(dead) if dead <= 2010 else ""}
        self.people.append(person)
        return person

    def _add_family(self, limit: int) -> None:
        """Add two to seven people of up to three generations."""
        rng = self.rng
        surname = self.names.surname()
        year = self.era + rng.randint(-4, 6)
        father, mother = self._add_couple(surname, year, limit)
        for _ in range(2):
            if mother is None:
                return
            children = [
                self._add_person(rng.choice("mf"), surname, 0)
                for _ in range(min(rng.choice((1, 2, 2)), limit - len(self.people)))
            ]
            birth = max(father.year, mother.year) + rng.randint(20, 32)
            for child in children:
                child.year = birth
                birth += rng.randint(1, 6)
                dead = child.year + rng.randint(45, 92)
                child.words["dead"] = str(dead) if dead <= 2010 else ""
                child.link("father", father)
                child.link("mother", mother)
            if len(children) == 2:
                children[0].link("sibling", children[1])
                children[1].link("sibling", children[0])
            sons = [child for child in children if child.gender == "m"]
            if not sons or len(self.people) >= limit or rng.random() < 0.4:
                return
            father, mother = sons[0], self._add_wife(sons[0])

    def _add_couple(self, surname: str, year: int, limit: int) -> tuple[Entity, Entity | None]:
        husband = self._add_person("m" if self.rng.random() < 0.9 else "f", surname, year)
        if husband.gender == "f" or len(self.people) >= limit:
            return husband, None
        return husband, self._add_wife(husband)

    def _add_wife(self, husband: Entity) -> Entity:
        rng = self.rng
        surname = husband.surname if rng.random() < 0.6 else self.names.surname()
        wife = self._add_person("f", surname, husband.year + rng.randint(-6, 6))
        wife.link("spouse", husband)
        husband.link("spouse", wife)
        return wife

    def populate(self, size: int) -> list[Entity]:
        """Invent the entities that get a document."""
        rng, names = self.rng, self.names
        num_needles = (size * 6 + 50) // 100
        num_organisations = (size * 10 + 50) // 100
        num_works = (size * 13 + 50) // 100
        num_places = (size * 15 + 50) // 100
        num_people = size - num_needles - num_organisations - num_works - num_places
        while len(self.people) < num_people:
            self._add_family(num_people)
        for _ in range(num_places):
            year = rng.randint(1600, max(1610, self.era - 10))
            place = Entity("place", names.place(), year=year)
            place.words = {"type": rng.choice(_PLACE_TYPES)}
            self.places.append(place)
        for _ in range(num_organisations):
            self._add_organisation()
        for _ in range(num_works):
            self._add_work()
        for _ in range(num_needles):
            self.needles.append(Entity("needle", names.needle()))
        entities = [
            *self.people, *self.places, *self.works, *self.organisations, *self.needles
        ]  # fmt: skip
        rng.shuffle(entities)
        return entities

    def _add_organisation(self) -> None:
        rng = self.rng
        kinds = [kind for kind in _PRODUCTS if self.era >= 1870 or kind not in _MODERN]
        kind = rng.choice(kinds)
        founder = rng.choice(self.people)
        entity = Entity("organisation", self.names.organisation(kind))
        entity.year = min(2010, founder.year + rng.randint(22, 44))
        entity.link("founder", founder)
        entity.words = {"type": kind, "a_type": article(kind)}
        self.organisations.append(entity)

    def _add_work(self) -> None:
        rng = self.rng
        issuing = {organisation.words["type"] for organisation in self.organisations}
        kinds = [kind for kind in _WORK_TYPES if self.era >= 1870 or kind not in _MODERN]
        published = [kind for kind in kinds if _ISSUERS[kind] in issuing]
        kind = rng.choice(published if published and rng.random() < 0.6 else kinds)
        made, maker, done, issued, issuer, dated = _WORK_TYPES[kind]
        creator = rng.choice(self.people)
        work = Entity("work", self.names.work(), year=min(2010, creator.year + rng.randint(22, 44)))
        work.link("creator", creator)
        work.words = {
            "type": kind,
            "a_type": article(kind),
            "made": made,
            "maker": maker,
            "done": done,
            "issued": issued,
            "issuer": issuer,
            "dated": dated,
            "dated_cap": dated.capitalize(),
            "done_cap": done.capitalize(),
        }
        self.works.append(work)

    # Links that need all entities.

    def _other(self, options: Sequence[Entity], *avoided: Entity | None) -> Entity | None:
        """Choose one of the options, or give up after a few draws of avoided ones."""
        for _ in range(4):
            if options:
                choice = self.rng.choice(options)
                if not any(choice is entity for entity in avoided):
                    return choice
        return None

    def _link(self, entity: Entity, relation: str, other: Entity | None) -> None:
        if other is not None:
            entity.link(relation, other)

    def _place_name(self, entity: Entity, relation: str) -> None:
        """Let a relation name a place of the community or, at times, one from outside."""
        if self.places and self.rng.random() < 0.7:
            entity.link(relation, self.rng.choice(self.places))
        else:
            entity.values[relation] = self.names.place()

    def connect(self) -> None:
        """Add the remaining links."""
        rng = self.rng
        for person in self.people:
            person_words, links = person.words, person.links
            if "spouse" in links:
                gender = links["spouse"].gender
                person_words["spouse_word"], person_words["spouse_kind"] = _SPOUSE[gender]
            if "sibling" in links:
                person_words["sibling_word"] = _SIBLING[links["sibling"].gender]
                person_words["own_sibling_word"] = _SIBLING[person.gender]
            self._place_name(person, "birth_place")
            if person_words["dead"]:
                self._place_name(person, "death_place")
            if rng.random() < 0.75:
                early = [o for o in self.organisations if o.year <= person.year + 44]
                self._link(person, "employer", self._other(early))
            if rng.random() < 0.4:
                elders = [o for o in self.people if o.year + 8 <= person.year]
                avoided = (links.get("father"), links.get("mother"), links.get("spouse"))
                self._link(person, "teacher", self._other(elders, *avoided))
        living = [person for person in self.people if not person.words["dead"]]
        for place in self.places:
            self._link(place, "mayor", self._other(living or self.people))
        for first, second in zip(self.places[::2], self.places[1::2], strict=False):
            first.link("twin_town", second)
            second.link("twin_town", first)
        self._connect_organisations()
        self._connect_works()

    def _connect_organisations(self) -> None:
        living = [person for person in self.people if not person.words["dead"]]
        for index, entity in enumerate(self.organisations):
            if self.places and self.rng.random() < 0.85:
                entity.link("headquarters", self.rng.choice(self.places))
            else:
                entity.values["headquarters"] = self.names.place()
            self._link(
                entity, "director", self._other(living or self.people, entity.links["founder"])
            )
            if index and self.rng.random() < 0.6:
                self._link(entity, "parent", self.rng.choice(self.organisations[:index]))

    def _connect_works(self) -> None:
        for work in self.works:
            kind = work.words["type"]
            if kind in _STAGED:
                self._place_name(work, "setting")
            issuers = [o for o in self.organisations if o.words["type"] == _ISSUERS[kind]]
            self._link(work, "publisher", self._other(issuers))
            self._link(work, "dedicatee", self._other(self.people, work.links["creator"]))


class _Facts:
    """Draws the facts that are not links and settles what a document tells."""

    def __init__(self, community: _Community) -> None:
        self.rng = community.rng
        self.names = community.names
        self.breadth = community.breadth
        countries = _COUNTRIES
        self.countries = [self.rng.choice(countries) for _ in range(4)]
        self.active = {
            kind: [name for name, least in relations.items() if least <= self.breadth]
            for kind, relations in RELATIONS.items()
        }

    def country(self) -> tuple[str, str]:
        local = self.rng.random() < 0.5
        return self.rng.choice(self.countries if local else _COUNTRIES)

    def _date(self, entity: Entity, relation: str, year: int, style: int) -> None:
        day, month = self.rng.randint(1, 28), self.rng.choice(_MONTHS)
        forms = (f"{day} {month} {year}", f"{month} {day}, {year}")
        entity.values[relation] = forms[style]
        entity.aliases[relation] = (forms[1 - style],)

    def _number(self, entity: Entity, relation: str, number: int) -> None:
        plain, separated = str(number), f"{number:,}"
        if self.breadth > 0.2 and self.rng.random() < 0.4:
            plain, separated = separated, plain
        entity.values[relation] = separated
        entity.aliases[relation] = (plain,) if plain != separated else ()

    def settle(self, entity: Entity) -> None:
        """Choose what the document of an entity tells and draw the missing values."""
        if entity.kind == "needle":
            self._settle_needle(entity)
            return
        rng = self.rng
        possible = [
            name
            for name in self.active[entity.kind]
            if name in entity.values or self._drawable(entity, name)
        ]
        least, most = (4, 6) if entity.kind == "work" else (5, 7)
        count = min(len(possible), rng.randint(least, most))
        if entity.kind == "person":
            rest = [name for name in possible if name != "occupation"]
            told = ["occupation", *rng.sample(rest, count - 1)]
        else:
            told = rng.sample(possible, count)
        order = {name: index for index, name in enumerate(possible)}
        entity.told = tuple(sorted(told, key=order.__getitem__))
        style = int(self.breadth > 0.2 and rng.random() < 0.5)
        for name in entity.told:
            if name not in entity.values:
                self._draw(entity, name, style)

    def _drawable(self, entity: Entity, relation: str) -> bool:
        if relation in _LINK_ONLY:
            return False
        return relation != "death_date" or bool(entity.words["dead"])

    def _settle_needle(self, entity: Entity) -> None:
        rng = self.rng
        relations = rng.sample(self.active["needle"], 1 if rng.random() < 0.5 else 2)
        entity.told = tuple(relations)
        for relation in relations:
            value, aliases = needle_value(relation, rng, self.names.stem())
            entity.values[relation] = value
            entity.aliases[relation] = aliases

    def _draw(self, entity: Entity, name: str, style: int) -> None:
        """Draw the value of a relation that names no other entity."""
        rng, values = self.rng, entity.values
        if name == "birth_date":
            self._date(entity, name, entity.year, style)
        elif name == "death_date":
            self._date(entity, name, int(entity.words["dead"]), style)
        elif name in ("founding_year", "year"):
            values[name] = str(entity.year)
        elif name == "population":
            least, most = _POPULATIONS[entity.words["type"]]
            self._number(entity, name, int(10 ** rng.uniform(least, most)))
        elif name == "employees":
            self._number(entity, name, int(10 ** rng.uniform(1.0, 4.0)))
        elif name == "country":
            values[name] = self.country()[0]
        elif name == "nationality":
            values[name] = self.country()[1]
        elif name in _CHOICES:
            values[name] = rng.choice(_CHOICES[name])
        elif name == "genre":
            values[name] = rng.choice(_GENRES[entity.words["type"]])
        elif name == "product":
            values[name] = rng.choice(_PRODUCTS[entity.words["type"]])
        else:
            drawers = {
                "school": self.names.school,
                "award": self.names.award,
                "river": self.names.river,
                "region": self.names.region,
            }
            values[name] = drawers[name]()


_LINK_ONLY: Final = frozenset({
    "father", "mother", "spouse", "sibling", "teacher", "employer", "birth_place", "death_place",
    "mayor", "twin_town", "creator", "setting", "publisher", "dedicatee", "founder",
    "headquarters", "director", "parent",
})  # fmt: skip
# Decimal logarithms of the smallest and the largest population.
_POPULATIONS: Final = {
    "village": (2.3, 3.7),
    "town": (3.3, 5.1),
    "port": (3.3, 5.5),
    "city": (4.8, 6.3),
}
_CHOICES: Final = {
    "occupation": words("occupations"),
    "instrument": words("instruments"),
    "hobby": words("hobbies"),
    "known_for": words("known_for"),
}


def build_community(rng: random.Random, names: NameBook, size: int, breadth: float) -> list[Entity]:
    """Invent a community.

    Args:
        rng: Source of randomness.
        names: Source of names.
        size: Number of entities that get a document.
        breadth: From 0 (few relations) to 1 (all of them).

    Returns:
        The entities in random order, with everything settled that their documents tell.
    """
    community = _Community(rng, names, breadth)
    entities = community.populate(size)
    community.connect()
    facts = _Facts(community)
    for entity in entities:
        facts.settle(entity)
    return entities
