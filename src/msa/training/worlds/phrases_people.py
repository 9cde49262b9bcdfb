"""Phrases about people.

A document phrase that begins with a lower-case word (or a tense slot) is a predicate: it follows
a subject and can be joined to another one. Slots: ``{v}`` the value, ``{av}`` the value with its
indefinite article, ``{S}``/``{s}`` the subject, ``{P}``/``{p}`` its possessive, ``{he}``,
``{his}``, ``{him}`` pronouns, ``{is}``, ``{has}``, ``{plays}`` and so on verbs in the right tense.
Question phrases use ``{s}`` for the subject and ``{p}`` for its possessive (one-hop only).
"""

from __future__ import annotations

from msa.training.worlds.schema import phrase_table

__all__ = ["DOCUMENT", "INTROS", "LINKS", "PAIRS", "QUESTION"]

INTROS: tuple[str, ...] = phrase_table("""
# intro
{N} {is} {a_occupation}.
{N} {is} {a_nationality} {occupation}.
{N} was born on {birth_date}.
{N} was born in {birth_place}.
{N} (born {birth_date}) {is} {a_occupation}.
{N}, {a_occupation}, was born in {birth_place}.
{N} was born on {birth_date} in {birth_place}.
{N} was {a_nationality} {occupation} ({birth_date} to {death_date}).
{N}, {a_nationality} {occupation}, was born on {birth_date}.
{N} (born in {birth_place} on {birth_date}) {is} {a_occupation}.
{N} was {a_nationality} {occupation} who died on {death_date}.
{N} {is} {a_occupation} who was born in {birth_place}.
{N} {is} {a_nationality} {occupation}, born in {birth_place}.
{N} made a living as {a_occupation}.
{N}, born on {birth_date}, {is} {a_occupation} by profession.
{N} {is} best known as {a_occupation}.
{N} {is} {a_occupation} of {nationality} nationality.
The {occupation} {N} was born on {birth_date}.
The {nationality} {occupation} {N} was born in {birth_place}.
The {occupation} {N} was the child of {father} and {mother}.
{N} {is} {a_occupation} who {is} married to {spouse}.
{N} {is} {a_occupation} at {employer}.
{N}, {a_occupation} by trade, was employed by {employer}.
{N} {is} {a_nationality} {occupation} and a former pupil of {teacher}.
Born on {birth_date}, {N} {is} {a_occupation}.
Born in {birth_place}, {N} {is} {a_nationality} {occupation}.
Born in {birth_place} on {birth_date}, {N} became {a_occupation}.
{N} came into the world on {birth_date} and became {a_occupation}.
{N}, a native of {birth_place}, became {a_occupation}.
The {occupation} {N} {is} {nationality} by nationality.
{N} became {a_occupation} after an education at {school}.
{N} {is} {a_occupation} and a winner of the {award}.
{N} earned {his} bread as {a_occupation}.
{N} came to be known as {a_occupation}.
{N} was trained as {a_occupation}.
{N} {is} {a_occupation} who {plays} the {instrument}.
{N}, a former student of {school}, {is} {a_occupation}.
{N} was taught by {teacher} and became {a_occupation}.
{N} {is} {a_occupation} with a passion for {hobby}.
{N}, whose father was {father}, {is} {a_occupation}.
{N}, whose mother was {mother}, {is} {a_occupation}.
{N} was {a_occupation} who died in {death_place}.
{N}, who died in {death_place} on {death_date}, was {a_occupation}.
The career of {N} was that of {a_occupation}.
The life of {N} was that of {a_occupation}.
People knew {N} as {a_occupation}.
""")["intro"]

PAIRS: tuple[str, ...] = phrase_table("""
# pair
{S} was born on {birth_date} in {birth_place}.
{P} parents were {father} and {mother}.
{P} birth took place in {birth_place} on {birth_date}.
{S} was the child of {father} and {mother}.
{S} died in {death_place} on {death_date}.
{P} father was {father}, and {his} mother was {mother}.
{S} died on {death_date} in {death_place}.
After leaving {school}, {s} joined {employer}.
{S} was brought up by {his} parents, {father} and {mother}.
Educated at {school}, {s} later worked for {employer}.
{P} mother, {mother}, and {his} father, {father}, had married young.
{S} was born in {birth_place} and died in {death_place}.
{S} was taught by {teacher} and later won the {award}.
{S} studied at {school}, where {he} was noticed by {teacher}, who became {his} teacher.
A keen player of the {instrument}, {s} also {enjoys} {hobby}.
{S} {is} married to {spouse} and {works} for {employer}.
{S} was born on {birth_date} and died on {death_date}.
{P} life began on {birth_date} and ended on {death_date}.
{S} {plays} the {instrument}, and {his} other pastime {is} {hobby}.
{S} was awarded the {award} while working for {employer}.
""")["pair"]

