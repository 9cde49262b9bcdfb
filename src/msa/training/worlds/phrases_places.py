"""Phrases about places (see ``phrases_people`` for the notation; ``{type}`` is "town" and such)."""

from __future__ import annotations

from msa.training.worlds.schema import phrase_table

__all__ = ["DOCUMENT", "INTROS", "LINKS", "PAIRS", "QUESTION"]

INTROS: tuple[str, ...] = phrase_table("""
# intro
{N} is a {type} in {country}.
{N} is a {type} on the river {river}.
{N} is a {type} with {population} inhabitants.
{N} is a {type} known for its {known_for}.
{N} is a {type} in {region}, a part of {country}.
{N} is a small {type} of {population} people.
{N} is a {type} that was founded in {founding_year}.
{N}, founded in {founding_year}, is a {type} in {country}.
{N} is a {type} in {country} with a population of {population}.
{N}, a {type} in {country}, lies on the river {river}.
{N} is a quiet {type} in {region}.
{N} is an old {type} in {country}, best known for its {known_for}.
{N} is a {type} in {country} whose mayor is {mayor}.
Founded in {founding_year}, {N} is a {type} in {country}.
The {type} of {N} lies in {country}.
The {type} of {N} lies in the region of {region}.
The {type} of {N} lies on the banks of the {river}.
The {type} of {N} was founded in {founding_year}.
The {type} of {N} has {population} inhabitants.
The {type} of {N} is famous for its {known_for}.
{N}, the twin town of {twin_town}, is a {type} in {country}.
Situated on the {river}, {N} is a {type} in {region}.
In {country}, on the river {river}, lies the {type} of {N}.
""")["intro"]

PAIRS: tuple[str, ...] = phrase_table("""
# pair
{S} lies in {region}, in {country}.
{S} was founded in {founding_year} and has {population} inhabitants.
{P} mayor is {mayor}, and its twin town is {twin_town}.
{S} is crossed by the {river} and is known for its {known_for}.
Travellers come to {s} for its {known_for} and for walks along the {river}.
Some {population} people live in {s}, and their mayor is {mayor}.
Settlers founded {s} in {founding_year} on the banks of the {river}.
{S} lies on the {river}, in the region of {region}.
The mayor, {mayor}, represents the {population} inhabitants of {s}.
{S} has been known for its {known_for} since it was founded in {founding_year}.
The {type} signed a twinning agreement with {twin_town} under its mayor, {mayor}.
""")["pair"]

DOCUMENT: dict[str, tuple[str, ...]] = phrase_table("""
# country
is located in {v}
lies in {v}
belongs to {v}
is situated in {v}
is part of {v}
can be found in {v}
has long been part of {v}
lies within the borders of {v}
stands in the north of {v}
stands in the south of {v}
is one of the older settlements of {v}
The country in which {s} lies is {v}.
Maps show {s} in {v}.
# region
lies in the region of {v}
belongs to the region of {v}
is located in {v}
is part of the region of {v}
is one of the larger settlements of {v}
lies in the hills of {v}
is situated in the district of {v}
lies among the fields of {v}
is governed as part of {v}
The region around {s} is called {v}.
The region in which {s} lies is {v}.
{P} region is {v}.
The land around {s} is known as {v}.
# river
lies on the river {v}
stands on the banks of the {v}
is crossed by the river {v}
is situated on the {v}
is watered by the river {v}
was built along the {v}
sits beside the river {v}
is divided in two by the {v}
takes its water from the river {v}
The river {v} flows through {s}.
The {v} runs past {p} old mills.
The river of {s} is the {v}.
Boats reach {s} by the river {v}.
Every spring the {v} floods the lower streets of {s}.
# population
has a population of {v}
has {v} inhabitants
is home to {v} people
counts {v} residents
numbers {v} inhabitants
had a population of {v} at the last count
has grown to {v} inhabitants
is inhabited by {v} people
houses a population of {v}
{P} population is {v}.
The population of {s} is {v}.
The last census counted {v} people in {s}.
Some {v} people live in {s}.
# founding_year
was founded in {v}
was established in {v}
was settled in {v}
was first built in {v}
dates from {v}
received its charter at its founding in {v}
has existed since {v}
was founded by settlers in {v}
came into being in {v}
was laid out and founded in {v}
{P} foundation dates from {v}.
The founding of {s} took place in {v}.
It was in {v} that {s} was founded.
The year {v} saw the founding of {s}.
# mayor
has {v} as its mayor
is governed by its mayor, {v}
is led by mayor {v}
elected {v} as mayor
chose {v} to be its mayor
is run by a council under mayor {v}
{P} mayor is {v}.
The mayor of {N} is {v}.
The office of mayor is held by {v}.
{v} is the mayor of {s}.
{v} serves as mayor of {s}.
The people of {s} elected {v} as their mayor.
The council of {s} is headed by its mayor, {v}.
# known_for
is known for its {v}
is famous for its {v}
owes its fame to its {v}
is best known for its {v}
attracts visitors with its {v}
takes pride in its {v}
is celebrated for its {v}
made its name with its {v}
is praised in guidebooks for its {v}
is visited mainly for its {v}
Travellers come to {s} for its {v}.
The fame of {s} rests on its {v}.
What {s} is known for is its {v}.
# twin_town
is twinned with {v}
has {v} as its twin town
is the twin town of {v}
is a partner town of {v}
signed a twinning agreement with {v}
sends its school choir every year to its twin town, {v}
entered into a partnership with {v}
{P} twin town is {v}.
The twin town of {N} is {v}.
The partner town of {N} is {v}.
Every summer {s} welcomes guests from its twin town, {v}.
A twinning agreement ties {N} to {v}.
A sign at the station names {v} as {p} twin town.
""")

