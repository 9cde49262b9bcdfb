"""Needles: short documents that hide one or two arbitrary facts among filler.

The subject of a needle is a site such as "Marlow archive"; phrases write it "the {n}". ``{v}`` is
the value. Every phrase is a whole sentence.
"""

from __future__ import annotations

import random

from msa.training.worlds.schema import listed, phrase_table, words

__all__ = ["DOCUMENT", "FILLER", "OPENINGS", "QUESTION", "SITES", "needle_value"]

SITES: tuple[str, ...] = words(
    """
    archive vault depot observatory lighthouse library warehouse armoury granary museum
    laboratory station reservoir chapel signal-house boathouse storeroom treasury cellar
    greenhouse bunker customs-house hangar infirmary kennel lodge mint orchard pavilion
    quarry refinery shipyard tollhouse viaduct weighhouse barracks cloister dispensary
    """
)

OPENINGS: tuple[str, ...] = phrase_table("""
# opening
Visitors to the {n} should read this note.
This note concerns the {n}.
The following was written down by a clerk of the {n}.
The {n} has been in use for many years.
Not many people have been inside the {n}.
A short memorandum about the {n} has survived.
The {n} was repaired after a storm.
The {n} is open on weekdays only.
The rules of the {n} are pinned to a board by the gate.
The staff of the {n} change every autumn.
The {n} stands at the end of a gravel road.
Newcomers at the {n} are given a short list of instructions.
The {n} is looked after by two caretakers.
An old logbook describes the {n}.
""")["opening"]

FILLER: tuple[str, ...] = phrase_table("""
# filler
The roof was mended last year.
The weather on the day of the inspection was fine.
Nobody has complained about the noise.
Boots are to be cleaned before entering.
The old lamps have been replaced.
Tea is served in the back room.
The windows face a row of poplars.
The road is often muddy in winter.
Dogs are not allowed inside.
A bench has been placed near the entrance.
The caretaker asks for patience.
Deliveries arrive by cart in the morning.
The paint on the fence is peeling.
Most of the shelves are empty now.
The keys are counted at the end of every week.
The guest book is kept under the counter.
A new stove has been ordered.
Swallows nest under the eaves.
The floor creaks near the stairs.
The well in the yard is covered with planks.
Letters are collected on Tuesdays.
The clock in the hall runs a little slow.
Visitors often ask about the old bell.
The path to the gate was widened.
Smoking is forbidden everywhere.
The stairs are steep and should be used with care.
Spare blankets are stored in the attic.
The ledger has been rebound in leather.
""")["filler"]