DOCUMENT: dict[str, tuple[str, ...]] = phrase_table("""
# occupation
{works} as {av}
earned a living as {av}
became {av} after some years of training
{is} {av} by profession
{is} {av} by trade
{has} spent most of {his} working life as {av}
found work as {av}
trained as {av} and never took up another trade
made {his} name as {av}
{is} remembered locally as {av}
chose to become {av}
{P} occupation {is} that of {av}.
By profession {s} {is} {av}.
# nationality
{is} of {v} nationality
{is} {av} citizen
{holds} {v} citizenship
{has} {v} nationality
{is} {v} by nationality
{is} the holder of {av} passport
never gave up {his} {v} citizenship
{is} {v} by citizenship
acquired {v} nationality at birth
was registered as {av} national
{P} nationality {is} {v}.
{P} passport {is} {v}.
{P} papers give {his} nationality as {v}.
# birth_date
was born on {v}
came into the world on {v}
first saw the light of day on {v}
was entered in the register as born on {v}
was born on {v}, a day of heavy rain
entered the world on {v}
was delivered by a midwife on {v}
{has} {v} as {his} date of birth
was a child of the night, born on {v}
{P} date of birth is {v}.
{P} birthday was {v}.
The day {s} was born was {v}.
{P} birth took place on {v}.
The register gives {v} as {p} date of birth.
It was on {v} that {s} was born.
# birth_place
was born in {v}
{is} a native of {v}
came from {v}, where {he} was born
first saw the light of day in {v}
was born in a small house in {v}
came into the world in {v}
was born at {his} family's home in {v}
was born and baptised in {v}
{has} {v} as {his} birthplace
{P} birthplace was {v}.
The place of {p} birth was {v}.
It was in {v} that {s} was born.
{P} birth took place in {v}.
{v} is the place where {s} was born.
# father
{P} father was {v}.
had {v} as {his} father
was fathered by {v}
was brought up by {his} father, {v}
inherited a workshop from {his} father, {v}
took after {his} father, {v}
{P} father was named {v}.
{P} father, {v}, was strict but fair.
The name of {p} father was {v}.
{v} was {p} father.
grew up in the house of {his} father, {v}
was named by {his} father, {v}
As a child, {s} often travelled with {his} father, {v}.
# mother
{P} mother was {v}.
had {v} as {his} mother
was born to {v}, {his} mother
was raised by {his} mother, {v}
learned to read from {his} mother, {v}
took after {his} mother, {v}
{P} mother was named {v}.
{P} mother, {v}, ran the household.
The name of {p} mother was {v}.
{v} was {p} mother.
grew up in the house of {his} mother, {v}
was named by {his} mother, {v}
As a child, {s} learned songs from {his} mother, {v}.
# spouse
married {v}
{is} married to {v}
took {v} as {his} {spouse_word}
found a {spouse_word} in {v}
exchanged vows with {v}
shared a home with {his} {spouse_word}, {v}
met and married {v}
was wed to {v} in a quiet ceremony
celebrated {his} wedding to {v} in the spring
{P} {spouse_word} {is} {v}.
{P} marriage was to {v}.
The name of {p} {spouse_word} {is} {v}.
{v} became {p} {spouse_word}.
In marriage {s} was joined to {v}.
# teacher
was taught by {v}
was a pupil of {v}
studied under {v}
had {v} as {his} teacher
learned the trade from {his} teacher, {v}
was trained by {v}
received {his} lessons from {v}
owed much to {his} teacher, {v}
took lessons with {v}
found a patient teacher in {v}
{P} teacher was {v}.
{v} was {p} teacher.
As a pupil, {s} was guided by {v}.
The name of {p} teacher was {v}.
# sibling
had a {sibling_word} named {v}
{is} the {own_sibling_word} of {v}
grew up with {his} {sibling_word} {v}
shared a room with {his} {sibling_word}, {v}
had one {sibling_word}, {v}
{has} {v} as {his} {sibling_word}
wrote many letters to {his} {sibling_word}, {v}
quarrelled often with {his} {sibling_word}, {v}
{P} {sibling_word} {is} {v}.
{P} only {sibling_word} {is} {v}.
{P} {sibling_word}, {v}, grew up in the same house.
{v} {is} {p} {sibling_word}.
The name of {p} {sibling_word} {is} {v}.
# employer
{works} for {v}
was employed by {v}
was hired by {v}
joined the staff of {v}
found a post at {v}
spent {his} career at {v}
earned {his} wages at {v}
was on the payroll of {v}
entered the service of {v}
took a position with {v}
had {v} as {his} employer
{P} employer was {v}.
The firm that employed {o} was {v}.
Throughout {his} career {s} was employed by {v}.
{v} gave {o} a permanent job.
# school
studied at {v}
was educated at {v}
attended {v}
was a student at {v}
graduated from {v}
received {his} education at {v}
went to school at {v}
passed {his} examinations at {v}
completed {his} studies at {v}
was enrolled at {v}
earned {his} diploma at {v}
{P} school was {v}.
{P} education took place at {v}.
It was at {v} that {s} was educated.
# death_date
died on {v}
passed away on {v}
died after a short illness on {v}
drew {his} last breath on {v}
died peacefully on {v}
died in {his} sleep on {v}
{P} death came on {v}.
{P} life ended on {v}.
{P} date of death is {v}.
The date of {p} death is {v}.
Death came to {o} on {v}.
It was on {v} that {s} died.
The register gives {v} as {p} date of death.
# death_place
died in {v}
passed away in {v}
spent {his} last days in {v} and died there
died at a friend's house in {v}
drew {his} last breath in {v}
died in a hospital in {v}
met {his} end in {v}
{P} death took place in {v}.
{P} life ended in {v}.
The place of {p} death was {v}.
It was in {v} that {s} died.
Death came to {o} in {v}.
{v} is the place where {s} died.
# award
won the {v}
received the {v}
was awarded the {v}
was honoured with the {v}
was given the {v}
took home the {v}
was presented with the {v}
earned the {v}
{is} a winner of the {v}
accepted the {v} with a short speech
{P} work was rewarded with the {v}.
{P} greatest honour was the {v}.
The {v} was awarded to {o}.
The award that {s} received was the {v}.
# instrument
{plays} the {v}
learned to play the {v}
{is} a gifted player of the {v}
played the {v} in a local band
taught {himself} to play the {v}
practised the {v} every evening
could play the {v} from an early age
often performed on the {v}
owned a fine {v} and played it well
{P} instrument {is} the {v}.
As a musician {s} played the {v}.
The instrument that {s} played was the {v}.
{P} skill on the {v} was admired.
# hobby
{enjoys} {v}
{is} fond of {v}
spent {his} free time on {v}
found rest in {v}
took up {v} as a hobby
devoted {his} Sundays to {v}
was known to neighbours for {his} love of {v}
had a passion for {v}
filled {his} leisure hours with {v}
{P} hobby {is} {v}.
{P} favourite pastime {is} {v}.
For pleasure, {s} took to {v}.
Away from work, {s} {enjoys} {v}.
""")