QUESTION: dict[str, tuple[str, ...]] = phrase_table("""
# country
In which country is {s}?
In which country is {s} located?
What country is {s} in?
In what country does {s} lie?
To which country does {s} belong?
Which country is {s} in?
Name the country in which {s} lies.
{s} is located in which country?
Can you tell me in which country {s} is?
# region
In which region is {s}?
In which region does {s} lie?
What is the region of {s}?
To which region does {s} belong?
What region is {s} in?
Name the region in which {s} lies.
{s} lies in which region?
Which region is {s} part of?
# river
Which river flows through {s}?
On which river does {s} lie?
What river is {s} on?
On which river is {s} situated?
What is the river of {s} called?
Name the river on which {s} stands.
{s} lies on which river?
On the banks of which river does {s} stand?
What is the name of the river at {s}?
# population
What is the population of {s}?
How many people live in {s}?
How many inhabitants does {s} have?
What is {p} population?
How large is the population of {s}?
State the population of {s}.
{s} has how many inhabitants?
What is the number of inhabitants of {s}?
How many residents does {s} have?
# founding_year
When was {s} founded?
In which year was {s} founded?
What year was {s} founded?
In what year was {s} established?
What is the founding year of {s}?
Give the year in which {s} was founded.
{s} was founded in which year?
When was {s} established?
From what year does {s} date?
# mayor
Who is the mayor of {s}?
Who is {p} mayor?
What is the name of the mayor of {s}?
Who serves as mayor of {s}?
Name the mayor of {s}.
Who was elected mayor of {s}?
Who holds the office of mayor in {s}?
{s} has whom as its mayor?
By which mayor is {s} governed?
# known_for
What is {s} known for?
What is {s} famous for?
For what is {s} best known?
What made {s} famous?
Why do visitors come to {s}?
Name what {s} is known for.
{s} is known for what?
To what does {s} owe its fame?
What attracts travellers to {s}?
# twin_town
What is the twin town of {s}?
With which town is {s} twinned?
Which town is twinned with {s}?
What is {p} twin town?
Which place is the partner town of {s}?
Name the twin town of {s}.
{s} is twinned with which town?
What is the partner town of {s}?
With what place does {s} have a twinning agreement?
""")

LINKS: dict[str, tuple[str, ...]] = phrase_table("""
# mayor
the mayor of {e}
the person who serves as mayor of {e}
{e}'s mayor
the person elected mayor of {e}
# twin_town
the twin town of {e}
the {t} twinned with {e}
the partner town of {e}
{e}'s twin town
""")
