"""Phrases about works of art.

See ``phrases_people`` for the notation. ``{type}`` is "novel" and such, ``{made}``/``{maker}``
"wrote"/"author", ``{done}`` "written", ``{issued}``/``{issuer}`` "published"/"publisher",
``{dated}`` "published" or "completed".
"""

from __future__ import annotations

from msa.training.worlds.schema import phrase_table

__all__ = ["DOCUMENT", "INTROS", "LINKS", "PAIRS", "QUESTION"]

INTROS: tuple[str, ...] = phrase_table("""
# intro
{N} is {a_type} by {creator}.
{N} is {a_type} that was {dated} in {year}.
{N} is {a_type} {done} by {creator}.
{N} is {a_type} set in {setting}.
{N} is {a_type} {dated} in {year} and {done} by {creator}.
{N} is {a_type} dedicated to {dedicatee}.
{N}, {a_type} by {creator}, was {dated} in {year}.
{N}, {done} by {creator}, is {a_type} set in {setting}.
{N} is {a_type} from {year}.
{N} is {a_type} {issued} by {publisher}.
{N} ({year}) is {a_type} by {creator}.
The {type} {N} was {done} by {creator}.
The {type} {N} was {dated} in {year}.
The {type} {N} is set in {setting}.
The {type} {N} is the work of {creator}.
{N}, {issued} by {publisher}, is {a_type} from {year}.
{N} is the best known {type} of {creator}.
{N} is {a_genre} by the {maker} {creator}.
{N}, {a_type} of {year}, is {a_genre}.
{dated_cap} in {year}, {N} is {a_type} by {creator}.
{done_cap} by {creator}, {N} is {a_type} of modest fame.
""")["intro"]

PAIRS: tuple[str, ...] = phrase_table("""
# pair
{S} was {done} by {creator} and {dated} in {year}.
{S} was {issued} by {publisher} in {year}.
{P} {maker} was {creator}, and its {issuer} was {publisher}.
{S} is {a_genre} set in {setting}.
The {maker}, {creator}, dedicated it to {dedicatee}.
{creator} dedicated the {type} to {dedicatee}.
{S} is {a_genre} that was {dated} in {year}.
With this {type}, {creator} hoped to please the {issuer}, {publisher}.
The action takes place in {setting}, which {creator} knew from childhood.
Set in {setting}, it was {issued} by {publisher}.
""")["pair"]

DOCUMENT: dict[str, tuple[str, ...]] = phrase_table("""
# creator
was {done} by {v}
is the work of {v}
came from the hand of {v}
was {done} in haste by {v}
was {done} over many months by {v}
is one of the lesser known works of {v}
owes its existence to {v}
has {v} as its {maker}
{P} {maker} is {v}.
The {maker} of the {type} is {v}.
{v} {made} the {type}.
{v} {made} it during a long winter.
The {maker}, {v}, worked on it for years.
It was {v} who {made} the {type}.
# year
was {dated} in {v}
was first {dated} in {v}
appeared in {v}
dates from {v}
was finally {dated} in {v}
was {dated} after long delays in {v}
was {dated} to mixed reviews in {v}
reached the public in {v}
bears the date {v}
first became known in {v}
The year of {p} appearance is {v}.
It was in {v} that {s} was {dated}.
Catalogues date {s} to {v}.
# genre
is {av}
is usually described as {av}
is best described as {av}
was conceived as {av}
takes the form of {av}
is classed as {av}
was advertised as {av}
is generally considered {av}
can be called {av}
is listed in catalogues as {av}
is in essence {av}
By genre {s} is {av}.
Critics describe {s} as {av}.
# setting
is set in {v}
takes place in {v}
tells a story set in {v}
plays out in the streets of {v}
follows a family in {v}
unfolds in {v}
has {v} as its setting
uses {v} as its setting
The story takes place in {v}.
The setting is {v}.
The action is set in {v}.
The events of the {type} take place in {v}.
{v} provides the setting of the {type}.
# publisher
was {issued} by {v}
was first {issued} by {v}
was accepted and {issued} by {v}
was {issued} after some hesitation by {v}
was {issued} without much publicity by {v}
was brought to the public by {v}
has {v} as its {issuer}
{P} {issuer} was {v}.
The {issuer} was {v}.
{v} {issued} the {type}.
The {type} was {issued} by {v}.
It was {v} that {issued} the {type}.
Its success surprised the {issuer}, {v}.
# dedicatee
is dedicated to {v}
was dedicated to {v}
carries a dedication to {v}
bears a dedication to {v}
was offered as a gift to {v}, to whom it is dedicated
was made in honour of {v}, to whom it is dedicated
includes a dedication to {v}
{P} dedication is to {v}.
The dedication names {v}.
The dedication reads simply: for {v}.
The {type} is dedicated to {v}.
The person to whom {s} is dedicated is {v}.
""")

QUESTION: dict[str, tuple[str, ...]] = phrase_table("""
# creator
Who {made} {s}?
Who is the {maker} of {s}?
Who was the {maker} of {s}?
By whom was {s} {done}?
What is the name of the {maker} of {s}?
Who {made} the {type} {s}?
Name the {maker} of {s}.
{s} was {done} by whom?
Who is the {maker} of the {type} {s}?
Whose work is {s}?
# year
When was {s} {dated}?
In which year was {s} {dated}?
What year was {s} {dated}?
From what year does {s} date?
In what year did {s} appear?
Give the year in which {s} was {dated}.
{s} was {dated} in which year?
When was the {type} {s} {dated}?
In which year did the {type} {s} appear?
# genre
What is the genre of {s}?
To which genre does {s} belong?
What kind of {type} is {s}?
How is {s} usually described?
What sort of {type} is {s}?
State the genre of {s}.
What genre is {s}?
{s} belongs to which genre?
By genre, what is {s}?
# setting
Where is {s} set?
In which place is {s} set?
What is the setting of {s}?
Where does {s} take place?
In which town does {s} take place?
Name the setting of {s}.
{s} is set in which place?
Where is the {type} {s} set?
In which town is the story of {s} set?
# publisher
Who {issued} {s}?
Which organisation {issued} {s}?
What was the {issuer} of {s}?
By which organisation was {s} {issued}?
Name the {issuer} of {s}.
{s} was {issued} by which organisation?
What is the name of the {issuer} of {s}?
Which {issuer} {issued} {s}?
Who was responsible for bringing {s} to the public?
# dedicatee
To whom is {s} dedicated?
Who is {s} dedicated to?
Who is the dedicatee of {s}?
In whose honour was {s} made?
Whom does the dedication of {s} name?
Name the person to whom {s} is dedicated.
{s} is dedicated to whom?
To which person is the {type} {s} dedicated?
To whom was {s} dedicated?
""")

LINKS: dict[str, tuple[str, ...]] = phrase_table("""
# creator
the {maker} of {e}
the person who {made} {e}
the {maker} of the {type} {e}
the person by whom {e} was {done}
# setting
the {t} where {e} is set
the {t} in which {e} is set
the setting of {e}
the {t} where the {type} {e} takes place
# publisher
the {issuer} of {e}
the {t} that {issued} {e}
the organisation that {issued} {e}
# dedicatee
the person to whom {e} is dedicated
the dedicatee of {e}
the person named in the dedication of {e}
""")