QUESTION: dict[str, tuple[str, ...]] = phrase_table("""
# occupation
What was the occupation of {s}?
What was {p} profession?
What did {s} do for a living?
What is the profession of {s}?
What kind of work did {s} do?
Name the occupation of {s}.
What line of work was {s} in?
Which profession did {s} have?
{s} had which occupation?
What was {p} job?
# nationality
What is the nationality of {s}?
What is {p} nationality?
Which nationality does {s} have?
What nationality was {s}?
State the nationality of {s}.
{s} was of which nationality?
Which citizenship did {s} hold?
What citizenship does {s} have?
Of what nationality was {s}?
# birth_date
When was {s} born?
What is the birth date of {s}?
On what date was {s} born?
What is {p} date of birth?
On which day was {s} born?
What is the date of birth of {s}?
Give the date of birth of {s}.
{s} was born on what date?
When did {s} come into the world?
Can you tell me when {s} was born?
# birth_place
Where was {s} born?
What is the birthplace of {s}?
In which town was {s} born?
What is {p} birthplace?
In what place was {s} born?
What is the place of birth of {s}?
Name the birthplace of {s}.
{s} was born in which place?
Which place is the birthplace of {s}?
Can you tell me where {s} was born?
# father
Who was the father of {s}?
Who was {p} father?
What is the name of the father of {s}?
Name the father of {s}.
What was {p} father called?
Who fathered {s}?
{s} was fathered by whom?
Which man was the father of {s}?
Can you tell me who the father of {s} was?
# mother
Who was the mother of {s}?
Who was {p} mother?
What is the name of the mother of {s}?
Name the mother of {s}.
What was {p} mother called?
Which woman was the mother of {s}?
Who gave birth to {s}?
{s} was the child of which mother?
Can you tell me who the mother of {s} was?
# spouse
Who was {s} married to?
Who was the {spouse_word} of {s}?
Who was {p} {spouse_word}?
To whom was {s} married?
What is the name of the {spouse_word} of {s}?
Whom did {s} marry?
Name the {spouse_word} of {s}.
{s} was married to whom?
Who married {s}?
# teacher
Who was the teacher of {s}?
Who taught {s}?
Who was {p} teacher?
By whom was {s} taught?
Under whom did {s} study?
What is the name of the teacher of {s}?
Whose pupil was {s}?
{s} was a pupil of whom?
Name the teacher of {s}.
# sibling
Who was the {sibling_word} of {s}?
Who was {p} {sibling_word}?
What is the name of the {sibling_word} of {s}?
What was {p} {sibling_word} called?
Name the {sibling_word} of {s}.
{s} was the {own_sibling_word} of whom?
Can you name the {sibling_word} of {s}?
What was the {sibling_word} of {s} called?
# employer
Who was the employer of {s}?
Which organisation employed {s}?
For which company did {s} work?
Who was {p} employer?
Who employed {s}?
By which organisation was {s} employed?
Where did {s} work?
Name the employer of {s}.
{s} worked for which organisation?
Which firm did {s} work for?
# school
Where did {s} study?
Which school did {s} attend?
What school did {s} go to?
At which school was {s} educated?
What was {p} school?
Where was {s} educated?
Name the school that {s} attended.
{s} studied at which school?
From which school did {s} graduate?
# death_date
When did {s} die?
What is the date of death of {s}?
On what date did {s} die?
What is {p} date of death?
On which day did {s} die?
Give the date on which {s} died.
{s} died on what date?
When did the life of {s} end?
Can you tell me when {s} died?
# death_place
Where did {s} die?
What is the place of death of {s}?
In which town did {s} die?
What is {p} place of death?
In what place did {s} die?
Name the place where {s} died.
{s} died in which place?
Where did the life of {s} end?
Can you tell me where {s} died?
# award
Which award did {s} win?
What award was given to {s}?
Which prize did {s} receive?
With what award was {s} honoured?
What was {p} award?
Name the award that {s} received.
{s} received which award?
What honour was awarded to {s}?
Which award was {s} given?
# instrument
Which instrument did {s} play?
What instrument did {s} play?
What was {p} instrument?
What musical instrument was played by {s}?
Name the instrument that {s} played.
{s} played which instrument?
On which instrument did {s} perform?
Which musical instrument did {s} learn to play?
# hobby
What was the hobby of {s}?
What was {p} hobby?
What did {s} do for pleasure?
What was the favourite pastime of {s}?
How did {s} spend leisure hours?
Name the hobby of {s}.
Which hobby did {s} have?
What was {p} favourite pastime?
{s} had which hobby?
""")

# Noun phrases for the target of a link in a two-hop question; {e} is the first entity, {t} the
# type of the target ("town", "company").
LINKS: dict[str, tuple[str, ...]] = phrase_table("""
# father
the father of {e}
{e}'s father
the man who was the father of {e}
the man who fathered {e}
# mother
the mother of {e}
{e}'s mother
the woman who gave birth to {e}
the woman who was the mother of {e}
# spouse
the {spouse_word} of {e}
{e}'s {spouse_word}
the {spouse_kind} who married {e}
the person to whom {e} was married
# teacher
the teacher of {e}
{e}'s teacher
the person who taught {e}
the teacher who trained {e}
# sibling
the {sibling_word} of {e}
{e}'s {sibling_word}
the {sibling_word} with whom {e} grew up
# employer
the employer of {e}
the {t} that employed {e}
the {t} for which {e} worked
{e}'s employer
the {t} where {e} worked
# birth_place
the birthplace of {e}
the {t} where {e} was born
the {t} in which {e} was born
{e}'s birthplace
# death_place
the {t} where {e} died
the {t} in which {e} died
the place of death of {e}
""")