DOCUMENT: dict[str, tuple[str, ...]] = phrase_table("""
# access_code
The access code for the {n} is {v}.
The access code of the {n} is {v}.
To enter the {n}, one needs the access code {v}.
The {n} can be opened with the access code {v}.
The door of the {n} opens with the access code {v}.
Those who work at the {n} know its access code, {v}.
Type {v} as the access code at the {n}.
The current access code of the {n} was set to {v}.
The {n} uses the access code {v}.
The lock of the {n} accepts only the access code {v}.
The access code {v} unlocks the {n}.
For the {n}, the access code remains {v}.
# password
The password of the {n} is {v}.
The password for the {n} is {v}.
The guards of the {n} ask for the password {v}.
At the {n} the password is {v}.
Whoever says the password {v} may enter the {n}.
The keepers of the {n} chose {v} as their password.
The {n} is entered with the password {v}.
The secret password of the {n} remains {v}.
Everyone at the {n} has memorised the password {v}.
The password {v} opens the inner room of the {n}.
The {n} uses the password {v}.
At night the password {v} is required at the {n}.
# frequency
The radio frequency of the {n} is {v} kilohertz.
The {n} transmits on a radio frequency of {v} kilohertz.
Messages to the {n} are sent on {v} kilohertz.
The {n} can be reached by radio on {v} kilohertz.
The radio of the {n} is tuned to {v} kilohertz.
The {n} listens on a frequency of {v} kilohertz.
On the air, the {n} uses {v} kilohertz.
The transmitter of the {n} works on {v} kilohertz.
The frequency assigned to the {n} is {v} kilohertz.
By radio the {n} answers on {v} kilohertz.
Operators at the {n} keep to {v} kilohertz.
The {n} was given a radio frequency of {v} kilohertz.
# door_colour
The door of the {n} is {v}.
The front door of the {n} is painted {v}.
The {n} has a door painted {v}.
The colour of the door of the {n} is {v}.
The door of the {n} was painted {v}.
Look for the {v} door of the {n}.
The {n} can be recognised by its {v} door.
At the {n} the door is {v}.
The {n} is entered through a door painted {v}.
Painters gave the {n} {av} door.
The {n} has {av} door.
The committee chose {v} for the door of the {n}.
# key_place
The spare key of the {n} is hidden {v}.
The spare key to the {n} lies {v}.
The {n} has a spare key, hidden {v}.
The spare key for the {n} is kept {v}.
Anyone who is locked out of the {n} will find the spare key {v}.
The keepers of the {n} hid the spare key {v}.
One spare key of the {n} can be found {v}.
The hiding place of the spare key to the {n} is {v}.
The {n} can be opened with a spare key kept {v}.
Since last year the spare key of the {n} has been hidden {v}.
Someone put the spare key of the {n} {v}.
At the {n}, the spare key lies {v}.
# closing_time
The {n} closes at {v}.
The closing time of the {n} is {v}.
The gates of the {n} are locked at {v}.
The {n} shuts its doors at {v}.
Visitors must leave the {n} by its closing time, {v}.
The {n} is closed every day at {v}.
The bell of the {n} announces closing time at {v}.
At {v} the {n} closes for the night.
The {n} stays open until its closing time at {v}.
Closing time at the {n} is {v}.
The {n} does not close before {v}, its closing time.
Each evening the {n} closes at exactly {v}.
# inventory
The {n} holds {v} crates.
The {n} has {v} crates in store.
There are {v} crates in the {n}.
The number of crates in the {n} is {v}.
An inventory of the {n} counted {v} crates.
Exactly {v} crates are stored in the {n}.
The stock of the {n} consists of {v} crates.
At the last count, the {n} held {v} crates.
The inventory of the {n} lists {v} crates.
The {n} stores {v} crates.
The clerk counted {v} crates in the {n}.
A total of {v} crates fill the {n}.
# emblem
The emblem of the {n} is {av}.
The {n} has {av} as its emblem.
The emblem of the {n} shows {av}.
The {n} uses {av} as its emblem.
The animal on the emblem of the {n} is {av}.
The seal of the {n} bears the emblem of {av}.
The {n} chose {av} for its emblem.
Above the gate of the {n} hangs its emblem, {av}.
The flag of the {n} carries its emblem, {av}.
The {n} is represented by an emblem showing {av}.
As its emblem the {n} adopted {av}.
The emblem painted on the wall of the {n} is {av}.
""")

