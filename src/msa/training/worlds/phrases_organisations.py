"""Phrases about organisations (see ``phrases_people`` for the notation)."""

from __future__ import annotations

from msa.training.worlds.schema import phrase_table

__all__ = ["DOCUMENT", "INTROS", "LINKS", "PAIRS", "QUESTION"]

INTROS: tuple[str, ...] = phrase_table("""
# intro
{N} is {a_type} founded by {founder}.
{N} is {a_type} based in {headquarters}.
{N} is {a_type} that was founded in {founding_year}.
{N} is {a_type} known for {product}.
{N} is {a_type} founded in {founding_year} by {founder}.
{N} is {a_type} with {employees} employees.
{N}, founded in {founding_year}, is {a_type} based in {headquarters}.
{N} is {a_type} from {headquarters} that deals in {product}.
{N} is {a_type} owned by {parent}.
{N} is {a_type} led by {director}.
{N}, {a_type} in the hands of {parent}, has its headquarters in {headquarters}.
{N} was founded in {founding_year}.
{N} was founded by {founder} in {founding_year}.
The {type} {N} was founded by {founder}.
The {type} {N} has its headquarters in {headquarters}.
The {type} {N} deals in {product}.
The {type} {N} was founded in {founding_year}.
Founded in {founding_year}, {N} is {a_type} with {employees} employees.
Founded by {founder}, {N} is {a_type} that deals in {product}.
Based in {headquarters}, {N} is {a_type} with a long history.
""")["intro"]

PAIRS: tuple[str, ...] = phrase_table("""
# pair
{S} was founded by {founder} in {founding_year}.
{P} headquarters are in {headquarters}, and its staff numbers {employees}.
{S} deals in {product} and employs {employees} people.
{S} belongs to {parent} and is directed by {director}.
In {founding_year}, {founder} founded {s} with borrowed money.
From its headquarters in {headquarters}, {s} sells {product}.
Its founder was {founder}, while its director is {director}.
{S} has been making its living from {product} since it was founded in {founding_year}.
The {employees} employees of {s} are led by its director, {director}.
{S} was founded in {founding_year} and has its headquarters in {headquarters}.
""")["pair"]

DOCUMENT: dict[str, tuple[str, ...]] = phrase_table("""
# founder
was founded by {v}
was set up by {v}
was established by {v}
was started by {v} in a rented room
owes its existence to its founder, {v}
began as the project of its founder, {v}
was created by {v}
has {v} as its founder
{P} founder was {v}.
The founder of {s} was {v}.
{v} founded {s}.
{v} established {s} with borrowed money.
It was {v} who founded {s}.
A portrait of its founder, {v}, hangs in the entrance hall.
# founding_year
was founded in {v}
was established in {v}
was set up in {v}
began its work in {v}
has existed since {v}
was created in {v}
opened its doors in {v}
dates from {v}
started its business in {v}
{P} founding year is {v}.
The year of {p} founding was {v}.
It was in {v} that {s} was founded.
The founding papers of {s} were signed in {v}.
# headquarters
has its headquarters in {v}
is headquartered in {v}
is based in {v}
is run from its headquarters in {v}
keeps its head office in {v}
has its main office in {v}
moved its headquarters to {v} long ago
has its seat in {v}
operates from its head office in {v}
{P} headquarters are in {v}.
The headquarters of {s} are in {v}.
{P} head office stands in {v}.
The head office of {s} is located in {v}.
# product
deals in {v}
is known for {v}
sells {v}
earns most of its income from {v}
makes its living from {v}
specialises in {v}
concentrates on {v}
built its reputation on {v}
has always dealt in {v}
offers its customers {v}
{P} main business is {v}.
The main product of {s} is {v}.
Customers value {s} for its {v}.
# employees
has {v} employees
employs {v} people
has a staff of {v}
gives work to {v} people
counts {v} employees
has {v} people on its payroll
pays wages to {v} workers
has grown to {v} employees
{P} staff numbers {v}.
The number of its employees is {v}.
The staff of {s} numbers {v}.
Some {v} people work for {s}.
The workforce of {s} consists of {v} people.
# parent
is owned by {v}
belongs to {v}
is a subsidiary of {v}
is part of {v}
was bought by {v}, its present owner
is controlled by {v}
has {v} as its parent organisation
was taken over by {v}, to which it still belongs
{P} owner is {v}.
{P} parent organisation is {v}.
The parent organisation of {s} is {v}.
{v} owns {s}.
All shares of {s} are held by {v}.
# director
is led by {v}
is directed by {v}
is run by its director, {v}
has {v} as its director
is managed by its director, {v}
appointed {v} as director
made {v} its director
{P} director is {v}.
The director of {s} is {v}.
{v} is the director of {s}.
{v} serves as director of {s}.
The post of director is held by {v}.
The business is directed by {v}.
""")

QUESTION: dict[str, tuple[str, ...]] = phrase_table("""
# founder
Who founded {s}?
Who was the founder of {s}?
By whom was {s} founded?
Who was {p} founder?
What is the name of the founder of {s}?
Who established {s}?
Name the founder of {s}.
{s} was founded by whom?
Which person set up {s}?
# founding_year
When was {s} founded?
In which year was {s} founded?
What year was {s} founded?
In what year was {s} established?
What is the founding year of {s}?
Give the year in which {s} was founded.
{s} was founded in which year?
When was {s} established?
Since what year has {s} existed?
# headquarters
Where is {s} headquartered?
Where are the headquarters of {s}?
In which town is {s} based?
In which place is {s} headquartered?
Where is the head office of {s}?
Where is {s} based?
Name the place where {s} has its headquarters.
{s} is headquartered in which place?
In which town does {s} have its headquarters?
# product
What does {s} deal in?
What does {s} sell?
What is {s} known for?
In what does {s} specialise?
What is the main product of {s}?
What is the main business of {s}?
Name the product of {s}.
{s} deals in what?
From what does {s} earn most of its income?
# employees
How many employees does {s} have?
How many people does {s} employ?
How many people work for {s}?
What is the number of employees of {s}?
How large is the staff of {s}?
State the number of people employed by {s}.
{s} has how many employees?
How big is the workforce of {s}?
How many workers does {s} have?
# parent
Who owns {s}?
What is the parent organisation of {s}?
Which organisation owns {s}?
To which organisation does {s} belong?
What is {p} parent organisation?
Name the owner of {s}.
{s} is owned by which organisation?
Of which organisation is {s} a subsidiary?
By which organisation is {s} owned?
# director
Who is the director of {s}?
Who leads {s}?
Who is {p} director?
What is the name of the director of {s}?
By whom is {s} directed?
Who runs {s}?
Name the director of {s}.
{s} is directed by whom?
Who serves as director of {s}?
""")

LINKS: dict[str, tuple[str, ...]] = phrase_table("""
# founder
the founder of {e}
the person who founded {e}
{e}'s founder
the person who established {e}
# headquarters
the {t} where {e} is headquartered
the {t} in which {e} has its headquarters
the {t} where {e} is based
# parent
the parent organisation of {e}
the owner of {e}
the {t} that owns {e}
# director
the director of {e}
the person who directs {e}
{e}'s director
the person who runs {e}
""")