QUESTION: dict[str, tuple[str, ...]] = phrase_table("""
# access_code
What is the access code for the {n}?
What is the access code of the {n}?
Which access code opens the {n}?
With which access code can the {n} be opened?
Tell me the access code for the {n}.
What access code does the {n} use?
What code is needed to enter the {n}?
Which code does the lock of the {n} accept?
# password
What is the password of the {n}?
What is the password for the {n}?
Which password is used at the {n}?
Tell me the password of the {n}.
With which password can one enter the {n}?
What password do the keepers of the {n} use?
What word must be said to enter the {n}?
Which password does the {n} use?
# frequency
On what radio frequency does the {n} transmit?
What is the radio frequency of the {n}?
On how many kilohertz does the {n} transmit?
On which frequency can the {n} be reached?
What frequency is assigned to the {n}?
State the radio frequency of the {n}.
To what frequency is the radio of the {n} tuned?
Which radio frequency does the {n} use?
# door_colour
What colour is the door of the {n}?
What is the colour of the door of the {n}?
Which colour is the door of the {n}?
In which colour is the door of the {n} painted?
Name the colour of the door of the {n}.
What colour was the door of the {n} painted?
The door of the {n} is which colour?
By a door of what colour can the {n} be recognised?
# key_place
Where is the spare key of the {n} hidden?
Where is the spare key to the {n}?
What is the hiding place of the spare key to the {n}?
Where can the spare key of the {n} be found?
Where is the spare key for the {n} kept?
Where did the keepers of the {n} hide the spare key?
The spare key of the {n} is hidden where?
Tell me where the spare key of the {n} is.
# closing_time
When does the {n} close?
At what time does the {n} close?
What is the closing time of the {n}?
At what hour does the {n} shut its doors?
Tell me the closing time of the {n}.
Until what time is the {n} open?
When are the gates of the {n} locked?
The {n} closes at what time?
# inventory
How many crates does the {n} hold?
How many crates are in the {n}?
What is the number of crates in the {n}?
How many crates are stored in the {n}?
State the number of crates in the {n}.
The {n} holds how many crates?
How many crates were counted in the {n}?
How many crates does the inventory of the {n} list?
# emblem
What is the emblem of the {n}?
Which animal is on the emblem of the {n}?
What animal does the {n} have as its emblem?
Which animal does the {n} use as its emblem?
Name the animal on the emblem of the {n}.
What does the emblem of the {n} show?
The emblem of the {n} shows which animal?
What animal appears on the emblem of the {n}?
""")

_COLOURS = listed(
    """
    red,green,blue,yellow,white,black,grey,orange,purple,brown,crimson,turquoise,violet,
    scarlet,dark green,pale blue,bright yellow,dark red,cream,copper,silver,lilac,pink
    """
)
_ANIMALS = words(
    """
    heron otter lynx badger falcon owl stag hare raven swan bear wolf salmon beetle tortoise
    boar fox crane squirrel eagle pike hedgehog goat ram bull horse lizard moth weasel seal
    pelican magpie dolphin cat hound viper rooster donkey toad kingfisher
    """
)
_HIDING_RELATION = ("under", "behind", "inside", "beneath", "next to")
_HIDING_THINGS = listed(
    """
    the flowerpot,the third barrel,the rain butt,the stone bench,the loose brick,the iron stove,
    the blue cupboard,the woodpile,the beehive,the old anchor,the water tank,the tool chest,
    the milestone,the hollow oak,the watering can,the dog kennel,the mailbox,the sundial,
    the coal box,the umbrella stand,the piano,the broken clock,the birdhouse
    """
)


def needle_value(relation: str, rng: random.Random, stem: str) -> tuple[str, tuple[str, ...]]:
    """Draw the value of a needle.

    Args:
        relation: A section of the phrase tables.
        rng: Source of randomness.
        stem: A stem from the split's name lists, used for made-up words.

    Returns:
        The value and its other accepted forms.
    """
    if relation == "access_code":
        return str(rng.randrange(10**3, 10 ** rng.randint(4, 6))), ()
    if relation == "password":
        return stem.lower() + rng.choice(("wick", "lume", "dor", "quill", "thorn", "sel")), ()
    if relation == "frequency":
        value = str(rng.randrange(150, 9999))
        return value, (f"{value} kilohertz",)
    if relation == "door_colour":
        return rng.choice(_COLOURS), ()
    if relation == "key_place":
        return f"{rng.choice(_HIDING_RELATION)} {rng.choice(_HIDING_THINGS)}", ()
    if relation == "closing_time":
        minute = rng.choice(("05", "10", "15", "20", "30", "40", "45", "50"))
        hour = rng.randint(1, 11)
        return f"{hour}:{minute} pm", (f"{hour}:{minute} p.m.", f"{hour}:{minute}")
    if relation == "inventory":
        value = str(rng.randint(12, 990))
        return value, (f"{value} crates",)
    animal = rng.choice(_ANIMALS)
    return animal, ()
